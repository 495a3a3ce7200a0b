//! Start, stop, and devices that go and come back while frames flow.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::frames::{Frame, TagBytes, tag};
use lab::raw::{open_tap, set_persistent};
use lab::{Daemon, Lab, RawGuest, Wire, eventually};
use nix::sys::signal::Signal;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const C101: TagBytes = tag(0x8100, 101);
/// A second is long against all that the daemon does by the clock.
const WINDOW: Duration = Duration::from_secs(1);

/// One frame each way arrives, behind whatever is still on its way.
fn assert_forwards(wire: &Wire, guest: &RawGuest, vlan: TagBytes) {
    wire.clear();
    guest.clear();
    wire.send(&Frame::numbered(501).tags(&[vlan]));
    let down = guest.receive_until(501);
    assert_eq!(down.last(), Some(&Frame::numbered(501)));
    guest.send(&Frame::numbered(502).reversed());
    let up = wire.receive_until(502);
    assert_eq!(up.last(), Some(&Frame::numbered(502).reversed().tags(&[vlan])));
}

/// Keeps sending both ways while `body` runs; answers how many frames were sent.
fn under_traffic<T>(
    wire: &Wire,
    guest: Option<&RawGuest>,
    vlan: TagBytes,
    body: impl FnOnce() -> T,
) -> (T, u64) {
    let stop = AtomicBool::new(false);
    let sent = AtomicU64::new(0);
    let down = Frame::numbered(1).tags(&[vlan]).bytes();
    let up = Frame::numbered(2).reversed().bytes();
    let answer = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                // Devices come and go meanwhile: what is refused was not sent.
                sent.fetch_add(u64::from(wire.try_send(&down).is_ok()), Ordering::Relaxed);
                if let Some(guest) = guest {
                    sent.fetch_add(u64::from(guest.try_send(&up).is_ok()), Ordering::Relaxed);
                }
            }
        });
        eventually("traffic", || (sent.load(Ordering::Relaxed) > 1000).then_some(()));
        let answer = body();
        stop.store(true, Ordering::Relaxed);
        answer
    });
    (answer, sent.into_inner())
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn stopping_under_traffic_is_quick_and_accounts_for_every_frame() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let lab = Lab::new();
        let daemon = lab.daemon(&["--map", "101=t0"]);
        let guest = lab.raw_guest("t0");
        daemon.attached(&["t0"]);
        let wire = lab.wire();
        let (stopped, _) = under_traffic(&wire, Some(&guest), C101, || daemon.stop_by(signal));
        assert!(stopped.status.success(), "{}: {:?}", stopped.status, stopped.stderr);
        stopped.summary.assert_conserved();
        assert!(stopped.summary.port("t0").from_guest.in_frames > 0);
        assert!(stopped.stderr.is_empty(), "no log line a frame: {:?}", stopped.stderr);
        println!("{signal} to end: {:?}", stopped.stopped_in);
    }
}

/// Many busy guests do not hold up the end: each has a burst to drain, not a time of
/// its own.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn stopping_with_many_busy_guests_takes_no_longer_than_with_few() {
    let stop_with = |busy: u16| {
        let lab = Lab::new();
        let maps: Vec<String> = (1..=24).map(|vid| format!("{vid}=t{vid}")).collect();
        let arguments: Vec<&str> = maps.iter().flat_map(|map| ["--map", map]).collect();
        let guests: Vec<RawGuest> = (1..=24).map(|vid| lab.raw_guest(&format!("t{vid}"))).collect();
        let daemon = lab.daemon(&arguments);
        let stop = AtomicBool::new(false);
        let stopped = std::thread::scope(|scope| {
            scope.spawn(|| {
                let frame = Frame::numbered(1).reversed().bytes();
                while !stop.load(Ordering::Relaxed) {
                    for guest in &guests[..usize::from(busy)] {
                        let _ = guest.try_send(&frame);
                    }
                }
            });
            daemon.until("traffic", |summary| summary.to_wire.out_frames > 1000);
            let stopped = daemon.stop_by(Signal::SIGTERM);
            stop.store(true, Ordering::Relaxed);
            stopped
        });
        stopped.summary.assert_conserved();
        println!("{busy} busy guests: stopped in {:?}", stopped.stopped_in);
        stopped.stopped_in
    };
    let (few, many) = (stop_with(1), stop_with(24));
    assert!(many < few * 8, "1 busy guest: {few:?}, 24: {many:?}");
}

/// Started without waiting for it, the daemon forwards from its first line on.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn it_forwards_once_it_says_so_with_1_port_and_with_100() {
    for ports in [1u16, 100] {
        let lab = Lab::new();
        let maps: Vec<String> = (1..=ports).map(|vid| format!("{vid}=t{vid}")).collect();
        let arguments: Vec<&str> = maps.iter().flat_map(|map| ["--map", map]).collect();
        // The guest is there before, so that nothing else is waited for.
        let guest = lab.raw_guest("t1");
        let wire = lab.wire();
        let daemon = lab.daemon(&arguments);
        assert_forwards(&wire, &guest, tag(0x8100, 1));
        let plural = if ports == 1 { "" } else { "s" };
        let greeting = format!("forwarding: uplink up0, {ports} port{plural}, datapath packet");
        assert_eq!(daemon.greeting, greeting);
        println!("{ports} ports: forwarding after {:?}", daemon.started_in);
        let summary = daemon.stop();
        assert_eq!(summary.ports.len(), usize::from(ports));
    }
}

/// Promises of the issue: 32 MiB and 4.5 MiB a port; idle it costs next to nothing.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn memory_and_idle_processor_time_with_1_port_and_with_100() {
    for ports in [1u16, 100] {
        let lab = Lab::new();
        let maps: Vec<String> = (1..=ports).map(|vid| format!("{vid}=t{vid}")).collect();
        let arguments: Vec<&str> = maps.iter().flat_map(|map| ["--map", map]).collect();
        let daemon = lab.daemon(&arguments);
        let guests: Vec<RawGuest> =
            (1..=ports).map(|vid| lab.raw_guest(&format!("t{vid}"))).collect();
        let names: Vec<String> = (1..=ports).map(|vid| format!("t{vid}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        daemon.attached(&names);
        let wire = lab.wire();
        // Every port has carried something, so that its memory is in use.
        for (vid, guest) in (1..=ports).zip(&guests) {
            assert_forwards(&wire, guest, tag(0x8100, vid));
        }
        let resident = daemon.resident_bytes();
        let (busy, _) = under_traffic(&wire, Some(&guests[0]), tag(0x8100, 1), || {
            daemon.cpu_nanoseconds_in(WINDOW)
        });
        let after = daemon.resident_bytes();
        println!("{ports} ports: resident {} KiB, then {} KiB", resident >> 10, after >> 10);
        // Each worker has a ring of its own on the uplink.
        let workers = std::env::var("VLANSWITCHD_WORKERS").map_or(1, |text| text.parse().unwrap());
        let more = (workers - 1) * (16 << 20);
        let limit = (32 << 20) + more + u64::from(ports) * (4608 << 10);
        assert!(after <= limit, "{after} bytes, promised are {limit}");
        quiet(&daemon, busy, &format!("{ports} silent ports"));
        daemon.stop();
    }
}

/// Processor time in a second in which nothing happens: the first second in which it
/// is a twentieth of `busy`, the time of a busy one. The daemon may have something to
/// finish first; one that spins never gets there.
fn quiet(daemon: &Daemon, busy: u64, what: &str) {
    let mut seconds = Vec::new();
    while seconds.len() < 10 {
        let idle = daemon.cpu_nanoseconds_in(WINDOW);
        seconds.push(idle);
        if idle * 20 < busy {
            println!(
                "{what}: {:.3} % of a core, busy {:.0} %",
                idle as f64 / 1e7,
                busy as f64 / 1e7
            );
            return;
        }
    }
    panic!("{what}: {seconds:?} ns in each second, busy {busy}");
}

/// Frames sent while a device is away are counted under `reason`, whatever else
/// happened before.
fn assert_counted(
    daemon: &Daemon,
    what: &str,
    flow: impl Fn(&lab::Summary) -> lab::Flow,
    reason: &str,
    send: impl Fn(),
) {
    let before = flow(&daemon.summary());
    for _ in 0..50 {
        send();
    }
    let after = daemon.until(what, |summary| {
        let now = flow(summary);
        now.in_frames == before.in_frames + 50 && now.in_frames == now.out_frames + now.all_drops()
    });
    let counted = flow(&after).dropped(reason) - before.dropped(reason);
    assert_eq!(counted, 50, "{what}: {:?}, before {before:?}", flow(&after));
    // Another port's may be on their way.
    daemon.settled().assert_conserved();
}

fn state(daemon: &Daemon, port: &str, wanted: &str) {
    daemon.until(&format!("{port} is {wanted}"), |summary| summary.port(port).state == wanted);
}

fn uplink(daemon: &Daemon, wanted: &str) {
    daemon.until(&format!("the uplink is {wanted}"), |summary| summary.uplink_state == wanted);
}

/// A tap goes down, loses its VMM, vanishes, comes back: the frames meanwhile are
/// counted, nothing spins, and it goes on by itself.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_tap_that_goes_and_comes_back() {
    let lab = Lab::new();
    let daemon = lab.daemon(&["--map", "101=t0,create=no", "--map", "102=t2"]);
    let wire = lab.wire();
    let other = lab.raw_guest("t2");
    daemon.attached(&["t2"]);
    let to_guest = |summary: &lab::Summary| summary.port("t0").to_guest.clone();
    let frame = Frame::numbered(1).tags(&[C101]);
    let absent = |what: &str| {
        assert_counted(&daemon, what, to_guest, "guest_absent", || wire.send(&frame));
        assert_forwards(&wire, &other, tag(0x8100, 102));
    };
    let (busy, _) =
        under_traffic(&wire, Some(&other), tag(0x8100, 102), || daemon.cpu_nanoseconds_in(WINDOW));

    state(&daemon, "t0", "absent");
    absent("not there yet");
    quiet(&daemon, busy, "tap not there yet");
    // A tap made by the VMM, as libvirt's managed='yes' does: gone with its fd.
    for _ in 0..3 {
        let guest = lab.raw_guest("t0");
        daemon.attached(&["t0"]);
        assert_forwards(&wire, &guest, C101);
        drop(guest);
        state(&daemon, "t0", "absent");
        absent("deleted");
    }
    quiet(&daemon, busy, "tap deleted");
    // A persistent one stays and loses its carrier.
    let persistent = lab.host.enter(|| open_tap("t0", 0, 0)).unwrap();
    set_persistent(&persistent, true).unwrap();
    daemon.attached(&["t0"]);
    drop(persistent);
    state(&daemon, "t0", "no_carrier");
    absent("without a VMM");
    quiet(&daemon, busy, "tap without a VMM");
    let guest = lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    assert_forwards(&wire, &guest, C101);
    // Set down by an operator: it stays down, and goes on once it is up.
    lab.host.ip("link set t0 down");
    state(&daemon, "t0", "down");
    absent("down");
    quiet(&daemon, busy, "tap down");
    lab.host.ip("link set t0 up");
    daemon.attached(&["t0"]);
    assert_forwards(&wire, &guest, C101);
    // Deleted under the VMM, and made anew within a moment.
    lab.host.ip("link del t0");
    lab.host.ip("tuntap add dev t0 mode tap vnet_hdr");
    drop(guest);
    state(&daemon, "t0", "no_carrier");
    let guest = lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    assert_forwards(&wire, &guest, C101);
    daemon.stop();
}

/// A port is its name: another device that takes the name takes the port.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn names_are_followed_when_devices_are_renamed() {
    let lab = Lab::new();
    let first = lab.container("c0");
    let second = lab.container("c1");
    let daemon = lab.daemon(&["--map", "101=c0"]);
    daemon.attached(&["c0"]);
    let wire = lab.wire();
    let check = |inside: &lab::Namespace| {
        let end = Wire::open(inside, "eth0");
        wire.send(&Frame::numbered(1).tags(&[C101]));
        assert_eq!(end.receive_until(1), [Frame::numbered(1)]);
        end.send(&Frame::numbered(2).reversed());
        assert_eq!(wire.receive_until(2), [Frame::numbered(2).reversed().tags(&[C101])]);
    };
    check(&first);
    lab.host.ip("link set c0 down");
    lab.host.ip("link set c0 name old0");
    state(&daemon, "c0", "absent");
    lab.host.ip("link set c1 down");
    lab.host.ip("link set c1 name c0");
    lab.host.ip("link set c0 up");
    daemon.attached(&["c0"]);
    check(&second);
    // The device that lost the name is nobody's: what it receives goes nowhere here.
    lab.host.ip("link set old0 up");
    let end = Wire::open(&first, "eth0");
    end.send(&Frame::numbered(3).reversed());
    check(&second);
    daemon.stop();
}

/// The uplink goes down, loses carrier, vanishes and comes back.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn an_uplink_that_goes_and_comes_back() {
    let lab = Lab::new();
    let daemon = lab.daemon(&["--map", "101.20=t0,tpid=0x88a8", "--set-uplink-mtu"]);
    let vlans = [tag(0x88a8, 101), tag(0x8100, 20)];
    let guest = lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    let from_guest = |summary: &lab::Summary| summary.port("t0").from_guest.clone();
    let down = |what: &str| {
        assert_counted(&daemon, what, from_guest, "uplink_down", || {
            guest.send(&Frame::numbered(1).reversed());
        });
    };
    let full = |number| Frame::numbered(number).untagged_length(1514);
    let forwards = |wire: &Wire| {
        wire.clear();
        wire.send(&full(7).tags(&vlans));
        assert_eq!(guest.receive_until(7), [full(7)]);
        guest.send(&full(8).reversed());
        assert_eq!(wire.receive_until(8), [full(8).reversed().tags(&vlans)]);
    };
    let wire = lab.wire();
    forwards(&wire);
    let busy = {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    guest.send(&Frame::numbered(9).reversed());
                }
            });
            let busy = daemon.cpu_nanoseconds_in(WINDOW);
            stop.store(true, Ordering::Relaxed);
            busy
        })
    };

    lab.host.ip("link set up0 down");
    uplink(&daemon, "down");
    down("uplink down");
    quiet(&daemon, busy, "uplink down");
    lab.host.ip("link set up0 up");
    uplink(&daemon, "up");
    forwards(&wire);

    lab.far.ip("link set far0 down");
    eventually("up0 has no carrier", || {
        let flags = lab.host.link("up0")?["flags"].clone();
        flags.as_array()?.iter().any(|flag| flag == "NO-CARRIER").then_some(())
    });
    daemon.until("the uplink is not up", |summary| summary.uplink_state != "up");
    down("uplink without carrier");
    quiet(&daemon, busy, "uplink without carrier");
    lab.far.ip("link set far0 up");
    uplink(&daemon, "up");
    forwards(&wire);

    for _ in 0..3 {
        lab.host.ip("link del up0");
        uplink(&daemon, "absent");
        down("uplink deleted");
        lab.plug_uplink();
        uplink(&daemon, "up");
        // Promiscuity and MTU are set anew.
        forwards(&lab.wire());
    }
    lab.host.ip("link del up0");
    uplink(&daemon, "absent");
    quiet(&daemon, busy, "uplink deleted");
    daemon.stop();
}

/// Traffic goes on while all of that happens at random moments; nothing is lost
/// from the books and the daemon lives.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn faults_under_traffic_end_in_forwarding_and_conserved_counts() {
    let lab = Lab::new();
    let daemon = lab.daemon(&["--map", "101=t0", "--map", "102=t1"]);
    let guest = lab.raw_guest("t0");
    let other = lab.raw_guest("t1");
    daemon.attached(&["t0", "t1"]);
    let wire = lab.wire();
    under_traffic(&wire, Some(&guest), C101, || {
        for _ in 0..10 {
            lab.host.ip("link set t0 down");
            lab.host.ip("link set up0 down");
            lab.host.ip("link set t0 up");
            lab.host.ip("link set up0 up");
            lab.far.ip("link set far0 down");
            lab.host.ip("link set t1 down");
            lab.far.ip("link set far0 up");
            lab.host.ip("link set t1 up");
        }
    });
    daemon.attached(&["t0", "t1"]);
    uplink(&daemon, "up");
    assert_forwards(&wire, &other, tag(0x8100, 102));
    assert_forwards(&wire, &guest, C101);
    daemon.stop();
}

/// What vlanswitchd made stays (a VM may hold it); what it found is as it was.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn created_taps_stay_and_found_devices_are_given_back() {
    let lab = Lab::new();
    lab.host.enable_ipv6();
    let _inside = lab.container("c0");
    lab.host.ip("link set c0 down");
    let held = lab.host.enter(|| open_tap("found", 0, 0)).unwrap();
    set_persistent(&held, true).unwrap();
    drop(held);
    lab.host.ip("link set found mtu 1400 txqueuelen 77 up");
    let before = lab.host.snapshot();
    let arguments = [
        "--set-uplink-mtu=2000",
        "--map",
        "101=made,owner=65534,group=65533",
        "--map",
        "102.3=found",
        "--map",
        "103=c0",
        "--map",
        "104=many,queues=4",
    ];
    let daemon = lab.daemon(&arguments);
    let link = lab.host.link("up0").unwrap();
    assert!(link["promiscuity"].as_u64() > Some(0), "{link}");
    assert!(link["mtu"].as_u64() >= Some(2004), "{link}");
    assert_ne!(lab.host.snapshot(), before);
    let made = lab.host.link("made").expect("it was made");
    let data = made["linkinfo"]["info_data"].clone();
    assert_eq!((&data["type"], &data["persist"]), (&"tap".into(), &true.into()), "{made}");
    assert_eq!(data["group"], 65533, "{made}");
    assert!(data["user"] == 65534 || data["user"] == "nobody", "{made}");
    assert_eq!(data["vnet_hdr"], true, "{made}");
    let many = lab.host.link("many").expect("it was made");
    assert_eq!(many["linkinfo"]["info_data"]["multi_queue"], true, "{many}");
    let queue = || lab.host.enter(|| open_tap("many", libc::IFF_MULTI_QUEUE, 0));
    let _queues = [queue().unwrap(), queue().unwrap()];
    daemon.stop();

    for tap in ["made", "many"] {
        let link = lab.host.link(tap).expect("it stays");
        assert!(link["flags"].as_array().unwrap().iter().any(|flag| flag == "UP"), "{link}");
    }
    // A second run finds its own taps and takes them over as its own.
    let daemon = lab.daemon(&arguments);
    daemon.stop();
    assert!(lab.host.link("made").is_some());
    lab.host.ip("link del made");
    drop(_queues);
    lab.host.ip("link del many");
    lab::assert_same(&before, &lab.host.snapshot());
}

/// Killed, the daemon leaves its VMs attached; the next one goes on with them.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_killed_daemon_is_followed_by_one_that_goes_on() {
    let lab = Lab::new();
    let map = ["--map", "101=t0", "--map", "102=internal:leg0"];
    let daemon = lab.daemon(&map);
    let guest = lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    let wire = lab.wire();
    assert_forwards(&wire, &guest, C101);
    daemon.signal(Signal::SIGKILL);
    drop(daemon);
    assert_eq!(lab.host.link("up0").unwrap()["promiscuity"], 0);
    let daemon = lab.daemon(&map);
    daemon.attached(&["t0"]);
    assert_forwards(&wire, &guest, C101);
    daemon.stop();
}

/// Asked for counters while frames fly, it answers and goes on.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn counters_on_request_as_text_and_as_json() {
    let lab = Lab::new();
    let daemon = lab.daemon(&["--map", "101=t0"]);
    let guest = lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    let wire = lab.wire();
    under_traffic(&wire, Some(&guest), C101, || {
        for _ in 0..20 {
            assert_eq!(daemon.summary().ports.len(), 1);
        }
    });
    daemon.stop();
    drop(guest);

    let daemon = Daemon::start(&lab.host, &["--uplink", "up0", "--map", "101=t0"]);
    daemon.signal(Signal::SIGUSR1);
    let table = eventually("a table", || {
        let lines = daemon.stdout();
        lines.iter().any(|line| line.contains("t0")).then_some(lines)
    });
    assert!(table.iter().all(|line| line.chars().count() <= 100), "{table:?}");
    assert!(table.iter().any(|line| line.contains("101")), "{table:?}");
}

/// All ways of waiting for frames forward, and only `busy` burns an idle core.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn every_way_of_polling_forwards() {
    let mut burnt = u64::MAX;
    for poll in ["busy", "adaptive", "sleep"] {
        let lab = Lab::new();
        let daemon = lab.daemon(&["--map", "101=t0", "--poll", poll]);
        let guest = lab.raw_guest("t0");
        daemon.attached(&["t0"]);
        let wire = lab.wire();
        for _ in 0..20 {
            assert_forwards(&wire, &guest, C101);
        }
        if poll == "busy" {
            burnt = daemon.cpu_nanoseconds_in(WINDOW);
        } else {
            quiet(&daemon, burnt, poll);
        }
        daemon.stop();
    }
}
