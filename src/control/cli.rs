//! The command line of `vlanswitchd` (DESIGN §4).

use crate::control::mapping::{self, MapError, MapProblem, PortConfig};
use crate::dataplane::PollMode;
use crate::frame::Tpid;
use crate::switch::Table;
use clap::{ArgAction, Parser, ValueEnum};
use thiserror::Error;

/// The guest MTU `--set-uplink-mtu` makes room for when it is given no other.
const GUEST_MTU: &str = "1500";

/// Carries every frame of a VLAN between an uplink and a VM's tap.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100, after_help = EXAMPLES)]
pub struct Arguments {
    /// The network device that is the trunk to the external switch
    #[arg(long, value_name = "IF")]
    uplink: String,

    /// VLANS=DEVICE[,OPTION...]: give these VLANs to this device; repeatable
    ///
    /// VLANS is a VLAN (101), a list for a trunk (200-210,300), 0 for untagged
    /// frames, or a pair of tags (101.20). DEVICE is a tap, which is created if it
    /// does not exist, any other Ethernet netdev, or internal:NAME.
    /// Options: mode=tunnel|access|trunk, native=VID, tpid=T, inner-tpid=T,
    /// pcp=N|copy, create=yes|no, owner=USER, group=GROUP, queues=N, offload=off.
    #[arg(long = "map", value_name = "MAP", required = true, action = ArgAction::Append, verbatim_doc_comment)]
    maps: Vec<String>,

    /// TPID of the uplink's outer tags where a map names none: 0x8100, 0x88a8, 0x9100 or 0x9200
    #[arg(long, value_name = "T", default_value = "0x8100")]
    tpid: String,

    /// How frames are moved; auto takes the fastest path that works here
    #[arg(long, value_enum, default_value_t = DatapathArgument::Auto)]
    datapath: DatapathArgument,

    /// How to wait for frames: spin a little then sleep, always spin, or always sleep
    #[arg(long, value_enum, default_value_t = PollArgument::Adaptive)]
    poll: PollArgument,

    /// Raise the uplink's MTU so that guests can use this MTU behind the configured tags; put back at exit
    #[arg(long, value_name = "GUEST_MTU", num_args = 0..=1, require_equals = true,
          default_missing_value = GUEST_MTU, value_parser = clap::value_parser!(u32).range(576..=65000))]
    set_uplink_mtu: Option<u32>,

    /// Log lines and counters for people, or as JSON objects
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,

    /// Say more; twice for debugging
    #[arg(short, action = ArgAction::Count)]
    verbose: u8,
}

const EXAMPLES: &str = "Examples:
  vlanswitchd --uplink eth0 --map 101=tap-web1
  vlanswitchd --uplink eth0 --map 101=tap-web1,owner=libvirt-qemu --map 200-210=tap-fw,native=200
SIGUSR1 prints the counters. Exit status: 0 stopped by a signal, 1 failure, 2 wrong arguments.";

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DatapathArgument {
    Auto,
    Packet,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum PollArgument {
    Adaptive,
    Busy,
    Sleep,
}

/// How to write log lines and counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Everything the daemon is told, checked as far as it can be without looking at
/// the host.
#[derive(Debug)]
pub struct Config {
    /// Name of the uplink.
    pub uplink: String,
    /// The ports, in the order given.
    pub ports: Vec<PortConfig>,
    /// The ports' memberships, compiled.
    pub table: Table,
    /// How to wait for frames.
    pub poll: PollMode,
    /// Guest MTU to make room for on the uplink, if asked.
    pub set_uplink_mtu: Option<u32>,
    /// How to write.
    pub log_format: LogFormat,
    /// 0 notices, 1 details, 2 debugging.
    pub verbosity: u8,
}

/// The command line makes no sense.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A mapping was refused.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Another option was.
    #[error("--{0}")]
    Option(#[from] MapProblem),
}

impl TryFrom<Arguments> for Config {
    type Error = ConfigError;

    fn try_from(arguments: Arguments) -> Result<Self, ConfigError> {
        let tpid: Tpid = mapping::parse_tpid("tpid", &arguments.tpid)?;
        let (ports, table) = mapping::parse_all(&arguments.maps, &arguments.uplink, tpid)?;
        // One datapath so far: both words mean it.
        let (DatapathArgument::Auto | DatapathArgument::Packet) = arguments.datapath;
        Ok(Self {
            uplink: arguments.uplink,
            ports,
            table,
            poll: match arguments.poll {
                PollArgument::Adaptive => PollMode::Adaptive,
                PollArgument::Busy => PollMode::Busy,
                PollArgument::Sleep => PollMode::Sleep,
            },
            set_uplink_mtu: arguments.set_uplink_mtu,
            log_format: arguments.log_format,
            verbosity: arguments.verbose,
        })
    }
}
