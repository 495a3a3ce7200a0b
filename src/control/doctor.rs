//! What is wrong with the host, and how to mend it.
//!
//! # Theory of operation
//!
//! [`Facts`] is what was read: from the daemon (what is configured and counted) and
//! from the host (`read`, which may take some milliseconds and runs on a thread of
//! its own). [`findings`] judges it: one function a matter, all pure, each tested on
//! facts made for it, and against the kernel in `tests/doctor.rs`.
//!
//! What is said of a port's device when it is attached comes from here as well
//! ([`port_notes`]), so that a warning has one wording wherever it is read.

mod judge;
mod read;

pub use judge::{device_notes, findings, port_notes, tap_notes};
pub use read::{HostFacts, notes_about};

use crate::control::api::{Finding, Severity, Stats, Status};
use crate::control::config::Config;
use crate::control::mapping::PortConfig;
use crate::control::mtu::{self, UplinkMtu};
use crate::frame::{Tpid, Vid};
use std::path::Path;

/// The MTU guests are taken to have.
const USUAL_GUEST_MTU: u32 = 1500;

/// A source address seen in a VLAN nobody mapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// TPID, as `0x8100`.
    pub tpid: String,
    /// VID.
    pub vid: u16,
    /// Source address of the last such frame.
    pub source: [u8; 6],
}

/// What the daemon knows.
#[derive(Debug, Clone)]
pub struct SwitchFacts {
    /// The switch as a whole.
    pub status: Status,
    /// Its counters.
    pub stats: Stats,
    /// Its ports.
    pub ports: Vec<PortConfig>,
    /// The VLANs it takes from the uplink.
    pub claims: Vec<(Tpid, Vid)>,
    /// It takes the uplink's untagged frames.
    pub claims_untagged: bool,
    /// Who talks in VLANs nobody mapped.
    pub samples: Vec<Sample>,
}

/// All that is judged.
#[derive(Debug, Clone)]
pub struct Facts {
    /// What the daemon knows.
    pub switch: SwitchFacts,
    /// What the host is like.
    pub host: HostFacts,
}

impl SwitchFacts {
    /// The uplink MTU that guests with the usual MTU need.
    fn mtu_needed(&self) -> UplinkMtu {
        let needs =
            || self.ports.iter().map(|port| mtu::for_port(&port.membership, USUAL_GUEST_MTU));
        UplinkMtu {
            required: needs().map(|need| need.required).max().unwrap_or(USUAL_GUEST_MTU),
            with_guest_tag: needs()
                .map(|need| need.with_guest_tag)
                .max()
                .unwrap_or(USUAL_GUEST_MTU),
        }
    }
}

/// Looks at the host and judges. Takes milliseconds, and more on a host with hundreds
/// of ports: not for the control loop.
pub fn examine(switch: SwitchFacts) -> Vec<Finding> {
    let host = HostFacts::read(&switch);
    findings(&Facts { switch, host })
}

/// What can be said when no daemon answers on its socket.
pub fn without_daemon(socket: &Path, config: Result<&Config, &str>) -> Vec<Finding> {
    let mut found = vec![finding(
        Severity::Error,
        "vlanswitchd",
        format!("no daemon answers on {}", socket.display()),
        Some(
            "start it (`systemctl start vlanswitchd`), or name its socket with --control PATH; if \
             it runs, you may lack the right: see who may open the socket with `ls -l`"
                .to_owned(),
        ),
    )];
    match config {
        Ok(config) => found.extend(read::before_start(config)),
        Err(errors) => found.extend(
            errors
                .lines()
                .map(|error| finding(Severity::Error, "configuration", error.to_owned(), None)),
        ),
    }
    found.sort_by_key(|finding| finding.severity);
    found
}

/// A finding on one line, for the log.
pub fn line(finding: &Finding) -> String {
    let Finding { about, what, cure, .. } = finding;
    match cure {
        Some(cure) => format!("{about}: {what}: {cure}"),
        None => format!("{about}: {what}"),
    }
}

fn finding(
    severity: Severity,
    about: &str,
    what: impl Into<String>,
    cure: Option<String>,
) -> Finding {
    Finding { severity, about: about.to_owned(), what: what.into(), cure }
}
