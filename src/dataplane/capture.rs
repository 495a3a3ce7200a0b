//! Capture: copies of frames for whoever looks on, at no cost when nobody does.
//!
//! A [`Sink`] is the worker's end of one capture, a [`Source`] the reader's. Records
//! are written one behind the other into chunks of memory made when the capture
//! starts; two bounded channels carry full chunks to the reader and empty ones back.
//! When no empty chunk is left the frame is counted as missed, per interface, and
//! forwarding goes on: the worker never waits for a reader and never allocates.
//!
//! **What is seen where.** At a port's interface the frames as its guest sends and
//! gets them, at the uplink's as they are on the wire; a tag the kernel took out of
//! the bytes is put back. A frame dropped by decision is recorded where it came in,
//! one refused on its way out where it would have left, each with the reason. A frame
//! is edited where it lies, so the record is made first and the reason written into
//! it afterwards: the latest record of a sink stays open until the next. A sink for
//! drops only takes its latest record back if no reason came.
//!
//! With several workers each has a [`Sink`] of the capture ([`Sink::another`]), and their
//! chunks share the channels: the reader gets them as they come, so records of one port
//! are in order, and those of ports on different workers may be a chunk apart. Each
//! frame is given the time at which it was found, so that the reader can sort.
//!
//! Super-frames are recorded as they pass, whole and with unfinished checksums.

use crate::frame::vnet::VNET_HEADER_LEN;
use crate::frame::{MAC_ADDRESSES_LEN, Tag};
use crate::switch::{DropReason, PortIndex};
use crate::sys::packet::Received;
use arrayvec::ArrayVec;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// Captures a worker serves at the same time.
pub const SINKS_MAX: usize = 4;
/// Length of a chunk in bytes: the longest super-frame fits, whole.
const CHUNK_LEN: usize = 72 * 1024;
/// Chunks of one capture: 4.5 MiB, or 50 ms of a million small frames a second.
const CHUNKS: usize = 64;
/// The most bytes of a frame that are kept.
pub const SNAPLEN_MAX: usize = CHUNK_LEN - RECORD_HEADER_LEN;
/// The interface number of the uplink in a record's header.
const UPLINK: u32 = u32::MAX;
/// The reason's byte in a record of a frame that was not dropped.
const NO_REASON: u8 = u8::MAX;

const _: () = assert!(DropReason::COUNT < NO_REASON as usize);

/// Where to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// At all interfaces.
    Everywhere,
    /// At one port's.
    Port(PortIndex),
    /// At the uplink's.
    Uplink,
}

/// Which frames a capture takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Selection {
    /// Where to look.
    pub place: Place,
    /// Only frames that are dropped. Of one port these are all that are counted for
    /// it: those for its guest dropped at the uplink, and its guest's the uplink
    /// refused, too.
    pub drops_only: bool,
}

impl Selection {
    /// Whether frames at `interface` (`None`: the uplink) may be wanted. `flow` is
    /// the port they are counted for, if that is known yet.
    fn wants(self, interface: Option<PortIndex>, flow: Option<PortIndex>) -> bool {
        match self.place {
            Place::Everywhere => true,
            Place::Uplink => interface.is_none(),
            Place::Port(port) if self.drops_only => flow.is_none_or(|flow| flow == port),
            Place::Port(port) => interface == Some(port),
        }
    }
}

/// Which way a frame passed its interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Into the switch.
    Inbound,
    /// Out of the switch.
    Outbound,
}

/// One frame as it was captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record<'c> {
    /// Nanoseconds since 1970. Never less than those of the record of the same worker before.
    pub time: u64,
    /// The port, or `None` for the uplink.
    pub interface: Option<PortIndex>,
    /// Which way the frame went.
    pub direction: Direction,
    /// Why it was dropped, if it was.
    pub reason: Option<DropReason>,
    /// Frames missed at this interface since the capture began.
    pub missed: u64,
    /// Length of the frame in bytes, with all tags.
    pub length: u32,
    /// Its first bytes.
    pub bytes: &'c [u8],
}

/// A record's header in a chunk: time, missed, interface, length, captured length,
/// direction, reason, and two bytes of nothing; in host byte order.
const RECORD_HEADER_LEN: usize = 32;
/// Where the reason stands in it.
const REASON_OFFSET: usize = 29;

impl<'c> Record<'c> {
    fn header(&self, captured: u32) -> [u8; RECORD_HEADER_LEN] {
        let interface = self.interface.map_or(UPLINK, |port| port as u32);
        let direction = u8::from(self.direction == Direction::Outbound);
        let reason = self.reason.map_or(NO_REASON, |reason| reason.index() as u8);
        let mut header = [0; RECORD_HEADER_LEN];
        let fields = self.time.to_ne_bytes().into_iter();
        let fields = fields
            .chain(self.missed.to_ne_bytes())
            .chain(interface.to_ne_bytes())
            .chain(self.length.to_ne_bytes())
            .chain(captured.to_ne_bytes())
            .chain([direction, reason]);
        for (place, byte) in header.iter_mut().zip(fields) {
            *place = byte;
        }
        header
    }

    /// The record that starts here in the bytes of a chunk, and where the next does.
    pub fn at(bytes: &'c [u8], start: usize) -> Option<(Self, usize)> {
        let (header, rest) = bytes.get(start..)?.split_first_chunk::<RECORD_HEADER_LEN>()?;
        let (time, header) = header.split_first_chunk::<8>()?;
        let (missed, header) = header.split_first_chunk::<8>()?;
        let (interface, header) = header.split_first_chunk::<4>()?;
        let (length, header) = header.split_first_chunk::<4>()?;
        let (captured, header) = header.split_first_chunk::<4>()?;
        let (&[direction, reason], _) = header.split_first_chunk::<2>()?;
        let interface = u32::from_ne_bytes(*interface);
        let captured = u32::from_ne_bytes(*captured) as usize;
        let record = Self {
            time: u64::from_ne_bytes(*time),
            interface: (interface != UPLINK).then_some(interface as PortIndex),
            direction: if direction == 0 { Direction::Inbound } else { Direction::Outbound },
            reason: DropReason::ALL.get(usize::from(reason)).copied(),
            missed: u64::from_ne_bytes(*missed),
            length: u32::from_ne_bytes(*length),
            bytes: rest.get(..captured)?,
        };
        Some((record, start + RECORD_HEADER_LEN + captured))
    }
}

/// Memory for records.
#[derive(Debug, PartialEq, Eq)]
pub struct Chunk {
    bytes: Box<[u8]>,
    used: usize,
}

impl Chunk {
    pub(crate) fn new() -> Self {
        Self { bytes: vec![0; CHUNK_LEN].into_boxed_slice(), used: 0 }
    }

    /// The records, oldest first.
    pub fn records(&self) -> impl Iterator<Item = Record<'_>> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let (record, next) = Record::at(self.bytes(), start)?;
            start = next;
            Some(record)
        })
    }

    /// The records as they lie in memory, for [`Record::at`].
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.used).unwrap_or_default()
    }

    /// Appends a record with these pieces of a frame, as far as `captured` goes;
    /// `None` if there is no room.
    pub(crate) fn append(
        &mut self,
        record: &Record<'_>,
        captured: usize,
        frame: [&[u8]; 3],
    ) -> Option<()> {
        let place = self.bytes.get_mut(self.used..self.used + RECORD_HEADER_LEN + captured)?;
        let (header, mut place) = place.split_first_chunk_mut::<RECORD_HEADER_LEN>()?;
        *header = record.header(captured as u32);
        for piece in frame {
            let (to, rest) = place.split_at_mut(piece.len().min(place.len()));
            to.copy_from_slice(piece.get(..to.len())?);
            place = rest;
        }
        self.used += RECORD_HEADER_LEN + captured;
        Some(())
    }

    /// The reason's byte of the record that starts here.
    fn reason(&self, start: usize) -> Option<u8> {
        self.bytes.get(start + REASON_OFFSET).copied()
    }

    fn set_reason(&mut self, start: usize, reason: DropReason) {
        if let Some(place) = self.bytes.get_mut(start + REASON_OFFSET) {
            *place = reason.index() as u8;
        }
    }
}

/// What both ends see.
#[derive(Debug)]
struct Shared {
    /// Frames missed, by interface: the uplink, the ports, and last the ports that
    /// came later. The workers write.
    missed: Box<[AtomicU64]>,
    /// The reader has had enough.
    closed: AtomicBool,
}

impl Shared {
    fn missed_at(&self, interface: Option<PortIndex>) -> Option<&AtomicU64> {
        let position = interface.map_or(0, |port| port.saturating_add(1));
        self.missed.get(position).or(self.missed.last())
    }

    fn missed(&self, interface: Option<PortIndex>) -> u64 {
        self.missed_at(interface).map_or(0, |count| count.load(Ordering::Relaxed))
    }
}

/// The state of a sink's latest record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Latest {
    /// Nothing can be said about it any more.
    Settled,
    /// It starts here in the chunk.
    Open(usize),
    /// There was no room for it.
    NoRoom,
}

/// The worker's end of a capture.
#[derive(Debug)]
pub struct Sink {
    selection: Selection,
    snaplen: usize,
    full: Sender<Chunk>,
    empty: Receiver<Chunk>,
    chunk: Option<Chunk>,
    latest: Latest,
    shared: Arc<Shared>,
    /// One moment, by the clock that is never set back and as time since 1970.
    started: (Instant, Duration),
}

/// The reader's end of a capture. Dropping it ends the capture.
#[derive(Debug)]
pub struct Source {
    full: Receiver<Chunk>,
    empty: Sender<Chunk>,
    shared: Arc<Shared>,
}

/// The two ends of a capture of the first `snaplen` bytes of the frames selected.
/// Missed frames are counted apart for the uplink and this many ports.
pub fn capture(selection: Selection, snaplen: usize, ports: usize) -> (Sink, Source) {
    let (full, full_receiver) = crossbeam_channel::bounded(CHUNKS);
    let (empty_sender, empty) = crossbeam_channel::bounded(CHUNKS);
    for _ in 0..CHUNKS {
        // There is room for exactly as many.
        let _ = empty_sender.try_send(Chunk::new());
    }
    let missed = (0..ports + 2).map(|_| AtomicU64::new(0)).collect();
    let shared = Arc::new(Shared { missed, closed: AtomicBool::new(false) });
    let source = Source { full: full_receiver, empty: empty_sender, shared: Arc::clone(&shared) };
    let sink = Sink {
        selection,
        snaplen: snaplen.min(SNAPLEN_MAX),
        full,
        empty,
        chunk: None,
        latest: Latest::Settled,
        shared,
        started: (
            Instant::now(),
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default(),
        ),
    };
    (sink, source)
}

impl Source {
    /// Waits for a chunk of records.
    ///
    /// # Errors
    /// Whether the time was over, or the worker has let go of the capture.
    pub fn receive(&self, timeout: Duration) -> Result<Chunk, RecvTimeoutError> {
        self.full.recv_timeout(timeout)
    }

    /// Whether no records are waiting.
    pub fn is_empty(&self) -> bool {
        self.full.is_empty()
    }

    /// Gives a chunk back.
    pub fn give_back(&self, mut chunk: Chunk) {
        chunk.used = 0;
        // There is room for all there are; and a worker that is gone needs none.
        let _ = self.empty.try_send(chunk);
    }

    /// Asks the worker to hand over what it has and to let go.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Relaxed);
    }

    /// Frames missed at an interface (`None`: the uplink) so far.
    pub fn missed(&self, interface: Option<PortIndex>) -> u64 {
        self.shared.missed(interface)
    }

    /// Frames missed in all so far.
    pub fn missed_in_all(&self) -> u64 {
        self.shared.missed.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.close();
    }
}

impl Sink {
    /// A sink of the same capture, for another worker.
    #[must_use]
    pub fn another(&self) -> Self {
        Self {
            selection: self.selection,
            snaplen: self.snaplen,
            full: self.full.clone(),
            empty: self.empty.clone(),
            chunk: None,
            latest: Latest::Settled,
            shared: Arc::clone(&self.shared),
            started: self.started,
        }
    }

    /// Records a frame, given in pieces, and leaves the record open.
    fn record(&mut self, at: At, reason: Option<DropReason>, frame: [&[u8]; 3]) {
        self.settle();
        let length = frame.iter().map(|piece| piece.len()).sum::<usize>();
        let captured = length.min(self.snaplen);
        let now = at.now.unwrap_or(self.started.0);
        let time = self.started.1 + now.saturating_duration_since(self.started.0);
        let record = Record {
            time: time.as_nanos() as u64,
            interface: at.interface,
            direction: at.direction,
            reason,
            missed: self.shared.missed(at.interface),
            length: length as u32,
            bytes: &[],
        };
        let needed = RECORD_HEADER_LEN + captured;
        if self.chunk.as_ref().is_some_and(|chunk| chunk.used + needed > CHUNK_LEN) {
            self.hand_over();
        }
        if self.chunk.is_none() {
            self.chunk = self.empty.try_recv().ok();
        }
        let start = self.chunk.as_ref().map_or(0, |chunk| chunk.used);
        let appended =
            self.chunk.as_mut().and_then(|chunk| chunk.append(&record, captured, frame)).is_some();
        self.latest = if appended { Latest::Open(start) } else { Latest::NoRoom };
        if !appended && (reason.is_some() || !self.selection.drops_only) {
            self.miss(at.interface);
            self.latest = Latest::Settled;
        }
    }

    /// Writes into the latest record, of a frame that came in from `interface` and is
    /// counted for `port`, why it was dropped.
    fn dropped(
        &mut self,
        interface: Option<PortIndex>,
        port: Option<PortIndex>,
        reason: DropReason,
    ) {
        let of_another = match self.selection.place {
            Place::Port(wanted) => port != Some(wanted),
            Place::Everywhere | Place::Uplink => false,
        };
        if of_another && self.selection.drops_only {
            return;
        }
        match (self.latest, &mut self.chunk) {
            (Latest::Open(start), Some(chunk)) => chunk.set_reason(start, reason),
            (Latest::NoRoom, _) => self.miss(interface),
            _ => {}
        }
    }

    /// Closes the latest record, or takes it back.
    fn settle(&mut self) {
        if let Latest::Open(start) = self.latest
            && self.selection.drops_only
            && let Some(chunk) = &mut self.chunk
            && chunk.reason(start) == Some(NO_REASON)
        {
            chunk.used = start;
        }
        self.latest = Latest::Settled;
    }

    fn miss(&self, interface: Option<PortIndex>) {
        if let Some(count) = self.shared.missed_at(interface) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Sends the chunk to the reader.
    fn hand_over(&mut self) {
        if let Some(chunk) = self.chunk.take() {
            // There is room for all there are; without a reader it is freed.
            let _ = self.full.try_send(chunk);
        }
    }

    /// Lets the reader see what there is: at once if it waits, else when the worker
    /// has nothing better to do or the chunk is full.
    fn flush(&mut self, idle: bool) {
        self.settle();
        if (idle || self.full.is_empty()) && self.chunk.as_ref().is_some_and(|chunk| chunk.used > 0)
        {
            self.hand_over();
        }
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        self.flush(true);
    }
}

/// The captures of a worker.
#[derive(Debug, Default)]
pub struct Captures {
    sinks: ArrayVec<Box<Sink>, SINKS_MAX>,
    /// When the frame that came in last was found.
    now: Option<Instant>,
}

impl Captures {
    /// Whether nobody looks on.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.sinks.is_empty()
    }

    /// Takes a sink; one too many is dropped, which its reader notices.
    pub fn add(&mut self, sink: Box<Sink>) {
        self.sweep();
        let _ = self.sinks.try_push(sink);
    }

    /// The eyes on a burst: on what comes from the uplink (`None`), or on what comes
    /// from or goes to this port.
    #[inline]
    pub fn watch<const WATCHED: bool>(&mut self, port: Option<PortIndex>) -> Watch<'_, WATCHED> {
        if WATCHED {
            self.now = Some(Instant::now());
        }
        Watch { captures: self, port }
    }

    /// At the end of a round: lets the readers see what was recorded; `idle` if the
    /// round moved nothing.
    pub fn end_round(&mut self, idle: bool) {
        for sink in &mut self.sinks {
            sink.flush(idle);
        }
        self.sweep();
    }

    /// Drops the sinks nobody reads any more.
    fn sweep(&mut self) {
        self.sinks.retain(|sink| !sink.shared.closed.load(Ordering::Relaxed));
    }

    fn record_received(&mut self, port: Option<PortIndex>, frame: &Received<'_>) {
        let bytes = frame.buffer.frame();
        let (addresses, rest) = bytes.split_at(bytes.len().min(MAC_ADDRESSES_LEN));
        let tag = frame.stripped.map(Tag::to_bytes);
        let tag = tag.as_ref().map_or(&[][..], |tag| tag);
        self.now = Some(Instant::now());
        let at = At { interface: port, direction: Direction::Inbound, now: self.now };
        for sink in wanting(&mut self.sinks, port, port) {
            sink.record(at, None, [addresses, tag, rest]);
        }
    }

    fn record_sent(
        &mut self,
        interface: Option<PortIndex>,
        port: Option<PortIndex>,
        packets: &[&[u8]],
        reason: Option<DropReason>,
    ) {
        let at = At { interface, direction: Direction::Outbound, now: self.now };
        for packet in packets {
            let frame = packet.get(VNET_HEADER_LEN..).unwrap_or_default();
            for sink in wanting(&mut self.sinks, interface, port) {
                if reason.is_some() || !sink.selection.drops_only {
                    sink.record(at, reason, [frame, &[], &[]]);
                }
            }
        }
    }
}

fn wanting(
    sinks: &mut [Box<Sink>],
    interface: Option<PortIndex>,
    flow: Option<PortIndex>,
) -> impl Iterator<Item = &mut Box<Sink>> {
    sinks.iter_mut().filter(move |sink| sink.selection.wants(interface, flow))
}

/// Where and when a frame was seen.
#[derive(Debug, Clone, Copy)]
struct At {
    interface: Option<PortIndex>,
    direction: Direction,
    now: Option<Instant>,
}

/// The eyes on one burst. The worker's loop is compiled with and without them:
/// unless `WATCHED`, these calls are nothing.
#[derive(Debug)]
pub struct Watch<'w, const WATCHED: bool> {
    captures: &'w mut Captures,
    port: Option<PortIndex>,
}

impl<const WATCHED: bool> Watch<'_, WATCHED> {
    /// A frame has come in and is still as it came.
    #[inline]
    pub fn received(&mut self, frame: &Received<'_>) {
        if WATCHED {
            self.captures.record_received(self.port, frame);
        }
    }

    /// The frame that came in last is dropped; `port` is the one it is counted for.
    #[inline]
    pub fn dropped(&mut self, port: Option<PortIndex>, reason: DropReason) {
        if WATCHED {
            for sink in wanting(&mut self.captures.sinks, self.port, self.port) {
                sink.dropped(self.port, port, reason);
            }
        }
    }

    /// Packets (virtio header and frame) have gone to the uplink or to the port's
    /// guest, or were refused there.
    #[inline]
    pub fn sent(&mut self, to_uplink: bool, packets: &[&[u8]], reason: Option<DropReason>) {
        if WATCHED {
            let interface = self.port.filter(|_| !to_uplink);
            self.captures.record_sent(interface, self.port, packets, reason);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
    use super::*;
    use crate::frame::edit::HEADROOM;
    use crate::frame::{FrameBuffer, Tci, Tpid, VnetHeader};

    const EVERYTHING: Selection = Selection { place: Place::Everywhere, drops_only: false };

    fn receive(captures: &mut Captures, port: Option<PortIndex>, frame: &[u8], tag: Option<Tag>) {
        let mut space = vec![0; HEADROOM];
        space.extend(frame);
        let buffer = FrameBuffer::new(&mut space, HEADROOM).unwrap();
        let header = VnetHeader::default();
        captures.watch::<true>(port).received(&Received { buffer, stripped: tag, header });
    }

    fn send(captures: &mut Captures, port: PortIndex, uplink: bool, reason: Option<DropReason>) {
        let packet = [7; VNET_HEADER_LEN + 14];
        captures.watch::<true>(Some(port)).sent(uplink, &[&packet], reason);
    }

    /// Interface and reason of each record handed over so far.
    fn seen(
        captures: &mut Captures,
        source: &Source,
    ) -> Vec<(Option<PortIndex>, Option<DropReason>)> {
        captures.end_round(true);
        let mut seen = Vec::new();
        while let Ok(chunk) = source.receive(Duration::ZERO) {
            seen.extend(chunk.records().map(|record| (record.interface, record.reason)));
            source.give_back(chunk);
        }
        seen
    }

    fn capturing(selection: Selection) -> (Captures, Source) {
        let (sink, source) = capture(selection, SNAPLEN_MAX, 4);
        let mut captures = Captures::default();
        captures.add(Box::new(sink));
        (captures, source)
    }

    #[test]
    fn records_come_out_as_they_went_in() {
        let (sink, source) = capture(EVERYTHING, 20, 4);
        let mut captures = Captures::default();
        captures.add(Box::new(sink));
        let frame: Vec<u8> = (0..60).collect();
        let tag = Tag { tpid: Tpid::Service, tci: Tci(0xe123) };
        receive(&mut captures, None, &frame, Some(tag));
        receive(&mut captures, Some(3), &frame, None);
        captures.watch::<true>(Some(3)).dropped(Some(3), DropReason::SendFailed);
        captures.end_round(true);
        let chunk = source.receive(Duration::ZERO).unwrap();
        let records: Vec<_> = chunk.records().collect();
        let tagged = [&frame[..12], &[0x88, 0xa8, 0xe1, 0x23], &frame[12..16]].concat();
        let first = Record {
            time: records[0].time,
            interface: None,
            direction: Direction::Inbound,
            reason: None,
            missed: 0,
            length: 64,
            bytes: &tagged,
        };
        let second = Record {
            time: records[1].time,
            interface: Some(3),
            reason: Some(DropReason::SendFailed),
            length: 60,
            bytes: &frame[..20],
            ..first
        };
        assert_eq!(records, [first, second]);
        assert!(records[0].time <= records[1].time);
    }

    /// What one frame of each fate looks like, by selection.
    #[test]
    fn selections_show_what_they_say() {
        use DropReason::{GuestAbsent, InnerTag, Malformed, TaggedOnAccess, UplinkDown};
        let (port, other) = (Place::Port(1), Place::Port(2));
        let all: [(Option<PortIndex>, Option<DropReason>); 8] = [
            (None, None),
            (Some(1), None),
            (None, Some(InnerTag)),
            (None, Some(Malformed)),
            (Some(1), Some(GuestAbsent)),
            (Some(1), Some(TaggedOnAccess)),
            (Some(1), None),
            (None, Some(UplinkDown)),
        ];
        let cases: [(Place, bool, &[usize]); 7] = [
            (Place::Everywhere, false, &[0, 1, 2, 3, 4, 5, 6, 7]),
            (Place::Everywhere, true, &[2, 3, 4, 5, 7]),
            (Place::Uplink, false, &[0, 2, 3, 7]),
            (Place::Uplink, true, &[2, 3, 7]),
            (port, false, &[1, 4, 5, 6]),
            (port, true, &[2, 4, 5, 7]),
            (other, true, &[]),
        ];
        for (place, drops_only, expected) in cases {
            let (mut captures, source) = capturing(Selection { place, drops_only });
            let frame = [0; 60];
            receive(&mut captures, None, &frame, None);
            send(&mut captures, 1, false, None);
            receive(&mut captures, None, &frame, None);
            captures.watch::<true>(None).dropped(Some(1), InnerTag);
            receive(&mut captures, None, &frame, None);
            captures.watch::<true>(None).dropped(None, Malformed);
            send(&mut captures, 1, false, Some(GuestAbsent));
            receive(&mut captures, Some(1), &frame, None);
            captures.watch::<true>(Some(1)).dropped(Some(1), TaggedOnAccess);
            receive(&mut captures, Some(1), &frame, None);
            send(&mut captures, 1, true, Some(UplinkDown));
            let expected: Vec<_> = expected.iter().map(|index| all[*index]).collect();
            assert_eq!(seen(&mut captures, &source), expected, "{place:?} drops: {drops_only}");
        }
    }

    #[test]
    fn without_room_frames_are_missed_and_counted_where() {
        for drops_only in [false, true] {
            let (mut captures, source) = capturing(Selection { drops_only, ..EVERYTHING });
            let frame = [0; 1000];
            let per_chunk = CHUNK_LEN / (RECORD_HEADER_LEN + frame.len());
            let fits = (per_chunk * CHUNKS) as u64;
            for _ in 0..fits + 10 {
                receive(&mut captures, Some(2), &frame, None);
                captures.watch::<true>(Some(2)).dropped(Some(2), DropReason::Malformed);
            }
            receive(&mut captures, None, &frame, None);
            assert_eq!(source.missed(Some(2)), 10);
            assert_eq!(source.missed(None), u64::from(!drops_only));
            assert_eq!(seen(&mut captures, &source).len() as u64, fits);
            receive(&mut captures, Some(2), &frame, None);
            captures.watch::<true>(Some(2)).dropped(Some(2), DropReason::Malformed);
            captures.end_round(true);
            let chunk = source.receive(Duration::ZERO).unwrap();
            assert_eq!(chunk.records().next().unwrap().missed, 10, "told with the next");
        }
    }

    #[test]
    fn the_longest_frame_fits() {
        let (mut captures, source) = capturing(EVERYTHING);
        receive(&mut captures, None, &vec![9; 65_535 + 14 + 8], None);
        captures.end_round(true);
        let chunk = source.receive(Duration::ZERO).unwrap();
        assert_eq!(chunk.records().next().unwrap().bytes.len(), 65_557);
    }

    #[test]
    fn a_sink_without_a_reader_leaves() {
        let (mut captures, source) = capturing(EVERYTHING);
        receive(&mut captures, None, &[0; 60], None);
        source.close();
        captures.end_round(false);
        assert!(captures.is_empty());
        assert_eq!(source.receive(Duration::ZERO).unwrap().records().count(), 1, "the last ones");
        assert_eq!(source.receive(Duration::ZERO), Err(RecvTimeoutError::Disconnected));

        let sources: Vec<Source> = (0..=SINKS_MAX)
            .map(|_| {
                let (sink, source) = capture(EVERYTHING, 64, 4);
                captures.add(Box::new(sink));
                source
            })
            .collect();
        let refused = sources.last().unwrap().receive(Duration::ZERO);
        assert_eq!(refused, Err(RecvTimeoutError::Disconnected), "one too many");
        drop(sources);
        captures.end_round(true);
        assert!(captures.is_empty());
    }

    #[test]
    fn a_reader_that_waits_sees_frames_at_once() {
        let (mut captures, source) = capturing(EVERYTHING);
        receive(&mut captures, None, &[0; 60], None);
        captures.end_round(false);
        assert!(!source.is_empty());
        // It has not come yet: the next frames wait for a full chunk, or for quiet.
        receive(&mut captures, None, &[0; 60], None);
        captures.end_round(false);
        assert_eq!(source.receive(Duration::ZERO).unwrap().records().count(), 1);
        assert!(source.is_empty());
        captures.end_round(true);
        assert!(!source.is_empty());
    }
}
