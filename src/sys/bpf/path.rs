//! The programs of the kernel path: pop, push and redirect at tc ingress.
//!
//! # Theory of operation
//!
//! A frame from the wire meets the [dispatcher](dispatcher_program) at the uplink's
//! ingress, which looks its outermost tag up in an array of programs and jumps there: to
//! the [to-guest program](ToGuest) of a port, to the [pair program](pair_program) of a
//! VLAN whose second tag decides, or, for VLANs of the packet path, to a program that lets
//! the frame pass. No entry: the frame is the host's, and is counted by VID.
//!
//! A frame from a guest meets the [guest program](FromGuest) of its port at the device's
//! ingress. It stands where the seal of a port on the packet path stands and is one
//! itself: a frame is redirected or dropped, and never goes on to the host.
//!
//! One program a port, with its tags, its reasons and its target as constants. What
//! changes often, the uplink's index and MTU, is one value that all guest programs read.
//! Each counts in a record of its port, one for each CPU: so no two CPUs write one cache
//! line, and nothing is locked.
//!
//! The kernel takes an outer 0x8100 or 0x88a8 tag out of the bytes before tc ingress
//! (`skb_vlan_untag`, net/core/dev.c); what is left in the bytes is read with a helper
//! that checks the length. Never by `load_absolute`: it ends a program with 0 when the
//! frame is too short, and 0 is `TC_ACT_OK`, the host's stack.
//!
//! While a port changes its path, the frame's socket filter and its program must not
//! disagree, or the frame would be there twice or not at all. So the filter, which comes
//! first, writes what it decided into the record of this CPU ([`Record::DECISION`]), and
//! a program in [transition](FromGuest::in_transition) reads that: both run within one
//! reception, with softirqs off.

use super::assembler::{
    Alu, AssemblyError, Condition, Helper, Instruction, Label, Program, R0, R1, R2, R3, R4, R5, R6,
    R7, R8, R9, R10, Register, Width,
};
use super::filter::{TPIDS, VIDS};
use super::skb;
use std::os::fd::BorrowedFd;

// include/uapi/linux/pkt_cls.h.
const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_SHOT: i32 = 2;

const MACS: i32 = 12;
const ETHERNET: i32 = 14;
const TAG: i32 = 4;
/// EtherTypes and protocol numbers.
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const TCP: i32 = 6;
const UDP: i32 = 17;

/// BPF_F_RECOMPUTE_CSUM, include/uapi/linux/bpf.h.
const RECOMPUTE_CHECKSUM: i32 = 1;

/// Places on the stack.
const KEY: i16 = -4;
const BYTES: i16 = -16;
/// The longest frame on the wire before the edit: the frame, or a super-frame's segment.
const LONGEST: i16 = -24;

/// What programs count, as positions of u64 in a record.
#[derive(Debug)]
pub struct Record;

impl Record {
    /// Frames sent on.
    pub const OUT_FRAMES: usize = 0;
    /// Bytes that came in, with all tags, of frames sent on and dropped.
    pub const IN_BYTES: usize = 1;
    /// Bytes sent on.
    pub const OUT_BYTES: usize = 2;
    /// What the socket filter decided about this CPU's latest frame: 1, the packet path's.
    pub const DECISION: usize = 3;
    /// Frames dropped because only the packet path could have passed them on; they are
    /// among the drops.
    pub const UNABLE: usize = 4;
    /// Drops, by reason, from here on.
    pub const DROPS: usize = 8;
    /// Most reasons there can be.
    pub const REASONS: usize = 24;
    /// Numbers in a record.
    pub const LEN: usize = Self::DROPS + Self::REASONS;

    const fn offset(place: usize) -> i16 {
        (place * 8) as i16
    }
}

/// Entry of a port's records: what its guest sends.
pub const FROM_GUEST: u32 = 0;
/// Entry of a port's records: what its guest is sent.
pub const TO_GUEST: u32 = 1;

/// Numbers of the reasons for drops: positions behind [`Record::DROPS`].
#[derive(Debug, Clone, Copy)]
pub struct Reasons {
    /// The source address is not one of the port's.
    pub spoofed_mac: u8,
    /// The frame ends inside a tag.
    pub malformed: u8,
    /// A tag behind an access port's tag, from the wire.
    pub inner_tag: u8,
    /// A tag behind a guest's priority tag on an access port.
    pub tagged_on_access: u8,
    /// Outside a trunk's list.
    pub vlan_not_allowed: u8,
    /// Longer than the outgoing device's MTU.
    pub too_long: u8,
    /// Beyond what the kernel can segment.
    pub bad_offload: u8,
    /// No uplink to send on.
    pub uplink_down: u8,
    /// The guest's device is not there.
    pub guest_absent: u8,
    /// The kernel could not make room for a tag.
    pub send_failed: u8,
    /// No port has this pair of tags.
    pub unmapped: u8,
}

/// A tag to push.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PushTag {
    /// 0x8100 or 0x88a8.
    pub tpid: u16,
    /// PCP, DEI and VID.
    pub tci: u16,
}

/// What to do with one class of a guest's frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Drop them for this reason.
    Drop(u8),
    /// Send them on.
    Rewrite {
        /// Take the guest's own outermost tag off.
        pop: bool,
        /// Tags to put on then, outermost first.
        push: [Option<PushTag>; 2],
        /// The pushed tags take PCP and DEI of the guest's own tag.
        copy_priority: bool,
    },
}

/// A trunk's VIDs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// Their TPID.
    pub tpid: u16,
    /// Runs of them, first and last, ascending.
    pub runs: Vec<(u16, u16)>,
}

/// What a port's guest may send and what becomes of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestRules {
    /// Frames without a tag.
    pub untagged: Action,
    /// Frames whose outermost tag has VID 0.
    pub priority_tagged: Action,
    /// All others.
    pub tagged: Action,
    /// Drop priority-tagged frames with another tag behind.
    pub refuse_inner: bool,
    /// A trunk's VIDs; tagged frames outside are dropped.
    pub allowed: Option<Allowed>,
    /// Source addresses the guest may use; none: any.
    pub sources: Vec<[u8; 6]>,
}

impl GuestRules {
    /// Whether it does not matter what tags a frame has.
    fn is_uniform(&self) -> bool {
        let copies = |action: &Action| {
            matches!(
                action,
                Action::Rewrite { copy_priority: true, .. } | Action::Rewrite { pop: true, .. }
            )
        };
        self.untagged == self.priority_tagged
            && self.untagged == self.tagged
            && !copies(&self.untagged)
            && !self.refuse_inner
            && self.allowed.is_none()
    }
}

/// What a guest's program is made of.
#[derive(Debug, Clone, Copy)]
pub struct FromGuest<'a> {
    /// Its rules.
    pub rules: &'a GuestRules,
    /// Numbers of the reasons.
    pub reasons: &'a Reasons,
    /// The port's records.
    pub records: BorrowedFd<'a>,
    /// The uplink's index (0: not there) and longest frame without a 0x8100 tag, two u32.
    pub uplink: BorrowedFd<'a>,
    /// Frames its socket's filter has taken are the packet path's.
    pub in_transition: bool,
}

/// What a program toward a guest is made of.
#[derive(Debug, Clone, Copy)]
pub struct ToGuest<'a> {
    /// Tags to take off: 0 to 2.
    pub pop: u8,
    /// Drop the frame if a tag remains after that.
    pub refuse_inner: bool,
    /// Index of the guest's device; `None`: it is absent.
    pub target: Option<u32>,
    /// The longest frame its device sends without a 0x8100 tag, if that is a limit.
    pub limit: Option<u32>,
    /// Numbers of the reasons.
    pub reasons: &'a Reasons,
    /// The port's records.
    pub records: BorrowedFd<'a>,
    /// The uplink's records, if frames its filter has taken are the packet path's.
    pub transition: Option<BorrowedFd<'a>>,
}

impl FromGuest<'_> {
    /// The program. R6: context, R7: length on the wire, R8: the guest's own TCI.
    ///
    /// # Errors
    /// None that lists of up to 4094 VIDs cause.
    pub fn program(&self) -> Result<Vec<Instruction>, AssemblyError> {
        let Self { rules, reasons, .. } = *self;
        let mut writer = Writer::new(self.records, FROM_GUEST);
        writer.program.mov(R6, R1);
        if self.in_transition {
            let ours = writer.program.label();
            writer.look_up(self.records, FROM_GUEST);
            writer.program.load(Width::Double, R1, R0, Record::offset(Record::DECISION)).jump_if(
                R1,
                Condition::Equal,
                0,
                ours,
            );
            writer.end(TC_ACT_SHOT);
            writer.program.place(ours);
        }
        writer.measure();
        writer.check_tags(reasons.malformed);
        writer.check_sources(&rules.sources, reasons.spoofed_mac);
        writer.measure_segments(reasons);
        if rules.is_uniform() {
            self.act(&mut writer, rules.untagged, None);
            return writer.finish();
        }
        let (tagged, priority, untagged) =
            (writer.program.label(), writer.program.label(), writer.program.label());
        writer.own_tag(untagged, reasons.malformed);
        // R8: TCI, R5: TPID in network order, the EtherType behind it on the stack.
        writer.program.mov(R1, R8).alu(Alu::And, R1, 0xfff);
        writer.program.jump_if(R1, Condition::NotEqual, 0, tagged);
        if rules.refuse_inner {
            writer.program.load(Width::Half, R2, R10, BYTES + 2);
            let refused = writer.drop_label(reasons.tagged_on_access);
            writer.jump_if_tpid(R2, refused);
        }
        writer.program.jump(priority);

        writer.program.place(tagged);
        if let Some(allowed) = &rules.allowed {
            let fits = writer.program.label();
            let refused = writer.drop_label(reasons.vlan_not_allowed);
            writer.program.jump_if(R5, Condition::NotEqual, be(allowed.tpid), refused);
            for &(first, last) in &allowed.runs {
                let next = writer.program.label();
                writer
                    .program
                    .jump_if(R1, Condition::Less, i32::from(first), next)
                    .jump_if(R1, Condition::LessOrEqual, i32::from(last), fits)
                    .place(next);
            }
            writer.program.jump(refused).place(fits);
        }
        let own_tpid = rules.allowed.as_ref().map(|allowed| allowed.tpid);
        self.act(&mut writer, rules.tagged, own_tpid);

        writer.program.place(priority);
        if matches!(rules.priority_tagged, Action::Rewrite { pop: true, .. }) {
            // The helper takes these two off and knows no others.
            let known = writer.program.label();
            writer.program.jump_if(R5, Condition::Equal, be(0x8100), known).jump_if(
                R5,
                Condition::Equal,
                be(0x88a8),
                known,
            );
            self.write_over(&mut writer, rules.priority_tagged);
            writer.program.place(known);
        }
        self.act(&mut writer, rules.priority_tagged, own_tpid);

        writer.program.place(untagged);
        self.act(&mut writer, rules.untagged, None);
        writer.finish()
    }

    /// Ends the program by an action; `own_tpid` is the tag a frame keeps.
    fn act(&self, writer: &mut Writer<'_>, action: Action, own_tpid: Option<u16>) {
        let (pop, push, copy_priority) = match action {
            Action::Drop(reason) => {
                let label = writer.drop_label(reason);
                writer.program.jump(label);
                return;
            }
            Action::Rewrite { pop, push, copy_priority } => (pop, push, copy_priority),
        };
        let pushed: Vec<PushTag> = push.into_iter().flatten().collect();
        let growth = TAG * (pushed.len() as i32 - i32::from(pop));
        let outer = pushed.first().map(|tag| tag.tpid).or(own_tpid);
        self.check_way(writer, growth, outer);
        if pop {
            let failed = writer.drop_label(self.reasons.send_failed);
            writer.pop(failed);
        }
        self.push_and_send(writer, &pushed, copy_priority, growth);
    }

    /// Ends the program as an action does that takes off the guest's own tag and puts on
    /// others: by writing the innermost of them over it, where it stands in the bytes.
    fn write_over(&self, writer: &mut Writer<'_>, action: Action) {
        let Action::Rewrite { push, copy_priority, .. } = action else { return };
        let pushed: Vec<PushTag> = push.into_iter().flatten().collect();
        let (Some(outer), Some((inner, outside))) = (pushed.first(), pushed.split_last()) else {
            return;
        };
        let growth = TAG * outside.len() as i32;
        self.check_way(writer, growth, Some(outer.tpid));
        let failed = writer.drop_label(self.reasons.send_failed);
        Self::priority(&mut writer.program, inner, copy_priority);
        writer
            .program
            .store(Width::Half, R10, BYTES, be(inner.tpid))
            // The upper byte first, whatever order the machine has.
            .store(Width::Byte, R10, BYTES + 3, R3)
            .alu(Alu::ShiftRight, R3, 8)
            .store(Width::Byte, R10, BYTES + 2, R3)
            .mov(R1, R6)
            .mov(R2, MACS)
            .mov(R3, R10)
            .alu(Alu::Add, R3, i32::from(BYTES))
            .mov(R4, TAG)
            .mov(R5, RECOMPUTE_CHECKSUM)
            .call(Helper::StoreBytes)
            .jump_if(R0, Condition::NotEqual, 0, failed);
        self.push_and_send(writer, outside, copy_priority, growth);
    }

    /// Drops a frame that cannot go out, grown by this much, with this tag in front; else
    /// R9 is the uplink's index.
    fn check_way(&self, writer: &mut Writer<'_>, growth: i32, outer: Option<u16>) {
        let reasons = self.reasons;
        let down = writer.drop_label(reasons.uplink_down);
        let too_long = writer.drop_label(reasons.too_long);
        writer
            .program
            .load_map_value(R1, self.uplink)
            .load(Width::Word, R9, R1, 0)
            .jump_if(R9, Condition::Equal, 0, down)
            .load(Width::Word, R2, R1, 4)
            .load(Width::Double, R3, R10, LONGEST)
            .alu(Alu::Add, R3, growth - if outer == Some(0x8100) { TAG } else { 0 })
            .jump_if(R3, Condition::Greater, R2, too_long);
    }

    /// `R3 = the TCI` of a tag to put on.
    fn priority(program: &mut Program, tag: &PushTag, copy_priority: bool) {
        if copy_priority {
            program.mov(R3, R8).alu(Alu::And, R3, 0xf000).alu(
                Alu::Or,
                R3,
                i32::from(tag.tci & 0xfff),
            );
        } else {
            program.mov(R3, i32::from(tag.tci));
        }
    }

    /// Puts tags on, given outermost first, counts, and sends to the index in R9.
    fn push_and_send(
        &self,
        writer: &mut Writer<'_>,
        pushed: &[PushTag],
        copy_priority: bool,
        growth: i32,
    ) {
        let failed = writer.drop_label(self.reasons.send_failed);
        for tag in pushed.iter().rev() {
            Self::priority(&mut writer.program, tag, copy_priority);
            writer.program.mov(R1, R6).mov(R2, be(tag.tpid));
            writer.program.call(Helper::VlanPush).jump_if(R0, Condition::NotEqual, 0, failed);
        }
        writer.count_sent(growth);
        writer.program.mov(R1, R9).mov(R2, 0).call(Helper::Redirect).exit();
    }
}

impl ToGuest<'_> {
    /// The program. R6: context, R7: length on the wire.
    ///
    /// # Errors
    /// None: the signature is that of all programs.
    pub fn program(&self) -> Result<Vec<Instruction>, AssemblyError> {
        let reasons = self.reasons;
        let mut writer = Writer::new(self.records, TO_GUEST);
        writer.program.mov(R6, R1);
        if let Some(uplink) = self.transition {
            let ours = writer.program.label();
            writer.look_up(uplink, 0);
            writer.program.load(Width::Double, R1, R0, Record::offset(Record::DECISION)).jump_if(
                R1,
                Condition::Equal,
                0,
                ours,
            );
            writer.end(TC_ACT_UNSPEC);
            writer.program.place(ours);
        }
        writer.measure();
        writer.check_tags(reasons.malformed);
        if self.refuse_inner {
            let refused = writer.drop_label(reasons.inner_tag);
            if self.pop == 1 {
                writer.next_type(reasons.malformed);
            } else {
                writer.load_bytes(ETHERNET + 2, 2, reasons.malformed);
                writer.program.load(Width::Half, R2, R10, BYTES);
            }
            writer.jump_if_tpid(R2, refused);
        }
        let Some(target) = self.target else {
            let absent = writer.drop_label(reasons.guest_absent);
            writer.program.jump(absent);
            return writer.finish();
        };
        let growth = -TAG * i32::from(self.pop);
        if self.limit.is_some() {
            writer.measure_segments(reasons);
        }
        let failed = writer.drop_label(reasons.send_failed);
        for _ in 0..self.pop {
            writer.pop(failed);
        }
        if let Some(limit) = self.limit {
            let (too_long, fits) = (writer.drop_label(reasons.too_long), writer.program.label());
            writer
                .program
                .load(Width::Double, R3, R10, LONGEST)
                .alu(Alu::Add, R3, growth)
                .jump_if(R3, Condition::LessOrEqual, limit as i32, fits)
                .jump_if(R3, Condition::Greater, limit as i32 + TAG, too_long)
                // A tag that is left is in front now, and counts for nothing if it is 0x8100.
                .load(Width::Word, R2, R6, skb::VLAN_PRESENT)
                .jump_if(R2, Condition::Equal, 0, too_long)
                .load(Width::Word, R2, R6, skb::VLAN_PROTO)
                .jump_if(R2, Condition::NotEqual, be(0x8100), too_long)
                .place(fits);
        }
        writer.count_sent(growth);
        writer.program.mov(R1, target as i32).mov(R2, 0).call(Helper::Redirect).exit();
        writer.finish()
    }
}

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
    program.load(Width::Double, R1, R0, 0).alu(Alu::Add, R1, 1).store(Width::Double, R0, 0, R1);
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

/// A constant as the context has it.
fn be(value: u16) -> i32 {
    i32::from(value.to_be())
}

/// `register = the two bytes at this place of the stack, as a number`.
fn from_network(program: &mut Program, register: Register, place: i16) {
    program.load(Width::Byte, register, R10, place).alu(Alu::ShiftLeft, register, 8);
    program.load(Width::Byte, R2, R10, place + 1).alu(Alu::Or, register, R2);
}

/// `R0 = address of the value`, or 0, for the key on the stack.
fn look_up_key(program: &mut Program, map: BorrowedFd<'_>) {
    program.load_map(R1, map).mov(R2, R10).alu(Alu::Add, R2, i32::from(KEY));
    program.call(Helper::MapLookup);
}

/// A program that ends in counted drops. R6 is the context, R7 the frame's length on the
/// wire from [`Writer::measure`] on.
struct Writer<'a> {
    program: Program,
    records: BorrowedFd<'a>,
    entry: u32,
    /// What a drop returns.
    verdict: i32,
    /// Reasons that are jumped to, each with its label; whether the packet path could.
    drops: Vec<(u8, bool, Label)>,
}

impl<'a> Writer<'a> {
    fn new(records: BorrowedFd<'a>, entry: u32) -> Self {
        Self { program: Program::new(), records, entry, verdict: TC_ACT_SHOT, drops: Vec::new() }
    }

    /// Where a drop for this reason is counted.
    fn drop_label(&mut self, reason: u8) -> Label {
        self.label(reason, false)
    }

    /// Where a drop is counted that the packet path would spare.
    fn unable_label(&mut self, reason: u8) -> Label {
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

    fn end(&mut self, verdict: i32) {
        self.program.mov(R0, verdict).exit();
    }

    /// `R0 = address of a record`; without one the program ends with a drop.
    fn look_up(&mut self, records: BorrowedFd<'_>, entry: u32) {
        let found = self.program.label();
        self.program.store(Width::Word, R10, KEY, entry as i32);
        look_up_key(&mut self.program, records);
        self.program.jump_if(R0, Condition::NotEqual, 0, found);
        self.end(TC_ACT_SHOT);
        self.program.place(found);
    }

    /// `R7 = length on the wire`: with the tag the kernel has taken out.
    fn measure(&mut self) {
        let untagged = self.program.label();
        self.program
            .load(Width::Word, R7, R6, skb::LEN)
            .load(Width::Word, R2, R6, skb::VLAN_PRESENT)
            .jump_if(R2, Condition::Equal, 0, untagged)
            .alu(Alu::Add, R7, TAG)
            .place(untagged);
    }

    /// Drops a frame that ends inside a tag or right behind one. R7 must be known.
    fn check_tags(&mut self, malformed: u8) {
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
    fn load_bytes(&mut self, offset: i32, length: i32, reason: u8) {
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
    fn jump_if_tpid(&mut self, register: Register, target: Label) {
        for tpid in TPIDS {
            self.program.jump_if(register, Condition::Equal, be(tpid), target);
        }
    }

    /// `R2 = EtherType behind the outermost tag`, of a frame that has one.
    fn next_type(&mut self, malformed: u8) {
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
    fn own_tag(&mut self, untagged: Label, malformed: u8) {
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

    fn check_sources(&mut self, sources: &[[u8; 6]], spoofed: u8) {
        if sources.is_empty() {
            return;
        }
        let (refused, known) = (self.drop_label(spoofed), self.program.label());
        self.program.mov(R2, MACS / 2);
        self.load_bytes_from_r2(6, refused);
        self.program.load(Width::Word, R1, R10, BYTES).load(Width::Half, R2, R10, BYTES + 4);
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
    fn measure_segments(&mut self, reasons: &Reasons) {
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
    fn pop(&mut self, failed: Label) {
        self.program.mov(R1, R6).call(Helper::VlanPop).jump_if(R0, Condition::NotEqual, 0, failed);
    }

    /// Counts a frame that goes on, this much longer than it came.
    fn count_sent(&mut self, growth: i32) {
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
    fn finish(mut self) -> Result<Vec<Instruction>, AssemblyError> {
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
