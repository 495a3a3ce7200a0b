//! Classic BPF programs run as the kernel runs them: the same programs are attached
//! to a socket (`SO_ATTACH_FILTER`), which then delivers as many bytes of each
//! datagram as the program returns. No privilege is needed for that.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    unsafe_code,
    reason = "tests fail by panicking; nix cannot attach a filter"
)]

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use proptest::prelude::*;
use std::os::fd::{AsRawFd, OwnedFd};
use vlanswitchd::control::capture::expression::{CompileError, compile};
use vlanswitchd::control::capture::filter::{Instruction, Program};

/// A socket pair with a filter on the receiving end.
struct Kernel {
    sender: OwnedFd,
    receiver: OwnedFd,
}

impl Kernel {
    fn attach(program: &[Instruction]) -> Result<Self, Errno> {
        let (sender, receiver) =
            socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC)
                .unwrap();
        let mut filter: Vec<libc::sock_filter> = program
            .iter()
            .map(|instruction| libc::sock_filter {
                code: instruction.code,
                jt: instruction.jump_true,
                jf: instruction.jump_false,
                k: instruction.k,
            })
            .collect();
        let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
        // SAFETY: the kernel copies the program, which is there until it returns.
        let result = unsafe {
            libc::setsockopt(
                receiver.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const program).cast(),
                size_of_val(&program) as u32,
            )
        };
        Errno::result(result)?;
        Ok(Self { sender, receiver })
    }

    /// How many bytes of a frame get through.
    fn run(&self, frame: &[u8]) -> usize {
        send(self.sender.as_raw_fd(), frame, MsgFlags::MSG_DONTWAIT).unwrap();
        let mut buffer = [0; 4096];
        match recv(self.receiver.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
            Ok(length) => length,
            Err(Errno::EAGAIN) => 0,
            Err(errno) => panic!("{errno}"),
        }
    }
}

fn ours(program: &Program, frame: &[u8]) -> usize {
    frame.len().min(program.run(frame, frame.len() as u32) as usize)
}

/// Constants that mean something: offsets in the frame, lengths, shifts, jumps.
fn constant() -> impl Strategy<Value = u32> {
    prop_oneof![
        6 => 0..20u32,
        2 => 0..80u32,
        1 => Just(u32::MAX),
        // Not the offsets between `SKF_LL_OFF` and 0, which are the kernel's own.
        1 => 0..0xffe0_0000u32,
    ]
}

/// Instructions of which most exist, with short jumps.
fn instruction() -> impl Strategy<Value = Instruction> {
    const CODES: [u16; 50] = [
        0x20, 0x28, 0x30, 0x40, 0x48, 0x50, 0x80, 0x81, 0x00, 0x01, 0x60, 0x61, 0xb1, 0x02, 0x03,
        0x84, 0x05, 0x07, 0x87, 0x06, 0x16, 0x04, 0x14, 0x24, 0x34, 0x44, 0x54, 0x64, 0x74, 0x94,
        0xa4, 0x0c, 0x1c, 0x2c, 0x3c, 0x4c, 0x5c, 0x6c, 0x7c, 0x9c, 0xac, 0x15, 0x25, 0x35, 0x45,
        0x1d, 0x2d, 0x3d, 0x4d, 0x02,
    ];
    let code = prop_oneof![60 => proptest::sample::select(&CODES[..]), 1 => 0..0x100u16];
    (code, 0..4u8, 0..4u8, constant()).prop_map(|(code, jump_true, jump_false, k)| {
        // A load of the kernel's own data is refused here and known there.
        let load = matches!(code, 0x20 | 0x28 | 0x30 | 0x40 | 0x48 | 0x50 | 0xb1);
        let k = if load && k >= 0xffe0_0000 { 0xffdf_ffff } else { k };
        Instruction { code, jump_true, jump_false, k }
    })
}

fn program() -> impl Strategy<Value = Vec<Instruction>> {
    let end = prop_oneof![
        8 => Just(Instruction { code: 0x16, jump_true: 0, jump_false: 0, k: 0 }),
        4 => Just(Instruction { code: 0x06, jump_true: 0, jump_false: 0, k: 40 }),
        1 => instruction(),
    ];
    // Stores first, so that most loads from memory read something.
    let stores = proptest::collection::vec(0..16u32, 0..8);
    (stores, proptest::collection::vec(instruction(), 0..24), end).prop_map(
        |(stores, middle, end)| {
            let store = |k| Instruction { code: 0x02, jump_true: 0, jump_false: 0, k };
            stores.into_iter().map(store).chain(middle).chain([end]).collect()
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn programs_are_accepted_and_run_as_by_the_kernel(
        program in program(),
        frames in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..80), 8),
    ) {
        let checked = Program::new(&program);
        let kernel = Kernel::attach(&program);
        prop_assert_eq!(
            checked.is_ok(), kernel.is_ok(),
            "{:?} {:?}", checked.err(), kernel.err()
        );
        if let (Ok(checked), Ok(kernel)) = (checked, kernel) {
            for frame in &frames {
                prop_assert_eq!(ours(&checked, frame), kernel.run(frame));
            }
        }
    }

    #[test]
    fn nothing_breaks_it(
        program in proptest::collection::vec(
            (any::<u16>(), any::<u8>(), any::<u8>(), any::<u32>()), 0..40
        ),
        frame in proptest::collection::vec(any::<u8>(), 0..80),
    ) {
        let program: Vec<Instruction> = program
            .into_iter()
            .map(|(code, jump_true, jump_false, k)| {
                Instruction { code: code & 0xff, jump_true, jump_false, k }
            })
            .collect();
        if let Ok(program) = Program::new(&program) {
            program.run(&frame, u32::MAX);
        }
    }
}

#[test]
fn the_generator_makes_programs_worth_running() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let made = (0..1000).filter(|_| {
        let made = program().new_tree(&mut runner).unwrap().current();
        Program::new(&made).is_ok()
    });
    let accepted = made.count();
    assert!((200..900).contains(&accepted), "{accepted} of 1000 are accepted");
}

/// A frame with these tags, an IPv4 packet and a TCP or UDP header.
fn frame(tags: &[u16], protocol: u8, destination_port: u16) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    for tag in tags {
        frame.extend([0x81, 0]);
        frame.extend(tag.to_be_bytes());
    }
    frame
        .extend([8, 0, 0x45, 0, 0, 46, 0, 1, 0, 0, 64, protocol, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    frame.extend([0x30, 0x39]);
    frame.extend(destination_port.to_be_bytes());
    frame.resize(frame.len() + 22, 0);
    frame
}

#[test]
#[ignore = "needs tcpdump"]
fn expressions_mean_what_they_say() {
    let tcp = frame(&[], 6, 80);
    let udp = frame(&[], 17, 53);
    let tagged = frame(&[101], 6, 80);
    let twice = frame(&[101, 20], 17, 53);
    let all = [&tcp, &udp, &tagged, &twice];
    for (expression, expected) in [
        ("", [true, true, true, true]),
        ("tcp port 80", [true, false, false, false]),
        ("udp", [false, true, false, false]),
        ("vlan 101", [false, false, true, true]),
        ("vlan 101 and tcp dst port 80", [false, false, true, false]),
        ("vlan and vlan 20 and udp", [false, false, false, true]),
        ("greater 65", [false, false, false, true]),
        ("ether src 02:00:00:00:00:02 and not ip", [false, false, true, true]),
        ("ip[8] > 63 and ip[6:2] & 0x1fff = 0", [true, true, false, false]),
    ] {
        let instructions = compile(expression).unwrap();
        let program = Program::new(&instructions).unwrap();
        let kernel = Kernel::attach(&instructions).unwrap();
        for (frame, expected) in all.iter().zip(expected) {
            assert_eq!(program.run(frame, frame.len() as u32) > 0, expected, "{expression}");
            assert_eq!(kernel.run(frame) > 0, expected, "{expression}, by the kernel");
        }
    }
}

#[test]
#[ignore = "needs tcpdump"]
fn a_wrong_expression_is_told_in_tcpdumps_words() {
    let error = compile("tcp prot 80").unwrap_err();
    assert!(matches!(error, CompileError::Expression { .. }));
    let text = error.to_string();
    assert!(text.contains("`tcp prot 80` is wrong: can't parse filter expression"), "{text}");
    // Not an option of tcpdump's.
    assert!(matches!(compile("-w/dev/null"), Err(CompileError::Expression { .. })));
}
