//! Hostile guests and a hostile wire: whatever bytes one VLAN carries, the others lose
//! no frame, no frame is unaccounted for, the log says little and memory stays as it is.
//!
//! Each attack runs beside a polite pair: numbered frames both ways through another
//! port, each of which must arrive once and in order (`lab::both_ways`). The hostile
//! guest is a tap's descriptor with a virtio header, as QEMU has it, so any header and
//! any bytes can be written; the hostile wire is a packet socket, one that takes virtio
//! headers too. What the kernel refuses by itself is not counted as sent.
//!
//! A guest attacks as fast as it can. The wire waits after each batch until the polite
//! have moved on: they share the uplink's ring, and how much of a flood that ring takes
//! is a matter of speed, which `benches/hostile.rs` measures.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::both_ways::{Arrived, WINDOW, both_ways};
use lab::frames::{EXPERIMENTAL, Frame, TPIDS, TagBytes, tag};
use lab::ip::{self, Version, Vnet};
use lab::raw::{OFFLOAD_TCP, OFFLOAD_USO, PacketSocket, index_of, open_tap, read_tap, write_tap};
use lab::tunnel::Tunnel;
use lab::{Daemon, Flow, Lab, Summary, eventually};
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::Write;
use std::time::Duration;

const BAD: TagBytes = tag(0x8100, 101);
const GOOD: TagBytes = tag(0x8100, 102);
/// Rounds of an attack; the first warms up what memory and log are compared with.
const ROUNDS: usize = 20;
/// Frames the wire sends before it waits: with the polite ones fewer than the uplink's
/// ring has slots (4096).
const BATCH: usize = 1000;
/// Lines a daemon may log under attack, however many frames that is: a summary when a
/// guest falls behind and one every ten seconds, for a few reasons.
const LOG_LINES: usize = 20;
/// What memory may grow by, in bytes: the allocator's and the counters' own.
const GROWTH: u64 = 1 << 20;
/// A virtio header that asks for nothing.
const PLAIN: [u8; 10] = [0; 10];

/// A switch with a hostile and a polite port.
struct Scene {
    lab: Lab,
    daemon: Daemon,
    tap: File,
}

/// Where an attack is made from, and how much of it the kernel took.
struct Field<'f> {
    tap: &'f File,
    wire: PacketSocket,
    /// Takes a virtio header in front of each frame.
    lying_wire: PacketSocket,
    arrived: &'f Arrived,
    random: RefCell<Random>,
    from_guest: Cell<u64>,
    from_wire: Cell<u64>,
    batch: Cell<usize>,
}

impl Scene {
    fn start(bad_map: &str) -> Self {
        let lab = Lab::new();
        let daemon = lab.daemon(&["--map", bad_map, "--map", "102=good"]);
        let tap = lab.host.enter(|| open_tap("bad", 0, OFFLOAD_TCP | OFFLOAD_USO)).unwrap();
        Self { lab, daemon, tap }
    }

    /// Attacks for [`ROUNDS`] rounds beside the polite pair; holds what must be so for
    /// every attack. Returns the counters, and how many frames the kernel took from
    /// the guest and from the wire.
    fn endure(self, attack: impl Fn(&Field<'_>, usize)) -> (Summary, [u64; 2]) {
        let Self { lab, daemon, tap } = self;
        let good = lab.raw_guest("good");
        daemon.attached(&["bad", "good"]);
        let mut sent = [0; 2];
        let (polite, _) = both_ways(&lab, &good, GOOD, |arrived| {
            let field = Field {
                tap: &tap,
                wire: wire_socket(&lab, false),
                lying_wire: wire_socket(&lab, true),
                arrived,
                random: RefCell::new(Random(0x1234_5678_9abc_def1)),
                from_guest: Cell::new(0),
                from_wire: Cell::new(0),
                batch: Cell::new(0),
            };
            attack(&field, 0);
            field.wait();
            let (lines, memory) = (daemon.stderr().len(), daemon.resident_bytes());
            for round in 1..ROUNDS {
                attack(&field, round);
                field.wait();
                // In some rounds it reads, in others its queue stays full.
                while round % 3 == 0 && read_tap(&tap).unwrap().is_some() {}
            }
            let (more_lines, now) = (daemon.stderr().len() - lines, daemon.resident_bytes());
            assert!(more_lines <= LOG_LINES, "{more_lines} lines: {:?}", daemon.stderr());
            assert!(now <= memory + GROWTH, "{memory} bytes before, {now} after");
            sent = [field.from_guest.get(), field.from_wire.get()];
        });
        assert!(polite.iter().all(|frames| *frames > 10 * WINDOW), "hardly any: {polite:?}");
        daemon.settled();
        let summary = daemon.stop();
        let good = summary.port("good");
        assert_eq!([good.to_guest.out_frames, good.from_guest.out_frames], polite);
        assert_eq!(good.to_guest.all_drops() + good.from_guest.all_drops(), 0, "{good:?}");
        assert_eq!(summary.from_wire.dropped("ring_overrun"), 0, "{summary:?}");
        assert!(summary.port("bad").from_guest.in_frames <= sent[0], "{sent:?} {summary:?}");
        (summary, sent)
    }
}

fn wire_socket(lab: &Lab, virtio_headers: bool) -> PacketSocket {
    lab.far.enter(|| {
        let socket = PacketSocket::new();
        socket.set_at(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, 64i32 << 20).unwrap();
        if virtio_headers {
            socket.set(libc::PACKET_VNET_HDR, 1i32).unwrap();
        }
        socket.bind(index_of("far0"), 0).unwrap();
        socket
    })
}

impl Field<'_> {
    /// The guest sends; whether the kernel took it.
    fn guest(&self, header: &[u8; 10], frame: &[u8]) -> bool {
        let taken = write_tap(self.tap, header, frame).is_ok();
        self.from_guest.set(self.from_guest.get() + u64::from(taken));
        taken
    }

    /// The wire sends; whether the kernel took it.
    fn wire(&self, frame: &[u8]) -> bool {
        let taken = self.wire.send(frame).is_ok();
        self.sent_by_wire(taken)
    }

    /// The wire sends with a virtio header; whether the kernel took it.
    fn wire_with(&self, header: &[u8; 10], frame: &[u8]) -> bool {
        let taken = self.lying_wire.send(&[header, frame].concat()).is_ok();
        self.sent_by_wire(taken)
    }

    fn sent_by_wire(&self, taken: bool) -> bool {
        self.from_wire.set(self.from_wire.get() + u64::from(taken));
        self.batch.set(self.batch.get() + 1);
        if self.batch.get() == BATCH {
            self.wait();
        }
        taken
    }

    /// Waits until the polite frames sent after the last hostile one arrive: no more
    /// than a window of them was on its way before.
    fn wait(&self) {
        let before = self.arrived.now();
        eventually("the polite frames go on", || {
            let now = self.arrived.now();
            (0..2).all(|way| now[way] > before[way] + WINDOW).then_some(())
        });
        self.batch.set(0);
    }

    fn random<T>(&self, draw: impl FnOnce(&mut Random) -> T) -> T {
        draw(&mut self.random.borrow_mut())
    }
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

    /// A multicast bit would not matter: nothing here looks at addresses.
    fn address(&mut self) -> [u8; 6] {
        self.bytes(6).try_into().unwrap()
    }

    /// Every field drawn, small values more often than not: some fit the frame.
    fn header(&mut self) -> [u8; 10] {
        let mut word = |limit: usize| match self.below(4) {
            0 => self.next() as u16,
            _ => self.below(limit) as u16,
        };
        let header = Vnet {
            flags: 0,
            gso_type: 0,
            hdr_len: word(200),
            gso_size: word(1600),
            csum_start: word(80),
            csum_offset: word(24),
        };
        let flags = [0, 1, 1, 2, 3, 0xff][self.below(6)];
        // Not 3, UFO: it has tests of its own.
        let gso_type = [0, 1, 1, 4, 5, 0x81, 0x77][self.below(7)];
        Vnet { flags, gso_type, ..header }.bytes()
    }

    /// Random tags, then bytes of any kind or a packet that could be one.
    fn frame(&mut self, outer: Option<TagBytes>) -> Vec<u8> {
        let mut frame = self.bytes(12);
        let mut tags: Vec<u8> = Vec::new();
        for _ in 0..self.below(4) {
            tags.extend(TPIDS[self.below(4)].to_be_bytes());
            tags.extend(self.bytes(2));
        }
        if let Some(tag) = outer {
            frame.extend([tag.tpid.to_be_bytes(), tag.tci().to_be_bytes()].concat());
        }
        frame.extend(tags);
        let version = [Version::V4, Version::V6][self.below(2)];
        let length = self.below(3000);
        let inside = match self.below(4) {
            0 => self.bytes(length),
            1 => ip::udp(version, &self.bytes(length)).bytes()[12..].to_vec(),
            2 => Tunnel::Gre.frame(self.next() as u32 & 0xff, length).bytes()[12..].to_vec(),
            _ => ip::tcp(version, 1, &self.bytes(length)).bytes()[12..].to_vec(),
        };
        frame.extend(inside);
        // A byte here and there is not what it should be.
        for _ in 0..self.below(3) {
            let at = 20 + self.below(60);
            if let Some(byte) = frame.get_mut(at) {
                *byte = self.next() as u8;
            }
        }
        frame
    }
}

fn untagged(ether_type: u16, length: usize) -> Vec<u8> {
    let mut frame = Frame { ether_type, ..Frame::numbered(0) }.bytes();
    frame.resize(length, 0x5a);
    frame
}

/// Every frame of a flow went on or its receiver's queue was full.
fn assert_only_full(flow: &Flow) {
    assert_eq!(flow.in_frames, flow.out_frames + flow.dropped("guest_queue_full"), "{flow:?}");
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn random_bytes_with_random_headers() {
    let (summary, sent) = Scene::start("101=bad").endure(|field, _| {
        for _ in 0..BATCH / 2 {
            let (header, frame) = field.random(|random| (random.header(), random.frame(None)));
            field.guest(&header, &frame);
            let (header, frame) = field.random(|random| (random.header(), random.frame(Some(BAD))));
            field.wire(&frame);
            field.wire_with(&header, &frame);
        }
    });
    assert!(sent.iter().all(|frames| *frames > 1000), "the kernel refused nearly all: {sent:?}");
    let bad = summary.port("bad");
    for flow in [&bad.from_guest, &bad.to_guest] {
        assert!(flow.dropped("bad_offload") > 0 && flow.out_frames > 0, "{flow:?}");
    }
}

/// The kernel takes no frame shorter than its header, from neither side; what ends
/// inside a tag it throws away for 0x8100, and 0x9100 is left to us.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn runts() {
    let (summary, sent) = Scene::start("101=bad").endure(|field, _| {
        for length in 1..14 {
            let runt = untagged(EXPERIMENTAL, length);
            assert!(!field.guest(&PLAIN, &runt) && !field.wire(&runt), "{length} bytes");
        }
        for length in 14..60 {
            for ether_type in [EXPERIMENTAL, 0x8100, 0x88a8, 0x9100, 0x0800] {
                assert!(field.guest(&PLAIN, &untagged(ether_type, length)));
                let mut tagged = untagged(ether_type, length);
                tagged.splice(12..12, [0x81, 0, 0, 101]);
                assert!(field.wire(&tagged));
            }
        }
    });
    let cut = (ROUNDS * 4) as u64;
    assert_eq!(sent, [(ROUNDS * 46 * 5) as u64; 2]);
    let bad = summary.port("bad");
    assert_eq!(bad.from_guest.dropped("malformed"), cut, "0x9100 and 14 to 17 bytes");
    // Behind such a tag the kernel wants an EtherType and looks no further: 14 to 19.
    let untagged_by_kernel = (ROUNDS * 2 * 6) as u64;
    assert_eq!(bad.from_guest.in_frames, sent[0] - untagged_by_kernel);
    assert_eq!(bad.from_guest.all_drops(), cut);
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn giants_from_a_guest() {
    let (summary, sent) = Scene::start("101=bad").endure(|field, _| {
        for length in [1519, 2048, 9000, 30_000, 65_000, 65_535] {
            for _ in 0..20 {
                assert!(field.guest(&PLAIN, &untagged(EXPERIMENTAL, length)));
            }
        }
    });
    let flow = &summary.port("bad").from_guest;
    // Its own ring and queue for long frames may overflow: it alone pays for that.
    assert_eq!(flow.in_frames, sent[0]);
    assert_eq!(flow.dropped("too_long") + flow.dropped("ring_overrun"), sent[0], "{flow:?}");
    assert!(flow.dropped("too_long") > sent[0] / 4, "{flow:?}");
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn giants_from_the_wire() {
    let scene = Scene::start("101=bad");
    scene.lab.host.ip("link set up0 mtu 65535");
    scene.lab.far.ip("link set far0 mtu 65535");
    scene.lab.host.ip("link set bad mtu 1500");
    let (summary, sent) = scene.endure(|field, _| {
        for length in [1515, 2048, 9000, 30_000, 65_000] {
            for _ in 0..20 {
                let mut giant = untagged(EXPERIMENTAL, length);
                giant.splice(12..12, [0x81, 0, 0, 101]);
                assert!(field.wire(&giant));
            }
        }
    });
    let flow = &summary.port("bad").to_guest;
    assert_eq!((flow.in_frames, flow.dropped("too_long")), (sent[1], sent[1]), "{flow:?}");
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn tags_ten_deep() {
    let deep: Vec<TagBytes> = (0..10).map(|depth| tag(TPIDS[depth % 4], 400)).collect();
    let outgoing = Frame::numbered(7).tags(&deep).reversed().bytes();
    let incoming = Frame::numbered(8).tags(&[&[BAD], &deep[..]].concat()).bytes();
    let (summary, sent) = Scene::start("101=bad").endure(|field, round| {
        for _ in 0..BATCH {
            assert!(field.guest(&PLAIN, &outgoing));
            field.wire(&incoming);
        }
        // Read in every third round: the one here is the first since.
        if round % 3 == 0 {
            let got = eventually("it arrives", || read_tap(field.tap).unwrap());
            assert_eq!(Frame::read(&got[10..]), Frame::numbered(8).tags(&deep));
        }
    });
    let bad = summary.port("bad");
    assert_eq!(bad.from_guest.in_frames, sent[0]);
    assert_eq!(bad.from_guest.out_frames + bad.from_guest.dropped("ring_overrun"), sent[0]);
    assert_eq!(bad.to_guest.in_frames, sent[1]);
    assert_only_full(&bad.to_guest);
}

/// All VIDs there are, from a trunk's guest and from the wire, mapped or not.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn every_vid_in_turn() {
    let trunk = 200..=210;
    let taken = RefCell::new(vec![0u64; 4096]);
    let (summary, sent) = Scene::start("200-210=bad").endure(|field, _| {
        for vid in 0..4096 {
            for tpid in [0x8100, 0x88a8] {
                let tagged = Frame::numbered(0).tags(&[tag(tpid, vid)]).bytes();
                assert!(field.guest(&PLAIN, &tagged));
                // That one is the polite pair's, whose numbers would be upset.
                if vid != GOOD.vid && field.wire(&tagged) && tpid == 0x8100 {
                    taken.borrow_mut()[usize::from(vid)] += 1;
                }
            }
        }
    });
    let flow = &summary.port("bad").from_guest;
    let allowed = (ROUNDS * 11) as u64;
    let overrun = flow.dropped("ring_overrun");
    assert_eq!(flow.in_frames, sent[0]);
    assert!(flow.out_frames <= allowed && flow.out_frames + overrun >= allowed, "{flow:?}");
    let refused = flow.dropped("vlan_not_allowed") + flow.dropped("untagged_on_trunk");
    assert_eq!(flow.out_frames + refused + overrun, sent[0], "{flow:?}");
    let taken = taken.into_inner();
    for vid in (1..4095).filter(|vid| !trunk.contains(vid) && *vid != GOOD.vid) {
        let counted = summary.unmapped.get(&(0x8100, vid)).copied();
        assert_eq!(counted, Some(taken[usize::from(vid)]), "VID {vid}");
    }
    let mapped: u64 = trunk.map(|vid| taken[usize::from(vid)]).sum();
    assert_eq!(summary.port("bad").to_guest.in_frames, mapped);
    assert_only_full(&summary.port("bad").to_guest);
}

/// Addresses nobody has seen before, and broadcasts: a switch that learns or filters
/// would fill a table; this one only passes them on.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn address_floods_and_broadcast_storms() {
    let (summary, sent) = Scene::start("101=bad").endure(|field, round| {
        for _ in 0..2 * BATCH {
            let [mut destination, source] =
                field.random(|random| [random.address(), random.address()]);
            if round % 2 == 0 {
                destination = [0xff; 6];
            }
            let frame = Frame { destination, source, ..Frame::numbered(1) };
            assert!(field.guest(&PLAIN, &frame.bytes()));
            field.wire(&frame.tags(&[BAD]).bytes());
        }
    });
    let bad = summary.port("bad");
    let flow = &bad.from_guest;
    assert_eq!(flow.in_frames, sent[0]);
    assert_eq!(flow.out_frames + flow.dropped("ring_overrun"), sent[0], "{flow:?}");
    assert_eq!(bad.to_guest.in_frames, sent[1]);
    assert_only_full(&bad.to_guest);
}

/// Super-frames that only userspace can cut, into as many segments as it takes: the
/// dearest frames a guest can send.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn super_frames_of_very_many_segments() {
    // 64 bytes a segment is as small as it gets for 64 KiB, 8 for a frame in a slot.
    let kinds = [(64_000usize, 64u16), (1900, 8)];
    let expected = Cell::new(0);
    let (summary, sent) = Scene::start("101=bad").endure(|field, _| {
        for (length, gso_size) in kinds {
            // IPv4 in IPv4: the kernel that is to send it would lose it.
            let frame = Tunnel::Ipip.frame(1, length).bytes();
            let (csum_start, csum_offset) = (54, 16);
            let header =
                Vnet { flags: 1, gso_type: 1, hdr_len: 74, gso_size, csum_start, csum_offset };
            for _ in 0..if length > 2000 { 8 } else { 32 } {
                assert!(field.guest(&header.bytes(), &frame));
                expected.set(expected.get() + length.div_ceil(usize::from(gso_size)) as u64);
            }
        }
    });
    let flow = &summary.port("bad").from_guest;
    assert_eq!(flow.in_frames, sent[0]);
    // It waits its turn, and its queue for long frames holds only so many meanwhile.
    let overrun = flow.dropped("ring_overrun");
    assert_eq!(flow.out_frames + overrun, flow.in_frames + flow.split_frames, "{flow:?}");
    assert!(flow.out_frames <= expected.get() && flow.split_frames > 50_000, "{flow:?}");
}

/// A super-frame of old guests (UFO): Linux takes it from a tap, and a ring with virtio
/// headers cannot describe it.
fn ufo(tags: &[TagBytes]) -> Vec<u8> {
    let (header, frame) = ip::partial(&ip::udp(Version::V4, &[7; 3000]), Version::V4, 1000);
    let header = Vnet { gso_type: 3, ..header }.behind_tags(tags.len());
    [&header.bytes()[..], &frame.tags(tags).bytes()].concat()
}

/// The kernel keeps such a frame's slot for ever, and drops all that follow: the ring is
/// opened again, and the others do not notice.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_super_frame_that_blocks_its_ring() {
    let Scene { lab, daemon, tap } = Scene::start("101=bad");
    let good = lab.raw_guest("good");
    daemon.attached(&["bad", "good"]);
    let wire = lab.wire();
    wire.only_vid(BAD.vid);
    both_ways(&lab, &good, GOOD, |_| {
        for round in 1..=2 {
            (&tap).write_all(&ufo(&[])).unwrap();
            let frame = Frame::numbered(round).reversed();
            eventually("the guest is heard again", || {
                write_tap(&tap, &PLAIN, &frame.bytes()).unwrap();
                let bytes = wire.receive_within(Duration::from_millis(50))?;
                (Frame::read(&bytes).number() == round).then_some(())
            });
        }
    });
    let said = daemon.stderr();
    let said: Vec<&String> = said.iter().filter(|line| line.contains("stopped filling")).collect();
    assert_eq!(said.len(), 2, "{said:?}");
    let summary = daemon.stop();
    assert!(summary.port("bad").from_guest.dropped("ring_overrun") >= 2, "{summary:?}");
    let good = summary.port("good");
    assert_eq!(good.to_guest.all_drops() + good.from_guest.all_drops(), 0, "{good:?}");
}

/// The same from a wire that can carry it: the uplink of a host that is a guest itself. Of
/// several workers the others' rings go on, which does not hide it.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_super_frame_that_blocks_the_uplink() {
    blocks_the_uplink("1");
    blocks_the_uplink("2");
}

fn blocks_the_uplink(workers: &str) {
    let lab = Lab::new();
    let uplink = lab.host.enter(|| open_tap("nic0", 0, OFFLOAD_TCP)).unwrap();
    lab.host.ip("link set nic0 up");
    let maps = ["--map", "101=one", "--map", "102=other", "--workers", workers];
    let start = ["--uplink", "nic0", "--log-format", "json"];
    let daemon = Daemon::start(&lab.host, &[&start, &maps[..]].concat());
    let [one, _other] = ["one", "other"].map(|name| lab.raw_guest(name));
    daemon.attached(&["one", "other"]);
    (&uplink).write_all(&ufo(&[BAD])).unwrap();
    let frame = Frame::numbered(5);
    eventually("the wire is heard again", || {
        for tag in [BAD, GOOD] {
            write_tap(&uplink, &PLAIN, &frame.clone().tags(&[tag]).bytes()).unwrap();
        }
        let bytes = one.receive_within(Duration::from_millis(50))?;
        (Frame::read(&bytes) == frame).then_some(())
    });
    // The line comes after the frame.
    eventually(&format!("it is told, with {workers} workers"), || {
        daemon.stderr().iter().any(|line| line.contains("stopped filling")).then_some(())
    });
    daemon.settled();
    daemon.stop();
}
