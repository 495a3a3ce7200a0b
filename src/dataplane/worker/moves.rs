//! Ports that change their worker, with no frame lost or out of order.
//!
//! The uplink's frames are steered by VLAN, and every worker has a ring of its own for
//! them. When a port moves from one worker to another, its frames are in the ring of the
//! first up to some moment, and in that of the second from then on. So the second leaves
//! its ring alone ([`Command::Hold`](super::Command::Hold)) while control steers the
//! port's VLANs to it, and until the first has passed on what it had
//! ([`Worker::give`]). What the guest sends needs no such care: its device goes from one
//! to the other with its ring and the place in it.
//!
//! A frame that the kernel steered by the old rule and puts into the old ring after that
//! comes too late: to deliver it would be to deliver it out of order. It is counted to a
//! place that stands for all ports a worker does not have, which control shows as drops
//! by the name of `wrong_worker`.

use super::{Device, Instant, Notice, Slot, Worker, heat};
use crate::dataplane::counters::PortShared;
use crate::switch::PortIndex;
use std::sync::Arc;

/// Whether the ring of an uplink that is held still has room, a quarter of it.
#[cold]
#[inline(never)]
pub(super) fn has_room(uplink: &Device) -> bool {
    let (_, slots) = uplink.position();
    uplink.waiting() * 4 <= slots * 3
}

impl Worker {
    /// Leaves the uplink's frames where they are.
    pub(super) fn hold(&mut self) {
        self.held = true;
        let _ = self.notices.send(Notice::Held);
    }

    /// Passes on what has arrived for these ports, and gives them away.
    pub(super) fn give(&mut self, ports: &[PortIndex], instead: &Arc<PortShared>) {
        self.held = false;
        let mut left = self.uplink.as_deref().map_or(0, Device::waiting);
        while left > 0 {
            let before = self.uplink_position();
            if !self.round(Instant::now()) {
                break;
            }
            let (now, slots) = self.uplink_position();
            let passed = (now + slots).saturating_sub(before.0).checked_rem(slots);
            left = left.saturating_sub(passed.unwrap_or(left));
        }
        let mut given = Vec::with_capacity(ports.len());
        for port in ports.iter().copied() {
            self.hot.retain(|hot| *hot != port);
            let Some(place) = self.slots.get_mut(port) else { continue };
            let mut slot = std::mem::replace(place, Slot::new(Arc::clone(instead)));
            slot.hot = false;
            if let Some(device) = &slot.device {
                self.forget_device(device);
            }
            given.push((port, slot));
        }
        let _ = self.notices.send(Notice::Given(given));
    }

    fn uplink_position(&self) -> (usize, usize) {
        self.uplink.as_deref().map_or((0, 0), Device::position)
    }

    /// Serves these ports from now on, and the uplink again.
    pub(super) fn take(&mut self, ports: Vec<(PortIndex, Slot)>) {
        for (port, mut slot) in ports {
            let device = slot.device.take();
            self.add(port, Arc::clone(&slot.shared));
            if let Some(place) = self.slots.get_mut(port) {
                *place = slot;
            }
            if let Some(device) = device {
                self.attach(Some(port), device);
            } else {
                heat(&mut self.slots, &mut self.hot, port);
            }
        }
        self.held = false;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;
    use crate::dataplane::{Abilities, Command, PollMode, UplinkShared};
    use crate::frame::{Pcp, Tag, Tci, Tpid, Vid, VnetHeader};
    use crate::port::{DeviceState, MemoryPort};
    use crate::switch::{Membership, Priority, Table, Vlans};
    use crossbeam_channel::{Receiver, Sender};

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
        let (port, strays) = (Arc::<PortShared>::default(), [Arc::default(), Arc::default()]);
        port.link.set(DeviceState::Up, 1500);
        let [here, there] = &strays;
        let (mut first, to_first, from_first, _) = worker([&port], 5);
        first.attach(Some(0), Box::new(Device::Memory(MemoryPort::default())));
        let (mut second, to_second, from_second, uplink) = worker([there], 3);
        let now = Instant::now();
        assert!(first.round(now));
        assert_eq!(frames(&port), (1, 1));

        to_second.send(Command::Hold).unwrap();
        assert!(second.obey().is_continue());
        assert!(matches!(from_second.try_recv(), Ok(Notice::Held)));
        assert!(!second.round(now), "its part of the uplink waits");

        to_first.send(Command::Give(vec![0], Arc::clone(here))).unwrap();
        assert!(first.obey().is_continue());
        let Ok(Notice::Given(ports)) = from_first.try_recv() else {
            unreachable!("the port is given away");
        };
        // What comes now comes too late.
        assert!(first.round(now));
        assert_eq!((frames(&port), frames(here)), ((1, 1), (1, 0)));

        to_second.send(Command::Take(ports)).unwrap();
        assert!(second.obey().is_continue());
        while second.round(now) {}
        assert_eq!((frames(&port), frames(there)), ((4, 4), (0, 0)));
        assert_eq!(uplink.from_wire.snapshot().out_frames, 3);
    }
}
