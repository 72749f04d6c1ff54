//! A guest that misbehaves on demand, for the tests of the hosts.
//!
//! The field `x-probe` says how. What it does not know passes, with `x-probed: yes` added.
//!
//! * `panic`, `panic-on-response`, `panic-on-log`: a trap in that callback
//! * `loop`: never returns (Envoy has no bound on time, so only for hosts that do)
//! * `memory`: allocates without end
//! * `deny`: an ordinary local response, 418

#![cfg(target_arch = "wasm32")]
#![allow(unsafe_code, missing_docs, reason = "the SDK's `main!` exports the entry point by its name")]

use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType, LogLevel};

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Info);
    proxy_wasm::set_root_context(|_| Box::new(Root));
}}

struct Root;

impl Context for Root {}

impl RootContext for Root {
    fn on_configure(&mut self, _: usize) -> bool {
        // The word `refuse` as the configuration: a filter that will not start, and says why.
        let refused = self.get_plugin_configuration().is_some_and(|configuration| configuration == b"refuse");
        if refused {
            log("the probe was told to refuse");
        }
        !refused
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Probe::default()))
    }
}

fn log(message: &str) {
    // A host that takes no log line is none that these tests are about.
    let _ = proxy_wasm::hostcalls::log(LogLevel::Error, message);
}

#[derive(Default)]
struct Probe {
    wish: Vec<u8>,
}

impl Context for Probe {}

impl HttpContext for Probe {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
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
            b"deny" => {
                self.send_http_response(418, vec![("x-probed", "denied")], Some(b"short and stout"));
                Action::Pause
            }
            _ => {
                self.add_http_request_header("x-probed", "yes");
                Action::Continue
            }
        }
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
