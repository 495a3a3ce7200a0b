//! One vlanswitchd goes on in place of another: every frame arrives once, VMs notice
//! nothing, and nothing is put back in between.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::both_ways::{assert_counted, both_ways, both_ways_twice, gap, print_gaps, sum};
use lab::frames::{Frame, TagBytes, tag};
use lab::{Daemon, Lab, eventually};
use nix::sys::signal::Signal;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use vlanswitchd::control::api::{PortsReply, Request, StatsReply, Status, StatusReply};
use vlanswitchd::control::client::{Client, ClientError, Reply};

const VLAN: TagBytes = tag(0x8100, 101);
const OTHER: TagBytes = tag(0x8100, 102);
const MAPS: [&str; 6] =
    ["--map", "101=t0", "--map", "102=t1,mode=access", "--map", "55=internal:leg0"];

struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: TempDir::new().unwrap() }
    }

    fn control(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    fn start(&self, lab: &Lab, arguments: &[&str]) -> Daemon {
        let control = self.control().display().to_string();
        let metrics = format!("unix:{}", self.folder.path().join("metrics").display());
        let mut all = vec!["-v", "--control", &control, "--metrics", &metrics];
        all.extend(arguments);
        lab.daemon(&all)
    }

    fn client(&self) -> Caller {
        Caller(Client::connect(&self.control()).unwrap())
    }
}

/// Somebody who asks.
struct Caller(Client);

impl Caller {
    fn call(&mut self, request: &Request) -> Result<Reply, ClientError> {
        self.0.call(request)
    }

    fn status(&mut self) -> Status {
        self.0.call(&Request::GetStatus {}).unwrap().read::<StatusReply>().unwrap().status
    }

    /// The worker of each port.
    fn workers(&mut self) -> Vec<u32> {
        let ports = self.0.call(&Request::ListPorts {}).unwrap().read::<PortsReply>().unwrap();
        ports.ports.into_iter().map(|port| port.worker.unwrap()).collect()
    }

    fn move_port(&mut self, name: &str, worker: u32) {
        self.0.call(&Request::MovePort { name: name.to_owned(), worker }).unwrap();
    }
}

/// Waits for a daemon that has handed over.
fn ended(mut daemon: Daemon) -> Vec<String> {
    let status = eventually("it ends", || daemon.ended());
    assert!(status.success(), "{status}: {:?}", daemon.stderr());
    daemon.stderr()
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn every_frame_arrives_once_through_many_restarts() {
    const RESTARTS: usize = 100;
    let lab = Lab::new();
    let place = Place::new();
    let maps = [&["--workers", "1"], &MAPS[..]].concat();
    let mut daemon = place.start(&lab, &maps);
    let guest = lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    let mut gaps = Vec::new();
    let (sent, rate) = both_ways(&lab, &guest, VLAN, |arrived| {
        for _ in 0..RESTARTS {
            let next = place.start(&lab, &[&maps[..], &["--takeover"]].concat());
            ended(std::mem::replace(&mut daemon, next));
            gaps.push(gap(&daemon));
            arrived.flows_through(&daemon);
        }
    });
    print_gaps(gaps, sent, rate);
    // The counters went on too, and what the last one gives back is what the first found.
    let summary = daemon.stop();
    let port = summary.port("t0");
    assert_eq!((port.from_guest.in_frames, port.to_guest.in_frames), (sent[1], sent[0]));
    assert_eq!((port.from_guest.all_drops(), port.to_guest.all_drops()), (0, 0));
    assert_eq!(summary.to_wire.out_frames, sent[1]);
}

/// The same with two workers, a port on each, and ports that change theirs in between.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn every_frame_arrives_once_through_many_restarts_of_two_workers() {
    const RESTARTS: u32 = 60;
    let lab = Lab::new();
    let place = Place::new();
    let arguments = [&["--workers", "2", "--rebalance", "off"], &MAPS[..]].concat();
    let mut daemon = place.start(&lab, &arguments);
    let guests = [lab.raw_guest("t0"), lab.raw_guest("t1")];
    daemon.attached(&["t0", "t1"]);
    assert_eq!(place.client().workers(), [0, 1, 0]);
    let mut gaps = Vec::new();
    let both = [(&guests[0], VLAN), (&guests[1], OTHER)];
    let (sent, rate) = both_ways_twice(&lab, both, |arrived| {
        for round in 0..RESTARTS {
            if round % 3 == 1 {
                place.client().move_port("t0", round / 3 % 2);
                place.client().move_port("t1", (round / 3 + 1) % 2);
            }
            let before = place.client().workers();
            let next = place.start(&lab, &[&arguments[..], &["--takeover"]].concat());
            ended(std::mem::replace(&mut daemon, next));
            gaps.push(gap(&daemon));
            assert_eq!(place.client().workers(), before, "ports stay with their workers");
            arrived.into_iter().for_each(|flow| flow.flows_through(&daemon));
        }
    });
    print_gaps(gaps, sum(sent), rate);
    assert_counted(&daemon.stop(), [("t0", sent[0]), ("t1", sent[1])]);
}

/// As many workers go on as there were, whatever is asked for.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn another_number_of_workers_takes_a_start_of_its_own() {
    for (running, wanted, told) in [
        (1, "2", Some("going on with 1 worker, as many as")),
        (2, "1", Some("going on with 2 workers, as many as")),
        (2, "auto", None),
    ] {
        let lab = Lab::new();
        let place = Place::new();
        let count = running.to_string();
        let old = place.start(&lab, &[&["--workers", &count], &MAPS[..]].concat());
        let guests = [lab.raw_guest("t0"), lab.raw_guest("t1")];
        old.attached(&["t0", "t1"]);
        let oldest = Request::HandOver { format: 1, uplink: "up0".to_owned() };
        if running > 1 {
            // A version that knows one worker only would lose frames.
            let refusal = place.client().call(&oldest).unwrap_err().to_string();
            assert!(refusal.contains("OtherFormat"), "{refusal}");
        }
        let new = place.start(&lab, &[&["--takeover", "--workers", wanted], &MAPS[..]].concat());
        ended(old);
        assert_eq!(place.client().status().workers.len(), running, "{running} {wanted}");
        let said = new.stderr().into_iter().find(|line| line.contains("going on with"));
        assert_eq!(said.is_some(), told.is_some(), "{said:?}");
        assert!(said.unwrap_or_default().contains(told.unwrap_or_default()), "{wanted}");
        let wire = lab.wire();
        for (guest, tag) in guests.iter().zip([VLAN, OTHER]) {
            wire.send(&Frame::numbered(1).tags(&[tag]));
            assert_eq!(guest.receive_until(1).len(), 1, "{running} {wanted}");
        }
        new.stop();
    }
}

/// The uplink goes down under one process and comes up under the next: the kernel takes the
/// workers' sockets out of their group and puts them in again.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn the_uplink_may_be_down_while_workers_are_handed_over() {
    let lab = Lab::new();
    let place = Place::new();
    let arguments = [&["--workers", "2", "--rebalance", "off"], &MAPS[..]].concat();
    let old = place.start(&lab, &arguments);
    let guests = [lab.raw_guest("t0"), lab.raw_guest("t1")];
    old.attached(&["t0", "t1"]);
    let uplink = |state: &str| {
        lab.host.ip(&format!("link set up0 {state}"));
        eventually("it is told", || (place.client().status().uplink_state == state).then_some(()));
    };
    uplink("down");
    let new = place.start(&lab, &[&arguments[..], &["--takeover"]].concat());
    ended(old);
    uplink("up");
    let wire = lab.wire();
    for (guest, tag) in guests.iter().zip([VLAN, OTHER]) {
        wire.send(&Frame::numbered(1).tags(&[tag]));
        assert_eq!(guest.receive_until(1).len(), 1, "{tag:?}");
    }
    assert_eq!(new.stop().from_wire.all_drops(), 0);
}

/// The new configuration is put in force after the old one's rings were taken over.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_new_configuration_comes_with_the_new_process() {
    let lab = Lab::new();
    let place = Place::new();
    lab.host.ip("tuntap add found0 mode tap");
    let before = lab.host.ip("-d link show found0");
    let old = place.start(&lab, &["--map", "101=t0", "--map", "102=found0", "--tpid", "0x88a8"]);
    let control = place.control();
    let new = place.start(
        &lab,
        &[
            "--takeover",
            "--map",
            "103=t0,mode=access",
            "--map",
            "104=t2",
            "--map",
            "55=internal:leg0",
        ],
    );
    ended(old);
    let mut client = Client::connect(&control).unwrap();
    let ports = client.call(&Request::ListPorts {}).unwrap().read::<PortsReply>().unwrap().ports;
    let maps: Vec<String> = ports.into_iter().map(|port| port.map).collect();
    assert_eq!(maps, ["103=t0,mode=access", "104=t2", "55=internal:leg0"]);
    // What the first one found and the second does not want is as it was.
    lab::assert_same(&before, &lab.host.ip("-d link show found0"));
    let guest = lab.raw_guest("t0");
    new.attached(&["t0"]);
    lab.wire().send(&Frame::numbered(7).tags(&[tag(0x8100, 103)]));
    assert_eq!(guest.receive_until(7).len(), 1);
    // The metrics socket went along.
    assert!(place.folder.path().join("metrics").exists());
    new.stop();
    assert!(!control.exists() && !place.folder.path().join("metrics").exists());
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn without_anybody_there_it_is_a_start_like_any_other() {
    let lab = Lab::new();
    let place = Place::new();
    let daemon = place.start(&lab, &["--takeover", "--map", "101=t0"]);
    eventually("it is told", || {
        let lines = daemon.stderr();
        lines.iter().any(|line| line.contains("no vlanswitchd runs at")).then_some(())
    });
    daemon.stop();
}

/// The one that runs goes on as if nothing had been asked.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn who_cannot_go_on_leaves_the_other_in_peace() {
    let lab = Lab::new();
    let place = Place::new();
    let old = place.start(&lab, &["--map", "101=t0"]);
    let guest = lab.raw_guest("t0");
    old.attached(&["t0"]);
    let control = place.control().display().to_string();
    lab.host.ip("link add up1 type veth peer name far1");
    let refused = lab.failing_daemon(&[
        "--takeover",
        "--uplink",
        "up1",
        "--control",
        &control,
        "--map",
        "101=t0",
    ]);
    assert!(refused.stderr.contains("up0"), "{}", refused.stderr);
    // One that wants a format there is not.
    let wanted = Request::HandOver { format: 99, uplink: "up0".to_owned() };
    let refusal = place.client().call(&wanted).unwrap_err().to_string();
    assert!(refusal.contains("OtherFormat"), "{refusal}");
    // It is ended by who hears that: not if it has the wrong one.
    let wanted = Request::HandOver { format: 99, uplink: "up1".to_owned() };
    let refusal = place.client().call(&wanted).unwrap_err().to_string();
    assert!(refusal.contains("serves uplink up0"), "{refusal}");
    // One that is killed in the middle: it has asked and does not answer.
    {
        use std::io::Write;
        let mut stream = std::os::unix::net::UnixStream::connect(&control).unwrap();
        let call =
            r#"{"method":"org.vlanswitchd.HandOver","parameters":{"format":2,"uplink":"up0"}}"#;
        stream.write_all(call.as_bytes()).unwrap();
        stream.write_all(&[0]).unwrap();
    }
    let wire = lab.wire();
    wire.send(&Frame::numbered(1).tags(&[VLAN]));
    assert_eq!(guest.receive_until(1).len(), 1);
    // Its worker may be counting while the frame is here.
    eventually("the frame is counted", || {
        let stats = place.client().call(&Request::GetStats { interval: None }).unwrap();
        let stats = stats.read::<StatsReply>().unwrap().stats;
        (stats.ports[0].to_guest.out_frames == 1).then_some(())
    });
    old.stop();
}

/// What several workers have cannot go to everybody: who names the wrong uplink is refused
/// before that counts.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn the_wrong_uplink_leaves_a_switch_with_several_workers_in_peace() {
    let lab = Lab::new();
    let place = Place::new();
    let mut old = place.start(&lab, &["--workers", "2", "--map", "101=t0", "--map", "102=t1"]);
    let control = place.control().display().to_string();
    lab.host.ip("link add up1 type veth peer name far1");
    let arguments = ["--takeover", "--uplink", "up1", "--control", &control, "--map", "101=t0"];
    let refused = lab.failing_daemon(&arguments);
    assert!(refused.stderr.contains("serves uplink up0"), "{}", refused.stderr);
    assert!(old.ended().is_none() && place.control().exists());
    old.stop();
}

/// One that fails with the sockets of the other already in its hands leaves their files.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn who_fails_after_it_has_the_sockets_leaves_their_files() {
    let lab = Lab::new();
    let place = Place::new();
    let old = place.start(&lab, &["--map", "101=t0"]);
    let control = place.control().display().to_string();
    let blocked = place.folder.path().join("blocked");
    std::fs::write(&blocked, "mine").unwrap();
    let metrics = format!("unix:{}", blocked.display());
    let arguments = ["--takeover", "--uplink", "up0", "--control", &control, "--map", "101=t0"];
    for _ in 0..2 {
        let failed = lab.failing_daemon(&[&arguments[..], &["--metrics", &metrics]].concat());
        assert!(failed.stderr.contains("a file that is no socket is there"), "{}", failed.stderr);
        assert!(place.control().exists() && place.folder.path().join("metrics").exists());
    }
    let new = place.start(&lab, &["--takeover", "--map", "101=t0"]);
    ended(old);
    place.client().call(&Request::ListPorts {}).unwrap();
    new.stop();
    assert!(!place.control().exists() && !place.folder.path().join("metrics").exists());
}

/// A process of another version that cannot hand over is told to end.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn another_format_ends_in_a_start_without_the_rings() {
    another_version("org.varlink.service.MethodNotFound");
    another_version("org.vlanswitchd.OtherFormat");
}

/// One that knows an older format only, and is read nevertheless.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn an_older_version_is_asked_for_what_it_has() {
    let folder = TempDir::new().unwrap();
    let control = folder.path().join("control");
    let mut older = speaker(&control, "org.vlanswitchd.OtherFormat", 1);
    let lab = Lab::new();
    let control = control.to_str().unwrap();
    let arguments = ["--uplink", "up0", "--takeover", "--control", control, "--map", "101=t0"];
    let refused = lab.failing_daemon(&arguments);
    assert!(refused.stderr.contains("refuses: asked for 3, then for 1"), "{}", refused.stderr);
    assert!(older.try_wait().unwrap().is_none(), "it is left in peace");
    older.kill().unwrap();
    older.wait().unwrap();
}

/// Something that speaks varlink and answers so; SIGTERM ends it.
fn speaker(control: &Path, answer: &str, format: u32) -> std::process::Child {
    use std::io::Read;
    let mut other = std::process::Command::new("python3")
        .args(["-c", SPEAKER, control.to_str().unwrap(), answer, &format.to_string()])
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = [0; 6];
    other.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
    other
}

fn another_version(answer: &str) {
    let folder = TempDir::new().unwrap();
    let control = folder.path().join("control");
    let mut other = speaker(&control, answer, 99);
    let lab = Lab::new();
    let ending = std::thread::spawn(move || other.wait().unwrap());
    let daemon =
        lab.daemon(&["--takeover", "--control", control.to_str().unwrap(), "--map", "101=t0"]);
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&ending.join().unwrap()),
        Some(Signal::SIGTERM as i32)
    );
    eventually("it is told", || {
        let lines = daemon.stderr();
        lines.iter().any(|line| line.contains("cannot hand over")).then_some(())
    });
    daemon.stop();
}

const SPEAKER: &str = r#"
import json, socket, sys, time
s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()
print("ready", flush=True)
c, _ = s.accept()
hear = lambda: json.loads(c.recv(4096).rstrip(b"\0") or "null")
say = lambda error, **parameters: c.sendall(json.dumps({"error": error, "parameters": parameters}).encode() + b"\0")
first = hear()
say(sys.argv[2], method=first["method"], format=int(sys.argv[3]))
second = hear()
if second:
    asked = [call["parameters"]["format"] for call in (first, second)]
    say("org.vlanswitchd.Refused", message="asked for %d, then for %d" % tuple(asked))
time.sleep(60)
"#;

/// By then the other process has ended: its ports are better than none.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_configuration_that_cannot_be_put_in_force_leaves_the_ports_there_were() {
    let lab = Lab::new();
    let place = Place::new();
    let old = place.start(&lab, &["--map", "101=t0"]);
    let guest = lab.raw_guest("t0");
    old.attached(&["t0"]);
    let open = || tun_tap::Iface::without_packet_info("taken", tun_tap::Mode::Tap);
    let _owner = lab.host.enter(open).unwrap();
    let new = place.start(
        &lab,
        &["--takeover", "--map", "102=t0", "--map", "103=t1", "--map", "104=internal:taken"],
    );
    ended(old);
    let told = |line: &String| line.contains("still those of the vlanswitchd before: taken: ");
    eventually("it is told", || new.stderr().iter().any(told).then_some(()));
    let reply = place.client().call(&Request::ListPorts {}).unwrap();
    let ports = reply.read::<PortsReply>().unwrap().ports;
    assert_eq!(ports.into_iter().map(|port| port.map).collect::<Vec<_>>(), ["101=t0"]);
    assert!(lab.host.link("t1").is_none(), "t1 is left");
    lab.wire().send(&Frame::numbered(1).tags(&[VLAN]));
    assert_eq!(guest.receive_until(1).len(), 1);
    new.stop();
}
