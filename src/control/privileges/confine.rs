//! The two sandboxes: who may make which system calls, and use which files.
//!
//! The lists of calls stand beside the code that makes them; here they are only put
//! together. The worker moves frames between descriptors it is given: it opens
//! nothing. The control thread, and those it starts (captures, the doctor, opening
//! many sockets at once), also open devices, read and write the configuration file,
//! and serve callers.

use super::{RUNNING, keep_only};
use crate::control::accounts;
use crate::control::capture;
use crate::control::config::{Config, Datapath, Metrics, SandboxMode, persist};
use crate::control::{links, server, store};
use crate::dataplane::kernel;
use crate::port::INTERNAL_CALLS;
use crate::sys::sandbox::{
    Call, Extent, Filter, RUNTIME, Restricted, SandboxError, THREADS, Use, Verdict, restrict_files,
};
use crate::sys::{bpf, ethtool, packet, reception, tap};
use std::path::{Path, PathBuf};
use thiserror::Error;
use tracing::{info, warn};

/// What the control loop takes beside what it uses.
const LOOP: &[Call] = &[
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_epoll_wait),
    Call::any(libc::SYS_epoll_pwait),
    Call::any(libc::SYS_epoll_ctl),
    // Signals come by a descriptor; the worker is woken by another.
    Call::any(libc::SYS_read),
    // systemd is told by a datagram, with descriptors if need be.
    Call::any(libc::SYS_sendmsg),
    // The limit of open files, of this process only.
    Call::on_ourselves(libc::SYS_prlimit64, 0),
    Call::one_of(libc::SYS_prlimit64, 0, &[0]),
    // Whether a capability is there, for messages.
    Call::any(libc::SYS_capget),
    Call::any(libc::SYS_geteuid),
];

/// A thread that cannot be confined.
#[derive(Debug, Error)]
pub enum ConfineError {
    /// System calls or files.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// Capabilities.
    #[error("cannot give up capabilities: {0}")]
    Capabilities(#[from] caps::errors::CapsError),
}

/// The control thread is confined for as long as it lives; this keeps what that takes.
#[derive(Debug)]
pub struct Confined {
    _files: Option<Restricted>,
}

/// System calls of the worker.
pub fn worker_calls() -> impl Iterator<Item = Call> {
    [RUNTIME, crate::dataplane::CALLS, packet::MOVING_CALLS, INTERNAL_CALLS]
        .into_iter()
        .flatten()
        .copied()
}

/// System calls of the control thread and its helpers.
pub fn control_calls(kernel_path: bool) -> impl Iterator<Item = Call> {
    let lists = [
        if kernel_path { bpf::PATH_CALLS } else { &[] },
        if kernel_path { kernel::CALLS } else { &[] },
        if kernel_path { reception::CALLS } else { &[] },
        RUNTIME,
        THREADS,
        LOOP,
        packet::MOVING_CALLS,
        packet::OPENING_CALLS,
        tap::CALLS,
        ethtool::CALLS,
        bpf::CALLS,
        links::CALLS,
        server::CALLS,
        capture::CALLS,
        persist::CALLS,
        store::CALLS,
    ];
    lists.into_iter().flatten().copied()
}

fn filter(
    mode: SandboxMode,
    calls: impl Iterator<Item = Call>,
) -> Result<Option<Filter>, SandboxError> {
    match mode {
        SandboxMode::Off => Ok(None),
        SandboxMode::On => Filter::new(calls, Verdict::Kill).map(Some),
        SandboxMode::Log => Filter::new(calls, Verdict::Log).map(Some),
    }
}

/// Confines the calling thread, the worker: no capability, no file, and the system
/// calls that move frames.
///
/// # Errors
/// [`ConfineError`].
pub fn confine_worker(mode: SandboxMode) -> Result<(), ConfineError> {
    let filter = filter(mode, worker_calls())?;
    keep_only(&[])?;
    if mode == SandboxMode::On {
        restrict_files(&[])?;
    }
    if let Some(filter) = filter {
        filter.install()?;
    }
    Ok(())
}

/// Confines the calling thread, the control thread of a switch that forwards; it keeps the
/// kernel path's `pins`.
///
/// # Errors
/// [`ConfineError`].
pub fn confine(config: &Config, pins: Option<&Path>) -> Result<Confined, ConfineError> {
    let kernel_path = config.datapath != Datapath::Packet;
    let filter = filter(config.sandbox, control_calls(kernel_path))?;
    keep_only(&RUNNING)?;
    let Some(filter) = filter else {
        warn!("--sandbox off: system calls and files are not restricted");
        return Ok(Confined { _files: None });
    };
    warn_of_what_is_lost(config);
    accounts::confine();
    let files = if config.sandbox == SandboxMode::On {
        let mut places = places(config);
        places.extend(pins.map(|pins| (pins.to_owned(), Use::Replace)));
        let rules: Vec<(&Path, Use)> =
            places.iter().map(|(path, usage)| (path.as_path(), *usage)).collect();
        let files = restrict_files(&rules)?;
        match files.extent {
            Extent::Full => {}
            Extent::Part => info!("this kernel's Landlock is older: files are restricted in part"),
            Extent::Nothing => info!("this kernel has no Landlock: files are not restricted"),
        }
        Some(files)
    } else {
        None
    };
    filter.install()?;
    Ok(Confined { _files: files })
}

/// Says what the start could do and the running switch cannot, as this user.
fn warn_of_what_is_lost(config: &Config) {
    if let Err(error) = tap::check_driver() {
        warn!("taps cannot be created while the switch runs: {error}");
    }
    if let Some(file) = &config.file
        && let Err(error) = std::fs::File::open(file)
    {
        warn!(
            "{}: {error}: it cannot be read again while the switch runs: let the user              vlanswitchd runs as read it",
            file.display()
        );
    }
}

/// The files a running switch uses.
fn places(config: &Config) -> Vec<(PathBuf, Use)> {
    let mut places: Vec<(PathBuf, Use)> = [
        // Names of users and groups. Both files are replaced when they change, and a rule
        // for a file would stay with the old one.
        ("/etc", Use::Read),
        // Settings of taps, the number of CPUs.
        ("/sys", Use::Read),
        // IPv6 on and off.
        ("/proc/sys/net", Use::Write),
        ("/dev/net/tun", Use::Device),
    ]
    .map(|(path, usage)| (PathBuf::from(path), usage))
    .into();
    if let Some(file) = &config.file {
        // A link may lead elsewhere, and both ends are read again.
        let target = file.canonicalize().unwrap_or_else(|_| file.clone());
        places.extend(folder_of(&target).map(|folder| (folder, Use::Replace)));
        places.extend(folder_of(file).map(|folder| (folder, Use::Read)));
    }
    let metrics = match &config.metrics {
        Metrics::Unix(path) => Some(path.as_path()),
        Metrics::Off | Metrics::Tcp(_) => None,
    };
    // The socket is removed at the end; beside it stands the record of devices found.
    places.extend(config.control.path().and_then(folder_of).map(|folder| (folder, Use::Replace)));
    places.extend(metrics.and_then(folder_of).map(|folder| (folder, Use::Remove)));
    places
}

fn folder_of(path: &Path) -> Option<PathBuf> {
    let folder = path.parent()?;
    Some(if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder.to_owned() })
}
