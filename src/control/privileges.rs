//! Which capabilities the switch needs, and who lacks them.

use caps::{CapSet, Capability};
use thiserror::Error;

/// Capabilities are missing from the effective set.
#[derive(Debug, Error)]
#[error(
    "missing {}: run vlanswitchd as root, or grant it with `setcap {}+ep PATH/TO/vlanswitchd`, \
     or under systemd with AmbientCapabilities=",
    .0.join(", "), .0.join(",").to_lowercase()
)]
pub struct MissingCapabilities(Vec<String>);

/// The capabilities that are missing for packet sockets (CAP_NET_RAW), devices
/// (CAP_NET_ADMIN) and BPF programs (CAP_BPF, before Linux 5.8 CAP_SYS_ADMIN).
pub fn missing() -> Vec<String> {
    let has = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
    let mut missing: Vec<String> = [Capability::CAP_NET_RAW, Capability::CAP_NET_ADMIN]
        .into_iter()
        .filter(|capability| !has(*capability))
        .map(|capability| capability.to_string())
        .collect();
    if !has(Capability::CAP_BPF) && !has(Capability::CAP_SYS_ADMIN) {
        missing.push(Capability::CAP_BPF.to_string());
    }
    missing
}

/// Checks that none is missing.
///
/// # Errors
/// [`MissingCapabilities`] naming those that are.
pub fn check() -> Result<(), MissingCapabilities> {
    let missing = missing();
    if missing.is_empty() { Ok(()) } else { Err(MissingCapabilities(missing)) }
}
