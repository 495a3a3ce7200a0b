#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use super::super::{HostFacts, SwitchFacts};
use super::*;
use crate::control::api::{Sent, Stats, Status, Unmapped, Uplink, Worker};
use crate::control::links::{LinkDetails, VlanDevice};
use crate::control::mapping::{compile, parse};
use crate::frame::Tpid;
use crate::sys::ethtool::FeatureState;
use std::collections::BTreeMap;

const UPLINK: u32 = 2;
const TAP: u32 = 3;

fn link(index: u32, name: &str) -> LinkDetails {
    LinkDetails {
        state: LinkState {
            index,
            name: name.to_owned(),
            address: [2, 0, 0, 0, 0, 1],
            up: true,
            carrier: true,
            mtu: 1500,
            kind: None,
            master: None,
            is_ethernet: true,
            noarp: false,
            alias: None,
            tx_queue_len: 1000,
        },
        qdisc: Some("noqueue".to_owned()),
        vlan: None,
        gro_max_size: 65536,
    }
}

/// A host on which nothing is wrong, with this port on tap `t`.
fn healthy(map: &str) -> Facts {
    let config = parse(map, Tpid::Customer).unwrap();
    let table = compile(std::slice::from_ref(&config), None).unwrap();
    let uplink = Uplink {
        name: "eth0".to_owned(),
        state: "up".to_owned(),
        since: 0,
        ifindex: Some(UPLINK),
        mtu: Some(1600),
        mtu_needed: 1500,
        ring_peak: 0.0,
        from_wire: Flow::default(),
        to_wire: Sent::default(),
        unsent: 0,
    };
    let port = Port {
        name: "t".to_owned(),
        vlans: "101".to_owned(),
        mode: "tunnel".to_owned(),
        map: map.to_owned(),
        options: BTreeMap::new(),
        state: "attached".to_owned(),
        since: 0,
        ifindex: Some(TAP),
        mtu: Some(65521),
        datapath: "packet".to_owned(),
        datapath_reason: None,
        worker: Some(0),
        ring_peak: 0.1,
        from_guest: Flow::default(),
        to_guest: Flow::default(),
    };
    let status = Status {
        version: "1".to_owned(),
        pid: 1,
        started: 0,
        uplink: "eth0".to_owned(),
        uplink_state: "up".to_owned(),
        datapath: "packet".to_owned(),
        datapath_reason: None,
        ports: BTreeMap::new(),
        workers: vec![],
        config_file: None,
        clients: 1,
        captures: 0,
        kernel_segments_tagged: true,
        kernel_segments_udp: true,
        fallbacks: Vec::new(),
        netlink_overruns: 0,
    };
    let workers = vec![Worker { load: 0.2, ..Worker::default() }];
    let stats =
        Stats { time: 0, uplink, ports: vec![port], removed: None, unmapped: vec![], workers };
    let tap = TapSettings {
        multi_queue: false,
        vnet_header: true,
        persistent: true,
        ethernet: true,
        owner: None,
        group: None,
    };
    Facts {
        switch: SwitchFacts {
            status,
            stats,
            claims: table.claims().to_vec(),
            claims_untagged: table.claims_untagged(),
            ports: vec![config],
            samples: vec![],
        },
        host: HostFacts {
            links: vec![link(UPLINK, "eth0"), link(TAP, "t")],
            taps: BTreeMap::from([("t".to_owned(), tap)]),
            sealed: BTreeMap::from([(TAP, true)]),
            ..HostFacts::default()
        },
    }
}

/// What is found when one thing is wrong: exactly one finding beside none.
fn found(spoil: impl FnOnce(&mut Facts)) -> Finding {
    found_with("101=t", spoil)
}

fn found_with(map: &str, spoil: impl FnOnce(&mut Facts)) -> Finding {
    let mut facts = healthy(map);
    spoil(&mut facts);
    let mut all = findings(&facts);
    all.retain(|finding| finding.about != "vlanswitchd" || finding.severity != Note);
    assert_eq!(all.len(), 1, "{all:#?}");
    all.remove(0)
}

fn feature(facts: &mut Facts, name: &str, active: bool) {
    facts.host.features.insert(name.to_owned(), FeatureState { active, changeable: true });
}

#[test]
fn where_nothing_is_wrong_one_note_says_so() {
    let all = findings(&healthy("101=t"));
    assert_eq!(all.len(), 1, "{all:#?}");
    assert_eq!(all[0].severity, Note);
    assert!(all[0].what.starts_with("nothing is wrong: 1 ports"), "{all:?}");
}

#[test]
fn notes_alone_do_not_make_a_host_sick() {
    let mut facts = healthy("101=t");
    facts.switch.stats.ports[0].state = "no_carrier".to_owned();
    let all = findings(&facts);
    assert!(all[0].what.starts_with("nothing is wrong"), "{all:?}");
    facts.switch.stats.uplink.state = "down".to_owned();
    let all = findings(&facts);
    assert_eq!(all[0].severity, Error, "{all:?}");
    assert!(all.iter().all(|finding| !finding.what.starts_with("nothing is wrong")), "{all:?}");
}

/// Each row: what is wrong, how bad that is, what it is about, and a part of the cure.
#[test]
fn each_fault_is_found_by_itself() {
    let rows: Vec<(Finding, Severity, &str, &str)> = vec![
        (
            found(|facts| facts.host.missing_capabilities = vec!["CAP_BPF".to_owned()]),
            Error,
            "vlanswitchd",
            "AmbientCapabilities",
        ),
        (
            found(|facts| feature(facts, "rx-lro", true)),
            Error,
            "eth0",
            "ethtool -K eth0 rx-lro off",
        ),
        (
            found(|facts| feature(facts, "rx-vlan-filter", true)),
            Error,
            "eth0",
            "rx-vlan-filter off",
        ),
        (found(|facts| feature(facts, "rx-gro-list", true)), Warning, "eth0", "rx-gro-list off"),
        (found(|facts| feature(facts, "rx-gro", false)), Note, "eth0", "rx-gro on"),
        (
            found(|facts| {
                feature(facts, "rx-gro", true);
                feature(facts, "rx-vlan-hw-parse", false);
            }),
            Note,
            "eth0",
            "modprobe 8021q",
        ),
        (
            found(|facts| facts.host.links[0].gro_max_size = 190_000),
            Error,
            "eth0",
            "gro_max_size 65536",
        ),
        (found(|facts| facts.switch.stats.uplink.mtu = Some(1400)), Warning, "eth0", "mtu 1500"),
        (found(|facts| facts.switch.stats.uplink.mtu = Some(1500)), Note, "eth0", "mtu 1504"),
        (
            found_with("5.6=t,tpid=0x88a8", |facts| facts.switch.stats.uplink.mtu = Some(1504)),
            Warning,
            "eth0",
            "mtu 1508",
        ),
        (
            found(|facts| facts.switch.status.kernel_segments_tagged = false),
            Warning,
            "kernel",
            "5.19",
        ),
        (
            found(|facts| facts.switch.stats.uplink.state = "no_carrier".to_owned()),
            Error,
            "eth0",
            "cable",
        ),
        (
            found(|facts| facts.switch.stats.ports[0].state = "down".to_owned()),
            Warning,
            "t",
            "ip link set t up",
        ),
        (
            found(|facts| facts.switch.stats.ports[0].state = "no_carrier".to_owned()),
            Note,
            "t",
            "start the VM",
        ),
        (
            found(|facts| facts.host.links[1].state.master = Some(9)),
            Warning,
            "t",
            "ip link set t nomaster",
        ),
        (
            found(|facts| facts.host.addresses = vec![(TAP, "192.0.2.1".parse().unwrap())]),
            Warning,
            "t",
            "ip address flush dev t",
        ),
        (found_with("101=t,owner=77", |_| {}), Warning, "t", "ip link delete t"),
        (found_with("101=t,queues=4", |_| {}), Warning, "t", "ip link delete t"),
        (
            found(|facts| facts.host.links[1].qdisc = Some("fq_codel".to_owned())),
            Warning,
            "t",
            "root noqueue",
        ),
        (
            found(|facts| facts.host.links[1].state.tx_queue_len = 50),
            Warning,
            "t",
            "txqueuelen 1000",
        ),
        (
            found(|facts| facts.host.sealed = BTreeMap::from([(TAP, false)])),
            Error,
            "t",
            "ip link set t down",
        ),
        (found(|facts| facts.switch.stats.uplink.ring_peak = 0.9), Warning, "eth0", "more CPU"),
        (
            found(|facts| facts.switch.stats.workers[0].load = 0.95),
            Warning,
            "worker 0",
            "CPU of its own",
        ),
        (
            found(|facts| {
                let drops = &mut facts.switch.stats.ports[0].from_guest.drops;
                drops.insert("tagged_on_access".to_owned(), 7);
            }),
            Warning,
            "t",
            "use mode=tunnel or mode=trunk",
        ),
        (
            found_with("0=t,mode=access", |facts| {
                facts.host.addresses = vec![(UPLINK, "192.0.2.1".parse().unwrap())];
            }),
            Note,
            "eth0",
            "unmap 0",
        ),
    ];
    for (finding, severity, about, cure) in rows {
        assert_eq!((finding.severity, &*finding.about), (severity, about), "{finding:?}");
        assert!(finding.cure.as_deref().unwrap().contains(cure), "{finding:?}");
    }
}

#[test]
fn only_vlan_devices_on_claimed_vlans_of_the_uplink_are_in_the_way() {
    let device = |lower, tpid, vid| {
        let mut facts = healthy("101=t");
        let mut other = link(9, "eth0.101");
        other.vlan = Some(VlanDevice { lower, tpid, vid });
        facts.host.links.push(other);
        findings(&facts).into_iter().filter(|finding| finding.about == "eth0.101").count()
    };
    assert_eq!(device(UPLINK, 0x8100, 101), 1);
    assert_eq!(device(UPLINK, 0x8100, 102), 0);
    assert_eq!(device(UPLINK, 0x88a8, 101), 0);
    assert_eq!(device(TAP, 0x8100, 101), 0);
}

#[test]
fn vlans_nobody_mapped_are_told_with_a_sample_and_never_a_thousand() {
    let mut facts = healthy("101=t");
    facts.switch.stats.unmapped = (1..=100)
        .map(|vid| Unmapped { tpid: "0x8100".to_owned(), vid, frames: u64::from(vid) })
        .collect();
    facts.switch.samples =
        vec![Sample { tpid: "0x8100".to_owned(), vid: 100, source: [0x52, 0x54, 0, 0xff, 0, 1] }];
    let all = findings(&facts);
    let lines: Vec<&Finding> = all.iter().filter(|finding| finding.about == "eth0").collect();
    assert_eq!(lines.len(), UNMAPPED_LINES + 1);
    assert_eq!(
        lines[0].what,
        "VLAN 100 (0x8100) is on the wire and mapped to no port: 100 frames, the last from \
         52:54:00:ff:00:01"
    );
    assert_eq!(lines[10].what, "90 more VLANs are on the wire and mapped to no port");
}

#[test]
fn what_could_not_be_read_is_said() {
    let failed = found(|facts| facts.host.failures.push("no netlink".to_owned()));
    assert_eq!(failed.severity, Warning);
    assert!(failed.what.contains("no netlink"), "{failed:?}");
}
