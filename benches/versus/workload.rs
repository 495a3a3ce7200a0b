//! What is measured: the list, and what each entry hands back.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::datapath::Datapath;
use super::flood;
use super::machine::{Processors, Sample, Usage};
use super::round_trip::{self, Load};
use super::scene::Scene;
use super::stream;

/// Which way traffic goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the guest to the wire.
    ToWire,
    /// From the wire to the guest, the tag in the frame.
    ToGuest,
    /// From the wire to the guest, the tag beside the frame as a NIC leaves it that has taken
    /// it out.
    FromNic,
}

impl Direction {
    /// Both ways.
    pub const ALL: [Self; 2] = [Self::ToWire, Self::ToGuest];

    fn name(self) -> &'static str {
        match self {
            Self::ToWire => "guest-to-wire",
            Self::ToGuest => "wire-to-guest",
            Self::FromNic => "nic-to-guest",
        }
    }
}

/// One thing to measure. Lengths are octets of a frame as the guest has it, without FCS.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Workload {
    /// Frames a second, as fast as the sender can.
    Flood {
        /// Which way.
        direction: Direction,
        /// Octets of a frame.
        length: usize,
    },
    /// The greatest rate at which no more than one frame in a thousand is lost, by search, and
    /// what arrives beyond it.
    Throughput {
        /// Which way.
        direction: Direction,
        /// Octets of a frame.
        length: usize,
    },
    /// Bulk TCP between the guest's and the far end's stacks.
    Tcp {
        /// Which way the data goes.
        direction: Direction,
        /// Connections at once.
        streams: usize,
    },
    /// Echo requests from the guest, the next when the last was answered.
    RoundTrip {
        /// Pause before each; zero keeps the path awake.
        pause: Duration,
        /// Whether 60-octet frames come from the wire meanwhile, at half the datapath's own
        /// lossless rate.
        half_load: bool,
    },
    /// Processor time for a slow, steady trickle, and without traffic.
    Cost {
        /// Which way.
        direction: Direction,
        /// Octets of a frame.
        length: usize,
    },
    /// So many guests, each with a port of its own, send 60-octet frames to the wire as fast as
    /// they can.
    Guests {
        /// How many.
        count: usize,
    },
    /// As the smallest floods, with so many ports mapped of which one has traffic.
    Ports {
        /// Mapped ports.
        count: usize,
    },
}

/// What a run's measurements have in common.
pub struct Bench<'a> {
    /// Folder for device nodes and logs.
    pub scratch: &'a Path,
    /// Length of a window.
    pub window: Duration,
    /// Traffic before a window opens.
    pub warm_up: Duration,
    /// Placement in workloads that have a generator.
    pub processors: Processors,
    /// Lossless frames a second of 60 octets toward the guest, by datapath, from this run.
    pub lossless: BTreeMap<String, f64>,
}

/// What was found.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Figures by name; the units are in the names.
    pub figures: BTreeMap<String, f64>,
    /// Curves by name, for the plots.
    pub curves: BTreeMap<String, Vec<(f64, f64)>>,
}

impl Outcome {
    /// Figures and what the window cost.
    pub fn new<const N: usize>(pairs: [(&str, f64); N], usage: &Usage) -> Self {
        let figures = pairs.into_iter().map(|(name, value)| (name.to_owned(), value));
        let cost = [
            ("busy_cpus", usage.busy / usage.seconds),
            ("soft_interrupt_cpus", usage.soft_interrupt / usage.seconds),
            ("steal_cpus", usage.steal / usage.seconds),
            ("foreign_cpus", usage.foreign / usage.seconds),
            ("disturbed", f64::from(u8::from(usage.disturbed()))),
        ];
        Self {
            figures: figures.chain(cost.map(|(name, value)| (name.to_owned(), value))).collect(),
            curves: BTreeMap::new(),
        }
    }

    /// Adds a curve.
    pub fn with_curve(mut self, name: &str, points: Vec<(f64, f64)>) -> Self {
        self.curves.insert(name.into(), points);
        self
    }
}

impl Workload {
    /// All of them, in the order they run: the search first, because half its result is the
    /// load of a later one.
    pub fn all() -> Vec<Self> {
        let lengths = [60, 512, 1514];
        let mut all = Vec::new();
        for direction in Direction::ALL {
            all.extend(lengths.map(|length| Self::Flood { direction, length }));
        }
        for direction in Direction::ALL {
            all.extend(lengths.map(|length| Self::Throughput { direction, length }));
        }
        all.push(Self::Throughput { direction: Direction::FromNic, length: 60 });
        for direction in Direction::ALL {
            all.extend([1, 8].map(|streams| Self::Tcp { direction, streams }));
        }
        let pause = Duration::from_micros(500);
        all.push(Self::RoundTrip { pause: Duration::ZERO, half_load: false });
        all.push(Self::RoundTrip { pause, half_load: false });
        all.push(Self::RoundTrip { pause, half_load: true });
        for direction in Direction::ALL {
            all.extend([60, 1514].map(|length| Self::Cost { direction, length }));
        }
        all.push(Self::Cost { direction: Direction::FromNic, length: 60 });
        all.push(Self::Guests { count: 2 });
        all.extend([1, 10, 100, 1000].map(|count| Self::Ports { count }));
        all
    }

    /// Name in tables, plots and `--only`.
    pub fn name(self) -> String {
        match self {
            Self::Flood { direction, length } => format!("flood-{}-{length}", direction.name()),
            Self::Throughput { direction, length } => {
                format!("throughput-{}-{length}", direction.name())
            }
            Self::Tcp { direction, streams } => format!("tcp-{}-{streams}", direction.name()),
            Self::RoundTrip { half_load: true, .. } => "rtt-half-load".into(),
            Self::RoundTrip { pause, .. } if pause.is_zero() => "rtt-back-to-back".into(),
            Self::RoundTrip { .. } => "rtt-idle".into(),
            Self::Cost { direction, length } => format!("cost-{}-{length}", direction.name()),
            Self::Guests { count } => format!("guests-{count}"),
            Self::Ports { count } => format!("ports-{count}"),
        }
    }

    /// The workload of the datapath that ratios are taken against.
    pub fn compared_with(self) -> Self {
        match self {
            Self::Ports { .. } => Self::Ports { count: 1 },
            same => same,
        }
    }

    /// The figures to compare, most telling first, and whether more is better.
    pub fn headline(self) -> &'static [(&'static str, bool)] {
        match self {
            Self::Flood { .. } | Self::Guests { .. } => {
                &[("delivered_mpps", true), ("busy_ns_per_frame", false)]
            }
            Self::Throughput { .. } => &[
                ("lossless_mpps", true),
                ("generator_bound", false),
                ("peak_mpps", true),
                ("share_of_peak_at_3x", true),
                ("load_reached_at_3x", true),
            ],
            Self::Tcp { .. } => &[("gbit_per_s", true), ("busy_ns_per_kibibyte", false)],
            Self::RoundTrip { .. } => {
                &[("mean_us", false), ("p50_us", false), ("p99_us", false), ("p999_us", false)]
            }
            Self::Cost { .. } => &[("busy_ns_per_frame", false), ("idle_cpus", false)],
            Self::Ports { .. } => &[
                ("to_wire_mpps", true),
                ("to_guest_mpps", true),
                ("idle_cpus", false),
                ("idle_own_cpus", false),
                ("start_ms", false),
                ("resident_mib", false),
            ],
        }
    }

    /// Why this datapath cannot be measured with it, if so.
    pub fn cannot(self, datapath: &Datapath) -> Option<&'static str> {
        match self {
            Self::Flood { direction: Direction::ToWire, .. }
            | Self::Throughput { direction: Direction::ToWire, .. } => None,
            _ if datapath.plain_guest => {
                Some("only what its guest sends goes another way than on the kernel path")
            }
            Self::Tcp { .. } => datapath.cannot_offload(),
            Self::Ports { count } | Self::Guests { count }
                if count > 1 && !datapath.has_many_ports() =>
            {
                Some("one port is all this harness sets up for it")
            }
            _ => None,
        }
    }

    /// Measures it once on a fresh test bed.
    pub fn measure(self, datapath: &Datapath, bench: &mut Bench) -> Result<Outcome> {
        let processors = match self {
            Self::Tcp { .. } | Self::RoundTrip { .. } => Processors::Free,
            _ => bench.processors,
        };
        processors.take_rest()?;
        let outcome = match self {
            Self::Flood { direction, length } => {
                flood::flood(&scene(direction, datapath, bench, 1)?, direction, length, bench)
            }
            Self::Throughput { direction, length } => {
                let outcome = flood::throughput(
                    &scene(direction, datapath, bench, 1)?,
                    direction,
                    length,
                    bench,
                )?;
                if direction == Direction::ToGuest && length == 60 {
                    let rate =
                        outcome.figures.get("lossless_mpps").context("the search found no rate")?;
                    bench.lossless.insert(datapath.name.clone(), rate * 1e6);
                }
                Ok(outcome)
            }
            Self::Tcp { direction, streams } => {
                let scene = Scene::with_stacks(datapath, bench.scratch, 1)?;
                stream::tcp(&scene, direction, streams, bench)
            }
            Self::RoundTrip { pause, half_load } => {
                let load = if half_load {
                    Some(Load { rate: half_of_lossless(datapath, bench)?, length: 60 })
                } else {
                    None
                };
                let scene = Scene::with_stacks(datapath, bench.scratch, 1)?;
                round_trip::round_trip(&scene, pause, load, bench)
            }
            Self::Cost { direction, length } => {
                flood::cost(&scene(direction, datapath, bench, 1)?, direction, length, bench)
            }
            Self::Guests { count } => flood::guests(datapath, count, bench),
            Self::Ports { count } => flood::ports(datapath, count, bench),
        };
        Processors::Free.take_rest()?;
        outcome
    }
}

fn scene(direction: Direction, datapath: &Datapath, bench: &Bench, ports: usize) -> Result<Scene> {
    match direction {
        Direction::ToWire => Scene::with_sink(datapath, bench.scratch, ports),
        Direction::ToGuest => Scene::with_bare_wire(datapath, bench.scratch, ports),
        Direction::FromNic => Scene::with_tagging_wire(datapath, bench.scratch, ports),
    }
}

/// Half of what the datapath carries to the guest without loss; searched for if it was not.
fn half_of_lossless(datapath: &Datapath, bench: &mut Bench) -> Result<f64> {
    if !bench.lossless.contains_key(&datapath.name) {
        let search = Workload::Throughput { direction: Direction::ToGuest, length: 60 };
        search.measure(datapath, bench)?;
    }
    let rate = bench.lossless.get(&datapath.name).context("the search found no rate")?;
    Ok(rate / 2.0)
}

/// Reads some counters before and after the window; their rates in it.
pub fn window<const N: usize>(
    bench: &Bench,
    mut counters: impl FnMut() -> Result<[u64; N]>,
) -> Result<([f64; N], Usage)> {
    std::thread::sleep(bench.warm_up);
    let sample = Sample::take()?;
    let (before, opened) = (counters()?, Instant::now());
    std::thread::sleep(bench.window);
    let (after, seconds) = (counters()?, opened.elapsed().as_secs_f64());
    let usage = sample.usage()?;
    let mut rates = [0.0; N];
    for (rate, (after, before)) in rates.iter_mut().zip(after.iter().zip(before)) {
        *rate = after.saturating_sub(before) as f64 / seconds;
    }
    Ok((rates, usage))
}
