//! The control socket from outside: called by an independent varlink client, by
//! other users, and by clients that mean no good, while frames are forwarded.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests fail by panicking"
)]

mod lab;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use lab::frames::{Frame, TagBytes, tag};
use lab::{Daemon, Lab, RawGuest, Wire, eventually};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

const C101: TagBytes = tag(0x8100, 101);
/// A user that is nobody in particular, and a group the same.
const NOBODY: u32 = 65534;
const SOME_GROUP: u32 = 54321;
/// What the daemon may grow by, whatever its clients do: 64 clients with a message and
/// an answer each, and then some.
const GROWTH_MAX: u64 = 32 << 20;

/// A Python that has the independent client.
fn python() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("VLANSWITCHD_TEST_PYTHON")
        .map_or_else(|| root.join("target/test-python/bin/python"), PathBuf::from);
    let found = Command::new(&python).args(["-c", "import varlink"]).output();
    assert!(
        found.as_ref().is_ok_and(|output| output.status.success()),
        "{} has no varlink: run `scripts/test control_api`, which installs it with pip, or name a \
         Python that has it in VLANSWITCHD_TEST_PYTHON",
        python.display()
    );
    python
}

fn script(name: &str, arguments: &[&str]) -> Command {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/control").join(name);
    let mut command = Command::new(python());
    // Nothing is written beside the sources.
    command.env("PYTHONDONTWRITEBYTECODE", "1").arg(path).args(arguments);
    command
}

/// Runs a script and returns what it printed; fails the test unless that ends with ok.
fn run_script(name: &str, arguments: &[&str]) -> String {
    let output = script(name, arguments).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && said.ends_with("ok\n"), "{said}{complaint}");
    said.trim_end_matches("ok\n").trim().to_owned()
}

/// A folder of this test's own, gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vslab-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn an_independent_client_calls_every_method_and_meets_every_error() {
    let lab = Lab::new();
    let folder = Folder::new("methods");
    let (socket, config) = (folder.path("socket"), folder.path("config.toml"));
    let text = "[uplink]\ndevice = \"up0\"\n\n[[port]]\nvlan = 101\ndevice = \"tap-a1\"\n";
    fs::write(&config, text).unwrap();
    let daemon = Daemon::start(
        &lab.host,
        &["--config", &config, "--control", &socket, "--log-format", "json"],
    );
    let text = format!("{text}\n# a third\n[[port]]\nvlan = 103\ndevice = \"tap-a3\"\n");
    fs::write(&config, text).unwrap();
    let interface = Path::new(env!("CARGO_MANIFEST_DIR")).join("dist/org.vlanswitchd.varlink");
    run_script("api.py", &["methods", &format!("unix:{socket}"), interface.to_str().unwrap()]);
    // Written down, beside what was there.
    let text = fs::read_to_string(&config).unwrap();
    assert!(text.contains("tap-a4") && text.contains("# a third"), "{text}");
    daemon.stop();
    assert!(!fs::exists(&socket).unwrap(), "the socket is left behind");
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn an_independent_client_reads_every_stream() {
    let lab = Lab::new();
    let folder = Folder::new("streams");
    let socket = folder.path("socket");
    let daemon = lab.daemon(&["--map", "101=tap-a1", "--control", &socket]);
    // Something to capture for as long as the script runs.
    let wire = lab.wire();
    let mut child = script("api.py", &["streams", &format!("unix:{socket}")])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    eventually("the script has ended", || {
        wire.send(&Frame::numbered(1).tags(&[C101]));
        child.try_wait().unwrap()
    });
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    daemon.stop();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn what_a_caller_may_do_is_what_the_socket_says() {
    let lab = Lab::new();
    let folder = Folder::new("rights");
    let socket = folder.path("socket");
    let daemon = lab.daemon(&["--map", "101=tap-a1", "--control", &socket]);
    let address = format!("unix:{socket}");
    let rights = |uid: u32, gid: u32, groups: &str| {
        run_script("api.py", &["rights", &address, &uid.to_string(), &gid.to_string(), groups])
    };
    let set_mode = |mode| fs::set_permissions(&socket, fs::Permissions::from_mode(mode)).unwrap();
    let mode = fs::metadata(&socket).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode, 0o660, "nobody else is let in at first");
    assert_eq!(rights(NOBODY, NOBODY, ""), "refused");
    chown(&socket, None, Some(SOME_GROUP)).unwrap();
    assert_eq!(rights(NOBODY, NOBODY, &SOME_GROUP.to_string()), "changes");
    assert_eq!(rights(NOBODY, SOME_GROUP, ""), "changes");
    assert_eq!(rights(NOBODY, NOBODY, ""), "refused");
    set_mode(0o666);
    assert_eq!(rights(NOBODY, NOBODY, ""), "reads");
    assert_eq!(rights(NOBODY, NOBODY, &SOME_GROUP.to_string()), "changes");
    assert_eq!(rights(0, 0, ""), "changes");
    daemon.stop();
}

/// A switch that is watched while it is attacked.
struct Siege {
    lab: Lab,
    daemon: Daemon,
    wire: Wire,
    guest: RawGuest,
    proper: UnixStream,
    socket: String,
    sent: u64,
    resident: u64,
    _folder: Folder,
}

impl Siege {
    fn new(name: &str) -> Self {
        let lab = Lab::new();
        let folder = Folder::new(name);
        let socket = folder.path("socket");
        let daemon = lab.daemon(&["--map", "101=tap-a1", "--control", &socket]);
        let guest = lab.raw_guest("tap-a1");
        daemon.attached(&["tap-a1"]);
        let wire = lab.wire();
        let proper = UnixStream::connect(&socket).unwrap();
        let resident = daemon.resident_bytes();
        let mut siege =
            Self { lab, daemon, wire, guest, proper, socket, sent: 0, resident, _folder: folder };
        siege.all_is_well();
        siege.resident = siege.daemon.resident_bytes();
        siege
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        // A test that hangs says less than one that fails.
        stream.set_read_timeout(Some(lab::PATIENCE)).unwrap();
        stream.set_write_timeout(Some(lab::PATIENCE)).unwrap();
        stream
    }

    /// Frames go both ways, each exactly once and in order, a proper client is
    /// answered, and no memory piles up.
    fn all_is_well(&mut self) {
        const BURST: u64 = 64;
        let first = self.sent;
        self.sent += BURST;
        for number in first..self.sent {
            self.wire.send(&Frame::numbered(number).tags(&[C101]));
            self.guest.send(&Frame::numbered(number).reversed());
        }
        let expected: Vec<u64> = (first..self.sent).collect();
        let numbers = |frames: Vec<Frame>| frames.iter().map(Frame::number).collect::<Vec<_>>();
        assert_eq!(numbers(self.guest.receive_until(self.sent - 1)), expected);
        assert_eq!(numbers(self.wire.receive_until(self.sent - 1)), expected);
        let reply = call(&mut self.proper, "GetStatus", json!({}));
        assert!(reply["parameters"]["status"]["pid"].is_u64(), "{reply}");
        let grown = self.daemon.resident_bytes().saturating_sub(self.resident);
        assert!(grown < GROWTH_MAX, "it grew by {grown} bytes");
    }

    /// Ends it; not one frame may be missing.
    fn end(self) {
        let sent = self.sent;
        let summary = self.daemon.stop();
        let port = summary.port("tap-a1");
        assert_eq!(port.to_guest.out_frames, sent, "{summary:?}");
        assert_eq!(summary.to_wire.out_frames, sent, "{summary:?}");
        assert_eq!(port.to_guest.all_drops() + port.from_guest.all_drops(), 0, "{summary:?}");
        drop(self.lab);
    }
}

fn message(method: &str, parameters: Value, more: bool) -> Vec<u8> {
    let call = json!({
        "method": format!("org.vlanswitchd.{method}"),
        "parameters": parameters,
        "more": more,
    });
    format!("{call}\0").into_bytes()
}

/// The next answer.
fn answer(stream: &mut impl Read) -> Value {
    let mut bytes = Vec::new();
    let mut byte = [0];
    while stream.read_exact(&mut byte).map(|()| byte[0]).unwrap() != 0 {
        bytes.push(byte[0]);
    }
    serde_json::from_slice(&bytes).unwrap()
}

fn call(stream: &mut UnixStream, method: &str, parameters: Value) -> Value {
    stream.write_all(&message(method, parameters, false)).unwrap();
    answer(&mut BufReader::with_capacity(1, stream))
}

/// Writes without reading until nothing more is taken, at most `limit` bytes; how many
/// were.
fn flood(stream: &mut UnixStream, piece: &[u8], limit: usize) -> usize {
    stream.set_nonblocking(true).unwrap();
    let mut taken = 0;
    let mut stuck = 0;
    while taken < limit && stuck < 200 {
        match stream.write(piece) {
            Ok(length) => {
                taken += length;
                stuck = 0;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                stuck += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(_) => break,
        }
    }
    taken
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_message_without_end_is_cut_off() {
    let mut siege = Siege::new("endless");
    for byte in [b' ', b'{', b'x'] {
        let mut hostile = siege.connect();
        let taken = flood(&mut hostile, &vec![byte; 1 << 20], 1 << 30);
        // What the sockets between us hold, and no more.
        assert!(taken < 4 << 20, "{taken} bytes of one message were taken");
        siege.all_is_well();
    }
    siege.end();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn who_asks_and_never_reads_waits_for_itself_alone() {
    let mut siege = Siege::new("deaf");
    let mut crowd: Vec<UnixStream> = (0..16).map(|_| siege.connect()).collect();
    let ask = message("ListPorts", json!({}), false);
    for hostile in &mut crowd {
        let taken = flood(hostile, &ask, 64 << 20);
        assert!(taken < 4 << 20, "{taken} bytes of calls were taken without an answer being read");
    }
    siege.all_is_well();
    // One that then reads finds whole answers, in order, as many as it asked for.
    let reader = &mut crowd[0];
    reader.set_nonblocking(false).unwrap();
    let mut reader = BufReader::new(reader);
    for _ in 0..100 {
        assert_eq!(answer(&mut reader)["parameters"]["ports"][0]["name"], "tap-a1");
    }
    siege.all_is_well();
    siege.end();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_monitor_that_never_reads_misses_events_and_is_told_how_many() {
    let mut siege = Siege::new("monitor");
    let mut deaf = siege.connect();
    deaf.write_all(&message("Monitor", json!({}), true)).unwrap();
    let mut changer = siege.connect();
    // A socket holds some thousand events and the daemon 64 KiB more.
    let mut changed = 0u64;
    let text = loop {
        for _ in 0..500 {
            let value = (changed % 8).to_string();
            let changes =
                json!({ "name": "tap-a1", "changes": [{ "key": "pcp", "value": value }] });
            let reply = call(&mut changer, "SetPort", changes);
            assert!(reply["error"].is_null(), "{reply}");
            changed += 1;
        }
        let changes = json!({ "name": "tap-a1", "changes": [{ "key": "pcp", "value": "0" }] });
        call(&mut changer, "SetPort", changes);
        siege.all_is_well();
        if changed >= 4000 {
            break format!("{changed} changes");
        }
    };
    // What it has not missed is there, whole; then it is told what it missed.
    let mut reader = BufReader::new(deaf);
    let mut kinds = Vec::new();
    while kinds.last().is_none_or(|kind| kind != "missed") {
        let event = answer(&mut reader)["parameters"]["event"].clone();
        kinds.push(event["kind"].as_str().unwrap().to_owned());
        if reader.buffer().is_empty() {
            // The next event brings the news.
            let value = (kinds.len() % 7 + 1).to_string();
            let changes =
                json!({ "name": "tap-a1", "changes": [{ "key": "pcp", "value": value }] });
            call(&mut changer, "SetPort", changes);
        }
        assert!(kinds.len() < 20_000, "{text}: nothing was missed");
    }
    siege.end();
}

/// Kinds of the blocks of a pcapng file, which has to be whole.
fn blocks(file: &[u8]) -> Vec<u32> {
    let word = |bytes: &[u8]| u32::from_be_bytes(bytes[..4].try_into().unwrap());
    let mut kinds = Vec::new();
    let mut rest = file;
    while !rest.is_empty() {
        kinds.push(word(rest));
        rest = &rest[word(&rest[4..]) as usize..];
    }
    kinds
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_capture_under_way_ends_whole_when_the_daemon_does() {
    const FRAMES: u64 = 600;
    const STATISTICS: u32 = 5;
    const FRAME: u32 = 6;
    let lab = Lab::new();
    let folder = Folder::new("ending");
    let socket = folder.path("socket");
    let daemon = lab.daemon(&["--map", "101=tap-a1", "--control", &socket]);
    let wire = lab.wire();
    let mut stream = UnixStream::connect(&socket).unwrap();
    stream.set_read_timeout(Some(lab::PATIENCE)).unwrap();
    stream.write_all(&message("Capture", json!({ "port": "uplink" }), true)).unwrap();
    let first = answer(&mut BufReader::with_capacity(1, &mut stream));
    for number in 0..FRAMES {
        wire.send(&Frame::numbered(number).untagged_length(1000).tags(&[C101]));
    }
    daemon.until("all have come", |summary| summary.from_wire.in_frames >= FRAMES);
    // More than the socket holds is still to be read, and is, but not at once.
    daemon.signal(Signal::SIGTERM);
    let (mut text, mut piece) = (Vec::new(), [0; 16 << 10]);
    loop {
        let length = stream.read(&mut piece).unwrap();
        if length == 0 {
            break;
        }
        text.extend(&piece[..length]);
        std::thread::sleep(Duration::from_millis(3));
    }
    daemon.stop();
    assert_eq!(text.pop(), Some(0), "cut in the middle of an answer");
    let rest = text.split(|byte| *byte == 0).map(|one| serde_json::from_slice(one).unwrap());
    let answers: Vec<Value> = std::iter::once(first).chain(rest).collect();
    assert!(answers.last().unwrap()["continues"].is_null(), "no last answer");
    let piece =
        |answer: &Value| STANDARD.decode(answer["parameters"]["pcapng"].as_str().unwrap()).unwrap();
    let kinds = blocks(&answers.iter().flat_map(piece).collect::<Vec<u8>>());
    assert_eq!(kinds.last(), Some(&STATISTICS));
    // The worker may take a moment to begin.
    let frames = kinds.iter().filter(|kind| **kind == FRAME).count() as u64;
    assert!(frames > FRAMES / 2, "{frames} frames");
}

/// The crowd, gone when dropped.
struct Crowd(Child);

impl Drop for Crowd {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn a_thousand_strangers_leave_room_for_who_may_change_things() {
    let mut siege = Siege::new("crowd");
    fs::set_permissions(&siege.socket, fs::Permissions::from_mode(0o666)).unwrap();
    let mut child = script("crowd.py", &[&siege.socket, &NOBODY.to_string(), "1000"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let stdout = child.stdout.take().unwrap();
    let crowd = Crowd(child);
    BufReader::new(stdout).read_line(&mut line).unwrap();
    let let_in: u64 = line.trim().strip_prefix("ready ").unwrap().parse().unwrap();
    assert!((1..64).contains(&let_in), "{let_in} of a thousand were let in");
    siege.all_is_well();
    let mut newcomer = siege.connect();
    let reply = call(&mut newcomer, "AddPort", json!({ "map": "102=tap-a2" }));
    assert!(reply["error"].is_null(), "{reply}");
    drop(crowd);
    eventually("the crowd's places are free again", || {
        let status = call(&mut newcomer, "GetStatus", json!({}));
        (status["parameters"]["status"]["clients"] == 2).then_some(())
    });
    siege.all_is_well();
    siege.end();
}

#[test]
#[ignore = "needs root: makes network namespaces"]
fn nonsense_ends_its_own_connection_and_no_other() {
    let mut siege = Siege::new("nonsense");
    let deep = |open: &str, close: &str| {
        let parameters = format!("{}{}", open.repeat(5000), close.repeat(5000));
        format!(r#"{{"method":"org.vlanswitchd.GetPort","parameters":{{"name":{parameters}}}}}"#)
    };
    let nonsense: Vec<Vec<u8>> = vec![
        b"\0".to_vec(),
        b"GET / HTTP/1.1\r\n\r\n\0".to_vec(),
        b"null\0".to_vec(),
        b"{}\0".to_vec(),
        b"{\"method\":7}\0".to_vec(),
        [&[0xff; 1000][..], &[0]].concat(),
        (0..=255).cycle().take(60_000).collect(),
        format!("{}\0", deep("[", "]")).into_bytes(),
        format!("{}\0", deep("{\"a\":", "}").replace("{}", "{\"a\":1}")).into_bytes(),
        "[".repeat(60_000).into_bytes().into_iter().chain([0]).collect(),
    ];
    for bytes in nonsense {
        let mut hostile = siege.connect();
        let _ = hostile.write_all(&bytes);
        let mut rest = Vec::new();
        let ended = match hostile.read_to_end(&mut rest) {
            Ok(_) => true,
            Err(error) => error.kind() == ErrorKind::ConnectionReset,
        };
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(40)]).into_owned();
        assert!(ended && rest.is_empty(), "{start:?}: {}", String::from_utf8_lossy(&rest));
        siege.all_is_well();
    }
    siege.end();
}
