//! A body that is counted and timed while it flows.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

/// What a body ended with when not with its own end.
pub(crate) type BodyError = Box<dyn std::error::Error + Send + Sync>;

/// Why a body was cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Cut {
    /// More bytes than allowed.
    #[error("the body is longer than {0} bytes")]
    TooLong(u64),
    /// Not complete in time.
    #[error("the body did not arrive in time")]
    TooLate,
}

/// Passes on at most so many bytes, until at most some moment.
pub(crate) struct Metered<B> {
    inner: B,
    left: u64,
    limit: u64,
    deadline: Pin<Box<Sleep>>,
}

impl<B> Metered<B> {
    pub(crate) fn new(inner: B, limit: u64, deadline: Instant) -> Self {
        Self { inner, left: limit, limit, deadline: Box::pin(tokio::time::sleep_until(deadline)) }
    }
}

impl<B> Body for Metered<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: Into<BodyError>,
{
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.deadline.as_mut().poll(context).is_ready() {
            return Poll::Ready(Some(Err(Cut::TooLate.into())));
        }
        let frame = match std::task::ready!(Pin::new(&mut self.inner).poll_frame(context)) {
            None => return Poll::Ready(None),
            Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
            Some(Ok(frame)) => frame,
        };
        if let Some(data) = frame.data_ref() {
            let length = u64::try_from(data.len()).unwrap_or(u64::MAX);
            match self.left.checked_sub(length) {
                Some(left) => self.left = left,
                None => return Poll::Ready(Some(Err(Cut::TooLong(self.limit).into()))),
            }
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// The longest a body can be, when its sender said so, is known not to fit.
pub(crate) fn is_too_long(declared: Option<u64>, limit: u64) -> bool {
    declared.is_some_and(|declared| declared > limit)
}

/// The first [`Cut`] in a chain of errors.
pub(crate) fn find_cut(error: &(dyn std::error::Error + 'static)) -> Option<Cut> {
    let mut current = Some(error);
    while let Some(error) = current {
        if let Some(cut) = error.downcast_ref::<Cut>() {
            return Some(*cut);
        }
        current = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use http_body_util::{BodyExt, Full};

    use super::*;

    async fn check(bytes: usize, limit: u64) -> Result<usize, Option<Cut>> {
        let deadline = Instant::now() + std::time::Duration::from_secs(5);
        let body = Metered::new(Full::new(Bytes::from(vec![0; bytes])), limit, deadline);
        body.collect().await.map(|body| body.to_bytes().len()).map_err(|error| find_cut(error.as_ref()))
    }

    #[tokio::test]
    async fn passes_up_to_the_limit_and_cuts_one_past_it() {
        assert_eq!(check(10, 10).await, Ok(10));
        assert_eq!(check(11, 10).await, Err(Some(Cut::TooLong(10))));
        assert_eq!(check(0, 0).await, Ok(0));
    }

    #[tokio::test]
    async fn cuts_what_is_late() {
        let body = Metered::new(Full::new(Bytes::from_static(b"x")), 10, Instant::now());
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        let error = body.collect().await.unwrap_err();
        assert_eq!(find_cut(error.as_ref()), Some(Cut::TooLate));
    }
}
