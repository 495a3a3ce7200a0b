//! The configuration as an operator meets it: the real program, its words and exit
//! status. No privileges are needed.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

use std::fs;
use std::path::Path;
use std::process::Command;
use tempfile::TempDir;

const UPLINK: &str = "[uplink]\ndevice = \"no-such-up0\"\n";

/// What the program said.
#[derive(Debug)]
struct Answer {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Runs the program beside the files, so that they have the names given here.
fn run(files: &[(&str, &str)], arguments: &[&str]) -> Answer {
    let folder = TempDir::new().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    let mut command = Command::new(env!("CARGO_BIN_EXE_vlanswitchd"));
    let output = command.args(arguments).current_dir(folder.path()).output().unwrap();
    Answer {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

fn document(path: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap()
}

#[test]
fn a_good_file_is_told_in_one_line() {
    let ports = "[[port]]\nvlan = 5\ndevice = 'a'\n[[port]]\nvlan = 6\ndevice = 'b'\n";
    let file = format!("{UPLINK}{ports}");
    let answer = run(&[("v.toml", &file)], &["--config", "v.toml", "--check"]);
    assert_eq!(answer.stdout, "v.toml: ok, uplink no-such-up0, 2 ports\n");
    assert_eq!(answer.code, Some(0));
    // It may be written on another host, but that is said.
    assert!(answer.stderr.contains("no-such-up0: no such network device"), "{}", answer.stderr);

    let more = ["--config", "v.toml", "--check", "--map", "7=c", "--uplink", "no-such-up1"];
    let answer = run(&[("v.toml", &file)], &more);
    assert_eq!(answer.stdout, "v.toml: ok, uplink no-such-up1, 3 ports\n");
}

#[test]
fn the_words_in_the_documents_are_those_of_the_program() {
    let bad = "[uplink]\ndevice = \"eth0\"\n[switch]\npol = \"busy\"\n\n\
               [[port]]\nvlan = 101.20\ndevice = \"tap-web1\"\n\
               [[port]]\nvlan = 101\ndevice = \"tap-web2\"\npcp = 9\n\n\
               [[port]]\nvlan = 102\ndevice = \"tap-web3\"\n\
               [[port]]\nvlan = \"102-103\"\ndevice = \"tap-web4\"\n";
    let answer = run(&[("bad.toml", bad)], &["--config", "bad.toml", "--check"]);
    assert_eq!((answer.code, answer.stdout.as_str()), (Some(2), ""));
    let page = document("docs/configuration.md");
    let after = page.split("<!-- the output of --check").nth(1).unwrap();
    assert_eq!(after.split("```\n").nth(1).unwrap(), answer.stderr);
}

#[test]
fn the_example_is_right_as_it_is_and_with_every_default_written_out() {
    let text = document("dist/vlanswitchd.toml");
    let check = |text: &str| run(&[("v.toml", text)], &["--config", "v.toml", "--check"]);
    let answer = check(&text);
    assert_eq!(answer.stdout, "v.toml: ok, uplink eth0, 5 ports\n", "{}", answer.stderr);
    // Not every host has them.
    let of_the_host = ["user = \"nobody\"", "group = \"kvm\"", "cpus = \"2-5,8\""];
    // Lines such as `#poll = "adaptive"`; prose has a space behind the #.
    let mut count = 0;
    let all: Vec<&str> = text
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with(' ') && !of_the_host.contains(&rest) => {
                count += 1;
                rest
            }
            _ => line,
        })
        .collect();
    assert!(count >= 9, "only {count} defaults in the example");
    let answer = check(&all.join("\n"));
    assert_eq!(answer.stdout, "v.toml: ok, uplink eth0, 5 ports\n", "{}", answer.stderr);
}

/// What the packages install has nothing in it but what is to be filled in.
#[test]
fn the_default_file_lacks_an_uplink_only() {
    let text = document("dist/default.toml");
    let check = |text: &str| run(&[("v.toml", text)], &["--config", "v.toml", "--check"]);
    let answer = check(&text);
    assert_eq!(answer.code, Some(2), "{}", answer.stderr);
    assert_eq!(answer.stderr.lines().count(), 1, "{}", answer.stderr);
    assert!(answer.stderr.contains("uplink"), "{}", answer.stderr);
    let plain: Vec<&str> = text
        .lines()
        .map(|line| line.strip_prefix('#').filter(|rest| !rest.starts_with(' ')).unwrap_or(line))
        .collect();
    assert_eq!(check(&plain.join("\n")).stdout, "v.toml: ok, uplink eth0, 1 port\n");
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let answer = run(&[], &["--config", "gone.toml", "--uplink", "up0", "--map", "5=a"]);
    assert_eq!(answer.code, Some(2));
    assert!(
        answer.stderr.starts_with("vlanswitchd: error: gone.toml: cannot be read: No such file")
    );
    assert_eq!(answer.stderr.lines().count(), 1, "{}", answer.stderr);
    let answer = run(&[], &["--config", ".", "--uplink", "up0", "--map", "5=a"]);
    assert_eq!(answer.code, Some(2), "{}", answer.stderr);
}

#[test]
fn devices_that_are_there_and_cannot_be_used_are_faults() {
    // The loopback device is everywhere, and no Ethernet device.
    let answer = run(&[], &["--uplink", "lo", "--map", "5=lo2", "--map", "6=vnet-none", "--check"]);
    let told: Vec<&str> = answer.stderr.lines().collect();
    assert_eq!((answer.code, told.len()), (Some(2), 2), "{told:?}");
    assert!(told[0].contains("--uplink lo: not an Ethernet device"), "{told:?}");
    assert!(told[1].contains("vnet-none: the device does not exist, and its name"), "{told:?}");
    assert_eq!(answer.stdout, "");

    let cpus = ["--uplink", "no-such-up0", "--map", "5=a", "--cpus", "1023", "--check"];
    let answer = run(&[], &cpus);
    assert_eq!(answer.code, Some(2), "{}", answer.stderr);
    assert!(answer.stderr.contains("--cpus: CPU 1023 is not online"), "{}", answer.stderr);

    let file = "[uplink]\ndevice = 'lo'\n\n[[port]]\nvlan = 6\ndevice = 'internal:vif-none'\n";
    let answer = run(&[("v.toml", file)], &["--config", "v.toml", "--check"]);
    let told: Vec<&str> = answer.stderr.lines().collect();
    assert_eq!((answer.code, told.len()), (Some(2), 2), "{told:?}");
    assert!(told[0].contains("error: v.toml:2: lo: not an Ethernet device"), "{told:?}");
    assert!(told[1].contains("error: v.toml:4: internal:vif-none: the device does"), "{told:?}");
}

#[test]
fn options_of_the_command_line_are_refused_with_the_choices() {
    let map = ["--uplink", "up0", "--map", "5=a", "--check"];
    for (option, named) in [
        (["--metrics", "localhost"], "'localhost' is no address: write ADDRESS:PORT"),
        (["--control", ""], "--control"),
        (["--poll", "never"], "adaptive, busy, sleep"),
    ] {
        let answer = run(&[], &[&map[..], &option].concat());
        assert_eq!(answer.code, Some(2), "{option:?}");
        assert!(answer.stderr.contains(named), "{option:?}: {}", answer.stderr);
    }
}
