//! A worker between faulty devices, and the books kept beside it: what was put into each
//! device and what came out of it, without a look at the counters.
//!
//! Each frame says in its source address where it came from, what kind it is and which
//! one it is; tags and segmentation leave that alone. Its destination says its VLAN.

use nix::errno::Errno;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vlanswitchd::control::mapping;
use vlanswitchd::dataplane::{
    Abilities, Command, FlowSnapshot, Notice, PollMode, PortShared, SNAPLEN_MAX, Selection, Source,
    UplinkShared, Worker, capture,
};
use vlanswitchd::frame::vnet::{FLAG_NEEDS_CSUM, GSO_TCPV4, VNET_HEADER_LEN};
use vlanswitchd::frame::{Tag, Tci, Tpid, VnetHeader};
use vlanswitchd::port::{Answer, Arrival, Device, DeviceState, FaultyPort};
use vlanswitchd::switch::{DropReason, Table};

/// A port, or `None` for the uplink.
pub type Place = Option<usize>;

pub const PORTS: usize = 4;

/// Kinds of frames.
pub const KINDS: u8 = 6;
pub const PLAIN: u8 = 0;
/// With a tag of its own (0x8100, 5).
const TAGGED: u8 = 1;
/// A super-frame of [`SEGMENTS`] behind a 0x9100 tag, which userspace has to cut.
pub const CUT: u8 = 2;
/// Of a VLAN nobody has; from a guest it is a plain one.
const UNMAPPED: u8 = 3;
/// It ends within a tag.
const MALFORMED: u8 = 4;
const BROADCAST: u8 = 5;

/// Segments of a super-frame.
pub const SEGMENTS: u64 = 4;
const SEGMENT_LEN: usize = 1000;

/// Configurations to switch between: VLANs change hands, guests are held to something,
/// one is a trunk.
const MAPS: [[&str; PORTS]; TABLES as usize] = [
    ["101=t0", "102=t1,mode=access", "103=t2", "104=t3"],
    ["102=t0", "103=t1,mode=access", "104=t2", "101=t3"],
    ["101=t0,rate=8k", "102=t1,storm=1", "103=t2,mac=02:00:00:00:00:01", "104=t3"],
    ["101=t0", "102=t1", "103=t2,mode=access", "104-106=t3"],
];
pub const TABLES: u8 = 4;

/// What happens to a switch.
#[derive(Debug, Clone)]
pub enum Operation {
    /// Frames arrive at a device.
    Arrive {
        place: Place,
        kind: u8,
        count: u16,
    },
    /// Frames are announced that cannot be had.
    Lose {
        place: Place,
        count: u8,
    },
    /// The ring is empty for a moment.
    Pause(Place),
    /// The kernel had no room in the ring.
    Overrun {
        place: Place,
        count: u8,
    },
    Rounds(u8),
    Wait {
        microseconds: u16,
    },
    /// What becomes of the coming packets to a device.
    Answers {
        place: Place,
        answers: Vec<Answer>,
    },
    Link {
        place: Place,
        state: DeviceState,
    },
    Detach(Place),
    Attach(Place),
    Switch(u8),
    /// The port is removed, and a new one takes its position.
    Replace(usize),
    Capture {
        place: Place,
        drops: bool,
    },
}

/// What came of a sequence, by the books of the test but for the drops.
#[derive(Debug, Default)]
pub struct Seen {
    pub delivered: u64,
    pub split: u64,
    drops: [u64; DropReason::COUNT],
    pub send_error: Option<Errno>,
}

impl Seen {
    pub fn drops(&self, reason: DropReason) -> u64 {
        self.drops[reason.index()]
    }

    pub fn all_drops(&self) -> u64 {
        self.drops.iter().sum()
    }

    pub fn add(&mut self, other: &Self) {
        self.delivered += other.delivered;
        self.split += other.split;
        for (sum, drops) in self.drops.iter_mut().zip(other.drops) {
            *sum += drops;
        }
    }
}

/// One end of the switch.
#[derive(Default)]
struct End {
    /// Every device it has had; the last is the one it has, while `attached`.
    devices: Vec<FaultyPort>,
    attached: bool,
    /// Frames put in, the kernel's own drops included.
    put_in: u64,
    /// The port's counters, one for each time it was made; none for the uplink.
    shared: Vec<Arc<PortShared>>,
    /// VLANs it has been in.
    vids: BTreeSet<u16>,
}

pub struct Bed {
    worker: Worker,
    commands: crossbeam_channel::Sender<Command>,
    notices: crossbeam_channel::Receiver<Notice>,
    uplink_shared: Arc<UplinkShared>,
    ports: Vec<End>,
    uplink: End,
    tables: Vec<Arc<Table>>,
    table: u8,
    sources: Vec<Source>,
    number: u32,
    now: Instant,
}

impl Bed {
    /// All devices attached and up, the first table in force.
    pub fn new() -> Self {
        let tables: Vec<Arc<Table>> = MAPS
            .iter()
            .map(|maps| {
                let specs: Vec<_> =
                    maps.iter().map(|map| mapping::argument(map).unwrap()).collect();
                Arc::new(mapping::build_all(&specs, None, Tpid::Customer).unwrap().1)
            })
            .collect();
        let uplink_shared = Arc::<UplinkShared>::default();
        let shared: Vec<Arc<PortShared>> = (0..PORTS).map(|_| Arc::default()).collect();
        let abilities = Abilities { tagged_gso: true, udp_gso: true };
        let (worker, commands, notices) = Worker::new(
            Arc::clone(&tables[0]),
            Arc::clone(&uplink_shared),
            shared.iter().map(Arc::clone),
            abilities,
            PollMode::Busy,
        )
        .unwrap();
        let ports = shared.into_iter().map(|shared| End { shared: vec![shared], ..End::default() });
        let mut bed = Self {
            worker,
            commands,
            notices,
            uplink_shared,
            ports: ports.collect(),
            uplink: End::default(),
            tables,
            table: 0,
            sources: Vec::new(),
            number: 0,
            now: Instant::now(),
        };
        bed.note_vids();
        for place in places() {
            bed.apply(&Operation::Attach(place));
            bed.apply(&Operation::Link { place, state: DeviceState::Up });
        }
        bed
    }

    fn end(&mut self, place: Place) -> &mut End {
        match place {
            None => &mut self.uplink,
            Some(port) => &mut self.ports[port],
        }
    }

    fn note_vids(&mut self) {
        for (port, map) in self.ports.iter_mut().zip(MAPS[usize::from(self.table)]) {
            let (vlans, _) = map.split_once('=').unwrap();
            let (first, last) = vlans.split_once('-').unwrap_or((vlans, vlans));
            port.vids.extend(first.parse::<u16>().unwrap()..=last.parse().unwrap());
        }
    }

    fn command(&mut self, command: Command) {
        self.commands.send(command).unwrap();
        assert!(self.worker.obey().is_continue());
        // Devices given back are let go of; their scripts stay.
        while self.notices.try_recv().is_ok() {}
    }

    pub fn apply(&mut self, operation: &Operation) {
        match operation {
            Operation::Arrive { place, kind, count } => {
                for _ in 0..*count {
                    // Of all VLANs in turn.
                    let vid = 101 + (self.number % 6) as u16;
                    self.arrive(*place, vid, *kind);
                }
            }
            Operation::Lose { place, count } => {
                for _ in 0..*count {
                    self.put(*place, Arrival::Lost);
                }
            }
            Operation::Pause(place) => {
                let end = self.end(*place);
                if end.attached {
                    end.devices.last().unwrap().script().arriving.push_back(Arrival::Pause);
                }
            }
            Operation::Overrun { place, count } => {
                let count = u64::from(*count);
                self.end(*place).put_in += count;
                match place {
                    None => self.uplink_shared.from_wire.add_overruns(count),
                    Some(port) => {
                        self.ports[*port].shared.last().unwrap().from_guest.add_overruns(count);
                    }
                }
            }
            Operation::Rounds(rounds) => {
                for _ in 0..*rounds {
                    self.worker.round(self.now);
                }
                self.read_captures();
            }
            Operation::Wait { microseconds } => {
                self.now += Duration::from_micros((*microseconds).into());
            }
            Operation::Answers { place, answers } => {
                let end = self.end(*place);
                if end.attached {
                    end.devices.last().unwrap().script().answers.extend(answers);
                }
            }
            Operation::Link { place, state } => match place {
                None => self.uplink_shared.link.set(*state, 1500),
                Some(port) => self.ports[*port].shared.last().unwrap().link.set(*state, 1500),
            },
            Operation::Detach(place) => {
                self.command(Command::Detach(*place));
                self.end(*place).attached = false;
            }
            Operation::Attach(place) => {
                let device = FaultyPort::default();
                let end = self.end(*place);
                end.devices.push(device.clone());
                end.attached = true;
                self.command(Command::Attach(vec![(*place, Box::new(Device::Faulty(device)))]));
            }
            Operation::Switch(table) => {
                self.table = *table;
                self.note_vids();
                let table = Arc::clone(&self.tables[usize::from(*table)]);
                self.command(Command::Switch(0, table));
            }
            Operation::Replace(port) => {
                self.apply(&Operation::Detach(Some(*port)));
                let shared = Arc::<PortShared>::default();
                self.ports[*port].shared.push(Arc::clone(&shared));
                self.command(Command::Add(*port, shared));
                self.apply(&Operation::Switch(self.table));
            }
            Operation::Capture { place, drops } => {
                let place = place.map_or(
                    vlanswitchd::dataplane::Place::Everywhere,
                    vlanswitchd::dataplane::Place::Port,
                );
                let selection = Selection { place, drops_only: *drops };
                let (sink, source) = capture(selection, SNAPLEN_MAX, PORTS);
                self.sources.push(source);
                self.command(Command::Capture(Box::new(sink)));
            }
        }
    }

    /// Every other capture is read, the rest miss frames; one too many is closed.
    fn read_captures(&mut self) {
        for source in self.sources.iter().step_by(2) {
            while let Ok(chunk) = source.receive(Duration::ZERO) {
                source.give_back(chunk);
            }
        }
        if self.sources.len() > 4 {
            self.sources.remove(0).close();
        }
    }

    /// Plain frames from the wire for a port of the first table, or from a guest.
    pub fn arrive_for(&mut self, from: Place, port: u16, count: u16) {
        self.arrive_kind(from, port, PLAIN, count);
    }

    pub fn arrive_kind(&mut self, from: Place, port: u16, kind: u8, count: u16) {
        for _ in 0..count {
            self.arrive(from, 101 + port, kind);
        }
    }

    fn arrive(&mut self, place: Place, vid: u16, kind: u8) {
        self.number += 1;
        let mut bytes = vec![2, 0, 0, 0];
        bytes.extend(vid.to_be_bytes());
        if kind == BROADCAST {
            bytes = vec![0xff; 6];
        }
        bytes.extend([2 | kind << 4, place.map_or(0xff, |port| port as u8)]);
        bytes.extend(self.number.to_be_bytes());
        let mut header = VnetHeader::default();
        match kind {
            TAGGED => bytes.extend([0x81, 0, 0, 5, 0x88, 0xb5]),
            MALFORMED => bytes.extend([0x81, 0]),
            CUT => header = super_frame(&mut bytes),
            _ => bytes.extend([0x88, 0xb5]),
        }
        if kind != MALFORMED {
            bytes.resize(bytes.len().max(60), 0);
        }
        // On the wire the outer tag is the VLAN's, and the kernel takes it out.
        let vid = if kind == UNMAPPED { 999 } else { vid };
        let stripped = place.is_none().then_some(Tag { tpid: Tpid::Customer, tci: Tci(vid) });
        self.put(place, Arrival::Frame { bytes, stripped, header });
    }

    fn put(&mut self, place: Place, arrival: Arrival) {
        let end = self.end(place);
        // What arrives where no ring is, is nobody's.
        if end.attached {
            end.put_in += 1;
            end.devices.last().unwrap().script().arriving.push_back(arrival);
        }
    }

    /// Ends it and holds the counters against the books.
    pub fn finish(mut self) -> Seen {
        for place in places() {
            self.apply(&Operation::Detach(place));
        }
        let mut seen = Seen::default();
        let mut add = |flow: &FlowSnapshot| {
            seen.split += flow.split_frames;
            seen.send_error = seen.send_error.or(flow.send_error);
            for (sum, drops) in seen.drops.iter_mut().zip(flow.drops) {
                *sum += drops;
            }
            assert_eq!(flow.in_frames + flow.split_frames, flow.out_frames + flow.dropped());
            assert_eq!(flow.split_frames % (SEGMENTS - 1), 0, "{flow:?}");
        };
        let from_wire = self.uplink_shared.from_wire.snapshot();
        add(&from_wire);
        assert_eq!(from_wire.in_frames, self.uplink.put_in, "from the wire: {from_wire:?}");
        let mut handed = 0;
        let mut delivered = 0;
        let to_wire = self.uplink.taken();
        let refused_by_uplink = self.uplink.refused();
        for (number, port) in self.ports.iter().enumerate() {
            let flows = |of: fn(&PortShared) -> FlowSnapshot| -> Vec<FlowSnapshot> {
                port.shared.iter().map(|shared| of(shared)).collect()
            };
            let from_guest = flows(|shared| shared.from_guest.snapshot());
            let to_guest = flows(|shared| shared.to_guest.snapshot());
            from_guest.iter().chain(&to_guest).for_each(&mut add);
            handed += sum(&to_guest, |flow| flow.in_frames);

            assert_eq!(sum(&from_guest, |flow| flow.in_frames), port.put_in, "from {number}");
            let sent: Vec<Sent> =
                to_wire.iter().copied().filter(|sent| sent.origin == number as u8).collect();
            let tagged = |sent: &Sent| sent.outer_tag.is_some_and(|vid| port.vids.contains(&vid));
            assert!(sent.iter().all(tagged), "{number}: another's tag in {sent:?}");
            check(&format!("from {number}"), &from_guest, &sent, |reason| {
                let of_this = |(sent, errno): &&(Sent, Errno)| {
                    sent.origin == number as u8 && expected(*errno, None) == reason
                };
                refused_by_uplink.iter().filter(of_this).count() as u64
            });

            let got = port.taken();
            let ours = |sent: &Sent| {
                let mapped = sent.vid.is_none_or(|vid| port.vids.contains(&vid));
                sent.origin == 0xff && mapped
            };
            assert!(got.iter().all(ours), "{number}: another's frame in {got:?}");
            check(&format!("to {number}"), &to_guest, &got, |reason| {
                let refused = port.refused();
                let of_this =
                    |(_, errno): &&(Sent, Errno)| expected(*errno, Some(number)) == reason;
                refused.iter().filter(of_this).count() as u64
            });
            delivered += (sent.len() + got.len()) as u64;
        }
        assert_eq!(from_wire.out_frames, handed);
        let strangers = to_wire.iter().filter(|sent| usize::from(sent.origin) >= PORTS).count();
        assert_eq!(strangers, 0, "frames of nobody on the wire");
        seen.delivered = delivered;
        seen
    }
}

/// What came out is counted once, is in order and not doubled, and refusals are counted
/// under their reason.
fn check(what: &str, flows: &[FlowSnapshot], sent: &[Sent], refused: impl Fn(DropReason) -> u64) {
    assert_eq!(sum(flows, |flow| flow.out_frames), sent.len() as u64, "{what}: {flows:?}");
    for pair in sent.windows(2) {
        let key = |sent: &Sent| (sent.number, sent.segment);
        assert!(key(&pair[0]) < key(&pair[1]), "{what}: order or number of {pair:?}");
    }
    let bytes: u64 = sent.iter().map(|sent| sent.length as u64).sum();
    assert_eq!(sum(flows, |flow| flow.out_bytes), bytes, "{what}: {flows:?}");
    for reason in DropReason::ALL {
        let (counted, refused) = (sum(flows, |flow| flow.drops[reason.index()]), refused(reason));
        match reason {
            // These have other causes too: the rest of a burst, the link's state.
            DropReason::GuestQueueFull
            | DropReason::UplinkQueueFull
            | DropReason::GuestAbsent
            | DropReason::UplinkDown => assert!(counted >= refused, "{what}, {reason:?}"),
            DropReason::TooLong | DropReason::BadOffload | DropReason::SendFailed => {
                assert_eq!(counted, refused, "{what}, {reason:?}: {flows:?}");
            }
            _ => assert_eq!(refused, 0, "{what}, {reason:?}"),
        }
    }
}

fn sum(flows: &[FlowSnapshot], of: impl Fn(&FlowSnapshot) -> u64) -> u64 {
    flows.iter().map(of).sum()
}

/// What the documentation says of an error of a send to this place.
fn expected(errno: Errno, place: Place) -> DropReason {
    let row = super::table::sends().iter().find(|row| row.errno == errno).unwrap();
    if place.is_some() { row.to_guest } else { row.to_wire }
}

fn places() -> impl Iterator<Item = Place> {
    (0..PORTS).map(Some).chain([None])
}

/// A packet as a device was given it.
#[derive(Debug, Clone, Copy)]
struct Sent {
    origin: u8,
    number: u32,
    /// Of a super-frame, from 0.
    segment: u8,
    /// By its destination; not of broadcasts.
    vid: Option<u16>,
    /// The VID in its outermost 0x8100 tag.
    outer_tag: Option<u16>,
    length: usize,
}

impl Sent {
    fn read(packet: &[u8]) -> Self {
        let frame = &packet[VNET_HEADER_LEN..];
        let word = |at: usize| u16::from_be_bytes([frame[at], frame[at + 1]]);
        let kind = frame[6] >> 4;
        assert!(kind != MALFORMED && (kind != UNMAPPED || frame[7] != 0xff), "{frame:?}");
        Self {
            origin: frame[7],
            number: u32::from_be_bytes(frame[8..12].try_into().unwrap()),
            segment: if kind == CUT { *frame.last().unwrap() } else { 0 },
            vid: (frame[0] == 2).then(|| word(4)),
            outer_tag: (word(12) == 0x8100).then(|| word(14) & 0xfff),
            length: frame.len(),
        }
    }
}

impl End {
    fn taken(&self) -> Vec<Sent> {
        let of = |device: &FaultyPort| -> Vec<Sent> {
            device.script().taken.iter().map(|packet| Sent::read(packet)).collect()
        };
        self.devices.iter().flat_map(of).collect()
    }

    fn refused(&self) -> Vec<(Sent, Errno)> {
        let of = |device: &FaultyPort| -> Vec<(Sent, Errno)> {
            let script = device.script();
            script.refused.iter().map(|(packet, errno)| (Sent::read(packet), *errno)).collect()
        };
        self.devices.iter().flat_map(of).collect()
    }
}

/// A TCP super-frame behind a 0x9100 tag; each segment's bytes are its number.
fn super_frame(bytes: &mut Vec<u8>) -> VnetHeader {
    let length = 40 + SEGMENTS as u16 * SEGMENT_LEN as u16;
    bytes.extend([0x91, 0, 0, 5, 0x08, 0]);
    bytes.extend([0x45, 0]);
    bytes.extend(length.to_be_bytes());
    bytes.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    bytes.extend([0, 80, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    for segment in 0..SEGMENTS as u8 {
        bytes.extend([segment; SEGMENT_LEN]);
    }
    VnetHeader {
        flags: FLAG_NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 58,
        gso_size: SEGMENT_LEN as u16,
        csum_start: 38,
        csum_offset: 16,
    }
}
