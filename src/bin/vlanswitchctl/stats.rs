//! `stats`: the counters, or rates.

use crate::arguments::StatsArguments;
use crate::context::{Context, Failure, Outcome};
use crate::rates::{self, Rates};
use crate::text::{bit_rate, percent, printable, scaled, utc};
use std::process::ExitCode;
use std::time::Duration;
use vlanswitchd::control::api::{Request, Stats, StatsReply};
use vlanswitchd::control::client::{AnswerError, ClientError, PATIENCE};
use vlanswitchd::control::report::{Report, Sheet, Tone};

/// Lines between two headers when one port is watched.
const PAGE: usize = 20;

pub fn run(context: &Context, arguments: &StatsArguments) -> Outcome {
    let (interval, port) = arguments.meaning().map_err(Failure::Arguments)?;
    let Some(interval) = interval else { return once(context, port) };
    let mut before: Option<Stats> = None;
    let mut line = 0;
    let patience = Duration::from_millis(interval) + PATIENCE;
    let request = Request::GetStats { interval: Some(interval) };
    context.follow(&request, Some(patience), |StatsReply { stats }| {
        let stats = only(stats, port)?;
        if let Some(before) = &before {
            let rates = rates::between(before, &stats);
            context.print(&match port {
                Some(_) => one_line(&stats, &rates, line),
                None => block(&stats, &rates, context.colours),
            })?;
            line += 1;
        }
        before = Some(stats);
        Ok(())
    })
}

fn once(context: &Context, port: Option<&str>) -> Outcome {
    if let Some(StatsReply { stats }) = context.ask(&Request::GetStats { interval: None })? {
        let stats = only(stats, port)?;
        context.print(&Report::from(stats).to_text(context.colours))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// The counters of one port, if only one is wanted.
fn only(mut stats: Stats, port: Option<&str>) -> Result<Stats, Failure> {
    if let Some(name) = port {
        stats.ports.retain(|port| port.name == name);
        stats.unmapped.clear();
        if stats.ports.is_empty() {
            let error = AnswerError::NoSuchPort(name.to_owned());
            return Err(ClientError::from(error).into());
        }
    }
    Ok(stats)
}

fn block(stats: &Stats, rates: &Rates, colours: bool) -> String {
    let mut sheet =
        Sheet::new(&["port", "state", "from", "guest", "to", "guest", "dropped"]).numbers(2..7);
    for (port, rate) in stats.ports.iter().zip(&rates.ports) {
        let drops = rate.drops();
        sheet.row([
            (port.name.clone(), Tone::Plain),
            (port.state.clone(), Tone::of_state(&port.state)),
            (format!("{}/s", scaled(rate.from.frames)), Tone::Plain),
            (bit_rate(rate.from.bits), Tone::Plain),
            (format!("{}/s", scaled(rate.to.frames)), Tone::Plain),
            (bit_rate(rate.to.bits), Tone::Plain),
            (format!("{}/s", scaled(drops)), Tone::of_drops(drops.ceil() as u64)),
        ]);
    }
    let loads: Vec<String> = stats.workers.iter().map(|worker| percent(worker.load)).collect();
    let uplink = &rates.uplink;
    let header = format!(
        "{}  load {}  dropped {}/s\nuplink {} ({}): received {}/s, {}; sent {}/s, {}\n",
        utc(stats.time),
        loads.join(" "),
        scaled(rates::all_drops(rates)),
        printable(&stats.uplink.name),
        printable(&stats.uplink.state),
        scaled(uplink.from.frames),
        bit_rate(uplink.from.bits),
        scaled(uplink.to.frames),
        bit_rate(uplink.to.bits),
    );
    header + &sheet.render(colours) + "\n"
}

/// One port's rates in columns of a fixed width.
fn one_line(stats: &Stats, rates: &Rates, number: usize) -> String {
    let (Some(port), Some(rate)) = (stats.ports.first(), rates.ports.first()) else {
        return String::new();
    };
    // Time and state have the lengths they have, a rate 7 at most, bits 10.
    let line = |cells: [&str; 5]| {
        let [time, state, from, to, drops] = cells;
        format!("{time:20}  {state:10} {from:>18}  {to:>18} {drops:>7}\n")
    };
    let one_way = |frames, bits| format!("{}/s {:>10}", scaled(frames), bit_rate(bits));
    let mut text = String::new();
    if number.is_multiple_of(PAGE) {
        text = line([&printable(&port.name), "state", "from guest", "to guest", "dropped"]);
    }
    text.push_str(&line([
        &utc(stats.time),
        &printable(&port.state),
        &one_way(rate.from.frames, rate.from.bits),
        &one_way(rate.to.frames, rate.to.bits),
        &format!("{}/s", scaled(rate.drops())),
    ]));
    text
}
