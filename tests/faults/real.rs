//! The tables on real sockets: a worker between a guest's veth and an uplink's, and each
//! error put in at the system call.

use super::injector::{Fate, inject};
use super::table;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};
use vlanswitchd::control::mapping;
use vlanswitchd::dataplane::{
    Abilities, Command as Order, FlowSnapshot, Notice, PollMode, PortShared, UplinkShared, Worker,
};
use vlanswitchd::frame::{Tag, Tci, Tpid, VnetHeader};
use vlanswitchd::port::{
    Arrival, Device, DeviceState, FaultyPort, InternalPort, NetdevOptions, NetdevPort,
};
use vlanswitchd::switch::DropReason;
use vlanswitchd::sys::packet::{BURST, Burst, CopyPool, SendSpace};
use vlanswitchd::sys::tap::{self, TapOptions};

const FRAMES: usize = 48;
/// What is on a veth arrives by then.
const SOON: Duration = Duration::from_secs(5);
#[cfg(target_arch = "x86_64")]
const EPOLL_WAIT: libc::c_long = libc::SYS_epoll_wait;
#[cfg(not(target_arch = "x86_64"))]
const EPOLL_WAIT: libc::c_long = libc::SYS_epoll_pwait;

/// Runs a test on a thread with a network namespace of its own.
fn in_namespace<T: Send>(test: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("unshare needs root");
            // No frames but the test's; a kernel without IPv6 has none anyway.
            let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
            for command in [
                "link add v0 type veth peer name v1",
                "link set v0 up arp off addrgenmode none",
                "link set v1 up arp off addrgenmode none",
            ] {
                let mut ip = Command::new("ip");
                assert!(ip.args(command.split(' ')).status().unwrap().success(), "{command}");
            }
            // Until then what is sent goes nowhere, without a word.
            let deadline = Instant::now() + SOON * 4;
            for device in ["v0", "v1"] {
                while !operational(device) {
                    assert!(Instant::now() < deadline, "{device} is not up");
                }
            }
            test()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn operational(device: &str) -> bool {
    let shown = Command::new("ip").args(["link", "show", device]).output().unwrap();
    String::from_utf8_lossy(&shown.stdout).contains("state UP")
}

fn set_mtu(mtu: u32) {
    for device in ["v0", "v1"] {
        let mut ip = Command::new("ip");
        let set = ip.args(["link", "set", device, "mtu", &mtu.to_string()]).status();
        assert!(set.unwrap().success());
    }
}

fn netdev(name: &str) -> Device {
    let index = nix::net::if_::if_nametoindex(name).unwrap();
    Device::Netdev(NetdevPort::open(index, NetdevOptions::Port { slots: 2048 }).unwrap())
}

fn frame(number: usize, length: usize) -> Vec<u8> {
    let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5, number as u8];
    bytes.resize(length, 0x5a);
    bytes
}

/// A plain frame from the wire, in VLAN 101, or from a guest.
fn arrival(number: usize, from_wire: bool) -> Arrival {
    let tag = Tag { tpid: Tpid::Customer, tci: Tci(101) };
    Arrival::Frame {
        bytes: frame(number, 60),
        stripped: from_wire.then_some(tag),
        header: VnetHeader::default(),
    }
}

/// A worker with one port, VLAN 101, and its counters.
struct Switch {
    worker: Worker,
    orders: crossbeam_channel::Sender<Order>,
    notices: crossbeam_channel::Receiver<Notice>,
    uplink: Arc<UplinkShared>,
    port: Arc<PortShared>,
}

impl Switch {
    fn new() -> Self {
        let map = mapping::argument("101=t0").unwrap();
        let (_, table) = mapping::build_all(&[map], None, Tpid::Customer).unwrap();
        let (uplink, port) = (Arc::<UplinkShared>::default(), Arc::<PortShared>::default());
        uplink.link.set(DeviceState::Up, 1500);
        port.link.set(DeviceState::Up, 1500);
        let abilities = Abilities { tagged_gso: true, udp_gso: true };
        let (worker, orders, notices) = Worker::new(
            Arc::new(table),
            Arc::clone(&uplink),
            [Arc::clone(&port)],
            abilities,
            PollMode::Busy,
        )
        .unwrap();
        Self { worker, orders, notices, uplink, port }
    }

    fn attach(&mut self, port: Option<usize>, device: Device) {
        self.orders.send(Order::Attach(vec![(port, Box::new(device))])).unwrap();
        assert!(self.worker.obey().is_continue());
    }

    /// Rounds until nothing has moved for a few.
    fn rounds(&mut self) {
        let mut idle = 0;
        while idle < 5 {
            idle = if self.worker.round(Instant::now()) { 0 } else { idle + 1 };
        }
    }

    /// The flow from the guest to the wire or back; both ways balance.
    fn flow(&self, to_guest: bool) -> FlowSnapshot {
        let flows = [self.port.from_guest.snapshot(), self.port.to_guest.snapshot()];
        for flow in flows.iter().chain([&self.uplink.from_wire.snapshot()]) {
            assert_eq!(flow.in_frames + flow.split_frames, flow.out_frames + flow.dropped());
        }
        flows[usize::from(to_guest)]
    }
}

/// Frames from a faulty port to the device `v0`, or a device given; their numbers as
/// they come out at `v1`.
fn send(
    to_guest: bool,
    call: libc::c_long,
    device: impl FnOnce() -> Device + Send,
    fate: impl Fn(&[u64; 6]) -> Fate + Send + Sync,
) -> (FlowSnapshot, Vec<u8>, u64) {
    let ((flow, arrived), calls) = inject(call, fate, |begin| {
        let mut switch = Switch::new();
        let source = FaultyPort::default();
        for number in 0..FRAMES {
            source.script().arriving.push_back(arrival(number, to_guest));
        }
        let mut far = netdev("v1");
        let (from, to) = if to_guest { (None, Some(0)) } else { (Some(0), None) };
        switch.attach(to, device());
        switch.attach(from, Device::Faulty(source));
        begin();
        switch.rounds();
        let flow = switch.flow(to_guest);
        let (mut arrived, mut copies) = (Vec::new(), CopyPool::default());
        let deadline = Instant::now() + SOON;
        let expected = if call == libc::SYS_sendmmsg { flow.out_frames } else { 0 };
        while (arrived.len() as u64) < expected && Instant::now() < deadline {
            let mut burst = Burst::new();
            far.receive(&mut copies, BURST, &mut burst);
            // A tag, if it has one, was taken out by the kernel.
            arrived.extend(burst.iter().map(|received| received.buffer.frame()[14]));
            drop(burst);
            far.release();
        }
        (flow, arrived)
    });
    (flow, arrived, calls)
}

/// Every error of `sendmmsg`, at the first, a middle and the last packet, each way.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn each_error_of_sendmmsg() {
    for row in table::sends() {
        for (to_guest, reason) in [(true, row.to_guest), (false, row.to_wire)] {
            for position in [0, 17, FRAMES - 1] {
                let fate = |arguments: &[u64; 6]| {
                    let left = arguments[2] as usize;
                    let at = FRAMES - left;
                    match position.checked_sub(at) {
                        Some(0) => Fate::Fail(row.errno),
                        Some(before) => Fate::Part(before as u32),
                        None => Fate::Pass,
                    }
                };
                let (flow, arrived, _) =
                    in_namespace(|| send(to_guest, libc::SYS_sendmmsg, || netdev("v0"), fate));
                let full = [DropReason::GuestQueueFull, DropReason::UplinkQueueFull];
                let lost = if full.contains(&reason) { FRAMES - position } else { 1 };
                let what = format!("{row:?} at {position}: {flow:?}");
                assert_eq!(flow.drops[reason.index()], lost as u64, "{what}");
                assert_eq!(flow.dropped(), lost as u64, "{what}");
                let gone = position..position + lost;
                let expected = (0..FRAMES).filter(|number| !gone.contains(number));
                let expected: Vec<u8> = expected.map(|number| number as u8).collect();
                assert_eq!(arrived, expected, "{what}");
                assert_eq!(flow.out_frames, expected.len() as u64, "{what}");
                let noted = (reason == DropReason::SendFailed).then_some(row.errno);
                assert_eq!(flow.send_error, noted, "{what}");
            }
        }
    }
}

/// `sendmmsg` takes what it likes of a burst: all arrives, in order.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn sendmmsg_takes_a_part() {
    for part in [1, 2, 7, 47] {
        let (flow, arrived, calls) =
            in_namespace(|| send(true, libc::SYS_sendmmsg, || netdev("v0"), |_| Fate::Part(part)));
        assert_eq!(arrived, (0..FRAMES as u8).collect::<Vec<_>>(), "{part}: {flow:?}");
        assert_eq!((flow.out_frames, flow.dropped()), (FRAMES as u64, 0));
        assert_eq!(calls, (FRAMES as u64).div_ceil(part.into()));
    }
}

/// A tap of our own, and its netdev up.
fn internal() -> Device {
    let options = TapOptions { vnet_header: true, ..TapOptions::new("t0") };
    let queue = tap::open_queue(&options).unwrap();
    let mut ip = Command::new("ip");
    let up = ip.args(["link", "set", "t0", "up", "arp", "off", "addrgenmode", "none"]);
    assert!(up.status().unwrap().success());
    Device::Internal(InternalPort::new(queue.fd))
}

/// Every error of `write` to an internal port, in the middle of a burst.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn each_error_of_write() {
    for row in table::sends() {
        let writes = AtomicU64::new(0);
        let fate = |_: &[u64; 6]| match writes.fetch_add(1, Ordering::Relaxed) {
            // The error ends the burst's first part, and is met again behind it.
            20 | 21 => Fate::Fail(row.errno),
            _ => Fate::Pass,
        };
        let (flow, ..) = in_namespace(|| send(true, libc::SYS_write, internal, fate));
        let full = row.to_guest == DropReason::GuestQueueFull;
        let lost = if full { FRAMES - 20 } else { 1 };
        assert_eq!(flow.drops[row.to_guest.index()], lost as u64, "{row:?}: {flow:?}");
        assert_eq!(flow.out_frames, (FRAMES - lost) as u64, "{row:?}: {flow:?}");
    }
}

/// What the kernel itself says when a tap's netdev is down, and when it is gone.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_tap_that_is_down_or_gone_is_absent() {
    for (change, errno) in [("set t0 down", Errno::EIO), ("delete t0", Errno::EBADFD)] {
        let device = || {
            let device = internal();
            let mut ip = Command::new("ip");
            assert!(ip.arg("link").args(change.split(' ')).status().unwrap().success());
            device
        };
        let row = table::sends().iter().find(|row| row.errno == errno).unwrap();
        let pass = |_: &[u64; 6]| Fate::Pass;
        let (flow, _, writes) = in_namespace(|| send(true, libc::SYS_write, device, pass));
        assert_eq!(flow.drops[row.to_guest.index()], FRAMES as u64, "{change}: {flow:?}");
        assert_eq!(writes, FRAMES as u64);
    }
}

/// Super-frames and plain ones from `v1` to the guest's device `v0`, behind which the
/// uplink takes what comes: the flow, and how many calls were made.
fn receive(
    call: libc::c_long,
    fate: impl Fn(&[u64; 6]) -> Fate + Send + Sync,
    then: impl FnOnce(&mut Switch) + Send,
) -> (FlowSnapshot, u64) {
    in_namespace(|| {
        inject(call, fate, |begin| {
            let mut switch = Switch::new();
            switch.attach(Some(0), netdev("v0"));
            switch.attach(None, Device::Faulty(FaultyPort::default()));
            let mut far = netdev("v1");
            // Longer than a slot, shorter than the largest MTU: a copy on the queue.
            set_mtu(9000);
            let packet = |length| [vec![0; 10], frame(1, length)].concat();
            let packets = [packet(60), packet(5000), packet(60)];
            let packets: Vec<&[u8]> = packets.iter().map(Vec::as_slice).collect();
            let mut space = SendSpace::default();
            far.transmit(&packets, &mut space, |at, errno| panic!("{at}: {errno}"));
            begin();
            let deadline = Instant::now() + SOON;
            while switch.port.from_guest.snapshot().in_frames < 3 && Instant::now() < deadline {
                switch.rounds();
            }
            then(&mut switch);
            switch.flow(false)
        })
    })
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn each_error_of_recvfrom() {
    for row in table::others("recvfrom") {
        // An error the device left is read once, any other stands.
        let once = row.counted.is_none();
        // Nothing there is an answer; whatever else, it is tried again.
        let tries = match row.errno {
            Errno::EAGAIN => 1,
            _ if once => 2,
            _ => 3,
        };
        let calls = AtomicU64::new(0);
        let fate = |_: &[u64; 6]| match calls.fetch_add(1, Ordering::Relaxed) {
            1.. if once => Fate::Pass,
            _ => Fate::Fail(row.errno),
        };
        let (flow, calls) = receive(libc::SYS_recvfrom, fate, |_| {});
        assert_eq!(calls, tries, "{row:?}");
        let lost = row.counted.map_or(0, |reason| flow.drops[reason.index()]);
        assert_eq!(lost, u64::from(row.counted.is_some()), "{row:?}: {flow:?}");
        assert_eq!((flow.in_frames, flow.out_frames), (3, 3 - lost), "{row:?}: {flow:?}");
    }
}

/// A super-frame that could not be read stays on the socket's queue: the next one, in
/// another VLAN perhaps, must not be taken for it.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_super_frame_given_up_is_not_the_next_one() {
    let calls = AtomicU64::new(0);
    let fate = |_: &[u64; 6]| match calls.fetch_add(1, Ordering::Relaxed) {
        0..3 => Fate::Fail(Errno::ENOMEM),
        _ => Fate::Pass,
    };
    let uplink = FaultyPort::default();
    let flow = in_namespace(|| {
        let (flow, _) = inject(libc::SYS_recvfrom, fate, |begin| {
            let mut switch = Switch::new();
            switch.attach(Some(0), netdev("v0"));
            switch.attach(None, Device::Faulty(uplink.clone()));
            set_mtu(9000);
            let mut far = netdev("v1");
            let packets = [1, 2, 3].map(|number| [vec![0; 10], frame(number, 5000)].concat());
            let packets: Vec<&[u8]> = packets.iter().map(Vec::as_slice).collect();
            far.transmit(&packets, &mut SendSpace::default(), |at, errno| panic!("{at}: {errno}"));
            begin();
            let deadline = Instant::now() + SOON;
            while switch.port.from_guest.snapshot().in_frames < 3 && Instant::now() < deadline {
                switch.rounds();
            }
            switch.flow(false)
        });
        flow
    });
    assert_eq!((flow.in_frames, flow.out_frames), (3, 2), "{flow:?}");
    assert_eq!(flow.drops[DropReason::RingOverrun.index()], 1, "{flow:?}");
    // Behind the virtio header and the tag.
    let numbers: Vec<u8> = uplink.script().taken.iter().map(|packet| packet[10 + 4 + 14]).collect();
    assert_eq!(numbers, [2, 3]);
}

/// Reading an internal port fails: nothing is lost, the frame is read later.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn each_error_of_read() {
    for row in table::others("read") {
        let calls = AtomicU64::new(0);
        let fate = |_: &[u64; 6]| match calls.fetch_add(1, Ordering::Relaxed) {
            0 => Fate::Fail(row.errno),
            _ => Fate::Pass,
        };
        let (flow, reads) = in_namespace(|| {
            inject(libc::SYS_read, fate, |begin| {
                let mut switch = Switch::new();
                switch.attach(Some(0), internal());
                switch.attach(None, Device::Faulty(FaultyPort::default()));
                let mut inside = netdev("t0");
                let packet = [vec![0; 10], frame(1, 60)].concat();
                let mut space = SendSpace::default();
                inside.transmit(&[&packet], &mut space, |_, errno| panic!("{errno}"));
                begin();
                switch.rounds();
                switch.flow(false)
            })
        });
        assert!(reads >= 2, "{row:?}");
        assert_eq!((flow.in_frames, flow.out_frames), (1, 1), "{row:?}: {flow:?}");
    }
}

/// A device that cannot be polled comes back with the error, and the port is absent.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn each_error_of_epoll_ctl() {
    for row in table::others("epoll_ctl") {
        let fate = |_: &[u64; 6]| Fate::Fail(row.errno);
        let (flow, calls) = in_namespace(|| {
            inject(libc::SYS_epoll_ctl, fate, |begin| {
                let mut switch = Switch::new();
                let source = FaultyPort::default();
                switch.attach(None, Device::Faulty(source.clone()));
                let device = netdev("v0");
                begin();
                switch.attach(Some(0), device);
                let Ok(Notice::Departed(departed)) = switch.notices.try_recv() else {
                    panic!("{row:?}: the device was taken");
                };
                let error = departed.error.unwrap();
                assert_eq!(error.raw_os_error(), Some(row.errno as i32));
                assert!(departed.device.is_some() && departed.port == Some(0));
                source.script().arriving.push_back(arrival(1, true));
                switch.rounds();
                switch.flow(true)
            })
        });
        assert_eq!(calls, 1, "{row:?}");
        let reason = row.counted.unwrap();
        assert_eq!((flow.in_frames, flow.drops[reason.index()]), (1, 1), "{row:?}: {flow:?}");
    }
}

/// Closing a ring's entrance fails: what it holds is forwarded all the same.
#[test]
#[ignore = "needs root: makes network namespaces"]
fn each_error_of_setsockopt() {
    for row in table::others("setsockopt") {
        let fate = |_: &[u64; 6]| Fate::Fail(row.errno);
        let (flow, calls) = receive(libc::SYS_setsockopt, fate, |switch| {
            switch.orders.send(Order::Detach(Some(0))).unwrap();
            assert!(switch.worker.obey().is_continue());
        });
        assert_eq!(calls, 1, "{row:?}");
        assert_eq!((flow.in_frames, flow.out_frames), (3, 3), "{row:?}: {flow:?}");
    }
}

/// Runs a worker's own loop with a call failing; frames pass all the same.
fn looping(call: libc::c_long, fate: impl Fn(&[u64; 6]) -> Fate + Send + Sync, down: bool) -> u64 {
    in_namespace(|| {
        let (flow, calls) = inject(call, fate, |begin| {
            let switch = Switch::new();
            let Switch { worker, orders, notices, port, .. } = switch;
            let device = netdev("v0");
            let uplink = FaultyPort::default();
            let mut far = netdev("v1");
            // The worker's thread inherits the filter, and `ip` should not.
            let (flap, flaps) = mpsc::channel::<()>();
            let (flapped, done) = mpsc::channel::<()>();
            // Asking for v1 makes the kernel put its carrier's return into
            // effect (linkwatch_sync_dev): until then v1 drops what it is
            // given to send.
            let commands = "ip link set v0 down && ip link set v0 up && ip link show v1";
            let flapper = std::thread::spawn(move || {
                while flaps.recv().is_ok() {
                    let mut ip = Command::new("sh");
                    assert!(ip.args(["-c", commands]).output().unwrap().status.success());
                    flapped.send(()).unwrap();
                }
            });
            begin();
            let handle = worker.spawn(orders, notices, || {}).unwrap();
            handle.send(Order::Attach(vec![
                (Some(0), Box::new(device)),
                (None, Box::new(Device::Faulty(uplink))),
            ]));
            let packet = [vec![0; 10], frame(1, 60)].concat();
            let deadline = Instant::now() + SOON * 4;
            let mut space = SendSpace::default();
            for number in 1..=20 {
                if down && number == 10 {
                    flap.send(()).unwrap();
                    done.recv().unwrap();
                }
                far.transmit(&[&packet], &mut space, |_, errno| panic!("{errno}"));
                while port.from_guest.snapshot().out_frames < number {
                    assert!(Instant::now() < deadline, "frame {number} is stuck");
                    std::thread::yield_now();
                }
            }
            handle.finish();
            drop(flap);
            flapper.join().unwrap();
            port.from_guest.snapshot()
        });
        assert_eq!((flow.in_frames, flow.out_frames), (20, 20), "{flow:?}");
        calls
    })
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn each_error_of_epoll_wait() {
    for row in table::others("epoll_wait") {
        let calls = AtomicU64::new(0);
        // Every other one.
        let fate = |_: &[u64; 6]| match calls.fetch_add(1, Ordering::Relaxed) % 2 {
            0 => Fate::Fail(row.errno),
            _ => Fate::Pass,
        };
        assert!(looping(EPOLL_WAIT, fate, false) > 2, "{row:?}");
    }
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn each_error_of_getsockopt() {
    for row in table::others("getsockopt") {
        let fate = |_: &[u64; 6]| Fate::Fail(row.errno);
        assert!(looping(libc::SYS_getsockopt, fate, true) > 0, "{row:?}");
    }
}
