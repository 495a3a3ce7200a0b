//! Frames in memory: what tests and instruction counts use where a kernel would
//! only add noise. Faults are the part of [`FaultyPort`](super::FaultyPort).

use crate::frame::edit::HEADROOM;
use crate::frame::{FrameBuffer, Tag, VnetHeader};
use crate::sys::packet::{BURST, Burst, Received};
use nix::errno::Errno;

/// A device that replays the frames it was given, a burst each time it is read,
/// and counts or keeps what is sent to it.
#[derive(Debug, Default)]
pub struct MemoryPort {
    incoming: Vec<Incoming>,
    /// Bursts still to be handed out.
    bursts: usize,
    /// Packets accepted.
    pub sent_packets: u64,
    /// Bytes of packets accepted, virtio headers included.
    pub sent_bytes: u64,
    /// When set, accepted packets are kept here.
    pub kept: Option<Vec<Vec<u8>>>,
    /// Answers to the next packets: `Some` refuses one. When empty, all go.
    pub refusals: Vec<Option<Errno>>,
}

#[derive(Debug)]
struct Incoming {
    pristine: Vec<u8>,
    space: Vec<u8>,
    stripped: Option<Tag>,
    header: VnetHeader,
}

impl MemoryPort {
    /// Adds a frame to the burst that is replayed; at most [`BURST`] are.
    pub fn add(&mut self, frame: &[u8], stripped: Option<Tag>, header: VnetHeader) {
        let mut space = vec![0; HEADROOM];
        space.extend(frame);
        self.incoming.push(Incoming { pristine: frame.to_vec(), space, stripped, header });
    }

    /// Replays the burst this many times.
    pub fn replay(&mut self, bursts: usize) {
        self.bursts = bursts;
    }

    pub(super) fn is_ready(&self) -> bool {
        self.bursts > 0
    }

    pub(super) fn receive<'a>(&'a mut self, burst: &mut Burst<'a>) -> u64 {
        if self.bursts == 0 {
            return 0;
        }
        for incoming in self.incoming.iter_mut().take(BURST) {
            if let Some(frame) = incoming.space.get_mut(HEADROOM..) {
                frame.copy_from_slice(&incoming.pristine);
            }
            if let Some(buffer) = FrameBuffer::new(&mut incoming.space, HEADROOM) {
                burst.push(Received {
                    buffer,
                    stripped: incoming.stripped,
                    header: incoming.header,
                });
            }
        }
        0
    }

    pub(super) fn release(&mut self) {
        self.bursts = self.bursts.saturating_sub(1);
    }

    pub(super) fn send(&mut self, packets: &[&[u8]]) -> Result<usize, Errno> {
        for (position, packet) in packets.iter().enumerate() {
            if let Some(Some(errno)) = self.refusals.first().copied() {
                if position > 0 {
                    return Ok(position);
                }
                self.refusals.remove(0);
                return Err(errno);
            }
            if !self.refusals.is_empty() {
                self.refusals.remove(0);
            }
            self.sent_packets += 1;
            self.sent_bytes += packet.len() as u64;
            if let Some(kept) = &mut self.kept {
                kept.push(packet.to_vec());
            }
        }
        Ok(packets.len())
    }
}
