//! What a switch may answer: an ordinary one, and one whose names and numbers are as
//! long as they can be.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};
use vlanswitchd::control::api::*;
use vlanswitchd::switch::DropReason;

/// Milliseconds since 1970, so long ago.
pub fn ago(time: Duration) -> u64 {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    (now - time).as_millis() as u64
}

const HOURS: Duration = Duration::from_secs(3 * 3600 + 60);

fn flow(frames: u64, drops: &[(&str, u64)]) -> Flow {
    let drops: BTreeMap<String, u64> =
        drops.iter().map(|(reason, frames)| ((*reason).to_owned(), *frames)).collect();
    let dropped: u64 = drops.values().sum();
    Flow {
        in_frames: frames + dropped,
        in_bytes: (frames + dropped) * 100,
        split_frames: 0,
        out_frames: frames,
        out_bytes: frames * 100,
        drops,
        send_error: None,
    }
}

pub fn port(name: &str, vlans: &str, state: &str) -> Port {
    let there = (state != "absent").then_some(());
    Port {
        name: name.to_owned(),
        vlans: vlans.to_owned(),
        mode: if vlans.contains('-') { "trunk" } else { "tunnel" }.to_owned(),
        map: format!("{vlans}={name}"),
        options: BTreeMap::new(),
        state: state.to_owned(),
        since: ago(HOURS),
        ifindex: there.map(|()| 12),
        mtu: there.map(|()| 1500),
        datapath: "packet".to_owned(),
        datapath_reason: None,
        worker: Some(0),
        ring_peak: 0.034,
        from_guest: flow(1_234_567, &[("vlan_not_allowed", 12)]),
        to_guest: flow(7_654_321, &[]),
    }
}

pub fn stats(time: u64) -> Stats {
    Stats {
        time,
        uplink: Uplink {
            name: "eth0".to_owned(),
            state: "up".to_owned(),
            since: ago(HOURS),
            ifindex: Some(2),
            mtu: Some(1500),
            mtu_needed: 1500,
            ring_peak: 0.2,
            from_wire: flow(15_308_642, &[("ring_overrun", 7)]),
            to_wire: Sent { out_frames: 2_469_134, out_bytes: 246_913_400 },
            unsent: 0,
        },
        ports: vec![
            port("tap-web1", "101", "attached"),
            port("tap-fw", "200-210,300", "no_carrier"),
            port("tap-db", "103", "absent"),
        ],
        removed: None,
        unmapped: vec![Unmapped { tpid: "0x8100".to_owned(), vid: 4000, frames: 9 }],
        workers: vec![Worker { load: 0.34, ..Worker::default() }],
    }
}

pub fn status() -> Status {
    Status {
        version: "0.1.0".to_owned(),
        pid: 4711,
        started: ago(HOURS),
        uplink: "eth0".to_owned(),
        uplink_state: "up".to_owned(),
        datapath: "packet".to_owned(),
        datapath_reason: None,
        ports: [("attached", 2), ("no_carrier", 1), ("down", 0)]
            .map(|(state, count)| (state.to_owned(), count))
            .into(),
        workers: vec![Worker { load: 0.34, ..Worker::default() }],
        config_file: Some("/etc/vlanswitchd/vlanswitchd.toml".to_owned()),
        clients: 2,
        captures: 1,
        kernel_segments_tagged: true,
        kernel_segments_udp: false,
        fallbacks: vec!["udp_segmentation".to_owned(), "clsact".to_owned()],
        netlink_overruns: 0,
    }
}

pub fn drops() -> Vec<Drop> {
    let drop = |device: &str, flow: &str, reason: DropReason, frames, seconds| Drop {
        device: device.to_owned(),
        flow: flow.to_owned(),
        reason: reason.name().to_owned(),
        frames,
        last_seen: ago(Duration::from_secs(seconds)),
        help: reason.help().to_owned(),
    };
    vec![
        drop("tap-web1", "to_guest", DropReason::GuestQueueFull, 4711, 7200),
        drop("tap-fw", "from_guest", DropReason::VlanNotAllowed, 12, 3 * 86400),
        drop("tap-db", "from_guest", DropReason::VlanNotAllowed, 3, 300),
        drop("eth0", "from_wire", DropReason::RingOverrun, 7, 400),
    ]
}

pub fn findings() -> Vec<Finding> {
    let finding = |severity, about: &str, what: &str, cure: Option<&str>| Finding {
        severity,
        about: about.to_owned(),
        what: what.to_owned(),
        cure: cure.map(str::to_owned),
    };
    vec![
        finding(
            Severity::Error,
            "eth0",
            "its MTU of 1500 leaves no room for the second tag of 101.20: full frames of the guests are lost",
            Some("start vlanswitchd with --set-uplink-mtu, or: ip link set eth0 mtu 1504"),
        ),
        finding(
            Severity::Warning,
            "tap-db",
            "there is no such device",
            Some("start the VM, or let vlanswitchd create the tap (create=yes)"),
        ),
        finding(Severity::Note, "VLAN 4000", "9 frames came, and no port claims them", None),
    ]
}

pub fn event(time: u64, kind: EventKind, device: Option<&str>, text: &str) -> EventReply {
    let device = device.map(str::to_owned);
    EventReply { event: Event { time, kind, device, text: text.to_owned() } }
}

/// As long as a device's name can be.
pub const LONG_NAME: &str = "tap-fifteenchar";

fn largest_flow(receives: bool) -> Flow {
    // The sum of the drops has 20 digits too, and does not overflow.
    let each = u64::MAX / 18;
    let reasons = DropReason::ALL.iter().filter(|_| receives);
    let mut drops: BTreeMap<String, u64> =
        reasons.map(|reason| (reason.name().to_owned(), each)).collect();
    if !receives {
        drops.insert(DropReason::UplinkQueueFull.name().to_owned(), u64::MAX);
    }
    Flow {
        in_frames: u64::MAX,
        in_bytes: u64::MAX,
        split_frames: u64::MAX,
        out_frames: u64::MAX,
        out_bytes: u64::MAX,
        drops,
        send_error: Some("EMSGSIZE: Message too long, as the kernel says it at length".to_owned()),
    }
}

pub fn largest_port() -> Port {
    Port {
        vlans: "100-110,120-130,140-150,160-170".to_owned(),
        map: format!("100-110,120-130,140-150,160-170={LONG_NAME},native=100,tpid=0x88a8,pcp=copy"),
        state: "no_carrier".to_owned(),
        since: 0,
        ifindex: Some(u32::MAX),
        mtu: Some(u32::MAX),
        ring_peak: 1.0,
        from_guest: largest_flow(true),
        to_guest: largest_flow(false),
        ..port(LONG_NAME, "100-110", "no_carrier")
    }
}

pub fn largest_stats(time: u64) -> Stats {
    let mut stats = stats(time);
    stats.uplink.name = "uplink-fifteen1".to_owned();
    stats.uplink.state = "no_carrier".to_owned();
    stats.uplink.from_wire = largest_flow(true);
    stats.uplink.to_wire = Sent { out_frames: u64::MAX, out_bytes: u64::MAX };
    stats.ports = vec![largest_port(), port("a", "1", "attached")];
    stats.unmapped = vec![Unmapped { tpid: "0x88a8".to_owned(), vid: 4094, frames: u64::MAX }];
    stats.workers = vec![Worker { load: 1.0, ..Worker::default() }; 4];
    stats
}

pub fn largest_status() -> Status {
    Status {
        pid: u32::MAX,
        started: 0,
        uplink: "uplink-fifteen1".to_owned(),
        uplink_state: "no_carrier".to_owned(),
        ports: ["absent", "attached", "down", "no_carrier"]
            .map(|state| (state.to_owned(), u64::MAX / 4))
            .into(),
        workers: vec![Worker { load: 1.0, ..Worker::default() }; 64],
        clients: u64::MAX,
        captures: u64::MAX,
        netlink_overruns: u64::MAX,
        ..status()
    }
}

pub fn largest_drops() -> Vec<Drop> {
    DropReason::ALL
        .iter()
        .map(|reason| Drop {
            device: LONG_NAME.to_owned(),
            flow: "from_guest".to_owned(),
            reason: reason.name().to_owned(),
            frames: u64::MAX,
            last_seen: 0,
            help: reason.help().repeat(2),
        })
        .collect()
}
