//! `vlanswitchctl`: the operator's tool. Each command is one call of the control
//! interface (`dist/org.vlanswitchd.varlink`) and a way to print its answer.
//!
//! | file | what |
//! |---|---|
//! | `arguments` | the command line |
//! | `context` | the call, the printing, the exit status |
//! | `status`, `ports`, `stats`, `drops`, `monitor`, `doctor`, `config` | the commands |
//! | `capture` | frames for Wireshark |
//! | `rates` | two readings of the counters and the time between them |
//! | `top` | the full-screen view |
//! | `generate` | completions and man pages |
//! | `text` | units, times, lines that fit |

mod arguments;
mod capture;
mod config;
mod context;
mod doctor;
mod drops;
mod generate;
mod monitor;
mod ports;
mod rates;
mod stats;
mod status;
mod text;
#[cfg(feature = "tui")]
mod top;

use arguments::{Arguments, Command};
use clap::Parser;
use context::{Context, Outcome};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let context = Context::new(arguments.socket(), arguments.json);
    run(&context, arguments.command).unwrap_or_else(|failure| failure.report())
}

fn run(context: &Context, command: Command) -> Outcome {
    match command {
        Command::Status => status::run(context),
        Command::Port(command) => ports::run(context, command),
        Command::Stats(arguments) => stats::run(context, &arguments),
        Command::Drops => drops::run(context),
        Command::Monitor => monitor::run(context),
        #[cfg(feature = "tui")]
        Command::Top => top::run(context),
        Command::Capture(arguments) => capture::run(context, arguments),
        Command::Doctor => doctor::run(context),
        Command::Config(command) => config::run(context, command),
        Command::Detach => config::detach(context),
        Command::Completions { shell } => generate::completions(context, shell),
        Command::Man { directory } => generate::man(context, directory.as_deref()),
    }
}
