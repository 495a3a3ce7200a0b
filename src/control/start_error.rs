//! Why the switch cannot start, in words for people.

use crate::control::host::HostError;
use crate::control::links::LinkError;
use crate::control::privileges::{ConfineError, MissingCapabilities};
use crate::control::server::SocketError;
use crate::control::takeover::TakeOverError;
use crate::dataplane::WorkerError;
use crate::dataplane::kernel::KernelPathError;
use crate::frame::Tpid;
use crate::switch::Conflict;
use crate::sys::bpf::BpfError;
use crate::sys::packet::PacketError;
use crate::sys::tap::TapError;
use nix::errno::Errno;
use std::io;
use thiserror::Error;

/// The switch cannot start. Devices that cannot be used are named with their place,
/// `--uplink eth0` or `FILE:LINE: eth0`.
#[derive(Debug, Error)]
pub enum StartError {
    /// No such uplink.
    #[error("{0}: no such network device: `ip link` lists them")]
    NoUplink(String),
    /// The uplink carries no Ethernet frames.
    #[error("{0}: not an Ethernet device: name a NIC, bond or veth")]
    UplinkNotEthernet(String),
    /// Another vlanswitchd has the uplink.
    #[error("--uplink {0}: another vlanswitchd serves it; stop that one, or add the maps to it")]
    UplinkTaken(String),
    /// The host has a VLAN device on a VLAN that a port claims.
    #[error(
        "{uplink}: VLAN {vid} ({tpid}) is that of the host's VLAN device {device}, and a port \
         claims it too: both would get every frame; `ip link delete {device}`, or for a host leg \
         map {vid}=internal:NAME"
    )]
    VlanDevice {
        /// The uplink, as it was written.
        uplink: String,
        /// The device.
        device: String,
        /// TPID.
        tpid: Tpid,
        /// VID.
        vid: u16,
    },
    /// A CPU that cannot be used.
    #[error(
        "--cpus: CPU {cpu} is not online, or not for this process: it may use {allowed}; name \
         some of these, or change its CPU affinity (CPUAffinity=, AllowedCPUs= in the service)"
    )]
    Cpu {
        /// Its number.
        cpu: usize,
        /// Those that can be used.
        allowed: String,
    },
    /// Too few file descriptors.
    #[error(
        "{ports} ports take {needed} open files, and the limit is {limit}: raise it with \
         `ulimit -Hn {needed}`, or LimitNOFILE= in the service"
    )]
    FileLimit {
        /// How many ports are configured.
        ports: usize,
        /// What they take, and the rest of the switch.
        needed: u64,
        /// The hard limit.
        limit: u64,
    },
    /// A mapped device carries no Ethernet frames.
    #[error("{0}: not an Ethernet device: map a tap (not a tun) or another Ethernet device")]
    PortNotEthernet(String),
    /// We would create a device with a name of libvirt's.
    #[error(
        "{0}: the device does not exist, and its name is reserved by libvirt \
         (vnet*, vif*, macvtap*, macvlan*): choose another, or create=no if libvirt makes it"
    )]
    ReservedName(String),
    /// An internal port's name is another device's.
    #[error("{0}: a device of that name exists and is no tap: choose another name")]
    InternalTaken(String),
    /// Capabilities are missing.
    #[error(transparent)]
    Capabilities(#[from] MissingCapabilities),
    /// Devices cannot be followed or set.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A device cannot be made ready.
    #[error(transparent)]
    Host(#[from] HostError),
    /// A tap cannot be made.
    #[error("{name}: {source}")]
    Tap {
        /// Its name.
        name: String,
        /// Why.
        source: TapError,
    },
    /// The kernel path does not work, and is asked for.
    #[error("{0}; --datapath auto takes the packet path where the kernel path does not work")]
    KernelPath(#[from] KernelPathError),
    /// Ports the kernel path cannot serve, and it is asked for.
    #[error("--datapath kernel: {}; --datapath auto has the packet path serve it", .0.join("; "))]
    NotForPrograms(Vec<String>),
    /// BPF does not work.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// A packet socket cannot be set up.
    #[error("{name}: cannot {source}{}", packet_cure(source))]
    Packet {
        /// The device.
        name: String,
        /// The step and the kernel's answer.
        source: PacketError,
    },
    /// A packet socket of another process is not what it is said to be.
    #[error("{name}: cannot {source}")]
    TakenOver {
        /// The device.
        name: String,
        /// The step and the kernel's answer.
        source: PacketError,
    },
    /// A device that is to be taken over has another name.
    #[error("{name}: it is called {now} now")]
    Renamed {
        /// Its name before.
        name: String,
        /// Its name now.
        now: String,
    },
    /// No thread or descriptors.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// A worker is needed that does not answer.
    #[error(
        "worker {0} does not answer: nothing was changed; `vlanswitchctl status` shows whether it \
         does"
    )]
    Silent(usize),
    /// Nobody hands over.
    #[error(transparent)]
    TakeOver(#[from] TakeOverError),
    /// The process cannot be confined.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// A socket cannot be listened on.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Two ports claim the same frames.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// Signals or polling.
    #[error("cannot set up the control loop: {0}")]
    Control(#[from] io::Error),
}

impl StartError {
    /// What the device is called now, if that is what is wrong.
    pub fn new_name(&self) -> Option<&str> {
        match self {
            Self::Renamed { now, .. } => Some(now),
            _ => None,
        }
    }

    /// Whether the configuration is at fault: exit status 2.
    pub fn is_configuration(&self) -> bool {
        matches!(
            self,
            Self::NoUplink(_)
                | Self::UplinkNotEthernet(_)
                | Self::PortNotEthernet(_)
                | Self::ReservedName(_)
                | Self::InternalTaken(_)
                | Self::NotForPrograms(_)
                | Self::Cpu { .. }
                | Self::VlanDevice { .. }
        )
    }
}

fn packet_cure(error: &PacketError) -> &'static str {
    match error.errno {
        Errno::ENOMEM | Errno::ENOBUFS => {
            ": the kernel refused the memory; free some, or raise the memory limit of the service"
        }
        Errno::EMFILE | Errno::ENFILE => {
            ": raise the limit of open files (ulimit -n, LimitNOFILE=)"
        }
        Errno::EPERM => ": CAP_NET_RAW is missing",
        Errno::ENOPROTOOPT | Errno::EINVAL => {
            ": this kernel lacks the feature; vlanswitchd needs Linux 5.10 or newer with CONFIG_PACKET"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The faults no test can make the kernel produce on demand.
    #[test]
    fn refused_sockets_and_rings_name_the_cure() {
        for (step, errno, cure) in [
            ("allocate the receive ring", Errno::ENOMEM, "raise the memory limit"),
            ("open a packet socket", Errno::EMFILE, "raise the limit of open files"),
            ("open a packet socket", Errno::EPERM, "CAP_NET_RAW is missing"),
            ("ask for virtio headers", Errno::ENOPROTOOPT, "needs Linux 5.10 or newer"),
        ] {
            let source = PacketError { step, errno };
            let error = StartError::Packet { name: "eth0".into(), source };
            let text = error.to_string();
            assert!(text.starts_with(&format!("eth0: cannot {step}: ")), "{text}");
            assert!(text.contains(cure), "{text}");
            assert!(!error.is_configuration());
        }
    }
}
