//! What is done in another way because this kernel lacks a feature: a closed set, which
//! `status` and the metrics read. Each is found by the start-up probe ([`super::probe`]).

use crate::dataplane::Abilities as Segmentation;
use serde::{Deserialize, Serialize};

/// What this kernel can do, as the probe found it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abilities {
    /// What it segments.
    #[serde(flatten)]
    pub segments: Segmentation,
    /// TCX (6.6).
    #[serde(default)]
    pub tcx: bool,
    /// Groups of packet sockets that are spared what the host sends (6.2).
    #[serde(default)]
    pub groups_ignore_outgoing: bool,
}

/// A feature that is missing, by what takes its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// Tagged super-frames are cut by us.
    TaggedSegmentation,
    /// UDP super-frames are cut by us.
    UdpSegmentation,
    /// Seals stay with clsact.
    Clsact,
    /// The socket filter refuses what the host sends.
    OwnFramesFilter,
}

impl Fallback {
    /// All of them.
    pub const ALL: [Self; 4] =
        [Self::TaggedSegmentation, Self::UdpSegmentation, Self::Clsact, Self::OwnFramesFilter];

    /// Its name, for programs.
    pub fn name(self) -> &'static str {
        match self {
            Self::TaggedSegmentation => "tagged_segmentation",
            Self::UdpSegmentation => "udp_segmentation",
            Self::Clsact => "clsact",
            Self::OwnFramesFilter => "own_frames_filter",
        }
    }

    /// The one with this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fallback| fallback.name() == name)
    }

    /// What it is, what it costs, and which kernel needs it no longer.
    pub fn help(self) -> &'static str {
        match self {
            Self::TaggedSegmentation => {
                "super-frames with VLAN tags are cut in userspace, which costs CPU (Linux 5.19, 5.15.86, 5.10.163)"
            }
            Self::UdpSegmentation => {
                "UDP super-frames are cut in userspace, which costs CPU (Linux 6.2)"
            }
            Self::Clsact => {
                "ports are sealed by clsact, which costs a frame 80 ns (Linux 6.6 has TCX)"
            }
            Self::OwnFramesFilter => {
                "with several workers a socket filter refuses what the host sends (Linux 6.2)"
            }
        }
    }

    /// Whether a switch on this kernel does so.
    pub fn in_use(self, kernel: Abilities) -> bool {
        match self {
            Self::TaggedSegmentation => !kernel.segments.tagged_gso,
            Self::UdpSegmentation => !kernel.segments.udp_gso,
            Self::Clsact => !kernel.tcx,
            Self::OwnFramesFilter => !kernel.groups_ignore_outgoing,
        }
    }
}

impl Abilities {
    /// The names of what is done in another way.
    pub fn fallbacks(self) -> Vec<String> {
        let used = Fallback::ALL.into_iter().filter(|fallback| fallback.in_use(self));
        used.map(|fallback| fallback.name().to_owned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_feature_has_its_name_and_nothing_else_is_told() {
        let all = Abilities {
            segments: Segmentation { tagged_gso: true, udp_gso: true },
            tcx: true,
            groups_ignore_outgoing: true,
        };
        assert_eq!(all.fallbacks(), Vec::<String>::new());
        let names: Vec<&str> = Fallback::ALL.into_iter().map(Fallback::name).collect();
        assert_eq!(Abilities::default().fallbacks(), names);
        assert_eq!(Abilities { tcx: false, ..all }.fallbacks(), ["clsact"]);
        assert!(Fallback::ALL.into_iter().all(|it| Fallback::named(it.name()) == Some(it)));
    }

    /// What a process of an earlier version hands over says less.
    #[test]
    fn what_an_earlier_version_does_not_tell_is_taken_as_missing() {
        let read: Result<Abilities, _> =
            serde_json::from_str(r#"{"tagged_gso":true,"udp_gso":true}"#);
        let read = read.ok().map(Abilities::fallbacks);
        assert_eq!(read, Some(vec!["clsact".to_owned(), "own_frames_filter".to_owned()]));
    }
}
