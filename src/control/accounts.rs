//! Users and groups by name, also inside the sandbox.
//!
//! Before it libc is asked (NSS), which may load modules and talk to servers, LDAP say:
//! none of that is possible inside, where the names found before still count, and
//! otherwise /etc/passwd and /etc/group. A number always works. A program that is linked
//! statically cannot load glibc's modules (it crashes in some that are usual, systemd's for
//! one), so it reads the files from the start.

use nix::unistd::{Group, User};
use std::collections::BTreeMap;
use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Kinds of accounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// A user.
    User,
    /// A group.
    Group,
}

#[derive(Debug)]
struct Known {
    confined: bool,
    ids: BTreeMap<(Kind, String), u32>,
}

static KNOWN: Mutex<Known> = Mutex::new(Known { confined: false, ids: BTreeMap::new() });

fn known() -> MutexGuard<'static, Known> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The number of a user or group; `None` if there is no such name.
pub fn id(kind: Kind, name: &str) -> Option<u32> {
    if !known().confined && !cfg!(target_feature = "crt-static") {
        let id = match kind {
            Kind::User => User::from_name(name).ok().flatten().map(|user| user.uid.as_raw()),
            Kind::Group => Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw()),
        }?;
        known().ids.insert((kind, name.to_owned()), id);
        return Some(id);
    }
    let file = match kind {
        Kind::User => "/etc/passwd",
        Kind::Group => "/etc/group",
    };
    let text = fs::read(file).unwrap_or_default();
    in_file(&String::from_utf8_lossy(&text), name)
        .or_else(|| known().ids.get(&(kind, name.to_owned())).copied())
}

/// Asks libc no more: from now on this process is confined.
pub fn confine() {
    known().confined = true;
}

/// passwd(5) and group(5) both have the name first and the number third.
fn in_file(text: &str, name: &str) -> Option<u32> {
    text.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.next() == Some(name);
        fields.nth(1).filter(|_| found)?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_read_as_libc_reads_it() {
        for (kind, file) in [(Kind::User, "/etc/passwd"), (Kind::Group, "/etc/group")] {
            let text = fs::read_to_string(file).unwrap_or_default();
            let names = text.lines().filter_map(|line| line.split(':').next());
            let names: Vec<&str> = names.filter(|name| !name.starts_with(['+', '-'])).collect();
            assert!(names.contains(&"root"), "{names:?}");
            for name in names {
                assert_eq!(in_file(&text, name), id(kind, name), "{name}");
            }
        }
        assert_eq!(in_file("web:x:70:\nroot:x:0:0", "we"), None);
        assert_eq!(in_file("web:x::\nweb\n", "web"), None);
    }
}
