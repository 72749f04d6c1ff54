//! Speaks Proxy-Wasm for every filter: reads what a decision needs, and carries out what was decided.
//!
//! This file and its child are all that knows Proxy-Wasm. There is nothing to decide here: [`Guard`] has done that. No
//! status that a host returns makes the module panic, since a panic costs all requests of the worker until the proxy
//! has replaced the VM.

mod hostcalls;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

pub use proxy_wasm;
use proxy_wasm::traits::{Context, HttpContext, RootContext};
use proxy_wasm::types::{Action, ContextType};

use crate::decision::{Denial, FieldEdit, LocalResponse};
use crate::filter::Filter;
use crate::guard::{Counter, Guard, LogLevel, Outcome};
use crate::host::{ForeignCallError, Host};
use crate::metrics::{Event, counter_name};
use crate::pairs::{parse_pairs, serialise_pairs};
use crate::request::FieldLine;
use crate::time::UnixTime;

use self::hostcalls::Refused;

/// Called once, when the proxy has loaded the module.
pub fn start<F: Filter>() {
    // Also makes a panic, which no request should bring about, say where it happened.
    proxy_wasm::set_log_level(proxy_wasm::types::LogLevel::Warn);
    proxy_wasm::set_root_context(|_| Box::new(Root::<F> { configured: None }));
}

/// The filter as the proxy has configured it last.
struct Root<F: Filter> {
    configured: Option<Rc<Configured<F>>>,
}

/// Requests hold on to this, so that one in flight keeps its policy when the configuration is replaced.
struct Configured<F: Filter> {
    guard: Guard<F>,
    /// The proxy's ids of the counters that have been needed so far; `None` if it gave none.
    counters: RefCell<BTreeMap<(usize, Event), Option<u32>>>,
}

impl<F: Filter> Context for Root<F> {}

impl<F: Filter> RootContext for Root<F> {
    /// A configuration with mistakes is refused, and the one before, if there is one, stays.
    fn on_configure(&mut self, _: usize) -> bool {
        let text = hostcalls::plugin_configuration().unwrap_or_default();
        match Guard::from_json(&text) {
            Ok(guard) => {
                self.configured = Some(Rc::new(Configured { guard, counters: RefCell::default() }));
                true
            }
            Err(errors) => {
                for line in errors.to_string().lines() {
                    log(LogLevel::Error, line);
                }
                false
            }
        }
    }

    fn create_http_context(&self, _: u32) -> Option<Box<dyn HttpContext>> {
        Some(Box::new(Stream { configured: self.configured.clone() }))
    }

    fn get_type(&self) -> Option<ContextType> {
        Some(ContextType::HttpContext)
    }
}

/// One request.
struct Stream<F: Filter> {
    configured: Option<Rc<Configured<F>>>,
}

impl<F: Filter> Context for Stream<F> {}

impl<F: Filter> HttpContext for Stream<F> {
    fn on_http_request_headers(&mut self, _: usize, _: bool) -> Action {
        let Some(configured) = &self.configured else {
            let denial = Denial::InternalError { finding: "the filter has no configuration" };
            log(LogLevel::Error, &format!("{}: denied: {}", F::NAME, denial.finding()));
            return respond(&denial.response(F::NAME, None));
        };
        // An unreadable head is no pairs, not an empty head: `Guard` denies it.
        let map = hostcalls::request_field_lines().ok();
        let lines = map.as_deref().and_then(parse_pairs);
        let now = hostcalls::current_time_nanoseconds().ok().map(UnixTime::from_nanoseconds);
        let outcome = configured.guard.on_request_headers(lines.as_deref(), &Proxy, now);
        configured.carry_out(outcome)
    }
}

impl<F: Filter> Configured<F> {
    fn carry_out(&self, outcome: Outcome<'_>) -> Action {
        let Outcome { response, field_edits, properties, counter, log: line } = outcome;
        if let Some(counter) = counter {
            self.count(counter);
        }
        if let Some(line) = line {
            log(line.level, &line.message);
        }
        if let Some(response) = response {
            return respond(&response);
        }
        let edited = field_edits.iter().try_for_each(|edit| match edit {
            FieldEdit::Remove(name) => hostcalls::remove_request_field(name),
            FieldEdit::Set(name, value) => hostcalls::set_request_field(name, value),
        });
        let told = properties.iter().try_for_each(|(name, value)| hostcalls::set_property(name, value));
        if edited.and(told).is_err() {
            // The upstream would believe what a client wrote, or the next filter would not know the client.
            let denial = Denial::InternalError { finding: "the host refused to change the request" };
            log(LogLevel::Error, &format!("{}: denied: {}", F::NAME, denial.finding()));
            return respond(&denial.response(F::NAME, None));
        }
        Action::Continue
    }

    /// Counts. A host without metrics is no reason to deny.
    fn count(&self, Counter { rule_index, rule, event }: Counter<'_>) {
        let mut counters = self.counters.borrow_mut();
        let id = counters
            .entry((rule_index, event))
            .or_insert_with(|| hostcalls::define_counter(&counter_name(F::NAME, rule, event)).ok());
        if let Some(id) = *id {
            let _ = hostcalls::increment_counter(id);
        }
    }
}

/// Ends the request here. It stays paused even if the host takes no response: without one it must not go on.
fn respond(response: &LocalResponse) -> Action {
    let fields: Vec<FieldLine<'_>> =
        response.fields.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())).collect();
    let fields = serialise_pairs(&fields).unwrap_or_else(|| vec![0; 4]);
    let _ = hostcalls::send_local_response(response.status, &response.details, &response.body, &fields);
    Action::Pause
}

fn log(level: LogLevel, message: &str) {
    let level = match level {
        LogLevel::Info => 2,
        LogLevel::Warn => 3,
        LogLevel::Error => 4,
    };
    hostcalls::log(level, message);
}

/// The proxy, as policies ask it.
struct Proxy;

impl Host for Proxy {
    fn property(&self, path: &[&str]) -> Option<Vec<u8>> {
        hostcalls::property(path).ok()
    }

    fn call_foreign_function(&self, name: &str, argument: &[u8]) -> Result<Vec<u8>, ForeignCallError> {
        hostcalls::call_foreign_function(name, argument).map_err(|refused| match refused {
            Refused::NOT_FOUND | Refused::INTERNAL_FAILURE => ForeignCallError::Absent,
            _ => ForeignCallError::Refused,
        })
    }
}
