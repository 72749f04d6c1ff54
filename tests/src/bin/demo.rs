//! `cargo xtask demo`: the same filter in front of the same API and the same operators, once in `portcullis serve` and once in
//! the real Envoy.
//!
//! Sends a handful of requests through both, shows the answers side by side, and fails if they differ. Keys are made at
//! the start and end with the process.

use std::io::IsTerminal as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, anyhow, bail};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use portcullis_harness::SigningKey;
use portcullis_tests::process::Process;
use portcullis_tests::server::Server;
use portcullis_tests::{places, process};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

const USAGE: &str = "\
Shows one filter, an API and two operators behind it, in two hosts: `portcullis serve` and Envoy.

Usage: cargo xtask demo [--keep]

  --keep   Leave everything running until Ctrl-C, to try it with curl
  --help   This text
";

/// Whether everything was shown and a signal is all that is waited for.
static SHOWN: AtomicBool = AtomicBool::new(false);

const ISSUER: &str = "https://login.shop.example";
const AUDIENCE: &str = "orders-api";

fn main() -> ExitCode {
    let mut keep = false;
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--keep" => keep = true,
            "--help" | "-h" => {
                print!("{USAGE}");
                return ExitCode::SUCCESS;
            }
            other => {
                eprintln!("error: unknown argument `{other}`\n\n{USAGE}");
                return ExitCode::from(2);
            }
        }
    }
    match end_on_signal().and_then(|()| demo(keep)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// A signal ends the demo together with what it started.
fn end_on_signal() -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = runtime()?;
    let (mut interrupt, mut terminate) = {
        let _context = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        process::kill_all();
        println!("\nEverything has ended.");
        // With `--keep` a signal is how it ends; before that it is an interruption.
        std::process::exit(if SHOWN.load(Ordering::Relaxed) { 0 } else { 130 });
    });
    Ok(())
}

fn runtime() -> anyhow::Result<Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// What runs operators here, as the doctor names it.
fn engine(policy: &Path) -> anyhow::Result<String> {
    let portcullis = places::portcullis().map_err(|error| anyhow!(error))?;
    let output = Command::new(portcullis).args(["doctor", "--json", "--config"]).arg(policy).output()?;
    let said: Value =
        serde_json::from_slice(&output.stdout).with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
    Ok(said["engine"].as_str().unwrap_or("an engine that the doctor does not name").to_owned())
}

fn demo(keep: bool) -> anyhow::Result<()> {
    let key = SigningKey::generate_es256("demo")?;
    let stranger = SigningKey::generate_es256("demo")?;
    let api = start_api()?;
    let policy = write_policy(api, &key)?;
    let sockets = places::workspace().join(".portcullis/demo/sockets");
    let started = |what: &str, address: SocketAddr| println!("  {what:<16} http://{address}");
    println!("Starting");
    started("orders API", api);
    let host = Server::portcullis(&policy).map_err(|error| anyhow!(error))?;
    started("portcullis serve", host.address());
    let _operators = start_operators(&policy, &sockets).map_err(|error| anyhow!(error))?;
    println!("  {:<16} {}, for Envoy", "operators run", shown(&sockets));
    let envoy = Server::envoy_with(&policy, &["--operator-sockets", &sockets.display().to_string()])
        .map_err(|error| anyhow!(error))?;
    started("Envoy", envoy.address());
    println!(
        "\nBoth run the same filter, {}, and the same policy:",
        shown(&places::filter("jwt-auth").map_err(|e| anyhow!(e))?)
    );
    println!("  {}\n  (from docs/examples/demo, with this run's addresses and keys)", shown(&policy));
    println!(
        "`notes` and `stock` are TypeScript (docs/examples/operators), each in a locked process of its own, run by"
    );
    println!("  {}\n", engine(&policy)?);

    let attempts = attempts(&key, &stranger)?;
    let mut table = Table::default();
    let client = runtime()?;
    for attempt in &attempts {
        let here = client.block_on(attempt.send(host.address())).context("portcullis serve gave no answer")?;
        let there = client.block_on(attempt.send(envoy.address())).context("Envoy gave no answer")?;
        table.add(attempt, &here, &there);
    }
    print!("{table}");
    if table.mistakes > 0 {
        bail!(
            "{} of {} requests came out otherwise than they should\n\nlog of portcullis:\n{}\nlog of Envoy:\n{}",
            table.mistakes,
            attempts.len(),
            host.log(),
            envoy.log()
        );
    }
    println!(
        "\n{} requests, the same answer from both hosts every time. From the log of the operators:\n",
        attempts.len()
    );
    for line in told(&host.log()) {
        println!("  {line}");
    }

    if !keep {
        println!(
            "\nTry it yourself: `cargo xtask demo --keep` leaves both running and prints curl commands with a good token."
        );
        return Ok(());
    }
    let token = token(&key, json!({}), "orders:read orders:write", 3600)?;
    println!("\nTry it yourself, with a token that is good for an hour:\n");
    println!("  TOKEN={token}\n");
    println!("  curl -i http://{}/orders", host.address());
    println!("  curl -i -H \"authorization: Bearer $TOKEN\" http://{}/orders/1001", host.address());
    println!("  curl -i -H \"authorization: Bearer $TOKEN\" http://{}/orders/1001   # through Envoy", envoy.address());
    println!("  curl -i -H \"authorization: Bearer $TOKEN\" http://{}/stock/lamp", host.address());
    println!("  curl -s http://{}/metrics | grep -E 'jwt_auth|operator'", host.admin());
    println!("  {} operators status", shown(&places::portcullis().map_err(|error| anyhow!(error))?));
    println!("\nEverything keeps running. Ctrl-C ends it.");
    SHOWN.store(true, Ordering::Relaxed);
    loop {
        std::thread::park();
    }
}

/// The operators once more, on sockets, with a store of their own: two hosts cannot share one.
fn start_operators(policy: &Path, sockets: &Path) -> Result<Process, String> {
    let text = std::fs::read_to_string(policy).map_err(|error| error.to_string())?;
    let own = policy.with_file_name("operators.yaml");
    let apart = text.replace("storage: ", "storage: for-envoy-");
    std::fs::write(&own, apart).map_err(|error| error.to_string())?;
    let mut command = Command::new(places::portcullis()?);
    command.args(["operators", "run"]).arg(&own).arg("--sockets").arg(sockets);
    let process = Process::start("portcullis operators run", &mut command)?;
    process.wait_for(|line| line.contains("operator `stock` on ").then_some(()))?;
    Ok(process)
}

/// What operators were refused and why their processes ended, without times.
fn told(log: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for line in log.lines().filter(|line| line.contains("refused: needs") || line.contains("the process ended: ")) {
        let said = line.split_once("INFO ").map_or(line, |(_, said)| said);
        let (text, rest) = said.split_once(" operator=").unwrap_or((said, ""));
        lines.push(format!("{}: {text}", rest.split(' ').next().unwrap_or_default()));
    }
    lines
}

/// The committed example with this run's addresses and keys, in a folder that git ignores.
fn write_policy(api: SocketAddr, key: &SigningKey) -> anyhow::Result<PathBuf> {
    let from = places::workspace().join("docs/examples/demo");
    let folder = places::workspace().join(".portcullis/demo");
    std::fs::create_dir_all(&folder).with_context(|| format!("`{}` cannot be made", folder.display()))?;
    let read = |name: &str| {
        let file = from.join(name);
        std::fs::read_to_string(&file).with_context(|| format!("`{}` cannot be read", file.display()))
    };
    let filter = places::filter("jwt-auth").map_err(|error| anyhow!(error))?;
    let mut policy = read("portcullis.yaml")?;
    let replacements = [
        ("\"127.0.0.1:8080\"", "\"127.0.0.1:0\"".to_owned()),
        ("\"127.0.0.1:9901\"", "\"127.0.0.1:0\"".to_owned()),
        ("../../../target/filters/jwt-auth.wasm", Value::from(filter.display().to_string()).to_string()),
    ];
    for (committed, own) in replacements {
        if !policy.contains(committed) {
            bail!("docs/examples/demo/portcullis.yaml does not hold `{committed}`, which the demo replaces");
        }
        policy = policy.replacen(committed, &own, 1);
    }
    let operators = places::workspace().join("docs/examples/operators").display().to_string();
    policy = policy
        .replace("127.0.0.1:9000", &api.to_string())
        .replace("../operators", &operators)
        .replace("../../../.portcullis/demo/kv", "kv");
    std::fs::write(folder.join("warehouse.txt"), format!("http://{api}\n"))?;
    let mut jwt: Value = serde_json::from_str(&read("jwt.json")?).context("docs/examples/demo/jwt.json")?;
    let keys = jwt
        .pointer_mut("/providers/shop/jwks_inline/keys")
        .context("docs/examples/demo/jwt.json has no `providers.shop.jwks_inline.keys`")?;
    *keys = json!([key.public_jwk()]);
    std::fs::write(folder.join("jwt.json"), format!("{jwt:#}\n"))?;
    let file = folder.join("portcullis.yaml");
    std::fs::write(&file, policy)?;
    Ok(file)
}

/// A request that somebody might send, and what must come of it.
struct Attempt {
    what: &'static str,
    method: Method,
    path: &'static str,
    token: Option<String>,
    expected: u16,
}

/// A search that never ends: the text has no `!`, and there are too many ways to find that out.
const ENDLESS_SEARCH: &str = "/stock/like/(.+)+!";
/// Where clouds keep what a machine may know of itself, credentials among it.
const METADATA: &str = "/stock/lamp?from=http://169.254.169.254";

fn attempts(key: &SigningKey, stranger: &SigningKey) -> anyhow::Result<Vec<Attempt>> {
    let attempt =
        |what, method: &Method, path, token, expected| Attempt { what, method: method.clone(), path, token, expected };
    let read = |change: Value, lifetime| token(key, change, "orders:read", lifetime).map(Some);
    let (get, post, put) = (&Method::GET, &Method::POST, &Method::PUT);
    let unsigned = {
        use base64::Engine as _;
        let part = |value: Value| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(value.to_string());
        let header = part(json!({ "alg": "none", "typ": "at+jwt" }));
        Some(format!("{header}.{}.", part(claims(json!({}), "orders:read", 300))))
    };
    Ok(vec![
        attempt("no token", get, "/orders", None, 401),
        attempt("not a token", get, "/orders", Some("let-me-in".to_owned()), 401),
        attempt("unsigned (alg: none)", get, "/orders", unsigned, 401),
        attempt("signed by a stranger", get, "/orders", Some(token(stranger, json!({}), "orders:read", 300)?), 401),
        attempt("expired", get, "/orders", read(json!({}), -300)?, 401),
        attempt("wrong audience", get, "/orders", read(json!({ "aud": "billing-api" }), 300)?, 401),
        attempt("wrong scope", get, "/orders", Some(token(key, json!({}), "catalogue:read", 300)?), 403),
        attempt("reader tries to write", post, "/orders", read(json!({}), 300)?, 403),
        attempt("good, list", get, "/orders", read(json!({}), 300)?, 200),
        attempt("good, one order", get, "/orders/1001", read(json!({}), 300)?, 200),
        attempt("good, new order", post, "/orders", Some(token(key, json!({}), "orders:write", 300)?), 201),
        attempt("health check", get, "/healthz", None, 200),
        attempt("no such route", get, "/admin", None, 404),
        attempt("operator, no token", get, "/notes", None, 401),
        attempt("operator, keeps a note", put, "/notes/first", read(json!({}), 300)?, 201),
        attempt("operator, reads it", get, "/notes/first", read(json!({}), 300)?, 200),
        attempt("operator, with a secret", get, "/stock/lamp", read(json!({}), 300)?, 200),
        attempt("operator, tricked (SSRF)", get, METADATA, read(json!({}), 300)?, 500),
        attempt("operator, tricked (ReDoS)", get, ENDLESS_SEARCH, read(json!({}), 300)?, 503),
    ])
}

fn claims(change: Value, scope: &str, lifetime: i64) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let mut claims = json!({
        "iss": ISSUER,
        "aud": AUDIENCE,
        "sub": "alice",
        "scope": scope,
        "exp": now.saturating_add_signed(lifetime),
    });
    if let (Some(claims), Value::Object(change)) = (claims.as_object_mut(), change) {
        claims.extend(change);
    }
    claims
}

fn token(key: &SigningKey, change: Value, scope: &str, lifetime: i64) -> anyhow::Result<String> {
    let header = json!({ "alg": "ES256", "typ": "at+jwt", "kid": "demo" });
    Ok(key.token(&header, &claims(change, scope, lifetime))?)
}

/// What came back: status, reason id if it was a denial, and the body's first words if it was not.
struct Answer {
    status: u16,
    reason: Option<String>,
}

impl Attempt {
    async fn send(&self, address: SocketAddr) -> anyhow::Result<Answer> {
        let stream = tokio::net::TcpStream::connect(address).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let mut request = Request::builder().method(&self.method).uri(self.path).header("host", "api.shop.example");
        if let Some(token) = &self.token {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        let body = if matches!(self.method, Method::POST | Method::PUT) { r#"{"item":"lamp"}"# } else { "" };
        let request = request.body(Full::new(Bytes::from(body)))?;
        let exchange = async {
            let response = sender.send_request(request).await?;
            let status = response.status().as_u16();
            let body = response.into_body().collect().await?.to_bytes();
            Ok::<_, hyper::Error>((status, body))
        };
        let together = async {
            tokio::pin!(connection);
            tokio::pin!(exchange);
            tokio::select! {
                answer = &mut exchange => answer,
                ended = &mut connection => {
                    ended?;
                    exchange.await
                }
            }
        };
        let (status, body) = tokio::time::timeout(process::DEADLINE, together).await??;
        let problem: Value = serde_json::from_slice(&body).unwrap_or_default();
        Ok(Answer { status, reason: problem["reason"].as_str().map(str::to_owned) })
    }
}

/// The answers side by side.
#[derive(Default)]
struct Table {
    rows: Vec<[String; 6]>,
    mistakes: usize,
}

impl Table {
    fn add(&mut self, attempt: &Attempt, here: &Answer, there: &Answer) {
        let agree = here.status == there.status && here.reason == there.reason;
        let good = agree && here.status == attempt.expected;
        self.mistakes += usize::from(!good);
        let reason = |answer: &Answer| answer.reason.clone().unwrap_or_else(|| "-".to_owned());
        self.rows.push([
            attempt.what.to_owned(),
            format!("{} {}", attempt.method, attempt.path),
            here.status.to_string(),
            there.status.to_string(),
            if here.reason == there.reason { reason(here) } else { format!("{} / {}", reason(here), reason(there)) },
            if good { String::new() } else { format!("<- must be {}, in both", attempt.expected) },
        ]);
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let head = ["", "request", "portcullis", "Envoy", "reason", ""].map(str::to_owned);
        let widths: Vec<usize> = (0..head.len())
            .map(|column| {
                let cells = std::iter::once(&head).chain(&self.rows).filter_map(|row| row.get(column));
                cells.map(|cell| cell.chars().count()).max().unwrap_or_default()
            })
            .collect();
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        for (index, row) in std::iter::once(&head).chain(&self.rows).enumerate() {
            let mut line = String::from("  ");
            for (cell, width) in row.iter().zip(&widths) {
                let text = format!("{cell:<width$}  ");
                let paint = match cell.as_str() {
                    _ if !colour || index == 0 => None,
                    "200" | "201" => Some("32"),
                    "401" | "403" | "404" | "500" | "503" => Some("33"),
                    _ if cell.starts_with("<-") => Some("31"),
                    _ => None,
                };
                match paint {
                    Some(paint) => line.push_str(&format!("\u{1b}[{paint}m{text}\u{1b}[0m")),
                    None => line.push_str(&text),
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// A path relative to the workspace, where it lies in there.
fn shown(path: &Path) -> String {
    path.strip_prefix(places::workspace()).unwrap_or(path).display().to_string()
}

/// The API that is being protected. It ends with the process.
fn start_api() -> anyhow::Result<SocketAddr> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").context("the orders API cannot listen")?;
    listener.set_nonblocking(true)?;
    let address = listener.local_addr()?;
    let runtime = runtime()?;
    std::thread::spawn(move || {
        runtime.block_on(async move {
            let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
            while let Ok((stream, _)) = listener.accept().await {
                let service =
                    hyper::service::service_fn(
                        |request| async move { Ok::<_, std::convert::Infallible>(orders(&request)) },
                    );
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
    });
    Ok(address)
}

/// What the key in docs/examples/operators is good for: the host puts it in, and the operator never sees it.
const WAREHOUSE_KEY: &str = include_str!("../../../docs/examples/operators/warehouse-key");

/// What the API answers. It knows who asks from `x-portcullis-sub`, and never sees the token.
fn orders(request: &Request<hyper::body::Incoming>) -> Response<Full<Bytes>> {
    let orders = [(1001, "lamp"), (1002, "chair")];
    let customer = request.headers().get("x-portcullis-sub").and_then(|sub| sub.to_str().ok()).unwrap_or("nobody");
    let one = request.uri().path().strip_prefix("/orders/").and_then(|id| id.parse::<u32>().ok());
    let (status, body) = match (request.method(), request.uri().path(), one) {
        (&Method::GET, "/healthz", _) => (200, json!({ "ok": true })),
        (&Method::GET, "/warehouse/lamp", _) => {
            let key = request.headers().get("authorization").and_then(|key| key.to_str().ok());
            match key == Some(&format!("Bearer {}", WAREHOUSE_KEY.trim())) {
                true => (200, json!({ "item": "lamp", "left": 7 })),
                false => (401, json!({ "error": "who are you?" })),
            }
        }
        (&Method::GET, "/orders", _) => {
            let list: Vec<Value> = orders.iter().map(|(id, item)| json!({ "id": id, "item": item })).collect();
            (200, json!({ "customer": customer, "orders": list }))
        }
        (&Method::POST, "/orders", _) => (201, json!({ "customer": customer, "id": 1003 })),
        (&Method::GET, _, Some(wanted)) => match orders.iter().find(|(id, _)| *id == wanted) {
            Some((id, item)) => (200, json!({ "customer": customer, "id": id, "item": item })),
            None => (404, json!({ "error": "no such order" })),
        },
        _ => (404, json!({ "error": "nothing here" })),
    };
    let mut response = Response::new(Full::new(Bytes::from(format!("{body}\n"))));
    *response.status_mut() = hyper::StatusCode::from_u16(status).unwrap_or_default();
    response.headers_mut().insert("content-type", hyper::header::HeaderValue::from_static("application/json"));
    response
}
