//! Whether the worker still goes round, and telling systemd (`WatchdogSec=`).
//!
//! Control sends each worker a command that does nothing but count, one at a time and
//! about once a second at most, so that an idle worker is hardly woken. One that was not
//! answered when the next is due means that the worker is stuck: that is noticed within
//! two seconds. systemd is told that all is well only while it is; if it hears nothing
//! for its time, it restarts us. It then hears nothing either if control is stuck.

use super::Daemon;
use crate::control::api::EventKind;
use crate::dataplane::Command;
use sd_notify::NotifyState;
use std::time::{Duration, Instant};

/// Between two beats, at most: a worker that gets stuck after one was answered is noticed
/// when the second after that is due, and a busy machine is late for both.
const INTERVAL_MAX: Duration = Duration::from_millis(900);

/// How long an answer may take on a busy machine, and all is well.
const SILENCE_MIN: Duration = Duration::from_millis(100);

/// The beats of a worker.
#[derive(Debug)]
pub struct Heartbeat {
    /// Between two beats.
    pub interval: Duration,
    /// Whether somebody waits for news.
    watched: bool,
    asked: u64,
    asked_at: Instant,
    stuck: bool,
}

/// What a look at the worker says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pulse {
    /// It has answered: ask again.
    Answered,
    /// It answers again: ask again.
    Recovered,
    /// It has not answered yet, and need not have.
    Awaited,
    /// It has not answered in time: the first look that finds it so.
    Lost,
    /// It still has not.
    StillLost,
}

impl Heartbeat {
    /// For a systemd that wants to hear something in this time, if there is one.
    pub fn new(watchdog: Option<Duration>, now: Instant) -> Self {
        let interval = watchdog.map_or(INTERVAL_MAX, |time| (time / 2).min(INTERVAL_MAX));
        Self { interval, watched: watchdog.is_some(), asked: 0, asked_at: now, stuck: false }
    }

    /// Whether a beat was not answered in time.
    pub fn is_stuck(&self) -> bool {
        self.stuck
    }

    /// Whether it owes an answer, by the number of beats it has answered: it is not to be
    /// given anything to do.
    pub fn is_silent(&self, answered: u64, now: Instant) -> bool {
        answered < self.asked && now.saturating_duration_since(self.asked_at) >= SILENCE_MIN
    }

    /// Looks at the number of beats a worker has answered in all.
    pub fn look(&mut self, answered: u64, now: Instant) -> Pulse {
        if answered >= self.asked {
            self.asked = answered + 1;
            self.asked_at = now;
            return if std::mem::take(&mut self.stuck) {
                Pulse::Recovered
            } else {
                Pulse::Answered
            };
        }
        // Not sooner than that, however often systemd wants to hear.
        if now.saturating_duration_since(self.asked_at) < INTERVAL_MAX {
            return Pulse::Awaited;
        }
        if std::mem::replace(&mut self.stuck, true) { Pulse::StillLost } else { Pulse::Lost }
    }
}

impl Daemon {
    /// Looks after the workers and tells systemd; to be called once an interval.
    pub(super) fn beat(&mut self, now: Instant) {
        let alone = self.workers.len() == 1;
        let (mut well, mut watched) = (true, false);
        let mut beats = Vec::new();
        let mut news = Vec::new();
        for (number, seat) in self.workers.iter_mut().enumerate() {
            let answered = seat.beats();
            watched |= seat.heartbeat.watched;
            let pulse = seat.heartbeat.look(answered, now);
            let name = if alone { "the worker".to_owned() } else { format!("worker {number}") };
            match pulse {
                Pulse::Answered => beats.push(number),
                Pulse::Recovered => {
                    beats.push(number);
                    news.push(format!("{name} answers again"));
                }
                Pulse::Lost => {
                    let what = if alone { "no frame" } else { "none of its ports' frames" };
                    news.push(format!("{name} does not answer: {what} is being forwarded"));
                }
                Pulse::Awaited | Pulse::StillLost => {}
            }
            well &= !matches!(pulse, Pulse::Lost | Pulse::StillLost);
        }
        for worker in beats {
            self.workers.send(worker, Command::Beat);
        }
        for text in news {
            self.tell(EventKind::Worker, None, text);
        }
        if watched && well {
            // It has asked for it; if it is gone, nothing is lost.
            let _ = sd_notify::notify(&[NotifyState::Watchdog]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_owes_an_answer_is_silent() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let mut beats = Heartbeat::new(None, start);
        assert!(!beats.is_silent(0, at(5000)), "nothing was asked");
        assert_eq!(beats.look(0, at(5000)), Pulse::Answered);
        assert!(!beats.is_silent(0, at(5010)), "just asked");
        assert!(beats.is_silent(0, at(5100)));
        assert!(!beats.is_silent(1, at(5100)));
        assert_eq!(beats.look(0, at(5900)), Pulse::Lost);
        assert_eq!(beats.look(0, at(6800)), Pulse::StillLost);
        assert!(beats.is_silent(0, at(6800)));
        assert!(!beats.is_silent(1, at(6801)), "answered, and not looked at yet");
    }

    #[test]
    fn a_stuck_worker_is_noticed_once_within_two_seconds() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        for (watchdog, interval) in [(None, 900), (Some(10_000), 900), (Some(400), 200)] {
            let mut beats = Heartbeat::new(watchdog.map(Duration::from_millis), start);
            assert_eq!(beats.interval, Duration::from_millis(interval));
            // Answers each beat until it gets stuck, right after an answer.
            let mut answered = 0;
            for step in 0..10 {
                assert_eq!(beats.look(answered, at(step * interval)), Pulse::Answered);
                answered += 1;
            }
            let stuck_at = 9 * interval;
            let mut noticed = None;
            for step in 10..30 {
                let now = step * interval;
                // The last beat it answered was asked for at `stuck_at`.
                match beats.look(answered, at(now)) {
                    Pulse::Lost => noticed = noticed.or(Some(now - stuck_at)),
                    Pulse::StillLost => assert!(noticed.is_some()),
                    Pulse::Answered => assert_eq!(now, 10 * interval),
                    Pulse::Awaited => assert!(noticed.is_none()),
                    Pulse::Recovered => unreachable!("it never answers"),
                }
            }
            assert!(noticed.is_some_and(|after| after <= 2000), "{noticed:?}");
            assert_eq!(beats.look(answered + 1, at(30 * interval)), Pulse::Recovered);
            assert_eq!(beats.look(answered + 2, at(31 * interval)), Pulse::Answered);
        }
    }
}
