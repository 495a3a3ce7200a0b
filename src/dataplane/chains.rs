//! The frames of one burst by port, in order, without moving them: what the uplink
//! delivers in one burst belongs to any number of ports, and each is to be sent its
//! frames in one go.

use super::burst::Handling;
use crate::switch::PortIndex;
use crate::sys::packet::BURST;
use arrayvec::ArrayVec;

/// Positions in a burst fit a byte.
const _: () = assert!(BURST <= 256);

/// Chains of positions in a burst, one for each port that has frames in it.
#[derive(Debug)]
pub struct Chains {
    ports: ArrayVec<Chain, BURST>,
    /// For each position: the next one of the same port, and how to send it.
    links: [(u8, Handling); BURST],
}

#[derive(Debug, Clone, Copy)]
struct Chain {
    port: PortIndex,
    first: u8,
    last: u8,
}

impl Default for Chains {
    fn default() -> Self {
        Self { ports: ArrayVec::new(), links: [(0, Handling::Whole); BURST] }
    }
}

impl Chains {
    /// Appends the frame at `position` to its port's chain. Positions must rise.
    #[inline]
    pub fn append(&mut self, port: PortIndex, position: u8, handling: Handling) {
        if let Some(link) = self.links.get_mut(usize::from(position)) {
            link.1 = handling;
        }
        // Frames of one port come in runs: the latest chain is the likeliest.
        match self.ports.iter_mut().rev().find(|chain| chain.port == port) {
            Some(chain) => {
                if let Some(link) = self.links.get_mut(usize::from(chain.last)) {
                    link.0 = position;
                }
                chain.last = position;
            }
            // There are at most as many chains as positions.
            None => drop(self.ports.try_push(Chain { port, first: position, last: position })),
        }
    }

    /// How many ports have frames.
    #[inline]
    pub fn len(&self) -> usize {
        self.ports.len()
    }

    /// The ports, in the order of their first frames, and the positions of each.
    pub fn iter(&self) -> impl Iterator<Item = (PortIndex, Positions<'_>)> {
        self.ports.iter().map(|chain| {
            let range = Some((chain.first, chain.last));
            (chain.port, Positions { links: &self.links, range })
        })
    }
}

/// Walks the positions of one port.
#[derive(Debug)]
pub struct Positions<'c> {
    links: &'c [(u8, Handling); BURST],
    range: Option<(u8, u8)>,
}

impl Iterator for Positions<'_> {
    type Item = (usize, Handling);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let (position, last) = self.range?;
        let (next, handling) = *self.links.get(usize::from(position))?;
        self.range = (position != last).then_some((next, last));
        Some((usize::from(position), handling))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    proptest! {
        #[test]
        fn chains_are_the_burst_grouped_by_port(
            burst in proptest::collection::vec(proptest::option::of((0..70usize, any::<bool>())), 0..=BURST)
        ) {
            let mut chains = Chains::default();
            let mut expected: BTreeMap<usize, Vec<(usize, Handling)>> = BTreeMap::new();
            let mut order = Vec::new();
            for (position, frame) in burst.iter().enumerate() {
                if let Some((port, cut)) = *frame {
                    let handling = if cut { Handling::Cut } else { Handling::Whole };
                    chains.append(port, position as u8, handling);
                    if !expected.contains_key(&port) {
                        order.push(port);
                    }
                    expected.entry(port).or_default().push((position, handling));
                }
            }
            let found: Vec<_> = chains.iter().map(|(port, _)| port).collect();
            prop_assert_eq!(found, order);
            for (port, positions) in chains.iter() {
                prop_assert_eq!(Some(&positions.collect::<Vec<_>>()), expected.get(&port));
            }
        }
    }
}
