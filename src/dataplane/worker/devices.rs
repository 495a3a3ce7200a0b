//! Devices in and out of the loop.

use super::{UPLINK, Worker, heat};
use crate::dataplane::handle::{Departed, Notice};
use crate::port::Device;
use crate::switch::{DropReason, PortIndex};
use mio::unix::SourceFd;
use mio::{Interest, Token};
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

/// How long the last frames of a device may take; what is left then is counted as
/// `ring_overrun`.
const DRAIN_TIME: Duration = Duration::from_millis(20);

impl Worker {
    /// Takes a device into the loop; gives it back with the error if it cannot be
    /// polled.
    pub fn attach(&mut self, port: Option<PortIndex>, device: Box<Device>) {
        if self.device(port).is_some() {
            self.detach_by(port, Instant::now());
        }
        let registered = self.watch_device(port, &device);
        let place = match port {
            None => Some(&mut self.uplink),
            Some(port) => self.slots.get_mut(port).map(|slot| &mut slot.device),
        };
        match (place, registered) {
            (Some(place), Ok(())) => *place = Some(device),
            (_, registered) => {
                let error = registered.err();
                self.tell_departed(Departed { port, device: Some(device), error });
            }
        }
        if let Some(port) = port {
            heat(&mut self.slots, &mut self.hot, port);
        }
    }

    /// Has epoll name a device that has frames.
    fn watch_device(&self, port: Option<PortIndex>, device: &Device) -> io::Result<()> {
        let token = port.map_or(UPLINK, Token);
        device.poll_fd().map_or(Ok(()), |fd| {
            self.poll.registry().register(&mut SourceFd(&fd.as_raw_fd()), token, Interest::READABLE)
        })
    }

    /// Ends that: another may hold a duplicate that would keep the entry alive.
    pub(super) fn forget_device(&self, device: &Device) {
        if let Some(fd) = device.poll_fd() {
            let _ = self.poll.registry().deregister(&mut SourceFd(&fd.as_raw_fd()));
        }
    }

    pub(super) fn tell_departed(&self, departed: Departed) {
        let _ = self.notices.send(Notice::Departed(departed));
    }

    pub(super) fn device(&self, port: Option<PortIndex>) -> Option<&Device> {
        match port {
            None => self.uplink.as_deref(),
            Some(port) => self.slots.get(port).and_then(|slot| slot.device.as_deref()),
        }
    }

    /// Forwards what the device has already received, for a while, and gives it back.
    pub(super) fn detach(&mut self, port: Option<PortIndex>) {
        if port.is_some() && self.held.is_none() {
            // What has come for its guest still needs the device.
            self.pass_on_waiting();
        }
        self.detach_by(port, Instant::now() + DRAIN_TIME);
    }

    /// The same until the deadline.
    fn detach_by(&mut self, port: Option<PortIndex>, deadline: Instant) {
        if let Some(device) = self.device(port) {
            device.close_entrance();
        }
        loop {
            let now = Instant::now();
            let moved = match port {
                None => self.serve_uplink::<true>(now),
                Some(port) => self.serve_guest::<true>(port, now),
            };
            if !moved || now >= deadline {
                break;
            }
        }
        let device = self.take_device(port);
        if let Some(device) = &device {
            self.forget_device(device);
            let flow = match port {
                None => Some(&self.uplink_shared.from_wire),
                Some(port) => self.slots.get(port).map(|slot| &slot.shared.from_guest),
            };
            if let Some(flow) = flow {
                let left = device.waiting() as u64;
                flow.add_in(left, 0);
                flow.add_drops(DropReason::RingOverrun, left);
            }
        }
        self.tell_departed(Departed { port, device, error: None });
    }

    pub(super) fn freeze(&mut self) {
        for port in (0..self.slots.len()).map(Some).chain([None]) {
            let device = self.take_device(port);
            self.tell_departed(Departed { port, device, error: None });
        }
    }

    fn take_device(&mut self, port: Option<PortIndex>) -> Option<Box<Device>> {
        match port {
            None => self.uplink.take(),
            Some(port) => self.slots.get_mut(port).and_then(|slot| slot.device.take()),
        }
    }

    pub(super) fn stop(&mut self) {
        let deadline = Instant::now() + DRAIN_TIME;
        for port in (0..self.slots.len()).map(Some).chain([None]) {
            if let Some(device) = self.device(port) {
                device.close_entrance();
            }
            if let Some(port) = port {
                heat(&mut self.slots, &mut self.hot, port);
            }
        }
        while Instant::now() < deadline && self.round(Instant::now()) {}
        for port in (0..self.slots.len()).map(Some).chain([None]) {
            self.detach_by(port, deadline);
        }
    }
}
