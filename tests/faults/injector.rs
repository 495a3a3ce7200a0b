//! Errors put in at the system call, for one thread.
//!
//! A seccomp filter on the thread hands its calls of one number to a supervisor
//! (`SECCOMP_RET_USER_NOTIF`, seccomp(2)), which lets each go on or answers it: with an
//! error, or, for `sendmmsg`, with a part of the packets, which it sends itself, as both
//! share memory and descriptors. The code under test makes the very call it always makes.

#![allow(unsafe_code, reason = "seccomp listeners have no wrapper")]

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;

/// What becomes of a call.
#[derive(Debug, Clone, Copy)]
pub enum Fate {
    /// The kernel has it.
    Pass,
    /// It fails.
    Fail(Errno),
    /// A `sendmmsg` sends so many of its packets, and says so.
    Part(u32),
}

const fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

/// Hands this thread's calls of `number` to whoever has the listener that is returned.
/// There is no way back for the thread.
fn listen(number: libc::c_long) -> OwnedFd {
    let mut filter = [
        // seccomp_data.nr is its first word.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: 0,
            jf: 1,
            k: number as u32,
        },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_USER_NOTIF),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: the program and what it points at live until the call returns, and what it
    // returns is a descriptor nobody else has.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER;
        let mode = libc::SECCOMP_SET_MODE_FILTER;
        let fd = libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program);
        assert!(fd >= 0, "a seccomp listener: {}", Errno::last());
        OwnedFd::from_raw_fd(fd as i32)
    }
}

/// Answers one call, if there is one within a moment.
fn answer(listener: &OwnedFd, fate: &(dyn Fn(&[u64; 6]) -> Fate + Sync)) -> bool {
    let mut polled = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    if poll(&mut polled, PollTimeout::from(20u8)) != Ok(1) {
        return false;
    }
    // SAFETY: all-zero is a valid value of these plain structures, the kernel asks for a
    // zeroed one, and both live until their call returns.
    unsafe {
        let mut call: libc::seccomp_notif = std::mem::zeroed();
        let receive = libc::SECCOMP_IOCTL_NOTIF_RECV;
        if libc::ioctl(listener.as_raw_fd(), receive as _, &raw mut call) != 0 {
            return false;
        }
        let mut response: libc::seccomp_notif_resp = std::mem::zeroed();
        response.id = call.id;
        let arguments = call.data.args;
        match fate(&arguments) {
            Fate::Pass => response.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
            Fate::Fail(errno) => response.error = -(errno as i32),
            Fate::Part(count) => {
                let [socket, messages, offered, flags, ..] = arguments;
                // The caller waits in its call, so its arrays are there and stay.
                let sent = libc::sendmmsg(
                    socket as i32,
                    messages as *mut libc::mmsghdr,
                    count.min(offered as u32),
                    flags as i32,
                );
                if sent < 0 {
                    response.error = -(Errno::last_raw());
                } else {
                    response.val = sent.into();
                }
            }
        }
        let send = libc::SECCOMP_IOCTL_NOTIF_SEND;
        let sent = libc::ioctl(listener.as_raw_fd(), send as _, &raw mut response);
        assert_eq!(sent, 0, "answering a call: {}", Errno::last());
    }
    true
}

/// Runs `body` on a thread of its own in this thread's network namespace, whose calls of
/// `number`, from the moment it calls the function it is given, meet `fate`, which sees
/// their arguments. Returns what the body does, and how many calls there were.
pub fn inject<T: Send>(
    number: libc::c_long,
    fate: impl Fn(&[u64; 6]) -> Fate + Send + Sync,
    body: impl FnOnce(&dyn Fn()) -> T + Send,
) -> (T, u64) {
    let (over, calls) = (AtomicBool::new(false), AtomicU64::new(0));
    let (sender, receiver) = mpsc::channel::<OwnedFd>();
    let (ready, begun) = mpsc::channel::<()>();
    let value = std::thread::scope(|scope| {
        let supervise = {
            let (over, calls, fate) = (&over, &calls, &fate);
            move || {
                let Ok(listener) = receiver.recv() else { return };
                ready.send(()).expect("the body waits");
                while !over.load(Ordering::Relaxed) {
                    calls.fetch_add(u64::from(answer(&listener, fate)), Ordering::Relaxed);
                }
            }
        };
        scope.spawn(supervise);
        /// Also when the body panics: a scope waits for its threads.
        struct Over<'o>(&'o AtomicBool);
        impl Drop for Over<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let body = {
            let over = &over;
            let (sender, begun) = (sender, begun);
            move || {
                let _over = Over(over);
                body(&|| {
                    sender.send(listen(number)).expect("the supervisor waits");
                    begun.recv().expect("the supervisor is there");
                })
            }
        };
        scope.spawn(body).join()
    });
    match value {
        Ok(value) => (value, calls.into_inner()),
        Err(panic) => std::panic::resume_unwind(panic),
    }
}
