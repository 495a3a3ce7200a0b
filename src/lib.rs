//! A VLAN switch in userspace for KVM hosts: one uplink, one tap (or other Ethernet
//! device) per VM, and every frame of a VLAN carried between them.
//!
//! # The life of a frame
//!
//! From the wire to a guest:
//!
//! ```text
//! NIC ─ kernel takes the outer 0x8100/0x88a8 tag out of the bytes
//!     ─ several workers: whose is (TPID, VID)?  one socket gets it    sys::fanout
//!     ─ socket filter: is (TPID, VID) claimed?  no: counted by VID, left to the host
//!     ─ ring slot: [status, tag, lengths][virtio header][frame]       sys::packet
//! worker, a burst of up to 64 frames:                             dataplane::worker
//!     ─ TagStack::read    the tags, the stripped one first               frame::tag
//!     ─ Table::decide_from_uplink    port and TagEdit, by look-up    switch::decide
//!     ─ check_offload     the header to send it with                    frame::vnet
//!     ─ FrameBuffer::apply    MAC addresses moved, payload not          frame::edit
//!     ─ Chains            the burst by port                        dataplane::chains
//!     ─ Lane              whole, or cut into segments               dataplane::burst
//! sendmmsg to the tap's netdev ─ its queue ─ QEMU or vhost reads the fd ─ guest
//! slots go back to the kernel
//! ```
//!
//! From a guest to the wire it is the same with a ring per tap, without a filter,
//! and with [`decide_from_guest`](switch::Table::decide_from_guest); behind the
//! ring a program at tc ingress drops the frame, so that the host never hears it.
//!
//! A frame that does not get through is counted under one [`switch::DropReason`],
//! in the flow (port and direction) it belongs to.
//!
//! # The modules
//!
//! | module | what lives there | uses |
//! |---|---|---|
//! | [`frame`] | bytes and their meaning: tags, the tag edit, virtio header, checksums, segmentation (pure) | |
//! | [`switch`] | memberships compiled into tables, verdicts, drop reasons (pure) | `frame` |
//! | [`sys`] | the kernel's interfaces, one a file: rings, taps, BPF; all `unsafe` | `frame` |
//! | [`port`] | what a worker moves frames between | `sys`, `switch`, `frame` |
//! | [`dataplane`] | the worker's loop, bursts, pacing, counters | `port` and below |
//! | [`control`] | configuration, following the devices, the daemon, control socket, captures, metrics, doctor | all |
//!
//! Arrows never go back; `tests/layering.rs` reads the sources and sees to it.
//! docs/architecture.md tells more of each.
//!
//! # The invariants
//!
//! 1. A frame arrives unchanged but for its tag, in order per port and direction,
//!    at most once, or is counted: in + split = out + drops, for each flow.
//! 2. Nothing in a frame can make the worker panic, allocate, lock, log or loop:
//!    slices are checked, loops are bounded, counters are the only trace.
//! 3. A device is sealed before it goes up, and stays so if we die.
//! 4. The ring's slots are ours from the kernel's status word until `release`, and
//!    no frame outlives its slot: the borrow checker holds it.
//! 5. One writer per datum: the worker writes counters, control writes link states;
//!    both read the other's without a lock.
//! 6. Everything is checked before anything is changed, and what was changed is put
//!    back.

pub mod control;
pub mod dataplane;
pub mod frame;
pub mod port;
pub mod switch;
pub mod sys;
