//! The Internet checksum (RFC 1071).

/// A one's complement sum of 16-bit words as they lie in memory. In which order their bytes are read does not matter,
/// as long as the result is stored in the same order (RFC 1071, 2 B).
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sum(u64);

impl Sum {
    /// With these bytes behind those before. Of several additions only the last may be of an odd number.
    #[must_use]
    pub(crate) fn add(self, bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        // 2^32 words of 32 bits fit 64: more than any packet has.
        let sum: u64 = words.iter().map(|word| u64::from(u32::from_ne_bytes(*word))).sum();
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        Self(self.0 + sum + u64::from(u32::from_ne_bytes(last)))
    }

    /// The sum in 16 bits.
    pub(crate) fn folded(self) -> [u8; 2] {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        #[expect(clippy::cast_possible_truncation, reason = "16 bits are left")]
        (sum as u16).to_ne_bytes()
    }

    /// What makes the sum of everything, itself included, all ones.
    pub(crate) fn checksum(self) -> [u8; 2] {
        self.folded().map(|byte| !byte)
    }

    /// Whether everything, its checksum included, is intact.
    pub(crate) fn is_intact(self) -> bool {
        self.folded() == [0xff; 2]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_is_the_one_of_the_rfc() {
        // RFC 1071, 3.
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::default().add(&bytes).folded(), [0xdd, 0xf2]);
        assert_eq!(Sum::default().add(&bytes[..4]).add(&bytes[4..]).folded(), [0xdd, 0xf2]);
    }

    #[test]
    fn odd_byte_counts_as_the_upper_half_of_a_word() {
        assert_eq!(Sum::default().add(&[1, 2, 3]).folded(), Sum::default().add(&[1, 2, 3, 0]).folded());
        assert_eq!(Sum::default().add(&[0x12]).folded(), [0x12, 0]);
    }

    #[test]
    fn changed_byte_is_found() {
        let mut bytes: Vec<u8> = (0..60).collect();
        bytes[10..12].fill(0);
        let checksum = Sum::default().add(&bytes).checksum();
        bytes[10..12].copy_from_slice(&checksum);
        assert!(Sum::default().add(&bytes).is_intact());
        bytes[33] ^= 4;
        assert!(!Sum::default().add(&bytes).is_intact());
    }

    #[test]
    fn longest_packet_of_ones_does_not_overflow() {
        assert_eq!(Sum::default().add(&[0xff; 65_536]).folded(), [0xff; 2]);
    }
}
