//! The doctor against the real thing: each fault is made in a namespace, by the
//! kernel's own tools, and must be found; and cured as the finding says, it is gone.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use clap::Parser;
use lab::frames::{Frame, tag};
use lab::{Daemon, Lab, eventually};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vlanswitchd::control::api::Severity;
use vlanswitchd::control::cli::{Arguments, Config};
use vlanswitchd::control::doctor;
use vlanswitchd::sys::bpf::{Direction, detach_tc};

/// A daemon with a control socket of its own.
struct Patient {
    lab: Lab,
    daemon: Option<Daemon>,
    socket: PathBuf,
}

impl Patient {
    fn new(name: &str, lab: Lab, arguments: &[&str]) -> Self {
        let file = format!("vslab-{}-doctor-{name}", std::process::id());
        let socket = std::env::temp_dir().join(file);
        let mut all = vec!["--control", socket.to_str().unwrap()];
        all.extend(arguments);
        let daemon = Some(lab.daemon(&all));
        Self { lab, daemon, socket }
    }

    fn call(&self, method: &str) -> Value {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        let call = json!({ "method": format!("org.vlanswitchd.{method}"), "parameters": {} });
        stream.write_all(format!("{call}\0").as_bytes()).unwrap();
        let mut answer = Vec::new();
        BufReader::new(stream).read_until(0, &mut answer).unwrap();
        answer.pop();
        let answer: Value = serde_json::from_slice(&answer).unwrap();
        assert!(answer["error"].is_null(), "{answer}");
        answer["parameters"].clone()
    }

    /// Each finding as `severity about: what | cure`.
    fn findings(&self) -> Vec<String> {
        let reply = self.call("Examine");
        let list = reply["findings"].as_array().unwrap();
        list.iter()
            .map(|finding| {
                let part = |key: &str| finding[key].as_str().unwrap_or_default().to_owned();
                format!(
                    "{} {}: {} | {}",
                    part("severity"),
                    part("about"),
                    part("what"),
                    part("cure")
                )
            })
            .collect()
    }

    fn finds(&self, start: &str, parts: &[&str]) -> String {
        eventually(&format!("{start} {parts:?} is found"), || {
            self.findings().into_iter().find(|line| {
                line.starts_with(start) && parts.iter().all(|part| line.contains(part))
            })
        })
    }

    fn no_longer(&self, start: &str, part: &str) {
        eventually(&format!("{start} {part} is gone"), || {
            let found = self.findings();
            let still = found.iter().any(|line| line.starts_with(start) && line.contains(part));
            (!still).then_some(())
        });
    }

    fn stop(mut self) {
        self.daemon.take().unwrap().stop_by(Signal::SIGTERM);
    }
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_healthy_host_gets_a_clean_bill() {
    let lab = Lab::new();
    lab.host.ip("link set up0 mtu 1504");
    let patient = Patient::new("healthy", lab, &["--map", "101=tap-d1"]);
    let _guest = patient.lab.raw_guest("tap-d1");
    patient.daemon.as_ref().unwrap().attached(&["tap-d1"]);
    let found = patient.findings();
    assert!(found[0].starts_with("note vlanswitchd: nothing is wrong: 1 ports"), "{found:#?}");
    let bad: Vec<_> = found.iter().filter(|line| !line.starts_with("note ")).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    patient.stop();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn faults_of_devices_are_found_and_gone_when_cured() {
    let lab = Lab::new();
    let host = || &lab.host;
    host().ip("tuntap add dev tap-d2 mode tap multi_queue user 12345");
    let patient = Patient::new(
        "devices",
        lab,
        &["--map", "101=tap-d1", "--map", "102=tap-d2,owner=0", "--map", "103=gone,create=no"],
    );
    let ip = |arguments: &str| patient.lab.host.ip(arguments);

    patient.finds("warning tap-d2: its owner is 12345", &["ip link delete tap-d2"]);
    patient.finds("warning tap-d2: exists as a multiqueue tap", &["queues=N"]);
    patient.finds("note tap-d1: nobody has it open", &["start the VM"]);
    patient.finds("note gone: its device does not exist", &[]);
    let guest = patient.lab.raw_guest("tap-d1");
    patient.no_longer("note tap-d1", "nobody has it open");

    ip("link add br0 type bridge");
    ip("link set tap-d1 master br0");
    patient.finds("warning tap-d1: is a port of ", &["ip link set tap-d1 nomaster"]);
    ip("link set tap-d1 nomaster");
    patient.no_longer("warning tap-d1", "bridge");

    ip("address add 192.0.2.7/24 dev tap-d1");
    patient
        .finds("warning tap-d1: has host addresses (192.0.2.7)", &["ip address flush dev tap-d1"]);
    ip("address flush dev tap-d1");
    patient.no_longer("warning tap-d1", "host addresses");

    ip("link set tap-d1 txqueuelen 40");
    patient.finds("warning tap-d1: its guest's queue has room for 40", &["txqueuelen 1000"]);
    ip("link set tap-d1 txqueuelen 1000");
    patient.no_longer("warning tap-d1", "guest's queue");

    patient.lab.host.tc("qdisc replace dev tap-d1 root pfifo");
    patient.finds("warning tap-d1: its queueing discipline is pfifo", &["root noqueue"]);
    patient.lab.host.tc("qdisc replace dev tap-d1 root noqueue");
    patient.no_longer("warning tap-d1", "queueing discipline");

    // Behind the daemon's back: of this the kernel sends no news, once the seal is where
    // it lasts.
    let index = patient.lab.host.index("tap-d1");
    eventually("a missing seal is found", || {
        let hook = Direction::Ingress;
        patient.lab.host.enter(|| detach_tc("vlansw_seal", index, hook)).unwrap();
        let found = patient.findings();
        found.iter().find(|line| line.starts_with("error tap-d1: its seal is missing")).map(drop)
    });

    ip("link set tap-d1 down");
    patient.finds("warning tap-d1: its device is down", &["ip link set tap-d1 up"]);
    ip("link set tap-d1 up");
    patient.no_longer("warning tap-d1", "is down");
    drop(guest);
    patient.stop();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn faults_of_the_uplink_are_found_and_gone_when_cured() {
    let lab = Lab::new();
    lab.host.ip("link set up0 mtu 1400");
    let patient = Patient::new("uplink", lab, &["--map", "101.20=tap-d1,tpid=0x88a8"]);
    let host = &patient.lab.host;
    patient.finds("warning up0: its MTU of 1400 is too small", &["takes 1508", "mtu 1508"]);
    host.ip("link set up0 mtu 1508");
    patient.no_longer("warning up0", "too small");
    patient.finds("note up0: guests with MTU 1500 that add VLAN tags", &["1512"]);

    host.tool("ethtool", "-K up0 gro off");
    patient.finds("note up0: rx-gro is off", &["ethtool -K up0 rx-gro on"]);
    host.tool("ethtool", "-K up0 rx-gro on rx-gro-list on");
    patient.no_longer("note up0", "rx-gro is off");
    patient.finds("warning up0: rx-gro-list is on", &["ethtool -K up0 rx-gro-list off"]);
    host.tool("ethtool", "-K up0 rx-gro-list off");
    patient.no_longer("warning up0", "rx-gro-list");

    host.ip("link set up0 gro_max_size 131072");
    patient
        .finds("error up0: GRO makes super-frames of up to 131072 bytes", &["gro_max_size 65536"]);
    host.ip("link set up0 gro_max_size 65536");
    patient.no_longer("error up0", "super-frames");

    patient.lab.far.ip("link set far0 down");
    patient.finds("error up0: the uplink has no carrier", &["cable"]);
    patient.lab.far.ip("link set far0 up");
    patient.no_longer("error up0", "carrier");
    host.ip("link set up0 down");
    patient.finds("error up0: the uplink is down", &["ip link set up0 up"]);
    host.ip("link delete up0");
    patient.finds("error up0: the uplink is missing", &[]);
    patient.stop();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn what_is_seen_in_frames_is_told() {
    let lab = Lab::new();
    let patient = Patient::new("frames", lab, &["--map", "101=tap-d1,mode=access"]);
    let guest = patient.lab.raw_guest("tap-d1");
    patient.daemon.as_ref().unwrap().attached(&["tap-d1"]);
    let wire = patient.lab.wire();
    guest.send(&Frame::numbered(1).reversed().tags(&[tag(0x8100, 5)]));
    for tpid in [0x8100, 0x88a8, 0x9100] {
        wire.send(&Frame::numbered(1).tags(&[tag(tpid, 777)]));
    }
    patient.finds(
        "warning tap-d1: dropped 1 frames from the guest as tagged_on_access",
        &["mode=tunnel"],
    );
    let source: Vec<String> =
        Frame::numbered(1).source.iter().map(|byte| format!("{byte:02x}")).collect();
    for tpid in ["0x8100", "0x88a8", "0x9100"] {
        let line =
            format!("note up0: VLAN 777 ({tpid}) is on the wire and mapped to no port: 1 frames");
        patient.finds(&line, &[&format!("the last from {}", source.join(":"))]);
    }
    patient.stop();
}

#[test]
fn without_a_daemon_it_says_what_it_can() {
    let socket = Path::new("/nowhere/control");
    let broken = doctor::without_daemon(socket, Err("one thing\nanother"));
    let about: Vec<&str> = broken.iter().map(|finding| finding.about.as_str()).collect();
    assert_eq!(about, ["vlanswitchd", "configuration", "configuration"], "{broken:?}");
    assert!(broken[0].what.contains("/nowhere/control"), "{broken:?}");

    // lo is there on every host, and carries no Ethernet.
    let words = ["vlanswitchd", "--uplink", "lo", "--map", "101=tap-none"];
    let config = Config::try_from(Arguments::try_parse_from(words).unwrap()).unwrap();
    let found = doctor::without_daemon(socket, Ok(&config));
    assert!(
        found.iter().any(|finding| finding.what.contains("not an Ethernet device")),
        "{found:?}"
    );

    // Its own CPUs are not those of a service.
    let words = ["vlanswitchd", "--uplink", "lo", "--map", "101=tap-none", "--cpus", "1023"];
    let config = Config::try_from(Arguments::try_parse_from(words).unwrap()).unwrap();
    let found = doctor::without_daemon(socket, Ok(&config));
    let cpu: Vec<_> = found.iter().filter(|finding| finding.what.contains("CPU 1023")).collect();
    assert_eq!(cpu.len(), 1, "{found:?}");
    assert_eq!(cpu[0].severity, Severity::Warning);
    assert!(cpu[0].cure.as_ref().unwrap().contains("seen from this process"), "{found:?}");
}

/// Looking at many devices takes the kernel a while; calls beside it do not wait for
/// it, and all who ask at once are answered.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn other_callers_do_not_wait_for_an_examination() {
    const PORTS: usize = 60;
    let maps: Vec<String> = (0..PORTS).map(|port| format!("{}=tap-x{port}", port + 100)).collect();
    let arguments: Vec<&str> = maps.iter().flat_map(|map| ["--map", map]).collect();
    let patient = Patient::new("many", Lab::new(), &arguments);
    let started = Instant::now();
    let found = patient.findings();
    let alone = started.elapsed();
    assert_eq!(found.iter().filter(|line| line.contains("nobody has it open")).count(), PORTS);
    let worst = std::thread::scope(|scope| {
        let askers: Vec<_> = (0..8).map(|_| scope.spawn(|| patient.findings())).collect();
        let mut worst = Duration::ZERO;
        while askers.iter().any(|asker| !asker.is_finished()) {
            let asked = Instant::now();
            patient.call("GetStatus");
            worst = worst.max(asked.elapsed());
        }
        for asker in askers {
            assert_eq!(asker.join().unwrap().len(), found.len());
        }
        worst
    });
    println!("an examination of {PORTS} ports: {alone:?}; GetStatus beside eight: {worst:?}");
    patient.stop();
}
