//! Attaching tc programs by a clsact qdisc and a `bpf` filter (Linux 4.5,
//! net/sched/cls_bpf.c): for kernels without TCX.
//!
//! The filter is in direct-action mode: the program's result is the verdict. It
//! stays when we die, as by TCX. It carries the program's name, so a filter an
//! earlier run left is found and replaced in one step; anybody may read names
//! here, while TCX needs CAP_SYS_ADMIN for it. New filters get the highest
//! priority, and stand first among those of the same priority.
//!
//! A qdisc made for a filter goes with it, unless somebody else uses it by then: an
//! empty one would keep others from adding theirs (libvirt's `<bandwidth>` adds an
//! `ingress` qdisc, which takes the same place). Whose the qdisc is, the filter's
//! handle tells, so that a later run knows it too.
//!
//! Making or removing the qdisc of a device that is up takes the device's sending side
//! down for a grace period (`qdisc_graft` in net/sched/sch_api.c): what is sent
//! meanwhile vanishes, and the sender is told that all is well. So a qdisc is not
//! removed while frames are forwarded to the device ([`Qdisc::Leave`]).

use super::syscall::BpfError;
use super::tc::{Attached, Direction};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// First of all filters.
const PRIORITY: u32 = 1;
/// Handle of a filter whose qdisc was made for it. Others get theirs from the kernel,
/// which counts from 1.
const WITH_OWN_QDISC: TcHandle = TcHandle { major: 0, minor: 0x5EA1 };
const ETH_P_ALL: u16 = 0x0003;

/// Where a filter stands: what replaces or deletes it needs to say.
struct Place {
    handle: TcHandle,
    /// Priority in the upper half, protocol (network order) in the lower.
    info: u32,
}

/// Attaches `program` under `name` to interface `device`, in place of a filter of
/// that name; [`Attached::Beside`] others if they made the qdisc.
///
/// # Errors
/// [`BpfError::Unsupported`] if the kernel lacks clsact or cls_bpf.
pub fn attach(
    program: BorrowedFd<'_>,
    name: &str,
    device: u32,
    direction: Direction,
) -> Result<Attached, BpfError> {
    let mut netlink = Netlink::open()?;
    let made_qdisc = netlink.make_qdisc(device)?;
    let previous = netlink.find(name, device, direction)?;

    let mut message = filter_message(device, direction);
    message.attributes.push(TcAttribute::Options(vec![
        TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd() as u32)),
        TcOption::Bpf(TcFilterBpfOption::ProgName(name.to_owned())),
        TcOption::Bpf(TcFilterBpfOption::Flags(TcBpfFlags::DirectAction)),
    ]));
    let (flags, attached) = match previous {
        Some(place) => {
            (message.header.handle, message.header.info) = (place.handle, place.info);
            (NLM_F_REPLACE, Attached::Replaced)
        }
        None => {
            message.header.info = PRIORITY << 16 | u32::from(ETH_P_ALL.to_be());
            if made_qdisc {
                message.header.handle = WITH_OWN_QDISC;
            }
            (NLM_F_EXCL, if made_qdisc { Attached::New } else { Attached::Beside })
        }
    };
    let request = RouteNetlinkMessage::NewTrafficFilter(message);
    netlink.exchange(request, NLM_F_ACK | NLM_F_CREATE | flags).map_err(|error| {
        missing(&error, "cls_bpf", "Linux 4.5, CONFIG_NET_CLS_BPF").unwrap_or_else(|| {
            BpfError::from_io(format!("attach BPF filter {name} to interface {device}"), error)
        })
    })?;
    Ok(attached)
}

/// True if a filter called `name` is attached to interface `device`.
///
/// # Errors
/// There is no such interface.
pub fn is_attached(name: &str, device: u32, direction: Direction) -> Result<bool, BpfError> {
    Ok(Netlink::open()?.find(name, device, direction)?.is_some())
}

/// Removes the clsact qdisc if no filter is in it.
///
/// # Errors
/// There is no such interface.
pub fn remove_empty_qdisc(device: u32) -> Result<(), BpfError> {
    Netlink::open()?.remove_empty_qdisc(device)
}

/// What becomes of a qdisc that was made for a filter, when the filter goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Qdisc {
    /// It goes too, if nobody else has a filter in it.
    Remove,
    /// It stays, to be removed by [`remove_empty_qdisc`] when nothing is sent.
    Leave,
}

/// What detaching did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Detached {
    /// There was no such filter.
    Nothing,
    /// The filter is gone, and what was made for it.
    All,
    /// The filter is gone; the qdisc made for it is still there.
    AllButQdisc,
}

/// Detaches the filter called `name`; false if there was none. The qdisc goes too, if
/// it was made for this filter and nobody else has one in it.
///
/// # Errors
/// There is no such interface.
pub fn detach(name: &str, device: u32, direction: Direction) -> Result<bool, BpfError> {
    detach_filter(name, device, direction, Qdisc::Remove).map(|what| what != Detached::Nothing)
}

/// Detaches the filter called `name`.
pub(super) fn detach_filter(
    name: &str,
    device: u32,
    direction: Direction,
    qdisc: Qdisc,
) -> Result<Detached, BpfError> {
    let mut netlink = Netlink::open()?;
    let Some(place) = netlink.find(name, device, direction)? else {
        return Ok(Detached::Nothing);
    };
    let mut message = filter_message(device, direction);
    (message.header.handle, message.header.info) = (place.handle, place.info);
    netlink.exchange(RouteNetlinkMessage::DelTrafficFilter(message), NLM_F_ACK).map_err(
        |error| {
            BpfError::from_io(format!("detach BPF filter {name} from interface {device}"), error)
        },
    )?;
    if place.handle == WITH_OWN_QDISC {
        if qdisc == Qdisc::Leave {
            return Ok(Detached::AllButQdisc);
        }
        netlink.remove_empty_qdisc(device)?;
    }
    Ok(Detached::All)
}

/// A message about the clsact qdisc.
fn qdisc_message(device: u32) -> TcMessage {
    let mut message = TcMessage::with_index(device as i32);
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
    message.attributes.push(TcAttribute::Kind("clsact".to_owned()));
    message
}

/// A message about a `bpf` filter at the hook.
fn filter_message(device: u32, direction: Direction) -> TcMessage {
    let mut message = TcMessage::with_index(device as i32);
    let minor = match direction {
        Direction::Ingress => TcHandle::MIN_INGRESS,
        Direction::Egress => TcHandle::MIN_EGRESS,
    };
    message.header.parent = TcHandle { major: TcHandle::CLSACT.major, minor };
    message.attributes.push(TcAttribute::Kind(TcFilterBpf::KIND.to_owned()));
    message
}

/// The error of a kernel that does not know a kind of qdisc or filter.
fn missing(error: &io::Error, feature: &'static str, since: &'static str) -> Option<BpfError> {
    let unknown = matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP));
    unknown.then_some(BpfError::Unsupported { feature, since })
}

/// A rtnetlink socket that asks one thing at a time.
struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    fn open() -> Result<Self, BpfError> {
        let open = || {
            let mut socket = Socket::new(NETLINK_ROUTE)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        };
        open()
            .map(|socket| Self { socket, sequence: 0 })
            .map_err(|error| BpfError::from_io("open a netlink socket", error))
    }

    /// Makes the qdisc; false if it was there, or an ingress qdisc, which takes the
    /// same place and filters.
    fn make_qdisc(&mut self, device: u32) -> Result<bool, BpfError> {
        let request = RouteNetlinkMessage::NewQueueDiscipline(qdisc_message(device));
        match self.exchange(request, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(false),
            Err(error) => Err(missing(&error, "clsact", "Linux 4.5, CONFIG_NET_SCH_INGRESS")
                .unwrap_or_else(|| {
                    BpfError::from_io(format!("add a clsact qdisc to interface {device}"), error)
                })),
        }
    }

    /// Removes the qdisc if no filter is in it.
    fn remove_empty_qdisc(&mut self, device: u32) -> Result<(), BpfError> {
        for direction in [Direction::Ingress, Direction::Egress] {
            if !self.filters(device, direction)?.is_empty() {
                return Ok(());
            }
        }
        let request = RouteNetlinkMessage::DelQueueDiscipline(qdisc_message(device));
        match self.exchange(request, NLM_F_ACK) {
            Ok(_) => Ok(()),
            // Somebody has removed it, or put an ingress qdisc in its place.
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => {
                Ok(())
            }
            Err(error) => {
                let action = format!("remove the clsact qdisc of interface {device}");
                Err(BpfError::from_io(action, error))
            }
        }
    }

    /// Where the filter called `name` stands.
    fn find(
        &mut self,
        name: &str,
        device: u32,
        direction: Direction,
    ) -> Result<Option<Place>, BpfError> {
        let filters = self.filters(device, direction)?;
        let named = filters.into_iter().find(|filter| is_named(filter, name));
        Ok(named.map(|filter| Place { handle: filter.header.handle, info: filter.header.info }))
    }

    /// All filters of one side; none without a qdisc to hold them.
    fn filters(&mut self, device: u32, direction: Direction) -> Result<Vec<TcMessage>, BpfError> {
        let mut message = filter_message(device, direction);
        // The kernel lists all kinds whatever we say; saying none is the plain form.
        message.attributes.clear();
        let request = RouteNetlinkMessage::GetTrafficFilter(message);
        let answers = match self.exchange(request, NLM_F_DUMP) {
            Ok(answers) => answers,
            // There is no qdisc to hold filters.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(Vec::new()),
            Err(error) => {
                let action = format!("list the tc filters of interface {device}");
                return Err(BpfError::from_io(action, error));
            }
        };
        let filters = answers.into_iter().filter_map(|answer| match answer {
            RouteNetlinkMessage::NewTrafficFilter(filter) => Some(filter),
            _ => None,
        });
        Ok(filters.collect())
    }

    /// Sends a request and collects the answers until its acknowledgement, its
    /// error or the end of its list.
    fn exchange(
        &mut self,
        request: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;

        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full()?;
            let mut rest = datagram.as_slice();
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
                let length = (answer.header.length as usize).next_multiple_of(4);
                rest = rest.get(length..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    // Code 0 is the acknowledgement.
                    NetlinkPayload::Error(error) => {
                        return error.code.map_or(Ok(answers), |_| Err(error.to_io()));
                    }
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::InnerMessage(inner) => answers.push(inner),
                    _ => {}
                }
            }
        }
    }
}

fn is_named(filter: &TcMessage, name: &str) -> bool {
    let options = filter.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    options.flatten().any(|option| {
        matches!(option, TcOption::Bpf(TcFilterBpfOption::ProgName(other)) if other == name)
    })
}
