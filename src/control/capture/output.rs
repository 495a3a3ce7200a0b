//! Writing to a reader that may be slow, stuck or gone, and knowing which.
//!
//! The descriptor is set non-blocking and waited for in short steps, so that a
//! session whose reader has stopped can still be told to end. What a reader says by
//! closing: both directions (or a pipe) means gone; only its sending direction
//! (`shutdown`) asks for the end, and it will read what is left to say.

use crate::sys::sandbox::Call;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What writing for a slow reader takes.
pub const CALLS: &[Call] = &[
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_poll),
    Call::any(libc::SYS_ppoll),
    Call::any(libc::SYS_recvfrom),
    Call::one_of(
        libc::SYS_fcntl,
        1,
        &[libc::F_GETFL.cast_unsigned(), libc::F_SETFL.cast_unsigned()],
    ),
];

/// How long one wait for the reader lasts, in milliseconds.
const STEP_MS: u8 = 100;
/// How long a reader that does not read may delay the end.
const PATIENCE: Duration = Duration::from_secs(1);

/// What the other end of the output does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reader {
    /// Reads, or will.
    There,
    /// Asks for the end.
    Done,
    /// Reads no more.
    Gone,
}

/// A non-blocking descriptor as a [`Write`] that waits, but not for ever.
#[derive(Debug)]
pub struct Output<W> {
    writer: W,
    stop: Arc<AtomicBool>,
    give_up: Option<Instant>,
}

impl<W: Write + AsFd> Output<W> {
    /// Takes the writer; `stop` makes it give up on a reader that is stuck.
    ///
    /// # Errors
    /// The kernel's, if the descriptor cannot be made non-blocking.
    pub fn new(writer: W, stop: Arc<AtomicBool>) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(&writer, FcntlArg::F_GETFL)?);
        fcntl(&writer, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self { writer, stop, give_up: None })
    }

    /// What the reader does, as far as one can tell without writing.
    pub fn reader(&self) -> Reader {
        let Ok(seen) = self.wait(PollFlags::POLLIN, PollTimeout::ZERO) else {
            return Reader::Gone;
        };
        if seen.intersects(PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL) {
            return Reader::Gone;
        }
        let peek = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        let at_end = || recv(self.writer.as_fd().as_raw_fd(), &mut [0], peek) == Ok(0);
        if seen.contains(PollFlags::POLLIN) && at_end() { Reader::Done } else { Reader::There }
    }

    fn wait(&self, events: PollFlags, timeout: PollTimeout) -> io::Result<PollFlags> {
        let mut fds = [PollFd::new(self.writer.as_fd(), events)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(fds.first().and_then(PollFd::revents).unwrap_or(PollFlags::empty()))
    }

    /// Fails when told to stop and the reader has had its time.
    fn check_patience(&mut self) -> io::Result<()> {
        if !self.stop.load(Ordering::Relaxed) {
            return Ok(());
        }
        let now = Instant::now();
        if now >= *self.give_up.get_or_insert(now + PATIENCE) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }
}

impl<W: Write + AsFd> Write for Output<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.writer.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.check_patience()?;
                    self.wait(PollFlags::POLLOUT, PollTimeout::from(STEP_MS))?;
                }
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        loop {
            match self.writer.flush() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.check_patience()?;
                    self.wait(PollFlags::POLLOUT, PollTimeout::from(STEP_MS))?;
                }
                result => return result,
            }
        }
    }
}
