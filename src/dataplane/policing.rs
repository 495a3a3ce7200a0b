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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::super::{
        Abilities, Place, PollMode, PortShared, SNAPLEN_MAX, Selection, UplinkShared, Worker,
        capture,
    };
    use super::*;
    use crate::frame::vnet::{FLAG_NEEDS_CSUM, GSO_TCPV4};
    use crate::frame::{Pcp, Tag, Tci, Tpid, Vid, VnetHeader};
    use crate::port::{Device, DeviceState, MemoryPort};
    use crate::switch::{Membership, Priority, Rate, Storm, Table, Vlans};
    use std::sync::Arc;
    use std::time::Duration;

    const EACH_OTHER: [u8; 12] = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];

    /// A worker whose one guest, in the tag pair 101.20, is held to `rule`, and what it counts.
    fn worker(rule: &PoliceRule, guest: MemoryPort) -> (Worker, Arc<PortShared>) {
        let vlans = Vlans::Double { outer: Vid::new(101).unwrap(), inner: Vid::new(20).unwrap() };
        let priority = Priority::Fixed(Pcp::default());
        let membership =
            Membership::new(vlans, None, None, Tpid::Customer, None, priority).unwrap();
        let table = Table::compile([&membership]).unwrap().with_police([Some(rule)]);
        let (uplink, port) = (Arc::<UplinkShared>::default(), Arc::<PortShared>::default());
        uplink.link.set(DeviceState::Up, 9000);
        let abilities = Abilities { tagged_gso: true, udp_gso: true };
        let ports = [Arc::clone(&port)];
        let (mut worker, _, _) =
            Worker::new(Arc::new(table), uplink, ports, abilities, PollMode::Busy).unwrap();
        worker.attach(None, Box::new(Device::Memory(MemoryPort::default())));
        worker.attach(Some(0), Box::new(Device::Memory(guest)));
        (worker, port)
    }

    #[test]
    fn what_is_dropped_is_captured_with_its_reason() {
        let rule = PoliceRule {
            rate: Rate::new(1_000, Some(80_000)),
            storm: Storm::new(1),
            macs: [[2, 0, 0, 0, 0, 1]].into_iter().collect(),
        };
        let mut guest = MemoryPort::default();
        let frame = |change: (usize, u8), length| {
            let mut frame = EACH_OTHER.to_vec();
            frame.extend([0x88, 0xb5]);
            *frame.get_mut(change.0).unwrap() = change.1;
            frame.resize(length, 0);
            frame
        };
        // As long as fits beside ten broadcasts; then not even a short one does.
        let long = 80_000 - 10 * 60 - 8;
        for frame in [frame((11, 9), 60), frame((0, 1), 52), frame((0, 2), long)] {
            guest.add(&frame, None, VnetHeader::default());
        }
        guest.replay(11);
        let (mut worker, port) = worker(&rule, guest);
        let everything = Selection { place: Place::Everywhere, drops_only: true };
        let (sink, source) = capture(everything, SNAPLEN_MAX, 1);
        worker.capture(Box::new(sink));
        let now = Instant::now();
        while worker.round(now) {}
        let mut seen = Vec::new();
        while let Ok(chunk) = source.receive(Duration::ZERO) {
            seen.extend(chunk.records().map(|record| (record.interface, record.reason)));
        }
        let count = |reason| seen.iter().filter(|one| **one == (Some(0), Some(reason))).count();
        assert_eq!(count(DropReason::SpoofedMac), 11);
        assert_eq!(count(DropReason::StormLimited), 1);
        let limited = count(DropReason::RateLimited);
        assert_eq!(seen.len(), 12 + limited, "{seen:?}");
        let flow = port.from_guest.snapshot();
        assert_eq!(flow.reasons().map(|(_, count)| count).sum::<u64>(), seen.len() as u64);
        // The first long one passes, and with it nine broadcasts or all ten.
        assert_eq!(flow.out_frames, 33 - seen.len() as u64);
        assert_eq!((limited, flow.out_frames), (10, 11), "{flow:?}");
    }

    /// Through the worker, on its clock: with both tags of the pair, the guest's own tag
    /// that the kernel took out, and the headers of all segments.
    #[test]
    fn what_is_counted_is_what_goes_on_the_wire() {
        let mut super_frame = EACH_OTHER.to_vec();
        super_frame.extend([0x08, 0x00, 0x45, 0, 0x10, 0, 0, 1, 0x40, 0, 64, 6, 0, 0]);
        super_frame.extend([10, 0, 0, 1, 10, 0, 0, 2, 3, 232, 7, 208, 0, 0, 0, 1, 0, 0, 0, 1]);
        super_frame.extend([0x50, 0x10, 3, 232, 0, 0, 0, 0]);
        assert_eq!(super_frame.len(), 54);
        super_frame.resize(54 + 5000, 7);
        let gso = VnetHeader {
            flags: FLAG_NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            // A lie that makes nothing cheaper.
            hdr_len: 1,
            gso_size: 999,
            csum_start: 34,
            csum_offset: 16,
        };
        let short = super_frame.get(..30).unwrap().to_vec();
        let plain = super_frame.get(..1000).unwrap().to_vec();
        let none = VnetHeader::default();
        let own = Some(Tag { tpid: Tpid::Customer, tci: Tci(5) });
        for (frame, stripped, header, wire_len) in [
            (&super_frame, None, gso, 5000 + 6 * (54 + 8)),
            (&super_frame, own, gso, 5000 + 6 * (54 + 12)),
            (&plain, None, none, 1008),
            (&plain, own, none, 1012),
            (&short, None, none, 60),
        ] {
            let mut guest = MemoryPort::default();
            guest.add(frame, stripped, header);
            guest.replay(10_000);
            let rule = PoliceRule { rate: Rate::new(10_000_000, None), ..PoliceRule::default() };
            let (mut worker, port) = worker(&rule, guest);
            let begin = Instant::now();
            let mut rounds = 0;
            while worker.round(begin + Duration::from_micros(10) * rounds) {
                rounds += 1;
            }
            let passed = port.from_guest.snapshot().out_frames;
            let bytes = 250_000 + 10_000_000 / 8 * u64::from(rounds - 1) / 100_000;
            assert_eq!(passed, (bytes / wire_len).min(10_000), "{} bytes", frame.len());
        }
    }
}
