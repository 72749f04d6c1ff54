//! Bounds how many costly signature checks a worker makes in a second.
//!
//! A signature can be checked only by checking it, so anybody can make a worker do so by sending rubbish that looks
//! like a token. In wasm an RS256 check takes about two milliseconds, during which the worker serves nobody.

use std::cell::Cell;
use std::time::Duration;

use portcullis_kit::time::UnixTime;

/// Time for signature checks, which comes back as time goes by: a leaky bucket of one second's worth.
#[derive(Debug)]
pub struct Budget {
    cost: Duration,
    left: Cell<Duration>,
    counted_at: Cell<UnixTime>,
}

/// As much as can be saved up.
const CAPACITY: Duration = Duration::from_secs(1);

impl Budget {
    /// A budget of this many checks per second, at least one.
    pub fn new(checks_per_second: u32) -> Self {
        Self {
            cost: CAPACITY / checks_per_second.max(1),
            left: Cell::new(CAPACITY),
            counted_at: Cell::new(UnixTime::from_seconds(0)),
        }
    }

    /// Takes one check from the budget; `false` if there is none left.
    pub fn take(&self, now: UnixTime) -> bool {
        // A clock that goes backwards gives nothing back, and what it gave before stays given.
        let left = (self.left.get() + now.since(self.counted_at.get())).min(CAPACITY);
        self.counted_at.set(now.max(self.counted_at.get()));
        let after = left.checked_sub(self.cost);
        self.left.set(after.unwrap_or(left));
        after.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> UnixTime {
        UnixTime::from_nanoseconds(1_700_000_000_000_000_000 + milliseconds * 1_000_000)
    }

    #[test]
    fn a_second_has_so_many_checks_and_no_more() {
        let budget = Budget::new(10);
        assert_eq!((0..100).filter(|_| budget.take(at(0))).count(), 10);
        assert!(!budget.take(at(99)));
        assert!(budget.take(at(100)));
        assert!(!budget.take(at(100)));
        assert_eq!((0..100).filter(|_| budget.take(at(60_000))).count(), 10, "an idle minute saves up one second");
    }

    #[test]
    fn a_clock_that_goes_backwards_gives_nothing_back() {
        let budget = Budget::new(10);
        assert_eq!((0..100).filter(|_| budget.take(at(5_000))).count(), 10);
        assert!(!budget.take(at(0)));
        assert!(!budget.take(at(5_000)), "the way back up gives nothing either");
        assert!(budget.take(at(5_100)));
    }

    #[test]
    fn a_budget_of_none_is_one() {
        let budget = Budget::new(0);
        assert!(budget.take(at(0)));
        assert!(!budget.take(at(999)));
    }
}
