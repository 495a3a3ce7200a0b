//! What the process may do: as little as its work takes.
//!
//! # Theory of operation
//!
//! It starts as root, or as a user with some capabilities ([`check`]). Before the first
//! thread it becomes another user, if it is told to ([`become_user`]), and keeps its
//! capabilities until it forwards: making the control socket's folder, probing in a
//! network namespace and recognising seals of an earlier run take more than the rest of
//! its life. Then [`confine`] gives up what is left over, in the control thread, and
//! with it in all that this thread starts from then on. The worker does the same at its
//! own start, and gives up more ([`confine_worker`]).
//!
//! A capability belongs to a thread, and so does a filter: nothing here changes a thread
//! that runs already.

mod confine;

pub use confine::{ConfineError, Confined, confine, confine_worker};

use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl::set_keepcaps;
use nix::unistd::{Gid, Uid, User, geteuid, getresuid, initgroups, setresgid, setresuid};
use std::ffi::CString;
use std::panic;
use thiserror::Error;

/// What changing ports, devices and seals takes while running.
const RUNNING: [Capability; 3] =
    [Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW, Capability::CAP_BPF];

/// Capabilities are missing from the effective set.
#[derive(Debug, Error)]
#[error(
    "missing {}: run vlanswitchd as root, or grant it with `setcap {}+ep PATH/TO/vlanswitchd`, \
     or under systemd with AmbientCapabilities=",
    .0.join(", "), .0.join(",").to_lowercase()
)]
pub struct MissingCapabilities(Vec<String>);

/// The process cannot become another user.
#[derive(Debug, Error)]
pub enum UserError {
    /// There is none of this name.
    #[error("--user {0}: no such user: create it with `useradd --system {0}`, or name another")]
    NoSuchUser(String),
    /// It may not.
    #[error("--user {0}: only root can become another user: start as root, or without --user")]
    NotPermitted(String),
    /// The system refused.
    #[error("--user {name}: cannot {action}: {reason}")]
    Refused {
        /// The user.
        name: String,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        reason: String,
    },
}

/// The capabilities that are missing for packet sockets (CAP_NET_RAW), devices
/// (CAP_NET_ADMIN) and BPF programs (CAP_BPF, before Linux 5.8 CAP_SYS_ADMIN).
pub fn missing() -> Vec<String> {
    let has = |capability| caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false);
    let mut missing: Vec<String> = [Capability::CAP_NET_RAW, Capability::CAP_NET_ADMIN]
        .into_iter()
        .filter(|capability| !has(*capability))
        .map(|capability| capability.to_string())
        .collect();
    if !has(Capability::CAP_BPF) && !has(Capability::CAP_SYS_ADMIN) {
        missing.push(Capability::CAP_BPF.to_string());
    }
    missing
}

/// Checks that none is missing.
///
/// # Errors
/// [`MissingCapabilities`] naming those that are.
pub fn check() -> Result<(), MissingCapabilities> {
    let missing = missing();
    if missing.is_empty() { Ok(()) } else { Err(MissingCapabilities(missing)) }
}

/// Becomes this user, with its groups, and keeps the capabilities. To be called before
/// there is a second thread: libc would have to change that one too.
///
/// # Errors
/// [`UserError`].
pub fn become_user(name: &str) -> Result<(), UserError> {
    let refused =
        |action, reason: String| UserError::Refused { name: name.to_owned(), action, reason };
    let user = match name.parse::<u32>() {
        Ok(number) => User::from_uid(Uid::from_raw(number)),
        Err(_) => User::from_name(name),
    };
    let user = user
        .map_err(|error| refused("look the user up", error.to_string()))?
        .ok_or_else(|| UserError::NoSuchUser(name.to_owned()))?;
    let now = getresuid().map_err(|error| refused("tell who we are", error.to_string()))?;
    if [now.real, now.effective, now.saved].iter().all(|one| *one == user.uid) {
        return Ok(());
    }
    if !geteuid().is_root() {
        return Err(UserError::NotPermitted(name.to_owned()));
    }
    let failed = |action| move |error: nix::Error| refused(action, error.to_string());
    let login = CString::new(user.name.clone()).unwrap_or_default();
    set_keepcaps(true).map_err(failed("keep capabilities"))?;
    initgroups(&login, user.gid).map_err(failed("take over its groups"))?;
    become_ids(user.uid, user.gid).map_err(failed("become the user"))?;
    set_keepcaps(false).map_err(failed("keep capabilities"))?;
    let kept = caps::read(None, CapSet::Permitted);
    kept.and_then(|kept| caps::set(None, CapSet::Effective, &kept))
        .map_err(|error| refused("keep capabilities", error.to_string()))
}

fn become_ids(user: Uid, group: Gid) -> nix::Result<()> {
    setresgid(group, group, group)?;
    setresuid(user, user, user)
}

/// Gives up all capabilities but these, for the calling thread and for what it starts.
fn keep_only(kept: &[Capability]) -> Result<(), caps::errors::CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let mut kept: CapsHashSet =
        kept.iter().copied().filter(|one| permitted.contains(one)).collect();
    if kept.contains(&Capability::CAP_NET_ADMIN) && !kept.contains(&Capability::CAP_BPF) {
        // Stands in for CAP_BPF, which may be younger than what started us.
        kept.extend(
            permitted.contains(&Capability::CAP_SYS_ADMIN).then_some(Capability::CAP_SYS_ADMIN),
        );
    }
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::read(None, CapSet::Bounding)?.difference(&kept) {
            caps::drop(None, CapSet::Bounding, *capability)?;
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::clear(None, CapSet::Inheritable)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)
}

/// Makes a panic in any thread the end of the process, with a line that says so: a
/// switch without its worker must not live on.
pub fn abort_on_panic() {
    panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        let text = panic.payload_as_str().unwrap_or("no message");
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        eprintln!(
            "vlanswitchd: error: a fault in vlanswitchd itself, in thread {name} at {place}: {text}; \
             it ends here, and VMs stay attached and sealed off: please report it"
        );
        std::process::abort();
    }));
}
