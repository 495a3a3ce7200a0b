//! systemd's descriptor store (`FileDescriptorStoreMax=`, sd_notify(3) with `FDSTORE=1`):
//! what a process leaves there, the service manager gives to the next one.
//!
//! # Theory of operation
//!
//! A process that ends gives the manager every descriptor, each with a name of its own,
//! because the store keeps neither order nor duplicates: `vlanswitchd-N` is the Nth in the
//! order of [`State`](super::takeover::State), and `vlanswitchd-state` is a file in memory.
//! Sending sockets go there too, though the next process opens its own: the last to close one
//! waits 10-20 ms for the kernel, and frames would wait with it.
//!
//! The manager reads messages in its own time, and would not know whose they are from a
//! process that has ended. So it is waited for (`BARRIER=1`). It must not poll what it
//! keeps (`FDPOLL=0`): a packet socket has an error whenever its device goes down.
//!
//! All that while the process still forwards. Then its workers stop, what the next one has to
//! know is written into the file, and the file is sealed: one that is not was left by a
//! process that died on the way.
//!
//! What the next process cannot use it removes from the store before it starts cold:
//! the claim to the uplink is among it.

use crate::control::takeover::{Stored, TakeOver};
use crate::sys::hand_over;
use crate::sys::sandbox::Call;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::pipe2;
use sd_notify::NotifyState;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use tracing::warn;

/// What leaving descriptors takes, beside what any thread does and telling systemd.
pub const CALLS: &[Call] = &[
    Call::any(libc::SYS_memfd_create),
    Call::one_of(libc::SYS_fcntl, 1, &[libc::F_ADD_SEALS.cast_unsigned()]),
    // Waiting until systemd has read everything.
    Call::any(libc::SYS_pipe2),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_poll),
    Call::any(libc::SYS_ppoll),
    Call::any(libc::SYS_sendmsg),
];

/// How all our names begin.
const PREFIX: &str = "vlanswitchd-";
/// The file of what the next process has to know.
const STATE: &str = "vlanswitchd-state";
/// Sockets the next process has no use for, but to close them when there is time.
const LATE: &str = "vlanswitchd-late";
/// How long the service manager may take, in milliseconds.
const PATIENCE: u16 = 5000;
/// Descriptors in one message; the kernel takes 253 (`SCM_MAX_FD`).
const BATCH: usize = 200;
/// No honest file is longer, in bytes.
const LENGTH_MAX: u64 = 64 << 20;

/// A store that can be used at the end.
#[derive(Debug, Clone, Copy)]
pub struct Store {
    /// How many descriptors it takes, if it says so.
    room: Option<usize>,
}

impl Store {
    /// The store of the service manager that has started us, if it keeps one: it says so,
    /// or the operator does.
    pub fn of_environment(told: bool) -> Option<Self> {
        std::env::var_os("NOTIFY_SOCKET")?;
        let room = std::env::var("FDSTORE").ok().and_then(|text| text.parse().ok());
        (told || room.is_some_and(|room: usize| room > 0)).then_some(Self { room })
    }

    /// Checks that there is room for so many.
    ///
    /// # Errors
    /// There is not.
    pub fn check_room(self, needed: usize) -> io::Result<()> {
        match self.room {
            Some(room) if room < needed => Err(io::Error::other(format!(
                "it has room for {room} descriptors, and {needed} are needed: raise \
                 FileDescriptorStoreMax= in the unit"
            ))),
            _ => Ok(()),
        }
    }
}

/// What is being left there.
#[derive(Debug)]
pub struct Deposit {
    state: File,
    count: usize,
}

impl Deposit {
    /// Stores descriptors, in this order, those the next process only has to close, and the
    /// place of what is to be known. The store has them when this returns.
    ///
    /// # Errors
    /// The system's, or the service manager does not answer; nothing is left there.
    pub fn make(descriptors: &[BorrowedFd<'_>], late: &[impl AsFd]) -> io::Result<Self> {
        let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
        let state = File::from(memfd_create(STATE, flags)?);
        let deposit = Self { state, count: descriptors.len() };
        match deposit.put(descriptors, late) {
            Ok(()) => Ok(deposit),
            Err(error) => {
                deposit.withdraw();
                Err(error)
            }
        }
    }

    fn put(&self, descriptors: &[BorrowedFd<'_>], late: &[impl AsFd]) -> io::Result<()> {
        put(STATE, &[self.state.as_fd()])?;
        for (number, descriptor) in descriptors.iter().enumerate() {
            put(&name_of(number), &[*descriptor])?;
        }
        for batch in late.chunks(BATCH) {
            put(LATE, &batch.iter().map(AsFd::as_fd).collect::<Vec<_>>())?;
        }
        barrier()
    }

    /// Completes it with what is to be known. Leaves nothing there if that fails.
    ///
    /// # Errors
    /// The system's.
    pub fn complete(mut self, bytes: &[u8]) -> io::Result<()> {
        let result = self.finish(bytes);
        if result.is_err() {
            self.withdraw();
        }
        result
    }

    fn finish(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.state.write_all(bytes)?;
        fcntl(&self.state, FcntlArg::F_ADD_SEALS(all_seals()))?;
        Ok(())
    }

    fn withdraw(&self) {
        let names = (0..self.count).map(name_of).chain([STATE.to_owned(), LATE.to_owned()]);
        remove(names);
    }
}

/// What the process before has left, as this one was given it.
#[derive(Debug, Default)]
pub struct Legacy {
    descriptors: HashMap<String, OwnedFd>,
    /// The names in the store.
    names: BTreeSet<String>,
}

impl Legacy {
    /// Takes what the service manager has started us with. To be called before anything
    /// is opened.
    pub fn take() -> Self {
        match hand_over::inherited() {
            Ok(named) => {
                let names = named.iter().map(|(name, _)| name.clone()).collect();
                Self { descriptors: named.into_iter().collect(), names }
            }
            Err(error) => {
                warn!("the service manager's descriptors (LISTEN_FDS) cannot be taken: {error}");
                Self::default()
            }
        }
    }

    /// Whether there is anything.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// What there is to go on with for this uplink. Closes what does not belong to it.
    ///
    /// # Errors
    /// Why it cannot be used, for people.
    pub fn open(&mut self, uplink: &str) -> Result<TakeOver, String> {
        let mut descriptors = std::mem::take(&mut self.descriptors);
        let state = descriptors.remove(STATE);
        let state = state.ok_or_else(|| "nothing says what it is".to_owned())?;
        let stored = read(state)?;
        if stored.state.uplink != uplink {
            return Err(format!("it is of uplink {}", stored.state.uplink));
        }
        let numbered = (0..).map_while(|number| descriptors.remove(&name_of(number)));
        let numbered: Vec<OwnedFd> = numbered.collect();
        let expected = stored.state.descriptors();
        if numbered.len() != expected {
            return Err(format!(
                "of {expected} descriptors there are {}: raise FileDescriptorStoreMax= in the unit",
                numbered.len()
            ));
        }
        Ok(TakeOver::of_ended(stored, numbered))
    }

    /// Closes and removes all of it, and waits until that is done.
    pub fn discard(&mut self) {
        self.descriptors.clear();
        self.remove();
        if let Err(error) = barrier() {
            warn!("the service manager does not empty the descriptor store: {error}");
        }
    }

    /// Removes it from the store: it is ours now.
    pub fn remove(&mut self) {
        remove(std::mem::take(&mut self.names));
    }
}

fn name_of(number: usize) -> String {
    format!("{PREFIX}{number}")
}

fn all_seals() -> SealFlag {
    SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_SEAL
}

fn read(state: OwnedFd) -> Result<Stored, String> {
    let mut file = File::from(state);
    // Not a file in memory has no seals either.
    let seals =
        fcntl(&file, FcntlArg::F_GET_SEALS).map_or(SealFlag::empty(), SealFlag::from_bits_truncate);
    if !seals.contains(all_seals()) {
        return Err("the vlanswitchd before died while it left it".to_owned());
    }
    let mut bytes = Vec::new();
    let broken = |error: io::Error| format!("it cannot be read: {error}");
    // Whoever wrote it shares the place in it with us.
    file.seek(SeekFrom::Start(0)).map_err(broken)?;
    file.take(LENGTH_MAX).read_to_end(&mut bytes).map_err(broken)?;
    Stored::read(&bytes)
}

fn put(name: &str, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let message =
        [NotifyState::FdStore, NotifyState::FdName(name), NotifyState::Custom("FDPOLL=0")];
    sd_notify::notify_with_fds(&message, descriptors)
}

fn remove(names: impl IntoIterator<Item = String>) {
    for name in names {
        let message = [NotifyState::FdStoreRemove, NotifyState::FdName(&name)];
        if let Err(error) = sd_notify::notify(&message) {
            warn!("the service manager cannot be told to empty the descriptor store: {error}");
            return;
        }
    }
}

/// Waits until the service manager has read everything: it then closes its end of a pipe.
fn barrier() -> io::Result<()> {
    let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])?;
    drop(theirs);
    let mut waited_for = [PollFd::new(ours.as_fd(), PollFlags::empty())];
    match poll(&mut waited_for, PollTimeout::from(PATIENCE))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}
