//! Control's end of a worker: what it may ask, what it is told, and the thread.

use super::capture::Sink;
use super::counters::{PortShared, WorkerShared};
use super::worker::Slot;
use crate::port::Device;
use crate::switch::{PortIndex, Table};
use crossbeam_channel::{Receiver, Sender};
use mio::Waker;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

/// What control tells a worker.
#[derive(Debug)]
pub enum Command {
    /// Use these devices for their ports (`None`: the uplink), from one moment on: no
    /// frame meets some without the others.
    Attach(Vec<(Option<PortIndex>, Box<Device>)>),
    /// Forward what the device has received and give it back; answered by
    /// [`Notice::Departed`], also if there was none.
    Detach(Option<PortIndex>),
    /// A new port, without a device, in place of whatever port was there.
    Add(PortIndex, Arc<PortShared>),
    /// Decide by this table from now on; answered by [`Notice::Switched`] with the number.
    Switch(u64, Arc<Table>),
    /// Leave the uplink's frames in their ring until the [`Command::Take`] of the same
    /// number: a port comes from another worker, and the other one's frames for it go
    /// first. Answered by [`Notice::Held`] with the number. Guests are served on, and so
    /// is the ring if that takes too long.
    Hold(u64),
    /// Serve the uplink until what has arrived for these ports is with their guests, and
    /// give those away as they are that have a place here; answered by [`Notice::Given`]
    /// with the number. What comes for them after that is counted to the place in their
    /// stead. Nothing is given once the move was called off ([`WorkerShared::call_off`]).
    Give(u64, Vec<PortIndex>, Arc<PortShared>),
    /// Serve these ports from now on, and the uplink again if it waits for this number.
    Take(u64, Vec<(PortIndex, Slot)>),
    /// Show frames to this capture; at most [`SINKS_MAX`](super::SINKS_MAX) are served.
    Capture(Box<Sink>),
    /// Give all devices back as they are, at once, and end: another process goes on.
    Freeze,
    /// Show that the loop goes round, by [`WorkerShared::beats`].
    Beat,
    /// Forward what has arrived, give all devices back and end.
    Stop,
}

/// What a worker tells control.
#[derive(Debug)]
pub enum Notice {
    /// A device is no longer in the loop.
    Departed(Departed),
    /// The table of this number is in force.
    Switched(u64),
    /// The uplink waits for the move of this number.
    Held(u64),
    /// Ports that leave in the move of this number, with all that belongs to them.
    Given(u64, Vec<(PortIndex, Slot)>),
}

/// A device a worker has given back, or could not take.
#[derive(Debug)]
pub struct Departed {
    /// The port, or `None` for the uplink.
    pub port: Option<PortIndex>,
    /// The device, to be closed outside the loop; `None` if there was none.
    pub device: Option<Box<Device>>,
    /// Why it could not be taken.
    pub error: Option<io::Error>,
}

impl From<(PortIndex, Slot)> for Departed {
    fn from((port, mut slot): (PortIndex, Slot)) -> Self {
        Self { port: Some(port), device: slot.take_device(), error: None }
    }
}

/// Control's end of a worker.
#[derive(Debug)]
pub struct WorkerHandle {
    pub(super) commands: Sender<Command>,
    pub(super) waker: Arc<Waker>,
    /// What the worker tells.
    pub notices: Receiver<Notice>,
    /// What it tells of itself.
    pub shared: Arc<WorkerShared>,
    pub(super) thread: JoinHandle<()>,
}

impl WorkerHandle {
    /// Sends a command; it takes effect within one round.
    pub fn send(&self, command: Command) {
        // Either fails only when the worker is gone, and then the process is too: a
        // panic aborts.
        let _ = self.commands.send(command);
        let _ = self.waker.wake();
    }

    /// Stops the worker and waits for it; returns the devices it still had.
    pub fn finish(self) -> Vec<Departed> {
        self.send(Command::Stop);
        self.join()
    }

    /// Waits for the end of a worker that was told to [`Command::Stop`] or
    /// [`Command::Freeze`]; returns the devices it still had, and those of ports it had
    /// given away and nobody has taken.
    pub fn join(self) -> Vec<Departed> {
        let _ = self.thread.join();
        let departed = self.notices.try_iter().flat_map(|notice| match notice {
            Notice::Departed(departed) => vec![departed],
            Notice::Given(_, ports) => ports.into_iter().map(Departed::from).collect(),
            Notice::Switched(_) | Notice::Held(_) => Vec::new(),
        });
        departed.collect()
    }
}
