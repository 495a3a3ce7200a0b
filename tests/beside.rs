//! Beside what users have: VLAN devices on the same uplink, bonds and bridges as uplink,
//! guests of vhost-net, NICs that take tags out, wires that lose and reorder.
//!
//! Kernels need the modules 8021q, bonding, bridge, vhost_net and sch_netem for this:
//! `scripts/test kernels` runs it on Debian's.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::frames::{EXPERIMENTAL, Frame, TagBytes, tag};
use lab::hub::far_members;
use lab::ip::{self, Version, Vnet};
use lab::raw::OFFLOAD_TCP;
use lab::vhost::VhostGuest;
use lab::{Daemon, KernelGuest, Lab, RawGuest, Wire, eventually, scaled, transfer};

const MIB: u64 = 1 << 20;
const C101: TagBytes = tag(0x8100, 101);

fn start(lab: &Lab, uplink: &str) -> Daemon {
    Daemon::start(&lab.host, &["--uplink", uplink, "--log-format", "json", "--map", "101=t0"])
}

/// A guest behind `t0` on VLAN 101 of this uplink.
fn on_uplink(lab: &Lab, uplink: &str) -> (Daemon, RawGuest) {
    let daemon = start(lab, uplink);
    let guest = lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    (daemon, guest)
}

/// A frame each way.
fn assert_forwards(guest: &RawGuest, wire: &Wire, number: u64) {
    wire.send(&Frame::numbered(number).tags(&[C101]));
    assert_eq!(guest.receive_until(number), [Frame::numbered(number)]);
    let frame = Frame::numbered(number + 1).reversed();
    guest.send(&frame);
    let got = wire.receive_until(number + 1);
    assert_eq!(got.last(), Some(&frame.tags(&[C101])));
}

/// A VLAN that the host has a device for is not also a port's: both would get each frame.
#[test]
#[ignore = "needs root and 8021q"]
fn a_vlan_device_on_a_claimed_vlan_is_refused() {
    let lab = Lab::new();
    lab.host.ip("link add link up0 name up0.101 type vlan id 101");
    lab.host.ip("link add link up0 name stag type vlan protocol 802.1ad id 102");
    let refused = |map: &str, device: &str| {
        let failure = lab.failing_daemon(&["--uplink", "up0", "--control", "none", "--map", map]);
        assert_eq!(failure.code, Some(2), "{failure:?}");
        let named = failure.stderr.contains(&format!("VLAN device {device}"));
        assert!(named && failure.stderr.contains("ip link delete"), "{failure:?}");
        assert!(!lab.host.devices().contains(&"t0".to_owned()), "nothing was begun");
    };
    refused("101=t0", "up0.101");
    refused("100-103=t0", "up0.101");
    refused("101.20=t0", "up0.101");
    refused("102=t0,tpid=0x88a8", "stag");
    // The TPID is part of the key.
    lab.daemon(&["--map", "102=t0", "--map", "101=t1,tpid=0x88a8"]).stop();
}

/// What the host has on other VLANs goes on as before, while a neighbour is a port's.
#[test]
#[ignore = "needs root and 8021q"]
fn vlan_devices_on_other_vlans_are_left_alone() {
    let lab = Lab::new();
    lab.host.ip("link add link up0 name up0.102 type vlan id 102");
    lab.host.ip("link set up0.102 up");
    let (daemon, guest) = on_uplink(&lab, "up0");
    let wire = lab.wire();
    let stack = Wire::with_protocol(&lab.host, "up0.102", EXPERIMENTAL);
    for number in (0..40).step_by(4) {
        assert_forwards(&guest, &wire, number);
        wire.send(&Frame::numbered(number + 2).tags(&[tag(0x8100, 102)]));
        assert_eq!(stack.receive_until(number + 2), [Frame::numbered(number + 2)]);
        stack.send(&Frame::numbered(number + 3).reversed());
        let got = wire.receive_until(number + 3);
        assert_eq!(got, [Frame::numbered(number + 3).reversed().tags(&[tag(0x8100, 102)])]);
    }
    assert!(guest.receive_within(std::time::Duration::ZERO).is_none());
    let summary = daemon.stop();
    assert_eq!(summary.unmapped.get(&(0x8100, 102)), Some(&10));
}

/// One that appears later is told: the switch serves its guests on.
#[test]
#[ignore = "needs root and 8021q"]
fn a_vlan_device_made_later_on_a_claimed_vlan_is_told() {
    let lab = Lab::new();
    let (daemon, guest) = on_uplink(&lab, "up0");
    lab.host.ip("link add link up0 name up0.102 type vlan id 102");
    lab.host.ip("link add link up0 name up0.101 type vlan id 101");
    let line = eventually("a warning", || {
        daemon.stderr().into_iter().find(|line| line.contains("VLAN device"))
    });
    assert!(line.contains("up0.101") && line.contains("ip link delete up0.101"), "{line}");
    assert_forwards(&guest, &lab.wire(), 1);
    daemon.stop();
}

/// Two NICs behind one name, of which one fails.
#[test]
#[ignore = "needs root and bonding"]
fn a_bond_is_an_uplink_and_fails_over() {
    let lab = Lab::new();
    lab.host.ip(&format!("link add up1 type veth peer name far1 netns {}", lab.far.name()));
    lab.far.ip("link set far1 mtu 9000 up");
    lab.host.ip("link add bond0 type bond mode active-backup miimon 20");
    for device in ["up0", "up1"] {
        lab.host.ip(&format!("link set {device} down"));
        lab.host.ip(&format!("link set {device} master bond0"));
        lab.host.ip(&format!("link set {device} up"));
    }
    lab.host.ip("link set bond0 type bond active_slave up0");
    lab.host.ip("link set bond0 up");
    lab::guest::carrier(&lab.host, "bond0");
    let (daemon, guest) = on_uplink(&lab, "bond0");
    assert_forwards(&guest, &lab.wire(), 1);
    lab.far.ip("link set far0 down");
    let second = Wire::open(&lab.far, "far1");
    eventually("the other NIC takes over", || {
        let link = lab.host.link("bond0")?;
        (link["linkinfo"]["info_data"]["active_slave"] == "up1").then_some(())
    });
    assert_forwards(&guest, &second, 11);
    let summary = daemon.stop();
    assert_eq!(summary.port("t0").from_guest.all_drops(), 0);
}

/// Super-frames through a bond, whose features are those its NICs share.
#[test]
#[ignore = "needs root and bonding"]
fn tcp_passes_a_bond() {
    let lab = Lab::new();
    lab.host.ip("link add bond0 type bond mode active-backup");
    lab.host.ip("link set up0 down");
    lab.host.ip("link set up0 master bond0");
    lab.host.ip("link set bond0 up");
    lab.host.ip("link set up0 up");
    lab::guest::carrier(&lab.host, "bond0");
    tcp_on(&lab, "bond0");
}

/// The bridge a host has anyway, with the NIC as its port.
#[test]
#[ignore = "needs root and bridge"]
fn a_bridge_is_an_uplink() {
    let lab = Lab::new();
    lab.host.ip("link add br0 type bridge stp_state 0");
    lab.host.ip("link set up0 master br0");
    lab.host.ip("link set br0 up");
    lab::guest::carrier(&lab.host, "br0");
    let (daemon, guest) = on_uplink(&lab, "br0");
    for number in [1, 11, 21] {
        assert_forwards(&guest, &lab.wire(), number);
    }
    daemon.stop();
    drop(guest);
    tcp_on(&lab, "br0");
}

const GUEST: &str = "10.1.0.1";
const MEMBER: &str = "10.1.0.2";

/// TCP both ways between a guest on VLAN 101 of this uplink and the far end.
fn tcp_on(lab: &Lab, uplink: &str) {
    let daemon = start(lab, uplink);
    let guest = KernelGuest::open(&lab.host, "t0", OFFLOAD_TCP).address(&[&format!("{GUEST}/24")]);
    let member = far_members(lab, &[&[C101]]).pop().unwrap();
    let member = member.address(&[&format!("{MEMBER}/24")]);
    daemon.attached(&["t0"]);
    transfer::tcp(&guest.inside, &member.inside, MEMBER, scaled(256 * MIB));
    transfer::tcp(&member.inside, &guest.inside, GUEST, scaled(256 * MIB));
    let summary = daemon.stop();
    assert_eq!(summary.port("t0").from_guest.dropped("bad_offload"), 0);
    assert_eq!(summary.port("t0").to_guest.dropped("bad_offload"), 0);
}

/// A far end that sends by VLAN devices: tags travel beside the frame, as out of a NIC that
/// takes them out (or stay in it, where that is switched off).
#[test]
#[ignore = "needs root and 8021q"]
fn tags_arrive_the_same_beside_the_frame_and_in_it() {
    for (far, host) in [("on", "on"), ("on", "off"), ("off", "on"), ("off", "off")] {
        let lab = Lab::new();
        lab.host.ip("link set up0 mtu 1600");
        lab.far.tool("ethtool", &format!("-K far0 txvlan {far} tx-vlan-stag-hw-insert {far}"));
        lab.host.tool("ethtool", &format!("-K up0 rxvlan {host} rx-vlan-stag-hw-parse {host}"));
        lab.far.ip("link add link far0 name c101 type vlan id 101");
        lab.far.ip("link add link far0 name s200 type vlan protocol 802.1ad id 200");
        lab.far.ip("link add link s200 name s200c7 type vlan id 7");
        for device in ["c101", "s200", "s200c7"] {
            lab.far.ip(&format!("link set {device} up"));
        }
        let maps =
            ["--map", "101=t0", "--map", "200.7=t1,tpid=0x88a8", "--map", "200.8=t2,tpid=0x88a8"];
        let daemon = lab.daemon(&maps);
        let guests = [lab.raw_guest("t0"), lab.raw_guest("t1"), lab.raw_guest("t2")];
        daemon.attached(&["t0", "t1", "t2"]);
        let devices = ["c101", "s200c7", "s200"].map(|device| Wire::open(&lab.far, device));
        // What a device of the pair takes off or puts on, beside what the port does.
        let inner: [&[TagBytes]; 3] = [&[], &[], &[tag(0x8100, 8)]];
        for round in 0..5 {
            for (port, ((guest, device), inner)) in
                (0..).zip(guests.iter().zip(&devices).zip(inner))
            {
                let number = 10 * round + port;
                let frame = Frame::numbered(number).untagged_length(1000);
                device.send(&frame.clone().tags(inner));
                assert_eq!(guest.receive_until(number), [frame], "{far} {host}");
                let frame = Frame::numbered(100 + number).reversed();
                guest.send(&frame);
                let got = device.receive_until(100 + number);
                // Its own, behind what it sees of the device on top of it.
                assert_eq!(got.last(), Some(&frame.tags(inner)), "{far} {host}");
            }
        }
        daemon.stop();
    }
}

/// A real stack in a VLAN device at the far end, with GRO on the tags beside the frames.
#[test]
#[ignore = "needs root and 8021q"]
fn tcp_to_a_vlan_device_at_the_far_end() {
    let lab = Lab::new();
    lab.host.tool("ethtool", "-K up0 gro on");
    lab.far.ip("link add link far0 name c101 type vlan id 101");
    lab.far.ip(&format!("address add {MEMBER}/24 dev c101"));
    lab.far.ip("link set c101 mtu 1500 up");
    let daemon = lab.daemon(&["--map", "101=t0"]);
    let guest = KernelGuest::open(&lab.host, "t0", OFFLOAD_TCP).address(&[&format!("{GUEST}/24")]);
    daemon.attached(&["t0"]);
    transfer::tcp(&guest.inside, &lab.far, MEMBER, scaled(256 * MIB));
    transfer::tcp(&lab.far, &guest.inside, GUEST, scaled(256 * MIB));
    let summary = daemon.stop();
    let port = summary.port("t0");
    // Half of the frames are acknowledgements: the others are longer than the MTU.
    assert!(port.to_guest.out_bytes / port.to_guest.out_frames > 1518, "{:?}", port.to_guest);
}

/// A wire that loses, reorders, doubles and delays: TCP gets its bytes through, and every
/// frame that reached the switch is accounted for.
#[test]
#[ignore = "needs root and sch_netem"]
fn tcp_survives_a_wire_that_loses_and_reorders() {
    let lab = Lab::new();
    let netem = "root netem delay 1ms 300us loss 0.5% reorder 10% 50% duplicate 0.5%";
    lab.far.tc(&format!("qdisc replace dev far0 {netem}"));
    lab.host.tc(&format!("qdisc replace dev up0 {netem}"));
    let daemon = lab.daemon(&["--map", "101=t0"]);
    let guest = KernelGuest::open(&lab.host, "t0", OFFLOAD_TCP).address(&[&format!("{GUEST}/24")]);
    let member = far_members(&lab, &[&[C101]]).pop().unwrap();
    let member = member.address(&[&format!("{MEMBER}/24")]);
    daemon.attached(&["t0"]);
    transfer::tcp(&guest.inside, &member.inside, MEMBER, scaled(64 * MIB));
    transfer::tcp(&member.inside, &guest.inside, GUEST, scaled(64 * MIB));
    let summary = daemon.stop();
    assert_eq!(summary.port("t0").to_guest.all_drops(), 0);
    assert!(lab.host.tc("-s qdisc show dev up0").contains("netem"), "ours left it alone");
}

/// vhost-net sends from a thread of the kernel's, and takes several frames at once.
#[test]
#[ignore = "needs root and vhost_net"]
fn guests_of_vhost_net_send_and_receive() {
    let lab = Lab::new();
    let daemon = lab.daemon(&["--map", "101=t0"]);
    let mut guest = VhostGuest::open(&lab.host, "t0", OFFLOAD_TCP);
    daemon.attached(&["t0"]);
    let wire = lab.wire();
    for number in 0..100 {
        let frame = Frame::numbered(number).untagged_length(60 + 14 * number as usize);
        wire.send(&frame.clone().tags(&[C101]));
        let got = guest.receive_within(lab::PATIENCE).expect("it arrives");
        assert_eq!(got[10..], frame.bytes());
        guest.send(&[0; 10], &frame.clone().reversed().bytes());
        let got = wire.receive_within(lab::PATIENCE).expect("it arrives");
        assert_eq!(got, frame.reversed().tags(&[C101]).bytes());
    }
    // A super-frame each way: segments on the wire, and whole to a guest that takes them.
    lab.far.tool("ethtool", "-K far0 gro off");
    lab.host.tool("ethtool", "-K up0 tx off tso off");
    let whole = ip::tcp(Version::V4, 1, &[7; 9000]);
    let (header, frame) = ip::partial(&whole, Version::V4, 1000);
    guest.send(&header.bytes(), &frame.bytes());
    for _ in 0..9 {
        let got = wire.receive_within(lab::PATIENCE).expect("a segment");
        let got = Frame::read(&got);
        assert_eq!(got.tags, [C101]);
        assert_eq!(ip::checked_payload(&got).len(), 1000);
    }
    let sender = lab.far.enter(|| {
        let socket = lab::raw::PacketSocket::new();
        socket.set(libc::PACKET_VNET_HDR, 1i32).unwrap();
        socket.bind(lab::raw::index_of("far0"), 0).unwrap();
        socket
    });
    let tagged = frame.clone().tags(&[C101]);
    sender.send(&[&header.behind_tags(1).bytes(), tagged.bytes().as_slice()].concat()).unwrap();
    let got = guest.receive_within(lab::PATIENCE).expect("it arrives");
    assert_eq!(got[10..], frame.bytes());
    assert_eq!(Vnet::read(&got).gso_size, 1000);
    daemon.stop();
}
