//! Reading the host: thin, without judgement. What cannot be read is left out and
//! said, so that one odd device hides nothing of the others.

use super::{SwitchFacts, finding, port_notes};
use crate::control::affinity;
use crate::control::api::{Finding, Severity};
use crate::control::checks;
use crate::control::config::{Config, check};
use crate::control::host;
use crate::control::links::{LinkDetails, LinkSocket, LinkState};
use crate::control::mapping::PortConfig;
use crate::control::privileges;
use crate::control::start_error::StartError;
use crate::sys::ethtool::{FeatureState, Features};
use crate::sys::tap::{self, TapSettings};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// What the host is like.
#[derive(Debug, Clone, Default)]
pub struct HostFacts {
    /// Capabilities this process lacks.
    pub missing_capabilities: Vec<String>,
    /// All devices.
    pub links: Vec<LinkDetails>,
    /// The host's addresses, each with the index of its device.
    pub addresses: Vec<(u32, IpAddr)>,
    /// The uplink's features, by the kernel's names.
    pub features: BTreeMap<String, FeatureState>,
    /// The settings of ports' taps, by name.
    pub taps: BTreeMap<String, TapSettings>,
    /// Whether ports' devices are sealed, by index.
    pub sealed: BTreeMap<u32, bool>,
    /// The kernel has 8021q, with which GRO merges frames whose tag the NIC left in.
    pub has_8021q: bool,
    /// What could not be read.
    pub failures: Vec<String>,
}

impl HostFacts {
    /// Looks at all that concerns this switch.
    pub fn read(switch: &SwitchFacts) -> Self {
        let mut facts = Self {
            missing_capabilities: privileges::missing(),
            has_8021q: std::fs::exists("/proc/net/vlan").unwrap_or(false),
            ..Self::default()
        };
        match LinkSocket::new() {
            Ok(mut socket) => {
                facts.links = facts.or_note(socket.details());
                facts.addresses = facts.or_note(socket.all_addresses());
            }
            Err(error) => facts.failures.push(error.to_string()),
        }
        if switch.stats.uplink.ifindex.is_some() {
            let features = Features::read(&switch.stats.uplink.name);
            let named = features.map(|features| {
                features.iter().map(|(name, state)| (name.to_owned(), state)).collect()
            });
            facts.features = facts.or_note(named);
        }
        for port in &switch.stats.ports {
            let Some(index) = port.ifindex else { continue };
            let tap = facts.or_note(tap::settings(&port.name));
            facts.taps.extend(tap.map(|tap| (port.name.clone(), tap)));
            match host::is_sealed(index) {
                Ok(sealed) => {
                    facts.sealed.insert(index, sealed);
                }
                Err(error) => facts.failures.push(error.to_string()),
            }
        }
        facts
    }

    fn or_note<T: Default, E: ToString>(&mut self, result: Result<T, E>) -> T {
        result.unwrap_or_else(|error| {
            self.failures.push(error.to_string());
            T::default()
        })
    }

    /// The device with this index.
    pub fn link(&self, index: u32) -> Option<&LinkDetails> {
        self.links.iter().find(|link| link.state.index == index)
    }

    /// The host's addresses on a device.
    pub fn addresses_of(&self, index: u32) -> Vec<IpAddr> {
        let own = self.addresses.iter().filter(|(device, _)| *device == index);
        own.map(|(_, address)| *address).collect()
    }
}

/// What people should know of a port's device when it is attached.
pub fn notes_about(port: &PortConfig, link: &LinkState, socket: &mut LinkSocket) -> Vec<Finding> {
    let addresses = socket.addresses(link.index).unwrap_or_default();
    let tap = tap::settings(&port.device).ok().flatten();
    let master = link.master.and_then(|index| socket.link(index).ok());
    let master = master.as_ref().map(|master| master.name.as_str());
    port_notes(port, link, tap.as_ref(), master, &addresses)
}

/// What would keep a switch with this configuration from starting. What may go wrong
/// later is logged, as at a start.
pub fn before_start(config: &Config) -> Vec<Finding> {
    let mut found = Vec::new();
    if let Err(error) = privileges::check() {
        found.push(finding(
            Severity::Warning,
            "this process",
            error.to_string(),
            Some("as root, doctor sees more".to_owned()),
        ));
    }
    let error = |text: String| finding(Severity::Error, "configuration", text, None);
    // A CPU that cannot be used is among what the check finds.
    if let Ok(plan) = affinity::plan(config)
        && let Err(limit) = checks::file_limit(config.ports.len(), plan.workers.len())
    {
        found.push(error(limit.to_string()));
    }
    match check::host(config) {
        Ok(line) => found.push(finding(Severity::Note, "configuration", line, None)),
        Err(errors) => found.extend(errors.into_iter().map(|each| match each {
            // This process's CPUs were looked at: the daemon's are not known.
            StartError::Cpu { .. } => finding(
                Severity::Warning,
                "configuration",
                each.to_string(),
                Some("seen from this process: a service may have other CPUs".to_owned()),
            ),
            each => error(each.to_string()),
        })),
    }
    found
}
