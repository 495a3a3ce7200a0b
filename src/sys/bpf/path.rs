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
//! A guest without offloads may have a [program](Express) of its own in front of all that, at
//! its device's XDP hook, for plain frames without a tag.
//!
//! While a port changes its path, the frame's socket filter and its program must not
//! disagree, or the frame would be there twice or not at all. So the filter, which comes
//! first, writes what it decided into the record of this CPU ([`Record::DECISION`]), and
//! a program in [transition](FromGuest::in_transition) reads that: both run within one
//! reception, with softirqs off.

mod dispatch;
mod express;
mod writer;

pub use dispatch::{
    DISPATCH_ENTRIES, Dispatch, dispatcher_program, pair_program, pass_program, ring_filter,
};

pub use express::Express;

use super::assembler::{
    Alu, AssemblyError, Condition, Helper, Instruction, Program, R0, R1, R2, R3, R4, R5, R6, R8,
    R9, R10, Width,
};
use super::skb;
use std::os::fd::BorrowedFd;
use writer::{BYTES, ETHERNET, LONGEST, MACS, TAG, TC_ACT_SHOT, TC_ACT_UNSPEC, Writer, be};

/// BPF_F_RECOMPUTE_CSUM, include/uapi/linux/bpf.h.
const RECOMPUTE_CHECKSUM: i32 = 1;

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

#[cfg(test)]
#[path = "path/tests.rs"]
mod tests;
