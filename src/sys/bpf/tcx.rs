//! Attaching tc programs by TCX (Linux 6.6, kernel/bpf/tcx.c).
//!
//! Programs are attached without a link: a link would detach them when we die, and
//! a seal must outlive us. Several programs may stand at one hook; ours goes first,
//! so that no other program can let a frame pass before it is asked. A program of
//! ours left by an earlier run, known by its name, is replaced in one step: there
//! is no moment without a program, and none piles up.

#![allow(unsafe_code, reason = "bpf(2) takes addresses")]

use super::syscall::{
    BpfError, InfoByFd, OBJ_GET_INFO_BY_FD, PROG_ATTACH, PROG_DETACH, PROG_GET_FD_BY_ID,
    PROG_QUERY, ProgramAttach, ProgramById, ProgramInfo, ProgramQuery, bpf, bpf_open,
};
use super::tc::{Attached, Direction};
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// `enum bpf_attach_type`.
fn attach_type(direction: Direction) -> u32 {
    match direction {
        Direction::Ingress => 46,
        Direction::Egress => 47,
    }
}

/// The hook as bpftool names it.
fn place(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "tcx_ingress",
        Direction::Egress => "tcx_egress",
    }
}

// BPF_F_*, include/uapi/linux/bpf.h.
const REPLACE: u32 = 1 << 2;
const BEFORE: u32 = 1 << 3;
/// BPF_MPROG_MAX: what one hook can hold.
const MAX_PROGRAMS: usize = 64;

/// Programs this process loaded and attaches, which it need not ask the kernel for:
/// that takes CAP_SYS_ADMIN, which a running switch has given up.
static OURS: Mutex<Vec<AttachedProgram>> = Mutex::new(Vec::new());

/// Remembers a program, so that it is recognised at a hook without CAP_SYS_ADMIN.
///
/// # Errors
/// The kernel's, for anything but a program, or without descriptors left.
pub fn remember(program: BorrowedFd<'_>) -> Result<(), BpfError> {
    let (id, name) = describe(program)?;
    let fd = duplicate(program)?;
    OURS.lock().unwrap_or_else(PoisonError::into_inner).push(AttachedProgram { id, name, fd });
    Ok(())
}

/// Forgets a program that is attached nowhere any more.
pub fn forget(program: BorrowedFd<'_>) {
    if let Ok((id, _)) = describe(program) {
        OURS.lock().unwrap_or_else(PoisonError::into_inner).retain(|other| other.id != id);
    }
}

/// Remembers the programs called `name` at a hook, of an earlier run too, while
/// CAP_SYS_ADMIN tells which they are.
///
/// # Errors
/// As for [`attach`].
pub fn recognise(name: &str, device: u32, direction: Direction) -> Result<(), BpfError> {
    for program in programs(device, direction)?.into_iter().filter(|other| other.name == name) {
        if remembered(program.id)?.is_none() {
            remember(program.fd.as_fd())?;
        }
    }
    Ok(())
}

fn remembered(id: u32) -> Result<Option<AttachedProgram>, BpfError> {
    let ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(found) = ours.iter().find(|program| program.id == id) else { return Ok(None) };
    let fd = duplicate(found.fd.as_fd())?;
    Ok(Some(AttachedProgram { id, name: found.name.clone(), fd }))
}

fn duplicate(program: BorrowedFd<'_>) -> Result<OwnedFd, BpfError> {
    program
        .try_clone_to_owned()
        .map_err(|error| BpfError::from_io("duplicate a BPF program's descriptor", error))
}

/// A program standing at a hook.
#[derive(Debug)]
pub struct AttachedProgram {
    /// Kernel-wide number.
    pub id: u32,
    /// Name given when it was loaded.
    pub name: String,
    /// The program.
    pub fd: OwnedFd,
}

/// Attaches `program` to interface `device`, first of all programs there, or in
/// place of the one with the same name. It stays until detached or the device goes.
///
/// # Errors
/// [`BpfError::Unsupported`] before Linux 6.6; [`BpfError::Unidentified`] if other
/// programs are there and CAP_SYS_ADMIN is missing to tell whether they are ours.
pub fn attach(
    program: BorrowedFd<'_>,
    device: u32,
    direction: Direction,
) -> Result<Attached, BpfError> {
    let name = name_of(program)?;
    let previous = programs(device, direction)?.into_iter().find(|other| other.name == name);
    let mut attributes = ProgramAttach {
        target_ifindex: device,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: attach_type(direction),
        attach_flags: BEFORE,
        ..ProgramAttach::default()
    };
    if let Some(previous) = &previous {
        attributes.attach_flags = REPLACE;
        attributes.replace_bpf_fd = previous.fd.as_raw_fd() as u32;
    }
    // SAFETY: the attributes hold no address.
    match unsafe { bpf(&PROG_ATTACH, &mut attributes) } {
        Ok(_) if previous.is_some() => Ok(Attached::Replaced),
        Ok(_) => Ok(Attached::New),
        // The very program is there already: replacing it by itself is refused.
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(Attached::Replaced),
        Err(error) => Err(failed("attach a BPF program to", device, direction, error)),
    }
}

/// Detaches the programs named `name` from interface `device`; false if none was there.
///
/// # Errors
/// As for [`attach`].
pub fn detach(name: &str, device: u32, direction: Direction) -> Result<bool, BpfError> {
    let mut found = false;
    for program in programs(device, direction)?.into_iter().filter(|other| other.name == name) {
        let mut attributes = ProgramAttach {
            target_ifindex: device,
            attach_bpf_fd: program.fd.as_raw_fd() as u32,
            attach_type: attach_type(direction),
            ..ProgramAttach::default()
        };
        // SAFETY: the attributes hold no address.
        unsafe { bpf(&PROG_DETACH, &mut attributes) }
            .map_err(|error| failed("detach a BPF program from", device, direction, error))?;
        found = true;
    }
    Ok(found)
}

/// Whether a [remembered](remember) program called `name` stands at a hook. The cheapest
/// question of all: one system call, and nothing is opened.
///
/// # Errors
/// As for [`attach`].
pub fn holds(name: &str, device: u32, direction: Direction) -> Result<bool, BpfError> {
    let ids = program_ids(device, direction)?;
    let ours = OURS.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(ours.iter().any(|program| program.name == name && ids.contains(&program.id)))
}

/// The programs at a hook of interface `device`, in the order they run. Without
/// CAP_SYS_ADMIN, those of them that were [remembered](remember), if any.
///
/// # Errors
/// As for [`attach`].
pub fn programs(device: u32, direction: Direction) -> Result<Vec<AttachedProgram>, BpfError> {
    let ids = program_ids(device, direction)?;
    let mut programs = Vec::with_capacity(ids.len());
    let mut unidentified = false;
    for &id in &ids {
        if let Some(program) = remembered(id)? {
            programs.push(program);
            continue;
        }
        let mut attributes = ProgramById { prog_id: id, ..ProgramById::default() };
        // SAFETY: the attributes hold no address, and the command opens an fd.
        match unsafe { bpf_open(&PROG_GET_FD_BY_ID, &mut attributes) } {
            Ok(fd) => {
                programs.push(AttachedProgram { id, name: name_of(fd.as_fd())?, fd });
            }
            // Detached by somebody since we asked.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                unidentified = true;
            }
            Err(error) => {
                return Err(failed("identify the BPF programs of", device, direction, error));
            }
        }
    }
    if unidentified && programs.is_empty() {
        let place = place(direction);
        return Err(BpfError::Unidentified { device, place, count: ids.len() });
    }
    Ok(programs)
}

fn program_ids(device: u32, direction: Direction) -> Result<Vec<u32>, BpfError> {
    let mut ids = vec![0_u32; MAX_PROGRAMS];
    let mut attributes = ProgramQuery {
        target_ifindex: device,
        attach_type: attach_type(direction),
        prog_ids: ids.as_mut_ptr() as u64,
        count: ids.len() as u32,
        ..ProgramQuery::default()
    };
    // SAFETY: `prog_ids` has room for `count` numbers of 4 bytes and lives on.
    unsafe { bpf(&PROG_QUERY, &mut attributes) }
        .map_err(|error| failed("ask for the BPF programs of", device, direction, error))?;
    ids.truncate(attributes.count as usize);
    Ok(ids)
}

fn failed(action: &str, device: u32, direction: Direction, error: io::Error) -> BpfError {
    // A kernel that does not know the attach type says EINVAL, before it looks at anything else.
    if error.raw_os_error() == Some(libc::EINVAL) {
        return BpfError::Unsupported { feature: "TCX", since: "Linux 6.6, CONFIG_NET_XGRESS" };
    }
    BpfError::from_io(format!("{action} interface {device} at {}", place(direction)), error)
}

/// The name a program was loaded with, as far as the kernel stores it.
fn name_of(program: BorrowedFd<'_>) -> Result<String, BpfError> {
    Ok(describe(program)?.1)
}

/// A program's number and name.
fn describe(program: BorrowedFd<'_>) -> Result<(u32, String), BpfError> {
    let mut info = ProgramInfo::default();
    let mut attributes = InfoByFd {
        bpf_fd: program.as_raw_fd() as u32,
        info_len: size_of::<ProgramInfo>() as u32,
        info: &raw mut info as u64,
    };
    // SAFETY: `info` has `info_len` writable bytes and lives on; its fields are plain numbers,
    // and the counts and addresses we leave zero ask for no further data.
    unsafe { bpf(&OBJ_GET_INFO_BY_FD, &mut attributes) }
        .map_err(|error| BpfError::from_io("ask for a BPF program's name", error))?;
    let name = CStr::from_bytes_until_nul(&info.name).unwrap_or_default();
    Ok((info.id, name.to_string_lossy().into_owned()))
}
