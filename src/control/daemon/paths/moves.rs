//! Ports that change their path while frames flow: what is opened, filtered and replaced, and
//! in which order. The theory is in the module above.

use super::super::Daemon;
use super::super::devices::open;
use super::super::ports::Port;
use crate::control::links::LinkState;
use crate::control::start_error::StartError;
use crate::port::{Device, NetdevOptions};
use crate::switch::PortIndex;
use crate::sys::bpf::{self, SharedPair};
use crate::sys::reception::wait_for_receptions;
use std::os::fd::AsFd;
use tracing::warn;

impl Daemon {
    /// Moves ports to the packet path.
    pub(super) fn demote(&mut self, ports: &[(PortIndex, String)]) -> Result<(), StartError> {
        for (position, reason) in ports {
            if let Some(port) = self.ports.get_mut(*position) {
                port.in_kernel = false;
                port.why_packet.clone_from(reason);
            }
        }
        // What it takes is seen by no socket.
        let positions: Vec<PortIndex> = ports.iter().map(|(position, _)| *position).collect();
        self.fit_express(&positions);
        let opened = self.fit_uplink_ring().and_then(|()| self.open_shut(ports));
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => {
                for position in &positions {
                    if let Some(port) = self.ports.get_mut(*position) {
                        port.in_kernel = true;
                    }
                }
                self.fit_express(&positions);
                return Err(error);
            }
        };
        self.count_queues();
        // A frame that was there before the filters has no decision of theirs: a program in
        // transition would read that of an earlier one.
        wait_for_receptions();
        let mut switches = Vec::with_capacity(opened.len());
        for (position, link, device, switch) in opened {
            self.begin_transition(position, Some(link.index));
            self.enter_device(position, &link, device);
            switches.push((position, link.index, switch));
        }
        let absent = ports.iter().map(|(position, _)| *position);
        let absent: Vec<PortIndex> = absent
            .filter(|position| !switches.iter().any(|(other, ..)| other == position))
            .collect();
        for position in absent {
            self.begin_transition(position, None);
        }
        self.await_devices();
        for (position, _, switch) in &switches {
            if let Err(error) = switch.set(1, 0) {
                warn!("port {position}: {error}");
            }
        }
        self.claim_for_packet_path();
        wait_for_receptions();
        for (position, index, _) in switches {
            if let Err(error) = self.host.replace_guard(index, None) {
                warn!("{error}");
            }
            self.unfilter(position);
        }
        for (position, reason) in ports {
            self.lead(*position);
            self.tell_path(*position, &format!("on the packet path: {reason}"));
        }
        Ok(())
    }

    /// Waits until the workers have the devices they were given: frames for a port would be
    /// `guest_absent` until then.
    fn await_devices(&mut self) {
        // Any answer will do, and this one changes nothing.
        if let Ok(table) = self.table_after(&[], &[]) {
            self.switch_tables(table);
            self.await_switch();
        }
    }

    /// Opens the devices of ports with filters that let nothing in yet. Each comes with the
    /// value that lets frames in.
    fn open_shut(
        &self,
        ports: &[(PortIndex, String)],
    ) -> Result<Vec<(PortIndex, LinkState, Device, SharedPair)>, StartError> {
        let slots = self.config.ring_size.slots(self.ports.len());
        let links = self.monitor.links();
        let mut opened = Vec::with_capacity(ports.len());
        for (position, _) in ports {
            let port = self.ports.get(*position);
            let link = port.and_then(Port::index).and_then(|index| links.by_index(index));
            let path = port.and_then(|port| port.path.as_ref());
            let (Some(link), Some(path)) = (link, path) else { continue };
            let device = open(link, NetdevOptions::ShutPort { slots })?;
            let (filter, switch) = path.ring_filter()?;
            if let Some(socket) = device.poll_fd() {
                bpf::attach_filter(socket, filter.as_fd())?;
            }
            opened.push((*position, link.clone(), device, switch));
        }
        Ok(opened)
    }

    /// Puts programs in transition in their places.
    fn begin_transition(&mut self, position: PortIndex, index: Option<u32>) {
        let program = self.guest_program(position, true);
        let guarded =
            program.map_err(StartError::from).and_then(|program| match (index, program) {
                (Some(index), Some(program)) => {
                    Ok(self.host.replace_guard(index, Some(program))?)
                }
                _ => Ok(()),
            });
        let link = index.and_then(|index| self.monitor.links().by_index(index)).cloned();
        let led = self.try_to_lead(position, link.as_ref(), true).map_err(StartError::from);
        if let Err(error) = guarded.and(led) {
            // One of its frames may come twice.
            warn!("port {position} changes its path all at once: {error}");
        }
    }

    fn unfilter(&self, position: PortIndex) {
        let port = self.ports.get(position);
        let counter = port.and_then(|port| port.attached.as_ref()?.counter.as_ref());
        if let Some(counter) = counter
            && let Err(error) = bpf::detach_filter(counter.socket())
        {
            warn!("port {position}: {error}");
        }
    }

    /// Moves ports to the kernel path.
    pub(super) fn promote(&mut self, ports: &[PortIndex]) {
        let mut switches = Vec::with_capacity(ports.len());
        for position in ports {
            match self.filter_ring(*position) {
                Ok(switch) => switches.push((*position, switch)),
                Err(error) => {
                    let Some(port) = self.ports.get_mut(*position) else { continue };
                    warn!("{}: stays on the packet path: {error}", port.config.device);
                    port.unable = true;
                    port.why_packet = error.to_string();
                }
            }
        }
        wait_for_receptions();
        for (position, _) in &switches {
            let index = self.ports.get(*position).and_then(Port::index);
            self.begin_transition(*position, index);
        }
        let moved: Vec<PortIndex> = switches.iter().map(|(position, _)| *position).collect();
        for position in &moved {
            if let Some(port) = self.ports.get_mut(*position) {
                port.in_kernel = true;
                port.why_packet.clear();
            }
        }
        self.skip_queues(&moved);
        for (position, switch) in &switches {
            if let Some(switch) = switch
                && let Err(error) = switch.set(0, 0)
            {
                warn!("port {position}: {error}");
            }
        }
        self.claim_for_packet_path();
        wait_for_receptions();
        for position in &moved {
            let index = self.ports.get(*position).and_then(Port::index);
            let program = self.guest_program(*position, false);
            let guarded = program.map_err(StartError::from).and_then(|program| match index {
                Some(index) => Ok(self.host.replace_guard(index, program)?),
                None => Ok(()),
            });
            if let Err(error) = guarded {
                warn!("port {position}: {error}");
            }
            self.lead(*position);
            self.tell_path(*position, "on the kernel path");
        }
        let devices: Vec<Option<PortIndex>> = moved.iter().copied().map(Some).collect();
        self.ask_back(&devices);
        let departed = self.await_departures(&devices);
        self.close(&devices, departed);
        for position in &moved {
            if let Some(attached) =
                self.ports.get_mut(*position).and_then(|port| port.attached.as_mut())
            {
                attached.slots = 0;
            }
        }
        if let Err(error) = self.fit_uplink_ring() {
            warn!("{error}");
        }
        self.fit_express(&moved);
    }

    /// Has a port's socket filter tell what it decides, before the port leaves the packet
    /// path. Returns the value that shuts it; none for a port without a device.
    fn filter_ring(&mut self, position: PortIndex) -> Result<Option<SharedPair>, StartError> {
        let (Some(kernel), Some(port)) = (&self.kernel, self.ports.get_mut(position)) else {
            return Ok(None);
        };
        if port.path.is_none() {
            let config = &port.config;
            port.path = Some(kernel.port(port.number, &config.device)?);
        }
        let (Some(path), Some(attached)) = (&port.path, &port.attached) else { return Ok(None) };
        let Some(counter) = &attached.counter else { return Ok(None) };
        let (filter, switch) = path.ring_filter()?;
        switch.set(1, 0)?;
        bpf::attach_filter(counter.socket(), filter.as_fd())?;
        Ok(Some(switch))
    }

    /// What these ports' devices have dropped until now was counted by the packet path.
    fn skip_queues(&mut self, ports: &[PortIndex]) {
        let index = |port: &PortIndex| self.ports.get(*port).and_then(Port::index);
        let indexes: Vec<u32> = ports.iter().filter_map(index).collect();
        let dropped = self.host.dropped(&indexes);
        for position in ports {
            let Some(port) = self.ports.get_mut(*position) else { continue };
            let count = port.index().and_then(|index| Some((index, *dropped.get(&index)?)));
            if let (Some((index, count)), Some(path)) = (count, &mut port.path) {
                path.skip_dropped(index, count);
            }
        }
    }

    /// Enters a device in the books, and gives it to its worker.
    fn enter_device(&mut self, position: PortIndex, link: &LinkState, device: Device) {
        let counter = match device.kernel_counter() {
            Ok(counter) => counter,
            Err(error) => {
                warn!("{}: {error}", link.name);
                None
            }
        };
        if let Some(attached) = self.ports.get_mut(position).and_then(|port| port.attached.as_mut())
        {
            attached.counter = counter;
            attached.slots = device.position().1;
        }
        self.attach_devices(vec![(position, Box::new(device))], Vec::new());
    }
}
