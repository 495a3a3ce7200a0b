//! A service manager as systemd is one to a daemon: the socket of sd_notify(3), a store of
//! descriptors, and starts with what is in it. It follows `src/core/service.c` and
//! `manager.c`: a message counts only if the main process sent it, `BARRIER=1` is a message
//! of its own, what is stored twice is stored once, and the order in the store is nobody's
//! business.

use super::raw::{give_descriptors, receive_notification};
use super::{Daemon, Lab, eventually};
use nix::sys::socket::{setsockopt, sockopt::PassCred};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

#[derive(Default)]
struct Known {
    store: Vec<(String, OwnedFd)>,
    messages: Vec<String>,
    pinged: Option<Instant>,
    main: i32,
}

/// The manager.
pub struct Manager {
    folder: TempDir,
    known: Arc<Mutex<Known>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
    /// What `$FDSTORE` says; None for a systemd before 254.
    pub room: Option<usize>,
    /// `$WATCHDOG_USEC`.
    pub watchdog: Option<Duration>,
}

impl Manager {
    /// One with an empty store.
    pub fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let socket = UnixDatagram::bind(folder.path().join("notify")).unwrap();
        setsockopt(&socket, PassCred, &true).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let (known, stop) = (Arc::<Mutex<Known>>::default(), Arc::<AtomicBool>::default());
        let thread = {
            let (known, stop) = (Arc::clone(&known), Arc::clone(&stop));
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    if let Ok((text, descriptors, sender)) = receive_notification(&socket) {
                        known.lock().unwrap().hear(&text, descriptors, sender);
                    }
                }
            })
        };
        let thread = Some(thread);
        Self { folder, known, stop, thread, room: Some(1000), watchdog: None }
    }

    /// Starts the daemon on `up0` with what is in the store, and waits until it forwards and
    /// has said so.
    pub fn start(&self, lab: &Lab, arguments: &[&str]) -> Daemon {
        let before = self.count("READY=1");
        let command = self.command(lab, arguments);
        let daemon = Daemon::start_command(command);
        eventually("READY=1", || (self.count("READY=1") > before).then_some(()));
        daemon
    }

    fn command(&self, lab: &Lab, arguments: &[&str]) -> std::process::Command {
        let mut known = self.known.lock().unwrap();
        // The process id is the shell's: what it turns into keeps it.
        let script = r#"LISTEN_PID=$$ WATCHDOG_PID=$$; export LISTEN_PID WATCHDOG_PID
            [ -n "$WATCHDOG_USEC" ] || unset WATCHDOG_PID
            [ -n "$LISTEN_FDS" ] || unset LISTEN_PID
            exec "$0" "$@""#;
        let mut command = lab.host.command("sh");
        command.args(["-c", script, &super::daemon::binary()]);
        command.args(["--uplink", "up0", "--log-format", "json"]).args(arguments);
        super::daemon::add_workers(&mut command, arguments);
        command.env("NOTIFY_SOCKET", self.folder.path().join("notify"));
        if let Some(room) = self.room {
            command.env("FDSTORE", room.to_string());
        }
        if let Some(watchdog) = self.watchdog {
            command.env("WATCHDOG_USEC", watchdog.as_micros().to_string());
        }
        if !known.store.is_empty() {
            // Another order than they came in.
            known.store.reverse();
            let names: Vec<&str> = known.store.iter().map(|(name, _)| name.as_str()).collect();
            command.env("LISTEN_FDS", names.len().to_string());
            command.env("LISTEN_FDNAMES", names.join(":"));
            let copies = known.store.iter().map(|(_, fd)| fd.try_clone().unwrap());
            give_descriptors(&mut command, &copies.collect::<Vec<_>>());
        }
        // Set by its first message: nobody else knows the socket.
        known.main = 0;
        command
    }

    /// How many messages had this line.
    pub fn count(&self, line: &str) -> usize {
        let known = self.known.lock().unwrap();
        known.messages.iter().filter(|message| message.lines().any(|one| one == line)).count()
    }

    /// What it was told, in order.
    pub fn messages(&self) -> Vec<String> {
        self.known.lock().unwrap().messages.clone()
    }

    /// How long it has not heard `WATCHDOG=1`.
    pub fn unpinged_for(&self) -> Duration {
        self.known.lock().unwrap().pinged.map_or(Duration::MAX, |pinged| pinged.elapsed())
    }

    /// The names in the store.
    pub fn stored(&self) -> Vec<String> {
        self.known.lock().unwrap().store.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Takes a descriptor out of the store.
    pub fn take(&self, name: &str) -> OwnedFd {
        let mut known = self.known.lock().unwrap();
        let position = known.store.iter().position(|(other, _)| other == name);
        known.store.remove(position.unwrap_or_else(|| panic!("{name} is stored"))).1
    }

    /// Puts a descriptor into the store.
    pub fn put(&self, name: &str, descriptor: impl Into<OwnedFd>) {
        self.known.lock().unwrap().store.push((name.to_owned(), descriptor.into()));
    }

    /// Empties the store, as `systemctl stop` does.
    pub fn discard(&self) {
        self.known.lock().unwrap().store.clear();
    }
}

impl Known {
    fn hear(&mut self, text: &str, descriptors: Vec<OwnedFd>, sender: i32) {
        if self.main == 0 {
            self.main = sender;
        }
        assert_eq!(sender, self.main, "only the main process is heard: {text}");
        self.messages.push(text.to_owned());
        let lines: Vec<&str> = text.lines().collect();
        let name = lines.iter().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored");
        assert!(name.len() < 256 && !name.contains(':'), "{name}");
        if lines.contains(&"WATCHDOG=1") {
            self.pinged = Some(Instant::now());
        }
        if lines.contains(&"BARRIER=1") {
            assert_eq!((lines.len(), descriptors.len()), (1, 1), "a message of its own");
        } else if lines.contains(&"FDSTOREREMOVE=1") {
            self.store.retain(|(other, _)| other != name);
        } else if lines.contains(&"FDSTORE=1") {
            // Without it systemd drops a socket whose device goes down.
            assert!(lines.contains(&"FDPOLL=0"), "{text}");
            self.store.extend(descriptors.into_iter().map(|fd| (name.to_owned(), fd)));
        }
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // What it found wrong fails the test, unless that has failed already.
        if let Some(Err(panic)) = self.thread.take().map(JoinHandle::join)
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}
