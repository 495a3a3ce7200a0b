//! Whether a group of ports should change its worker: a pure decision, once a second.
//!
//! What a port costs is not measured by itself: of the time its worker was busy it is
//! given the part that its frames are of the worker's. One group at a time moves from the
//! busiest worker to the idlest, and only if the busier of the two will then be clearly
//! less busy than the busiest is now ([`GAIN`]): so a group that is all of its worker's
//! load stays where it is, as it would only bring the load along, and nothing goes back
//! and forth. Below [`BUSY`] there is nothing to win.

use crate::switch::PortIndex;

/// The share of its time a worker must have been busy.
pub const BUSY: f64 = 0.5;
/// What the busier worker must gain, as a share of its time.
pub const GAIN: f64 = 0.1;

/// Looks during which a group that has moved is left where it is: load that comes and
/// goes by the second must not take ports along.
pub const REST: u32 = 10;

/// What ports of one group did in the last second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moving {
    /// The first of them.
    pub group: PortIndex,
    /// Their worker.
    pub worker: usize,
    /// Frames, both ways.
    pub frames: u64,
    /// Whether they have moved within [`REST`].
    pub rests: bool,
}

/// A move that pays.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Move {
    /// The group.
    pub group: PortIndex,
    /// Its worker.
    pub from: usize,
    /// The one it should have.
    pub to: usize,
    /// How busy the two were, 0 to 1.
    pub loads: [f64; 2],
}

/// The best move, if one pays. `loads` tells how busy each worker was, 0 to 1, or 1 for one that
/// lost frames, or nothing for one that does not answer: it looks idle and is not.
pub fn decide(loads: &[Option<f64>], groups: &[Moving]) -> Option<Move> {
    let by_load = |one: &(usize, f64), other: &(usize, f64)| one.1.total_cmp(&other.1);
    let answering = || loads.iter().enumerate().filter_map(|(at, load)| Some((at, (*load)?)));
    let (from, busiest) = answering().max_by(by_load)?;
    let (to, idlest) = answering().min_by(by_load)?;
    if busiest < BUSY {
        return None;
    }
    let theirs = || groups.iter().filter(|group| group.worker == from);
    let frames: u64 = theirs().map(|group| group.frames).sum();
    let after = |group: &Moving| {
        let share = busiest * group.frames as f64 / frames.max(1) as f64;
        (busiest - share).max(idlest + share)
    };
    let mobile = theirs().filter(|group| !group.rests);
    let best = mobile.min_by(|one, other| after(one).total_cmp(&after(other)))?;
    (after(best) <= busiest - GAIN).then_some(Move {
        group: best.group,
        from,
        to,
        loads: [busiest, idlest],
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
    use super::*;

    fn groups(frames: &[(usize, u64)]) -> Vec<Moving> {
        let groups = frames.iter().enumerate();
        groups
            .map(|(group, (worker, frames))| Moving {
                group,
                worker: *worker,
                frames: *frames,
                rests: false,
            })
            .collect()
    }

    /// With workers that all answer.
    fn decide(loads: &[f64], groups: &[Moving]) -> Option<Move> {
        super::decide(&loads.iter().copied().map(Some).collect::<Vec<_>>(), groups)
    }

    #[test]
    fn who_does_not_answer_is_not_idle() {
        let all = groups(&[(0, 100), (0, 90), (1, 10)]);
        let workers = |other| super::decide(&[Some(0.9), Some(0.3), other], &all).unwrap().to;
        assert_eq!((workers(None), workers(Some(0.0))), (1, 2));
        assert_eq!(super::decide(&[Some(0.9), None], &all), None);
        assert_eq!(super::decide(&[None, None], &all), None);
    }

    /// Applies moves until none pays; returns how many and where groups are.
    fn settle(groups: &mut [Moving], cost: f64, workers: usize) -> (usize, Vec<usize>) {
        for moves in 0..100 {
            let load = |worker| {
                let frames = groups.iter().filter(|group| group.worker == worker);
                (frames.map(|group| group.frames).sum::<u64>() as f64 * cost).min(1.0)
            };
            let loads: Vec<f64> = (0..workers).map(load).collect();
            match decide(&loads, groups) {
                None => return (moves, groups.iter().map(|group| group.worker).collect()),
                Some(one) => groups[one.group].worker = one.to,
            }
        }
        unreachable!("it never settles: {groups:?}");
    }

    #[test]
    fn an_idle_switch_stays_as_it_is() {
        assert_eq!(decide(&[0.45, 0.0], &groups(&[(0, 1000), (0, 1000)])), None);
        assert_eq!(decide(&[], &[]), None);
        assert_eq!(decide(&[1.0], &groups(&[(0, 1)])), None);
        assert_eq!(decide(&[1.0, 0.0], &[]), None);
    }

    #[test]
    fn one_elephant_does_not_bounce() {
        assert_eq!(decide(&[0.9, 0.0], &groups(&[(0, 1000)])), None);
        // It and the mice part, once and for all.
        let mut all = groups(&[(0, 1000), (0, 150), (0, 150), (1, 10)]);
        let (moves, placed) = settle(&mut all, 0.0007, 2);
        assert_eq!((moves, placed), (1, vec![1, 0, 0, 1]));
    }

    #[test]
    fn what_has_just_moved_rests() {
        let mut all = groups(&[(0, 100), (0, 90)]);
        all[0].rests = true;
        assert_eq!(decide(&[0.9, 0.0], &all).unwrap().group, 1);
        all[1].rests = true;
        assert_eq!(decide(&[0.9, 0.0], &all), None);
    }

    #[test]
    fn equal_ports_spread_and_then_stay() {
        let mut all = groups(&[(0, 100); 8]);
        let (moves, placed) = settle(&mut all, 0.001, 4);
        let count = |worker| placed.iter().filter(|placed| **placed == worker).count();
        assert!(moves <= 6 && (0..4).all(|worker| count(worker) <= 4), "{moves} {placed:?}");
    }

    #[test]
    fn a_small_difference_is_not_worth_a_move() {
        assert_eq!(decide(&[0.9, 0.8], &groups(&[(0, 50), (0, 40), (1, 80)])), None);
        // Nor does a move pay that gains less than it should.
        assert_eq!(decide(&[0.6, 0.5], &groups(&[(0, 10), (0, 50), (1, 50)])), None);
    }

    #[test]
    fn the_move_that_levels_best_is_taken() {
        let moved = decide(&[0.9, 0.1], &groups(&[(0, 10), (0, 40), (0, 40), (1, 10)])).unwrap();
        assert_eq!((moved.group, moved.from, moved.to), (1, 0, 1));
    }
}
