//! Which worker serves which port: pure decisions, no action.
//!
//! Frames from the uplink are steered by their outermost tag, so all ports that share an
//! outer VLAN (tag pairs such as 101.20 and 101.21) are on one worker. When the ports
//! change, a VLAN may go from one port to another; if both are on one worker, that takes
//! the VLAN's frames along between two bursts. So ports that shared a VLAN before or share
//! one now, or of which one takes over a VLAN of the other, belong together: they are a
//! group ([`groups`]), and [`place`] gives all of a group to one worker.

use crate::frame::{Tpid, Vid};
use crate::switch::{Membership, PortIndex, Vlans};
use std::collections::HashMap;

/// What frames are steered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Key {
    /// The outermost tag.
    Tagged(Tpid, Vid),
    /// That there is none.
    Untagged,
}

/// The keys of a port's frames on the uplink.
pub fn keys(membership: &Membership) -> impl Iterator<Item = Key> {
    let tpid = membership.tpid();
    let untagged = matches!(membership.vlans(), Vlans::Untagged).then_some(Key::Untagged);
    membership.outer_vids().map(move |vid| Key::Tagged(tpid, vid)).chain(untagged)
}

/// For each position the first position of its group. Ports belong together if they have
/// a key in common in any of these configurations; each lists memberships by position.
pub fn groups(configurations: &[&[Option<&Membership>]]) -> Vec<PortIndex> {
    let places = configurations.iter().map(|ports| ports.len()).max().unwrap_or(0);
    let mut first: Vec<PortIndex> = (0..places).collect();
    let mut owners: HashMap<Key, PortIndex> = HashMap::new();
    for ports in configurations {
        for (position, membership) in ports.iter().enumerate() {
            for key in membership.iter().flat_map(|membership| keys(membership)) {
                let other = *owners.entry(key).or_insert(position);
                let (one, other) = (root(&first, position), root(&first, other));
                if let Some(place) = first.get_mut(one.max(other)) {
                    *place = one.min(other);
                }
            }
        }
    }
    (0..places).map(|position| root(&first, position)).collect()
}

fn root(first: &[PortIndex], mut position: PortIndex) -> PortIndex {
    while let Some(other) = first.get(position).filter(|other| **other != position) {
        position = *other;
    }
    position
}

/// The worker of each position, each group on one: where most of it is now, or where the
/// fewest ports are of the workers that are `usable` (of all, if none is). `before` is
/// where ports are now, if anywhere; `present` tells which positions are to have a port.
pub fn place(
    groups: &[PortIndex],
    before: &[Option<usize>],
    present: &[bool],
    usable: &[bool],
) -> Vec<usize> {
    let mut members: HashMap<PortIndex, Vec<PortIndex>> = HashMap::new();
    for (position, group) in groups.iter().enumerate() {
        members.entry(*group).or_default().push(position);
    }
    let is_present = |position: &PortIndex| present.get(*position).copied().unwrap_or(false);
    let now = |position: &PortIndex| before.get(*position).copied().flatten();
    let mut counts = vec![0_usize; usable.len().max(1)];
    let mut placed = vec![0; groups.len()];
    let mut order: Vec<(&PortIndex, &Vec<PortIndex>)> = members.iter().collect();
    // Those that are somewhere first, so that new ones see all counts.
    order.sort_by_key(|(group, ports)| (!ports.iter().any(|port| now(port).is_some()), **group));
    for (_, ports) in order {
        let mut votes = vec![0_usize; counts.len()];
        for worker in ports.iter().filter_map(now) {
            if let Some(votes) = votes.get_mut(worker) {
                *votes += 1;
            }
        }
        let most = votes.iter().enumerate().max_by_key(|(worker, votes)| {
            // The first of equals.
            (**votes, std::cmp::Reverse(*worker))
        });
        let worker = match most {
            Some((worker, votes)) if *votes > 0 => worker,
            _ => fewest(&counts, usable),
        };
        if let Some(count) = counts.get_mut(worker) {
            *count += ports.iter().filter(|port| is_present(port)).count();
        }
        for port in ports {
            if let Some(place) = placed.get_mut(*port) {
                *place = worker;
            }
        }
    }
    placed
}

fn fewest(counts: &[usize], usable: &[bool]) -> usize {
    let fewest = counts.iter().enumerate().min_by_key(|(worker, count)| {
        (!usable.get(*worker).copied().unwrap_or(false), **count, *worker)
    });
    fewest.map_or(0, |(worker, _)| worker)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;
    use crate::switch::Priority;

    fn port(vlans: Vlans) -> Membership {
        let priority = Priority::Fixed(crate::frame::Pcp::default());
        Membership::new(vlans, None, None, Tpid::Customer, None, priority).unwrap()
    }

    fn one(vid: u16) -> Membership {
        port(Vlans::One(Vid::new(vid).unwrap()))
    }

    fn pair(outer: u16, inner: u16) -> Membership {
        let (outer, inner) = (Vid::new(outer).unwrap(), Vid::new(inner).unwrap());
        port(Vlans::Double { outer, inner })
    }

    fn some(ports: &[Membership]) -> Vec<Option<&Membership>> {
        ports.iter().map(Some).collect()
    }

    #[test]
    fn ports_with_an_outer_vlan_in_common_are_a_group() {
        let ports = [pair(101, 20), one(5), pair(101, 21), one(6), port(Vlans::Untagged)];
        assert_eq!(groups(&[&some(&ports)]), [0, 1, 0, 3, 4]);
    }

    #[test]
    fn who_takes_over_a_vlan_is_in_the_group_of_who_had_it() {
        let before = [one(1), one(2), one(3)];
        let after = [one(2), one(1), one(4)];
        assert_eq!(groups(&[&some(&before), &some(&after)]), [0, 0, 2]);
        // A chain: each takes the next one's.
        let after = [one(2), one(3), one(4)];
        assert_eq!(groups(&[&some(&before), &some(&after)]), [0, 0, 0]);
    }

    #[test]
    fn new_ports_spread_and_old_ones_stay() {
        let groups: Vec<usize> = (0..6).collect();
        assert_eq!(place(&groups, &[], &[true; 6], &[true; 3]), [0, 1, 2, 0, 1, 2]);
        let before = [Some(1), Some(1), None, None, None, Some(1)];
        let placed = place(&groups, &before, &[true; 6], &[true; 2]);
        assert_eq!(placed, [1, 1, 0, 0, 0, 1]);
        // No new port for a worker that does not answer, and none is taken from it.
        let placed = place(&groups, &before, &[true; 6], &[false, true]);
        assert_eq!(placed, [1; 6]);
        let placed = place(&groups, &before, &[true; 6], &[true, false]);
        assert_eq!(placed, [1, 1, 0, 0, 0, 1]);
        assert_eq!(place(&groups, &[], &[true; 6], &[false; 2]), [0, 1, 0, 1, 0, 1]);
    }

    #[test]
    fn a_group_goes_where_most_of_it_is() {
        let placed =
            place(&[0, 0, 0, 3], &[Some(0), Some(1), Some(1), None], &[true; 4], &[true; 2]);
        assert_eq!(placed, [1, 1, 1, 0]);
    }
}
