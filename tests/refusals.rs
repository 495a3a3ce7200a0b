//! What the daemon refuses: one line on standard error that names the option, the
//! value and the cure, the right exit status, and a host that is as it was.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::daemon::binary;
use lab::raw::{open_tap, set_persistent};
use lab::{Failure, Lab};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Exit status for wrong arguments or configuration.
const WRONG: i32 = 2;
/// Exit status for a failure while running.
const FAILED: i32 = 1;

/// Arguments, and what the one line of the answer must name.
type Case<'c> = (&'c [&'c str], &'c [&'c str]);

/// Refused whoever asks, and on any host: without looking at it.
const BY_THEMSELVES: &[Case] = &[
    // VLANs.
    (&["--map", "4095=t0"], &["4095", "0..4094"]),
    (&["--map", "5000=t0"], &["5000", "0..4094"]),
    (&["--map=-1=t0"], &["-1"]),
    (&["--map", "web=t0"], &["web"]),
    (&["--map", "=t0"], &["=t0"]),
    (&["--map", "10,,11=t0"], &["10,,11"]),
    (&["--map", "210-200=t0"], &["210-200"]),
    (&["--map", "10-12,11=t0"], &["11", "twice"]),
    (&["--map", "0,5=t0"], &["VLAN 0"]),
    (&["--map", "101.4095=t0"], &["4095"]),
    (&["--map", "101.20.3=t0"], &["101.20.3"]),
    (&["--map", "101.0=t0"], &["0"]),
    (&["--map", "0.5=t0"], &["0"]),
    // Claims that collide.
    (&["--map", "101=t0", "--map", "101=t1"], &["101", "t0", "t1"]),
    (&["--map", "100-102=t0", "--map", "101=t1"], &["101", "t0", "t1"]),
    (&["--map", "101=t0", "--map", "101.20=t1"], &["101", "t0", "t1"]),
    (&["--map", "101.20=t0", "--map", "101=t1"], &["101", "t0", "t1"]),
    (&["--map", "101.20=t0", "--map", "101.20=t1"], &["101.20", "t0"]),
    (&["--map", "0=t0", "--map", "0=t1"], &["0", "t0"]),
    (&["--tpid", "0x88a8", "--map", "101=t0", "--map", "101=t1,tpid=0x88a8"], &["101", "t0", "t1"]),
    // Devices.
    (&["--map", "101=t0", "--map", "102=t0"], &["t0", "101=t0", "once"]),
    (&["--map", "101=t0", "--map", "102=internal:t0"], &["t0", "once"]),
    (&["--map", "101=up0"], &["up0", "uplink"]),
    (&["--map", "101=sixteen-letters-"], &["sixteen-letters-", "15"]),
    (&["--map", "101="], &["101="]),
    (&["--map", "101=a/b"], &["a/b"]),
    (&["--map", "101=a b"], &["a b"]),
    (&["--map", "101=.."], &[".."]),
    (&["--map", "101=internal:"], &["internal:"]),
    (&["--map", "101"], &["101", "VLANS=DEVICE"]),
    // Modes.
    (&["--map", "101=t0,mode=bridge"], &["mode", "bridge", "tunnel"]),
    (&["--map", "100-102=t0,mode=access"], &["access"]),
    (&["--map", "100-102=t0,mode=tunnel"], &["tunnel"]),
    (&["--map", "101.20=t0,mode=trunk"], &["trunk"]),
    (&["--map", "0=t0,mode=tunnel"], &["tunnel", "access"]),
    (&["--map", "0=t0,mode=trunk"], &["trunk"]),
    (&["--map", "100-102=t0,native=103"], &["native", "103"]),
    (&["--map", "101=t0,native=101"], &["native"]),
    (&["--map", "100-102=t0,native=x"], &["native", "x"]),
    // Tags.
    (&["--map", "101=t0,tpid=0x1234"], &["tpid", "0x1234", "0x8100"]),
    (&["--tpid", "0x0800", "--map", "101=t0"], &["tpid", "0x0800", "0x8100"]),
    (&["--map", "101=t0,inner-tpid=0x8100"], &["inner-tpid"]),
    (&["--map", "101.20=t0,inner-tpid=7"], &["inner-tpid", "7"]),
    (&["--map", "101=t0,pcp=8"], &["pcp", "8"]),
    (&["--map", "101=t0,pcp=high"], &["pcp", "high", "copy"]),
    // Options.
    (&["--map", "101=t0,speed=9"], &["speed", "mode"]),
    (&["--map", "101=t0,mode"], &["mode"]),
    (&["--map", "101=t0,pcp=1,pcp=2"], &["pcp", "twice"]),
    (&["--map", "101=t0,create=maybe"], &["create", "maybe", "yes"]),
    (&["--map", "101=t0,queues=0"], &["queues", "0"]),
    (&["--map", "101=t0,queues=many"], &["queues", "many"]),
    (&["--map", "101=t0,offload=on"], &["offload", "on"]),
    (&["--map", "101=t0,owner=no-such-user-here"], &["owner", "no-such-user-here"]),
    (&["--map", "101=t0,group=no-such-group-here"], &["group", "no-such-group-here"]),
    (&["--map", "101=t0,create=no,queues=2"], &["queues", "create"]),
    (&["--map", "101=t0,rate=fast"], &["rate", "fast", "100M"]),
    (&["--map", "101=t0,rate=1M,burst=1500"], &["burst", "1500", "80k"]),
    (&["--map", "101=t0,burst=100k"], &["burst", "100k", "rate"]),
    (&["--map", "101=t0,storm=0"], &["storm", "0"]),
    (&["--map", "101=t0,mac=5254"], &["mac", "5254", "52:54:00:12:34:56"]),
    (&["--map", "101=t0,"], &["101=t0,"]),
];

/// Refused by the parser of the command line.
const COMMAND_LINES: &[Case] = &[
    (&["--uplink", "up0", "--frobnicate"], &["--frobnicate"]),
    (&["--uplink", "up0"], &["--map"]),
    (&["--map", "101=t0"], &["--uplink"]),
    (&["--uplink", "up0", "--map", "101=t0", "--poll", "never"], &["--poll", "never", "adaptive"]),
    (
        &["--uplink", "up0", "--map", "101=t0", "--log-format", "xml"],
        &["--log-format", "xml", "json"],
    ),
    (&["--uplink", "up0", "--map", "101=t0", "--set-uplink-mtu=x"], &["--set-uplink-mtu", "x"]),
    (&["--uplink", "up0", "--map", "101=t0", "--set-uplink-mtu=1"], &["--set-uplink-mtu", "1"]),
    (&["--uplink", "up0", "--map", "101=t0", "--datapath", "warp"], &["--datapath", "warp"]),
    (&["--uplink", "up0", "--map", "101=t0", "surplus"], &["surplus"]),
];

fn assert_refused(failure: &Failure, code: i32, arguments: &[&str], named: &[&str]) {
    let said = &failure.stderr;
    assert_eq!(failure.code, Some(code), "{arguments:?}: {said}");
    assert_eq!(failure.stdout, "", "{arguments:?}: nothing was forwarded");
    for word in named {
        assert!(said.contains(word), "{arguments:?}: no {word:?} in: {said}");
    }
}

/// One line, with the program's name in front, and none of a debugger's language.
fn assert_one_line(failure: &Failure, arguments: &[&str]) {
    let said = &failure.stderr;
    assert!(said.starts_with("vlanswitchd: error: "), "{arguments:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{arguments:?}: {said}");
    for noise in ["panicked", "Err(", "Some(", "\\\"", "{ "] {
        assert!(!said.contains(noise), "{arguments:?}: {said}");
    }
}

fn run_anywhere(arguments: &[&str]) -> Failure {
    let output = Command::new(binary()).args(arguments).output().expect("it starts");
    Failure {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap().trim_end().to_owned(),
        stderr: String::from_utf8(output.stderr).unwrap().trim_end().to_owned(),
    }
}

/// The uplink these name does not exist where they run: they must be refused before
/// that is noticed, so no privileges are needed to learn what is wrong.
#[test]
fn wrong_maps_are_refused_by_one_line_with_the_cure() {
    for (arguments, named) in BY_THEMSELVES {
        let arguments = [&["--uplink", "up0"], *arguments].concat();
        let failure = run_anywhere(&arguments);
        assert_refused(&failure, WRONG, &arguments, named);
        assert_one_line(&failure, &arguments);
    }
}

#[test]
fn wrong_command_lines_are_refused_with_the_choices() {
    for (arguments, named) in COMMAND_LINES {
        assert_refused(&run_anywhere(arguments), WRONG, arguments, named);
    }
}

#[test]
fn help_and_version_are_no_errors() {
    for argument in ["--help", "-h", "--version"] {
        let answer = run_anywhere(&[argument]);
        assert_eq!(answer.code, Some(0), "{argument}");
        assert!(answer.stdout.contains("vlanswitchd"), "{argument}: {}", answer.stdout);
        assert_eq!(answer.stderr, "");
    }
}

/// What can only be known on the host; and it stays as it was.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn what_the_host_cannot_give_is_refused_and_nothing_is_half_applied() {
    let lab = Lab::new();
    lab.host.ip("tuntap add dev layer3 mode tun");
    let first_port = ["--map", "7=early,owner=0"];
    let cases: &[(&[&str], i32, &[&str])] = &[
        (&["--uplink", "gone0", "--map", "101=t0"], WRONG, &["gone0", "no such"]),
        (&["--uplink", "lo", "--map", "101=t0"], WRONG, &["lo", "Ethernet"]),
        (&["--uplink", "layer3", "--map", "101=t0"], WRONG, &["layer3", "Ethernet"]),
        (&["--uplink", "up0", "--map", "101=layer3"], WRONG, &["layer3", "Ethernet"]),
        (&["--uplink", "up0", "--map", "101=lo"], WRONG, &["lo", "Ethernet"]),
        (&["--uplink", "up0", "--map", "101=vnet7"], WRONG, &["vnet7", "libvirt", "create=no"]),
        (&["--uplink", "up0", "--map", "101=vif1"], WRONG, &["vif1", "libvirt"]),
        (&["--uplink", "up0", "--map", "101=macvtap0"], WRONG, &["macvtap0", "libvirt"]),
        (&["--uplink", "up0", "--map", "101=macvlan3"], WRONG, &["macvlan3", "libvirt"]),
        (&["--uplink", "up0", "--map", "101=internal:up1"], WRONG, &["up1"]),
    ];
    lab.host.ip("link add up1 type veth peer name up2");
    let before = lab.host.snapshot();
    for (arguments, code, named) in cases {
        // A good port in front of the bad one must not be made either.
        let arguments = [*arguments, &first_port].concat();
        let failure = lab.failing_daemon(&arguments);
        assert_refused(&failure, *code, &arguments, named);
        assert_one_line(&failure, &arguments);
        lab::assert_same(&before, &lab.host.snapshot());
    }
    for (arguments, _) in BY_THEMSELVES {
        let arguments = [&["--uplink", "up0"], *arguments].concat();
        assert_eq!(lab.failing_daemon(&arguments).code, Some(WRONG));
    }
    lab::assert_same(&before, &lab.host.snapshot());
}

/// A name of libvirt's is fine if libvirt makes the device, or has made it.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn libvirts_names_are_taken_from_libvirt() {
    let lab = Lab::new();
    let _guest = lab.raw_guest("vnet1");
    let daemon = lab.daemon(&["--map", "101=vnet0,create=no", "--map", "102=vnet1"]);
    daemon.attached(&["vnet1"]);
    let _late = lab.raw_guest("vnet0");
    daemon.attached(&["vnet0"]);
    daemon.stop();
}

/// A tap that somebody holds with other settings is a failure of the host's.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_late_failure_puts_everything_back() {
    let lab = Lab::new();
    let held = lab.host.enter(|| open_tap("held", 0, 0)).unwrap();
    set_persistent(&held, true).unwrap();
    let before = lab.host.snapshot();
    // The internal port wants the fd side, which somebody has.
    let arguments = [
        "--uplink",
        "up0",
        "--set-uplink-mtu",
        "--map",
        "100.5=fresh",
        "--map",
        "101=internal:held",
    ];
    let failure = lab.failing_daemon(&arguments);
    assert_refused(&failure, FAILED, &arguments, &["held"]);
    assert_one_line(&failure, &arguments);
    lab::assert_same(&before, &lab.host.snapshot());
}

/// The binary where anybody may read it, gone when dropped.
struct Published(PathBuf);

impl Published {
    fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("vslab-{}-{number}", std::process::id());
        let folder = std::env::temp_dir().join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755)).unwrap();
        fs::copy(binary(), folder.join("vlanswitchd")).unwrap();
        Self(folder)
    }

    fn path(&self) -> String {
        self.0.join("vlanswitchd").to_string_lossy().into_owned()
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
#[ignore = "needs root: makes network namespaces and becomes another user"]
fn without_privileges_the_missing_capability_and_the_cure_are_named() {
    let lab = Lab::new();
    let published = Published::new();
    let before = lab.host.snapshot();
    let arguments = ["--uplink", "up0", "--map", "101=t0"];
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"];
    let cases: [(&[&str], &[&str], &[&str]); 3] = [
        (&[], &["CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_BPF", "setcap"], &[]),
        (
            &["--inh-caps=+net_admin,+net_raw", "--ambient-caps=+net_admin,+net_raw"],
            &["CAP_BPF", "setcap"],
            &["CAP_NET_RAW", "CAP_NET_ADMIN"],
        ),
        (
            &["--inh-caps=+net_admin,+bpf", "--ambient-caps=+net_admin,+bpf"],
            &["CAP_NET_RAW", "setcap"],
            &["CAP_BPF", "CAP_NET_ADMIN"],
        ),
    ];
    for (granted, named, not_named) in cases {
        let wrapper = [&nobody, granted].concat();
        let failure = Failure::of_program(&lab.host, &wrapper, &published.path(), &arguments);
        assert_refused(&failure, FAILED, &arguments, named);
        assert_one_line(&failure, &arguments);
        for word in not_named {
            assert!(!failure.stderr.contains(word), "{}", failure.stderr);
        }
        lab::assert_same(&before, &lab.host.snapshot());
    }
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn too_few_open_files_are_told_before_anything_is_changed() {
    let lab = Lab::new();
    let published = Published::new();
    let before = lab.host.snapshot();
    let arguments = ["--uplink", "up0", "--map", "101=t0", "--map", "102=t1"];
    let wrapper = ["prlimit", "--nofile=40:40"];
    let failure = Failure::of_program(&lab.host, &wrapper, &published.path(), &arguments);
    assert_refused(&failure, FAILED, &arguments, &["open files", "40", "LimitNOFILE="]);
    assert_one_line(&failure, &arguments);
    lab::assert_same(&before, &lab.host.snapshot());
}

/// And with exactly those it works for anybody.
#[test]
#[ignore = "needs root: makes network namespaces and becomes another user"]
fn the_named_capabilities_suffice() {
    let lab = Lab::new();
    let published = Published::new();
    let capabilities = "+net_admin,+net_raw,+bpf";
    // Where everybody may open it, as udev makes it; not every machine has udev.
    let open = "mount -t tmpfs tmpfs /dev/net && mknod -m 666 /dev/net/tun c 10 200 && exec \"$@\"";
    let wrapper = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        open,
        "sh",
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        &format!("--inh-caps={capabilities}"),
        &format!("--ambient-caps={capabilities}"),
    ];
    let arguments = ["--uplink", "up0", "--map", "101=t0", "--log-format", "json"];
    let daemon = lab::Daemon::start_program(&lab.host, &wrapper, &published.path(), &arguments);
    let guest = lab.raw_guest("t0");
    daemon.attached(&["t0"]);
    let wire = lab.wire();
    let tags = [lab::frames::tag(0x8100, 101)];
    wire.send(&lab::Frame::numbered(1).tags(&tags));
    assert_eq!(guest.receive_until(1).len(), 1);
    daemon.stop();
}
