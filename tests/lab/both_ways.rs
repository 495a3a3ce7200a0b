//! Numbered frames both ways through one port, each checked to arrive once and in
//! order, while something happens to the switch.

use super::frames::{Frame, TagBytes};
use super::{Daemon, Lab, RawGuest, Summary, eventually, in_time};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Frames on their way at most, each way: no queue is the reason for a loss, and rings
/// hold them while nobody forwards.
pub const WINDOW: u64 = 500;
/// Slots of a port's ring, the smaller one.
const RING: u64 = 2048;
/// How often a sender looks whether frames have arrived before it lets go of its processor,
/// and for how long.
const TURNS: u32 = 100;
const PAUSE: Duration = Duration::from_micros(100);
/// After which silence nothing more is expected.
const PATIENCE: Duration = Duration::from_secs(2);

/// How many frames have arrived so far.
#[derive(Default)]
pub struct Arrived {
    down: AtomicU64,
    up: AtomicU64,
}

impl Arrived {
    /// At the guest, and at the wire.
    pub fn now(&self) -> [u64; 2] {
        [self.down.load(Ordering::Relaxed), self.up.load(Ordering::Relaxed)]
    }
}

impl Arrived {
    /// Waits until frames flow on both ways.
    pub fn flows(&self) {
        assert!(self.do_flow(), "frames stand still: {:?} arrived", self.now());
    }

    /// The same through this daemon, which otherwise says what it has counted.
    pub fn flows_through(&self, daemon: &Daemon) {
        if !self.do_flow() {
            let (arrived, counted) = (self.now(), daemon.summary());
            panic!("frames stand still: {arrived:?} arrived, {counted:#?}, {:#?}", daemon.stderr());
        }
    }

    fn do_flow(&self) -> bool {
        let before = self.now();
        let flow = || {
            let now = self.now();
            (now[0] > before[0] && now[1] > before[1]).then_some(())
        };
        in_time(Duration::from_millis(3), flow).is_some()
    }
}

/// Microseconds frames had to wait, as the daemon that goes on says.
pub fn gap(daemon: &Daemon) -> u64 {
    let line = eventually("it says that it has taken over", || {
        daemon.stderr().into_iter().find(|line| line.contains("frames waited for"))
    });
    let words = line.split("frames waited for ").nth(1).unwrap();
    words.split(' ').next().unwrap().parse().unwrap()
}

/// Shows how long frames had to wait, beside how long the ring of a port holds them.
pub fn print_gaps(mut gaps: Vec<u64>, sent: [u64; 2], rate: f64) {
    gaps.sort_unstable();
    let share = |share: f64| gaps[(gaps.len() as f64 * share).ceil() as usize - 1];
    let way = |number: usize| rate * sent[number] as f64 / (sent[0] + sent[1]) as f64;
    println!(
        "{} restarts at {:.0} and {:.0} frames a second: gap in us: median {}, p99 {}, longest {}; \
         a port's ring holds {:.0} us of 100000 frames a second",
        gaps.len(),
        way(0),
        way(1),
        share(0.5),
        share(0.99),
        share(1.0),
        RING as f64 * 1e6 / 100_000.0
    );
}

/// Sends as fast as frames arrive while `meanwhile` runs; the guest's frames bear `tag`
/// on the wire. Returns how many frames went each way, and how many a second in all.
pub fn both_ways(
    lab: &Lab,
    guest: &RawGuest,
    tag: TagBytes,
    meanwhile: impl FnOnce(&Arrived),
) -> ([u64; 2], f64) {
    both_ways_shared(lab, guest, tag, Order::Kept, |arrived| meanwhile(arrived))
}

/// The same where a frame may overtake another: each must arrive once. Returns how many
/// frames went each way.
pub fn each_once(
    lab: &Lab,
    guest: &RawGuest,
    tag: TagBytes,
    meanwhile: impl FnOnce(&Arrived),
) -> [u64; 2] {
    both_ways_shared(lab, guest, tag, Order::Any, |arrived| meanwhile(arrived)).0
}

/// In what order frames may arrive.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    Kept,
    Any,
}

fn both_ways_shared(
    lab: &Lab,
    guest: &RawGuest,
    tag: TagBytes,
    order: Order,
    meanwhile: impl FnOnce(&Arc<Arrived>),
) -> ([u64; 2], f64) {
    let wire = lab.wire();
    if [0x8100, 0x88a8].contains(&tag.tpid) {
        wire.only_vid(tag.vid);
    }
    let (stop, arrived) = (AtomicBool::new(false), Arc::<Arrived>::default());
    let begin = Instant::now();
    let send = |arrived: &AtomicU64, send: &dyn Fn(u64)| {
        let (mut number, mut turns) = (0, 0);
        while !stop.load(Ordering::Relaxed) {
            if number - arrived.load(Ordering::Relaxed) < WINDOW {
                number += 1;
                turns = 0;
                send(number);
            } else if turns < TURNS {
                turns += 1;
                std::thread::yield_now();
            } else {
                // Nobody forwards: whoever is about to needs a processor.
                std::thread::sleep(PAUSE);
            }
        }
        number
    };
    let receive =
        |arrived: &AtomicU64, receive: &dyn Fn() -> Option<Vec<u8>>, tags: &[TagBytes]| {
            let mut numbers = Vec::new();
            loop {
                let Some(bytes) = receive() else {
                    // A silence before the end is a gap, however long a busy machine makes it.
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    continue;
                };
                let frame = Frame::read(&bytes);
                // Other ports' frames on the wire.
                if frame.tags.first().is_some_and(|other| other.vid != tag.vid) {
                    continue;
                }
                let expected = arrived.load(Ordering::Relaxed) + 1;
                let number = if order == Order::Kept { expected } else { frame.number() };
                assert_eq!((frame.number(), &frame.tags[..]), (number, tags));
                numbers.push(number);
                arrived.store(expected, Ordering::Relaxed);
            }
            numbers.sort_unstable();
            let twice = numbers.windows(2).find(|two| two[0] == two[1]);
            assert_eq!(twice, None, "a frame arrived twice");
        };
    let (wire, arrived) = (&wire, &arrived);
    let sent = std::thread::scope(|scope| {
        let senders = [
            scope.spawn(|| send(&arrived.down, &|n| wire.send(&Frame::numbered(n).tags(&[tag])))),
            scope.spawn(|| send(&arrived.up, &|n| guest.send(&Frame::numbered(n).reversed()))),
        ];
        let receivers = [
            scope.spawn(|| receive(&arrived.down, &|| guest.receive_within(PATIENCE), &[])),
            scope.spawn(|| receive(&arrived.up, &|| wire.receive_within(PATIENCE), &[tag])),
        ];
        // Stopped also when `meanwhile` panics: a scope waits for its threads.
        struct Stop<'s>(&'s AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let stopping = Stop(&stop);
        meanwhile(arrived);
        drop(stopping);
        let sent = senders.map(|sender| sender.join().unwrap());
        for receiver in receivers {
            receiver.join().unwrap();
        }
        sent
    });
    assert_eq!(arrived.now(), sent, "arrived and sent, to the guest and from it");
    let seconds = (begin.elapsed() - PATIENCE).as_secs_f64();
    (sent, (sent[0] + sent[1]) as f64 / seconds)
}

/// The same through two ports. Returns how many frames went each way through each, and how
/// many a second in all.
pub fn both_ways_twice(
    lab: &Lab,
    guests: [(&RawGuest, TagBytes); 2],
    meanwhile: impl FnOnce([&Arrived; 2]),
) -> ([[u64; 2]; 2], f64) {
    let over = AtomicBool::new(false);
    struct Over<'o>(&'o AtomicBool);
    impl Drop for Over<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let (lend, lent) = std::sync::mpsc::channel::<Arc<Arrived>>();
    std::thread::scope(|scope| {
        let (guest, tag) = guests[1];
        let over = &over;
        let second = scope.spawn(move || {
            let wait = |arrived: &Arc<Arrived>| {
                lend.send(Arc::clone(arrived)).unwrap();
                while !over.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            };
            both_ways_shared(lab, guest, tag, Order::Kept, wait)
        });
        let (guest, tag) = guests[0];
        let (first, rate) = both_ways(lab, guest, tag, |arrived| {
            let _over = Over(over);
            let other = lent.recv().unwrap();
            meanwhile([arrived, &other]);
        });
        let (second, other_rate) = second.join().unwrap();
        ([first, second], rate + other_rate)
    })
}

/// What went through two ports, each way.
pub fn sum(sent: [[u64; 2]; 2]) -> [u64; 2] {
    let [one, other] = sent;
    [one[0] + other[0], one[1] + other[1]]
}

/// Fails the test unless the daemon has counted what went through two ports, and no drop.
pub fn assert_counted(summary: &Summary, ports: [(&str, [u64; 2]); 2]) {
    for (name, [to_guest, from_guest]) in ports {
        let port = summary.port(name);
        let counted = [port.to_guest.in_frames, port.from_guest.in_frames];
        assert_eq!(counted, [to_guest, from_guest], "{name}");
        let drops = [port.to_guest.all_drops(), port.from_guest.all_drops()];
        assert_eq!(drops, [0, 0], "{name}: {port:?}");
    }
    assert_eq!(summary.from_wire.all_drops(), 0, "{:?}", summary.from_wire);
    let [_, from_guests] = sum(ports.map(|(_, sent)| sent));
    assert_eq!(summary.to_wire.out_frames, from_guests);
}
