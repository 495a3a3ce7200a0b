//! Restarts under a service manager that keeps descriptors, and after a crash: every frame
//! arrives once, or what is lost is told; VMs stay attached and sealed; what was found is put
//! back one day.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::both_ways::{both_ways, gap, print_gaps};
use lab::frames::{Frame, TagBytes, tag};
use lab::{Daemon, Failure, Lab, Manager, assert_same, eventually};
use nix::sys::signal::Signal;
use std::fs::File;
use std::time::Instant;
use tempfile::TempDir;
use vlanswitchd::control::api::{Request, StatusReply};
use vlanswitchd::control::client::Client;

const VLAN: TagBytes = tag(0x8100, 101);
const MAPS: [&str; 6] =
    ["--map", "101=t0", "--map", "102=t1,mode=access", "--map", "55=internal:leg0"];

struct Place {
    folder: TempDir,
}

impl Place {
    fn new() -> Self {
        Self { folder: TempDir::new().unwrap() }
    }

    fn control(&self) -> String {
        self.folder.path().join("control").display().to_string()
    }

    fn arguments<'a>(&'a self, control: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        [&["-v", "--control", control], more].concat()
    }

    fn files(&self) -> Vec<String> {
        let files = std::fs::read_dir(self.folder.path()).unwrap();
        let name = |file: std::fs::DirEntry| file.file_name().to_string_lossy().into_owned();
        let mut names: Vec<String> = files.flatten().map(name).collect();
        names.sort();
        names
    }
}

/// Tells it to stop, and waits.
fn stopped(mut daemon: Daemon) -> Vec<String> {
    daemon.signal(Signal::SIGTERM);
    let status = eventually("it ends", || daemon.ended());
    assert!(status.success(), "{status}: {:?}", daemon.stderr());
    daemon.stderr()
}

fn says(daemon: &Daemon, text: &str) {
    eventually(&format!("it says {text:?}"), || {
        daemon.stderr().iter().any(|line| line.contains(text)).then_some(())
    });
}

fn has_said(daemon: &Daemon, text: &str) -> bool {
    daemon.stderr().iter().any(|line| line.contains(text))
}

/// A frame each way through t0.
fn forwards(lab: &Lab, guest: &lab::RawGuest, number: u64) {
    let wire = lab.wire();
    wire.send(&Frame::numbered(number).tags(&[VLAN]));
    assert_eq!(guest.receive_until(number).len(), 1);
    guest.send(&Frame::numbered(number).reversed());
    eventually("the guest's frame is on the wire", || {
        let frame = Frame::read(&wire.receive_within(std::time::Duration::from_millis(100))?);
        (frame.number() == number && frame.tags == [VLAN]).then_some(())
    });
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn every_frame_arrives_once_through_many_restarts_by_the_store() {
    const RESTARTS: usize = 100;
    let (lab, place, manager) = (Lab::new(), Place::new(), Manager::new());
    let control = place.control();
    let arguments = place.arguments(&control, &MAPS);
    let mut daemon = Some(manager.start(&lab, &arguments));
    let guest = lab.raw_guest("t0");
    daemon.as_ref().unwrap().attached(&["t0"]);
    let mut gaps = Vec::new();
    let (sent, rate) = both_ways(&lab, &guest, VLAN, |arrived| {
        for _ in 0..RESTARTS {
            stopped(daemon.take().unwrap());
            let next = daemon.insert(manager.start(&lab, &arguments));
            gaps.push(gap(next));
            eventually("all is the daemon's", || manager.stored().is_empty().then_some(()));
            arrived.flows();
        }
    });
    print_gaps(gaps, sent, rate);
    let summary = daemon.unwrap().settled();
    let port = summary.port("t0");
    assert_eq!((port.from_guest.in_frames, port.to_guest.in_frames), (sent[1], sent[0]));
    assert_eq!((port.from_guest.all_drops(), port.to_guest.all_drops()), (0, 0));
    assert_eq!(summary.to_wire.out_frames, sent[1]);
}

/// The manager drops what it keeps when it is told to stop the service for good.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn what_the_manager_has_dropped_is_put_back_by_who_is_asked_to() {
    let (lab, place, manager) = (Lab::new(), Place::new(), Manager::new());
    lab.host.ip("tuntap add found0 mode tap");
    let before = lab.host.snapshot();
    let control = place.control();
    let arguments = place.arguments(&control, &["--map", "101=found0"]);
    let give_back =
        ["--uplink", "up0", "--control", &control, "--map", "101=found0", "--give-back"];
    let daemon = manager.start(&lab, &arguments);
    let refused = lab.failing_daemon(&give_back);
    assert!(refused.stderr.contains("another vlanswitchd serves it"), "{}", refused.stderr);
    stopped(daemon);
    assert_ne!(before, lab.host.snapshot(), "nothing is put back between two runs");
    assert_eq!(place.files(), ["control", "control.found"]);
    manager.discard();
    // A start goes on with what it was like, and puts that back in the end.
    let daemon = manager.start(&lab, &arguments);
    says(&daemon, "counters start again");
    stopped(daemon);
    manager.discard();
    let done = lab.host.command(&lab::daemon::binary()).args(give_back).output().unwrap();
    assert!(done.status.success(), "{done:?}");
    // The port, and the uplink.
    assert_eq!(String::from_utf8_lossy(&done.stdout), "2 devices given back\n");
    assert_same(&before, &lab.host.snapshot());
    assert_eq!(place.files(), ["control"]);
    let done = lab.host.command(&lab::daemon::binary()).args(give_back).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&done.stdout), "0 devices given back\n");
}

/// Whatever lies in the store: the start is one without it, and says why.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn what_cannot_be_used_is_removed_and_the_start_is_a_cold_one() {
    let (lab, place, manager) = (Lab::new(), Place::new(), Manager::new());
    let control = place.control();
    let arguments = place.arguments(&control, &["--map", "101=t0"]);
    let guest = lab.raw_guest("t0");
    let memory = |text: &str, sealed: bool| {
        use nix::fcntl::{FcntlArg, SealFlag, fcntl};
        use nix::sys::memfd::{MFdFlags, memfd_create};
        use std::io::Write;
        let mut file = File::from(memfd_create("x", MFdFlags::MFD_ALLOW_SEALING).unwrap());
        file.write_all(text.as_bytes()).unwrap();
        if sealed {
            fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::all())).unwrap();
        }
        file
    };
    let null = || File::open("/dev/null").unwrap();
    let state = "vlanswitchd-state";
    let faults: [(&str, &dyn Fn()); 7] = [
        ("nothing says what it is", &|| drop(manager.take(state))),
        ("died while it left it", &|| {
            drop(manager.take(state));
            manager.put(state, memory("{", false));
        }),
        ("it cannot be read", &|| {
            drop(manager.take(state));
            manager.put(state, memory("{", true));
        }),
        ("it has format 99, and this version reads", &|| {
            drop(manager.take(state));
            manager.put(state, memory(r#"{"format":99,"anything":[]}"#, true));
        }),
        ("of 4 descriptors there are 3", &|| drop(manager.take("vlanswitchd-3"))),
        ("the claim to the uplink is not among it", &|| {
            drop(manager.take("vlanswitchd-1"));
            manager.put("vlanswitchd-1", null());
        }),
        ("control is no socket", &|| {
            drop(manager.take("vlanswitchd-0"));
            manager.put("vlanswitchd-0", null());
        }),
    ];
    for (number, (why, spoil)) in faults.into_iter().enumerate() {
        let daemon = manager.start(&lab, &arguments);
        assert!(!has_said(&daemon, "cannot be used"), "{:?}", daemon.stderr());
        stopped(daemon);
        spoil();
        manager.put("somebody-elses", null());
        let daemon = manager.start(&lab, &arguments);
        says(&daemon, why);
        says(&daemon, "counters start again");
        eventually("the store is empty", || manager.stored().is_empty().then_some(()));
        daemon.attached(&["t0"]);
        forwards(&lab, &guest, number as u64 + 1);
        assert_eq!(daemon.summary().port("t0").from_guest.in_frames, 1);
        stopped(daemon);
        manager.discard();
    }
}

/// One port's socket is of no use: that port starts cold, the others go on.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_device_that_is_another_now_costs_the_others_nothing() {
    let (lab, place, manager) = (Lab::new(), Place::new(), Manager::new());
    let control = place.control();
    let arguments = place.arguments(&control, &["--map", "101=t0", "--map", "102=t1"]);
    let daemon = manager.start(&lab, &arguments);
    let guest = lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    forwards(&lab, &guest, 1);
    stopped(daemon);
    lab.host.ip("link delete t1");
    manager.put("foreign", File::open("/dev/null").unwrap());
    let wire = lab.wire();
    wire.send(&Frame::numbered(2).tags(&[VLAN]));
    let daemon = manager.start(&lab, &arguments);
    says(&daemon, "t1: cannot take over a packet socket");
    assert_eq!(guest.receive_until(2).len(), 1, "it has waited in the ring");
    assert!(!has_said(&daemon, "counters start again"), "{:?}", daemon.stderr());
    let second = lab.raw_guest("t1");
    daemon.attached(&["t0", "t1"]);
    wire.send(&Frame::numbered(3).tags(&[tag(0x8100, 102)]));
    assert_eq!(second.receive_until(3).len(), 1);
    assert_eq!(daemon.summary().port("t0").to_guest.out_frames, 2);
}

/// Without room in the store, or without one, a stop is a stop.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_store_too_small_is_told_and_everything_is_put_back() {
    let (lab, place) = (Lab::new(), Place::new());
    let mut manager = Manager::new();
    let before = lab.host.snapshot();
    let control = place.control();
    lab.host.ip("tuntap add found0 mode tap");
    let arguments = place.arguments(&control, &["--map", "101=found0"]);
    let before = {
        drop(before);
        lab.host.snapshot()
    };
    for (room, told) in [(Some(3), true), (Some(0), false), (None, false)] {
        manager.room = room;
        let lines = stopped(manager.start(&lab, &arguments));
        let said = lines.iter().any(|line| line.contains("raise FileDescriptorStoreMax="));
        assert_eq!(said, told, "{lines:?}");
        assert_same(&before, &lab.host.snapshot());
        assert!(manager.stored().is_empty() && place.files().is_empty(), "{:?}", place.files());
    }
    // A systemd that does not say that it has one.
    let daemon = manager.start(&lab, &[&arguments[..], &["--fd-store"]].concat());
    stopped(daemon);
    assert!(manager.stored().contains(&"vlanswitchd-state".to_owned()));
}
