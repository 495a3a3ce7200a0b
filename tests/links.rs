//! Following and setting network devices, against a real kernel: each test in a
//! network namespace of its own, with iproute2 making the changes and judging
//! the results.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a failed unwrap, index or panic is a failed test"
)]

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use std::{fs, panic, thread};

use netlink_packet_core::NetlinkMessage;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_sys::SocketAddr;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{NetlinkAddr, getsockname, setsockopt, sockopt};
use nix::unistd::gettid;
use vlanswitchd::control::links::{
    LinkError, LinkEvent, LinkMonitor, LinkSettings, LinkSocket, LinkState, PreviousIpv6,
    disable_ipv6, restore_ipv6,
};

/// Long enough for any condition a test waits for, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(20);

/// Runs a test on a thread with a network namespace of its own, which goes with
/// the thread, its sockets and its devices, whether the test fails or not.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare needs root");
        test();
    });
    if let Err(panic) = thread.join() {
        panic::resume_unwind(panic);
    }
}

/// A second network namespace, held by a thread that waits.
struct OtherNamespace {
    path: PathBuf,
    release: Option<mpsc::Sender<()>>,
    holder: Option<thread::JoinHandle<()>>,
}

impl OtherNamespace {
    fn new() -> Self {
        let (release, released) = mpsc::channel::<()>();
        let (announce, announced) = mpsc::channel();
        let holder = thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare needs root");
            announce.send(gettid()).unwrap();
            // Ends when the sender is dropped.
            released.recv().ok();
        });
        let tid = announced.recv().unwrap();
        Self {
            path: PathBuf::from(format!("/proc/{}/task/{tid}/ns/net", std::process::id())),
            release: Some(release),
            holder: Some(holder),
        }
    }
}

impl Drop for OtherNamespace {
    fn drop(&mut self) {
        self.release.take();
        self.holder.take().map(thread::JoinHandle::join);
    }
}

fn output(program: &str, arguments: &str) -> String {
    let output = Command::new(program).args(arguments.split_whitespace()).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn ip(arguments: &str) -> String {
    output("ip", arguments)
}

/// Many commands in one process.
fn ip_batch(commands: &str) {
    let mut child = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(commands.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "ip -batch failed");
}

/// The first value of a key in the JSON that iproute2 prints, without quotes.
fn field(json: &str, key: &str) -> Option<String> {
    let (_, rest) = json.split_once(&format!("\"{key}\":"))?;
    Some(match rest.strip_prefix('"') {
        Some(text) => text.split('"').next()?.to_owned(),
        None => rest.split([',', '}', ']']).next()?.to_owned(),
    })
}

fn ip_link(name: &str) -> String {
    ip(&format!("-j -d link show dev {name}"))
}

fn index_of(name: &str) -> u32 {
    field(&ip_link(name), "ifindex").unwrap().parse().unwrap()
}

/// The root qdisc's kind according to tc.
fn tc_root(name: &str) -> Option<String> {
    let json = output("tc", &format!("-j qdisc show dev {name}"));
    json.split("},{").find(|qdisc| qdisc.contains("\"root\":true")).and_then(|q| field(q, "kind"))
}

/// Checks a state against what `ip` says about the device of that name.
fn assert_as_ip_shows(state: &LinkState) {
    let json = ip_link(&state.name);
    let flags = json.split_once("\"flags\":[").unwrap().1.split_once(']').unwrap().0.to_owned();
    let has = |flag: &str| flags.split(',').any(|word| word.trim_matches('"') == flag);
    let address: Vec<String> = state.address.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(field(&json, "ifindex"), Some(state.index.to_string()), "{json}");
    assert_eq!(field(&json, "mtu"), Some(state.mtu.to_string()), "{json}");
    assert_eq!(field(&json, "address"), Some(address.join(":")), "{json}");
    assert_eq!(field(&json, "info_kind"), state.kind, "{json}");
    assert_eq!(field(&json, "ifalias"), state.alias, "{json}");
    assert_eq!(field(&json, "txqlen"), Some(state.tx_queue_len.to_string()), "{json}");
    assert_eq!(field(&json, "link_type").as_deref() == Some("ether"), state.is_ethernet, "{json}");
    assert_eq!(has("UP"), state.up, "{json}");
    assert_eq!(has("LOWER_UP"), state.carrier, "{json}");
    assert_eq!(field(&json, "master").map(|name| index_of(&name)), state.master, "{json}");
}

/// The kernel's table as a monitor made just now sees it.
fn fresh_table() -> BTreeMap<u32, LinkState> {
    table(&LinkMonitor::new().unwrap())
}

fn table(monitor: &LinkMonitor) -> BTreeMap<u32, LinkState> {
    monitor.links().iter().map(|state| (state.index, state.clone())).collect()
}

fn events(monitor: &mut LinkMonitor) -> Vec<LinkEvent> {
    let mut events = Vec::new();
    monitor.read_events(|event| events.push(event)).unwrap();
    events
}

/// Reads events, sleeping in poll as a daemon does, until the table is as wanted.
fn events_until(
    monitor: &mut LinkMonitor,
    what: &str,
    wanted: impl Fn(&LinkMonitor) -> bool,
) -> Vec<LinkEvent> {
    let deadline = Instant::now() + DEADLINE;
    let mut seen = events(monitor);
    while !wanted(monitor) {
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "waited in vain until {what}; seen: {seen:#?}");
        let timeout = PollTimeout::try_from(left).unwrap();
        poll(&mut [PollFd::new(monitor.as_fd(), PollFlags::POLLIN)], timeout).unwrap();
        seen.extend(events(monitor));
    }
    seen
}

/// A consumer that follows names by the two parts of an event, and checks that
/// no name is taken before it is free.
fn follow(names: &mut HashMap<String, u32>, event: &LinkEvent) {
    if let Some(old) = event.departed() {
        assert_eq!(names.remove(&old.name), Some(old.index), "departed unarrived: {event:?}");
    }
    if let Some(new) = event.arrived() {
        assert_eq!(names.insert(new.name.clone(), new.index), None, "held name: {event:?}");
    }
}

fn names(table: &BTreeMap<u32, LinkState>) -> HashMap<String, u32> {
    table.values().map(|state| (state.name.clone(), state.index)).collect()
}

/// Events without those that only tell of flags, in short.
fn comings_and_goings(events: &[LinkEvent]) -> Vec<String> {
    let short = |event: &LinkEvent| match event {
        LinkEvent::Appeared(new) => Some(format!("+{}", new.name)),
        LinkEvent::Vanished(old) => Some(format!("-{}", old.name)),
        LinkEvent::Renamed { old, new } => Some(format!("{}>{}", old.name, new.name)),
        LinkEvent::Changed { .. } | LinkEvent::Unhooked { .. } => None,
    };
    events.iter().filter_map(short).collect()
}

// ---- following ----

#[test]
#[ignore = "needs root: network namespaces"]
fn the_first_dump_holds_what_ip_shows() {
    in_namespace(|| {
        ip("link add v0 type veth peer name v1");
        ip("link set v0 up");
        ip("link set v1 up alias far-end mtu 9000");
        ip("tuntap add dev t0 mode tap");
        ip("link set t0 txqueuelen 333");
        ip("link add b0 type bridge");
        ip("link set t0 master b0");
        ip("link add link v0 name m0 type macvtap");
        ip("tuntap add dev p0 mode tun");
        let monitor = LinkMonitor::new().unwrap();
        // lo, v0, v1, t0, b0, m0, p0
        assert_eq!(monitor.links().len(), 7);
        for name in ["v0", "v1", "t0", "b0", "m0"] {
            let state = monitor.links().by_name(name).unwrap();
            assert_as_ip_shows(state);
            assert_eq!(monitor.links().by_index(state.index), Some(state));
            assert!(state.is_ethernet);
        }
        assert!(!monitor.links().by_name("lo").unwrap().is_ethernet);
        assert!(!monitor.links().by_name("p0").unwrap().is_ethernet);
        assert_eq!(monitor.links().by_name("nobody"), None);
    });
}

#[test]
#[ignore = "needs root: network namespaces"]
fn each_change_of_a_device_is_an_event() {
    in_namespace(|| {
        let mut monitor = LinkMonitor::new().unwrap();
        assert_eq!(events(&mut monitor), []);

        ip("tuntap add dev t0 mode tap");
        let seen = events(&mut monitor);
        assert_eq!(comings_and_goings(&seen), ["+t0"]);
        assert_as_ip_shows(monitor.links().by_name("t0").unwrap());

        type IsSo = fn(&LinkState) -> bool;
        let steps: [(&str, IsSo); 6] = [
            ("up", |link| link.up),
            ("mtu 9000", |link| link.mtu == 9000),
            ("alias web", |link| link.alias.as_deref() == Some("web")),
            ("txqueuelen 77", |link| link.tx_queue_len == 77),
            ("address 02:00:00:00:00:07", |link| link.address == [2, 0, 0, 0, 0, 7]),
            ("down", |link| !link.up),
        ];
        for (change, is_so) in steps {
            assert!(!is_so(monitor.links().by_name("t0").unwrap()), "{change} before");
            ip(&format!("link set t0 {change}"));
            let seen = events(&mut monitor);
            assert!(
                seen.iter().any(|event| matches!(event,
                    LinkEvent::Changed { old, new } if !is_so(old) && is_so(new))),
                "{change}: {seen:?}"
            );
            assert_eq!(comings_and_goings(&seen), [""; 0], "{change}");
            assert_as_ip_shows(monitor.links().by_name("t0").unwrap());
        }

        ip("link del t0");
        assert_eq!(comings_and_goings(&events(&mut monitor)), ["-t0"]);
        assert_eq!(monitor.links().by_name("t0"), None);
        assert_eq!(monitor.overruns(), 0);
    });
}

#[test]
#[ignore = "needs root: network namespaces"]
fn a_device_made_anew_under_its_name_is_followed_within_one_read() {
    in_namespace(|| {
        ip("tuntap add dev t0 mode tap");
        let mut monitor = LinkMonitor::new().unwrap();
        let before = monitor.links().by_name("t0").unwrap().index;
        ip("link del t0");
        ip("tuntap add dev t0 mode tap");
        let seen = events(&mut monitor);
        assert_eq!(comings_and_goings(&seen), ["-t0", "+t0"]);
        let after = monitor.links().by_name("t0").unwrap();
        assert_ne!(after.index, before);
        assert_as_ip_shows(after);
        assert_eq!(monitor.links().by_index(before), None);
    });
}

#[test]
#[ignore = "needs root: network namespaces"]
fn names_are_followed_through_renames_and_swaps() {
    in_namespace(|| {
        ip("tuntap add dev t-a mode tap");
        ip("tuntap add dev t-b mode tap");
        let mut monitor = LinkMonitor::new().unwrap();
        let (a, b) = (index_of("t-a"), index_of("t-b"));

        ip("link set t-a name t-away");
        assert_eq!(comings_and_goings(&events(&mut monitor)), ["t-a>t-away"]);
        assert_eq!(monitor.links().by_name("t-a"), None);

        // The two swap names within one read.
        let mut followed = names(&table(&monitor));
        ip("link set t-b name t-tmp");
        ip("link set t-away name t-b");
        ip("link set t-tmp name t-a");
        let seen = events(&mut monitor);
        assert_eq!(comings_and_goings(&seen), ["t-b>t-tmp", "t-away>t-b", "t-tmp>t-a"]);
        seen.iter().for_each(|event| follow(&mut followed, event));
        assert_eq!(followed["t-a"], b);
        assert_eq!(followed["t-b"], a);
        assert_eq!(index_of("t-a"), b);
        assert_eq!(table(&monitor), fresh_table());
    });
}

#[test]
#[ignore = "needs root: network namespaces"]
fn a_device_moved_to_another_namespace_vanishes_and_comes_back() {
    in_namespace(|| {
        let other = OtherNamespace::new();
        ip("link add v0 type veth peer name v1");
        let mut monitor = LinkMonitor::new().unwrap();

        ip(&format!("link set v0 netns {}", other.path.display()));
        assert_eq!(comings_and_goings(&events(&mut monitor)), ["-v0"]);
        assert_eq!(table(&monitor), fresh_table());

        let home = format!("/proc/{}/task/{}/ns/net", std::process::id(), gettid());
        let there = format!("--net={}", other.path.display());
        let moved = Command::new("nsenter")
            .args([&there, "ip", "link", "set", "v0", "netns", &home])
            .status()
            .unwrap();
        assert!(moved.success());
        assert_eq!(comings_and_goings(&events(&mut monitor)), ["+v0"]);
        assert_as_ip_shows(monitor.links().by_name("v0").unwrap());
    });
}

#[test]
#[ignore = "needs root: network namespaces"]
fn leaving_a_bridge_is_not_vanishing() {
    in_namespace(|| {
        ip("link add b0 type bridge");
        ip("link add v0 type veth peer name v1");
        let bridge = index_of("b0");
        let mut monitor = LinkMonitor::new().unwrap();

        ip("link set v0 master b0");
        assert_eq!(comings_and_goings(&events(&mut monitor)), [""; 0]);
        assert_eq!(monitor.links().by_name("v0").unwrap().master, Some(bridge));

        ip("link set v0 nomaster");
        assert_eq!(comings_and_goings(&events(&mut monitor)), [""; 0]);
        assert_eq!(monitor.links().by_name("v0").unwrap().master, None);

        ip("link set v0 master b0");
        ip("link del b0");
        assert_eq!(comings_and_goings(&events(&mut monitor)), ["-b0"]);
        assert_eq!(table(&monitor), fresh_table());
    });
}

#[test]
#[ignore = "needs root: network namespaces and /dev/net/tun"]
fn carrier_follows_the_guest_of_a_tap_and_the_peer_of_a_veth() {
    in_namespace(|| {
        let carrier = |name: &'static str| {
            move |monitor: &LinkMonitor| monitor.links().by_name(name).unwrap().carrier
        };
        let no_carrier = |name: &'static str| {
            move |monitor: &LinkMonitor| !monitor.links().by_name(name).unwrap().carrier
        };
        ip("tuntap add dev t0 mode tap");
        ip("link set t0 up");
        ip("link add v0 type veth peer name v1");
        ip("link set v0 up");
        let mut monitor = LinkMonitor::new().unwrap();
        let mut timed = |what: &'static str, wanted: &dyn Fn(&LinkMonitor) -> bool| {
            let start = Instant::now();
            let seen = events_until(&mut monitor, what, wanted);
            println!("{what}: told after {:?}", start.elapsed());
            assert_eq!(comings_and_goings(&seen), [""; 0], "{what}");
            for name in ["t0", "v0"] {
                assert_as_ip_shows(monitor.links().by_name(name).unwrap());
            }
        };
        timed("a tap nobody has open has no carrier", &no_carrier("t0"));
        let guest = tun_tap::Iface::without_packet_info("t0", tun_tap::Mode::Tap).unwrap();
        timed("a guest opened the tap", &carrier("t0"));
        drop(guest);
        timed("the guest closed the tap", &no_carrier("t0"));

        timed("the veth's peer is still down", &no_carrier("v0"));
        ip("link set v1 up");
        timed("the veth's peer came up", &carrier("v0"));
        ip("link set v1 down");
        timed("the veth's peer went down", &no_carrier("v0"));
    });
}

/// A guest that comes while the tap is down makes no notification of its own
/// (`linkwatch_do_dev`): the carrier must be right once the tap is up.
#[test]
#[ignore = "needs root: network namespaces and /dev/net/tun"]
fn carrier_is_right_after_changing_while_the_device_was_down() {
    in_namespace(|| {
        ip("tuntap add dev t0 mode tap");
        let mut monitor = LinkMonitor::new().unwrap();
        let guest = tun_tap::Iface::without_packet_info("t0", tun_tap::Mode::Tap).unwrap();
        events(&mut monitor);
        assert_as_ip_shows(monitor.links().by_name("t0").unwrap());
        ip("link set t0 up");
        events_until(&mut monitor, "up with carrier", |monitor| {
            monitor.links().by_name("t0").unwrap().carrier
        });
        ip("link set t0 down");
        drop(guest);
        events_until(&mut monitor, "down", |monitor| !monitor.links().by_name("t0").unwrap().up);
        assert_as_ip_shows(monitor.links().by_name("t0").unwrap());
        ip("link set t0 up");
        events_until(&mut monitor, "up again", |monitor| monitor.links().by_name("t0").unwrap().up);
        assert_as_ip_shows(monitor.links().by_name("t0").unwrap());
    });
}

/// Any process with the capability can send to a netlink socket; only the kernel
/// is to be believed.
#[test]
#[ignore = "needs root: network namespaces"]
fn a_notification_from_another_process_is_not_believed() {
    in_namespace(|| {
        ip("tuntap add dev t0 mode tap");
        let mut monitor = LinkMonitor::new().unwrap();
        let mut forged = LinkMessage::default();
        forged.header.index = index_of("t0");
        let mut message = NetlinkMessage::from(RouteNetlinkMessage::DelLink(forged));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        let address: NetlinkAddr = getsockname(monitor.as_raw_fd()).unwrap();
        let mut socket = netlink_sys::Socket::new(NETLINK_ROUTE).unwrap();
        socket.bind_auto().unwrap();
        let sent = socket.send_to(&bytes, &SocketAddr::new(address.pid(), 0), 0);
        assert_eq!(sent.unwrap(), bytes.len());
        assert_eq!(events(&mut monitor), []);
        // It was there to be read: the queue is empty, and the next one is seen.
        ip("link del t0");
        assert_eq!(comings_and_goings(&events(&mut monitor)), ["-t0"]);
    });
}

#[test]
#[ignore = "needs root: network namespaces"]
fn an_overrun_loses_no_change() {
    in_namespace(|| {
        ip_batch(
            "tuntap add dev keep mode tap\ntuntap add dev again mode tap\n\
             tuntap add dev gone mode tap\ntuntap add dev old mode tap\n",
        );
        let mut monitor = LinkMonitor::new().unwrap();
        setsockopt(&monitor, sockopt::RcvBuf, &1).unwrap();
        let before = table(&monitor);
        let again = index_of("again");

        // More than fits, so that what follows is surely lost.
        let flood: String =
            (0..100).map(|mtu| format!("link set keep mtu {}\n", 2000 + mtu)).collect();
        ip_batch(&flood);
        ip_batch(
            "link del again\ntuntap add dev again mode tap\nlink del gone\n\
             link set old name renamed\ntuntap add dev new mode tap\nlink set keep up\n",
        );

        let seen = events(&mut monitor);
        assert_eq!(monitor.overruns(), 1);
        assert_eq!(table(&monitor), fresh_table());
        let mut told = comings_and_goings(&seen);
        told.sort();
        assert_eq!(told, ["+again", "+new", "-again", "-gone", "old>renamed"]);
        let mut followed = names(&before);
        seen.iter().for_each(|event| follow(&mut followed, event));
        assert_eq!(followed, names(&table(&monitor)));
        assert_ne!(followed["again"], again);
        assert!(seen.iter().any(|event| matches!(event,
            LinkEvent::Changed { old, new } if new.name == "keep" && !old.up && new.up)));

        // And it goes on by notifications, not dumps.
        ip("link set new mtu 1400");
        assert_eq!(events(&mut monitor).len(), 1);
        assert_eq!(monitor.overruns(), 1);
    });
}

/// Devices come, go, are renamed and change while the monitor reads, overruns and
/// lists anew: at the end it knows what the kernel knows, and what it told adds up.
fn storm(slow_reader: bool) {
    // What a script would do to twenty taps, in one `ip` process.
    let step = |round: u32, n: u32| match (round + n) % 5 {
        0 => format!("link del t{n}\ntuntap add dev t{n} mode tap\n"),
        1 => format!("link set t{n} up\n"),
        2 => format!(
            "link set t{n} down\nlink set t{n} name x{n}\nlink set x{n} mtu 1400\n\
             link set x{n} name t{n}\n"
        ),
        3 => format!("link set t{n} mtu {}\n", 1000 + round),
        // To down devices too, which the next notification must make up for.
        _ => format!("link set t{n} alias round{round}\n"),
    };
    let script: String = (0..20u32)
        .flat_map(|round| (0..20).map(move |n| (round, n)))
        .map(|(round, n)| step(round, n))
        .collect();

    ip_batch(&(0..20).map(|n| format!("tuntap add dev t{n} mode tap\n")).collect::<String>());
    let mut monitor = LinkMonitor::new().unwrap();
    if slow_reader {
        // Room for one notification: every other one is lost.
        setsockopt(&monitor, sockopt::RcvBuf, &1).unwrap();
    }
    let mut followed = names(&table(&monitor));
    // Children of this thread live in its namespace.
    let mut changes =
        Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().unwrap();
    let mut commands = changes.stdin.take().unwrap();
    let writer = thread::spawn(move || commands.write_all(script.as_bytes()).unwrap());

    let deadline = Instant::now() + DEADLINE;
    let mut told = 0;
    let status = loop {
        // Whether the storm is over is asked before the last read.
        let over = changes.try_wait().unwrap();
        monitor
            .read_events(|event| {
                follow(&mut followed, &event);
                told += 1;
            })
            .unwrap();
        if let Some(status) = over {
            break status;
        }
        assert!(Instant::now() < deadline, "the storm does not end");
        if slow_reader {
            thread::sleep(Duration::from_millis(10));
        } else {
            let timeout = PollTimeout::from(50u8);
            poll(&mut [PollFd::new(monitor.as_fd(), PollFlags::POLLIN)], timeout).unwrap();
        }
    };
    writer.join().unwrap();
    assert!(status.success());
    println!("{told} events, {} overruns", monitor.overruns());
    assert_eq!(monitor.overruns() > 0, slow_reader);

    // The kernel tells of an alias given to a down device with the next change.
    ip_batch(&(0..20).map(|n| format!("link set t{n} mtu 1234\n")).collect::<String>());
    events_until(&mut monitor, "the table is the kernel's", |monitor| {
        table(monitor) == fresh_table()
    })
    .iter()
    .for_each(|event| follow(&mut followed, event));
    assert_eq!(followed, names(&fresh_table()));
}

#[test]
#[ignore = "needs root: network namespaces"]
fn reading_along_in_a_storm_of_changes_ends_in_the_truth() {
    in_namespace(|| storm(false));
}

#[test]
#[ignore = "needs root: network namespaces"]
fn overrunning_in_a_storm_of_changes_ends_in_the_truth() {
    in_namespace(|| storm(true));
}

#[test]
#[ignore = "needs root: network namespaces"]
fn a_thousand_devices_are_listed_and_followed() {
    in_namespace(|| {
        let pairs: String =
            (0..500).map(|n| format!("link add v{n} type veth peer name w{n}\n")).collect();
        ip_batch(&pairs);
        let start = Instant::now();
        let mut monitor = LinkMonitor::new().unwrap();
        println!("1001 devices listed in {:?}", start.elapsed());
        assert_eq!(monitor.links().len(), 1001);
        for name in ["v0", "w499"] {
            assert_as_ip_shows(monitor.links().by_name(name).unwrap());
        }

        ip_batch(&(0..500).map(|n| format!("link set v{n} up\n")).collect::<String>());
        let start = Instant::now();
        let seen = events(&mut monitor);
        println!(
            "{} events of 500 devices set up read in {:?}, {} overruns",
            seen.len(),
            start.elapsed(),
            monitor.overruns()
        );
        assert_eq!(monitor.links().iter().filter(|link| link.up).count(), 500);

        ip_batch(&(0..500).map(|n| format!("link del v{n}\n")).collect::<String>());
        let start = Instant::now();
        let seen = events(&mut monitor);
        println!(
            "{} events of 1000 devices deleted read in {:?}, {} overruns",
            seen.len(),
            start.elapsed(),
            monitor.overruns()
        );
        assert_eq!(comings_and_goings(&seen).len(), 1000);
        assert_eq!(monitor.links().len(), 1);
    });
}

// ---- setting ----

#[test]
#[ignore = "needs root: network namespaces"]
fn each_setting_is_what_ip_shows() {
    in_namespace(|| {
        ip("tuntap add dev t0 mode tap");
        let index = index_of("t0");
        let mut socket = LinkSocket::new().unwrap();
        let shown = |key: &str| field(&ip_link("t0"), key);
        let flag = |name: &str| {
            let json = ip_link("t0");
            let flags = json.split_once("\"flags\":[").unwrap().1.split_once(']').unwrap().0;
            flags.split(',').any(|word| word.trim_matches('"') == name)
        };

        socket.set_up(index).unwrap();
        assert!(flag("UP"));
        socket.set_down(index).unwrap();
        assert!(!flag("UP"));
        socket.set_mtu(index, 65521).unwrap();
        assert_eq!(shown("mtu").as_deref(), Some("65521"));
        socket.set_noarp(index, true).unwrap();
        assert!(flag("NOARP"));
        socket.set_noarp(index, false).unwrap();
        assert!(!flag("NOARP"));
        socket.set_alias(index, "VLAN 101 of web1").unwrap();
        assert_eq!(shown("ifalias").as_deref(), Some("VLAN 101 of web1"));
        socket.set_alias(index, "").unwrap();
        assert_eq!(shown("ifalias"), None);
        assert_eq!(shown("inet6_addr_gen_mode").as_deref(), Some("eui64"));
        socket.set_inet6_addr_gen_mode_none(index).unwrap();
        assert_eq!(shown("inet6_addr_gen_mode").as_deref(), Some("none"));

        socket
            .configure(
                index,
                &LinkSettings {
                    up: Some(true),
                    mtu: Some(9000),
                    noarp: Some(true),
                    alias: Some("all at once".into()),
                    tx_queue_len: Some(1024),
                    addr_gen_none: true,
                },
            )
            .unwrap();
        assert!(flag("UP") && flag("NOARP"));
        assert_eq!(shown("mtu").as_deref(), Some("9000"));
        assert_eq!(shown("ifalias").as_deref(), Some("all at once"));
        assert_eq!(shown("txqlen").as_deref(), Some("1024"));
        assert_as_ip_shows(&socket.link(index).unwrap());

        // What is not asked for stays.
        socket.configure(index, &LinkSettings::default()).unwrap();
        assert!(flag("UP") && flag("NOARP"));
        assert_eq!(shown("mtu").as_deref(), Some("9000"));

        socket.delete_link(index).unwrap();
        assert!(!ip("-j link").contains("\"t0\""));
    });
}

#[test]
#[ignore = "needs root: network namespaces"]
fn the_root_qdisc_is_what_tc_shows() {
    in_namespace(|| {
        let mut socket = LinkSocket::new().unwrap();
        for kind in ["", "multi_queue"] {
            for up in [false, true] {
                ip(&format!("tuntap add dev t0 mode tap {kind}"));
                let index = index_of("t0");
                if up {
                    ip("link set t0 up");
                }
                let default = socket.root_qdisc_kind(index).unwrap();
                assert_ne!(default.as_deref(), Some("noqueue"));
                if up {
                    assert_eq!(default, tc_root("t0"));
                }

                socket.set_root_qdisc_noqueue(index).unwrap();
                assert_eq!(socket.root_qdisc_kind(index).unwrap().as_deref(), Some("noqueue"));
                assert_eq!(tc_root("t0").as_deref(), Some("noqueue"));
                // Setting the device up afterwards keeps it, and so does setting it again.
                socket.set_up(index).unwrap();
                assert_eq!(tc_root("t0").as_deref(), Some("noqueue"));
                let qdiscs = output("tc", "-j qdisc show dev t0");
                socket.set_root_qdisc_noqueue(index).unwrap();
                assert_eq!(output("tc", "-j qdisc show dev t0"), qdiscs);

                socket.delete_root_qdisc(index).unwrap();
                let after = socket.root_qdisc_kind(index).unwrap();
                assert_ne!(after.as_deref(), Some("noqueue"));
                assert_eq!(after, tc_root("t0"));
                socket.delete_root_qdisc(index).unwrap();
                assert_eq!(socket.root_qdisc_kind(index).unwrap(), after);
                println!("{kind:12} up {up}: {default:?} -> noqueue -> {after:?}");
                ip("link del t0");
            }
        }
    });
}

/// A tap that a guest has open comes up with a carrier, and the kernel makes the
/// address within the same request, before it gets to the request's `addrgenmode`.
#[test]
#[ignore = "needs root: network namespaces and /dev/net/tun"]
fn a_device_configured_with_addr_gen_none_comes_up_without_an_address() {
    in_namespace(|| {
        let mut socket = LinkSocket::new().unwrap();
        // The control: without it, the same device gets an address by itself.
        for addr_gen_none in [false, true] {
            let guest = tun_tap::Iface::without_packet_info("t0", tun_tap::Mode::Tap).unwrap();
            let index = index_of("t0");
            let settings = LinkSettings { up: Some(true), addr_gen_none, ..Default::default() };
            socket.configure(index, &settings).unwrap();
            assert_eq!(socket.addresses(index).unwrap().is_empty(), addr_gen_none);
            drop(guest);
            assert!(!ip("-j link").contains("\"t0\""));
        }
    });
}

#[test]
#[ignore = "needs root: network namespaces"]
fn the_hosts_addresses_are_those_of_the_device_alone() {
    in_namespace(|| {
        ip("link add v0 type veth peer name v1");
        ip("addr add 192.0.2.1/24 dev v0");
        ip("addr add 198.51.100.1 peer 198.51.100.2 dev v0");
        ip("addr add 2001:db8::1/64 dev v0 nodad");
        ip("addr add 192.0.2.9/24 dev v1");
        let mut socket = LinkSocket::new().unwrap();
        let mut addresses = socket.addresses(index_of("v0")).unwrap();
        addresses.sort();
        let texts: Vec<String> = addresses.iter().map(ToString::to_string).collect();
        assert_eq!(texts, ["192.0.2.1", "198.51.100.1", "2001:db8::1"]);
        assert!(socket.addresses(9999).unwrap().is_empty());
    });
}

#[test]
#[ignore = "needs root: network namespaces"]
fn ipv6_is_switched_off_and_put_back() {
    in_namespace(|| {
        let setting =
            |name: &str| output("cat", &format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"));
        ip("link add v0 type veth peer name v1");
        ip("addr add 2001:db8::1/64 dev v0 nodad");
        let mut socket = LinkSocket::new().unwrap();
        let index = index_of("v0");

        assert_eq!(disable_ipv6("v0").unwrap(), PreviousIpv6::Enabled);
        assert_eq!(setting("v0").trim(), "1");
        assert!(socket.addresses(index).unwrap().is_empty());
        assert_eq!(disable_ipv6("v0").unwrap(), PreviousIpv6::Disabled);
        restore_ipv6("v0", PreviousIpv6::Disabled).unwrap();
        assert_eq!(setting("v0").trim(), "1");
        restore_ipv6("v0", PreviousIpv6::Enabled).unwrap();
        assert_eq!(setting("v0").trim(), "0");
        // Nobody else was touched.
        for name in ["v1", "all", "default", "lo"] {
            assert_eq!(setting(name).trim(), "0", "{name}");
        }

        // A device too small for IPv6 has none: nothing to switch off, and the
        // other settings are applied all the same.
        ip("link set v1 mtu 1000");
        assert_eq!(disable_ipv6("v1").unwrap(), PreviousIpv6::Absent);
        let index = index_of("v1");
        let settings = LinkSettings {
            noarp: Some(true),
            alias: Some("small".into()),
            addr_gen_none: true,
            ..Default::default()
        };
        socket.configure(index, &settings).unwrap();
        assert_eq!(field(&ip_link("v1"), "ifalias").as_deref(), Some("small"));
        assert!(ip_link("v1").contains("NOARP"));
    });
}

#[test]
#[ignore = "needs root: network namespaces"]
fn errors_name_the_device_the_operation_and_the_cure() {
    in_namespace(|| {
        ip("tuntap add dev tap-web1 mode tap");
        let index = index_of("tap-web1");
        let mut socket = LinkSocket::new().unwrap();

        let error = socket.set_mtu(index, 70_000).unwrap_err();
        println!("{error}");
        let text = error.to_string();
        assert!(text.starts_with(&format!("tap-web1 (index {index}): cannot set mtu 70000: ")));
        assert!(text.contains("mtu greater than device maximum"), "the kernel's own words: {text}");
        // Refused, so it did not come up either.
        let settings = LinkSettings {
            up: Some(true),
            mtu: Some(70_000),
            addr_gen_none: true,
            ..Default::default()
        };
        socket.configure(index, &settings).unwrap_err();
        assert!(!socket.link(index).unwrap().up);

        let error = socket.set_alias(index, &"x".repeat(255)).unwrap_err();
        println!("{error}");
        assert!(matches!(error, LinkError::BadValue { .. }));
        socket.set_alias(index, &"x".repeat(254)).unwrap();

        ip("link del tap-web1");
        for error in [
            socket.set_up(index).unwrap_err(),
            socket.set_root_qdisc_noqueue(index).unwrap_err(),
            socket.delete_root_qdisc(index).unwrap_err(),
            socket.delete_link(index).unwrap_err(),
            socket.link(index).unwrap_err(),
        ] {
            println!("{error}");
            assert!(error.is_device_gone(), "{error}");
            assert!(error.to_string().contains(&format!("device {index}:")), "{error}");
        }
        // The socket is still good.
        ip("link set lo up");
        assert!(socket.link(1).unwrap().up);

        // Only this thread loses the capability.
        caps::drop(None, caps::CapSet::Effective, caps::Capability::CAP_NET_ADMIN).unwrap();
        let error = LinkSocket::new().unwrap().set_down(1).unwrap_err();
        println!("{error}");
        assert!(error.to_string().starts_with("lo (index 1): cannot set down: "));
        assert!(error.to_string().ends_with("CAP_NET_ADMIN"));
        // Watching needs no capability.
        assert_eq!(LinkMonitor::new().unwrap().links().len(), 1);
    });
}

#[test]
#[ignore = "needs root: network namespaces"]
fn a_device_with_noqueue_of_its_own_is_left_alone() {
    in_namespace(|| {
        ip("link add v0 type veth peer name v1");
        ip("link set v0 up");
        let before = output("tc", "-j qdisc show dev v0");
        assert_eq!(tc_root("v0").as_deref(), Some("noqueue"));
        let mut socket = LinkSocket::new().unwrap();
        socket.set_root_qdisc_noqueue(index_of("v0")).unwrap();
        assert_eq!(output("tc", "-j qdisc show dev v0"), before);
    });
}

/// What the start of a host with 100 ports costs. Prints; asserts only the result.
#[test]
#[ignore = "needs root: network namespaces"]
fn a_hundred_taps_are_prepared() {
    in_namespace(|| {
        const TAPS: u32 = 100;
        ip_batch(&(0..TAPS).map(|n| format!("tuntap add dev t{n} mode tap\n")).collect::<String>());
        let monitor = LinkMonitor::new().unwrap();
        let mut socket = LinkSocket::new().unwrap();
        let mut spent: BTreeMap<&str, Duration> = BTreeMap::new();
        let mut timed = |what: &'static str, action: &mut dyn FnMut()| {
            let start = Instant::now();
            action();
            *spent.entry(what).or_default() += start.elapsed();
        };
        let settings = LinkSettings {
            mtu: Some(65521),
            noarp: Some(true),
            tx_queue_len: Some(1024),
            addr_gen_none: true,
            ..Default::default()
        };
        let start = Instant::now();
        for n in 0..TAPS {
            let name = format!("t{n}");
            let index = monitor.links().by_name(&name).unwrap().index;
            timed("disable_ipv6", &mut || {
                disable_ipv6(&name).unwrap();
            });
            timed("configure", &mut || socket.configure(index, &settings).unwrap());
            timed("noqueue", &mut || socket.set_root_qdisc_noqueue(index).unwrap());
            timed("up", &mut || socket.set_up(index).unwrap());
        }
        println!("{TAPS} taps prepared in {:?}: {spent:?}", start.elapsed());
        for state in fresh_table().values().filter(|state| state.name != "lo") {
            assert!(state.up && state.mtu == 65521 && state.tx_queue_len == 1024, "{state:?}");
        }
        assert_eq!(output("tc", "qdisc show").matches("noqueue").count(), TAPS as usize);
        assert!(
            fs::read_to_string("/proc/sys/net/ipv6/conf/t0/disable_ipv6").unwrap().starts_with('1')
        );
    });
}
