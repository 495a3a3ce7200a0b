//! VLAN tags: IEEE 802.1Q clause 9.
//!
//! Two levels. A [`Tag`] is faithful: any TPID the switch knows and any TCI that
//! can stand on the wire. [`Vid`] and [`Pcp`] hold only legal values, so what was
//! checked once (on the command line, say) needs no second check.
//!
//! [`TagStack`] is the one place that reads tags out of a frame. The kernel takes
//! the outermost tag out of the bytes before AF_PACKET sees them when its TPID is
//! 0x8100 or 0x88a8 (`net/core/dev.c`, `skb_vlan_untag`), and leaves 0x9100 and
//! 0x9200 where they are; the stack hides that difference.

use super::{MAC_ADDRESSES_LEN, TAG_LEN, read_u16};
use std::fmt;

/// Tag protocol identifier: the EtherType that announces a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Tpid {
    /// 0x8100, the C-tag of IEEE 802.1Q.
    #[default]
    Customer,
    /// 0x88a8, the S-tag of IEEE 802.1ad.
    Service,
    /// 0x9100, QinQ before 802.1ad.
    Legacy9100,
    /// 0x9200, QinQ before 802.1ad.
    Legacy9200,
}

impl Tpid {
    /// All TPIDs, in the order of [`Tpid::index`].
    pub const ALL: [Self; 4] = [Self::Customer, Self::Service, Self::Legacy9100, Self::Legacy9200];

    /// The EtherType on the wire.
    #[inline]
    pub const fn ethertype(self) -> u16 {
        match self {
            Self::Customer => 0x8100,
            Self::Service => 0x88a8,
            Self::Legacy9100 => 0x9100,
            Self::Legacy9200 => 0x9200,
        }
    }

    /// The TPID an EtherType stands for, if it is one.
    #[inline]
    pub const fn from_ethertype(ethertype: u16) -> Option<Self> {
        match ethertype {
            0x8100 => Some(Self::Customer),
            0x88a8 => Some(Self::Service),
            0x9100 => Some(Self::Legacy9100),
            0x9200 => Some(Self::Legacy9200),
            _ => None,
        }
    }

    /// Position in [`Tpid::ALL`] and in lookup tables.
    #[inline]
    pub const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for Tpid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:#06x}", self.ethertype())
    }
}

/// VLAN identifier, 0..=4094. 0 means "no VLAN" (a priority tag); 4095 is
/// reserved (IEEE 802.1Q clause 9.6) and cannot be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Vid(u16);

impl Vid {
    /// "No VLAN": untagged and priority-tagged frames.
    pub const NONE: Self = Self(0);
    /// The largest identifier a VLAN may have.
    pub const MAX: u16 = 4094;

    /// The identifier, if it is legal.
    pub const fn new(vid: u16) -> Option<Self> {
        if vid <= Self::MAX { Some(Self(vid)) } else { None }
    }

    /// The number, 0..=4094.
    #[inline]
    pub const fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Vid {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// Priority code point, 0..=7 (IEEE 802.1Q clause 6.9.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Pcp(u8);

impl Pcp {
    /// The priority, if it is 0..=7.
    pub const fn new(pcp: u8) -> Option<Self> {
        if pcp <= 7 { Some(Self(pcp)) } else { None }
    }

    /// The number, 0..=7.
    #[inline]
    pub const fn get(self) -> u8 {
        self.0
    }
}

/// Tag control information: PCP (3 bits), DEI (1 bit), VID (12 bits).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Tci(pub u16);

impl Tci {
    /// The bits of PCP and DEI.
    pub const PRIORITY_MASK: u16 = 0xf000;
    /// The bits of the VID.
    pub const VID_MASK: u16 = 0x0fff;

    /// A TCI with this VID and priority, DEI clear.
    pub const fn new(vid: Vid, pcp: Pcp) -> Self {
        Self(vid.0 | ((pcp.0 as u16) << 13))
    }

    /// The 12 bits of the VID as they stand on the wire: 0..=4095.
    #[inline]
    pub const fn vid_bits(self) -> u16 {
        self.0 & Self::VID_MASK
    }

    /// PCP and DEI, in place (the upper four bits).
    #[inline]
    pub const fn priority_bits(self) -> u16 {
        self.0 & Self::PRIORITY_MASK
    }
}

/// One VLAN tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tag {
    /// The tag protocol identifier.
    pub tpid: Tpid,
    /// Priority, DEI and VID.
    pub tci: Tci,
}

impl Tag {
    /// The four bytes on the wire.
    #[inline]
    pub const fn to_bytes(self) -> [u8; TAG_LEN] {
        let tpid = self.tpid.ethertype().to_be_bytes();
        let tci = self.tci.0.to_be_bytes();
        [tpid[0], tpid[1], tci[0], tci[1]]
    }
}

/// How many tags [`TagStack`] looks at: two that a port may own, and one more to
/// see whether "another tag follows" (DESIGN §3).
pub const STACK_DEPTH: usize = 3;

/// The outermost tags of a frame, in wire order, wherever the kernel put them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TagStack {
    tags: [Option<Tag>; STACK_DEPTH],
}

/// The frame ends inside its Ethernet header or inside a tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Truncated;

impl TagStack {
    /// Reads the tags of a frame.
    ///
    /// `stripped` is the tag the kernel took out of `frame`; it stands before
    /// those still in the bytes.
    ///
    /// # Errors
    /// [`Truncated`] if the bytes end before an EtherType or a TCI that must be
    /// there.
    // Always: with four loops that call it the compiler would not, at 7 instructions
    // a frame.
    #[inline(always)]
    pub fn read(stripped: Option<Tag>, frame: &[u8]) -> Result<Self, Truncated> {
        let mut tags = [None; STACK_DEPTH];
        let mut offset = MAC_ADDRESSES_LEN;
        for (depth, place) in tags.iter_mut().enumerate() {
            if depth == 0 && stripped.is_some() {
                *place = stripped;
                continue;
            }
            let ethertype = read_u16(frame, offset).ok_or(Truncated)?;
            let Some(tpid) = Tpid::from_ethertype(ethertype) else {
                return Ok(Self { tags });
            };
            let tci = Tci(read_u16(frame, offset + 2).ok_or(Truncated)?);
            *place = Some(Tag { tpid, tci });
            offset += TAG_LEN;
        }
        read_u16(frame, offset).ok_or(Truncated)?;
        Ok(Self { tags })
    }

    /// The tag at a depth, 0 being the outermost.
    #[inline]
    pub fn get(&self, depth: usize) -> Option<Tag> {
        self.tags.get(depth).copied().flatten()
    }

    /// The outermost tag.
    #[inline]
    pub fn outer(&self) -> Option<Tag> {
        self.get(0)
    }
}
