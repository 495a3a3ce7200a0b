//! The Internet checksum: ones' complement sums of 16-bit words (RFC 1071).
//!
//! A [`Sum`] is a sum not yet folded: sums of parts add up in any order, so a
//! header, a payload and a pseudo header are summed apart and joined at the end.
//! Each part but the last must have an even length, or its last byte would pair
//! with a zero instead of with the byte that follows.
//!
//! Words are loaded eight bytes at a time in the machine's byte order and swapped
//! once at the end (RFC 1071 section 2(B)); the two halves of each load go into
//! one 64-bit accumulator, which overflows only after 2^32 of them. The compiler
//! makes vector instructions of that loop.

/// A ones' complement sum, not folded and not inverted.
#[derive(Debug, Clone, Copy, Default)]
pub struct Sum(u64);

impl Sum {
    /// The sum of the 16-bit words of `bytes`; an odd last byte is the upper half
    /// of a word.
    #[inline]
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let (chunks, tail) = bytes.as_chunks::<8>();
        let mut accumulator = chunks
            .iter()
            .map(|chunk| u64::from_ne_bytes(*chunk))
            .fold(0_u64, |sum, word| sum + (word & 0xffff_ffff) + (word >> 32));
        let mut last = [0; 8];
        for (to, from) in last.iter_mut().zip(tail) {
            *to = *from;
        }
        let last = u64::from_ne_bytes(last);
        accumulator += (last & 0xffff_ffff) + (last >> 32);
        Self(u64::from(u16::from_be(fold(accumulator))))
    }

    /// The sum with one more 16-bit word.
    #[inline]
    #[must_use]
    pub const fn with_u16(self, word: u16) -> Self {
        Self(self.0 + word as u64)
    }

    /// The sum with the two 16-bit words of a 32-bit number.
    #[inline]
    #[must_use]
    pub const fn with_u32(self, number: u32) -> Self {
        Self(self.0 + (number >> 16) as u64 + (number & 0xffff) as u64)
    }

    /// The sum of both.
    #[inline]
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// The sum with a part taken out again.
    #[inline]
    #[must_use]
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 + !fold(other.0) as u64)
    }

    /// The 16-bit sum, not inverted: what a frame that `NEEDS_CSUM` carries in its
    /// checksum field, if this is the sum of the pseudo header.
    #[inline]
    #[must_use]
    pub const fn folded(self) -> u16 {
        fold(self.0)
    }

    /// The checksum: 0 over data that holds its own right checksum.
    #[inline]
    #[must_use]
    pub const fn checksum(self) -> u16 {
        !fold(self.0)
    }

    /// The checksum as UDP writes it: 0 means "none" there, so 0xffff stands for
    /// it (RFC 768).
    #[inline]
    #[must_use]
    pub const fn udp_checksum(self) -> u16 {
        match self.checksum() {
            0 => 0xffff,
            checksum => checksum,
        }
    }
}

/// Adds the carries back in until 16 bits are left.
#[inline]
const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + ((sum >> 16) & 0xffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}

/// The pseudo header of TCP and UDP over IPv4 (RFC 9293 section 3.1): source and
/// destination address, protocol, and the transport's length in bytes.
#[inline]
#[must_use]
pub fn pseudo_header_v4(addresses: &[u8; 8], protocol: u8, transport_len: u32) -> Sum {
    Sum::of(addresses).with_u16(u16::from(protocol)).with_u32(transport_len)
}

/// The pseudo header of TCP and UDP over IPv6 (RFC 8200 section 8.1).
#[inline]
#[must_use]
pub fn pseudo_header_v6(addresses: &[u8; 32], protocol: u8, transport_len: u32) -> Sum {
    Sum::of(addresses).with_u16(u16::from(protocol)).with_u32(transport_len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Word by word in a wide number, and the carries at the end.
    fn naive(bytes: &[u8]) -> u16 {
        let mut sum: u128 = 0;
        for pair in bytes.chunks(2) {
            sum += match pair {
                [high, low] => u128::from(*high) * 256 + u128::from(*low),
                [high] => u128::from(*high) * 256,
                _ => 0,
            };
        }
        while sum > 0xffff {
            sum = sum % 0x1_0000 + sum / 0x1_0000;
        }
        sum as u16
    }

    #[test]
    fn example_of_rfc_1071() {
        // Section 3: the words 0001 f203 f4f5 f6f7 sum to ddf2.
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::of(&bytes).folded(), 0xddf2);
        assert_eq!(Sum::of(&bytes).checksum(), 0x220d);
    }

    #[test]
    fn carries_survive_the_worst_case() {
        let ones = vec![0xff; 65_536];
        assert_eq!(Sum::of(&ones).folded(), 0xffff);
        assert_eq!(Sum(u64::MAX).folded(), 0xffff);
        assert_eq!(
            Sum(0x0001_ffff_ffff_ffff).folded(),
            naive(&0x0001_ffff_ffff_ffff_u64.to_be_bytes())
        );
    }

    #[test]
    fn udp_never_says_none() {
        assert_eq!(Sum::of(&[0xff, 0xff]).checksum(), 0);
        assert_eq!(Sum::of(&[0xff, 0xff]).udp_checksum(), 0xffff);
        assert_eq!(Sum::of(&[0x12, 0x34]).udp_checksum(), 0xedcb);
    }

    #[test]
    fn pseudo_headers_are_the_bytes_of_the_standards() {
        let v4 = [192, 0, 2, 1, 198, 51, 100, 7];
        let mut bytes = v4.to_vec();
        bytes.extend([0, 17, 0x12, 0x34]);
        assert_eq!(pseudo_header_v4(&v4, 17, 0x1234).folded(), naive(&bytes));

        let v6: [u8; 32] = std::array::from_fn(|index| (index * 37) as u8);
        let mut bytes = v6.to_vec();
        bytes.extend([0x00, 0x01, 0x12, 0x34, 0, 0, 0, 6]);
        assert_eq!(pseudo_header_v6(&v6, 6, 0x0001_1234).folded(), naive(&bytes));
    }

    proptest! {
        #[test]
        fn equals_the_naive_sum(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(Sum::of(&bytes).folded(), naive(&bytes));
        }

        #[test]
        fn parts_add_up_and_come_out_again(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            cut in 0..100_usize,
        ) {
            let (head, tail) = bytes.split_at((cut * 2).min(bytes.len() & !1));
            let whole = Sum::of(head).with(Sum::of(tail));
            prop_assert_eq!(whole.folded(), naive(&bytes));
            // 0 and 0xffff are the same number in ones' complement.
            prop_assert_eq!(whole.without(Sum::of(tail)).folded() % 0xffff, naive(head) % 0xffff);
        }
    }
}
