//! Operators beside a bare, unconfined `deno serve` of the same handler, in one run.
//!
//! `cargo build --release --bin portcullis --bench operators && cargo bench --bench operators` (built in one call, so that nothing
//! is compiled twice); what is compared alternates, so that a busy machine is equally busy for all, and the ratios say more than the
//! times. Arguments choose parts: `start`, `load`, `many`, `loop`.
#![allow(missing_docs, reason = "a program")]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use portcullis_operators::engine::Engine;
use portcullis_operators::engine::deno::Deno;
use portcullis_operators::engine::runner::Runner;
use portcullis_operators::jail::Launcher;
use portcullis_operators::{Doctor, Front, OperatorConfig, Operators, Settings};
use tokio::runtime::Runtime;

/// `/` does as good as nothing, so that all else shows; `/signed` does what a small API does.
const HANDLER: &str = r#"
const key = crypto.subtle.importKey("raw", new Uint8Array(32), { name: "HMAC", hash: "SHA-256" }, false, ["sign"]);
export default {
  async fetch(request) {
    const url = new URL(request.url);
    if (url.pathname !== "/signed") return Response.json({ hello: url.searchParams.get("name") ?? "world" });
    const rows = Array.from({ length: 50 }, (_, id) => ({ id, name: "item " + id, price: id * 1.5 }));
    const text = JSON.stringify(rows);
    const mac = new Uint8Array(await crypto.subtle.sign("HMAC", await key, new TextEncoder().encode(text)));
    const signature = Array.from(mac, (byte) => byte.toString(16).padStart(2, "0")).join("");
    return new Response(text, { headers: { "content-type": "application/json", "x-signature": signature } });
  },
};
"#;
const PATHS: [(&str, &str); 2] = [("next to no work", "/?name=bench"), ("50 rows of JSON and their HMAC", "/signed")];
const ROUNDS: usize = 15;
const LOAD_ROUNDS: usize = 5;
const LOAD: Duration = Duration::from_secs(2);
const CONNECTIONS: usize = 16;
/// The CPU time that a request has before its loop must be ended.
const LOOP_LIMIT: Duration = Duration::from_millis(200);
const LOOPS: &str =
    "export default { fetch(request) { if (request.url.endsWith('/loop')) for (;;); return new Response('ok'); } };";

struct Bare {
    child: Child,
    socket: PathBuf,
}

impl Bare {
    fn spawn(deno: &Path, folder: &Path, number: usize) -> Self {
        let socket = folder.join(format!("bare-{number}.sock"));
        let _ = std::fs::remove_file(&socket);
        let child = Command::new(deno)
            .args(["serve", "-A", "--quiet", "--no-config", "--no-lock"])
            .arg(folder.join("bare.js"))
            .env_clear()
            .env("DENO_DIR", folder.join("deno-dir"))
            .env("DENO_NO_UPDATE_CHECK", "1")
            .env("DENO_SERVE_ADDRESS", format!("unix:{}", socket.display()))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("deno starts");
        Self { child, socket }
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `portcullis serve` with one operator and nothing else.
struct Proxy {
    child: Child,
    address: SocketAddr,
}

impl Proxy {
    fn spawn(binary: &Path, folder: &Path, engine: &str, workers: usize) -> Self {
        let own = folder.join(format!("proxy-{engine}-{workers}"));
        std::fs::create_dir_all(&own).expect("a folder");
        std::fs::write(own.join("main.js"), HANDLER).expect("a file");
        std::fs::write(
            own.join("portcullis.yaml"),
            format!(
                "version: 1\nworkers: {workers}\nlogging: {{ level: warn }}\n\
                 listeners: [{{ name: public, address: \"127.0.0.1:0\" }}]\n\
                 operator_host: {{ run_folder: run, engine: {engine} }}\n\
                 operators: {{ load: {{ entry: main.js, replicas: {{ max: 1 }} }} }}\nroutes: [{{ name: all, operator: load }}]\n"
            ),
        )
        .expect("a file");
        let ready = own.join("ready.json");
        let child = Command::new(binary)
            .arg("serve")
            .arg(own.join("portcullis.yaml"))
            .arg("--ready-file")
            .arg(&ready)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .expect("portcullis starts");
        let deadline = Instant::now() + Duration::from_secs(30);
        while !ready.exists() {
            assert!(Instant::now() < deadline, "portcullis does not get ready");
            std::thread::sleep(Duration::from_millis(5));
        }
        let ready: serde_json::Value = serde_json::from_slice(&std::fs::read(&ready).expect("a file")).expect("JSON");
        let address = ready["listeners"]["public"].as_str().and_then(|text| text.parse().ok()).expect("an address");
        Self { child, address }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The binary that was built in the same profile as this program.
fn portcullis() -> PathBuf {
    let beside = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.parent()?.join("portcullis")));
    let path = std::env::var_os("PORTCULLIS_BIN").map(PathBuf::from).or(beside).unwrap_or_default();
    assert!(
        path.is_file(),
        "there is no `{}`: run `cargo build --release --bin portcullis --bench operators`",
        path.display()
    );
    path
}

fn request(path: &str) -> Request<Full<Bytes>> {
    Request::get(path).header("host", "api.example.com").body(Full::default()).expect("a valid request")
}

/// Tries until the socket answers with 200.
async fn first_answer(socket: &Path) {
    loop {
        if let Ok(stream) = tokio::net::UnixStream::connect(socket).await {
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("a handshake");
            tokio::spawn(connection);
            let response = sender.send_request(request("/")).await.expect("an answer");
            assert_eq!(response.status(), 200);
            response.into_body().collect().await.expect("a body");
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn settings(folder: &Path, prewarmed: usize) -> Settings {
    Settings {
        run_folder: folder.to_owned(),
        prewarmed,
        launcher: Launcher { command: vec![env!("CARGO_BIN_EXE_portcullis-jail").into()] },
        ..Settings::default()
    }
}

fn operators(folder: &Path, settings: &Settings, names: &[String]) -> Vec<portcullis_operators::Operator> {
    let compile =
        |name: &String| OperatorConfig::new("main.js").compile(name, folder, settings).expect("a configuration");
    names.iter().map(compile).collect()
}

/// From nothing but a running host to the first answer of a new operator: its files are read and bundled, too.
async fn start(host: &Operators, folder: &Path, settings: &Settings, name: &str) -> f64 {
    let all = operators(folder, settings, &[name.to_owned()]);
    let started = Instant::now();
    host.apply(all).await.expect("it is served");
    let request = Request::get("http://api.example.com/?name=bench").body(Full::<Bytes>::default()).expect("a request");
    let response = host.call(name, request).await.expect("an answer");
    response.into_body().collect().await.expect("a body");
    milliseconds(started.elapsed())
}

/// From a sleeping operator to its next answer: its code is known, its process is not there.
async fn wake(host: &Operators, name: &str) -> f64 {
    while host.status().await.iter().any(|one| one.operator.as_deref() == Some(name)) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let started = Instant::now();
    let request = Request::get("http://api.example.com/?name=bench").body(Full::<Bytes>::default()).expect("a request");
    let response = host.call(name, request).await.expect("an answer");
    response.into_body().collect().await.expect("a body");
    milliseconds(started.elapsed())
}

/// Where requests go.
#[derive(Clone)]
enum Target {
    Socket(PathBuf),
    Address(SocketAddr),
}

/// Requests a second over kept connections, by clients on one thread.
fn load(target: &Target, path: &'static str) -> f64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let count = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    runtime.block_on(async {
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..CONNECTIONS {
            let (target, count) = (target.clone(), Arc::clone(&count));
            clients.spawn(async move {
                match target {
                    Target::Socket(socket) => {
                        let stream = tokio::net::UnixStream::connect(socket).await.expect("a connection");
                        client(TokioIo::new(stream), path, started, &count).await;
                    }
                    Target::Address(address) => {
                        let stream = tokio::net::TcpStream::connect(address).await.expect("a connection");
                        stream.set_nodelay(true).expect("a socket");
                        client(TokioIo::new(stream), path, started, &count).await;
                    }
                }
            });
        }
        while clients.join_next().await.is_some() {}
    });
    rate(&count, started)
}

async fn client<S>(stream: S, path: &str, started: Instant, count: &AtomicU64)
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.expect("a handshake");
    tokio::spawn(connection);
    while started.elapsed() < LOAD {
        sender.ready().await.expect("still there");
        let response = sender.send_request(request(path)).await.expect("an answer");
        assert_eq!(response.status(), 200);
        response.into_body().collect().await.expect("a body");
        count.fetch_add(1, Ordering::Relaxed);
    }
}

/// Requests a second through `Operators::call`, as a worker of the proxy makes them.
fn load_call(host: &Operators, name: &str, path: &str) -> f64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let count = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    runtime.block_on(async {
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..CONNECTIONS {
            let (host, count, name) = (host.clone(), Arc::clone(&count), name.to_owned());
            let address = format!("http://api.example.com{path}");
            clients.spawn(async move {
                while started.elapsed() < LOAD {
                    let request = Request::get(address.as_str()).body(Full::<Bytes>::default()).expect("a request");
                    let response = host.call(&name, request).await.expect("an answer");
                    response.into_body().collect().await.expect("a body");
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        while clients.join_next().await.is_some() {}
    });
    rate(&count, started)
}

#[expect(clippy::cast_precision_loss, reason = "a count of requests")]
fn rate(count: &AtomicU64, started: Instant) -> f64 {
    count.load(Ordering::Relaxed) as f64 / started.elapsed().as_secs_f64()
}

fn pss_kibibytes(pid: i32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let line = text.lines().find(|line| line.starts_with("Pss:")).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).unwrap_or(f64::NAN)
}

/// CPU time that a process's threads have used.
fn cpu_milliseconds(pid: i32) -> f64 {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let nanoseconds = threads.filter_map(|thread| {
        let text = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        text.split(' ').next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e6
}

/// Clock ticks (10 ms) that a process has used.
fn ticks(pid: i32) -> u64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = text.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let field = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or(0);
    field(11) + field(12)
}

async fn pids(host: &Operators) -> Vec<i32> {
    host.status().await.into_iter().filter(|one| one.operator.is_some()).map(|one| one.pid).collect()
}

/// One row of a table: the middle of several values, and how it compares.
#[expect(clippy::print_stdout, reason = "a program")]
fn row(name: &str, values: &mut [f64], base: f64) {
    println!("{}  {:5.2}x bare", spread(name, values), median(values) / base);
}

/// The middle of several values, and the ends.
fn spread(name: &str, values: &mut [f64]) -> String {
    let middle = median(values);
    let (least, most) = (values.first().copied().unwrap_or(0.0), values.last().copied().unwrap_or(0.0));
    format!("{name:<44} median {middle:9.2}  min {least:9.2}  max {most:9.2}")
}

#[expect(clippy::print_stdout, reason = "a program")]
fn main() {
    // `cargo test` builds and runs benches, too; there is nothing to measure then.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let parts: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let wanted = |part: &str| parts.is_empty() || parts.iter().any(|wanted| wanted == part);
    let deno = Deno::locate().unwrap_or_else(|error| panic!("{error}"));
    let mut engines: Vec<(&str, Arc<dyn Engine>)> = vec![("deno", Arc::new(deno.clone()))];
    match Runner::locate() {
        Ok(runner) => engines.push(("runner", Arc::new(runner))),
        Err(error) => println!("without the runner: {error}"),
    }
    for (_, engine) in &engines {
        println!("engine: {} ({})", engine.name(), engine.program().display());
    }
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path();
    std::fs::write(path.join("main.js"), HANDLER).expect("a file");
    std::fs::write(path.join("bare.js"), HANDLER).expect("a file");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let load_average = || std::fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned();
    println!("load of the machine: {}\n", load_average());
    if wanted("start") {
        first_answers(&runtime, path, &deno, &engines);
    }
    if wanted("load") {
        requests_per_second(&runtime, path, &deno, &engines);
    }
    if wanted("many") {
        let mut base = None;
        for (name, engine) in &engines {
            let mean = ten_at_once(&runtime, path, name, engine);
            println!("{name}: {:.2}x of deno", mean / *base.get_or_insert(mean));
        }
    }
    if wanted("loop") {
        println!("\n# a loop under a limit of {LOOP_LIMIT:?} of CPU time, {ROUNDS} rounds, ms");
        for (name, engine) in &engines {
            loops(&runtime, path, name, engine);
        }
    }
    println!("\nload of the machine: {}", load_average());
}

/// The hosts with which one engine's first answers are measured, and the times.
struct Starts {
    name: &'static str,
    engine: Arc<dyn Engine>,
    cold: Operators,
    warm: Operators,
    /// Without and with a process that is kept ready.
    sleepy: [Operators; 2],
    times: [Vec<f64>; 6],
}

#[expect(clippy::print_stdout, reason = "a program")]
fn first_answers(runtime: &Runtime, path: &Path, deno: &Deno, engines: &[(&'static str, Arc<dyn Engine>)]) {
    println!("# first answer, ms ({ROUNDS} rounds, alternating)");
    let (cold_settings, warm_settings) = (settings(path, 0), settings(path, 1));
    let host = |settings: &Settings, engine: &Arc<dyn Engine>| {
        Operators::start(settings.clone(), Arc::clone(engine)).expect("a host")
    };
    let mut all: Vec<Starts> = engines
        .iter()
        .map(|(name, engine)| Starts {
            name,
            engine: Arc::clone(engine),
            cold: host(&cold_settings, engine),
            warm: host(&warm_settings, engine),
            sleepy: [&cold_settings, &warm_settings].map(|settings| host(settings, engine)),
            times: Default::default(),
        })
        .collect();
    let mut bare_times = Vec::new();
    runtime.block_on(async {
        // Fills the bare process's cache, and makes the hosts keep a process ready.
        let first = Bare::spawn(deno.path(), path, 0);
        first_answer(&first.socket).await;
        drop(first);
        for of in &all {
            start(&of.warm, path, &warm_settings, "first").await;
            let mut config = OperatorConfig::new("main.js");
            config.replicas.min = 0;
            config.replicas.idle = Duration::from_millis(20);
            for (sleepy, settings) in of.sleepy.iter().zip([&cold_settings, &warm_settings]) {
                let operator = config.compile("sleepy", path, settings).expect("a configuration");
                sleepy.apply(vec![operator]).await.expect("it is served");
            }
        }
        for round in 0..ROUNDS {
            let started = Instant::now();
            let bare = Bare::spawn(deno.path(), path, round + 1);
            first_answer(&bare.socket).await;
            bare_times.push(milliseconds(started.elapsed()));
            drop(bare);
            for of in &mut all {
                of.times[0].push(start(&of.cold, path, &cold_settings, &format!("cold-{round}")).await);
                let [cold_sleepy, warm_sleepy] = &of.sleepy;
                for host in [&of.warm, warm_sleepy] {
                    while host.status().await.iter().all(|one| one.operator.is_some()) {
                        tokio::time::sleep(Duration::from_millis(5)).await;
                    }
                }
                while !cold_sleepy.status().await.is_empty() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                tokio::time::sleep(Duration::from_millis(300)).await;
                of.times[1].push(wake(cold_sleepy, "sleepy").await);
                of.times[2].push(start(&of.warm, path, &warm_settings, &format!("warm-{round}")).await);
                of.times[3].push(wake(warm_sleepy, "sleepy").await);
            }
        }
    });
    for _ in 0..ROUNDS {
        for of in &mut all {
            let doctor = Doctor::examine(&cold_settings, &*of.engine).expect("a look");
            #[expect(clippy::cast_precision_loss, reason = "microseconds")]
            let milliseconds = |microseconds: u64| microseconds as f64 / 1000.0;
            of.times[4].push(milliseconds(doctor.setup.total_microseconds()));
            of.times[5].push(milliseconds(doctor.setup.microseconds));
        }
    }
    let bare_cold = median(&mut bare_times);
    row("bare `deno serve`, warm cache", &mut bare_times, bare_cold);
    let rows = [
        "new operator, cold, confined",
        "sleeping operator, cold, confined",
        "new operator, prewarmed process",
        "sleeping operator, prewarmed process",
        "isolation set up",
        "isolation left to set up then",
    ];
    for of in &mut all {
        for (what, times) in rows.iter().zip(&mut of.times) {
            row(&format!("{}: {what}", of.name), times, bare_cold);
        }
    }
    runtime.block_on(async {
        for of in all {
            for host in [of.cold, of.warm].into_iter().chain(of.sleepy) {
                host.stop().await;
            }
        }
    });
}

/// Requests through the library alone: over a socket of `operators run`'s kind, and called by the client itself.
struct Direct {
    name: &'static str,
    host: Operators,
    socket: PathBuf,
    proxies: [Proxy; 2],
}

#[expect(clippy::print_stdout, reason = "a program")]
fn requests_per_second(runtime: &Runtime, path: &Path, deno: &Deno, engines: &[(&'static str, Arc<dyn Engine>)]) {
    let settings = settings(path, 0);
    let bare = Bare::spawn(deno.path(), path, 1000);
    runtime.block_on(first_answer(&bare.socket));
    let binary = portcullis();
    let all: Vec<Direct> = engines
        .iter()
        .map(|(name, engine)| {
            let host = Operators::start(settings.clone(), Arc::clone(engine)).expect("a host");
            runtime.block_on(start(&host, path, &settings, "load"));
            let socket = serve_on_socket(&host, path.join(format!("front-{name}")));
            let proxies = [1, 2].map(|workers| Proxy::spawn(&binary, path, name, workers));
            Direct { name, host, socket, proxies }
        })
        .collect();
    let mut targets = vec![("bare process, over its socket".to_owned(), Ok(Target::Socket(bare.socket.clone())))];
    for of in &all {
        let name = of.name;
        for (proxy, workers) in of.proxies.iter().zip(["1 worker", "2 workers"]) {
            targets.push((format!("{name}: portcullis serve, {workers}"), Ok(Target::Address(proxy.address))));
        }
        targets.push((format!("{name}: operators run, over its socket"), Ok(Target::Socket(of.socket.clone()))));
        targets.push((format!("{name}: called in the client's process"), Err(&of.host)));
    }
    for (what, path) in PATHS {
        println!(
            "\n# requests per second, {what}, {CONNECTIONS} connections, {LOAD_ROUNDS} alternating rounds of {LOAD:?}"
        );
        let mut rates: Vec<Vec<f64>> = targets.iter().map(|_| Vec::new()).collect();
        for _ in 0..LOAD_ROUNDS {
            for ((_, target), rates) in targets.iter().zip(&mut rates) {
                rates.push(match target {
                    Ok(target) => load(target, path),
                    Err(host) => load_call(host, "load", path),
                });
            }
        }
        let bare_rate = rates.first_mut().map_or(f64::NAN, |rates| median(rates));
        for ((name, _), rates) in targets.iter().zip(&mut rates) {
            row(name, rates, bare_rate);
        }
        // The same way to either engine, where there are both.
        for (at, (name, _)) in targets.iter().enumerate() {
            let Some(way) = name.strip_prefix("runner") else { continue };
            let on_deno = targets.iter().position(|(other, _)| other.strip_prefix("deno") == Some(way));
            if let (Some(runner), Some(deno)) = (rates.get(at), on_deno.and_then(|deno| rates.get(deno))) {
                println!("{name:<44} {:.2}x of deno", median(&mut runner.clone()) / median(&mut deno.clone()));
            }
        }
    }
    for of in &all {
        runtime.block_on(of.host.stop());
    }
}

/// On a thread of its own, as another process would.
fn serve_on_socket(host: &Operators, folder: PathBuf) -> PathBuf {
    let mut front = Front::new(folder, &[]).expect("a folder");
    let socket = front.socket("load");
    let host = host.clone();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            front.serve(&host, &["load".to_owned()]).expect("it serves");
            std::future::pending::<()>().await;
        });
    });
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    socket
}

/// How long after its limit a loop is answered, how long the next request takes then, and whether in the same process.
#[expect(clippy::print_stdout, reason = "a program")]
fn loops(runtime: &Runtime, path: &Path, name: &str, engine: &Arc<dyn Engine>) {
    let settings = settings(path, 1);
    let folder = path.join("loops");
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join("main.js"), LOOPS).expect("a file");
    let host = Operators::start(settings.clone(), Arc::clone(engine)).expect("a host");
    let mut config = OperatorConfig::new("main.js");
    config.limits.cpu = LOOP_LIMIT;
    let operator = config.compile("loops", &folder, &settings).expect("a configuration");
    let get = async |path: &str| {
        let request = Request::get(format!("http://api.example.com{path}")).body(Full::<Bytes>::default());
        let started = Instant::now();
        let answer = host.call("loops", request.expect("a request")).await;
        if let Ok(answer) = answer {
            answer.into_body().collect().await.expect("a body");
            return (Ok(()), milliseconds(started.elapsed()));
        }
        (Err(()), milliseconds(started.elapsed()))
    };
    runtime.block_on(async {
        host.apply(vec![operator]).await.expect("it is served");
        let (mut late, mut beyond, mut next, mut processes) = (Vec::new(), Vec::new(), Vec::new(), 0);
        for _ in 0..ROUNDS {
            assert!(get("/").await.0.is_ok());
            let before = pids(&host).await;
            let used = || before.iter().map(|pid| cpu_milliseconds(*pid)).sum::<f64>();
            let used_before = used();
            let (answered, took) = get("/loop").await;
            let used = used() - used_before;
            assert!(answered.is_err(), "a loop has no answer");
            late.push(took - milliseconds(LOOP_LIMIT));
            // None of a process that is gone.
            if used > 0.0 {
                beyond.push(used - milliseconds(LOOP_LIMIT));
            }
            // A process that must be started again may be paused for; whoever asks then is refused.
            let started = Instant::now();
            while get("/").await.0.is_err() {}
            next.push(milliseconds(started.elapsed()));
            if pids(&host).await != before {
                processes += 1;
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
        // On a busy machine a loop needs longer to use its CPU time.
        println!("{}", spread(&format!("{name}: answered so long after its limit"), &mut late));
        println!("{}", spread(&format!("{name}: CPU time beyond its limit"), &mut beyond));
        println!("{}", spread(&format!("{name}: the next request"), &mut next));
        println!("{name}: {processes} new processes");
        host.stop().await;
    });
}

/// Returns their mean proportional set size.
#[expect(clippy::print_stdout, reason = "a program")]
fn ten_at_once(runtime: &Runtime, path: &Path, name: &str, engine: &Arc<dyn Engine>) -> f64 {
    println!("\n# ten operators at once on {name}");
    let settings = settings(path, 0);
    let host = Operators::start(settings.clone(), Arc::clone(engine)).expect("a host");
    let names: Vec<String> = (0..10).map(|number| format!("op-{number}")).collect();
    runtime.block_on(async {
        host.apply(operators(path, &settings, &names)).await.expect("all are served");
        for name in &names {
            let request = Request::get("http://api.example.com/").body(Full::<Bytes>::default()).expect("a request");
            host.call(name, request).await.expect("an answer").into_body().collect().await.expect("a body");
        }
        let pids = pids(&host).await;
        let pss: Vec<f64> = pids.iter().map(|pid| pss_kibibytes(*pid) / 1024.0).collect();
        let most = pss.iter().copied().fold(0.0, f64::max);
        #[expect(clippy::cast_precision_loss, reason = "ten")]
        let mean = pss.iter().sum::<f64>() / pss.len() as f64;
        println!("PSS, MiB: mean {mean:.1}, most {most:.1}, of {}", pss.len());
        tokio::time::sleep(Duration::from_secs(2)).await;
        let before: u64 = pids.iter().map(|pid| ticks(*pid)).sum();
        tokio::time::sleep(Duration::from_secs(5)).await;
        let after: u64 = pids.iter().map(|pid| ticks(*pid)).sum();
        println!("CPU of all ten, idle for 5 s: {} ticks of 10 ms", after - before);
        host.stop().await;
        mean
    })
}
