//! IP packets with TCP and UDP, written and checked with `etherparse`.

use super::frames::{Frame, GUEST_MAC, PEER_MAC};
use etherparse::{
    IpHeaders, IpNumber, NetSlice, PacketBuilder, PacketBuilderStep, SlicedPacket, TcpHeader,
    TransportSlice,
};

/// Which IP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Version {
    /// Its EtherType.
    pub fn ether_type(self) -> u16 {
        match self {
            Self::V4 => 0x0800,
            Self::V6 => 0x86dd,
        }
    }

    /// Length of its header without options.
    pub fn header_len(self) -> usize {
        match self {
            Self::V4 => 20,
            Self::V6 => 40,
        }
    }
}

/// `struct virtio_net_hdr`, field by field.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct Vnet {
    /// 1: NEEDS_CSUM, 2: DATA_VALID.
    pub flags: u8,
    /// 1: TCPv4, 3: UFO, 4: TCPv6, 5: UDP_L4.
    pub gso_type: u8,
    /// Length of all headers.
    pub hdr_len: u16,
    /// Payload of a segment.
    pub gso_size: u16,
    /// Where the checksum starts.
    pub csum_start: u16,
    /// Where it stands, from there.
    pub csum_offset: u16,
}

impl Vnet {
    /// As the kernel reads it.
    pub fn bytes(&self) -> [u8; 10] {
        let mut bytes = [0; 10];
        bytes[0] = self.flags;
        bytes[1] = self.gso_type;
        bytes[2..4].copy_from_slice(&self.hdr_len.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.gso_size.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.csum_start.to_ne_bytes());
        bytes[8..10].copy_from_slice(&self.csum_offset.to_ne_bytes());
        bytes
    }

    /// As the kernel writes it.
    pub fn read(bytes: &[u8]) -> Self {
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    /// The same frame with `tags` more tags in front.
    pub fn behind_tags(self, tags: usize) -> Self {
        let further = 4 * tags as u16;
        let csum_start = if self.flags & 1 == 0 { 0 } else { self.csum_start + further };
        let hdr_len = if self.hdr_len == 0 { 0 } else { self.hdr_len + further };
        Self { csum_start, hdr_len, ..self }
    }
}

/// Source and destination for [`tcp`] and [`udp`].
fn addressed(version: Version) -> PacketBuilderStep<IpHeaders> {
    let headers = match version {
        Version::V4 => {
            let mut header =
                etherparse::Ipv4Header::new(0, 64, IpNumber::TCP, [10, 0, 0, 2], [10, 0, 0, 1])
                    .unwrap();
            header.identification = 7;
            IpHeaders::Ipv4(header, Default::default())
        }
        Version::V6 => {
            let end = |last: u8| {
                let mut address = [0u8; 16];
                (address[0], address[15]) = (0xfd, last);
                address
            };
            let header = etherparse::Ipv6Header {
                source: end(2),
                destination: end(1),
                hop_limit: 64,
                next_header: IpNumber::TCP,
                ..Default::default()
            };
            IpHeaders::Ipv6(header, Default::default())
        }
    };
    PacketBuilder::ip(headers)
}

/// An IP packet as the payload of a frame from the far end to the guest.
fn framed(version: Version, packet: Vec<u8>) -> Frame {
    Frame {
        destination: GUEST_MAC,
        source: PEER_MAC,
        tags: Vec::new(),
        ether_type: version.ether_type(),
        payload: packet,
    }
}

/// A whole TCP packet, checksums complete.
pub fn tcp(version: Version, sequence: u32, data: &[u8]) -> Frame {
    let mut header = TcpHeader::new(1000, 2000, sequence, 1000);
    (header.ack, header.acknowledgment_number) = (true, 1);
    let mut packet = Vec::new();
    addressed(version).tcp_header(header).write(&mut packet, data).unwrap();
    framed(version, packet)
}

/// The same with an IPv4 identification, which the kernel's GRO wants in steps.
pub fn tcp_identified(identification: u16, sequence: u32, data: &[u8]) -> Frame {
    let mut frame = tcp(Version::V4, sequence, data);
    identify(&mut frame.payload, identification);
    frame
}

/// Sets the identification of an IPv4 packet, and its checksum.
pub fn identify(packet: &mut [u8], identification: u16) {
    packet[4..6].copy_from_slice(&identification.to_be_bytes());
    packet[10..12].fill(0);
    let sum = !ones_sum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// A whole UDP packet, checksums complete.
pub fn udp(version: Version, data: &[u8]) -> Frame {
    let mut packet = Vec::new();
    addressed(version).udp(1000, 2000).write(&mut packet, data).unwrap();
    framed(version, packet)
}

/// A super-frame (or with `gso_size` 0 a frame) whose transport checksum is left
/// to whoever sends it at last, and the header that says so. Positions count from
/// the start of the untagged frame.
pub fn partial(frame: &Frame, version: Version, gso_size: u16) -> (Vnet, Frame) {
    let mut frame = frame.clone();
    let start = version.header_len();
    let packet = &mut frame.payload;
    let (protocol, addresses) = match version {
        Version::V4 => (packet[9], packet[12..20].to_vec()),
        Version::V6 => (packet[6], packet[8..40].to_vec()),
    };
    let udp = protocol == 17;
    let offset = if udp { 6 } else { 16 };
    let mut pseudo = addresses;
    pseudo.extend(((packet.len() - start) as u32).to_be_bytes());
    pseudo.extend([0, 0, 0, protocol]);
    let sum = ones_sum(&pseudo);
    packet[start + offset..start + offset + 2].copy_from_slice(&sum.to_be_bytes());
    let transport = if udp { 8 } else { 20 };
    let header = Vnet {
        flags: 1,
        gso_type: match (gso_size, udp, version) {
            (0, _, _) => 0,
            (_, true, _) => 5,
            (_, false, Version::V4) => 1,
            (_, false, Version::V6) => 4,
        },
        hdr_len: (14 + start + transport) as u16,
        gso_size,
        csum_start: (14 + start) as u16,
        csum_offset: offset as u16,
    };
    (header, frame)
}

/// RFC 1071's sum, naively, not inverted.
pub fn ones_sum(bytes: &[u8]) -> u16 {
    let mut sum: u32 = 0;
    for pair in bytes.chunks(2) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |low| u32::from(*low));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What a whole, correct TCP or UDP packet carries; fails the test if a checksum
/// or a length in it is wrong.
pub fn checked_payload(frame: &Frame) -> Vec<u8> {
    let ether_type = etherparse::EtherType(frame.ether_type);
    let packet = SlicedPacket::from_ether_type(ether_type, &frame.payload);
    let packet = packet.unwrap_or_else(|error| panic!("{frame:?}: {error}"));
    match packet.net.as_ref().expect("IP") {
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            let sum = header.to_header().calc_header_checksum();
            assert_eq!(header.header_checksum(), sum, "IPv4 checksum of {frame:?}");
            assert_eq!(usize::from(header.total_len()), frame.payload.len(), "{frame:?}");
        }
        NetSlice::Ipv6(ip) => {
            let length = usize::from(ip.header().payload_length()) + 40;
            assert_eq!(length, frame.payload.len(), "{frame:?}");
        }
        other => panic!("{other:?}"),
    }
    let ip = packet.net.as_ref().unwrap();
    match packet.transport.as_ref().expect("TCP or UDP") {
        TransportSlice::Tcp(tcp) => {
            let header = tcp.to_header();
            let sum = match ip {
                NetSlice::Ipv4(v4) => {
                    let ip = v4.header();
                    header.calc_checksum_ipv4_raw(ip.source(), ip.destination(), tcp.payload())
                }
                NetSlice::Ipv6(v6) => {
                    let ip = v6.header();
                    header.calc_checksum_ipv6_raw(ip.source(), ip.destination(), tcp.payload())
                }
                other => panic!("{other:?}"),
            };
            assert_eq!(tcp.checksum(), sum.unwrap(), "TCP checksum of {frame:?}");
            tcp.payload().to_vec()
        }
        TransportSlice::Udp(udp) => {
            let header = udp.to_header();
            let sum = match ip {
                NetSlice::Ipv4(v4) => {
                    let ip = v4.header();
                    header.calc_checksum_ipv4_raw(ip.source(), ip.destination(), udp.payload())
                }
                NetSlice::Ipv6(v6) => {
                    let ip = v6.header();
                    header.calc_checksum_ipv6_raw(ip.source(), ip.destination(), udp.payload())
                }
                other => panic!("{other:?}"),
            };
            assert_eq!(udp.checksum(), sum.unwrap(), "UDP checksum of {frame:?}");
            udp.payload().to_vec()
        }
        other => panic!("{other:?}"),
    }
}
