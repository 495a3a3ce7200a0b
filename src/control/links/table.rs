//! The mirror of the kernel's device table, and the events its changes make.
//!
//! No I/O here: states go in, events come out, so that each interleaving of
//! deletions, renames and dumps can be tested without a kernel.

use std::collections::{BTreeMap, HashMap};

/// What the kernel says about one network device (`struct ifinfomsg` and its
/// attributes, include/uapi/linux/if_link.h).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkState {
    /// The kernel's number for the device, unique in its namespace at a time.
    pub index: u32,
    /// The device's name. Bytes that are not UTF-8 appear escaped (`\xff`).
    pub name: String,
    /// The device's own MAC address; zeros if its addresses are not 6 bytes long.
    pub address: [u8; 6],
    /// Set up by the administrator (`IFF_UP`).
    pub up: bool,
    /// Up, and somebody at the other end (`IFF_LOWER_UP`): a cable, an opened
    /// tap, a veth peer that is up.
    ///
    /// Not `IFLA_CARRIER`, which also tells the carrier of a device that is down:
    /// the kernel does not notify about carrier changes of such a device
    /// (`linkwatch_do_dev`, net/core/link_watch.c), so that value would go stale.
    pub carrier: bool,
    /// Largest payload of a frame in bytes, without the Ethernet header.
    pub mtu: u32,
    /// The driver's name for the kind of device (`tun`, `veth`, `macvtap`); none
    /// for hardware.
    pub kind: Option<String>,
    /// Index of the bridge, bond or VRF the device is enslaved to.
    pub master: Option<u32>,
    /// Frames carry Ethernet headers (`ARPHRD_ETHER`).
    pub is_ethernet: bool,
    /// The host does no ARP on it (`IFF_NOARP`).
    pub noarp: bool,
    /// The description an administrator gave the device. The kernel does not
    /// notify of its change while the device is down (`netdev_state_change`,
    /// net/core/dev.c); the next notification brings it.
    pub alias: Option<String>,
    /// Frames the device's transmit queue holds; for a tap the length of the
    /// ring its guest reads from (`tun_net_init`, drivers/net/tun.c).
    pub tx_queue_len: u32,
}

/// One change of the device table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkEvent {
    /// A device that was not there: created, or moved into the namespace.
    Appeared(LinkState),
    /// The same device under the same name, with something else about it changed.
    Changed {
        /// Before.
        old: LinkState,
        /// Now.
        new: LinkState,
    },
    /// The same device under another name; other things may have changed too.
    Renamed {
        /// Before.
        old: LinkState,
        /// Now.
        new: LinkState,
    },
    /// A device that is no longer there: deleted, or moved out of the namespace.
    /// Holds its last known state.
    Vanished(LinkState),
    /// Something was taken from a device's tc hooks, or may have been: what stood
    /// there is to be looked at. The device may be one nobody follows, or be gone.
    Unhooked {
        /// The device.
        index: u32,
        /// What happened, as it follows the device's name and a colon.
        cause: &'static str,
    },
}

impl LinkEvent {
    /// The state whose name no longer leads to its index: of a device that
    /// vanished or was renamed away. To be handled before [`Self::arrived`].
    pub fn departed(&self) -> Option<&LinkState> {
        match self {
            Self::Vanished(old) | Self::Renamed { old, .. } => Some(old),
            Self::Appeared(_) | Self::Changed { .. } | Self::Unhooked { .. } => None,
        }
    }

    /// The state whose name has just begun to lead to its index: of a device that
    /// appeared or was renamed to this name.
    pub fn arrived(&self) -> Option<&LinkState> {
        match self {
            Self::Appeared(new) | Self::Renamed { new, .. } => Some(new),
            Self::Vanished(_) | Self::Changed { .. } | Self::Unhooked { .. } => None,
        }
    }
}

/// The devices of one network namespace, found by name or by index.
///
/// Invariant: `by_name` and `by_index` hold the same devices, so each name leads
/// to exactly one index.
#[derive(Debug, Default)]
pub struct Links {
    by_name: HashMap<String, u32>,
    by_index: HashMap<u32, LinkState>,
}

impl Links {
    /// The device with this name.
    pub fn by_name(&self, name: &str) -> Option<&LinkState> {
        self.by_index.get(self.by_name.get(name)?)
    }

    /// The device with this index.
    pub fn by_index(&self, index: u32) -> Option<&LinkState> {
        self.by_index.get(&index)
    }

    /// All devices, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = &LinkState> {
        self.by_index.values()
    }

    /// How many devices there are.
    pub fn len(&self) -> usize {
        self.by_index.len()
    }

    /// Whether there is no device at all.
    pub fn is_empty(&self) -> bool {
        self.by_index.is_empty()
    }

    /// Takes in a device's present state, and emits what it changed.
    pub(super) fn update(&mut self, new: LinkState, emit: &mut impl FnMut(LinkEvent)) {
        // The kernel never gives a name to two devices, so another holder has
        // left it, and the notification that says so was lost or is a dump older.
        if let Some(&holder) = self.by_name.get(&new.name)
            && holder != new.index
        {
            self.remove(holder, emit);
        }
        match self.by_index.insert(new.index, new.clone()) {
            None => {
                self.by_name.insert(new.name.clone(), new.index);
                emit(LinkEvent::Appeared(new));
            }
            Some(old) if old == new => {}
            Some(old) if old.name == new.name => emit(LinkEvent::Changed { old, new }),
            Some(old) => {
                self.by_name.remove(&old.name);
                self.by_name.insert(new.name.clone(), new.index);
                emit(LinkEvent::Renamed { old, new });
            }
        }
    }

    /// Forgets a device, and emits that it vanished if it was known.
    pub(super) fn remove(&mut self, index: u32, emit: &mut impl FnMut(LinkEvent)) {
        if let Some(old) = self.by_index.remove(&index) {
            self.by_name.remove(&old.name);
            emit(LinkEvent::Vanished(old));
        }
    }

    /// Makes the table equal to a dump, and emits the differences: first what
    /// vanished, so that names are free before others arrive under them.
    pub(super) fn reconcile(
        &mut self,
        dump: BTreeMap<u32, LinkState>,
        emit: &mut impl FnMut(LinkEvent),
    ) {
        let mut gone: Vec<u32> =
            self.by_index.keys().copied().filter(|index| !dump.contains_key(index)).collect();
        gone.sort_unstable();
        for index in gone {
            self.remove(index, emit);
        }
        for state in dump.into_values() {
            self.update(state, emit);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use proptest::prelude::*;

    use super::*;

    fn link(index: u32, name: &str) -> LinkState {
        LinkState {
            index,
            name: name.into(),
            address: [2, 0, 0, 0, 0, 1],
            up: false,
            carrier: false,
            mtu: 1500,
            kind: None,
            master: None,
            is_ethernet: true,
            noarp: false,
            alias: None,
            tx_queue_len: 1000,
        }
    }

    fn update(links: &mut Links, state: LinkState) -> Vec<LinkEvent> {
        let mut events = Vec::new();
        links.update(state, &mut |event| events.push(event));
        events
    }

    #[test]
    fn a_state_seen_twice_is_no_event() {
        let mut links = Links::default();
        assert_eq!(update(&mut links, link(1, "a")), [LinkEvent::Appeared(link(1, "a"))]);
        assert_eq!(update(&mut links, link(1, "a")), []);
    }

    #[test]
    fn a_rename_is_a_departure_and_an_arrival() {
        let mut links = Links::default();
        update(&mut links, link(1, "a"));
        let events = update(&mut links, link(1, "b"));
        assert_eq!(events, [LinkEvent::Renamed { old: link(1, "a"), new: link(1, "b") }]);
        assert_eq!(events.first().unwrap().departed(), Some(&link(1, "a")));
        assert_eq!(events.first().unwrap().arrived(), Some(&link(1, "b")));
        assert_eq!(links.by_name("a"), None);
        assert_eq!(links.by_name("b"), Some(&link(1, "b")));
    }

    #[test]
    fn a_name_taken_over_first_departs_from_its_holder() {
        let mut links = Links::default();
        update(&mut links, link(1, "a"));
        assert_eq!(
            update(&mut links, link(2, "a")),
            [LinkEvent::Vanished(link(1, "a")), LinkEvent::Appeared(link(2, "a"))]
        );
        assert_eq!(links.by_name("a").unwrap().index, 2);
        assert_eq!(links.len(), 1);
    }

    #[test]
    fn two_names_swapped_behind_our_back_end_right() {
        let mut links = Links::default();
        update(&mut links, link(1, "a"));
        update(&mut links, link(2, "b"));
        links.reconcile(BTreeMap::from([(1, link(1, "b")), (2, link(2, "a"))]), &mut |_| {});
        assert_eq!(links.by_name("a").unwrap().index, 2);
        assert_eq!(links.by_name("b").unwrap().index, 1);
    }

    /// One step of the kernel, or an overrun followed by a dump.
    #[derive(Debug, Clone)]
    enum Step {
        Update { index: u32, name: u8, mtu: u32 },
        Remove { index: u32 },
        Dump(Vec<(u32, u8)>),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (1..6u32, 0..6u8, 0..2u32).prop_map(|(index, name, mtu)| Step::Update { index, name, mtu }),
            2 => (1..6u32).prop_map(|index| Step::Remove { index }),
            1 => proptest::collection::vec((1..6u32, 0..6u8), 0..6).prop_map(Step::Dump),
        ]
    }

    /// A consumer that knows nothing but names and the two parts of an event.
    fn follow(names: &mut HashMap<String, u32>, event: &LinkEvent) {
        if let Some(old) = event.departed() {
            assert_eq!(names.remove(&old.name), Some(old.index), "departed without having arrived");
        }
        if let Some(new) = event.arrived() {
            assert_eq!(names.insert(new.name.clone(), new.index), None, "arrived on a held name");
        }
    }

    proptest! {
        /// Whatever the order of notifications and dumps, even impossible ones,
        /// a consumer of the events alone knows what the table knows, and the
        /// table never holds a name twice.
        #[test]
        fn events_alone_reproduce_the_table(steps in proptest::collection::vec(step(), 0..60)) {
            let mut links = Links::default();
            let mut names = HashMap::new();
            for step in steps {
                let mut emit = |event: LinkEvent| follow(&mut names, &event);
                match step {
                    Step::Update { index, name, mtu } => {
                        let mut state = link(index, &name.to_string());
                        state.mtu += mtu;
                        links.update(state.clone(), &mut emit);
                        prop_assert_eq!(links.by_index(index), Some(&state));
                        prop_assert_eq!(links.by_name(&state.name), Some(&state));
                    }
                    Step::Remove { index } => {
                        links.remove(index, &mut emit);
                        prop_assert_eq!(links.by_index(index), None);
                    }
                    Step::Dump(entries) => {
                        // The kernel's dump holds each index and each name once.
                        let mut by_name = HashMap::new();
                        for (index, name) in entries {
                            by_name.retain(|_, held| *held != index);
                            by_name.insert(name, index);
                        }
                        let dump: BTreeMap<u32, LinkState> = by_name
                            .into_iter()
                            .map(|(name, index)| (index, link(index, &name.to_string())))
                            .collect();
                        links.reconcile(dump.clone(), &mut emit);
                        let table: BTreeMap<u32, LinkState> =
                            links.iter().map(|state| (state.index, state.clone())).collect();
                        prop_assert_eq!(table, dump);
                    }
                }
                let table: HashMap<String, u32> =
                    links.iter().map(|state| (state.name.clone(), state.index)).collect();
                prop_assert_eq!(table.len(), links.len());
                prop_assert_eq!(&table, &names);
            }
        }
    }
}
