//! A laboratory that proves the daemon from outside, as a black box.
//!
//! Theory of operation: each [`Lab`] owns two network namespaces. In `host` runs
//! the daemon: there are the uplink (`up0`, one end of a veth pair) and the VMs'
//! taps. In `far` stands the other end of the uplink (`far0`), the trunk switch's
//! side. Guests come in three kinds:
//!
//! - [`RawGuest`]: the fd side of a tap, opened by the `tun-tap` crate: no
//!   virtio header, no offloads, as an e1000 has it. It writes and reads frames.
//! - [`KernelGuest`]: a namespace with a real TCP stack behind a second tap,
//!   whose fd a [`Pump`](guest::KernelGuest) splices to the VM tap's fd, as QEMU
//!   splices a virtio NIC to it, with offloads or without.
//! - a veth end for containers (see [`Lab::container`]).
//!
//! At the far end [`Wire`] reads and writes frames as they are on the cable, and
//! [`FarHub`] puts real kernel stacks into VLANs by TC programs (no 8021q module
//! needed).
//!
//! What is delivered is decided by sentinels, not by waiting: order is kept per
//! port and direction, so that a frame sent after those under test, once it has
//! arrived, says that every missing one will never come.
//!
//! Everything is undone by `Drop`, also when a test panics; what a killed test
//! process left behind, the next lab sweeps up (names carry the process id).

#![allow(dead_code, unused_imports, reason = "each test file uses its own part of the lab")]
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

pub mod both_ways;
pub mod daemon;
pub mod frames;
pub mod guest;
pub mod hub;
pub mod ip;
pub mod manager;
pub mod namespace;
pub mod packet;
pub mod raw;
pub mod summary;
pub mod transfer;
pub mod tshark;
pub mod tunnel;
pub mod vhost;

pub use daemon::{Daemon, Failure};
pub use frames::{Frame, TagBytes};
pub use guest::{KernelGuest, RawGuest};
pub use manager::Manager;
pub use namespace::Namespace;
pub use packet::Wire;
pub use summary::{Flow, Summary};

use std::time::{Duration, Instant};

/// How long a condition may take to come true before a test fails. Generous: a
/// loaded machine must not fail a correct program.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// An amount of work, or the share of it that an emulated processor does in the same time:
/// `VLANSWITCHD_TEST_SCALE=64` asks for a 64th.
pub fn scaled(amount: u64) -> u64 {
    let scale = std::env::var("VLANSWITCHD_TEST_SCALE").ok().and_then(|scale| scale.parse().ok());
    amount / scale.unwrap_or(1)
}

/// Whether this kernel is of this version or a newer one: for what the lab's own devices can
/// do, never for what the switch can.
pub fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map(|number| number.parse().unwrap_or(0));
    let version: (u32, u32) = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= (major, minor)
}

/// Asks `probe` until it answers, and fails the test if it has not after
/// [`PATIENCE`].
pub fn eventually<T>(what: &str, probe: impl FnMut() -> Option<T>) -> T {
    in_time(Duration::from_millis(3), probe).unwrap_or_else(|| panic!("never happened: {what}"))
}

/// The same, asking at this interval; `None` after [`PATIENCE`].
pub fn in_time<T>(interval: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = probe();
        if answer.is_some() || Instant::now() >= deadline {
            return answer;
        }
        std::thread::sleep(interval);
    }
}

/// Fails the test unless two texts are the same, showing the lines that are not.
pub fn assert_same(before: &str, after: &str) {
    let only = |one: &str, other: &str| -> Vec<String> {
        let others: Vec<&str> = other.lines().collect();
        let lines = one.lines().filter(|line| !others.contains(line));
        lines.map(str::to_owned).collect()
    };
    let (gone, new) = (only(before, after), only(after, before));
    assert!(before == after, "gone: {gone:#?}\nnew: {new:#?}");
}

/// The host and the far end of its uplink.
pub struct Lab {
    /// Where the daemon runs.
    pub host: Namespace,
    /// Where the cable ends.
    pub far: Namespace,
}

/// Address of the uplink's netdev.
pub const UPLINK_MAC: [u8; 6] = [0x02, 0, 0, 0, 0x0a, 0x01];
/// Address of the far end's netdev.
pub const FAR_MAC: [u8; 6] = [0x02, 0, 0, 0, 0x0f, 0x01];

impl Lab {
    /// Two namespaces and the cable `up0` (host) to `far0` (far end).
    ///
    /// No namespace speaks IPv6 by itself, so that the only frames on the cable
    /// are those a test sends; [`Namespace::enable_ipv6`] undoes that.
    pub fn new() -> Self {
        let host = Namespace::new("host");
        let far = Namespace::new("far");
        let lab = Self { host, far };
        lab.plug_uplink();
        lab
    }

    /// Makes the cable (again).
    pub fn plug_uplink(&self) {
        // The far end sends whatever a test wants; the host's MTU is the one at test.
        self.host.ip(&format!(
            "link add up0 address {} type veth peer name far0 address {} mtu 9000 netns {}",
            mac_text(&UPLINK_MAC),
            mac_text(&FAR_MAC),
            self.far.name()
        ));
        self.far.set_up(&["far0"]);
        self.host.set_up(&["up0"]);
        guest::carrier(&self.host, "up0");
        guest::carrier(&self.far, "far0");
    }

    /// Starts the daemon on `up0` with these further arguments and waits until it
    /// says that it is forwarding.
    pub fn daemon(&self, arguments: &[&str]) -> Daemon {
        let mut all = vec!["--uplink", "up0", "--log-format", "json"];
        all.extend(arguments);
        Daemon::start(&self.host, &all)
    }

    /// Runs the daemon with exactly these arguments, expecting it to give up.
    pub fn failing_daemon(&self, arguments: &[&str]) -> Failure {
        Failure::of(&self.host, arguments)
    }

    /// The far end of the cable, for frames as they are.
    pub fn wire(&self) -> Wire {
        Wire::open(&self.far, "far0")
    }

    /// A guest without offloads on this tap, which is made if it does not exist.
    pub fn raw_guest(&self, tap: &str) -> RawGuest {
        RawGuest::open(&self.host, tap)
    }

    /// A veth pair: `device` in the host, and the answer's `eth0` at its other end.
    pub fn container(&self, device: &str) -> Namespace {
        let inside = Namespace::new("container");
        self.host
            .ip(&format!("link add {device} type veth peer name eth0 netns {}", inside.name()));
        self.host.set_up(&[device]);
        inside.set_up(&["eth0"]);
        inside
    }
}

/// `02:00:..` as `ip` writes it.
pub fn mac_text(mac: &[u8; 6]) -> String {
    let parts: Vec<String> = mac.iter().map(|byte| format!("{byte:02x}")).collect();
    parts.join(":")
}
