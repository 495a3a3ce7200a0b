//! The subscription to the kernel's link notifications.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};

use super::LinkError;
use super::request::{DATAGRAM_CAPACITY, LinkSocket};
use super::table::{LinkEvent, Links};
use super::wire;

/// Receive buffer asked for, in bytes as the kernel counts them. A notification
/// takes one of its 4 KiB (its `truesize`), so some thousands of them fit: a
/// host where all VMs start at once.
const RECEIVE_BUFFER: usize = 8 * 1024 * 1024;
/// Datagrams thrown away at most before a new dump. Those beyond it are merely
/// applied after the dump, which is right too (see the parent module).
const DISCARD_LIMIT: usize = 65_536;
/// The group of changes to qdiscs and filters (include/uapi/linux/rtnetlink.h; libc
/// has no name for it).
const RTMGRP_TC: libc::c_int = 1 << (RTNLGRP_TC - 1);
const RTNLGRP_TC: libc::c_int = 4;
/// What is said of a device when notifications were lost.
const MAYBE_UNHOOKED: &str = "notifications about it were lost";

/// Mirrors the network devices of the namespace it was made in, and tells what
/// changes. See the parent module for how it stays true.
#[derive(Debug)]
pub struct LinkMonitor {
    notifications: Socket,
    /// Open all the time, so that a sandboxed process can recover from an overrun
    /// without opening a socket.
    requests: LinkSocket,
    links: Links,
    buffer: Vec<u8>,
    /// Notifications were lost and no dump has made up for it yet.
    stale: bool,
    overruns: u64,
}

/// What a receive brought.
enum Received {
    /// A datagram, in the buffer.
    Datagram,
    /// Nothing: the queue is empty.
    Nothing,
    /// The kernel dropped notifications since the last receive.
    Overrun,
}

impl LinkMonitor {
    /// Subscribes in the calling thread's network namespace and fetches the
    /// devices it has now; [`Self::links`] then tells of them.
    pub fn new() -> Result<Self, LinkError> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.set_non_blocking(true)?;
            // The first one needs CAP_NET_ADMIN, the second is capped by
            // net.core.rmem_max. A smaller buffer costs dumps, not truth.
            setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BUFFER)
                .or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_BUFFER))?;
            socket.bind(&SocketAddr::new(0, (libc::RTMGRP_LINK | RTMGRP_TC).cast_unsigned()))?;
            Ok(socket)
        };
        let notifications = open().map_err(|reason| LinkError::Socket {
            operation: "subscribe to link notifications",
            reason,
        })?;
        let mut requests = LinkSocket::new()?;
        let mut links = Links::default();
        links.reconcile(requests.links()?, &mut |_| {});
        Ok(Self {
            notifications,
            requests,
            links,
            buffer: Vec::with_capacity(DATAGRAM_CAPACITY),
            stale: false,
            overruns: 0,
        })
    }

    /// The devices as of the last [`Self::read_events`].
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// How often notifications were lost and the devices listed anew.
    pub fn overruns(&self) -> u64 {
        self.overruns
    }

    /// Reads all queued notifications, brings [`Self::links`] up to date and calls
    /// `consumer` with each change, in order. Never blocks but for the dump after
    /// an overrun. To be called when the file descriptor is readable; it is read
    /// until it is empty, so edge-triggered polling is fine.
    ///
    /// After an error, call it again: what was missed is made up for then.
    pub fn read_events(&mut self, mut consumer: impl FnMut(LinkEvent)) -> Result<(), LinkError> {
        loop {
            if self.stale {
                self.resynchronize(&mut consumer)?;
            }
            match self.receive() {
                Ok(Received::Nothing) => return Ok(()),
                Ok(Received::Overrun) => self.stale = true,
                Ok(Received::Datagram) => {
                    for message in wire::messages(&self.buffer) {
                        match message.kind {
                            libc::RTM_NEWLINK => {
                                if let Some(report) = wire::link_report(message.payload) {
                                    self.links.update(report.state, &mut consumer);
                                }
                            }
                            libc::RTM_DELLINK => {
                                if let Some(index) = wire::link_index(message.payload) {
                                    self.links.remove(index, &mut consumer);
                                }
                            }
                            _ => {
                                if let Some((index, cause)) = wire::unhooked(&message) {
                                    consumer(LinkEvent::Unhooked { index, cause });
                                }
                            }
                        }
                    }
                }
                Err(reason) => {
                    self.stale = true;
                    let operation = "read link notifications";
                    return Err(LinkError::Socket { operation, reason });
                }
            }
        }
    }

    /// Lists the devices anew after lost notifications, and tells the differences.
    fn resynchronize(&mut self, consumer: &mut impl FnMut(LinkEvent)) -> Result<(), LinkError> {
        for _ in 0..DISCARD_LIMIT {
            // An error is met again, and reported, by the caller's next receive.
            if matches!(self.receive(), Ok(Received::Nothing) | Err(_)) {
                break;
            }
        }
        self.links.reconcile(self.requests.links()?, consumer);
        for link in self.links.iter() {
            consumer(LinkEvent::Unhooked { index: link.index, cause: MAYBE_UNHOOKED });
        }
        self.stale = false;
        self.overruns = self.overruns.saturating_add(1);
        Ok(())
    }

    /// Takes one datagram of the kernel's off the queue.
    fn receive(&mut self) -> io::Result<Received> {
        loop {
            self.buffer.clear();
            match self.notifications.recv_from(&mut self.buffer, libc::MSG_TRUNC) {
                // Another process can send here too, and must not be believed.
                Ok((_, sender)) if sender.port_number() != 0 => {}
                // Longer than any notification known; its content is lost.
                Ok((length, _)) if length > self.buffer.len() => return Ok(Received::Overrun),
                Ok(_) => return Ok(Received::Datagram),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Ok(Received::Nothing);
                }
                Err(error) if error.raw_os_error() == Some(Errno::ENOBUFS as i32) => {
                    return Ok(Received::Overrun);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsFd for LinkMonitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.notifications.as_fd()
    }
}

impl AsRawFd for LinkMonitor {
    fn as_raw_fd(&self) -> RawFd {
        self.notifications.as_raw_fd()
    }
}
