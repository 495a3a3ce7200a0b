//! Many ports: all VLANs at once, a thousand taps, and ports that come and go by the
//! thousand. `VLANSWITCHD_PAIRS=4094` maps every inner VLAN of one outer to a tap of
//! its own, instead of the first hundred; `VLANSWITCHD_CHURN=2000` adds and removes no
//! more than 2000 ports.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::frames::{Frame, TagBytes, tag};
use lab::{Daemon, Lab, PATIENCE, RawGuest, Wire, eventually};
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vlanswitchd::control::api::Request;
use vlanswitchd::control::client::Client;
use vlanswitchd::frame::{Pcp, TagStack, Tpid};
use vlanswitchd::switch::{Membership, Priority, Table, UplinkVerdict, Vlans};
use vlanswitchd::sys::bpf::Direction;
use vlanswitchd::sys::bpf::tcx;

/// Frames under way at most: no queue is the reason for a loss.
const WINDOW: u64 = 200;
/// The outer VLAN of the tag pairs.
const OUTER: u16 = 4094;
/// The first VLAN of the trunk, which has all up to [`OUTER`].
const FIRST_OF_TRUNK: u16 = 900;

/// One test at a time: each fills the machine.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn number_from(variable: &str, usual: u16) -> u16 {
    std::env::var(variable).map_or(usual, |text| text.parse().expect("a number"))
}

const fn vlan(vid: u16) -> TagBytes {
    tag(0x8100, vid)
}

fn open_files(daemon: &Daemon, kind: &str) -> usize {
    let files = fs::read_dir(format!("/proc/{}/fd", daemon.id())).unwrap().flatten();
    let names = files.filter_map(|file| fs::read_link(file.path()).ok());
    names.filter(|name| name.to_string_lossy().contains(kind)).count()
}

/// A switch whose ports stand in a file.
struct Switch {
    daemon: Daemon,
    folder: TempDir,
}

impl Switch {
    fn start(lab: &Lab, ports: &[(String, String)]) -> Self {
        let folder = TempDir::new().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        fs::write(path("switch.toml"), file_of(ports)).unwrap();
        let (control, config) = (path("control"), path("switch.toml"));
        let arguments = ["--control", &control, "--config", &config, "--ring-size", "128k"];
        Self { daemon: lab.daemon(&arguments), folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn call(&self, request: &Request) {
        let mut client = Client::connect(&self.path("control")).unwrap();
        client.call(request).unwrap();
    }

    fn reload(&self, ports: &[(String, String)]) {
        fs::write(self.path("switch.toml"), file_of(ports)).unwrap();
        self.call(&Request::ReloadConfig { dry_run: None });
    }
}

/// `(VLANs, device)` as a configuration file.
fn file_of(ports: &[(String, String)]) -> String {
    let mut text = String::new();
    for (vlans, device) in ports {
        writeln!(text, "[[port]]\nvlan = \"{vlans}\"\ndevice = \"{device}\"").unwrap();
    }
    text
}

fn single(vids: impl IntoIterator<Item = u16>) -> Vec<(String, String)> {
    vids.into_iter().map(|vid| (vid.to_string(), format!("t{vid}"))).collect()
}

/// Sends a frame to each guest behind these tags and one back, and checks that each
/// arrives where it belongs.
fn through_each(wire: &Wire, guests: &[(RawGuest, Vec<TagBytes>)]) {
    for (block, guests) in guests.chunks(WINDOW as usize).enumerate() {
        let numbered = || (block as u64 * WINDOW + 1..).zip(guests);
        for (number, (_, tags)) in numbered() {
            wire.send(&Frame::numbered(number).tags(tags));
        }
        for (number, (guest, tags)) in numbered() {
            let frame = guest.receive_within(PATIENCE);
            let frame = Frame::read(&frame.unwrap_or_else(|| panic!("{tags:?}: nothing came")));
            assert_eq!((frame.number(), &frame.tags[..]), (number, &[][..]), "{tags:?}");
            guest.send(&Frame::numbered(number).reversed());
        }
        let mut arrived: Vec<(u64, Vec<TagBytes>)> = Vec::new();
        while arrived.len() < guests.len() {
            let bytes = wire.receive_within(PATIENCE).expect("a frame of each guest's");
            let frame = Frame::read(&bytes);
            arrived.push((frame.number(), frame.tags.clone()));
        }
        arrived.sort_by_key(|(number, _)| *number);
        let sent = numbered().map(|(number, (_, tags))| (number, tags.clone()));
        assert_eq!(arrived, sent.collect::<Vec<_>>());
    }
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn every_vlan_is_mapped_at_once_and_a_thousand_taps_carry_theirs() {
    let _turn = turn();
    let lab = Lab::new();
    let inner = 1..=number_from("VLANSWITCHD_PAIRS", 100);
    let mut ports = single(1..FIRST_OF_TRUNK);
    ports.extend(inner.clone().map(|vid| (format!("{OUTER}.{vid}"), format!("p{vid}"))));
    ports.push((format!("{FIRST_OF_TRUNK}-{}", OUTER - 1), "trunk".to_owned()));
    let switch = Switch::start(&lab, &ports);
    let daemon = &switch.daemon;
    assert_eq!(
        daemon.greeting,
        format!("forwarding: uplink up0, {} ports, datapath packet", ports.len())
    );
    let count = ports.len() as u64;
    println!(
        "{count} ports: forwarding after {:.2?}, {} KiB resident",
        daemon.started_in,
        daemon.resident_bytes() >> 10
    );
    let most = (32 << 20) + count * (160 << 10);
    assert!(daemon.resident_bytes() < most, "{} of {most} bytes", daemon.resident_bytes());
    // A ring is resident: less than that would mean that it was not asked for as told.
    assert!(daemon.resident_bytes() > count * (128 << 10), "{}", daemon.resident_bytes());
    assert!((open_files(daemon, "") as u64) < count * 3 + 64, "{}", open_files(daemon, ""));

    let mut guests: Vec<(RawGuest, Vec<TagBytes>)> = (1..FIRST_OF_TRUNK)
        .map(|vid| (lab.raw_guest(&format!("t{vid}")), vec![vlan(vid)]))
        .collect();
    guests
        .extend(inner.map(|vid| (lab.raw_guest(&format!("p{vid}")), vec![vlan(OUTER), vlan(vid)])));
    let trunk = lab.raw_guest("trunk");
    daemon.until("all ports are attached", |summary| {
        summary.ports.iter().all(|port| port.state == "attached")
    });
    let wire = lab.wire();
    through_each(&wire, &guests);

    let vids: Vec<u16> = (FIRST_OF_TRUNK..OUTER).collect();
    // Fewer than its ring has slots.
    for vids in vids.chunks(50) {
        for vid in vids {
            wire.send(&Frame::numbered(u64::from(*vid)).tags(&[vlan(*vid)]));
        }
        for vid in vids {
            let frame = Frame::read(&trunk.receive_within(PATIENCE).expect("a trunk's frame"));
            assert_eq!((frame.number(), frame.tags), (u64::from(*vid), vec![vlan(*vid)]));
            trunk.send(&Frame::numbered(u64::from(*vid)).reversed().tags(&[vlan(*vid)]));
        }
        for vid in vids {
            let frame = Frame::read(&wire.receive_within(PATIENCE).expect("a trunk's frame"));
            assert_eq!((frame.number(), frame.tags), (u64::from(*vid), vec![vlan(*vid)]));
        }
    }
    drop(guests);
    let summary = switch.daemon.stop();
    let drops: u64 = summary
        .ports
        .iter()
        .map(|port| port.from_guest.all_drops() + port.to_guest.all_drops())
        .sum();
    assert_eq!((drops, summary.from_wire.all_drops()), (0, 0));
}

/// Counts frames on their way in one direction.
#[derive(Default)]
struct Way {
    sent: AtomicU64,
    arrived: AtomicU64,
}

impl Way {
    /// Sends to one after the other, numbered round by round, until told to stop.
    fn send(&self, stop: &AtomicBool, ports: usize, send: impl Fn(usize, u64)) {
        let mut sent = 0;
        while !stop.load(Ordering::Relaxed) {
            if sent - self.arrived.load(Ordering::Relaxed) < WINDOW {
                send(sent as usize % ports, sent / ports as u64 + 1);
                sent += 1;
                self.sent.store(sent, Ordering::Relaxed);
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// Receives what was sent, each port's frames in order.
    fn receive(&self, stop: &AtomicBool, ports: usize, receive: impl Fn(usize) -> (usize, u64)) {
        let mut last = vec![0; ports];
        let mut arrived = 0;
        loop {
            let over = stop.load(Ordering::Relaxed);
            if arrived == self.sent.load(Ordering::Relaxed) {
                if over {
                    return;
                }
                std::thread::yield_now();
                continue;
            }
            let (port, number) = receive(arrived as usize % ports);
            last[port] += 1;
            assert_eq!(number, last[port], "port {port}");
            arrived += 1;
            self.arrived.store(arrived, Ordering::Relaxed);
        }
    }
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn the_thousandth_port_comes_while_the_others_carry_traffic() {
    let _turn = turn();
    const PORTS: u16 = 999;
    let lab = Lab::new();
    let switch = Switch::start(&lab, &single(1..=PORTS));
    let guests: Vec<RawGuest> = (1..=PORTS).map(|vid| lab.raw_guest(&format!("t{vid}"))).collect();
    switch.daemon.until("all ports are attached", |summary| {
        summary.ports.iter().all(|port| port.state == "attached")
    });
    let last = lab.raw_guest("last");
    let (wire, beside) = (lab.wire(), lab.wire());
    let (stop, down, up) = (AtomicBool::new(false), Way::default(), Way::default());
    let ports = usize::from(PORTS);
    std::thread::scope(|scope| {
        // Stopped also when something panics: a scope waits for its threads.
        struct Stop<'s>(&'s AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let (stop, down, up, wire, guests) = (&stop, &down, &up, &wire, &guests);
        scope.spawn(move || {
            let _stop = Stop(stop);
            down.send(stop, ports, |port, number| {
                wire.send(&Frame::numbered(number).tags(&[vlan(port as u16 + 1)]));
            });
        });
        scope.spawn(move || {
            let _stop = Stop(stop);
            down.receive(stop, ports, |port| {
                let bytes = guests[port].receive_within(PATIENCE);
                let bytes = bytes.unwrap_or_else(|| panic!("t{}: a frame is lost", port + 1));
                (port, Frame::read(&bytes).number())
            });
        });
        scope.spawn(move || {
            let _stop = Stop(stop);
            up.send(stop, ports, |port, number| {
                guests[port].send(&Frame::numbered(number).reversed());
            });
        });
        scope.spawn(move || {
            let _stop = Stop(stop);
            up.receive(stop, ports, |_| {
                loop {
                    let bytes = wire.receive_within(PATIENCE).expect("a frame is lost");
                    let frame = Frame::read(&bytes);
                    let port = usize::from(frame.tags[0].vid) - 1;
                    if port < ports {
                        return (port, frame.number());
                    }
                }
            });
        });
        let _stop = Stop(stop);
        for round in 1..=3 {
            let before = down.arrived.load(Ordering::Relaxed);
            let map = format!("{}=last", PORTS + 1);
            switch.call(&Request::AddPort { map, persist: None });
            // The kernel may still be activating the device: what is sent then is lost.
            eventually("a frame through the new port", || {
                beside.send(&Frame::numbered(round).tags(&[vlan(PORTS + 1)]));
                last.receive_within(Duration::from_millis(100))
            });
            switch.call(&Request::RemovePort { name: "last".to_owned(), persist: None });
            // Traffic goes on before and after.
            let deadline = Instant::now() + PATIENCE;
            while down.arrived.load(Ordering::Relaxed) < before + 2 * ports as u64 {
                assert!(Instant::now() < deadline && !stop.load(Ordering::Relaxed));
                std::thread::sleep(Duration::from_millis(3));
            }
        }
    });
    let counts = |way: &Way| [&way.sent, &way.arrived].map(|count| count.load(Ordering::Relaxed));
    for way in [down, up] {
        let [sent, arrived] = counts(&way);
        assert_eq!(sent, arrived);
        println!("{arrived} frames, none lost");
    }
    drop(guests);
    switch.daemon.stop();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn ports_that_come_and_go_leave_nothing_behind() {
    let _turn = turn();
    const BATCH: u16 = 200;
    let rounds = number_from("VLANSWITCHD_CHURN", 10_000) / BATCH;
    let lab = Lab::new();
    let stays = single([4000]);
    let with_batch: Vec<_> = stays.iter().cloned().chain(single(1..=BATCH)).collect();
    let switch = Switch::start(&lab, &stays);
    let daemon = &switch.daemon;
    let held = || {
        let files = ["", "bpf-prog", "bpf-map", "socket:"].map(|kind| open_files(daemon, kind));
        (files, daemon.resident_bytes())
    };
    let mut first = None;
    let begin = Instant::now();
    for round in 1..=rounds {
        switch.reload(&with_batch);
        switch.reload(&stays);
        // What is allocated once has been by then.
        if round == 3 {
            first = Some(held());
        }
    }
    println!("{} ports in {:.2?}", u32::from(rounds * BATCH), begin.elapsed());
    let (files, bytes) = first.expect("rounds enough");
    // What is about to be closed, a client's connection or a request to the kernel, is
    // one at a time; a leak would be one a port or one a batch.
    let what = format!("no more open files, programs, maps, sockets than before: {files:?}");
    let (_, bytes_now) = eventually(&what, || {
        Some(held()).filter(|(now, _)| now.iter().zip(&files).all(|(now, before)| now <= before))
    });
    println!("{bytes} bytes resident after three rounds, {bytes_now} after all");
    assert!(bytes_now < bytes + (2 << 20), "{bytes} bytes, then {bytes_now}");
    // Each tap that stays has one seal, wherever it stands.
    for vid in 1..=BATCH {
        let device = format!("t{vid}");
        let index = lab.host.index(&device);
        let programs = lab.host.enter(|| tcx::programs(index, Direction::Ingress));
        let filters = lab.host.try_tc(&format!("filter show dev {device} ingress"));
        let filters = filters.unwrap_or_default();
        let filters = filters.lines().filter(|line| line.contains("vlansw_seal")).count();
        assert_eq!(programs.map_or(0, |programs| programs.len()) + filters, 1, "{device}");
    }
    switch.daemon.stop();
}

#[test]
fn every_vlan_and_every_pair_of_one_fit_one_table() {
    let tagged = |vlans: Vlans| {
        Membership::new(vlans, None, None, Tpid::Customer, None, Priority::Fixed(Pcp::default()))
            .unwrap()
    };
    let vid = |vid: u16| vlanswitchd::frame::Vid::new(vid).unwrap();
    let mut members: Vec<_> = (1..OUTER).map(|one| tagged(Vlans::One(vid(one)))).collect();
    members.extend(
        (1..=4094).map(|inner| tagged(Vlans::Double { outer: vid(OUTER), inner: vid(inner) })),
    );
    let table = Table::compile(&members).unwrap();
    let port_of = |tags: &[TagBytes]| {
        let bytes = Frame::numbered(1).tags(tags).bytes();
        match table.decide_from_uplink(&TagStack::read(None, &bytes).unwrap()) {
            UplinkVerdict::Forward { port, .. } => Some(port),
            _ => None,
        }
    };
    for one in 1..OUTER {
        assert_eq!(port_of(&[vlan(one)]), Some(usize::from(one) - 1));
    }
    for inner in 1..=4094 {
        let place = usize::from(OUTER) - 1 + usize::from(inner) - 1;
        assert_eq!(port_of(&[vlan(OUTER), vlan(inner)]), Some(place));
    }
    assert_eq!(port_of(&[vlan(OUTER)]), None);
    assert_eq!(port_of(&[vlan(4095)]), None);
}
