//! What is measured, and how.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use super::datapath::Datapath;
use super::machine::{Sample, Usage};
use super::namespace::Namespace;
use super::scene::{FAR_DEVICE, FAR_IP, Scene};
use super::statistics::quantile;
use super::traffic::{Pace, Worker, guest_receiver, guest_sender, wire_sender};

/// Figures of one measurement by name; the units are in the names.
pub type Figures = BTreeMap<String, f64>;

/// Which way traffic goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the guest to the wire.
    ToWire,
    /// From the wire to the guest.
    ToGuest,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::ToWire => "guest-to-wire",
            Self::ToGuest => "wire-to-guest",
        }
    }
}

/// One thing to measure.
#[derive(Clone, Debug)]
pub enum Workload {
    /// Frames a second of one size, as fast as the sender can.
    Flood {
        /// Which way.
        direction: Direction,
        /// Octets of a frame as the guest has it, without FCS.
        length: usize,
    },
    /// Bulk TCP between the guest's and the far end's stacks.
    Tcp {
        /// Which way the data goes.
        direction: Direction,
        /// Connections at once.
        streams: usize,
    },
    /// Echo requests from the guest, the next when the last was answered.
    RoundTrip {
        /// Pause before each; zero keeps the path awake.
        pause: Duration,
    },
}

/// Times common to all measurements of a run.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Length of a window.
    pub window: Duration,
    /// Traffic before the window opens.
    pub warm_up: Duration,
}

impl Workload {
    /// Name in tables, plots and `--only`.
    pub fn name(&self) -> String {
        match self {
            Self::Flood { direction, length } => format!("{}-{length}", direction.name()),
            Self::Tcp { direction, streams } => format!("tcp-{}-{streams}", direction.name()),
            Self::RoundTrip { pause } if pause.is_zero() => "rtt-back-to-back".into(),
            Self::RoundTrip { .. } => "rtt-idle".into(),
        }
    }

    /// The figures to compare, most telling first, and whether more is better.
    pub fn headline(&self) -> &'static [(&'static str, bool)] {
        match self {
            Self::Flood { .. } => &[("delivered_mpps", true), ("busy_ns_per_frame", false)],
            Self::Tcp { .. } => &[("gbit_per_s", true), ("busy_ns_per_kibibyte", false)],
            Self::RoundTrip { .. } => &[
                ("mean_us", false),
                ("p50_us", false),
                ("p99_us", false),
                ("p999_us", false),
            ],
        }
    }

    /// Measures it once on a fresh test bed.
    pub fn measure(&self, datapath: &Datapath, scratch: &Path, timing: Timing) -> Result<Figures> {
        match *self {
            Self::Flood {
                direction: Direction::ToWire,
                length,
            } => {
                let scene = Scene::with_sink(datapath, scratch, 1)?;
                flood_to_wire(&scene, length, timing)
            }
            Self::Flood {
                direction: Direction::ToGuest,
                length,
            } => {
                let scene = Scene::with_bare_wire(datapath, scratch, 1)?;
                offer_to_guest(&scene, length, Pace::Flood, timing)
            }
            Self::Tcp { direction, streams } => {
                let scene = Scene::with_stacks(datapath, scratch, 1)?;
                tcp(&scene, direction, streams, timing)
            }
            Self::RoundTrip { pause } => {
                let scene = Scene::with_stacks(datapath, scratch, 1)?;
                round_trip(&scene, pause, timing)
            }
        }
    }
}

fn figures<const N: usize>(pairs: [(&str, f64); N], usage: &Usage) -> Figures {
    let mut figures: Figures = pairs
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect();
    figures.insert("busy_cpus".into(), usage.busy / usage.seconds);
    figures.insert(
        "soft_interrupt_cpus".into(),
        usage.soft_interrupt / usage.seconds,
    );
    figures.insert("steal_cpus".into(), usage.steal / usage.seconds);
    figures.insert("foreign_cpus".into(), usage.foreign / usage.seconds);
    figures.insert("disturbed".into(), f64::from(u8::from(usage.disturbed())));
    figures
}

/// Reads some counters before and after the window.
fn window<const N: usize>(
    timing: Timing,
    mut counters: impl FnMut() -> Result<[u64; N]>,
) -> Result<([f64; N], Usage)> {
    std::thread::sleep(timing.warm_up);
    let sample = Sample::take()?;
    let (before, opened) = (counters()?, Instant::now());
    std::thread::sleep(timing.window);
    let (after, seconds) = (counters()?, opened.elapsed().as_secs_f64());
    let usage = sample.usage()?;
    let mut rates = [0.0; N];
    for (rate, (after, before)) in rates.iter_mut().zip(after.iter().zip(before)) {
        *rate = after.saturating_sub(before) as f64 / seconds;
    }
    Ok((rates, usage))
}

fn flood_to_wire(scene: &Scene, length: usize, timing: Timing) -> Result<Figures> {
    let sender = guest_sender(&scene.datapath.guest, length)?;
    let ([sent, delivered], usage) = window(timing, || Ok([sender.count(), scene.sunk()?]))?;
    sender.stop()?;
    if delivered == 0.0 {
        bail!("no frame reached the wire");
    }
    Ok(figures(
        [
            ("offered_mpps", sent / 1e6),
            ("delivered_mpps", delivered / 1e6),
            (
                "busy_ns_per_frame",
                usage.busy / usage.seconds / delivered * 1e9,
            ),
        ],
        &usage,
    ))
}

/// Offers load from the wire for one window.
fn offer_to_guest(scene: &Scene, length: usize, pace: Pace, timing: Timing) -> Result<Figures> {
    let receiver = guest_receiver(&scene.datapath.guest, length)?;
    let sender = wire_sender(&scene.far, FAR_DEVICE, length, scene.vlan, pace, u64::MAX)?;
    let ([sent, delivered], usage) = window(timing, || Ok([sender.count(), receiver.count()]))?;
    sender.stop()?;
    receiver.stop()?;
    if delivered == 0.0 {
        bail!("no frame reached the guest");
    }
    Ok(figures(
        [
            ("offered_mpps", sent / 1e6),
            ("delivered_mpps", delivered / 1e6),
            (
                "busy_ns_per_frame",
                usage.busy / usage.seconds / delivered * 1e9,
            ),
        ],
        &usage,
    ))
}

/// Bulk data over real TCP; counts what applications receive.
fn tcp(scene: &Scene, direction: Direction, streams: usize, timing: Timing) -> Result<Figures> {
    const PORT: u16 = 5201;
    let guest = scene
        .guest
        .as_ref()
        .context("this scene has no guest stack")?;
    let listener = scene
        .far
        .run(|| TcpListener::bind(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, PORT)))??;
    let mut workers = Vec::new();
    let mut receivers = Vec::new();
    for _ in 0..streams {
        let near = guest.run(|| TcpStream::connect((FAR_IP, PORT)))??;
        let (far, _) = listener.accept()?;
        let (sender, receiver) = match direction {
            Direction::ToWire => (near, far),
            Direction::ToGuest => (far, near),
        };
        workers.push(stream_sender(sender)?);
        receivers.push(stream_receiver(receiver)?);
    }
    let ([rate], usage) = window(timing, || Ok([receivers.iter().map(Worker::count).sum()]))?;
    for worker in workers.into_iter().chain(receivers) {
        worker.stop()?;
    }
    if rate == 0.0 {
        bail!("no data arrived");
    }
    Ok(figures(
        [
            ("gbit_per_s", rate * 8.0 / 1e9),
            (
                "busy_ns_per_kibibyte",
                usage.busy / usage.seconds / rate * 1024.0 * 1e9,
            ),
        ],
        &usage,
    ))
}

/// Times a socket waits, so that threads look at their stop flag.
const PATIENCE: Duration = Duration::from_millis(50);
const CHUNK: usize = 256 << 10;

fn stream_sender(mut stream: TcpStream) -> Result<Worker> {
    stream.set_write_timeout(Some(PATIENCE))?;
    Worker::start("tcp-sender", move |stop, count| {
        let data = vec![0x5a; CHUNK];
        while !stop.load(Ordering::Relaxed) {
            match stream.write(&data) {
                Ok(sent) => _ = count.fetch_add(sent as u64, Ordering::Relaxed),
                // The receiver may be stopped first.
                Err(error) if stop.load(Ordering::Relaxed) || is_timeout(&error) => {}
                Err(error) => return Err(error).context("TCP sender"),
            }
        }
        Ok(())
    })
}

fn stream_receiver(mut stream: TcpStream) -> Result<Worker> {
    stream.set_read_timeout(Some(PATIENCE))?;
    Worker::start("tcp-receiver", move |stop, count| {
        let mut data = vec![0; CHUNK];
        while !stop.load(Ordering::Relaxed) {
            match stream.read(&mut data) {
                Ok(0) => break,
                Ok(taken) => _ = count.fetch_add(taken as u64, Ordering::Relaxed),
                Err(error) if stop.load(Ordering::Relaxed) || is_timeout(&error) => {}
                Err(error) => return Err(error).context("TCP receiver"),
            }
        }
        Ok(())
    })
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(
        error.kind(),
        ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
    )
}

/// Echo round trips as an application in the guest sees them.
fn round_trip(scene: &Scene, pause: Duration, timing: Timing) -> Result<Figures> {
    let guest = Arc::clone(
        scene
            .guest
            .as_ref()
            .context("this scene has no guest stack")?,
    );
    let (hand_over, samples) = std::sync::mpsc::channel();
    let prober = Worker::start("prober", move |stop, count| {
        let times = probe(&guest, pause, stop, |answered| {
            count.store(answered, Ordering::Relaxed)
        })?;
        hand_over
            .send(times)
            .context("nobody waits for the round trips")
    })?;
    let mut from = 0;
    let mut to = 0;
    let (_, usage) = window(timing, || {
        from = to;
        to = prober.count();
        Ok([to])
    })?;
    prober.stop()?;
    let (times, lost) = samples.recv()?;
    let mut times = times
        .get(from as usize..(to as usize).min(times.len()))
        .unwrap_or_default()
        .to_vec();
    times.sort_by(f64::total_cmp);
    let at = |share| quantile(&times, share).context("no echo was answered in the window");
    Ok(figures(
        [
            ("mean_us", times.iter().sum::<f64>() / times.len() as f64),
            ("p50_us", at(0.5)?),
            ("p90_us", at(0.9)?),
            ("p99_us", at(0.99)?),
            ("p999_us", at(0.999)?),
            ("samples", times.len() as f64),
            ("lost", lost as f64),
        ],
        &usage,
    ))
}

/// Sends echo requests until stopped; the round trips in microseconds, and how many were lost.
fn probe(
    guest: &Namespace,
    pause: Duration,
    stop: &AtomicBool,
    mut answered: impl FnMut(u64),
) -> Result<(Vec<f64>, u64)> {
    guest.enter()?;
    let icmp = socket(
        AddressFamily::Inet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Icmp,
    )?;
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
                    if is_answer(
                        buffer.get(..taken).unwrap_or_default(),
                        identifier,
                        sequence,
                    ) =>
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
        .map(|pair| {
            pair.iter()
                .fold(0, |word, &octet| word << 8 | u32::from(octet))
        })
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
    let header = packet
        .first()
        .map_or(0, |first| usize::from(first & 0x0f) * 4);
    let message = packet.get(header..).unwrap_or_default();
    message.first() == Some(&0)
        && message.get(4..6) == Some(&identifier)
        && message.get(6..8) == Some(&sequence.to_be_bytes())
}
