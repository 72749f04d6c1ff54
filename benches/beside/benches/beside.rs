//! What `hostcalls` measures of our host, measured of the crate `proxy-wasm-host`, as far as it does the same.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use portcullis_beside::guests::{self, CALLS, CALLS_ON_REQUESTS, EMPTY_TICK, REQUEST, SMALL};
use proxy_wasm_host::abi::v0_2_1::types::{LogLevel, MapType, Status};
use proxy_wasm_host::abi::v0_2_1::{
    Access, ContextId, Guest, Host, Invocation, LogContext, LogSink, PluginConfig, Started, StreamState, VmServices,
};
use proxy_wasm_host::{Engine, HeaderMap, Limits, Module, VecHeaderMap};

/// A log that costs nothing.
struct Quiet;

impl LogSink for Quiet {
    fn log(&self, _: LogContext<'_>, _: LogLevel, message: &[u8]) {
        black_box(message);
    }
}

struct Request(VecHeaderMap);

impl StreamState for Request {
    fn header_map(&mut self, _: Invocation, _: Access, map: MapType) -> Result<&mut dyn HeaderMap, Status> {
        match map {
            MapType::HttpRequestHeaders => Ok(&mut self.0),
            _ => Err(Status::NotFound),
        }
    }
}

fn request() -> Request {
    Request(REQUEST.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect())
}

fn start(host: &Host, module: &Module) -> (Guest, ContextId) {
    let services = VmServices::new(Arc::new(Quiet));
    let mut guest = Guest::new(host, module, services, &Limits::default()).expect("a guest");
    let Started::Serving(root) = guest.start(PluginConfig::new().with_name("bench")).expect("a start") else {
        panic!("the guest refused to start");
    };
    (guest, root)
}

fn bench(criterion: &mut Criterion) {
    let engine = Engine::new().expect("an engine");
    let host = Host::new(&engine).expect("a host");
    let module = |wasm: &[u8]| Module::new(&engine, wasm).expect("a module");

    let (mut guest, root) = start(&host, &module(&guests::wasm(EMPTY_TICK)));
    criterion.bench_function("callback/empty", |bencher| {
        let mut scope = guest.enter_root();
        bencher.iter(|| scope.on_tick(black_box(root)).expect("a tick"));
    });

    let mut group = criterion.benchmark_group("hostcall");
    group.throughput(Throughput::Elements(CALLS));
    for call in CALLS_ON_REQUESTS {
        let (mut guest, root) = start(&host, &module(&call.wasm()));
        group.bench_function(call.name, |bencher| {
            bencher.iter(|| {
                let (answer, request) = guest.with(request(), |scope| {
                    let stream = scope.on_context_create(Some(root)).expect("a context");
                    let action = scope.on_request_headers(stream, 11, true).expect(call.name);
                    scope.on_done(stream).expect("done");
                    scope.on_log(stream).expect("a log");
                    scope.on_delete(stream).expect("deleted");
                    action
                });
                black_box((answer, request.0))
            });
        });
    }
    group.finish();

    let mut group = criterion.benchmark_group("instantiate and configure");
    let probe = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/filters/probe.wasm");
    let probe =
        std::fs::read(probe).unwrap_or_else(|error| panic!("{probe}: {error}\n  hint: cargo xtask build-filters"));
    for (name, wasm) in [("a guest of a few lines", guests::wasm(SMALL)), ("probe, with the Rust SDK", probe)] {
        let module = module(&wasm);
        group.bench_function(name, |bencher| bencher.iter(|| start(&host, &module)));
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
