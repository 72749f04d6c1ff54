//! Guests that make random calls in random callbacks, in a worker that random things happen to.
//!
//! One guest is compiled ([`guest`]); it executes a program that comes as its configuration ([`program`]), a few calls in
//! each callback, with arguments that are mostly sensible. [`worker`] drives it and checks all that the worker asks for against
//! the protocol that embedders rely on.

mod guest;
mod program;
mod worker;

use portcullis_abi::{Plugin, internals};

use super::outcome;
use crate::Target;

/// Requests through one to three guests.
pub(super) const HTTP: Target = Target {
    name: "hostcalls-http",
    about: "sequences of calls in HTTP callbacks",
    run: |input| outcome(worker::http(input)),
    seeds,
    words: WORDS,
};

/// TCP connections, likewise.
pub(super) const TCP: Target = Target {
    name: "hostcalls-tcp",
    about: "sequences of calls in TCP callbacks",
    run: |input| outcome(worker::tcp(input)),
    seeds,
    words: WORDS,
};

/// Paths of properties, asked in each callback of a request.
pub(super) const PROPERTIES: Target = Target {
    name: "properties",
    about: "paths that guests ask properties by, in each callback",
    run: |input| outcome(worker::properties(input)),
    seeds: || {
        [
            "request\0path",
            "request\0headers\0x-a",
            "request\0time",
            "response\0code",
            "response\0trailers\0x-t",
            "source\0address",
            "connection\0mtls",
            "upstream\0address",
            "xds\0cluster_name",
            "plugin_name",
            "node",
            "filter_state\0x",
            "wasm.x",
            "x",
            "request\0headers",
            "response\0headers",
            "connection\0id",
            "xds\0node\0id",
            "",
        ]
        .map(|path| path.as_bytes().to_vec())
        .to_vec()
    },
    words: &[
        b"\0",
        b"request",
        b"response",
        b"headers",
        b"trailers",
        b"connection",
        b"filter_state",
        b"upstream_filter_state",
        b"xds",
        b"wasm.",
        b"x-a",
        b"metadata",
        b"node",
        b"locality",
        b"size",
        b"total_size",
        b"duration",
        b"code",
        b"flags",
        b"address",
        b"port",
        b"subject_peer_certificate",
        b"tls_version",
        b"source",
        b"destination",
        b"upstream",
        b"plugin_name",
        b"listener_direction",
    ],
};

/// Expressions that guests have the host evaluate.
pub(super) const EXPRESSIONS: Target = Target {
    name: "expressions",
    about: "expressions of `expr_create`, parsed and evaluated",
    run: |input| {
        thread_local! {
            static PLUGIN: Plugin = Plugin::new("probe", guest::module());
        }
        PLUGIN.with(|plugin| outcome(internals::expression(plugin, input)))
    },
    seeds: || {
        let table = include_str!("../../../../../host/abi/testdata/expressions/envoy.txt").lines();
        table.filter_map(|line| Some(line.rsplit_once(" => ")?.0.as_bytes().to_vec())).collect()
    },
    words: &[
        b"[1,2].map(x,",
        b".map(x,[x,x])",
        b".all(x,",
        b".exists(x,",
        b".filter(x,true)",
        b".matches('",
        b"(?i)",
        b"\\\\pL",
        b"{1000}",
        b"plugin_name",
        b"timestamp(",
        b"duration('",
        b".getHours('+01:00')",
        b"string(",
        b"{'a':",
        b"||true",
        b"&&",
        b"?1:",
        b"has(",
        b" in ",
        b"b'\\xff'",
    ],
};

/// Inputs that use much of the machine: choices that rise, that fall, and that are all alike.
fn seeds() -> Vec<Vec<u8>> {
    let rising: Vec<u8> = (0..2048u32).map(|n| (n * 7 % 251) as u8).collect();
    let mixed: Vec<u8> = (0..2048u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    vec![rising.clone(), rising.into_iter().rev().collect(), mixed, vec![1; 512], vec![0x55; 1024], vec![0xaa; 1024]]
}

const WORDS: &[&[u8]] = &[&[0; 8], &[0xff; 4], &[1, 0, 0, 0], &[2, 3, 5, 7, 11, 13, 17, 19]];
