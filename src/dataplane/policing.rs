//! Holding a guest to its rule: what `switch::police` needs to know of a frame.
//!
//! A port without a rule has no policer, and that is all that is looked at for its
//! frames. A policer is made, changed and removed when a table is put in force.

use crate::frame::vnet::segments_len;
use crate::frame::{TAG_LEN, TagEdit};
use crate::switch::{DropReason, PoliceRule, Policer};
use crate::sys::packet::Received;
use std::time::Instant;

/// Shortest frame on the wire without its FCS, in bytes: NICs pad to it (IEEE 802.3
/// clause 3.2.8, `ETH_ZLEN`).
const WIRE_MIN: usize = 60;

/// A port's policer, if it has one, and where its time begins.
#[derive(Debug, Default)]
pub(super) struct PortPolicer(Option<Box<(Policer, Instant)>>);

impl PortPolicer {
    /// Goes by this rule from now on, with the fill there was.
    pub(super) fn follow(&mut self, rule: Option<&PoliceRule>, now: Instant) {
        match (rule, self.0.as_deref_mut()) {
            (None, _) => self.0 = None,
            (Some(rule), None) => {
                self.0 = Some(Box::new((Policer::new(rule.clone(), 0), now)));
            }
            (Some(rule), Some((policer, epoch))) => policer.follow(rule, since(*epoch, now)),
        }
    }

    /// Lets the time pass, once a burst.
    #[inline]
    pub(super) fn refill(&mut self, now: Instant) {
        if let Some((policer, epoch)) = self.0.as_deref_mut() {
            policer.refill(since(*epoch, now));
        }
    }

    /// Whether a frame as the guest sent it passes, which is about to be edited so.
    ///
    /// # Errors
    /// The reason to drop it.
    #[inline]
    pub(super) fn admit(&mut self, frame: &Received<'_>, edit: &TagEdit) -> Result<(), DropReason> {
        match self.0.as_deref_mut() {
            None => Ok(()),
            Some((policer, _)) => police(policer, frame, edit),
        }
    }
}

/// Out of the way of frames that are not policed.
#[inline(never)]
fn police(policer: &mut Policer, frame: &Received<'_>, edit: &TagEdit) -> Result<(), DropReason> {
    let bytes = frame.buffer.frame();
    policer.admit(bytes, || {
        let tags = usize::from(frame.stripped.is_some()) + edit.push.iter().flatten().count();
        let tags = tags.saturating_sub(usize::from(edit.pop));
        segments_len(frame.header, bytes, tags * TAG_LEN).max(WIRE_MIN)
    })
}

/// Nanoseconds from one to the other; 584 years are enough.
fn since(epoch: Instant, now: Instant) -> u64 {
    let passed = now.saturating_duration_since(epoch);
    passed.as_secs().saturating_mul(1_000_000_000).saturating_add(passed.subsec_nanos().into())
}
