//! BPF programs in the kernel, in private network namespaces. The fd side of taps
//! stands in for guests and wires: what is read there is a frame with all its tags.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "tests"
)]

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, sendto, socket,
};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};
use vlanswitchd::sys::bpf::{
    self, Attached, BpfError, COUNTER_BYTES, COUNTER_FRAMES, Direction, Instruction, Method,
    PerCpuArrayMap, PopRule, Program, ProgramKind, R0, R9, TaggedVlan, UplinkFilter, XdpMode,
    attach_beside_qdiscs, attach_tc, attach_xdp, clsact, detach_tc, is_attached_tc, load,
    move_to_tcx, tcx,
};
use vlanswitchd::sys::netns::in_private_namespace;
use vlanswitchd::sys::tap::{TapOptions, open_queue};

const S: TaggedVlan = TaggedVlan { tpid: 0x88a8, vid: 200 };
const C: TaggedVlan = TaggedVlan { tpid: 0x8100, vid: 100 };
const TPIDS: [u16; 4] = [0x8100, 0x88a8, 0x9100, 0x9200];
const DEADLINE: Duration = Duration::from_secs(10);

/// Runs a test in a namespace without IPv6, so that the kernel sends nothing of its own.
fn private(test: impl FnOnce() + Send) {
    in_private_namespace(|| {
        for scope in ["all", "default"] {
            std::fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1").unwrap();
        }
        test();
    })
    .unwrap();
}

fn ip(arguments: &str) {
    let status = std::process::Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {arguments}");
}

/// What a command prints.
fn output(command: &str) -> String {
    let (program, arguments) = command.split_once(' ').unwrap();
    let output = std::process::Command::new(program).args(arguments.split(' ')).output().unwrap();
    assert!(output.status.success(), "{command}");
    String::from_utf8(output.stdout).unwrap()
}

fn index(name: &str) -> u32 {
    nix::net::if_::if_nametoindex(name).unwrap()
}

/// Something frames come out of: the fd of a tap or a socket.
struct End(OwnedFd);

impl End {
    /// A tap that is up, and its fd, without offloads or header.
    fn tap(name: &str) -> Self {
        let queue =
            open_queue(&TapOptions { vnet_header: false, ..TapOptions::new(name) }).unwrap();
        ip(&format!("link set {name} up mtu 65000"));
        Self(queue.fd)
    }

    /// An AF_PACKET socket on a device.
    fn socket(device: &str, protocol: SockProtocol) -> Self {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Packet, SockType::Raw, flags, protocol).unwrap();
        // Protocol 0 in the address keeps the socket's own.
        bind(fd.as_raw_fd(), &link_address(device)).unwrap();
        let end = Self(fd);
        // What came in on any device before the bind is not of interest.
        while end.try_read().is_some() {}
        end
    }

    fn write(&self, frame: &[u8]) {
        assert_eq!(nix::unistd::write(&self.0, frame).unwrap(), frame.len());
    }

    fn try_read(&self) -> Option<Vec<u8>> {
        let mut buffer = vec![0; 70_000];
        let length = match nix::unistd::read(&self.0, &mut buffer) {
            Err(nix::Error::EAGAIN) => return None,
            result => result.unwrap(),
        };
        buffer.truncate(length);
        Some(buffer)
    }

    /// The next frame, within the deadline.
    fn read(&self) -> Vec<u8> {
        let start = Instant::now();
        loop {
            if let Some(frame) = self.try_read() {
                return frame;
            }
            let left = DEADLINE.checked_sub(start.elapsed()).expect("a frame before the deadline");
            let mut wait = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            poll(&mut wait, PollTimeout::try_from(left).unwrap()).unwrap();
        }
    }
}

fn link_address(device: &str) -> LinkAddr {
    let mut addresses = nix::ifaddrs::getifaddrs().unwrap();
    let found = addresses.find_map(|interface| {
        let address = *interface.address?.as_link_addr()?;
        (interface.interface_name == device).then_some(address)
    });
    found.unwrap()
}

fn send(device: &str, frame: &[u8]) {
    let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None).unwrap();
    let sent = sendto(fd.as_raw_fd(), frame, &link_address(device), MsgFlags::empty()).unwrap();
    assert_eq!(sent, frame.len());
}

/// A broadcast frame with these tags (outermost first: TPID, TCI), IPv6 inside, and
/// a number to know it by.
fn frame(tags: &[(u16, u16)], number: u32) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 1]);
    for (tpid, tci) in tags {
        frame.extend(tpid.to_be_bytes());
        frame.extend(tci.to_be_bytes());
    }
    let payload = number.to_be_bytes();
    let mut packet = Vec::new();
    etherparse::PacketBuilder::ipv6([0xfe; 16], [0xff; 16], 64)
        .udp(1, 2)
        .write(&mut packet, &payload)
        .unwrap();
    frame.extend(0x86dd_u16.to_be_bytes());
    frame.extend(packet);
    frame
}

/// The number in a frame of [`frame`].
fn number(frame: &[u8]) -> u32 {
    u32::from_be_bytes(*frame.last_chunk().unwrap())
}

fn tc(name: &str, program: Result<Vec<Instruction>, bpf::AssemblyError>) -> OwnedFd {
    load(ProgramKind::SchedCls, name, &program.unwrap()).unwrap()
}

fn attach(device: &str, program: Result<Vec<Instruction>, bpf::AssemblyError>) {
    let program = tc("test", program);
    attach_tc(program.as_fd(), "test", index(device), Direction::Ingress).unwrap();
}

/// Whether the kernel has TCX. Before Linux 6.6 there is nothing to be seen of it, which the
/// test that asks says; that clsact takes over is tested on every kernel.
fn has_tcx() -> bool {
    let has = !matches!(tcx::programs(1, Direction::Ingress), Err(BpfError::Unsupported { .. }));
    if !has {
        eprintln!("no TCX in this kernel");
    }
    has
}

#[test]
#[ignore = "needs root: loads BPF programs"]
fn the_verifier_takes_every_program() {
    let counters = PerCpuArrayMap::create("counters", 2).unwrap();
    let rules = [
        PopRule { outer: S, inner: Some(C), target: 1 },
        PopRule { outer: C, inner: None, target: 1 },
    ];
    let all = [
        (ProgramKind::SchedCls, bpf::seal_program()),
        (ProgramKind::SchedCls, bpf::vlan_push_program(0x8100, 0xa001)),
        (ProgramKind::SchedCls, bpf::vlan_pop_program()),
        (ProgramKind::SchedCls, bpf::vlan_pop_redirect(&rules)),
        (ProgramKind::SchedCls, bpf::vlan_push_redirect(&[S, C], 1)),
        (ProgramKind::SchedCls, bpf::tc_count_drop_program(counters.as_fd())),
        (ProgramKind::Xdp, bpf::xdp_count_drop_program(counters.as_fd())),
        (ProgramKind::Xdp, bpf::xdp_drop_program()),
    ];
    for (number, (kind, program)) in all.into_iter().enumerate() {
        load(kind, &format!("program{number}"), &program.unwrap()).unwrap();
    }
    UplinkFilter::new(None).unwrap();
}

#[test]
#[ignore = "needs root: loads BPF programs"]
fn a_refused_program_comes_with_the_verifiers_words() {
    let mut program = Program::new();
    program.mov(R0, R9).exit();
    let error = load(ProgramKind::SchedCls, "bad", &program.finish().unwrap()).unwrap_err();
    assert!(matches!(&error, BpfError::Rejected { name, log, .. }
        if name == "bad" && log.contains("R9 !read_ok")));
}

#[test]
#[ignore = "needs root: drops capabilities of a thread"]
fn a_missing_capability_is_named() {
    std::thread::spawn(|| {
        caps::clear(None, caps::CapSet::Effective).unwrap();
        let error = load(ProgramKind::SchedCls, "x", &bpf::seal_program().unwrap()).unwrap_err();
        assert!(matches!(&error, BpfError::NotPermitted { .. }), "{error}");
        assert!(error.to_string().contains("CAP_BPF"), "{error}");
        let error = PerCpuArrayMap::create("x", 1).unwrap_err();
        assert!(matches!(&error, BpfError::NotPermitted { .. }), "{error}");
    })
    .join()
    .unwrap();
}

/// The seal keeps frames from the stack and not from AF_PACKET, and stays when all
/// its fds are closed.
fn seal_isolates_the_host(method: Method) {
    private(|| {
        let guest = End::tap("t0");
        let device = index("t0");
        let switch = End::socket("t0", SockProtocol::EthAll);
        let stack = End::socket("t0", SockProtocol::EthIpv6);
        guest.write(&frame(&[], 1));
        assert_eq!(number(&switch.read()), 1);
        assert_eq!(number(&stack.read()), 1, "nothing is sealed yet");

        let program = tc("seal", bpf::seal_program());
        match method {
            Method::Tcx => tcx::attach(program.as_fd(), device, Direction::Ingress),
            Method::Clsact => clsact::attach(program.as_fd(), "seal", device, Direction::Ingress),
        }
        .unwrap();
        drop(program);
        for number_sent in 2..10 {
            guest.write(&frame(&[], number_sent));
            guest.write(&frame(&[(0x8100, 5)], number_sent));
        }
        for number_sent in 2..10 {
            assert_eq!(number(&switch.read()), number_sent);
            assert_eq!(number(&switch.read()), number_sent);
        }
        match method {
            Method::Tcx => assert!(tcx::detach("seal", device, Direction::Ingress).unwrap()),
            Method::Clsact => assert!(clsact::detach("seal", device, Direction::Ingress).unwrap()),
        }
        // Frames keep their order: if one had come through, it would be here first.
        guest.write(&frame(&[], 10));
        assert_eq!(number(&stack.read()), 10, "a sealed frame reached the stack");
        assert!(!detach_tc("seal", device, Direction::Ingress).unwrap(), "it is detached already");
    });
}

#[test]
#[ignore = "needs root: network namespace, tap, BPF"]
fn the_seal_isolates_the_host_by_tcx() {
    if !has_tcx() {
        return;
    }
    seal_isolates_the_host(Method::Tcx);
}

#[test]
#[ignore = "needs root: network namespace, tap, BPF"]
fn the_seal_isolates_the_host_by_clsact() {
    seal_isolates_the_host(Method::Clsact);
}

/// Names of the programs at t0's TCX ingress, as bpftool or the kernel tells.
fn tcx_names(direction: Direction) -> Vec<String> {
    let programs = tcx::programs(index("t0"), direction).unwrap();
    programs.into_iter().map(|program| program.name).collect()
}

#[test]
#[ignore = "needs root: network namespace, tap, BPF"]
fn tcx_adopts_its_own_and_goes_before_others() {
    if !has_tcx() {
        return;
    }
    private(|| {
        let _guest = End::tap("t0");
        let device = index("t0");
        let other = tc("other", bpf::vlan_pop_program());
        assert_eq!(tcx::attach(other.as_fd(), device, Direction::Ingress).unwrap(), Attached::New);
        let mut ids = BTreeSet::new();
        for expected in [Attached::New, Attached::Replaced, Attached::Replaced] {
            let program = tc("seal", bpf::seal_program());
            let attached = tcx::attach(program.as_fd(), device, Direction::Ingress).unwrap();
            assert_eq!(attached, expected);
            assert_eq!(tcx_names(Direction::Ingress), ["seal", "other"]);
            ids.insert(tcx::programs(device, Direction::Ingress).unwrap()[0].id);
            // The very same program once more.
            let attached = tcx::attach(program.as_fd(), device, Direction::Ingress).unwrap();
            assert_eq!(attached, Attached::Replaced);
        }
        assert_eq!(ids.len(), 3, "the new program took the old one's place");
        assert!(tcx_names(Direction::Egress).is_empty());
        assert!(tcx::detach("seal", device, Direction::Ingress).unwrap());
        assert_eq!(tcx_names(Direction::Ingress), ["other"]);
        assert!(!tcx::detach("seal", device, Direction::Ingress).unwrap());
    });
}

/// Names of the filters, by tc.
fn tc_filters(direction: &str) -> Vec<String> {
    // One line for each priority, and one for each filter of it:
    // filter protocol all pref 1 bpf chain 0 handle 0x1 NAME direct-action not_in_hw id 7 ...
    let listed = output(&format!("tc filter show dev t0 {direction}"));
    let filters = listed.lines().filter_map(|line| line.split_once(" handle "));
    filters
        .map(|(before, filter)| {
            assert!(before.contains(" all pref 1 bpf ") && filter.contains(" direct-action "));
            filter.split(' ').nth(1).unwrap().to_owned()
        })
        .collect()
}

#[test]
#[ignore = "needs root: network namespace, tap, BPF"]
fn clsact_adopts_its_own_and_goes_before_others() {
    private(|| {
        let _guest = End::tap("t0");
        let device = index("t0");
        assert!(!clsact::is_attached("seal", device, Direction::Ingress).unwrap());
        let other = tc("other", bpf::vlan_pop_program());
        clsact::attach(other.as_fd(), "other", device, Direction::Ingress).unwrap();
        for expected in [Attached::Beside, Attached::Replaced] {
            let program = tc("seal", bpf::seal_program());
            let attached =
                clsact::attach(program.as_fd(), "seal", device, Direction::Ingress).unwrap();
            assert_eq!(attached, expected);
            assert_eq!(tc_filters("ingress"), ["seal", "other"]);
        }
        assert!(clsact::is_attached("seal", device, Direction::Ingress).unwrap());
        assert!(!clsact::is_attached("seal", device, Direction::Egress).unwrap());
        let program = tc("out", bpf::vlan_push_program(0x8100, 1));
        clsact::attach(program.as_fd(), "out", device, Direction::Egress).unwrap();
        assert_eq!(tc_filters("egress"), ["out"]);
        assert!(clsact::detach("seal", device, Direction::Ingress).unwrap());
        assert!(!clsact::detach("seal", device, Direction::Ingress).unwrap());
        assert_eq!(tc_filters("ingress"), ["other"]);
        let error = clsact::attach(program.as_fd(), "x", 9999, Direction::Ingress).unwrap_err();
        assert!(error.to_string().contains("interface 9999"), "{error}");
    });
}

/// Without CAP_SYS_ADMIN nobody may ask which programs are there: then clsact does it,
/// so that programs do not pile up.
#[test]
#[ignore = "needs root: network namespace, tap, BPF"]
fn without_cap_sys_admin_clsact_takes_over() {
    if !has_tcx() {
        return;
    }
    private(|| {
        let _guest = End::tap("t0");
        let device = index("t0");
        let program = tc("seal", bpf::seal_program());
        let attach = || attach_tc(program.as_fd(), "seal", device, Direction::Ingress).unwrap();
        tcx::attach(program.as_fd(), device, Direction::Ingress).unwrap();
        assert_eq!(attach(), (Method::Tcx, Attached::Replaced));
        caps::drop(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_ADMIN).unwrap();
        let error = tcx::attach(program.as_fd(), device, Direction::Ingress).unwrap_err();
        assert!(matches!(error, BpfError::Unidentified { count: 1, .. }), "{error}");
        assert_eq!(attach(), (Method::Clsact, Attached::New));
        assert_eq!(attach(), (Method::Clsact, Attached::Replaced));
        assert!(detach_tc("seal", device, Direction::Ingress).unwrap());
        assert!(tc_filters("ingress").is_empty());
        caps::raise(None, caps::CapSet::Effective, caps::Capability::CAP_SYS_ADMIN).unwrap();
        assert!(detach_tc("seal", device, Direction::Ingress).unwrap());
        assert!(tcx_names(Direction::Ingress).is_empty());
    });
}

/// Where there is no TCX, whoever asks for it gets clsact, and it is replaced, found and taken
/// away there.
#[test]
#[ignore = "needs root: network namespace, tap, BPF"]
fn a_kernel_without_tcx_has_clsact_for_all() {
    if has_tcx() {
        return;
    }
    private(|| {
        let _guest = End::tap("t0");
        let device = index("t0");
        let (name, ingress) = ("seal", Direction::Ingress);
        let program = tc(name, bpf::seal_program());
        let error = move_to_tcx(program.as_fd(), name, device, ingress).unwrap_err();
        assert!(matches!(error, BpfError::Unsupported { .. }), "{error}");
        for attached in [Attached::New, Attached::Replaced] {
            let got = attach_beside_qdiscs(program.as_fd(), name, device, ingress).unwrap();
            assert_eq!(got, (Method::Clsact, attached));
            assert!(is_attached_tc(name, device, ingress).unwrap());
        }
        assert!(detach_tc(name, device, ingress).unwrap());
        assert!(!is_attached_tc(name, device, ingress).unwrap());
        // In somebody else's qdisc there is no other place.
        output("tc qdisc add dev t0 ingress");
        let got = attach_tc(program.as_fd(), name, device, ingress).unwrap();
        assert_eq!(got, (Method::Clsact, Attached::Beside));
    });
}

/// The kinds of t0's ingress and clsact qdiscs, which share one place.
fn ingress_qdiscs() -> Vec<String> {
    let listed = output("tc qdisc show dev t0");
    let kinds = listed.lines().filter(|line| line.contains("ffff:fff1"));
    kinds.filter_map(|line| line.split(' ').nth(1)).map(str::to_owned).collect()
}

#[test]
#[ignore = "needs root: network namespace, tap, BPF"]
fn a_qdisc_made_for_a_filter_goes_with_it() {
    private(|| {
        let _guest = End::tap("t0");
        let device = index("t0");
        let program = tc("seal", bpf::seal_program());
        let seal = || clsact::attach(program.as_fd(), "seal", device, Direction::Ingress).unwrap();
        let unseal = || clsact::detach("seal", device, Direction::Ingress).unwrap();

        assert_eq!(seal(), Attached::New);
        assert_eq!(ingress_qdiscs(), ["clsact"]);
        // A later run knows it as its own, too.
        assert_eq!(seal(), Attached::Replaced);
        assert!(unseal());
        assert!(ingress_qdiscs().is_empty());

        for direction in [Direction::Ingress, Direction::Egress] {
            assert_eq!(seal(), Attached::New);
            let other = tc("other", bpf::vlan_pop_program());
            clsact::attach(other.as_fd(), "other", device, direction).unwrap();
            assert!(unseal());
            assert_eq!(ingress_qdiscs(), ["clsact"], "somebody uses it: {direction:?}");
            output("tc qdisc del dev t0 clsact");
        }

        for kind in ["clsact", "ingress"] {
            output(&format!("tc qdisc add dev t0 {kind}"));
            assert_eq!(seal(), Attached::Beside);
            assert_eq!(tc_filters("ingress"), ["seal"]);
            assert!(unseal());
            assert_eq!(ingress_qdiscs(), [kind], "somebody else made it");
            output(&format!("tc qdisc del dev t0 {kind}"));
        }
    });
}

/// Where somebody else's qdisc is, or is to come, TCX it is: he may remove the qdisc.
#[test]
#[ignore = "needs root: network namespace, tap, BPF"]
fn a_program_stays_when_others_remove_their_qdisc() {
    if !has_tcx() {
        return;
    }
    private(|| {
        let _guest = End::tap("t0");
        let device = index("t0");
        let program = tc("seal", bpf::seal_program());
        let (program, name, ingress) = (program.as_fd(), "seal", Direction::Ingress);
        let is_attached = || is_attached_tc(name, device, ingress).unwrap();
        let detach = || detach_tc(name, device, ingress).unwrap();

        output("tc qdisc add dev t0 ingress");
        let attached = attach_tc(program, name, device, ingress).unwrap();
        assert_eq!(attached, (Method::Tcx, Attached::New));
        assert!(tc_filters("ingress").is_empty());
        output("tc qdisc del dev t0 ingress");
        assert!(is_attached());
        assert!(detach());
        assert!(!is_attached());

        let attached = attach_beside_qdiscs(program, name, device, ingress).unwrap();
        assert_eq!(attached, (Method::Tcx, Attached::New));
        output("tc qdisc add dev t0 ingress");
        assert!(detach());

        // Ours, and so in nobody's way once it has moved.
        output("tc qdisc del dev t0 ingress");
        attach_tc(program, name, device, ingress).unwrap();
        assert!(is_attached());
        move_to_tcx(program, name, device, ingress).unwrap();
        output("tc qdisc add dev t0 ingress");
        assert!(is_attached());
    });
}

/// First by clsact, later by TCX, and never by both.
#[test]
#[ignore = "needs root: network namespace, tap, BPF"]
fn a_program_moves_from_clsact_to_tcx() {
    if !has_tcx() {
        return;
    }
    private(|| {
        let _guest = End::tap("t0");
        let device = index("t0");
        let program = tc("seal", bpf::seal_program());
        let attach = || attach_tc(program.as_fd(), "seal", device, Direction::Ingress).unwrap();
        let where_now = || (tcx_names(Direction::Ingress), tc_filters("ingress"));
        let seal = || vec!["seal".to_owned()];
        assert_eq!(attach(), (Method::Clsact, Attached::New));
        assert_eq!(attach(), (Method::Clsact, Attached::Replaced));
        assert_eq!(where_now(), (vec![], seal()));
        let moved = move_to_tcx(program.as_fd(), "seal", device, Direction::Ingress).unwrap();
        assert_eq!(moved, (Method::Tcx, Attached::New));
        assert_eq!(where_now(), (seal(), vec![]));
        assert_eq!(attach(), (Method::Tcx, Attached::Replaced));
        assert_eq!(where_now(), (seal(), vec![]));
        assert!(detach_tc("seal", device, Direction::Ingress).unwrap());

        // Behind a foreign TCX program clsact would not be asked.
        let other = tc("other", bpf::vlan_pop_program());
        tcx::attach(other.as_fd(), device, Direction::Ingress).unwrap();
        assert_eq!(attach(), (Method::Tcx, Attached::New));
        assert_eq!(tcx_names(Direction::Ingress), ["seal", "other"]);
    });
}

/// Every TPID with telling VIDs, and no tag, each claimed alone: the filter takes
/// those frames whole, no other, and counts the other tagged ones.
#[test]
#[ignore = "needs root: network namespace, tap, BPF"]
fn the_uplink_filter_takes_what_is_claimed() {
    private(|| {
        let wire = End::tap("t0");
        let filter = UplinkFilter::new(None).unwrap();
        let ring = End::socket("t0", SockProtocol::EthAll);
        filter.attach(ring.0.as_fd()).unwrap();
        let mut tags: Vec<Option<(usize, u16)>> = vec![None];
        for tpid in 0..TPIDS.len() {
            tags.extend([0, 1, 100, 4094, 4095].map(|vid| Some((tpid, vid))));
        }
        let set = |tag: Option<(usize, u16)>, claimed| match tag {
            None => filter.claim_untagged(claimed).unwrap(),
            Some((tpid, vid)) => filter.claim(tpid, vid, claimed).unwrap(),
        };
        // The marker's tag is claimed throughout.
        const MARKER: (usize, u16) = (3, 3000);
        set(Some(MARKER), true);
        let mut missed: BTreeMap<(usize, u16), u64> = BTreeMap::new();
        for (row, &claimed) in tags.iter().enumerate() {
            set(claimed, true);
            for (column, &sent) in tags.iter().enumerate() {
                // PCP 5 and DEI must not matter.
                let tag: Vec<_> =
                    sent.iter().map(|&(tpid, vid)| (TPIDS[tpid], vid | 0xb000)).collect();
                wire.write(&frame(&tag, (row * 100 + column) as u32));
                if sent != claimed
                    && let Some(sent) = sent
                {
                    *missed.entry(sent).or_default() += 1;
                }
            }
            wire.write(&frame(&[(TPIDS[MARKER.0], MARKER.1)], 1_000_000));
            assert_eq!(number(&ring.read()), (row * 100 + row) as u32, "claimed {claimed:?}");
            assert_eq!(number(&ring.read()), 1_000_000, "one frame only for {claimed:?}");
            set(claimed, false);
        }
        let seen: BTreeMap<_, _> =
            filter.seen().unwrap().map(|(tpid, vid, frames)| ((tpid, vid), frames)).collect();
        assert_eq!(seen, missed);
        assert!(filter.claim(4, 1, true).is_err() && filter.claim(0, 4096, true).is_err());

        // An inner tag does not count, a claimed one stays claimed next to others, and
        // length is no matter.
        filter.claim(1, 200, true).unwrap();
        filter.claim(0, 200, true).unwrap();
        filter.claim(0, 200, false).unwrap();
        wire.write(&frame(&[(0x8100, 200), (0x88a8, 200)], 1));
        wire.write(&frame(&[(0x88a8, 200), (0x8100, 5)], 2));
        assert_eq!(number(&ring.read()), 2);
        let mut long = frame(&[(0x9200, MARKER.1)], 0);
        long.resize(60_000, 7);
        wire.write(&long);
        assert_eq!(ring.read(), long);

        // Our own frames pass the socket on their way out, and are no business of it.
        filter.claim_untagged(true).unwrap();
        send("t0", &frame(&[], 3));
        send("t0", &frame(&[(0x9200, MARKER.1)], 4));
        assert_eq!(number(&wire.read()), 3);
        assert_eq!(number(&wire.read()), 4);
        wire.write(&frame(&[], 5));
        assert_eq!(number(&ring.read()), 5);
    });
}

/// The far end of tests and benches: one hub device, a device for each VLAN.
#[test]
#[ignore = "needs root: network namespace, tap, BPF"]
fn the_hub_pops_and_pushes() {
    private(|| {
        let (uplink, plain, double) = (End::tap("hub"), End::tap("plain"), End::tap("double"));
        let rules = [
            PopRule { outer: S, inner: Some(C), target: index("double") },
            PopRule { outer: C, inner: None, target: index("plain") },
        ];
        attach("hub", bpf::vlan_pop_redirect(&rules));
        attach("plain", bpf::vlan_push_redirect(&[C], index("hub")));
        attach("double", bpf::vlan_push_redirect(&[S, C], index("hub")));
        let (s, c) = ((S.tpid, S.vid), (C.tpid, C.vid));

        uplink.write(&frame(&[c], 1));
        assert_eq!(plain.read(), frame(&[], 1));
        uplink.write(&frame(&[c, s], 2));
        assert_eq!(plain.read(), frame(&[s], 2), "the rule says nothing of an inner tag");
        uplink.write(&frame(&[s, c], 3));
        assert_eq!(double.read(), frame(&[], 3));
        // Of no rule: each differs from one in one thing.
        let stack = End::socket("hub", SockProtocol::EthIpv6);
        for tags in [vec![s], vec![s, (0x8100, 101)], vec![s, (0x88a8, 100)], vec![(0x88a8, 100)]] {
            uplink.write(&frame(&tags, 4));
        }
        uplink.write(&frame(&[], 5));
        // What is IPv6 after its outer tag goes up the stack as such.
        assert_eq!([(); 3].map(|()| number(&stack.read())), [4, 4, 5]);
        uplink.write(&frame(&[c], 6));
        assert_eq!(plain.read(), frame(&[], 6));
        uplink.write(&frame(&[s, c], 7));
        assert_eq!(double.read(), frame(&[], 7));

        plain.write(&frame(&[], 8));
        assert_eq!(uplink.read(), frame(&[c], 8));
        plain.write(&frame(&[(0x88a8, 0xe007)], 9));
        assert_eq!(uplink.read(), frame(&[c, (0x88a8, 0xe007)], 9));
        double.write(&frame(&[], 10));
        assert_eq!(uplink.read(), frame(&[s, c], 10));
    });
}

#[test]
#[ignore = "needs root: network namespace, tap, BPF"]
fn a_device_pushes_on_the_way_out_and_pops_on_the_way_in() {
    private(|| {
        let wire = End::tap("t0");
        let push = tc("push", bpf::vlan_push_program(0x88a8, 0x6007));
        attach_tc(push.as_fd(), "push", index("t0"), Direction::Egress).unwrap();
        send("t0", &frame(&[], 1));
        assert_eq!(wire.read(), frame(&[(0x88a8, 0x6007)], 1));
        assert!(detach_tc("push", index("t0"), Direction::Egress).unwrap());
        send("t0", &frame(&[], 2));
        assert_eq!(wire.read(), frame(&[], 2));

        // A tagged frame is for nobody; once popped it is IPv6.
        let stack = End::socket("t0", SockProtocol::EthIpv6);
        wire.write(&frame(&[(0x8100, 9), (0x8100, 10)], 3));
        attach("t0", bpf::vlan_pop_program());
        wire.write(&frame(&[(0x8100, 9)], 4));
        wire.write(&frame(&[], 5));
        let (popped, plain) = (stack.read(), stack.read());
        assert_eq!((popped, plain), (frame(&[], 4), frame(&[], 5)));
    });
}

#[test]
#[ignore = "needs root: network namespace, veth, BPF"]
fn xdp_counts_and_drops_before_the_stack() {
    private(|| {
        ip("link add va type veth peer name vb");
        ip("link set va up");
        ip("link set vb up");
        let all = End::socket("vb", SockProtocol::EthAll);
        for (mode, name) in [(XdpMode::Generic, "xdpgeneric"), (XdpMode::Native, "xdp")] {
            let counters = PerCpuArrayMap::create("counters", 2).unwrap();
            let program = bpf::xdp_count_drop_program(counters.as_fd()).unwrap();
            let program = load(ProgramKind::Xdp, "count", &program).unwrap();
            let link = attach_xdp(program.as_fd(), index("vb"), mode).unwrap();
            assert!(output("ip link show vb").contains(&format!(" {name} ")), "{name}");
            let sent = frame(&[], 1);
            for _ in 0..100 {
                send("va", &sent);
            }
            wait_for(|| counters.sum(COUNTER_FRAMES).unwrap() == 100);
            assert_eq!(counters.sum(COUNTER_BYTES).unwrap(), 100 * sent.len() as u64);
            drop(link);
            // A child that another test is starting may hold a copy of the link for a moment.
            wait_for(|| !output("ip link show vb").contains(" xdp"));
            send("va", &frame(&[], 2));
            assert_eq!(number(&all.read()), 2, "{name}: a dropped frame reached AF_PACKET");
            let error = counters.sum(2).unwrap_err();
            assert!(error.to_string().contains("entry 2"), "{error}");
        }
        let drop_all = load(ProgramKind::Xdp, "drop", &bpf::xdp_drop_program().unwrap()).unwrap();
        let link = attach_xdp(drop_all.as_fd(), index("vb"), XdpMode::Native).unwrap();
        let error = attach_xdp(drop_all.as_fd(), index("vb"), XdpMode::Native).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(nix::libc::EBUSY));
        drop(link);
    });
}

#[test]
#[ignore = "needs root: network namespace, tap, BPF"]
fn tc_counts_and_drops() {
    private(|| {
        let wire = End::tap("t0");
        let counters = PerCpuArrayMap::create("counters", 2).unwrap();
        attach("t0", bpf::tc_count_drop_program(counters.as_fd()));
        let sent = frame(&[], 1);
        for _ in 0..50 {
            wire.write(&sent);
        }
        wait_for(|| counters.sum(COUNTER_FRAMES).unwrap() == 50);
        assert_eq!(counters.sum(COUNTER_BYTES).unwrap(), 50 * sent.len() as u64);
    });
}

fn wait_for(condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "not before the deadline");
        std::thread::yield_now();
    }
}
