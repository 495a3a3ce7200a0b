//! The configuration file: TOML, read into settings and [`PortSpec`]s.
//!
//! `toml_edit` and not `toml` with serde: it gives the place of every key and value,
//! so that each error can name line and column and all of them can be told at once,
//! and it is what edits the file (`persist`), so that both see the same document.
//! Values are taken as texts and understood by the code that understands the command
//! line: the file has no grammar of its own beyond TOML's.

use super::schema::{self, Kinds, PORT_TABLE, SECTIONS, SWITCH_TABLE, UPLINK_TABLE};
use super::settings::{
    Control, Cpus, Datapath, LogFormat, Metrics, Rebalance, RingSize, SandboxMode, WorkerCount,
    word,
};
use crate::control::mapping::{Origin, PortSpec, one_line, parse_tpid};
use crate::dataplane::PollMode;
use crate::frame::Tpid;
use std::fmt;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use toml_edit::{Document, Item, TableLike, Value};

/// The guest MTUs an uplink can make room for, in bytes.
pub const GUEST_MTUS: std::ops::RangeInclusive<u32> = 576..=65000;
/// The guest MTU where none is named, in bytes.
pub const GUEST_MTU: &str = "1500";

/// Something in the file that cannot be.
#[derive(Debug, Clone, thiserror::Error)]
pub struct FileError {
    file: Arc<Path>,
    /// Line and column, the first are 1.
    place: Option<(usize, usize)>,
    key: Option<String>,
    problem: String,
}

impl fmt::Display for FileError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.file.display().fmt(formatter)?;
        if let Some((line, column)) = self.place {
            write!(formatter, ":{line}:{column}")?;
        }
        if let Some(key) = &self.key {
            write!(formatter, ": {}", one_line(key))?;
        }
        write!(formatter, ": {}", one_line(&self.problem))
    }
}

/// What a file says. What it does not say is `None`.
#[derive(Debug, Default)]
pub struct FileConfig {
    /// The uplink's name, and `FILE:LINE`.
    pub uplink: Option<(String, String)>,
    /// TPID of ports that name none.
    pub tpid: Option<Tpid>,
    /// Guest MTU to make room for on the uplink, in bytes.
    pub set_mtu: Option<u32>,
    /// How frames are moved.
    pub datapath: Option<Datapath>,
    /// How many workers there are.
    pub workers: Option<WorkerCount>,
    /// The CPUs they are bound to.
    pub cpus: Option<Cpus>,
    /// Whether ports change their worker by load.
    pub rebalance: Option<Rebalance>,
    /// How to wait for frames.
    pub poll: Option<PollMode>,
    /// Memory of a port's receive ring.
    pub ring_size: Option<RingSize>,
    /// The control socket.
    pub control: Option<Control>,
    /// Where metrics are served.
    pub metrics: Option<Metrics>,
    /// The user to become.
    pub user: Option<String>,
    /// Whether the process is confined.
    pub sandbox: Option<SandboxMode>,
    /// How to write.
    pub log_format: Option<LogFormat>,
    /// The ports as written, in their order.
    pub ports: Vec<PortSpec>,
}

/// Reads a file: what could be understood, and all that could not. Ports with a
/// fault are left out; what a port is refused for is not looked at here. A file that
/// is no TOML has one fault.
pub fn read(path: &Path) -> (FileConfig, Vec<FileError>) {
    let file: Arc<Path> = path.into();
    match fs::read(path) {
        Ok(bytes) => parse(&file, &bytes),
        Err(error) => {
            let problem = format!("cannot be read: {error}");
            (FileConfig::default(), vec![FileError { file, place: None, key: None, problem }])
        }
    }
}

/// Understands a file's bytes, as [`read`]; the path is for faults.
pub fn parse(file: &Arc<Path>, bytes: &[u8]) -> (FileConfig, Vec<FileError>) {
    let document = text_of_file(file, bytes).and_then(|text| Ok((text, document(file, text)?)));
    match document {
        Ok((text, document)) => {
            let mut reader = Reader { file, lines: Lines::of(text), errors: Vec::new() };
            let config = reader.document(&document);
            (config, reader.errors)
        }
        Err(error) => (FileConfig::default(), vec![error]),
    }
}

fn text_of_file<'b>(file: &Arc<Path>, bytes: &'b [u8]) -> Result<&'b str, FileError> {
    std::str::from_utf8(bytes).map_err(|error| {
        let start = bytes.get(..error.valid_up_to()).unwrap_or_default();
        let place = place_of(&String::from_utf8_lossy(start), start.len());
        let problem = "this is not UTF-8: save the file as UTF-8".to_owned();
        FileError { file: Arc::clone(file), place: Some(place), key: None, problem }
    })
}

fn document<'t>(file: &Arc<Path>, text: &'t str) -> Result<Document<&'t str>, FileError> {
    Document::parse(text).map_err(|error| {
        let place = error.span().map(|span| place_of(text, span.start));
        let key = error.span().and_then(|span| text.get(span)).filter(|_| is_duplicate(&error));
        let problem = match key {
            Some(_) => "stands here a second time: remove one".to_owned(),
            None => format!("this is no TOML: {}", error.message()),
        };
        let key = key.map(str::to_owned);
        FileError { file: Arc::clone(file), place, key, problem }
    })
}

fn is_duplicate(error: &toml_edit::TomlError) -> bool {
    error.message().starts_with("duplicate key")
}

/// Where the lines of a text are: counted once, as a file of a thousand ports is asked
/// for thousands of places.
struct Lines<'t> {
    text: &'t str,
    /// Where each line begins.
    starts: Vec<usize>,
}

impl<'t> Lines<'t> {
    fn of(text: &'t str) -> Self {
        let behind = text.match_indices('\n').map(|(newline, _)| newline + 1);
        Self { text, starts: std::iter::once(0).chain(behind).collect() }
    }

    /// Line and column of an offset, the first are 1; columns count characters.
    fn place(&self, offset: usize) -> (usize, usize) {
        // A span may end in the middle of what it complains about.
        let offset = offset.min(self.text.len());
        let offset = (0..=offset).rev().find(|at| self.text.is_char_boundary(*at)).unwrap_or(0);
        let line = self.starts.partition_point(|start| *start <= offset);
        let start = line.checked_sub(1).and_then(|line| self.starts.get(line)).copied();
        let before = self.text.get(start.unwrap_or(0)..offset).unwrap_or_default();
        (line, before.chars().count() + 1)
    }
}

/// A place in a text of which no other is asked for.
fn place_of(text: &str, offset: usize) -> (usize, usize) {
    Lines::of(text).place(offset)
}

/// A value as the command line would have it, if the key takes its type. `written`
/// is how it stands in the file.
fn text_of(kinds: Kinds, value: &Value, written: &str) -> Option<String> {
    match value {
        Value::String(text) => Some(text.value().clone()),
        // As written: 0x88a8 is how TPIDs are known.
        Value::Integer(_) if kinds.hexadecimal => Some(written.to_owned()),
        Value::Integer(number) if kinds.integer => Some(number.value().to_string()),
        Value::Boolean(switch) => {
            let [off, on] = kinds.boolean?;
            Some(if *switch.value() { on } else { off }.to_owned())
        }
        _ => None,
    }
}

struct Reader<'t> {
    file: &'t Arc<Path>,
    lines: Lines<'t>,
    errors: Vec<FileError>,
}

/// A key's text and where the value stands.
struct Found {
    key: &'static str,
    text: String,
    span: Option<Range<usize>>,
}

impl Reader<'_> {
    fn refuse(&mut self, span: Option<Range<usize>>, key: &str, problem: String) {
        let place = span.map(|span| self.lines.place(span.start));
        let key = Some(key.to_owned());
        self.errors.push(FileError { file: Arc::clone(self.file), place, key, problem });
    }

    fn document(&mut self, document: &Document<&str>) -> FileConfig {
        let mut config = FileConfig::default();
        let root = document.as_table();
        for (name, item) in root {
            let span = span_of(root, name, item);
            match name {
                UPLINK_TABLE | SWITCH_TABLE => match item.as_table_like() {
                    Some(table) => self.settings(name, table, &mut config),
                    None => {
                        let cure = format!(
                            "write it as a table: a line [{name}], and its keys on the next lines"
                        );
                        self.refuse(span, name, cure);
                    }
                },
                PORT_TABLE => match item.as_array_of_tables() {
                    Some(ports) => {
                        config.ports = ports.iter().filter_map(|table| self.port(table)).collect();
                    }
                    None => {
                        let cure = "write each port under a line [[port]], with two brackets";
                        self.refuse(span, name, cure.to_owned());
                    }
                },
                _ => self.refuse(span, name, schema::unknown(None, name)),
            }
        }
        config
    }

    /// The known keys of a table.
    fn keys(&mut self, section: &str, table: &dyn TableLike) -> Vec<Found> {
        let known = SECTIONS.iter().find(|(name, _)| *name == section).map_or(&[][..], |(_, k)| k);
        let mut found = Vec::new();
        for (name, item) in table.iter() {
            let span = span_of(table, name, item);
            let Some(key) = known.iter().find(|key| key.name == name) else {
                self.refuse(span, name, schema::unknown(Some(section), name));
                continue;
            };
            let written =
                item.span().and_then(|span| self.lines.text.get(span)).unwrap_or_default();
            match item.as_value().and_then(|value| text_of(key.kinds, value, written)) {
                Some(text) => found.push(Found { key: key.name, text, span: item.span() }),
                None => {
                    let span = item.span().or(span);
                    self.refuse(span, name, format!("write {}", key.example));
                }
            }
        }
        found
    }

    fn port(&mut self, table: &toml_edit::Table) -> Option<PortSpec> {
        let faults = self.errors.len();
        let line = |span: Option<Range<usize>>| span.map(|span| self.lines.place(span.start).0);
        let start = line(table.span()).unwrap_or_default();
        let mut spec = PortSpec::new(Origin::File { file: Arc::clone(self.file), line: start });
        for Found { key, text, span } in self.keys(PORT_TABLE, table) {
            let line = span.map(|span| self.lines.place(span.start).0);
            spec.set(key, text, line);
        }
        (self.errors.len() == faults).then_some(spec)
    }

    fn settings(&mut self, section: &str, table: &dyn TableLike, config: &mut FileConfig) {
        for Found { key, text, span } in self.keys(section, table) {
            let result = match key {
                "device" => {
                    let line = span.clone().map_or(0, |span| self.lines.place(span.start).0);
                    config.uplink = Some((text, format!("{}:{line}", self.file.display())));
                    Ok(())
                }
                "tpid" => parse_tpid("tpid", &text)
                    .map(|tpid| config.tpid = Some(tpid))
                    .map_err(|_| format!("{text} is no TPID: write {}", schema::TPIDS)),
                "set-mtu" => guest_mtu(&text).map(|mtu| config.set_mtu = mtu),
                "datapath" => word(&text).map(|datapath| config.datapath = Some(datapath)),
                "workers" => text
                    .parse()
                    .map(|workers| config.workers = Some(workers))
                    .map_err(|error| format!("{error}")),
                "cpus" => text
                    .parse()
                    .map(|cpus| config.cpus = Some(cpus))
                    .map_err(|error| format!("{error}")),
                "rebalance" => word(&text).map(|rebalance| config.rebalance = Some(rebalance)),
                "poll" => word(&text).map(|poll| config.poll = Some(poll)),
                "ring-size" => text
                    .parse()
                    .map(|size| config.ring_size = Some(size))
                    .map_err(|error| format!("{error}")),
                "control" => text
                    .parse()
                    .map(|control| config.control = Some(control))
                    .map_err(|error| format!("{error}")),
                "metrics" => text
                    .parse()
                    .map(|metrics| config.metrics = Some(metrics))
                    .map_err(|error| format!("{error}")),
                "user" if text.is_empty() => Err("it is empty: name a user".to_owned()),
                "user" => {
                    config.user = Some(text);
                    Ok(())
                }
                "sandbox" => word(&text).map(|mode: SandboxMode| config.sandbox = Some(mode)),
                _ => word(&text).map(|format| config.log_format = Some(format)),
            };
            if let Err(problem) = result {
                self.refuse(span, key, problem);
            }
        }
    }
}

/// Where a key stands, else its value.
fn span_of(table: &dyn TableLike, name: &str, item: &Item) -> Option<Range<usize>> {
    table.key(name).and_then(toml_edit::Key::span).or_else(|| item.span())
}

fn guest_mtu(text: &str) -> Result<Option<u32>, String> {
    match text {
        "no" => Ok(None),
        "yes" => guest_mtu(GUEST_MTU),
        _ => match text.parse() {
            Ok(mtu) if GUEST_MTUS.contains(&mtu) => Ok(Some(mtu)),
            _ => Err(format!(
                "{text} is no guest MTU: write a number from {} to {}, or true for {GUEST_MTU}",
                GUEST_MTUS.start(),
                GUEST_MTUS.end()
            )),
        },
    }
}
