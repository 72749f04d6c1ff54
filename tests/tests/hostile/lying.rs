//! Guests that write what would be another message on the wire, or another line in a log.

use crate::support::{Settings, Site, attacker, guest};

/// Says the status of a call as the field `x-said` of the request: a digit.
fn said(setup: &str, call: &str) -> Vec<u8> {
    attacker(&format!(
        r#"{setup}
           (i64.store (i32.const 32) (i64.const 0x646961732d78))
           (i32.store8 (i32.const 40) (i32.add (i32.const 48) {call}))
           (drop (call $add (i32.const 0) (i32.const 32) (i32.const 6) (i32.const 40) (i32.const 1)))"#
    ))
}

/// Puts `text` at 4096.
fn put(text: &str) -> String {
    text.bytes()
        .enumerate()
        .map(|(at, byte)| format!("(i32.store8 (i32.const {}) (i32.const {byte}))", 4096 + at))
        .collect()
}

#[test]
fn lines_and_pseudo_headers_that_would_be_another_message_are_refused() {
    for (name, value) in [
        ("x-evil", "1\r\nx-smuggled: 2"),
        ("x-evil", "1\nx-smuggled: 2"),
        ("x-evil\r\nx-smuggled", "2"),
        ("x-evil: 1\r\nx-smuggled", "2"),
        ("x smuggled", "2"),
        (":smuggled", "2"),
        (":status", "200"),
        ("", "2"),
        ("x-evil", "1\0"),
    ] {
        for call in ["$add", "$replace"] {
            let text = format!("{name}{value}");
            let call = format!(
                "(call {call} (i32.const 0) (i32.const 4096) (i32.const {}) (i32.const {}) (i32.const {}))",
                name.len(),
                4096 + name.len(),
                value.len()
            );
            let mut gate = Site::new(&said(&put(&text), &call), Settings::default()).serve();
            assert_eq!(gate.ask("/guarded", &[("x-attack", "1")]).map(|response| response.status), Some(200));
            let requests = gate.site.origin.take_requests();
            let [request] = requests.as_slice() else { panic!("{requests:?}") };
            assert_eq!(request.fields.get("x-said"), Some(&b"2"[..]), "{text:?}: BadArgument");
            assert!(request.fields.iter().all(|(name, _)| !name.contains("smuggled")), "{text:?}: {request:?}");
            gate.serves_others();
        }
    }
}

#[test]
fn a_request_keeps_its_frame_whatever_a_guest_says_about_it() {
    for (name, value) in [
        ("content-length", "100"),
        ("content-length", "0"),
        ("transfer-encoding", "chunked"),
        ("transfer-encoding", "gzip, chunked"),
        ("connection", "x-attack"),
        ("upgrade", "websocket"),
        ("te", "gzip"),
        ("expect", "100-continue"),
        ("host", "elsewhere.example"),
    ] {
        let text = format!("{name}{value}");
        let add = format!(
            "{} (drop (call $add (i32.const 0) (i32.const 4096) (i32.const {}) (i32.const {}) (i32.const {})))",
            put(&text),
            name.len(),
            4096 + name.len(),
            value.len()
        );
        let mut gate = Site::new(&attacker(&add), Settings::default()).serve();
        let mut request = portcullis_harness::RequestPlan::new("POST", "/guarded");
        request.fields.push("x-attack", "1");
        request.body = vec![b"GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n".to_vec()];
        let response =
            portcullis_tests::client::send(gate.server.address(), &request).unwrap_or_else(|error| panic!("{error}"));
        let status = response.map(|response| response.status);
        let requests = gate.site.origin.take_requests();
        assert!(requests.iter().all(|seen| seen.path != "/smuggled"), "{text}: {requests:?}");
        if status == Some(200) {
            let [seen] = requests.as_slice() else { panic!("{text}: {requests:?}") };
            assert_eq!(seen.body, request.body.concat(), "{text}: the whole body and nothing else");
        }
        // Either it was made right or it was refused; a connection that was used is good for another request.
        assert!(matches!(status, Some(200 | 500 | 502 | 503)), "{text}: {status:?}\n{}", gate.server.log());
        gate.serves_others();
    }
}

#[test]
fn a_response_keeps_its_frame_whatever_a_guest_says_about_it() {
    for (name, value) in [
        ("content-length", "100"),
        ("content-length", "0"),
        ("content-length", "junk"),
        ("transfer-encoding", "chunked"),
        ("transfer-encoding", "gzip"),
        ("connection", "keep-alive, x-a"),
        ("upgrade", "h2c"),
        ("trailer", "x-a"),
    ] {
        let wasm = guest(&format!(
            r#"(func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
                 {} (drop (call $replace (i32.const 2) (i32.const 4096) (i32.const {}) (i32.const {}) (i32.const {})))
                 (i32.const 0))"#,
            put(&format!("{name}{value}")),
            name.len(),
            4096 + name.len(),
            value.len()
        ));
        let mut gate = Site::new(&wasm, Settings::default()).serve();
        // The client fails on what is no HTTP, and notes where a body ended before its time.
        let response = gate.ask("/guarded", &[]);
        if let Some(response) = &response
            && response.status == 200
            && response.complete
        {
            assert_eq!(response.body, b"ok", "{name}: {value}: {response:?}");
        }
        gate.serves_others();
    }
}

#[test]
fn a_target_that_is_none_reaches_nobody() {
    for path in ["/a b", "/a\tb", "no-slash", "/a HTTP/1.1 ", "/\u{7f}"] {
        let call = format!(
            "{} (drop (call $replace (i32.const 0) (i32.const 4096) (i32.const 5) (i32.const 4101) (i32.const {})))",
            put(&format!(":path{path}")),
            path.len()
        );
        let mut gate = Site::new(&attacker(&call), Settings::default()).serve();
        let status = gate.ask("/guarded", &[("x-attack", "1")]).map(|response| response.status);
        assert!(matches!(status, Some(400..=503)), "{path:?}: {status:?}");
        assert!(gate.site.origin.take_requests().is_empty(), "{path:?}");
        gate.serves_others();
    }
}

#[test]
fn what_a_guest_logs_and_answers_stays_on_its_line() {
    let text = "x\r\n2026-01-01T00:00:00Z ERROR forged\u{1b}[2K";
    let code = format!(
        r#"{} (drop (call $log (i32.const 4) (i32.const 4096) (i32.const {len})))
           (drop (call $respond (i32.const 403) (i32.const 4096) (i32.const {len}) (i32.const 0) (i32.const 0)
             (i32.const 0) (i32.const 0) (i32.const -1)))"#,
        put(text),
        len = text.len()
    );
    let mut gate = Site::new(&attacker(&code), Settings::default()).serve();
    assert_eq!(gate.ask("/guarded", &[("x-attack", "1")]).map(|response| response.status), Some(403));
    gate.serves_others();
    gate.wait_until("a line of the access log", |gate| gate.server.log().contains(" 403 "));
    for line in gate.server.log().lines() {
        assert!(!line.starts_with("2026-01-01"), "{line}");
        assert!(!line.contains('\u{1b}'), "{line:?}");
    }
}
