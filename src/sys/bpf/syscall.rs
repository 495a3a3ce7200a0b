//! The door to bpf(2): attribute structures, program loading, errors for people.
//!
//! `union bpf_attr` has one layout per command; each command's structure here is
//! the part of it we fill, and the kernel takes what is missing as zero
//! (`bpf_check_uarg_tail_zero`, kernel/bpf/syscall.c).

#![allow(unsafe_code, reason = "bpf(2) has no wrapper in libc or nix")]

use super::assembler::{AssemblyError, Instruction};
use crate::sys::sandbox::Call;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::ffi::{CStr, CString};
use std::io;
#[cfg(test)]
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

/// What a program is for, which decides its context and helpers: `enum bpf_prog_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProgramKind {
    /// Runs on what a socket receives; returns how many bytes to keep, 0 to reject.
    SocketFilter = 1,
    /// Runs at tc ingress or egress; returns a TC_ACT_ code.
    SchedCls = 3,
    /// Runs in the driver before the stack; returns an XDP_ code.
    Xdp = 6,
}

/// Why a BPF operation failed.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// A program has a fault in itself.
    #[error(transparent)]
    Assembly(#[from] AssemblyError),
    /// The kernel takes names of at most 15 letters, digits, `_` and `.`.
    #[error("BPF name {0:?}: use 1 to 15 letters, digits, '_' or '.'")]
    Name(String),
    /// A capability is missing.
    #[error(
        "not permitted to {action}: it needs CAP_BPF and CAP_NET_ADMIN (CAP_SYS_ADMIN before \
         Linux 5.8; kernel.unprivileged_bpf_disabled is {unprivileged_bpf_disabled}){hint}"
    )]
    NotPermitted {
        /// What was tried.
        action: String,
        /// The sysctl's value, or `unknown`.
        unprivileged_bpf_disabled: String,
        /// What else may be the cause, with a leading separator.
        hint: &'static str,
    },
    /// The verifier refused a program.
    #[error("the kernel refused BPF program {name}: {source}; the verifier's last lines:\n{log}")]
    Rejected {
        /// The program.
        name: String,
        /// End of the verifier's log.
        log: String,
        /// Its verdict.
        source: io::Error,
    },
    /// This kernel lacks the feature.
    #[error("this kernel has no {feature} ({since})")]
    Unsupported {
        /// What is missing.
        feature: &'static str,
        /// Where it came in, or what to build in.
        since: &'static str,
    },
    /// A program in this place cannot be told from ours.
    #[error(
        "device {device} has {count} BPF programs at {place} whose names we may not read: that \
         needs CAP_SYS_ADMIN; use the clsact method, or remove them with \
         `bpftool net detach {place} dev ...`"
    )]
    Unidentified {
        /// Interface index.
        device: u32,
        /// `tcx_ingress` or `tcx_egress`.
        place: &'static str,
        /// How many.
        count: usize,
    },
    /// Any other refusal.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried.
        action: String,
        /// The kernel's answer.
        source: io::Error,
    },
}

impl BpfError {
    /// The error for a failed call, EPERM explained.
    pub(super) fn from_io(action: impl Into<String>, source: io::Error) -> Self {
        let action = action.into();
        if source.raw_os_error() == Some(libc::EPERM) {
            Self::NotPermitted { action, unprivileged_bpf_disabled: unprivileged(), hint: "" }
        } else {
            Self::System { action, source }
        }
    }

    /// The errno, where there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::NotPermitted { .. } => Some(libc::EPERM),
            Self::Rejected { source, .. } | Self::System { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }
}

fn unprivileged() -> String {
    std::fs::read_to_string("/proc/sys/kernel/unprivileged_bpf_disabled")
        .map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

// enum bpf_cmd, include/uapi/linux/bpf.h.
pub(super) const MAP_CREATE: Command<MapCreate> = Command::new(0);
pub(super) const MAP_LOOKUP_ELEM: Command<MapElement> = Command::new(1);
pub(super) const MAP_UPDATE_ELEM: Command<MapElement> = Command::new(2);
pub(super) const MAP_DELETE_ELEM: Command<MapElement> = Command::new(3);
const PROG_LOAD: Command<ProgramLoad> = Command::new(5);
pub(super) const OBJ_PIN: Command<ObjectPath> = Command::new(6);
pub(super) const OBJ_GET: Command<ObjectPath> = Command::new(7);
pub(super) const PROG_ATTACH: Command<ProgramAttach> = Command::new(8);
pub(super) const PROG_DETACH: Command<ProgramAttach> = Command::new(9);
pub(super) const PROG_GET_FD_BY_ID: Command<ProgramById> = Command::new(13);
pub(super) const OBJ_GET_INFO_BY_FD: Command<InfoByFd> = Command::new(15);
pub(super) const PROG_QUERY: Command<ProgramQuery> = Command::new(16);
pub(super) const MAP_LOOKUP_BATCH: Command<MapBatch> = Command::new(24);
pub(super) const LINK_CREATE: Command<LinkCreate> = Command::new(28);
pub(super) const LINK_UPDATE: Command<LinkUpdate> = Command::new(29);

/// What following seals, claims and counts takes: on the packet path no map and no program
/// is made after the start.
pub const CALLS: &[Call] = &[Call::one_of(
    libc::SYS_bpf,
    0,
    &[
        MAP_LOOKUP_ELEM.number as u32,
        MAP_UPDATE_ELEM.number as u32,
        MAP_LOOKUP_BATCH.number as u32,
        PROG_ATTACH.number as u32,
        PROG_DETACH.number as u32,
        PROG_GET_FD_BY_ID.number as u32,
        OBJ_GET_INFO_BY_FD.number as u32,
        PROG_QUERY.number as u32,
    ],
)];

/// What the kernel path takes beside that: programs are made for ports that come and change.
pub const PATH_CALLS: &[Call] = &[Call::one_of(
    libc::SYS_bpf,
    0,
    &[
        MAP_CREATE.number as u32,
        MAP_DELETE_ELEM.number as u32,
        PROG_LOAD.number as u32,
        OBJ_PIN.number as u32,
        OBJ_GET.number as u32,
        LINK_CREATE.number as u32,
        LINK_UPDATE.number as u32,
    ],
)];

/// A command together with the layout of `union bpf_attr` it reads.
pub(super) struct Command<T> {
    number: libc::c_int,
    layout: std::marker::PhantomData<T>,
}

impl<T> Command<T> {
    pub(super) const fn new(number: libc::c_int) -> Self {
        Self { number, layout: std::marker::PhantomData }
    }
}

#[repr(C)]
#[derive(Default)]
pub(super) struct MapCreate {
    pub map_type: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub map_flags: u32,
    pub inner_map_fd: u32,
    pub numa_node: u32,
    pub map_name: [u8; NAME_LEN],
}
const _: () = assert!(size_of::<MapCreate>() == 44);

/// MAP_LOOKUP_ELEM and MAP_UPDATE_ELEM.
#[repr(C)]
#[derive(Default)]
pub(super) struct MapElement {
    pub map_fd: u32,
    pub padding: u32,
    pub key: u64,
    pub value: u64,
    pub flags: u64,
}
const _: () = assert!(size_of::<MapElement>() == 32);

/// MAP_LOOKUP_BATCH.
#[repr(C)]
#[derive(Default)]
pub(super) struct MapBatch {
    pub in_batch: u64,
    pub out_batch: u64,
    pub keys: u64,
    pub values: u64,
    pub count: u32,
    pub map_fd: u32,
    pub elem_flags: u64,
    pub flags: u64,
}
const _: () = {
    assert!(size_of::<MapBatch>() == 56);
    assert!(std::mem::offset_of!(MapBatch, count) == 32);
};

#[repr(C)]
#[derive(Default)]
struct ProgramLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; NAME_LEN],
}
const _: () = {
    assert!(size_of::<ProgramLoad>() == 64);
    assert!(std::mem::offset_of!(ProgramLoad, log_buf) == 32);
    assert!(std::mem::offset_of!(ProgramLoad, prog_name) == 48);
};

/// OBJ_PIN and OBJ_GET.
#[repr(C)]
#[derive(Default)]
pub(super) struct ObjectPath {
    pub pathname: u64,
    pub bpf_fd: u32,
    pub file_flags: u32,
}
const _: () = assert!(size_of::<ObjectPath>() == 16);

/// PROG_ATTACH and PROG_DETACH.
#[repr(C)]
#[derive(Default)]
pub(super) struct ProgramAttach {
    pub target_ifindex: u32,
    pub attach_bpf_fd: u32,
    pub attach_type: u32,
    pub attach_flags: u32,
    pub replace_bpf_fd: u32,
    pub relative_fd: u32,
    pub expected_revision: u64,
}
const _: () = assert!(size_of::<ProgramAttach>() == 32);

#[repr(C)]
#[derive(Default)]
pub(super) struct ProgramById {
    pub prog_id: u32,
    pub next_id: u32,
    pub open_flags: u32,
}
const _: () = assert!(size_of::<ProgramById>() == 12);

#[repr(C)]
#[derive(Default)]
pub(super) struct InfoByFd {
    pub bpf_fd: u32,
    pub info_len: u32,
    pub info: u64,
}
const _: () = assert!(size_of::<InfoByFd>() == 16);

#[repr(C)]
#[derive(Default)]
pub(super) struct ProgramQuery {
    pub target_ifindex: u32,
    pub attach_type: u32,
    pub query_flags: u32,
    pub attach_flags: u32,
    pub prog_ids: u64,
    pub count: u32,
    pub padding: u32,
    pub prog_attach_flags: u64,
    pub link_ids: u64,
    pub link_attach_flags: u64,
    pub revision: u64,
}
const _: () = {
    assert!(size_of::<ProgramQuery>() == 64);
    assert!(std::mem::offset_of!(ProgramQuery, count) == 24);
};

#[repr(C)]
#[derive(Default)]
pub(super) struct LinkCreate {
    pub prog_fd: u32,
    pub target_ifindex: u32,
    pub attach_type: u32,
    pub flags: u32,
}
const _: () = assert!(size_of::<LinkCreate>() == 16);

#[repr(C)]
#[derive(Default)]
pub(super) struct LinkUpdate {
    pub link_fd: u32,
    pub new_prog_fd: u32,
    pub flags: u32,
    pub old_prog_fd: u32,
}
const _: () = assert!(size_of::<LinkUpdate>() == 16);

/// The head of `struct bpf_link_info`, of a link to a device.
#[repr(C)]
#[derive(Default)]
pub(super) struct LinkInfo {
    pub link_type: u32,
    pub id: u32,
    pub prog_id: u32,
    pub padding: u32,
    pub ifindex: u32,
    pub padding_behind: u32,
}
const _: () = {
    assert!(size_of::<LinkInfo>() == 24);
    assert!(std::mem::offset_of!(LinkInfo, ifindex) == 16);
};

/// The head of `struct bpf_prog_info`, up to the name.
#[repr(C)]
#[derive(Default)]
pub(super) struct ProgramInfo {
    pub prog_type: u32,
    pub id: u32,
    pub tag: [u8; 8],
    pub jited_prog_len: u32,
    pub xlated_prog_len: u32,
    pub jited_prog_insns: u64,
    pub xlated_prog_insns: u64,
    pub load_time: u64,
    pub created_by_uid: u32,
    pub nr_map_ids: u32,
    pub map_ids: u64,
    pub name: [u8; NAME_LEN],
}
const _: () = {
    assert!(size_of::<ProgramInfo>() == 80);
    assert!(std::mem::offset_of!(ProgramInfo, name) == 64);
};

/// The head of `struct bpf_map_info`, up to the name.
#[repr(C)]
#[derive(Default)]
pub(super) struct MapInfo {
    pub map_type: u32,
    pub id: u32,
    pub key_size: u32,
    pub value_size: u32,
    pub max_entries: u32,
    pub map_flags: u32,
    pub name: [u8; NAME_LEN],
}
const _: () = assert!(size_of::<MapInfo>() == 40);

/// BPF_OBJ_NAME_LEN, with the final NUL.
pub(super) const NAME_LEN: usize = 16;

/// bpf(2). Returns what the kernel returns, which is an fd for commands that make one.
///
/// # Safety
/// Every address in `attributes` must point to memory as large as the command
/// reads or writes there, alive until the call returns.
pub(super) unsafe fn bpf<T>(command: &Command<T>, attributes: &mut T) -> io::Result<RawFd> {
    // SAFETY: `attributes` is exclusively ours, `size` bytes long, and the structure
    // `Command` ties to this command; addresses inside are the caller's promise.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command.number,
            std::ptr::from_mut(attributes),
            size_of::<T>() as libc::c_uint,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

/// [`bpf`] for the commands that return a new fd.
///
/// # Safety
/// As for [`bpf`]; and `command` must return a new fd.
pub(super) unsafe fn bpf_open<T>(command: &Command<T>, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise.
    let fd = unsafe { bpf(command, attributes) }?;
    // SAFETY: the kernel just made this fd for us and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `operation`, once more with the lock limit raised if the kernel refuses it.
///
/// Kernels before 5.11 charge maps and programs to RLIMIT_MEMLOCK (64 KiB by
/// default) and answer EPERM when it is spent. Later ones use the memory cgroup.
pub(super) fn with_memory_lock_limit<T>(
    action: &str,
    mut operation: impl FnMut() -> io::Result<T>,
) -> Result<T, BpfError> {
    let refused = match operation() {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => error,
        Err(error) => return Err(BpfError::from_io(action, error)),
        Ok(value) => return Ok(value),
    };
    let unlimited = nix::sys::resource::RLIM_INFINITY;
    let (soft, _) = getrlimit(Resource::RLIMIT_MEMLOCK).unwrap_or((unlimited, unlimited));
    if soft == unlimited {
        return Err(BpfError::from_io(action, refused));
    }
    if setrlimit(Resource::RLIMIT_MEMLOCK, unlimited, unlimited).is_err() {
        return Err(BpfError::NotPermitted {
            action: action.to_owned(),
            unprivileged_bpf_disabled: unprivileged(),
            hint: "; or, before Linux 5.11, a larger locked-memory limit (LimitMEMLOCK=infinity)",
        });
    }
    operation().map_err(|error| BpfError::from_io(action, error))
}

/// A name as the kernel stores it.
pub(super) fn object_name(name: &str) -> Result<[u8; NAME_LEN], BpfError> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.';
    let mut stored = [0; NAME_LEN];
    match stored.get_mut(..name.len()) {
        Some(room) if !name.is_empty() && name.len() < NAME_LEN && name.bytes().all(legal) => {
            room.copy_from_slice(name.as_bytes());
            Ok(stored)
        }
        _ => Err(BpfError::Name(name.to_owned())),
    }
}

/// The license string decides which helpers a program may call; ours call none
/// that need the GPL, but the declaration is true either way.
const LICENSE: &CStr = c"Dual MIT/GPL";
/// Bytes of verifier log asked for after a refusal.
const LOG_SIZE: usize = 256 * 1024;
/// Lines of it that go into the error: the last ones name the fault.
const LOG_LINES: usize = 12;

/// Loads a program; it lives as long as the fd, or what it is attached to.
///
/// # Errors
/// [`BpfError::Rejected`] with the verifier's words, [`BpfError::NotPermitted`],
/// [`BpfError::Name`] for a name the kernel would refuse.
pub fn load(kind: ProgramKind, name: &str, program: &[Instruction]) -> Result<OwnedFd, BpfError> {
    let prog_name = object_name(name)?;
    let attempt = |log: &mut [u8]| {
        let mut attributes = ProgramLoad {
            prog_type: kind as u32,
            insn_cnt: program.len() as u32,
            insns: program.as_ptr() as u64,
            license: LICENSE.as_ptr() as u64,
            prog_name,
            ..ProgramLoad::default()
        };
        if !log.is_empty() {
            attributes.log_level = 1;
            attributes.log_size = log.len() as u32;
            attributes.log_buf = log.as_mut_ptr() as u64;
        }
        // SAFETY: `insns` is `insn_cnt` instructions of 8 bytes, `license` is NUL-terminated,
        // `log_buf` is `log_size` writable bytes; all outlive the call.
        unsafe { bpf_open(&PROG_LOAD, &mut attributes) }
    };
    let action = format!("load BPF program {name}");
    let source = match with_memory_lock_limit(&action, || attempt(&mut [])) {
        Err(BpfError::System { source, .. }) => source,
        other => return other,
    };
    // Asking for a log costs time, so it is asked for only now.
    let mut log = vec![0; LOG_SIZE];
    match attempt(&mut log) {
        Ok(program) => Ok(program),
        Err(_) => Err(BpfError::Rejected { name: name.to_owned(), log: last_lines(&log), source }),
    }
}

/// `union bpf_attr` of BPF_PROG_TEST_RUN.
#[cfg(test)]
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
}
#[cfg(test)]
const _: () = assert!(size_of::<TestRun>() == 40);

/// Runs a program once on a frame; returns its verdict.
#[cfg(test)]
pub(super) fn test_run(program: BorrowedFd<'_>, frame: &[u8]) -> io::Result<u32> {
    test_edit(program, frame).map(|(verdict, _)| verdict)
}

/// The same, with the frame as the program leaves it.
#[cfg(test)]
pub(super) fn test_edit(program: BorrowedFd<'_>, frame: &[u8]) -> io::Result<(u32, Vec<u8>)> {
    let mut edited = vec![0; frame.len() + 64];
    let mut attributes = TestRun {
        prog_fd: program.as_raw_fd() as u32,
        data_size_in: frame.len() as u32,
        data_in: frame.as_ptr() as u64,
        data_size_out: edited.len() as u32,
        data_out: edited.as_mut_ptr() as u64,
        ..TestRun::default()
    };
    // SAFETY: `data_in` has `data_size_in` bytes and `data_out` room for `data_size_out`;
    // both live on.
    unsafe { bpf(&Command::new(10), &mut attributes) }?;
    edited.truncate(attributes.data_size_out as usize);
    Ok((attributes.retval, edited))
}

/// The end of a NUL-terminated log.
fn last_lines(log: &[u8]) -> String {
    let text = CStr::from_bytes_until_nul(log).map(CString::from).unwrap_or_default();
    let text = text.to_string_lossy();
    // The very last line is a statistic ("processed 3 insns ..."), kept as it is short.
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines.get(lines.len().saturating_sub(LOG_LINES)..).unwrap_or_default().join("\n")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn names_are_what_the_kernel_takes() {
        assert_eq!(&object_name("vlansw_seal").unwrap(), b"vlansw_seal\0\0\0\0\0");
        assert_eq!(&object_name("fifteen.letters").unwrap(), b"fifteen.letters\0");
        for refused in ["", "sixteen_letters_", "a-b", "a b", "a\0"] {
            assert!(matches!(object_name(refused), Err(BpfError::Name(name)) if name == refused));
        }
    }

    #[test]
    fn a_log_is_cut_to_its_end() {
        let mut log: Vec<u8> =
            (0..50).flat_map(|line| format!("line {line}\n").into_bytes()).collect();
        log.extend([0, b'x', 0]);
        let cut = last_lines(&log);
        assert_eq!(cut.lines().count(), LOG_LINES);
        assert!(cut.starts_with("line 38\n") && cut.ends_with("line 49"), "{cut}");
        assert_eq!(last_lines(&[0]), "");
        assert_eq!(last_lines(b"no end"), "");
    }

    #[test]
    fn a_refusal_names_the_capability() {
        let error =
            BpfError::from_io("load BPF program x", io::Error::from_raw_os_error(libc::EPERM));
        let text = error.to_string();
        assert!(
            text.contains("CAP_BPF") && text.contains("CAP_SYS_ADMIN before Linux 5.8"),
            "{text}"
        );
        assert!(text.contains("unprivileged_bpf_disabled"), "{text}");
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }
}
