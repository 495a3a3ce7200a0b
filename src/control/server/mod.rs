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
//! (introspection, errors in the framing, who may do what) is answered here. Each
//! such answer and each connection let in is a step of its own, so that the caller
//! can stop after a few; readiness is told once (it is edge-triggered), so whoever
//! has not been served to the end stays in the queue, the listeners too.
//!
//! # Places
//! Each protocol has its own number of places. Those of the control socket are kept
//! for as long as nobody needs them: a reader of a stream that has been suspended
//! misses events and lives on, and a program may keep a connection it seldom uses.
//! When a newcomer finds no place, it takes that of the client longest idle: who has
//! asked nothing, or taken nothing of its stream, for [`IDLE_AFTER`]. Who may not
//! change anything only takes the places of its like.

mod client;
pub mod http;
mod socket;
mod stream;
pub mod varlink;

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

/// Clients of the control socket at once.
const CLIENTS_MAX: usize = 64;
/// Those of them that may not change anything: the rest is kept for those who may.
const READERS_MAX: usize = 48;
/// Readers of metrics at once.
const SCRAPERS_MAX: usize = 16;
/// After how long without a sign of life a client has to make room for another.
const IDLE_AFTER: Duration = Duration::from_secs(60);
/// When connections cannot be taken (no descriptors left), the time to the next try.
const RETRY: Duration = Duration::from_secs(1);
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

/// One step of serving.
#[derive(Debug)]
pub enum Served {
    /// A client wants something of the daemon.
    Wish(ClientId, Wish),
    /// A client was let in, turned away or answered here.
    Here,
}

/// Who is to be looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    Door(usize),
    Client(ClientId),
}

/// A listening socket.
#[derive(Debug)]
struct Door {
    listener: Listener,
    /// It could not take a connection: when to try again.
    retry: Option<Instant>,
}

/// All listening sockets and their clients.
#[derive(Debug)]
pub struct Server {
    doors: Vec<Door>,
    registry: Registry,
    /// Tokens from here on are ours: first the doors, then the clients.
    first_token: usize,
    clients: Vec<Option<Client>>,
    /// Whom to look at in this turn; nobody twice.
    turn: VecDeque<Turn>,
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
        let doors = listeners.into_iter().map(|listener| Door { listener, retry: None });
        Ok(Self {
            doors: doors.collect(),
            registry: registry.try_clone()?,
            first_token,
            clients: Vec::new(),
            turn: VecDeque::new(),
            tickets: 0,
        })
    }

    /// Takes note of a readiness event of one of our tokens.
    pub fn note(&mut self, token: Token) {
        let Some(position) = token.0.checked_sub(self.first_token) else { return };
        match position.checked_sub(self.doors.len()) {
            None => self.queue(Turn::Door(position)),
            Some(id) => {
                if let Some(Some(client)) = self.clients.get_mut(id) {
                    client.readable = true;
                    client.flush();
                    self.queue(Turn::Client(id));
                }
            }
        }
    }

    /// The next step. `None`: nobody wants anything; who stops before that finds
    /// [`Server::has_work`].
    pub fn next_call(&mut self, now: Instant) -> Option<Served> {
        while let Some(turn) = self.turn.pop_front() {
            let id = match turn {
                Turn::Door(position) if self.open(position, now) => return Some(Served::Here),
                Turn::Door(_) => continue,
                Turn::Client(id) => id,
            };
            let Some(Some(client)) = self.clients.get_mut(id) else { continue };
            match client.next_message(now) {
                client::Next::Nothing => {}
                client::Next::Gone => self.remove(id),
                client::Next::Wish(wish) => return Some(Served::Wish(id, wish)),
                client::Next::Answered => {
                    // There may be more.
                    self.queue(turn);
                    return Some(Served::Here);
                }
            }
        }
        None
    }

    fn queue(&mut self, turn: Turn) {
        if !self.turn.contains(&turn) {
            self.turn.push_back(turn);
        }
    }

    /// Whether a client has something to be read already.
    pub fn has_work(&self) -> bool {
        !self.turn.is_empty()
    }

    /// Until when nothing is due by the clock.
    pub fn deadline(&self) -> Option<Instant> {
        let retries = self.doors.iter().filter_map(|door| door.retry);
        self.clients.iter().flatten().filter_map(Client::deadline).chain(retries).min()
    }

    /// Does what is due by the clock: drops clients that are stuck, and queues the
    /// next answers of streams, which [`Server::next_due`] hands out.
    pub fn next_due(&mut self, now: Instant) -> Option<(ClientId, Wish)> {
        for position in 0..self.doors.len() {
            if let Some(Door { retry: Some(at), .. }) = self.doors.get_mut(position)
                && now >= *at
            {
                *at = now + RETRY;
                self.queue(Turn::Door(position));
            }
        }
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
        self.queue(Turn::Client(id));
    }

    /// Puts the answer to a call off: the client's next call waits until
    /// [`Server::reply_late`].
    pub fn put_off(&mut self, id: ClientId) -> Option<Ticket> {
        let client = self.clients.get_mut(id)?.as_mut()?;
        self.tickets += 1;
        client.wait_for(self.tickets);
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
        self.queue(Turn::Client(id));
    }

    /// Answers a reader of metrics.
    pub fn metrics(&mut self, id: ClientId, text: &str) {
        let Some(Some(client)) = self.clients.get_mut(id) else { return };
        client.send_metrics(text);
        self.queue(Turn::Client(id));
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
        for id in 0..self.clients.len() {
            let Some(Some(client)) = self.clients.get_mut(id) else { continue };
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
            // Whether it took that is seen at its turn.
            self.queue(Turn::Client(id));
        }
    }

    /// Takes a client's connection out of here, to be written to by somebody else.
    /// What it was still to be sent is lost: there is nothing while a call is open.
    pub fn hand_over(&mut self, id: ClientId) -> Option<UnixStream> {
        let client = self.clients.get_mut(id)?.take()?;
        let _ = self.registry.deregister(&mut SourceFd(&client.as_raw_fd()));
        client.into_unix_stream()
    }

    /// The listening sockets, by their names between two processes.
    pub fn listeners(&self) -> impl Iterator<Item = (String, BorrowedFd<'_>)> {
        self.doors.iter().map(|door| (door.listener.place(), door.listener.as_fd()))
    }

    /// Leaves the sockets' files when they are closed: another process has them.
    pub fn leave_files(&mut self) {
        for door in &mut self.doors {
            door.listener.own_file(false);
        }
    }

    /// Removes the sockets' files when they are closed: who had them before has ended.
    pub fn take_files(&mut self) {
        for door in &mut self.doors {
            door.listener.own_file(true);
        }
    }

    /// How many clients the control socket has.
    pub fn clients(&self) -> usize {
        self.callers().count()
    }

    fn callers(&self) -> impl Iterator<Item = (ClientId, &Client)> {
        let clients = self.clients.iter().enumerate();
        clients.filter_map(|(id, place)| Some((id, place.as_ref()?))).filter(|(_, c)| c.calls())
    }

    /// Takes one connection; false if there was none to be had.
    fn open(&mut self, position: usize, now: Instant) -> bool {
        let Some(door) = self.doors.get_mut(position) else { return false };
        let client = match door.listener.accept() {
            Ok(Some((stream, protocol))) => Some(Client::new(stream, protocol, now)),
            Ok(None) => {
                door.retry = None;
                return false;
            }
            // It has gone again: look for the next.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted
                ) =>
            {
                None
            }
            Err(error) => {
                if door.retry.is_none() {
                    warn!("cannot take a connection to {}: {error}", door.listener);
                }
                door.retry = Some(now + RETRY);
                return false;
            }
        };
        door.retry = None;
        self.queue(Turn::Door(position));
        if let Some(client) = client {
            self.let_in(client, now);
        }
        true
    }

    fn let_in(&mut self, client: Client, now: Instant) {
        if !self.make_room(&client, now) {
            debug!("turned a client away: there are too many already");
            return;
        }
        let free = self.clients.iter().position(Option::is_none);
        let id = free.unwrap_or_else(|| {
            self.clients.push(None);
            self.clients.len() - 1
        });
        let token = Token(self.first_token + self.doors.len() + id);
        let interest = Interest::READABLE | Interest::WRITABLE;
        match self.registry.register(&mut SourceFd(&client.as_raw_fd()), token, interest) {
            Ok(()) => {
                if let Some(place) = self.clients.get_mut(id) {
                    *place = Some(client);
                }
                self.queue(Turn::Client(id));
            }
            Err(error) => warn!("cannot serve a client: {error}"),
        }
    }

    /// Whether there is a place for this client; one idle for long enough goes for it.
    fn make_room(&mut self, newcomer: &Client, now: Instant) -> bool {
        if !newcomer.calls() {
            return self.clients.iter().flatten().count() - self.clients() < SCRAPERS_MAX;
        }
        let readers = self.callers().filter(|(_, other)| !other.may_change()).count();
        let crowded = !newcomer.may_change() && readers >= READERS_MAX;
        if !crowded && self.clients() < CLIENTS_MAX {
            return true;
        }
        let rivals =
            self.callers().filter(|(_, other)| newcomer.may_change() || !other.may_change());
        let idlest = rivals
            .filter_map(|(id, other)| Some((other.idle_since()?, id)))
            .filter(|(since, _)| now >= *since + IDLE_AFTER)
            .min();
        if let Some((_, id)) = idlest {
            debug!("dropping an idle client: another needs its place");
            self.remove(id);
        }
        idlest.is_some()
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

    /// Steps in a turn.
    const STEPS: usize = 16;

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
                self.server.note(event.token());
            }
            let mut wishes = Vec::new();
            for _ in 0..STEPS {
                match self.server.next_call(self.now) {
                    Some(Served::Wish(id, wish)) => wishes.push((id, wish)),
                    Some(Served::Here) => {}
                    None => break,
                }
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
        let mut silent = bench.connect();
        silent.set_nonblocking(true).unwrap();
        bench.turn(9);
        let waits = |stream: &mut UnixStream| stream.read(&mut [0]).map_err(|error| error.kind());
        assert_eq!(waits(&mut silent), Err(io::ErrorKind::WouldBlock));
        bench.turn(10);
        assert_eq!(waits(&mut silent), Ok(0));
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

    const MONITOR: &[u8] = b"{\"method\":\"org.vlanswitchd.Monitor\",\"more\":true}\0";

    fn event(text: String) -> Event {
        Event { time: 0, kind: EventKind::Config, device: None, text }
    }

    /// What is there to be read.
    fn read_all(stream: &mut UnixStream) -> String {
        stream.set_nonblocking(true).unwrap();
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        String::from_utf8(bytes).unwrap()
    }

    impl Bench {
        /// Connects a client that is let in.
        fn guest(&mut self) -> UnixStream {
            let stream = self.connect();
            self.turn(0);
            stream
        }

        /// From now on those let in may change nothing, whoever they are.
        fn demote(&mut self) {
            for client in self.server.clients.iter_mut().flatten() {
                client.demote();
            }
        }

        /// Connects a client that listens to events, and tells it so many that neither
        /// its socket nor the server take more.
        fn deaf_monitor(&mut self) -> UnixStream {
            let mut monitor = self.guest();
            monitor.write_all(MONITOR).unwrap();
            let id = self.turn(0).first().unwrap().0;
            self.server.stream_events(id);
            for _ in 0..100 {
                self.server.tell(&event("x".repeat(20_000)));
                self.turn(0);
            }
            monitor
        }
    }

    #[test]
    fn who_asks_without_end_has_no_longer_a_turn_than_others() {
        let mut bench = Bench::control("pipeline");
        let (mut greedy, mut modest) = (bench.guest(), bench.guest());
        let call = b"{\"method\":\"org.varlink.service.GetInfo\",\"oneway\":true}\0";
        greedy.write_all(&call.repeat(400)).unwrap();
        modest.write_all(b"{\"method\":\"org.vlanswitchd.ListPorts\"}\0").unwrap();
        assert_eq!(bench.turn(0).len(), 1);
        assert!(bench.server.has_work());
        let turns = (1..).find(|_| {
            bench.turn(0);
            !bench.server.has_work()
        });
        assert!(turns.unwrap() >= 400 / STEPS - 2);
    }

    #[test]
    fn nobody_is_in_the_queue_twice() {
        let mut bench = Bench::control("queue");
        let mut greedy = bench.guest();
        let call = b"{\"method\":\"org.varlink.service.GetInfo\",\"oneway\":true}\0".repeat(20);
        for _ in 0..10 {
            greedy.write_all(&call).unwrap();
            bench.turn(0);
            assert!(bench.server.turn.len() <= 1);
        }
    }

    #[test]
    fn a_crowd_at_the_door_is_let_in_by_and_by() {
        let mut bench = Bench::control("door");
        let _crowd: Vec<UnixStream> = (0..40).map(|_| bench.connect()).collect();
        bench.turn(0);
        let first = bench.server.clients();
        assert!((1..=STEPS).contains(&first), "{first}");
        while bench.server.has_work() {
            bench.turn(0);
        }
        assert_eq!(bench.server.clients(), 40);
    }

    #[test]
    fn a_door_that_jams_is_tried_again_and_not_at_once() {
        use nix::sys::socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
        };
        let mut bench = Bench::control("jam");
        // A socket that does not listen yet refuses as one does for want of descriptors.
        let path = bench.folder.join("jammed");
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        let again = fd.try_clone().unwrap();
        let mut inherited = HashMap::from([(format!("control {}", path.display()), fd)]);
        let jammed = bind_control(&path, &mut inherited).unwrap();
        bench.server = Server::new(vec![jammed], bench.poll.registry(), 0).unwrap();
        bench.turn(0);
        assert!(!bench.server.has_work(), "it is no busy loop");
        assert_eq!(bench.server.deadline(), Some(bench.now + RETRY));
        listen(&again, Backlog::new(8).unwrap()).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        // No word of the poll: the clock alone.
        bench.now += RETRY;
        assert!(bench.server.next_due(bench.now).is_none());
        assert!(bench.server.next_call(bench.now).is_some());
        assert_eq!((bench.server.clients(), bench.server.doors.first().unwrap().retry), (1, None));
    }

    #[test]
    fn a_suspended_reader_of_events_lives_on_and_is_told_what_it_missed() {
        let mut bench = Bench::control("suspended");
        let mut monitor = bench.deaf_monitor();
        bench.turn(3600);
        assert_eq!(bench.server.clients(), 1);
        assert_eq!(bench.server.deadline(), None);
        // Awake again.
        let mut text = String::new();
        loop {
            let piece = read_all(&mut monitor);
            if piece.is_empty() {
                break;
            }
            text += &piece;
            bench.turn(0);
        }
        assert!(!text.contains("\"missed\""));
        bench.server.tell(&event("news".into()));
        text += &read_all(&mut monitor);
        assert!(text.contains("\"missed\"") && text.contains("\"news\""));
        for answer in text.split_terminator('\0') {
            serde_json::from_str::<serde_json::Value>(answer).unwrap();
        }
    }

    #[test]
    fn a_newcomer_takes_the_place_of_who_was_idle_longest() {
        let mut bench = Bench::control("idle");
        let mut deaf = bench.deaf_monitor();
        let mut listens = bench.guest();
        listens.write_all(MONITOR).unwrap();
        let id = bench.turn(0).first().unwrap().0;
        bench.server.stream_events(id);
        let mut waits = bench.guest();
        waits.write_all(b"{\"method\":\"org.vlanswitchd.Examine\"}\0").unwrap();
        let id = bench.turn(0).first().unwrap().0;
        bench.server.put_off(id).unwrap();
        bench.turn(30);
        let mut idle = bench.guest();
        let mut others: Vec<_> = (4..CLIENTS_MAX).map(|_| bench.guest()).collect();
        assert_eq!(bench.server.clients(), CLIENTS_MAX);

        bench.turn(29);
        let mut early = bench.guest();
        assert_eq!(early.read(&mut [0]).unwrap(), 0, "nobody was idle for a minute");
        bench.turn(1);
        others.push(bench.guest());
        assert_eq!(bench.server.clients(), CLIENTS_MAX);
        read_all(&mut deaf);
        assert_eq!(deaf.read(&mut [0]).unwrap(), 0, "it took nothing for a minute");
        // All the others ask something now and then.
        bench.turn(29);
        for other in &mut others {
            other.write_all(b"{\"method\":\"org.varlink.service.GetInfo\"}\0").unwrap();
        }
        // Until all have been served; a fault must not make it endless.
        let busy = |bench: &mut Bench| !bench.turn(0).is_empty() || bench.server.has_work();
        assert!((0..1000).any(|_| !busy(&mut bench)), "it never comes to rest");
        bench.turn(1);
        others.push(bench.guest());
        assert_eq!(bench.server.clients(), CLIENTS_MAX);
        assert_eq!(idle.read(&mut [0]).unwrap(), 0);
        let mut late = bench.guest();
        assert_eq!(late.read(&mut [0]).unwrap(), 0);
        for stream in [&mut listens, &mut waits] {
            stream.set_nonblocking(true).unwrap();
            assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn who_may_change_nothing_takes_no_place_of_who_may() {
        let mut bench = Bench::control("ranks");
        let _powerful: Vec<_> = (0..CLIENTS_MAX).map(|_| bench.guest()).collect();
        bench.turn(1000);
        let (end, _other) = UnixStream::pair().unwrap();
        let protocol = client::Protocol::Varlink { gid: 0 };
        let mut weak = Client::new(client::Connection::Unix(end), protocol, bench.now);
        weak.demote();
        assert!(!bench.server.make_room(&weak, bench.now));
        bench.demote();
        assert!(bench.server.make_room(&weak, bench.now));
        assert_eq!(bench.server.clients(), CLIENTS_MAX - 1);
    }

    #[test]
    fn readers_of_metrics_take_no_places_of_the_control_socket() {
        let mut bench = Bench::control("apart");
        let path = bench.folder.join("metrics");
        let control = bind_control(&bench.folder.join("both"), &mut HashMap::new()).unwrap();
        let metrics = bind_metrics_unix(&path, &mut HashMap::new()).unwrap();
        bench.server = Server::new(vec![control, metrics], bench.poll.registry(), 0).unwrap();
        let mut scrapers: Vec<_> = (0..SCRAPERS_MAX + 1)
            .map(|_| {
                let scraper = UnixStream::connect(&path).unwrap();
                bench.turn(0);
                scraper
            })
            .collect();
        assert_eq!(scrapers.pop().unwrap().read(&mut [0]).unwrap(), 0);
        for scraper in &scrapers {
            scraper.set_nonblocking(true).unwrap();
            let mut scraper = scraper;
            assert_eq!(scraper.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
        let _clients: Vec<_> = (0..CLIENTS_MAX)
            .map(|_| {
                let client = UnixStream::connect(bench.folder.join("both")).unwrap();
                bench.turn(0);
                client
            })
            .collect();
        assert_eq!(bench.server.clients(), CLIENTS_MAX);
    }

    #[test]
    fn who_waits_for_a_late_answer_owes_nothing() {
        let mut bench = Bench::control("waits");
        let mut client = bench.guest();
        let call = b"{\"method\":\"org.vlanswitchd.Examine\"}\0";
        // The next one is there already, and half of a third.
        client.write_all(&[&call[..], &call[..], b"{"].concat()).unwrap();
        let id = bench.turn(0).first().unwrap().0;
        let ticket = bench.server.put_off(id).unwrap();
        client.write_all(b" ").unwrap();
        bench.turn(60);
        assert_eq!(bench.server.clients(), 1);
        bench.server.reply_late(ticket, &serde_json::json!({}));
        assert_eq!(bench.turn(0).len(), 1);
        assert!(!read_all(&mut client).is_empty());
    }

    #[test]
    fn a_stream_without_answers_is_refused_in_silence() {
        let mut bench = Bench::control("oneway");
        let mut client = bench.guest();
        let call = b"{\"method\":\"org.vlanswitchd.Capture\",\"more\":true,\"oneway\":true}\0";
        client.write_all(call).unwrap();
        assert!(bench.turn(0).is_empty());
        client.write_all(b"{\"method\":\"org.vlanswitchd.ListPorts\"}\0").unwrap();
        assert_eq!(bench.turn(0).len(), 1);
        assert_eq!(read_all(&mut client), "");
    }
}
