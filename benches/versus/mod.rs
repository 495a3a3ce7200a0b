//! The parts of the harness; `versus_macvtap.rs` tells what it measures and how to read it.
//!
//! Direction: main -> plan -> { workload, report, plots } -> { scene, traffic } ->
//! { datapath, namespace, kernel, machine, statistics }. Nothing here is used by the product.

pub mod datapath;
pub mod flood;
pub mod kernel;
pub mod machine;
pub mod namespace;
pub mod options;
pub mod peers;
pub mod plots;
pub mod promises;
pub mod report;
pub mod round_trip;
pub mod run;
pub mod scene;
pub mod statistics;
pub mod stream;
pub mod traffic;
pub mod workload;
