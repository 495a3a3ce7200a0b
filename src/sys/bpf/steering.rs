//! Steering: which worker's socket a frame from the uplink goes to.
//!
//! With several workers each has a socket on the uplink, and all are in one
//! PACKET_FANOUT group whose program answers with the number of a socket. Ours looks the
//! outermost tag up in an array by (TPID, VID); one entry more stands for untagged
//! frames. The look-up happens once a frame, before the chosen socket's own filter, so a
//! frame reaches exactly one worker whenever an entry changes.
//!
//! In a group (`fanout_demux_bpf`, net/packet/af_packet.c) the context's data starts
//! behind the Ethernet header, unlike in a socket's filter: tags that stand in the bytes
//! are read relative to that header. A frame that cannot be read goes to worker 0.

use super::assembler::{
    Alu, AssemblyError, Condition, Helper, Instruction, Program, R0, R1, R2, R6, R7, R8, R10, Width,
};
use super::filter::{TPIDS, VIDS};
use super::map::ArrayMap;
use super::skb;
use super::syscall::{BpfError, ProgramKind, load};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The entry of frames without a tag, behind those of all tags.
const UNTAGGED: u32 = VIDS * TPIDS.len() as u32;

/// A loaded program and its array.
#[derive(Debug)]
pub struct Steering {
    workers: ArrayMap,
    program: OwnedFd,
}

impl Steering {
    /// Steering that sends everything to worker 0.
    ///
    /// # Errors
    /// [`BpfError::NotPermitted`], or the kernel is out of memory.
    pub fn new() -> Result<Self, BpfError> {
        let workers = ArrayMap::create("vlansw_workers", UNTAGGED + 1)?;
        let instructions = steering_program(workers.as_fd())?;
        let program = load(ProgramKind::SocketFilter, "vlansw_steer", &instructions)?;
        Ok(Self { workers, program })
    }

    /// The program, for a fanout group.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.program.as_fd()
    }

    /// Sends frames whose outermost tag is (`tpid_index`, `vid`) to this worker from the
    /// next frame on.
    ///
    /// # Errors
    /// `tpid_index` above 3 or `vid` above 4095.
    pub fn set(&self, tpid_index: usize, vid: u16, worker: u32) -> Result<(), BpfError> {
        let vid = u32::from(vid);
        if tpid_index >= TPIDS.len() || vid >= VIDS {
            // It would be another tag's entry, or none.
            return Err(BpfError::System {
                action: format!("steer TPID number {tpid_index}, VID {vid}"),
                source: io::Error::from_raw_os_error(libc::EINVAL),
            });
        }
        self.workers.update(tpid_index as u32 * VIDS + vid, worker)
    }

    /// Sends frames without a tag to this worker from the next frame on.
    ///
    /// # Errors
    /// None that a working kernel gives.
    pub fn set_untagged(&self, worker: u32) -> Result<(), BpfError> {
        self.workers.update(UNTAGGED, worker)
    }
}

/// The program; see the module's text.
///
/// # Errors
/// None: the signature is that of all programs.
fn steering_program(workers: BorrowedFd<'_>) -> Result<Vec<Instruction>, AssemblyError> {
    let mut program = Program::new();
    let (in_band, tagged, by_vid, look_up) =
        (program.label(), program.label(), program.label(), program.label());
    let first = program.label();
    // R6 context, R7 the entry, R8 TPID index.
    program.mov(R6, R1).load(Width::Word, R2, R6, skb::VLAN_PRESENT);
    program.jump_if(R2, Condition::Equal, 0, in_band);
    program.load(Width::Word, R7, R6, skb::VLAN_TCI).load(Width::Word, R2, R6, skb::VLAN_PROTO);
    for (index, tpid) in (0..).zip(TPIDS) {
        program.mov(R8, index);
        program.jump_if(R2, Condition::Equal, i32::from(tpid.to_be()), by_vid);
    }
    program.jump(first);

    program.place(in_band).load_from_link_layer(Width::Half, 12);
    for (index, tpid) in (0..).zip(TPIDS) {
        program.mov(R8, index).jump_if(R0, Condition::Equal, i32::from(tpid), tagged);
    }
    program.mov(R7, UNTAGGED as i32).jump(look_up);
    program.place(tagged).load_from_link_layer(Width::Half, 14).mov(R7, R0);

    program.place(by_vid).alu(Alu::And, R7, 0xfff);
    program.alu(Alu::ShiftLeft, R8, VIDS.trailing_zeros() as i32).alu(Alu::Or, R7, R8);
    program.place(look_up).store(Width::Word, R10, -4, R7);
    program.load_map(R1, workers).mov(R2, R10).alu(Alu::Add, R2, -4);
    program.call(Helper::MapLookup).jump_if(R0, Condition::Equal, 0, first);
    program.load(Width::Word, R0, R0, 0).exit();
    program.place(first).mov(R0, 0).exit();
    program.finish()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;

    #[test]
    #[ignore = "needs root: loads a BPF program"]
    fn a_tag_that_cannot_be_has_no_entry() {
        let steering = Steering::new().unwrap();
        steering.set(3, 4095, 1).unwrap();
        for (tpid, vid) in [(4, 0), (0, 4096), (3, u16::MAX), (usize::MAX, 0)] {
            let error = steering.set(tpid, vid, 1).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{tpid} {vid}: {error}");
        }
    }
}
