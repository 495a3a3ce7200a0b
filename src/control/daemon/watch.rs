//! What the clock's ticks see: once a second the counters are looked at (those of silent
//! ports among very many in turns), to tell
//! since when a device is in its state, when a frame was last dropped and why, how
//! loaded worker and rings are, and when somebody is too slow for the frames meant
//! for it. Of the latter one line at the beginning and one every ten seconds.

use super::Daemon;
use super::stuck::RingWatch;
use crate::control::api::EventKind;
use crate::dataplane::{FlowSnapshot, WorkerShared};
use crate::port::DeviceState;
use crate::switch::DropReason;
use std::collections::HashSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Between two ticks.
pub const TICK: Duration = Duration::from_secs(1);
/// Ports from which on silent ones on the kernel path are not looked at by every tick: what
/// programs have counted takes a system call for each.
const MANY: usize = 200;
/// But by one of so many.
const TURNS: usize = 4;
/// Looks without a frame after which a port is silent: then its device drops none any more.
const SILENT: u8 = 4;
/// Between two lines about the same overload; it is over when one passed without.
const OVERLOAD_INTERVAL: Duration = Duration::from_secs(10);
/// Drops that mean somebody is too slow.
const OVERLOAD_REASONS: [DropReason; 3] =
    [DropReason::RingOverrun, DropReason::GuestQueueFull, DropReason::UplinkQueueFull];

/// Milliseconds since 1970.
pub fn wall_clock() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_millis() as u64
}

/// The drops of a flow at the last tick.
#[derive(Debug, Clone, Copy, Default)]
pub struct WatchedDrops {
    frames: [u64; DropReason::COUNT],
    last_seen: [u64; DropReason::COUNT],
}

impl WatchedDrops {
    /// Compares with the last tick; returns how many frames somebody was too slow for.
    fn look(&mut self, flow: &FlowSnapshot, now: u64) -> u64 {
        let mut overload = 0;
        let seen = self.frames.iter_mut().zip(&mut self.last_seen);
        for ((reason, frames), (before, last_seen)) in
            DropReason::ALL.into_iter().zip(flow.drops).zip(seen)
        {
            let more = frames.saturating_sub(*before);
            if more > 0 {
                *last_seen = now;
                *before = frames;
                overload += if OVERLOAD_REASONS.contains(&reason) { more } else { 0 };
            }
        }
        overload
    }

    /// When a reason's count was last seen to grow, in milliseconds since 1970: now, if
    /// it has grown to `frames` since the last tick.
    pub fn last_seen(&self, reason: DropReason, frames: u64, now: u64) -> u64 {
        let place = |values: &[u64]| values.get(reason.index()).copied().unwrap_or_default();
        if frames > place(&self.frames) { now } else { place(&self.last_seen) }
    }
}

/// Somebody is too slow.
#[derive(Debug, Clone, Copy)]
struct Overload {
    /// Frames since the last line about it.
    frames: u64,
    /// When the last line was.
    told: Instant,
}

/// What ticks have seen of a device.
#[derive(Debug, Clone)]
pub struct Watched {
    /// Its state.
    pub state: DeviceState,
    /// Since when, in milliseconds since 1970.
    pub since: u64,
    /// What its guest sends, or the wire.
    pub incoming: WatchedDrops,
    /// What its guest is sent.
    pub outgoing: WatchedDrops,
    /// Frames it had moved when last looked at, both ways, since the look before.
    pub frames: u64,
    /// Frames it had moved before.
    moved: u64,
    /// Looks since it has moved any.
    silent: u8,
    /// Whether this tick leaves it out.
    rests: bool,
    /// The highest fill of its ring over the last second, 0 to 1.
    pub ring_peak: f64,
    /// Whether the kernel still fills its rings.
    pub ring: RingWatch,
    overload: Option<Overload>,
}

impl Default for Watched {
    fn default() -> Self {
        Self {
            state: DeviceState::Absent,
            since: wall_clock(),
            incoming: WatchedDrops::default(),
            outgoing: WatchedDrops::default(),
            frames: 0,
            moved: 0,
            silent: 0,
            rests: false,
            ring_peak: 0.0,
            ring: RingWatch::default(),
            overload: None,
        }
    }
}

impl Watched {
    /// Takes note of the state.
    pub fn see_state(&mut self, state: DeviceState) {
        if state != self.state {
            self.state = state;
            self.since = wall_clock();
        }
    }

    /// Takes note of how many frames have been moved in all.
    fn see_frames(&mut self, moved: u64) {
        self.frames = moved.saturating_sub(std::mem::replace(&mut self.moved, moved));
        self.silent = if self.frames > 0 { 0 } else { self.silent.saturating_add(1) };
    }

    /// Has the port rest if it has been silent for long and is not due.
    fn rest_unless(&mut self, is_due: bool) {
        self.rests = self.silent >= SILENT && !is_due;
    }

    /// Returns how many frames a line is due about.
    fn see_overload(&mut self, frames: u64, now: Instant) -> Option<u64> {
        match &mut self.overload {
            None if frames > 0 => {
                self.overload = Some(Overload { frames: 0, told: now });
                Some(frames)
            }
            None => None,
            Some(overload) => {
                overload.frames += frames;
                if now.saturating_duration_since(overload.told) < OVERLOAD_INTERVAL {
                    return None;
                }
                overload.told = now;
                let due = std::mem::take(&mut overload.frames);
                if due == 0 {
                    self.overload = None;
                }
                (due > 0).then_some(due)
            }
        }
    }
}

/// What ticks have seen of a worker.
#[derive(Debug, Clone, Copy)]
pub struct WatchedWorker {
    busy: Duration,
    at: Instant,
    /// The share of the last second it was moving frames, 0 to 1.
    pub load: f64,
}

impl Default for WatchedWorker {
    fn default() -> Self {
        Self { busy: Duration::ZERO, at: Instant::now(), load: 0.0 }
    }
}

impl WatchedWorker {
    /// Looks at what it tells of itself.
    pub fn look(&mut self, shared: &WorkerShared, now: Instant) {
        let (busy, elapsed) = (shared.busy(), now.saturating_duration_since(self.at));
        let moved = busy.saturating_sub(self.busy);
        if !elapsed.is_zero() {
            self.load = (moved.as_secs_f64() / elapsed.as_secs_f64()).min(1.0);
        }
        (self.busy, self.at) = (busy, now);
    }
}

impl Daemon {
    /// Asks the uplink's device what it has dropped.
    pub(super) fn count_unsent(&mut self) {
        let Some((index, ..)) = self.uplink.attached.as_ref() else { return };
        let index = *index;
        if let Some((device, queue)) = self.host.unsent(index) {
            self.uplink.unsent.note(index, device, queue);
        }
    }

    /// Chooses which ports this tick leaves out.
    fn let_silent_rest(&mut self) {
        self.turn = (self.turn + 1) % TURNS;
        let is_many = self.ports.len() > MANY;
        for (position, port) in self.ports.iter_mut() {
            let is_due = !is_many || !port.in_kernel || position % TURNS == self.turn;
            port.watched.rest_unless(is_due);
        }
    }

    /// Looks at everything; to be called once a second.
    pub(super) fn tick(&mut self, now: Instant) {
        self.let_silent_rest();
        self.count_queues_of(|port| !port.watched.rests);
        self.count_rings();
        let time = wall_clock();
        let mut lines = Vec::new();
        let mut busy = HashSet::new();
        for (_, port) in self.ports.iter_mut() {
            port.watched.see_state(port.shared.link.state());
            if port.watched.rests {
                continue;
            }
            let (from, to) = port.flows_since(now);
            let attached = port.index();
            let shared = &port.shared;
            let watched = &mut port.watched;
            watched.ring_peak = f64::from(shared.ring_peak.take()) / 1000.0;
            watched.see_frames(from.in_frames + to.in_frames);
            if watched.frames > 0 && !self.unsettled.is_empty() {
                busy.extend(attached);
            }
            let mut overload = watched.incoming.look(&from, time);
            overload += watched.outgoing.look(&to, time);
            if let Some(frames) = watched.see_overload(overload, now) {
                lines.push((port.config.device.clone(), frames));
            }
        }
        self.unsettled.prefer(&busy);
        let flow = self.uplink_flow_since(|port| (!port.watched.rests).then_some(now));
        let watched = &mut self.uplink.watched;
        watched.see_state(self.workers.uplink_state());
        watched.ring_peak = f64::from(self.workers.take_ring_peak()) / 1000.0;
        let overload = watched.incoming.look(&flow, time);
        if let Some(frames) = watched.see_overload(overload, now) {
            lines.push((self.name.clone(), frames));
        }
        for (device, frames) in lines {
            let text = format!(
                "{device}: {frames} frames dropped because a queue was full \
                 (`vlanswitchctl drops` tells which)"
            );
            self.tell(EventKind::Overload, Some(&device), text);
        }
        self.workers.look(now);
        if self.workers.len() > 1 {
            self.rebalance();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;

    fn snapshot(reason: DropReason, frames: u64) -> FlowSnapshot {
        let mut flow = FlowSnapshot::default();
        *flow.drops.get_mut(reason.index()).unwrap() = frames;
        flow
    }

    #[test]
    fn a_drop_is_last_seen_when_its_count_grew() {
        let mut watched = WatchedDrops::default();
        let reason = DropReason::GuestQueueFull;
        assert_eq!(watched.look(&snapshot(reason, 5), 1000), 5);
        assert_eq!(watched.look(&snapshot(reason, 5), 2000), 0);
        assert_eq!(watched.last_seen(reason, 5, 9000), 1000);
        assert_eq!(watched.last_seen(reason, 6, 9000), 9000);
        assert_eq!(watched.look(&snapshot(reason, 6), 3000), 1);
        assert_eq!(watched.last_seen(reason, 6, 9000), 3000);
        assert_eq!(watched.last_seen(DropReason::Malformed, 0, 9000), 0);
        // A guest's mistake is nobody's overload.
        assert_eq!(watched.look(&snapshot(DropReason::Malformed, 9), 4000), 0);
    }

    #[test]
    fn a_port_rests_once_it_is_silent_for_longer_than_its_device_drops_late() {
        let mut watched = Watched::default();
        let mut looks = |moved: u64, is_due: bool| {
            watched.rest_unless(is_due);
            if !watched.rests {
                watched.see_frames(moved);
            }
            !watched.rests
        };
        let drop_delay = crate::dataplane::kernel::DROP_DELAY.as_secs();
        assert!((0..=drop_delay + 1).all(|_| looks(7, false)), "the first look saw frames");
        let seen: Vec<bool> = (0..8).map(|second| looks(7, second % 4 == 2)).collect();
        assert_eq!(seen, [true, false, true, false, false, false, true, false]);
        // Frames are seen when it is due, and from then on by every look.
        assert!(!looks(9, false) && looks(9, true) && looks(9, false) && looks(9, false));
    }

    #[test]
    fn an_overload_is_told_at_once_and_then_every_ten_seconds() {
        let mut watched = Watched::default();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(watched.see_overload(0, at(0)), None);
        assert_eq!(watched.see_overload(7, at(1)), Some(7));
        let told: Vec<u64> =
            (2..=30).filter_map(|second| watched.see_overload(1, at(second))).collect();
        assert_eq!(told, [10, 10]);
        // Quiet for an interval: the next is a new one.
        assert_eq!(watched.see_overload(0, at(31)), Some(9));
        assert_eq!(watched.see_overload(0, at(41)), None);
        assert_eq!(watched.see_overload(3, at(42)), Some(3));
    }
}
