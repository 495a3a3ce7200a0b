//! The programs, apart from the uplink filter.
//!
//! [`seal_program`] guards taps. The rest imitates, for tests and benches, what
//! stands around the switch: VLAN devices and a hub at the far end of the uplink
//! (these kernels may lack 8021q), and sinks that count.
//!
//! The kernel takes an outer 0x8100 or 0x88a8 tag out of the bytes before tc
//! ingress runs (`skb_vlan_untag`), so programs look for it in the context; the
//! helpers pop and push there first and move an inner tag between the bytes and
//! the context as needed (net/core/skbuff.c, `skb_vlan_pop`, `skb_vlan_push`). They
//! know no other TPID: pushing 0x9100 silently writes 0x8100 (net/core/filter.c).

use super::assembler::{
    Alu, AssemblyError, Condition, Helper, Instruction, Label, Program, R0, R1, R2, R3, R6, R7,
    R10, Register, Width,
};
use super::skb;
use std::os::fd::BorrowedFd;

// include/uapi/linux/pkt_cls.h.
const TC_ACT_OK: i32 = 0;
const TC_ACT_SHOT: i32 = 2;
/// `enum xdp_action`, include/uapi/linux/bpf.h.
const XDP_DROP: i32 = 1;

/// Index of the frames in the counters of [`xdp_count_drop_program`] and
/// [`tc_count_drop_program`].
pub const COUNTER_FRAMES: u32 = 0;
/// Index of the bytes in those counters.
pub const COUNTER_BYTES: u32 = 1;

/// A tag as it stands on the wire, less its priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TaggedVlan {
    /// 0x8100 or 0x88a8: what the kernel's helpers know.
    pub tpid: u16,
    /// 0..=4095; when pushed, PCP and DEI may stand in the upper four bits.
    pub vid: u16,
}

/// One branch of [`vlan_pop_redirect`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PopRule {
    /// The outermost tag, popped.
    pub outer: TaggedVlan,
    /// The next tag, popped as well. `None`: whatever follows is left alone.
    pub inner: Option<TaggedVlan>,
    /// Interface the frame is sent from.
    pub target: u32,
}

/// A tc program that drops every frame: put at a tap's ingress it keeps guest
/// frames from the host's stack, after AF_PACKET has seen them.
///
/// # Errors
/// None: the signature is that of all programs.
pub fn seal_program() -> Result<Vec<Instruction>, AssemblyError> {
    let mut program = Program::new();
    program.mov(R0, TC_ACT_SHOT).exit();
    program.finish()
}

/// An XDP program that drops every frame, before AF_PACKET.
///
/// # Errors
/// None: the signature is that of all programs.
pub fn xdp_drop_program() -> Result<Vec<Instruction>, AssemblyError> {
    let mut program = Program::new();
    program.mov(R0, XDP_DROP).exit();
    program.finish()
}

/// An XDP program that counts frames and bytes (linear part) in a
/// [`super::PerCpuArrayMap`] of two entries or more, then drops.
///
/// # Errors
/// None: the signature is that of all programs.
pub fn xdp_count_drop_program(counters: BorrowedFd<'_>) -> Result<Vec<Instruction>, AssemblyError> {
    // struct xdp_md: data and data_end, at 0 and 4, are addresses to the verifier.
    let mut program = Program::new();
    program.load(Width::Word, R7, R1, 4).load(Width::Word, R2, R1, 0).alu(Alu::Subtract, R7, R2);
    count(&mut program, counters, COUNTER_BYTES, R7);
    program.mov(R7, 1);
    count(&mut program, counters, COUNTER_FRAMES, R7);
    program.mov(R0, XDP_DROP).exit();
    program.finish()
}

/// A tc program that counts frames (a super-frame is one) and bytes in a
/// [`super::PerCpuArrayMap`] of two entries or more, then drops.
///
/// # Errors
/// None: the signature is that of all programs.
pub fn tc_count_drop_program(counters: BorrowedFd<'_>) -> Result<Vec<Instruction>, AssemblyError> {
    let mut program = Program::new();
    program.load(Width::Word, R7, R1, skb::LEN);
    count(&mut program, counters, COUNTER_BYTES, R7);
    program.mov(R7, 1);
    count(&mut program, counters, COUNTER_FRAMES, R7);
    program.mov(R0, TC_ACT_SHOT).exit();
    program.finish()
}

/// Adds `amount` (kept) to this CPU's copy of counter `index`.
fn count(program: &mut Program, counters: BorrowedFd<'_>, index: u32, amount: Register) {
    let missing = program.label();
    program
        .store(Width::Word, R10, -4, index as i32)
        .load_map(R1, counters)
        .mov(R2, R10)
        .alu(Alu::Add, R2, -4)
        .call(Helper::MapLookup)
        .jump_if(R0, Condition::Equal, 0, missing)
        .load(Width::Double, R1, R0, 0)
        .alu(Alu::Add, R1, amount)
        .store(Width::Double, R0, 0, R1)
        .place(missing);
}

/// A tc program that pushes one tag on every frame, as a VLAN device's egress does.
/// `tci` holds PCP, DEI and VID.
///
/// # Errors
/// None: the signature is that of all programs.
pub fn vlan_push_program(tpid: u16, tci: u16) -> Result<Vec<Instruction>, AssemblyError> {
    let mut program = Program::new();
    let failed = program.label();
    program.mov(R6, R1);
    push_tag(&mut program, TaggedVlan { tpid, vid: tci }, failed);
    program.mov(R0, TC_ACT_OK).exit();
    program.place(failed).mov(R0, TC_ACT_SHOT).exit();
    program.finish()
}

/// A tc program that pops the outermost tag, if there is one, from every frame.
///
/// # Errors
/// None: the signature is that of all programs.
pub fn vlan_pop_program() -> Result<Vec<Instruction>, AssemblyError> {
    let mut program = Program::new();
    let (failed, untagged) = (program.label(), program.label());
    program.mov(R6, R1).load(Width::Word, R2, R6, skb::VLAN_PRESENT);
    program.jump_if(R2, Condition::Equal, 0, untagged);
    pop_tag(&mut program, failed);
    program.place(untagged).mov(R0, TC_ACT_OK).exit();
    program.place(failed).mov(R0, TC_ACT_SHOT).exit();
    program.finish()
}

/// A tc ingress program for the far end of an uplink: the first rule whose tags the
/// frame carries pops them and sends the frame from the rule's interface; frames
/// of no rule go up the stack.
///
/// # Errors
/// Some thousands of rules are more than a program can hold.
pub fn vlan_pop_redirect(rules: &[PopRule]) -> Result<Vec<Instruction>, AssemblyError> {
    let mut program = Program::new();
    let (failed, unclaimed) = (program.label(), program.label());
    program.mov(R6, R1).load(Width::Word, R2, R6, skb::VLAN_PRESENT);
    program.jump_if(R2, Condition::Equal, 0, unclaimed);
    for rule in rules {
        let next = program.label();
        program
            .load(Width::Word, R2, R6, skb::VLAN_PROTO)
            .jump_if(R2, Condition::NotEqual, i32::from(rule.outer.tpid.to_be()), next)
            .load(Width::Word, R2, R6, skb::VLAN_TCI)
            .alu(Alu::And, R2, 0xfff)
            .jump_if(R2, Condition::NotEqual, i32::from(rule.outer.vid), next);
        if let Some(inner) = rule.inner {
            program
                .load_absolute(Width::Half, 12)
                .jump_if(R0, Condition::NotEqual, i32::from(inner.tpid), next)
                .load_absolute(Width::Half, 14)
                .alu(Alu::And, R0, 0xfff)
                .jump_if(R0, Condition::NotEqual, i32::from(inner.vid), next);
            pop_tag(&mut program, failed);
        }
        pop_tag(&mut program, failed);
        redirect(&mut program, rule.target);
        program.place(next);
    }
    program.place(unclaimed).mov(R0, TC_ACT_OK).exit();
    program.place(failed).mov(R0, TC_ACT_SHOT).exit();
    program.finish()
}

/// A tc ingress program for the far end of an uplink: pushes `tags`, given
/// outermost first, and sends the frame from interface `target`.
///
/// # Errors
/// Some thousands of tags are more than a program can hold.
pub fn vlan_push_redirect(
    tags: &[TaggedVlan],
    target: u32,
) -> Result<Vec<Instruction>, AssemblyError> {
    let mut program = Program::new();
    let failed = program.label();
    program.mov(R6, R1);
    for &tag in tags.iter().rev() {
        push_tag(&mut program, tag, failed);
    }
    redirect(&mut program, target);
    program.place(failed).mov(R0, TC_ACT_SHOT).exit();
    program.finish()
}

/// Pushes a tag on the frame of the context in R6.
fn push_tag(program: &mut Program, tag: TaggedVlan, failed: Label) {
    program
        .mov(R1, R6)
        .mov(R2, i32::from(tag.tpid.to_be()))
        .mov(R3, i32::from(tag.vid))
        .call(Helper::VlanPush)
        .jump_if(R0, Condition::NotEqual, 0, failed);
}

/// Pops the outermost tag from the frame of the context in R6.
fn pop_tag(program: &mut Program, failed: Label) {
    program.mov(R1, R6).call(Helper::VlanPop).jump_if(R0, Condition::NotEqual, 0, failed);
}

/// Ends the program: the frame leaves from interface `target`.
fn redirect(program: &mut Program, target: u32) {
    program.mov(R1, target as i32).mov(R2, 0).call(Helper::Redirect).exit();
}
