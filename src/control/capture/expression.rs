//! libpcap's filter language, by `tcpdump`: the client compiles an expression and
//! sends the program. No crate writes code for all of the language, and libpcap
//! itself would be a C library in a daemon that runs without one.

use super::filter::{Instruction, ParseError, Program, parse};
use std::io;
use std::process::{Command, Stdio};
use thiserror::Error;

/// Why an expression could not be compiled.
#[derive(Debug, Error)]
pub enum CompileError {
    /// There is no tcpdump.
    #[error(
        "filter expressions are compiled by tcpdump, which is not installed: install the package tcpdump, or give the filter in decimal form (tcpdump -ddd on another host)"
    )]
    NoTcpdump,
    /// It could not be run.
    #[error("cannot run tcpdump to compile the filter: {0}")]
    Run(#[source] io::Error),
    /// The expression is wrong, in tcpdump's words.
    #[error("the filter expression `{expression}` is wrong: {message}")]
    Expression {
        /// The expression.
        expression: String,
        /// What tcpdump says of it.
        message: String,
    },
    /// It made no usable program of it.
    #[error("tcpdump made no usable filter of `{expression}`: {error}")]
    Program {
        /// The expression.
        expression: String,
        /// What is wrong with the program.
        error: ParseError,
    },
}

/// Compiles an expression such as `arp or icmp6` for Ethernet frames. May ask the
/// resolver when there are host names in it.
///
/// # Errors
/// [`CompileError`] says what to do.
pub fn compile(expression: &str) -> Result<Vec<Instruction>, CompileError> {
    compile_by("tcpdump", expression)
}

fn compile_by(program: &str, expression: &str) -> Result<Vec<Instruction>, CompileError> {
    let output = Command::new(program)
        .args(["-ddd", "-y", "EN10MB", "--", expression])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => CompileError::NoTcpdump,
            _ => CompileError::Run(error),
        })?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        let line = said.lines().rfind(|line| !line.trim().is_empty()).unwrap_or_default();
        let message = line.trim().trim_start_matches("tcpdump: ");
        let message = if message.is_empty() { "tcpdump does not say why" } else { message };
        return Err(CompileError::Expression {
            expression: expression.to_owned(),
            message: message.to_owned(),
        });
    }
    let unusable = |error| CompileError::Program { expression: expression.to_owned(), error };
    let instructions = parse(&String::from_utf8_lossy(&output.stdout)).map_err(unusable)?;
    Program::new(&instructions).map_err(|invalid| unusable(invalid.into()))?;
    Ok(instructions)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;

    #[test]
    fn without_tcpdump_the_cure_is_named() {
        let error = compile_by("vlanswitchd-has-no-such-program", "arp").unwrap_err();
        assert!(error.to_string().contains("install the package tcpdump"), "{error}");
    }
}
