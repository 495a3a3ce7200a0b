//! The packet ring, and rings in a group, against the kernel where a fault decides whose
//! frame it is.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]

use nix::net::if_::if_nametoindex;
use std::os::fd::OwnedFd;
use vlanswitchd::control::links::LinkSocket;
use vlanswitchd::frame::VnetHeader;
use vlanswitchd::frame::vnet::{FLAG_NEEDS_CSUM, GSO_TCPV4};
use vlanswitchd::port::{Device, NetdevOptions, NetdevPort};
use vlanswitchd::sys::bpf::{Steering, UplinkFilter};
use vlanswitchd::sys::fanout;
use vlanswitchd::sys::netns::in_private_namespace;
use vlanswitchd::sys::packet::{Burst, CopyPool, Receiver, ReceiverOptions};
use vlanswitchd::sys::tap::{self, TapOptions};

/// TCP over IPv4, too long for a ring slot; `mark` tells frames apart.
fn super_frame(payload: usize, mark: u8) -> Vec<u8> {
    let header = VnetHeader {
        flags: FLAG_NEEDS_CSUM,
        gso_type: GSO_TCPV4,
        hdr_len: 54,
        gso_size: 1400,
        csum_start: 34,
        csum_offset: 16,
    };
    let mut packet = header.to_bytes().to_vec();
    packet.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, mark, 0x08, 0x00, 0x45, 0]);
    packet.extend(((40 + payload) as u16).to_be_bytes());
    packet.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    packet.extend([0x30, 0x39, 0x30, 0x3a, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    packet.resize(packet.len() + payload, 0x5a);
    packet
}

/// A device that goes down leaves an error that a read meets before the queue: the
/// super-frames behind it must still go with the slots that announced them.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn super_frames_stay_with_their_slots_when_the_device_goes_down() {
    in_private_namespace(|| {
        let options = TapOptions { vnet_header: true, ..TapOptions::new("guest") };
        let guest = tap::open_queue(&options).unwrap().fd;
        let index = if_nametoindex("guest").unwrap();
        let mut links = LinkSocket::new().unwrap();
        links.set_up(index).unwrap();
        let options = ReceiverOptions {
            slots: 64,
            copy_queue: 8 << 20,
            promiscuous: false,
            filter: vlanswitchd::sys::packet::Filter::All,
        };
        let mut receiver = Receiver::open(index, &options).unwrap();
        for (payload, mark) in [(20_000, 1), (30_000, 2), (40_000, 3)] {
            nix::unistd::write(&guest, &super_frame(payload, mark)).unwrap();
        }
        links.set_down(index).unwrap();

        let mut copies = CopyPool::default();
        let mut burst = Burst::new();
        assert_eq!(receiver.receive(&mut copies, 64, &mut burst), 0, "frames were given up");
        let found: Vec<(usize, Option<u8>)> = burst
            .iter()
            .filter(|frame| frame.buffer.frame_len() > 2000)
            .map(|frame| (frame.buffer.frame_len(), frame.buffer.frame().get(11).copied()))
            .collect();
        assert_eq!(found, [(20_054, Some(1)), (30_054, Some(2)), (40_054, Some(3))]);
    })
    .unwrap();
}

/// A group and its program live as long as one of its sockets, whoever has it; and who has
/// it may give the group another program.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_group_of_rings_is_steered_by_who_has_its_sockets() {
    let frame = |vid: u8| {
        let mut packet = VnetHeader::default().to_bytes().to_vec();
        packet.extend([2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x81, 0x00, 0, vid, 0x88, 0xb5]);
        packet.resize(packet.len() + 46, 0x5a);
        packet
    };
    let sockets = |devices: &[Device]| -> Vec<OwnedFd> {
        let counters = devices.iter().map(|device| device.kernel_counter().unwrap().unwrap());
        counters.map(|counter| counter.socket().try_clone_to_owned().unwrap()).collect()
    };
    let steering = |worker: u32| {
        let steering = Steering::new().unwrap();
        steering.set(0, 101, worker).unwrap();
        steering
    };
    let devices = |parts: Vec<NetdevPort>| parts.into_iter().map(Device::Netdev).collect();
    let waiting = |parts: &[Device]| parts.iter().map(Device::waiting).collect::<Vec<_>>();
    in_private_namespace(|| {
        let options = TapOptions { vnet_header: true, ..TapOptions::new("wire") };
        let wire = tap::open_queue(&options).unwrap().fd;
        let index = if_nametoindex("wire").unwrap();
        LinkSocket::new().unwrap().set_up(index).unwrap();
        let filter = UplinkFilter::new(None).unwrap();
        filter.claim(0, 101, true).unwrap();
        let send = |vid| nix::unistd::write(&wire, &frame(vid)).unwrap();

        let first = NetdevPort::open_uplink(index, &filter, Some((&steering(1), 2))).unwrap();
        let first: Vec<Device> = devices(first);
        let slots = first[0].position().1;
        send(101);
        send(102);
        assert_eq!(waiting(&first), [0, 1]);

        let second = NetdevPort::adopt_uplink(index, sockets(&first), slots).unwrap();
        let second: Vec<Device> = devices(second);
        drop(first);
        send(101);
        assert_eq!(waiting(&second), [0, 2], "the first one's program goes on");
        let [socket, _] = &sockets(&second)[..] else { unreachable!("two sockets") };
        fanout::steer(std::os::fd::AsFd::as_fd(socket), &steering(0)).unwrap();
        send(101);
        assert_eq!(waiting(&second), [1, 2]);

        let apart = [(); 2].map(|()| {
            Device::Netdev(NetdevPort::open(index, NetdevOptions::Port { slots: 64 }).unwrap())
        });
        let error = NetdevPort::adopt_uplink(index, sockets(&apart), 64).unwrap_err();
        assert_eq!(error.step, "take over the group of the uplink's sockets");
    })
    .unwrap();
}
