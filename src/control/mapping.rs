//! The mapping grammar of DESIGN §2: `VLANS=DEVICE[,OPTION...]` into a
//! [`PortConfig`]. Every refusal names the option, the value and the cure.

use crate::frame::{Pcp, Tpid, Vid};
use crate::switch::{Membership, MembershipError, Mode, Priority, Table, Vlans};
use nix::unistd::{Group, User};
use std::collections::HashMap;
use thiserror::Error;

/// Longest name of a network device, in bytes (`IFNAMSIZ` without its NUL).
pub const DEVICE_NAME_MAX: usize = 15;
/// Prefixes libvirt keeps for devices it names itself (`virnetdev.h`).
const LIBVIRT_PREFIXES: [&str; 4] = ["vnet", "vif", "macvtap", "macvlan"];
const OPTIONS: &str = "mode, native, tpid, inner-tpid, pcp, create, owner, group, queues, offload";

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

/// A tap we create.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TapConfig {
    /// User id that may open it.
    pub owner: Option<u32>,
    /// Group id that may open it.
    pub group: Option<u32>,
    /// Queues the VMM will open: more than one makes a multiqueue tap.
    pub queues: u16,
}

/// One port, as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// Name of the netdev.
    pub device: String,
    /// What it is.
    pub kind: DeviceKind,
    /// Its part in the VLANs.
    pub membership: Membership,
    /// The guest has no offloads (`offload=off`).
    pub offload_off: bool,
}

/// Why a mapping was refused.
#[derive(Debug, Error)]
#[error("--map {map}: {problem}")]
pub struct MapError {
    /// The mapping as typed.
    pub map: String,
    /// What is wrong with it and what to do.
    pub problem: MapProblem,
}

/// What can be wrong with a mapping.
#[derive(Debug, Error)]
pub enum MapProblem {
    /// No `=`.
    #[error("no '=' in it: write VLANS=DEVICE, for instance 101=tap-web1")]
    NoDevice,
    /// Not a VLAN, list, range or pair.
    #[error(
        "'{0}' is no VLAN: write a number from 0 to 4094, a list such as 200-210,300, or a pair such as 101.20"
    )]
    BadVlans(String),
    /// Outside 0..=4094.
    #[error("VLAN {0} is outside 0..4094 (4095 is reserved by IEEE 802.1Q)")]
    VlanRange(u32),
    /// VLAN 0 in a list or a pair.
    #[error("VLAN 0 (untagged) cannot be part of '{0}': map it on its own, as 0=DEVICE")]
    ZeroInside(String),
    /// A range that goes down.
    #[error("the range '{0}' goes down: write the smaller VLAN first")]
    BackwardRange(String),
    /// A VLAN twice in one list.
    #[error("VLAN {0} stands in the list twice: remove one")]
    TwiceInList(Vid),
    /// A name no device can have.
    #[error("'{name}' cannot name a device: {why}")]
    BadName {
        /// The name.
        name: String,
        /// Why not.
        why: &'static str,
    },
    /// We would create a device with a name of libvirt's.
    #[error(
        "the name '{0}' is reserved by libvirt (vnet*, vif*, macvtap*, macvlan*): choose another, or create=no if libvirt makes the device"
    )]
    ReservedName(String),
    /// No such option.
    #[error("unknown option '{0}': the options are {OPTIONS}")]
    UnknownOption(String),
    /// An option twice.
    #[error("option {0} is given twice: remove one")]
    OptionTwice(String),
    /// An option's value.
    #[error("{option}={value}: {cure}")]
    BadValue {
        /// The option.
        option: &'static str,
        /// The value.
        value: String,
        /// What it can be.
        cure: &'static str,
    },
    /// An option for taps we create, on something else.
    #[error("{option} is for taps that vlanswitchd creates: {cure}")]
    NotCreated {
        /// The option.
        option: &'static str,
        /// What to do.
        cure: &'static str,
    },
    /// No such user or group.
    #[error(
        "{option}={value}: this host has no such {option}; name an existing one, or its number"
    )]
    NoSuchAccount {
        /// `owner` or `group`.
        option: &'static str,
        /// The name.
        value: String,
    },
    /// A combination without sense.
    #[error(transparent)]
    Membership(#[from] MembershipError),
    /// The device is the uplink.
    #[error("{0} is the uplink itself: map another device")]
    IsUplink(String),
    /// The device has another mapping.
    #[error(
        "{device} is mapped already, by --map {other}: map each device once (a list of VLANs makes a trunk)"
    )]
    DeviceTwice {
        /// The device.
        device: String,
        /// The other mapping.
        other: String,
    },
    /// Another mapping has these frames.
    #[error("{what} belongs to --map {other} already: give each VLAN to one device")]
    Overlap {
        /// What both claim.
        what: String,
        /// The other mapping.
        other: String,
    },
}

/// Parses all mappings and checks them against each other and the uplink.
///
/// # Errors
/// [`MapError`] for the first mapping that is refused.
pub fn parse_all(
    maps: &[String],
    uplink: &str,
    default_tpid: Tpid,
) -> Result<(Vec<PortConfig>, Table), MapError> {
    let refuse = |map: &str, problem| MapError { map: map.to_owned(), problem };
    let mut ports = Vec::with_capacity(maps.len());
    let mut seen: HashMap<String, &str> = HashMap::new();
    for map in maps {
        let port = parse(map, default_tpid).map_err(|problem| refuse(map, problem))?;
        if port.device == uplink {
            return Err(refuse(map, MapProblem::IsUplink(port.device)));
        }
        if let Some(other) = seen.insert(port.device.clone(), map) {
            let (device, other) = (port.device, other.to_owned());
            return Err(refuse(map, MapProblem::DeviceTwice { device, other }));
        }
        ports.push(port);
    }
    let table = Table::compile(ports.iter().map(|port| &port.membership)).map_err(|conflict| {
        let map = |index: usize| maps.get(index).cloned().unwrap_or_default();
        let problem = MapProblem::Overlap { what: conflict.what, other: map(conflict.first) };
        refuse(&map(conflict.second), problem)
    })?;
    Ok((ports, table))
}

/// Parses one mapping.
///
/// # Errors
/// [`MapProblem`], for people.
pub fn parse(map: &str, default_tpid: Tpid) -> Result<PortConfig, MapProblem> {
    let (vlans, rest) = map.split_once('=').ok_or(MapProblem::NoDevice)?;
    let (device, options) =
        rest.split_once(',').map_or((rest, None), |(device, options)| (device, Some(options)));
    let vlans = parse_vlans(vlans)?;
    let (device, internal) = match device.strip_prefix("internal:") {
        Some(name) => (name, true),
        None => (device, false),
    };
    check_name(device)?;
    let options = Options::parse(options)?;
    let kind = device_kind(&options, internal)?;
    let mode = match options.get("mode") {
        None => None,
        Some("tunnel") => Some(Mode::Tunnel),
        Some("access") => Some(Mode::Access),
        Some("trunk") => Some(Mode::Trunk),
        Some(value) => return Err(bad_value("mode", value, "choose tunnel, access or trunk")),
    };
    let native = options.get("native").map(parse_vid).transpose()?;
    let tpid = options.get("tpid").map(|value| parse_tpid("tpid", value)).transpose()?;
    let inner_tpid =
        options.get("inner-tpid").map(|value| parse_tpid("inner-tpid", value)).transpose()?;
    let priority = match options.get("pcp") {
        None => Priority::Fixed(Pcp::default()),
        Some("copy") => Priority::Copy,
        Some(value) => value
            .parse()
            .ok()
            .and_then(Pcp::new)
            .map(Priority::Fixed)
            .ok_or_else(|| bad_value("pcp", value, "choose a priority from 0 to 7, or copy"))?,
    };
    let offload_off = match options.get("offload") {
        None | Some("auto") => false,
        Some("off") => true,
        Some(value) => return Err(bad_value("offload", value, "choose off or auto")),
    };
    let membership =
        Membership::new(vlans, mode, native, tpid.unwrap_or(default_tpid), inner_tpid, priority)?;
    Ok(PortConfig { device: device.to_owned(), kind, membership, offload_off })
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

fn check_name(name: &str) -> Result<(), MapProblem> {
    // What `dev_valid_name` in net/core/dev.c refuses, and what shells and
    // configuration files would trip over.
    let why = if name.is_empty() {
        "it is empty"
    } else if name.len() > DEVICE_NAME_MAX {
        "it is longer than 15 bytes"
    } else if matches!(name, "." | "..") {
        "the kernel refuses . and .."
    } else if name.contains(['/', ':', '%']) || name.contains(char::is_whitespace) {
        "it has a slash, colon, percent sign or space in it"
    } else if name.contains(char::is_control) {
        "it has a control character in it"
    } else {
        return Ok(());
    };
    Err(MapProblem::BadName { name: name.to_owned(), why })
}

fn parse_number(text: &str) -> Option<u32> {
    // `u32::from_str` would take "+5".
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

fn parse_vid(text: &str) -> Result<Vid, MapProblem> {
    let number = parse_number(text).ok_or_else(|| MapProblem::BadVlans(text.to_owned()))?;
    let vid = u16::try_from(number).ok().and_then(Vid::new);
    vid.ok_or(MapProblem::VlanRange(number))
}

fn parse_vlans(text: &str) -> Result<Vlans, MapProblem> {
    let nonzero = |part: &str| match parse_vid(part)? {
        Vid::NONE => Err(MapProblem::ZeroInside(text.to_owned())),
        vid => Ok(vid),
    };
    if let Some((outer, inner)) = text.split_once('.') {
        return Ok(Vlans::Double { outer: nonzero(outer)?, inner: nonzero(inner)? });
    }
    if !text.contains(['-', ',']) {
        return Ok(match parse_vid(text)? {
            Vid::NONE => Vlans::Untagged,
            vid => Vlans::One(vid),
        });
    }
    let mut vids = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (nonzero(first)?, nonzero(last)?);
        if first > last {
            return Err(MapProblem::BackwardRange(part.to_owned()));
        }
        vids.extend((first.get()..=last.get()).filter_map(Vid::new));
    }
    vids.sort_unstable();
    match vids.iter().zip(vids.iter().skip(1)).find(|(vid, next)| vid == next) {
        Some((vid, _)) => Err(MapProblem::TwiceInList(*vid)),
        None => Ok(Vlans::List(vids)),
    }
}

/// `key=value` pairs, each key known and given once.
struct Options<'t>(Vec<(&'t str, &'t str)>);

impl<'t> Options<'t> {
    fn parse(text: Option<&'t str>) -> Result<Self, MapProblem> {
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        for part in text.into_iter().flat_map(|text| text.split(',')) {
            let unknown = || MapProblem::UnknownOption(part.to_owned());
            let (key, value) = part.split_once('=').ok_or_else(unknown)?;
            if !OPTIONS.split(", ").any(|option| option == key) {
                return Err(unknown());
            }
            if pairs.iter().any(|(other, _)| *other == key) {
                return Err(MapProblem::OptionTwice(key.to_owned()));
            }
            pairs.push((key, value));
        }
        Ok(Self(pairs))
    }

    fn get(&self, key: &str) -> Option<&'t str> {
        self.0.iter().find(|(other, _)| *other == key).map(|(_, value)| *value)
    }
}

fn device_kind(options: &Options<'_>, internal: bool) -> Result<DeviceKind, MapProblem> {
    let create = match options.get("create") {
        None | Some("yes") => true,
        Some("no") => false,
        Some(value) => return Err(bad_value("create", value, "choose yes or no")),
    };
    let created = if internal {
        Err("drop it, an internal port's tap is held by vlanswitchd itself")
    } else if create {
        Ok(())
    } else {
        Err("drop it, or create=no")
    };
    if let Err(cure) = created {
        let given = ["owner", "group", "queues"].into_iter().find(|key| options.get(key).is_some());
        if let Some(option) = given {
            return Err(MapProblem::NotCreated { option, cure });
        }
    }
    if internal {
        return match options.get("create") {
            Some(_) => Err(MapProblem::NotCreated {
                option: "create",
                cure: "drop it, an internal port is always created",
            }),
            None => Ok(DeviceKind::Internal),
        };
    }
    let queues = match options.get("queues") {
        None => 1,
        // MAX_TAP_QUEUES in drivers/net/tun.c.
        Some(value) => match parse_number(value) {
            Some(queues @ 1..=256) => queues as u16,
            _ => return Err(bad_value("queues", value, "choose a number from 1 to 256")),
        },
    };
    let owner = options.get("owner").map(|value| account("owner", value)).transpose()?;
    let group = options.get("group").map(|value| account("group", value)).transpose()?;
    let create = create.then_some(TapConfig { owner, group, queues });
    Ok(DeviceKind::Netdev { create })
}

fn account(option: &'static str, value: &str) -> Result<u32, MapProblem> {
    if let Some(id) = parse_number(value) {
        return Ok(id);
    }
    let found = match option {
        "owner" => User::from_name(value).ok().flatten().map(|user| user.uid.as_raw()),
        _ => Group::from_name(value).ok().flatten().map(|group| group.gid.as_raw()),
    };
    found.ok_or_else(|| MapProblem::NoSuchAccount { option, value: value.to_owned() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
    use super::*;

    fn port(map: &str) -> PortConfig {
        parse(map, Tpid::Customer).unwrap_or_else(|problem| panic!("{map}: {problem}"))
    }

    #[test]
    fn the_grammar_of_the_design_is_understood() {
        let web = port("101=tap-web1");
        assert_eq!(web.device, "tap-web1");
        assert_eq!(web.membership.mode(), Mode::Tunnel);
        let tap = TapConfig { queues: 1, ..TapConfig::default() };
        assert_eq!(web.kind, DeviceKind::Netdev { create: Some(tap) });

        let trunk = port("200-202,300=tap-fw,native=300,pcp=copy,tpid=0x88a8,create=no");
        assert_eq!(trunk.membership.vlans().to_string(), "200-202,300");
        assert_eq!(trunk.membership.native(), Vid::new(300));
        assert_eq!(trunk.membership.tpid(), Tpid::Service);
        assert_eq!(trunk.membership.priority(), Priority::Copy);
        assert_eq!(trunk.kind, DeviceKind::Netdev { create: None });

        let pair = port("101.20=veth0,inner-tpid=0x88a8,mode=access");
        assert_eq!(pair.membership.vlans().to_string(), "101.20");
        assert_eq!(pair.membership.inner_tpid(), Tpid::Service);

        assert_eq!(port("0=tap0").membership.mode(), Mode::Access);
        assert_eq!(port("7=internal:leg").kind, DeviceKind::Internal);
        let tap = port("9=t,owner=0,group=root,queues=4,offload=off,pcp=5");
        assert!(tap.offload_off);
        let expected = TapConfig { owner: Some(0), group: Some(0), queues: 4 };
        assert_eq!(tap.kind, DeviceKind::Netdev { create: Some(expected) });
    }

    #[test]
    fn every_refusal_names_the_value_and_the_cure() {
        let cases = [
            ("tap-web1", "VLANS=DEVICE"),
            ("=tap", "'' is no VLAN"),
            ("+5=tap", "'+5' is no VLAN"),
            ("4095=tap", "VLAN 4095 is outside 0..4094"),
            ("70000=tap", "VLAN 70000 is outside"),
            ("5-=tap", "'' is no VLAN"),
            ("9-5=tap", "the range '9-5' goes down"),
            ("0,5=tap", "VLAN 0 (untagged) cannot be part of '0,5'"),
            ("0.5=tap", "VLAN 0 (untagged) cannot be part of"),
            ("1-5,3=tap", "VLAN 3 stands in the list twice"),
            ("1.2.3=tap", "'2.3' is no VLAN"),
            ("5=", "it is empty"),
            ("5=a-name-of-16-byte", "longer than 15 bytes"),
            ("5=a/b", "slash"),
            ("5=tap,", "unknown option ''"),
            ("5=tap,mtu=9", "unknown option 'mtu=9': the options are mode"),
            ("5=tap,mode=access,mode=trunk", "option mode is given twice"),
            ("5=tap,mode=bridge", "mode=bridge: choose tunnel, access or trunk"),
            ("5=tap,tpid=8100", "tpid=8100: choose 0x8100"),
            ("5=tap,pcp=8", "pcp=8: choose a priority from 0 to 7"),
            ("5=tap,create=maybe", "create=maybe: choose yes or no"),
            ("5=tap,queues=0", "queues=0: choose a number from 1 to 256"),
            ("5=tap,create=no,owner=root", "owner is for taps that vlanswitchd creates"),
            ("5=internal:leg,queues=2", "queues is for taps that vlanswitchd creates"),
            ("5=internal:leg,create=yes", "an internal port is always created"),
            ("5=tap,owner=nobody-of-that-name", "no such owner"),
            ("5=tap,native=5", "native=5 works with mode=trunk only"),
            ("5-6=tap,native=7", "native=7 is not one of the port's VLANs (5-6)"),
            ("5-6=tap,mode=access", "a list of VLANs needs mode=trunk"),
            ("0=tap,mode=tunnel", "works in mode=access only"),
            ("5.6=tap,mode=trunk", "not mode=trunk"),
            ("5=tap,inner-tpid=0x8100", "inner-tpid works with a tag pair"),
        ];
        for (map, expected) in cases {
            let message = parse(map, Tpid::Customer).err().map(|problem| problem.to_string());
            assert!(
                message.as_ref().is_some_and(|text| text.contains(expected)),
                "{map}: {message:?}"
            );
        }
    }

    #[test]
    fn mappings_are_checked_against_each_other() {
        let cases = [
            (["5=a", "6=a"], "a is mapped already, by --map 5=a"),
            (["5=a", "5=b"], "VLAN 5 (TPID 0x8100) belongs to --map 5=a already"),
            (["5=a", "5.6=b"], "VLAN 5 (TPID 0x8100) belongs to --map 5=a already"),
            (["5.6=a", "5.6=b"], "the tag pair 5.6"),
            (["5=a", "6=eth0"], "eth0 is the uplink itself"),
            (["5=a", "6=internal:a"], "a is mapped already"),
        ];
        for (maps, expected) in cases {
            let maps = maps.map(str::to_owned);
            let message = parse_all(&maps, "eth0", Tpid::Customer).unwrap_err().to_string();
            assert!(message.contains(expected), "{maps:?}: {message}");
            let second = maps.last().cloned().unwrap_or_default();
            assert!(message.starts_with(&format!("--map {second}: ")), "{message}");
        }
        let maps = ["5=a", "5=b,tpid=0x88a8", "0=c"].map(str::to_owned);
        let (ports, table) = parse_all(&maps, "eth0", Tpid::Customer).unwrap();
        assert_eq!((ports.len(), table.claims().len()), (3, 3));
    }
}
