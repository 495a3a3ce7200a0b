//! Handing over to another process, and taking over from one (`control::takeover`), be it
//! that runs or one that has left everything in a store (`control::store`).

use super::devices::Opened;
use super::ports::Attached;
use super::{Daemon, is_claim};
use crate::control::config::Config;
use crate::control::mapping;
use crate::control::server::{ClientId, Refusal};
use crate::control::start_error::StartError;
use crate::control::store::{Deposit, Legacy, Store};
use crate::control::takeover::{
    self, DeviceState, FORMAT, Last, PortState, State, Stored, TakeOver,
};
use crate::dataplane::{Command, Departed};
use crate::frame::Tpid;
use crate::port::{Device, InternalPort, NetdevPort};
use crate::switch::PortIndex;
use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
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
        if self.workers.len() > 1 {
            // One ring can be handed over, not several: the other starts without them.
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
        let (state, descriptors) = self.possessions();
        takeover::offer(stream, &state, &descriptors)
    }

    /// Leaves everything to the next process in the service manager's store, if there is
    /// one. Returns whether nothing is to be put back therefore.
    pub(super) fn leave_in_store(&mut self) -> bool {
        let Some(store) = self.store else { return false };
        if self.workers.len() > 1 {
            warn!("with several workers nothing is left in the service manager's store");
            return false;
        }
        match self.try_to_leave(store) {
            Ok(()) => {
                info!("left in the service manager's store, for the next vlanswitchd");
                true
            }
            Err(error) => {
                warn!(
                    "nothing is left in the service manager's descriptor store: {error}: frames \
                     are lost until the next start"
                );
                false
            }
        }
    }

    fn try_to_leave(&mut self, store: Store) -> io::Result<()> {
        let (state, descriptors) = self.possessions();
        let netdevs = self.ports.iter().filter(|(_, port)| port.index().is_some()).count();
        // Those, what is to be known of them, and a sending socket a device.
        store.check_room(descriptors.len() + 1 + netdevs + 1)?;
        let deposit = Deposit::make(&descriptors)?;
        let (last, departed) = self.freeze();
        let stored = Stored { format: FORMAT, state, last };
        let devices = departed.iter().filter_map(|departed| departed.device.as_deref());
        let late: Vec<BorrowedFd<'_>> = devices.filter_map(Device::sending_fd).collect();
        // With the devices this closes them: they are in the store, unless that failed.
        deposit.complete(&serde_json::to_vec(&stored)?, &late)
    }

    /// All that another process needs, in the order the format says.
    fn possessions(&self) -> (State, Vec<BorrowedFd<'_>>) {
        let mut descriptors: Vec<BorrowedFd<'_>> =
            self.server.listeners().map(|(_, fd)| fd).collect();
        descriptors.push(self.claim.as_fd());
        let uplink = self.uplink.attached.as_ref().and_then(|(index, counter, found)| {
            descriptors.push(counter.first()?.socket());
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
            abilities: Some(self.abilities),
        };
        (state, descriptors)
    }

    /// Stops the worker where it is.
    fn freeze(&mut self) -> (Last, Vec<Departed>) {
        let departed: Vec<_> = self.workers.end(|| Command::Freeze).into_iter().flatten().collect();
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
            from_wire: self.workers.uplink_flow().into(),
            ports: ports.collect(),
            removed: self.retired.clone(),
        };
        (last, departed)
    }

    /// Makes the devices of the other process ours, all but moving frames. The ports are
    /// those of its state, in its order. `descriptors` are its devices'.
    ///
    /// # Errors
    /// [`StartError`] if the other process still runs: it goes on. If it has ended, what
    /// cannot be taken over is left for a start without it.
    fn adopt_devices(
        &mut self,
        take: &mut TakeOver,
        mut descriptors: VecDeque<OwnedFd>,
    ) -> Result<Adopted, StartError> {
        let mut adopted = Adopted::default();
        let missing = || StartError::Control(io::ErrorKind::InvalidData.into());
        let strict = take.is_from_process();
        if let Some((DeviceState { index, slots }, found)) = take.state.device.take() {
            let socket = descriptors.pop_front().ok_or_else(missing)?;
            let index = index.ok_or_else(missing)?;
            match adopt(&self.name, index, socket, slots) {
                Ok(device) => {
                    let counter = device.kernel_counter()?;
                    self.uplink.slots = slots;
                    self.uplink.attached = Some((index, counter.into_iter().collect(), found));
                    adopted.uplink = Some(device);
                }
                Err(error) if strict => return Err(error),
                Err(error) => {
                    warn!("{error}: starting without its ring");
                    self.host.remember(Vec::new(), Some(found));
                }
            }
        }
        for (position, port) in take.state.ports.iter_mut().enumerate() {
            let Some(DeviceState { index, slots }) = port.device.take() else { continue };
            let socket = descriptors.pop_front().ok_or_else(missing)?;
            let name = self.ports.get(position).map(|port| port.config.device.clone());
            let name = name.unwrap_or_default();
            let found = port.found.take();
            let device = match index {
                Some(index) => adopt(&name, index, socket, slots).map(|device| (device, None)),
                None => socket
                    .try_clone()
                    .map(|queue| (Device::Internal(InternalPort::new(socket)), Some(queue)))
                    .map_err(StartError::from),
            };
            let (device, queue) = match device {
                Ok(device) => device,
                Err(error) if strict => return Err(error),
                Err(error) => {
                    warn!("{error}: starting without its ring");
                    self.host.remember(found.into_iter().collect(), None);
                    continue;
                }
            };
            let link = index.and_then(|index| self.monitor.links().by_index(index)).cloned();
            if let Some(place) = self.ports.get_mut(position) {
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
        let Adopted { uplink, ports: mut opened } = self.adopt_devices(&mut take, descriptors)?;
        let Last { stopped, next, from_wire, ports, removed } = take.finish()?;
        // Not sooner: the other process changes what its own filter claims, and goes on if
        // this one fails. Both claim the same now.
        if let Some((_, counters, _)) = &self.uplink.attached
            && let Some(counter) = counters.first()
        {
            self.uplink.filter.attach(counter.socket())?;
        }
        if let Some(seat) = self.workers.iter().next() {
            seat.uplink.from_wire.restore(&(&from_wire).into());
        }
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
        self.attach_devices(devices);
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
    /// The configuration to become afterwards, if it is not that one.
    pub wanted: Option<Config>,
    /// The hand-over, to be finished.
    pub take: Option<TakeOver>,
    /// Listening sockets, by place.
    pub listeners: HashMap<String, OwnedFd>,
    /// The claim to the uplink.
    pub claim: Option<OwnedFd>,
    /// Devices.
    pub descriptors: VecDeque<OwnedFd>,
    /// Whether the service manager is closing, in its own time, what was of no use.
    pub closing: bool,
}

impl Inheritance {
    /// Goes on with what the process before has left in the service manager's store; asks
    /// for a hand-over if there is none and the configuration says so.
    ///
    /// # Errors
    /// [`StartError`]; the other process goes on.
    pub fn ask(config: Config, legacy: &mut Legacy) -> Result<Self, StartError> {
        let mut closing = false;
        if !legacy.is_empty() {
            let left = legacy.open(&config.uplink).and_then(|take| Self::of(&config, take));
            match left {
                Ok(inheritance) => return Ok(inheritance),
                Err(why) => {
                    warn!(
                        "what the vlanswitchd before has left in the service manager's store \
                         cannot be used: {why}: starting without it; frames in between are lost, \
                         and counters start again"
                    );
                    legacy.discard();
                    closing = true;
                }
            }
        }
        let take = match config.control.path() {
            Some(socket) if config.is_takeover() => TakeOver::ask(socket, &config.uplink)?,
            _ => None,
        };
        match take {
            Some(take) => Self::of(&config, take).map_err(|error| {
                StartError::Control(io::Error::new(io::ErrorKind::InvalidData, error))
            }),
            None => Ok(Self {
                config,
                wanted: None,
                take: None,
                listeners: HashMap::new(),
                claim: None,
                descriptors: VecDeque::new(),
                closing,
            }),
        }
    }

    fn of(config: &Config, mut take: TakeOver) -> Result<Self, String> {
        let mut ports = Vec::with_capacity(take.state.ports.len());
        for port in &take.state.ports {
            let parsed = mapping::parse(&port.map, PLAIN_TPID);
            ports.push(parsed.map_err(|problem| problem.to_string())?);
        }
        let first = config.with_ports(ports).map_err(|errors| errors.to_string())?;
        let mut descriptors = VecDeque::from(std::mem::take(&mut take.descriptors));
        let mut listeners = HashMap::new();
        for place in std::mem::take(&mut take.state.listeners) {
            let socket = descriptors.pop_front();
            let socket = socket.filter(|socket| getsockopt(socket, AcceptConn) == Ok(true));
            listeners.insert(place.clone(), socket.ok_or(format!("{place} is no socket"))?);
        }
        let claim = descriptors.pop_front().filter(|claim| is_claim(claim, &config.uplink));
        Ok(Self {
            config: first,
            wanted: Some(config.clone()),
            take: Some(take),
            listeners,
            claim: Some(claim.ok_or("the claim to the uplink is not among it")?),
            descriptors,
            closing: false,
        })
    }
}

fn adopt(name: &str, index: u32, socket: OwnedFd, slots: usize) -> Result<Device, StartError> {
    NetdevPort::adopt(index, socket, slots)
        .map(Device::Netdev)
        .map_err(|source| StartError::TakenOver { name: name.to_owned(), source })
}

/// The TPID maps of a [`State`] go without.
const PLAIN_TPID: Tpid = Tpid::Customer;
