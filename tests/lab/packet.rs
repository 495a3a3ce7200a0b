//! The far end of the cable, or any device, frame by frame.

use super::frames::{Frame, TagBytes};
use super::raw::{Message, PacketSocket, index_of};
use super::{Namespace, eventually};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

/// A packet socket that shows frames as they are on the cable: the tag that the
/// kernel strips is put back in its place.
pub struct Wire {
    socket: PacketSocket,
}

impl Wire {
    /// All frames that arrive at `device`, promiscuously; not those it sends.
    pub fn open(namespace: &Namespace, device: &str) -> Self {
        Self::with_protocol(namespace, device, libc::ETH_P_ALL as u16)
    }

    /// Frames of one protocol only, as the network stack above the device gets
    /// them (after TC and everything else that may take a frame away).
    pub fn with_protocol(namespace: &Namespace, device: &str, protocol: u16) -> Self {
        let socket = namespace.enter(|| {
            let socket = PacketSocket::new();
            let room = 64i32 << 20;
            socket.set(libc::PACKET_AUXDATA, 1i32).expect("PACKET_AUXDATA");
            socket.set(libc::PACKET_IGNORE_OUTGOING, 1i32).expect("PACKET_IGNORE_OUTGOING");
            socket.set_at(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, room).expect("SO_RCVBUFFORCE");
            socket.set_at(libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, room).expect("SO_SNDBUFFORCE");
            let index = index_of(device);
            socket.promiscuous(index).expect("PACKET_MR_PROMISC");
            socket.bind(index, protocol).expect("bind");
            socket
        });
        Self { socket }
    }

    /// Puts a frame on the cable.
    pub fn send(&self, frame: &Frame) {
        self.send_bytes(&frame.bytes());
    }

    /// Takes only frames with this VID in a tag that the kernel strips (0x8100, 0x88a8)
    /// from now on, so that others cannot fill the socket's buffer.
    pub fn only_vid(&self, vid: u16) {
        let load_tag = (libc::SKF_AD_OFF + libc::SKF_AD_VLAN_TAG) as u32;
        let step = |code: u32, jf, k| libc::sock_filter { code: code as u16, jt: 0, jf, k };
        let program = [
            step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, load_tag),
            step(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0xfff),
            step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, u32::from(vid)),
            step(libc::BPF_RET | libc::BPF_K, 0, u32::MAX),
            step(libc::BPF_RET | libc::BPF_K, 0, 0),
        ];
        let program =
            libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
        let attached = self.socket.set_at(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, program);
        attached.expect("SO_ATTACH_FILTER");
    }

    /// Puts any bytes on the cable; waits while the socket's buffer or the cable is full.
    pub fn send_bytes(&self, bytes: &[u8]) {
        eventually("room to send", || match self.socket.send(bytes) {
            Ok(_) => Some(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => None,
            Err(error) => panic!("sending {} bytes: {error}", bytes.len()),
        });
    }

    /// Puts bytes on the cable if the device takes them.
    pub fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.send(bytes)
    }

    /// The next frame's bytes, or `None` if none waits.
    pub fn try_receive(&self) -> Option<Vec<u8>> {
        match self.socket.receive() {
            Ok(message) => Some(on_the_cable(message?)),
            // The device is down: nothing will come, and the kernel says so once.
            Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => None,
            Err(error) => panic!("receiving: {error}"),
        }
    }

    /// The next frame's bytes, or `None` after `patience` without one.
    pub fn receive_within(&self, patience: Duration) -> Option<Vec<u8>> {
        let deadline = Instant::now() + patience;
        loop {
            if let Some(bytes) = self.try_receive() {
                return Some(bytes);
            }
            wait_readable(&self.socket, deadline)?;
        }
    }

    /// Frames up to the one with number `last`, which is the answer's end; frames
    /// that no test sends (other EtherTypes) are kept as well.
    pub fn receive_until(&self, last: u64) -> Vec<Frame> {
        collect_until(last, |patience| self.receive_within(patience))
    }

    /// Throws away what waits.
    pub fn clear(&self) {
        while self.try_receive().is_some() {}
    }
}

/// Waits until `fd` can be read; `None` once the deadline has passed.
pub fn wait_readable(fd: &impl AsFd, deadline: Instant) -> Option<()> {
    let left = deadline.checked_duration_since(Instant::now())?;
    let timeout = PollTimeout::try_from(left.as_millis().max(1)).unwrap_or(PollTimeout::MAX);
    let mut polled = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    // Interrupted, timed out or readable: the caller looks.
    let _ = poll(&mut polled, timeout);
    Some(())
}

/// Frames from `receive` until that with number `last` has come.
pub fn collect_until(last: u64, receive: impl Fn(Duration) -> Option<Vec<u8>>) -> Vec<Frame> {
    let mut frames = Vec::new();
    loop {
        let Some(bytes) = receive(super::PATIENCE) else {
            panic!("frame {last} never came; before it came {frames:?}");
        };
        let frame = Frame::read(&bytes);
        // The bytes say more than the fields: nothing may hide between them.
        assert_eq!(frame.bytes(), bytes, "{frame:?}");
        let done = frame.number() == last;
        frames.push(frame);
        if done {
            return frames;
        }
    }
}

fn on_the_cable(message: Message) -> Vec<u8> {
    let mut bytes = message.bytes;
    if let Some((tpid, tci)) = message.stripped {
        let tag = TagBytes { tpid, priority: (tci >> 12) as u8, vid: tci & 0xfff };
        let words = [tag.tpid.to_be_bytes(), tag.tci().to_be_bytes()].concat();
        bytes.splice(12..12, words);
    }
    bytes
}
