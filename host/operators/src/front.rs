//! Operators on Unix sockets of their own, for a proxy in another process (Envoy's `pipe` addresses).

use std::collections::BTreeMap;
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
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;

use crate::body::BodyError;
use crate::config::is_name;
use crate::{OperatorError, Operators};

/// Sockets for operators, and who may connect to them.
#[derive(Debug)]
pub struct Front {
    folder: PathBuf,
    users: Vec<u32>,
    open: BTreeMap<String, JoinHandle<()>>,
    /// Says the end to connections, each of which holds a receiver.
    ending: watch::Sender<bool>,
}

/// Connections to one operator's socket.
const CONNECTIONS_MAX: usize = 1024;
const HEADERS: Duration = Duration::from_secs(10);

impl Front {
    /// Makes the folder of the sockets, if it is absent. `users` may connect beside this process's own, e.g. Envoy's. The
    /// folder's mode lets others in only where there are such, and then every connection is checked.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn new(folder: PathBuf, users: &[u32]) -> io::Result<Self> {
        let mode = if users.is_empty() { 0o700 } else { 0o711 };
        fs::DirBuilder::new().mode(mode).recursive(true).create(&folder)?;
        Ok(Self { folder, users: users.to_vec(), open: BTreeMap::new(), ending: watch::Sender::new(false) })
    }

    /// Where an operator's socket is.
    #[must_use]
    pub fn socket(&self, operator: &str) -> PathBuf {
        self.folder.join(format!("{operator}.sock"))
    }

    /// Serves operators of these names and no others, on the current runtime. What an open connection asks of one that
    /// is gone is answered with its cause.
    ///
    /// # Errors
    /// When a socket cannot be made.
    pub fn serve(&mut self, operators: &Operators, names: &[String]) -> io::Result<()> {
        let gone: Vec<String> = self.open.keys().filter(|name| !names.contains(name)).cloned().collect();
        for name in gone {
            self.close(&name);
        }
        for name in names.iter().filter(|name| is_name(name)) {
            if self.open.contains_key(name) {
                continue;
            }
            let path = self.socket(name);
            remove_stale(&path)?;
            let listener = UnixListener::bind(&path)?;
            let mode = if self.users.is_empty() { 0o600 } else { 0o666 };
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
            let mut users = self.users.clone();
            users.push(rustix::process::geteuid().as_raw());
            let ending = self.ending.subscribe();
            let accepting = tokio::spawn(accept(operators.clone(), name.clone(), listener, users, ending));
            self.open.insert(name.clone(), accepting);
        }
        Ok(())
    }

    /// Takes no more connections and no more requests, and returns once everything that was asked is answered to the last byte,
    /// or when the time is over.
    pub async fn finish(mut self, within: Duration) {
        let names: Vec<String> = self.open.keys().cloned().collect();
        for name in names {
            self.close(&name);
        }
        self.ending.send_replace(true);
        let _ = tokio::time::timeout(within, self.ending.closed()).await;
    }

    fn close(&mut self, name: &str) {
        if let Some(accepting) = self.open.remove(name) {
            accepting.abort();
            let _ = fs::remove_file(self.socket(name));
        }
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        let names: Vec<String> = self.open.keys().cloned().collect();
        for name in names {
            self.close(&name);
        }
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

async fn accept(
    operators: Operators,
    name: String,
    listener: UnixListener,
    users: Vec<u32>,
    ending: watch::Receiver<bool>,
) {
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
        let (operators, name, ending) = (operators.clone(), name.clone(), ending.clone());
        tokio::spawn(async move {
            connection(operators, name, stream, ending).await;
            drop(place);
        });
    }
}

async fn connection(operators: Operators, name: String, stream: UnixStream, mut ending: watch::Receiver<bool>) {
    let service = service_fn(|mut request: Request<Incoming>| {
        let (operators, name) = (&operators, &name);
        async move {
            say_scheme(&mut request);
            let id = request.headers().get("x-request-id").and_then(|id| id.to_str().ok()).map(str::to_owned);
            let response = match operators.call(name, request).await {
                Ok(response) => response.map(|body| body.map_err(|error| -> BodyError { error.into() }).boxed_unsync()),
                Err(error) => problem(&error, id.as_deref()),
            };
            Ok::<_, std::convert::Infallible>(response)
        }
    });
    let serving = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .max_headers(128)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(stream), service);
    let mut serving = std::pin::pin!(serving);
    let served = tokio::select! {
        served = serving.as_mut() => served,
        () = async { drop(ending.wait_for(|ending| *ending).await) } => {
            // Ends after the request under way, and at once where there is none.
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(operator = %name, "connection: {error}");
    }
}

/// What the client spoke, as the proxy in front says: it is known to be that proxy.
fn say_scheme(request: &mut Request<Incoming>) {
    let is_https = request.headers().get("x-forwarded-proto").is_some_and(|scheme| scheme.as_bytes() == b"https");
    let authority = request.headers().get(http::header::HOST).and_then(|host| host.to_str().ok()).map(str::to_owned);
    if let (true, None, Some(authority)) = (is_https, request.uri().scheme(), authority) {
        let path = request.uri().path_and_query().map_or("/", http::uri::PathAndQuery::as_str).to_owned();
        let absolute = http::Uri::builder().scheme("https").authority(authority).path_and_query(path).build();
        // One that cannot be made is refused a moment later, with its cause.
        if let Ok(absolute) = absolute {
            *request.uri_mut() = absolute;
        }
    }
}

fn problem(error: &OperatorError, id: Option<&str>) -> Response<UnsyncBoxBody<Bytes, BodyError>> {
    error.to_response(id).map(|body| Full::new(body).map_err(|never| match never {}).boxed_unsync())
}
