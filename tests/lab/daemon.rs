//! The daemon as a child process: start, watch, ask, stop.

use super::{Namespace, Summary, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The binary under test; `VLANSWITCHD` names another one to compare with.
pub fn binary() -> String {
    std::env::var("VLANSWITCHD").unwrap_or_else(|_| env!("CARGO_BIN_EXE_vlanswitchd").to_owned())
}

/// One worker, whatever the machine has, unless the test says otherwise or all are to run
/// with several: `VLANSWITCHD_WORKERS=2`. Likewise the packet path, and all are to run on the
/// other one: `VLANSWITCHD_DATAPATH=auto`.
pub fn add_workers(command: &mut Command, arguments: &[&str]) {
    if !arguments.contains(&"--datapath") {
        command.args(["--datapath", &datapath()]);
    }
    if !arguments.contains(&"--workers") {
        let workers = std::env::var("VLANSWITCHD_WORKERS").unwrap_or_else(|_| "1".to_owned());
        command.args(["--workers", &workers]);
    }
}

/// The datapath tests are run on that do not ask for one.
pub fn datapath() -> String {
    std::env::var("VLANSWITCHD_DATAPATH").unwrap_or_else(|_| "packet".to_owned())
}

/// Lines of one output stream, collected as they come.
struct Lines {
    lines: Arc<Mutex<Vec<String>>>,
    reader: Option<JoinHandle<()>>,
}

impl Lines {
    fn of(stream: impl Read + Send + 'static) -> Self {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&lines);
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                sink.lock().unwrap().push(line);
            }
        });
        Self { lines, reader: Some(reader) }
    }

    fn all(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// All lines once the stream has ended.
    fn finish(&mut self) -> Vec<String> {
        if let Some(reader) = self.reader.take() {
            reader.join().unwrap();
        }
        self.all()
    }
}

/// A running daemon, killed when dropped.
pub struct Daemon {
    child: Child,
    stdout: Lines,
    stderr: Lines,
    /// From the start of the process to its `forwarding:` line.
    pub started_in: Duration,
    /// The `forwarding:` line.
    pub greeting: String,
}

/// How a daemon ended that was told to.
pub struct Stopped {
    /// How it exited.
    pub status: ExitStatus,
    /// From the signal to its end.
    pub stopped_in: Duration,
    /// Its last counters.
    pub summary: Summary,
    /// All it wrote to standard error.
    pub stderr: Vec<String>,
    /// All it wrote to standard output.
    pub stdout: Vec<String>,
}

impl Daemon {
    /// Starts it with exactly these arguments and waits for its `forwarding:` line.
    pub fn start(namespace: &Namespace, arguments: &[&str]) -> Self {
        Self::start_program(namespace, &[], &binary(), arguments)
    }

    /// The same with another binary, through `wrapper`.
    pub fn start_program(
        namespace: &Namespace,
        wrapper: &[&str],
        program: &str,
        arguments: &[&str],
    ) -> Self {
        let mut command = namespace.command_through(wrapper, program);
        command.args(arguments);
        // Namespaces share the file system: each would find the usual socket taken.
        if !arguments.contains(&"--control") {
            command.args(["--control", "none"]);
        }
        add_workers(&mut command, arguments);
        Self::start_command(command)
    }

    /// Starts it by this command and waits for its `forwarding:` line.
    pub fn start_command(mut command: Command) -> Self {
        let started = Instant::now();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the daemon starts");
        // With what it holds for the child.
        drop(command);
        let stdout = Lines::of(child.stdout.take().unwrap());
        let stderr = Lines::of(child.stderr.take().unwrap());
        let mut daemon =
            Self { child, stdout, stderr, started_in: Duration::ZERO, greeting: String::new() };
        daemon.greeting = eventually("the daemon says `forwarding: ...`", || {
            if let Ok(Some(status)) = daemon.child.try_wait() {
                panic!("the daemon ended with {status}: {:?}", daemon.stderr.finish());
            }
            let lines = daemon.stdout.all();
            lines.into_iter().find(|line| line.starts_with("forwarding: "))
        });
        daemon.started_in = started.elapsed();
        daemon
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it has ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("try_wait")
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).expect("the daemon runs");
    }

    /// Waits for a line of its log with all of these words.
    pub fn says(&self, words: &[&str]) {
        eventually(&format!("it says {words:?}"), || {
            let lines = self.stderr();
            lines.iter().any(|line| words.iter().all(|word| line.contains(word))).then_some(())
        });
    }

    /// Its counters now (SIGUSR1).
    pub fn summary(&self) -> Summary {
        let count =
            |lines: Vec<String>| lines.iter().filter_map(|line| Summary::read(line)).count();
        let before = count(self.stdout.all());
        self.signal(Signal::SIGUSR1);
        eventually("a summary after SIGUSR1", || {
            self.stdout.all().iter().filter_map(|line| Summary::read(line)).nth(before)
        })
    }

    /// Waits until its counters satisfy `condition`.
    pub fn until(&self, what: &str, condition: impl Fn(&Summary) -> bool) -> Summary {
        eventually(what, || Some(self.summary()).filter(&condition))
    }

    /// Waits until its counters stand still.
    pub fn settled(&self) -> Summary {
        let mut last: Option<Summary> = None;
        eventually("all frames have gone their way", || {
            let now = self.summary();
            let before = last.replace(now.clone())?;
            let still = before.from_wire == now.from_wire && before.to_wire == now.to_wire;
            still.then_some(now)
        })
    }

    /// Waits until these ports are `attached`.
    pub fn attached(&self, ports: &[&str]) {
        self.until(&format!("{ports:?} are attached"), |summary| {
            ports.iter().all(|port| summary.port(port).state == "attached")
        });
    }

    /// What it has written to standard error so far.
    pub fn stderr(&self) -> Vec<String> {
        self.stderr.all()
    }

    /// What it has written to standard output so far.
    pub fn stdout(&self) -> Vec<String> {
        self.stdout.all()
    }

    /// Stops it by SIGTERM; fails the test unless it exits with 0 and accounts
    /// for every frame.
    pub fn stop(self) -> Summary {
        let stopped = self.stop_by(Signal::SIGTERM);
        assert!(stopped.status.success(), "{}: {:?}", stopped.status, stopped.stderr);
        stopped.summary.assert_conserved();
        stopped.summary
    }

    /// Stops it by this signal.
    pub fn stop_by(mut self, signal: Signal) -> Stopped {
        let begin = Instant::now();
        self.signal(signal);
        let status = eventually("the daemon ends", || self.child.try_wait().expect("try_wait"));
        let stopped_in = begin.elapsed();
        let (stdout, stderr) = (self.stdout.finish(), self.stderr.finish());
        let summary = stdout.iter().rev().find_map(|line| Summary::read(line));
        let summary = summary.unwrap_or_else(|| panic!("no summary in {stdout:?}; {stderr:?}"));
        Stopped { status, stopped_in, summary, stderr, stdout }
    }

    /// Processor time all its threads use in the coming `window`, in nanoseconds.
    pub fn cpu_nanoseconds_in(&self, window: Duration) -> u64 {
        let before = self.cpu_nanoseconds();
        std::thread::sleep(window);
        self.cpu_nanoseconds() - before
    }

    fn cpu_nanoseconds(&self) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.id())).expect("it runs");
        let time = |task: fs::DirEntry| -> u64 {
            let text = fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            text.split(' ').next().and_then(|time| time.parse().ok()).unwrap_or(0)
        };
        tasks.flatten().map(time).sum()
    }

    /// Memory it holds (RSS, shared rings included), in bytes.
    pub fn resident_bytes(&self) -> u64 {
        self.status_bytes("VmRSS:")
    }

    /// The memory that is its own: without the rings, which come and go with devices.
    pub fn anonymous_bytes(&self) -> u64 {
        self.status_bytes("RssAnon:")
    }

    fn status_bytes(&self, key: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).expect("it runs");
        let line = status.lines().find(|line| line.starts_with(key)).expect("memory");
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib * 1024
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("the daemon's standard error:\n{}", self.stderr.finish().join("\n"));
        }
    }
}

/// A daemon that gave up.
#[derive(Debug)]
pub struct Failure {
    /// Exit code.
    pub code: Option<i32>,
    /// All of standard output.
    pub stdout: String,
    /// All of standard error.
    pub stderr: String,
}

impl Failure {
    /// Runs the daemon until it ends.
    pub fn of(namespace: &Namespace, arguments: &[&str]) -> Self {
        Self::of_program(namespace, &[], &binary(), arguments)
    }

    /// The same with another binary, through `wrapper`.
    pub fn of_program(
        namespace: &Namespace,
        wrapper: &[&str],
        program: &str,
        arguments: &[&str],
    ) -> Self {
        let mut command = namespace.command_through(wrapper, program);
        if arguments.contains(&"--uplink") && !arguments.contains(&"--datapath") {
            command.args(["--datapath", &datapath()]);
        }
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the daemon starts");
        let mut stdout = Lines::of(child.stdout.take().unwrap());
        let mut stderr = Lines::of(child.stderr.take().unwrap());
        let deadline = Instant::now() + super::PATIENCE;
        let status = loop {
            match child.try_wait().expect("try_wait") {
                Some(status) => break Some(status),
                None if Instant::now() > deadline || !stdout.all().is_empty() => break None,
                None => std::thread::sleep(Duration::from_millis(3)),
            }
        };
        let Some(status) = status.or_else(|| child.try_wait().expect("try_wait")) else {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{arguments:?} was not refused: {:?} {:?}", stdout.finish(), stderr.finish());
        };
        Self {
            code: status.code(),
            stdout: stdout.finish().join("\n"),
            stderr: stderr.finish().join("\n"),
        }
    }
}
