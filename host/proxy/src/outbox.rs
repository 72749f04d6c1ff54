//! [`Outbox`]: what the filters released in one direction and the socket has not taken yet.
//!
//! A head comes first, once; then bytes; then, perhaps, trailers. Whoever fills it stops at [`HIGH_WATER`], so that a slow
//! receiver slows the sender down instead of filling memory. Single-threaded.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use portcullis_abi::{FieldMap, Part};

/// Bytes in an outbox at which its filler stops. What a filter releases at once may exceed it, up to the filter's own
/// buffer limit.
pub(crate) const HIGH_WATER: usize = 64 * 1024;

/// Wakes the one task that waits for something.
#[derive(Default)]
pub(crate) struct Bell(Cell<Option<Waker>>);

impl Bell {
    pub(crate) fn ring(&self) {
        if let Some(waker) = self.0.take() {
            waker.wake();
        }
    }

    pub(crate) fn wait(&self, cx: &Context<'_>) {
        self.0.set(Some(cx.waker().clone()));
    }
}

/// A released head.
#[derive(Debug)]
pub(crate) struct Head {
    pub(crate) fields: FieldMap,
    pub(crate) end_of_stream: bool,
    /// Set when it is an answer of a filter or of the host.
    pub(crate) details: Option<Rc<str>>,
}

/// What follows a head.
#[derive(Debug)]
pub(crate) enum Piece {
    Data(Bytes),
    Trailers(FieldMap),
}

/// See the module.
#[derive(Default)]
pub(crate) struct Outbox {
    head: RefCell<Option<Head>>,
    pieces: RefCell<VecDeque<Piece>>,
    queued: Cell<usize>,
    total: Cell<u64>,
    has_head: Cell<bool>,
    ended: Cell<bool>,
    broken: Cell<bool>,
    taken_from: Cell<bool>,
    /// Rung when there is more to take.
    filled: Bell,
    /// Rung when there is room again.
    drained: Bell,
    /// Rung when the last part was put in.
    completed: Bell,
}

impl Outbox {
    /// Takes what the chain released.
    pub(crate) fn put(&self, part: Part) {
        match part {
            Part::Headers { fields, end_of_stream, details } => {
                self.has_head.set(true);
                self.ended.set(end_of_stream);
                *self.head.borrow_mut() = Some(Head { fields, end_of_stream, details });
            }
            Part::Body { bytes, end_of_stream } => {
                if !bytes.is_empty() {
                    self.queued.set(self.queued.get() + bytes.len());
                    self.total.set(self.total.get() + bytes.len() as u64);
                    self.pieces.borrow_mut().push_back(Piece::Data(bytes));
                }
                self.ended.set(end_of_stream);
            }
            Part::Trailers { fields } => {
                if !fields.is_empty() {
                    self.pieces.borrow_mut().push_back(Piece::Trailers(fields));
                }
                self.ended.set(true);
            }
        }
        self.filled.ring();
        if self.ended.get() {
            self.completed.ring();
        }
    }

    /// Ready once the last part was put in.
    pub(crate) fn poll_ended(&self, cx: &Context<'_>) -> Poll<()> {
        if self.ended.get() {
            return Poll::Ready(());
        }
        self.completed.wait(cx);
        Poll::Pending
    }

    /// Ends it before its time: the receiver gets an error.
    pub(crate) fn break_off(&self) {
        self.broken.set(true);
        self.filled.ring();
        self.drained.ring();
    }

    pub(crate) fn is_broken(&self) -> bool {
        self.broken.get()
    }

    /// Whether a head was ever put in.
    pub(crate) fn has_begun(&self) -> bool {
        self.has_head.get()
    }

    /// Whether the last part was put in.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.get()
    }

    /// Whether the last part was put in and everything was taken out.
    pub(crate) fn is_drained(&self) -> bool {
        self.ended.get() && self.head.borrow().is_none() && self.pieces.borrow().is_empty()
    }

    /// Whether a part of the body was taken out, and is gone.
    pub(crate) fn was_taken_from(&self) -> bool {
        self.taken_from.get()
    }

    /// The length of the body, where all of it is here and no trailers follow.
    pub(crate) fn whole_length(&self) -> Option<u64> {
        let trailers = self.pieces.borrow().iter().any(|piece| matches!(piece, Piece::Trailers(_)));
        (self.ended.get() && !trailers).then_some(self.total.get())
    }

    pub(crate) fn poll_head(&self, cx: &Context<'_>) -> Poll<Option<Head>> {
        if let Some(head) = self.head.borrow_mut().take() {
            return Poll::Ready(Some(head));
        }
        if self.broken.get() {
            return Poll::Ready(None);
        }
        self.filled.wait(cx);
        Poll::Pending
    }

    /// The next piece; `None` at the end or once it is broken.
    pub(crate) fn poll_piece(&self, cx: &Context<'_>) -> Poll<Option<Piece>> {
        if self.broken.get() {
            return Poll::Ready(None);
        }
        let piece = self.pieces.borrow_mut().pop_front();
        if let Some(piece) = piece {
            self.taken_from.set(true);
            if let Piece::Data(bytes) = &piece {
                self.queued.set(self.queued.get().saturating_sub(bytes.len()));
            }
            if self.queued.get() < HIGH_WATER {
                self.drained.ring();
            }
            return Poll::Ready(Some(piece));
        }
        if self.ended.get() {
            return Poll::Ready(None);
        }
        self.filled.wait(cx);
        Poll::Pending
    }

    /// Ready when more may be put in (or it is broken).
    pub(crate) fn poll_room(&self, cx: &Context<'_>) -> Poll<()> {
        if self.queued.get() < HIGH_WATER || self.broken.get() {
            return Poll::Ready(());
        }
        self.drained.wait(cx);
        Poll::Pending
    }

    /// Rings for the filler, when something beside the outbox itself may let it go on.
    pub(crate) fn wake_filler(&self) {
        self.drained.ring();
    }

    /// Leaves the waker with which [`Outbox::wake_filler`] rings.
    pub(crate) fn wait_as_filler(&self, cx: &Context<'_>) {
        self.drained.wait(cx);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(bytes: &'static [u8], end_of_stream: bool) -> Part {
        Part::Body { bytes: Bytes::from_static(bytes), end_of_stream }
    }

    fn check_pieces(outbox: &Outbox, expected: &[&[u8]]) {
        let cx = Context::from_waker(Waker::noop());
        for expected in expected {
            let Poll::Ready(Some(Piece::Data(bytes))) = outbox.poll_piece(&cx) else { panic!("a piece of data") };
            assert_eq!(bytes, expected);
        }
    }

    #[test]
    fn gives_back_in_order_and_knows_its_length() {
        let cx = Context::from_waker(Waker::noop());
        let outbox = Outbox::default();
        assert!(outbox.poll_head(&cx).is_pending());
        outbox.put(Part::Headers { fields: FieldMap::new(), end_of_stream: false, details: None });
        outbox.put(body(b"ab", false));
        assert_eq!(outbox.whole_length(), None);
        outbox.put(body(b"c", true));
        assert_eq!(outbox.whole_length(), Some(3));
        assert!(matches!(outbox.poll_head(&cx), Poll::Ready(Some(_))));
        check_pieces(&outbox, &[b"ab", b"c"]);
        assert!(matches!(outbox.poll_piece(&cx), Poll::Ready(None)));
        assert!(outbox.is_drained());
    }

    #[test]
    fn has_room_only_below_high_water() {
        let cx = Context::from_waker(Waker::noop());
        let outbox = Outbox::default();
        outbox.put(Part::Body { bytes: Bytes::from(vec![0; HIGH_WATER - 1]), end_of_stream: false });
        assert!(outbox.poll_room(&cx).is_ready());
        outbox.put(body(b"x", false));
        assert!(outbox.poll_room(&cx).is_pending());
        assert!(outbox.poll_piece(&cx).is_ready());
        assert!(outbox.poll_room(&cx).is_ready());
    }

    #[test]
    fn length_is_unknown_where_trailers_follow() {
        let outbox = Outbox::default();
        outbox.put(body(b"ab", false));
        outbox.put(Part::Trailers { fields: [("x-t", "1")].into_iter().collect() });
        assert_eq!(outbox.whole_length(), None);
        assert!(outbox.poll_ended(&Context::from_waker(Waker::noop())).is_ready());
    }

    #[test]
    fn a_broken_outbox_gives_nothing_more() {
        let cx = Context::from_waker(Waker::noop());
        let outbox = Outbox::default();
        outbox.put(body(b"ab", false));
        outbox.break_off();
        assert!(matches!(outbox.poll_piece(&cx), Poll::Ready(None)));
        assert!(matches!(outbox.poll_head(&cx), Poll::Ready(None)));
        assert!(outbox.poll_room(&cx).is_ready());
    }
}
