//! The file format: pcapng (draft-ietf-opsawg-pcapng) by the crate `pcap-file`.
//!
//! One section. An interface is described before its first frame, named as the
//! device; times are in nanoseconds. A frame carries its direction, the reason if it
//! was dropped as a comment (`dropped: tagged_on_access`), and how many frames were
//! missed before it at its interface. At the end each interface gets its statistics.
//!
//! The section is big-endian, on every host: pcap-file 2.0 writes the time in the
//! statistics as one number of 64 bits, where the format wants the upper half first.

use crate::dataplane::{Direction, Record};
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::blocks::interface_statistics::{
    InterfaceStatisticsBlock, InterfaceStatisticsOption,
};
use pcap_file::pcapng::blocks::section_header::{SectionHeaderBlock, SectionHeaderOption};
use pcap_file::pcapng::{PcapNgBlock, PcapNgWriter};
use pcap_file::{DataLink, Endianness, PcapError};
use std::borrow::Cow;
use std::io::{self, BufWriter, Write};
use std::time::Duration;

/// Bytes collected before they are written.
const BUFFER_LEN: usize = 64 * 1024;
/// `if_tsresol`: ten to the minus ninth of a second.
const NANOSECONDS: u8 = 9;
/// `epb_flags`: the direction of a frame.
const INBOUND: u32 = 1;
const OUTBOUND: u32 = 2;

/// What is said of an interface at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statistics {
    /// Nanoseconds since 1970 at the start and the end of the capture.
    pub span: (u64, u64),
    /// Frames that were selected, missed ones included.
    pub selected: u64,
    /// Frames missed.
    pub missed: u64,
    /// Frames written.
    pub written: u64,
}

/// Writes one capture.
pub struct Writer<W: Write> {
    pcapng: PcapNgWriter<BufWriter<W>>,
    snaplen: u32,
    interfaces: u32,
}

impl<W: Write> Writer<W> {
    /// Starts the file.
    ///
    /// # Errors
    /// The writer's.
    pub fn new(writer: W, snaplen: u32) -> io::Result<Self> {
        let program = concat!("vlanswitchd ", env!("CARGO_PKG_VERSION"));
        let section = SectionHeaderBlock {
            endianness: Endianness::Big,
            options: vec![SectionHeaderOption::UserApplication(Cow::Borrowed(program))],
            ..SectionHeaderBlock::default()
        };
        let buffer = BufWriter::with_capacity(BUFFER_LEN, writer);
        let pcapng = PcapNgWriter::with_section_header(buffer, section).map_err(plain)?;
        Ok(Self { pcapng, snaplen, interfaces: 0 })
    }

    /// Describes an interface and returns its number.
    ///
    /// # Errors
    /// The writer's.
    pub fn interface(&mut self, name: &str) -> io::Result<u32> {
        self.block(InterfaceDescriptionBlock {
            linktype: DataLink::ETHERNET,
            snaplen: self.snaplen,
            options: vec![
                InterfaceDescriptionOption::IfName(Cow::Borrowed(name)),
                InterfaceDescriptionOption::IfTsResol(NANOSECONDS),
            ],
        })?;
        let id = self.interfaces;
        self.interfaces += 1;
        Ok(id)
    }

    /// Writes the first `keep` bytes of a frame of the interface `id`, before which
    /// `missed` are missing.
    ///
    /// # Errors
    /// The writer's.
    pub fn frame(
        &mut self,
        id: u32,
        record: &Record<'_>,
        keep: u32,
        missed: u64,
    ) -> io::Result<()> {
        let flags = match record.direction {
            Direction::Inbound => INBOUND,
            Direction::Outbound => OUTBOUND,
        };
        let mut options = vec![EnhancedPacketOption::Flags(flags)];
        if missed > 0 {
            options.push(EnhancedPacketOption::DropCount(missed));
        }
        if let Some(reason) = record.reason {
            options
                .push(EnhancedPacketOption::Comment(format!("dropped: {}", reason.name()).into()));
        }
        let keep = record.bytes.len().min(keep as usize);
        self.block(EnhancedPacketBlock {
            interface_id: id,
            timestamp: Duration::from_nanos(record.time),
            original_len: record.length,
            data: Cow::Borrowed(record.bytes.get(..keep).unwrap_or_default()),
            options,
        })
    }

    /// Writes the statistics of the interface `id`.
    ///
    /// # Errors
    /// The writer's.
    pub fn statistics(&mut self, id: u32, values: Statistics) -> io::Result<()> {
        let (start, end) = values.span;
        self.block(InterfaceStatisticsBlock {
            interface_id: id,
            timestamp: end,
            options: vec![
                InterfaceStatisticsOption::IsbStartTime(start),
                InterfaceStatisticsOption::IsbEndTime(end),
                InterfaceStatisticsOption::IsbIfRecv(values.selected),
                InterfaceStatisticsOption::IsbIfDrop(values.missed),
                InterfaceStatisticsOption::IsbFilterAccept(values.written),
            ],
        })
    }

    /// Writes out what was collected.
    ///
    /// # Errors
    /// The writer's.
    pub fn flush(&mut self) -> io::Result<()> {
        self.pcapng.get_mut().flush()
    }

    /// The writer given at the start.
    pub fn get_ref(&self) -> &W {
        self.pcapng.get_ref().get_ref()
    }

    fn block<'b>(&mut self, block: impl PcapNgBlock<'b>) -> io::Result<()> {
        self.pcapng.write_pcapng_block(block).map(drop).map_err(plain)
    }
}

fn plain(error: PcapError) -> io::Error {
    match error {
        PcapError::IoError(error) => error,
        other => io::Error::other(other),
    }
}
