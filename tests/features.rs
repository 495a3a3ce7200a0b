//! What this kernel can do, found by the lab's own means, and whether the daemon has found
//! the same: a feature the switch has to do without is named in its status and metrics.
//!
//! Each feature is printed as `feature NAME: VALUE`; `tests/kernels` makes the table in
//! docs/kernels.md of these lines.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::frames::{Frame, tag};
use lab::ip::{self, Version, Vnet};
use lab::raw::{OFFLOAD_TCP, OFFLOAD_USO, PacketSocket, index_of, open_tap};
use lab::{Lab, Namespace, RawGuest, eventually};
use serde_json::Value;
use std::process::Command;
use tempfile::TempDir;
use vlanswitchd::sys::bpf::{self, Direction};

/// What was found, printed as a whole.
#[derive(Default)]
struct Found(Vec<(&'static str, String)>);

impl Found {
    fn yes_or_no(&mut self, name: &'static str, found: bool) -> bool {
        self.0.push((name, if found { "yes" } else { "no" }.to_owned()));
        found
    }
}

impl Drop for Found {
    fn drop(&mut self) {
        for (name, value) in &self.0 {
            println!("feature {name}: {value}");
        }
    }
}

fn sender(namespace: &Namespace, device: &str) -> PacketSocket {
    namespace.enter(|| {
        let socket = PacketSocket::new();
        socket.set(libc::PACKET_VNET_HDR, 1i32).unwrap();
        socket.bind(index_of(device), 0).unwrap();
        socket
    })
}

/// Whether a super-frame with this many tags comes out of a tap in the segments it stands
/// for.
fn segments(socket: &PacketSocket, guest: &RawGuest, whole: &Frame, tags: usize) -> bool {
    let (header, frame) = ip::partial(whole, Version::V4, 1000);
    let stack = [tag(0x88a8, 6), tag(0x8100, 5)];
    let frame = frame.tags(&stack[2 - tags..]);
    let header = header.behind_tags(tags);
    if socket.send(&[&header.bytes(), frame.bytes().as_slice()].concat()).is_err() {
        return false;
    }
    socket
        .send(&[&Vnet::default().bytes(), Frame::numbered(1).bytes().as_slice()].concat())
        .unwrap();
    let mut got = guest.receive_until(1);
    got.pop();
    got.len() == 3 && got.iter().all(|segment| ip::checked_payload(segment).len() == 1000)
}

/// Whether a group of packet sockets that asks for it is spared what the host sends.
fn group_ignores_outgoing(host: &Namespace, device: &str) -> bool {
    const PACKET_FANOUT_FLAG_IGNORE_OUTGOING: u32 = 0x4000;
    let member = host.enter(|| {
        let socket = PacketSocket::new();
        socket.bind(index_of(device), libc::ETH_P_ALL as u16).unwrap();
        socket.set(libc::PACKET_FANOUT, PACKET_FANOUT_FLAG_IGNORE_OUTGOING << 16 | 77).unwrap();
        socket
    });
    // What arrived until it had joined.
    while member.receive().unwrap().is_some() {}
    let frame = Frame::numbered(2).bytes();
    sender(host, device).send(&[&Vnet::default().bytes(), frame.as_slice()].concat()).unwrap();
    member.receive().unwrap().is_none()
}

fn ask(socket: &str, words: &[&str]) -> Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vlanswitchctl"));
    let output = command.args(["--socket", socket]).args(words).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The status as the daemon tells it that chose its datapath, and whether it sends by XDP
/// what comes from a guest without offloads, where the uplink's driver can.
fn status_of_daemon(lab: &Lab) -> (Value, bool) {
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("control");
    let socket = socket.to_str().unwrap();
    // A veth takes what XDP redirects to it when its other end polls.
    lab.far.tool("ethtool", "-K far0 gro on");
    let maps = ["--map", "101=t2", "--map", "102=t3,offload=off"];
    let arguments = ["--control", socket, "--datapath", "auto"];
    let daemon = lab.daemon(&[&arguments[..], &maps[..]].concat());
    let _guest = lab.raw_guest("t3");
    daemon.attached(&["t3"]);
    let xdp = eventually("it has tried XDP", || {
        let port = ask(socket, &["port", "show", "t3", "--json"]);
        let reason = port["port"]["datapath_reason"].as_str()?.to_owned();
        let known = [("XDP sends", true), ("this kernel does not tell", false)];
        known.into_iter().find(|(words, _)| reason.contains(words)).map(|(_, found)| found)
    });
    let status = ask(socket, &["status", "--json"])["status"].clone();
    daemon.stop();
    (status, xdp)
}

/// One test, so that what was found is together.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn the_daemon_knows_what_this_kernel_lacks() {
    let mut found = Found::default();
    let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
    found.0.push(("kernel", release));
    let lab = Lab::new();
    let guest = lab.raw_guest("t0");
    lab.host.ip("link set t0 up");
    lab.host.tc("qdisc replace dev t0 root noqueue");
    lab::guest::carrier(&lab.host, "t0");
    let socket = sender(&lab.host, "t0");
    let tcp = ip::tcp(Version::V4, 1, &[7; 3000]);
    let udp = ip::udp(Version::V4, &[7; 3000]);

    let mut missing = Vec::new();
    let mut fallback = |there: bool, name: &'static str| {
        if !there {
            missing.push(name);
        }
    };
    assert!(segments(&socket, &guest, &tcp, 0), "every kernel does this");
    let one = found.yes_or_no("tagged-gso", segments(&socket, &guest, &tcp, 1));
    let two = found.yes_or_no("double-tagged-gso", segments(&socket, &guest, &tcp, 2));
    fallback(one && two, "tagged_segmentation");
    fallback(found.yes_or_no("udp-gso", segments(&socket, &guest, &udp, 0)), "udp_segmentation");
    let uso = lab.host.enter(|| open_tap("t1", 0, OFFLOAD_TCP | OFFLOAD_USO)).is_ok();
    found.yes_or_no("tap-uso", uso);
    let index = lab.host.index("t0");
    let tcx = lab.host.enter(|| bpf::tcx::programs(index, Direction::Ingress));
    let tcx = !matches!(tcx, Err(bpf::BpfError::Unsupported { .. }));
    fallback(found.yes_or_no("tcx", tcx), "clsact");
    let ignores = group_ignores_outgoing(&lab.host, "t0");
    fallback(found.yes_or_no("fanout-ignore-outgoing", ignores), "own_frames_filter");

    let (status, xdp) = status_of_daemon(&lab);
    found.yes_or_no("xdp-redirect", xdp);
    let reason = status["datapath_reason"].as_str().map(|reason| format!(" ({reason})"));
    let datapath = status["datapath"].as_str().unwrap();
    found.0.push(("datapath-auto", format!("{datapath}{}", reason.unwrap_or_default())));
    let told: Vec<&str> =
        status["fallbacks"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    assert_eq!(told, missing, "what the daemon says it does without");
}
