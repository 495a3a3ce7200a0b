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
use std::process::Command;
use vlanswitchd::control::cli::{Arguments, Config};
use vlanswitchd::switch::DropReason;

fn document(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The documents at the top, and everything under docs/.
fn documents() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md"].map(str::to_owned).to_vec();
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
    let documented =
        table(&document("docs/operations.md"), "| reason | what it means, and what to do |");
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
        .filter(|line| line.starts_with("vlanswitchd --") && !line.ends_with("--version"))
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
            // What stands in a file is for tests/docs_live.rs.
            if line.contains("--uplink")
                && !line.contains("--config")
                && let Err(error) = Config::try_from(arguments)
            {
                panic!("{path}: {line}: {error}");
            }
            count += 1;
        }
    }
    assert!(count >= 8, "only {count} command lines found");
}

#[test]
fn every_option_of_vlanswitchd_is_in_the_documents() {
    let page = document("docs/configuration.md");
    for argument in Arguments::command().get_arguments() {
        if let Some(long) = argument.get_long() {
            let named = page.contains(&format!("| `--{long}"));
            assert!(named, "--{long} is not in docs/configuration.md");
        }
    }
}

/// Its man pages name all of them, as a test of theirs says.
#[test]
fn every_option_and_command_of_vlanswitchctl_is_in_the_documents() {
    let folder = tempfile::TempDir::new().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_vlanswitchctl"));
    assert!(command.arg("man").arg(folder.path()).status().unwrap().success());
    let document = document("docs/operations.md");
    let mut count = 0;
    for entry in fs::read_dir(folder.path()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let Some(name) = name.strip_suffix(".1") else { continue };
        let page = fs::read_to_string(&path).unwrap().replace("\\-", "-");
        // A page of commands has them in tables of their own.
        let words = name.replace('-', " ");
        if !page.contains(".SH SUBCOMMANDS") {
            assert!(document.contains(&format!("`{words}")), "{words} is not in the documents");
        }
        // In bold, as clap_mangen sets them.
        for rest in page.split("\\fB--").skip(1) {
            let option = rest.split("\\f").next().unwrap();
            if !matches!(option, "help" | "version") {
                assert!(document.contains(&format!("`--{option}")), "{words}: no --{option}");
                count += 1;
            }
        }
    }
    assert!(count > 20, "only {count} options found");
}

/// Targets of `[text](target)` that are in the repository.
fn links(text: &str) -> Vec<&str> {
    text.split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
        .filter(|target| !target.contains("://"))
        .collect()
}

/// What a heading is called in a link, as GitHub has it.
fn anchor(heading: &str) -> String {
    let words = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = words.chars().filter(|one| one.is_alphanumeric() || matches!(one, ' ' | '-' | '_'));
    kept.map(|one| if one == ' ' { '-' } else { one }).collect()
}

#[test]
fn every_link_leads_somewhere() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut count = 0;
    for path in documents() {
        let folder = root.join(&path).parent().unwrap().to_path_buf();
        for link in links(&document(&path)) {
            let (file, place) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { root.join(&path) } else { folder.join(file) };
            assert!(target.exists(), "{path}: {link} does not exist");
            if !place.is_empty() {
                let text = fs::read_to_string(&target).unwrap();
                let found = text.lines().any(|line| line.starts_with('#') && anchor(line) == place);
                assert!(found, "{path}: {link}: no such heading");
            }
            count += 1;
        }
    }
    assert!(count > 100, "only {count} links found");
}

/// A page that nothing leads to is read by nobody.
#[test]
fn every_page_is_linked_from_the_readme() {
    let readme = document("README.md");
    for path in documents() {
        let listed = path == "README.md" || path.starts_with("docs/adr/");
        assert!(
            listed || readme.contains(&format!("]({path})")),
            "README.md has no link to {path}"
        );
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
