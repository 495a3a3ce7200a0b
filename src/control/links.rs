//! Network devices by name: following them as they come, change and go, and
//! setting what a port needs of them.
//!
//! # Theory of operation
//!
//! A port is configured by the *name* of a device, the kernel knows devices by
//! *index*, and the two drift apart at any time: a VM restarts and its tap comes
//! back under another index, a device is renamed or moved to another network
//! namespace. [`LinkMonitor`] holds a [`Links`] table that mirrors the kernel's
//! and turns each difference into a [`LinkEvent`].
//!
//! Two sockets keep the table true. One is subscribed to the kernel's link
//! notifications, before anything else happens. The other fetches a full dump.
//! As the notifications queue up from before the dump began, applying the dump
//! first and then every notification always ends in the kernel's present state,
//! however the two interleaved: the last notification about a device is newer
//! than or as old as the dump. (With both on one socket it would not: a dump
//! part is filled under the kernel's lock and queued after it is released, so an
//! older dump part can queue up behind a newer notification.) What it costs is
//! that right after a dump an event may show a state that has already passed;
//! its successor is in the same queue.
//!
//! When the notification queue overflows (`ENOBUFS`), what is queued is thrown
//! away, a new dump is compared with the table, and the differences come out as
//! the same events. So a consumer needs no second code path for overruns.
//!
//! # Following a name
//!
//! Names are unique in a namespace, and the table holds that at each moment:
//! whoever held a name has left it (an event said so) before another index
//! arrives under it. So for a consumer that follows names each event has at most
//! two parts, in this order: [`LinkEvent::departed`], the name and index that no
//! longer go together, and [`LinkEvent::arrived`], the ones that do.
//! A move to another namespace is a departure like a deletion, because the kernel
//! reports it as `RTM_DELLINK` (`dev_change_net_namespace`, net/core/dev.c).
//!
//! # What stands at a device's tc hooks
//!
//! The same subscription brings the news that a qdisc or a filter was removed, and
//! [`LinkEvent::Unhooked`] passes it on. Nothing is mirrored here: whoever has put
//! something there looks whether it still stands. After an overrun that is said of
//! all devices, because which it was is lost.
//!
//! # Setting
//!
//! [`LinkSocket`] sends one request at a time and waits for the kernel's answer.
//! What was set is read back where the kernel reports it.

mod ipv6;
mod monitor;
mod request;
mod table;
mod wire;
mod xdp;

pub use ipv6::{PreviousIpv6, disable_ipv6, restore_ipv6};
pub use monitor::LinkMonitor;
pub use request::{LinkSettings, LinkSocket};
pub use table::{LinkEvent, LinkState, Links};
pub use wire::QDISC_REMOVED;
pub use wire::{LinkDetails, VlanDevice};
pub use xdp::takes_redirected;

use std::io;

use crate::sys::sandbox::Call;
use nix::errno::Errno;

/// What following and changing devices takes.
pub const CALLS: &[Call] = &[
    Call::one_of(libc::SYS_socket, 0, &[libc::AF_NETLINK.cast_unsigned()]),
    Call::any(libc::SYS_bind),
    Call::any(libc::SYS_connect),
    Call::any(libc::SYS_getsockname),
    Call::any(libc::SYS_setsockopt),
    Call::any(libc::SYS_sendto),
    Call::any(libc::SYS_recvfrom),
    // The index of a device.
    Call::one_of(libc::SYS_socket, 0, &[libc::AF_UNIX.cast_unsigned()]),
    Call::one_of(libc::SYS_ioctl, 1, &[libc::SIOCGIFINDEX as u32]),
];

/// What went wrong with a device or the netlink socket, in words for people.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The netlink socket itself failed.
    #[error("netlink socket: cannot {operation}: {reason}{}", cure(reason))]
    Socket {
        /// What was being done, as it follows "cannot".
        operation: &'static str,
        /// The system's reason.
        reason: io::Error,
    },
    /// The kernel refused a request about a device.
    #[error("{device}: cannot {operation}: {reason}{}{}", detail(explanation), cure(reason))]
    Refused {
        /// The device, by name where it has one, else by index.
        device: String,
        /// What was asked for, as it follows "cannot".
        operation: String,
        /// The kernel's error number.
        reason: io::Error,
        /// The kernel's own explanation (extended acknowledgement), if it gave one.
        explanation: Option<String>,
    },
    /// The kernel accepted a setting but reports another value.
    #[error(
        "{device}: asked for {asked}, the device reports {found}; its driver changed the value, or \
         another program (NetworkManager, systemd-networkd) manages the device: tell it to leave \
         the device alone"
    )]
    NotKept {
        /// The device, by name.
        device: String,
        /// The setting and the value asked for.
        asked: String,
        /// The setting and the value found.
        found: String,
    },
    /// A value that no device can take, found before the kernel was asked.
    #[error("{device}: {what}")]
    BadValue {
        /// The device as the caller named it.
        device: String,
        /// What is wrong with the value, and what would be right.
        what: String,
    },
}

impl LinkError {
    /// Whether the device is gone: deleted, or moved to another namespace. A
    /// caller that follows names waits for it to come back then.
    pub fn is_device_gone(&self) -> bool {
        match self {
            Self::Refused { reason, .. } => reason.raw_os_error() == Some(Errno::ENODEV as i32),
            _ => false,
        }
    }
}

/// The kernel's explanation in brackets, or nothing.
fn detail(explanation: &Option<String>) -> String {
    explanation.as_ref().map_or_else(String::new, |text| format!(" ({text})"))
}

/// What to do about an error number, as the end of a sentence.
fn cure(error: &io::Error) -> &'static str {
    if error.kind() == io::ErrorKind::TimedOut {
        return "; the kernel is overloaded or another program holds its network lock: try again";
    }
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EPERM | Errno::EACCES) => {
            "; run as root, or give the process the capability CAP_NET_ADMIN"
        }
        Some(Errno::ENODEV) => {
            "; it was deleted or moved to another network namespace: create it again"
        }
        Some(Errno::EINVAL | Errno::ERANGE) => {
            "; `ip -details link show` tells which values the device allows"
        }
        Some(Errno::EBUSY) => "; another program holds the device: stop it, or try again",
        Some(Errno::EOPNOTSUPP) => "; the device's driver or this kernel cannot do that",
        Some(Errno::EROFS) => {
            "; /proc/sys is read-only here (a container?): make it writable, or set it on the host"
        }
        Some(Errno::ENOBUFS | Errno::ENOMEM) => "; the kernel is out of memory: try again",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    fn refused(errno: Errno, explanation: Option<&str>) -> LinkError {
        LinkError::Refused {
            device: "tap-web1 (index 7)".into(),
            operation: "set the MTU to 70000".into(),
            reason: io::Error::from_raw_os_error(errno as i32),
            explanation: explanation.map(str::to_owned),
        }
    }

    #[test]
    fn an_error_names_device_operation_reason_and_cure() {
        assert_eq!(
            refused(Errno::EINVAL, Some("mtu greater than device maximum")).to_string(),
            "tap-web1 (index 7): cannot set the MTU to 70000: Invalid argument (os error 22) (mtu \
             greater than device maximum); `ip -details link show` tells which values the device \
             allows"
        );
        assert!(refused(Errno::EPERM, None).to_string().ends_with("CAP_NET_ADMIN"));
    }

    #[test]
    fn only_a_missing_device_counts_as_gone() {
        assert!(refused(Errno::ENODEV, None).is_device_gone());
        assert!(!refused(Errno::EPERM, None).is_device_gone());
    }
}
