//! Generators, receivers and the pump: the same code for every datapath.
//!
//! - The guest side is a stand-in for QEMU: one `write` or `read` of virtio header and frame per
//!   frame on the tap's or macvtap's descriptor.
//! - The wire side is an AF_PACKET socket on the uplink's far end. Its send buffer is huge: the
//!   frames a macvtap has queued still belong to the sending socket, and with an ordinary buffer
//!   the generator would be slowed to the receiver's speed there, but not behind a tap.
//! - For real TCP the pump copies frames between the guest port's descriptor and a second tap
//!   whose device is in the guest's namespace, as a virtual machine does.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, bind, setsockopt, socket, sockopt};

use super::kernel::{Burst, HEADER_LENGTH};
use super::machine::Processors;
use super::namespace::Namespace;

/// EtherType of generated frames that are load, not conversation: IEEE local experimental.
pub const LOAD_ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const FAR_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Offset of the EtherType in what the guest's descriptor carries.
const ETHERTYPE_AT: usize = HEADER_LENGTH + 12;
const LARGEST_FRAME: usize = HEADER_LENGTH + 65535 + 18;
/// Frames per `sendmmsg` of the wire's generator.
const BURST: usize = 32;
const SEND_BUFFER: usize = 1 << 30;

/// A thread that makes or takes traffic until it is dropped.
pub struct Worker {
    stop: Arc<AtomicBool>,
    count: Arc<AtomicU64>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Worker {
    /// Starts a named thread; `body` runs until the flag is set and counts what it did.
    pub fn start(
        name: &str,
        body: impl FnOnce(&AtomicBool, &AtomicU64) -> Result<()> + Send + 'static,
    ) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let count = Arc::new(AtomicU64::new(0));
        let (flag, counter) = (Arc::clone(&stop), Arc::clone(&count));
        let thread =
            std::thread::Builder::new().name(name.into()).spawn(move || body(&flag, &counter))?;
        Ok(Self { stop, count, thread: Some(thread) })
    }

    /// Frames or bytes so far.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Waits until it ends by itself; its count, or what went wrong in it.
    pub fn finish(mut self) -> Result<u64> {
        self.join()?;
        Ok(self.count())
    }

    fn join(&mut self) -> Result<()> {
        match self.thread.take() {
            Some(thread) => thread.join().map_err(|_| anyhow!("a traffic thread panicked"))?,
            None => Ok(()),
        }
    }

    /// Stops the thread; the count at its end, or what went wrong in it.
    pub fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.finish()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // Dropped because of an earlier error, which is the one to report.
            let _ = thread.join();
        }
    }
}

/// A load frame of `length` octets (without FCS) from the guest to the far end.
fn frame(length: usize, to: [u8; 6], from: [u8; 6], vlan: Option<u16>) -> Vec<u8> {
    let mut frame = Vec::with_capacity(length + 4);
    frame.extend(to);
    frame.extend(from);
    if let Some(vlan) = vlan {
        frame.extend([0x81, 0x00]);
        frame.extend(vlan.to_be_bytes());
    }
    frame.extend(LOAD_ETHERTYPE);
    let tag = if vlan.is_some() { 4 } else { 0 };
    frame.resize(length + tag, 0x5a);
    frame
}

/// Writes frames of `length` octets to the guest's descriptor, one system call each; stops by
/// itself after `limit` frames. Counts frames taken. A flood is closed-loop, as a virtual machine
/// is: the write does the sending.
pub fn guest_sender(
    guest: &File,
    length: usize,
    pace: Pace,
    limit: u64,
    processors: Processors,
) -> Result<Worker> {
    let mut guest = guest.try_clone()?;
    let mut buffer = vec![0; HEADER_LENGTH];
    buffer.extend(frame(length, FAR_MAC, GUEST_MAC, None));
    Worker::start("guest-sender", move |stop, count| {
        processors.take_generator()?;
        let mut clock = Clock::new(pace);
        let mut sent = 0;
        while !stop.load(Ordering::Relaxed) && sent < limit {
            let now = u64::try_from(clock.wait(stop).min(BURST))?.min(limit - sent);
            for _ in 0..now {
                match guest.write(&buffer) {
                    Ok(_) => sent += 1,
                    Err(error) => {
                        tolerate(error).context("the guest cannot send")?;
                        // Offered and not taken: lost, as far as the guest is concerned.
                        sent += u64::from(!matches!(pace, Pace::Flood));
                    }
                }
                count.store(sent, Ordering::Relaxed);
            }
            clock.sent(now);
        }
        Ok(())
    })
}

/// Reads the guest's descriptor, and counts load frames of exactly `length` octets: a frame
/// whose tag was not removed, or that is not ours, does not count.
pub fn guest_receiver(guest: &File, length: usize) -> Result<Worker> {
    let mut guest = guest.try_clone()?;
    Worker::start("guest-receiver", move |stop, count| {
        let mut buffer = vec![0; LARGEST_FRAME];
        while !stop.load(Ordering::Relaxed) {
            match guest.read(&mut buffer) {
                Ok(taken) => {
                    let wanted = taken == HEADER_LENGTH + length && is_load(&buffer);
                    if wanted {
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    wait_readable(&guest)?
                }
                Err(error) => tolerate(error).context("the guest cannot receive")?,
            }
        }
        Ok(())
    })
}

/// Copies frames from one descriptor to another; load frames are dropped, so that load beside a
/// conversation costs the same guest work whatever the guest's stack would do with it.
pub fn pump(from: &File, to: &File) -> Result<Worker> {
    let mut from = from.try_clone()?;
    let mut to = to.try_clone()?;
    Worker::start("pump", move |stop, count| {
        let mut buffer = vec![0; LARGEST_FRAME];
        while !stop.load(Ordering::Relaxed) {
            match from.read(&mut buffer) {
                Ok(_) if is_load(&buffer) => {}
                Ok(taken) => match to.write(buffer.get(..taken).unwrap_or_default()) {
                    Ok(_) => _ = count.fetch_add(1, Ordering::Relaxed),
                    Err(error) => tolerate(error).context("the pump cannot write")?,
                },
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    wait_readable(&from)?
                }
                Err(error) => tolerate(error).context("the pump cannot read")?,
            }
        }
        Ok(())
    })
}

fn is_load(buffer: &[u8]) -> bool {
    buffer.get(ETHERTYPE_AT..ETHERTYPE_AT + 2) == Some(&LOAD_ETHERTYPE)
}

/// Full queues are part of measuring; anything else ends the run.
fn tolerate(error: std::io::Error) -> std::io::Result<()> {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EAGAIN | Errno::ENOBUFS | Errno::EINTR) => Ok(()),
        _ => Err(error),
    }
}

/// Waits until there is something to read, or long enough to look at the stop flag.
fn wait_readable(file: &File) -> Result<()> {
    let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    match poll(&mut fds, PollTimeout::from(20u16)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// How fast a generator sends.
#[derive(Clone, Copy, Debug)]
pub enum Pace {
    /// As fast as it can.
    Flood,
    /// So many frames a second, evenly, spinning between bursts: open loop.
    Even(f64),
    /// So many frames a second in bursts a millisecond apart, asleep between them: for
    /// measuring processor time, which a spinning generator would use up.
    Gentle(f64),
}

/// Sends load frames of `length` octets (as the guest sees them) from the far end's `device`,
/// tagged if `vlan` is given; stops by itself after `limit` frames. Counts frames sent.
pub fn wire_sender(
    far: &Arc<Namespace>,
    device: &str,
    length: usize,
    vlan: Option<u16>,
    pace: Pace,
    limit: u64,
    processors: Processors,
) -> Result<Worker> {
    let bytes = frame(length, GUEST_MAC, FAR_MAC, vlan);
    let far = Arc::clone(far);
    let device = device.to_owned();
    Worker::start("wire-sender", move |stop, count| {
        far.enter()?;
        processors.take_generator()?;
        let wire = wire_socket(&device)?;
        let mut burst = Burst::new(bytes, BURST);
        let mut clock = Clock::new(pace);
        let mut sent = 0;
        while !stop.load(Ordering::Relaxed) && sent < limit {
            let now =
                clock.wait(stop).min(BURST).min(usize::try_from(limit - sent).unwrap_or(BURST));
            match burst.send(&wire, now) {
                Ok(taken) => {
                    clock.sent(taken as u64);
                    sent += taken as u64;
                    count.store(sent, Ordering::Relaxed);
                }
                Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::EINTR) => {}
                Err(error) => return Err(error).context("the wire's generator cannot send"),
            }
        }
        Ok(())
    })
}

/// A socket that only sends: bound to no protocol it is never offered a frame.
fn wire_socket(device: &str) -> Result<OwnedFd> {
    let wire = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)
        .context("cannot open a packet socket: needs CAP_NET_RAW")?;
    let address = nix::ifaddrs::getifaddrs()?
        .filter(|entry| entry.interface_name == device)
        .find_map(|entry| {
            entry.address.as_ref().and_then(|address| address.as_link_addr().copied())
        })
        .with_context(|| format!("no device {device} at the far end"))?;
    bind(wire.as_raw_fd(), &address)?;
    setsockopt(&wire, sockopt::SndBufForce, &SEND_BUFFER)?;
    Ok(wire)
}

/// Says when the next frames are due.
struct Clock {
    pace: Pace,
    started: Instant,
    sent: f64,
}

impl Clock {
    /// Bursts of an even pace are at most this far apart, so that slow rates are smooth.
    const GRAIN: f64 = 20e-6;

    fn new(pace: Pace) -> Self {
        Self { pace, started: Instant::now(), sent: 0.0 }
    }

    /// Waits until at least one frame is due; how many are.
    fn wait(&self, stop: &AtomicBool) -> usize {
        match self.pace {
            Pace::Flood => BURST,
            Pace::Even(rate) => {
                let least = (rate * Self::GRAIN).clamp(1.0, BURST as f64);
                loop {
                    let due = self.due(rate);
                    if due >= least || stop.load(Ordering::Relaxed) {
                        return due as usize;
                    }
                    std::hint::spin_loop();
                }
            }
            Pace::Gentle(rate) => {
                let due = self.due(rate);
                if due >= 1.0 {
                    return due as usize;
                }
                std::thread::sleep(Duration::from_millis(1));
                self.due(rate) as usize
            }
        }
    }

    fn due(&self, rate: f64) -> f64 {
        self.started.elapsed().as_secs_f64() * rate - self.sent
    }

    fn sent(&mut self, frames: u64) {
        self.sent += frames as f64;
    }
}
