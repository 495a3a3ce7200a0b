//! Every frame is accounted for: what the kernel says was sent to the switch came
//! in, and all that came in went out or has a reason; under overload, with guests
//! that do not read, with rings overrun, and with junk.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::frames::{Frame, TPIDS, TagBytes, tag};
use lab::hub::far_members;
use lab::raw::{OFFLOAD_TCP, open_tap, write_tap};
use lab::tunnel::{Tunnel, merge_on_arrival};
use lab::{Daemon, Lab, RawGuest, Summary, Wire};
use nix::sys::signal::Signal;

const C101: TagBytes = tag(0x8100, 101);
const C102: TagBytes = tag(0x8100, 102);

/// What the kernel counted on the devices around the switch.
#[derive(Debug)]
struct Kernel {
    /// Frames the far end put on the cable.
    from_wire: u64,
    /// Frames that left the uplink.
    to_wire: u64,
}

impl Kernel {
    fn read(lab: &Lab) -> Self {
        Self {
            from_wire: lab.far.counter("far0", "tx_packets"),
            to_wire: lab.host.counter("up0", "tx_packets"),
        }
    }
}

/// Waits until the switch has seen all frames of the kernel's count, then stops it
/// and holds its books against the kernel's.
fn settle(lab: &Lab, daemon: Daemon, taps: &[&str]) -> Summary {
    let sent = Kernel::read(lab).from_wire;
    let from_guests: Vec<u64> =
        taps.iter().map(|tap| lab.host.counter(tap, "rx_packets")).collect();
    daemon.until(
        &format!("{sent} frames from the wire, {from_guests:?} from guests have come in"),
        |summary| {
            let mut ports = taps.iter().zip(&from_guests);
            summary.from_wire.in_frames >= sent
                && ports.all(|(tap, sent)| summary.port(tap).from_guest.in_frames >= *sent)
        },
    );
    let summary = daemon.stop();
    let kernel = Kernel::read(lab);
    assert_eq!(summary.from_wire.in_frames, kernel.from_wire, "{summary:?}");
    assert_eq!(summary.to_wire.out_frames, kernel.to_wire, "{summary:?}");
    for (tap, sent) in taps.iter().zip(from_guests) {
        assert_eq!(summary.port(tap).from_guest.in_frames, sent, "{tap}");
    }
    summary
}

fn start(lab: &Lab, maps: &[&str], taps: &[&str]) -> (Daemon, Vec<RawGuest>) {
    start_with(lab, &[], maps, taps)
}

/// On the packet path, whatever path tests are run on: only there are rings.
fn start_with_rings(lab: &Lab, maps: &[&str], taps: &[&str]) -> (Daemon, Vec<RawGuest>) {
    start_with(lab, &["--datapath", "packet"], maps, taps)
}

fn start_with(lab: &Lab, more: &[&str], maps: &[&str], taps: &[&str]) -> (Daemon, Vec<RawGuest>) {
    let mut arguments: Vec<&str> = maps.iter().flat_map(|map| ["--map", map]).collect();
    arguments.extend(more);
    let daemon = lab.daemon(&arguments);
    let guests = taps.iter().map(|tap| lab.raw_guest(tap)).collect();
    daemon.attached(taps);
    (daemon, guests)
}

/// More than anybody can take, from everywhere at once; one guest never reads.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn overload_from_all_sides() {
    const FRAMES: u64 = 100_000;
    let lab = Lab::new();
    let taps = ["t0", "t1"];
    let (daemon, guests) = start(&lab, &["101=t0", "102=t1"], &taps);
    let wire = lab.wire();
    std::thread::scope(|scope| {
        for guest in &guests {
            scope.spawn(move || {
                for number in 0..FRAMES {
                    guest.send(&Frame::numbered(number).reversed());
                }
            });
        }
        scope.spawn(|| {
            let frames = [C101, C102].map(|vlan| Frame::numbered(1).tags(&[vlan]).bytes());
            for _ in 0..FRAMES {
                for frame in &frames {
                    // A veth's backlog may be full: then it was not put on the cable.
                    let _ = wire.try_send(frame);
                }
            }
        });
    });
    let summary = settle(&lab, daemon, &taps);
    for (tap, guest) in taps.iter().zip(&guests) {
        let port = summary.port(tap);
        assert_eq!(port.from_guest.in_frames, FRAMES);
        assert_eq!(guest.clear() as u64, port.to_guest.out_frames, "{tap} holds what was sent");
        assert!(port.to_guest.dropped("guest_queue_full") > 0, "{port:?}");
    }
}

/// A daemon that is stopped for a moment overruns its rings: the kernel counts for
/// it, and nothing is forgotten.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn overrun_rings_are_counted() {
    const FRAMES: u64 = 30_000;
    let lab = Lab::new();
    let (daemon, guests) = start_with_rings(&lab, &["101=t0"], &["t0"]);
    let wire = lab.wire();
    for _ in 0..3 {
        daemon.signal(Signal::SIGSTOP);
        let down = Frame::numbered(1).tags(&[C101]).bytes();
        for number in 0..FRAMES {
            wire.send_bytes(&down);
            guests[0].send(&Frame::numbered(number).reversed());
        }
        daemon.signal(Signal::SIGCONT);
    }
    let summary = settle(&lab, daemon, &["t0"]);
    assert!(summary.from_wire.dropped("ring_overrun") > 0, "{summary:?}");
    assert!(summary.port("t0").from_guest.dropped("ring_overrun") > 0, "{summary:?}");
    assert_eq!(guests[0].clear() as u64, summary.port("t0").to_guest.out_frames);
}

/// The slow guest loses its own frames only.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_guest_that_does_not_read_costs_the_others_nothing() {
    let lab = Lab::new();
    let (daemon, guests) = start(&lab, &["101=t0", "102=t1"], &["t0", "t1"]);
    let wire = lab.wire();
    let flood = Frame::numbered(0).tags(&[C101]);
    for round in 0..200u64 {
        for number in 0..8 {
            // Far more than t0's queue holds in all, little at a time.
            for _ in 0..25 {
                wire.send(&flood);
            }
            wire.send(&Frame::numbered(round * 8 + number + 1).tags(&[C102]));
        }
        let got = guests[1].receive_until(round * 8 + 8);
        let numbers: Vec<u64> = got.iter().map(Frame::number).collect();
        let expected: Vec<u64> = (round * 8 + 1..=round * 8 + 8).collect();
        assert_eq!(numbers, expected);
    }
    let summary = settle(&lab, daemon, &["t0", "t1"]);
    let slow = &summary.port("t0").to_guest;
    assert_eq!(slow.in_frames, 40_000);
    assert_eq!(slow.out_frames + slow.dropped("guest_queue_full"), 40_000, "{slow:?}");
    assert_eq!(guests[0].clear() as u64, slow.out_frames);
    assert_eq!(summary.port("t1").to_guest.all_drops(), 0);
}

/// Being spared for a moment is not being given up: who reads again is served again.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_guest_that_reads_again_is_served_again() {
    let lab = Lab::new();
    let (daemon, guests) = start(&lab, &["101=t0"], &["t0"]);
    lab.host.ip("link set t0 txqueuelen 10");
    let wire = lab.wire();
    for round in 1..=20 {
        let full = |summary: &Summary| summary.port("t0").to_guest.dropped("guest_queue_full");
        let before = full(&daemon.summary());
        for _ in 0..50 {
            wire.send(&Frame::numbered(0).tags(&[C101]));
        }
        daemon.until("its queue overflows", |summary| full(summary) >= before + 40);
        guests[0].clear();
        wire.send(&Frame::numbered(round).tags(&[C101]));
        assert_eq!(guests[0].receive_until(round), [Frame::numbered(round)]);
    }
    settle(&lab, daemon, &["t0"]);
}

/// Super-frames that userspace cuts apart, toward a guest that does not read:
/// frames in and frames made of them are all accounted for.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn segments_made_in_userspace_are_accounted_for_under_overload() {
    let lab = Lab::new();
    merge_on_arrival(&lab);
    let (daemon, guests) = start_with_rings(&lab, &["101=t0"], &["t0"]);
    lab.host.ip("link set t0 txqueuelen 100");
    let member = far_members(&lab, &[&[C101]]).pop().unwrap();
    member.inside.tool("ethtool", "-K eth0 tx off tso off gso off");
    let wire = Wire::open(&member.inside, "eth0");
    let burst: Vec<Vec<u8>> =
        (0..16).map(|number| Tunnel::Gre.frame(number, 1000).bytes()).collect();
    for _ in 0..300 {
        for frame in &burst {
            wire.send_bytes(frame);
        }
    }
    // The cable's own queue may lose some before they are merged: unlike the other
    // tests, this one cannot know how many come in.
    daemon.settled().assert_conserved();
    let summary = daemon.stop();
    let flow = &summary.port("t0").to_guest;
    assert!(flow.split_frames > 0, "nothing was merged: this test shows nothing");
    assert!(flow.dropped("guest_queue_full") > 0, "{flow:?}");
    assert_eq!(guests[0].clear() as u64, flow.out_frames);
}

/// Marsaglia's xorshift64: the same junk in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }

    /// Something like a frame: random tags, some of them ours, some cut off.
    fn frame(&mut self) -> Vec<u8> {
        let mut frame = self.bytes(12);
        for _ in 0..self.below(6) {
            frame.extend(TPIDS[self.below(4)].to_be_bytes());
            let vid = if self.below(2) == 0 { 101 } else { self.next() as u16 };
            frame.extend(vid.to_be_bytes());
        }
        let inside = match self.below(4) {
            0 => self.bytes(2),
            1 => vec![0x08, 0x00],
            2 => vec![0x86, 0xdd],
            _ => Vec::new(),
        };
        frame.extend(inside);
        let length = self.below(1400);
        frame.extend(self.bytes(length));
        frame.resize(frame.len().clamp(14, 1500), 0);
        frame
    }
}

/// Nothing a guest or the wire sends stops the switch or upsets its books.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn junk_from_both_sides() {
    let lab = Lab::new();
    let maps = ["101=t0", "200-210=t1,native=200", "300.101=t2,mode=access", "0=t3,mode=access"];
    let taps = ["t0", "t1", "t2", "t3"];
    let (daemon, guests) = start(&lab, &maps, &taps);
    let wire = lab.wire();
    let mut random = Random(0x1234_5678_9abc_def1);
    for round in 0..200 {
        for _ in 0..100 {
            let _ = wire.try_send(&random.frame());
            let guest = &guests[random.below(guests.len())];
            let _ = guest.try_send(&random.frame());
        }
        for guest in &guests {
            guest.clear();
        }
        wire.clear();
        let number = 1_000_000 + round;
        wire.send(&Frame::numbered(number).tags(&[C101]));
        assert_eq!(guests[0].receive_until(number).last(), Some(&Frame::numbered(number)));
        guests[0].send(&Frame::numbered(number).reversed());
        wire.receive_until(number);
    }
    let summary = daemon.stop();
    for tap in taps {
        let sent = lab.host.counter(tap, "rx_packets") - lab.host.counter(tap, "rx_dropped");
        assert!(summary.port(tap).from_guest.in_frames <= sent, "{tap}");
    }
    let reasons: Vec<&String> = summary.ports[0].from_guest.drops.keys().collect();
    assert!(summary.port("t1").from_guest.dropped("vlan_not_allowed") > 0);
    assert!(summary.port("t2").from_guest.dropped("tagged_on_access") > 0);
    assert!(!reasons.iter().any(|reason| *reason == "send_failed"), "{summary:?}");
}

/// The same with virtio headers: requests for checksums and segmentation that fit
/// the frame or do not.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn junk_with_virtio_headers_from_a_guest() {
    let lab = Lab::new();
    let daemon = lab.daemon(&["--map", "101=t0", "--map", "102=t1"]);
    let tap = lab.host.enter(|| open_tap("t0", 0, OFFLOAD_TCP)).unwrap();
    let other = lab.raw_guest("t1");
    daemon.attached(&["t0", "t1"]);
    let wire = lab.wire();
    let mut random = Random(0xfeed_beef_0bad_cafe);
    let mut accepted = 0;
    for round in 0..100u64 {
        for _ in 0..100 {
            let mut header = [0u8; 10];
            header[0] = [0, 1, 2, 3][random.below(4)];
            header[1] = [0, 1, 3, 4, 5, 0x81][random.below(6)];
            for (at, limit) in [(2, 200), (4, 1600), (6, 80), (8, 24)] {
                let word = random.below(limit) as u16;
                header[at..at + 2].copy_from_slice(&word.to_ne_bytes());
            }
            let frame = if random.below(2) == 0 {
                random.frame()
            } else {
                let data = random.bytes(40);
                lab::ip::tcp(lab::ip::Version::V4, 1, &data.repeat(100)).bytes()
            };
            // The kernel refuses many of these by itself.
            accepted += u64::from(write_tap(&tap, &header, &frame).is_ok());
        }
        wire.clear();
        wire.send(&Frame::numbered(round).tags(&[C102]));
        assert_eq!(other.receive_until(round), [Frame::numbered(round)]);
    }
    assert!(accepted > 1000, "the kernel refused nearly all: this test shows nothing");
    let summary = daemon.stop();
    assert!(summary.port("t0").from_guest.in_frames > 0);
}
