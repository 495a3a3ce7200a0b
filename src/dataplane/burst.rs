//! One burst on its way out: rewriting each frame, sending what can go as it is,
//! cutting what the kernel cannot segment for us, and counting every frame.

use super::capture::Watch;
use super::counters::FlowCounters;
use crate::frame::segment::Segmenter;
use crate::frame::tag::STACK_DEPTH;
use crate::frame::vnet::{GSO_ECN, GSO_UDP_L4, Offload, VNET_HEADER_LEN, check_offload};
use crate::frame::{ETHERNET_HEADER_LEN, TAG_LEN, TagEdit, TagStack, Tpid, read_u16};
use crate::port::{Device, Link};
use crate::switch::DropReason;
use crate::sys::packet::{BURST, Received, SendSpace};
use arrayvec::ArrayVec;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// What this kernel segments when we send it (found by the start-up probe).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abilities {
    /// Super-frames with VLAN tags in the bytes (5.19, 5.10.163 and the like).
    pub tagged_gso: bool,
    /// UDP super-frames (6.2).
    pub udp_gso: bool,
}

/// How a rewritten frame has to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Handling {
    /// In one piece.
    Whole,
    /// Cut into segments here.
    Cut,
}

/// How long a port whose guest's queue is full is spared further sends: long
/// enough for the guest to take a batch, short enough not to leave it idle.
const SHED_TIME: Duration = Duration::from_micros(50);

/// Memory for the segments of one super-frame; 64 of 1.5 kB, or one of 64 KiB.
#[derive(Debug)]
pub struct SegmentSpace(Box<[u8]>);

impl Default for SegmentSpace {
    fn default() -> Self {
        Self(vec![0; 160 * 1024].into_boxed_slice())
    }
}

/// Rewrites a frame's tags and virtio header in place, for a device with this MTU.
///
/// # Errors
/// The reason to drop it.
#[inline]
pub fn rewrite(
    frame: &mut Received<'_>,
    edit: &TagEdit,
    abilities: Abilities,
    mtu: u32,
) -> Result<Handling, DropReason> {
    let offload = check_offload(frame.header, frame.buffer.frame());
    let growth = frame.buffer.apply(edit, frame.stripped).map_err(|_| DropReason::Malformed)?;
    // At most a few tags' length: it fits.
    let growth = growth as i16;
    let grown = |offset: u16| offset.checked_add_signed(growth).ok_or(DropReason::BadOffload);
    match offload {
        Offload::Bad => Err(DropReason::BadOffload),
        Offload::Segment => {
            frame.header.csum_start = grown(frame.header.csum_start)?;
            Ok(Handling::Cut)
        }
        Offload::Plain(mut header) => {
            if header.needs_csum() {
                header.csum_start = grown(header.csum_start)?;
                if header.hdr_len > 0 {
                    header.hdr_len = grown(header.hdr_len)?;
                }
            }
            frame.header = header;
            if header.is_gso() {
                return super_frame(frame, abilities, mtu);
            }
            frame.buffer.write_header(header);
            Ok(Handling::Whole)
        }
    }
}

/// The kernel checks the length of a plain frame against the MTU and says so; the
/// segments of a super-frame it does not check, and drivers drop them in silence.
fn super_frame(
    frame: &mut Received<'_>,
    abilities: Abilities,
    mtu: u32,
) -> Result<Handling, DropReason> {
    let header = frame.header;
    let tpid = read_u16(frame.buffer.frame(), 12).and_then(Tpid::from_ethertype);
    let allowance = if tpid == Some(Tpid::Customer) { TAG_LEN } else { 0 };
    let longest = (mtu as usize).saturating_add(ETHERNET_HEADER_LEN + allowance);
    if usize::from(header.hdr_len) + usize::from(header.gso_size) > longest {
        return Err(DropReason::TooLong);
    }
    let udp = header.gso_type & !GSO_ECN == GSO_UDP_L4;
    if has_legacy_tag(frame.buffer.frame())
        || (udp && !abilities.udp_gso)
        || (tpid.is_some() && !abilities.tagged_gso)
    {
        return Ok(Handling::Cut);
    }
    frame.buffer.write_header(header);
    Ok(Handling::Whole)
}

/// 0x9100 and 0x9200 are no VLANs to the kernel: it does not look behind them and
/// cannot segment (`skb_network_protocol` in `net/core/gso.c`).
fn has_legacy_tag(frame: &[u8]) -> bool {
    TagStack::read(None, frame).is_ok_and(|tags| {
        (0..STACK_DEPTH)
            .filter_map(|depth| tags.get(depth))
            .any(|tag| matches!(tag.tpid, Tpid::Legacy9100 | Tpid::Legacy9200))
    })
}

/// Which way a lane leads, for naming what goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Toward {
    /// To a port's guest.
    Guest,
    /// To the guest of a port that another worker has: nowhere.
    Elsewhere,
    /// To the wire.
    Uplink,
}

impl Toward {
    fn absent(self) -> DropReason {
        match self {
            Self::Guest => DropReason::GuestAbsent,
            Self::Elsewhere => DropReason::WrongWorker,
            Self::Uplink => DropReason::UplinkDown,
        }
    }

    fn queue_full(self) -> DropReason {
        match self {
            Self::Guest | Self::Elsewhere => DropReason::GuestQueueFull,
            Self::Uplink => DropReason::UplinkQueueFull,
        }
    }

    /// Reads the kernel's answer to a send (`packet_snd`, `tun_chr_write_iter`).
    fn reason(self, errno: Errno) -> DropReason {
        match errno {
            Errno::ENOBUFS | Errno::EAGAIN => self.queue_full(),
            // The last: a tap whose netdev was deleted under its descriptor.
            Errno::ENETDOWN | Errno::ENXIO | Errno::ENODEV | Errno::EIO | Errno::EBADFD => {
                self.absent()
            }
            Errno::EMSGSIZE => DropReason::TooLong,
            Errno::EINVAL => DropReason::BadOffload,
            _ => DropReason::SendFailed,
        }
    }
}

/// One way out of the switch, for the length of one burst.
#[derive(Debug)]
pub struct Lane<'w, const WATCHED: bool> {
    /// Where frames go; `None` if the device is not there.
    pub device: Option<&'w mut Device>,
    /// The device's state.
    pub link: &'w Link,
    /// Until when to spare a device whose queue was full.
    pub shed_until: &'w mut Option<Instant>,
    /// What is counted.
    pub flow: &'w FlowCounters,
    /// Which way.
    pub toward: Toward,
    /// The time of this burst.
    pub now: Instant,
    /// `sendmmsg`'s arrays.
    pub space: &'w mut SendSpace,
    /// Memory for cutting super-frames.
    pub segments: &'w mut SegmentSpace,
    /// Who looks on.
    pub watch: Watch<'w, WATCHED>,
}

impl<const WATCHED: bool> Lane<'_, WATCHED> {
    /// Sends frames in order, or counts why not. Returns how many segments were made
    /// of those that had to be cut.
    #[inline]
    pub fn send_frames<'f>(
        &mut self,
        frames: impl Iterator<Item = (&'f Received<'f>, Handling)>,
    ) -> usize {
        let mut segments = 0;
        let mut packets = ArrayVec::<&[u8], BURST>::new();
        for (frame, handling) in frames {
            match handling {
                Handling::Whole => packets.push(frame.buffer.packet()),
                Handling::Cut => {
                    self.send(&packets);
                    packets.clear();
                    segments += self.cut(frame);
                }
            }
        }
        self.send(&packets);
        segments
    }

    /// Drops frames instead.
    #[cold]
    pub fn refuse<'f>(&mut self, frames: impl Iterator<Item = &'f Received<'f>>, why: DropReason) {
        let packets: ArrayVec<&[u8], BURST> = frames.map(|frame| frame.buffer.packet()).collect();
        self.drop_all(&packets, why);
    }

    fn send(&mut self, packets: &[&[u8]]) {
        if packets.is_empty() {
            return;
        }
        if let Some(reason) = self.closed() {
            return self.drop_all(packets, reason);
        }
        let Some(device) = &mut self.device else { return };
        let (watch, to_uplink) = (&mut self.watch, self.toward == Toward::Uplink);
        let mut shown = 0;
        let mut refused_frames = 0;
        let mut refused_bytes = 0;
        let (flow, toward) = (self.flow, self.toward);
        let mut congested = false;
        device.transmit(packets, self.space, |position, errno| {
            let reason = toward.reason(errno);
            congested = reason == toward.queue_full();
            // A full queue stays full for the rest of the burst: sending it would
            // cost as much as delivering it.
            let end = if congested { packets.len() } else { position + 1 };
            let refused = packets.get(position..end).unwrap_or_default();
            refused_frames += refused.len() as u64;
            refused_bytes += frame_bytes(refused);
            flow.add_drops(reason, refused.len() as u64);
            watch.sent(to_uplink, packets.get(shown..position).unwrap_or_default(), None);
            watch.sent(to_uplink, refused, Some(reason));
            shown = end;
            if reason == DropReason::SendFailed {
                flow.note_send_error(errno);
            }
            if congested { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        });
        watch.sent(to_uplink, packets.get(shown..).unwrap_or_default(), None);
        let spare = congested && self.toward == Toward::Guest;
        *self.shed_until = spare.then(|| self.now + SHED_TIME);
        self.flow
            .add_out(packets.len() as u64 - refused_frames, frame_bytes(packets) - refused_bytes);
    }

    /// Why nothing can go out now, if so.
    #[inline]
    fn closed(&self) -> Option<DropReason> {
        if self.device.is_none() || !self.link.is_up() {
            return Some(self.toward.absent());
        }
        let shed = self.shed_until.is_some_and(|until| self.now < until);
        shed.then(|| self.toward.queue_full())
    }

    fn drop_all(&mut self, packets: &[&[u8]], reason: DropReason) {
        self.flow.add_drops(reason, packets.len() as u64);
        self.watch.sent(self.toward == Toward::Uplink, packets, Some(reason));
    }

    /// Cuts a super-frame the kernel would lose and sends the segments. One that can
    /// go nowhere is dropped in one piece: cutting it would be work for nobody. Returns
    /// how many segments there were.
    fn cut(&mut self, frame: &Received<'_>) -> usize {
        if let Some(reason) = self.closed() {
            self.drop_all(&[frame.buffer.packet()], reason);
            return 0;
        }
        let Ok(mut segmenter) = Segmenter::new(frame.buffer.frame(), frame.header) else {
            self.drop_all(&[frame.buffer.packet()], DropReason::BadOffload);
            return 0;
        };
        self.flow.add_split(segmenter.segment_count().saturating_sub(1) as u64);
        // Taken out while in use: an empty box costs nothing.
        let mut memory = std::mem::replace(&mut self.segments.0, Box::new([]));
        while segmenter.remaining() > 0 {
            if self.send_some_segments(&mut segmenter, &mut memory) == 0 {
                self.flow.add_drops(DropReason::BadOffload, segmenter.remaining() as u64);
                break;
            }
        }
        self.segments.0 = memory;
        segmenter.segment_count()
    }

    /// Fills the memory with segments and sends them; returns how many there were.
    fn send_some_segments(&mut self, segmenter: &mut Segmenter<'_>, memory: &mut [u8]) -> usize {
        let longest = VNET_HEADER_LEN + segmenter.segment_len_max();
        let mut packets = ArrayVec::<&[u8], BURST>::new();
        let mut free = memory;
        while !packets.is_full() && segmenter.remaining() > 0 {
            let Some((place, rest)) = free.split_at_mut_checked(longest) else { break };
            let Some((header, body)) = place.split_first_chunk_mut::<VNET_HEADER_LEN>() else {
                break;
            };
            *header = [0; VNET_HEADER_LEN];
            let Ok(Some(length)) = segmenter.next_into(body) else { break };
            packets.push(place.get(..VNET_HEADER_LEN + length).unwrap_or_default());
            free = rest;
        }
        self.send(&packets);
        packets.len()
    }
}

#[inline]
fn frame_bytes(packets: &[&[u8]]) -> u64 {
    packets.iter().map(|packet| packet.len().saturating_sub(VNET_HEADER_LEN) as u64).sum()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::super::capture::Captures;
    use super::*;
    use crate::frame::edit::HEADROOM;
    use crate::frame::vnet::{FLAG_NEEDS_CSUM, GSO_TCPV4};
    use crate::frame::{FrameBuffer, Tag, Tci, VnetHeader};
    use crate::port::{DeviceState, MemoryPort};

    const ABLE: Abilities = Abilities { tagged_gso: true, udp_gso: true };

    fn received(space: &mut [u8], header: VnetHeader) -> Received<'_> {
        let buffer = FrameBuffer::new(space, HEADROOM).unwrap();
        Received { buffer, stripped: None, header }
    }

    #[test]
    fn an_offset_that_does_not_grow_is_a_bad_offload() {
        let push = |tags: usize| {
            let tag = Tag { tpid: Tpid::Customer, tci: Tci(5) };
            let push = [(tags > 0).then_some(tag), (tags > 1).then_some(tag)];
            TagEdit { pop: 0, push }
        };
        // With the checksum's two bytes: one tag more still fits 16 bits, two do not.
        let header = VnetHeader {
            flags: FLAG_NEEDS_CSUM,
            csum_start: u16::MAX - 6,
            ..VnetHeader::default()
        };
        for (tags, expected) in
            [(0, Ok(Handling::Whole)), (1, Ok(Handling::Whole)), (2, Err(DropReason::BadOffload))]
        {
            let mut space = vec![0; HEADROOM + 66_000];
            let mut frame = received(&mut space, header);
            assert_eq!(rewrite(&mut frame, &push(tags), ABLE, u32::MAX), expected, "{tags} tags");
        }
    }

    #[test]
    fn a_super_frame_that_can_go_nowhere_is_not_cut() {
        let mut space = vec![0; HEADROOM];
        space.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0]);
        space.extend([0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
        space.resize(HEADROOM + 54 + 4000, 0x50);
        let header = VnetHeader {
            flags: FLAG_NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            hdr_len: 54,
            gso_size: 1000,
            csum_start: 34,
            csum_offset: 16,
        };
        let frame = received(&mut space, header);
        let now = Instant::now();
        let cut = |state: DeviceState, mut shed_until: Option<Instant>| {
            let link = Link::default();
            link.set(state, 1500);
            let flow = FlowCounters::default();
            let mut nobody = Captures::default();
            let mut lane = Lane {
                device: Some(&mut Device::Memory(MemoryPort::default())),
                link: &link,
                shed_until: &mut shed_until,
                flow: &flow,
                toward: Toward::Guest,
                now,
                space: &mut SendSpace::default(),
                segments: &mut SegmentSpace::default(),
                watch: nobody.watch::<false>(Some(0)),
            };
            lane.send_frames([(&frame, Handling::Cut)].into_iter());
            let flow = flow.snapshot();
            let drops: Vec<_> = flow.reasons().collect();
            (flow.split_frames, flow.out_frames, drops)
        };
        assert_eq!(cut(DeviceState::Up, None), (3, 4, vec![]));
        let absent = vec![(DropReason::GuestAbsent, 1)];
        assert_eq!(cut(DeviceState::Down, None), (0, 0, absent));
        let full = vec![(DropReason::GuestQueueFull, 1)];
        assert_eq!(cut(DeviceState::Up, Some(now + SHED_TIME)), (0, 0, full));
    }

    #[test]
    fn legacy_tags_are_found_behind_others() {
        let frame = |ethertypes: &[u16]| {
            let mut frame = vec![0; 12];
            for ethertype in ethertypes {
                frame.extend(ethertype.to_be_bytes());
                frame.extend([0, 5]);
            }
            frame.extend([0x08, 0, 0, 0]);
            frame
        };
        for (tags, expected) in [
            (&[][..], false),
            (&[0x8100], false),
            (&[0x88a8, 0x8100], false),
            (&[0x9100], true),
            (&[0x8100, 0x9200], true),
        ] {
            assert_eq!(has_legacy_tag(&frame(tags)), expected, "{tags:x?}");
        }
    }
}
