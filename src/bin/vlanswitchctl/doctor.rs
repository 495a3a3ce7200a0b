//! `doctor`: what is wrong on this host.

use crate::context::{Context, Outcome};
use crate::text::{fold, printable};
use clap::Parser;
use std::path::Path;
use std::process::ExitCode;
use vlanswitchd::control::api::{Finding, FindingsReply, Request, Severity};
use vlanswitchd::control::cli::Arguments;
use vlanswitchd::control::client::{Client, ClientError};
use vlanswitchd::control::config::Config;
use vlanswitchd::control::doctor;
use vlanswitchd::control::report::Tone;

pub fn run(context: &Context) -> Outcome {
    let (findings, json) = match Client::connect(&context.socket) {
        Ok(mut client) => {
            let reply = client.call(&Request::Examine {})?;
            (reply.read::<FindingsReply>()?.findings, reply.json)
        }
        // What can be said without it may help to start it.
        Err(ClientError::NoSocket(_) | ClientError::NobodyThere(_) | ClientError::Denied(_)) => {
            let findings = without_daemon(&context.socket);
            let reply = FindingsReply { findings: findings.clone() };
            (findings, serde_json::to_string(&reply).unwrap_or_default())
        }
        Err(error) => return Err(error.into()),
    };
    if context.json {
        context.print(&format!("{json}\n"))?;
    } else {
        context.print(&describe(&findings, context.colours))?;
    }
    let broken = findings.iter().any(|finding| finding.severity == Severity::Error);
    Ok(if broken { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// As a start with the usual file would find the host.
fn without_daemon(socket: &Path) -> Vec<Finding> {
    let config = Config::load(Arguments::parse_from(["vlanswitchd"]));
    let config = config.as_ref().map_err(ToString::to_string);
    doctor::without_daemon(socket, config.as_ref().map_err(String::as_str).copied())
}

fn describe(findings: &[Finding], colours: bool) -> String {
    if findings.is_empty() {
        return "nothing found\n".to_owned();
    }
    let mut text = String::new();
    for finding in findings {
        let (word, tone) = match finding.severity {
            Severity::Error => ("error", Tone::Bad),
            Severity::Warning => ("warning", Tone::Doubtful),
            Severity::Note => ("note", Tone::Plain),
        };
        let word = if colours { tone.paint(word) } else { word.to_owned() };
        text.push_str(&format!("{word}: {}\n", printable(&finding.about)));
        text.push_str(&fold("  ", &finding.what));
        if let Some(cure) = &finding.cure {
            text.push_str(&fold("  cure: ", cure));
        }
    }
    let count = |severity, word: &str| {
        let number = findings.iter().filter(|found| found.severity == severity).count();
        format!("{number} {word}{}", if number == 1 { "" } else { "s" })
    };
    text.push_str(&format!(
        "\n{}, {}, {}\n",
        count(Severity::Error, "error"),
        count(Severity::Warning, "warning"),
        count(Severity::Note, "note")
    ));
    text
}
