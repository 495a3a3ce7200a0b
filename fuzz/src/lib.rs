//! The bodies of the fuzz targets, one function each: bytes in, a panic if a
//! promise is broken. `tests/fuzz_bodies.rs` runs the same bodies on stable Rust.
//! Bytes of a crash are to be kept there as a regression test.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    missing_docs,
    reason = "a panic is how a fuzz target reports; this crate is no part of the product"
)]

pub mod frames;

use frames::{Inside, Network, Recipe, Transport, Version};
use std::path::Path;
use std::sync::Arc;
use vlanswitchd::control::capture::filter::{Instruction, Program};
use vlanswitchd::control::config::file;
use vlanswitchd::control::mapping;
use vlanswitchd::control::server::http::read_request;
use vlanswitchd::control::server::varlink::{Call, read_call};
use vlanswitchd::frame::headers::transport;
use vlanswitchd::frame::segment::{SegmentError, Segmenter};
use vlanswitchd::frame::tag::STACK_DEPTH;
use vlanswitchd::frame::vnet::{self, Offload, VNET_HEADER_LEN, VnetHeader};
use vlanswitchd::frame::{Tag, TagStack, Tci, Tpid};

/// Reading tags: what is found is what stands in the bytes, without gaps.
pub fn tag_stack(data: &[u8]) {
    let Some(([choice, high, low], frame)) = data.split_first_chunk() else { return };
    let stripped = Tpid::ALL
        .get(usize::from(choice % 5))
        .map(|tpid| Tag { tpid: *tpid, tci: Tci(u16::from_be_bytes([*high, *low])) });
    let Ok(stack) = TagStack::read(stripped, frame) else {
        assert!(frame.len() < 14 + 4 * STACK_DEPTH, "only a short frame is truncated");
        return;
    };
    let mut wire = frame[..12].to_vec();
    if let Some(tag) = stripped {
        wire.extend(tag.to_bytes());
    }
    wire.extend(&frame[12..]);
    let mut depth = 0;
    while let Some(tag) = stack.get(depth) {
        assert_eq!(tag.to_bytes(), wire[12 + 4 * depth..16 + 4 * depth]);
        depth += 1;
    }
    for beyond in depth..=STACK_DEPTH {
        assert_eq!(stack.get(beyond), None);
    }
    if depth < STACK_DEPTH {
        let ethertype = u16::from_be_bytes([wire[12 + 4 * depth], wire[13 + 4 * depth]]);
        assert_eq!(Tpid::from_ethertype(ethertype), None, "a tag was left unread");
    }
}

/// A configuration file of any bytes is read or refused; a port that is understood
/// reads back from its own words.
pub fn configuration(data: &[u8]) {
    let path: Arc<Path> = Path::new("fuzz.toml").into();
    let (config, faults) = file::parse(&path, data);
    for fault in faults {
        assert!(!fault.to_string().contains(char::is_control), "{fault}");
    }
    for spec in config.ports {
        match spec.build(Tpid::Customer) {
            Ok(port) => {
                let map = port.to_map(Tpid::Customer);
                assert_eq!(mapping::parse(&map, Tpid::Customer).ok(), Some(port), "{map}");
            }
            Err(error) => assert!(!error.to_string().contains(char::is_control), "{error}"),
        }
    }
}

/// A capture's filter of any bytes is refused, or ends on any frame and lets through
/// no more than the frame has.
pub fn capture_filter(data: &[u8]) {
    let Some((count, rest)) = data.split_first() else { return };
    let (program, frame) = rest.split_at(rest.len().min(8 * usize::from(*count)));
    let instructions: Vec<_> = program
        .chunks_exact(8)
        .map(|bytes| Instruction {
            code: u16::from_le_bytes([bytes[0], bytes[1]]),
            jump_true: bytes[2],
            jump_false: bytes[3],
            k: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        })
        .collect();
    let text: String = std::iter::once(instructions.len().to_string())
        .chain(
            instructions
                .iter()
                .map(|at| format!("{} {} {} {}", at.code, at.jump_true, at.jump_false, at.k)),
        )
        .collect::<Vec<_>>()
        .join(",");
    let program = Program::new(&instructions);
    // The same program as a client sends it.
    assert_eq!(text.parse::<Program>().is_ok(), program.is_ok(), "{text}");
    let Ok(program) = program else { return };
    for end in [0, frame.len() / 2, frame.len()] {
        program.run(&frame[..end], end as u32);
    }
}

/// What a client sends to the control socket or the metrics socket is understood or
/// refused; who may only read changes nothing.
pub fn control_call(data: &[u8]) {
    if let Some(Call::Method { request, .. }) = read_call(data, false) {
        assert!(!request.changes(), "{request:?}");
    }
    let _ = read_call(data, true);
    if let Err(answer) = read_request(data) {
        assert!(answer.starts_with(b"HTTP/1.1 4"));
    }
}

/// A virtio header that passes describes the frame.
pub fn check_offload(data: &[u8]) {
    let Some((header, frame)) = data.split_first_chunk::<VNET_HEADER_LEN>() else { return };
    check(VnetHeader::from_bytes(header), frame);
}

fn check(received: VnetHeader, frame: &[u8]) {
    let Offload::Plain(header) = vnet::check_offload(received, frame) else {
        assert!(received.gso_type != 0 || received.needs_csum(), "nothing asked, nothing wrong");
        return;
    };
    assert!(usize::from(header.hdr_len) <= frame.len());
    assert_eq!(header.flags & !vnet::FLAG_NEEDS_CSUM, 0);
    assert_eq!((header.gso_type, header.needs_csum()), (received.gso_type, received.needs_csum()));
    if !header.needs_csum() {
        assert_eq!(header, VnetHeader { hdr_len: header.hdr_len, ..VnetHeader::default() });
        return;
    }
    let checksum_end = usize::from(header.csum_start) + usize::from(header.csum_offset) + 2;
    assert!(checksum_end <= frame.len());
    let mut tags_end = 12;
    while Tpid::ALL
        .iter()
        .any(|tpid| frame[tags_end..].starts_with(&tpid.ethertype().to_be_bytes()))
    {
        tags_end += 4;
    }
    assert!(usize::from(header.csum_start) >= tags_end + 2, "the kernel would overwrite a tag");
    assert!(header.hdr_len == 0 || usize::from(header.hdr_len) >= checksum_end);
    if header.is_gso() {
        let found = transport(frame).expect("a plain super-frame has a transport header");
        assert_eq!(usize::from(header.csum_start), found.offset);
        assert_eq!(usize::from(header.hdr_len), found.offset + found.header_len);
        // What the kernel can cut, we can, but for segments no IP packet holds.
        match Segmenter::new(frame, header) {
            Ok(_) | Err(SegmentError::SegmentLength(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Segments are of the promised number and length and carry the whole payload.
pub fn segment(data: &[u8]) {
    let Some((header, frame)) = data.split_first_chunk::<VNET_HEADER_LEN>() else { return };
    cut(VnetHeader::from_bytes(header), frame);
}

fn cut(header: VnetHeader, frame: &[u8]) {
    let Ok(mut segmenter) = Segmenter::new(frame, header) else { return };
    let mut out = vec![0; segmenter.segment_len_max()];
    let mut payload: Vec<u8> = Vec::new();
    let mut headers_len = None;
    let mut count = 0;
    while let Some(len) = segmenter.next_into(&mut out).expect("the buffer is large enough") {
        count += 1;
        // The headers end where the first segment's payload, if full, begins.
        let headers_len = *headers_len.get_or_insert_with(|| {
            if segmenter.segment_count() > 1 { len - usize::from(header.gso_size) } else { len }
        });
        payload.extend_from_slice(&out[headers_len..len]);
    }
    assert_eq!((count, segmenter.remaining()), (segmenter.segment_count(), 0));
    assert_eq!(payload, frame[frame.len() - payload.len()..]);
    let headers_len = headers_len.expect("there is at least one segment");
    assert_eq!(headers_len + payload.len(), frame.len());
}

/// A super-frame made from a recipe becomes the segments of that recipe; damaged,
/// it does no harm.
pub fn segment_recipe(data: &[u8]) {
    let mut bytes = Bytes(data);
    let recipe = recipe(&mut bytes);
    let (mut frame, header) = recipe.super_frame();
    let mut segmenter = Segmenter::new(&frame, header).expect("a good super-frame is cut");
    let mut out = vec![0; segmenter.segment_len_max()];
    for expected in recipe.segments() {
        let len = segmenter.next_into(&mut out).unwrap().expect("as many segments");
        assert_eq!(out[..len], expected, "{recipe:?}");
    }
    assert_eq!(segmenter.next_into(&mut out), Ok(None));
    check(header, &frame);

    let mut header = header.to_bytes();
    for _ in 0..bytes.below(4) {
        header[bytes.below(VNET_HEADER_LEN as u8)] = bytes.next();
    }
    let header = VnetHeader::from_bytes(&header);
    for _ in 0..bytes.below(4) {
        let place = bytes.below(200);
        if let Some(byte) = frame.get_mut(place) {
            *byte = bytes.next();
        }
    }
    frame.truncate(frame.len() - bytes.below(100).min(frame.len()));
    cut(header, &frame);
    check(header, &frame);
}

/// Bytes that steer choices; zeros when they have run out.
struct Bytes<'d>(&'d [u8]);

impl Bytes<'_> {
    fn next(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        *first
    }

    fn below(&mut self, limit: u8) -> usize {
        usize::from(self.next() % limit)
    }

    fn bit(&mut self) -> bool {
        self.next() & 1 == 1
    }
}

fn recipe(bytes: &mut Bytes<'_>) -> Recipe {
    let tags = (0..bytes.below(5)).map(|_| Tpid::ALL[bytes.below(4)].ethertype()).collect();
    let networks = (0..=bytes.below(4)).map(|_| network(bytes)).collect();
    let transport = if bytes.bit() {
        Transport::Udp
    } else {
        Transport::Tcp {
            sequence: u32::from_be_bytes([0xff, 0xff, bytes.next(), bytes.next()]),
            flags: bytes.next(),
            option_words: bytes.below(11) as u8,
        }
    };
    let segment_size = 8 + u16::from(bytes.next());
    let payload_len = bytes.below(20) * usize::from(segment_size) / 2 + bytes.below(9);
    let payload = (0..payload_len).map(|index| (index * 31) as u8).collect();
    Recipe { tags, networks, transport, payload, segment_size, lie_about_lengths: bytes.bit() }
}

fn network(bytes: &mut Bytes<'_>) -> Network {
    let version = if bytes.bit() { Version::V6 } else { Version::V4 };
    let checksum = bytes.bit();
    let tags = bytes.below(5) as u8;
    let ethernet_tags = bytes.bit().then_some(tags);
    let inside = match bytes.below(6) {
        0 => Inside::Ip,
        1 => Inside::Gre { checksum, key: bytes.bit(), ethernet_tags },
        2 => Inside::Vxlan { checksum, tags },
        3 => Inside::VxlanGpe { checksum },
        4 => Inside::Geneve { checksum, option_words: bytes.below(64) as u8, ethernet_tags },
        _ => Inside::Udp { checksum },
    };
    // A checksummed UDP tunnel under IPv4 options is refused, not cut.
    let refused = version == Version::V4 && checksum;
    let extras = if refused { 0 } else { bytes.below(4) as u8 };
    let identification = u16::from_be_bytes([0xff, bytes.next()]);
    Network { version, identification, extras, inside }
}
