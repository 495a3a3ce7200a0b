//! How much of a round a port may take.
//!
//! A burst is 64 frames of each port that has some, so nobody waits long for its turn;
//! but a super-frame that has to be cut here is up to a thousand frames' work, and one
//! of 2 kB in segments of 8 bytes more than two hundred. A port that makes such work
//! takes fewer frames at a time, and sits out as many rounds as it was ahead (deficit
//! round robin: Shreedhar and Varghese, SIGCOMM 1995). Alone it loses nothing by that:
//! a round without others is short.

use crate::sys::packet::BURST;

/// A port's turns.
#[derive(Debug)]
pub struct Turns {
    /// Segments made beyond what its rounds were worth.
    debt: usize,
    /// Frames to take next time.
    most: usize,
}

impl Default for Turns {
    fn default() -> Self {
        Self { debt: 0, most: BURST }
    }
}

impl Turns {
    /// How many frames it may take this round; `None` to sit it out.
    #[inline]
    pub fn begin(&mut self) -> Option<usize> {
        self.debt = self.debt.saturating_sub(BURST);
        (self.debt == 0).then_some(self.most)
    }

    /// It took so many frames, of which so many segments had to be made.
    #[inline]
    pub fn end(&mut self, frames: usize, segments: usize) {
        self.debt = segments;
        self.most = (frames * BURST).checked_div(segments).unwrap_or(BURST).clamp(1, BURST);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_makes_segments_takes_less_and_waits() {
        let mut turns = Turns::default();
        assert_eq!(turns.begin(), Some(BURST));
        turns.end(BURST, 0);
        assert_eq!(turns.begin(), Some(BURST));
        // A thousand segments of one frame are worth fifteen rounds and a half.
        turns.end(1, 1000);
        assert_eq!((0..15).filter_map(|_| turns.begin()).count(), 0);
        assert_eq!(turns.begin(), Some(1));
        // Ordinary super-frames in a tunnel: one at a time, each round.
        turns.end(1, 45);
        assert_eq!(turns.begin(), Some(1));
        turns.end(4, 8);
        assert_eq!(turns.begin(), Some(32));
        turns.end(0, 0);
        assert_eq!(turns.begin(), Some(BURST));
    }
}
