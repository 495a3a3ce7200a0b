//! Waiting until no frame is half received any more.
//!
//! The kernel receives a frame within one RCU read-side section: packet sockets and their
//! filters, then tc ingress (`netif_receive_skb_internal`, net/core/dev.c). membarrier(2)
//! waits for a grace period (`synchronize_rcu`, kernel/sched/membarrier.c), so when it
//! returns, every frame that met a filter before has met the programs behind it too. However
//! long a virtual CPU stood still meanwhile.

#![allow(unsafe_code, reason = "membarrier(2) has no wrapper in libc or nix")]

use crate::sys::sandbox::Call;
use std::time::Duration;

/// MEMBARRIER_CMD_GLOBAL, include/uapi/linux/membarrier.h.
const GLOBAL: libc::c_int = 1;
/// How long to wait where the kernel has no such barrier: built without it, or run with
/// `nohz_full`.
const WAIT: Duration = Duration::from_millis(20);

/// What waiting takes.
pub const CALLS: &[Call] = &[Call::any(libc::SYS_membarrier)];

/// Returns when all frames whose reception had begun are received: milliseconds.
pub fn wait_for_receptions() {
    // SAFETY: it takes three numbers and touches no memory of ours.
    let waited = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if waited != 0 {
        std::thread::sleep(WAIT);
    }
}
