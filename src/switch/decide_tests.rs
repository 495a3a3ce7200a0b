//! `decide` and the tag edit against a naive model written from the table of
//! DESIGN §3: the model works on lists of tags, knows no look-up table, and is
//! told the port's options as a user would write them.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests fail by panicking"
)]

use crate::frame::edit::HEADROOM;
use crate::frame::{FrameBuffer, Pcp, Tag, TagStack, Tci, Tpid, Vid};
use crate::switch::{
    DropReason, GuestVerdict, Membership, MembershipError, Mode, Priority, Table, UplinkVerdict,
    Vlans,
};
use proptest::prelude::*;

/// (TPID, VID, PCP and DEI as four bits)
type Wire = (u16, u16, u16);

#[derive(Debug, Clone)]
struct Port {
    vlans: Vec<u16>,
    inner: Option<(u16, u16)>,
    mode: Mode,
    native: Option<u16>,
    tpid: u16,
    /// `None` is `copy`.
    pcp: Option<u16>,
}

#[derive(Debug, PartialEq)]
enum Fate {
    Deliver(Vec<Wire>),
    Drop(DropReason),
    NotMine,
}

impl Port {
    fn owns(&self, tags: &[Wire]) -> bool {
        match (tags.first(), self.inner) {
            (None, _) => self.vlans == [0],
            (Some(outer), None) => outer.0 == self.tpid && self.vlans.contains(&outer.1),
            (Some(outer), Some(inner)) => {
                outer.0 == self.tpid
                    && self.vlans.contains(&outer.1)
                    && tags.get(1).is_some_and(|tag| (tag.0, tag.1) == inner)
            }
        }
    }

    fn to_guest(&self, tags: &[Wire]) -> Fate {
        if !self.owns(tags) {
            return Fate::NotMine;
        }
        let own = if self.inner.is_some() { 2 } else { 1 };
        let rest = tags.get(own..).unwrap_or_default().to_vec();
        match self.mode {
            Mode::Tunnel => Fate::Deliver(rest),
            Mode::Access if !rest.is_empty() => Fate::Drop(DropReason::InnerTag),
            Mode::Access => Fate::Deliver(rest),
            Mode::Trunk if self.native == Some(tags[0].1) => Fate::Deliver(rest),
            Mode::Trunk => Fate::Deliver(tags.to_vec()),
        }
    }

    fn ours(&self, priority: u16) -> Vec<Wire> {
        let vid = if self.mode == Mode::Trunk { self.native.unwrap() } else { self.vlans[0] };
        let mut tags = vec![(self.tpid, vid, priority)];
        tags.extend(self.inner.map(|(tpid, vid)| (tpid, vid, priority)));
        tags
    }

    fn to_uplink(&self, tags: &[Wire]) -> Fate {
        let fixed = self.pcp.unwrap_or(0) << 1;
        let guests_own = tags.first().map_or(0, |tag| tag.2);
        let pushed_over = if self.pcp.is_none() { guests_own } else { fixed };
        let put = |priority: u16, behind: &[Wire]| {
            let mut out = self.ours(priority);
            out.extend(behind);
            Fate::Deliver(out)
        };
        match (self.mode, tags.first().map(|tag| tag.1)) {
            (Mode::Tunnel, _) => put(pushed_over, tags),
            // VLAN 0 has no tag to push unless it carries a priority.
            (Mode::Access, None) if self.vlans == [0] && fixed == 0 => Fate::Deliver(vec![]),
            (Mode::Access, None) => put(fixed, &[]),
            (Mode::Access, Some(0)) if tags.len() > 1 => Fate::Drop(DropReason::TaggedOnAccess),
            (Mode::Access, Some(0)) => put(guests_own, &[]),
            (Mode::Access, Some(_)) => Fate::Drop(DropReason::TaggedOnAccess),
            (Mode::Trunk, None | Some(0)) if self.native.is_none() => {
                Fate::Drop(DropReason::UntaggedOnTrunk)
            }
            (Mode::Trunk, None) => put(fixed, &[]),
            (Mode::Trunk, Some(0)) => put(guests_own, &tags[1..]),
            (Mode::Trunk, Some(vid)) if tags[0].0 == self.tpid && self.vlans.contains(&vid) => {
                Fate::Deliver(tags.to_vec())
            }
            (Mode::Trunk, Some(_)) => Fate::Drop(DropReason::VlanNotAllowed),
        }
    }

    fn membership(&self) -> Membership {
        let vid = |number| Vid::new(number).unwrap();
        let vlans = match (self.vlans.as_slice(), self.inner) {
            ([0], _) => Vlans::Untagged,
            ([outer], Some((_, inner))) => Vlans::Double { outer: vid(*outer), inner: vid(inner) },
            ([one], None) => Vlans::One(vid(*one)),
            (many, _) => Vlans::List(many.iter().map(|number| vid(*number)).collect()),
        };
        let priority = match self.pcp {
            None => Priority::Copy,
            Some(pcp) => Priority::Fixed(Pcp::new(pcp as u8).unwrap()),
        };
        Membership::new(
            vlans,
            Some(self.mode),
            self.native.map(vid),
            tpid(self.tpid),
            self.inner.map(|(inner, _)| tpid(inner)),
            priority,
        )
        .unwrap()
    }
}

fn tpid(ethertype: u16) -> Tpid {
    Tpid::from_ethertype(ethertype).unwrap()
}

const TPIDS: [u16; 4] = [0x8100, 0x88a8, 0x9100, 0x9200];

fn any_tpid() -> impl Strategy<Value = u16> {
    (0..4usize).prop_map(|index| TPIDS[index])
}

/// VIDs from a small range, so that frames meet ports.
fn port() -> impl Strategy<Value = Port> {
    let common = (any_tpid(), proptest::option::of(0..8u16));
    let access_or_tunnel = prop_oneof![Just(Mode::Access), Just(Mode::Tunnel)];
    let single = (0..9u16, access_or_tunnel.clone(), proptest::option::of((any_tpid(), 0..5u16)))
        .prop_map(|(vid, mode, inner)| {
            let mode = if vid == 0 { Mode::Access } else { mode };
            (vec![vid], if vid == 0 { None } else { inner }, mode, None)
        });
    let trunk =
        (proptest::collection::btree_set(1..9u16, 1..5), any::<Option<proptest::sample::Index>>())
            .prop_map(|(vids, native)| {
                let vids: Vec<u16> = vids.into_iter().collect();
                let native = native.map(|index| *index.get(&vids));
                (vids, None, Mode::Trunk, native)
            });
    (prop_oneof![single, trunk], common).prop_map(|((vlans, inner, mode, native), (tpid, pcp))| {
        Port { vlans, inner, mode, native, tpid, pcp }
    })
}

fn stack() -> impl Strategy<Value = Vec<Wire>> {
    let vid = prop_oneof![8 => 0..9u16, 1 => Just(4094), 1 => Just(4095)];
    proptest::collection::vec((any_tpid(), vid, 0..16u16), 0..4)
}

/// A port and a frame that has a fair chance to be the port's: half of them start
/// with the port's own tags.
fn port_and_stack() -> impl Strategy<Value = (Port, Vec<Wire>)> {
    (port(), stack(), any::<prop::sample::Index>(), 0..16u16, any::<bool>()).prop_map(
        |(port, mut tags, index, priority, own)| {
            if own && port.vlans != [0] {
                let vid = *index.get(&port.vlans);
                let inner = port.inner.map(|(tpid, vid)| (tpid, vid, priority));
                let head = [Some((port.tpid, vid, priority)), inner];
                tags = head.into_iter().flatten().chain(tags).take(3).collect();
            }
            (port, tags)
        },
    )
}

/// A frame with these tags as the kernel hands it over: a C- or S-tag outside is
/// stripped, every other stays in the bytes.
fn received(tags: &[Wire]) -> (Option<Tag>, Vec<u8>) {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let mut stripped = None;
    for (depth, (ethertype, vid, priority)) in tags.iter().enumerate() {
        let tci = Tci(vid | priority << 12);
        if depth == 0 && matches!(ethertype, 0x8100 | 0x88a8) {
            stripped = Some(Tag { tpid: tpid(*ethertype), tci });
        } else {
            frame.extend(ethertype.to_be_bytes());
            frame.extend(tci.0.to_be_bytes());
        }
    }
    frame.extend([0x88, 0xb5, 0xde, 0xad, 0xbe, 0xef]);
    (stripped, frame)
}

fn wire(tags: &[Wire]) -> Vec<u8> {
    let (stripped, mut frame) = received(tags);
    if let Some(tag) = stripped {
        frame.splice(12..12, tag.to_bytes());
    }
    frame
}

fn rewritten(stripped: Option<Tag>, frame: &[u8], edit: &crate::frame::TagEdit) -> Vec<u8> {
    let mut space = vec![0; HEADROOM];
    space.extend(frame);
    let mut buffer = FrameBuffer::new(&mut space, HEADROOM).unwrap();
    buffer.apply(edit, stripped).unwrap();
    buffer.frame().to_vec()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn frames_from_the_uplink_follow_the_table((port, tags) in port_and_stack()) {
        let table = Table::compile([&port.membership()]).unwrap();
        let (stripped, frame) = received(&tags);
        let verdict = table.decide_from_uplink(&TagStack::read(stripped, &frame).unwrap());
        match (port.to_guest(&tags), verdict) {
            (Fate::NotMine, UplinkVerdict::Unmapped) => {}
            (Fate::Drop(expected), UplinkVerdict::Drop { port: 0, reason }) => {
                prop_assert_eq!(expected, reason);
            }
            (Fate::Deliver(expected), UplinkVerdict::Forward { port: 0, edit }) => {
                prop_assert_eq!(rewritten(stripped, &frame, &edit), wire(&expected));
            }
            (expected, verdict) => prop_assert!(false, "expected {expected:?}, got {verdict:?}"),
        }
    }

    #[test]
    fn frames_from_the_guest_follow_the_table((port, tags) in port_and_stack()) {
        let table = Table::compile([&port.membership()]).unwrap();
        let (stripped, frame) = received(&tags);
        let verdict = table.decide_from_guest(0, &TagStack::read(stripped, &frame).unwrap());
        match (port.to_uplink(&tags), verdict) {
            (Fate::Drop(expected), GuestVerdict::Drop(reason)) => prop_assert_eq!(expected, reason),
            (Fate::Deliver(expected), GuestVerdict::Forward(edit)) => {
                prop_assert_eq!(rewritten(stripped, &frame, &edit), wire(&expected));
            }
            (expected, verdict) => prop_assert!(false, "expected {expected:?}, got {verdict:?}"),
        }
    }

    /// Whatever a guest sends comes out in a VLAN of its own port: no port can
    /// reach another port's VLAN.
    #[test]
    fn a_guest_stays_in_its_vlans((port, tags) in port_and_stack()) {
        let membership = port.membership();
        let table = Table::compile([&membership]).unwrap();
        let (stripped, frame) = received(&tags);
        let read = TagStack::read(stripped, &frame).unwrap();
        if let GuestVerdict::Forward(edit) = table.decide_from_guest(0, &read) {
            let out = rewritten(stripped, &frame, &edit);
            let back = TagStack::read(None, &out).unwrap();
            let owned = matches!(
                table.decide_from_uplink(&back),
                UplinkVerdict::Forward { port: 0, .. } | UplinkVerdict::Drop { port: 0, .. }
            );
            prop_assert!(owned, "{tags:?} left as {back:?}");
        }
    }
}

fn one(vid: u16) -> Port {
    Port {
        vlans: vec![vid],
        inner: None,
        mode: Mode::Access,
        native: None,
        tpid: 0x8100,
        pcp: Some(0),
    }
}

#[test]
fn every_conflict_names_both_ports() {
    let pair = |inner| Port { inner: Some((0x8100, inner)), ..one(101) };
    let trunk = Port { vlans: vec![100, 101, 102], mode: Mode::Trunk, ..one(0) };
    for (first, second) in [
        (one(101), one(101)),
        (one(101), pair(20)),
        (pair(20), one(101)),
        (pair(20), pair(20)),
        (trunk.clone(), one(101)),
        (one(0), one(0)),
    ] {
        let memberships = [one(7).membership(), first.membership(), second.membership()];
        let conflict = Table::compile(&memberships).unwrap_err();
        assert_eq!((conflict.first, conflict.second), (1, 2), "{conflict}");
    }
    for (first, second) in
        [(pair(20), pair(21)), (one(101), Port { tpid: 0x88a8, ..one(101) }), (one(0), one(101))]
    {
        Table::compile(&[first.membership(), second.membership()]).unwrap();
    }
}

#[test]
fn all_vlans_of_all_tpids_fit() {
    let ports: Vec<Membership> = TPIDS
        .iter()
        .flat_map(|tpid| (1..=4094).map(|vid| Port { tpid: *tpid, ..one(vid) }.membership()))
        .collect();
    let table = Table::compile(&ports).unwrap();
    let tag = Tag { tpid: Tpid::Legacy9200, tci: Tci(4094) };
    let (stripped, frame) = (None, wire(&[(0x9200, 4094, 0)]));
    let verdict = table.decide_from_uplink(&TagStack::read(stripped, &frame).unwrap());
    assert_eq!(TagStack::read(None, &frame).unwrap().outer(), Some(tag));
    assert!(matches!(verdict, UplinkVerdict::Forward { port, .. } if port == 4 * 4094 - 1));
}

#[test]
fn combinations_without_sense_are_refused() {
    let vid = |number| Vid::new(number).unwrap();
    let list = Vlans::List(vec![vid(1), vid(2), vid(3), vid(9)]);
    let make = |vlans: &Vlans, mode, native, inner| {
        Membership::new(vlans.clone(), mode, native, Tpid::Customer, inner, Priority::Copy)
    };
    let double = Vlans::Double { outer: vid(1), inner: vid(2) };
    assert!(matches!(
        make(&Vlans::Untagged, Some(Mode::Tunnel), None, None),
        Err(MembershipError::UntaggedMode(_))
    ));
    assert!(matches!(
        make(&list, Some(Mode::Access), None, None),
        Err(MembershipError::ListMode(_))
    ));
    assert!(matches!(
        make(&double, Some(Mode::Trunk), None, None),
        Err(MembershipError::DoubleTrunk(_))
    ));
    assert!(matches!(
        make(&Vlans::One(vid(1)), None, Some(vid(1)), None),
        Err(MembershipError::NativeWithoutTrunk(_))
    ));
    let error = make(&list, None, Some(vid(4)), None).unwrap_err();
    assert!(error.to_string().contains("1-3,9"), "{error}");
    assert!(matches!(
        make(&list, None, None, Some(Tpid::Service)),
        Err(MembershipError::InnerTpidWithoutInner)
    ));
    assert_eq!(make(&list, None, None, None).unwrap().mode(), Mode::Trunk);
    assert_eq!(make(&double, None, None, None).unwrap().mode(), Mode::Tunnel);
    assert_eq!(make(&Vlans::Untagged, None, None, None).unwrap().mode(), Mode::Access);
}

#[test]
fn truncated_frames_are_not_read() {
    let frame = wire(&[(0x9100, 5, 0), (0x8100, 6, 0)]);
    for length in 0..frame.len() {
        let read = TagStack::read(None, &frame[..length]);
        // Two tags and the EtherType behind them end at byte 22.
        assert_eq!(read.is_ok(), length >= 22, "length {length}");
    }
}

#[test]
fn each_outer_vlan_has_inner_ones_of_its_own() {
    let pair = |outer, inner| Port { inner: Some((0x8100, inner)), ..one(outer) }.membership();
    let ports = [pair(101, 20), pair(102, 20), pair(101, 21), pair(103, 22)];
    let table = Table::compile(&ports).unwrap();
    for (outer, inner, expected) in [
        (101, 20, Some(0)),
        (102, 20, Some(1)),
        (101, 21, Some(2)),
        (103, 22, Some(3)),
        (102, 21, None),
        (103, 20, None),
    ] {
        let frame = wire(&[(0x8100, outer, 0), (0x8100, inner, 0)]);
        let found = match table.decide_from_uplink(&TagStack::read(None, &frame).unwrap()) {
            UplinkVerdict::Forward { port, .. } => Some(port),
            _ => None,
        };
        assert_eq!(found, expected, "{outer}.{inner}");
    }
}

/// What programs are made of is what the table decides by.
#[test]
fn a_trunks_vids_are_told_as_runs() {
    let trunk = |vids: &[u16], native: Option<u16>| {
        let vids = vids.iter().map(|vid| Vid::new(*vid).unwrap()).collect();
        let native = native.map(|vid| Vid::new(vid).unwrap());
        Membership::new(Vlans::List(vids), None, native, Tpid::Service, None, Priority::Copy)
            .unwrap()
    };
    let scattered = trunk(&[1, 2, 3, 64, 65, 4094], Some(2));
    let runs = vec![(1, 3), (64, 65), (4094, 4094)];
    assert_eq!(scattered.guest_rules().allowed(), Some((Tpid::Service, runs)));
    for (vid, pop) in [(1, 0), (2, 1), (4094, 0)] {
        let removal = scattered.removal(Vid::new(vid).unwrap());
        assert_eq!((removal.pop, removal.refuse_inner), (pop, false), "{vid}");
    }
    assert_eq!(one(101).membership().guest_rules().allowed(), None);
    assert_eq!(one(101).membership().removal(Vid::new(101).unwrap()).pop, 1);
}
