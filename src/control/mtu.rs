//! How large the uplink's MTU must be for guests to use theirs.
//!
//! AF_PACKET sends frames of at most MTU + 14 bytes, and 4 more if the outermost
//! TPID is 0x8100 (`packet_snd` and `packet_extra_vlan_len_allowed` in
//! `net/packet/af_packet.c`). So one 0x8100 tag is free, and each further tag, or
//! an outer tag of another kind, costs its 4 bytes.

use crate::frame::{TAG_LEN, Tpid};
use crate::switch::{Membership, Mode};

/// What full-size frames of a port's guest need of the uplink.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UplinkMtu {
    /// For frames with the tags the port itself adds or passes, in bytes.
    pub required: u32,
    /// For frames the guest has put one tag of its own into (tunnel, trunk), in
    /// bytes.
    pub with_guest_tag: u32,
}

/// The uplink MTU for guests of this port that use `guest_mtu` bytes.
pub fn for_port(membership: &Membership, guest_mtu: u32) -> UplinkMtu {
    let tag_len = TAG_LEN as u32;
    let needed = |tag_bytes: u32| {
        let free = if membership.tpid() == Tpid::Customer { tag_len } else { 0 };
        guest_mtu + tag_bytes.saturating_sub(free)
    };
    let own = membership.tag_bytes();
    let guests = if membership.mode() == Mode::Access { 0 } else { tag_len };
    UplinkMtu { required: needed(own), with_guest_tag: needed(own + guests) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;
    use crate::control::mapping::parse;

    #[test]
    fn each_tag_beyond_the_free_one_costs_four_bytes() {
        for (map, required, with_guest_tag) in [
            ("0=t", 1500, 1500),
            ("5=t,mode=access", 1500, 1500),
            ("5=t", 1500, 1504),
            ("5=t,tpid=0x88a8", 1504, 1508),
            ("5=t,tpid=0x9100,mode=access", 1504, 1504),
            ("5.6=t", 1504, 1508),
            ("5.6=t,tpid=0x88a8", 1508, 1512),
            ("5-7=t", 1500, 1504),
        ] {
            let port = parse(map, Tpid::Customer).unwrap();
            let expected = UplinkMtu { required, with_guest_tag };
            assert_eq!(for_port(&port.membership, 1500), expected, "{map}");
        }
    }
}
