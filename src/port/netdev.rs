//! A network device through AF_PACKET: the uplink, and the netdev side of a tap
//! whose file descriptor the VMM owns.

use crate::sys::bpf::{Steering, UplinkFilter};
use crate::sys::fanout;
use crate::sys::packet::{Filter, PacketError, Receiver, ReceiverOptions, Transmitter};
use std::os::fd::{AsFd, OwnedFd};

/// Slots in the uplink's ring: 16 MiB, a dozen milliseconds of small frames. A worker that
/// has to share its CPU is away for as long.
const UPLINK_SLOTS: usize = 8192;
/// Super-frames waiting for the uplink's reader, bytes.
const UPLINK_COPY_QUEUE: usize = 64 << 20;
/// Super-frames waiting for a port's reader, bytes.
const PORT_COPY_QUEUE: usize = 16 << 20;

/// How a device takes part.
#[derive(Debug, Clone, Copy)]
pub enum NetdevOptions<'f> {
    /// The uplink: promiscuous, and only frames the filter claims.
    Uplink(&'f UplinkFilter),
    /// A part of the uplink, of no use before [`NetdevPort::open_uplink`] has made the
    /// parts a whole.
    UplinkPart,
    /// A port: everything its guest sends.
    Port {
        /// Slots in its ring; a multiple of 64.
        slots: usize,
    },
    /// A port that takes nothing until its filter is replaced.
    ShutPort {
        /// Slots in its ring; a multiple of 64.
        slots: usize,
    },
}

/// A network device.
#[derive(Debug)]
pub struct NetdevPort {
    pub(super) receiver: Receiver,
    pub(super) transmitter: Transmitter,
}

impl NetdevPort {
    /// Attaches to the device with this index.
    ///
    /// # Errors
    /// [`PacketError`] naming the step that failed.
    pub fn open(index: u32, options: NetdevOptions<'_>) -> Result<Self, PacketError> {
        let transmitter = Transmitter::open(index)?;
        let options = match options {
            NetdevOptions::Uplink(filter) => uplink(Filter::Claimed(filter)),
            NetdevOptions::UplinkPart => uplink(Filter::Nothing),
            NetdevOptions::Port { slots } => port(slots, Filter::All),
            NetdevOptions::ShutPort { slots } => port(slots, Filter::Nothing),
        };
        Ok(Self { receiver: Receiver::open(index, &options)?, transmitter })
    }

    /// Attaches to the uplink with this index, or to so many parts of it: then each frame
    /// the filter claims reaches the part the steering names.
    ///
    /// # Errors
    /// [`PacketError`] naming the step that failed. Before Linux 6.13 one is that the
    /// device is down.
    pub fn open_uplink(
        index: u32,
        filter: &UplinkFilter,
        parts: Option<(&Steering, usize)>,
    ) -> Result<Vec<Self>, PacketError> {
        let Some((steering, parts)) = parts else {
            return Ok(vec![Self::open(index, NetdevOptions::Uplink(filter))?]);
        };
        // One after the other: the order in which they are opened is their order.
        let opened: Vec<Self> = (0..parts)
            .map(|_| Self::open(index, NetdevOptions::UplinkPart))
            .collect::<Result<_, _>>()?;
        fanout::form(opened.iter().map(|part| part.receiver.as_fd()), steering, filter)?;
        Ok(opened)
    }

    /// Attaches to the device with this index by a receiving socket that another
    /// process has opened on it, with a ring of this many slots.
    ///
    /// # Errors
    /// [`PacketError`] naming the step that failed.
    pub fn adopt(index: u32, socket: OwnedFd, slots: usize) -> Result<Self, PacketError> {
        let receiver = Receiver::adopt(index, socket, slots)?;
        Ok(Self { receiver, transmitter: Transmitter::open(index)? })
    }

    /// The same for all parts of the uplink, in their order.
    ///
    /// # Errors
    /// [`PacketError`] naming the step that failed, also if they are no whole.
    pub fn adopt_uplink(
        index: u32,
        sockets: Vec<OwnedFd>,
        slots: usize,
    ) -> Result<Vec<Self>, PacketError> {
        let adopted = sockets.into_iter().map(|socket| Self::adopt(index, socket, slots));
        let parts = adopted.collect::<Result<Vec<_>, _>>()?;
        if parts.len() > 1 {
            fanout::check(parts.iter().map(|part| part.receiver.as_fd()))?;
        }
        Ok(parts)
    }
}

fn port(slots: usize, filter: Filter<'_>) -> ReceiverOptions<'_> {
    ReceiverOptions { slots, copy_queue: PORT_COPY_QUEUE, promiscuous: false, filter }
}

fn uplink(filter: Filter<'_>) -> ReceiverOptions<'_> {
    let (slots, copy_queue) = (UPLINK_SLOTS, UPLINK_COPY_QUEUE);
    ReceiverOptions { slots, copy_queue, promiscuous: true, filter }
}
