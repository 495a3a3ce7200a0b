//! The worker: the loop that moves frames.
//!
//! One thread owns the uplink's and the ports' devices. A round takes a burst from
//! the uplink and one from each hot port, so no port waits longer for its turn than
//! one burst of every other. A port is hot from the moment epoll names it until it
//! has been found empty for a while; epoll is asked every few rounds, and when
//! there is nothing left to do the worker sleeps in it. Readiness is edge-triggered:
//! every frame that arrives after a look at epoll makes the next look report its
//! port, so a port may be dropped from the hot list whenever its ring is empty.
//!
//! Nothing here allocates once all ports have attached, and nothing waits but
//! epoll. Commands come from control by channel and waker.

use super::burst::{Abilities, Handling, Lane, SegmentSpace, Toward, rewrite};
use super::capture::{Captures, Sink, Watch};
use super::chains::Chains;
use super::counters::{PortShared, UplinkShared, WorkerShared};
use super::crowd::Crowd;
use super::handle::{Command, Notice, WorkerHandle};
use super::pace::{Pace, PollMode, Step};
use super::policing::PortPolicer;
use super::turns::Turns;
use crate::frame::{TAG_LEN, TagStack};
use crate::port::Device;
use crate::switch::{DropReason, GuestVerdict, PortIndex, Table, UplinkVerdict};
use crate::sys::packet::{BURST, Burst, CopyPool, Received, SendSpace};
use crate::sys::sandbox::Call;
use arrayvec::ArrayVec;
use crossbeam_channel::{Receiver, Sender};
use mio::{Events, Poll, Token, Waker};
use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};
use thiserror::Error;

const WAKER: Token = Token(usize::MAX);
const UPLINK: Token = Token(usize::MAX - 1);
/// Rounds between two looks at epoll while there is work.
const ROUNDS_PER_POLL: u32 = 16;
/// Empty rounds after which a port leaves the hot list.
const ROUNDS_TO_COOL: u32 = 64;

mod devices;
mod moves;

use moves::Hold;

/// What the loop takes, beside what its devices do.
pub const CALLS: &[Call] = &[
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_epoll_wait),
    Call::any(libc::SYS_epoll_pwait),
    Call::any(libc::SYS_epoll_ctl),
    // The waker.
    Call::any(libc::SYS_read),
];

/// The worker could not be set up.
#[derive(Debug, Error)]
#[error("cannot start a worker: {0}")]
pub struct WorkerError(#[from] io::Error);

/// A port, as its worker sees it.
#[derive(Debug)]
pub struct Slot {
    shared: Arc<PortShared>,
    device: Option<Box<Device>>,
    shed_until: Option<Instant>,
    policer: PortPolicer,
    turns: Turns,
    hot: bool,
    empty_rounds: u32,
}

impl Slot {
    /// A port without a device.
    pub fn new(shared: Arc<PortShared>) -> Self {
        Self {
            shared,
            device: None,
            shed_until: None,
            policer: PortPolicer::default(),
            turns: Turns::default(),
            hot: false,
            empty_rounds: 0,
        }
    }

    /// Whether this is the place of the port that is counted here.
    pub fn belongs_to(&self, shared: &Arc<PortShared>) -> bool {
        Arc::ptr_eq(&self.shared, shared)
    }

    /// Takes the device out, to be closed.
    pub fn take_device(&mut self) -> Option<Box<Device>> {
        self.device.take()
    }
}

/// The loop and all it owns.
#[derive(Debug)]
pub struct Worker {
    name: String,
    table: Arc<Table>,
    uplink: Option<Box<Device>>,
    uplink_shared: Arc<UplinkShared>,
    /// The uplink's frames wait for a port that comes from another worker.
    held: Option<Hold>,
    crowd: Crowd,
    uplink_shed: Option<Instant>,
    slots: Vec<Slot>,
    hot: Vec<PortIndex>,
    abilities: Abilities,
    pace: Pace,
    poll: Poll,
    events: Events,
    commands: Receiver<Command>,
    notices: Sender<Notice>,
    shared: Arc<WorkerShared>,
    copies: CopyPool,
    space: SendSpace,
    segments: SegmentSpace,
    captures: Captures,
}

impl Worker {
    /// A worker without devices, and control's end of it once it runs.
    ///
    /// # Errors
    /// [`WorkerError`] when the kernel has no descriptors left.
    pub fn new(
        table: Arc<Table>,
        uplink_shared: Arc<UplinkShared>,
        ports: impl IntoIterator<Item = Arc<PortShared>>,
        abilities: Abilities,
        mode: PollMode,
    ) -> Result<(Self, Sender<Command>, Receiver<Notice>), WorkerError> {
        let slots: Vec<Slot> = ports.into_iter().map(Slot::new).collect();
        let (command_sender, commands) = crossbeam_channel::unbounded();
        let (notices, notice_receiver) = crossbeam_channel::unbounded();
        let mut worker = Self {
            name: "worker".to_owned(),
            table,
            uplink: None,
            uplink_shared,
            held: None,
            crowd: Crowd::default(),
            uplink_shed: None,
            hot: Vec::with_capacity(slots.len()),
            slots,
            abilities,
            pace: Pace::new(mode, std::thread::available_parallelism().map_or(1, usize::from)),
            poll: Poll::new()?,
            events: Events::with_capacity(256),
            commands,
            notices,
            shared: Arc::default(),
            copies: CopyPool::default(),
            space: SendSpace::default(),
            segments: SegmentSpace::default(),
            captures: Captures::default(),
        };
        worker.police();
        Ok((worker, command_sender, notice_receiver))
    }

    /// The same, to run in a thread of this name.
    #[must_use]
    pub fn named(self, name: String) -> Self {
        Self { name, ..self }
    }

    /// Starts the loop on a thread of its own, which does `begin` first.
    ///
    /// # Errors
    /// [`WorkerError`] when there is no thread or descriptor left.
    pub fn spawn(
        self,
        commands: Sender<Command>,
        notices: Receiver<Notice>,
        begin: impl FnOnce() + Send + 'static,
    ) -> Result<WorkerHandle, WorkerError> {
        let waker = Arc::new(Waker::new(self.poll.registry(), WAKER)?);
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(self.name.clone()).spawn(move || {
            begin();
            self.run();
        })?;
        Ok(WorkerHandle { commands, waker, notices, shared, thread })
    }

    fn run(mut self) {
        let mut rounds = 0u32;
        let mut busy_since = None;
        loop {
            let now = Instant::now();
            if let Some(since) = busy_since.take() {
                self.shared.add_busy(now.saturating_duration_since(since));
            }
            let moved = self.round(now);
            busy_since = moved.then_some(now);
            rounds = rounds.wrapping_add(1);
            let timeout = match self.pace.next(moved, now) {
                Step::Again if !rounds.is_multiple_of(ROUNDS_PER_POLL) => continue,
                Step::Again => Some(Duration::ZERO),
                Step::Sleep => self.held.as_ref().map(|_| moves::HOLD_TIME),
            };
            if self.poll_events(timeout) && self.obey().is_break() {
                return;
            }
        }
    }

    /// Moves one burst from everywhere; whether there was any frame.
    pub fn round(&mut self, now: Instant) -> bool {
        if self.captures.is_empty() {
            return self.serve_all::<false>(now);
        }
        let moved = self.serve_all::<true>(now);
        self.captures.end_round(!moved);
        moved
    }

    /// A round, seen by captures or not.
    fn serve_all<const WATCHED: bool>(&mut self, now: Instant) -> bool {
        let mut moved = self.serve_uplink::<WATCHED>(now);
        let mut position = 0;
        while let Some(port) = self.hot.get(position).copied() {
            // What comes for all guests has a turn for each that sends, if it needs it.
            if position > 0 && self.uplink.as_deref().is_some_and(Device::has_burst) {
                moved |= self.serve_uplink::<WATCHED>(now);
            }
            let busy = self.serve_guest::<WATCHED>(port, now);
            moved |= busy;
            if self.cooled(port, busy) {
                self.hot.swap_remove(position);
            } else {
                position += 1;
            }
        }
        moved
    }

    fn cooled(&mut self, port: PortIndex, busy: bool) -> bool {
        let Some(slot) = self.slots.get_mut(port) else { return true };
        slot.empty_rounds = if busy { 0 } else { slot.empty_rounds + 1 };
        slot.hot = slot.empty_rounds < ROUNDS_TO_COOL;
        !slot.hot
    }

    /// Moves a burst from the uplink to the ports it belongs to.
    fn serve_uplink<const WATCHED: bool>(&mut self, now: Instant) -> bool {
        let Some(uplink) = self.uplink.as_deref_mut().filter(|device| device.is_ready()) else {
            return false;
        };
        if let Some(hold) = &self.held {
            if hold.lasts(uplink, now) {
                return false;
            }
            self.held = None;
        }
        // Below a burst there is no backlog worth a look.
        let fill = if uplink.has_burst() { uplink.ring_fill() } else { 0 };
        self.uplink_shared.ring_peak.note(fill);
        let mut burst = Burst::new();
        let lost = uplink.receive(&mut self.copies, BURST, &mut burst);
        let moved = lost > 0 || !burst.is_empty();
        let watch = self.captures.watch::<WATCHED>(None);
        let (uplink_shared, abilities) = (&self.uplink_shared, self.abilities);
        let chains =
            sort(&mut burst, lost, &self.table, &self.slots, uplink_shared, abilities, watch);
        let too_much = self.crowd.too_much(&chains, fill);
        for (port, positions) in chains.iter() {
            let Some(slot) = self.slots.get_mut(port) else { continue };
            let mut lane = Lane {
                device: slot.device.as_deref_mut(),
                link: &slot.shared.link,
                shed_until: &mut slot.shed_until,
                flow: &slot.shared.to_guest,
                toward: if slot.shared.elsewhere { Toward::Elsewhere } else { Toward::Guest },
                now,
                space: &mut self.space,
                segments: &mut self.segments,
                watch: self.captures.watch::<WATCHED>(Some(port)),
            };
            let frames = positions.filter_map(|(at, handling)| Some((burst.get(at)?, handling)));
            if too_much == Some(port) {
                lane.refuse(frames.map(|(frame, _)| frame), DropReason::RingOverrun);
            } else {
                lane.send_frames(frames);
            }
        }
        drop(burst);
        uplink.release();
        moved
    }

    /// Moves a burst from a port's guest to the uplink.
    fn serve_guest<const WATCHED: bool>(&mut self, port: PortIndex, now: Instant) -> bool {
        let Some(slot) = self.slots.get_mut(port) else { return false };
        let Some(device) = slot.device.as_deref_mut().filter(|device| device.is_ready()) else {
            return false;
        };
        let Some(most) = slot.turns.begin() else { return true };
        if device.has_burst() {
            slot.shared.ring_peak.note(device.ring_fill());
        }
        let flow = &slot.shared.from_guest;
        let mtu = self.uplink_shared.link.mtu();
        let mut burst = Burst::new();
        let lost = device.receive(&mut self.copies, most, &mut burst);
        let moved = lost > 0 || !burst.is_empty();
        let mut handlings = ArrayVec::<Option<Handling>, BURST>::new();
        let mut bytes = 0;
        let mut watch = self.captures.watch::<WATCHED>(Some(port));
        slot.policer.refill(now);
        for frame in &mut burst {
            bytes += wire_len(frame);
            watch.received(frame);
            let verdict = match TagStack::read(frame.stripped, frame.buffer.frame()) {
                Ok(tags) => self.table.decide_from_guest(port, &tags),
                Err(_) => GuestVerdict::Drop(DropReason::Malformed),
            };
            let rewritten = match verdict {
                GuestVerdict::Forward(edit) => slot
                    .policer
                    .admit(frame, &edit)
                    .and_then(|()| rewrite(frame, &edit, self.abilities, mtu)),
                GuestVerdict::Drop(reason) => Err(reason),
            };
            if let Err(reason) = rewritten {
                flow.add_drops(reason, 1);
                watch.dropped(Some(port), reason);
            }
            handlings.push(rewritten.ok());
        }
        flow.add_in(burst.len() as u64 + lost, bytes);
        flow.add_drops(DropReason::RingOverrun, lost);
        let mut lane = Lane {
            device: self.uplink.as_deref_mut(),
            link: &self.uplink_shared.link,
            shed_until: &mut self.uplink_shed,
            flow,
            toward: Toward::Uplink,
            now,
            space: &mut self.space,
            segments: &mut self.segments,
            watch: self.captures.watch::<WATCHED>(Some(port)),
        };
        let frames = burst.iter().zip(&handlings);
        let cut =
            lane.send_frames(frames.filter_map(|(frame, handling)| Some((frame, (*handling)?))));
        slot.turns.end(burst.len(), cut);
        drop(burst);
        device.release();
        moved
    }

    /// Asks epoll; whether there may be commands.
    fn poll_events(&mut self, timeout: Option<Duration>) -> bool {
        // Interrupted or not, the rings are looked at next.
        let _ = self.poll.poll(&mut self.events, timeout);
        let mut commanded = false;
        for event in &self.events {
            let (port, device) = match event.token() {
                WAKER => {
                    commanded = true;
                    continue;
                }
                UPLINK => (None, self.uplink.as_deref()),
                Token(port) => {
                    (Some(port), self.slots.get(port).and_then(|slot| slot.device.as_deref()))
                }
            };
            // A pending error would be the answer to the next read of a super-frame.
            if event.is_error()
                && let Some(device) = device
            {
                device.clear_error();
            }
            if let Some(port) = port {
                heat(&mut self.slots, &mut self.hot, port);
            }
        }
        commanded
    }

    /// Does what control has asked for since the last call; breaks when that was to end.
    pub fn obey(&mut self) -> ControlFlow<()> {
        while let Ok(command) = self.commands.try_recv() {
            match command {
                Command::Attach(devices) => {
                    for (port, device) in devices {
                        self.attach(port, device);
                    }
                }
                Command::Detach(port) => self.detach(port),
                Command::Add(port, shared) => self.add(port, shared),
                Command::Switch(number, table) => {
                    self.table = table;
                    self.police();
                    let _ = self.notices.send(Notice::Switched(number));
                }
                Command::Hold(number) => self.hold(number),
                Command::Give(number, ports, instead) => self.give(number, &ports, &instead),
                Command::Take(number, ports) => self.take(number, ports),
                Command::Capture(sink) => self.capture(sink),
                Command::Freeze => {
                    self.freeze();
                    return ControlFlow::Break(());
                }
                Command::Beat => self.shared.beat(),
                Command::Stop => {
                    self.stop();
                    return ControlFlow::Break(());
                }
            }
        }
        ControlFlow::Continue(())
    }

    /// Holds each guest to what the table says of it.
    fn police(&mut self) {
        let now = Instant::now();
        for (port, slot) in self.slots.iter_mut().enumerate() {
            slot.policer.follow(self.table.police(port), now);
        }
    }

    /// Makes room for a port.
    fn add(&mut self, port: PortIndex, shared: Arc<PortShared>) {
        while self.slots.len() <= port {
            self.slots.push(Slot::new(Arc::default()));
        }
        // Each port is on the list once at most: it never grows in the loop.
        self.hot.retain(|hot| *hot != port);
        self.hot.reserve(self.slots.len() - self.hot.len());
        if let Some(slot) = self.slots.get_mut(port) {
            *slot = Slot::new(shared);
        }
    }

    /// Shows frames to a capture from the next round on.
    pub fn capture(&mut self, sink: Box<Sink>) {
        self.captures.add(sink);
    }
}

/// Puts a port on the hot list.
fn heat(slots: &mut [Slot], hot: &mut Vec<PortIndex>, port: PortIndex) {
    let Some(slot) = slots.get_mut(port) else { return };
    slot.empty_rounds = 0;
    if !slot.hot {
        slot.hot = true;
        hot.push(port);
    }
}

/// Length of a frame on the wire, in bytes: its tags included, wherever they are.
#[inline]
fn wire_len(frame: &Received<'_>) -> u64 {
    let stripped = if frame.stripped.is_some() { TAG_LEN } else { 0 };
    (frame.buffer.frame_len() + stripped) as u64
}

/// Decides about each frame from the uplink, rewrites it, and counts it in.
fn sort<const WATCHED: bool>(
    burst: &mut Burst<'_>,
    lost: u64,
    table: &Table,
    slots: &[Slot],
    uplink: &UplinkShared,
    abilities: Abilities,
    mut watch: Watch<'_, WATCHED>,
) -> Chains {
    let mut chains = Chains::default();
    let (mut bytes, mut handed, mut handed_bytes) = (0, 0, 0);
    for (position, frame) in (0u8..).zip(burst.iter_mut()) {
        let length = wire_len(frame);
        bytes += length;
        watch.received(frame);
        let Ok(tags) = TagStack::read(frame.stripped, frame.buffer.frame()) else {
            uplink.from_wire.add_drops(DropReason::Malformed, 1);
            watch.dropped(None, DropReason::Malformed);
            continue;
        };
        let (port, edit) = match table.decide_from_uplink(&tags) {
            UplinkVerdict::Forward { port, edit } => (port, Ok(edit)),
            UplinkVerdict::Drop { port, reason } => (port, Err(reason)),
            UplinkVerdict::Unmapped => (PortIndex::MAX, Err(DropReason::UnmappedVlan)),
        };
        let Some(shared) = slots.get(port).map(|slot| &slot.shared) else {
            uplink.from_wire.add_drops(DropReason::UnmappedVlan, 1);
            watch.dropped(None, DropReason::UnmappedVlan);
            continue;
        };
        handed += 1;
        handed_bytes += length;
        shared.to_guest.add_in(1, length);
        match edit.and_then(|edit| rewrite(frame, &edit, abilities, shared.link.mtu())) {
            Ok(handling) => chains.append(port, position, handling),
            Err(reason) => {
                shared.to_guest.add_drops(reason, 1);
                watch.dropped(Some(port), reason);
            }
        }
    }
    uplink.from_wire.add_in(burst.len() as u64 + lost, bytes);
    uplink.from_wire.add_out(handed, handed_bytes);
    uplink.from_wire.add_drops(DropReason::RingOverrun, lost);
    chains
}
