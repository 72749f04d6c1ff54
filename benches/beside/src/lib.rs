//! The crate `proxy-wasm-host` on the guests of the benchmark `hostcalls`, under the same names; `benches/README.md` says how it is run.

#[path = "../../src/guests.rs"]
pub mod guests;
