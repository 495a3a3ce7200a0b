//! What the uplink loses of the frames it has taken.
//!
//! A send succeeds when the kernel has taken the frame. Behind that its queueing discipline may
//! drop it for another, or with the device while that goes down: `noop_enqueue`
//! (net/sched/sch_generic.c) answers with what counts as a success. On the kernel path nobody
//! is told at all. The counters of the device and of its root queueing discipline know, without
//! a name for whose frames those were; so they are shown as the uplink's, next to what was sent.
//! They are read when they are asked for.

use serde::{Deserialize, Serialize};

/// What was counted since the first look.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unsent {
    frames: u64,
    /// Index of the device, its counter and its queueing discipline's at the last look.
    seen: Option<(u32, u64, u32)>,
}

impl Unsent {
    /// Frames.
    pub fn frames(&self) -> u64 {
        self.frames
    }

    /// Notes what the counters of a device are now. The first look at a device counts nothing:
    /// what it lost until then were not frames of this switch.
    pub fn note(&mut self, index: u32, device: u64, queue: u32) {
        if let Some((seen, device_then, queue_then)) = self.seen
            && seen == index
        {
            let queue_grew = queue.wrapping_sub(queue_then);
            // Another queueing discipline begins at nought.
            let is_another = queue < queue_then && queue_grew > u32::MAX / 2;
            self.frames += device.saturating_sub(device_then);
            self.frames += u64::from(if is_another { queue } else { queue_grew });
        }
        self.seen = Some((index, device, queue));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn growth_is_counted_whatever_begins_again() {
        let mut unsent = Unsent::default();
        unsent.note(2, 100, 50);
        assert_eq!(unsent.frames(), 0, "the first look");
        unsent.note(2, 103, 57);
        assert_eq!(unsent.frames(), 10);
        unsent.note(2, 103, 4);
        assert_eq!(unsent.frames(), 14, "another queueing discipline");
        unsent.note(3, 9, 9);
        assert_eq!(unsent.frames(), 14, "another device");
        unsent.note(3, 9, u32::MAX);
        let before = unsent.frames();
        unsent.note(3, 9, 2);
        assert_eq!(unsent.frames(), before + 3, "2^32");
    }
}
