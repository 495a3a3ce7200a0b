//! One capture: a thread that takes records from the worker, filters them and
//! writes pcapng, until its reader, its limit or control ends it.
//!
//! What has been read from the channel is written out whenever the channel is empty,
//! so a reader by pipe sees a frame at once. With nothing to read the thread looks
//! ten times a second whether its reader is still there. It waits for nobody but the
//! reader; what the worker cannot record meanwhile is counted as missed, in the file
//! and in the [`Summary`].

use super::filter::Program;
use super::names::Names;
use super::order::Order;
use super::output::{Output, Reader};
use super::pcapng::{Statistics, Writer};
use crate::dataplane::{Chunk, Place, Record, Source};
use crate::switch::PortIndex;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

/// How often the reader is looked at when nothing comes.
const LOOK: Duration = Duration::from_millis(100);

/// What a session does with the frames it gets.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the capture looks: described in the file even if no frame comes.
    pub place: Place,
    /// Which frames to keep; all without.
    pub filter: Option<Program>,
    /// The most bytes kept of a frame, as the sink was told.
    pub snaplen: u32,
    /// After how many frames to end; after 0, at once.
    pub limit: Option<u64>,
    /// Whether records come from several workers, and have to be put in order.
    pub several_workers: bool,
}

/// Why a session ended.
#[derive(Debug)]
pub enum End {
    /// The limit is reached.
    Limit,
    /// Control, or the reader by closing its sending direction, asked for it.
    Asked,
    /// The reader is gone.
    ReaderGone,
    /// The worker let go: the switch stops, or serves as many captures as it can.
    WorkerGone,
    /// Writing failed.
    Failed(io::Error),
}

/// What came of a session.
#[derive(Debug)]
pub struct Summary {
    /// Why it ended.
    pub end: End,
    /// Frames taken from the worker.
    pub taken: u64,
    /// Frames written: those the filter kept.
    pub written: u64,
    /// Frames missed because the reader or this thread was too slow.
    pub missed: u64,
}

/// A running capture, from control's side. Dropping it ends the capture and waits
/// for nothing.
#[derive(Debug)]
pub struct Session {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Summary>>,
    /// Disconnected when the thread has ended, its output closed.
    ended: Receiver<Infallible>,
}

/// A capture with all it needs but its reader. Dropping it ends it.
#[derive(Debug)]
pub struct Prepared<W> {
    session: Session,
    output: Sender<W>,
}

impl<W> Prepared<W> {
    /// Starts the capture: it writes to `output`, which is set non-blocking and
    /// closed at the end.
    pub fn start(self, output: W) -> Session {
        // There is room for the one, and the thread waits for it.
        let _ = self.output.send(output);
        self.session
    }
}

impl Session {
    /// Starts a thread that is to write what comes from `source`, once it is told
    /// where to.
    ///
    /// # Errors
    /// The kernel's: no thread left.
    pub fn prepare<W>(source: Source, names: Names, options: Options) -> io::Result<Prepared<W>>
    where
        W: Write + AsFd + Send + 'static,
    {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let (output, reader) = bounded::<W>(1);
        let (running, ended) = bounded(0);
        let thread = std::thread::Builder::new().name("capture".into()).spawn(move || {
            let _running = running;
            let mut tally = Tally::default();
            let end = reader
                .recv()
                .map_err(|_| io::ErrorKind::BrokenPipe.into())
                .and_then(|output| Output::new(output, Arc::clone(&stopped)))
                .and_then(|output| run(&source, names, &options, output, &stopped, &mut tally))
                .unwrap_or_else(End::of);
            let Tally { taken, written, .. } = tally;
            Summary { end, taken, written, missed: source.missed_in_all() }
        })?;
        let session = Self { stop, thread: Some(thread), ended };
        Ok(Prepared { session, output })
    }

    /// Asks the session to write what has been recorded, and the statistics, and to
    /// end; a reader that does not read is given a second.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Whether it has ended, so that [`Session::join`] does not wait.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits for the end, but no longer than this; whether it came.
    pub fn wait(&self, deadline: Instant) -> bool {
        self.ended.recv_deadline(deadline) == Err(RecvTimeoutError::Disconnected)
    }

    /// Waits for the end.
    pub fn join(mut self) -> Summary {
        let lost = |_| Summary {
            end: End::Failed(io::Error::other("the capture's thread died")),
            taken: 0,
            written: 0,
            missed: 0,
        };
        match self.thread.take().map(JoinHandle::join) {
            Some(result) => result.unwrap_or_else(lost),
            None => lost(Box::new(())),
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.stop();
    }
}

impl End {
    fn of(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Self::ReaderGone,
            // Only told to stop does the output give up.
            io::ErrorKind::TimedOut => Self::Asked,
            _ => Self::Failed(error),
        }
    }
}

/// What has been done so far.
#[derive(Debug, Default)]
struct Tally {
    taken: u64,
    written: u64,
    interfaces: BTreeMap<Option<PortIndex>, Interface>,
}

/// An interface as the file knows it.
#[derive(Debug, Default)]
struct Interface {
    id: u32,
    taken: u64,
    written: u64,
    missed: u64,
}

impl Interface {
    /// Frames missed since the last record, when a record says how many there were in all.
    fn newly_missed(&mut self, in_all: u64) -> u64 {
        // Less than before: the record of another worker, made earlier.
        let missed = in_all.saturating_sub(self.missed);
        self.missed += missed;
        missed
    }
}

fn run<W: Write + AsFd>(
    source: &Source,
    names: Names,
    options: &Options,
    output: Output<W>,
    stop: &AtomicBool,
    tally: &mut Tally,
) -> io::Result<End> {
    let start = now();
    let mut file = File::new(output, names, options)?;
    match options.place {
        Place::Port(port) => drop(file.interface(tally, Some(port))?),
        Place::Uplink => drop(file.interface(tally, None)?),
        Place::Everywhere => {}
    }
    file.writer.flush()?;
    let end = file.copy(source, stop, tally)?;
    for (at, interface) in &tally.interfaces {
        let missed = source.missed(*at);
        let statistics = Statistics {
            span: (start, now()),
            selected: interface.taken + missed,
            missed,
            written: interface.written,
        };
        file.writer.statistics(interface.id, statistics)?;
    }
    file.writer.flush()?;
    Ok(end)
}

/// Nanoseconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos() as u64
}

/// The file on its way.
struct File<'o, W: Write + AsFd> {
    writer: Writer<Output<W>>,
    options: &'o Options,
    names: Names,
    version: u64,
    /// Interfaces described, by name: a port that comes back is the same.
    described: HashMap<Arc<str>, u32>,
}

impl<'o, W: Write + AsFd> File<'o, W> {
    fn new(output: Output<W>, names: Names, options: &'o Options) -> io::Result<Self> {
        let writer = Writer::new(output, options.snaplen)?;
        let version = names.version();
        Ok(Self { writer, options, names, version, described: HashMap::new() })
    }

    /// Copies records until something ends it.
    fn copy(&mut self, source: &Source, stop: &AtomicBool, tally: &mut Tally) -> io::Result<End> {
        let mut asked = false;
        let mut order = self.options.several_workers.then(Order::default);
        let end = loop {
            if self.is_full(tally) {
                return Ok(End::Limit);
            }
            // When asked to end, the worker hands over what it still has and lets go.
            // One that sleeps has nothing, and does not answer either.
            if !asked && stop.load(Ordering::Relaxed) {
                asked = true;
                source.close();
            }
            // Once asked, what is still to come is soon here, and then all goes out.
            let waiting = order.as_ref().filter(|_| !asked);
            let wait = waiting.and_then(|order| order.wait(Instant::now())).unwrap_or(LOOK);
            match source.receive(wait.min(LOOK)) {
                Ok(chunk) => {
                    match &mut order {
                        Some(order) => order.push(&chunk, Instant::now()),
                        None => self.write(&chunk, tally)?,
                    }
                    source.give_back(chunk);
                    if order.is_none() && source.is_empty() {
                        self.writer.flush()?;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    break if asked { End::Asked } else { End::WorkerGone };
                }
                Err(RecvTimeoutError::Timeout) if asked => break End::Asked,
                Err(RecvTimeoutError::Timeout) => {}
            }
            if let Some(order) = &mut order
                && !asked
            {
                self.write_due(order, false, tally)?;
            }
            match self.writer.get_ref().reader() {
                Reader::There => {}
                Reader::Done => stop.store(true, Ordering::Relaxed),
                Reader::Gone => return Ok(End::ReaderGone),
            }
        };
        if let Some(order) = &mut order {
            self.write_due(order, true, tally)?;
        }
        Ok(end)
    }

    /// Writes the records whose turn it is, up to the limit.
    fn write_due(&mut self, order: &mut Order, all: bool, tally: &mut Tally) -> io::Result<()> {
        let before = tally.taken;
        order.each_due(Instant::now(), all, |record| {
            self.record(record, tally)?;
            Ok::<_, io::Error>(!self.is_full(tally))
        })?;
        if tally.taken > before { self.writer.flush() } else { Ok(()) }
    }

    fn is_full(&self, tally: &Tally) -> bool {
        self.options.limit.is_some_and(|limit| tally.written >= limit)
    }

    /// Writes the frames of a chunk that the filter keeps, up to the limit.
    fn write(&mut self, chunk: &Chunk, tally: &mut Tally) -> io::Result<()> {
        for record in chunk.records() {
            self.record(&record, tally)?;
            if self.is_full(tally) {
                break;
            }
        }
        Ok(())
    }

    fn record(&mut self, record: &Record<'_>, tally: &mut Tally) -> io::Result<()> {
        tally.taken += 1;
        let filter = self.options.filter.as_ref();
        let keep = filter.map_or(u32::MAX, |filter| filter.run(record.bytes, record.length));
        let version = self.names.version();
        if version != self.version {
            self.version = version;
            self.rename(tally)?;
        }
        let interface = self.interface(tally, record.interface)?;
        interface.taken += 1;
        if keep == 0 {
            return Ok(());
        }
        let missed = interface.newly_missed(record.missed);
        interface.written += 1;
        let id = interface.id;
        tally.written += 1;
        self.writer.frame(id, record, keep, missed)
    }

    /// The interface, described in the file before its first use.
    fn interface<'t>(
        &mut self,
        tally: &'t mut Tally,
        at: Option<PortIndex>,
    ) -> io::Result<&'t mut Interface> {
        use std::collections::btree_map::Entry;
        match tally.interfaces.entry(at) {
            Entry::Occupied(entry) => Ok(entry.into_mut()),
            Entry::Vacant(entry) => {
                let id = self.describe(at)?;
                Ok(entry.insert(Interface { id, ..Interface::default() }))
            }
        }
    }

    fn describe(&mut self, at: Option<PortIndex>) -> io::Result<u32> {
        let name = self.names.get(at);
        if let Some(id) = self.described.get(&name) {
            return Ok(*id);
        }
        let id = self.writer.interface(&name)?;
        self.described.insert(name, id);
        Ok(id)
    }

    /// Names have changed: from now on those known are called by their new ones.
    fn rename(&mut self, tally: &mut Tally) -> io::Result<()> {
        for (at, interface) in &mut tally.interfaces {
            interface.id = self.describe(*at)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With several workers records come in the order of the workers' chunks.
    #[test]
    fn each_missed_frame_is_told_once() {
        let mut interface = Interface::default();
        let told = [3, 5, 4, 6].map(|in_all| interface.newly_missed(in_all));
        assert_eq!(told, [3, 2, 0, 1]);
    }
}
