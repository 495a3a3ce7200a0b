//! Guests: what stands at the fd side of a VM's tap.

use super::frames::Frame;
use super::packet::{collect_until, wait_readable};
use super::raw::{open_tap, read_tap, set_offload};
use super::{Namespace, eventually};
use nix::ifaddrs::{InterfaceAddress, getifaddrs};
use nix::net::if_::{InterfaceFlags, if_nametoindex};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tun_tap::{Iface, Mode};
use vlanswitchd::control::links::LinkSocket;

/// A guest without offloads (e1000): frames by read and write.
pub struct RawGuest {
    tap: Iface,
}

struct TapFd<'t>(&'t Iface);

impl AsFd for TapFd<'_> {
    #[allow(unsafe_code, reason = "tun-tap 0.1 knows only raw descriptors")]
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the descriptor stays open as long as the Iface, which `self` borrows.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

impl RawGuest {
    /// Opens the tap as a VMM does (carrier comes on); makes it if it does not
    /// exist, and then it goes when the guest does.
    pub fn open(host: &Namespace, tap: &str) -> Self {
        let opened = host.enter(|| Iface::without_packet_info(tap, Mode::Tap));
        Self { tap: opened.unwrap_or_else(|error| panic!("opening {tap}: {error}")) }
    }

    /// The guest sends a frame.
    pub fn send(&self, frame: &Frame) {
        self.send_bytes(&frame.bytes());
    }

    /// The guest sends any bytes.
    pub fn send_bytes(&self, bytes: &[u8]) {
        self.tap.send(bytes).unwrap_or_else(|error| panic!("{} bytes: {error}", bytes.len()));
    }

    /// The guest sends bytes that the kernel may refuse (shorter than a header,
    /// or the device is down).
    pub fn try_send(&self, bytes: &[u8]) -> std::io::Result<usize> {
        self.tap.send(bytes)
    }

    /// The guest's driver takes these offloads, or none.
    pub fn set_offload(&self, offload: u32) {
        set_offload(TapFd(&self.tap), offload).expect("TUNSETOFFLOAD");
    }

    /// The next frame for the guest, or `None` after `patience` without one.
    pub fn receive_within(&self, patience: Duration) -> Option<Vec<u8>> {
        let tap = TapFd(&self.tap);
        let mut polled = [PollFd::new(tap.as_fd(), PollFlags::POLLIN)];
        let deadline = Instant::now() + patience;
        // The descriptor blocks, so it is read only when there is something.
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.as_millis()).expect("a short patience");
            match poll(&mut polled, timeout) {
                Ok(0) => return None,
                Ok(_) => break,
                Err(_) => continue,
            }
        }
        let mut bytes = vec![0; 70_000];
        let length = self.tap.recv(&mut bytes).expect("reading a tap");
        bytes.truncate(length);
        Some(bytes)
    }

    /// Frames up to the one with number `last`.
    pub fn receive_until(&self, last: u64) -> Vec<Frame> {
        collect_until(last, |patience| self.receive_within(patience))
    }

    /// Throws away what waits, and says how much that was.
    pub fn clear(&self) -> usize {
        let mut cleared = 0;
        while self.receive_within(Duration::ZERO).is_some() {
            cleared += 1;
        }
        cleared
    }
}

/// A guest with a kernel of its own: `eth0` in `inside`, with a real TCP stack.
pub struct KernelGuest {
    /// The guest.
    pub inside: Namespace,
    pump: Pump,
}

impl KernelGuest {
    /// Opens `tap` of `host` and connects it to a guest whose NIC has these
    /// offloads ([`super::raw::OFFLOAD_TCP`], or 0 for none).
    pub fn open(host: &Namespace, tap: &str, offload: u32) -> Self {
        let inside = Namespace::new("guest");
        inside.enable_ipv6();
        let vm = host.enter(|| open_tap(tap, 0, offload));
        let vm = vm.unwrap_or_else(|error| panic!("opening {tap}: {error}"));
        let nic = inside.enter(|| open_tap("eth0", 0, offload)).expect("the guest's eth0");
        inside.set_up(&["eth0"]);
        Self { inside, pump: Pump::between(vm, nic) }
    }

    /// Gives `eth0` these addresses (`10.0.0.1/24`).
    pub fn address(self, addresses: &[&str]) -> Self {
        for address in addresses {
            self.inside.ip(&format!("address add {address} dev eth0 nodad"));
        }
        self
    }
}

/// Moves frames between two taps, one thread a direction, as QEMU does between a
/// tap and a virtio queue: the virtio header goes along.
struct Pump {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Pump {
    fn between(vm: File, nic: File) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (vm, nic) = (Arc::new(vm), Arc::new(nic));
        let start = |from: &Arc<File>, to: &Arc<File>| {
            let (from, to, stop) = (Arc::clone(from), Arc::clone(to), Arc::clone(&stop));
            std::thread::spawn(move || move_frames(&from, &to, &stop))
        };
        let threads = vec![start(&vm, &nic), start(&nic, &vm)];
        Self { stop, threads }
    }
}

fn move_frames(from: &File, mut to: &File, stop: &AtomicBool) {
    while !stop.load(Ordering::Relaxed) {
        loop {
            match read_tap(from) {
                // A guest's NIC may be down or full: the frame is lost there, as in a VM.
                Ok(Some(frame)) => drop(to.write(&frame)),
                Ok(None) => break,
                // The device was deleted under us, as under a VMM.
                Err(_) => return,
            }
        }
        wait_readable(from, Instant::now() + Duration::from_millis(50));
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Waits until `device` has carrier, and the kernel's own view of it has settled.
pub fn carrier(namespace: &Namespace, device: &str) {
    namespace.enter(|| {
        let mut links = LinkSocket::new().unwrap();
        eventually(&format!("{device} has carrier"), || {
            let is_running = |one: &InterfaceAddress| {
                one.interface_name == device && one.flags.contains(InterfaceFlags::IFF_RUNNING)
            };
            getifaddrs().unwrap().find(is_running)?;
            // Asked for it alone, the kernel first finishes what it was about to do
            // (linkwatch_sync_dev): until then the device drops what it is given.
            links.link(if_nametoindex(device).ok()?).ok()?.carrier.then_some(())
        });
    });
}
