//! Faults of devices and of the kernel's calls: whatever is refused, cut short, lost or
//! gone, each frame is accounted for, arrives once at most, and in order.
//!
//! Three ways lead there. Random sequences of faults on a worker between devices in
//! memory, judged by what was put in and what came out. The tables of docs/faults.md,
//! row by row, on those devices. And the same rows on real sockets, with errors put in
//! at the system call by a seccomp listener, so that nothing stands between the test's
//! error and the code that meets the kernel's.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

#[path = "faults/bed.rs"]
mod bed;
#[path = "faults/injector.rs"]
mod injector;
#[path = "faults/real.rs"]
mod real;
#[path = "faults/table.rs"]
mod table;

use bed::{Bed, Operation, PORTS, Place};
use nix::errno::Errno;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::test_runner::{Config, TestRunner};
use vlanswitchd::port::{Answer, DeviceState};
use vlanswitchd::switch::DropReason;

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![Just(None), (0..PORTS).prop_map(Some)]
}

fn answer() -> impl Strategy<Value = Answer> {
    let errnos: Vec<Errno> = table::sends().iter().map(|row| row.errno).collect();
    let gone = vec![Errno::ENXIO, Errno::ENODEV, Errno::ENETDOWN];
    prop_oneof![
        8 => Just(Answer::Take),
        2 => Just(Answer::Stop),
        4 => select(errnos).prop_map(Answer::Refuse),
        1 => select(gone).prop_map(Answer::Leave),
    ]
}

fn state() -> impl Strategy<Value = DeviceState> {
    use DeviceState::{Absent, Down, NoCarrier, Up};
    // Mostly up, or nothing but `uplink_down` is tested.
    select(vec![Up, Up, Up, Up, NoCarrier, Down, Absent])
}

fn operation() -> impl Strategy<Value = Operation> {
    prop_oneof![
        8 => (place(), 0..bed::KINDS, 1..80u16)
            .prop_map(|(place, kind, count)| Operation::Arrive { place, kind, count }),
        2 => (place(), 1..4u8).prop_map(|(place, count)| Operation::Lose { place, count }),
        1 => place().prop_map(Operation::Pause),
        1 => (place(), 1..9u8).prop_map(|(place, count)| Operation::Overrun { place, count }),
        12 => (1..4u8).prop_map(Operation::Rounds),
        3 => (1..200u16).prop_map(|microseconds| Operation::Wait { microseconds }),
        6 => (place(), prop::collection::vec(answer(), 1..40))
            .prop_map(|(place, answers)| Operation::Answers { place, answers }),
        3 => (place(), state()).prop_map(|(place, state)| Operation::Link { place, state }),
        2 => place().prop_map(Operation::Detach),
        4 => place().prop_map(Operation::Attach),
        2 => (0..bed::TABLES).prop_map(Operation::Switch),
        1 => (0..PORTS).prop_map(Operation::Replace),
        1 => (place(), any::<bool>()).prop_map(|(place, drops)| Operation::Capture { place, drops }),
    ]
}

/// A thousand sequences of up to sixty faults and frames. A failure prints the shortest
/// sequence that shows it.
#[test]
fn random_faults_keep_the_books() {
    let config = Config { cases: 1000, failure_persistence: None, ..Config::default() };
    let seen = std::cell::RefCell::new(bed::Seen::default());
    TestRunner::new(config)
        .run(&prop::collection::vec(operation(), 1..60), |operations| {
            let mut bed = Bed::new();
            for operation in &operations {
                bed.apply(operation);
            }
            seen.borrow_mut().add(&bed.finish());
            Ok(())
        })
        .unwrap_or_else(|failure| panic!("{failure}"));
    let seen = seen.into_inner();
    println!("{seen:?}");
    // A run in which nothing happened would show nothing.
    assert!(seen.delivered > 30_000, "{seen:?}");
    assert!(seen.split > 1000, "{seen:?}");
    // Between several workers only, and not counted by one of them: tests/workers.rs.
    let reasons = DropReason::ALL.into_iter().filter(|one| *one != DropReason::WrongWorker);
    for reason in reasons {
        assert!(seen.drops(reason) > 0, "{reason:?} never happened: {seen:?}");
    }
}

/// Each error of a send, at each position of a burst, each way: counted for that frame
/// under the documented reason, and the frames behind it go out or, when the queue is
/// full, are dropped with it.
#[test]
fn each_error_of_a_send_is_counted_as_documented() {
    const BURST: usize = 64;
    for row in table::sends() {
        for position in [0, 1, 31, 63] {
            for (place, reason) in [(Some(0), row.to_guest), (None, row.to_wire)] {
                let mut bed = Bed::new();
                let mut answers = vec![Answer::Take; position];
                answers.push(Answer::Refuse(row.errno));
                bed.apply(&Operation::Answers { place, answers });
                // To port 0 from the wire, or from its guest.
                let from = if place.is_some() { None } else { Some(0) };
                bed.arrive_for(from, 0, BURST as u16);
                bed.apply(&Operation::Rounds(1));
                let whole_rest =
                    [DropReason::GuestQueueFull, DropReason::UplinkQueueFull].contains(&reason);
                let lost = if whole_rest { BURST - position } else { 1 };
                let seen = bed.finish();
                let what = format!("{:?} at {position} toward {place:?}: {seen:?}", row.errno);
                assert_eq!(seen.drops(reason), lost as u64, "{what}");
                assert_eq!(seen.all_drops(), lost as u64, "{what}");
                assert_eq!(seen.delivered, (BURST - lost) as u64, "{what}");
                let noted = (reason == DropReason::SendFailed).then_some(row.errno);
                assert_eq!(seen.send_error, noted, "{what}");
            }
        }
    }
}

/// A call that took a part without a word is continued behind it.
#[test]
fn a_send_cut_short_goes_on_behind() {
    for stops in [vec![1], vec![63], vec![1, 2, 3], (1..64).collect::<Vec<_>>()] {
        let mut bed = Bed::new();
        let answers = (0..64usize).flat_map(|at| {
            let stop = stops.contains(&at).then_some(Answer::Stop);
            stop.into_iter().chain([Answer::Take])
        });
        bed.apply(&Operation::Answers { place: Some(0), answers: answers.collect() });
        bed.arrive_for(None, 0, 64);
        bed.apply(&Operation::Rounds(1));
        let seen = bed.finish();
        assert_eq!((seen.delivered, seen.all_drops()), (64, 0), "{stops:?}: {seen:?}");
    }
}

/// A device that goes in the middle of a burst: what is behind is counted as absent,
/// also in the segments of a super-frame, and another one under its name goes on.
#[test]
fn a_device_that_goes_in_a_burst_is_followed_by_the_next() {
    for (place, reason) in [(Some(0), DropReason::GuestAbsent), (None, DropReason::UplinkDown)] {
        for kind in [bed::PLAIN, bed::CUT] {
            let mut bed = Bed::new();
            let answers = vec![Answer::Take, Answer::Take, Answer::Leave(Errno::ENXIO)];
            bed.apply(&Operation::Answers { place, answers });
            let from = if place.is_some() { None } else { Some(0) };
            bed.arrive_kind(from, 0, kind, 10);
            bed.apply(&Operation::Rounds(1));
            bed.apply(&Operation::Detach(place));
            bed.arrive_kind(from, 0, kind, 5);
            bed.apply(&Operation::Rounds(1));
            bed.apply(&Operation::Attach(place));
            bed.arrive_kind(from, 0, kind, 10);
            bed.apply(&Operation::Rounds(1));
            let seen = bed.finish();
            let each = if kind == bed::CUT { bed::SEGMENTS } else { 1 };
            assert_eq!(seen.delivered, 2 + 10 * each, "{place:?} {kind}: {seen:?}");
            // While it is away a super-frame is not cut.
            assert_eq!(seen.drops(reason), 10 * each - 2 + 5, "{place:?} {kind}: {seen:?}");
            assert_eq!(seen.all_drops(), seen.drops(reason));
        }
    }
}
