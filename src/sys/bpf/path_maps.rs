//! The maps of the kernel path: an array of programs, records of counters for each CPU,
//! small values that programs read without a look-up; and their pins in a BPF file system,
//! by which they outlive us.
//!
//! An array of programs is emptied when the last of its descriptors and pins goes
//! (`bpf_map_put_uref`, kernel/bpf/syscall.c), even while a program that uses it is
//! attached: so it is pinned, or the kernel path ends with us.

#![allow(unsafe_code, reason = "bpf(2) takes addresses")]

use super::map::{create, possible_cpus};
use super::path::Record;
use super::syscall::{
    BpfError, InfoByFd, MAP_DELETE_ELEM, MAP_LOOKUP_BATCH, MAP_LOOKUP_ELEM, MAP_UPDATE_ELEM,
    MapBatch, MapElement, MapInfo, OBJ_GET, OBJ_GET_INFO_BY_FD, OBJ_PIN, ObjectPath, bpf, bpf_open,
};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

// enum bpf_map_type, include/uapi/linux/bpf.h.
const ARRAY: u32 = 2;
const PROGRAM_ARRAY: u32 = 3;
const PERCPU_ARRAY: u32 = 6;

const RECORD_BYTES: u32 = (Record::LEN * 8) as u32;

/// Whether a folder is in a BPF file system.
pub fn is_bpf_file_system(folder: &Path) -> bool {
    statfs(folder).is_ok_and(|facts| facts.filesystem_type() == BPF_FS_MAGIC)
}

fn path_text(path: &Path) -> Result<CString, BpfError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|error| BpfError::System {
        action: format!("use {}", path.display()),
        source: io::Error::new(io::ErrorKind::InvalidInput, error),
    })
}

/// Gives a map, program or link a name in a BPF file system, where it stays when we end.
///
/// # Errors
/// There is something of that name, or no such folder.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> Result<(), BpfError> {
    let text = path_text(path)?;
    let mut attributes = ObjectPath {
        pathname: text.as_ptr() as u64,
        bpf_fd: object.as_raw_fd() as u32,
        ..ObjectPath::default()
    };
    // SAFETY: `pathname` is NUL-terminated and lives on.
    unsafe { bpf(&OBJ_PIN, &mut attributes) }.map(drop).map_err(|error| {
        BpfError::from_io(format!("pin a BPF object as {}", path.display()), error)
    })
}

/// Opens what was pinned; `None` if there is nothing of that name.
///
/// # Errors
/// It is no BPF object, or not ours to open.
pub(super) fn open(path: &Path) -> Result<Option<OwnedFd>, BpfError> {
    let text = path_text(path)?;
    let mut attributes = ObjectPath { pathname: text.as_ptr() as u64, ..ObjectPath::default() };
    // SAFETY: `pathname` is NUL-terminated and lives on, and the command opens an fd.
    match unsafe { bpf_open(&OBJ_GET, &mut attributes) } {
        Ok(fd) => Ok(Some(fd)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(BpfError::from_io(format!("open {}", path.display()), error)),
    }
}

/// What makes a map what it is, its name included, which has a version of its layout.
#[derive(Debug, PartialEq, Eq)]
struct Shape<'n> {
    map_type: u32,
    value_size: u32,
    entries: u32,
    name: &'n str,
}

impl Shape<'_> {
    fn make(&self) -> Result<OwnedFd, BpfError> {
        create(self.map_type, self.name, self.value_size, self.entries)
    }

    fn fits(&self, map: BorrowedFd<'_>) -> bool {
        let mut info = MapInfo::default();
        let mut attributes = InfoByFd {
            bpf_fd: map.as_raw_fd() as u32,
            info_len: size_of::<MapInfo>() as u32,
            info: &raw mut info as u64,
        };
        // SAFETY: `info` has `info_len` writable bytes and lives on; its fields are plain
        // numbers.
        if unsafe { bpf(&OBJ_GET_INFO_BY_FD, &mut attributes) }.is_err() {
            return false;
        }
        let name = info.name.split(|byte| *byte == 0).next().unwrap_or_default();
        info.map_type == self.map_type
            && info.value_size == self.value_size
            && info.max_entries == self.entries
            && name == self.name.as_bytes()
    }

    /// The map pinned here, made and pinned if there is none of this shape. Without a place
    /// for pins it is made, and ends with us. Returns whether it was there.
    fn at(&self, place: Option<&Path>) -> Result<(OwnedFd, bool), BpfError> {
        let Some(place) = place else { return Ok((self.make()?, false)) };
        if let Some(map) = open(place)? {
            if self.fits(map.as_fd()) {
                return Ok((map, true));
            }
            // Of another version: programs that use it go on with it until they are replaced.
            std::fs::remove_file(place)
                .map_err(|error| BpfError::from_io(format!("remove {}", place.display()), error))?;
        }
        let map = self.make()?;
        pin(map.as_fd(), place)?;
        Ok((map, false))
    }
}

/// An array of programs to jump to.
#[derive(Debug)]
pub struct ProgramArray(OwnedFd);

impl ProgramArray {
    /// The array pinned at `place`, or an empty one.
    ///
    /// # Errors
    /// [`BpfError::NotPermitted`], or the kernel is out of memory.
    pub fn at(place: Option<&Path>, name: &str, entries: u32) -> Result<Self, BpfError> {
        let shape = Shape { map_type: PROGRAM_ARRAY, value_size: 4, entries, name };
        Ok(Self(shape.at(place)?.0))
    }

    /// Puts a program at `index`, in place of any there, from the next frame on.
    ///
    /// # Errors
    /// `index` is out of range.
    pub fn set(&self, index: u32, program: BorrowedFd<'_>) -> Result<(), BpfError> {
        let value = program.as_raw_fd() as u32;
        let mut attributes = MapElement {
            map_fd: self.0.as_raw_fd() as u32,
            key: &raw const index as u64,
            value: &raw const value as u64,
            ..MapElement::default()
        };
        // SAFETY: keys and values of such maps have 4 bytes, and both locals live on.
        unsafe { bpf(&MAP_UPDATE_ELEM, &mut attributes) }
            .map(drop)
            .map_err(|error| BpfError::from_io(format!("set program {index} of an array"), error))
    }

    /// Leaves `index` empty.
    ///
    /// # Errors
    /// `index` is out of range.
    pub fn clear(&self, index: u32) -> Result<(), BpfError> {
        let mut attributes = MapElement {
            map_fd: self.0.as_raw_fd() as u32,
            key: &raw const index as u64,
            ..MapElement::default()
        };
        // SAFETY: keys of such maps have 4 bytes, and the local lives on.
        match unsafe { bpf(&MAP_DELETE_ELEM, &mut attributes) } {
            Ok(_) => Ok(()),
            // It was empty.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            Err(error) => {
                Err(BpfError::from_io(format!("clear program {index} of an array"), error))
            }
        }
    }
}

impl AsFd for ProgramArray {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Records of counters, each with a copy for each possible CPU.
#[derive(Debug)]
pub struct Records {
    fd: OwnedFd,
    possible_cpus: usize,
}

impl Records {
    /// The records pinned at `place`, or new ones at zero.
    ///
    /// # Errors
    /// [`BpfError::NotPermitted`], or the kernel is out of memory.
    pub fn at(place: Option<&Path>, name: &str, entries: u32) -> Result<Self, BpfError> {
        let possible_cpus = possible_cpus()?;
        let shape = Shape { map_type: PERCPU_ARRAY, value_size: RECORD_BYTES, entries, name };
        Ok(Self { fd: shape.at(place)?.0, possible_cpus })
    }

    /// A record's numbers, each summed over the CPUs.
    ///
    /// # Errors
    /// `index` is out of range.
    pub fn sum(&self, index: u32) -> Result<[u64; Record::LEN], BpfError> {
        let mut values = vec![0_u64; Record::LEN * self.possible_cpus];
        let mut attributes = MapElement {
            map_fd: self.fd.as_raw_fd() as u32,
            key: &raw const index as u64,
            value: values.as_mut_ptr() as u64,
            ..MapElement::default()
        };
        // SAFETY: the kernel writes a record for each possible CPU (`bpf_percpu_array_copy`),
        // which is the length of `values`; an index out of range is refused.
        unsafe { bpf(&MAP_LOOKUP_ELEM, &mut attributes) }
            .map_err(|error| BpfError::from_io(format!("read record {index}"), error))?;
        let mut sums = [0_u64; Record::LEN];
        add_copies(&mut sums, &values);
        Ok(sums)
    }

    /// The first two records, each summed as by [`Records::sum`], by one system call where
    /// the kernel can (Linux 5.13).
    ///
    /// # Errors
    /// There are no two.
    pub fn first_two(&self) -> Result<[[u64; Record::LEN]; 2], BpfError> {
        let mut keys = [0_u32; 2];
        let mut values = vec![0_u64; 2 * Record::LEN * self.possible_cpus];
        let mut next = 0_u32;
        let mut attributes = MapBatch {
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: keys.len() as u32,
            map_fd: self.fd.as_raw_fd() as u32,
            ..MapBatch::default()
        };
        // SAFETY: `keys` has room for `count` keys of 4 bytes, `values` for `count` records for
        // each possible CPU, and `next` for a position, which in an array is a key
        // (`generic_map_lookup_batch`, kernel/bpf/syscall.c). All live on.
        let read = unsafe { bpf(&MAP_LOOKUP_BATCH, &mut attributes) };
        if read.is_err() || attributes.count != 2 || keys != [0, 1] {
            return Ok([self.sum(0)?, self.sum(1)?]);
        }
        let mut sums = [[0_u64; Record::LEN]; 2];
        let records = values.chunks_exact(Record::LEN * self.possible_cpus);
        for (sums, copies) in sums.iter_mut().zip(records) {
            add_copies(sums, copies);
        }
        Ok(sums)
    }

    /// Sets one number of a record on all CPUs, and all others to zero. For records that no
    /// program counts in, or no longer.
    ///
    /// # Errors
    /// `index` is out of range.
    pub fn fill(&self, index: u32, numbers: &[(usize, u64)]) -> Result<(), BpfError> {
        let mut values = vec![0_u64; Record::LEN * self.possible_cpus];
        if let Some(first) = values.get_mut(..Record::LEN) {
            for (place, number) in numbers {
                if let Some(value) = first.get_mut(*place) {
                    *value = *number;
                }
            }
        }
        let mut attributes = MapElement {
            map_fd: self.fd.as_raw_fd() as u32,
            key: &raw const index as u64,
            value: values.as_ptr() as u64,
            ..MapElement::default()
        };
        // SAFETY: the kernel reads a record for each possible CPU (`bpf_percpu_array_update`),
        // which is the length of `values`.
        unsafe { bpf(&MAP_UPDATE_ELEM, &mut attributes) }
            .map(drop)
            .map_err(|error| BpfError::from_io(format!("set record {index}"), error))
    }
}

impl AsFd for Records {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Adds up one record of all CPUs.
fn add_copies(sums: &mut [u64; Record::LEN], copies: &[u64]) {
    for copy in copies.chunks_exact(Record::LEN) {
        for (sum, value) in sums.iter_mut().zip(copy) {
            *sum = sum.wrapping_add(*value);
        }
    }
}

/// Two numbers that programs read at their address, stored in one piece.
#[derive(Debug)]
pub struct SharedPair(OwnedFd);

impl SharedPair {
    /// The pair pinned at `place`, or a new one at zero.
    ///
    /// # Errors
    /// [`BpfError::NotPermitted`], or the kernel is out of memory.
    pub fn at(place: Option<&Path>, name: &str) -> Result<Self, BpfError> {
        let shape = Shape { map_type: ARRAY, value_size: 8, entries: 1, name };
        Ok(Self(shape.at(place)?.0))
    }

    /// Sets both.
    ///
    /// # Errors
    /// None that a working kernel gives.
    pub fn set(&self, first: u32, second: u32) -> Result<(), BpfError> {
        let (index, value) = (0_u32, [first, second]);
        let mut attributes = MapElement {
            map_fd: self.0.as_raw_fd() as u32,
            key: &raw const index as u64,
            value: value.as_ptr() as u64,
            ..MapElement::default()
        };
        // SAFETY: the map has keys of 4 bytes and values of 8, and both locals live on.
        unsafe { bpf(&MAP_UPDATE_ELEM, &mut attributes) }
            .map(drop)
            .map_err(|error| BpfError::from_io("set a value of the kernel path", error))
    }
}

impl AsFd for SharedPair {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
