//! Randomness that can be repeated.

/// SplitMix64 (Steele, Lea and Flood, 2014): small, quick, and the same on every machine.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 if that is 0.
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        match bound as u64 {
            0 => 0,
            bound => (self.next() % bound) as usize,
        }
    }

    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn byte(&mut self) -> u8 {
        // Bytes at the edges are more telling than others.
        const EDGES: [u8; 12] = [0, 1, 0x7f, 0x80, 0xff, b'\r', b'\n', b'"', b'%', b':', b'0', b' '];
        if self.one_in(3) { EDGES[self.below(EDGES.len())] } else { self.next() as u8 }
    }

    /// A length up to `most`, mostly short.
    pub(crate) fn len(&mut self, most: usize) -> usize {
        let bound = self.below(most + 1);
        self.below(bound + 1)
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.byte()).collect()
    }
}
