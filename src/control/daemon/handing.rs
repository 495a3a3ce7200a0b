//! Handing over to another process, and taking over from one (`control::takeover`).

use super::Daemon;
use super::devices::Opened;
use super::ports::Attached;
use crate::control::config::Config;
use crate::control::mapping;
use crate::control::server::{ClientId, Refusal};
use crate::control::start_error::StartError;
use crate::control::takeover::{self, DeviceState, FORMAT, Last, PortState, State, TakeOver};
use crate::dataplane::{Command, Departed, WorkerHandle};
use crate::frame::Tpid;
use crate::port::{Device, InternalPort, NetdevPort};
use crate::switch::PortIndex;
use std::collections::HashMap;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tracing::{info, warn};

/// Devices taken over, to be given to the worker when the other process has stopped.
#[derive(Debug, Default)]
struct Adopted {
    uplink: Option<Device>,
    ports: Vec<Opened>,
}

impl Daemon {
    /// Answers the call of another process that wants to go on in our place.
    ///
    /// # Errors
    /// [`Refusal`]; nothing has changed.
    pub(super) fn hand_over(
        &mut self,
        client: ClientId,
        format: u32,
        uplink: &str,
    ) -> Result<(), Refusal> {
        if format != FORMAT {
            return Err(Refusal::other_format(FORMAT));
        }
        if uplink != self.name {
            return Err(Refusal::refused(format!("it serves uplink {}, not {uplink}", self.name)));
        }
        self.server.reply(client, &serde_json::json!({}));
        let Some(mut stream) = self.server.hand_over(client) else {
            return Ok(());
        };
        let result = self.offer(&mut stream);
        match result {
            Ok(()) => {
                // Closing what is not handed over takes the kernel time: not before the other
                // process can go on.
                let (last, _devices) = self.freeze();
                match takeover::conclude(&mut stream, &last) {
                    Ok(()) => info!("handed over to another vlanswitchd"),
                    Err(error) => warn!("handed over to a vlanswitchd that has gone: {error}"),
                }
                self.handed_over = true;
            }
            Err(error) => warn!("not handed over, the other vlanswitchd has gone: {error}"),
        }
        Ok(())
    }

    fn offer(&self, stream: &mut UnixStream) -> io::Result<()> {
        let mut descriptors: Vec<BorrowedFd<'_>> =
            self.server.listeners().map(|(_, fd)| fd).collect();
        descriptors.push(self.claim.as_fd());
        let uplink = self.uplink.attached.as_ref().and_then(|(index, counter, found)| {
            descriptors.push(counter.as_ref()?.socket());
            let device = DeviceState { index: Some(*index), slots: self.uplink.slots };
            Some((device, found.clone()))
        });
        let mut ports = Vec::with_capacity(self.ports.len());
        for (_, port) in self.ports.iter() {
            let attached = port.attached.as_ref();
            let device = attached.and_then(|attached| {
                let counter = attached.counter.as_ref().map(|counter| counter.socket());
                let queue = attached.queue.as_ref().map(AsFd::as_fd);
                descriptors.push(counter.or(queue)?);
                Some(DeviceState { index: attached.index, slots: attached.slots })
            });
            ports.push(PortState {
                map: port.config.to_map(PLAIN_TPID),
                device,
                found: attached.and_then(|attached| attached.found.clone()),
            });
        }
        let state = State {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uplink: self.name.clone(),
            device: uplink,
            ports,
            listeners: self.server.listeners().map(|(place, _)| place).collect(),
        };
        takeover::offer(stream, &state, &descriptors)
    }

    /// Stops the worker where it is.
    fn freeze(&mut self) -> (Last, Vec<Departed>) {
        let departed = self.worker.take().map(WorkerHandle::freeze).unwrap_or_default();
        let stopped = takeover::clock();
        let mut positions: HashMap<Option<PortIndex>, usize> = HashMap::new();
        for Departed { port, device, .. } in &departed {
            let next = device.as_ref().map_or(0, |device| device.position().0);
            positions.insert(*port, next);
        }
        self.count_overruns();
        let next = |port| positions.get(&port).copied().unwrap_or_default();
        let ports = self.ports.iter().map(|(position, port)| {
            let (from_guest, to_guest) = (&port.shared.from_guest, &port.shared.to_guest);
            (next(Some(position)), from_guest.snapshot().into(), to_guest.snapshot().into())
        });
        let last = Last {
            stopped,
            next: next(None),
            from_wire: self.uplink.shared.from_wire.snapshot().into(),
            ports: ports.collect(),
            removed: self.retired.clone(),
        };
        (last, departed)
    }

    /// Makes the devices of the other process ours, all but moving frames. The ports are
    /// those of its state, in its order. `descriptors` are its devices'.
    ///
    /// # Errors
    /// [`StartError`]; the other process goes on.
    fn adopt_devices(
        &mut self,
        state: &mut State,
        mut descriptors: VecDeque<OwnedFd>,
    ) -> Result<Adopted, StartError> {
        let mut adopted = Adopted::default();
        let missing = || StartError::Control(io::ErrorKind::InvalidData.into());
        if let Some((DeviceState { index, slots }, found)) = state.device.take() {
            let socket = descriptors.pop_front().ok_or_else(missing)?;
            let index = index.ok_or_else(missing)?;
            let device = adopt(&self.name, index, socket, slots)?;
            let counter = device.kernel_counter()?;
            self.uplink.slots = slots;
            self.uplink.attached = Some((index, counter, found));
            adopted.uplink = Some(device);
        }
        for (position, port) in state.ports.iter_mut().enumerate() {
            let Some(DeviceState { index, slots }) = port.device.take() else { continue };
            let socket = descriptors.pop_front().ok_or_else(missing)?;
            let name = self.ports.get(position).map(|port| port.config.device.clone());
            let name = name.unwrap_or_default();
            let (device, queue) = match index {
                Some(index) => (adopt(&name, index, socket, slots)?, None),
                None => {
                    let queue = socket.try_clone()?;
                    (Device::Internal(InternalPort::new(socket)), Some(queue))
                }
            };
            let link = index.and_then(|index| self.monitor.links().by_index(index)).cloned();
            if let Some(place) = self.ports.get_mut(position) {
                let found = port.found.take();
                place.attached = Some(Attached { index, counter: None, queue, slots, found });
            }
            adopted.ports.push(Opened::adopted(position, link, device)?);
        }
        Ok(adopted)
    }

    /// Takes over: makes the other process's devices ours and goes on from where it
    /// stops.
    ///
    /// # Errors
    /// [`StartError`]. Nothing has been put back: if the other process still runs, it
    /// goes on; if it has gone, the devices are as a crash leaves them.
    pub(super) fn go_on(
        &mut self,
        mut take: TakeOver,
        descriptors: VecDeque<OwnedFd>,
    ) -> Result<(), StartError> {
        let Adopted { uplink, ports: mut opened } =
            self.adopt_devices(&mut take.state, descriptors)?;
        let Last { stopped, next, from_wire, ports, removed } = take.finish()?;
        // Not sooner: the other process changes what its own filter claims, and goes on if
        // this one fails. Both claim the same now.
        if let Some((_, Some(counter), _)) = &self.uplink.attached {
            self.uplink.filter.attach(counter.socket())?;
        }
        self.uplink.shared.from_wire.restore(&(&from_wire).into());
        self.retired = removed;
        let mut positions = HashMap::new();
        for (position, (next, from_guest, to_guest)) in ports.iter().enumerate() {
            positions.insert(position, *next);
            if let Some(port) = self.ports.get(position) {
                port.shared.from_guest.restore(&from_guest.into());
                port.shared.to_guest.restore(&to_guest.into());
            }
        }
        for port in &mut opened {
            port.resume_at(positions.get(&port.position()).copied().unwrap_or_default());
        }
        let mut devices = self.enter_ports(opened);
        if let Some(mut uplink) = uplink {
            uplink.resume_at(next);
            self.uplink_is_there();
            devices.push((None, Box::new(uplink)));
        }
        self.command(Command::Attach(devices));
        let gap = Duration::from_nanos(takeover::clock().saturating_sub(stopped));
        info!("uplink {}: taken over; frames waited for {} us", self.name, gap.as_micros());
        Ok(())
    }
}

/// What a start begins with: nothing, or what another process hands over.
#[derive(Debug)]
pub struct Inheritance {
    /// The configuration to begin with: that of the other process, if there is one.
    pub config: Config,
    /// The hand-over, to be finished.
    pub take: Option<TakeOver>,
    /// Listening sockets, by place.
    pub listeners: HashMap<String, OwnedFd>,
    /// The claim to the uplink.
    pub claim: Option<OwnedFd>,
    /// Devices.
    pub descriptors: VecDeque<OwnedFd>,
}

impl Inheritance {
    /// Asks for a hand-over if the configuration says so. Returns the configuration to
    /// become afterwards, if it is not the one to begin with.
    ///
    /// # Errors
    /// [`StartError`]; the other process goes on.
    pub fn ask(config: Config) -> Result<(Option<Config>, Self), StartError> {
        let (listeners, descriptors) = (HashMap::new(), VecDeque::new());
        let take = match config.control.path() {
            Some(socket) if config.is_takeover() => TakeOver::ask(socket, &config.uplink)?,
            _ => None,
        };
        let Some(mut take) = take else {
            return Ok((None, Self { config, take: None, listeners, claim: None, descriptors }));
        };
        let invalid =
            |error: String| StartError::Control(io::Error::new(io::ErrorKind::InvalidData, error));
        let mut ports = Vec::with_capacity(take.state.ports.len());
        for port in &take.state.ports {
            let parsed = mapping::parse(&port.map, PLAIN_TPID);
            ports.push(parsed.map_err(|problem| invalid(problem.to_string()))?);
        }
        let first = config.with_ports(ports).map_err(|errors| invalid(errors.to_string()))?;
        let mut descriptors = VecDeque::from(std::mem::take(&mut take.descriptors));
        let places = std::mem::take(&mut take.state.listeners).into_iter();
        let listeners =
            places.filter_map(|place| Some((place, descriptors.pop_front()?))).collect();
        let claim = descriptors.pop_front();
        Ok((Some(config), Self { config: first, take: Some(take), listeners, claim, descriptors }))
    }
}

fn adopt(name: &str, index: u32, socket: OwnedFd, slots: usize) -> Result<Device, StartError> {
    NetdevPort::adopt(index, socket, slots)
        .map(Device::Netdev)
        .map_err(|source| StartError::Packet { name: name.to_owned(), source })
}

/// The TPID maps of a [`State`] go without.
const PLAIN_TPID: Tpid = Tpid::Customer;
