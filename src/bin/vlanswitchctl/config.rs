//! `config`: show, check, reload.

use crate::arguments::ConfigCommand;
use crate::context::{Context, Failure, Outcome};
use crate::text::fold;
use clap::Parser;
use std::path::Path;
use std::process::ExitCode;
use tracing_subscriber::filter::LevelFilter;
use vlanswitchd::control::api::{ConfigReply, NotesReply, ReloadReply, Request};
use vlanswitchd::control::cli;
use vlanswitchd::control::config::check;

pub fn run(context: &Context, command: ConfigCommand) -> Outcome {
    match command {
        ConfigCommand::Show => {
            if let Some(ConfigReply { toml }) = context.ask(&Request::GetConfig {})? {
                context.print(&toml)?;
            }
        }
        ConfigCommand::Check { file: Some(file) } => check(context, &file)?,
        ConfigCommand::Check { file: None } => reload(context, true)?,
        ConfigCommand::Reload => reload(context, false)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// `detach`.
pub fn detach(context: &Context) -> Outcome {
    if let Some(NotesReply { notes }) = context.ask(&Request::Detach {})? {
        context.print("the packet path serves all ports\n")?;
        context.print_notes(&notes);
    }
    Ok(ExitCode::SUCCESS)
}

fn reload(context: &Context, dry_run: bool) -> Result<(), Failure> {
    let request = Request::ReloadConfig { dry_run: dry_run.then_some(true) };
    let Some(reply): Option<ReloadReply> = context.ask(&request)? else { return Ok(()) };
    let parts = [
        (if dry_run { "would add: " } else { "added: " }, &reply.added),
        (if dry_run { "would remove: " } else { "removed: " }, &reply.removed),
        (if dry_run { "would change: " } else { "changed: " }, &reply.changed),
    ];
    let mut text = String::new();
    for (verb, devices) in parts.into_iter().filter(|(_, devices)| !devices.is_empty()) {
        text.push_str(&fold(verb, &devices.join(" ")));
    }
    if text.is_empty() {
        text.push_str("nothing to change\n");
    }
    context.print(&text)?;
    context.print_notes(&reply.notes);
    Ok(())
}

/// Checks a file as `vlanswitchd --check` does, on this host.
fn check(context: &Context, file: &Path) -> Result<(), Failure> {
    // Its warnings come as log events.
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).without_time();
    log.with_target(false).with_ansi(false).with_max_level(LevelFilter::WARN).init();
    let words = ["vlanswitchd".as_ref(), "--check".as_ref(), "--config".as_ref(), file.as_os_str()];
    let arguments = cli::Arguments::try_parse_from(words)
        .map_err(|error| Failure::Arguments(error.to_string()))?;
    let config = cli::Config::load(arguments).map_err(|errors| lines(&errors.0))?;
    let line = check::host(&config).map_err(|errors| lines(&errors))?;
    match context.json {
        true => context.print("{\"valid\":true}\n"),
        false => context.print(&format!("{line}\n")),
    }
}

/// All that is wrong, a line each.
fn lines(errors: &[impl ToString]) -> Failure {
    let lines: Vec<String> = errors.iter().map(ToString::to_string).collect();
    Failure::Arguments(lines.join("\n"))
}
