//! Least privilege: what the threads may not do ends the process, and all that the
//! switch is for works inside. What is forbidden is tried in a child process, which is
//! this very test program, by the library's own functions.

#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking, and try calls no wrapper makes"
)]

mod lab;

use clap::Parser;
use lab::frames::tag;
use lab::{Daemon, Frame, Lab, Namespace, TagBytes, assert_same, eventually};
use nix::sys::signal::Signal;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use tempfile::TempDir;
use vlanswitchd::control::cli::{Arguments, Config};
use vlanswitchd::control::config::SandboxMode;
use vlanswitchd::control::privileges;

/// Tells the child what to try.
const TRY: &str = "VLANSWITCHD_TRY";

fn raw(number: libc::c_long, arguments: [libc::c_long; 4]) -> String {
    let [a, b, c, d] = arguments;
    // SAFETY: none of the calls tried reads or writes memory through these numbers: they are
    // zero, or the kernel refuses them first.
    let result = unsafe { libc::syscall(number, a, b, c, d) };
    format!("{result} {}", io::Error::last_os_error())
}

fn attempt(what: &str) -> String {
    const ANYBODY: libc::c_long = 1;
    let pages = |protection| raw(libc::SYS_mmap, [0, 4096, protection, 0x22]);
    match what {
        "nothing" => String::new(),
        "open" => format!("{:?}", fs::File::open("/etc/passwd").err()),
        "open elsewhere" => format!("{:?}", fs::File::open("/proc/version").err()),
        "write elsewhere" => format!("{:?}", fs::write("/etc/vlanswitchd-test", "x").err()),
        "run a program" => format!("{:?}", Command::new("/bin/true").status()),
        "execve" => raw(libc::SYS_execve, [0; 4]),
        "fork" => raw(libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0, 0]),
        "a thread" => std::thread::spawn(|| "ran".to_owned()).join().unwrap(),
        "a TCP socket" => raw(libc::SYS_socket, [libc::AF_INET.into(), 1, 0, 0]),
        "a packet socket" => raw(libc::SYS_socket, [libc::AF_PACKET.into(), 3, 0, 0]),
        "ptrace" => raw(libc::SYS_ptrace, [libc::PTRACE_ATTACH as libc::c_long, ANYBODY, 0, 0]),
        "a signal" => raw(libc::SYS_kill, [ANYBODY, 0, 0, 0]),
        "a signal to a thread" => raw(libc::SYS_tgkill, [ANYBODY, ANYBODY, 0, 0]),
        "load a BPF program" => raw(libc::SYS_bpf, [5, 0, 0, 0]),
        "ask for BPF programs" => raw(libc::SYS_bpf, [16, 0, 0, 0]),
        "memory to execute" => pages((libc::PROT_READ | libc::PROT_EXEC).into()),
        "type on a terminal" => raw(libc::SYS_ioctl, [2, libc::TIOCSTI as libc::c_long, 0, 0]),
        "unshare" => raw(libc::SYS_unshare, [libc::CLONE_NEWNET.into(), 0, 0, 0]),
        "mount" => raw(libc::SYS_mount, [0; 4]),
        "another user" => raw(libc::SYS_setuid, [0; 4]),
        "io_uring" => raw(libc::SYS_io_uring_setup, [0; 4]),
        "dumpable" => raw(libc::SYS_prctl, [libc::PR_SET_DUMPABLE.into(), 1, 0, 0]),
        "panic" => panic!("the table is gone"),
        other => panic!("what is {other}?"),
    }
}

/// The child: confines one of its threads and tries what it is told.
#[test]
#[ignore = "needs root, and to be told what to try: the other tests run it"]
fn child() {
    let Ok(told) = std::env::var(TRY) else { return };
    let (thread, what) = told.split_once(':').unwrap();
    privileges::abort_on_panic();
    let what = what.to_owned();
    let thread = thread.to_owned();
    let body = move || {
        let path = if thread == "control" { "packet" } else { "auto" };
        let arguments = ["vlanswitchd", "--uplink", "up0", "--map", "1=t0", "--datapath", path];
        let config = Config::try_from(Arguments::parse_from(arguments)).unwrap();
        let _confined = match thread.as_str() {
            "worker" => privileges::confine_worker(SandboxMode::On).map(|()| None).unwrap(),
            // Only the kernel path makes programs while it runs.
            "control" | "kernel path" => privileges::confine(&config, None).map(Some).unwrap(),
            _ => None,
        };
        let got = attempt(&what);
        // Not by println: libtest has it.
        let text = format!("survived: {got}\n");
        // SAFETY: the bytes are there.
        unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
    };
    std::thread::Builder::new().name("worker".into()).spawn(body).unwrap().join().unwrap();
}

fn in_child(thread: &str, what: &str) -> (Option<i32>, String) {
    let output: Output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture", "--test-threads", "1"])
        .env(TRY, format!("{thread}:{what}"))
        .output()
        .unwrap();
    (output.status.signal(), String::from_utf8_lossy(&output.stderr).into_owned())
}

fn dies(thread: &str, attempts: &[&str]) {
    for what in attempts {
        // Without a sandbox the same is survived: it is the sandbox that ends it.
        let (signal, said) = in_child("free", what);
        assert!(signal.is_none() && said.contains("survived"), "free: {what}: {signal:?} {said}");
        let (signal, said) = in_child(thread, what);
        assert_eq!(signal, Some(libc::SIGSYS), "{thread}: {what}: {said}");
    }
}

#[test]
#[ignore = "needs root"]
fn what_a_worker_may_not_do_ends_the_process() {
    let (signal, said) = in_child("worker", "nothing");
    assert!(signal.is_none() && said.contains("survived"), "{signal:?} {said}");
    dies(
        "worker",
        &[
            "open",
            "run a program",
            "execve",
            "fork",
            "a thread",
            "a TCP socket",
            "a packet socket",
            "ptrace",
            "a signal",
            "a signal to a thread",
            "load a BPF program",
            "ask for BPF programs",
            "memory to execute",
            "type on a terminal",
            "unshare",
            "mount",
            "another user",
            "io_uring",
            "dumpable",
        ],
    );
}

#[test]
#[ignore = "needs root"]
fn what_control_may_not_do_ends_the_process() {
    for (what, outcome) in [("open", "None"), ("a thread", "ran"), ("a packet socket", "")] {
        let (signal, said) = in_child("control", what);
        let fine = said.contains(&format!("survived: {outcome}"));
        assert!(signal.is_none() && fine, "{what}: {signal:?} {said}");
    }
    dies(
        "control",
        &[
            "run a program",
            "execve",
            "fork",
            "a TCP socket",
            "ptrace",
            "a signal",
            "a signal to a thread",
            "load a BPF program",
            "memory to execute",
            "type on a terminal",
            "unshare",
            "mount",
            "another user",
            "io_uring",
            "dumpable",
        ],
    );
}

/// The kernel path takes one thing more.
#[test]
#[ignore = "needs root"]
fn programs_are_loaded_by_the_kernel_path_only() {
    let (signal, said) = in_child("kernel path", "load a BPF program");
    assert!(signal.is_none() && said.contains("survived"), "{signal:?} {said}");
    dies("kernel path", &["execve", "fork", "a TCP socket", "mount", "ptrace", "io_uring"]);
}

#[test]
#[ignore = "needs root"]
fn control_cannot_reach_other_files() {
    // LANDLOCK_CREATE_RULESET_VERSION: -1 where there is none.
    if raw(libc::SYS_landlock_create_ruleset, [0, 0, 1, 0]).starts_with('-') {
        eprintln!("this kernel has no Landlock: not tested");
        return;
    }
    for what in ["open elsewhere", "write elsewhere"] {
        let (signal, said) = in_child("control", what);
        assert!(signal.is_none() && said.contains("PermissionDenied"), "{what}: {signal:?} {said}");
    }
}

#[test]
#[ignore = "needs root"]
fn a_panic_in_a_worker_ends_the_process_with_a_word() {
    for thread in ["free", "worker", "control"] {
        let (signal, said) = in_child(thread, "panic");
        assert_eq!(signal, Some(libc::SIGABRT), "{thread}: {said}");
        assert!(said.contains("in thread worker at tests/sandbox.rs"), "{said}");
        assert!(said.contains("the table is gone; it ends here"), "{said}");
    }
}

/// `/proc/PID/task/TID/status` of each thread, by its name.
fn threads(id: u32) -> BTreeMap<String, BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{id}/task")).unwrap().flatten();
    let statuses = tasks.filter_map(|task| fs::read_to_string(task.path().join("status")).ok());
    let fields = |text: String| -> BTreeMap<String, String> {
        let pairs = text.lines().filter_map(|line| line.split_once(':'));
        pairs.map(|(key, value)| (key.to_owned(), value.trim().replace('\t', " "))).collect()
    };
    statuses.map(fields).map(|status| (status["Name"].clone(), status)).collect()
}

const C101: TagBytes = tag(0x8100, 101);

/// CAP_NET_ADMIN (12), CAP_NET_RAW (13), CAP_BPF (39).
const RUNNING: u64 = 1 << 12 | 1 << 13 | 1 << 39;

fn assert_confined(daemon: &Daemon, user: u32, bounded: bool) {
    let threads = threads(daemon.id());
    assert!(threads.contains_key("worker") && threads.contains_key("vlanswitchd"), "{threads:?}");
    for (name, status) in &threads {
        let capabilities = if name == "worker" { 0 } else { RUNNING };
        let of = |set: &str| u64::from_str_radix(&status[set], 16).unwrap();
        for set in ["CapEff", "CapPrm"] {
            assert_eq!(of(set), capabilities, "{name}: {set}");
        }
        for set in ["CapInh", "CapAmb"] {
            assert_eq!(of(set), 0, "{name}: {set}");
        }
        if bounded {
            assert_eq!(of("CapBnd"), capabilities, "{name}");
        }
        assert_eq!(status["Uid"], [user; 4].map(|id| id.to_string()).join(" "), "{name}");
        assert_eq!(
            (status["Seccomp"].as_str(), status["NoNewPrivs"].as_str()),
            ("2", "1"),
            "{name}"
        );
    }
}

/// A daemon's configuration and sockets, in a folder of its user's.
struct Place {
    folder: TempDir,
}

impl Place {
    fn new(user: u32) -> Self {
        let folder = TempDir::new().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let place = Self { folder };
        let text = "[uplink]\ndevice = \"up0\"\n\n[[port]]\nvlan = 101\ndevice = \"tap-a1\"\n\
                    owner = \"nobody\"\n\n[[port]]\nvlan = 102\ndevice = \"veth0\"\n";
        fs::write(place.path("v.toml"), text).unwrap();
        for path in [".", "v.toml"] {
            chown(place.path(path), Some(user), Some(user)).unwrap();
        }
        place
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }

    fn ctl(&self, words: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vlanswitchctl"));
        command.args(["--socket", &self.path("control")]).args(words.split(' '));
        command.output().unwrap()
    }

    fn done(&self, words: &str) -> String {
        let output = self.ctl(words);
        assert!(output.status.success(), "{words}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn start(&self, host: &Namespace, wrapper: &[&str], more: &[&str]) -> Daemon {
        let (config, control) = (self.path("v.toml"), self.path("control"));
        let metrics = format!("unix:{}", self.path("metrics"));
        let mut words = vec![
            "--config",
            &config,
            "--control",
            &control,
            "--metrics",
            &metrics,
            "--log-format",
            "json",
        ];
        words.extend(more);
        Daemon::start_program(host, wrapper, &lab::daemon::binary(), &words)
    }
}

/// Everybody may open the tap driver, as udev makes it: in a mount namespace, which
/// `ip netns exec` has made.
const OPEN_DRIVER: [&str; 4] = [
    "sh",
    "-ec",
    "mount -t tmpfs none /dev/net; mknod -m 666 /dev/net/tun c 10 200; exec \"$@\"",
    "sh",
];

/// All that changes while the switch runs, and that it is given back at the end.
fn everything_works(wrapper: &[&str], more: &[&str], user: u32, bounded: bool) {
    let lab = Lab::new();
    lab.host.ip("link add veth0 type veth peer name veth1");
    lab.host.ip("link set veth1 up");
    let before = device_settings(&lab.host, "veth0");
    let place = Place::new(user);
    let daemon = place.start(&lab.host, wrapper, more);
    assert_confined(&daemon, user, bounded);

    place.done("port add 105=tap-b1,owner=nobody,group=nogroup");
    assert_eq!(lab.host.tool("cat", "/sys/class/net/tap-b1/owner").trim(), "65534");
    let refused = place.ctl("port add 106=tap-b2,owner=no-such-user");
    assert!(String::from_utf8_lossy(&refused.stderr).contains("no-such-user"), "{refused:?}");
    place.done("port add 107=internal:int1");
    place.done("port add 108=tap-b3 --persist");
    place.done("port set tap-b3 vlan=109 --persist");
    let text = fs::read_to_string(place.path("v.toml")).unwrap();
    assert!(text.contains("109") && text.contains("tap-b3") && !text.contains("108"), "{text}");
    place.done("port remove tap-b1");
    for words in ["status", "doctor", "drops", "config show", "config check", "stats", "port list"]
    {
        let output = place.ctl(words);
        assert!(!output.stdout.is_empty(), "{words}: {output:?}");
    }

    // A guest, a capture, and a frame each way.
    let guest = lab.raw_guest("tap-a1");
    daemon.attached(&["tap-a1"]);
    let wire = lab.wire();
    let file = place.path("frames.pcapng");
    let mut capture = Command::new(env!("CARGO_BIN_EXE_vlanswitchctl"))
        .args(["--socket", &place.path("control"), "capture", "-c", "1", "-w", &file])
        .spawn()
        .unwrap();
    eventually("the capture has its frame", || {
        wire.send(&Frame::numbered(1).tags(&[C101]));
        capture.try_wait().unwrap()
    });
    assert!(fs::metadata(&file).unwrap().len() > 100);
    guest.send(&Frame::numbered(2));
    daemon.until("the guest's frame is sent", |summary| {
        summary.port("tap-a1").from_guest.out_frames > 0
    });
    let curl = ["--silent", "--fail", "--unix-socket", &place.path("metrics"), "http://l/metrics"];
    let metrics = Command::new("curl").args(curl).output().unwrap();
    assert!(String::from_utf8_lossy(&metrics.stdout).contains("vlanswitchd_"), "{metrics:?}");

    // The file is read again.
    let text = fs::read_to_string(place.path("v.toml")).unwrap();
    fs::write(place.path("v.toml"), text.replace("vlan = 102", "vlan = 112")).unwrap();
    daemon.signal(Signal::SIGHUP);
    eventually("veth0 is in VLAN 112", || {
        place.done("port show veth0").contains("112").then_some(())
    });

    // The seal comes back, and the uplink.
    let _ = lab.host.try_tc("qdisc del dev tap-a1 clsact");
    lab.host.tool("tc", "qdisc add dev tap-a1 clsact");
    lab.host.tool("tc", "qdisc del dev tap-a1 clsact");
    let index = lab.host.index("tap-a1");
    eventually("tap-a1 is sealed", || {
        use vlanswitchd::sys::bpf::{Direction, is_attached_tc};
        lab.host
            .enter(|| is_attached_tc("vlansw_seal", index, Direction::Ingress).unwrap())
            .then_some(())
    });
    drop(wire);
    lab.host.ip("link del up0");
    daemon.until("the uplink is gone", |summary| summary.uplink_state != "up");
    lab.plug_uplink();
    let wire = lab.wire();
    guest.clear();
    eventually("frames arrive from the new uplink", || {
        wire.send(&Frame::numbered(3).tags(&[C101]));
        guest.receive_within(std::time::Duration::from_millis(20))
    });
    drop(guest);
    let threads = threads(daemon.id());
    assert!(threads.values().all(|status| status["Seccomp"] == "2"), "{threads:?}");
    let stopped = daemon.stop_by(Signal::SIGTERM);
    assert!(stopped.status.success(), "{:?}", stopped.stderr);
    let complaints: Vec<&String> =
        stopped.stderr.iter().filter(|line| line.contains("WARN giving")).collect();
    assert!(complaints.is_empty(), "{complaints:?}");
    for socket in ["control", "metrics"] {
        assert!(!fs::exists(place.path(socket)).unwrap(), "{socket} is left behind");
    }
    // Found devices are as they were; created ones are still there, for their VMs.
    let devices = lab.host.devices();
    for tap in ["tap-a1", "tap-b1", "tap-b3"] {
        assert!(devices.iter().any(|device| device == tap), "{devices:?}");
    }
    assert_same(&before, &device_settings(&lab.host, "veth0"));
}

fn device_settings(host: &Namespace, device: &str) -> String {
    let filters = host.try_tc(&format!("filter show dev {device} ingress")).unwrap_or_default();
    let link = host.link(device).unwrap();
    let ipv6 = host.tool("cat", &format!("/proc/sys/net/ipv6/conf/{device}/disable_ipv6"));
    format!("{} {} {filters} {ipv6}", link["flags"], link["mtu"])
}

#[test]
#[ignore = "needs root"]
fn everything_works_inside_started_by_root() {
    everything_works(&[], &[], 0, true);
}

#[test]
#[ignore = "needs root"]
fn everything_works_inside_as_another_user() {
    everything_works(&OPEN_DRIVER, &["--user", "nobody"], 65534, true);
}

/// As a service manager starts it; nobody can take anything from the bounding set then.
#[test]
#[ignore = "needs root"]
fn everything_works_inside_with_ambient_capabilities_only() {
    let mut wrapper = OPEN_DRIVER.to_vec();
    wrapper.extend([
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--inh-caps=-all,+net_admin,+net_raw,+bpf",
        "--ambient-caps=-all,+net_admin,+net_raw,+bpf",
    ]);
    everything_works(&wrapper, &[], 65534, false);
}

#[test]
#[ignore = "needs root"]
fn a_user_that_is_none_is_refused_before_anything_is_changed() {
    let lab = Lab::new();
    let before = lab.host.snapshot();
    let refused =
        lab.failing_daemon(&["--uplink", "up0", "--map", "101=tap-a1", "--user", "no-such-user"]);
    assert_eq!(refused.code, Some(2));
    assert!(refused.stderr.contains("--user no-such-user: no such user"), "{}", refused.stderr);
    assert_same(&before, &lab.host.snapshot());
}

#[test]
#[ignore = "needs root"]
fn systemd_is_told_that_all_is_well_as_often_as_it_wants() {
    let lab = Lab::new();
    let place = Place::new(0);
    let socket = UnixDatagram::bind(place.path("notify")).unwrap();
    socket.set_read_timeout(Some(lab::PATIENCE)).unwrap();
    lab.host.ip("link add veth0 type veth peer name veth1");
    let notify = format!("NOTIFY_SOCKET={}", place.path("notify"));
    let daemon = place.start(&lab.host, &["env", &notify, "WATCHDOG_USEC=400000"], &[]);
    let mut told = [0; 4096];
    let mut next = || {
        let length = socket.recv(&mut told).unwrap();
        String::from_utf8_lossy(&told[..length]).trim().to_owned()
    };
    assert_eq!(next(), "READY=1");
    for _ in 0..5 {
        assert_eq!(next(), "WATCHDOG=1");
    }
    daemon.stop();
}
