//! What the integration tests share: the engine, a launcher, and scripts that try things.
#![allow(dead_code, unreachable_pub, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use portcullis_operators::engine::deno::Deno;
use portcullis_operators::engine::{self, Choice, Class, Engine};
use portcullis_operators::jail::{Isolation, Launcher, Layer, Report, Rlimits, Spec};

pub const DEADLINE: Duration = Duration::from_secs(30);

pub fn deno() -> Deno {
    Deno::locate().unwrap_or_else(|error| panic!("{error}"))
}

/// Which engine a test runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Deno,
    Runner,
}

impl Kind {
    /// The engine itself. Where V8 cannot be had, `cargo xtask test` leaves the runner's tests out and says so; a runner that
    /// is only not built yet is a failure.
    pub fn engine(self) -> std::sync::Arc<dyn Engine> {
        let choice = match self {
            Self::Deno => Choice::Deno,
            Self::Runner => Choice::Runner,
        };
        engine::locate(choice).unwrap_or_else(|error| panic!("{error}"))
    }
}

/// Makes two tests of each, whose names say which engine they run on.
#[macro_export]
macro_rules! on_each_engine {
    ($(async $(($($options:tt)*))? $name:ident;)* $(sync $plain:ident;)*) => {
        $crate::on_each_engine! { @one on_deno Deno $(async [$($($options)*)?] $name;)* $(sync $plain;)* }
        $crate::on_each_engine! { @one on_runner Runner $(async [$($($options)*)?] $name;)* $(sync $plain;)* }
    };
    (@one $module:ident $kind:ident $(async [$($options:tt)*] $name:ident;)* $(sync $plain:ident;)*) => {
        mod $module {
            $(
                #[tokio::test($($options)*)]
                async fn $name() {
                    super::$name(super::support::Kind::$kind).await;
                }
            )*
            $(
                #[test]
                fn $plain() {
                    super::$plain(super::support::Kind::$kind);
                }
            )*
        }
    };
}

pub fn launcher() -> Launcher {
    Launcher { command: vec![env!("CARGO_BIN_EXE_portcullis-jail").into(), "__jail".into()] }
}

pub fn class() -> Class {
    Class {
        heap_bytes: 64 << 20,
        memory_bytes: 192 << 20,
        interpreter_only: false,
        code_generation: false,
        private_bytes: 4 << 20,
        required: false,
    }
}

/// A jail for the engine's own start, to be changed by a test.
pub fn spec(folder: &Path) -> Spec {
    let start = deno().start(&class());
    let staging = folder.join("root");
    std::fs::create_dir_all(&staging).unwrap();
    Spec {
        isolation: Isolation::BestEffort,
        host_pid: i32::try_from(std::process::id()).unwrap(),
        uid: 1_900_000_000 + std::process::id() % 1_000_000,
        staging,
        private_fallback: folder.join("private"),
        binds: start.binds,
        files: start.files,
        private_bytes: 4 << 20,
        private_files: 64,
        rlimits: Rlimits { data_bytes: start.data_bytes + (192 << 20), files: 256, threads: start.threads },
        argv: start.argv,
        env: start.env,
        group: Err("none in this test".to_owned()),
        may_restrict_itself: start.abilities.restricts_itself,
        without: Vec::new(),
    }
}

/// A script that runs with all of Deno's permissions, in a jail.
pub struct Attack {
    script: String,
    pub without: Vec<Layer>,
    pub isolation: Isolation,
    /// What the script sees as `Deno.args` after the private directory and the C library.
    pub arguments: Vec<String>,
    /// Mode of the folder that holds the private directory where there is no mount namespace.
    pub folder_mode: Option<std::fs::Permissions>,
}

pub struct Outcome {
    pub results: BTreeMap<String, String>,
    pub output: String,
    pub report: Report,
    pub setup_microseconds: u64,
}

impl Outcome {
    pub fn get(&self, name: &str) -> &str {
        self.results.get(name).map_or("(did not run)", String::as_str)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(formatter, "{}\n{:#?}", self.output, self.results)
    }
}

const PRELUDE: &str = r#"
const [PRIVATE, LIBC, ...ARGS] = Deno.args;
// A raw system call, past everything that Deno checks: the number, or minus the error number.
let libc;
function syscall(number, ...args) {
  const parameters = ["i64", "i64", "i64", "i64", "i64", "i64", "i64"];
  libc ??= Deno.dlopen(LIBC, { syscall: { parameters, result: "i64" }, __errno_location: { parameters: [], result: "pointer" } });
  const all = [number, ...args, 0, 0, 0, 0, 0, 0].slice(0, 7).map((value) => BigInt(value));
  const result = libc.symbols.syscall(...all);
  if (result < 0n) throw new Error("errno " + new Deno.UnsafePointerView(libc.symbols.__errno_location()).getInt32());
  return result;
}
function text(value) { const bytes = new TextEncoder().encode(value + "\0"); kept.push(bytes); return Deno.UnsafePointer.value(Deno.UnsafePointer.of(bytes)); }
const kept = [];
async function tries(attempts) {
  for (const [name, attempt] of Object.entries(attempts)) {
    let text;
    try { text = "ALLOWED " + String(await attempt()); } catch (error) { text = "DENIED " + (error?.message ?? error); }
    console.log("\u001eresult " + JSON.stringify([name, text]));
  }
}
"#;

impl Attack {
    pub fn new(script: &str) -> Self {
        Self {
            script: script.to_owned(),
            without: Vec::new(),
            isolation: Isolation::BestEffort,
            arguments: Vec::new(),
            folder_mode: None,
        }
    }

    pub fn run(self) -> Outcome {
        let folder = tempfile::tempdir().unwrap();
        if let Some(mode) = self.folder_mode {
            std::fs::set_permissions(folder.path(), mode).unwrap();
        }
        let mut spec = spec(folder.path());
        spec.without = self.without;
        spec.isolation = self.isolation;
        spec.files = vec![(PathBuf::from("/attack.js"), format!("{PRELUDE}\n{}", self.script))];
        let libc = spec.binds.iter().find(|bind| bind.source.to_string_lossy().contains("libc.so")).unwrap();
        let libc = libc.target.display().to_string();
        let arguments = self.arguments.iter().map(String::as_str);
        spec.argv = ["/deno", "run", "-A", "--no-prompt", "--no-config", "--no-lock", "{root}/attack.js"]
            .into_iter()
            .chain(["{private}", libc.as_str()])
            .chain(arguments)
            .map(str::to_owned)
            .collect();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (process, output, report, setup_microseconds) = runtime.block_on(async {
            let confined = launcher().launch(&spec, DEADLINE).await.unwrap_or_else(|error| panic!("{error}"));
            let microseconds = confined.setup.total_microseconds();
            let (process, _private, output, report) = confined.into_parts();
            (process, output, report, microseconds)
        });
        let signaller = process.signaller().unwrap();
        let watchdog = std::thread::spawn({
            let (sender, receiver) = std::sync::mpsc::channel::<()>();
            move || {
                let reader = std::thread::spawn(move || {
                    let mut text = Vec::new();
                    std::fs::File::from(output).take(1 << 20).read_to_end(&mut text).unwrap();
                    drop(sender);
                    text
                });
                if receiver.recv_timeout(DEADLINE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    signaller.kill();
                }
                reader.join().unwrap()
            }
        });
        let output = String::from_utf8_lossy(&watchdog.join().unwrap()).into_owned();
        drop(process);
        let results = output
            .lines()
            .filter_map(|line| line.strip_prefix("\u{1e}result "))
            .filter_map(|line| serde_json::from_str::<(String, String)>(line).ok())
            .collect();
        Outcome { results, output, report, setup_microseconds }
    }
}

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use portcullis_operators::{Cause, Operator, OperatorConfig, OperatorError, Operators, Settings};

/// A folder with operators' files, and a host that serves them.
pub struct Host {
    pub engine: Kind,
    pub folder: tempfile::TempDir,
    pub settings: Settings,
    pub operators: Operators,
}

pub fn settings(folder: &Path) -> Settings {
    Settings {
        launcher: launcher(),
        run_folder: folder.to_owned(),
        kv_folder: Some(folder.join("kv")),
        drain: Duration::from_secs(10),
        ..Settings::default()
    }
}

impl Host {
    pub fn new(engine: Kind) -> Self {
        Self::with(engine, |_| {})
    }

    pub fn with(engine: Kind, change: impl FnOnce(&mut Settings)) -> Self {
        Self::with_resolver(engine, change, std::sync::Arc::new(portcullis_operators::SystemResolver))
    }

    pub fn with_resolver(
        engine: Kind,
        change: impl FnOnce(&mut Settings),
        resolver: std::sync::Arc<dyn portcullis_operators::Resolve>,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut settings = settings(folder.path());
        change(&mut settings);
        let operators = Operators::start_with_resolver(settings.clone(), engine.engine(), resolver).unwrap();
        Self { engine, folder, settings, operators }
    }

    pub fn write(&self, name: &str, text: &str) {
        let path = self.folder.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    /// An operator of one file, with generous limits for a slow machine.
    pub fn operator(&self, name: &str, code: &str, change: impl FnOnce(&mut OperatorConfig)) -> Operator {
        self.write(&format!("{name}/main.ts"), code);
        let mut config = OperatorConfig::new(format!("{name}/main.ts"));
        config.limits.start = Duration::from_millis(20_000);
        config.limits.cpu = Duration::from_millis(5_000);
        change(&mut config);
        config.compile(name, self.folder.path(), &self.settings).unwrap_or_else(|errors| panic!("{errors:?}"))
    }

    pub async fn serve(&self, operators: Vec<Operator>) {
        self.operators.apply(operators).await.unwrap_or_else(|errors| panic!("{errors:?}"));
    }

    pub async fn get(&self, operator: &str, path: &str) -> Result<Response<Bytes>, Cause> {
        let request = Request::get(format!("http://api.example.com{path}")).body(Full::default()).unwrap();
        self.send(operator, request).await
    }

    pub async fn send(&self, operator: &str, request: Request<Full<Bytes>>) -> Result<Response<Bytes>, Cause> {
        let fail = |error: OperatorError| error.cause;
        let (parts, body) = self.operators.call(operator, request).await.map_err(fail)?.into_parts();
        let body = body.collect().await.map_err(fail)?.to_bytes();
        Ok(Response::from_parts(parts, body))
    }

    pub async fn text(&self, operator: &str, path: &str) -> String {
        let response = self.get(operator, path).await.unwrap_or_else(|cause| panic!("{cause}\n{}", self.log(operator)));
        String::from_utf8_lossy(response.body()).into_owned()
    }

    pub fn log(&self, operator: &str) -> String {
        self.operators.recent_logs(operator).into_iter().map(|line| line.text + "\n").collect()
    }

    pub fn metric(&self, name: &str) -> u64 {
        self.operators.metrics().into_iter().find(|(found, _)| found == name).map_or(0, |(_, value)| value)
    }

    pub async fn pids(&self, operator: &str) -> Vec<i32> {
        let status = self.operators.status().await;
        status.into_iter().filter(|one| one.operator.as_deref() == Some(operator)).map(|one| one.pid).collect()
    }
}

/// Waits until something holds.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let start = std::time::Instant::now();
    while !condition().await {
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

pub fn is_running(pid: i32) -> bool {
    // A zombie has no executable any more.
    Path::new("/proc").join(pid.to_string()).join("exe").read_link().is_ok()
}

/// A resolver that knows a few names; an empty address means that the name does not exist.
#[derive(Debug)]
pub struct Names(pub BTreeMap<&'static str, &'static str>);

impl portcullis_operators::Resolve for Names {
    fn resolve<'a>(
        &'a self,
        host: &'a str,
        port: u16,
    ) -> std::pin::Pin<Box<dyn Future<Output = std::io::Result<Vec<std::net::SocketAddr>>> + Send + 'a>> {
        let address = self.0.get(host).and_then(|address| address.parse().ok());
        Box::pin(
            async move { Ok(address.map(|address| std::net::SocketAddr::new(address, port)).into_iter().collect()) },
        )
    }
}

/// A service on the loopback interface that operators may or may not reach.
pub struct Origin {
    pub port: u16,
    connections: std::sync::Arc<std::sync::atomic::AtomicUsize>,
}

impl Origin {
    pub fn connections(&self) -> usize {
        self.connections.load(std::sync::atomic::Ordering::Acquire)
    }

    pub async fn start() -> Self {
        Self::serve(None).await
    }

    pub async fn start_tls(key: &rcgen::CertifiedKey<rcgen::KeyPair>) -> Self {
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let private = rustls::pki_types::PrivateKeyDer::Pkcs8(key.signing_key.serialize_der().into());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![key.cert.der().clone()], private)
            .unwrap();
        Self::serve(Some(std::sync::Arc::new(config).into())).await
    }

    async fn serve(tls: Option<tokio_rustls::TlsAcceptor>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let connections = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = std::sync::Arc::clone(&connections);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, std::sync::atomic::Ordering::AcqRel);
                let tls = tls.clone();
                tokio::spawn(async move {
                    match tls {
                        Some(tls) => {
                            if let Ok(stream) = tls.accept(stream).await {
                                origin_connection(hyper_util::rt::TokioIo::new(stream)).await;
                            }
                        }
                        None => origin_connection(hyper_util::rt::TokioIo::new(stream)).await,
                    }
                });
            }
        });
        Self { port, connections }
    }
}

async fn origin_connection<S: hyper::rt::Read + hyper::rt::Write + Unpin>(stream: S) {
    let service = hyper::service::service_fn(async |request: Request<hyper::body::Incoming>| {
        let query = request.uri().query().unwrap_or_default().to_owned();
        let response = match request.uri().path() {
            "/echo" => Response::new(Full::<Bytes>::from(format!(
                "{:?}",
                request
                    .headers()
                    .iter()
                    .map(|(n, v)| format!("{n}: {}", String::from_utf8_lossy(v.as_bytes())))
                    .collect::<Vec<_>>()
            ))),
            "/redirect" => {
                let to = query.strip_prefix("to=").unwrap_or("/redirect").to_owned();
                Response::builder().status(302).header("location", to).body(Full::default()).unwrap()
            }
            "/long" => Response::new(Full::from(vec![b'x'; 200_000])),
            "/slow" => {
                tokio::time::sleep(Duration::from_secs(20)).await;
                Response::new(Full::default())
            }
            _ => {
                let _ = request.into_body().collect().await;
                Response::new(Full::from("plain"))
            }
        };
        Ok::<_, std::convert::Infallible>(response)
    });
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(stream, service).await;
}

/// A request body in pieces that ends well, never, or with an error.
pub struct Chunks {
    pub chunks: std::collections::VecDeque<Bytes>,
    pub then: Then,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Then {
    End,
    Hang,
    Fail,
}

impl Chunks {
    pub fn new(sizes: &[usize], then: Then) -> Self {
        Self { chunks: sizes.iter().map(|size| Bytes::from(vec![b'x'; *size])).collect(), then }
    }
}

impl http_body::Body for Chunks {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        _context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Bytes>, std::io::Error>>> {
        use std::task::Poll;
        match (self.chunks.pop_front(), self.then) {
            (Some(chunk), _) => Poll::Ready(Some(Ok(http_body::Frame::data(chunk)))),
            (None, Then::End) => Poll::Ready(None),
            (None, Then::Hang) => Poll::Pending,
            (None, Then::Fail) => Poll::Ready(Some(Err(std::io::Error::other("the client went away")))),
        }
    }
}
