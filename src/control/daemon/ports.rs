//! The ports by position, name and device. A position is a port's [`PortIndex`] in
//! the worker and stays its own until it is removed; it is then given to a later
//! one. People see ports in the order of the configuration.

use crate::control::daemon::watch::Watched;
use crate::control::host::FoundPort;
use crate::control::mapping::PortConfig;
use crate::dataplane::kernel::PortPath;
use crate::dataplane::{FlowSnapshot, PortShared};
use crate::switch::{Membership, PortIndex};
use crate::sys::packet::KernelCounter;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tracing::warn;

/// How long a removed port's worker may count on: longer than a stuck one goes unnoticed.
const LEAVING_TIME: Duration = Duration::from_secs(10);

/// Ports there have been.
static NUMBERS: AtomicU64 = AtomicU64::new(1);

/// A port.
#[derive(Debug)]
pub struct Port {
    /// Its configuration.
    pub config: PortConfig,
    /// The number of its worker.
    pub worker: usize,
    /// The move its worker has not answered in time: it may bring the device yet.
    pub under_way: Option<u64>,
    /// Looks at the load for which it is not to change that again.
    pub rest: u32,
    /// What its worker counts.
    pub shared: Arc<PortShared>,
    /// Its part of the kernel path, which counts, if it has or had one.
    pub path: Option<PortPath>,
    /// Whether that serves it; else its worker does.
    pub in_kernel: bool,
    /// Why its worker does, for people.
    pub why_packet: String,
    /// The kernel path cannot serve what its guest sends, as was found.
    pub unable: bool,
    /// With `offload=off`: whether XDP takes what its guest sends, or else why not.
    pub express: Option<Result<(), String>>,
    /// Tells it from all other ports there were.
    pub number: u64,
    /// Its device, while it is in the worker.
    pub attached: Option<Attached>,
    /// What the clock's ticks have seen of it.
    pub watched: Watched,
}

/// What a port has counted that was removed: its worker may be late to notice, and count on.
#[derive(Debug)]
pub struct Leaving {
    since: Instant,
    shared: Arc<PortShared>,
    told: (FlowSnapshot, FlowSnapshot),
}

impl Leaving {
    /// Of a port that is being removed.
    pub fn new(shared: Arc<PortShared>) -> Self {
        Self { since: Instant::now(), shared, told: Default::default() }
    }

    /// What was counted since the last call, from and to the guest.
    pub fn take(&mut self) -> (FlowSnapshot, FlowSnapshot) {
        let now = (self.shared.from_guest.snapshot(), self.shared.to_guest.snapshot());
        let (from, to) = std::mem::replace(&mut self.told, now);
        (self.told.0.since(&from), self.told.1.since(&to))
    }

    /// Whether its worker has noticed by now, or never will.
    pub fn is_over(&self) -> bool {
        self.since.elapsed() > LEAVING_TIME
    }
}

impl Port {
    /// A port without a device.
    pub fn new(config: PortConfig) -> Self {
        Self {
            config,
            worker: 0,
            under_way: None,
            rest: 0,
            shared: Arc::default(),
            path: None,
            in_kernel: false,
            why_packet: String::new(),
            unable: false,
            express: None,
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            attached: None,
            watched: Watched::default(),
        }
    }

    /// What was counted from and to the guest, whoever served it.
    pub fn flows(&self) -> (FlowSnapshot, FlowSnapshot) {
        self.flows_since(Instant::now())
    }

    /// The same as it was at some moment since `earliest`.
    pub fn flows_since(&self, earliest: Instant) -> (FlowSnapshot, FlowSnapshot) {
        let mut from_guest = self.shared.from_guest.snapshot();
        let mut to_guest = self.shared.to_guest.snapshot();
        match self.path.as_ref().map(|path| path.flows_since(Some(earliest))) {
            Some(Ok((from, to))) => {
                from_guest.add(&from);
                to_guest.add(&to);
            }
            Some(Err(error)) => warn!("{}: {error}", self.config.device),
            None => {}
        }
        (from_guest, to_guest)
    }

    /// Its device's index, while it is attached and not an internal one.
    pub fn index(&self) -> Option<u32> {
        self.attached.as_ref().and_then(|attached| attached.index)
    }
}

/// A port's device while it is in the worker.
#[derive(Debug)]
pub struct Attached {
    /// `None` for an internal port, which is ours wherever its netdev goes.
    pub index: Option<u32>,
    /// The kernel's own counts.
    pub counter: Option<KernelCounter>,
    /// An internal port's tap, to be handed over.
    pub queue: Option<OwnedFd>,
    /// Slots of its ring.
    pub slots: usize,
    /// What to put back.
    pub found: Option<FoundPort>,
}

/// All ports.
#[derive(Debug, Default)]
pub struct Ports {
    places: Vec<Option<Port>>,
    order: Vec<PortIndex>,
}

impl Ports {
    /// Ports of these configurations, without devices.
    pub fn new(configs: Vec<PortConfig>) -> Self {
        let places: Vec<_> = configs.into_iter().map(|config| Some(Port::new(config))).collect();
        Self { order: (0..places.len()).collect(), places }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// How many positions there are, free ones included.
    pub fn places(&self) -> usize {
        self.places.len()
    }

    /// The port at a position.
    pub fn get(&self, position: PortIndex) -> Option<&Port> {
        self.places.get(position)?.as_ref()
    }

    /// The port at a position.
    pub fn get_mut(&mut self, position: PortIndex) -> Option<&mut Port> {
        self.places.get_mut(position)?.as_mut()
    }

    /// All ports, in the order of the configuration.
    pub fn iter(&self) -> impl Iterator<Item = (PortIndex, &Port)> {
        self.order.iter().filter_map(|position| Some((*position, self.get(*position)?)))
    }

    /// All ports, by position.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (PortIndex, &mut Port)> {
        let ports = self.places.iter_mut().enumerate();
        ports.filter_map(|(position, port)| Some((position, port.as_mut()?)))
    }

    /// Positions of ports without a device, in the order of the configuration.
    pub fn without_device(&self) -> Vec<PortIndex> {
        let ports = self.iter().filter(|(_, port)| port.attached.is_none());
        ports.map(|(position, _)| position).collect()
    }

    /// The port configured for a device of this name.
    pub fn by_device(&self, name: &str) -> Option<(PortIndex, &Port)> {
        self.iter().find(|(_, port)| port.config.device == name)
    }

    /// The port with the device of this index.
    pub fn by_index(&mut self, index: u32) -> Option<(PortIndex, &mut Port)> {
        self.iter_mut().find(|(_, port)| port.index() == Some(index))
    }

    /// Positions for this many new ports: free ones first.
    pub fn free_positions(&self, count: usize) -> Vec<PortIndex> {
        let free = self.places.iter().enumerate();
        let free = free.filter(|(_, place)| place.is_none()).map(|(position, _)| position);
        free.chain(self.places.len()..).take(count).collect()
    }

    /// Puts a port at a free position.
    pub fn insert(&mut self, position: PortIndex, port: Port) {
        if self.places.len() <= position {
            self.places.resize_with(position + 1, || None);
        }
        if let Some(place) = self.places.get_mut(position) {
            *place = Some(port);
            self.order.push(position);
        }
    }

    /// Takes a port out.
    pub fn remove(&mut self, position: PortIndex) -> Option<Port> {
        self.order.retain(|other| *other != position);
        self.places.get_mut(position)?.take()
    }

    /// Sets the order people see.
    pub fn set_order(&mut self, order: Vec<PortIndex>) {
        self.order = order;
    }

    /// Each position's membership, empty positions included.
    pub fn memberships(&self) -> Vec<Option<&Membership>> {
        let configs = self.configs().into_iter();
        configs.map(|config| config.map(|config| &config.membership)).collect()
    }

    /// Each position's configuration, empty positions included.
    pub fn configs(&self) -> Vec<Option<&PortConfig>> {
        self.places.iter().map(|place| place.as_ref().map(|port| &port.config)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_late_worker_counts_of_a_removed_port_is_told_once() {
        let shared = Arc::<PortShared>::default();
        shared.from_guest.add_overruns(2);
        let mut leaving = Leaving::new(Arc::clone(&shared));
        let drops = |(from, to): (FlowSnapshot, FlowSnapshot)| (from.dropped(), to.dropped());
        assert_eq!(drops(leaving.take()), (2, 0));
        shared.from_guest.add_overruns(3);
        shared.to_guest.add_overruns(1);
        assert_eq!(drops(leaving.take()), (3, 1));
        assert_eq!(drops(leaving.take()), (0, 0));
        assert!(!leaving.is_over());
    }
}
