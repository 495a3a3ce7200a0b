//! Network namespaces of the lab's own, gone when dropped.

use super::raw::start_inside;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use vlanswitchd::control::links::LinkSocket;
use vlanswitchd::sys::bpf::Direction;
use vlanswitchd::sys::bpf::tcx;

/// What names of ours start with; then the process id, a number and a role.
const PREFIX: &str = "vslab";

/// A named network namespace, as `ip netns` knows them.
///
/// Made here: a program to start for each step is most of what a lab costs on an emulated
/// machine.
pub struct Namespace {
    name: String,
}

static FIRST: Once = Once::new();
static NUMBER: AtomicU32 = AtomicU32::new(0);
/// `lo`, in any namespace.
const LOOPBACK: u32 = 1;

impl Namespace {
    /// A fresh namespace with `lo` up and IPv6 off on devices made later.
    pub fn new(role: &str) -> Self {
        FIRST.call_once(|| {
            sweep();
            share_folder();
        });
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let namespace = Self { name: format!("{PREFIX}-{}-{number}-{role}", std::process::id()) };
        let path = namespace.path();
        let made = std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace: is this root?");
            File::create(&path).expect("a file in /run/netns");
            let (ours, none) = (Some("/proc/thread-self/ns/net"), None::<&str>);
            mount(ours, &path, none, MsFlags::MS_BIND, none).expect("a name for the namespace");
            LinkSocket::new().unwrap().set_up(LOOPBACK).expect("lo comes up");
        });
        if let Err(panic) = made.join() {
            std::panic::resume_unwind(panic);
        }
        namespace.set_sysctl("net/ipv6/conf/default/disable_ipv6", "1");
        namespace
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }

    /// The name under /run/netns.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Devices made from now on speak IPv6, with addresses that need no
    /// duplicate address detection.
    pub fn enable_ipv6(&self) {
        self.set_sysctl("net/ipv6/conf/default/accept_dad", "0");
        self.set_sysctl("net/ipv6/conf/default/disable_ipv6", "0");
    }

    /// Writes /proc/sys/`key` as seen from inside. A kernel without the key
    /// (no IPv6) has nothing to set.
    pub fn set_sysctl(&self, key: &str, value: &str) {
        let path = format!("/proc/sys/{key}");
        self.enter(|| {
            if fs::exists(&path).unwrap() {
                fs::write(&path, value).unwrap_or_else(|error| panic!("{path}: {error}"));
            }
        });
    }

    /// Reads /proc/sys/`key` as seen from inside.
    pub fn sysctl(&self, key: &str) -> Option<String> {
        let path = format!("/proc/sys/{key}");
        self.enter(|| fs::read_to_string(path).ok()).map(|text| text.trim().to_owned())
    }

    /// `ip ARGUMENTS` inside; fails the test if `ip` does.
    pub fn ip(&self, arguments: &str) -> String {
        self.try_ip(arguments).unwrap_or_else(|error| panic!("{error}"))
    }

    /// `ip ARGUMENTS` inside.
    pub fn try_ip(&self, arguments: &str) -> Result<String, String> {
        run(Command::new("ip").args(["-n", &self.name]).args(arguments.split_whitespace()))
    }

    /// Sets these devices up.
    pub fn set_up(&self, devices: &[&str]) {
        self.enter(|| {
            let mut links = LinkSocket::new().unwrap();
            for device in devices {
                let index = if_nametoindex(*device).unwrap_or_else(|_| panic!("{device} exists"));
                links.set_up(index).unwrap_or_else(|error| panic!("{device}: {error}"));
            }
        });
    }

    /// `tc ARGUMENTS` inside; fails the test if `tc` does.
    pub fn tc(&self, arguments: &str) -> String {
        self.try_tc(arguments).unwrap_or_else(|error| panic!("{error}"))
    }

    /// `tc ARGUMENTS` inside.
    pub fn try_tc(&self, arguments: &str) -> Result<String, String> {
        let mut command = Command::new("tc");
        command.args(["-n", &self.name]);
        run(command.args(arguments.split_whitespace()))
    }

    /// Any program inside, with /sys of the namespace; fails the test if it fails.
    pub fn tool(&self, program: &str, arguments: &str) -> String {
        let mut command = self.command(program);
        command.args(arguments.split_whitespace());
        run(&mut command).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A shell command inside, with /sys of the namespace; fails the test if it fails.
    pub fn shell(&self, script: &str) -> String {
        let mut command = self.command("sh");
        command.args(["-ec", script]);
        run(&mut command).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A program to be started inside, with /sys of the namespace. It dies with
    /// the thread that starts it, also when that is killed.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        start_inside(&mut command, self.file());
        command
    }

    /// As [`Namespace::command`], with further programs in front of it (such as
    /// `setpriv --reuid=..`).
    pub fn command_through(&self, wrapper: &[&str], program: &str) -> Command {
        let Some((first, others)) = wrapper.split_first() else {
            return self.command(program);
        };
        let mut command = self.command(first);
        // Who becomes another user no longer dies with anybody.
        command.args(others).args(["setpriv", "--pdeathsig", "KILL", program]);
        command
    }

    fn file(&self) -> File {
        File::open(self.path()).expect("namespace exists")
    }

    /// Runs a closure on a thread inside. Sockets opened there stay there.
    pub fn enter<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let file = self.file();
        std::thread::scope(|scope| {
            let thread = scope.spawn(move || {
                setns(&file, CloneFlags::CLONE_NEWNET).expect("setns");
                body()
            });
            match thread.join() {
                Ok(value) => value,
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    /// `ip -details -json link show DEVICE`, or `None` if it does not exist.
    pub fn link(&self, device: &str) -> Option<serde_json::Value> {
        let text =
            self.try_ip(&format!("-details -statistics -json link show dev {device}")).ok()?;
        let list: serde_json::Value = serde_json::from_str(&text).expect("ip prints JSON");
        list.get(0).cloned()
    }

    /// Names of all devices, sorted.
    pub fn devices(&self) -> Vec<String> {
        let list: serde_json::Value =
            serde_json::from_str(&self.ip("-json link show")).expect("ip prints JSON");
        let name = |link: &serde_json::Value| link["ifname"].as_str().unwrap().to_owned();
        let mut names: Vec<String> = list.as_array().unwrap().iter().map(name).collect();
        names.sort();
        names
    }

    /// All that a program could have changed about the devices: flags, MTU, names,
    /// queueing, promiscuity, tc programs, IPv6, features. Snapshots are compared as
    /// text. An empty clsact qdisc is left out: it holds filters and does nothing by
    /// itself, and others may have begun to use it.
    pub fn snapshot(&self) -> String {
        let mut text = self.shell(
            "ip -details link show; ip -oneline address show scope global; \
             tc qdisc show | grep -v '^qdisc clsact' || true; \
             tail -n +1 /proc/sys/net/ipv6/conf/*/disable_ipv6 2>/dev/null || true",
        );
        for device in self.devices() {
            let index = self.index(&device);
            let hooks = [Direction::Ingress, Direction::Egress];
            let programs = hooks.map(|hook| {
                self.enter(|| tcx::programs(index, hook).map_or(0, |programs| programs.len()))
            });
            let filters = ["ingress", "egress"].map(|hook| {
                self.try_tc(&format!("filter show dev {device} {hook}")).unwrap_or_default()
            });
            text.push_str(&format!("{device}: TCX programs {programs:?}, filters {filters:?}\n"));
            text.push_str(&self.tool("ethtool", &format!("-k {device}")));
        }
        text
    }

    /// Interface index of a device.
    pub fn index(&self, device: &str) -> u32 {
        self.enter(|| if_nametoindex(device)).unwrap_or_else(|_| panic!("{device} exists"))
    }

    /// TCP segments its stack has sent, of which a super-frame is several (`TcpOutSegs`).
    pub fn tcp_segments(&self) -> u64 {
        let text = self.enter(|| fs::read_to_string("/proc/thread-self/net/snmp")).unwrap();
        let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
        let [names, values] = [(); 2].map(|()| lines.next().unwrap().split_whitespace());
        let (_, value) = names.zip(values).find(|(name, _)| *name == "OutSegs").unwrap();
        value.parse().unwrap()
    }

    /// A counter of the kernel's: `rx_packets`, `tx_packets`, `rx_dropped`, ...
    pub fn counter(&self, device: &str, counter: &str) -> u64 {
        let link = self.link(device).unwrap_or_else(|| panic!("{device} exists"));
        let (direction, name) = counter.split_once('_').unwrap();
        link["stats64"][direction][name].as_u64().unwrap_or_else(|| panic!("{counter} in {link}"))
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let path = self.path();
        let _ = umount2(&path, MntFlags::MNT_DETACH);
        let _ = fs::remove_file(&path);
    }
}

/// Has `ip` make /run/netns the way it wants it: what is mounted and unmounted there shows in
/// other mount namespaces, too, and none keeps a namespace that is gone.
fn share_folder() {
    let name = format!("{PREFIX}-{}-first", std::process::id());
    // It races with itself while it makes the folder for the first time.
    super::eventually("`ip netns add` works (is this root, with iproute2?)", || {
        run(Command::new("ip").args(["netns", "add", &name])).ok()
    });
    run(Command::new("ip").args(["netns", "del", &name])).unwrap();
}

/// Removes namespaces of labs whose process is gone (killed, so `Drop` never ran).
fn sweep() {
    let Ok(entries) = fs::read_dir("/run/netns") else {
        return;
    };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let mut parts = name.split('-');
        let (prefix, process) = (parts.next(), parts.next());
        if prefix != Some(PREFIX) {
            continue;
        }
        if process.is_some_and(|id| !fs::exists(format!("/proc/{id}")).unwrap_or(true)) {
            let _ = run(Command::new("ip").args(["netns", "del", &name]));
        }
    }
}

/// Standard output of a command that succeeded, else all that it said.
pub fn run(command: &mut Command) -> Result<String, String> {
    let Output { status, stdout, stderr } =
        command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if status.success() {
        return Ok(String::from_utf8_lossy(&stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&stderr);
    Err(format!("{command:?}: {status}: {}{}", said, String::from_utf8_lossy(&stdout)))
}
