//! The policer against exact models, on a virtual clock.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]
use super::*;
use proptest::prelude::*;

const SECOND: u64 = NANOSECONDS;
const UNICAST: [u8; 14] = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
const MULTICAST: [u8; 14] = [0x33, 0x33, 0, 0, 0, 1, 2, 0, 0, 0, 0, 1, 0x86, 0xdd];
const BROADCAST: [u8; 14] = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 8, 6];

fn rate(bits_per_second: u64, burst_bytes: Option<u64>) -> PoliceRule {
    PoliceRule { rate: Rate::new(bits_per_second, burst_bytes), ..PoliceRule::default() }
}

fn storm(frames_per_second: u32) -> PoliceRule {
    PoliceRule { storm: Storm::new(frames_per_second), ..PoliceRule::default() }
}

fn pass(policer: &mut Policer, now: u64, frame: &[u8], length: usize) -> Result<(), DropReason> {
    policer.refill(now);
    policer.admit(frame, || length)
}

/// The definition of a token bucket by what it lets through (RFC 2697 has the bucket,
/// network calculus this): a frame passes exactly if, since the start and since each
/// time anything passed, at most `burst + rate * t` does with it. All in whole numbers:
/// both sides are multiplied by 8e9. Knows of no level and no refill.
struct Envelope {
    rate: u128,
    burst: u128,
    /// Time, and the sum of all that passed before it.
    passed: Vec<(u64, u128)>,
    sum: u128,
}

impl Envelope {
    fn new(bits_per_second: u64, burst_bytes: u64) -> Self {
        Self { rate: bits_per_second.into(), burst: burst_bytes.into(), passed: vec![], sum: 0 }
    }

    fn admits(&mut self, now: u64, length: usize) -> bool {
        let with = self.sum + length as u128;
        let fits = |since: u64, before: u128| {
            (with - before) * 8_000_000_000
                <= self.burst * 8_000_000_000 + self.rate * u128::from(now - since)
        };
        let fine = fits(now, self.sum) && self.passed.iter().all(|(at, sum)| fits(*at, *sum));
        if fine {
            self.passed.push((now, self.sum));
            self.sum = with;
        }
        fine
    }
}

/// Times between two looks: from back to back to long silences.
fn gap() -> impl Strategy<Value = u64> {
    prop_oneof![0..100_u64, 0..100_000_u64, 0..50_000_000_u64, 0..20 * SECOND]
}

fn length() -> impl Strategy<Value = usize> {
    prop_oneof![60..1515_usize, 60..80_000_usize]
}

proptest! {
    #[test]
    fn exactly_what_the_envelope_lets_through(
        bits in prop_oneof![1_000..1_000_000_u64, 1_000_000..100_000_000_001_u64],
        burst in prop_oneof![80_000..200_000_u64, 80_000..1_000_000_001_u64],
        frames in prop::collection::vec((gap(), length()), 1..200),
    ) {
        let mut policer = Policer::new(rate(bits, Some(burst)), 0);
        let mut envelope = Envelope::new(bits, burst);
        let mut now = 0;
        for (gap, length) in frames {
            now += gap;
            let expected = envelope.admits(now, length);
            prop_assert_eq!(pass(&mut policer, now, &UNICAST, length).is_ok(), expected);
        }
    }

    /// The same with a bucket that is always near empty, where it counts.
    #[test]
    fn exactly_what_the_envelope_lets_through_when_it_is_short(
        bits in 1_000_000..100_000_000_001_u64,
        frames in prop::collection::vec((0..3000_u64, length()), 1..200),
    ) {
        let burst = 80_000;
        let mut policer = Policer::new(rate(bits, Some(burst)), 0);
        let mut envelope = Envelope::new(bits, burst);
        let mut now = 0;
        for (gap, length) in frames {
            // About as long as such a frame takes, in thousandths.
            now += gap * length as u64 * 8_000_000 / bits;
            let expected = envelope.admits(now, length);
            prop_assert_eq!(pass(&mut policer, now, &UNICAST, length).is_ok(), expected);
        }
    }

    #[test]
    fn storms_too(
        frames_per_second in prop_oneof![1..100_u32, 1..100_000_001_u32],
        gaps in prop::collection::vec(gap(), 1..200),
    ) {
        let limit = Storm::new(frames_per_second).unwrap();
        let mut policer = Policer::new(storm(frames_per_second), 0);
        // A frame is a byte here, and 8 bits of it.
        let mut envelope =
            Envelope::new(8 * u64::from(frames_per_second), limit.burst_frames().into());
        let mut now = 0;
        for gap in gaps {
            now += gap;
            let expected = envelope.admits(now, 1);
            prop_assert_eq!(pass(&mut policer, now, &MULTICAST, 60).is_ok(), expected);
            prop_assert_eq!(pass(&mut policer, now, &UNICAST, 60), Ok(()));
        }
    }

    /// Changes of the rule never hand out more than the larger burst and rate would.
    #[test]
    fn changes_hand_out_nothing(
        steps in prop::collection::vec((0..30_000_000_u64, length(), 0..4_usize), 1..300),
    ) {
        let rules = [rate(1_000_000, None), rate(8_000_000, Some(90_000)), rate(8_000_000, None)];
        let (most_rate, most_burst) = (8_000_000_u128, 90_000_u128);
        let mut policer = Policer::new(rules[0].clone(), 0);
        let (mut now, mut sum) = (0, 0);
        for (gap, length, rule) in steps {
            now += gap;
            if let Some(rule) = rules.get(rule) {
                policer.follow(rule, now);
            }
            if pass(&mut policer, now, &UNICAST, length).is_ok() {
                sum += length as u128;
            }
            let most = most_burst * 8_000_000_000 + most_rate * u128::from(now);
            prop_assert!(sum * 8_000_000_000 <= most);
        }
    }

    /// No time and no length breaks it.
    #[test]
    fn anything_goes_in(
        bits in 1_000..=1_000_000_000_000_u64,
        burst in 80_000..=1_000_000_000_u64,
        steps in prop::collection::vec((any::<u64>(), any::<usize>()), 1..50),
    ) {
        let mut policer = Policer::new(rate(bits, Some(burst)), 0);
        for (now, length) in steps {
            let _ = pass(&mut policer, now, &UNICAST, length);
            let bucket = policer.rate.as_ref().unwrap();
            prop_assert!(bucket.level <= bucket.capacity);
        }
    }
}

/// What passes in ten seconds when more is offered, over the range of rates, frame
/// lengths and times between two rounds.
#[test]
fn accurate_from_a_megabit_to_a_hundred_gigabits() {
    println!("{:>16} {:>8} {:>10} {:>12}", "bit/s", "frame", "tick ns", "off by");
    for bits in [1_000_000, 7_777_777, 100_000_000, 1_000_000_000, 10_000_000_000, 100_000_000_000]
    {
        for length in [60_usize, 1518, 68_000] {
            // Idle rounds, a sleepy worker, and a prime.
            for tick in [1_000_000_u64, 99_991, 1_009] {
                let mut policer = Policer::new(rate(bits, None), 0);
                // The burst of the start is no part of the rate.
                while policer.admit(&UNICAST, || length).is_ok() {}
                let window = 10 * SECOND;
                // A window a thousandth as long tells as much where it has frames enough.
                let frames =
                    u128::from(bits) * u128::from(window) / 8 / SECOND as u128 / length as u128;
                let window = if frames > 1_000_000 { window / 1000 } else { window };
                // Rounds in which nothing can pass change nothing: skipped.
                let wait = length as u64 * 8 * SECOND / bits / 4;
                let tick = tick * (wait / tick).max(1);
                let (mut now, mut passed) = (0, 0_u128);
                while now < window {
                    now += tick;
                    policer.refill(now);
                    while policer.admit(&UNICAST, || length).is_ok() {
                        passed += length as u128;
                    }
                }
                let expected =
                    f64::from(u32::try_from(bits / 1000).unwrap()) * 1e3 / 8e9 * now as f64;
                let off = passed as f64 / expected - 1.0;
                println!("{bits:>16} {length:>8} {tick:>10} {:>11.3}%", off * 100.0);
                // The last frame may be under way: at a megabit, 18 super-frames pass.
                let allowed = f64::max(0.02, length as f64 / expected);
                assert!(off.abs() < allowed, "{bits} bit/s, {length} bytes, {tick} ns: {off}");
            }
        }
    }
}

#[test]
fn addresses_come_before_storms_and_storms_before_rates() {
    let mac = [2, 0, 0, 0, 0, 1];
    let rule = PoliceRule {
        rate: Rate::new(1_000, None),
        storm: Storm::new(1),
        macs: [[2, 0, 0, 0, 0, 9], mac].into_iter().collect(),
    };
    let mut policer = Policer::new(rule.clone(), 0);
    let mut spoofed = MULTICAST;
    spoofed[11] = 2;
    for _ in 0..1000 {
        assert_eq!(pass(&mut policer, 0, &spoofed, 80_000), Err(DropReason::SpoofedMac));
    }
    // None of those took anything.
    for _ in 0..10 {
        assert_eq!(pass(&mut policer, 0, &BROADCAST, 8_000), Ok(()));
    }
    assert_eq!(pass(&mut policer, 0, &MULTICAST, 8_000), Err(DropReason::StormLimited));
    assert_eq!(pass(&mut policer, 0, &UNICAST, 8_000), Err(DropReason::RateLimited));
    assert_eq!(pass(&mut policer, 0, &[], 8_000), Err(DropReason::SpoofedMac));
    assert!(!rule.is_empty() && PoliceRule::default().is_empty());
}

#[test]
fn the_fill_survives_another_rule() {
    let drained = |rule: &PoliceRule| {
        let mut policer = Policer::new(rule.clone(), 0);
        while policer.admit(&MULTICAST, || 1000).is_ok() {}
        policer
    };
    let both = |bits, frames| PoliceRule { storm: storm(frames).storm, ..rate(bits, None) };
    let old = both(1_000_000, 1_000_000);
    for new in [old.clone(), both(10_000_000_000, 1_000_000), both(1_000, 1)] {
        let mut policer = drained(&old);
        policer.follow(&new, 0);
        assert_eq!(pass(&mut policer, 0, &UNICAST, 1000), Err(DropReason::RateLimited));
    }
    // A limit there was not starts full, beside one that was.
    let mut policer = drained(&rate(1_000_000, None));
    policer.follow(&both(1_000_000, 5), 0);
    assert_eq!(pass(&mut policer, 0, &MULTICAST, 1000), Err(DropReason::RateLimited));
    policer.follow(&storm(5), 0);
    let passed = (0..100).filter(|_| policer.admit(&MULTICAST, || 1000).is_ok()).count();
    assert_eq!(passed, 9, "one of ten was taken by the frame over the rate");
}

#[test]
fn a_burst_nobody_chose_fits_a_super_frame() {
    for (bits, expected) in [
        (1_000, 80_000),
        (1_000_000, 80_000),
        (100_000_000, 2_500_000),
        (10_000_000_000, 250_000_000),
        (1_000_000_000_000, 1_000_000_000),
    ] {
        assert_eq!(Rate::new(bits, None).unwrap().burst_bytes(), expected, "{bits} bit/s");
    }
    assert_eq!(Rate::new(999, None), None);
    assert_eq!(Rate::new(1_000, Some(79_999)), None);
    assert_eq!(Rate::new(1_000_000_000_001, None), None);
    assert_eq!(Rate::new(1_000, Some(1_000_000_001)), None);
    assert_eq!(Storm::new(0), None);
    assert_eq!(Storm::new(5).unwrap().burst_frames(), 10);
    assert_eq!(Storm::new(1000).unwrap().burst_frames(), 100);
}
