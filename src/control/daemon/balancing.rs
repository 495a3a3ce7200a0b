//! Which port is with which worker, while the switch runs: what a change of the
//! configuration demands, what the load suggests, and what a caller asks for.

use super::Daemon;
use super::workers::Seat;
use crate::control::api::{EventKind, PortReply};
use crate::control::balance::{self, Moving};
use crate::control::config::Rebalance;
use crate::control::mapping::PortConfig;
use crate::control::placement;
use crate::control::server::Refusal;
use crate::control::start_error::StartError;
use crate::switch::PortIndex;
use std::collections::BTreeMap;
use std::time::Instant;
use tracing::warn;

impl Daemon {
    /// Brings ports to one worker that are to exchange VLANs or to share one, and finds
    /// workers for new ports; steers what they will claim. To be called before the new
    /// table is in force.
    ///
    /// # Errors
    /// [`StartError::Silent`]: what they will claim is steered as before.
    pub(super) fn bring_together(
        &mut self,
        added: &[PortIndex],
        changed: &[(PortIndex, PortConfig)],
    ) -> Result<(), StartError> {
        if self.uplink.steering.is_none() {
            return Ok(());
        }
        let memberships = self.ports.memberships();
        let before: Vec<_> = memberships
            .iter()
            .enumerate()
            .map(|(position, membership)| membership.filter(|_| !added.contains(&position)))
            .collect();
        let mut after = memberships.clone();
        for (position, config) in changed {
            if let Some(place) = after.get_mut(*position) {
                *place = Some(&config.membership);
            }
        }
        let groups = placement::groups(&[&before, &after]);
        let now: Vec<Option<usize>> = before
            .iter()
            .enumerate()
            .map(|(position, membership)| {
                membership.and_then(|_| Some(self.ports.get(position)?.worker))
            })
            .collect();
        let present: Vec<bool> = after.iter().map(Option::is_some).collect();
        let time = Instant::now();
        let usable: Vec<bool> = self.workers.iter().map(|seat| !seat.is_silent(time)).collect();
        let placed = placement::place(&groups, &now, &present, &usable);
        let mut moves: BTreeMap<(usize, usize), Vec<PortIndex>> = BTreeMap::new();
        for (position, (from, to)) in now.iter().zip(&placed).enumerate() {
            match from {
                Some(from) if from != to => moves.entry((*from, *to)).or_default().push(position),
                Some(_) => {}
                None => {
                    if let Some(port) = self.ports.get_mut(position) {
                        port.worker = *to;
                    }
                }
            }
        }
        for ((from, to), ports) in moves {
            self.move_ports(&ports, from, to)?;
        }
        let new = added.iter().filter_map(|position| {
            Some((self.ports.get(*position)?.worker, &self.ports.get(*position)?.config))
        });
        let other = changed
            .iter()
            .filter_map(|(position, config)| Some((self.ports.get(*position)?.worker, config)));
        for (worker, config) in new.chain(other) {
            self.steer(&config.membership, worker);
        }
        Ok(())
    }

    /// Moves a group of ports if the load of the last second suggests it.
    pub(super) fn rebalance(&mut self) {
        if self.config.rebalance == Rebalance::Off {
            return;
        }
        let memberships = self.ports.memberships();
        let groups = placement::groups(&[&memberships]);
        let mut moving: BTreeMap<PortIndex, Moving> = BTreeMap::new();
        for (position, port) in self.ports.iter_mut() {
            let group = groups.get(position).copied().unwrap_or(position);
            let none = Moving { group, worker: port.worker, frames: 0, rests: false };
            let moving = moving.entry(group).or_insert(none);
            // Programs in the kernel take nothing from a worker.
            moving.frames += if port.in_kernel { 0 } else { port.watched.frames };
            moving.rests |= port.rest > 0;
            port.rest = port.rest.saturating_sub(1);
        }
        let now = Instant::now();
        let load = |seat: &Seat| (!seat.is_silent(now)).then_some(seat.pressure);
        let loads: Vec<Option<f64>> = self.workers.iter().map(load).collect();
        let moving: Vec<Moving> = moving.into_values().collect();
        let Some(balance::Move { group, from, to, loads }) = balance::decide(&loads, &moving)
        else {
            return;
        };
        let [busy, idle] = loads.map(|load| load * 100.0);
        let why = format!("worker {from} was {busy:.0} % loaded, worker {to} {idle:.0} %");
        if let Err(error) = self.move_group(&groups, group, to, &why) {
            warn!("{error}");
        }
    }

    /// Moves a port, and those it shares a VLAN with, as a caller asks for.
    ///
    /// # Errors
    /// [`Refusal`]: no such port, no such worker, or one that does not answer.
    pub(super) fn move_port(&mut self, name: &str, worker: u32) -> Result<PortReply, Refusal> {
        let name = name.strip_prefix("internal:").unwrap_or(name).to_owned();
        let Some((position, _)) = self.ports.by_device(&name) else {
            return Err(Refusal::no_such_port(&name));
        };
        let (worker, workers) = (worker as usize, self.workers.len());
        if worker >= workers {
            let last = workers.saturating_sub(1);
            return Err(Refusal::refused(format!(
                "there is no worker {worker}: they are numbered from 0 to {last}; `--workers` \
                 tells how many there are"
            )));
        }
        let groups = placement::groups(&[&self.ports.memberships()]);
        let group = groups.get(position).copied().unwrap_or(position);
        self.move_group(&groups, group, worker, "as asked for").map_err(Refusal::failed)?;
        Ok(PortReply { port: self.port_called(&name)?, notes: None })
    }

    fn move_group(
        &mut self,
        groups: &[PortIndex],
        group: PortIndex,
        to: usize,
        why: &str,
    ) -> Result<(), StartError> {
        let mut moves: BTreeMap<usize, Vec<PortIndex>> = BTreeMap::new();
        for (position, port) in self.ports.iter() {
            if groups.get(position) == Some(&group) && port.worker != to {
                moves.entry(port.worker).or_default().push(position);
            }
        }
        for (from, members) in moves {
            self.move_ports(&members, from, to)?;
            for position in members {
                let Some(port) = self.ports.get_mut(position) else { continue };
                port.rest = balance::REST;
                let name = port.config.device.clone();
                let text = format!("{name}: moved from worker {from} to worker {to}: {why}");
                self.tell(EventKind::PortMoved, Some(&name), text);
            }
        }
        Ok(())
    }
}
