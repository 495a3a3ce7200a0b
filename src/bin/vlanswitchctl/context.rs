//! What every command needs: the socket, and how to print.

use crate::text;
use serde::de::DeserializeOwned;
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use thiserror::Error;
use vlanswitchd::control::api::Request;
use vlanswitchd::control::client::{AnswerError, Client, ClientError, Reply};

/// Exit status for wrong arguments, the one clap uses too.
const WRONG_ARGUMENTS: u8 = 2;

/// Why a command ended early.
#[derive(Debug, Error)]
pub enum Failure {
    /// The call failed.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Something was wrong in the arguments.
    #[error("{0}")]
    Arguments(String),
    /// Something else did not work.
    #[error("{0}")]
    Message(String),
    /// Whoever read our output has enough of it.
    #[error("standard output was closed")]
    ReaderGone,
}

impl Failure {
    /// Says it, and gives the exit status for it.
    pub fn report(&self) -> ExitCode {
        let status = match self {
            Self::ReaderGone => return ExitCode::SUCCESS,
            Self::Arguments(_)
            | Self::Client(ClientError::Answer(
                AnswerError::Refused(_) | AnswerError::NoSuchPort(_),
            )) => WRONG_ARGUMENTS,
            Self::Client(_) | Self::Message(_) => 1,
        };
        eprintln!("vlanswitchctl: error: {}", text::printable_lines(&self.to_string()));
        ExitCode::from(status)
    }
}

/// The result of a command.
pub type Outcome = Result<ExitCode, Failure>;

/// The socket, and how to print.
#[derive(Debug)]
pub struct Context {
    /// The control socket.
    pub socket: PathBuf,
    /// Whether answers are printed as they come.
    pub json: bool,
    /// Whether standard output is a terminal.
    pub terminal: bool,
    /// Whether to colour.
    pub colours: bool,
}

impl Context {
    /// As the environment and standard output suggest.
    pub fn new(socket: PathBuf, json: bool) -> Self {
        let terminal = io::stdout().is_terminal();
        // https://no-color.org: set and not empty.
        let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        Self { socket, json, terminal, colours: terminal && !refused }
    }

    /// A connection.
    pub fn connect(&self) -> Result<Client, Failure> {
        Ok(Client::connect(&self.socket)?)
    }

    /// Calls, and prints the answer if it is wanted as it came. None then: there is
    /// nothing left to print.
    pub fn ask<T: DeserializeOwned>(&self, request: &Request) -> Result<Option<T>, Failure> {
        let reply = self.connect()?.call(request)?;
        if self.json {
            self.print_json(&reply)?;
            return Ok(None);
        }
        Ok(Some(reply.read()?))
    }

    /// Calls for a stream, and passes on every answer, or prints it as it came.
    pub fn follow<T: DeserializeOwned>(
        &self,
        request: &Request,
        patience: Option<Duration>,
        mut each: impl FnMut(T) -> Result<(), Failure>,
    ) -> Outcome {
        let mut client = self.connect()?;
        client.start(request)?;
        loop {
            let reply = client.next(patience)?;
            if self.json {
                self.print_json(&reply)?;
            } else {
                each(reply.read()?)?;
            }
            if !reply.continues {
                return Ok(ExitCode::SUCCESS);
            }
        }
    }

    fn print_json(&self, reply: &Reply) -> Result<(), Failure> {
        self.print(&format!("{}\n", reply.json))
    }

    /// Prints on standard output.
    pub fn print(&self, text: &str) -> Result<(), Failure> {
        let mut output = io::stdout().lock();
        output.write_all(text.as_bytes()).and_then(|()| output.flush()).map_err(written)
    }

    /// Prints vlanswitchd's warnings for people, which are no part of the output.
    pub fn print_notes(&self, notes: &[String]) {
        for note in notes {
            eprintln!("vlanswitchctl: note: {}", text::printable_lines(note));
        }
    }
}

/// What a failed write to standard output means.
pub fn written(error: io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::ReaderGone,
        _ => Failure::Message(format!("standard output: {error}")),
    }
}
