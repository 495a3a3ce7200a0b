//! What this kernel can do, tried at start rather than read from its version.
//!
//! In a network namespace of our own, on a tap whose guest has no offloads, so
//! that the kernel has to segment: a super-frame with one and with two tags, and a
//! UDP super-frame, are sent as the switch sends them, and what the tap's guest
//! gets is counted. Before 5.19 (5.10.163 and other stable branches of January
//! 2023) the kernel loses tagged super-frames in silence (commit dfed913e8b55);
//! before 6.2 it refuses UDP's. What it cannot do is segmented in userspace. A group of
//! packet sockets on that tap tells whether it is spared what was sent (6.2), and the tap's
//! tc hook whether there is TCX (6.6).

use crate::control::fallback::Abilities;
use crate::control::links::LinkSocket;
use crate::dataplane::Abilities as Segmentation;
use crate::frame::checksum::Sum;
use crate::frame::vnet::{FLAG_NEEDS_CSUM, GSO_TCPV4, GSO_UDP_L4};
use crate::frame::{Tag, Tci, Tpid, VnetHeader};
use crate::sys::bpf::{self, BpfError, Direction};
use crate::sys::fanout::OwnFramesProbe;
use crate::sys::netns::in_private_namespace;
use crate::sys::packet::{SendSpace, Transmitter};
use crate::sys::tap::{self, TapOptions};
use crossbeam_channel::{Receiver, bounded};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use std::error::Error;
use std::os::fd::OwnedFd;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tracing::{info, warn};

const PROBE_TAP: &str = "probe";
const SEGMENTS: usize = 3;
const SEGMENT_LEN: usize = 1000;
/// The kernel hands segments over while it sends; this is for a busy machine.
const PATIENCE: Duration = Duration::from_millis(20);

/// A probe under way.
#[derive(Debug)]
pub struct Probe {
    found: Receiver<Result<Abilities, String>>,
    thread: Option<JoinHandle<()>>,
}

/// Starts probing beside the rest of the start.
pub fn start() -> Probe {
    let (tell, found) = bounded(1);
    let body = move || {
        let tried = in_private_namespace(|| {
            // Closing what was tried with takes the kernel 50 ms: nobody is to wait for that.
            try_kernel(|abilities| drop(tell.send(Ok(abilities))))
                .map_err(|error| error.to_string())
        });
        if let Err(error) = tried.unwrap_or_else(|error| Err(error.to_string())) {
            drop(tell.send(Err(error)));
        }
    };
    Probe { found, thread: std::thread::Builder::new().name("probe".into()).spawn(body).ok() }
}

impl Probe {
    /// Waits until it has ended.
    pub fn end(self) {
        drop(self.thread.map(JoinHandle::join));
    }

    /// Waits for the result.
    pub fn result(&self) -> Abilities {
        let kernel = match self.found.recv() {
            Ok(Ok(kernel)) => kernel,
            Ok(Err(error)) => {
                warn!(
                    "tagged and UDP super-frames are segmented in userspace, which costs CPU: \
                     whether the kernel can do it could not be tried: {error}"
                );
                // What every kernel can do.
                return Abilities::default();
            }
            Err(_) => return Abilities::default(),
        };
        if !kernel.segments.tagged_gso {
            warn!(
                "super-frames with VLAN tags are segmented in userspace, which costs CPU: this kernel loses them"
            );
        }
        if !kernel.segments.udp_gso {
            info!("UDP super-frames are segmented in userspace: this kernel does not take them");
        }
        kernel
    }
}

/// Tells what was found before it puts away what that took.
fn try_kernel(tell: impl FnOnce(Abilities)) -> Result<(), Box<dyn Error>> {
    // Without offloads on the fd's side, and without a virtio header to parse.
    let options =
        TapOptions { vnet_header: false, persistent: false, ..TapOptions::new(PROBE_TAP) };
    let guest = tap::open_queue(&options)?.fd;
    let index = if_nametoindex(PROBE_TAP)?;
    let mut links = LinkSocket::new()?;
    links.set_root_qdisc_noqueue(index)?;
    links.set_up(index)?;
    let transmitter = Transmitter::open(index)?;
    let mut space = SendSpace::default();
    let tag = |tpid, vid| Tag { tpid, tci: Tci(vid) };
    let stacks: [&[Tag]; 2] =
        [&[tag(Tpid::Customer, 5)], &[tag(Tpid::Service, 6), tag(Tpid::Customer, 5)]];
    let mut segmented = |packet: &[u8]| match space.load(&[packet]).send_from(&transmitter, 0) {
        Ok(_) => count_frames(&guest, packet, Instant::now()) == SEGMENTS,
        Err(_) => false,
    };
    let segments = Segmentation {
        tagged_gso: stacks.iter().all(|tags| segmented(&super_frame(tags, GSO_TCPV4))),
        udp_gso: segmented(&super_frame(&[], GSO_UDP_L4)),
    };
    let group = OwnFramesProbe::open(index)?;
    space.load(&[&plain_frame()]).send_from(&transmitter, 0)?;
    let tcx =
        !matches!(bpf::tcx::programs(index, Direction::Ingress), Err(BpfError::Unsupported { .. }));
    tell(Abilities { segments, tcx, groups_ignore_outgoing: !group.saw_any() });
    Ok(())
}

/// Counts the frames to the same destination that are there, or come within [`PATIENCE`] of
/// `start`: the host may say something on the device by itself. What is there counts however
/// late it is: a busy machine may keep us from looking for longer than that.
fn count_frames(guest: &OwnedFd, packet: &[u8], start: Instant) -> usize {
    let mut frame = [0; 2048];
    let mut count = 0;
    while count < SEGMENTS {
        match nix::unistd::read(guest, &mut frame) {
            Ok(length)
                if frame.get(..length).and_then(|frame| frame.get(..6)) == packet.get(10..16) =>
            {
                count += 1;
            }
            Ok(_) => {}
            Err(Errno::EAGAIN) if start.elapsed() < PATIENCE => std::thread::yield_now(),
            Err(_) => break,
        }
    }
    count
}

/// A frame that any kernel sends as it is.
fn plain_frame() -> Vec<u8> {
    let mut packet = VnetHeader::default().to_bytes().to_vec();
    packet.extend([2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 0x88, 0xb5]);
    packet.resize(packet.len() + 46, 0);
    packet
}

/// A super-frame as the switch sends it: virtio header, tags, headers, payload.
fn super_frame(tags: &[Tag], gso_type: u8) -> Vec<u8> {
    let tcp = gso_type == GSO_TCPV4;
    let (protocol, transport_len, checksum_at) = if tcp { (6, 20, 16) } else { (17, 8, 6) };
    let body_len = transport_len + SEGMENTS * SEGMENT_LEN;
    let mut ip = vec![0x45, 0];
    ip.extend(((20 + body_len) as u16).to_be_bytes());
    ip.extend([0, 1, 0x40, 0, 64, protocol, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    let header_sum = Sum::of(&ip).checksum().to_be_bytes();
    ip.splice(10..12, header_sum);

    let mut transport = vec![0; transport_len];
    transport.splice(..4, [0x30, 0x39, 0x30, 0x3a]);
    if tcp {
        transport.splice(12..14, [0x50, 0x10]);
    } else {
        transport.splice(4..6, (body_len as u16).to_be_bytes());
    }
    let mut pseudo = vec![192, 0, 2, 1, 192, 0, 2, 2, 0, protocol];
    pseudo.extend((body_len as u16).to_be_bytes());
    transport.splice(checksum_at..checksum_at + 2, Sum::of(&pseudo).folded().to_be_bytes());

    let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8];
    frame.extend(tags.iter().flat_map(|tag| tag.to_bytes()));
    frame.extend([0x08, 0]);
    let csum_start = frame.len() + ip.len();
    let header = VnetHeader {
        flags: FLAG_NEEDS_CSUM,
        gso_type,
        hdr_len: (csum_start + transport_len) as u16,
        gso_size: SEGMENT_LEN as u16,
        csum_start: csum_start as u16,
        csum_offset: checksum_at as u16,
    };
    let mut packet = header.to_bytes().to_vec();
    packet.extend(frame);
    packet.extend(ip);
    packet.extend(transport);
    packet.resize(packet.len() + SEGMENTS * SEGMENT_LEN, 0x5a);
    packet
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests")]

    use super::*;
    use std::os::unix::net::UnixDatagram;

    /// The time is over before the first look, as where the processor was taken away.
    #[test]
    fn what_is_there_counts_however_late_one_looks() {
        let packet = plain_frame();
        let (kernel, guest) = UnixDatagram::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        let other = [0xff; 60];
        for frame in [&packet[10..], &other, &packet[10..]] {
            kernel.send(frame).unwrap();
        }
        let long_ago = Instant::now().checked_sub(PATIENCE * 2).unwrap();
        let guest = OwnedFd::from(guest);
        assert_eq!(count_frames(&guest, &packet, long_ago), 2);
        assert_eq!(count_frames(&guest, &packet, long_ago), 0);
    }
}
