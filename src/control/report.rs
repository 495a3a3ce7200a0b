//! The counters, for people and for programs.

use crate::dataplane::FlowSnapshot;
use crate::frame::Tpid;
use crate::port::DeviceState;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Everything that was counted, at one moment.
#[derive(Debug, Serialize)]
pub struct Report {
    event: &'static str,
    /// The uplink.
    pub uplink: UplinkReport,
    /// The ports, in the order of the maps.
    pub ports: Vec<PortReport>,
    /// Tagged frames on the uplink that no port claims, left to the host.
    pub unmapped: Vec<UnmappedReport>,
}

/// The uplink's counters.
#[derive(Debug, Serialize)]
pub struct UplinkReport {
    /// Name of the device.
    pub name: String,
    /// State of the device.
    pub state: &'static str,
    /// Frames from the wire; "out" is "handed to a port".
    pub from_wire: FlowReport,
    /// Frames sent, the sum over the ports.
    pub to_wire: SentReport,
}

/// Frames that went out.
#[derive(Debug, Serialize)]
pub struct SentReport {
    /// Frames.
    pub out_frames: u64,
    /// Bytes, tags included.
    pub out_bytes: u64,
}

/// A port's counters.
#[derive(Debug, Serialize)]
pub struct PortReport {
    /// Name of the device.
    pub name: String,
    /// Its VLANs, as in the map.
    pub vlans: String,
    /// Its mode.
    pub mode: &'static str,
    /// State of the device; `attached` is "up with carrier".
    pub state: &'static str,
    /// Guest to uplink.
    pub from_guest: FlowReport,
    /// Uplink to guest.
    pub to_guest: FlowReport,
}

/// One flow: `in_frames + split_frames = out_frames + the sum of drops`.
#[derive(Debug, Serialize)]
pub struct FlowReport {
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
    pub drops: BTreeMap<&'static str, u64>,
    /// The kernel's last answer counted as `send_failed`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub send_error: Option<String>,
}

impl From<FlowSnapshot> for FlowReport {
    fn from(flow: FlowSnapshot) -> Self {
        Self {
            in_frames: flow.in_frames,
            in_bytes: flow.in_bytes,
            split_frames: flow.split_frames,
            out_frames: flow.out_frames,
            out_bytes: flow.out_bytes,
            drops: flow.reasons().map(|(reason, frames)| (reason.name(), frames)).collect(),
            send_error: flow.send_error.map(|errno| format!("{errno:?}: {}", errno.desc())),
        }
    }
}

impl FlowReport {
    fn dropped(&self) -> u64 {
        self.drops.values().sum()
    }
}

/// Frames of one VLAN nobody mapped.
#[derive(Debug, Serialize)]
pub struct UnmappedReport {
    /// TPID of the outer tag, as `0x8100`.
    pub tpid: String,
    /// VID of the outer tag.
    pub vid: u16,
    /// Frames seen.
    pub frames: u64,
}

impl UnmappedReport {
    /// A row from the uplink filter's count.
    pub fn new((tpid, vid, frames): (usize, u16, u64)) -> Self {
        let tpid = Tpid::ALL.get(tpid).map(Tpid::to_string).unwrap_or_default();
        Self { tpid, vid, frames }
    }
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
    pub fn new(
        uplink: UplinkReport,
        ports: Vec<PortReport>,
        unmapped: Vec<UnmappedReport>,
    ) -> Self {
        Self { event: "summary", uplink, ports, unmapped }
    }

    /// One JSON object on one line.
    pub fn to_json(&self) -> String {
        // Numbers, strings and maps of them always have a JSON form.
        serde_json::to_string(self).unwrap_or_default()
    }

    /// Tables of at most 80 columns for usual names.
    pub fn to_text(&self) -> String {
        let mut table =
            new_table(&["port", "vlans", "state", "from guest", "dropped", "to guest", "dropped"]);
        for port in &self.ports {
            table.add_row([
                port.name.clone(),
                shorten(&port.vlans),
                port.state.to_owned(),
                port.from_guest.out_frames.to_string(),
                port.from_guest.dropped().to_string(),
                port.to_guest.out_frames.to_string(),
                port.to_guest.dropped().to_string(),
            ]);
        }
        align_numbers(&mut table, 3..7);
        let mut text = format!("{table}\n");
        let UplinkReport { name, state, from_wire, to_wire } = &self.uplink;
        let _ = writeln!(
            text,
            "uplink {name} ({state}): received {} frames, {} dropped; sent {} frames",
            from_wire.in_frames,
            from_wire.dropped(),
            to_wire.out_frames,
        );
        text.push_str(&self.drops_text());
        if !self.unmapped.is_empty() {
            text.push_str("VLANs on the uplink that no port claims (left to the host):\n");
            let mut table = new_table(&["tpid", "vlan", "frames"]);
            for row in &self.unmapped {
                table.add_row([row.tpid.clone(), row.vid.to_string(), row.frames.to_string()]);
            }
            align_numbers(&mut table, 1..3);
            let _ = writeln!(text, "{table}");
        }
        text
    }

    fn drops_text(&self) -> String {
        let mut table = new_table(&["dropped frames of", "reason", "frames"]);
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
                table.add_row([place.clone(), (*reason).to_owned(), frames.to_string()]);
            }
            if let Some(error) = &flow.send_error {
                let _ = writeln!(errors, "{place}: the last send_failed was {error}");
            }
        }
        align_numbers(&mut table, 2..3);
        if table.is_empty() { String::new() } else { format!("{table}\n{errors}") }
    }
}

fn new_table(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

fn align_numbers(table: &mut Table, columns: std::ops::Range<usize>) {
    for column in columns {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

/// A trunk of scattered VLANs would not fit a table.
fn shorten(vlans: &str) -> String {
    const LONGEST: usize = 16;
    match vlans.get(..LONGEST - 3) {
        Some(start) if vlans.len() > LONGEST => format!("{start}..."),
        _ => vlans.to_owned(),
    }
}
