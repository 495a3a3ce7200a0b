//! The kernel interfaces the lab needs and no safe crate covers: packet sockets
//! with their options, taps with a virtio header, a receive ring. All unsafe code
//! of the tests is here; it shares nothing with the product's, so that a mistake
//! in one does not hide in the other.

#![allow(unsafe_code, reason = "setsockopt, ioctl, recvmsg and mmap with kernel structures")]

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, socket,
};
use std::fs::File;
use std::io::{self, IoSliceMut, Read, Write};
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::process::Command;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;

/// What a guest with a virtio NIC offers: checksums, TCP over IPv4 and IPv6.
pub const OFFLOAD_TCP: u32 = 0x01 | 0x02 | 0x04 | 0x08;
/// UDP segmentation besides (TUN_F_USO4, TUN_F_USO6).
pub const OFFLOAD_USO: u32 = 0x20 | 0x40;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Index of a device in the caller's namespace.
pub fn index_of(device: &str) -> i32 {
    nix::net::if_::if_nametoindex(device).unwrap_or_else(|error| panic!("{device}: {error}")) as i32
}

/// A packet socket (SOCK_RAW), not bound yet.
pub struct PacketSocket {
    fd: OwnedFd,
}

/// A message read from a packet socket.
pub struct Message {
    /// The bytes, with the virtio header in front if that is switched on.
    pub bytes: Vec<u8>,
    /// The tag the kernel stripped: TPID and TCI.
    pub stripped: Option<(u16, u16)>,
    /// PACKET_HOST, PACKET_OUTGOING, ...
    pub packet_type: u8,
}

impl PacketSocket {
    /// A socket in the caller's namespace.
    pub fn new() -> Self {
        let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None);
        Self { fd: fd.expect("a packet socket (is this root?)") }
    }

    /// Sets an option of SOL_PACKET.
    pub fn set<T: Copy>(&self, option: libc::c_int, value: T) -> io::Result<()> {
        self.set_at(libc::SOL_PACKET, option, value)
    }

    /// Sets an option of any level.
    pub fn set_at<T: Copy>(&self, level: i32, option: i32, value: T) -> io::Result<()> {
        // SAFETY: the pointer and length describe `value`, which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                option,
                (&raw const value).cast(),
                mem::size_of::<T>() as libc::socklen_t,
            )
        };
        check(result).map(drop)
    }

    /// Reads an option of SOL_PACKET made of integers only.
    pub fn get<const WORDS: usize>(&self, option: libc::c_int) -> io::Result<[u32; WORDS]> {
        let mut value = [0u32; WORDS];
        let mut length = mem::size_of_val(&value) as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes into `value`.
        let result = unsafe {
            libc::getsockopt(
                self.fd.as_raw_fd(),
                libc::SOL_PACKET,
                option,
                (&raw mut value).cast(),
                &raw mut length,
            )
        };
        check(result).map(|_| value)
    }

    /// Binds to a device. Protocol 0 receives nothing, ETH_P_ALL everything.
    pub fn bind(&self, index: i32, protocol: u16) -> io::Result<()> {
        // SAFETY: sockaddr_ll is plain integers; all zero is a valid value.
        let mut address: libc::sockaddr_ll = unsafe { mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol.to_be();
        address.sll_ifindex = index;
        // SAFETY: the pointer and length describe `address`, which outlives the call.
        let result = unsafe {
            libc::bind(
                self.fd.as_raw_fd(),
                (&raw const address).cast(),
                mem::size_of_val(&address) as libc::socklen_t,
            )
        };
        check(result).map(drop)
    }

    /// Receives whatever is addressed to anybody.
    pub fn promiscuous(&self, index: i32) -> io::Result<()> {
        let request = libc::packet_mreq {
            mr_ifindex: index,
            mr_type: libc::PACKET_MR_PROMISC as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        self.set(libc::PACKET_ADD_MEMBERSHIP, request)
    }

    /// Sends one frame (with its virtio header in front if that is switched on)
    /// without waiting.
    pub fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        // SAFETY: the pointer and length describe `bytes`.
        let sent = unsafe {
            libc::send(self.fd.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT)
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(sent as usize) }
    }

    /// Receives one message, or `None` if none waits.
    pub fn receive(&self) -> io::Result<Option<Message>> {
        let mut bytes = vec![0u8; 70_000];
        let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let mut control = MaybeUninit::<[u64; 16]>::zeroed();
        let mut address = MaybeUninit::<libc::sockaddr_ll>::zeroed();
        // SAFETY: msghdr is pointers and integers; all zero is a valid value.
        let mut message: libc::msghdr = unsafe { mem::zeroed() };
        message.msg_name = address.as_mut_ptr().cast();
        message.msg_namelen = mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = mem::size_of_val(&control);
        // SAFETY: every pointer in `message` names a live buffer of the length beside it.
        let length =
            unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
        if length < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
        }
        bytes.truncate(length as usize);
        let mut stripped = None;
        // SAFETY: the kernel filled `control` up to msg_controllen; CMSG_FIRSTHDR checks it.
        let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        while !header.is_null() {
            // SAFETY: `header` is non-null and inside `control` (CMSG_FIRSTHDR, CMSG_NXTHDR).
            let kind = unsafe { ((*header).cmsg_level, (*header).cmsg_type) };
            if kind == (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
                // SAFETY: a PACKET_AUXDATA message carries a whole tpacket_auxdata, unaligned.
                let data = unsafe {
                    libc::CMSG_DATA(header).cast::<libc::tpacket_auxdata>().read_unaligned()
                };
                if data.tp_status & libc::TP_STATUS_VLAN_VALID != 0 {
                    stripped = Some((data.tp_vlan_tpid, data.tp_vlan_tci));
                }
            }
            // SAFETY: `header` came from CMSG_FIRSTHDR or CMSG_NXTHDR of this message.
            header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
        }
        // SAFETY: zeroed before the call, so initialised whatever the kernel wrote.
        let packet_type = unsafe { address.assume_init() }.sll_pkttype;
        Ok(Some(Message { bytes, stripped, packet_type }))
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens the fd side of a tap as QEMU does: a virtio header of ten bytes in front
/// of each frame, and these offloads offered by the guest. Makes the tap if it
/// does not exist.
pub fn open_tap(device: &str, flags: i32, offload: u32) -> io::Result<File> {
    let tap = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/dev/net/tun")?;
    // SAFETY: ifreq is plain bytes and integers; all zero is a valid value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    assert!(device.len() < request.ifr_name.len(), "{device} is too long");
    for (place, byte) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *place = byte as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | flags;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one ifreq, which `request` is.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw mut request) })?;
    set_offload(&tap, offload)?;
    Ok(tap)
}

/// Tells the kernel what the guest's NIC takes (TUNSETOFFLOAD).
pub fn set_offload(tap: impl AsFd, offload: u32) -> io::Result<()> {
    let tap = tap.as_fd().as_raw_fd();
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    let set = unsafe { libc::ioctl(tap, TUNSETOFFLOAD, libc::c_ulong::from(offload)) };
    check(set).map(drop)
}

/// Keeps the tap when its last fd is closed, or no longer.
pub fn set_persistent(tap: &File, on: bool) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes its argument by value.
    let set = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETPERSIST, libc::c_ulong::from(on)) };
    check(set).map(drop)
}

/// One frame with its virtio header from a tap, or `None` if none waits.
pub fn read_tap(mut tap: &File) -> io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; 70_000];
    match tap.read(&mut bytes) {
        Ok(length) => {
            bytes.truncate(length);
            Ok(Some(bytes))
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

/// Gives a frame with its virtio header to a tap: the guest sends it.
pub fn write_tap(mut tap: &File, header: &[u8; 10], frame: &[u8]) -> io::Result<()> {
    tap.write_all(&[header, frame].concat())
}

/// A TPACKET_V2 receive ring with virtio headers, for the kernel's own facts.
pub struct Ring {
    /// The socket it belongs to.
    pub socket: PacketSocket,
    memory: *mut u8,
    slot_size: usize,
    slots: usize,
    next: usize,
}

// SAFETY: the mapping belongs to this value alone and is not bound to a thread.
unsafe impl Send for Ring {}

/// A slot's contents and its header's fields.
pub struct Slot {
    /// `tp_status`.
    pub status: u32,
    /// `tp_len`, `tp_snaplen`, `tp_mac`.
    pub length: u32,
    /// Bytes of the frame in the slot.
    pub captured: u32,
    /// Where the frame starts in the slot.
    pub mac: u16,
    /// The stripped tag's TCI and TPID.
    pub tci: u16,
    /// The stripped tag's TPID.
    pub tpid: u16,
    /// The ten bytes in front of the frame.
    pub vnet: [u8; 10],
    /// The frame.
    pub frame: Vec<u8>,
}

impl Ring {
    /// A ring on `device` of the caller's namespace, bound.
    pub fn new(device: &str, slot_size: usize, slots: usize, copy_threshold: bool) -> Self {
        let socket = PacketSocket::new();
        socket.set(libc::PACKET_VERSION, 1i32).expect("TPACKET_V2");
        socket.set(libc::PACKET_VNET_HDR, 1i32).expect("PACKET_VNET_HDR");
        socket.set(libc::PACKET_IGNORE_OUTGOING, 1i32).expect("PACKET_IGNORE_OUTGOING");
        if copy_threshold {
            socket.set(libc::PACKET_COPY_THRESH, 1i32).expect("PACKET_COPY_THRESH");
            socket.set(libc::PACKET_AUXDATA, 1i32).expect("PACKET_AUXDATA");
            let room = 16i32 << 20;
            socket.set_at(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, room).expect("SO_RCVBUFFORCE");
        }
        let bytes = slot_size * slots;
        let request = libc::tpacket_req {
            tp_block_size: bytes as u32,
            tp_block_nr: 1,
            tp_frame_size: slot_size as u32,
            tp_frame_nr: slots as u32,
        };
        socket.set(libc::PACKET_RX_RING, request).expect("PACKET_RX_RING");
        // SAFETY: a fresh mapping of the ring's own size; unmapped in drop.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                socket.fd.as_raw_fd(),
                0,
            )
        };
        assert_ne!(memory, libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
        let index = index_of(device);
        socket.bind(index, libc::ETH_P_ALL as u16).expect("bind");
        Self { socket, memory: memory.cast(), slot_size, slots, next: 0 }
    }

    /// The next filled slot, which goes back to the kernel.
    pub fn take(&mut self) -> Option<Slot> {
        // SAFETY: `next` is below `slots`, so the slot lies inside the mapping.
        let slot = unsafe { self.memory.add(self.next * self.slot_size) };
        let status_word = slot.cast::<std::sync::atomic::AtomicU32>();
        // SAFETY: tp_status is the slot's first word, aligned to 16; the kernel writes it.
        let status = unsafe { (*status_word).load(std::sync::atomic::Ordering::Acquire) };
        if status & libc::TP_STATUS_USER == 0 {
            return None;
        }
        // SAFETY: the kernel handed the slot over (TP_STATUS_USER), so nobody writes it now.
        let header = unsafe { slot.cast::<libc::tpacket2_hdr>().read_volatile() };
        let (mac, captured) = (usize::from(header.tp_mac), header.tp_snaplen as usize);
        assert!(mac >= 10 && mac + captured <= self.slot_size, "{mac} + {captured}");
        let mut vnet = [0; 10];
        let mut frame = vec![0; captured];
        // SAFETY: checked above: both ranges lie inside the slot, which is ours.
        unsafe {
            std::ptr::copy_nonoverlapping(slot.add(mac - 10), vnet.as_mut_ptr(), 10);
            std::ptr::copy_nonoverlapping(slot.add(mac), frame.as_mut_ptr(), captured);
        }
        // SAFETY: as for the load above.
        unsafe { (*status_word).store(0, std::sync::atomic::Ordering::Release) };
        self.next = (self.next + 1) % self.slots;
        Some(Slot {
            status,
            length: header.tp_len,
            captured: header.tp_snaplen,
            mac: header.tp_mac,
            tci: header.tp_vlan_tci,
            tpid: header.tp_vlan_tpid,
            vnet,
            frame,
        })
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: `memory` is the whole mapping made in `new`, and no reference to it exists.
        unsafe { libc::munmap(self.memory.cast(), self.slot_size * self.slots) };
    }
}

/// A message to a service manager: its text, its descriptors, and who sent it.
pub fn receive_notification(socket: &UnixDatagram) -> io::Result<(String, Vec<OwnedFd>, i32)> {
    let mut bytes = [0; 4096];
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let mut space = nix::cmsg_space!([RawFd; 253], libc::ucred);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let (mut descriptors, mut sender) = (Vec::new(), 0);
    for control in message.cmsgs()? {
        match control {
            ControlMessageOwned::ScmRights(fds) => {
                // SAFETY: the kernel has just opened these for us; each is taken once.
                descriptors.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
            }
            ControlMessageOwned::ScmCredentials(credentials) => sender = credentials.pid(),
            _ => {}
        }
    }
    let length = message.bytes;
    Ok((String::from_utf8_lossy(&bytes[..length]).into_owned(), descriptors, sender))
}

/// Has a command start with these descriptors as 3, 4, ...
pub fn give_descriptors(command: &mut Command, descriptors: &[OwnedFd]) {
    // Copies out of the way of the numbers they are to have.
    let copy = |fd: &OwnedFd| {
        let high = nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(500);
        let fd = nix::fcntl::fcntl(fd, high).unwrap();
        // SAFETY: fcntl has just made it, and nobody else knows the number.
        unsafe { OwnedFd::from_raw_fd(fd) }
    };
    let copies: Vec<OwnedFd> = descriptors.iter().map(copy).collect();
    let body = move || {
        for (number, fd) in copies.iter().enumerate() {
            // SAFETY: only numbers; what has this one in the child is not used by it.
            check(unsafe { libc::dup2(fd.as_raw_fd(), 3 + number as i32) })?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec it calls dup2 only, which is async-signal-safe.
    unsafe { command.pre_exec(body) };
}

/// Has a program start in this network namespace, with its /sys in mounts of the program's
/// own, as `ip netns exec` does; and die with the thread that starts it.
pub fn start_inside(command: &mut Command, namespace: File) {
    let none = None::<&str>;
    let body = move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(none, "/", none, MsFlags::MS_SLAVE | MsFlags::MS_REC, none)?;
        // It may not be mounted.
        let _ = umount2("/sys", MntFlags::MNT_DETACH);
        mount(Some("vslab"), "/sys", Some("sysfs"), MsFlags::empty(), none)?;
        set_pdeathsig(Signal::SIGKILL)?;
        Ok(())
    };
    // SAFETY: between fork and exec it makes system calls only, with short strings that nix
    // copies to the stack: nothing that another thread could have locked.
    unsafe { command.pre_exec(body) };
}

/// A thread of another process, held where it is until this is dropped, by the same thread.
pub struct Held(i32);

impl Held {
    /// Holds a thread, by its id.
    pub fn hold(thread: i32) -> Self {
        trace(libc::PTRACE_SEIZE, thread).unwrap();
        let held = Self(thread);
        trace(libc::PTRACE_INTERRUPT, thread).unwrap();
        let mut status = 0;
        // SAFETY: the kernel writes an int to where `status` is.
        let waited = unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) };
        assert_eq!(waited, thread, "{}", io::Error::last_os_error());
        held
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = trace(libc::PTRACE_DETACH, self.0);
    }
}

fn trace(request: libc::c_uint, thread: i32) -> io::Result<()> {
    // SAFETY: these requests take no address.
    if unsafe { libc::ptrace(request, thread, 0, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
