//! Following the devices as they come, change and go, by what netlink tells.

use super::Daemon;
use super::devices::publish;
use crate::control::api::EventKind;
use crate::control::checks;
use crate::control::host::is_sealed;
use crate::control::links::{LinkEvent, LinkState, QDISC_REMOVED};
use crate::control::mapping::DeviceKind;
use crate::control::start_error::StartError;
use crate::port::DeviceState;
use std::time::Instant;
use tracing::warn;

/// What took away a seal while nobody watched it.
const UNWATCHED: &str = "something was taken from its tc hooks while no vlanswitchd ran";
/// Tries to read netlink's news before waiting for the next.
const READ_ATTEMPTS: usize = 3;

impl Daemon {
    /// Brings ports and uplink in line with what netlink tells.
    pub(super) fn follow_links(&mut self) {
        let mut events = Vec::new();
        // After an error another call makes up for what was missed: the next tick's.
        for _ in 0..READ_ATTEMPTS {
            match self.monitor.read_events(|event| events.push(event)) {
                Ok(()) => break,
                Err(error) => warn!("{error}"),
            }
        }
        if self.monitor.overruns() != self.overruns_seen {
            self.overruns_seen = self.monitor.overruns();
            self.leave_the_vanished();
        }
        // Of these a start makes one for each port, in which no device has changed.
        let only_hooks = !events.is_empty()
            && events.iter().all(|event| matches!(event, LinkEvent::Unhooked { .. }));
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
            if let LinkEvent::Unhooked { index, cause } = event {
                self.device_unhooked(index, cause);
            }
        }
        if only_hooks {
            return;
        }
        self.publish_all();
        self.follow_uplink();
        self.follow_targets();
    }

    /// A device that came and went while notifications were lost is in no event.
    fn leave_the_vanished(&mut self) {
        let links = self.monitor.links();
        let attached = self.ports.iter().filter_map(|(_, port)| port.index());
        let gone: Vec<u32> = attached.filter(|index| links.by_index(*index).is_none()).collect();
        for index in gone {
            self.device_left(index, None);
        }
    }

    /// The monitor's table is the truth: what was read from a device while it was
    /// attached may have been a moment that no event speaks of.
    fn publish_all(&self) {
        let links = self.monitor.links();
        for (_, port) in self.ports.iter() {
            if let Some(link) = port.index().and_then(|index| links.by_index(index)) {
                publish(&port.shared.link, Some(link));
            }
        }
        if let Some(link) =
            self.uplink.attached.as_ref().and_then(|(index, ..)| links.by_index(*index))
        {
            self.workers.publish_uplink(Some(link));
        } else {
            // One that is down may have to wait until it is up.
            let link = links.by_name(&self.name).filter(|link| link.is_ethernet && !link.up);
            self.workers.publish_uplink(link);
        }
    }

    /// A device no longer has its name: it is gone, or has a new one.
    fn device_left(&mut self, index: u32, new_name: Option<&str>) {
        if self.uplink.attached.as_ref().is_some_and(|(attached, ..)| *attached == index) {
            warn!("uplink {} is gone: waiting for it to come back", self.name);
            self.workers.publish_uplink(None);
            self.uplink.watched.see_state(DeviceState::Absent);
            self.take_back(None);
            if let Some((_, _, found)) = self.uplink.attached.take() {
                self.host.give_uplink_back(&found.renamed(new_name));
            }
            self.follow_uplink();
            let text = format!("uplink {}: gone, waiting for it to come back", self.name);
            self.tell(EventKind::UplinkDetached, Some(&self.name.clone()), text);
        } else if let Some((position, port)) = self.ports.by_index(index) {
            let name = port.config.device.clone();
            publish(&port.shared.link, None);
            port.watched.see_state(DeviceState::Absent);
            self.detach_port(position, new_name);
            let text = format!("{name}: gone, waiting for it to come back");
            self.tell(EventKind::PortDetached, Some(&name), text);
        }
    }

    fn device_came(&mut self, link: &LinkState) {
        if !link.is_ethernet {
            if link.name == self.name || self.ports.by_device(&link.name).is_some() {
                warn!(
                    "{}: not an Ethernet device, left alone: make it a tap, not a tun",
                    link.name
                );
            }
            return;
        }
        if link.name == self.name && self.uplink.attached.is_none() {
            if self.is_late(None) {
                // Tried again once it is back.
                return;
            }
            match self.attach_uplink(link) {
                Ok(()) if self.uplink.attached.is_none() => {}
                Ok(()) => {
                    self.left_out.retain(|index| *index != link.index);
                    let text = format!("uplink {}: back", self.name);
                    self.tell(EventKind::UplinkAttached, Some(&link.name), text);
                }
                Err(error) => self.leave_out(link, &format!("uplink {}", self.name), &error),
            }
            return;
        }
        if link.kind.as_deref() == Some(checks::VLAN_KIND) {
            self.vlan_device_came(link);
        }
        let waiting = self.ports.by_device(&link.name);
        let waiting = waiting
            .filter(|(position, port)| port.attached.is_none() && !self.is_late(Some(*position)));
        if let Some(position) = waiting.map(|(position, _)| position) {
            match self.adopt(position, link) {
                Ok(()) => {
                    self.left_out.retain(|index| *index != link.index);
                    let text = format!("{}: attached", link.name);
                    self.tell(EventKind::PortAttached, Some(&link.name), text);
                }
                Err(StartError::Host(error)) if error.is_device_gone() => {}
                Err(error) => self.leave_out(link, &link.name, &error),
            }
        }
    }

    /// Says so if the host has made a VLAN device on a VLAN that a port claims.
    fn vlan_device_came(&mut self, link: &LinkState) {
        let Some((uplink, ..)) = self.uplink.attached else { return };
        let details = match self.host.details(link.index) {
            Ok(details) => details,
            Err(error) => {
                if !error.is_device_gone() {
                    warn!("{error}");
                }
                return;
            }
        };
        let found = checks::vlan_device_on(self.config.table.claims(), uplink, &[details]);
        if let Some((device, tpid, vid)) = found {
            let text = format!(
                "VLAN device {device} of the host is on VLAN {vid} ({tpid}) of {}, which a port \
                 claims too: both get every frame; `ip link delete {device}`",
                self.name
            );
            self.tell(EventKind::Seal, Some(&device), text);
        }
    }

    /// Says, once, that a device that is there cannot be attached.
    fn leave_out(&mut self, link: &LinkState, what: &str, error: &StartError) {
        if !self.left_out.contains(&link.index) {
            self.left_out.push(link.index);
            warn!("{what}: cannot attach, trying again every second: {error}");
        }
    }

    /// Tries again to attach what is there and could not be attached when it came: the
    /// memory or descriptors it takes may be there by now.
    pub(super) fn attach_left_out(&mut self) {
        let links = self.monitor.links();
        self.left_out.retain(|index| links.by_index(*index).is_some());
        let waiting = self.ports.iter().map(|(_, port)| port);
        let waiting = waiting
            .filter(|port| port.attached.is_none() && port.config.kind != DeviceKind::Internal);
        let names = waiting.map(|port| &port.config.device);
        let uplink = self.uplink.attached.is_none().then_some(&self.name);
        let there = names.chain(uplink).filter_map(|name| links.by_name(name));
        let there: Vec<LinkState> = there.filter(|link| link.is_ethernet).cloned().collect();
        for link in there {
            self.device_came(&link);
        }
    }

    fn device_changed(&mut self, link: &LinkState) {
        // The latest there is, not what an event of several tells.
        let latest = self.monitor.links().by_index(link.index).unwrap_or(link);
        let (name, state, watched) =
            if self.uplink.attached.as_ref().is_some_and(|(index, ..)| *index == link.index) {
                self.workers.publish_uplink(Some(latest));
                let state = self.workers.uplink_state();
                (format!("uplink {}", link.name), state, &mut self.uplink.watched)
            } else if let Some((_, port)) = self.ports.by_index(link.index) {
                publish(&port.shared.link, Some(latest));
                (link.name.clone(), port.shared.link.state(), &mut port.watched)
            } else {
                if latest.up && latest.name == self.name && self.uplink.attached.is_none() {
                    // It was down until now, and there is more than one worker.
                    self.device_came(&latest.clone());
                }
                return;
            };
        if state != watched.state {
            watched.see_state(state);
            if state != DeviceState::Up && self.uncleared.contains(&link.index) {
                self.uncleared.retain(|index| *index != link.index);
                self.host.clear_up(link.index);
            }
            let text = match state {
                // No warning: a tap that is removed goes down first.
                DeviceState::Down => {
                    format!("{name}: down; `ip link set {} up` ends that", link.name)
                }
                state => format!("{name}: {}", state.name()),
            };
            self.tell(EventKind::Link, Some(&link.name), text);
        }
    }

    /// Moves some devices' seals to where they cost least.
    pub(super) fn settle_some(&mut self, now: Instant) {
        for index in self.unsettled.take(now) {
            self.settle(index);
        }
    }

    fn settle(&mut self, index: u32) {
        let port = self.ports.by_index(index);
        let sending = port.is_some_and(|(_, port)| port.shared.link.is_up());
        if self.host.settle_seal(index, sending) {
            self.uncleared.push(index);
        }
    }

    /// Seals ports again that were taken over and are no longer sealed: nobody has watched
    /// them meanwhile.
    pub(super) fn look_at_seals(&mut self) {
        let ports = self.ports.iter().filter_map(|(_, port)| {
            let attached = port.attached.as_ref()?;
            Some((attached.index?, attached.found.is_none(), port.config.device.clone()))
        });
        let ports: Vec<(u32, bool, String)> = ports.collect();
        for (index, is_ours, name) in ports {
            // What the kernel does not tell is as a start finds it.
            if !is_sealed(index).unwrap_or(true)
                && let Some(text) = self.host.keep_sealed(&name, index, UNWATCHED)
            {
                self.tell(EventKind::Seal, Some(&name), text);
            }
            // The process before may not have got to settling it.
            self.host.recognise_seal(index);
            if is_ours && !self.host.is_settled(index) {
                self.unsettled.add(index);
            }
        }
    }

    /// Something was taken from a device's tc hooks: its seal, perhaps.
    fn device_unhooked(&mut self, index: u32, cause: &str) {
        if self.uplink.attached.as_ref().is_some_and(|(attached, ..)| *attached == index) {
            if let Some(text) = self.keep_dispatcher(index, cause) {
                self.tell(EventKind::Seal, Some(&self.name.clone()), text);
            }
            return;
        }
        let Some((_, port)) = self.ports.by_index(index) else { return };
        let name = port.config.device.clone();
        if cause == QDISC_REMOVED && self.uncleared.contains(&index) {
            // libvirt begins to apply <bandwidth>: what settling has left is in its way.
            self.uncleared.retain(|uncleared| *uncleared != index);
            self.host.clear_up(index);
        }
        if let Some(text) = self.host.keep_sealed(&name, index, cause) {
            self.tell(EventKind::Seal, Some(&name), text);
        }
        if self.host.is_settled(index) {
            self.unsettled.forget(index);
        }
    }
}
