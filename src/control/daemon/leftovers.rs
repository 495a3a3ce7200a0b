//! Devices a process before could not give back (`control::record`).

use super::paths::pin_folder;
use super::{Daemon, claim_uplink, once_free};
use crate::control::config::Config;
use crate::control::host::{FoundPort, Host};
use crate::control::privileges;
use crate::control::record::{Found, Record};
use crate::control::start_error::StartError;
use crate::dataplane::kernel;
use nix::net::if_::if_nametoindex;
use tracing::warn;

impl Daemon {
    /// Learns what a process that was killed had found, to put that back one day and not
    /// what the devices are like now.
    pub(super) fn learn_from_record(&mut self) {
        let Some(Found { pid, uplink, ports, goes_on, .. }) = self.record.read() else { return };
        self.host.remember(ports, uplink);
        if goes_on {
            return;
        }
        warn!(
            "the vlanswitchd before (process {pid}) did not stop in order: it was killed, or what \
             it left in a service manager's store was dropped: frames were lost, and counters \
             start again{}",
            if self.kernel.is_some() {
                ", but not those of the kernel path, which went on"
            } else {
                ""
            }
        );
    }

    /// Writes down what there is to put back.
    pub(super) fn keep_record(&mut self, goes_on: bool) {
        let uplink = self.uplink.attached.as_ref().map(|(_, _, found)| found);
        let ports = self.ports.iter();
        let found = ports.filter_map(|(_, port)| port.attached.as_ref()?.found.clone());
        let found: Vec<FoundPort> = found.collect();
        self.record.write(uplink, found, goes_on);
    }
}

/// Gives back what a process that has ended left, without a switch. Returns how many
/// devices that was.
///
/// # Errors
/// [`StartError`]: it has not ended, or capabilities are missing.
pub fn give_back(config: &Config) -> Result<usize, StartError> {
    privileges::check()?;
    // A service manager may be about to close the store's.
    let _claim = once_free(true, || claim_uplink(&config.uplink))?;
    let record = Record::beside(config.control.path(), &config.uplink);
    let mut host = Host::new()?;
    let guarded = remove_kernel_path(&config.uplink, &mut host)?;
    let Some(Found { uplink, ports, .. }) = record.read() else { return Ok(guarded) };
    host.remember(ports, uplink);
    let count = host.give_back_remembered();
    record.remove();
    Ok(count.max(guarded))
}

/// Ends what the kernel path still forwards. Returns how many ports that was.
fn remove_kernel_path(uplink: &str, host: &mut Host) -> Result<usize, StartError> {
    let index = |name: &str| if_nametoindex(name).ok();
    let ports = kernel::remove(&pin_folder(uplink), index(uplink))?;
    for name in &ports {
        if let Some(index) = index(name) {
            host.seal_again(name, index);
        }
    }
    Ok(ports.len())
}
