//! When to spin and when to sleep.
//!
//! After the last frame a worker looks again for a while before it sleeps: a
//! sleeping worker costs a wake-up, a spinning one costs a core. The time is tuned
//! by what it earns: a frame found while spinning lengthens it, a spin in vain
//! shortens it, so that a quiet switch sleeps at once and a busy one hardly ever.
//!
//! Spinning takes a CPU that has nothing better to do. On a host with few of them
//! the guest and its VMM do: measured with two, sleeping at once delivers 1.7 times
//! the frames to a guest under overload, at no cost elsewhere (docs/performance.md).

use std::time::{Duration, Instant};

/// How a worker waits for frames (`--poll`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PollMode {
    /// Spin for a self-tuned time, then sleep; on hosts with few CPUs sleep at once.
    Adaptive,
    /// Never sleep.
    Busy,
    /// Never spin.
    Sleep,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Look again at once.
    Again,
    /// Wait for readiness.
    Sleep,
}

/// The longest time to spin.
const SPIN_MAX: Duration = Duration::from_micros(60);
/// CPUs below which there is none to spare for spinning.
const CPUS_TO_SPIN: usize = 4;
/// The shortest time worth trying.
const SPIN_MIN: Duration = Duration::from_micros(4);

/// The state of pacing; time is passed in.
#[derive(Debug)]
pub struct Pace {
    mode: PollMode,
    limit: Duration,
    idle_since: Option<Instant>,
}

impl Pace {
    /// A pace in this mode, on a host with this many CPUs.
    pub fn new(mode: PollMode, cpus: usize) -> Self {
        let mode = match mode {
            PollMode::Adaptive if cpus < CPUS_TO_SPIN => PollMode::Sleep,
            mode => mode,
        };
        Self { mode, limit: SPIN_MAX / 2, idle_since: None }
    }

    /// What to do after a round that moved frames, or none.
    #[inline]
    pub fn next(&mut self, moved: bool, now: Instant) -> Step {
        if moved {
            if self.idle_since.take().is_some() {
                self.limit = (self.limit * 2).min(SPIN_MAX);
            }
            return Step::Again;
        }
        match self.mode {
            PollMode::Busy => return Step::Again,
            PollMode::Sleep => return Step::Sleep,
            PollMode::Adaptive => {}
        }
        let since = *self.idle_since.get_or_insert(now);
        if now.saturating_duration_since(since) < self.limit {
            return Step::Again;
        }
        self.limit = (self.limit * 7 / 8).max(SPIN_MIN);
        self.idle_since = None;
        Step::Sleep
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::panic, reason = "tests fail by panicking")]
    use super::*;

    fn spin_until_sleep(pace: &mut Pace, from: Instant) -> Duration {
        let mut now = from;
        while pace.next(false, now) == Step::Again {
            now += Duration::from_micros(1);
            assert!(now - from < Duration::from_millis(1), "never sleeps");
        }
        now - from
    }

    #[test]
    fn spinning_in_vain_shortens_it_and_finding_frames_lengthens_it() {
        let mut pace = Pace::new(PollMode::Adaptive, 64);
        let start = Instant::now();
        let first = spin_until_sleep(&mut pace, start);
        let mut last = first;
        for _ in 0..50 {
            last = spin_until_sleep(&mut pace, start);
        }
        assert!(last < first && last >= SPIN_MIN);
        for _ in 0..50 {
            assert_eq!(pace.next(false, start), Step::Again);
            assert_eq!(pace.next(true, start), Step::Again);
        }
        let longest = spin_until_sleep(&mut pace, start);
        assert!(longest > first && longest <= SPIN_MAX);
    }

    #[test]
    fn the_other_modes_do_as_they_are_told() {
        let now = Instant::now();
        let mut busy = Pace::new(PollMode::Busy, 1);
        assert_eq!(busy.next(false, now + Duration::from_secs(9)), Step::Again);
        let mut sleepy = Pace::new(PollMode::Sleep, 64);
        assert_eq!(sleepy.next(true, now), Step::Again);
        assert_eq!(sleepy.next(false, now), Step::Sleep);
        let mut small_host = Pace::new(PollMode::Adaptive, 2);
        assert_eq!(small_host.next(false, now), Step::Sleep);
    }
}
