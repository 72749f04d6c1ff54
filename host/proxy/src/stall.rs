//! [`Stall`]: a client's socket that fails when the client takes nothing for too long.
//!
//! A client that stops reading fills the socket's buffers and then holds whatever waits to be written: nothing in HTTP ever ends
//! that, and a request that is over already is watched by nobody.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep};

/// See the module.
pub(crate) struct Stall<S> {
    io: S,
    time: Duration,
    /// Runs while a write waits.
    timer: Option<Pin<Box<Sleep>>>,
    waiting: bool,
}

impl<S> Stall<S> {
    /// A socket of which no write may wait longer than `time`.
    pub(crate) fn new(io: S, time: Duration) -> Stall<S> {
        Stall { io, time, timer: None, waiting: false }
    }

    fn watch<T>(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.waiting = false;
            return result;
        }
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep(self.time)));
        if !std::mem::replace(&mut self.waiting, true) {
            timer.as_mut().reset(Instant::now() + self.time);
        }
        match timer.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes nothing"))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Stall<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Stall<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let stall = self.get_mut();
        let result = Pin::new(&mut stall.io).poll_write(cx, buf);
        stall.watch(cx, result)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let stall = self.get_mut();
        let result = Pin::new(&mut stall.io).poll_flush(cx);
        // A socket's flush says nothing about its writes: it must not end their wait.
        if result.is_ready() { result } else { stall.watch(cx, result) }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let stall = self.get_mut();
        let result = Pin::new(&mut stall.io).poll_write_vectored(cx, bufs);
        stall.watch(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let stall = self.get_mut();
        let result = Pin::new(&mut stall.io).poll_shutdown(cx);
        stall.watch(cx, result)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn a_write_fails_once_nothing_was_taken_for_the_time() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (near, mut far) = tokio::io::duplex(8);
            let mut near = Stall::new(near, Duration::from_millis(30));
            near.write_all(b"12345678").await.unwrap();
            let began = Instant::now();
            let error = near.write_all(b"9").await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
            assert!(began.elapsed() >= Duration::from_millis(30));
            far.read_exact(&mut [0; 4]).await.unwrap();
            near.write_all(b"abcd").await.unwrap();
        });
    }

    #[test]
    fn a_receiver_that_is_slow_but_takes_something_is_waited_for() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (near, mut far) = tokio::io::duplex(1);
            let mut near = Stall::new(near, Duration::from_secs(5));
            let slow = async {
                for _ in 0..10 {
                    sleep(Duration::from_millis(2)).await;
                    far.read_exact(&mut [0]).await.unwrap();
                }
            };
            let (written, ()) = tokio::join!(near.write_all(b"0123456789"), slow);
            written.unwrap();
        });
    }
}
