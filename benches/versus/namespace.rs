//! Network namespaces that vanish with the harness.
//!
//! Each namespace is unshared by a keeper thread and has no name in the file system, so nothing
//! is left behind however the harness ends. Commands run on the keeper thread, whose namespace
//! they inherit; threads that make traffic call [`Namespace::enter`] first. Children get a parent
//! death signal, which the kernel ties to the thread that started them: the keeper, which lives
//! as long as the namespace.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns, unshare};

type Job = Box<dyn FnOnce() + Send>;

/// A network namespace with a thread that lives in it.
pub struct Namespace {
    handle: File,
    keeper_thread: i32,
    jobs: Option<Sender<Job>>,
    keeper: Option<JoinHandle<()>>,
}

impl Namespace {
    /// Makes an empty namespace with the loopback up and IPv6 off, so that no neighbour
    /// discovery frames disturb the counting.
    pub fn new() -> Result<Self> {
        let (jobs, queue) = channel::<Job>();
        let (ready, started) = channel();
        let keeper = std::thread::Builder::new().name("namespace".into()).spawn(move || {
            let opened = unshare(CloneFlags::CLONE_NEWNET)
                .map_err(anyhow::Error::from)
                .and_then(|()| Ok(File::open("/proc/thread-self/ns/net")?))
                .map(|handle| (handle, nix::unistd::gettid().as_raw()));
            if ready.send(opened).is_ok() {
                for job in queue {
                    job();
                }
            }
        })?;
        let (handle, keeper_thread) = started
            .recv()?
            .context("cannot make a network namespace: run as root (CAP_SYS_ADMIN)")?;
        let namespace = Self { handle, keeper_thread, jobs: Some(jobs), keeper: Some(keeper) };
        namespace.run(|| {
            for scope in ["all", "default"] {
                let path = format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6");
                if std::path::Path::new(&path).exists() {
                    std::fs::write(&path, "1").with_context(|| format!("cannot write {path}"))?;
                }
            }
            anyhow::Ok(())
        })??;
        namespace.command("ip link set lo up")?;
        Ok(namespace)
    }

    /// A thread id by which `ip link ... netns ID` finds this namespace.
    pub fn id(&self) -> i32 {
        self.keeper_thread
    }

    /// Runs `job` on the keeper thread and waits for its result.
    pub fn run<T: Send + 'static>(&self, job: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let (answer, result) = channel();
        let jobs = self.jobs.as_ref().context("namespace is closing")?;
        let job: Job = Box::new(move || {
            // The receiver waits below; if it is gone the harness is being torn down.
            let _ = answer.send(job());
        });
        jobs.send(job).map_err(|_| anyhow!("the namespace's thread ended"))?;
        result.recv().context("a job in a namespace panicked")
    }

    /// Moves the calling thread into this namespace.
    pub fn enter(&self) -> Result<()> {
        setns(self.handle.as_fd(), CloneFlags::CLONE_NEWNET)
            .context("cannot enter a network namespace")
    }

    /// Runs a command (words separated by blanks, no shell) here; its standard output.
    pub fn command(&self, line: &str) -> Result<String> {
        let words: Vec<String> = line.split_whitespace().map(String::from).collect();
        self.command_words(words)
    }

    /// As [`Namespace::command`], for arguments that contain blanks.
    pub fn command_words(&self, words: Vec<String>) -> Result<String> {
        let shown = words.join(" ");
        let output = self.run(move || {
            let (program, arguments) = words.split_first().context("empty command")?;
            Command::new(program)
                .args(arguments)
                .stdin(Stdio::null())
                .output()
                .with_context(|| format!("cannot run {program}"))
        })??;
        if !output.status.success() {
            bail!(
                "`{shown}` failed ({}): {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Starts a program that lives until its [`Child`] is stopped or the harness dies. It sees
    /// the `/sys` of this namespace, as a program on a real host would.
    pub fn start(
        &self,
        program: &str,
        arguments: &[String],
        out: Stdio,
        err: Stdio,
    ) -> Result<Child> {
        let program = program.to_owned();
        let arguments = arguments.to_vec();
        self.run(move || {
            Command::new("setpriv")
                .args(["--pdeathsig", "KILL", "unshare", "--mount", "sh", "-c"])
                .arg("mount -t sysfs sysfs /sys && exec \"$0\" \"$@\"")
                .arg(&program)
                .args(&arguments)
                .stdin(Stdio::null())
                .stdout(out)
                .stderr(err)
                .spawn()
                .with_context(|| format!("cannot start {program}"))
        })?
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(keeper) = self.keeper.take() {
            // A panic of the keeper was reported when its job was run.
            let _ = keeper.join();
        }
    }
}
