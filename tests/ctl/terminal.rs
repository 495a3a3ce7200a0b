//! A terminal for one program: a tmux server of its own.

use super::fake::fresh_path;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// How long something may take to appear.
const PATIENCE: Duration = Duration::from_secs(20);

pub struct Terminal {
    server: PathBuf,
}

impl Terminal {
    /// A shell in a terminal of this size. `top` runs from it, so that what it
    /// leaves behind can be seen.
    pub fn new(columns: u16, lines: u16) -> Self {
        let terminal = Self { server: fresh_path("tmux") };
        let (columns, lines) = (columns.to_string(), lines.to_string());
        let size = ["-x", &columns, "-y", &lines];
        let shell = ["env", "-u", "ENV", "PS1=ready> ", "LC_ALL=C.UTF-8", "sh"];
        let words: Vec<&str> = ["-u", "-f", "/dev/null", "new-session", "-d"]
            .into_iter()
            .chain(size)
            .chain(shell)
            .collect();
        let output = terminal.tmux(&words);
        assert!(output.status.success(), "{output:?}");
        terminal.wait_for("ready>");
        terminal
    }

    fn tmux(&self, words: &[&str]) -> Output {
        let mut command = Command::new("tmux");
        command.arg("-S").arg(&self.server).args(words).env_remove("TMUX");
        command.output().expect("tmux is installed")
    }

    /// Types words, then Enter.
    pub fn type_line(&self, line: &str) {
        self.tmux(&["send-keys", "-l", line]);
        self.press("Enter");
    }

    /// Presses a key, by tmux's name.
    pub fn press(&self, key: &str) {
        assert!(self.tmux(&["send-keys", key]).status.success());
    }

    pub fn resize(&self, columns: u16, lines: u16) {
        let (columns, lines) = (columns.to_string(), lines.to_string());
        self.tmux(&["set-option", "-g", "window-size", "manual"]);
        assert!(self.tmux(&["resize-window", "-x", &columns, "-y", &lines]).status.success());
    }

    /// What stands on the screen.
    pub fn screen(&self) -> String {
        String::from_utf8(self.tmux(&["capture-pane", "-p"]).stdout).unwrap()
    }

    /// The same with its colours.
    pub fn coloured_screen(&self) -> String {
        String::from_utf8(self.tmux(&["capture-pane", "-p", "-e"]).stdout).unwrap()
    }

    /// Whether the alternate screen is on, as full-screen programs have it.
    pub fn full_screen(&self) -> bool {
        self.tmux(&["display-message", "-p", "#{alternate_on}"]).stdout == b"1\n"
    }

    pub fn wait_for(&self, words: &str) -> String {
        self.wait_until(words, |screen| screen.contains(words))
    }

    pub fn wait_until(&self, what: &str, done: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let screen = self.screen();
            if done(&screen) {
                return screen;
            }
            assert!(Instant::now() < deadline, "waited for {what}:\n{screen}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]);
        let _ = std::fs::remove_file(Path::new(&self.server));
    }
}
