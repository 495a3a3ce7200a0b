//! A guest behind vhost-net: a kernel thread moves frames between its virtio queues and the
//! tap, as for QEMU with `vhost=on` (Documentation/virt, `drivers/vhost/net.c`). The queues
//! are split virtqueues in this process's memory, whose addresses are the guest's.

#![allow(unsafe_code, reason = "ioctls of vhost, and memory shared with the kernel")]

use super::raw::open_tap;
use super::{Namespace, eventually};
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

const VHOST_SET_FEATURES: libc::c_ulong = 0x4008_af00;
const VHOST_SET_OWNER: libc::c_ulong = 0xaf01;
const VHOST_SET_MEM_TABLE: libc::c_ulong = 0x4008_af03;
const VHOST_SET_VRING_NUM: libc::c_ulong = 0x4008_af10;
const VHOST_SET_VRING_ADDR: libc::c_ulong = 0x4028_af11;
const VHOST_SET_VRING_BASE: libc::c_ulong = 0x4008_af12;
const VHOST_SET_VRING_KICK: libc::c_ulong = 0x4008_af20;
const VHOST_SET_VRING_CALL: libc::c_ulong = 0x4008_af21;
const VHOST_NET_SET_BACKEND: libc::c_ulong = 0x4008_af30;

/// Entries of a queue.
const ENTRIES: usize = 16;
/// Bytes of a buffer: a super-frame and its header.
const BUFFER: usize = 72 * 1024;
/// Where a queue's parts are in its memory: descriptors, what the guest offers, what the
/// host has used, buffers.
const AVAILABLE: usize = 256;
const USED: usize = 512;
const BUFFERS: usize = 4096;
const QUEUE: usize = BUFFERS + ENTRIES * BUFFER;
/// The descriptor is for the host to write (VIRTQ_DESC_F_WRITE).
const WRITE: u16 = 2;

/// One virtqueue.
struct Queue {
    memory: *mut u8,
    kick: File,
    /// Descriptors offered and taken back.
    offered: u16,
    taken: u16,
}

// SAFETY: the memory belongs to this value alone and is not bound to a thread.
unsafe impl Send for Queue {}

impl Queue {
    fn index(&self, place: usize) -> &AtomicU16 {
        // SAFETY: `place` is inside the queue's memory and even; the kernel accesses the
        // same word atomically.
        unsafe { AtomicU16::from_ptr(self.memory.add(place + 2).cast()) }
    }

    fn buffer(&self, number: usize) -> *mut u8 {
        // SAFETY: `number` is below ENTRIES, so the buffer lies inside the queue's memory.
        unsafe { self.memory.add(BUFFERS + number * BUFFER) }
    }

    /// Gives the host a buffer of this many bytes.
    fn offer(&mut self, number: usize, length: usize, flags: u16) {
        let mut descriptor = [0u8; 16];
        descriptor[..8].copy_from_slice(&(self.buffer(number) as u64).to_ne_bytes());
        descriptor[8..12].copy_from_slice(&(length as u32).to_ne_bytes());
        descriptor[12..14].copy_from_slice(&flags.to_ne_bytes());
        let place = usize::from(self.offered) % ENTRIES;
        // SAFETY: both places are inside the queue's memory, and the host reads them only
        // after the index below has moved.
        unsafe {
            self.memory.add(number * 16).cast::<[u8; 16]>().write(descriptor);
            self.memory.add(AVAILABLE + 4 + 2 * place).cast::<u16>().write(number as u16);
        }
        self.offered = self.offered.wrapping_add(1);
        self.index(AVAILABLE).store(self.offered, Ordering::Release);
        (&self.kick).write_all(&1u64.to_ne_bytes()).expect("an eventfd");
    }

    /// The next buffer the host is done with, and how many bytes it wrote.
    fn take(&mut self) -> Option<(usize, usize)> {
        if self.index(USED).load(Ordering::Acquire) == self.taken {
            return None;
        }
        let place = usize::from(self.taken) % ENTRIES;
        // SAFETY: inside the queue's memory; the acquire load saw the index behind it.
        let [number, length] =
            unsafe { self.memory.add(USED + 4 + 8 * place).cast::<[u32; 2]>().read_volatile() };
        self.taken = self.taken.wrapping_add(1);
        Some((number as usize, length as usize))
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // SAFETY: the mapping of `VhostGuest::open`, to which no reference exists; vhost has
        // been closed by then.
        unsafe { libc::munmap(self.memory.cast(), QUEUE) };
    }
}

/// A guest whose tap vhost-net serves.
pub struct VhostGuest {
    // Dropped first: then nobody uses the queues' memory any more.
    vhost: File,
    _tap: File,
    receiving: Queue,
    sending: Queue,
}

impl VhostGuest {
    /// Opens the tap with these offloads and gives it to vhost-net.
    pub fn open(host: &Namespace, tap: &str, offload: u32) -> Self {
        let opened = host.enter(|| open_tap(tap, 0, offload));
        let tap = opened.unwrap_or_else(|error| panic!("opening {tap}: {error}"));
        let vhost = File::options().read(true).write(true).open("/dev/vhost-net");
        let vhost = vhost.expect("/dev/vhost-net (is the module vhost_net loaded?)");
        set(&vhost, VHOST_SET_OWNER, &0u64).expect("VHOST_SET_OWNER");
        // None: a header of ten bytes, and it is the tap's.
        set(&vhost, VHOST_SET_FEATURES, &0u64).expect("VHOST_SET_FEATURES");
        let [mut receiving, sending] =
            [(); 2].map(|()| Queue { memory: map(), kick: eventfd(), offered: 0, taken: 0 });
        let region = |queue: &Queue| {
            let address = queue.memory as u64;
            [address, QUEUE as u64, address, 0]
        };
        let table: (u64, [[u64; 4]; 2]) = (2, [region(&receiving), region(&sending)]);
        set(&vhost, VHOST_SET_MEM_TABLE, &table).expect("VHOST_SET_MEM_TABLE");
        for (index, queue) in [&receiving, &sending].into_iter().enumerate() {
            let index = index as u32;
            let at = |place: usize| queue.memory as u64 + place as u64;
            let file = |fd: RawFd| [index, fd.cast_unsigned()];
            let calls = eventfd();
            set(&vhost, VHOST_SET_VRING_NUM, &[index, ENTRIES as u32]).expect("its length");
            set(&vhost, VHOST_SET_VRING_BASE, &[index, 0]).expect("its base");
            let addresses = [u64::from(index), at(0), at(USED), at(AVAILABLE), 0];
            set(&vhost, VHOST_SET_VRING_ADDR, &addresses).expect("its addresses");
            set(&vhost, VHOST_SET_VRING_KICK, &file(queue.kick.as_raw_fd())).expect("its kick");
            set(&vhost, VHOST_SET_VRING_CALL, &file(calls.as_raw_fd())).expect("its call");
            set(&vhost, VHOST_NET_SET_BACKEND, &file(tap.as_raw_fd())).expect("its tap");
        }
        for number in 0..ENTRIES {
            receiving.offer(number, BUFFER, WRITE);
        }
        Self { vhost, _tap: tap, receiving, sending }
    }

    /// The guest sends a frame with its virtio header, and waits until it is gone.
    pub fn send(&mut self, header: &[u8; 10], frame: &[u8]) {
        let packet = [&header[..], frame].concat();
        assert!(packet.len() <= BUFFER);
        // SAFETY: the buffer has room, and the host has given it back.
        unsafe {
            std::ptr::copy_nonoverlapping(packet.as_ptr(), self.sending.buffer(0), packet.len());
        }
        self.sending.offer(0, packet.len(), 0);
        eventually("vhost-net takes the frame", || self.sending.take());
    }

    /// The next frame for the guest, with its virtio header.
    pub fn receive_within(&mut self, patience: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + patience;
        let (number, length) = loop {
            match self.receiving.take() {
                Some(used) => break used,
                None if Instant::now() > deadline => return None,
                None => std::thread::sleep(Duration::from_micros(200)),
            }
        };
        let mut packet = vec![0; length];
        // SAFETY: the host wrote `length` bytes into the buffer and is done with it.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.receiving.buffer(number),
                packet.as_mut_ptr(),
                length.min(BUFFER),
            );
        }
        self.receiving.offer(number, BUFFER, WRITE);
        Some(packet)
    }
}

impl Drop for VhostGuest {
    fn drop(&mut self) {
        for index in 0..2u32 {
            // Without it the tap would stay in use for as long as the queue's worker runs.
            let _ = set(&self.vhost, VHOST_NET_SET_BACKEND, &[index, u32::MAX]);
        }
    }
}

/// An ioctl of vhost that reads this value, or nothing.
fn set<T>(vhost: &File, request: libc::c_ulong, value: &T) -> io::Result<()> {
    // SAFETY: every request above reads what its caller passes, and no more.
    let result = unsafe { libc::ioctl(vhost.as_raw_fd(), request, std::ptr::from_ref(value)) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn eventfd() -> File {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    assert!(fd >= 0, "eventfd: {}", io::Error::last_os_error());
    // SAFETY: a new descriptor that nobody else owns.
    unsafe { File::from_raw_fd(fd) }
}

fn map() -> *mut u8 {
    // SAFETY: a fresh anonymous mapping; unmapped when its queue is dropped.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            QUEUE,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert_ne!(memory, libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
    memory.cast()
}
