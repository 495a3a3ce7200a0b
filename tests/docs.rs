//! What the documents say is what the code does: the table of drop reasons, the
//! command lines, the files linked to.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

use clap::{CommandFactory, Parser};
use std::fs;
use std::path::{Path, PathBuf};
use vlanswitchd::control::cli::{Arguments, Config};
use vlanswitchd::switch::DropReason;

fn document(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The README and everything under docs/.
fn documents() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = vec!["README.md".to_owned(), "CHANGELOG.md".to_owned()];
    for folder in ["docs", "docs/adr"] {
        for entry in fs::read_dir(root.join(folder)).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "md") {
                let relative = path.strip_prefix(root).unwrap();
                found.push(relative.to_str().unwrap().to_owned());
            }
        }
    }
    found
}

/// The rows of the table that follows this header line, each as its cells.
fn table(text: &str, header: &str) -> Vec<Vec<String>> {
    let start = text.find(header).unwrap_or_else(|| panic!("no table {header}"));
    text[start..]
        .lines()
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

#[test]
fn the_table_of_drop_reasons_is_the_codes() {
    let documented = table(&document("README.md"), "| reason | what it means, and what to do |");
    let coded: Vec<Vec<String>> = DropReason::ALL
        .into_iter()
        .map(|reason| vec![format!("`{}`", reason.name()), reason.help().to_owned()])
        .collect();
    assert_eq!(documented, coded);
}

/// A command line of a document: an indented line that starts with the program.
fn command_lines(text: &str) -> Vec<&str> {
    text.lines()
        .filter_map(|line| line.strip_prefix("    "))
        .map(|line| line.strip_prefix("sudo ").unwrap_or(line))
        .filter(|line| line.starts_with("vlanswitchd --"))
        .collect()
}

/// Accounts differ from host to host: the parser looks them up.
fn with_a_known_owner(word: &str) -> String {
    let options = word.split(',').map(|option| match option.split_once('=') {
        Some((key @ ("owner" | "group"), _)) => format!("{key}=0"),
        _ => option.to_owned(),
    });
    options.collect::<Vec<_>>().join(",")
}

#[test]
fn every_command_line_in_the_documents_is_accepted() {
    let mut count = 0;
    for path in documents() {
        for line in command_lines(&document(&path)) {
            let words = line.split_whitespace().map(with_a_known_owner);
            let arguments = Arguments::try_parse_from(words)
                .unwrap_or_else(|error| panic!("{path}: {line}: {error}"));
            if let Err(error) = Config::try_from(arguments) {
                panic!("{path}: {line}: {error}");
            }
            count += 1;
        }
    }
    assert!(count >= 8, "only {count} command lines found");
}

#[test]
fn every_option_is_in_the_readme() {
    let readme = document("README.md");
    for argument in Arguments::command().get_arguments() {
        if let Some(long) = argument.get_long() {
            assert!(readme.contains(&format!("`--{long}")), "--{long} is not in README.md");
        }
    }
}

/// Targets of `[text](target)` that are files here.
fn links(text: &str) -> Vec<String> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .filter(|target| !target.starts_with('#') && !target.contains("://"))
        .map(|target| target.split('#').next().unwrap_or(target).to_owned())
        .collect()
}

#[test]
fn every_link_leads_to_a_file() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for path in documents() {
        let folder = root.join(&path).parent().unwrap().to_path_buf();
        for link in links(&document(&path)) {
            assert!(folder.join(&link).exists(), "{path}: {link} does not exist");
        }
    }
}

/// Every decision the code refers to is written down.
#[test]
fn every_decision_named_in_the_code_exists() {
    fn sources(folder: PathBuf) -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        entries.flat_map(|path| if path.is_dir() { sources(path) } else { vec![path] }).collect()
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut count = 0;
    for path in sources(root.join("src")) {
        let text = fs::read_to_string(&path).unwrap();
        for rest in text.split("docs/adr/").skip(1) {
            let end = rest.find(".md").expect("a decision's file name ends in .md");
            let file = root.join("docs/adr").join(&rest[..end + 3]);
            assert!(file.exists(), "{} names {}", path.display(), file.display());
            count += 1;
        }
    }
    assert!(count > 0, "no decision is named in the code");
}
