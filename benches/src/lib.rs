//! Benchmarks, outermost last: `hostcalls` times what is between host and guest by itself, `policy` a filter's decision natively,
//! `abi` the same filter as a guest, `end_to_end` both hosts over loopback.
//!
//! The one other host of Proxy-Wasm that exists as a Rust library, the crate `proxy-wasm-host`, is not beside ours here: its two
//! releases (0.1.0, 0.2.0) ask for Rust 1.96, and this workspace is pinned to 1.95.
//!
//! `cargo bench -p portcullis-benches --bench policy`. A speed claim names machine, commit, command and the number before;
//! dated results lie in `results/`.
