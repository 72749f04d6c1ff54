//! What the proxy asks of whoever runs operators: [`OperatorHost`]. The proxy starts no process itself.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use portcullis_config::Policy;
use tokio::sync::mpsc;

use crate::released::{BrokenOff, Released};

/// Pieces of a request's body on their way to an operator. Few: each may have the size of a filter's buffer.
const PIECES_MAX: usize = 2;

/// Any error of a body.
pub type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// Runs the operators of a policy.
pub trait OperatorHost: Send + Sync {
    /// Brings the policy's operators up beside those that run, and returns once they answer. Blocks. Nothing changes
    /// for those that run; a set that is dropped uncommitted ends what was started for it.
    ///
    /// # Errors
    /// What is wrong, and how to fix it.
    fn prepare(&self, policy: &Policy) -> Result<Arc<dyn OperatorSet>, OperatorsRefused>;

    /// Counters, by name with labels as in filters' metrics.
    fn metrics(&self) -> Vec<(String, u64)>;
}

/// The operators of one policy, loaded. Called from the workers' threads. A policy that is no longer in force keeps its set
/// until its last request has ended.
pub trait OperatorSet: Send + Sync {
    /// The policy is in force from now on.
    fn commit(&self);

    /// Has an operator answer a request, whose address is absolute.
    fn call(&self, operator: &str, request: http::Request<OperatorRequestBody>) -> OperatorAnswer;
}

/// Why a policy's operators cannot be run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OperatorsRefused {
    /// The policy, or the operators' code.
    #[error("{0}")]
    Policy(String),
    /// The machine.
    #[error("{0}")]
    Machine(String),
}

/// What comes of a call, in a while.
pub type OperatorAnswer =
    Pin<Box<dyn Future<Output = Result<http::Response<UnsyncBoxBody<Bytes, OperatorFailure>>, OperatorFailure>>>>;

/// An operator that did not answer, or not to the end.
#[derive(Debug)]
pub struct OperatorFailure {
    /// Response code details, for access log and metrics.
    pub details: String,
    /// What the client gets, if it has got nothing yet.
    pub response: http::Response<Bytes>,
}

/// The body of a request to an operator; may leave the worker's thread.
#[derive(Debug)]
pub struct OperatorRequestBody {
    pieces: Option<mpsc::Receiver<Piece>>,
    length: Option<u64>,
}

/// A frame; `None` is the body's end. A body whose sender just goes away has broken off.
type Piece = Option<Result<Frame<Bytes>, BodyError>>;

impl OperatorRequestBody {
    pub(crate) fn empty() -> OperatorRequestBody {
        OperatorRequestBody { pieces: None, length: Some(0) }
    }

    /// A body, and the task that fills it from what the filters release.
    pub(crate) fn released(mut released: Released) -> (OperatorRequestBody, impl Future<Output = ()>) {
        let (sender, receiver) = mpsc::channel(PIECES_MAX);
        let length = released.left();
        let fill = async move {
            loop {
                let frame = std::future::poll_fn(|cx| released.poll_frame(cx)).await;
                let ended = !matches!(frame, Some(Ok(_)));
                // An operator that wants no more of the body has closed its end.
                if sender.send(frame.map(|frame| frame.map_err(BodyError::from))).await.is_err() || ended {
                    return;
                }
            }
        };
        (OperatorRequestBody { pieces: Some(receiver), length }, fill)
    }
}

impl Body for OperatorRequestBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Some(pieces) = &mut self.pieces else { return Poll::Ready(None) };
        match std::task::ready!(pieces.poll_recv(cx)) {
            Some(Some(frame)) => Poll::Ready(Some(frame)),
            Some(None) => {
                self.pieces = None;
                Poll::Ready(None)
            }
            None => Poll::Ready(Some(Err(BrokenOff.into()))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.pieces.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        self.length.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::task::Waker;

    use portcullis_abi::Part;

    use super::*;
    use crate::outbox::Outbox;

    /// What an operator sees of a body of which `parts` were released, before the filling was dropped.
    fn check(parts: Vec<Part>, expected: &[Result<&str, ()>]) {
        let outbox = Rc::new(Outbox::default());
        let (mut body, fill) = OperatorRequestBody::released(Released::new(Rc::clone(&outbox), None));
        let mut fill = Box::pin(fill);
        let mut cx = Context::from_waker(Waker::noop());
        for part in parts {
            outbox.put(part);
            let _ = fill.as_mut().poll(&mut cx);
        }
        drop(fill);
        let mut seen = Vec::new();
        while let Poll::Ready(Some(frame)) = Pin::new(&mut body).poll_frame(&mut cx) {
            let failed = frame.is_err();
            seen.push(frame.map_err(drop).map(|frame| frame.into_data().expect("data")));
            if failed {
                break;
            }
        }
        let seen: Vec<Result<String, ()>> =
            seen.into_iter().map(|piece| piece.map(|bytes| String::from_utf8_lossy(&bytes).into_owned())).collect();
        let expected: Vec<Result<String, ()>> = expected.iter().map(|piece| piece.map(str::to_owned)).collect();
        assert_eq!(seen, expected);
    }

    #[test]
    fn a_body_that_was_not_sent_to_its_end_is_not_taken_for_a_whole_one() {
        let data = |end_of_stream| Part::Body { bytes: Bytes::from_static(b"ab"), end_of_stream };
        check(vec![data(true)], &[Ok("ab")]);
        check(vec![data(false)], &[Ok("ab"), Err(())]);
    }
}
