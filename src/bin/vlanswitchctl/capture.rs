//! `capture`: the bytes of a pcapng file, from the switch to a file or a pipe.
//!
//! Three things can end it: the switch, Ctrl-C, and whoever reads our output. The
//! last shows only when something is written, so the pipe is polled beside the
//! socket: `capture | tshark -c 1` ends though no second frame ever comes.

use crate::arguments::CaptureArguments;
use crate::context::{Context, Failure, Outcome, written};
use crate::text::printable;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use vlanswitchd::control::api::{CaptureReply, CaptureRequest, Request};
use vlanswitchd::control::capture::expression;
use vlanswitchd::control::capture::filter::Instruction;
use vlanswitchd::control::client::{AnswerError, Client, ClientError, Reply};

const NOT_TO_A_TERMINAL: &str = "\
a capture is no text for a terminal; write it to a file with -w FILE, or pipe it on:
  vlanswitchctl capture | wireshark -k -i -
  vlanswitchctl capture | tshark -r -";

pub fn run(context: &Context, arguments: CaptureArguments) -> Outcome {
    let to_file = arguments.write.as_deref().filter(|path| *path != Path::new("-"));
    if to_file.is_none() && context.terminal && !context.json && arguments.write.is_none() {
        return Err(Failure::Arguments(NOT_TO_A_TERMINAL.to_owned()));
    }
    let filter = arguments.filter.as_deref().map(compiled).transpose()?;
    let request = CaptureRequest {
        port: arguments.port,
        drops: arguments.drops.then_some(true),
        filter,
        snaplen: arguments.snaplen,
        limit: arguments.count,
    };
    let signals = signals()?;
    let mut client = context.connect()?;
    let request = with_the_uplinks_name(&mut client, request)?;
    client.start(&Request::Capture(request))?;
    // Only now: a refused capture leaves a file of this name as it was.
    let mut sink =
        Sink { output: None, path: to_file, json: context.json, blocks: Blocks::default() };
    let copied = copy(&mut client, &signals, &mut sink);
    sink.cut();
    match copied {
        Ok(()) | Err(Failure::ReaderGone) => {
            sink.say();
            Ok(ExitCode::SUCCESS)
        }
        Err(failure) => {
            if sink.output.is_some() {
                sink.say();
            }
            Err(failure)
        }
    }
}

/// The filter as the interface takes it: decimal. An expression is compiled here, by
/// tcpdump, and not in the daemon; what is decimal already stays as it is.
fn compiled(filter: &str) -> Result<String, Failure> {
    if filter.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b' ' | b',' | b'\n')) {
        return Ok(filter.replace('\n', ","));
    }
    let program = expression::compile(filter)
        .map_err(|error| Failure::Arguments(format!("--filter: {error}; see pcap-filter(7)")))?;
    let mut text = program.len().to_string();
    for instruction in program {
        let Instruction { code, jump_true, jump_false, k } = instruction;
        text.push_str(&format!(",{code} {jump_true} {jump_false} {k}"));
    }
    Ok(text)
}

/// `uplink` stands for the uplink's device, unless a port is called so.
fn with_the_uplinks_name(
    client: &mut Client,
    request: CaptureRequest,
) -> Result<CaptureRequest, Failure> {
    if request.port.as_deref() != Some("uplink") {
        return Ok(request);
    }
    match client.call(&Request::GetPort { name: "uplink".to_owned() }) {
        Ok(_) => Ok(request),
        Err(ClientError::Answer(AnswerError::NoSuchPort(_))) => {
            let reply: vlanswitchd::control::api::StatusReply =
                client.call(&Request::GetStatus {})?.read()?;
            Ok(CaptureRequest { port: Some(reply.status.uplink), ..request })
        }
        Err(error) => Err(error.into()),
    }
}

/// Ctrl-C and a service manager's stop, to be read beside the socket.
fn signals() -> Result<SignalFd, Failure> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGINT);
    mask.add(Signal::SIGTERM);
    let result = mask
        .thread_block()
        .and_then(|()| SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK));
    result.map_err(|errno| Failure::Message(format!("signals: {errno}")))
}

fn copy(client: &mut Client, signals: &SignalFd, sink: &mut Sink) -> Result<(), Failure> {
    loop {
        while let Some(reply) = client.take()? {
            sink.write(&reply)?;
            if !reply.continues {
                return Ok(());
            }
        }
        let output = sink.watched()?;
        let mut watched = vec![
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(client.as_fd(), PollFlags::POLLIN),
        ];
        // Without events a pipe reports only that its reader is gone.
        watched.extend(output.as_ref().map(|fd| PollFd::new(fd.as_fd(), PollFlags::empty())));
        match poll(&mut watched, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            Err(errno) => return Err(Failure::Message(format!("poll: {errno}"))),
            Ok(_) => {}
        }
        let ready: Vec<bool> = watched.iter().map(|fd| fd.any().unwrap_or(true)).collect();
        let (asked_to_end, reader_gone) = (ready.first(), ready.get(2));
        if asked_to_end == Some(&true) || reader_gone == Some(&true) {
            return Ok(());
        }
        client.receive(None)?;
    }
}

/// Where the bytes go.
struct Sink<'a> {
    /// Opened when the first bytes are there.
    output: Option<Output>,
    /// The file; without it, standard output.
    path: Option<&'a Path>,
    /// Pass the replies on as they came.
    json: bool,
    blocks: Blocks,
}

impl Sink<'_> {
    /// Standard output, if that is where the bytes go.
    fn watched(&self) -> Result<Option<OwnedFd>, Failure> {
        match self.path {
            Some(_) => Ok(None),
            None => io::stdout().as_fd().try_clone_to_owned().map(Some).map_err(written),
        }
    }

    fn write(&mut self, reply: &Reply) -> Result<(), Failure> {
        let CaptureReply { pcapng } = reply.read()?;
        let bytes = STANDARD.decode(&pcapng).map_err(|error| {
            ClientError::Garbage(format!("a piece of the capture is not base64: {error}"))
        })?;
        let path = self.path;
        let output = match &mut self.output {
            Some(output) => output,
            empty => empty.insert(open(path)?),
        };
        if self.json {
            self.blocks.count(&bytes);
            let (_, result) = output.write(format!("{}\n", reply.json).as_bytes());
            return result.map_err(|error| failed(path, error));
        }
        let (written, result) = output.write(&bytes);
        self.blocks.count(bytes.get(..written).unwrap_or_default());
        result.map_err(|error| failed(path, error))
    }

    /// Cuts a block off a file that has not come whole: it would be garbage to a reader.
    fn cut(&mut self) {
        if let (Some(Output::File(file)), false) = (&self.output, self.json) {
            // What is no regular file stays as it is.
            let _ = file.set_len(self.blocks.cut());
        }
    }

    fn say(&self) {
        let place = match self.path {
            Some(path) => printable(&path.display().to_string()),
            None => "standard output".to_owned(),
        };
        let Blocks { frames, bytes, .. } = self.blocks;
        eprintln!("vlanswitchctl: captured {frames} frames, {bytes} bytes, to {place}");
        let missed = self.blocks.missed();
        if missed > 0 {
            eprintln!(
                "vlanswitchctl: {missed} more frames were missed: the reader was too slow; a \
                 --filter or a smaller --snaplen helps"
            );
        }
    }
}

/// A file or standard output.
enum Output {
    File(File),
    Standard(io::Stdout),
}

impl Output {
    /// Writes all of it, or as much as it can; how much that was.
    fn write(&mut self, bytes: &[u8]) -> (usize, io::Result<()>) {
        let output: &mut dyn Write = match self {
            Self::File(file) => file,
            Self::Standard(stdout) => stdout,
        };
        let mut written = 0;
        while let Some(rest) = bytes.get(written..).filter(|rest| !rest.is_empty()) {
            match output.write(rest) {
                Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
                Ok(more) => written += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return (written, Err(error)),
            }
        }
        (written, output.flush())
    }
}

fn open(path: Option<&Path>) -> Result<Output, Failure> {
    match path {
        Some(path) => {
            File::create(path).map(Output::File).map_err(|error| failed(Some(path), error))
        }
        None => Ok(Output::Standard(io::stdout())),
    }
}

fn failed(path: Option<&Path>, error: io::Error) -> Failure {
    match path {
        Some(path) => {
            let cure = match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                    ": the disk is full; free some of it, or write elsewhere"
                }
                _ => "",
            };
            Failure::Message(format!("{}: {error}{cure}", path.display()))
        }
        None => written(error),
    }
}

/// Counts frames in a pcapng stream that comes in pieces
/// (draft-ietf-opsawg-pcapng: each block starts with its type and length, in the byte
/// order that the section's header tells by a magic number).
#[derive(Debug, Default)]
struct Blocks {
    bytes: u64,
    frames: u64,
    /// By interface: what its frames' counts of missed ones before them add up to, and
    /// in the end what its statistics say. A capture that we end has no statistics.
    missed_of: BTreeMap<u32, u64>,
    big_endian: bool,
    /// The block that has not come whole.
    part: Vec<u8>,
}

impl Blocks {
    /// The same in both byte orders.
    const SECTION_HEADER: u32 = 0x0a0d_0d0a;
    const BIG_ENDIAN: [u8; 4] = [0x1a, 0x2b, 0x3c, 0x4d];
    const ENHANCED_PACKET: u32 = 6;
    const INTERFACE_STATISTICS: u32 = 5;
    /// `epb_dropcount`: frames missed since the one before.
    const DROP_COUNT: u16 = 4;
    /// `isb_ifdrop`: frames missed in all.
    const IF_DROP: u16 = 5;
    const END_OF_OPTIONS: u16 = 0;

    fn missed(&self) -> u64 {
        self.missed_of.values().sum()
    }

    /// Forgets the block that has not come whole; the length of all that have, in bytes.
    fn cut(&mut self) -> u64 {
        self.bytes -= self.part.len() as u64;
        self.part.clear();
        self.bytes
    }

    fn count(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.part.extend_from_slice(bytes);
        // The shortest block: type, length, magic or a body, length.
        while let Some(magic) = four(&self.part, 8) {
            let kind = self.word(&self.part, 0);
            if kind == Some(Self::SECTION_HEADER) {
                self.big_endian = magic == Self::BIG_ENDIAN;
            }
            let length = self.word(&self.part, 4).and_then(|length| usize::try_from(length).ok());
            // Shorter than its own header: not pcapng, and no more counting.
            let Some(length) = length.filter(|length| *length >= 12) else {
                self.part.clear();
                return;
            };
            let Some(block) = self.part.get(..length) else { return };
            match kind {
                Some(Self::ENHANCED_PACKET) => {
                    self.frames += 1;
                    if let Some((interface, missed)) = self.missed_before(block) {
                        *self.missed_of.entry(interface).or_default() += missed;
                    }
                }
                Some(Self::INTERFACE_STATISTICS) => {
                    if let Some((interface, missed)) = self.missed_in_all(block) {
                        self.missed_of.insert(interface, missed);
                    }
                }
                _ => {}
            }
            self.part.drain(..length);
        }
    }

    /// Of an enhanced packet block: interface, time, lengths and the frame stand before
    /// its options.
    fn missed_before(&self, block: &[u8]) -> Option<(u32, u64)> {
        let captured = usize::try_from(self.word(block, 20)?).ok()?;
        let options = block.get(28..)?.get(captured.checked_next_multiple_of(4)?..)?;
        Some((self.word(block, 8)?, self.option(options, Self::DROP_COUNT)?))
    }

    /// Of an interface statistics block: interface and time stand before its options.
    fn missed_in_all(&self, block: &[u8]) -> Option<(u32, u64)> {
        Some((self.word(block, 8)?, self.option(block.get(20..)?, Self::IF_DROP)?))
    }

    /// An option of eight bytes, a number.
    fn option(&self, mut options: &[u8], wanted: u16) -> Option<u64> {
        loop {
            // Code and length share a word.
            let word = self.word(options, 0)?.to_be_bytes();
            let (first, second) = (half(word, 0), half(word, 2));
            let (code, length) = if self.big_endian { (first, second) } else { (second, first) };
            let rest = options.get(4..)?;
            match code {
                code if code == wanted => {
                    let (a, b) = (u64::from(self.word(rest, 0)?), u64::from(self.word(rest, 4)?));
                    return Some(if self.big_endian { a << 32 | b } else { b << 32 | a });
                }
                Self::END_OF_OPTIONS => return None,
                _ => options = rest.get(usize::from(length).next_multiple_of(4)..)?,
            }
        }
    }

    fn word(&self, bytes: &[u8], offset: usize) -> Option<u32> {
        let bytes = four(bytes, offset)?;
        Some(if self.big_endian { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    }
}

fn four(bytes: &[u8], offset: usize) -> Option<[u8; 4]> {
    bytes.get(offset..)?.first_chunk().copied()
}

fn half([a, b, c, d]: [u8; 4], offset: usize) -> u16 {
    u16::from_be_bytes(if offset == 0 { [a, b] } else { [c, d] })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of two frames and 77 + 3 missed, made by hand.
    fn file(big_endian: bool) -> Vec<u8> {
        let two =
            |number: u16| if big_endian { number.to_be_bytes() } else { number.to_le_bytes() };
        let word =
            |number: u32| if big_endian { number.to_be_bytes() } else { number.to_le_bytes() };
        let long =
            |number: u64| if big_endian { number.to_be_bytes() } else { number.to_le_bytes() };
        let block = |kind: u32, body: &[u8]| -> Vec<u8> {
            let length = word(12 + body.len() as u32);
            [&word(kind)[..], &length, body, &length].concat()
        };
        let section = [&word(0x1a2b_3c4d)[..], &two(1), &two(0), &[0xff; 8]].concat();
        // On interface 2, 5 bytes with padding, and 3 missed before it.
        let mut frame = [&word(2)[..], &[0; 8], &word(5), &word(60), &[0xff; 8]].concat();
        frame.extend([&two(4)[..], &two(8), &long(3), &[0; 4]].concat());
        let mut statistics = [&word(1)[..], &[0; 8]].concat();
        statistics.extend([&two(3)[..], &two(3), &[1, 2, 3, 0]].concat());
        statistics.extend([&two(5)[..], &two(8), &long(77)].concat());
        [
            block(0x0a0d_0d0a, &section),
            block(1, &[0; 8]),
            block(6, &frame),
            block(5, &statistics),
            block(6, &[0; 20]),
        ]
        .concat()
    }

    #[test]
    fn blocks_are_counted_in_whatever_pieces_and_byte_order() {
        for big_endian in [false, true] {
            let file = file(big_endian);
            for piece in [1, 3, 7, 64, file.len()] {
                let mut blocks = Blocks::default();
                file.chunks(piece).for_each(|bytes| blocks.count(bytes));
                assert_eq!((blocks.frames, blocks.missed()), (2, 80), "{piece}");
                assert_eq!(blocks.bytes, file.len() as u64);
            }
        }
        // A block that has not come whole is cut off again.
        let whole = file(false);
        let last = 12 + 20;
        for missing in [1, 4, 31] {
            let mut blocks = Blocks::default();
            blocks.count(whole.get(..whole.len() - missing).unwrap_or_default());
            assert_eq!(blocks.cut(), (whole.len() - last) as u64, "{missing}");
        }
        let mut blocks = Blocks::default();
        blocks.count(&[0; 64]);
        assert_eq!(blocks.frames, 0);
    }
}
