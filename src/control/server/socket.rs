//! The listening sockets: where they are, and who gets in.
//!
//! The control socket never lets in more than mode 0660 says (the mode of a unix
//! socket's inode is taken over by `bind`, less the umask: `unix_bind_bsd` in
//! `net/unix/af_unix.c`; what the umask took is given back after that), and belongs to the group `vlanswitchd` where there is one. What the mode becomes
//! after that is the operator's choice.

use super::client::{Connection, Protocol};
use crate::control::accounts::{self, Kind};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, chown};
use std::collections::HashMap;
use std::fmt;
use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The group whose members may change things, if the host has it.
const GROUP: &str = "vlanswitchd";
const BACKLOG: i32 = 64;

/// A socket cannot be listened on.
#[derive(Debug, Error)]
pub enum SocketError {
    /// Another process listens there.
    #[error(
        "--{option} {path}: another vlanswitchd listens there: give each one a path of its own \
         with --{option} PATH"
    )]
    Taken {
        /// The option that names the socket.
        option: &'static str,
        /// The path.
        path: String,
    },
    /// Something else is in the way.
    #[error("--{option} {place}: {reason}: choose another, or --{option} none")]
    Unusable {
        /// The option that names the socket.
        option: &'static str,
        /// The path or address.
        place: String,
        /// What the system said.
        reason: io::Error,
    },
}

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    protocol: Protocol,
    /// The socket's file and its inode.
    file: Option<(PathBuf, u64)>,
    /// The file is to be removed with it.
    owned: bool,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// Listens on the control socket.
///
/// # Errors
/// [`SocketError`].
pub fn bind_control(
    path: &Path,
    inherited: &mut HashMap<String, OwnedFd>,
) -> Result<Listener, SocketError> {
    bind_unix(inherited, "control", path, 0o660, |gid| Protocol::Varlink { gid })
}

/// Listens for readers of metrics on a unix socket.
///
/// # Errors
/// [`SocketError`].
pub fn bind_metrics_unix(
    path: &Path,
    inherited: &mut HashMap<String, OwnedFd>,
) -> Result<Listener, SocketError> {
    bind_unix(inherited, "metrics", path, 0o666, |_| Protocol::Http)
}

/// Listens for readers of metrics on a TCP port.
///
/// # Errors
/// [`SocketError`].
pub fn bind_metrics_tcp(
    address: SocketAddr,
    inherited: &mut HashMap<String, OwnedFd>,
) -> Result<Listener, SocketError> {
    let unusable =
        |reason| SocketError::Unusable { option: "metrics", place: address.to_string(), reason };
    let socket = match inherited.remove(&place("metrics", &address)) {
        Some(socket) => TcpListener::from(socket),
        None => TcpListener::bind(address).map_err(unusable)?,
    };
    socket.set_nonblocking(true).map_err(unusable)?;
    Ok(Listener { socket: Socket::Tcp(socket), protocol: Protocol::Http, file: None, owned: false })
}

fn bind_unix(
    inherited: &mut HashMap<String, OwnedFd>,
    option: &'static str,
    path: &Path,
    mode: u32,
    protocol: impl FnOnce(u32) -> Protocol,
) -> Result<Listener, SocketError> {
    let unusable =
        |reason| SocketError::Unusable { option, place: path.display().to_string(), reason };
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        fs::create_dir_all(folder).map_err(unusable)?;
    }
    let inherited = inherited.remove(&place(option, &path.display()));
    // Without its file, which systemd removes with the folder of a service that stops, nobody
    // finds it any more.
    let (socket, owned) = match inherited.filter(|_| path.exists()) {
        // The other process's file until it has ended: it may go on.
        Some(socket) => (UnixListener::from(socket), false),
        None => (bind_anew(option, path, mode)?, true),
    };
    let metadata = fs::metadata(path).map_err(unusable)?;
    let protocol = protocol(Gid::from_raw(metadata.gid()).as_raw());
    let file = Some((path.to_owned(), metadata.ino()));
    Ok(Listener { socket: Socket::Unix(socket), protocol, file, owned })
}

/// The name of a listening socket between two processes.
fn place(option: &str, address: &impl fmt::Display) -> String {
    format!("{option} {address}")
}

fn bind_anew(option: &'static str, path: &Path, mode: u32) -> Result<UnixListener, SocketError> {
    let unusable =
        |reason| SocketError::Unusable { option, place: path.display().to_string(), reason };
    let socket = match listen_at(path, mode) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            // Anything but a socket stays, and is in the way.
            let metadata = fs::symlink_metadata(path).map_err(unusable)?;
            if metadata.mode() & libc::S_IFMT != libc::S_IFSOCK {
                return Err(unusable(io::Error::other("a file that is no socket is there")));
            }
            match knock(path) {
                // EAGAIN: somebody listens and is behind, or hangs.
                Ok(()) | Err(Errno::EAGAIN) => {
                    return Err(SocketError::Taken { option, path: path.display().to_string() });
                }
                // Left behind by one that died.
                Err(Errno::ECONNREFUSED) => fs::remove_file(path).map_err(unusable)?,
                Err(Errno::ENOENT) => {}
                // Not a stream socket.
                Err(Errno::EPROTOTYPE) => {
                    return Err(unusable(io::Error::other("another program's socket is there")));
                }
                Err(errno) => return Err(unusable(errno.into())),
            }
            listen_at(path, mode).map_err(unusable)?
        }
        result => result.map_err(unusable)?,
    };
    // Where there is no such group it is root's, not that of --user: others may be in
    // that. Without the right to give it away it stays ours.
    let group = Gid::from_raw(accounts::id(Kind::Group, GROUP).unwrap_or(0));
    let _ = chown(path, None, Some(group));
    Ok(socket)
}

/// Connects, without waiting for whoever listens (`unix_stream_connect` and
/// `unix_find_bsd` in `net/unix/af_unix.c`).
fn knock(path: &Path) -> nix::Result<()> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    connect(fd.as_raw_fd(), &UnixAddr::new(path)?)
}

fn listen_at(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    fchmod(&fd, Mode::from_bits_truncate(mode))?;
    bind(fd.as_raw_fd(), &UnixAddr::new(path)?)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    listen(&fd, Backlog::new(BACKLOG)?)?;
    Ok(fd.into())
}

impl Listener {
    /// Its name between two processes.
    pub fn place(&self) -> String {
        let option = match self.protocol {
            Protocol::Varlink { .. } => "control",
            Protocol::Http => "metrics",
        };
        place(option, self)
    }

    /// Says whether its file goes with it when it is closed, or is another process's.
    pub fn own_file(&mut self, owned: bool) {
        self.owned = owned;
    }

    /// The next connection; `None` if nobody waits.
    ///
    /// # Errors
    /// The system's, such as having no descriptors left; `ConnectionAborted` and
    /// `Interrupted` say nothing about the next.
    pub fn accept(&self) -> io::Result<Option<(Connection, Protocol)>> {
        let accepted = match &self.socket {
            Socket::Unix(socket) => socket.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(Connection::Unix(stream))
            }),
            Socket::Tcp(socket) => socket.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(Connection::Tcp(stream))
            }),
        };
        match accepted {
            Ok(connection) => Ok(Some((connection, self.protocol_now()))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Listener {
    /// The socket's group is what the operator has made it by now (`chgrp`).
    fn protocol_now(&self) -> Protocol {
        match (self.protocol, &self.file) {
            (Protocol::Varlink { gid }, Some((path, inode))) => {
                let metadata = fs::symlink_metadata(path).ok();
                let ours = metadata.filter(|metadata| metadata.ino() == *inode);
                Protocol::Varlink { gid: ours.map_or(gid, |metadata| metadata.gid()) }
            }
            (protocol, _) => protocol,
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Unix(socket) => socket.as_fd(),
            Socket::Tcp(socket) => socket.as_fd(),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match &self.socket {
            Socket::Unix(socket) => socket.as_raw_fd(),
            Socket::Tcp(socket) => socket.as_raw_fd(),
        }
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, &self.socket) {
            (Some((path, _)), _) => write!(f, "{}", path.display()),
            (None, Socket::Tcp(socket)) => match socket.local_addr() {
                Ok(address) => write!(f, "{address}"),
                Err(_) => write!(f, "the metrics socket"),
            },
            (None, Socket::Unix(_)) => write!(f, "a unix socket"),
        }
    }
}

impl std::ops::Drop for Listener {
    fn drop(&mut self) {
        if let Some((path, inode)) = &self.file
            && self.owned
            && fs::symlink_metadata(path).is_ok_and(|metadata| metadata.ino() == *inode)
        {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;
    use std::os::unix::net::{UnixDatagram, UnixStream};
    use std::sync::mpsc;
    use std::time::Duration;

    /// What binding a control socket at `path` says; it may not wait.
    fn bind_at(path: &Path) -> Result<Listener, SocketError> {
        let (sender, result) = mpsc::channel();
        let path = path.to_owned();
        std::thread::spawn(move || sender.send(bind_control(&path, &mut HashMap::new())));
        result.recv_timeout(Duration::from_secs(10)).unwrap()
    }

    #[test]
    fn what_somebody_listens_on_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hung");
        let fd =
            socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        // Room for one, who is never let in.
        listen(&fd, Backlog::new(0).unwrap()).unwrap();
        let waits = UnixStream::connect(&path).unwrap();
        assert_eq!(knock(&path), Err(Errno::EAGAIN));
        assert!(matches!(bind_at(&path), Err(SocketError::Taken { .. })));
        drop(waits);

        let path = folder.path().join("datagrams");
        let other = UnixDatagram::bind(&path).unwrap();
        assert!(matches!(bind_at(&path), Err(SocketError::Unusable { .. })));
        UnixDatagram::unbound().unwrap().send_to(b"x", &path).unwrap();
        drop(other);
        drop(bind_at(&path).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn a_file_in_the_way_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        fs::write(&path, "mine").unwrap();
        assert!(matches!(bind_at(&path), Err(SocketError::Unusable { .. })));
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }
}
