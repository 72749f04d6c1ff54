//! A guest that misbehaves on demand, for the tests of the hosts.
//!
//! The field `x-probe` says how. What it does not know passes, with `x-probed: yes` added.
//!
//! * `panic`, `panic-on-response`, `panic-on-log`: a trap in that callback
//! * `loop`: never returns (Envoy has no bound on time, so only for hosts that do)
//! * `memory`: allocates without end
//! * `deny`: an ordinary local response, 418, which is counted
//! * `reset`: closes the stream without an answer
//! * `ask`: asks the upstream `keys` and holds the request; 200 lets it pass, anything else is answered with 503
//! * `grpc`: runs the script in `x-grpc` (`grpc.rs` has the language) and answers with what came of it
//! * `read-body`: holds the request until its body is there; one that says `evil` is answered with 403
//!
//! A configuration that begins with `tcp` makes it a filter of TCP connections (`tcp.rs`).

#![cfg(target_arch = "wasm32")]
#![allow(unsafe_code, missing_docs, reason = "the SDK's `main!` exports the entry point by its name")]

mod grpc;
mod tcp;

use std::time::Duration;

use proxy_wasm::traits::{Context, HttpContext, RootContext, StreamContext};
use proxy_wasm::types::{Action, ContextType, LogLevel, MapType, MetricType};

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root::default()));
}}

const DENIED: &str = "portcullis_probe_denied_total.rule.default.reason.told_to";

#[derive(Default)]
struct Root {
    denied: u32,
    tcp: Option<tcp::Wish>,
}

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _: usize) -> bool {
        if let Ok(id) = proxy_wasm::hostcalls::define_metric(MetricType::Counter, DENIED) {
            self.denied = id;
        }
        let configuration = self.get_plugin_configuration().unwrap_or_default();
        self.tcp = tcp::Wish::read(&configuration);
        // The word `refuse` as the configuration: a filter that will not start, and says why.
        let refused = configuration == b"refuse";
        if refused {
            log("the probe was told to refuse");
        }
        !refused
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(if self.tcp.is_some() { ContextType::StreamContext } else { ContextType::HttpContext })
    }

    fn create_stream_context(&self, _: u32) -> Option<Box<dyn StreamContext>> {
        Some(Box::new(tcp::Connection::new(self.tcp?)))
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Probe { denied: self.denied, ..Probe::default() }))
    }
}

fn log(message: &str) {
    // A host that takes no log line is none that these tests are about.
    let _ = proxy_wasm::hostcalls::log(LogLevel::Error, message);
}

#[derive(Default)]
struct Probe {
    wish: Vec<u8>,
    denied: u32,
    grpc: Option<grpc::Script>,
}

impl Probe {
    /// Lets the script note something, and go on.
    fn script(&mut self, note: impl FnOnce(&mut grpc::Script)) {
        let Some(script) = &mut self.grpc else { return };
        note(script);
        if script.go_on() {
            let transcript = std::mem::take(&mut script.transcript).join("\n");
            self.grpc = None;
            self.send_http_response(200, Vec::new(), Some(transcript.as_bytes()));
        }
    }
}

impl Context for Probe {
    fn on_grpc_call_response(&mut self, _: u32, status: u32, size: usize) {
        self.script(|script| script.answered(status, size));
    }

    fn on_grpc_stream_initial_metadata(&mut self, _: u32, _: u32) {
        self.script(|script| script.metadata("initial", MapType::GrpcReceiveInitialMetadata));
    }

    fn on_grpc_stream_message(&mut self, _: u32, size: usize) {
        self.script(|script| script.message(size));
    }

    fn on_grpc_stream_trailing_metadata(&mut self, _: u32, _: u32) {
        self.script(|script| script.metadata("trailing", MapType::GrpcReceiveTrailingMetadata));
    }

    fn on_grpc_stream_close(&mut self, _: u32, status: u32) {
        self.script(|script| script.closed(status));
    }

    fn on_http_call_response(&mut self, _: u32, fields: usize, _: usize, _: usize) {
        if self.grpc.is_some() {
            return self.script(|script| {
                script.transcript.push(format!("answer {}", if fields == 0 { "none" } else { "some" }));
            });
        }
        let status = self.get_http_call_response_header_bytes(":status").unwrap_or_default();
        if status == b"200" {
            self.resume_http_request();
        } else {
            let status = String::from_utf8_lossy(&status).into_owned();
            self.send_http_response(503, vec![("x-answer", &status)], None);
        }
    }
}

impl HttpContext for Probe {
    fn on_http_request_headers(&mut self, _: usize, end_of_stream: bool) -> Action {
        self.wish = self.get_http_request_header_bytes("x-probe").unwrap_or_default();
        match self.wish.as_slice() {
            b"panic" => panic!("the probe was told to panic"),
            b"loop" => loop {
                std::hint::spin_loop();
            },
            b"memory" => {
                let mut hoard: Vec<Vec<u8>> = Vec::new();
                loop {
                    hoard.push(vec![1; 1024 * 1024]);
                    std::hint::black_box(&hoard);
                }
            }
            b"ask" => {
                let fields = vec![(":method", "GET"), (":path", "/keys"), (":authority", "keys.example")];
                match self.dispatch_http_call("keys", fields, None, Vec::new(), Duration::from_secs(1)) {
                    Ok(_) => Action::Pause,
                    Err(_) => Action::Continue,
                }
            }
            b"grpc" => {
                let script = self.get_http_request_header_bytes("x-grpc").unwrap_or_default();
                self.grpc = Some(grpc::Script::new(&script));
                self.script(|_| {});
                Action::Pause
            }
            b"reset" => {
                self.reset_http_request();
                Action::Pause
            }
            b"read-body" if !end_of_stream => Action::Pause,
            b"deny" => {
                let _ = proxy_wasm::hostcalls::increment_metric(self.denied, 1);
                self.send_http_response(418, vec![("x-probed", "denied")], Some(b"short and stout"));
                Action::Pause
            }
            _ => {
                self.add_http_request_header("x-probed", "yes");
                Action::Continue
            }
        }
    }

    fn on_http_request_body(&mut self, size: usize, end_of_stream: bool) -> Action {
        if self.wish != b"read-body" {
            return Action::Continue;
        }
        if !end_of_stream {
            return Action::Pause;
        }
        let body = self.get_http_request_body(0, size).unwrap_or_default();
        if body.windows(4).any(|word| word == b"evil") {
            self.send_http_response(403, Vec::new(), Some(b"evil"));
            return Action::Pause;
        }
        Action::Continue
    }

    fn on_http_response_headers(&mut self, _: usize, _: bool) -> Action {
        if self.wish == b"panic-on-response" {
            panic!("the probe was told to panic on the response");
        }
        Action::Continue
    }

    fn on_log(&mut self) {
        if self.wish == b"panic-on-log" {
            panic!("the probe was told to panic on the log");
        }
    }
}
