//! Giving memory back that was freed.

#![allow(unsafe_code, reason = "malloc_trim(3) has no wrapper")]

/// Gives the pages of freed memory back to the kernel, as far as the C library can: GNU's
/// keeps them where something younger lies above. To be called when much was freed.
pub fn give_back_freed() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number, and touches no memory that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
}
