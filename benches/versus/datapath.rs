//! What is compared: each datapath is started in a fresh host namespace between the uplink and
//! one guest port, and handed out as the guest's file descriptor.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::Pid;

use super::kernel;
use super::namespace::Namespace;
use super::peers::Peer;

/// The VLAN of the measured port.
pub const VLAN: u16 = 101;
/// The uplink in the host namespace.
pub const UPLINK: &str = "up0";
/// The guest's tap in the host namespace.
pub const TAP: &str = "tap0";
/// Hardware address of the guest.
pub const GUEST_ADDRESS: &str = "02:00:00:00:00:02";

/// How long a datapath may take until it forwards: a thousand ports on a small machine.
const START_DEADLINE: Duration = Duration::from_secs(180);
const STOP_DEADLINE: Duration = Duration::from_secs(5);

/// One column of the comparison.
#[derive(Clone, Debug)]
pub struct Datapath {
    /// Name in tables, plots and `--only`.
    pub name: String,
    kind: Kind,
    /// Its guest has no offloads, as one with an e1000, and the switch is told so.
    pub plain_guest: bool,
}

#[derive(Clone, Debug)]
enum Kind {
    Macvtap,
    /// vlanswitchd, or any program whose arguments contain `{tap}`.
    Daemon(Vec<String>),
    Peer(Peer),
}

/// A datapath that forwards; stops when dropped.
pub struct Running {
    /// The guest's side.
    pub guest: File,
    /// Its programs.
    pub children: Vec<Child>,
}

impl Datapath {
    /// What every ratio is taken against: untagged, doing no VLAN work.
    pub fn macvtap() -> Self {
        Self { name: "macvtap".into(), kind: Kind::Macvtap, plain_guest: false }
    }

    /// A build of vlanswitchd: `[LABEL=]PATH [ARGS...]`.
    pub fn daemon(command: &str, default_label: &str) -> Result<Self> {
        let (label, words) = match command.split_once('=') {
            Some((label, rest)) if !label.contains(['/', ' ']) => (label, rest),
            _ => (default_label, command),
        };
        let words: Vec<String> = words.split_whitespace().map(String::from).collect();
        let program = words.first().context("--daemon: no program named")?;
        if !Path::new(program).is_file() {
            bail!("--daemon {program}: no such file");
        }
        Ok(Self { name: label.into(), kind: Kind::Daemon(words), plain_guest: false })
    }

    /// Another switch.
    pub fn peer(peer: Peer) -> Self {
        Self { name: peer.name().into(), kind: Kind::Peer(peer), plain_guest: false }
    }

    /// The program and arguments behind a column, for the record.
    pub fn command(&self) -> String {
        match &self.kind {
            Kind::Daemon(words) => words.join(" "),
            Kind::Macvtap | Kind::Peer(_) => self.name.clone(),
        }
    }

    /// Why this machine cannot run it, if so.
    pub fn absent(&self) -> Option<String> {
        match self.kind {
            Kind::Peer(peer) => peer.absent(),
            Kind::Macvtap | Kind::Daemon(_) => None,
        }
    }

    /// Whether its frames carry the tag of [`VLAN`] on the uplink.
    pub fn tagged(&self) -> bool {
        match self.kind {
            Kind::Macvtap => false,
            Kind::Daemon(_) => true,
            Kind::Peer(peer) => peer.tagged(),
        }
    }

    /// Why it cannot carry bulk TCP between stacks with offloads, if so.
    pub fn cannot_offload(&self) -> Option<&'static str> {
        match self.kind {
            Kind::Peer(peer) => peer.cannot_offload(),
            Kind::Macvtap | Kind::Daemon(_) => None,
        }
    }

    /// Whether it can have more than one mapped port.
    pub fn has_many_ports(&self) -> bool {
        matches!(&self.kind, Kind::Daemon(words) if !is_foreign(words))
    }

    /// Starts it in `host`, where the uplink is up; returns when it forwards.
    pub fn start(&self, host: &Namespace, scratch: &Path, ports: usize) -> Result<Running> {
        match &self.kind {
            Kind::Macvtap => start_macvtap(host, UPLINK, scratch),
            Kind::Daemon(words) if is_foreign(words) => start_foreign(host, words, scratch),
            Kind::Daemon(words) => start_daemon(host, words, scratch, ports, self.plain_guest),
            Kind::Peer(peer) => peer.start(host, scratch),
        }
        .with_context(|| format!("{} did not start", self.name))
    }
}

fn is_foreign(words: &[String]) -> bool {
    words.iter().any(|word| word == "{tap}")
}

/// The device of a daemon's port beside the first, from 1 on.
pub fn other_tap(number: usize) -> String {
    format!("tap{number}")
}

/// macvtap passthru on a device of the host.
pub fn start_macvtap(host: &Namespace, lower: &str, scratch: &Path) -> Result<Running> {
    host.command(&format!(
        "ip link add link {lower} name mac0 address {GUEST_ADDRESS} type macvtap mode passthru"
    ))?;
    host.command("ip link set mac0 up")?;
    // The device's number is in the namespace's own sysfs only.
    let words = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        "mount -t sysfs s /sys && cat /sys/class/net/mac0/tap*/dev",
    ];
    let number = host.command_words(words.map(String::from).to_vec())?;
    let (major, minor) = number.trim().split_once(':').context("macvtap has no device number")?;
    let node = scratch.join("macvtap");
    // Left over from an earlier start in the same folder, or absent.
    let _ = std::fs::remove_file(&node);
    mknod(
        &node,
        SFlag::S_IFCHR,
        Mode::S_IRUSR | Mode::S_IWUSR,
        makedev(major.parse()?, minor.parse()?),
    )
    .context("cannot make the macvtap's device node")?;
    let guest = host.run(move || kernel::open_macvtap(&node))??;
    Ok(Running { guest, children: Vec::new() })
}

fn start_daemon(
    host: &Namespace,
    words: &[String],
    scratch: &Path,
    ports: usize,
    plain_guest: bool,
) -> Result<Running> {
    let mut arguments = words.to_vec();
    let program = arguments.remove(0);
    let option = if plain_guest { ",offload=off" } else { "" };
    let map = format!("{VLAN}={TAP}{option}");
    arguments.extend(["--uplink".into(), UPLINK.into(), "--map".into(), map]);
    for extra in 1..ports {
        let map = format!("{}={}", usize::from(VLAN) + extra, other_tap(extra));
        arguments.extend(["--map".into(), map]);
    }
    let (child, log) = start_logged(host, "daemon", &program, &arguments, scratch)?;
    let mut running = Children(vec![child]);
    wait_for(&mut running, &log, "forwarding", || {
        Ok(std::fs::read_to_string(&log)?.lines().any(|line| line.starts_with("forwarding:")))
    })?;
    let guest = host.run(move || kernel::open_tap(TAP, !plain_guest))??;
    Ok(Running { guest, children: running.take() })
}

/// Waits until XDP takes what the guest sends, which it does once the far end takes it.
pub fn wait_for_xdp(host: &Namespace) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(10);
    while !host.command(&format!("ip link show {TAP}"))?.contains(" xdp ") {
        if Instant::now() > end {
            bail!("no XDP program on {TAP} after 10 s: see `vlanswitchctl port show {TAP}`");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// A program that is not vlanswitchd: gets a tap that is up and has no queue discipline, and
/// counts as ready once it listens on both devices.
fn start_foreign(host: &Namespace, words: &[String], scratch: &Path) -> Result<Running> {
    let guest = host.run(|| kernel::open_tap(TAP, true))??;
    host.command(&format!("ip link set {TAP} up"))?;
    host.command(&format!("tc qdisc replace dev {TAP} root noqueue"))?;
    let arguments: Vec<String> = words
        .iter()
        .skip(1)
        .map(|word| match word.as_str() {
            "{uplink}" => UPLINK.into(),
            "{tap}" => TAP.into(),
            "{vlan}" => VLAN.to_string(),
            other => other.into(),
        })
        .collect();
    let program = words.first().context("no program named")?;
    let (child, log) = start_logged(host, "daemon", program, &arguments, scratch)?;
    let mut running = Children(vec![child]);
    wait_for(&mut running, &log, "listening on uplink and tap", || {
        let sockets = host.run(|| std::fs::read_to_string("/proc/thread-self/net/packet"))??;
        // Fields: sk RefCnt Type Proto Iface R Rmem User Inode; R is 1 for a hooked socket.
        let mut devices: Vec<&str> = sockets
            .lines()
            .skip(1)
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .filter(|fields| fields.get(3).is_some_and(|protocol| *protocol == "0003"))
            .filter_map(|fields| fields.get(4).copied())
            .collect();
        devices.sort_unstable();
        devices.dedup();
        Ok(devices.len() >= 2)
    })?;
    Ok(Running { guest, children: running.take() })
}

/// Starts a program with its output in a log in `scratch`.
pub fn start_logged(
    host: &Namespace,
    name: &str,
    program: &str,
    arguments: &[String],
    scratch: &Path,
) -> Result<(Child, PathBuf)> {
    let log = scratch.join(format!("{name}.log"));
    let out = File::create(&log)?;
    let err = out.try_clone()?;
    let child = host.start(program, arguments, Stdio::from(out), Stdio::from(err))?;
    Ok((child, log))
}

/// Waits for a condition while the programs live.
pub fn wait_for(
    children: &mut Children,
    log: &Path,
    what: &str,
    mut ready: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let end = Instant::now() + START_DEADLINE;
    while !ready()? {
        let said = || std::fs::read_to_string(log).unwrap_or_default();
        for child in &mut children.0 {
            if let Some(status) = child.try_wait()? {
                bail!("it ended ({status}) instead of {what}; it said:\n{}", said());
            }
        }
        if Instant::now() > end {
            bail!("not {what} after {START_DEADLINE:?}; it said:\n{}", said());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// Children that are stopped if the start fails half-way.
pub struct Children(pub Vec<Child>);

impl Children {
    /// They live on.
    pub fn take(mut self) -> Vec<Child> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        stop(&mut self.0);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        stop(&mut self.children);
        remove_pins();
    }
}

/// What the kernel path leaves when its daemon ends, so that it goes on; its devices go with
/// the namespace.
fn remove_pins() {
    let folders = std::fs::read_dir("/sys/fs/bpf/vlanswitchd").into_iter().flatten().flatten();
    let ours = format!("{UPLINK}-");
    for folder in folders.filter(|folder| folder.file_name().to_string_lossy().starts_with(&ours)) {
        for pin in std::fs::read_dir(folder.path()).into_iter().flatten().flatten() {
            let _ = std::fs::remove_file(pin.path());
        }
        let _ = std::fs::remove_dir(folder.path());
    }
}

/// Ends programs: asks first, kills at the deadline.
fn stop(children: &mut [Child]) {
    for child in children.iter() {
        // It may have ended already.
        let _ = kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM);
    }
    let end = Instant::now() + STOP_DEADLINE;
    for child in children {
        while let Ok(None) = child.try_wait() {
            if Instant::now() > end {
                eprintln!("warning: process {} ignored SIGTERM and was killed", child.id());
                let _ = child.kill();
                let _ = child.wait();
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
