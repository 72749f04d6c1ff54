//! What the tests with a real Envoy share: finding it, a folder with the files that policies name, running it.

#![allow(dead_code, reason = "each test file uses a part of this")]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use portcullis_config::envoy::{Options, Rendering, render_bootstrap};
use portcullis_config::{Policy, load};

/// The Envoy that the renderings are tested with.
pub(crate) fn envoy() -> PathBuf {
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.portcullis/tools/envoy-1.40.0/envoy");
    let envoy = std::env::var_os("PORTCULLIS_ENVOY").map_or(place, PathBuf::from);
    assert!(
        envoy.is_file(),
        "there is no Envoy at {}: run `cargo xtask setup`, or set PORTCULLIS_ENVOY to an Envoy 1.40 binary",
        envoy.display()
    );
    envoy
}

/// A filter that lets everything pass: the least that Envoy takes for a Proxy-Wasm 0.2.1 module. When it is
/// configured it counts one denial, so that the rendering of its metric can be seen.
const PASS: &str = r#"(module
  (import "env" "proxy_define_metric" (func $define (param i32 i32 i32 i32) (result i32)))
  (import "env" "proxy_increment_metric" (func $increment (param i32 i64) (result i32)))
  (memory (export "memory") 2)
  (global $free (mut i32) (i32.const 65536))
  (data (i32.const 16) "portcullis_probe_denied_total.rule.orders-v1.reason.token_expired")
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "_initialize"))
  (func (export "proxy_on_memory_allocate") (param $size i32) (result i32)
    (local $at i32)
    (local.set $at (global.get $free))
    (global.set $free (i32.and (i32.add (i32.add (global.get $free) (local.get $size)) (i32.const 7)) (i32.const -8)))
    (local.get $at))
  (func (export "proxy_on_context_create") (param i32 i32))
  (func (export "proxy_on_vm_start") (param i32 i32) (result i32) (i32.const 1))
  (func (export "proxy_on_configure") (param i32 i32) (result i32)
    (if (i32.eqz (call $define (i32.const 0) (i32.const 16) (i32.const 65) (i32.const 8)))
      (then (drop (call $increment (i32.load (i32.const 8)) (i64.const 1)))))
    (i32.const 1))
  (func (export "proxy_on_done") (param i32) (result i32) (i32.const 1))
)"#;

/// A filter that answers every request with 403, so that it shows where it runs.
const DENY: &str = r#"(module
  (import "env" "proxy_send_local_response"
    (func $respond (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (func (export "proxy_abi_version_0_2_1"))
  (func (export "_initialize"))
  (func (export "proxy_on_memory_allocate") (param i32) (result i32) (i32.const 65536))
  (func (export "proxy_on_context_create") (param i32 i32))
  (func (export "proxy_on_vm_start") (param i32 i32) (result i32) (i32.const 1))
  (func (export "proxy_on_configure") (param i32 i32) (result i32) (i32.const 1))
  (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32)
    (drop (call $respond (i32.const 403) (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
      (i32.const 0) (i32.const 0) (i32.const -1)))
    (i32.const 1))
  (func (export "proxy_on_done") (param i32) (result i32) (i32.const 1))
)"#;

/// A folder with everything that the policies in the tests name.
pub(crate) fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let write = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
        std::fs::write(path, bytes).expect("a file");
    };
    let pass = wat::parse_str(PASS).expect("valid WAT");
    write("pass.wasm", &pass);
    write("filters/jwt-auth.wasm", &pass);
    write("deny.wasm", &wat::parse_str(DENY).expect("valid WAT"));
    write("second.bin", b"not UTF-8: \xff\xfe");
    write("third.json", br#"{ "verbatim": true }"#);
    write("hello.ts", b"export default { fetch: () => new Response('hello') };\n");
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    for (name, content) in
        [("server.pem", own.cert.pem()), ("server.key", own.signing_key.serialize_pem()), ("ca.pem", own.cert.pem())]
    {
        write(name, content.as_bytes());
        write(&format!("tls/{name}"), content.as_bytes());
    }
    folder
}

/// Compiles a policy that stands in the folder.
pub(crate) fn policy_in(folder: &Path, text: &str) -> Policy {
    let path = folder.join("portcullis.yaml");
    std::fs::write(&path, text).expect("the policy file");
    load(&path).unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

/// Whether Envoy takes a rendering; if not, why.
pub(crate) fn validate(folder: &Path, rendering: &Rendering) -> Result<(), String> {
    let path = folder.join("envoy.yaml");
    std::fs::write(&path, &rendering.yaml).expect("the rendering");
    let output = Command::new(envoy())
        .args(["--mode", "validate", "--log-level", "warning", "-c"])
        .arg(&path)
        .output()
        .expect("envoy starts");
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if output.status.success() { Ok(()) } else { Err(format!("{said}\n{}", rendering.yaml)) }
}

/// Options that do not depend on the machine.
pub(crate) fn options(folder: &Path) -> Options {
    Options { system_authorities: folder.join("ca.pem"), ..Options::default() }
}

/// An Envoy that runs until it is dropped.
pub(crate) struct Envoy {
    child: Child,
    pub(crate) admin: SocketAddr,
    pub(crate) listeners: BTreeMap<String, SocketAddr>,
}

impl Envoy {
    /// Starts Envoy with a policy, its listeners and admin endpoints on ports that the system chooses.
    pub(crate) fn start(folder: &Path, policy: &Policy) -> Self {
        Self::start_at(folder, policy, ([127, 0, 0, 1], 0).into())
    }

    /// The same, with the listeners on this address.
    pub(crate) fn start_at(folder: &Path, policy: &Policy, listen: SocketAddr) -> Self {
        let any: SocketAddr = ([127, 0, 0, 1], 0).into();
        let options = Options {
            listen: policy.listeners.iter().map(|listener| (listener.name.clone(), listen)).collect(),
            admin: Some(any),
            ..options(folder)
        };
        let path = folder.join("envoy.yaml");
        std::fs::write(&path, render_bootstrap(policy, &options).yaml).expect("the rendering");
        let admin_path = folder.join("admin");
        let log = folder.join("envoy.log");
        let log_file = std::fs::File::create(&log).expect("a log file");
        let access_log = std::fs::File::create(folder.join("access.log")).expect("an access log");
        let child = Command::new(envoy())
            .args(["--concurrency", "1", "--log-level", "info", "--use-dynamic-base-id"])
            .args(["--file-flush-interval-msec", "50", "-c"])
            .arg(&path)
            .arg("--admin-address-path")
            .arg(&admin_path)
            .stdin(Stdio::null())
            .stdout(access_log)
            .stderr(log_file)
            .spawn()
            .expect("envoy starts");
        let mut envoy = Self { child, admin: any, listeners: BTreeMap::new() };
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Some(ready) = envoy.ready(&admin_path) {
                envoy.listeners = ready;
                return envoy;
            }
            let exited = envoy.child.try_wait().expect("the state of envoy");
            if exited.is_some() || Instant::now() > deadline {
                panic!("envoy is not ready: {exited:?}\n{}", std::fs::read_to_string(&log).unwrap_or_default());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn ready(&mut self, admin_path: &Path) -> Option<BTreeMap<String, SocketAddr>> {
        self.admin = std::fs::read_to_string(admin_path).ok()?.trim().parse().ok()?;
        let answer = self.admin_get("/ready")?;
        if answer.status != 200 {
            return None;
        }
        let listeners = self.admin_get("/listeners?format=json")?;
        let listeners: serde_json::Value = serde_json::from_slice(&listeners.body).ok()?;
        listeners["listener_statuses"]
            .as_array()?
            .iter()
            .map(|listener| {
                let address = &listener["local_address"]["socket_address"];
                let ip = address["address"].as_str()?.parse().ok()?;
                let port = u16::try_from(address["port_value"].as_u64()?).ok()?;
                Some((listener["name"].as_str()?.to_owned(), SocketAddr::new(ip, port)))
            })
            .collect()
    }

    /// Asks an admin endpoint.
    pub(crate) fn admin_get(&self, path: &str) -> Option<Answer> {
        exchange(self.admin, format!("GET {path} HTTP/1.1\r\nhost: admin\r\nconnection: close\r\n\r\n").as_bytes())
    }
}

impl Drop for Envoy {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// A parsed response.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) fields: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn field(&self, name: &str) -> Option<&str> {
        self.fields.iter().find(|(own, _)| own == name).map(|(_, value)| value.as_str())
    }
}

/// Sends bytes on a connection of their own and reads the response; `None` when there is none.
pub(crate) fn exchange(address: SocketAddr, request: &[u8]) -> Option<Answer> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(10))).ok()?;
    stream.write_all(request).ok()?;
    let mut bytes = Vec::new();
    let mut reader = BufReader::new(stream);
    let mut fields = Vec::new();
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let status = line.split(' ').nth(1)?.parse().ok()?;
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let length = fields.iter().find(|(name, _)| name == "content-length").and_then(|(_, value)| value.parse().ok());
    match length {
        Some(length) => {
            bytes.resize(length, 0);
            reader.read_exact(&mut bytes).ok()?;
        }
        None if fields.iter().any(|(name, value)| name == "transfer-encoding" && value == "chunked") => loop {
            line.clear();
            reader.read_line(&mut line).ok()?;
            let size = usize::from_str_radix(line.trim(), 16).ok()?;
            let mut chunk = vec![0; size + 2];
            reader.read_exact(&mut chunk).ok()?;
            if size == 0 {
                break;
            }
            bytes.extend_from_slice(chunk.get(..size)?);
        },
        None => {
            reader.read_to_end(&mut bytes).ok()?;
        }
    }
    Some(Answer { status, fields, body: bytes })
}

/// Whether no answer comes for a while.
pub(crate) fn nothing_comes(address: SocketAddr, request: &[u8], wait: Duration) -> bool {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(wait)).expect("a timeout");
    stream.write_all(request).expect("the request is sent");
    let waited = stream.read(&mut [0; 1]);
    waited.is_err_and(|error| matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut))
}

/// A server that answers each request with its own name, the request line, the host and all field lines.
pub(crate) fn echo(name: &'static str) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || serve(&stream, name));
        }
    });
    address
}

fn serve(stream: &TcpStream, name: &str) -> Option<()> {
    let mut reader = BufReader::new(stream.try_clone().ok()?);
    loop {
        let mut request = Vec::new();
        if reader.read_until(b'\n', &mut request).ok()? == 0 {
            return None;
        }
        let mut host = Vec::new();
        let mut fields = Vec::new();
        loop {
            let mut line = Vec::new();
            reader.read_until(b'\n', &mut line).ok()?;
            if line.to_ascii_lowercase().starts_with(b"host:") {
                host = line.get(5..)?.trim_ascii().to_vec();
            }
            if line.trim_ascii().is_empty() {
                break;
            }
            fields.extend_from_slice(&line);
        }
        let body = [name.as_bytes(), b"\n", request.trim_ascii(), b"\n", &host, b"\n", &fields].concat();
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len());
        (&*stream).write_all(&[head.as_bytes(), &body].concat()).ok()?;
    }
}
