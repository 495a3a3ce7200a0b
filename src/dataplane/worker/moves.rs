//! Ports that change their worker, with no frame lost or out of order.
//!
//! The uplink's frames are steered by VLAN, and every worker has a ring of its own for
//! them. When a port moves from one worker to another, its frames are in the ring of the
//! first up to some moment, and in that of the second from then on. So the second leaves
//! its ring alone ([`Command::Hold`](super::Command::Hold)) while control steers the
//! port's VLANs to it, and until the first has passed on what it had
//! ([`Worker::give`]), but not for longer than [`HOLD_TIME`] or with more than half of the
//! room used up: its other ports' frames wait there too. What the guest sends needs no such
//! care: its device goes from one to the other with its ring and the place in it.
//!
//! A frame meets the worker that does not have its port if the first takes longer than
//! that, or if the kernel steered it by the old rule and puts it into the old ring after
//! all. To deliver it then would be to deliver it out of order. It is counted to a place
//! that stands for all ports a worker does not have, which control shows as drops by the
//! name of `wrong_worker`.
//!
//! Control numbers its moves, so that an answer that comes late is not taken for that to
//! the next question.

use super::{Device, Duration, Instant, Notice, Slot, Worker, heat};
use crate::dataplane::counters::PortShared;
use crate::dataplane::handle::Departed;
use crate::switch::PortIndex;
use std::sync::Arc;

/// The longest an uplink is held: on a busy machine a move takes a quarter of a second.
pub(super) const HOLD_TIME: Duration = Duration::from_millis(500);
/// Super-frames that may wait: half of what the socket's queue takes, at 128 KiB each.
const COPIES_HELD: usize = 256;

/// An uplink whose frames wait.
#[derive(Debug)]
pub(super) struct Hold {
    /// The move they wait for.
    number: u64,
    since: Instant,
}

impl Hold {
    /// Whether to go on waiting: others' frames are neither lost nor late for the sake of
    /// one port.
    #[cold]
    #[inline(never)]
    pub(super) fn lasts(&self, uplink: &Device, now: Instant) -> bool {
        let (_, slots) = uplink.position();
        now.saturating_duration_since(self.since) < HOLD_TIME
            && uplink.waiting() * 2 <= slots
            && uplink.waiting_copies() <= COPIES_HELD
    }
}

impl Worker {
    /// Leaves the uplink's frames where they are.
    pub(super) fn hold(&mut self, number: u64) {
        self.held = Some(Hold { number, since: Instant::now() });
        let _ = self.notices.send(Notice::Held(number));
    }

    /// Passes on what has arrived for these ports, and gives them away.
    pub(super) fn give(&mut self, number: u64, ports: &[PortIndex], instead: &Arc<PortShared>) {
        let mut given = Vec::with_capacity(ports.len());
        if !self.shared.is_called_off(number) {
            self.pass_on_waiting();
            given.extend(ports.iter().filter_map(|port| {
                let slot = self.remove(*port, instead)?;
                Some((*port, slot))
            }));
        }
        let _ = self.notices.send(Notice::Given(number, given));
    }

    /// Serves the uplink until all is gone that waits there now.
    pub(super) fn pass_on_waiting(&mut self) {
        self.held = None;
        let mut left = self.uplink.as_deref().map_or(0, Device::waiting);
        while left > 0 {
            let (before, _) = self.uplink_position();
            let now = Instant::now();
            // Not a whole round: the other worker waits, and guests need not go first.
            let moved = if self.captures.is_empty() {
                self.serve_uplink::<false>(now)
            } else {
                self.serve_uplink::<true>(now)
            };
            if !moved {
                break;
            }
            let (after, slots) = self.uplink_position();
            let passed = (after + slots).saturating_sub(before).checked_rem(slots);
            left = left.saturating_sub(passed.unwrap_or(left));
        }
    }

    /// Takes a port out that has its place here.
    fn remove(&mut self, port: PortIndex, instead: &Arc<PortShared>) -> Option<Slot> {
        let place = self.slots.get_mut(port).filter(|place| !place.belongs_to(instead))?;
        let mut slot = std::mem::replace(place, Slot::new(Arc::clone(instead)));
        slot.hot = false;
        self.hot.retain(|hot| *hot != port);
        if let Some(device) = &slot.device {
            self.forget_device(device);
        }
        Some(slot)
    }

    fn uplink_position(&self) -> (usize, usize) {
        self.uplink.as_deref().map_or((0, 0), Device::position)
    }

    /// Serves these ports from now on, and the uplink again if it waits for them.
    pub(super) fn take(&mut self, number: u64, ports: Vec<(PortIndex, Slot)>) {
        let now = Instant::now();
        for (port, mut slot) in ports {
            let device = slot.device.take();
            // It may have been given another since it was to come.
            let newer = self.slots.get_mut(port).and_then(|place| place.device.take());
            // The table may be another than where it comes from.
            slot.policer.follow(self.table.police(port), now);
            self.add(port, Arc::clone(&slot.shared));
            if let Some(place) = self.slots.get_mut(port) {
                *place = slot;
                place.device = newer;
            }
            match device {
                Some(device) if self.device(Some(port)).is_none() => {
                    self.attach(Some(port), device);
                }
                Some(device) => {
                    let device = Some(device);
                    self.tell_departed(Departed { port: Some(port), device, error: None });
                }
                None => {}
            }
            heat(&mut self.slots, &mut self.hot, port);
        }
        if self.held.as_ref().is_some_and(|hold| hold.number == number) {
            self.held = None;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;
    use crate::dataplane::{Abilities, Command, Place, PollMode, Selection, UplinkShared, capture};
    use crate::frame::{Pcp, Tag, Tci, Tpid, Vid, VnetHeader};
    use crate::port::{DeviceState, MemoryPort};
    use crate::switch::{DropReason, Membership, Priority, Table, Vlans};
    use crossbeam_channel::{Receiver, Sender};
    use std::time::Duration;

    /// A worker of one port in VLAN 101, which is another's, with frames for it on its
    /// part of the uplink.
    fn worker(
        ports: [&Arc<PortShared>; 1],
        bursts: usize,
    ) -> (Worker, Sender<Command>, Receiver<Notice>, Arc<UplinkShared>) {
        let vid = Vid::new(101).unwrap();
        let priority = Priority::Fixed(Pcp::default());
        let membership =
            Membership::new(Vlans::One(vid), None, None, Tpid::Customer, None, priority).unwrap();
        let table = Arc::new(Table::compile([&membership]).unwrap());
        let uplink = Arc::<UplinkShared>::default();
        uplink.link.set(DeviceState::Up, 1500);
        let abilities = Abilities { tagged_gso: true, udp_gso: true };
        let (mut worker, commands, notices) = Worker::new(
            table,
            Arc::clone(&uplink),
            ports.into_iter().cloned(),
            abilities,
            PollMode::Busy,
        )
        .unwrap();
        let mut wire = MemoryPort::default();
        let tag = Tag { tpid: Tpid::Customer, tci: Tci::new(vid, Pcp::default()) };
        wire.add(&[0x5a; 60], Some(tag), VnetHeader::default());
        wire.replay(bursts);
        worker.attach(None, Box::new(Device::Memory(wire)));
        (worker, commands, notices, uplink)
    }

    fn frames(shared: &PortShared) -> (u64, u64) {
        let flow = shared.to_guest.snapshot();
        (flow.in_frames, flow.out_frames)
    }

    #[test]
    fn a_port_goes_from_one_worker_to_another_with_all_it_has() {
        let strays = [(); 2].map(|()| Arc::new(PortShared::elsewhere()));
        let port = Arc::<PortShared>::default();
        port.link.set(DeviceState::Up, 1500);
        let [here, there] = &strays;
        let (mut first, to_first, from_first, _) = worker([&port], 5);
        first.attach(Some(0), Box::new(Device::Memory(MemoryPort::default())));
        let (mut second, to_second, from_second, uplink) = worker([there], 3);
        let now = Instant::now();
        assert!(first.round(now));
        assert_eq!(frames(&port), (1, 1));

        to_second.send(Command::Hold(1)).unwrap();
        assert!(second.obey().is_continue());
        assert!(matches!(from_second.try_recv(), Ok(Notice::Held(1))));
        assert!(!second.round(now), "its part of the uplink waits");

        to_first.send(Command::Give(1, vec![0], Arc::clone(here))).unwrap();
        assert!(first.obey().is_continue());
        let Ok(Notice::Given(1, ports)) = from_first.try_recv() else {
            unreachable!("the port is given away");
        };
        // What comes now comes too late; counters and captures call it the same.
        let all = Selection { place: Place::Everywhere, drops_only: false };
        let (sink, source) = capture(all, 60, 1);
        first.capture(Box::new(sink));
        assert!(first.round(now));
        assert_eq!((frames(&port), frames(here)), ((1, 1), (1, 0)));
        let drops: Vec<_> = here.to_guest.snapshot().reasons().collect();
        assert_eq!(drops, [(DropReason::WrongWorker, 1)]);
        let seen = source.receive(Duration::from_secs(5)).unwrap();
        let reasons: Vec<_> = seen.records().filter_map(|record| record.reason).collect();
        assert_eq!(reasons, [DropReason::WrongWorker]);

        to_second.send(Command::Take(0, Vec::new())).unwrap();
        assert!(second.obey().is_continue());
        assert!(!second.round(now), "another move is over");
        to_second.send(Command::Take(1, ports)).unwrap();
        assert!(second.obey().is_continue());
        while second.round(now) {}
        assert_eq!((frames(&port), frames(there)), ((4, 4), (0, 0)));
        assert_eq!(uplink.from_wire.snapshot().out_frames, 3);
    }

    /// What a worker gives away in this move.
    fn given(worker: &mut Worker, notices: &Receiver<Notice>) -> Vec<(PortIndex, Slot)> {
        assert!(worker.obey().is_continue());
        let Ok(Notice::Given(7, ports)) = notices.try_recv() else {
            unreachable!("it answers");
        };
        ports
    }

    #[test]
    fn what_is_called_off_or_anothers_is_not_given() {
        let (port, strays) = (Arc::<PortShared>::default(), Arc::<PortShared>::default());
        let (mut worker, tell, notices, _) = worker([&port], 0);
        let give = || tell.send(Command::Give(7, vec![0], Arc::clone(&strays))).unwrap();
        worker.shared.call_off(7);
        give();
        assert!(given(&mut worker, &notices).is_empty());
        worker.shared.call_off(6);
        give();
        assert_eq!(given(&mut worker, &notices).len(), 1);
        // It has no place here any more.
        give();
        assert!(given(&mut worker, &notices).is_empty());
    }

    #[test]
    fn an_uplink_is_not_held_for_long() {
        let (mut worker, tell, _notices, _) = worker([&Arc::default()], 9);
        tell.send(Command::Hold(1)).unwrap();
        let before = Instant::now();
        assert!(worker.obey().is_continue());
        assert!(!worker.round(before));
        assert!(worker.round(Instant::now() + HOLD_TIME));
    }

    #[test]
    fn a_port_that_comes_late_keeps_the_device_it_was_given_since() {
        let (port, strays) = (Arc::<PortShared>::default(), Arc::<PortShared>::default());
        let (mut worker, tell, notices, _) = worker([&port], 0);
        worker.attach(Some(0), Box::new(Device::Memory(MemoryPort::default())));
        tell.send(Command::Give(7, vec![0], Arc::clone(&strays))).unwrap();
        let late = given(&mut worker, &notices);
        let mut newer = MemoryPort::default();
        newer.sent_packets = 5;
        worker.attach(Some(0), Box::new(Device::Memory(newer)));
        tell.send(Command::Take(7, late)).unwrap();
        assert!(worker.obey().is_continue());
        let Some(slot) = worker.slots.first() else { unreachable!() };
        assert!(slot.belongs_to(&port));
        let packets = |device: Option<&Device>| match device {
            Some(Device::Memory(memory)) => Some(memory.sent_packets),
            _ => None,
        };
        assert_eq!(packets(slot.device.as_deref()), Some(5));
        let Ok(Notice::Departed(departed)) = notices.try_recv() else {
            unreachable!("the older one is given back");
        };
        assert_eq!(packets(departed.device.as_deref()), Some(0));
    }
}
