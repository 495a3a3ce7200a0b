//! A port's part in the VLANs of the uplink, as configured: only legal
//! combinations can be built.

use crate::frame::{Pcp, Tpid, Vid};
use std::fmt;
use thiserror::Error;

/// The VLANs of a port (DESIGN §2).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Vlans {
    /// Frames that carry no VLAN on the uplink.
    Untagged,
    /// One VLAN.
    One(Vid),
    /// A trunk's VLANs, ascending, without duplicates.
    List(Vec<Vid>),
    /// A pair of tags.
    Double {
        /// VID of the outer tag.
        outer: Vid,
        /// VID of the inner tag.
        inner: Vid,
    },
}

impl Vlans {
    /// The mode of a port with these VLANs that names none (DESIGN §2).
    pub fn default_mode(&self) -> Mode {
        match self {
            Self::Untagged => Mode::Access,
            Self::One(_) | Self::Double { .. } => Mode::Tunnel,
            Self::List(_) => Mode::Trunk,
        }
    }
}

impl fmt::Display for Vlans {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Untagged => formatter.write_str("0"),
            Self::One(vid) => vid.fmt(formatter),
            Self::Double { outer, inner } => write!(formatter, "{outer}.{inner}"),
            Self::List(vids) => {
                let mut rest = vids.as_slice();
                while let Some((first, _)) = rest.split_first() {
                    let run = rest
                        .iter()
                        .zip(first.get()..)
                        .take_while(|(vid, expected)| vid.get() == *expected)
                        .count();
                    if rest.len() < vids.len() {
                        formatter.write_str(",")?;
                    }
                    match rest.get(run - 1) {
                        Some(last) if run > 1 => write!(formatter, "{first}-{last}")?,
                        _ => first.fmt(formatter)?,
                    }
                    rest = rest.get(run..).unwrap_or_default();
                }
                Ok(())
            }
        }
    }
}

/// What a port does with tags (DESIGN §3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// The outer tag is ours, all else is the guest's.
    Tunnel,
    /// The guest sees and sends no tags.
    Access,
    /// The guest sees the tags of its VLANs.
    Trunk,
}

impl Mode {
    /// The word users type.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tunnel => "tunnel",
            Self::Access => "access",
            Self::Trunk => "trunk",
        }
    }
}

/// Which priority a pushed tag gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// Always this one, DEI clear.
    Fixed(Pcp),
    /// PCP and DEI of the guest's own tag, 0 without one.
    Copy,
}

/// Everything the switch knows of one port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    vlans: Vlans,
    mode: Mode,
    native: Option<Vid>,
    tpid: Tpid,
    inner_tpid: Tpid,
    priority: Priority,
}

/// A combination that makes no sense; the text names the cure.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum MembershipError {
    /// VLAN 0 with a mode that needs a tag.
    #[error("VLAN 0 (untagged) works in mode=access only, not mode={}: drop the mode, or map a VLAN from 1 to 4094", .0.name())]
    UntaggedMode(Mode),
    /// A list in a mode for one VLAN.
    #[error("a list of VLANs needs mode=trunk, not mode={}: map one VLAN, or use mode=trunk", .0.name())]
    ListMode(Mode),
    /// A trunk of a tag pair.
    #[error("a tag pair ({0}) works in mode=tunnel or mode=access, not mode=trunk")]
    DoubleTrunk(Vlans),
    /// A native VLAN on a port that is no trunk.
    #[error("native={0} works with mode=trunk only: add mode=trunk, or drop native")]
    NativeWithoutTrunk(Vid),
    /// A native VLAN outside the list.
    #[error(
        "native={native} is not one of the port's VLANs ({vlans}): add it to the list, or choose one of them"
    )]
    NativeNotInList {
        /// The native VLAN.
        native: Vid,
        /// The list.
        vlans: Vlans,
    },
    /// An inner TPID without an inner tag.
    #[error("inner-tpid works with a tag pair such as 101.20 only: drop it, or map OUTER.INNER")]
    InnerTpidWithoutInner,
}

impl Membership {
    /// Builds a membership; `mode` and `inner_tpid` default as in DESIGN §2.
    ///
    /// # Errors
    /// [`MembershipError`] for combinations DESIGN §2 refuses.
    pub fn new(
        vlans: Vlans,
        mode: Option<Mode>,
        native: Option<Vid>,
        tpid: Tpid,
        inner_tpid: Option<Tpid>,
        priority: Priority,
    ) -> Result<Self, MembershipError> {
        let mode = mode.unwrap_or_else(|| vlans.default_mode());
        match (&vlans, mode) {
            (Vlans::Untagged, Mode::Tunnel | Mode::Trunk) => {
                return Err(MembershipError::UntaggedMode(mode));
            }
            (Vlans::List(_), Mode::Tunnel | Mode::Access) => {
                return Err(MembershipError::ListMode(mode));
            }
            (Vlans::Double { .. }, Mode::Trunk) => return Err(MembershipError::DoubleTrunk(vlans)),
            _ => {}
        }
        if let Some(native) = native {
            if mode != Mode::Trunk {
                return Err(MembershipError::NativeWithoutTrunk(native));
            }
            let member = match &vlans {
                Vlans::One(vid) => *vid == native,
                Vlans::List(vids) => vids.contains(&native),
                Vlans::Untagged | Vlans::Double { .. } => false,
            };
            if !member {
                return Err(MembershipError::NativeNotInList { native, vlans });
            }
        }
        if inner_tpid.is_some() && !matches!(vlans, Vlans::Double { .. }) {
            return Err(MembershipError::InnerTpidWithoutInner);
        }
        let inner_tpid = inner_tpid.unwrap_or_default();
        Ok(Self { vlans, mode, native, tpid, inner_tpid, priority })
    }

    /// The VLANs.
    pub fn vlans(&self) -> &Vlans {
        &self.vlans
    }

    /// The mode.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The VLAN that is untagged on the guest's side of a trunk.
    pub fn native(&self) -> Option<Vid> {
        self.native
    }

    /// TPID of the outer tag on the uplink.
    pub fn tpid(&self) -> Tpid {
        self.tpid
    }

    /// TPID of the inner tag of a pair.
    pub fn inner_tpid(&self) -> Tpid {
        self.inner_tpid
    }

    /// Priority of pushed tags.
    pub fn priority(&self) -> Priority {
        self.priority
    }

    /// The VIDs this port owns under its TPID on the uplink, outer tags only.
    pub fn outer_vids(&self) -> impl Iterator<Item = Vid> {
        let (one, many) = match &self.vlans {
            Vlans::Untagged => (Some(Vid::NONE), &[][..]),
            Vlans::One(vid) | Vlans::Double { outer: vid, .. } => (Some(*vid), &[][..]),
            Vlans::List(vids) => (None, vids.as_slice()),
        };
        one.into_iter().chain(many.iter().copied())
    }

    /// Bytes of tag a full-size untagged guest frame carries on the uplink.
    pub fn tag_bytes(&self) -> u32 {
        match self.vlans {
            Vlans::Untagged => 0,
            Vlans::One(_) | Vlans::List(_) => 4,
            Vlans::Double { .. } => 8,
        }
    }
}
