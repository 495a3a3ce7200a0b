//! The daemon: start, follow the devices, answer signals and callers, stop.
//!
//! Everything is checked before anything is changed, and what was changed is put
//! back when a later step fails. Once forwarding, this thread only reacts: to
//! signals, to netlink's news about devices, to callers of the control socket, and
//! once a second to the clock.

mod answer;
mod balancing;
mod capturing;
mod change;
mod devices;
mod examine;
mod follow;
mod handing;
mod heartbeat;
mod leftovers;
mod paths;
mod ports;
mod scraped;
mod settling;
mod stuck;
mod watch;
mod workers;

use crate::control::api::{Event, EventKind, Removed};
use crate::control::config::{Config, LogFormat, Metrics};
use crate::control::fallback::Abilities;
use crate::control::host::{FoundUplink, Host};
use crate::control::links::LinkMonitor;
use crate::control::privileges::Confined;
use crate::control::probe::{self, Probe};
use crate::control::record::Record;
use crate::control::server::{Served, Server, bind_control, bind_metrics_tcp, bind_metrics_unix};
use crate::control::start_error::StartError;
use crate::control::store::{Legacy, Store};
use crate::control::unsent::Unsent;
use crate::control::{affinity, checks, privileges};
use crate::dataplane::FlowSnapshot;
use crate::dataplane::kernel::KernelPath;
use crate::switch::PortIndex;
use crate::sys::bpf::{Steering, UplinkFilter};
use crate::sys::packet::KernelCounter;
pub use leftovers::give_back;

use capturing::Captures;
use change::Claims;
use devices::CreatedTap;
use examine::Examinations;
use handing::Inheritance;
use heartbeat::Heartbeat;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{UnixAddr, getsockname};
use ports::{Leaving, Ports};
use scraped::Scraped;
use settling::Settling;
use std::collections::{HashMap, HashSet};
use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::time::{Duration, Instant};
use tracing::{info, warn};
use watch::{TICK, Watched, wall_clock};
use workers::{Workers, place_ports};

const SIGNALS: Token = Token(0);
const LINKS: Token = Token(1);
const EXAMINED: Token = Token(2);
/// The server's tokens begin here.
const SERVER: usize = 3;
/// Calls answered and connections taken before signals and devices have their turn again.
const CALLS_PER_TURN: usize = 16;
/// How long a service manager may take to close what was in its store.
const CLOSING_PATIENCE: Duration = Duration::from_secs(2);

#[derive(Debug)]
struct Uplink {
    filter: UplinkFilter,
    /// Which worker gets a frame; none if there is one only.
    steering: Option<Steering>,
    mtu: Option<u32>,
    /// Slots of its ring.
    slots: usize,
    /// Its index, the counters of the workers' sockets, and what to put back.
    attached: Option<(u32, Vec<KernelCounter>, FoundUplink)>,
    watched: Watched,
    /// What it dropped after it had taken it.
    unsent: Unsent,
}

/// The running switch.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    config: Config,
    started: u64,
    host: Host,
    monitor: LinkMonitor,
    /// What it has in the kernel, if the kernel path is in use.
    kernel: Option<KernelPath>,
    /// Why not, if it is not.
    why_packet: String,
    /// It is to be no more.
    is_detached: bool,
    /// What programs that are no more had taken from the uplink.
    past: FlowSnapshot,
    uplink: Uplink,
    ports: Ports,
    /// What the uplink's filter lets in.
    claims: Claims,
    workers: Workers,
    /// What this kernel can do.
    abilities: Abilities,
    /// The counters of ports that were removed.
    retired: Option<Removed>,
    /// Ports that were removed a moment ago, and a worker had not noticed.
    leaving: Vec<Leaving>,
    /// Taps this run created: removed if it does not get as far as forwarding.
    created: Vec<CreatedTap>,
    /// Devices whose seal has not been moved to where it costs least.
    unsettled: Settling,
    /// The port whose seal is looked at next.
    seals_seen: PortIndex,
    /// Which of the silent ports are looked at by this tick.
    turn: usize,
    /// Devices with something left of that, to be cleared up when their guest is gone.
    uncleared: Vec<u32>,
    poll: Poll,
    signals: SignalFd,
    server: Server,
    captures: Captures,
    scraped: Scraped,
    examinations: Examinations,
    beat_interval: Duration,
    /// From the end of the start on.
    confined: Option<Confined>,
    /// Held for as long as the uplink is ours.
    claim: OwnedFd,
    /// How many tables the worker was given.
    tables: u64,
    /// How many moves of ports were begun.
    moves: u64,
    /// Devices that were asked back and not given back in time, by worker.
    late: HashSet<(usize, Option<PortIndex>)>,
    /// Devices that are there and could not be attached, as was said.
    left_out: Vec<u32>,
    /// Overruns of netlink that were followed up.
    overruns_seen: u64,
    /// Another process has gone on in our place.
    handed_over: bool,
    /// Where everything can be left for the next process.
    store: Option<Store>,
    /// What to put back, for who comes after us if we cannot.
    record: Record,
}

impl Daemon {
    /// Starts the switch: it forwards when this returns.
    ///
    /// # Errors
    /// [`StartError`]; everything is then as it was before.
    pub fn start(config: Config) -> Result<Self, StartError> {
        // Before anything is opened.
        let mut legacy = Legacy::take();
        privileges::check()?;
        let plan = affinity::plan(&config)?;
        checks::file_limit(config.ports.len(), plan.workers.len())?;
        plan.come_near();
        let signals = block_signals()?;
        let monitor = LinkMonitor::new()?;
        checks::devices(&config, monitor.links())?;
        let poll = Poll::new()?;
        let examinations = Examinations::new(&poll, EXAMINED)?;
        let inherited = Inheritance::ask(config, &mut legacy)?;
        let Inheritance { config, wanted, take, listeners, claim, descriptors, closing } =
            inherited;
        if take.is_none() {
            // One that goes on serves its guests: what was refused then came later.
            checks::vlan_devices(&config, config.table.claims(), monitor.links())?;
        }
        let known = take.as_ref().and_then(|take| take.state.abilities);
        let probe = known.is_none().then(probe::start);
        let claim = match claim {
            Some(claim) => claim,
            None => once_free(closing, || claim_uplink(&config.uplink))?.into(),
        };
        let server = listen(&config, &poll, listeners, closing)?;
        let (kernel, why_packet) = paths::open_kernel_path(&config)?;
        let filter = UplinkFilter::new(kernel.as_ref().map(KernelPath::records))?;
        let claims = Claims::default();
        checks::say_uplink_mtu(&config, monitor.links());
        let mtu = checks::target_mtu(&config);
        let watched = Watched::default();
        let mut ports = Ports::new(config.ports.clone());
        let abilities = known.or_else(|| probe.as_ref().map(Probe::result)).unwrap_or_default();
        let (planned, before) = match &take {
            Some(take) => handing::workers_of(&take.state, &config, plan.workers),
            None => (plan.workers, Vec::new()),
        };
        let steering = place_ports(&mut ports, planned.len(), &before)?;
        let (workers, beginning) = Workers::start(&planned, &config, &ports, abilities.segments)?;
        let heartbeat = Heartbeat::new(sd_notify::watchdog_enabled(), Instant::now());
        let store = Store::of_environment(config.is_fd_store());
        let record = Record::beside(config.control.path(), &config.uplink);
        let mut daemon = Self {
            name: config.uplink.clone(),
            config,
            started: wall_clock(),
            host: Host::new()?,
            monitor,
            kernel,
            why_packet,
            is_detached: false,
            past: FlowSnapshot::default(),
            uplink: Uplink {
                filter,
                steering,
                mtu,
                slots: 0,
                attached: None,
                watched,
                unsent: Unsent::default(),
            },
            ports,
            claims,
            workers,
            abilities,
            retired: None,
            leaving: Vec::new(),
            created: Vec::new(),
            unsettled: Settling::new(Instant::now()),
            seals_seen: 0,
            turn: 0,
            uncleared: Vec::new(),
            poll,
            signals,
            server,
            captures: Captures::default(),
            scraped: Scraped::default(),
            examinations,
            beat_interval: heartbeat.interval,
            confined: None,
            claim,
            tables: 0,
            moves: 0,
            late: HashSet::new(),
            left_out: Vec::new(),
            overruns_seen: 0,
            handed_over: false,
            store,
            record,
        };
        let all: Vec<PortIndex> = daemon.ports.iter().map(|(position, _)| position).collect();
        daemon.choose_paths(&all);
        match take {
            Some(take) => {
                daemon.go_on(take, descriptors, beginning)?;
                daemon.server.take_files();
                daemon.look_at_seals();
            }
            None => {
                daemon.learn_from_record();
                beginning.wait()?;
            }
        }
        legacy.remove();
        match daemon.attach_all() {
            Ok(()) => {}
            Err(error) => {
                daemon.stop();
                daemon.remove_created(0);
                return Err(error);
            }
        }
        daemon.host.give_back_remembered();
        if let Some(wanted) = wanted {
            // The other process has ended: better its ports than none.
            if let Err(error) = daemon.become_config(wanted) {
                warn!(
                    "taken over, and the ports are still those of the vlanswitchd before: {error}; \
                     `vlanswitchctl config reload` tries again"
                );
            }
        }
        daemon.keep_record(false);
        if let Some(probe) = probe {
            // What is confined is each thread for itself.
            probe.end();
        }
        daemon.confined = Some(daemon.confine()?);
        Ok(daemon)
    }

    /// Gives up what only the start takes.
    fn confine(&mut self) -> Result<Confined, StartError> {
        for (_, port) in self.ports.iter() {
            if let Some(index) = port.index() {
                self.host.recognise_seal(index);
            }
        }
        let pins = self.kernel.as_ref().and_then(KernelPath::place);
        privileges::confine(&self.config, pins).map_err(|error| {
            self.stop();
            self.remove_created(0);
            self.record.remove();
            StartError::from(error)
        })
    }

    fn attach_all(&mut self) -> Result<(), StartError> {
        let registry = self.poll.registry();
        registry.register(&mut SourceFd(&self.signals.as_raw_fd()), SIGNALS, Interest::READABLE)?;
        registry.register(&mut SourceFd(&self.monitor.as_raw_fd()), LINKS, Interest::READABLE)?;
        let opened = self.open_ports(&self.ports.without_device())?;
        self.attach_ports(opened);
        self.lead_all();
        self.claim_for_packet_path();
        // The uplink comes last, so that no frame meets a port not yet attached.
        if let Some(link) = self.monitor.links().by_name(&self.name).cloned()
            && self.uplink.attached.is_none()
        {
            self.attach_uplink(&link)?;
        }
        self.forget_the_gone();
        // Carrier and state may have changed through what was set just now.
        self.follow_links();
        Ok(())
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
        let result = self.react(&mut show);
        let deadline = self.captures.stop();
        if self.handed_over {
            // Everything is the other process's now: nothing is put back.
            self.server.leave_files();
            self.captures.finish(deadline);
            return result;
        }
        if result.is_ok() && self.store.is_some() {
            // Before, not meanwhile: their readers may be slow, and frames would wait.
            self.captures.finish(deadline);
            if self.leave_in_store() {
                self.server.leave_files();
                return result;
            }
        }
        let report = self.end();
        self.captures.finish(deadline);
        show(&report);
        result
    }

    /// Stops, and says what does not. Returns the last report.
    fn end(&mut self) -> String {
        if self.outlives_us() {
            self.keep_record(true);
            self.count_unsent();
            self.stop();
            let name = &self.name;
            info!(
                "the kernel path goes on forwarding: `vlanswitchd --give-back --uplink {name}` \
                 ends that"
            );
            return self.report();
        }
        self.count_overruns();
        self.count_unsent();
        self.stop();
        self.record.remove();
        self.report()
    }

    fn banner(&self) -> String {
        let ports = self.ports.len();
        let plural = if ports == 1 { "" } else { "s" };
        let datapath = self.datapath();
        format!("forwarding: uplink {}, {ports} port{plural}, datapath {datapath}", self.name)
    }

    fn react(&mut self, show: &mut impl FnMut(&str)) -> io::Result<()> {
        let mut events = Events::with_capacity(64);
        let mut next_tick = Instant::now();
        let mut next_beat = next_tick;
        loop {
            match self.poll.poll(&mut events, Some(self.time_to_wait(next_tick.min(next_beat)))) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
            let now = Instant::now();
            if now >= next_beat {
                self.beat(now);
                next_beat = now + self.beat_interval;
            }
            if now >= next_tick {
                self.tick(now);
                self.free_stuck_ring(now);
                self.take_notices();
                self.attach_left_out();
                self.end_captures();
                self.look_at_paths();
                self.host.restore_queueing();
                self.keep_record(false);
                next_tick = now + TICK;
            }
            if events.is_empty() {
                self.settle_some(now);
            }
            for event in &events {
                match event.token() {
                    SIGNALS => {
                        if self.answer_signals(show).is_break() {
                            return Ok(());
                        }
                    }
                    LINKS => self.follow_links(),
                    EXAMINED => self.answer_examinations(),
                    token => self.server.note(token),
                }
            }
            self.serve(now);
            if self.handed_over {
                return Ok(());
            }
        }
    }

    fn time_to_wait(&self, next_tick: Instant) -> Duration {
        if self.server.has_work() {
            return Duration::ZERO;
        }
        let deadline = self.server.deadline().map_or(next_tick, |due| due.min(next_tick));
        let wait = deadline.saturating_duration_since(Instant::now());
        self.unsettled.wait(Instant::now()).map_or(wait, |until| wait.min(until))
    }

    fn answer_signals(&mut self, show: &mut impl FnMut(&str)) -> ControlFlow<()> {
        while let Ok(Some(signal)) = self.signals.read_signal() {
            match Signal::try_from(signal.ssi_signo.cast_signed()) {
                Ok(Signal::SIGUSR1) => show(&self.report()),
                Ok(Signal::SIGHUP) => self.reload_by_signal(),
                _ => {
                    info!("stopping");
                    return ControlFlow::Break(());
                }
            }
        }
        ControlFlow::Continue(())
    }

    /// Answers callers, each in turn and no more than a few.
    fn serve(&mut self, now: Instant) {
        for _ in 0..CALLS_PER_TURN {
            match self.server.next_call(now) {
                Some(Served::Wish(client, wish)) => self.answer(client, wish, now),
                Some(Served::Here) => {}
                None => break,
            }
        }
        while let Some((client, wish)) = self.server.next_due(now) {
            self.answer(client, wish, now);
        }
    }

    /// Tells whoever listens, and the log.
    fn tell(&mut self, kind: EventKind, device: Option<&str>, text: String) {
        match kind {
            EventKind::Seal | EventKind::Overload | EventKind::Worker => warn!("{text}"),
            _ => info!("{text}"),
        }
        let device = device.map(str::to_owned);
        self.server.tell(&Event { time: wall_clock(), kind, device, text });
    }

    fn report(&mut self) -> String {
        let report = self.counters();
        match self.config.log_format {
            LogFormat::Text => report.to_text(false),
            LogFormat::Json => report.to_json() + "\n",
        }
    }
}

/// Listens on the sockets of the configuration.
fn listen(
    config: &Config,
    poll: &Poll,
    mut inherited: HashMap<String, OwnedFd>,
    closing: bool,
) -> Result<Server, StartError> {
    let mut listeners = Vec::new();
    if let Some(path) = config.control.path() {
        match once_free(closing, || Ok(bind_control(path, &mut inherited)?)) {
            Ok(listener) => listeners.push(listener),
            // Nobody asked for it: the switch can do without.
            Err(error) if !config.control_is_given() => {
                warn!("no control socket: {error}");
            }
            Err(error) => return Err(error),
        }
    }
    let metrics = once_free(closing, || {
        Ok(match &config.metrics {
            Metrics::Off => None,
            Metrics::Tcp(address) => Some(bind_metrics_tcp(*address, &mut inherited)?),
            Metrics::Unix(path) => Some(bind_metrics_unix(path, &mut inherited)?),
        })
    })?;
    listeners.extend(metrics);
    Ok(Server::new(listeners, poll.registry(), SERVER)?)
}

/// Tries again for a while if a service manager may be about to close what is in the way.
fn once_free<T>(
    closing: bool,
    mut action: impl FnMut() -> Result<T, StartError>,
) -> Result<T, StartError> {
    let deadline = Instant::now() + CLOSING_PATIENCE;
    loop {
        match action() {
            Err(StartError::UplinkTaken(_) | StartError::Socket(_))
                if closing && Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

/// Whether a descriptor is what [`claim_uplink`] makes.
fn is_claim(claim: &OwnedFd, uplink: &str) -> bool {
    let address = getsockname::<UnixAddr>(claim.as_raw_fd()).ok();
    let name = address.as_ref().and_then(UnixAddr::as_abstract);
    name.is_some_and(|name| name == claim_name(uplink).as_bytes())
}

fn claim_name(uplink: &str) -> String {
    format!("vlanswitchd/{uplink}")
}

/// Keeps a second vlanswitchd off the uplink: each frame would arrive twice. The
/// name is one of this network namespace, like the uplink's, and goes with us.
fn claim_uplink(uplink: &str) -> Result<UnixListener, StartError> {
    let address = SocketAddr::from_abstract_name(claim_name(uplink))?;
    UnixListener::bind_addr(&address).map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => StartError::UplinkTaken(uplink.to_owned()),
        _ => StartError::Control(error),
    })
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
