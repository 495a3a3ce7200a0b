//! A port's configuration: from the grammar of DESIGN §2 into a [`PortConfig`],
//! and back into words.
//!
//! A port is written in three places: `--map VLANS=DEVICE[,OPTION...]`, a `[[port]]`
//! table of the configuration file, a request to the control socket. Each becomes a
//! [`PortSpec`], keys and texts with their places, and one function understands it,
//! so the checks and the words of a refusal are the same wherever it stands. Every
//! refusal names the place, the option, the value and the cure.

mod build;
mod police;
mod problem;
mod spec;
#[cfg(test)]
mod tests;

pub(super) use problem::one_line;
pub use problem::{MapError, MapProblem, Origin};
pub use spec::{DEVICE, PortSpec, VLAN};

use crate::frame::{Pcp, Tpid};
use crate::switch::{Membership, PoliceRule, Priority, Table, Vlans};
use std::collections::HashMap;

/// Longest name of a network device, in bytes (`IFNAMSIZ` without its NUL).
pub const DEVICE_NAME_MAX: usize = 15;
/// Prefixes libvirt keeps for devices it names itself (`virnetdev.h`).
const LIBVIRT_PREFIXES: [&str; 4] = ["vnet", "vif", "macvtap", "macvlan"];
/// The options of a port, in the order they are shown.
pub const OPTIONS: [&str; 14] = [
    "mode",
    "native",
    "tpid",
    "inner-tpid",
    "pcp",
    "create",
    "owner",
    "group",
    "queues",
    "offload",
    "rate",
    "burst",
    "storm",
    "mac",
];
/// The most overlaps told at once: each costs a compilation of the table.
const OVERLAPS_MAX: usize = 20;

/// What a port is attached to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceKind {
    /// A netdev somebody else uses from its other side: a tap, a veth end.
    Netdev {
        /// Create a tap if the device is missing.
        create: Option<TapConfig>,
    },
    /// A tap whose file descriptor we hold, for the host to use.
    Internal,
}

/// A user or group.
#[derive(Debug, Clone)]
pub struct Account {
    /// Its number.
    pub id: u32,
    /// Its name or number, as written.
    pub given: String,
}

/// Two names of one number are one account.
impl PartialEq for Account {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for Account {}

/// A tap we create.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TapConfig {
    /// User that may open it.
    pub owner: Option<Account>,
    /// Group that may open it.
    pub group: Option<Account>,
    /// Queues the VMM will open: more than one makes a multiqueue tap.
    pub queues: u16,
}

/// One port, as configured. Two are equal if they do the same, wherever they were
/// written.
#[derive(Debug, Clone, Eq)]
pub struct PortConfig {
    /// Name of the netdev.
    pub device: String,
    /// What it is.
    pub kind: DeviceKind,
    /// Its part in the VLANs.
    pub membership: Membership,
    /// The guest has no offloads (`offload=off`).
    pub offload_off: bool,
    /// What the guest is held to.
    pub police: PoliceRule,
    /// Where it was written.
    pub origin: Origin,
}

/// The uplink's name and where it is written, for refusals.
#[derive(Debug, Clone, Copy)]
pub struct Uplink<'u> {
    /// Name of the device.
    pub device: &'u str,
    /// `--uplink eth0`, or a file and line.
    pub place: &'u str,
}

impl PartialEq for PortConfig {
    fn eq(&self, other: &Self) -> bool {
        let Self { device, kind, membership, offload_off, police, origin: _ } = self;
        *device == other.device
            && *kind == other.kind
            && *membership == other.membership
            && *offload_off == other.offload_off
            && *police == other.police
    }
}

impl PortConfig {
    /// The VLANs in the words of a map.
    pub fn vlan(&self) -> String {
        match self.membership.vlans() {
            // A trunk of one VLAN: "5" would be no list.
            Vlans::List(vids) if vids.len() == 1 => {
                vids.iter().map(|vid| format!("{vid}-{vid}")).collect()
            }
            vlans => vlans.to_string(),
        }
    }

    /// The device in the words of a map, `internal:` included.
    pub fn device_text(&self) -> String {
        match self.kind {
            DeviceKind::Internal => format!("internal:{}", self.device),
            DeviceKind::Netdev { .. } => self.device.clone(),
        }
    }

    /// The options that differ from their defaults, in the order of [`OPTIONS`].
    /// `default_tpid` is the switch's own (`--tpid`).
    pub fn options(&self, default_tpid: Tpid) -> Vec<(&'static str, String)> {
        let Self { kind, membership, offload_off, .. } = self;
        let [rate, burst, storm, mac] = police::texts(&self.police);
        let (mode, pcp) = (membership.mode(), membership.priority());
        let double = matches!(membership.vlans(), Vlans::Double { .. });
        let inner_tpid = membership.inner_tpid();
        let (never_created, tap) = match kind {
            DeviceKind::Netdev { create: Some(tap) } => (false, Some(tap)),
            DeviceKind::Netdev { create: None } => (true, None),
            DeviceKind::Internal => (false, None),
        };
        let account = |account: &Option<Account>| account.as_ref().map(|one| one.given.clone());
        let values = [
            (mode != membership.vlans().default_mode()).then(|| mode.name().to_owned()),
            membership.native().map(|native| native.to_string()),
            (membership.tpid() != default_tpid).then(|| membership.tpid().to_string()),
            (double && inner_tpid != Tpid::default()).then(|| inner_tpid.to_string()),
            match pcp {
                Priority::Copy => Some("copy".to_owned()),
                Priority::Fixed(pcp) => (pcp != Pcp::default()).then(|| pcp.get().to_string()),
            },
            never_created.then(|| "no".to_owned()),
            tap.and_then(|tap| account(&tap.owner)),
            tap.and_then(|tap| account(&tap.group)),
            tap.filter(|tap| tap.queues != 1).map(|tap| tap.queues.to_string()),
            offload_off.then(|| "off".to_owned()),
            rate,
            burst,
            storm,
            mac,
        ];
        let pairs = OPTIONS.into_iter().zip(values);
        pairs.filter_map(|(key, value)| Some((key, value?))).collect()
    }

    /// The port as a map that means the same under this default TPID.
    pub fn to_map(&self, default_tpid: Tpid) -> String {
        let options = self.options(default_tpid).into_iter();
        let options: String = options.map(|(key, value)| format!(",{key}={value}")).collect();
        format!("{}={}{options}", self.vlan(), self.device_text())
    }

    /// The same port with keys changed: `vlan` and the options. An empty value takes
    /// an option back to its default. A mode that was the default of the old VLANs
    /// becomes the default of the new ones.
    ///
    /// # Errors
    /// [`MapProblem`] for unknown keys, keys given twice, and whatever a map with
    /// these words would be refused for.
    pub fn with_changes(
        &self,
        changes: &[(String, String)],
        default_tpid: Tpid,
    ) -> Result<Self, MapProblem> {
        let mut spec = PortSpec::new(self.origin.clone());
        spec.set(VLAN, self.vlan(), None);
        spec.set(DEVICE, self.device_text(), None);
        for (key, value) in self.options(default_tpid) {
            spec.set(key, value, None);
        }
        for (position, (key, value)) in changes.iter().enumerate() {
            if changes.iter().take(position).any(|(other, _)| other == key) {
                return Err(MapProblem::OptionTwice(key.clone()));
            }
            let known = OPTIONS.into_iter().chain([VLAN]).find(|known| known == key);
            let known = known.ok_or_else(|| MapProblem::UnknownOption(key.clone()))?;
            if value.is_empty() && known != VLAN {
                spec.remove(known);
            } else {
                spec.set(known, value.clone(), None);
            }
        }
        spec.build(default_tpid).map_err(|error| error.problem)
    }
}

/// Checks ports against each other and the uplink, and compiles their table.
///
/// # Errors
/// A [`MapError`] for each port refused, in their order.
pub fn compile(ports: &[PortConfig], uplink: Option<Uplink<'_>>) -> Result<Table, Vec<MapError>> {
    let refuse = |port: &PortConfig, key, problem| MapError {
        origin: port.origin.clone(),
        key: Some(key),
        problem,
    };
    let mut errors = Vec::new();
    let mut seen: HashMap<&str, &Origin> = HashMap::new();
    for port in ports {
        let device = port.device.clone();
        if let Some(uplink) = uplink.filter(|uplink| uplink.device == device) {
            let place = uplink.place.to_owned();
            errors.push(refuse(port, DEVICE, MapProblem::IsUplink { device, place }));
        } else if let Some(other) = seen.get(port.device.as_str()) {
            let problem = MapProblem::DeviceTwice { device, other: (*other).clone() };
            errors.push(refuse(port, DEVICE, problem));
        } else {
            seen.insert(&port.device, &port.origin);
        }
    }
    let mut left: Vec<&PortConfig> = ports.iter().collect();
    loop {
        let conflict = match Table::compile(left.iter().map(|port| &port.membership)) {
            Ok(table) if errors.is_empty() => {
                return Ok(table.with_police(left.iter().map(|port| Some(&port.police))));
            }
            Ok(_) => return Err(errors),
            Err(conflict) => conflict,
        };
        let (Some(first), Some(second)) = (left.get(conflict.first), left.get(conflict.second))
        else {
            return Err(errors);
        };
        // A device mapped twice is told as that already.
        if first.device != second.device {
            let problem = MapProblem::Overlap { what: conflict.what, other: first.origin.clone() };
            errors.push(refuse(second, VLAN, problem));
        }
        if errors.len() >= OVERLAPS_MAX {
            return Err(errors);
        }
        left.remove(conflict.second);
    }
}

/// Understands ports from any source, checks them against each other and the uplink,
/// and compiles their table.
///
/// # Errors
/// A [`MapError`] for each port refused: first those that make no sense on their
/// own, then those that clash with another.
pub fn build_all(
    specs: &[PortSpec],
    uplink: Option<Uplink<'_>>,
    default_tpid: Tpid,
) -> Result<(Vec<PortConfig>, Table), Vec<MapError>> {
    let mut errors = Vec::new();
    let mut ports = Vec::with_capacity(specs.len());
    for spec in specs {
        match spec.build(default_tpid) {
            Ok(port) => ports.push(port),
            Err(error) => errors.push(error),
        }
    }
    match compile(&ports, uplink) {
        Ok(table) if errors.is_empty() => return Ok((ports, table)),
        Ok(_) => {}
        Err(clashes) => errors.extend(clashes),
    }
    Err(errors)
}

/// Parses one map, as the control socket takes it.
///
/// # Errors
/// [`MapProblem`], for people.
pub fn parse(map: &str, default_tpid: Tpid) -> Result<PortConfig, MapProblem> {
    let spec = PortSpec::from_map(map, Origin::Control(map.to_owned()))?;
    spec.build(default_tpid).map_err(|error| error.problem)
}

/// Takes a map of the command line apart.
///
/// # Errors
/// [`MapError`].
pub fn argument(map: &str) -> Result<PortSpec, MapError> {
    let origin = || Origin::Argument(map.to_owned());
    PortSpec::from_map(map, origin()).map_err(|problem| MapError {
        origin: origin(),
        key: None,
        problem,
    })
}

/// Whether libvirt keeps this name for itself.
pub fn is_reserved(name: &str) -> bool {
    LIBVIRT_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// Parses `--tpid` and the options named so.
///
/// # Errors
/// [`MapProblem::BadValue`].
pub fn parse_tpid(option: &'static str, value: &str) -> Result<Tpid, MapProblem> {
    value
        .strip_prefix("0x")
        .and_then(|digits| u16::from_str_radix(digits, 16).ok())
        .and_then(Tpid::from_ethertype)
        .ok_or_else(|| bad_value(option, value, "choose 0x8100, 0x88a8, 0x9100 or 0x9200"))
}

fn bad_value(option: &'static str, value: &str, cure: &'static str) -> MapProblem {
    MapProblem::BadValue { option, value: value.to_owned(), cure }
}
