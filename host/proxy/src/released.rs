//! [`Released`]: what the filters released, as a body for hyper, held to the length that its head promised.
//!
//! A body that is longer or shorter than promised breaks off: a receiver must never take a part for the whole, nor the rest
//! for another message. Only a filter that edits a body after its head is gone can bring that about.

use std::rc::Rc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::Frame;

use crate::message;
use crate::outbox::{Outbox, Piece};

/// A body that ended before its time.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the body broke off")]
pub(crate) struct BrokenOff;

/// See the module.
pub(crate) struct Released {
    outbox: Rc<Outbox>,
    promised: Option<u64>,
    sent: u64,
    /// The piece that makes the promise come true, until it is known to be the last.
    last: Option<Bytes>,
}

impl Released {
    pub(crate) fn new(outbox: Rc<Outbox>, promised: Option<u64>) -> Released {
        Released { outbox, promised, sent: 0, last: None }
    }

    pub(crate) fn poll_frame(&mut self, cx: &Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        loop {
            if self.last.is_some() {
                let more = ready!(self.outbox.poll_piece(cx));
                if matches!(more, Some(Piece::Data(_))) || self.outbox.is_broken() {
                    return self.break_off();
                }
                // Trailers have no place behind a body with a length.
                return Poll::Ready(self.last.take().map(|bytes| Ok(Frame::data(bytes))));
            }
            match ready!(self.outbox.poll_piece(cx)) {
                Some(Piece::Data(bytes)) => {
                    self.sent += bytes.len() as u64;
                    match self.promised {
                        Some(promised) if self.sent > promised => return self.break_off(),
                        Some(promised) if self.sent == promised && !self.outbox.is_drained() => self.last = Some(bytes),
                        _ => return Poll::Ready(Some(Ok(Frame::data(bytes)))),
                    }
                }
                Some(Piece::Trailers(fields)) => {
                    return match message::outbound_trailers(&fields) {
                        Ok(trailers) => Poll::Ready(Some(Ok(Frame::trailers(trailers)))),
                        Err(_) => self.break_off(),
                    };
                }
                None if self.outbox.is_broken() => return Poll::Ready(Some(Err(BrokenOff))),
                None if self.promised.is_some_and(|promised| self.sent < promised) => return self.break_off(),
                None => return Poll::Ready(None),
            }
        }
    }

    fn break_off(&mut self) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        self.last = None;
        self.outbox.break_off();
        Poll::Ready(Some(Err(BrokenOff)))
    }

    /// Whether everything was handed out.
    pub(crate) fn is_done(&self) -> bool {
        self.last.is_none() && self.outbox.is_drained() && self.promised.is_none_or(|promised| self.sent == promised)
    }

    /// Bytes that are still to come, where that is known.
    pub(crate) fn left(&self) -> Option<u64> {
        let held = self.last.as_ref().map_or(0, |bytes| bytes.len() as u64);
        self.promised.map(|promised| (promised + held).saturating_sub(self.sent))
    }
}

#[cfg(test)]
mod tests {
    use portcullis_abi::Part;
    use std::task::Waker;

    use super::*;

    /// Puts `pieces` in one after the other and polls after each; gives what came out, and how it ended.
    fn check(promised: Option<u64>, pieces: &[&'static [u8]], expected: Result<&str, &str>) {
        let outbox = Rc::new(Outbox::default());
        let mut released = Released::new(Rc::clone(&outbox), promised);
        let cx = Context::from_waker(Waker::noop());
        let mut out = String::new();
        let mut steps: Vec<Part> =
            pieces.iter().map(|piece| Part::Body { bytes: Bytes::from_static(piece), end_of_stream: false }).collect();
        steps.push(Part::Body { bytes: Bytes::new(), end_of_stream: true });
        for step in steps {
            outbox.put(step);
            while let Poll::Ready(frame) = released.poll_frame(&cx) {
                match frame {
                    Some(Ok(frame)) => out.push_str(&String::from_utf8_lossy(&frame.into_data().expect("data"))),
                    Some(Err(BrokenOff)) => return assert_eq!(expected, Err(out.as_str())),
                    None => return assert_eq!(expected, Ok(out.as_str())),
                }
            }
        }
        panic!("the body did not end");
    }

    #[test]
    fn a_body_is_as_long_as_promised_or_breaks_off() {
        check(None, &[b"ab", b"c"], Ok("abc"));
        check(Some(3), &[b"ab", b"c"], Ok("abc"));
        check(Some(3), &[b"abcd"], Err(""));
        check(Some(3), &[b"ab", b"cd"], Err("ab"));
        // The piece that fulfils the promise is held until it is known that nothing follows.
        check(Some(3), &[b"ab", b"c", b"d"], Err("ab"));
        check(Some(3), &[b"ab"], Err("ab"));
        check(Some(0), &[], Ok(""));
    }

    #[test]
    fn knows_when_it_is_done_and_what_is_left() {
        let outbox = Rc::new(Outbox::default());
        let mut released = Released::new(Rc::clone(&outbox), Some(2));
        let cx = Context::from_waker(Waker::noop());
        outbox.put(Part::Body { bytes: Bytes::from_static(b"ab"), end_of_stream: false });
        assert!(released.poll_frame(&cx).is_pending());
        assert_eq!(released.left(), Some(2));
        outbox.put(Part::Body { bytes: Bytes::new(), end_of_stream: true });
        assert!(!released.is_done());
        assert!(released.poll_frame(&cx).is_ready());
        assert_eq!(released.left(), Some(0));
        assert!(released.is_done());
    }
}
