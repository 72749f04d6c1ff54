//! [`IdMap`]: a map whose keys are numbers that the host has given out.
//!
//! The standard library's hash keeps strangers from choosing keys that collide. Nobody chooses these: guests can look a number up, but only
//! the host adds one. A multiplication is enough for them, and what every host function looks up first should cost no more.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// See the module.
pub(crate) type IdMap<K, V> = HashMap<K, V, BuildHasherDefault<IdHasher>>;

/// Spreads numbers that follow each other over the whole range.
#[derive(Default)]
pub(crate) struct IdHasher(u64);

/// 2^64 divided by the golden ratio (Knuth, The Art of Computer Programming, volume 3, section 6.4).
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

impl Hasher for IdHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, number: u32) {
        self.write_u64(u64::from(number));
    }

    fn write_u64(&mut self, number: u64) {
        self.0 = (self.0.rotate_left(5) ^ number).wrapping_mul(FACTOR);
    }

    fn finish(&self) -> u64 {
        // The upper bits are the well mixed ones; the table looks at both ends.
        self.0 ^ (self.0 >> 32)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn hash(of: impl std::hash::Hash) -> u64 {
        let mut hasher = IdHasher::default();
        of.hash(&mut hasher);
        hasher.finish()
    }

    #[test]
    fn numbers_in_a_row_and_in_steps_fall_into_different_places() {
        for step in [1u32, 4, 64, 1024] {
            let places: HashSet<u64> = (0..1000).map(|n| hash(n * step) & 0x3ff).collect();
            assert!(places.len() > 550, "{} of 1024 places for steps of {step}", places.len());
            let tags: HashSet<u64> = (0..1000).map(|n| hash(n * step) >> 57).collect();
            assert!(tags.len() > 100, "{} of 128 tags for steps of {step}", tags.len());
        }
        assert_ne!(hash((1u64, 2u32)), hash((2u64, 1u32)));
    }
}
