//! What is between host and guest, by itself: an empty callback, each common host function, starting an instance, loading a module,
//! and how soon a loop ends.
//!
//! A host function is called a thousand times in one callback; what is shown is the time of one call, with a thousandth of the
//! callback around it.

use std::hint::black_box;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use portcullis_abi::{
    Embedder, Ending, Engine, EngineOptions, FieldMap, LogLevel, LogRecord, Module, ModuleLimits, Plugin, Shared,
    StreamInfo, Ticker, Worker, internals,
};
use portcullis_benches::guests::{self, CALLS, CALLS_ON_REQUESTS, EMPTY_TICK, OTHER_CALLS, REQUEST, SMALL};
use portcullis_code::{Cache, CacheSettings, LoadLimits, Loader, LoaderSettings};
use portcullis_tests::places;

/// An embedder that costs nothing.
struct Quiet;

impl Embedder for Quiet {
    fn log(&mut self, record: &LogRecord<'_>) {
        black_box(record.message);
    }
    fn unix_nanos(&self) -> u64 {
        1_767_225_600_000_000_000
    }
    fn monotonic(&self) -> Duration {
        Duration::from_secs(1)
    }
    fn has_upstream(&self, _name: &str) -> bool {
        false
    }
    fn log_level(&self) -> LogLevel {
        LogLevel::Info
    }
}

fn engine() -> (Engine, Ticker) {
    let engine = Engine::new(&EngineOptions::default()).expect("an engine");
    let ticker = engine.start_ticker();
    (engine, ticker)
}

fn plugin(engine: &Engine, wasm: &[u8]) -> Plugin {
    Plugin::new("bench", Module::from_bytes(engine, wasm, &ModuleLimits::default()).expect("a plugin"))
}

fn guest(engine: &Engine, code: &str) -> Plugin {
    plugin(engine, &guests::wasm(code))
}

fn worker(plugin: Plugin) -> Worker {
    Worker::start(Shared::new(), vec![Arc::new(plugin)], Box::new(Quiet)).expect("a worker")
}

fn request() -> FieldMap {
    REQUEST.into_iter().collect()
}

fn pass(worker: &mut Worker) {
    let id = worker.open(&[0], StreamInfo::default());
    worker.request_headers(id, request(), false);
    worker.request_body(id, vec![b'x'; 1024].into(), true);
    while let Some(action) = worker.poll_action() {
        black_box(action);
    }
    worker.finish(id, Ending::default());
}

fn callbacks(criterion: &mut Criterion) {
    let (engine, _ticker) = engine();
    let mut group = criterion.benchmark_group("callback");
    let mut empty = worker(guest(&engine, EMPTY_TICK));
    group.bench_function("empty", |bencher| bencher.iter(|| internals::tick(black_box(&mut empty), 0)));
    let mut passes = worker(guest(
        &engine,
        r#"(func (export "proxy_on_context_create") (param i32 i32))
           (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (i32.const 0))
           (func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) (i32.const 0))
           (func (export "proxy_on_log") (param i32))
           (func (export "proxy_on_done") (param i32) (result i32) (i32.const 1))
           (func (export "proxy_on_delete") (param i32))"#,
    ));
    group.bench_function("a request with a body, six empty callbacks", |bencher| bencher.iter(|| pass(&mut passes)));
    let mut nothing = worker(guest(&engine, ""));
    group.bench_function("a request with a body, no callback", |bencher| bencher.iter(|| pass(&mut nothing)));
    group.finish();
}

fn hostcalls(criterion: &mut Criterion) {
    let (engine, _ticker) = engine();
    let mut group = criterion.benchmark_group("hostcall");
    group.throughput(Throughput::Elements(CALLS));
    for call in CALLS_ON_REQUESTS.iter().chain(OTHER_CALLS) {
        let name = call.name;
        let mut worker = worker(plugin(&engine, &call.wasm()));
        group.bench_function(name, |bencher| bencher.iter(|| pass(&mut worker)));
        assert_eq!(worker.health()[0].traps, 0, "{name} answers what is expected");
    }
    let body = r#"(func (export "proxy_on_request_body") (param i32 i32 i32) (result i32) (local $left i32)
        (local.set $left (i32.const 1000))
        (loop
          (if (call $get_buffer (i32.const 0) (i32.const 0) (i32.const 1024) (i32.const 200) (i32.const 204)) (then unreachable))
          (br_if 0 (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
        (i32.const 0))"#;
    let mut worker = worker(guest(&engine, body));
    group.bench_function("proxy_get_buffer_bytes, 1 KiB", |bencher| bencher.iter(|| pass(&mut worker)));
    assert_eq!(worker.health()[0].traps, 0);
    group.finish();
}

/// Modules of growing size: a few lines of text, a filter built with the Rust SDK, one that verifies signatures.
fn starting(criterion: &mut Criterion) {
    let (engine, _ticker) = engine();
    let file = |name: &str| {
        let path = places::filter(name).unwrap_or_else(|error| panic!("{error}"));
        std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    };
    let configuration = places::workspace().join("filters/jwt-auth/config/one-issuer.json");
    let configuration =
        std::fs::read(&configuration).unwrap_or_else(|error| panic!("{}: {error}", configuration.display()));
    let rust = |name: &str, configuration: &[u8]| {
        let module = Module::from_bytes(&engine, &file(name), &ModuleLimits::default()).expect("a plugin");
        let mut plugin = Plugin::new(name, module);
        plugin.configuration = configuration.to_vec();
        plugin
    };
    let mut group = criterion.benchmark_group("instantiate and configure");
    for (name, plugin) in [
        ("a guest of a few lines", guest(&engine, SMALL)),
        ("probe, with the Rust SDK", rust("probe", b"")),
        ("jwt-auth, with three keys", rust("jwt-auth", &configuration)),
    ] {
        let plugin = Arc::new(plugin);
        group.bench_function(name, |bencher| {
            bencher
                .iter(|| Worker::start(Shared::new(), vec![Arc::clone(&plugin)], Box::new(Quiet)).expect("a worker"));
        });
    }
    group.finish();

    let folder = tempfile::tempdir().expect("a folder");
    let cache = Cache::open(CacheSettings::new(folder.path())).expect("a cache");
    let cached = Loader::new(engine.clone(), LoaderSettings { cache: Some(cache), process: None }).expect("a loader");
    let bare = Loader::new(engine, LoaderSettings::default()).expect("a loader");
    let load = |loader: &Loader, wasm: &[u8]| loader.load(wasm, &LoadLimits::default()).expect("a plugin").module;
    for name in ["probe", "jwt-auth"] {
        let wasm = file(name);
        load(&cached, &wasm);
        let mut group = criterion.benchmark_group(format!("load {name}"));
        group.bench_function("from the code cache", |bencher| bencher.iter(|| black_box(load(&cached, &wasm))));
        group.bench_function("from the code cache, instantiate and configure", |bencher| {
            let configuration = if name == "probe" { Vec::new() } else { configuration.clone() };
            bencher.iter(|| {
                let mut plugin = Plugin::new(name, load(&cached, &wasm));
                plugin.configuration.clone_from(&configuration);
                worker(plugin)
            });
        });
        group.sample_size(10);
        group.bench_function("compiled", |bencher| bencher.iter(|| black_box(load(&bare, &wasm))));
        group.finish();
    }
}

/// From the beginning of a callback that never returns to the moment at which the worker has ended it.
fn deadline(criterion: &mut Criterion) {
    let (engine, _ticker) = engine();
    let mut group = criterion.benchmark_group("deadline");
    group.sample_size(20);
    group.measurement_time(Duration::from_secs(10));
    group.bench_function("an endless loop with 100 ms", |bencher| {
        bencher.iter_custom(|times| {
            (0..times)
                .map(|_| {
                    let mut worker =
                        worker(guest(&engine, r#"(func (export "proxy_on_tick") (param i32) (loop (br 0)))"#));
                    let began = Instant::now();
                    internals::tick(&mut worker, 0);
                    let took = began.elapsed();
                    assert_eq!(worker.health()[0].traps, 1);
                    took
                })
                .sum()
        });
    });
    group.finish();
}

criterion_group!(benches, callbacks, hostcalls, starting, deadline);
criterion_main!(benches);
