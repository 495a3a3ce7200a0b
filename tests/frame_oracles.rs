//! The segmenter and the checksums against others' idea of them: a reference that
//! builds each segment from scratch, the parsers of `etherparse` and `pnet_packet`,
//! and the kernel.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests"
)]

use etherparse::{IpSlice, TcpSlice, UdpSlice};
use frames::{Inside, Network, Recipe, Transport, Version};
use proptest::prelude::*;
use vlanswitchd::frame::checksum::Sum;
use vlanswitchd::frame::headers;
use vlanswitchd::frame::segment::{NETWORKS_MAX, Segmenter};
use vlanswitchd::frame::vnet::{Offload, VnetHeader, check_offload};

#[path = "../fuzz/src/frames.rs"]
mod frames;

/// All segments of a super-frame, by the code under test.
fn cut(frame: &[u8], header: VnetHeader) -> Vec<Vec<u8>> {
    let mut segmenter = Segmenter::new(frame, header).expect("a good super-frame");
    let mut out = vec![0xee; segmenter.segment_len_max()];
    let mut segments = Vec::new();
    while let Some(len) = segmenter.next_into(&mut out).unwrap() {
        segments.push(out[..len].to_vec());
    }
    segments
}

prop_compose! {
    fn network()(
        v6 in any::<bool>(),
        identification in any::<u16>(),
        extras in prop_oneof![3 => Just(0_u8), 1 => 1..5_u8],
        checksum in any::<bool>(),
        key in any::<bool>(),
        ethernet_tags in prop::option::of(0..5_u8),
        option_words in 0..64_u8,
        kind in 0..6,
    ) -> Network {
        let inside = match kind {
            0 => Inside::Ip,
            1 => Inside::Gre { checksum, key, ethernet_tags },
            2 => Inside::Vxlan { checksum, tags: ethernet_tags.unwrap_or(0) },
            3 => Inside::VxlanGpe { checksum },
            4 => Inside::Geneve { checksum, option_words, ethernet_tags },
            _ => Inside::Udp { checksum },
        };
        let version = if v6 { Version::V6 } else { Version::V4 };
        // A checksummed UDP tunnel under IPv4 options is refused, not cut.
        let refused = !v6 && checksum;
        Network { version, identification, extras: if refused { 0 } else { extras }, inside }
    }
}

fn transport() -> impl Strategy<Value = Transport> {
    let tcp = (any::<u32>(), any::<u8>(), 0..11_u8).prop_map(|(sequence, flags, option_words)| {
        Transport::Tcp { sequence, flags, option_words }
    });
    prop_oneof![2 => tcp, 1 => Just(Transport::Udp)]
}

prop_compose! {
    fn recipe()(
        tags in prop::collection::vec(prop::sample::select(vec![0x8100, 0x88a8, 0x9100, 0x9200]), 0..5),
        networks in prop::collection::vec(network(), 1..=NETWORKS_MAX),
        transport in transport(),
        payload in prop::collection::vec(any::<u8>(), 0..6000),
        segment_size in prop_oneof![50..300_u16, Just(1400), 300..9000_u16],
        lie_about_lengths in any::<bool>(),
    ) -> Recipe {
        Recipe { tags, networks, transport, payload, segment_size, lie_about_lengths }
    }
}

proptest! {
    #[test]
    fn segments_are_what_a_sender_without_offloads_sends(recipe in recipe()) {
        let (frame, header) = recipe.super_frame();
        prop_assert_eq!(cut(&frame, header), recipe.segments());
    }

    #[test]
    fn segments_parse_verify_and_carry_the_payload(recipe in recipe()) {
        let (frame, header) = recipe.super_frame();
        let mut payload: Vec<u8> = Vec::new();
        for segment in cut(&frame, header) {
            payload.extend(verify(&recipe, &segment));
        }
        prop_assert_eq!(payload, recipe.payload);
    }

    #[test]
    fn only_the_outer_transport_is_left_to_the_kernel(recipe in recipe()) {
        let (frame, header) = recipe.super_frame();
        let expected = if recipe.networks.len() == 1 {
            let hdr_len = (frame.len() - recipe.payload.len()) as u16;
            Offload::Plain(VnetHeader { hdr_len, ..header })
        } else {
            Offload::Segment
        };
        prop_assert_eq!(check_offload(header, &frame), expected);
    }

    #[test]
    fn transport_is_where_etherparse_finds_it(recipe in recipe()) {
        let (segments, outer) = (recipe.segments(), &recipe.networks[0]);
        let frame = &segments[0];
        let found = headers::transport(frame);
        let network_offset = 14 + 4 * recipe.tags.len();
        let ip = IpSlice::from_slice(&frame[network_offset..]).unwrap();
        let offset = frame.len() - ip.payload().payload.len();
        let number = ip.payload_ip_number().0;
        prop_assert_eq!(found.is_some(), number == 6 || number == 17);
        if let Some(found) = found {
            prop_assert_eq!((found.network_offset, found.offset), (network_offset, offset));
            prop_assert_eq!(found.protocol.protocol(), number);
            prop_assert_eq!(found.version == headers::IpVersion::V6, outer.version == Version::V6);
            let header_len = match number {
                6 => TcpSlice::from_slice(&frame[offset..]).unwrap().header_len(),
                _ => 8,
            };
            prop_assert_eq!(found.header_len, header_len);
        }
    }

    #[test]
    fn sums_are_those_of_pnet(bytes in prop::collection::vec(any::<u8>(), 1..2000)) {
        let skip_no_word = usize::MAX;
        prop_assert_eq!(Sum::of(&bytes).checksum(), pnet_packet::util::checksum(&bytes, skip_no_word));
    }
}

/// Parses a segment with both parsers, verifies all its lengths and checksums, and
/// returns its payload. The recipe says only which kind of tunnel is where.
fn verify<'s>(recipe: &Recipe, segment: &'s [u8]) -> &'s [u8] {
    let mut ethertype;
    let mut rest;
    (ethertype, rest) = after_ethernet(segment, recipe.tags.len());
    for (depth, network) in recipe.networks.iter().enumerate() {
        assert_eq!(ethertype, if network.version == Version::V4 { 0x0800 } else { 0x86dd });
        let ip = IpSlice::from_slice(rest).expect("etherparse takes the IP header");
        assert_eq!(ip.payload().payload.as_ptr_range().end, segment.as_ptr_range().end, "length");
        verify_network(&ip, rest);
        let inside = ip.payload().payload;
        if depth + 1 == recipe.networks.len() {
            return verify_transport(recipe.transport, &ip, inside);
        }
        let after_gre = |checksum: bool, key: bool| {
            let gre = pnet_packet::gre::GrePacket::new(inside).expect("pnet takes the GRE header");
            assert_eq!(
                (gre.get_checksum_present() == 1, gre.get_key_present() == 1),
                (checksum, key)
            );
            assert!(!checksum || frames::sum(inside) == 0xffff, "GRE checksum");
            (
                gre.get_protocol_type(),
                &inside[4 + 4 * usize::from(checksum) + 4 * usize::from(key)..],
            )
        };
        let inner_type = match recipe.networks[depth + 1].version {
            Version::V4 => 0x0800,
            Version::V6 => 0x86dd,
        };
        let udp = |checksum: bool| verify_udp(&ip, inside, checksum);
        let ethernet = |tags: Option<u8>, (ethertype, rest)| match tags {
            Some(tags) => after_ethernet(rest, tags.into()),
            None => (ethertype, rest),
        };
        (ethertype, rest) = match network.inside {
            Inside::Ip => (inner_type, inside),
            Inside::Gre { checksum, key, ethernet_tags } => {
                ethernet(ethernet_tags, after_gre(checksum, key))
            }
            Inside::Vxlan { checksum, tags } => {
                let vxlan = pnet_packet::vxlan::VxlanPacket::new(udp(checksum)).unwrap();
                assert_eq!((vxlan.get_flags(), vxlan.get_vni()), (8, 0x102));
                after_ethernet(&udp(checksum)[8..], tags.into())
            }
            Inside::VxlanGpe { checksum } => (inner_type, &udp(checksum)[8..]),
            Inside::Geneve { checksum, option_words, ethernet_tags } => {
                let content = &udp(checksum)[8 + 4 * usize::from(option_words)..];
                ethernet(ethernet_tags, (inner_type, content))
            }
            Inside::Udp { checksum } => (inner_type, udp(checksum)),
        };
    }
    unreachable!("a recipe has an IP header")
}

/// The EtherType behind that many tags, and what follows it.
fn after_ethernet(frame: &[u8], tags: usize) -> (u16, &[u8]) {
    let by_pnet = pnet_packet::ethernet::EthernetPacket::new(frame).unwrap();
    let ethernet = etherparse::Ethernet2Slice::from_slice_without_fcs(frame).unwrap();
    let (mut ethertype, mut rest) = (ethernet.ether_type(), ethernet.payload_slice());
    assert_eq!(by_pnet.get_ethertype().0, ethertype.0);
    for _ in 0..tags {
        let by_pnet = pnet_packet::vlan::VlanPacket::new(rest).unwrap();
        assert!([0x8100, 0x88a8, 0x9100, 0x9200].contains(&ethertype.0));
        let tag = etherparse::SingleVlanSlice::from_slice(rest).unwrap();
        assert_eq!(by_pnet.get_vlan_identifier(), tag.vlan_identifier().value());
        (ethertype, rest) = (tag.ether_type(), &rest[4..]);
    }
    (ethertype.0, rest)
}

fn verify_network(ip: &IpSlice<'_>, bytes: &[u8]) {
    match ip {
        IpSlice::Ipv4(v4) => {
            let header = v4.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum());
            let by_pnet = pnet_packet::ipv4::Ipv4Packet::new(bytes).unwrap();
            assert_eq!(usize::from(by_pnet.get_total_length()), bytes.len());
            assert_eq!(by_pnet.get_checksum(), pnet_packet::ipv4::checksum(&by_pnet));
        }
        IpSlice::Ipv6(_) => {
            let by_pnet = pnet_packet::ipv6::Ipv6Packet::new(bytes).unwrap();
            assert_eq!(usize::from(by_pnet.get_payload_length()), bytes.len() - 40);
        }
    }
}

fn verify_transport<'s>(transport: Transport, ip: &IpSlice<'_>, bytes: &'s [u8]) -> &'s [u8] {
    if transport == Transport::Udp {
        assert_eq!(ip.payload_ip_number().0, 17);
        return verify_udp(ip, bytes, true);
    }
    assert_eq!(ip.payload_ip_number().0, 6);
    let tcp = TcpSlice::from_slice(bytes).unwrap();
    let by_pnet = pnet_packet::tcp::TcpPacket::new(bytes).unwrap();
    let (by_etherparse, by_pnet) = match ip {
        IpSlice::Ipv4(v4) => {
            let (source, destination) = (v4.header().source_addr(), v4.header().destination_addr());
            (
                tcp.calc_checksum_ipv4(v4.header().source(), v4.header().destination()).unwrap(),
                pnet_packet::tcp::ipv4_checksum(&by_pnet, &source, &destination),
            )
        }
        IpSlice::Ipv6(v6) => {
            let (source, destination) = (v6.header().source_addr(), v6.header().destination_addr());
            (
                tcp.calc_checksum_ipv6(v6.header().source(), v6.header().destination()).unwrap(),
                pnet_packet::tcp::ipv6_checksum(&by_pnet, &source, &destination),
            )
        }
    };
    assert_eq!([tcp.checksum(); 2], [by_etherparse, by_pnet], "TCP checksum");
    tcp.payload()
}

fn verify_udp<'s>(ip: &IpSlice<'_>, bytes: &'s [u8], checksum: bool) -> &'s [u8] {
    let udp = UdpSlice::from_slice(bytes).expect("etherparse takes the UDP length");
    assert_eq!(usize::from(udp.length()), bytes.len());
    let by_pnet = pnet_packet::udp::UdpPacket::new(bytes).unwrap();
    if !checksum {
        assert_eq!(udp.checksum(), 0);
        return udp.payload();
    }
    let header = udp.to_header();
    let (by_etherparse, by_pnet) = match ip {
        IpSlice::Ipv4(v4) => {
            let ip = v4.header();
            (
                header
                    .calc_checksum_ipv4_raw(ip.source(), ip.destination(), udp.payload())
                    .unwrap(),
                pnet_packet::udp::ipv4_checksum(
                    &by_pnet,
                    &ip.source_addr(),
                    &ip.destination_addr(),
                ),
            )
        }
        IpSlice::Ipv6(v6) => {
            let ip = v6.header();
            (
                header
                    .calc_checksum_ipv6_raw(ip.source(), ip.destination(), udp.payload())
                    .unwrap(),
                pnet_packet::udp::ipv6_checksum(
                    &by_pnet,
                    &ip.source_addr(),
                    &ip.destination_addr(),
                ),
            )
        }
    };
    // 0 says "none" in UDP; not both crates know that.
    let or_ones = |checksum| if checksum == 0 { 0xffff } else { checksum };
    assert_eq!([udp.checksum(); 2], [by_etherparse, by_pnet].map(or_ones), "UDP checksum");
    udp.payload()
}

/// The kernel as oracle. Each test makes a network namespace that ends with its
/// thread, whatever happens, and everything in it.
mod kernel {
    #![allow(unsafe_code, reason = "AF_PACKET sockets and namespaces, by the raw system calls")]

    use super::*;
    use std::ffi::CString;
    use std::io::{Error, ErrorKind};
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
    use std::process::Command;
    use std::time::{Duration, Instant};
    use vlanswitchd::frame::vnet::{GSO_NONE, VNET_HEADER_LEN};

    const DEADLINE: Duration = Duration::from_secs(10);
    /// The destination of all frames of a recipe.
    const DESTINATION: [u8; 6] = [0x02, 0, 0, 0, 0, 0x0b];

    fn check(result: libc::c_int, what: &str) -> libc::c_int {
        assert!(result >= 0, "{what}: {}", Error::last_os_error());
        result
    }

    /// Runs `test` in a network namespace of its own, with its own /sys.
    fn in_namespace(test: impl FnOnce() + Send + 'static) {
        let thread = std::thread::spawn(|| {
            let sys = CString::new("/sys").unwrap();
            let root = CString::new("/").unwrap();
            let sysfs = CString::new("sysfs").unwrap();
            // SAFETY: the strings outlive the calls; only this thread changes its
            // namespaces.
            unsafe {
                check(libc::unshare(libc::CLONE_NEWNET | libc::CLONE_NEWNS), "unshare");
                let private = libc::MS_REC | libc::MS_PRIVATE;
                let none = std::ptr::null();
                check(libc::mount(none, root.as_ptr(), none, private, none.cast()), "private /");
                let kind = sysfs.as_ptr();
                check(libc::mount(kind, sys.as_ptr(), kind, 0, none.cast()), "mount /sys");
            }
            test();
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    }

    fn run(command: &str) {
        let mut words = command.split_whitespace();
        let program = words.next().unwrap();
        let output = Command::new(program).args(words).output().expect(program);
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// An AF_PACKET socket with virtio headers, on one device.
    struct PacketSocket(OwnedFd);

    impl PacketSocket {
        fn open(device: &str, receive: bool) -> Self {
            let protocol = if receive { libc::ETH_P_ALL as u16 } else { 0 };
            let name = CString::new(device).unwrap();
            // SAFETY: each pointer is to a live value of the size given with it.
            unsafe {
                let kind = libc::SOCK_RAW | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
                let fd = check(libc::socket(libc::AF_PACKET, kind, 0), "socket");
                let socket = Self(OwnedFd::from_raw_fd(fd));
                for option in [libc::PACKET_VNET_HDR, libc::PACKET_IGNORE_OUTGOING] {
                    let on: libc::c_int = 1;
                    let (value, len) = ((&raw const on).cast(), size_of_val(&on) as u32);
                    check(libc::setsockopt(fd, libc::SOL_PACKET, option, value, len), "setsockopt");
                }
                let mut address: libc::sockaddr_ll = std::mem::zeroed();
                address.sll_family = libc::AF_PACKET as u16;
                address.sll_protocol = protocol.to_be();
                address.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
                assert_ne!(address.sll_ifindex, 0, "{device}");
                let len = size_of_val(&address) as u32;
                check(libc::bind(fd, (&raw const address).cast(), len), "bind");
                socket
            }
        }

        fn send(&self, header: VnetHeader, frame: &[u8]) {
            let bytes = [&header.to_bytes()[..], frame].concat();
            // SAFETY: the buffer is of the length given.
            let sent =
                unsafe { libc::send(self.0.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), 0) };
            assert_eq!(sent, bytes.len() as isize, "send: {}", Error::last_os_error());
        }

        fn receive(&self, buffer: &mut [u8]) -> std::io::Result<usize> {
            // SAFETY: the buffer is of the length given.
            let len = unsafe {
                libc::recv(self.0.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0)
            };
            usize::try_from(len).map_err(|_| Error::last_os_error())
        }
    }

    /// Takes frames until there are `count` (as `weight` counts them), or until the
    /// deadline. Those not to our destination are the kernel's own.
    fn collect(
        count: usize,
        skip: usize,
        mut receive: impl FnMut(&mut [u8]) -> std::io::Result<usize>,
        weight: impl Fn(&[u8]) -> usize,
    ) -> Vec<Vec<u8>> {
        let end = Instant::now() + DEADLINE;
        let mut buffer = vec![0; 70_000];
        let mut frames = Vec::new();
        let mut seen = 0;
        while seen < count && Instant::now() < end {
            match receive(&mut buffer) {
                Ok(len) if buffer[skip..].starts_with(&DESTINATION) => {
                    seen += weight(&buffer[..len]);
                    frames.push(buffer[..len].to_vec());
                }
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err(error) => panic!("receive: {error}"),
            }
        }
        frames
    }

    /// Frames are long: shows only where the first two that differ do.
    fn assert_same(ours: &[Vec<u8>], theirs: &[Vec<u8>], what: &str) {
        assert_eq!(ours.len(), theirs.len(), "{what}: the number of frames");
        for (index, (ours, theirs)) in ours.iter().zip(theirs).enumerate() {
            assert_eq!(ours.len(), theirs.len(), "{what}: the length of frame {index}");
            let differing = (0..ours.len()).find(|at| ours[*at] != theirs[*at]);
            assert_eq!(differing, None, "{what}: the first byte of frame {index} that differs");
        }
    }

    fn tap(name: &str) -> tun_tap::Iface {
        let tap = tun_tap::Iface::without_packet_info(name, tun_tap::Mode::Tap).expect("open tap");
        // SAFETY: the descriptor is the tap's and open.
        unsafe {
            check(libc::fcntl(tap.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK), "O_NONBLOCK");
        }
        run(&format!("ip link set {name} mtu 9000 up"));
        tap
    }

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|index| (index * 7 + index / 251) as u8).collect()
    }

    const TCP: Transport = Transport::Tcp { sequence: 0xffff_f000, flags: 0x99, option_words: 3 };

    fn network(version: Version, identification: u16, inside: Inside) -> Network {
        Network { version, identification, extras: 0, inside }
    }

    #[test]
    #[ignore = "needs root: makes a network namespace with a tap"]
    fn cuts_plain_super_frames_the_same() {
        in_namespace(|| {
            let tap = tap("seg0");
            let socket = PacketSocket::open("seg0", false);
            let tags = [vec![], vec![0x8100], vec![0x88a8, 0x8100]];
            let mut compared = 0;
            for tags in tags {
                for version in [Version::V4, Version::V6] {
                    for transport in [TCP, Transport::Udp] {
                        for extras in [0, 2] {
                            let recipe = Recipe {
                                tags: tags.clone(),
                                networks: vec![Network {
                                    extras,
                                    ..network(version, 0xfffe, Inside::Ip)
                                }],
                                transport,
                                payload: bytes(5500),
                                segment_size: 1000,
                                lie_about_lengths: false,
                            };
                            let (frame, header) = recipe.super_frame();
                            let Offload::Plain(checked) = check_offload(header, &frame) else {
                                panic!("{recipe:?} is plain");
                            };
                            socket.send(checked, &frame);
                            let ours = cut(&frame, header);
                            let theirs = collect(ours.len(), 0, |to| tap.recv(to), |_| 1);
                            let what = format!("{tags:04x?} {version:?} {transport:?} {extras}");
                            assert_same(&ours, &theirs, &what);
                            compared += ours.len();
                        }
                    }
                }
            }
            assert_eq!(compared, 24 * 6);
        });
    }

    /// MTU-sized tunnel packets are sent over a veth pair whose far end merges them
    /// (GRO). There a packet socket sees the super-frame, as the switch would, and
    /// we cut it; a bridge sends the very same one to a tap without offloads, for
    /// which the kernel cuts it.
    #[test]
    #[ignore = "needs root: makes a network namespace with a veth pair, a bridge and a tap"]
    fn cuts_merged_tunnel_packets_the_same() {
        in_namespace(|| {
            run("ip link add sega type veth peer name segb");
            // veth goes through GRO only if the sender could not have sent a
            // super-frame (drivers/net/veth.c, veth_skb_is_eligible_for_gro).
            run("ethtool -K sega tso off");
            run("ethtool -K segb gro on rx-udp-gro-forwarding on");
            for (file, value) in
                [("gro_flush_timeout", "50000000"), ("napi_defer_hard_irqs", "100")]
            {
                std::fs::write(format!("/sys/class/net/segb/{file}"), value).expect(file);
            }
            run("ip link set sega mtu 2000 up");
            run("ip link set segb mtu 2000 up");
            // GRO looks into VXLAN only where there is a socket for it.
            run("ip link add segx4 type vxlan id 5 dstport 4789 dev sega remote 192.0.2.9");
            run("ip link add segx6 type vxlan id 6 dstport 4789 dev sega remote 2001:db8::9");
            run("ip link set segx4 up");
            run("ip link set segx6 up");
            let tap = tap("seg1");
            run("ip link add segbr type bridge");
            run("ip link set segb master segbr");
            run("ip link set seg1 master segbr");
            run("ip link set segbr up");
            let sender = PacketSocket::open("sega", false);
            let receiver = PacketSocket::open("segb", true);

            let v4 = |inside| network(Version::V4, 0xfffd, inside);
            let v6 = |inside| network(Version::V6, 3, inside);
            let inner4 = network(Version::V4, 0x1234, Inside::Ip);
            let inner6 = network(Version::V6, 5, Inside::Ip);
            let gre = |checksum, key, ethernet_tags| Inside::Gre { checksum, key, ethernet_tags };
            let vxlan = |checksum| Inside::Vxlan { checksum, tags: 0 };
            let cases = [
                ("IPIP", v4(Inside::Ip), inner4.clone()),
                ("SIT", v4(Inside::Ip), inner6.clone()),
                ("IP4IP6", v6(Inside::Ip), inner4.clone()),
                ("IP6IP6", v6(Inside::Ip), inner6.clone()),
                ("GRE", v4(gre(false, false, None)), inner4.clone()),
                ("GRE key", v4(gre(false, true, None)), inner6.clone()),
                ("GRE checksum", v4(gre(true, true, None)), inner4.clone()),
                ("GRE Ethernet", v4(gre(true, false, Some(0))), inner4.clone()),
                ("GRE over IPv6", v6(gre(true, false, None)), inner4.clone()),
                ("VXLAN", v4(vxlan(false)), inner4.clone()),
                ("VXLAN checksum", v4(vxlan(true)), inner6.clone()),
                ("VXLAN over IPv6", v6(vxlan(true)), inner4.clone()),
            ];
            let tcp = Transport::Tcp { sequence: 0xffff_f000, flags: 0x18, option_words: 3 };
            let udp_in_ipip = ("UDP in IPIP", v4(Inside::Ip), inner4.clone(), Transport::Udp);
            let cases = cases.map(|(name, outer, inner)| (name, outer, inner, tcp));
            let mut merged = Vec::new();
            for (name, outer, inner, transport) in cases.into_iter().chain([udp_in_ipip]) {
                // A shorter last segment of checksummed GRE is beyond Linux 6.18: GRO
                // takes the checksum for the key where there are both and lets it
                // overtake (gre_gro_receive), and the checksum it is given when cut
                // is wrong by what it is shorter.
                let whole = matches!(outer.inside, Inside::Gre { checksum: true, .. });
                let recipe = Recipe {
                    tags: vec![],
                    networks: vec![outer, inner],
                    transport,
                    payload: bytes(if whole { 5000 } else { 5500 }),
                    segment_size: 1000,
                    lie_about_lengths: false,
                };
                let sent = recipe.segments();
                for frame in &sent {
                    sender.send(VnetHeader::default(), frame);
                }
                let split = |bytes: &[u8]| {
                    let (header, frame) = bytes.split_first_chunk::<VNET_HEADER_LEN>().unwrap();
                    let header = VnetHeader::from_bytes(header);
                    if header.gso_type == GSO_NONE {
                        return (header, vec![frame.to_vec()]);
                    }
                    assert_eq!(check_offload(header, frame), Offload::Segment, "{name}");
                    (header, cut(frame, header))
                };
                let received = collect(
                    sent.len(),
                    VNET_HEADER_LEN,
                    |to| receiver.receive(to),
                    |bytes| split(bytes).1.len(),
                );
                let ours: Vec<_> = received.iter().flat_map(|bytes| split(bytes).1).collect();
                let theirs = collect(sent.len(), 0, |to| tap.recv(to), |_| 1);
                assert_same(&ours, &sent, &format!("{name}: ours, and what GRO merged"));
                assert_same(&ours, &theirs, &format!("{name}: ours, and the kernel's"));
                if received.len() < sent.len() {
                    merged.push(name);
                }
            }
            // Which tunnels GRO merges is the kernel's affair; that it merges none
            // would make this test an empty one.
            println!("merged by GRO: {merged:?}");
            assert!(merged.contains(&"IPIP") && merged.contains(&"GRE"), "only {merged:?}");
        });
    }
}
