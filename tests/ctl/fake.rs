//! A switch that only talks: it answers calls on a control socket with what the test
//! says, and keeps the calls.

use serde::Serialize;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

/// What to answer to a call: bytes, then the end of the connection or further calls.
pub struct Answer {
    bytes: Vec<u8>,
    close: bool,
}

impl Answer {
    /// These bytes and no more.
    pub fn raw(bytes: impl Into<Vec<u8>>) -> Self {
        Self { bytes: bytes.into(), close: true }
    }

    /// One reply.
    pub fn reply(parameters: &impl Serialize) -> Self {
        Self { bytes: message(&json!({ "parameters": parameters })), close: false }
    }

    /// A stream: all but the last reply with `continues`.
    pub fn stream<T: Serialize>(replies: &[T]) -> Self {
        let mut bytes = Vec::new();
        for (number, reply) in replies.iter().enumerate() {
            let continues = number + 1 < replies.len();
            bytes.extend(message(&json!({ "parameters": reply, "continues": continues })));
        }
        Self { bytes, close: false }
    }

    /// An error.
    pub fn error(name: &str, parameters: Value) -> Self {
        Self { bytes: message(&json!({ "error": name, "parameters": parameters })), close: false }
    }

    /// Bytes, and the connection stays open.
    pub fn open(bytes: impl Into<Vec<u8>>) -> Self {
        Self { bytes: bytes.into(), close: false }
    }
}

/// One message of the protocol.
pub fn message(value: &Value) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(value).unwrap();
    bytes.push(0);
    bytes
}

/// The fake switch.
pub struct Fake {
    pub socket: PathBuf,
    calls: Arc<Mutex<Vec<Value>>>,
}

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A path nobody else uses.
pub fn fresh_path(what: &str) -> PathBuf {
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    std::env::temp_dir().join(format!("vlanswitchctl-{}-{number}-{what}", std::process::id()))
}

impl Fake {
    /// Answers each call by `answer`, which sees the call.
    pub fn new(answer: impl Fn(&Value) -> Answer + Send + 'static) -> Self {
        let socket = fresh_path("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let calls = Arc::default();
        let kept: Arc<Mutex<Vec<Value>>> = Arc::clone(&calls);
        // Ends with the test's process: it waits for connections till then.
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut reader = BufReader::new(stream.try_clone().unwrap());
                loop {
                    let mut call = Vec::new();
                    if reader.read_until(0, &mut call).unwrap_or(0) == 0 {
                        break;
                    }
                    assert_eq!(call.pop(), Some(0));
                    let call: Value = serde_json::from_slice(&call).unwrap();
                    kept.lock().unwrap().push(call.clone());
                    let answer = answer(&call);
                    // A client that has seen enough may be gone.
                    if stream.write_all(&answer.bytes).is_err() || answer.close {
                        break;
                    }
                }
            }
        });
        Self { socket, calls }
    }

    /// Answers everything with this reply.
    pub fn always(parameters: &impl Serialize) -> Self {
        let parameters = serde_json::to_value(parameters).unwrap();
        Self::new(move |_| Answer::reply(&parameters))
    }

    /// The calls so far.
    pub fn calls(&self) -> Vec<Value> {
        self.calls.lock().unwrap().clone()
    }

    /// Runs vlanswitchctl against this switch.
    pub fn ctl(&self, words: &[&str]) -> Run {
        ctl(&self.socket, words)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.socket);
    }
}

/// What a run of vlanswitchctl came to.
#[derive(Debug)]
pub struct Run {
    pub status: i32,
    pub out: String,
    pub error: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code().unwrap(),
            out: String::from_utf8(output.stdout).unwrap(),
            error: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// The program, to be run against this socket.
pub fn command(socket: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vlanswitchctl"));
    command.args(words).env("VLANSWITCHD_SOCKET", socket).env_remove("NO_COLOR");
    command
}

/// Runs it.
pub fn ctl(socket: &Path, words: &[&str]) -> Run {
    command(socket, words).output().unwrap().into()
}
