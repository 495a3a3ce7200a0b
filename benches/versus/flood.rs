//! Frames without a conversation: floods, the search for the lossless rate, overload, cost.
//!
//! The search follows RFC 2544 clause 26.1 with shorter trials and a loss of one in a thousand:
//! each trial sends a fixed number of frames at an even rate, waits until the queues are empty,
//! and counts what arrived. A trial that loses too much is repeated once, because on a virtual
//! machine ten milliseconds of a stolen processor look like an overflowing queue.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::datapath::Datapath;
use super::machine::{Processors, Sample, Usage};
use super::scene::{FAR_DEVICE, Scene};
use super::traffic::{Pace, Worker, guest_receiver, guest_sender, wire_sender};
use super::workload::{Bench, Direction, Outcome, window};

/// Share of frames that may be lost at the lossless rate.
const LOSS_LIMIT: f64 = 1e-3;
/// The search ends when its bounds are this close, as a share of the upper one.
const RESOLUTION: f64 = 0.02;
/// Frames a second of [`cost`]: little enough for every datapath on a small machine.
const TRICKLE: f64 = 50_000.0;
/// What a switch may hold whatever its ports are, in MiB.
const BESIDES_MIB: f64 = 32.0;

/// One kind of frame one way through a scene.
struct Path<'a> {
    scene: &'a Scene,
    direction: Direction,
    length: usize,
    processors: Processors,
    receiver: Option<Worker>,
}

/// What became of one trial.
struct Trial {
    /// Frames a second sent.
    offered: f64,
    /// Frames a second that arrived.
    delivered: f64,
    /// Share of the sent frames that never arrived.
    loss: f64,
}

impl<'a> Path<'a> {
    fn new(scene: &'a Scene, direction: Direction, length: usize, bench: &Bench) -> Result<Self> {
        let receiver = match direction {
            Direction::ToWire => None,
            Direction::ToGuest | Direction::FromNic => {
                Some(guest_receiver(&scene.datapath.guest, length)?)
            }
        };
        Ok(Self { scene, direction, length, processors: bench.processors, receiver })
    }

    fn send(&self, pace: Pace, limit: u64) -> Result<Worker> {
        match self.direction {
            Direction::ToWire => {
                guest_sender(&self.scene.datapath.guest, self.length, pace, limit, self.processors)
            }
            Direction::ToGuest | Direction::FromNic => {
                let is_tagged = self.direction == Direction::ToGuest;
                let (far, vlan) = (&self.scene.far, self.scene.vlan.filter(|_| is_tagged));
                wire_sender(far, FAR_DEVICE, self.length, vlan, pace, limit, self.processors)
            }
        }
    }

    fn arrived(&self) -> Result<u64> {
        match &self.receiver {
            None => self.scene.sunk(),
            Some(receiver) => Ok(receiver.count()),
        }
    }

    /// Waits until nothing arrives any more.
    fn drain(&self) -> Result<u64> {
        let end = Instant::now() + Duration::from_secs(2);
        let mut last = self.arrived()?;
        loop {
            std::thread::sleep(Duration::from_millis(30));
            let now = self.arrived()?;
            if now == last || Instant::now() > end {
                return Ok(now);
            }
            last = now;
        }
    }

    /// Sends for `time` at an even rate.
    fn trial(&self, rate: f64, time: Duration) -> Result<Trial> {
        let before = self.drain()?;
        let opened = Instant::now();
        let sent = self.send(Pace::Even(rate), (rate * time.as_secs_f64()) as u64)?.finish()?;
        let seconds = opened.elapsed().as_secs_f64();
        let arrived = self.drain()? - before;
        Ok(Trial {
            offered: sent as f64 / seconds,
            delivered: arrived as f64 / seconds,
            loss: sent.saturating_sub(arrived) as f64 / sent.max(1) as f64,
        })
    }

    /// Sends for `time` as fast as possible.
    fn flood(&self, time: Duration) -> Result<Trial> {
        let before = self.drain()?;
        let opened = Instant::now();
        let sender = self.send(Pace::Flood, u64::MAX)?;
        std::thread::sleep(time);
        let sent = sender.stop()?;
        let seconds = opened.elapsed().as_secs_f64();
        let arrived = self.drain()? - before;
        if arrived == 0 {
            bail!("no frame arrived");
        }
        Ok(Trial {
            offered: sent as f64 / seconds,
            delivered: arrived as f64 / seconds,
            loss: sent.saturating_sub(arrived) as f64 / sent.max(1) as f64,
        })
    }

    /// Frames a second lost by no more than [`LOSS_LIMIT`], and whether the generator, not the
    /// datapath, was the bound.
    fn lossless(&self, time: Duration) -> Result<(f64, bool)> {
        let flood = self.flood(time)?;
        if flood.loss <= LOSS_LIMIT {
            return Ok((flood.offered, true));
        }
        let (mut good, mut bad) = (0.0, flood.offered);
        let mut rate = flood.delivered.min(bad * 0.95);
        while bad - good > bad * RESOLUTION && bad > 1000.0 {
            let mut trial = self.trial(rate, time)?;
            if trial.loss > LOSS_LIMIT {
                trial = self.trial(rate, time)?;
            }
            if trial.loss <= LOSS_LIMIT {
                // A generator that fell behind has proved only what it sent.
                good = trial.offered.min(rate).max(good);
                if trial.offered < rate * 0.98 {
                    return Ok((good, true));
                }
            } else {
                bad = rate;
            }
            rate = if good == 0.0 { bad * 0.7 } else { (good + bad) / 2.0 };
        }
        if good == 0.0 {
            bail!("frames are lost at any rate");
        }
        Ok((good, false))
    }
}

/// As fast as the sender can.
pub fn flood(scene: &Scene, direction: Direction, length: usize, bench: &Bench) -> Result<Outcome> {
    let path = Path::new(scene, direction, length, bench)?;
    let sender = path.send(Pace::Flood, u64::MAX)?;
    let ([sent, delivered], usage) = window(bench, || Ok([sender.count(), path.arrived()?]))?;
    sender.stop()?;
    figures(sent, delivered, &usage)
}

/// Of frames a second that were sent, and that arrived.
fn figures(sent: f64, delivered: f64, usage: &Usage) -> Result<Outcome> {
    if delivered == 0.0 {
        bail!("no frame arrived");
    }
    Ok(Outcome::new(
        [
            ("offered_mpps", sent / 1e6),
            ("delivered_mpps", delivered / 1e6),
            ("busy_ns_per_frame", usage.busy / usage.seconds / delivered * 1e9),
        ],
        usage,
    ))
}

/// The lossless rate, and what arrives at one to four times that load.
pub fn throughput(
    scene: &Scene,
    direction: Direction,
    length: usize,
    bench: &Bench,
) -> Result<Outcome> {
    let path = Path::new(scene, direction, length, bench)?;
    let sample = Sample::take()?;
    // The first frames of a datapath's life meet cold caches and untouched memory.
    path.flood(bench.warm_up)?;
    let trial_time = bench.window / 2;
    let (lossless, generator_bound) = path.lossless(trial_time)?;
    let mut curve = Vec::new();
    let mut at_three = None;
    for factor in [1.0, 1.5, 2.0, 3.0, 4.0] {
        let trial = path.trial(lossless * factor, trial_time)?;
        curve.push((trial.offered / 1e6, trial.delivered / 1e6));
        if factor == 3.0 {
            at_three = Some(trial);
        }
    }
    let peak = curve.iter().map(|&(_, delivered)| delivered).fold(lossless / 1e6, f64::max);
    let at_three = at_three.context("no trial at three times the lossless rate")?;
    Ok(Outcome::new(
        [
            ("lossless_mpps", lossless / 1e6),
            ("generator_bound", f64::from(u8::from(generator_bound))),
            ("peak_mpps", peak),
            ("load_reached_at_3x", at_three.offered / lossless),
            ("share_of_peak_at_3x", at_three.delivered / 1e6 / peak),
        ],
        &sample.usage()?,
    )
    .with_curve("overload", curve))
}

/// Processor time of the whole machine for a trickle every datapath carries, less that of the
/// same machine without traffic: what was not idle, which the kernel measures, where it counts
/// ticks for all else. The generator sleeps between bursts and is part of the figure,
/// the same for all.
pub fn cost(scene: &Scene, direction: Direction, length: usize, bench: &Bench) -> Result<Outcome> {
    let path = Path::new(scene, direction, length, bench)?;
    let ([], idle) = window(bench, || Ok([]))?;
    let sender = path.send(Pace::Gentle(TRICKLE), u64::MAX)?;
    let ([sent, delivered], usage) = window(bench, || Ok([sender.count(), path.arrived()?]))?;
    sender.stop()?;
    if delivered < sent * 0.99 {
        bail!("of {sent:.0} frames a second only {delivered:.0} arrived: no fair price");
    }
    let idle_cpus = idle.awake / idle.seconds;
    let marginal = usage.awake / usage.seconds - idle_cpus;
    if marginal <= 0.0 {
        bail!("others kept the machine busy: no price can be told");
    }
    Ok(Outcome::new(
        [
            ("busy_ns_per_frame", marginal / delivered * 1e9),
            ("idle_cpus", idle_cpus),
            ("delivered_mpps", delivered / 1e6),
        ],
        &usage,
    ))
}

/// Guests with a port each, all sending as fast as they can.
pub fn guests(datapath: &Datapath, count: usize, bench: &Bench) -> Result<Outcome> {
    let scene = Scene::with_sink(datapath, bench.scratch, count)?;
    let others = (1..count).map(|number| scene.other_guest(number)).collect::<Result<Vec<_>>>()?;
    let senders = std::iter::once(&scene.datapath.guest)
        .chain(&others)
        .map(|guest| guest_sender(guest, 60, Pace::Flood, u64::MAX, bench.processors))
        .collect::<Result<Vec<_>>>()?;
    let sent = || senders.iter().map(Worker::count).sum();
    let ([sent, delivered], usage) = window(bench, || Ok([sent(), scene.sunk()?]))?;
    for sender in senders {
        sender.stop()?;
    }
    figures(sent, delivered, &usage)
}

/// Processor time of the datapath's programs, all threads, in nanoseconds.
fn processor_time(scene: &Scene) -> Result<u64> {
    let mut time = 0;
    for child in &scene.datapath.children {
        for task in std::fs::read_dir(format!("/proc/{}/task", child.id()))? {
            let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
            let own = text.split(' ').next().and_then(|time| time.parse::<u64>().ok());
            time += own.context("schedstat has no time")?;
        }
    }
    Ok(time)
}

/// Memory of the datapath's programs, rings included, in KiB.
fn resident(scene: &Scene) -> Result<u64> {
    let mut kib = 0;
    for child in &scene.datapath.children {
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib += number.context("no VmRSS")?;
    }
    Ok(kib)
}

/// Many ports, traffic on one.
pub fn ports(datapath: &Datapath, count: usize, bench: &Bench) -> Result<Outcome> {
    let begun = Instant::now();
    let scene = Scene::with_sink(datapath, bench.scratch, count)?;
    let start = begun.elapsed();
    let resident = resident(&scene)?;
    let ([own], idle) = window(bench, || Ok([processor_time(&scene)?]))?;
    let to_wire = flood(&scene, Direction::ToWire, 60, bench)?;
    let to_guest = flood(&scene, Direction::ToGuest, 60, bench)?;
    let delivered =
        |outcome: &Outcome| outcome.figures.get("delivered_mpps").copied().unwrap_or(0.0);
    let disturbed = |outcome: &Outcome| outcome.figures.get("disturbed").copied().unwrap_or(0.0);
    let mut outcome = Outcome::new(
        [
            ("to_wire_mpps", delivered(&to_wire)),
            ("to_guest_mpps", delivered(&to_guest)),
            ("idle_cpus", idle.busy / idle.seconds),
            ("idle_own_cpus", own / 1e9),
            ("start_ms", start.as_secs_f64() * 1e3),
            ("resident_mib", resident as f64 / 1024.0),
            ("resident_mib_per_port", (resident as f64 / 1024.0 - BESIDES_MIB) / count as f64),
        ],
        &idle,
    );
    let disturbed = disturbed(&to_wire).max(disturbed(&to_guest)).max(disturbed(&outcome));
    outcome.figures.insert("disturbed".into(), disturbed);
    Ok(outcome)
}
