//! Asking the kernel: one request at a time on a blocking socket, each answered
//! or given up after [`ANSWER_TIMEOUT`].

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkExtentMask, LinkFlags,
    LinkMessage,
};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

use super::LinkError;
use super::table::LinkState;
use super::wire::{self, LinkDetails, LinkReport, Message};

/// How long to wait for an answer. The kernel answers in microseconds; it takes
/// longer only while another process holds its network lock (rtnl), for example
/// to delete thousands of devices.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The queueing discipline of a port: none.
const NOQUEUE: &str = "noqueue";
/// The largest datagram taken, in bytes: above the 32 KiB a dump part has at most
/// (`netlink_dump`, net/netlink/af_netlink.c).
pub(super) const DATAGRAM_CAPACITY: usize = 64 * 1024;
/// Dumps tried until one was not disturbed by devices coming and going.
const DUMP_ATTEMPTS: u32 = 8;
/// Longest device description in bytes: the kernel takes less than `IFALIASZ`
/// (256, include/uapi/linux/if.h), and counts the NUL the encoder adds.
const ALIAS_MAX_LEN: usize = 254;
/// `IN6_ADDR_GEN_MODE_NONE` (include/uapi/linux/if_link.h): the kernel makes no
/// link-local address.
const ADDR_GEN_MODE_NONE: u8 = 1;

/// What to set on a device; what is `None` or false stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LinkSettings {
    /// Up or down (`IFF_UP`).
    pub up: Option<bool>,
    /// Largest payload of a frame, in bytes.
    pub mtu: Option<u32>,
    /// No ARP and no neighbour discovery by the host on this device (`IFF_NOARP`).
    pub noarp: Option<bool>,
    /// A description, at most 254 bytes; empty removes it.
    pub alias: Option<String>,
    /// Length of the transmit queue in frames; for a tap, of the ring its guest
    /// reads from.
    pub tx_queue_len: Option<u32>,
    /// The host makes no IPv6 link-local address on this device. Takes effect
    /// before the device goes up. On a host without IPv6 there is nothing to do.
    pub addr_gen_none: bool,
}

/// A socket for requests about devices in the network namespace it was opened in.
///
/// Each method is one or two exchanges with the kernel and returns when the
/// change has happened. Errors: [`LinkError::Refused`] with the kernel's reason,
/// [`LinkError::NotKept`] if the device reports another value afterwards,
/// [`LinkError::BadValue`] for what was not worth asking.
#[derive(Debug)]
pub struct LinkSocket {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// Why an exchange with the kernel failed, before it is known what it was about.
struct Failure {
    reason: io::Error,
    explanation: Option<String>,
}

impl From<io::Error> for Failure {
    fn from(reason: io::Error) -> Self {
        Self { reason, explanation: None }
    }
}

impl LinkSocket {
    /// Opens a socket in the calling thread's network namespace.
    ///
    /// Fails with [`LinkError::Socket`] where netlink sockets are forbidden (a
    /// sandbox) or file descriptors have run out.
    pub fn new() -> Result<Self, LinkError> {
        let open = || -> io::Result<Socket> {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            let timeout = TimeVal::new(ANSWER_TIMEOUT.as_secs().cast_signed(), 0);
            setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
            // Comforts of later kernels (4.2, 4.12): without them errors have no
            // explanation, with the same meaning.
            socket.set_cap_ack(true).ok();
            socket.set_ext_ack(true).ok();
            // And of 4.20: a dump of addresses of one device is that, not all of the host's
            // addresses, a thousand devices' for each of a thousand devices.
            socket.set_netlink_get_strict_chk(true).ok();
            Ok(socket)
        };
        let socket = open().map_err(|reason| LinkError::Socket { operation: "open it", reason })?;
        Ok(Self { socket, sequence: 0, buffer: Vec::with_capacity(DATAGRAM_CAPACITY) })
    }

    /// Sets the device up, so that it carries frames.
    pub fn set_up(&mut self, index: u32) -> Result<(), LinkError> {
        self.configure(index, &LinkSettings { up: Some(true), ..LinkSettings::default() })
    }

    /// Sets the device down.
    pub fn set_down(&mut self, index: u32) -> Result<(), LinkError> {
        self.configure(index, &LinkSettings { up: Some(false), ..LinkSettings::default() })
    }

    /// Sets the largest payload of a frame, in bytes.
    pub fn set_mtu(&mut self, index: u32, mtu: u32) -> Result<(), LinkError> {
        self.configure(index, &LinkSettings { mtu: Some(mtu), ..LinkSettings::default() })
    }

    /// Switches ARP and neighbour discovery off (`on`) or back on.
    pub fn set_noarp(&mut self, index: u32, on: bool) -> Result<(), LinkError> {
        self.configure(index, &LinkSettings { noarp: Some(on), ..LinkSettings::default() })
    }

    /// Describes the device for people (`ip link` shows it); empty removes it.
    pub fn set_alias(&mut self, index: u32, alias: &str) -> Result<(), LinkError> {
        let alias = Some(alias.to_owned());
        self.configure(index, &LinkSettings { alias, ..LinkSettings::default() })
    }

    /// Keeps the host from making an IPv6 link-local address on the device. Does
    /// nothing where there is no IPv6.
    pub fn set_inet6_addr_gen_mode_none(&mut self, index: u32) -> Result<(), LinkError> {
        self.configure(index, &LinkSettings { addr_gen_none: true, ..LinkSettings::default() })
    }

    /// Applies settings in one request, and reads them back.
    ///
    /// Setting a device up with `addr_gen_none` takes a request more: the kernel
    /// works through one flags first and address generation last (`do_setlink`,
    /// net/core/rtnetlink.c), and a tap that comes up with its guest attached has
    /// its link-local address at once (seen on 6.18).
    ///
    /// If the kernel refuses one setting, those it had applied before stay; the
    /// device is set up only if all else was accepted or in the same request.
    pub fn configure(&mut self, index: u32, settings: &LinkSettings) -> Result<(), LinkError> {
        if let Some(alias) = &settings.alias
            && (alias.len() > ALIAS_MAX_LEN || alias.contains('\0'))
        {
            return Err(LinkError::BadValue {
                device: self.device(index),
                what: format!(
                    "the description has {} bytes; a device takes at most {ALIAS_MAX_LEN}, without \
                     NUL bytes: shorten it",
                    alias.len()
                ),
            });
        }
        if settings.addr_gen_none && settings.up == Some(true) {
            self.apply(index, &LinkSettings { up: None, ..settings.clone() })?;
            self.apply(index, &LinkSettings { up: Some(true), ..LinkSettings::default() })?;
        } else {
            self.apply(index, settings)?;
        }
        self.verify(index, settings)
    }

    /// Sends the settings as one request.
    fn apply(&mut self, index: u32, settings: &LinkSettings) -> Result<(), LinkError> {
        let mut result = self.acknowledged(set_link(index, settings), 0);
        if settings.addr_gen_none && result.as_ref().is_err_and(is_without_ipv6) {
            // The whole request was refused before any of it was applied
            // (`validate_linkmsg`), so the rest of it is sent again.
            let rest = LinkSettings { addr_gen_none: false, ..settings.clone() };
            result = self.acknowledged(set_link(index, &rest), 0);
        }
        result.map_err(|failure| {
            let operation = format!("set {}", describe(settings));
            self.refused(index, operation, failure)
        })
    }

    /// Makes the device receive frames whatever their destination, as `ip link set promisc
    /// on` does, or ends that. Returns whether it was so before.
    pub fn set_promiscuous(&mut self, index: u32, on: bool) -> Result<bool, LinkError> {
        let before = self.report(index)?.promiscuous;
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.change_mask = LinkFlags::Promisc;
        message.header.flags.set(LinkFlags::Promisc, on);
        self.acknowledged(RouteNetlinkMessage::SetLink(message), 0).map_err(|failure| {
            let word = if on { "on" } else { "off" };
            self.refused(index, format!("set promisc {word}"), failure)
        })?;
        Ok(before)
    }

    /// How many frames each of these devices has dropped instead of sending them; those
    /// that are gone are missing.
    pub fn dropped(&mut self, indexes: &[u32]) -> Result<HashMap<u32, u64>, LinkError> {
        /// From so many on it is quicker to hear of all.
        const DUMP_FROM: usize = 32;
        let mut found = HashMap::with_capacity(indexes.len());
        let request = |index| {
            let mut message = LinkMessage::default();
            message.header.index = index;
            RouteNetlinkMessage::GetLink(message)
        };
        let mut take = |message: &Message<'_>| {
            if message.kind == libc::RTM_NEWLINK {
                found.extend(wire::dropped(message.payload));
            }
        };
        if indexes.len() >= DUMP_FROM {
            self.exchange(request(0), NLM_F_DUMP, &mut take).map_err(|failure| {
                LinkError::Socket { operation: "read devices' counters", reason: failure.reason }
            })?;
        } else {
            for index in indexes {
                match self.exchange(request(*index), NLM_F_ACK, &mut take) {
                    Err(failure) if failure.reason.raw_os_error() != Some(libc::ENODEV) => {
                        return Err(self.refused(*index, "read its counters".into(), failure));
                    }
                    _ => {}
                }
            }
        }
        Ok(found)
    }

    /// How many frames a device's root queueing discipline has dropped, modulo 2^32; none if
    /// it has no count.
    ///
    /// Asks for those of all devices: the answer about one goes to everybody who listens for
    /// changes (`qdisc_notify`, net/sched/sch_api.c), and before Linux 6.8 to nobody else.
    ///
    /// # Errors
    /// [`LinkError`].
    pub fn queue_drops(&mut self, index: u32) -> Result<Option<u32>, LinkError> {
        let mut found = None;
        let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        self.exchange(request, NLM_F_DUMP, |message| {
            if message.kind == libc::RTM_NEWQDISC {
                found = found.or_else(|| wire::queue_drops(message.payload, index));
            }
        })
        .map_err(|failure| LinkError::Socket {
            operation: "read queueing disciplines' counters",
            reason: failure.reason,
        })?;
        Ok(found)
    }

    /// Compares what the device reports with what it was asked for.
    fn verify(&mut self, index: u32, asked: &LinkSettings) -> Result<(), LinkError> {
        let report = self.report(index)?;
        let found = LinkSettings {
            up: asked.up.map(|_| report.state.up),
            mtu: asked.mtu.map(|_| report.state.mtu),
            noarp: asked.noarp.map(|_| report.state.noarp),
            alias: asked.alias.as_ref().map(|_| report.state.alias.unwrap_or_default()),
            tx_queue_len: asked.tx_queue_len.map(|_| report.state.tx_queue_len),
            // No mode reported means no IPv6 on the device, so no address either.
            addr_gen_none: asked.addr_gen_none
                && report.addr_gen_mode.is_none_or(|mode| mode == ADDR_GEN_MODE_NONE),
        };
        if found == *asked {
            return Ok(());
        }
        Err(LinkError::NotKept {
            device: named(&report.state.name, index),
            asked: describe(asked),
            found: describe(&found),
        })
    }

    /// Gives the device the root queueing discipline `noqueue`: a send goes
    /// straight to the driver, and its refusal comes back to the sender. Leaves a
    /// device alone that has it already, so that a restart disturbs no traffic.
    pub fn set_root_qdisc_noqueue(&mut self, index: u32) -> Result<(), LinkError> {
        if self.root_qdisc_kind(index)?.as_deref() == Some(NOQUEUE) {
            return Ok(());
        }
        let mut message = root_qdisc(index);
        message.attributes.push(TcAttribute::Kind(NOQUEUE.into()));
        self.acknowledged(
            RouteNetlinkMessage::NewQueueDiscipline(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
        .map_err(|failure| self.refused(index, "set the root qdisc noqueue".into(), failure))?;
        let found = self.root_qdisc_kind(index)?;
        if found.as_deref() == Some(NOQUEUE) {
            return Ok(());
        }
        Err(LinkError::NotKept {
            device: self.device(index),
            asked: "the root qdisc noqueue".into(),
            found: format!("the root qdisc {}", found.as_deref().unwrap_or("none")),
        })
    }

    /// Sets the root queueing discipline `noqueue` where the device has the kernel's
    /// default; false where somebody has set one.
    pub fn replace_default_root_qdisc(&mut self, index: u32) -> Result<bool, LinkError> {
        let mut message = root_qdisc(index);
        message.attributes.push(TcAttribute::Kind(NOQUEUE.into()));
        let request = RouteNetlinkMessage::NewQueueDiscipline(message);
        // To the kernel a default one, with handle 0, is none (`tc_modify_qdisc`,
        // net/sched/sch_api.c).
        match self.acknowledged(request, NLM_F_CREATE | NLM_F_EXCL) {
            Ok(()) => Ok(true),
            Err(failure) if failure.reason.raw_os_error() == Some(Errno::EEXIST as i32) => {
                Ok(false)
            }
            Err(failure) => Err(self.refused(index, "set the root qdisc noqueue".into(), failure)),
        }
    }

    /// The kind of the device's root queueing discipline (`pfifo_fast`,
    /// `fq_codel`, `noqueue`). `noop` on a device that was never up.
    pub fn root_qdisc_kind(&mut self, index: u32) -> Result<Option<String>, LinkError> {
        Ok(self.report(index)?.qdisc)
    }

    /// Removes the root queueing discipline, which puts the kernel's default in
    /// its place. A device that has the default already stays as it is.
    pub fn delete_root_qdisc(&mut self, index: u32) -> Result<(), LinkError> {
        let message = RouteNetlinkMessage::DelQueueDiscipline(root_qdisc(index));
        match self.acknowledged(message, 0) {
            // The default one has no handle to delete it by (`tc_get_qdisc`,
            // net/sched/sch_api.c).
            Err(failure) if failure.reason.raw_os_error() == Some(Errno::ENOENT as i32) => Ok(()),
            result => result
                .map_err(|failure| self.refused(index, "remove the root qdisc".into(), failure)),
        }
    }

    /// Deletes the device. A tap that a VM holds open goes too.
    pub fn delete_link(&mut self, index: u32) -> Result<(), LinkError> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.acknowledged(RouteNetlinkMessage::DelLink(message), 0)
            .map_err(|failure| self.refused(index, "delete it".into(), failure))
    }

    /// The device's present state.
    pub fn link(&mut self, index: u32) -> Result<LinkState, LinkError> {
        Ok(self.report(index)?.state)
    }

    /// The addresses, IPv4 and IPv6, that the host has on the device; none if it is gone.
    pub fn addresses(&mut self, index: u32) -> Result<Vec<IpAddr>, LinkError> {
        let mut addresses = Vec::new();
        let mut wanted = AddressMessage::default();
        wanted.header.index = index;
        for _ in 0..DUMP_ATTEMPTS {
            addresses.clear();
            let request = RouteNetlinkMessage::GetAddress(wanted.clone());
            let dumped = self.exchange(request, NLM_F_DUMP, |message| {
                if message.kind == libc::RTM_NEWADDR
                    && let Some((owner, address)) = wire::host_address(message.payload)
                    && owner == index
                {
                    addresses.push(address);
                }
            });
            match dumped {
                Ok(false) => {}
                Ok(true) => break,
                Err(failure) if failure.reason.raw_os_error() == Some(libc::ENODEV) => break,
                Err(failure) => {
                    return Err(self.refused(index, "list the host's addresses".into(), failure));
                }
            }
        }
        Ok(addresses)
    }

    /// All devices of the namespace.
    ///
    /// A dump disturbed by devices coming and going may miss one, so it is
    /// repeated; what any attempt saw is kept, the latest state winning, because
    /// whatever has gone since then has a notification of its own.
    pub(super) fn links(&mut self) -> Result<BTreeMap<u32, LinkState>, LinkError> {
        let mut links = BTreeMap::new();
        for _ in 0..DUMP_ATTEMPTS {
            let undisturbed = self
                .exchange(get_link(0), NLM_F_DUMP, |message| {
                    if message.kind == libc::RTM_NEWLINK
                        && let Some(report) = wire::link_report(message.payload)
                    {
                        links.insert(report.state.index, report.state);
                    }
                })
                .map_err(|failure| LinkError::Socket {
                    operation: "list the network devices",
                    reason: failure.reason,
                })?;
            if undisturbed {
                break;
            }
        }
        Ok(links)
    }

    /// All devices of the namespace, with what is not followed; one that comes or goes
    /// meanwhile may be missing.
    pub fn details(&mut self) -> Result<Vec<LinkDetails>, LinkError> {
        let mut found = Vec::new();
        self.exchange(get_link(0), NLM_F_DUMP, |message| {
            if message.kind == libc::RTM_NEWLINK {
                found.extend(wire::link_details(message.payload));
            }
        })
        .map_err(|failure| LinkError::Socket {
            operation: "list the network devices",
            reason: failure.reason,
        })?;
        Ok(found)
    }

    /// All addresses of the host, each with the index of its device.
    pub fn all_addresses(&mut self) -> Result<Vec<(u32, IpAddr)>, LinkError> {
        let mut found = Vec::new();
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        self.exchange(request, NLM_F_DUMP, |message| {
            if message.kind == libc::RTM_NEWADDR {
                found.extend(wire::host_address(message.payload));
            }
        })
        .map_err(|failure| LinkError::Socket {
            operation: "list the host's addresses",
            reason: failure.reason,
        })?;
        Ok(found)
    }

    /// All the kernel tells about one device.
    fn report(&mut self, index: u32) -> Result<LinkReport, LinkError> {
        self.read_state(index, wire::link_report)
    }

    /// The device's present state, with what is not followed.
    pub fn details_of(&mut self, index: u32) -> Result<LinkDetails, LinkError> {
        self.read_state(index, wire::link_details)
    }

    fn read_state<T>(
        &mut self,
        index: u32,
        decode: fn(&[u8]) -> Option<T>,
    ) -> Result<T, LinkError> {
        self.try_read_state(index, decode).map_err(|failure| LinkError::Refused {
            // Not by `refused`: asking for the name is what has just failed.
            device: format!("network device {index}"),
            operation: "read its state".into(),
            reason: failure.reason,
            explanation: failure.explanation,
        })
    }

    fn try_read_state<T>(
        &mut self,
        index: u32,
        decode: fn(&[u8]) -> Option<T>,
    ) -> Result<T, Failure> {
        let mut state = None;
        self.exchange(get_link(index), NLM_F_ACK, |message| {
            if message.kind == libc::RTM_NEWLINK {
                state = decode(message.payload);
            }
        })?;
        state.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData).into())
    }

    /// How an error names the device.
    fn device(&mut self, index: u32) -> String {
        match self.try_read_state(index, wire::link_report) {
            Ok(report) => named(&report.state.name, index),
            Err(_) => format!("network device {index}"),
        }
    }

    fn refused(&mut self, index: u32, operation: String, failure: Failure) -> LinkError {
        LinkError::Refused {
            device: self.device(index),
            operation,
            reason: failure.reason,
            explanation: failure.explanation,
        }
    }

    /// Sends a request that changes something and waits for the kernel's yes.
    fn acknowledged(&mut self, request: RouteNetlinkMessage, flags: u16) -> Result<(), Failure> {
        self.exchange(request, NLM_F_ACK | flags, |_| {}).map(drop)
    }

    /// Sends a request and passes each message of the answer on, until its end.
    /// Returns whether the answer is consistent: not disturbed by changes made
    /// during a dump.
    fn exchange(
        &mut self,
        request: RouteNetlinkMessage,
        flags: u16,
        mut consumer: impl FnMut(&Message<'_>),
    ) -> Result<bool, Failure> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request));
        message.finalize();
        self.buffer.clear();
        self.buffer.resize(message.buffer_len(), 0);
        message.serialize(&mut self.buffer);
        self.socket.send_to(&self.buffer, &SocketAddr::new(0, 0), 0)?;

        let mut undisturbed = true;
        loop {
            self.receive()?;
            for message in wire::messages(&self.buffer) {
                // Answers to a request given up earlier.
                if message.sequence != self.sequence {
                    continue;
                }
                undisturbed &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    NLMSG_ERROR | NLMSG_DONE => {
                        // An NLMSG_DONE without a payload is a plain end.
                        let code = wire::error_code(message.payload).unwrap_or(0);
                        if code == 0 {
                            return Ok(undisturbed);
                        }
                        return Err(Failure {
                            reason: io::Error::from_raw_os_error(code.saturating_neg()),
                            explanation: wire::explanation(&message),
                        });
                    }
                    _ => consumer(&message),
                }
            }
        }
    }

    /// Waits for a datagram of the kernel's and leaves it in the buffer.
    fn receive(&mut self) -> io::Result<()> {
        loop {
            self.buffer.clear();
            match self.socket.recv_from(&mut self.buffer, libc::MSG_TRUNC) {
                // Anything from another process is not an answer.
                Ok((_, sender)) if sender.port_number() != 0 => {}
                Ok((length, _)) if length > self.buffer.len() => {
                    return Err(io::Error::from(io::ErrorKind::FileTooLarge));
                }
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        format!("no answer from the kernel in {ANSWER_TIMEOUT:?}"),
                    ));
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// A device in an error text.
fn named(name: &str, index: u32) -> String {
    format!("{name} (index {index})")
}

/// Whether a refusal means that the device or the host has no IPv6.
fn is_without_ipv6(failure: &Failure) -> bool {
    let errno = failure.reason.raw_os_error();
    errno == Some(Errno::EAFNOSUPPORT as i32) || errno == Some(Errno::EOPNOTSUPP as i32)
}

/// The request for one device's report, or with index 0 and `NLM_F_DUMP` for all.
/// Without statistics, a third of a report, which nobody here reads.
fn get_link(index: u32) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    RouteNetlinkMessage::GetLink(message)
}

/// The request that applies settings.
fn set_link(index: u32, settings: &LinkSettings) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    for (flag, value) in [(LinkFlags::Up, settings.up), (LinkFlags::Noarp, settings.noarp)] {
        if let Some(on) = value {
            message.header.change_mask |= flag;
            message.header.flags.set(flag, on);
        }
    }
    let attributes = &mut message.attributes;
    attributes.extend(settings.mtu.map(LinkAttribute::Mtu));
    attributes.extend(settings.alias.clone().map(LinkAttribute::IfAlias));
    attributes.extend(settings.tx_queue_len.map(LinkAttribute::TxQueueLen));
    if settings.addr_gen_none {
        let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]));
    }
    RouteNetlinkMessage::SetLink(message)
}

/// A message about the root queueing discipline of a device.
fn root_qdisc(index: u32) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = index.cast_signed();
    message.header.parent = TcHandle::ROOT;
    message
}

/// Settings in the words of `ip link set`, for errors.
fn describe(settings: &LinkSettings) -> String {
    let on_off = |on| if on { "on" } else { "off" };
    let mut words = Vec::new();
    words.extend(settings.mtu.map(|mtu| format!("mtu {mtu}")));
    words.extend(settings.noarp.map(|noarp| format!("arp {}", on_off(!noarp))));
    words.extend(settings.tx_queue_len.map(|length| format!("txqueuelen {length}")));
    words.extend(settings.alias.as_ref().map(|alias| format!("alias {alias:?}")));
    words.extend(settings.addr_gen_none.then(|| "addrgenmode none".to_owned()));
    words.extend(settings.up.map(|up| if up { "up" } else { "down" }.to_owned()));
    if words.is_empty() { "nothing".into() } else { words.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_asked_for_is_in_the_request() {
        let RouteNetlinkMessage::SetLink(message) = set_link(7, &LinkSettings::default()) else {
            unreachable!("set_link makes SetLink");
        };
        assert_eq!(message.header.index, 7);
        assert_eq!(message.header.change_mask, LinkFlags::empty());
        assert_eq!(message.attributes, []);

        let settings = LinkSettings { up: Some(false), noarp: Some(true), ..Default::default() };
        let RouteNetlinkMessage::SetLink(message) = set_link(7, &settings) else {
            unreachable!("set_link makes SetLink");
        };
        assert_eq!(message.header.change_mask, LinkFlags::Up | LinkFlags::Noarp);
        assert_eq!(message.header.flags, LinkFlags::Noarp);
    }

    #[test]
    fn settings_are_described_as_ip_link_names_them() {
        let settings = LinkSettings {
            up: Some(true),
            mtu: Some(65521),
            noarp: Some(true),
            alias: Some("VLAN 101".into()),
            tx_queue_len: Some(1024),
            addr_gen_none: true,
        };
        assert_eq!(
            describe(&settings),
            "mtu 65521, arp off, txqueuelen 1024, alias \"VLAN 101\", addrgenmode none, up"
        );
    }
}
