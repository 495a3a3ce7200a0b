//! Checksum and segmentation offloads end to end: real TCP and UDP stacks on both
//! sides with super-frames passing whole, guests without offloads, merged tunnels.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::frames::{Frame, TagBytes, tag};
use lab::hub::{far_members, tag_everything};
use lab::ip::{self, Version, Vnet};
use lab::raw::{OFFLOAD_TCP, OFFLOAD_USO, PacketSocket, index_of, open_tap, read_tap, write_tap};
use lab::tunnel::{Tunnel, merge_on_arrival};
use lab::{
    Daemon, KernelGuest, Lab, Namespace, Wire, eventually, kernel_is_at_least, scaled, transfer,
};
use std::fs::File;

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

const C101: TagBytes = tag(0x8100, 101);
const C20: TagBytes = tag(0x8100, 20);
const S101: TagBytes = tag(0x88a8, 101);

/// A guest behind `t0` and a stack at the far end in its VLAN, addressed.
struct Pair {
    member: Namespace,
    guest: KernelGuest,
    daemon: Daemon,
    lab: Lab,
}

const GUEST_V4: &str = "10.1.0.1";
const GUEST_V6: &str = "fd01::1";
const MEMBER_V4: &str = "10.1.0.2";
const MEMBER_V6: &str = "fd01::2";

impl Pair {
    fn new(map: &str, vlan: &[TagBytes], offload: u32) -> Self {
        let lab = Lab::new();
        let daemon = lab.daemon(&["--map", map, "--set-uplink-mtu=1504"]);
        let guest = KernelGuest::open(&lab.host, "t0", offload);
        let guest = guest.address(&[&format!("{GUEST_V4}/24"), &format!("{GUEST_V6}/64")]);
        let member = far_members(&lab, &[vlan]).pop().unwrap();
        let member = member.address(&[&format!("{MEMBER_V4}/24"), &format!("{MEMBER_V6}/64")]);
        daemon.attached(&["t0"]);
        Self { member: member.inside, guest, daemon, lab }
    }

    /// TCP both ways over both IPs.
    fn tcp(&self, bytes: u64) {
        let (guest, member) = (&self.guest.inside, &self.member);
        let bytes = scaled(bytes);
        transfer::tcp(guest, member, MEMBER_V4, bytes);
        transfer::tcp(member, guest, GUEST_V4, bytes);
        transfer::tcp(guest, member, MEMBER_V6, bytes);
        transfer::tcp(member, guest, GUEST_V6, bytes);
    }

    /// Fails unless frames on average were far above the MTU each way, that is,
    /// unless super-frames passed whole.
    fn assert_super_frames(self) {
        let said = self.daemon.stderr();
        let segments = [&self.guest.inside, &self.member].map(Namespace::tcp_segments);
        let summary = self.daemon.stop();
        let port = summary.port("t0");
        for (flow, sent) in [&port.from_guest, &port.to_guest].into_iter().zip(segments) {
            // Half of the frames are acknowledgements of the other direction.
            let mean = flow.out_bytes / flow.out_frames;
            // A slow processor's stack sends smaller ones, and veth merges none before 5.13:
            // what remains is that several segments were one frame.
            let whole =
                if scaled(MIB) < MIB { sent * 5 > flow.out_frames * 6 } else { mean > 3000 };
            assert!(whole, "{mean} bytes a frame, {sent} segments sent: {flow:?}, {said:#?}");
            assert_eq!(flow.dropped("bad_offload"), 0);
        }
        drop(self.lab);
    }
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_gibibyte_of_tcp_each_way_through_one_tag() {
    let pair = Pair::new("101=t0", &[C101], OFFLOAD_TCP);
    pair.tcp(GIB);
    pair.assert_super_frames();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_gibibyte_of_tcp_each_way_with_the_guests_own_tag_inside() {
    let pair = Pair::new("101=t0", &[C101, C20], OFFLOAD_TCP);
    tag_everything(&pair.guest.inside, "eth0", C20);
    pair.tcp(GIB);
    pair.assert_super_frames();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_gibibyte_of_tcp_each_way_through_qinq() {
    let pair = Pair::new("101.20=t0,tpid=0x88a8", &[S101, C20], OFFLOAD_TCP);
    pair.tcp(GIB);
    pair.assert_super_frames();
}

/// A kernel that loses tagged super-frames: they are cut by us, correctly, and counted. Made
/// of any kernel by taking away what the start-up probe needs.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn what_the_kernel_may_not_segment_is_cut_and_counted() {
    for (map, vlan) in [("101=t0", vec![C101]), ("101.20=t0,tpid=0x88a8", vec![S101, C20])] {
        let lab = Lab::new();
        let without = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"];
        let arguments = ["--uplink", "up0", "--log-format", "json", "--datapath", "packet"];
        let arguments = [&arguments[..], &["--map", map, "--set-uplink-mtu=1504"]].concat();
        let program = lab::daemon::binary();
        let daemon = Daemon::start_program(&lab.host, &without, &program, &arguments);
        assert!(daemon.stderr().iter().any(|line| line.contains("segmented in userspace")));
        let guest = KernelGuest::open(&lab.host, "t0", OFFLOAD_TCP);
        let guest = guest.address(&[&format!("{GUEST_V4}/24"), &format!("{GUEST_V6}/64")]);
        let member = far_members(&lab, &[&vlan]).pop().unwrap();
        let member = member.address(&[&format!("{MEMBER_V4}/24"), &format!("{MEMBER_V6}/64")]);
        daemon.attached(&["t0"]);
        let pair = Pair { member: member.inside, guest, daemon, lab };
        pair.tcp(64 * MIB);
        transfer::udp(&pair.guest.inside, &pair.member, MEMBER_V4, 1200, 4);
        let summary = pair.daemon.stop();
        let port = summary.port("t0");
        assert!(port.from_guest.split_frames > 0, "{map}: {:?}", port.from_guest);
        assert_eq!(port.from_guest.all_drops(), 0, "{map}");
        assert_eq!(port.to_guest.dropped("bad_offload"), 0, "{map}");
    }
}

/// A trunked guest: the tag goes to the guest and comes from it.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn tcp_through_a_trunk_into_the_guest() {
    let pair = Pair::new("100-105=t0", &[C101], OFFLOAD_TCP);
    tag_everything(&pair.guest.inside, "eth0", C101);
    pair.tcp(256 * MIB);
    pair.assert_super_frames();
}

/// e1000 and the like: the kernel must segment and checksum what goes to them.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_guest_without_offloads_gets_whole_segments() {
    let pair = Pair::new("101=t0", &[C101], 0);
    pair.tcp(128 * MIB);
    let summary = pair.daemon.stop();
    let longest = 1518;
    let flow = &summary.port("t0").from_guest;
    assert!(flow.in_bytes / flow.in_frames < longest);
}

/// The cable's device does nothing by itself: the kernel finishes what guests left.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn an_uplink_without_offloads_sends_whole_segments() {
    for (map, vlan) in [("101=t0", vec![C101]), ("101.20=t0,tpid=0x88a8", vec![S101, C20])] {
        let pair = Pair::new(map, &vlan, OFFLOAD_TCP);
        pair.lab.host.tool("ethtool", "-K up0 tx off tso off");
        pair.lab.far.tool("ethtool", "-K far0 tx off tso off");
        // What arrives in segments is merged by the host, as from a real NIC.
        pair.lab.host.tool("ethtool", "-K up0 gro on");
        pair.tcp(128 * MIB);
        pair.daemon.stop();
    }
}

/// A container's veth end instead of a tap.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn tcp_to_a_container() {
    let lab = Lab::new();
    let inside = Namespace::new("container");
    inside.enable_ipv6();
    lab.host.ip(&format!("link add c0 type veth peer name eth0 netns {}", inside.name()));
    lab.host.ip("link set c0 up");
    inside.ip("link set eth0 up");
    inside.ip(&format!("address add {GUEST_V4}/24 dev eth0"));
    inside.ip(&format!("address add {GUEST_V6}/64 dev eth0"));
    let daemon = lab.daemon(&["--map", "101=c0"]);
    let member = far_members(&lab, &[&[C101]]).pop().unwrap();
    let member = member.address(&[&format!("{MEMBER_V4}/24"), &format!("{MEMBER_V6}/64")]);
    daemon.attached(&["c0"]);
    transfer::tcp(&inside, &member.inside, MEMBER_V4, scaled(256 * MIB));
    transfer::tcp(&member.inside, &inside, GUEST_V4, scaled(256 * MIB));
    transfer::tcp(&inside, &member.inside, MEMBER_V6, scaled(64 * MIB));
    transfer::tcp(&member.inside, &inside, GUEST_V6, scaled(64 * MIB));
    daemon.stop();
}

/// The host's own leg in a VLAN.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn tcp_to_an_internal_port() {
    let lab = Lab::new();
    lab.host.enable_ipv6();
    let daemon = lab.daemon(&["--map", "101=internal:leg0"]);
    lab.host.ip(&format!("address add {GUEST_V4}/24 dev leg0"));
    lab.host.ip("link set leg0 up");
    let member = far_members(&lab, &[&[C101]]).pop().unwrap();
    let member = member.address(&[&format!("{MEMBER_V4}/24")]);
    daemon.attached(&["leg0"]);
    transfer::tcp(&lab.host, &member.inside, MEMBER_V4, scaled(256 * MIB));
    transfer::tcp(&member.inside, &lab.host, GUEST_V4, scaled(256 * MIB));
    // The same leg for a namespace: the daemon holds the fd, the netdev may go.
    let other = Namespace::new("tenant");
    lab.host.ip(&format!("link set leg0 netns {}", other.name()));
    other.ip(&format!("address add {GUEST_V4}/24 dev leg0"));
    other.ip("link set leg0 up");
    transfer::tcp(&other, &member.inside, MEMBER_V4, scaled(64 * MIB));
    transfer::tcp(&member.inside, &other, GUEST_V4, scaled(64 * MIB));
    daemon.stop();
}

/// UDP super-frames (USO) pass whole where the kernel has them, both ways.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn udp_segmentation_passes_both_ways() {
    let guests = [OFFLOAD_TCP | OFFLOAD_USO, OFFLOAD_TCP, 0];
    let batches = scaled(200).max(4) as usize;
    for (offload, (map, vlan)) in guests.into_iter().flat_map(|offload| {
        [(offload, ("101=t0", vec![C101])), (offload, ("101.20=t0,tpid=0x88a8", vec![S101, C20]))]
    }) {
        if offload & OFFLOAD_USO != 0 && !has_uso() {
            continue;
        }
        // A sender's own kernel refused what its device cannot checksum (EIO).
        if offload == 0 && !kernel_is_at_least(6, 12) {
            continue;
        }
        eprintln!("{map}, guest offloads {offload:#x}");
        let pair = Pair::new(map, &vlan, offload);
        let (guest, member) = (&pair.guest.inside, &pair.member);
        if !kernel_is_at_least(6, 2) {
            // It has no virtio header for them, and a veth brings them whole.
            member.tool("ethtool", "-K eth0 tx-udp-segmentation off");
        }
        transfer::udp(guest, member, MEMBER_V4, 1200, batches);
        transfer::udp(member, guest, GUEST_V4, 1200, batches);
        transfer::udp(guest, member, MEMBER_V6, 1200, batches);
        transfer::udp(member, guest, GUEST_V6, 1200, batches);
        let summary = pair.daemon.stop();
        let port = summary.port("t0");
        let mean = port.from_guest.in_bytes / port.from_guest.in_frames;
        let whole = offload & OFFLOAD_USO != 0;
        assert_eq!(mean > 20_000, whole, "{mean} bytes a frame from the guest");
        assert_eq!(port.to_guest.all_drops(), 0);
        assert_eq!(port.from_guest.all_drops(), 0);
    }
}

/// Taps know USO from Linux 6.2 on.
fn has_uso() -> bool {
    let lab = Lab::new();
    lab.host.enter(|| open_tap("probe", 0, OFFLOAD_TCP | OFFLOAD_USO)).is_ok()
}

/// One super-frame from the guest as a VMM writes it, all tag stacks.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_checksum_left_to_us_is_right_on_the_wire() {
    let lab = Lab::new();
    lab.host.ip("link set up0 mtu 1600");
    // Then the kernel has to complete checksums before frames leave.
    lab.host.tool("ethtool", "-K up0 tx off tso off");
    let maps = ["--map", "101=t0", "--map", "7.8=t1,tpid=0x9100"];
    let daemon = lab.daemon(&maps);
    let open = |tap: &str| lab.host.enter(|| open_tap(tap, 0, OFFLOAD_TCP)).unwrap();
    let taps = [open("t0"), open("t1")];
    daemon.attached(&["t0", "t1"]);
    let wire = lab.wire();
    let ours: [&[TagBytes]; 2] = [&[C101], &[tag(0x9100, 7), tag(0x8100, 8)]];
    let guests: [&[TagBytes]; 3] = [&[], &[C20], &[S101, C20]];
    for (tap, ours) in taps.iter().zip(ours) {
        for guests in guests {
            for version in [Version::V4, Version::V6] {
                for whole in [
                    ip::tcp(version, 5, &[0xa5; 700]),
                    ip::udp(version, &[0x5a; 701]),
                    ip::tcp(version, 5, &[]),
                ] {
                    let (header, frame) = ip::partial(&whole, version, 0);
                    let header = header.behind_tags(guests.len());
                    let frame = frame.tags(guests);
                    write_tap(tap, &header.bytes(), &frame.bytes()).unwrap();
                    let got = wire.receive_within(lab::PATIENCE).expect("it arrives");
                    let expected = whole.tags(&[ours, guests].concat());
                    assert_eq!(Frame::read(&got), expected);
                    assert_eq!(got, expected.bytes());
                }
            }
        }
    }
    daemon.stop();
}

/// The other way: complete for a guest without offloads, and described rightly to
/// one with them, also behind a trunk's tag.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_checksum_left_to_the_guest_is_described_rightly() {
    let lab = Lab::new();
    let maps = ["--map", "101=plain", "--map", "102=virtio", "--map", "103,104=trunk"];
    let daemon = lab.daemon(&maps);
    let plain = lab.raw_guest("plain");
    let open = |tap: &str| lab.host.enter(|| open_tap(tap, 0, OFFLOAD_TCP)).unwrap();
    let (virtio, trunk) = (open("virtio"), open("trunk"));
    daemon.attached(&["plain", "virtio", "trunk"]);
    let socket = far_sender(&lab.far, "far0");
    for version in [Version::V4, Version::V6] {
        for size in [10, 700, 1400] {
            let whole = ip::tcp(version, 9, &vec![0x3c; size]);
            let (header, frame) = ip::partial(&whole, version, 0);
            let send = |vid| {
                let tagged = frame.clone().tags(&[tag(0x8100, vid)]);
                let header = header.behind_tags(1);
                socket.send(&[&header.bytes(), tagged.bytes().as_slice()].concat()).unwrap();
            };
            send(101);
            let got = plain.receive_within(lab::PATIENCE).expect("it arrives");
            assert_eq!(got, whole.bytes());
            send(102);
            let got = next(&virtio);
            assert_eq!(got[10..], frame.bytes());
            assert_described(&got, header, 0);
            send(104);
            let got = next(&trunk);
            assert_eq!(got[10..], frame.clone().tags(&[tag(0x8100, 104)]).bytes());
            assert_described(&got, header, 4);
        }
    }
    daemon.stop();
}

/// The kernel does not check the segments of a super-frame against the MTU, and
/// drivers drop what is too long in silence: it must be counted.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_super_frame_with_segments_too_long_for_the_uplink_is_counted() {
    let lab = Lab::new();
    let daemon = lab.daemon(&["--map", "101=t0", "--map", "101.20=t1,tpid=0x88a8"]);
    let open = |tap: &str| lab.host.enter(|| open_tap(tap, 0, OFFLOAD_TCP)).unwrap();
    let taps = [open("t0"), open("t1")];
    daemon.attached(&["t0", "t1"]);
    // Payload of the longest segments: MTU 1500 less IP and TCP headers, and with
    // two tags less what does not fit (only an outer 0x8100 has its four bytes free).
    for (name, tap, longest) in [("t0", &taps[0], 1460), ("t1", &taps[1], 1452)] {
        for (size, fits) in [(longest, true), (longest + 1, false), (9000, false)] {
            let before = daemon.summary();
            let whole = ip::tcp(Version::V4, 1, &vec![7; 20_000]);
            let (header, frame) = ip::partial(&whole, Version::V4, size);
            write_tap(tap, &header.bytes(), &frame.bytes()).unwrap();
            let flow = |summary: &lab::Summary| summary.port(name).from_guest.clone();
            let after = daemon
                .until("it came in", |summary| flow(summary).in_frames > flow(&before).in_frames);
            let dropped = flow(&after).dropped("too_long") - flow(&before).dropped("too_long");
            assert_eq!(dropped, u64::from(!fits), "{name}, segments of {size}: {after:?}");
        }
    }
    daemon.stop();
}

fn next(tap: &File) -> Vec<u8> {
    eventually("a frame", || read_tap(tap).unwrap())
}

fn assert_described(message: &[u8], sent: Vnet, further: u16) {
    let got = Vnet::read(message);
    assert_eq!((got.flags, got.gso_type), (1, sent.gso_type));
    assert_eq!(got.csum_start, sent.csum_start + further);
    assert_eq!(got.csum_offset, sent.csum_offset);
}

fn far_sender(namespace: &Namespace, device: &str) -> PacketSocket {
    namespace.enter(|| {
        let socket = PacketSocket::new();
        socket.set(libc::PACKET_VNET_HDR, 1i32).unwrap();
        socket.bind(index_of(device), 0).unwrap();
        socket
    })
}

/// What a guest that was promised it may complete a checksum makes of what it gets: virtio
/// header and frame.
fn completed(packet: &[u8]) -> Vec<u8> {
    const NEEDS_CHECKSUM: u8 = 1;
    let (header, frame) = packet.split_at(10);
    let mut frame = frame.to_vec();
    if header[0] & NEEDS_CHECKSUM != 0 {
        let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
        let (start, offset) = (word(6), word(8));
        let mut sum: u32 = 0;
        for pair in frame[start..].chunks(2) {
            sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        }
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        frame[start + offset..start + offset + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
    frame
}

/// Frames merged on the uplink come out at the guest exactly as they were sent.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn merged_tunnels_are_cut_apart_again_and_arrive() {
    for offload in [0, OFFLOAD_TCP] {
        let lab = Lab::new();
        merge_on_arrival(&lab);
        let daemon = lab.daemon(&["--map", "101=t0"]);
        let guest = lab.host.enter(|| open_tap("t0", 0, offload)).unwrap();
        daemon.attached(&["t0"]);
        let member = far_members(&lab, &[&[C101]]).pop().unwrap();
        member.inside.tool("ethtool", "-K eth0 tx off tso off gso off");
        let wire = Wire::open(&member.inside, "eth0");
        let mut merged = 0;
        for tunnel in [Tunnel::Gre, Tunnel::Ipip, Tunnel::Vxlan] {
            let before = daemon.summary().port("t0").to_guest.split_frames;
            let frames: Vec<Frame> = (0..16).map(|number| tunnel.frame(number, 1000)).collect();
            for frame in &frames {
                wire.send(frame);
            }
            let mut got: Vec<Vec<u8>> = Vec::new();
            while got.len() < frames.len() {
                let frame = completed(&next(&guest));
                // The stack at the far end reports its IPv6 groups in between.
                if frame[12..14] != [0x86, 0xdd] {
                    got.push(frame);
                }
            }
            for (got, sent) in got.iter().zip(&frames) {
                assert!(*got == sent.bytes(), "{tunnel:?}: {got:02x?} and {:02x?}", sent.bytes());
            }
            let split = daemon.summary().port("t0").to_guest.split_frames - before;
            merged += u64::from(split > 0);
        }
        // On the kernel path nobody here cuts them, and nobody can tell; and veth merges since
        // Linux 5.13 only.
        if lab::daemon::datapath() == "packet" && lab::kernel_is_at_least(5, 13) {
            assert_eq!(merged, 3, "the kernel merged all three, or this test shows nothing");
        }
        daemon.stop();
    }
}

/// The same with real tunnel devices on both sides, where super-frames of the
/// tunnel come from the sender's own stack.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn tcp_through_a_vxlan_between_guest_and_far_end() {
    let pair = Pair::new("101=t0", &[C101], OFFLOAD_TCP);
    pair.lab.host.ip("link add vx0 type vxlan id 5 dstport 4789 dev up0");
    pair.lab.host.ip("link set vx0 up");
    let ends = [
        (&pair.guest.inside, GUEST_V4, MEMBER_V4, "10.2.0.1"),
        (&pair.member, MEMBER_V4, GUEST_V4, "10.2.0.2"),
    ];
    for (namespace, local, remote, address) in ends {
        namespace.ip(&format!(
            "link add vx1 type vxlan id 9 dstport 4789 local {local} remote {remote} dev eth0"
        ));
        namespace.ip("link set vx1 up");
        namespace.ip(&format!("address add {address}/24 dev vx1"));
    }
    let (guest, member) = (&pair.guest.inside, &pair.member);
    transfer::tcp(member, guest, "10.2.0.1", scaled(64 * MIB));
    transfer::tcp(guest, member, "10.2.0.2", scaled(64 * MIB));
    let summary = pair.daemon.stop();
    let cut = summary.port("t0").to_guest.split_frames;
    if lab::daemon::datapath() == "packet" && lab::kernel_is_at_least(5, 13) {
        assert!(cut > 0, "no super-frame of the tunnel reached us: this test shows nothing");
    }
}
