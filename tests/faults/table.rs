//! The tables of docs/faults.md, as a reader sees them.

use nix::errno::Errno;
use std::sync::LazyLock;
use vlanswitchd::switch::DropReason;

const DOCUMENT: &str = include_str!("../../docs/faults.md");

/// A row of the first table.
#[derive(Debug, Clone, Copy)]
pub struct Send {
    pub errno: Errno,
    pub to_guest: DropReason,
    pub to_wire: DropReason,
}

/// A row of the second table.
#[derive(Debug, Clone)]
pub struct Other {
    pub call: &'static str,
    pub errno: Errno,
    pub counted: Option<DropReason>,
}

fn rows(columns: &str) -> impl Iterator<Item = Vec<&'static str>> {
    let (_, rest) = DOCUMENT.split_once(columns).expect("the table");
    let lines = rest.lines().skip(2).take_while(|line| line.starts_with('|'));
    lines.map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
}

/// The first word in code style.
fn code(cell: &'static str) -> Option<&'static str> {
    cell.split('`').nth(1)
}

fn errno(cell: &'static str) -> Errno {
    let name = code(cell).expect("an error");
    let known = (1..134).map(Errno::from_raw).find(|errno| format!("{errno:?}") == name);
    known.unwrap_or_else(|| panic!("{name} is no error"))
}

fn reason(cell: &'static str) -> Option<DropReason> {
    let name = code(cell)?;
    let known = DropReason::ALL.into_iter().find(|reason| reason.name() == name);
    Some(known.unwrap_or_else(|| panic!("{name} is no reason")))
}

pub fn sends() -> &'static [Send] {
    static ROWS: LazyLock<Vec<Send>> = LazyLock::new(read_sends);
    &ROWS
}

fn read_sends() -> Vec<Send> {
    let rows: Vec<Send> = rows("| error | it means | to a guest | to the wire | then |")
        .map(|row| Send {
            errno: errno(row[0]),
            to_guest: reason(row[2]).expect("a reason"),
            to_wire: reason(row[3]).expect("a reason"),
        })
        .collect();
    assert!(rows.len() > 10, "{rows:?}");
    rows
}

pub fn others(call: &str) -> Vec<Other> {
    let rows: Vec<Other> = rows("| call | error | it means | then | counted as |")
        .map(|row| Other {
            call: code(row[0]).expect("a call"),
            errno: errno(row[1]),
            counted: reason(row[4]),
        })
        .filter(|row| row.call == call)
        .collect();
    assert!(!rows.is_empty(), "no row for {call}");
    rows
}
