//! Mixed traffic for as long as one likes, with live changes, restarts and faults: no
//! frame unaccounted for, and memory, descriptors and BPF objects stay as they are.
//!
//! Numbered frames go both ways through a tunnel, an access, a trunk and an internal
//! port, real TCP with super-frames through a fifth, while ports come, go and change,
//! captures and metrics are read, new processes take over, the daemon is stopped for a
//! moment, and the links of a guest and of the uplink flap. At the end each port's
//! counters are held against what was sent and what arrived, frame by frame:
//! sent = in, in = out + named drops, out = arrived, but for what the uplink's device counts
//! as lost while it went down.
//!
//! New processes come in the first third of each period only. So each cycle but the first
//! ones of a process is held against those: what leaks inside a process shows. And all are
//! held against the first twelve of the run: what one process leaves behind for the next
//! shows.
//!
//! `scripts/soak [MINUTES]` runs it for 30 minutes; the ordinary tests for half a one.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::frames::{Frame, TagBytes, tag};
use lab::hub::far_members;
use lab::raw::OFFLOAD_TCP;
use lab::{Daemon, KernelGuest, Lab, RawGuest, Wire, eventually, transfer};
use nix::sys::signal::Signal;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Frames a stream sends each way at once, and how often.
const BATCH: u64 = 5;
const INTERVAL: Duration = Duration::from_millis(5);
const MAPS: [&str; 5] =
    ["101=t0", "102=t1,mode=access", "205,210=t2", "55=internal:leg0", "120=k0"];
const TCP_BYTES: u64 = 4 << 20;
/// What memory may grow by over its highest in the cycles it is held against, in bytes.
const GROWTH: u64 = 4 << 20;
/// Cycles from one stretch without a new process to the next, in a short run and in one of
/// more minutes than this.
const PERIODS: [u32; 2] = [12, 120];
const LONG: f64 = 5.0;
/// Cycles with which a process has done everything once.
const EVERYTHING: u32 = 3;

/// The tap that is set down and up.
const FLAPS: &str = "t1";

/// One end of a stream.
enum End {
    Guest(RawGuest),
    Device(Wire),
}

impl End {
    fn send(&self, frame: &Frame) -> bool {
        match self {
            Self::Guest(guest) => guest.try_send(&frame.bytes()).is_ok(),
            Self::Device(wire) => wire.try_send(&frame.bytes()).is_ok(),
        }
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let patience = Duration::from_millis(50);
        match self {
            Self::Guest(guest) => guest.receive_within(patience),
            Self::Device(wire) => wire.receive_within(patience),
        }
    }
}

/// Numbered frames one way.
#[derive(Default)]
struct Flow {
    sent: AtomicU64,
    arrived: AtomicU64,
}

/// Numbered frames both ways through a port.
struct Stream {
    port: &'static str,
    on_the_wire: TagBytes,
    /// What the guest puts on its frames, and gets.
    at_the_guest: Vec<TagBytes>,
    guest: End,
    wire: End,
    up: Flow,
    down: Flow,
}

impl Stream {
    fn new(lab: &Lab, port: &'static str, vid: u16, tagged: bool, guest: End) -> Self {
        let wire = lab.wire();
        wire.only_vid(vid);
        let on_the_wire = tag(0x8100, vid);
        let at_the_guest = if tagged { vec![on_the_wire] } else { Vec::new() };
        let (up, down) = Default::default();
        Self { port, on_the_wire, at_the_guest, guest, wire: End::Device(wire), up, down }
    }

    fn run<'s>(&'s self, scope: &'s std::thread::Scope<'s, '_>, control: &'s Control) {
        let up = |number| Frame::numbered(number).reversed().tags(&self.at_the_guest);
        let down = |number| Frame::numbered(number).tags(&[self.on_the_wire]);
        let pause = if self.port == FLAPS { &control.still } else { &control.never };
        scope.spawn(move || send(&self.guest, &self.up, up, &control.stop, pause));
        scope.spawn(move || send(&self.wire, &self.down, down, &control.stop, &control.quiet));
        scope.spawn(move || receive(&self.wire, &self.up, &control.done));
        scope.spawn(move || receive(&self.guest, &self.down, &control.done));
    }
}

#[derive(Default)]
struct Control {
    /// No more frames.
    stop: AtomicBool,
    /// Nothing more will arrive.
    done: AtomicBool,
    /// The wire sends nothing for the moment.
    quiet: AtomicBool,
    /// Nor does the guest whose tap flaps.
    still: AtomicBool,
    never: AtomicBool,
}

fn send(
    end: &End,
    flow: &Flow,
    frame: impl Fn(u64) -> Frame,
    stop: &AtomicBool,
    pause: &AtomicBool,
) {
    let mut number = 0;
    while !stop.load(Relaxed) {
        if !pause.load(Relaxed) {
            for _ in 0..BATCH {
                number += 1;
                // A device that is down takes none, and says so.
                if end.send(&frame(number)) {
                    flow.sent.fetch_add(1, Relaxed);
                }
            }
        }
        std::thread::sleep(INTERVAL);
    }
}

fn receive(end: &End, flow: &Flow, done: &AtomicBool) {
    let mut last = 0;
    loop {
        match end.receive() {
            Some(bytes) => {
                let number = Frame::read(&bytes).number();
                assert!(number > last, "{number} after {last}: twice, or out of order");
                last = number;
                flow.arrived.fetch_add(1, Relaxed);
            }
            None if done.load(Relaxed) => return,
            None => {}
        }
    }
}

/// What is counted beside frames.
#[derive(Default)]
struct Tally {
    changes: u32,
    restarts: u32,
    flaps: u32,
    pauses: u32,
    captures: u32,
    tcp_bytes: u64,
}

/// What may not grow.
#[derive(Clone, Copy, Debug)]
struct Held {
    memory: u64,
    descriptors: usize,
    bpf: usize,
    devices: usize,
}

impl Held {
    fn most(self, other: Self) -> Self {
        Self {
            memory: self.memory.max(other.memory),
            descriptors: self.descriptors.max(other.descriptors),
            bpf: self.bpf.max(other.bpf),
            devices: self.devices.max(other.devices),
        }
    }

    fn is_within(&self, bound: &Self) -> bool {
        self.memory <= bound.memory + GROWTH
            && self.descriptors <= bound.descriptors + 2
            && self.bpf <= bound.bpf
            && self.devices <= bound.devices
    }

    /// Fails the test if this is more than there was in these cycles.
    fn assert_within(&self, bound: &Self, cycles: &str) {
        let fits = self.is_within(bound);
        assert!(fits, "{self:?}; in the first cycles of {cycles} {bound:?}");
    }
}

/// What a process held in its first cycles, against which the others are held.
#[derive(Default)]
struct Life {
    cycles: u32,
    early: Option<Held>,
}

impl Life {
    /// Returns how many cycles after the first ones this one is.
    fn look(&mut self, held: Held) -> u32 {
        self.cycles += 1;
        match self.early {
            Some(early) if self.cycles > EVERYTHING => {
                held.assert_within(&early, "this process");
            }
            early => self.early = Some(early.map_or(held, |early| early.most(held))),
        }
        self.cycles.saturating_sub(EVERYTHING)
    }
}

/// How long something may be held by a worker that has no CPU to let go of it: a capture's
/// memory, for one.
const LETTING_GO: Duration = Duration::from_secs(10);

struct Soak<'l> {
    lab: &'l Lab,
    folder: TempDir,
    daemon: Option<Daemon>,
    tally: Tally,
    life: Life,
    /// Cycles from one stretch without a new process to the next.
    period: u32,
}

impl Soak<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn start(&mut self, more: &[&str]) {
        let control = self.path("control").display().to_string();
        let metrics = format!("unix:{}", self.path("metrics").display());
        let mut arguments = vec!["--control", &control, "--metrics", &metrics];
        arguments.extend(MAPS.iter().flat_map(|map| ["--map", map]));
        arguments.extend(more);
        let next = self.lab.daemon(&arguments);
        if let Some(mut old) = self.daemon.replace(next) {
            let status = eventually("the old process ends", || old.ended());
            assert!(status.success(), "{status}: {:?}", old.stderr());
        }
    }

    fn daemon(&self) -> &Daemon {
        self.daemon.as_ref().unwrap()
    }

    fn ctl(&self, words: &[&str]) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vlanswitchctl"));
        let output = command.arg("--socket").arg(self.path("control")).args(words).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{words:?}: {output:?}");
    }

    /// Everything once; some of it not in every cycle.
    fn cycle(&mut self, cycle: u32, streams: &[Stream], control: &Control, tcp: &dyn Fn()) {
        self.ctl(&["port", "add", "300=churn"]);
        self.ctl(&["port", "set", "churn", "vlan=310-320", "mode=trunk", "native=310"]);
        let pcp = if cycle.is_multiple_of(2) { "pcp=copy" } else { "pcp=0" };
        self.ctl(&["port", "set", "t0", pcp]);
        let file = self.path("capture.pcapng").display().to_string();
        self.ctl(&["capture", "t0", "-c", "50", "-w", &file]);
        self.tally.captures += 1;
        let mut metrics = UnixStream::connect(self.path("metrics")).unwrap();
        metrics
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        metrics.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer:.80}");
        self.ctl(&["port", "remove", "churn"]);
        self.lab.host.ip("link delete churn");
        self.tally.changes += 4;
        tcp();
        self.tally.tcp_bytes += 2 * TCP_BYTES;
        if cycle % 3 == 1 {
            self.flap_guest(streams, control);
        }
        if cycle % 3 == 2 {
            self.flap_uplink(streams, control);
        }
        if cycle % 4 == 3 && cycle % self.period < self.period / 3 {
            self.start(&["--takeover"]);
            self.tally.restarts += 1;
            self.life = Life::default();
        }
        self.daemon().signal(Signal::SIGSTOP);
        let before = streams[0].up.sent.load(Relaxed);
        eventually("guests go on sending", || {
            (streams[0].up.sent.load(Relaxed) > before + 100).then_some(())
        });
        self.daemon().signal(Signal::SIGCONT);
        self.tally.pauses += 1;
    }

    /// The wire sends no more, and what it has sent has arrived.
    fn quieten(&self, streams: &[Stream], control: &Control) {
        control.quiet.store(true, Relaxed);
        let still = |stream: &&Stream| stream.port == FLAPS && control.still.load(Relaxed);
        let arrived = || {
            let down = streams.iter().map(|stream| &stream.down);
            let up = streams.iter().filter(still).map(|stream| &stream.up);
            down.chain(up).map(|flow| flow.arrived.load(Relaxed)).sum::<u64>()
        };
        let (mut last, mut same) = (arrived(), 0);
        eventually("the wire is quiet", || {
            let now = arrived();
            same = if now == last { same + 1 } else { 0 };
            last = now;
            (same == 30).then_some(())
        });
    }

    /// While a tap goes down the kernel takes frames for it and loses them without a
    /// word (its `noop` qdisc), so none are sent then; while it is down they are. As it comes
    /// up it takes its guest's frames before a socket gets them again (docs/faults.md).
    fn flap_guest(&mut self, streams: &[Stream], control: &Control) {
        control.still.store(true, Relaxed);
        self.quieten(streams, control);
        self.lab.host.ip("link set t1 down");
        let absent = |summary: &lab::Summary| summary.port("t1").to_guest.dropped("guest_absent");
        let summary =
            self.daemon().until("t1 is down", |summary| summary.port("t1").state == "down");
        control.quiet.store(false, Relaxed);
        let before = absent(&summary);
        self.daemon().until("frames for t1 are dropped", |summary| absent(summary) > before + 10);
        self.quieten(streams, control);
        self.lab.host.ip("link set t1 up");
        self.daemon().attached(&["t1"]);
        control.still.store(false, Relaxed);
        control.quiet.store(false, Relaxed);
        self.tally.flaps += 1;
    }

    /// What the wire sends while the cable is out would be lost there.
    fn flap_uplink(&mut self, streams: &[Stream], control: &Control) {
        self.quieten(streams, control);
        self.lab.host.ip("link set up0 down");
        self.daemon().until("the uplink is down", |summary| summary.uplink_state == "down");
        self.lab.host.ip("link set up0 up");
        self.daemon().until("the uplink is up", |summary| summary.uplink_state == "up");
        control.quiet.store(false, Relaxed);
        self.tally.flaps += 1;
    }

    fn held(&self) -> Held {
        let folder = format!("/proc/{}/fd", self.daemon().id());
        let links = fs::read_dir(folder).unwrap().flatten();
        let names: Vec<_> = links.filter_map(|entry| fs::read_link(entry.path()).ok()).collect();
        let bpf = names.iter().filter(|name| name.to_string_lossy().contains("bpf")).count();
        Held {
            memory: self.daemon().anonymous_bytes(),
            descriptors: names.len(),
            bpf,
            devices: self.lab.host.devices().len(),
        }
    }

    /// The same when what is let go of is gone: what stays, stays.
    fn held_at_rest(&self, run: Option<&Held>) -> Held {
        let deadline = Instant::now() + LETTING_GO;
        let early = self.life.early.as_ref();
        loop {
            let held = self.held();
            let rests = [run, early].into_iter().flatten().all(|bound| held.is_within(bound));
            if rests || Instant::now() > deadline {
                return held;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn row(&self, begin: Instant, streams: &[Stream], held: Held) {
        let sum = |count: fn(&Flow) -> &AtomicU64| -> u64 {
            let flows = streams.iter().flat_map(|stream| [&stream.up, &stream.down]);
            flows.map(|flow| count(flow).load(Relaxed)).sum()
        };
        let tally = &self.tally;
        println!(
            "{:>6.1} {:>10} {:>10} {:>7} {:>8} {:>5} {:>6} {:>8} {:>7} {:>8.1} {:>5} {:>4} {:>7}",
            begin.elapsed().as_secs_f64() / 60.0,
            sum(|flow| &flow.sent),
            sum(|flow| &flow.arrived),
            tally.changes,
            tally.restarts,
            tally.flaps,
            tally.pauses,
            tally.captures,
            tally.tcp_bytes >> 20,
            held.memory as f64 / 1048576.0,
            held.descriptors,
            held.bpf,
            held.devices,
        );
    }
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn mixed_traffic_with_changes_restarts_and_faults() {
    let minutes = std::env::var("SOAK_MINUTES").map_or(0.5, |text| text.parse().unwrap());
    let lab = Lab::new();
    let folder = TempDir::new().unwrap();
    let mut soak = Soak {
        lab: &lab,
        folder,
        daemon: None,
        tally: Tally::default(),
        life: Life::default(),
        period: PERIODS[usize::from(minutes > LONG)],
    };
    soak.start(&[]);
    let guest = |tap: &str| End::Guest(lab.raw_guest(tap));
    lab.host.ip("link set leg0 up");
    let streams = [
        Stream::new(&lab, "t0", 101, false, guest("t0")),
        Stream::new(&lab, "t1", 102, false, guest("t1")),
        Stream::new(&lab, "t2", 205, true, guest("t2")),
        Stream::new(&lab, "leg0", 55, false, End::Device(Wire::open(&lab.host, "leg0"))),
    ];
    let inside = KernelGuest::open(&lab.host, "k0", OFFLOAD_TCP).address(&["10.0.0.2/24"]);
    let members = far_members(&lab, &[&[tag(0x8100, 120)]]);
    let member = members.into_iter().next().unwrap().address(&["10.0.0.1/24"]);
    soak.daemon().attached(&["t0", "t1", "t2", "k0"]);
    let tcp = || {
        transfer::tcp(&inside.inside, &member.inside, "10.0.0.1", TCP_BYTES);
        transfer::tcp(&member.inside, &inside.inside, "10.0.0.2", TCP_BYTES);
    };
    println!(
        "minute       sent    arrived changes restarts flaps pauses captures tcp MiB  own MiB   \
         fds  bpf devices"
    );
    let control = Control::default();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        // Ended also by a panic: a scope waits for its threads.
        struct End<'c>(&'c Control);
        impl Drop for End<'_> {
            fn drop(&mut self) {
                self.0.stop.store(true, Relaxed);
                self.0.done.store(true, Relaxed);
            }
        }
        let ending = End(&control);
        for stream in &streams {
            stream.run(scope, &control);
        }
        let (mut next_row, mut first) = (Duration::from_secs(60), None::<Held>);
        let mut longest = 0;
        for cycle in 0.. {
            soak.cycle(cycle, &streams, &control, &tcp);
            let held = soak.held_at_rest(first.as_ref());
            if cycle < 12 {
                // All kinds of events, a restart among them, have been by then.
                first = Some(first.map_or(held, |first| first.most(held)));
            }
            held.assert_within(&first.unwrap(), "the run");
            longest = soak.life.look(held).max(longest);
            if begin.elapsed() >= next_row {
                soak.row(begin, &streams, held);
                next_row += Duration::from_secs(60);
            }
            if begin.elapsed().as_secs_f64() >= minutes * 60.0 && longest > 0 {
                soak.row(begin, &streams, held);
                println!("a process held no more after {longest} cycles than in its first ones");
                break;
            }
        }
        control.stop.store(true, Relaxed);
        soak.daemon().settled();
        drop(ending);
    });
    let summary = soak.daemon.take().unwrap().stop();
    let (mut named, mut behind) = (0, 0);
    for stream in &streams {
        let port = summary.port(stream.port);
        for (way, flow, counted) in
            [("up", &stream.up, &port.from_guest), ("down", &stream.down, &port.to_guest)]
        {
            let (sent, arrived) = (flow.sent.load(Relaxed), flow.arrived.load(Relaxed));
            let what = format!("{} {way}: {counted:?}", stream.port);
            assert_eq!(counted.in_frames, sent, "sent and in, {what}");
            if way == "up" {
                // The uplink may lose what it has taken while it goes down.
                let lost = counted.out_frames.checked_sub(arrived);
                behind += lost.unwrap_or_else(|| panic!("{arrived} arrived of {what}"));
            } else {
                assert_eq!(counted.out_frames, arrived, "out and arrived, {what}");
            }
            named += counted.all_drops();
        }
    }
    assert!(behind <= summary.unsent, "{behind} lost behind the uplink, told: {summary:?}");
    println!(
        "soak: {minutes} minutes, every frame accounted for: {named} named drops, {behind} lost by \
         the uplink as it went down ({} counted there, the kernel's own among them)",
        summary.unsent,
    );
}
