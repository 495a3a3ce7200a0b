//! `struct virtio_net_hdr` (10 bytes), the kernel's description of a frame whose
//! checksum or segmentation is still to be done (`include/uapi/linux/virtio_net.h`,
//! virtio 1.2 clause 5.1.6).

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
