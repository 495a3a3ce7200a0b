//! Handing over to another process, and taking over from one (`control::takeover`), be it
//! that runs or one that has left everything in a store (`control::store`).

use super::devices::{Opened, counted};
use super::ports::Attached;
use super::workers::Beginning;
use super::{Daemon, is_claim};
use crate::control::affinity;
use crate::control::config::{Config, WORKERS_MAX, WorkerCount};
use crate::control::mapping;
use crate::control::server::{ClientId, Refusal};
use crate::control::start_error::StartError;
use crate::control::store::{Deposit, Legacy, Store};
use crate::control::takeover::{
    self, DeviceState, FORMAT, Last, PortState, State, Stored, TakeOver, format_for,
};
use crate::dataplane::{Command, Departed};
use crate::frame::Tpid;
use crate::port::{Device, InternalPort, NetdevPort};
use crate::switch::PortIndex;
use crate::sys::fanout;
use crate::sys::packet::KernelCounter;
use nix::sys::socket::{getsockopt, sockopt::AcceptConn};
use std::collections::HashMap;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use tracing::{info, warn};

/// Devices taken over, to be given to the workers when the other process has stopped.
#[derive(Debug, Default)]
struct Adopted {
    uplink: Vec<Device>,
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
        // First: who hears of another format ends us.
        if uplink != self.name {
            return Err(Refusal::refused(format!("it serves uplink {}, not {uplink}", self.name)));
        }
        let ours = format_for(self.workers.len(), self.kernel.is_some());
        if !(ours..=FORMAT).contains(&format) {
            return Err(Refusal::other_format(ours));
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
        let late = self.sending_sockets();
        // Those, and what is to be known of them.
        store.check_room(descriptors.len() + 1 + late.len())?;
        let deposit = Deposit::make(&descriptors, &late)?;
        drop(late);
        // Closing them ends nothing: their sockets are in the store.
        let (last, _devices) = self.freeze();
        deposit.complete(&serde_json::to_vec(&Stored { format: state.format(), state, last })?)
    }

    /// The sockets devices send by, which another process does not need.
    fn sending_sockets(&self) -> Vec<Arc<OwnedFd>> {
        let uplink = self.uplink.attached.iter().flat_map(|(_, counters, _)| counters);
        let attached = self.ports.iter().filter_map(|(_, port)| port.attached.as_ref());
        let ports = attached.filter_map(|attached| attached.counter.as_ref());
        uplink.chain(ports).filter_map(KernelCounter::sending).collect()
    }

    /// All that another process needs, in the order the format says.
    fn possessions(&self) -> (State, Vec<BorrowedFd<'_>>) {
        let mut descriptors: Vec<BorrowedFd<'_>> =
            self.server.listeners().map(|(_, fd)| fd).collect();
        descriptors.push(self.claim.as_fd());
        let attached = self.uplink.attached.as_ref();
        // Without a ring there is nothing to hand over but what to put back one day.
        let found_uplink = attached.filter(|(_, counters, _)| counters.is_empty());
        let found_uplink = found_uplink.map(|(_, _, found)| found.clone());
        let uplink = attached.and_then(|(index, counters, found)| {
            // None if its rings could not be opened again.
            counters.first()?;
            descriptors.extend(counters.iter().map(KernelCounter::socket));
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
                worker: port.worker,
            });
        }
        let state = State {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uplink: self.name.clone(),
            device: uplink,
            ports,
            listeners: self.server.listeners().map(|(place, _)| place).collect(),
            abilities: Some(self.abilities),
            found_uplink,
            kernel_path: self.kernel.is_some(),
            workers: self.workers.len(),
        };
        (state, descriptors)
    }

    /// Stops the workers where they are.
    fn freeze(&mut self) -> (Last, Vec<Departed>) {
        let departed = self.workers.end(|| Command::Freeze);
        let stopped = takeover::clock();
        let mut uplink = Vec::with_capacity(departed.len());
        let mut positions: HashMap<PortIndex, usize> = HashMap::new();
        for theirs in &departed {
            let mut next = 0;
            // The others' ports are there too, without a device.
            for Departed { port, device, .. } in theirs {
                match (port, device.as_ref().map(|device| device.position().0)) {
                    (Some(port), Some(position)) => {
                        positions.insert(*port, position);
                    }
                    (None, Some(position)) => next = position,
                    (_, None) => {}
                }
            }
            uplink.push(next);
        }
        self.count_overruns();
        let next = |port| positions.get(&port).copied().unwrap_or_default();
        let ports = self.ports.iter().map(|(position, port)| {
            let (from_guest, to_guest) = (&port.shared.from_guest, &port.shared.to_guest);
            (next(position), from_guest.snapshot().into(), to_guest.snapshot().into())
        });
        let mut uplink = uplink.into_iter();
        let last = Last {
            stopped,
            next: uplink.next().unwrap_or_default(),
            others: uplink.collect(),
            from_wire: self.workers.uplink_flow().into(),
            ports: ports.collect(),
            removed: self.retired.clone(),
            unsent: self.uplink.unsent.clone(),
        };
        (last, departed.into_iter().flatten().collect())
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
            let sockets = (0..self.workers.len()).map(|_| descriptors.pop_front());
            let sockets = sockets.collect::<Option<Vec<_>>>().ok_or_else(missing)?;
            let index = index.ok_or_else(missing)?;
            let parts = NetdevPort::adopt_uplink(index, sockets, slots)
                .map_err(|source| StartError::TakenOver { name: self.name.clone(), source });
            match parts.and_then(|parts| self.named(index, &self.name, parts)) {
                Ok(parts) => {
                    let (counters, devices) = counted(parts)?;
                    self.uplink.slots = slots;
                    self.uplink.attached = Some((index, counters, found));
                    adopted.uplink = devices;
                }
                Err(error) if strict => return Err(error),
                Err(error) => {
                    warn!("{error}: starting without its rings");
                    let now = error.new_name();
                    self.host.remember(Vec::new(), Some(found.renamed(now)));
                }
            }
        }
        // What the kernel path serves has no socket: it is found by its pins.
        let earlier = take.state.ports.iter_mut().filter(|port| port.device.is_none());
        let earlier = earlier.filter_map(|port| port.found.take()).collect();
        self.host.remember(earlier, take.state.found_uplink.take());
        for (position, port) in take.state.ports.iter_mut().enumerate() {
            let Some(DeviceState { index, slots }) = port.device.take() else { continue };
            if let Some(port) = self.ports.get_mut(position) {
                // Until all is settled, the packet path has what it had.
                port.in_kernel = false;
            }
            let socket = descriptors.pop_front().ok_or_else(missing)?;
            let name = self.ports.get(position).map(|port| port.config.device.clone());
            let name = name.unwrap_or_default();
            let found = port.found.take();
            let device = match index {
                Some(index) => adopt(&name, index, socket, slots)
                    .and_then(|device| self.named(index, &name, device))
                    .map(|device| (device, None)),
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

    /// The device, if it still has this name: else it is no port or uplink any more.
    fn named<T>(&self, index: u32, name: &str, device: T) -> Result<T, StartError> {
        match self.monitor.links().by_index(index) {
            Some(link) if link.name != name => {
                Err(StartError::Renamed { name: name.to_owned(), now: link.name.clone() })
            }
            _ => Ok(device),
        }
    }

    /// Takes over: makes the other process's devices ours, and goes on from where it
    /// stops when the workers have begun.
    ///
    /// # Errors
    /// [`StartError`]. Nothing has been put back: if the other process still runs, it
    /// goes on; if it has gone, the devices are as a crash leaves them.
    pub(super) fn go_on(
        &mut self,
        mut take: TakeOver,
        descriptors: VecDeque<OwnedFd>,
        beginning: Beginning,
    ) -> Result<(), StartError> {
        let Adopted { mut uplink, ports: mut opened } =
            self.adopt_devices(&mut take, descriptors)?;
        beginning.wait()?;
        let Last { stopped, next, others, from_wire, ports, removed, unsent } = take.finish()?;
        self.claim_for_packet_path();
        // Not sooner: the other process changes what its own filter claims, and goes on if
        // this one fails. Both claim the same now.
        for counter in self.uplink.attached.iter().flat_map(|(_, counters, _)| counters) {
            self.uplink.filter.attach(counter.socket())?;
        }
        if let Some(seat) = self.workers.iter().next() {
            seat.uplink.from_wire.restore(&(&from_wire).into());
        }
        self.retired = removed;
        self.uplink.unsent = unsent;
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
        let devices = self.enter_ports(opened);
        for (part, next) in uplink.iter_mut().zip(std::iter::once(next).chain(others)) {
            part.resume_at(next);
        }
        self.uplink_is_there();
        self.attach_devices(devices, uplink);
        let gap = Duration::from_nanos(takeover::clock().saturating_sub(stopped));
        info!("uplink {}: taken over; frames waited for {} us", self.name, gap.as_micros());
        self.steer_group()
    }

    /// Has the workers' sockets steered by our own program. Until then the other process's
    /// does that, which lives with them; its answers are the same, as each port is with the
    /// worker it was with. Hence after the rings are served: this takes the kernel time.
    fn steer_group(&mut self) -> Result<(), StartError> {
        let counters = self.uplink.attached.as_ref().map(|(_, counters, _)| counters);
        let socket = counters.and_then(|counters| counters.first()).map(KernelCounter::socket);
        let (Some(socket), Some(steering)) = (socket, &self.uplink.steering) else {
            return Ok(());
        };
        match fanout::steer(socket, steering) {
            Ok(()) => Ok(()),
            Err(error) => {
                warn!("uplink {}: {error}: opening it again", self.name);
                self.reopen_uplink()
            }
        }
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
        // A manager that keeps a store may be about to close what it has just dropped.
        let closing = Store::of_environment(config.is_fd_store()).is_some();
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
        let workers = take.state.workers;
        if !(1..=WORKERS_MAX).contains(&workers) {
            return Err(format!("it is of {workers} workers"));
        }
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

/// The workers to go on with: as many as the other process has, as each of its rings on the
/// uplink has to have one. For each its CPU; and the worker each port is with.
pub fn workers_of(
    state: &State,
    config: &Config,
    planned: Vec<Option<usize>>,
) -> (Vec<Option<usize>>, Vec<Option<usize>>) {
    let (wanted, running) = (planned.len(), state.workers);
    let is_told = config.workers != WorkerCount::Auto || !config.cpus.is_empty();
    if wanted != running && is_told {
        let plural = if running == 1 { "" } else { "s" };
        warn!(
            "going on with {running} worker{plural}, as many as the vlanswitchd before: to have \
             {wanted}, stop it and start it again; frames in between are lost then"
        );
    }
    let before = state.ports.iter().map(|port| Some(port.worker)).collect();
    (affinity::cpus_of(config, running), before)
}

fn adopt(name: &str, index: u32, socket: OwnedFd, slots: usize) -> Result<Device, StartError> {
    NetdevPort::adopt(index, socket, slots)
        .map(Device::Netdev)
        .map_err(|source| StartError::TakenOver { name: name.to_owned(), source })
}

/// The TPID maps of a [`State`] go without.
const PLAIN_TPID: Tpid = Tpid::Customer;
