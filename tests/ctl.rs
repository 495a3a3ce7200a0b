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
#[path = "ctl/terminal.rs"]
mod terminal;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fake::{Answer, Fake, Run, command, ctl, fresh_path};
use replies::*;
use serde_json::{Value, json};
use snapbox::Data;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};
use terminal::Terminal;
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
fn doctor_says_what_it_can_without_a_daemon() {
    let folder = tempfile::TempDir::new().unwrap();
    let socket = folder.path().join("nobody");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_vlanswitchctl"));
    let output = command.arg("--socket").arg(&socket).arg("doctor").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let words = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(words.contains("no daemon answers on") && words.contains("cure: start it"), "{text}");
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
fn a_file_is_checked_without_a_switch() {
    let nowhere = fresh_path("nowhere");
    let file = fresh_path("file.toml");
    let name = file.to_str().unwrap();
    // The host may lack the device: that is a warning.
    fs::write(&file, "[uplink]\ndevice = \"no-such-uplink\"\n").unwrap();
    let run = ctl(&nowhere, &["config", "check", name]);
    assert_eq!(run.status, 0, "{run:?}");
    assert!(run.out.starts_with(&format!("{name}: ok, uplink no-such-uplink")), "{run:?}");
    assert!(run.error.contains("WARN") && run.error.contains("no-such-uplink"), "{run:?}");
    assert_eq!(ctl(&nowhere, &["config", "check", name, "--json"]).out, "{\"valid\":true}\n");
    fs::write(&file, "[uplink]\ndevice = \"eth0\"\nspeed = 1\n[[port]]\nvlan = 5000\n").unwrap();
    let run = ctl(&nowhere, &["config", "check", name]);
    assert_eq!((run.status, run.out.as_str()), (2, ""), "{run:?}");
    assert!(run.error.starts_with("vlanswitchctl: error: "), "{run:?}");
    assert!(run.error.contains(&format!("{name}:3")), "the line of `speed`: {run:?}");
    fs::remove_file(&file).unwrap();
}

#[test]
#[ignore = "needs tcpdump"]
fn a_filter_is_compiled_by_tcpdump() {
    let fake = Fake::new(|_| Answer::reply(&CaptureReply { pcapng: String::new() }));
    let run = fake.ctl(&["capture", "-w", "-", "--filter", "arp"]);
    assert_eq!((run.status, run.out.as_str()), (0, ""), "{run:?}");
    let arp = "4,40 0 0 12,21 0 1 2054,6 0 0 262144,6 0 0 0";
    assert_eq!(fake.calls()[0]["parameters"]["filter"], arp);
    let run = fake.ctl(&["capture", "-w", "-", "--filter", "arp and and"]);
    assert_eq!(run.status, 2);
    assert!(
        run.error.contains("`arp and and` is wrong: ") && run.error.contains("syntax error"),
        "{run:?}"
    );
    assert_eq!(fake.calls().len(), 1, "nothing was asked for");
}

#[test]
fn man_pages_of_both_programs_are_written() {
    let nowhere = fresh_path("nowhere");
    let directory = fresh_path("man");
    done(ctl(&nowhere, &["man", directory.to_str().unwrap()]));
    for page in ["vlanswitchd.8", "vlanswitchctl.1", "vlanswitchctl-port-add.1"] {
        let text = std::fs::read_to_string(directory.join(page)).unwrap();
        assert!(text.contains(".TH ") && text.contains(".SH NAME"), "{page}: {text}");
    }
    std::fs::remove_dir_all(&directory).unwrap();
    assert!(done(ctl(&nowhere, &["man"])).contains(".SH SYNOPSIS"));
    assert!(done(ctl(&nowhere, &["completions", "bash"])).contains("complete -F _vlanswitchctl"));
}

/// A pcapng file by hand: a section, an Ethernet interface, frames of 60 bytes.
fn pcapng(frames: usize) -> Vec<u8> {
    let block = |kind: u32, body: &[u8]| -> Vec<u8> {
        let length = (12 + body.len() as u32).to_ne_bytes();
        [&kind.to_ne_bytes()[..], &length, body, &length].concat()
    };
    let numbers = |numbers: &[u32]| -> Vec<u8> {
        numbers.iter().flat_map(|number| number.to_ne_bytes()).collect()
    };
    let mut section = numbers(&[0x1a2b_3c4d]);
    section.extend([1u16.to_ne_bytes(), 0u16.to_ne_bytes()].concat());
    section.extend((-1i64).to_ne_bytes());
    let mut file = block(0x0a0d_0d0a, &section);
    file.extend(block(1, &numbers(&[1, 0])));
    for _ in 0..frames {
        let mut packet = numbers(&[0, 0, 0, 60, 60]);
        packet.extend([0xff; 60]);
        file.extend(block(6, &packet));
    }
    file
}

/// The file in pieces that do not end where blocks do.
fn pieces(file: &[u8]) -> Vec<CaptureReply> {
    file.chunks(101).map(|piece| CaptureReply { pcapng: STANDARD.encode(piece) }).collect()
}

#[test]
fn a_capture_is_written_as_it_comes() {
    let file = pcapng(5);
    let replies = pieces(&file);
    let fake = Fake::new(move |call| match call["method"].as_str().unwrap() {
        "org.vlanswitchd.Capture" => Answer::stream(&replies),
        "org.vlanswitchd.GetPort" => {
            Answer::error("org.vlanswitchd.NoSuchPort", json!({"name": "uplink"}))
        }
        _ => Answer::reply(&StatusReply { status: status() }),
    });
    let path = fresh_path("capture");
    let words = ["capture", "uplink", "--drops", "--snaplen", "96", "-c", "5", "-w"];
    let filter = ["--filter", "1,6 0 0 262144"];
    let words: Vec<&str> =
        words.into_iter().chain([path.to_str().unwrap()]).chain(filter).collect();
    let run = fake.ctl(&words);
    assert_eq!((run.status, run.out.as_str()), (0, ""), "{run:?}");
    assert!(run.error.contains("captured 5 frames"), "{run:?}");
    assert_eq!(fs::read(&path).unwrap(), file);
    fs::remove_file(&path).unwrap();
    let expected = json!({
        "port": "eth0", "drops": true, "filter": "1,6 0 0 262144", "snaplen": 96, "limit": 5
    });
    assert_eq!(fake.calls().last().unwrap()["parameters"], expected);

    let output = command(&fake.socket, &["capture", "tap1"]).output().unwrap();
    assert_eq!(output.stdout, file, "standard output is no terminal");
}

#[test]
fn a_refused_capture_leaves_the_file() {
    let path = fresh_path("kept");
    fs::write(&path, "old").unwrap();
    let fake = Fake::new(|_| Answer::error("org.varlink.service.PermissionDenied", json!({})));
    let run = fake.ctl(&["capture", "-w", path.to_str().unwrap()]);
    assert_eq!(run.status, 1);
    assert!(run.error.starts_with("vlanswitchctl: error: permission denied"), "{run:?}");
    assert_eq!(fs::read_to_string(&path).unwrap(), "old");
    fs::remove_file(&path).unwrap();
    let fake = Fake::new(|_| Answer::reply(&CaptureReply { pcapng: "no base64!".to_owned() }));
    let run = fake.ctl(&["capture", "-w", path.to_str().unwrap()]);
    assert!(run.status == 1 && run.error.contains("not base64"), "{run:?}");
}

/// What a program came to that should end now.
fn ended(mut child: std::process::Child) -> Run {
    let deadline = Instant::now() + Duration::from_secs(20);
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            panic!("it goes on: {:?}", child.wait_with_output());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Run::from(child.wait_with_output().unwrap())
}

/// A capture that has written its first frames and waits for more.
fn endless_capture() -> (Fake, std::process::Child) {
    let fake = Fake::new(|_| {
        let reply = CaptureReply { pcapng: STANDARD.encode(pcapng(2)) };
        Answer::open(fake::message(&json!({ "parameters": reply, "continues": true })))
    });
    let mut command = command(&fake.socket, &["capture"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = vec![0; pcapng(2).len()];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    assert_eq!(first, pcapng(2));
    (fake, child)
}

#[test]
fn a_signal_ends_a_capture_quietly() {
    let (_fake, child) = endless_capture();
    let id = nix::unistd::Pid::from_raw(child.id() as i32);
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGINT).unwrap();
    let run = ended(child);
    assert_eq!(run.status, 0);
    let place = "captured 2 frames, ";
    assert!(run.error.starts_with(&format!("vlanswitchctl: {place}")), "{run:?}");
    assert_eq!(run.error.lines().count(), 1, "{run:?}");
}

/// No further frame is needed to notice.
#[test]
fn a_closed_pipe_ends_a_capture_quietly() {
    let (_fake, mut child) = endless_capture();
    drop(child.stdout.take());
    let run = ended(child);
    assert_eq!(run.status, 0);
    assert_eq!(run.error.lines().count(), 1, "{run:?}");
}

#[test]
fn a_closed_pipe_ends_a_stream_quietly() {
    let replies: Vec<EventReply> = vec![event(0, EventKind::Config, None, "x"); 10_000];
    let fake = Fake::new(move |_| Answer::stream(&replies));
    let mut command = command(&fake.socket, &["monitor"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0; 10]).unwrap();
    drop(child.stdout.take());
    let run = ended(child);
    assert_eq!((run.status, run.error.as_str()), (0, ""), "{run:?}");
}

/// On a real terminal: drawn, resized, used by keys, and given back as it was, also
/// when the switch goes away.
#[test]
#[ignore = "needs tmux"]
fn top_works_on_a_terminal() {
    let (replies, next) = channel::<Vec<u8>>();
    let socket = fresh_path("top");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    // Sends a reply whenever the test says so, to every client that comes.
    std::thread::spawn(move || {
        let mut client = None;
        for reply in next {
            if reply.is_empty() {
                client = None;
                continue;
            }
            let stream = client.get_or_insert_with(|| listener.accept().unwrap().0);
            let _ = std::io::Write::write_all(stream, &reply);
        }
    });
    let reply = |second: u64| {
        let mut stats = stats(1000 * second);
        stats.ports[0].from_guest.out_frames = second * 2_000_000;
        let reply = json!({ "parameters": StatsReply { stats }, "continues": true });
        replies.send(fake::message(&reply)).unwrap();
    };
    let terminal = Terminal::new(80, 24);
    let line = format!("{} --socket {} top", env!("CARGO_BIN_EXE_vlanswitchctl"), socket.display());
    terminal.type_line(&format!("clear; {line}; echo status $?"));
    reply(1);
    terminal.wait_for("uplink eth0 up");
    reply(2);
    let screen = terminal.wait_for("2.0M");
    assert!(screen.lines().all(|line| line.width() <= 80), "{screen}");
    assert!(terminal.full_screen());
    terminal.press("?");
    terminal.wait_for("Any key goes back.");
    terminal.press("q");
    terminal.wait_until("the list", |screen| !screen.contains("Any key goes back."));
    terminal.resize(120, 40);
    terminal.wait_until("40 lines", |screen| {
        screen.lines().nth(39).is_some_and(|line| line.contains("? help"))
    });
    terminal.press("Enter");
    terminal.wait_for("tap-db: VLAN 103");
    terminal.press("Escape");
    terminal.wait_for("tap-web1");
    terminal.press("q");
    terminal.wait_for("status 0");
    assert!(!terminal.full_screen());

    replies.send(Vec::new()).unwrap();
    terminal.type_line(&format!("clear; {line}; echo status $?"));
    reply(3);
    terminal.wait_for("uplink eth0 up");
    replies.send(Vec::new()).unwrap();
    let screen = terminal.wait_for("status 1");
    assert!(!terminal.full_screen());
    assert!(screen.contains("vlanswitchd closed the connection"), "{screen}");
    // Echo and line editing are back.
    terminal.type_line("echo still $((40 + 2))");
    terminal.wait_for("still 42");
    fs::remove_file(&socket).unwrap();
}

/// What only a terminal shows: colours, and that a capture is none of its business.
#[test]
#[ignore = "needs tmux"]
fn colours_are_for_terminals_that_want_them() {
    let fake = Fake::always(&PortsReply { ports: stats(0).ports });
    let terminal = Terminal::new(80, 24);
    let program = env!("CARGO_BIN_EXE_vlanswitchctl");
    let socket = fake.socket.display();
    terminal.type_line(&format!("clear; {program} --socket {socket} port list; echo end $?"));
    terminal.wait_for("end 0");
    assert!(terminal.coloured_screen().contains("\u{1b}[32mattached"), "{:?}", terminal.screen());
    terminal
        .type_line(&format!("clear; NO_COLOR=1 {program} --socket {socket} port list; echo plain"));
    terminal.wait_until("plain", |screen| screen.lines().any(|line| line == "plain"));
    assert!(!terminal.coloured_screen().contains("\u{1b}[32m"), "{}", terminal.coloured_screen());
    terminal.type_line(&format!("clear; {program} --socket {socket} capture; echo end $?"));
    let screen = terminal.wait_for("end 2");
    assert!(screen.contains("capture | wireshark -k -i -"), "{screen}");
}

/// A stop by a signal leaves no terminal behind that nobody can use.
#[test]
#[ignore = "needs tmux"]
fn top_gives_the_terminal_back_when_it_is_stopped() {
    let fake = Fake::new(|_| {
        let reply = json!({ "parameters": StatsReply { stats: stats(0) }, "continues": true });
        Answer::open(fake::message(&reply))
    });
    let terminal = Terminal::new(80, 24);
    let program = env!("CARGO_BIN_EXE_vlanswitchctl");
    let line = format!(
        "clear; sh -c 'echo $$ > {0}.id; exec {program} --socket {0} top'; echo status $?",
        fake.socket.display()
    );
    terminal.type_line(&line);
    terminal.wait_for("uplink eth0 up");
    assert!(terminal.full_screen());
    let file = format!("{}.id", fake.socket.display());
    let id: i32 = fs::read_to_string(&file).unwrap().trim().parse().unwrap();
    let id = nix::unistd::Pid::from_raw(id);
    nix::sys::signal::kill(id, nix::sys::signal::Signal::SIGTERM).unwrap();
    terminal.wait_for("status 0");
    assert!(!terminal.full_screen());
    terminal.type_line("echo still $((40 + 2))");
    terminal.wait_for("still 42");
    fs::remove_file(&file).unwrap();
}
