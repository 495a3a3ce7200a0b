//! The switch becomes another one while it forwards: ports come, go and change by
//! control socket, file and signal, and no port that stays loses a frame.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::both_ways::{WINDOW, both_ways};
use lab::frames::{Frame, TagBytes, tag};
use lab::{Daemon, Lab, PATIENCE, eventually};
use nix::sys::signal::Signal;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vlanswitchd::control::api::{
    Change, ConfigReply, Port, PortReply, PortsReply, ReloadReply, Request, StatsReply,
};
use vlanswitchd::control::client::{AnswerError, Client, ClientError};

const fn vlan(vid: u16) -> TagBytes {
    tag(0x8100, vid)
}

/// A daemon with a control socket and, if asked, a configuration file.
struct Switch {
    daemon: Daemon,
    folder: TempDir,
}

impl Switch {
    fn start(lab: &Lab, maps: &[&str]) -> Self {
        let arguments: Vec<&str> = maps.iter().flat_map(|map| ["--map", map]).collect();
        Self::start_with(lab, &arguments, None)
    }

    fn start_with(lab: &Lab, arguments: &[&str], file: Option<&str>) -> Self {
        let folder = TempDir::new().unwrap();
        let control = folder.path().join("control").display().to_string();
        let mut all = vec!["--control", &control];
        all.extend(arguments);
        let path = folder.path().join("switch.toml").display().to_string();
        if let Some(text) = file {
            fs::write(&path, text).unwrap();
            all.extend(["--config", &path]);
        }
        let daemon = lab.daemon(&all);
        Self { daemon, folder }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("switch.toml")
    }

    fn client(&self) -> Client {
        Client::connect(&self.folder.path().join("control")).unwrap()
    }

    fn ports(&self) -> Vec<Port> {
        let reply = self.client().call(&Request::ListPorts {}).unwrap();
        reply.read::<PortsReply>().unwrap().ports
    }

    fn maps(&self) -> Vec<String> {
        self.ports().into_iter().map(|port| port.map).collect()
    }

    fn add(&self, map: &str) -> Port {
        let request = Request::AddPort { map: map.to_owned(), persist: None };
        self.client().call(&request).unwrap().read::<PortReply>().unwrap().port
    }

    fn remove(&self, name: &str) {
        let request = Request::RemovePort { name: name.to_owned(), persist: None };
        self.client().call(&request).unwrap();
    }

    fn set(&self, name: &str, changes: &[(&str, &str)]) -> Result<Port, ClientError> {
        let changes = changes.iter();
        let request = Request::SetPort {
            name: name.to_owned(),
            changes: changes
                .map(|(key, value)| Change { key: (*key).to_owned(), value: (*value).to_owned() })
                .collect(),
            persist: None,
        };
        self.client().call(&request).map(|reply| reply.read::<PortReply>().unwrap().port)
    }

    fn reload(&self) -> Result<ReloadReply, ClientError> {
        let request = Request::ReloadConfig { dry_run: None };
        self.client().call(&request).map(|reply| reply.read().unwrap())
    }
}

/// The words of a refusal.
fn refusal<T: std::fmt::Debug>(result: Result<T, ClientError>) -> String {
    match result {
        Err(ClientError::Answer(AnswerError::Refused(message))) => message,
        other => panic!("not refused: {other:?}"),
    }
}

fn open_files(daemon: &Daemon) -> usize {
    fs::read_dir(format!("/proc/{}/fd", daemon.id())).unwrap().count()
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn other_ports_lose_no_frame_while_ports_come_change_and_go() {
    let lab = Lab::new();
    let switch = Switch::start(&lab, &["101=t0"]);
    let mut changes = 0;
    let guest = lab.raw_guest("t0");
    switch.daemon.attached(&["t0"]);
    let (frames, rate) = both_ways(&lab, &guest, vlan(101), |_| {
        for round in 0..25u16 {
            let vid = 200 + round;
            switch.add(&format!("{vid}=t1"));
            switch
                .set("t1", &[("vlan", "300-310,400"), ("mode", "trunk"), ("native", "300")])
                .unwrap();
            switch.set("t1", &[("vlan", "500.1"), ("mode", ""), ("native", "")]).unwrap();
            // Also the port the frames flow through, in a way that changes nothing for
            // these: the pushed priority of tagged frames.
            switch.set("t0", &[("pcp", if round % 2 == 0 { "copy" } else { "" })]).unwrap();
            switch.remove("t1");
            changes += 5;
        }
    });
    assert!(frames.iter().all(|count| *count > 1000), "{frames:?} frames are no traffic");
    println!("{frames:?} frames, {rate:.0} a second, during {changes} changes");
    let summary = switch.daemon.stop();
    let port = summary.port("t0");
    assert_eq!((port.from_guest.all_drops(), port.to_guest.all_drops()), (0, 0), "{summary:?}");
}

/// A VLAN that moves from one port to another has one of them at any time.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_vlan_moves_without_a_frame_lost_or_doubled() {
    const FRAMES: u64 = 20_000;
    let lab = Lab::new();
    let file = "[uplink]\ndevice = \"up0\"\n[[port]]\nvlan = 101\ndevice = \"t0\"\n\
                [[port]]\nvlan = 102\ndevice = \"t1\"\n";
    let switch = Switch::start_with(&lab, &[], Some(file));
    let guests = ["t0", "t1"].map(|tap| lab.raw_guest(tap));
    switch.daemon.attached(&["t0", "t1"]);
    let swapped = file.replace("101", "x").replace("102", "101").replace('x', "102");
    let wire = lab.wire();
    let received = AtomicU64::new(0);
    let collect = |guest: &lab::RawGuest| {
        let mut numbers = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        while received.load(Ordering::Relaxed) < FRAMES && Instant::now() < deadline {
            let patience = Duration::from_millis(20);
            while let Some(bytes) = guest.receive_within(patience) {
                numbers.push(Frame::read(&bytes).number());
                received.fetch_add(1, Ordering::Relaxed);
            }
        }
        numbers
    };
    let [first, second] = std::thread::scope(|scope| {
        let collectors = guests.each_ref().map(|guest| scope.spawn(|| collect(guest)));
        scope.spawn(|| {
            for number in 1..=FRAMES {
                while number > received.load(Ordering::Relaxed) + WINDOW {
                    std::thread::yield_now();
                }
                wire.send(&Frame::numbered(number).tags(&[vlan(101)]));
            }
        });
        let mut moves = 0;
        while received.load(Ordering::Relaxed) < FRAMES - 2 * WINDOW {
            moves += 1;
            fs::write(switch.file(), if moves % 2 == 1 { &swapped } else { file }).unwrap();
            assert_eq!(switch.reload().unwrap().changed, ["t0", "t1"]);
        }
        assert!(moves > 2, "{moves} moves");
        collectors.map(|collector| collector.join().unwrap())
    });
    assert!(first.is_sorted() && second.is_sorted(), "order per port");
    assert!(!first.is_empty() && !second.is_empty());
    let mut all = [first, second].concat();
    all.sort_unstable();
    assert!(all == (1..=FRAMES).collect::<Vec<_>>(), "{} frames of {FRAMES}", all.len());
    switch.daemon.stop();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_change_that_cannot_be_made_changes_nothing() {
    let lab = Lab::new();
    let file = "[uplink]\ndevice = \"up0\"\n[[port]]\nvlan = 101\ndevice = \"t0\"\n";
    let switch = Switch::start_with(&lab, &[], Some(file));
    let before = lab.host.ip("link show");
    let refused = |text: &str, words: &[&str]| {
        fs::write(switch.file(), format!("{file}{text}")).unwrap();
        let message = refusal(switch.reload());
        for word in words {
            assert!(message.contains(word), "{message}: no {word}");
        }
        assert_eq!(switch.maps(), ["101=t0"]);
    };
    // t1 could be made; its neighbour cannot.
    let fine = "[[port]]\nvlan = 102\ndevice = \"t1\"\n";
    refused(&format!("{fine}[[port]]\nvlan = 103\ndevice = \"lo\"\n"), &["lo", "Ethernet"]);
    refused(
        &format!("{fine}[[port]]\nvlan = 101\ndevice = \"t2\"\n"),
        &["VLAN 101", "switch.toml:9", "switch.toml:3"],
    );
    refused(&format!("{fine}[[port]]\nvlan = 103\n"), &["device"]);
    refused("[switch]\npoll = \"busy\"\n", &["poll", "restart"]);
    let message = refusal(switch.set("t0", &[("native", "5")]));
    assert!(message.contains("native"), "{message}");
    let message = refusal(switch.set("t0", &[("colour", "red")]));
    assert!(message.contains("colour") && message.contains("mode"), "{message}");
    let request = Request::AddPort { map: "102=up0".to_owned(), persist: None };
    let message = refusal(switch.client().call(&request).map(drop));
    assert!(message.contains("uplink"), "{message}");
    // Without a file of its own nothing can be written down.
    lab::assert_same(&before, &lab.host.ip("link show"));
    switch.daemon.stop();
}

/// What fails halfway is undone: the first tap can be made, the second exists as
/// something that no ring can be opened on once it is there.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_change_that_fails_halfway_is_undone() {
    let lab = Lab::new();
    let file = "[uplink]\ndevice = \"up0\"\n[[port]]\nvlan = 101\ndevice = \"t0\"\n";
    let switch = Switch::start_with(&lab, &[], Some(file));
    let guest = lab.raw_guest("t0");
    switch.daemon.attached(&["t0"]);
    // A tap of that name is somebody's: opened exclusively, it cannot be opened again.
    let _owner = lab
        .host
        .enter(|| tun_tap::Iface::without_packet_info("taken", tun_tap::Mode::Tap))
        .unwrap();
    fs::write(
        switch.file(),
        format!(
            "{file}[[port]]\nvlan = 102\ndevice = \"t1\"\n\
             [[port]]\nvlan = 103\ndevice = \"internal:taken\"\n"
        ),
    )
    .unwrap();
    let files = open_files(&switch.daemon);
    let failed = switch.reload();
    assert!(
        matches!(&failed, Err(ClientError::Answer(AnswerError::Failed(message))) if message.contains("taken")),
        "{failed:?}"
    );
    assert_eq!(switch.maps(), ["101=t0"]);
    assert!(!lab.host.ip("link show").contains("t1"), "t1 is left");
    assert_eq!(open_files(&switch.daemon), files);
    let wire = lab.wire();
    wire.send(&Frame::numbered(1).tags(&[vlan(101)]));
    assert_eq!(guest.receive_until(1).len(), 1);
    switch.daemon.stop();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn sighup_reads_the_file_again() {
    let lab = Lab::new();
    let file = "[uplink]\ndevice = \"up0\"\n[[port]]\nvlan = 101\ndevice = \"t0\"\n";
    let switch = Switch::start_with(&lab, &["-v"], Some(file));
    fs::write(
        switch.file(),
        format!("{file}mode = \"access\"\n[[port]]\nvlan = 7\ndevice = \"t7\"\n"),
    )
    .unwrap();
    switch.daemon.signal(Signal::SIGHUP);
    eventually("both changes are made", || {
        (switch.maps() == ["101=t0,mode=access", "7=t7"]).then_some(())
    });
    fs::write(switch.file(), "[uplink]\ndevice = up0\n").unwrap();
    switch.daemon.signal(Signal::SIGHUP);
    eventually("the fault is told with its place", || {
        let lines = switch.daemon.stderr();
        let told = |line: &String| line.contains("not reloaded") && line.contains("switch.toml:2");
        lines.iter().any(told).then_some(())
    });
    assert_eq!(switch.maps(), ["101=t0,mode=access", "7=t7"]);
    switch.daemon.stop();
}

/// What `config show` prints is the switch that runs.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn the_shown_configuration_starts_the_same_switch() {
    let lab = Lab::new();
    let maps =
        ["101=t0,mode=access,pcp=copy", "0=t1", "200-203=t2,native=201", "9.8=t3,tpid=0x88a8"];
    let switch = Switch::start(&lab, &maps);
    switch.add("55=internal:leg");
    let toml = switch.client().call(&Request::GetConfig {}).unwrap();
    let toml = toml.read::<ConfigReply>().unwrap().toml;
    let expected = switch.maps();
    switch.daemon.stop();
    // The socket is gone with the first; its path is in the file.
    let path = switch.folder.path().join("shown.toml");
    fs::write(&path, &toml).unwrap();
    let control = switch.folder.path().join("control").display().to_string();
    let again = lab.daemon(&["--config", path.to_str().unwrap(), "--control", &control]);
    let mut client = Client::connect(control.as_ref()).unwrap();
    let ports = client.call(&Request::ListPorts {}).unwrap().read::<PortsReply>().unwrap().ports;
    assert_eq!(ports.into_iter().map(|port| port.map).collect::<Vec<_>>(), expected, "{toml}");
    again.stop();
}

/// Ports that come and go leave nothing behind: no descriptor, thread or device, and
/// what they sent stays counted.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn ports_that_go_leave_nothing_but_their_count() {
    let lab = Lab::new();
    let switch = Switch::start(&lab, &["101=t0"]);
    // Found, so that it is given back when the port goes.
    lab.host.ip("tuntap add t1 mode tap");
    let found = lab.host.ip("-d link show t1");
    let guest = lab.raw_guest("t1");
    let carrier = lab.host.ip("-d link show t1");
    let mut sent = 0;
    let mut files = None;
    for round in 0..30u64 {
        switch.add("102=t1");
        switch.daemon.attached(&["t1"]);
        for number in 0..=round {
            guest.send(&Frame::numbered(number).reversed());
            sent += 1;
        }
        switch.remove("t1");
        // The first round may open what stays open.
        let files = *files.get_or_insert_with(|| open_files(&switch.daemon));
        eventually("nothing stays open", || (open_files(&switch.daemon) <= files).then_some(()));
    }
    let stats = switch.client().call(&Request::GetStats { interval: None }).unwrap();
    let stats = stats.read::<StatsReply>().unwrap().stats;
    assert_eq!((stats.uplink.to_wire.out_frames, stats.ports.len()), (sent, 1));
    lab::assert_same(&carrier, &lab.host.ip("-d link show t1"));
    drop(guest);
    eventually("t1 is as it was found", || {
        (lab.host.ip("-d link show t1").contains("mtu 1500") && found.contains("mtu 1500"))
            .then_some(())
    });
    switch.daemon.stop();
}

/// What a change asks of the uplink and of missing taps is done, not only noted.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_change_brings_what_it_needs() {
    let lab = Lab::new();
    let switch = Switch::start_with(
        &lab,
        &[
            "--set-uplink-mtu",
            "--map",
            "101=t0,mode=access",
            "--map",
            "300=late,create=no,mode=access",
        ],
        None,
    );
    let mtu = || lab.host.link("up0").unwrap()["mtu"].as_u64().unwrap();
    assert_eq!(mtu(), 1500);
    // Its guest may add a tag of its own.
    switch.add("102=t1");
    assert_eq!(mtu(), 1504);
    switch.add("9.8=t2,tpid=0x88a8");
    assert_eq!(mtu(), 1512);
    assert_eq!(switch.set("late", &[("create", "")]).unwrap().state, "no_carrier");
    assert!(lab.host.link("late").is_some());
    let request = Request::SetPort {
        name: "t0".to_owned(),
        changes: vec![Change { key: "queues".to_owned(), value: "4".to_owned() }],
        persist: None,
    };
    let reply = switch.client().call(&request).unwrap().read::<PortReply>().unwrap();
    let notes = reply.notes.unwrap().join("\n");
    assert!(notes.contains("multiqueue") && notes.contains("ip link delete t0"), "{notes}");
    switch.daemon.stop();
    assert_eq!(mtu(), 1500);
}

/// A tun of the port's name has no Ethernet frames, whenever it appears.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn what_is_no_ethernet_device_is_left_alone_when_it_appears() {
    let lab = Lab::new();
    let switch = Switch::start(&lab, &["101=t0", "300=late,create=no"]);
    lab.host.ip("tuntap add late mode tun");
    eventually("it is told", || {
        let lines = switch.daemon.stderr();
        lines.iter().any(|line| line.contains("late: not an Ethernet device")).then_some(())
    });
    assert_eq!(switch.ports()[1].state, "absent");
    lab.host.ip("link delete late");
    lab.host.ip("tuntap add late mode tap");
    eventually("a tap is taken", || (switch.ports()[1].state == "no_carrier").then_some(()));
    switch.daemon.stop();
}

/// The time a change takes grows with the ports it adds or removes, not with their
/// waiting for the kernel one by one: removing many takes no longer than adding them.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn many_ports_go_at_once() {
    let lab = Lab::new();
    let head = "[uplink]\ndevice = \"up0\"\n";
    let ports: String = (0..60)
        .map(|number| format!("[[port]]\nvlan = {}\ndevice = \"m{number}\"\n", 100 + number))
        .collect();
    let switch = Switch::start_with(&lab, &[], Some(head));
    let timed = |text: &str| {
        fs::write(switch.file(), text).unwrap();
        let begin = Instant::now();
        switch.reload().unwrap();
        begin.elapsed()
    };
    // Somebody else may hold the kernel's device lock meanwhile: not each time.
    let quicker = (0..4).any(|_| {
        let adding = timed(&format!("{head}{ports}"));
        assert_eq!(switch.ports().len(), 60);
        let removing = timed(head);
        assert_eq!(switch.ports().len(), 0);
        println!("added in {adding:?}, removed in {removing:?}");
        removing < adding
    });
    assert!(quicker, "removing takes longer than adding");
    switch.daemon.stop();
}
