//! Classic BPF programs: which frames a capture keeps, and how much of each
//! (`net/core/filter.c`; "The BSD Packet Filter", McCanne and Jacobson, 1993).
//!
//! Programs come from clients, so [`Program::new`] accepts only what the kernel's
//! `bpf_check_classic` would: known instructions, jumps forward and inside the
//! program, no division by a constant zero, no scratch memory read before it is
//! written, a return at the end. What has passed is kept as [`Step`]s that have no
//! other cases, and [`Program::run`] always ends: each step moves forward.
//!
//! Two things differ from the kernel. Loads from behind `SKF_LL_OFF` (the kernel's
//! own data about a packet, such as its mark or stripped tag) are refused: here are
//! only the bytes, with all tags in them. And an indirect load that comes out there
//! ends the program as one behind the end of the frame does.
//!
//! By hand: rbpf and the like run eBPF; pktbaffle's interpreter of classic BPF
//! checks no programs, and knows neither MOD nor the returned length.

use std::str::FromStr;
use thiserror::Error;

/// The most instructions of a program (`BPF_MAXINSNS`).
pub const INSTRUCTIONS_MAX: usize = 4096;
/// Words of scratch memory (`BPF_MEMWORDS`).
const MEMORY_WORDS: usize = 16;
/// Offsets from here on are not in the frame (`SKF_LL_OFF`, -2 MiB).
const KERNEL_OFFSETS: u32 = 0xffe0_0000;

/// One instruction as the kernel, iptables and `tcpdump -ddd` have it
/// (`struct sock_filter`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    /// What to do.
    pub code: u16,
    /// Instructions to skip if the comparison holds.
    pub jump_true: u8,
    /// Instructions to skip if not.
    pub jump_false: u8,
    /// The constant.
    pub k: u32,
}

/// Why a program cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Invalid {
    /// No instructions, or too many.
    #[error("the filter has {0} instructions; 1 to {INSTRUCTIONS_MAX} are possible")]
    Length(usize),
    /// An instruction that does not exist.
    #[error("instruction {at} of the filter has the unknown code {code}")]
    Code {
        /// Its number, from 0.
        at: usize,
        /// Its code.
        code: u16,
    },
    /// A jump out of the program.
    #[error("instruction {0} of the filter jumps behind its end")]
    Jump(usize),
    /// A constant that cannot be: a divisor of 0, a shift by 32 bits or more, a word
    /// of memory there is not.
    #[error("instruction {at} of the filter cannot have the constant {k}")]
    Constant {
        /// Its number, from 0.
        at: usize,
        /// The constant.
        k: u32,
    },
    /// Something only the kernel knows.
    #[error(
        "instruction {0} of the filter asks the kernel for more than the frame's bytes; filter by the bytes, where all tags are"
    )]
    Kernel(usize),
    /// Memory is read that was not written on every way there.
    #[error("instruction {0} of the filter reads memory that was not written before")]
    Memory(usize),
    /// No return at the end.
    #[error("the filter does not end with a return")]
    End,
}

/// Why a text is no program.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseError {
    /// Not the decimal form.
    #[error(
        "`{0}` is no filter instruction; give the output of tcpdump -ddd: a count, then `code jt jf k` for each, apart by commas or line ends"
    )]
    Instruction(String),
    /// The count at the start is not that of the instructions.
    #[error("the filter says it has {said} instructions and has {found}")]
    Count {
        /// The count.
        said: usize,
        /// Instructions that follow.
        found: usize,
    },
    /// A program that cannot be used.
    #[error(transparent)]
    Invalid(#[from] Invalid),
}

/// One of the two registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    A,
    X,
}

/// A second operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Operand {
    Constant(u32),
    X,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Arithmetic {
    Add,
    Subtract,
    Multiply,
    Divide,
    Modulo,
    Or,
    And,
    Xor,
    ShiftLeft,
    ShiftRight,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Test {
    Equal,
    Greater,
    GreaterOrEqual,
    AnyBit,
}

/// An instruction, understood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Bytes of the frame, as many as the first says, to A.
    LoadAbsolute(usize, u32),
    /// The same, X bytes on.
    LoadIndirect(usize, u32),
    LoadLength(Register),
    LoadConstant(Register, u32),
    LoadMemory(Register, usize),
    /// Four times the lower half of a byte to X: the length of an IPv4 header.
    LoadHeaderLength(u32),
    Store(Register, usize),
    Arithmetic(Arithmetic, Operand),
    Negate,
    Jump(usize),
    Branch {
        test: Test,
        operand: Operand,
        yes: usize,
        no: usize,
    },
    AToX,
    XToA,
    Return(u32),
    ReturnA,
}

/// A program that has been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program(Box<[Step]>);

impl Program {
    /// Checks a program.
    ///
    /// # Errors
    /// [`Invalid`] names the instruction and what is wrong with it.
    pub fn new(instructions: &[Instruction]) -> Result<Self, Invalid> {
        if !(1..=INSTRUCTIONS_MAX).contains(&instructions.len()) {
            return Err(Invalid::Length(instructions.len()));
        }
        let steps: Box<[Step]> = instructions
            .iter()
            .enumerate()
            .map(|(at, instruction)| understand(at, *instruction))
            .collect::<Result<_, _>>()?;
        if !matches!(steps.last(), Some(Step::Return(_) | Step::ReturnA)) {
            return Err(Invalid::End);
        }
        check_ways(&steps)?;
        Ok(Self(steps))
    }

    /// How many bytes of a frame to keep; 0 for none of it. `length` is that of the
    /// frame when it was whole.
    pub fn run(&self, frame: &[u8], length: u32) -> u32 {
        // Every way out of the steps but a return is a load behind the frame's end.
        self.walk(frame, length).unwrap_or(0)
    }

    fn walk(&self, frame: &[u8], length: u32) -> Option<u32> {
        let (mut a, mut x) = (0u32, 0u32);
        let mut memory = [0u32; MEMORY_WORDS];
        let mut steps = self.0.iter();
        loop {
            match *steps.next()? {
                Step::LoadAbsolute(size, k) => a = load(frame, k, size)?,
                Step::LoadIndirect(size, k) => a = load(frame, x.wrapping_add(k), size)?,
                Step::LoadLength(register) => *pick(register, &mut a, &mut x) = length,
                Step::LoadConstant(register, k) => *pick(register, &mut a, &mut x) = k,
                Step::LoadMemory(register, word) => {
                    *pick(register, &mut a, &mut x) = *memory.get(word)?;
                }
                Step::LoadHeaderLength(k) => x = (load(frame, k, 1)? & 0xf) << 2,
                Step::Store(register, word) => {
                    *memory.get_mut(word)? = *pick(register, &mut a, &mut x);
                }
                Step::Arithmetic(operation, operand) => {
                    a = arithmetic(operation, a, operand.value(x))?;
                }
                Step::Negate => a = a.wrapping_neg(),
                Step::Jump(skip) => skip_over(&mut steps, skip),
                Step::Branch { test, operand, yes, no } => {
                    let holds = test.holds(a, operand.value(x));
                    skip_over(&mut steps, if holds { yes } else { no });
                }
                Step::AToX => x = a,
                Step::XToA => a = x,
                Step::Return(k) => return Some(k),
                Step::ReturnA => return Some(a),
            }
        }
    }
}

impl FromStr for Program {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        Ok(Self::new(&parse(text)?)?)
    }
}

/// Reads the decimal form: `4,40 0 0 12,21 0 1 2048,6 0 0 65535,6 0 0 0,`, with
/// commas as `iptables -m bpf` has it or line by line as `tcpdump -ddd` writes it.
///
/// # Errors
/// [`ParseError`], but not that the program is [`Invalid`]: it is not looked at.
pub fn parse(text: &str) -> Result<Vec<Instruction>, ParseError> {
    let mut parts = text.split([',', '\n']).map(str::trim).filter(|part| !part.is_empty());
    let head = parts.next().unwrap_or_default();
    let said = head.parse().map_err(|_| ParseError::Instruction(shorten(head)))?;
    let instructions = parts.map(instruction).collect::<Result<Vec<_>, _>>()?;
    if instructions.len() != said {
        return Err(ParseError::Count { said, found: instructions.len() });
    }
    Ok(instructions)
}

fn instruction(text: &str) -> Result<Instruction, ParseError> {
    let parse = || {
        let mut numbers = text.split_ascii_whitespace();
        let instruction = Instruction {
            code: numbers.next()?.parse().ok()?,
            jump_true: numbers.next()?.parse().ok()?,
            jump_false: numbers.next()?.parse().ok()?,
            k: numbers.next()?.parse().ok()?,
        };
        numbers.next().is_none().then_some(instruction)
    };
    parse().ok_or_else(|| ParseError::Instruction(shorten(text)))
}

/// Enough of a wrong text to find it by.
fn shorten(text: &str) -> String {
    text.chars().take(40).collect()
}

/// The codes of `include/uapi/linux/bpf_common.h`: class, size or operation, mode.
fn understand(at: usize, instruction: Instruction) -> Result<Step, Invalid> {
    let Instruction { code, jump_true, jump_false, k } = instruction;
    let wrong = Invalid::Constant { at, k };
    let word = || usize::try_from(k).ok().filter(|word| *word < MEMORY_WORDS).ok_or(wrong);
    let offset = || if k < KERNEL_OFFSETS { Ok(k) } else { Err(Invalid::Kernel(at)) };
    let operand = if code & 0x08 == 0 { Operand::Constant(k) } else { Operand::X };
    Ok(match code {
        0x20 => Step::LoadAbsolute(4, offset()?),
        0x28 => Step::LoadAbsolute(2, offset()?),
        0x30 => Step::LoadAbsolute(1, offset()?),
        0x40 => Step::LoadIndirect(4, k),
        0x48 => Step::LoadIndirect(2, k),
        0x50 => Step::LoadIndirect(1, k),
        0x80 => Step::LoadLength(Register::A),
        0x81 => Step::LoadLength(Register::X),
        0x00 => Step::LoadConstant(Register::A, k),
        0x01 => Step::LoadConstant(Register::X, k),
        0x60 => Step::LoadMemory(Register::A, word()?),
        0x61 => Step::LoadMemory(Register::X, word()?),
        0xb1 => Step::LoadHeaderLength(offset()?),
        0x02 => Step::Store(Register::A, word()?),
        0x03 => Step::Store(Register::X, word()?),
        0x84 => Step::Negate,
        0x05 => Step::Jump(usize::try_from(k).map_err(|_| Invalid::Jump(at))?),
        0x07 => Step::AToX,
        0x87 => Step::XToA,
        0x06 => Step::Return(k),
        0x16 => Step::ReturnA,
        _ => match (code & 0x07, code & !0x0f) {
            (0x04, operation) => {
                let operation = arithmetic_of(operation).ok_or(Invalid::Code { at, code })?;
                if operand != Operand::X && !operation.accepts(k) {
                    return Err(wrong);
                }
                Step::Arithmetic(operation, operand)
            }
            (0x05, test) => {
                let test = test_of(test).ok_or(Invalid::Code { at, code })?;
                let (yes, no) = (usize::from(jump_true), usize::from(jump_false));
                Step::Branch { test, operand, yes, no }
            }
            _ => return Err(Invalid::Code { at, code }),
        },
    })
}

fn arithmetic_of(operation: u16) -> Option<Arithmetic> {
    Some(match operation {
        0x00 => Arithmetic::Add,
        0x10 => Arithmetic::Subtract,
        0x20 => Arithmetic::Multiply,
        0x30 => Arithmetic::Divide,
        0x40 => Arithmetic::Or,
        0x50 => Arithmetic::And,
        0x60 => Arithmetic::ShiftLeft,
        0x70 => Arithmetic::ShiftRight,
        0x90 => Arithmetic::Modulo,
        0xa0 => Arithmetic::Xor,
        _ => return None,
    })
}

fn test_of(test: u16) -> Option<Test> {
    Some(match test {
        0x10 => Test::Equal,
        0x20 => Test::Greater,
        0x30 => Test::GreaterOrEqual,
        0x40 => Test::AnyBit,
        _ => return None,
    })
}

/// Checks that no way leads out of the program or to memory that was not written.
/// Jumps lead forward, so one pass sees all ways to a step before the step.
fn check_ways(steps: &[Step]) -> Result<(), Invalid> {
    // For each step: the words written on all ways to it, a bit each.
    let mut written = vec![u16::MAX; steps.len()];
    let mut now = 0u16;
    for (at, step) in steps.iter().enumerate() {
        now &= written.get(at).copied().unwrap_or_default();
        let mut leads_to = |skip: usize, now: u16| {
            let target = at.checked_add(1).and_then(|next| next.checked_add(skip));
            let place = target.and_then(|target| written.get_mut(target));
            place.map(|words| *words &= now).ok_or(Invalid::Jump(at))
        };
        match *step {
            Step::Store(_, word) => now |= 1 << word,
            Step::LoadMemory(_, word) if now & (1 << word) == 0 => {
                return Err(Invalid::Memory(at));
            }
            Step::Jump(skip) => {
                leads_to(skip, now)?;
                now = u16::MAX;
            }
            Step::Branch { yes, no, .. } => {
                leads_to(yes, now)?;
                leads_to(no, now)?;
                now = u16::MAX;
            }
            _ => {}
        }
    }
    Ok(())
}

/// A number in network order at `offset`.
fn load(frame: &[u8], offset: u32, size: usize) -> Option<u32> {
    let offset = usize::try_from(offset).ok()?;
    let bytes = frame.get(offset..offset.checked_add(size)?)?;
    Some(bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte)))
}

fn pick<'r>(register: Register, a: &'r mut u32, x: &'r mut u32) -> &'r mut u32 {
    match register {
        Register::A => a,
        Register::X => x,
    }
}

fn skip_over(steps: &mut std::slice::Iter<'_, Step>, skip: usize) {
    *steps = steps.as_slice().get(skip..).unwrap_or_default().iter();
}

/// `None` for a division by zero, which ends the program.
fn arithmetic(operation: Arithmetic, a: u32, operand: u32) -> Option<u32> {
    Some(match operation {
        Arithmetic::Add => a.wrapping_add(operand),
        Arithmetic::Subtract => a.wrapping_sub(operand),
        Arithmetic::Multiply => a.wrapping_mul(operand),
        Arithmetic::Divide => a.checked_div(operand)?,
        Arithmetic::Modulo => a.checked_rem(operand)?,
        Arithmetic::Or => a | operand,
        Arithmetic::And => a & operand,
        Arithmetic::Xor => a ^ operand,
        // Of a shift by X the kernel takes the lower five bits.
        Arithmetic::ShiftLeft => a.wrapping_shl(operand),
        Arithmetic::ShiftRight => a.wrapping_shr(operand),
    })
}

impl Arithmetic {
    fn accepts(self, constant: u32) -> bool {
        match self {
            Self::Divide | Self::Modulo => constant != 0,
            Self::ShiftLeft | Self::ShiftRight => constant < 32,
            _ => true,
        }
    }
}

impl Operand {
    fn value(self, x: u32) -> u32 {
        match self {
            Self::Constant(k) => k,
            Self::X => x,
        }
    }
}

impl Test {
    fn holds(self, a: u32, operand: u32) -> bool {
        match self {
            Self::Equal => a == operand,
            Self::Greater => a > operand,
            Self::GreaterOrEqual => a >= operand,
            Self::AnyBit => a & operand != 0,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;

    const IPV4: &str = "4,40 0 0 12,21 0 1 2048,6 0 0 65535,6 0 0 0,";

    #[test]
    fn the_decimal_form_with_commas_and_with_lines() {
        let with_commas: Program = IPV4.parse().unwrap();
        let with_lines: Program = IPV4.replace(',', "\n").parse().unwrap();
        assert_eq!(with_commas, with_lines);
        let mut frame = [0; 60];
        frame[12] = 8;
        assert_eq!(with_commas.run(&frame, 60), 65535);
        frame[13] = 6;
        assert_eq!(with_commas.run(&frame, 60), 0);
        assert_eq!(with_commas.run(&frame[..13], 60), 0);
    }

    #[test]
    fn what_is_no_program_is_refused_with_the_place() {
        let error = |text: &str| text.parse::<Program>().unwrap_err().to_string();
        assert!(error("").starts_with("`` is no filter instruction"));
        assert!(error("tcp port 80").starts_with("`tcp port 80` is no"));
        assert!(error("1,6 0 0").starts_with("`6 0 0` is no"));
        assert!(error("1,6 0 0 0 0").starts_with("`6 0 0 0 0` is no"));
        assert!(error("1,6 256 0 0").starts_with("`6 256 0 0` is no"));
        assert!(error("2,6 0 0 0").contains("says it has 2 instructions and has 1"));
        assert!(error("0,").contains("has 0 instructions"));
        assert!(error("1,32 0 0 12").contains("does not end with a return"));
        assert!(error("2,32 0 0 4294963244,6 0 0 1").contains("instruction 0"));
        assert!(error("1,14 0 0 1").contains("unknown code 14"));
    }

    #[test]
    fn the_lengths_are_those_of_the_whole_frame() {
        let length: Program = "2,128 0 0 0,22 0 0 0".parse().unwrap();
        assert_eq!(length.run(&[0; 10], 1514), 1514);
    }
}
