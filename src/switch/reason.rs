//! Why a frame was not delivered: a closed set (DESIGN §5). Everything that shows
//! drops reads this table.

/// Why a frame was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DropReason {
    /// The VLAN was unmapped between the kernel's filter and our table.
    UnmappedVlan,
    /// An access port's guest sent a VLAN tag.
    TaggedOnAccess,
    /// A second tag stood behind an access port's tag.
    InnerTag,
    /// A trunk without native VLAN got an untagged frame from its guest.
    UntaggedOnTrunk,
    /// A trunk's guest used a VLAN that is not in its list.
    VlanNotAllowed,
    /// The source address is not one the port may use.
    SpoofedMac,
    /// Over the port's rate.
    RateLimited,
    /// Over the port's broadcast and multicast rate.
    StormLimited,
    /// Longer than the outgoing device's MTU lets through.
    TooLong,
    /// Ends inside its Ethernet header or a tag.
    Malformed,
    /// The checksum or segmentation request does not fit the frame.
    BadOffload,
    /// The guest does not empty its queue fast enough.
    GuestQueueFull,
    /// The guest's device is missing, down or without a VMM.
    GuestAbsent,
    /// The uplink is missing, down or without carrier.
    UplinkDown,
    /// The uplink does not send fast enough.
    UplinkQueueFull,
    /// The kernel had no room left in the receive ring.
    RingOverrun,
    /// The kernel refused the frame for another cause.
    SendFailed,
    /// It came to a worker that does not have the port.
    WrongWorker,
}

impl DropReason {
    /// Number of reasons.
    pub const COUNT: usize = Self::ALL.len();

    /// All reasons, in the order of [`DropReason::index`].
    pub const ALL: [Self; 18] = [
        Self::UnmappedVlan,
        Self::TaggedOnAccess,
        Self::InnerTag,
        Self::UntaggedOnTrunk,
        Self::VlanNotAllowed,
        Self::SpoofedMac,
        Self::RateLimited,
        Self::StormLimited,
        Self::TooLong,
        Self::Malformed,
        Self::BadOffload,
        Self::GuestQueueFull,
        Self::GuestAbsent,
        Self::UplinkDown,
        Self::UplinkQueueFull,
        Self::RingOverrun,
        Self::SendFailed,
        Self::WrongWorker,
    ];

    /// Position in [`DropReason::ALL`] and in arrays of counters.
    #[inline]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// The name users and metrics see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::UnmappedVlan => "unmapped_vlan",
            Self::TaggedOnAccess => "tagged_on_access",
            Self::InnerTag => "inner_tag",
            Self::UntaggedOnTrunk => "untagged_on_trunk",
            Self::VlanNotAllowed => "vlan_not_allowed",
            Self::SpoofedMac => "spoofed_mac",
            Self::RateLimited => "rate_limited",
            Self::StormLimited => "storm_limited",
            Self::TooLong => "too_long",
            Self::Malformed => "malformed",
            Self::BadOffload => "bad_offload",
            Self::GuestQueueFull => "guest_queue_full",
            Self::GuestAbsent => "guest_absent",
            Self::UplinkDown => "uplink_down",
            Self::UplinkQueueFull => "uplink_queue_full",
            Self::RingOverrun => "ring_overrun",
            Self::SendFailed => "send_failed",
            Self::WrongWorker => "wrong_worker",
        }
    }

    /// What the reason means and what to do, in one line.
    pub const fn help(self) -> &'static str {
        match self {
            Self::UnmappedVlan => {
                "the frame's VLAN is mapped to no port; map it, or prune it on the switch"
            }
            Self::TaggedOnAccess => {
                "the guest tags on an access port; use mode=tunnel or mode=trunk, or untag in the guest"
            }
            Self::InnerTag => {
                "a second tag follows on an access port; use mode=tunnel, or map OUTER.INNER"
            }
            Self::UntaggedOnTrunk => {
                "the guest sends untagged on a trunk; give it native=VID, or tag in the guest"
            }
            Self::VlanNotAllowed => {
                "the guest uses a VLAN outside its trunk's list; add it to the map, or mend the guest"
            }
            Self::SpoofedMac => "the guest's source address is not in mac=",
            Self::RateLimited => "the guest is over rate=",
            Self::StormLimited => "the guest's broadcasts and multicasts are over storm=",
            Self::TooLong => {
                "longer than the device sends; raise its MTU (uplink: --set-uplink-mtu), or lower the guest's"
            }
            Self::Malformed => "the frame ends inside its Ethernet header or a VLAN tag",
            Self::BadOffload => "the checksum or segmentation request does not fit the frame",
            Self::GuestQueueFull => {
                "the guest does not read fast enough; give it more CPU, or its device a longer txqueuelen"
            }
            Self::GuestAbsent => "the device is missing, down, or no VM has it open",
            Self::UplinkDown => "the uplink is missing, down, or has no carrier",
            Self::UplinkQueueFull => {
                "the uplink does not send fast enough; look at its qdisc and link speed"
            }
            Self::RingOverrun => {
                "a receive ring was full, or a port took most of the uplink's; the switch needs more CPU"
            }
            Self::SendFailed => "the kernel refused the frame; the counters name its last error",
            Self::WrongWorker => {
                "the frame met a worker that does not have its port, while the port was being moved"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;

    #[test]
    fn the_table_is_in_index_order_and_names_are_unique() {
        let mut names: Vec<_> = DropReason::ALL.iter().map(|reason| reason.name()).collect();
        for (position, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), position);
            assert!(!reason.help().is_empty());
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DropReason::COUNT);
    }
}
