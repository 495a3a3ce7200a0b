//! Attaching a tc program by whichever method fits.
//!
//! [`clsact`] attaches in 0.1 ms and then costs each frame some 80 ns. [`tcx`] costs
//! a frame next to nothing, but the first attach at a hook waits for an RCU grace
//! period under the lock of all network configuration (`tcx_entry_sync`,
//! include/net/tcx.h): 12 to 20 ms, so seconds for a hundred ports. So [`attach_tc`]
//! takes clsact, and [`move_to_tcx`], called when there is time, port by port, moves
//! the program without a moment in which no program stands there. Replacing a
//! program takes tens of microseconds by either.
//!
//! A qdisc is one for all: whoever made it may remove it, and our filter with it, and
//! while ours is there nobody else can make one. So a program goes to TCX at once
//! where somebody else's qdisc is, and where somebody is about to make one
//! ([`attach_beside_qdiscs`]).

use super::clsact::{Detached, Qdisc};
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
    /// No program of this name was there by this method.
    New,
    /// The same, in a qdisc that somebody else made.
    Beside,
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
/// where the kernel has no cls_bpf, where TCX has a program of that name to replace,
/// where it has other programs, as they run before clsact and might let frames pass,
/// and where the qdisc is somebody else's, who may remove it. It stays until [`detach_tc`] or until the device goes.
///
/// # Errors
/// The kernel has neither method, or refused.
pub fn attach_tc(
    program: BorrowedFd<'_>,
    name: &str,
    device: u32,
    direction: Direction,
) -> Result<(Method, Attached), BpfError> {
    match tcx::programs(device, direction) {
        Ok(programs) if !programs.is_empty() => {
            return move_to_tcx(program, name, device, direction);
        }
        // Without CAP_SYS_ADMIN we may not see what is attached by TCX, and adding to it at
        // each start would pile programs up.
        Ok(_) | Err(BpfError::Unsupported { .. } | BpfError::Unidentified { .. }) => {}
        Err(error) => return Err(error),
    }
    match clsact::attach(program, name, device, direction) {
        Ok(Attached::Beside) => match move_to_tcx(program, name, device, direction) {
            Err(BpfError::Unsupported { .. } | BpfError::Unidentified { .. }) => {
                Ok((Method::Clsact, Attached::Beside))
            }
            result => result,
        },
        Ok(attached) => Ok((Method::Clsact, attached)),
        Err(BpfError::Unsupported { .. }) => move_to_tcx(program, name, device, direction),
        Err(error) => Err(error),
    }
}

/// As [`attach_tc`], but by TCX wherever it can be, so that somebody else can add a
/// qdisc to the device meanwhile. Takes as long as [`move_to_tcx`].
///
/// # Errors
/// As for [`attach_tc`].
pub fn attach_beside_qdiscs(
    program: BorrowedFd<'_>,
    name: &str,
    device: u32,
    direction: Direction,
) -> Result<(Method, Attached), BpfError> {
    match move_to_tcx(program, name, device, direction) {
        Err(BpfError::Unsupported { .. } | BpfError::Unidentified { .. }) => {
            attach_tc(program, name, device, direction)
        }
        result => result,
    }
}

/// Whether a program called `name` stands at interface `device`, whatever the method it
/// was attached by.
///
/// # Errors
/// There is no such interface.
pub fn is_attached_tc(name: &str, device: u32, direction: Direction) -> Result<bool, BpfError> {
    match tcx::programs(device, direction) {
        Ok(programs) if programs.iter().any(|program| program.name == name) => Ok(true),
        Ok(_) | Err(BpfError::Unsupported { .. } | BpfError::Unidentified { .. }) => {
            clsact::is_attached(name, device, direction)
        }
        Err(error) => Err(error),
    }
}

/// Attaches `program`, loaded as `name`, by TCX, first of all programs, and then takes
/// away the filter of that name that [`attach_tc`] attached by clsact, if any, and what
/// was made for it. Not for a device that frames are being sent to: see
/// [`move_to_tcx_leaving_qdisc`].
///
/// # Errors
/// [`BpfError::Unsupported`] before Linux 6.6, [`BpfError::Unidentified`] without
/// CAP_SYS_ADMIN: what clsact has stays.
pub fn move_to_tcx(
    program: BorrowedFd<'_>,
    name: &str,
    device: u32,
    direction: Direction,
) -> Result<(Method, Attached), BpfError> {
    let attached = tcx::attach(program, device, direction)?;
    clsact::detach(name, device, direction)?;
    Ok((Method::Tcx, attached))
}

/// As [`move_to_tcx`], without losing a frame that is sent to the device. Returns
/// whether a qdisc of ours is left, to be removed by
/// [`remove_empty_qdisc`](clsact::remove_empty_qdisc) when nothing is sent.
///
/// # Errors
/// As for [`move_to_tcx`].
pub fn move_to_tcx_leaving_qdisc(
    program: BorrowedFd<'_>,
    name: &str,
    device: u32,
    direction: Direction,
) -> Result<bool, BpfError> {
    tcx::attach(program, device, direction)?;
    let detached = clsact::detach_filter(name, device, direction, Qdisc::Leave)?;
    Ok(detached == Detached::AllButQdisc)
}

/// Detaches the program called `name` from interface `device`, whatever the method
/// it was attached by; false if it was not there.
///
/// # Errors
/// The kernel refused.
pub fn detach_tc(name: &str, device: u32, direction: Direction) -> Result<bool, BpfError> {
    let by_clsact = clsact::detach(name, device, direction)?;
    Ok(detach_by_tcx(name, device, direction)? || by_clsact)
}

/// The same, without losing a frame that is sent to the device. Returns whether a qdisc of
/// ours is left, to be removed by [`remove_empty_qdisc`](clsact::remove_empty_qdisc) when
/// nothing is sent.
///
/// # Errors
/// The kernel refused.
pub fn detach_tc_leaving_qdisc(
    name: &str,
    device: u32,
    direction: Direction,
) -> Result<bool, BpfError> {
    let detached = clsact::detach_filter(name, device, direction, Qdisc::Leave)?;
    detach_by_tcx(name, device, direction)?;
    Ok(detached == Detached::AllButQdisc)
}

fn detach_by_tcx(name: &str, device: u32, direction: Direction) -> Result<bool, BpfError> {
    match tcx::detach(name, device, direction) {
        Err(BpfError::Unsupported { .. } | BpfError::Unidentified { .. }) => Ok(false),
        result => result,
    }
}
