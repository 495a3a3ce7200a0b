//! The structure of DESIGN §9, checked on the source: arrows go one way, pure
//! modules stay pure, `unsafe` has one home.

#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};

/// Each layer and the layers it may use.
const LAYERS: [(&str, &[&str]); 6] = [
    ("frame", &[]),
    ("switch", &["frame"]),
    ("sys", &["frame"]),
    ("port", &["sys", "switch", "frame"]),
    ("dataplane", &["port", "sys", "switch", "frame"]),
    ("control", &["dataplane", "port", "sys", "switch", "frame"]),
];

/// What a pure module has no business with.
const IMPURE: [&str; 11] = [
    "std::io",
    "std::fs",
    "std::net",
    "std::os",
    "std::thread",
    "std::time",
    "std::sync",
    "libc::",
    "nix::",
    "mio::",
    "tracing::",
];

fn sources(folder: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path).unwrap();
            found.push((path, text));
        }
    }
    found
}

fn layer(name: &str) -> Vec<(PathBuf, String)> {
    let found = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(name));
    assert!(!found.is_empty(), "src/{name} is empty");
    found
}

/// Lines of code: no comments, and nothing from the test module on.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(number, line)| (number + 1, line.split("//").next().unwrap_or_default()))
        .take_while(|(_, line)| !line.contains("#[cfg(test)]"))
}

fn is_test(path: &Path) -> bool {
    path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("tests"))
}

/// Names after `crate::` in a line, those in braces included.
fn used_layers(line: &str) -> Vec<String> {
    let mut used = Vec::new();
    for rest in line.split("crate::").skip(1) {
        let names = match rest.strip_prefix('{') {
            Some(list) => list.split('}').next().unwrap_or_default().split(',').collect(),
            None => vec![rest],
        };
        for name in names {
            let word: String = name
                .trim()
                .chars()
                .take_while(|char| char.is_alphanumeric() || *char == '_')
                .collect();
            used.push(word);
        }
    }
    used
}

#[test]
fn arrows_go_one_way() {
    for (name, allowed) in LAYERS {
        for (path, text) in layer(name) {
            if is_test(&path) {
                continue;
            }
            for (number, line) in code(&text) {
                for used in used_layers(line) {
                    let known = LAYERS.iter().any(|(layer, _)| *layer == used);
                    let fine = !known || used == name || allowed.contains(&used.as_str());
                    assert!(fine, "{}:{number}: {name} uses {used}", path.display());
                }
            }
        }
    }
}

#[test]
fn pure_modules_are_pure() {
    for name in ["frame", "switch"] {
        for (path, text) in layer(name) {
            for (number, line) in code(&text) {
                let found = IMPURE.iter().find(|word| line.contains(*word));
                assert!(found.is_none(), "{}:{number}: {name} uses {found:?}", path.display());
            }
        }
    }
}

#[test]
fn unsafe_has_one_home() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let home = source.join("sys");
    let mut seen = 0;
    for (path, text) in sources(&source) {
        let found = code(&text).find(|(_, line)| line.contains("unsafe") && !line.contains("#!["));
        seen += usize::from(found.is_some());
        assert!(found.is_none() || path.starts_with(&home), "{}: {found:?}", path.display());
    }
    assert!(seen > 0, "the search finds nothing at all");
}

#[test]
fn the_search_reads_imports_in_braces() {
    assert_eq!(used_layers("use crate::{frame::Tag, port};"), ["frame", "port"]);
    assert_eq!(used_layers("let x = crate::sys::tap::create(&crate::frame::X);"), ["sys", "frame"]);
}
