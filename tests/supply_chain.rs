//! What we depend on: licences as in deny.toml, and the public registry only. It is
//! what `cargo deny check licenses sources` does, for where that is not installed.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use serde_json::Value;
use std::fs;
use std::process::Command;

/// Whether an SPDX expression can be met by these licences: alternatives by OR or `/`,
/// all of several by AND.
fn is_allowed(expression: &str, allowed: &[&str]) -> bool {
    let plain = expression.replace(['(', ')'], "");
    plain.split(" AND ").all(|part| {
        let mut choices = part.split(" OR ").flat_map(|choice| choice.split('/'));
        choices.any(|choice| allowed.contains(&choice.trim()))
    })
}

#[test]
fn every_crate_has_a_licence_and_a_source_we_allow() {
    let root = env!("CARGO_MANIFEST_DIR");
    let text = fs::read_to_string(format!("{root}/deny.toml")).unwrap();
    let document: toml_edit::DocumentMut = text.parse().unwrap();
    let list = |section: &str, key: &str| -> Vec<String> {
        let values = document[section][key].as_array().unwrap().iter();
        values.map(|value| value.as_str().unwrap().to_owned()).collect()
    };
    let licences = list("licenses", "allow");
    let licences: Vec<&str> = licences.iter().map(String::as_str).collect();
    let registry = &list("sources", "allow-registry")[0];
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--locked", "--offline", "--format-version", "1"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    let packages = metadata["packages"].as_array().unwrap();
    assert!(packages.len() > 100, "{} packages", packages.len());
    for package in packages {
        let name = &package["name"];
        let licence = package["license"].as_str().unwrap_or_default();
        assert!(is_allowed(licence, &licences), "{name}: {licence}");
        if let Some(source) = package["source"].as_str() {
            assert_eq!(source, format!("registry+{registry}"), "{name}");
        }
    }
}

#[test]
fn expressions_are_understood() {
    let allowed = ["MIT", "Unicode-3.0"];
    for (expression, fine) in [
        ("MIT OR GPL-3.0-only", true),
        ("MIT/Apache-2.0", true),
        ("(MIT OR Apache-2.0) AND Unicode-3.0", true),
        ("MIT AND GPL-3.0-only", false),
        ("GPL-3.0-only", false),
        ("", false),
    ] {
        assert_eq!(is_allowed(expression, &allowed), fine, "{expression}");
    }
}
