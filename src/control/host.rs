//! Making a device fit to be a port, and giving it back as it was.
//!
//! A guest's frames must never reach the host's IP stack, so a port is *sealed*
//! before anything else: a program at tc ingress drops everything, behind
//! AF_PACKET, which still sees every frame. Then the host is kept quiet on the
//! device (no ARP, no IPv6), a tap gets an MTU that never limits what we send (its
//! guest does not see it) and no queueing discipline, so that a full guest queue is
//! told to us instead of dropping in silence; then it goes up. At start the seal is
//! attached the quick way, and moved when there is time; to a device that appears
//! later it is attached the lasting way at once (docs/adr/0002-seal-by-clsact.md).
//! If somebody takes it away, it is put back.
//!
//! On a port of the kernel path the program in the seal's place sends a guest's frames to the
//! uplink, and drops all others; it has the seal's name, so that all that is said here of
//! the seal is true of it too.
//!
//! What vlanswitchd created stays as it is when it stops, sealed: a VM may be
//! attached to it. Devices it found are given back as they were. Created taps carry
//! an alias by which a later run knows them.

use crate::control::doctor;
use crate::control::links::{
    LinkDetails, LinkError, LinkSettings, LinkSocket, LinkState, PreviousIpv6, QDISC_REMOVED,
    disable_ipv6, restore_ipv6,
};
use crate::control::mapping::PortConfig;
use crate::sys::bpf::{
    self, AssemblyError, BpfError, Direction, ProgramKind, attach_beside_qdiscs, attach_tc,
    detach_tc, is_attached_tc, move_to_tcx, move_to_tcx_leaving_qdisc, remove_empty_qdisc,
    seal_program,
};
use crate::sys::ethtool::{self, EthtoolError, Features};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};
use thiserror::Error;
use tracing::{debug, warn};

/// The alias of taps we created.
pub const OUR_ALIAS: &str = "vlanswitchd";
/// What `ip link` calls the driver of taps.
const TAP_KIND: &str = "tun";
/// The largest MTU a tap takes (`tun_net_init`: 65535 less the Ethernet header).
const TAP_MTU: u32 = 65521;
/// Name of the program that seals a device, be it that it drops everything or that it sends
/// a guest's frames to the uplink: by the name a later run knows it.
pub const SEAL_NAME: &str = "vlansw_seal";
/// How long a port's queueing is left alone after a change around it: who removed it
/// may be about to add his own, and would find ours in the way.
const REQUEUE_DELAY: Duration = Duration::from_secs(5);
/// What has happened when a program is gone from a TCX hook.
pub const TCX_REMOVED: &str = "a program was taken from its tc hook";
/// How often something is set that does not stay set.
const ATTEMPTS: usize = 5;
/// Features of an uplink that lose frames, by the kernel's names (`ethtool -k` calls the
/// first `large-receive-offload`): LRO merges what cannot be split again, and a VLAN
/// filter drops VLANs that have no VLAN device.
pub const HARMFUL_FEATURES: [&str; 2] = ["rx-lro", "rx-vlan-filter"];

/// A device could not be made ready.
#[derive(Debug, Error)]
pub enum HostError {
    /// The kernel would not configure it.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The kernel would not seal it.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// A fault in the seal's program.
    #[error(transparent)]
    Assembly(#[from] AssemblyError),
}

impl HostError {
    /// Whether the device went away meanwhile.
    pub fn is_device_gone(&self) -> bool {
        match self {
            Self::Link(error) => error.is_device_gone(),
            Self::Bpf(error) => error.raw_os_error() == Some(libc::ENODEV),
            Self::Assembly(_) => false,
        }
    }
}

/// Whether the seal of a port's device is in its place.
///
/// # Errors
/// [`BpfError`] if the kernel does not tell.
pub fn is_sealed(index: u32) -> Result<bool, BpfError> {
    is_attached_tc(SEAL_NAME, index, Direction::Ingress)
}

/// Whether vlanswitchd created this device, in this run or an earlier one.
pub fn is_ours(link: &LinkState) -> bool {
    link.alias.as_deref() == Some(OUR_ALIAS)
}

/// How a port is sealed (docs/adr/0002-seal-by-clsact.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sealing {
    /// In 0.1 ms, in a place to move from soon: for many ports at once.
    Quick,
    /// In 12-20 ms, in a place out of the way of whoever made the device: libvirt is
    /// about to add a qdisc of its own for `<bandwidth>`.
    Lasting,
}

/// What to put back when a device we found is no longer a port.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FoundPort {
    index: u32,
    name: String,
    up: bool,
    noarp: bool,
    mtu: u32,
    tap: bool,
    queueing: bool,
    ipv6: PreviousIpv6,
}

/// What to put back when the uplink is no longer one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FoundUplink {
    index: u32,
    name: String,
    mtu: Option<u32>,
    features: Vec<String>,
    /// It was made promiscuous, for the kernel path: not by a socket that ends with us.
    #[serde(default)]
    promiscuous: bool,
}

impl FoundPort {
    /// The same device under another name, if it has one now.
    pub fn renamed(self, name: Option<&str>) -> Self {
        Self { name: name.map_or(self.name, str::to_owned), ..self }
    }
}

impl FoundUplink {
    /// The same device under another name, if it has one now.
    pub fn renamed(self, name: Option<&str>) -> Self {
        Self { name: name.map_or(self.name, str::to_owned), ..self }
    }
}

/// The host's devices.
#[derive(Debug)]
pub struct Host {
    links: LinkSocket,
    seal: OwnedFd,
    /// What stands in the seal's place on devices of the kernel path, by index.
    guards: HashMap<u32, OwnedFd>,
    /// Ports around which something was changed, and when.
    disturbed: Vec<(u32, Instant)>,
    /// What a process before has found, and not put back.
    earlier: Earlier,
}

/// What a process before has found, and not put back.
#[derive(Debug, Default)]
struct Earlier {
    uplink: Option<FoundUplink>,
    ports: Vec<FoundPort>,
}

impl Host {
    /// Loads the seal.
    ///
    /// # Errors
    /// [`HostError`] without capabilities or BPF.
    pub fn new() -> Result<Self, HostError> {
        let seal = bpf::load(ProgramKind::SchedCls, SEAL_NAME, &seal_program()?)?;
        bpf::tcx::remember(seal.as_fd())?;
        Ok(Self {
            links: LinkSocket::new()?,
            seal,
            guards: HashMap::new(),
            disturbed: Vec::new(),
            earlier: Earlier::default(),
        })
    }

    /// The program that guards a device's ingress.
    fn guard(&self, index: u32) -> BorrowedFd<'_> {
        self.guards.get(&index).unwrap_or(&self.seal).as_fd()
    }

    /// Has a device guarded by this program of the seal's name from the time on when it
    /// [becomes a port](Host::prepare_port).
    ///
    /// # Errors
    /// [`HostError`] when out of descriptors.
    pub fn set_guard(&mut self, index: u32, program: OwnedFd) -> Result<(), HostError> {
        bpf::tcx::remember(program.as_fd())?;
        if let Some(before) = self.guards.insert(index, program) {
            bpf::tcx::forget(before.as_fd());
        }
        Ok(())
    }

    /// Has a device that is a port guarded by this program, or by the seal alone, from the
    /// next frame on.
    ///
    /// # Errors
    /// [`HostError`]: it is guarded as before.
    pub fn replace_guard(&mut self, index: u32, program: Option<OwnedFd>) -> Result<(), HostError> {
        let next = program.as_ref().unwrap_or(&self.seal).as_fd();
        if program.is_some() {
            bpf::tcx::remember(next)?;
        }
        // The one before must still be known: it is found by its name.
        attach_tc(next, SEAL_NAME, index, Direction::Ingress)?;
        let before = match program {
            Some(program) => self.guards.insert(index, program),
            None => self.guards.remove(&index),
        };
        if let Some(before) = before {
            bpf::tcx::forget(before.as_fd());
        }
        Ok(())
    }

    /// Forgets what guards a device that is no port any more.
    pub fn drop_guard(&mut self, index: u32) {
        if let Some(before) = self.guards.remove(&index) {
            bpf::tcx::forget(before.as_fd());
        }
    }

    /// Puts the seal in the place of an earlier run's program on a device that is no port.
    pub fn seal_again(&mut self, name: &str, index: u32) {
        if is_sealed(index).unwrap_or(false)
            && let Err(error) = self.replace_guard(index, None)
        {
            warn!("{name}: {error}");
        }
    }

    /// How many frames each of these devices has dropped instead of sending them.
    pub fn dropped(&mut self, indexes: &[u32]) -> HashMap<u32, u64> {
        self.links.dropped(indexes).unwrap_or_else(|error| {
            warn!("{error}");
            HashMap::new()
        })
    }

    /// How many frames a device has dropped of those it was to send, and its queueing
    /// discipline, that modulo 2^32. None if it is gone or does not tell.
    pub fn unsent(&mut self, index: u32) -> Option<(u64, u32)> {
        let device = *self.dropped(&[index]).get(&index)?;
        let queue = self.links.queue_drops(index).map_err(|error| warn!("{error}")).ok()?;
        Some((device, queue.unwrap_or_default()))
    }

    /// Makes a device a port, all but up. Returns what to put back, unless it is
    /// ours.
    ///
    /// # Errors
    /// [`HostError`]; what was set until then is put back.
    pub fn prepare_port(
        &mut self,
        link: &LinkState,
        created: bool,
        sealing: Sealing,
    ) -> Result<Option<FoundPort>, HostError> {
        self.warn_about(link);
        let earlier = self.earlier_port(link.index);
        let attach = match sealing {
            Sealing::Quick => attach_tc,
            Sealing::Lasting => attach_beside_qdiscs,
        };
        attach(self.guard(link.index), SEAL_NAME, link.index, Direction::Ingress)?;
        let tap = link.kind.as_deref() == Some(TAP_KIND);
        let ours = created || is_ours(link);
        let mut found = FoundPort {
            index: link.index,
            name: link.name.clone(),
            up: link.up,
            noarp: link.noarp,
            mtu: link.mtu,
            tap,
            queueing: false,
            ipv6: PreviousIpv6::Absent,
        };
        match self.silence(&mut found, ours) {
            Ok(()) if ours => Ok(None),
            Ok(()) => Ok(Some(earlier.unwrap_or(found))),
            Err(error) => {
                // Ours stays sealed: a VM may be on it.
                if !ours {
                    self.give_port_back(&earlier.unwrap_or(found));
                }
                Err(error)
            }
        }
    }

    fn silence(&mut self, found: &mut FoundPort, ours: bool) -> Result<(), HostError> {
        match disable_ipv6(&found.name) {
            Ok(previous) => found.ipv6 = previous,
            // A read-only /proc/sys: the seal alone keeps frames out, and the host
            // may be heard by the guest.
            Err(error) => warn!("{error}"),
        }
        if found.tap {
            found.queueing =
                self.links.root_qdisc_kind(found.index)?.is_some_and(|kind| kind != "noqueue");
            self.insist(&found.name, |links| links.set_root_qdisc_noqueue(found.index))?;
        }
        let settings = LinkSettings {
            mtu: found.tap.then_some(TAP_MTU),
            noarp: Some(true),
            alias: ours.then(|| OUR_ALIAS.to_owned()),
            addr_gen_none: ours,
            ..LinkSettings::default()
        };
        self.insist(&found.name, |links| links.configure(found.index, &settings))
    }

    /// Sets something on a device that its maker may be setting up at this moment:
    /// libvirt sets flags by reading, changing and writing them, and what was set in
    /// between is lost. The seal alone keeps the host out, so it is no reason to leave
    /// a VM without its port.
    fn insist(
        &mut self,
        name: &str,
        mut set: impl FnMut(&mut LinkSocket) -> Result<(), LinkError>,
    ) -> Result<(), HostError> {
        for _ in 1..ATTEMPTS {
            match set(&mut self.links) {
                Err(LinkError::NotKept { .. }) => debug!("{name}: set by others meanwhile"),
                result => return Ok(result?),
            }
        }
        match set(&mut self.links) {
            Err(error @ LinkError::NotKept { .. }) => warn!("{error}"),
            result => result?,
        }
        Ok(())
    }

    /// Takes note of what devices were like before a process before this one made them
    /// its own, and did not put them back.
    pub fn remember(&mut self, ports: Vec<FoundPort>, uplink: Option<FoundUplink>) {
        self.earlier.ports.extend(ports);
        if uplink.is_some() {
            self.earlier.uplink = uplink;
        }
    }

    /// What a device was like before, if it is still as that process left it: sealed.
    fn earlier_port(&mut self, index: u32) -> Option<FoundPort> {
        let position = self.earlier.ports.iter().position(|found| found.index == index)?;
        let found = self.earlier.ports.swap_remove(position);
        let link = self.links.link(index).ok()?;
        is_sealed(index).unwrap_or(false).then(|| found.renamed(Some(&link.name)))
    }

    /// Gives back what was remembered and has not become ours meanwhile. Returns how many
    /// devices that was.
    pub fn give_back_remembered(&mut self) -> usize {
        let indexes: Vec<u32> = self.earlier.ports.iter().map(|found| found.index).collect();
        let ports: Vec<FoundPort> =
            indexes.into_iter().filter_map(|index| self.earlier_port(index)).collect();
        for found in &ports {
            self.give_port_back(found);
        }
        let uplink = self.earlier.uplink.take();
        // An index alone could be another device's by now.
        let uplink = uplink
            .filter(|found| self.links.link(found.index).is_ok_and(|link| link.name == found.name));
        if let Some(found) = &uplink {
            self.give_uplink_back(found);
        }
        ports.len() + usize::from(uplink.is_some())
    }

    /// Learns to know a device's seal, of whatever run it is, while the kernel still tells.
    pub fn recognise_seal(&self, index: u32) {
        if let Err(error) = bpf::tcx::recognise(SEAL_NAME, index, Direction::Ingress) {
            debug!("programs of device {index}: {error}");
        }
    }

    /// Moves a sealed device's seal to the place where it costs a frame least. Takes
    /// the kernel 12-20 ms, hence not part of [`Host::prepare_port`].
    /// Returns whether something is left for [`Host::clear_up`].
    pub fn settle_seal(&mut self, index: u32, sending: bool) -> bool {
        let seal = self.guard(index);
        let moved = if sending {
            move_to_tcx_leaving_qdisc(seal, SEAL_NAME, index, Direction::Ingress)
        } else {
            move_to_tcx(seal, SEAL_NAME, index, Direction::Ingress).map(|_| false)
        };
        moved.unwrap_or_else(|error| {
            debug!("seal of device {index} stays with clsact: {error}");
            false
        })
    }

    /// Removes what settling left, when nothing is sent to the device: a qdisc that
    /// would be in the way of libvirt's `<bandwidth>`.
    pub fn clear_up(&mut self, index: u32) {
        if let Err(error) = remove_empty_qdisc(index) {
            debug!("a clsact qdisc stays on device {index}: {error}");
        }
    }

    /// Looks after a port's seal when `cause` has changed something around it: seals
    /// again if the seal is gone, and otherwise takes it out of the way of who did
    /// that. For libvirt begins so to apply `<bandwidth>`: it removes the root qdisc,
    /// and adds an ingress qdisc next, which a clsact qdisc of ours would refuse.
    /// Returns what people should know.
    pub fn keep_sealed(&mut self, name: &str, index: u32, cause: &str) -> Option<String> {
        self.disturbed.retain(|(other, _)| *other != index);
        self.disturbed.push((index, Instant::now()));
        let again = match is_attached_tc(SEAL_NAME, index, Direction::Ingress) {
            // Other changes take nothing away that settling would not wait for.
            Ok(true) => {
                if cause == QDISC_REMOVED {
                    self.settle_seal(index, false);
                }
                return None;
            }
            // To where the same command does not reach it.
            Ok(false) => {
                attach_beside_qdiscs(self.guard(index), SEAL_NAME, index, Direction::Ingress)
            }
            Err(error) => Err(error),
        };
        match again {
            Ok(_) => Some(format!(
                "{name}: {cause}, and with it the seal that keeps the guest's frames from the \
                 host: sealed again, but what the guest sent in between may have reached the \
                 host; leave the tc ingress of this device alone"
            )),
            // The device itself is going.
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => None,
            Err(error) => Some(format!(
                "{name}: {cause}, and its seal cannot be put back: the guest's frames may reach the \
                 host: {error}; `ip link set {name} down` stops them"
            )),
        }
    }

    /// Whether a device's seal is where it costs least, or as good as it gets here.
    pub fn is_settled(&self, index: u32) -> bool {
        bpf::tcx::holds(SEAL_NAME, index, Direction::Ingress).unwrap_or(true)
    }

    /// Puts a seal back that somebody has taken from a device's TCX hook, of which no
    /// notification comes. Returns what people should know.
    pub fn look_at_seal(&mut self, name: &str, index: u32) -> Option<String> {
        // Without TCX, or on its way there, it stands where its going is notified.
        let stands = self.is_settled(index)
            || is_attached_tc(SEAL_NAME, index, Direction::Ingress).unwrap_or(true);
        if stands { None } else { self.keep_sealed(name, index, TCX_REMOVED) }
    }

    /// Takes the kernel's default queueing from taps that got it back when somebody
    /// removed his: it would hide from us what a full guest queue drops. What somebody
    /// has set stays. To be called now and then.
    pub fn restore_queueing(&mut self) {
        let (due, rest) = std::mem::take(&mut self.disturbed)
            .into_iter()
            .partition(|(_, since)| since.elapsed() >= REQUEUE_DELAY);
        self.disturbed = rest;
        for (index, _) in due {
            let link = self.links.link(index);
            if !link.is_ok_and(|link| link.kind.as_deref() == Some(TAP_KIND)) {
                continue;
            }
            match self.links.replace_default_root_qdisc(index) {
                Err(error) if !error.is_device_gone() => warn!("{error}"),
                _ => {}
            }
        }
    }

    /// Brings a prepared device up.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn bring_up(&mut self, index: u32) -> Result<(), HostError> {
        self.insist(&format!("device {index}"), |links| links.set_up(index))
    }

    /// Gives a device back as it was found.
    pub fn give_port_back(&mut self, found: &FoundPort) {
        let tell = |result: Result<(), HostError>| match result {
            Err(error) if !error.is_device_gone() => warn!("giving {} back: {error}", found.name),
            _ => debug!("gave {} back", found.name),
        };
        let settings = LinkSettings {
            up: (!found.up).then_some(false),
            mtu: found.tap.then_some(found.mtu),
            noarp: Some(found.noarp),
            ..LinkSettings::default()
        };
        tell(self.links.configure(found.index, &settings).map_err(HostError::from));
        if found.queueing {
            tell(self.links.delete_root_qdisc(found.index).map_err(HostError::from));
        }
        tell(restore_ipv6(&found.name, found.ipv6).map_err(HostError::from));
        // Last, so that the host hears nothing while the rest is put back.
        tell(
            detach_tc(SEAL_NAME, found.index, Direction::Ingress)
                .map(drop)
                .map_err(HostError::from),
        );
        // Not before: without CAP_SYS_ADMIN it is known only as long as it is remembered.
        self.drop_guard(found.index);
    }

    /// Switches off what loses frames on the uplink and raises its MTU if need be.
    pub fn prepare_uplink(
        &mut self,
        link: &LinkState,
        mtu: Option<u32>,
        lasting: bool,
    ) -> Result<FoundUplink, HostError> {
        let mut found = FoundUplink {
            index: link.index,
            name: link.name.clone(),
            mtu: None,
            features: Vec::new(),
            promiscuous: false,
        };
        if lasting {
            found.promiscuous = !self.links.set_promiscuous(link.index, true)?;
        }
        if let Err(error) = disarm(&mut found) {
            warn!("{error}");
        }
        if let Some(mtu) = mtu
            && let Err(error) = self.raise_uplink_mtu(&mut found, mtu)
        {
            self.give_uplink_back(&found);
            return Err(error);
        }
        if self.earlier.uplink.as_ref().is_some_and(|earlier| earlier.index == link.index)
            && let Some(earlier) = self.earlier.uplink.take()
        {
            // What it had switched off and raised is still so, and not to be found.
            found.features.extend(earlier.features);
            found.promiscuous |= earlier.promiscuous;
            found.mtu = earlier.mtu.or(found.mtu);
        }
        Ok(found)
    }

    /// Raises the uplink's MTU if it is lower than this, in bytes.
    ///
    /// # Errors
    /// [`HostError`].
    pub fn raise_uplink_mtu(&mut self, found: &mut FoundUplink, mtu: u32) -> Result<(), HostError> {
        let now = self.links.link(found.index)?.mtu;
        if mtu > now {
            self.links.set_mtu(found.index, mtu)?;
            // What to go back to is what it was before the first of us.
            found.mtu.get_or_insert(now);
        }
        Ok(())
    }

    /// Puts the uplink's features and MTU back.
    pub fn give_uplink_back(&mut self, found: &FoundUplink) {
        for feature in &found.features {
            if let Err(error) = ethtool::set(&found.name, feature, true) {
                warn!("giving {} back: {error}", found.name);
            }
        }
        let mtu = found.mtu.map_or(Ok(()), |mtu| self.links.set_mtu(found.index, mtu));
        let promiscuous = match found.promiscuous {
            true => self.links.set_promiscuous(found.index, false).map(drop),
            false => Ok(()),
        };
        for error in [mtu.err(), promiscuous.err()].into_iter().flatten() {
            if !error.is_device_gone() {
                warn!("giving {} back: {error}", found.name);
            }
        }
    }

    /// Removes a device we created.
    pub fn delete(&mut self, name: &str, index: u32) {
        if let Err(error) = self.links.delete_link(index)
            && !error.is_device_gone()
        {
            warn!("removing {name}: {error}");
        }
    }

    /// Asks the kernel for one device.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn link(&mut self, index: u32) -> Result<LinkState, LinkError> {
        self.links.link(index)
    }

    /// More about one device.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn details(&mut self, index: u32) -> Result<LinkDetails, LinkError> {
        self.links.details_of(index)
    }

    /// What people should know of a port's device.
    pub fn notes_about(&mut self, port: &PortConfig, link: &LinkState) -> Vec<String> {
        let notes = doctor::notes_about(port, link, &mut self.links);
        notes.iter().map(doctor::line).collect()
    }

    fn warn_about(&mut self, link: &LinkState) {
        let addresses = self.links.addresses(link.index).unwrap_or_default();
        let master = link.master.and_then(|index| self.links.link(index).ok());
        let master = master.as_ref().map(|master| master.name.as_str());
        for finding in doctor::device_notes(link, master, &addresses) {
            warn!("{}", doctor::line(&finding));
        }
    }
}

fn disarm(found: &mut FoundUplink) -> Result<(), EthtoolError> {
    let features = Features::read(&found.name)?;
    for name in HARMFUL_FEATURES {
        let Some(state) = features.state(name).filter(|state| state.active) else { continue };
        if state.changeable {
            ethtool::set(&found.name, name, false)?;
            debug!("{}: switched {name} off", found.name);
            found.features.push(name.to_owned());
        } else {
            warn!("{}: {name} is on and cannot be switched off: it may lose frames", found.name);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;

    /// A name the kernel does not know would be passed over in silence.
    #[test]
    fn the_kernel_knows_the_features_by_these_names() {
        let features = Features::read("lo").unwrap();
        for name in HARMFUL_FEATURES {
            assert!(features.state(name).is_some(), "{name}");
        }
    }
}
