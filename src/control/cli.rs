//! The command line of `vlanswitchd` (DESIGN §4). What it means together with the
//! file is in [`config`](super::config).

use crate::control::config::file::{GUEST_MTU, GUEST_MTUS};
use crate::control::config::{
    Control, Cpus, Datapath, Metrics, Rebalance, RingSize, SandboxMode, WorkerCount,
};
use crate::dataplane::PollMode;
use clap::{ArgAction, Parser};
use std::path::PathBuf;

pub use crate::control::config::{Config, LogFormat};

/// Carries every frame of a VLAN between an uplink and a VM's tap.
#[derive(Debug, Clone, Parser)]
#[command(version, about, max_term_width = 100, after_help = EXAMPLES)]
pub struct Arguments {
    /// Read this file [default: /etc/vlanswitchd/vlanswitchd.toml, if it exists]
    ///
    /// Options given here replace the file's; each --map adds a port to the file's.
    #[arg(long, value_name = "FILE")]
    pub(super) config: Option<PathBuf>,

    /// Check the configuration, say what is wrong with it, and end; changes nothing
    #[arg(long)]
    pub(super) check: bool,

    /// The network device that is the trunk to the external switch
    #[arg(long, value_name = "IF")]
    pub(super) uplink: Option<String>,

    /// VLANS=DEVICE[,OPTION...]: give these VLANs to this device; repeatable
    ///
    /// VLANS is a VLAN (101), a list for a trunk (200-210,300), 0 for untagged
    /// frames, or a pair of tags (101.20). DEVICE is a tap, which is created if it
    /// does not exist, any other Ethernet netdev, or internal:NAME.
    /// Options: mode=tunnel|access|trunk, native=VID, tpid=T, inner-tpid=T,
    /// pcp=N|copy, create=yes|no, owner=USER, group=GROUP, queues=N, offload=off,
    /// and for what the guest sends rate=BITS a second (100M, 1.5G) with
    /// burst=BYTES, storm=N broadcasts and multicasts a second (ARP and IPv6
    /// neighbour discovery are among them, and break if that is too few), and
    /// mac=ADDR[+ADDR], its only source addresses.
    #[arg(long = "map", value_name = "MAP", action = ArgAction::Append, verbatim_doc_comment)]
    pub(super) maps: Vec<String>,

    /// TPID of the uplink's outer tags where a port names none: 0x8100, 0x88a8, 0x9100 or 0x9200
    /// [default: 0x8100]
    #[arg(long, value_name = "T")]
    pub(super) tpid: Option<String>,

    /// The user to be once started; needs root at the start [default: who starts it]
    #[arg(long, value_name = "NAME")]
    pub(super) user: Option<String>,

    /// Whether system calls and files are restricted to what the switch needs [default: on]
    #[arg(long, value_enum)]
    pub(super) sandbox: Option<SandboxMode>,

    /// How frames are moved; auto takes the fastest path that works here [default: auto]
    #[arg(long, value_enum)]
    pub(super) datapath: Option<Datapath>,

    /// How many threads move frames: each serves ports of its own; auto goes by CPUs and ports [default: auto]
    #[arg(long, value_name = "N")]
    pub(super) workers: Option<WorkerCount>,

    /// Bind each of them to a CPU of this list, such as 2-5,8, in turn
    #[arg(long, value_name = "LIST")]
    pub(super) cpus: Option<Cpus>,

    /// Whether ports change their worker when one has too much to do [default: on]
    #[arg(long, value_enum)]
    pub(super) rebalance: Option<Rebalance>,

    /// How to wait for frames [default: adaptive]
    #[arg(long, value_enum)]
    pub(super) poll: Option<PollMode>,

    /// Memory of each port's receive ring, 128k to 64M; a smaller one loses more of a guest's
    /// bursts [default: auto, 4M, less where there are more than 256 ports]
    #[arg(long, value_name = "BYTES")]
    pub(super) ring_size: Option<RingSize>,

    /// Raise the uplink's MTU so that guests can use this MTU behind the configured tags; put back at exit
    #[arg(long, value_name = "GUEST_MTU", num_args = 0..=1, require_equals = true,
          default_missing_value = GUEST_MTU, value_parser = guest_mtu())]
    pub(super) set_uplink_mtu: Option<u32>,

    /// The unix socket for vlanswitchctl, or none [default: /run/vlanswitchd/control]
    #[arg(long, value_name = "PATH")]
    pub(super) control: Option<Control>,

    /// Serve metrics on ADDRESS:PORT, a port of the loopback address, or unix:PATH [default: none]
    #[arg(long, value_name = "ADDR")]
    pub(super) metrics: Option<Metrics>,

    /// Go on in place of the vlanswitchd that has the control socket, without losing a frame
    ///
    /// It hands over its rings and ends; after that this configuration is put in force. If
    /// none runs, this is a start like any other.
    #[arg(long)]
    pub(super) takeover: bool,

    /// Keep everything in the service manager's descriptor store between two runs
    ///
    /// Needed under systemd before version 254 only: later ones say in $FDSTORE that the
    /// unit has FileDescriptorStoreMax=.
    #[arg(long)]
    pub(super) fd_store: bool,

    /// Give devices back that a vlanswitchd which has ended left as its ports, and end
    #[arg(long, conflicts_with_all = ["check", "takeover"])]
    pub(super) give_back: bool,

    /// Log lines and counters for people, or as JSON objects [default: text]
    #[arg(long, value_enum)]
    pub(super) log_format: Option<LogFormat>,

    /// Say more; twice for debugging
    #[arg(short, action = ArgAction::Count)]
    pub(super) verbose: u8,
}

impl Arguments {
    /// Whether the configuration is only to be checked.
    pub fn is_check(&self) -> bool {
        self.check
    }

    /// Whether devices are only to be given back.
    pub fn is_give_back(&self) -> bool {
        self.give_back
    }

    /// Whether there is a descriptor store that does not say so itself.
    pub fn is_fd_store(&self) -> bool {
        self.fd_store
    }

    /// Whether to go on in another process's place.
    pub fn is_takeover(&self) -> bool {
        self.takeover
    }
}

fn guest_mtu() -> clap::builder::RangedI64ValueParser<u32> {
    let (first, last) = (*GUEST_MTUS.start(), *GUEST_MTUS.end());
    clap::value_parser!(u32).range(i64::from(first)..=i64::from(last))
}

const EXAMPLES: &str = "Examples:
  vlanswitchd --uplink eth0 --map 101=tap-web1
  vlanswitchd --uplink eth0 --map 101=tap-web1,owner=libvirt-qemu --map 200-210=tap-fw,native=200
  vlanswitchd --config /etc/vlanswitchd/vlanswitchd.toml --check
SIGUSR1 prints the counters. Exit status: 0 stopped by a signal, 1 failure, 2 wrong arguments.";
