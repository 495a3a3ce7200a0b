//! A capture's bytes as answers to its call: pieces of a pcapng file in base64.

use super::varlink;
use crate::control::api::CaptureReply;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Bytes of the file in one answer, at most.
const PIECE: usize = 48 << 10;
/// How long the last answer waits for room.
const PATIENCE: Duration = Duration::from_secs(1);

/// A client that asked for a capture. Non-blocking, if its socket is: a write that
/// would have to wait takes nothing.
#[derive(Debug)]
pub struct CaptureStream {
    client: UnixStream,
    /// Bytes of the file that are in no answer yet.
    piece: Vec<u8>,
    /// Answers that have not left yet, from `sent` on.
    answers: Vec<u8>,
    sent: usize,
}

impl CaptureStream {
    /// A stream to this client.
    pub fn new(client: UnixStream) -> Self {
        Self { client, piece: Vec::with_capacity(PIECE), answers: Vec::new(), sent: 0 }
    }

    fn answer(&mut self, continues: bool) {
        let pcapng = STANDARD.encode(&self.piece);
        self.piece.clear();
        varlink::write_reply(&mut self.answers, &CaptureReply { pcapng }, continues);
    }

    fn send(&mut self) -> io::Result<()> {
        while let Some(rest) = self.answers.get(self.sent..).filter(|rest| !rest.is_empty()) {
            self.sent += self.client.write(rest)?;
        }
        self.answers.clear();
        self.sent = 0;
        Ok(())
    }
}

impl Write for CaptureStream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.piece.len() >= PIECE {
            self.send()?;
            self.answer(true);
        }
        let length = bytes.len().min(PIECE - self.piece.len());
        self.piece.extend(bytes.get(..length).unwrap_or_default());
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        if !self.piece.is_empty() {
            self.send()?;
            self.answer(true);
        }
        self.send()
    }
}

impl AsFd for CaptureStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.client.as_fd()
    }
}

/// Says that this was all, to a client that still listens. One that has taken all so
/// far is waited for; who has not was waited for already.
impl Drop for CaptureStream {
    fn drop(&mut self) {
        if self.answers.is_empty() {
            let _ = self.client.set_write_timeout(Some(PATIENCE));
            let _ = self.client.set_nonblocking(false);
        }
        self.answer(false);
        let _ = self.send();
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::panic,
        clippy::indexing_slicing,
        reason = "tests fail by panicking"
    )]
    use super::*;
    use std::io::Read;

    #[test]
    fn what_is_written_comes_out_whole_whatever_the_reader_does() {
        let (client, mut reader) = UnixStream::pair().unwrap();
        client.set_nonblocking(true).unwrap();
        let mut stream = CaptureStream::new(client);
        let bytes: Vec<u8> = (0..1_000_000u32).map(|number| (number * 7) as u8).collect();
        let reading = std::thread::spawn(move || {
            let mut text = String::new();
            reader.read_to_string(&mut text).unwrap();
            text
        });
        let mut rest = &bytes[..];
        let mut refused = 0u64;
        while !rest.is_empty() {
            match stream.write(rest) {
                Ok(length) => rest = &rest[length..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => refused += 1,
                Err(error) => panic!("{error}"),
            }
        }
        while stream.flush().is_err() {}
        drop(stream);
        let text = reading.join().unwrap();
        let answers: Vec<serde_json::Value> =
            text.split_terminator('\0').map(|one| serde_json::from_str(one).unwrap()).collect();
        let (last, others) = answers.split_last().unwrap();
        assert!(last.get("continues").is_none(), "refused {refused} times");
        assert!(others.iter().all(|answer| answer["continues"] == true));
        let found: Vec<u8> = answers
            .iter()
            .flat_map(|answer| {
                STANDARD.decode(answer["parameters"]["pcapng"].as_str().unwrap()).unwrap()
            })
            .collect();
        assert!(found == bytes);
    }

    #[test]
    fn the_last_answer_waits_for_room() {
        let (client, mut reader) = UnixStream::pair().unwrap();
        client.set_nonblocking(true).unwrap();
        let mut filler = client.try_clone().unwrap();
        let mut filled = 0;
        while let Ok(length) = filler.write(&[b'x'; 100]) {
            filled += length;
        }
        drop(filler);
        let (sender, dropped) = std::sync::mpsc::channel();
        let stream = CaptureStream::new(client);
        std::thread::spawn(move || {
            drop(stream);
            sender.send(())
        });
        let early = dropped.recv_timeout(Duration::from_millis(50));
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).unwrap();
        assert!(early.is_err() && bytes.len() > filled, "the last answer is lost");
        assert!(bytes.ends_with(b"{\"parameters\":{\"pcapng\":\"\"}}\0"));
    }
}
