//! Cutting a super-frame into frames of the wire, without the kernel's help.
//!
//! The kernel segments what `virtio_net_hdr` can describe: TCP or UDP of the outer
//! packet. GRO also merges what is inside GRE, IPIP and VXLAN, and the header it
//! hands out for that says plain TCP, with `csum_start` at the *inner* transport
//! header. Such a frame is lost when sent as it is, so it is cut here.
//!
//! [`Segmenter::new`] walks the headers from the outside until a transport header
//! stands exactly at `csum_start`, and writes down on the way what has to be
//! mended in each segment (a `Layer` each). [`Segmenter::next_into`] then copies
//! the headers and the next `gso_size` bytes of payload, and mends from the inside
//! out, because each checksum covers what is inside it:
//!
//! - TCP: sequence number; FIN and PSH only in the last segment, CWR only in the
//!   first; checksum (`net/ipv4/tcp_offload.c`, `tcp_gso_segment`);
//! - UDP, inner or of a tunnel: length and checksum; a tunnel's checksum of 0
//!   stays 0 (`net/ipv4/udp_offload.c`, `__udp_gso_segment` and
//!   `__skb_udp_tunnel_segment`);
//! - GRE: its checksum, if it has one (`net/ipv4/gre_offload.c`);
//! - IPv4: total length, header checksum, and the identification counted up from
//!   that of the super-frame, in every layer. The kernel does the same, with "do
//!   not fragment" or without (`net/ipv4/af_inet.c`, `inet_gso_segment`; the type
//!   `SKB_GSO_TCP_FIXEDID`, which would keep it, does not fit a virtio header);
//! - IPv6: payload length.
//!
//! Lengths in the super-frame's own headers are not believed: they may not fit
//! their fields. The frame's length counts. UDP tunnels are told apart by their
//! structure, not by port. What is not understood is an error, never a guess: a
//! GRE sequence number, for one, cannot be the same in two segments.

use super::checksum::{Sum, pseudo_header_v4, pseudo_header_v6};
use super::headers::{self, IPV6_HEADER_LEN, IpVersion, Network, Transport, UDP_HEADER_LEN};
use super::read_u16;
use super::vnet::{
    GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, TCP_SEGMENT_MIN, UDP_SEGMENTS_MAX, VnetHeader,
};
use arrayvec::ArrayVec;

/// How many IP headers may be nested in a frame.
pub const NETWORKS_MAX: usize = 4;
/// Each IP header and what is between it and the next: a UDP or GRE header.
const LAYERS_MAX: usize = 2 * NETWORKS_MAX;

/// IP protocol numbers of packets inside IP packets.
const PROTOCOL_IPV4: u8 = 4;
const PROTOCOL_UDP: u8 = 17;
const PROTOCOL_IPV6: u8 = 41;
const PROTOCOL_GRE: u8 = 47;

/// EtherType of Ethernet frames inside GRE and Geneve (Trans Ether Bridging).
const ETHERTYPE_ETHERNET: u16 = 0x6558;

/// GRE flags: a checksum, a key (RFC 2784, RFC 2890).
const GRE_CHECKSUM: u16 = 0x8000;
const GRE_KEY: u16 = 0x2000;

/// Length of the VXLAN header (RFC 7348) and of the fixed Geneve header (RFC
/// 8926), in bytes.
const TUNNEL_HEADER_LEN: usize = 8;
/// VXLAN flags: a VNI, and, with VXLAN-GPE, a next protocol.
const VXLAN_VNI: u8 = 0x08;
const VXLAN_NEXT_PROTOCOL: u8 = 0x04;

/// TCP flags, in byte 13 of the header (RFC 9293 section 3.1).
const TCP_FIN: u8 = 0x01;
const TCP_PSH: u8 = 0x08;
const TCP_CWR: u8 = 0x80;

/// Why a super-frame cannot be cut. The caller counts it as `bad_offload`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SegmentError {
    /// Not one of the types that can be cut.
    #[error("gso_type {0:#04x} is not that of a TCP or UDP super-frame")]
    Type(u8),
    /// No segment size, or one too small to be meant.
    #[error("gso_size {0} is too small")]
    SegmentSize(u16),
    /// More UDP segments than the kernel makes of one frame.
    #[error("{0} UDP segments in one frame, at most {UDP_SEGMENTS_MAX} are cut")]
    SegmentCount(usize),
    /// A segment does not fit the length fields of IP.
    #[error("a segment of {0} bytes does not fit an IP packet")]
    SegmentLength(usize),
    /// The frame ends within a header, a header has an impossible length, or it is
    /// a fragment.
    #[error("the header at byte {0} is cut off, malformed, or of a fragment")]
    Malformed(usize),
    /// A header between Ethernet and `csum_start` that is not understood.
    #[error("the header at byte {0} is of no known tunnel")]
    Unknown(usize),
    /// No transport header of the right kind at `csum_start`, or the checksum is
    /// not where this transport has it.
    #[error("no matching TCP or UDP header at csum_start {0}")]
    Transport(usize),
    /// More IP headers than are looked at.
    #[error("more than {NETWORKS_MAX} nested IP headers")]
    Depth,
    /// The addresses in the IP header at this offset may not be those the checksum
    /// covers (source routing), and the frame does not carry their sum.
    #[error("the packet at byte {0} is source-routed: its checksum cannot be made")]
    Rerouted(usize),
    /// The buffer is too small for the next segment. Nothing was written; try
    /// again with a larger one.
    #[error("a segment of {needed} bytes does not fit a buffer of {available}")]
    BufferTooSmall {
        /// Length of the segment, in bytes.
        needed: usize,
        /// Length of the buffer, in bytes.
        available: usize,
    },
}

/// A header that is different in each segment, around the inner transport.
#[derive(Debug, Clone, Copy)]
enum Layer {
    /// An IPv4 header: its offset and length, and the first identification.
    Ipv4 { offset: usize, header_len: usize, identification: u16 },
    /// An IPv6 header.
    Ipv6 { offset: usize },
    /// A UDP header of a tunnel; with the sum of addresses and protocol if it has
    /// a checksum.
    Udp { offset: usize, addresses: Option<Sum> },
    /// A GRE header that has a checksum.
    Gre { offset: usize },
}

/// What the next header of the walk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Ethernet,
    Ip(IpVersion),
}

/// The transport header whose payload is cut.
#[derive(Debug, Clone, Copy)]
struct Innermost {
    protocol: Transport,
    offset: usize,
    /// Sum of the pseudo header without its length.
    addresses: Sum,
    /// TCP: sequence number of the first segment.
    sequence: u32,
    /// TCP: the flags of the super-frame.
    flags: u8,
}

/// Cuts one super-frame.
#[derive(Debug, Clone)]
pub struct Segmenter<'f> {
    /// Everything up to the payload.
    headers: &'f [u8],
    payload: &'f [u8],
    segment_size: usize,
    layers: ArrayVec<Layer, LAYERS_MAX>,
    innermost: Innermost,
    /// The next segment: 0 is the first.
    next: usize,
    count: usize,
}

impl<'f> Segmenter<'f> {
    /// Prepares to cut `frame`, which has all its tags in its bytes; `header`
    /// describes it as it is, `csum_start` counted from its first byte.
    ///
    /// # Errors
    /// A [`SegmentError`] if the header or the frame is malformed, or holds
    /// something that cannot be cut.
    pub fn new(frame: &'f [u8], header: VnetHeader) -> Result<Self, SegmentError> {
        let (protocol, version) = match header.gso_type & !GSO_ECN {
            GSO_TCPV4 => (Transport::Tcp, Some(IpVersion::V4)),
            GSO_TCPV6 => (Transport::Tcp, Some(IpVersion::V6)),
            GSO_UDP_L4 => (Transport::Udp, None),
            _ => return Err(SegmentError::Type(header.gso_type)),
        };
        let smallest = if protocol == Transport::Tcp { TCP_SEGMENT_MIN } else { 1 };
        if header.gso_size < smallest {
            return Err(SegmentError::SegmentSize(header.gso_size));
        }
        let target = target(frame, header, protocol)?;
        let mut walk = Walk { frame, target, layers: ArrayVec::new() };
        let inner = walk.run()?;
        let wanted = Transport::from_protocol(inner.network.protocol) == Some(protocol)
            && version.is_none_or(|version| version == inner.version);
        if !wanted {
            return Err(SegmentError::Transport(target));
        }
        let header_len =
            protocol.header_len(frame, target).ok_or(SegmentError::Malformed(target))?;
        let (headers, payload) =
            frame.split_at_checked(target + header_len).ok_or(SegmentError::Malformed(target))?;

        let segment_size = usize::from(header.gso_size);
        let count = payload.len().div_ceil(segment_size).max(1);
        if protocol == Transport::Udp && count > UDP_SEGMENTS_MAX {
            return Err(SegmentError::SegmentCount(count));
        }
        let longest = headers.len() + segment_size.min(payload.len());
        if longest - walk.outer_network().unwrap_or(0) > usize::from(u16::MAX) {
            return Err(SegmentError::SegmentLength(longest));
        }
        let addresses = if !inner.network.rerouted {
            inner.addresses(frame, protocol).ok_or(SegmentError::Malformed(inner.offset))?
        } else if header.needs_csum() {
            addresses_from_checksum(frame, target, protocol)
                .ok_or(SegmentError::Malformed(target))?
        } else {
            return Err(SegmentError::Rerouted(inner.offset));
        };
        let innermost = Innermost {
            protocol,
            offset: target,
            addresses,
            sequence: read_u32(headers, target + 4).ok_or(SegmentError::Malformed(target))?,
            flags: headers.get(target + 13).copied().unwrap_or(0),
        };
        Ok(Self { headers, payload, segment_size, layers: walk.layers, innermost, next: 0, count })
    }

    /// How many segments the frame makes, at least 1.
    pub const fn segment_count(&self) -> usize {
        self.count
    }

    /// How many segments are still to be written.
    pub const fn remaining(&self) -> usize {
        self.count - self.next
    }

    /// Length of the longest segment, in bytes: a buffer of this size always does.
    pub fn segment_len_max(&self) -> usize {
        self.headers.len() + self.segment_size.min(self.payload.len())
    }

    /// Writes the next segment to the start of `out` and returns its length in
    /// bytes; `None` after the last. It is a complete frame: its virtio header is
    /// all zero.
    ///
    /// # Errors
    /// [`SegmentError::BufferTooSmall`] if `out` cannot hold it.
    pub fn next_into(&mut self, out: &mut [u8]) -> Result<Option<usize>, SegmentError> {
        if self.next >= self.count {
            return Ok(None);
        }
        let first = self.next * self.segment_size;
        let last = self.payload.len().min(first + self.segment_size);
        let payload = self.payload.get(first..last).unwrap_or_default();
        let len = self.headers.len() + payload.len();
        let available = out.len();
        let too_small = SegmentError::BufferTooSmall { needed: len, available };
        let segment = out.get_mut(..len).ok_or(too_small)?;
        let (to_headers, to_payload) =
            segment.split_at_mut_checked(self.headers.len()).ok_or(too_small)?;
        to_headers.copy_from_slice(self.headers);
        to_payload.copy_from_slice(payload);
        // Every offset lies in the headers, which are all there, so this cannot
        // fail; were it to, no half-made segment leaves.
        self.mend(segment).ok_or(SegmentError::Malformed(self.innermost.offset))?;
        self.next += 1;
        Ok(Some(len))
    }

    /// Makes the headers of a copy of the super-frame's headers right.
    fn mend(&self, segment: &mut [u8]) -> Option<()> {
        self.mend_innermost(segment)?;
        for layer in self.layers.iter().rev() {
            match *layer {
                Layer::Ipv4 { offset, header_len, identification } => {
                    let header = segment.get_mut(offset..)?;
                    let total_len = u16::try_from(header.len()).ok()?;
                    write_u16(header, 2, total_len)?;
                    // Modulo 2^16, as the field counts.
                    write_u16(header, 4, identification.wrapping_add(self.next as u16))?;
                    write_u16(header, 10, 0)?;
                    let checksum = Sum::of(header.get(..header_len)?).checksum();
                    write_u16(header, 10, checksum)?;
                }
                Layer::Ipv6 { offset } => {
                    let header = segment.get_mut(offset..)?;
                    let payload_len = header.len().checked_sub(IPV6_HEADER_LEN)?;
                    write_u16(header, 4, u16::try_from(payload_len).ok()?)?;
                }
                Layer::Udp { offset, addresses } => {
                    mend_udp(segment.get_mut(offset..)?, addresses)?;
                }
                Layer::Gre { offset } => {
                    let header = segment.get_mut(offset..)?;
                    write_u16(header, 4, 0)?;
                    write_u16(header, 6, 0)?;
                    let checksum = Sum::of(header).checksum();
                    write_u16(header, 4, checksum)?;
                }
            }
        }
        Some(())
    }

    fn mend_innermost(&self, segment: &mut [u8]) -> Option<()> {
        let inner = &self.innermost;
        let header = segment.get_mut(inner.offset..)?;
        if inner.protocol == Transport::Udp {
            return mend_udp(header, Some(inner.addresses));
        }
        // Modulo 2^32, as TCP counts.
        let sequence = inner.sequence.wrapping_add((self.next * self.segment_size) as u32);
        header.get_mut(4..8)?.copy_from_slice(&sequence.to_be_bytes());
        let mut flags = inner.flags;
        if self.next > 0 {
            flags &= !TCP_CWR;
        }
        if self.next + 1 < self.count {
            flags &= !(TCP_FIN | TCP_PSH);
        }
        *header.get_mut(13)? = flags;
        write_u16(header, 16, 0)?;
        let len = u32::try_from(header.len()).ok()?;
        let checksum = inner.addresses.with_u32(len).with(Sum::of(header)).checksum();
        write_u16(header, 16, checksum)
    }
}

/// Length, and checksum if there is to be one, of the UDP datagram that fills the
/// slice.
fn mend_udp(datagram: &mut [u8], addresses: Option<Sum>) -> Option<()> {
    let len = u16::try_from(datagram.len()).ok()?;
    write_u16(datagram, 4, len)?;
    let Some(addresses) = addresses else {
        return Some(());
    };
    write_u16(datagram, 6, 0)?;
    let checksum = addresses.with_u16(len).with(Sum::of(datagram)).udp_checksum();
    write_u16(datagram, 6, checksum)
}

/// Where the innermost transport header stands.
fn target(frame: &[u8], header: VnetHeader, protocol: Transport) -> Result<usize, SegmentError> {
    let csum_start = usize::from(header.csum_start);
    if !header.needs_csum() {
        // Nothing was merged by GRO then: the outer packet is meant.
        let found = headers::transport(frame).ok_or(SegmentError::Transport(0))?;
        return Ok(found.offset);
    }
    if header.csum_offset != protocol.checksum_offset() {
        return Err(SegmentError::Transport(csum_start));
    }
    Ok(csum_start)
}

/// The sum of the pseudo header without its length, from the checksum field of the
/// super-frame: `NEEDS_CSUM` promises that it holds the whole pseudo header.
fn addresses_from_checksum(frame: &[u8], offset: usize, protocol: Transport) -> Option<Sum> {
    let pseudo_header = read_u16(frame, offset + usize::from(protocol.checksum_offset()))?;
    let len = u32::try_from(frame.len().checked_sub(offset)?).ok()?;
    Some(Sum::default().with_u16(pseudo_header).without(Sum::default().with_u32(len)))
}

/// An IP header of the walk.
#[derive(Debug, Clone, Copy)]
struct Ip {
    version: IpVersion,
    offset: usize,
    network: Network,
}

impl Ip {
    /// The sum of the pseudo header without its length.
    fn addresses(&self, frame: &[u8], protocol: Transport) -> Option<Sum> {
        let header = frame.get(self.offset..)?;
        match self.version {
            IpVersion::V4 => {
                let addresses = header.get(12..)?.first_chunk()?;
                Some(pseudo_header_v4(addresses, protocol.protocol(), 0))
            }
            IpVersion::V6 => {
                let addresses = header.get(8..)?.first_chunk()?;
                Some(pseudo_header_v6(addresses, protocol.protocol(), 0))
            }
        }
    }
}

/// The walk from the outer Ethernet header to the header at `target`.
struct Walk<'f> {
    frame: &'f [u8],
    target: usize,
    layers: ArrayVec<Layer, LAYERS_MAX>,
}

impl Walk<'_> {
    /// Returns the IP header whose payload starts at the target.
    fn run(&mut self) -> Result<Ip, SegmentError> {
        let mut offset = 0;
        let mut content = Content::Ethernet;
        let mut networks = 0;
        // Each turn moves on by a header; Ethernet is followed by IP or the end.
        loop {
            match content {
                Content::Ethernet => {
                    let (ethertype, behind) = headers::ethertype(self.frame, offset)
                        .ok_or(SegmentError::Malformed(offset))?;
                    let version = IpVersion::from_ethertype(ethertype)
                        .ok_or(SegmentError::Unknown(behind))?;
                    (content, offset) = (Content::Ip(version), behind);
                }
                Content::Ip(version) => {
                    networks += 1;
                    if networks > NETWORKS_MAX {
                        return Err(SegmentError::Depth);
                    }
                    let network = headers::network(self.frame, offset, version)
                        .ok_or(SegmentError::Malformed(offset))?;
                    let ip = Ip { version, offset, network };
                    self.note_ip(&ip)?;
                    if network.payload_offset == self.target {
                        return Ok(ip);
                    }
                    if network.payload_offset > self.target {
                        return Err(SegmentError::Transport(self.target));
                    }
                    (content, offset) = self.inside(&ip)?;
                }
            }
        }
    }

    /// Offset of the outermost IP header.
    fn outer_network(&self) -> Option<usize> {
        match *self.layers.first()? {
            Layer::Ipv4 { offset, .. } | Layer::Ipv6 { offset } => Some(offset),
            Layer::Udp { .. } | Layer::Gre { .. } => None,
        }
    }

    fn note(&mut self, layer: Layer) -> Result<(), SegmentError> {
        self.layers.try_push(layer).map_err(|_| SegmentError::Depth)
    }

    fn note_ip(&mut self, ip: &Ip) -> Result<(), SegmentError> {
        let offset = ip.offset;
        self.note(match ip.version {
            IpVersion::V4 => Layer::Ipv4 {
                offset,
                header_len: ip.network.payload_offset - offset,
                identification: read_u16(self.frame, offset + 4)
                    .ok_or(SegmentError::Malformed(offset))?,
            },
            IpVersion::V6 => Layer::Ipv6 { offset },
        })
    }

    /// What an IP packet that is not the innermost carries, and where.
    fn inside(&mut self, ip: &Ip) -> Result<(Content, usize), SegmentError> {
        let offset = ip.network.payload_offset;
        match ip.network.protocol {
            PROTOCOL_IPV4 => Ok((Content::Ip(IpVersion::V4), offset)),
            PROTOCOL_IPV6 => Ok((Content::Ip(IpVersion::V6), offset)),
            PROTOCOL_GRE => self.inside_gre(offset),
            PROTOCOL_UDP => self.inside_udp(ip),
            _ => Err(SegmentError::Unknown(offset)),
        }
    }

    /// GRE: RFC 2784, with the key of RFC 2890.
    fn inside_gre(&mut self, offset: usize) -> Result<(Content, usize), SegmentError> {
        let flags = read_u16(self.frame, offset).ok_or(SegmentError::Malformed(offset))?;
        let protocol = read_u16(self.frame, offset + 2).ok_or(SegmentError::Malformed(offset))?;
        if flags & !(GRE_CHECKSUM | GRE_KEY) != 0 {
            return Err(SegmentError::Unknown(offset));
        }
        let mut len = 4;
        if flags & GRE_CHECKSUM != 0 {
            self.note(Layer::Gre { offset })?;
            len += 4;
        }
        if flags & GRE_KEY != 0 {
            len += 4;
        }
        let content = content(protocol).ok_or(SegmentError::Unknown(offset))?;
        Ok((content, offset + len))
    }

    /// A tunnel over UDP.
    fn inside_udp(&mut self, ip: &Ip) -> Result<(Content, usize), SegmentError> {
        let offset = ip.network.payload_offset;
        let checksum = read_u16(self.frame, offset + 6).ok_or(SegmentError::Malformed(offset))?;
        let addresses = if checksum == 0 {
            None
        } else if ip.network.rerouted {
            return Err(SegmentError::Rerouted(ip.offset));
        } else {
            let addresses = ip.addresses(self.frame, Transport::Udp);
            Some(addresses.ok_or(SegmentError::Malformed(ip.offset))?)
        };
        self.note(Layer::Udp { offset, addresses })?;
        let tunnel = offset + UDP_HEADER_LEN;
        let header = self
            .frame
            .get(tunnel..)
            .and_then(<[u8]>::first_chunk)
            .ok_or(SegmentError::Malformed(tunnel))?;
        let (content, len) = udp_tunnel(header).ok_or(SegmentError::Unknown(tunnel))?;
        Ok((content, tunnel + len))
    }
}

/// What an EtherType in a tunnel header announces.
fn content(ethertype: u16) -> Option<Content> {
    match ethertype {
        ETHERTYPE_ETHERNET => Some(Content::Ethernet),
        _ => IpVersion::from_ethertype(ethertype).map(Content::Ip),
    }
}

/// Tells UDP tunnels apart by their first eight bytes: what they carry, and the
/// length of their header.
///
/// The formats exclude each other: Geneve of version 0 has an EtherType where VXLAN
/// has reserved zeros and where the low byte of VXLAN-GPE's is a small number;
/// neither VXLAN nor Geneve starts with the version nibble of an IP packet.
fn udp_tunnel(header: &[u8; TUNNEL_HEADER_LEN]) -> Option<(Content, usize)> {
    let [first, second, type_high, type_low, ..] = *header;
    match first >> 4 {
        // An IP packet right in UDP (`net/ipv4/fou_core.c`).
        4 => return Some((Content::Ip(IpVersion::V4), 0)),
        6 => return Some((Content::Ip(IpVersion::V6), 0)),
        _ => {}
    }
    let ethertype = u16::from_be_bytes([type_high, type_low]);
    // Geneve (RFC 8926): version 0, options counted in words, reserved bits clear.
    if let (0..0x40, 0, Some(content)) = (first, second & 0x3f, content(ethertype)) {
        return Some((content, TUNNEL_HEADER_LEN + usize::from(first) * 4));
    }
    if first & VXLAN_VNI == 0 {
        return None;
    }
    if first & VXLAN_NEXT_PROTOCOL == 0 {
        return Some((Content::Ethernet, TUNNEL_HEADER_LEN));
    }
    let content = match type_low {
        1 => Content::Ip(IpVersion::V4),
        2 => Content::Ip(IpVersion::V6),
        3 => Content::Ethernet,
        _ => return None,
    };
    Some((content, TUNNEL_HEADER_LEN))
}

/// Four bytes in network order at `offset`, if the slice reaches that far.
fn read_u32(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.get(offset..)?.first_chunk()?))
}

/// Writes two bytes in network order at `offset`, if the slice reaches that far.
fn write_u16(bytes: &mut [u8], offset: usize, value: u16) -> Option<()> {
    bytes.get_mut(offset..offset.checked_add(2)?)?.copy_from_slice(&value.to_be_bytes());
    Some(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "tests")]
    use super::super::vnet::FLAG_NEEDS_CSUM;
    use super::*;

    const TCP_PSH_FIN_CWR_ACK: u8 = 0x99;

    fn ethernet(tags: &[[u8; 4]], ethertype: u16, inside: &[u8]) -> Vec<u8> {
        let mut frame = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2];
        frame.extend(tags.concat());
        frame.extend(ethertype.to_be_bytes());
        frame.extend(inside);
        frame
    }

    /// Lengths and checksums stay 0: the segmenter must not need them.
    fn ipv4(protocol: u8, identification: u16, inside: &[u8]) -> Vec<u8> {
        let [high, low] = identification.to_be_bytes();
        let mut header = vec![0x45, 0, 0, 0, high, low, 0x40, 0, 64, protocol, 0, 0];
        header.extend([192, 0, 2, 1, 198, 51, 100, 2]);
        [&header, inside].concat()
    }

    fn ipv6(next: u8, inside: &[u8]) -> Vec<u8> {
        let mut header = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        header.extend((0..32).map(|index| index * 7));
        [&header, inside].concat()
    }

    fn tcp(sequence: u32, payload: usize) -> Vec<u8> {
        let mut header = vec![0x10, 0x20, 0x30, 0x40];
        header.extend(sequence.to_be_bytes());
        header.extend([0, 0, 0, 9, 0x50, TCP_PSH_FIN_CWR_ACK, 1, 0, 0, 0, 0, 0]);
        header.extend((0..payload).map(|index| (index % 251) as u8));
        header
    }

    fn udp(checksum: u16, inside: &[u8]) -> Vec<u8> {
        let [high, low] = checksum.to_be_bytes();
        [&[0x11, 0x22, 0x12, 0xb5, 0, 0, high, low][..], inside].concat()
    }

    fn header(frame: &[u8], gso_type: u8, gso_size: u16, transport_len: usize) -> VnetHeader {
        VnetHeader {
            flags: FLAG_NEEDS_CSUM,
            gso_type,
            hdr_len: 0,
            gso_size,
            csum_start: (frame.len() - transport_len) as u16,
            csum_offset: if gso_type == GSO_UDP_L4 { 6 } else { 16 },
        }
    }

    fn cut(frame: &[u8], header: VnetHeader) -> Result<Vec<Vec<u8>>, SegmentError> {
        let mut segmenter = Segmenter::new(frame, header)?;
        let mut out = vec![0xee; segmenter.segment_len_max()];
        let mut segments = Vec::new();
        while let Some(len) = segmenter.next_into(&mut out)? {
            segments.push(out[..len].to_vec());
            assert_eq!(segmenter.remaining(), segmenter.segment_count() - segments.len());
        }
        assert_eq!(segments.len(), segmenter.segment_count());
        Ok(segments)
    }

    fn u16_at(bytes: &[u8], offset: usize) -> u16 {
        u16::from_be_bytes([bytes[offset], bytes[offset + 1]])
    }

    /// A sum over all of a range that holds its own checksum is 0xffff.
    fn sums_to_ones(bytes: &[u8], pseudo: &[u8]) -> bool {
        let mut sum = 0_u64;
        for pair in pseudo.chunks(2).chain(bytes.chunks(2)) {
            sum += u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0));
        }
        sum.is_multiple_of(0xffff) && sum != 0
    }

    #[test]
    fn tcp_over_ipv4_with_a_tag() {
        let transport = tcp(0xffff_ff00, 2500);
        let frame = ethernet(&[[0x81, 0, 0, 5]], 0x0800, &ipv4(6, 0xffff, &transport));
        let segments = cut(&frame, header(&frame, GSO_TCPV4, 1000, transport.len())).unwrap();
        assert_eq!(segments.iter().map(Vec::len).collect::<Vec<_>>(), [1058, 1058, 558]);
        for (index, segment) in segments.iter().enumerate() {
            let (ip, transport) = (&segment[18..38], &segment[38..]);
            assert_eq!(segment[..18], frame[..18]);
            assert_eq!(usize::from(u16_at(ip, 2)), segment.len() - 18);
            assert_eq!(u16_at(ip, 4), 0xffff_u16.wrapping_add(index as u16));
            assert!(sums_to_ones(ip, &[]));
            let sequence = u32::from_be_bytes(transport[4..8].try_into().unwrap());
            assert_eq!(sequence, 0xffff_ff00_u32.wrapping_add(1000 * index as u32));
            let length = (transport.len() as u16).to_be_bytes();
            let pseudo = [&ip[12..20], &[0, 6, length[0], length[1]]].concat();
            assert!(sums_to_ones(transport, &pseudo));
        }
        assert_eq!([0, 1, 2].map(|index| segments[index][38 + 13]), [0x90, 0x10, 0x19]);
        let payload: Vec<u8> = segments.iter().flat_map(|segment| segment[58..].to_vec()).collect();
        assert_eq!(payload, frame[58..]);
    }

    #[test]
    fn gre_with_checksum_and_key_over_ipv6() {
        let transport = tcp(1, 3000);
        let packet = ipv4(6, 7, &transport);
        let gre = [&[0xa0, 0, 0x08, 0, 1, 2, 3, 4, 0, 0, 0, 5], &packet[..]].concat();
        let frame = ethernet(&[], 0x86dd, &ipv6(47, &gre));
        let segments = cut(&frame, header(&frame, GSO_TCPV4, 1000, transport.len())).unwrap();
        assert_eq!(segments.len(), 3);
        for (index, segment) in segments.iter().enumerate() {
            assert_eq!(usize::from(u16_at(segment, 14 + 4)), segment.len() - 54);
            let gre = &segment[54..];
            assert!(sums_to_ones(gre, &[]));
            assert_eq!(gre[6..12], [0, 0, 0, 0, 0, 5], "reserved word cleared, key kept");
            assert_eq!(u16_at(gre, 12 + 4), 7 + index as u16);
        }
    }

    #[test]
    fn outer_udp_checksum_is_made_only_where_there_was_one() {
        let transport = udp(0x1111, &[9; 2100]);
        let inner = ethernet(&[], 0x86dd, &ipv6(17, &transport));
        let vxlan = [&[8, 0, 0, 0, 0, 0, 5, 0], &inner[..]].concat();
        for checksum in [0, 0x4321] {
            let frame = ethernet(&[], 0x0800, &ipv4(17, 1, &udp(checksum, &vxlan)));
            let segments = cut(&frame, header(&frame, GSO_UDP_L4, 1000, transport.len())).unwrap();
            assert_eq!(segments.len(), 3);
            for segment in segments {
                let datagram = &segment[34..];
                assert_eq!(usize::from(u16_at(datagram, 4)), datagram.len());
                if checksum == 0 {
                    assert_eq!(u16_at(datagram, 6), 0);
                    continue;
                }
                let pseudo = [&segment[26..34], &[0, 17], &datagram[4..6]].concat();
                assert!(sums_to_ones(datagram, &pseudo));
            }
        }
    }

    #[test]
    fn a_udp_checksum_of_zero_is_written_as_ones() {
        let mut transport = udp(0x1111, &[0; 1000]);
        let frame = ethernet(&[], 0x0800, &ipv4(17, 1, &transport));
        let uso = header(&frame, GSO_UDP_L4, 1000, transport.len());
        let checksum = &cut(&frame, uso).unwrap()[0][34 + 6..34 + 8];
        // With its own checksum in the payload, the sum is all ones.
        transport[8..10].copy_from_slice(checksum);
        let frame = ethernet(&[], 0x0800, &ipv4(17, 1, &transport));
        assert_eq!(u16_at(&cut(&frame, uso).unwrap()[0], 34 + 6), 0xffff);
    }

    #[test]
    fn udp_tunnels_by_their_structure() {
        let ethernet = Some((Content::Ethernet, 8));
        let v4 = Content::Ip(IpVersion::V4);
        let v6 = Content::Ip(IpVersion::V6);
        for (bytes, expected) in [
            ([0x08, 0, 0, 0, 0, 0, 5, 0], ethernet),       // VXLAN
            ([0x88, 0, 0x65, 0x58, 0, 0, 5, 0], ethernet), // VXLAN-GBP, a group
            ([0x0c, 0, 0, 3, 0, 0, 5, 0], ethernet),       // VXLAN-GPE
            ([0x0c, 0, 0, 1, 0, 0, 5, 0], Some((v4, 8))),
            ([0x0c, 0, 0, 2, 0, 0, 5, 0], Some((v6, 8))),
            ([0x0c, 0, 0, 4, 0, 0, 5, 0], None),           // NSH
            ([0x00, 0, 0x65, 0x58, 0, 0, 5, 0], ethernet), // Geneve
            ([0x08, 0, 0x65, 0x58, 0, 0, 5, 0], Some((Content::Ethernet, 40))),
            ([0x3f, 0xc0, 0x08, 0x00, 0, 0, 5, 0], Some((v4, 260))),
            ([0x01, 0x40, 0x86, 0xdd, 0, 0, 5, 0], Some((v6, 12))),
            ([0x45, 0, 0, 99, 0, 0, 0, 0], Some((v4, 0))), // FOU
            ([0x60, 0, 0, 0, 0, 0, 0, 0], Some((v6, 0))),
            ([0x00, 0, 0, 0, 0, 0, 5, 0], None),
        ] {
            assert_eq!(udp_tunnel(&bytes), expected, "{bytes:02x?}");
        }
    }

    #[test]
    fn a_source_routed_packet_takes_the_sum_it_carries() {
        // A routing header with a segment left: the checksum covers the final
        // destination, which is not in the IPv6 header.
        let mut transport = tcp(1, 1500);
        let length = (transport.len() as u32).to_be_bytes();
        let end_to_end: Vec<u8> = [&[1; 32][..], &length, &[0, 0, 0, 6]].concat();
        let partial = Sum::of(&end_to_end).folded();
        transport[16..18].copy_from_slice(&partial.to_be_bytes());
        let routing = [&[6, 2, 0, 1, 0, 0, 0, 0][..], &[1; 16]].concat();
        let frame = ethernet(&[], 0x86dd, &ipv6(43, &[&routing[..], &transport].concat()));
        let good = header(&frame, GSO_TCPV6, 1000, transport.len());
        for segment in cut(&frame, good).unwrap() {
            let transport = &segment[14 + 40 + 24..];
            let length = (transport.len() as u32).to_be_bytes();
            let pseudo: Vec<u8> = [&[1; 32][..], &length, &[0, 0, 0, 6]].concat();
            assert!(sums_to_ones(transport, &pseudo));
        }
        let unknown = VnetHeader { flags: 0, ..good };
        assert_eq!(cut(&frame, unknown).unwrap_err(), SegmentError::Rerouted(14));
    }

    #[test]
    fn without_needs_csum_the_outer_transport_is_cut() {
        let transport = tcp(1, 1500);
        let frame = ethernet(&[], 0x0800, &ipv4(6, 1, &transport));
        let started = header(&frame, GSO_TCPV4, 1000, transport.len());
        let not_started = VnetHeader { flags: 0, csum_start: 0, csum_offset: 0, ..started };
        assert_eq!(cut(&frame, started), cut(&frame, not_started));
    }

    #[test]
    fn a_frame_of_one_segment_is_completed() {
        for payload in [0, 1, 1000] {
            let transport = tcp(1, payload);
            let frame = ethernet(&[], 0x0800, &ipv4(6, 1, &transport));
            let segments = cut(&frame, header(&frame, GSO_TCPV4, 1000, transport.len())).unwrap();
            assert_eq!(segments.len(), 1);
            assert_eq!(segments[0].len(), frame.len());
            assert_eq!(segments[0][34 + 13], TCP_PSH_FIN_CWR_ACK);
        }
    }

    #[test]
    fn a_small_buffer_loses_nothing() {
        let transport = tcp(1, 1500);
        let frame = ethernet(&[], 0x0800, &ipv4(6, 1, &transport));
        let good = header(&frame, GSO_TCPV4, 1000, transport.len());
        let mut segmenter = Segmenter::new(&frame, good).unwrap();
        let mut out = [0; 1054];
        assert_eq!(
            segmenter.next_into(&mut out[..1053]),
            Err(SegmentError::BufferTooSmall { needed: 1054, available: 1053 })
        );
        assert_eq!(segmenter.next_into(&mut out), Ok(Some(1054)));
        assert_eq!(segmenter.next_into(&mut out[..554]), Ok(Some(554)));
        assert_eq!(segmenter.next_into(&mut []), Ok(None));
    }

    #[test]
    fn what_is_malformed_is_an_error() {
        let transport = tcp(1, 1500);
        let frame = ethernet(&[], 0x0800, &ipv4(6, 1, &transport));
        let good = header(&frame, GSO_TCPV4, 1000, transport.len());
        for (bad, error) in [
            (VnetHeader { gso_type: 0, ..good }, SegmentError::Type(0)),
            (VnetHeader { gso_type: 3, ..good }, SegmentError::Type(3)),
            (VnetHeader { gso_size: 0, ..good }, SegmentError::SegmentSize(0)),
            (VnetHeader { gso_size: 7, ..good }, SegmentError::SegmentSize(7)),
            (VnetHeader { gso_type: GSO_TCPV6, ..good }, SegmentError::Transport(34)),
            (VnetHeader { csum_start: 33, ..good }, SegmentError::Transport(33)),
            (VnetHeader { csum_start: 35, ..good }, SegmentError::Unknown(34)),
            (VnetHeader { csum_offset: 6, ..good }, SegmentError::Transport(34)),
        ] {
            assert_eq!(cut(&frame, bad).unwrap_err(), error, "{bad:?}");
        }
        assert_eq!(cut(&frame[..53], good).unwrap_err(), SegmentError::Malformed(34));
        assert_eq!(cut(&frame[..33], good).unwrap_err(), SegmentError::Malformed(14));
        assert_eq!(cut(&[], good).unwrap_err(), SegmentError::Malformed(0));

        let sequenced = [&[0x10, 0, 0x08, 0, 0, 0, 0, 1], &ipv4(6, 1, &transport)[..]].concat();
        let frame = ethernet(&[], 0x0800, &ipv4(47, 1, &sequenced));
        let gre = header(&frame, GSO_TCPV4, 1000, transport.len());
        assert_eq!(cut(&frame, gre).unwrap_err(), SegmentError::Unknown(34));

        let transport = udp(0, &[7; 129]);
        let frame = ethernet(&[], 0x0800, &ipv4(17, 1, &transport));
        let many = header(&frame, GSO_UDP_L4, 1, transport.len());
        assert_eq!(cut(&frame, many).unwrap_err(), SegmentError::SegmentCount(129));
        assert_eq!(cut(&frame[..frame.len() - 1], many).unwrap().len(), 128);
    }

    #[test]
    fn nesting_ends_at_the_limit() {
        let transport = tcp(1, 1500);
        for networks in [NETWORKS_MAX, NETWORKS_MAX + 1] {
            let mut packet = ipv4(6, 1, &transport);
            for _ in 1..networks {
                packet = ipv4(4, 1, &packet);
            }
            let frame = ethernet(&[], 0x0800, &packet);
            let result = cut(&frame, header(&frame, GSO_TCPV4, 1000, transport.len()));
            if networks == NETWORKS_MAX {
                assert_eq!(result.unwrap().len(), 2);
            } else {
                assert_eq!(result.unwrap_err(), SegmentError::Depth);
            }
        }
    }

    #[test]
    fn a_segment_must_fit_an_ip_packet() {
        let transport = tcp(1, 65_500);
        let frame = ethernet(&[], 0x0800, &ipv4(6, 1, &transport));
        let huge = header(&frame, GSO_TCPV4, 65_500, transport.len());
        assert_eq!(cut(&frame, huge).unwrap_err(), SegmentError::SegmentLength(frame.len()));
        let fits = VnetHeader { gso_size: 65_535 - 40, ..huge };
        assert_eq!(cut(&frame, fits).unwrap().len(), 2);
    }
}
