//! The program on the device of a guest without offloads: push and redirect before the
//! kernel has made a socket buffer.
//!
//! It takes plain frames without a tag and leaves all others, by `XDP_PASS`, to the
//! [guest's program](super::FromGuest) behind it, which knows all rules and counts all
//! drops. Both count in the same record: one CPU runs one of them at a time, softirqs off.

use super::writer::{ETHERNET, MACS, TAG, Writer, be};
use super::{Action, FROM_GUEST, GuestRules, PushTag, Reasons};
use crate::sys::bpf::assembler::{
    Alu, AssemblyError, Condition, Helper, Instruction, Label, R0, R1, R2, R3, R6, R7, R8, R9,
    Width,
};
use crate::sys::bpf::filter::TPIDS;
use std::os::fd::BorrowedFd;

// enum xdp_action, include/uapi/linux/bpf.h.
const XDP_DROP: i32 = 1;
const XDP_PASS: i32 = 2;
/// Places in struct xdp_md: to the verifier these are addresses.
const DATA: i16 = 0;
const DATA_END: i16 = 4;

/// What the program is made of.
#[derive(Debug, Clone, Copy)]
pub struct Express<'a> {
    /// What becomes of frames without a tag, and from which addresses.
    pub rules: &'a GuestRules,
    /// Numbers of the reasons.
    pub reasons: &'a Reasons,
    /// The port's records.
    pub records: BorrowedFd<'a>,
    /// The uplink's index (0: not there) and longest frame without a 0x8100 tag, two u32.
    pub uplink: BorrowedFd<'a>,
}

impl Express<'_> {
    /// The program, if there is anything it could do: frames without a tag are sent on.
    /// R6: context, R7: length of the frame, R8 and R9: its begin and end.
    ///
    /// # Errors
    /// None: the signature is that of all programs.
    pub fn program(&self) -> Result<Option<Vec<Instruction>>, AssemblyError> {
        let Action::Rewrite { pop: false, push, copy_priority } = self.rules.untagged else {
            return Ok(None);
        };
        // A frame without a tag has no priority to copy: it is 0.
        let mask = if copy_priority { 0xfff } else { 0xffff };
        let pushed: Vec<PushTag> =
            push.into_iter().flatten().map(|tag| PushTag { tci: tag.tci & mask, ..tag }).collect();
        let growth = TAG * pushed.len() as i32;

        let mut writer = Writer::new(self.records, FROM_GUEST);
        writer.verdict = XDP_DROP;
        let pass = writer.program.label();
        writer
            .program
            .mov(R6, R1)
            // It may be in several pieces, of which only the first can be looked at.
            .call(Helper::BufferLength)
            .mov(R7, R0)
            .load(Width::Word, R8, R6, DATA)
            .load(Width::Word, R9, R6, DATA_END)
            .mov(R2, R8)
            .alu(Alu::Add, R2, ETHERNET)
            .jump_if(R2, Condition::Greater, R9, pass)
            .load(Width::Half, R3, R8, MACS as i16);
        for tpid in TPIDS {
            writer.program.jump_if(R3, Condition::Equal, be(tpid), pass);
        }
        writer.program.load(Width::Word, R1, R8, 6).load(Width::Half, R2, R8, 10);
        writer.compare_sources(&self.rules.sources, pass);
        let outer = pushed.first().map(|tag| tag.tpid);
        writer
            .program
            .load_map_value(R1, self.uplink)
            .load(Width::Word, R9, R1, 0)
            .jump_if(R9, Condition::Equal, 0, pass)
            .load(Width::Word, R2, R1, 4)
            .mov(R3, R7)
            .alu(Alu::Add, R3, growth - if outer == Some(0x8100) { TAG } else { 0 })
            .jump_if(R3, Condition::Greater, R2, pass);
        if !pushed.is_empty() {
            self.push(&mut writer, &pushed, pass);
        }
        writer.count_sent(growth);
        writer.program.mov(R1, R9).mov(R2, 0).call(Helper::Redirect).exit();
        writer.program.place(pass);
        writer.end(XDP_PASS);
        writer.finish().map(Some)
    }

    /// Moves the addresses forward and writes the tags behind them.
    fn push(&self, writer: &mut Writer<'_>, pushed: &[PushTag], pass: Label) {
        let growth = TAG * pushed.len() as i32;
        // No more than a formality: the frame has just grown by it.
        let failed = writer.drop_label(self.reasons.send_failed);
        let from = growth as i16;
        writer
            .program
            .mov(R1, R6)
            .mov(R2, -growth)
            .call(Helper::XdpAdjustHead)
            .jump_if(R0, Condition::NotEqual, 0, pass)
            .load(Width::Word, R8, R6, DATA)
            .load(Width::Word, R2, R6, DATA_END)
            .mov(R1, R8)
            .alu(Alu::Add, R1, ETHERNET + growth)
            .jump_if(R1, Condition::Greater, R2, failed)
            .load(Width::Double, R1, R8, from)
            .load(Width::Word, R2, R8, from + 8)
            .store(Width::Double, R8, 0, R1)
            .store(Width::Word, R8, 8, R2);
        for (position, tag) in pushed.iter().enumerate() {
            let place = (MACS + TAG * position as i32) as i16;
            writer.program.store(Width::Half, R8, place, be(tag.tpid)).store(
                Width::Half,
                R8,
                place + 2,
                be(tag.tci),
            );
        }
    }
}
