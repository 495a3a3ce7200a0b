//! Becoming another configuration while forwarding.
//!
//! All or nothing: what is new is checked, made ready and opened first, and undone if
//! any of it fails. Then the worker drains what is to go, and takes the new table, all
//! between two bursts, so a VLAN that moves from one port to another has exactly one of
//! them at any time. VLANs are let go of before and claimed after that, so that no frame
//! meets a table without a place for it. Last, what went is given back. Ports that stay
//! are not touched.

use super::Daemon;
use super::devices::{Opened, close_opened};
use super::ports::{Leaving, Port};
use crate::control::api::{EventKind, ReloadReply};
use crate::control::checks;
use crate::control::config::{Config, ConfigErrors, diff};
use crate::control::mapping::{DeviceKind, PortConfig};
use crate::control::placement::{Key, keys};
use crate::control::start_error::StartError;
use crate::dataplane::FlowSnapshot;
use crate::dataplane::kernel::PortPath;
use crate::frame::{Tpid, Vid};
use crate::switch::{Conflict, Membership, PortIndex, Table};
use sd_notify::NotifyState;
use std::collections::HashSet;
use std::sync::Arc;
use thiserror::Error;
use tracing::warn;

/// A change that was not made.
#[derive(Debug, Error)]
pub enum ChangeError {
    /// The new configuration makes no sense.
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    /// Settings differ that only a start can change.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"))]
    Fixed(Vec<diff::FixedSetting>),
    /// A port would become another kind of device.
    #[error(
        "{0}: an internal port and a device of the same name are different things: remove the \
         port, then add it anew"
    )]
    OtherKind(String),
    /// The host does not play along.
    #[error(transparent)]
    Start(#[from] StartError),
}

impl ChangeError {
    /// Whether what was asked for is at fault, not the attempt.
    pub fn is_configuration(&self) -> bool {
        match self {
            Self::Config(_) | Self::Fixed(_) | Self::OtherKind(_) => true,
            Self::Start(error) => error.is_configuration(),
        }
    }
}

/// What a change amounts to, by position where there is one.
#[derive(Debug, Default)]
struct Plan {
    added: Vec<PortConfig>,
    removed: Vec<PortIndex>,
    changed: Vec<(PortIndex, PortConfig)>,
}

/// What the uplink's filter lets in for a table.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Claims {
    tagged: HashSet<(Tpid, Vid)>,
    untagged: bool,
}

impl Claims {
    /// What ports with these memberships claim.
    pub fn of_ports<'m>(memberships: impl Iterator<Item = &'m Membership>) -> Self {
        let mut claims = Self::default();
        for key in memberships.flat_map(keys) {
            match key {
                Key::Tagged(tpid, vid) => {
                    claims.tagged.insert((tpid, vid));
                }
                Key::Untagged => claims.untagged = true,
            }
        }
        claims
    }

    /// These and those.
    fn or(&self, other: &Self) -> Self {
        Self {
            tagged: self.tagged.union(&other.tagged).copied().collect(),
            untagged: self.untagged || other.untagged,
        }
    }
}

impl Daemon {
    /// Reads the configuration again as SIGHUP asks for.
    pub(super) fn reload_by_signal(&mut self) {
        // systemd has sent it (`Type=notify-reload`) and waits for both messages; if it
        // is not there, nobody is told.
        if let Ok(now) = NotifyState::monotonic_usec_now() {
            let _ = sd_notify::notify(&[NotifyState::Reloading, now]);
        }
        if let Err(error) = self.reload(false) {
            for line in error.to_string().lines() {
                warn!("not reloaded: {line}");
            }
        }
        let _ = sd_notify::notify(&[NotifyState::Ready]);
    }

    /// Reads the configuration again and becomes it, or only says what would change.
    ///
    /// # Errors
    /// [`ChangeError`]; nothing was changed.
    pub(super) fn reload(&mut self, dry_run: bool) -> Result<ReloadReply, ChangeError> {
        let new = self.config.reload()?;
        let fixed = diff::fixed_settings(&self.config, &new);
        if !fixed.is_empty() {
            return Err(ChangeError::Fixed(fixed));
        }
        let names = |ports: Vec<&PortConfig>| -> Vec<String> {
            ports.into_iter().map(|port| port.device.clone()).collect()
        };
        let diff = diff::ports(&self.config.ports, &new.ports);
        let mut reply = ReloadReply {
            changed: diff.changed.iter().map(|(_, new)| new.device.clone()).collect(),
            added: names(diff.added),
            removed: names(diff.removed),
            notes: Vec::new(),
        };
        if dry_run {
            self.plan(&new)?;
            return Ok(reply);
        }
        reply.notes = self.become_config(new)?;
        let text = format!(
            "configuration read again: {} ports added, {} removed, {} changed",
            reply.added.len(),
            reply.removed.len(),
            reply.changed.len()
        );
        self.tell(EventKind::Config, None, text);
        Ok(reply)
    }

    /// Becomes a configuration that differs in its ports. Returns what the operator
    /// should know.
    ///
    /// # Errors
    /// [`ChangeError`]; nothing was changed.
    pub(super) fn become_config(&mut self, new: Config) -> Result<Vec<String>, ChangeError> {
        let Plan { added, removed, changed } = self.plan(&new)?;
        self.demote_for(&changed)?;
        let positions = self.free_positions(added.len());
        for (position, config) in positions.iter().zip(&added) {
            self.ports.insert(*position, Port::new(config.clone()));
        }
        self.choose_paths(&positions);
        let created_before = self.created();
        let (opened, table) = match self.prepare(&positions, &removed, &changed) {
            Ok(prepared) => prepared,
            Err(error) => {
                self.close_ports(&positions, created_before);
                for position in positions {
                    self.ports.remove(position);
                }
                return Err(error.into());
            }
        };
        // From here on nothing can fail.
        for position in &positions {
            if let Some(port) = self.ports.get(*position) {
                self.workers.add(*position, port.worker, &port.shared);
            }
        }
        let after = self.claims_after(&removed, &changed);
        let before = std::mem::replace(&mut self.claims, after);
        // What goes to the kernel path is let go of when it is there.
        let led = self.led_after(&removed, &changed);
        self.claim(&before, &self.claims.or(&led), false);
        // One after the other in one go of the worker: what guests that go have sent
        // still goes by the old table, and nobody is without a port in between.
        let gone: Vec<_> = removed.iter().copied().map(Some).collect();
        self.ask_back(&gone);
        self.switch_tables(table);
        let departed = self.await_departures(&gone);
        let switched = self.await_switch();
        self.attach_ports(opened);
        self.claim(&self.claims, &before, true);
        self.lead_changed(&changed);
        self.claim(&before, &self.claims, false);
        self.name_interfaces();
        self.close(&gone, departed);
        let mut notes = self.retire(&removed, switched);
        let changed_positions: Vec<_> = changed.iter().map(|(position, _)| *position).collect();
        for (position, config) in changed {
            let text = format!("{}: now {}", config.device, config.to_map(new.tpid));
            let device = config.device.clone();
            if let Some(port) = self.ports.get_mut(position) {
                port.config = config;
            }
            self.tell(EventKind::PortChanged, Some(&device), text);
        }
        for config in &added {
            let text = format!("{}: added, {}", config.device, config.to_map(new.tpid));
            self.tell(EventKind::PortAdded, Some(&config.device), text);
        }
        let order = new.ports.iter().filter_map(|config| self.ports.by_device(&config.device));
        let order = order.map(|(position, _)| position).collect();
        self.ports.set_order(order);
        let need =
            |config: &Config| (checks::required_mtu(&config.ports), checks::target_mtu(config));
        let before = need(&self.config);
        self.config = new;
        if need(&self.config) != before {
            self.raise_uplink_mtu();
        }
        notes.extend(self.open_changed(&changed_positions));
        for position in positions.into_iter().chain(changed_positions) {
            self.lead(position);
        }
        self.settle_paths();
        self.fit_all_express();
        if let Err(error) = self.fit_uplink_ring() {
            notes.push(error.to_string());
        }
        // Carrier and state may have changed through what was set just now.
        self.follow_links();
        Ok(notes)
    }

    /// Opens what is new, makes the table, and brings the ports to the workers that are to
    /// have them.
    ///
    /// # Errors
    /// [`StartError`]; new devices are for the caller to give back.
    fn prepare(
        &mut self,
        added: &[PortIndex],
        removed: &[PortIndex],
        changed: &[(PortIndex, PortConfig)],
    ) -> Result<(Vec<Opened>, Table), StartError> {
        let opened = self.open_ports(added)?;
        let table = self.table_after(removed, changed).map_err(StartError::from);
        match table.and_then(|table| self.bring_together(added, changed).map(|()| table)) {
            Ok(table) => Ok((opened, table)),
            Err(error) => {
                close_opened(opened);
                Err(error)
            }
        }
    }

    /// The table that a change leads to.
    pub(super) fn table_after(
        &self,
        removed: &[PortIndex],
        changed: &[(PortIndex, PortConfig)],
    ) -> Result<Table, Conflict> {
        let mut configs = self.ports.configs();
        let changed = changed.iter().map(|(position, config)| (position, Some(config)));
        for (position, config) in changed.chain(removed.iter().map(|position| (position, None))) {
            if let Some(place) = configs.get_mut(*position) {
                *place = config;
            }
        }
        let memberships = configs.iter().map(|config| config.map(|one| &one.membership));
        let rules = configs.iter().map(|config| config.map(|one| &one.police));
        Table::compile(memberships).map(|table| table.with_police(rules))
    }

    /// Checks everything that can be checked without changing anything.
    fn plan(&mut self, new: &Config) -> Result<Plan, ChangeError> {
        self.follow_links();
        let diff = diff::ports(&self.config.ports, &new.ports);
        checks::file_limit(new.ports.len(), self.workers.len())?;
        checks::programs(new)?;
        let before = self.config.table.claims();
        let claims = new.table.claims().iter().filter(|claim| !before.contains(claim));
        let claims: Vec<_> = claims.copied().collect();
        checks::vlan_devices(new, &claims, self.monitor.links())?;
        for (old, new) in &diff.changed {
            if (old.kind == DeviceKind::Internal) != (new.kind == DeviceKind::Internal) {
                return Err(ChangeError::OtherKind(new.device.clone()));
            }
        }
        for config in diff.added.iter().chain(diff.changed.iter().map(|(_, new)| new)) {
            checks::port(config, self.monitor.links())?;
        }
        let position = |config: &PortConfig| self.ports.by_device(&config.device).map(|(at, _)| at);
        Ok(Plan {
            removed: diff.removed.iter().filter_map(|config| position(config)).collect(),
            changed: diff
                .changed
                .iter()
                .filter_map(|(_, new)| Some((position(new)?, (*new).clone())))
                .collect(),
            added: diff.added.into_iter().cloned().collect(),
        })
    }

    /// What ports on the packet path claim now.
    pub(super) fn packet_claims(&self) -> Claims {
        let ports = self.ports.iter().filter(|(_, port)| !port.in_kernel);
        Claims::of_ports(ports.map(|(_, port)| &port.config.membership))
    }

    /// What they will claim after a change.
    fn claims_after(&self, removed: &[PortIndex], changed: &[(PortIndex, PortConfig)]) -> Claims {
        Claims::of_ports(self.memberships_after(removed, changed, false))
    }

    /// What the kernel path will have after a change.
    fn led_after(&self, removed: &[PortIndex], changed: &[(PortIndex, PortConfig)]) -> Claims {
        Claims::of_ports(self.memberships_after(removed, changed, true))
    }

    fn memberships_after<'a>(
        &'a self,
        removed: &'a [PortIndex],
        changed: &'a [(PortIndex, PortConfig)],
        in_kernel: bool,
    ) -> impl Iterator<Item = &'a Membership> {
        let ports = self.ports.iter().filter(move |(position, port)| {
            port.in_kernel == in_kernel && !removed.contains(position)
        });
        ports.map(|(position, port)| {
            let new = changed.iter().find(|(other, _)| *other == position);
            new.map_or(&port.config.membership, |(_, config)| &config.membership)
        })
    }

    /// Claims what `of` has and `without` has not, or lets go of it.
    pub(super) fn claim(&self, of: &Claims, without: &Claims, claimed: bool) {
        let filter = &self.uplink.filter;
        let mut result = Ok(());
        for (tpid, vid) in of.tagged.difference(&without.tagged) {
            result = result.and(filter.claim(tpid.index(), vid.get(), claimed));
        }
        if of.untagged && !without.untagged {
            result = result.and(filter.claim_untagged(claimed));
        }
        if let Err(error) = result {
            warn!("uplink {}: {error}", self.name);
        }
    }

    /// Creates the taps of changed ports that are missing, now that the port may; says
    /// what else of the change has no effect on a device that exists.
    fn open_changed(&mut self, positions: &[PortIndex]) -> Vec<String> {
        let mut notes = Vec::new();
        for position in positions {
            let Some(port) = self.ports.get(*position) else { continue };
            let config = port.config.clone();
            if port.attached.is_none()
                && matches!(config.kind, DeviceKind::Netdev { create: Some(_) })
            {
                let created_before = self.created();
                match self.open_ports(&[*position]) {
                    Ok(opened) => self.attach_ports(opened),
                    Err(error) => {
                        self.close_ports(&[*position], created_before);
                        notes.push(error.to_string());
                    }
                }
            } else if let Some(link) = self.monitor.links().by_name(&config.device).cloned() {
                notes.extend(self.host.notes_about(&config, &link));
            }
        }
        notes
    }

    /// Positions for new ports. While somebody captures none is used again: what is
    /// still to be read of the port that was there would be taken for the new one's.
    fn free_positions(&self, count: usize) -> Vec<PortIndex> {
        if self.captures.running() == 0 {
            return self.ports.free_positions(count);
        }
        (self.ports.places()..).take(count).collect()
    }

    /// Takes ports out for good; `noticed` by all workers, or not yet. Returns what the
    /// operator should know.
    fn retire(&mut self, positions: &[PortIndex], noticed: bool) -> Vec<String> {
        let mut notes = Vec::new();
        // What devices have dropped is told as dropped.
        self.count_queues();
        for position in positions {
            self.stop_captures_of(*position);
            self.give_back(*position, None);
            let Some(mut port) = self.ports.remove(*position) else { continue };
            let mut leaving = Leaving::new(Arc::clone(&port.shared));
            self.add_retired(leaving.take());
            if !noticed {
                self.leaving.push(leaving);
            }
            if let Some(Ok(flows)) = port.path.as_ref().map(PortPath::flows) {
                self.add_retired(flows);
            }
            self.leave_kernel_path(&mut port);
            let internal = port.config.kind == DeviceKind::Internal;
            let name = port.config.device;
            if let Some(note) = self.left_behind(&name, internal) {
                notes.push(note);
            }
            self.tell(EventKind::PortRemoved, Some(&name), format!("{name}: removed"));
        }
        notes
    }

    fn add_retired(&mut self, (from_guest, to_guest): (FlowSnapshot, FlowSnapshot)) {
        let retired = self.retired.get_or_insert_default();
        retired.from_guest.add(from_guest.into());
        retired.to_guest.add(to_guest.into());
    }

    /// Adds what workers that were late to notice have counted of removed ports by now.
    pub(super) fn count_leaving(&mut self) {
        let mut leaving = std::mem::take(&mut self.leaving);
        for port in &mut leaving {
            self.add_retired(port.take());
        }
        leaving.retain(|port| !port.is_over());
        self.leaving = leaving;
    }

    /// What stays of a port that was removed.
    fn left_behind(&mut self, name: &str, internal: bool) -> Option<String> {
        if internal {
            self.forget_created(name);
            return Some(format!(
                "{name}: the tap stays, for whoever uses it: `ip link delete {name}` removes it"
            ));
        }
        let ours = self.forget_created(name)
            || self.monitor.links().by_name(name).is_some_and(crate::control::host::is_ours);
        ours.then(|| {
            format!(
                "{name}: the tap stays, sealed, as a VM may be attached to it: \
                 `ip link delete {name}` removes it"
            )
        })
    }
}
