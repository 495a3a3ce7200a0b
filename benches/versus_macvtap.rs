//! vlanswitchd against macvtap and other software switches, on the reader's own machine.
//!
//! ```text
//! cargo bench --bench versus_macvtap -- --quick
//! cargo bench --bench versus_macvtap -- --json results.json --plots plots/
//! ```
//!
//! Needs root; touches only network namespaces of its own, which vanish with it.
//!
//! Every measurement is made on a fresh test bed (`versus/scene.rs`), with the same generators
//! and receivers for every datapath. A round measures each workload once with every datapath,
//! one right after the other, and every second round in reverse order: what drifts with time
//! then hits all alike. A table quotes medians over the rounds, their spread, and the median of
//! the ratios to macvtap taken within each round. macvtap does no VLAN work in it; the others do.

mod versus;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    match versus::run::run(&versus::options::Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
