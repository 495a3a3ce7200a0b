//! A device whose every answer a test decides: the place for faults the kernel will
//! not produce on demand.
//!
//! It answers as `sendmmsg` does: so many packets taken, or an error if the first one
//! was refused (`___sys_sendmsg` in `net/socket.c`: an error behind the first packet
//! ends the call early, and the next call meets it again). So the loop over partial
//! answers in [`Device::transmit`](super::Device::transmit) and all behind it are the
//! ones that run in a switch. The script is shared: a test feeds it and reads it while
//! a worker has the device.

use crate::frame::edit::HEADROOM;
use crate::frame::{FrameBuffer, Tag, VnetHeader};
use crate::sys::packet::{BURST, Burst, Received};
use nix::errno::Errno;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What comes next out of the device's ring.
#[derive(Debug)]
pub enum Arrival {
    /// A frame.
    Frame {
        /// Its bytes.
        bytes: Vec<u8>,
        /// The tag the kernel took out of them.
        stripped: Option<Tag>,
        /// Its virtio header.
        header: VnetHeader,
    },
    /// A frame that was announced and cannot be had: a super-frame whose queue had no
    /// room, or that a read error has taken.
    Lost,
    /// The ring is empty, for one look.
    Pause,
}

/// What becomes of the next packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// It goes out.
    Take,
    /// The call ends before it without a word; nothing if it is the first.
    Stop,
    /// It is refused.
    Refuse(Errno),
    /// It is refused, and so are all behind it: the device is gone.
    Leave(Errno),
}

/// What happens to a device, and what has happened.
#[derive(Debug, Default)]
pub struct Script {
    /// What has arrived and was not received yet.
    pub arriving: VecDeque<Arrival>,
    /// What becomes of the coming packets; when empty, all go out.
    pub answers: VecDeque<Answer>,
    /// Every packet is refused so.
    pub left: Option<Errno>,
    /// Packets that went out, virtio headers included.
    pub taken: Vec<Vec<u8>>,
    /// Packets that were refused, and why.
    pub refused: Vec<(Vec<u8>, Errno)>,
}

/// The device; a clone is a second handle to its script.
#[derive(Debug, Default)]
pub struct FaultyPort {
    script: Arc<Mutex<Script>>,
    /// Frames of the burst that is under way.
    lent: Vec<(Vec<u8>, Option<Tag>, VnetHeader)>,
}

impl Clone for FaultyPort {
    fn clone(&self) -> Self {
        Self { script: Arc::clone(&self.script), lent: Vec::new() }
    }
}

impl FaultyPort {
    /// Slots its ring would have; more may wait.
    pub const SLOTS: usize = 4096;

    /// Its script. A worker that has the device waits meanwhile.
    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_ready(&self) -> bool {
        !self.script().arriving.is_empty()
    }

    pub(super) fn waiting(&self) -> usize {
        let script = self.script();
        script.arriving.iter().filter(|arrival| !matches!(arrival, Arrival::Pause)).count()
    }

    pub(super) fn receive<'a>(&'a mut self, burst: &mut Burst<'a>) -> u64 {
        let mut lost = 0;
        let mut script = self.script.lock().unwrap_or_else(PoisonError::into_inner);
        while self.lent.len() < BURST {
            match script.arriving.pop_front() {
                Some(Arrival::Frame { bytes, stripped, header }) => {
                    let space = [vec![0; HEADROOM], bytes].concat();
                    self.lent.push((space, stripped, header));
                }
                Some(Arrival::Lost) => lost += 1,
                Some(Arrival::Pause) | None => break,
            }
        }
        drop(script);
        for (space, stripped, header) in &mut self.lent {
            if let Some(buffer) = FrameBuffer::new(space, HEADROOM) {
                burst.push(Received { buffer, stripped: *stripped, header: *header });
            }
        }
        lost
    }

    pub(super) fn release(&mut self) {
        self.lent.clear();
    }

    pub(super) fn send(&mut self, packets: &[&[u8]]) -> Result<usize, Errno> {
        let mut script = self.script();
        for (position, packet) in packets.iter().enumerate() {
            let first = position == 0;
            let answer = match script.left {
                Some(errno) => Answer::Refuse(errno),
                None => script.answers.front().copied().unwrap_or(Answer::Take),
            };
            match answer {
                Answer::Take => script.taken.push(packet.to_vec()),
                Answer::Stop if first => script.taken.push(packet.to_vec()),
                Answer::Stop => {
                    script.answers.pop_front();
                    return Ok(position);
                }
                Answer::Refuse(_) | Answer::Leave(_) if !first => return Ok(position),
                Answer::Refuse(errno) | Answer::Leave(errno) => {
                    if matches!(answer, Answer::Leave(_)) {
                        script.left = Some(errno);
                    }
                    script.refused.push((packet.to_vec(), errno));
                    script.answers.pop_front();
                    return Err(errno);
                }
            }
            script.answers.pop_front();
        }
        Ok(packets.len())
    }
}
