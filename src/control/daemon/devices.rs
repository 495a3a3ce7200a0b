//! Devices in and out of the worker: creating taps, making devices ready, attaching
//! them, and giving them back.

use super::ports::Attached;
use super::{Daemon, Uplink};
use crate::control::checks;
use crate::control::host::{FoundPort, FoundUplink, Sealing};
use crate::control::links::LinkState;
use crate::control::mapping::DeviceKind;
use crate::control::parallel::{beside, in_parallel};
use crate::control::start_error::StartError;
use crate::dataplane::Command;
use crate::port::{Device, DevicePart, DeviceState, InternalPort, Link, NetdevOptions, NetdevPort};
use crate::switch::PortIndex;
use crate::sys::packet::KernelCounter;
use crate::sys::tap::{self, TapOptions};
use nix::net::if_::if_nametoindex;
use std::io;
use tracing::{debug, info, warn};

/// A tap this run created.
#[derive(Debug)]
pub struct CreatedTap {
    name: String,
    index: Option<u32>,
}

/// A port's device, ready to be given to the worker.
#[derive(Debug)]
pub struct Opened {
    position: PortIndex,
    counter: Option<KernelCounter>,
    /// `None` for an internal port.
    link: Option<LinkState>,
    /// `None` on the kernel path.
    device: Option<Device>,
}

impl Opened {
    /// A device that another process has made ready.
    ///
    /// # Errors
    /// [`StartError`] when out of file descriptors.
    pub fn adopted(
        position: PortIndex,
        link: Option<LinkState>,
        device: Device,
    ) -> Result<Self, StartError> {
        Ok(Self { position, counter: device.kernel_counter()?, link, device: Some(device) })
    }

    /// The port's position.
    pub fn position(&self) -> PortIndex {
        self.position
    }

    /// Goes on from a position in the device's ring.
    pub fn resume_at(&mut self, next: usize) {
        if let Some(device) = &mut self.device {
            device.resume_at(next);
        }
    }
}

/// A port's device, made ready and not yet opened.
#[derive(Debug)]
struct Prepared {
    position: PortIndex,
    link: LinkState,
}

impl From<Prepared> for Opened {
    /// On the kernel path there is nothing to open.
    fn from(Prepared { position, link }: Prepared) -> Self {
        Self { position, counter: None, link: Some(link), device: None }
    }
}

impl Daemon {
    /// Makes the devices of these ports ready and opens them, creating the taps that
    /// are missing. Ports whose device is yet to appear are left out.
    ///
    /// # Errors
    /// [`StartError`]; what was done until then is for the caller to undo.
    pub(super) fn open_ports(
        &mut self,
        positions: &[PortIndex],
    ) -> Result<Vec<Opened>, StartError> {
        self.create_taps(positions)?;
        let mut opened = Vec::with_capacity(positions.len());
        let mut prepared = Vec::with_capacity(positions.len());
        for position in positions.iter().copied() {
            let Some(port) = self.ports.get(position) else { continue };
            let name = port.config.device.clone();
            if port.config.kind == DeviceKind::Internal {
                opened.push(self.open_internal(position, &name)?);
            } else {
                prepared.extend(self.prepare_named(position, &name)?);
            }
        }
        // In a pass of their own: a tap going up without a VMM keeps the kernel's
        // device lock busy for milliseconds (`linkwatch_do_dev`), and every request
        // between two of them would wait for it.
        for Prepared { link, .. } in &prepared {
            self.host.bring_up(link.index)?;
        }
        let (in_kernel, by_packets): (Vec<_>, Vec<_>) =
            prepared.into_iter().partition(|prepared| self.is_in_kernel(prepared.position));
        opened.extend(in_kernel.into_iter().map(Opened::from));
        let mut failed = None;
        let ring = self.port_ring();
        for result in in_parallel(by_packets, |prepared| open_port(prepared, ring)) {
            match result {
                Ok(port) => opened.push(port),
                Err(error) => failed = Some(error),
            }
        }
        match failed {
            None => Ok(opened),
            Some(error) => {
                close_opened(opened);
                Err(error)
            }
        }
    }

    /// Creates the taps that are missing, all at once.
    fn create_taps(&mut self, positions: &[PortIndex]) -> Result<(), StartError> {
        let missing = positions.iter().filter_map(|position| {
            let config = &self.ports.get(*position)?.config;
            let DeviceKind::Netdev { create: Some(tap) } = &config.kind else { return None };
            let name = &config.device;
            self.monitor.links().by_name(name).is_none().then(|| TapOptions {
                owner: tap.owner.as_ref().map(|account| account.id),
                group: tap.group.as_ref().map(|account| account.id),
                multi_queue: tap.queues > 1,
                persistent: true,
                vnet_header: true,
                ..TapOptions::new(name.clone())
            })
        });
        let results = in_parallel(missing.collect(), |options| {
            let created = tap::create(&options).map(|()| if_nametoindex(options.name.as_str()));
            (options.name, created)
        });
        let mut result = Ok(());
        for (name, created) in results {
            match created {
                Ok(index) => {
                    debug!("{name}: created a tap");
                    self.created.push(CreatedTap { name, index: index.ok() });
                    if let Err(errno) = index {
                        result = Err(StartError::Control(errno.into()));
                    }
                }
                Err(source) => result = Err(StartError::Tap { name, source }),
            }
        }
        result
    }

    /// Makes a port's device ready if it is there.
    fn prepare_named(
        &mut self,
        position: PortIndex,
        name: &str,
    ) -> Result<Option<Prepared>, StartError> {
        let created = self.created.iter().find(|tap| tap.name == name).and_then(|tap| tap.index);
        let link = match created {
            Some(index) => Some(self.host.link(index)?),
            None => self.monitor.links().by_name(name).cloned(),
        };
        match link {
            Some(link) => {
                self.prepare_port(position, link, created.is_some(), Sealing::Quick).map(Some)
            }
            None => {
                info!("{name}: waiting for it to appear");
                Ok(None)
            }
        }
    }

    fn prepare_port(
        &mut self,
        position: PortIndex,
        link: LinkState,
        created: bool,
        sealing: Sealing,
    ) -> Result<Prepared, StartError> {
        self.set_guard(position, link.index)?;
        let found = self.host.prepare_port(&link, created, sealing)?;
        // Not those to be given back: that would take as long again when stopping.
        if found.is_none() && !self.host.is_settled(link.index) {
            self.unsettled.add(link.index);
        }
        if let Some(port) = self.ports.get_mut(position) {
            // Held here from now on, so that it is given back whatever happens next.
            let index = Some(link.index);
            port.attached = Some(Attached { index, counter: None, queue: None, slots: 0, found });
        }
        Ok(Prepared { position, link })
    }

    fn open_internal(&mut self, position: PortIndex, name: &str) -> Result<Opened, StartError> {
        let existed = self.monitor.links().by_name(name).is_some();
        let options = TapOptions { vnet_header: true, persistent: true, ..TapOptions::new(name) };
        let queue = tap::open_queue(&options)
            .map_err(|source| StartError::Tap { name: name.to_owned(), source })?;
        if !existed {
            let index = if_nametoindex(name).ok();
            self.created.push(CreatedTap { name: name.to_owned(), index });
        }
        if let Some(port) = self.ports.get_mut(position) {
            let queue = queue.fd.try_clone().ok();
            let attached = Attached { index: None, counter: None, queue, slots: 0, found: None };
            port.attached = Some(attached);
        }
        let device = Device::Internal(InternalPort::new(queue.fd));
        Ok(Opened { position, counter: None, link: None, device: Some(device) })
    }

    /// Gives opened devices to the worker, which must know their ports.
    pub(super) fn attach_ports(&mut self, opened: Vec<Opened>) {
        let devices = self.enter_ports(opened);
        self.attach_devices(devices, Vec::new());
    }

    /// Enters opened devices in our books, from which moment frames for them are not
    /// `guest_absent`. Returns them for the worker.
    pub(super) fn enter_ports(&mut self, opened: Vec<Opened>) -> Vec<(PortIndex, Box<Device>)> {
        let mut devices = Vec::with_capacity(opened.len());
        for Opened { position, counter, link, device } in opened {
            let now = link.map(|link| self.host.link(link.index).unwrap_or(link));
            if let Some(port) = self.ports.get_mut(position) {
                match &now {
                    Some(link) => publish(&port.shared.link, Some(link)),
                    // Its netdev may live in another namespace: what it takes, it takes.
                    None => port.shared.link.set(DeviceState::Up, u32::MAX),
                }
                port.watched.see_state(port.shared.link.state());
                if let Some(attached) = &mut port.attached {
                    attached.counter = counter;
                    attached.slots = device.as_ref().map_or(0, |device| device.position().1);
                }
            }
            match device {
                Some(device) => devices.push((position, Box::new(device))),
                None => {
                    self.lead_to(position, now.as_ref());
                    self.fit_express(&[position]);
                }
            }
        }
        devices
    }

    /// Attaches a device that has just appeared.
    pub(super) fn adopt(
        &mut self,
        position: PortIndex,
        link: &LinkState,
    ) -> Result<(), StartError> {
        // Side by side: both wait for the kernel, and nothing is forwarded before both
        // are done.
        let ring = self.port_ring();
        let in_kernel = self.is_in_kernel(position);
        let (prepared, device) = beside(
            || self.prepare_port(position, link.clone(), false, Sealing::Lasting),
            || (!in_kernel).then(|| open(link, ring)).transpose(),
        );
        let prepared = prepared?;
        let up = self.host.bring_up(link.index).map_err(StartError::from);
        let opened = up.and_then(|()| match device? {
            Some(device) => opened(prepared, device),
            None => Ok(Opened::from(prepared)),
        });
        match opened {
            Ok(opened) => {
                self.attach_ports(vec![opened]);
                Ok(())
            }
            Err(error) => {
                self.give_back(position, None);
                Err(error)
            }
        }
    }

    /// Forgets a port's device and gives it back; `name` is what it is called now.
    pub(super) fn give_back(&mut self, position: PortIndex, name: Option<&str>) {
        let Some(attached) = self.ports.get_mut(position).and_then(|port| port.attached.take())
        else {
            return;
        };
        if let Some(path) = self.ports.get_mut(position).and_then(|port| port.path.as_mut()) {
            path.leave_express();
        }
        if let Some(index) = attached.index {
            self.unsettled.forget(index);
        }
        if let Some(index) = attached.index
            && self.uncleared.contains(&index)
        {
            self.uncleared.retain(|uncleared| *uncleared != index);
            self.host.clear_up(index);
        }
        let Some(index) = attached.index else { return };
        match attached.found {
            Some(found) => self.host.give_port_back(&found.renamed(name)),
            // It stays sealed, and sends nothing any more.
            None if self.is_in_kernel(position) => {
                if let Err(error) = self.host.replace_guard(index, None)
                    && !error.is_device_gone()
                {
                    warn!("{error}");
                }
                self.host.drop_guard(index);
            }
            None => {}
        }
        if self.is_in_kernel(position) {
            self.lead(position);
        }
    }

    /// How a port's device is opened, with as many ports as there are now.
    pub(super) fn port_ring(&self) -> NetdevOptions<'static> {
        NetdevOptions::Port { slots: self.config.ring_size.slots(self.ports.len()) }
    }

    pub(super) fn attach_uplink(&mut self, link: &LinkState) -> Result<(), StartError> {
        if !link.up && self.uplink.steering.is_some() {
            // A group of sockets cannot be made before (Linux 6.13 could).
            if self.workers.uplink_state() != DeviceState::Down {
                warn!("uplink {0} is down: `ip link set {0} up`", self.name);
                self.workers.publish_uplink(Some(link));
            }
            return Ok(());
        }
        let found = self.host.prepare_uplink(link, self.uplink.mtu, self.kernel.is_some())?;
        let opened = match self.needs_uplink_ring() {
            true => self.open_uplink(link),
            false => Ok((Vec::new(), Vec::new())),
        };
        let (counters, devices) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                self.host.give_uplink_back(&found);
                return Err(error);
            }
        };
        self.uplink.slots = devices.first().map_or(0, |device| device.position().1);
        let now = self.host.link(link.index).unwrap_or_else(|_| link.clone());
        self.workers.publish_uplink(Some(&now));
        self.uplink.watched.see_state(self.workers.uplink_state());
        if !now.up {
            warn!("uplink {0} is down: `ip link set {0} up`", self.name);
        }
        self.uplink.attached = Some((link.index, counters, found));
        self.count_unsent();
        self.attach_devices(Vec::new(), devices);
        self.attach_dispatcher(link.index)
    }

    /// Opens the uplink once for each worker.
    pub(super) fn open_uplink(
        &self,
        link: &LinkState,
    ) -> Result<(Vec<KernelCounter>, Vec<Device>), StartError> {
        let Uplink { filter, steering, .. } = &self.uplink;
        let parts = steering.as_ref().map(|steering| (steering, self.workers.len()));
        let parts = NetdevPort::open_uplink(link.index, filter, parts)
            .map_err(|source| StartError::Packet { name: link.name.clone(), source })?;
        Ok(counted(parts)?)
    }

    /// Takes note of an uplink that was taken over.
    pub(super) fn uplink_is_there(&mut self) {
        let Some((index, ..)) = &self.uplink.attached else { return };
        let index = *index;
        self.workers.publish_uplink(self.monitor.links().by_index(index));
        self.uplink.watched.see_state(self.workers.uplink_state());
        if let Err(error) = self.attach_dispatcher(index) {
            warn!("uplink {}: {error}", self.name);
        }
    }

    /// Takes a port's device out of the worker and gives it back; `name` is what it is
    /// called now, if it was renamed.
    pub(super) fn detach_port(&mut self, position: PortIndex, name: Option<&str>) {
        self.take_back(Some(position));
        self.give_back(position, name);
    }

    /// Takes a device out of the worker, and closes it.
    pub(super) fn take_back(&mut self, port: Option<PortIndex>) {
        self.ask_back(&[port]);
        let devices = self.await_departures(&[port]);
        self.close(&[port], devices);
    }

    /// Counts what the kernel still has to tell of devices, and closes them.
    pub(super) fn close(&mut self, ports: &[Option<PortIndex>], devices: Vec<Device>) {
        self.count_overruns();
        // They hold the sockets too: the last to close one waits for the kernel.
        for port in ports {
            match port {
                None => {
                    if let Some((_, counters, _)) = &mut self.uplink.attached {
                        counters.clear();
                    }
                }
                Some(position) => {
                    let port = self.ports.get_mut(*position);
                    if let Some(attached) = port.and_then(|port| port.attached.as_mut()) {
                        attached.counter = None;
                    }
                }
            }
        }
        let parts = devices.into_iter().flat_map(Device::into_parts);
        in_parallel(parts.collect(), drop::<DevicePart>);
    }

    /// The uplink cannot be polled by a worker.
    pub(super) fn uplink_failed(&mut self, error: &io::Error) {
        if self.uplink.attached.is_none() {
            // Another worker has said so.
            return;
        }
        warn!("uplink {}: cannot be polled: {error}", self.name);
        self.give_up_uplink();
        // The other workers' parts: what is opened next would bring each frame again.
        self.take_back(None);
    }

    /// Forgets the uplink until it can be attached anew, and gives it back.
    pub(super) fn give_up_uplink(&mut self) {
        self.workers.publish_uplink(None);
        self.uplink.watched.see_state(DeviceState::Absent);
        self.count_overruns();
        self.count_unsent();
        if let Some((index, counters, found)) = self.uplink.attached.take() {
            drop(counters);
            self.give_uplink_back(index, &found);
        }
        self.follow_uplink();
    }

    /// A port's device cannot be polled by its worker.
    pub(super) fn port_failed(&mut self, position: PortIndex, error: &io::Error) {
        if let Some(port) = self.ports.get(position) {
            warn!("{}: cannot be polled: {error}", port.config.device);
        }
        self.give_up_port(position);
    }

    /// Forgets a port's device until it can be attached anew, and gives it back.
    pub(super) fn give_up_port(&mut self, position: PortIndex) {
        if let Some(port) = self.ports.get_mut(position) {
            publish(&port.shared.link, None);
            port.watched.see_state(DeviceState::Absent);
        }
        self.give_back(position, None);
    }

    pub(super) fn count_overruns(&mut self) {
        self.count_queues();
        self.count_rings();
    }

    /// The same of rings only.
    pub(super) fn count_rings(&mut self) {
        self.count_leaving();
        if let Some((_, counters, _)) = &self.uplink.attached {
            for (worker, (seat, counter)) in self.workers.iter().zip(counters).enumerate() {
                let count = counter.take();
                seat.uplink.from_wire.add_overruns(count.overruns);
                self.uplink.watched.ring.note(worker, count);
            }
        }
        for (_, port) in self.ports.iter_mut() {
            if let Some(counter) =
                port.attached.as_ref().and_then(|attached| attached.counter.as_ref())
            {
                let count = counter.take();
                port.shared.from_guest.add_overruns(count.overruns);
                port.watched.ring.note(0, count);
            }
        }
    }

    /// Stops the worker and puts back what the kernel does not undo itself, but for what
    /// the kernel path needs to go on, if it does.
    pub(super) fn stop(&mut self) {
        let departed = self.workers.end(|| Command::Stop);
        self.count_overruns();
        let goes_on = self.outlives_us();
        if !goes_on {
            self.take_kernel_path_away();
        }
        let ports = self.ports.iter_mut().filter(|(_, port)| !(goes_on && port.in_kernel));
        let ports: Vec<FoundPort> =
            ports.filter_map(|(_, port)| port.attached.take()?.found).collect();
        let uplink = self.uplink.attached.take_if(|_| !goes_on);
        let devices = departed.into_iter().flatten().filter_map(|departed| departed.device);
        let parts = devices.flat_map(|device| device.into_parts());
        in_parallel(parts.collect(), drop::<DevicePart>);
        for found in ports {
            self.host.give_port_back(&found);
        }
        if let Some((index, _, found)) = uplink {
            self.give_uplink_back(index, &found);
        }
    }

    fn give_uplink_back(&mut self, index: u32, found: &FoundUplink) {
        if self.uncleared.contains(&index) {
            self.uncleared.retain(|uncleared| *uncleared != index);
            self.host.clear_up(index);
        }
        self.host.give_uplink_back(found);
    }

    /// Whether this run created a tap; it is not to be removed from now on.
    pub(super) fn forget_created(&mut self, name: &str) -> bool {
        let before = self.created.len();
        self.created.retain(|tap| tap.name != name);
        self.created.len() < before
    }

    /// Gives the uplink the MTU the ports need, if that is asked for and it grew.
    pub(super) fn raise_uplink_mtu(&mut self) {
        checks::say_uplink_mtu(&self.config, self.monitor.links());
        self.uplink.mtu = checks::target_mtu(&self.config);
        if let (Some(mtu), Some((_, _, found))) = (self.uplink.mtu, &mut self.uplink.attached)
            && let Err(error) = self.host.raise_uplink_mtu(found, mtu)
        {
            warn!("{error}");
        }
    }

    /// How many taps this run has created.
    pub(super) fn created(&self) -> usize {
        self.created.len()
    }

    /// Removes the taps this run has created, but for the first `keep`.
    pub(super) fn remove_created(&mut self, keep: usize) {
        for CreatedTap { name, index } in self.created.drain(keep..) {
            if let Some(index) = index.or_else(|| if_nametoindex(name.as_str()).ok()) {
                self.host.delete(&name, index);
            }
        }
    }

    /// Undoes [`Daemon::open_ports`] for ports that were never given to the worker.
    pub(super) fn close_ports(&mut self, positions: &[PortIndex], created_before: usize) {
        for position in positions {
            self.give_back(*position, None);
        }
        self.remove_created(created_before);
    }
}

/// Parts of the uplink as devices, and the counters of their sockets.
///
/// # Errors
/// The kernel's, when out of file descriptors.
pub fn counted(parts: Vec<NetdevPort>) -> io::Result<(Vec<KernelCounter>, Vec<Device>)> {
    let devices: Vec<Device> = parts.into_iter().map(Device::Netdev).collect();
    let mut counters = Vec::with_capacity(devices.len());
    for device in &devices {
        counters.extend(device.kernel_counter()?);
    }
    Ok((counters, devices))
}

/// Closes devices the worker never had, side by side.
pub fn close_opened(opened: Vec<Opened>) {
    let devices = opened.into_iter().filter_map(|Opened { counter, device, .. }| {
        drop(counter);
        device
    });
    let parts = devices.flat_map(Device::into_parts);
    in_parallel(parts.collect(), drop::<DevicePart>);
}

fn open_port(prepared: Prepared, ring: NetdevOptions<'_>) -> Result<Opened, StartError> {
    let device = open(&prepared.link, ring)?;
    opened(prepared, device)
}

fn opened(Prepared { position, link }: Prepared, device: Device) -> Result<Opened, StartError> {
    let counter = device.kernel_counter()?;
    Ok(Opened { position, counter, link: Some(link), device: Some(device) })
}

/// Opens a device that is ready.
///
/// # Errors
/// [`StartError`] naming the device and the step that failed.
pub fn open(link: &LinkState, options: NetdevOptions<'_>) -> Result<Device, StartError> {
    NetdevPort::open(link.index, options)
        .map(Device::Netdev)
        .map_err(|source| StartError::Packet { name: link.name.clone(), source })
}

/// Tells a worker what is known of a device.
pub fn publish(place: &Link, link: Option<&LinkState>) {
    let state = match link {
        None => DeviceState::Absent,
        Some(link) if !link.up => DeviceState::Down,
        Some(link) if !link.carrier => DeviceState::NoCarrier,
        Some(_) => DeviceState::Up,
    };
    place.set(state, link.map_or(u32::MAX, |link| link.mtu));
}
