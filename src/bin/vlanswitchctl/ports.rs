//! `port`: list, show, add, remove, set.

use crate::arguments::PortCommand;
use crate::context::{Context, Outcome};
use crate::text::{fold, percent, printable, since};
use std::process::ExitCode;
use vlanswitchd::control::api::{Change, Flow, NotesReply, Port, PortReply, PortsReply, Request};
use vlanswitchd::control::report::{Sheet, Tone, shorten};
use vlanswitchd::switch::DropReason;

pub fn run(context: &Context, command: PortCommand) -> Outcome {
    let asked = |persist: bool| persist.then_some(true);
    match command {
        PortCommand::List => list(context)?,
        PortCommand::Show { name } => {
            if let Some(PortReply { port, .. }) = context.ask(&Request::GetPort { name })? {
                context.print(&describe(&port, context.colours))?;
            }
        }
        PortCommand::Add { map, persist } => {
            let request = Request::AddPort { map, persist: asked(persist) };
            changed(context, "added", persist, &request)?;
        }
        PortCommand::Set { name, changes, persist } => {
            let changes = changes.into_iter().map(|(key, value)| Change { key, value }).collect();
            let request = Request::SetPort { name, changes, persist: asked(persist) };
            changed(context, "changed", persist, &request)?;
        }
        PortCommand::Move { name, worker } => {
            let request = Request::MovePort { name, worker };
            changed(context, "moved", false, &request)?;
        }
        PortCommand::Remove { name, persist } => {
            let request = Request::RemovePort { name: name.clone(), persist: asked(persist) };
            if let Some(NotesReply { notes }) = context.ask(&request)? {
                let place = if persist { ", in the configuration file too" } else { "" };
                context.print(&format!("removed {}{place}\n", printable(&name)))?;
                context.print_notes(&notes);
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn list(context: &Context) -> Result<(), crate::context::Failure> {
    let Some(PortsReply { ports }) = context.ask(&Request::ListPorts {})? else { return Ok(()) };
    if ports.is_empty() {
        let advice = "there are no ports; `vlanswitchctl port add 101=tap-web1` adds one\n";
        return context.print(advice);
    }
    let mut sheet =
        Sheet::new(&["port", "vlans", "mode", "state", "for", "mtu", "moved by"]).numbers(5..6);
    for port in &ports {
        let mtu = port.mtu.map_or_else(|| "-".to_owned(), |mtu| mtu.to_string());
        sheet.row([
            (port.name.clone(), Tone::Plain),
            (shorten(&port.vlans), Tone::Plain),
            (port.mode.clone(), Tone::Plain),
            (port.state.clone(), Tone::of_state(&port.state)),
            (since(port.since), Tone::Plain),
            (mtu, Tone::Plain),
            (moved_by(port), Tone::Plain),
        ]);
    }
    context.print(&sheet.render(context.colours))
}

/// What moves a port's frames; the first worker, most often the only one, is not told.
fn moved_by(port: &Port) -> String {
    match port.worker {
        Some(worker) if worker > 0 => format!("{}, worker {worker}", port.datapath),
        _ => port.datapath.clone(),
    }
}

/// The same in full.
pub fn datapath(port: &Port) -> String {
    let mut text = moved_by(port);
    if let Some(reason) = &port.datapath_reason {
        text.push_str(&format!(" ({reason})"));
    }
    if port.worker.is_some() {
        let fill = percent(port.ring_peak);
        text.push_str(&format!("; receive ring at most {fill} full in the last second"));
    }
    text
}

fn changed(
    context: &Context,
    verb: &str,
    persist: bool,
    request: &Request,
) -> Result<(), crate::context::Failure> {
    if let Some(PortReply { port, notes }) = context.ask(request)? {
        let place = if persist { ", in the configuration file too" } else { "" };
        let port = format!("{} ({})", port.map, port.state);
        context.print(&fold("", &format!("{verb} {port}{place}")))?;
        context.print_notes(&notes.unwrap_or_default());
    }
    Ok(())
}

/// Everything about a port.
pub fn describe(port: &Port, colours: bool) -> String {
    let mut text = fold("", &format!("{}: VLAN {}, mode {}", port.name, port.vlans, port.mode));
    let state = printable(&port.state);
    let state = if colours { Tone::of_state(&port.state).paint(&state) } else { state };
    text.push_str(&format!(
        "state     {state} for {}{}\n",
        since(port.since),
        state_help(&port.state)
    ));
    text.push_str(&fold("map       ", &port.map));
    if let (Some(index), Some(mtu)) = (port.ifindex, port.mtu) {
        text.push_str(&format!("device    index {index}, MTU {mtu} bytes\n"));
    }
    text.push_str(&fold("datapath  ", &datapath(port)));
    text.push('\n');
    text.push_str(&counters(port, colours));
    text.push_str(&drops(port, colours));
    text
}

fn state_help(state: &str) -> &'static str {
    match state {
        "no_carrier" => " (up, but no VM has it open)",
        "absent" => " (there is no such device)",
        _ => "",
    }
}

fn counters(port: &Port, colours: bool) -> String {
    let mut sheet = Sheet::new(&["", "from guest", "to guest"]).numbers(1..3);
    type Count = fn(&Flow) -> u64;
    let rows: [(&str, Count); 6] = [
        ("frames in", |flow| flow.in_frames),
        ("bytes in", |flow| flow.in_bytes),
        ("frames added by cutting", |flow| flow.split_frames),
        ("frames out", |flow| flow.out_frames),
        ("bytes out", |flow| flow.out_bytes),
        ("frames dropped", Flow::dropped),
    ];
    for (name, count) in rows {
        let [from, to] = [&port.from_guest, &port.to_guest].map(count);
        let tone = if name == "frames dropped" { Tone::of_drops } else { |_| Tone::Plain };
        sheet.row([
            (name.to_owned(), Tone::Plain),
            (from.to_string(), tone(from)),
            (to.to_string(), tone(to)),
        ]);
    }
    sheet.render(colours)
}

fn drops(port: &Port, colours: bool) -> String {
    let mut sheet = Sheet::new(&["drops", "reason", "frames"]).numbers(2..3);
    let mut help = String::new();
    let mut told: Vec<&str> = Vec::new();
    for (place, flow) in [("from guest", &port.from_guest), ("to guest", &port.to_guest)] {
        for (reason, frames) in &flow.drops {
            sheet.row([
                (place.to_owned(), Tone::Plain),
                (reason.clone(), Tone::Plain),
                (frames.to_string(), Tone::of_drops(*frames)),
            ]);
            if let Some(meaning) = meaning(reason).filter(|_| !told.contains(&reason.as_str())) {
                help.push_str(&fold(&format!("{reason}: "), meaning));
                told.push(reason);
            }
        }
        if let Some(error) = &flow.send_error {
            help.push_str(&fold(&format!("last send_failed {place}: "), error));
        }
    }
    match sheet.render(colours) {
        table if table.is_empty() => help,
        table => format!("\n{table}\n{help}"),
    }
}

/// What a drop reason means, if this version knows it.
pub fn meaning(reason: &str) -> Option<&'static str> {
    DropReason::ALL.iter().find(|known| known.name() == reason).map(|known| known.help())
}
