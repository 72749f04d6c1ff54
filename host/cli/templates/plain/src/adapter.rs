//! Speaks Proxy-Wasm. There is nothing to decide here.
//!
//! Calls to the host go through `hostcalls`, whose errors are values: the methods of the SDK's traits panic instead, and a
//! panic costs all requests of a worker until the proxy has replaced the VM.

use std::rc::Rc;

use proxy_wasm::hostcalls;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, BufferType, ContextType, LogLevel, MapType};

use crate::policy::Policy;

proxy_wasm::main! {{
    proxy_wasm::set_log_level(LogLevel::Warn);
    proxy_wasm::set_root_context(|_| Box::new(Root { policy: None }));
}}

struct Root {
    policy: Option<Rc<Policy>>,
}

impl Context for Root {}

impl RootContext for Root {
    /// A configuration with mistakes is refused, and the one before, if there is one, stays.
    fn on_configure(&mut self, _: usize) -> bool {
        let text = hostcalls::get_buffer(BufferType::PluginConfiguration, 0, usize::MAX);
        match Policy::from_json(&text.ok().flatten().unwrap_or_default()) {
            Ok(policy) => {
                self.policy = Some(Rc::new(policy));
                true
            }
            Err(error) => {
                log(LogLevel::Error, &format!("the configuration is refused: {error}"));
                false
            }
        }
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Stream { policy: self.policy.clone() }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

/// One request.
struct Stream {
    policy: Option<Rc<Policy>>,
}

impl Context for Stream {}

impl HttpContext for Stream {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        let fields = hostcalls::get_map_bytes(MapType::HttpRequestHeaders);
        let outcome = match (&self.policy, &fields) {
            (Some(policy), Ok(fields)) => {
                policy.check(fields.iter().map(|(name, value)| (name.as_str(), value.as_slice())))
            }
            (None, _) => Err("there is no configuration"),
            (_, Err(_)) => Err("the host gave no fields"),
        };
        let Err(finding) = outcome else { return Action::Continue };
        log(LogLevel::Info, &format!("denied: {finding}"));
        // It stays paused even if the host takes no response: without one it must not go on.
        let fields = vec![("content-type", "text/plain")];
        let _ = hostcalls::send_http_response(403, fields, Some(b"This is not permitted.\n"));
        Action::Pause
    }
}

fn log(level: LogLevel, message: &str) {
    let _ = hostcalls::log(level, &format!("{{name}}: {message}"));
}
