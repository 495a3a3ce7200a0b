//! The counters, for people and for programs: what `vlanswitchd` prints at SIGUSR1
//! and when it stops, and what `vlanswitchctl stats` shows.

mod sheet;

pub use sheet::{COLUMNS, Sheet, Tone, columns_of, printable};

use crate::control::api::{Flow, Removed, Sent, Stats, Unmapped};
use crate::dataplane::FlowSnapshot;
use crate::frame::Tpid;
use crate::port::DeviceState;
use crate::switch::DropReason;
use serde::Serialize;
use std::fmt::Write as _;

/// Everything that was counted, at one moment.
#[derive(Debug, Serialize)]
pub struct Report {
    event: &'static str,
    /// The uplink.
    pub uplink: UplinkReport,
    /// The ports, in the order of the maps.
    pub ports: Vec<PortReport>,
    /// Ports removed meanwhile, if there were any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub removed: Option<Removed>,
    /// Tagged frames on the uplink that no port claims, left to the host.
    pub unmapped: Vec<Unmapped>,
}

/// The uplink's counters.
#[derive(Debug, Serialize)]
pub struct UplinkReport {
    /// Name of the device.
    pub name: String,
    /// State of the device.
    pub state: String,
    /// Frames from the wire; "out" is "handed to a port".
    pub from_wire: Flow,
    /// Frames sent, the sum over the ports.
    pub to_wire: Sent,
    /// Frames that the device or its queueing discipline dropped of all the host gave it.
    pub unsent: u64,
}

/// A port's counters.
#[derive(Debug, Serialize)]
pub struct PortReport {
    /// Name of the device.
    pub name: String,
    /// Its VLANs, as in the map.
    pub vlans: String,
    /// Its mode.
    pub mode: String,
    /// State of the device; `attached` is "up with carrier".
    pub state: String,
    /// Guest to uplink.
    pub from_guest: Flow,
    /// Uplink to guest.
    pub to_guest: Flow,
}

impl From<FlowSnapshot> for Flow {
    fn from(flow: FlowSnapshot) -> Self {
        Self {
            in_frames: flow.in_frames,
            in_bytes: flow.in_bytes,
            split_frames: flow.split_frames,
            out_frames: flow.out_frames,
            out_bytes: flow.out_bytes,
            drops: flow
                .reasons()
                .map(|(reason, frames)| (reason.name().to_owned(), frames))
                .collect(),
            send_error: flow.send_error.map(|errno| format!("{errno:?}: {}", errno.desc())),
        }
    }
}

impl From<&Flow> for FlowSnapshot {
    fn from(flow: &Flow) -> Self {
        let mut snapshot = Self {
            in_frames: flow.in_frames,
            in_bytes: flow.in_bytes,
            split_frames: flow.split_frames,
            out_frames: flow.out_frames,
            out_bytes: flow.out_bytes,
            ..Self::default()
        };
        for (place, reason) in snapshot.drops.iter_mut().zip(DropReason::ALL) {
            *place = flow.drops.get(reason.name()).copied().unwrap_or_default();
        }
        snapshot
    }
}

impl From<Stats> for Report {
    fn from(stats: Stats) -> Self {
        let ports = stats.ports.into_iter().map(|port| PortReport {
            name: port.name,
            vlans: port.vlans,
            mode: port.mode,
            state: port.state,
            from_guest: port.from_guest,
            to_guest: port.to_guest,
        });
        let uplink = UplinkReport {
            name: stats.uplink.name,
            state: stats.uplink.state,
            from_wire: stats.uplink.from_wire,
            to_wire: stats.uplink.to_wire,
            unsent: stats.uplink.unsent,
        };
        Self { removed: stats.removed, ..Self::new(uplink, ports.collect(), stats.unmapped) }
    }
}

/// A row from the uplink filter's count.
pub fn unmapped((tpid, vid, frames): (usize, u16, u64)) -> Unmapped {
    let tpid = Tpid::ALL.get(tpid).map(Tpid::to_string).unwrap_or_default();
    Unmapped { tpid, vid, frames }
}

/// The word for a port's state.
pub fn port_state(state: DeviceState) -> &'static str {
    match state {
        DeviceState::Up => "attached",
        other => other.name(),
    }
}

impl Report {
    /// A report of these parts.
    pub fn new(uplink: UplinkReport, ports: Vec<PortReport>, unmapped: Vec<Unmapped>) -> Self {
        Self { event: "summary", uplink, ports, removed: None, unmapped }
    }

    /// One JSON object on one line.
    pub fn to_json(&self) -> String {
        // Numbers, strings and maps of them always have a JSON form.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Tables of at most [`COLUMNS`] columns, coloured if asked.
    pub fn to_text(&self, colours: bool) -> String {
        let mut sheet =
            Sheet::new(&["port", "vlans", "state", "from guest", "dropped", "to guest", "dropped"])
                .numbers(3..7);
        for port in &self.ports {
            let drops = [port.from_guest.dropped(), port.to_guest.dropped()];
            sheet.row([
                (port.name.clone(), Tone::Plain),
                (shorten(&port.vlans), Tone::Plain),
                (port.state.clone(), Tone::of_state(&port.state)),
                (port.from_guest.out_frames.to_string(), Tone::Plain),
                (drops[0].to_string(), Tone::of_drops(drops[0])),
                (port.to_guest.out_frames.to_string(), Tone::Plain),
                (drops[1].to_string(), Tone::of_drops(drops[1])),
            ]);
        }
        let mut text = sheet.render(colours);
        let UplinkReport { name, state, from_wire, to_wire, unsent } = &self.uplink;
        let line = format!(
            "uplink {name} ({state}): received {} frames, {} dropped; sent {} frames",
            from_wire.in_frames,
            from_wire.dropped(),
            to_wire.out_frames,
        );
        if columns_of(&line) > COLUMNS {
            text.push_str(&line.replace(": ", ":\n  ").replace("; ", "\n  "));
            text.push('\n');
        } else {
            let _ = writeln!(text, "{line}");
        }
        text.push_str(&self.drops_text(colours));
        if *unsent > 0 {
            let _ = writeln!(
                text,
                "{unsent} frames of those the host sent there were dropped by the uplink's\n  \
                 device or qdisc (`ip -s link show {name}`, `tc -s qdisc show dev {name}`)"
            );
        }
        if !self.unmapped.is_empty() {
            text.push_str("VLANs on the uplink that no port claims (left to the host):\n");
            let mut sheet = Sheet::new(&["tpid", "vlan", "frames"]).numbers(1..3);
            for row in &self.unmapped {
                let cells = [row.tpid.clone(), row.vid.to_string(), row.frames.to_string()];
                sheet.row(cells.map(|text| (text, Tone::Plain)));
            }
            text.push_str(&sheet.render(colours));
        }
        text
    }

    fn drops_text(&self, colours: bool) -> String {
        let mut sheet = Sheet::new(&["dropped frames of", "reason", "frames"]).numbers(2..3);
        let ports = self.ports.iter().flat_map(|port| {
            [
                (format!("{} from guest", port.name), &port.from_guest),
                (format!("{} to guest", port.name), &port.to_guest),
            ]
        });
        let uplink = (format!("{} from wire", self.uplink.name), &self.uplink.from_wire);
        let mut errors = String::new();
        for (place, flow) in ports.chain([uplink]) {
            for (reason, frames) in &flow.drops {
                let cells = [place.clone(), reason.clone(), frames.to_string()];
                sheet.row(cells.map(|text| (text, Tone::Plain)));
            }
            if let Some(error) = &flow.send_error {
                let _ = writeln!(errors, "{place}: the last send_failed was\n  {error}");
            }
        }
        sheet.render(colours) + &errors
    }
}

/// A list of VLANs as it fits a table: a trunk of scattered VLANs would not.
pub fn shorten(vlans: &str) -> String {
    const LONGEST: usize = 16;
    match vlans.get(..LONGEST - 3) {
        Some(start) if vlans.len() > LONGEST => format!("{start}..."),
        _ => vlans.to_owned(),
    }
}
