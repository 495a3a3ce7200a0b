//! The daemon: start, follow the devices, answer signals, stop.
//!
//! Everything is checked before anything is changed, and what was changed is put
//! back when a later step fails. Once forwarding, this thread only reacts: to
//! signals, to netlink's news about devices, and once a minute to the clock, to
//! fold the kernel's own counts into ours before they overflow.

use crate::control::cli::{Config, LogFormat};
use crate::control::host::{FoundPort, FoundUplink, Host};
use crate::control::links::{LinkEvent, LinkMonitor, LinkState};
use crate::control::mapping::{DeviceKind, PortConfig};
use crate::control::parallel::in_parallel;
use crate::control::report::{
    PortReport, Report, SentReport, UnmappedReport, UplinkReport, port_state,
};
use crate::control::start_error::StartError;
use crate::control::{checks, privileges, probe};
use crate::dataplane::{Command, Departed, PortShared, UplinkShared, Worker, WorkerHandle};
use crate::port::{Device, DevicePart, DeviceState, InternalPort, Link, NetdevOptions, NetdevPort};
use crate::switch::PortIndex;
use crate::sys::bpf::UplinkFilter;
use crate::sys::packet::KernelCounter;
use crate::sys::tap::{self, TapOptions};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::Arc;
use std::time::Duration;
use tracing::{debug, info, warn};

const SIGNALS: Token = Token(0);
const LINKS: Token = Token(1);
/// How long a worker may take to give a device back.
const DEPARTURES: Duration = Duration::from_millis(200);
/// Tries to read netlink's news before waiting for the next.
const READ_ATTEMPTS: usize = 3;
/// Between two seals moved: each holds the kernel's device lock for a while.
const SETTLE_INTERVAL: Duration = Duration::from_millis(50);
/// The kernel's counters have 32 bits: 20 minutes at 3 million frames a second.
const COUNT_INTERVAL: Duration = Duration::from_secs(60);

#[derive(Debug)]
struct Port {
    config: PortConfig,
    shared: Arc<PortShared>,
    attached: Option<Attached>,
}

/// A port's device, made ready and not yet opened.
#[derive(Debug)]
struct Prepared {
    position: PortIndex,
    link: LinkState,
}

/// A port's device while it is in the worker.
#[derive(Debug)]
struct Attached {
    /// `None` for an internal port, which is ours wherever its netdev goes.
    index: Option<u32>,
    counter: Option<KernelCounter>,
    found: Option<FoundPort>,
}

#[derive(Debug)]
struct Uplink {
    shared: Arc<UplinkShared>,
    filter: UplinkFilter,
    mtu: Option<u32>,
    attached: Option<(u32, Option<KernelCounter>, FoundUplink)>,
}

/// The running switch.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    log_format: LogFormat,
    host: Host,
    monitor: LinkMonitor,
    uplink: Uplink,
    ports: Vec<Port>,
    worker: Option<WorkerHandle>,
    /// Taps this run created: removed if it does not get as far as forwarding.
    created: Vec<(String, u32)>,
    /// Devices whose seal has not been moved to where it costs least.
    unsettled: Vec<u32>,
    poll: Poll,
    signals: SignalFd,
    /// Held for as long as the uplink is ours.
    _claim: UnixListener,
}

impl Daemon {
    /// Starts the switch: it forwards when this returns.
    ///
    /// # Errors
    /// [`StartError`]; everything is then as it was before.
    pub fn start(config: Config) -> Result<Self, StartError> {
        privileges::check()?;
        checks::file_limit(config.ports.len())?;
        let signals = block_signals()?;
        let monitor = LinkMonitor::new()?;
        checks::devices(&config, monitor.links())?;
        let claim = claim_uplink(&config.uplink)?;
        let probe = probe::start();
        let filter = UplinkFilter::new()?;
        for (tpid, vid) in config.table.claims() {
            filter.claim(tpid.index(), vid.get(), true)?;
        }
        filter.claim_untagged(config.table.claims_untagged())?;
        let uplink_mtu = checks::uplink_mtu(&config, monitor.links());
        let uplink = Uplink { shared: Arc::default(), filter, mtu: uplink_mtu, attached: None };
        let ports: Vec<Port> = config
            .ports
            .into_iter()
            .map(|config| Port { config, shared: Arc::default(), attached: None })
            .collect();
        let shared: Vec<_> = ports.iter().map(|port| Arc::clone(&port.shared)).collect();
        let mut daemon = Self {
            name: config.uplink,
            log_format: config.log_format,
            host: Host::new()?,
            monitor,
            uplink,
            ports,
            worker: None,
            created: Vec::new(),
            unsettled: Vec::new(),
            poll: Poll::new()?,
            signals,
            _claim: claim,
        };
        let abilities = probe.finish();
        let table = Arc::new(config.table);
        let uplink_shared = Arc::clone(&daemon.uplink.shared);
        let (worker, commands, departed) =
            Worker::new(table, uplink_shared, shared, abilities, config.poll)?;
        daemon.worker = Some(worker.spawn(commands, departed)?);
        match daemon.attach_all() {
            Ok(()) => Ok(daemon),
            Err(error) => {
                daemon.stop();
                daemon.remove_created();
                Err(error)
            }
        }
    }

    /// Forwards until a signal says to stop. Gives `announce` the line that says
    /// so, and `show` each report asked for, the last one included.
    ///
    /// # Errors
    /// When the control loop itself fails.
    pub fn run(
        mut self,
        announce: impl FnOnce(&str),
        mut show: impl FnMut(&str),
    ) -> io::Result<()> {
        announce(&self.banner());
        let result = self.follow(&mut show);
        self.stop();
        show(&self.report());
        result
    }

    fn banner(&self) -> String {
        let ports = self.ports.len();
        let plural = if ports == 1 { "" } else { "s" };
        format!("forwarding: uplink {}, {ports} port{plural}, datapath packet", self.name)
    }

    fn follow(&mut self, show: &mut impl FnMut(&str)) -> io::Result<()> {
        let mut events = Events::with_capacity(8);
        loop {
            let timeout = if self.unsettled.is_empty() { COUNT_INTERVAL } else { SETTLE_INTERVAL };
            match self.poll.poll(&mut events, Some(timeout)) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            self.count_overruns();
            if events.is_empty()
                && let Some(index) = self.unsettled.pop()
            {
                self.host.settle_seal(index);
            }
            for event in &events {
                match event.token() {
                    SIGNALS => {
                        if self.answer_signals(show).is_break() {
                            return Ok(());
                        }
                    }
                    _ => self.follow_links(),
                }
            }
        }
    }

    fn answer_signals(&mut self, show: &mut impl FnMut(&str)) -> ControlFlow<()> {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            if signal.ssi_signo != Signal::SIGUSR1 as u32 {
                info!("stopping");
                return ControlFlow::Break(());
            }
            self.count_overruns();
            show(&self.report());
        }
        ControlFlow::Continue(())
    }

    fn attach_all(&mut self) -> Result<(), StartError> {
        let registry = self.poll.registry();
        registry.register(&mut SourceFd(&self.signals.as_raw_fd()), SIGNALS, Interest::READABLE)?;
        registry.register(&mut SourceFd(&self.monitor.as_raw_fd()), LINKS, Interest::READABLE)?;
        self.create_taps()?;
        let mut prepared = Vec::with_capacity(self.ports.len());
        for position in 0..self.ports.len() {
            prepared.extend(self.start_port(position)?);
        }
        // In a pass of their own: a tap going up without a VMM keeps the kernel's
        // device lock busy for milliseconds (`linkwatch_do_dev`), and every request
        // between two of them would wait for it.
        for Prepared { link, .. } in &prepared {
            self.host.bring_up(link.index)?;
        }
        let uplink = self.monitor.links().by_name(&self.name).cloned();
        let opened = in_parallel(prepared, |prepared| {
            let device = open(&prepared.link, NetdevOptions::Port);
            (prepared, device)
        });
        for (prepared, device) in opened {
            self.attach_port(prepared, device)?;
        }
        // The uplink comes last, so that no frame meets a port not yet attached.
        if let Some(link) = uplink {
            self.attach_uplink(&link)?;
        }
        // Carrier and state may have changed through what was set just now.
        self.follow_links();
        Ok(())
    }

    /// Creates the taps that are missing, all at once.
    fn create_taps(&mut self) -> Result<(), StartError> {
        let missing = self.ports.iter().filter_map(|port| {
            let DeviceKind::Netdev { create: Some(tap) } = &port.config.kind else { return None };
            let name = &port.config.device;
            self.monitor.links().by_name(name).is_none().then(|| TapOptions {
                owner: tap.owner,
                group: tap.group,
                multi_queue: tap.queues > 1,
                persistent: true,
                vnet_header: true,
                ..TapOptions::new(name.clone())
            })
        });
        let created = in_parallel(missing.collect(), |options| {
            let name = options.name.clone();
            let created =
                tap::create(&options).map(|()| nix::net::if_::if_nametoindex(name.as_str()));
            (name, created)
        });
        let mut result = Ok(());
        for (name, created) in created {
            match created {
                Ok(index) => {
                    debug!("{name}: created a tap");
                    self.created.push((name, index.map_err(io::Error::from)?));
                }
                Err(source) => result = Err(StartError::Tap { name, source }),
            }
        }
        result
    }

    /// Sees to the port's device; returns it if it is there and to be opened.
    fn start_port(&mut self, position: PortIndex) -> Result<Option<Prepared>, StartError> {
        let Some(port) = self.ports.get(position) else { return Ok(None) };
        let name = port.config.device.clone();
        if port.config.kind == DeviceKind::Internal {
            self.attach_internal(position, &name)?;
            return Ok(None);
        }
        let created =
            self.created.iter().find(|(created, _)| *created == name).map(|(_, index)| *index);
        let link = match created {
            Some(index) => Some(self.host.link(index)?),
            None => self.monitor.links().by_name(&name).cloned(),
        };
        match link {
            Some(link) => self.prepare_port(position, link, created.is_some()).map(Some),
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
    ) -> Result<Prepared, StartError> {
        let found = self.host.prepare_port(&link, created)?;
        if found.is_none() {
            // Not those to be given back: that would take as long again when stopping.
            self.unsettled.push(link.index);
        }
        if let Some(port) = self.ports.get_mut(position) {
            // Held here from now on, so that it is given back whatever happens next.
            port.attached = Some(Attached { index: Some(link.index), counter: None, found });
        }
        Ok(Prepared { position, link })
    }

    fn attach_internal(&mut self, position: PortIndex, name: &str) -> Result<(), StartError> {
        let existed = self.monitor.links().by_name(name).is_some();
        let options = TapOptions { vnet_header: true, persistent: true, ..TapOptions::new(name) };
        let queue = tap::open_queue(&options)
            .map_err(|source| StartError::Tap { name: name.to_owned(), source })?;
        if !existed {
            let index = nix::net::if_::if_nametoindex(name).map_err(io::Error::from)?;
            self.created.push((name.to_owned(), index));
        }
        if let Some(port) = self.ports.get_mut(position) {
            // Its netdev may live in another namespace: what it takes, it takes.
            port.shared.link.set(DeviceState::Up, u32::MAX);
            port.attached = Some(Attached { index: None, counter: None, found: None });
        }
        let device = Device::Internal(InternalPort::new(queue.fd));
        self.command(Command::Attach(Some(position), Box::new(device)));
        Ok(())
    }

    fn attach_port(
        &mut self,
        Prepared { position, link }: Prepared,
        device: Result<Device, StartError>,
    ) -> Result<(), StartError> {
        let device = device?;
        let counter = device.kernel_counter()?;
        let now = self.host.link(link.index).unwrap_or(link);
        if let Some(port) = self.ports.get_mut(position) {
            publish(&port.shared.link, Some(&now));
            if let Some(attached) = &mut port.attached {
                attached.counter = counter;
            }
        }
        self.command(Command::Attach(Some(position), Box::new(device)));
        Ok(())
    }

    /// Attaches a device that has just appeared.
    fn adopt(&mut self, position: PortIndex, link: &LinkState) -> Result<(), StartError> {
        let prepared = self.prepare_port(position, link.clone(), false)?;
        let up = self.host.bring_up(link.index).map_err(StartError::from);
        let result = up.and_then(|()| {
            let device = open(link, NetdevOptions::Port);
            self.attach_port(prepared, device)
        });
        if result.is_err() {
            let attached = self.ports.get_mut(position).and_then(|port| port.attached.take());
            if let Some(found) = attached.and_then(|attached| attached.found) {
                self.host.give_port_back(&found);
            }
        }
        result
    }

    fn attach_uplink(&mut self, link: &LinkState) -> Result<(), StartError> {
        let found = self.host.prepare_uplink(link, self.uplink.mtu)?;
        let device = match open(link, NetdevOptions::Uplink(&self.uplink.filter)) {
            Ok(device) => device,
            Err(error) => {
                self.host.give_uplink_back(&found);
                return Err(error);
            }
        };
        let counter = device.kernel_counter()?;
        let now = self.host.link(link.index).unwrap_or_else(|_| link.clone());
        publish(&self.uplink.shared.link, Some(&now));
        if !now.up {
            warn!("uplink {0} is down: `ip link set {0} up`", self.name);
        }
        self.uplink.attached = Some((link.index, counter, found));
        self.command(Command::Attach(None, Box::new(device)));
        Ok(())
    }

    fn command(&self, command: Command) {
        if let Some(worker) = &self.worker {
            worker.send(command);
        }
    }

    /// Brings ports and uplink in line with what netlink tells.
    fn follow_links(&mut self) {
        let mut events = Vec::new();
        // After an error another call makes up for what was missed.
        for _ in 0..READ_ATTEMPTS {
            match self.monitor.read_events(|event| events.push(event)) {
                Ok(()) => break,
                Err(error) => warn!("{error}"),
            }
        }
        for event in events {
            if let Some(old) = event.departed() {
                self.device_left(old.index, event.arrived().map(|new| new.name.as_str()));
            }
            if let Some(new) = event.arrived() {
                self.device_came(new);
            }
            if let LinkEvent::Changed { new, .. } = &event {
                self.device_changed(new);
            }
        }
        self.publish_all();
    }

    /// The monitor's table is the truth: what was read from a device while it was
    /// attached may have been a moment that no event speaks of.
    fn publish_all(&self) {
        let links = self.monitor.links();
        for port in &self.ports {
            let index = port.attached.as_ref().and_then(|attached| attached.index);
            if let Some(link) = index.and_then(|index| links.by_index(index)) {
                publish(&port.shared.link, Some(link));
            }
        }
        if let Some(link) =
            self.uplink.attached.as_ref().and_then(|(index, ..)| links.by_index(*index))
        {
            publish(&self.uplink.shared.link, Some(link));
        }
    }

    fn port_at(&mut self, index: u32) -> Option<(PortIndex, &mut Port)> {
        self.ports.iter_mut().enumerate().find(|(_, port)| {
            port.attached.as_ref().is_some_and(|attached| attached.index == Some(index))
        })
    }

    /// A device no longer has its name: it is gone, or has a new one.
    fn device_left(&mut self, index: u32, new_name: Option<&str>) {
        if self.uplink.attached.as_ref().is_some_and(|(attached, ..)| *attached == index) {
            warn!("uplink {} is gone: waiting for it to come back", self.name);
            publish(&self.uplink.shared.link, None);
            self.command(Command::Detach(None));
            self.await_departure(None);
            self.count_overruns();
            if let Some((_, _, found)) = self.uplink.attached.take() {
                self.host.give_uplink_back(&found.renamed(new_name));
            }
        } else if let Some((position, port)) = self.port_at(index) {
            info!("{}: gone, waiting for it to come back", port.config.device);
            publish(&port.shared.link, None);
            self.command(Command::Detach(Some(position)));
            self.await_departure(Some(position));
            self.count_overruns();
            self.unsettled.retain(|unsettled| *unsettled != index);
            let attached = self.ports.get_mut(position).and_then(|port| port.attached.take());
            if let Some(found) = attached.and_then(|attached| attached.found) {
                self.host.give_port_back(&found.renamed(new_name));
            }
        }
    }

    /// Waits until the worker has given a device back, and closes it.
    fn await_departure(&self, port: Option<PortIndex>) {
        let Some(worker) = &self.worker else { return };
        while let Ok(departed) = worker.departed.recv_timeout(DEPARTURES) {
            report_departure(&departed);
            if departed.port == port {
                return;
            }
        }
    }

    fn device_came(&mut self, link: &LinkState) {
        if link.name == self.name && self.uplink.attached.is_none() {
            match self.attach_uplink(link) {
                Ok(()) => info!("uplink {}: back", self.name),
                Err(error) => warn!("uplink {}: cannot attach: {error}", self.name),
            }
            return;
        }
        let waiting = self
            .ports
            .iter()
            .position(|port| port.config.device == link.name && port.attached.is_none());
        if let Some(position) = waiting {
            match self.adopt(position, link) {
                Ok(()) => info!("{}: attached", link.name),
                Err(StartError::Host(error)) if error.is_device_gone() => {}
                Err(error) => warn!("{}: cannot attach: {error}", link.name),
            }
        }
    }

    fn device_changed(&mut self, link: &LinkState) {
        if self.uplink.attached.as_ref().is_some_and(|(index, ..)| *index == link.index) {
            announce_change(&format!("uplink {}", link.name), &self.uplink.shared.link, link);
            publish(&self.uplink.shared.link, Some(link));
        } else if let Some((_, port)) = self.port_at(link.index) {
            announce_change(&link.name, &port.shared.link, link);
            publish(&port.shared.link, Some(link));
        }
    }

    fn count_overruns(&self) {
        if let Some((_, Some(counter), _)) = &self.uplink.attached {
            self.uplink.shared.from_wire.add_overruns(counter.take().overruns);
        }
        for port in &self.ports {
            if let Some(counter) =
                port.attached.as_ref().and_then(|attached| attached.counter.as_ref())
            {
                port.shared.from_guest.add_overruns(counter.take().overruns);
            }
        }
    }

    /// Stops the worker and puts back what the kernel does not undo itself.
    fn stop(&mut self) {
        let departed = self.worker.take().map(WorkerHandle::finish).unwrap_or_default();
        self.count_overruns();
        let ports = self.ports.iter_mut().filter_map(|port| port.attached.take()?.found);
        let ports: Vec<FoundPort> = ports.collect();
        let uplink = self.uplink.attached.take().map(|(_, _, found)| found);
        let parts = departed.into_iter().flat_map(|departed| departed.device.into_parts());
        in_parallel(parts.collect(), drop::<DevicePart>);
        for found in ports {
            self.host.give_port_back(&found);
        }
        if let Some(found) = uplink {
            self.host.give_uplink_back(&found);
        }
    }

    fn remove_created(&mut self) {
        for (name, index) in std::mem::take(&mut self.created) {
            self.host.delete(&name, index);
        }
    }

    fn report(&self) -> String {
        let ports: Vec<PortReport> = self
            .ports
            .iter()
            .map(|port| PortReport {
                name: port.config.device.clone(),
                vlans: port.config.membership.vlans().to_string(),
                mode: port.config.membership.mode().name(),
                state: port_state(port.shared.link.state()),
                from_guest: port.shared.from_guest.snapshot().into(),
                to_guest: port.shared.to_guest.snapshot().into(),
            })
            .collect();
        let to_wire = SentReport {
            out_frames: ports.iter().map(|port| port.from_guest.out_frames).sum(),
            out_bytes: ports.iter().map(|port| port.from_guest.out_bytes).sum(),
        };
        let uplink = UplinkReport {
            name: self.name.clone(),
            state: self.uplink.shared.link.state().name(),
            from_wire: self.uplink.shared.from_wire.snapshot().into(),
            to_wire,
        };
        let unmapped = match self.uplink.filter.seen() {
            Ok(rows) => rows.map(UnmappedReport::new).collect(),
            Err(error) => {
                warn!("{error}");
                Vec::new()
            }
        };
        let report = Report::new(uplink, ports, unmapped);
        match self.log_format {
            LogFormat::Text => report.to_text(),
            LogFormat::Json => report.to_json() + "\n",
        }
    }
}

/// Keeps a second vlanswitchd off the uplink: each frame would arrive twice. The
/// name is one of this network namespace, like the uplink's, and goes with us.
fn claim_uplink(uplink: &str) -> Result<UnixListener, StartError> {
    let address = SocketAddr::from_abstract_name(format!("vlanswitchd/{uplink}"))?;
    UnixListener::bind_addr(&address).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => StartError::UplinkTaken(uplink.to_owned()),
        _ => StartError::Control(error),
    })
}

fn open(link: &LinkState, options: NetdevOptions<'_>) -> Result<Device, StartError> {
    NetdevPort::open(link.index, options)
        .map(Device::Netdev)
        .map_err(|source| StartError::Packet { name: link.name.clone(), source })
}

fn block_signals() -> Result<SignalFd, io::Error> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGUSR1] {
        set.add(signal);
    }
    // Before any thread starts: they inherit the mask.
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?)
}

fn publish(place: &Link, link: Option<&LinkState>) {
    let state = match link {
        None => DeviceState::Absent,
        Some(link) if !link.up => DeviceState::Down,
        Some(link) if !link.carrier => DeviceState::NoCarrier,
        Some(_) => DeviceState::Up,
    };
    place.set(state, link.map_or(u32::MAX, |link| link.mtu));
}

fn announce_change(name: &str, before: &Link, link: &LinkState) {
    let old = before.state();
    let scratch = Link::default();
    publish(&scratch, Some(link));
    if scratch.state() != old {
        info!("{name}: {}", scratch.state().name());
    }
}

fn report_departure(departed: &Departed) {
    if let Some(error) = &departed.error {
        warn!("a device could not be polled: {error}");
    }
}
