//! What the tests of the proxy share: a server under test, an upstream that does exactly what it is told, clients that send
//! bytes as they are, and small guests written in WebAssembly text.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use portcullis_config::Policy;
use portcullis_proxy::{Handle, OperatorHost, Options, Server, StartError};

/// How long a test waits for what must happen. Reached only when it fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A folder with a policy file and what it names.
pub(crate) struct Folder(tempfile::TempDir);

impl Folder {
    pub(crate) fn new() -> Folder {
        Folder(tempfile::tempdir().expect("a temporary folder"))
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> &Folder {
        std::fs::write(self.path().join(name), bytes).expect("a file in the temporary folder");
        self
    }

    pub(crate) fn policy(&self, yaml: &str) -> Policy {
        self.write("portcullis.yaml", yaml);
        portcullis_config::load(&self.path().join("portcullis.yaml")).unwrap_or_else(|mistakes| panic!("{mistakes}"))
    }
}

/// A policy with one listener, an upstream `api`, and whatever else the test adds.
pub(crate) fn policy_yaml(upstream: SocketAddr, rest: &str) -> String {
    format!(
        "version: 1\nworkers: 1\nadmin: {{ address: \"127.0.0.1:0\" }}\n\
         listeners: [{{ name: public, address: \"127.0.0.1:0\" }}]\n\
         upstreams:\n  api: {{ endpoints: [\"{upstream}\"] }}\n{rest}\n"
    )
}

/// All requests to `api`, through the filter `guest` in `guest.wasm`.
pub(crate) const GUEST_ROUTE: &str =
    "filters: [{ name: guest, wasm: guest.wasm, failure_policy: fail_closed }]\nroutes: [{ name: all, upstream: api }]";

/// All requests to `api`, without filters.
pub(crate) const PLAIN_ROUTE: &str = "routes: [{ name: all, upstream: api }]";

/// A running server.
pub(crate) struct Proxy {
    pub(crate) handle: Handle,
    pub(crate) access_log: AccessLogLines,
    thread: Option<JoinHandle<Result<(), StartError>>>,
}

/// What was written to the access log.
#[derive(Clone, Default)]
pub(crate) struct AccessLogLines(Arc<Mutex<Vec<u8>>>);

impl Write for AccessLogLines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("the lines").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Proxy {
    pub(crate) fn start(policy: Policy) -> Proxy {
        Proxy::start_with(policy, None).unwrap_or_else(|error| panic!("{error}"))
    }

    pub(crate) fn start_with(policy: Policy, drain_time: Option<Duration>) -> Result<Proxy, StartError> {
        Proxy::start_as(policy, Options { drain_time, ..Options::default() })
    }

    pub(crate) fn start_with_operators(
        policy: Policy,
        operators: Option<Arc<dyn OperatorHost>>,
    ) -> Result<Proxy, StartError> {
        Proxy::start_as(policy, Options { operators, ..Options::default() })
    }

    fn start_as(policy: Policy, mut options: Options) -> Result<Proxy, StartError> {
        let access_log = AccessLogLines::default();
        options.access_log = Some(Box::new(access_log.clone()));
        let server = Server::prepare(policy, options)?;
        let handle = server.handle();
        let (ready, is_ready) = channel();
        let thread = std::thread::spawn(move || server.run(|_| ready.send(()).expect("a waiting test")));
        is_ready.recv_timeout(PATIENCE).expect("a server that listens");
        Ok(Proxy { handle, access_log, thread: Some(thread) })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.handle.addresses()[0].1
    }

    pub(crate) fn get(&self, path: &str) -> Response {
        Client::connect(self.address()).exchange(&format!("GET {path} HTTP/1.1\r\nHost: test\r\n\r\n"))
    }

    pub(crate) fn admin(&self, path: &str) -> Response {
        let address = self.handle.admin_address().expect("an admin address");
        Client::connect(address).exchange(&format!("GET {path} HTTP/1.1\r\nHost: admin\r\n\r\n"))
    }

    /// The value of a series in `/metrics`; 0 where it is absent.
    pub(crate) fn metric(&self, series: &str) -> f64 {
        let text = self.admin("/metrics").text();
        text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok()).unwrap_or_default()
    }

    /// Waits until a series has a value: what is counted when a request ends is counted a moment after its client has the
    /// response.
    pub(crate) fn wait_for_metric(&self, series: &str, value: f64) {
        let deadline = std::time::Instant::now() + PATIENCE;
        while self.metric(series) != value {
            assert!(std::time::Instant::now() < deadline, "{series} is {}, not {value}", self.metric(series));
            std::thread::yield_now();
        }
    }

    /// Ends the server gracefully and gives its access log.
    pub(crate) fn end(mut self) -> String {
        self.handle.shutdown();
        self.join().expect("a server that ends well");
        let lines = self.access_log.0.lock().expect("the lines").clone();
        String::from_utf8(lines).expect("text")
    }

    pub(crate) fn join(&mut self) -> Result<(), StartError> {
        self.thread.take().expect("not joined before").join().expect("a server that does not panic")
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.handle.shutdown_now();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A response as it came over the wire.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) status: u16,
    /// Names in lower case.
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Vec<(String, String)>,
}

impl Response {
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

/// A connection that sends bytes as they are.
pub(crate) struct Client {
    stream: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Client {
    pub(crate) fn connect(address: SocketAddr) -> Client {
        let stream = TcpStream::connect(address).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a read timeout");
        let reader = BufReader::new(stream.try_clone().expect("a second handle"));
        Client { stream, reader }
    }

    pub(crate) fn send(&mut self, bytes: impl AsRef<[u8]>) {
        // A server that refuses may close before all was sent; what it said is what counts.
        let _ = self.stream.write_all(bytes.as_ref());
    }

    pub(crate) fn exchange(&mut self, request: &str) -> Response {
        self.send(request);
        let is_head = request.starts_with("HEAD ");
        self.response(is_head).expect("a response")
    }

    /// The next response; `None` when the connection ended instead.
    pub(crate) fn response(&mut self, is_head: bool) -> Option<Response> {
        let (first, fields) = read_head(&mut self.reader)?;
        let status = first.split(' ').nth(1).expect("a status").parse().expect("a number");
        let has_no_body = is_head || status == 204 || status == 304 || (100..200).contains(&status);
        let (body, trailers) =
            if has_no_body { Some((Vec::new(), Vec::new())) } else { read_body(&mut self.reader, &fields, true) }?;
        Some(Response { status, fields, body, trailers })
    }

    /// Everything until the server closes.
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        // A reset after the last byte is an end too.
        let _ = self.reader.read_to_end(&mut rest);
        rest
    }

    /// Whether the server closes without another byte.
    pub(crate) fn is_closed(&mut self) -> bool {
        self.rest().is_empty()
    }

    pub(crate) fn close(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

type Fields = Vec<(String, String)>;

fn read_line(reader: &mut impl BufRead) -> Option<String> {
    let mut line = Vec::new();
    let count = reader.read_until(b'\n', &mut line).ok()?;
    (count > 0).then(|| String::from_utf8_lossy(&line).trim_end_matches("\r\n").to_owned())
}

fn read_fields(reader: &mut impl BufRead) -> Option<Fields> {
    let mut fields = Vec::new();
    loop {
        let line = read_line(reader)?;
        if line.is_empty() {
            return Some(fields);
        }
        let (name, value) = line.split_once(':').expect("a field line");
        fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
}

fn read_head(reader: &mut impl BufRead) -> Option<(String, Fields)> {
    let first = read_line(reader)?;
    Some((first, read_fields(reader)?))
}

/// `None` when the body breaks off.
fn read_body(reader: &mut impl BufRead, fields: &Fields, until_end: bool) -> Option<(Vec<u8>, Fields)> {
    let field = |wanted: &str| fields.iter().find(|(name, _)| name == wanted).map(|(_, value)| value.as_str());
    let mut body = Vec::new();
    if field("transfer-encoding").is_some() {
        loop {
            let size = usize::from_str_radix(&read_line(reader)?, 16).expect("a chunk size");
            if size == 0 {
                return Some((body, read_fields(reader)?));
            }
            let start = body.len();
            body.resize(start + size, 0);
            reader.read_exact(&mut body[start..]).ok()?;
            read_line(reader)?;
        }
    }
    match field("content-length") {
        Some(length) => {
            body.resize(length.parse().expect("a length"), 0);
            reader.read_exact(&mut body).ok()?;
        }
        None if until_end => {
            reader.read_to_end(&mut body).ok()?;
        }
        None => {}
    }
    Some((body, Vec::new()))
}

/// A request as the upstream received it.
#[derive(Clone, Debug)]
pub(crate) struct Received {
    /// Number of the connection, from 0.
    pub(crate) connection: usize,
    pub(crate) line: String,
    pub(crate) fields: Fields,
    pub(crate) body: Vec<u8>,
    pub(crate) trailers: Fields,
}

impl Received {
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }

    pub(crate) fn path(&self) -> &str {
        self.line.split(' ').nth(1).unwrap_or_default()
    }
}

/// What an upstream does once it has the head of a request.
pub(crate) enum Doing {
    /// Reads the body, then sends these bytes and goes on with the next request.
    Answer(Vec<u8>),
    /// Sends these bytes without reading the body, then waits for the proxy to close.
    AnswerEarly(Vec<u8>),
    /// Reads the body, then closes.
    Close,
    /// Sends these bytes, then closes.
    AnswerAndClose(Vec<u8>),
    /// Reads the body, then waits for the signal before it sends.
    AnswerWhenTold(Vec<u8>, Arc<Mutex<Receiver<()>>>),
    /// Reads nothing more and tells when the proxy closes.
    WaitForClose(Sender<()>),
}

pub(crate) type Script = dyn Fn(&Received) -> Doing + Send + Sync;

/// A server that does what its script says, and remembers what it received.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    received: Arc<Mutex<Vec<Received>>>,
}

impl Upstream {
    pub(crate) fn start(script: impl Fn(&Received) -> Doing + Send + Sync + 'static) -> Upstream {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let address = listener.local_addr().expect("an address");
        let received: Arc<Mutex<Vec<Received>>> = Arc::default();
        let script: Arc<Script> = Arc::new(script);
        let log = Arc::clone(&received);
        std::thread::spawn(move || {
            for (connection, stream) in listener.incoming().enumerate() {
                let Ok(stream) = stream else { return };
                let (script, log) = (Arc::clone(&script), Arc::clone(&log));
                std::thread::spawn(move || converse(connection, stream, &*script, &log));
            }
        });
        Upstream { address, received }
    }

    /// Answers every request with what it received, as text.
    pub(crate) fn echo() -> Upstream {
        Upstream::start(|received| Doing::Answer(answer(&describe(received))))
    }

    pub(crate) fn received(&self) -> Vec<Received> {
        self.received.lock().expect("what was received").clone()
    }
}

/// Line, fields in order and body, one a line.
pub(crate) fn describe(received: &Received) -> String {
    let mut text = format!("{}\n", received.line);
    for (name, value) in &received.fields {
        text.push_str(&format!("{name}: {value}\n"));
    }
    text
}

/// A complete response with a length.
pub(crate) fn answer(body: &str) -> Vec<u8> {
    format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{body}", body.len()).into_bytes()
}

fn converse(connection: usize, mut stream: TcpStream, script: &Script, log: &Mutex<Vec<Received>>) {
    let mut reader = BufReader::new(stream.try_clone().expect("a second handle"));
    while let Some((line, fields)) = read_head(&mut reader) {
        let mut received = Received { connection, line, fields, body: Vec::new(), trailers: Vec::new() };
        let doing = script(&received);
        let early = matches!(doing, Doing::AnswerEarly(_) | Doing::WaitForClose(_));
        if !early {
            let Some((body, trailers)) = read_body(&mut reader, &received.fields, false) else { return };
            received.body = body;
            received.trailers = trailers;
        }
        log.lock().expect("what was received").push(received);
        match doing {
            Doing::Answer(bytes) => {
                if stream.write_all(&bytes).is_err() {
                    return;
                }
            }
            Doing::AnswerWhenTold(bytes, told) => {
                let _ = told.lock().expect("the signal").recv();
                if stream.write_all(&bytes).is_err() {
                    return;
                }
            }
            Doing::AnswerEarly(bytes) => {
                let _ = stream.write_all(&bytes);
                let mut rest = Vec::new();
                let _ = reader.read_to_end(&mut rest);
                return;
            }
            Doing::WaitForClose(closed) => {
                let mut rest = Vec::new();
                let _ = reader.read_to_end(&mut rest);
                let _ = closed.send(());
                return;
            }
            Doing::AnswerAndClose(bytes) => {
                let _ = stream.write_all(&bytes);
                return;
            }
            Doing::Close => return,
        }
    }
}

/// A guest: `callbacks` in WebAssembly text, in which `@name` stands for the address and the length of a piece of `data`.
///
/// At hand: `$log`, `$respond`, `$set_buffer`, `$set_field`, `$define_metric`, `$increment`, `$http_call`, `$continue`, `$close_stream`, `$get_field`,
/// `$context`,
/// `$tick_every`, `$register_queue`, `$enqueue`, `$get_buffer`, `$grpc_call`, `$grpc_stream`, `$grpc_send`, `$grpc_close`,
/// `$grpc_cancel`, `$get_status`, `$done`.
pub(crate) fn guest(data: &[(&str, &[u8])], callbacks: &str) -> Vec<u8> {
    let mut segments = String::new();
    let mut at = 1024;
    let mut places = BTreeMap::new();
    for (name, bytes) in data {
        let escaped: String = bytes.iter().map(|byte| format!("\\{byte:02x}")).collect();
        segments.push_str(&format!("(data (i32.const {at}) \"{escaped}\")\n"));
        places.insert(*name, format!("(i32.const {at}) (i32.const {})", bytes.len()));
        at += bytes.len();
    }
    let mut callbacks = callbacks.to_owned();
    for (name, place) in places {
        callbacks = callbacks.replace(&format!("@{name}"), &place);
    }
    let text = format!(
        r#"(module
        (import "env" "proxy_log" (func $log (param i32 i32 i32) (result i32)))
        (import "env" "proxy_send_local_response" (func $respond (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
        (import "env" "proxy_set_buffer_bytes" (func $set_buffer (param i32 i32 i32 i32 i32) (result i32)))
        (import "env" "proxy_replace_header_map_value" (func $set_field (param i32 i32 i32 i32 i32) (result i32)))
        (import "env" "proxy_define_metric" (func $define_metric (param i32 i32 i32 i32) (result i32)))
        (import "env" "proxy_increment_metric" (func $increment (param i32 i64) (result i32)))
        (import "env" "proxy_http_call"
            (func $http_call (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
        (import "env" "proxy_continue_stream" (func $continue (param i32) (result i32)))
        (import "env" "proxy_close_stream" (func $close_stream (param i32) (result i32)))
        (import "env" "proxy_get_header_map_value" (func $get_field (param i32 i32 i32 i32 i32) (result i32)))
        (import "env" "proxy_set_tick_period_milliseconds" (func $tick_every (param i32) (result i32)))
        (import "env" "proxy_register_shared_queue" (func $register_queue (param i32 i32 i32) (result i32)))
        (import "env" "proxy_enqueue_shared_queue" (func $enqueue (param i32 i32 i32) (result i32)))
        (import "env" "proxy_set_effective_context" (func $context (param i32) (result i32)))
        (import "env" "proxy_done" (func $done (result i32)))
        (import "env" "proxy_get_buffer_bytes" (func $get_buffer (param i32 i32 i32 i32 i32) (result i32)))
        (import "env" "proxy_grpc_call"
            (func $grpc_call (param i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
        (import "env" "proxy_grpc_stream" (func $grpc_stream (param i32 i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
        (import "env" "proxy_grpc_send" (func $grpc_send (param i32 i32 i32 i32) (result i32)))
        (import "env" "proxy_grpc_close" (func $grpc_close (param i32) (result i32)))
        (import "env" "proxy_grpc_cancel" (func $grpc_cancel (param i32) (result i32)))
        (import "env" "proxy_get_status" (func $get_status (param i32 i32 i32) (result i32)))
        (memory (export "memory") 4)
        (func (export "proxy_abi_version_0_2_1"))
        ;; Nothing is kept beyond a callback, so everything the host hands over may go to one place.
        (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 65536))
        {segments}
        {callbacks}
        )"#
    );
    wat::parse_str(&text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

/// A guest that refuses every request with 403.
pub(crate) fn denying_guest() -> Vec<u8> {
    guest(
        &[("details", b"portcullis.guest.denied"), ("body", b"denied")],
        r#"(func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
            (drop (call $respond (i32.const 403) @details @body (i32.const 0) (i32.const 0) (i32.const -1)))
            (i32.const 1))"#,
    )
}

/// A guest that counts, in the metric `logged_total`, how often it was told of a request's end.
pub(crate) fn counting_guest() -> Vec<u8> {
    guest(
        &[("name", b"logged_total")],
        r#"(func (export "proxy_on_vm_start") (param i32 i32) (result i32)
            (drop (call $define_metric (i32.const 0) @name (i32.const 16)))
            (i32.const 1))
        (func (export "proxy_on_log") (param i32)
            (drop (call $increment (i32.load (i32.const 16)) (i64.const 1))))"#,
    )
}
