//! What a worker moves frames between: one small interface over netdevs, taps we
//! hold ourselves, and memory.
//!
//! A device takes bursts and gives bursts; it knows nothing of VLANs. What may not
//! live here: decisions about frames (`switch`) and when to poll (`dataplane`).

mod faulty;
mod internal;
mod memory;
mod netdev;

pub use faulty::{Answer, Arrival, FaultyPort, Script};
pub use internal::{CALLS as INTERNAL_CALLS, InternalPort};
pub use memory::MemoryPort;
pub use netdev::{NetdevOptions, NetdevPort};

use crate::sys::packet::{BURST, Burst, CopyPool, KernelCounter, Receiver, SendSpace, Transmitter};
use nix::errno::Errno;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

/// Something frames come from and go to.
#[derive(Debug)]
pub enum Device {
    /// A network device: the uplink, a VM's tap, a container's veth.
    Netdev(NetdevPort),
    /// A tap whose file descriptor is ours (`internal:NAME`).
    Internal(InternalPort),
    /// Frames in memory, for tests and instruction counts.
    Memory(MemoryPort),
    /// Frames and faults as a test wants them.
    Faulty(FaultyPort),
}

impl Device {
    /// Whether frames may be waiting; must not cost a system call to say no.
    #[inline]
    pub fn is_ready(&self) -> bool {
        match self {
            Self::Netdev(port) => port.receiver.is_ready(),
            Self::Internal(_) => true,
            Self::Memory(port) => port.is_ready(),
            Self::Faulty(port) => port.is_ready(),
        }
    }

    /// Whether a whole burst waits; costs no system call.
    #[inline]
    pub fn has_burst(&self) -> bool {
        match self {
            Self::Netdev(port) => port.receiver.has_burst(),
            Self::Faulty(port) => port.waiting() >= BURST,
            Self::Internal(_) | Self::Memory(_) => false,
        }
    }

    /// Frames that wait to be received, where that can be told.
    pub fn waiting(&self) -> usize {
        match self {
            Self::Netdev(port) => port.receiver.waiting(),
            Self::Faulty(port) => port.waiting(),
            Self::Internal(_) | Self::Memory(_) => 0,
        }
    }

    /// How many of these wait on the socket's queue, as no slot has room for them.
    pub fn waiting_copies(&self) -> usize {
        match self {
            Self::Netdev(port) => port.receiver.waiting_copies(),
            Self::Internal(_) | Self::Memory(_) | Self::Faulty(_) => 0,
        }
    }

    /// The share of the receive ring that is full, in thousandths.
    pub fn ring_fill(&self) -> u32 {
        match self {
            Self::Netdev(port) => {
                let receiver = &port.receiver;
                // What was received and not released yet is no backlog any more.
                (receiver.waiting() * 1000 / receiver.slots()) as u32
            }
            Self::Faulty(port) => (port.waiting() * 1000 / FaultyPort::SLOTS) as u32,
            Self::Internal(_) | Self::Memory(_) => 0,
        }
    }

    /// Takes no more frames: those that have arrived can still be received. A tap
    /// held by us keeps them for whoever opens it next.
    pub fn close_entrance(&self) {
        if let Self::Netdev(port) = self {
            // Without memory for a filter frames flow until the socket is closed.
            let _ = port.receiver.close_entrance();
        }
    }

    /// Takes a burst of frames, this many at most from a netdev; the others take what they
    /// take. Returns how many the kernel announced and could
    /// not deliver whole.
    #[inline]
    pub fn receive<'a>(
        &'a mut self,
        copies: &'a mut CopyPool,
        most: usize,
        burst: &mut Burst<'a>,
    ) -> u64 {
        match self {
            Self::Netdev(port) => port.receiver.receive(copies, most, burst),
            Self::Internal(port) => port.receive(copies, burst),
            Self::Memory(port) => port.receive(burst),
            Self::Faulty(port) => port.receive(burst),
        }
    }

    /// Gives the memory of the last burst back.
    #[inline]
    pub fn release(&mut self) {
        match self {
            Self::Netdev(port) => port.receiver.release(),
            Self::Internal(_) => {}
            Self::Memory(port) => port.release(),
            Self::Faulty(port) => port.release(),
        }
    }

    /// Sends packets (virtio header and frame) in order. `refused` is told the
    /// position of each packet the kernel would not take and why, and says
    /// whether to go on; when it breaks, the packets behind are not tried.
    #[inline]
    pub fn transmit(
        &mut self,
        packets: &[&[u8]],
        space: &mut SendSpace,
        mut refused: impl FnMut(usize, Errno) -> ControlFlow<()>,
    ) {
        let mut next = 0;
        let mut loaded = space.load(packets);
        while next < packets.len() {
            let sent = match self {
                Self::Netdev(port) => loaded.send_from(&port.transmitter, next),
                Self::Internal(port) => port.send(packets.get(next..).unwrap_or_default()),
                Self::Memory(port) => port.send(packets.get(next..).unwrap_or_default()),
                Self::Faulty(port) => port.send(packets.get(next..).unwrap_or_default()),
            };
            match sent {
                // Nothing and no error cannot be; go on rather than spin.
                Ok(sent) => next += sent.max(1),
                Err(errno) => {
                    if refused(next, errno).is_break() {
                        return;
                    }
                    next += 1;
                }
            }
        }
    }

    /// The descriptor to poll for incoming frames.
    pub fn poll_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Netdev(port) => Some(port.receiver.as_fd()),
            Self::Internal(port) => Some(port.as_fd()),
            Self::Memory(_) | Self::Faulty(_) => None,
        }
    }

    /// Where in its ring it is, and how many slots that has; zeros without one.
    pub fn position(&self) -> (usize, usize) {
        match self {
            Self::Netdev(port) => (port.receiver.position(), port.receiver.slots()),
            Self::Internal(_) | Self::Memory(_) | Self::Faulty(_) => (0, 0),
        }
    }

    /// Goes on from a position in the ring.
    pub fn resume_at(&mut self, position: usize) {
        if let Self::Netdev(port) = self {
            port.receiver.resume_at(position);
        }
    }

    /// Takes the error a vanished or downed device leaves behind.
    pub fn clear_error(&self) {
        if let Self::Netdev(port) = self {
            port.receiver.clear_error();
        }
    }

    /// The parts that take the kernel time to close, to be dropped side by side.
    pub fn into_parts(self) -> [DevicePart; 2] {
        match self {
            Self::Netdev(port) => {
                [DevicePart::Receiver(port.receiver), DevicePart::Transmitter(port.transmitter)]
            }
            whole => [DevicePart::Whole(whole), DevicePart::Nothing],
        }
    }

    /// A handle to the kernel's own counts of received frames, where it keeps any.
    ///
    /// # Errors
    /// The kernel's, when out of file descriptors.
    pub fn kernel_counter(&self) -> std::io::Result<Option<KernelCounter>> {
        match self {
            Self::Netdev(port) => port.receiver.counter(&port.transmitter).map(Some),
            Self::Internal(_) | Self::Memory(_) | Self::Faulty(_) => Ok(None),
        }
    }
}

/// A part of a device, on its way to being closed.
#[derive(Debug)]
pub enum DevicePart {
    /// A packet socket with its ring.
    Receiver(Receiver),
    /// A sending packet socket.
    Transmitter(Transmitter),
    /// A device of one piece.
    Whole(Device),
    /// What a device of one piece has no use for.
    Nothing,
}

/// State of a device as netlink tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum DeviceState {
    /// Not there.
    Absent = 0,
    /// There, administratively down.
    Down = 1,
    /// Up without carrier: no VMM holds the tap, or the cable is out.
    NoCarrier = 2,
    /// Up with carrier.
    Up = 3,
}

impl DeviceState {
    /// The word users see.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Down => "down",
            Self::NoCarrier => "no_carrier",
            Self::Up => "up",
        }
    }
}

/// What control knows of a device and a worker needs: written by control only.
#[derive(Debug)]
pub struct Link {
    state: AtomicU8,
    mtu: AtomicU32,
}

impl Default for Link {
    fn default() -> Self {
        Self { state: AtomicU8::new(DeviceState::Absent as u8), mtu: AtomicU32::new(u32::MAX) }
    }
}

impl Link {
    /// Publishes the device's state and its MTU in bytes.
    pub fn set(&self, state: DeviceState, mtu: u32) {
        self.mtu.store(mtu, Ordering::Relaxed);
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// The state last published.
    pub fn state(&self) -> DeviceState {
        match self.state.load(Ordering::Relaxed) {
            0 => DeviceState::Absent,
            1 => DeviceState::Down,
            2 => DeviceState::NoCarrier,
            _ => DeviceState::Up,
        }
    }

    /// Whether frames sent now can arrive.
    #[inline]
    pub fn is_up(&self) -> bool {
        self.state.load(Ordering::Relaxed) == DeviceState::Up as u8
    }

    /// The device's MTU in bytes.
    #[inline]
    pub fn mtu(&self) -> u32 {
        self.mtu.load(Ordering::Relaxed)
    }
}
