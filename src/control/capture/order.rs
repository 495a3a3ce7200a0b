//! Records of several workers, put into one order by their time.
//!
//! A worker hands over a chunk when it has served a round, so what another recorded
//! before may come after. Chunks are copied and held for [`HOLD`]; what has waited so
//! long goes out, and whatever is older than it first.

use crate::dataplane::{Chunk, Record};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::{Duration, Instant};

/// How long a chunk waits for older records of another worker. A round is far shorter;
/// a worker that had no CPU for so long has its records out of order.
const HOLD: Duration = Duration::from_millis(20);
/// The most bytes that wait: 20 ms of a million small frames a second, twice. Beyond,
/// the oldest go out at once.
const HELD_MAX: usize = 4 << 20;

/// Records on their way into one order.
#[derive(Debug, Default)]
pub struct Order {
    /// Chunks by the time of their first record that has not gone out.
    held: BinaryHeap<Reverse<Held>>,
    /// When each chunk came, and the time of its last record.
    came: VecDeque<(Instant, u64)>,
    chunks: u64,
    bytes: usize,
}

/// A chunk, from `start` on. Compared by time, then by arrival.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    time: u64,
    number: u64,
    start: usize,
    bytes: Box<[u8]>,
}

impl Order {
    /// Takes a copy of the chunk's records.
    pub fn push(&mut self, chunk: &Chunk, now: Instant) {
        let Some(last) = chunk.records().last().map(|record| record.time) else { return };
        let bytes: Box<[u8]> = chunk.bytes().into();
        self.bytes += bytes.len();
        self.came.push_back((now, last));
        self.chunks += 1;
        self.hold(Held { time: 0, number: self.chunks, start: 0, bytes });
    }

    /// Puts a chunk among the others, or lets it go if nothing is left of it.
    fn hold(&mut self, held: Held) {
        match Record::at(&held.bytes, held.start) {
            Some((record, _)) => {
                let time = record.time;
                self.held.push(Reverse(Held { time, ..held }));
            }
            None => self.bytes -= held.bytes.len(),
        }
    }

    /// How long until something is due; `None` if nothing waits.
    pub fn wait(&self, now: Instant) -> Option<Duration> {
        self.came.front().map(|(came, _)| (*came + HOLD).saturating_duration_since(now))
    }

    /// Gives `take` the records that are due, oldest first, until it has had enough
    /// (`Ok(false)`); all there are if `all`.
    ///
    /// # Errors
    /// What `take` fails with.
    pub fn each_due<E>(
        &mut self,
        now: Instant,
        all: bool,
        mut take: impl FnMut(&Record<'_>) -> Result<bool, E>,
    ) -> Result<(), E> {
        while let Some(&(came, until)) = self.came.front() {
            if !all && self.bytes <= HELD_MAX && now < came + HOLD {
                break;
            }
            self.came.pop_front();
            while self.held.peek().is_some_and(|Reverse(first)| first.time <= until)
                && let Some(Reverse(held)) = self.held.pop()
            {
                let Some((record, next)) = Record::at(&held.bytes, held.start) else { continue };
                let more = take(&record);
                self.hold(Held { start: next, ..held });
                if !more? {
                    return Ok(());
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;
    use crate::dataplane::Direction;
    use std::convert::Infallible;

    fn chunk(times: &[u64]) -> Chunk {
        let mut chunk = Chunk::new();
        for time in times {
            let record = Record {
                time: *time,
                interface: None,
                direction: Direction::Inbound,
                reason: None,
                missed: 0,
                length: 14,
                bytes: &[],
            };
            chunk.append(&record, 14, [&[0; 14], &[], &[]]).unwrap();
        }
        chunk
    }

    fn due(order: &mut Order, now: Instant, all: bool) -> Vec<u64> {
        let mut times = Vec::new();
        let take = |record: &Record<'_>| {
            times.push(record.time);
            Ok::<_, Infallible>(true)
        };
        order.each_due(now, all, take).unwrap();
        times
    }

    #[test]
    fn older_records_of_another_worker_go_first() {
        let (mut order, start) = (Order::default(), Instant::now());
        let ms = Duration::from_millis;
        assert_eq!(order.wait(start), None);
        order.push(&chunk(&[10, 30, 30]), start);
        order.push(&chunk(&[20, 40]), start + ms(5));
        order.push(&chunk(&[5, 30]), start + ms(6));
        assert_eq!(order.wait(start + ms(6)), Some(HOLD - ms(6)));
        assert_eq!(due(&mut order, start + ms(10), false), Vec::<u64>::new());
        // Those of 40 came later, and something may still come before them.
        assert_eq!(due(&mut order, start + HOLD, false), [5, 10, 20, 30, 30, 30]);
        assert_eq!(due(&mut order, start + HOLD, false), Vec::<u64>::new());
        order.push(&chunk(&[35]), start + HOLD);
        assert_eq!(due(&mut order, start + HOLD, true), [35, 40]);
        assert_eq!((order.bytes, order.wait(start)), (0, None));
    }

    #[test]
    fn no_more_waits_than_there_is_room_for() {
        let (mut order, now) = (Order::default(), Instant::now());
        let many = chunk(&(0..1000).collect::<Vec<_>>());
        while order.bytes + many.bytes().len() <= HELD_MAX {
            order.push(&many, now);
        }
        assert_eq!(due(&mut order, now, false), Vec::<u64>::new());
        order.push(&many, now);
        let gone = due(&mut order, now, false);
        assert!(gone.is_sorted() && gone.len() >= 1000, "{}", gone.len());
        assert!(order.bytes <= HELD_MAX);
    }

    #[test]
    fn who_has_enough_gets_no_more_and_the_rest_stays() {
        let (mut order, now) = (Order::default(), Instant::now());
        order.push(&chunk(&[1, 2, 3]), now);
        let mut taken = Vec::new();
        let take = |record: &Record<'_>| {
            taken.push(record.time);
            Ok::<_, Infallible>(record.time < 2)
        };
        order.each_due(now, true, take).unwrap();
        assert_eq!(taken, [1, 2]);
    }
}
