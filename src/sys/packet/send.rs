#![allow(unsafe_code, reason = "sendmmsg takes pointers to what it sends")]
//! Sending: `sendmmsg` of whole bursts on a second socket that is hooked to nothing
//! (protocol 0). The kernel has copied the bytes when the call returns.

use super::{BURST, PacketError, at, bind, set, socket};
use libc::c_int;
use nix::errno::Errno;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

/// Bytes a socket may have on its way.
const SEND_BUFFER: c_int = 64 << 20;

/// A packet socket that only sends.
#[derive(Debug)]
pub struct Transmitter(Arc<OwnedFd>);

impl Transmitter {
    /// Opens a sending socket on the device with this index.
    ///
    /// # Errors
    /// [`PacketError`] naming the step.
    pub fn open(index: u32) -> Result<Self, PacketError> {
        let socket = socket()?;
        let fd = socket.as_fd();
        set(fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1).map_err(at("send virtio headers"))?;
        set(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &SEND_BUFFER)
            .map_err(at("size the send buffer"))?;
        bind(fd, index, 0).map_err(at("bind to the device"))?;
        Ok(Self(Arc::new(socket)))
    }

    /// Another thread's way to the socket, which keeps nothing open.
    pub fn weak(&self) -> Weak<OwnedFd> {
        Arc::downgrade(&self.0)
    }
}

impl AsFd for Transmitter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The arrays `sendmmsg` reads.
pub struct SendSpace {
    messages: Box<[libc::mmsghdr; BURST]>,
    vectors: Box<[libc::iovec; BURST]>,
}

impl std::fmt::Debug for SendSpace {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("SendSpace").finish_non_exhaustive()
    }
}

// SAFETY: the pointers inside are read only through a `Loaded`, after `load` has
// set them to this value's own boxes and to packets that outlive the borrow.
unsafe impl Send for SendSpace {}

impl Default for SendSpace {
    fn default() -> Self {
        let empty = libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 };
        let vectors = Box::new([empty; BURST]);
        // SAFETY: all-zero is a valid `mmsghdr`: null pointers and zero lengths.
        let blank: libc::mmsghdr = unsafe { std::mem::zeroed() };
        Self { messages: Box::new([blank; BURST]), vectors }
    }
}

impl SendSpace {
    /// Points the arrays at these packets, of which at most [`BURST`] are taken.
    #[inline]
    pub fn load<'p>(&'p mut self, packets: &[&'p [u8]]) -> Loaded<'p> {
        let places = self.messages.iter_mut().zip(self.vectors.iter_mut());
        for ((message, vector), packet) in places.zip(packets) {
            vector.iov_base = packet.as_ptr().cast_mut().cast();
            vector.iov_len = packet.len();
            message.msg_hdr.msg_iov = vector;
            message.msg_hdr.msg_iovlen = 1;
        }
        let count = packets.len().min(BURST);
        Loaded { space: self, count, packets: PhantomData }
    }
}

/// A [`SendSpace`] pointed at packets.
#[derive(Debug)]
pub struct Loaded<'p> {
    space: &'p mut SendSpace,
    count: usize,
    packets: PhantomData<&'p [u8]>,
}

impl Loaded<'_> {
    /// Sends the packets from the `first` on; returns how many went out.
    ///
    /// # Errors
    /// The kernel's answer to packet `first`, if that one did not go out.
    #[inline]
    pub fn send_from(&mut self, transmitter: &Transmitter, first: usize) -> Result<usize, Errno> {
        let Some(messages) = self.space.messages.get_mut(first..self.count) else {
            return Ok(0);
        };
        // SAFETY: the messages point at vectors of the same space, and those at
        // packets borrowed for as long as `self`; the kernel only reads them.
        let sent = unsafe {
            libc::sendmmsg(
                transmitter.0.as_raw_fd(),
                messages.as_mut_ptr(),
                messages.len() as u32,
                libc::MSG_DONTWAIT,
            )
        };
        usize::try_from(sent).map_err(|_| Errno::last())
    }
}
