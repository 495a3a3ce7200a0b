//! Captures from the worker's loop to the file, with tshark as the judge of the
//! file: a worker moves frames between devices in memory, a session writes what it
//! sees.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::tshark::{hex, tshark};
use nix::errno::Errno;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, pipe};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command as Process, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};
use vlanswitchd::control::capture::expression::compile;
use vlanswitchd::control::capture::filter::Program;
use vlanswitchd::control::capture::{End, Names, Options, Session, Summary};
use vlanswitchd::control::mapping;
use vlanswitchd::dataplane::{
    Abilities, Command, Place, PollMode, PortShared, SNAPLEN_MAX, Selection, UplinkShared, Worker,
    WorkerHandle, capture,
};
use vlanswitchd::frame::vnet::{FLAG_NEEDS_CSUM, GSO_TCPV4};
use vlanswitchd::frame::{Tag, Tci, Tpid, VnetHeader};
use vlanswitchd::port::{Device, DeviceState, MemoryPort};

const TUNNEL: usize = 0;
const ACCESS: usize = 1;
const EVERYTHING: Selection = Selection { place: Place::Everywhere, drops_only: false };
const DEADLINE: Duration = Duration::from_secs(10);

/// A worker on its thread, with two ports and nothing attached yet.
struct Bed {
    worker: Option<WorkerHandle>,
    ports: Vec<Arc<PortShared>>,
    uplink: Arc<UplinkShared>,
    names: Names,
    /// Each worker spins; several at once would only starve each other.
    _turn: MutexGuard<'static, ()>,
}

static TURN: Mutex<()> = Mutex::new(());

impl Bed {
    fn new() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let maps = ["101=web", "102=mail,mode=access,tpid=0x88a8"];
        let specs = maps.map(|map| mapping::argument(map).unwrap());
        let (_, table) = mapping::build_all(&specs, None, Tpid::Customer).unwrap();
        let ports: Vec<Arc<PortShared>> = (0..2).map(|_| Arc::default()).collect();
        let uplink = Arc::<UplinkShared>::default();
        uplink.link.set(DeviceState::Up, 1500);
        for port in &ports {
            port.link.set(DeviceState::Up, 1500);
        }
        let abilities = Abilities { tagged_gso: false, udp_gso: true };
        let (worker, commands, departed) = Worker::new(
            Arc::new(table),
            Arc::clone(&uplink),
            ports.iter().map(Arc::clone),
            abilities,
            PollMode::Busy,
        )
        .unwrap();
        let worker = worker.spawn(commands, departed, || {}).unwrap();
        let names = Names::default();
        for (interface, name) in [(None, "eth0"), (Some(TUNNEL), "web"), (Some(ACCESS), "mail")] {
            names.set(interface, name);
        }
        Self { worker: Some(worker), ports, uplink, names, _turn: turn }
    }

    fn send(&self, command: Command) {
        self.worker.as_ref().unwrap().send(command);
    }

    fn session(
        &self,
        selection: Selection,
        change: impl FnOnce(&mut Options),
        output: OwnedFd,
    ) -> Session {
        let (sink, source) = capture(selection, SNAPLEN_MAX, 2);
        let mut options = Options {
            place: selection.place,
            filter: None,
            snaplen: SNAPLEN_MAX as u32,
            limit: None,
            several_workers: false,
        };
        change(&mut options);
        self.send(Command::Capture(Box::new(sink)));
        let prepared = Session::prepare(source, self.names.clone(), options).unwrap();
        prepared.start(File::from(output))
    }

    /// Attaches devices that replay their frames once: both ports', then the
    /// uplink's, and waits until all have been counted.
    fn run(&self, tunnel: MemoryPort, access: MemoryPort, uplink: MemoryPort, frames: [u64; 3]) {
        let before = self.counts();
        for (port, mut device) in [(Some(TUNNEL), tunnel), (Some(ACCESS), access), (None, uplink)] {
            device.replay(1);
            self.send(Command::Attach(vec![(port, Box::new(Device::Memory(device)))]));
        }
        wait("all frames", || {
            let counts = self.counts();
            (0..3).all(|at| counts[at] == before[at] + frames[at])
        });
    }

    fn counts(&self) -> [u64; 3] {
        [
            self.ports[TUNNEL].from_guest.snapshot().in_frames,
            self.ports[ACCESS].from_guest.snapshot().in_frames,
            self.uplink.from_wire.snapshot().in_frames,
        ]
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.finish();
        }
    }
}

fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !done() {
        assert!(Instant::now() < deadline, "no {what} within {DEADLINE:?}");
        std::thread::yield_now();
    }
}

fn finish(session: Session) -> Summary {
    session.stop();
    session.join()
}

/// A file that is gone after the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("capture-{name}-{}.pcapng", std::process::id())))
    }

    fn create(&self) -> OwnedFd {
        File::create(&self.0).unwrap().into()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

type StrippedTag = Option<(Tpid, u16)>;

/// Interface, selected, missed and accepted frames of each statistics block, and
/// whether its times are of this minute. tshark does not print them.
fn statistics(file: &[u8]) -> Vec<(u32, u64, u64, u64, bool)> {
    let number =
        |bytes: &[u8]| bytes.iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte));
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    let recent = |time: u64| now - time < 60_000_000_000;
    let mut found = Vec::new();
    let mut rest = file;
    while !rest.is_empty() {
        let (kind, length) = (number(&rest[..4]), number(&rest[4..8]) as usize);
        let mut body = &rest[8..length - 4];
        rest = &rest[length..];
        if kind != 5 {
            continue;
        }
        let (interface, time) = (number(&body[..4]) as u32, number(&body[4..12]));
        body = &body[12..];
        let mut values = [0; 9];
        while number(&body[..2]) != 0 {
            let (code, length) = (number(&body[..2]) as usize, number(&body[2..4]) as usize);
            assert_eq!(length, 8);
            values[code] = number(&body[4..12]);
            body = &body[12..];
        }
        let times =
            recent(time) && recent(values[2]) && recent(values[3]) && values[2] <= values[3];
        found.push((interface, values[4], values[5], values[6], times));
    }
    found
}

fn bytes(tags: &[(u16, u16)], ethertype: u16, payload: usize) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    for (tpid, tci) in tags {
        frame.extend(tpid.to_be_bytes());
        frame.extend(tci.to_be_bytes());
    }
    frame.extend(ethertype.to_be_bytes());
    frame.resize(frame.len() + payload, 0x5a);
    frame
}

/// A device with these frames and the tags the kernel took out of them.
fn plain(frames: &[(Vec<u8>, StrippedTag)]) -> MemoryPort {
    let mut port = MemoryPort::default();
    for (frame, stripped) in frames {
        let tag = stripped.map(|(tpid, tci)| Tag { tpid, tci: Tci(tci) });
        port.add(frame, tag, VnetHeader::default());
    }
    port
}

#[test]
#[ignore = "needs tshark"]
fn each_frame_is_seen_where_it_passes_as_it_is_there() {
    let bed = Bed::new();
    let scratch = Scratch::new("all");
    let session = bed.session(EVERYTHING, |_| {}, scratch.create());

    let small = bytes(&[], 0x88b5, 46);
    let tagged = bytes(&[(0x8100, 7)], 0x88b5, 46);
    let inner = bytes(&[(0x8100, 9)], 0x88b5, 60);
    let tunnel = plain(&[(small.clone(), None), (small.clone(), Some((Tpid::Service, 0x2005)))]);
    let access = plain(&[(tagged.clone(), None), (small.clone(), None)]);
    bed.uplink.link.set(DeviceState::Down, 1500);
    bed.run(tunnel, access, MemoryPort::default(), [2, 2, 0]);

    bed.uplink.link.set(DeviceState::Up, 1500);
    let uplink = plain(&[
        (small.clone(), Some((Tpid::Customer, 0xe065))),
        (small.clone(), Some((Tpid::Customer, 999))),
        (small.clone(), Some((Tpid::Service, 102))),
        (inner.clone(), Some((Tpid::Service, 102))),
        (small.clone(), Some((Tpid::Service, 102))),
    ]);
    // The first of the two that reach it is refused.
    let mut access = MemoryPort::default();
    access.refusals = vec![Some(Errno::EMSGSIZE)];
    bed.run(MemoryPort::default(), access, uplink, [0, 0, 5]);

    let none = MemoryPort::default;
    bed.run(plain(&[(small.clone(), None)]), none(), none(), [1, 0, 0]);
    let summary = finish(session);
    drop(bed);
    assert!(matches!(summary.end, End::Asked), "{summary:?}");

    let frame = |interface: &str, out: bool, reason: &str, bytes: &[u8]| {
        let comment = if reason.is_empty() { String::new() } else { format!("dropped: {reason}") };
        let direction = if out { "2" } else { "1" };
        (interface.to_owned(), direction.to_owned(), comment, bytes.len(), hex(bytes))
    };
    let guest_tagged = bytes(&[(0x88a8, 0x2005)], 0x88b5, 46);
    let vlan_101 = bytes(&[(0x8100, 101)], 0x88b5, 46);
    let stacked = bytes(&[(0x8100, 101), (0x88a8, 0x2005)], 0x88b5, 46);
    let vlan_102 = bytes(&[(0x88a8, 102)], 0x88b5, 46);
    let expected = [
        frame("web", false, "", &small),
        frame("web", false, "", &guest_tagged),
        frame("eth0", true, "uplink_down", &vlan_101),
        frame("eth0", true, "uplink_down", &stacked),
        frame("mail", false, "tagged_on_access", &tagged),
        frame("mail", false, "", &small),
        frame("eth0", true, "uplink_down", &vlan_102),
        frame("eth0", false, "", &bytes(&[(0x8100, 0xe065)], 0x88b5, 46)),
        frame("eth0", false, "unmapped_vlan", &bytes(&[(0x8100, 999)], 0x88b5, 46)),
        frame("eth0", false, "", &vlan_102),
        frame("eth0", false, "inner_tag", &bytes(&[(0x88a8, 102), (0x8100, 9)], 0x88b5, 60)),
        frame("eth0", false, "", &vlan_102),
        frame("web", true, "", &small),
        frame("mail", true, "too_long", &small),
        frame("mail", true, "", &small),
        frame("web", false, "", &small),
        frame("eth0", true, "", &vlan_101),
    ];
    assert_eq!(tshark(&scratch.0), expected);
    assert_eq!((summary.taken, summary.written, summary.missed), (17, 17, 0));
    let statistics = statistics(&fs::read(&scratch.0).unwrap());
    assert_eq!(statistics, [(1, 9, 0, 9, true), (0, 4, 0, 4, true), (2, 4, 0, 4, true)]);
}

#[test]
#[ignore = "needs tshark"]
fn super_frames_are_seen_whole_and_their_segments_where_they_go() {
    let bed = Bed::new();
    let scratch = Scratch::new("super");
    let session = bed.session(EVERYTHING, |_| {}, scratch.create());
    let mut frame = bytes(&[], 0x0800, 40 + 4000);
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
    let mut tunnel = MemoryPort::default();
    tunnel.add(&frame, None, header);
    // The uplink has to be there first.
    bed.run(MemoryPort::default(), MemoryPort::default(), MemoryPort::default(), [0; 3]);
    bed.run(tunnel, MemoryPort::default(), MemoryPort::default(), [1, 0, 0]);
    finish(session);
    drop(bed);
    let lengths: Vec<_> = tshark(&scratch.0).into_iter().map(|frame| (frame.0, frame.3)).collect();
    let mut expected = vec![("web".to_owned(), 4054)];
    expected.extend([("eth0".to_owned(), 1058), ("eth0".to_owned(), 1058)]);
    expected.extend([("eth0".to_owned(), 1058), ("eth0".to_owned(), 1058)]);
    assert_eq!(lengths, expected);
}

#[test]
#[ignore = "needs tshark and tcpdump"]
fn filter_snaplen_and_limit() {
    let bed = Bed::new();
    let scratch = Scratch::new("filter");
    let program = Program::new(&compile("vlan 101 and ether proto 0x88b5").unwrap()).unwrap();
    let first_bytes: Program = "1,6 0 0 20".parse().unwrap();
    let session = bed.session(
        EVERYTHING,
        |options| (options.filter, options.limit) = (Some(program), Some(2)),
        scratch.create(),
    );
    let short = Scratch::new("short");
    let cut = bed.session(EVERYTHING, |options| options.filter = Some(first_bytes), short.create());
    let small = bytes(&[], 0x88b5, 46);
    let vids = [101, 999, 101, 101].map(|vid| (small.clone(), Some((Tpid::Customer, vid))));
    bed.run(MemoryPort::default(), MemoryPort::default(), plain(&vids), [0, 0, 4]);
    let summary = session.join();
    let cut = finish(cut);
    drop(bed);
    assert!(matches!(summary.end, End::Limit), "{summary:?}");
    assert_eq!(summary.written, 2);
    let found = tshark(&scratch.0);
    assert!(found.iter().all(|frame| frame.4 == hex(&bytes(&[(0x8100, 101)], 0x88b5, 46))));
    assert_eq!(found.len(), 2);

    assert_eq!(cut.written, 7);
    let tagged = hex(&bytes(&[(0x8100, 101)], 0x88b5, 2));
    let first = tshark(&short.0).swap_remove(0);
    assert_eq!((first.3, &first.4[..]), (64, &tagged[..]));
}

#[test]
#[ignore = "needs tshark"]
fn a_reader_that_does_not_read_misses_frames_and_is_told_how_many() {
    const FRAMES: u64 = 64 * 150;
    let bed = Bed::new();
    let (mut reader, writer) = UnixStream::pair().unwrap();
    let uplink_only = Selection { place: Place::Uplink, drops_only: false };
    let session = bed.session(uplink_only, |_| {}, writer.into());
    let frames: Vec<_> =
        (0..64).map(|_| (bytes(&[], 0x88b5, 1000), Some((Tpid::Customer, 999)))).collect();
    let mut uplink = plain(&frames);
    uplink.replay((FRAMES / 64) as usize);
    bed.send(Command::Attach(vec![(None, Box::new(Device::Memory(uplink)))]));
    wait("all frames", || bed.counts()[2] == FRAMES);
    // Forwarding never waited; only now somebody reads, and then asks for the end.
    reader.shutdown(Shutdown::Write).unwrap();
    let mut file = Vec::new();
    reader.read_to_end(&mut file).unwrap();
    let summary = session.join();
    drop(bed);
    assert!(matches!(summary.end, End::Asked), "{summary:?}");
    assert!(summary.missed > 0 && summary.written > 0, "{summary:?}");
    assert_eq!(summary.written + summary.missed, FRAMES);
    assert_eq!(statistics(&file), [(0, FRAMES, summary.missed, summary.written, true)]);
    let scratch = Scratch::new("missed");
    fs::write(&scratch.0, file).unwrap();
    assert_eq!(tshark(&scratch.0).len() as u64, summary.written);
}

#[test]
fn a_reader_that_goes_is_noticed_without_a_frame() {
    let bed = Bed::new();
    let (reader, writer) = pipe().unwrap();
    let by_pipe = bed.session(EVERYTHING, |_| {}, writer.into());
    let (socket, writer) = UnixStream::pair().unwrap();
    let by_socket = bed.session(EVERYTHING, |_| {}, writer.into());
    drop((reader, socket));
    for session in [by_pipe, by_socket] {
        wait("end", || session.is_finished());
        assert!(matches!(session.join().end, End::ReaderGone));
    }
}

#[test]
fn a_limit_of_no_frames_is_reached_without_any() {
    let bed = Bed::new();
    let scratch = Scratch::new("none");
    let session = bed.session(EVERYTHING, |options| options.limit = Some(0), scratch.create());
    assert!(session.wait(Instant::now() + DEADLINE));
    let summary = session.join();
    assert!(matches!(summary.end, End::Limit), "{summary:?}");
    assert_eq!(summary.written, 0);
    assert!(fs::metadata(&scratch.0).unwrap().len() > 0, "a whole file, with no frames");
}

#[test]
fn the_end_is_waited_for_no_longer_than_said() {
    let bed = Bed::new();
    let (mut reader, writer) = UnixStream::pair().unwrap();
    let session = bed.session(EVERYTHING, |_| {}, writer.into());
    assert!(!session.wait(Instant::now()));
    session.stop();
    assert!(session.wait(Instant::now() + DEADLINE));
    // By then the reader has been told that this was all.
    let mut file = Vec::new();
    reader.read_to_end(&mut file).unwrap();
    assert!(matches!(session.join().end, End::Asked));
}

#[test]
fn a_stuck_reader_does_not_delay_the_end_for_ever() {
    let bed = Bed::new();
    let (reader, writer) = UnixStream::pair().unwrap();
    let session = bed.session(EVERYTHING, |_| {}, writer.into());
    let frames: Vec<_> = (0..64).map(|_| (bytes(&[], 0x88b5, 1400), None)).collect();
    let mut tunnel = plain(&frames);
    tunnel.replay(100);
    bed.send(Command::Attach(vec![(Some(TUNNEL), Box::new(Device::Memory(tunnel)))]));
    wait("all frames", || bed.counts()[0] == 6400);
    session.stop();
    wait("end", || session.is_finished());
    assert!(matches!(session.join().end, End::Asked));
    drop(reader);
}

#[test]
fn the_end_of_the_worker_and_one_capture_too_many() {
    let bed = Bed::new();
    let sinks: Vec<_> = (0..5)
        .map(|_| {
            let (reader, writer) = pipe().unwrap();
            (bed.session(EVERYTHING, |_| {}, writer.into()), reader)
        })
        .collect();
    wait("refusal", || sinks[4].0.is_finished());
    assert!(sinks[..4].iter().all(|(session, _)| !session.is_finished()));
    drop(bed);
    for (session, _reader) in sinks {
        assert!(matches!(session.join().end, End::WorkerGone));
    }
}

/// tshark at the other end of a pipe says each frame when it passes; interfaces and
/// names come as they are needed.
#[test]
#[ignore = "needs tshark"]
fn a_pipe_is_read_while_it_is_written() {
    let bed = Bed::new();
    let (reader, writer) = pipe().unwrap();
    let mut tshark = Process::new("tshark")
        .args(["-nlr", "-", "-Tfields", "-eframe.interface_name"])
        .stdin(Stdio::from(OwnedFd::from(reader)))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(tshark.stdout.take().unwrap()).lines();
    let session = bed.session(EVERYTHING, |_| {}, writer.into());
    let small = bytes(&[], 0x88b5, 46);
    let empty = MemoryPort::default;
    bed.run(empty(), empty(), plain(&[(small.clone(), Some((Tpid::Customer, 999)))]), [0, 0, 1]);
    assert_eq!(lines.next().unwrap().unwrap(), "eth0");
    bed.names.set(Some(TUNNEL), "web2");
    bed.run(plain(&[(small, None)]), empty(), empty(), [1, 0, 0]);
    assert_eq!(lines.next().unwrap().unwrap(), "web2");
    assert_eq!(lines.next().unwrap().unwrap(), "eth0");
    finish(session);
    assert!(lines.next().is_none());
    assert!(tshark.wait().unwrap().success());
}
