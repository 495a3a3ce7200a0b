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
use crate::control::mapping::{self, DeviceKind, MapError, PortConfig, Uplink};
use crate::frame::Tpid;
use crate::sys::sandbox::Call;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tempfile::Builder;
use thiserror::Error;
use toml_edit::{ArrayOfTables, DocumentMut, Item, RawString, Table};

/// What reading the file, and writing it anew, takes.
pub const CALLS: &[Call] = &[
    Call::any(libc::SYS_openat),
    Call::any(libc::SYS_read),
    Call::any(libc::SYS_lseek),
    Call::any(libc::SYS_statx),
    Call::any(libc::SYS_newfstatat),
    Call::any(libc::SYS_fstat),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_stat),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_lstat),
    // The file a link leads to.
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_readlink),
    Call::any(libc::SYS_readlinkat),
    Call::any(libc::SYS_getcwd),
    // A temporary file beside it, that takes its place.
    Call::any(libc::SYS_fchmod),
    Call::any(libc::SYS_fchown),
    Call::any(libc::SYS_fsync),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_rename),
    Call::any(libc::SYS_renameat),
    Call::any(libc::SYS_renameat2),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_unlink),
    Call::any(libc::SYS_unlinkat),
];

fn io_cure(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; let vlanswitchd write in this folder (under systemd ReadWritePaths=), or make the \
             change by hand"
        }
        _ => "",
    }
}

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
    #[error("{file}: cannot {step}: {source}{}", io_cure(.source), file = .file.display())]
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
    /// One of its ports has a fault.
    #[error("{0}: mend this first, or make the change by hand")]
    PortFault(Box<MapError>),
    /// The change does not go with what else is in it.
    #[error("{error}; {file} is as it was", file = .file.display())]
    Clash {
        /// The file.
        file: PathBuf,
        /// What does not go.
        error: Box<MapError>,
    },
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

type Read = (Vec<PortConfig>, Option<(String, String)>);

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
    let (ports, uplink) = read_ports(path, before, default_tpid)?;
    let position = ports.iter().position(|port| port.device == device);
    let not_editable = || PersistError::NotEditable(path.to_owned());
    let mut document: DocumentMut = before.parse().map_err(|_| not_editable())?;
    let expected = after_change(ports.clone(), change, position);
    let uplink = uplink.as_ref().map(|(device, place)| Uplink { device, place });
    if let Err(error) = mapping::compile(&expected, uplink) {
        let error = error.into_iter().next().map(Box::new).ok_or_else(not_editable)?;
        return Err(PersistError::Clash { file: path.to_owned(), error });
    }
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
    if read_ports(path, &after, default_tpid)?.0 == expected {
        Ok(after)
    } else {
        Err(not_editable())
    }
}

/// The ports as they are to be.
fn after_change(
    mut ports: Vec<PortConfig>,
    change: Change<'_>,
    at: Option<usize>,
) -> Vec<PortConfig> {
    match (change, at.filter(|at| *at < ports.len())) {
        (Change::Add(port) | Change::Set(port), None) => ports.push(port.clone()),
        (Change::Add(port) | Change::Set(port), Some(at)) => {
            ports.splice(at..=at, [port.clone()]);
        }
        (Change::Remove(_), Some(at)) => {
            ports.remove(at);
        }
        (Change::Remove(_), None) => {}
    }
    ports
}

/// The ports of a text without faults, and the uplink with its place.
fn read_ports(path: &Path, text: &str, tpid: Tpid) -> Result<Read, PersistError> {
    let file: Arc<Path> = path.into();
    let (config, faults) = file::parse(&file, text.as_bytes());
    if let Some(fault) = faults.into_iter().next() {
        return Err(PersistError::Fault(fault));
    }
    let uplink = config.uplink.as_ref().map(|(device, place)| Uplink { device, place });
    match mapping::build_all(&config.ports, uplink, tpid) {
        Ok((ports, _)) => Ok((ports, config.uplink)),
        Err(errors) => Err(match errors.into_iter().next() {
            Some(error) => PersistError::PortFault(Box::new(error)),
            None => PersistError::NotEditable(path.to_owned()),
        }),
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
    // What no longer holds; what said a default may stay while that is the default.
    let same_vlans = std::mem::discriminant(old.membership.vlans())
        == std::mem::discriminant(new.membership.vlans());
    let same_kind = is_created(old) == is_created(new)
        && std::mem::discriminant(&old.kind) == std::mem::discriminant(&new.kind);
    let names: Vec<String> = table.iter().map(|(key, _)| key.to_owned()).collect();
    for name in names {
        let same_default = match name.as_str() {
            "create" | "owner" | "group" | "queues" => same_kind,
            _ => same_vlans,
        };
        let said_default = find(&before, &name).is_none() && same_default;
        if find(&after, &name).is_none() && !said_default {
            table.remove(&name);
        }
    }
}

fn is_created(port: &PortConfig) -> bool {
    matches!(port.kind, DeviceKind::Netdev { create: Some(_) })
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

/// Gives a new file the owner and group of the old one, as far as we may: the file of root
/// becomes ours where only the folder lets us write, as packages set it up. Whether it has
/// the group.
fn keep_owner(file: &File, old: &fs::Metadata) -> io::Result<bool> {
    let now = file.metadata()?;
    if (now.uid(), now.gid()) == (old.uid(), old.gid()) {
        return Ok(true);
    }
    let may_not = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
    match fchown(file, Some(old.uid()), Some(old.gid())) {
        Err(error) if may_not(&error) => {}
        done => return done.map(|()| true),
    }
    match fchown(file, None, Some(old.gid())) {
        Err(error) if may_not(&error) => Ok(false),
        done => done.map(|()| true),
    }
}

/// A mode for a file whose group is another one now: it gets no more than everybody.
fn without_group(mode: u32) -> u32 {
    (mode & 0o7707) | (mode & (mode << 3) & 0o070)
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
            let mode = old.mode() & 0o7777;
            let mode = if keep_owner(file, &old)? { mode } else { without_group(mode) };
            file.set_permissions(fs::Permissions::from_mode(mode))?;
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

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::panic,
        clippy::indexing_slicing,
        reason = "tests fail by panicking"
    )]
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::symlink;

    const FILE: &str = "\
# The switch of host 7.

[uplink]
device = \"eth0\"   # to the core

# --- the guests ---

# web
[[port]]
vlan=101 # public
device = 'tap-web1'
mode = \"tunnel\"
owner = \"root\"

# firewall, see ticket 12
[[port]]
device = \"tap-fw\"
vlan = \"200-210\"  # a range
native = 200

[switch]
poll = \"busy\"
# the end
";

    fn port(map: &str) -> PortConfig {
        mapping::parse(map, Tpid::Customer).unwrap()
    }

    fn edited(before: &str, change: Change<'_>) -> String {
        edit(Path::new("v.toml"), before, change, Tpid::Customer)
            .unwrap_or_else(|error| panic!("{error}"))
    }

    /// `FILE` with one piece replaced by another.
    fn file_with(old: &str, new: &str) -> String {
        assert_eq!(FILE.matches(old).count(), 1, "{old}");
        FILE.replace(old, new)
    }

    #[test]
    fn a_port_is_added_behind_everything() {
        let new = port("102=tap-new,owner=root,queues=2,create=yes,tpid=0x88a8,pcp=copy");
        let expected = format!(
            "{FILE}\n[[port]]\nvlan = 102\ndevice = \"tap-new\"\ntpid = \"0x88a8\"\npcp = \"copy\"\n\
             owner = \"root\"\nqueues = 2\n"
        );
        assert_eq!(edited(FILE, Change::Add(&new)), expected);
        let bare = port("0=t,create=no");
        let table = "[[port]]\nvlan = 0\ndevice = \"t\"\ncreate = false\n";
        assert_eq!(edited("", Change::Add(&bare)), table);
        assert_eq!(edited("# mine", Change::Add(&bare)), format!("# mine\n\n{table}"));
    }

    #[test]
    fn only_the_keys_that_change_are_touched() {
        for (map, old, new) in [
            ("111=tap-web1,owner=root", "vlan=101 #", "vlan=111 #"),
            ("101=tap-web1", "owner = \"root\"\n", ""),
            ("101=tap-web1,owner=root,pcp=3", "owner = \"root\"\n", "owner = \"root\"\npcp = 3\n"),
            ("101=tap-web1,owner=root,mode=access", "mode = \"tunnel\"", "mode = \"access\""),
            ("200-211=tap-fw,native=200", "\"200-210\"  #", "\"200-211\"  #"),
            ("7=tap-fw", "vlan = \"200-210\"  # a range\nnative = 200\n", "vlan = 7  # a range\n"),
            ("101=tap-web1,owner=root", "zzz", "zzz"),
        ] {
            let expected = if old == "zzz" { FILE.to_owned() } else { file_with(old, new) };
            assert_eq!(edited(FILE, Change::Set(&port(map))), expected, "{map}");
        }
        // Defaults that were written down and still hold.
        let spoken = "[[port]]\nvlan = 5\ndevice = 't'\ncreate = true\nqueues = 1\npcp = 0\n";
        let after = edited(spoken, Change::Set(&port("6=t")));
        assert_eq!(after, spoken.replace("vlan = 5", "vlan = 6"));
        let after = edited(spoken, Change::Set(&port("5=t,create=no")));
        assert_eq!(after, "[[port]]\nvlan = 5\ndevice = 't'\ncreate = false\npcp = 0\n");
        // And one that no longer holds.
        let expected = file_with("vlan=101 # public", "vlan=\"101-102\" # public")
            .replace("mode = \"tunnel\"\n", "");
        let list = port("101-102=tap-web1,owner=root");
        assert_eq!(edited(FILE, Change::Set(&list)), expected);
    }

    #[test]
    fn a_removed_port_takes_its_own_comment_along_and_no_other() {
        let web = "# web\n[[port]]\nvlan=101 # public\ndevice = 'tap-web1'\nmode = \"tunnel\"\n\
                   owner = \"root\"\n\n";
        assert_eq!(edited(FILE, Change::Remove("tap-web1")), file_with(web, ""));
        let firewall = "# firewall, see ticket 12\n[[port]]\ndevice = \"tap-fw\"\n\
                        vlan = \"200-210\"  # a range\nnative = 200\n\n";
        let without = edited(FILE, Change::Remove("tap-fw"));
        assert_eq!(without, file_with(firewall, ""));
        let neither = edited(&without, Change::Remove("tap-web1"));
        assert!(neither.contains("# --- the guests ---") && neither.contains("# the end"));
        assert!(!neither.contains("port"), "{neither}");
    }

    #[test]
    fn lines_end_as_they_did() {
        let windows = "[uplink]\r\ndevice = 'e'\r\n";
        let after = edited(windows, Change::Add(&port("5=t")));
        assert_eq!(after, format!("{windows}\r\n[[port]]\r\nvlan = 5\r\ndevice = \"t\"\r\n"));
    }

    #[test]
    fn what_cannot_be_is_refused_with_the_cure() {
        let refused = |text: &str, change: Change<'_>| {
            edit(Path::new("v.toml"), text, change, Tpid::Customer).unwrap_err().to_string()
        };
        for (told, expected) in [
            (
                refused(FILE, Change::Remove("x")),
                "no [[port]] has device x: if it comes from --map",
            ),
            (refused(FILE, Change::Set(&port("5=x"))), "no [[port]] has device x"),
            (refused(FILE, Change::Add(&port("5=tap-fw"))), "has device tap-fw already"),
            (
                refused(FILE, Change::Add(&port("205=x"))),
                "socket's 205=x: VLAN 205 (TPID 0x8100) belongs to v.toml:16",
            ),
            (refused(FILE, Change::Add(&port("5=eth0"))), "eth0 is the uplink itself, by v.toml:4"),
            (refused("[x]", Change::Remove("x")), "v.toml:1:2: x: no such key"),
            (refused("[[port]]", Change::Remove("x")), "v.toml:1: vlan is missing"),
        ] {
            assert!(told.contains(expected), "{told}");
        }
    }

    #[test]
    fn a_file_is_replaced_at_once_and_keeps_its_mode_and_links() {
        let folder = tempfile::tempdir().unwrap();
        let (file, link) = (folder.path().join("real.toml"), folder.path().join("link.toml"));
        let new = port("5=t");
        let error = persist(&file, Change::Add(&new), Tpid::Customer, false).unwrap_err();
        assert!(error.to_string().contains("no such file: create it"), "{error}");
        assert!(!file.exists());
        persist(&file, Change::Add(&new), Tpid::Customer, true).unwrap();
        assert_eq!(fs::metadata(&file).unwrap().mode() & 0o7777, 0o644);
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        symlink("real.toml", &link).unwrap();
        let readable = Path::new("/proc/version");
        let error = persist(readable, Change::Add(&new), Tpid::Customer, false).unwrap_err();
        assert!(error.to_string().starts_with("/proc/version:1:"), "{error}");
        let before = fs::metadata(&file).unwrap();
        persist(&link, Change::Set(&port("6=t")), Tpid::Customer, false).unwrap();
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(&file).unwrap(), "[[port]]\nvlan = 6\ndevice = \"t\"\n");
        let after = fs::metadata(&file).unwrap();
        assert_eq!((after.mode(), after.uid()), (before.mode(), before.uid()));
        assert_ne!(after.ino(), before.ino(), "written over, not replaced");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "nothing is left behind");
    }

    #[test]
    fn another_group_gets_no_more_than_everybody() {
        for (mode, expected) in
            [(0o640, 0o600), (0o644, 0o644), (0o664, 0o644), (0o666, 0o666), (0o600, 0o600)]
        {
            assert_eq!(without_group(mode), expected, "{mode:o}");
        }
    }

    proptest! {
        /// `edit` proves its own result; here that it never has to give up, and that
        /// lines of others stay.
        #[test]
        fn changes_leave_the_lines_of_others(
            picks in prop::collection::vec((0..6_u16, 0..3_u8, 0..4_usize), 1..12)
        ) {
            let mut text = FILE.to_owned();
            for (number, change, shape) in picks {
                let device = format!("t{number}");
                let first = 1000 + 10 * number;
                let map = [
                    format!("{first}={device}"),
                    format!("{first}-{}={device},native={first}", first + 4),
                    format!("{first}.5={device},inner-tpid=0x88a8,owner=0"),
                    format!("{first}=internal:{device},mode=access"),
                ][shape].clone();
                let new = port(&map);
                let change = match change {
                    0 => Change::Add(&new),
                    1 => Change::Set(&new),
                    _ => Change::Remove(&device),
                };
                match edit(Path::new("v.toml"), &text, change, Tpid::Customer) {
                    Ok(after) => text = after,
                    Err(PersistError::There { .. } | PersistError::NotThere { .. }) => {}
                    Err(error) => prop_assert!(false, "{}\n{}", error, text),
                }
            }
            for line in FILE.lines() {
                prop_assert!(text.contains(line), "{} is lost in\n{}", line, text);
            }
        }
    }
}
