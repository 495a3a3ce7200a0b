//! Captures on behalf of clients: each gets a thread of its own, which takes over the
//! client's connection and waits for it; the control loop does not.

use super::Daemon;
use crate::control::api::CaptureRequest;
use crate::control::capture::filter::{self, Program};
use crate::control::capture::{Names, Options, Session};
use crate::control::server::{CaptureStream, ClientId, Refusal};
use crate::dataplane::{Command, Place, SINKS_MAX, SNAPLEN_MAX, Selection, capture};
use crate::switch::PortIndex;
use crate::sys::memory;
use std::time::{Duration, Instant};
use tracing::{info, warn};

/// How long captures may delay the end of the daemon.
const PATIENCE: Duration = Duration::from_secs(1);

/// Captures under way.
#[derive(Debug, Default)]
pub struct Captures {
    /// Where each looks.
    sessions: Vec<(Place, Session)>,
    /// Where one is about to look.
    coming: Option<Place>,
    names: Names,
    /// Looks for which memory is still to be given back: a worker lets go a moment later.
    trims: u8,
}

impl Captures {
    /// How many there are.
    pub fn running(&self) -> usize {
        self.sessions.iter().filter(|(_, session)| !session.is_finished()).count()
    }

    /// Where somebody looks.
    pub fn places(&self) -> impl Iterator<Item = Place> {
        let running = self.sessions.iter().filter(|(_, session)| !session.is_finished());
        running.map(|(place, _)| *place).chain(self.coming)
    }

    /// Asks all to write what they still have and to end. Returns until when they are
    /// waited for.
    pub fn stop(&self) -> Instant {
        for (_, session) in &self.sessions {
            session.stop();
        }
        Instant::now() + PATIENCE
    }

    /// Waits until all have ended, or to the deadline: with the process, what they
    /// have not written is lost.
    pub fn finish(&self, deadline: Instant) {
        for (_, session) in &self.sessions {
            if !session.wait(deadline) {
                warn!("a capture's reader does not read: its file ends early");
            }
        }
    }
}

impl Daemon {
    /// Starts a capture for a client, which from then on belongs to it.
    ///
    /// # Errors
    /// [`Refusal`]; the client stays.
    pub(super) fn start_capture(
        &mut self,
        client: ClientId,
        wanted: &CaptureRequest,
    ) -> Result<(), Refusal> {
        self.end_captures();
        if self.captures.running() >= SINKS_MAX {
            return Err(Refusal::refused(format!(
                "{SINKS_MAX} captures are under way, as many as there can be: end one first"
            )));
        }
        let place = match wanted.port.as_deref() {
            None => Place::Everywhere,
            Some(name) if name == "uplink" || name == self.name => Place::Uplink,
            Some(name) => {
                let bare = name.strip_prefix("internal:").unwrap_or(name);
                let port = self.ports.by_device(bare);
                Place::Port(port.ok_or_else(|| Refusal::no_such_port(name))?.0)
            }
        };
        let filter = wanted.filter.as_deref().map(compile).transpose()?;
        let snaplen = wanted.snaplen.map_or(SNAPLEN_MAX, |bytes| bytes as usize);
        let snaplen = snaplen.clamp(1, SNAPLEN_MAX);
        let options = Options {
            place,
            filter,
            snaplen: snaplen as u32,
            limit: wanted.limit,
            several_workers: self.workers.len() > 1,
        };
        let selection = Selection { place, drops_only: wanted.drops.unwrap_or(false) };
        self.name_interfaces();
        let (sink, source) = capture(selection, snaplen, self.ports.places());
        // All that can fail comes first: who has the connection cannot refuse any more.
        let prepared = Session::prepare(source, self.captures.names.clone(), options)
            .map_err(|error| Refusal::failed(format!("no thread for a capture: {error}")))?;
        // The packet path sees all frames, and why they are dropped.
        self.captures.coming = Some(place);
        let seen = self.demote_for(&[]);
        self.captures.coming = None;
        seen.map_err(Refusal::failed)?;
        let Some(stream) = self.server.hand_over(client) else { return Ok(()) };
        // What the reader is told first, it is told when the workers have been told.
        self.workers.send_all(|| Command::Capture(Box::new(sink.another())));
        let session = prepared.start(CaptureStream::new(stream));
        self.captures.sessions.push((place, session));
        info!("capturing: {}", wanted.port.as_deref().unwrap_or("everything"));
        Ok(())
    }

    /// Tells captures what interfaces are called now.
    pub(super) fn name_interfaces(&self) {
        self.captures.names.set(None, &self.name);
        for (position, port) in self.ports.iter() {
            self.captures.names.set(Some(position), &port.config.device);
        }
    }

    /// Where somebody looks at frames.
    pub(super) fn captured_places(&self) -> impl Iterator<Item = Place> {
        self.captures.places()
    }

    /// Ends the captures of a port that goes.
    pub(super) fn stop_captures_of(&self, position: PortIndex) {
        for (place, session) in &self.captures.sessions {
            if *place == Place::Port(position) {
                session.stop();
            }
        }
    }

    /// Forgets captures that have ended.
    pub(super) fn end_captures(&mut self) {
        let sessions = &mut self.captures.sessions;
        let before = sessions.len();
        while let Some(ended) = sessions.iter().position(|(_, session)| session.is_finished()) {
            let summary = sessions.swap_remove(ended).1.join();
            info!("capture ended: {} frames written, {} missed", summary.written, summary.missed);
        }
        if sessions.len() < before {
            self.captures.trims = 3;
        }
        if self.captures.trims > 0 {
            self.captures.trims -= 1;
            memory::give_back_freed();
        }
    }
}

fn compile(text: &str) -> Result<Program, Refusal> {
    let instructions = filter::parse(text).map_err(Refusal::refused)?;
    Program::new(&instructions).map_err(Refusal::refused)
}
