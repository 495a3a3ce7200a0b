//! The floods, as fast as one thread can.

use crate::bed::{Bed, ELSEWHERE, FAR, FIRST_VLAN};
use crate::kernel::{Burst, HEADER_LENGTH};
use crate::polite::{open_socket, stoppable};
use anyhow::{Context, Result};
use nix::errno::Errno;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

/// What is flooded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The guest sends frames of 60 bytes.
    Guest,
    /// The wire sends frames of 60 bytes in the hostile guest's VLAN.
    Wire,
    /// The guest sends super-frames of 64 kB that only userspace can cut, in 1000 segments.
    Segments,
    /// The guest sends the same of 1.9 kB, in 238 segments of 8 bytes.
    Crumbs,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Guest, Self::Wire, Self::Segments, Self::Crumbs];

    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Guest => "guest-60B",
            Self::Wire => "wire-60B",
            Self::Segments => "guest-segments",
            Self::Crumbs => "guest-crumbs",
        }
    }
}

/// Where it goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// To a device of the same kind that no switch serves.
    Elsewhere,
    /// To the switch.
    Switch,
}

impl Place {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Elsewhere => "elsewhere",
            Self::Switch => "switch",
        }
    }
}

/// A flood that goes on until it is stopped.
pub struct Flood {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    began: Instant,
    thread: JoinHandle<Result<()>>,
}

impl Flood {
    /// Ends it; frames a second the kernel took.
    pub fn stop(self) -> Result<f64> {
        let seconds = self.began.elapsed().as_secs_f64();
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow::anyhow!("the flood panicked"))??;
        Ok(self.count.load(Ordering::Relaxed) as f64 / seconds)
    }
}

/// Begins a flood.
pub fn start(bed: &Bed, kind: Kind, place: Place) -> Result<Flood> {
    let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let (flag, counter) = (Arc::clone(&stop), Arc::clone(&count));
    let began = Instant::now();
    let thread = if kind == Kind::Wire {
        let device = if place == Place::Switch { FAR } else { ELSEWHERE };
        let socket = bed.far.run(move || open_socket(device, 0))??;
        stoppable("flood", move || {
            let mut burst = Burst::new(small_frame(Some(FIRST_VLAN)), 32);
            while !flag.load(Ordering::Relaxed) {
                match burst.send(&socket, 32) {
                    Ok(sent) => _ = counter.fetch_add(sent as u64, Ordering::Relaxed),
                    Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::EINTR) => {}
                    Err(error) => return Err(error).context("the wire's flood"),
                }
            }
            Ok(())
        })?
    } else {
        let guest = if place == Place::Switch { &bed.hostile } else { &bed.elsewhere };
        let mut guest = guest.try_clone()?;
        let frame = match kind {
            Kind::Segments => super_frame(64_000, 64),
            Kind::Crumbs => super_frame(1900, 8),
            Kind::Guest | Kind::Wire => [vec![0; HEADER_LENGTH], small_frame(None)].concat(),
        };
        stoppable("flood", move || {
            while !flag.load(Ordering::Relaxed) {
                match guest.write(&frame) {
                    Ok(_) => _ = counter.fetch_add(1, Ordering::Relaxed),
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error).context("the guest's flood"),
                }
            }
            Ok(())
        })?
    };
    Ok(Flood { stop, count, began, thread })
}

/// 60 bytes from one station to another.
fn small_frame(vlan: Option<u16>) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    if let Some(vlan) = vlan {
        frame.extend([0x81, 0]);
        frame.extend(vlan.to_be_bytes());
    }
    // Another EtherType than the polite ones': their socket is not offered it.
    frame.extend([0x88, 0xb6]);
    frame.resize(if vlan.is_some() { 64 } else { 60 }, 0x5a);
    frame
}

/// TCP in IPv4 in IPv4 with its virtio header: this many bytes in segments of `size`. No
/// kernel segments that when userspace hands it over.
fn super_frame(payload: usize, size: u16) -> Vec<u8> {
    let ip = |protocol: u8, length: usize| {
        let mut header = [0; 20];
        header[0] = 0x45;
        header[2..4].copy_from_slice(&(length as u16).to_be_bytes());
        (header[8], header[9]) = (64, protocol);
        header[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        header
    };
    let mut tcp = [0; 20];
    (tcp[12], tcp[13]) = (0x50, 0x10);
    // NEEDS_CSUM, TCPv4, hdr_len, gso_size, csum_start, csum_offset, and the length of
    // what follows in 12 bytes of header.
    let mut frame = vec![1, 1];
    for word in [74, size, 54, 16, 0] {
        frame.extend(word.to_ne_bytes());
    }
    frame.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
    frame.extend(ip(4, payload + 60));
    frame.extend(ip(6, payload + 40));
    frame.extend(tcp);
    frame.resize(HEADER_LENGTH + 74 + payload, 0x5a);
    frame
}
