//! What is refused about a port, where it stands, and what to do.

use super::OPTIONS;
use crate::frame::Vid;
use crate::switch::MembershipError;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use thiserror::Error;

/// Where a port was described.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// On the command line, in these words.
    Argument(String),
    /// In a file.
    File {
        /// The file.
        file: Arc<Path>,
        /// The line of its `[[port]]`, or of one of its keys; the first is 1.
        line: usize,
    },
    /// Over the control socket, in the words of `--map`.
    Control(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argument(map) => write!(formatter, "--map {map}"),
            Self::File { file, line } => write!(formatter, "{}:{line}", file.display()),
            Self::Control(map) => write!(formatter, "the control socket's {map}"),
        }
    }
}

/// Text without control characters: what is refused may have any in it, and goes to
/// logs and terminals.
pub(in crate::control) fn one_line(text: &impl ToString) -> String {
    let escape = |character: char| {
        let (plain, escaped) = if character.is_control() {
            (None, Some(character.escape_default()))
        } else {
            (Some(character), None)
        };
        plain.into_iter().chain(escaped.into_iter().flatten())
    };
    text.to_string().chars().flat_map(escape).collect()
}

/// Why a port was refused.
#[derive(Debug, Error)]
pub struct MapError {
    /// Where it stands.
    pub origin: Origin,
    /// The key at fault, where one is.
    pub key: Option<&'static str>,
    /// What is wrong with it and what to do.
    pub problem: MapProblem,
}

impl fmt::Display for MapError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let problem = one_line(&self.problem);
        write!(formatter, "{}: ", one_line(&self.origin))?;
        // The words of a map show what is meant; a line of a file is a number only.
        match (&self.origin, self.key) {
            (Origin::File { .. }, Some(key)) if !problem.starts_with(key) => {
                write!(formatter, "{key}: {problem}")
            }
            _ => formatter.write_str(&problem),
        }
    }
}

/// What can be wrong with a mapping.
#[derive(Debug, Error)]
pub enum MapProblem {
    /// No `=`.
    #[error("no '=' in it: write VLANS=DEVICE, for instance 101=tap-web1")]
    NoDevice,
    /// A table without one of the two keys it must have.
    #[error("{key} is missing: add a line such as {example}")]
    Missing {
        /// The key.
        key: &'static str,
        /// The line to add.
        example: &'static str,
    },
    /// Not a VLAN, list, range or pair.
    #[error(
        "'{0}' is no VLAN: write a number from 0 to 4094, a list such as 200-210,300, or a pair such as 101.20"
    )]
    BadVlans(String),
    /// Outside 0..=4094.
    #[error("VLAN {0} is outside 0..4094 (4095 is reserved by IEEE 802.1Q)")]
    VlanRange(u32),
    /// VLAN 0 in a list or a pair.
    #[error("VLAN 0 (untagged) cannot be part of '{0}': map it on its own, as 0=DEVICE")]
    ZeroInside(String),
    /// A range that goes down.
    #[error("the range '{0}' goes down: write the smaller VLAN first")]
    BackwardRange(String),
    /// A VLAN twice in one list.
    #[error("VLAN {0} stands in the list twice: remove one")]
    TwiceInList(Vid),
    /// A name no device can have.
    #[error("'{name}' cannot name a device: {why}")]
    BadName {
        /// The name.
        name: String,
        /// Why not.
        why: &'static str,
    },
    /// We would create a device with a name of libvirt's.
    #[error(
        "the name '{0}' is reserved by libvirt (vnet*, vif*, macvtap*, macvlan*): choose another, or create=no if libvirt makes the device"
    )]
    ReservedName(String),
    /// No such option.
    #[error("unknown option '{0}': the options are {options}", options = OPTIONS.join(", "))]
    UnknownOption(String),
    /// An option twice.
    #[error("option {0} is given twice: remove one")]
    OptionTwice(String),
    /// An option's value.
    #[error("{option}={value}: {cure}")]
    BadValue {
        /// The option.
        option: &'static str,
        /// The value.
        value: String,
        /// What it can be.
        cure: &'static str,
    },
    /// An option for taps we create, on something else.
    #[error("{option} is for taps that vlanswitchd creates: {cure}")]
    NotCreated {
        /// The option.
        option: &'static str,
        /// What to do.
        cure: &'static str,
    },
    /// No such user or group.
    #[error(
        "{option}={value}: this host has no such {option}; name an existing one, or its number"
    )]
    NoSuchAccount {
        /// `owner` or `group`.
        option: &'static str,
        /// The name.
        value: String,
    },
    /// A combination without sense.
    #[error(transparent)]
    Membership(#[from] MembershipError),
    /// The device is the uplink.
    #[error("{device} is the uplink itself, by {place}: map another device")]
    IsUplink {
        /// The device.
        device: String,
        /// Where the uplink is named.
        place: String,
    },
    /// The device has another mapping.
    #[error(
        "{device} is mapped already, by {other}: map each device once (a list of VLANs makes a trunk)"
    )]
    DeviceTwice {
        /// The device.
        device: String,
        /// Where the other mapping stands.
        other: Origin,
    },
    /// Another mapping has these frames.
    #[error("{what} belongs to {other} already: give each VLAN to one device")]
    Overlap {
        /// What both claim.
        what: String,
        /// Where the other mapping stands.
        other: Origin,
    },
}
