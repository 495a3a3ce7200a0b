//! `Examine`: what the daemon knows is put together here, the host is looked at on a
//! thread, which takes milliseconds, and the answer is sent when it is ready. Whoever
//! asks while one is under way gets the same answer.

use super::Daemon;
use crate::control::api::{Finding, FindingsReply};
use crate::control::doctor::{self, Sample, SwitchFacts};
use crate::control::server::{ClientId, Refusal, Ticket};
use crate::frame::Tpid;
use crossbeam_channel::{Receiver, Sender, bounded};
use mio::{Poll, Token, Waker};
use std::io;
use std::sync::Arc;
use tracing::warn;

/// VLANs nobody mapped whose talkers are looked up, those with the most frames.
const SAMPLES_MAX: usize = 64;

/// Examinations under way.
#[derive(Debug)]
pub struct Examinations {
    waiting: Vec<Ticket>,
    waker: Arc<Waker>,
    sender: Sender<Vec<Finding>>,
    results: Receiver<Vec<Finding>>,
}

impl Examinations {
    /// None yet; when one is done, `token` wakes the loop.
    ///
    /// # Errors
    /// Out of file descriptors.
    pub fn new(poll: &Poll, token: Token) -> io::Result<Self> {
        let (sender, results) = bounded(1);
        let waker = Arc::new(Waker::new(poll.registry(), token)?);
        Ok(Self { waiting: Vec::new(), waker, sender, results })
    }
}

impl Daemon {
    /// Begins to look at the host for a client.
    ///
    /// # Errors
    /// [`Refusal`] if there can be no thread.
    pub(super) fn examine(&mut self, client: ClientId) -> Result<(), Refusal> {
        let under_way = !self.examinations.waiting.is_empty();
        if !under_way {
            let facts = self.switch_facts();
            let (sender, waker) =
                (self.examinations.sender.clone(), Arc::clone(&self.examinations.waker));
            let look = move || {
                let _ = sender.try_send(doctor::examine(facts));
                if let Err(error) = waker.wake() {
                    warn!("cannot say that the host was looked at: {error}");
                }
            };
            let thread = std::thread::Builder::new().name("doctor".into()).spawn(look);
            thread.map_err(|error| Refusal::failed(format!("no thread to look: {error}")))?;
        }
        self.examinations.waiting.extend(self.server.put_off(client));
        Ok(())
    }

    /// Sends what was found to those who asked.
    pub(super) fn answer_examinations(&mut self) {
        let Ok(findings) = self.examinations.results.try_recv() else { return };
        let reply = FindingsReply { findings };
        for ticket in std::mem::take(&mut self.examinations.waiting) {
            self.server.reply_late(ticket, &reply);
        }
    }

    fn switch_facts(&mut self) -> SwitchFacts {
        let (stats, status) = (self.stats(), self.status());
        let mut rows: Vec<_> = stats.unmapped.iter().collect();
        rows.sort_by_key(|row| std::cmp::Reverse(row.frames));
        let samples = rows.into_iter().take(SAMPLES_MAX).filter_map(|row| {
            let tpid = Tpid::ALL.into_iter().find(|tpid| tpid.to_string() == row.tpid)?;
            let source = self.uplink.filter.source(tpid.index(), row.vid).ok()??;
            Some(Sample { tpid: row.tpid.clone(), vid: row.vid, source })
        });
        SwitchFacts {
            samples: samples.collect(),
            status,
            stats,
            ports: self.config.ports.clone(),
            claims: self.config.table.claims().to_vec(),
            claims_untagged: self.config.table.claims_untagged(),
        }
    }
}
