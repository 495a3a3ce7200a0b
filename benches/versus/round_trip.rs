//! Echo round trips between the guest's stack and the far end's.

use std::net::SocketAddrV4;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::machine::Processors;
use super::namespace::Namespace;
use super::scene::{FAR_DEVICE, FAR_IP, Scene};
use super::statistics::quantile;
use super::traffic::{Pace, Worker, wire_sender};
use super::workload::{Bench, Outcome, window};

/// Frames that come from the wire beside the conversation.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    /// Frames a second.
    pub rate: f64,
    /// Octets of a frame, without FCS and tag.
    pub length: usize,
}

/// Echo round trips as an application in the guest sees them.
pub fn round_trip(
    scene: &Scene,
    pause: Duration,
    load: Option<Load>,
    bench: &Bench,
) -> Result<Outcome> {
    let guest = Arc::clone(scene.guest.as_ref().context("this scene has no guest stack")?);
    // The far end's tc program tags the load like everything else that leaves it.
    let load_worker = load
        .map(|load| {
            let pace = Pace::Even(load.rate);
            wire_sender(&scene.far, FAR_DEVICE, load.length, None, pace, u64::MAX, Processors::Free)
        })
        .transpose()?;
    let (hand_over, samples) = std::sync::mpsc::channel();
    let prober = Worker::start("prober", move |stop, count| {
        let times =
            probe(&guest, pause, stop, |answered| count.store(answered, Ordering::Relaxed))?;
        hand_over.send(times).context("nobody waits for the round trips")
    })?;
    let mut from = 0;
    let mut to = 0;
    let (_, usage) = window(bench, || {
        from = to;
        to = prober.count();
        Ok([to])
    })?;
    prober.stop()?;
    if let Some(worker) = load_worker {
        worker.stop()?;
    }
    let (times, lost) = samples.recv()?;
    let mut times =
        times.get(from as usize..(to as usize).min(times.len())).unwrap_or_default().to_vec();
    times.sort_by(f64::total_cmp);
    let at = |share| quantile(&times, share).context("no echo was answered in the window");
    let curve = (1..=CURVE_POINTS)
        .map(|point| {
            // Ever finer toward the tail: half, three quarters, seven eighths, ... of the samples.
            let share = 1.0 - 2.0_f64.powf(-f64::from(point) / 4.0);
            Ok((share, at(share)?))
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Outcome::new(
        [
            ("mean_us", times.iter().sum::<f64>() / times.len() as f64),
            ("p50_us", at(0.5)?),
            ("p90_us", at(0.9)?),
            ("p99_us", at(0.99)?),
            ("p999_us", at(0.999)?),
            ("samples", times.len() as f64),
            ("lost", lost as f64),
            ("load_mpps", load.map_or(0.0, |load| load.rate / 1e6)),
        ],
        &usage,
    )
    .with_curve("distribution", curve))
}

/// Points of the distribution's curve; the last is at one in a thousand or so.
const CURVE_POINTS: u32 = 40;

/// Sends echo requests until stopped; the round trips in microseconds, and how many were lost.
fn probe(
    guest: &Namespace,
    pause: Duration,
    stop: &AtomicBool,
    mut answered: impl FnMut(u64),
) -> Result<(Vec<f64>, u64)> {
    guest.enter()?;
    let icmp =
        socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)?;
    setsockopt(&icmp, sockopt::ReceiveTimeout, &TimeVal::new(0, 200_000))?;
    let target = SockaddrIn::from(SocketAddrV4::new(FAR_IP, 0));
    let identifier = (std::process::id() as u16).to_be_bytes();
    let mut times = Vec::with_capacity(1 << 20);
    let mut lost = 0;
    let mut sequence = 0_u16;
    let mut buffer = [0; 256];
    while !stop.load(Ordering::Relaxed) {
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
        sequence = sequence.wrapping_add(1);
        let request = echo_request(identifier, sequence);
        let sent = Instant::now();
        sendto(icmp.as_raw_fd(), &request, &target, MsgFlags::empty())?;
        loop {
            match recv(icmp.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
                Ok(taken)
                    if is_answer(buffer.get(..taken).unwrap_or_default(), identifier, sequence) =>
                {
                    times.push(sent.elapsed().as_secs_f64() * 1e6);
                    answered(times.len() as u64);
                    break;
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    lost += 1;
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok((times, lost))
}

/// ICMP echo request with 56 octets of data, as ping sends (RFC 792).
fn echo_request(identifier: [u8; 2], sequence: u16) -> Vec<u8> {
    let mut message = vec![8, 0, 0, 0];
    message.extend(identifier);
    message.extend(sequence.to_be_bytes());
    message.resize(64, 0x5a);
    let sum: u32 = message
        .chunks_exact(2)
        .map(|pair| pair.iter().fold(0, |word, &octet| word << 8 | u32::from(octet)))
        .sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !((folded & 0xffff) + (folded >> 16)) as u16;
    if let Some(field) = message.get_mut(2..4) {
        field.copy_from_slice(&checksum.to_be_bytes());
    }
    message
}

/// A raw socket hands over the IPv4 header too.
fn is_answer(packet: &[u8], identifier: [u8; 2], sequence: u16) -> bool {
    let header = packet.first().map_or(0, |first| usize::from(first & 0x0f) * 4);
    let message = packet.get(header..).unwrap_or_default();
    message.first() == Some(&0)
        && message.get(4..6) == Some(&identifier)
        && message.get(6..8) == Some(&sequence.to_be_bytes())
}
