//! Reading the kernel's netlink answers: the few attributes we follow, and no
//! others.
//!
//! `netlink-packet-route` decodes each attribute of a message and fails the whole
//! message over one it does not like: a description that is not UTF-8, or a
//! driver's private data newer than the crate. One odd device must not stop us
//! from following the rest, so here its framing and headers are used and only
//! the attributes we need are looked at, which also makes a dump of a thousand
//! devices cheap.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use netlink_packet_core::{
    NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_REPLACE, NetlinkBuffer, NlasIterator,
};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::AddressHeader;
use netlink_packet_route::link::{LinkFlags, LinkHeader, LinkLayerType};

use super::table::LinkState;

/// Bytes of `struct nlmsghdr` (include/uapi/linux/netlink.h).
const MESSAGE_HEADER_LEN: usize = 16;
/// Bytes of `struct ifinfomsg` (include/uapi/linux/rtnetlink.h).
const LINK_HEADER_LEN: usize = 16;
/// Bytes of `struct ifaddrmsg` (include/uapi/linux/if_addr.h).
const ADDRESS_HEADER_LEN: usize = 8;
/// Where `struct tcmsg` (include/uapi/linux/rtnetlink.h) has the device's index.
const TC_INDEX: Range<usize> = 4..8;
/// And the handle of the qdisc or filter.
const TC_HANDLE: Range<usize> = 8..12;
/// And that of what it is attached to.
const TC_PARENT: Range<usize> = 12..16;
/// Bytes of that structure.
const TC_HEADER_LEN: usize = 20;
/// Bytes of an attribute's length and type (`struct nlattr`).
const ATTRIBUTE_HEADER_LEN: usize = 4;
/// In an `IFLA_AF_SPEC`, the attribute of `AF_INET6` that holds how IPv6
/// addresses are generated (include/uapi/linux/if_link.h).
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
/// Of `IFLA_INFO_DATA` of a VLAN device, and of every device (include/uapi/linux/if_link.h).
const IFLA_VLAN_ID: u16 = 1;
const IFLA_VLAN_PROTOCOL: u16 = 5;
const IFLA_GRO_MAX_SIZE: u16 = 58;
const IFLA_GRO_IPV4_MAX_SIZE: u16 = 64;
/// The attribute with the text of an extended acknowledgement
/// (include/uapi/linux/netlink.h).
const NLMSGERR_ATTR_MSG: u16 = 1;

/// One netlink message of a datagram.
pub(super) struct Message<'a> {
    /// `RTM_*` or `NLMSG_*`.
    pub kind: u16,
    /// `NLM_F_*`.
    pub flags: u16,
    /// The number of the request it answers, 0 for a notification.
    pub sequence: u32,
    /// What follows the header.
    pub payload: &'a [u8],
}

/// The messages of a datagram. What is not well-formed ends the iteration: the
/// kernel pads each message and never sends half of one.
pub(super) fn messages(datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let header = NetlinkBuffer::new_checked(rest).ok()?;
        let length = usize::try_from(header.length()).ok()?;
        let message = Message {
            kind: header.message_type(),
            flags: header.flags(),
            sequence: header.sequence_number(),
            payload: rest.get(MESSAGE_HEADER_LEN..length)?,
        };
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// Type and value of each attribute, as far as they are well-formed.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).map_while(|attribute| {
        let attribute = attribute.ok()?;
        let (kind, length) = (attribute.kind(), usize::from(attribute.length()));
        Some((kind, attribute.into_inner().get(ATTRIBUTE_HEADER_LEN..length)?))
    })
}

/// The value of the first attribute of a type.
fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// A NUL-terminated string. Names and descriptions may hold any byte; those that
/// are not UTF-8 are escaped, so that two different names stay different.
fn text(value: &[u8]) -> String {
    let bytes = value.split(|&byte| byte == 0).next().unwrap_or_default();
    str::from_utf8(bytes).map_or_else(|_| bytes.escape_ascii().to_string(), str::to_owned)
}

/// A number in the machine's byte order.
fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(value.try_into().ok()?))
}

/// What an `RTM_NEWLINK` tells.
#[derive(Debug)]
pub(super) struct LinkReport {
    /// What is followed.
    pub state: LinkState,
    /// The kind of the root queueing discipline. The kernel does not notify of
    /// its changes as link changes, so it is no part of the followed state.
    pub qdisc: Option<String>,
    /// `IN6_ADDR_GEN_MODE_*`; none where the device has no IPv6.
    pub addr_gen_mode: Option<u8>,
    /// Promiscuous by an administrator's wish (`IFF_PROMISC`), not by a socket's.
    pub promiscuous: bool,
}

/// The index in an `RTM_NEWLINK` or `RTM_DELLINK` that is about a device itself.
///
/// None for the messages a bridge sends about its ports to the same multicast
/// group, family `AF_BRIDGE`: there `RTM_DELLINK` says that a device left the
/// bridge, not that it is gone (`br_ifinfo_notify`, net/bridge/br_netlink.c).
pub(super) fn link_index(payload: &[u8]) -> Option<u32> {
    let header = LinkHeader::parse(payload).ok()?;
    (header.interface_family == AddressFamily::Unspec).then_some(header.index)
}

/// Decodes the payload of an `RTM_NEWLINK`.
///
/// None for what is not a full report about a device: a bridge's message (see
/// [`link_index`]), or a wireless event, which carries little more than the name
/// (`rtnetlink_ifinfo_prep`, net/wireless/wext-core.c). A full report always has
/// `IFLA_IFNAME` and `IFLA_MTU` (`rtnl_fill_ifinfo`, net/core/rtnetlink.c).
pub(super) fn link_report(payload: &[u8]) -> Option<LinkReport> {
    let index = link_index(payload)?;
    let header = LinkHeader::parse(payload).ok()?;
    let (mut name, mut mtu) = (None, None);
    let mut report = LinkReport {
        state: LinkState {
            index,
            name: String::new(),
            address: [0; 6],
            up: header.flags.contains(LinkFlags::Up),
            carrier: header.flags.contains(LinkFlags::LowerUp),
            mtu: 0,
            kind: None,
            master: None,
            is_ethernet: header.link_layer_type == LinkLayerType::Ether,
            noarp: header.flags.contains(LinkFlags::Noarp),
            alias: None,
            tx_queue_len: 0,
        },
        qdisc: None,
        addr_gen_mode: None,
        promiscuous: header.flags.contains(LinkFlags::Promisc),
    };
    for (kind, value) in attributes(payload.get(LINK_HEADER_LEN..)?) {
        match kind {
            libc::IFLA_IFNAME => name = Some(text(value)),
            libc::IFLA_MTU => mtu = number(value),
            libc::IFLA_ADDRESS => report.state.address = value.try_into().unwrap_or_default(),
            libc::IFLA_MASTER => report.state.master = number(value),
            libc::IFLA_IFALIAS => report.state.alias = Some(text(value)),
            libc::IFLA_TXQLEN => report.state.tx_queue_len = number(value).unwrap_or_default(),
            libc::IFLA_QDISC => report.qdisc = Some(text(value)),
            libc::IFLA_LINKINFO => {
                report.state.kind = attribute(value, libc::IFLA_INFO_KIND).map(text);
            }
            libc::IFLA_AF_SPEC => {
                report.addr_gen_mode = attribute(value, libc::AF_INET6 as u16)
                    .and_then(|inet6| attribute(inet6, IFLA_INET6_ADDR_GEN_MODE))
                    .and_then(|mode| mode.first().copied());
            }
            _ => {}
        }
    }
    report.state.name = name?;
    report.state.mtu = mtu?;
    Some(report)
}

/// More about a device, for whoever looks at the host once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkDetails {
    /// What is followed.
    pub state: LinkState,
    /// The kind of the root queueing discipline.
    pub qdisc: Option<String>,
    /// For a VLAN device: the device below, the TPID and the VID.
    pub vlan: Option<VlanDevice>,
    /// The largest super-frame GRO makes of IPv6 and of IPv4, in bytes; 0 if the kernel
    /// does not tell.
    pub gro_max_size: u32,
}

/// What a VLAN device takes from which device (8021q, `IFLA_VLAN_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VlanDevice {
    /// Index of the device below.
    pub lower: u32,
    /// TPID.
    pub tpid: u16,
    /// VID.
    pub vid: u16,
}

/// Decodes the payload of an `RTM_NEWLINK` in full.
pub(super) fn link_details(payload: &[u8]) -> Option<LinkDetails> {
    let LinkReport { state, qdisc, .. } = link_report(payload)?;
    let rest = payload.get(LINK_HEADER_LEN..)?;
    let size = |wanted| attribute(rest, wanted).and_then(number).unwrap_or_default();
    let gro_max_size = size(IFLA_GRO_MAX_SIZE).max(size(IFLA_GRO_IPV4_MAX_SIZE));
    Some(LinkDetails { vlan: vlan_device(rest), state, qdisc, gro_max_size })
}

/// Index of a device, and how many frames it has dropped instead of sending them: `tx_dropped`
/// of `struct rtnl_link_stats64` (include/uapi/linux/if_link.h).
pub(super) fn dropped(payload: &[u8]) -> Option<(u32, u64)> {
    const TX_DROPPED: usize = 7;
    let stats = attribute(payload.get(LINK_HEADER_LEN..)?, libc::IFLA_STATS64)?;
    let count = stats.get(TX_DROPPED * 8..)?.first_chunk()?;
    Some((link_index(payload)?, u64::from_ne_bytes(*count)))
}

/// How many frames a device's root queueing discipline and all below it have dropped, modulo
/// 2^32: `drops` of `struct gnet_stats_queue` (include/uapi/linux/gen_stats.h), from an
/// `RTM_NEWQDISC`. None if that is about another one.
pub(super) fn queue_drops(payload: &[u8], device: u32) -> Option<u32> {
    const TCA_STATS2: u16 = 7;
    const TCA_STATS_QUEUE: u16 = 3;
    const DROPS: usize = 8;
    const ROOT: u32 = u32::MAX;
    let field = |at: Range<usize>| number(payload.get(at)?);
    if field(TC_INDEX)? != device || field(TC_PARENT)? != ROOT {
        return None;
    }
    let stats = attribute(payload.get(TC_HEADER_LEN..)?, TCA_STATS2)?;
    let count = attribute(stats, TCA_STATS_QUEUE)?.get(DROPS..)?.first_chunk()?;
    Some(u32::from_ne_bytes(*count))
}

fn vlan_device(attributes: &[u8]) -> Option<VlanDevice> {
    // In another namespace the index is that of another device.
    if attribute(attributes, libc::IFLA_LINK_NETNSID).is_some() {
        return None;
    }
    let lower = number(attribute(attributes, libc::IFLA_LINK)?)?;
    let info = attribute(attributes, libc::IFLA_LINKINFO)?;
    if attribute(info, libc::IFLA_INFO_KIND).map(text).as_deref() != Some("vlan") {
        return None;
    }
    let data = attribute(info, libc::IFLA_INFO_DATA)?;
    let vid = u16::from_ne_bytes(attribute(data, IFLA_VLAN_ID)?.try_into().ok()?);
    let protocol = attribute(data, IFLA_VLAN_PROTOCOL).and_then(|value| value.try_into().ok());
    // Kernels before 3.10 know one protocol and tell none.
    let tpid = protocol.map_or(0x8100, u16::from_be_bytes);
    Some(VlanDevice { lower, tpid, vid })
}

/// What is said of a device whose qdisc was removed.
pub const QDISC_REMOVED: &str = "a qdisc was removed (`tc qdisc del`)";

/// The device at whose tc hooks something ceased to stand, and how; none for other
/// messages. What is added there takes nothing away, nor does a device's default
/// queueing (handle 0) when it makes room for another.
pub(super) fn unhooked(message: &Message<'_>) -> Option<(u32, &'static str)> {
    let field = |place| number(message.payload.get(place)?);
    let cause = match message.kind {
        libc::RTM_DELQDISC if field(TC_HANDLE)? == 0 => return None,
        libc::RTM_DELQDISC => QDISC_REMOVED,
        libc::RTM_DELTFILTER => "a tc filter was removed (`tc filter del`)",
        libc::RTM_NEWTFILTER if message.flags & NLM_F_REPLACE != 0 => {
            "a tc filter was replaced (`tc filter replace`)"
        }
        _ => return None,
    };
    Some((field(TC_INDEX)?, cause))
}

/// The device's index and the host's own address in an `RTM_NEWADDR`: for a
/// point-to-point address the local end (`IFA_LOCAL`), not the peer.
pub(super) fn host_address(payload: &[u8]) -> Option<(u32, IpAddr)> {
    let header = AddressHeader::parse(payload).ok()?;
    let rest = payload.get(ADDRESS_HEADER_LEN..)?;
    let value = attribute(rest, libc::IFA_LOCAL).or_else(|| attribute(rest, libc::IFA_ADDRESS))?;
    let address = match header.family {
        AddressFamily::Inet => Ipv4Addr::from(<[u8; 4]>::try_from(value).ok()?).into(),
        AddressFamily::Inet6 => Ipv6Addr::from(<[u8; 16]>::try_from(value).ok()?).into(),
        _ => return None,
    };
    Some((header.index, address))
}

/// The (negative) error number that an `NLMSG_ERROR` or `NLMSG_DONE` begins with;
/// 0 is success.
pub(super) fn error_code(payload: &[u8]) -> Option<i32> {
    Some(i32::from_ne_bytes(*payload.first_chunk()?))
}

/// The kernel's own words about an error, if the `NLMSG_ERROR` has any.
pub(super) fn explanation(message: &Message<'_>) -> Option<String> {
    if message.flags & NLM_F_ACK_TLVS == 0 {
        return None;
    }
    // The error number, then the request: whole, or its header alone if capped.
    let request = message.payload.get(4..)?;
    let request_len = if message.flags & NLM_F_CAPPED != 0 {
        MESSAGE_HEADER_LEN
    } else {
        let length = u32::from_ne_bytes(*request.first_chunk()?);
        usize::try_from(length).ok()?.next_multiple_of(4)
    };
    attribute(request.get(request_len..)?, NLMSGERR_ATTR_MSG).map(text)
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        reason = "a failed unwrap or index is a failed test"
    )]
    use netlink_packet_core::{DefaultNla, Emitable};
    use netlink_packet_route::link::{
        InfoData, InfoKind, InfoVlan, LinkAttribute, LinkInfo, LinkMessage, VlanProtocol,
    };
    use proptest::prelude::*;

    use super::*;

    /// A report as the crate, not this module, encodes it.
    fn encoded(attributes: Vec<LinkAttribute>, family: AddressFamily) -> Vec<u8> {
        let mut message = LinkMessage::default();
        message.header.interface_family = family;
        message.header.index = 7;
        message.header.link_layer_type = LinkLayerType::Ether;
        message.header.flags = LinkFlags::Up | LinkFlags::LowerUp;
        message.attributes = attributes;
        let mut bytes = vec![0; message.buffer_len()];
        message.emit(&mut bytes);
        bytes
    }

    fn full() -> Vec<LinkAttribute> {
        vec![
            LinkAttribute::IfName("tap-web1".into()),
            LinkAttribute::TxQueueLen(500),
            LinkAttribute::Mtu(65521),
            LinkAttribute::Controller(3),
            LinkAttribute::Qdisc("noqueue".into()),
            LinkAttribute::IfAlias("web".into()),
            LinkAttribute::Address(vec![2, 0, 0, 0, 0, 9]),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Tun)]),
        ]
    }

    #[test]
    fn a_vlan_device_tells_what_it_takes_from_whom() {
        let vlan = |protocol: Option<VlanProtocol>| {
            let mut data = vec![InfoVlan::Id(101)];
            data.extend(protocol.map(InfoVlan::Protocol));
            let mut attributes = full();
            attributes.retain(|attribute| !matches!(attribute, LinkAttribute::LinkInfo(_)));
            attributes.push(LinkAttribute::Link(3));
            attributes.push(LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Vlan),
                LinkInfo::Data(InfoData::Vlan(data)),
            ]));
            attributes
        };
        let read =
            |attributes| link_details(&encoded(attributes, AddressFamily::Unspec)).unwrap().vlan;
        let device = |tpid| Some(VlanDevice { lower: 3, tpid, vid: 101 });
        assert_eq!(read(vlan(Some(VlanProtocol::Ieee8021Q))), device(0x8100));
        assert_eq!(read(vlan(Some(VlanProtocol::Ieee8021Ad))), device(0x88a8));
        assert_eq!(read(vlan(None)), device(0x8100));
        assert_eq!(read(full()), None);
        // The device below is one of another namespace.
        let mut elsewhere = vlan(None);
        elsewhere.push(LinkAttribute::LinkNetNsId(0));
        assert_eq!(read(elsewhere), None);
    }

    #[test]
    fn a_full_report_is_read() {
        let report = link_report(&encoded(full(), AddressFamily::Unspec)).unwrap();
        assert_eq!(
            report.state,
            LinkState {
                index: 7,
                name: "tap-web1".into(),
                address: [2, 0, 0, 0, 0, 9],
                up: true,
                carrier: true,
                mtu: 65521,
                kind: Some("tun".into()),
                master: Some(3),
                is_ethernet: true,
                noarp: false,
                alias: Some("web".into()),
                tx_queue_len: 500,
            }
        );
        assert_eq!(report.qdisc.as_deref(), Some("noqueue"));
    }

    #[test]
    fn a_bridge_port_message_is_not_about_the_device() {
        let payload = encoded(full(), AddressFamily::Bridge);
        assert!(link_report(&payload).is_none());
        assert!(link_index(&payload).is_none());
    }

    #[test]
    fn a_wireless_event_does_not_pass_for_a_report() {
        let attributes = vec![LinkAttribute::IfName("wlan0".into())];
        assert!(link_report(&encoded(attributes, AddressFamily::Unspec)).is_none());
    }

    #[test]
    fn a_description_that_is_not_utf8_does_not_hide_the_device() {
        let mut attributes = full();
        attributes.retain(|attribute| !matches!(attribute, LinkAttribute::IfAlias(_)));
        attributes
            .push(LinkAttribute::Other(DefaultNla::new(libc::IFLA_IFALIAS, vec![b'x', 0xff])));
        let report = link_report(&encoded(attributes, AddressFamily::Unspec)).unwrap();
        assert_eq!(report.state.alias.as_deref(), Some("x\\xff"));
    }

    #[test]
    fn an_explanation_is_found_after_a_capped_and_a_whole_request() {
        let mut tlv = vec![8, 0, 1, 0];
        tlv.extend_from_slice(b"no\0\0");
        for (flags, request) in [
            (NLM_F_ACK_TLVS | NLM_F_CAPPED, vec![99; 16]),
            (NLM_F_ACK_TLVS, {
                let mut whole = vec![0; 20];
                whole[..4].copy_from_slice(&20u32.to_ne_bytes());
                whole
            }),
        ] {
            let payload = [&(-22i32).to_ne_bytes()[..], &request, &tlv].concat();
            let message = Message { kind: 2, flags, sequence: 1, payload: &payload };
            assert_eq!(error_code(&payload), Some(-22));
            assert_eq!(explanation(&message).as_deref(), Some("no"));
            let silent = Message { flags: 0, ..message };
            assert_eq!(explanation(&silent), None);
        }
    }

    proptest! {
        /// Whatever bytes arrive, reading them neither panics nor runs on.
        #[test]
        fn no_bytes_are_harmful(bytes in proptest::collection::vec(any::<u8>(), 0..200), length in 0..220u32) {
            let mut datagram = bytes;
            if let Some(first) = datagram.first_chunk_mut() {
                *first = length.to_ne_bytes();
            }
            prop_assert!(messages(&datagram).count() <= datagram.len() / MESSAGE_HEADER_LEN);
            for message in messages(&datagram) {
                let _ = (link_report(message.payload), host_address(message.payload));
                let _ = (explanation(&message), error_code(message.payload));
            }
        }
    }
}
