//! Policy, ABI and end-to-end benchmarks.
