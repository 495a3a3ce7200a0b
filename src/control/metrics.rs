//! Counters and states as metrics for Prometheus.
//!
//! One table, [`METRICS`], holds name, type, labels, help and where the values come
//! from; docs/metrics.md is compared with it by a test. Names are stable: what is
//! here stays and keeps its meaning.
//!
//! The numbers are those of the control socket, taken at the moment of the scrape; a
//! text that took long to write is given again for a while (`daemon::scraped`).
//! Every drop reason that can occur in a flow is shown from the start, at zero: a
//! series that appears with its first value hides that value from `rate()`.
//! VLANs nobody mapped are what the wire makes them, up to 16380 of them, so only the
//! [`UNMAPPED_MAX`] with the most frames have a series each; the sum holds all.

use crate::control::api::{Flow, Port, Stats, Status, Unmapped};
use crate::control::fallback::Fallback;
use crate::switch::DropReason;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::{Registry, Unit};
use std::fmt::{self, Write as _};

/// What all names begin with.
const PREFIX: &str = "vlanswitchd";
/// VLANs nobody mapped that have a series of their own.
const UNMAPPED_MAX: usize = 64;
/// The states of a port.
const PORT_STATES: [&str; 4] = ["absent", "down", "no_carrier", "attached"];
/// The states of the uplink.
const UPLINK_STATES: [&str; 4] = ["absent", "down", "no_carrier", "up"];

/// The reasons a guest's frames may be dropped for.
const FROM_GUEST: [DropReason; 14] = [
    DropReason::UnmappedVlan,
    DropReason::TaggedOnAccess,
    DropReason::UntaggedOnTrunk,
    DropReason::VlanNotAllowed,
    DropReason::SpoofedMac,
    DropReason::RateLimited,
    DropReason::StormLimited,
    DropReason::TooLong,
    DropReason::Malformed,
    DropReason::BadOffload,
    DropReason::UplinkDown,
    DropReason::UplinkQueueFull,
    DropReason::RingOverrun,
    DropReason::SendFailed,
];
/// The reasons frames for a guest may be dropped for.
const TO_GUEST: [DropReason; 7] = [
    DropReason::InnerTag,
    DropReason::TooLong,
    DropReason::Malformed,
    DropReason::BadOffload,
    DropReason::GuestQueueFull,
    DropReason::GuestAbsent,
    DropReason::SendFailed,
];
/// The reasons frames from the wire may be dropped for before they have a port.
const FROM_WIRE: [DropReason; 3] =
    [DropReason::UnmappedVlan, DropReason::Malformed, DropReason::RingOverrun];

/// The type of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows; its name ends in `_total`.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Always 1, for its labels; its name ends in `_info`.
    Info,
}

impl Kind {
    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Info => "info",
        }
    }
}

/// A metric.
#[derive(Debug)]
pub struct Metric {
    name: &'static str,
    unit: Option<&'static str>,
    /// Its type.
    pub kind: Kind,
    /// Its labels.
    pub labels: &'static [&'static str],
    /// What it tells.
    pub help: &'static str,
    read: fn(&Snapshot, &mut Series<'_>) -> fmt::Result,
}

impl Metric {
    /// The name its samples have.
    pub fn name(&self) -> String {
        let unit = self.unit.map(|unit| format!("_{unit}")).unwrap_or_default();
        let suffix = match self.kind {
            Kind::Counter => "_total",
            Kind::Gauge => "",
            Kind::Info => "_info",
        };
        format!("{PREFIX}_{}{unit}{suffix}", self.name)
    }
}

/// What the values are read from.
#[derive(Debug)]
struct Snapshot(Status, Stats);

/// Where a metric's samples go.
struct Series<'e> {
    metric: &'static Metric,
    encoder: MetricEncoder<'e>,
}

impl Series<'_> {
    /// Adds a sample, with the values of the metric's labels.
    fn put<const LABELS: usize>(&mut self, labels: [&str; LABELS], value: f64) -> fmt::Result {
        let labels: Vec<(&str, &str)> = self.metric.labels.iter().copied().zip(labels).collect();
        match self.metric.kind {
            Kind::Info => self.encoder.encode_info(&labels),
            // A family of one has no braces.
            _ if labels.is_empty() => self.encoder.encode_gauge(&value),
            _ => self.encoder.encode_family(&labels)?.encode_gauge(&value),
        }
    }

    /// Adds a sample of a counter.
    fn count<const LABELS: usize>(&mut self, labels: [&str; LABELS], value: u64) -> fmt::Result {
        const NO_EXEMPLAR: Option<&Exemplar<NoLabelSet, f64>> = None;
        let labels: Vec<(&str, &str)> = self.metric.labels.iter().copied().zip(labels).collect();
        if labels.is_empty() {
            return self.encoder.encode_counter(&value, NO_EXEMPLAR);
        }
        self.encoder.encode_family(&labels)?.encode_counter(&value, NO_EXEMPLAR)
    }

    /// Adds a number of each port.
    fn ports(&mut self, of: &Snapshot, number: fn(&Port) -> f64) -> fmt::Result {
        of.1.ports.iter().try_for_each(|port| self.put([&port.name], number(port)))
    }

    /// Adds a count of each port and direction.
    fn flows(&mut self, of: &Snapshot, number: fn(&Flow) -> u64) -> fmt::Result {
        of.1.ports.iter().try_for_each(|port| {
            self.count([&port.name, "from_guest"], number(&port.from_guest))?;
            self.count([&port.name, "to_guest"], number(&port.to_guest))
        })
    }

    /// Adds a count of the uplink's.
    fn uplink(&mut self, of: &Snapshot, number: u64) -> fmt::Result {
        self.count([&of.1.uplink.name], number)
    }

    /// Adds one sample for each state there is, 1 for that it is in.
    fn state(&mut self, device: &str, states: &[&str], now: &str) -> fmt::Result {
        states
            .iter()
            .try_for_each(|state| self.put([device, state], f64::from(u8::from(*state == now))))
    }
}

/// The drops of a flow: those that can occur, and whatever did.
fn drops<'f>(flow: &'f Flow, usual: &[DropReason]) -> Vec<(&'f str, u64)> {
    let counted = |reason: &str| flow.drops.get(reason).copied().unwrap_or_default();
    let mut rows: Vec<(&str, u64)> =
        usual.iter().map(|reason| (reason.name(), counted(reason.name()))).collect();
    let others = flow.drops.iter().filter(|(name, _)| !usual.iter().any(|it| it.name() == *name));
    rows.extend(others.map(|(name, frames)| (name.as_str(), *frames)));
    rows
}

/// The VLANs nobody mapped that have the most frames.
fn loudest(unmapped: &[Unmapped]) -> Vec<&Unmapped> {
    let mut rows: Vec<&Unmapped> = unmapped.iter().collect();
    rows.sort_by_key(|row| (std::cmp::Reverse(row.frames), &row.tpid, row.vid));
    rows.truncate(UNMAPPED_MAX);
    rows
}

fn seconds(milliseconds: u64) -> f64 {
    milliseconds as f64 / 1000.0
}

const PORT: &[&str] = &["port"];
const FLOW: &[&str] = &["port", "direction"];
const DEVICE: &[&str] = &["device"];

/// A row without a unit.
const fn row(
    kind: Kind,
    name: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
    read: fn(&Snapshot, &mut Series<'_>) -> fmt::Result,
) -> Metric {
    Metric { name, unit: None, kind, labels, help, read }
}

impl Metric {
    const fn in_unit(self, unit: &'static str) -> Self {
        Self { unit: Some(unit), ..self }
    }
}

use Kind::{Counter, Gauge, Info};

/// All metrics there are.
pub static METRICS: [Metric; 37] = [
    row(Info, "build", &["version"], "Version of vlanswitchd.", |of, to| {
        to.put([&of.0.version], 1.0)
    }),
    row(Gauge, "start_time", &[], "When vlanswitchd started, in Unix time.", |of, to| {
        to.put([], seconds(of.0.started))
    })
    .in_unit("seconds"),
    row(
        Info,
        "uplink",
        &["device", "datapath"],
        "The uplink, and what moves its frames: packet or kernel.",
        |of, to| to.put([&of.1.uplink.name, &of.0.datapath], 1.0),
    ),
    row(
        Gauge,
        "uplink_state",
        &["device", "state"],
        "1 for the state the uplink is in: absent, down, no_carrier or up.",
        |of, to| to.state(&of.1.uplink.name, &UPLINK_STATES, &of.1.uplink.state),
    ),
    row(
        Gauge,
        "uplink_state_change_time",
        DEVICE,
        "Since when the uplink is in its state, in Unix time.",
        |of, to| to.put([&of.1.uplink.name], seconds(of.1.uplink.since)),
    )
    .in_unit("seconds"),
    row(Gauge, "uplink_mtu", DEVICE, "MTU of the uplink, while it is there.", |of, to| {
        match of.1.uplink.mtu {
            Some(mtu) => to.put([&of.1.uplink.name], f64::from(mtu)),
            None => Ok(()),
        }
    })
    .in_unit("bytes"),
    row(
        Gauge,
        "uplink_mtu_needed",
        DEVICE,
        "The uplink MTU that guests with an MTU of 1500 need behind the configured tags.",
        |of, to| to.put([&of.1.uplink.name], f64::from(of.1.uplink.mtu_needed)),
    )
    .in_unit("bytes"),
    row(
        Counter,
        "uplink_in_frames",
        DEVICE,
        "Frames of mapped VLANs that came in from the wire.",
        |of, to| to.uplink(of, of.1.uplink.from_wire.in_frames),
    ),
    row(
        Counter,
        "uplink_in",
        DEVICE,
        "Bytes of mapped VLANs that came in from the wire, with all tags.",
        |of, to| to.uplink(of, of.1.uplink.from_wire.in_bytes),
    )
    .in_unit("bytes"),
    row(
        Counter,
        "uplink_out_frames",
        DEVICE,
        "Frames from the wire that were handed to a port.",
        |of, to| to.uplink(of, of.1.uplink.from_wire.out_frames),
    ),
    row(
        Counter,
        "uplink_out",
        DEVICE,
        "Bytes from the wire that were handed to a port, with all tags.",
        |of, to| to.uplink(of, of.1.uplink.from_wire.out_bytes),
    )
    .in_unit("bytes"),
    row(
        Counter,
        "uplink_dropped_frames",
        &["device", "reason"],
        "Frames from the wire that were dropped before they had a port.",
        |of, to| {
            let uplink = &of.1.uplink;
            drops(&uplink.from_wire, &FROM_WIRE)
                .into_iter()
                .try_for_each(|(reason, frames)| to.count([&uplink.name, reason], frames))
        },
    ),
    row(
        Counter,
        "uplink_sent_frames",
        DEVICE,
        "Frames sent to the wire, the sum over all ports, those removed meanwhile included.",
        |of, to| to.uplink(of, of.1.uplink.to_wire.out_frames),
    ),
    row(Counter, "uplink_sent", DEVICE, "Bytes sent to the wire, with all tags.", |of, to| {
        to.uplink(of, of.1.uplink.to_wire.out_bytes)
    })
    .in_unit("bytes"),
    row(
        Counter,
        "uplink_unsent_frames",
        DEVICE,
        "Frames that the uplink's device or its qdisc dropped of all that the host gave it.",
        |of, to| to.uplink(of, of.1.uplink.unsent),
    ),
    row(
        Gauge,
        "uplink_ring_peak",
        DEVICE,
        "The highest fill of the uplink's receive ring over the last second, 0 to 1.",
        |of, to| to.put([&of.1.uplink.name], of.1.uplink.ring_peak),
    )
    .in_unit("ratio"),
    row(
        Counter,
        "unmapped_frames",
        &[],
        "Tagged frames on the uplink that no port claims, left to the host.",
        |of, to| to.count([], of.1.unmapped.iter().map(|row| row.frames).sum()),
    ),
    row(
        Gauge,
        "unmapped_vlans",
        &[],
        "How many VLANs such frames belong to, since the start.",
        |of, to| to.put([], of.1.unmapped.len() as f64),
    ),
    row(
        Counter,
        "unmapped_vlan_frames",
        &["tpid", "vid"],
        "Such frames by VLAN, of the 64 VLANs with the most.",
        |of, to| {
            loudest(&of.1.unmapped)
                .into_iter()
                .try_for_each(|row| to.count([&row.tpid, &row.vid.to_string()], row.frames))
        },
    ),
    row(
        Info,
        "port",
        &["port", "vlans", "mode", "datapath"],
        "A port's VLANs and mode, and what moves its frames.",
        |of, to| {
            of.1.ports.iter().try_for_each(|port| {
                to.put([&port.name, &port.vlans, &port.mode, &port.datapath], 1.0)
            })
        },
    ),
    row(
        Gauge,
        "port_state",
        &["port", "state"],
        "1 for the state the port is in: absent, down, no_carrier or attached.",
        |of, to| {
            let mut ports = of.1.ports.iter();
            ports.try_for_each(|port| to.state(&port.name, &PORT_STATES, &port.state))
        },
    ),
    row(
        Gauge,
        "port_state_change_time",
        PORT,
        "Since when the port is in its state, in Unix time.",
        |of, to| to.ports(of, |port| seconds(port.since)),
    )
    .in_unit("seconds"),
    row(Gauge, "port_mtu", PORT, "MTU of the port's device, while it is there.", |of, to| {
        let mut there = of.1.ports.iter().filter_map(|port| Some((&port.name, port.mtu?)));
        there.try_for_each(|(name, mtu)| to.put([name], f64::from(mtu)))
    })
    .in_unit("bytes"),
    row(Counter, "port_in_frames", FLOW, "Frames that came in.", |of, to| {
        to.flows(of, |flow| flow.in_frames)
    }),
    row(Counter, "port_in", FLOW, "Bytes that came in, with all tags.", |of, to| {
        to.flows(of, |flow| flow.in_bytes)
    })
    .in_unit("bytes"),
    row(
        Counter,
        "port_split_frames",
        FLOW,
        "Frames that segmentation in userspace added.",
        |of, to| to.flows(of, |flow| flow.split_frames),
    ),
    row(
        Counter,
        "port_out_frames",
        FLOW,
        "Frames that went out: in + split = out + dropped, always.",
        |of, to| to.flows(of, |flow| flow.out_frames),
    ),
    row(Counter, "port_out", FLOW, "Bytes that went out, with all tags.", |of, to| {
        to.flows(of, |flow| flow.out_bytes)
    })
    .in_unit("bytes"),
    row(
        Counter,
        "port_dropped_frames",
        &["port", "direction", "reason"],
        "Frames that were dropped; vlanswitchd_drop_reason_info tells what a reason means.",
        |of, to| {
            of.1.ports.iter().try_for_each(|port| {
                let from = drops(&port.from_guest, &FROM_GUEST).into_iter();
                let from = from.map(|(reason, frames)| ("from_guest", reason, frames));
                let to_guest = drops(&port.to_guest, &TO_GUEST).into_iter();
                let to_guest = to_guest.map(|(reason, frames)| ("to_guest", reason, frames));
                from.chain(to_guest).try_for_each(|(direction, reason, frames)| {
                    to.count([&port.name, direction, reason], frames)
                })
            })
        },
    ),
    row(
        Gauge,
        "port_ring_peak",
        PORT,
        "The highest fill of the port's receive ring over the last second, 0 to 1.",
        |of, to| to.ports(of, |port| port.ring_peak),
    )
    .in_unit("ratio"),
    row(
        Info,
        "drop_reason",
        &["reason", "help"],
        "What a drop reason means, and what to do.",
        |_, to| {
            let mut reasons = DropReason::ALL.into_iter();
            reasons.try_for_each(|reason| to.put([reason.name(), reason.help()], 1.0))
        },
    ),
    row(
        Gauge,
        "worker_load",
        &["worker"],
        "The share of the last second in which the worker moved frames, 0 to 1.",
        |of, to| {
            let mut workers = of.1.workers.iter().enumerate();
            workers.try_for_each(|(number, worker)| to.put([&number.to_string()], worker.load))
        },
    )
    .in_unit("ratio"),
    row(
        Gauge,
        "kernel_segments",
        &["frames"],
        "1 if this kernel segments such super-frames, 0 if userspace does: tagged, or udp.",
        |of, to| {
            to.put(["tagged"], f64::from(u8::from(of.0.kernel_segments_tagged)))?;
            to.put(["udp"], f64::from(u8::from(of.0.kernel_segments_udp)))
        },
    ),
    row(
        Gauge,
        "fallback",
        &["name"],
        "1 if this is done in another way because the kernel lacks a feature, by what takes its place.",
        |of, to| {
            let used = |name| of.0.fallbacks.iter().any(|used| used == name);
            let mut all = Fallback::ALL.into_iter().map(Fallback::name);
            all.try_for_each(|name| to.put([name], f64::from(u8::from(used(name)))))
        },
    ),
    row(Gauge, "control_clients", &[], "Connections to the sockets of vlanswitchd.", |of, to| {
        to.put([], of.0.clients as f64)
    }),
    row(Gauge, "captures", &[], "Captures under way.", |of, to| to.put([], of.0.captures as f64)),
    row(
        Counter,
        "netlink_overruns",
        &[],
        "Times netlink lost news of devices, and they were listed anew.",
        |of, to| to.count([], of.0.netlink_overruns),
    ),
];

impl Collector for Snapshot {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        METRICS.iter().try_for_each(|metric| {
            let unit = metric.unit.map(|unit| Unit::Other(unit.to_owned()));
            let kind = match metric.kind {
                Counter => MetricType::Counter,
                Gauge => MetricType::Gauge,
                Info => MetricType::Info,
            };
            let encoder =
                encoder.encode_descriptor(metric.name, metric.help, unit.as_ref(), kind)?;
            (metric.read)(self, &mut Series { metric, encoder })
        })
    }
}

/// All metrics, as OpenMetrics 1.0.
pub fn render(status: &Status, stats: &Stats) -> String {
    let mut registry = Registry::with_prefix(PREFIX);
    registry.register_collector(Box::new(Snapshot(status.clone(), stats.clone())));
    let mut text = String::new();
    // Writing to a string does not fail, nor does anything above.
    let _ = encode(&mut text, &registry);
    text
}

/// The same in Prometheus' older text format (0.0.4), which most tools read that do
/// not ask for OpenMetrics: there a metric is described under the name of its samples.
pub fn to_text_format(open_metrics: &str) -> String {
    let mut text = String::with_capacity(open_metrics.len());
    let mut help = "";
    for line in open_metrics.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(_), words) => help = words.unwrap_or_default(),
            (Some("#"), Some("TYPE"), Some(name), Some(kind)) => {
                let (suffix, kind) = match kind {
                    "counter" => ("_total", kind),
                    "info" => ("_info", "gauge"),
                    _ => ("", kind),
                };
                let _ = writeln!(text, "# HELP {name}{suffix} {help}");
                let _ = writeln!(text, "# TYPE {name}{suffix} {kind}");
            }
            (Some("#"), ..) => {}
            _ => {
                text.push_str(line);
                text.push('\n');
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;
    use crate::control::api::{Sent, Uplink, Worker};
    use std::collections::BTreeMap;

    fn port(name: &str) -> Port {
        let flow = Flow {
            in_frames: 10,
            in_bytes: 640,
            split_frames: 2,
            out_frames: 9,
            out_bytes: 600,
            drops: BTreeMap::from([("too_long".to_owned(), 3)]),
            send_error: None,
        };
        Port {
            name: name.to_owned(),
            vlans: "101".to_owned(),
            mode: "tunnel".to_owned(),
            map: format!("101={name}"),
            options: BTreeMap::new(),
            state: "no_carrier".to_owned(),
            since: 1_700_000_000_500,
            ifindex: Some(3),
            mtu: Some(65521),
            datapath: "packet".to_owned(),
            datapath_reason: None,
            worker: Some(0),
            ring_peak: 0.25,
            from_guest: flow.clone(),
            to_guest: flow,
        }
    }

    fn sample(ports: Vec<Port>, unmapped: Vec<Unmapped>) -> String {
        let status = Status {
            version: "1.2.3".to_owned(),
            pid: 1,
            started: 1_700_000_000_000,
            uplink: "eth0".to_owned(),
            uplink_state: "up".to_owned(),
            datapath: "packet".to_owned(),
            datapath_reason: None,
            ports: BTreeMap::new(),
            workers: vec![],
            config_file: None,
            clients: 1,
            captures: 0,
            kernel_segments_tagged: true,
            kernel_segments_udp: false,
            fallbacks: vec!["udp_segmentation".to_owned()],
            netlink_overruns: 4,
        };
        let stats = Stats {
            time: 0,
            uplink: Uplink {
                name: "eth0".to_owned(),
                state: "up".to_owned(),
                since: 0,
                ifindex: Some(2),
                mtu: None,
                mtu_needed: 1504,
                ring_peak: 0.0,
                from_wire: Flow::default(),
                to_wire: Sent::default(),
                unsent: 0,
            },
            ports,
            removed: None,
            unmapped,
            workers: vec![Worker { load: 0.5, ..Worker::default() }],
        };
        render(&status, &stats)
    }

    fn value<'t>(text: &'t str, series: &str) -> Option<&'t str> {
        text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))
    }

    #[test]
    fn counters_are_where_they_belong() {
        let text = sample(vec![port("tap-web1")], vec![]);
        let flow = r#"{port="tap-web1",direction="to_guest"}"#;
        for (series, expected) in [
            (format!("vlanswitchd_port_in_frames_total{flow}"), "10"),
            (format!("vlanswitchd_port_in_bytes_total{flow}"), "640"),
            (format!("vlanswitchd_port_split_frames_total{flow}"), "2"),
            (format!("vlanswitchd_port_out_frames_total{flow}"), "9"),
            (
                r#"vlanswitchd_port_dropped_frames_total{port="tap-web1",direction="to_guest",reason="too_long"}"#
                    .to_owned(),
                "3",
            ),
            (
                r#"vlanswitchd_port_dropped_frames_total{port="tap-web1",direction="to_guest",reason="guest_absent"}"#
                    .to_owned(),
                "0",
            ),
            (r#"vlanswitchd_port_state{port="tap-web1",state="no_carrier"}"#.to_owned(), "1.0"),
            (r#"vlanswitchd_port_state{port="tap-web1",state="attached"}"#.to_owned(), "0.0"),
            (r#"vlanswitchd_build_info{version="1.2.3"}"#.to_owned(), "1"),
            (r#"vlanswitchd_worker_load_ratio{worker="0"}"#.to_owned(), "0.5"),
            ("vlanswitchd_netlink_overruns_total".to_owned(), "4"),
        ] {
            assert_eq!(value(&text, &series), Some(expected), "{series} in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn a_reason_nobody_thought_of_is_shown_all_the_same() {
        let mut odd = port("t");
        odd.to_guest.drops.insert("uplink_down".to_owned(), 7);
        let text = sample(vec![odd], vec![]);
        let series = r#"vlanswitchd_port_dropped_frames_total{port="t",direction="to_guest",reason="uplink_down"}"#;
        assert_eq!(value(&text, series), Some("7"));
    }

    #[test]
    fn the_wire_cannot_make_series_without_end() {
        let row = |number: u64| Unmapped {
            tpid: "0x8100".to_owned(),
            vid: number as u16,
            frames: number,
        };
        let text = sample(vec![], (1..=4094).map(row).collect());
        let shown: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("vlanswitchd_unmapped_vlan_frames_total"))
            .collect();
        assert_eq!(shown.len(), UNMAPPED_MAX);
        assert!(shown.iter().all(|line| !line.contains(r#"vid="4030""#)));
        assert!(shown.iter().any(|line| line.contains(r#"vid="4031"} 4031"#)));
        assert_eq!(value(&text, "vlanswitchd_unmapped_vlans"), Some("4094.0"));
        assert_eq!(value(&text, "vlanswitchd_unmapped_frames_total"), Some("8382465"));
    }

    #[test]
    fn a_name_with_a_quote_in_it_breaks_nothing() {
        let text = sample(vec![port("a\"b\\c")], vec![]);
        assert!(text.contains(r#"{port="a\"b\\c",direction="to_guest"}"#), "{text}");
    }

    #[test]
    fn the_older_format_describes_each_name_it_has() {
        let text = to_text_format(&sample(vec![port("t")], vec![]));
        let described: Vec<&str> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next())
            .collect();
        let names: Vec<String> = METRICS.iter().map(Metric::name).collect();
        assert_eq!(described, names);
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split(['{', ' ']).next().unwrap();
            assert!(described.contains(&name), "{line}");
        }
        assert!(!text.contains("# EOF") && !text.contains("# UNIT"));
    }
}
