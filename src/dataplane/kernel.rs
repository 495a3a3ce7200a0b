//! The kernel path of one uplink: what there is of it in the kernel, and how it changes.
//!
//! # Theory of operation
//!
//! The programs (`sys::bpf::path`) hold the kernel path together, not this process: all it
//! does is to make them from the same memberships as the packet path's tables, put them in
//! their places, and read what they count. In the kernel there is
//!
//! - the dispatcher at the uplink's ingress, which jumps by TPID and VID into an array of
//!   programs, and for VLANs shared by tag pairs into another by the inner tag;
//! - a program for each port and direction, and the port's records;
//! - one value with the uplink's index and MTU, which all ports' guest programs read;
//! - for ports that ask for it, a program at the device's XDP hook, in front of the guest's.
//!
//! Maps have pins in a folder of their own, so that all goes on without us and the next
//! process finds them by name. It makes its own programs and puts each in the old one's
//! place: there is no moment without one, so no frame is lost and none comes twice.
//!
//! Each entry knows the port it was set for (by a number that is the port's own), so that
//! who lets go of a VLAN that another has by now leaves it alone. A port is entered when the
//! entries of its VLANs lead to its programs, and left when they let frames pass to the packet path, or are gone. Entries change one by one, each
//! in one step: a VLAN that goes from one port to another has one of them at any time.

mod port;

pub use port::{DROP_DELAY, PortPath};

use super::FlowSnapshot;
use crate::frame::{Tag, TagEdit, Tpid, Vid};
use crate::switch::{DropReason, GuestRule, GuestRules, Membership, PoliceRule, Removal, Vlans};
use crate::sys::bpf::path::{
    self, Action, Allowed, DISPATCH_ENTRIES, Express, FROM_GUEST, FromGuest, PushTag, Reasons,
    Record, TO_GUEST, ToGuest,
};
use crate::sys::bpf::{
    self, AssemblyError, BpfError, Direction, PinnedXdp, ProgramArray, ProgramKind, Records,
    SharedPair, UplinkFilter, detach_tc, detach_tc_leaving_qdisc, is_attached_tc,
};
use crate::sys::sandbox::Call;
use port::{ExpressPath, QueueDrops, Shape, snapshot};
use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Name of the dispatcher; by it a later run knows it.
pub const DISPATCHER_NAME: &str = "vlansw_path";
/// Name of programs toward guests.
const TO_GUEST_NAME: &str = "vlansw_guest";
/// Name of programs at guests' XDP hooks.
const EXPRESS_NAME: &str = "vlansw_express";
/// The names of maps; a number behind that another layout would have to change.
const ARRAY_NAME: &str = "vlansw_path1";
const UPLINK_NAME: &str = "vlansw_uplink1";
const RECORDS_NAME: &str = "vlansw_count1";
/// A port's records: two directions, and what is known of drops behind its programs.
const PORT_ENTRIES: u32 = 3;
const _: () = assert!(FROM_GUEST == 0 && TO_GUEST == 1, "which `Records::first_two` reads");
const QUEUE_ENTRY: u32 = 2;
/// Prefixes of pins that stand for something of that name.
const PORT_PREFIX: &str = "port-";
const PAIR_PREFIX: &str = "pair-";
const EXPRESS_PREFIX: &str = "xdp-";
/// What an MTU does not count of a frame (`packet_snd` draws the line for a 0x8100 tag).
const ETHERNET: u32 = 14;

/// What finding and removing pins takes.
pub const CALLS: &[Call] = &[
    Call::any(libc::SYS_getdents64),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_rmdir),
    #[cfg(target_arch = "x86_64")]
    Call::any(libc::SYS_mkdir),
    Call::any(libc::SYS_mkdirat),
];

const REASONS: Reasons = Reasons {
    spoofed_mac: DropReason::SpoofedMac as u8,
    malformed: DropReason::Malformed as u8,
    inner_tag: DropReason::InnerTag as u8,
    tagged_on_access: DropReason::TaggedOnAccess as u8,
    vlan_not_allowed: DropReason::VlanNotAllowed as u8,
    too_long: DropReason::TooLong as u8,
    bad_offload: DropReason::BadOffload as u8,
    uplink_down: DropReason::UplinkDown as u8,
    guest_absent: DropReason::GuestAbsent as u8,
    send_failed: DropReason::SendFailed as u8,
    unmapped: DropReason::UnmappedVlan as u8,
};
const _: () = assert!(DropReason::COUNT <= Record::REASONS);

/// Why something of the kernel path could not be made.
#[derive(Debug, thiserror::Error)]
pub enum KernelPathError {
    /// A program has a fault in itself.
    #[error(transparent)]
    Assembly(#[from] AssemblyError),
    /// The kernel refused.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// The folder of the pins.
    #[error("{place}: {source}", place = .place.display())]
    Pins {
        /// The folder.
        place: PathBuf,
        /// What is wrong with it.
        source: io::Error,
    },
}

/// Why the packet path has to serve a port, in the words of `vlanswitchctl status`; `None`
/// if programs can do all it asks for.
pub fn inability(membership: &Membership, police: &PoliceRule) -> Option<&'static str> {
    let legacy = |tpid| matches!(tpid, Tpid::Legacy9100 | Tpid::Legacy9200);
    if matches!(membership.vlans(), Vlans::Untagged) {
        return Some("the host gets frames without a VLAN too");
    }
    if legacy(membership.tpid()) || legacy(membership.inner_tpid()) {
        return Some("the kernel does not know TPID 0x9100 and 0x9200");
    }
    if police.rate.is_some() || police.storm.is_some() {
        return Some("rate= and storm= are held to by the packet path");
    }
    None
}

/// A place in the dispatcher's arrays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Key {
    outer: (Tpid, Vid),
    inner: Option<(Tpid, Vid)>,
}

fn entry((tpid, vid): (Tpid, Vid)) -> u32 {
    // Of the four only the first two get here (`inability`).
    tpid.index() as u32 * (DISPATCH_ENTRIES / 2) + u32::from(vid.get())
}

/// The keys of a port, with what is taken off their frames.
fn keys(membership: &Membership) -> impl Iterator<Item = (Key, Removal)> {
    let inner = match membership.vlans() {
        Vlans::Double { inner, .. } => Some((membership.inner_tpid(), *inner)),
        _ => None,
    };
    membership.outer_vids().map(move |vid| {
        let key = Key { outer: (membership.tpid(), vid), inner };
        (key, membership.removal(vid))
    })
}

/// Tag pairs with one outer VLAN.
#[derive(Debug)]
struct Pairs {
    programs: ProgramArray,
    /// Held for as long as entries lead to it.
    _dispatcher: OwnedFd,
    /// Inner tags that have a port.
    inner: Vec<(Tpid, Vid)>,
}

/// What a device that frames are sent to is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Its index.
    pub index: u32,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether what is sent can arrive.
    pub is_up: bool,
}

/// The largest MTU a tap takes: what is shorter does not limit a guest.
const UNLIMITED_MTU: u32 = 65521;

/// The kernel path of one uplink.
#[derive(Debug)]
pub struct KernelPath {
    place: Option<PathBuf>,
    programs: ProgramArray,
    uplink: SharedPair,
    records: Records,
    pass: OwnedFd,
    pairs: HashMap<(Tpid, Vid), Pairs>,
    /// The dispatcher, once it was made.
    dispatcher: Option<OwnedFd>,
    /// The port each entry was set for.
    owners: HashMap<Key, u64>,
}

/// Removes a pin, which may not be there.
fn unpin(path: &Path) {
    let _ = fs::remove_file(path);
}

/// A device's name as part of a pin's: a BPF file system takes no dots.
fn pin_name(device: &str) -> String {
    device.replace('%', "%25").replace('.', "%2e")
}

fn device_name(pin: &str) -> String {
    pin.replace("%2e", ".").replace("%25", "%")
}

impl KernelPath {
    /// The kernel path whose pins are in `place`, or a new one; without a place it ends with
    /// this process. Nothing in the kernel goes another way by that.
    ///
    /// # Errors
    /// [`KernelPathError`]: capabilities, memory, or a kernel that lacks something.
    pub fn open(place: Option<&Path>) -> Result<Self, KernelPathError> {
        if let Some(place) = place {
            fs::create_dir_all(place)
                .map_err(|source| KernelPathError::Pins { place: place.to_owned(), source })?;
        }
        let pin = |name: &str| place.map(|place| place.join(name));
        Ok(Self {
            programs: ProgramArray::at(pin("programs").as_deref(), ARRAY_NAME, DISPATCH_ENTRIES)?,
            uplink: SharedPair::at(pin("uplink").as_deref(), UPLINK_NAME)?,
            records: Records::at(pin("records").as_deref(), RECORDS_NAME, 1)?,
            pass: bpf::load(ProgramKind::SchedCls, DISPATCHER_NAME, &path::pass_program()?)?,
            place: place.map(Path::to_owned),
            pairs: HashMap::new(),
            dispatcher: None,
            owners: HashMap::new(),
        })
    }

    /// Where the pins are, if they outlive this process.
    pub fn place(&self) -> Option<&Path> {
        self.place.as_deref()
    }

    /// The uplink's records, for its socket filter.
    pub fn records(&self) -> BorrowedFd<'_> {
        self.records.as_fd()
    }

    /// Attaches the dispatcher to the uplink, in place of one of an earlier run.
    ///
    /// # Errors
    /// [`KernelPathError`].
    pub fn attach(&mut self, uplink: u32, filter: &UplinkFilter) -> Result<(), KernelPathError> {
        if self.dispatcher.is_none() {
            let dispatch = filter.dispatch(self.programs.as_fd());
            let program = path::dispatcher_program(&dispatch)?;
            let program = bpf::load(ProgramKind::SchedCls, DISPATCHER_NAME, &program)?;
            bpf::tcx::remember(program.as_fd())?;
            self.dispatcher = Some(program);
        }
        if let Some(program) = &self.dispatcher {
            let direction = Direction::Ingress;
            bpf::attach_beside_qdiscs(program.as_fd(), DISPATCHER_NAME, uplink, direction)?;
        }
        Ok(())
    }

    /// Tells guests' programs of the uplink: where it is, and its MTU; `None`: nowhere.
    ///
    /// # Errors
    /// None that a working kernel gives.
    pub fn set_uplink(&self, uplink: Option<Target>) -> Result<(), BpfError> {
        match uplink.filter(|uplink| uplink.is_up) {
            Some(uplink) => self.uplink.set(uplink.index, uplink.mtu.saturating_add(ETHERNET)),
            None => self.uplink.set(0, 0),
        }
    }

    /// Frames with an outer VLAN of tag pairs whose inner tag is nobody's: how many, and
    /// their bytes.
    ///
    /// # Errors
    /// None that a working kernel gives.
    pub fn unmapped(&self) -> Result<FlowSnapshot, BpfError> {
        Ok(snapshot(&self.records.sum(0)?))
    }

    /// Opens a port's records and makes its part, without entering it.
    ///
    /// # Errors
    /// [`KernelPathError`].
    pub fn port(&self, number: u64, device: &str) -> Result<PortPath, KernelPathError> {
        let pin = self.pin(PORT_PREFIX, device);
        let attached =
            self.pin(EXPRESS_PREFIX, device).map(|pin| PinnedXdp::adopt(&pin)).transpose()?;
        let express = attached.flatten().map(|attached| ExpressPath { attached, rules: None });
        let records = Records::at(pin.as_deref(), RECORDS_NAME, PORT_ENTRIES)?;
        let kept = records.sum(QUEUE_ENTRY)?;
        let [index, seen, full, absent, ..] = kept;
        let unable = records.sum(FROM_GUEST)?.get(Record::UNABLE).copied().unwrap_or_default();
        Ok(PortPath {
            number,
            records,
            pin,
            target: None,
            programs: Vec::new(),
            queue: QueueDrops { index: index as u32, seen, full, absent },
            read: RefCell::new(None),
            sent: None,
            unable,
            express,
        })
    }

    fn pin(&self, prefix: &str, device: &str) -> Option<PathBuf> {
        let place = self.place.as_ref();
        place.map(|place| place.join(format!("{prefix}{}", pin_name(device))))
    }

    /// Has frames without a tag go from the port's device, by XDP, to the uplink; false if
    /// its options do not let them go.
    ///
    /// # Errors
    /// [`KernelPathError`]: the driver has no XDP, or another program is there. Then no
    /// program of ours is.
    pub fn enter_express(
        &self,
        port: &mut PortPath,
        device: (&str, u32),
        membership: &Membership,
        police: &PoliceRule,
    ) -> Result<bool, KernelPathError> {
        let (name, index) = device;
        let rules = rules(membership, police);
        let before = port.express.as_ref();
        let before = before.filter(|express| express.attached.device() == Some(index));
        if before.is_some_and(|express| express.rules.as_ref() == Some(&rules)) {
            return Ok(true);
        }
        let records = port.records.as_fd();
        let uplink = self.uplink.as_fd();
        let program = Express { rules: &rules, reasons: &REASONS, records, uplink }.program()?;
        let Some(program) = program else {
            port.leave_express();
            return Ok(false);
        };
        let program = bpf::load(ProgramKind::Xdp, EXPRESS_NAME, &program)?;
        if before.is_some_and(|express| express.attached.replace(program.as_fd()).is_ok()) {
            if let Some(express) = &mut port.express {
                express.rules = Some(rules);
            }
            return Ok(true);
        }
        port.leave_express();
        let pin = self.pin(EXPRESS_PREFIX, name);
        let attached = PinnedXdp::attach(program.as_fd(), index, pin.as_deref())?;
        port.express = Some(ExpressPath { attached, rules: Some(rules) });
        Ok(true)
    }

    /// The program to guard a port's device with: what its guest sends goes to the uplink.
    ///
    /// # Errors
    /// [`KernelPathError`].
    pub fn guest_program(
        &self,
        name: &str,
        port: &PortPath,
        membership: &Membership,
        police: &PoliceRule,
        in_transition: bool,
    ) -> Result<OwnedFd, KernelPathError> {
        let rules = rules(membership, police);
        let program = FromGuest {
            rules: &rules,
            reasons: &REASONS,
            records: port.records.as_fd(),
            uplink: self.uplink.as_fd(),
            in_transition,
        };
        Ok(bpf::load(ProgramKind::SchedCls, name, &program.program()?)?)
    }

    /// Leads the frames of a port's VLANs to its guest, at `target` from now on; `None` if
    /// there is no device. In a transition, those the uplink's filter has taken are left to
    /// the packet path. VLANs it had before stay its own until they are
    /// [released](KernelPath::release), so that whoever is to have them can take them first.
    ///
    /// # Errors
    /// [`KernelPathError`]: some of its entries may have changed.
    pub fn enter(
        &mut self,
        port: &mut PortPath,
        membership: &Membership,
        target: Option<Target>,
        in_transition: bool,
    ) -> Result<(), KernelPathError> {
        let way = target.filter(|target| target.is_up).map(|target| {
            let limit = Some(target.mtu).filter(|mtu| *mtu < UNLIMITED_MTU);
            (target.index, limit.map(|mtu| mtu + ETHERNET))
        });
        let mut programs: Vec<(Shape, OwnedFd)> = Vec::new();
        for (key, removal) in keys(membership) {
            let shape = Shape { removal, way, in_transition };
            if !programs.iter().any(|(other, _)| *other == shape) {
                // What the verifier has taken it takes again, but not for nothing.
                let same = port.programs.iter().position(|(other, _)| *other == shape);
                let program = match same {
                    Some(same) => port.programs.swap_remove(same).1,
                    None => self.to_guest(port.records.as_fd(), shape)?,
                };
                programs.push((shape, program));
            }
            let program = programs.iter().find(|(other, _)| *other == shape);
            if let Some((_, program)) = program {
                self.lead(key, program.as_fd())?;
                self.owners.insert(key, port.number);
            }
        }
        port.programs = programs;
        if port.target.map(|target| target.index) != target.map(|target| target.index) {
            // What it has dropped until now is to be known soon.
            port.sent = None;
        }
        port.target = target;
        Ok(())
    }

    fn to_guest(&self, records: BorrowedFd<'_>, shape: Shape) -> Result<OwnedFd, KernelPathError> {
        let program = ToGuest {
            pop: shape.removal.pop,
            refuse_inner: shape.removal.refuse_inner,
            target: shape.way.map(|(index, _)| index),
            limit: shape.way.and_then(|(_, limit)| limit),
            reasons: &REASONS,
            records,
            transition: shape.in_transition.then(|| self.records.as_fd()),
        };
        Ok(bpf::load(ProgramKind::SchedCls, TO_GUEST_NAME, &program.program()?)?)
    }

    /// Makes the VLANs of the port of this number the packet path's.
    ///
    /// # Errors
    /// [`KernelPathError`].
    pub fn pass(&mut self, number: u64, membership: &Membership) -> Result<(), KernelPathError> {
        let pass = self.pass.try_clone().map_err(|source| BpfError::System {
            action: "duplicate a BPF program's descriptor".to_owned(),
            source,
        })?;
        for (key, _) in keys(membership).filter(|(key, _)| key.outer.0.index() < 2) {
            // Pairs: all of an outer VLAN are on one path.
            self.programs.set(entry(key.outer), pass.as_fd())?;
            self.pairs.remove(&key.outer);
            self.owners.insert(key, number);
        }
        Ok(())
    }

    /// Lets go of the VLANs of the port of this number, as far as they are still its own, but
    /// for those of `kept`: they are the host's.
    ///
    /// # Errors
    /// [`KernelPathError`].
    pub fn release(
        &mut self,
        number: u64,
        kept: Option<&Membership>,
    ) -> Result<(), KernelPathError> {
        let kept: Vec<Key> = kept.into_iter().flat_map(keys).map(|(key, _)| key).collect();
        let owned =
            self.owners.iter().filter(|(key, owner)| **owner == number && !kept.contains(key));
        let owned: Vec<Key> = owned.map(|(key, _)| *key).collect();
        owned.into_iter().try_for_each(|key| self.let_go(key, number))
    }

    /// Leaves a port for good: its records go too.
    ///
    /// # Errors
    /// [`KernelPathError`].
    pub fn leave(&mut self, port: &mut PortPath) -> Result<(), KernelPathError> {
        port.leave_express();
        self.release(port.number, None)?;
        if let Some(pin) = &port.pin {
            unpin(pin);
        }
        Ok(())
    }

    fn lead(&mut self, key: Key, program: BorrowedFd<'_>) -> Result<(), KernelPathError> {
        let Some(inner) = key.inner else {
            self.programs.set(entry(key.outer), program)?;
            self.pairs.remove(&key.outer);
            return Ok(());
        };
        if !self.pairs.contains_key(&key.outer) {
            let (tpid, vid) = key.outer;
            let pin = self.place.as_ref();
            let pin = pin.map(|place| place.join(format!("{PAIR_PREFIX}{tpid}-{vid}")));
            let programs = ProgramArray::at(pin.as_deref(), ARRAY_NAME, DISPATCH_ENTRIES)?;
            let dispatcher = path::pair_program(programs.as_fd(), self.records.as_fd(), &REASONS)?;
            let dispatcher = bpf::load(ProgramKind::SchedCls, TO_GUEST_NAME, &dispatcher)?;
            programs.set(entry(inner), program)?;
            self.programs.set(entry(key.outer), dispatcher.as_fd())?;
            let pairs = Pairs { programs, _dispatcher: dispatcher, inner: vec![inner] };
            self.pairs.insert(key.outer, pairs);
        } else if let Some(pairs) = self.pairs.get_mut(&key.outer) {
            pairs.programs.set(entry(inner), program)?;
            if !pairs.inner.contains(&inner) {
                pairs.inner.push(inner);
            }
        }
        Ok(())
    }

    fn let_go(&mut self, key: Key, number: u64) -> Result<(), KernelPathError> {
        if self.owners.get(&key) != Some(&number) {
            return Ok(());
        }
        self.owners.remove(&key);
        if self.owners.keys().any(|other| other.outer == key.outer && other.inner.is_none()) {
            // The whole VLAN is another port's.
            return Ok(());
        }
        let Some(inner) = key.inner else {
            if self.owners.keys().any(|other| other.outer == key.outer) {
                return Ok(());
            }
            return Ok(self.programs.clear(entry(key.outer))?);
        };
        if let Some(pairs) = self.pairs.get_mut(&key.outer) {
            pairs.programs.clear(entry(inner))?;
            pairs.inner.retain(|other| *other != inner);
            if !pairs.inner.is_empty() {
                return Ok(());
            }
        }
        self.pairs.remove(&key.outer);
        // Pairs that the packet path has: until none is left.
        if self.owners.keys().any(|other| other.outer == key.outer) {
            return Ok(());
        }
        Ok(self.programs.clear(entry(key.outer))?)
    }

    /// Removes what an earlier run has left for VLANs and ports that are no more, and at the
    /// XDP hooks of ports that have no part by now. Returns the devices that had a part.
    ///
    /// # Errors
    /// [`KernelPathError`].
    pub fn remove_stale<'m>(
        &mut self,
        memberships: impl Iterator<Item = &'m Membership>,
        is_port: impl Fn(&str) -> bool,
        has_part: impl Fn(&str) -> bool,
    ) -> Result<Vec<String>, KernelPathError> {
        let claimed: std::collections::HashSet<u32> = memberships
            .flat_map(|membership| keys(membership).map(|(key, _)| key.outer))
            .filter(|(tpid, _)| tpid.index() < 2)
            .map(entry)
            .collect();
        for index in (0..DISPATCH_ENTRIES).filter(|index| !claimed.contains(index)) {
            self.programs.clear(index)?;
        }
        let Some(place) = self.place.clone() else { return Ok(Vec::new()) };
        let mut left = Vec::new();
        for name in names_in(&place) {
            if let Some(port) = name.strip_prefix(PORT_PREFIX) {
                let device = device_name(port);
                if !is_port(&device) {
                    unpin(&place.join(&name));
                    left.push(device);
                }
            } else if let Some(port) = name.strip_prefix(EXPRESS_PREFIX) {
                if !has_part(&device_name(port)) {
                    unpin(&place.join(&name));
                }
            } else if let Some(pair) = name.strip_prefix(PAIR_PREFIX) {
                let alive = |(tpid, vid): &(Tpid, Vid)| format!("{tpid}-{vid}") == pair;
                if !self.pairs.keys().any(alive) {
                    unpin(&place.join(&name));
                }
            }
        }
        Ok(left)
    }
}

/// Whether an earlier run's kernel path stands at this device.
pub fn is_there(uplink: u32) -> bool {
    is_attached_tc(DISPATCHER_NAME, uplink, Direction::Ingress).unwrap_or(false)
}

/// Takes the kernel path off an uplink: its dispatcher, if the device is there, and its
/// pins. Returns the devices that had a part, which are still guarded by its programs.
///
/// # Errors
/// [`KernelPathError`].
pub fn remove(place: &Path, uplink: Option<u32>) -> Result<Vec<String>, KernelPathError> {
    if let Some(uplink) = uplink {
        detach_tc(DISPATCHER_NAME, uplink, Direction::Ingress)?;
    }
    Ok(remove_pins(place))
}

/// Removes the dispatcher from an uplink on which frames are sent. Returns whether a qdisc
/// made for it is left, to be removed when none are.
///
/// # Errors
/// [`BpfError`].
pub fn remove_dispatcher(uplink: u32) -> Result<bool, BpfError> {
    detach_tc_leaving_qdisc(DISPATCHER_NAME, uplink, Direction::Ingress)
}

/// Ends what the pins keep. Returns the devices that had a part.
pub fn remove_pins(place: &Path) -> Vec<String> {
    let names = names_in(place);
    for name in &names {
        unpin(&place.join(name));
    }
    // Not if there is something else.
    let _ = fs::remove_dir(place);
    let ports = names.iter().filter_map(|name| name.strip_prefix(PORT_PREFIX));
    ports.map(device_name).collect()
}

fn names_in(place: &Path) -> Vec<String> {
    let entries = fs::read_dir(place).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// A membership's rules as programs want them.
fn rules(membership: &Membership, police: &PoliceRule) -> path::GuestRules {
    let rules: GuestRules = membership.guest_rules();
    let allowed = rules.allowed().map(|(tpid, runs)| Allowed { tpid: tpid.ethertype(), runs });
    path::GuestRules {
        untagged: action(rules.untagged),
        priority_tagged: action(rules.priority_tagged),
        tagged: action(rules.tagged),
        refuse_inner: rules.refuse_inner,
        allowed,
        sources: police.macs.iter().copied().collect(),
    }
}

fn action(rule: GuestRule) -> Action {
    match rule {
        GuestRule::Drop(reason) => Action::Drop(reason.index() as u8),
        GuestRule::Rewrite { edit: TagEdit { pop, push }, copy_priority } => {
            let tag = |Tag { tpid, tci }: Tag| PushTag { tpid: tpid.ethertype(), tci: tci.0 };
            Action::Rewrite { pop: pop > 0, push: push.map(|one| one.map(tag)), copy_priority }
        }
    }
}
