//! What is different between two configurations: pure comparison, no action.

use super::Config;
use crate::control::mapping::PortConfig;
use std::collections::HashMap;
use thiserror::Error;

/// The ports of two configurations, by device.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct PortDiff<'c> {
    /// Only in the old one, in its order.
    pub removed: Vec<&'c PortConfig>,
    /// In both and different: old and new, in the order of the new.
    pub changed: Vec<(&'c PortConfig, &'c PortConfig)>,
    /// Only in the new one, in its order.
    pub added: Vec<&'c PortConfig>,
    /// The same in both, in the order of the new; where they were written may differ.
    pub unchanged: Vec<&'c PortConfig>,
}

impl PortDiff<'_> {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.removed.is_empty() && self.changed.is_empty() && self.added.is_empty()
    }
}

/// Compares ports by device; each list names a device once, as those of a [`Config`]
/// do.
pub fn ports<'c>(old: &'c [PortConfig], new: &'c [PortConfig]) -> PortDiff<'c> {
    let mut before: HashMap<&str, &PortConfig> =
        old.iter().map(|port| (port.device.as_str(), port)).collect();
    let mut diff = PortDiff::default();
    for port in new {
        match before.remove(port.device.as_str()) {
            None => diff.added.push(port),
            Some(old) if old == port => diff.unchanged.push(port),
            Some(old) => diff.changed.push((old, port)),
        }
    }
    diff.removed.extend(old.iter().filter(|port| before.contains_key(port.device.as_str())));
    diff
}

/// A setting that would have to change and cannot while the switch runs.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{key} under [{section}] is {old} in the running switch and would become {new}: restart \
     vlanswitchd to change it, or take it back"
)]
pub struct FixedSetting {
    /// The table of the file.
    pub section: &'static str,
    /// The key in it.
    pub key: &'static str,
    /// Its value now.
    pub old: String,
    /// The value asked for.
    pub new: String,
}

/// The settings that differ and need a restart.
pub fn fixed_settings(old: &Config, new: &Config) -> Vec<FixedSetting> {
    let (old, new) = (old.settings(), new.settings());
    let pairs = old.into_iter().zip(new);
    pairs
        .filter(|(old, new)| !old.live && old.value != new.value)
        .map(|(old, new)| FixedSetting {
            section: old.section,
            key: old.key,
            old: old.value,
            new: new.value,
        })
        .collect()
}
