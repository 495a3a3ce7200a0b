//! eBPF without a toolchain: assemble, load, attach.
//!
//! Four jobs need a program in the kernel. The **seal** on every tap keeps guest
//! frames from the host's IP stack; the **uplink filter** keeps the host's own
//! traffic out of our ring; **steering** names the
//! worker a frame is for where there are several; the **kernel path** pops, pushes and redirects. Each is
//! tens of instructions, so [`Program`] assembles them, [`load`] hands them to
//! bpf(2), and these hook them in:
//!
//! | hook | call | lives until |
//! |---|---|---|
//! | tc, TCX (Linux 6.6) | [`tcx::attach`] | detached, or the device goes: it survives us |
//! | tc by clsact (Linux 4.5) | [`clsact::attach`] | the same |
//! | socket filter | [`UplinkFilter::attach`] | the socket is closed |
//! | fanout group | [`fanout::form`](super::fanout::form) | its last socket is closed |
//! | XDP | [`PinnedXdp`]; in benches and tests [`attach_xdp`] | the link is closed and has no pin |
//!
//! [`attach_tc`] takes clsact, which attaches faster; [`move_to_tcx`] moves the program
//! to TCX, which runs faster, when there is time.
//!
//! A tc program at ingress acts after AF_PACKET has seen the frame
//! (`__netif_receive_skb_core` in net/core/dev.c): so a program that drops
//! everything seals a tap and starves nobody. An XDP program acts before.
//!
//! Capabilities: CAP_BPF and CAP_NET_ADMIN (CAP_SYS_ADMIN before Linux 5.8).

mod assembler;
mod filter;
mod map;
pub mod path;
mod path_maps;
mod programs;
mod steering;
mod syscall;
mod tc;
mod xdp;

pub mod clsact;
pub mod tcx;

pub use assembler::{
    Alu, AssemblyError, Condition, Helper, Instruction, Label, Operand, Program, R0, R1, R2, R3,
    R4, R5, R6, R7, R8, R9, R10, Register, Width,
};
pub use clsact::remove_empty_qdisc;
pub use filter::{UplinkFilter, attach_filter, detach_filter};
pub use map::{ArrayMap, PerCpuArrayMap};
pub use path_maps::{ProgramArray, Records, SharedPair, is_bpf_file_system};
pub use programs::{
    COUNTER_BYTES, COUNTER_FRAMES, PopRule, TaggedVlan, seal_program, tc_count_drop_program,
    vlan_pop_program, vlan_pop_redirect, vlan_push_program, vlan_push_redirect,
    xdp_count_drop_program, xdp_drop_program,
};
pub use steering::Steering;
pub use syscall::{BpfError, CALLS, PATH_CALLS, ProgramKind, load};
pub use tc::{
    Attached, Direction, Method, attach_beside_qdiscs, attach_tc, detach_tc,
    detach_tc_leaving_qdisc, is_attached_tc, move_to_tcx, move_to_tcx_leaving_qdisc,
};
pub use xdp::{PinnedXdp, XdpMode, attach_xdp};

/// Offsets in `struct __sk_buff` (include/uapi/linux/bpf.h): the context of socket
/// filters and tc programs. Each field is a 4-byte word.
pub mod skb {
    /// Frame length in bytes.
    pub const LEN: i16 = 0;
    /// PACKET_HOST, PACKET_BROADCAST, ... (include/uapi/linux/if_packet.h).
    pub const PKT_TYPE: i16 = 4;
    /// 1 when the outermost tag is in `VLAN_TCI` and `VLAN_PROTO`, not in the bytes.
    pub const VLAN_PRESENT: i16 = 20;
    /// PCP, DEI and VID of that tag, in the machine's order.
    pub const VLAN_TCI: i16 = 24;
    /// TPID of that tag, in network order in the low 16 bits.
    pub const VLAN_PROTO: i16 = 28;
    /// EtherType behind that tag, in network order in the low 16 bits.
    pub const PROTOCOL: i16 = 16;
    /// Payload of each segment of a super-frame in bytes, 0 for other frames (Linux 5.7).
    pub const GSO_SIZE: i16 = 176;
}
