//! Where the kernel path's pins are: in a BPF file system that outlives this process.

use crate::sys::bpf::is_bpf_file_system;
use nix::mount::{MsFlags, mount};
use nix::unistd::getppid;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use tracing::warn;

/// Where BPF file systems are mounted (Documentation/bpf/).
const BPF_FOLDER: &str = "/sys/fs/bpf";
/// Ours in it.
const OUR_FOLDER: &str = "vlanswitchd";
/// The same, for a service that sees nothing else of a BPF file system: the packages' unit
/// binds it there, because the one at the usual place is root's alone under systemd.
const BOUND_FOLDER: &str = "/run/vlanswitchd/bpf";

/// Where the pins of an uplink are: by its name, and by the network namespace if that is not
/// the first process's.
pub fn pin_folder(uplink: &str) -> PathBuf {
    let namespace = |process: &str| {
        fs::metadata(format!("/proc/{process}/ns/net")).map(|facts| facts.ino()).ok()
    };
    let name = uplink.replace('%', "%25").replace('.', "%2e");
    let (ours, first) = (namespace("self"), namespace("1"));
    let numbered = ours.map(|ours| format!("{name}-{ours}"));
    let name = match numbered {
        // Where it cannot be told, as if it were another: names must not be taken twice. A
        // user of its own cannot tell, and root has to find what it has left.
        Some(numbered) if first != ours || our_folder().join(&numbered).exists() => numbered,
        _ => name,
    };
    our_folder().join(name)
}

fn our_folder() -> PathBuf {
    let bound = Path::new(BOUND_FOLDER);
    if is_bpf_file_system(bound) {
        bound.to_owned()
    } else {
        Path::new(BPF_FOLDER).join(OUR_FOLDER)
    }
}

/// Whether this process has the mounts of who started it: what it mounts outlives it. `ip netns
/// exec` makes mounts of their own, which end with what it starts.
fn shares_mounts() -> bool {
    let mounts = |process: &str| fs::metadata(format!("/proc/{process}/ns/mnt"));
    match (mounts("self"), mounts(&getppid().to_string())) {
        (Ok(ours), Ok(parents)) => ours.ino() == parents.ino(),
        _ => false,
    }
}

/// The folder of the pins, in a BPF file system, which is mounted if need be.
pub fn usable_pin_folder(uplink: &str) -> Option<PathBuf> {
    let root = Path::new(BPF_FOLDER);
    if is_bpf_file_system(&our_folder()) {
        return Some(pin_folder(uplink));
    }
    if !is_bpf_file_system(root) && !shares_mounts() {
        warn!(
            "{BPF_FOLDER} is no BPF file system, and one mounted here would not last: the kernel \
             path ends with this process, and a restart loses frames; `mount -t bpf bpf \
             {BPF_FOLDER}` before makes it last"
        );
        return None;
    }
    if !is_bpf_file_system(root)
        && let Err(errno) =
            mount(Some("bpf"), root, Some("bpf"), MsFlags::empty(), Some("mode=0700"))
    {
        warn!(
            "{BPF_FOLDER} is no BPF file system and cannot be made one ({errno}): the kernel path \
             ends with this process; `mount -t bpf bpf {BPF_FOLDER}` makes it last"
        );
        return None;
    }
    Some(pin_folder(uplink))
}
