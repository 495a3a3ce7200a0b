//! What guests are held to, on the running daemon: rate, storm, addresses; with raw
//! frames, super-frames and a real TCP; changed while frames flow.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::frames::{EXPERIMENTAL, Frame, GUEST_MAC, TagBytes, tag};
use lab::hub::far_members;
use lab::ip::{Version, partial, tcp};
use lab::raw::{OFFLOAD_TCP, open_tap, write_tap};
use lab::{Daemon, Flow, KernelGuest, Lab, Namespace, PATIENCE, RawGuest, eventually, mac_text};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vlanswitchd::control::api::{Change, PortReply, Request};
use vlanswitchd::control::client::Client;
use vlanswitchd::switch::Rate;

const C101: TagBytes = tag(0x8100, 101);
const BROADCAST: [u8; 6] = [0xff; 6];
const ALL_NODES: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];

/// A daemon with a control socket.
struct Switch {
    daemon: Daemon,
    folder: TempDir,
}

impl Switch {
    fn start(lab: &Lab, maps: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let control = folder.path().join("control").display().to_string();
        let mut arguments = vec!["--control", &control];
        arguments.extend(maps.iter().flat_map(|map| ["--map", map]));
        Self { daemon: lab.daemon(&arguments), folder }
    }

    fn ask(&self, request: &Request) -> String {
        let mut client = Client::connect(&self.folder.path().join("control")).unwrap();
        client.call(request).unwrap().read::<PortReply>().unwrap().port.map
    }

    /// Changes a port; returns its map.
    fn set(&self, name: &str, changes: &[(&str, &str)]) -> String {
        let change =
            |(key, value): &(&str, &str)| Change { key: (*key).into(), value: (*value).into() };
        let changes = changes.iter().map(change).collect();
        self.ask(&Request::SetPort { name: name.into(), changes, persist: None })
    }

    fn add(&self, map: &str) -> String {
        self.ask(&Request::AddPort { map: map.into(), persist: None })
    }

    /// What the guest has sent so far, when that many frames have come from it and each
    /// has gone its way.
    fn sent(&self, port: &str, frames: u64) -> Flow {
        let summary = self.daemon.until(&format!("{frames} frames from {port}"), |summary| {
            let flow = &summary.port(port).from_guest;
            flow.in_frames >= frames && flow.out_frames + flow.all_drops() == flow.in_frames
        });
        summary.port(port).from_guest.clone()
    }

    fn stop(self) {
        self.daemon.stop().assert_conserved();
    }
}

fn from_guest(number: u64) -> Frame {
    Frame::numbered(number).reversed()
}

/// How many of `count` frames of this length a guest gets through, sent in portions
/// that no ring overflows of; all that do not are `reason`.
fn passed(
    switch: &Switch,
    port: &str,
    guest: &RawGuest,
    frame: &Frame,
    count: u64,
    reason: &str,
) -> u64 {
    let before = switch.daemon.settled().port(port).from_guest.clone();
    for sent in 1..=count {
        guest.send(frame);
        if sent % 200 == 0 || sent == count {
            switch.sent(port, before.in_frames + sent);
        }
    }
    let after = switch.sent(port, before.in_frames + count);
    let passed = after.out_frames - before.out_frames;
    let dropped = after.dropped(reason) - before.dropped(reason);
    assert_eq!(passed + dropped, count, "{after:?}");
    passed
}

/// Longest frame without tags of an MTU of 1500.
const LONG: usize = 1514;
/// That in its VLAN.
const LONG_ON_THE_WIRE: u64 = LONG as u64 + 4;

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_burst_passes_and_no_change_hands_out_another() {
    let lab = Lab::new();
    // At a kilobit a second a long frame takes twelve seconds.
    let switch = Switch::start(&lab, &["101=t0,rate=1k", "102=t1", "103=t2,rate=1k,burst=160k"]);
    let guests = ["t0", "t1", "t2"].map(|tap| lab.raw_guest(tap));
    switch.daemon.attached(&["t0", "t1", "t2"]);
    let long = from_guest(1).untagged_length(LONG);
    let begin = Instant::now();
    let mut first = passed(&switch, "t0", &guests[0], &long, 100, "rate_limited");
    assert_eq!(passed(&switch, "t1", &guests[1], &long, 300, "rate_limited"), 300);
    let second = passed(&switch, "t2", &guests[2], &long, 200, "rate_limited");
    // Others come and change, and so do settings of its own.
    switch.set("t1", &[("rate", "1M"), ("pcp", "3")]);
    switch.add("104=t3,rate=10M,storm=5,mac=02:00:00:00:00:01");
    switch.set("t2", &[("burst", "300k")]);
    assert_eq!(switch.set("t0", &[("rate", "2k"), ("pcp", "1")]), "101=t0,pcp=1,rate=2k");
    first += passed(&switch, "t0", &guests[0], &long, 50, "rate_limited");
    let more = passed(&switch, "t2", &guests[2], &long, 50, "rate_limited");
    let refilled = |bits: u64| (begin.elapsed().as_secs() + 1) * bits / 8 / LONG_ON_THE_WIRE + 1;
    let (burst, double) = (80_000 / LONG_ON_THE_WIRE, 160_000 / LONG_ON_THE_WIRE);
    assert!((burst..=burst + refilled(2000)).contains(&first), "{first} of t0");
    assert!((double..=double + refilled(1000)).contains(&(second + more)), "{second} + {more}");
    // The limit gone, everything passes.
    assert_eq!(switch.set("t0", &[("rate", "")]), "101=t0,pcp=1");
    assert_eq!(passed(&switch, "t0", &guests[0], &long, 300, "rate_limited"), 300);
    switch.stop();
}

struct Stop<'s>(&'s AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends as fast as the tap takes it until told to stop.
fn flood(stop: &AtomicBool, send: impl Fn()) {
    while !stop.load(Ordering::Relaxed) {
        send();
    }
}

/// Frames the policer has let through.
fn admitted(flow: &Flow) -> u64 {
    flow.in_frames - flow.dropped("rate_limited") - flow.dropped("ring_overrun")
}

/// What the policer lets through in some seconds of a flood of one kind of frame, as a
/// part of the rate: never more than the envelope, and in a while in which the machine
/// leaves both guest and switch their turn, the rate to 2 %.
fn assert_gets_its_rate(
    switch: &Switch,
    what: &str,
    rate: Rate,
    wire_len: u64,
    send: impl Fn() + Send,
) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| flood(&stop, send));
        // Stopped also when this panics: a scope waits for its threads.
        let _stopping = Stop(&stop);
        // The burst of the start is no part of the rate.
        switch.daemon.until("the policer drops", |summary| {
            summary.port("t0").from_guest.dropped("rate_limited") > 100
        });
        let look = || {
            let before = Instant::now();
            let flow = switch.daemon.summary().port("t0").from_guest.clone();
            (before, flow, Instant::now())
        };
        let bits = rate.bits_per_second() as f64;
        let shares = (0..10).map(|_| {
            let (earliest, first, latest) = look();
            let (begin, last, end) = eventually("two seconds", || {
                Some(look()).filter(|(now, ..)| *now - latest > Duration::from_secs(2))
            });
            let passed = (admitted(&last) - admitted(&first)) as f64 * wire_len as f64 * 8.0;
            let most = rate.burst_bytes() as f64 * 8.0 + bits * (end - earliest).as_secs_f64();
            assert!(passed <= most, "{passed} bits of at most {most}");
            // When between asking and the answer is not known.
            let middle = |from: Instant, to: Instant| from + (to - from) / 2;
            let time = middle(begin, end) - middle(earliest, latest);
            passed / time.as_secs_f64() / bits
        });
        let mut seen = Vec::new();
        let exact =
            shares.inspect(|share| seen.push(*share)).any(|share| (share - 1.0).abs() < 0.02);
        println!("{what}: {seen:.4?}");
        assert!(exact, "{what}: {seen:.4?}");
    });
}

/// The rate is what goes on the wire, whatever the guest sends.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_flood_gets_its_rate() {
    let lab = Lab::new();
    let switch = Switch::start(&lab, &["101=t0,rate=100M"]);
    let guest = lab.raw_guest("t0");
    switch.daemon.attached(&["t0"]);
    let long = from_guest(1).untagged_length(LONG).bytes();
    let rate = Rate::new(100_000_000, None).unwrap();
    assert_gets_its_rate(&switch, "long frames", rate, LONG_ON_THE_WIRE, || {
        guest.send_bytes(&long)
    });
    switch.set("t0", &[("rate", "10M")]);
    let short = from_guest(1).bytes();
    let rate = Rate::new(10_000_000, None).unwrap();
    assert_gets_its_rate(&switch, "short frames", rate, 64, || guest.send_bytes(&short));
    switch.stop();
}

/// A super-frame weighs what its segments do, and passes whole or not at all.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_flood_of_super_frames_gets_its_rate() {
    const SEGMENTS: usize = 40;
    let lab = Lab::new();
    // Small segments: their headers are a fifth of all.
    let size = 250;
    let switch = Switch::start(&lab, &["101=t0,rate=1G"]);
    let tap = lab.host.enter(|| open_tap("t0", 0, OFFLOAD_TCP)).unwrap();
    switch.daemon.attached(&["t0"]);
    let frame = tcp(Version::V4, 1, &vec![7; SEGMENTS * size]);
    let (header, frame) = partial(&frame, Version::V4, size as u16);
    let (header, bytes) = (header.bytes(), frame.bytes());
    let wire_len = SEGMENTS * (14 + 4 + 40 + size);
    let rate = Rate::new(1_000_000_000, None).unwrap();
    assert_gets_its_rate(&switch, "super-frames", rate, wire_len as u64, || {
        write_tap(&tap, &header, &bytes).unwrap();
    });
    let flow = switch.daemon.settled().port("t0").from_guest.clone();
    assert_eq!(flow.split_frames, 0);
    assert_eq!(flow.out_bytes, flow.out_frames * (bytes.len() as u64 + 4));
    switch.stop();
}

/// Bits a second that arrive by TCP, over some seconds, as a part of the rate.
fn tcp_share(from: &Namespace, to: &Namespace, address: &str, bits: f64) -> f64 {
    let address = SocketAddr::new(address.parse().unwrap(), 0);
    let listener = to.enter(|| TcpListener::bind(address).unwrap());
    let target = listener.local_addr().unwrap();
    let mut sender = from.enter(|| TcpStream::connect_timeout(&target, PATIENCE).unwrap());
    let (mut receiver, _) = listener.accept().unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = vec![0; 1 << 18];
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let data = vec![7; 1 << 18];
            // Ends when the receiver hangs up.
            while sender.write_all(&data).is_ok() {}
        });
        let mut read = || loop {
            match receiver.read(&mut buffer) {
                Ok(got) => break got,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("{error}"),
            }
        };
        let start = Instant::now();
        // Slow start is not what is measured.
        while start.elapsed() < Duration::from_secs(1) {
            read();
        }
        let (begin, mut bytes) = (Instant::now(), 0);
        while begin.elapsed() < Duration::from_secs(5) {
            bytes += read();
        }
        let share = bytes as f64 * 8.0 / begin.elapsed().as_secs_f64() / bits;
        drop(receiver);
        share
    })
}

const GUEST: &str = "10.1.0.1";
const MEMBER: &str = "10.1.0.2";

fn kernel_guest(lab: &Lab, offload: u32) -> (KernelGuest, Namespace) {
    let guest = KernelGuest::open(&lab.host, "t0", offload).address(&[&format!("{GUEST}/24")]);
    let member = far_members(lab, &[&[C101]]).pop().unwrap();
    (guest, member.address(&[&format!("{MEMBER}/24")]).inside)
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn tcp_gets_its_rate_with_offloads_and_without() {
    for offload in [OFFLOAD_TCP, 0] {
        let lab = Lab::new();
        let switch = Switch::start(&lab, &["101=t0,rate=50M"]);
        let (guest, member) = kernel_guest(&lab, offload);
        switch.daemon.attached(&["t0"]);
        // Every kernel has it, and none is easier to slow down.
        guest.inside.set_sysctl("net/ipv4/tcp_congestion_control", "reno");
        let mut shares = Vec::new();
        // Less only if the machine does not let one of the three have its turn.
        let gets_its_rate = (0..3).any(|_| {
            let share = tcp_share(&guest.inside, &member, MEMBER, 50e6);
            assert!(share <= 1.04, "offloads {offload:#x}: {share}");
            shares.push(share);
            share >= 0.8
        });
        println!("TCP through 50 Mbit/s, offloads {offload:#x}: {shares:.3?}");
        assert!(gets_its_rate, "offloads {offload:#x}: {shares:?}");
        // Toward the guest nothing is policed.
        let down = tcp_share(&member, &guest.inside, GUEST, 50e6);
        assert!(down > 1.5, "toward the guest: {down}");
        let flow = switch.daemon.settled().port("t0").from_guest.clone();
        assert!(flow.dropped("rate_limited") > 0, "{flow:?}");
        let longest = if offload == 0 { 1518 } else { u64::MAX };
        assert!(flow.out_bytes / flow.out_frames <= longest);
        switch.stop();
    }
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_storm_is_cut_and_unicast_passes_untouched() {
    const EACH: u64 = 1000;
    let lab = Lab::new();
    let switch = Switch::start(&lab, &["101=t0,storm=2", "102=t1"]);
    let guests = ["t0", "t1"].map(|tap| lab.raw_guest(tap));
    switch.daemon.attached(&["t0", "t1"]);
    let wire = lab.wire();
    let begin = Instant::now();
    for number in 1..=EACH {
        for guest in &guests {
            let group = if number % 2 == 0 { BROADCAST } else { ALL_NODES };
            guest.send(&from_guest(number + EACH).to(group));
            guest.send(&from_guest(number));
        }
        if number % 100 == 0 {
            switch.sent("t0", 2 * number);
            switch.sent("t1", 2 * number);
        }
    }
    let most = 10 + 2 * (begin.elapsed().as_secs() + 1);
    switch.sent("t0", 2 * EACH);
    let other = switch.sent("t1", 2 * EACH);
    assert_eq!((other.out_frames, other.all_drops()), (2 * EACH, 0));
    let (mut unicast, mut group) = (Vec::new(), 0);
    while let Some(bytes) = wire.try_receive() {
        let frame = Frame::read(&bytes);
        if frame.ether_type == EXPERIMENTAL && frame.tags == [C101] {
            if frame.destination[0] & 1 == 0 {
                unicast.push(frame.number());
            } else {
                group += 1;
            }
        }
    }
    assert_eq!(unicast, (1..=EACH).collect::<Vec<_>>());
    assert!((10..=most).contains(&group), "{group} of at most {most}");
    let flow = switch.sent("t0", 2 * EACH);
    assert_eq!(flow.dropped("storm_limited"), EACH - group, "{flow:?}");
    assert_eq!(flow.all_drops(), EACH - group);
    switch.stop();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn frames_from_other_addresses_are_dropped() {
    let lab = Lab::new();
    let second = [2, 0, 0, 0, 0, 7];
    let map = format!("101=t0,mac={}+{}", mac_text(&GUEST_MAC), mac_text(&second));
    let switch = Switch::start(&lab, &[&map]);
    let guest = lab.raw_guest("t0");
    switch.daemon.attached(&["t0"]);
    let from = |source| Frame { source, ..from_guest(1) };
    let passed = |source| passed(&switch, "t0", &guest, &from(source), 50, "spoofed_mac");
    assert_eq!((passed(GUEST_MAC), passed(second)), (50, 50));
    for place in 0..6 {
        let mut other = GUEST_MAC;
        other[place] ^= 0x10;
        assert_eq!(passed(other), 0, "{other:x?}");
    }
    let map = switch.set("t0", &[("mac", &mac_text(&second))]);
    assert_eq!(map, "101=t0,mac=02:00:00:00:00:07");
    assert_eq!((passed(GUEST_MAC), passed(second)), (0, 50));
    switch.stop();
}

/// A guest with a kernel of its own takes another address: it is cut off, for IPv4 and
/// IPv6, until that address is allowed.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_guest_that_changes_its_address_is_cut_off_until_allowed() {
    let lab = Lab::new();
    let switch = Switch::start(&lab, &["101=t0,mac=02:00:00:00:00:01"]);
    let (guest, member) = kernel_guest(&lab, OFFLOAD_TCP);
    guest.inside.ip("link set eth0 address 02:00:00:00:00:01");
    switch.daemon.attached(&["t0"]);
    let reaches = || {
        let ping = guest.inside.command("ping").args(["-c1", "-W1", MEMBER]).output().unwrap();
        member.ip("neighbour flush dev eth0");
        ping.status.success()
    };
    eventually("an answer from the allowed address", || reaches().then_some(()));
    guest.inside.ip("link set eth0 address 02:00:00:00:00:02");
    assert!(!reaches());
    let flow = switch.daemon.settled().port("t0").from_guest.clone();
    assert!(flow.dropped("spoofed_mac") > 0, "{flow:?}");
    switch.set("t0", &[("mac", "02:00:00:00:00:01+02:00:00:00:00:02")]);
    eventually("an answer from the new address", || reaches().then_some(()));
    switch.stop();
}
