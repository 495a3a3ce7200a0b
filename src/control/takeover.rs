//! Taking over from a running vlanswitchd without losing a frame (`--takeover`).
//!
//! # Theory of operation
//!
//! A packet socket and its ring outlive a process as long as another one holds the
//! descriptor, and the kernel goes on filling the ring. So the new process asks the
//! old one, over its control socket, for all descriptors and for what it knows
//! ([`State`]); maps the rings, opens what it needs besides, and only then says that
//! it is ready. The old one stops its worker between two bursts and answers where in
//! each ring it stopped ([`Last`]). What arrives in between waits in the rings. If the
//! new process goes away before it is ready, the old one goes on as if nothing had
//! happened.
//!
//! Of the uplink there is a socket and a ring for each worker, all in one group, which lives
//! as long as they do. So the number of workers stays what it was, and each port stays with
//! its worker: what waits in a ring is for the ports of that one.
//!
//! The same goes by way of systemd's descriptor store (`control::store`): the old process
//! leaves descriptors, [`State`] and [`Last`] there ([`Stored`]) and ends, and the next
//! one finds them. From then on both ways are one.
//!
//! # The format and its versions
//!
//! Versions of vlanswitchd hand over to each other, older to newer and back:
//!
//! - A field more, without which the rest still means the same, is an addition: it has
//!   `#[serde(default)]`, so that what an older version wrote can be read, and what an
//!   older version reads passes over it. [`FORMAT`] stays. Its default must be what the
//!   older version did.
//! - All else is a change of meaning and takes the next number: a field that goes or is
//!   read otherwise, another order of descriptors, a ring laid out otherwise, or something
//!   frames would be lost without.
//!   What a process does not have the number of is not read at all. By the control socket
//!   the old process refuses; the new one tells it to end, and starts cold. From the store
//!   it is removed, and the start is a cold one.
//! - A version may read older numbers besides its own. It writes the oldest one that says all
//!   there is to say, so that a version before can go on where nothing new is in use.
//! - Who asks says the newest number it reads, and reads the older ones too. The other refuses
//!   if it writes another, and says which; if that is an older one, it is asked for again.
//!
//! The numbers:
//!
//! 1. One worker.
//! 2. Several: the uplink's descriptors are one for each, in their order.
//! 3. Some ports are on the kernel path, and found by its pins; an older version would leave
//!    that in place, and each frame would come twice.
//!
//! `tests/formats/` has what each number looks like, as the version wrote it that brought it.

use crate::control::api::{Flow, INTERFACE, Removed};
use crate::control::fallback::Abilities;
use crate::control::host::{FoundPort, FoundUplink};
use crate::control::unsent::Unsent;
use crate::sys::hand_over;
use crate::sys::peer::Peer;
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use thiserror::Error;
use tracing::warn;

/// The newest format of what is handed over; older ones are read too.
pub const FORMAT: u32 = 3;
/// The format for several workers.
const SEVERAL_WORKERS: u32 = 2;
/// The format for one worker, the oldest.
const ONE_WORKER: u32 = 1;
/// How long each side waits for the other.
const PATIENCE: Duration = Duration::from_secs(10);
/// What the new process says when it is ready.
const READY: u8 = b'!';
/// An answer longer than this is none, in bytes.
const ANSWER_MAX: usize = 64 << 10;

/// What lies in the store beside the descriptors.
#[derive(Debug, Serialize, Deserialize)]
pub struct Stored {
    /// [`State::format`]; whatever else there is is read only if it is known.
    pub format: u32,
    /// What the process before knew.
    pub state: State,
    /// Where it stopped.
    pub last: Last,
}

/// What all formats have.
#[derive(Debug, Deserialize)]
struct Numbered {
    format: u32,
}

impl Stored {
    /// Reads what a vlanswitchd has stored.
    ///
    /// # Errors
    /// What is wrong with it, for people.
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        let broken = |error| format!("it cannot be read: {error}");
        let Numbered { format } = serde_json::from_slice(bytes).map_err(broken)?;
        if !(ONE_WORKER..=FORMAT).contains(&format) {
            return Err(format!(
                "it has format {format}, and this version reads {ONE_WORKER} to {FORMAT}"
            ));
        }
        serde_json::from_slice(bytes).map_err(broken)
    }
}

/// A device that is handed over; its descriptor is the next of the message's, and the
/// uplink's are as many as there are workers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Interface index; none for a tap held by its descriptor.
    pub index: Option<u32>,
    /// Slots of its ring.
    pub slots: usize,
}

/// A port, as the old process has it.
#[derive(Debug, Serialize, Deserialize)]
pub struct PortState {
    /// Its configuration, as `--map` takes it, with the TPID spelled out.
    pub map: String,
    /// Its device, if attached.
    pub device: Option<DeviceState>,
    /// What to put back.
    pub found: Option<FoundPort>,
    /// The number of its worker.
    #[serde(default)]
    pub worker: usize,
}

/// What the old process knows.
#[derive(Debug, Serialize, Deserialize)]
pub struct State {
    /// Its version.
    pub version: String,
    /// Name of the uplink.
    pub uplink: String,
    /// The uplink's device, if attached, and what to put back.
    pub device: Option<(DeviceState, FoundUplink)>,
    /// The ports, in their order.
    pub ports: Vec<PortState>,
    /// The places of its listening sockets: their descriptors come first, then the
    /// claim to the uplink, then the uplink's by worker, then the ports'.
    pub listeners: Vec<String>,
    /// What it found that the kernel can do: it is the same kernel.
    #[serde(default)]
    pub abilities: Option<Abilities>,
    /// How many workers it has.
    #[serde(default = "one")]
    pub workers: usize,
    /// Whether it has a kernel path.
    #[serde(default)]
    pub kernel_path: bool,
    /// What to put back of an uplink without a ring.
    #[serde(default)]
    pub found_uplink: Option<FoundUplink>,
}

fn one() -> usize {
    1
}

impl State {
    /// How many descriptors belong to it.
    pub fn descriptors(&self) -> usize {
        let uplink = if self.device.is_some() { self.workers } else { 0 };
        let ports = self.ports.iter().filter(|port| port.device.is_some()).count();
        self.listeners.len().saturating_add(1 + ports).saturating_add(uplink)
    }

    /// The format it is written in.
    pub fn format(&self) -> u32 {
        format_for(self.workers, self.kernel_path)
    }
}

/// The oldest format that says what there is to say with so many workers, and with a kernel
/// path or without.
pub fn format_for(workers: usize, kernel_path: bool) -> u32 {
    match (kernel_path, workers) {
        (true, _) => FORMAT,
        (false, 2..) => SEVERAL_WORKERS,
        (false, _) => ONE_WORKER,
    }
}

/// What the old process counted, and where it stopped.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Last {
    /// When its workers had stopped, by the clock all processes share ([`clock`]).
    pub stopped: u64,
    /// The next slot of the uplink's ring, of the first worker's if there are several.
    pub next: usize,
    /// The next slots of the others'.
    #[serde(default)]
    pub others: Vec<usize>,
    /// What came from the wire, to all workers.
    pub from_wire: Flow,
    /// For each port the next slot of its ring, and what was counted.
    pub ports: Vec<(usize, Flow, Flow)>,
    /// Ports removed meanwhile.
    pub removed: Option<Removed>,
    /// What the uplink dropped, as of when it was last asked for.
    #[serde(default)]
    pub unsent: Unsent,
}

/// The new process's side of a hand-over under way.
#[derive(Debug)]
pub struct TakeOver {
    from: Giver,
    /// What the old process knows.
    pub state: State,
    /// The descriptors, in the order [`State`] tells.
    pub descriptors: Vec<OwnedFd>,
}

#[derive(Debug)]
enum Giver {
    /// A process that still forwards.
    Process(UnixStream),
    /// One that has stopped here.
    Ended(Box<Last>),
}

/// A hand-over that does not come about.
#[derive(Debug, Error)]
pub enum TakeOverError {
    /// The other process serves another uplink.
    #[error(
        "--takeover: the vlanswitchd at {socket} serves uplink {other}: name its socket with --control"
    )]
    OtherUplink {
        /// The control socket asked.
        socket: String,
        /// Its uplink.
        other: String,
    },
    /// It does not let us.
    #[error("--takeover: the vlanswitchd at {socket} refuses: {why}")]
    Refused {
        /// The control socket asked.
        socket: String,
        /// What it said.
        why: String,
    },
    /// The connection broke.
    #[error("--takeover: {socket}: {reason}")]
    Broken {
        /// The control socket asked.
        socket: String,
        /// What the system said.
        reason: io::Error,
    },
}

impl TakeOver {
    /// Asks whoever runs at this control socket. `None` if nobody does, or if it was
    /// of another kind and has ended.
    ///
    /// # Errors
    /// [`TakeOverError`]; the other process goes on.
    pub fn ask(socket: &Path, uplink: &str) -> Result<Option<Self>, TakeOverError> {
        let place = || socket.display().to_string();
        let broken = |reason| TakeOverError::Broken { socket: place(), reason };
        let Ok(mut stream) = UnixStream::connect(socket) else {
            warn!("--takeover: no vlanswitchd runs at {}: starting without one", place());
            return Ok(None);
        };
        stream.set_read_timeout(Some(PATIENCE)).map_err(broken)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(broken)?;
        let mut answer = call(&mut stream, FORMAT, uplink).map_err(broken)?;
        if let Some(older) = older_format(&answer) {
            answer = call(&mut stream, older, uplink).map_err(broken)?;
        }
        match answer.get("error").and_then(serde_json::Value::as_str) {
            None => {}
            Some(error)
                if error.ends_with(".MethodNotFound") || error.ends_with(".OtherFormat") =>
            {
                warn!(
                    "--takeover: the vlanswitchd at {} is of a version that cannot hand over to \
                     this one: ending it and starting without its rings; frames in between are lost",
                    place()
                );
                end(&stream).map_err(broken)?;
                return Ok(None);
            }
            Some(error) => {
                let message = answer.pointer("/parameters/message");
                let message = message.and_then(serde_json::Value::as_str).unwrap_or(error);
                return Err(TakeOverError::Refused { socket: place(), why: message.to_owned() });
            }
        }
        let (state, descriptors) = receive::<State>(&mut stream).map_err(broken)?;
        if state.uplink != uplink {
            return Err(TakeOverError::OtherUplink { socket: place(), other: state.uplink });
        }
        Ok(Some(Self { from: Giver::Process(stream), state, descriptors }))
    }

    /// Goes on with what a process has left that has ended.
    pub fn of_ended(Stored { state, last, .. }: Stored, descriptors: Vec<OwnedFd>) -> Self {
        Self { from: Giver::Ended(Box::new(last)), state, descriptors }
    }

    /// Whether the other process still forwards, and will go on if this one does not.
    pub fn is_from_process(&self) -> bool {
        matches!(self.from, Giver::Process(_))
    }

    /// Says that everything is ready; the old process stops. From now on the frames
    /// are ours.
    ///
    /// # Errors
    /// The connection's: the old process has gone, and how far it came is unknown.
    pub fn finish(self) -> io::Result<Last> {
        match self.from {
            Giver::Process(mut stream) => {
                stream.write_all(&[READY])?;
                receive::<Last>(&mut stream).map(|(last, _)| last)
            }
            Giver::Ended(last) => Ok(*last),
        }
    }
}

/// Gives the new process what it needs, and waits until it is ready.
///
/// # Errors
/// The connection's: the new process has gone.
pub fn offer(
    stream: &mut UnixStream,
    state: &State,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    send(stream, state, descriptors)?;
    let mut ready = [0];
    stream.read_exact(&mut ready)?;
    if ready == [READY] { Ok(()) } else { Err(io::ErrorKind::InvalidData.into()) }
}

/// Tells the new process where this one stopped.
///
/// # Errors
/// The connection's.
pub fn conclude(stream: &mut UnixStream, last: &Last) -> io::Result<()> {
    send(stream, last, &[])
}

fn send(
    stream: &mut UnixStream,
    value: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    hand_over::send(stream, &serde_json::to_vec(value)?, descriptors)
}

fn receive<T: DeserializeOwned>(stream: &mut UnixStream) -> io::Result<(T, Vec<OwnedFd>)> {
    let (bytes, descriptors) = hand_over::receive(stream)?;
    Ok((serde_json::from_slice(&bytes)?, descriptors))
}

/// Nanoseconds since the host started, the same in every process.
pub fn clock() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap_or(TimeSpec::new(0, 0));
    Duration::from(now).as_nanos() as u64
}

/// Asks for a hand-over in this format; returns the answer.
fn call(stream: &mut UnixStream, format: u32, uplink: &str) -> io::Result<serde_json::Value> {
    let call = serde_json::json!({
        "method": format!("{INTERFACE}.HandOver"),
        "parameters": { "format": format, "uplink": uplink },
    });
    stream.write_all(format!("{call}\0").as_bytes())?;
    read_answer(stream)
}

/// The format of a process that does not know the newest one, if this version reads it.
fn older_format(answer: &serde_json::Value) -> Option<u32> {
    let error = answer.get("error")?.as_str()?;
    let theirs = u32::try_from(answer.pointer("/parameters/format")?.as_u64()?).ok()?;
    (error.ends_with(".OtherFormat") && (ONE_WORKER..FORMAT).contains(&theirs)).then_some(theirs)
}

/// One answer, and not a byte more: what follows is no varlink.
fn read_answer(stream: &mut UnixStream) -> io::Result<serde_json::Value> {
    let mut answer = Vec::new();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        match byte {
            [0] => return Ok(serde_json::from_slice(&answer)?),
            [other] if answer.len() < ANSWER_MAX => answer.push(other),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Ends the process at the other end, and waits until it is gone.
fn end(stream: &UnixStream) -> io::Result<()> {
    let peer = Peer::of(stream)?;
    kill(Pid::from_raw(peer.pid), Signal::SIGTERM)?;
    let deadline = Instant::now() + PATIENCE;
    while fs::exists(format!("/proc/{}", peer.pid))? {
        if Instant::now() > deadline {
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
    use super::*;

    /// As the version that brought the number wrote it: State and Last of a process with a
    /// port of each kind.
    const FIRST: &str = include_str!("../../tests/formats/1.json");

    #[test]
    fn what_the_first_version_wrote_is_read() {
        let Stored { state, last, .. } = Stored::read(FIRST.as_bytes()).unwrap();
        assert_eq!(state.uplink, "up0");
        assert_eq!(state.listeners, ["control /run/vlanswitchd/control"]);
        let maps: Vec<&str> = state.ports.iter().map(|port| port.map.as_str()).collect();
        let expected =
            ["101=t0", "102=found0,mode=access", "55=internal:leg0", "103=absent0,create=no"];
        assert_eq!(maps, expected);
        let devices = state.ports.iter().map(|port| port.device.clone());
        let device = |index, slots| Some(DeviceState { index, slots });
        let expected = [device(Some(5), 2048), device(Some(4), 2048), device(None, 0), None];
        assert_eq!(devices.collect::<Vec<_>>(), expected);
        assert!(state.ports[1].found.is_some() && state.ports[0].found.is_none());
        // One listener, the claim, the uplink, three ports.
        assert_eq!(state.descriptors(), 6);
        assert_eq!(last.ports.len(), 4);
        // Not known to it: found out anew, or never otherwise.
        assert_eq!(state.abilities, None);
        assert_eq!((state.workers, state.format()), (1, 1));
        assert!(state.ports.iter().all(|port| port.worker == 0));
    }

    /// As the version that brought several workers wrote it: two workers, three ports, one
    /// of which had moved.
    const SECOND: &str = include_str!("../../tests/formats/2.json");

    #[test]
    fn what_several_workers_left_is_read() {
        let Stored { format, state, last } = Stored::read(SECOND.as_bytes()).unwrap();
        assert_eq!((format, state.format(), state.workers), (2, 2, 2));
        let workers: Vec<usize> = state.ports.iter().map(|port| port.worker).collect();
        assert_eq!(workers, [1, 1, 0]);
        // One listener, the claim, the uplink twice, three ports.
        assert_eq!(state.descriptors(), 7);
        assert_eq!((last.next, &last.others[..]), (1, &[1][..]));
    }

    #[test]
    fn who_knows_older_formats_only_is_asked_for_one_of_them() {
        let refusal = |error: &str, format: u32| {
            let answer = serde_json::json!({ "error": error, "parameters": { "format": format } });
            older_format(&answer)
        };
        assert_eq!(refusal("org.vlanswitchd.OtherFormat", 1), Some(1));
        assert_eq!(refusal("org.vlanswitchd.OtherFormat", 2), Some(2));
        assert_eq!(refusal("org.vlanswitchd.OtherFormat", 3), None);
        assert_eq!(refusal("org.vlanswitchd.OtherFormat", 99), None);
        assert_eq!(refusal("org.vlanswitchd.Refused", 1), None);
        assert_eq!(older_format(&serde_json::json!({ "parameters": {} })), None);
    }

    #[test]
    fn what_a_later_version_adds_is_passed_over() {
        let mut value: serde_json::Value = serde_json::from_str(FIRST).unwrap();
        for place in ["", "/state", "/state/ports/0", "/last"] {
            let place = value.pointer_mut(place).unwrap().as_object_mut().unwrap();
            place.insert("later".to_owned(), serde_json::json!({ "any": ["thing"] }));
        }
        assert!(Stored::read(&serde_json::to_vec(&value).unwrap()).is_ok());
    }

    /// What this version writes has all that the first one reads.
    #[test]
    fn nothing_the_first_version_reads_has_gone() {
        let stored = Stored::read(FIRST.as_bytes()).unwrap();
        let now = serde_json::to_value(&stored).unwrap();
        let first: serde_json::Value = serde_json::from_str(FIRST).unwrap();
        assert_eq!(lacking(&first, &now), [""; 0]);
    }

    fn lacking(one: &serde_json::Value, other: &serde_json::Value) -> Vec<String> {
        match (one, other) {
            (serde_json::Value::Object(one), serde_json::Value::Object(other)) => one
                .iter()
                .flat_map(|(key, value)| {
                    let missing = || vec![key.clone()];
                    other.get(key).map_or_else(missing, |there| lacking(value, there))
                })
                .collect(),
            (serde_json::Value::Array(one), serde_json::Value::Array(other)) => {
                one.iter().zip(other).flat_map(|(one, other)| lacking(one, other)).collect()
            }
            (one, other) if one == other => Vec::new(),
            (one, other) => vec![format!("{one} is {other}")],
        }
    }

    #[test]
    fn another_number_is_not_read_at_all() {
        let error = Stored::read(br#"{"format":99,"state":0}"#).unwrap_err();
        assert_eq!(error, "it has format 99, and this version reads 1 to 3");
        assert!(Stored::read(b"{}").unwrap_err().starts_with("it cannot be read: "));
    }
}
