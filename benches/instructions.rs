//! Instructions per forwarded frame, counted by callgrind: a gate for CI.
//!
//! Times on a shared machine say nothing small; instruction counts repeat to the last digit. A
//! worker moves bursts of 64 frames between devices in memory, once with few and once with many
//! bursts; the difference is free of start-up costs. The figure includes the memory device's own
//! copy of each frame, and no kernel.
//!
//! ```text
//! cargo bench --bench instructions
//! ```
//!
//! A case over its limit fails the run. Whoever makes the path longer on purpose raises the
//! limit in the same commit and says why; whoever makes it shorter lowers it.
//!
//! By hand rather than with iai-callgrind: that needs a runner program of exactly its version
//! installed beside the toolchain, for what is two runs of valgrind and a subtraction.

mod in_memory;

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use in_memory::{Bed, CASES, FRAMES};

/// Most instructions a frame may take, by case: what was measured, and a tenth for the compiler.
const LIMITS: [(&str, f64); 5] = [
    ("wire-to-guest", 440.0),
    ("wire-to-32-of-1000-guests", 650.0),
    ("wire-to-guest-tso", 820.0),
    ("guest-to-wire", 525.0),
    ("guest-to-wire-tso", 900.0),
];

const FEW: usize = 100;
const MANY: usize = 600;

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [mode, case, bursts] = arguments.as_slice()
        && mode == "--run"
    {
        run(case, bursts.parse()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let mut failed = 0;
    println!("{:<28} {:>12} {:>8}", "instructions per frame", "measured", "limit");
    for (case, limit) in LIMITS {
        let per_frame =
            (count(case, MANY)? - count(case, FEW)?) as f64 / ((MANY - FEW) * FRAMES) as f64;
        let verdict = if per_frame > limit { "  TOO MANY" } else { "" };
        failed += u32::from(per_frame > limit);
        println!("{case:<28} {per_frame:>12.1} {limit:>8.0}{verdict}");
    }
    println!("{} passed, {failed} failed", LIMITS.len() as u32 - failed);
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What is counted.
fn run(name: &str, bursts: usize) -> Result<()> {
    let case = CASES
        .into_iter()
        .find(|case| case.name == name)
        .with_context(|| format!("no case {name}"))?;
    let mut bed = Bed::new(case, bursts)?;
    while bed.round() {}
    bed.check(bursts)
}

/// Instructions of a process of ours that forwards so many bursts.
fn count(case: &str, bursts: usize) -> Result<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args(["--run", case, &bursts.to_string()])
        .output()
        .context("cannot run valgrind: install the package of that name")?;
    let said = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        bail!("the counted run failed:\n{said}");
    }
    said.lines()
        .find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok())
        .with_context(|| format!("callgrind told no count:\n{said}"))
}
