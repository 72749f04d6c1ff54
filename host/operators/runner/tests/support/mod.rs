//! What the tests share: a process without a jail, and a host that offers it services.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};

pub const DEADLINE: Duration = Duration::from_secs(30);

pub type Body = UnsyncBoxBody<Bytes, Infallible>;

pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}

/// A body whose chunks are sent from elsewhere.
pub fn channel() -> (tokio::sync::mpsc::Sender<Bytes>, Body) {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    (sender, Pieces(receiver).boxed_unsync())
}

struct Pieces(tokio::sync::mpsc::Receiver<Bytes>);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(context).map(|chunk| chunk.map(|chunk| Ok(Frame::data(chunk))))
    }
}

/// Runs a test on one thread, where futures need not be `Send`.
pub fn block_on<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new()
        .block_on(&runtime, async { tokio::time::timeout(DEADLINE, test).await.expect("in time") })
}

/// Limits and arguments of a process.
pub struct Options {
    pub arguments: Vec<&'static str>,
    pub cpu: Duration,
    pub background_cpu: Duration,
    pub request_bytes: u64,
    pub response_bytes: u64,
    pub map: Option<String>,
    pub env: BTreeMap<String, String>,
    pub kv: bool,
    pub dev: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            arguments: Vec::new(),
            // Debug builds on a busy machine.
            cpu: Duration::from_secs(20),
            background_cpu: Duration::from_secs(20),
            request_bytes: 10 << 20,
            response_bytes: 10 << 20,
            map: None,
            env: BTreeMap::new(),
            kv: false,
            dev: false,
        }
    }
}

/// A running process.
pub struct Engine {
    child: Child,
    folder: tempfile::TempDir,
    output: std::sync::mpsc::Receiver<u8>,
    seen: RefCell<Vec<u8>>,
    /// Requests that reached the host's services: method, path and fields.
    pub asked: Rc<RefCell<Vec<(String, String, HeaderMap)>>>,
}

pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Bytes,
    pub trailers: Option<HeaderMap>,
}

impl Answer {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub fn outcome(&self) -> Option<&str> {
        let trailers = self.trailers.as_ref().and_then(|trailers| trailers.get("x-portcullis-outcome"));
        self.headers.get("x-portcullis-outcome").or(trailers).and_then(|outcome| outcome.to_str().ok())
    }
}

impl Engine {
    /// Starts a process without an operator.
    pub async fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let asked = Rc::default();
        let listener = UnixListener::bind(folder.path().join("host.sock")).unwrap();
        tokio::task::spawn_local(serve_host(listener, Rc::clone(&asked)));
        let mut child = Command::new(env!("CARGO_BIN_EXE_portcullis-operator"))
            .args(arguments)
            .arg(folder.path().join("op.sock"))
            .arg(folder.path().join("host.sock"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdout = child.stdout.take().unwrap();
        let (sender, output) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = stdout.read(&mut buffer) {
                buffer[..length].iter().try_for_each(|byte| sender.send(*byte)).ok();
            }
        });
        let engine = Self { child, folder, output, seen: RefCell::default(), asked };
        engine.wait_for_log("\u{1e}portcullis ready\n").await;
        engine
    }

    /// Starts a process and gives it an operator.
    pub async fn with(code: &str, options: &Options) -> Self {
        let engine = Self::start(&options.arguments).await;
        let answer = engine.load(code, options).await;
        assert_eq!(answer.status, 200, "{}", answer.text());
        engine
    }

    pub async fn load(&self, code: &str, options: &Options) -> Answer {
        let milliseconds = |duration: Duration| u64::try_from(duration.as_millis()).unwrap();
        let document = serde_json::json!({
            "name": "test", "code": code, "map": options.map, "env": options.env, "files": {}, "kv": options.kv,
            "dev": options.dev,
            "limits": {
                "cpu_milliseconds": milliseconds(options.cpu),
                "background_cpu_milliseconds": milliseconds(options.background_cpu),
                "request_bytes": options.request_bytes, "response_bytes": options.response_bytes,
            },
        });
        let request = Request::post("http://portcullis.internal/load").body(full(document.to_string())).unwrap();
        self.send(request).await
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("op.sock")
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub async fn connect(&self) -> SendRequest<Body> {
        let stream = UnixStream::connect(self.socket()).await.unwrap();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::task::spawn_local(connection);
        sender
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(Request::get(format!("http://api.example.com{path}")).body(full("")).unwrap()).await
    }

    pub async fn post(&self, path: &str, body: Body) -> Answer {
        self.send(Request::post(format!("http://api.example.com{path}")).body(body).unwrap()).await
    }

    pub async fn send(&self, mut request: Request<Body>) -> Answer {
        request.headers_mut().insert("te", http::HeaderValue::from_static("trailers"));
        let response = self.connect().await.send_request(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let body = body.collect().await.unwrap();
        let trailers = body.trailers().cloned();
        Answer { status: parts.status.as_u16(), headers: parts.headers, body: body.to_bytes(), trailers }
    }

    pub async fn text(&self, path: &str) -> String {
        let answer = self.get(path).await;
        assert_eq!(answer.status, 200, "{}\n{}", answer.text(), self.log());
        answer.text()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What the process has printed so far.
    pub fn log(&self) -> String {
        let mut seen = self.seen.borrow_mut();
        seen.extend(self.output.try_iter());
        String::from_utf8_lossy(&seen).into_owned()
    }

    pub async fn wait_for_log(&self, text: &str) {
        let start = Instant::now();
        while !self.log().contains(text) {
            assert!(start.elapsed() < DEADLINE, "nothing says `{text}`:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn terminate(&self) {
        let pid = self.pid().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    }

    pub async fn ended(&mut self) -> ExitStatus {
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

type Asked = Rc<RefCell<Vec<(String, String, HeaderMap)>>>;

/// Services as the host has them, as far as the engine can tell.
async fn serve_host(listener: UnixListener, asked: Asked) {
    let values: Rc<RefCell<BTreeMap<String, Bytes>>> = Rc::default();
    while let Ok((stream, _)) = listener.accept().await {
        let (asked, values) = (Rc::clone(&asked), Rc::clone(&values));
        let service = service_fn(move |request| {
            let (asked, values) = (Rc::clone(&asked), Rc::clone(&values));
            async move { Ok::<_, Infallible>(answer(request, &asked, &values).await) }
        });
        let builder = hyper::server::conn::http2::Builder::new(OnThisThread);
        tokio::task::spawn_local(builder.serve_connection(TokioIo::new(stream), service));
    }
}

#[derive(Clone, Copy)]
pub struct OnThisThread;

impl<F: Future + 'static> hyper::rt::Executor<F> for OnThisThread {
    fn execute(&self, future: F) {
        tokio::task::spawn_local(async move { drop(future.await) });
    }
}

async fn answer(
    request: Request<Incoming>,
    asked: &Asked,
    values: &RefCell<BTreeMap<String, Bytes>>,
) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let path = parts.uri.path_and_query().unwrap().to_string();
    asked.borrow_mut().push((parts.method.to_string(), path.clone(), parts.headers.clone()));
    let refused = |text: &str| {
        let refused = Response::builder().status(403).header("x-portcullis-refused", "net").body(full(text.to_owned()));
        refused.unwrap()
    };
    if let Some(key) = path.strip_prefix("/kv/") {
        return match parts.method.as_str() {
            "PUT" => {
                let value = body.collect().await.unwrap().to_bytes();
                values.borrow_mut().insert(key.to_owned(), value);
                Response::new(full(""))
            }
            _ => match values.borrow().get(key) {
                Some(value) => Response::new(full(value.clone())),
                None => Response::builder().status(StatusCode::NOT_FOUND).body(full("")).unwrap(),
            },
        };
    }
    if path.starts_with("/kv") {
        let keys: Vec<String> = values.borrow().keys().cloned().collect();
        return Response::new(full(serde_json::to_vec(&keys).unwrap()));
    }
    let url = parts.headers["x-portcullis-url"].to_str().unwrap().to_owned();
    match url.as_str() {
        "http://origin.example/echo" => {
            Response::new(full(body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default()))
        }
        "http://origin.example/never" => std::future::pending().await,
        "http://origin.example/redirect" => {
            Response::builder().status(302).header("location", "/plain").body(full("")).unwrap()
        }
        "http://origin.example/endless" => {
            let (sender, body) = channel();
            tokio::task::spawn_local(async move { while sender.send(Bytes::from_static(b"part")).await.is_ok() {} });
            Response::new(body)
        }
        "http://origin.example/gzip" => {
            // `gzip of this`, by gzip 1.13.
            let bytes: &[u8] = &[
                0x1f, 0x8b, 0x08, 0x00, 0x00, 0x00, 0x00, 0x00, 0x02, 0x03, 0x4b, 0xaf, 0xca, 0x2c, 0x50, 0xc8, 0x4f,
                0x53, 0x28, 0xc9, 0xc8, 0x2c, 0x06, 0x00, 0xd2, 0x65, 0x8d, 0xa2, 0x0c, 0x00, 0x00, 0x00,
            ];
            Response::builder().header("content-encoding", "gzip").body(full(bytes)).unwrap()
        }
        url if url.starts_with("http://origin.example/") => Response::new(full(format!("{} {url}", parts.method))),
        _ => refused("needs net elsewhere.example:80"),
    }
}
