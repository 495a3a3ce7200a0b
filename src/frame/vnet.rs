//! `struct virtio_net_hdr` (10 bytes), the kernel's description of a frame whose
//! checksum or segmentation is still to be done (`include/uapi/linux/virtio_net.h`,
//! virtio 1.2 clause 5.1.6).
//!
//! A header is never handed on as it came. [`check_offload`] looks at every frame
//! and makes the header to send it with, because the kernel believes what it is
//! told: `hdr_len` as received is a hint that may be far too long and becomes the
//! linear allocation (`net/packet/af_packet.c`, `packet_alloc_skb`), and GRO hands
//! out merged tunnel packets as if they were plain TCP, with `csum_start` at the
//! inner header. Sent on like that they vanish without an error, so they are told
//! apart here by walking the outer packet.

use super::headers::{self, IpVersion, Transport, TransportHeader};

/// Length of the header AF_PACKET and taps exchange, in bytes.
pub const VNET_HEADER_LEN: usize = 10;

/// `flags`: the checksum from `csum_start` on is to be completed.
pub const FLAG_NEEDS_CSUM: u8 = 1;
/// `flags`: the receiver has verified the checksum.
pub const FLAG_DATA_VALID: u8 = 2;

/// `gso_type`: not a super-frame.
pub const GSO_NONE: u8 = 0;
/// `gso_type`: TCP over IPv4.
pub const GSO_TCPV4: u8 = 1;
/// `gso_type`: UDP fragmentation (UFO), which no current kernel hands out.
pub const GSO_UDP: u8 = 3;
/// `gso_type`: TCP over IPv6.
pub const GSO_TCPV6: u8 = 4;
/// `gso_type`: UDP segmentation (USO).
pub const GSO_UDP_L4: u8 = 5;
/// `gso_type`, a bit beside the others: TCP with CWR set.
pub const GSO_ECN: u8 = 0x80;

/// Frames longer than this, in bytes, are sent with only their first bytes in the
/// linear part: with the kernel's own overhead a longer one would need more than
/// one page in a row.
const LINEAR_MAX: usize = 3584;
/// How many bytes of such a frame are linear: all headers of a usual frame.
const LINEAR_HEADERS: usize = 128;

/// The smallest segment of a TCP super-frame, in bytes of payload: the smallest
/// MSS less the most options (`include/net/tcp.h`, `TCP_MIN_GSO_SIZE`).
pub const TCP_SEGMENT_MIN: u16 = 8;
/// The most segments in a UDP super-frame (`include/linux/udp.h`,
/// `UDP_MAX_SEGMENTS`); the kernel refuses more.
pub const UDP_SEGMENTS_MAX: usize = 128;
/// The most segments a super-frame of any kind may make: 64 KiB at 64 bytes each. One
/// frame of 64 KiB with a `gso_size` of 8 would be 8000 frames' work for whoever cuts
/// it, here or in the kernel, in the time of all other ports. TCP over a path that
/// IPv4 allows at all (MSS 536, RFC 9293 section 3.7.1) makes 123.
pub const SEGMENTS_MAX: usize = 1024;
/// A `gso_size` with another meaning inside the kernel (`include/linux/skbuff.h`,
/// `GSO_BY_FRAGS`), which it refuses to take from outside.
const GSO_BY_FRAGS: u16 = 0xffff;

/// `struct virtio_net_hdr`, in host byte order (AF_PACKET's `vio_le()` is false
/// for the legacy header on little-endian and big-endian hosts alike).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VnetHeader {
    /// [`FLAG_NEEDS_CSUM`], [`FLAG_DATA_VALID`].
    pub flags: u8,
    /// One of the `GSO_` values.
    pub gso_type: u8,
    /// Bytes of headers; the kernel's linear allocation when we send.
    pub hdr_len: u16,
    /// Payload bytes per segment.
    pub gso_size: u16,
    /// Where checksumming starts, from the start of the frame.
    pub csum_start: u16,
    /// Where the checksum stands, from `csum_start`.
    pub csum_offset: u16,
}

impl VnetHeader {
    /// Reads the header from its ten bytes.
    #[inline]
    pub fn from_bytes(bytes: &[u8; VNET_HEADER_LEN]) -> Self {
        let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1] = *bytes;
        Self {
            flags,
            gso_type,
            hdr_len: u16::from_ne_bytes([h0, h1]),
            gso_size: u16::from_ne_bytes([g0, g1]),
            csum_start: u16::from_ne_bytes([s0, s1]),
            csum_offset: u16::from_ne_bytes([o0, o1]),
        }
    }

    /// The ten bytes of the header.
    #[inline]
    pub fn to_bytes(self) -> [u8; VNET_HEADER_LEN] {
        let [h0, h1] = self.hdr_len.to_ne_bytes();
        let [g0, g1] = self.gso_size.to_ne_bytes();
        let [s0, s1] = self.csum_start.to_ne_bytes();
        let [o0, o1] = self.csum_offset.to_ne_bytes();
        [self.flags, self.gso_type, h0, h1, g0, g1, s0, s1, o0, o1]
    }

    /// Whether the checksum is still to be completed.
    #[inline]
    pub fn needs_csum(&self) -> bool {
        self.flags & FLAG_NEEDS_CSUM != 0
    }

    /// Whether this is a super-frame.
    #[inline]
    pub fn is_gso(&self) -> bool {
        self.gso_type & !GSO_ECN != GSO_NONE
    }
}

/// What is to be done with a frame, as its virtio header describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offload {
    /// Send it with this header: the kernel can do what is left to do. Each tag
    /// pushed moves `csum_start` and a `hdr_len` that is not 0 by its length.
    Plain(VnetHeader),
    /// A super-frame the kernel would lose: [`Segmenter`](super::segment::Segmenter)
    /// cuts it.
    Segment,
    /// The header contradicts itself or the frame: drop it (`bad_offload`).
    Bad,
}

/// Checks a received virtio header against its frame and makes the header to send
/// the frame with.
///
/// `frame` is the frame as received, whole, without the tag the kernel took out;
/// `csum_start` is relative to that. `DATA_VALID` is not handed on: AF_PACKET
/// ignores it (`include/linux/virtio_net.h`, `virtio_net_hdr_to_skb`).
#[inline]
pub fn check_offload(header: VnetHeader, frame: &[u8]) -> Offload {
    if header.gso_type != GSO_NONE {
        check_super_frame(header, frame)
    } else if header.needs_csum() {
        check_checksum(header, frame)
    } else {
        let hdr_len = linear_len(frame.len(), 0);
        Offload::Plain(VnetHeader { hdr_len, ..VnetHeader::default() })
    }
}

/// `hdr_len` for a frame that is not a super-frame: 0 lets the kernel choose.
#[inline]
fn linear_len(frame_len: usize, needed: usize) -> u16 {
    if frame_len <= LINEAR_MAX {
        return 0;
    }
    u16::try_from(LINEAR_HEADERS.max(needed).min(frame_len)).unwrap_or(u16::MAX)
}

/// A frame of which only the checksum is to be completed.
#[inline]
fn check_checksum(header: VnetHeader, frame: &[u8]) -> Offload {
    let needed = checksum_end(header);
    // Among the MAC addresses and tags the kernel would write the checksum over a
    // tag checked or pushed here: a guest could choose its VLAN. Kernels since 2024
    // refuse it (`virtio_net_hdr_to_skb`, "add more sanity check"), older ones not.
    let behind_tags = headers::ethertype(frame, 0)
        .is_some_and(|(_, payload)| usize::from(header.csum_start) >= payload);
    if needed > frame.len() || !behind_tags {
        return Offload::Bad;
    }
    Offload::Plain(VnetHeader {
        flags: FLAG_NEEDS_CSUM,
        gso_type: GSO_NONE,
        hdr_len: linear_len(frame.len(), needed),
        gso_size: 0,
        csum_start: header.csum_start,
        csum_offset: header.csum_offset,
    })
}

/// First byte behind the checksum field.
#[inline]
fn checksum_end(header: VnetHeader) -> usize {
    usize::from(header.csum_start) + usize::from(header.csum_offset) + 2
}

/// A super-frame.
fn check_super_frame(header: VnetHeader, frame: &[u8]) -> Offload {
    let ecn = header.gso_type & GSO_ECN != 0;
    let legal = match header.gso_type & !GSO_ECN {
        GSO_TCPV4 | GSO_TCPV6 => header.gso_size >= TCP_SEGMENT_MIN,
        GSO_UDP_L4 => header.gso_size > 0 && !ecn,
        _ => false,
    };
    if !legal || header.gso_size == GSO_BY_FRAGS {
        return Offload::Bad;
    }
    // Headers counted in, as their length is not known yet: a few segments more.
    if frame.len() > SEGMENTS_MAX * usize::from(header.gso_size) {
        return Offload::Bad;
    }
    if header.needs_csum() && checksum_end(header) > frame.len() {
        return Offload::Bad;
    }
    let Some(found) = headers::transport(frame).filter(|found| describes(header, found)) else {
        // Without a place for the checksum there is nothing to find an inner
        // packet by.
        return if header.needs_csum() { Offload::Segment } else { Offload::Bad };
    };
    let hdr_len = found.offset + found.header_len;
    if !header.needs_csum() {
        return Offload::Segment;
    }
    if usize::from(header.csum_start) != found.offset
        || header.csum_offset != found.protocol.checksum_offset()
    {
        return Offload::Segment;
    }
    let payload_len = frame.len().saturating_sub(hdr_len);
    if found.protocol == Transport::Udp
        && payload_len > usize::from(header.gso_size) * UDP_SEGMENTS_MAX
    {
        return Offload::Bad;
    }
    let Ok(hdr_len) = u16::try_from(hdr_len) else {
        return Offload::Bad;
    };
    Offload::Plain(VnetHeader { flags: FLAG_NEEDS_CSUM, hdr_len, ..header })
}

/// Bytes a frame makes on the wire with `tags_len` bytes of tags more (in bytes, not
/// negative) than stand in it: those of all its segments, each with the headers, if it
/// is a super-frame.
///
/// `header` and `frame` are as received. Of the header only what [`check_offload`] will
/// hold against the frame is believed, so not `hdr_len`; a super-frame it will refuse
/// counts as one piece.
#[inline]
pub fn segments_len(header: VnetHeader, frame: &[u8], tags_len: usize) -> usize {
    let whole = frame.len().saturating_add(tags_len);
    if !header.is_gso() || header.gso_size == 0 {
        return whole;
    }
    let offset = usize::from(header.csum_start);
    let transport = match header.gso_type & !GSO_ECN {
        GSO_UDP_L4 => Transport::Udp,
        _ => Transport::Tcp,
    };
    let Some(header_len) = transport.header_len(frame, offset) else { return whole };
    let headers = offset + header_len;
    let payload = frame.len().saturating_sub(headers);
    let segments = payload.div_ceil(usize::from(header.gso_size)).max(1);
    payload.saturating_add(segments.saturating_mul(headers + tags_len))
}

/// Whether the type of a super-frame is that of the outer packet.
fn describes(header: VnetHeader, found: &TransportHeader) -> bool {
    match header.gso_type & !GSO_ECN {
        GSO_TCPV4 => found.version == IpVersion::V4 && found.protocol == Transport::Tcp,
        GSO_TCPV6 => found.version == IpVersion::V6 && found.protocol == Transport::Tcp,
        GSO_UDP_L4 => found.protocol == Transport::Udp,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]
    use super::super::segment::Segmenter;
    use super::*;

    const MSS: u16 = 1000;

    /// An IPv4 TCP frame: tags, 20 + 20 bytes of headers, payload.
    fn tcp_v4(tags: usize, payload: usize) -> Vec<u8> {
        let mut frame = vec![2; 12];
        for _ in 0..tags {
            frame.extend([0x81, 0, 0, 5]);
        }
        frame.extend([0x08, 0]);
        let mut ip = [0; 20];
        (ip[0], ip[9]) = (0x45, 6);
        frame.extend(ip);
        let mut tcp = [0; 20];
        tcp[12] = 0x50;
        frame.extend(tcp);
        frame.resize(frame.len() + payload, 7);
        frame
    }

    fn udp_v6(payload: usize) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([0x86, 0xdd]);
        let mut ip = [0; 40];
        (ip[0], ip[6]) = (0x60, 17);
        frame.extend(ip);
        frame.resize(frame.len() + 8 + payload, 7);
        frame
    }

    fn gso(gso_type: u8, csum_start: u16, csum_offset: u16) -> VnetHeader {
        VnetHeader {
            flags: FLAG_NEEDS_CSUM,
            gso_type,
            hdr_len: 1054,
            gso_size: MSS,
            csum_start,
            csum_offset,
        }
    }

    #[test]
    fn a_frame_without_offloads_has_an_empty_header() {
        for flags in [0, FLAG_DATA_VALID] {
            let header = VnetHeader { flags, hdr_len: 77, csum_start: 9, ..Default::default() };
            for len in [0, 60, 1514, LINEAR_MAX] {
                let expected = Offload::Plain(VnetHeader::default());
                assert_eq!(check_offload(header, &vec![0; len]), expected, "{len} bytes");
            }
            let expected = Offload::Plain(VnetHeader { hdr_len: 128, ..Default::default() });
            assert_eq!(check_offload(header, &vec![0; LINEAR_MAX + 1]), expected);
        }
    }

    #[test]
    fn a_checksum_must_lie_in_the_frame() {
        let header = VnetHeader {
            flags: FLAG_NEEDS_CSUM | FLAG_DATA_VALID,
            hdr_len: 999,
            csum_start: 34,
            csum_offset: 16,
            ..Default::default()
        };
        assert_eq!(check_offload(header, &[0; 51]), Offload::Bad);
        let plain = VnetHeader { flags: FLAG_NEEDS_CSUM, hdr_len: 0, ..header };
        assert_eq!(check_offload(header, &[0; 52]), Offload::Plain(plain));
        assert_eq!(
            check_offload(header, &[0; 9000]),
            Offload::Plain(VnetHeader { hdr_len: 128, ..plain })
        );
        // Far behind the first bytes: all up to the checksum has to be linear.
        let far = VnetHeader { csum_start: 300, ..header };
        assert_eq!(
            check_offload(far, &[0; 9000]),
            Offload::Plain(VnetHeader { hdr_len: 318, csum_start: 300, ..plain })
        );
        let nowhere = VnetHeader { csum_start: u16::MAX, csum_offset: u16::MAX, ..header };
        assert_eq!(check_offload(nowhere, &[0; 9000]), Offload::Bad);
    }

    #[test]
    fn a_checksum_is_never_written_into_the_tags() {
        for tags in 0..4 {
            let frame = tcp_v4(tags, 100);
            for csum_start in 0..34 + 4 * tags as u16 {
                let header =
                    VnetHeader { flags: FLAG_NEEDS_CSUM, csum_start, ..VnetHeader::default() };
                let behind = usize::from(csum_start) >= 14 + 4 * tags;
                let expected = if behind { Offload::Plain(header) } else { Offload::Bad };
                assert_eq!(check_offload(header, &frame), expected, "{tags} tags");
            }
        }
    }

    #[test]
    fn plain_super_frames_pass_with_their_real_header_length() {
        for tags in 0..3 {
            let start = 34 + 4 * tags as u16;
            for ecn in [0, GSO_ECN] {
                let header = gso(GSO_TCPV4 | ecn, start, 16);
                assert_eq!(
                    check_offload(header, &tcp_v4(tags, 5000)),
                    Offload::Plain(VnetHeader { hdr_len: start + 20, ..header })
                );
            }
        }
        let header = gso(GSO_UDP_L4, 54, 6);
        assert_eq!(
            check_offload(header, &udp_v6(5000)),
            Offload::Plain(VnetHeader { hdr_len: 62, ..header })
        );
    }

    #[test]
    fn a_header_that_is_not_the_outer_packets_is_to_be_segmented() {
        let frame = tcp_v4(0, 5000);
        let other = [
            gso(GSO_TCPV6, 34, 16),
            gso(GSO_UDP_L4, 34, 6),
            gso(GSO_TCPV4, 74, 16),
            gso(GSO_TCPV4, 33, 16),
            gso(GSO_TCPV4, 34, 6),
        ];
        for header in other {
            assert_eq!(check_offload(header, &frame), Offload::Segment, "{header:?}");
        }
        // IPIP: the outer packet has no transport of ours.
        let mut tunnel = tcp_v4(0, 5000);
        tunnel[14 + 9] = 4;
        assert_eq!(check_offload(gso(GSO_TCPV4, 54, 16), &tunnel), Offload::Segment);
        // A good super-frame, but nobody started its checksum.
        let header = VnetHeader { flags: 0, ..gso(GSO_TCPV4, 0, 0) };
        assert_eq!(check_offload(header, &frame), Offload::Segment);
        assert_eq!(check_offload(header, &tunnel), Offload::Bad);
    }

    #[test]
    fn a_super_frame_makes_a_bounded_number_of_segments() {
        let plain = VnetHeader { gso_size: 50, ..gso(GSO_TCPV4, 34, 16) };
        // The same, but inside a tunnel: for the segmenter.
        let inner = VnetHeader { csum_start: 74, ..plain };
        let longest = SEGMENTS_MAX * 50;
        for header in [plain, inner] {
            assert_ne!(check_offload(header, &tcp_v4(0, longest - 54)), Offload::Bad);
            assert_eq!(check_offload(header, &tcp_v4(0, longest - 53)), Offload::Bad);
        }
    }

    /// The segmenter, which writes the segments out, is the oracle.
    #[test]
    fn a_super_frame_is_as_long_as_its_segments() {
        let tcp = |payload| (tcp_v4(1, payload), gso(GSO_TCPV4, 38, 16));
        let udp = |payload| (udp_v6(payload), gso(GSO_UDP_L4, 54, 6));
        let some = [1, 999, 1000, 1001, 5000, 5001, 60_000];
        for (frame, good) in some.into_iter().map(tcp).chain(some.into_iter().map(udp)) {
            // What a guest claims of its headers' length makes nothing cheaper.
            for hdr_len in [0, 54, u16::MAX] {
                let header = VnetHeader { hdr_len, ..good };
                let mut segmenter = Segmenter::new(&frame, header).unwrap();
                let (mut expected, mut tagged) = (0, 0);
                let mut space = vec![0; 2000];
                while let Some(length) = segmenter.next_into(&mut space).unwrap() {
                    expected += length;
                    tagged += length + 8;
                }
                assert_eq!(segments_len(header, &frame, 0), expected, "{} bytes", frame.len());
                assert_eq!(segments_len(header, &frame, 8), tagged, "{} bytes", frame.len());
            }
        }
        let plain = tcp_v4(0, 5000);
        assert_eq!(segments_len(VnetHeader::default(), &plain, 4), plain.len() + 4);
        let bad = [
            VnetHeader { gso_size: 0, ..gso(GSO_TCPV4, 34, 16) },
            gso(GSO_TCPV4, u16::MAX, 16),
            gso(GSO_TCPV4, 5050, 16),
        ];
        for header in bad {
            assert_eq!(segments_len(header, &plain, 4), plain.len() + 4, "{header:?}");
        }
    }

    #[test]
    fn contradictions_are_bad() {
        let frame = tcp_v4(0, 5000);
        let good = gso(GSO_TCPV4, 34, 16);
        let bad = [
            VnetHeader { gso_size: 0, ..good },
            VnetHeader { gso_size: TCP_SEGMENT_MIN - 1, ..good },
            VnetHeader { gso_size: GSO_BY_FRAGS, ..good },
            VnetHeader { gso_type: GSO_UDP, ..good },
            VnetHeader { gso_type: 2, ..good },
            VnetHeader { gso_type: GSO_ECN, ..good },
            VnetHeader { gso_type: 0x41, ..good },
            VnetHeader { csum_start: 5054 - 18 + 1, ..good },
            VnetHeader { csum_start: u16::MAX, ..good },
        ];
        for header in bad {
            assert_eq!(check_offload(header, &frame), Offload::Bad, "{header:?}");
        }
        let last = VnetHeader { csum_start: 5054 - 18, ..good };
        assert_eq!(check_offload(last, &frame), Offload::Segment);
        assert_eq!(check_offload(good, &[]), Offload::Bad);

        let good = VnetHeader { gso_size: 10, ..gso(GSO_UDP_L4, 54, 6) };
        assert!(matches!(check_offload(good, &udp_v6(1280)), Offload::Plain(_)));
        assert_eq!(check_offload(good, &udp_v6(1281)), Offload::Bad);
        // Counted for the outer packet only: this one is inside a tunnel.
        let inner = VnetHeader { csum_start: 104, ..good };
        assert_eq!(check_offload(inner, &udp_v6(1281)), Offload::Segment);
        let ecn = VnetHeader { gso_type: GSO_UDP_L4 | GSO_ECN, ..good };
        assert_eq!(check_offload(ecn, &udp_v6(1280)), Offload::Bad);
    }
}
