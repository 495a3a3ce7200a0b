//! Tunnel packets as the cable carries them, and a host that merges them.

use super::Lab;
use super::frames::Frame;
use super::ip::{self, Version};

/// Tunnels whose frames the host's GRO merges: GRE, IPIP and VXLAN around TCP.
#[derive(Clone, Copy, Debug)]
pub enum Tunnel {
    /// GRE around IPv4.
    Gre,
    /// IPv4 in IPv4.
    Ipip,
    /// VXLAN around Ethernet.
    Vxlan,
}

impl Tunnel {
    /// Segment `number` of a TCP stream inside the tunnel, as it is on the cable.
    pub fn frame(self, number: u32, size: usize) -> Frame {
        let data: Vec<u8> = (0..size).map(|index| (number as usize * 37 + index) as u8).collect();
        let inner = ip::tcp_identified(number as u16, 1 + number * size as u32, &data);
        let (protocol, inside) = match self {
            Self::Gre => (47, [vec![0, 0, 8, 0], inner.payload].concat()),
            Self::Ipip => (4, inner.payload),
            Self::Vxlan => {
                let vxlan = [vec![8, 0, 0, 0, 0, 0, 5, 0], inner.bytes()].concat();
                let length = (8 + vxlan.len()) as u16;
                let mut udp = vec![0x16, 0x2e, 0x12, 0xb5];
                udp.extend(length.to_be_bytes());
                // No outer checksum, as VXLAN over IPv4 has none by default.
                udp.extend([0, 0]);
                (17, [udp, vxlan].concat())
            }
        };
        let mut outer = ip::udp(Version::V4, &[]);
        let packet = &mut outer.payload;
        packet.truncate(20);
        packet[2..4].copy_from_slice(&((20 + inside.len()) as u16).to_be_bytes());
        packet[9] = protocol;
        ip::identify(packet, number as u16);
        packet.extend(inside);
        outer
    }
}

/// Frames that arrive within some milliseconds are merged before they are seen.
pub fn merge_on_arrival(lab: &Lab) {
    // VXLAN is merged only if a VXLAN device exists, whoever the frames are for.
    lab.host.ip("link add vx0 type vxlan id 5 dstport 4789 dev up0");
    lab.host.ip("link set vx0 up");
    lab.host.tool("ethtool", "-K up0 gro on");
    lab.far.tool("ethtool", "-K far0 tx off tso off gso off");
    lab.host.shell(
        "echo 5000000 > /sys/class/net/up0/gro_flush_timeout; \
         echo 100 > /sys/class/net/up0/napi_defer_hard_irqs",
    );
}
