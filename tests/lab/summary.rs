//! The counters the daemon prints, read back from its JSON.

use serde_json::Value;
use std::collections::BTreeMap;

/// Every reason a frame may be dropped for (the closed set of the design).
pub const REASONS: [&str; 18] = [
    "unmapped_vlan",
    "tagged_on_access",
    "inner_tag",
    "untagged_on_trunk",
    "vlan_not_allowed",
    "spoofed_mac",
    "rate_limited",
    "storm_limited",
    "too_long",
    "malformed",
    "bad_offload",
    "guest_queue_full",
    "guest_absent",
    "uplink_down",
    "uplink_queue_full",
    "ring_overrun",
    "send_failed",
    "wrong_worker",
];

/// Frames one way: in, out, and lost on the way by reason.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Flow {
    /// Frames that came.
    pub in_frames: u64,
    /// Their bytes.
    pub in_bytes: u64,
    /// Further frames that segmentation in userspace made of super-frames.
    pub split_frames: u64,
    /// Frames sent on.
    pub out_frames: u64,
    /// Their bytes.
    pub out_bytes: u64,
    /// Frames not sent on, by reason; reasons without frames are left out.
    pub drops: BTreeMap<String, u64>,
}

impl Flow {
    fn read(value: &Value) -> Self {
        let number = |key: &str| value.get(key).and_then(Value::as_u64).unwrap_or(0);
        let mut drops = BTreeMap::new();
        for (reason, frames) in value.get("drops").and_then(Value::as_object).into_iter().flatten()
        {
            assert!(REASONS.contains(&reason.as_str()), "{reason} is no reason of the closed set");
            let frames = frames.as_u64().expect("drops are numbers");
            if frames > 0 {
                drops.insert(reason.clone(), frames);
            }
        }
        Self {
            in_frames: number("in_frames"),
            in_bytes: number("in_bytes"),
            split_frames: number("split_frames"),
            out_frames: number("out_frames"),
            out_bytes: number("out_bytes"),
            drops,
        }
    }

    /// Frames dropped for one reason.
    pub fn dropped(&self, reason: &str) -> u64 {
        assert!(REASONS.contains(&reason), "{reason} is no reason of the closed set");
        self.drops.get(reason).copied().unwrap_or(0)
    }

    /// Frames dropped for whatever reason.
    pub fn all_drops(&self) -> u64 {
        self.drops.values().sum()
    }

    /// Fails the test if a frame is unaccounted for.
    pub fn assert_conserved(&self, what: &str) {
        let arrived = self.in_frames + self.split_frames;
        let left = self.out_frames + self.all_drops();
        assert_eq!(arrived, left, "{what} loses or invents frames: {self:?}");
    }
}

/// One port's counters.
#[derive(Debug, Clone)]
pub struct Port {
    /// Device name.
    pub name: String,
    /// `attached`, `no_carrier`, `down` or `absent`.
    pub state: String,
    /// Guest to uplink.
    pub from_guest: Flow,
    /// Uplink to guest.
    pub to_guest: Flow,
}

/// All counters at one moment.
#[derive(Debug, Clone)]
pub struct Summary {
    /// `up`, `down` or `absent`.
    pub uplink_state: String,
    /// What arrived from the wire.
    pub from_wire: Flow,
    /// What left to the wire.
    pub to_wire: Flow,
    /// What the uplink's device dropped of all it was given.
    pub unsent: u64,
    /// Ports in the order of the maps.
    pub ports: Vec<Port>,
    /// Ports removed meanwhile, in all, as one.
    pub removed: Option<Port>,
    /// Frames of VLANs nobody mapped, by (TPID, VID).
    pub unmapped: BTreeMap<(u16, u16), u64>,
}

impl Summary {
    /// Reads one line, or `None` if it is something else.
    pub fn read(line: &str) -> Option<Self> {
        let value: Value = serde_json::from_str(line).ok()?;
        if value.get("event")?.as_str()? != "summary" {
            return None;
        }
        let text = |value: &Value, key: &str| value[key].as_str().unwrap_or_default().to_owned();
        let ports = value["ports"].as_array().expect("ports").iter();
        let unmapped = value["unmapped"].as_array().expect("unmapped").iter();
        Some(Self {
            uplink_state: text(&value["uplink"], "state"),
            from_wire: Flow::read(&value["uplink"]["from_wire"]),
            to_wire: Flow::read(&value["uplink"]["to_wire"]),
            unsent: value["uplink"]["unsent"].as_u64().unwrap_or_default(),
            ports: ports
                .map(|port| Port {
                    name: text(port, "name"),
                    state: text(port, "state"),
                    from_guest: Flow::read(&port["from_guest"]),
                    to_guest: Flow::read(&port["to_guest"]),
                })
                .collect(),
            removed: value.get("removed").map(|removed| Port {
                name: "removed".to_owned(),
                state: String::new(),
                from_guest: Flow::read(&removed["from_guest"]),
                to_guest: Flow::read(&removed["to_guest"]),
            }),
            unmapped: unmapped
                .map(|entry| {
                    let tpid = text(entry, "tpid");
                    let tpid = u16::from_str_radix(tpid.trim_start_matches("0x"), 16);
                    let vid = entry["vid"].as_u64().expect("vid") as u16;
                    ((tpid.expect("tpid"), vid), entry["frames"].as_u64().expect("frames"))
                })
                .collect(),
        })
    }

    /// One port by its device's name.
    pub fn port(&self, name: &str) -> &Port {
        let port = self.ports.iter().find(|port| port.name == name);
        port.unwrap_or_else(|| panic!("no port {name} in {self:?}"))
    }

    /// Fails the test unless every frame is accounted for: per flow, and between
    /// the flows (what the wire's side hands over, the ports' side receives).
    pub fn assert_conserved(&self) {
        self.from_wire.assert_conserved("uplink, from the wire");
        let ports = || self.ports.iter().chain(&self.removed);
        for port in ports() {
            port.from_guest.assert_conserved(&format!("{}, from the guest", port.name));
            port.to_guest.assert_conserved(&format!("{}, to the guest", port.name));
        }
        let handed_over: u64 = ports().map(|port| port.to_guest.in_frames).sum();
        assert_eq!(self.from_wire.out_frames, handed_over, "wire to ports: {self:?}");
        let sent: u64 = ports().map(|port| port.from_guest.out_frames).sum();
        assert_eq!(sent, self.to_wire.out_frames, "ports to wire: {self:?}");
    }
}
