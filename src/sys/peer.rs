#![allow(unsafe_code, reason = "a socket option nix does not know")]
//! Who is at the other end of a unix socket (`SO_PEERCRED`, `SO_PEERGROUPS`;
//! `net/core/sock.c`). The kernel noted it when the connection was made.

use libc::{c_void, gid_t, socklen_t};
use nix::sys::socket::{getsockopt, sockopt};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};

/// The process that made a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its process id.
    pub pid: i32,
    /// Its effective user id.
    pub uid: u32,
    /// Its effective and supplementary group ids.
    pub gids: Vec<u32>,
}

impl Peer {
    /// The peer of a connected unix socket.
    ///
    /// # Errors
    /// The kernel's, for anything but a unix socket.
    pub fn of(socket: &(impl AsFd + AsRawFd)) -> io::Result<Self> {
        let credentials = getsockopt(socket, sockopt::PeerCredentials)?;
        let mut gids = supplementary_groups(socket.as_raw_fd())?;
        gids.push(credentials.gid());
        Ok(Self { pid: credentials.pid(), uid: credentials.uid(), gids })
    }
}

fn supplementary_groups(fd: i32) -> io::Result<Vec<gid_t>> {
    // NGROUPS_MAX (include/uapi/linux/limits.h): no process has more.
    const GROUPS_MAX: usize = 65536;
    let mut groups: Vec<gid_t> = vec![0; 32];
    loop {
        let mut length = (size_of::<gid_t>() * groups.len()) as socklen_t;
        // SAFETY: `groups` has `length` writable bytes, the kernel writes at most that
        // many and says in `length` how many it wrote or needs.
        let result = unsafe {
            libc::getsockopt(
                fd,
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast::<c_void>(),
                &raw mut length,
            )
        };
        if result == 0 {
            groups.truncate(length as usize / size_of::<gid_t>());
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || groups.len() >= GROUPS_MAX {
            return Err(error);
        }
        groups.resize(GROUPS_MAX, 0);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn our_own_end_is_ours() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let peer = Peer::of(&ours).unwrap();
        assert_eq!(peer.pid, std::process::id().cast_signed());
        assert_eq!(peer.uid, nix::unistd::geteuid().as_raw());
        assert!(peer.gids.contains(&nix::unistd::getegid().as_raw()));
        for group in nix::unistd::getgroups().unwrap() {
            assert!(peer.gids.contains(&group.as_raw()));
        }
    }
}
