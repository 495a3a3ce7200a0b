//! `monitor`: what happens, one line an event.

use crate::context::{Context, Outcome};
use crate::text::{printable, utc};
use vlanswitchd::control::api::{Event, EventKind, EventReply, Request};
use vlanswitchd::control::report::Tone;

pub fn run(context: &Context) -> Outcome {
    context.follow(&Request::Monitor {}, None, |EventReply { event }| {
        context.print(&line(&event, context.colours))
    })
}

fn line(event: &Event, colours: bool) -> String {
    let kind = serde_json::to_value(event.kind).unwrap_or_default();
    let kind = format!("{:15}", kind.as_str().unwrap_or_default());
    let kind = if colours { tone(event.kind).paint(&kind) } else { kind };
    let device = event.device.as_deref().unwrap_or("-");
    format!("{} {kind} {:15} {}\n", utc(event.time), printable(device), printable(&event.text))
}

fn tone(kind: EventKind) -> Tone {
    match kind {
        EventKind::PortAttached | EventKind::UplinkAttached => Tone::Good,
        EventKind::PortDetached | EventKind::Link => Tone::Doubtful,
        EventKind::UplinkDetached
        | EventKind::Overload
        | EventKind::Seal
        | EventKind::Worker
        | EventKind::Missed => Tone::Bad,
        EventKind::PortAdded
        | EventKind::PortRemoved
        | EventKind::PortChanged
        | EventKind::PortMoved
        | EventKind::Config => Tone::Plain,
    }
}
