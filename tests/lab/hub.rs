//! A switch at the far end of the cable, made of TC programs: real kernel stacks,
//! each in a VLAN or a pair of VLANs of its own. No 8021q module is needed, and a
//! machine that has one runs the same programs.

use super::frames::TagBytes;
use super::{Lab, Namespace};
use std::os::fd::AsFd;

use vlanswitchd::sys::bpf::{self, Direction, PopRule, ProgramKind, TaggedVlan};

/// One stack in one VLAN (or `outer.inner`), outermost tag first.
pub struct Member {
    /// Its namespace; the device is `eth0`.
    pub inside: Namespace,
}

/// Puts a stack into each of these VLANs and joins them to `far0`.
pub fn far_members(lab: &Lab, vlans: &[&[TagBytes]]) -> Vec<Member> {
    let mut members = Vec::new();
    let mut rules = Vec::new();
    let trunk = lab.far.index("far0");
    for (number, tags) in vlans.iter().enumerate() {
        let inside = Namespace::new("member");
        inside.enable_ipv6();
        let port = format!("member{number}");
        lab.far.ip(&format!("link add {port} type veth peer name eth0 netns {}", inside.name()));
        lab.far.set_up(&[&port]);
        inside.set_up(&["eth0"]);
        let tags: Vec<TaggedVlan> = tags.iter().map(vlan).collect();
        let push = bpf::vlan_push_redirect(&tags, trunk).expect("a short program");
        attach(&lab.far, &port, Direction::Ingress, "lab_push", &push);
        rules.push(PopRule {
            outer: tags[0],
            inner: tags.get(1).copied(),
            target: lab.far.index(&port),
        });
        members.push(Member { inside });
    }
    let pop = bpf::vlan_pop_redirect(&rules).expect("a short program");
    attach(&lab.far, "far0", Direction::Ingress, "lab_pop", &pop);
    members
}

impl Member {
    /// Gives `eth0` these addresses (`10.0.0.1/24`).
    pub fn address(self, addresses: &[&str]) -> Self {
        for address in addresses {
            self.inside.ip(&format!("address add {address} dev eth0"));
        }
        self
    }
}

/// The stack behind `device` sends and receives everything with this tag, as
/// through a VLAN device. The frames the device itself carries are tagged.
pub fn tag_everything(namespace: &Namespace, device: &str, tag: TagBytes) {
    let push = bpf::vlan_push_program(tag.tpid, tag.vid).expect("a short program");
    attach(namespace, device, Direction::Egress, "lab_push", &push);
    let pop = bpf::vlan_pop_program().expect("a short program");
    attach(namespace, device, Direction::Ingress, "lab_pop", &pop);
}

/// Attaches a program to a tc hook; it goes with the device.
pub fn attach(
    namespace: &Namespace,
    device: &str,
    direction: Direction,
    name: &str,
    program: &[bpf::Instruction],
) {
    let index = namespace.index(device);
    namespace.enter(|| {
        let program = bpf::load(ProgramKind::SchedCls, name, program).expect("it verifies");
        bpf::attach_tc(program.as_fd(), name, index, direction).expect("a tc hook");
    });
}

fn vlan(tag: &TagBytes) -> TaggedVlan {
    TaggedVlan { tpid: tag.tpid, vid: tag.tci() }
}
