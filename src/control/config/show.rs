//! A configuration as a file.

use super::schema::{PORT_TABLE, value_for};
use super::{Config, Setting};
use crate::control::mapping::{DEVICE, PortConfig, VLAN};
use crate::frame::Tpid;
use std::fmt::Write as _;

/// The configuration as TOML that reads back as the same: what differs from the
/// defaults, ports in their order.
pub fn to_toml(config: &Config) -> String {
    let mut text = String::new();
    let mut section = "";
    let settings = config.settings();
    for Setting { section: table, key, value, .. } in settings.iter().filter(|one| one.is_set()) {
        if section != *table {
            let gap = if section.is_empty() { "" } else { "\n" };
            let _ = writeln!(text, "{gap}[{table}]");
            section = table;
        }
        let _ = writeln!(text, "{key} = {}", value_for(table, key, value));
    }
    for port in &config.ports {
        let _ = writeln!(text, "\n[[{PORT_TABLE}]]");
        for (key, value) in keys(port, config.tpid) {
            let _ = writeln!(text, "{key} = {}", value_for(PORT_TABLE, key, &value));
        }
    }
    text
}

impl Setting {
    /// Whether it has another value than its default.
    pub fn is_set(&self) -> bool {
        self.default.as_ref() != Some(&self.value)
    }
}

/// The keys of a port's table with their texts, in the order people write them.
pub(super) fn keys(port: &PortConfig, default_tpid: Tpid) -> Vec<(&'static str, String)> {
    let mut keys = vec![(VLAN, port.vlan()), (DEVICE, port.device_text())];
    keys.extend(port.options(default_tpid));
    keys
}
