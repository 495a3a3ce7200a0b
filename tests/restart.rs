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

use lab::both_ways::{assert_counted, both_ways, both_ways_twice, gap, print_gaps, sum};
use lab::frames::{Frame, TagBytes, tag};
use lab::raw::Held;
use lab::{Daemon, Lab, Manager, Wire, assert_same, eventually, in_time};
use nix::sys::signal::Signal;
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vlanswitchd::control::api::{PortsReply, Request, StatusReply};
use vlanswitchd::control::client::Client;
use vlanswitchd::sys::bpf::{Direction, detach_tc, is_attached_tc};

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

    fn control(&self) -> String {
        self.folder.path().join("control").display().to_string()
    }

    fn arguments<'a>(&'a self, control: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        [&["-v", "--control", control], more].concat()
    }

    /// The record of what devices were like, of `up0` in a lab's host.
    fn record(lab: &Lab) -> String {
        format!("up0-{}.found", lab.host.tool("stat", "-Lc %i /proc/self/ns/net").trim())
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
    // A service manager is told at once: what waiting adds would count as the gap.
    let status = in_time(Duration::from_micros(200), || daemon.ended()).expect("it ends");
    assert!(status.success(), "{status}: {:?}", daemon.stderr());
    daemon.stderr()
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
    let restarts = lab::scaled(100).max(5);
    let (lab, place, manager) = (Lab::new(), Place::new(), Manager::new());
    let control = place.control();
    let one = [&["--workers", "1"], &MAPS[..]].concat();
    let arguments = place.arguments(&control, &one);
    let mut daemon = Some(manager.start(&lab, &arguments));
    let guest = lab.raw_guest("t0");
    daemon.as_ref().unwrap().attached(&["t0"]);
    let mut gaps = Vec::new();
    let (sent, rate) = both_ways(&lab, &guest, VLAN, |arrived| {
        for _ in 0..restarts {
            stopped(daemon.take().unwrap());
            let next = daemon.insert(manager.start(&lab, &arguments));
            gaps.push(gap(next));
            eventually("all is the daemon's", || manager.stored().is_empty().then_some(()));
            arrived.flows_through(next);
        }
    });
    print_gaps(gaps, sent, rate);
    let summary = daemon.unwrap().settled();
    let port = summary.port("t0");
    assert_eq!((port.from_guest.in_frames, port.to_guest.in_frames), (sent[1], sent[0]));
    assert_eq!((port.from_guest.all_drops(), port.to_guest.all_drops()), (0, 0));
    assert_eq!(summary.to_wire.out_frames, sent[1]);
}

/// The same with two workers, a port on each, and ports that change theirs in between.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn every_frame_arrives_once_through_many_restarts_of_two_workers_by_the_store() {
    let restarts = lab::scaled(60).max(5) as u32;
    let (lab, place, manager) = (Lab::new(), Place::new(), Manager::new());
    let control = place.control();
    let two = [&["--workers", "2", "--rebalance", "off"], &MAPS[..]].concat();
    let arguments = place.arguments(&control, &two);
    let mut daemon = Some(manager.start(&lab, &arguments));
    let guests = [lab.raw_guest("t0"), lab.raw_guest("t1")];
    daemon.as_ref().unwrap().attached(&["t0", "t1"]);
    assert_eq!(workers(&control), [0, 1, 0]);
    let mut gaps = Vec::new();
    let both = [(&guests[0], VLAN), (&guests[1], OTHER)];
    let (sent, rate) = both_ways_twice(&lab, both, |arrived| {
        for round in 0..restarts {
            if round % 3 == 1 {
                move_port(&control, "t0", round / 3 % 2);
                move_port(&control, "t1", (round / 3 + 1) % 2);
            }
            let before = workers(&control);
            stopped(daemon.take().unwrap());
            let next = daemon.insert(manager.start(&lab, &arguments));
            gaps.push(gap(next));
            eventually("all is the daemon's", || manager.stored().is_empty().then_some(()));
            assert_eq!(workers(&control), before, "ports stay with their workers");
            arrived.into_iter().for_each(|flow| flow.flows_through(next));
        }
    });
    print_gaps(gaps, sum(sent), rate);
    assert_counted(&daemon.unwrap().settled(), [("t0", sent[0]), ("t1", sent[1])]);
}

/// The worker of each port.
fn workers(control: &str) -> Vec<u32> {
    let mut client = Client::connect(Path::new(control)).unwrap();
    let reply = client.call(&Request::ListPorts {}).unwrap();
    let ports = reply.read::<PortsReply>().unwrap().ports;
    ports.into_iter().map(|port| port.worker.unwrap()).collect()
}

fn move_port(control: &str, name: &str, worker: u32) {
    let mut client = Client::connect(Path::new(control)).unwrap();
    client.call(&Request::MovePort { name: name.to_owned(), worker }).unwrap();
}

/// As many workers go on as the store has rings for; one ring of no use costs the others of
/// the uplink, and no port.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn the_store_says_how_many_workers_go_on() {
    let (lab, place, manager) = (Lab::new(), Place::new(), Manager::new());
    let control = place.control();
    let with = |workers| [&["--workers", workers], &MAPS[..]].concat();
    let guests = [lab.raw_guest("t0"), lab.raw_guest("t1")];
    let wire = lab.wire();
    let forwards = |number| {
        for (guest, tag) in guests.iter().zip([VLAN, OTHER]) {
            wire.send(&Frame::numbered(number).tags(&[tag]));
            assert_eq!(guest.receive_until(number).len(), 1, "{tag:?}");
        }
    };
    let first = manager.start(&lab, &place.arguments(&control, &with("2")));
    first.attached(&["t0", "t1"]);
    forwards(1);
    stopped(first);
    let next = manager.start(&lab, &place.arguments(&control, &with("1")));
    next.says(&["going on with 2 workers, as many as the vlanswitchd before"]);
    assert_eq!(workers(&control), [0, 1, 0]);
    forwards(2);
    stopped(next);
    // The second socket on the uplink.
    drop(manager.take("vlanswitchd-3"));
    manager.put("vlanswitchd-3", File::open("/dev/null").unwrap());
    let last = manager.start(&lab, &place.arguments(&control, &with("2")));
    last.says(&["up0: cannot take over a packet socket"]);
    assert_eq!(workers(&control), [0, 1, 0]);
    forwards(4);
    assert_eq!(last.summary().port("t0").to_guest.out_frames, 3);
    stopped(last);
    // Without what was left: as many as asked for.
    manager.discard();
    let cold = manager.start(&lab, &place.arguments(&control, &with("1")));
    assert_eq!(workers(&control), [0, 0, 0]);
    stopped(cold);
}

/// `Type=notify-reload`: the manager sends SIGHUP and waits for both messages, the first one
/// with a time that is not before the signal.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_reload_is_told_to_the_manager_when_it_begins_and_when_it_ends() {
    let (lab, place, manager) = (Lab::new(), Place::new(), Manager::new());
    let control = place.control();
    let daemon = manager.start(&lab, &place.arguments(&control, &MAPS));
    for round in 1..=2 {
        let before = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
        daemon.signal(Signal::SIGHUP);
        eventually("it is told", || (manager.count("READY=1") == 1 + round).then_some(()));
        let told = manager.messages();
        let of_reload = |one: &&String| one.contains("RELOADING=1") || one.contains("READY=1");
        let told: Vec<&String> = told.iter().filter(of_reload).skip(2 * round - 1).collect();
        let [begun, ended] = told[..] else { panic!("{told:?}") };
        let time = begun.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC=")).unwrap();
        assert!(time.parse::<i64>().unwrap() >= before.num_microseconds(), "{begun}");
        assert_eq!(ended.trim(), "READY=1");
    }
    stopped(daemon);
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
    assert_eq!(place.files(), ["control".to_owned(), Place::record(&lab)]);
    manager.discard();
    // A start goes on with what it was like, and puts that back in the end.
    let daemon = manager.start(&lab, &arguments);
    daemon.says(&["counters start again"]);
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

/// Switches with one control path: several uplinks, of one name in several namespaces too.
/// None touches what another one's devices were like.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_second_switch_leaves_the_devices_of_the_first_alone() {
    let (lab, other, folder) = (Lab::new(), Lab::new(), TempDir::new().unwrap());
    // The default path, which may be in use on this machine.
    let script = format!(r#"mount --bind {} /run && exec "$0" "$@""#, folder.path().display());
    let wrapper = ["sh", "-ec", &script];
    let command = |lab: &Lab, arguments: &[&str]| {
        let mut command = lab.host.command_through(&wrapper, &lab::daemon::binary());
        command.args(arguments);
        command
    };
    for number in 1..=2 {
        lab.host.ip(&format!("link add up{number} type veth peer name far{number}"));
    }
    for (lab, found) in [(&lab, "found0"), (&lab, "found1"), (&other, "found0")] {
        lab.host.ip(&format!("tuntap add {found} mode tap"));
    }
    let arguments = |uplink, map| ["-v", "--uplink", uplink, "--map", map];
    let start =
        |lab: &Lab, uplink, map| Daemon::start_command(command(lab, &arguments(uplink, map)));
    let given_back = |lab: &Lab, uplink, map| {
        let arguments = [&arguments(uplink, map)[..], &["--give-back"]].concat();
        let done = command(lab, &arguments).output().unwrap();
        assert!(done.status.success(), "{done:?}");
        String::from_utf8(done.stdout).unwrap()
    };
    let first = start(&lab, "up0", "101=found0");
    let device = lab.host.link("found0").unwrap()["ifindex"].as_u64().unwrap() as u32;
    let running = || {
        let sealed = || is_attached_tc("vlansw_seal", device, Direction::Ingress).unwrap();
        assert!(lab.host.enter(sealed), "the seal is gone");
        let link = lab.host.link("found0").unwrap();
        ["mtu", "qdisc", "flags"].map(|key| link[key].to_string())
    };
    let before = running();
    for (lab, uplink, map) in [(&lab, "up1", "102=found1"), (&other, "up0", "101=found0")] {
        assert_eq!(
            given_back(lab, uplink, map),
            "0 devices given back
"
        );
        let mut second = start(lab, uplink, map);
        second.says(&["no control socket"]);
        assert!(!has_said(&second, "did not stop in order"), "{:?}", second.stderr());
        second.signal(Signal::SIGKILL);
        eventually("it is dead", || second.ended());
        let third = start(lab, uplink, map);
        third.says(&["did not stop in order"]);
        drop(third);
        // The port, and the uplink.
        assert_eq!(
            given_back(lab, uplink, map),
            "2 devices given back
"
        );
        assert_eq!(running(), before);
    }
    assert_eq!(
        given_back(&lab, "up2", "101=found0"),
        "0 devices given back
"
    );
    assert_eq!(running(), before);
    stopped(first);
    let left = std::fs::read_dir(folder.path().join("vlanswitchd")).unwrap().count();
    assert_eq!(left, 0, "files are left");
}

/// Whatever lies in the store: the start is one without it, and says why.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn what_cannot_be_used_is_removed_and_the_start_is_a_cold_one() {
    let (lab, place, manager) = (Lab::new(), Place::new(), Manager::new());
    let control = place.control();
    let arguments = place.arguments(&control, &["--workers", "1", "--map", "101=t0"]);
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
        daemon.says(&[why]);
        daemon.says(&["counters start again"]);
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
    daemon.says(&["t1: cannot take over a packet socket"]);
    assert_eq!(guest.receive_until(2).len(), 1, "it has waited in the ring");
    assert!(!has_said(&daemon, "counters start again"), "{:?}", daemon.stderr());
    let second = lab.raw_guest("t1");
    daemon.attached(&["t0", "t1"]);
    wire.send(&Frame::numbered(3).tags(&[tag(0x8100, 102)]));
    assert_eq!(second.receive_until(3).len(), 1);
    assert_eq!(daemon.summary().port("t0").to_guest.out_frames, 2);
}

/// Between two runs one port's device gets another name, and one loses its seal.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn names_and_seals_are_looked_at_before_a_port_goes_on() {
    let (lab, place, manager) = (Lab::new(), Place::new(), Manager::new());
    let control = place.control();
    for found in ["found0", "found1"] {
        lab.host.ip(&format!("tuntap add {found} mode tap"));
    }
    let before = lab.host.link("found1").unwrap()["mtu"].clone();
    let arguments =
        place.arguments(&control, &["--map", "101=t0", "--map", "102=found1", "--map", "103=t2"]);
    let daemon = manager.start(&lab, &arguments);
    let guest = lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    forwards(&lab, &guest, 1);
    let sealed = |tap| {
        let index = lab.host.index(tap);
        lab.host.enter(|| is_attached_tc("vlansw_seal", index, Direction::Ingress)).unwrap()
    };
    stopped(daemon);
    let index = lab.host.index("t2");
    let unseal = || detach_tc("vlansw_seal", index, Direction::Ingress).unwrap();
    assert!(lab.host.enter(unseal) && !sealed("t2"));
    // Another device has the name now.
    lab.host.ip("link set found1 down");
    lab.host.ip("link set found1 name other1");
    lab.host.ip("link set found0 name found1");
    let wire = lab.wire();
    wire.send(&Frame::numbered(2).tags(&[VLAN]));
    let daemon = manager.start(&lab, &arguments);
    assert_eq!(guest.receive_until(2).len(), 1, "it has waited in the ring");
    daemon.says(&["found1: it is called other1 now: starting without its ring"]);
    daemon.says(&["t2: something was taken from its tc hooks while no vlanswitchd ran"]);
    let (moved, reached) = (lab.raw_guest("found1"), lab.raw_guest("t2"));
    daemon.attached(&["t0", "found1", "t2"]);
    assert!(sealed("t2") && sealed("found1") && !sealed("other1"));
    assert_eq!(lab.host.link("other1").unwrap()["mtu"], before);
    for (guest, vid) in [(&moved, 102), (&reached, 103)] {
        wire.send(&Frame::numbered(3).tags(&[tag(0x8100, vid)]));
        assert_eq!(guest.receive_until(3).len(), 1);
    }
}

/// Without room in the store, or without one, a stop is a stop.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_store_too_small_is_told_and_everything_is_put_back() {
    let (lab, place) = (Lab::new(), Place::new());
    let mut manager = Manager::new();
    lab.host.ip("tuntap add found0 mode tap");
    let before = lab.host.snapshot();
    let control = place.control();
    let arguments = place.arguments(&control, &["--map", "101=found0"]);
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

const ETH_P_IP: u16 = 0x0800;

/// Killed under traffic: the VM keeps its tap, the host still does not hear it, and the next
/// start forwards, says what was lost, and puts back in the end what the first one found.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_killed_switch_leaves_vms_attached_and_sealed() {
    let (lab, place) = (Lab::new(), Place::new());
    lab.host.ip("tuntap add found0 mode tap");
    let control = place.control();
    let guests = [lab.raw_guest("t0"), lab.raw_guest("found0")];
    let settings = || {
        let link = lab.host.link("found0").unwrap();
        ["mtu", "qdisc", "flags"].map(|key| link[key].to_string())
    };
    let before = settings();
    for sandbox in ["on", "off"] {
        let maps = ["--map", "101=t0", "--map", "102=found0", "--sandbox", sandbox];
        let arguments = place.arguments(&control, &maps);
        let mut daemon = lab.daemon(&arguments);
        daemon.attached(&["t0", "found0"]);
        let for_the_host = lab::ip::udp(lab::ip::Version::V4, b"for the host?").reversed();
        let for_the_host = for_the_host.to([0xff; 6]);
        let stack = ["t0", "found0"].map(|tap| Wire::with_protocol(&lab.host, tap, ETH_P_IP));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for guest in &guests {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        guest.send(&for_the_host);
                    }
                });
            }
            daemon.until("frames flow", |now| now.to_wire.out_frames > 1000);
            daemon.signal(Signal::SIGKILL);
            eventually("it is dead", || daemon.ended());
            stop.store(true, Ordering::Relaxed);
        });
        // Its fd takes frames, and the device has its carrier.
        for (tap, guest) in ["t0", "found0"].into_iter().zip(&guests) {
            let before = lab.host.counter(tap, "rx_packets");
            guest.send(&for_the_host);
            assert_eq!(lab.host.counter(tap, "rx_packets"), before + 1, "{tap}");
            let flags = lab.host.link(tap).unwrap()["flags"].to_string();
            assert!(flags.contains("LOWER_UP"), "{tap}: {flags}");
        }
        let heard = stack.map(|stack| std::iter::from_fn(|| stack.try_receive()).count());
        assert_eq!(heard, [0, 0], "the host hears its guests");
        assert!(place.files().contains(&Place::record(&lab)));
        let next = lab.daemon(&arguments);
        println!("--sandbox {sandbox}: forwarding {:?} after the start", next.started_in);
        next.says(&["counters start again"]);
        next.attached(&["t0", "found0"]);
        for guest in &guests {
            guest.clear();
        }
        forwards(&lab, &guests[0], 7);
        assert_eq!(next.summary().port("t0").to_guest.out_frames, 1);
        stopped(next);
        assert_eq!(settings(), before);
        assert!(place.files().is_empty(), "{:?}", place.files());
    }
}

/// A namespace may have the number of one that is gone, where a switch was killed: what is
/// written of that one's devices says nothing of this one's.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn what_a_namespace_before_left_is_not_this_ones() {
    let (lab, place) = (Lab::new(), Place::new());
    let control = place.control();
    let arguments = place.arguments(&control, &["--map", "101=t0"]);
    let file = place.folder.path().join(Place::record(&lab));
    let mut daemon = lab.daemon(&arguments);
    let _guest = lab.raw_guest("t0");
    // Another namespace's; and one of a version that wrote none.
    for (of_another, is_read) in [(true, false), (false, true)] {
        daemon.attached(&["t0"]);
        daemon.signal(Signal::SIGKILL);
        eventually("it is dead", || daemon.ended());
        let mut found: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        let cookie = found["cookie"].as_u64().expect("a cookie, from Linux 5.14 on");
        found["cookie"] = of_another.then_some(cookie - 1).into();
        std::fs::write(&file, found.to_string()).unwrap();
        daemon = lab.daemon(&arguments);
        daemon.attached(&["t0"]);
        let told = daemon.stderr();
        let said = told.iter().any(|line| line.contains("counters start again"));
        assert_eq!(said, is_read, "{told:?}");
    }
    stopped(daemon);
    assert!(place.files().is_empty(), "{:?}", place.files());
}

/// A worker that does not go on: it is told within two seconds (five are let pass), and the
/// manager hears nothing until it does.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_stuck_worker_is_told_and_the_manager_hears_nothing() {
    let (lab, place) = (Lab::new(), Place::new());
    let mut manager = Manager::new();
    let watchdog = Duration::from_secs(3);
    manager.watchdog = Some(watchdog);
    let control = place.control();
    let arguments = place.arguments(&control, &["--workers", "1", "--map", "101=t0"]);
    let daemon = manager.start(&lab, &arguments);
    let status = || {
        let mut client = Client::connect(Path::new(&control)).unwrap();
        let reply = client.call(&Request::GetStatus {}).unwrap();
        reply.read::<StatusReply>().unwrap().status
    };
    let shown = || {
        let ctl = env!("CARGO_BIN_EXE_vlanswitchctl");
        let told = Command::new(ctl).args(["--socket", &control, "status"]).output().unwrap();
        String::from_utf8(told.stdout).unwrap()
    };
    eventually("it is well", || (manager.count("WATCHDOG=1") > 0).then_some(()));
    assert!(!status().workers[0].stuck);
    let held = Held::hold(worker_of(&daemon));
    let begin = Instant::now();
    daemon.says(&["the worker does not answer: no frame is being forwarded"]);
    let noticed = begin.elapsed();
    println!("a stuck worker was noticed after {noticed:?}");
    assert!(noticed < Duration::from_secs(5), "{noticed:?}");
    assert!(status().workers[0].stuck);
    let text = shown();
    assert!(text.contains("worker 0 does not answer"), "{text}");
    // systemd would have it restarted now.
    eventually("the watchdog's time is over", || (manager.unpinged_for() > watchdog).then_some(()));
    drop(held);
    daemon.says(&["the worker answers again"]);
    eventually("it is well again", || (manager.unpinged_for() < watchdog).then_some(()));
    assert!(!status().workers[0].stuck);
    let text = shown();
    assert!(!text.contains("does not answer"), "{text}");
}

/// The id of the thread that moves frames.
fn worker_of(daemon: &Daemon) -> i32 {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.id())).unwrap();
    let mut tasks = tasks.flatten().map(|task| task.path());
    let named =
        |path: &PathBuf| std::fs::read_to_string(path.join("comm")).unwrap().starts_with("worker");
    let path = tasks.find(named).expect("a worker");
    path.file_name().unwrap().to_str().unwrap().parse().unwrap()
}
