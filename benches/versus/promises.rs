//! What vlanswitchd promises about speed, and whether a run kept it.
//!
//! All promises are ratios within one run, so that they mean the same on any machine. The list
//! is the one place: the run's last lines and the table in docs/performance.md come from it.

use serde_json::Value;

use super::report::Results;
use super::statistics::Spread;
use super::workload::{Direction, Workload};

/// The columns the promises are about: the packet path, the kernel path, and the kernel path of
/// a guest without offloads.
const OURS: &str = "vlanswitchd";
const KERNEL: &str = "vlanswitchd-kernel";
const XDP: &str = "vlanswitchd-xdp";

/// What a figure is divided by.
#[derive(Clone, Copy, PartialEq)]
enum Base {
    /// Another column's figure of the same round.
    Datapath(&'static str),
    /// The same figure of another workload of the same round.
    Workload(Workload),
    /// Nothing: the figure is a share or an amount already.
    None,
}

/// One promise.
struct Promise {
    column: &'static str,
    text: &'static str,
    workload: Workload,
    figure: &'static str,
    base: Base,
    /// At least (`true`) or at most (`false`) this.
    at_least: bool,
    target: f64,
}

const MACVTAP: Base = Base::Datapath("macvtap");
const OVS: Base = Base::Datapath("ovs-userspace");
const TESTPMD: Base = Base::Datapath("dpdk-testpmd");
const BACK_TO_BACK: Workload =
    Workload::RoundTrip { pause: std::time::Duration::ZERO, half_load: false };

const fn flood(length: usize) -> Workload {
    Workload::Flood { direction: Direction::ToWire, length }
}

const fn tcp(direction: Direction) -> Workload {
    Workload::Tcp { direction, streams: 1 }
}

const fn ports(count: usize) -> Workload {
    Workload::Ports { count }
}

const fn search(length: usize) -> Workload {
    Workload::Throughput { direction: Direction::ToGuest, length }
}

const fn at_least(
    text: &'static str,
    (workload, figure): (Workload, &'static str),
    base: Base,
    target: f64,
) -> Promise {
    Promise { column: OURS, text, workload, figure, base, at_least: true, target }
}

const fn at_most(
    text: &'static str,
    (workload, figure): (Workload, &'static str),
    base: Base,
    target: f64,
) -> Promise {
    Promise { column: OURS, text, workload, figure, base, at_least: false, target }
}

/// The same of the kernel path.
const fn in_kernel(promise: Promise) -> Promise {
    Promise { column: KERNEL, ..promise }
}

const PROMISES: [Promise; 25] = [
    at_least("guest to wire, 60 bytes, to macvtap", (flood(60), "delivered_mpps"), MACVTAP, 1.0),
    at_least(
        "guest to wire, 1514 bytes, to macvtap",
        (flood(1514), "delivered_mpps"),
        MACVTAP,
        1.0,
    ),
    at_least(
        "wire to guest, 60 bytes, at most 0.1 % lost, to macvtap",
        (search(60), "lossless_mpps"),
        MACVTAP,
        0.5,
    ),
    at_least(
        "wire to guest at three times that load, to its own peak",
        (search(60), "share_of_peak_at_3x"),
        Base::None,
        0.9,
    ),
    at_least("TCP guest to wire, to macvtap", (tcp(Direction::ToWire), "gbit_per_s"), MACVTAP, 0.9),
    at_least(
        "TCP wire to guest, to macvtap",
        (tcp(Direction::ToGuest), "gbit_per_s"),
        MACVTAP,
        0.9,
    ),
    at_most("round trip, median, to macvtap", (BACK_TO_BACK, "p50_us"), MACVTAP, 1.4),
    at_most("round trip, 99 %, to macvtap", (BACK_TO_BACK, "p99_us"), MACVTAP, 2.0),
    at_least("guest to wire, 60 bytes, to Open vSwitch", (flood(60), "delivered_mpps"), OVS, 2.5),
    at_least(
        "TCP guest to wire, to Open vSwitch",
        (tcp(Direction::ToWire), "gbit_per_s"),
        OVS,
        1.4,
    ),
    at_least(
        "TCP wire to guest, to Open vSwitch",
        (tcp(Direction::ToGuest), "gbit_per_s"),
        OVS,
        1.4,
    ),
    at_most("round trip, median, to Open vSwitch", (BACK_TO_BACK, "p50_us"), OVS, 0.5),
    at_least(
        "guest to wire, 60 bytes, to DPDK testpmd",
        (flood(60), "delivered_mpps"),
        TESTPMD,
        1.2,
    ),
    at_least(
        "guest to wire beside 999 silent ports, to that of one port",
        (ports(1000), "to_wire_mpps"),
        Base::Workload(ports(1)),
        0.95,
    ),
    at_least(
        "wire to guest beside 999 silent ports, to that of one port",
        (ports(1000), "to_guest_mpps"),
        Base::Workload(ports(1)),
        0.95,
    ),
    at_most(
        "processors that 1000 silent ports take",
        (ports(1000), "idle_own_cpus"),
        Base::None,
        0.01,
    ),
    at_most(
        "from nothing to 1000 ports forwarding, in milliseconds",
        (ports(1000), "start_ms"),
        Base::None,
        3000.0,
    ),
    at_most(
        "memory of each of 1000 ports, beside 32 MiB in all, in MiB",
        (ports(1000), "resident_mib_per_port"),
        Base::None,
        4.5,
    ),
    in_kernel(at_least(
        "kernel path, guest to wire, 60 bytes, to macvtap",
        (flood(60), "delivered_mpps"),
        MACVTAP,
        1.0,
    )),
    in_kernel(at_least(
        "kernel path, wire to guest, 60 bytes with the tag in the frame, to macvtap",
        (search(60), "lossless_mpps"),
        MACVTAP,
        0.8,
    )),
    in_kernel(at_least(
        "kernel path, TCP guest to wire, to macvtap",
        (tcp(Direction::ToWire), "gbit_per_s"),
        MACVTAP,
        1.0,
    )),
    in_kernel(at_least(
        "kernel path, TCP wire to guest, to macvtap",
        (tcp(Direction::ToGuest), "gbit_per_s"),
        MACVTAP,
        1.0,
    )),
    in_kernel(at_most(
        "kernel path, round trip, median, to macvtap",
        (BACK_TO_BACK, "p50_us"),
        MACVTAP,
        1.0,
    )),
    in_kernel(at_least(
        "kernel path, guest to wire, 1514 bytes, to macvtap",
        (flood(1514), "delivered_mpps"),
        MACVTAP,
        1.0,
    )),
    Promise {
        column: XDP,
        ..at_least(
            "kernel path, offload=off, guest to wire, 60 bytes, to macvtap",
            (flood(60), "delivered_mpps"),
            MACVTAP,
            1.8,
        )
    },
];

impl Promise {
    fn measured(&self, results: &Results) -> Option<Spread> {
        match self.base {
            Base::Datapath(base) => results.ratio(self.workload, self.column, base, self.figure),
            Base::Workload(other) => {
                results.ratio_within(self.column, self.workload, other, self.figure)
            }
            Base::None => results.spread(&self.workload.name(), self.column, self.figure),
        }
    }

    fn kept(&self, value: f64) -> bool {
        if self.at_least { value >= self.target } else { value <= self.target }
    }

    fn sign(&self) -> &'static str {
        if self.at_least { "at least" } else { "at most" }
    }
}

/// Which promises a run kept, for the terminal; empty if it measured none of them.
pub fn verdicts(results: &Results) -> String {
    let mut text = String::new();
    for promise in &PROMISES {
        if let Some(value) = promise.measured(results) {
            let verdict = if promise.kept(value.median) { "kept  " } else { "BROKEN" };
            text.push_str(&format!(
                "{verdict} {}: {:.2} ({:.2}..{:.2}), {} {}\n",
                promise.text,
                value.median,
                value.least,
                value.greatest,
                promise.sign(),
                promise.target
            ));
        }
    }
    text
}

/// The table of docs/performance.md.
pub fn markdown(report: &Value, results: &Results) -> String {
    let run = |name: &str| {
        report.pointer(&format!("/run/{name}")).map_or_else(String::new, |value| match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        })
    };
    let mut text = format!(
        "Measured {}: {}, {} processors, Linux {}, commit {}; {} rounds of {} s windows{}.\n\n",
        date(&run("began_unix_seconds")),
        run("machine/processor"),
        run("machine/processors"),
        run("machine/kernel"),
        run("machine/commit"),
        run("rounds"),
        run("window_seconds"),
        if results.disturbed() > 0 {
            " (**disturbed by other work: not to be quoted**)"
        } else {
            ""
        },
    );
    text.push_str("| promise | workload | target | measured (rounds) | |\n|---|---|---|---|---|\n");
    for promise in &PROMISES {
        let (measured, verdict) = match promise.measured(results) {
            None => ("not measured".into(), ""),
            Some(value) => (
                format!("{:.2} ({:.2}..{:.2})", value.median, value.least, value.greatest),
                if promise.kept(value.median) { "kept" } else { "**broken**" },
            ),
        };
        text.push_str(&format!(
            "| {} | `{}` | {} {} | {measured} | {verdict} |\n",
            promise.text,
            promise.workload.name(),
            promise.sign(),
            promise.target
        ));
    }
    text
}

/// Day of a time in seconds since 1970, or those seconds if the system has no `date`.
fn date(seconds: &str) -> String {
    let output = std::process::Command::new("date")
        .args(["-u", "+%F", "-d", &format!("@{seconds}")])
        .output();
    match output {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        }
        _ => format!("at second {seconds} since 1970"),
    }
}
