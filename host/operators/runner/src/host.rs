//! The way to the host's services: one connection, made when the process starts, for everything.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::time::{Duration, Instant};

use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use crate::bridge::{Arriving, BodyError, Departing, Host};

/// How long the host may take to listen.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs futures of hyper's on this thread.
#[derive(Clone, Copy, Debug)]
pub(crate) struct OnThisThread;

impl<F> hyper::rt::Executor<F> for OnThisThread
where
    F: Future + 'static,
{
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async move { drop(future.await) });
    }
}

/// The connection.
pub(crate) struct Services {
    sender: RefCell<SendRequest<Departing>>,
}

impl Services {
    /// Connects; waits for the host, which starts to listen when this process has started.
    pub(crate) async fn connect(socket: &Path) -> io::Result<Self> {
        let started = Instant::now();
        let stream = loop {
            match UnixStream::connect(socket).await {
                Ok(stream) => break stream,
                Err(_) if started.elapsed() < PATIENCE => tokio::time::sleep(Duration::from_millis(1)).await,
                Err(error) => return Err(error),
            }
        };
        let (sender, connection) = hyper::client::conn::http2::Builder::new(OnThisThread)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        tokio::task::spawn_local(async move { drop(connection.await) });
        Ok(Self { sender: RefCell::new(sender) })
    }
}

impl Host for Services {
    fn call(
        &self,
        request: Request<Departing>,
    ) -> Pin<Box<dyn Future<Output = Result<Response<Arriving>, BodyError>>>> {
        let mut sender = self.sender.borrow().clone();
        Box::pin(async move {
            sender.ready().await?;
            let response = sender.send_request(request).await?;
            Ok(response.map(|body| -> Arriving { Box::pin(body.map_err(BodyError::from)) }))
        })
    }
}
