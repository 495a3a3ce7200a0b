//! Devices whose seal has not been moved yet to where it costs least.
//!
//! A seal is put where that is quickest, and moved later: each move takes several netlink
//! requests and the kernel's device lock. What it saves it saves per frame, so devices with
//! frames come first; the silent ones of a host with very many take their time.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

/// Moved at once, as what the kernel tells of all of them is looked at once.
const AT_ONCE: usize = 4;
/// Until the next ones.
const SOON: Duration = Duration::from_millis(250);
/// Silent devices from which on their moves would be seen in the host's load.
const MANY: usize = 64;
/// Until one of so many silent devices is moved.
const LATER: Duration = Duration::from_millis(500);

/// The devices, by index.
#[derive(Debug, Default)]
pub struct Settling {
    /// Those with frames at the end.
    devices: VecDeque<u32>,
    busy: usize,
}

impl Settling {
    /// Adds one, the next of those without frames.
    pub fn add(&mut self, index: u32) {
        self.devices.insert(self.devices.len() - self.busy, index);
    }

    /// Forgets one that is no port any more.
    pub fn forget(&mut self, index: u32) {
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

    /// Until the next ones are to be moved; none if there are none.
    pub fn interval(&self) -> Option<Duration> {
        match self.devices.len() {
            0 => None,
            silent if self.busy == 0 && silent > MANY => Some(LATER),
            _ => Some(SOON),
        }
    }

    /// The next ones.
    pub fn take(&mut self) -> impl Iterator<Item = u32> + use<> {
        let count = if self.interval() == Some(LATER) { 1 } else { AT_ONCE };
        let rest = self.devices.len().saturating_sub(count);
        self.busy = self.busy.saturating_sub(count);
        self.devices.split_off(rest).into_iter().rev()
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
        let mut settling = Settling::default();
        assert_eq!(settling.interval(), None);
        (1..=100).for_each(|index| settling.add(index));
        assert_eq!(settling.interval(), Some(LATER));
        assert_eq!(settling.take().collect::<Vec<_>>(), [100]);
        settling.prefer(&HashSet::from([50, 70, 1]));
        assert_eq!(settling.interval(), Some(SOON));
        settling.forget(70);
        let next: Vec<u32> = settling.take().collect();
        assert!(next.len() == AT_ONCE && next.first() == Some(&50), "{next:?}");
        assert_eq!(settling.interval(), Some(LATER));
        (1..=100).for_each(|index| settling.forget(index));
        assert!(settling.is_empty() && settling.interval().is_none());
    }

    #[test]
    fn few_are_moved_soon() {
        let mut settling = Settling::default();
        (1..=6).for_each(|index| settling.add(index));
        assert_eq!(settling.interval(), Some(SOON));
        assert_eq!(settling.take().collect::<Vec<_>>(), [6, 5, 4, 3]);
        assert_eq!(settling.take().collect::<Vec<_>>(), [2, 1]);
    }
}
