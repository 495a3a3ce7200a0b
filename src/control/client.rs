//! The calling side of the control interface: varlink on a unix socket
//! (<https://varlink.org>). One JSON object a message, ended by a NUL byte; a call
//! with `more` is answered until a reply lacks `continues`.
//!
//! Blocking, one call at a time. The other side is trusted no further than its
//! messages are bounded in size and, for calls, in time. Replies keep the bytes they
//! came in, so that programs can be handed exactly what the switch said.

use crate::control::api::Request;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use thiserror::Error;

/// The longest reply taken, in bytes. The counters of 4094 ports are a few MB.
pub const LONGEST_REPLY: usize = 32 << 20;
/// How long a call may take. Adding ports costs the kernel some 20 ms each.
pub const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes asked of the socket at once.
const CHUNK: usize = 64 << 10;

/// Why a call has no result.
#[derive(Debug, Error)]
pub enum ClientError {
    /// There is no socket.
    #[error(
        "{}: no such socket; is vlanswitchd running? If its --control names another path, \
         give that path with --socket", .0.display()
    )]
    NoSocket(PathBuf),
    /// There is a socket and nobody accepts.
    #[error(
        "{}: nobody answers on this socket; vlanswitchd has stopped, start it again", .0.display()
    )]
    NobodyThere(PathBuf),
    /// The socket's mode does not let us in.
    #[error(
        "{}: permission denied; be root, or a member of the group the socket belongs to", .0.display()
    )]
    Denied(PathBuf),
    /// The socket failed in another way.
    #[error("{}: {source}", .path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The connection ended before the reply.
    #[error("vlanswitchd closed the connection; has it been stopped? Its log says more")]
    Closed,
    /// No reply within [`PATIENCE`].
    #[error("vlanswitchd did not answer within {} s; its log may say why", .0.as_secs())]
    TimedOut(Duration),
    /// A reply is longer than [`LONGEST_REPLY`].
    #[error("the reply is longer than {} MiB; is this vlanswitchd's control socket?", LONGEST_REPLY >> 20)]
    TooLong,
    /// A reply is not what the interface file says.
    #[error(
        "the reply makes no sense ({0}); is this vlanswitchd's control socket, of the same version?"
    )]
    Garbage(String),
    /// The switch refused, or failed.
    #[error(transparent)]
    Answer(#[from] AnswerError),
}

/// An error the switch answered with.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum AnswerError {
    /// No such port.
    #[error("there is no port {0}; `vlanswitchctl port list` shows the ports")]
    NoSuchPort(String),
    /// The call makes no sense; nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// It did not work; nothing was changed.
    #[error("{0}")]
    Failed(String),
    /// Only reading is allowed.
    #[error(
        "permission denied: to change something, or to see guests' frames, be root or a member of the control socket's group"
    )]
    PermissionDenied,
    /// The switch is older than this program.
    #[error("vlanswitchd does not know {0}; it is of another version: restart it")]
    UnknownMethod(String),
    /// Anything else.
    #[error("vlanswitchd answers with {name} {parameters}")]
    Other {
        /// Name of the error.
        name: String,
        /// Its parameters, as JSON.
        parameters: String,
    },
}

impl AnswerError {
    fn new(name: &str, parameters: Option<&RawValue>) -> Self {
        let json = parameters.map_or("{}", RawValue::get);
        let value: Value = serde_json::from_str(json).unwrap_or_default();
        let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        let known = match name {
            "org.vlanswitchd.NoSuchPort" => text("name").map(Self::NoSuchPort),
            "org.vlanswitchd.Refused" => text("message").map(Self::Refused),
            "org.vlanswitchd.Failed" => text("message").map(Self::Failed),
            "org.varlink.service.PermissionDenied" => Some(Self::PermissionDenied),
            "org.varlink.service.MethodNotFound" | "org.varlink.service.MethodNotImplemented" => {
                text("method").map(Self::UnknownMethod)
            }
            _ => None,
        };
        known.unwrap_or_else(|| Self::Other { name: name.to_owned(), parameters: json.to_owned() })
    }
}

#[derive(Serialize)]
struct Call<'a> {
    #[serde(flatten)]
    request: &'a Request,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    more: bool,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    parameters: Option<&'a RawValue>,
    #[serde(default)]
    continues: bool,
    error: Option<String>,
}

/// One reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    /// Its parameters: a JSON object, as it came.
    pub json: String,
    /// Whether another follows.
    pub continues: bool,
}

impl Reply {
    /// The parameters as one of the types of [`crate::control::api`].
    ///
    /// # Errors
    /// [`ClientError::Garbage`].
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, ClientError> {
        serde_json::from_str(&self.json).map_err(|error| ClientError::Garbage(error.to_string()))
    }
}

/// A connection to the switch.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    path: PathBuf,
    /// What was received and not yet used.
    received: Vec<u8>,
    /// Bytes of it known to hold no NUL.
    searched: usize,
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Client {
    /// Connects to the control socket.
    ///
    /// # Errors
    /// [`ClientError`]: no socket, nobody there, permission denied.
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => ClientError::NoSocket(path.to_owned()),
            io::ErrorKind::ConnectionRefused => ClientError::NobodyThere(path.to_owned()),
            io::ErrorKind::PermissionDenied => ClientError::Denied(path.to_owned()),
            _ => ClientError::Socket { path: path.to_owned(), source },
        })?;
        Ok(Self { stream, path: path.to_owned(), received: Vec::new(), searched: 0 })
    }

    /// One call, one reply.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn call(&mut self, request: &Request) -> Result<Reply, ClientError> {
        self.send(&Call { request, more: false })?;
        self.next(Some(PATIENCE))
    }

    /// A call answered again and again: read its replies with [`Self::next`].
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn start(&mut self, request: &Request) -> Result<(), ClientError> {
        self.send(&Call { request, more: true })
    }

    /// The next reply; without `patience` it may take for ever.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn next(&mut self, patience: Option<Duration>) -> Result<Reply, ClientError> {
        let deadline = patience.map(|patience| (Instant::now() + patience, patience));
        loop {
            if let Some(reply) = self.take()? {
                return Ok(reply);
            }
            self.receive(deadline)?;
        }
    }

    /// A reply that has been received already, if any: the socket then shows no
    /// sign of it.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn take(&mut self) -> Result<Option<Reply>, ClientError> {
        let fresh = self.received.get(self.searched..).unwrap_or_default();
        let Some(end) = fresh.iter().position(|byte| *byte == 0) else {
            self.searched = self.received.len();
            return if self.searched > LONGEST_REPLY {
                Err(ClientError::TooLong)
            } else {
                Ok(None)
            };
        };
        let mut message: Vec<u8> = self.received.drain(..=self.searched + end).collect();
        message.pop();
        self.searched = 0;
        parse(&message).map(Some)
    }

    /// Waits for bytes and takes them in: one read, after which [`Self::take`] may
    /// have a reply.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn receive(&mut self, deadline: Option<(Instant, Duration)>) -> Result<(), ClientError> {
        let left = match deadline {
            None => None,
            Some((end, patience)) => match end.checked_duration_since(Instant::now()) {
                Some(left) if !left.is_zero() => Some(left),
                _ => return Err(ClientError::TimedOut(patience)),
            },
        };
        self.stream.set_read_timeout(left).map_err(|source| self.failed(source))?;
        let start = self.received.len();
        self.received.resize(start + CHUNK, 0);
        let space = self.received.get_mut(start..).unwrap_or_default();
        let result = (&self.stream).read(space);
        self.received.truncate(start + result.as_ref().copied().unwrap_or(0));
        match result {
            Ok(0) => Err(ClientError::Closed),
            Ok(_) => Ok(()),
            Err(error) => match error.kind() {
                // The deadline is looked at before the next read.
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
                io::ErrorKind::ConnectionReset => Err(ClientError::Closed),
                _ => Err(self.failed(error)),
            },
        }
    }

    fn send(&mut self, call: &Call) -> Result<(), ClientError> {
        // Strings, numbers and lists of them always have a JSON form.
        let mut message = serde_json::to_vec(call).unwrap_or_default();
        message.push(0);
        let stream = &mut self.stream;
        let result =
            stream.set_write_timeout(Some(PATIENCE)).and_then(|()| stream.write_all(&message));
        result.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => ClientError::Closed,
            io::ErrorKind::WouldBlock => ClientError::TimedOut(PATIENCE),
            _ => self.failed(error),
        })
    }

    fn failed(&self, source: io::Error) -> ClientError {
        ClientError::Socket { path: self.path.clone(), source }
    }
}

fn parse(message: &[u8]) -> Result<Reply, ClientError> {
    let message: Message =
        serde_json::from_slice(message).map_err(|error| ClientError::Garbage(error.to_string()))?;
    if let Some(name) = message.error {
        return Err(AnswerError::new(&name, message.parameters).into());
    }
    // Outside of strings a line end is a blank, and inside it cannot stand.
    let json = message.parameters.map_or("{}", RawValue::get).replace(['\n', '\r'], " ");
    Ok(Reply { json, continues: message.continues })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
    use super::*;
    use crate::control::api::CaptureRequest;

    fn pair() -> (Client, UnixStream) {
        let (stream, other) = UnixStream::pair().unwrap();
        (Client { stream, path: PathBuf::new(), received: Vec::new(), searched: 0 }, other)
    }

    #[test]
    fn a_call_is_one_object_and_a_nul() {
        let (mut client, mut other) = pair();
        let request = Request::Capture(CaptureRequest { limit: Some(3), ..Default::default() });
        client.start(&request).unwrap();
        drop(client);
        let mut sent = Vec::new();
        other.read_to_end(&mut sent).unwrap();
        assert_eq!(sent.pop(), Some(0));
        let value: Value = serde_json::from_slice(&sent).unwrap();
        assert_eq!(value["method"], "org.vlanswitchd.Capture");
        assert_eq!(value["parameters"]["limit"], 3);
        assert_eq!(value["more"], true);
    }

    #[test]
    fn replies_come_in_whatever_pieces() {
        let (mut client, mut other) = pair();
        let writer = std::thread::spawn(move || {
            let replies = b"{\"parameters\":{\"b\":1,\n\"a\":2},\"continues\":true}\0{}\0";
            for byte in replies {
                other.write_all(&[*byte]).unwrap();
            }
        });
        let first = client.next(Some(PATIENCE)).unwrap();
        assert_eq!(first, Reply { json: "{\"b\":1, \"a\":2}".to_owned(), continues: true });
        let second = client.next(Some(PATIENCE)).unwrap();
        assert_eq!(second, Reply { json: "{}".to_owned(), continues: false });
        writer.join().unwrap();
        assert!(matches!(client.next(None), Err(ClientError::Closed)));
    }

    #[test]
    fn silence_ends() {
        let (mut client, _other) = pair();
        let result = client.next(Some(Duration::from_millis(10)));
        assert!(matches!(result, Err(ClientError::TimedOut(_))), "{result:?}");
    }

    #[test]
    fn errors_keep_their_words() {
        let parameters = RawValue::from_string(r#"{"message":"no"}"#.to_owned()).unwrap();
        let error = AnswerError::new("org.vlanswitchd.Refused", Some(&parameters));
        assert_eq!(error, AnswerError::Refused("no".to_owned()));
        let error = AnswerError::new("org.vlanswitchd.NoSuchPort", Some(&parameters));
        assert!(matches!(error, AnswerError::Other { .. }), "{error:?}");
    }
}
