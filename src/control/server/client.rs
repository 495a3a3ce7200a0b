//! One client: its buffers, its protocol, and what it may do.

use super::varlink::{self, Refusal};
use super::{Wish, http};
use crate::sys::peer::Peer;
use serde::Serialize;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The longest message a client may send, in bytes.
const MESSAGE_MAX: usize = 64 << 10;
/// How long half a message, or an answer nobody takes, may stay; a stream's may stay
/// as long as nobody needs the place.
const STUCK_AFTER: Duration = Duration::from_secs(10);

/// A client's connection.
#[derive(Debug)]
pub enum Connection {
    /// To a unix socket.
    Unix(UnixStream),
    /// To a TCP port.
    Tcp(TcpStream),
}

impl Connection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.read(buffer),
            Self::Tcp(stream) => stream.read(buffer),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.write(bytes),
            Self::Tcp(stream) => stream.write(bytes),
        }
    }
}

/// What is spoken on a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// The control interface. Members of this group may change things.
    Varlink {
        /// Group of the socket.
        gid: u32,
    },
    /// Metrics by HTTP.
    Http,
}

/// Answers a client gets without asking again.
#[derive(Debug)]
pub enum Stream {
    /// Counters, by the clock.
    Stats {
        /// How often.
        every: Duration,
        /// When next.
        next: Instant,
    },
    /// Events.
    Events {
        /// How many it was too slow for.
        missed: u64,
    },
}

/// What a look at a client brought.
#[derive(Debug)]
pub enum Next {
    /// Nothing yet.
    Nothing,
    /// It has gone, or has to.
    Gone,
    /// Something for the daemon.
    Wish(Wish),
    /// Something that needed no daemon.
    Answered,
}

/// One client.
#[derive(Debug)]
pub struct Client {
    connection: Connection,
    protocol: Protocol,
    may_change: bool,
    /// There may be bytes to read: edge-triggered readiness is told once.
    pub readable: bool,
    input: Vec<u8>,
    /// What it still has to take.
    pub output: Vec<u8>,
    /// Answers that come by themselves.
    pub stream: Option<Stream>,
    /// Its call is answered later, under this number.
    pub waits_for: Option<u64>,
    /// The call being answered wants no answer.
    oneway: bool,
    /// The form of metrics it wants.
    format: http::Format,
    /// No more calls: close once all is sent.
    closing: bool,
    /// Since when it owes us the rest of a message, or room for an answer.
    owes_since: Option<Instant>,
    /// When it last asked something, or was seen to have taken something.
    active: Instant,
    /// It has taken something since it was last looked at.
    took: bool,
}

impl Client {
    /// A client that has just come.
    pub fn new(connection: Connection, protocol: Protocol, now: Instant) -> Self {
        let may_change = match (&connection, protocol) {
            (Connection::Unix(stream), Protocol::Varlink { gid }) => {
                Peer::of(stream).is_ok_and(|peer| {
                    let own = nix::unistd::geteuid().as_raw();
                    peer.uid == 0 || peer.uid == own || peer.gids.contains(&gid)
                })
            }
            _ => false,
        };
        Self {
            connection,
            protocol,
            may_change,
            readable: true,
            input: Vec::new(),
            output: Vec::new(),
            stream: None,
            waits_for: None,
            oneway: false,
            format: http::Format::default(),
            closing: false,
            owes_since: None,
            active: now,
            took: false,
        }
    }

    /// Whether it calls methods; if not, it reads metrics.
    pub fn calls(&self) -> bool {
        matches!(self.protocol, Protocol::Varlink { .. })
    }

    /// Whether it may change things.
    pub fn may_change(&self) -> bool {
        self.may_change
    }

    /// Takes its rights away.
    #[cfg(test)]
    pub fn demote(&mut self) {
        self.may_change = false;
    }

    /// When something is due by the clock.
    pub fn deadline(&self) -> Option<Instant> {
        let stuck = self.owes_since.map(|since| since + STUCK_AFTER);
        let due = match &self.stream {
            // A reader that has not taken the last one is asked again when it has.
            Some(Stream::Stats { next, .. }) if self.output.is_empty() => Some(*next),
            _ => None,
        };
        stuck.into_iter().chain(due).min()
    }

    /// Whether it has owed us something for too long.
    pub fn is_stuck(&self, now: Instant) -> bool {
        self.owes_since.is_some_and(|since| now >= since + STUCK_AFTER)
    }

    /// Whether the next answer of its stream is due; it is taken as given.
    pub fn is_due(&mut self, now: Instant) -> bool {
        match &mut self.stream {
            Some(Stream::Stats { every, next }) if self.output.is_empty() && now >= *next => {
                // A reader that fell behind gets no burst to catch up.
                *next = if *next + *every > now { *next + *every } else { now + *every };
                true
            }
            _ => false,
        }
    }

    /// Its call is answered later, under this number. Meanwhile it owes nothing: we do.
    pub fn wait_for(&mut self, number: u64) {
        self.waits_for = Some(number);
        self.owes_since = None;
    }

    /// Since when it has been of no use, if it is: not while it is to be answered, nor
    /// while it takes what its stream brings.
    pub fn idle_since(&self) -> Option<Instant> {
        let served = self.waits_for.is_some() || self.took;
        let reads_along = self.stream.is_some() && self.output.is_empty();
        (!served && !reads_along).then_some(self.active)
    }

    /// Looks for something to do.
    pub fn next_message(&mut self, now: Instant) -> Next {
        self.flush();
        if std::mem::take(&mut self.took) {
            self.active = now;
        }
        let next = self.look(now);
        let owes_room = !self.output.is_empty() && self.stream.is_none();
        // Who came for metrics owes a request from the first moment.
        let owes_message = !self.input.is_empty() || self.protocol == Protocol::Http;
        let owes = self.waits_for.is_none() && (owes_room || owes_message);
        self.owes_since = if owes { self.owes_since.or(Some(now)) } else { None };
        next
    }

    fn look(&mut self, now: Instant) -> Next {
        if self.closing {
            return if self.output.is_empty() { Next::Gone } else { Next::Nothing };
        }
        // One answer at a time: what it asks next waits in its own socket.
        if !self.output.is_empty() && self.stream.is_none() {
            return Next::Nothing;
        }
        if self.waits_for.is_some() {
            return Next::Nothing;
        }
        loop {
            if let Some(length) = self.message_length() {
                if self.stream.is_some() {
                    // A stream lasts until the client hangs up; it may not ask beside it.
                    return Next::Gone;
                }
                let message: Vec<u8> = self.input.drain(..length).collect();
                self.owes_since = Some(now);
                self.active = now;
                return self.understand(&message);
            }
            if self.input.len() > MESSAGE_MAX {
                return Next::Gone;
            }
            match self.fill() {
                Ok(true) => {}
                Ok(false) => return Next::Nothing,
                Err(_) => return Next::Gone,
            }
        }
    }

    /// Length of the first whole message in the buffer, its end included.
    fn message_length(&self) -> Option<usize> {
        match self.protocol {
            Protocol::Varlink { .. } => {
                self.input.iter().position(|byte| *byte == 0).map(|end| end + 1)
            }
            Protocol::Http => http::request_length(&self.input),
        }
    }

    fn understand(&mut self, message: &[u8]) -> Next {
        match self.protocol {
            Protocol::Varlink { .. } => self.understand_call(message),
            Protocol::Http => {
                self.closing = true;
                match http::read_request(message) {
                    Ok(format) => {
                        self.format = format;
                        Next::Wish(Wish::Metrics)
                    }
                    Err(refusal) => {
                        self.output.extend(refusal);
                        self.flush();
                        Next::Answered
                    }
                }
            }
        }
    }

    fn understand_call(&mut self, message: &[u8]) -> Next {
        let bytes = message.strip_suffix(&[0]).unwrap_or(message);
        match varlink::read_call(bytes, self.may_change) {
            Some(varlink::Call::Method { request, more, oneway }) => {
                self.oneway = oneway;
                Next::Wish(Wish::Call { request, more })
            }
            Some(varlink::Call::Service { reply, oneway }) => {
                self.oneway = oneway;
                self.send_reply(&reply, false);
                Next::Answered
            }
            Some(varlink::Call::Refused { refusal, oneway }) => {
                self.oneway = oneway;
                self.send_error(&refusal);
                Next::Answered
            }
            // No varlink at all: nothing that could be answered.
            None => Next::Gone,
        }
    }

    /// Reads what is there; false if that is nothing.
    fn fill(&mut self) -> io::Result<bool> {
        if !self.readable {
            return Ok(false);
        }
        let mut buffer = [0; 16 << 10];
        match self.connection.read(&mut buffer) {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => {
                self.input.extend(buffer.get(..length).unwrap_or_default());
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Sends an answer.
    pub fn send_reply(&mut self, parameters: &impl Serialize, continues: bool) {
        if !std::mem::take(&mut self.oneway) || continues {
            varlink::write_reply(&mut self.output, parameters, continues);
        }
        self.flush();
    }

    /// Sends an error.
    pub fn send_error(&mut self, refusal: &Refusal) {
        if !std::mem::take(&mut self.oneway) {
            varlink::write_error(&mut self.output, refusal);
        }
        self.flush();
    }

    /// Sends metrics.
    pub fn send_metrics(&mut self, text: &str) {
        self.output.extend(http::response(text, self.format));
        self.flush();
    }

    /// Sends what it takes of what is waiting.
    pub fn flush(&mut self) {
        let mut sent = 0;
        while let Some(rest) = self.output.get(sent..).filter(|rest| !rest.is_empty()) {
            match self.connection.write(rest) {
                Ok(length) if length > 0 => sent += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // It will never take the rest; the next read finds it gone.
                Ok(_) | Err(_) => {
                    self.closing = true;
                    sent = self.output.len();
                }
            }
        }
        if sent > 0 {
            self.owes_since = None;
            self.took = true;
            self.output.drain(..sent);
        }
        if self.output.capacity() > MESSAGE_MAX && self.output.is_empty() {
            self.output = Vec::new();
        }
    }

    /// The connection, for somebody who waits.
    pub fn into_unix_stream(self) -> Option<UnixStream> {
        match self.connection {
            Connection::Unix(stream) => stream.set_nonblocking(false).ok().map(|()| stream),
            Connection::Tcp(_) => None,
        }
    }
}

impl AsRawFd for Client {
    fn as_raw_fd(&self) -> RawFd {
        match &self.connection {
            Connection::Unix(stream) => stream.as_raw_fd(),
            Connection::Tcp(stream) => stream.as_raw_fd(),
        }
    }
}
