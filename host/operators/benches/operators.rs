//! Operators beside a bare, unconfined `deno serve` of the same handler, in one run.
//!
//! `cargo bench -p portcullis-operators`; rounds alternate, so that a busy machine is equally busy for both.
#![allow(missing_docs, reason = "a program")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use portcullis_operators::engine::deno::Deno;
use portcullis_operators::jail::Launcher;
use portcullis_operators::{Doctor, Front, OperatorConfig, Operators, Settings};

const HANDLER: &str = r#"
export default {
  async fetch(request) {
    const url = new URL(request.url);
    return Response.json({ hello: url.searchParams.get("name") ?? "world" });
  },
};
"#;
const ROUNDS: usize = 15;
const LOAD_ROUNDS: usize = 5;
const LOAD: Duration = Duration::from_secs(2);
const CONNECTIONS: usize = 16;

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

fn request() -> Request<Full<Bytes>> {
    Request::get("/?name=bench").header("host", "api.example.com").body(Full::default()).expect("a valid request")
}

/// Tries until the socket answers with 200.
async fn first_answer(socket: &Path) {
    loop {
        if let Ok(stream) = tokio::net::UnixStream::connect(socket).await {
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("a handshake");
            tokio::spawn(connection);
            let response = sender.send_request(request()).await.expect("an answer");
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

/// From nothing but a running host to the first answer of a new operator.
async fn start(host: &Operators, folder: &Path, settings: &Settings, name: &str) -> f64 {
    let all = operators(folder, settings, &[name.to_owned()]);
    let started = Instant::now();
    host.apply(all).await.expect("it is served");
    let request = Request::get("http://api.example.com/?name=bench").body(Full::<Bytes>::default()).expect("a request");
    let response = host.call(name, request).await.expect("an answer");
    response.into_body().collect().await.expect("a body");
    milliseconds(started.elapsed())
}

/// Requests a second over one socket, by clients on a thread of their own.
fn load_socket(socket: &Path) -> f64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let count = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    runtime.block_on(async {
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..CONNECTIONS {
            let (socket, count) = (socket.to_owned(), Arc::clone(&count));
            clients.spawn(async move {
                let stream = tokio::net::UnixStream::connect(socket).await.expect("a connection");
                let (mut sender, connection) =
                    hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.expect("a handshake");
                tokio::spawn(connection);
                while started.elapsed() < LOAD {
                    sender.ready().await.expect("still there");
                    let response = sender.send_request(request()).await.expect("an answer");
                    assert_eq!(response.status(), 200);
                    response.into_body().collect().await.expect("a body");
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        while clients.join_next().await.is_some() {}
    });
    rate(&count, started)
}

/// Requests a second through `Operators::call`, as a worker of the proxy makes them.
fn load_call(host: &Operators, name: &str) -> f64 {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let count = Arc::new(AtomicU64::new(0));
    let started = Instant::now();
    runtime.block_on(async {
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..CONNECTIONS {
            let (host, count, name) = (host.clone(), Arc::clone(&count), name.to_owned());
            clients.spawn(async move {
                while started.elapsed() < LOAD {
                    let request = Request::get("http://api.example.com/?name=bench")
                        .body(Full::<Bytes>::default())
                        .expect("a request");
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

#[expect(clippy::print_stdout, reason = "a program")]
fn main() {
    // `cargo test` builds and runs benches, too; there is nothing to measure then.
    if !std::env::args().any(|argument| argument == "--bench") {
        return;
    }
    let deno = Deno::locate().unwrap_or_else(|error| panic!("{error}"));
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path();
    std::fs::write(path.join("main.js"), HANDLER).expect("a file");
    std::fs::write(path.join("bare.js"), HANDLER).expect("a file");
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");

    println!("# first answer, ms ({ROUNDS} rounds, alternating)");
    let cold_settings = settings(path, 0);
    let warm_settings = settings(path, 1);
    let cold = Operators::start(cold_settings.clone(), Arc::new(deno.clone())).expect("a host");
    let warm = Operators::start(warm_settings.clone(), Arc::new(deno.clone())).expect("a host");
    let (mut bare_times, mut cold_times, mut warm_times, mut setup_times) = (vec![], vec![], vec![], vec![]);
    runtime.block_on(async {
        // Fills the bare process's cache, and makes the host keep a process ready.
        let first = Bare::spawn(deno.path(), path, 0);
        first_answer(&first.socket).await;
        drop(first);
        start(&warm, path, &warm_settings, "first").await;
        for round in 0..ROUNDS {
            let started = Instant::now();
            let bare = Bare::spawn(deno.path(), path, round + 1);
            first_answer(&bare.socket).await;
            bare_times.push(milliseconds(started.elapsed()));
            drop(bare);
            cold_times.push(start(&cold, path, &cold_settings, &format!("cold-{round}")).await);
            while warm.status().await.iter().all(|one| one.operator.is_some()) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
            warm_times.push(start(&warm, path, &warm_settings, &format!("warm-{round}")).await);
        }
    });
    for _ in 0..ROUNDS {
        let doctor = Doctor::examine(&cold_settings, &deno).expect("a look");
        #[expect(clippy::cast_precision_loss, reason = "microseconds")]
        setup_times.push(doctor.setup_microseconds as f64 / 1000.0);
    }
    let bare_cold = median(&mut bare_times);
    for (name, times) in [
        ("bare `deno serve`, warm cache", &mut bare_times),
        ("operator, cold, confined", &mut cold_times),
        ("operator, prewarmed", &mut warm_times),
        ("isolation set up (in the launcher)", &mut setup_times),
    ] {
        let middle = median(times);
        let (least, most) = (times.first().copied().unwrap_or(0.0), times.last().copied().unwrap_or(0.0));
        println!("{name:<38} median {middle:7.2}  min {least:7.2}  max {most:7.2}  {:5.2}x bare", middle / bare_cold);
    }
    runtime.block_on(async {
        cold.stop().await;
        warm.stop().await;
    });

    println!("\n# requests per second, {CONNECTIONS} connections, {LOAD_ROUNDS} alternating rounds of {LOAD:?}");
    let host = Operators::start(warm_settings.clone(), Arc::new(deno.clone())).expect("a host");
    runtime.block_on(start(&host, path, &warm_settings, "load"));
    let bare = Bare::spawn(deno.path(), path, 1000);
    runtime.block_on(first_answer(&bare.socket));
    let mut front = Front::new(path.join("front"), &[]).expect("a folder");
    let socket = front.socket("load");
    std::thread::spawn({
        let host = host.clone();
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async {
                front.serve(&host, &["load".to_owned()]).expect("it serves");
                std::future::pending::<()>().await;
            });
        }
    });
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(1));
    }
    runtime.block_on(first_answer(&socket));
    let (mut direct, mut through, mut called) = (vec![], vec![], vec![]);
    for _ in 0..LOAD_ROUNDS {
        direct.push(load_socket(&bare.socket));
        called.push(load_call(&host, "load"));
        through.push(load_socket(&socket));
    }
    let bare_rate = median(&mut direct);
    for (name, rates) in [
        ("bare process, over its socket", &mut direct),
        ("confined, in-process call", &mut called),
        ("confined, through a socket of the host", &mut through),
    ] {
        let middle = median(rates);
        let (least, most) = (rates.first().copied().unwrap_or(0.0), rates.last().copied().unwrap_or(0.0));
        println!("{name:<38} median {middle:7.0}  min {least:7.0}  max {most:7.0}  {:5.2}x bare", middle / bare_rate);
    }
    drop(bare);
    runtime.block_on(host.stop());

    println!("\n# ten operators at once");
    let settings = settings(path, 0);
    let host = Operators::start(settings.clone(), Arc::new(deno)).expect("a host");
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
    });
}
