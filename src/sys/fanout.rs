//! PACKET_FANOUT: several packet sockets on one device, of which each frame reaches one
//! (`packet(7)`, `fanout_add` and `packet_rcv_fanout` in `net/packet/af_packet.c`).
//!
//! Sockets have numbers in the order in which they joined, and a program answers with a
//! number ([`Steering`]). When the device goes down the kernel takes the sockets out, and
//! when it comes up puts them in again in the order in which they were *opened*
//! (`packet_notifier`): so they must join in that order, or their numbers would change.
//!
//! A socket must be bound before it can join, and until all have joined frames would
//! reach two of them, or the wrong one. So sockets that are to form a group are opened
//! with a filter that refuses every frame ([`Filter::Nothing`]),
//! and get theirs when the group is complete ([`form`]).
//!
//! What the host sends must not come back as if received. `PACKET_IGNORE_OUTGOING` of a
//! member has no effect on a group; the group has a flag of its own for that since Linux
//! 6.2, and before, where the flag is not known and ignored, the socket filter refuses
//! outgoing frames.
//!
//! A group lives as long as one of its sockets. So another process that is given the sockets
//! has the group, asks whether it is one ([`check`]), and gives it a program of its own
//! ([`steer`]): from one frame to the next, so none meets none.
//!
//! [`Filter::Nothing`]: super::packet::Filter::Nothing

use super::bpf::{Steering, UplinkFilter};
use super::packet::{PacketError, at, attach_filter, bind, get, set, socket};
use libc::c_int;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

// include/uapi/linux/if_packet.h
const FANOUT_EBPF: u32 = 7;
const FLAG_IGNORE_OUTGOING: u32 = 0x4000;
const FLAG_UNIQUE_ID: u32 = 0x2000;

/// Makes a group of bound sockets that refuse every frame, numbered in this order, which
/// is the one they were opened in; then lets frames in.
///
/// # Errors
/// [`PacketError`] naming the step; the sockets are to be closed.
pub fn form<'s>(
    sockets: impl Iterator<Item = BorrowedFd<'s>> + Clone,
    steering: &Steering,
    filter: &UplinkFilter,
) -> Result<(), PacketError> {
    let mut group = None;
    for socket in sockets.clone() {
        let flags = FANOUT_EBPF | FLAG_IGNORE_OUTGOING;
        let request = group.map_or((flags | FLAG_UNIQUE_ID) << 16, |id| flags << 16 | id);
        set(socket, libc::SOL_PACKET, libc::PACKET_FANOUT, &request)
            .map_err(at("share the uplink between workers"))?;
        if group.is_none() {
            group = Some(read_back(socket)? & 0xffff);
            steer(socket, steering)?;
        }
    }
    for socket in sockets {
        attach_filter(socket, filter)?;
    }
    Ok(())
}

/// A group of one socket, to try whether the kernel knows the flag that spares a group what
/// the host sends. A kernel that does not takes it all the same.
#[derive(Debug)]
pub struct OwnFramesProbe(OwnedFd);

impl OwnFramesProbe {
    /// A group on the device with this index.
    ///
    /// # Errors
    /// [`PacketError`] naming the step.
    pub fn open(index: u32) -> Result<Self, PacketError> {
        let socket = socket()?;
        bind(socket.as_fd(), index, libc::ETH_P_ALL as u16).map_err(at("bind to the device"))?;
        let request = (FLAG_IGNORE_OUTGOING | FLAG_UNIQUE_ID) << 16;
        set(socket.as_fd(), libc::SOL_PACKET, libc::PACKET_FANOUT, &request)
            .map_err(at("form a group of packet sockets"))?;
        let probe = Self(socket);
        // What came before it was a group.
        probe.saw_any();
        Ok(probe)
    }

    /// Whether a frame has come since the last time this was asked.
    pub fn saw_any(&self) -> bool {
        let mut frame = [0; 64];
        let mut any = false;
        while recv(self.0.as_raw_fd(), &mut frame, MsgFlags::MSG_DONTWAIT).is_ok() {
            any = true;
        }
        any
    }
}

/// Checks that sockets are in one group that a program steers. In which order they joined
/// the kernel does not tell.
///
/// # Errors
/// [`PacketError`]: they are not.
pub fn check<'s>(mut sockets: impl Iterator<Item = BorrowedFd<'s>>) -> Result<(), PacketError> {
    let mut group = None;
    sockets.try_for_each(|socket| {
        let answer = read_back(socket)?;
        let steered = answer >> 16 & 0xff == FANOUT_EBPF;
        if steered && *group.get_or_insert(answer) == answer {
            return Ok(());
        }
        Err(at("take over the group of the uplink's sockets")(Errno::EINVAL))
    })
}

/// A socket's group: its number, and 16 bits further up its kind.
fn read_back(socket: BorrowedFd<'_>) -> Result<u32, PacketError> {
    let mut answer: c_int = 0;
    get(socket, libc::SOL_PACKET, libc::PACKET_FANOUT, &mut answer)
        .map_err(at("read back the group of the uplink's sockets"))?;
    Ok(answer.cast_unsigned())
}

/// Has the group of this socket steered by this program from the next frame on. In place of
/// another program that takes a grace period, in which the caller waits and frames do not.
///
/// # Errors
/// [`PacketError`]: the socket is in no group.
pub fn steer(socket: BorrowedFd<'_>, steering: &Steering) -> Result<(), PacketError> {
    let program: c_int = steering.fd().as_raw_fd();
    set(socket, libc::SOL_PACKET, libc::PACKET_FANOUT_DATA, &program)
        .map_err(at("steer frames to workers"))
}
