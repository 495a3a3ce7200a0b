//! One run of the harness: checks, rounds, report.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::datapath::Datapath;
use super::machine::{self, BUSY_LIMIT};
use super::options::Options;
use super::report::{Measurement, Results};
use super::workload::{Direction, Timing, Workload};

/// Does what the command line asks for.
pub fn run(options: &Options) -> Result<()> {
    let datapaths = datapaths(options)?;
    let workloads = workloads(options);
    if options.list {
        for workload in &workloads {
            println!("workload {}", workload.name());
        }
        for datapath in &datapaths {
            println!("datapath {}", datapath.name);
        }
        return Ok(());
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root: it makes network namespaces, taps and packet sockets");
    }
    let timing = Timing {
        window: Duration::from_secs_f64(options.window()?),
        warm_up: Duration::from_millis(if options.quick { 300 } else { 1000 }),
    };
    let machine = machine::describe();
    println!("machine: {machine}");
    check_idle(options)?;
    let scratch = Scratch::new()?;
    let results = measure(options, &datapaths, &workloads, timing, &scratch.0)?;
    let names: Vec<String> = datapaths
        .iter()
        .map(|datapath| datapath.name.clone())
        .collect();
    println!("\n{}", results.table(&workloads, &names, BASE));
    if let Some(file) = &options.json {
        let run = json!({
            "machine": machine, "rounds": options.rounds(), "window_seconds": options.window()?,
            "quick": options.quick, "pinned": options.pin, "datapaths": names,
        });
        let text = serde_json::to_string_pretty(&results.to_json(run, &workloads, &names, BASE))?;
        std::fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    if results.measurements.is_empty() {
        bail!("nothing was measured");
    }
    Ok(())
}

/// The column that ratios are taken against.
const BASE: &str = "macvtap";

fn datapaths(options: &Options) -> Result<Vec<Datapath>> {
    let mut all = vec![Datapath::macvtap()];
    if options.daemon.is_empty() {
        all.push(Datapath::daemon(
            env!("CARGO_BIN_EXE_vlanswitchd"),
            "vlanswitchd",
        )?);
    }
    for (number, command) in options.daemon.iter().enumerate() {
        all.push(Datapath::daemon(
            command,
            &format!("daemon-{}", number + 1),
        )?);
    }
    let named = |datapath: &Datapath| {
        options
            .only
            .iter()
            .any(|only| datapath.name.contains(only.as_str()))
    };
    if all.iter().any(named) {
        all.retain(|datapath| datapath.name == BASE || named(datapath));
    }
    Ok(all)
}

fn workloads(options: &Options) -> Vec<Workload> {
    let mut all = Vec::new();
    for direction in [Direction::ToWire, Direction::ToGuest] {
        for length in [60, 512, 1514] {
            all.push(Workload::Flood { direction, length });
        }
    }
    for direction in [Direction::ToWire, Direction::ToGuest] {
        for streams in [1, 8] {
            all.push(Workload::Tcp { direction, streams });
        }
    }
    for pause in [Duration::ZERO, Duration::from_millis(1)] {
        all.push(Workload::RoundTrip { pause });
    }
    let named = |workload: &Workload| {
        options
            .only
            .iter()
            .any(|only| workload.name().contains(only.as_str()))
    };
    if all.iter().any(named) {
        all.retain(named);
    }
    all
}

/// Refuses to measure beside other work.
fn check_idle(options: &Options) -> Result<()> {
    if machine::wait_until_idle(Duration::from_secs(3))? {
        return Ok(());
    }
    let share = machine::busy_share(Duration::from_secs(1))? * 100.0;
    let limit = BUSY_LIMIT * 100.0;
    if !options.force {
        bail!(
            "the machine is busy: {share:.0} % of its processors are in use (limit {limit:.0} %). \
             Stop what runs, or measure all the same with --force; such figures are not to be quoted"
        );
    }
    println!(
        "WARNING: the machine is busy ({share:.0} % of its processors in use): these figures are not to be quoted"
    );
    Ok(())
}

fn measure(
    options: &Options,
    datapaths: &[Datapath],
    workloads: &[Workload],
    timing: Timing,
    scratch: &Path,
) -> Result<Results> {
    let mut results = Results::default();
    let total = options.rounds() * datapaths.len() * workloads.len();
    let mut done = 0;
    for round in 0..options.rounds() {
        for workload in workloads {
            let mut order: Vec<&Datapath> = datapaths.iter().collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for datapath in order {
                done += 1;
                let name = workload.name();
                eprintln!(
                    "[{done}/{total}] round {} {name} {}",
                    round + 1,
                    datapath.name
                );
                if !options.force && !machine::wait_until_idle(Duration::from_secs(10))? {
                    eprintln!(
                        "WARNING: the machine became busy; this measurement is not to be quoted"
                    );
                }
                match workload.measure(datapath, scratch, timing) {
                    Ok(figures) => {
                        if options.verbose {
                            eprintln!("    {figures:.3?}");
                        }
                        results.measurements.push(Measurement {
                            round,
                            workload: name,
                            datapath: datapath.name.clone(),
                            figures,
                        });
                    }
                    Err(error) => {
                        eprintln!("    failed: {error:#}");
                        results
                            .failures
                            .push((name, datapath.name.clone(), format!("{error:#}")));
                    }
                }
            }
        }
    }
    Ok(results)
}

/// A folder for device nodes and logs that goes with the run.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("versus-macvtap-{}", std::process::id()));
        std::fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is a few kilobytes in the temporary folder.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
