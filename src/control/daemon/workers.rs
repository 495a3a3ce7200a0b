//! The workers, from control's side: starting them, telling them, hearing from them.
//!
//! Each has its own channel, its own socket and ring on the uplink, and its own counts of
//! it; what is shown of the uplink is the sum. A port is with one worker at a time
//! (`Port::worker`). The others have a place that stands for all ports they do not have:
//! what is counted there met the wrong worker (`dataplane`'s moves tell when), and is
//! shown as the uplink's drops.

use super::Daemon;
use super::devices::publish;
use super::heartbeat::Heartbeat;
use super::ports::Ports;
use super::watch::WatchedWorker;
use crate::control::affinity;
use crate::control::config::{Config, SandboxMode};
use crate::control::links::LinkState;
use crate::control::placement::{self, Key};
use crate::control::privileges::{self, ConfineError};
use crate::control::start_error::StartError;
use crate::dataplane::{
    Abilities, Command, Departed, FlowSnapshot, Notice, PortShared, Slot, UplinkShared, Worker,
    WorkerHandle, WorkerShared,
};
use crate::port::{Device, DeviceState};
use crate::switch::{Membership, PortIndex, Table};
use crate::sys::bpf::Steering;
use crossbeam_channel::{Receiver, bounded};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tracing::warn;

/// How long a worker may take to answer.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long it may forward what a device has received.
const DRAIN_PATIENCE: Duration = Duration::from_millis(20);
/// How long a worker may take to answer that gives ports away, or waits for them. What the
/// uplink brings for these ports waits for 500 ms at most (`dataplane`'s moves) and is then
/// lost as `wrong_worker`; others' frames go on after that time.
const MOVE_PATIENCE: Duration = Duration::from_secs(2);
/// How long a frame may be on its way between the look that steers it and the ring: some
/// instructions of a softirq, unless the hypervisor takes the CPU away meanwhile.
const STRAGGLER_TIME: Duration = Duration::from_millis(1);

/// Control's end of one worker.
#[derive(Debug)]
pub struct Seat {
    handle: Option<WorkerHandle>,
    shared: Arc<WorkerShared>,
    /// What it counts of the uplink.
    pub uplink: Arc<UplinkShared>,
    /// What it counts of frames for ports it does not have.
    strays: Arc<PortShared>,
    /// What the clock's ticks have seen of it.
    pub watched: WatchedWorker,
    /// How pressed it was in the last second, 0 to 1: how busy, or 1 if its part of the
    /// uplink's ring was full, as it may have had no CPU to be busy on.
    pub pressure: f64,
    /// Frames that found its ring full, before.
    overruns: u64,
    /// Its beats.
    pub heartbeat: Heartbeat,
    /// The CPU it is bound to.
    pub cpu: Option<usize>,
}

/// All workers.
#[derive(Debug)]
pub struct Workers(Vec<Seat>);

/// How each worker's thread has begun, once it has.
#[derive(Debug)]
pub struct Beginning(Vec<Receiver<Result<(), ConfineError>>>);

impl Beginning {
    /// Waits until every worker is confined: before that it gets no device.
    ///
    /// # Errors
    /// [`StartError`] if one cannot be.
    pub fn wait(self) -> Result<(), StartError> {
        // The other end goes only with the thread.
        self.0.into_iter().try_for_each(|told| told.recv().unwrap_or(Ok(()))).map_err(Into::into)
    }
}

impl Workers {
    /// Starts a worker for each of `cpus`, to which it is bound if one is named, with the
    /// ports that are its own. They confine themselves meanwhile.
    ///
    /// # Errors
    /// [`StartError`] if one cannot be started.
    pub fn start(
        cpus: &[Option<usize>],
        config: &Config,
        ports: &Ports,
        abilities: Abilities,
    ) -> Result<(Self, Beginning), StartError> {
        let table = Arc::new(config.table.clone());
        let mut beginning = Vec::with_capacity(cpus.len());
        let seats = cpus.iter().enumerate().map(|(number, cpu)| {
            let uplink = Arc::<UplinkShared>::default();
            let strays = Arc::new(PortShared::elsewhere());
            // At the start positions are in the order of the configuration.
            let shared = ports.iter().map(|(_, port)| {
                Arc::clone(if port.worker == number { &port.shared } else { &strays })
            });
            let (worker, commands, notices) = Worker::new(
                Arc::clone(&table),
                Arc::clone(&uplink),
                shared,
                abilities,
                config.poll,
            )?;
            let (tell, told) = bounded(1);
            let (sandbox, cpu) = (config.sandbox, *cpu);
            let begin = move || drop(tell.send(begin_worker(sandbox, cpu)));
            let name =
                if cpus.len() == 1 { "worker".to_owned() } else { format!("worker-{number}") };
            let handle = worker.named(name).spawn(commands, notices, begin)?;
            beginning.push(told);
            Ok(Seat {
                shared: Arc::clone(&handle.shared),
                handle: Some(handle),
                uplink,
                strays,
                watched: WatchedWorker::default(),
                pressure: 0.0,
                overruns: 0,
                heartbeat: Heartbeat::new(sd_notify::watchdog_enabled(), Instant::now()),
                cpu,
            })
        });
        let seats = seats.collect::<Result<_, StartError>>()?;
        Ok((Self(seats), Beginning(beginning)))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// All of them, by number.
    pub fn iter(&self) -> impl Iterator<Item = &Seat> {
        self.0.iter()
    }

    /// All of them, by number.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut Seat> {
        self.0.iter_mut()
    }

    /// Tells one.
    pub fn send(&self, worker: usize, command: Command) {
        if let Some(handle) = self.0.get(worker).and_then(|seat| seat.handle.as_ref()) {
            handle.send(command);
        }
    }

    /// Tells all.
    pub fn send_all(&self, mut command: impl FnMut() -> Command) {
        for worker in 0..self.len() {
            self.send(worker, command());
        }
    }

    /// Tells all of a new port, which is this one's.
    pub fn add(&self, position: PortIndex, worker: usize, shared: &Arc<PortShared>) {
        for (number, seat) in self.0.iter().enumerate() {
            let place = if number == worker { shared } else { &seat.strays };
            self.send(number, Command::Add(position, Arc::clone(place)));
        }
    }

    /// Tells what is known of the uplink.
    pub fn publish_uplink(&self, link: Option<&LinkState>) {
        for seat in &self.0 {
            publish(&seat.uplink.link, link);
        }
    }

    /// The uplink's state, as told.
    pub fn uplink_state(&self) -> DeviceState {
        self.0.first().map_or(DeviceState::Absent, |seat| seat.uplink.link.state())
    }

    /// What all have counted of the uplink.
    pub fn uplink_flow(&self) -> FlowSnapshot {
        let mut sum = FlowSnapshot::default();
        for seat in &self.0 {
            sum.add(&seat.uplink.from_wire.snapshot());
            let strays = seat.strays.to_guest.snapshot();
            // To its worker they were a port's like any other, and have gone nowhere.
            sum.out_frames = sum.out_frames.saturating_sub(strays.in_frames);
            sum.out_bytes = sum.out_bytes.saturating_sub(strays.in_bytes);
            for (sum, frames) in sum.drops.iter_mut().zip(strays.drops) {
                *sum += frames;
            }
        }
        sum
    }

    /// The highest fill of an uplink ring since the last call, in thousandths.
    pub fn take_ring_peak(&self) -> u32 {
        self.0.iter().map(|seat| seat.uplink.ring_peak.take()).max().unwrap_or(0)
    }

    /// Looks how busy each has been since the last look.
    pub fn look(&mut self, now: Instant) {
        for seat in &mut self.0 {
            seat.watched.look(&seat.shared, now);
            let overruns = seat.uplink.from_wire.overruns();
            let more = overruns > std::mem::replace(&mut seat.overruns, overruns);
            seat.pressure = if more { 1.0 } else { seat.watched.load };
        }
    }

    /// Calls off a move that a worker has not answered.
    fn call_off(&self, worker: usize, number: u64) {
        if let Some(seat) = self.0.get(worker) {
            seat.shared.call_off(number);
        }
    }

    /// Ends all by this command; returns the devices they had, by worker.
    pub fn end(&mut self, command: impl Fn() -> Command) -> Vec<Vec<Departed>> {
        self.send_all(command);
        let handles = self.0.iter_mut().map(|seat| seat.handle.take());
        handles.map(|handle| handle.map(WorkerHandle::join).unwrap_or_default()).collect()
    }

    /// What a worker says until the deadline.
    fn next_notice(&self, worker: usize, deadline: Instant) -> Option<Notice> {
        let handle = self.0.get(worker)?.handle.as_ref()?;
        let notice = handle.notices.recv_deadline(deadline).ok();
        if notice.is_none() {
            warn!("worker {worker} does not answer");
        }
        notice
    }

    /// What a worker has said.
    fn notice(&self, worker: usize) -> Option<Notice> {
        self.0.get(worker)?.handle.as_ref()?.notices.try_recv().ok()
    }
}

/// The start of a worker's thread: its CPU, and its confinement.
fn begin_worker(sandbox: SandboxMode, cpu: Option<usize>) -> Result<(), ConfineError> {
    if let Some(cpu) = cpu
        && let Err(errno) = affinity::bind(&[cpu])
    {
        warn!("a worker cannot be bound to CPU {cpu}: {errno}");
    }
    privileges::confine_worker(sandbox)
}

/// Gives each port a worker, the one it had `before` if any, and steers its frames there if
/// there are several.
///
/// # Errors
/// [`StartError`] if the program that steers cannot be loaded.
pub fn place_ports(
    ports: &mut Ports,
    workers: usize,
    before: &[Option<usize>],
) -> Result<Option<Steering>, StartError> {
    let steering = if workers > 1 { Some(Steering::new()?) } else { None };
    let memberships = ports.memberships();
    let groups = placement::groups(&[&memberships]);
    let present = vec![true; groups.len()];
    let placed = placement::place(&groups, before, &present, &vec![true; workers]);
    for (position, port) in ports.iter_mut() {
        port.worker = placed.get(position).copied().unwrap_or(0);
        steer(steering.as_ref(), &port.config.membership, port.worker);
    }
    Ok(steering)
}

impl Seat {
    /// Beats it has answered.
    pub fn beats(&self) -> u64 {
        self.shared.beats()
    }

    /// Whether it owes an answer.
    pub fn is_silent(&self, now: Instant) -> bool {
        self.heartbeat.is_silent(self.beats(), now)
    }
}

fn steer(steering: Option<&Steering>, membership: &Membership, worker: usize) {
    let Some(steering) = steering else { return };
    for key in placement::keys(membership) {
        let result = match key {
            Key::Tagged(tpid, vid) => steering.set(tpid.index(), vid.get(), worker as u32),
            Key::Untagged => steering.set_untagged(worker as u32),
        };
        if let Err(error) = result {
            warn!("{error}");
        }
    }
}

impl Daemon {
    /// Sends the frames of a port to this worker.
    pub(super) fn steer(&self, membership: &Membership, worker: usize) {
        steer(self.uplink.steering.as_ref(), membership, worker);
    }

    /// Tells the worker of a port.
    pub(super) fn command_for(&self, position: PortIndex, command: Command) {
        if let Some(port) = self.ports.get(position) {
            self.workers.send(port.worker, command);
        }
    }

    /// Gives each device to the worker of its port, and each worker its part of the uplink:
    /// one command for each worker.
    pub(super) fn attach_devices(&self, ports: Vec<(PortIndex, Box<Device>)>, uplink: Vec<Device>) {
        let mut theirs: Vec<Vec<_>> = self.workers.iter().map(|_| Vec::new()).collect();
        for (position, device) in ports {
            let worker = self.ports.get(position).map_or(0, |port| port.worker);
            if let Some(theirs) = theirs.get_mut(worker) {
                theirs.push((Some(position), device));
            }
        }
        for (theirs, part) in theirs.iter_mut().zip(uplink) {
            theirs.push((None, Box::new(part)));
        }
        for (worker, devices) in theirs.into_iter().enumerate() {
            if !devices.is_empty() {
                self.workers.send(worker, Command::Attach(devices));
            }
        }
    }

    /// Tells workers to give devices back (`None`: all of the uplink's).
    pub(super) fn ask_back(&mut self, ports: &[Option<PortIndex>]) {
        for port in ports {
            match port {
                Some(position) => {
                    if let Some(port) = self.ports.get_mut(*position) {
                        port.under_way = None;
                    }
                    self.command_for(*position, Command::Detach(*port));
                }
                None => self.workers.send_all(|| Command::Detach(None)),
            }
        }
    }

    /// Waits for devices that were asked back; those that do not come are
    /// [late](Daemon::is_late) until they do.
    pub(super) fn await_departures(&mut self, ports: &[Option<PortIndex>]) -> Vec<Device> {
        let mut devices = Vec::with_capacity(ports.len());
        let deadline = Instant::now() + PATIENCE + DRAIN_PATIENCE * ports.len() as u32;
        for worker in 0..self.workers.len() {
            let theirs = ports.iter().copied().filter(|port| match port {
                None => true,
                Some(position) => {
                    self.ports.get(*position).is_some_and(|port| port.worker == worker)
                }
            });
            let mut missing: HashSet<Option<PortIndex>> = theirs.collect();
            while !missing.is_empty() {
                match self.workers.next_notice(worker, deadline) {
                    None => {
                        self.late.extend(missing.drain().map(|port| (worker, port)));
                    }
                    Some(Notice::Departed(departed))
                        if departed.error.is_none() && missing.remove(&departed.port) =>
                    {
                        devices.extend(departed.device.map(|device| *device));
                    }
                    Some(other) => self.take_notice(worker, other),
                }
            }
        }
        devices
    }

    /// Whether a worker may still have a device that was asked back: opened once more, it
    /// would bring frames twice.
    pub(super) fn is_late(&self, port: Option<PortIndex>) -> bool {
        self.late.iter().any(|(_, late)| *late == port)
    }

    /// Has all workers decide by this table; to be followed by [`Daemon::await_switch`].
    pub(super) fn switch_tables(&mut self, table: Table) {
        self.tables += 1;
        let (number, table) = (self.tables, Arc::new(table));
        self.workers.send_all(|| Command::Switch(number, Arc::clone(&table)));
    }

    /// Waits until all decide by the latest table; false if one does not yet.
    pub(super) fn await_switch(&mut self) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let number = self.tables;
        let mut all = true;
        for worker in 0..self.workers.len() {
            let notice = self.await_notice(
                worker,
                deadline,
                |notice| matches!(notice, Notice::Switched(other) if *other == number),
            );
            all &= notice.is_some();
        }
        all
    }

    /// Waits for this notice of a worker.
    fn await_notice(
        &mut self,
        worker: usize,
        deadline: Instant,
        wanted: impl Fn(&Notice) -> bool,
    ) -> Option<Notice> {
        while let Some(notice) = self.workers.next_notice(worker, deadline) {
            if wanted(&notice) {
                return Some(notice);
            }
            self.take_notice(worker, notice);
        }
        None
    }

    /// Takes what the workers had to say since the last look.
    pub(super) fn take_notices(&mut self) {
        for worker in 0..self.workers.len() {
            while let Some(notice) = self.workers.notice(worker) {
                self.take_notice(worker, notice);
            }
        }
    }

    fn take_notice(&mut self, worker: usize, notice: Notice) {
        let Departed { port, error, device } = match notice {
            Notice::Departed(departed) => departed,
            // Later than it was waited for.
            Notice::Given(number, ports) => return self.pass_on(number, ports),
            Notice::Switched(_) | Notice::Held(_) => return,
        };
        drop(device);
        let Some(error) = error else {
            // Later than it was waited for.
            self.late.remove(&(worker, port));
            return;
        };
        match port {
            None => self.uplink_failed(&error),
            Some(position) => self.port_failed(position, &error),
        }
    }

    /// Gives ports that left their worker later than it was waited for to the one they
    /// belong to: that one, as the move was called off.
    fn pass_on(&mut self, number: u64, ports: Vec<(PortIndex, Slot)>) {
        for (position, mut slot) in ports {
            // Another port may be there by now: what this one had is closed here.
            let port = self.ports.get_mut(position).filter(|port| slot.belongs_to(&port.shared));
            let Some(port) = port else { continue };
            if port.under_way.take() != Some(number) {
                // Asked back since.
                drop(slot.take_device());
            }
            self.workers.send(port.worker, Command::Take(number, vec![(position, slot)]));
        }
    }

    /// Moves ports from one worker to another: each of their flows stays in order, and no
    /// frame is lost if both answer at once. A port's group must be among them, whole.
    ///
    /// # Errors
    /// [`StartError::Silent`]: all is as before.
    pub(super) fn move_ports(
        &mut self,
        ports: &[PortIndex],
        from: usize,
        to: usize,
    ) -> Result<(), StartError> {
        let strays = self.workers.0.get(from).map(|seat| Arc::clone(&seat.strays));
        let Some(strays) = strays.filter(|_| from != to && !ports.is_empty()) else {
            return Ok(());
        };
        if let Some(stuck) = [from, to].into_iter().find(|worker| self.is_stuck(*worker)) {
            return Err(StartError::Silent(stuck));
        }
        self.moves += 1;
        let number = self.moves;
        self.workers.send(to, Command::Hold(number));
        let held = |notice: &Notice| matches!(notice, Notice::Held(other) if *other == number);
        let deadline = Instant::now() + MOVE_PATIENCE;
        if self.await_notice(to, deadline, held).is_none() {
            // Nothing has been steered yet.
            self.workers.send(to, Command::Take(number, Vec::new()));
            return Err(StartError::Silent(to));
        }
        self.assign(ports, to);
        self.workers.send(from, Command::Give(number, ports.to_vec(), strays));
        let given = |notice: &Notice| matches!(notice, Notice::Given(other, _) if *other == number);
        let deadline = Instant::now() + MOVE_PATIENCE;
        if let Some(Notice::Given(_, ports)) = self.await_notice(from, deadline, given) {
            self.workers.send(to, Command::Take(number, ports));
            return Ok(());
        }
        self.workers.call_off(from, number);
        self.assign(ports, from);
        for position in ports {
            if let Some(port) = self.ports.get_mut(*position) {
                // It may be about to give them: they go back when it has.
                port.under_way = Some(number);
            }
        }
        self.workers.send(to, Command::Take(number, Vec::new()));
        Err(StartError::Silent(from))
    }

    /// Whether a worker was found not to answer, and has not since.
    fn is_stuck(&self, worker: usize) -> bool {
        let seat = self.workers.0.get(worker);
        seat.is_some_and(|seat| seat.heartbeat.is_stuck() && seat.is_silent(Instant::now()))
    }

    /// Makes ports a worker's, and sends their frames there.
    fn assign(&mut self, ports: &[PortIndex], worker: usize) {
        for position in ports {
            if let Some(port) = self.ports.get_mut(*position) {
                port.worker = worker;
                steer(self.uplink.steering.as_ref(), &port.config.membership, worker);
            }
        }
        std::thread::sleep(STRAGGLER_TIME);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::indexing_slicing, reason = "tests fail by panicking")]
    use super::*;
    use crate::switch::DropReason;

    fn seat() -> Seat {
        Seat {
            handle: None,
            shared: Arc::default(),
            uplink: Arc::default(),
            strays: Arc::default(),
            watched: WatchedWorker::default(),
            pressure: 0.0,
            overruns: 0,
            heartbeat: Heartbeat::new(None, Instant::now()),
            cpu: None,
        }
    }

    #[test]
    fn strays_are_the_uplinks_drops() {
        let workers = Workers(vec![seat(), seat()]);
        for (seat, strays) in workers.iter().zip([3, 1]) {
            seat.uplink.from_wire.add_in(100, 6000);
            seat.uplink.from_wire.add_drops(DropReason::UnmappedVlan, 10);
            seat.uplink.from_wire.add_out(90, 5400);
            seat.strays.to_guest.add_in(strays, strays * 60);
            seat.strays.to_guest.add_drops(DropReason::WrongWorker, strays);
        }
        let flow = workers.uplink_flow();
        assert_eq!((flow.in_frames, flow.in_bytes), (200, 12_000));
        assert_eq!((flow.out_frames, flow.out_bytes), (176, 10_560));
        assert_eq!(flow.drops[DropReason::WrongWorker.index()], 4);
        assert_eq!(flow.in_frames, flow.out_frames + flow.dropped());
    }
}
