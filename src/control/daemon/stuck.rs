//! Rings that the kernel has stopped filling, opened again.
//!
//! A super-frame of a type that a virtio header cannot describe (UFO, which old guests
//! send, and whatever a hostile one writes there) makes the kernel drop it after it has
//! taken a slot for it, and keep that slot: from then on it finds the ring full, and
//! drops every frame (`tpacket_rcv` in `net/packet/af_packet.c`: `rx_owner_map` is set
//! before `virtio_net_hdr_from_skb` fails; seen on 6.18). No filter can tell such frames
//! from others before, so the ring is opened again when an interval has passed in which
//! the kernel dropped all it was offered. Of the uplink each worker has a ring: if one of
//! them is stuck, all are opened again, as they are in one group by the order in which they
//! were opened.
//!
//! The same is seen of a ring whose worker has no CPU: those of a worker that owes an
//! answer are left alone. And nothing is opened before the worker has given the old device
//! back. A device that cannot be opened again is given up, and attached like one that comes.
//!
//! Opening one again interrupts the port, and keeps control for some milliseconds. So there
//! is one a tick at most, and a port that needs it again and again waits longer each time.

use super::Daemon;
use super::devices::{Opened, open};
use crate::control::api::EventKind;
use crate::control::start_error::StartError;
use crate::switch::PortIndex;
use crate::sys::packet::KernelCount;
use std::time::{Duration, Instant};
use tracing::warn;

/// Before a ring is opened again a second time, at least; doubled each time.
const WAIT_MIN: Duration = Duration::from_secs(2);
/// The longest wait.
const WAIT_MAX: Duration = Duration::from_secs(64);

/// What the kernel has done with the frames for one ring.
#[derive(Debug, Clone, Default)]
struct Fate {
    kept: u64,
    lost: u64,
}

/// What is to be known of the rings of a device: one, or of the uplink one a worker.
#[derive(Debug, Clone, Default)]
pub struct RingWatch {
    fates: Vec<Fate>,
    /// When they were last opened again, and how long to wait before the next time.
    opened: Option<(Instant, Duration)>,
}

impl RingWatch {
    /// Takes note of what the kernel has counted for the ring of this number.
    pub fn note(&mut self, ring: usize, count: KernelCount) {
        if self.fates.len() <= ring {
            self.fates.resize_with(ring + 1, Fate::default);
        }
        if let Some(fate) = self.fates.get_mut(ring) {
            fate.kept += count.frames.saturating_sub(count.overruns);
            fate.lost += count.overruns;
        }
    }

    /// Forgets what it has seen since the last look: a ring that nobody reads fills up as a
    /// stuck one does.
    fn forget(&mut self) {
        self.fates.clear();
    }

    /// Whether to open the rings again now; to be asked once a tick.
    fn is_stuck(&mut self, now: Instant) -> bool {
        for fate in &mut self.fates {
            if std::mem::take(&mut fate.kept) > 0 {
                fate.lost = 0;
            }
        }
        if self.fates.iter().all(|fate| fate.lost == 0) {
            return false;
        }
        let wait = match self.opened {
            Some((at, wait)) if now < at + wait => return false,
            // It went well for long: as if it were the first time.
            Some((at, wait)) if now > at + 2 * WAIT_MAX.max(wait) => WAIT_MIN,
            Some((_, wait)) => (wait * 2).min(WAIT_MAX),
            None => WAIT_MIN,
        };
        self.fates.clear();
        self.opened = Some((now, wait));
        true
    }
}

impl Daemon {
    /// Opens a ring again that takes no frames any more, if there is one.
    pub(super) fn free_stuck_ring(&mut self, now: Instant) {
        let silent: Vec<bool> = self.workers.iter().map(|seat| seat.is_silent(now)).collect();
        let ring = &mut self.uplink.watched.ring;
        if silent.contains(&true) {
            ring.forget();
        } else if ring.is_stuck(now) {
            let name = format!("uplink {}", self.name);
            let result = self.reopen_uplink();
            return self.tell_reopened(&name, result);
        }
        let stuck = self.ports.iter_mut().find_map(|(position, port)| {
            if silent.get(port.worker) == Some(&true) {
                port.watched.ring.forget();
                return None;
            }
            let stuck = port.index().is_some() && port.watched.ring.is_stuck(now);
            stuck.then(|| (position, port.config.device.clone()))
        });
        if let Some((position, name)) = stuck {
            let result = self.reopen_port(position);
            self.tell_reopened(&name, result);
        }
    }

    fn tell_reopened(&mut self, name: &str, result: Result<(), StartError>) {
        match result {
            Ok(()) => {
                let text = format!(
                    "{name}: the kernel had stopped filling its ring, which was opened again; a \
                     UFO super-frame does that (libvirt: <host ufo='off'/> in the interface's \
                     <driver>)"
                );
                self.tell(EventKind::Overload, Some(name), text);
            }
            Err(error) => {
                warn!("{name}: its ring is stuck and cannot be opened again now: {error}");
            }
        }
    }

    fn reopen_port(&mut self, position: PortIndex) -> Result<(), StartError> {
        let index = self.ports.get(position).and_then(super::ports::Port::index);
        let link = index.and_then(|index| self.monitor.links().by_index(index)).cloned();
        let Some(link) = link else { return Ok(()) };
        // Closed first: of two rings at once each would bring every frame.
        self.take_back(Some(position));
        let opened = self.given_back(Some(position)).and_then(|()| {
            let device = open(&link, self.port_ring())?;
            Opened::adopted(position, Some(link), device)
        });
        match opened {
            Ok(opened) => {
                self.attach_ports(vec![opened]);
                Ok(())
            }
            Err(error) => {
                self.give_up_port(position);
                Err(error)
            }
        }
    }

    /// Opens the uplink's rings again.
    ///
    /// # Errors
    /// [`StartError`]: the uplink is without them.
    pub(super) fn reopen_uplink(&mut self) -> Result<(), StartError> {
        let index = self.uplink.attached.as_ref().map(|(index, ..)| *index);
        let link = index.and_then(|index| self.monitor.links().by_index(index)).cloned();
        let Some(link) = link else { return Ok(()) };
        self.take_back(None);
        match self.given_back(None).and_then(|()| self.open_uplink(&link)) {
            Ok((fresh, devices)) => {
                if let Some((_, counters, _)) = &mut self.uplink.attached {
                    *counters = fresh;
                }
                self.attach_devices(Vec::new(), devices);
                Ok(())
            }
            Err(error) => {
                self.give_up_uplink();
                Err(error)
            }
        }
    }

    /// Whether the workers have given a device back that was asked for.
    fn given_back(&self, port: Option<PortIndex>) -> Result<(), StartError> {
        let late = self.late.iter().find(|(_, late)| *late == port);
        late.map_or(Ok(()), |(worker, _)| Err(StartError::Silent(*worker)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(frames: u64, overruns: u64) -> KernelCount {
        KernelCount { frames, overruns }
    }

    #[test]
    fn stuck_is_who_loses_everything() {
        let now = Instant::now();
        let mut ring = RingWatch::default();
        assert!(!ring.is_stuck(now), "nothing was sent");
        ring.note(0, count(100, 99));
        assert!(!ring.is_stuck(now), "overrun, and read");
        ring.note(0, count(5, 5));
        ring.note(0, count(1, 0));
        assert!(!ring.is_stuck(now));
        ring.note(0, count(1, 1));
        assert!(ring.is_stuck(now), "one frame, lost");
        assert!(!ring.is_stuck(now), "told once");
        ring.note(0, count(1, 1));
        ring.forget();
        assert!(!ring.is_stuck(now + WAIT_MAX), "its worker does not read");
    }

    #[test]
    fn one_worker_s_ring_is_stuck_whatever_goes_through_the_others() {
        let now = Instant::now();
        let mut rings = RingWatch::default();
        for (ring, count) in [count(9, 0), count(9, 3), count(0, 0)].into_iter().enumerate() {
            rings.note(ring, count);
        }
        assert!(!rings.is_stuck(now));
        rings.note(0, count(1000, 0));
        rings.note(2, count(2, 2));
        assert!(rings.is_stuck(now));
        assert!(!rings.is_stuck(now), "told once");
    }

    #[test]
    fn who_is_stuck_again_and_again_waits_longer() {
        let start = Instant::now();
        let mut ring = RingWatch::default();
        let mut stuck_at = |seconds: std::ops::Range<u64>| -> Vec<u64> {
            let mut stuck = |second: &u64| {
                ring.note(0, count(3, 3));
                ring.is_stuck(start + Duration::from_secs(*second))
            };
            seconds.filter(|second| stuck(second)).collect()
        };
        assert_eq!(stuck_at(0..300), [0, 2, 6, 14, 30, 62, 126, 190, 254]);
        // Quiet for a long time.
        assert_eq!(stuck_at(500..507), [500, 502, 506]);
    }
}
