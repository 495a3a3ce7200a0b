//! Rates: two readings of the counters and the time between them.

use vlanswitchd::control::api::{Flow, Port, Stats, Uplink};

/// What one flow moves, a second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct FlowRate {
    /// Frames.
    pub frames: f64,
    /// Bits.
    pub bits: f64,
    /// Frames dropped.
    pub drops: f64,
}

/// What a port, or the uplink, moves each way.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rate {
    /// From the guest, or from the wire.
    pub from: FlowRate,
    /// To the guest, or to the wire.
    pub to: FlowRate,
}

impl Rate {
    /// Drops both ways, a second.
    pub fn drops(&self) -> f64 {
        self.from.drops + self.to.drops
    }
}

/// The rates between two readings.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rates {
    /// The uplink's.
    pub uplink: Rate,
    /// The ports', in the order of the later reading.
    pub ports: Vec<Rate>,
}

/// From `before` to `now`. A device that was not there before has no rate yet.
pub fn between(before: &Stats, now: &Stats) -> Rates {
    let seconds = now.time.saturating_sub(before.time) as f64 / 1000.0;
    if seconds <= 0.0 {
        return Rates { uplink: Rate::default(), ports: vec![Rate::default(); now.ports.len()] };
    }
    let port = |port: &Port| {
        let earlier = before.ports.iter().find(|earlier| earlier.name == port.name);
        earlier.map_or_else(Rate::default, |earlier| Rate {
            from: flow(&earlier.from_guest, &port.from_guest, seconds),
            to: flow(&earlier.to_guest, &port.to_guest, seconds),
        })
    };
    Rates {
        uplink: uplink(&before.uplink, &now.uplink, seconds),
        ports: now.ports.iter().map(port).collect(),
    }
}

/// What went out; drops apart.
fn flow(before: &Flow, now: &Flow, seconds: f64) -> FlowRate {
    FlowRate {
        frames: grown(before.out_frames, now.out_frames) / seconds,
        bits: grown(before.out_bytes, now.out_bytes) * 8.0 / seconds,
        drops: grown(before.dropped(), now.dropped()) / seconds,
    }
}

fn uplink(before: &Uplink, now: &Uplink, seconds: f64) -> Rate {
    Rate {
        from: flow(&before.from_wire, &now.from_wire, seconds),
        to: FlowRate {
            frames: grown(before.to_wire.out_frames, now.to_wire.out_frames) / seconds,
            bits: grown(before.to_wire.out_bytes, now.to_wire.out_bytes) * 8.0 / seconds,
            drops: 0.0,
        },
    }
}

/// Counters fall only when a port is removed and added again.
fn grown(before: u64, now: u64) -> f64 {
    now.saturating_sub(before) as f64
}

/// All drops a second: those of the ports, and those from the wire that reached no
/// port.
pub fn all_drops(rates: &Rates) -> f64 {
    rates.uplink.drops() + rates.ports.iter().map(Rate::drops).sum::<f64>()
}
