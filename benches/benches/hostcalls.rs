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

fn guest(engine: &Engine, code: &str) -> Plugin {
    let prelude = include_str!("../../host/abi/tests/guests/prelude.wat");
    let wasm = wat::parse_str(format!("(module {prelude} {code})")).expect("WAT");
    Plugin::new("bench", Module::from_bytes(engine, &wasm, &ModuleLimits::default()).expect("a plugin"))
}

fn worker(plugin: Plugin) -> Worker {
    Worker::start(Shared::new(), vec![Arc::new(plugin)], Box::new(Quiet)).expect("a worker")
}

/// What a browser sends.
fn request() -> FieldMap {
    [
        (":method", "GET"),
        (":path", "/orders/1001?fields=id,total"),
        (":authority", "api.example.com"),
        (":scheme", "https"),
        ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0"),
        ("accept", "application/json"),
        ("accept-encoding", "gzip, deflate, br"),
        ("authorization", "Bearer eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"),
        ("x-forwarded-for", "192.0.2.7"),
        ("x-forwarded-proto", "https"),
        ("x-request-id", "00000000-0000-4000-8000-000000000001"),
    ]
    .into_iter()
    .collect()
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
    let mut empty = worker(guest(&engine, r#"(func (export "proxy_on_tick") (param i32))"#));
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

const CALLS: u64 = 1_000;

fn hostcalls(criterion: &mut Criterion) {
    let (engine, _ticker) = engine();
    let mut group = criterion.benchmark_group("hostcall");
    group.throughput(Throughput::Elements(CALLS));
    let data = r#"
      (data (i32.const 16) "authorization") (data (i32.const 32) "x-none") (data (i32.const 48) "x-a") (data (i32.const 64) "a value")
      (data (i32.const 80) "request\00path") (data (i32.const 96) "key") (data (i32.const 112) "plugin_name")"#;
    for (name, setup, call) in [
        ("nothing (the loop)", "", "(i32.const 0)"),
        ("proxy_get_current_time_nanoseconds", "", "(call $time (i32.const 200))"),
        ("proxy_log, a level that is off", "", "(call $log (i32.const 1) (i32.const 64) (i32.const 7))"),
        (
            "proxy_get_header_map_value, the 8th of 11",
            "",
            "(call $get (i32.const 0) (i32.const 16) (i32.const 13) (i32.const 200) (i32.const 204))",
        ),
        (
            "proxy_get_header_map_value, absent",
            "",
            "(call $get (i32.const 0) (i32.const 32) (i32.const 6) (i32.const 200) (i32.const 204))",
        ),
        ("proxy_get_header_map_pairs, 11 lines", "", "(call $pairs (i32.const 0) (i32.const 200) (i32.const 204))"),
        (
            "proxy_replace_header_map_value",
            "",
            "(call $replace (i32.const 0) (i32.const 48) (i32.const 3) (i32.const 64) (i32.const 7))",
        ),
        (
            "proxy_add_header_map_value and proxy_remove_header_map_value",
            "",
            "(i32.or (call $add (i32.const 0) (i32.const 48) (i32.const 3) (i32.const 64) (i32.const 7))
               (call $remove (i32.const 0) (i32.const 48) (i32.const 3)))",
        ),
        (
            "proxy_get_property, plugin_name",
            "",
            "(call $property (i32.const 112) (i32.const 11) (i32.const 200) (i32.const 204))",
        ),
        (
            "proxy_get_property, request.path",
            "",
            "(call $property (i32.const 80) (i32.const 12) (i32.const 200) (i32.const 204))",
        ),
        ("proxy_set_property", "", "(call $set_property (i32.const 96) (i32.const 3) (i32.const 64) (i32.const 7))"),
        (
            "proxy_get_shared_data",
            "(drop (call $set_shared (i32.const 96) (i32.const 3) (i32.const 64) (i32.const 7) (i32.const 0)))",
            "(call $get_shared (i32.const 96) (i32.const 3) (i32.const 200) (i32.const 204) (i32.const 208))",
        ),
        (
            "proxy_set_shared_data",
            "",
            "(call $set_shared (i32.const 96) (i32.const 3) (i32.const 64) (i32.const 7) (i32.const 0))",
        ),
        (
            "proxy_increment_metric",
            "(drop (call $define_metric (i32.const 0) (i32.const 96) (i32.const 3) (i32.const 200)))",
            "(call $increment (i32.load (i32.const 200)) (i64.const 1))",
        ),
    ] {
        // `NotFound` for what is absent, `Ok` for everything else.
        let expected = u32::from(name.ends_with("absent"));
        let mut worker = worker(guest(
            &engine,
            &format!(
                r#"{data}
                   (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (local $left i32)
                     {setup}
                     (local.set $left (i32.const {CALLS}))
                     (loop
                       (if (i32.ne (i32.const {expected}) {call}) (then unreachable))
                       (br_if 0 (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
                     (i32.const 0))"#
            ),
        ));
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
        (
            "a guest of a few lines",
            guest(&engine, r#"(func (export "proxy_on_configure") (param i32 i32) (result i32) (i32.const 1))"#),
        ),
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
    let wasm = file("jwt-auth");
    let cache = Cache::open(CacheSettings::new(folder.path())).expect("a cache");
    let cached = Loader::new(engine.clone(), LoaderSettings { cache: Some(cache), process: None }).expect("a loader");
    let bare = Loader::new(engine, LoaderSettings::default()).expect("a loader");
    let load = |loader: &Loader| loader.load(&wasm, &LoadLimits::default()).expect("a plugin");
    load(&cached);
    let mut group = criterion.benchmark_group("load jwt-auth");
    group.bench_function("from the code cache", |bencher| bencher.iter(|| black_box(load(&cached))));
    group.sample_size(10);
    group.bench_function("compiled", |bencher| bencher.iter(|| black_box(load(&bare))));
    group.finish();
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
