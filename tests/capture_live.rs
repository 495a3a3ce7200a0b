//! `vlanswitchctl capture` of a running switch, frame by frame against what was sent
//! and what arrived, with tshark as the reader.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::frames::{Frame, tag};
use lab::tshark::{Seen, hex, tshark};
use lab::{Lab, eventually};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use tempfile::TempDir;
use vlanswitchd::control::api::{Request, StatusReply};
use vlanswitchd::control::client::Client;

const C101: lab::TagBytes = tag(0x8100, 101).priority(10);

struct Captures {
    folder: TempDir,
    running: Vec<(PathBuf, Child)>,
}

impl Captures {
    fn control(&self) -> PathBuf {
        self.folder.path().join("control")
    }

    /// Starts a capture and waits until it sees frames.
    fn start(&mut self, arguments: &[&str]) {
        let file = self.folder.path().join(format!("{}.pcapng", self.running.len()));
        let child = Command::new(env!("CARGO_BIN_EXE_vlanswitchctl"))
            .arg("--socket")
            .arg(self.control())
            .arg("capture")
            .args(arguments)
            .arg("-w")
            .arg(&file)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        self.running.push((file, child));
        let mut client = Client::connect(&self.control()).unwrap();
        eventually("the capture is under way", || {
            let status = client.call(&Request::GetStatus {}).unwrap();
            let status = status.read::<StatusReply>().unwrap().status;
            (status.captures == self.running.len() as u64).then_some(())
        });
    }

    /// Waits until a file has this many frames, ends its capture and reads it.
    fn finish(&mut self, which: usize, frames: usize) -> Vec<Seen> {
        let (file, child) = &mut self.running[which];
        eventually("all frames are in the file", || (count(file) >= frames).then_some(()));
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(child.id() as i32),
            nix::sys::signal::Signal::SIGINT,
        )
        .unwrap();
        assert!(child.wait().unwrap().success());
        tshark(file)
    }
}

/// Enhanced packet blocks of a file that may still be written.
fn count(file: &Path) -> usize {
    let bytes = std::fs::read(file).unwrap_or_default();
    let word = |at: usize| -> Option<u32> {
        Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().unwrap()))
    };
    let (mut at, mut found) = (0, 0);
    while let (Some(kind), Some(length)) = (word(at), word(at + 4)) {
        found += usize::from(kind == 6);
        at += length.max(12) as usize;
    }
    found
}

fn seen(interface: &str, out: bool, reason: &str, frame: &Frame) -> Seen {
    let comment = if reason.is_empty() { String::new() } else { format!("dropped: {reason}") };
    let direction = if out { "2" } else { "1" };
    let bytes = frame.bytes();
    (interface.to_owned(), direction.to_owned(), comment, bytes.len(), hex(&bytes))
}

#[test]
#[ignore = "needs root and tshark"]
fn what_is_captured_is_what_passed() {
    let lab = Lab::new();
    let mut captures = Captures { folder: TempDir::new().unwrap(), running: Vec::new() };
    let control = captures.control().display().to_string();
    let daemon = lab.daemon(&[
        "--control",
        &control,
        "--map",
        "101=t0",
        "--map",
        "102=t1,mode=access",
        "--map",
        "9.8=t2,tpid=0x88a8",
    ]);
    let guests = ["t0", "t1", "t2"].map(|tap| lab.raw_guest(tap));
    daemon.attached(&["t0", "t1", "t2"]);
    let wire = lab.wire();
    captures.start(&[]);
    captures.start(&["t1"]);
    captures.start(&["--drops"]);
    captures.start(&["uplink", "--filter", "vlan 101"]);

    let mut all = Vec::new();
    // To the guest, with priority; a guest's own tag; a pair of tags.
    for number in 1..=20 {
        let down = Frame::numbered(number);
        wire.send(&down.clone().tags(&[C101]));
        guests[0].receive_until(number);
        all.push(seen("up0", false, "", &down.clone().tags(&[C101])));
        all.push(seen("t0", true, "", &down));

        let inner = tag(0x8100, 7).priority(3);
        let up = Frame::numbered(number).reversed().tags(&[inner]);
        guests[0].send(&up);
        wire.receive_until(number);
        all.push(seen("t0", false, "", &up));
        all.push(seen("up0", true, "", &up.clone().tags(&[tag(0x8100, 101), inner])));

        let pair = [tag(0x88a8, 9), tag(0x8100, 8)];
        wire.send(&down.clone().tags(&pair));
        guests[2].receive_until(number);
        all.push(seen("up0", false, "", &down.clone().tags(&pair)));
        all.push(seen("t2", true, "", &down));
    }
    // Dropped at the decision, on the way in and on the way out.
    let tagged = Frame::numbered(100).reversed().tags(&[tag(0x8100, 5)]);
    guests[1].send(&tagged);
    daemon.until("the tagged frame is dropped", |summary| {
        summary.port("t1").from_guest.dropped("tagged_on_access") == 1
    });
    let stacked = Frame::numbered(101).tags(&[tag(0x8100, 102), tag(0x8100, 6)]);
    wire.send(&stacked);
    daemon.until("the stacked frame is dropped", |summary| {
        summary.port("t1").to_guest.dropped("inner_tag") == 1
    });
    drop(guests);
    daemon.until("t0 has no guest", |summary| summary.port("t0").state != "attached");
    let late = Frame::numbered(102);
    wire.send(&late.clone().tags(&[C101]));
    daemon.until("a frame for nobody is dropped", |summary| {
        summary.port("t0").to_guest.dropped("guest_absent") == 1
    });
    let drops = [
        seen("t1", false, "tagged_on_access", &tagged),
        seen("up0", false, "inner_tag", &stacked),
        seen("t0", true, "guest_absent", &late),
    ];
    all.extend([drops[0].clone(), drops[1].clone()]);
    all.push(seen("up0", false, "", &late.clone().tags(&[C101])));
    all.push(drops[2].clone());

    assert_eq!(captures.finish(0, all.len()), all);
    assert_eq!(captures.finish(1, 1), [drops[0].clone()]);
    assert_eq!(captures.finish(2, 3), drops);
    let of_101 = all.iter().filter(|frame| {
        frame.0 == "up0" && frame.4[24..32] == *"81000065" || frame.4[24..32] == *"8100a065"
    });
    let of_101: Vec<Seen> = of_101.filter(|frame| frame.0 == "up0").cloned().collect();
    assert_eq!(of_101.len(), 41);
    assert_eq!(captures.finish(3, 41), of_101);
    daemon.stop();
}

/// Who captures a port does not see its successor's frames.
#[test]
#[ignore = "needs root and tshark"]
fn a_capture_ends_with_its_port() {
    let lab = Lab::new();
    let mut captures = Captures { folder: TempDir::new().unwrap(), running: Vec::new() };
    let control = captures.control().display().to_string();
    let daemon = lab.daemon(&["--control", &control, "--map", "101=t0", "--map", "102=t1"]);
    let guests = ["t0", "t1", "t2"].map(|tap| lab.raw_guest(tap));
    daemon.attached(&["t0", "t1"]);
    let wire = lab.wire();
    captures.start(&["t1"]);
    captures.start(&[]);
    let frame = |number, vid| Frame::numbered(number).tags(&[tag(0x8100, vid)]);
    wire.send(&frame(1, 102));
    guests[1].receive_until(1);
    let mut client = Client::connect(&captures.control()).unwrap();
    let remove = Request::RemovePort { name: "t1".to_owned(), persist: None };
    client.call(&remove).unwrap();
    client.call(&Request::AddPort { map: "103=t2".to_owned(), persist: None }).unwrap();
    wire.send(&frame(2, 103));
    guests[2].receive_until(2);
    let (file, child) = &mut captures.running[0];
    let status = eventually("the capture of t1 ends", || child.try_wait().unwrap());
    assert!(status.success());
    assert_eq!(tshark(file), [seen("t1", true, "", &Frame::numbered(1))]);
    let all = [
        seen("up0", false, "", &frame(1, 102)),
        seen("t1", true, "", &Frame::numbered(1)),
        seen("up0", false, "", &frame(2, 103)),
        seen("t2", true, "", &Frame::numbered(2)),
    ];
    assert_eq!(captures.finish(1, 4), all);
    daemon.stop();
}
