//! `scripts/macvtap-to-vlanswitchd`: what it makes of libvirt's XML, and that vlanswitchd
//! takes what it prints.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests fail by panicking"
)]

use clap::Parser;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tempfile::TempDir;
use vlanswitchd::control::cli::{Arguments, Config};

const LINKS: [&str; 2] = ["--links", "tests/migration/links.json"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn script() -> PathBuf {
    root().join("scripts/macvtap-to-vlanswitchd")
}

struct Said {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self {
            code: output.status.code(),
            stdout: text(output.stdout),
            stderr: text(output.stderr),
        }
    }
}

fn run(arguments: &[&str]) -> Said {
    Command::new(script()).args(arguments).current_dir(root()).output().unwrap().into()
}

/// The maps it printed, as vlanswitchd reads them.
fn configuration(printed: &str) -> Config {
    let maps = printed.lines().filter_map(|line| line.strip_prefix("--map "));
    let words = maps.flat_map(|map| ["--map", map]);
    let words = ["vlanswitchd", "--uplink", "eth0"].into_iter().chain(words);
    Config::try_from(Arguments::try_parse_from(words).unwrap()).unwrap()
}

#[test]
fn the_documents_show_what_it_prints() {
    let page = fs::read_to_string(root().join("docs/migration.md")).unwrap();
    let shown = page.split("the output of scripts/macvtap-to-vlanswitchd").nth(1).unwrap();
    // No device of this machine may have a say.
    let nothing = TempDir::new().unwrap();
    let links = nothing.path().join("links.json");
    fs::write(&links, "[]").unwrap();
    let said = run(&["--links", links.to_str().unwrap(), "tests/migration/web1.xml"]);
    assert_eq!((said.code, said.stderr.as_str()), (Some(0), ""));
    assert_eq!(shown.split("```\n").nth(1).unwrap(), said.stdout);
    assert_eq!(configuration(&said.stdout).ports.len(), 2);
}

#[test]
fn devices_are_what_the_kernel_says_they_are() {
    let said = run(&[&LINKS[..], &["tests/migration/many.xml"]].concat());
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    let maps: Vec<&str> = said
        .stdout
        .lines()
        .filter(|line| line.starts_with("--map") || line.starts_with("# up"))
        .collect();
    // A name of libvirt's length is cut, and one that is taken is not given again.
    assert_eq!(
        maps,
        ["# uplink eth0", "--map 102=tap-a-domain-2", "--map 200.20=tap-a-domain-3,tpid=0x88a8"]
    );
    assert_eq!(configuration(&said.stdout).ports.len(), 2);
    for note in ["dmz maps priorities", "<bandwidth>: <outbound>", "<filterref> is left out"] {
        assert!(said.stdout.contains(note), "{note}: {}", said.stdout);
    }
    assert!(!said.stdout.contains("<filterref filter"), "{}", said.stdout);
    let errors: Vec<&str> = said.stderr.lines().collect();
    let expected = [
        "note: a domain with a long name: network 'default' is not looked at",
        "VLAN 200 is already that of a domain with a long name, 52:54:00:00:02:02",
        "eth0 is no VLAN device",
        "storage is not here, and its name does not say",
    ];
    assert_eq!(errors.len(), expected.len(), "{errors:?}");
    for (error, words) in errors.iter().zip(expected) {
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn tables_for_the_file_are_what_the_maps_are() {
    let arguments = [&LINKS[..], &["tests/migration/many.xml"]].concat();
    let maps = configuration(&run(&arguments).stdout);
    let said = run(&[&arguments[..], &["--toml"]].concat());
    let tables: String = said
        .stdout
        .split("\n\n# ")
        .next()
        .unwrap()
        .lines()
        .map(|line| format!("{line}\n"))
        .collect();
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("v.toml");
    fs::write(&file, format!("[uplink]\ndevice = 'eth0'\n{tables}")).unwrap();
    let words = ["vlanswitchd", "--config", file.to_str().unwrap()];
    let from_file = Config::load(Arguments::try_parse_from(words).unwrap()).unwrap();
    assert_eq!(from_file.table.claims(), maps.table.claims());
    assert_eq!(from_file.ports.len(), 2);
}

#[test]
fn a_whole_domain_keeps_all_else() {
    let arguments = [&LINKS[..], &["--xml", "tests/migration/many.xml"]].concat();
    let xml = run(&arguments).stdout;
    let before = fs::read_to_string(root().join("tests/migration/many.xml")).unwrap();
    let count = |text: &str, word: &str| text.matches(word).count();
    assert_eq!(count(&xml, "type=\"ethernet\""), 2, "{xml}");
    assert_eq!(count(&xml, "managed=\"no\""), 2);
    // Those that could not be translated stay.
    assert_eq!(count(&xml, "type=\"direct\""), count(&before, "type='direct'") - 2);
    assert_eq!(count(&xml, "<qemu:arg value=\"-nodefaults\""), 1, "{xml}");
    assert_eq!(count(&xml, "<mac "), count(&before, "<mac "));
    // What it has made needs nothing more.
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("new.xml");
    fs::write(&file, run(&["--xml", "tests/migration/web1.xml"]).stdout).unwrap();
    let again = run(&[file.to_str().unwrap()]);
    assert_eq!((again.code, again.stdout.as_str()), (Some(0), ""));
}

#[test]
fn what_is_no_domain_is_refused() {
    for (file, words) in
        [("tests/migration/links.json", "no XML"), ("tests/migration/no-domain.xml", "no <domain>")]
    {
        let said = run(&[file]);
        assert_eq!(said.code, Some(1), "{file}");
        assert!(said.stderr.contains(words), "{file}: {}", said.stderr);
    }
}

#[test]
fn devices_of_this_host_are_asked_for() {
    // Not every kernel has VLAN devices: a stand-in for `ip` answers.
    let folder = TempDir::new().unwrap();
    let ip = folder.path().join("ip");
    let links = root().join("tests/migration/links.json");
    let answer = format!(
        "#!/bin/sh\n[ \"$*\" = '-json -details link show' ] && cat '{}'\n",
        links.display()
    );
    fs::write(&ip, answer).unwrap();
    fs::set_permissions(&ip, fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", folder.path().display(), std::env::var("PATH").unwrap());
    let mut command = Command::new(script());
    let file = root().join("tests/migration/many.xml");
    let said = Said::from(command.arg(file).env("PATH", path).output().unwrap());
    assert!(said.stdout.contains("--map 200.20="), "{} {}", said.stdout, said.stderr);
}
