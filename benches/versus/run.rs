//! One run of the harness: checks, rounds, report.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::datapath::Datapath;
use super::machine::{self, BUSY_LIMIT, Processors};
use super::options::Options;
use super::peers::Peer;
use super::plots;
use super::promises;
use super::report::{Measurement, Results};
use super::workload::{Bench, Outcome, Workload};

/// The column that ratios are taken against.
const BASE: &str = "macvtap";

/// Does what the command line asks for.
pub fn run(options: &Options) -> Result<()> {
    if let Some(file) = &options.from {
        return report_again(options, file)
            .with_context(|| format!("cannot use {}", file.display()));
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root: it makes network namespaces, taps and packet sockets");
    }
    let (datapaths, absent) = datapaths(options)?;
    let workloads = workloads(options);
    if options.list {
        for workload in &workloads {
            println!("workload {}", workload.name());
        }
        for datapath in &datapaths {
            println!("datapath {}", datapath.name);
        }
    }
    for (name, reason) in &absent {
        println!("absent   {name}: {reason}");
    }
    if options.list {
        return Ok(());
    }
    let machine = machine::describe();
    println!("machine  {machine}");
    let processors = if options.pin { Processors::Split } else { Processors::Free };
    println!(
        "pinning  {}",
        match processors {
            Processors::Free => "none: the scheduler places everything",
            Processors::Split =>
                "generators on CPU 0, all else on the others; none for TCP and round trips",
        }
    );
    check_idle(options)?;
    let scratch = Scratch::new()?;
    let begun = Instant::now();
    let bench_window = Duration::from_secs_f64(options.window()?);
    let began = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
    let commands: Vec<String> = datapaths.iter().map(Datapath::command).collect();
    let mut bench = Bench {
        scratch: &scratch.0,
        window: bench_window,
        warm_up: Duration::from_millis(if options.quick { 300 } else { 1000 }),
        processors,
        lossless: BTreeMap::new(),
    };
    let names: Vec<String> = datapaths.iter().map(|datapath| datapath.name.clone()).collect();
    let report = |results: &Results| {
        let run = json!({
            "machine": machine, "rounds": options.rounds(), "window_seconds": bench_window.as_secs_f64(),
            "quick": options.quick, "pinned": options.pin, "forced": options.force,
            "began_unix_seconds": began, "took_seconds": begun.elapsed().as_secs(),
            "datapaths": names, "commands": commands, "absent": absent,
        });
        let report = results.to_json(run, &workloads, &names, BASE);
        if let Some(file) = &options.json {
            std::fs::write(file, serde_json::to_string_pretty(&report)?)
                .with_context(|| format!("cannot write {}", file.display()))?;
        }
        anyhow::Ok(report)
    };
    let results =
        measure(options, &datapaths, &workloads, &mut bench, |results| report(results).map(drop))?;
    show(options, &report(&results)?, &results, &names)?;
    if results.measurements.is_empty() {
        bail!("nothing was measured");
    }
    Ok(())
}

/// What an earlier run found.
fn report_again(options: &Options, file: &Path) -> Result<()> {
    let report: Value = serde_json::from_str(&std::fs::read_to_string(file)?)?;
    let results = Results::from_json(&report)?;
    let names =
        report.pointer("/run/datapaths").and_then(Value::as_array).context("no datapaths in it")?;
    let names: Vec<String> = names.iter().filter_map(Value::as_str).map(String::from).collect();
    show(options, &report, &results, &names)
}

/// Table, promises, plots.
fn show(options: &Options, report: &Value, results: &Results, names: &[String]) -> Result<()> {
    println!("\n{}", results.table(&Workload::all(), names, BASE));
    print!("{}", promises::verdicts(results));
    if let Some(file) = &options.markdown {
        std::fs::write(file, promises::markdown(report, results))
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    if let Some(folder) = &options.plots {
        for file in plots::draw(report, folder)? {
            println!("plot {}", folder.join(file).display());
        }
    }
    Ok(())
}

/// Datapaths that cannot run here, and why.
type Absent = BTreeMap<String, String>;

/// What can be compared here, and what cannot.
fn datapaths(options: &Options) -> Result<(Vec<Datapath>, Absent)> {
    let mut all = vec![Datapath::macvtap()];
    if options.daemon.is_empty() {
        let program = env!("CARGO_BIN_EXE_vlanswitchd");
        for (label, path) in [("vlanswitchd", "packet"), ("vlanswitchd-kernel", "kernel")] {
            let command = format!("{label}={program} --datapath {path}");
            all.push(Datapath::daemon(&command, label)?);
        }
        let command = format!("vlanswitchd-xdp={program} --datapath kernel");
        let mut xdp = Datapath::daemon(&command, "vlanswitchd-xdp")?;
        xdp.plain_guest = true;
        all.push(xdp);
    }
    for (number, command) in options.daemon.iter().enumerate() {
        all.push(Datapath::daemon(command, &format!("daemon-{}", number + 1))?);
    }
    all.extend(Peer::ALL.map(Datapath::peer));
    let named =
        |datapath: &Datapath| options.only.iter().any(|only| datapath.name.contains(only.as_str()));
    if all.iter().any(named) {
        all.retain(|datapath| datapath.name == BASE || named(datapath));
    }
    let mut absent = Absent::new();
    all.retain(|datapath| match datapath.absent() {
        None => true,
        Some(reason) => {
            absent.insert(datapath.name.clone(), reason);
            false
        }
    });
    Ok((all, absent))
}

fn workloads(options: &Options) -> Vec<Workload> {
    let mut all = Workload::all();
    let named = |workload: &Workload| {
        options.only.iter().any(|only| workload.name().contains(only.as_str()))
    };
    if all.iter().any(named) {
        all.retain(named);
    }
    all
}

/// Refuses to measure beside other work.
fn check_idle(options: &Options) -> Result<()> {
    if machine::wait_until_idle(options.patience())? {
        return Ok(());
    }
    let share = machine::busy_share(Duration::from_secs(1))? * 100.0;
    let limit = BUSY_LIMIT * 100.0;
    if !options.force {
        bail!(
            "the machine is busy: {share:.0} % of its processors are in use (limit {limit:.0} %). \
             Stop what runs, wait longer with --patience, or measure all the same with --force; \
             such figures are not to be quoted"
        );
    }
    println!(
        "WARNING: the machine is busy ({share:.0} % of its processors in use): these figures are not to be quoted"
    );
    Ok(())
}

/// Makes all measurements; `after_each` gets what there is so far, so that a long run
/// that is cut off has not been for nothing.
fn measure(
    options: &Options,
    datapaths: &[Datapath],
    workloads: &[Workload],
    bench: &mut Bench,
    mut after_each: impl FnMut(&Results) -> Result<()>,
) -> Result<Results> {
    let mut results = Results::default();
    for workload in workloads {
        for datapath in datapaths {
            if let Some(reason) = workload.cannot(datapath) {
                results.failures.push((workload.name(), datapath.name.clone(), reason.into()));
            }
        }
    }
    let total = options.rounds() * (datapaths.len() * workloads.len() - results.failures.len());
    let begun = Instant::now();
    let mut done = 0_u32;
    for round in 0..options.rounds() {
        for workload in workloads {
            let able = datapaths.iter().filter(|datapath| workload.cannot(datapath).is_none());
            let mut order: Vec<&Datapath> = able.collect();
            if round % 2 == 1 {
                order.reverse();
            }
            for datapath in order {
                let (name, datapath_name) = (workload.name(), datapath.name.clone());
                let each = begun.elapsed().as_secs_f64() / f64::from(done.max(1));
                let left = each * (total as f64 - f64::from(done)) / 60.0;
                done += 1;
                let left =
                    if done == 1 { String::new() } else { format!(" (about {left:.0} min left)") };
                eprintln!("[{done}/{total}] round {} {name} {datapath_name}{left}", round + 1);
                match measure_undisturbed(options, *workload, datapath, bench) {
                    Ok(outcome) => {
                        if options.verbose {
                            eprintln!("    {:.3?}", outcome.figures);
                        }
                        let datapath = datapath_name;
                        results.measurements.push(Measurement {
                            round,
                            workload: name,
                            datapath,
                            outcome,
                        });
                    }
                    Err(error) => {
                        eprintln!("    failed: {error:#}");
                        results.failures.push((name, datapath_name, format!("{error:#}")));
                    }
                }
                after_each(&results)?;
            }
        }
    }
    Ok(results)
}

/// Measures when the machine is idle, and again if it did not stay so.
fn measure_undisturbed(
    options: &Options,
    workload: Workload,
    datapath: &Datapath,
    bench: &mut Bench,
) -> Result<Outcome> {
    const REPEATS: u32 = 3;
    let mut repeat = 1;
    loop {
        if !options.force && !machine::wait_until_idle(options.patience())? {
            eprintln!("    WARNING: the machine became busy; this measurement is not to be quoted");
        }
        let outcome = workload.measure(datapath, bench)?;
        let disturbed = outcome.figures.get("disturbed").is_some_and(|&flag| flag > 0.0);
        if !disturbed || options.force || repeat == REPEATS {
            return Ok(outcome);
        }
        repeat += 1;
        eprintln!("    other work or the hypervisor disturbed it: measured again");
    }
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
