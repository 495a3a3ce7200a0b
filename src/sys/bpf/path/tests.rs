//! The programs alone, run by the kernel on frames (BPF_PROG_TEST_RUN), against a model that
//! is written from the table of modes and knows nothing of registers.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use super::*;
use crate::sys::bpf::syscall::{test_edit, test_run};
use crate::sys::bpf::{ProgramKind, Records, SharedPair, load};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use std::os::fd::AsFd;

const REASONS: Reasons = Reasons {
    spoofed_mac: 0,
    malformed: 1,
    inner_tag: 2,
    tagged_on_access: 3,
    vlan_not_allowed: 4,
    too_long: 5,
    bad_offload: 6,
    uplink_down: 7,
    guest_absent: 8,
    send_failed: 9,
    unmapped: 10,
};
/// A reason that only a rule has.
const RULE: u8 = 11;
const REDIRECT: u32 = 7;
const SHOT: u32 = 2;
const ALL_TPIDS: [u16; 4] = [0x8100, 0x88a8, 0x9100, 0x9200];
const SOURCE: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

/// A frame whose tags all stand in the bytes, cut or filled to a length.
fn frame(tags: &[(u16, u16)], source: bool, length: usize) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 9];
    frame.extend(SOURCE);
    frame[11] ^= u8::from(!source);
    for (tpid, tci) in tags {
        frame.extend([tpid.to_be_bytes(), tci.to_be_bytes()].concat());
    }
    frame.extend([0x88, 0xb5]);
    frame.resize(length, 0x5a);
    frame
}

/// The tags a frame has; `None` if it ends inside one or behind one.
fn tags_of(frame: &[u8]) -> Option<Vec<(u16, u16)>> {
    let word = |at: usize| Some(u16::from_be_bytes([*frame.get(at)?, *frame.get(at + 1)?]));
    let mut tags = Vec::new();
    let mut at = 12;
    while tags.len() < 3 && ALL_TPIDS.contains(&word(at)?) {
        tags.push((word(at)?, word(at + 2)?));
        at += 4;
    }
    word(at).map(|_| tags)
}

/// What a guest's frame comes to: the reason of its drop, or by how much it grows.
fn expected(rules: &GuestRules, frame: &[u8], limit: u32) -> Result<i32, u8> {
    let tags = tags_of(frame).ok_or(REASONS.malformed)?;
    if !rules.sources.is_empty() && !rules.sources.iter().any(|one| frame[6..12] == *one) {
        return Err(REASONS.spoofed_mac);
    }
    let (action, kept) = match tags.first() {
        None => (rules.untagged, None),
        Some((_, tci)) if tci & 0xfff == 0 => {
            if rules.refuse_inner && tags.len() > 1 {
                return Err(REASONS.tagged_on_access);
            }
            (rules.priority_tagged, rules.allowed.as_ref().map(|allowed| allowed.tpid))
        }
        Some((tpid, tci)) => {
            if let Some(allowed) = &rules.allowed {
                let vid = tci & 0xfff;
                let fits = allowed.runs.iter().any(|(first, last)| (*first..=*last).contains(&vid));
                if *tpid != allowed.tpid || !fits {
                    return Err(REASONS.vlan_not_allowed);
                }
            }
            (rules.tagged, rules.allowed.as_ref().map(|allowed| allowed.tpid))
        }
    };
    let (pop, push) = match action {
        Action::Drop(reason) => return Err(reason),
        Action::Rewrite { pop, push, .. } => (pop, push),
    };
    let pushed = push.iter().flatten().count() as i32;
    let growth = 4 * (pushed - i32::from(pop));
    let outer = push[0].map(|tag| tag.tpid).or(kept);
    let counted = frame.len() as i32 + growth - if outer == Some(0x8100) { 4 } else { 0 };
    if counted > limit as i32 { Err(REASONS.too_long) } else { Ok(growth) }
}

fn tag_to_push() -> impl Strategy<Value = PushTag> {
    (prop::sample::select(vec![0x8100, 0x88a8]), any::<u16>())
        .prop_map(|(tpid, tci)| PushTag { tpid, tci })
}

fn action(pops: bool) -> impl Strategy<Value = Action> {
    let push = prop::collection::vec(tag_to_push(), usize::from(pops)..=2);
    let rewrite = (push, any::<bool>()).prop_map(move |(push, copy_priority)| {
        let push = [push.first().copied(), push.get(1).copied()];
        Action::Rewrite { pop: pops, push, copy_priority }
    });
    prop_oneof![4 => rewrite, 1 => Just(Action::Drop(RULE))]
}

fn any_rules() -> impl Strategy<Value = GuestRules> {
    let allowed = (prop::sample::select(vec![0x8100, 0x88a8]), 1..50u16, 0..50u16).prop_map(
        |(tpid, first, more)| Allowed { tpid, runs: vec![(first, first + more), (200, 200)] },
    );
    let priority = prop_oneof![action(false), action(true)];
    let tags = (action(false), priority, action(false));
    (tags, any::<bool>(), prop::option::of(allowed), any::<bool>()).prop_map(
        |((untagged, priority_tagged, tagged), refuse_inner, allowed, strict)| GuestRules {
            untagged,
            priority_tagged,
            tagged,
            refuse_inner,
            allowed,
            sources: if strict { vec![[2; 6], SOURCE] } else { Vec::new() },
        },
    )
}

fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    let tpid = prop::sample::select(ALL_TPIDS.to_vec());
    let tci = prop_oneof![Just(0u16), Just(0xe000), 1..300u16, any::<u16>()];
    let tags = prop::collection::vec((tpid, tci), 0..4);
    let length = prop_oneof![14..40usize, 60..130usize];
    (tags, prop::bool::weighted(0.8), length)
        .prop_map(|(tags, source, length)| frame(&tags, source, length))
}

/// What one run has changed in a record.
fn change(records: &Records, entry: u32, before: &[u64; Record::LEN]) -> [u64; Record::LEN] {
    let mut after = records.sum(entry).unwrap();
    for (after, before) in after.iter_mut().zip(before) {
        *after -= before;
    }
    after
}

#[test]
#[ignore = "needs root: runs BPF programs"]
fn guests_programs_do_and_count_what_the_rules_say() {
    const LIMIT: u32 = 100;
    let uplink = SharedPair::at(None, "test_uplink").unwrap();
    let records = Records::at(None, "test_records", 3).unwrap();
    let mut runner = TestRunner::new(Config { cases: 60, ..Config::default() });
    let frames = prop::collection::vec(any_frame(), 60);
    let cases = (any_rules(), frames, any::<bool>());
    runner
        .run(&cases, |(rules, frames, is_up)| {
            uplink.set(u32::from(is_up), LIMIT).unwrap();
            let program = FromGuest {
                rules: &rules,
                reasons: &REASONS,
                records: records.as_fd(),
                uplink: uplink.as_fd(),
                in_transition: false,
            };
            let program = load(ProgramKind::SchedCls, "test", &program.program().unwrap()).unwrap();
            for frame in frames {
                let before = records.sum(FROM_GUEST).unwrap();
                let verdict = test_run(program.as_fd(), &frame).unwrap();
                let counted = change(&records, FROM_GUEST, &before);
                let mut wanted = [0; Record::LEN];
                wanted[Record::IN_BYTES] = frame.len() as u64;
                let outcome = expected(&rules, &frame, LIMIT);
                // Without an uplink it does not matter how long a frame is.
                let outcome = match outcome {
                    Ok(_) | Err(5) if !is_up => Err(REASONS.uplink_down),
                    other => other,
                };
                match outcome {
                    Ok(growth) => {
                        wanted[Record::OUT_FRAMES] = 1;
                        wanted[Record::OUT_BYTES] =
                            (frame.len() as u64).wrapping_add_signed(growth.into());
                    }
                    Err(reason) => wanted[Record::DROPS + usize::from(reason)] = 1,
                }
                let wanted_verdict = if outcome.is_ok() { REDIRECT } else { SHOT };
                prop_assert_eq!(verdict, wanted_verdict, "{:02x?}", &frame);
                prop_assert_eq!(counted, wanted, "{:02x?}", &frame);
            }
            Ok(())
        })
        .unwrap();
}

/// What XDP sends is what the guest's program would have sent, and counted alike; what it
/// does not, it passes on as it came and counts nothing.
#[test]
#[ignore = "needs root: runs BPF programs"]
fn express_programs_send_plain_frames_and_pass_all_others() {
    const LIMIT: u32 = 100;
    const PASS: u32 = 2;
    const XDP_REDIRECT: u32 = 4;
    let uplink = SharedPair::at(None, "test_uplink").unwrap();
    let records = Records::at(None, "test_records", 3).unwrap();
    let mut runner = TestRunner::new(Config { cases: 60, ..Config::default() });
    let frames = prop::collection::vec(any_frame(), 60);
    let cases = (any_rules(), frames, prop::bool::weighted(0.8));
    let sent = std::cell::Cell::new(0);
    runner
        .run(&cases, |(rules, frames, is_up)| {
            uplink.set(u32::from(is_up), LIMIT).unwrap();
            let express = Express {
                rules: &rules,
                reasons: &REASONS,
                records: records.as_fd(),
                uplink: uplink.as_fd(),
            };
            let program = express.program().unwrap();
            let Action::Rewrite { push, copy_priority, .. } = rules.untagged else {
                prop_assert!(program.is_none());
                return Ok(());
            };
            let program = load(ProgramKind::Xdp, "test", &program.unwrap()).unwrap();
            for frame in frames {
                let before = records.sum(FROM_GUEST).unwrap();
                let (verdict, edited) = test_edit(program.as_fd(), &frame).unwrap();
                let counted = change(&records, FROM_GUEST, &before);
                let plain = tags_of(&frame).is_some_and(|tags| tags.is_empty());
                let mut wanted = [0; Record::LEN];
                if !plain || !is_up || expected(&rules, &frame, LIMIT).is_err() {
                    prop_assert_eq!((verdict, edited, counted), (PASS, frame, wanted));
                    continue;
                }
                let mut tagged = frame[..12].to_vec();
                for tag in push.iter().flatten() {
                    let tci = if copy_priority { tag.tci & 0xfff } else { tag.tci };
                    tagged.extend([tag.tpid.to_be_bytes(), tci.to_be_bytes()].concat());
                }
                tagged.extend(&frame[12..]);
                wanted[Record::OUT_FRAMES] = 1;
                wanted[Record::IN_BYTES] = frame.len() as u64;
                wanted[Record::OUT_BYTES] = tagged.len() as u64;
                prop_assert_eq!((verdict, edited, counted), (XDP_REDIRECT, tagged, wanted));
                sent.set(sent.get() + 1);
            }
            Ok(())
        })
        .unwrap();
    assert!(sent.get() > 100, "{} frames sent are too few", sent.get());
}

#[test]
#[ignore = "needs root: runs BPF programs"]
fn programs_toward_guests_do_and_count_what_they_are_made_for() {
    let records = Records::at(None, "test_records", 3).unwrap();
    let run = |program: &ToGuest<'_>, frame: &[u8]| {
        let program = load(ProgramKind::SchedCls, "test", &program.program().unwrap()).unwrap();
        let before = records.sum(TO_GUEST).unwrap();
        let verdict = test_run(program.as_fd(), frame).unwrap();
        (verdict, change(&records, TO_GUEST, &before))
    };
    let plain = ToGuest {
        pop: 1,
        refuse_inner: false,
        target: Some(1),
        limit: None,
        reasons: &REASONS,
        records: records.as_fd(),
        transition: None,
    };
    let tagged = frame(&[(0x8100, 5)], true, 64);
    let double = frame(&[(0x88a8, 5), (0x8100, 6)], true, 68);
    let triple = frame(&[(0x88a8, 5), (0x8100, 6), (0x9100, 7)], true, 72);
    for (pop, frame, out) in
        [(0, &tagged, 64), (1, &tagged, 60), (1, &double, 64), (2, &triple, 64)]
    {
        let (verdict, counted) = run(&ToGuest { pop, ..plain }, frame);
        assert_eq!((verdict, counted[Record::OUT_BYTES]), (REDIRECT, out), "{pop} {frame:02x?}");
    }
    let dropped = |program: &ToGuest<'_>, frame: &[u8], reason: u8| {
        let (verdict, counted) = run(program, frame);
        let drops = counted[Record::DROPS + usize::from(reason)];
        assert_eq!((verdict, counted[Record::OUT_FRAMES], drops), (SHOT, 0, 1), "{reason}");
    };
    dropped(&ToGuest { refuse_inner: true, ..plain }, &double, REASONS.inner_tag);
    dropped(&ToGuest { pop: 2, refuse_inner: true, ..plain }, &triple, REASONS.inner_tag);
    dropped(&ToGuest { target: None, ..plain }, &tagged, REASONS.guest_absent);
    dropped(&ToGuest { limit: Some(59), ..plain }, &tagged, REASONS.too_long);
    dropped(&plain, &tagged[..17], REASONS.malformed);
    let access = ToGuest { refuse_inner: true, limit: Some(60), ..plain };
    assert_eq!(run(&access, &tagged).0, REDIRECT);
    // A tag that stays in front counts for nothing if it is 0x8100.
    assert_eq!(run(&ToGuest { limit: Some(60), ..plain }, &double).0, REDIRECT);
    dropped(&ToGuest { limit: Some(59), ..plain }, &double, REASONS.too_long);
}
