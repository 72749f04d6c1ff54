//! The wire form of maps between host and guest: `u32` count, then each pair's two `u32` lengths, then each name and
//! value with a NUL behind it; little-endian throughout.

use crate::fields::FieldMap;
use crate::plugin::Limits;

/// What is read of a map that a guest hands over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    pub(crate) pairs_max: usize,
    /// Of the whole encoding.
    pub(crate) bytes_max: usize,
}

impl Bounds {
    /// What Envoy reads; a map above is no valid argument there. (proxy-wasm-cpp-host has these as constants.)
    pub(crate) const ENVOY: Bounds = Bounds { pairs_max: 1024, bytes_max: 1024 * 1024 };

    /// A plugin may be allowed more. Where it is allowed less, the map is read and then found to be too large, which is
    /// another answer.
    pub(crate) fn of(limits: &Limits) -> Bounds {
        Bounds {
            pairs_max: limits.map_lines_max.max(Bounds::ENVOY.pairs_max),
            bytes_max: limits.map_bytes_max.max(Bounds::ENVOY.bytes_max),
        }
    }
}

/// Appends the encoding of `pairs` to `out`; nothing at all for an empty list, as Envoy does.
pub(crate) fn encode<'a, I>(pairs: I, out: &mut Vec<u8>)
where
    I: ExactSizeIterator<Item = (&'a [u8], &'a [u8])> + Clone,
{
    let count = pairs.len();
    if count == 0 {
        return;
    }
    let bytes: usize = pairs.clone().map(|(k, v)| k.len() + v.len() + 2).sum();
    out.reserve(4 + count * 8 + bytes);
    out.extend_from_slice(&(count as u32).to_le_bytes());
    for (name, value) in pairs.clone() {
        out.extend_from_slice(&(name.len() as u32).to_le_bytes());
        out.extend_from_slice(&(value.len() as u32).to_le_bytes());
    }
    for (name, value) in pairs {
        out.extend_from_slice(name);
        out.push(0);
        out.extend_from_slice(value);
        out.push(0);
    }
}

/// Why a guest's map cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PairsError {
    #[error("the map has {0} bytes, at most {1} are read")]
    TooLarge(usize, usize),
    #[error("the map has {0} pairs, at most {1} are read")]
    TooMany(usize, usize),
    #[error("the map ends early")]
    Truncated,
    #[error("byte {0} of the map should be NUL")]
    Unterminated(usize),
    #[error("{0} bytes follow the last pair")]
    Trailing(usize),
}

/// Reads a guest's map. Zero bytes are an empty map.
pub(crate) fn decode(blob: &[u8], bounds: Bounds) -> Result<FieldMap, PairsError> {
    let Bounds { pairs_max, bytes_max } = bounds;
    if blob.is_empty() {
        return Ok(FieldMap::new());
    }
    if blob.len() > bytes_max {
        return Err(PairsError::TooLarge(blob.len(), bytes_max));
    }
    let count = read_u32(blob, 0)? as usize;
    if count > pairs_max {
        return Err(PairsError::TooMany(count, pairs_max));
    }
    let mut map = FieldMap::with_capacity(count, blob.len());
    let mut at = 4 + count * 8;
    for i in 0..count {
        let name_len = read_u32(blob, 4 + i * 8)? as usize;
        let value_len = read_u32(blob, 8 + i * 8)? as usize;
        let name = read_terminated(blob, at, name_len)?;
        at += name_len + 1;
        let value = read_terminated(blob, at, value_len)?;
        at += value_len + 1;
        map.push(name, value);
    }
    match blob.len() - at {
        0 => Ok(map),
        extra => Err(PairsError::Trailing(extra)),
    }
}

fn read_u32(blob: &[u8], at: usize) -> Result<u32, PairsError> {
    let bytes = blob.get(at..at + 4).ok_or(PairsError::Truncated)?;
    Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

/// `len` bytes from `at`, which a NUL must follow.
fn read_terminated(blob: &[u8], at: usize, len: usize) -> Result<&[u8], PairsError> {
    let end = at.checked_add(len).ok_or(PairsError::Truncated)?;
    let bytes = blob.get(at..end).ok_or(PairsError::Truncated)?;
    match blob.get(end) {
        Some(0) => Ok(bytes),
        Some(_) => Err(PairsError::Unterminated(end)),
        None => Err(PairsError::Truncated),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(blob: &[u8]) -> Result<FieldMap, PairsError> {
        super::decode(blob, Bounds::ENVOY)
    }

    fn blob(lines: &[(&str, &str)]) -> Vec<u8> {
        let map: FieldMap = lines.iter().copied().collect();
        let mut out = Vec::new();
        encode(map.iter(), &mut out);
        out
    }

    #[test]
    fn encodes_as_the_specification_lays_out() {
        assert_eq!(blob(&[("a", "bc")]), b"\x01\0\0\0\x01\0\0\0\x02\0\0\0a\0bc\0");
        assert_eq!(blob(&[]), b"");
    }

    #[test]
    fn decodes_what_it_encodes() {
        for lines in [&[][..], &[("a", "")], &[(":path", "/"), ("x", "1"), ("x", "2")]] {
            let map: FieldMap = lines.iter().copied().collect();
            assert_eq!(decode(&blob(lines)), Ok(map));
        }
        assert_eq!(decode(&[0, 0, 0, 0]), Ok(FieldMap::new()), "a guest's empty map is four zero bytes");
    }

    #[test]
    fn every_truncation_is_refused() {
        let whole = blob(&[("name", "value"), ("other", "")]);
        for len in 1..whole.len() {
            assert!(decode(&whole[..len]).is_err(), "{len} bytes of {}", whole.len());
        }
    }

    #[test]
    fn refuses_what_is_too_much_or_malformed() {
        let most = Bounds::ENVOY.bytes_max;
        assert_eq!(decode(&vec![0; most + 1]), Err(PairsError::TooLarge(most + 1, most)));
        assert_eq!(decode(&1025u32.to_le_bytes()), Err(PairsError::TooMany(1025, 1024)));
        assert_eq!(decode(b"\x01\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff"), Err(PairsError::Truncated));
        assert_eq!(decode(b"\x01\0\0\0\x01\0\0\0\x01\0\0\0axb\0"), Err(PairsError::Unterminated(13)));
        assert_eq!(decode(b"\x01\0\0\0\x01\0\0\0\x01\0\0\0a\0b\0!"), Err(PairsError::Trailing(1)));
    }
}
