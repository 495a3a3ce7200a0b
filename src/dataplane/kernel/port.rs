//! A port's part of the kernel path: its programs and records, and what is read of them.

use super::{KernelPathError, QUEUE_ENTRY, Target};
use crate::dataplane::FlowSnapshot;
use crate::switch::{DropReason, Removal};
use crate::sys::bpf::path::{self, Record};
use crate::sys::bpf::{self, BpfError, PinnedXdp, ProgramKind, Records, SharedPair};
use std::cell::RefCell;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long after a program has counted a frame the device may drop it.
pub const DROP_DELAY: Duration = Duration::from_secs(2);

/// A port's part of the kernel path.
#[derive(Debug)]
pub struct PortPath {
    pub(super) number: u64,
    pub(super) records: Records,
    pub(super) pin: Option<PathBuf>,
    pub(super) target: Option<Target>,
    /// Programs that entries lead to.
    pub(super) programs: Vec<(Shape, OwnedFd)>,
    /// Drops the kernel counted at the device's queue, and those of them that were for a
    /// guest that was not there.
    pub(super) queue: QueueDrops,
    /// What was last read of its records, from and to the guest, and when.
    pub(super) read: RefCell<Option<(Instant, [[u64; Record::LEN]; 2])>>,
    /// Frames sent to the device, and when that was last seen to have changed.
    pub(super) sent: Option<(u64, Instant)>,
    /// Frames only the packet path could have passed on, when last looked at.
    pub(super) unable: u64,
    /// What is at its device's XDP hook.
    pub(super) express: Option<ExpressPath>,
}

/// What a port's program toward its guest was made of, beside what is always the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) removal: Removal,
    /// The device's index, if it is there and up, and the longest frame it sends.
    pub(super) way: Option<(u32, Option<u32>)>,
    pub(super) in_transition: bool,
}

/// A program at a device's XDP hook.
#[derive(Debug)]
pub(super) struct ExpressPath {
    pub(super) attached: PinnedXdp,
    /// What it was made of; unknown of an earlier run's.
    pub(super) rules: Option<path::GuestRules>,
}

/// What the device behind a port's program has dropped, so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct QueueDrops {
    /// The device, and its count when last looked at.
    pub(super) index: u32,
    pub(super) seen: u64,
    /// Attributed to a guest that did not read.
    pub(super) full: u64,
    /// Attributed to a guest that was not there.
    pub(super) absent: u64,
}

impl QueueDrops {
    /// Takes note of what the device has dropped in all.
    fn note(&mut self, target: Target, dropped: u64) {
        if self.index == target.index {
            // A device's counts begin anew with the device, not otherwise.
            let more = dropped.saturating_sub(self.seen);
            *(if target.is_up { &mut self.full } else { &mut self.absent }) += more;
        }
        (self.index, self.seen) = (target.index, dropped);
    }
}

impl PortPath {
    /// A filter for the port's socket while the port changes its path, and the switch that
    /// says, first of its pair, whether frames are the packet path's: 1, or 0 as it is made.
    ///
    /// # Errors
    /// [`KernelPathError`].
    pub fn ring_filter(&self) -> Result<(OwnedFd, SharedPair), KernelPathError> {
        let switch = SharedPair::at(None, "vlansw_switch")?;
        let filter = path::ring_filter(switch.as_fd(), self.records.as_fd())?;
        Ok((bpf::load(ProgramKind::SocketFilter, "vlansw_ring", &filter)?, switch))
    }

    /// Takes the port's program off its device's XDP hook, if one is there.
    pub fn leave_express(&mut self) {
        if let Some(express) = self.express.take() {
            express.attached.detach();
        }
    }

    fn records_since(
        &self,
        earliest: Option<Instant>,
    ) -> Result<[[u64; Record::LEN]; 2], BpfError> {
        if let Some((when, records)) = *self.read.borrow()
            && earliest.is_none_or(|earliest| when >= earliest)
        {
            return Ok(records);
        }
        let now = Instant::now();
        let records = self.records.first_two()?;
        *self.read.borrow_mut() = Some((now, records));
        Ok(records)
    }

    /// What it leads to now.
    pub fn target(&self) -> Option<Target> {
        self.target
    }

    /// The device to ask what it has dropped; none if nothing was sent to it for a while, so
    /// that it has dropped nothing of ours. It drops after the program has counted.
    pub fn to_be_asked(&mut self, now: Instant) -> Option<u32> {
        let target = self.target?;
        let records = self.records_since(Some(now)).ok();
        let sent = records.and_then(|[_, to_guest]| to_guest.get(Record::OUT_FRAMES).copied());
        match (self.sent, sent) {
            (Some((before, since)), Some(sent)) if before == sent => {
                (now.saturating_duration_since(since) < DROP_DELAY).then_some(target.index)
            }
            (_, sent) => {
                self.sent = sent.map(|sent| (sent, now));
                Some(target.index)
            }
        }
    }

    /// Takes note of what the device has dropped in all, as the kernel counts.
    pub fn note_dropped(&mut self, dropped: u64) {
        let Some(target) = self.target else { return };
        let before = self.queue;
        self.queue.note(target, dropped);
        if self.queue != before {
            let QueueDrops { index, seen, full, absent } = self.queue;
            let numbers = [(0, u64::from(index)), (1, seen), (2, full), (3, absent)];
            // For who comes after us; if it fails, he counts from now on.
            let _ = self.records.fill(QUEUE_ENTRY, &numbers);
        }
    }

    /// Takes note of what a device has dropped in all, and counts none of it.
    pub fn skip_dropped(&mut self, index: u32, dropped: u64) {
        (self.queue.index, self.queue.seen) = (index, dropped);
    }

    /// Whether there were frames, since it was last asked, that only the packet path could
    /// have passed on: by what was last read.
    ///
    /// # Errors
    /// None that a working kernel gives.
    pub fn take_unable(&mut self) -> Result<bool, BpfError> {
        let [record, _] = self.records_since(None)?;
        let unable = record.get(Record::UNABLE).copied().unwrap_or_default();
        Ok(std::mem::replace(&mut self.unable, unable) < unable)
    }

    /// What was counted from and to the guest.
    ///
    /// # Errors
    /// None that a working kernel gives.
    pub fn flows(&self) -> Result<(FlowSnapshot, FlowSnapshot), BpfError> {
        self.flows_since(Some(Instant::now()))
    }

    /// What was counted from and to the guest at some moment since `earliest`, or at any:
    /// what was read since then is not read again.
    ///
    /// # Errors
    /// None that a working kernel gives.
    pub fn flows_since(
        &self,
        earliest: Option<Instant>,
    ) -> Result<(FlowSnapshot, FlowSnapshot), BpfError> {
        let [from_guest, to_guest] = self.records_since(earliest)?;
        let from_guest = snapshot(&from_guest);
        let mut to_guest = snapshot(&to_guest);
        for (reason, frames) in [
            (DropReason::GuestQueueFull, self.queue.full),
            (DropReason::GuestAbsent, self.queue.absent),
        ] {
            // What others have sent to the device and lost there is not ours.
            let frames = frames.min(to_guest.out_frames);
            to_guest.out_frames -= frames;
            if let Some(drops) = to_guest.drops.get_mut(reason.index()) {
                *drops += frames;
            }
        }
        Ok((from_guest, to_guest))
    }
}

/// A record as a flow.
pub(super) fn snapshot(record: &[u64; Record::LEN]) -> FlowSnapshot {
    let number = |place: usize| record.get(place).copied().unwrap_or_default();
    let mut flow = FlowSnapshot {
        in_bytes: number(Record::IN_BYTES),
        out_frames: number(Record::OUT_FRAMES),
        out_bytes: number(Record::OUT_BYTES),
        ..FlowSnapshot::default()
    };
    for (position, drops) in flow.drops.iter_mut().enumerate() {
        *drops = number(Record::DROPS + position);
    }
    flow.in_frames = flow.out_frames + flow.dropped();
    flow
}
