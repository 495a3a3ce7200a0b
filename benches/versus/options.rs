//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Parser;

/// Compares vlanswitchd with macvtap and other software switches on this machine.
#[derive(Parser, Clone, Debug)]
#[command(name = "versus_macvtap", max_term_width = 100)]
pub struct Options {
    /// Two rounds of short windows: for trying the harness, not for quoting
    #[arg(long)]
    pub quick: bool,
    /// Only workloads and datapaths whose name contains one of these; repeatable
    #[arg(long, value_name = "NAME")]
    pub only: Vec<String>,
    /// Rounds; each measures every datapath once, in alternating order [default: 5, quick: 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,
    /// Length of one measuring window, in seconds [default: 3, quick: 1]
    #[arg(long, value_name = "SECONDS")]
    pub window: Option<f64>,
    /// Write everything measured, with the machine's description, to this file
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Write SVG plots into this folder
    #[arg(long, value_name = "DIR")]
    pub plots: Option<PathBuf>,
    /// Write the promises with what was measured as a Markdown table to this file
    #[arg(long, value_name = "FILE")]
    pub markdown: Option<PathBuf>,
    /// Report on an earlier --json file again instead of measuring
    #[arg(long, value_name = "FILE")]
    pub from: Option<PathBuf>,
    /// A column for this daemon command instead of the one just built, as [LABEL=]PATH [ARGS...];
    /// repeatable, for comparing builds or settings with each other
    #[arg(long, value_name = "COMMAND")]
    pub daemon: Vec<String>,
    /// Measure even if the machine is busy; the report then says so
    #[arg(long)]
    pub force: bool,
    /// How long to wait for an idle machine, before the run and before each measurement; a
    /// measurement that other work disturbs is made again, up to twice
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub patience: u64,
    /// Pin generators to CPU 0 and everything else to the other CPUs, the same for every datapath
    #[arg(long)]
    pub pin: bool,
    /// List workloads and datapaths, and why some are absent
    #[arg(long)]
    pub list: bool,
    /// Show each single measurement as it is made
    #[arg(short, long)]
    pub verbose: bool,
    /// Given by `cargo bench`; means nothing here
    #[arg(long, hide = true)]
    pub bench: bool,
}

impl Options {
    /// Rounds to run.
    pub fn rounds(&self) -> usize {
        self.rounds.unwrap_or(if self.quick { 2 } else { 5 }) as usize
    }

    /// How long to wait for an idle machine.
    pub fn patience(&self) -> Duration {
        Duration::from_secs(if self.force { 3 } else { self.patience })
    }

    /// Seconds of one measuring window.
    pub fn window(&self) -> Result<f64> {
        let window = self.window.unwrap_or(if self.quick { 1.0 } else { 3.0 });
        if !(0.1..=600.0).contains(&window) {
            bail!("--window {window}: give 0.1 to 600 seconds");
        }
        Ok(window)
    }
}
