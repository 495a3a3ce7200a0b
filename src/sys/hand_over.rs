#![allow(unsafe_code, reason = "descriptors from a message are ours from then on")]
//! Messages with file descriptors on a unix socket (`SCM_RIGHTS`, unix(7)): a length,
//! a count, the bytes, and then the descriptors in batches, each with one byte. And
//! descriptors that come from the service manager, with the process itself.

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

/// Descriptors in one batch; the kernel takes 253 (`SCM_MAX_FD`).
const BATCH: usize = 200;
/// No honest message is longer, in bytes.
const LENGTH_MAX: usize = 64 << 20;
/// No honest message has more descriptors.
const DESCRIPTORS_MAX: usize = 16384;

/// Sends bytes and descriptors.
///
/// # Errors
/// The socket's.
pub fn send(
    stream: &mut UnixStream,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    stream.write_all(&(bytes.len() as u32).to_le_bytes())?;
    stream.write_all(&(descriptors.len() as u32).to_le_bytes())?;
    stream.write_all(bytes)?;
    for batch in descriptors.chunks(BATCH) {
        let raw: Vec<RawFd> = batch.iter().map(AsRawFd::as_raw_fd).collect();
        let message = [ControlMessage::ScmRights(&raw)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(b"+")], &message, flags, None)?;
    }
    Ok(())
}

/// Receives what [`send`] sent.
///
/// # Errors
/// The socket's, the end of the stream, or a message that makes no sense.
pub fn receive(stream: &mut UnixStream) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
    let (length, count) = (number(stream)?, number(stream)?);
    if length > LENGTH_MAX || count > DESCRIPTORS_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "too long to be meant"));
    }
    let mut bytes = vec![0; length];
    stream.read_exact(&mut bytes)?;
    let mut descriptors = Vec::with_capacity(count);
    while descriptors.len() < count {
        let before = descriptors.len();
        receive_batch(stream, &mut descriptors)?;
        if descriptors.len() == before {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok((bytes, descriptors))
}

/// Descriptors the service manager has started this process with, and their names
/// (sd_listen_fds(3)). To be asked before anything is opened; a second time there are
/// none.
///
/// # Errors
/// What the environment says is not so.
pub fn inherited() -> io::Result<Vec<(String, OwnedFd)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let named = sd_notify::listen_fds_with_names()?;
    // SAFETY: LISTEN_PID says that the service manager has opened these numbers for this
    // process, `listen_fds` found each of them open, and nothing was opened before that
    // could have one of them; `TAKEN` makes sure that each is taken once.
    Ok(named.map(|(fd, name)| (name, unsafe { OwnedFd::from_raw_fd(fd) })).collect())
}

fn number(stream: &mut UnixStream) -> io::Result<usize> {
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes) as usize)
}

fn receive_batch(stream: &UnixStream, descriptors: &mut Vec<OwnedFd>) -> io::Result<()> {
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = cmsg_space!([RawFd; BATCH]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = control {
            // SAFETY: the kernel has just opened these descriptors for us, nobody else
            // knows their numbers, and each is taken once.
            descriptors.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
    use super::*;
    use std::fs::File;
    use std::os::fd::AsFd;

    #[test]
    fn bytes_and_descriptors_arrive_in_their_order() {
        let (mut here, mut there) = UnixStream::pair().unwrap();
        let pipes: Vec<_> = (0..450).map(|_| nix::unistd::pipe().unwrap()).collect();
        let ends: Vec<BorrowedFd<'_>> = pipes.iter().map(|(_, write)| write.as_fd()).collect();
        let sending = std::thread::scope(|scope| {
            let thread = scope.spawn(|| send(&mut here, &vec![7; 300_000], &ends));
            let (bytes, descriptors) = receive(&mut there).unwrap();
            assert!(bytes == vec![7; 300_000]);
            assert_eq!(descriptors.len(), 450);
            for (number, descriptor) in descriptors.into_iter().enumerate() {
                File::from(descriptor).write_all(&(number as u16).to_le_bytes()).unwrap();
            }
            thread.join().unwrap()
        });
        sending.unwrap();
        for (number, (read, _)) in pipes.into_iter().enumerate() {
            let mut bytes = [0; 2];
            File::from(read).read_exact(&mut bytes).unwrap();
            assert_eq!(usize::from(u16::from_le_bytes(bytes)), number);
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for bytes in [&[0xff; 8][..], &[1, 0, 0, 0], &[0, 0, 0, 0, 1, 0, 0, 0, b'+']] {
            let (mut here, mut there) = UnixStream::pair().unwrap();
            here.write_all(bytes).unwrap();
            drop(here);
            assert!(receive(&mut there).is_err(), "{bytes:?}");
        }
    }
}
