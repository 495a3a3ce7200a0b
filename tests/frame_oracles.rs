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
    fn sums_are_those_of_pnet(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
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
            assert_eq!((gre.get_checksum_present() == 1, gre.get_key_present() == 1), (checksum, key));
            assert!(!checksum || frames::sum(inside) == 0xffff, "GRE checksum");
            (gre.get_protocol_type(), &inside[4 + 4 * usize::from(checksum) + 4 * usize::from(key)..])
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
                assert_eq!((vxlan.get_flags(), vxlan.get_vni()), (8, 0x0001_02));
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
                header.calc_checksum_ipv4_raw(ip.source(), ip.destination(), udp.payload()).unwrap(),
                pnet_packet::udp::ipv4_checksum(&by_pnet, &ip.source_addr(), &ip.destination_addr()),
            )
        }
        IpSlice::Ipv6(v6) => {
            let ip = v6.header();
            (
                header.calc_checksum_ipv6_raw(ip.source(), ip.destination(), udp.payload()).unwrap(),
                pnet_packet::udp::ipv6_checksum(&by_pnet, &ip.source_addr(), &ip.destination_addr()),
            )
        }
    };
    // 0 says "none" in UDP; not both crates know that.
    let or_ones = |checksum| if checksum == 0 { 0xffff } else { checksum };
    assert_eq!([udp.checksum(); 2], [by_etherparse, by_pnet].map(or_ones), "UDP checksum");
    udp.payload()
}
