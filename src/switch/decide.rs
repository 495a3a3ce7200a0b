//! What becomes of a frame: the table of DESIGN §3, by look-up.

use super::table::{Entry, GuestRule, Table, UplinkRule};
use super::{DropReason, PortIndex};
use crate::frame::{Tag, TagEdit, TagStack, Tci};

/// What becomes of a frame from the uplink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UplinkVerdict {
    /// To this port's guest, rewritten.
    Forward {
        /// The port.
        port: PortIndex,
        /// The rewrite.
        edit: TagEdit,
    },
    /// It belongs to this port, which may not have it.
    Drop {
        /// The port.
        port: PortIndex,
        /// Why.
        reason: DropReason,
    },
    /// No port claims it: it is the host's.
    Unmapped,
}

/// What becomes of a frame from a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestVerdict {
    /// To the uplink, rewritten.
    Forward(TagEdit),
    /// Not forwarded.
    Drop(DropReason),
}

impl Table {
    /// Decides about a frame from the uplink by its tags.
    #[inline]
    pub fn decide_from_uplink(&self, tags: &TagStack) -> UplinkVerdict {
        let rule = match tags.outer() {
            None => self.untagged,
            Some(outer) => self.rule_for(outer, tags),
        };
        let Some(UplinkRule { port, pop, refuse_inner }) = rule else {
            return UplinkVerdict::Unmapped;
        };
        if refuse_inner && tags.get(usize::from(pop)).is_some() {
            return UplinkVerdict::Drop { port, reason: DropReason::InnerTag };
        }
        UplinkVerdict::Forward { port, edit: TagEdit { pop, ..TagEdit::default() } }
    }

    #[inline]
    fn rule_for(&self, outer: Tag, tags: &TagStack) -> Option<UplinkRule> {
        let table = match self.entries.get(self.outer.get(outer)?)? {
            Entry::Port(rule) => return Some(*rule),
            Entry::Inner(table) => self.inner.get(*table)?,
        };
        match self.entries.get(table.get(tags.get(1)?)?)? {
            Entry::Port(rule) => Some(*rule),
            Entry::Inner(_) => None,
        }
    }

    /// Decides about a frame from the guest of `port` by its tags.
    #[inline]
    pub fn decide_from_guest(&self, port: PortIndex, tags: &TagStack) -> GuestVerdict {
        let Some(Some(rules)) = self.guests.get(port) else {
            return GuestVerdict::Drop(DropReason::UnmappedVlan);
        };
        let (rule, tci) = match tags.outer() {
            None => (rules.untagged, Tci::default()),
            Some(tag) if tag.tci.vid_bits() == 0 => {
                // A tag behind the priority tag would come out in front one switch on.
                if rules.refuse_inner && tags.get(1).is_some() {
                    return GuestVerdict::Drop(DropReason::TaggedOnAccess);
                }
                (rules.priority_tagged, tag.tci)
            }
            Some(tag) => {
                if let Some((tpid, allowed)) = &rules.allowed {
                    let vid = usize::from(tag.tci.vid_bits());
                    let word = allowed.get(vid / 64).copied().unwrap_or(0);
                    if tag.tpid != *tpid || word & (1 << (vid % 64)) == 0 {
                        return GuestVerdict::Drop(DropReason::VlanNotAllowed);
                    }
                }
                (rules.tagged, tag.tci)
            }
        };
        match rule {
            GuestRule::Drop(reason) => GuestVerdict::Drop(reason),
            GuestRule::Rewrite { edit, copy_priority: false } => GuestVerdict::Forward(edit),
            GuestRule::Rewrite { edit, copy_priority: true } => {
                let push = edit.push.map(|tag| tag.map(|tag| with_priority(tag, tci)));
                GuestVerdict::Forward(TagEdit { push, ..edit })
            }
        }
    }
}

#[inline]
fn with_priority(tag: Tag, from: Tci) -> Tag {
    Tag { tci: Tci(tag.tci.vid_bits() | from.priority_bits()), ..tag }
}

#[cfg(test)]
#[path = "decide_tests.rs"]
mod tests;
