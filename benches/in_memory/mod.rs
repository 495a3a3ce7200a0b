//! A worker between devices in memory: the whole way of a frame but the kernel.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use vlanswitchd::dataplane::{Abilities, PollMode, PortShared, UplinkShared, Worker};
use vlanswitchd::frame::{Pcp, Tag, Tci, Tpid, Vid, VnetHeader};
use vlanswitchd::port::{Device, DeviceState, MemoryPort};
use vlanswitchd::switch::{Membership, Priority, Table, Vlans};
use vlanswitchd::sys::packet::BURST;

/// What a burst is made of.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    /// Name in reports.
    pub name: &'static str,
    /// From the uplink to guests, or from one guest to the uplink.
    pub to_guest: bool,
    /// Mapped ports.
    pub ports: u16,
    /// Ports the burst's frames are for, in turn.
    pub targets: u16,
    /// Whether frames are TCP super-frames with an offload header.
    pub super_frames: bool,
}

/// The cases worth a figure: both ways, many ports, super-frames.
pub const CASES: [Case; 5] = [
    Case { name: "wire-to-guest", to_guest: true, ports: 1, targets: 1, super_frames: false },
    Case {
        name: "wire-to-32-of-1000-guests",
        to_guest: true,
        ports: 1000,
        targets: 32,
        super_frames: false,
    },
    Case { name: "wire-to-guest-tso", to_guest: true, ports: 1, targets: 1, super_frames: true },
    Case { name: "guest-to-wire", to_guest: false, ports: 1, targets: 1, super_frames: false },
    Case { name: "guest-to-wire-tso", to_guest: false, ports: 1, targets: 1, super_frames: true },
];

const FIRST_VLAN: u16 = 101;
const MTU: u32 = 1500;

/// Frames in each burst.
pub const FRAMES: usize = BURST;

/// A worker with its devices attached, and what it counts.
pub struct Bed {
    worker: Worker,
    ports: Vec<Arc<PortShared>>,
    to_guest: bool,
    now: Instant,
}

impl Bed {
    /// A bed that can run `bursts` bursts.
    pub fn new(case: Case, bursts: usize) -> Result<Self> {
        let memberships = (0..case.ports)
            .map(|port| {
                let vid = Vid::new(FIRST_VLAN + port).context("more ports than VLANs")?;
                let priority = Priority::Fixed(Pcp::default());
                Ok(Membership::new(Vlans::One(vid), None, None, Tpid::Customer, None, priority)?)
            })
            .collect::<Result<Vec<_>>>()?;
        let table = Arc::new(Table::compile(&memberships)?);
        let uplink = Arc::new(UplinkShared::default());
        uplink.link.set(DeviceState::Up, MTU);
        let ports: Vec<Arc<PortShared>> = (0..case.ports).map(|_| Arc::default()).collect();
        let abilities = Abilities { tagged_gso: true, udp_gso: true };
        let (mut worker, _, _) =
            Worker::new(table, uplink, ports.clone(), abilities, PollMode::Busy)?;
        let mut source = MemoryPort::default();
        for frame in 0..BURST as u16 {
            let vid =
                Vid::new(FIRST_VLAN + frame % case.targets).context("more targets than VLANs")?;
            let tag = Tag { tpid: Tpid::Customer, tci: Tci::new(vid, Pcp::default()) };
            // The kernel has taken the outer tag out of frames from the wire.
            let (bytes, header) = frame_of(case);
            source.add(&bytes, case.to_guest.then_some(tag), header);
        }
        source.replay(bursts);
        let sink = MemoryPort::default();
        let (from_uplink, from_guest) = if case.to_guest { (source, sink) } else { (sink, source) };
        worker.attach(None, Box::new(Device::Memory(from_uplink)));
        let mut from_guest = Some(from_guest);
        for (port, shared) in ports.iter().enumerate() {
            shared.link.set(DeviceState::Up, MTU);
            let device = from_guest.take().unwrap_or_default();
            worker.attach(Some(port), Box::new(Device::Memory(device)));
        }
        Ok(Self { worker, ports, to_guest: case.to_guest, now: Instant::now() })
    }

    /// Forwards one burst.
    pub fn round(&mut self) -> bool {
        self.worker.round(self.now)
    }

    /// Checks that all frames of so many bursts were forwarded: an instruction count of frames
    /// that were dropped would be a fine one.
    pub fn check(&self, bursts: usize) -> Result<()> {
        let forwarded: u64 =
            self.ports
                .iter()
                .map(|port| {
                    if self.to_guest {
                        port.to_guest.snapshot()
                    } else {
                        port.from_guest.snapshot()
                    }
                })
                .map(|flow| flow.out_frames)
                .sum();
        let expected = (bursts * FRAMES) as u64;
        if forwarded != expected {
            bail!("{forwarded} frames were forwarded, not {expected}");
        }
        Ok(())
    }
}

/// 60 bytes of a frame nobody looks into, or the head of a TCP super-frame with 1400 bytes; the
/// rest of a super-frame is never touched, so leaving it out changes nothing.
fn frame_of(case: Case) -> (Vec<u8>, VnetHeader) {
    let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
    if !case.super_frames {
        frame.extend([0x88, 0xb5]);
        frame.resize(60, 0x5a);
        return (frame, VnetHeader::default());
    }
    // IPv4 (RFC 791) and TCP (RFC 9293) headers without options.
    frame.extend([0x08, 0x00]);
    frame.extend([0x45, 0, 0x05, 0xa0, 0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([
        0x03, 0xe8, 0x07, 0xd0, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0x03, 0xe8, 0, 0, 0, 0,
    ]);
    frame.resize(14 + 0x05a0, 0x5a);
    let header = VnetHeader {
        flags: 1,
        gso_type: 1,
        hdr_len: 54,
        gso_size: 700,
        csum_start: 34,
        csum_offset: 16,
    };
    (frame, header)
}
