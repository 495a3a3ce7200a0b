//! How many workers there are, and on which CPUs: decided once, at the start.
//!
//! A worker is worth a CPU when there are CPUs to spare: guests and their VMMs need them
//! too. So without `--workers` there is one for every four CPUs, eight at most, and never
//! more than ports; with `--cpus` one for each CPU named.
//!
//! On a host of several NUMA nodes the NIC is on one of them, and frames cross to another
//! at a price. Rings lie on the node of the thread that makes them. So control, whose
//! threads open all sockets, keeps to the CPUs the kernel says are local to the uplink
//! (`/sys/class/net/IF/device/local_cpulist`), and workers that are not bound with it. An
//! uplink without a device there (a bond, a veth) has no node, and nothing is done.

use crate::control::config::settings::parse_cpus;
use crate::control::config::{Config, WorkerCount};
use crate::control::start_error::StartError;
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use std::path::Path;
use tracing::{info, warn};

/// The most workers `auto` takes.
const AUTO_MAX: usize = 8;
/// CPUs for each worker of `auto`.
const AUTO_CPUS: usize = 4;

/// The workers there are to be.
#[derive(Debug)]
pub struct Plan {
    /// For each the CPU it is to be bound to, if to one.
    pub workers: Vec<Option<usize>>,
    /// The CPUs near the uplink, if control is to keep to them.
    near: Option<Vec<usize>>,
}

/// Decides on the workers.
///
/// # Errors
/// [`StartError::Cpu`] if we may not use a CPU that is named.
pub fn plan(config: &Config) -> Result<Plan, StartError> {
    let allowed = allowed()?;
    if let Some(cpu) = config.cpus.iter().find(|cpu| !allowed.contains(cpu)) {
        return Err(StartError::Cpu { cpu: *cpu, allowed: list(&allowed) });
    }
    let device = Path::new("/sys/class/net").join(&config.uplink).join("device");
    let near = near(&allowed, |name| std::fs::read_to_string(device.join(name)).ok());
    let cpus = near.as_ref().unwrap_or(&allowed).len();
    let workers = count(config.workers, cpus, config.cpus.len(), config.ports.len());
    Ok(Plan { workers: cpus_of(config, workers), near })
}

/// The CPUs of so many workers.
pub fn cpus_of(config: &Config, workers: usize) -> Vec<Option<usize>> {
    (0..workers).map(|worker| cpu_of(&config.cpus, worker)).collect()
}

impl Plan {
    /// Brings the calling thread, and with it all it starts from now on, to the node of
    /// the uplink.
    pub fn come_near(&self) {
        let Some(near) = &self.near else { return };
        match bind(near) {
            Ok(()) => info!("keeping to the CPUs near the uplink: {}", list(near)),
            Err(errno) => warn!("cannot keep to CPUs {}: {errno}", list(near)),
        }
    }
}

/// Binds the calling thread to these CPUs.
///
/// # Errors
/// The kernel's.
pub fn bind(cpus: &[usize]) -> Result<(), Errno> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu)?;
    }
    sched_setaffinity(Pid::from_raw(0), &set)
}

/// The CPUs this process may run on, all of them online.
fn allowed() -> Result<Vec<usize>, StartError> {
    let set = sched_getaffinity(Pid::from_raw(0)).map_err(std::io::Error::from)?;
    Ok((0..CpuSet::count()).filter(|cpu| set.is_set(*cpu).unwrap_or(false)).collect())
}

/// Of the CPUs allowed those near a device, if some and not all are. `read` gives the
/// files of the device's folder.
fn near(allowed: &[usize], read: impl Fn(&str) -> Option<String>) -> Option<Vec<usize>> {
    let node: i32 = read("numa_node")?.trim().parse().ok()?;
    if node < 0 {
        return None;
    }
    let local = parse_cpus(read("local_cpulist")?.trim()).ok()?;
    let near: Vec<usize> = allowed.iter().copied().filter(|cpu| local.contains(cpu)).collect();
    (!near.is_empty() && near.len() < allowed.len()).then_some(near)
}

/// How many workers to start, with so many CPUs, of which so many are named, and ports.
fn count(asked: WorkerCount, cpus: usize, named: usize, ports: usize) -> usize {
    match asked {
        WorkerCount::Number(workers) => workers,
        WorkerCount::Auto if named > 0 => named.min(crate::control::config::WORKERS_MAX),
        WorkerCount::Auto => (cpus / AUTO_CPUS).min(AUTO_MAX).min(ports).max(1),
    }
}

/// The CPU of a worker: they take turns.
fn cpu_of(named: &[usize], worker: usize) -> Option<usize> {
    named.get(worker.checked_rem(named.len())?).copied()
}

/// A list as people write it: `0-3,8`.
fn list(cpus: &[usize]) -> String {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for cpu in cpus.iter().copied() {
        match ranges.last_mut() {
            Some((_, last)) if *last + 1 == cpu => *last = cpu,
            _ => ranges.push((cpu, cpu)),
        }
    }
    let texts = ranges.into_iter().map(|(first, last)| match last - first {
        0 => first.to_string(),
        _ => format!("{first}-{last}"),
    });
    texts.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
    use super::*;

    #[test]
    fn auto_leaves_cpus_to_the_guests() {
        for (cpus, named, ports, workers) in [
            (1, 0, 10, 1),
            (3, 0, 10, 1),
            (4, 0, 10, 1),
            (8, 0, 10, 2),
            (16, 0, 2, 2),
            (16, 0, 0, 1),
            (128, 0, 100, 8),
            (128, 3, 100, 3),
        ] {
            assert_eq!(count(WorkerCount::Auto, cpus, named, ports), workers, "{cpus} {ports}");
        }
        assert_eq!(count(WorkerCount::Number(5), 2, 0, 1), 5);
    }

    #[test]
    fn workers_take_turns_on_the_cpus() {
        let cpus: Vec<_> = (0..5).map(|worker| cpu_of(&[4, 9], worker)).collect();
        assert_eq!(cpus, [Some(4), Some(9), Some(4), Some(9), Some(4)]);
        assert_eq!(cpu_of(&[], 0), None);
    }

    #[test]
    fn the_node_of_the_nic_is_kept_to_where_it_has_one() {
        let folder = |node: &'static str, cpus: &'static str| {
            move |name: &str| match name {
                "numa_node" => Some(node.to_owned()),
                "local_cpulist" => Some(cpus.to_owned()),
                _ => None,
            }
        };
        let allowed = [0, 1, 2, 3];
        assert_eq!(near(&allowed, folder("1\n", "2-3,6-7\n")), Some(vec![2, 3]));
        // No node, all CPUs of it, none of them allowed.
        assert_eq!(near(&allowed, folder("-1\n", "0-3\n")), None);
        assert_eq!(near(&allowed, folder("0\n", "0-3\n")), None);
        assert_eq!(near(&allowed, folder("1\n", "4-7\n")), None);
        assert_eq!(near(&allowed, folder("what", "4-7\n")), None);
        assert_eq!(near(&allowed, |_| None), None);
    }

    #[test]
    fn lists_read_as_written() {
        assert_eq!(list(&[0, 1, 2, 5, 7, 8]), "0-2,5,7-8");
        assert_eq!(parse_cpus(&list(&[0, 1, 2, 5, 7, 8])).unwrap(), [0, 1, 2, 5, 7, 8]);
    }

    #[test]
    fn a_thread_can_be_bound_to_one_cpu_of_this_machine() {
        let thread = std::thread::spawn(|| {
            let last = *allowed().unwrap().last().unwrap();
            bind(&[last]).unwrap();
            assert_eq!(allowed().unwrap(), [last]);
        });
        thread.join().unwrap();
    }
}
