//! Super-frames made from a recipe, and the segments they must become.
//!
//! The segments are not cut from the super-frame: each is built from the recipe as
//! a sender without offloads would have built it. So this is a reference for the
//! segmenter that shares neither code nor method with it; the checksums here are
//! summed byte by byte.

use vlanswitchd::frame::vnet::{
    FLAG_NEEDS_CSUM, GSO_ECN, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, VnetHeader,
};

/// A super-frame to be made.
#[derive(Debug, Clone)]
pub struct Recipe {
    /// TPIDs of the outer tags.
    pub tags: Vec<u16>,
    /// IP headers from the outside; at least one. `inside` of the last is unused.
    pub networks: Vec<Network>,
    pub transport: Transport,
    pub payload: Vec<u8>,
    pub segment_size: u16,
    /// Write nonsense into the length fields of the super-frame.
    pub lie_about_lengths: bool,
}

/// An IP header and how it carries the next one.
#[derive(Debug, Clone)]
pub struct Network {
    pub version: Version,
    pub identification: u16,
    /// Words of IPv4 options, or IPv6 destination options headers.
    pub extras: u8,
    pub inside: Inside,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V4,
    V6,
}

/// What stands between two IP headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inside {
    Ip,
    Gre { checksum: bool, key: bool, ethernet_tags: Option<u8> },
    Vxlan { checksum: bool, tags: u8 },
    VxlanGpe { checksum: bool },
    Geneve { checksum: bool, option_words: u8, ethernet_tags: Option<u8> },
    Udp { checksum: bool },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Tcp { sequence: u32, flags: u8, option_words: u8 },
    Udp,
}

/// Which of the frames of a recipe is being built.
#[derive(Clone, Copy)]
enum Part {
    Super,
    Segment { index: usize, last: bool },
}

impl Recipe {
    /// The super-frame and its virtio header.
    pub fn super_frame(&self) -> (Vec<u8>, VnetHeader) {
        let frame = self.frame(&self.payload, Part::Super);
        let transport_len = self.transport.header_len() + self.payload.len();
        let innermost = self.networks.last().expect("a recipe has an IP header");
        let (gso_type, csum_offset) = match (self.transport, innermost.version) {
            (Transport::Tcp { .. }, Version::V4) => (GSO_TCPV4, 16),
            (Transport::Tcp { .. }, Version::V6) => (GSO_TCPV6, 16),
            (Transport::Udp, _) => (GSO_UDP_L4, 6),
        };
        let ecn = matches!(self.transport, Transport::Tcp { flags, .. } if flags & 0x80 != 0);
        let header = VnetHeader {
            flags: FLAG_NEEDS_CSUM,
            gso_type: gso_type | if ecn { GSO_ECN } else { 0 },
            hdr_len: 0,
            gso_size: self.segment_size,
            csum_start: (frame.len() - transport_len) as u16,
            csum_offset,
        };
        (frame, header)
    }

    /// The frames the super-frame stands for.
    pub fn segments(&self) -> Vec<Vec<u8>> {
        let mut pieces: Vec<&[u8]> = self.payload.chunks(self.segment_size.into()).collect();
        if pieces.is_empty() {
            pieces.push(&[]);
        }
        let count = pieces.len();
        let piece = |(index, payload): (usize, &&[u8])| {
            self.frame(payload, Part::Segment { index, last: index + 1 == count })
        };
        pieces.iter().enumerate().map(piece).collect()
    }

    fn frame(&self, payload: &[u8], part: Part) -> Vec<u8> {
        let innermost = self.networks.len() - 1;
        let mut packet = self.transport_packet(&self.networks[innermost], payload, part);
        let mut protocol = self.transport.protocol();
        for (depth, network) in self.networks.iter().enumerate().rev() {
            if depth < innermost {
                let inner = self.networks[depth + 1].version;
                (packet, protocol) = self.tunnel(network, inner, packet, part);
            }
            packet = self.network_packet(network, protocol, &packet, part);
        }
        ethernet(&self.tags, self.networks[0].version.ethertype(), &packet)
    }

    fn transport_packet(&self, network: &Network, payload: &[u8], part: Part) -> Vec<u8> {
        let mut packet = vec![0x30, 0x39, 0xd4, 0x31];
        let checksum_at = match self.transport {
            Transport::Tcp { sequence, flags, option_words } => {
                let (sequence, flags) = match part {
                    Part::Super => (sequence, flags),
                    Part::Segment { index, last } => {
                        let step = (index * usize::from(self.segment_size)) as u32;
                        let not_last = if last { 0xff } else { !0x09 };
                        let not_first = if index == 0 { 0xff } else { !0x80 };
                        (sequence.wrapping_add(step), flags & not_last & not_first)
                    }
                };
                packet.extend(sequence.to_be_bytes());
                packet.extend([1, 2, 3, 4, (5 + option_words) << 4, flags, 5, 6, 0, 0, 7, 8]);
                packet.extend((0..option_words).flat_map(|_| [1, 1, 1, 1]));
                16
            }
            Transport::Udp => {
                packet.extend(self.length(8 + payload.len(), part));
                packet.extend([0, 0]);
                6
            }
        };
        packet.extend(payload);
        let pseudo = network.pseudo_header(self.transport.protocol(), packet.len());
        let checksum = match part {
            // As the kernel hands it out: the sum of the pseudo header, not inverted.
            Part::Super => sum(&pseudo),
            Part::Segment { .. } => {
                let checksum = !sum(&[pseudo, packet.clone()].concat());
                let udp = self.transport == Transport::Udp;
                if udp && checksum == 0 { 0xffff } else { checksum }
            }
        };
        packet[checksum_at..checksum_at + 2].copy_from_slice(&checksum.to_be_bytes());
        packet
    }

    fn network_packet(
        &self,
        network: &Network,
        protocol: u8,
        inside: &[u8],
        part: Part,
    ) -> Vec<u8> {
        let extras = usize::from(network.extras);
        match network.version {
            Version::V4 => {
                let step = if let Part::Segment { index, .. } = part { index as u16 } else { 0 };
                let identification = network.identification.wrapping_add(step).to_be_bytes();
                let mut header = vec![0x45 + network.extras, 0x10];
                header.extend(self.length(20 + 4 * extras + inside.len(), part));
                header.extend(identification);
                header.extend([0x40, 0, 63, protocol, 0, 0]);
                header.extend(network.addresses());
                header.extend(vec![1; 4 * extras]);
                let checksum = !sum(&header);
                header[10..12].copy_from_slice(&checksum.to_be_bytes());
                [&header, inside].concat()
            }
            Version::V6 => {
                let mut header = vec![0x60, 0, 0, 9];
                header.extend(self.length(8 * extras + inside.len(), part));
                header.extend([if extras > 0 { 60 } else { protocol }, 63]);
                header.extend(network.addresses());
                for index in 1..=extras {
                    let next = if index == extras { protocol } else { 60 };
                    header.extend([next, 0, 1, 4, 0, 0, 0, 0]);
                }
                [&header, inside].concat()
            }
        }
    }

    /// Wraps a packet of version `inner`; returns it with its IP protocol number.
    fn tunnel(
        &self,
        outer: &Network,
        inner: Version,
        packet: Vec<u8>,
        part: Part,
    ) -> (Vec<u8>, u8) {
        let carried = |tags: Option<u8>| match tags {
            Some(tags) => {
                let tags = vec![0x8100; tags.into()];
                (0x6558_u16, ethernet(&tags, inner.ethertype(), &packet))
            }
            None => (inner.ethertype(), packet.clone()),
        };
        let (header, content, checksum) = match outer.inside {
            Inside::Ip => return (packet, if inner == Version::V4 { 4 } else { 41 }),
            Inside::Gre { checksum, key, ethernet_tags } => {
                let (ethertype, content) = carried(ethernet_tags);
                let mut header = vec![u8::from(checksum) << 7 | u8::from(key) << 5, 0];
                header.extend(ethertype.to_be_bytes());
                header.extend(vec![0; if checksum { 4 } else { 0 }]);
                header.extend(vec![0xab; if key { 4 } else { 0 }]);
                let mut gre = [header, content].concat();
                if checksum {
                    let checksum = !sum(&gre);
                    gre[4..6].copy_from_slice(&checksum.to_be_bytes());
                }
                return (gre, 47);
            }
            Inside::Vxlan { checksum, tags } => {
                (vec![0x08, 0, 0, 0, 0, 1, 2, 0], carried(Some(tags)).1, checksum)
            }
            Inside::VxlanGpe { checksum } => {
                let next = if inner == Version::V4 { 1 } else { 2 };
                (vec![0x0c, 0, 0, next, 0, 1, 2, 0], packet, checksum)
            }
            Inside::Geneve { checksum, option_words, ethernet_tags } => {
                let (ethertype, content) = carried(ethernet_tags);
                let mut header = vec![option_words, 0];
                header.extend(ethertype.to_be_bytes());
                header.extend([0, 1, 2, 0]);
                header.extend((0..option_words).flat_map(|_| [0xcd; 4]));
                (header, content, checksum)
            }
            Inside::Udp { checksum } => (Vec::new(), packet, checksum),
        };
        let mut datagram = vec![0xc0, 0x01, 0x12, 0xb5];
        datagram.extend(self.length(8 + header.len() + content.len(), part));
        datagram.extend([0, 0]);
        datagram.extend(header);
        datagram.extend(content);
        if checksum {
            let pseudo = outer.pseudo_header(17, datagram.len());
            let checksum = match !sum(&[pseudo, datagram.clone()].concat()) {
                0 => 0xffff,
                checksum => checksum,
            };
            datagram[6..8].copy_from_slice(&checksum.to_be_bytes());
        }
        (datagram, 17)
    }

    fn length(&self, length: usize, part: Part) -> [u8; 2] {
        match part {
            Part::Super if self.lie_about_lengths => [0xba, 0xad],
            _ => (length as u16).to_be_bytes(),
        }
    }
}

impl Network {
    /// Source and destination, one after the other; they depend on the header so
    /// that a mix-up of layers shows.
    pub fn addresses(&self) -> Vec<u8> {
        let len = if self.version == Version::V4 { 8 } else { 32 };
        let seed = self.identification as u8 | 1;
        (0..len).map(|index| seed.wrapping_mul(17).wrapping_add(index)).collect()
    }

    fn pseudo_header(&self, protocol: u8, len: usize) -> Vec<u8> {
        let len = (len as u32).to_be_bytes();
        [self.addresses(), len.to_vec(), vec![0, 0, 0, protocol]].concat()
    }
}

impl Version {
    fn ethertype(self) -> u16 {
        if self == Self::V4 { 0x0800 } else { 0x86dd }
    }
}

impl Transport {
    pub fn header_len(self) -> usize {
        match self {
            Self::Tcp { option_words, .. } => 20 + 4 * usize::from(option_words),
            Self::Udp => 8,
        }
    }

    fn protocol(self) -> u8 {
        if self == Self::Udp { 17 } else { 6 }
    }
}

fn ethernet(tags: &[u16], ethertype: u16, inside: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x02, 0, 0, 0, 0, 0x0b, 0x02, 0, 0, 0, 0, 0x0a];
    for (depth, tpid) in tags.iter().enumerate() {
        frame.extend(tpid.to_be_bytes());
        frame.extend([0x60, 100 + depth as u8]);
    }
    frame.extend(ethertype.to_be_bytes());
    frame.extend(inside);
    frame
}

/// The ones' complement sum of 16-bit words, word by word.
pub fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0_u32;
    for (index, byte) in bytes.iter().enumerate() {
        sum += u32::from(*byte) << if index % 2 == 0 { 8 } else { 0 };
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}
