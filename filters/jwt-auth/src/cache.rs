//! Remembers tokens that were verified, so that a client pays for a signature check once per token.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use std::time::Duration;

use portcullis_kit::time::UnixTime;
use sha2::{Digest, Sha256};

use crate::verify::Verified;

/// What identifies a token: its SHA-256. The token itself is not kept.
pub type TokenHash = [u8; 32];

/// The hash of a token, as sent.
pub fn hash(token: &[u8]) -> TokenHash {
    Sha256::digest(token).into()
}

/// Verified tokens, the oldest of which make room for new ones. Only who holds a valid token can add to it.
#[derive(Debug)]
pub struct Cache {
    entries_max: usize,
    age_max: Duration,
    entries: RefCell<Entries>,
}

#[derive(Debug, Default)]
struct Entries {
    by_hash: BTreeMap<TokenHash, Entry>,
    /// The hashes, oldest first; the same as the keys of `by_hash`.
    by_age: VecDeque<TokenHash>,
    /// Sum of the entries' token lengths.
    token_bytes: usize,
}

#[derive(Debug)]
struct Entry {
    verified: Rc<Verified>,
    since: UnixTime,
    token_bytes: usize,
}

/// The tokens in the cache together are no longer than this. Parsed claims take a few times the space of the token.
const TOKEN_BYTES_MAX: usize = 2 << 20;

impl Cache {
    /// A cache of so many tokens, none kept longer than this; of none, if `entries_max` is zero.
    pub fn new(entries_max: usize, age_max: Duration) -> Self {
        Self { entries_max, age_max, entries: RefCell::default() }
    }

    /// The token of this hash, if it was verified lately. Whether it is still valid is for the caller to check.
    pub fn get(&self, hash: &TokenHash, now: UnixTime) -> Option<Rc<Verified>> {
        let entries = self.entries.borrow();
        let entry = entries.by_hash.get(hash)?;
        // An entry from the future is one whose age nobody knows: the clock went backwards.
        (now >= entry.since && now.since(entry.since) < self.age_max).then(|| Rc::clone(&entry.verified))
    }

    /// Remembers a verified token.
    pub fn insert(&self, hash: TokenHash, token_bytes: usize, verified: Rc<Verified>, now: UnixTime) {
        let entries = &mut *self.entries.borrow_mut();
        entries.remove(&hash);
        while entries.by_age.len() >= self.entries_max
            || entries.token_bytes.saturating_add(token_bytes) > TOKEN_BYTES_MAX
        {
            let Some(oldest) = entries.by_age.front().copied() else { break };
            entries.remove(&oldest);
        }
        if self.entries_max > 0 {
            entries.by_hash.insert(hash, Entry { verified, since: now, token_bytes });
            entries.by_age.push_back(hash);
            entries.token_bytes += token_bytes;
        }
    }
}

impl Entries {
    fn remove(&mut self, hash: &TokenHash) {
        if let Some(entry) = self.by_hash.remove(hash) {
            self.token_bytes -= entry.token_bytes;
            // The oldest goes first nearly always, so this looks at one entry; a renewal looks at all.
            if let Some(at) = self.by_age.iter().position(|other| other == hash) {
                self.by_age.remove(at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> UnixTime {
        UnixTime::from_seconds(1_700_000_000 + seconds)
    }

    fn cache(entries_max: usize) -> Cache {
        Cache::new(entries_max, Duration::from_secs(60))
    }

    #[track_caller]
    fn check(cache: &Cache, now: u64, expected: &[(&str, bool)]) {
        for (token, present) in expected {
            assert_eq!(cache.get(&hash(token.as_bytes()), at(now)).is_some(), *present, "{token} at {now}");
        }
        let entries = cache.entries.borrow();
        assert_eq!(entries.by_age.len(), entries.by_hash.len());
        assert!(entries.by_age.len() <= cache.entries_max);
        assert_eq!(entries.token_bytes, entries.by_hash.values().map(|entry| entry.token_bytes).sum::<usize>());
    }

    fn insert(cache: &Cache, token: &str, bytes: usize, now: u64) {
        cache.insert(hash(token.as_bytes()), bytes, Rc::new(Verified::for_tests()), at(now));
    }

    #[test]
    fn remembers_a_token_for_its_time() {
        let cache = cache(2);
        insert(&cache, "a", 1, 0);
        check(&cache, 0, &[("a", true), ("b", false)]);
        check(&cache, 59, &[("a", true)]);
        check(&cache, 60, &[("a", false)]);
        insert(&cache, "a", 1, 60);
        check(&cache, 119, &[("a", true)]);
        check(&cache, 59, &[("a", false)]);
    }

    #[test]
    fn the_oldest_make_room() {
        let cache = cache(2);
        insert(&cache, "a", 1, 0);
        insert(&cache, "b", 1, 1);
        insert(&cache, "a", 1, 2);
        insert(&cache, "c", 1, 3);
        check(&cache, 3, &[("a", true), ("b", false), ("c", true)]);
    }

    #[test]
    fn the_tokens_together_have_a_limit_too() {
        let cache = cache(1_000);
        for i in 0..300 {
            insert(&cache, &format!("t{i}"), 16 * 1024, i);
        }
        assert_eq!(cache.entries.borrow().by_age.len(), 128);
        check(&cache, 10, &[("t0", false)]);
    }

    #[test]
    fn a_cache_of_none_remembers_nothing() {
        let cache = cache(0);
        insert(&cache, "a", 1, 0);
        check(&cache, 0, &[("a", false)]);
    }
}
