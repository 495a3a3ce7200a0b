//! The kernel path: it outlives its daemon, ports move between it and the packet path with
//! each frame passed on once, and it forwards, drops and counts as the packet path does.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::both_ways::{both_ways, each_once};
use lab::daemon::binary;
use lab::frames::{Frame, TagBytes, tag};
use lab::{Daemon, Flow, Lab, Summary, Wire, eventually, kernel_is_at_least};
use nix::sys::signal::Signal;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vlanswitchd::control::api::{
    CaptureRequest, Change, Port, PortReply, PortsReply, Request, StatusReply,
};
use vlanswitchd::control::client::Client;
use vlanswitchd::dataplane::kernel::DISPATCHER_NAME;
use vlanswitchd::sys::bpf::{Direction, detach_tc, is_attached_tc, tcx};

const VLAN: TagBytes = tag(0x8100, 101);

/// A host whose daemons see the machine's mounts: pins are found again.
struct Bench {
    lab: Lab,
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self { lab: Lab::new(), folder: TempDir::new().unwrap() }
    }

    fn control(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.lab.host.name()))
            .args(["setpriv", "--pdeathsig", "KILL", &binary(), "--uplink", "up0"])
            .args(["--log-format", "json", "--workers", "1", "-v", "--control"])
            .arg(self.control())
            .args(arguments);
        command
    }

    fn start(&self, arguments: &[&str]) -> Daemon {
        Daemon::start_command(self.command(arguments))
    }

    fn client(&self) -> Client {
        Client::connect(&self.control()).unwrap()
    }

    fn port(&self, name: &str) -> Port {
        let reply = self.client().call(&Request::ListPorts {}).unwrap();
        let ports = reply.read::<PortsReply>().unwrap().ports;
        ports.into_iter().find(|port| port.name == name).expect("a port of that name")
    }

    fn set(&self, name: &str, key: &str, value: &str) -> Port {
        let changes = vec![Change { key: key.to_owned(), value: value.to_owned() }];
        let request = Request::SetPort { name: name.to_owned(), changes, persist: None };
        self.client().call(&request).unwrap().read::<PortReply>().unwrap().port
    }

    fn index(&self, device: &str) -> u32 {
        self.lab.host.link(device).unwrap()["ifindex"].as_u64().unwrap() as u32
    }

    fn pins(&self) -> PathBuf {
        let inode = self.lab.host.tool("stat", "-Lc %i /proc/self/ns/net");
        Path::new("/sys/fs/bpf/vlanswitchd").join(format!("up0-{}", inode.trim()))
    }

    fn has_dispatcher(&self) -> bool {
        let index = self.index("up0");
        self.lab.host.enter(|| is_attached_tc(DISPATCHER_NAME, index, Direction::Ingress).unwrap())
    }

    /// Waits until `port show` says this of a port's path.
    fn until_reason(&self, port: &str, word: &str) {
        eventually(&format!("{port}: {word}"), || {
            self.port(port).datapath_reason?.contains(word).then_some(())
        });
    }

    /// A veth takes what XDP redirects to it when its other end polls.
    fn let_uplink_take_redirected(&self) {
        self.lab.far.tool("ethtool", "-K far0 gro on");
    }

    /// Whether a driver's XDP hook has a program.
    fn has_xdp(&self, device: &str) -> bool {
        self.lab.host.link(device).unwrap()["xdp"]["mode"] == 1
    }

    fn give_back(&self) {
        let output = self.command(&["--give-back"]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let pins = self.pins();
        for pin in std::fs::read_dir(&pins).into_iter().flatten().flatten() {
            let _ = std::fs::remove_file(pin.path());
        }
        let _ = std::fs::remove_dir(pins);
    }
}

fn ended(mut daemon: Daemon, signal: Signal) -> Vec<String> {
    daemon.signal(signal);
    eventually("it ends", || daemon.ended());
    daemon.stderr()
}

/// Kills the daemon, stops it, or has another take over, by turns; another runs then.
fn restart(
    bench: &Bench,
    daemon: &mut Option<Daemon>,
    arguments: &[&str],
    round: usize,
    while_nobody_is_there: impl FnOnce(),
) {
    let signal = match round % 3 {
        0 => Signal::SIGKILL,
        1 => Signal::SIGTERM,
        _ => {
            let after = bench.start(&[arguments, &["--takeover"]].concat());
            let mut before = daemon.replace(after).unwrap();
            eventually("the one before ends", || before.ended());
            return;
        }
    };
    ended(daemon.take().unwrap(), signal);
    while_nobody_is_there();
    *daemon = Some(bench.start(arguments));
}

/// Neither a crash nor a restart costs a frame, and counts go on.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn frames_flow_whatever_becomes_of_the_daemon() {
    let restarts = lab::scaled(24).max(6) as usize;
    let bench = Bench::new();
    let arguments = ["--map", "101=t0", "--map", "102=t1", "--datapath", "kernel"];
    let mut daemon = Some(bench.start(&arguments));
    let guest = bench.lab.raw_guest("t0");
    daemon.as_ref().unwrap().attached(&["t0"]);
    let (sent, rate) = both_ways(&bench.lab, &guest, VLAN, |arrived| {
        for round in 0..restarts {
            restart(&bench, &mut daemon, &arguments, round, || arrived.flows());
            arrived.flows();
        }
    });
    println!("{sent:?} frames, {rate:.0} a second, during {restarts} restarts");
    let port = bench.port("t0");
    let counted = [port.to_guest.out_frames, port.from_guest.out_frames];
    assert_eq!(counted, sent, "counted, over all processes");
    let log = ended(daemon.unwrap(), Signal::SIGTERM).join("\n");
    assert!(log.contains("goes on forwarding") && log.contains("--give-back"), "{log}");
    assert!(bench.has_dispatcher() && bench.pins().exists());

    // Only when told to it ends, and guests stay sealed.
    bench.give_back();
    assert!(!bench.has_dispatcher(), "the dispatcher is gone");
    assert!(!bench.pins().exists(), "the pins are gone");
    let host = Wire::with_protocol(&bench.lab.host, "t0", 0x88b5);
    let wire = bench.lab.wire();
    guest.send(&Frame::numbered(1));
    assert_eq!(wire.receive_within(Duration::from_millis(200)), None);
    assert_eq!(host.receive_within(Duration::from_millis(50)), None, "sealed");
}

/// A limit, or a capture, brings a port to the packet path; without it, it goes back.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_port_changes_its_path_and_each_frame_arrives_once() {
    let bench = Bench::new();
    let daemon = bench.start(&["--map", "101=t0", "--datapath", "auto"]);
    assert_eq!(daemon.greeting, "forwarding: uplink up0, 1 port, datapath kernel");
    let guest = bench.lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    assert_eq!(bench.port("t0").datapath_reason, None);
    let sent = each_once(&bench.lab, &guest, VLAN, |_| {
        for _ in 0..10 {
            let port = bench.set("t0", "rate", "100G");
            assert_eq!(port.datapath, "packet");
            assert!(port.datapath_reason.unwrap().contains("rate="));
            assert_eq!(bench.set("t0", "rate", "").datapath, "kernel");
        }
        let mut capture = bench.client();
        let wanted = CaptureRequest { port: Some("t0".to_owned()), ..CaptureRequest::default() };
        capture.start(&Request::Capture(wanted)).unwrap();
        eventually("the packet path serves it", || {
            let port = bench.port("t0");
            (port.datapath_reason?.contains("captured") && port.from_guest.out_frames > 0)
                .then_some(())
        });
        for _ in 0..20 {
            capture.next(Some(lab::PATIENCE)).unwrap();
        }
        drop(capture);
        eventually("the kernel path serves it again", || {
            (bench.port("t0").datapath == "kernel").then_some(())
        });
    });
    assert!(sent.iter().all(|frames| *frames > 1000), "{sent:?} frames are no traffic");
    let port = bench.port("t0");
    assert_eq!([port.to_guest.out_frames, port.from_guest.out_frames], sent, "on both paths");
    let more = each_once(&bench.lab, &guest, VLAN, |_| {
        bench.client().call(&Request::Detach {}).unwrap();
    });
    assert!(!bench.has_dispatcher() && bench.port("t0").datapath == "packet");
    let port = bench.port("t0");
    let both = [sent[0] + more[0], sent[1] + more[1]];
    assert_eq!([port.to_guest.out_frames, port.from_guest.out_frames], both, "detached");
    let wire = bench.lab.wire();
    for number in 0..10 {
        wire.send(&Frame::numbered(number).tags(&[tag(0x8100, 999)]));
    }
    daemon.until("frames of a VLAN nobody mapped are counted", |summary| {
        summary.unmapped.get(&(0x8100, 999)) == Some(&10)
    });
    let summary = daemon.summary();
    summary.assert_conserved();
    assert_eq!(summary.port("t0").from_guest.all_drops(), 0);
    ended(daemon, Signal::SIGTERM);
    bench.give_back();
}

/// What programs cannot do is done by the packet path, beside them, and `status` says why.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn ports_that_programs_cannot_serve_are_served_by_packets() {
    let bench = Bench::new();
    let maps = [
        ("101=t0", "kernel", ""),
        ("102=t1,rate=1G", "packet", "rate="),
        ("0=t2", "packet", "without a VLAN"),
        ("7=t3,tpid=0x9100", "packet", "0x9100"),
        ("8=internal:leg0", "packet", "internal"),
        ("9.1=t4,storm=100", "packet", "storm="),
        ("9.2=t5", "packet", "outer VLAN"),
        ("10.2=t6,mac=52:54:00:12:34:56", "kernel", ""),
    ];
    let arguments: Vec<&str> = maps.iter().flat_map(|(map, ..)| ["--map", map]).collect();
    let daemon = bench.start(&[&arguments[..], &["--datapath", "auto"]].concat());
    assert_eq!(daemon.greeting, "forwarding: uplink up0, 8 ports, datapath kernel and packet");
    for (map, path, reason) in maps {
        let name = map.split(['=', ',']).nth(1).unwrap().replace("internal:", "");
        let port = bench.port(&name);
        assert_eq!(port.datapath, path, "{map}: {:?}", port.datapath_reason);
        assert!(port.datapath_reason.unwrap_or_default().contains(reason), "{map}");
    }
    let status = bench.client().call(&Request::GetStatus {}).unwrap();
    assert_eq!(status.read::<StatusReply>().unwrap().status.datapath, "kernel and packet");
    ended(daemon, Signal::SIGTERM);
    bench.give_back();

    let refused = bench.command(&["--map", "102=t1,rate=1G", "--datapath", "kernel"]).output();
    let refused = refused.unwrap();
    let text = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{text}");
    for word in ["--datapath kernel", "t1", "rate=", "auto"] {
        assert!(text.contains(word), "{text}: no {word}");
    }
}

/// Somebody takes the dispatcher away, the uplink goes and comes back, its MTU changes.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn the_uplink_is_looked_after() {
    let bench = Bench::new();
    let daemon = bench.start(&["--map", "101=t0", "--datapath", "kernel"]);
    let guest = bench.lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    let passes = |number: u64| {
        let wire = bench.lab.wire();
        eventually("frames pass both ways", || {
            guest.send(&Frame::numbered(number).reversed());
            wire.send(&Frame::numbered(number).tags(&[VLAN]));
            let patience = Duration::from_millis(50);
            let up = wire.receive_within(patience)?;
            let down = guest.receive_within(patience)?;
            let numbers = [up, down].map(|bytes| Frame::read(&bytes).number());
            (numbers == [number; 2]).then_some(())
        });
    };
    passes(1);
    let index = bench.index("up0");
    bench.lab.host.enter(|| detach_tc(DISPATCHER_NAME, index, Direction::Ingress).unwrap());
    eventually("the dispatcher is back", || bench.has_dispatcher().then_some(()));
    eventually("it is told", || {
        daemon.stderr().iter().any(|line| line.contains("attached again")).then_some(())
    });
    passes(2);

    // A guest's own, which is its seal too.
    let index = bench.index("t0");
    bench.lab.host.enter(|| detach_tc("vlansw_seal", index, Direction::Ingress).unwrap());
    eventually("it is told", || {
        daemon.stderr().iter().any(|line| line.contains("sealed again")).then_some(())
    });
    passes(20);

    bench.lab.host.ip("link delete up0");
    eventually("it is told", || {
        daemon.stderr().iter().any(|line| line.contains("up0: gone")).then_some(())
    });
    guest.send(&Frame::numbered(3).reversed());
    daemon.until("a frame was dropped as uplink_down", |summary| {
        summary.port("t0").from_guest.dropped("uplink_down") > 0
    });
    bench.lab.plug_uplink();
    passes(4);

    let wire = bench.lab.wire();
    let long = Frame::numbered(5).untagged_length(1600).reversed();
    guest.send(&long);
    daemon.until("too long", |summary| summary.port("t0").from_guest.dropped("too_long") == 1);
    bench.lab.host.ip("link set up0 mtu 1600");
    eventually("the longer frame passes", || {
        guest.send(&long);
        let got = wire.receive_within(Duration::from_millis(50))?;
        (Frame::read(&got).number() == 5).then_some(())
    });
    daemon.summary().assert_conserved();
    ended(daemon, Signal::SIGTERM);
    bench.give_back();
}

/// The ports of the comparison: each mode, with all that changes what becomes of a frame.
const PORTS: [(&str, &str); 9] = [
    ("tunnel", "101=tunnel"),
    ("copy", "102=copy,pcp=copy"),
    ("access", "103=access,mode=access"),
    ("accessp", "104=accessp,mode=access,pcp=5"),
    ("trunk", "110-112,120=trunk"),
    ("native", "130-133=native,native=131,pcp=3"),
    ("pair", "140.20=pair"),
    ("paira", "140.21=paira,mode=access,inner-tpid=0x88a8"),
    ("strict", "150=strict,mac=52:54:00:ab:cd:ef"),
];
/// Frames in the comparison.
const FRAMES: usize = 3000;

/// What a frame of the comparison is, but for its number.
#[derive(Debug, Clone)]
struct Sent {
    /// From this guest, or from the wire.
    guest: Option<usize>,
    tags: Vec<TagBytes>,
    length: usize,
    source: bool,
}

/// Tags that belong to somebody, under the switch's own TPID, or nearly so.
fn known_tags(own: u16) -> impl Strategy<Value = Vec<TagBytes>> {
    let stacks: [Vec<(u16, u16)>; 16] = [
        vec![(own, 101)],
        vec![(own, 102)],
        vec![(own, 103)],
        vec![(own, 104)],
        vec![(own, 110)],
        vec![(own, 113)],
        vec![(own, 120)],
        vec![(own, 130)],
        vec![(own, 131)],
        vec![(own, 140), (0x8100, 20)],
        vec![(own, 140), (0x88a8, 21)],
        vec![(own, 140), (0x88a8, 20)],
        vec![(own, 140)],
        vec![(own, 150)],
        vec![(own, 999)],
        vec![(own, 0)],
    ];
    proptest::sample::select(stacks.to_vec())
        .prop_map(|stack| stack.iter().map(|(tpid, vid)| tag(*tpid, *vid)).collect())
}

fn any_tags() -> impl Strategy<Value = Vec<TagBytes>> {
    let tpid = proptest::sample::select(vec![0x8100u16, 0x8100, 0x88a8, 0x9100, 0x9200]);
    let vid = proptest::sample::select(vec![0u16, 0, 1, 20, 101, 103, 110, 115, 131, 140, 4094]);
    let one = (tpid, vid).prop_map(|(tpid, vid)| tag(tpid, vid));
    proptest::collection::vec(one, 0..4)
}

fn any_frame(own: u16) -> impl Strategy<Value = Sent> {
    let known = (known_tags(own), any_tags()).prop_map(|(mut tags, more)| {
        tags.extend(more.into_iter().take(1));
        tags
    });
    let tags = proptest::prop_oneof![known_tags(own), known, any_tags()];
    let tags = (tags, 0..16u8).prop_map(|(mut tags, priority)| {
        if let Some(first) = tags.first_mut() {
            *first = first.priority(priority);
        }
        tags
    });
    let guest = proptest::option::weighted(0.5, 0..PORTS.len());
    (guest, tags, 60..1500usize, proptest::bool::weighted(0.9))
        .prop_map(|(guest, tags, length, source)| Sent { guest, tags, length, source })
}

/// What came of them: by receiver, in order, and what was counted.
#[derive(Debug, PartialEq)]
struct Outcome {
    received: BTreeMap<String, Vec<Vec<u8>>>,
    counted: BTreeMap<String, (Flow, Flow)>,
    unmapped: BTreeMap<(u16, u16), u64>,
}

/// By `express`, as the kernel path does it for guests without offloads.
fn outcome(datapath: &str, express: bool, frames: &[Sent], tpid: &str) -> Outcome {
    let bench = Bench::new();
    let option = if express { ",offload=off" } else { "" };
    if express {
        bench.let_uplink_take_redirected();
    }
    let maps = PORTS.map(|(_, map)| format!("{map}{option}"));
    let arguments: Vec<&str> = maps.iter().flat_map(|map| ["--map", map]).collect();
    let daemon = bench.start(
        &[&arguments[..], &["--tpid", tpid, "--set-uplink-mtu", "--datapath", datapath]].concat(),
    );
    assert!(daemon.greeting.ends_with(&format!("datapath {datapath}")), "{}", daemon.greeting);
    let guests = PORTS.map(|(name, _)| bench.lab.raw_guest(name));
    daemon.attached(&PORTS.map(|(name, _)| name));
    if express {
        for (name, _) in PORTS {
            // Trunks without a native VLAN drop what XDP would take.
            let word = if name == "trunk" { "no frame without a tag" } else { "XDP sends" };
            bench.until_reason(name, word);
        }
    }
    let wire = bench.lab.wire();
    let received = Mutex::new(BTreeMap::<String, Vec<Vec<u8>>>::new());
    let collect = |name: &str, receive: &dyn Fn() -> Option<Vec<u8>>| {
        while let Some(bytes) = receive() {
            received.lock().unwrap().entry(name.to_owned()).or_default().push(bytes);
        }
    };
    let nothing = Duration::from_millis(0);
    for (number, sent) in frames.iter().enumerate() {
        let mut frame = Frame::numbered(number as u64).untagged_length(sent.length);
        if !sent.source {
            frame.source[5] ^= 1;
        }
        match sent.guest {
            None => wire.send(&frame.tags(&sent.tags)),
            Some(guest) => guests[guest].send(&frame.reversed().tags(&sent.tags)),
        }
        if number % 50 == 49 {
            collect("wire", &|| wire.receive_within(nothing));
            for ((name, _), guest) in PORTS.iter().zip(&guests) {
                collect(name, &|| guest.receive_within(nothing));
            }
        }
    }
    let summary = daemon.settled();
    summary.assert_conserved();
    let patience = Duration::from_millis(100);
    collect("wire", &|| wire.receive_within(patience));
    for ((name, _), guest) in PORTS.iter().zip(&guests) {
        collect(name, &|| guest.receive_within(patience));
    }
    let counted = |summary: &Summary| {
        let ports = summary.ports.iter();
        ports
            .map(|port| (port.name.clone(), (port.from_guest.clone(), port.to_guest.clone())))
            .collect()
    };
    let counted = counted(&summary);
    let unmapped = summary.unmapped.into_iter().collect();
    ended(daemon, Signal::SIGTERM);
    bench.give_back();
    let mut received = received.into_inner().unwrap();
    if let Some(frames) = received.get_mut("wire") {
        // Different guests' frames are in no order.
        frames.sort();
    }
    Outcome { received, counted, unmapped }
}

/// The same frames, the same drops, the same counts, bytes included, for whatever is sent.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn both_paths_do_and_count_the_same() {
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    for (tpid, own) in [("0x8100", 0x8100), ("0x88a8", 0x88a8)] {
        let strategy =
            proptest::collection::vec(any_frame(own), lab::scaled(FRAMES as u64).max(500) as usize);
        let frames = strategy.new_tree(&mut runner).unwrap().current();
        let by_packets = outcome("packet", false, &frames, tpid);
        // What a driver can do by XDP the kernel tells since then.
        let ways = if kernel_is_at_least(6, 3) { &[false, true][..] } else { &[false] };
        for &express in ways {
            compare(&by_packets, &outcome("kernel", express, &frames, tpid), tpid);
        }
    }
}

fn compare(by_packets: &Outcome, in_kernel: &Outcome, tpid: &str) {
    for (name, frames) in &by_packets.received {
        let others = in_kernel.received.get(name).cloned().unwrap_or_default();
        let only = |ones: &[Vec<u8>], others: &[Vec<u8>]| -> Vec<String> {
            let ones = ones.iter().filter(|one| !others.contains(one));
            ones.take(5).map(|bytes| format!("{:?}", Frame::read(bytes))).collect()
        };
        assert!(
            *frames == others,
            "{tpid}: at {name}: by packets only: {:?}; in the kernel only: {:?}",
            only(frames, &others),
            only(&others, frames)
        );
    }
    assert!(by_packets.received.len() > PORTS.len(), "all have got something");
    assert_eq!(by_packets.counted, in_kernel.counted, "{tpid}");
    assert_eq!(by_packets.unmapped, in_kernel.unmapped, "{tpid}");
    assert_eq!(by_packets.received.keys().len(), in_kernel.received.keys().len());
    let reasons: usize =
        by_packets.counted.values().map(|(from, to)| from.drops.len() + to.drops.len()).sum();
    assert!(reasons > 8, "{reasons} kinds of drops are too few to compare");
}

/// A guest without offloads is served by XDP, whatever becomes of the daemon and of the port.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_guest_without_offloads_is_served_by_xdp() {
    let bench = Bench::new();
    let arguments = ["--map", "101=t0,offload=off", "--datapath", "auto"];
    let mut daemon = Some(bench.start(&arguments));
    let guest = bench.lab.raw_guest("t0");
    daemon.as_ref().unwrap().attached(&["t0"]);
    if !kernel_is_at_least(6, 3) {
        bench.let_uplink_take_redirected();
        bench.until_reason("t0", "this kernel does not tell");
        assert!(!bench.has_xdp("t0"));
        ended(daemon.take().unwrap(), Signal::SIGTERM);
        return bench.give_back();
    }
    bench.until_reason("t0", "the driver of up0 takes no frames by XDP");
    assert!(!bench.has_xdp("t0"));
    bench.let_uplink_take_redirected();
    bench.until_reason("t0", "XDP sends");
    assert!(bench.has_xdp("t0"));
    let sent = each_once(&bench.lab, &guest, VLAN, |_| {
        for round in 0..9 {
            restart(&bench, &mut daemon, &arguments, round, || {
                assert!(bench.has_xdp("t0"), "it outlives its daemon");
            });
            bench.until_reason("t0", "XDP sends");
        }
        for _ in 0..5 {
            // Seen by the packet path only, then not at all.
            assert_eq!(bench.set("t0", "rate", "100G").datapath, "packet");
            assert!(!bench.has_xdp("t0"));
            assert_eq!(bench.set("t0", "rate", "").datapath, "kernel");
            bench.until_reason("t0", "XDP sends");
            bench.set("t0", "mode", "access");
            bench.until_reason("t0", "XDP sends");
            bench.set("t0", "mode", "tunnel");
        }
    });
    assert!(sent.iter().all(|frames| *frames > 1000), "{sent:?} frames are no traffic");
    let port = bench.port("t0");
    assert_eq!([port.to_guest.out_frames, port.from_guest.out_frames], sent);

    // The tag it puts on is the port's, at once.
    let wire = bench.lab.wire();
    bench.set("t0", "vlan", "202");
    bench.until_reason("t0", "XDP sends");
    guest.send(&Frame::numbered(1).reversed());
    let got = Frame::read(&wire.receive_within(lab::PATIENCE).expect("a frame"));
    assert_eq!(got.tags, [tag(0x8100, 202)]);

    // Without the option, by hand, and for good.
    bench.set("t0", "offload", "auto");
    assert!(!bench.has_xdp("t0") && bench.port("t0").datapath_reason.is_none());
    bench.set("t0", "offload", "off");
    bench.until_reason("t0", "XDP sends");
    bench.client().call(&Request::Detach {}).unwrap();
    assert!(!bench.has_xdp("t0"));
    ended(daemon.take().unwrap(), Signal::SIGTERM);

    let daemon = bench.start(&arguments);
    bench.until_reason("t0", "XDP sends");
    ended(daemon, Signal::SIGTERM);
    assert!(bench.has_xdp("t0"));
    bench.give_back();
    assert!(!bench.has_xdp("t0"));
}

/// A guest with offloads would send what XDP cannot: its port declares what is not so.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_guest_with_offloads_is_not_served_by_xdp() {
    let bench = Bench::new();
    bench.let_uplink_take_redirected();
    let daemon = bench.start(&["--map", "101=t0,offload=off", "--datapath", "kernel"]);
    let guest = bench.lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    bench.until_reason("t0", "XDP sends");
    // A driver that takes offloads comes up in the guest.
    guest.set_offload(libc::TUN_F_CSUM);
    bench.until_reason("t0", "its guest has checksum offload");
    assert!(!bench.has_xdp("t0"));
    eventually("it is told", || {
        daemon
            .stderr()
            .iter()
            .any(|line| line.contains("t0: offload=off, but no XDP"))
            .then_some(())
    });
    let wire = bench.lab.wire();
    guest.send(&Frame::numbered(1).reversed());
    assert!(wire.receive_within(lab::PATIENCE).is_some(), "it is served all the same");
    guest.set_offload(0);
    bench.until_reason("t0", "XDP sends");
    ended(daemon, Signal::SIGTERM);
    bench.give_back();
}

/// A device that was found is the host's again when it is no port any more: nothing of ours
/// is left at its ingress, though a running switch may not ask the kernel what stands there.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_found_device_that_is_no_port_any_more_is_the_hosts() {
    let bench = Bench::new();
    let _guest = bench.lab.raw_guest("t0");
    let daemon = bench.start(&["--map", "101=t0", "--map", "102=t1", "--datapath", "kernel"]);
    daemon.attached(&["t0"]);
    let index = bench.index("t0");
    let sealed = || {
        bench.lab.host.enter(|| is_attached_tc("vlansw_seal", index, Direction::Ingress).unwrap())
    };
    assert!(sealed());
    bench.lab.host.ip("link set t0 down");
    bench.lab.host.ip("link set t0 name t9");
    eventually("it is not sealed any more", || (!sealed()).then_some(()));
    bench.lab.host.ip("link set t9 name t0");
    eventually("it is sealed again", || sealed().then_some(()));
    let request = Request::RemovePort { name: "t0".to_owned(), persist: None };
    bench.client().call(&request).unwrap();
    assert!(!sealed());
    ended(daemon, Signal::SIGTERM);
    bench.give_back();
}

/// What one VLAN's guest gets is counted as lost if it does not read.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_full_queue_and_an_absent_guest_are_counted() {
    const FRAMES: u64 = 5000;
    let bench = Bench::new();
    let daemon = bench.start(&["--map", "101=t0", "--datapath", "kernel"]);
    let wire = bench.lab.wire();
    let send = || {
        for number in 0..FRAMES {
            wire.send(&Frame::numbered(number).tags(&[VLAN]));
        }
    };
    let dropped = |reason: &str| {
        let mut frames = 0;
        let deadline = Instant::now() + lab::PATIENCE;
        while Instant::now() < deadline && frames < FRAMES / 2 {
            frames = daemon.summary().port("t0").to_guest.dropped(reason);
        }
        frames
    };
    send();
    assert_eq!(dropped("guest_absent"), FRAMES);
    let guest = bench.lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    send();
    let full = dropped("guest_queue_full");
    let mut got = 0;
    while guest.receive_within(Duration::from_millis(50)).is_some() {
        got += 1;
    }
    let port = daemon.summary();
    let port = port.port("t0");
    assert_eq!(full + got, FRAMES, "{port:?}");
    assert_eq!(port.to_guest.out_frames, got);
    ended(daemon, Signal::SIGTERM);
    bench.give_back();
}

/// Arguments for this many ports on the kernel path, `t1` with VLAN 1 and so on.
fn many(count: u16) -> Vec<String> {
    let maps = (1..=count).flat_map(|vid| ["--map".to_owned(), format!("{vid}=t{vid}")]);
    maps.chain(["--datapath".to_owned(), "kernel".to_owned()]).collect()
}

/// Of many ports those that are silent are looked at in turns: what one of them loses is told
/// nevertheless.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn what_a_port_loses_that_was_silent_among_many_is_told() {
    let bench = Bench::new();
    let arguments = many(204);
    let daemon = bench.start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let guests = ["t40", "t41", "t42", "t43"].map(|tap| (tap, bench.lab.raw_guest(tap)));
    daemon.attached(&["t40", "t41", "t42", "t43"]);
    // Until they rest: by the clock, as nothing shows it. One of each turn.
    std::thread::sleep(Duration::from_secs(7));
    let wire = bench.lab.wire();
    for (vid, _) in (40..).zip(&guests) {
        for number in 0..3000 {
            wire.send(&Frame::numbered(number).tags(&[tag(0x8100, vid)]));
        }
    }
    for (tap, _) in &guests {
        daemon.says(&[&format!("{tap}: "), "frames dropped because a queue was full"]);
    }
    ended(daemon, Signal::SIGTERM);
    bench.give_back();
}

/// A seal where nobody is told of its going is looked after from the start, also of many that
/// an earlier run has put there.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_seal_taken_from_one_of_many_after_a_restart_is_put_back() {
    let bench = Bench::new();
    let arguments = many(66);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let before = bench.start(&arguments);
    let index = bench.index("t30");
    let has_seal = || {
        bench.lab.host.enter(|| is_attached_tc("vlansw_seal", index, Direction::Ingress)).unwrap()
    };
    // Without TCX it stays where its going is notified.
    if kernel_is_at_least(6, 6) {
        eventually("its seal has moved", || {
            let programs = bench.lab.host.enter(|| tcx::programs(index, Direction::Ingress));
            (!programs.unwrap().is_empty()).then_some(())
        });
    }
    ended(before, Signal::SIGKILL);
    let daemon = bench.start(&arguments);
    assert!(has_seal());
    let unseal = || detach_tc("vlansw_seal", index, Direction::Ingress).unwrap();
    assert!(bench.lab.host.enter(unseal));
    daemon.says(&["t30: ", "sealed again"]);
    assert!(has_seal());
    ended(daemon, Signal::SIGTERM);
    bench.give_back();
}
