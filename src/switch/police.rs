//! Policing: how much of what a guest sends goes on, and under which source
//! addresses. Pure: time is passed in.
//!
//! # Theory of operation
//!
//! A [`PoliceRule`] is plain data, as configured. A [`Policer`] is a rule at work:
//! the rule and two token buckets, one for bytes and one for broadcasts and
//! multicasts. [`Policer::refill`] is told the time once a burst, then
//! [`Policer::admit`] is asked about each frame: the source address first, then the
//! storm limit, then the rate. A frame that one of them refuses takes nothing from
//! those behind. A refused super-frame is refused whole.
//!
//! # The buckets
//!
//! A bucket holds tokens of such a size that a nanosecond brings a whole number of
//! them: a byte costs 8e9 where `rate` tokens come each nanosecond, a frame 1e9 where
//! `storm` come. So nothing is ever rounded or divided, and there is no drift, however
//! odd the times at which it is looked at. What passes in any time `t` is at most
//! `burst + rate * t`, exactly. The largest burst makes 8e18 tokens; what comes on top
//! in one refill is at most as much again, which 64 bits hold.
//!
//! [`Policer::follow`] takes another rule and keeps the fill, so that neither the change
//! of another port nor a change of this one hands out a second burst.

use super::DropReason;
use arrayvec::ArrayVec;

/// An Ethernet address.
pub type MacAddress = [u8; 6];

/// The most source addresses a port can be held to: enough for a guest with some
/// bridges or addresses of redundancy protocols, few enough to compare one by one.
pub const MACS_MAX: usize = 16;

/// A byte, in tokens of which `rate` come each nanosecond: bits a byte times
/// nanoseconds a second.
const BYTE: u64 = 8 * NANOSECONDS;
/// A frame, in tokens of which `storm` come each nanosecond.
const FRAME: u64 = NANOSECONDS;
const NANOSECONDS: u64 = 1_000_000_000;

/// A rate and how far a burst may exceed it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    bits_per_second: u64,
    burst_bytes: u64,
}

impl Rate {
    /// The lowest and the highest rate, in bits a second.
    pub const RANGE: (u64, u64) = (1_000, 1_000_000_000_000);
    /// The smallest and the largest burst, in bytes. A super-frame of 64 KiB, which is
    /// up to 74 kB once its segments have their headers (123 of them, at the smallest
    /// MSS of RFC 9293), must fit, or it could never pass.
    pub const BURST_RANGE: (u64, u64) = (80_000, NANOSECONDS);
    /// How long at the full rate the burst is that nobody chose: 200 ms, the shortest
    /// time Linux waits before it sends again what was lost (`TCP_RTO_MIN` in
    /// `include/net/tcp.h`). While it waits the bucket saves up what it would have sent;
    /// a smaller one runs over, and a TCP connection gets that much less. Measured at
    /// 50 Mbit/s: 24 % of the rate with 50 ms, 48 % with 100 ms, 87-95 % with 200 ms.
    /// Over ten seconds it is 2 % of what the rate lets through.
    const BURSTS_A_SECOND: u64 = 5;

    /// A rate in bits a second, with a burst in bytes or the default one. `None`
    /// outside of [`Rate::RANGE`] and [`Rate::BURST_RANGE`].
    pub fn new(bits_per_second: u64, burst_bytes: Option<u64>) -> Option<Self> {
        let burst_bytes = burst_bytes.unwrap_or_else(|| Self::default_burst(bits_per_second));
        let within = |value, (least, most): (u64, u64)| (least..=most).contains(&value);
        let legal = within(bits_per_second, Self::RANGE) && within(burst_bytes, Self::BURST_RANGE);
        legal.then_some(Self { bits_per_second, burst_bytes })
    }

    /// The burst of a rate for which none was chosen, in bytes: what it lets through in
    /// 200 ms, within [`Rate::BURST_RANGE`].
    pub fn default_burst(bits_per_second: u64) -> u64 {
        let (least, most) = Self::BURST_RANGE;
        (bits_per_second / 8 / Self::BURSTS_A_SECOND).clamp(least, most)
    }

    /// The rate in bits a second.
    pub fn bits_per_second(self) -> u64 {
        self.bits_per_second
    }

    /// The burst in bytes.
    pub fn burst_bytes(self) -> u64 {
        self.burst_bytes
    }

    fn bucket(self, now: u64) -> Bucket {
        Bucket::full(self.bits_per_second, self.burst_bytes * BYTE, now)
    }
}

/// How many broadcasts and multicasts a guest may send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Storm {
    frames_per_second: u32,
}

impl Storm {
    /// The lowest and the highest limit, in frames a second.
    pub const RANGE: (u32, u32) = (1, 100_000_000);
    /// How long at the full rate its burst is: 100 ms.
    const BURSTS_A_SECOND: u32 = 10;
    /// The smallest burst, in frames: what one interface sends at once when it comes up
    /// (duplicate address detection, router solicitation, multicast reports, ARP).
    const BURST_MIN: u32 = 10;

    /// A limit in frames a second. `None` outside of [`Storm::RANGE`].
    pub fn new(frames_per_second: u32) -> Option<Self> {
        let (least, most) = Self::RANGE;
        (least..=most).contains(&frames_per_second).then_some(Self { frames_per_second })
    }

    /// The limit in frames a second.
    pub fn frames_per_second(self) -> u32 {
        self.frames_per_second
    }

    /// How many may come at once after silence: those of 100 ms, at least 10.
    pub fn burst_frames(self) -> u32 {
        (self.frames_per_second / Self::BURSTS_A_SECOND).max(Self::BURST_MIN)
    }

    fn bucket(self, now: u64) -> Bucket {
        let capacity = u64::from(self.burst_frames()) * FRAME;
        Bucket::full(u64::from(self.frames_per_second), capacity, now)
    }
}

/// What a port's guest is held to.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PoliceRule {
    /// All it sends.
    pub rate: Option<Rate>,
    /// Its broadcasts and multicasts.
    pub storm: Option<Storm>,
    /// Source addresses it may use; empty for all.
    pub macs: ArrayVec<MacAddress, MACS_MAX>,
}

impl PoliceRule {
    /// Whether it lets everything through.
    pub fn is_empty(&self) -> bool {
        self.rate.is_none() && self.storm.is_none() && self.macs.is_empty()
    }
}

/// A rule at work on one port.
#[derive(Debug)]
pub struct Policer {
    rule: PoliceRule,
    rate: Option<Bucket>,
    storm: Option<Bucket>,
}

impl Policer {
    /// A rule from now on, with full buckets. `now` is in nanoseconds since whatever the
    /// caller likes.
    pub fn new(rule: PoliceRule, now: u64) -> Self {
        let rate = rule.rate.map(|rate| rate.bucket(now));
        let storm = rule.storm.map(|storm| storm.bucket(now));
        Self { rule, rate, storm }
    }

    /// Goes by another rule from now on. Buckets there were keep their fill, as far as
    /// it fits the new ones.
    pub fn follow(&mut self, rule: &PoliceRule, now: u64) {
        if self.rule == *rule {
            return;
        }
        self.refill(now);
        let kept = |new: Option<Bucket>, old: &Option<Bucket>| {
            let level = |new: &Bucket| old.as_ref().map_or(new.level, |old| old.level);
            new.map(|new| Bucket { level: level(&new).min(new.capacity), ..new })
        };
        self.rate = kept(rule.rate.map(|rate| rate.bucket(now)), &self.rate);
        self.storm = kept(rule.storm.map(|storm| storm.bucket(now)), &self.storm);
        self.rule = rule.clone();
    }

    /// Lets the time pass. A time before the last one counts as the last one.
    #[inline]
    pub fn refill(&mut self, now: u64) {
        for bucket in [&mut self.rate, &mut self.storm].into_iter().flatten() {
            bucket.refill(now);
        }
    }

    /// Whether a frame passes. `wire_len` is asked for its length in bytes as it goes on
    /// the wire, all segments of a super-frame together, if that matters.
    ///
    /// # Errors
    /// The reason to drop it.
    #[inline]
    pub fn admit(
        &mut self,
        frame: &[u8],
        wire_len: impl FnOnce() -> usize,
    ) -> Result<(), DropReason> {
        if !self.rule.macs.is_empty() {
            let source = frame.get(6..12).unwrap_or_default();
            if !self.rule.macs.iter().any(|mac| mac == source) {
                return Err(DropReason::SpoofedMac);
            }
        }
        if let Some(bucket) = &mut self.storm {
            // The group bit (IEEE 802 clause 8.2): broadcast has it too.
            let group = frame.first().is_some_and(|byte| byte & 1 != 0);
            if group && !bucket.take(FRAME) {
                return Err(DropReason::StormLimited);
            }
        }
        if let Some(bucket) = &mut self.rate
            && !bucket.take((wire_len() as u64).saturating_mul(BYTE))
        {
            return Err(DropReason::RateLimited);
        }
        Ok(())
    }
}

/// A token bucket.
#[derive(Debug, Clone)]
struct Bucket {
    level: u64,
    capacity: u64,
    /// Tokens a nanosecond brings.
    per_nanosecond: u64,
    /// Nanoseconds after which it is full, whatever it held.
    filled_in: u64,
    /// When it was refilled last.
    at: u64,
}

impl Bucket {
    fn full(per_nanosecond: u64, capacity: u64, now: u64) -> Self {
        let filled_in = capacity / per_nanosecond.max(1) + 1;
        Self { level: capacity, capacity, per_nanosecond, filled_in, at: now }
    }

    #[inline]
    fn refill(&mut self, now: u64) {
        let elapsed = now.saturating_sub(self.at).min(self.filled_in);
        self.at = self.at.max(now);
        let gained = self.per_nanosecond.saturating_mul(elapsed);
        self.level = self.level.saturating_add(gained).min(self.capacity);
    }

    #[inline]
    fn take(&mut self, tokens: u64) -> bool {
        let left = self.level.checked_sub(tokens);
        self.level = left.unwrap_or(self.level);
        left.is_some()
    }
}

#[cfg(test)]
#[path = "police_tests.rs"]
mod tests;
