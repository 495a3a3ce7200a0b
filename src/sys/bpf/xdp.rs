//! Attaching XDP programs, for benches and tests: a far end that drops or counts
//! without a stack in the way.

#![allow(unsafe_code, reason = "bpf(2) takes addresses")]

use super::syscall::{BpfError, LINK_CREATE, LinkCreate, bpf_open};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// Where an XDP program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XdpMode {
    /// In the driver, before a socket buffer is made.
    Native,
    /// In the stack: works with every driver.
    Generic,
}

/// BPF_XDP of `enum bpf_attach_type`.
const ATTACH_XDP: u32 = 37;

/// Attaches `program` to interface `device` until the returned link is closed.
///
/// # Errors
/// EBUSY if an XDP program is there already; EOPNOTSUPP if the driver has no native
/// mode; EINVAL before Linux 5.9, which has no XDP links.
pub fn attach_xdp(
    program: BorrowedFd<'_>,
    device: u32,
    mode: XdpMode,
) -> Result<OwnedFd, BpfError> {
    // XDP_FLAGS_*, include/uapi/linux/if_link.h.
    let flags = match mode {
        XdpMode::Generic => 1 << 1,
        XdpMode::Native => 1 << 2,
    };
    let mut attributes = LinkCreate {
        prog_fd: program.as_raw_fd() as u32,
        target_ifindex: device,
        attach_type: ATTACH_XDP,
        flags,
    };
    // SAFETY: the attributes hold no address, and the command opens an fd.
    unsafe { bpf_open(&LINK_CREATE, &mut attributes) }
        .map_err(|error| BpfError::from_io(format!("attach XDP to interface {device}"), error))
}
