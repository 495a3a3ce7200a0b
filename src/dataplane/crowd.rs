//! Who is held back when more arrives on the wire than can be passed on.
//!
//! All ports' frames wait in the uplink's one ring. If it fills up, the kernel drops
//! whatever comes next, of the port that floods it and of those that hardly get a frame.
//! So once a part of it is full, what belongs to the port that most of all frames are for
//! is dropped instead of sent, which takes no system call, until the ring is emptier again:
//! the longest queue pays, as if each port had one of its own. A port that has the wire to
//! itself keeps the whole ring, and where none has most, nobody is held back.
//!
//! Who has most is found by a vote over many bursts (Boyer and Moore, "MJRTY", 1991): each
//! frame of the candidate's votes for it, any other against. One burst would not do, as
//! polite ports' frames come in runs, too. The votes are of one backlog: with less than a
//! burst waiting there is nothing to vote about, and nothing it costs.

use super::chains::Chains;
use crate::switch::PortIndex;

/// Fill of the ring from which somebody has to pay, in thousandths.
const FULL: u32 = 250;
/// Votes in favour that make a candidate the culprit, and how many are kept.
const ELECTED: usize = 512;
const VOTES_MAX: usize = 1024;
/// For how many bursts frames of another port are remembered.
const MEMORY: u8 = 64;

/// What is remembered from burst to burst.
#[derive(Debug, Default)]
pub struct Crowd {
    candidate: PortIndex,
    votes: usize,
    /// Bursts for which others' frames are still remembered.
    others: u8,
}

impl Crowd {
    /// Whose frames of this burst are to be dropped, with the ring this full, in
    /// thousandths.
    #[inline]
    pub fn too_much(&mut self, chains: &Chains, fill: u32) -> Option<PortIndex> {
        if fill == 0 {
            (self.votes, self.others) = (0, 0);
            return None;
        }
        self.others = if chains.len() > 1 { MEMORY } else { self.others.saturating_sub(1) };
        for (port, positions) in chains.iter() {
            let frames = positions.count();
            if port == self.candidate {
                self.votes = (self.votes + frames).min(VOTES_MAX);
            } else if frames > self.votes {
                (self.candidate, self.votes) = (port, frames - self.votes);
            } else {
                self.votes -= frames;
            }
        }
        let culprit = fill >= FULL && self.others > 0 && self.votes >= ELECTED;
        culprit.then_some(self.candidate)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
    use super::super::burst::Handling;
    use super::*;
    use crate::dataplane::{Abilities, PollMode, PortShared, UplinkShared, Worker};
    use crate::frame::{Pcp, Tag, Tci, Tpid, Vid, VnetHeader};
    use crate::port::{Arrival, Device, DeviceState, FaultyPort};
    use crate::switch::{DropReason, Membership, Priority, Table, Vlans};
    use std::sync::Arc;
    use std::time::Instant;

    fn burst(ports: impl Iterator<Item = PortIndex>) -> Chains {
        let mut chains = Chains::default();
        for (position, port) in (0..64).zip(ports) {
            chains.append(port, position, Handling::Whole);
        }
        chains
    }

    /// Frames of port 7, and every so manieth one of ports 0 to 6.
    fn flood(every: usize) -> Chains {
        burst((0..).map(|at: usize| if at.is_multiple_of(every) { at % 7 } else { 7 }))
    }

    #[test]
    fn whoever_has_most_of_a_full_ring_pays_while_others_are_there() {
        let mut crowd = Crowd::default();
        let found = (0..100).position(|_| crowd.too_much(&flood(4), FULL) == Some(7));
        assert!(found.is_some_and(|bursts| (8..40).contains(&bursts)), "{found:?}");
        assert_eq!(crowd.too_much(&flood(4), FULL - 1), None, "there is room");
        let alone = || burst(std::iter::repeat(7));
        for _ in 1..MEMORY {
            assert_eq!(crowd.too_much(&alone(), FULL), Some(7), "the others will come again");
        }
        crowd.too_much(&alone(), FULL);
        assert_eq!(crowd.too_much(&alone(), 1000), None, "the others have gone");
        for _ in 0..100 {
            crowd.too_much(&flood(4), FULL);
        }
        assert_eq!(crowd.too_much(&flood(4), 0), None);
        assert_eq!(crowd.too_much(&flood(4), 1000), None, "a backlog of its own, voted on anew");
    }

    #[test]
    fn where_nobody_has_most_nobody_pays() {
        let mut crowd = Crowd::default();
        for turn in 0..1000 {
            // Each in a run of its own, as a batch of echoes is.
            let runs = burst((0..).map(|at: usize| (turn + at / 40) % 9));
            assert_eq!(crowd.too_much(&runs, 1000), None);
        }
        assert_eq!(crowd.too_much(&burst(std::iter::empty()), 1000), None);
    }

    #[test]
    fn another_culprit_takes_over() {
        let mut crowd = Crowd::default();
        for _ in 0..100 {
            crowd.too_much(&flood(4), FULL);
        }
        let next = || burst((0..).map(|at: usize| if at.is_multiple_of(4) { 7 } else { 3 }));
        let changed = (0..100).position(|_| crowd.too_much(&next(), FULL) == Some(3));
        assert!(changed.is_some_and(|bursts| bursts < 64), "{changed:?}");
    }

    #[test]
    fn the_polite_lose_nothing_to_a_flood_that_fills_the_ring() {
        const FRAMES: usize = 4 * FaultyPort::SLOTS;
        const POLITE_EVERY: usize = 8;
        let vids = [101, 102].map(|vid| Vid::new(vid).unwrap());
        let memberships = vids.map(|vid| {
            let priority = Priority::Fixed(Pcp::default());
            Membership::new(Vlans::One(vid), None, None, Tpid::Customer, None, priority).unwrap()
        });
        let table = Arc::new(Table::compile(&memberships).unwrap());
        let ports = [(); 2].map(|()| Arc::<PortShared>::default());
        let uplink = Arc::<UplinkShared>::default();
        for link in [&uplink.link, &ports[0].link, &ports[1].link] {
            link.set(DeviceState::Up, 1500);
        }
        let abilities = Abilities { tagged_gso: true, udp_gso: true };
        let shared = ports.iter().cloned();
        let (mut worker, _commands, _notices) =
            Worker::new(table, uplink, shared, abilities, PollMode::Busy).unwrap();
        let wire = FaultyPort::default();
        worker.attach(None, Box::new(Device::Faulty(wire.clone())));
        let guests = [(); 2].map(|()| FaultyPort::default());
        for (port, guest) in guests.iter().enumerate() {
            worker.attach(Some(port), Box::new(Device::Faulty(guest.clone())));
        }
        wire.script().arriving.extend((0..FRAMES).map(|at| {
            let vid = vids[usize::from(at % POLITE_EVERY == 0)];
            let tag = Tag { tpid: Tpid::Customer, tci: Tci::new(vid, Pcp::default()) };
            let header = VnetHeader::default();
            Arrival::Frame { bytes: vec![0x5a; 60], stripped: Some(tag), header }
        }));
        while worker.round(Instant::now()) {}

        let [flood, polite] = ports.map(|port| port.to_guest.snapshot());
        let polite_frames = (FRAMES / POLITE_EVERY) as u64;
        assert_eq!((polite.in_frames, polite.out_frames), (polite_frames, polite_frames));
        assert_eq!(guests[1].script().taken.len() as u64, polite_frames);
        assert_eq!(flood.in_frames, FRAMES as u64 - polite_frames);
        let drops: Vec<_> = flood.reasons().collect();
        let dropped = flood.in_frames - flood.out_frames;
        assert_eq!(drops, [(DropReason::RingOverrun, dropped)]);
        // From a quarter downward it gets everything again.
        let kept = guests[0].script().taken.len();
        assert_eq!(kept as u64, flood.out_frames);
        assert!((FaultyPort::SLOTS / 5..FRAMES / 2).contains(&kept), "{kept}");
    }
}
