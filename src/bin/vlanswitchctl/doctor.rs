//! `doctor`: what is wrong on this host.

use crate::context::{Context, Outcome};
use crate::text::{fold, printable};
use std::process::ExitCode;
use vlanswitchd::control::api::{Finding, FindingsReply, Request, Severity};
use vlanswitchd::control::report::Tone;

pub fn run(context: &Context) -> Outcome {
    let reply = context.connect()?.call(&Request::Examine {})?;
    let FindingsReply { findings } = reply.read()?;
    if context.json {
        context.print(&format!("{}\n", reply.json))?;
    } else {
        context.print(&describe(&findings, context.colours))?;
    }
    let broken = findings.iter().any(|finding| finding.severity == Severity::Error);
    Ok(if broken { ExitCode::FAILURE } else { ExitCode::SUCCESS })
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
