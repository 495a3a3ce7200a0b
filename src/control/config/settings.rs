//! The values of the switch's own settings, in the words users type.

use crate::dataplane::PollMode;
use crate::sys::packet::{BURST, SLOT_LEN};
use clap::ValueEnum;
use clap::builder::PossibleValue;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use thiserror::Error;

/// What switches the control socket and the metrics off.
const NONE: &str = "none";

/// How to write log lines and counters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// How frames are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Datapath {
    /// The kernel path for every port it can serve, the packet path for the others
    Auto,
    /// By packet sockets
    Packet,
    /// By programs in the kernel; refuses ports they cannot serve
    Kernel,
}

/// Whether the process is confined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SandboxMode {
    /// Another system call than those known ends it
    On,
    /// For finding out: files are free, and the kernel's log names other system calls
    Log,
    /// System calls and files are free
    Off,
}

/// Whether ports change their worker when one has too much to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Rebalance {
    /// They do, by measured load
    On,
    /// They stay
    Off,
}

/// The most workers there can be.
pub const WORKERS_MAX: usize = 64;

/// How many workers move frames (`--workers`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WorkerCount {
    /// By the number of CPUs and ports.
    #[default]
    Auto,
    /// So many.
    Number(usize),
}

impl fmt::Display for WorkerCount {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => formatter.write_str("auto"),
            Self::Number(workers) => workers.fmt(formatter),
        }
    }
}

impl FromStr for WorkerCount {
    type Err = BadSetting;

    fn from_str(text: &str) -> Result<Self, BadSetting> {
        match text.parse() {
            _ if text == "auto" => Ok(Self::Auto),
            Ok(workers) if (1..=WORKERS_MAX).contains(&workers) => Ok(Self::Number(workers)),
            _ => Err(BadSetting(format!(
                "'{text}' is no number of workers: write a number from 1 to {WORKERS_MAX}, or auto"
            ))),
        }
    }
}

/// The CPUs workers are bound to, in their order (`--cpus`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Cpus(pub Vec<usize>);

impl fmt::Display for Cpus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts: Vec<String> = self.0.iter().map(ToString::to_string).collect();
        formatter.write_str(&texts.join(","))
    }
}

impl FromStr for Cpus {
    type Err = BadSetting;

    fn from_str(text: &str) -> Result<Self, BadSetting> {
        parse_cpus(text).map(Self)
    }
}

/// The highest number a CPU can have: what the kernel's masks hold here.
const CPU_MAX: usize = 1023;

/// Reads a list of CPUs such as `0-3,8`, as the kernel writes them too.
///
/// # Errors
/// [`BadSetting`] that says how to write one.
pub fn parse_cpus(text: &str) -> Result<Vec<usize>, BadSetting> {
    let refused = || {
        BadSetting(format!(
            "'{text}' is no list of CPUs: write numbers from 0 to {CPU_MAX} and ranges such as \
             2-5,8, each CPU once"
        ))
    };
    let mut cpus = Vec::new();
    for range in text.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) =
            (first.parse().map_err(|_| refused())?, last.parse().map_err(|_| refused())?);
        if first > last || last > CPU_MAX || (first..=last).any(|cpu| cpus.contains(&cpu)) {
            return Err(refused());
        }
        cpus.extend(first..=last);
    }
    Ok(cpus)
}

impl ValueEnum for PollMode {
    fn value_variants<'a>() -> &'a [Self] {
        &[Self::Adaptive, Self::Busy, Self::Sleep]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(match self {
            Self::Adaptive => PossibleValue::new("adaptive").help("Spin a little, then sleep"),
            Self::Busy => PossibleValue::new("busy").help("Always spin"),
            Self::Sleep => PossibleValue::new("sleep").help("Always sleep"),
        })
    }
}

/// The word for a value.
pub fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

/// The value for a word, or the words there are.
pub(super) fn word<T: ValueEnum>(text: &str) -> Result<T, String> {
    T::from_str(text, false).map_err(|_| {
        let names: Vec<String> = T::value_variants().iter().map(name).collect();
        let choices = match names.split_last() {
            Some((last, others)) if !others.is_empty() => {
                format!("{} or {last}", others.join(", "))
            }
            _ => names.concat(),
        };
        format!("'{text}' is no choice: choose {choices}")
    })
}

/// The control socket (`--control`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Control {
    /// None.
    Off,
    /// A unix socket at this path.
    Socket(PathBuf),
}

impl Control {
    /// Where the socket is, if there is to be one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Off => None,
            Self::Socket(path) => Some(path),
        }
    }
}

impl Default for Control {
    fn default() -> Self {
        Self::Socket(PathBuf::from("/run/vlanswitchd/control"))
    }
}

impl fmt::Display for Control {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => formatter.write_str(NONE),
            Self::Socket(path) => path.display().fmt(formatter),
        }
    }
}

/// Text that is no path or address.
#[derive(Debug, Error)]
#[error("{0}")]
pub struct BadSetting(String);

impl FromStr for Control {
    type Err = BadSetting;

    fn from_str(text: &str) -> Result<Self, BadSetting> {
        match text {
            NONE => Ok(Self::Off),
            "" => Err(BadSetting("it is empty: write a path, or none".to_owned())),
            path => Ok(Self::Socket(PathBuf::from(path))),
        }
    }
}

/// Where metrics are served (`--metrics`).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Metrics {
    /// Nowhere.
    #[default]
    Off,
    /// On this address.
    Tcp(SocketAddr),
    /// On a unix socket at this path.
    Unix(PathBuf),
}

impl fmt::Display for Metrics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => formatter.write_str(NONE),
            Self::Tcp(address) => address.fmt(formatter),
            Self::Unix(path) => write!(formatter, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Metrics {
    type Err = BadSetting;

    fn from_str(text: &str) -> Result<Self, BadSetting> {
        if text == NONE {
            return Ok(Self::Off);
        }
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let port = text.strip_prefix(':').unwrap_or(text).parse().ok();
        let loopback = port.map(|port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port));
        loopback.or_else(|| text.parse().ok()).map(Self::Tcp).ok_or_else(|| {
            BadSetting(format!(
                "'{text}' is no address: write ADDRESS:PORT such as 127.0.0.1:9101 or [::1]:9101, \
                 a port (on loopback), unix:PATH, or none"
            ))
        })
    }
}

/// How much memory a port's receive ring takes (`--ring-size`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RingSize {
    /// What there is for all ports, shared, and no more than a port has use for.
    #[default]
    Auto,
    /// This many bytes, a multiple of [`RingSize::STEP`].
    Bytes(u32),
}

impl RingSize {
    /// The smallest ring, and what all are a multiple of, in bytes.
    pub const STEP: u32 = (BURST * SLOT_LEN) as u32;
    /// The largest, in bytes.
    const MOST: u32 = 64 << 20;
    /// What a port has use for, in bytes (docs/performance.md).
    const AMPLE: u32 = 4 << 20;
    /// The smallest that is chosen for a port unasked, in bytes.
    const SPARE: u32 = 512 << 10;
    /// What is shared unasked, in bytes.
    const SHARED: usize = 1 << 30;

    /// The ring of one of this many ports, in bytes.
    pub fn bytes(self, ports: usize) -> u32 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Auto => {
                let share = u32::try_from(Self::SHARED / ports.max(1)).unwrap_or(u32::MAX);
                let share = share.clamp(Self::SPARE, Self::AMPLE);
                share - share % Self::STEP
            }
        }
    }

    /// The same in slots.
    pub fn slots(self, ports: usize) -> usize {
        self.bytes(ports) as usize / SLOT_LEN
    }
}

impl fmt::Display for RingSize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => formatter.write_str("auto"),
            Self::Bytes(bytes) if bytes.is_multiple_of(1 << 20) => {
                write!(formatter, "{}M", bytes >> 20)
            }
            Self::Bytes(bytes) => write!(formatter, "{}k", bytes >> 10),
        }
    }
}

impl FromStr for RingSize {
    type Err = BadSetting;

    fn from_str(text: &str) -> Result<Self, BadSetting> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let (digits, shift) = match text.split_at_checked(text.len().saturating_sub(1)) {
            Some((digits, "k")) => (digits, 10),
            Some((digits, "M")) => (digits, 20),
            _ => (text, 0),
        };
        // `parse` would take "+5".
        let number = digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse().ok());
        let bytes = number.flatten().and_then(|number: u32| number.checked_mul(1 << shift));
        let bytes = bytes.filter(|bytes| (Self::STEP..=Self::MOST).contains(bytes));
        bytes.map(|bytes| Self::Bytes(bytes.next_multiple_of(Self::STEP))).ok_or_else(|| {
            BadSetting(format!(
                "'{text}' is no size of a ring: write bytes from 128k to 64M, such as 512k or 4M, \
                 or auto"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;

    #[test]
    fn addresses_are_loopback_unless_said_otherwise() {
        for (text, shown) in [
            ("9101", "127.0.0.1:9101"),
            (":9101", "127.0.0.1:9101"),
            ("192.0.2.1:80", "192.0.2.1:80"),
            ("[::]:9101", "[::]:9101"),
            ("unix:/run/m", "unix:/run/m"),
            ("none", "none"),
        ] {
            let metrics: Metrics = text.parse().unwrap();
            assert_eq!(metrics.to_string(), shown);
            assert_eq!(shown.parse::<Metrics>().unwrap(), metrics);
        }
        for text in ["", "localhost:9101", "65536", "unix:", ":", "127.0.0.1"] {
            let error = text.parse::<Metrics>().unwrap_err().to_string();
            assert!(error.contains(&format!("'{text}' is no address: write ")), "{error}");
        }
    }

    #[test]
    fn a_ring_is_of_whole_blocks_and_shown_as_written() {
        for (text, bytes, shown) in [
            ("128k", 128 << 10, "128k"),
            ("131072", 128 << 10, "128k"),
            ("129k", 256 << 10, "256k"),
            ("1024k", 1 << 20, "1M"),
            ("64M", 64 << 20, "64M"),
        ] {
            let size: RingSize = text.parse().unwrap();
            assert_eq!((size.bytes(1), size.bytes(4094)), (bytes, bytes), "{text}");
            assert_eq!(size.to_string(), shown);
            assert_eq!(shown.parse::<RingSize>().unwrap(), size);
        }
        for text in ["", "k", "127k", "65M", "+512k", "1G", "512K", "4096M", "1.5M", "-1", "no"] {
            let error = text.parse::<RingSize>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("'{text}' is no size of a ring: ")), "{error}");
        }
    }

    #[test]
    fn rings_share_what_there_is_unasked() {
        let size: RingSize = "auto".parse().unwrap();
        assert_eq!(size.to_string(), "auto");
        for (ports, bytes) in
            [(0, 4 << 20), (1, 4 << 20), (256, 4 << 20), (1000, 1 << 20), (4094, 512 << 10)]
        {
            assert_eq!(size.bytes(ports), bytes, "{ports} ports");
        }
        for ports in 1..5000 {
            assert!(size.slots(ports).is_multiple_of(BURST), "{ports} ports");
        }
    }

    #[test]
    fn workers_and_cpus_are_numbers() {
        assert_eq!("auto".parse::<WorkerCount>().unwrap(), WorkerCount::Auto);
        assert_eq!("64".parse::<WorkerCount>().unwrap(), WorkerCount::Number(64));
        for text in ["0", "65", "-1", "", "Auto"] {
            let error = text.parse::<WorkerCount>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("'{text}' is no number of workers: ")), "{error}");
        }
        assert_eq!("8,2-4".parse::<Cpus>().unwrap(), Cpus(vec![8, 2, 3, 4]));
        for text in ["", "1,", "3-1", "a", "1,1", "1-3,2", "1024", "-1"] {
            let error = text.parse::<Cpus>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("'{text}' is no list of CPUs: ")), "{error}");
        }
    }

    #[test]
    fn words_name_the_choices() {
        assert_eq!(word::<PollMode>("busy"), Ok(PollMode::Busy));
        let error = word::<PollMode>("Busy").unwrap_err();
        assert_eq!(error, "'Busy' is no choice: choose adaptive, busy or sleep");
    }
}
