//! Where the transport header of a frame stands.
//!
//! Ethernet, up to [`TAGS_MAX`] VLAN tags, IPv4 with its options or IPv6 with its
//! extension headers, then TCP or UDP. Only the outer packet is looked at: a
//! tunnel's content is the concern of [`segment`](super::segment), which uses the
//! same steps. Every read is checked against the end of the frame and every loop
//! is bounded, whatever the bytes say. Lengths in IP headers are not looked at:
//! in a super-frame they may not fit their fields.

use super::tag::Tpid;
use super::{MAC_ADDRESSES_LEN, TAG_LEN, read_u16};

/// How many VLAN tags in the bytes are skipped before giving up.
pub const TAGS_MAX: usize = 4;
/// How many IPv6 extension headers are skipped before giving up.
const EXTENSION_HEADERS_MAX: usize = 8;

/// EtherType of IPv4.
pub(crate) const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub(crate) const ETHERTYPE_IPV6: u16 = 0x86dd;

/// Length of the fixed IPv4 header, in bytes (RFC 791).
const IPV4_HEADER_LEN: usize = 20;
/// Length of the fixed IPv6 header, in bytes (RFC 8200 section 3).
pub(crate) const IPV6_HEADER_LEN: usize = 40;
/// Length of the fixed TCP header, in bytes (RFC 9293 section 3.1).
const TCP_HEADER_LEN: usize = 20;
/// Length of the UDP header, in bytes (RFC 768).
pub(crate) const UDP_HEADER_LEN: usize = 8;

/// More fragments, and the fragment offset, in the IPv4 header's fourth word.
const IPV4_FRAGMENT_MASK: u16 = 0x3fff;

/// IPv6 extension headers that only have to be skipped.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const DESTINATION_OPTIONS: u8 = 60;

/// The version of an IP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IpVersion {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl IpVersion {
    /// The version an EtherType announces, if it is IP.
    #[inline]
    pub const fn from_ethertype(ethertype: u16) -> Option<Self> {
        match ethertype {
            ETHERTYPE_IPV4 => Some(Self::V4),
            ETHERTYPE_IPV6 => Some(Self::V6),
            _ => None,
        }
    }
}

/// A transport protocol whose frames may be super-frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// The transport an IP protocol number names, if it is one of ours.
    #[inline]
    pub const fn from_protocol(protocol: u8) -> Option<Self> {
        match protocol {
            6 => Some(Self::Tcp),
            17 => Some(Self::Udp),
            _ => None,
        }
    }

    /// The IP protocol number.
    #[inline]
    pub const fn protocol(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }

    /// Where the checksum stands in the header, in bytes.
    #[inline]
    pub const fn checksum_offset(self) -> u16 {
        match self {
            Self::Tcp => 16,
            Self::Udp => 6,
        }
    }

    /// Length in bytes of the header of this transport at `offset`, if all of it
    /// is there.
    #[inline]
    pub(crate) fn header_len(self, frame: &[u8], offset: usize) -> Option<usize> {
        let header = frame.get(offset..)?;
        let len = match self {
            Self::Tcp => usize::from(header.get(12)? >> 4) * 4,
            Self::Udp => UDP_HEADER_LEN,
        };
        let legal = len >= TCP_HEADER_LEN || self == Self::Udp;
        (legal && header.len() >= len).then_some(len)
    }
}

/// Where a frame's transport header stands. Offsets are in bytes from the start of
/// the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransportHeader {
    /// Version of the IP header.
    pub version: IpVersion,
    /// Start of the IP header.
    pub network_offset: usize,
    /// Start of the TCP or UDP header.
    pub offset: usize,
    /// TCP or UDP.
    pub protocol: Transport,
    /// Length of the TCP or UDP header with its options, in bytes.
    pub header_len: usize,
}

/// Finds the transport header of the outer packet.
///
/// `None` if it is neither TCP nor UDP over IPv4 or IPv6, if it is a fragment, if
/// there are more tags or extension headers than are looked at, or if the frame
/// ends before the transport header does.
pub fn transport(frame: &[u8]) -> Option<TransportHeader> {
    let (ethertype, network_offset) = ethertype(frame, 0)?;
    let version = IpVersion::from_ethertype(ethertype)?;
    let network = network(frame, network_offset, version)?;
    let protocol = Transport::from_protocol(network.protocol)?;
    let offset = network.payload_offset;
    let header_len = protocol.header_len(frame, offset)?;
    Some(TransportHeader { version, network_offset, offset, protocol, header_len })
}

/// The EtherType behind the MAC addresses at `offset` and all tags, and the offset
/// of what it announces.
pub(crate) fn ethertype(frame: &[u8], offset: usize) -> Option<(u16, usize)> {
    let mut offset = offset.checked_add(MAC_ADDRESSES_LEN)?;
    for _ in 0..=TAGS_MAX {
        let ethertype = read_u16(frame, offset)?;
        if Tpid::from_ethertype(ethertype).is_none() {
            return Some((ethertype, offset + 2));
        }
        offset += TAG_LEN;
    }
    None
}

/// An IP header with everything that belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Network {
    /// Protocol number of the payload.
    pub(crate) protocol: u8,
    /// First byte behind the options or extension headers.
    pub(crate) payload_offset: usize,
    /// The destination address may not be that of the pseudo header: there are
    /// IPv4 options (one may be a source route) or an IPv6 routing header with
    /// segments left (RFC 8200 section 8.1).
    pub(crate) rerouted: bool,
}

/// Reads the IP header at `offset`. `None` for fragments and for what is not whole.
pub(crate) fn network(frame: &[u8], offset: usize, version: IpVersion) -> Option<Network> {
    let header = frame.get(offset..)?;
    match version {
        IpVersion::V4 => network_v4(header, offset),
        IpVersion::V6 => network_v6(header, offset),
    }
}

fn network_v4(header: &[u8], offset: usize) -> Option<Network> {
    let first = *header.first()?;
    let len = usize::from(first & 0x0f) * 4;
    if first >> 4 != 4 || len < IPV4_HEADER_LEN || header.len() < len {
        return None;
    }
    if read_u16(header, 6)? & IPV4_FRAGMENT_MASK != 0 {
        return None;
    }
    Some(Network {
        protocol: *header.get(9)?,
        payload_offset: offset + len,
        rerouted: len > IPV4_HEADER_LEN,
    })
}

fn network_v6(header: &[u8], offset: usize) -> Option<Network> {
    if header.first()? >> 4 != 6 {
        return None;
    }
    let mut protocol = *header.get(6)?;
    let mut len = IPV6_HEADER_LEN;
    let mut rerouted = false;
    for _ in 0..=EXTENSION_HEADERS_MAX {
        if header.len() < len {
            return None;
        }
        if !matches!(protocol, HOP_BY_HOP | ROUTING | DESTINATION_OPTIONS) {
            // 44, a fragment header, is no transport either: the callers stop at it.
            return Some(Network { protocol, payload_offset: offset + len, rerouted });
        }
        let segments_left = *header.get(len + 3)?;
        rerouted |= protocol == ROUTING && segments_left != 0;
        protocol = *header.get(len)?;
        len += (usize::from(*header.get(len + 1)?) + 1) * 8;
    }
    None
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
    use super::*;

    fn ethernet(tags: &[u16], ethertype: u16) -> Vec<u8> {
        let mut frame = vec![2; 12];
        for tpid in tags {
            frame.extend(tpid.to_be_bytes());
            frame.extend([0, 5]);
        }
        frame.extend(ethertype.to_be_bytes());
        frame
    }

    fn ipv4(protocol: u8, options: usize) -> Vec<u8> {
        let mut header = vec![0; 20 + options];
        header[0] = 0x45 + (options / 4) as u8;
        header[9] = protocol;
        header
    }

    fn ipv6(next: u8) -> Vec<u8> {
        let mut header = vec![0; 40];
        header[0] = 0x60;
        header[6] = next;
        header
    }

    fn tcp(options: usize) -> Vec<u8> {
        let mut header = vec![0; 20 + options];
        header[12] = ((5 + options / 4) << 4) as u8;
        header
    }

    #[test]
    fn tcp_behind_any_number_of_tags_up_to_four() {
        let tpids = [0x8100, 0x88a8, 0x9100, 0x9200, 0x8100];
        for count in 0..=4 {
            let frame = [ethernet(&tpids[..count], 0x0800), ipv4(6, 8), tcp(12)].concat();
            let network_offset = 14 + 4 * count;
            assert_eq!(
                transport(&frame),
                Some(TransportHeader {
                    version: IpVersion::V4,
                    network_offset,
                    offset: network_offset + 28,
                    protocol: Transport::Tcp,
                    header_len: 32,
                })
            );
        }
        assert_eq!(transport(&[ethernet(&tpids, 0x0800), ipv4(6, 0), tcp(0)].concat()), None);
    }

    #[test]
    fn udp_behind_extension_headers() {
        let frame = [
            ethernet(&[], 0x86dd),
            ipv6(0),
            vec![60, 0, 0, 0, 0, 0, 0, 0],          // hop-by-hop
            [&[43, 1][..], &[0; 14]].concat(),      // destination options, 16 bytes
            [&[17, 0, 2, 1][..], &[0; 4]].concat(), // routing
            vec![0; 8],
        ]
        .concat();
        let found = transport(&frame).unwrap();
        assert_eq!((found.network_offset, found.offset), (14, 14 + 40 + 32));
        assert_eq!(
            (found.protocol, found.header_len, found.version),
            (Transport::Udp, 8, IpVersion::V6)
        );
    }

    #[test]
    fn a_packet_on_its_way_by_source_routing_is_marked() {
        let routing = |left| [&[17, 0, 2, left, 0, 0, 0, 0][..], &[0; 8]].concat();
        for (left, rerouted) in [(0, false), (1, true)] {
            let packet = [ipv6(43), routing(left)].concat();
            assert_eq!(network(&packet, 0, IpVersion::V6).unwrap().rerouted, rerouted);
        }
        for (options, rerouted) in [(0, false), (4, true)] {
            assert_eq!(network(&ipv4(6, options), 0, IpVersion::V4).unwrap().rerouted, rerouted);
        }
    }

    #[test]
    fn extension_headers_without_end_are_given_up() {
        for count in [EXTENSION_HEADERS_MAX, EXTENSION_HEADERS_MAX + 1] {
            let mut frame = [ethernet(&[], 0x86dd), ipv6(if count > 0 { 60 } else { 17 })].concat();
            for index in 1..=count {
                frame.extend([if index == count { 17 } else { 60 }, 0, 0, 0, 0, 0, 0, 0]);
            }
            frame.extend([0; 8]);
            assert_eq!(transport(&frame).is_some(), count == EXTENSION_HEADERS_MAX);
        }
    }

    #[test]
    fn fragments_have_no_transport() {
        for fragment in [[0x20, 0x00], [0x00, 0x01], [0x20, 0x10]] {
            let mut frame = [ethernet(&[], 0x0800), ipv4(17, 0), vec![0; 8]].concat();
            assert!(transport(&frame).is_some());
            frame[20..22].copy_from_slice(&fragment);
            assert_eq!(transport(&frame), None);
        }
        // "Do not fragment" is not a fragment.
        let mut frame = [ethernet(&[], 0x0800), ipv4(17, 0), vec![0; 8]].concat();
        frame[20] = 0x40;
        assert!(transport(&frame).is_some());
        let v6 =
            [ethernet(&[], 0x86dd), ipv6(44), vec![17, 0, 0, 0, 0, 0, 0, 0], vec![0; 8]].concat();
        assert_eq!(transport(&v6), None);
    }

    #[test]
    fn every_truncation_is_none() {
        let frames = [
            [ethernet(&[0x8100], 0x0800), ipv4(6, 4), tcp(4)].concat(),
            [ethernet(&[0x9100], 0x86dd), ipv6(60), vec![17, 0, 0, 0, 0, 0, 0, 0], vec![0; 8]]
                .concat(),
        ];
        for frame in frames {
            assert!(transport(&frame).is_some());
            for len in 0..frame.len() {
                assert_eq!(transport(&frame[..len]), None, "cut to {len}");
            }
        }
    }

    #[test]
    fn impossible_lengths_are_none() {
        let mut frame = [ethernet(&[], 0x0800), ipv4(6, 0), tcp(0)].concat();
        frame[14] = 0x44;
        assert_eq!(transport(&frame), None);
        frame[14] = 0x65;
        assert_eq!(transport(&frame), None);
        frame[14] = 0x45;
        frame[34 + 12] = 0x40;
        assert_eq!(transport(&frame), None);
        frame[34 + 12] = 0xf0;
        assert_eq!(transport(&frame), None);
    }

    #[test]
    fn tunnels_and_strangers_are_none() {
        for protocol in [1, 4, 41, 47, 50, 132] {
            let frame = [ethernet(&[], 0x0800), ipv4(protocol, 0), vec![0x45; 60]].concat();
            assert_eq!(transport(&frame), None);
        }
        assert_eq!(transport(&[ethernet(&[], 0x0806), ipv4(6, 0), tcp(0)].concat()), None);
    }
}
