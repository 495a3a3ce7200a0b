//! A small eBPF assembler: typed instructions, labels resolved at the end.
//!
//! Our programs are tens of instructions, so they are written by hand instead of
//! being compiled: no clang, no ELF loader, no nightly toolchain. The encoding is
//! `struct bpf_insn` of include/uapi/linux/bpf.h; the meaning of each instruction
//! is in Documentation/bpf/standardization/instruction-set.rst (RFC 9669).
//!
//! ```
//! use vlanswitchd::sys::bpf::{Condition, Program, R0, R1, Width};
//!
//! // Returns 1 for frames longer than 64 bytes (`len` is the first word of __sk_buff).
//! let mut program = Program::new();
//! let long = program.label();
//! program.load(Width::Word, R0, R1, 0);
//! program.jump_if(R0, Condition::Greater, 64, long);
//! program.mov(R0, 0).exit();
//! program.place(long);
//! program.mov(R0, 1).exit();
//! assert_eq!(program.finish()?.len(), 6);
//! # Ok::<(), vlanswitchd::sys::bpf::AssemblyError>(())
//! ```

use std::os::fd::{AsRawFd, BorrowedFd};

/// One of the machine's eleven registers, R0..=R10.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Register(u8);

/// Return value of calls and of the program.
pub const R0: Register = Register(0);
/// First argument; the context when a program starts. Lost in calls.
pub const R1: Register = Register(1);
/// Second argument. Lost in calls.
pub const R2: Register = Register(2);
/// Third argument. Lost in calls.
pub const R3: Register = Register(3);
/// Fourth argument. Lost in calls.
pub const R4: Register = Register(4);
/// Fifth argument. Lost in calls.
pub const R5: Register = Register(5);
/// Kept across calls; `load_absolute` expects the context here.
pub const R6: Register = Register(6);
/// Kept across calls.
pub const R7: Register = Register(7);
/// Kept across calls.
pub const R8: Register = Register(8);
/// Kept across calls.
pub const R9: Register = Register(9);
/// End of the 512-byte stack frame, read-only: locals are at negative offsets.
pub const R10: Register = Register(10);

/// How many bytes a load or a store moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Width {
    /// 4 bytes.
    Word = 0x00,
    /// 2 bytes.
    Half = 0x08,
    /// 1 byte.
    Byte = 0x10,
    /// 8 bytes.
    Double = 0x18,
}

/// A 64-bit arithmetic or logic operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alu {
    /// `destination += source`
    Add = 0x00,
    /// `destination -= source`
    Subtract = 0x10,
    /// `destination |= source`
    Or = 0x40,
    /// `destination &= source`
    And = 0x50,
    /// `destination <<= source`
    ShiftLeft = 0x60,
    /// `destination >>= source`, zeros shifted in
    ShiftRight = 0x70,
    /// `destination ^= source`
    Xor = 0xa0,
    /// `destination = source`
    Move = 0xb0,
}

/// When a jump is taken: 64-bit comparisons, unsigned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// `destination == source`
    Equal = 0x10,
    /// `destination > source`
    Greater = 0x20,
    /// `destination >= source`
    GreaterOrEqual = 0x30,
    /// `destination & source != 0`
    AnyBit = 0x40,
    /// `destination != source`
    NotEqual = 0x50,
    /// `destination < source` (Linux 4.14)
    Less = 0xa0,
    /// `destination <= source` (Linux 4.14)
    LessOrEqual = 0xb0,
}

/// Kernel functions our programs call: `enum bpf_func_id`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Helper {
    /// `void *bpf_map_lookup_elem(map, key)`
    MapLookup = 1,
    /// `long bpf_skb_store_bytes(skb, u32 offset, const void *from, u32 len, u64 flags)`
    StoreBytes = 9,
    /// `long bpf_tail_call(ctx, program_array, index)`: does not return if there is a program
    TailCall = 12,
    /// `long bpf_skb_vlan_push(skb, __be16 vlan_proto, u16 vlan_tci)`
    VlanPush = 18,
    /// `long bpf_skb_vlan_pop(skb)`
    VlanPop = 19,
    /// `long bpf_redirect(u32 ifindex, u64 flags)`
    Redirect = 23,
    /// `long bpf_skb_load_bytes(skb, u32 offset, void *to, u32 len)`
    LoadBytes = 26,
    /// `long bpf_xdp_adjust_head(xdp, int delta)`: addresses read before are void
    XdpAdjustHead = 44,
    /// `u64 bpf_xdp_get_buff_len(xdp)`: of all pieces (Linux 5.18)
    BufferLength = 188,
}

/// The right-hand side of an operation: a register or a constant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operand {
    /// The value of a register.
    Register(Register),
    /// A constant, sign-extended to 64 bits.
    Immediate(i32),
}

impl From<Register> for Operand {
    fn from(register: Register) -> Self {
        Self::Register(register)
    }
}

impl From<i32> for Operand {
    fn from(immediate: i32) -> Self {
        Self::Immediate(immediate)
    }
}

/// A place in a program, made by [`Program::label`], fixed by [`Program::place`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Label(usize);

/// One encoded instruction: `struct bpf_insn`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// Class, size and operation.
    pub code: u8,
    /// Destination and source register, a nibble each (a C bit field: the
    /// destination is the low nibble on little-endian machines).
    pub registers: u8,
    /// Jump distance in instructions, or displacement in bytes.
    pub offset: i16,
    /// Constant.
    pub immediate: i32,
}

const _: () = {
    assert!(size_of::<Instruction>() == 8);
    assert!(std::mem::offset_of!(Instruction, registers) == 1);
    assert!(std::mem::offset_of!(Instruction, offset) == 2);
    assert!(std::mem::offset_of!(Instruction, immediate) == 4);
};

// Instruction classes, modes and sources (include/uapi/linux/bpf_common.h, bpf.h).
const CLASS_LD: u8 = 0x00;
const CLASS_LDX: u8 = 0x01;
const CLASS_ST: u8 = 0x02;
const CLASS_STX: u8 = 0x03;
const CLASS_JMP: u8 = 0x05;
const CLASS_ALU64: u8 = 0x07;
const MODE_IMM: u8 = 0x00;
const MODE_ABS: u8 = 0x20;
const MODE_MEM: u8 = 0x60;
const MODE_ATOMIC: u8 = 0xc0;
const SOURCE_REGISTER: u8 = 0x08;
const JUMP_ALWAYS: u8 = 0x00;
const CALL: u8 = 0x80;
const EXIT: u8 = 0x90;
/// In the source register of a 64-bit load: the immediate is a map's fd.
const PSEUDO_MAP_FD: Register = Register(1);
/// The same, and the address is that of the map's value (BPF_PSEUDO_MAP_VALUE).
const PSEUDO_MAP_VALUE: Register = Register(2);

/// Why a program could not be assembled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AssemblyError {
    /// A jump goes to a label nobody placed.
    #[error("BPF instruction {instruction} jumps to a label that was never placed")]
    LabelNotPlaced {
        /// Index of the jump.
        instruction: usize,
    },
    /// A label has two places.
    #[error("a BPF label was placed twice, the second time before instruction {instruction}")]
    LabelPlacedTwice {
        /// Index of the instruction after the second place.
        instruction: usize,
    },
    /// The distance does not fit the 16 bits of an instruction.
    #[error("BPF instruction {instruction} jumps {distance} instructions: more than 16 bits hold")]
    JumpTooFar {
        /// Index of the jump.
        instruction: usize,
        /// Instructions to skip.
        distance: i64,
    },
}

/// A program being written. Each method appends one instruction (two for
/// [`Program::load_map`]) and returns the program, so that calls chain.
#[derive(Debug, Default)]
pub struct Program {
    instructions: Vec<Instruction>,
    /// Where each label is, as an instruction index.
    places: Vec<Option<usize>>,
    /// Jumps to patch: instruction index and label.
    jumps: Vec<(usize, Label)>,
    /// First misuse that a method could not report.
    fault: Option<AssemblyError>,
}

impl Program {
    /// An empty program.
    pub fn new() -> Self {
        Self::default()
    }

    fn push(
        &mut self,
        code: u8,
        destination: Register,
        source: Register,
        offset: i16,
        immediate: i32,
    ) -> &mut Self {
        let registers = if cfg!(target_endian = "little") {
            destination.0 | (source.0 << 4)
        } else {
            source.0 | (destination.0 << 4)
        };
        self.instructions.push(Instruction { code, registers, offset, immediate });
        self
    }

    fn push_operand(
        &mut self,
        code: u8,
        destination: Register,
        operand: Operand,
        offset: i16,
    ) -> &mut Self {
        match operand {
            Operand::Register(source) => {
                self.push(code | SOURCE_REGISTER, destination, source, offset, 0)
            }
            Operand::Immediate(immediate) => self.push(code, destination, R0, offset, immediate),
        }
    }

    /// `destination = operand`, 64 bits.
    pub fn mov(&mut self, destination: Register, operand: impl Into<Operand>) -> &mut Self {
        self.alu(Alu::Move, destination, operand)
    }

    /// `destination = destination operation operand`, 64 bits.
    pub fn alu(
        &mut self,
        operation: Alu,
        destination: Register,
        operand: impl Into<Operand>,
    ) -> &mut Self {
        self.push_operand(CLASS_ALU64 | operation as u8, destination, operand.into(), 0)
    }

    /// `destination = *(width *)(base + offset)`, zero-extended, in the machine's order.
    pub fn load(
        &mut self,
        width: Width,
        destination: Register,
        base: Register,
        offset: i16,
    ) -> &mut Self {
        self.push(CLASS_LDX | MODE_MEM | width as u8, destination, base, offset, 0)
    }

    /// `*(width *)(base + offset) = operand`.
    pub fn store(
        &mut self,
        width: Width,
        base: Register,
        offset: i16,
        operand: impl Into<Operand>,
    ) -> &mut Self {
        match operand.into() {
            Operand::Register(source) => {
                self.push(CLASS_STX | MODE_MEM | width as u8, base, source, offset, 0)
            }
            Operand::Immediate(immediate) => {
                self.push(CLASS_ST | MODE_MEM | width as u8, base, R0, offset, immediate)
            }
        }
    }

    /// `*(u64 *)(base + offset) += source`, whoever else does so at the same time.
    pub fn add_atomically(&mut self, base: Register, offset: i16, source: Register) -> &mut Self {
        let code = CLASS_STX | MODE_ATOMIC | Width::Double as u8;
        self.push(code, base, source, offset, Alu::Add as i32)
    }

    /// `R0 = frame[offset]`, converted from network order. The context must be in
    /// [`R6`]; R1..=R5 are lost. A frame that ends before ends the program with 0.
    /// Socket filters and tc programs only.
    pub fn load_absolute(&mut self, width: Width, offset: u16) -> &mut Self {
        self.push(CLASS_LD | MODE_ABS | width as u8, R0, R0, 0, i32::from(offset))
    }

    /// The same from the Ethernet header on, wherever the context's data starts
    /// (`SKF_LL_OFF`, include/uapi/linux/filter.h).
    pub fn load_from_link_layer(&mut self, width: Width, offset: u16) -> &mut Self {
        let offset = libc::SKF_LL_OFF + i32::from(offset);
        self.push(CLASS_LD | MODE_ABS | width as u8, R0, R0, 0, offset)
    }

    /// `destination = map`, the first argument of [`Helper::MapLookup`]. The map must
    /// stay open until the program is loaded; then the program holds it.
    pub fn load_map(&mut self, destination: Register, map: BorrowedFd<'_>) -> &mut Self {
        let code = CLASS_LD | MODE_IMM | Width::Double as u8;
        self.push(code, destination, PSEUDO_MAP_FD, 0, map.as_raw_fd());
        self.push(0, R0, R0, 0, 0)
    }

    /// `destination = address of the value` of an array of one entry (Linux 5.2): no
    /// look-up when the program runs. The map must stay open as for [`Program::load_map`].
    pub fn load_map_value(&mut self, destination: Register, map: BorrowedFd<'_>) -> &mut Self {
        let code = CLASS_LD | MODE_IMM | Width::Double as u8;
        self.push(code, destination, PSEUDO_MAP_VALUE, 0, map.as_raw_fd());
        self.push(0, R0, R0, 0, 0)
    }

    /// Calls a kernel function: arguments in R1..=R5, result in [`R0`].
    pub fn call(&mut self, helper: Helper) -> &mut Self {
        self.push(CLASS_JMP | CALL, R0, R0, 0, helper as i32)
    }

    /// Ends the program; [`R0`] is its result.
    pub fn exit(&mut self) -> &mut Self {
        self.push(CLASS_JMP | EXIT, R0, R0, 0, 0)
    }

    /// A new label, to be placed before or after the jumps to it.
    pub fn label(&mut self) -> Label {
        self.places.push(None);
        Label(self.places.len() - 1)
    }

    /// Fixes `label` before the next instruction.
    pub fn place(&mut self, label: Label) -> &mut Self {
        let next = self.instructions.len();
        if let Some(place) = self.places.get_mut(label.0)
            && place.replace(next).is_some()
        {
            self.fault.get_or_insert(AssemblyError::LabelPlacedTwice { instruction: next });
        }
        self
    }

    /// Goes on at `target`.
    pub fn jump(&mut self, target: Label) -> &mut Self {
        self.jumps.push((self.instructions.len(), target));
        self.push(CLASS_JMP | JUMP_ALWAYS, R0, R0, 0, 0)
    }

    /// Goes on at `target` if `left condition right`, else at the next instruction.
    pub fn jump_if(
        &mut self,
        left: Register,
        condition: Condition,
        right: impl Into<Operand>,
        target: Label,
    ) -> &mut Self {
        self.jumps.push((self.instructions.len(), target));
        self.push_operand(CLASS_JMP | condition as u8, left, right.into(), 0)
    }

    /// Whether something written so far jumps to `label`.
    pub fn is_used(&self, label: Label) -> bool {
        self.jumps.iter().any(|(_, target)| *target == label)
    }

    /// The instructions, with every jump resolved.
    ///
    /// # Errors
    /// A label that is missing, doubled, or too far from a jump to it.
    pub fn finish(mut self) -> Result<Vec<Instruction>, AssemblyError> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        for &(instruction, label) in &self.jumps {
            let Some(&Some(place)) = self.places.get(label.0) else {
                return Err(AssemblyError::LabelNotPlaced { instruction });
            };
            // The distance counts from the instruction after the jump.
            let distance = place as i64 - instruction as i64 - 1;
            let offset = i16::try_from(distance)
                .map_err(|_| AssemblyError::JumpTooFar { instruction, distance })?;
            if let Some(jump) = self.instructions.get_mut(instruction) {
                jump.offset = offset;
            }
        }
        Ok(self.instructions)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use std::os::fd::AsFd;

    /// The bytes of `struct bpf_insn` as this machine lays them out.
    fn bytes(program: Program) -> Vec<[u8; 8]> {
        let encode = |instruction: Instruction| {
            let [o0, o1] = instruction.offset.to_ne_bytes();
            let [i0, i1, i2, i3] = instruction.immediate.to_ne_bytes();
            [instruction.code, instruction.registers, o0, o1, i0, i1, i2, i3]
        };
        program.finish().unwrap().into_iter().map(encode).collect()
    }

    // The expected bytes are written by hand from the tables of RFC 9669.
    #[test]
    #[cfg(target_endian = "little")]
    fn instructions_are_encoded_as_the_kernel_reads_them() {
        let mut program = Program::new();
        program
            .mov(R6, R1)
            .mov(R0, 2)
            .mov(R2, -1)
            .alu(Alu::Add, R2, -4)
            .alu(Alu::And, R7, 0xfff)
            .alu(Alu::ShiftRight, R1, R8)
            .alu(Alu::ShiftLeft, R8, 12)
            .alu(Alu::Or, R8, R7)
            .alu(Alu::Subtract, R3, R2)
            .alu(Alu::Xor, R3, 1)
            .load(Width::Word, R2, R6, 4)
            .load(Width::Half, R3, R1, 16)
            .load(Width::Byte, R4, R1, 1)
            .load(Width::Double, R1, R0, 0)
            .store(Width::Word, R10, -4, R7)
            .store(Width::Double, R0, 0, R1)
            .store(Width::Word, R10, -8, 5)
            .add_atomically(R0, 8, R1)
            .load_absolute(Width::Half, 12)
            .call(Helper::VlanPush)
            .exit();
        assert_eq!(
            bytes(program),
            [
                [0xbf, 0x16, 0, 0, 0, 0, 0, 0],
                [0xb7, 0x00, 0, 0, 2, 0, 0, 0],
                [0xb7, 0x02, 0, 0, 0xff, 0xff, 0xff, 0xff],
                [0x07, 0x02, 0, 0, 0xfc, 0xff, 0xff, 0xff],
                [0x57, 0x07, 0, 0, 0xff, 0x0f, 0, 0],
                [0x7f, 0x81, 0, 0, 0, 0, 0, 0],
                [0x67, 0x08, 0, 0, 12, 0, 0, 0],
                [0x4f, 0x78, 0, 0, 0, 0, 0, 0],
                [0x1f, 0x23, 0, 0, 0, 0, 0, 0],
                [0xa7, 0x03, 0, 0, 1, 0, 0, 0],
                [0x61, 0x62, 4, 0, 0, 0, 0, 0],
                [0x69, 0x13, 16, 0, 0, 0, 0, 0],
                [0x71, 0x14, 1, 0, 0, 0, 0, 0],
                [0x79, 0x01, 0, 0, 0, 0, 0, 0],
                [0x63, 0x7a, 0xfc, 0xff, 0, 0, 0, 0],
                [0x7b, 0x10, 0, 0, 0, 0, 0, 0],
                [0x62, 0x0a, 0xf8, 0xff, 5, 0, 0, 0],
                [0xdb, 0x10, 8, 0, 0, 0, 0, 0],
                [0x28, 0x00, 0, 0, 12, 0, 0, 0],
                [0x85, 0x00, 0, 0, 18, 0, 0, 0],
                [0x95, 0x00, 0, 0, 0, 0, 0, 0],
            ]
        );
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_map_takes_two_slots() {
        let file = std::fs::File::open("/dev/null").unwrap();
        let [low, high, ..] = file.as_raw_fd().to_le_bytes();
        let mut program = Program::new();
        program.load_map(R1, file.as_fd());
        assert_eq!(bytes(program), [[0x18, 0x11, 0, 0, low, high, 0, 0], [0; 8]]);
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn jumps_count_from_the_next_instruction() {
        let mut program = Program::new();
        let (back, ahead) = (program.label(), program.label());
        program
            .place(back)
            .mov(R0, 0)
            .jump_if(R2, Condition::Equal, 4, ahead)
            .jump_if(R2, Condition::NotEqual, R3, ahead)
            .jump_if(R2, Condition::Greater, 1, back)
            .jump_if(R2, Condition::GreaterOrEqual, 1, back)
            .jump_if(R2, Condition::Less, 1, back)
            .jump_if(R2, Condition::LessOrEqual, 1, back)
            .jump_if(R2, Condition::AnyBit, 8, ahead)
            .jump(ahead)
            .place(ahead)
            .exit();
        assert_eq!(
            bytes(program),
            [
                [0xb7, 0x00, 0, 0, 0, 0, 0, 0],
                [0x15, 0x02, 7, 0, 4, 0, 0, 0],
                [0x5d, 0x32, 6, 0, 0, 0, 0, 0],
                [0x25, 0x02, 0xfc, 0xff, 1, 0, 0, 0],
                [0x35, 0x02, 0xfb, 0xff, 1, 0, 0, 0],
                [0xa5, 0x02, 0xfa, 0xff, 1, 0, 0, 0],
                [0xb5, 0x02, 0xf9, 0xff, 1, 0, 0, 0],
                [0x45, 0x02, 1, 0, 8, 0, 0, 0],
                [0x05, 0x00, 0, 0, 0, 0, 0, 0],
                [0x95, 0x00, 0, 0, 0, 0, 0, 0],
            ]
        );
    }

    #[test]
    fn labels_are_checked() {
        let mut program = Program::new();
        let label = program.label();
        program.mov(R0, 0).jump(label);
        assert_eq!(program.finish(), Err(AssemblyError::LabelNotPlaced { instruction: 1 }));

        let mut program = Program::new();
        let label = program.label();
        program.place(label).exit().place(label);
        assert_eq!(program.finish(), Err(AssemblyError::LabelPlacedTwice { instruction: 1 }));
    }

    #[test]
    fn a_jump_reaches_sixteen_bits() {
        for (filler, expected) in [
            (32767, Ok(32767)),
            (32768, Err(AssemblyError::JumpTooFar { instruction: 0, distance: 32768 })),
        ] {
            let mut program = Program::new();
            let end = program.label();
            program.jump(end);
            for _ in 0..filler {
                program.mov(R0, 0);
            }
            program.place(end).exit();
            let offset = program.finish().map(|instructions| instructions.first().unwrap().offset);
            assert_eq!(offset, expected);
        }
    }
}
