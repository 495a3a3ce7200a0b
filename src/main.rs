//! `vlanswitchd`: reads the command line, starts the switch, prints what it says.

use clap::Parser;
use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;
use tracing_subscriber::filter::LevelFilter;
use vlanswitchd::control::cli::{Arguments, Config, LogFormat};
use vlanswitchd::control::config::check;
use vlanswitchd::control::daemon::{self, Daemon};
use vlanswitchd::control::privileges;

/// Exit status for wrong arguments or configuration, the one clap uses too.
const WRONG_CONFIGURATION: u8 = 2;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (check_only, give_back) = (arguments.is_check(), arguments.is_give_back());
    let config = match Config::load(arguments) {
        Ok(config) => config,
        Err(errors) => return complain_of_all(errors.0, WRONG_CONFIGURATION),
    };
    start_logging(config.log_format, config.verbosity);
    if check_only {
        return match check::host(&config) {
            Ok(line) => {
                print(&format!("{line}\n"));
                ExitCode::SUCCESS
            }
            Err(errors) => complain_of_all(errors, WRONG_CONFIGURATION),
        };
    }
    if give_back {
        return match daemon::give_back(&config) {
            Ok(count) => {
                print(&format!("{count} devices given back\n"));
                ExitCode::SUCCESS
            }
            Err(error) => complain(&error, 1),
        };
    }
    privileges::abort_on_panic();
    if let Some(user) = &config.user
        && let Err(error) = privileges::become_user(user)
    {
        return complain(&error, WRONG_CONFIGURATION);
    }
    let daemon = match Daemon::start(config) {
        Ok(daemon) => daemon,
        Err(error) => {
            let status = if error.is_configuration() { WRONG_CONFIGURATION } else { 1 };
            return complain(&error, status);
        }
    };
    match daemon.run(announce, print) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(&format_args!("the control loop failed: {error}"), 1),
    }
}

fn start_logging(format: LogFormat, verbosity: u8) {
    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    let builder = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => builder.with_ansi(false).init(),
        LogFormat::Json => builder.json().init(),
    }
}

fn announce(line: &str) {
    print(&format!("{line}\n"));
    // Not under systemd: nobody to tell.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
}

fn print(text: &str) {
    // A closed standard output must not stop the switch.
    let _ = std::io::stdout().write_all(text.as_bytes());
    let _ = std::io::stdout().flush();
}

fn complain_of_all<E: Display>(errors: Vec<E>, status: u8) -> ExitCode {
    for error in errors {
        complain(&error, status);
    }
    ExitCode::from(status)
}

fn complain(error: &dyn Display, status: u8) -> ExitCode {
    eprintln!("vlanswitchd: error: {error}");
    ExitCode::from(status)
}
