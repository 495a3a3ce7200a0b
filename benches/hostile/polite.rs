//! The polite guests, and the station that sends their frames back.

#![allow(unsafe_code, reason = "nix binds no packet socket to a protocol")]

use crate::bed::{Bed, FAR, FIRST_VLAN};
use crate::kernel::HEADER_LENGTH;
use crate::statistics::quantile;
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two frames of a guest: 10 000 a second.
const INTERVAL: Duration = Duration::from_micros(100);
const WARM_UP: Duration = Duration::from_millis(500);
/// What has not come back after this is lost.
const PATIENCE: Duration = Duration::from_millis(1500);
/// EtherType of the polite: IEEE local experimental.
const ETHER_TYPE: u16 = 0x88b5;
/// Offset of guest, flag and time behind the Ethernet header.
const CONTENT: usize = 14;

/// What was found.
#[derive(Debug, Default)]
pub struct Figures {
    /// Half of the round trips took no longer, in microseconds.
    pub p50_us: f64,
    /// 99 of 100.
    pub p99_us: f64,
    /// 999 of 1000.
    pub p999_us: f64,
    /// Frames sent in the window.
    pub sent: u64,
    /// Of these, not back.
    pub lost: u64,
    /// Frames a second of the flood.
    pub flood_pps: f64,
}

/// Starts a named thread.
pub fn stoppable(
    name: &str,
    body: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<JoinHandle<Result<()>>> {
    Ok(std::thread::Builder::new().name(name.into()).spawn(body)?)
}

/// A packet socket on a device of the calling thread's namespace, for frames of one
/// EtherType (0: none).
pub fn open_socket(device: &str, ether_type: u16) -> Result<OwnedFd> {
    let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&fd, sockopt::SndBufForce, &(1 << 28))?;
    setsockopt(&fd, sockopt::RcvBufForce, &(1 << 28))?;
    // SAFETY: sockaddr_ll is plain integers; all zero is a valid value.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = ether_type.to_be();
    address.sll_ifindex = nix::net::if_::if_nametoindex(device)? as i32;
    let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
    // SAFETY: the pointer and length describe `address`, which outlives the call.
    let result = unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) };
    Errno::result(result).with_context(|| format!("cannot bind to {device}"))?;
    Ok(fd)
}

/// Lets the polite send and receive for a window, and looks at what came back.
pub fn measure(bed: &Bed, window: Duration) -> Result<Figures> {
    let station = bed.far.run(|| open_socket(FAR, ETHER_TYPE))??;
    let begin = Instant::now();
    let (stop, sent, back) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let opens = begin + WARM_UP;
    std::thread::scope(|scope| {
        let reflector = scope.spawn(|| reflect(station, &stop));
        let reader = scope.spawn(|| receive(bed, begin, &stop, &back));
        let writer = scope.spawn(|| send(bed, begin, opens, opens + window, &sent));
        let written = writer.join();
        let end = Instant::now() + PATIENCE;
        while back.load(Ordering::Relaxed) < sent.load(Ordering::Relaxed) && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        stop.store(true, Ordering::Relaxed);
        let (reflected, times) = (reflector.join(), reader.join());
        let panicked = || anyhow::anyhow!("a polite thread panicked");
        written.map_err(|_| panicked())??;
        reflected.map_err(|_| panicked())??;
        let mut times = times.map_err(|_| panicked())??;
        times.sort_by(f64::total_cmp);
        // Without any that came back it took for ever.
        let at = |share| quantile(&times, share).unwrap_or(f64::INFINITY);
        let sent = sent.load(Ordering::Relaxed);
        Ok(Figures {
            p50_us: at(0.5),
            p99_us: at(0.99),
            p999_us: at(0.999),
            sent,
            lost: sent.saturating_sub(times.len() as u64),
            flood_pps: 0.0,
        })
    })
}

/// One frame of each guest every [`INTERVAL`]; those written before `opens` do not count.
fn send(
    bed: &Bed,
    begin: Instant,
    opens: Instant,
    closes: Instant,
    sent: &AtomicU64,
) -> Result<()> {
    // Sleeps end when they are due, not up to 50 us later.
    nix::sys::prctl::set_timerslack(1)?;
    let mut frame = vec![0; HEADER_LENGTH];
    frame.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2]);
    frame.extend(ETHER_TYPE.to_be_bytes());
    frame.resize(HEADER_LENGTH + 60, 0);
    let mut due = Instant::now();
    loop {
        let now = Instant::now();
        if now >= closes {
            return Ok(());
        }
        if now < due {
            std::thread::sleep(due - now);
            continue;
        }
        due += INTERVAL;
        for (guest, mut file) in bed.polite.iter().enumerate() {
            let now = Instant::now();
            let content = frame.get_mut(HEADER_LENGTH + CONTENT..).context("a short frame")?;
            let nanoseconds = (now - begin).as_nanos() as u64;
            let values = [&[guest as u8, u8::from(now >= opens)], &nanoseconds.to_be_bytes()[..]];
            content.iter_mut().zip(values.concat()).for_each(|(to, from)| *to = from);
            file.write_all(&frame).context("a polite guest cannot send")?;
            if now >= opens {
                sent.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// Sends back whatever comes, in the VLAN of the guest it names.
fn reflect(station: OwnedFd, stop: &AtomicBool) -> Result<()> {
    let mut station = File::from(station);
    let mut buffer = [0; 256];
    while !stop.load(Ordering::Relaxed) {
        if !readable(&[&station])? {
            continue;
        }
        let length = station.read(&mut buffer)?;
        let Some((addresses, rest)) = buffer.get(..length).and_then(|f| f.split_at_checked(12))
        else {
            continue;
        };
        let guest = rest.get(2).copied().unwrap_or_default();
        let vlan = FIRST_VLAN + 1 + u16::from(guest);
        let frame = [addresses, &[0x81, 0], &vlan.to_be_bytes(), rest].concat();
        // Full for a moment: it was not sent, and is tried again.
        while let Err(error) = station.write(&frame) {
            match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EAGAIN | Errno::ENOBUFS | Errno::EINTR) => std::thread::yield_now(),
                _ => return Err(error).context("the station cannot send"),
            }
        }
    }
    Ok(())
}

/// Round trips in microseconds.
fn receive(bed: &Bed, begin: Instant, stop: &AtomicBool, back: &AtomicU64) -> Result<Vec<f64>> {
    let guests: Vec<&File> = bed.polite.iter().collect();
    let mut times = Vec::with_capacity(1 << 20);
    let mut buffer = [0; 2048];
    while !stop.load(Ordering::Relaxed) {
        if !readable(&guests)? {
            continue;
        }
        for mut guest in guests.iter().copied() {
            loop {
                match guest.read(&mut buffer) {
                    Ok(_) => {}
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => return Err(error).context("a polite guest cannot receive"),
                }
                let frame = buffer.get(HEADER_LENGTH..).unwrap_or_default();
                let polite = frame.get(12..14) == Some(&ETHER_TYPE.to_be_bytes());
                let time = frame.get(CONTENT + 2..).and_then(|time| time.first_chunk());
                if let (true, Some(1), Some(time)) = (polite, frame.get(CONTENT + 1), time) {
                    let sent = Duration::from_nanos(u64::from_be_bytes(*time));
                    times.push((begin.elapsed() - sent).as_secs_f64() * 1e6);
                    back.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }
    Ok(times)
}

/// Waits until one can be read, or long enough to look at the flag.
fn readable(files: &[&File]) -> Result<bool> {
    let mut polled: Vec<PollFd<'_>> =
        files.iter().map(|file| PollFd::new(file.as_fd(), PollFlags::POLLIN)).collect();
    match poll(&mut polled, PollTimeout::from(20u16)) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}
