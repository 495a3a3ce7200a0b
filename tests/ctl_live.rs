//! `vlanswitchctl` and `vlanswitchd` together: what one says, the other means.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use lab::{Lab, eventually};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use tempfile::TempDir;

/// A frame of VLAN 101 from the wire.
fn tagged() -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([0x02, 0, 0, 0, 0, 1, 0x81, 0, 0, 101, 0x08, 0x06]);
    frame.resize(64, 0);
    frame
}

struct Tool(PathBuf);

impl Tool {
    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vlanswitchctl"));
        command.arg("--socket").arg(&self.0).args(words);
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// What a command prints that should work.
    fn done(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert!(output.status.success(), "{words:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, words: &[&str]) -> Value {
        let words: Vec<&str> = words.iter().copied().chain(["--json"]).collect();
        serde_json::from_str(&self.done(&words)).unwrap()
    }

    fn streaming(&self, words: &[&str]) -> Child {
        self.command(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }
}

fn line_of(child: &mut Child) -> String {
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    line
}

#[test]
#[ignore = "needs root"]
fn every_command_works_with_the_daemon() {
    let folder = TempDir::new().unwrap();
    let socket = folder.path().join("control");
    let file = folder.path().join("v.toml");
    std::fs::write(
        &file,
        "# mine\n[uplink]\ndevice = \"up0\"\n[[port]]\nvlan = 101\ndevice = \"tap-a\"\n",
    )
    .unwrap();
    let lab = Lab::new();
    let paths = [socket.to_str().unwrap(), file.to_str().unwrap()];
    let daemon = lab.daemon(&["--control", paths[0], "--config", paths[1]]);
    let tool = Tool(socket.clone());

    let text = tool.done(&["status"]);
    assert!(text.contains("uplink      up0, up\n") && text.contains("1 no_carrier"), "{text}");
    assert_eq!(tool.json(&["status"])["status"]["pid"], daemon.id());

    let mut monitor = tool.streaming(&["monitor"]);
    // A stream that is not subscribed yet would miss what follows.
    eventually("the monitor is connected", || {
        (tool.json(&["status"])["status"]["clients"] == 2).then_some(())
    });
    let text = tool.done(&["port", "add", "200-210=tap-b,native=200", "--persist"]);
    assert!(text.contains("native=200") && text.contains("configuration file"), "{text}");
    assert!(line_of(&mut monitor).contains(" port_added "), "an event");
    monitor.kill().unwrap();
    monitor.wait().unwrap();
    assert!(tool.done(&["port", "list"]).contains("tap-b  200-210  trunk"), "the list");
    tool.done(&["port", "set", "tap-b", "vlan=300-310", "native=300"]);
    assert!(tool.done(&["port", "show", "tap-b"]).contains("VLAN 300-310, mode trunk"));
    assert!(tool.done(&["config", "show"]).contains("300-310"));
    assert!(tool.done(&["config", "check"]).contains("would change: tap-b"));
    assert!(tool.done(&["config", "reload"]).contains("changed: tap-b"));
    assert!(tool.done(&["config", "reload"]).contains("nothing to change"));
    let output = tool.run(&["port", "set", "tap-b", "vlan=101", "mode=tunnel"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    tool.done(&["port", "remove", "tap-b", "--persist"]);
    assert_eq!(tool.run(&["port", "show", "tap-b"]).status.code(), Some(2));
    let text = std::fs::read_to_string(&file).unwrap();
    assert!(text.starts_with("# mine\n") && !text.contains("tap-b"), "{text}");
    tool.done(&["config", "check", paths[1]]);

    drops_and_captures(&lab, &tool, folder.path());
    assert!(!tool.json(&["doctor"])["findings"].is_null());
    daemon.stop();
}

fn drops_and_captures(lab: &Lab, tool: &Tool, folder: &Path) {
    assert!(tool.done(&["drops"]).contains("no frame was dropped"));
    let path = folder.join("c.pcapng");
    let capture = tool.streaming(&["capture", "uplink", "-c", "3", "-w", path.to_str().unwrap()]);
    eventually("the capture is under way", || {
        (tool.json(&["status"])["status"]["captures"] == 1).then_some(())
    });
    let wire = lab.wire();
    for _ in 0..3 {
        wire.send_bytes(&tagged());
    }
    let output = capture.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("captured 3 frames, "), "{said}");
    let length = std::fs::metadata(&path).unwrap().len();
    assert!(said.contains(&format!(" {length} bytes")), "{said}, {length}");

    let text = eventually("the drops are counted", || {
        Some(tool.done(&["drops"])).filter(|text| text.contains("guest_absent"))
    });
    assert!(text.contains("tap-a") && text.contains("no VM has it open"), "{text}");
    assert!(tool.done(&["stats", "tap-a"]).contains("tap-a to guest"), "its drops");
    let mut watch = tool.streaming(&["stats", "--watch", "0.1", "tap-a"]);
    assert!(line_of(&mut watch).contains("from guest"), "a header");
    watch.kill().unwrap();
    watch.wait().unwrap();
}
