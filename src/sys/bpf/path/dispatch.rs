//! The uplink's programs: the dispatcher, that of tag pairs, and what lets frames pass; and
//! the filter of a socket whose port changes its path.

use super::writer::{
    BYTES, ETHERNET, KEY, MACS, TC_ACT_UNSPEC, Writer, be, from_network, look_up_key,
};
use super::{FROM_GUEST, Reasons, Record};
use crate::sys::bpf::assembler::{
    Alu, AssemblyError, Condition, Helper, Instruction, Program, R0, R1, R2, R3, R4, R6, R7, R8,
    R10, Width,
};
use crate::sys::bpf::filter::{TPIDS, VIDS};
use crate::sys::bpf::skb;
use std::os::fd::BorrowedFd;

/// What the uplink's programs are made of.
#[derive(Debug, Clone, Copy)]
pub struct Dispatch<'a> {
    /// An array of programs: those of 0x8100 by VID, then those of 0x88a8.
    pub programs: BorrowedFd<'a>,
    /// What the packet path claims, as the uplink filter has it: a bit for each TPID.
    pub claims: BorrowedFd<'a>,
    /// Tagged frames nobody claims, counted by (TPID, VID), as the uplink filter has them.
    pub seen: BorrowedFd<'a>,
    /// The source address of the last of them.
    pub sources: BorrowedFd<'a>,
}

/// Entries of an array of programs by TPID and VID.
pub const DISPATCH_ENTRIES: u32 = 2 * VIDS;

/// The program at the uplink's ingress.
///
/// # Errors
/// None: the signature is that of all programs.
pub fn dispatcher_program(dispatch: &Dispatch<'_>) -> Result<Vec<Instruction>, AssemblyError> {
    let mut program = Program::new();
    let (pass, unclaimed, in_band) = (program.label(), program.label(), program.label());
    // R6 context, R7 the entry: TPID and VID.
    program.mov(R6, R1).load(Width::Word, R2, R6, skb::VLAN_PRESENT);
    program.jump_if(R2, Condition::Equal, 0, in_band);
    program.load(Width::Word, R7, R6, skb::VLAN_TCI).alu(Alu::And, R7, 0xfff);
    let (customer, service) = (program.label(), program.label());
    program.load(Width::Word, R2, R6, skb::VLAN_PROTO);
    program.jump_if(R2, Condition::Equal, be(0x8100), customer);
    program.jump_if(R2, Condition::Equal, be(0x88a8), service).jump(pass);
    program.place(service).alu(Alu::Add, R7, VIDS as i32).place(customer);
    program.mov(R1, R6).load_map(R2, dispatch.programs).mov(R3, R7).call(Helper::TailCall);
    // Nobody's: it did return.
    program.jump(unclaimed);

    // 0x9100 and 0x9200 are the packet path's, if anybody's; a tag the kernel knows is
    // never here but for frames made by others on this host, which have no port either.
    program.place(in_band).load(Width::Word, R2, R6, skb::PROTOCOL);
    let legacy = program.label();
    for (index, tpid) in (0..).zip(TPIDS) {
        program.mov(R7, index * VIDS as i32);
        program.jump_if(R2, Condition::Equal, be(tpid), legacy);
    }
    program.jump(pass);
    program.place(legacy).mov(R1, R6).mov(R2, ETHERNET).mov(R3, R10);
    program.alu(Alu::Add, R3, i32::from(BYTES)).mov(R4, 2).call(Helper::LoadBytes);
    program.jump_if(R0, Condition::NotEqual, 0, pass);
    from_network(&mut program, R1, BYTES);
    program.alu(Alu::And, R1, 0xfff).alu(Alu::Add, R7, R1).store(Width::Word, R10, KEY, R1);
    look_up_key(&mut program, dispatch.claims);
    program.jump_if(R0, Condition::Equal, 0, pass).load(Width::Word, R1, R0, 0);
    program.mov(R2, R7).alu(Alu::ShiftRight, R2, VIDS.trailing_zeros() as i32);
    program.alu(Alu::ShiftRight, R1, R2).jump_if(R1, Condition::AnyBit, 1, pass);

    program.place(unclaimed).store(Width::Word, R10, KEY, R7);
    look_up_key(&mut program, dispatch.seen);
    program.jump_if(R0, Condition::Equal, 0, pass);
    program.mov(R1, 1).add_atomically(R0, 0, R1);
    look_up_key(&mut program, dispatch.sources);
    program.jump_if(R0, Condition::Equal, 0, pass).mov(R8, R0);
    program.mov(R1, R6).mov(R2, MACS / 2).mov(R3, R10);
    program.alu(Alu::Add, R3, i32::from(BYTES)).mov(R4, 6).call(Helper::LoadBytes);
    program.jump_if(R0, Condition::NotEqual, 0, pass);
    // One store, so that an address is never half of two.
    program.mov(R1, 0);
    for byte in 0..6 {
        program.load(Width::Byte, R2, R10, BYTES + byte);
        program.alu(Alu::ShiftLeft, R1, 8).alu(Alu::Or, R1, R2);
    }
    program.load(Width::Double, R2, R8, 0).jump_if(R2, Condition::Equal, R1, pass);
    program.store(Width::Double, R8, 0, R1);
    program.place(pass).mov(R0, TC_ACT_UNSPEC).exit();
    program.finish()
}

/// The program of an outer VLAN whose frames a second tag decides: `programs` has them by
/// the inner TPID and VID, `records` are the uplink's.
///
/// # Errors
/// None: the signature is that of all programs.
pub fn pair_program(
    programs: BorrowedFd<'_>,
    records: BorrowedFd<'_>,
    reasons: &Reasons,
) -> Result<Vec<Instruction>, AssemblyError> {
    let mut writer = Writer::new(records, 0);
    writer.program.mov(R6, R1);
    writer.measure();
    let (customer, service) = (writer.program.label(), writer.program.label());
    let unmapped = writer.drop_label(reasons.unmapped);
    writer
        .program
        .load(Width::Word, R2, R6, skb::PROTOCOL)
        .mov(R8, 0)
        .jump_if(R2, Condition::Equal, be(0x8100), customer)
        .jump_if(R2, Condition::Equal, be(0x88a8), service)
        .jump(unmapped);
    writer.program.place(service).mov(R8, VIDS as i32).place(customer);
    writer.load_bytes(ETHERNET, 2, reasons.malformed);
    from_network(&mut writer.program, R1, BYTES);
    writer.program.alu(Alu::And, R1, 0xfff).alu(Alu::Add, R8, R1);
    writer.program.mov(R1, R6).load_map(R2, programs).mov(R3, R8).call(Helper::TailCall);
    writer.program.jump(unmapped);
    // To the host, as the packet path leaves it.
    writer.verdict = TC_ACT_UNSPEC;
    writer.finish()
}

/// The program of VLANs that the packet path serves.
///
/// # Errors
/// None: the signature is that of all programs.
pub fn pass_program() -> Result<Vec<Instruction>, AssemblyError> {
    let mut program = Program::new();
    program.mov(R0, TC_ACT_UNSPEC).exit();
    program.finish()
}

/// A socket filter for a port that changes its path: `path` is an array of one u32, 1 if
/// frames are the packet path's; what it says is left in the port's record.
///
/// # Errors
/// None: the signature is that of all programs.
pub fn ring_filter(
    path: BorrowedFd<'_>,
    records: BorrowedFd<'_>,
) -> Result<Vec<Instruction>, AssemblyError> {
    let mut program = Program::new();
    let reject = program.label();
    program.load_map_value(R1, path).load(Width::Word, R6, R1, 0);
    program.store(Width::Word, R10, KEY, FROM_GUEST as i32);
    look_up_key(&mut program, records);
    program.jump_if(R0, Condition::Equal, 0, reject);
    program.store(Width::Double, R0, Record::offset(Record::DECISION), R6);
    program.jump_if(R6, Condition::Equal, 0, reject).mov(R0, i32::MAX).exit();
    program.place(reject).mov(R0, 0).exit();
    program.finish()
}
