//! What one hostile guest, or one flooded VLAN, costs the others.
//!
//! ```text
//! cargo bench --bench hostile
//! cargo bench --bench hostile -- --rounds 7 --window 5 --json hostile.json
//! ```
//!
//! Ten guests: nine polite ones send 10 000 numbered frames a second each, which a station
//! on the wire sends back; each frame carries the time it was written. One floods. Every
//! kind of flood is measured in three settings, one right after the other, in alternating
//! order: `quiet` (no flood), `elsewhere` (the same generator, writing to a device that no
//! switch serves: what its own use of a processor costs the polite), and `switch`.
//!
//! A polite frame counts when it is back: lost is what the switch lost in either
//! direction, and the switch's own counters name the reasons. Ratios are of p99 within a
//! round; quoted is their median. Needs root; touches only namespaces of its own.

#[path = "versus/kernel.rs"]
#[allow(dead_code, reason = "shared with versus_macvtap, which uses all of it")]
mod kernel;
#[path = "versus/namespace.rs"]
#[allow(dead_code, reason = "shared with versus_macvtap, which uses all of it")]
mod namespace;
#[path = "versus/statistics.rs"]
#[allow(dead_code, reason = "shared with versus_macvtap, which uses all of it")]
mod statistics;

#[path = "hostile/bed.rs"]
mod bed;
#[path = "hostile/flood.rs"]
mod flood;
#[path = "hostile/polite.rs"]
mod polite;

use anyhow::{Context, Result, bail};
use bed::Bed;
use clap::Parser;
use flood::{Kind, Place};
use polite::Figures;
use serde_json::json;
use statistics::spread;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// What p99 may be, as a multiple of that with the same load elsewhere.
const PROMISE: f64 = 2.0;

/// Measures what one hostile guest costs nine others.
#[derive(Parser)]
struct Options {
    /// Rounds; each measures every setting once
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of a measuring window, in seconds
    #[arg(long, default_value_t = 2.0)]
    window: f64,
    /// Only kinds of flood whose name contains this; repeatable
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// Another daemon, as PATH [ARGS...]
    #[arg(long, value_name = "COMMAND", default_value = env!("CARGO_BIN_EXE_vlanswitchd"))]
    daemon: String,
    /// Write everything measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Given by `cargo bench`; means nothing here
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// One measurement.
struct Row {
    kind: Kind,
    place: Option<Place>,
    round: usize,
    figures: Figures,
}

fn run(options: &Options) -> Result<bool> {
    if !nix::unistd::geteuid().is_root() {
        bail!("needs root: it makes network namespaces, taps and packet sockets");
    }
    let wanted = |kind: &Kind| {
        options.only.is_empty() || options.only.iter().any(|only| kind.name().contains(only))
    };
    let kinds: Vec<Kind> = Kind::ALL.into_iter().filter(wanted).collect();
    let window = Duration::from_secs_f64(options.window);
    let mut rows = Vec::new();
    let mut named = Vec::new();
    for round in 0..options.rounds {
        for kind in &kinds {
            let mut places = [None, Some(Place::Elsewhere), Some(Place::Switch)];
            if round % 2 == 1 {
                places.reverse();
            }
            for place in places {
                let bed = Bed::new(&options.daemon)?;
                let flood = place.map(|place| flood::start(&bed, *kind, place)).transpose()?;
                let mut figures = polite::measure(&bed, window)?;
                if let Some(flood) = flood {
                    figures.flood_pps = flood.stop()?;
                }
                for drop in bed.stop()? {
                    named.push(format!("{} {}: {drop}", kind.name(), label(place)));
                }
                eprintln!("{} {}: {figures:.0?}", kind.name(), label(place));
                rows.push(Row { kind: *kind, place, round, figures });
            }
        }
        eprintln!("round {} of {} done", round + 1, options.rounds);
    }
    if let Some(file) = &options.json {
        std::fs::write(file, serde_json::to_string_pretty(&to_json(&rows))?)
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(report(&kinds, &rows, &named))
}

fn label(place: Option<Place>) -> &'static str {
    place.map_or("quiet", Place::name)
}

fn to_json(rows: &[Row]) -> serde_json::Value {
    let rows = rows.iter().map(|row| {
        let figures = &row.figures;
        json!({
            "flood": row.kind.name(), "setting": label(row.place), "round": row.round,
            "p50_us": figures.p50_us, "p99_us": figures.p99_us, "p999_us": figures.p999_us,
            "sent": figures.sent, "lost": figures.lost, "flood_pps": figures.flood_pps,
        })
    });
    json!({ "rows": rows.collect::<Vec<_>>() })
}

/// Prints the table and the verdicts; whether all promises hold.
fn report(kinds: &[Kind], rows: &[Row], named: &[String]) -> bool {
    println!(
        "{:<15} {:<10} {:>9} {:>9} {:>9} {:>8} {:>12} {:>8}",
        "flood", "setting", "p50 us", "p99 us", "p999 us", "lost", "polite", "flood"
    );
    let mut holds = true;
    for kind in kinds {
        let of = |place: Option<Place>| {
            rows.iter().filter(move |row| row.kind == *kind && row.place == place)
        };
        let median = |place, value: fn(&Figures) -> f64| {
            let values: Vec<f64> = of(place).map(|row| value(&row.figures)).collect();
            spread(&values).map_or(f64::NAN, |spread| spread.median)
        };
        for place in [None, Some(Place::Elsewhere), Some(Place::Switch)] {
            let total = |value: fn(&Figures) -> u64| -> u64 {
                of(place).map(|row| value(&row.figures)).sum()
            };
            println!(
                "{:<15} {:<10} {:>9.0} {:>9.0} {:>9.0} {:>8} {:>12} {:>6.0} k",
                kind.name(),
                label(place),
                median(place, |figures| figures.p50_us),
                median(place, |figures| figures.p99_us),
                median(place, |figures| figures.p999_us),
                total(|figures| figures.lost),
                total(|figures| figures.sent),
                median(place, |figures| figures.flood_pps) / 1e3,
            );
        }
        let ratio = |base: Option<Place>| {
            let ratios: Vec<f64> = of(Some(Place::Switch))
                .zip(of(base))
                .map(|(with, without)| with.figures.p99_us / without.figures.p99_us)
                .collect();
            spread(&ratios).map_or(f64::NAN, |spread| spread.median)
        };
        let lost: u64 = of(Some(Place::Switch)).map(|row| row.figures.lost).sum();
        let slower = ratio(Some(Place::Elsewhere));
        let kept = lost == 0 && slower <= PROMISE;
        holds &= kept;
        println!(
            "{:<15} {}: {lost} polite frames lost (promise 0); p99 {slower:.2} times that with \
             the load elsewhere (promise {PROMISE}), {:.2} times that of a quiet machine",
            kind.name(),
            if kept { "HOLDS" } else { "BROKEN" },
            ratio(None),
        );
    }
    for line in named {
        println!("named drop: {line}");
    }
    holds
}
