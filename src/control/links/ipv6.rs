//! Switching the host's IPv6 off on a device, so that it neither answers nor
//! announces anything there.
//!
//! Through /proc, because netlink cannot set it: `IFLA_INET6_CONF` is read-only
//! (net/ipv6/addrconf.c). The kernel shows each process the devices of its own
//! network namespace there.

use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::{fs, io};

use super::LinkError;

/// What `disable_ipv6` was before, for [`restore_ipv6`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum PreviousIpv6 {
    /// The device has no IPv6 at all: switched off at boot, not compiled in, or an
    /// MTU below the 1280 bytes it needs.
    Absent,
    /// IPv6 was on.
    Enabled,
    /// IPv6 was off already.
    Disabled,
}

/// Switches IPv6 off on the device with this name, in the calling thread's network
/// namespace. The device's IPv6 addresses and routes go with it.
///
/// No IPv6 on the device is fine. Fails where /proc/sys may not be written.
pub fn disable_ipv6(name: &str) -> Result<PreviousIpv6, LinkError> {
    let path = setting(name)?;
    let previous = match read(&path).map_err(|reason| refused(name, "read", reason))? {
        None => return Ok(PreviousIpv6::Absent),
        Some(true) => return Ok(PreviousIpv6::Disabled),
        Some(false) => PreviousIpv6::Enabled,
    };
    write(name, &path, true)?;
    Ok(previous)
}

/// Puts back what [`disable_ipv6`] found. A device that is gone is fine.
pub fn restore_ipv6(name: &str, previous: PreviousIpv6) -> Result<(), LinkError> {
    match previous {
        PreviousIpv6::Absent | PreviousIpv6::Disabled => Ok(()),
        PreviousIpv6::Enabled => write(name, &setting(name)?, false),
    }
}

/// The file that holds the setting.
fn setting(name: &str) -> Result<PathBuf, LinkError> {
    // "all" and "default" stand for other devices, of the whole host; the rest is
    // what the kernel refuses as a name (`dev_valid_name`, net/core/dev.c).
    if matches!(name, "" | "." | ".." | "all" | "default") || name.contains(['/', '\0']) {
        return Err(LinkError::BadValue {
            device: format!("{name:?}"),
            what: "this is not the name of a network device: name a device `ip link` shows".into(),
        });
    }
    Ok(["/proc/sys/net/ipv6/conf", name, "disable_ipv6"].iter().collect())
}

/// Whether IPv6 is off; none where the device has no IPv6.
fn read(path: &PathBuf) -> io::Result<Option<bool>> {
    match fs::read_to_string(path) {
        Ok(value) => Ok(Some(value.trim() != "0")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn write(name: &str, path: &PathBuf, off: bool) -> Result<(), LinkError> {
    let operation = if off { "switch off" } else { "switch on" };
    match fs::write(path, if off { "1" } else { "0" }) {
        Ok(()) => {}
        // The device went away in between, and its IPv6 with it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(refused(name, operation, error)),
    }
    match read(path).map_err(|reason| refused(name, "read", reason))? {
        Some(found) if found != off => Err(LinkError::NotKept {
            device: name.into(),
            asked: format!("disable_ipv6 {}", u8::from(off)),
            found: format!("disable_ipv6 {}", u8::from(found)),
        }),
        _ => Ok(()),
    }
}

fn refused(name: &str, operation: &str, reason: io::Error) -> LinkError {
    LinkError::Refused {
        device: name.into(),
        operation: format!("{operation} its IPv6 (net.ipv6.conf.{name}.disable_ipv6)"),
        reason,
        explanation: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_mean_the_whole_host_are_refused() {
        for name in ["all", "default", "..", "a/b", ""] {
            assert!(
                matches!(setting(name), Err(LinkError::BadValue { .. })),
                "{name:?} was accepted"
            );
        }
    }

    #[test]
    fn a_missing_device_has_no_ipv6() {
        assert!(matches!(disable_ipv6("no-such-device0"), Ok(PreviousIpv6::Absent)));
    }
}
