//! The steady state allocates nothing: a counting allocator around a worker that
//! moves every kind of frame between in-memory devices.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    unsafe_code,
    reason = "tests fail by panicking; a global allocator is unsafe by nature"
)]

use nix::errno::Errno;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vlanswitchd::control::mapping;
use vlanswitchd::dataplane::{
    Abilities, Place, PollMode, PortShared, SNAPLEN_MAX, Selection, Sink, Source, UplinkShared,
    Worker, capture,
};
use vlanswitchd::frame::vnet::{FLAG_NEEDS_CSUM, GSO_TCPV4};
use vlanswitchd::frame::{Tag, Tci, Tpid, VnetHeader};
use vlanswitchd::port::{Device, DeviceState, MemoryPort};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes on to the system allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn allocations() -> u64 {
    ALLOCATIONS.with(Cell::get)
}

const PORTS: usize = 4;
const ROUNDS: usize = 500;

fn frame(ethertype: u16, payload: usize) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    frame.extend(ethertype.to_be_bytes());
    frame.resize(14 + payload, 0x5a);
    frame
}

/// TCP over IPv4 with four segments of 1000 bytes.
fn super_frame() -> (Vec<u8>, VnetHeader) {
    let mut frame = frame(0x0800, 40 + 4000);
    frame[14..34].copy_from_slice(&[
        0x45, 0, 0x0f, 0xc8, 0, 1, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2,
    ]);
    frame[34 + 12] = 0x50;
    let header = VnetHeader {
        flags: FLAG_NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1000,
        csum_start: 34,
        csum_offset: 16,
    };
    (frame, header)
}

fn guest() -> MemoryPort {
    let mut port = MemoryPort::default();
    port.add(&frame(0x86dd, 46), None, VnetHeader::default());
    port.add(&frame(0x9100, 1500), None, VnetHeader::default());
    // What GRO makes of a tunnel: the checksum starts at no outer TCP header.
    let (bytes, header) = super_frame();
    port.add(&bytes, None, header);
    port.add(&bytes, None, VnetHeader { csum_start: 38, ..header });
    port
}

#[test]
fn the_steady_state_allocates_nothing() {
    steady_state(&mut []);
}

/// With as many captures as there can be: of everything and of drops only, each read
/// and not read, so that frames are missed in the end.
#[test]
fn captures_allocate_nothing() {
    let all = Selection { place: Place::Everywhere, drops_only: false };
    let drops = Selection { place: Place::Port(1), drops_only: true };
    let mut ends: Vec<_> = [all, drops, all, drops]
        .into_iter()
        .map(|selection| {
            let (sink, source) = capture(selection, SNAPLEN_MAX, PORTS);
            (Some(Box::new(sink)), source)
        })
        .collect();
    let read = steady_state(&mut ends);
    assert!(read > ROUNDS as u64, "{read} records were read");
    let missed: Vec<u64> = ends.iter().map(|(_, source)| source.missed_in_all()).collect();
    assert!(missed[0] == 0 && missed[2] > 0, "{missed:?}");
}

/// Runs a worker until its devices have no more frames; returns how many records
/// the first two captures saw.
fn steady_state(captures: &mut [(Option<Box<Sink>>, Source)]) -> u64 {
    let map = |port| mapping::argument(&format!("{}=t{port}", 101 + port)).unwrap();
    let specs: Vec<_> = (0..PORTS).map(map).collect();
    let (_, table) = mapping::build_all(&specs, None, Tpid::Customer).unwrap();
    let shared: Vec<Arc<PortShared>> = (0..PORTS).map(|_| Arc::default()).collect();
    let uplink_shared = Arc::<UplinkShared>::default();
    uplink_shared.link.set(DeviceState::Up, 1500);
    // Tagged super-frames are cut in userspace, the longest way a frame can take.
    let abilities = Abilities { tagged_gso: false, udp_gso: false };
    let (mut worker, _commands, _departed) = Worker::new(
        Arc::new(table),
        Arc::clone(&uplink_shared),
        shared.iter().map(Arc::clone),
        abilities,
        PollMode::Busy,
    )
    .unwrap();

    let mut uplink = MemoryPort::default();
    for vid in 100..100 + PORTS as u16 + 2 {
        for _ in 0..4 {
            let tag = Tag { tpid: Tpid::Customer, tci: Tci(vid) };
            uplink.add(&frame(0x0800, 46), Some(tag), VnetHeader::default());
        }
    }
    uplink.replay(ROUNDS);
    worker.attach(None, Box::new(Device::Memory(uplink)));
    for (port, shared) in shared.iter().enumerate() {
        shared.link.set(DeviceState::Up, 65521);
        let mut device = guest();
        device.replay(ROUNDS);
        // A guest that stops reading, so that shedding is on the way too.
        device.refusals = vec![None, Some(Errno::ENOBUFS), Some(Errno::EMSGSIZE)];
        worker.attach(Some(port), Box::new(Device::Memory(device)));
    }
    for (sink, _) in captures.iter_mut() {
        worker.capture(sink.take().unwrap());
    }
    assert!(worker.round(Instant::now()), "the first round moves frames");

    let before = allocations();
    let mut rounds = 1;
    let mut records = 0;
    while worker.round(Instant::now()) {
        rounds += 1;
        for (_, source) in captures.iter().take(2) {
            while !source.is_empty() {
                let chunk = source.receive(Duration::ZERO).unwrap();
                records += chunk.records().count() as u64;
                source.give_back(chunk);
            }
        }
    }
    let allocated = allocations() - before;

    assert_eq!(rounds, ROUNDS);
    assert_eq!(allocated, 0, "allocations in {ROUNDS} rounds");
    let mut cut = 0;
    for port in &shared {
        let from_guest = port.from_guest.snapshot();
        assert_eq!(from_guest.in_frames, 4 * ROUNDS as u64);
        assert_eq!(
            from_guest.in_frames + from_guest.split_frames,
            from_guest.out_frames + from_guest.dropped()
        );
        cut += from_guest.split_frames;
        let to_guest = port.to_guest.snapshot();
        assert_eq!(to_guest.in_frames, 4 * ROUNDS as u64);
        assert_eq!(to_guest.in_frames, to_guest.out_frames + to_guest.dropped());
        assert!(to_guest.dropped() >= 2);
    }
    assert!(cut > 0, "nothing was cut in userspace");
    let from_wire = uplink_shared.from_wire.snapshot();
    assert_eq!(from_wire.in_frames, ((PORTS + 2) * 4 * ROUNDS) as u64);
    assert_eq!(from_wire.in_frames, from_wire.out_frames + from_wire.dropped());
    assert_eq!(from_wire.dropped(), (2 * 4 * ROUNDS) as u64);
    records
}
