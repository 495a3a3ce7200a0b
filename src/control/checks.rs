//! Looking at the host's devices before anything is changed.

use crate::control::cli::Config;
use crate::control::config::Datapath;
use crate::control::doctor;
use crate::control::links::{LinkDetails, LinkSocket, Links};
use crate::control::mapping::{DeviceKind, Origin, PortConfig, TapConfig, is_reserved};
use crate::control::mtu;
use crate::control::start_error::StartError;
use crate::dataplane::kernel;
use crate::frame::{Tpid, Vid};
use crate::sys::tap;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::io;
use tracing::{info, warn};

const USUAL_GUEST_MTU: u32 = 1500;
/// What `ip link` calls the driver of VLAN devices.
pub const VLAN_KIND: &str = "vlan";

/// Refuses what cannot work, warns about what may not, and changes nothing.
///
/// # Errors
/// [`StartError`] for the first device that cannot be used.
pub fn devices(config: &Config, links: &Links) -> Result<(), StartError> {
    uplink(config, links)?;
    programs(config)?;
    config.ports.iter().try_for_each(|config| port(config, links))
}

/// Refuses ports that need the packet path where there is to be none.
///
/// # Errors
/// [`StartError::NotForPrograms`].
pub fn programs(config: &Config) -> Result<(), StartError> {
    if config.datapath != Datapath::Kernel {
        return Ok(());
    }
    let unable = config.ports.iter().filter_map(|port| {
        let why = kernel_inability(port)?;
        Some(format!("{}: {why}", named(port)))
    });
    let unable: Vec<String> = unable.collect();
    if unable.is_empty() { Ok(()) } else { Err(StartError::NotForPrograms(unable)) }
}

/// Why programs in the kernel cannot serve a port.
pub fn kernel_inability(config: &PortConfig) -> Option<&'static str> {
    if config.kind == DeviceKind::Internal {
        return Some("an internal port is this process's own");
    }
    kernel::inability(&config.membership, &config.police)
}

/// Refuses VLANs of the uplink that the host has VLAN devices for.
///
/// # Errors
/// [`StartError::VlanDevice`], or the kernel does not list its devices.
pub fn vlan_devices(
    config: &Config,
    claims: &[(Tpid, Vid)],
    links: &Links,
) -> Result<(), StartError> {
    let Some(uplink) = links.by_name(&config.uplink) else { return Ok(()) };
    // Most hosts have none: then nothing is asked.
    if !links.iter().any(|link| link.kind.as_deref() == Some(VLAN_KIND)) {
        return Ok(());
    }
    let found = vlan_device_on(claims, uplink.index, &LinkSocket::new()?.details()?);
    found.map_or(Ok(()), |(device, tpid, vid)| {
        let uplink = config.uplink_named();
        Err(StartError::VlanDevice { uplink, device, tpid, vid })
    })
}

/// The first VLAN device among these on a claimed VLAN of the device with index `lower`.
pub fn vlan_device_on(
    claims: &[(Tpid, Vid)],
    lower: u32,
    devices: &[LinkDetails],
) -> Option<(String, Tpid, u16)> {
    devices.iter().find_map(|device| {
        let vlan = device.vlan.filter(|vlan| vlan.lower == lower)?;
        let mut claims = claims.iter();
        let (tpid, vid) =
            claims.find(|(tpid, vid)| tpid.ethertype() == vlan.tpid && vid.get() == vlan.vid)?;
        Some((device.state.name.clone(), *tpid, vid.get()))
    })
}

/// Refuses a device that cannot be the uplink.
///
/// # Errors
/// [`StartError`].
pub fn uplink(config: &Config, links: &Links) -> Result<(), StartError> {
    match links.by_name(&config.uplink) {
        None => Err(StartError::NoUplink(config.uplink_named())),
        Some(link) if !link.is_ethernet => {
            Err(StartError::UplinkNotEthernet(config.uplink_named()))
        }
        Some(_) => Ok(()),
    }
}

/// Refuses a device that cannot be this port, warns about one that is not as wanted.
///
/// # Errors
/// [`StartError`].
pub fn port(port: &PortConfig, links: &Links) -> Result<(), StartError> {
    let name = &port.device;
    let internal = port.kind == DeviceKind::Internal;
    match (links.by_name(name), &port.kind) {
        (Some(link), _) if !link.is_ethernet => {
            return Err(StartError::PortNotEthernet(named(port)));
        }
        (Some(link), _) if internal && link.kind.as_deref() != Some("tun") => {
            return Err(StartError::InternalTaken(named(port)));
        }
        (None, DeviceKind::Internal | DeviceKind::Netdev { create: Some(_) })
            if is_reserved(name) =>
        {
            return Err(StartError::ReservedName(named(port)));
        }
        (Some(_), DeviceKind::Netdev { create: Some(wanted) }) => check_tap(name, wanted),
        _ => {}
    }
    Ok(())
}

/// A port's device and where it was written.
fn named(port: &PortConfig) -> String {
    let device = port.device_text();
    match &port.origin {
        Origin::Argument(_) => format!("--map {device}"),
        Origin::File { .. } => format!("{}: {device}", port.origin),
        Origin::Control(_) => device,
    }
}

/// Raises the soft limit of open files to the hard one, as far as this process may,
/// and checks that it is enough.
///
/// # Errors
/// [`StartError::FileLimit`].
pub fn file_limit(ports: usize, workers: usize) -> Result<(), StartError> {
    /// A receiving and a sending socket, and a handle to the former's counts.
    const FILES_PER_PORT: u64 = 3;
    /// The same on the uplink, epoll and a waker: for each worker beside the first.
    const FILES_PER_WORKER: u64 = 5;
    /// The first one's, maps, programs, netlink, epoll, and what the probe uses.
    const FILES_BESIDES: u64 = 64;
    let theirs =
        ports as u64 * FILES_PER_PORT + workers.saturating_sub(1) as u64 * FILES_PER_WORKER;
    let needed = theirs + FILES_BESIDES;
    let (_, limit) = getrlimit(Resource::RLIMIT_NOFILE).map_err(io::Error::from)?;
    setrlimit(Resource::RLIMIT_NOFILE, limit, limit).map_err(io::Error::from)?;
    if limit < needed { Err(StartError::FileLimit { ports, needed, limit }) } else { Ok(()) }
}

/// Compares a tap that exists with the one we would have created.
fn check_tap(name: &str, wanted: &TapConfig) {
    let Ok(Some(tap)) = tap::settings(name) else { return };
    for finding in doctor::tap_notes(name, wanted, &tap) {
        warn!("{}", doctor::line(&finding));
    }
}

/// The uplink MTU that guests with the usual MTU need for the tags of these ports, in
/// bytes.
pub fn required_mtu(ports: &[PortConfig]) -> u32 {
    let needs = ports.iter().map(|port| mtu::for_port(&port.membership, USUAL_GUEST_MTU).required);
    needs.max().unwrap_or(USUAL_GUEST_MTU)
}

/// The MTU the uplink is to be given, in bytes, if that is asked for.
pub fn target_mtu(config: &Config) -> Option<u32> {
    let guest_mtu = config.set_uplink_mtu?;
    let needs = config.ports.iter().map(|port| mtu::for_port(&port.membership, guest_mtu));
    needs.map(|need| need.with_guest_tag).max()
}

/// Says what MTU the uplink needs.
pub fn say_uplink_mtu(config: &Config, links: &Links) {
    let Some(uplink) = links.by_name(&config.uplink) else { return };
    let guest_mtu = config.set_uplink_mtu.unwrap_or(USUAL_GUEST_MTU);
    let needs = || config.ports.iter().map(|port| mtu::for_port(&port.membership, guest_mtu));
    let required = needs().map(|need| need.required).max().unwrap_or_default();
    let with_guest_tag = needs().map(|need| need.with_guest_tag).max().unwrap_or_default();
    let name = &config.uplink;
    if config.set_uplink_mtu.is_some() {
        if with_guest_tag > uplink.mtu {
            info!(
                "uplink {name}: raising its MTU from {} to {with_guest_tag}, for guests with MTU {guest_mtu}",
                uplink.mtu
            );
        }
    } else if required > uplink.mtu {
        warn!(
            "uplink {name}: its MTU of {} is too small for full-size frames of guests with MTU {guest_mtu} \
             behind the configured tags: it takes {required}; use --set-uplink-mtu, or \
             `ip link set {name} mtu {required}`",
            uplink.mtu
        );
    } else if with_guest_tag > uplink.mtu {
        info!(
            "uplink {name}: guests with MTU {guest_mtu} that add VLAN tags of their own need an uplink MTU \
             of {with_guest_tag} (now {}): --set-uplink-mtu",
            uplink.mtu
        );
    }
}
