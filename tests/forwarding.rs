//! Every frame to its port and back: modes, tags, priorities, transparency, order,
//! lengths, isolation. Frames are compared byte for byte.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::frames::{Frame, GUEST_MAC, PEER_MAC, TPIDS, TagBytes, tag};
use lab::{Daemon, Lab, RawGuest, Wire};
use std::collections::{BTreeMap, HashMap};

/// What becomes of a frame.
#[derive(Debug, Clone, PartialEq)]
enum Fate {
    /// It arrives with these tags.
    Arrives(Vec<TagBytes>),
    /// It is counted under this reason.
    Dropped(&'static str),
    /// It is the host's.
    NotOurs,
}

use Fate::{Arrives, Dropped, NotOurs};

/// One row of the modes table: a frame with `sent` tags to or from `port`.
#[derive(Debug, Clone)]
struct Row {
    port: &'static str,
    sent: Vec<TagBytes>,
    fate: Fate,
}

fn row(port: &'static str, sent: &[TagBytes], fate: Fate) -> Row {
    Row { port, sent: sent.to_vec(), fate }
}

/// The ports at test, for `--tpid TPID`: VLANs and options by device name.
const PORTS: [(&str, &str); 12] = [
    ("tunnel", "10=tunnel"),
    ("access", "20=access,mode=access"),
    ("trunk", "30-32,35=trunk"),
    ("native", "40-41=native,native=40"),
    ("double", "50.5=double"),
    ("dblaccess", "50.6=dblaccess,mode=access"),
    ("pcp", "60=pcp,pcp=5"),
    ("copy", "61=copy,pcp=copy"),
    ("accpcp", "62=accpcp,mode=access,pcp=3"),
    ("natpcp", "70-71=natpcp,native=70,pcp=6"),
    ("dblcopy", "80.8=dblcopy,pcp=copy"),
    ("sinner", "90.9=sinner,inner-tpid=0x88a8,pcp=2"),
];

/// From the wire, uplink TPID `t`, priority `p` in every tag, `x` any other TPID.
fn rows_from_wire(t: u16, p: u8, x: u16) -> Vec<Row> {
    let outer = |vid| tag(t, vid).priority(p);
    let other = |vid| tag(x, vid).priority(p ^ 0xf);
    let c = |vid| tag(0x8100, vid).priority(p);
    let nothing = || Arrives(vec![]);
    let mut rows = vec![
        row("tunnel", &[outer(10)], nothing()),
        row("tunnel", &[outer(10), other(77)], Arrives(vec![other(77)])),
        row("tunnel", &[outer(10), other(0)], Arrives(vec![other(0)])),
        row("tunnel", &[outer(10), other(10), c(5)], Arrives(vec![other(10), c(5)])),
        row("access", &[outer(20)], nothing()),
        row("access", &[outer(20), other(77)], Dropped("inner_tag")),
        row("access", &[outer(20), other(0)], Dropped("inner_tag")),
        row("trunk", &[outer(30)], Arrives(vec![outer(30)])),
        row("trunk", &[outer(32)], Arrives(vec![outer(32)])),
        row("trunk", &[outer(35)], Arrives(vec![outer(35)])),
        row("trunk", &[outer(33)], NotOurs),
        row("trunk", &[outer(31), other(7)], Arrives(vec![outer(31), other(7)])),
        row("native", &[outer(40)], nothing()),
        row("native", &[outer(40), other(7)], Arrives(vec![other(7)])),
        row("native", &[outer(41)], Arrives(vec![outer(41)])),
        row("double", &[outer(50), c(5)], nothing()),
        row("double", &[outer(50), c(5), other(9)], Arrives(vec![other(9)])),
        row("dblaccess", &[outer(50), c(6)], nothing()),
        row("dblaccess", &[outer(50), c(6), other(9)], Dropped("inner_tag")),
        row("pcp", &[outer(60)], nothing()),
        row("copy", &[outer(61)], nothing()),
        row("accpcp", &[outer(62)], nothing()),
        row("natpcp", &[outer(70)], nothing()),
        row("natpcp", &[outer(71)], Arrives(vec![outer(71)])),
        row("dblcopy", &[outer(80), c(8)], nothing()),
        row("sinner", &[outer(90), tag(0x88a8, 9).priority(p)], nothing()),
        row("tunnel", &[outer(11)], NotOurs),
        row("tunnel", &[outer(4094)], NotOurs),
        row("tunnel", &[], NotOurs),
    ];
    if x != t {
        // The TPID is part of the key.
        rows.push(row("tunnel", &[tag(x, 10)], NotOurs));
        rows.push(row("trunk", &[tag(x, 30)], NotOurs));
    }
    rows
}

/// From the guests, likewise.
fn rows_from_guests(t: u16, p: u8, x: u16) -> Vec<Row> {
    let ours = |vid| tag(t, vid);
    let with_p = |vid| tag(t, vid).priority(p);
    let guests = |vid| tag(x, vid).priority(p);
    let c = |vid| tag(0x8100, vid);
    // PCP 5, 3, 6 and 2, DEI 0, as the fields stand in the tag.
    let (five, three, six, two) = (5 << 1, 3 << 1, 6 << 1, 2 << 1);
    let mut rows = vec![
        row("tunnel", &[], Arrives(vec![ours(10)])),
        row("tunnel", &[guests(0)], Arrives(vec![ours(10), guests(0)])),
        row("tunnel", &[guests(77)], Arrives(vec![ours(10), guests(77)])),
        row("tunnel", &[guests(77), c(5)], Arrives(vec![ours(10), guests(77), c(5)])),
        row("access", &[], Arrives(vec![ours(20)])),
        row("access", &[guests(0)], Arrives(vec![with_p(20)])),
        row("access", &[guests(20)], Dropped("tagged_on_access")),
        row("access", &[guests(7)], Dropped("tagged_on_access")),
        row("trunk", &[], Dropped("untagged_on_trunk")),
        row("trunk", &[guests(0)], Dropped("untagged_on_trunk")),
        row("trunk", &[with_p(30)], Arrives(vec![with_p(30)])),
        row("trunk", &[with_p(35)], Arrives(vec![with_p(35)])),
        row("trunk", &[with_p(31), guests(9)], Arrives(vec![with_p(31), guests(9)])),
        row("trunk", &[with_p(33)], Dropped("vlan_not_allowed")),
        row("trunk", &[with_p(10)], Dropped("vlan_not_allowed")),
        row("native", &[], Arrives(vec![ours(40)])),
        row("native", &[guests(0)], Arrives(vec![with_p(40)])),
        row("native", &[with_p(41)], Arrives(vec![with_p(41)])),
        row("native", &[with_p(42)], Dropped("vlan_not_allowed")),
        row("double", &[], Arrives(vec![ours(50), c(5)])),
        row("double", &[guests(3)], Arrives(vec![ours(50), c(5), guests(3)])),
        row("dblaccess", &[], Arrives(vec![ours(50), c(6)])),
        row("dblaccess", &[guests(3)], Dropped("tagged_on_access")),
        row("pcp", &[], Arrives(vec![ours(60).priority(five)])),
        row("pcp", &[guests(7)], Arrives(vec![ours(60).priority(five), guests(7)])),
        row("copy", &[], Arrives(vec![ours(61)])),
        row("copy", &[guests(7)], Arrives(vec![with_p(61), guests(7)])),
        row("copy", &[guests(0)], Arrives(vec![with_p(61), guests(0)])),
        row("accpcp", &[], Arrives(vec![ours(62).priority(three)])),
        row("accpcp", &[guests(0)], Arrives(vec![with_p(62)])),
        row("natpcp", &[], Arrives(vec![ours(70).priority(six)])),
        row("natpcp", &[guests(0)], Arrives(vec![with_p(70)])),
        row("natpcp", &[with_p(71)], Arrives(vec![with_p(71)])),
        row("dblcopy", &[], Arrives(vec![ours(80), c(8)])),
        row("dblcopy", &[guests(4)], Arrives(vec![with_p(80), c(8).priority(p), guests(4)])),
        row("sinner", &[], Arrives(vec![ours(90).priority(two), tag(0x88a8, 9).priority(two)])),
    ];
    if x != t {
        rows.push(row("trunk", &[tag(x, 30)], Dropped("vlan_not_allowed")));
    }
    rows
}

/// A frame that surely arrives at each port, and with what tags it left.
fn sentinel_tags(t: u16, port: &str) -> Vec<TagBytes> {
    match port {
        "tunnel" => vec![tag(t, 10)],
        "access" => vec![tag(t, 20)],
        "trunk" => vec![tag(t, 30)],
        "native" => vec![tag(t, 40)],
        "double" => vec![tag(t, 50), tag(0x8100, 5)],
        "dblaccess" => vec![tag(t, 50), tag(0x8100, 6)],
        "pcp" => vec![tag(t, 60)],
        "copy" => vec![tag(t, 61)],
        "accpcp" => vec![tag(t, 62)],
        "natpcp" => vec![tag(t, 70)],
        "dblcopy" => vec![tag(t, 80), tag(0x8100, 8)],
        "sinner" => vec![tag(t, 90), tag(0x88a8, 9)],
        other => panic!("{other}"),
    }
}

/// Numbers of sentinels, far from those of frames under test.
const SENTINEL: u64 = 1 << 40;

struct Modes {
    lab: Lab,
    guests: HashMap<&'static str, RawGuest>,
    wire: Wire,
    daemon: Daemon,
    number: u64,
    expected_drops: BTreeMap<(&'static str, &'static str, &'static str), u64>,
    expected_unmapped: BTreeMap<(u16, u16), u64>,
}

impl Modes {
    fn new(tpid: u16) -> Self {
        let lab = Lab::new();
        // Room for three tags, so that length is no matter here.
        lab.host.ip("link set up0 mtu 2000");
        let tpid = format!("{tpid:#06x}");
        let mut arguments = vec!["--tpid", &tpid];
        for (_, map) in PORTS {
            arguments.extend(["--map", map]);
        }
        let daemon = lab.daemon(&arguments);
        let names: Vec<&str> = PORTS.iter().map(|(name, _)| *name).collect();
        let guests: HashMap<_, _> = names.iter().map(|name| (*name, lab.raw_guest(name))).collect();
        daemon.attached(&names);
        let wire = lab.wire();
        Self {
            lab,
            guests,
            wire,
            daemon,
            number: 0,
            expected_drops: BTreeMap::new(),
            expected_unmapped: BTreeMap::new(),
        }
    }

    fn next(&mut self) -> Frame {
        self.number += 1;
        Frame::numbered(self.number)
    }

    fn wire_rows(&mut self, t: u16, rows: &[Row]) {
        let mut expected: HashMap<&str, Vec<Frame>> = HashMap::new();
        for row in rows {
            let frame = self.next();
            self.wire.send(&frame.clone().tags(&row.sent));
            match &row.fate {
                Arrives(tags) => expected.entry(row.port).or_default().push(frame.tags(tags)),
                Dropped(reason) => {
                    *self.expected_drops.entry((row.port, "to_guest", reason)).or_default() += 1
                }
                NotOurs => {
                    if let Some(outer) = row.sent.first() {
                        *self.expected_unmapped.entry((outer.tpid, outer.vid)).or_default() += 1;
                    }
                }
            }
        }
        for (name, _) in PORTS {
            let sentinel = Frame::numbered(SENTINEL).tags(&sentinel_tags(t, name));
            self.wire.send(&sentinel);
        }
        for (name, _) in PORTS {
            let mut got = self.guests[name].receive_until(SENTINEL);
            got.pop();
            let expected = expected.remove(name).unwrap_or_default();
            assert_eq!(got, expected, "what arrived at {name}, and what had to");
        }
    }

    fn guest_rows(&mut self, t: u16, rows: &[Row]) {
        // The order of different guests' frames on the wire is nobody's promise.
        let mut expected: HashMap<u64, Frame> = HashMap::new();
        for row in rows {
            let frame = self.next().reversed();
            self.guests[row.port].send(&frame.clone().tags(&row.sent));
            match &row.fate {
                Arrives(tags) => {
                    expected.insert(frame.number(), frame.tags(tags));
                }
                Dropped(reason) => {
                    *self.expected_drops.entry((row.port, "from_guest", reason)).or_default() += 1
                }
                NotOurs => panic!("guests have no such frames"),
            }
        }
        for (number, (name, _)) in PORTS.iter().enumerate() {
            let sentinel = Frame::numbered(SENTINEL + number as u64).reversed();
            let trunk = *name == "trunk";
            let tags = if trunk { vec![tag(t, 30)] } else { vec![] };
            self.guests[name].send(&sentinel.tags(&tags));
        }
        let mut sentinels = 0;
        while sentinels < PORTS.len() {
            let bytes = self.wire.receive_within(lab::PATIENCE);
            let bytes = bytes.unwrap_or_else(|| panic!("never came: {expected:?}"));
            let frame = Frame::read(&bytes);
            if frame.number() >= SENTINEL {
                sentinels += 1;
                continue;
            }
            let wanted = expected.remove(&frame.number());
            assert_eq!(Some(&frame), wanted.as_ref(), "what came, and what had to");
            assert_eq!(bytes, frame.bytes());
        }
        assert!(expected.is_empty(), "never came: {expected:?}");
    }

    fn finish(self) {
        let Self { daemon, lab, expected_drops, expected_unmapped, .. } = self;
        let summary = daemon.stop();
        let mut drops = BTreeMap::new();
        for port in &summary.ports {
            let name = PORTS.iter().find(|(name, _)| *name == port.name).unwrap().0;
            for (direction, flow) in
                [("from_guest", &port.from_guest), ("to_guest", &port.to_guest)]
            {
                for (reason, frames) in &flow.drops {
                    let reason =
                        lab::summary::REASONS.iter().find(|known| *known == reason).unwrap();
                    drops.insert((name, direction, *reason), *frames);
                }
            }
        }
        assert_eq!(drops, expected_drops);
        for (vlan, frames) in &expected_unmapped {
            assert_eq!(summary.unmapped.get(vlan), Some(frames), "{vlan:04x?}");
        }
        drop(lab);
    }
}

fn modes(tpid: u16) {
    let mut modes = Modes::new(tpid);
    // All of them, or 0, 5, 10 and 15: each bit on and off.
    let step = if lab::scaled(16) < 16 { 5 } else { 1 };
    for priority in (0..16).step_by(step) {
        for other in TPIDS {
            modes.wire_rows(tpid, &rows_from_wire(tpid, priority, other));
            modes.guest_rows(tpid, &rows_from_guests(tpid, priority, other));
        }
    }
    modes.finish();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn modes_with_tpid_0x8100() {
    modes(0x8100);
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn modes_with_tpid_0x88a8() {
    modes(0x88a8);
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn modes_with_tpid_0x9100() {
    modes(0x9100);
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn modes_with_tpid_0x9200() {
    modes(0x9200);
}

/// One port on `map`, with its guest attached.
fn single(lab: &Lab, arguments: &[&str], tap: &str) -> (Daemon, RawGuest) {
    let daemon = lab.daemon(arguments);
    let guest = lab.raw_guest(tap);
    daemon.attached(&[tap]);
    (daemon, guest)
}

/// VLAN 0: what carries no VLAN goes to the guest, and comes back untagged.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn vlan_0_takes_untagged_and_priority_tagged_frames() {
    let lab = Lab::new();
    let maps = ["--map", "0=t0,mode=access", "--map", "5=t5"];
    let (daemon, guest) = single(&lab, &maps, "t0");
    let wire = lab.wire();
    // The host's stack sees the same frames: they are not taken from it.
    let host = Wire::with_protocol(&lab.host, "up0", lab::frames::EXPERIMENTAL);
    let frame = Frame::numbered;
    wire.send(&frame(1));
    wire.send(&frame(2).tags(&[tag(0x8100, 0)]));
    wire.send(&frame(3).tags(&[tag(0x8100, 0).priority(0xa)]));
    wire.send(&frame(4).tags(&[tag(0x8100, 9)]));
    wire.send(&frame(5).tags(&[tag(0x8100, 0), tag(0x8100, 9)]));
    wire.send(&frame(6));
    let got = guest.receive_until(6);
    assert_eq!(got, [frame(1), frame(2), frame(3), frame(6)]);
    let seen: Vec<u64> = host.receive_until(6).iter().map(Frame::number).collect();
    assert!(seen.contains(&1) && seen.contains(&6), "{seen:?}");

    guest.send(&frame(7).reversed());
    guest.send(&frame(8).reversed().tags(&[tag(0x8100, 0).priority(0xc)]));
    guest.send(&frame(9).reversed().tags(&[tag(0x8100, 5)]));
    guest.send(&frame(10).reversed());
    let got = wire.receive_until(10);
    let priority_tagged = frame(8).reversed().tags(&[tag(0x8100, 0).priority(0xc)]);
    assert_eq!(got, [frame(7).reversed(), priority_tagged, frame(10).reversed()]);
    let summary = daemon.stop();
    assert_eq!(summary.port("t0").to_guest.dropped("inner_tag"), 1);
    assert_eq!(summary.port("t0").from_guest.dropped("tagged_on_access"), 1);
    assert_eq!(summary.unmapped.get(&(0x8100, 9)), Some(&1));
}

/// The TPID is part of the key: one VID, four devices.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn one_vid_under_four_tpids_is_four_vlans() {
    let lab = Lab::new();
    lab.host.ip("link set up0 mtu 1600");
    let maps: Vec<String> =
        TPIDS.iter().map(|tpid| format!("100=t{tpid:x},tpid={tpid:#x}")).collect();
    let arguments: Vec<&str> = maps.iter().flat_map(|map| ["--map", map]).collect();
    let names: Vec<String> = TPIDS.iter().map(|tpid| format!("t{tpid:x}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let daemon = lab.daemon(&arguments);
    let guests: Vec<RawGuest> = names.iter().map(|name| lab.raw_guest(name)).collect();
    daemon.attached(&names);
    let wire = lab.wire();
    for (number, tpid) in TPIDS.iter().enumerate() {
        let number = number as u64;
        wire.send(&Frame::numbered(number).tags(&[tag(*tpid, 100)]));
        let got = guests[number as usize].receive_until(number);
        assert_eq!(got, [Frame::numbered(number)]);
        guests[number as usize].send(&Frame::numbered(number).reversed());
        let got = wire.receive_until(number);
        assert_eq!(got, [Frame::numbered(number).reversed().tags(&[tag(*tpid, 100)])]);
    }
    let summary = daemon.stop();
    assert!(summary.ports.iter().all(|port| port.to_guest.out_frames == 1));
}

/// Frames of VLANs nobody mapped stay the host's, and its own traffic goes on.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn frames_of_other_vlans_are_left_to_the_host_and_counted() {
    let lab = Lab::new();
    lab.host.ip("address add 10.9.0.1/24 dev up0");
    lab.far.ip("address add 10.9.0.2/24 dev far0");
    let (daemon, guest) = single(&lab, &["--map", "101=t0"], "t0");
    let wire = lab.wire();
    let host = Wire::open(&lab.host, "up0");
    let stacks = [
        vec![tag(0x8100, 7)],
        vec![tag(0x8100, 4094).priority(6)],
        vec![tag(0x88a8, 101)],
        vec![tag(0x9100, 101)],
        vec![tag(0x8100, 7), tag(0x8100, 101)],
        vec![],
    ];
    for (number, tags) in stacks.iter().enumerate() {
        wire.send(&Frame::numbered(number as u64).tags(tags));
    }
    let last = stacks.len() as u64;
    wire.send(&Frame::numbered(last).tags(&[tag(0x8100, 101)]));
    assert_eq!(guest.receive_until(last), [Frame::numbered(last)]);
    let seen = host.receive_until(last);
    for (number, tags) in stacks.iter().enumerate() {
        let frame = Frame::numbered(number as u64).tags(tags);
        assert!(seen.contains(&frame), "{frame:?} in {seen:?}");
    }
    lab.far.tool("ping", "-c 3 -i 0.1 -W 5 10.9.0.1");
    let summary = daemon.stop();
    assert_eq!(summary.unmapped.get(&(0x8100, 7)), Some(&2));
    assert_eq!(summary.unmapped.get(&(0x8100, 4094)), Some(&1));
    assert_eq!(summary.unmapped.get(&(0x88a8, 101)), Some(&1));
    assert_eq!(summary.unmapped.get(&(0x9100, 101)), Some(&1));
    assert_eq!(summary.unmapped.len(), 4, "{:?}", summary.unmapped);
    assert_eq!(summary.port("t0").to_guest.in_frames, 1);
}

/// Guests meet on the wire or not at all.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn guests_never_reach_each_other_inside_the_switch() {
    let lab = Lab::new();
    let (daemon, first) = single(&lab, &["--map", "1=t1", "--map", "2=t2"], "t1");
    let second = lab.raw_guest("t2");
    daemon.attached(&["t1", "t2"]);
    let wire = lab.wire();
    let everybody = [0xff; 6];
    first.send(&Frame::numbered(1).to(everybody));
    first.send(&Frame::numbered(2).to(GUEST_MAC));
    second.send(&Frame::numbered(3).to(everybody));
    let mut arrived = Vec::new();
    while arrived.len() < 3 {
        let bytes = wire.receive_within(lab::PATIENCE).expect("three frames");
        arrived.push(Frame::read(&bytes));
    }
    for (guest, vid) in [(&first, 1), (&second, 2)] {
        wire.send(&Frame::numbered(9).tags(&[tag(0x8100, vid)]));
        assert_eq!(guest.receive_until(9), [Frame::numbered(9)]);
    }
    daemon.stop();
}

/// Both ways, unchanged: what a switch of the host would filter, learn or answer.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn every_destination_source_and_ether_type_passes() {
    let lab = Lab::new();
    let (daemon, guest) = single(&lab, &["--map", "101=t0"], "t0");
    let wire = lab.wire();
    let mut frames = Vec::new();
    let mut add = |frame: Frame| {
        let number = frames.len() as u64;
        let numbered = Frame::numbered(number);
        frames.push(Frame { payload: numbered.payload, ..frame });
    };
    let plain = Frame::numbered(0);
    // More groups than any NIC filter holds: IPv4 and IPv6 multicast.
    for group in 0..200u8 {
        add(plain.clone().to([0x01, 0x00, 0x5e, 0x7f, 0x01, group]));
        add(plain.clone().to([0x33, 0x33, 0xff, 0x00, 0x02, group]));
    }
    // The addresses bridges must not forward (IEEE 802.1Q clause 8.6.3): BPDUs,
    // pause frames, LACP, 802.1X, LLDP and the rest of the block.
    for last in 0..=0x2f {
        for ether_type in [0x88cc, 0x8809, 0x8808, 0x888e, 0x0026] {
            add(Frame { ether_type, ..plain.clone().to([0x01, 0x80, 0xc2, 0, 0, last]) });
        }
    }
    for ether_type in (0..=0xffff).step_by(191).chain([0x05dc, 0x0600, 0x86dd]) {
        if !TPIDS.contains(&ether_type) {
            add(Frame { ether_type, ..plain.clone() });
        }
    }
    for source in [[0; 6], [0xff; 6], PEER_MAC, GUEST_MAC, [1, 0, 0x5e, 0, 0, 1]] {
        add(Frame { source, ..plain.clone() });
    }
    for last in 0..=255 {
        let source = [0x02, 0, 0, 0, 0x77, last];
        add(Frame { source, ..plain.clone() });
    }
    add(plain.clone().to([0xff; 6]));
    add(plain.to(lab::UPLINK_MAC));
    // Few at a time: a guest's queue must not be what is tested.
    for batch in frames.chunks(100) {
        let last = batch.last().unwrap().number();
        for frame in batch {
            wire.send(&frame.clone().tags(&[tag(0x8100, 101)]));
        }
        assert_eq!(guest.receive_until(last), batch);
        for frame in batch {
            guest.send(frame);
        }
        let tagged: Vec<Frame> =
            batch.iter().map(|frame| frame.clone().tags(&[tag(0x8100, 101)])).collect();
        assert_eq!(wire.receive_until(last), tagged);
    }
    let summary = daemon.stop();
    assert_eq!(summary.port("t0").to_guest.all_drops(), 0);
    assert_eq!(summary.port("t0").from_guest.all_drops(), 0);
}

/// Frames below Ethernet's minimum pass as they are, and those that end inside a
/// tag are counted; nothing stops.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn short_frames_pass_and_cut_off_ones_are_counted() {
    let lab = Lab::new();
    let maps = ["--map", "101=t0", "--map", "7=t7,tpid=0x9100"];
    let (daemon, guest) = single(&lab, &maps, "t0");
    let wire = lab.wire();
    let other = lab.raw_guest("t7");
    daemon.attached(&["t7"]);
    let head = Frame::numbered(0).bytes();
    for length in 14..60 {
        let payload = head[14..length].to_vec();
        let frame = Frame { payload, ..Frame::numbered(0) };
        let ports = [(&guest, tag(0x8100, 101)), (&other, tag(0x9100, 7))];
        for (guest, tag) in ports {
            // A kernel that receives a C-tag wants two bytes behind it, else it drops
            // the frame before anybody sees it; the far end's would do so as well.
            if tag.tpid == 0x8100 && length < 16 {
                continue;
            }
            guest.send(&frame);
            let got = wire.receive_within(lab::PATIENCE);
            let got = got.unwrap_or_else(|| panic!("{length} bytes, {tag:?}"));
            assert_eq!(Frame::read(&got), frame.clone().tags(&[tag]));
            wire.send(&frame.clone().tags(&[tag]));
            let got = guest.receive_within(lab::PATIENCE);
            let got = got.unwrap_or_else(|| panic!("{length} bytes, {tag:?}"));
            assert_eq!(got, frame.bytes());
        }
    }
    // Ends inside its tag, or right behind it: no EtherType follows.
    let mut cut = 0;
    for tpid in [[0x91, 0x00], [0x92, 0x00]] {
        for length in 14..18 {
            let mut bytes = head[..length].to_vec();
            bytes[12..14].copy_from_slice(&tpid);
            guest.send_bytes(&bytes);
            cut += 1;
        }
    }
    // From the wire as well, and C-tags that the kernel may refuse by itself.
    for tpid in [[0x81, 0x00], [0x88, 0xa8], [0x91, 0x00]] {
        for length in 14..18 {
            let mut bytes = head[..length].to_vec();
            bytes[12..14].copy_from_slice(&tpid);
            wire.send_bytes(&bytes);
        }
    }
    guest.send(&Frame::numbered(1).reversed());
    let got = wire.receive_until(1);
    assert_eq!(got.len(), 1, "{got:?}");
    wire.send(&Frame::numbered(2).tags(&[tag(0x8100, 101)]));
    assert_eq!(guest.receive_until(2), [Frame::numbered(2)]);
    let summary = daemon.stop();
    assert_eq!(summary.port("t0").from_guest.dropped("malformed"), cut);
}

/// Length limits: without room the frame is counted, with room it passes.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn full_size_frames_pass_where_the_mtu_allows() {
    const CASES: [(&str, &[TagBytes], u32); 6] = [
        ("100=t0", &[tag(0x8100, 100)], 1500),
        ("100=t0,tpid=0x88a8", &[tag(0x88a8, 100)], 1504),
        ("100=t0,tpid=0x9100", &[tag(0x9100, 100)], 1504),
        ("100.20=t0", &[tag(0x8100, 100), tag(0x8100, 20)], 1504),
        ("100.20=t0,tpid=0x88a8", &[tag(0x88a8, 100), tag(0x8100, 20)], 1508),
        ("100.20=t0,tpid=0x9200,inner-tpid=0x9100", &[tag(0x9200, 100), tag(0x9100, 20)], 1508),
    ];
    let full = |number| Frame::numbered(number).untagged_length(1514);
    for (map, tags, needed) in CASES {
        let lab = Lab::new();
        let (daemon, guest) = single(&lab, &["--map", map], "t0");
        let wire = lab.wire();
        guest.send(&full(1).reversed());
        guest.send(&Frame::numbered(2).reversed());
        let got = wire.receive_until(2);
        let fits = needed == 1500;
        assert_eq!(got.len(), if fits { 2 } else { 1 }, "{map}: {got:?}");
        let summary = daemon.stop();
        let too_long = summary.port("t0").from_guest.dropped("too_long");
        assert_eq!(too_long, u64::from(!fits), "{map}");
        assert_eq!(mtu(&lab), 1500, "nothing was asked for");

        drop(guest);
        let (daemon, guest) = single(&lab, &["--map", map, "--set-uplink-mtu"], "t0");
        assert!(mtu(&lab) >= needed, "{map}: {}", mtu(&lab));
        guest.send(&full(3).reversed());
        assert_eq!(wire.receive_until(3), [full(3).reversed().tags(tags)], "{map}");
        wire.send(&full(4).tags(tags));
        assert_eq!(guest.receive_until(4), [full(4)], "{map}");
        let summary = daemon.stop();
        assert_eq!(summary.port("t0").from_guest.dropped("too_long"), 0);
        assert_eq!(mtu(&lab), 1500, "the uplink's MTU is as it was");
    }
}

fn mtu(lab: &Lab) -> u32 {
    lab.host.link("up0").unwrap()["mtu"].as_u64().unwrap() as u32
}

/// A guest with a tag of its own on top needs four bytes more.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn set_uplink_mtu_takes_the_guests_mtu() {
    let lab = Lab::new();
    let arguments = ["--map", "100.20=t0,tpid=0x88a8", "--set-uplink-mtu=3000"];
    let (daemon, guest) = single(&lab, &arguments, "t0");
    let wire = lab.wire();
    assert!(mtu(&lab) >= 3008, "{}", mtu(&lab));
    let tags = [tag(0x88a8, 100), tag(0x8100, 20)];
    let frame = Frame::numbered(1).untagged_length(3014);
    guest.send(&frame.clone().reversed());
    assert_eq!(wire.receive_until(1), [frame.clone().reversed().tags(&tags)]);
    wire.send(&frame.clone().tags(&tags));
    assert_eq!(guest.receive_until(1), [frame]);
    daemon.stop();
    assert_eq!(mtu(&lab), 1500);
}

/// A tap with several queues: whatever queue the guest uses, and every flow reaches
/// the guest by one of them.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_multi_queue_guest_is_served_by_all_its_queues() {
    let lab = Lab::new();
    let daemon = lab.daemon(&["--map", "101=t0,queues=2"]);
    let open = || {
        let flags = libc::IFF_MULTI_QUEUE;
        lab.host.enter(|| lab::raw::open_tap("t0", flags, 0)).expect("a queue")
    };
    let queues = [open(), open()];
    daemon.attached(&["t0"]);
    let wire = lab.wire();
    for (number, queue) in (0..).zip(&queues) {
        let frame = Frame::numbered(number).reversed();
        lab::raw::write_tap(queue, &[0; 10], &frame.bytes()).unwrap();
        assert_eq!(wire.receive_until(number), [frame.tags(&[tag(0x8100, 101)])]);
    }
    let mut expected: Vec<Vec<u8>> = Vec::new();
    for flow in 0..64u8 {
        let mut frame = lab::ip::udp(lab::ip::Version::V4, &[flow; 20]);
        // Another source address is another flow.
        frame.payload[15] = flow;
        lab::ip::identify(&mut frame.payload, 1);
        wire.send(&frame.clone().tags(&[tag(0x8100, 101)]));
        expected.push(frame.bytes());
    }
    let mut used = [0; 2];
    while !expected.is_empty() {
        for (queue, used) in queues.iter().zip(&mut used) {
            if let Some(got) = lab::raw::read_tap(queue).unwrap() {
                let place = expected.iter().position(|frame| *frame == got[10..]);
                expected.remove(place.expect("one of those sent, once"));
                *used += 1;
            }
        }
    }
    assert!(used.iter().all(|used| *used > 0), "{used:?}");
    daemon.stop();
}

/// Numbered frames of all sizes arrive in the order they were sent: also those
/// longer than a ring slot, which the kernel queues apart.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn order_is_kept_per_port_and_direction() {
    let lab = Lab::new();
    lab.host.ip("link set up0 mtu 9000");
    let (daemon, guest) = single(&lab, &["--map", "101=t0"], "t0");
    let wire = lab.wire();
    let sizes = [60, 1514, 60, 9000, 2047, 2048, 2049, 64, 5000, 60, 1900];
    let frame =
        |number: u64| Frame::numbered(number).untagged_length(sizes[number as usize % sizes.len()]);
    let window = 64;
    let windows = lab::scaled(300).max(20);
    for start in (0..windows).map(|index| index * window) {
        let numbers = start..start + window;
        for number in numbers.clone() {
            wire.send(&frame(number).tags(&[tag(0x8100, 101)]));
            guest.send(&frame(number).reversed());
        }
        let last = start + window - 1;
        let down: Vec<u64> = guest.receive_until(last).iter().map(Frame::number).collect();
        assert_eq!(down, numbers.clone().collect::<Vec<_>>(), "to the guest");
        let up = wire.receive_until(last);
        let order: Vec<u64> = up.iter().map(Frame::number).collect();
        assert_eq!(order, numbers.collect::<Vec<_>>(), "to the wire");
        assert_eq!(up[0], frame(start).reversed().tags(&[tag(0x8100, 101)]));
    }
    let summary = daemon.stop();
    let port = summary.port("t0");
    assert_eq!(port.to_guest.out_frames, window * windows);
    assert_eq!(port.from_guest.out_frames, window * windows);
}

/// Frames and bytes as an operator expects them: each side counts what it carries.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn frames_and_bytes_are_counted_each_way() {
    let lab = Lab::new();
    let (daemon, guest) = single(&lab, &["--map", "101=t0"], "t0");
    let wire = lab.wire();
    for number in 0..10 {
        wire.send(&Frame::numbered(number).tags(&[tag(0x8100, 101)]));
        guest.send(&Frame::numbered(number).reversed());
    }
    guest.receive_until(9);
    wire.receive_until(9);
    // Asked for while it runs, it tells the same.
    daemon.until("all are counted", |running| running.port("t0").to_guest.out_frames == 10);
    let summary = daemon.stop();
    let port = summary.port("t0");
    assert_eq!((port.to_guest.in_frames, port.to_guest.out_frames), (10, 10));
    assert_eq!((port.from_guest.in_frames, port.from_guest.out_frames), (10, 10));
    assert_eq!(port.to_guest.out_bytes, 600, "60 bytes reach the guest");
    assert_eq!(port.from_guest.in_bytes, 600);
    assert_eq!(port.to_guest.in_bytes, 640, "with the tag they came with");
    assert_eq!(summary.from_wire.in_bytes, 640);
    assert_eq!(port.from_guest.out_bytes, 640, "and 64 the wire");
    assert_eq!(summary.to_wire.out_bytes, 640);
}

/// What a guest sends to everybody, to its tap's address, and in search of the
/// host: an ARP request for `address`, IPv4 and IPv6.
fn frames_for_the_host(tap: [u8; 6], address: [u8; 4]) -> Vec<Frame> {
    let everybody = [0xff; 6];
    let mut arp = vec![0, 1, 8, 0, 6, 4, 0, 1];
    arp.extend(GUEST_MAC);
    arp.extend([10, 9, 0, 77]);
    arp.extend([0; 6]);
    arp.extend(address);
    arp.extend([0; 18]);
    let request =
        Frame { ether_type: 0x0806, payload: arp, ..Frame::numbered(0).reversed().to(everybody) };
    let v4 = lab::ip::udp(lab::ip::Version::V4, b"for the host?").reversed();
    let v6 = lab::ip::udp(lab::ip::Version::V6, b"for the host?").reversed();
    vec![
        request,
        v4.clone().to(everybody),
        v4.to(tap),
        v6.clone().to([0x33, 0x33, 0, 0, 0, 1]),
        v6.to(tap),
    ]
}

const ETH_P_IP: u16 = 0x0800;
const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;

/// How many of the frames for the host its stack got from `device`.
fn reached_the_stack(stack: &[Wire]) -> usize {
    let count = |wire: &Wire| std::iter::from_fn(|| wire.try_receive()).count();
    stack.iter().map(count).sum()
}

fn stack_of(lab: &Lab, device: &str) -> [Wire; 3] {
    [ETH_P_IP, ETH_P_ARP, ETH_P_IPV6].map(|kind| Wire::with_protocol(&lab.host, device, kind))
}

fn address_of(lab: &Lab, device: &str) -> [u8; 6] {
    let link = lab.host.link(device).unwrap();
    let parts = link["address"].as_str().unwrap().split(':');
    let bytes: Vec<u8> = parts.map(|part| u8::from_str_radix(part, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

/// A tap is sealed: the guest talks to its VLAN and never to the host, which does
/// not talk to it either; also after the daemon was killed.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_tap_is_sealed_against_the_hosts_stack() {
    let lab = Lab::new();
    lab.host.enable_ipv6();
    lab.host.ip("address add 10.9.0.1/24 dev up0");
    let (daemon, guest) = single(&lab, &["--map", "101=t0"], "t0");
    let wire = lab.wire();
    let stack = stack_of(&lab, "t0");
    for frame in frames_for_the_host(address_of(&lab, "t0"), [10, 9, 0, 1]) {
        guest.send(&frame);
        let got = wire.receive_within(lab::PATIENCE).expect("it goes to the VLAN");
        assert_eq!(Frame::read(&got), frame.tags(&[tag(0x8100, 101)]));
    }
    wire.send(&Frame::numbered(1).tags(&[tag(0x8100, 101)]));
    assert_eq!(guest.receive_until(1), [Frame::numbered(1)], "the host answers nothing");
    assert_eq!(reached_the_stack(&stack), 0);
    assert_eq!(lab.host.sysctl("net/ipv6/conf/t0/disable_ipv6").as_deref(), Some("1"));
    assert_eq!(lab.host.ip("-oneline address show dev t0").trim(), "");

    daemon.signal(nix::sys::signal::Signal::SIGKILL);
    drop(daemon);
    let everything = Wire::open(&lab.host, "t0");
    for frame in frames_for_the_host(address_of(&lab, "t0"), [10, 9, 0, 1]) {
        guest.send(&frame);
        let got = everything.receive_within(lab::PATIENCE).expect("it is sent");
        assert_eq!(got, frame.bytes());
    }
    assert_eq!(reached_the_stack(&stack), 0, "sealed without the daemon");
    assert_eq!(guest.clear(), 0);
}

/// A device that was there before is sealed as well, and opened again at the end.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_container_is_sealed_while_it_is_a_port() {
    let lab = Lab::new();
    let inside = lab.container("c0");
    lab.host.ip("address add 10.9.0.1/24 dev up0");
    let container = Wire::open(&inside, "eth0");
    let everything = Wire::open(&lab.host, "c0");
    let stack = stack_of(&lab, "c0");
    let try_all = || {
        everything.clear();
        let frames = frames_for_the_host(address_of(&lab, "c0"), [10, 9, 0, 1]);
        for frame in &frames {
            container.send(frame);
        }
        for _ in &frames {
            everything.receive_within(lab::PATIENCE).expect("it is sent");
        }
        reached_the_stack(&stack)
    };
    assert!(try_all() >= 4, "before: else this test shows nothing");
    let daemon = lab.daemon(&["--map", "101=c0"]);
    daemon.attached(&["c0"]);
    container.clear();
    assert_eq!(try_all(), 0, "while it is a port");
    lab.wire().send(&Frame::numbered(1).tags(&[tag(0x8100, 101)]));
    assert_eq!(container.receive_until(1), [Frame::numbered(1)], "the host answers nothing");
    daemon.stop();
    assert!(try_all() >= 4, "afterwards");
}
