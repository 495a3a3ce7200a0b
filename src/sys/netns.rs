//! Network namespaces: private ones for the start-up probes, where what the kernel can do
//! is tried on devices nobody else sees, and what tells one from all others.
//!
//! A namespace lives as long as something refers to it: a thread, an open file, a
//! socket. The closure runs on a thread of its own that enters a namespace without
//! a name; when the thread ends and the sockets it opened are closed, the kernel
//! takes the namespace down with every device in it (`cleanup_net`,
//! net/core/net_namespace.c). Nothing is mounted, so nothing can be left behind,
//! not even by a crash.

use super::packet;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::os::fd::AsFd;
use std::{io, panic, thread};

/// Why there is no private namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// A capability is missing.
    #[error(
        "not permitted to make a network namespace for the start-up probes: needs CAP_SYS_ADMIN"
    )]
    NotPermitted,
    /// The kernel has none to give: CONFIG_NET_NS, or user.max_net_namespaces.
    #[error("cannot make a network namespace for the start-up probes: {0}")]
    Refused(#[source] nix::Error),
    /// No thread to run it on.
    #[error("cannot start a thread for the start-up probes: {0}")]
    Thread(#[source] io::Error),
}

/// A number of the caller's network namespace that no other has or had since the start of
/// the host (`SO_NETNS_COOKIE`, net/core/sock.c), where its inode is used again.
///
/// # Errors
/// `ENOPROTOOPT` before Linux 5.14.
pub fn cookie() -> Result<u64, Errno> {
    let any = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut cookie = 0u64;
    packet::get(any.as_fd(), libc::SOL_SOCKET, libc::SO_NETNS_COOKIE, &mut cookie)?;
    Ok(cookie)
}

/// Runs `f` in a new network namespace that holds nothing but a loopback device,
/// which is down. Sockets that `f` returns keep the namespace alive.
///
/// # Errors
/// [`NetnsError::NotPermitted`] without CAP_SYS_ADMIN. A panic of `f` goes on in
/// the caller.
pub fn in_private_namespace<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
    thread::scope(|scope| {
        let body = || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|error| match error {
                nix::Error::EPERM => NetnsError::NotPermitted,
                other => NetnsError::Refused(other),
            })?;
            Ok(f())
        };
        let thread = thread::Builder::new()
            .name("private-netns".to_owned())
            .spawn_scoped(scope, body)
            .map_err(NetnsError::Thread)?;
        thread.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
    })
}
