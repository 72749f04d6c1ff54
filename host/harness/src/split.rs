//! A body in every way in which it can arrive.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

/// Up to this many bytes, every way to split is tried: 2^(n-1) of them. Longer bodies are split at every one place, and
/// into single bytes.
const EXHAUSTIVE_BYTES_MAX: usize = 10;

/// The ways in which `body` can be split into pieces, the whole body first.
///
/// Of a body of up to ten bytes all 2^(n-1) ways; of a longer one those into two pieces, and that into single bytes.
/// Pieces are never empty; an empty body has one way, without pieces.
pub fn splits(body: &[u8]) -> impl Iterator<Item = Vec<&[u8]>> {
    let gaps = body.len().saturating_sub(1);
    let ways = if body.len() <= EXHAUSTIVE_BYTES_MAX { 1 << gaps } else { gaps + 2 };
    (0..ways).map(move |way| {
        let cut_after = |at: usize| match (body.len() <= EXHAUSTIVE_BYTES_MAX, way) {
            (true, way) => way >> at & 1 == 1,
            (false, 0) => false,
            (false, way) if way <= gaps => at + 1 == way,
            (false, _) => true,
        };
        let mut pieces = Vec::new();
        let mut start = 0;
        for at in 0..gaps {
            if cut_after(at) {
                pieces.push(&body[start..=at]);
                start = at + 1;
            }
        }
        if start < body.len() {
            pieces.push(&body[start..]);
        }
        pieces
    })
}

/// Calls `test` with every one of [`splits`], and says how the body was split when it panics.
pub fn for_every_split(body: impl AsRef<[u8]>, mut test: impl FnMut(&[&[u8]])) {
    for pieces in splits(body.as_ref()) {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| test(&pieces))) {
            let shown: Vec<String> = pieces.iter().map(|piece| piece.escape_ascii().to_string()).collect();
            eprintln!("the body was split as: {}", shown.join(" | "));
            resume_unwind(panic);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn short_bodies_are_split_in_every_way() {
        let ways: Vec<String> = splits(b"abc")
            .map(|pieces| pieces.iter().map(|piece| String::from_utf8_lossy(piece)).collect::<Vec<_>>().join("|"))
            .collect();
        assert_eq!(ways, ["abc", "a|bc", "ab|c", "a|b|c"]);
        assert_eq!(splits(b"").collect::<Vec<_>>(), [Vec::<&[u8]>::new()]);
        assert_eq!(splits(b"a").collect::<Vec<_>>(), [vec![b"a"]]);
    }

    #[test]
    fn longer_bodies_are_split_at_every_place_and_into_bytes() {
        for len in [EXHAUSTIVE_BYTES_MAX, EXHAUSTIVE_BYTES_MAX + 1, 300] {
            let body: Vec<u8> = (0..len).map(|at| at as u8).collect();
            let ways: Vec<Vec<&[u8]>> = splits(&body).collect();
            assert!(ways.iter().all(|pieces| pieces.concat() == body && pieces.iter().all(|piece| !piece.is_empty())));
            assert_eq!(ways.iter().collect::<BTreeSet<_>>().len(), ways.len(), "no way comes twice");
            let firsts: BTreeSet<usize> =
                ways.iter().filter(|ways| ways.len() == 2).map(|ways| ways[0].len()).collect();
            assert_eq!(firsts, (1..len).collect());
            assert!(ways.iter().any(|pieces| pieces.len() == len));
        }
    }

    #[test]
    fn a_panic_goes_on() {
        let mut tried = 0;
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            for_every_split("abcd", |pieces| {
                tried += 1;
                assert!(pieces.len() < 3, "three pieces");
            });
        }));
        assert!(outcome.is_err());
        assert_eq!(tried, 4);
    }
}
