//! Devices whose seal has not been moved yet to where it costs least.
//!
//! A seal is put where that is quickest, and moved later: each move takes several netlink
//! requests and the kernel's device lock. What it saves it saves per frame, so devices with
//! frames come first; the silent ones of a host with very many take their time.

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

/// Moved at once, as what the kernel tells of all of them is looked at once.
const AT_ONCE: usize = 4;
/// Until the next ones.
const SOON: Duration = Duration::from_millis(250);
/// Silent devices from which on their moves would be seen in the host's load.
const MANY: usize = 64;
/// Until one of so many silent devices is moved.
const LATER: Duration = Duration::from_secs(2);

/// The devices, by index.
#[derive(Debug)]
pub struct Settling {
    /// Those with frames at the end.
    devices: VecDeque<u32>,
    busy: usize,
    /// All of them.
    indexes: HashSet<u32>,
    /// When some were moved last.
    last: Instant,
}

impl Settling {
    /// None yet.
    pub fn new(now: Instant) -> Self {
        Self { devices: VecDeque::new(), busy: 0, indexes: HashSet::new(), last: now }
    }

    /// Adds one, the next of those without frames.
    pub fn add(&mut self, index: u32) {
        if self.indexes.insert(index) {
            self.devices.insert(self.devices.len() - self.busy, index);
        }
    }

    /// Whether this is one.
    pub fn contains(&self, index: u32) -> bool {
        self.indexes.contains(&index)
    }

    /// Forgets one that is no port any more, or needs no move.
    pub fn forget(&mut self, index: u32) {
        if !self.indexes.remove(&index) {
            return;
        }
        let Some(place) = self.devices.iter().position(|other| *other == index) else { return };
        if place >= self.devices.len() - self.busy {
            self.busy -= 1;
        }
        self.devices.remove(place);
    }

    /// Takes note of which devices have frames.
    pub fn prefer(&mut self, busy: &HashSet<u32>) {
        self.devices.make_contiguous().sort_by_key(|index| busy.contains(index));
        self.busy = self.devices.iter().rev().take_while(|index| busy.contains(index)).count();
    }

    fn interval(&self) -> Duration {
        if self.busy == 0 && self.devices.len() > MANY { LATER } else { SOON }
    }

    /// How long nothing must happen until some can be moved; `None` if there are none.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        let left = (self.last + self.interval()).saturating_duration_since(now);
        (!self.is_empty()).then_some(left.max(SOON))
    }

    /// The next ones, if it is time for them.
    pub fn take(&mut self, now: Instant) -> impl Iterator<Item = u32> + use<> {
        let interval = self.interval();
        let count = if now.saturating_duration_since(self.last) < interval {
            0
        } else {
            self.last = now;
            if interval == LATER { 1 } else { AT_ONCE }
        };
        let rest = self.devices.len().saturating_sub(count);
        self.busy = self.busy.saturating_sub(count);
        let next = self.devices.split_off(rest);
        for index in &next {
            self.indexes.remove(index);
        }
        next.into_iter().rev()
    }

    /// Whether there are any.
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_with_frames_come_first_and_many_silent_ones_wait() {
        let start = Instant::now();
        let mut settling = Settling::new(start);
        assert_eq!(settling.wait(start), None);
        (1..=100).for_each(|index| settling.add(index));
        assert_eq!(settling.wait(start), Some(LATER));
        assert_eq!(settling.take(start + SOON).count(), 0);
        // Whoever has just made a device is about to do more with it.
        assert_eq!(settling.wait(start + LATER), Some(SOON));
        assert_eq!(settling.take(start + LATER).collect::<Vec<_>>(), [100]);
        assert!(settling.contains(99) && !settling.contains(100));
        assert_eq!(settling.take(start + LATER + SOON).count(), 0);
        settling.prefer(&HashSet::from([50, 70, 1]));
        settling.forget(70);
        let next: Vec<u32> = settling.take(start + LATER + SOON).collect();
        assert!(next.len() == AT_ONCE && next.first() == Some(&50), "{next:?}");
        assert_eq!(settling.take(start + LATER + 2 * SOON).count(), 0);
        (1..=100).for_each(|index| settling.forget(index));
        assert!(settling.is_empty() && settling.wait(start).is_none());
    }

    #[test]
    fn few_are_moved_soon() {
        let start = Instant::now();
        let mut settling = Settling::new(start);
        (1..=6).for_each(|index| settling.add(index));
        assert_eq!(settling.wait(start), Some(SOON));
        assert_eq!(settling.take(start + SOON).collect::<Vec<_>>(), [6, 5, 4, 3]);
        assert_eq!(settling.take(start + 2 * SOON).collect::<Vec<_>>(), [2, 1]);
    }
}
