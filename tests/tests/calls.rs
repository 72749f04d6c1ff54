//! The same calls on every host, answer by answer.

use portcullis_harness::{HostKind, RequestPlan};
use portcullis_tests::calls::Calls;

/// Runs a script on all hosts, in a stream, after `configured` has run in the root context. Each line is a call and, behind
/// `->`, the answer that every host gives.
fn check(configured: &str, lines: &str) {
    let lines: Vec<&str> = lines.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let script: Vec<String> = lines
        .iter()
        .map(|line| line.split_once(" -> ").map_or_else(|| panic!("no answer: {line}"), |(call, _)| call))
        .map(|call| format!("request_headers: {call}"))
        .collect();
    let expected: Vec<String> = lines.iter().map(|line| format!("request_headers {line}")).collect();
    for host in [HostKind::Harness, HostKind::Standalone, HostKind::Envoy] {
        // The configuration is a script of every stream's, too; a field would not hold as much.
        let seen = Calls::start(host, &format!("{configured}{}", script.join("\n")))
            .and_then(|mut calls| calls.request(RequestPlan::new("GET", "/p?q"), ""));
        let seen = seen.unwrap_or_else(|error| panic!("{}: {error}", host.name()));
        let differ: Vec<String> = seen
            .iter()
            .zip(&expected)
            .filter(|(seen, expected)| seen != expected)
            .map(|(seen, expected)| format!("expected {expected}\nseen     {seen}"))
            .collect();
        assert!(differ.is_empty(), "{}\n{}", host.name(), differ.join("\n"));
        assert_eq!(seen.len(), expected.len(), "{}", host.name());
    }
}

#[test]
fn what_is_absent_and_what_is_empty() {
    check(
        "",
        r#"
        proxy_get_property "request\0path" -> 0 "/p?q"
        proxy_get_property "request\0query" -> 0 "q"
        proxy_get_property "request\0path\0" -> 0 "/p?q"
        proxy_get_property "request\0path\0more" -> 1
        proxy_get_property "nothing" -> 1
        proxy_get_property "" -> 3
        proxy_get_header_map_value 0 "x-none" -> 1
        "#,
    );
}

#[test]
fn grpc_without_an_exchange() {
    // The low bits of a token say what it stands for: 0 an HTTP call, 1 a gRPC call, 2 a stream.
    check(
        "",
        r#"
        proxy_grpc_call "nobody" "svc" "Get" {} "hello" 1000 -> 4
        proxy_grpc_stream "nobody" "svc" "Get" {} -> 4
        proxy_grpc_call "\x0a\x08\x0a\x06nobody" "svc" "Get" {} "hello" 1000 -> 10
        proxy_grpc_stream "\x0a\x08\x0a\x06nobody" "svc" "Get" {} -> 10
        proxy_grpc_send 2 "hello" 0 -> 1
        proxy_grpc_send 6 "hello" 0 -> 1
        proxy_grpc_send 4 "hello" 0 -> 2
        proxy_grpc_send 5 "hello" 0 -> 2
        proxy_grpc_send 3 "hello" 0 -> 2
        proxy_grpc_close 6 -> 1
        proxy_grpc_close 5 -> 1
        proxy_grpc_close 4 -> 2
        proxy_grpc_close 3 -> 2
        proxy_grpc_cancel 6 -> 1
        proxy_grpc_cancel 5 -> 1
        proxy_grpc_cancel 4 -> 2
        proxy_grpc_cancel 7 -> 2
        proxy_get_status -> 0 0 ""
        proxy_get_buffer_bytes 5 0 10 -> 0 ""
        proxy_get_buffer_status 5 -> 0 0 0
        proxy_get_header_map_pairs 4 -> 0 ""
        proxy_get_header_map_pairs 5 -> 0 ""
        proxy_get_header_map_value 4 "x" -> 2
        proxy_get_header_map_value 5 "x" -> 2
        proxy_get_header_map_size 4 -> 2
        proxy_add_header_map_value 4 "x" "y" -> 2
        "#,
    );
}

/// `declare_property` with the fields name, readonly, type and span.
fn declare(name: &str, readonly: bool, kind: u8, span: u8) -> String {
    let name_field = format!("\\n\\x{:02x}{name}", name.len());
    let rest = format!("\\x10\\x{:02x}\\x18\\x{kind:02x}\\x28\\x{span:02x}", u8::from(readonly));
    format!("-configure: proxy_call_foreign_function \"declare_property\" \"{name_field}{rest}\"\n")
}

#[test]
fn filters_keep_properties_with_a_stream() {
    let declared = [
        declare("ro", true, 0, 0),
        declare("text", false, 1, 1),
        declare("proto", false, 3, 0),
        declare("strange", false, 9, 9),
    ];
    check(
        &declared.concat(),
        r#"
        proxy_get_property "plain" -> 1
        proxy_set_property "plain" "1" -> 0
        proxy_get_property "plain" -> 0 "1"
        proxy_get_property "plain\0" -> 0 "1"
        proxy_get_property "plain\0more" -> 1
        proxy_get_property "filter_state\0wasm.plain" -> 0 "1"
        proxy_set_property "plain" "" -> 0
        proxy_get_property "plain" -> 0 ""
        proxy_set_property "a\0b" "1" -> 0
        proxy_get_property "a\0b" -> 1
        proxy_get_property "a" -> 1
        proxy_set_property "a\0" "1" -> 0
        proxy_get_property "a" -> 1
        proxy_set_property "" "1" -> 0
        proxy_get_property "filter_state\0wasm." -> 0 "1"
        proxy_set_property "request\0path" "/other" -> 0
        proxy_get_property "request\0path" -> 0 "/p?q"
        proxy_set_property "plugin_name" "x" -> 0
        proxy_get_property "plugin_name" -> 0 "calls"
        proxy_set_property "ro" "1" -> 0
        proxy_set_property "ro" "2" -> 2
        proxy_get_property "ro" -> 0 "1"
        proxy_set_property "text" "1" -> 0
        proxy_set_property "text" "2" -> 0
        proxy_get_property "text" -> 0 "2"
        proxy_get_property "filter_state\0wasm.text" -> 0 "2"
        proxy_set_property "proto" "\xff" -> 0
        proxy_get_property "proto" -> 0 "\xff"
        proxy_get_property "proto\0field" -> 1
        proxy_get_property "filter_state\0wasm.proto" -> 3
        proxy_set_property "strange" "1" -> 0
        proxy_get_property "strange" -> 0 "1"
        proxy_call_foreign_function "declare_property" "\n\x04late\x10\x01" -> 0 ""
        proxy_call_foreign_function "declare_property" "\n\x04late\x10\x01" -> 2 ""
        proxy_set_property "late" "1" -> 0
        proxy_set_property "late" "2" -> 0
        proxy_call_foreign_function "declare_property" "\n\x01\xff" -> 2 ""
        proxy_call_foreign_function "declare_property" "\n\x05ro" -> 2 ""
        "#,
    );
}

#[test]
fn root_contexts_have_no_stream() {
    for host in [HostKind::Harness, HostKind::Standalone, HostKind::Envoy] {
        let script = r#"
            tick: proxy_set_property "a" "1"
            tick: proxy_get_property "a"
            tick: proxy_get_property "request\0path"
            tick: proxy_get_property "connection_id"
            tick: proxy_get_property "filter_state"
            tick: proxy_get_property "metadata"
            tick: proxy_get_property "xds"
            tick: proxy_get_property "xds\0node\0id"
            tick: proxy_get_property "xds\0route_name"
            tick: proxy_get_property "plugin_root_id"
            tick: proxy_call_foreign_function "set_envoy_filter_state" "\n\x0cenvoy.string\x12\x01x"
            tick: proxy_call_foreign_function "clear_route_cache" ""
            tick: proxy_call_foreign_function "nothing" ""
            tick: proxy_call_foreign_function! "compress" ""
            tick: proxy_set_tick_period_milliseconds 0
            -configure: proxy_set_tick_period_milliseconds 1"#;
        let expected = r#"
            proxy_set_property "a" "1" -> 1
            proxy_get_property "a" -> 1
            proxy_get_property "request\0path" -> 1
            proxy_get_property "connection_id" -> 1
            proxy_get_property "filter_state" -> 1
            proxy_get_property "metadata" -> 1
            proxy_get_property "xds" -> 3
            proxy_get_property "xds\0node\0id" -> 0 "portcullis"
            proxy_get_property "xds\0route_name" -> 1
            proxy_get_property "plugin_root_id" -> 0 ""
            proxy_call_foreign_function "set_envoy_filter_state" "\n\x0cenvoy.string\x12\x01x" -> 1 ""
            proxy_call_foreign_function "clear_route_cache" "" -> 0 ""
            proxy_call_foreign_function "nothing" "" -> 1
            proxy_call_foreign_function! "compress" "" -> 0
            proxy_set_tick_period_milliseconds 0 -> 0"#;
        let seen =
            Calls::start(host, script).and_then(|mut calls| calls.until("tick proxy_set_tick_period_milliseconds"));
        let seen = seen.unwrap_or_else(|error| panic!("{}: {error}", host.name()));
        let expected: Vec<String> =
            expected.lines().filter(|line| !line.is_empty()).map(|line| format!("tick {}", line.trim())).collect();
        assert_eq!(seen[..expected.len()], expected, "{}", host.name());
    }
}

#[test]
fn a_root_context_is_told_of_the_end() {
    let end = |host: HostKind, script: &str| {
        let seen = Calls::start(host, script).and_then(Calls::end);
        seen.unwrap_or_else(|error| panic!("{}: {error}", host.name()))
    };
    let done = r#"done proxy_get_property "plugin_name" -> 0 "calls""#;
    let delete = r#"delete proxy_get_property "plugin_name" -> 0 "calls""#;
    let says_yes = "done: proxy_get_property \"plugin_name\"\ndelete: proxy_get_property \"plugin_name\"";
    assert_eq!(end(HostKind::Harness, says_yes), [done, delete]);
    assert_eq!(end(HostKind::Standalone, says_yes), [done, delete]);
    // Envoy has a VM of its own for each thread, and one more.
    let seen = end(HostKind::Envoy, says_yes);
    let first = |line: &str| seen.iter().position(|seen| seen == line);
    assert!(first(done).is_some() && first(done) < first(delete), "{seen:?}");

    let says_no = r#"
        done: proxy_done
        done: proxy_set_tick_period_milliseconds 1
        done: return 0
        tick: proxy_done
        tick: proxy_done
        delete: proxy_set_tick_period_milliseconds 0"#;
    let told = ["done proxy_done -> 1", "done proxy_set_tick_period_milliseconds 1 -> 0", "done return 0 -> 0"];
    let then = ["tick proxy_done -> 0", "tick proxy_done -> 1", "delete proxy_set_tick_period_milliseconds 0 -> 0"];
    assert_eq!(end(HostKind::Harness, says_no), [told, then].concat());
    assert_eq!(end(HostKind::Standalone, says_no), [told, then].concat());
    // Envoy ends without waiting.
    let seen = end(HostKind::Envoy, says_no);
    assert!(told.iter().all(|line| seen.iter().any(|seen| seen == line)), "{seen:?}");
    assert!(!seen.iter().any(|line| line.starts_with("delete ")), "{seen:?}");
}

/// `set_envoy_filter_state` with the fields path, value and span.
fn keep(path: &str, value: &str, span: u8) -> String {
    let argument = format!("\\n\\x{:02x}{path}\\x12\\x{:02x}{value}\\x18\\x{span:02x}", path.len(), value.len());
    format!("proxy_call_foreign_function \"set_envoy_filter_state\" \"{argument}\"")
}

#[test]
fn filter_state_of_envoys_own_kinds() {
    let mut lines = String::new();
    let address = "envoy.filters.listener.original_dst.local_ip";
    for (path, value, set, got) in [
        ("envoy.string", "text", "0 \"\"", r#"0 "text""#),
        ("envoy.string", "", "0 \"\"", r#"0 """#),
        ("envoy.bool", "yes", "0 \"\"", r#"0 "true""#),
        ("envoy.bool", "perhaps", "2 \"\"", r#"0 "true""#),
        ("envoy.tcp_proxy.cluster", "c", "0 \"\"", r#"0 "c""#),
        ("envoy.tcp_proxy.disable_tunneling", "1", "0 \"\"", r#"0 "false""#),
        ("envoy.network.upstream_server_name", "a.example", "0 \"\"", r#"0 "a.example""#),
        ("envoy.upstream.dynamic_port", "+007", "0 \"\"", r#"0 "7""#),
        ("envoy.upstream.dynamic_port", "-1", "2 \"\"", r#"0 "7""#),
        ("envoy.network.ip", "::1", "0 \"\"", r#"0 "[::1]:0""#),
        ("envoy.network.application_protocols", "h2", "0 \"\"", "1"),
        ("envoy.nothing", "x", "1 \"\"", "1"),
        ("wasm.x", "x", "1 \"\"", "1"),
        (address, "1.2.3.4:5", "0 \"\"", r#"0 "\x00\x00\x00\x00""#),
    ] {
        lines.push_str(&format!("{} -> {set}\n", keep(path, value, 1)));
        lines.push_str(&format!("proxy_get_property \"filter_state\\0{path}\" -> {got}\n"));
    }
    lines.push_str(&format!("proxy_get_property \"filter_state\\0{address}\\0ip\" -> 0 \"1.2.3.4\"\n"));
    let port = r#"0 "\x05\x00\x00\x00\x00\x00\x00\x00""#;
    lines.push_str(&format!("proxy_get_property \"filter_state\\0{address}\\0port\" -> {port}\n"));
    // What is there with another span stays.
    lines.push_str(&format!("{} -> 0 \"\"\n", keep("envoy.string", "other", 2)));
    lines.push_str("proxy_get_property \"filter_state\\0envoy.string\" -> 0 \"\"\n");
    check("", &lines);
}

#[test]
fn what_belongs_to_a_connection_outlives_a_stream_of_it() {
    let script = [declare("kept", false, 0, 2), declare("once", true, 0, 2), declare("gone", false, 0, 1)].concat();
    let touch = r#"
        request_headers: proxy_get_property "kept"
        request_headers: proxy_get_property "gone"
        request_headers: proxy_set_property "kept" "1"
        request_headers: proxy_set_property "once" "1"
        request_headers: proxy_set_property "gone" "1"
        log: proxy_get_property "kept""#;
    for host in [HostKind::Standalone, HostKind::Envoy] {
        let mut calls = Calls::start(host, &script).unwrap_or_else(|error| panic!("{error}"));
        for _ in 0..2 {
            let seen = calls.on_one_connection(&[touch, touch]).unwrap_or_else(|error| panic!("{error}"));
            let answers: Vec<&str> = seen.iter().filter_map(|line| Some(line.split_once(" -> ")?.1)).collect();
            let first = ["1", "1", "0", "0", "0", "0 \"1\""];
            let second = ["0 \"1\"", "1", "0", "2", "0", "0 \"1\""];
            assert_eq!(answers, [first, second].concat(), "{}", host.name());
        }
    }
}

/// Attributes, by what they belong to.
const ATTRIBUTES: &[(&str, &str)] = &[
    (
        "request",
        "path url_path query host scheme method referer useragent time id protocol size total_size headers_bytes \
         duration headers headers\\0x-dup headers\\0:path headers\\0host headers\\0x-none nothing",
    ),
    (
        "response",
        "code code_details flags grpc_status headers headers_bytes headers\\0x-dup trailers size total_size \
         backend_latency nothing",
    ),
    ("source", "address port nothing"),
    ("destination", "address port"),
    (
        "connection",
        "id mtls requested_server_name tls_version subject_local_certificate subject_peer_certificate \
         dns_san_local_certificate dns_san_peer_certificate uri_san_local_certificate uri_san_peer_certificate \
         sha256_peer_certificate_digest peer_certificate termination_details transport_failure_reason",
    ),
    (
        "upstream",
        "address port tls_version subject_peer_certificate local_address locality transport_failure_reason \
         request_attempt_count cx_pool_ready_duration num_endpoints",
    ),
    (
        "xds",
        "node\\0id node\\0cluster node\\0metadata node\\0nothing cluster_name cluster_metadata \
         cluster_metadata\\0filter_metadata cluster_metadata\\0filter_metadata\\0x listener_direction listener_metadata \
         route_name route_metadata virtual_host_name virtual_host_metadata upstream_host_metadata \
         upstream_host_locality_metadata filter_chain_name nothing",
    ),
    ("metadata", "filter_metadata typed_filter_metadata filter_metadata\\0x nothing"),
    ("filter_state", "wasm.x"),
    ("upstream_filter_state", "wasm.x"),
];

/// Names without a dot; those that older Envoys knew are gone.
const BARE: &str = "request response source destination connection upstream xds metadata filter_state \
    upstream_filter_state connection_id plugin_name plugin_root_id plugin_vm_id node cluster_name cluster_metadata \
    route_name route_metadata listener_direction listener_metadata upstream_host_metadata nothing \\0request request\\0";

/// What no two hosts, or no two runs, have in common: only that it is there, and how long it is, is compared.
const OWN: &[&str] = &[
    "connection_id",
    r"request\0time",
    r"request\0id",
    r"request\0duration",
    r"source\0address",
    r"source\0port",
    r"destination\0address",
    r"destination\0port",
    r"connection\0id",
    r"upstream\0address",
    r"upstream\0port",
    r"upstream\0local_address",
    r"upstream\0cx_pool_ready_duration",
    r"response\0backend_latency",
    // Envoy shows filters fields of its own, and in no order.
    r"request\0headers",
    r"request\0headers_bytes",
    r"request\0total_size",
    r"response\0headers",
    r"response\0headers_bytes",
    r"response\0total_size",
];

/// Splits `CALLBACK proxy_get_property "PATH" -> ANSWER`, and reduces the answer to what hosts have in common.
fn compared(line: &str) -> (&str, &str, String) {
    let (callback, rest) = line.split_once(" proxy_get_property \"").expect(line);
    let (path, answer) = rest.split_once("\" -> ").expect(line);
    let common = match answer.split_once(' ') {
        Some((status, _)) if OWN.contains(&path) => format!("{status} and something"),
        _ => answer.to_owned(),
    };
    (callback, path, common)
}

/// Runs a script of properties in our host and in Envoy; gives what differs, but for `except`: callback and path.
fn differences(script: &str, request: &RequestPlan, except: &[(&str, &str)]) -> Vec<String> {
    let run = |host: HostKind| {
        let mut calls = Calls::start(host, script).unwrap_or_else(|error| panic!("{error}"));
        calls.request(request.clone(), "").unwrap_or_else(|error| panic!("{error}"))
    };
    let (ours, theirs) = (run(HostKind::Standalone), run(HostKind::Envoy));
    assert_eq!(ours.len(), theirs.len());
    assert_eq!(ours.len(), script.lines().count());
    let pairs = ours.iter().zip(&theirs).map(|(ours, theirs)| (compared(ours), compared(theirs)));
    pairs
        .filter(|(ours, theirs)| ours != theirs && !except.contains(&(ours.0, ours.1)))
        .map(|(ours, theirs)| format!("{} {}: ours {}, Envoy's {}", ours.0, ours.1, ours.2, theirs.2))
        .collect()
}

#[test]
fn attributes_are_those_of_envoy_in_every_callback() {
    let mut paths: Vec<String> = BARE.split_whitespace().map(str::to_owned).collect();
    for (group, names) in ATTRIBUTES {
        paths.extend(names.split_whitespace().map(|name| format!("{group}\\0{name}")));
    }
    let callbacks = [
        "context_create",
        "request_headers",
        "request_end",
        "response_headers",
        "response_end",
        "log",
        "done",
        "delete",
    ];
    let lines: Vec<String> = callbacks
        .iter()
        .flat_map(|callback| paths.iter().map(move |path| format!("{callback}: proxy_get_property \"{path}\"")))
        .collect();
    let mut request = RequestPlan::new("POST", "/p/a?q=1");
    for (name, value) in [("x-dup", "a"), ("x-dup", "b"), ("referer", "r"), ("user-agent", "u")] {
        request.fields.push(name, value);
    }
    request.body = vec![b"hello".to_vec()];
    // Envoy chooses an upstream's endpoint before it has a connection to it; and it is told of a body's end by itself.
    let upstream = ["address", "port", "locality", "transport_failure_reason", "request_attempt_count"];
    let upstream = upstream.map(|name| format!(r"upstream\0{name}"));
    let except: Vec<(&str, &str)> = upstream
        .iter()
        .map(String::as_str)
        .chain([r"xds\0upstream_host_metadata", r"xds\0upstream_host_locality_metadata"])
        .map(|path| ("request_end", path))
        .chain([("response_end", r"response\0size")])
        .collect();
    let differ = differences(&lines.join("\n"), &request, &except);
    assert!(differ.is_empty(), "{} lines\n{}", differ.len(), differ.join("\n"));
}

/// The lines of a table of expressions that the host's own tests use, too: an expression and what is behind it.
fn expressions(table: &str) -> Vec<(String, String)> {
    let file = portcullis_tests::places::workspace().join("host/abi/testdata/expressions").join(table);
    let lines = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    let lines = lines.lines().filter_map(|line| line.split_once(" => "));
    lines.map(|(source, answer)| (source.to_owned(), answer.to_owned())).collect()
}

/// Has hosts evaluate expressions in a stream.
fn check_expressions(hosts: &[HostKind], rows: &[(String, String)]) {
    let mut script = "request_headers: proxy_set_property \"foo\" \"v\"".to_owned();
    for (source, _) in rows {
        let source = source.replace('\\', "\\\\").replace('"', "\\\"").replace(';', "\\x3b");
        script.push_str(&format!("\nrequest_headers: proxy_call_foreign_function \"expr_create\" \"{source}\""));
        script.push_str("\nrequest_headers: proxy_call_foreign_function \"expr_evaluate\" $");
    }
    for host in hosts {
        let mut request = RequestPlan::new("GET", "/p/a?q=1");
        for (name, value) in [("accept", "*/*"), ("x-a", "1"), ("x-a", "2")] {
            request.fields.push(name, value);
        }
        let seen = Calls::start(*host, &script).and_then(|mut calls| calls.request(request, ""));
        let seen = seen.unwrap_or_else(|error| panic!("{}: {error}", host.name()));
        assert_eq!(seen.len(), 1 + 2 * rows.len(), "{}", host.name());
        let mut differ = Vec::new();
        for (calls, (source, expected)) in seen[1..].chunks_exact(2).zip(rows) {
            let answers = calls.iter().filter_map(|line| Some(line.rsplit_once(" -> ")?.1)).collect::<Vec<_>>();
            let answer = answers.iter().find(|answer| !answer.starts_with("0 ")).or(answers.last());
            let answer = answer
                .map_or("", |answer| answer.strip_suffix(" \"\"").filter(|status| *status != "0").unwrap_or(answer));
            if answer != expected {
                differ.push(format!("{source}\n  expected {expected}\n  came to  {answer}"));
            }
        }
        assert!(differ.is_empty(), "{}\n{}", host.name(), differ.join("\n"));
    }
}

#[test]
fn expressions_come_to_the_same_in_every_host() {
    let everywhere = [HostKind::Harness, HostKind::Standalone, HostKind::Envoy];
    check_expressions(&everywhere, &expressions("attributes.txt"));
    // A guest may log so many lines at a time.
    for rows in expressions("envoy.txt").chunks(400) {
        check_expressions(&everywhere, rows);
    }
    let (of_envoy, ours): (Vec<_>, Vec<_>) = expressions("deviations.txt")
        .into_iter()
        .map(|(source, answers)| {
            let (theirs, ours) = answers.split_once(" => ").unwrap_or_else(|| panic!("{source}"));
            ((source.clone(), theirs.to_owned()), (source, ours.to_owned()))
        })
        .unzip();
    check_expressions(&[HostKind::Envoy], &of_envoy);
    check_expressions(&everywhere[..2], &ours);
}

#[test]
fn expressions_belong_to_the_root_of_the_context_that_runs() {
    check(
        "-configure: proxy_call_foreign_function \"expr_create\" \"request.path\"\n",
        r#"
        proxy_call_foreign_function "expr_evaluate" "\x00\x00\x00\x00" -> 0 "/p?q"
        proxy_call_foreign_function "expr_create" "plugin_name" -> 0 "\x01\x00\x00\x00"
        proxy_call_foreign_function "expr_evaluate" "\x01\x00\x00\x00" -> 0 "calls"
        proxy_set_effective_context 1 -> 0
        proxy_call_foreign_function "expr_evaluate" "\x00\x00\x00\x00" -> 0 "/p?q"
        proxy_get_property "request\0path" -> 1
        proxy_call_foreign_function "expr_delete" "\x00\x00\x00\x00" -> 0 ""
        proxy_call_foreign_function "expr_delete" "\x00\x00\x00\x00" -> 0 ""
        proxy_call_foreign_function "expr_evaluate" "\x00\x00\x00\x00" -> 1 ""
        proxy_call_foreign_function "expr_create" "1" -> 0 "\x02\x00\x00\x00"
        proxy_call_foreign_function "expr_create" "" -> 2 ""
        proxy_call_foreign_function "expr_create" "\xff" -> 2 ""
        proxy_call_foreign_function "expr_evaluate" "" -> 2 ""
        proxy_call_foreign_function "expr_evaluate" "\x00\x00\x00\x00\x00" -> 2 ""
        proxy_call_foreign_function "expr_delete" "\x00" -> 2 ""
        "#,
    );
}

/// A file of keys and signatures that the host's own tests use, too.
fn vector(name: &str) -> Vec<u8> {
    let file = portcullis_tests::places::workspace().join("host/abi/testdata/signatures").join(name);
    std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// A call of a foreign function whose argument has these length-delimited fields.
fn foreign(function: &str, fields: &[(u8, &[u8])]) -> String {
    let mut argument = String::new();
    for (number, contents) in fields {
        let len = contents.len();
        assert!(len < 1 << 14);
        for byte in [number << 3 | 2, len as u8 | 0x80, (len >> 7) as u8].iter().chain(*contents) {
            argument.push_str(&format!("\\x{byte:02x}"));
        }
    }
    format!("proxy_call_foreign_function \"{function}\" \"{argument}\"")
}

/// A short answer as the log shows it: a truth value, or an error as this field.
fn verdict(error: Option<(u8, &str)>) -> String {
    match error {
        None => r#"0 "\x08\x01""#.to_owned(),
        Some((number, text)) => {
            let field = [&[number << 3 | 2, text.len() as u8], text.as_bytes()].concat();
            format!("0 \"{}\"", field.escape_ascii())
        }
    }
}

#[test]
fn signatures_are_checked_and_made_alike() {
    let (text, rsa, rsa_public) = (vector("text"), vector("rsa.pem"), vector("rsa-public.pem"));
    let (sha256, pss, p256) = (vector("rsa-sha256.sig"), vector("rsa-pss.sig"), vector("p256-public.pem"));
    let verify = |hash: &str, pem: &[u8], signature: &[u8]| {
        foreign("verify_signature", &[(1, hash.as_bytes()), (5, pem), (3, signature), (4, &text)])
    };
    let sign = |hash: &str, pem: &[u8]| foreign("sign", &[(1, hash.as_bytes()), (4, pem), (3, &text)]);
    let bad_key = Some((2, "Failed to initialize digest verify."));
    let bad_signature = Some((2, "Failed to verify digest. Error code: 0"));
    let no_key = Some((3, "Invalid key type: private key required for signing operation."));
    let odd_key = Some((3, "Invalid private key: key data is corrupted or malformed."));
    let made = format!("0 \"\\x08\\x01\\x12\\x80\\x02{}\"", sha256.escape_ascii());
    let rows = [
        (verify("sha256", &rsa_public, &sha256), verdict(None)),
        (verify("SHA256", &rsa_public, &sha256), verdict(None)),
        (verify("sha256", &[b"text\n", rsa_public.as_slice()].concat(), &sha256), verdict(None)),
        (verify("sha384", &p256, &vector("p256-sha384.sig")), verdict(None)),
        (verify("sha256", &rsa_public, &pss), verdict(bad_signature)),
        (verify("sha256", &p256, &[1; 64]), verdict(bad_signature)),
        (verify("sha256", &vector("k256-public.pem"), &sha256), verdict(bad_key)),
        (verify("sha256", &vector("ed25519-public.pem"), &sha256), verdict(bad_key)),
        (verify("sha256", &rsa, &sha256), verdict(bad_key)),
        (verify("sha256", b"junk", &sha256), verdict(bad_key)),
        (verify("md5", b"junk", &sha256), verdict(Some((2, "md5 is not supported.")))),
        (verify("sha256", b"", &sha256), "2 \"\"".to_owned()),
        (verify("\u{7f}", b"\xff", &sha256), "2 \"\"".to_owned()),
        (sign("sha256", &rsa), made.clone()),
        (sign("Sha256", &vector("rsa-pkcs1.pem")), made),
        (sign("sha256", &vector("k256.pem")), verdict(no_key)),
        (sign("sha256", &vector("ed25519.pem")), verdict(odd_key)),
        (sign("sha256", &rsa_public), verdict(no_key)),
        (sign("sha256", b"junk"), verdict(no_key)),
        (sign("sha256", b""), "2 \"\"".to_owned()),
    ];
    let lines: String = rows.iter().map(|(call, answer)| format!("{call} -> {answer}\n")).collect();
    check("", &lines);
}
