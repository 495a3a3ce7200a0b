//! What callers of the control socket ask, answered.

use super::Daemon;
use super::change::ChangeError;
use super::paths::handed;
use super::ports::Port;
use super::watch::{WatchedDrops, wall_clock};
use crate::control::api::{
    self, Change, ConfigReply, Drop, DropsReply, NotesReply, PortReply, PortsReply, Request, Sent,
    Stats, StatsReply, Status, StatusReply, Unmapped,
};
use crate::control::checks;
use crate::control::config::persist;
use crate::control::config::show;
use crate::control::mapping::{self, Origin, PortConfig};
use crate::control::report::{Report, port_state, unmapped};
use crate::control::server::{ClientId, Refusal, Wish};
use crate::dataplane::FlowSnapshot;
use crate::dataplane::kernel::KernelPath;
use crate::switch::DropReason;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;
use tracing::warn;

impl From<ChangeError> for Refusal {
    fn from(error: ChangeError) -> Self {
        if error.is_configuration() { Self::refused(error) } else { Self::failed(error) }
    }
}

impl Daemon {
    /// Answers one wish of a client.
    pub(super) fn answer(&mut self, client: ClientId, wish: Wish, now: Instant) {
        match wish {
            Wish::Call { request, more } => {
                if let Err(refusal) = self.perform(client, request, more, now) {
                    self.server.refuse(client, &refusal);
                }
            }
            Wish::NextStats => {
                let stats = self.stats();
                self.server.reply(client, &StatsReply { stats });
            }
            Wish::Metrics => {
                let began = Instant::now();
                if let Some(text) = self.scraped.text(began) {
                    self.server.metrics(client, text);
                } else {
                    let text = crate::control::metrics::render(&self.status(), &self.stats());
                    let text = self.scraped.keep(text, began, Instant::now());
                    self.server.metrics(client, text);
                }
            }
        }
    }

    fn perform(
        &mut self,
        client: ClientId,
        request: Request,
        more: bool,
        now: Instant,
    ) -> Result<(), Refusal> {
        match request {
            Request::GetStatus {} => {
                let status = self.status();
                self.server.reply(client, &StatusReply { status });
            }
            Request::ListPorts {} => {
                let ports = self.all_ports();
                self.server.reply(client, &PortsReply { ports });
            }
            Request::GetPort { name } => {
                let port = self.port_called(&name)?;
                self.server.reply(client, &PortReply { port, notes: None });
            }
            Request::AddPort { map, persist } => {
                let reply = self.add_port(&map, persist.unwrap_or(false))?;
                self.server.reply(client, &reply);
            }
            Request::MovePort { name, worker } => {
                let reply = self.move_port(&name, worker)?;
                self.server.reply(client, &reply);
            }
            Request::RemovePort { name, persist } => {
                let notes = self.remove_port(&name, persist.unwrap_or(false))?;
                self.server.reply(client, &NotesReply { notes });
            }
            Request::SetPort { name, changes, persist } => {
                let reply = self.set_port(&name, changes, persist.unwrap_or(false))?;
                self.server.reply(client, &reply);
            }
            Request::GetStats { interval } => {
                if more {
                    self.server.stream_stats(client, interval, now);
                }
                let stats = self.stats();
                self.server.reply(client, &StatsReply { stats });
            }
            Request::ListDrops {} => {
                let drops = self.drops();
                self.server.reply(client, &DropsReply { drops });
            }
            Request::Monitor {} if more => self.server.stream_events(client),
            Request::Capture(wanted) if more => self.start_capture(client, &wanted)?,
            Request::Monitor {} | Request::Capture(_) => return Err(Refusal::expected_more()),
            Request::GetConfig {} => {
                let toml = show::to_toml(&self.config);
                self.server.reply(client, &ConfigReply { toml });
            }
            Request::ReloadConfig { dry_run } => {
                let reply = self.reload(dry_run.unwrap_or(false))?;
                self.server.reply(client, &reply);
            }
            Request::Detach {} => {
                let notes = self.detach_kernel_path().map_err(Refusal::failed)?;
                self.server.reply(client, &NotesReply { notes });
            }
            Request::HandOver { format, uplink } => self.hand_over(client, format, &uplink)?,
            Request::Examine {} => self.examine(client)?,
        }
        Ok(())
    }

    fn add_port(&mut self, map: &str, persist: bool) -> Result<PortReply, Refusal> {
        let config = mapping::parse(map, self.config.tpid).map_err(Refusal::refused)?;
        let mut ports = self.config.ports.clone();
        ports.push(config.clone());
        let file = self.file_to_write(persist, persist::Change::Add(&config))?;
        let mut notes = self.take_ports(ports)?;
        notes.extend(self.write_down(file, persist::Change::Add(&config)));
        if let Some(link) = self.monitor.links().by_name(&config.device).cloned() {
            notes.extend(self.host.notes_about(&config, &link));
        }
        Ok(PortReply { port: self.port_called(&config.device)?, notes: Some(notes) })
    }

    fn remove_port(&mut self, name: &str, persist: bool) -> Result<Vec<String>, Refusal> {
        let name = self.configured(name)?.device.clone();
        let mut ports = self.config.ports.clone();
        ports.retain(|port| port.device != name);
        let file = self.file_to_write(persist, persist::Change::Remove(&name))?;
        let mut notes = self.take_ports(ports)?;
        notes.extend(self.write_down(file, persist::Change::Remove(&name)));
        Ok(notes)
    }

    fn set_port(
        &mut self,
        name: &str,
        changes: Vec<Change>,
        persist: bool,
    ) -> Result<PortReply, Refusal> {
        let old = self.configured(name)?;
        let changes: Vec<(String, String)> =
            changes.into_iter().map(|change| (change.key, change.value)).collect();
        let mut config = old.with_changes(&changes, self.config.tpid).map_err(Refusal::refused)?;
        if matches!(config.origin, Origin::Control(_)) {
            config.origin = Origin::Control(config.to_map(self.config.tpid));
        }
        let mut ports = self.config.ports.clone();
        if let Some(place) = ports.iter_mut().find(|port| port.device == config.device) {
            *place = config.clone();
        }
        let file = self.file_to_write(persist, persist::Change::Set(&config))?;
        let mut notes = self.take_ports(ports)?;
        notes.extend(self.write_down(file, persist::Change::Set(&config)));
        Ok(PortReply { port: self.port_called(&config.device)?, notes: Some(notes) })
    }

    fn take_ports(&mut self, ports: Vec<PortConfig>) -> Result<Vec<String>, Refusal> {
        let new = self.config.with_ports(ports).map_err(Refusal::refused)?;
        Ok(self.become_config(new)?)
    }

    /// The file a change is to be written to, if it is; refuses before anything was
    /// changed if it could not be.
    fn file_to_write(
        &self,
        persist: bool,
        change: persist::Change<'_>,
    ) -> Result<Option<PathBuf>, Refusal> {
        if !persist {
            return Ok(None);
        }
        let Some(file) = &self.config.file else {
            return Err(Refusal::refused(
                "there is no configuration file to write to: start vlanswitchd with --config FILE, \
                 or make the change without --persist",
            ));
        };
        let text = std::fs::read_to_string(file)
            .map_err(|error| Refusal::refused(format!("{}: {error}", file.display())))?;
        persist::edit(file, &text, change, self.config.tpid).map_err(Refusal::refused)?;
        Ok(Some(file.clone()))
    }

    /// Writes a change that has been made to the file. Returns what went wrong.
    fn write_down(&self, file: Option<PathBuf>, change: persist::Change<'_>) -> Option<String> {
        let error = persist::persist(&file?, change, self.config.tpid, false).err()?;
        let note = format!("the change is in force, but not written down: {error}");
        warn!("{note}");
        Some(note)
    }

    fn configured(&self, name: &str) -> Result<&PortConfig, Refusal> {
        let name = name.strip_prefix("internal:").unwrap_or(name);
        match self.ports.by_device(name) {
            Some((_, port)) => Ok(&port.config),
            None => Err(Refusal::no_such_port(name)),
        }
    }

    pub(super) fn port_called(&mut self, name: &str) -> Result<api::Port, Refusal> {
        self.count_overruns();
        let name = name.strip_prefix("internal:").unwrap_or(name);
        match self.ports.by_device(name) {
            Some((_, port)) => Ok(self.show_port(port)),
            None => Err(Refusal::no_such_port(name)),
        }
    }

    fn all_ports(&mut self) -> Vec<api::Port> {
        self.count_overruns();
        self.ports.iter().map(|(_, port)| self.show_port(port)).collect()
    }

    fn show_port(&self, port: &Port) -> api::Port {
        let Port { config, shared, watched, in_kernel, .. } = port;
        let (from_guest, to_guest) = port.flows();
        let link = port.index().and_then(|index| self.monitor.links().by_index(index));
        let options = config.options(self.config.tpid).into_iter();
        api::Port {
            name: config.device.clone(),
            vlans: config.membership.vlans().to_string(),
            mode: config.membership.mode().name().to_owned(),
            map: config.to_map(self.config.tpid),
            options: options.map(|(key, value)| (key.to_owned(), value)).collect(),
            state: port_state(shared.link.state()).to_owned(),
            since: watched.since,
            ifindex: port.index(),
            mtu: link.map(|link| link.mtu),
            datapath: if *in_kernel { "kernel" } else { "packet" }.to_owned(),
            datapath_reason: self.datapath_reason(port),
            worker: (!in_kernel).then_some(port.worker as u32),
            ring_peak: watched.ring_peak,
            from_guest: from_guest.into(),
            to_guest: to_guest.into(),
        }
    }

    fn show_uplink(&self, ports: &[api::Port]) -> api::Uplink {
        let index = self.uplink.attached.as_ref().map(|(index, ..)| *index);
        let link = index.and_then(|index| self.monitor.links().by_index(index));
        let removed = self.retired.as_ref().map(|removed| &removed.from_guest);
        let sent = |of: fn(&api::Flow) -> u64| {
            ports.iter().map(|port| &port.from_guest).chain(removed).map(of).sum()
        };
        let (frames, bytes): (u64, u64) =
            (sent(|flow| flow.out_frames), sent(|flow| flow.out_bytes));
        api::Uplink {
            name: self.name.clone(),
            state: self.workers.uplink_state().name().to_owned(),
            since: self.uplink.watched.since,
            ifindex: index,
            mtu: link.map(|link| link.mtu),
            mtu_needed: checks::required_mtu(&self.config.ports),
            ring_peak: self.uplink.watched.ring_peak,
            from_wire: self.uplink_flow().into(),
            to_wire: Sent { out_frames: frames, out_bytes: bytes },
            unsent: self.uplink.unsent.frames(),
        }
    }

    /// What came from the wire, whoever served it.
    pub(super) fn uplink_flow(&self) -> FlowSnapshot {
        let now = Instant::now();
        self.uplink_flow_since(|_| Some(now))
    }

    /// The same, of each port as it was at some moment since `earliest`, or at any.
    pub(super) fn uplink_flow_since(
        &self,
        earliest: impl Fn(&Port) -> Option<Instant>,
    ) -> FlowSnapshot {
        let mut flow = self.workers.uplink_flow();
        flow.add(&self.past);
        for (_, port) in self.ports.iter() {
            let flows = port.path.as_ref().map(|path| path.flows_since(earliest(port)));
            if let Some(Ok((_, to_guest))) = flows {
                flow.add(&handed(&to_guest));
            }
        }
        match self.kernel.as_ref().map(KernelPath::unmapped) {
            Some(Ok(unmapped)) => flow.add(&unmapped),
            Some(Err(error)) => warn!("{error}"),
            None => {}
        }
        flow
    }

    fn unmapped(&self) -> Vec<Unmapped> {
        match self.uplink.filter.seen() {
            Ok(rows) => rows.map(unmapped).collect(),
            Err(error) => {
                warn!("{error}");
                Vec::new()
            }
        }
    }

    fn workers(&self) -> Vec<api::Worker> {
        let seats = self.workers.iter().enumerate();
        let shown = seats.map(|(number, seat)| api::Worker {
            load: seat.watched.load,
            stuck: seat.heartbeat.is_stuck(),
            ports: self.ports.iter().filter(|(_, port)| port.worker == number).count() as u64,
            cpu: seat.cpu.map(|cpu| cpu as u32),
        });
        shown.collect()
    }

    /// All counters.
    pub(super) fn stats(&mut self) -> Stats {
        let ports = self.all_ports();
        self.count_unsent();
        Stats {
            time: wall_clock(),
            uplink: self.show_uplink(&ports),
            ports,
            removed: self.retired.clone(),
            unmapped: self.unmapped(),
            workers: self.workers(),
        }
    }

    /// All counters, as printed.
    pub(super) fn counters(&mut self) -> Report {
        self.stats().into()
    }

    pub(super) fn status(&self) -> Status {
        let mut ports = BTreeMap::new();
        for (_, port) in self.ports.iter() {
            *ports.entry(port_state(port.shared.link.state()).to_owned()).or_default() += 1;
        }
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            started: self.started,
            uplink: self.name.clone(),
            uplink_state: self.workers.uplink_state().name().to_owned(),
            datapath: self.datapath().to_owned(),
            datapath_reason: self.kernel.is_none().then(|| self.why_packet.clone()),
            ports,
            workers: self.workers(),
            config_file: self.config.file.as_ref().map(|file| file.display().to_string()),
            clients: self.server.clients() as u64,
            captures: self.captures.running() as u64,
            kernel_segments_tagged: self.abilities.segments.tagged_gso,
            kernel_segments_udp: self.abilities.segments.udp_gso,
            fallbacks: self.abilities.fallbacks(),
            netlink_overruns: self.monitor.overruns(),
        }
    }

    fn drops(&mut self) -> Vec<Drop> {
        self.count_overruns();
        let mut drops = Vec::new();
        for (_, port) in self.ports.iter() {
            let watched = &port.watched;
            let name = &port.config.device;
            let (from_guest, to_guest) = port.flows();
            drops.extend(drops_of(name, "from_guest", &from_guest, &watched.incoming));
            drops.extend(drops_of(name, "to_guest", &to_guest, &watched.outgoing));
        }
        let from_wire = self.uplink_flow();
        drops.extend(drops_of(&self.name, "from_wire", &from_wire, &self.uplink.watched.incoming));
        drops
    }
}

fn drops_of<'d>(
    device: &'d str,
    name: &'d str,
    flow: &FlowSnapshot,
    watched: &'d WatchedDrops,
) -> impl Iterator<Item = Drop> + use<'d> {
    let now = wall_clock();
    let reasons: Vec<(DropReason, u64)> = flow.reasons().collect();
    reasons.into_iter().map(move |(reason, frames)| Drop {
        device: device.to_owned(),
        flow: name.to_owned(),
        reason: reason.name().to_owned(),
        frames,
        last_seen: watched.last_seen(reason, frames, now),
        help: reason.help().to_owned(),
    })
}
