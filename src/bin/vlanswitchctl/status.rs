//! `status`: is it up, what does it carry.

use crate::context::{Context, Outcome};
use crate::text::{fold, percent, since};
use std::process::ExitCode;
use vlanswitchd::control::api::{Request, Status, StatusReply};
use vlanswitchd::control::fallback::Fallback;
use vlanswitchd::control::report::Tone;

pub fn run(context: &Context) -> Outcome {
    if let Some(StatusReply { status }) = context.ask(&Request::GetStatus {})? {
        context.print(&describe(&status, context.colours))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(status: &Status, colours: bool) -> String {
    let state = match colours {
        true => Tone::of_state(&status.uplink_state).paint(&status.uplink_state),
        false => status.uplink_state.clone(),
    };
    let ports: u64 = status.ports.values().sum();
    let states: Vec<String> = status
        .ports
        .iter()
        .filter(|(_, count)| **count > 0)
        .map(|(state, count)| format!("{count} {state}"))
        .collect();
    let loads: Vec<String> = status.workers.iter().map(|worker| percent(worker.load)).collect();
    let config = status.config_file.as_deref().unwrap_or("none, only the command line");
    let answer = |yes: bool| if yes { "the kernel" } else { "vlanswitchd" };
    let mut text = format!(
        "vlanswitchd {}, process {}, running for {}\n",
        status.version,
        status.pid,
        since(status.started)
    );
    // Painted by us: what the switch names goes through `fold`, which lets no control
    // character pass.
    text.push_str(fold("uplink      ", &status.uplink).trim_end());
    text.push_str(&format!(", {state}\n"));
    text.push_str(&fold("ports       ", &counted(ports, &states)));
    text.push_str(&fold("load        ", &format!("{} of the last second", loads.join(", "))));
    let what = if status.workers.len() == 1 { "no frame" } else { "none of its ports' frames" };
    for (number, _) in status.workers.iter().enumerate().filter(|(_, worker)| worker.stuck) {
        text.push_str(&fold(
            "stuck       ",
            &format!("worker {number} does not answer: {what} is being forwarded"),
        ));
    }
    if let [_, _, ..] = status.workers.as_slice() {
        let described = status.workers.iter().enumerate().map(|(number, worker)| {
            let cpu = worker.cpu.map(|cpu| format!(" on CPU {cpu}")).unwrap_or_default();
            format!("{number}{cpu} with {} ports", worker.ports)
        });
        text.push_str(&fold("workers     ", &described.collect::<Vec<_>>().join(", ")));
    }
    let reason = status.datapath_reason.as_ref();
    let reason = reason.map(|reason| format!(" ({reason})")).unwrap_or_default();
    text.push_str(&fold("datapath    ", &format!("{}{reason}", status.datapath)));
    text.push_str(&fold("file        ", config));
    let (tagged, udp) = (answer(status.kernel_segments_tagged), answer(status.kernel_segments_udp));
    let but = if tagged == udp { String::new() } else { format!(", those of UDP by {udp}") };
    let cutting = format!("large frames are cut to the wire's size by {tagged}{but}");
    text.push_str(&fold("cutting     ", &cutting));
    for name in &status.fallbacks {
        let help = match Fallback::named(name) {
            // Told above.
            Some(Fallback::TaggedSegmentation | Fallback::UdpSegmentation) => continue,
            Some(fallback) => fallback.help(),
            None => name,
        };
        text.push_str(&fold("fallback    ", help));
    }
    text.push_str(&fold(
        "clients     ",
        &format!("{} on the control socket, {} capturing", status.clients, status.captures),
    ));
    if status.netlink_overruns > 0 {
        text.push_str(&fold(
            "netlink     ",
            &format!("lost news {} times; the devices were listed anew", status.netlink_overruns),
        ));
    }
    text
}

fn counted(ports: u64, states: &[String]) -> String {
    match ports {
        0 => "none".to_owned(),
        _ => format!("{ports}: {}", states.join(", ")),
    }
}
