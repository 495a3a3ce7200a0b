//! Device features (offloads, VLAN filtering) by SIOCETHTOOL.
//!
//! The kernel names its features (`netdev_features_strings`, net/ethtool/common.c)
//! and hands them over as bit sets in that order; `ethtool -k` shows some of them
//! under older names (`rx-vlan-offload` is `rx-vlan-hw-parse`). Features are asked
//! for, not set: a driver may refuse or tie one to another. So [`set`] reads back.

#![allow(unsafe_code, reason = "SIOCETHTOOL has no wrapper in nix")]

use crate::sys::sandbox::Call;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

mod ioctl {
    nix::ioctl_readwrite_bad!(ethtool, libc::SIOCETHTOOL, libc::ifreq);
}

// include/uapi/linux/ethtool.h.
const GSTRINGS: u32 = 0x1b;
const GSSET_INFO: u32 = 0x37;
const GFEATURES: u32 = 0x3a;
const SFEATURES: u32 = 0x3b;
const SS_FEATURES: u32 = 4;
/// ETH_GSTRING_LEN in 32-bit words.
const STRING_WORDS: usize = 8;

/// What asking for features takes.
pub const CALLS: &[Call] = &[
    Call::one_of(libc::SYS_socket, 0, &[libc::AF_UNIX.cast_unsigned()]),
    Call::one_of(libc::SYS_ioctl, 1, &[libc::SIOCETHTOOL as u32]),
];

/// Why features cannot be read or set.
#[derive(Debug, thiserror::Error)]
pub enum EthtoolError {
    /// Not the name of an interface here.
    #[error("no network interface {0:?}")]
    NoDevice(String),
    /// A capability is missing.
    #[error("not permitted to set {feature} of {device}: needs CAP_NET_ADMIN")]
    NotPermitted {
        /// The interface.
        device: String,
        /// The feature.
        feature: String,
    },
    /// The kernel does not have this feature by name.
    #[error("this kernel knows no feature {feature:?} (see `ethtool -k {device}`)")]
    UnknownFeature {
        /// The interface.
        device: String,
        /// The feature.
        feature: String,
    },
    /// The driver does not let it be switched.
    #[error("{device} keeps {feature} {}: its driver does not let it be switched", on_off(*active))]
    Fixed {
        /// The interface.
        device: String,
        /// The feature.
        feature: String,
        /// What it stays at.
        active: bool,
    },
    /// Any other refusal.
    #[error("cannot {action} of {device}: {source}")]
    System {
        /// The interface.
        device: String,
        /// What was tried.
        action: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

fn on_off(active: bool) -> &'static str {
    if active { "on" } else { "off" }
}

/// One feature of one device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeatureState {
    /// It is on.
    pub active: bool,
    /// It may be switched: not `[fixed]`.
    pub changeable: bool,
}

/// All features of a device at one moment.
#[derive(Debug, Clone)]
pub struct Features {
    states: Vec<(String, FeatureState)>,
}

impl Features {
    /// Reads the features of interface `device`.
    ///
    /// # Errors
    /// There is no such interface.
    pub fn read(device: &str) -> Result<Self, EthtoolError> {
        let door = Door::open(device)?;
        let names = door.feature_names()?;
        let blocks = door.feature_blocks(names.len().div_ceil(32))?;
        let named = names.into_iter().enumerate();
        Ok(Self { states: named.map(|(index, name)| (name, state(&blocks, index))).collect() })
    }

    /// The state of a feature by the kernel's name for it.
    pub fn state(&self, feature: &str) -> Option<FeatureState> {
        self.iter().find(|&(name, _)| name == feature).map(|(_, state)| state)
    }

    /// All features, in the kernel's order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, FeatureState)> {
        // Some bits have no name: they are the kernel's own.
        let named = self.states.iter().filter(|(name, _)| !name.is_empty());
        named.map(|(name, state)| (name.as_str(), *state))
    }
}

/// Switches a feature of interface `device`, by the kernel's name for it, and
/// checks that it is so. Nothing is sent if it is so already.
///
/// # Errors
/// [`EthtoolError::Fixed`] if the driver does not do it.
pub fn set(device: &str, feature: &str, on: bool) -> Result<(), EthtoolError> {
    let door = Door::open(device)?;
    let names = door.feature_names()?;
    let (device, feature) = (device.to_owned(), feature.to_owned());
    let Some(index) = names.iter().position(|name| *name == feature) else {
        return Err(EthtoolError::UnknownFeature { device, feature });
    };
    let count = names.len().div_ceil(32);
    let (block, bit) = (index / 32, 1_u32 << (index % 32));
    let state = || Ok(state(&door.feature_blocks(count)?, index));
    match state()? {
        FeatureState { active, .. } if active == on => return Ok(()),
        FeatureState { active, changeable: false } => {
            return Err(EthtoolError::Fixed { device, feature, active });
        }
        _ => {}
    }
    // struct ethtool_sfeatures: command, size, then (valid, requested) for each block.
    let pairs = (0..count).flat_map(|number| {
        let valid = if number == block { bit } else { 0 };
        [valid, if on { valid } else { 0 }]
    });
    let mut buffer: Vec<u32> = [SFEATURES, count as u32].into_iter().chain(pairs).collect();
    door.ask(&mut buffer).map_err(|errno| match errno {
        Errno::EPERM => {
            EthtoolError::NotPermitted { device: device.clone(), feature: feature.clone() }
        }
        other => door.failed("set the features", other),
    })?;
    match state()?.active {
        active if active == on => Ok(()),
        active => Err(EthtoolError::Fixed { device, feature, active }),
    }
}

/// struct ethtool_get_features_block.
#[derive(Debug, Clone, Copy, Default)]
struct Block {
    available: u32,
    active: u32,
    never_changed: u32,
}

/// The state of the feature with bit `index`.
fn state(blocks: &[Block], index: usize) -> FeatureState {
    let block = blocks.get(index / 32).copied().unwrap_or_default();
    let bit = 1 << (index % 32);
    FeatureState {
        active: block.active & bit != 0,
        changeable: block.available & bit != 0 && block.never_changed & bit == 0,
    }
}

/// A device to ask.
struct Door<'a> {
    socket: OwnedFd,
    device: &'a str,
}

impl<'a> Door<'a> {
    fn open(device: &'a str) -> Result<Self, EthtoolError> {
        if device.is_empty() || device.len() >= libc::IFNAMSIZ || device.contains('\0') {
            return Err(EthtoolError::NoDevice(device.to_owned()));
        }
        // Any socket will do: it only tells the network namespace.
        socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
            .map(|socket| Self { socket, device })
            .map_err(|errno| EthtoolError::System {
                device: device.to_owned(),
                action: "open a socket to ask for the features",
                source: errno.into(),
            })
    }

    fn failed(&self, action: &'static str, errno: Errno) -> EthtoolError {
        let device = self.device.to_owned();
        match errno {
            Errno::ENODEV => EthtoolError::NoDevice(device),
            other => EthtoolError::System { device, action, source: other.into() },
        }
    }

    /// One SIOCETHTOOL: `buffer` starts with the command and must hold the answer,
    /// whose size the command's own fields tell the kernel.
    fn ask(&self, buffer: &mut [u32]) -> Result<(), Errno> {
        // SAFETY: ifreq is plain bytes and numbers, for which zeros are valid.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(self.device.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_data = buffer.as_mut_ptr().cast();
        // SAFETY: the callers size `buffer` for what its command and counts make the kernel
        // read and write; it is aligned for the structures, which hold nothing wider than
        // 64 bits copied bytewise; it outlives the call.
        unsafe { ioctl::ethtool(self.socket.as_raw_fd(), &mut request) }.map(drop)
    }

    /// How many features the kernel has.
    fn feature_count(&self) -> Result<usize, EthtoolError> {
        // struct ethtool_sset_info: command, reserved, a 64-bit mask of sets, their sizes.
        let mut buffer = [GSSET_INFO, 0, 0, 0, 0];
        let mask = (1_u64 << SS_FEATURES).to_ne_bytes();
        let [a, b, c, d, e, f, g, h] = mask;
        buffer[2] = u32::from_ne_bytes([a, b, c, d]);
        buffer[3] = u32::from_ne_bytes([e, f, g, h]);
        self.ask(&mut buffer).map_err(|errno| self.failed("count the features", errno))?;
        Ok(buffer[4] as usize)
    }

    /// Their names, by bit.
    fn feature_names(&self) -> Result<Vec<String>, EthtoolError> {
        let count = self.feature_count()?;
        // struct ethtool_gstrings: command, set, number, then 32 bytes each. The kernel writes
        // as many as it has, and that number cannot grow while it runs.
        let mut buffer = vec![0; 3 + count * STRING_WORDS];
        for (word, value) in buffer.iter_mut().zip([GSTRINGS, SS_FEATURES, count as u32]) {
            *word = value;
        }
        self.ask(&mut buffer).map_err(|errno| self.failed("name the features", errno))?;
        let strings = buffer.get(3..).unwrap_or_default().chunks_exact(STRING_WORDS);
        Ok(strings.map(text).collect())
    }

    /// Their states. `count` is the number of blocks of 32.
    fn feature_blocks(&self, count: usize) -> Result<Vec<Block>, EthtoolError> {
        // struct ethtool_gfeatures: command, size, then (available, requested, active,
        // never_changed) for each block; the kernel writes at most `size` blocks.
        let mut buffer = vec![0; 2 + 4 * count];
        for (word, value) in buffer.iter_mut().zip([GFEATURES, count as u32]) {
            *word = value;
        }
        self.ask(&mut buffer).map_err(|errno| self.failed("read the features", errno))?;
        let blocks = buffer.get(2..).unwrap_or_default().chunks_exact(4);
        Ok(blocks
            .map(|words| match *words {
                [available, _, active, never_changed] => Block { available, active, never_changed },
                _ => Block::default(),
            })
            .collect())
    }
}

/// A string of the kernel's, up to its NUL.
fn text(words: &[u32]) -> String {
    let bytes = words.iter().flat_map(|word| word.to_ne_bytes()).take_while(|&byte| byte != 0);
    String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_feature_is_fixed_if_the_driver_or_the_kernel_keeps_it() {
        let blocks = [
            Block { available: 0b0011, active: 0b0101, never_changed: 0b0010 },
            Block { available: 1 << 31, active: 1 << 31, never_changed: 0 },
        ];
        for (index, active, changeable) in [
            (0, true, true),
            (1, false, false),
            (2, true, false),
            (3, false, false),
            (63, true, true),
            (62, false, false),
            (64, false, false),
        ] {
            assert_eq!(state(&blocks, index), FeatureState { active, changeable }, "{index}");
        }
    }

    #[test]
    fn strings_end_at_their_nul() {
        let words = |bytes: [u8; 8]| {
            let [a, b, c, d, e, f, g, h] = bytes;
            [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
        };
        assert_eq!(text(&words(*b"rx-gro\0x")), "rx-gro");
        assert_eq!(text(&words(*b"rx-gro-x")), "rx-gro-x");
        assert_eq!(text(&[]), "");
    }
}
