//! `offload=off`: XDP takes what a guest without offloads sends, if the kernel, the uplink's
//! driver and the guest itself are such that nothing is lost by it.
//!
//! An XDP program does not see what a guest says about its frame in the virtio header: a
//! checksum left for later would never be made. So the tap is asked, now and whenever it
//! changes, whether its guest has taken offloads; a guest that takes them sends such frames.

use super::super::Daemon;
use super::super::ports::Port;
use crate::control::api::EventKind;
use crate::control::links;
use crate::switch::PortIndex;
use crate::sys::ethtool::Features;
use tracing::warn;

/// Features a tap has while its guest takes offloads (`TUN_F_CSUM`, without which there is no
/// other; drivers/net/tun.c).
const GUEST_OFFLOADS: &str = "tx-checksum-ip-generic";

impl Daemon {
    /// Puts programs at the XDP hooks of all ports that are to have one, and takes others off.
    pub(in super::super) fn fit_all_express(&mut self) {
        let ports = self.ports.iter();
        let positions: Vec<PortIndex> = ports
            .filter(|(_, port)| port.config.offload_off || port.express.is_some())
            .map(|(position, _)| position)
            .collect();
        self.fit_express(&positions);
    }

    /// The same of these ports.
    pub(in super::super) fn fit_express(&mut self, positions: &[PortIndex]) {
        if self.kernel.is_none() {
            return;
        }
        let mut uplink = None;
        let there = self.uplink.attached.as_ref().map(|(index, ..)| *index);
        for position in positions {
            let Some(port) = self.ports.get(*position) else { continue };
            let asked = port.config.offload_off && port.in_kernel;
            let found = match (asked, port.index()) {
                // Without an uplink it passes everything on; and it soon comes back.
                (true, Some(_)) if there.is_none() => continue,
                (true, Some(index)) => {
                    let uplink = uplink.get_or_insert_with(|| self.uplink_obstacle(there));
                    let obstacle = uplink.clone().or_else(|| guest_obstacle(&port.config.device));
                    Some(self.try_express(*position, index, obstacle))
                }
                _ => None,
            };
            let Some(port) = self.ports.get_mut(*position) else { continue };
            if !matches!(found, Some(Ok(())))
                && let Some(path) = &mut port.path
            {
                path.leave_express();
            }
            if port.express != found {
                port.express = found;
                self.tell_express(*position);
            }
        }
    }

    fn try_express(
        &mut self,
        position: PortIndex,
        index: u32,
        obstacle: Option<String>,
    ) -> Result<(), String> {
        obstacle.map_or(Ok(()), Err)?;
        let (Some(kernel), Some(port)) = (&self.kernel, self.ports.get_mut(position)) else {
            return Err("there is no kernel path".to_owned());
        };
        let Port { path: Some(path), config, .. } = port else {
            return Err("it has no kernel path".to_owned());
        };
        let device = (config.device.as_str(), index);
        match kernel.enter_express(path, device, &config.membership, &config.police) {
            Ok(true) => Ok(()),
            Ok(false) => Err("its options let no frame without a tag pass".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Why nothing can be redirected to the uplink, if so.
    fn uplink_obstacle(&self, index: Option<u32>) -> Option<String> {
        let name = &self.name;
        match links::takes_redirected(index?) {
            Ok(Some(true)) => None,
            Ok(Some(false)) => Some(format!(
                "the driver of {name} takes no frames by XDP as it is (some do once a program \
                 is attached to them)"
            )),
            Ok(None) => Some(format!(
                "this kernel does not tell whether {name} takes frames by XDP (Linux 6.3 does)"
            )),
            Err(error) => Some(format!("{name} cannot be asked whether it takes them: {error}")),
        }
    }

    fn tell_express(&mut self, position: PortIndex) {
        let Some(port) = self.ports.get(position) else { return };
        let name = port.config.device.clone();
        match &port.express {
            Some(Ok(())) => {
                let text = format!("{name}: XDP sends its frames (offload=off)");
                self.tell(EventKind::Link, Some(&name), text);
            }
            Some(Err(reason)) => warn!("{name}: offload=off, but no XDP: {reason}"),
            None => {}
        }
    }

    /// What there is to say about a port's path.
    pub(in super::super) fn datapath_reason(&self, port: &Port) -> Option<String> {
        match (port.in_kernel, &port.express) {
            (false, _) => self.kernel.is_some().then(|| port.why_packet.clone()),
            (true, Some(Ok(()))) => Some("offload=off: XDP sends its frames".to_owned()),
            (true, Some(Err(reason))) => Some(format!("offload=off, but no XDP: {reason}")),
            (true, None) => None,
        }
    }
}

/// Why frames of the guest need what XDP does not see, if so.
fn guest_obstacle(device: &str) -> Option<String> {
    match Features::read(device) {
        Ok(features) => features.state(GUEST_OFFLOADS).filter(|state| state.active).map(|_| {
            format!(
                "its guest has checksum offload ({GUEST_OFFLOADS} is on, see `ethtool -k \
                 {device}`): take offload=off out of its configuration"
            )
        }),
        Err(error) => Some(error.to_string()),
    }
}
