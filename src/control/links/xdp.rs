//! What a device's driver can do with XDP, as the kernel tells since Linux 6.3
//! (Documentation/netlink/specs/netdev.yaml).

use std::io;
use std::time::Duration;

use netlink_packet_core::{
    DecodeError, DefaultNla, Emitable, NLM_F_REQUEST, NetlinkDeserializable, NetlinkHeader,
    NetlinkMessage, NetlinkPayload, NetlinkSerializable, NlaBuffer, NlasIterator,
    ParseableParametrized,
};
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_generic::{GenlFamily, GenlHeader, GenlMessage};
use netlink_sys::protocols::NETLINK_GENERIC;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::TimeVal;

const FAMILY: &str = "netdev";
/// NETDEV_CMD_DEV_GET and its attributes.
const DEVICE_GET: u8 = 1;
const INDEX: u16 = 1;
const FEATURES: u16 = 3;
/// NETDEV_XDP_ACT_NDO_XMIT: the driver sends frames that XDP programs of others redirect.
const REDIRECT_TARGET: u64 = 1 << 2;
/// As long as any answer of the kernel may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A request about a device, or the answer to it.
#[derive(Debug)]
struct Device {
    index: u32,
    features: u64,
}

impl GenlFamily for Device {
    fn family_name() -> &'static str {
        FAMILY
    }

    fn command(&self) -> u8 {
        DEVICE_GET
    }

    fn version(&self) -> u8 {
        1
    }
}

impl Emitable for Device {
    fn buffer_len(&self) -> usize {
        DefaultNla::new(INDEX, self.index.to_ne_bytes().to_vec()).buffer_len()
    }

    fn emit(&self, buffer: &mut [u8]) {
        DefaultNla::new(INDEX, self.index.to_ne_bytes().to_vec()).emit(buffer);
    }
}

impl ParseableParametrized<[u8], GenlHeader> for Device {
    fn parse_with_param(buffer: &[u8], _: GenlHeader) -> Result<Self, DecodeError> {
        let mut device = Self { index: 0, features: 0 };
        for attribute in NlasIterator::new(buffer) {
            let attribute: NlaBuffer<&[u8]> = attribute?;
            match (attribute.kind(), attribute.value()) {
                (INDEX, &[a, b, c, d]) => device.index = u32::from_ne_bytes([a, b, c, d]),
                (FEATURES, value) => {
                    let value = value.try_into().map(u64::from_ne_bytes);
                    device.features = value.unwrap_or_default();
                }
                _ => {}
            }
        }
        Ok(device)
    }
}

/// Whether the driver of the device takes frames that XDP programs of other devices redirect
/// to it; `None` if this kernel does not tell (before Linux 6.3).
///
/// # Errors
/// The kernel's: no such device, no descriptors left.
pub fn takes_redirected(index: u32) -> io::Result<Option<bool>> {
    let mut socket = Socket::new(NETLINK_GENERIC)?;
    socket.bind_auto()?;
    let timeout = TimeVal::new(ANSWER_TIMEOUT.as_secs().cast_signed(), 0);
    setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
    let family = GenlCtrl {
        cmd: GenlCtrlCmd::GetFamily,
        nlas: vec![GenlCtrlAttrs::FamilyName(FAMILY.to_owned())],
    };
    let family = match ask(&socket, GenlMessage::from_payload(family)) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(None),
        other => other?,
    };
    let number = family.payload.nlas.iter().find_map(|attribute| match attribute {
        GenlCtrlAttrs::FamilyId(number) => Some(*number),
        _ => None,
    });
    let Some(number) = number else { return Ok(None) };
    let mut request = GenlMessage::from_payload(Device { index, features: 0 });
    request.set_resolved_family_id(number);
    let answer = ask(&socket, request)?;
    Ok(Some(answer.payload.features & REDIRECT_TARGET != 0))
}

/// One request and the first message of its answer.
fn ask<T>(socket: &Socket, request: GenlMessage<T>) -> io::Result<GenlMessage<T>>
where
    T: GenlFamily + Emitable + ParseableParametrized<[u8], GenlHeader> + std::fmt::Debug,
    GenlMessage<T>: NetlinkSerializable + NetlinkDeserializable,
{
    let invalid = |error: DecodeError| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let mut buffer = vec![0; message.buffer_len()];
    message.serialize(&mut buffer);
    socket.send_to(&buffer, &SocketAddr::new(0, 0), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<GenlMessage<T>>::deserialize(&answer).map_err(invalid)?;
    match answer.payload {
        NetlinkPayload::InnerMessage(message) => Ok(message),
        NetlinkPayload::Error(error) => Err(error.to_io()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}
