//! Taps: making them as QEMU and libvirt expect them, and holding the fd of our own.
//!
//! A tap has two sides. The **netdev** is what the switch binds to; the **fd** is
//! what a VMM reads and writes. For a VM's tap we only make the netdev, persistent,
//! and close the fd at once: whoever opens the tap by name later gets it, which for
//! a tap without IFF_MULTI_QUEUE is one process at a time. For an `internal:` port
//! we keep the fd ([`open_queue`]) and the host uses the netdev.
//!
//! The flags of a persistent tap must agree with those of who opens it, or the
//! kernel answers with a bare EINVAL (`tun_set_iff`, drivers/net/tun.c). So taps
//! get what QEMU asks for: IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, and IFF_MULTI_QUEUE
//! exactly if it will open more than one queue.

#![allow(unsafe_code, reason = "the ioctls of /dev/net/tun have no wrapper in nix")]

use crate::sys::sandbox::Call;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::{fs, io};

/// Size of the virtio header before each frame of an fd from [`open_queue`], in
/// bytes: the form without `num_buffers`, which is that of AF_PACKET too.
pub const VNET_HEADER_LEN: usize = 10;

const DEVICE: &str = "/dev/net/tun";

/// The ioctls of include/uapi/linux/if_tun.h.
mod ioctl {
    nix::ioctl_write_ptr_bad!(tun_set_iff, libc::TUNSETIFF, libc::ifreq);
    nix::ioctl_read_bad!(tun_get_iff, libc::TUNGETIFF, libc::ifreq);
    nix::ioctl_write_int_bad!(tun_set_persist, libc::TUNSETPERSIST);
    nix::ioctl_write_int_bad!(tun_set_owner, libc::TUNSETOWNER);
    nix::ioctl_write_int_bad!(tun_set_group, libc::TUNSETGROUP);
    nix::ioctl_write_int_bad!(tun_set_offload, libc::TUNSETOFFLOAD);
    nix::ioctl_write_ptr_bad!(tun_set_vnet_header_size, libc::TUNSETVNETHDRSZ, libc::c_int);
    nix::ioctl_read_bad!(tun_get_vnet_header_size, libc::TUNGETVNETHDRSZ, libc::c_int);
    nix::ioctl_write_ptr_bad!(tun_set_send_buffer, libc::TUNSETSNDBUF, libc::c_int);
    nix::ioctl_read_bad!(tun_get_send_buffer, libc::TUNGETSNDBUF, libc::c_int);
}

/// What making and opening taps takes.
pub const CALLS: &[Call] = &[
    Call::any(libc::SYS_openat),
    Call::one_of(
        libc::SYS_ioctl,
        1,
        &[
            libc::TUNSETIFF as u32,
            libc::TUNGETIFF as u32,
            libc::TUNSETPERSIST as u32,
            libc::TUNSETOWNER as u32,
            libc::TUNSETGROUP as u32,
            libc::TUNSETOFFLOAD as u32,
            libc::TUNSETVNETHDRSZ as u32,
            libc::TUNGETVNETHDRSZ as u32,
            libc::TUNSETSNDBUF as u32,
            libc::TUNGETSNDBUF as u32,
        ],
    ),
];

/// How a tap is made or opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapOptions {
    /// Interface name, 1 to 15 bytes.
    pub name: String,
    /// User who may open the fd without CAP_NET_ADMIN.
    pub owner: Option<u32>,
    /// Group that may do so. With both set, a process needs to match both.
    pub group: Option<u32>,
    /// IFF_MULTI_QUEUE: several processes or queues may open it.
    pub multi_queue: bool,
    /// The tap outlives the fd. [`create`] makes it so whatever is said here.
    pub persistent: bool,
    /// IFF_VNET_HDR: a virtio header before each frame, so offloads work.
    pub vnet_header: bool,
}

impl TapOptions {
    /// One queue, offloads, anybody with CAP_NET_ADMIN, gone with its last fd.
    pub fn new(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            owner: None,
            group: None,
            multi_queue: false,
            persistent: false,
            vnet_header: true,
        }
    }

    fn flags(&self) -> libc::c_int {
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI;
        if self.multi_queue {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        if self.vnet_header {
            flags |= libc::IFF_VNET_HDR;
        }
        flags
    }
}

fn driver_cure(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EACCES | Errno::EPERM) => {
            "run as root, or let everybody open it: `chmod 666 /dev/net/tun`"
        }
        Some(Errno::EMFILE | Errno::ENFILE) => {
            "raise the limit of open files (ulimit -n, LimitNOFILE=)"
        }
        _ => "load the driver with `modprobe tun`",
    }
}

/// Why a tap cannot be had. The texts say what to do.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Not a name for a network interface.
    #[error("tap name {0:?}: use 1 to 15 bytes without '/', ':' or white space")]
    Name(String),
    /// The driver is missing, or not for this user to open.
    #[error("cannot open {DEVICE}: {0}; {cure}", cure = driver_cure(.0))]
    NoDriver(#[source] io::Error),
    /// [`create`] never changes an interface that is there.
    #[error("cannot create tap {0}: an interface of that name exists")]
    Exists(String),
    /// A tap with one queue is open elsewhere.
    #[error(
        "tap {0} is held by another process, a running VM perhaps: stop it, or find it with \
         `grep -l 'iff:.*{0}' /proc/*/fdinfo/*`"
    )]
    Busy(String),
    /// No capability and not the owner.
    #[error(
        "not permitted to open tap {0}: needs CAP_NET_ADMIN, or be its owner and group \
         (`ip -d tuntap show`)"
    )]
    NotPermitted(String),
    /// The number of queues is fixed when a tap is made.
    #[error(
        "tap {name} was made {}: set queues={} for it, or remove it with `ip link delete {name}` \
         and let it be made anew",
        if *multi_queue { "with multi_queue" } else { "without multi_queue" },
        if *multi_queue { "2 or more" } else { "1" }
    )]
    QueuesDisagree {
        /// The tap.
        name: String,
        /// How it was made.
        multi_queue: bool,
    },
    /// Something else has the name.
    #[error("interface {0} is not a tap: choose another name")]
    NotATap(String),
    /// The kernel took a setting and did not keep it.
    #[error("tap {name}: {what} is {got} after it was set to {wanted}")]
    NotKept {
        /// The tap.
        name: String,
        /// The setting.
        what: &'static str,
        /// What was asked for.
        wanted: i64,
        /// What reads back.
        got: i64,
    },
    /// Any other refusal.
    #[error("tap {name}: cannot {action}: {source}")]
    System {
        /// The tap.
        name: String,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// The fd side of a tap, for `internal:` ports.
#[derive(Debug)]
pub struct TapQueue {
    /// Non-blocking; one frame per read or write, after a header of
    /// [`VNET_HEADER_LEN`] bytes if it was opened with one.
    pub fd: OwnedFd,
    /// UDP segmentation (gso_type 5) is on towards the fd: Linux 6.2.
    pub udp_segmentation: bool,
}

/// A tap's settings, from sysfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TapSettings {
    /// IFF_MULTI_QUEUE.
    pub multi_queue: bool,
    /// IFF_VNET_HDR; the last to open the tap decides.
    pub vnet_header: bool,
    /// IFF_PERSIST.
    pub persistent: bool,
    /// IFF_TAP and not IFF_TUN: frames, not IP packets.
    pub ethernet: bool,
    /// Who may open it.
    pub owner: Option<u32>,
    /// Which group may open it.
    pub group: Option<u32>,
}

/// Makes a persistent tap, down and without a process on its fd.
///
/// # Errors
/// [`TapError::Exists`] if anything has the name; nothing is left behind then or
/// on any other error.
pub fn create(options: &TapOptions) -> Result<(), TapError> {
    let (fd, name) = (open_driver()?, options.name.as_str());
    set_interface(fd.as_fd(), name, options.flags() | libc::IFF_TUN_EXCL).map_err(|errno| {
        match errno {
            Errno::EBUSY => TapError::Exists(name.to_owned()),
            Errno::EPERM => TapError::NotPermitted(name.to_owned()),
            other => system(name, "create it")(other),
        }
    })?;
    // Persistent last: until then the tap goes away with the fd.
    set_access(fd.as_fd(), options)?;
    persist(fd.as_fd(), name, true)?;
    check_flags(fd.as_fd(), name, options.flags() | libc::IFF_PERSIST)
}

/// Opens a queue of a tap, making the tap if it is not there.
///
/// With `vnet_header`, checksum offload and TCP segmentation (IPv4, IPv6, ECN) are
/// on towards the fd, and UDP segmentation where the kernel has it.
///
/// # Errors
/// [`TapError::Busy`], [`TapError::NotPermitted`], [`TapError::QueuesDisagree`], ...
pub fn open_queue(options: &TapOptions) -> Result<TapQueue, TapError> {
    let (fd, name) = (open_driver()?, options.name.as_str());
    attach(fd.as_fd(), name, options.flags())?;
    set_access(fd.as_fd(), options)?;
    let udp_segmentation = options.vnet_header && set_offloads(fd.as_fd(), name)?;
    // The default would make a write wait for what the host has not read yet.
    set_send_buffer(fd.as_fd(), name, libc::c_int::MAX)?;
    if options.persistent {
        persist(fd.as_fd(), name, true)?;
    }
    let kept = if options.persistent { libc::IFF_PERSIST } else { 0 };
    check_flags(fd.as_fd(), name, options.flags() | kept)?;
    Ok(TapQueue { fd, udp_segmentation })
}

/// Removes a persistent tap: now, or when the last process closes its fd.
///
/// # Errors
/// [`TapError::Busy`] if its one queue is open elsewhere.
pub fn delete(name: &str) -> Result<(), TapError> {
    check_name(name)?;
    // Opening would make a tap that is not there.
    if nix::net::if_::if_nametoindex(name).is_err() {
        return Err(system(name, "delete it")(Errno::ENODEV));
    }
    let fd = open_driver()?;
    let mut options = TapOptions::new(name);
    match attach(fd.as_fd(), name, options.flags()) {
        Err(TapError::QueuesDisagree { .. }) => {
            options.multi_queue = true;
            attach(fd.as_fd(), name, options.flags())?;
        }
        other => other?,
    }
    persist(fd.as_fd(), name, false)
}

/// The settings of interface `name`, `None` if it is not a tun or tap device (or
/// not there). Reads /sys, which must be that of this network namespace.
///
/// # Errors
/// The kernel's text cannot be read.
pub fn settings(name: &str) -> Result<Option<TapSettings>, TapError> {
    check_name(name)?;
    let failed = |source| TapError::System {
        name: name.to_owned(),
        action: "read its settings from /sys",
        source,
    };
    let read = |file: &str| match fs::read_to_string(format!("/sys/class/net/{name}/{file}")) {
        Ok(text) => Ok(Some(text)),
        // EINVAL: the device went between opening and reading.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.kind() == io::ErrorKind::InvalidInput =>
        {
            Ok(None)
        }
        Err(error) => Err(failed(error)),
    };
    let (Some(flags), Some(owner), Some(group)) =
        (read("tun_flags")?, read("owner")?, read("group")?)
    else {
        return Ok(None);
    };
    let malformed = |_| failed(io::ErrorKind::InvalidData.into());
    let flags = parse_flags(&flags).map_err(malformed)?;
    let has = |flag: libc::c_int| flags & flag == flag;
    Ok(Some(TapSettings {
        multi_queue: has(libc::IFF_MULTI_QUEUE),
        vnet_header: has(libc::IFF_VNET_HDR),
        persistent: has(libc::IFF_PERSIST),
        ethernet: has(libc::IFF_TAP),
        owner: parse_id(&owner).map_err(malformed)?,
        group: parse_id(&group).map_err(malformed)?,
    }))
}

/// `0x5902`, as `tun_flags` reads.
fn parse_flags(text: &str) -> Result<libc::c_int, std::num::ParseIntError> {
    let text = text.trim();
    libc::c_int::from_str_radix(text.strip_prefix("0x").unwrap_or(text), 16)
}

/// A user or group number; -1 stands for none.
fn parse_id(text: &str) -> Result<Option<u32>, std::num::ParseIntError> {
    let number: i64 = text.trim().parse()?;
    Ok(u32::try_from(number).ok())
}

fn check_name(name: &str) -> Result<(), TapError> {
    // dev_valid_name, net/core/dev.c. '%' would be a pattern to number taps by.
    let illegal = |byte: u8| matches!(byte, 0 | b'/' | b':' | b'%') || byte.is_ascii_whitespace();
    if name.is_empty()
        || name.len() >= libc::IFNAMSIZ
        || name == "."
        || name == ".."
        || name.bytes().any(illegal)
    {
        return Err(TapError::Name(name.to_owned()));
    }
    Ok(())
}

fn system(name: &str, action: &'static str) -> impl FnOnce(Errno) -> TapError {
    let name = name.to_owned();
    move |errno| TapError::System { name, action, source: errno.into() }
}

/// Whether this user may open the driver.
///
/// # Errors
/// [`TapError::NoDriver`].
pub fn check_driver() -> Result<(), TapError> {
    open_driver().map(drop)
}

fn open_driver() -> Result<OwnedFd, TapError> {
    let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    open(DEVICE, flags, Mode::empty()).map_err(|errno| TapError::NoDriver(errno.into()))
}

/// An ifreq with a name and flags.
fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: ifreq is plain bytes and numbers, for which zeros are valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

fn set_interface(fd: BorrowedFd<'_>, name: &str, flags: libc::c_int) -> Result<(), Errno> {
    check_name(name).map_err(|_| Errno::EINVAL)?;
    let request = request(name, flags);
    // SAFETY: TUNSETIFF reads and writes one ifreq (writing only the name back).
    unsafe { ioctl::tun_set_iff(fd.as_raw_fd(), &request) }.map(drop)
}

/// TUNSETIFF on a tap that may be there already.
fn attach(fd: BorrowedFd<'_>, name: &str, flags: libc::c_int) -> Result<(), TapError> {
    check_name(name)?;
    set_interface(fd, name, flags).map_err(|errno| match errno {
        Errno::EBUSY => TapError::Busy(name.to_owned()),
        Errno::EPERM => TapError::NotPermitted(name.to_owned()),
        Errno::EINVAL => match settings(name) {
            Ok(Some(TapSettings { ethernet: true, multi_queue, .. }))
                if multi_queue != (flags & libc::IFF_MULTI_QUEUE != 0) =>
            {
                TapError::QueuesDisagree { name: name.to_owned(), multi_queue }
            }
            Ok(Some(TapSettings { ethernet: true, .. })) | Err(_) => system(name, "open it")(errno),
            Ok(_) => TapError::NotATap(name.to_owned()),
        },
        other => system(name, "open it")(other),
    })
}

fn set_access(fd: BorrowedFd<'_>, options: &TapOptions) -> Result<(), TapError> {
    if let Some(owner) = options.owner {
        // SAFETY: TUNSETOWNER takes a number.
        unsafe { ioctl::tun_set_owner(fd.as_raw_fd(), owner as libc::c_int) }
            .map_err(system(&options.name, "set its owner"))?;
    }
    if let Some(group) = options.group {
        // SAFETY: TUNSETGROUP takes a number.
        unsafe { ioctl::tun_set_group(fd.as_raw_fd(), group as libc::c_int) }
            .map_err(system(&options.name, "set its group"))?;
    }
    Ok(())
}

fn persist(fd: BorrowedFd<'_>, name: &str, on: bool) -> Result<(), TapError> {
    // SAFETY: TUNSETPERSIST takes a number.
    unsafe { ioctl::tun_set_persist(fd.as_raw_fd(), libc::c_int::from(on)) }
        .map(drop)
        .map_err(system(name, "make it persistent or not"))
}

/// The tap has exactly the flags it was given.
fn check_flags(fd: BorrowedFd<'_>, name: &str, wanted: libc::c_int) -> Result<(), TapError> {
    let mut answer = request("", 0);
    // SAFETY: TUNGETIFF writes one ifreq.
    unsafe { ioctl::tun_get_iff(fd.as_raw_fd(), &mut answer) }
        .map_err(system(name, "read its flags"))?;
    // SAFETY: the kernel filled in the flags, and any bits are a valid number.
    let got = libc::c_int::from(unsafe { answer.ifr_ifru.ifru_flags });
    // An owner who is not privileged may open a tap somebody made persistent before.
    let mask = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE | libc::IFF_VNET_HDR;
    let mask = mask | (wanted & libc::IFF_PERSIST);
    if got & mask == wanted {
        return Ok(());
    }
    let (wanted, got) = (wanted.into(), (got & mask).into());
    Err(TapError::NotKept { name: name.to_owned(), what: "its flags", wanted, got })
}

/// Turns offloads towards the fd on; true if UDP segmentation is among them.
fn set_offloads(fd: BorrowedFd<'_>, name: &str) -> Result<bool, TapError> {
    let (wanted, mut got) = (VNET_HEADER_LEN as libc::c_int, 0);
    // SAFETY: TUNSETVNETHDRSZ reads one int.
    unsafe { ioctl::tun_set_vnet_header_size(fd.as_raw_fd(), &wanted) }
        .map_err(system(name, "set its virtio header's size"))?;
    // SAFETY: TUNGETVNETHDRSZ writes one int.
    unsafe { ioctl::tun_get_vnet_header_size(fd.as_raw_fd(), &mut got) }
        .map_err(system(name, "read its virtio header's size"))?;
    kept(name, "its virtio header's size", wanted, got)?;

    let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
    let udp = libc::TUN_F_USO4 | libc::TUN_F_USO6;
    // SAFETY: TUNSETOFFLOAD takes a number.
    let set = |offloads: libc::c_uint| unsafe {
        ioctl::tun_set_offload(fd.as_raw_fd(), offloads as libc::c_int)
    };
    match set(tcp | udp) {
        Ok(_) => Ok(true),
        // Linux before 6.2 refuses bits it does not know.
        Err(Errno::EINVAL) => set(tcp).map(|_| false).map_err(system(name, "turn its offloads on")),
        Err(errno) => Err(system(name, "turn its offloads on")(errno)),
    }
}

fn set_send_buffer(fd: BorrowedFd<'_>, name: &str, wanted: libc::c_int) -> Result<(), TapError> {
    // SAFETY: TUNSETSNDBUF reads one int.
    unsafe { ioctl::tun_set_send_buffer(fd.as_raw_fd(), &wanted) }
        .map_err(system(name, "set its send buffer"))?;
    let mut got = 0;
    // SAFETY: TUNGETSNDBUF writes one int.
    unsafe { ioctl::tun_get_send_buffer(fd.as_raw_fd(), &mut got) }
        .map_err(system(name, "read its send buffer"))?;
    kept(name, "its send buffer in bytes", wanted, got)
}

fn kept(
    name: &str,
    what: &'static str,
    wanted: libc::c_int,
    got: libc::c_int,
) -> Result<(), TapError> {
    if wanted == got {
        return Ok(());
    }
    let (wanted, got) = (wanted.into(), got.into());
    Err(TapError::NotKept { name: name.to_owned(), what, wanted, got })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn a_driver_that_cannot_be_opened_comes_with_the_right_cure() {
        let says = |errno: i32, cure: &str| {
            let error = TapError::NoDriver(io::Error::from_raw_os_error(errno)).to_string();
            assert!(error.contains("/dev/net/tun") && error.ends_with(cure), "{error}");
        };
        says(libc::ENOENT, "`modprobe tun`");
        says(libc::ENODEV, "`modprobe tun`");
        says(libc::EACCES, "`chmod 666 /dev/net/tun`");
    }

    #[test]
    fn names_are_checked_before_the_kernel_sees_them() {
        for good in ["t", "tap-web1", "fifteen-letters", "a.b_c"] {
            check_name(good).unwrap();
        }
        for bad in ["", ".", "..", "sixteen--letters", "a b", "a/b", "a:b", "tap%d", "a\0b"] {
            assert!(matches!(check_name(bad), Err(TapError::Name(name)) if name == bad));
        }
    }

    #[test]
    fn texts_of_sysfs_are_read() {
        // What `tun_flags`, `owner` and `group` hold for a tap of libvirt's.
        assert_eq!(parse_flags("0x5902\n").unwrap(), 0x5902);
        assert!(parse_flags("none").is_err());
        assert_eq!(parse_id("-1\n").unwrap(), None);
        assert_eq!(parse_id("64055\n").unwrap(), Some(64055));
        assert_eq!(parse_id("4294967295\n").unwrap(), Some(u32::MAX));
        assert!(parse_id("root").is_err());
    }

    #[test]
    fn flags_are_what_qemu_asks_for() {
        // net/tap-linux.c: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR, IFF_MULTI_QUEUE if queues > 1.
        assert_eq!(TapOptions::new("t").flags(), 0x5002);
        let options = TapOptions { multi_queue: true, ..TapOptions::new("t") };
        assert_eq!(options.flags(), 0x5102);
        let options = TapOptions { vnet_header: false, ..TapOptions::new("t") };
        assert_eq!(options.flags(), 0x1002);
    }

    #[test]
    fn errors_name_the_cure() {
        let text = TapError::QueuesDisagree { name: "t0".into(), multi_queue: false }.to_string();
        assert!(text.contains("without multi_queue") && text.contains("queues=1"), "{text}");
        let text = TapError::QueuesDisagree { name: "t0".into(), multi_queue: true }.to_string();
        assert!(text.contains("with multi_queue") && text.contains("2 or more"), "{text}");
        assert!(TapError::Busy("t0".into()).to_string().contains("/proc/*/fdinfo"));
        assert!(TapError::NotPermitted("t0".into()).to_string().contains("CAP_NET_ADMIN"));
    }
}
