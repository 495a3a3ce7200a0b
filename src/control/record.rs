//! What a switch has changed on devices it found, written down for a time when it cannot
//! put it back itself.
//!
//! # Theory of operation
//!
//! A file in the control socket's folder says what the devices were like, from the start on
//! and within a second of each change. Who stops in order puts them back and removes the
//! file. If it is there at a start, the process before was killed, or has left everything
//! to a service manager that did not keep it: the devices are still sealed, so what they are
//! like now is not what to put back one day. That the file is there also says that counters
//! start again.
//!
//! Several switches may have one folder: by the default path of the control socket, which
//! only the first of them can bind, and in several network namespaces with one file system.
//! So a record is that of one uplink in one network namespace, by its name
//! (`/run/vlanswitchd/eth0-4026531840.found`) and by what stands in it. Only who holds the
//! claim to that uplink reads or writes it. The claim is a name in the same namespace, and its
//! process has it until it ends or hands over: nobody else who wrote the record still runs.
//!
//! Devices belong to it only as long as their seal is there, the host has not been started
//! anew (indexes begin again), and the namespace is the same one: the number in the file's name
//! is given again to a new namespace when one has gone, its cookie is not.

use crate::control::host::{FoundPort, FoundUplink};
use crate::sys::netns;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tempfile::Builder;
use tracing::warn;

/// Tells one start of the host from another (Documentation/admin-guide/sysctl/kernel.rst).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The network namespace of who looks; its inode is its number (namespaces(7)).
const NAMESPACE: &str = "/proc/self/ns/net";

/// What a record is of.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Subject {
    /// The start of the host.
    #[serde(default)]
    boot: String,
    /// The network namespace.
    #[serde(default)]
    namespace: u64,
    /// What no other namespace has had since the start of the host; None before Linux 5.14.
    #[serde(default)]
    cookie: Option<u64>,
    /// The uplink's name.
    #[serde(default)]
    of: String,
}

impl Subject {
    fn of(uplink: &str) -> io::Result<Self> {
        let boot = fs::read_to_string(BOOT_ID)?.trim().to_owned();
        let namespace = fs::metadata(NAMESPACE)?.ino();
        Ok(Self { boot, namespace, cookie: netns::cookie().ok(), of: uplink.to_owned() })
    }

    /// Whether it is the other, as far as both are known: an older version wrote no cookie.
    fn may_be(&self, other: &Self) -> bool {
        Self { cookie: self.cookie.or(other.cookie), ..self.clone() } == *other
    }
}

/// What devices were like.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Found {
    #[serde(flatten)]
    subject: Subject,
    /// The process that wrote it.
    #[serde(default)]
    pub pid: u32,
    /// The uplink.
    #[serde(default)]
    pub uplink: Option<FoundUplink>,
    /// The ports that were not created.
    #[serde(default)]
    pub ports: Vec<FoundPort>,
    /// Its process stopped in order, and the kernel path goes on.
    #[serde(default)]
    pub goes_on: bool,
}

/// The file.
#[derive(Debug, Default)]
pub struct Record {
    /// None without a control socket.
    path: Option<PathBuf>,
    subject: Subject,
    /// What was written last.
    written: String,
    /// It cannot be written, which was said.
    failed: bool,
}

impl Record {
    /// The record of an uplink whose claim this process holds, in the folder of the control
    /// socket. To be called before files are out of reach.
    pub fn beside(control: Option<&Path>, uplink: &str) -> Self {
        let Some(control) = control else { return Self::default() };
        match Subject::of(uplink) {
            Ok(subject) => {
                let name = format!("{uplink}-{}.found", subject.namespace);
                Self { path: Some(control.with_file_name(name)), subject, ..Self::default() }
            }
            Err(error) => {
                warn!(
                    "/proc: {error}: what devices are like is not kept for a start after a crash"
                );
                Self::default()
            }
        }
    }

    /// What a process has left that did not stop in order.
    pub fn read(&self) -> Option<Found> {
        let path = self.path.as_deref()?;
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                warn!(
                    "{}: {error}: devices stay as the vlanswitchd before left them",
                    path.display()
                );
                return None;
            }
        };
        match serde_json::from_slice::<Found>(&text) {
            Ok(found) => found.subject.may_be(&self.subject).then_some(found),
            Err(error) => {
                warn!(
                    "{}: {error}: devices stay as the vlanswitchd before left them",
                    path.display()
                );
                Some(Found::default())
            }
        }
    }

    /// Writes it, if it is not what was written last: whole or not at all. `goes_on` if the
    /// process stops now and the kernel path does not.
    pub fn write(&mut self, uplink: Option<&FoundUplink>, ports: Vec<FoundPort>, goes_on: bool) {
        let Some(path) = &self.path else { return };
        let (subject, pid) = (self.subject.clone(), std::process::id());
        let found = Found { subject, pid, uplink: uplink.cloned(), ports, goes_on };
        let Ok(text) = serde_json::to_string(&found) else { return };
        if text == self.written {
            return;
        }
        match replace(path, text.as_bytes()) {
            Ok(()) => {
                self.written = text;
                self.failed = false;
            }
            Err(error) if !self.failed => {
                warn!(
                    "{}: {error}: if vlanswitchd is killed, devices it found cannot be put back",
                    path.display()
                );
                self.failed = true;
            }
            Err(_) => {}
        }
    }

    /// Removes it: all is put back.
    pub fn remove(&self) {
        if let Some(path) = &self.path
            && let Err(error) = fs::remove_file(path)
            && error.kind() != io::ErrorKind::NotFound
        {
            warn!("{}: {error}", path.display());
        }
    }
}

fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    let mut file = Builder::new().tempfile_in(folder.unwrap_or(Path::new(".")))?;
    file.write_all(text)?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}
