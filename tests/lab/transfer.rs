//! Bytes through real TCP and UDP stacks, every one of them compared.
//!
//! The stream is one pseudo-random block over and over, each time with its number
//! in front: a byte lost, doubled, changed or moved is found where it stands, which
//! says more than a checksum over the whole.

use super::{Namespace, PATIENCE};
use nix::sys::socket::{setsockopt, sockopt};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};

/// Not a multiple of any segment size.
const BLOCK: usize = (1 << 20) - 21;

struct Pattern {
    block: Vec<u8>,
    position: u64,
}

impl Pattern {
    fn new() -> Self {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut block = Vec::with_capacity(BLOCK + 8);
        while block.len() < BLOCK {
            // Marsaglia's xorshift64.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            block.extend(state.to_be_bytes());
        }
        block.truncate(BLOCK);
        Self { block, position: 0 }
    }

    /// The next bytes of the stream, at most `most`.
    fn peek(&mut self, most: usize) -> &[u8] {
        let block = self.position / BLOCK as u64;
        let offset = (self.position % BLOCK as u64) as usize;
        self.block[..8].copy_from_slice(&block.to_be_bytes());
        let end = BLOCK.min(offset + most);
        &self.block[offset..end]
    }

    fn advance(&mut self, bytes: usize) {
        self.position += bytes as u64;
    }
}

/// Sends `bytes` by TCP from one namespace to `address` in another, and fails the
/// test at the first byte that differs or if the receiver saw a wrong checksum.
pub fn tcp(from: &Namespace, to: &Namespace, address: &str, bytes: u64) {
    let address: IpAddr = address.parse().expect("an address");
    let wrong_before = checksum_errors(to);
    let listener = to.enter(|| TcpListener::bind(SocketAddr::new(address, 0)).expect("listen"));
    let target = listener.local_addr().expect("bound");
    let sender = from.enter(|| TcpStream::connect_timeout(&target, PATIENCE));
    let sender = sender.unwrap_or_else(|error| panic!("connecting to {target}: {error}"));
    let (receiver, _) = listener.accept().expect("accept");
    std::thread::scope(|scope| {
        scope.spawn(move || send_stream(sender, bytes));
        receive_stream(receiver, bytes);
    });
    let wrong = checksum_errors(to) - wrong_before;
    assert_eq!(wrong, 0, "segments with wrong checksums");
}

fn send_stream(mut stream: TcpStream, bytes: u64) {
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    let mut pattern = Pattern::new();
    while pattern.position < bytes {
        let most = usize::try_from(bytes - pattern.position).unwrap();
        let chunk = pattern.peek(most.min(256 << 10));
        let length = chunk.len();
        stream.write_all(chunk).expect("sending");
        pattern.advance(length);
    }
}

fn receive_stream(mut stream: TcpStream, bytes: u64) {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut pattern = Pattern::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        let got = match stream.read(&mut buffer) {
            Ok(got) => got,
            // A machine that was suspended meanwhile.
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => panic!("after {} bytes: {error}", pattern.position),
        };
        if got == 0 {
            break;
        }
        let mut rest = &buffer[..got];
        while !rest.is_empty() {
            let expected = pattern.peek(rest.len());
            let length = expected.len();
            if rest[..length] != *expected {
                let differs = rest.iter().zip(expected).position(|(one, other)| one != other);
                panic!("differs at byte {}", pattern.position + differs.unwrap() as u64);
            }
            rest = &rest[length..];
            pattern.advance(length);
        }
    }
    assert_eq!(pattern.position, bytes, "the stream ended early");
}

/// Sends `datagrams` of `size` bytes by UDP, several in one system call (UDP_SEGMENT:
/// the kernel makes a super-frame of them), waiting for the receiver each time.
/// Fails the test at the first byte that differs.
pub fn udp(from: &Namespace, to: &Namespace, address: &str, size: usize, calls: usize) {
    let address: IpAddr = address.parse().expect("an address");
    let receiver = to.enter(|| UdpSocket::bind(SocketAddr::new(address, 0)).expect("bind"));
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    // A whole batch must fit: what is tested is the way there.
    setsockopt(&receiver, sockopt::RcvBufForce, &(8 << 20)).expect("SO_RCVBUFFORCE");
    let target = receiver.local_addr().unwrap();
    let any = if address.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let sender = from.enter(|| UdpSocket::bind(any).expect("bind"));
    sender.connect(target).expect("connect");
    setsockopt(&sender, sockopt::UdpGsoSegment, &(size as i32)).expect("UDP_SEGMENT");
    let datagrams = 40;
    let mut pattern = Pattern::new();
    let mut buffer = vec![0; 65_536];
    for call in 0..calls {
        let mut batch = Vec::new();
        while batch.len() < datagrams * size {
            let part = pattern.peek(datagrams * size - batch.len()).to_vec();
            pattern.advance(part.len());
            batch.extend(part);
        }
        sender.send(&batch).expect("sending");
        for (number, expected) in batch.chunks(size).enumerate() {
            let got = loop {
                match receiver.recv(&mut buffer) {
                    Ok(got) => break got,
                    Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                    Err(error) => panic!("call {call}, datagram {number}: {error}"),
                }
            };
            assert!(buffer[..got] == *expected, "call {call}, datagram {number} differs");
        }
    }
}

/// TCP segments this namespace has thrown away for their checksum, of both IPs.
fn checksum_errors(namespace: &Namespace) -> u64 {
    let text = namespace.enter(|| fs::read_to_string("/proc/thread-self/net/snmp").unwrap());
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
    let position = names.split(' ').position(|name| name == "InCsumErrors").unwrap();
    values.split(' ').nth(position).unwrap().parse().unwrap()
}
