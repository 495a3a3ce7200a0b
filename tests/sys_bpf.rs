//! BPF programs in the kernel, in private network namespaces.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::os::fd::AsFd;
use vlanswitchd::sys::bpf::{
    self, PerCpuArrayMap, PopRule, ProgramKind, TaggedVlan, UplinkFilter, load,
};

const S: TaggedVlan = TaggedVlan { tpid: 0x88a8, vid: 200 };
const C: TaggedVlan = TaggedVlan { tpid: 0x8100, vid: 100 };

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
    UplinkFilter::new().unwrap();
}
