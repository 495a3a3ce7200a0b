//! The kernel interfaces that need `unsafe`.
//!
//! - The guest's side of a tap or macvtap, as QEMU opens it: virtio header, offloads on, no limit
//!   on what may be in flight. The product's own tap code is not used: an independent stand-in.
//! - Sending one frame many times in a call.

#![allow(
    unsafe_code,
    reason = "nix wraps no tun ioctl, and its sendmmsg reads uninitialised addresses when asked how much was sent"
)]

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;

/// Length of the virtio header before each frame: what QEMU sets for every modern guest.
pub const HEADER_LENGTH: usize = 12;

const OFFLOADS: libc::c_uint =
    libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;

/// Opens the tap `name` of the calling thread's network namespace; makes it if there is none.
/// Its guest takes offloads or does not.
pub fn open_tap(name: &str, offloads: bool) -> Result<File> {
    prepare(Path::new("/dev/net/tun"), name, if offloads { OFFLOADS } else { 0 })
}

/// Opens a macvtap by its character device. The name is ignored by the kernel there.
pub fn open_macvtap(node: &Path) -> Result<File> {
    prepare(node, "", OFFLOADS)
}

fn prepare(node: &Path, name: &str, offloads: libc::c_uint) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(node)
        .with_context(|| format!("cannot open {}", node.display()))?;
    if name.len() >= libc::IFNAMSIZ {
        bail!("device name {name} is too long");
    }
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short,
        },
    };
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte as libc::c_char;
    }
    let fd = file.as_raw_fd();
    // SAFETY: fd is open; TUNSETIFF reads and writes one ifreq, which outlives the call.
    let result = unsafe { libc::ioctl(fd, libc::TUNSETIFF, &raw mut request) };
    check(result, "TUNSETIFF")?;
    let header_length = HEADER_LENGTH as libc::c_int;
    // SAFETY: fd is open; TUNSETVNETHDRSZ reads one int, which outlives the call.
    let result = unsafe { libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const header_length) };
    check(result, "TUNSETVNETHDRSZ")?;
    // SAFETY: fd is open; TUNSETOFFLOAD takes its flags by value and no pointer.
    let result = unsafe { libc::ioctl(fd, libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) };
    check(result, "TUNSETOFFLOAD")?;
    let in_flight = libc::c_int::MAX;
    // SAFETY: fd is open; TUNSETSNDBUF reads one int, which outlives the call.
    let result = unsafe { libc::ioctl(fd, libc::TUNSETSNDBUF, &raw const in_flight) };
    check(result, "TUNSETSNDBUF")?;
    Ok(file)
}

fn check(result: libc::c_int, what: &str) -> Result<()> {
    if result < 0 {
        return Err(std::io::Error::last_os_error()).with_context(|| format!("{what} failed"));
    }
    Ok(())
}

/// One frame, ready to be sent several times by one system call.
pub struct Burst {
    headers: Vec<libc::mmsghdr>,
    // Pointed to by the headers: boxed, so that they stay where they are.
    _slice: Box<libc::iovec>,
    _frame: Box<[u8]>,
}

impl Burst {
    /// Room for `most` copies of `frame`.
    pub fn new(frame: Vec<u8>, most: usize) -> Self {
        let mut frame = frame.into_boxed_slice();
        let mut slice =
            Box::new(libc::iovec { iov_base: frame.as_mut_ptr().cast(), iov_len: frame.len() });
        // SAFETY: mmsghdr is plain data of the kernel's; all zeros is a message without parts.
        let mut header: libc::mmsghdr = unsafe { std::mem::zeroed() };
        header.msg_hdr.msg_iov = &raw mut *slice;
        header.msg_hdr.msg_iovlen = 1;
        Self { headers: vec![header; most], _slice: slice, _frame: frame }
    }

    /// Sends up to `frames` copies without waiting; how many were taken.
    pub fn send(&mut self, socket: impl AsFd, frames: usize) -> nix::Result<usize> {
        let frames = frames.min(self.headers.len());
        // SAFETY: the first `frames` headers are initialised, and what they point to is owned by
        // self, only read by the kernel, and outlives the call.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_fd().as_raw_fd(),
                self.headers.as_mut_ptr(),
                frames as libc::c_uint,
                libc::MSG_DONTWAIT,
            )
        };
        Errno::result(sent).map(|sent| sent as usize)
    }
}
