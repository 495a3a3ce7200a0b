//! A tap whose file descriptor we hold: `internal:NAME` gives the host, or a
//! namespace the netdev is moved to, a leg in the VLAN. One read or write a frame;
//! who needs more takes a veth pair.

use crate::frame::edit::HEADROOM;
use crate::frame::vnet::VNET_HEADER_LEN;
use crate::frame::{FrameBuffer, VnetHeader};
use crate::sys::packet::{Burst, CopyPool, Received};
use crate::sys::sandbox::Call;

use nix::errno::Errno;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// What moving its frames takes.
pub const CALLS: &[Call] = &[Call::any(libc::SYS_read), Call::any(libc::SYS_write)];

/// A tap, from the file descriptor's side.
#[derive(Debug)]
pub struct InternalPort(OwnedFd);

impl InternalPort {
    /// Wraps a tap's descriptor, non-blocking and with 10-byte virtio headers.
    pub fn new(queue: OwnedFd) -> Self {
        Self(queue)
    }

    pub(super) fn receive<'a>(
        &'a mut self,
        copies: &'a mut CopyPool,
        burst: &mut Burst<'a>,
    ) -> u64 {
        let mut lost = 0;
        for copy in copies.buffers() {
            let Some(place) = copy.get_mut(HEADROOM - VNET_HEADER_LEN..) else { break };
            let Ok(length) = nix::unistd::read(&self.0, place) else { break };
            match received(copy, length) {
                Some(frame) => burst.push(frame),
                None => lost += 1,
            }
            if burst.is_full() {
                break;
            }
        }
        lost
    }

    pub(super) fn send(&mut self, packets: &[&[u8]]) -> Result<usize, Errno> {
        for (position, packet) in packets.iter().enumerate() {
            if let Err(errno) = nix::unistd::write(&self.0, packet) {
                return if position == 0 { Err(errno) } else { Ok(position) };
            }
        }
        Ok(packets.len())
    }
}

impl AsFd for InternalPort {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A tap writes the frame's tag into the bytes (`tun_put_user`), so none is apart.
fn received(copy: &mut [u8], length: usize) -> Option<Received<'_>> {
    let packet = copy.get_mut(..HEADROOM - VNET_HEADER_LEN + length)?;
    let header = VnetHeader::from_bytes(packet.get(HEADROOM - VNET_HEADER_LEN..)?.first_chunk()?);
    Some(Received { buffer: FrameBuffer::new(packet, HEADROOM)?, stripped: None, header })
}
