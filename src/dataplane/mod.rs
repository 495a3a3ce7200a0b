//! Moving frames: bursts, the worker's loop, counters.
//!
//! A worker owns its ports' devices and writes their counters; control owns the
//! links' states and sends commands. What may not live here: anything that reads
//! configuration or talks to people.

mod burst;
mod capture;
mod chains;
mod counters;
mod crowd;
mod handle;
pub mod kernel;
mod pace;
mod policing;
mod turns;
mod worker;

pub use burst::{Abilities, Lane, SegmentSpace};
pub use capture::{
    Chunk, Direction, Place, Record, SINKS_MAX, SNAPLEN_MAX, Selection, Sink, Source, capture,
};
pub use counters::{FlowCounters, FlowSnapshot, PortShared, UplinkShared, WorkerShared};
pub use handle::{Command, Departed, Notice, WorkerHandle};
pub use pace::{Pace, PollMode};
pub use worker::{CALLS, Slot, Worker, WorkerError};
