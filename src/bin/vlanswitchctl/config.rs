//! `config`: show, check, reload.

use crate::arguments::ConfigCommand;
use crate::context::{Context, Failure, Outcome};
use crate::text::fold;
use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, ExitCode};
use vlanswitchd::control::api::{ConfigReply, ReloadReply, Request};

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
        text.push_str("the file says what is running already\n");
    }
    context.print(&text)?;
    context.print_notes(&reply.notes);
    Ok(())
}

/// Has the daemon's program check a file: it is the one that will read it.
fn check(context: &Context, file: &Path) -> Result<(), Failure> {
    let beside = std::env::current_exe().ok().map(|path| path.with_file_name("vlanswitchd"));
    let program = beside
        .filter(|path| path.exists())
        .map_or_else(|| OsString::from("vlanswitchd"), std::path::PathBuf::into_os_string);
    let output = Command::new(&program).arg("--check").arg("--config").arg(file).output();
    let output = output.map_err(|error| {
        Failure::Message(format!("{}: {error}; is it installed?", program.display()))
    })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim_end().trim_start_matches("vlanswitchd: error: ");
        return Err(Failure::Arguments(said.to_owned()));
    }
    if context.json {
        return context.print("{\"valid\":true}\n");
    }
    context.print(&String::from_utf8_lossy(&output.stdout))
}
