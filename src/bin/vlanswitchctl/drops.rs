//! `drops`: which frames were lost, why, and what to do.

use crate::context::{Context, Outcome};
use crate::text::{fold, printable, since};
use std::process::ExitCode;
use vlanswitchd::control::api::{Drop, DropsReply, Request};
use vlanswitchd::control::report::{Sheet, Tone};

pub fn run(context: &Context) -> Outcome {
    if let Some(DropsReply { drops }) = context.ask(&Request::ListDrops {})? {
        context.print(&describe(&drops, context.colours))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(drops: &[Drop], colours: bool) -> String {
    if drops.is_empty() {
        return "no frame was dropped since vlanswitchd started\n".to_owned();
    }
    let mut sheet = Sheet::new(&["device", "flow", "reason", "frames", "last seen"]).numbers(3..4);
    for drop in drops {
        sheet.row([
            (drop.device.clone(), Tone::Plain),
            (drop.flow.replace('_', " "), Tone::Plain),
            (drop.reason.clone(), Tone::Plain),
            (drop.frames.to_string(), Tone::Plain),
            (format!("{} ago", since(drop.last_seen)), Tone::Plain),
        ]);
    }
    let mut text = sheet.render(colours);
    let mut told: Vec<&str> = Vec::new();
    for drop in drops {
        if !told.contains(&drop.reason.as_str()) {
            if told.is_empty() && !text.ends_with("\n\n") {
                text.push('\n');
            }
            text.push_str(&fold(&format!("{}: ", printable(&drop.reason)), &drop.help));
            told.push(&drop.reason);
        }
    }
    text
}
