//! Several workers: frames are steered to the one that has their port, ports change it
//! under traffic without loss or reordering, and the uplink may come and go.
//!
//! The other tests of the daemon run with several workers too, by `VLANSWITCHD_WORKERS=2`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::both_ways::{Arrived, both_ways, both_ways_twice};
use lab::frames::{Frame, TagBytes, tag};
use lab::raw::Held;
use lab::{Daemon, Lab, RawGuest, eventually};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vlanswitchd::control::api::{
    Change, Port, PortReply, PortsReply, Request, Status, StatusReply,
};
use vlanswitchd::control::client::{Client, ClientError};

const fn vlan(vid: u16) -> TagBytes {
    tag(0x8100, vid)
}

/// A daemon with a control socket.
struct Switch {
    daemon: Daemon,
    folder: TempDir,
}

impl Switch {
    fn start(lab: &Lab, arguments: &[&str]) -> Self {
        let folder = TempDir::new().unwrap();
        let control = folder.path().join("control").display().to_string();
        let daemon = lab.daemon(&[&["--control", &control], arguments].concat());
        Self { daemon, folder }
    }

    fn call(&self, request: Request) -> Result<Port, ClientError> {
        let mut client = Client::connect(&self.folder.path().join("control")).unwrap();
        client.call(&request).map(|reply| reply.read::<PortReply>().unwrap().port)
    }

    fn move_port(&self, name: &str, worker: u32) -> Result<Port, ClientError> {
        self.call(Request::MovePort { name: name.to_owned(), worker })
    }

    fn add(&self, map: &str) -> Port {
        self.call(Request::AddPort { map: map.to_owned(), persist: None }).unwrap()
    }

    fn remove(&self, name: &str) {
        let mut client = Client::connect(&self.folder.path().join("control")).unwrap();
        client.call(&Request::RemovePort { name: name.to_owned(), persist: None }).unwrap();
    }

    fn set(&self, name: &str, vlan: &str) -> Port {
        let changes = vec![Change { key: "vlan".to_owned(), value: vlan.to_owned() }];
        self.call(Request::SetPort { name: name.to_owned(), changes, persist: None }).unwrap()
    }

    /// The worker of each port.
    fn placed(&self) -> Vec<(String, u32)> {
        let mut client = Client::connect(&self.folder.path().join("control")).unwrap();
        let reply = client.call(&Request::ListPorts {}).unwrap();
        let ports = reply.read::<PortsReply>().unwrap().ports;
        ports.into_iter().map(|port| (port.name, port.worker.unwrap())).collect()
    }

    fn worker_of(&self, name: &str) -> u32 {
        self.placed().into_iter().find(|(port, _)| port == name).unwrap().1
    }

    fn status(&self) -> Status {
        let mut client = Client::connect(&self.folder.path().join("control")).unwrap();
        client.call(&Request::GetStatus {}).unwrap().read::<StatusReply>().unwrap().status
    }
}

/// One numbered frame each way through a port.
fn passes(lab: &Lab, guest: &RawGuest, tag: TagBytes, number: u64) {
    let wire = lab.wire();
    wire.only_vid(tag.vid);
    wire.send(&Frame::numbered(number).tags(&[tag]));
    let arrived = Frame::read(&guest.receive_within(Duration::from_secs(5)).unwrap());
    assert_eq!((arrived.number(), arrived.tags.len()), (number, 0));
    guest.send(&Frame::numbered(number).reversed());
    let arrived = loop {
        let frame = Frame::read(&wire.receive_within(Duration::from_secs(5)).unwrap());
        // Another port's may have come before the filter was there.
        if frame.tags.first().is_none_or(|first| first.vid == tag.vid) {
            break frame;
        }
    };
    assert_eq!((arrived.number(), &arrived.tags[..]), (number, &[tag][..]));
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn ports_move_under_traffic_and_every_frame_arrives_once_and_in_order() {
    let lab = Lab::new();
    let arguments = ["--workers", "2", "--rebalance", "off", "--map", "101=t0", "--map", "102=t1"];
    let switch = Switch::start(&lab, &arguments);
    let (one, other) = (lab.raw_guest("t0"), lab.raw_guest("t1"));
    switch.daemon.attached(&["t0", "t1"]);
    assert_eq!(switch.placed(), [("t0".to_owned(), 0), ("t1".to_owned(), 1)]);
    let (mut moves, mut longest) = (0, Duration::ZERO);
    let (frames, _) = both_ways_twice(&lab, [(&one, vlan(101)), (&other, vlan(102))], |_| {
        for round in 0..150 {
            let begin = Instant::now();
            switch.move_port("t0", (round + 1) % 2).unwrap();
            longest = longest.max(begin.elapsed());
            if round % 3 == 0 {
                switch.move_port("t1", round % 2).unwrap();
                moves += 1;
            }
            moves += 1;
        }
    });
    assert!(frames.as_flattened().iter().all(|count| *count > 1000), "{frames:?}");
    println!("{frames:?} frames during {moves} moves, the longest took {longest:?}");
    let summary = switch.daemon.stop();
    assert_eq!(summary.from_wire.all_drops(), 0, "{:?}", summary.from_wire);
}

/// The id of a worker's thread.
fn thread_of(daemon: &Daemon, worker: u32) -> i32 {
    let named = format!("worker-{worker}\n");
    let tasks = std::fs::read_dir(format!("/proc/{}/task", daemon.id())).unwrap();
    let mut tasks = tasks.flatten().map(|task| task.path());
    let path = tasks.find(|path| std::fs::read_to_string(path.join("comm")).unwrap() == named);
    path.unwrap().file_name().unwrap().to_str().unwrap().parse().unwrap()
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_move_with_a_worker_that_stands_still_is_refused_and_changes_nothing() {
    let lab = Lab::new();
    let arguments = ["--workers", "2", "--rebalance", "off", "--map", "101=t0", "--map", "102=t1"];
    let switch = Switch::start(&lab, &arguments);
    let (one, other) = (lab.raw_guest("t0"), lab.raw_guest("t1"));
    switch.daemon.attached(&["t0", "t1"]);
    let before = [("t0".to_owned(), 0), ("t1".to_owned(), 1)];
    assert_eq!(switch.placed(), before);
    let refused = |still: u32| {
        let held = Held::hold(thread_of(&switch.daemon, still));
        let error = switch.move_port("t0", 1).unwrap_err().to_string();
        assert!(error.contains(&format!("worker {still} does not answer")), "{error}");
        assert_eq!(switch.placed(), before);
        // At once, now that it is known; so is a change that takes a move.
        let begin = Instant::now();
        eventually("it is known", || switch.status().workers[still as usize].stuck.then_some(()));
        assert!(switch.move_port("t0", 1).is_err());
        let shared = vec![Change { key: "vlan".to_owned(), value: "102.5".to_owned() }];
        let change = Request::SetPort { name: "t0".to_owned(), changes: shared, persist: None };
        assert!(switch.call(change).is_err());
        println!("worker {still}: {error}; then {:?}", begin.elapsed());
        assert_eq!(switch.placed(), before);
        drop(held);
    };
    // The first as soon as the worker answers, which is when late answers come.
    let moves = |after_each: &dyn Fn(u32)| {
        eventually("it moves again", || switch.move_port("t0", 1).ok());
        for round in 0..21 {
            after_each(round);
            switch.move_port("t0", round % 2).unwrap();
        }
    };
    // The one that is to have the port: all frames wait for it, or are not its.
    both_ways_twice(&lab, [(&one, vlan(101)), (&other, vlan(102))], |arrived| {
        refused(1);
        moves(&|_| ());
        arrived.into_iter().for_each(Arrived::flows);
    });
    // The one that has it: the other serves its own ports on.
    both_ways(&lab, &other, vlan(102), |arrived| {
        refused(0);
        moves(&|round| passes(&lab, &one, vlan(101), u64::from(round) + 1));
        arrived.flows();
    });
    assert_eq!(switch.placed(), before);
    let summary = switch.daemon.stop();
    assert_eq!(summary.from_wire.all_drops(), 0, "{:?}", summary.from_wire);
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn ports_of_both_workers_come_change_and_go_and_others_lose_no_frame() {
    let lab = Lab::new();
    let arguments = ["--workers", "2", "--map", "101=t0", "--map", "102=t1"];
    let switch = Switch::start(&lab, &arguments);
    let (one, other) = (lab.raw_guest("t0"), lab.raw_guest("t1"));
    switch.daemon.attached(&["t0", "t1"]);
    let (frames, _) = both_ways_twice(&lab, [(&one, vlan(101)), (&other, vlan(102))], |_| {
        for round in 0..20 {
            switch.add(&format!("{}=t2", 200 + round));
            switch.add(&format!("{}.1=t3", 300 + round));
            assert_ne!(switch.worker_of("t2"), switch.worker_of("t3"), "they spread");
            switch.set("t2", &format!("{}.2", 300 + round));
            assert_eq!(switch.worker_of("t2"), switch.worker_of("t3"), "they share a VLAN");
            switch.remove("t2");
            switch.remove("t3");
        }
    });
    assert!(frames.as_flattened().iter().all(|count| *count > 1000), "{frames:?}");
    let summary = switch.daemon.stop();
    assert_eq!(summary.from_wire.all_drops(), 0, "{:?}", summary.from_wire);
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn tag_pairs_of_one_outer_vlan_move_together() {
    let lab = Lab::new();
    let maps = ["--map", "101.20=t0", "--map", "101.21=t1", "--map", "102=t2"];
    let arguments = [&["--workers", "2", "--rebalance", "off"], &maps[..]].concat();
    let switch = Switch::start(&lab, &arguments);
    let guests = [lab.raw_guest("t0"), lab.raw_guest("t1"), lab.raw_guest("t2")];
    switch.daemon.attached(&["t0", "t1", "t2"]);
    let workers = || switch.placed().into_iter().map(|(_, worker)| worker).collect::<Vec<_>>();
    assert_eq!(workers(), [0, 0, 1]);
    assert_eq!(switch.move_port("t1", 1).unwrap().worker, Some(1));
    assert_eq!(workers(), [1, 1, 1]);
    let loads = switch.status().workers;
    assert_eq!(loads.iter().map(|worker| worker.ports).collect::<Vec<_>>(), [0, 3]);
    let wire = lab.wire();
    for (guest, inner) in guests[..2].iter().zip([20, 21]) {
        wire.send(&Frame::numbered(1).tags(&[vlan(101), vlan(inner)]));
        let arrived = guest.receive_within(Duration::from_secs(5)).unwrap();
        assert_eq!(Frame::read(&arrived).number(), 1);
    }
    let refused = switch.move_port("t1", 2).unwrap_err().to_string();
    assert!(refused.contains("numbered from 0 to 1"), "{refused}");
    // A VLAN goes from a port of one worker to a port of the other.
    switch.move_port("t2", 0).unwrap();
    switch.set("t2", "102-103");
    switch.set("t2", "103");
    switch.set("t0", "102");
    switch.set("t1", "101");
    passes(&lab, &guests[0], vlan(102), 5);
    passes(&lab, &guests[1], vlan(101), 6);
    passes(&lab, &guests[2], vlan(103), 7);
    switch.daemon.stop();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn the_uplink_may_come_go_and_be_down() {
    let lab = Lab::new();
    lab.host.ip("link set up0 down");
    let maps = ["--map", "101=t0", "--map", "102=t1", "--map", "0=t2"];
    let switch = Switch::start(&lab, &[&["--workers", "3"], &maps[..]].concat());
    let guests = [lab.raw_guest("t0"), lab.raw_guest("t1")];
    assert_eq!(switch.status().uplink_state, "down");
    let works = |number| {
        eventually("the uplink is up", || (switch.status().uplink_state == "up").then_some(()));
        switch.daemon.attached(&["t0", "t1"]);
        passes(&lab, &guests[0], vlan(101), number);
        passes(&lab, &guests[1], vlan(102), number);
    };
    lab.host.ip("link set up0 up");
    works(1);
    // The kernel takes the sockets out of their group and puts them in again.
    lab.host.ip("link set up0 down");
    eventually("it is down", || (switch.status().uplink_state == "down").then_some(()));
    lab.host.ip("link set up0 up");
    works(2);
    lab.host.ip("link delete up0");
    eventually("it is gone", || (switch.status().uplink_state == "absent").then_some(()));
    lab.plug_uplink();
    works(3);
    let summary = switch.daemon.stop();
    assert_eq!(summary.from_wire.dropped("wrong_worker"), 0, "{:?}", summary.from_wire);
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn ports_spread_when_one_worker_has_too_much_to_do() {
    let lab = Lab::new();
    let maps = ["--map", "101=t0", "--map", "102=t1", "--map", "103=t2", "--map", "104=t3"];
    let switch = Switch::start(&lab, &[&["--workers", "2"], &maps[..]].concat());
    let guests = ["t0", "t1", "t2", "t3"].map(|name| {
        switch.move_port(name, 0).unwrap();
        lab.raw_guest(name)
    });
    switch.daemon.attached(&["t0", "t1", "t2", "t3"]);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for guest in &guests {
            let stop = &stop;
            scope.spawn(move || {
                let frame = Frame::numbered(1).reversed();
                while !stop.load(Ordering::Relaxed) {
                    guest.send(&frame);
                }
            });
        }
        struct Stop<'s>(&'s AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stop = Stop(&stop);
        eventually("a port has moved", || {
            switch.placed().iter().any(|(_, worker)| *worker == 1).then_some(())
        });
    });
    switch.daemon.stop();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn workers_run_on_the_cpus_named() {
    let lab = Lab::new();
    let daemon = lab.daemon(&["--workers", "3", "--cpus", "0", "--map", "101=t0"]);
    let folder = format!("/proc/{}/task", daemon.id());
    let mut workers = 0;
    for task in std::fs::read_dir(folder).unwrap().flatten() {
        let read = |name| std::fs::read_to_string(task.path().join(name)).unwrap();
        if read("comm").starts_with("worker-") {
            workers += 1;
            let status = read("status");
            let line = status.lines().find(|line| line.starts_with("Cpus_allowed_list:")).unwrap();
            assert_eq!(line.split_whitespace().last(), Some("0"), "{line}");
        }
    }
    assert_eq!(workers, 3);
    daemon.stop();
    let failure = lab.failing_daemon(&["--uplink", "up0", "--cpus", "1023", "--map", "101=t0"]);
    assert_eq!(failure.code, Some(2), "{failure:?}");
    assert!(failure.stderr.contains("--cpus: CPU 1023 is not online"), "{failure:?}");
}
