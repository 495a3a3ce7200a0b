//! Counters: one writer each, readable by anybody at any time.
//!
//! A flow is one direction of a port, or the uplink's receiving side. Always
//! `in + split = out + the sum of drops`; the writer adds to both sides within one
//! burst, so a reader between two bursts sees them equal.

use crate::port::Link;
use crate::switch::DropReason;
use nix::errno::Errno;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// A counter with one writer: a plain addition, no locked instruction.
#[derive(Debug, Default)]
struct Counter(AtomicU64);

impl Counter {
    #[inline]
    fn add(&self, amount: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The highest of the values noted since it was last taken: the worker notes,
/// control takes. A value noted at that very moment may be lost.
#[derive(Debug, Default)]
pub struct Peak(AtomicU32);

impl Peak {
    /// Notes a value.
    #[inline]
    pub fn note(&self, value: u32) {
        if value > self.0.load(Ordering::Relaxed) {
            self.0.store(value, Ordering::Relaxed);
        }
    }

    /// The highest value; starts anew.
    pub fn take(&self) -> u32 {
        self.0.swap(0, Ordering::Relaxed)
    }
}

/// What a worker tells of itself: the worker writes, but for what it is not to do any more.
#[derive(Debug, Default)]
pub struct WorkerShared {
    busy: Counter,
    beats: Counter,
    /// Written by control: the last move that is not to happen any more.
    called_off: AtomicU64,
}

impl WorkerShared {
    /// Counts a [`Command::Beat`](super::Command::Beat).
    pub(super) fn beat(&self) {
        self.beats.add(1);
    }

    /// Calls off this move and all before: a worker that has not given its ports away
    /// keeps them. Control's part.
    pub fn call_off(&self, number: u64) {
        self.called_off.store(number, Ordering::Relaxed);
    }

    /// Whether that happened to this one.
    pub(super) fn is_called_off(&self, number: u64) -> bool {
        number <= self.called_off.load(Ordering::Relaxed)
    }

    /// Beats it has answered.
    pub fn beats(&self) -> u64 {
        self.beats.get()
    }

    /// Counts time spent moving frames.
    #[inline]
    pub fn add_busy(&self, time: Duration) {
        self.busy.add(time.as_nanos() as u64);
    }

    /// Time spent moving frames so far.
    pub fn busy(&self) -> Duration {
        Duration::from_nanos(self.busy.get())
    }
}

/// The counters of one flow.
#[derive(Debug, Default)]
pub struct FlowCounters {
    in_frames: Counter,
    in_bytes: Counter,
    split_frames: Counter,
    out_frames: Counter,
    out_bytes: Counter,
    drops: [Counter; DropReason::COUNT],
    /// Written by control from the kernel's count, hence apart.
    overruns: Counter,
    /// The last errno counted as `send_failed`; 0 for none.
    send_error: AtomicI32,
}

impl FlowCounters {
    /// Counts frames that came in, and their bytes with all tags.
    #[inline]
    pub fn add_in(&self, frames: u64, bytes: u64) {
        self.in_frames.add(frames);
        self.in_bytes.add(bytes);
    }

    /// Counts frames that went out, and their bytes.
    #[inline]
    pub fn add_out(&self, frames: u64, bytes: u64) {
        self.out_frames.add(frames);
        self.out_bytes.add(bytes);
    }

    /// Counts frames that came into being when a super-frame was cut here: one
    /// less than its segments.
    #[inline]
    pub fn add_split(&self, frames: u64) {
        self.split_frames.add(frames);
    }

    /// Counts drops.
    #[inline]
    pub fn add_drops(&self, reason: DropReason, frames: u64) {
        if let Some(counter) = self.drops.get(reason.index()) {
            counter.add(frames);
        }
    }

    /// Remembers the cause of a `send_failed`, for people to read.
    pub fn note_send_error(&self, errno: Errno) {
        self.send_error.store(errno as i32, Ordering::Relaxed);
    }

    /// Adds frames the kernel dropped before we saw them. Control's part.
    pub fn add_overruns(&self, frames: u64) {
        self.overruns.add(frames);
    }

    /// Frames the kernel dropped before we saw them.
    pub fn overruns(&self) -> u64 {
        self.overruns.get()
    }

    /// Goes on from what another process has counted. Not while a worker counts.
    pub fn restore(&self, flow: &FlowSnapshot) {
        self.in_frames.add(flow.in_frames);
        self.in_bytes.add(flow.in_bytes);
        self.split_frames.add(flow.split_frames);
        self.out_frames.add(flow.out_frames);
        self.out_bytes.add(flow.out_bytes);
        for (counter, frames) in self.drops.iter().zip(flow.drops) {
            counter.add(frames);
        }
    }

    /// The values now.
    pub fn snapshot(&self) -> FlowSnapshot {
        let mut drops: [u64; DropReason::COUNT] = Default::default();
        for (value, counter) in drops.iter_mut().zip(&self.drops) {
            *value = counter.get();
        }
        let overruns = self.overruns.get();
        if let Some(value) = drops.get_mut(DropReason::RingOverrun.index()) {
            *value += overruns;
        }
        FlowSnapshot {
            in_frames: self.in_frames.get() + overruns,
            in_bytes: self.in_bytes.get(),
            split_frames: self.split_frames.get(),
            out_frames: self.out_frames.get(),
            out_bytes: self.out_bytes.get(),
            drops,
            send_error: match self.send_error.load(Ordering::Relaxed) {
                0 => None,
                errno => Some(Errno::from_raw(errno)),
            },
        }
    }
}

/// A flow's values at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct FlowSnapshot {
    /// Frames that came in, those the kernel dropped for us included.
    pub in_frames: u64,
    /// Bytes that came in, with all tags; without what the kernel dropped.
    pub in_bytes: u64,
    /// Frames that userspace segmentation added.
    pub split_frames: u64,
    /// Frames that went out.
    pub out_frames: u64,
    /// Bytes that went out, with all tags.
    pub out_bytes: u64,
    /// Drops, by [`DropReason::index`].
    pub drops: [u64; DropReason::COUNT],
    /// The cause of the last `send_failed`.
    pub send_error: Option<Errno>,
}

impl FlowSnapshot {
    /// Adds what another worker has counted of the same flow.
    pub fn add(&mut self, other: &Self) {
        self.in_frames += other.in_frames;
        self.in_bytes += other.in_bytes;
        self.split_frames += other.split_frames;
        self.out_frames += other.out_frames;
        self.out_bytes += other.out_bytes;
        for (sum, frames) in self.drops.iter_mut().zip(other.drops) {
            *sum += frames;
        }
        self.send_error = self.send_error.or(other.send_error);
    }

    /// What was counted since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let mut since = *self;
        for (now, before) in since.drops.iter_mut().zip(before.drops) {
            *now -= before;
        }
        since.in_frames -= before.in_frames;
        since.in_bytes -= before.in_bytes;
        since.split_frames -= before.split_frames;
        since.out_frames -= before.out_frames;
        since.out_bytes -= before.out_bytes;
        since
    }

    /// All drops.
    pub fn dropped(&self) -> u64 {
        self.drops.iter().sum()
    }

    /// The reasons that occurred, with their counts.
    pub fn reasons(&self) -> impl Iterator<Item = (DropReason, u64)> {
        DropReason::ALL.into_iter().zip(self.drops).filter(|(_, frames)| *frames > 0)
    }
}

/// What a worker and control share of a port.
#[derive(Debug, Default)]
pub struct PortShared {
    /// The device's state: control writes.
    pub link: Link,
    /// Guest to uplink: the worker writes.
    pub from_guest: FlowCounters,
    /// Uplink to guest: the worker writes.
    pub to_guest: FlowCounters,
    /// Fill of the receive ring, in thousandths.
    pub ring_peak: Peak,
    /// It stands for all ports that other workers have.
    pub elsewhere: bool,
}

impl PortShared {
    /// A place for what meets the wrong worker.
    pub fn elsewhere() -> Self {
        Self { elsewhere: true, ..Self::default() }
    }
}

/// What a worker and control share of the uplink. What was sent on it is the sum
/// of the ports' `from_guest` flows.
#[derive(Debug, Default)]
pub struct UplinkShared {
    /// The device's state: control writes.
    pub link: Link,
    /// Frames from the wire; "out" is "handed to a port": the worker writes.
    pub from_wire: FlowCounters,
    /// Fill of the receive ring, in thousandths.
    pub ring_peak: Peak,
}
