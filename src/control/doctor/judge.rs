//! The judgement: facts in, findings out, nothing read.

use super::{Facts, Sample, finding};
use crate::control::api::{Finding, Flow, Port, Severity};
use crate::control::host::HARMFUL_FEATURES;
use crate::control::links::LinkState;
use crate::control::mapping::{DeviceKind, PortConfig, TapConfig};
use crate::switch::DropReason;
use crate::sys::tap::TapSettings;
use Severity::{Error, Note, Warning};
use std::net::IpAddr;

/// VLANs nobody mapped that get a line each.
const UNMAPPED_LINES: usize = 10;
/// A guest's queue of fewer frames than this drops in every burst.
const SHORT_QUEUE: u32 = 256;
/// The largest super-frame the rings take, in bytes.
const SUPER_FRAME_MAX: u32 = 65536;
/// A ring that was this full is about to overrun.
const RING_NEARLY_FULL: f64 = 0.8;

/// Everything worth telling, the worst first.
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let checks: [fn(&Facts) -> Vec<Finding>; 12] = [
        capabilities,
        uplink_state,
        uplink_features,
        uplink_mtu,
        kernel,
        port_states,
        ports_devices,
        seals,
        vlan_devices,
        rings,
        drops,
        unmapped,
    ];
    let mut found: Vec<Finding> = checks.iter().flat_map(|check| check(facts)).collect();
    found.extend(facts.host.failures.iter().map(|failure| {
        finding(Warning, "doctor", format!("could not look at everything: {failure}"), None)
    }));
    if found.iter().all(|finding| finding.severity == Note) {
        let ports = facts.switch.ports.len();
        found.insert(
            0,
            finding(
                Note,
                "vlanswitchd",
                format!("nothing is wrong: {ports} ports, all checked"),
                None,
            ),
        );
    }
    found.sort_by_key(|finding| finding.severity);
    found
}

fn capabilities(facts: &Facts) -> Vec<Finding> {
    let missing = &facts.host.missing_capabilities;
    if missing.is_empty() {
        return Vec::new();
    }
    vec![finding(
        Error,
        "vlanswitchd",
        format!("it lacks {}", missing.join(", ")),
        Some("run it as root, or under systemd with AmbientCapabilities=".to_owned()),
    )]
}

fn uplink_state(facts: &Facts) -> Vec<Finding> {
    let uplink = &facts.switch.stats.uplink;
    let name = &uplink.name;
    let (what, cure) = match uplink.state.as_str() {
        "absent" => {
            ("the uplink is missing", "create it, or look for its driver in dmesg".to_owned())
        }
        "down" => ("the uplink is down", format!("`ip link set {name} up`")),
        "no_carrier" => {
            ("the uplink has no carrier", "look at the cable and the switch's port".to_owned())
        }
        _ => return Vec::new(),
    };
    vec![finding(Error, name, what, Some(cure))]
}

fn uplink_features(facts: &Facts) -> Vec<Finding> {
    let name = &facts.switch.stats.uplink.name;
    let features = &facts.host.features;
    let active = |feature: &str| features.get(feature).is_some_and(|state| state.active);
    let switch = |feature: &str, to: &str| Some(format!("`ethtool -K {name} {feature} {to}`"));
    let mut found = Vec::new();
    for feature in HARMFUL_FEATURES.into_iter().filter(|feature| active(feature)) {
        let what = format!("{feature} is on: the NIC loses or merges frames of mapped VLANs");
        found.push(finding(Error, name, what, switch(feature, "off")));
    }
    if active("rx-gro-list") {
        let what = "rx-gro-list is on: super-frames come in a form that packet sockets cannot pass on whole";
        found.push(finding(Warning, name, what, switch("rx-gro-list", "off")));
    }
    for (feature, costs) in [
        ("rx-gro", "frames from the wire come one by one, which costs CPU for each"),
        ("tx-generic-segmentation", "super-frames of guests are cut before they are sent"),
        ("tx-tcp-segmentation", "the CPU cuts guests' super-frames, not the NIC"),
    ] {
        // What the driver cannot do is not worth a word.
        let off = features.get(feature).is_some_and(|state| !state.active && state.changeable);
        if off {
            found.push(finding(
                Note,
                name,
                format!("{feature} is off: {costs}"),
                switch(feature, "on"),
            ));
        }
    }
    let tags_stay = features.get("rx-vlan-hw-parse").is_some_and(|state| !state.active);
    if tags_stay && active("rx-gro") && !facts.host.has_8021q {
        let what = "tagged frames from the wire are not merged by GRO: the NIC leaves the tag in, and \
                    the kernel's 8021q, which knows it there, is not loaded";
        found.push(finding(Note, name, what, Some("`modprobe 8021q`".to_owned())));
    }
    let link = facts.switch.stats.uplink.ifindex.and_then(|index| facts.host.link(index));
    if let Some(size) = link.map(|link| link.gro_max_size).filter(|size| *size > SUPER_FRAME_MAX) {
        let what = format!(
            "GRO makes super-frames of up to {size} bytes: those over {SUPER_FRAME_MAX} are lost"
        );
        let cure = format!("`ip link set {name} gro_max_size 65536 gro_ipv4_max_size 65536`");
        found.push(finding(Error, name, what, Some(cure)));
    }
    found
}

fn uplink_mtu(facts: &Facts) -> Vec<Finding> {
    let uplink = &facts.switch.stats.uplink;
    let Some(mtu) = uplink.mtu else { return Vec::new() };
    let need = facts.switch.mtu_needed();
    let name = &uplink.name;
    let cure =
        |needed| Some(format!("`ip link set {name} mtu {needed}`, or start with --set-uplink-mtu"));
    if need.required > mtu {
        let what = format!(
            "its MTU of {mtu} is too small for full-size frames of guests with MTU 1500 behind the \
             configured tags: it takes {}",
            need.required
        );
        return vec![finding(Warning, name, what, cure(need.required))];
    }
    if need.with_guest_tag > mtu {
        let what = format!(
            "guests with MTU 1500 that add VLAN tags of their own need an MTU of {}; it is {mtu}",
            need.with_guest_tag
        );
        return vec![finding(Note, name, what, cure(need.with_guest_tag))];
    }
    Vec::new()
}

fn kernel(facts: &Facts) -> Vec<Finding> {
    let status = &facts.switch.status;
    let mut found = Vec::new();
    if !status.kernel_segments_tagged {
        let what =
            "it loses super-frames with VLAN tags; they are cut in userspace, which costs CPU";
        let cure = "Linux 5.19, 5.15.86, 5.10.163 or newer".to_owned();
        found.push(finding(Warning, "kernel", what, Some(cure)));
    }
    if !status.kernel_segments_udp {
        let what = "it takes no UDP super-frames; they are cut in userspace, which costs CPU";
        found.push(finding(Note, "kernel", what, Some("Linux 6.2 or newer".to_owned())));
    }
    found
}

fn port_states(facts: &Facts) -> Vec<Finding> {
    let ports = facts.switch.stats.ports.iter();
    ports
        .filter_map(|port| {
            let name = &port.name;
            let (severity, what, cure) = match port.state.as_str() {
                "absent" => (
                    Note,
                    "its device does not exist; it is attached when it appears",
                    "start the VM that makes it, or look for a wrong name in the map".to_owned(),
                ),
                "down" => (
                    Warning,
                    "its device is down, and its guest without network",
                    format!("`ip link set {name} up`"),
                ),
                "no_carrier" => (
                    Note,
                    "nobody has it open: its VM is off, or uses another device",
                    format!(
                        "start the VM, or compare its configuration with `ip link show {name}`"
                    ),
                ),
                _ => return None,
            };
            Some(finding(severity, name, what, Some(cure)))
        })
        .collect()
}

/// What is to be known of a port's device, when it is attached and at any time.
pub fn port_notes(
    port: &PortConfig,
    link: &LinkState,
    tap: Option<&TapSettings>,
    master: Option<&str>,
    addresses: &[IpAddr],
) -> Vec<Finding> {
    let mut found = device_notes(link, master, addresses);
    if let (DeviceKind::Netdev { create: Some(wanted) }, Some(tap)) = (&port.kind, tap) {
        found.extend(tap_notes(&port.device, wanted, tap));
    }
    found
}

/// What the host does with a device that it should not do with a port's; `master` is the
/// name of the bridge or bond it is in.
pub fn device_notes(link: &LinkState, master: Option<&str>, addresses: &[IpAddr]) -> Vec<Finding> {
    let name = &link.name;
    let mut found = Vec::new();
    if link.master.is_some() {
        let master = master.unwrap_or("a bridge or bond");
        let what = format!(
            "is a port of {master}, which no longer gets the guest's frames, while the guest still \
             gets all that {master} floods, from outside its VLAN"
        );
        found.push(finding(Warning, name, what, Some(format!("`ip link set {name} nomaster`"))));
    }
    let addresses: Vec<String> = addresses
        .iter()
        .filter(|address| !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()))
        .map(IpAddr::to_string)
        .collect();
    if !addresses.is_empty() {
        let what = format!(
            "has host addresses ({}), which no longer work, because the host is sealed off",
            addresses.join(", ")
        );
        let cure = format!("`ip address flush dev {name}`, or map internal:NAME for a host leg");
        found.push(finding(Warning, name, what, Some(cure)));
    }
    found
}

/// How a tap that exists differs from the one we would have created: a VMM that cannot
/// open it says little about why.
pub fn tap_notes(name: &str, wanted: &TapConfig, tap: &TapSettings) -> Vec<Finding> {
    let cure = format!("remove it with `ip link delete {name}` and vlanswitchd creates it anew");
    let mut found = Vec::new();
    if wanted.queues > 1 && !tap.multi_queue {
        let what = format!(
            "queues={} asks for a multiqueue tap, but it exists with one queue",
            wanted.queues
        );
        found.push(finding(Warning, name, what, Some(cure.clone())));
    }
    if wanted.queues == 1 && tap.multi_queue {
        let what = "exists as a multiqueue tap, which a VM with one queue cannot open";
        found.push(finding(Warning, name, what, Some(format!("say queues=N, or {cure}"))));
    }
    for (option, wanted, found_id) in
        [("owner", &wanted.owner, tap.owner), ("group", &wanted.group, tap.group)]
    {
        let wanted = wanted.as_ref().map(|account| account.id);
        if wanted.is_some() && wanted != found_id {
            let is = found_id.map_or_else(|| "none".to_owned(), |id| id.to_string());
            let what = format!("its {option} is {is}, not the one asked for");
            found.push(finding(Warning, name, what, Some(cure.clone())));
        }
    }
    found
}

fn ports_devices(facts: &Facts) -> Vec<Finding> {
    let mut found = Vec::new();
    for (port, config) in configured(facts) {
        let Some(link) = port.ifindex.and_then(|index| facts.host.link(index)) else { continue };
        let state = &link.state;
        let tap = facts.host.taps.get(&port.name);
        let addresses = facts.host.addresses_of(state.index);
        let master = state.master.and_then(|index| facts.host.link(index));
        let master = master.map(|master| master.state.name.as_str());
        found.extend(port_notes(config, state, tap, master, &addresses));
        if tap.is_none() {
            continue;
        }
        if let Some(qdisc) = link.qdisc.as_deref().filter(|kind| *kind != "noqueue") {
            let what = format!(
                "its queueing discipline is {qdisc}: frames its guest has no room for vanish uncounted"
            );
            let cure = format!("`tc qdisc replace dev {} root noqueue`", port.name);
            found.push(finding(Warning, &port.name, what, Some(cure)));
        }
        if state.tx_queue_len < SHORT_QUEUE {
            let what = format!(
                "its guest's queue has room for {} frames, less than a burst",
                state.tx_queue_len
            );
            let cure = format!("`ip link set {} txqueuelen 1000`", port.name);
            found.push(finding(Warning, &port.name, what, Some(cure)));
        }
    }
    found
}

/// Ports with their configurations.
fn configured(facts: &Facts) -> impl Iterator<Item = (&Port, &PortConfig)> {
    let ports = facts.switch.stats.ports.iter();
    ports.filter_map(|port| {
        let config = facts.switch.ports.iter().find(|config| config.device == port.name)?;
        Some((port, config))
    })
}

fn seals(facts: &Facts) -> Vec<Finding> {
    configured(facts)
        .filter(|(port, config)| {
            let sealed = port.ifindex.and_then(|index| facts.host.sealed.get(&index));
            config.kind != DeviceKind::Internal && sealed == Some(&false)
        })
        .map(|(port, _)| {
            let name = &port.name;
            let what = "its seal is missing: the guest's frames reach the host's IP stack";
            let cure =
                format!("`ip link set {name} down` stops them; restart vlanswitchd to seal it");
            finding(Error, name, what, Some(cure))
        })
        .collect()
}

/// VLAN devices of the host on VLANs that a port claims: both get every frame.
fn vlan_devices(facts: &Facts) -> Vec<Finding> {
    let uplink = &facts.switch.stats.uplink;
    let claimed = |tpid: u16, vid: u16| {
        let mut claims = facts.switch.claims.iter();
        claims.any(|(claim, id)| claim.ethertype() == tpid && id.get() == vid)
    };
    let mut found = Vec::new();
    for link in &facts.host.links {
        let Some(vlan) = link.vlan.filter(|vlan| Some(vlan.lower) == uplink.ifindex) else {
            continue;
        };
        if claimed(vlan.tpid, vlan.vid) {
            let name = &link.state.name;
            let what = format!(
                "is a VLAN device of the host on VLAN {} of {}, which a port claims too: both get every frame",
                vlan.vid, uplink.name
            );
            let cure =
                format!("`ip link delete {name}`; for a host leg map {}=internal:NAME", vlan.vid);
            found.push(finding(Warning, name, what, Some(cure)));
        }
    }
    let addresses = uplink.ifindex.map(|index| facts.host.addresses_of(index)).unwrap_or_default();
    if facts.switch.claims_untagged && !addresses.is_empty() {
        let what =
            "untagged frames are mapped to a port, and the host has addresses here: both get them";
        let cure = "give the host a leg of its own by a tagged VLAN, or unmap 0".to_owned();
        found.push(finding(Note, &uplink.name, what, Some(cure)));
    }
    found
}

fn rings(facts: &Facts) -> Vec<Finding> {
    let stats = &facts.switch.stats;
    let ports = stats.ports.iter().map(|port| (&port.name, port.ring_peak));
    let mut found: Vec<Finding> = ports
        .chain([(&stats.uplink.name, stats.uplink.ring_peak)])
        .filter(|(_, peak)| *peak >= RING_NEARLY_FULL)
        .map(|(name, peak)| {
            let what =
                format!("its receive ring was {:.0} % full within the last second", peak * 100.0);
            finding(
                Warning,
                name,
                what,
                Some("the switch needs more CPU, or the sender a limit".to_owned()),
            )
        })
        .collect();
    for (number, worker) in stats.workers.iter().enumerate() {
        if worker.load >= RING_NEARLY_FULL {
            let what = format!("it moved frames {:.0} % of the last second", worker.load * 100.0);
            let cure = "give it a CPU of its own".to_owned();
            found.push(finding(Warning, &format!("worker {number}"), what, Some(cure)));
        }
    }
    found
}

fn drops(facts: &Facts) -> Vec<Finding> {
    let stats = &facts.switch.stats;
    let mut found = drops_of(&stats.uplink.name, "from the wire", &stats.uplink.from_wire);
    for port in &stats.ports {
        found.extend(drops_of(&port.name, "from the guest", &port.from_guest));
        found.extend(drops_of(&port.name, "to the guest", &port.to_guest));
    }
    found
}

fn drops_of(name: &str, direction: &str, flow: &Flow) -> Vec<Finding> {
    let rows = flow.drops.iter().filter(|(_, frames)| **frames > 0);
    rows.map(|(reason, frames)| {
        let known = DropReason::ALL.into_iter().find(|known| known.name() == reason);
        let mut what = format!("dropped {frames} frames {direction} as {reason} since the start");
        if let (Some(DropReason::SendFailed), Some(error)) = (known, &flow.send_error) {
            what = format!("{what}, the last with {error}");
        }
        finding(
            known.map_or(Warning, severity_of),
            name,
            what,
            known.map(|known| known.help().to_owned()),
        )
    })
    .collect()
}

/// What is meant to drop, or ends by itself, is no fault.
fn severity_of(reason: DropReason) -> Severity {
    match reason {
        DropReason::GuestAbsent
        | DropReason::UplinkDown
        | DropReason::SpoofedMac
        | DropReason::RateLimited
        | DropReason::StormLimited
        | DropReason::UnmappedVlan
        | DropReason::VlanNotAllowed
        | DropReason::Malformed => Note,
        DropReason::TaggedOnAccess
        | DropReason::InnerTag
        | DropReason::UntaggedOnTrunk
        | DropReason::TooLong
        | DropReason::BadOffload
        | DropReason::GuestQueueFull
        | DropReason::UplinkQueueFull
        | DropReason::RingOverrun
        | DropReason::SendFailed
        | DropReason::WrongWorker => Warning,
    }
}

fn unmapped(facts: &Facts) -> Vec<Finding> {
    let mut rows: Vec<_> = facts.switch.stats.unmapped.iter().collect();
    rows.sort_by_key(|row| (std::cmp::Reverse(row.frames), &row.tpid, row.vid));
    let name = &facts.switch.stats.uplink.name;
    let mut found: Vec<Finding> = rows
        .iter()
        .take(UNMAPPED_LINES)
        .map(|row| {
            let samples = &facts.switch.samples;
            let sample = samples.iter().find(|it| it.tpid == row.tpid && it.vid == row.vid);
            let from =
                sample.map(|it| format!(", the last from {}", address(it))).unwrap_or_default();
            let what = format!(
                "VLAN {} ({}) is on the wire and mapped to no port: {} frames{from}",
                row.vid, row.tpid, row.frames
            );
            let cure = format!("--map {}=DEVICE, or prune it on the switch", row.vid);
            finding(Note, name, what, Some(cure))
        })
        .collect();
    if let Some(more) = rows.len().checked_sub(UNMAPPED_LINES).filter(|more| *more > 0) {
        let what = format!("{more} more VLANs are on the wire and mapped to no port");
        found.push(finding(Note, name, what, Some("`vlanswitchctl stats` lists them".to_owned())));
    }
    found
}

fn address(sample: &Sample) -> String {
    let bytes: Vec<String> = sample.source.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(":")
}

#[cfg(test)]
#[path = "judge_tests.rs"]
mod tests;
