//! Private network namespaces, for the start-up probes: what the kernel can do is
//! tried on devices nobody else sees.
//!
//! A namespace lives as long as something refers to it: a thread, an open file, a
//! socket. The closure runs on a thread of its own that enters a namespace without
//! a name; when the thread ends and the sockets it opened are closed, the kernel
//! takes the namespace down with every device in it (`cleanup_net`,
//! net/core/net_namespace.c). Nothing is mounted, so nothing can be left behind,
//! not even by a crash.

use nix::sched::{CloneFlags, unshare};
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
