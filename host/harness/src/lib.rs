//! Scenarios against a filter's .wasm on a simulated host.
