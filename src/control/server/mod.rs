//! The sockets people and programs talk to us on: the control socket, and the one
//! metrics are read from.
//!
//! # Theory of operation
//!
//! All of it runs in the control loop, without a thread of its own and without ever
//! waiting for a client: sockets are non-blocking, each client has one buffer in
//! and one out, and is served one call a turn. A client whose answer has not left
//! yet is not read from, so nobody holds more than one answer here. What a client
//! can cost is bounded: the number of clients, the length of a message, the time
//! half a message or an unread answer may stay, and events for a slow reader are
//! counted instead of kept.
//!
//! [`Server::next_call`] hands out what was asked; the daemon answers by
//! [`Server::reply`] or [`Server::refuse`]. What the protocols need of themselves
//! (introspection, errors in the framing, who may do what) is answered here.

mod client;
mod http;
mod socket;
mod stream;
mod varlink;

pub use socket::{SocketError, bind_control, bind_metrics_tcp, bind_metrics_unix};
pub use stream::CaptureStream;
pub use varlink::Refusal;

use crate::control::api::{Event, EventKind, EventReply, Request};
use crate::sys::sandbox::Call;
use client::{Client, Stream};
use mio::unix::SourceFd;
use mio::{Interest, Registry, Token};
use serde::Serialize;
use socket::Listener;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use tracing::{debug, warn};

/// What serving callers takes, and removing the sockets' files at the end.
pub const CALLS: &[Call] = &[
    Call::any(libc::SYS_accept4),
    Call::any(libc::SYS_getsockopt),
    Call::any(libc::SYS_read),
    Call::any(libc::SYS_recvfrom),
    Call::any(libc::SYS_sendto),
    Call::any(libc::SYS_writev),
    Call::any(libc::SYS_shutdown),
    Call::one_of(libc::SYS_ioctl, 1, &[libc::FIONBIO as u32]),
    Call::any(libc::SYS_statx),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_unlink),
    Call::any(libc::SYS_unlinkat),
];

/// Clients at once.
const CLIENTS_MAX: usize = 64;
/// Clients at once that may not change anything: the rest is kept for those who may.
const READERS_MAX: usize = 48;
/// Bytes of events a slow reader may have waiting.
const EVENTS_BACKLOG: usize = 64 << 10;
/// The shortest time between two answers of a stream.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// The usual one.
const INTERVAL: Duration = Duration::from_secs(1);

/// A client, for as long as it is connected.
pub type ClientId = usize;

/// A call that is answered later: its client may have gone by then, and another have
/// its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ticket {
    client: ClientId,
    number: u64,
}

/// What a client wants.
#[derive(Debug)]
pub enum Wish {
    /// A method was called; to be answered.
    Call {
        /// Which.
        request: Request,
        /// The client takes many answers.
        more: bool,
    },
    /// The next counters for a client that asked for them again and again.
    NextStats,
    /// A program reads metrics; to be answered by [`Server::metrics`].
    Metrics,
}

/// All listening sockets and their clients.
#[derive(Debug)]
pub struct Server {
    listeners: Vec<Listener>,
    /// Tokens from here on are ours: first the listeners, then the clients.
    first_token: usize,
    clients: Vec<Option<Client>>,
    /// Clients to look at in this turn.
    turn: VecDeque<ClientId>,
    /// Calls that were to be answered later.
    tickets: u64,
}

impl Server {
    /// A server for these sockets, with tokens from `first_token` on.
    ///
    /// # Errors
    /// When they cannot be polled.
    pub fn new(
        listeners: Vec<Listener>,
        registry: &Registry,
        first_token: usize,
    ) -> io::Result<Self> {
        for (position, listener) in listeners.iter().enumerate() {
            let token = Token(first_token + position);
            registry.register(&mut SourceFd(&listener.as_raw_fd()), token, Interest::READABLE)?;
        }
        Ok(Self { listeners, first_token, clients: Vec::new(), turn: VecDeque::new(), tickets: 0 })
    }

    /// Takes note of a readiness event of one of our tokens.
    pub fn note(&mut self, token: Token, registry: &Registry) {
        let Some(position) = token.0.checked_sub(self.first_token) else { return };
        match position.checked_sub(self.listeners.len()) {
            None => self.accept(position, registry),
            Some(id) => {
                if let Some(Some(client)) = self.clients.get_mut(id) {
                    client.readable = true;
                    client.flush();
                    self.turn.push_back(id);
                }
            }
        }
    }

    /// The next thing a client wants. `None`: all are served for this turn, or their
    /// share of it is used up; [`Server::has_work`] tells which.
    pub fn next_call(&mut self, now: Instant) -> Option<(ClientId, Wish)> {
        while let Some(id) = self.turn.pop_front() {
            let Some(Some(client)) = self.clients.get_mut(id) else { continue };
            match client.next_message(now) {
                client::Next::Nothing => {}
                client::Next::Gone => self.remove(id),
                client::Next::Wish(wish) => return Some((id, wish)),
                // Answered already; there may be more.
                client::Next::Answered => self.turn.push_back(id),
            }
        }
        None
    }

    /// Whether a client has something to be read already.
    pub fn has_work(&self) -> bool {
        !self.turn.is_empty()
    }

    /// Until when nothing is due by the clock.
    pub fn deadline(&self) -> Option<Instant> {
        self.clients.iter().flatten().filter_map(Client::deadline).min()
    }

    /// Does what is due by the clock: drops clients that are stuck, and queues the
    /// next answers of streams, which [`Server::next_due`] hands out.
    pub fn next_due(&mut self, now: Instant) -> Option<(ClientId, Wish)> {
        for id in 0..self.clients.len() {
            let Some(Some(client)) = self.clients.get_mut(id) else { continue };
            if client.is_stuck(now) {
                debug!("dropping a client that neither reads nor writes");
                self.remove(id);
            } else if client.is_due(now) {
                return Some((id, Wish::NextStats));
            }
        }
        None
    }

    /// Answers a call, or the next of a stream's.
    pub fn reply(&mut self, id: ClientId, parameters: &impl Serialize) {
        let Some(Some(client)) = self.clients.get_mut(id) else { return };
        let continues = client.stream.is_some();
        client.send_reply(parameters, continues);
        self.turn.push_back(id);
    }

    /// Puts the answer to a call off: the client's next call waits until
    /// [`Server::reply_late`].
    pub fn put_off(&mut self, id: ClientId) -> Option<Ticket> {
        let client = self.clients.get_mut(id)?.as_mut()?;
        self.tickets += 1;
        client.waits_for = Some(self.tickets);
        Some(Ticket { client: id, number: self.tickets })
    }

    /// Answers a call that was put off, if its client is still there.
    pub fn reply_late(&mut self, ticket: Ticket, parameters: &impl Serialize) {
        let Some(Some(client)) = self.clients.get_mut(ticket.client) else { return };
        if client.waits_for == Some(ticket.number) {
            client.waits_for = None;
            self.reply(ticket.client, parameters);
        }
    }

    /// Answers a call with an error.
    pub fn refuse(&mut self, id: ClientId, refusal: &Refusal) {
        let Some(Some(client)) = self.clients.get_mut(id) else { return };
        client.send_error(refusal);
        self.turn.push_back(id);
    }

    /// Answers a reader of metrics.
    pub fn metrics(&mut self, id: ClientId, text: &str) {
        let Some(Some(client)) = self.clients.get_mut(id) else { return };
        client.send_metrics(text);
        self.turn.push_back(id);
    }

    /// From now on the client gets counters every `interval` milliseconds.
    pub fn stream_stats(&mut self, id: ClientId, interval: Option<u64>, now: Instant) {
        let Some(Some(client)) = self.clients.get_mut(id) else { return };
        let every = interval.map_or(INTERVAL, Duration::from_millis).max(INTERVAL_MIN);
        client.stream = Some(Stream::Stats { every, next: now + every });
    }

    /// From now on the client gets events.
    pub fn stream_events(&mut self, id: ClientId) {
        if let Some(Some(client)) = self.clients.get_mut(id) {
            client.stream = Some(Stream::Events { missed: 0 });
        }
    }

    /// Tells all who listen.
    pub fn tell(&mut self, event: &Event) {
        for client in self.clients.iter_mut().flatten() {
            let Some(Stream::Events { missed }) = &mut client.stream else { continue };
            if client.output.len() > EVENTS_BACKLOG {
                *missed += 1;
                continue;
            }
            if *missed > 0 {
                let text = format!("{missed} events went by before this reader took the last");
                *missed = 0;
                let note = Event { time: event.time, kind: EventKind::Missed, device: None, text };
                client.send_reply(&EventReply { event: note }, true);
            }
            client.send_reply(&EventReply { event: event.clone() }, true);
        }
    }

    /// Takes a client's connection out of here, to be written to by somebody else.
    /// What it was still to be sent is lost: there is nothing while a call is open.
    pub fn hand_over(&mut self, id: ClientId, registry: &Registry) -> Option<UnixStream> {
        let client = self.clients.get_mut(id)?.take()?;
        let _ = registry.deregister(&mut SourceFd(&client.as_raw_fd()));
        client.into_unix_stream()
    }

    /// The listening sockets, by their names between two processes.
    pub fn listeners(&self) -> impl Iterator<Item = (String, BorrowedFd<'_>)> {
        self.listeners.iter().map(|listener| (listener.place(), listener.as_fd()))
    }

    /// Leaves the sockets' files when they are closed: another process has them.
    pub fn leave_files(&mut self) {
        for listener in &mut self.listeners {
            listener.leave_file();
        }
    }

    /// How many clients there are.
    pub fn clients(&self) -> usize {
        self.clients.iter().flatten().count()
    }

    fn accept(&mut self, position: usize, registry: &Registry) {
        let Some(listener) = self.listeners.get(position) else { return };
        loop {
            let (stream, protocol) = match listener.accept() {
                Ok(Some(accepted)) => accepted,
                Ok(None) => return,
                Err(error) => {
                    warn!("cannot take a connection to {listener}: {error}");
                    return;
                }
            };
            let client = Client::new(stream, protocol);
            let (mut all, mut readers) = (0, 0);
            for other in self.clients.iter().flatten() {
                all += 1;
                readers += usize::from(!other.may_change());
            }
            if all >= CLIENTS_MAX || (!client.may_change() && readers >= READERS_MAX) {
                debug!("turned a client away: there are {all} already");
                continue;
            }
            let free = self.clients.iter().position(Option::is_none);
            let id = free.unwrap_or_else(|| {
                self.clients.push(None);
                self.clients.len() - 1
            });
            let token = Token(self.first_token + self.listeners.len() + id);
            let interest = Interest::READABLE | Interest::WRITABLE;
            match registry.register(&mut SourceFd(&client.as_raw_fd()), token, interest) {
                Ok(()) => {
                    if let Some(place) = self.clients.get_mut(id) {
                        *place = Some(client);
                    }
                    self.turn.push_back(id);
                }
                Err(error) => warn!("cannot serve a client of {listener}: {error}"),
            }
        }
    }

    fn remove(&mut self, id: ClientId) {
        if let Some(place) = self.clients.get_mut(id) {
            // Closing takes it out of the poll as well: no other handle exists.
            *place = None;
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;
    use mio::{Events, Poll};
    use std::collections::HashMap;
    use std::io::{Read, Write};
    use std::path::PathBuf;

    /// A server on a socket of its own, and a clock that the test turns.
    struct Bench {
        folder: PathBuf,
        poll: Poll,
        server: Server,
        now: Instant,
    }

    impl Bench {
        fn new(name: &str, bind: impl Fn(&std::path::Path) -> Listener) -> Self {
            let folder =
                std::env::temp_dir().join(format!("vlanswitchd-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&folder).unwrap();
            let poll = Poll::new().unwrap();
            let listener = bind(&folder.join("socket"));
            let server = Server::new(vec![listener], poll.registry(), 0).unwrap();
            Self { folder, poll, server, now: Instant::now() }
        }

        fn control(name: &str) -> Self {
            Self::new(name, |path| bind_control(path, &mut HashMap::new()).unwrap())
        }

        fn connect(&self) -> UnixStream {
            UnixStream::connect(self.folder.join("socket")).unwrap()
        }

        /// A turn of the control loop, some seconds later; what clients want.
        fn turn(&mut self, later: u64) -> Vec<(ClientId, Wish)> {
            self.now += Duration::from_secs(later);
            let mut events = Events::with_capacity(16);
            self.poll.poll(&mut events, Some(Duration::from_millis(20))).unwrap();
            for event in &events {
                self.server.note(event.token(), self.poll.registry());
            }
            let mut wishes = Vec::new();
            while let Some(wish) = self.server.next_call(self.now) {
                wishes.push(wish);
            }
            while let Some(wish) = self.server.next_due(self.now) {
                wishes.push(wish);
            }
            wishes
        }
    }

    impl std::ops::Drop for Bench {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }

    #[test]
    fn half_a_message_may_stay_for_ten_seconds_however_it_grows() {
        let mut bench = Bench::control("half");
        let (mut half, idle) = (bench.connect(), bench.connect());
        half.write_all(b"{").unwrap();
        bench.turn(0);
        assert_eq!(bench.server.clients(), 2);
        half.write_all(b" ").unwrap();
        bench.turn(9);
        assert_eq!(bench.server.clients(), 2);
        bench.turn(1);
        // Whoever says nothing owes nothing.
        assert_eq!(bench.server.clients(), 1);
        bench.turn(1000);
        assert_eq!(bench.server.clients(), 1);
        assert_eq!(half.read(&mut [0]).unwrap(), 0);
        drop(idle);
        bench.turn(0);
        assert_eq!(bench.server.clients(), 0);
    }

    #[test]
    fn who_comes_for_metrics_and_asks_nothing_goes_too() {
        let mut bench =
            Bench::new("metrics", |path| bind_metrics_unix(path, &mut HashMap::new()).unwrap());
        let _silent = bench.connect();
        bench.turn(0);
        assert_eq!(bench.server.clients(), 1);
        bench.turn(10);
        assert_eq!(bench.server.clients(), 0);
    }

    #[test]
    fn an_answer_nobody_takes_stays_for_ten_seconds() {
        let mut bench = Bench::control("unread");
        let mut client = bench.connect();
        client.write_all(b"{\"method\":\"org.vlanswitchd.ListPorts\"}\0").unwrap();
        let wishes = bench.turn(0);
        let (id, _) = wishes.first().unwrap();
        // More than a socket holds.
        bench.server.reply(*id, &serde_json::json!({ "ports": "x".repeat(4 << 20) }));
        bench.turn(0);
        bench.turn(9);
        assert_eq!(bench.server.clients(), 1);
        bench.turn(1);
        assert_eq!(bench.server.clients(), 0);
    }

    #[test]
    fn a_late_answer_is_for_who_asked_and_comes_before_the_next() {
        let mut bench = Bench::control("late");
        let call = b"{\"method\":\"org.vlanswitchd.Examine\"}\0";
        let mut gone = bench.connect();
        gone.write_all(call).unwrap();
        let asked = bench.turn(0).first().unwrap().0;
        let lost = bench.server.put_off(asked).unwrap();
        drop(gone);

        let mut client = bench.connect();
        client.write_all(&[&call[..], &call[..]].concat()).unwrap();
        let mut wishes = bench.turn(0);
        assert_eq!(wishes.len(), 1, "one call at a time");
        let id = wishes.remove(0).0;
        let ticket = bench.server.put_off(id).unwrap();
        assert!(bench.turn(0).is_empty(), "the next waits for the answer to the first");
        bench.server.reply_late(lost, &serde_json::json!({ "whose": "another's" }));
        bench.server.reply_late(ticket, &serde_json::json!({ "whose": "mine" }));
        assert_eq!(bench.turn(0).len(), 1);
        let mut answer = [0; 256];
        let length = client.read(&mut answer).unwrap();
        let text = String::from_utf8_lossy(answer.get(..length).unwrap());
        assert_eq!(text, "{\"parameters\":{\"whose\":\"mine\"}}\0");
    }
}
