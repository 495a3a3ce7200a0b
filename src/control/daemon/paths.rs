//! Which path serves which port: the kernel path wherever it can, the packet path else.
//!
//! # Theory of operation
//!
//! A port on the kernel path has a guard on its device that sends its guest's frames to the
//! uplink, and entries in the dispatcher's array that send the uplink's to it; no socket and
//! no ring. If no port is on the packet path, the uplink has none either: a frame then meets
//! nothing of ours but the programs.
//!
//! A port moves to the packet path when its options ask for what programs cannot do, when
//! somebody captures its frames (the packet path sees them all, with the reasons of drops),
//! or when its guest sends what only the packet path can pass on; and back when that has
//! ended. While it moves, each frame is decided about once: the socket's filter decides, and
//! the program in transition does the opposite (`sys::bpf::path`). Frames that wait in the
//! ring when a port moves to the kernel path may be overtaken by those that come after.
//!
//! Tag pairs of one outer VLAN are on one path together, as the uplink's filter knows the
//! outer VLAN only.

mod express;
mod moves;
mod pins;

pub use pins::pin_folder;

use super::Daemon;
use super::ports::Port;
use crate::control::api::EventKind;
use crate::control::checks;
use crate::control::config::{Config, Datapath};
use crate::control::host::TCX_REMOVED;
use crate::control::links::LinkState;
use crate::control::mapping::PortConfig;
use crate::control::placement;
use crate::control::start_error::StartError;
use crate::dataplane::kernel::{self, KernelPath, KernelPathError, Target};
use crate::dataplane::{FlowSnapshot, Place};
use crate::switch::{Membership, PortIndex};
use pins::usable_pin_folder;
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Instant;
use tracing::{info, warn};

/// Ports whose seals are looked at in one second: a thousand take some.
const SEALS_AT_ONCE: usize = 200;
/// Why there is no kernel path when an operator has taken it away.
const DETACHED: &str = "detached by `vlanswitchctl detach`, until the next start";

/// The kernel path, as far as the configuration wants one and this kernel can. The second
/// part says why there is none.
///
/// # Errors
/// [`StartError`] if it must be that path.
pub fn open_kernel_path(config: &Config) -> Result<(Option<KernelPath>, String), StartError> {
    if config.datapath == Datapath::Packet {
        return Ok((None, "--datapath packet".to_owned()));
    }
    let place = usable_pin_folder(&config.uplink);
    match (KernelPath::open(place.as_deref()), config.datapath) {
        (Ok(path), _) => Ok((Some(path), String::new())),
        (Err(error), Datapath::Kernel) => Err(StartError::KernelPath(error)),
        (Err(error), _) => {
            warn!("the packet path serves all ports: no kernel path: {error}");
            Ok((None, format!("no kernel path: {error}")))
        }
    }
}

/// What a port's program has taken from the uplink: what became of it is the port's.
pub fn handed(to_guest: &FlowSnapshot) -> FlowSnapshot {
    FlowSnapshot {
        in_frames: to_guest.in_frames,
        in_bytes: to_guest.in_bytes,
        out_frames: to_guest.in_frames,
        out_bytes: to_guest.in_bytes,
        ..FlowSnapshot::default()
    }
}

fn target(link: &LinkState) -> Target {
    Target { index: link.index, mtu: link.mtu, is_up: link.up && link.carrier }
}

impl Daemon {
    /// Why each port is to be on the packet path, by position; `None` for the kernel path.
    /// `changed` are configurations that ports are about to have.
    fn reasons(&self, changed: &[(PortIndex, PortConfig)]) -> Vec<Option<String>> {
        let mut configs = self.ports.configs();
        for (position, config) in changed {
            if let Some(place) = configs.get_mut(*position) {
                *place = Some(config);
            }
        }
        let mut reasons: Vec<Option<String>> = Vec::with_capacity(configs.len());
        for (position, config) in configs.iter().enumerate() {
            let reason = match (&self.kernel, config) {
                (None, _) => Some(self.why_packet.clone()),
                (Some(_), Some(_)) if self.is_detached => Some(DETACHED.to_owned()),
                (Some(_), None) => None,
                (Some(_), Some(config)) => checks::kernel_inability(config).map(str::to_owned),
            };
            let port = self.ports.get(position);
            let unable = port.is_some_and(|port| port.unable).then(|| {
                "its guest sends super-frames behind tags the kernel cannot segment".to_owned()
            });
            let captured = self.is_captured(position).then(|| "it is being captured".to_owned());
            reasons.push(reason.or(unable).or(captured));
        }
        let memberships: Vec<Option<&Membership>> =
            configs.iter().map(|config| config.map(|config| &config.membership)).collect();
        let groups = placement::groups(&[&memberships]);
        let mut of_group: HashMap<PortIndex, String> = HashMap::new();
        for (group, reason) in groups.iter().zip(&reasons) {
            if let Some(reason) = reason {
                of_group.entry(*group).or_insert_with(|| reason.clone());
            }
        }
        for (group, reason) in groups.iter().zip(&mut reasons) {
            if reason.is_none()
                && let Some(other) = of_group.get(group)
            {
                *reason = Some(format!("another port of its outer VLAN: {other}"));
            }
        }
        reasons
    }

    /// Gives ports that have no device yet their path.
    pub(super) fn choose_paths(&mut self, positions: &[PortIndex]) {
        let mut reasons = self.reasons(&[]);
        for position in positions {
            let reason = reasons.get_mut(*position).and_then(Option::take);
            let Some(port) = self.ports.get_mut(*position) else { continue };
            port.in_kernel = false;
            let Some(kernel) = self.kernel.as_ref().filter(|_| reason.is_none()) else {
                port.why_packet = reason.unwrap_or_default();
                continue;
            };
            let config = &port.config;
            match kernel.port(port.number, &config.device) {
                Ok(path) => {
                    port.path = Some(path);
                    port.in_kernel = true;
                    port.why_packet.clear();
                }
                Err(error) => {
                    warn!("{}: on the packet path: {error}", config.device);
                    port.why_packet = error.to_string();
                    port.unable = true;
                }
            }
        }
    }

    /// Makes the program that is to guard the device of a port on the kernel path.
    pub(super) fn set_guard(&mut self, position: PortIndex, index: u32) -> Result<(), StartError> {
        if let Some(program) = self.guest_program(position, false)? {
            self.host.set_guard(index, program)?;
        }
        Ok(())
    }

    fn guest_program(
        &self,
        position: PortIndex,
        in_transition: bool,
    ) -> Result<Option<OwnedFd>, KernelPathError> {
        let port = self.ports.get(position);
        let path = port.and_then(|port| Some((port, port.path.as_ref()?)));
        let (Some(kernel), Some((port, path))) = (&self.kernel, path) else { return Ok(None) };
        if !port.in_kernel && !in_transition {
            return Ok(None);
        }
        let name = crate::control::host::SEAL_NAME;
        kernel
            .guest_program(name, path, &port.config.membership, &port.config.police, in_transition)
            .map(Some)
    }

    /// Whether this port has no socket: programs serve it.
    pub(super) fn is_in_kernel(&self, position: PortIndex) -> bool {
        self.ports.get(position).is_some_and(|port| port.in_kernel)
    }

    /// Leads the frames of a port's VLANs to where it is now.
    pub(super) fn lead(&mut self, position: PortIndex) {
        let index = self.ports.get(position).and_then(Port::index);
        let link = index.and_then(|index| self.monitor.links().by_index(index)).cloned();
        self.lead_to(position, link.as_ref());
    }

    /// The same, to a device that may be newer than what netlink has told.
    pub(super) fn lead_to(&mut self, position: PortIndex, link: Option<&LinkState>) {
        if let Err(error) = self.try_to_lead(position, link, false) {
            let port = self.ports.get(position);
            let name = port.map(|port| port.config.device.clone()).unwrap_or_default();
            warn!("{name}: the kernel path may not reach it: {error}");
        }
    }

    fn try_to_lead(
        &mut self,
        position: PortIndex,
        link: Option<&LinkState>,
        in_transition: bool,
    ) -> Result<(), KernelPathError> {
        let (Some(kernel), Some(port)) = (&mut self.kernel, self.ports.get_mut(position)) else {
            return Ok(());
        };
        if !port.in_kernel && !in_transition {
            return kernel.pass(port.number, &port.config.membership);
        }
        let Port { path: Some(path), config, .. } = port else { return Ok(()) };
        kernel.enter(path, &config.membership, link.map(target), in_transition)
    }

    /// Leads the VLANs that ports are about to have to where they are now, and has their
    /// guests' programs do as the new configuration says.
    pub(super) fn lead_changed(&mut self, changed: &[(PortIndex, PortConfig)]) {
        for (position, config) in changed {
            if let Err(error) = self.try_to_change(*position, config) {
                warn!(
                    "{}: the kernel path may not have all of its options: {error}",
                    config.device
                );
            }
        }
        // Not before: what one of them lets go of another may have by now.
        let Some(kernel) = &mut self.kernel else { return };
        for (position, config) in changed {
            let number = self.ports.get(*position).map(|port| port.number);
            let released = number.map(|number| kernel.release(number, Some(&config.membership)));
            if let Some(Err(error)) = released {
                warn!(
                    "{}: the kernel path may have more of it than it should: {error}",
                    config.device
                );
            }
        }
    }

    fn try_to_change(
        &mut self,
        position: PortIndex,
        config: &PortConfig,
    ) -> Result<(), StartError> {
        let (Some(kernel), Some(port)) = (&mut self.kernel, self.ports.get_mut(position)) else {
            return Ok(());
        };
        let index = port.index();
        if !port.in_kernel {
            return Ok(kernel.pass(port.number, &config.membership)?);
        }
        let Some(path) = &mut port.path else { return Ok(()) };
        let name = crate::control::host::SEAL_NAME;
        let program =
            kernel.guest_program(name, path, &config.membership, &config.police, false)?;
        // It has the old options; it comes back when the port has the new ones.
        path.leave_express();
        if let Some(index) = index {
            self.host.replace_guard(index, Some(program))?;
        }
        let link = index.and_then(|index| self.monitor.links().by_index(index));
        Ok(kernel.enter(path, &config.membership, link.map(target), false)?)
    }

    /// Takes the port out of the kernel path for good.
    pub(super) fn leave_kernel_path(&mut self, port: &mut Port) {
        if let Some(Ok((_, to_guest))) = port.path.as_ref().map(kernel::PortPath::flows) {
            self.past.add(&handed(&to_guest));
        }
        let Some(kernel) = &mut self.kernel else { return };
        let mut left = kernel.release(port.number, None);
        if let Some(path) = &mut port.path {
            left = left.and(kernel.leave(path));
        }
        if let Err(error) = left {
            warn!("{}: some of it is still in the kernel path: {error}", port.config.device);
        }
    }

    /// The same for all ports.
    pub(super) fn lead_all(&mut self) {
        if self.kernel.is_none() {
            return;
        }
        let positions: Vec<PortIndex> = self.ports.iter().map(|(position, _)| position).collect();
        for position in positions {
            self.lead(position);
        }
    }

    /// Leads ports' VLANs elsewhere if their devices are not what they were.
    pub(super) fn follow_targets(&mut self) {
        let links = self.monitor.links();
        let changed = |port: &Port| {
            let now = port.index().and_then(|index| links.by_index(index)).map(target);
            port.in_kernel && port.path.as_ref().is_some_and(|path| path.target() != now)
        };
        let ports = self.ports.iter().filter(|(_, port)| changed(port));
        let positions: Vec<PortIndex> = ports.map(|(position, _)| position).collect();
        if positions.is_empty() {
            return;
        }
        // Once for all: it asks for all devices.
        self.count_queues();
        for position in positions {
            self.lead(position);
        }
        // What a new device has dropped before is not ours.
        self.count_queues();
    }

    /// Tells guests' programs where the uplink is.
    pub(super) fn follow_uplink(&mut self) {
        let Some(kernel) = &self.kernel else { return };
        let index = self.uplink.attached.as_ref().map(|(index, ..)| *index);
        let link = index.and_then(|index| self.monitor.links().by_index(index));
        if let Err(error) = kernel.set_uplink(link.map(target)) {
            warn!("uplink {}: {error}", self.name);
        }
    }

    /// Attaches the dispatcher to the uplink, if there is to be one; takes an earlier run's
    /// away, if there is not.
    pub(super) fn attach_dispatcher(&mut self, index: u32) -> Result<(), StartError> {
        match &mut self.kernel {
            Some(kernel) => kernel.attach(index, &self.uplink.filter)?,
            None if kernel::is_there(index) => {
                if kernel::remove_dispatcher(index).map_err(KernelPathError::from)? {
                    self.uncleared.push(index);
                }
                kernel::remove_pins(&pin_folder(&self.name));
            }
            None => {}
        }
        // Before programs are told of it: not every driver takes what XDP redirects.
        self.fit_all_express();
        self.follow_uplink();
        Ok(())
    }

    /// Puts the dispatcher back if somebody has taken it away. Returns what people should
    /// know.
    pub(super) fn keep_dispatcher(&mut self, index: u32, cause: &str) -> Option<String> {
        if self.kernel.is_none() || kernel::is_there(index) {
            return None;
        }
        let name = self.name.clone();
        Some(match self.attach_dispatcher(index) {
            Ok(()) => format!(
                "uplink {name}: {cause}, and with it the program that leads frames to guests: \
                 attached again, but what came in between has reached nobody; leave the tc \
                 ingress of the uplink alone"
            ),
            Err(error) => format!(
                "uplink {name}: {cause}, and the program that leads frames to guests cannot be \
                 put back: guests get nothing: {error}"
            ),
        })
    }

    /// Whether the uplink needs a socket: some port is on the packet path.
    pub(super) fn needs_uplink_ring(&self) -> bool {
        self.kernel.is_none() || self.ports.iter().any(|(_, port)| !port.in_kernel)
    }

    /// Opens the uplink's rings if a port needs them, and closes them if none does.
    pub(super) fn fit_uplink_ring(&mut self) -> Result<(), StartError> {
        let Some((index, counters, _)) = &self.uplink.attached else { return Ok(()) };
        match (counters.is_empty(), self.needs_uplink_ring()) {
            (true, true) => {
                let link = self.monitor.links().by_index(*index).cloned();
                let Some(link) = link else { return Ok(()) };
                let (fresh, devices) = self.open_uplink(&link)?;
                self.uplink.slots = devices.first().map_or(0, |device| device.position().1);
                if let Some((_, counters, _)) = &mut self.uplink.attached {
                    *counters = fresh;
                }
                self.attach_devices(Vec::new(), devices);
            }
            (false, false) => {
                self.take_back(None);
                self.uplink.slots = 0;
            }
            _ => {}
        }
        Ok(())
    }

    /// Brings ports to the path they are to be on: to the packet path first, as what is to
    /// follow may need it. `changed` are configurations ports are about to have.
    ///
    /// # Errors
    /// [`StartError`] of a port that cannot get to the packet path: it stays.
    pub(super) fn demote_for(
        &mut self,
        changed: &[(PortIndex, PortConfig)],
    ) -> Result<(), StartError> {
        let reasons = self.reasons(changed);
        let positions: Vec<(PortIndex, String)> = self
            .ports
            .iter()
            .filter(|(_, port)| port.in_kernel)
            .filter_map(|(position, _)| Some((position, reasons.get(position)?.clone()?)))
            .collect();
        if positions.is_empty() { Ok(()) } else { self.demote(&positions) }
    }

    /// Brings every port to the path it is to be on.
    pub(super) fn settle_paths(&mut self) {
        if self.kernel.is_none() {
            return;
        }
        if let Err(error) = self.demote_for(&[]) {
            warn!("ports that the kernel path cannot serve stay there: {error}");
        }
        let reasons = self.reasons(&[]);
        let able: Vec<PortIndex> = self
            .ports
            .iter()
            .filter(|(position, port)| {
                !port.in_kernel && reasons.get(*position).is_some_and(Option::is_none)
            })
            .map(|(position, _)| position)
            .collect();
        for (position, port) in self.ports.iter_mut() {
            if let Some(Some(reason)) = reasons.get(position) {
                port.why_packet.clone_from(reason);
            }
        }
        if !able.is_empty() {
            self.promote(&able);
        }
    }

    /// Looks after the kernel path; to be called once a second.
    pub(super) fn look_at_paths(&mut self) {
        self.look_for_unable();
        self.settle_paths();
        self.fit_all_express();
        // A program detached from TCX makes no notification.
        let index = self.uplink.attached.as_ref().map(|(index, ..)| *index);
        if let Some(text) = index.and_then(|index| self.keep_dispatcher(index, TCX_REMOVED)) {
            self.tell(EventKind::Seal, Some(&self.name.clone()), text);
        }
        self.watch_seals();
    }

    /// Looks whether the seals of ports are there, of some at a time.
    fn watch_seals(&mut self) {
        // By position, which the order people see is not.
        let positions = self.seals_seen..self.ports.places();
        let due = positions.filter_map(|position| {
            let port = self.ports.get(position)?;
            let index = port.index()?;
            // Where it stands until it is settled, its going is notified.
            let is_settled = !self.unsettled.contains(index);
            is_settled.then(|| (position, index, port.config.device.clone()))
        });
        let due: Vec<_> = due.take(SEALS_AT_ONCE).collect();
        // Less than that many: the end is reached.
        let last = due.last().filter(|_| due.len() == SEALS_AT_ONCE);
        self.seals_seen = last.map_or(0, |(position, ..)| position + 1);
        for (_, index, name) in due {
            if let Some(text) = self.host.look_at_seal(&name, index) {
                self.tell(EventKind::Seal, Some(&name), text);
            }
        }
    }

    /// Looks for guests that send what only the packet path can pass on.
    fn look_for_unable(&mut self) {
        for (_, port) in self.ports.iter_mut().filter(|(_, port)| port.in_kernel) {
            let unable = port.path.as_mut().map(|path| path.take_unable());
            if matches!(unable, Some(Ok(true))) {
                port.unable = true;
            }
        }
    }

    fn tell_path(&mut self, position: PortIndex, what: &str) {
        let Some(port) = self.ports.get(position) else { return };
        let name = port.config.device.clone();
        self.tell(EventKind::Link, Some(&name), format!("{name}: {what}"));
    }

    /// Has the uplink's filter let in what ports on the packet path have, and nothing else.
    pub(super) fn claim_for_packet_path(&mut self) {
        let now = self.packet_claims();
        let before = std::mem::replace(&mut self.claims, now);
        self.claim(&before, &self.claims, false);
        self.claim(&self.claims, &before, true);
    }

    /// Asks what devices have dropped behind the kernel path's programs.
    pub(super) fn count_queues(&mut self) {
        self.count_queues_of(|_| true);
    }

    /// The same of some ports' devices.
    pub(super) fn count_queues_of(&mut self, is_due: impl Fn(&Port) -> bool) {
        let now = Instant::now();
        let indexes: Vec<u32> = self
            .ports
            .iter_mut()
            .filter(|(_, port)| port.in_kernel && is_due(port))
            .filter_map(|(_, port)| port.path.as_mut()?.to_be_asked(now))
            .collect();
        if indexes.is_empty() {
            return;
        }
        let dropped = self.host.dropped(&indexes);
        for (_, port) in self.ports.iter_mut().filter(|(_, port)| port.in_kernel) {
            let Some(path) = &mut port.path else { continue };
            if let Some(count) = path.target().and_then(|target| dropped.get(&target.index)) {
                path.note_dropped(*count);
            }
        }
    }

    /// Removes what an earlier run has left of ports that are no more.
    pub(super) fn forget_the_gone(&mut self) {
        let Some(kernel) = &mut self.kernel else { return };
        let names: std::collections::HashSet<String> =
            self.ports.iter().map(|(_, port)| port.config.device.clone()).collect();
        let in_kernel = self.ports.iter().filter(|(_, port)| port.in_kernel);
        let in_kernel: std::collections::HashSet<String> =
            in_kernel.map(|(_, port)| port.config.device.clone()).collect();
        let memberships = self.ports.iter().map(|(_, port)| &port.config.membership);
        let (is_port, has_part) =
            (|name: &str| names.contains(name), |name: &str| in_kernel.contains(name));
        match kernel.remove_stale(memberships, is_port, has_part) {
            Ok(left) => {
                for name in left {
                    if let Some(link) = self.monitor.links().by_name(&name) {
                        info!("{name}: no port any more: sealed");
                        self.host.seal_again(&name, link.index);
                    }
                }
            }
            Err(error) => warn!("what an earlier run has left may still be there: {error}"),
        }
    }

    /// What moves frames, in a word or two.
    pub(super) fn datapath(&self) -> &'static str {
        let in_kernel = self.ports.iter().filter(|(_, port)| port.in_kernel).count();
        match in_kernel {
            0 if self.kernel.is_none() || self.ports.len() > 0 => "packet",
            number if number == self.ports.len() => "kernel",
            _ => "kernel and packet",
        }
    }

    /// Whether somebody looks at this port's frames.
    fn is_captured(&self, position: PortIndex) -> bool {
        self.captured_places().any(|place| match place {
            Place::Everywhere | Place::Uplink => true,
            Place::Port(other) => other == position,
        })
    }

    /// Takes the kernel path off the uplink and the ports: who serves them next finds none
    /// of it. What guests send is dropped from then on, by the kernel path.
    pub(super) fn take_kernel_path_away(&mut self) {
        if self.kernel.is_none() {
            return;
        }
        let uplink = self.uplink.attached.as_ref().map(|(index, ..)| *index);
        match self.kernel.as_ref().map(KernelPath::unmapped) {
            Some(Ok(unmapped)) => self.past.add(&unmapped),
            Some(Err(error)) => warn!("{error}"),
            None => {}
        }
        for path in self.ports.iter_mut().filter_map(|(_, port)| port.path.as_mut()) {
            path.leave_express();
        }
        let place = self.kernel.take().and_then(|kernel| kernel.place().map(Path::to_owned));
        if let Some(uplink) = uplink {
            self.take_dispatcher_away(uplink);
        }
        if let Some(place) = place {
            kernel::remove_pins(&place);
        }
        let indexes: Vec<u32> = self.ports.iter().filter_map(|(_, port)| port.index()).collect();
        for index in indexes {
            if let Err(error) = self.host.replace_guard(index, None)
                && !error.is_device_gone()
            {
                warn!("{error}");
            }
        }
    }

    /// Takes the dispatcher off the uplink. A qdisc that is left is removed when the uplink is
    /// given back: others may be sending.
    fn take_dispatcher_away(&mut self, uplink: u32) {
        match kernel::remove_dispatcher(uplink) {
            Ok(true) => self.uncleared.push(uplink),
            Ok(false) => {}
            Err(error) => warn!("the kernel path may still be there: {error}"),
        }
    }

    /// Has the packet path serve all ports from now on, and takes the kernel path away.
    /// Returns what the operator should know.
    ///
    /// # Errors
    /// [`StartError`] of a port that cannot get to the packet path: nothing was changed.
    pub(super) fn detach_kernel_path(&mut self) -> Result<Vec<String>, StartError> {
        if self.kernel.is_none() {
            return Ok(vec![format!("there is no kernel path: {}", self.why_packet)]);
        }
        self.is_detached = true;
        if let Err(error) = self.demote_for(&[]) {
            self.is_detached = false;
            return Err(error);
        }
        self.take_kernel_path_away();
        self.count_by_filter();
        DETACHED.clone_into(&mut self.why_packet);
        let text = format!("uplink {}: the packet path serves all ports: {DETACHED}", self.name);
        self.tell(EventKind::Config, None, text);
        Ok(Vec::new())
    }

    /// Has the uplink's filter count what nobody claims, as no dispatcher does any more.
    fn count_by_filter(&mut self) {
        let Some((_, counters, _)) = &self.uplink.attached else { return };
        let counting = self.uplink.filter.count_unclaimed().and_then(|()| {
            counters.iter().try_for_each(|counter| self.uplink.filter.attach(counter.socket()))
        });
        if let Err(error) = counting {
            warn!("uplink {}: VLANs nobody mapped are not counted: {error}", self.name);
        }
    }

    /// Whether something goes on forwarding when this process has ended.
    pub(super) fn outlives_us(&self) -> bool {
        self.kernel.as_ref().is_some_and(|kernel| kernel.place().is_some())
            && self.ports.iter().any(|(_, port)| port.in_kernel)
    }
}
