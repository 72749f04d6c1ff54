//! Guests that make one call a thousand times, and what they are shown: the same for every host that is measured.

/// What small guests begin with: imports, memory, an allocator.
pub const PRELUDE: &str = include_str!("../../host/abi/tests/guests/prelude.wat");

/// How often a guest makes its call in one callback.
pub const CALLS: u64 = 1_000;

/// What a browser sends.
pub const REQUEST: [(&str, &str); 11] = [
    (":method", "GET"),
    (":path", "/orders/1001?fields=id,total"),
    (":authority", "api.example.com"),
    (":scheme", "https"),
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0"),
    ("accept", "application/json"),
    ("accept-encoding", "gzip, deflate, br"),
    ("authorization", "Bearer eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"),
    ("x-forwarded-for", "192.0.2.7"),
    ("x-forwarded-proto", "https"),
    ("x-request-id", "00000000-0000-4000-8000-000000000001"),
];

/// Only a tick, which does nothing.
pub const EMPTY_TICK: &str = r#"(func (export "proxy_on_tick") (param i32))"#;

/// As little as a plugin can be.
pub const SMALL: &str = r#"(func (export "proxy_on_configure") (param i32 i32) (result i32) (i32.const 1))"#;

/// A guest's bytes.
///
/// # Panics
/// Where the code is not WAT.
pub fn wasm(code: &str) -> Vec<u8> {
    wat::parse_str(format!("(module {PRELUDE} {code})")).unwrap_or_else(|error| panic!("{error}"))
}

/// One host function in a loop.
pub struct Call {
    /// The row's name.
    pub name: &'static str,
    /// What is done before the loop.
    pub setup: &'static str,
    /// The call, which leaves its status.
    pub call: &'static str,
    /// The status that it has to answer; any other is a trap.
    pub expected: u32,
}

impl Call {
    const fn new(name: &'static str, call: &'static str) -> Call {
        Call { name, setup: "", call, expected: 0 }
    }

    /// The guest that makes this call when it sees a request.
    pub fn wasm(&self) -> Vec<u8> {
        let Call { setup, call, expected, .. } = self;
        wasm(&format!(
            r#"(data (i32.const 16) "authorization") (data (i32.const 32) "x-none") (data (i32.const 48) "x-a")
               (data (i32.const 64) "a value") (data (i32.const 80) "request\00path") (data (i32.const 96) "key")
               (data (i32.const 112) "plugin_name")
               (func (export "proxy_on_request_headers") (param i32 i32 i32) (result i32) (local $left i32)
                 {setup}
                 (local.set $left (i32.const {CALLS}))
                 (loop
                   (if (i32.ne (i32.const {expected}) {call}) (then unreachable))
                   (br_if 0 (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
                 (i32.const 0))"#
        ))
    }
}

/// Calls that every host answers out of what it was given with the request.
pub const CALLS_ON_REQUESTS: &[Call] = &[
    Call::new("nothing (the loop)", "(i32.const 0)"),
    Call::new("proxy_get_current_time_nanoseconds", "(call $time (i32.const 200))"),
    Call::new(
        "proxy_get_header_map_value, the 8th of 11",
        "(call $get (i32.const 0) (i32.const 16) (i32.const 13) (i32.const 200) (i32.const 204))",
    ),
    Call {
        expected: 1,
        ..Call::new(
            "proxy_get_header_map_value, absent",
            "(call $get (i32.const 0) (i32.const 32) (i32.const 6) (i32.const 200) (i32.const 204))",
        )
    },
    Call::new("proxy_get_header_map_pairs, 11 lines", "(call $pairs (i32.const 0) (i32.const 200) (i32.const 204))"),
    Call::new(
        "proxy_replace_header_map_value",
        "(call $replace (i32.const 0) (i32.const 48) (i32.const 3) (i32.const 64) (i32.const 7))",
    ),
    Call::new(
        "proxy_add_header_map_value and proxy_remove_header_map_value",
        "(i32.or (call $add (i32.const 0) (i32.const 48) (i32.const 3) (i32.const 64) (i32.const 7))
           (call $remove (i32.const 0) (i32.const 48) (i32.const 3)))",
    ),
    Call::new(
        "proxy_get_property, plugin_name",
        "(call $property (i32.const 112) (i32.const 11) (i32.const 200) (i32.const 204))",
    ),
];

/// Calls for which a host needs more than the request.
pub const OTHER_CALLS: &[Call] = &[
    Call::new("proxy_log, a level that is off", "(call $log (i32.const 1) (i32.const 64) (i32.const 7))"),
    Call::new(
        "proxy_get_property, request.path",
        "(call $property (i32.const 80) (i32.const 12) (i32.const 200) (i32.const 204))",
    ),
    Call::new("proxy_set_property", "(call $set_property (i32.const 96) (i32.const 3) (i32.const 64) (i32.const 7))"),
    Call {
        setup: "(drop (call $set_shared (i32.const 96) (i32.const 3) (i32.const 64) (i32.const 7) (i32.const 0)))",
        ..Call::new(
            "proxy_get_shared_data",
            "(call $get_shared (i32.const 96) (i32.const 3) (i32.const 200) (i32.const 204) (i32.const 208))",
        )
    },
    Call::new(
        "proxy_set_shared_data",
        "(call $set_shared (i32.const 96) (i32.const 3) (i32.const 64) (i32.const 7) (i32.const 0))",
    ),
    Call {
        setup: "(drop (call $define_metric (i32.const 0) (i32.const 96) (i32.const 3) (i32.const 200)))",
        ..Call::new("proxy_increment_metric", "(call $increment (i32.load (i32.const 200)) (i64.const 1))")
    },
];
