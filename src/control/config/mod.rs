//! What the switch is told: the command line on top of a file.
//!
//! # Theory of operation
//!
//! [`Config::load`] reads the file (`file`), lays the command line over it (an
//! option there replaces the file's, a map adds a port), and checks the whole. All
//! that is wrong is told at once. A [`Config`] is therefore always one that could
//! run; what only the host can tell is left to `checks`.
//!
//! A running switch changes by becoming another `Config`: [`Config::reload`] reads
//! the file again under the same command line, [`Config::with_ports`] takes other
//! ports, and [`diff`] says what is different, port by port, and which settings
//! cannot change without a restart. [`show`] writes a `Config` as a file that reads
//! back as the same, and [`persist`] makes one change in the operator's own file.
//!
//! The settings stand in one table ([`Config::settings`]) from which both are made.

pub mod check;
pub mod diff;
pub mod file;
pub mod persist;
mod schema;
pub mod settings;
pub mod show;
#[cfg(test)]
mod tests;

pub use settings::{
    Control, Cpus, Datapath, LogFormat, Metrics, Rebalance, RingSize, SandboxMode, WORKERS_MAX,
    WorkerCount,
};

use crate::control::cli::Arguments;
use crate::control::mapping::{self, MapError, MapProblem, PortConfig, PortSpec, Uplink};
use crate::dataplane::PollMode;
use crate::frame::Tpid;
use crate::switch::Table;
use file::FileError;
use std::fmt;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// The file that is read if it exists and no other is named.
pub const DEFAULT_FILE: &str = "/etc/vlanswitchd/vlanswitchd.toml";

/// Everything the daemon is told, checked as far as it can be without looking at
/// the host.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of the uplink.
    pub uplink: String,
    /// The ports: those of the file, then those of the command line.
    pub ports: Vec<PortConfig>,
    /// The ports' memberships, compiled.
    pub table: Table,
    /// TPID of ports that name none.
    pub tpid: Tpid,
    /// How frames are moved.
    pub datapath: Datapath,
    /// How many workers there are.
    pub workers: WorkerCount,
    /// The CPUs they are bound to, in their order; none for wherever they like.
    pub cpus: Vec<usize>,
    /// Whether ports change their worker by load.
    pub rebalance: Rebalance,
    /// How to wait for frames.
    pub poll: PollMode,
    /// Memory of a port's receive ring.
    pub ring_size: RingSize,
    /// Guest MTU to make room for on the uplink, if asked, in bytes.
    pub set_uplink_mtu: Option<u32>,
    /// The control socket.
    pub control: Control,
    /// Where metrics are served.
    pub metrics: Metrics,
    /// The user to become.
    pub user: Option<String>,
    /// Whether the process is confined.
    pub sandbox: SandboxMode,
    /// How to write.
    pub log_format: LogFormat,
    /// 0 notices, 1 details, 2 debugging.
    pub verbosity: u8,
    /// The file that was read.
    pub file: Option<PathBuf>,
    /// `--uplink eth0`, or `FILE:LINE`.
    uplink_place: String,
    arguments: Arguments,
}

/// A setting of the switch itself, as it stands in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The table of the file.
    pub section: &'static str,
    /// The key in it.
    pub key: &'static str,
    /// Its value, in the words of the command line.
    pub value: String,
    /// The value it has if it is not set; none for what must be.
    pub default: Option<String>,
    /// Whether it can change while the switch runs.
    pub live: bool,
}

/// One thing that is wrong.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// A port was refused.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Something in the file was.
    #[error(transparent)]
    File(#[from] FileError),
    /// An option of the command line was.
    #[error("--{0}")]
    Option(#[from] MapProblem),
    /// No uplink anywhere.
    #[error(
        "no uplink: name the trunk with --uplink IF, or with device = \"IF\" under [uplink] in {0}"
    )]
    NoUplink(PathBuf),
    /// Nothing to do, and no way to be told.
    #[error(
        "no port: give a --map VLANS=DEVICE, or a [[port]] in {DEFAULT_FILE}, or --control PATH \
         to add ports while it runs"
    )]
    NoPort,
}

/// All that is wrong, at least one thing.
#[derive(Debug, Error)]
pub struct ConfigErrors(pub Vec<ConfigError>);

/// A line for each.
impl fmt::Display for ConfigErrors {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (position, error) in self.0.iter().enumerate() {
            let separator = if position == 0 { "" } else { "\n" };
            write!(formatter, "{separator}{error}")?;
        }
        Ok(())
    }
}

impl TryFrom<Arguments> for Config {
    type Error = ConfigErrors;

    fn try_from(arguments: Arguments) -> Result<Self, ConfigErrors> {
        Self::load(arguments)
    }
}

impl Config {
    /// Reads the file the arguments name, or else [`DEFAULT_FILE`] if there is one,
    /// and lays the arguments over it.
    ///
    /// # Errors
    /// [`ConfigErrors`], all that is wrong.
    pub fn load(arguments: Arguments) -> Result<Self, ConfigErrors> {
        Self::load_or(arguments, Path::new(DEFAULT_FILE))
    }

    fn load_or(arguments: Arguments, default: &Path) -> Result<Self, ConfigErrors> {
        let file = arguments.config.clone();
        let file = file.or_else(|| default.exists().then(|| default.to_owned()));
        Self::load_from(arguments, file)
    }

    /// The configuration as it would be if the switch were started now. Refuses to do
    /// without a file that was there before: its ports would all be removed.
    ///
    /// # Errors
    /// [`ConfigErrors`]; this configuration is still right.
    pub fn reload(&self) -> Result<Self, ConfigErrors> {
        match &self.file {
            Some(file) => Self::load_from(self.arguments.clone(), Some(file.clone())),
            None => Self::load(self.arguments.clone()),
        }
    }

    /// The same switch with these ports.
    ///
    /// # Errors
    /// [`ConfigErrors`] if they clash with each other or the uplink.
    pub fn with_ports(&self, ports: Vec<PortConfig>) -> Result<Self, ConfigErrors> {
        let uplink = Uplink { device: &self.uplink, place: &self.uplink_place };
        let table = mapping::compile(&ports, Some(uplink))
            .map_err(|errors| ConfigErrors(errors.into_iter().map(ConfigError::from).collect()))?;
        Ok(Self { ports, table, ..self.clone() })
    }

    /// Whether somebody asked for the control socket there is, rather than getting the
    /// usual one.
    pub fn control_is_given(&self) -> bool {
        self.arguments.control.is_some() || self.control != Control::default()
    }

    /// The uplink and where it is written, for people.
    pub fn uplink_named(&self) -> String {
        match &self.arguments.uplink {
            Some(_) => self.uplink_place.clone(),
            None => format!("{}: {}", self.uplink_place, self.uplink),
        }
    }

    /// Whether to go on in place of a running vlanswitchd.
    pub fn is_takeover(&self) -> bool {
        self.arguments.is_takeover()
    }

    /// Whether there is a descriptor store that does not say so itself.
    pub fn is_fd_store(&self) -> bool {
        self.arguments.is_fd_store()
    }

    fn load_from(arguments: Arguments, file: Option<PathBuf>) -> Result<Self, ConfigErrors> {
        let (told, faults) = file.as_deref().map(file::read).unwrap_or_default();
        let mut errors: Vec<ConfigError> = faults.into_iter().map(ConfigError::from).collect();
        let all_read = errors.is_empty();
        let tpid = match arguments.tpid.as_deref().map(|text| mapping::parse_tpid("tpid", text)) {
            None => told.tpid.unwrap_or_default(),
            Some(Ok(tpid)) => tpid,
            Some(Err(problem)) => {
                errors.push(problem.into());
                Tpid::default()
            }
        };
        let named = arguments.uplink.clone().map(|name| {
            let place = format!("--uplink {name}");
            (name, place)
        });
        let uplink = named.or(told.uplink);
        if uplink.is_none() && all_read {
            let file = file.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_FILE));
            errors.push(ConfigError::NoUplink(file));
        }
        let mut specs: Vec<PortSpec> = told.ports;
        for map in &arguments.maps {
            match mapping::argument(map) {
                Ok(spec) => specs.push(spec),
                Err(error) => errors.push(error.into()),
            }
        }
        let control = arguments.control.clone().or(told.control);
        let can_be_told = file.is_some() || matches!(control, Some(Control::Socket(_)));
        let needs_port = !can_be_told && !arguments.is_give_back();
        if specs.is_empty() && arguments.maps.is_empty() && needs_port {
            errors.push(ConfigError::NoPort);
        }
        let place = uplink.as_ref().map(|(device, place)| Uplink { device, place });
        let built = mapping::build_all(&specs, place, tpid).map_err(|faults| {
            errors.extend(faults.into_iter().map(ConfigError::from));
        });
        match (built, uplink) {
            (Ok((ports, table)), Some((uplink, uplink_place))) if errors.is_empty() => Ok(Self {
                uplink,
                ports,
                table,
                tpid,
                datapath: arguments.datapath.or(told.datapath).unwrap_or(Datapath::Auto),
                workers: arguments.workers.or(told.workers).unwrap_or_default(),
                cpus: arguments.cpus.clone().or(told.cpus).unwrap_or_default().0,
                rebalance: arguments.rebalance.or(told.rebalance).unwrap_or(Rebalance::On),
                poll: arguments.poll.or(told.poll).unwrap_or(PollMode::Adaptive),
                ring_size: arguments.ring_size.or(told.ring_size).unwrap_or_default(),
                set_uplink_mtu: arguments.set_uplink_mtu.or(told.set_mtu),
                control: control.unwrap_or_default(),
                metrics: arguments.metrics.clone().or(told.metrics).unwrap_or_default(),
                user: arguments.user.clone().or(told.user),
                sandbox: arguments.sandbox.or(told.sandbox).unwrap_or(SandboxMode::On),
                log_format: arguments.log_format.or(told.log_format).unwrap_or(LogFormat::Text),
                verbosity: arguments.verbose,
                file,
                uplink_place,
                arguments,
            }),
            _ => Err(ConfigErrors(errors)),
        }
    }

    /// The switch's own settings, in the order of a file.
    pub fn settings(&self) -> Vec<Setting> {
        let fixed = |section, key, value: String, default: Option<String>| Setting {
            section,
            key,
            value,
            default,
            live: false,
        };
        let (uplink, switch) = (schema::UPLINK_TABLE, schema::SWITCH_TABLE);
        let mtu = self.set_uplink_mtu.map_or_else(|| "no".to_owned(), |mtu| mtu.to_string());
        vec![
            fixed(uplink, "device", self.uplink.clone(), None),
            Setting {
                // A default for ports: what it changes are ports.
                live: true,
                ..fixed(uplink, "tpid", self.tpid.to_string(), Some(Tpid::default().to_string()))
            },
            fixed(uplink, "set-mtu", mtu, Some("no".to_owned())),
            fixed(
                switch,
                "datapath",
                settings::name(&self.datapath),
                Some(settings::name(&Datapath::Auto)),
            ),
            fixed(switch, "workers", self.workers.to_string(), Some("auto".to_owned())),
            fixed(switch, "cpus", Cpus(self.cpus.clone()).to_string(), Some(String::new())),
            fixed(
                switch,
                "rebalance",
                settings::name(&self.rebalance),
                Some(settings::name(&Rebalance::On)),
            ),
            fixed(
                switch,
                "poll",
                settings::name(&self.poll),
                Some(settings::name(&PollMode::Adaptive)),
            ),
            fixed(
                switch,
                "ring-size",
                self.ring_size.to_string(),
                Some(RingSize::default().to_string()),
            ),
            fixed(
                switch,
                "control",
                self.control.to_string(),
                Some(Control::default().to_string()),
            ),
            fixed(switch, "metrics", self.metrics.to_string(), Some(Metrics::Off.to_string())),
            fixed(switch, "user", self.user.clone().unwrap_or_default(), Some(String::new())),
            fixed(
                switch,
                "sandbox",
                settings::name(&self.sandbox),
                Some(settings::name(&SandboxMode::On)),
            ),
            fixed(
                switch,
                "log-format",
                settings::name(&self.log_format),
                Some(settings::name(&LogFormat::Text)),
            ),
        ]
    }
}
