//! Pieces all programs of the kernel path are written with: measuring, reading tags, popping,
//! counting, and drops that are counted.

use super::{Reasons, Record};
use crate::sys::bpf::assembler::{
    Alu, AssemblyError, Condition, Helper, Instruction, Label, Program, R0, R1, R2, R3, R4, R5, R6,
    R7, R8, R9, R10, Register, Width,
};
use crate::sys::bpf::filter::TPIDS;
use crate::sys::bpf::skb;
use std::os::fd::BorrowedFd;

// include/uapi/linux/pkt_cls.h.
pub(super) const TC_ACT_UNSPEC: i32 = -1;
pub(super) const TC_ACT_SHOT: i32 = 2;

pub(super) const MACS: i32 = 12;
pub(super) const ETHERNET: i32 = 14;
pub(super) const TAG: i32 = 4;
/// EtherTypes and protocol numbers.
pub(super) const IPV4: u16 = 0x0800;
pub(super) const IPV6: u16 = 0x86dd;
pub(super) const TCP: i32 = 6;
pub(super) const UDP: i32 = 17;

/// Places on the stack.
pub(super) const KEY: i16 = -4;
pub(super) const BYTES: i16 = -16;
/// The longest frame on the wire before the edit: the frame, or a super-frame's segment.
pub(super) const LONGEST: i16 = -24;

/// A constant as the context has it.
pub(super) fn be(value: u16) -> i32 {
    i32::from(value.to_be())
}

/// `register = the two bytes at this place of the stack, as a number`.
pub(super) fn from_network(program: &mut Program, register: Register, place: i16) {
    program.load(Width::Byte, register, R10, place).alu(Alu::ShiftLeft, register, 8);
    program.load(Width::Byte, R2, R10, place + 1).alu(Alu::Or, register, R2);
}

/// `R0 = address of the value`, or 0, for the key on the stack.
pub(super) fn look_up_key(program: &mut Program, map: BorrowedFd<'_>) {
    program.load_map(R1, map).mov(R2, R10).alu(Alu::Add, R2, i32::from(KEY));
    program.call(Helper::MapLookup);
}

/// A program that ends in counted drops. R6 is the context, R7 the frame's length on the
/// wire from [`Writer::measure`] on.
pub(super) struct Writer<'a> {
    pub(super) program: Program,
    records: BorrowedFd<'a>,
    entry: u32,
    /// What a drop returns.
    pub(super) verdict: i32,
    /// Reasons that are jumped to, each with its label; whether the packet path could.
    drops: Vec<(u8, bool, Label)>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(records: BorrowedFd<'a>, entry: u32) -> Self {
        Self { program: Program::new(), records, entry, verdict: TC_ACT_SHOT, drops: Vec::new() }
    }

    /// Where a drop for this reason is counted.
    pub(super) fn drop_label(&mut self, reason: u8) -> Label {
        self.label(reason, false)
    }

    /// Where a drop is counted that the packet path would spare.
    pub(super) fn unable_label(&mut self, reason: u8) -> Label {
        self.label(reason, true)
    }

    fn label(&mut self, reason: u8, unable: bool) -> Label {
        let known = self.drops.iter().find(|known| (known.0, known.1) == (reason, unable));
        if let Some((.., label)) = known {
            return *label;
        }
        let label = self.program.label();
        self.drops.push((reason, unable, label));
        label
    }

    pub(super) fn end(&mut self, verdict: i32) {
        self.program.mov(R0, verdict).exit();
    }

    /// `R0 = address of a record`; without one the program ends with a drop.
    pub(super) fn look_up(&mut self, records: BorrowedFd<'_>, entry: u32) {
        let found = self.program.label();
        self.program.store(Width::Word, R10, KEY, entry as i32);
        look_up_key(&mut self.program, records);
        self.program.jump_if(R0, Condition::NotEqual, 0, found);
        self.end(self.verdict);
        self.program.place(found);
    }

    /// `R7 = length on the wire`: with the tag the kernel has taken out.
    pub(super) fn measure(&mut self) {
        let untagged = self.program.label();
        self.program
            .load(Width::Word, R7, R6, skb::LEN)
            .load(Width::Word, R2, R6, skb::VLAN_PRESENT)
            .jump_if(R2, Condition::Equal, 0, untagged)
            .alu(Alu::Add, R7, TAG)
            .place(untagged);
    }

    /// Drops a frame that ends inside a tag or right behind one. R7 must be known.
    pub(super) fn check_tags(&mut self, malformed: u8) {
        let whole = self.program.label();
        let cut = self.drop_label(malformed);
        // As many tags as anybody looks at, and an EtherType.
        let enough = ETHERNET + 3 * TAG;
        self.program
            .jump_if(R7, Condition::GreaterOrEqual, enough, whole)
            .load(Width::Word, R8, R6, skb::LEN)
            .load(Width::Word, R9, R6, skb::PROTOCOL);
        for tags in 1..=3 {
            let tagged = self.program.label();
            self.jump_if_tpid(R9, tagged);
            self.program.jump(whole).place(tagged);
            let needed = ETHERNET + tags * TAG;
            self.program.jump_if(R8, Condition::Less, needed, cut);
            self.program.mov(R2, needed - 2);
            self.load_bytes_from_r2(2, cut);
            self.program.load(Width::Half, R9, R10, BYTES);
        }
        self.program.place(whole);
    }

    /// Reads bytes of the frame, without the tag that was taken out, to the stack.
    pub(super) fn load_bytes(&mut self, offset: i32, length: i32, reason: u8) {
        let short = self.drop_label(reason);
        self.program.mov(R2, offset);
        self.load_bytes_from_r2(length, short);
    }

    /// The same from the offset in R2; goes on at `short` if the frame ends before.
    fn load_bytes_from_r2(&mut self, length: i32, short: Label) {
        self.program
            .mov(R1, R6)
            .mov(R3, R10)
            .alu(Alu::Add, R3, i32::from(BYTES))
            .mov(R4, length)
            .call(Helper::LoadBytes)
            .jump_if(R0, Condition::NotEqual, 0, short);
    }

    /// Jumps if the register holds a TPID, as it stands on the wire.
    pub(super) fn jump_if_tpid(&mut self, register: Register, target: Label) {
        for tpid in TPIDS {
            self.program.jump_if(register, Condition::Equal, be(tpid), target);
        }
    }

    /// `R2 = EtherType behind the outermost tag`, of a frame that has one.
    pub(super) fn next_type(&mut self, malformed: u8) {
        let (taken_out, read) = (self.program.label(), self.program.label());
        self.program.load(Width::Word, R2, R6, skb::VLAN_PRESENT).jump_if(
            R2,
            Condition::NotEqual,
            0,
            taken_out,
        );
        self.load_bytes(ETHERNET + 2, 2, malformed);
        self.program
            .load(Width::Half, R2, R10, BYTES)
            .jump(read)
            .place(taken_out)
            .load(Width::Word, R2, R6, skb::PROTOCOL)
            .place(read);
    }

    /// `R8 = TCI`, `R5 = TPID` in network order of the guest's outermost tag, and the
    /// EtherType behind it on the stack; goes on at `untagged` without one, R8 being 0.
    pub(super) fn own_tag(&mut self, untagged: Label, malformed: u8) {
        let (taken_out, in_band, read) =
            (self.program.label(), self.program.label(), self.program.label());
        self.program
            .mov(R8, 0)
            .load(Width::Word, R2, R6, skb::VLAN_PRESENT)
            .jump_if(R2, Condition::NotEqual, 0, taken_out)
            .load(Width::Word, R5, R6, skb::PROTOCOL);
        self.jump_if_tpid(R5, in_band);
        self.program.jump(untagged).place(in_band);
        self.load_bytes(ETHERNET, 4, malformed);
        from_network(&mut self.program, R8, BYTES);
        self.program
            .load(Width::Word, R5, R6, skb::PROTOCOL)
            .jump(read)
            .place(taken_out)
            .load(Width::Word, R8, R6, skb::VLAN_TCI)
            .load(Width::Word, R5, R6, skb::VLAN_PROTO)
            .load(Width::Word, R2, R6, skb::PROTOCOL)
            .store(Width::Half, R10, BYTES + 2, R2)
            .place(read);
    }

    pub(super) fn check_sources(&mut self, sources: &[[u8; 6]], spoofed: u8) {
        if sources.is_empty() {
            return;
        }
        let refused = self.drop_label(spoofed);
        self.program.mov(R2, MACS / 2);
        self.load_bytes_from_r2(6, refused);
        self.program.load(Width::Word, R1, R10, BYTES).load(Width::Half, R2, R10, BYTES + 4);
        self.compare_sources(sources, refused);
    }

    /// Goes on at `refused` if the address whose first four bytes are in R1 and the others in
    /// R2 is none of these; without any, never.
    pub(super) fn compare_sources(&mut self, sources: &[[u8; 6]], refused: Label) {
        if sources.is_empty() {
            return;
        }
        let known = self.program.label();
        for &[a, b, c, d, e, f] in sources {
            let next = self.program.label();
            // Unlike a constant of a jump, one of 32 bits is not to be sign-extended.
            self.program
                .mov(
                    R3,
                    i32::from(u16::from_ne_bytes(if cfg!(target_endian = "little") {
                        [c, d]
                    } else {
                        [a, b]
                    })),
                )
                .alu(Alu::ShiftLeft, R3, 16)
                .alu(
                    Alu::Or,
                    R3,
                    i32::from(u16::from_ne_bytes(if cfg!(target_endian = "little") {
                        [a, b]
                    } else {
                        [c, d]
                    })),
                )
                .jump_if(R1, Condition::NotEqual, R3, next)
                .jump_if(R2, Condition::Equal, i32::from(u16::from_ne_bytes([e, f])), known)
                .place(next);
        }
        self.program.jump(refused).place(known);
    }

    /// Leaves on the stack how long the longest frame is that goes on the wire before the
    /// edit: this one, or a segment of it. Segments of what cannot be read count as short.
    pub(super) fn measure_segments(&mut self, reasons: &Reasons) {
        let unable = self.unable_label(reasons.bad_offload);
        let (whole, end) = (self.program.label(), self.program.label());
        self.program
            .store(Width::Double, R10, LONGEST, R7)
            .load(Width::Word, R5, R6, skb::GSO_SIZE)
            .jump_if(R5, Condition::Equal, 0, whole)
            // Until it is known: no edit takes more than that off.
            .store(Width::Double, R10, LONGEST, ETHERNET)
            .load(Width::Word, R9, R6, skb::PROTOCOL)
            // R8: where the network header is, in the bytes.
            .mov(R8, ETHERNET);
        for _ in 0..2 {
            let (tag, network) = (self.program.label(), self.program.label());
            for legacy in [0x9100, 0x9200] {
                // The kernel does not look behind these, and cannot segment.
                self.program.jump_if(R9, Condition::Equal, be(legacy), unable);
            }
            self.program
                .jump_if(R9, Condition::Equal, be(0x8100), tag)
                .jump_if(R9, Condition::NotEqual, be(0x88a8), network)
                .place(tag)
                .mov(R2, R8)
                .alu(Alu::Add, R2, 2);
            self.load_bytes_from_r2(2, end);
            self.program.load(Width::Half, R9, R10, BYTES).alu(Alu::Add, R8, TAG).place(network);
        }
        let (ipv4, ipv6, transport) =
            (self.program.label(), self.program.label(), self.program.label());
        self.program
            .jump_if(R9, Condition::Equal, be(IPV4), ipv4)
            .jump_if(R9, Condition::Equal, be(IPV6), ipv6)
            .jump(end)
            .place(ipv4)
            .mov(R2, R8);
        self.load_bytes_from_r2(10, end);
        self.program
            .load(Width::Byte, R2, R10, BYTES)
            .alu(Alu::And, R2, 0xf)
            .alu(Alu::ShiftLeft, R2, 2)
            .load(Width::Byte, R9, R10, BYTES + 9)
            .alu(Alu::Add, R8, R2)
            .jump(transport)
            .place(ipv6)
            .mov(R2, R8);
        self.load_bytes_from_r2(7, end);
        self.program.load(Width::Byte, R9, R10, BYTES + 6).alu(Alu::Add, R8, 40).place(transport);
        let (tcp, known) = (self.program.label(), self.program.label());
        self.program
            .jump_if(R9, Condition::Equal, TCP, tcp)
            .jump_if(R9, Condition::NotEqual, UDP, end)
            .alu(Alu::Add, R8, 8)
            .jump(known)
            .place(tcp)
            .mov(R2, R8)
            .alu(Alu::Add, R2, 12);
        self.load_bytes_from_r2(1, end);
        self.program
            .load(Width::Byte, R2, R10, BYTES)
            .alu(Alu::ShiftRight, R2, 4)
            .alu(Alu::ShiftLeft, R2, 2)
            .alu(Alu::Add, R8, R2)
            .place(known)
            // With the tag that was taken out, which R7 has and the bytes have not.
            .load(Width::Word, R2, R6, skb::LEN)
            .mov(R1, R7)
            .alu(Alu::Subtract, R1, R2)
            .alu(Alu::Add, R8, R1)
            .load(Width::Word, R2, R6, skb::GSO_SIZE)
            .alu(Alu::Add, R8, R2)
            .store(Width::Double, R10, LONGEST, R8)
            .place(end)
            .place(whole);
    }

    /// Takes the outermost tag off.
    pub(super) fn pop(&mut self, failed: Label) {
        self.program.mov(R1, R6).call(Helper::VlanPop).jump_if(R0, Condition::NotEqual, 0, failed);
    }

    /// Counts a frame that goes on, this much longer than it came.
    pub(super) fn count_sent(&mut self, growth: i32) {
        self.look_up(self.records, self.entry);
        self.add(Record::OUT_FRAMES, 1);
        self.program.load(Width::Double, R1, R0, Record::offset(Record::IN_BYTES));
        self.program.alu(Alu::Add, R1, R7);
        self.program.store(Width::Double, R0, Record::offset(Record::IN_BYTES), R1);
        self.program.load(Width::Double, R1, R0, Record::offset(Record::OUT_BYTES));
        self.program.alu(Alu::Add, R1, R7).alu(Alu::Add, R1, growth);
        self.program.store(Width::Double, R0, Record::offset(Record::OUT_BYTES), R1);
    }

    /// Adds to a number of the record in R0.
    fn add(&mut self, place: usize, amount: i32) {
        let offset = Record::offset(place);
        self.program.load(Width::Double, R1, R0, offset).alu(Alu::Add, R1, amount).store(
            Width::Double,
            R0,
            offset,
            R1,
        );
    }

    /// The program, with the drops behind it.
    pub(super) fn finish(mut self) -> Result<Vec<Instruction>, AssemblyError> {
        for (reason, unable, label) in std::mem::take(&mut self.drops) {
            if !self.program.is_used(label) {
                // The verifier takes no instruction that is never reached.
                continue;
            }
            self.program.place(label);
            self.look_up(self.records, self.entry);
            self.add(Record::DROPS + usize::from(reason), 1);
            if unable {
                self.add(Record::UNABLE, 1);
            }
            let offset = Record::offset(Record::IN_BYTES);
            self.program.load(Width::Double, R1, R0, offset).alu(Alu::Add, R1, R7).store(
                Width::Double,
                R0,
                offset,
                R1,
            );
            self.end(self.verdict);
        }
        self.program.finish()
    }
}
