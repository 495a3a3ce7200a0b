//! The keys of the configuration file: one table for reading, for writing, and for
//! saying what would have been right.

use crate::control::mapping::{DEVICE, VLAN};
use toml_edit::Value;

pub(super) const UPLINK_TABLE: &str = "uplink";
pub(super) const SWITCH_TABLE: &str = "switch";
pub(super) const PORT_TABLE: &str = "port";
pub(super) const TPIDS: &str = "0x8100, 0x88a8, 0x9100 or 0x9200";

/// Which TOML types a key takes beside strings.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kinds {
    pub(super) integer: bool,
    /// An integer whose text counts, not its value.
    pub(super) hexadecimal: bool,
    /// What `false` and `true` stand for.
    pub(super) boolean: Option<[&'static str; 2]>,
}

/// A key.
#[derive(Debug)]
pub(super) struct Key {
    pub(super) name: &'static str,
    pub(super) kinds: Kinds,
    /// What can be written.
    pub(super) example: &'static str,
}

const TEXT: Kinds = Kinds { integer: false, hexadecimal: false, boolean: None };
const NUMBER: Kinds = Kinds { integer: true, ..TEXT };
const TPID: Kinds = Kinds { hexadecimal: true, ..TEXT };
const YES_NO: Kinds = Kinds { boolean: Some(["no", "yes"]), ..TEXT };
const MTU: Kinds = Kinds { integer: true, ..YES_NO };
const ON_OFF: Kinds = Kinds { boolean: Some(["off", "on"]), ..TEXT };
const OFF_AUTO: Kinds = Kinds { boolean: Some(["off", "auto"]), ..TEXT };

const fn key(name: &'static str, kinds: Kinds, example: &'static str) -> Key {
    Key { name, kinds, example }
}

const UPLINK_KEYS: &[Key] = &[
    key("device", TEXT, "a name in quotes, such as \"eth0\""),
    key("tpid", TPID, TPIDS),
    key("set-mtu", MTU, "the guests' MTU, such as 1500, or true"),
];
const SWITCH_KEYS: &[Key] = &[
    key("datapath", TEXT, "\"auto\", \"packet\" or \"kernel\""),
    key("workers", NUMBER, "a number from 1 to 64, or \"auto\""),
    key("cpus", NUMBER, "a number, or in quotes a list such as \"2-5,8\""),
    key("rebalance", ON_OFF, "\"on\" or \"off\""),
    key("poll", TEXT, "\"adaptive\", \"busy\" or \"sleep\""),
    key("ring-size", NUMBER, "bytes in quotes, such as \"512k\" or \"4M\", or \"auto\""),
    key("control", TEXT, "a path in quotes, or \"none\""),
    key("metrics", NUMBER, "an address in quotes, such as \"127.0.0.1:9101\", a port, or \"none\""),
    key("user", NUMBER, "a user's name in quotes, or number"),
    key("sandbox", ON_OFF, "\"on\", \"log\" or \"off\""),
    key("log-format", TEXT, "\"text\" or \"json\""),
];
const PORT_KEYS: &[Key] = &[
    key(VLAN, NUMBER, "101, or in quotes \"200-210,300\" or \"101.20\""),
    key(DEVICE, TEXT, "a name in quotes, such as \"tap-web1\" or \"internal:mgmt0\""),
    key("mode", TEXT, "\"tunnel\", \"access\" or \"trunk\""),
    key("native", NUMBER, "a VLAN of the list, such as 200"),
    key("tpid", TPID, TPIDS),
    key("inner-tpid", TPID, TPIDS),
    key("pcp", NUMBER, "a number from 0 to 7, or \"copy\""),
    key("create", YES_NO, "true or false"),
    key("owner", NUMBER, "a user's name in quotes, or number"),
    key("group", NUMBER, "a group's name in quotes, or number"),
    key("queues", NUMBER, "a number from 1 to 256"),
    key("offload", OFF_AUTO, "\"off\" or \"auto\""),
    key("rate", NUMBER, "bits a second, such as \"100M\" or \"1.5G\""),
    key("burst", NUMBER, "bytes, such as \"200k\" or \"1M\""),
    key("storm", NUMBER, "broadcasts and multicasts a second, such as 1000"),
    key("mac", TEXT, "addresses in quotes, such as \"52:54:00:12:34:56\", with + between two"),
];
/// The tables and their keys.
pub(super) const SECTIONS: [(&str, &[Key]); 3] =
    [(UPLINK_TABLE, UPLINK_KEYS), (SWITCH_TABLE, SWITCH_KEYS), (PORT_TABLE, PORT_KEYS)];

/// How the line of a table looks.
fn header(section: &str) -> String {
    if section == PORT_TABLE { "[[port]]".to_owned() } else { format!("[{section}]") }
}

/// What to say of a key that is not known in a table, or at the top of the file.
pub(super) fn unknown(section: Option<&str>, name: &str) -> String {
    let keys = SECTIONS.iter().find(|(one, _)| Some(*one) == section).map(|(_, keys)| *keys);
    let known: Vec<&str> = match keys {
        Some(keys) => keys.iter().map(|key| key.name).collect(),
        None => SECTIONS.iter().map(|(name, _)| *name).collect(),
    };
    let place = section.map_or_else(
        || "outside of the tables".to_owned(),
        |section| format!("in {}", header(section)),
    );
    let start = format!("no such key {place}");
    // clap's measure for its own suggestions.
    let nearest = known
        .iter()
        .map(|key| (strsim::jaro(key, name), *key))
        .filter(|(likeness, _)| *likeness > 0.7)
        .max_by(|(one, _), (other, _)| one.total_cmp(other));
    let elsewhere = SECTIONS.iter().find(|(_, keys)| keys.iter().any(|key| key.name == name));
    match (elsewhere, nearest) {
        (Some((section, _)), _) => format!("{start}: move it under {}", header(section)),
        (None, Some((_, key))) if section.is_none() => {
            format!("{start}: did you mean {}?", header(key))
        }
        (None, Some((_, key))) => format!("{start}: did you mean {key}?"),
        (None, None) if section.is_none() => {
            let tables: Vec<String> = known.iter().map(|name| header(name)).collect();
            format!("{start}: the tables are {}", tables.join(", "))
        }
        (None, None) => format!("{start}: the keys are {}", known.join(", ")),
    }
}

/// A key's text as a person would write it in the file: numbers without quotes,
/// `create = false`.
pub(super) fn value_for(section: &str, name: &str, text: &str) -> Value {
    let keys = SECTIONS.iter().find(|(one, _)| *one == section).map_or(&[][..], |(_, keys)| keys);
    let kinds = keys.iter().find(|key| key.name == name).map_or(TEXT, |key| key.kinds);
    let yes_no = kinds.boolean.filter(|words| words.contains(&"no"));
    if let Some([off, on]) = yes_no
        && (text == off || text == on)
    {
        return Value::from(text == on);
    }
    match text.parse::<i64>() {
        Ok(number) if kinds.integer && number.to_string() == text => Value::from(number),
        _ => Value::from(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Documents about the file, and how a key looks in them.
    #[test]
    fn every_key_is_documented() {
        let page = include_str!("../../../dist/man/vlanswitchd.toml.5").replace("\\-", "-");
        let chapter = include_str!("../../../docs/configuration.md");
        let example = include_str!("../../../dist/vlanswitchd.toml");
        for (section, keys) in SECTIONS {
            let section_start = page.find(&format!(".SH {}\n", header(section)));
            let page = section_start.and_then(|start| page.get(start..)).unwrap_or_default();
            for Key { name, .. } in keys {
                let bold = |line: &str| {
                    line.starts_with(".B") && line.split([' ', ',', '"']).any(|word| word == *name)
                };
                let listed = page.lines().take_while(|line| *line != ".SH EXAMPLE").any(bold);
                assert!(listed, "vlanswitchd.toml(5): [{section}] has no {name}");
                let options = [format!("`{name}`"), format!("`{name}="), format!("`--{name}")];
                let shown = options.iter().any(|option| chapter.contains(option));
                assert!(shown, "docs/configuration.md: no {name} of [{section}]");
                let set = |line: &str| {
                    line.trim_start_matches('#').split(" =").next().is_some_and(|key| key == *name)
                };
                assert!(example.lines().any(set), "dist/vlanswitchd.toml: no {name}");
            }
        }
    }
}
