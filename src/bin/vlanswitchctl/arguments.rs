//! The command line.

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use std::path::PathBuf;
use vlanswitchd::control::api::DEFAULT_SOCKET;

/// Watch and change a running vlanswitchd.
///
/// vlanswitchd carries the frames of VLANs between an uplink (the network card with
/// the cable to the switch) and ports (the network devices of virtual machines).
/// This program asks it what it does, and changes it while it runs.
#[derive(Debug, Parser)]
#[command(name = "vlanswitchctl", version, max_term_width = 80, after_help = EXAMPLES)]
pub struct Arguments {
    /// The socket that vlanswitchd listens on (its --control)
    #[arg(long, global = true, value_name = "PATH", env = "VLANSWITCHD_SOCKET", hide_env_values = true,
          default_value = DEFAULT_SOCKET, help_heading = "Options for all commands")]
    socket: PathBuf,

    /// The vlanswitchd of the service vlanswitchd@NAME, whatever --socket says
    #[arg(long, global = true, value_name = "NAME", value_parser = instance,
          help_heading = "Options for all commands")]
    instance: Option<String>,

    /// Print vlanswitchd's answers as JSON, one object a line
    ///
    /// Fields may be added in later versions; those that are there keep their
    /// meaning.
    #[arg(long, global = true, help_heading = "Options for all commands")]
    pub json: bool,

    #[command(subcommand)]
    pub command: Command,
}

impl Arguments {
    /// The socket of the vlanswitchd that is meant.
    pub fn socket(&self) -> PathBuf {
        // As the template unit has it.
        let of_instance = |name| format!("/run/vlanswitchd/{name}/control").into();
        self.instance.as_ref().map_or_else(|| self.socket.clone(), of_instance)
    }
}

const EXAMPLES: &str = "\
Examples:
  vlanswitchctl status                        is it up, what does it carry
  vlanswitchctl port add 101=tap-web1         a new port, at once
  vlanswitchctl port set tap-web1 vlan=102    move it to another VLAN
  vlanswitchctl drops                         which frames are lost, and why
  vlanswitchctl capture tap-web1 -w web.pcap  what a port sends and gets
  vlanswitchctl doctor                        what is wrong on this host

Exit status: 0 done; 1 it failed, or doctor found an error; 2 wrong arguments,
or vlanswitchd refused, and nothing was changed.";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show whether it runs, since when, and how many ports work
    Status,

    /// List ports, show one, add, remove or change them
    #[command(subcommand)]
    Port(PortCommand),

    /// Show the counters, or rates with --watch
    #[command(after_help = "\
Examples:
  vlanswitchctl stats
  vlanswitchctl stats --watch            all ports, every second
  vlanswitchctl stats --watch 5 tap-web1 one port, every five seconds")]
    Stats(StatsArguments),

    /// Show which frames were dropped, why, and what to do
    Drops,

    /// Print what happens, as it happens: ports that come and go, links, overload
    Monitor,

    /// Watch rates, drops and load on the full screen (press ? there for help)
    #[cfg(feature = "tui")]
    Top,

    /// Capture frames for Wireshark, tshark or tcpdump
    #[command(after_help = "\
The file is pcapng: tags as on the wire, the device's name, the direction, and
the reason if the frame was dropped. Ctrl-C ends it.

Examples:
  vlanswitchctl capture | wireshark -k -i -
  vlanswitchctl capture tap-web1 -w web1.pcapng
  vlanswitchctl capture uplink --filter 'vlan 101 and icmp6' | tshark -r -
  vlanswitchctl capture --drops -c 100 -w drops.pcapng")]
    Capture(CaptureArguments),

    /// Look for what is wrong on this host, and say how to mend it
    ///
    /// Exit status 1 if an error is found; warnings and notes do not count.
    Doctor,

    /// Show, check or reload the configuration
    #[command(subcommand)]
    Config(ConfigCommand),

    /// Take the kernel path away: the packet path serves all ports until the next start
    ///
    /// Then a stop of vlanswitchd is the end of forwarding. If none runs,
    /// `vlanswitchd --give-back --uplink IF` takes away what one has left.
    Detach,

    /// Print the completions for a shell
    #[command(after_help = "\
Example, for the shell that is running:
  source <(vlanswitchctl completions bash)")]
    Completions {
        /// For this shell
        shell: Shell,
    },

    /// Print the man page, or write all of them into a directory
    Man {
        /// Write vlanswitchd.8, vlanswitchctl.1, one page a command and vlanswitchd.toml.5 here
        directory: Option<PathBuf>,
    },
}

#[derive(Debug, Subcommand)]
pub enum PortCommand {
    /// List all ports with their VLANs and states
    List,

    /// Show everything about one port
    Show {
        /// The port's device
        name: String,
    },

    /// Add a port; all others go on
    #[command(after_help = "\
Examples:
  vlanswitchctl port add 101=tap-web1
  vlanswitchctl port add 200-210=tap-fw,native=200 --persist")]
    Add {
        /// VLANS=DEVICE[,OPTION...], as `vlanswitchd --map` takes it
        #[arg(value_name = "MAP")]
        map: String,
        /// Write it to the configuration file too
        #[arg(long)]
        persist: bool,
    },

    /// Remove a port; its device stays
    Remove {
        /// The port's device
        name: String,
        /// Take it out of the configuration file too
        #[arg(long)]
        persist: bool,
    },

    /// Give a port another worker, and with it the ports that share its outer VLAN
    Move {
        /// The port's device
        name: String,
        /// The number of the worker, from 0
        worker: u32,
    },

    /// Change a port's VLANs or options, all in one step
    #[command(after_help = "\
KEY is `vlan`, or an option of the map: mode, native, tpid, pcp, ...

Examples:
  vlanswitchctl port set tap-web1 vlan=102
  vlanswitchctl port set tap-fw vlan=200-220 native=201 --persist")]
    Set {
        /// The port's device
        name: String,
        /// What to change
        #[arg(required = true, value_name = "KEY=VALUE", value_parser = key_value)]
        changes: Vec<(String, String)>,
        /// Change it in the configuration file too
        #[arg(long)]
        persist: bool,
    },
}

#[derive(Debug, Args)]
pub struct StatsArguments {
    /// Print rates again and again: every second, or as often as said here
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1")]
    watch: Option<String>,

    /// Only the port on this device
    port: Option<String>,
}

impl StatsArguments {
    /// The interval in milliseconds, and the port. In `--watch tap-web1` the word
    /// is the port, though it stands where the seconds may.
    pub fn meaning(&self) -> Result<(Option<u64>, Option<&str>), String> {
        let port = self.port.as_deref();
        let Some(word) = self.watch.as_deref() else { return Ok((None, port)) };
        match word.parse::<f64>() {
            Ok(seconds) if (0.1..=86400.0).contains(&seconds) => {
                Ok((Some((seconds * 1000.0) as u64), port))
            }
            Ok(_) => Err(format!("--watch {word}: give 0.1 to 86400 seconds")),
            Err(_) if port.is_none() => Ok((Some(1000), Some(word))),
            Err(_) => Err(format!("--watch {word}: give seconds, as in --watch 5")),
        }
    }
}

#[derive(Debug, Args)]
pub struct CaptureArguments {
    /// Only the port on this device; `uplink` for the uplink [default: all]
    pub port: Option<String>,

    /// Only frames that were dropped, each with the reason
    #[arg(long)]
    pub drops: bool,

    /// Only frames that match, in tcpdump's language (see pcap-filter(7))
    ///
    /// tcpdump must be installed. A compiled filter is taken too, in the decimal
    /// form that `tcpdump -ddd` prints, with commas for line ends.
    #[arg(long, value_name = "EXPR")]
    pub filter: Option<String>,

    /// Keep so many bytes of each frame [default: all]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(14..))]
    pub snaplen: Option<u32>,

    /// End after so many frames
    #[arg(short = 'c', long = "count", value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub count: Option<u64>,

    /// Write to this file, or to standard output with -
    #[arg(short = 'w', long = "write", value_name = "FILE")]
    pub write: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Print the running configuration, as a file that vlanswitchd takes
    Show,
    /// Say what reloading would change, or check a file that is not in use
    Check {
        /// Check this file, without asking vlanswitchd
        file: Option<PathBuf>,
    },
    /// Read the configuration file again and apply what has changed: all or nothing
    Reload,
}

fn instance(word: &str) -> Result<String, String> {
    if word.is_empty() || word.starts_with('.') || word.contains('/') {
        return Err("give what stands behind the @ of the service, as in eth0".to_owned());
    }
    Ok(word.to_owned())
}

fn key_value(word: &str) -> Result<(String, String), String> {
    match word.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("give KEY=VALUE, as in vlan=102".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;
    use clap::CommandFactory;

    fn stats(words: &[&str]) -> Result<(Option<u64>, Option<String>), String> {
        let words = ["vlanswitchctl", "stats"].iter().chain(words);
        match Arguments::try_parse_from(words).unwrap().command {
            Command::Stats(stats) => {
                stats.meaning().map(|(watch, port)| (watch, port.map(str::to_owned)))
            }
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn the_definition_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn an_instance_has_a_socket_of_its_own() {
        let socket = |words: &[&str]| {
            let words = ["vlanswitchctl"].iter().chain(words);
            Arguments::try_parse_from(words).map(|arguments| arguments.socket())
        };
        let path = |text: &str| Some(PathBuf::from(text));
        assert_eq!(socket(&["status", "--socket", "/tmp/x"]).ok(), path("/tmp/x"));
        let of_eth0 = path("/run/vlanswitchd/eth0/control");
        assert_eq!(socket(&["--instance", "eth0", "status"]).ok(), of_eth0);
        // As when the environment names a socket.
        assert_eq!(socket(&["--socket", "/x", "status", "--instance", "eth0"]).ok(), of_eth0);
        for name in ["", "..", "../x", "eth0/control"] {
            assert!(socket(&["--instance", name, "status"]).is_err(), "{name}");
        }
    }

    #[test]
    fn watch_takes_seconds_or_a_port_or_both() {
        let port = || Some("tap1".to_owned());
        assert_eq!(stats(&[]), Ok((None, None)));
        assert_eq!(stats(&["tap1"]), Ok((None, port())));
        assert_eq!(stats(&["--watch"]), Ok((Some(1000), None)));
        assert_eq!(stats(&["--watch", "0.5"]), Ok((Some(500), None)));
        assert_eq!(stats(&["--watch", "tap1"]), Ok((Some(1000), port())));
        assert_eq!(stats(&["--watch", "2", "tap1"]), Ok((Some(2000), port())));
        assert_eq!(stats(&["tap1", "--watch"]), Ok((Some(1000), port())));
        assert!(stats(&["--watch", "0"]).is_err());
        assert!(stats(&["--watch", "nan"]).is_err());
        assert!(stats(&["--watch", "x", "tap1"]).is_err());
    }
}
