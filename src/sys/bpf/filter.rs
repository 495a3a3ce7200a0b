//! The uplink's socket filter: takes the VLANs somebody mapped, leaves the rest.
//!
//! The uplink's AF_PACKET socket would be handed every frame of the host. The
//! filter runs before a ring slot is taken (`tpacket_rcv`), so a frame nobody
//! mapped costs some tens of nanoseconds and no copy.
//!
//! Three maps tie it to us. `claims`, an array by VID, holds a bit for each TPID in
//! the order 0x8100, 0x88a8, 0x9100, 0x9200 (`crate::frame::Tpid::ALL`); bit 4 of
//! entry 0 claims frames without any tag. A VID 0 tag is looked up like any other.
//! `seen`, an array, counts the tagged frames that were rejected, so that an operator
//! can be told which VLANs are on the wire and mapped nowhere (one count for all CPUs: a
//! copy for each takes 10 ms longer to make, and a restart waits for it); `sources`,
//! another, holds the source address of the last of them, to tell who that is, and is
//! written when it is another one: CPUs that see the same VLAN share these two places,
//! and need not share the second. All other frames meet neither.
//!
//! The outermost tag is in the context when the NIC or the kernel took it out
//! (0x8100 and 0x88a8), and in the bytes otherwise (0x9100 and 0x9200 always).

#![allow(unsafe_code, reason = "setsockopt SO_ATTACH_BPF has no wrapper in nix")]

use super::assembler::{
    Alu, AssemblyError, Condition, Helper, Instruction, Program, R0, R1, R2, R6, R7, R8, R10, Width,
};
use super::map::{ArrayMap, WideArrayMap};
use super::path::{Dispatch, Record};
use super::skb;
use super::syscall::{BpfError, ProgramKind, load};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// TPIDs by index; the claim bit is the index.
pub(super) const TPIDS: [u16; 4] = [0x8100, 0x88a8, 0x9100, 0x9200];
/// VIDs per TPID: the full range of 12 bits, reserved ones included.
pub(super) const VIDS: u32 = 4096;
/// Claim bit of frames without a tag, in entry 0.
const UNTAGGED: i32 = 4;
/// What the filter returns to keep a frame whole: a length cap in bytes.
const WHOLE: i32 = i32::MAX;

/// A loaded filter and its maps.
#[derive(Debug)]
pub struct UplinkFilter {
    claims: ArrayMap,
    seen: WideArrayMap,
    sources: WideArrayMap,
    program: OwnedFd,
}

impl UplinkFilter {
    /// A filter that claims nothing yet. With the uplink's `records` of the kernel path it
    /// leaves there what it decides, and does not count what nobody claims: the dispatcher
    /// does.
    ///
    /// # Errors
    /// [`BpfError::NotPermitted`], or the kernel is out of memory.
    pub fn new(records: Option<BorrowedFd<'_>>) -> Result<Self, BpfError> {
        let claims = ArrayMap::create("vlansw_claims", VIDS)?;
        let seen = WideArrayMap::create("vlansw_seen", VIDS * TPIDS.len() as u32)?;
        let sources = WideArrayMap::create("vlansw_sources", VIDS * TPIDS.len() as u32)?;
        let counts = (seen.as_fd(), sources.as_fd());
        let instructions = uplink_filter(claims.as_fd(), counts, records)?;
        let program = load(ProgramKind::SocketFilter, "vlansw_uplink", &instructions)?;
        Ok(Self { claims, seen, sources, program })
    }

    /// Has the filter count what nobody claims from now on, as a filter without records does:
    /// on sockets it is attached to (again) after this.
    ///
    /// # Errors
    /// As for [`UplinkFilter::new`].
    pub fn count_unclaimed(&mut self) -> Result<(), BpfError> {
        let counts = (self.seen.as_fd(), self.sources.as_fd());
        let instructions = uplink_filter(self.claims.as_fd(), counts, None)?;
        self.program = load(ProgramKind::SocketFilter, "vlansw_uplink", &instructions)?;
        Ok(())
    }

    /// What the kernel path's dispatcher shares with the filter.
    pub fn dispatch<'a>(&'a self, programs: BorrowedFd<'a>) -> Dispatch<'a> {
        Dispatch {
            programs,
            claims: self.claims.as_fd(),
            seen: self.seen.as_fd(),
            sources: self.sources.as_fd(),
        }
    }

    /// Attaches the filter to an AF_PACKET socket, in place of any filter there.
    ///
    /// # Errors
    /// The socket's filter is locked (SO_LOCK_FILTER), or it is not a socket.
    pub fn attach(&self, socket: BorrowedFd<'_>) -> Result<(), BpfError> {
        attach_filter(socket, self.program.as_fd())
    }

    /// Claims, or lets go of, the frames whose outermost tag is (`tpid_index`, `vid`).
    /// One writer at a time; takes effect with the next frame.
    ///
    /// # Errors
    /// `tpid_index` above 3 or `vid` above 4095.
    pub fn claim(&self, tpid_index: usize, vid: u16, claimed: bool) -> Result<(), BpfError> {
        if tpid_index >= TPIDS.len() {
            let source = io::Error::from_raw_os_error(libc::EINVAL);
            return Err(BpfError::System {
                action: format!("claim TPID number {tpid_index}"),
                source,
            });
        }
        self.set(u32::from(vid), tpid_index as u32, claimed)
    }

    /// Claims, or lets go of, frames without a tag.
    ///
    /// # Errors
    /// None that a working kernel gives.
    pub fn claim_untagged(&self, claimed: bool) -> Result<(), BpfError> {
        self.set(0, UNTAGGED as u32, claimed)
    }

    fn set(&self, vid: u32, bit: u32, claimed: bool) -> Result<(), BpfError> {
        let before = self.claims.lookup(vid)?;
        let after = if claimed { before | 1 << bit } else { before & !(1 << bit) };
        if after == before { Ok(()) } else { self.claims.update(vid, after) }
    }

    /// Tagged frames rejected since the start: (TPID index, VID, frames), those
    /// with a count. Reads all 16384 counters when called.
    ///
    /// # Errors
    /// None that a working kernel gives.
    pub fn seen(&self) -> Result<impl Iterator<Item = (usize, u16, u64)>, BpfError> {
        let counts = self.seen.values()?;
        let rows = counts.into_iter().enumerate().filter(|&(_, frames)| frames != 0);
        let vids = VIDS as usize;
        Ok(rows.map(move |(index, frames)| (index / vids, (index % vids) as u16, frames)))
    }

    /// The source address of the last frame rejected with this outer tag; `None` if
    /// there was none.
    ///
    /// # Errors
    /// `tpid_index` above 3 or `vid` above 4095.
    pub fn source(&self, tpid_index: usize, vid: u16) -> Result<Option<[u8; 6]>, BpfError> {
        let value = self.sources.lookup(tpid_index as u32 * VIDS + u32::from(vid))?;
        let [_, _, address @ ..] = value.to_be_bytes();
        Ok((value != 0).then_some(address))
    }
}

/// Attaches a filter to a socket, in place of any filter there.
///
/// # Errors
/// The socket's filter is locked (SO_LOCK_FILTER), or it is not a socket.
pub fn attach_filter(socket: BorrowedFd<'_>, program: BorrowedFd<'_>) -> Result<(), BpfError> {
    set_filter(socket, libc::SO_ATTACH_BPF, program.as_raw_fd())
        .map_err(|error| BpfError::from_io("attach a filter to a socket", error))
}

/// Takes the filter off a socket: it gets everything.
///
/// # Errors
/// As for [`attach_filter`], and if there is none.
pub fn detach_filter(socket: BorrowedFd<'_>) -> Result<(), BpfError> {
    set_filter(socket, libc::SO_DETACH_FILTER, 0)
        .map_err(|error| BpfError::from_io("take the filter off a socket", error))
}

fn set_filter(socket: BorrowedFd<'_>, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: both options read one int, which `value` is.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The filter program; see the module's text for the maps.
///
/// # Errors
/// None: the signature is that of all programs.
fn uplink_filter(
    claims: BorrowedFd<'_>,
    (seen, sources): (BorrowedFd<'_>, BorrowedFd<'_>),
    records: Option<BorrowedFd<'_>>,
) -> Result<Vec<Instruction>, AssemblyError> {
    let mut program = Program::new();
    let (in_band, by_vid, look_up) = (program.label(), program.label(), program.label());
    let (accept, reject) = (program.label(), program.label());
    // From here on: R6 context, R7 VID, R8 TPID index or UNTAGGED.
    program.mov(R6, R1).load(Width::Word, R2, R6, skb::PKT_TYPE);
    // Our own frames: only where PACKET_IGNORE_OUTGOING does not hold (fanout, old kernels).
    program.jump_if(R2, Condition::Equal, i32::from(libc::PACKET_OUTGOING), reject);
    program.load(Width::Word, R2, R6, skb::VLAN_PRESENT).jump_if(R2, Condition::Equal, 0, in_band);

    program.load(Width::Word, R7, R6, skb::VLAN_TCI).load(Width::Word, R2, R6, skb::VLAN_PROTO);
    for (index, tpid) in (0..).zip(TPIDS) {
        program.mov(R8, index);
        program.jump_if(R2, Condition::Equal, i32::from(tpid.to_be()), by_vid);
    }
    program.jump(reject);

    program.place(in_band).load_absolute(Width::Half, 12);
    let tagged = program.label();
    for (index, tpid) in (0..).zip(TPIDS) {
        program.mov(R8, index).jump_if(R0, Condition::Equal, i32::from(tpid), tagged);
    }
    program.mov(R7, 0).mov(R8, UNTAGGED).jump(look_up);
    program.place(tagged).load_absolute(Width::Half, 14).mov(R7, R0);

    program.place(by_vid).alu(Alu::And, R7, 0xfff);
    program.place(look_up);
    program.store(Width::Word, R10, -4, R7).load_map(R1, claims).mov(R2, R10).alu(Alu::Add, R2, -4);
    program.call(Helper::MapLookup).jump_if(R0, Condition::Equal, 0, reject);
    program.load(Width::Word, R1, R0, 0).alu(Alu::ShiftRight, R1, R8);
    program.jump_if(R1, Condition::AnyBit, 1, accept);

    if let Some(records) = records {
        for (label, decision, verdict) in [(reject, 0, 0), (accept, 1, WHOLE)] {
            let lost = program.label();
            program.place(label).store(Width::Word, R10, -4, 0).load_map(R1, records);
            program.mov(R2, R10).alu(Alu::Add, R2, -4).call(Helper::MapLookup);
            program.jump_if(R0, Condition::Equal, 0, lost);
            program.store(Width::Double, R0, (Record::DECISION * 8) as i16, decision);
            program.place(lost).mov(R0, verdict).exit();
        }
        return program.finish();
    }
    // The common case, the host's own traffic, ends here; `seen` has no entry for it.
    program.jump_if(R8, Condition::Equal, UNTAGGED, reject);
    program.alu(Alu::ShiftLeft, R8, VIDS.trailing_zeros() as i32).alu(Alu::Or, R8, R7);
    program.store(Width::Word, R10, -4, R8).load_map(R1, seen).mov(R2, R10).alu(Alu::Add, R2, -4);
    program.call(Helper::MapLookup).jump_if(R0, Condition::Equal, 0, reject);
    program.mov(R1, 1).add_atomically(R0, 0, R1);
    program.load_map(R1, sources).mov(R2, R10).alu(Alu::Add, R2, -4);
    program.call(Helper::MapLookup).jump_if(R0, Condition::Equal, 0, reject).mov(R7, R0);
    // One store, so that an address is never half of two.
    program.load_absolute(Width::Word, 6).mov(R8, R0).alu(Alu::ShiftLeft, R8, 16);
    program.load_absolute(Width::Half, 10).alu(Alu::Or, R8, R0);
    program.load(Width::Double, R1, R7, 0).jump_if(R1, Condition::Equal, R8, reject);
    program.store(Width::Double, R7, 0, R8);

    program.place(reject).mov(R0, 0).exit();
    program.place(accept).mov(R0, WHOLE).exit();
    program.finish()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use super::super::syscall::test_run;
    use super::*;
    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    use nix::unistd::Pid;

    const SOURCE: [u8; 6] = [0x52, 0x54, 0, 0xff, 0x80, 1];

    /// Runs the filter on a frame whose tags all stand in the bytes.
    fn run(filter: &UplinkFilter, frame: &[u8]) -> u32 {
        // A socket filter's data starts after the Ethernet header the kernel takes off
        // (`bpf_prog_test_run_skb`); with AF_PACKET it starts at that header. So one more.
        let data = [&[0; 14], frame].concat();
        test_run(filter.program.as_fd(), &data).unwrap()
    }

    fn frame(tags: &[(u16, u16)]) -> Vec<u8> {
        let words = tags.iter().flat_map(|&(tpid, tci)| [tpid, tci]).chain([0x0800]);
        let mut frame = vec![2; 6];
        frame.extend(SOURCE);
        frame.extend(words.flat_map(u16::to_be_bytes));
        frame.resize(60, 0);
        frame
    }

    // The kernel takes 0x8100 and 0x88a8 out of what it receives, so a tap cannot show
    // these to the filter in the bytes; some paths can (a tag the kernel put back).
    #[test]
    #[ignore = "needs root: runs a BPF program"]
    fn tags_in_the_bytes_are_read_too() {
        let filter = UplinkFilter::new(None).unwrap();
        for (index, tpid) in TPIDS.into_iter().enumerate() {
            for vid in [0, 7, 4095] {
                let tagged = frame(&[(tpid, 0xf000 | vid), (0x8100, 9)]);
                assert_eq!(filter.source(index, vid).unwrap(), None, "{tpid:#x} {vid}");
                assert_eq!(run(&filter, &tagged), 0, "{tpid:#x} {vid}");
                filter.claim(index, vid, true).unwrap();
                assert_eq!(run(&filter, &tagged), i32::MAX as u32, "{tpid:#x} {vid}");
                filter.claim(index, vid, false).unwrap();
                let seen: Vec<_> = filter.seen().unwrap().filter(|row| row.0 == index).collect();
                assert!(seen.contains(&(index, vid, 1)), "{seen:?}");
                assert_eq!(filter.source(index, vid).unwrap(), Some(SOURCE), "{tpid:#x} {vid}");
            }
        }
        // Each CPU counts for itself; what is read is the sum.
        let all = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let cpus: Vec<_> = (0..CpuSet::count()).filter(|&cpu| all.is_set(cpu).unwrap()).collect();
        for &cpu in &cpus {
            let mut one = CpuSet::new();
            one.set(cpu).unwrap();
            sched_setaffinity(Pid::from_raw(0), &one).unwrap();
            assert_eq!(run(&filter, &frame(&[(0x9100, 77)])), 0);
        }
        let counted = filter.seen().unwrap().find(|&(index, vid, _)| (index, vid) == (2, 77));
        assert_eq!(counted, Some((2, 77, cpus.len() as u64)));

        assert_eq!(run(&filter, &frame(&[])), 0);
        filter.claim_untagged(true).unwrap();
        assert_eq!(run(&filter, &frame(&[])), i32::MAX as u32);
        assert_eq!(run(&filter, &frame(&[(0x9300, 7)])), i32::MAX as u32, "not a TPID");
        // Too short to have an EtherType, or a TCI.
        assert_eq!(run(&filter, &[2; 13]), 0);
        let cut = &frame(&[(0x8100, 7)])[..15];
        filter.claim(0, 7, true).unwrap();
        assert_eq!(run(&filter, cut), 0);
    }
}
