//! Attaching a tc program by whichever method the kernel has.

use super::syscall::BpfError;
use super::{clsact, tcx};
use std::os::fd::BorrowedFd;

/// Which side of a device a tc program stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Frames the device received, after AF_PACKET has seen them.
    Ingress,
    /// Frames about to be sent, before AF_PACKET sees them.
    Egress,
}

/// What attaching did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attached {
    /// No program of this name was there.
    New,
    /// It took the place of one of the same name, in one step.
    Replaced,
}

/// How a program was attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// [`tcx`]
    Tcx,
    /// [`clsact`]
    Clsact,
}

/// Attaches `program`, loaded as `name`, to interface `device`: by clsact, or by TCX
/// where the kernel has no cls_bpf. It stays until [`detach_tc`] or until the device
/// goes.
///
/// Clsact first, because attaching by TCX waits for an RCU grace period under the
/// kernel's device lock (docs/adr/0002-seal-by-clsact.md has the figures), and
/// because everybody may see with `tc filter show` what is attached.
///
/// # Errors
/// Both methods failed: the error of the second.
pub fn attach_tc(
    program: BorrowedFd<'_>,
    name: &str,
    device: u32,
    direction: Direction,
) -> Result<(Method, Attached), BpfError> {
    match clsact::attach(program, name, device, direction) {
        Ok(attached) => Ok((Method::Clsact, attached)),
        Err(BpfError::Unsupported { .. }) => {
            let attached = tcx::attach(program, device, direction)?;
            Ok((Method::Tcx, attached))
        }
        Err(error) => Err(error),
    }
}

/// Detaches the program called `name` from interface `device`, whatever the method
/// it was attached by; false if it was not there.
///
/// # Errors
/// The kernel refused.
pub fn detach_tc(name: &str, device: u32, direction: Direction) -> Result<bool, BpfError> {
    let by_clsact = clsact::detach(name, device, direction)?;
    match tcx::detach(name, device, direction) {
        Ok(by_tcx) => Ok(by_clsact || by_tcx),
        Err(BpfError::Unsupported { .. } | BpfError::Unidentified { .. }) => Ok(by_clsact),
        Err(error) => Err(error),
    }
}
