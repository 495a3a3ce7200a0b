//! Ethernet frames, built and read back without the product's own parser.
//!
//! Tags are written by hand (two 16-bit words each: IEEE 802.1Q clause 9.3),
//! IP and transport headers by `etherparse`. [`Frame::read`] takes a frame apart
//! with `pnet_packet`, so that builder and reader do not share a mistake.

use pnet_packet::Packet;
use pnet_packet::ethernet::EthernetPacket;
use pnet_packet::vlan::VlanPacket;
use std::fmt;

/// All four TPIDs.
pub const TPIDS: [u16; 4] = [0x8100, 0x88a8, 0x9100, 0x9200];
/// IEEE's EtherType for local experiments, which no stack answers.
pub const EXPERIMENTAL: u16 = 0x88b5;

/// One tag on the wire.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TagBytes {
    /// Tag protocol identifier.
    pub tpid: u16,
    /// PCP (3 bits) and DEI (1 bit).
    pub priority: u8,
    /// VLAN identifier.
    pub vid: u16,
}

/// A tag with priority 0.
pub const fn tag(tpid: u16, vid: u16) -> TagBytes {
    TagBytes { tpid, priority: 0, vid }
}

impl TagBytes {
    /// The same with PCP and DEI (`PCP * 2 + DEI`).
    pub const fn priority(self, priority: u8) -> Self {
        Self { priority, ..self }
    }

    /// The second word.
    pub fn tci(&self) -> u16 {
        u16::from(self.priority) << 12 | self.vid
    }
}

impl fmt::Debug for TagBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{}/p{}", self.tpid, self.vid, self.priority)
    }
}

/// A frame, taken apart.
#[derive(Clone, PartialEq, Eq)]
pub struct Frame {
    /// Destination address.
    pub destination: [u8; 6],
    /// Source address.
    pub source: [u8; 6],
    /// Tags, outermost first.
    pub tags: Vec<TagBytes>,
    /// EtherType behind the tags.
    pub ether_type: u16,
    /// What follows.
    pub payload: Vec<u8>,
}

/// A guest's address.
pub const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];
/// An address behind the far switch.
pub const PEER_MAC: [u8; 6] = [0x52, 0x54, 0, 0xab, 0xcd, 0xef];

impl Frame {
    /// A frame from the far end to a guest whose payload is `number` and filler
    /// that depends on it, 60 bytes without tags.
    pub fn numbered(number: u64) -> Self {
        Self {
            destination: GUEST_MAC,
            source: PEER_MAC,
            tags: Vec::new(),
            ether_type: EXPERIMENTAL,
            payload: numbered_payload(number, 46),
        }
    }

    /// With these tags in front.
    pub fn tags(self, tags: &[TagBytes]) -> Self {
        Self { tags: tags.to_vec(), ..self }
    }

    /// With addresses exchanged: from a guest to the far end.
    pub fn reversed(self) -> Self {
        Self { destination: self.source, source: self.destination, ..self }
    }

    /// To another address.
    pub fn to(self, destination: [u8; 6]) -> Self {
        Self { destination, ..self }
    }

    /// With as much payload as makes `length` bytes in all, tags not counted.
    pub fn untagged_length(self, length: usize) -> Self {
        let number = self.number();
        Self { payload: numbered_payload(number, length - 14), ..self }
    }

    /// The number in the payload.
    pub fn number(&self) -> u64 {
        let head = self.payload.get(..8).map(|head| head.try_into().unwrap());
        u64::from_be_bytes(head.unwrap_or([0xff; 8]))
    }

    /// As it is on the cable.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(14 + 4 * self.tags.len() + self.payload.len());
        bytes.extend(self.destination);
        bytes.extend(self.source);
        for tag in &self.tags {
            bytes.extend(tag.tpid.to_be_bytes());
            bytes.extend(tag.tci().to_be_bytes());
        }
        bytes.extend(self.ether_type.to_be_bytes());
        bytes.extend(&self.payload);
        bytes
    }

    /// Takes a frame apart.
    pub fn read(bytes: &[u8]) -> Self {
        let ethernet = EthernetPacket::new(bytes).expect("an Ethernet header");
        let mut ether_type = ethernet.get_ethertype().0;
        let mut payload = ethernet.payload().to_vec();
        let mut tags = Vec::new();
        while TPIDS.contains(&ether_type) {
            let vlan = VlanPacket::new(&payload).expect("a whole tag");
            let pcp = vlan.get_priority_code_point().0;
            let dei = vlan.get_drop_eligible_indicator();
            let priority = pcp << 1 | dei;
            tags.push(TagBytes { tpid: ether_type, priority, vid: vlan.get_vlan_identifier() });
            ether_type = vlan.get_ethertype().0;
            payload = vlan.payload().to_vec();
        }
        Self {
            destination: ethernet.get_destination().octets(),
            source: ethernet.get_source().octets(),
            tags,
            ether_type,
            payload,
        }
    }
}

impl fmt::Debug for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mac = super::mac_text;
        let (to, from) = (mac(&self.destination), mac(&self.source));
        let length = 14 + 4 * self.tags.len() + self.payload.len();
        write!(f, "#{} {from} > {to} ", self.number())?;
        write!(f, "{:?} {:04x}, {length} bytes", self.tags, self.ether_type)
    }
}

fn numbered_payload(number: u64, length: usize) -> Vec<u8> {
    let filler = |index: usize| (number as usize).wrapping_mul(31).wrapping_add(index * 7) as u8;
    let mut payload: Vec<u8> = (0..length).map(filler).collect();
    if let Some(head) = payload.get_mut(..8) {
        head.copy_from_slice(&number.to_be_bytes());
    }
    payload
}
