//! The kernel's interfaces, one a file: the only home of `unsafe`.
//!
//! What lives here: thin, checked doors to system calls the crates we use have no
//! door for. Each kernel structure carries a size assert, each setting is read back
//! where the kernel lets us. What may not: anything that knows what a port, a mode
//! or a VLAN map is (that is `port` and `switch`).

pub mod bpf;
pub mod ethtool;
pub mod fanout;
pub mod hand_over;
pub mod memory;
pub mod netns;
pub mod packet;
pub mod peer;
pub mod reception;
pub mod sandbox;
pub mod tap;
