//! The serialisation of header maps that Proxy-Wasm hosts and guests exchange.
//!
//! A count, then the lengths of each name and value, then each name and value followed by a zero byte; numbers are 32
//! bits, little-endian. The SDK's own reader panics on names that are not UTF-8 and copies every value.

use crate::request::FieldLine;

/// Reads a serialised map without copying. `None` if it is anything else. A map of nothing may be no bytes at all.
pub fn parse_pairs(map: &[u8]) -> Option<Vec<FieldLine<'_>>> {
    if map.is_empty() {
        return Some(Vec::new());
    }
    let (count, rest) = take_u32(map)?;
    let (mut lengths, mut data) = rest.split_at_checked(count.checked_mul(8)?)?;
    let mut pairs = Vec::with_capacity(count);
    while !lengths.is_empty() {
        let (name_length, rest) = take_u32(lengths)?;
        let (value_length, rest) = take_u32(rest)?;
        lengths = rest;
        let (name, rest) = take_text(data, name_length)?;
        let (value, rest) = take_text(rest, value_length)?;
        data = rest;
        pairs.push((name, value));
    }
    data.is_empty().then_some(pairs)
}

fn take_u32(bytes: &[u8]) -> Option<(usize, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    Some((usize::try_from(u32::from_le_bytes(*number)).ok()?, rest))
}

fn take_text(bytes: &[u8], length: usize) -> Option<FieldLine<'_>> {
    let (text, rest) = bytes.split_at_checked(length)?;
    Some((text, rest.strip_prefix(&[0])?))
}

/// Writes a map. `None` if it is longer than the 4 GiB that its numbers can tell, which no guest can hold.
pub fn serialise_pairs(pairs: &[FieldLine<'_>]) -> Option<Vec<u8>> {
    let number = |n: usize| u32::try_from(n).map(u32::to_le_bytes).ok();
    let mut map = number(pairs.len())?.to_vec();
    for (name, value) in pairs {
        map.extend(number(name.len())?);
        map.extend(number(value.len())?);
    }
    for text in pairs.iter().flat_map(|(name, value)| [name, value]) {
        map.extend_from_slice(text);
        map.push(0);
    }
    Some(map)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn serialise(pairs: &[FieldLine<'_>]) -> Vec<u8> {
        serialise_pairs(pairs).expect("short")
    }

    #[test]
    fn pairs_are_read_back_as_written() {
        let pairs: &[FieldLine<'_>] = &[(b":path", b"/"), (b"a", b"\0\xff"), (b"empty", b""), (b"a", b"2")];
        assert_eq!(parse_pairs(&serialise(pairs)).as_deref(), Some(pairs));
        assert_eq!(parse_pairs(&[]).as_deref(), Some(&[][..]));
        assert_eq!(parse_pairs(&[0, 0, 0, 0]).as_deref(), Some(&[][..]));
    }

    #[test]
    fn a_serialisation_that_is_cut_short_or_lies_about_lengths_is_refused() {
        let map = serialise(&[(b"name", b"value"), (b"n", b"v")]);
        for end in 1..map.len() {
            assert_eq!(parse_pairs(map.get(..end).expect("in range")), None, "cut at {end}");
        }
        assert_eq!(parse_pairs(&[0xff; 4]), None);
        assert_eq!(parse_pairs(&[0xff; 64]), None);
        assert_eq!(parse_pairs(&[&map[..], b"x"].concat()), None, "bytes left over");
    }

    proptest! {
        #[test]
        fn survives_any_serialisation(map in proptest::collection::vec(prop_oneof![Just(0u8), 0u8..9, any::<u8>()], 0..120)) {
            let _ = parse_pairs(&map);
        }
    }
}
