//! Memberships compiled into lookup tables.
//!
//! Uplink side: `[TPID][VID]` names an entry, either a port with what to pop, or
//! a second `[TPID][VID]` table for tag pairs. Guest side: one rule for each class
//! of frame (untagged, priority-tagged, tagged), and for a trunk the set of VIDs
//! its guest may use. What a guest is held to beyond that lies beside, for the
//! workers to make policers of. Tables are immutable; a new configuration is a new table.

use super::{DropReason, Membership, Mode, PoliceRule, Priority, Vlans};
use crate::frame::{Pcp, Tag, TagEdit, Tci, Tpid, Vid};
use thiserror::Error;

/// Position of a port in the list of memberships the table was compiled from.
pub type PortIndex = usize;

/// Two ports claim the same frames.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{what} is claimed twice")]
pub struct Conflict {
    /// The port that came first.
    pub first: PortIndex,
    /// The port that came second.
    pub second: PortIndex,
    /// What both claim, for people: `VLAN 101`, `the tag pair 101.20`.
    pub what: String,
}

/// What to do with frames of one VLAN from the uplink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UplinkRule {
    pub(super) port: PortIndex,
    /// Tags to take off.
    pub(super) pop: u8,
    /// Drop the frame if a tag remains after that.
    pub(super) refuse_inner: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    Port(UplinkRule),
    /// Look the second tag up in this inner table.
    Inner(usize),
}

const VIDS: usize = 4096;

/// `[TPID][VID]`: 0 is "not claimed", else the entry's position plus one. 16 KiB
/// for each TPID in use.
#[derive(Debug, Clone, Default)]
pub(super) struct VlanIndex([Option<Box<[u32; VIDS]>>; Tpid::ALL.len()]);

impl VlanIndex {
    #[inline]
    pub(super) fn get(&self, tag: Tag) -> Option<usize> {
        let vids = self.0.get(tag.tpid.index())?.as_ref()?;
        let place = vids.get(usize::from(tag.tci.vid_bits()))?;
        (*place as usize).checked_sub(1)
    }

    /// Returns what stood there, if anything did.
    fn claim(&mut self, tpid: Tpid, vid: Vid, position: usize) -> Option<usize> {
        let vids = self.0.get_mut(tpid.index())?.get_or_insert_with(|| Box::new([0; VIDS]));
        let place = vids.get_mut(usize::from(vid.get()))?;
        let before = (*place as usize).checked_sub(1);
        if before.is_none() {
            *place = position as u32 + 1;
        }
        before
    }
}

/// What to do with one class of guest frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestRule {
    /// Drop them.
    Drop(DropReason),
    /// Send them on.
    Rewrite {
        /// With these tags.
        edit: TagEdit,
        /// The pushed tags take PCP and DEI of the guest's own tag.
        copy_priority: bool,
    },
}

/// The guest side of a port.
#[derive(Debug, Clone)]
pub struct GuestRules {
    /// Frames without a tag.
    pub untagged: GuestRule,
    /// Frames whose outermost tag has VID 0.
    pub priority_tagged: GuestRule,
    /// All others.
    pub tagged: GuestRule,
    /// Drop priority-tagged frames with another tag behind.
    pub refuse_inner: bool,
    /// A trunk's VIDs and their TPID; tagged frames outside are dropped.
    pub(super) allowed: Option<(Tpid, Box<[u64; VIDS / 64]>)>,
}

impl GuestRules {
    /// A trunk's TPID and its VIDs as runs, first and last, ascending; `None` if any VID
    /// may be used.
    pub fn allowed(&self) -> Option<(Tpid, Vec<(u16, u16)>)> {
        let (tpid, words) = self.allowed.as_ref()?;
        let mut runs: Vec<(u16, u16)> = Vec::new();
        let is_set = |vid: &u16| {
            let word = words.get(usize::from(vid / 64)).copied().unwrap_or(0);
            word & (1 << (vid % 64)) != 0
        };
        for vid in (0..VIDS as u16).filter(is_set) {
            match runs.last_mut() {
                Some((_, last)) if *last + 1 == vid => *last = vid,
                _ => runs.push((vid, vid)),
            }
        }
        Some((*tpid, runs))
    }
}

/// What a port takes off the uplink's frames of one of its VLANs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removal {
    /// Tags to take off.
    pub pop: u8,
    /// Drop the frame if a tag remains after that.
    pub refuse_inner: bool,
}

impl Membership {
    /// What becomes of the uplink's frames with this outer VID, which must be one of the
    /// port's.
    pub fn removal(&self, vid: Vid) -> Removal {
        let refuse_inner = self.mode() == Mode::Access;
        let kept = self.mode() == Mode::Trunk && self.native() != Some(vid);
        let pop = match self.vlans() {
            Vlans::Double { .. } => 2,
            _ => u8::from(!kept),
        };
        Removal { pop, refuse_inner }
    }

    /// What becomes of the guest's frames.
    pub fn guest_rules(&self) -> GuestRules {
        guest_rules(self)
    }
}

/// All ports' rules, compiled.
#[derive(Debug, Clone)]
pub struct Table {
    pub(super) outer: VlanIndex,
    pub(super) inner: Vec<VlanIndex>,
    pub(super) entries: Vec<Entry>,
    pub(super) untagged: Option<UplinkRule>,
    /// By port; `None` for a place without one.
    pub(super) guests: Vec<Option<GuestRules>>,
    claims: Vec<(Tpid, Vid)>,
    /// By port; empty places and ports held to nothing have `None`.
    police: Vec<Option<PoliceRule>>,
}

impl Table {
    /// Compiles the ports' memberships; a port's position is its [`PortIndex`], and
    /// positions may be empty (`None`).
    ///
    /// # Errors
    /// [`Conflict`] if two ports claim the same frames.
    pub fn compile<'m>(
        memberships: impl IntoIterator<Item: Into<Option<&'m Membership>>>,
    ) -> Result<Self, Conflict> {
        let mut table = Self {
            outer: VlanIndex::default(),
            inner: Vec::new(),
            entries: Vec::new(),
            untagged: None,
            guests: Vec::new(),
            claims: Vec::new(),
            police: Vec::new(),
        };
        for (port, membership) in memberships.into_iter().enumerate() {
            match membership.into() {
                Some(membership) => table.add(port, membership)?,
                None => table.guests.push(None),
            }
        }
        Ok(table)
    }

    /// The table with what guests are held to, by port: the positions are those of the
    /// memberships.
    #[must_use]
    pub fn with_police<'r>(self, rules: impl IntoIterator<Item = Option<&'r PoliceRule>>) -> Self {
        let rules = rules.into_iter();
        let police = rules.map(|rule| rule.filter(|rule| !rule.is_empty()).cloned()).collect();
        Self { police, ..self }
    }

    /// What the guest of `port` is held to, if to anything.
    pub fn police(&self, port: PortIndex) -> Option<&PoliceRule> {
        self.police.get(port)?.as_ref()
    }

    /// The outer VLANs claimed on the uplink, each once. VID 0 stands for the
    /// priority-tagged half of `0`; see [`Table::claims_untagged`].
    pub fn claims(&self) -> &[(Tpid, Vid)] {
        &self.claims
    }

    /// Whether a port takes the uplink's untagged frames.
    pub fn claims_untagged(&self) -> bool {
        self.untagged.is_some()
    }

    fn add(&mut self, port: PortIndex, membership: &Membership) -> Result<(), Conflict> {
        let tpid = membership.tpid();
        let rule = |vid| {
            let Removal { pop, refuse_inner } = membership.removal(vid);
            UplinkRule { port, pop, refuse_inner }
        };
        if let Vlans::Double { outer, inner } = *membership.vlans() {
            self.claim_pair((tpid, outer), (membership.inner_tpid(), inner), rule(outer))?;
        } else {
            for vid in membership.outer_vids() {
                self.claim(tpid, vid, rule(vid))?;
            }
        }
        if matches!(membership.vlans(), Vlans::Untagged) {
            if let Some(first) = &self.untagged {
                let what = "VLAN 0 (untagged)".to_owned();
                return Err(Conflict { first: first.port, second: port, what });
            }
            self.untagged = Some(UplinkRule { port, pop: 0, refuse_inner: false });
        }
        self.guests.push(Some(guest_rules(membership)));
        Ok(())
    }

    fn claim(&mut self, tpid: Tpid, vid: Vid, rule: UplinkRule) -> Result<(), Conflict> {
        let position = self.entries.len();
        if let Some(taken) = self.outer.claim(tpid, vid, position) {
            return Err(self.conflict(taken, rule.port, format!("VLAN {vid} (TPID {tpid})")));
        }
        self.entries.push(Entry::Port(rule));
        self.claims.push((tpid, vid));
        Ok(())
    }

    fn claim_pair(
        &mut self,
        outer: (Tpid, Vid),
        inner: (Tpid, Vid),
        rule: UplinkRule,
    ) -> Result<(), Conflict> {
        let position = self.entries.len();
        let table = match self.outer.claim(outer.0, outer.1, position) {
            None => {
                self.inner.push(VlanIndex::default());
                self.entries.push(Entry::Inner(self.inner.len() - 1));
                self.claims.push(outer);
                self.inner.len() - 1
            }
            Some(taken) => match self.entries.get(taken) {
                Some(Entry::Inner(table)) => *table,
                _ => {
                    let what = format!("VLAN {} (TPID {})", outer.1, outer.0);
                    return Err(self.conflict(taken, rule.port, what));
                }
            },
        };
        let position = self.entries.len();
        let taken =
            self.inner.get_mut(table).and_then(|index| index.claim(inner.0, inner.1, position));
        if let Some(taken) = taken {
            let what = format!("the tag pair {}.{} (TPID {})", outer.1, inner.1, outer.0);
            return Err(self.conflict(taken, rule.port, what));
        }
        self.entries.push(Entry::Port(rule));
        Ok(())
    }

    fn conflict(&self, taken: usize, second: PortIndex, what: String) -> Conflict {
        let first = match self.entries.get(taken) {
            Some(Entry::Port(rule)) => rule.port,
            // A pair's outer VLAN: the first port behind it.
            _ => match self.entries.get(taken + 1) {
                Some(Entry::Port(rule)) => rule.port,
                _ => second,
            },
        };
        Conflict { first, second, what }
    }
}

fn guest_rules(membership: &Membership) -> GuestRules {
    let (fixed, copy) = match membership.priority() {
        Priority::Fixed(pcp) => (pcp, false),
        Priority::Copy => (Pcp::default(), true),
    };
    let tag = |tpid, vid| Some(Tag { tpid, tci: Tci::new(vid, fixed) });
    let tpid = membership.tpid();
    let push = match *membership.vlans() {
        Vlans::Untagged => [tag(tpid, Vid::NONE), None],
        Vlans::One(vid) => [tag(tpid, vid), None],
        Vlans::Double { outer, inner } => [tag(tpid, outer), tag(membership.inner_tpid(), inner)],
        Vlans::List(_) => [membership.native().and_then(|vid| tag(tpid, vid)), None],
    };
    let over = |copy_priority| GuestRule::Rewrite { edit: TagEdit { pop: 0, push }, copy_priority };
    let instead = GuestRule::Rewrite { edit: TagEdit { pop: 1, push }, copy_priority: true };
    let as_it_is = GuestRule::Rewrite { edit: TagEdit::default(), copy_priority: false };
    match membership.mode() {
        Mode::Tunnel => GuestRules {
            untagged: over(false),
            priority_tagged: over(copy),
            tagged: over(copy),
            refuse_inner: false,
            allowed: None,
        },
        Mode::Access => GuestRules {
            // Without a VLAN a tag is needed only to carry a priority.
            untagged: if matches!(membership.vlans(), Vlans::Untagged) && fixed == Pcp::default() {
                as_it_is
            } else {
                over(false)
            },
            priority_tagged: instead,
            tagged: GuestRule::Drop(DropReason::TaggedOnAccess),
            refuse_inner: true,
            allowed: None,
        },
        Mode::Trunk => {
            let native = membership.native().is_some();
            let refused = GuestRule::Drop(DropReason::UntaggedOnTrunk);
            let mut allowed = Box::new([0u64; VIDS / 64]);
            for vid in membership.outer_vids().map(|vid| usize::from(vid.get())) {
                if let Some(word) = allowed.get_mut(vid / 64) {
                    *word |= 1 << (vid % 64);
                }
            }
            GuestRules {
                untagged: if native { over(false) } else { refused },
                priority_tagged: if native { instead } else { refused },
                tagged: as_it_is,
                refuse_inner: false,
                allowed: Some((tpid, allowed)),
            }
        }
    }
}
