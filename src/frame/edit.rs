//! The tag edit: one record describes every rewrite a port can ask for, in the
//! manner of VPP's `l2_vtr`: how many bytes of tag to pop, which tags to push.
//!
//! The edit happens where the frame lies. In front of every received frame there
//! is room (in a ring slot: the kernel's slot header, which is ours until the slot
//! goes back), so pushing a tag moves the twelve bytes of MAC addresses down and
//! the payload not at all, and virtio header, tags and frame stay one contiguous
//! piece: one iovec a frame (docs/adr/0001-edit-in-the-slot.md has the figures).

use super::tag::Tag;
use super::vnet::{VNET_HEADER_LEN, VnetHeader};
use super::{ETHERNET_HEADER_LEN, MAC_ADDRESSES_LEN, TAG_LEN};

/// Tags one edit can push.
pub const PUSH_MAX: usize = 2;
/// Bytes that must be free before a received frame: the virtio header, the
/// pushed tags, and the tag the kernel stripped when it is put back.
pub const HEADROOM: usize = VNET_HEADER_LEN + (PUSH_MAX + 1) * TAG_LEN;

/// What to do to the tags of one frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TagEdit {
    /// Tags to take off, from the outside.
    pub pop: u8,
    /// Tags to put on afterwards, outermost first; `None` ends the list.
    pub push: [Option<Tag>; PUSH_MAX],
}

/// The frame ends before the bytes an edit has to touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DoesNotFit;

/// A frame in a buffer with [`HEADROOM`] in front of it.
#[derive(Debug)]
pub struct FrameBuffer<'a> {
    bytes: &'a mut [u8],
    start: usize,
}

impl<'a> FrameBuffer<'a> {
    /// The frame that starts `start` bytes into `bytes` and fills the rest.
    ///
    /// `None` if there is less than [`HEADROOM`] before it or less than an
    /// Ethernet header in it.
    #[inline]
    pub fn new(bytes: &'a mut [u8], start: usize) -> Option<Self> {
        let enough = start >= HEADROOM && bytes.len() >= start.checked_add(ETHERNET_HEADER_LEN)?;
        enough.then_some(Self { bytes, start })
    }

    /// The frame, from its destination address on.
    #[inline]
    pub fn frame(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    /// Length of the frame in bytes.
    #[inline]
    pub fn frame_len(&self) -> usize {
        self.bytes.len().saturating_sub(self.start)
    }

    /// What to hand to the kernel: virtio header and frame.
    #[inline]
    pub fn packet(&self) -> &[u8] {
        self.bytes.get(self.start.saturating_sub(VNET_HEADER_LEN)..).unwrap_or_default()
    }

    /// Applies an edit, `stripped` being the tag that stands before those in the
    /// bytes. Returns by how many bytes the frame grew (negative: shrank).
    ///
    /// # Errors
    /// [`DoesNotFit`] if the frame is shorter than what is popped; the frame is
    /// then unchanged.
    #[inline]
    pub fn apply(&mut self, edit: &TagEdit, stripped: Option<Tag>) -> Result<i32, DoesNotFit> {
        let put_back = if edit.pop == 0 { stripped } else { None };
        let pop_in_band = if stripped.is_some() { edit.pop.saturating_sub(1) } else { edit.pop };
        if pop_in_band == 0 && put_back.is_none() && edit.push.first().is_none_or(Option::is_none) {
            return Ok(0);
        }
        self.rewrite(usize::from(pop_in_band) * TAG_LEN, edit.push.into_iter().chain([put_back]))
    }

    fn rewrite(
        &mut self,
        pop_len: usize,
        tags: impl Iterator<Item = Option<Tag>>,
    ) -> Result<i32, DoesNotFit> {
        let body = self.start + pop_len;
        if body + ETHERNET_HEADER_LEN > self.bytes.len() {
            return Err(DoesNotFit);
        }
        let addresses: [u8; MAC_ADDRESSES_LEN] =
            *self.bytes.get(self.start..).and_then(<[u8]>::first_chunk).ok_or(DoesNotFit)?;
        let mut block = [0; PUSH_MAX * TAG_LEN + TAG_LEN];
        let mut block_len = 0;
        for tag in tags.flatten() {
            let place = block.get_mut(block_len..).and_then(<[u8]>::first_chunk_mut);
            *place.ok_or(DoesNotFit)? = tag.to_bytes();
            block_len += TAG_LEN;
        }
        let start = body.checked_sub(block_len).ok_or(DoesNotFit)?;
        let head = self.bytes.get_mut(start..body + MAC_ADDRESSES_LEN).ok_or(DoesNotFit)?;
        let (address_place, tag_place) =
            head.split_first_chunk_mut::<MAC_ADDRESSES_LEN>().ok_or(DoesNotFit)?;
        *address_place = addresses;
        for (place, byte) in tag_place.iter_mut().zip(block) {
            *place = byte;
        }
        let growth = block_len as i32 - pop_len as i32;
        self.start = start;
        Ok(growth)
    }

    /// Writes the virtio header in front of the frame.
    #[inline]
    pub fn write_header(&mut self, header: VnetHeader) {
        let place = self.start.checked_sub(VNET_HEADER_LEN);
        if let Some(bytes) =
            place.and_then(|offset| self.bytes.get_mut(offset..)).and_then(<[u8]>::first_chunk_mut)
        {
            *bytes = header.to_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "tests fail by panicking")]
    use super::super::{Tci, Tpid};
    use super::*;
    use proptest::prelude::*;

    fn tag() -> impl Strategy<Value = Tag> {
        (0..4usize, any::<u16>())
            .prop_map(|(tpid, tci)| Tag { tpid: Tpid::ALL[tpid], tci: Tci(tci) })
    }

    /// The edit as one would write it without caring for speed: the wire form in
    /// a vector, tags removed and inserted after the addresses.
    fn naive(frame: &[u8], stripped: Option<Tag>, edit: &TagEdit) -> Vec<u8> {
        let mut wire = frame.to_vec();
        if let Some(tag) = stripped {
            wire.splice(12..12, tag.to_bytes());
        }
        wire.drain(12..12 + 4 * usize::from(edit.pop));
        let pushed: Vec<u8> = edit.push.iter().flatten().flat_map(|tag| tag.to_bytes()).collect();
        wire.splice(12..12, pushed);
        wire
    }

    proptest! {
        #[test]
        fn edit_agrees_with_the_naive_one(
            in_band in proptest::collection::vec(tag(), 0..4),
            stripped in proptest::option::of(tag()),
            pop in 0..3u8,
            push in proptest::collection::vec(tag(), 0..=2),
            payload in proptest::collection::vec(any::<u8>(), 0..100),
            spare in 0..40usize,
        ) {
            let mut frame = vec![0x02, 0, 0, 0, 0, 1, 0x02, 0, 0, 0, 0, 2];
            frame.extend(in_band.iter().flat_map(|tag| tag.to_bytes()));
            frame.extend([0x88, 0xb5]);
            frame.extend(&payload);
            let present = in_band.len() + usize::from(stripped.is_some());
            let pop = pop.min(present as u8);
            let edit = TagEdit { pop, push: [push.first().copied(), push.get(1).copied()] };

            let mut space = vec![0xaa; HEADROOM + spare];
            space.extend(&frame);
            let mut buffer = FrameBuffer::new(&mut space, HEADROOM + spare).unwrap();
            let growth = buffer.apply(&edit, stripped).unwrap();
            prop_assert_eq!(buffer.frame(), &naive(&frame, stripped, &edit)[..]);
            prop_assert_eq!(buffer.frame_len() as i32, frame.len() as i32 + growth);

            let header = VnetHeader { flags: 1, hdr_len: 54, csum_start: 34, ..VnetHeader::default() };
            buffer.write_header(header);
            let packet = buffer.packet();
            prop_assert_eq!(&packet[..10], &header.to_bytes());
            prop_assert_eq!(&packet[10..], buffer.frame());
        }
    }

    #[test]
    fn a_frame_shorter_than_the_pop_is_left_alone() {
        let mut space = vec![7; HEADROOM + 16];
        let mut buffer = FrameBuffer::new(&mut space, HEADROOM).unwrap();
        let edit = TagEdit { pop: 1, push: [None; 2] };
        assert_eq!(buffer.apply(&edit, None), Err(DoesNotFit));
        assert_eq!(buffer.frame(), &[7; 16]);
    }

    #[test]
    fn no_buffer_without_headroom() {
        let mut space = vec![0; HEADROOM + 14];
        assert!(FrameBuffer::new(&mut space, HEADROOM - 1).is_none());
        assert!(FrameBuffer::new(&mut space, HEADROOM + 1).is_none());
        assert!(FrameBuffer::new(&mut space, HEADROOM).is_some());
    }
}
