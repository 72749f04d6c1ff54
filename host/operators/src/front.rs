//! Operators on Unix sockets of their own, for a proxy in another process (Envoy's `pipe` addresses).

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use crate::body::BodyError;
use crate::config::is_name;
use crate::{OperatorError, Operators};

/// Who may connect.
#[derive(Clone, Debug, Default)]
pub struct Front {
    /// Folder of the sockets, made with mode 0700 if it is absent.
    pub folder: PathBuf,
    /// Users that may connect beside this process's own, e.g. Envoy's. The folder's mode must let them in, too: it is
    /// 0711 when this is not empty, and the sockets are then open to all but checked.
    pub users: Vec<u32>,
}

/// Connections to one operator's socket.
const CONNECTIONS_MAX: usize = 1024;
const HEADERS: Duration = Duration::from_secs(10);

impl Front {
    /// Where an operator's socket is.
    #[must_use]
    pub fn socket(&self, operator: &str) -> PathBuf {
        self.folder.join(format!("{operator}.sock"))
    }

    /// Opens one socket for each name and serves until dropped. The operators behind them may change meanwhile.
    ///
    /// # Errors
    /// When a socket cannot be made.
    pub async fn serve(&self, operators: &Operators, names: &[String]) -> io::Result<()> {
        let mode = if self.users.is_empty() { 0o700 } else { 0o711 };
        fs::DirBuilder::new().mode(mode).recursive(true).create(&self.folder)?;
        let mut serving = tokio::task::JoinSet::new();
        for name in names.iter().filter(|name| is_name(name)) {
            let path = self.socket(name);
            remove_stale(&path)?;
            let listener = UnixListener::bind(&path)?;
            let mode = if self.users.is_empty() { 0o600 } else { 0o666 };
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            let mut users = self.users.clone();
            users.push(rustix::process::geteuid().as_raw());
            serving.spawn(accept(operators.clone(), name.clone(), listener, users));
        }
        while serving.join_next().await.is_some() {}
        Ok(())
    }
}

/// A socket that a former host left. Anything else at that place is not ours to remove.
fn remove_stale(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => fs::remove_file(path),
        Ok(_) => Err(io::Error::other(format!("`{}` exists and is no socket", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

async fn accept(operators: Operators, name: String, listener: UnixListener, users: Vec<u32>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let known = stream.peer_cred().is_ok_and(|peer| users.contains(&peer.uid()));
        if !known {
            tracing::warn!(operator = %name, "refused a connection from another user");
            continue;
        }
        let (operators, name) = (operators.clone(), name.clone());
        tokio::spawn(async move {
            connection(operators, name, stream).await;
            drop(place);
        });
    }
}

async fn connection(operators: Operators, name: String, stream: UnixStream) {
    let service = service_fn(|request: Request<Incoming>| {
        let (operators, name) = (&operators, &name);
        async move {
            let id = request.headers().get("x-request-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
            let response = match operators.call(name, request).await {
                Ok(response) => response.map(|body| body.map_err(|error| -> BodyError { error.into() }).boxed_unsync()),
                Err(error) => problem(&error, id.as_deref()),
            };
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .max_headers(128)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(operator = %name, "connection: {error}");
    }
}

fn problem(error: &OperatorError, id: Option<&str>) -> Response<UnsyncBoxBody<Bytes, BodyError>> {
    error.to_response(id).map(|body| Full::new(body).map_err(|never| match never {}).boxed_unsync())
}
