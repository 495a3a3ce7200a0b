//! Micro-benches of the pure core and of a worker between devices in memory.
//!
//! ```text
//! cargo bench --bench micro
//! ```

#![allow(missing_docs, reason = "criterion's macros make public functions")]
#![allow(clippy::expect_used, reason = "a bench that cannot be set up has nothing to go on with")]

mod in_memory;

use std::hint::black_box;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use in_memory::{Bed, CASES, FRAMES};
use nix::time::{ClockId, clock_gettime};
use vlanswitchd::frame::edit::HEADROOM;
use vlanswitchd::frame::{FrameBuffer, Pcp, Tag, TagEdit, TagStack, Tci, Tpid, Vid};
use vlanswitchd::switch::{Membership, Priority, Table, Vlans};

fn vid(number: u16) -> Vid {
    Vid::new(number).expect("a legal VID")
}

fn tag(number: u16) -> Tag {
    Tag { tpid: Tpid::Customer, tci: Tci::new(vid(number), Pcp::default()) }
}

fn frame(tags: &[Tag]) -> Vec<u8> {
    let mut frame = vec![2; 12];
    frame.extend(tags.iter().flat_map(|tag| tag.to_bytes()));
    frame.extend([0x88, 0xb5]);
    frame.resize(60 + 4 * tags.len(), 0x5a);
    frame
}

fn member(vlans: Vlans) -> Membership {
    Membership::new(vlans, None, None, Tpid::Customer, None, Priority::Fixed(Pcp::default()))
        .expect("a legal membership")
}

/// Both decisions for the frames that matter, in a table of a thousand ports and more.
fn decide(criterion: &mut Criterion) {
    let mut members: Vec<Membership> =
        (1..=1000).map(|number| member(Vlans::One(vid(number)))).collect();
    let pair = members.len();
    members.push(member(Vlans::Double { outer: vid(2000), inner: vid(20) }));
    let trunk = members.len();
    members.push(member(Vlans::List((3000..3100).map(vid).collect())));
    let table = Table::compile(&members).expect("no VLAN is claimed twice");
    let tags = |stripped: Option<Tag>, in_band: &[Tag]| {
        TagStack::read(stripped, &frame(in_band)).expect("whole frames")
    };

    let mut group = criterion.benchmark_group("decide");
    for (name, tags) in [
        ("uplink-one-of-1000", tags(Some(tag(777)), &[])),
        ("uplink-pair", tags(Some(tag(2000)), &[tag(20)])),
        ("uplink-unmapped", tags(Some(tag(4000)), &[])),
        ("uplink-untagged", tags(None, &[])),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| table.decide_from_uplink(black_box(&tags)))
        });
    }
    for (name, port, tags) in [
        ("guest-tunnel-untagged", 776, tags(None, &[])),
        ("guest-tunnel-tagged", 776, tags(Some(tag(5)), &[])),
        ("guest-pair", pair, tags(None, &[])),
        ("guest-trunk", trunk, tags(Some(tag(3050)), &[])),
    ] {
        group.bench_function(name, |bencher| {
            bencher.iter(|| table.decide_from_guest(black_box(port), black_box(&tags)));
        });
    }
    let bytes = frame(&[tag(20)]);
    group.bench_function("read-two-tags", |bencher| {
        bencher.iter(|| TagStack::read(black_box(Some(tag(101))), black_box(&bytes)));
    });
    group.finish();
}

/// The tag edit where the frame lies.
fn edit(criterion: &mut Criterion) {
    let push = |first, second| TagEdit { pop: 0, push: [first, second] };
    let mut group = criterion.benchmark_group("edit");
    for (name, stripped, in_band, edit) in [
        ("push-one", None, vec![], push(Some(tag(101)), None)),
        ("push-two", None, vec![], push(Some(tag(101)), Some(tag(20)))),
        ("push-over-stripped", Some(tag(5)), vec![], push(Some(tag(101)), None)),
        ("pop-stripped", Some(tag(101)), vec![], TagEdit { pop: 1, ..TagEdit::default() }),
        ("pop-in-band", None, vec![tag(101)], TagEdit { pop: 1, ..TagEdit::default() }),
        ("put-back", Some(tag(101)), vec![], TagEdit::default()),
    ] {
        let mut space = vec![0; HEADROOM];
        space.extend(frame(&in_band));
        group.bench_function(name, |bencher| {
            bencher.iter_batched_ref(
                || space.clone(),
                |space| {
                    let mut buffer = FrameBuffer::new(space, HEADROOM).expect("there is headroom");
                    buffer.apply(black_box(&edit), black_box(stripped))
                },
                BatchSize::SmallInput,
            );
        });
    }
    group.finish();
}

/// A burst's whole way through the worker; figures are per frame.
fn worker(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("worker");
    group.throughput(Throughput::Elements(FRAMES as u64));
    for case in CASES {
        let mut bed = Bed::new(case, usize::MAX).expect("the worker starts");
        let mut bursts = 0;
        group.bench_function(case.name, |bencher| {
            bencher.iter(|| {
                bursts += 1;
                bed.round()
            });
        });
        bed.check(bursts).expect("every frame is forwarded");
    }
    group.finish();
}

/// How long a thread has had a processor.
fn processor_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("the kernel counts it").into()
}

/// Workers side by side, each with ports of its own, on a thread of its own: what they
/// lose to each other is what they share. Frames a second of all together. More workers
/// than processors are a simulation: they take turns, and what counts is the processor time
/// of the slowest, as if each had one of its own.
fn shards(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("shards");
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    for workers in [1, 2, 4, 8, 16, 32] {
        let is_simulated = workers > cpus;
        let name = if is_simulated { format!("{workers} simulated") } else { workers.to_string() };
        group.throughput(Throughput::Elements((workers * FRAMES) as u64));
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|bursts| {
                let beds = (0..workers).map(|_| Bed::new(CASES[0], usize::MAX));
                let beds: Vec<Bed> = beds.map(|bed| bed.expect("the worker starts")).collect();
                let start = Barrier::new(workers);
                let run = |mut bed: Bed| {
                    start.wait();
                    let (begin, used) = (Instant::now(), processor_time());
                    for _ in 0..bursts {
                        bed.round();
                    }
                    let taken = if is_simulated {
                        processor_time().saturating_sub(used)
                    } else {
                        begin.elapsed()
                    };
                    bed.check(bursts as usize).expect("every frame is forwarded");
                    taken
                };
                std::thread::scope(|scope| {
                    let threads: Vec<_> =
                        beds.into_iter().map(|bed| scope.spawn(|| run(bed))).collect();
                    let times = threads.into_iter().map(|thread| thread.join().expect("it runs"));
                    times.max().unwrap_or_default()
                })
            });
        });
    }
    group.finish();
}

criterion_group!(benches, decide, edit, worker, shards);
criterion_main!(benches);
