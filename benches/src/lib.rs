//! Benchmarks, outermost last: `policy` times a filter's decision natively, `abi` the same filter as a guest,
//! `end_to_end` both hosts over loopback.
//!
//! `cargo bench -p portcullis-benches --bench policy`. A speed claim names machine, commit, command and the number before;
//! dated results lie in `results/`.
