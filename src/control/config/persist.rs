//! One change to a `[[port]]` of the operator's own file.
//!
//! The file is edited, not written anew: comments, order and spelling stay, and a key
//! that means the same before and after is not touched. The result is read back
//! before it replaces the file, and replaces it at once (a temporary file beside it,
//! synced, renamed over it), so a crash leaves the old or the new file, never half
//! of one. A file with faults is refused: an edit could hide them.

use super::file::{self, FileError};
use super::schema::{PORT_TABLE, value_for};
use super::show;
use crate::control::mapping::{self, MapError, PortConfig, Uplink};
use crate::frame::Tpid;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::Builder;
use thiserror::Error;
use toml_edit::{ArrayOfTables, DocumentMut, Item, RawString, Table};

/// A change to the ports of a file.
#[derive(Debug, Clone, Copy)]
pub enum Change<'c> {
    /// A port more, behind the others.
    Add(&'c PortConfig),
    /// The port of this device as given here.
    Set(&'c PortConfig),
    /// No port with this device.
    Remove(&'c str),
}

/// Why a file was not changed.
#[derive(Debug, Error)]
pub enum PersistError {
    /// There is none.
    #[error(
        "{0}: there is no such file: create it (it may be empty), or start vlanswitchd with \
         --config FILE"
    )]
    NoFile(PathBuf),
    /// It cannot be read or written.
    #[error("{file}: cannot {step}: {source}", file = .file.display())]
    Io {
        /// The file.
        file: PathBuf,
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// It has a fault.
    #[error("{0}: mend this first, or make the change by hand")]
    Fault(FileError),
    /// Its ports would not go together.
    #[error("{0}: the change would make the file one that is refused; mend it by hand")]
    Refused(MapError),
    /// The port to change or remove is not there.
    #[error(
        "{file}: no [[port]] has device {device}: if it comes from --map, change the command line",
        file = .file.display()
    )]
    NotThere {
        /// The file.
        file: PathBuf,
        /// The device.
        device: String,
    },
    /// The port to add is there.
    #[error(
        "{file}: a [[port]] has device {device} already: `vlanswitchctl config reload` takes it \
         from there, `port set` changes it", file = .file.display()
    )]
    There {
        /// The file.
        file: PathBuf,
        /// The device.
        device: String,
    },
    /// The edited text does not say what was asked for.
    #[error("{}: cannot be edited without losing something: make the change by hand", .0.display())]
    NotEditable(PathBuf),
}

/// Makes one change in a file. `default_tpid` is the one in force, which the
/// command line may have set over the file. With `create` a file that does not
/// exist is made.
///
/// # Errors
/// [`PersistError`]; the file is then as it was.
pub fn persist(
    path: &Path,
    change: Change<'_>,
    default_tpid: Tpid,
    create: bool,
) -> Result<(), PersistError> {
    let failed = |step| move |source| PersistError::Io { file: path.to_owned(), step, source };
    // The file a link leads to is replaced, not the link.
    let target = match fs::canonicalize(path) {
        Ok(target) => Some(target),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed("be found")(error)),
    };
    let before = match &target {
        Some(target) => fs::read_to_string(target).map_err(failed("be read"))?,
        None if create => String::new(),
        None => return Err(PersistError::NoFile(path.to_owned())),
    };
    let after = edit(path, &before, change, default_tpid)?;
    replace(target.as_deref().unwrap_or(path), &after).map_err(failed("be written"))
}

/// The text of a file with one change made; the path is for errors.
///
/// # Errors
/// [`PersistError`], but none of the file system.
pub fn edit(
    path: &Path,
    before: &str,
    change: Change<'_>,
    default_tpid: Tpid,
) -> Result<String, PersistError> {
    let device = match change {
        Change::Add(port) | Change::Set(port) => port.device.as_str(),
        Change::Remove(device) => device,
    };
    let ports = read_ports(path, before, default_tpid)?;
    let position = ports.iter().position(|port| port.device == device);
    let not_editable = || PersistError::NotEditable(path.to_owned());
    let mut document: DocumentMut = before.parse().map_err(|_| not_editable())?;
    match (change, position) {
        (Change::Add(port), None) => {
            add(&mut document, port, default_tpid).ok_or_else(not_editable)?;
        }
        (Change::Add(_), Some(_)) => {
            let (file, device) = (path.to_owned(), device.to_owned());
            return Err(PersistError::There { file, device });
        }
        (Change::Set(port), Some(position)) => {
            let old = ports.get(position).ok_or_else(not_editable)?;
            let table = table_at(&mut document, position).ok_or_else(not_editable)?;
            set(table, old, port, default_tpid);
        }
        (Change::Remove(_), Some(position)) => {
            remove(&mut document, position).ok_or_else(not_editable)?;
        }
        (Change::Set(_) | Change::Remove(_), None) => {
            let (file, device) = (path.to_owned(), device.to_owned());
            return Err(PersistError::NotThere { file, device });
        }
    }
    let after = with_line_ends_of(before, document.to_string());
    // Proof instead of trust: what was asked for, and all other ports as they were.
    let mut expected = ports;
    match (change, position) {
        (Change::Set(port), Some(position)) => {
            if let Some(place) = expected.get_mut(position) {
                place.clone_from(port);
            }
        }
        (Change::Remove(_), Some(position)) => {
            expected.remove(position);
        }
        (change, _) => expected.extend(match change {
            Change::Add(port) => Some(port.clone()),
            _ => None,
        }),
    }
    if read_ports(path, &after, default_tpid)? == expected {
        Ok(after)
    } else {
        Err(not_editable())
    }
}

fn read_ports(path: &Path, text: &str, tpid: Tpid) -> Result<Vec<PortConfig>, PersistError> {
    let file: Arc<Path> = path.into();
    let (config, faults) = file::parse(&file, text.as_bytes());
    if let Some(fault) = faults.into_iter().next() {
        return Err(PersistError::Fault(fault));
    }
    let uplink = config.uplink.as_ref().map(|(device, place)| Uplink { device, place });
    match mapping::build_all(&config.ports, uplink, tpid) {
        Ok((ports, _)) => Ok(ports),
        Err(errors) => Err(errors
            .into_iter()
            .next()
            .map_or_else(|| PersistError::NotEditable(path.to_owned()), PersistError::Refused)),
    }
}

/// `toml_edit` writes lines that it makes with a bare newline.
fn with_line_ends_of(before: &str, after: String) -> String {
    let windows = before.contains("\r\n") && !before.replace("\r\n", "").contains('\n');
    if windows { after.replace("\r\n", "\n").replace('\n', "\r\n") } else { after }
}

fn table_at(document: &mut DocumentMut, position: usize) -> Option<&mut Table> {
    document.get_mut(PORT_TABLE)?.as_array_of_tables_mut()?.get_mut(position)
}

fn text_of(raw: Option<&RawString>) -> &str {
    raw.and_then(RawString::as_str).unwrap_or_default()
}

/// The last table of the document in its written order.
fn last_position(document: &DocumentMut) -> Option<isize> {
    let tables = document.iter().flat_map(|(_, item)| match item {
        Item::Table(table) => vec![table.position()],
        Item::ArrayOfTables(tables) => tables.iter().map(Table::position).collect(),
        _ => Vec::new(),
    });
    tables.flatten().max()
}

fn add(document: &mut DocumentMut, port: &PortConfig, default_tpid: Tpid) -> Option<()> {
    let mut table = Table::new();
    for (key, text) in show::keys(port, default_tpid) {
        table.insert(key, Item::Value(value_for(PORT_TABLE, key, &text)));
    }
    // Behind all that is there, comments at the end of the file included.
    let trailing = text_of(Some(document.trailing())).to_owned();
    let empty = document.is_empty() && trailing.is_empty();
    let gap = if empty { "" } else { "\n" };
    let newline = if trailing.is_empty() || trailing.ends_with('\n') { "" } else { "\n" };
    document.set_trailing("");
    table.decor_mut().set_prefix(format!("{trailing}{newline}{gap}"));
    table.set_position(Some(last_position(document).map_or(1, |last| last + 1)));
    let ports = document.entry(PORT_TABLE);
    ports
        .or_insert(Item::ArrayOfTables(ArrayOfTables::new()))
        .as_array_of_tables_mut()?
        .push(table);
    Some(())
}

/// Changes the keys whose meaning changes. A key that said the default stays if it
/// still says the default.
fn set(table: &mut Table, old: &PortConfig, new: &PortConfig, default_tpid: Tpid) {
    let (before, after) = (show::keys(old, default_tpid), show::keys(new, default_tpid));
    let find = |keys: &[(&str, String)], key: &str| {
        keys.iter().find(|(other, _)| *other == key).map(|(_, text)| text.clone())
    };
    for (key, text) in &after {
        if find(&before, key).as_ref() != Some(text) {
            put(table, key, text);
        }
    }
    // What said a default, or no longer goes with the rest.
    let kind_stays = std::mem::discriminant(old.membership.vlans())
        == std::mem::discriminant(new.membership.vlans())
        && old.kind == new.kind;
    let names: Vec<String> = table.iter().map(|(key, _)| key.to_owned()).collect();
    for name in names {
        let wanted = find(&after, &name).is_some();
        let said_default = find(&before, &name).is_none();
        let stays = wanted || (said_default && kind_stays);
        if !stays {
            table.remove(&name);
        }
    }
}

/// Gives a key a value, with the spaces and the comment around the old one.
fn put(table: &mut Table, key: &str, text: &str) {
    let mut value = value_for(PORT_TABLE, key, text);
    match table.get_mut(key).and_then(Item::as_value_mut) {
        Some(old) => {
            *value.decor_mut() = old.decor().clone();
            *old = value;
        }
        None => {
            table.insert(key, Item::Value(value));
        }
    }
}

/// Takes a port away with the comment right above it; what stands further above,
/// behind an empty line, goes to what follows.
fn remove(document: &mut DocumentMut, position: usize) -> Option<()> {
    let ports = document.get_mut(PORT_TABLE)?.as_array_of_tables_mut()?;
    let gone = ports.remove(position);
    let none_left = ports.is_empty();
    let prefix = text_of(gone.decor().prefix());
    let kept = prefix.rfind("\n\n").and_then(|gap| prefix.get(..=gap)).unwrap_or_default();
    let kept = if kept.trim().is_empty() { String::new() } else { kept.to_owned() };
    let place = gone.position()?;
    if none_left {
        document.remove(PORT_TABLE);
    }
    match next_table(document, place) {
        Some(next) => {
            let prefix = format!("{kept}{}", text_of(next.decor().prefix()));
            // The first line of a file is not empty.
            next.decor_mut().set_prefix(prefix);
        }
        None => {
            let trailing = format!("{kept}{}", text_of(Some(document.trailing())));
            document.set_trailing(trailing);
        }
    }
    Some(())
}

fn next_table(document: &mut DocumentMut, place: isize) -> Option<&mut Table> {
    let tables = document.iter_mut().flat_map(|(_, item)| match item {
        Item::Table(table) => vec![table],
        Item::ArrayOfTables(tables) => tables.iter_mut().collect(),
        _ => Vec::new(),
    });
    tables
        .filter(|table| table.position().is_some_and(|position| position > place))
        .min_by_key(|table| table.position())
}

/// Replaces a file at once, with the owner and mode of the old one.
fn replace(target: &Path, text: &str) -> io::Result<()> {
    let folder = target.parent().filter(|folder| !folder.as_os_str().is_empty());
    let folder = folder.unwrap_or(Path::new("."));
    let mut temporary = Builder::new().prefix(".vlanswitchd-").tempfile_in(folder)?;
    temporary.write_all(text.as_bytes())?;
    let file = temporary.as_file();
    match fs::metadata(target) {
        Ok(old) => {
            let now = file.metadata()?;
            if (now.uid(), now.gid()) != (old.uid(), old.gid()) {
                fchown(file, Some(old.uid()), Some(old.gid()))?;
            }
            file.set_permissions(fs::Permissions::from_mode(old.mode() & 0o7777))?;
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            file.set_permissions(fs::Permissions::from_mode(0o644))?;
        }
        Err(error) => return Err(error),
    }
    file.sync_all()?;
    temporary.persist(target).map_err(|error| error.error)?;
    File::open(folder)?.sync_all()
}
