//! Bytes and their meaning: VLAN tags, the Ethernet view, the tag edit, the
//! virtio header, checksums and segmentation.
//!
//! What lives here is pure: no I/O, no clock, no unsafe, no allocation. What may
//! not: anything that knows what a port or a mode is (that is `switch`).

pub mod checksum;
pub mod edit;
pub mod headers;
pub mod segment;
pub mod tag;
pub mod vnet;

pub use edit::{FrameBuffer, TagEdit};
pub use tag::{Pcp, Tag, TagStack, Tci, Tpid, Vid};
pub use vnet::VnetHeader;

/// Length of the two MAC addresses every Ethernet frame starts with, in bytes.
pub const MAC_ADDRESSES_LEN: usize = 12;
/// Length of an untagged Ethernet header, in bytes (IEEE 802.3 clause 3.1.1).
pub const ETHERNET_HEADER_LEN: usize = 14;
/// Length of one VLAN tag, TPID and TCI, in bytes (IEEE 802.1Q clause 9.3).
pub const TAG_LEN: usize = 4;

/// Two bytes in network order at `offset`, if the slice reaches that far.
#[inline]
pub(crate) fn read_u16(bytes: &[u8], offset: usize) -> Option<u16> {
    let pair = bytes.get(offset..offset.checked_add(2)?)?;
    Some(u16::from_be_bytes([*pair.first()?, *pair.get(1)?]))
}
