//! `--check`: what the host says to a configuration, without privileges and without
//! changing anything.

use super::Config;
use crate::control::affinity;
use crate::control::checks;
use crate::control::links::LinkMonitor;
use crate::control::start_error::StartError;
use tracing::warn;

/// Looks at devices and CPUs as a start would; the CPUs are those this process may use. One that is not there is only warned
/// about: a configuration may be written before the hardware is in, or elsewhere.
/// Returns the line that says all is well.
///
/// # Errors
/// A [`StartError`] for each device that is there and cannot be used, for names that
/// cannot be created, and for a CPU that cannot be used.
pub fn host(config: &Config) -> Result<String, Vec<StartError>> {
    let monitor = LinkMonitor::new().map_err(|error| vec![error.into()])?;
    let links = monitor.links();
    let mut errors: Vec<StartError> = affinity::plan(config).err().into_iter().collect();
    match checks::uplink(config, links) {
        Err(error @ StartError::NoUplink(_)) => warn!("{error}"),
        Err(error) => errors.push(error),
        Ok(()) => {
            checks::say_uplink_mtu(config, links);
            errors.extend(checks::vlan_devices(config, config.table.claims(), links).err());
        }
    }
    errors.extend(config.ports.iter().filter_map(|port| checks::port(port, links).err()));
    if errors.is_empty() { Ok(summary(config)) } else { Err(errors) }
}

fn summary(config: &Config) -> String {
    let source = config
        .file
        .as_ref()
        .map_or_else(|| "command line".to_owned(), |file| file.display().to_string());
    let ports = config.ports.len();
    let plural = if ports == 1 { "" } else { "s" };
    format!("{source}: ok, uplink {}, {ports} port{plural}", config.uplink)
}
