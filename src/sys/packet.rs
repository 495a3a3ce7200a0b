#![allow(
    unsafe_code,
    reason = "memory shared with the kernel, and socket options nix does not know"
)]
//! AF_PACKET: the receive ring and the sending side (`net/packet/af_packet.c`,
//! `Documentation/networking/packet_mmap.rst`).
//!
//! **Receiving.** A TPACKET_V2 ring of small slots. Each slot starts with a status
//! word that says who owns the slot: 0 the kernel, `TP_STATUS_USER` us. The kernel
//! writes the slot, then the status (release); we read the status (acquire), work
//! on the bytes in place, and store 0 (release) when the frame has been sent. The
//! ten bytes before the frame hold its virtio header, and the slot header before
//! them is room for pushed tags. A frame longer than a slot arrives whole on the
//! socket's queue, in the order of the slots that announce it (`TP_STATUS_COPY`).
//!
//! **Invariants.** `next` is the slot the kernel fills next among those we have
//! not seen; the `taken` slots before it are ours and may be referenced by frames.
//! [`Receiver::receive`] borrows the receiver for as long as its frames live, and
//! [`Receiver::release`] borrows it mutably, so no frame outlives its slot. Slots go
//! back in order, because `packet_poll` looks at the newest only.
//!
//! **Sending** is `send`'s.

mod send;

pub use send::{Loaded, SendSpace, Transmitter};

use super::bpf::UplinkFilter;
use crate::frame::edit::HEADROOM;
use crate::frame::vnet::VNET_HEADER_LEN;
use crate::frame::{FrameBuffer, Tag, Tci, Tpid, VnetHeader};
use crate::sys::sandbox::Call;
use arrayvec::ArrayVec;
use libc::{c_int, c_void, socklen_t};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use std::mem::{offset_of, size_of, size_of_val};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use thiserror::Error;

/// Frames taken from a device, or sent to one, in one go.
pub const BURST: usize = 64;
/// Super-frames taken in one burst: few enough for their copies to stay in cache.
pub const COPIES: usize = 4;
/// Length of a ring slot in bytes: an MTU of 1500 fits with room to spare.
pub const SLOT_LEN: usize = 2048;

/// Bytes of a slot's header that stay out of reach of frame buffers: the status
/// word and the fields read through a pointer.
const SLOT_HEADER_LEN: usize = size_of::<libc::tpacket2_hdr>();
/// A super-frame with its virtio header, and room for tags before it.
const COPY_LEN: usize = 68 * 1024;
const COPY_START: usize = HEADROOM;
/// Bytes by which a super-frame is known again: all headers, and some of the data.
const COPY_HEAD_LEN: usize = 256;
/// Reads for one super-frame: one that meets an error, one that gets a frame given up
/// before, and one more.
const COPY_TRIES: usize = 3;

const _: () = assert!(size_of::<libc::tpacket2_hdr>() == 32);
const _: () = assert!(offset_of!(libc::tpacket2_hdr, tp_mac) == 12);
const _: () = assert!(offset_of!(libc::tpacket2_hdr, tp_vlan_tpid) == 26);
const _: () = assert!(size_of::<libc::tpacket_req>() == 16);

/// What went wrong while a packet socket was set up.
#[derive(Debug, Error)]
#[error("{step}: {}", .errno.desc())]
pub struct PacketError {
    /// The step that failed, in words.
    pub step: &'static str,
    /// The kernel's answer.
    pub errno: Errno,
}

/// What moving frames takes.
pub const MOVING_CALLS: &[Call] = &[
    Call::any(libc::SYS_sendmmsg),
    // Super-frames that fit no slot.
    Call::any(libc::SYS_recvfrom),
    Call::any(libc::SYS_recvmsg),
    // An error taken off a socket, and its entrance closed.
    Call::one_of(libc::SYS_getsockopt, 2, &[libc::SO_ERROR.cast_unsigned()]),
    Call::one_of(libc::SYS_setsockopt, 2, &[libc::SO_ATTACH_FILTER.cast_unsigned()]),
];

/// What opening a device and reading its counts takes, beside what any thread does.
pub const OPENING_CALLS: &[Call] = &[
    Call::one_of(libc::SYS_socket, 0, &[libc::AF_PACKET.cast_unsigned()]),
    Call::any(libc::SYS_bind),
    Call::any(libc::SYS_setsockopt),
    Call::any(libc::SYS_getsockopt),
    // A second descriptor for the counts.
    Call::one_of(libc::SYS_fcntl, 1, &[libc::F_DUPFD_CLOEXEC.cast_unsigned()]),
];

pub(super) fn at(step: &'static str) -> impl FnOnce(Errno) -> PacketError {
    move |errno| PacketError { step, errno }
}

/// A frame as a device delivered it.
#[derive(Debug)]
pub struct Received<'a> {
    /// Its bytes, with headroom.
    pub buffer: FrameBuffer<'a>,
    /// The tag the kernel took out of the bytes.
    pub stripped: Option<Tag>,
    /// Its virtio header.
    pub header: VnetHeader,
}

/// The frames of one burst.
pub type Burst<'a> = ArrayVec<Received<'a>, BURST>;

/// Buffers for super-frames, shared by the receivers of one worker.
#[derive(Debug)]
pub struct CopyPool(Vec<Box<[u8]>>);

impl Default for CopyPool {
    fn default() -> Self {
        Self((0..COPIES).map(|_| vec![0; COPY_LEN].into_boxed_slice()).collect())
    }
}

impl CopyPool {
    /// The buffers, each to be lent once per burst.
    pub fn buffers(&mut self) -> impl Iterator<Item = &mut [u8]> {
        self.0.iter_mut().map(|buffer| &mut buffer[..])
    }
}

/// What the kernel counted on a receiving socket since the last look.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KernelCount {
    /// Frames offered to the socket, those it dropped included.
    pub frames: u64,
    /// Frames dropped because the ring was full.
    pub overruns: u64,
}

/// How a receiver is set up.
#[derive(Debug, Clone, Copy)]
pub struct ReceiverOptions<'f> {
    /// Slots in the ring; a multiple of 64.
    pub slots: usize,
    /// Bytes of super-frames that may wait on the socket's queue.
    pub copy_queue: usize,
    /// Make the device take frames for any address.
    pub promiscuous: bool,
    /// Which frames to take at all.
    pub filter: Filter<'f>,
}

/// Which frames a receiver takes.
#[derive(Debug, Clone, Copy)]
pub enum Filter<'f> {
    /// All.
    All,
    /// Those claimed.
    Claimed(&'f UplinkFilter),
    /// None yet: the receiver is to join others (`sys::fanout`).
    Nothing,
}

/// A packet socket's receive ring on one device.
#[derive(Debug)]
pub struct Receiver {
    socket: OwnedFd,
    ring: Ring,
    next: usize,
    taken: usize,
}

impl Receiver {
    /// Opens a ring on the device with this index; frames flow from then on.
    ///
    /// # Errors
    /// [`PacketError`] naming the step; nothing is left behind.
    pub fn open(index: u32, options: &ReceiverOptions<'_>) -> Result<Self, PacketError> {
        let socket = socket()?;
        let fd = socket.as_fd();
        // The socket has protocol 0 until it is bound, so no frame comes in
        // before everything is in place.
        set(
            fd,
            libc::SOL_PACKET,
            libc::PACKET_VERSION,
            &(libc::tpacket_versions::TPACKET_V2 as c_int),
        )
        .map_err(at("choose TPACKET_V2"))?;
        set(fd, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1)
            .map_err(at("ask for virtio headers"))?;
        set(fd, libc::SOL_PACKET, PACKET_IGNORE_OUTGOING, &1)
            .map_err(at("ignore outgoing frames"))?;
        set(fd, libc::SOL_PACKET, libc::PACKET_COPY_THRESH, &1)
            .map_err(at("ask for whole super-frames"))?;
        // The kernel doubles what is asked for.
        set(fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &((options.copy_queue / 2) as c_int))
            .map_err(at("size the receive queue"))?;
        match options.filter {
            Filter::All => {}
            Filter::Claimed(filter) => attach_filter(fd, filter)?,
            Filter::Nothing => refuse_all(fd).map_err(at("attach a filter"))?,
        }
        let ring = Ring::new(fd, options.slots)?;
        bind(fd, index, libc::ETH_P_ALL as u16).map_err(at("bind to the device"))?;
        if options.promiscuous {
            let request = libc::packet_mreq {
                mr_ifindex: index as c_int,
                mr_type: libc::PACKET_MR_PROMISC as u16,
                mr_alen: 0,
                mr_address: [0; 8],
            };
            set(fd, libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP, &request)
                .map_err(at("make the device promiscuous"))?;
        }
        Ok(Self { socket, ring, next: 0, taken: 0 })
    }

    /// Takes a ring over that another process has opened on the device with this index,
    /// with this many slots. No frame may be received before [`Receiver::resume_at`].
    ///
    /// # Errors
    /// [`PacketError`] if the descriptor has no such ring, or the device is another now.
    pub fn adopt(index: u32, socket: OwnedFd, slots: usize) -> Result<Self, PacketError> {
        let bound = bound_to(socket.as_fd()).map_err(at("take over a packet socket"))?;
        if bound != index as c_int {
            return Err(at("take over a packet socket")(Errno::ENODEV));
        }
        if slots == 0 || !slots.is_multiple_of(BURST) {
            return Err(at("take over a receive ring")(Errno::EINVAL));
        }
        let ring = Ring::map(socket.as_fd(), slots)?;
        Ok(Self { socket, ring, next: 0, taken: 0 })
    }

    /// Where the next frame is expected.
    pub fn position(&self) -> usize {
        self.next
    }

    /// Goes on from where the process that had the ring stopped.
    pub fn resume_at(&mut self, position: usize) {
        self.next = position % self.ring.slots;
    }

    /// Whether a frame is waiting: one look at memory.
    #[inline]
    pub fn is_ready(&self) -> bool {
        self.ring.status(self.next).load(Ordering::Relaxed) & libc::TP_STATUS_USER != 0
    }

    /// Takes at most this many frames, until the ring is empty, `burst` is full or
    /// `copies` are used up. Returns how many frames had to be given up because the kernel had no
    /// room for all of their bytes.
    #[inline]
    pub fn receive<'a>(
        &'a mut self,
        copies: &'a mut CopyPool,
        most: usize,
        burst: &mut Burst<'a>,
    ) -> u64 {
        let mut lost = 0;
        let mut copies = copies.buffers();
        let mut copies_left = COPIES;
        while burst.len() < most.min(BURST) && copies_left > 0 && self.taken < self.ring.slots {
            let status = self.ring.status(self.next).load(Ordering::Acquire);
            if status & libc::TP_STATUS_USER == 0 {
                break;
            }
            self.ring.prefetch((self.next + 1) % self.ring.slots);
            // SAFETY: the acquire load saw TP_STATUS_USER, so the kernel has
            // written this slot and leaves it alone until `release` hands it back.
            // `next` moves on below and cannot come round to it again while
            // `taken < slots`, and `release` cannot be called while `'a` lives:
            // nothing else refers to the slot.
            let (header, bytes) = unsafe { self.ring.slot(self.next) };
            self.next = (self.next + 1) % self.ring.slots;
            self.taken += 1;
            let frame = if status & libc::TP_STATUS_COPY != 0 {
                copies_left -= 1;
                copies.next().and_then(|copy| receive_copy(&self.socket, &header, bytes, copy))
            } else if header.tp_snaplen != header.tp_len {
                None
            } else {
                in_slot(&header, bytes)
            };
            match frame {
                Some((buffer, vnet)) => {
                    burst.push(Received {
                        buffer,
                        stripped: stripped(&header, status),
                        header: vnet,
                    });
                }
                None => lost += 1,
            }
        }
        lost
    }

    /// Gives all taken slots back to the kernel.
    #[inline]
    pub fn release(&mut self) {
        let slots = self.ring.slots;
        let first = (self.next + slots - self.taken) % slots;
        for offset in 0..self.taken {
            self.ring
                .status((first + offset) % slots)
                .store(libc::TP_STATUS_KERNEL, Ordering::Release);
        }
        self.taken = 0;
    }

    /// A second handle to the socket, to read [`KernelCount`]s from another thread, and one
    /// to the socket that sends beside it.
    ///
    /// # Errors
    /// The kernel's, when out of file descriptors.
    pub fn counter(&self, transmitter: &Transmitter) -> std::io::Result<KernelCounter> {
        Ok(KernelCounter { socket: self.socket.try_clone()?, sending: transmitter.weak() })
    }

    /// Whether a whole burst is waiting: one look at memory.
    #[inline]
    pub fn has_burst(&self) -> bool {
        let last = (self.next + BURST - 1) % self.ring.slots;
        self.ring.status(last).load(Ordering::Relaxed) & libc::TP_STATUS_USER != 0
    }

    /// Frames waiting in the ring: a search among the status words, of which the
    /// kernel sets one after the other.
    pub fn waiting(&self) -> usize {
        let (mut fewest, mut most) = (0, self.ring.slots - self.taken);
        while fewest < most {
            let middle = (fewest + most).div_ceil(2);
            let slot = (self.next + middle - 1) % self.ring.slots;
            if self.ring.status(slot).load(Ordering::Relaxed) & libc::TP_STATUS_USER != 0 {
                fewest = middle;
            } else {
                most = middle - 1;
            }
        }
        fewest
    }

    /// How many of these wait on the socket's queue as they are longer than a slot: a look
    /// at each.
    pub fn waiting_copies(&self) -> usize {
        let waiting = (self.next..self.next + self.waiting()).map(|slot| slot % self.ring.slots);
        let status = waiting.map(|slot| self.ring.status(slot).load(Ordering::Relaxed));
        status.filter(|status| status & libc::TP_STATUS_COPY != 0).count()
    }

    /// Slots of the ring.
    pub fn slots(&self) -> usize {
        self.ring.slots
    }

    /// Takes no more frames; those that have arrived stay. To be called before the
    /// last look at a device, so that no frame slips in between that and its close.
    ///
    /// # Errors
    /// The kernel's, when out of memory: frames flow on.
    pub fn close_entrance(&self) -> Result<(), Errno> {
        refuse_all(self.socket.as_fd())
    }

    /// Takes the error a device that went down leaves on the socket, so that
    /// polling does not report it for ever.
    pub fn clear_error(&self) -> Option<Errno> {
        let mut error: c_int = 0;
        get(self.socket.as_fd(), libc::SOL_SOCKET, libc::SO_ERROR, &mut error).ok()?;
        (error != 0).then(|| Errno::from_raw(error))
    }
}

/// Has a socket take the frames a filter claims, and no others.
///
/// # Errors
/// [`PacketError`].
pub(super) fn attach_filter(
    socket: BorrowedFd<'_>,
    filter: &UplinkFilter,
) -> Result<(), PacketError> {
    filter.attach(socket).map_err(|error| PacketError {
        step: "attach the socket filter",
        errno: error.raw_os_error().map_or(Errno::EINVAL, Errno::from_raw),
    })
}

fn refuse_all(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    // BPF_RET | BPF_K with a length of 0: refuse every frame.
    let mut refuse = libc::sock_filter { code: 0x06, jt: 0, jf: 0, k: 0 };
    let program = libc::sock_fprog { len: 1, filter: &raw mut refuse };
    set(socket, libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)
}

impl AsFd for Receiver {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Reads what the kernel counted on a [`Receiver`]'s socket.
#[derive(Debug)]
pub struct KernelCounter {
    socket: OwnedFd,
    sending: Weak<OwnedFd>,
}

impl KernelCounter {
    /// The socket itself, to be handed over.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The device's sending socket, as long as that is open.
    pub fn sending(&self) -> Option<Arc<OwnedFd>> {
        self.sending.upgrade()
    }

    /// What was counted since the last call: the kernel resets on reading.
    pub fn take(&self) -> KernelCount {
        let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        match get(self.socket(), libc::SOL_PACKET, libc::PACKET_STATISTICS, &mut stats) {
            Ok(()) => {
                KernelCount { frames: stats.tp_packets.into(), overruns: stats.tp_drops.into() }
            }
            Err(_) => KernelCount::default(),
        }
    }
}

/// The slot's frame in place; `None` if the kernel's offsets make no sense.
#[inline]
fn in_slot<'a>(
    header: &libc::tpacket2_hdr,
    bytes: &'a mut [u8],
) -> Option<(FrameBuffer<'a>, VnetHeader)> {
    let start = usize::from(header.tp_mac).checked_sub(SLOT_HEADER_LEN)?;
    let end = start.checked_add(header.tp_snaplen as usize)?;
    let bytes = bytes.get_mut(..end)?;
    let vnet =
        VnetHeader::from_bytes(bytes.get(start.checked_sub(VNET_HEADER_LEN)?..)?.first_chunk()?);
    Some((FrameBuffer::new(bytes, start)?, vnet))
}

/// Reads the super-frame a slot announced; the slot holds its first bytes.
///
/// Slots and queue must stay in step, or a frame would get another one's tag, and go to
/// another guest. A device that went down leaves an error that is answered before the
/// queue is looked at (`__skb_try_recv_datagram`); reading it takes it away, so the next
/// try gets the frame. A frame that differs from what the slot has of it is that of an
/// earlier slot, which was given up: it goes, and the next is looked at.
fn receive_copy<'a>(
    socket: &OwnedFd,
    header: &libc::tpacket2_hdr,
    slot: &[u8],
    copy: &'a mut [u8],
) -> Option<(FrameBuffer<'a>, VnetHeader)> {
    let start = usize::from(header.tp_mac).checked_sub(SLOT_HEADER_LEN)?;
    let head = slot.get(start..)?.get(..COPY_HEAD_LEN.min(header.tp_snaplen as usize))?;
    let length = VNET_HEADER_LEN + header.tp_len as usize;
    let place = copy.get_mut(COPY_START - VNET_HEADER_LEN..)?;
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
    let mut tries = 0..COPY_TRIES;
    loop {
        tries.next()?;
        match recv(socket.as_raw_fd(), place, flags) {
            // MSG_TRUNC tells the whole length: a frame longer than the buffer is lost.
            Ok(read) if read == length && place.get(VNET_HEADER_LEN..)?.starts_with(head) => break,
            Err(Errno::EAGAIN) => return None,
            _ => {}
        }
    }
    let vnet = VnetHeader::from_bytes(place.get(..length)?.first_chunk()?);
    let bytes = copy.get_mut(..COPY_START - VNET_HEADER_LEN + length)?;
    Some((FrameBuffer::new(bytes, COPY_START)?, vnet))
}

#[inline]
fn stripped(header: &libc::tpacket2_hdr, status: u32) -> Option<Tag> {
    if status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    let tpid = if status & libc::TP_STATUS_VLAN_TPID_VALID != 0 {
        Tpid::from_ethertype(header.tp_vlan_tpid)?
    } else {
        Tpid::Customer
    };
    Some(Tag { tpid, tci: Tci(header.tp_vlan_tci) })
}

/// The mapped ring.
#[derive(Debug)]
struct Ring {
    base: NonNull<u8>,
    slots: usize,
}

// SAFETY: the mapping belongs to this value alone and is process-wide; all access
// to it follows the ownership the status words give, wherever the value is.
unsafe impl Send for Ring {}

impl Ring {
    const BLOCK_LEN: usize = 64 * SLOT_LEN;

    fn new(socket: BorrowedFd<'_>, slots: usize) -> Result<Self, PacketError> {
        let request = libc::tpacket_req {
            tp_block_size: Self::BLOCK_LEN as u32,
            tp_block_nr: (slots * SLOT_LEN / Self::BLOCK_LEN) as u32,
            tp_frame_size: SLOT_LEN as u32,
            tp_frame_nr: slots as u32,
        };
        set(socket, libc::SOL_PACKET, libc::PACKET_RX_RING, &request)
            .map_err(at("allocate the receive ring"))?;
        Self::map(socket, slots)
    }

    /// Maps the ring of a socket that has one of this many slots.
    fn map(socket: BorrowedFd<'_>, slots: usize) -> Result<Self, PacketError> {
        // SAFETY: a new mapping at an address the kernel chooses; the kernel refuses a
        // length that is not that of the socket's ring (`packet_mmap`).
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                slots * SLOT_LEN,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                socket.as_raw_fd(),
                0,
            )
        };
        match NonNull::new(base.cast::<u8>()) {
            Some(start) if base != libc::MAP_FAILED => Ok(Self { base: start, slots }),
            _ => Err(at("map the receive ring")(Errno::last())),
        }
    }

    #[inline]
    fn at(&self, slot: usize) -> NonNull<u8> {
        debug_assert!(slot < self.slots);
        // SAFETY: `slot < slots`, so the offset is inside the mapping. Blocks hold
        // a whole number of slots, hence slots lie one after the other.
        unsafe { self.base.add(slot * SLOT_LEN) }
    }

    #[inline]
    fn status(&self, slot: usize) -> &AtomicU32 {
        // SAFETY: the status word is the slot's first four bytes, aligned (slots
        // are 2048 bytes from a page boundary), alive as long as the mapping, and
        // accessed by both sides as a whole word only.
        unsafe { AtomicU32::from_ptr(self.at(slot).as_ptr().cast()) }
    }

    /// The slot's header, and its bytes behind the header.
    ///
    /// # Safety
    /// The slot's status must have shown `TP_STATUS_USER` by an acquire load, and
    /// no other reference to its bytes may exist until it is released.
    #[inline]
    unsafe fn slot<'a>(&self, slot: usize) -> (libc::tpacket2_hdr, &'a mut [u8]) {
        let start = self.at(slot);
        // SAFETY: the caller's promise makes the slot ours; header and bytes lie
        // within it and do not overlap.
        unsafe {
            let header = start.cast::<libc::tpacket2_hdr>().read();
            let bytes = start.add(SLOT_HEADER_LEN);
            (header, std::slice::from_raw_parts_mut(bytes.as_ptr(), SLOT_LEN - SLOT_HEADER_LEN))
        }
    }

    #[inline]
    fn prefetch(&self, slot: usize) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint; the address is inside the mapping.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            let start = self.at(slot).as_ptr().cast::<i8>();
            _mm_prefetch::<_MM_HINT_T0>(start);
            _mm_prefetch::<_MM_HINT_T0>(start.add(64));
        }
        #[cfg(not(target_arch = "x86_64"))]
        let _ = slot;
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`, unmapped once; frames borrow the
        // receiver, so none is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.slots * SLOT_LEN) };
    }
}

/// `PACKET_IGNORE_OUTGOING` (`include/uapi/linux/if_packet.h`, since 4.20).
const PACKET_IGNORE_OUTGOING: c_int = 23;

pub(super) fn socket() -> Result<OwnedFd, PacketError> {
    // SAFETY: no memory is passed; a non-negative result is a new descriptor that
    // nobody else owns.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0);
        if fd < 0 {
            return Err(at("open a packet socket")(Errno::last()));
        }
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

pub(super) fn bind(socket: BorrowedFd<'_>, index: u32, protocol: u16) -> Result<(), Errno> {
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: index as c_int,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address is valid for the length given.
    let result = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as socklen_t,
        )
    };
    Errno::result(result).map(drop)
}

/// The index of the device a packet socket is bound to; -1 when that is gone.
fn bound_to(socket: BorrowedFd<'_>) -> Result<c_int, Errno> {
    // SAFETY: all-zero is a valid `sockaddr_ll`, which has integers only.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    let mut length = size_of_val(&address) as socklen_t;
    // SAFETY: the address is valid for writes of the length given; the kernel writes no more,
    // and whatever it writes is a valid value.
    let result = unsafe {
        libc::getsockname(socket.as_raw_fd(), (&raw mut address).cast(), &raw mut length)
    };
    Errno::result(result)?;
    if address.sll_family == libc::AF_PACKET as u16 {
        Ok(address.sll_ifindex)
    } else {
        Err(Errno::ENOTSOCK)
    }
}

pub(super) fn set<T>(
    socket: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    value: &T,
) -> Result<(), Errno> {
    // SAFETY: the value is valid for its length; every caller passes the plain
    // struct or int the option takes.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            std::ptr::from_ref(value).cast::<c_void>(),
            size_of::<T>() as socklen_t,
        )
    };
    Errno::result(result).map(drop)
}

pub(super) fn get<T>(
    socket: BorrowedFd<'_>,
    level: c_int,
    name: c_int,
    value: &mut T,
) -> Result<(), Errno> {
    let mut length = size_of::<T>() as socklen_t;
    // SAFETY: the value is valid for writes of its length, and any bytes make a
    // valid value of the plain types callers pass.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            std::ptr::from_mut(value).cast::<c_void>(),
            &raw mut length,
        )
    };
    Errno::result(result).map(drop)
}
