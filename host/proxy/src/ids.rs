//! Request ids: random UUIDs (RFC 9562, version 4), from a store of randomness that is refilled a page at a time.

use std::cell::RefCell;

const STORE_BYTES: usize = 4096;

/// Makes ids for one worker.
pub(crate) struct RequestIds {
    store: RefCell<Store>,
}

struct Store {
    bytes: [u8; STORE_BYTES],
    used: usize,
}

/// An id's 36 characters.
pub(crate) struct RequestId([u8; 36]);

impl RequestId {
    pub(crate) fn as_str(&self) -> &str {
        // Only hexadecimal digits and dashes were written.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }
}

impl RequestIds {
    pub(crate) fn new() -> RequestIds {
        RequestIds { store: RefCell::new(Store { bytes: [0; STORE_BYTES], used: STORE_BYTES }) }
    }

    pub(crate) fn next(&self) -> RequestId {
        let mut store = self.store.borrow_mut();
        if store.used + 16 > STORE_BYTES {
            // The system's randomness can fail only before it was ever ready, which is over by now; ids of zeroes and a
            // version would then be the lesser evil than no answer.
            let _ = getrandom::fill(&mut store.bytes);
            store.used = 0;
        }
        let start = store.used;
        store.used += 16;
        let mut random = [0; 16];
        if let Some(taken) = store.bytes.get(start..start + 16) {
            random.copy_from_slice(taken);
        }
        format(random)
    }
}

fn format(random: [u8; 16]) -> RequestId {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let number = (u128::from_be_bytes(random) & !(0xf << 76) & !(0x3 << 62)) | (4 << 76) | (2 << 62);
    let mut text = [b'-'; 36];
    let places = (0..36).filter(|place| !matches!(place, 8 | 13 | 18 | 23));
    for (digit, place) in places.enumerate() {
        let nibble = (number >> (124 - 4 * digit)) & 0xf;
        if let (Some(to), Some(from)) = (text.get_mut(place), DIGITS.get(nibble as usize)) {
            *to = *from;
        }
    }
    RequestId(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_version_4_uuids() {
        assert_eq!(format([0; 16]).as_str(), "00000000-0000-4000-8000-000000000000");
        assert_eq!(format([0xff; 16]).as_str(), "ffffffff-ffff-4fff-bfff-ffffffffffff");
        assert_eq!(
            format([0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0, 0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 0xde, 0xf0])
                .as_str(),
            "12345678-9abc-4ef0-9234-56789abcdef0"
        );
    }

    #[test]
    fn ids_differ_across_refills() {
        let ids = RequestIds::new();
        let made: std::collections::HashSet<String> = (0..1000).map(|_| ids.next().as_str().to_owned()).collect();
        assert_eq!(made.len(), 1000);
    }
}
