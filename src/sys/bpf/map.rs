//! BPF maps: arrays shared between a program and us.
//!
//! Arrays exist in full from the start: a lookup of a legal index never misses,
//! and programs reach them without a lock. A per-CPU array has one copy for each
//! possible CPU, so programs count with a plain add, and we sum the copies; in one
//! for all CPUs they add atomically.

#![allow(unsafe_code, reason = "bpf(2) takes addresses")]

use super::syscall::{
    BpfError, MAP_CREATE, MAP_LOOKUP_BATCH, MAP_LOOKUP_ELEM, MAP_UPDATE_ELEM, MapBatch, MapCreate,
    MapElement, bpf, bpf_open, object_name, with_memory_lock_limit,
};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::{fs, io};

// enum bpf_map_type, include/uapi/linux/bpf.h.
const ARRAY: u32 = 2;
const PERCPU_ARRAY: u32 = 6;

/// Values read by one system call.
const BATCH: usize = 4096;

pub(super) fn create(
    map_type: u32,
    name: &str,
    value_size: u32,
    entries: u32,
) -> Result<OwnedFd, BpfError> {
    let map_name = object_name(name)?;
    with_memory_lock_limit(&format!("create BPF map {name} of {entries} entries"), || {
        let mut attributes = MapCreate {
            map_type,
            key_size: 4,
            value_size,
            max_entries: entries,
            map_name,
            ..MapCreate::default()
        };
        // SAFETY: the attributes hold no address.
        unsafe { bpf_open(&MAP_CREATE, &mut attributes) }
    })
}

fn out_of_range(index: u32, entries: u32) -> BpfError {
    let source = io::Error::from_raw_os_error(libc::E2BIG);
    BpfError::System { action: format!("use entry {index} of a BPF map of {entries}"), source }
}

/// Reads the value at `index` of an array of `entries` values of `N` bytes.
fn look_up<const N: usize>(
    map: &OwnedFd,
    entries: u32,
    index: u32,
    value: &mut [u8; N],
) -> Result<(), BpfError> {
    const { assert!(N == 4 || N == 8) };
    if index >= entries {
        return Err(out_of_range(index, entries));
    }
    let mut attributes = MapElement {
        map_fd: map.as_raw_fd() as u32,
        key: &raw const index as u64,
        value: value.as_mut_ptr() as u64,
        ..MapElement::default()
    };
    // SAFETY: the callers' maps were made with keys of 4 bytes and values of N bytes, and both
    // places live on.
    unsafe { bpf(&MAP_LOOKUP_ELEM, &mut attributes) }
        .map(drop)
        .map_err(|error| BpfError::from_io(format!("read entry {index} of a BPF map"), error))
}

/// An array of u32, one for all CPUs.
#[derive(Debug)]
pub struct ArrayMap {
    fd: OwnedFd,
    entries: u32,
}

impl ArrayMap {
    /// An array of `entries` zeros.
    ///
    /// # Errors
    /// [`BpfError::NotPermitted`], or the kernel is out of memory.
    pub fn create(name: &str, entries: u32) -> Result<Self, BpfError> {
        Ok(Self { fd: create(ARRAY, name, 4, entries)?, entries })
    }

    /// Stores `value` at `index`, in one piece for programs that read it.
    ///
    /// # Errors
    /// `index` is out of range.
    pub fn update(&self, index: u32, value: u32) -> Result<(), BpfError> {
        if index >= self.entries {
            return Err(out_of_range(index, self.entries));
        }
        let mut attributes = MapElement {
            map_fd: self.fd.as_raw_fd() as u32,
            key: &raw const index as u64,
            value: &raw const value as u64,
            ..MapElement::default()
        };
        // SAFETY: the map was made with keys and values of 4 bytes, and both locals live on.
        unsafe { bpf(&MAP_UPDATE_ELEM, &mut attributes) }
            .map(drop)
            .map_err(|error| BpfError::from_io(format!("set entry {index} of a BPF map"), error))
    }

    /// The value at `index`.
    ///
    /// # Errors
    /// `index` is out of range.
    pub fn lookup(&self, index: u32) -> Result<u32, BpfError> {
        let mut value = [0; 4];
        look_up(&self.fd, self.entries, index, &mut value)?;
        Ok(u32::from_ne_bytes(value))
    }
}

impl AsFd for ArrayMap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// An array of u64, one for all CPUs, that programs write and we read: of two that
/// store an entry at once one wins, whole. Large ones are made in a tenth of the time that
/// one of a copy for each CPU takes, where each entry is allocated for itself.
#[derive(Debug)]
pub struct WideArrayMap {
    fd: OwnedFd,
    entries: u32,
}

impl WideArrayMap {
    /// An array of `entries` zeros.
    ///
    /// # Errors
    /// [`BpfError::NotPermitted`], or the kernel is out of memory.
    pub fn create(name: &str, entries: u32) -> Result<Self, BpfError> {
        Ok(Self { fd: create(ARRAY, name, 8, entries)?, entries })
    }

    /// All values, by index.
    ///
    /// # Errors
    /// None that a working kernel gives.
    pub fn values(&self) -> Result<Vec<u64>, BpfError> {
        self.read_all().map_err(|error| BpfError::from_io("read all entries of a BPF map", error))
    }

    /// Some thousand values by system call (Linux 5.6).
    fn read_all(&self) -> io::Result<Vec<u64>> {
        let mut all = Vec::with_capacity(self.entries as usize);
        let mut keys = vec![0_u32; BATCH];
        let mut values = vec![0_u64; BATCH];
        let (mut position, mut next) = (0_u32, 0_u32);
        while all.len() < self.entries as usize {
            let mut attributes = MapBatch {
                // A null position is the start.
                in_batch: if all.is_empty() { 0 } else { &raw const position as u64 },
                out_batch: &raw mut next as u64,
                keys: keys.as_mut_ptr() as u64,
                values: values.as_mut_ptr() as u64,
                count: BATCH as u32,
                map_fd: self.fd.as_raw_fd() as u32,
                ..MapBatch::default()
            };
            // SAFETY: `keys` has room for `count` keys of 4 bytes, `values` for `count` values of
            // 8 bytes; positions in an array are keys of 4 bytes (`generic_map_lookup_batch`,
            // kernel/bpf/syscall.c). All live on.
            let result = unsafe { bpf(&MAP_LOOKUP_BATCH, &mut attributes) };
            match result {
                Ok(_) => {}
                // The end of the map, with what was left of it.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
            if attributes.count == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            all.extend(values.iter().take(attributes.count as usize));
            position = next;
        }
        Ok(all)
    }

    /// The value at `index`.
    ///
    /// # Errors
    /// `index` is out of range.
    pub fn lookup(&self, index: u32) -> Result<u64, BpfError> {
        let mut value = [0; 8];
        look_up(&self.fd, self.entries, index, &mut value)?;
        Ok(u64::from_ne_bytes(value))
    }
}

impl AsFd for WideArrayMap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// An array of u64 counters, one copy for each possible CPU.
#[derive(Debug)]
pub struct PerCpuArrayMap {
    fd: OwnedFd,
    entries: u32,
    possible_cpus: usize,
}

impl PerCpuArrayMap {
    /// An array of `entries` counters at zero.
    ///
    /// # Errors
    /// [`BpfError::NotPermitted`], out of memory, or the number of possible CPUs
    /// cannot be read.
    pub fn create(name: &str, entries: u32) -> Result<Self, BpfError> {
        let possible_cpus = possible_cpus()?;
        Ok(Self { fd: create(PERCPU_ARRAY, name, 8, entries)?, entries, possible_cpus })
    }

    /// The counter at `index`, summed over the CPUs (wrapping, as they do).
    ///
    /// # Errors
    /// `index` is out of range.
    pub fn sum(&self, index: u32) -> Result<u64, BpfError> {
        if index >= self.entries {
            return Err(out_of_range(index, self.entries));
        }
        let mut values = vec![0_u64; self.possible_cpus];
        let mut attributes = MapElement {
            map_fd: self.fd.as_raw_fd() as u32,
            key: &raw const index as u64,
            value: values.as_mut_ptr() as u64,
            ..MapElement::default()
        };
        // SAFETY: the kernel writes one 8-byte value per possible CPU (`bpf_percpu_array_copy`),
        // which is the length of `values`.
        unsafe { bpf(&MAP_LOOKUP_ELEM, &mut attributes) }.map_err(|error| {
            BpfError::from_io(format!("read entry {index} of a BPF map"), error)
        })?;
        Ok(values.into_iter().fold(0, u64::wrapping_add))
    }
}

impl AsFd for PerCpuArrayMap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

const POSSIBLE: &str = "/sys/devices/system/cpu/possible";

/// How many CPUs the kernel counts for: `num_possible_cpus()`, not those online.
pub(super) fn possible_cpus() -> Result<usize, BpfError> {
    let failed = |source| BpfError::System { action: format!("read {POSSIBLE}"), source };
    let text = fs::read_to_string(POSSIBLE).map_err(failed)?;
    count_cpus(text.trim()).ok_or_else(|| {
        failed(io::Error::new(io::ErrorKind::InvalidData, format!("not a CPU list: {text:?}")))
    })
}

/// The number of CPUs in a list such as `0-3,8,10-11`.
fn count_cpus(list: &str) -> Option<usize> {
    list.split(',').try_fold(0_usize, |total, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        total.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_counted() {
        for (list, count) in [
            ("0", Some(1)),
            ("0-3", Some(4)),
            ("0-3,8,10-11", Some(7)),
            ("0-127", Some(128)),
            ("", None),
            ("3-1", None),
            ("0-x", None),
        ] {
            assert_eq!(count_cpus(list), count, "{list:?}");
        }
    }
}
