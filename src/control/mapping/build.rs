//! From the texts of a port to a port: the grammar of each value, and what goes
//! together.

use super::problem::MapProblem;
use super::spec::{DEVICE, PortSpec, VLAN};
use super::{
    Account, DEVICE_NAME_MAX, DeviceKind, PortConfig, TapConfig, bad_value, parse_tpid, police,
};
use crate::control::accounts;
use crate::frame::{Pcp, Tpid, Vid};
use crate::switch::{Membership, MembershipError, Mode, Priority, Vlans};

/// A problem and the key it is about.
pub(super) type Fault = (Option<&'static str>, MapProblem);

pub(super) fn at(key: &'static str) -> impl Fn(MapProblem) -> Fault {
    move |problem| (Some(key), problem)
}

pub(super) fn port(spec: &PortSpec, default_tpid: Tpid) -> Result<PortConfig, Fault> {
    let missing = |key, example| (None, MapProblem::Missing { key, example });
    let vlans = spec.get(VLAN).ok_or_else(|| missing(VLAN, "vlan = 101"))?;
    let vlans = parse_vlans(vlans).map_err(at(VLAN))?;
    let device = spec.get(DEVICE).ok_or_else(|| missing(DEVICE, "device = \"tap-web1\""))?;
    let (device, internal) = match device.strip_prefix("internal:") {
        Some(name) => (name, true),
        None => (device, false),
    };
    check_name(device).map_err(at(DEVICE))?;
    let kind = device_kind(spec, internal)?;
    let mode = mode(spec).map_err(at("mode"))?;
    let native = spec.get("native").map(parse_vid).transpose().map_err(at("native"))?;
    let tpid = |key: &'static str| {
        spec.get(key).map(|value| parse_tpid(key, value)).transpose().map_err(at(key))
    };
    let (outer_tpid, inner_tpid) = (tpid("tpid")?.unwrap_or(default_tpid), tpid("inner-tpid")?);
    let priority = priority(spec).map_err(at("pcp"))?;
    let offload_off = match spec.get("offload") {
        None | Some("auto") => false,
        Some("off") => true,
        Some(value) => {
            return Err(at("offload")(bad_value("offload", value, "choose off or auto")));
        }
    };
    let police = police::rule(spec)?;
    let membership = Membership::new(vlans, mode, native, outer_tpid, inner_tpid, priority)
        .map_err(|error| (key_at_fault(spec, &error), MapProblem::from(error)))?;
    let origin = spec.origin().clone();
    Ok(PortConfig { device: device.to_owned(), kind, membership, offload_off, police, origin })
}

fn mode(spec: &PortSpec) -> Result<Option<Mode>, MapProblem> {
    Ok(match spec.get("mode") {
        None => None,
        Some("tunnel") => Some(Mode::Tunnel),
        Some("access") => Some(Mode::Access),
        Some("trunk") => Some(Mode::Trunk),
        Some(value) => return Err(bad_value("mode", value, "choose tunnel, access or trunk")),
    })
}

fn priority(spec: &PortSpec) -> Result<Priority, MapProblem> {
    match spec.get("pcp") {
        None => Ok(Priority::Fixed(Pcp::default())),
        Some("copy") => Ok(Priority::Copy),
        Some(value) => value
            .parse()
            .ok()
            .and_then(Pcp::new)
            .map(Priority::Fixed)
            .ok_or_else(|| bad_value("pcp", value, "choose a priority from 0 to 7, or copy")),
    }
}

fn key_at_fault(spec: &PortSpec, error: &MembershipError) -> Option<&'static str> {
    let key = match error {
        MembershipError::UntaggedMode(_)
        | MembershipError::ListMode(_)
        | MembershipError::DoubleTrunk(_) => "mode",
        MembershipError::NativeWithoutTrunk(_) | MembershipError::NativeNotInList { .. } => {
            "native"
        }
        MembershipError::InnerTpidWithoutInner => "inner-tpid",
    };
    spec.get(key).map(|_| key)
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
    } else if name.contains(',') {
        "it has a comma in it, which begins the options of a map"
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

fn device_kind(spec: &PortSpec, internal: bool) -> Result<DeviceKind, Fault> {
    let not_created = |option, cure| at(option)(MapProblem::NotCreated { option, cure });
    let create = match spec.get("create") {
        None | Some("yes") => true,
        Some("no") => false,
        Some(value) => return Err(at("create")(bad_value("create", value, "choose yes or no"))),
    };
    let created = if internal {
        Err("drop it, an internal port's tap is held by vlanswitchd itself")
    } else if create {
        Ok(())
    } else {
        Err("drop it, or create=no")
    };
    if let Err(cure) = created {
        let given = ["owner", "group", "queues"].into_iter().find(|key| spec.get(key).is_some());
        if let Some(option) = given {
            return Err(not_created(option, cure));
        }
    }
    if internal {
        return match spec.get("create") {
            Some(_) => Err(not_created("create", "drop it, an internal port is always created")),
            None => Ok(DeviceKind::Internal),
        };
    }
    let queues = match spec.get("queues") {
        None => 1,
        // MAX_TAP_QUEUES in drivers/net/tun.c.
        Some(value) => match parse_number(value) {
            Some(queues @ 1..=256) => queues as u16,
            _ => {
                let problem = bad_value("queues", value, "choose a number from 1 to 256");
                return Err(at("queues")(problem));
            }
        },
    };
    let account = |option: &'static str| {
        spec.get(option).map(|value| account(option, value)).transpose().map_err(at(option))
    };
    let (owner, group) = (account("owner")?, account("group")?);
    let create = create.then_some(TapConfig { owner, group, queues });
    Ok(DeviceKind::Netdev { create })
}

fn account(option: &'static str, value: &str) -> Result<Account, MapProblem> {
    let found = match (parse_number(value), option) {
        (Some(id), _) => Some(id),
        (None, "owner") => accounts::id(accounts::Kind::User, value),
        (None, _) => accounts::id(accounts::Kind::Group, value),
    };
    match found {
        Some(id) => Ok(Account { id, given: value.to_owned() }),
        None => Err(MapProblem::NoSuchAccount { option, value: value.to_owned() }),
    }
}
