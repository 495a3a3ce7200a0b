//! Attaching XDP programs, by links: they go with the last descriptor or pin of their link.

#![allow(unsafe_code, reason = "bpf(2) takes addresses")]

use super::path_maps::{open, pin};
use super::syscall::{
    BpfError, InfoByFd, LINK_CREATE, LINK_UPDATE, LinkCreate, LinkInfo, LinkUpdate,
    OBJ_GET_INFO_BY_FD, bpf, bpf_open,
};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

/// Where an XDP program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XdpMode {
    /// In the driver, before a socket buffer is made.
    Native,
    /// In the stack: works with every driver.
    Generic,
}

/// BPF_XDP of `enum bpf_attach_type`.
const ATTACH_XDP: u32 = 37;

/// Attaches `program` to interface `device` until the returned link is closed.
///
/// # Errors
/// EBUSY if an XDP program is there already; EOPNOTSUPP if the driver has no native
/// mode; EINVAL before Linux 5.9, which has no XDP links.
pub fn attach_xdp(
    program: BorrowedFd<'_>,
    device: u32,
    mode: XdpMode,
) -> Result<OwnedFd, BpfError> {
    // XDP_FLAGS_*, include/uapi/linux/if_link.h.
    let flags = match mode {
        XdpMode::Generic => 1 << 1,
        XdpMode::Native => 1 << 2,
    };
    let mut attributes = LinkCreate {
        prog_fd: program.as_raw_fd() as u32,
        target_ifindex: device,
        attach_type: ATTACH_XDP,
        flags,
    };
    // SAFETY: the attributes hold no address, and the command opens an fd.
    unsafe { bpf_open(&LINK_CREATE, &mut attributes) }
        .map_err(|error| BpfError::from_io(format!("attach XDP to interface {device}"), error))
}

/// BPF_LINK_TYPE_XDP of `enum bpf_link_type`.
const LINK_TYPE_XDP: u32 = 6;

/// A program at a device's XDP hook that outlives us if there is a place for a pin.
#[derive(Debug)]
pub struct PinnedXdp {
    link: OwnedFd,
    place: Option<PathBuf>,
}

impl PinnedXdp {
    /// Attaches `program` to interface `device`, in the driver, and pins that.
    ///
    /// # Errors
    /// As for [`attach_xdp`], and that there is something in that place.
    pub fn attach(
        program: BorrowedFd<'_>,
        device: u32,
        place: Option<&Path>,
    ) -> Result<Self, BpfError> {
        let link = attach_xdp(program, device, XdpMode::Native)?;
        if let Some(place) = place {
            pin(link.as_fd(), place)?;
        }
        Ok(Self { link, place: place.map(Path::to_owned) })
    }

    /// What an earlier run has pinned here, if anything.
    ///
    /// # Errors
    /// The pin is not ours to open.
    pub fn adopt(place: &Path) -> Result<Option<Self>, BpfError> {
        let link = open(place)?;
        Ok(link.map(|link| Self { link, place: Some(place.to_owned()) }))
    }

    /// The interface it is at; `None` if that is gone.
    pub fn device(&self) -> Option<u32> {
        let mut info = LinkInfo::default();
        let mut attributes = InfoByFd {
            bpf_fd: self.link.as_raw_fd() as u32,
            info_len: size_of::<LinkInfo>() as u32,
            info: &raw mut info as u64,
        };
        // SAFETY: `info` has `info_len` writable bytes and lives on; its fields are plain
        // numbers, and without a name's address and length no name is written.
        let known = unsafe { bpf(&OBJ_GET_INFO_BY_FD, &mut attributes) };
        let here = known.is_ok() && info.link_type == LINK_TYPE_XDP && info.ifindex != 0;
        here.then_some(info.ifindex)
    }

    /// Puts `program` in the place of the one that is there, in one step.
    ///
    /// # Errors
    /// The device is gone.
    pub fn replace(&self, program: BorrowedFd<'_>) -> Result<(), BpfError> {
        let mut attributes = LinkUpdate {
            link_fd: self.link.as_raw_fd() as u32,
            new_prog_fd: program.as_raw_fd() as u32,
            ..LinkUpdate::default()
        };
        // SAFETY: the attributes hold no address.
        unsafe { bpf(&LINK_UPDATE, &mut attributes) }
            .map(drop)
            .map_err(|error| BpfError::from_io("replace an XDP program", error))
    }

    /// Detaches the program.
    pub fn detach(self) {
        if let Some(place) = &self.place {
            // Somebody may have removed it; the link is closed with this.
            let _ = std::fs::remove_file(place);
        }
    }
}
