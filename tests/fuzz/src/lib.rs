//! Fuzz targets: parsers and the ABI survive anything.
//!
//! A [`Target`] takes bytes, does something with them that must hold for all bytes, and says in a number what happened, roughly.
//! [`drive`] feeds it: first the seeds and every input that once failed, then mutations of them and inputs of its own. An input after which
//! something happened that had not happened before is mutated further, which finds its way into a parser without instrumented
//! code, and so with the stable compiler.
//!
//! `cargo test --test fuzz` runs every target for some seconds, `just fuzz TARGET SECONDS` one of them for as long as wanted. What fails is
//! made small, written to `regressions/TARGET` and run first from then on: a failure stays until it is mended.

mod driver;
mod input;
mod targets;

pub use driver::{Budget, Failure, Report, drive};
pub use targets::TARGETS;

/// Something that must hold for all bytes.
pub struct Target {
    /// Its name, which is also that of its folders.
    pub name: &'static str,
    /// What it tries, for a list.
    pub about: &'static str,
    /// Panics if it does not hold. What it returns tells apart what can happen, such as one error from another.
    pub run: fn(&[u8]) -> u64,
    /// Inputs to begin with, beside those in `corpus/TARGET`.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Pieces that inputs are made of.
    pub words: &'static [&'static [u8]],
}
