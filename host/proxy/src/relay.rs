//! [`Relay`]: what the filters of one TCP connection let pass and its sockets have not taken yet; and how far the filters
//! let it come. [`crate::tcp`] moves it along. Single-threaded.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;

use bytes::{Buf, Bytes};
use portcullis_abi::Direction;

use crate::outbox::{Bell, HIGH_WATER};

/// See the module.
#[derive(Default)]
pub(crate) struct Relay {
    pub(crate) to_upstream: Pipe,
    pub(crate) to_client: Pipe,
    /// Every filter has let the connection pass.
    pub(crate) wants_upstream: Cell<bool>,
    /// A filter, or the failure of one, ends it.
    pub(crate) closing: RefCell<Option<Rc<str>>>,
    /// Rung when something of the above changed, or when a side may be read again.
    pub(crate) changed: Bell,
}

/// Bytes on their way out.
#[derive(Default)]
pub(crate) struct Pipe {
    pieces: RefCell<VecDeque<Bytes>>,
    queued: Cell<usize>,
    ended: Cell<bool>,
}

impl Relay {
    pub(crate) fn pipe(&self, direction: Direction) -> &Pipe {
        match direction {
            Direction::Request => &self.to_upstream,
            Direction::Response => &self.to_client,
        }
    }

    pub(crate) fn put(&self, direction: Direction, bytes: Bytes, end_of_stream: bool) {
        self.pipe(direction).put(bytes, end_of_stream);
        self.changed.ring();
    }

    pub(crate) fn connect(&self) {
        self.wants_upstream.set(true);
        self.changed.ring();
    }

    pub(crate) fn close(&self, details: Rc<str>) {
        self.closing.borrow_mut().get_or_insert(details);
        self.changed.ring();
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.borrow().is_some()
    }
}

impl Pipe {
    fn put(&self, bytes: Bytes, end_of_stream: bool) {
        if !bytes.is_empty() {
            self.queued.set(self.queued.get() + bytes.len());
            self.pieces.borrow_mut().push_back(bytes);
        }
        self.ended.set(self.ended.get() || end_of_stream);
    }

    /// Whether whoever fills it goes on.
    pub(crate) fn has_room(&self) -> bool {
        self.queued.get() < HIGH_WATER
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queued.get() == 0
    }

    /// Nothing follows what is in it.
    pub(crate) fn is_ended(&self) -> bool {
        self.ended.get()
    }

    /// The next bytes, which stay until [`Pipe::advance`].
    pub(crate) fn front(&self) -> Option<Bytes> {
        self.pieces.borrow().front().cloned()
    }

    /// So many bytes of the front were taken.
    pub(crate) fn advance(&self, count: usize) {
        let mut pieces = self.pieces.borrow_mut();
        if let Some(front) = pieces.front_mut() {
            // count <= front.len(), since the front was what was offered.
            front.advance(count.min(front.len()));
            self.queued.set(self.queued.get().saturating_sub(count));
            if front.is_empty() {
                pieces.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_gives_out_what_was_put_in_and_says_when_it_is_full() {
        let pipe = Pipe::default();
        assert!(pipe.is_empty() && pipe.has_room() && pipe.front().is_none());
        pipe.put(Bytes::from_static(b"abc"), false);
        pipe.put(Bytes::new(), false);
        pipe.put(Bytes::from(vec![0; HIGH_WATER - 3]), true);
        assert!(!pipe.has_room() && pipe.is_ended());
        pipe.advance(2);
        assert_eq!(pipe.front().as_deref(), Some(&b"c"[..]));
        assert!(pipe.has_room());
        pipe.advance(1);
        assert_eq!(pipe.front().map(|front| front.len()), Some(HIGH_WATER - 3));
        pipe.advance(HIGH_WATER - 3);
        assert!(pipe.is_empty() && pipe.front().is_none());
    }
}
