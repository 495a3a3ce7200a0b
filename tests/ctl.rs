//! `vlanswitchctl` as its users see it, against a switch that only talks (see
//! `tests/ctl/fake.rs`). What it prints stands in `tests/ctl/*.txt`; run with
//! SNAPSHOTS=overwrite after a change, and read the difference.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

#[path = "ctl/fake.rs"]
mod fake;
#[path = "ctl/replies.rs"]
mod replies;

use fake::{Answer, Fake, Run, ctl, fresh_path};
use replies::*;
use serde_json::{Value, json};
use snapbox::Data;
use std::path::Path;
use unicode_width::UnicodeWidthStr;
use vlanswitchd::control::api::*;

/// Compares a text with `tests/ctl/NAME.txt`.
fn snapshot(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/ctl").join(name);
    let path = path.with_extension("txt");
    snapbox::assert_data_eq!(text.to_owned(), Data::read_from(&path, None).raw());
}

fn done(run: Run) -> String {
    assert_eq!((run.status, run.error.as_str()), (0, ""), "{run:?}");
    run.out
}

#[test]
fn each_command_prints_for_people() {
    let ports = PortsReply { ports: stats(0).ports };
    let port = PortReply { port: ports.ports[1].clone(), notes: None };
    let reload = ReloadReply {
        added: vec!["tap-a".to_owned(), "tap-b".to_owned()],
        removed: vec!["tap-c".to_owned()],
        ..Default::default()
    };
    let toml = ConfigReply { toml: "[uplink]\ndevice = \"eth0\"\n".to_owned() };
    let cases: [(&str, &[&str], Value); 10] = [
        ("status", &["status"], json!(StatusReply { status: status() })),
        ("port-list", &["port", "list"], json!(ports)),
        ("port-show", &["port", "show", "tap-fw"], json!(port)),
        ("stats", &["stats"], json!(StatsReply { stats: stats(0) })),
        ("stats-port", &["stats", "tap-fw"], json!(StatsReply { stats: stats(0) })),
        ("drops", &["drops"], json!(DropsReply { drops: drops() })),
        ("config-show", &["config", "show"], json!(toml)),
        ("config-check", &["config", "check"], json!(reload)),
        ("config-reload", &["config", "reload"], json!(reload)),
        ("config-same", &["config", "reload"], json!(ReloadReply::default())),
    ];
    for (name, words, reply) in cases {
        snapshot(name, &done(Fake::always(&reply).ctl(words)));
    }
}

#[test]
fn changes_are_said_and_warnings_go_to_standard_error() {
    let reply = PortReply {
        port: port("tap-web1", "102", "no_carrier"),
        notes: Some(vec!["the tap had a txqueuelen of 10".to_owned()]),
    };
    let fake = Fake::always(&reply);
    let run = fake.ctl(&["port", "set", "tap-web1", "vlan=102", "pcp=3", "--persist"]);
    assert_eq!(run.status, 0);
    assert_eq!(run.out, "changed 102=tap-web1 (no_carrier), in the configuration file too\n");
    assert_eq!(run.error, "vlanswitchctl: note: the tap had a txqueuelen of 10\n");
    let run = fake.ctl(&["port", "add", "102=tap-web1"]);
    assert_eq!(run.out, "added 102=tap-web1 (no_carrier)\n");
    let expected = [
        json!({
            "method": "org.vlanswitchd.SetPort",
            "parameters": {
                "name": "tap-web1",
                "changes": [{"key": "vlan", "value": "102"}, {"key": "pcp", "value": "3"}],
                "persist": true
            }
        }),
        json!({
            "method": "org.vlanswitchd.AddPort",
            "parameters": {"map": "102=tap-web1", "persist": null}
        }),
    ];
    assert_eq!(fake.calls(), expected);
    let fake = Fake::always(&NotesReply { notes: Vec::new() });
    assert_eq!(done(fake.ctl(&["port", "remove", "tap-web1"])), "removed tap-web1\n");
}

#[test]
fn doctor_fails_if_it_found_an_error() {
    let fake = Fake::always(&FindingsReply { findings: findings() });
    let run = fake.ctl(&["doctor"]);
    assert_eq!(run.status, 1);
    snapshot("doctor", &run.out);
    let run = fake.ctl(&["doctor", "--json"]);
    assert_eq!(run.status, 1);
    let warnings = Fake::always(&FindingsReply { findings: findings().split_off(1) });
    assert_eq!(warnings.ctl(&["doctor"]).status, 0);
    let nothing = Fake::always(&FindingsReply { findings: Vec::new() });
    assert_eq!(done(nothing.ctl(&["doctor"])), "nothing found\n");
}

#[test]
fn monitor_prints_a_line_an_event() {
    let events = [
        event(1_795_000_000_000, EventKind::PortAttached, Some("tap-web1"), "VLAN 101 forwards"),
        event(1_795_000_001_500, EventKind::Overload, Some("tap-fw"), "its guest is too slow"),
        event(1_795_000_002_000, EventKind::Missed, None, "12 events were missed"),
    ];
    let fake = Fake::new(move |_| Answer::stream(&events));
    snapshot("monitor", &done(fake.ctl(&["monitor"])));
    assert_eq!(fake.calls()[0]["more"], true);
}

/// Three readings, a second apart.
fn readings(mut stats: Stats) -> Vec<StatsReply> {
    let mut replies = Vec::new();
    for step in 0..3 {
        stats.time = 1_795_000_000_000 + step * 1000;
        stats.uplink.from_wire.out_frames += 2_345_678;
        stats.uplink.from_wire.out_bytes += 425_000_000;
        stats.ports[0].from_guest.out_frames += 1_234_567;
        stats.ports[0].from_guest.out_bytes += 123_456_700;
        stats.ports[0].to_guest.drops.insert("guest_queue_full".to_owned(), 999 * step);
        replies.push(StatsReply { stats: stats.clone() });
    }
    replies
}

#[test]
fn rates_are_differences() {
    let replies = readings(stats(0));
    let fake = Fake::new(move |_| Answer::stream(&replies));
    snapshot("stats-watch", &done(fake.ctl(&["stats", "--watch"])));
    snapshot("stats-watch-port", &done(fake.ctl(&["stats", "--watch", "tap-web1"])));
    assert_eq!(fake.calls()[0]["parameters"]["interval"], 1000);
    let run = fake.ctl(&["stats", "--watch", "1", "tap-none"]);
    assert_eq!(run.status, 2);
    assert!(run.error.contains("there is no port tap-none"), "{run:?}");
}

/// Whatever the switch says comes out as it came, order and unknown fields included.
#[test]
fn json_is_the_reply() {
    let parameters = r#"{"zebra":1.50,"ports":[],"port":null,"a":"é\u0000 \n"}"#;
    let message = format!("{{\"parameters\":{parameters}}}\0");
    let words: [&[&str]; 13] = [
        &["status"],
        &["port", "list"],
        &["port", "show", "x"],
        &["port", "add", "1=x"],
        &["port", "set", "x", "vlan=2"],
        &["port", "remove", "x"],
        &["stats"],
        &["drops"],
        &["config", "show"],
        &["config", "check"],
        &["config", "reload"],
        &["monitor"],
        &["stats", "--watch"],
    ];
    for words in words {
        let message = message.clone();
        let fake = Fake::new(move |_| Answer::raw(message.clone()));
        let words: Vec<&str> = words.iter().copied().chain(["--json"]).collect();
        assert_eq!(done(fake.ctl(&words)), format!("{parameters}\n"), "{words:?}");
    }
}

#[test]
fn nothing_is_wider_than_80_columns() {
    let ports = PortsReply { ports: largest_stats(0).ports };
    let port = PortReply { port: largest_port(), notes: None };
    let many: Vec<String> = (0..40).map(|number| format!("tap-{number}")).collect();
    let reload =
        ReloadReply { added: many.clone(), changed: many.clone(), removed: many, notes: vec![] };
    let mut worst: Vec<Finding> = findings();
    for finding in &mut worst {
        finding.what = finding.what.repeat(5);
    }
    let mut event = event(0, EventKind::UplinkDetached, Some(LONG_NAME), "the uplink is gone");
    event.event.time = u64::MAX;
    let cases: [(&[&str], Value); 9] = [
        (&["status"], json!(StatusReply { status: largest_status() })),
        (&["port", "list"], json!(ports)),
        (&["port", "show", "x"], json!(port)),
        (&["port", "add", "1=x"], json!(port)),
        (&["stats"], json!(StatsReply { stats: largest_stats(0) })),
        (&["drops"], json!(DropsReply { drops: largest_drops() })),
        (&["config", "reload"], json!(reload)),
        (&["doctor"], json!(FindingsReply { findings: worst })),
        (&["monitor"], json!(event)),
    ];
    for (words, reply) in cases {
        let run = Fake::always(&reply).ctl(words);
        assert_narrow(words, &run.out);
    }
    let mut first = largest_stats(0);
    first.time = 1;
    first.ports[0].from_guest = Flow::default();
    first.ports[0].to_guest = Flow::default();
    let replies = [StatsReply { stats: first }, StatsReply { stats: largest_stats(2) }];
    let fake = Fake::new(move |_| Answer::stream(&replies));
    for words in [&["stats", "--watch"][..], &["stats", "--watch", LONG_NAME]] {
        assert_narrow(words, &done(fake.ctl(words)));
    }
    assert!(
        done(Fake::always(&json!(port)).ctl(&["port", "show", "x"]))
            .contains("18446744073709551615")
    );
}

fn assert_narrow(words: &[&str], text: &str) {
    assert!(text.lines().count() > 0, "{words:?} prints nothing");
    for line in text.lines() {
        assert!(line.width() <= 80, "{words:?}: {} columns: {line}", line.width());
    }
}

#[test]
fn errors_say_what_to_do() {
    let error = |name: &'static str, parameters: Value| {
        Fake::new(move |_| Answer::error(name, parameters.clone())).ctl(&["port", "remove", "tap1"])
    };
    let said = |run: Run, status: i32, words: &str| {
        assert_eq!(run.status, status, "{run:?}");
        assert!(run.out.is_empty() && run.error.starts_with("vlanswitchctl: error: "), "{run:?}");
        assert!(run.error.contains(words), "{run:?}");
    };
    let run = error("org.vlanswitchd.NoSuchPort", json!({"name": "tap1"}));
    said(run, 2, "there is no port tap1; `vlanswitchctl port list`");
    let run = error("org.vlanswitchd.Refused", json!({"message": "VLAN 101 is taken\u{1b}[2J"}));
    assert!(!run.error.contains('\u{1b}'), "{run:?}");
    said(run, 2, "VLAN 101 is taken");
    said(error("org.vlanswitchd.Failed", json!({"message": "ENOMEM"})), 1, "ENOMEM");
    said(error("org.varlink.service.PermissionDenied", json!({})), 1, "be root or a member of");
    let unknown = json!({"method": "org.vlanswitchd.RemovePort"});
    said(error("org.varlink.service.MethodNotFound", unknown), 1, "of another version");
    said(error("org.example.Odd", json!({"x": 1})), 1, "org.example.Odd {\"x\":1}");

    let answers = |bytes: &[u8]| {
        let bytes = bytes.to_vec();
        Fake::new(move |_| Answer::raw(bytes.clone())).ctl(&["status"])
    };
    said(answers(b""), 1, "closed the connection");
    said(answers(b"{\"parameters\":{"), 1, "closed the connection");
    said(answers(b"GET / HTTP/1.1\0"), 1, "makes no sense");
    said(answers(b"\xff\xfe\0"), 1, "makes no sense");
    said(answers(b"{\"parameters\":{\"status\":7}}\0"), 1, "makes no sense");
    said(answers(b"{\"parameters\":[]}\0"), 1, "makes no sense");
    said(answers(&vec![b' '; 33 << 20]), 1, "longer than 32 MiB");
}

#[test]
fn a_socket_that_is_not_there_is_explained() {
    let nowhere = fresh_path("nowhere");
    let run = ctl(&nowhere, &["status"]);
    assert_eq!(run.status, 1);
    assert!(run.error.contains("is vlanswitchd running?") && run.error.contains("--socket"));
    let fake = Fake::new(|_| Answer::raw(""));
    let left = fresh_path("left");
    drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
    let run = ctl(&left, &["status"]);
    assert!(run.error.contains("nobody answers on this socket"), "{run:?}");
    std::fs::remove_file(&left).unwrap();
    // The option is stronger than the environment.
    let run = fake.ctl(&["--socket", nowhere.to_str().unwrap(), "status"]);
    assert!(run.error.contains("no such socket"), "{run:?}");
}

#[test]
fn help_reads_well() {
    let nowhere = fresh_path("nowhere");
    for (name, words) in [
        ("help", &["--help"][..]),
        ("help-capture", &["capture", "--help"]),
        ("help-port-set", &["port", "set", "--help"]),
        ("help-stats", &["stats", "--help"]),
    ] {
        let text = done(ctl(&nowhere, words));
        assert_narrow(words, &text);
        snapshot(name, &text);
    }
}

#[test]
fn man_pages_of_both_programs_are_written() {
    let nowhere = fresh_path("nowhere");
    let directory = fresh_path("man");
    done(ctl(&nowhere, &["man", directory.to_str().unwrap()]));
    for page in ["vlanswitchd.8", "vlanswitchctl.8", "vlanswitchctl-port-add.8"] {
        let text = std::fs::read_to_string(directory.join(page)).unwrap();
        assert!(text.contains(".TH ") && text.contains(".SH NAME"), "{page}: {text}");
    }
    std::fs::remove_dir_all(&directory).unwrap();
    assert!(done(ctl(&nowhere, &["man"])).contains(".SH SYNOPSIS"));
    assert!(done(ctl(&nowhere, &["completions", "bash"])).contains("complete -F _vlanswitchctl"));
}
