//! The latest of what happened: a list that forgets its oldest entries, and can tell what came since a moment.

use std::collections::VecDeque;

/// A bounded list; positions count from the first entry ever added.
pub(crate) struct Ring<T> {
    entries: VecDeque<T>,
    most: usize,
    forgotten: usize,
}

impl<T> Ring<T> {
    pub(crate) fn new(most: usize) -> Ring<T> {
        Ring { entries: VecDeque::new(), most, forgotten: 0 }
    }

    pub(crate) fn push(&mut self, entry: T) {
        if self.entries.len() >= self.most {
            self.entries.pop_front();
            self.forgotten += 1;
        }
        self.entries.push_back(entry);
    }

    /// The position of what is added next.
    pub(crate) fn mark(&self) -> usize {
        self.forgotten + self.entries.len()
    }

    /// The entry at a position, unless it is forgotten.
    pub(crate) fn get_mut(&mut self, position: usize) -> Option<&mut T> {
        self.entries.get_mut(position.checked_sub(self.forgotten)?)
    }

    /// What was added since `mark`, and how much of it is forgotten.
    pub(crate) fn since(&self, mark: usize) -> (usize, impl Iterator<Item = &T>) {
        let forgotten = self.forgotten.saturating_sub(mark);
        (forgotten, self.entries.iter().skip(mark.saturating_sub(self.forgotten)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forgets_the_oldest_and_says_how_many() {
        let mut ring = Ring::new(3);
        (0..2).for_each(|entry| ring.push(entry));
        let mark = ring.mark();
        (2..7).for_each(|entry| ring.push(entry));
        let (forgotten, entries) = ring.since(mark);
        assert_eq!((forgotten, entries.copied().collect::<Vec<_>>()), (2, vec![4, 5, 6]));
        let found = [3, 4, 6, 7].map(|position| ring.get_mut(position).copied());
        assert_eq!(found, [None, Some(4), Some(6), None]);
        let (forgotten, entries) = ring.since(ring.mark());
        assert_eq!((forgotten, entries.count()), (0, 0));
    }
}
