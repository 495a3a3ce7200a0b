//! The control interface's values: what `dist/org.vlanswitchd.varlink` describes,
//! for the daemon to send and for `vlanswitchctl` to read. That file is their
//! documentation; a test holds the two together.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Name of the interface.
pub const INTERFACE: &str = "org.vlanswitchd";
/// The interface file.
pub const DESCRIPTION: &str = include_str!("../../dist/org.vlanswitchd.varlink");
/// Where the control socket is, unless told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/vlanswitchd/control";

/// One direction of a port, or what the uplink receives:
/// `in_frames + split_frames = out_frames + the sum of drops`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flow {
    /// Frames that came in, those the kernel's ring had no room for included.
    pub in_frames: u64,
    /// Bytes that came in, tags included.
    pub in_bytes: u64,
    /// Frames that segmentation in userspace added.
    pub split_frames: u64,
    /// Frames that went out.
    pub out_frames: u64,
    /// Bytes that went out, tags included.
    pub out_bytes: u64,
    /// Drops by reason, those that occurred.
    pub drops: BTreeMap<String, u64>,
    /// The kernel's last answer counted as `send_failed`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub send_error: Option<String>,
}

impl Flow {
    /// All drops.
    pub fn dropped(&self) -> u64 {
        self.drops.values().fold(0, |sum, frames| sum.saturating_add(*frames))
    }

    /// Counts another flow's frames too.
    pub fn add(&mut self, other: Self) {
        self.in_frames += other.in_frames;
        self.in_bytes += other.in_bytes;
        self.split_frames += other.split_frames;
        self.out_frames += other.out_frames;
        self.out_bytes += other.out_bytes;
        for (reason, frames) in other.drops {
            *self.drops.entry(reason).or_default() += frames;
        }
    }
}

/// Frames that went out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// Frames.
    pub out_frames: u64,
    /// Bytes, tags included.
    pub out_bytes: u64,
}

/// A port.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Port {
    /// Name of the device.
    pub name: String,
    /// Its VLANs, as in the map.
    pub vlans: String,
    /// Its mode.
    pub mode: String,
    /// All of its configuration, as `--map` takes it.
    pub map: String,
    /// The options that differ from their defaults.
    pub options: BTreeMap<String, String>,
    /// `absent`, `down`, `no_carrier` or `attached`.
    pub state: String,
    /// Since when it is in that state, in milliseconds since 1970.
    pub since: u64,
    /// Interface index, while the device is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ifindex: Option<u32>,
    /// MTU in bytes, while the device is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// What moves its frames: `kernel` or `packet`.
    pub datapath: String,
    /// Why the packet path does, where there is a kernel path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datapath_reason: Option<String>,
    /// The number of its worker, on the packet path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<u32>,
    /// The highest fill of its receive ring over the last second, 0 to 1.
    pub ring_peak: f64,
    /// Guest to uplink.
    pub from_guest: Flow,
    /// Uplink to guest.
    pub to_guest: Flow,
}

/// The counters of ports that were removed, in all: what the uplink's counters hold
/// and no port's do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// Guest to uplink.
    pub from_guest: Flow,
    /// Uplink to guest.
    pub to_guest: Flow,
}

/// The uplink.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Uplink {
    /// Name of the device.
    pub name: String,
    /// `absent`, `down`, `no_carrier` or `up`.
    pub state: String,
    /// Since when it is in that state, in milliseconds since 1970.
    pub since: u64,
    /// Interface index, while the device is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ifindex: Option<u32>,
    /// MTU in bytes, while the device is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// The MTU guests with an MTU of 1500 need behind the configured tags.
    pub mtu_needed: u32,
    /// The highest fill of its receive ring over the last second, 0 to 1.
    pub ring_peak: f64,
    /// Frames from the wire; "out" is "handed to a port".
    pub from_wire: Flow,
    /// Frames sent, the sum over all ports.
    pub to_wire: Sent,
    /// Frames that the device or its queueing discipline dropped of all the host gave it.
    #[serde(default)]
    pub unsent: u64,
}

/// Tagged frames of one VLAN that no port claims.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unmapped {
    /// TPID of the outer tag, as `0x8100`.
    pub tpid: String,
    /// VID of the outer tag.
    pub vid: u16,
    /// Frames seen.
    pub frames: u64,
}

/// A thread that moves frames.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Worker {
    /// The share of the last second it was moving frames, 0 to 1.
    pub load: f64,
    /// Whether it does not answer: no frame is moved.
    #[serde(default)]
    pub stuck: bool,
    /// How many ports it has.
    #[serde(default)]
    pub ports: u64,
    /// The CPU it is bound to, if to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<u32>,
}

/// The switch as a whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Version of vlanswitchd.
    pub version: String,
    /// Process id.
    pub pid: u32,
    /// When it started, in milliseconds since 1970.
    pub started: u64,
    /// Name of the uplink.
    pub uplink: String,
    /// State of the uplink.
    pub uplink_state: String,
    /// What moves frames: `kernel`, `packet`, or both.
    pub datapath: String,
    /// Why there is no kernel path, if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datapath_reason: Option<String>,
    /// How many ports there are, by state.
    pub ports: BTreeMap<String, u64>,
    /// The workers.
    pub workers: Vec<Worker>,
    /// The file it was configured from, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_file: Option<String>,
    /// Connections to the control socket.
    pub clients: u64,
    /// Captures under way.
    pub captures: u64,
    /// Whether the kernel segments tagged super-frames.
    pub kernel_segments_tagged: bool,
    /// Whether the kernel takes UDP super-frames.
    pub kernel_segments_udp: bool,
    /// What is done in another way because this kernel lacks a feature, by the names of
    /// [`Fallback`](super::fallback::Fallback).
    #[serde(default)]
    pub fallbacks: Vec<String>,
    /// Times netlink lost news and the devices were listed anew.
    pub netlink_overruns: u64,
}

/// All counters, at one moment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stats {
    /// When they were read, in milliseconds since 1970.
    pub time: u64,
    /// The uplink.
    pub uplink: Uplink,
    /// The ports, in the order of the configuration.
    pub ports: Vec<Port>,
    /// Ports removed meanwhile, if there were any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removed: Option<Removed>,
    /// VLANs nobody mapped.
    pub unmapped: Vec<Unmapped>,
    /// The workers.
    pub workers: Vec<Worker>,
}

/// Frames dropped for one reason in one flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drop {
    /// The port's device, or the uplink's.
    pub device: String,
    /// `from_guest`, `to_guest` or `from_wire`.
    pub flow: String,
    /// Why.
    pub reason: String,
    /// How many.
    pub frames: u64,
    /// When the count was last seen to grow, in milliseconds since 1970.
    pub last_seen: u64,
    /// What it means and what to do.
    pub help: String,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// When, in milliseconds since 1970.
    pub time: u64,
    /// What.
    pub kind: EventKind,
    /// The device it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// One line for people.
    pub text: String,
}

/// The kinds of events.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A port was added to the configuration.
    PortAdded,
    /// A port was removed from it.
    PortRemoved,
    /// A port has other VLANs or options.
    PortChanged,
    /// A port's device is forwarding.
    PortAttached,
    /// A port's device is gone.
    PortDetached,
    /// A device went up, down, or changed its carrier.
    Link,
    /// The uplink's device is there.
    UplinkAttached,
    /// The uplink's device is gone.
    UplinkDetached,
    /// The configuration was read again.
    Config,
    /// Frames are being dropped because somebody is too slow.
    Overload,
    /// A device's seal was taken away and put back.
    Seal,
    /// A worker does not answer, or does again.
    Worker,
    /// Ports have another worker.
    PortMoved,
    /// The reader was too slow for some events.
    Missed,
}

/// Something found on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What it is about.
    pub about: String,
    /// What is wrong.
    pub what: String,
    /// What to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cure: Option<String>,
}

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// It does not work.
    Error,
    /// It may not work.
    Warning,
    /// Worth knowing.
    Note,
}

/// A setting to change.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Change {
    /// `vlan`, or an option of the map.
    pub key: String,
    /// Its new value.
    pub value: String,
}

/// A call, with its parameters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "method", content = "parameters")]
pub enum Request {
    /// The switch as a whole.
    #[serde(rename = "org.vlanswitchd.GetStatus")]
    GetStatus {},
    /// All ports.
    #[serde(rename = "org.vlanswitchd.ListPorts")]
    ListPorts {},
    /// One port.
    #[serde(rename = "org.vlanswitchd.GetPort")]
    GetPort {
        /// Its device.
        name: String,
    },
    /// A new port.
    #[serde(rename = "org.vlanswitchd.AddPort")]
    AddPort {
        /// What `--map` takes.
        map: String,
        /// Write it to the configuration file too.
        persist: Option<bool>,
    },
    /// Another worker for a port, and for those that share its outer VLAN.
    #[serde(rename = "org.vlanswitchd.MovePort")]
    MovePort {
        /// Its device.
        name: String,
        /// The number of the worker.
        worker: u32,
    },
    /// A port less.
    #[serde(rename = "org.vlanswitchd.RemovePort")]
    RemovePort {
        /// Its device.
        name: String,
        /// Take it out of the configuration file too.
        persist: Option<bool>,
    },
    /// A port with other VLANs or options.
    #[serde(rename = "org.vlanswitchd.SetPort")]
    SetPort {
        /// Its device.
        name: String,
        /// What to change.
        changes: Vec<Change>,
        /// Change it in the configuration file too.
        persist: Option<bool>,
    },
    /// All counters, once or again and again.
    #[serde(rename = "org.vlanswitchd.GetStats")]
    GetStats {
        /// Milliseconds between two replies.
        interval: Option<u64>,
    },
    /// All drops.
    #[serde(rename = "org.vlanswitchd.ListDrops")]
    ListDrops {},
    /// Events as they happen.
    #[serde(rename = "org.vlanswitchd.Monitor")]
    Monitor {},
    /// Frames as they pass.
    #[serde(rename = "org.vlanswitchd.Capture")]
    Capture(CaptureRequest),
    /// The running configuration.
    #[serde(rename = "org.vlanswitchd.GetConfig")]
    GetConfig {},
    /// Read the configuration file again.
    #[serde(rename = "org.vlanswitchd.ReloadConfig")]
    ReloadConfig {
        /// Apply nothing.
        dry_run: Option<bool>,
    },
    /// Take the kernel path away: the packet path serves all ports.
    #[serde(rename = "org.vlanswitchd.Detach")]
    Detach {},
    /// Look at the host.
    #[serde(rename = "org.vlanswitchd.Examine")]
    Examine {},
    /// Let another process go on.
    #[serde(rename = "org.vlanswitchd.HandOver")]
    HandOver {
        /// The newest format it understands.
        format: u32,
        /// The uplink it is to serve.
        uplink: String,
    },
}

impl Request {
    /// Whether it changes something, or shows what only those may see who could
    /// change it: guests' frames.
    pub fn changes(&self) -> bool {
        match self {
            Self::AddPort { .. }
            | Self::RemovePort { .. }
            | Self::SetPort { .. }
            | Self::MovePort { .. }
            | Self::Capture(_)
            | Self::ReloadConfig { .. }
            | Self::Detach {}
            | Self::HandOver { .. } => true,
            Self::GetStatus {}
            | Self::ListPorts {}
            | Self::GetPort { .. }
            | Self::GetStats { .. }
            | Self::ListDrops {}
            | Self::Monitor {}
            | Self::GetConfig {}
            | Self::Examine {} => false,
        }
    }

    /// Whether it has many answers, if the caller takes them.
    pub fn streams(&self) -> bool {
        matches!(self, Self::GetStats { .. } | Self::Monitor {} | Self::Capture(_))
    }
}

/// What to capture.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureRequest {
    /// A port's device or the uplink's; all if absent.
    pub port: Option<String>,
    /// Only frames dropped.
    pub drops: Option<bool>,
    /// A classic BPF program in decimal.
    pub filter: Option<String>,
    /// Bytes of each frame to keep.
    pub snaplen: Option<u32>,
    /// End after so many frames.
    pub limit: Option<u64>,
}

/// The answer to `GetStatus`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatusReply {
    /// The status.
    pub status: Status,
}

/// The answer to `ListPorts`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PortsReply {
    /// The ports.
    pub ports: Vec<Port>,
}

/// The answer to `GetPort`, `AddPort` and `SetPort`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PortReply {
    /// The port.
    pub port: Port,
    /// Warnings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notes: Option<Vec<String>>,
}

/// The answer to `RemovePort`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NotesReply {
    /// Warnings.
    pub notes: Vec<String>,
}

/// The answer to `GetStats`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StatsReply {
    /// The counters.
    pub stats: Stats,
}

/// The answer to `ListDrops`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DropsReply {
    /// The drops.
    pub drops: Vec<Drop>,
}

/// One answer to `Monitor`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EventReply {
    /// The event.
    pub event: Event,
}

/// One answer to `Capture`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaptureReply {
    /// The next bytes of the file, in base64.
    pub pcapng: String,
}

/// The answer to `GetConfig`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigReply {
    /// The configuration.
    pub toml: String,
}

/// The answer to `ReloadConfig`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadReply {
    /// Devices of ports added.
    pub added: Vec<String>,
    /// Devices of ports removed.
    pub removed: Vec<String>,
    /// Devices of ports changed.
    pub changed: Vec<String>,
    /// Warnings.
    pub notes: Vec<String>,
}

/// The answer to `Examine`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FindingsReply {
    /// What was found, the worst first.
    pub findings: Vec<Finding>,
}
