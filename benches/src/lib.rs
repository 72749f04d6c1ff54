//! Benchmarks, outermost last: `hostcalls` times what is between host and guest by itself, `policy` a filter's decision natively,
//! `abi` the same filter as a guest, `end_to_end` servers over loopback. README.md says how they are run and what they are for.

pub mod guests;
