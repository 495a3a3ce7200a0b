//! A network device through AF_PACKET: the uplink, and the netdev side of a tap
//! whose file descriptor the VMM owns.

use crate::sys::bpf::UplinkFilter;
use crate::sys::packet::{PacketError, Receiver, ReceiverOptions, Transmitter};
use std::os::fd::OwnedFd;

/// Slots in the uplink's ring: 8 MiB, a few milliseconds of small frames.
const UPLINK_SLOTS: usize = 4096;
/// Super-frames waiting for the uplink's reader, bytes.
const UPLINK_COPY_QUEUE: usize = 64 << 20;
/// Super-frames waiting for a port's reader, bytes.
const PORT_COPY_QUEUE: usize = 16 << 20;

/// How a device takes part.
#[derive(Debug, Clone, Copy)]
pub enum NetdevOptions<'f> {
    /// The uplink: promiscuous, and only frames the filter claims.
    Uplink(&'f UplinkFilter),
    /// A port: everything its guest sends.
    Port {
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
            NetdevOptions::Uplink(filter) => ReceiverOptions {
                slots: UPLINK_SLOTS,
                copy_queue: UPLINK_COPY_QUEUE,
                promiscuous: true,
                filter: Some(filter),
            },
            NetdevOptions::Port { slots } => ReceiverOptions {
                slots,
                copy_queue: PORT_COPY_QUEUE,
                promiscuous: false,
                filter: None,
            },
        };
        Ok(Self { receiver: Receiver::open(index, &options)?, transmitter })
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
}
