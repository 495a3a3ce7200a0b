//! The test bed: a daemon with ten ports, and a wire.
//!
//! ```text
//!  guest0 (hostile) tap0 |                          | far0: floods VLAN 101,
//!  guest1..9        tapN | host: vlanswitchd -- up0 |       sends polite frames back
//! ```

use crate::kernel;
use crate::namespace::Namespace;
use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use std::fs::File;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Polite guests.
pub const POLITE: usize = 9;
/// VLAN of the hostile guest; the polite ones follow.
pub const FIRST_VLAN: u16 = 101;
/// The wire's far end.
pub const FAR: &str = "far0";
/// The far end of a wire that no switch serves.
pub const ELSEWHERE: &str = "else1";

/// Everything of one measurement.
pub struct Bed {
    daemon: Child,
    log: tempfile::NamedTempFile,
    /// The hostile guest's descriptor.
    pub hostile: File,
    /// A guest's descriptor that leads to no switch.
    pub elsewhere: File,
    /// The polite guests' descriptors.
    pub polite: Vec<File>,
    /// Where the wire ends.
    pub far: Arc<Namespace>,
    _host: Namespace,
}

impl Bed {
    /// A fresh one; it forwards when this returns.
    pub fn new(command: &str) -> Result<Self> {
        let host = Namespace::new()?;
        let far = Namespace::new()?;
        for (near, distant) in [("up0", FAR), ("else0", ELSEWHERE)] {
            let id = far.id();
            host.command(&format!("ip link add {near} type veth peer name {distant} netns {id}"))?;
            host.command(&format!("ip link set {near} up"))?;
            far.command(&format!("ip link set {distant} up"))?;
        }
        let mut words = command.split_whitespace().map(str::to_owned);
        let program = words.next().context("--daemon: no program named")?;
        let mut arguments: Vec<String> = words.collect();
        let usual = ["--uplink", "up0", "--log-format", "json", "--control", "none"];
        arguments.extend(usual.map(str::to_owned));
        for number in 0..=POLITE {
            let vlan = usize::from(FIRST_VLAN) + number;
            arguments.extend(["--map".to_owned(), format!("{vlan}=tap{number}")]);
        }
        let log = tempfile::NamedTempFile::new()?;
        let (out, err) = (Stdio::from(log.reopen()?), Stdio::null());
        let mut daemon = host.start(&program, &arguments, out, err)?;
        wait_for_line(&mut daemon, &log, "forwarding: ")?;
        let elsewhere = host.run(|| kernel::open_tap("elsetap", true))??;
        host.command("ip link set elsetap up")?;
        let tap =
            |number: usize| host.run(move || kernel::open_tap(&format!("tap{number}"), true))?;
        let hostile = tap(0)?;
        let polite = (1..=POLITE).map(tap).collect::<Result<_>>()?;
        Ok(Self { daemon, log, hostile, elsewhere, polite, far: Arc::new(far), _host: host })
    }

    /// Stops the daemon; what it says it has dropped of polite frames, and on the uplink.
    pub fn stop(mut self) -> Result<Vec<String>> {
        kill(Pid::from_raw(self.daemon.id() as i32), Signal::SIGTERM)?;
        let status = self.daemon.wait()?;
        if !status.success() {
            bail!("the daemon ended with {status}");
        }
        let text = std::fs::read_to_string(self.log.path())?;
        let summary = text.lines().rev().find_map(|line| {
            let value: Value = serde_json::from_str(line).ok()?;
            (value.get("event")? == "summary").then_some(value)
        });
        let summary = summary.context("the daemon said no summary")?;
        let mut named = Vec::new();
        let mut look = |name: &str, flow: Option<&Value>| {
            for (reason, frames) in
                flow.and_then(|flow| flow.get("drops")?.as_object()).into_iter().flatten()
            {
                if frames.as_u64().unwrap_or(0) > 0 {
                    named.push(format!("{name} {reason} {frames}"));
                }
            }
        };
        look("uplink", summary.pointer("/uplink/from_wire"));
        for port in summary.get("ports").and_then(Value::as_array).into_iter().flatten().skip(1) {
            let name = port.get("name").and_then(Value::as_str).unwrap_or_default();
            look(&format!("{name} from its guest"), port.get("from_guest"));
            look(&format!("{name} to its guest"), port.get("to_guest"));
        }
        Ok(named)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // Ended already, unless something went wrong before.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn wait_for_line(daemon: &mut Child, log: &tempfile::NamedTempFile, start: &str) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(20);
    while !std::fs::read_to_string(log.path())?.lines().any(|line| line.starts_with(start)) {
        if let Some(status) = daemon.try_wait()? {
            bail!("the daemon ended with {status}");
        }
        if Instant::now() > end {
            bail!("the daemon does not forward");
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
