//! What the machine is, what it is busy with, and what a measurement cost it.
//!
//! Processor time is that of the whole machine from `/proc/stat` (ticks of 10 ms, so windows of
//! a second or more), because softirqs charge a datapath's work to whoever was interrupted.
//! Time of processes that are neither ours nor the kernel's is summed apart: a window in which
//! others ran is marked as disturbed.

use std::collections::HashMap;
use std::fs;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// Share of all processors that may be in use by others before a run is refused.
pub const BUSY_LIMIT: f64 = 0.03;

const TICKS_PER_SECOND: f64 = 100.0;

/// Totals since boot, in seconds over all processors.
#[derive(Clone, Copy, Debug, Default)]
struct Totals {
    busy: f64,
    idle: f64,
    soft_interrupt: f64,
    steal: f64,
}

/// A reading of the counters at one moment.
pub struct Sample {
    at: Instant,
    totals: Totals,
    foreign: HashMap<i32, f64>,
}

/// What a window cost.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// Length of the window, seconds.
    pub seconds: f64,
    /// Time processors were not idle as ticks found them, seconds over all of them.
    pub busy: f64,
    /// Time processors were not idle, by the clock: kernels that stop the tick on an idle
    /// processor measure how long it was (`get_idle_time`, fs/proc/stat.c). Seconds over all.
    pub awake: f64,
    /// Part of `busy` in soft interrupts, seconds.
    pub soft_interrupt: f64,
    /// Time the hypervisor took away, seconds.
    pub steal: f64,
    /// Part of `busy` spent by processes that have nothing to do with the benchmark, seconds.
    pub foreign: f64,
}

impl Usage {
    /// Whether the figures of this window are worth little.
    pub fn disturbed(&self) -> bool {
        let all = self.seconds * processors() as f64;
        self.foreign + self.steal > all * BUSY_LIMIT
    }
}

impl Sample {
    /// Reads the counters now.
    pub fn take() -> Result<Self> {
        let foreign = foreign_seconds()?;
        Ok(Self { totals: totals()?, at: Instant::now(), foreign })
    }

    /// What happened from this reading to now.
    pub fn usage(&self) -> Result<Usage> {
        let at = Instant::now();
        let now = totals()?;
        let foreign = foreign_seconds()?
            .iter()
            .map(|(process, seconds)| {
                (seconds - self.foreign.get(process).copied().unwrap_or(0.0)).max(0.0)
            })
            .sum();
        let seconds = (at - self.at).as_secs_f64();
        let steal = now.steal - self.totals.steal;
        let idle = now.idle - self.totals.idle;
        Ok(Usage {
            seconds,
            awake: (seconds * processors() as f64 - idle - steal).max(0.0),
            busy: now.busy - self.totals.busy,
            soft_interrupt: now.soft_interrupt - self.totals.soft_interrupt,
            steal,
            foreign,
        })
    }
}

/// Where threads and programs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processors {
    /// Wherever the scheduler puts them.
    Free,
    /// Generators on the first processor, everything else on the others.
    Split,
}

impl Processors {
    /// Binds the calling thread, and all it starts from now on, to what is not a generator's.
    pub fn take_rest(self) -> Result<()> {
        let all = 0..processors();
        match self {
            Self::Free => bind(all),
            Self::Split => bind(1..all.end.max(2)),
        }
    }

    /// Binds the calling thread to a generator's place.
    pub fn take_generator(self) -> Result<()> {
        match self {
            Self::Free => Ok(()),
            Self::Split => bind(0..1),
        }
    }
}

fn bind(range: std::ops::Range<usize>) -> Result<()> {
    let mut set = CpuSet::new();
    for processor in range {
        set.set(processor)?;
    }
    sched_setaffinity(Pid::from_raw(0), &set)
        .context("cannot bind a thread to processors (two are needed)")
}

/// Number of processors the machine has, whatever this thread is bound to.
fn online() -> usize {
    fs::read_to_string("/proc/stat").map_or(1, |text| {
        text.lines()
            .filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "))
            .count()
            .max(1)
    })
}

/// Number of processors the kernel gives us.
pub fn processors() -> usize {
    static COUNT: OnceLock<usize> = OnceLock::new();
    *COUNT.get_or_init(online)
}

/// Watches for `time`, and gives the share of all processors that was busy meanwhile.
pub fn busy_share(time: Duration) -> Result<f64> {
    let before = Sample::take()?;
    std::thread::sleep(time);
    let usage = before.usage()?;
    Ok((usage.busy + usage.steal) / (usage.seconds * processors() as f64))
}

/// Waits until the machine is idle; `false` if it was still busy at the deadline.
pub fn wait_until_idle(deadline: Duration) -> Result<bool> {
    let end = Instant::now() + deadline;
    loop {
        if busy_share(Duration::from_millis(200))? <= BUSY_LIMIT {
            return Ok(true);
        }
        if Instant::now() >= end {
            return Ok(false);
        }
    }
}

fn totals() -> Result<Totals> {
    let text = fs::read_to_string("/proc/stat").context("cannot read /proc/stat")?;
    let line = text.lines().next().context("/proc/stat is empty")?;
    // proc(5): user nice system idle iowait irq softirq steal; guest time is part of user.
    let fields: Vec<f64> = line
        .split_whitespace()
        .skip(1)
        .map(|field| field.parse().unwrap_or(0.0) / TICKS_PER_SECOND)
        .collect();
    let field = |index: usize| fields.get(index).copied().unwrap_or(0.0);
    Ok(Totals {
        busy: field(0) + field(1) + field(2) + field(5) + field(6),
        idle: field(3) + field(4),
        soft_interrupt: field(6),
        steal: field(7),
    })
}

/// Processor seconds, by process, of all processes but the kernel's threads, this process and
/// its descendants. Time of ended children that were waited for is in their parents' figures.
fn foreign_seconds() -> Result<HashMap<i32, f64>> {
    let mut parents = HashMap::new();
    let mut seconds = HashMap::new();
    for entry in fs::read_dir("/proc").context("cannot list /proc")?.flatten() {
        let Some(process) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok())
        else {
            continue;
        };
        // A process may end between the listing and the reading.
        let Ok(text) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        // The command's name may contain blanks and parentheses: fields are counted after it.
        let Some((_, rest)) = text.rsplit_once(')') else {
            continue;
        };
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let number = |index: usize| {
            fields.get(index).and_then(|field| field.parse::<i64>().ok()).unwrap_or(0)
        };
        parents.insert(process, number(1) as i32);
        let ticks: i64 = (11..=14).map(number).sum();
        seconds.insert(process, ticks as f64 / TICKS_PER_SECOND);
    }
    let own = std::process::id() as i32;
    let kernel = 2;
    seconds.retain(|&process, _| {
        let mut ancestor = process;
        loop {
            if ancestor == own || ancestor == kernel {
                return false;
            }
            match parents.get(&ancestor) {
                Some(&parent) if parent != 0 && parent != ancestor => ancestor = parent,
                _ => return true,
            }
        }
    });
    // Our ancestors' figures include us once we are waited for, which is not during a run.
    Ok(seconds)
}

/// Description of the machine for the report.
pub fn describe() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let processor = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| {
            line.strip_prefix("model name")
                .map(|rest| rest.trim_start_matches([' ', '\t', ':']).to_owned())
        })
        .unwrap_or_else(|| "unknown".into());
    let mebibytes = read("/proc/meminfo")
        .lines()
        .find_map(|line| {
            line.strip_prefix("MemTotal:")
                .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        })
        .unwrap_or(0)
        / 1024;
    json!({
        "kernel": read("/proc/sys/kernel/osrelease"),
        "processor": processor,
        "processors": processors(),
        "memory_mib": mebibytes,
        "virtual_machine": read("/proc/cpuinfo").contains(" hypervisor"),
        "commit": commit(),
    })
}

/// The commit that is measured, as far as the working folder tells.
fn commit() -> Option<String> {
    let output = std::process::Command::new("git")
        .args(["describe", "--always", "--dirty"])
        .output()
        .ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
