//! Taps, device features and private namespaces, on a real kernel.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::AsFd;
use std::process::Command;
use std::time::{Duration, Instant};
use vlanswitchd::sys::ethtool::{self, EthtoolError, FeatureState, Features};
use vlanswitchd::sys::netns::in_private_namespace;
use vlanswitchd::sys::tap::{self, TapError, TapOptions, TapSettings};

/// Runs a test in a network namespace of its own, with the /sys of that namespace.
fn private(test: impl FnOnce() + Send) {
    in_private_namespace(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        output("mount --make-rprivate /");
        output("mount -t sysfs sysfs /sys");
        test();
    })
    .unwrap();
}

/// What a command prints.
fn output(command: &str) -> String {
    let (program, arguments) = command.split_once(' ').unwrap();
    let output = Command::new(program).args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "{command}");
    String::from_utf8(output.stdout).unwrap()
}

fn exists(name: &str) -> bool {
    nix::net::if_::if_nametoindex(name).is_ok()
}

/// A device goes with its last fd, and a child that another test is starting holds
/// copies of all fds until it executes its program.
fn wait_until_gone(name: &str) {
    let start = Instant::now();
    while exists(name) {
        assert!(start.elapsed() < Duration::from_secs(30), "{name} is still there");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
#[ignore = "needs root: network namespace, tap"]
fn a_created_tap_is_what_libvirt_and_qemu_expect() {
    private(|| {
        let options = TapOptions {
            owner: Some(1234),
            group: Some(5678),
            persistent: true,
            ..TapOptions::new("t0")
        };
        tap::create(&options).unwrap();
        // iproute2 reads IFLA_TUN attributes, not what we do.
        let listed = output("ip -d tuntap show");
        assert_eq!(listed.lines().next(), Some("t0: tap vnet_hdr persist user 1234 group 5678"));
        let expected = TapSettings {
            multi_queue: false,
            vnet_header: true,
            persistent: true,
            ethernet: true,
            owner: Some(1234),
            group: Some(5678),
        };
        assert_eq!(tap::settings("t0").unwrap(), Some(expected));
        assert!(matches!(tap::create(&options), Err(TapError::Exists(name)) if name == "t0"));

        let many = TapOptions { multi_queue: true, ..TapOptions::new("t1") };
        tap::create(&many).unwrap();
        let listed = output("ip tuntap show");
        let line = listed.lines().find(|line| line.starts_with("t1:"));
        assert_eq!(line, Some("t1: tap multi_queue vnet_hdr persist"));
        let expected = TapSettings { multi_queue: true, owner: None, group: None, ..expected };
        assert_eq!(tap::settings("t1").unwrap(), Some(expected));

        output("ip link add v0 type veth peer name v1");
        assert_eq!(tap::settings("v0").unwrap(), None);
        assert_eq!(tap::settings("missing").unwrap(), None);
        assert!(matches!(tap::create(&TapOptions::new("v0")), Err(TapError::Exists(_))));

        for name in ["t0", "t1"] {
            tap::delete(name).unwrap();
            wait_until_gone(name);
            let error = tap::delete(name).unwrap_err();
            assert!(matches!(error, TapError::System { .. }), "{error}");
            assert!(!exists(name), "deleting must not make one");
        }
    });
}

#[test]
#[ignore = "needs root: network namespace, tap"]
fn a_queue_carries_frames_and_goes_with_its_fd() {
    private(|| {
        let queue = tap::open_queue(&TapOptions::new("t0")).unwrap();
        let settings = tap::settings("t0").unwrap().unwrap();
        assert!(settings.vnet_header && !settings.persistent && !settings.multi_queue);
        // Offloads towards the fd are features of the netdev; ethtool tells them.
        let features = output("ethtool -k t0");
        let on = |name: &str| {
            features.lines().any(|line| line.trim().starts_with(&format!("{name}: on")))
        };
        for name in ["tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-tcp-ecn-segmentation"] {
            assert!(on(name), "{name}");
        }
        assert_eq!(on("tx-udp-segmentation"), queue.udp_segmentation);

        // From the fd to the stack: a frame after a header of 10 bytes is counted whole.
        output("ip link set t0 up");
        let mut buffer = vec![0; tap::VNET_HEADER_LEN];
        buffer.extend([0xff; 12]);
        buffer.extend([0x88, 0xb5]);
        buffer.extend([7; 46]);
        assert_eq!(nix::unistd::write(queue.fd.as_fd(), &buffer).unwrap(), buffer.len());
        let statistic = |name: &str| {
            let text = fs::read_to_string(format!("/sys/class/net/t0/statistics/{name}")).unwrap();
            text.trim().parse::<u64>().unwrap()
        };
        assert_eq!((statistic("rx_packets"), statistic("rx_bytes")), (1, 60));

        // Nobody waits in a read: it is non-blocking. The kernel may have sent frames of its own.
        loop {
            match nix::unistd::read(queue.fd.as_fd(), &mut [0; 2000]) {
                Ok(length) => assert!(length >= tap::VNET_HEADER_LEN + 14),
                Err(error) => break assert_eq!(error, nix::Error::EAGAIN),
            }
        }
        drop(queue);
        wait_until_gone("t0");

        let options = TapOptions { persistent: true, vnet_header: false, ..TapOptions::new("t0") };
        let queue = tap::open_queue(&options).unwrap();
        assert!(!queue.udp_segmentation);
        assert!(!tap::settings("t0").unwrap().unwrap().vnet_header);
        drop(queue);
        assert!(exists("t0"));
    });
}

#[test]
#[ignore = "needs root: network namespace, tap"]
fn errors_tell_what_is_wrong() {
    private(|| {
        let one = TapOptions::new("t0");
        let many = TapOptions { multi_queue: true, ..one.clone() };
        let held = tap::open_queue(&one).unwrap();
        assert!(matches!(tap::open_queue(&one), Err(TapError::Busy(name)) if name == "t0"));
        assert!(matches!(tap::delete("t0"), Err(TapError::Busy(_))));
        assert!(matches!(
            tap::open_queue(&many),
            Err(TapError::QueuesDisagree { multi_queue: false, .. })
        ));
        drop(held);
        wait_until_gone("t0");
        let held = tap::open_queue(&many).unwrap();
        let _second = tap::open_queue(&many).unwrap();
        assert!(matches!(
            tap::open_queue(&one),
            Err(TapError::QueuesDisagree { multi_queue: true, .. })
        ));
        drop(held);

        output("ip link add v0 type veth peer name v1");
        let error = tap::open_queue(&TapOptions::new("v0")).unwrap_err();
        assert!(matches!(&error, TapError::NotATap(name) if name == "v0"), "{error}");
        let error = tap::delete("v0").unwrap_err();
        assert!(matches!(&error, TapError::NotATap(name) if name == "v0"), "{error}");
        output("ip tuntap add dev n0 mode tun");
        let error = tap::open_queue(&TapOptions::new("n0")).unwrap_err();
        assert!(matches!(&error, TapError::NotATap(name) if name == "n0"), "{error}");

        // Somebody who is neither its owner nor privileged.
        tap::create(&TapOptions { owner: Some(1234), ..TapOptions::new("t1") }).unwrap();
        caps::drop(None, caps::CapSet::Effective, caps::Capability::CAP_NET_ADMIN).unwrap();
        let refused = |result: Result<(), TapError>| {
            assert!(matches!(&result, Err(TapError::NotPermitted(_))), "{result:?}");
        };
        refused(tap::open_queue(&TapOptions::new("t1")).map(drop));
        refused(tap::create(&TapOptions::new("t2")));
        assert!(!exists("t2"));
    });
}

/// `ethtool -k`: (name, on, fixed) of the features it shows under the kernel's name.
fn by_ethtool(device: &str) -> BTreeMap<String, (bool, bool)> {
    output(&format!("ethtool -k {device}"))
        .lines()
        .skip(1)
        .map(|line| {
            let (name, state) = line.trim().split_once(": ").unwrap();
            (name.to_owned(), (state.starts_with("on"), state.contains("[fixed]")))
        })
        .collect()
}

/// Every feature agrees with ethtool; returns how many were compared.
fn compare(device: &str) -> usize {
    let theirs = by_ethtool(device);
    let ours = Features::read(device).unwrap();
    let compared: BTreeSet<&str> = ours
        .iter()
        .filter(|(name, state)| {
            let Some(&(on, fixed)) = theirs.get(*name) else { return false };
            assert_eq!(*state, FeatureState { active: on, changeable: !fixed }, "{name}");
            true
        })
        .map(|(name, _)| name)
        .collect();
    compared.len()
}

#[test]
#[ignore = "needs root: network namespace, veth"]
fn features_are_those_of_ethtool() {
    private(|| {
        output("ip link add v0 type veth peer name v1");
        output("ip tuntap add dev t0 mode tap");
        for device in ["v0", "t0", "lo"] {
            assert!(compare(device) > 30, "most features have one name");
        }
        // The names ethtool shows otherwise, by its own table (ethtool.c, off_flag_def).
        let (theirs, ours) = (by_ethtool("v0"), Features::read("v0").unwrap());
        for (name, shown) in [
            ("rx-vlan-hw-parse", "rx-vlan-offload"),
            ("tx-vlan-hw-insert", "tx-vlan-offload"),
            ("rx-gro", "generic-receive-offload"),
            ("rx-lro", "large-receive-offload"),
        ] {
            let state = ours.state(name).unwrap();
            assert_eq!((state.active, !state.changeable), theirs[shown], "{name}");
        }
        assert_eq!(ours.state("rx-no-such"), None);

        for (feature, shown) in [
            ("tx-tcp-segmentation", "tx-tcp-segmentation"),
            ("rx-vlan-hw-parse", "rx-vlan-offload"),
            ("rx-gro", "generic-receive-offload"),
        ] {
            for on in [false, true, true, false] {
                ethtool::set("v0", feature, on).unwrap();
                assert_eq!(by_ethtool("v0")[shown], (on, false), "{feature}");
                compare("v0");
            }
        }
        let error = ethtool::set("v0", "rx-lro", true).unwrap_err();
        assert!(matches!(error, EthtoolError::Fixed { active: false, .. }), "{error}");
        ethtool::set("v0", "rx-lro", false).unwrap();
        let error = ethtool::set("v0", "rx-no-such", true).unwrap_err();
        assert!(matches!(error, EthtoolError::UnknownFeature { .. }), "{error}");
        for name in ["missing", "", "sixteen--letters"] {
            let error = Features::read(name).unwrap_err();
            assert!(matches!(error, EthtoolError::NoDevice(_)), "{error}");
        }
        caps::drop(None, caps::CapSet::Effective, caps::Capability::CAP_NET_ADMIN).unwrap();
        let error = ethtool::set("v0", "rx-gro", true).unwrap_err();
        assert!(matches!(error, EthtoolError::NotPermitted { .. }), "{error}");
        compare("v0");
    });
}

/// The calling thread's namespace, as the kernel names it.
fn own_namespace() -> std::path::PathBuf {
    fs::read_link("/proc/thread-self/ns/net").unwrap()
}

#[test]
#[ignore = "needs root: network namespace"]
fn a_private_namespace_is_private_and_goes_away() {
    let outside = own_namespace();
    let mut weak = 42;
    let inside = in_private_namespace(|| {
        weak += 1;
        assert_eq!(nix::ifaddrs::getifaddrs().unwrap().count(), 1, "loopback, without an address");
        output("ip link add v0 type veth peer name v1");
        own_namespace()
    })
    .unwrap();
    assert_ne!(inside, outside);
    assert_eq!(own_namespace(), outside, "the caller stays where it was");
    assert_eq!(weak, 43);

    let panicked = std::panic::catch_unwind(|| in_private_namespace(|| assert_eq!(1, 2)));
    assert!(panicked.is_err(), "a failed assertion goes on in the caller");
    caps::drop(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_ADMIN).unwrap();
    let error = in_private_namespace(|| ()).unwrap_err();
    assert!(error.to_string().contains("CAP_SYS_ADMIN"), "{error}");
}

#[test]
#[ignore = "needs root: network namespace, veth"]
fn a_private_namespace_does_not_leak() {
    private(|| {
        let outer = nix::unistd::gettid();
        for panics in [false, true] {
            let inside = || {
                in_private_namespace(|| {
                    output(&format!("ip link add v0 type veth peer name v1 netns {outer}"));
                    assert!(!panics, "an expected panic");
                })
            };
            // A veth goes when its peer does, and that one when its namespace does.
            let result = std::panic::catch_unwind(inside);
            assert_eq!(result.is_err(), panics);
            wait_until_gone("v1");
        }
    });
}
