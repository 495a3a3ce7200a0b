//! Faults for real, under traffic: links flap and go, queues are full, memory,
//! descriptors and disks run out, news gets lost, the clock jumps. Each frame the test's
//! own sockets sent is accounted for, and it goes on afterwards.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::frames::{Frame, TagBytes, tag};
use lab::raw::{open_tap, set_persistent};
use lab::{Daemon, Failure, Lab, Namespace, RawGuest, Summary, Wire, eventually};
use nix::sys::signal::Signal;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, UNIX_EPOCH};
use tempfile::TempDir;
use vlanswitchd::control::api::{Port, PortReply, PortsReply, Request, StatsReply};
use vlanswitchd::control::client::{AnswerError, Client, ClientError};

const C101: TagBytes = tag(0x8100, 101);
const C102: TagBytes = tag(0x8100, 102);
/// Frames on their way at most, each way: no queue is full because a test's thread has
/// to wait for the processor.
const WINDOW: u64 = 200;
/// After how long those are taken for lost.
const GIVE_UP: Duration = Duration::from_millis(100);
/// Between two frames of a sender.
const PACE: Duration = Duration::from_micros(50);
/// A silence after which nothing more is on its way.
const SILENCE: Duration = Duration::from_millis(500);

/// Numbers of frames, as the test's sockets have it.
#[derive(Debug, Default)]
struct Tally {
    sent: AtomicU64,
    received: AtomicU64,
    /// The number of the last frame that was received.
    last: AtomicU64,
}

impl Tally {
    fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }
}

/// What passed one port, each way.
#[derive(Debug, Default)]
struct Traffic {
    /// From its guest to the wire.
    up: Tally,
    /// From the wire to its guest.
    down: Tally,
}

/// Sends and receives paced, numbered frames of this length through a port both ways,
/// while `body` runs and until silence; each is checked to arrive once and in order.
/// What a device refuses was not sent.
fn traffic(
    wire: &Wire,
    guest: &RawGuest,
    vlan: TagBytes,
    length: usize,
    body: impl FnOnce(&Traffic),
) -> Traffic {
    let traffic = Traffic::default();
    let stop = AtomicBool::new(false);
    let numbered = |number| Frame::numbered(number).untagged_length(length);
    let send = |tally: &Tally, try_send: &dyn Fn(u64) -> bool| {
        let mut given_up = 0;
        let mut patience = Instant::now() + GIVE_UP;
        while !stop.load(Ordering::Relaxed) {
            let known = given_up.max(tally.last.load(Ordering::Relaxed));
            if tally.sent() < known + WINDOW {
                patience = Instant::now() + GIVE_UP;
            } else if Instant::now() < patience {
                std::thread::sleep(PACE);
                continue;
            } else {
                given_up = tally.sent();
            }
            // The number is used up, arrived or not: order can still be told.
            if try_send(tally.sent() + 1) {
                tally.sent.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(PACE);
        }
    };
    let receive = |tally: &Tally, next: &dyn Fn(Duration) -> Option<Vec<u8>>, tags: &[TagBytes]| {
        let mut last = 0;
        loop {
            let over = stop.load(Ordering::Relaxed);
            match next(SILENCE) {
                Some(bytes) => {
                    let frame = Frame::read(&bytes);
                    if frame.tags.first().map(|tag| tag.vid) != tags.first().map(|tag| tag.vid) {
                        continue;
                    }
                    assert!(frame.number() > last, "{} after {last}", frame.number());
                    last = frame.number();
                    tally.last.store(last, Ordering::Relaxed);
                    tally.received.fetch_add(1, Ordering::Relaxed);
                }
                None if over => break,
                None => {}
            }
        }
    };
    /// Also when `body` panics: a scope waits for its threads.
    struct Stop<'s>(&'s AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        let stopping = Stop(&stop);
        scope.spawn(|| {
            send(&traffic.up, &|n| guest.try_send(&numbered(n).reversed().bytes()).is_ok());
        });
        scope.spawn(|| {
            send(&traffic.down, &|n| wire.try_send(&numbered(n).tags(&[vlan]).bytes()).is_ok());
        });
        scope.spawn(|| receive(&traffic.up, &|patience| wire.receive_within(patience), &[vlan]));
        scope.spawn(|| receive(&traffic.down, &|patience| guest.receive_within(patience), &[]));
        eventually("traffic both ways", || {
            (traffic.up.received() > 100 && traffic.down.received() > 100).then_some(())
        });
        body(&traffic);
        drop(stopping);
    });
    traffic
}

/// Waits until this many more frames have arrived each way.
fn more(traffic: &Traffic, frames: u64) {
    let (up, down) = (traffic.up.received(), traffic.down.received());
    eventually("it forwards again", || {
        let arrived = traffic.up.received() >= up + frames;
        (arrived && traffic.down.received() >= down + frames).then_some(())
    });
}

fn uplink(daemon: &Daemon, wanted: &str) {
    daemon.until(&format!("the uplink is {wanted}"), |summary| summary.uplink_state == wanted);
}

fn state(daemon: &Daemon, port: &str, wanted: &str) {
    daemon.until(&format!("{port} is {wanted}"), |summary| summary.port(port).state == wanted);
}

/// One frame each way arrives.
fn assert_forwards(wire: &Wire, guest: &RawGuest, vlan: TagBytes) {
    wire.clear();
    guest.clear();
    wire.send(&Frame::numbered(501).tags(&[vlan]));
    assert_eq!(guest.receive_until(501).last(), Some(&Frame::numbered(501)));
    guest.send(&Frame::numbered(502).reversed());
    let up = wire.receive_until(502);
    assert_eq!(up.last(), Some(&Frame::numbered(502).reversed().tags(&[vlan])));
}

/// Traffic both ways while `set` takes the uplink away and brings it back, this many times:
/// what the ends saw, what was sent on the far end of the cable, and what the switch counted.
fn traffic_while_it_flaps(times: u32, set: impl Fn(&Lab, &str)) -> (Traffic, u64, Summary) {
    let lab = Lab::new();
    let daemon = lab.daemon(&["--map", "101=t0"]);
    let guest = lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    let wire = lab.wire();
    let traffic = traffic(&wire, &guest, C101, 60, |traffic| {
        for _ in 0..times {
            set(&lab, "down");
            daemon.until("not up", |summary| summary.uplink_state != "up");
            set(&lab, "up");
            uplink(&daemon, "up");
            more(traffic, 50);
        }
    });
    let on_the_cable = lab.far.counter("far0", "tx_packets");
    (traffic, on_the_cable, daemon.stop())
}

/// The cable is pulled and put back while frames flow: what the switch counted is what
/// the sockets at both ends saw.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn the_uplinks_carrier_flaps() {
    let pull = |lab: &Lab, state: &str| drop(lab.far.ip(&format!("link set far0 {state}")));
    let (traffic, on_the_cable, summary) = traffic_while_it_flaps(10, pull);
    let port = summary.port("t0");
    assert_eq!(summary.from_wire.in_frames, on_the_cable, "{traffic:?}");
    assert_eq!(port.from_guest.in_frames, traffic.up.sent(), "{port:?}");
    assert_eq!(port.to_guest.out_frames, traffic.down.received(), "{port:?}");
    assert!(port.from_guest.dropped("uplink_down") > 0, "{port:?}");
    assert!(summary.to_wire.out_frames >= traffic.up.received(), "{traffic:?} {summary:?}");
}

/// The uplink is set down and up while a guest sends. The kernel takes some frames with a
/// success while it goes down; the device's own counter has them.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn what_the_uplink_loses_as_it_goes_down_is_told() {
    let set = |lab: &Lab, state: &str| drop(lab.host.ip(&format!("link set up0 {state}")));
    let (traffic, _, summary) = traffic_while_it_flaps(40, set);
    let (sent, port) = (summary.to_wire.out_frames, summary.port("t0"));
    assert_eq!(port.from_guest.in_frames, traffic.up.sent(), "{port:?}");
    let arrived = traffic.up.received();
    println!("{} lost by the uplink, {} told", sent.abs_diff(arrived), summary.unsent);
    assert!((arrived..=arrived + summary.unsent).contains(&sent), "{traffic:?} {summary:?}");
}

/// The uplink's driver is loaded anew: the device goes and another comes by its name.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn the_uplink_is_deleted_and_made_anew() {
    let lab = Lab::new();
    let daemon = lab.daemon(&["--map", "101=t0"]);
    let guest = lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    let (mut up, mut down, mut arrived) = ([0, 0], [0, 0], 0);
    for round in 0..5 {
        let wire = lab.wire();
        let traffic = traffic(&wire, &guest, C101, 60, |traffic| {
            if round < 4 {
                // The wire's socket goes with its device; the guest sends on.
                lab.host.ip("link del up0");
                uplink(&daemon, "absent");
                let sent = traffic.up.sent();
                eventually("the guest sends on", || (traffic.up.sent() > sent + 500).then_some(()));
            }
        });
        up = [up[0] + traffic.up.sent(), up[1] + traffic.up.received()];
        down = [down[0] + traffic.down.sent(), down[1] + traffic.down.received()];
        if round < 4 {
            arrived = daemon.summary().from_wire.in_frames;
            lab.plug_uplink();
            uplink(&daemon, "up");
        }
    }
    let summary = daemon.stop();
    let port = summary.port("t0");
    assert!(summary.from_wire.in_frames > arrived && arrived > 0, "{summary:?}");
    assert!(summary.from_wire.in_frames <= down[0], "{summary:?}");
    assert_eq!(port.from_guest.in_frames, up[0], "{port:?}");
    assert_eq!(port.to_guest.out_frames, down[1], "{port:?}");
    assert!(summary.to_wire.out_frames >= up[1], "{summary:?}");
    assert!(port.from_guest.dropped("uplink_down") >= 4 * 500, "{port:?}");
}

/// Full-size frames while the uplink's MTU becomes too small and large enough again:
/// every one arrives or is `too_long`.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn the_uplinks_mtu_changes() {
    let lab = Lab::new();
    let daemon = lab.daemon(&["--map", "101=t0"]);
    let guest = lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    let wire = lab.wire();
    let too_long = |summary: &Summary| summary.port("t0").from_guest.dropped("too_long");
    let traffic = traffic(&wire, &guest, C101, 1514, |traffic| {
        for mtu in [1499, 1500, 1400, 9000, 1280, 1500] {
            let before = too_long(&daemon.summary());
            lab.host.ip(&format!("link set up0 mtu {mtu}"));
            if mtu < 1500 {
                daemon.until("frames are too long", |summary| too_long(summary) > before + 20);
            } else {
                more(traffic, 100);
                // Those under way at the change are counted by now.
                let settled = too_long(&daemon.summary());
                more(traffic, 100);
                assert_eq!(too_long(&daemon.summary()), settled, "mtu {mtu}");
            }
        }
    });
    let on_the_cable = lab.far.counter("far0", "tx_packets");
    let summary = daemon.stop();
    let port = summary.port("t0");
    assert_eq!(summary.from_wire.in_frames, on_the_cable, "{traffic:?}");
    assert_eq!(port.from_guest.in_frames, traffic.up.sent(), "{port:?}");
    assert_eq!(port.from_guest.out_frames, traffic.up.received(), "{port:?}");
    assert_eq!(port.from_guest.all_drops(), too_long(&summary), "{port:?}");
    assert_eq!(port.to_guest.out_frames, traffic.down.received(), "{port:?}");
}

/// A tap is deleted under a flood for its guest, again and again: the flood is accounted
/// for, and the port beside it loses nothing.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_tap_is_deleted_during_a_burst() {
    let lab = Lab::new();
    let daemon = lab.daemon(&["--map", "101=t0", "--map", "102=t1"]);
    let other = lab.raw_guest("t1");
    daemon.attached(&["t1"]);
    let wire = lab.wire();
    let flooding = lab.wire();
    let flood = Frame::numbered(1).tags(&[C101]).bytes();
    let stop = AtomicBool::new(false);
    let traffic = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for _ in 0..100 {
                    let _ = flooding.try_send(&flood);
                }
                std::thread::sleep(Duration::from_micros(500));
            }
        });
        let traffic = traffic(&wire, &other, C102, 60, |traffic| {
            for round in 0..10 {
                let guest = lab.raw_guest("t0");
                daemon.attached(&["t0"]);
                eventually("the flood reaches the guest", || {
                    guest.receive_within(Duration::ZERO).map(drop)
                });
                lab.host.ip("link del t0");
                drop(guest);
                state(&daemon, "t0", "absent");
                more(traffic, 20);
                if round < 9 {
                    lab.host.ip("tuntap add dev t0 mode tap vnet_hdr");
                }
            }
        });
        stop.store(true, Ordering::Relaxed);
        traffic
    });
    let on_the_cable = lab.far.counter("far0", "tx_packets");
    daemon.until("all has come in", |summary| summary.from_wire.in_frames >= on_the_cable);
    let summary = daemon.stop();
    assert_eq!(summary.from_wire.in_frames, on_the_cable);
    let port = summary.port("t0");
    assert!(port.to_guest.dropped("guest_absent") > 0, "{port:?}");
    assert!(port.to_guest.out_frames > 0, "{port:?}");
    let beside = summary.port("t1");
    assert_eq!(beside.from_guest.in_frames, traffic.up.sent(), "{beside:?}");
    assert_eq!(beside.from_guest.out_frames, traffic.up.received(), "{beside:?}");
    assert_eq!(beside.to_guest.out_frames, traffic.down.received(), "{beside:?}");
    assert_eq!(beside.to_guest.all_drops() + beside.from_guest.all_drops(), 0, "{beside:?}");
}

/// The uplink's queue is full for real: a shaper takes a hundredth of what the guest
/// sends. What it refuses is counted, what it took arrives.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn the_uplinks_queue_is_full() {
    const FRAMES: u64 = 20_000;
    let lab = Lab::new();
    lab.host.tc("qdisc add dev up0 root tbf rate 20mbit burst 3000 limit 30000");
    let daemon = lab.daemon(&["--map", "101=t0"]);
    let guest = lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    let wire = lab.wire();
    for number in 1..=FRAMES {
        guest.send(&Frame::numbered(number).untagged_length(1000).reversed());
    }
    let all = |summary: &Summary| summary.port("t0").from_guest.in_frames == FRAMES;
    let out = daemon.until("all have come in", all).to_wire.out_frames;
    let (mut received, mut last) = (0, 0);
    while let Some(bytes) = wire.receive_within(SILENCE) {
        let number = Frame::read(&bytes).number();
        assert!(number > last, "{number} after {last}");
        (received, last) = (received + 1, number);
    }
    assert_eq!(received, out);
    let summary = daemon.stop();
    let flow = &summary.port("t0").from_guest;
    let full = flow.dropped("uplink_queue_full");
    assert!(full > FRAMES / 10, "{flow:?}");
    assert_eq!(full + flow.dropped("ring_overrun") + received, FRAMES, "{flow:?}");
}

/// A queueing discipline that takes frames with a success and drops them: nobody tells the
/// sender, the uplink's counter says it, on both paths and to the process that takes over.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn what_the_uplinks_queue_swallows_is_told() {
    const FRAMES: u64 = 100;
    for datapath in ["packet", "kernel"] {
        let lab = Lab::new();
        let folder = TempDir::new().unwrap();
        let control = folder.path().join("control").display().to_string();
        let arguments = ["--datapath", datapath, "--control", &control, "--map", "101=t0"];
        let daemon = lab.daemon(&arguments);
        let guest = lab.raw_guest("t0");
        daemon.attached(&["t0"]);
        lab.host.tc("qdisc replace dev up0 root blackhole");
        let send = |daemon: &Daemon, sum: u64| {
            (0..FRAMES).for_each(|number| guest.send(&Frame::numbered(number).reversed()));
            let summary = daemon.until("all are told", |now| now.unsent >= sum);
            // The host's own frames may be among them.
            assert!(summary.unsent < sum + 20, "{datapath}: {summary:?}");
        };
        send(&daemon, FRAMES);
        let mut old = daemon;
        let next = lab.daemon(&[&arguments[..], &["--takeover"]].concat());
        eventually("the old process ends", || old.ended());
        send(&next, 2 * FRAMES);
        lab.host.tc("qdisc delete dev up0 root");
        let summary = next.stop();
        assert!(summary.unsent >= 2 * FRAMES, "{datapath}: {summary:?}");
    }
}

/// A daemon with a control socket, started through a wrapper.
struct Switch {
    daemon: Daemon,
    folder: TempDir,
}

impl Switch {
    fn start(lab: &Lab, wrapper: &[&str], arguments: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let control = folder.path().join("control").display().to_string();
        let mut all = vec!["--uplink", "up0", "--log-format", "json", "--control", &control];
        all.extend(arguments);
        let daemon = Daemon::start_program(&lab.host, wrapper, &lab::daemon::binary(), &all);
        Self { daemon, folder }
    }

    fn control(&self) -> std::path::PathBuf {
        self.folder.path().join("control")
    }

    fn client(&self) -> Client {
        Client::connect(&self.control()).unwrap()
    }

    fn open_files(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.daemon.id())).unwrap().count()
    }
}

fn add(client: &mut Client, map: &str) -> Result<Port, ClientError> {
    let request = Request::AddPort { map: map.to_owned(), persist: None };
    client.call(&request).map(|reply| reply.read::<PortReply>().unwrap().port)
}

fn maps(client: &mut Client) -> Vec<String> {
    let reply = client.call(&Request::ListPorts {}).unwrap();
    reply.read::<PortsReply>().unwrap().ports.into_iter().map(|port| port.map).collect()
}

/// What the daemon said when it failed at something.
fn failure<T: std::fmt::Debug>(result: Result<T, ClientError>) -> String {
    match result {
        Err(ClientError::Answer(AnswerError::Failed(message) | AnswerError::Refused(message))) => {
            message
        }
        other => panic!("not an answer that it failed: {other:?}"),
    }
}

/// File descriptors run out: what needs one is refused with a word about the cure,
/// nothing is half done, frames flow; with descriptors again, all of it works.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn no_file_descriptors_left() {
    let lab = Lab::new();
    // For five ports: three each, and 64 beside.
    let limit = ["prlimit", "--nofile=79:79"];
    let switch = Switch::start(&lab, &limit, &["--map", "101=t0", "--map", "102=late,create=no"]);
    let guest = lab.raw_guest("t0");
    switch.daemon.attached(&["t0"]);
    let wire = lab.wire();
    let mut caller = switch.client();
    assert_eq!(maps(&mut caller), ["101=t0", "102=late,create=no"]);
    let before = switch.open_files();
    // Callers until one is not let in.
    let mut callers = Vec::new();
    let full = |switch: &Switch| switch.open_files() >= 79;
    while !full(&switch) {
        assert!(callers.len() < 64, "it has {} files open", switch.open_files());
        let files = switch.open_files();
        callers.push(std::os::unix::net::UnixStream::connect(switch.control()).unwrap());
        eventually("the caller is let in", || (switch.open_files() > files).then_some(()));
    }
    let outside = std::os::unix::net::UnixStream::connect(switch.control()).unwrap();

    let said = failure(add(&mut caller, "103=t3"));
    assert!(said.contains("t3") && said.contains("open files"), "{said}");
    assert_eq!(maps(&mut caller), ["101=t0", "102=late,create=no"]);
    assert!(lab.host.link("t3").is_none(), "t3 is left");
    assert_forwards(&wire, &guest, C101);
    // A device that appears now cannot be taken: later it is.
    let late = lab.host.enter(|| open_tap("late", 0, 0)).unwrap();
    set_persistent(&late, true).unwrap();
    let told = |daemon: &Daemon| {
        let lines = daemon.stderr();
        lines.iter().filter(|line| line.contains("late: cannot")).count()
    };
    eventually("it says that it cannot", || (told(&switch.daemon) > 0).then_some(()));
    assert_forwards(&wire, &guest, C101);
    assert_eq!(switch.daemon.summary().port("late").state, "absent");

    drop(callers);
    drop(outside);
    switch.daemon.attached(&["late"]);
    assert_eq!(told(&switch.daemon), 1, "it says so once: {:?}", switch.daemon.stderr());
    assert_eq!(add(&mut caller, "103=t3").unwrap().name, "t3");
    // Those that gave up waiting are gone; a caller like any other is served.
    assert_eq!(maps(&mut switch.client()).len(), 3);
    // For the two ports: their sockets and the handles to their counts.
    eventually("nothing is left open", || (switch.open_files() <= before + 6).then_some(()));
    assert_forwards(&wire, &guest, C101);
    // The limit itself is known before anything is tried.
    for vid in [104, 105] {
        add(&mut caller, &format!("{vid}=t{vid}")).unwrap();
    }
    let said = failure(add(&mut caller, "106=t6"));
    assert!(said.contains("LimitNOFILE") || said.contains("ulimit -n"), "{said}");
    assert!(lab.host.link("t6").is_none(), "t6 is left");
    switch.daemon.stop();
}

/// Memory for a ring is refused: the port is not added, and everything else is as it
/// was; with memory it is added.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn no_memory_for_a_ring() {
    let lab = Lab::new();
    let switch = Switch::start(&lab, &[], &["--map", "101=t0"]);
    let guest = lab.raw_guest("t0");
    switch.daemon.attached(&["t0"]);
    let wire = lab.wire();
    let mut caller = switch.client();
    // Once for real, so that whatever is allocated once is there.
    add(&mut caller, "102=t2").unwrap();
    let files = switch.open_files();
    let limit = |bytes: &str| {
        let id = switch.daemon.id().to_string();
        let set = Command::new("prlimit").args(["--pid", &id, &format!("--as={bytes}:")]).status();
        assert!(set.unwrap().success());
    };
    let status = fs::read_to_string(format!("/proc/{}/status", switch.daemon.id())).unwrap();
    let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
    let size: u64 = size.split_whitespace().next().unwrap().parse::<u64>().unwrap() << 10;
    // A thread's stack fits, a ring of 4 MiB does not.
    limit(&(size + (3 << 20)).to_string());
    let said = failure(add(&mut caller, "103=t3"));
    assert!(said.contains("t3") && said.contains("memory"), "{said}");
    assert_eq!(maps(&mut caller), ["101=t0", "102=t2"]);
    assert!(lab.host.link("t3").is_none(), "t3 is left");
    assert_eq!(switch.open_files(), files);
    assert_forwards(&wire, &guest, C101);
    limit("unlimited");
    add(&mut caller, "103=t3").unwrap();
    let added = lab.raw_guest("t3");
    switch.daemon.attached(&["t3"]);
    assert_forwards(&wire, &added, tag(0x8100, 103));
    switch.daemon.stop();
}

/// What `/proc/net/netlink` says a process's sockets have lost.
fn netlink_drops(host: &Namespace, process: u32) -> u64 {
    let table = host.enter(|| fs::read_to_string("/proc/thread-self/net/netlink")).unwrap();
    let inodes: Vec<String> = fs::read_dir(format!("/proc/{process}/fd"))
        .unwrap()
        .flatten()
        .filter_map(|fd| fs::read_link(fd.path()).ok())
        .filter_map(|link| {
            let link = link.display().to_string();
            Some(link.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
        })
        .collect();
    // sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode
    let lines = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
    let ours = lines.filter(|columns| inodes.iter().any(|inode| inode == columns[9]));
    ours.map(|columns| columns[8].parse::<u64>().unwrap()).sum()
}

/// So much happens to the devices while the daemon does not listen that the kernel
/// gives up telling: it lists them anew and is right about each.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn netlinks_news_is_lost() {
    let lab = Lab::new();
    lab.host.ip("tuntap add dev noise mode tap");
    let maps: Vec<String> = (1..=5).map(|vid| format!("10{vid}=t{vid},create=no")).collect();
    let arguments: Vec<&str> = maps.iter().flat_map(|map| ["--map", map]).collect();
    let daemon = lab.daemon(&arguments);
    let mut guests: Vec<Option<RawGuest>> = (1..=4)
        .map(|number| {
            lab.host.ip(&format!("tuntap add dev t{number} mode tap vnet_hdr"));
            Some(lab.raw_guest(&format!("t{number}")))
        })
        .collect();
    daemon.attached(&["t1", "t2", "t3", "t4"]);
    let old_wire = lab.wire();
    assert_forwards(&old_wire, guests[0].as_ref().unwrap(), C101);

    daemon.signal(Signal::SIGSTOP);
    let noise: String =
        (0..12_000).map(|number| format!("link set noise mtu {}\n", 1000 + number % 2)).collect();
    let folder = TempDir::new().unwrap();
    let batch = folder.path().join("noise");
    fs::write(&batch, noise).unwrap();
    lab.host.ip(&format!("-batch {}", batch.display()));
    // t1: another device by its name. t2: down. t3: gone. t4: renamed to t5. The uplink:
    // made anew.
    lab.host.ip("link del t1");
    drop(guests[0].take());
    lab.host.ip("tuntap add dev t1 mode tap vnet_hdr");
    lab.host.ip("link set t1 up");
    guests[0] = Some(lab.raw_guest("t1"));
    lab.host.ip("link set t2 down");
    lab.host.ip("link del t3");
    drop(guests[2].take());
    lab.host.ip("link set t4 down");
    lab.host.ip("link set t4 name t5");
    lab.host.ip("link set t5 up");
    lab.host.ip("link del up0");
    lab.plug_uplink();
    assert!(netlink_drops(&lab.host, daemon.id()) > 0, "nothing was lost: this shows nothing");
    daemon.signal(Signal::SIGCONT);

    daemon.attached(&["t1", "t5"]);
    uplink(&daemon, "up");
    state(&daemon, "t2", "down");
    state(&daemon, "t3", "absent");
    state(&daemon, "t4", "absent");
    let wire = lab.wire();
    assert_forwards(&wire, guests[0].as_ref().unwrap(), C101);
    assert_forwards(&wire, guests[3].as_ref().unwrap(), tag(0x8100, 105));
    // And the next news is heard.
    lab.host.ip("link set t2 up");
    daemon.attached(&["t2"]);
    assert_forwards(&wire, guests[1].as_ref().unwrap(), C102);
    daemon.stop();
}

/// A library that makes the time of day jump by ten years, forth and back, each time it
/// is read.
const JUMPING_CLOCK: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>
static int (*real)(clockid_t, struct timespec *);
static int calls;
__attribute__((constructor)) static void begin(void) {
    real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
}
int clock_gettime(clockid_t clock, struct timespec *time) {
    int result = real(clock, time);
    if (clock == CLOCK_REALTIME && result == 0)
        time->tv_sec += (__atomic_fetch_add(&calls, 1, __ATOMIC_RELAXED) % 2 ? 1 : -1) * 315360000L;
    return result;
}
"#;

/// A Landlock that has no memory left, for the control thread.
const NO_LANDLOCK: &str = r#"
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sys/syscall.h>
long syscall(long number, long a, long b, long c, long d, long e, long f) {
    long (*real)(long, ...) = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    if (number == SYS_landlock_restrict_self && real(SYS_gettid) == real(SYS_getpid)) {
        errno = ENOMEM;
        return -1;
    }
    return real(number, a, b, c, d, e, f);
}
"#;

/// A library of these functions in place of the C library's: what `env` is to be told.
fn preloaded(folder: &TempDir, source: &str) -> String {
    let (file, library) = (folder.path().join("put.c"), folder.path().join("put.so"));
    fs::write(&file, source).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&file).arg("-ldl");
    assert!(compiler.status().unwrap().success());
    format!("LD_PRELOAD={}", library.display())
}

/// The last step of a start fails: everything is as it was, and nothing says that a switch
/// was killed.
#[test]
#[ignore = "needs root: makes network namespaces; cc"]
fn a_start_that_cannot_be_confined_leaves_nothing() {
    let lab = Lab::new();
    let folder = TempDir::new().unwrap();
    let preload = preloaded(&folder, NO_LANDLOCK);
    lab.host.ip("tuntap add found0 mode tap");
    let before = lab.host.snapshot();
    let sockets = TempDir::new().unwrap();
    let control = sockets.path().join("control").display().to_string();
    let maps = ["--map", "101=found0", "--map", "102=new0"];
    let arguments = [&["--uplink", "up0", "--control", &control], &maps[..]].concat();
    let wrapper = ["env", preload.as_str()];
    let failure = Failure::of_program(&lab.host, &wrapper, &lab::daemon::binary(), &arguments);
    assert_eq!(failure.code, Some(1), "{failure:?}");
    lab::assert_same(&before, &lab.host.snapshot());
    assert_eq!(fs::read_dir(sockets.path()).unwrap().count(), 0, "files are left");
}

/// Timestamps of the frames in a pcapng file, in the order of the file.
fn timestamps(file: &Path) -> Vec<u64> {
    let bytes = fs::read(file).unwrap();
    let word = |at: usize| u64::from(u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap()));
    let (mut at, mut found) = (0, Vec::new());
    while at + 12 <= bytes.len() {
        if word(at) == 6 {
            found.push(word(at + 12) << 32 | word(at + 16));
        }
        at += word(at + 4) as usize;
    }
    assert_eq!(at, bytes.len(), "{} ends within a block", file.display());
    found
}

fn ctl(switch: &Switch) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vlanswitchctl"));
    command.arg("--socket").arg(switch.control());
    command
}

/// How far the switch's clock is off, in milliseconds.
fn clock_error(switch: &Switch) -> u64 {
    let reply = switch.client().call(&Request::GetStats { interval: None }).unwrap();
    let now = UNIX_EPOCH.elapsed().unwrap().as_millis() as u64;
    reply.read::<StatsReply>().unwrap().stats.time.abs_diff(now)
}

/// The time of day is no measure of anything: a switch whose clock jumps by years
/// forwards, polices, counts and captures as ever.
#[test]
#[ignore = "needs root: makes network namespaces; cc"]
fn the_clock_jumps() {
    let lab = Lab::new();
    let folder = TempDir::new().unwrap();
    let preload = preloaded(&folder, JUMPING_CLOCK);
    let arguments = ["--map", "101=t0", "--map", "102=t1,rate=1M,burst=80000"];
    let switch = Switch::start(&lab, &["env", &preload], &arguments);
    let guests = ["t0", "t1"].map(|tap| lab.raw_guest(tap));
    switch.daemon.attached(&["t0", "t1"]);
    // Ten years off, one way or the other.
    let decade = 315_360_000_000;
    let error = clock_error(&switch);
    assert!(error.abs_diff(decade) < 60_000, "the clock has not jumped: {error} ms");
    let started = |switch: &Switch| {
        let reply = switch.client().call(&Request::GetStatus {}).unwrap();
        reply.read::<vlanswitchd::control::api::StatusReply>().unwrap().status.captures
    };
    let wire = lab.wire();
    let file = folder.path().join("frames.pcapng");
    let mut capture = ctl(&switch).args(["capture", "-w"]).arg(&file).spawn().unwrap();
    eventually("the capture is under way", || (started(&switch) == 1).then_some(()));
    let begin = Instant::now();
    let traffic = traffic(&wire, &guests[0], C101, 60, |traffic| {
        // One Mbit/s, for as long as it takes: 80 kB at once, and 125 kB a second.
        while begin.elapsed() < Duration::from_secs(1) {
            guests[1].send(&Frame::numbered(1).untagged_length(1000).reversed());
            std::thread::sleep(Duration::from_micros(500));
        }
        more(traffic, 1000);
    });
    let seconds = begin.elapsed().as_secs_f64();
    let stop = nix::unistd::Pid::from_raw(capture.id() as i32);
    nix::sys::signal::kill(stop, Signal::SIGINT).unwrap();
    assert!(capture.wait().unwrap().success());
    let times = timestamps(&file);
    assert!(times.len() > 1000, "{} frames", times.len());
    assert!(times.is_sorted(), "time goes back in the capture");
    assert!(times[times.len() - 1] - times[0] < 60_000_000_000, "{times:?}");
    let top = ctl(&switch).args(["status"]).output().unwrap();
    assert!(top.status.success(), "{top:?}");
    let summary = switch.daemon.stop();
    let (free, held) = (summary.port("t0"), summary.port("t1"));
    assert_eq!(free.from_guest.in_frames, traffic.up.sent());
    assert_eq!(free.from_guest.out_frames, traffic.up.received());
    assert_eq!(free.to_guest.out_frames, traffic.down.received());
    let passed = held.from_guest.out_bytes as f64;
    assert!(held.from_guest.dropped("rate_limited") > 0, "{held:?}");
    assert!((80_000.0..=82_000.0 + 125_000.0 * seconds).contains(&passed), "{passed} {seconds}");
}

/// The disk is full: `capture -w` says so and ends, what it has written is a whole
/// file, and the switch does not care.
#[test]
#[ignore = "needs root: makes network namespaces, and mounts in a namespace of its own"]
fn the_disk_is_full_for_a_capture() {
    let lab = Lab::new();
    let switch = Switch::start(&lab, &[], &["--map", "101=t0"]);
    let guest = lab.raw_guest("t0");
    switch.daemon.attached(&["t0"]);
    let wire = lab.wire();
    let (disk, kept) = (switch.folder.path().join("disk"), switch.folder.path().join("kept"));
    fs::create_dir(&disk).unwrap();
    // The mount goes with the shell's namespace; the file is copied out before.
    let script = "mount -t tmpfs -o size=64k full \"$1\" || exit 99; \
                  \"$2\" --socket \"$3\" capture -w \"$1/frames.pcapng\"; code=$?; \
                  cp \"$1/frames.pcapng\" \"$4\" || exit 98; exit $code";
    let child = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script, "sh"])
        .arg(&disk)
        .arg(env!("CARGO_BIN_EXE_vlanswitchctl"))
        .arg(switch.control())
        .arg(&kept)
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut captured = None;
    let traffic = traffic(&wire, &guest, C101, 600, |traffic| {
        captured = Some(child.wait_with_output().unwrap());
        more(traffic, 100);
    });
    let captured = captured.unwrap();
    let said = String::from_utf8_lossy(&captured.stderr);
    assert_eq!(captured.status.code(), Some(1), "{said}");
    assert!(said.contains("frames.pcapng") && said.contains("No space left"), "{said}");
    let size = fs::metadata(&kept).unwrap().len();
    assert!((32 << 10..=64 << 10).contains(&size), "{size}");
    let seen = lab::tshark::tshark(&kept);
    assert_eq!(seen.len(), timestamps(&kept).len());
    assert!(said.contains(&format!("captured {} frames", seen.len())), "{} in {said}", seen.len());
    let summary = switch.daemon.stop();
    let port = summary.port("t0");
    assert_eq!(port.from_guest.out_frames, traffic.up.received(), "{port:?}");
    assert_eq!(port.to_guest.out_frames, traffic.down.received(), "{port:?}");
    assert_eq!(port.from_guest.all_drops() + port.to_guest.all_drops(), 0, "{port:?}");
}
