//! Kernel behaviour the switch relies on, one test a fact. A kernel that breaks
//! one of them breaks the switch in the way the test's comment says.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::frames::{Frame, TagBytes, tag};
use lab::ip::{self, Version, Vnet};
use lab::raw::{OFFLOAD_TCP, PacketSocket, Ring, index_of, open_tap, read_tap, set_persistent};
use lab::{Lab, RawGuest, Wire, eventually};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use vlanswitchd::sys::bpf;

/// A socket that sends on `device` with a virtio header in front.
fn sender(namespace: &lab::Namespace, device: &str) -> PacketSocket {
    namespace.enter(|| {
        let socket = PacketSocket::new();
        socket.set(libc::PACKET_VNET_HDR, 1i32).unwrap();
        socket.bind(index_of(device), 0).unwrap();
        socket
    })
}

fn send(socket: &PacketSocket, header: Vnet, frame: &Frame) -> io::Result<usize> {
    socket.send(&[&header.bytes(), frame.bytes().as_slice()].concat())
}

fn next(ring: &mut Ring) -> lab::raw::Slot {
    eventually("a filled slot", || ring.take())
}

fn error_of(result: io::Result<usize>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// The receive path reads the header at `tp_mac - 10`.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn ring_slots_carry_the_virtio_header_in_front_of_the_frame() {
    let lab = Lab::new();
    let mut ring = lab.host.enter(|| Ring::new("up0", 2048, 64, false));
    let (header, frame) = ip::partial(&ip::tcp(Version::V4, 1, &[7; 900]), Version::V4, 0);
    send(&sender(&lab.far, "far0"), header, &frame).unwrap();
    let slot = next(&mut ring);
    assert_eq!(slot.frame, frame.bytes());
    assert_eq!(slot.length, slot.captured);
    let got = Vnet::read(&slot.vnet);
    assert_eq!((got.flags, got.csum_start, got.csum_offset), (1, 34, 16));
}

/// Small slots hold whole super-frames only because of this: the copy is queued
/// in order, and its slot says so.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_frame_larger_than_its_slot_is_queued_whole_and_in_order() {
    let lab = Lab::new();
    let mut ring = lab.host.enter(|| Ring::new("up0", 2048, 64, true));
    let socket = sender(&lab.far, "far0");
    let tags = [tag(0x8100, 77)];
    let data: Vec<u8> = (0..50_000u32).map(|index| (index % 251) as u8).collect();
    let (header, big) = ip::partial(&ip::tcp(Version::V4, 1, &data), Version::V4, 1448);
    let big = big.tags(&tags);
    send(&socket, Vnet::default(), &Frame::numbered(1).tags(&tags)).unwrap();
    send(&socket, header.behind_tags(1), &big).unwrap();
    send(&socket, Vnet::default(), &Frame::numbered(2).tags(&tags)).unwrap();

    let first = next(&mut ring);
    assert_eq!(first.frame, Frame::numbered(1).bytes());
    assert_eq!(first.status & libc::TP_STATUS_COPY, 0);
    let middle = next(&mut ring);
    assert_ne!(middle.status & libc::TP_STATUS_COPY, 0);
    assert!(middle.captured < middle.length);
    let message = ring.socket.receive().unwrap().expect("the copy is there with its slot");
    assert_eq!(message.stripped, Some((0x8100, 77)));
    let got = Vnet::read(&message.bytes);
    assert_eq!((got.flags, got.gso_type, got.gso_size), (1, 1, 1448));
    // Positions are those of the frame without the tag the kernel stripped.
    assert_eq!(got.csum_start, 34);
    assert_eq!(message.bytes[10..], Frame { tags: vec![], ..big }.bytes());
    assert_eq!(next(&mut ring).frame, Frame::numbered(2).bytes());
}

/// The switch finds the outer tag in the slot's header or in the bytes, by these rules.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn the_outer_tag_is_metadata_for_0x8100_and_0x88a8_only() {
    let lab = Lab::new();
    let mut ring = lab.host.enter(|| Ring::new("up0", 2048, 64, false));
    let wire = lab.wire();
    let none: &[TagBytes] = &[];
    let cases: &[(&[TagBytes], Option<TagBytes>, &[TagBytes])] = &[
        (none, None, none),
        (&[tag(0x8100, 5)], Some(tag(0x8100, 5)), none),
        // VID 0 is told from "no tag" by the status bit, never by the TCI.
        (&[tag(0x8100, 0)], Some(tag(0x8100, 0)), none),
        (&[tag(0x8100, 0).priority(10)], Some(tag(0x8100, 0).priority(10)), none),
        (&[tag(0x88a8, 200).priority(7)], Some(tag(0x88a8, 200).priority(7)), none),
        (&[tag(0x88a8, 200), tag(0x8100, 100)], Some(tag(0x88a8, 200)), &[tag(0x8100, 100)]),
        (&[tag(0x8100, 200), tag(0x8100, 100)], Some(tag(0x8100, 200)), &[tag(0x8100, 100)]),
        (&[tag(0x9100, 7)], None, &[tag(0x9100, 7)]),
        (&[tag(0x9200, 7), tag(0x8100, 8)], None, &[tag(0x9200, 7), tag(0x8100, 8)]),
    ];
    for (number, (sent, metadata, in_bytes)) in cases.iter().enumerate() {
        let frame = Frame::numbered(number as u64);
        wire.send(&frame.clone().tags(sent));
        let slot = next(&mut ring);
        let stripped = slot.status & libc::TP_STATUS_VLAN_VALID != 0;
        let found = stripped.then_some(TagBytes {
            tpid: slot.tpid,
            priority: (slot.tci >> 12) as u8,
            vid: slot.tci & 0xfff,
        });
        assert_eq!(found, *metadata, "{sent:?}");
        assert_eq!(slot.frame, frame.tags(in_bytes).bytes(), "{sent:?}");
    }
}

/// Without it the switch would receive what it sends.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn ignore_outgoing_hides_our_own_frames_from_the_ring() {
    let lab = Lab::new();
    let mut ring = lab.host.enter(|| Ring::new("up0", 2048, 64, false));
    let wire = lab.wire();
    send(&sender(&lab.host, "up0"), Vnet::default(), &Frame::numbered(1)).unwrap();
    wire.receive_until(1);
    wire.send(&Frame::numbered(2));
    assert_eq!(next(&mut ring).frame, Frame::numbered(2).bytes());
}

/// The MTU arithmetic: only 0x8100 gets four bytes for free.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn full_size_frames_need_mtu_for_every_tag_but_one_0x8100() {
    let lab = Lab::new();
    let socket = sender(&lab.host, "up0");
    let full = |tags: &[TagBytes]| Frame::numbered(1).untagged_length(1514).tags(tags);
    let fits = |tags: &[TagBytes]| match send(&socket, Vnet::default(), &full(tags)) {
        Ok(_) => true,
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE), "{tags:?}");
            false
        }
    };
    let (c, s, nine) = (tag(0x8100, 5), tag(0x88a8, 5), tag(0x9100, 5));
    assert!(fits(&[]));
    assert!(fits(&[c]));
    assert!(!fits(&[s]));
    assert!(!fits(&[nine]));
    assert!(!fits(&[c, c]));
    assert!(!fits(&[s, c]));
    lab.host.ip("link set up0 mtu 1504");
    assert!(fits(&[s]));
    assert!(fits(&[nine]));
    assert!(fits(&[c, c]), "0x8100 outside keeps its four bytes");
    assert!(!fits(&[s, c]));
    lab.host.ip("link set up0 mtu 1508");
    assert!(fits(&[s, c]));
}

/// A super-frame that gets a tag must have `csum_start` moved with it: otherwise newer
/// kernels lose it.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn tagged_super_frames_are_segmented_if_csum_start_moved() {
    let lab = Lab::new();
    // The sending device has no segmentation: the kernel must do it.
    lab.host.tool("ethtool", "-K up0 tso off tx off");
    let (socket, wire) = (sender(&lab.host, "up0"), lab.wire());
    let data: Vec<u8> = (0..9000u32).map(|index| (index * 7 % 253) as u8).collect();
    for version in [Version::V4, Version::V6] {
        let (header, frame) = ip::partial(&ip::tcp(version, 1, &data), version, 1428);
        let stacks: [&[TagBytes]; 3] =
            [&[], &[tag(0x8100, 100)], &[tag(0x88a8, 200), tag(0x8100, 100)]];
        for tags in stacks {
            let tagged = frame.clone().tags(tags);
            if !tags.is_empty() {
                // Wrong, and so it must not come out right by accident.
                let _ = send(&socket, header, &tagged);
            }
            send(&socket, header.behind_tags(tags.len()), &tagged).unwrap();
            send(&socket, Vnet::default(), &Frame::numbered(1)).unwrap();
            let mut segments = wire.receive_until(1);
            segments.pop();
            let payloads: Vec<Vec<u8>> = segments.iter().map(ip::checked_payload).collect();
            assert!(segments.iter().all(|segment| segment.tags == tags), "{segments:?}");
            // Linux 5.10 goes by the headers, and sends the wrong one right all the same.
            let mut frames: Vec<_> = payloads.chunks(7).collect();
            assert!(frames.len() == 1 || !tags.is_empty() && frames.len() == 2, "{segments:?}");
            assert_eq!(frames.pop().unwrap().concat(), data, "{version:?} {tags:?}");
            assert!(frames.iter().all(|frame| frame.concat() == data), "{version:?} {tags:?}");
        }
    }
}

/// Merged tunnels reach us described as plain TCP. Sent on as they are they are
/// lost without an error: that is why userspace segments them.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_merged_gre_frame_sent_on_as_it_is_vanishes() {
    let lab = Lab::new();
    let tap = lab.host.enter(|| open_tap("t0", 0, OFFLOAD_TCP)).unwrap();
    lab.host.ip("link set t0 up");
    lab::guest::carrier(&lab.host, "t0");
    let (header, inner) = ip::partial(&ip::tcp(Version::V4, 1, &[5; 8000]), Version::V4, 1000);
    let mut gre = ip::udp(Version::V4, &[]);
    let length = (20 + 4 + inner.payload.len()) as u16;
    gre.payload.truncate(20);
    gre.payload[2..4].copy_from_slice(&length.to_be_bytes());
    (gre.payload[9], gre.payload[10], gre.payload[11]) = (47, 0, 0);
    let sum = !ip::ones_sum(&gre.payload);
    gre.payload[10..12].copy_from_slice(&sum.to_be_bytes());
    gre.payload.extend([0, 0, 8, 0]);
    gre.payload.extend(&inner.payload);
    let header =
        Vnet { csum_start: header.csum_start + 24, hdr_len: header.hdr_len + 24, ..header };
    let socket = sender(&lab.host, "t0");
    send(&socket, header, &gre).expect("no error tells of the loss");
    send(&socket, Vnet::default(), &Frame::numbered(1)).unwrap();
    let first = eventually("the frame behind it", || read_tap(&tap).unwrap());
    assert_eq!(first[10..], Frame::numbered(1).bytes());
}

/// Guests without offloads (e1000) are served by the kernel's own segmentation.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_tap_without_offloads_gets_segments_with_checksums() {
    let lab = Lab::new();
    let guest = lab.raw_guest("t0");
    lab.host.ip("link set t0 up");
    lab.host.tc("qdisc replace dev t0 root noqueue");
    lab::guest::carrier(&lab.host, "t0");
    let data: Vec<u8> = (0..9000u32).map(|index| (index % 199) as u8).collect();
    let (header, frame) = ip::partial(&ip::tcp(Version::V4, 1, &data), Version::V4, 1448);
    let socket = sender(&lab.host, "t0");
    for tags in [&[] as &[TagBytes], &[tag(0x8100, 9)]] {
        let header = header.behind_tags(tags.len());
        send(&socket, header, &frame.clone().tags(tags)).unwrap();
        send(&socket, Vnet::default(), &Frame::numbered(1)).unwrap();
        let mut segments = guest.receive_until(1);
        segments.pop();
        assert!(segments.iter().all(|segment| segment.tags == tags), "{segments:?}");
        let payloads: Vec<Vec<u8>> = segments.iter().map(ip::checked_payload).collect();
        assert_eq!(payloads.concat(), data);
    }
}

/// Congestion is told as ENOBUFS at the very frame that does not fit; under a
/// queueing discipline the kernel would say "sent" and lose it.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn noqueue_on_a_tap_returns_enobufs_when_its_queue_is_full() {
    let lab = Lab::new();
    let guest = lab.raw_guest("t0");
    lab.host.ip("link set t0 up txqueuelen 50");
    lab.host.tc("qdisc replace dev t0 root noqueue");
    lab::guest::carrier(&lab.host, "t0");
    let socket = sender(&lab.host, "t0");
    let mut sent = 0;
    let refused = loop {
        assert!(sent < 1000, "never refused");
        match send(&socket, Vnet::default(), &Frame::numbered(sent)) {
            Ok(_) => sent += 1,
            error => break error_of(error),
        }
    };
    assert_eq!((sent, refused), (50, Some(libc::ENOBUFS)));
    assert_eq!(guest.clear(), 50);
    send(&socket, Vnet::default(), &Frame::numbered(9)).expect("room again");
}

/// A socket whose device went down reports an error instead of frames, and gets
/// frames again without being bound anew.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_downed_device_reports_enetdown_once_and_comes_back_by_itself() {
    let lab = Lab::new();
    let mut ring = lab.host.enter(|| Ring::new("up0", 2048, 64, false));
    let wire = lab.wire();
    lab.host.ip("link set up0 down");
    let error = ring.socket.receive().err().and_then(|error| error.raw_os_error());
    assert_eq!(error, Some(libc::ENETDOWN));
    assert_eq!(
        error_of(send(&sender(&lab.host, "up0"), Vnet::default(), &Frame::numbered(1))),
        Some(libc::ENETDOWN)
    );
    lab.host.ip("link set up0 up");
    lab::guest::carrier(&lab.far, "far0");
    wire.send(&Frame::numbered(2));
    assert_eq!(next(&mut ring).frame, Frame::numbered(2).bytes());
}

/// A deleted device leaves its socket behind with an error; a device made later
/// under the same name is another one.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_deleted_device_unbinds_its_socket_for_good() {
    let lab = Lab::new();
    let mut ring = lab.host.enter(|| Ring::new("up0", 2048, 64, false));
    lab.host.ip("link del up0");
    eventually("an error", || ring.socket.receive().err());
    lab.plug_uplink();
    lab::guest::carrier(&lab.far, "far0");
    let witness = Wire::open(&lab.host, "up0");
    lab.wire().send(&Frame::numbered(1));
    witness.receive_until(1);
    assert!(ring.take().is_none());
}

/// A tap has carrier while somebody holds its fd; a persistent one outlives that.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_taps_carrier_says_whether_a_vmm_has_it_open() {
    let lab = Lab::new();
    let lower_up = || {
        let link = lab.host.link("t0").expect("the tap stays");
        link["flags"].as_array().unwrap().iter().any(|flag| flag == "LOWER_UP")
    };
    let first = lab.host.enter(|| open_tap("t0", 0, 0)).unwrap();
    set_persistent(&first, true).unwrap();
    lab.host.ip("link set t0 up");
    eventually("carrier", || lower_up().then_some(()));
    drop::<File>(first);
    eventually("no carrier", || (!lower_up()).then_some(()));
    let _guest = RawGuest::open(&lab.host, "t0");
    eventually("carrier again", || lower_up().then_some(()));
}

/// `queues=` must agree with the VMM's, else it gets a bare EINVAL.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_multi_queue_tap_is_refused_to_a_single_queue_vmm() {
    let lab = Lab::new();
    let open = |flags| lab.host.enter(|| open_tap("t0", flags, 0));
    let first = open(libc::IFF_MULTI_QUEUE).unwrap();
    set_persistent(&first, true).unwrap();
    drop(first);
    assert_eq!(open(0).err().and_then(|error| error.raw_os_error()), Some(libc::EINVAL));
    open(libc::IFF_MULTI_QUEUE).unwrap();
}

/// Promiscuity asked for by a socket ends with it, also when its owner is killed.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn promiscuity_by_membership_ends_with_the_socket() {
    let lab = Lab::new();
    let promiscuity = || lab.host.link("up0").unwrap()["promiscuity"].as_u64().unwrap();
    let socket = lab.host.enter(|| {
        let socket = PacketSocket::new();
        socket.promiscuous(index_of("up0")).unwrap();
        socket
    });
    assert_eq!(promiscuity(), 1);
    drop(socket);
    assert_eq!(promiscuity(), 0);
}

/// The builder and the reader of the tests' frames agree with a third opinion.
#[test]
fn the_labs_frames_are_what_etherparse_reads() {
    for frame in [
        ip::tcp(Version::V4, 1, b"abc"),
        ip::tcp(Version::V6, 1, b"abc"),
        ip::udp(Version::V4, b"abc"),
    ] {
        assert_eq!(ip::checked_payload(&frame), b"abc");
        for tpid in [0x8100, 0x88a8, 0x9100] {
            let tagged = frame.clone().tags(&[tag(tpid, 0x123).priority(0b1011)]);
            let bytes = tagged.bytes();
            assert_eq!(Frame::read(&bytes), tagged);
            let parsed = etherparse::SlicedPacket::from_ethernet(&bytes).unwrap();
            let vlan = parsed.vlan().expect("one tag");
            let etherparse::VlanSlice::SingleVlan(vlan) = vlan else { panic!("one tag") };
            let found = (vlan.vlan_identifier().value(), vlan.priority_code_point().value());
            assert_eq!(found, (0x123, 0b101));
            assert!(vlan.drop_eligible_indicator());
        }
    }
    assert_eq!(Frame::numbered(77).number(), 77);
    assert_eq!(Frame::numbered(1).bytes().len(), 60);
}

/// Frames a guest with offloads sends are seen whole, with a header that counts
/// from the bytes behind the stripped tag.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_guests_super_frame_reaches_the_ring_whole() {
    let lab = Lab::new();
    let tap = lab.host.enter(|| open_tap("t0", 0, OFFLOAD_TCP)).unwrap();
    lab.host.ip("link set t0 up");
    let mut ring = lab.host.enter(|| Ring::new("t0", 65536, 4, false));
    lab::guest::carrier(&lab.host, "t0");
    let (header, frame) = ip::partial(&ip::tcp(Version::V4, 1, &[3; 30_000]), Version::V4, 1448);
    for tags in [vec![], vec![tag(0x8100, 4)], vec![tag(0x88a8, 4), tag(0x8100, 5)]] {
        let tagged = frame.clone().tags(&tags);
        lab::raw::write_tap(&tap, &header.behind_tags(tags.len()).bytes(), &tagged.bytes())
            .unwrap();
        let slot = next(&mut ring);
        let in_bytes = tags.len().saturating_sub(1);
        assert_eq!(slot.frame.len(), frame.bytes().len() + 4 * in_bytes);
        let got = Vnet::read(&slot.vnet);
        assert_eq!((got.gso_type, got.gso_size), (1, 1448));
        assert_eq!(usize::from(got.csum_start), 34 + 4 * in_bytes);
    }
}

/// The seal: a program at tc ingress takes frames from the host's stack and leaves
/// them to packet sockets. By both hooks the product knows.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_drop_at_tc_ingress_acts_behind_packet_sockets() {
    for method in ["tcx", "clsact"] {
        let lab = Lab::new();
        let guest = lab.raw_guest("t0");
        lab.host.ip("link set t0 up");
        lab::guest::carrier(&lab.host, "t0");
        let everything = Wire::open(&lab.host, "t0");
        let stack = Wire::with_protocol(&lab.host, "t0", lab::frames::EXPERIMENTAL);
        guest.send(&Frame::numbered(1));
        everything.receive_until(1);
        assert_eq!(stack.receive_until(1).len(), 1, "before, the stack gets it");

        let index = lab.host.index("t0");
        let ingress = bpf::Direction::Ingress;
        let programs = lab.host.enter(|| bpf::tcx::programs(index, ingress));
        if method == "tcx" && matches!(programs, Err(bpf::BpfError::Unsupported { .. })) {
            // Before Linux 6.6.
            continue;
        }
        lab.host.enter(|| {
            let program = bpf::seal_program().unwrap();
            let program = bpf::load(bpf::ProgramKind::SchedCls, "fact_seal", &program).unwrap();
            match method {
                "tcx" => bpf::tcx::attach(program.as_fd(), index, ingress),
                _ => bpf::clsact::attach(program.as_fd(), "fact_seal", index, ingress),
            }
            .unwrap();
        });
        guest.send(&Frame::numbered(2));
        everything.receive_until(2);
        assert!(stack.try_receive().is_none(), "{method}");
    }
}

/// What the ring has no room for is counted, and only once: `ring_overrun`.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn packet_statistics_count_received_and_lost_frames_since_last_asked() {
    let lab = Lab::new();
    let mut ring = lab.host.enter(|| Ring::new("up0", 2048, 32, false));
    let wire = lab.wire();
    let witness = Wire::open(&lab.host, "up0");
    for number in 0..100 {
        wire.send(&Frame::numbered(number));
    }
    witness.receive_until(99);
    let [packets, drops] = ring.socket.get(libc::PACKET_STATISTICS).unwrap();
    assert_eq!((packets, drops), (100, 68), "the first counts the lost ones too");
    let [packets, drops] = ring.socket.get(libc::PACKET_STATISTICS).unwrap();
    assert_eq!((packets, drops), (0, 0));
    assert_eq!(std::iter::from_fn(|| ring.take()).count(), 32);
}
