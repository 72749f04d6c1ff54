//! What a running Envoy does with a rendering, beside routing (`envoy_routes.rs`): capabilities, metrics, limits.

mod support;

use portcullis_config::Policy;

struct Running {
    folder: tempfile::TempDir,
    envoy: support::Envoy,
}

impl Running {
    fn new(filters: &str, listener: &str) -> Self {
        Self::with("", filters, listener)
    }

    fn with(head: &str, filters: &str, listener: &str) -> Self {
        let folder = support::folder();
        let text = format!(
            "version: 1\n{head}\nlisteners: [{{ name: public, address: \"127.0.0.1:8080\"{listener} }}]\nfilters: [{filters}]\n\
             upstreams: {{ echo: {{ endpoints: [\"{}\"] }} }}\nroutes: [{{ name: all, upstream: echo }}]\n",
            support::echo("echo")
        );
        let policy: Policy = support::policy_in(folder.path(), &text);
        Self { envoy: support::Envoy::start(folder.path(), &policy), folder }
    }

    fn ask(&self, fields: &str) -> Option<support::Answer> {
        let request = format!("GET / HTTP/1.1\r\nhost: a.test\r\nconnection: close\r\n{fields}\r\n");
        support::exchange(self.envoy.listeners["public"], request.as_bytes())
    }

    fn status(&self, fields: &str) -> Option<u16> {
        self.ask(fields).map(|answer| answer.status)
    }

    /// The field lines that the upstream got, in lower case.
    fn upstream_fields(&self, fields: &str) -> String {
        let answer = self.ask(fields).expect("an answer");
        String::from_utf8_lossy(&answer.body).to_ascii_lowercase()
    }

    /// The client's address in the last line of the access log.
    fn logged_client(&self, requests: usize) -> String {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            let log = std::fs::read_to_string(self.folder.path().join("access.log")).expect("the access log");
            if log.lines().count() >= requests {
                let client = log.lines().last().and_then(|line| line.split(" client=").nth(1));
                return client.and_then(|client| client.split(' ').next()).unwrap_or_default().to_owned();
            }
            assert!(std::time::Instant::now() < deadline, "the access log has fewer than {requests} lines:\n{log}");
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

#[test]
fn a_filter_denies() {
    let running = Running::new("{ name: deny, wasm: deny.wasm }", "");
    assert_eq!(running.status(""), Some(403));
}

#[test]
fn callbacks_are_delivered_although_the_allow_list_names_none() {
    let running = Running::new("{ name: deny, wasm: deny.wasm, capabilities: [proxy_send_local_response] }", "");
    assert_eq!(running.status(""), Some(403));
}

#[test]
fn host_functions_that_the_allow_list_does_not_name_are_refused() {
    // The filter cannot answer, and holds the request for ever: had it been let through, this would be 200.
    let running = Running::new("{ name: deny, wasm: deny.wasm, capabilities: [proxy_log] }", "");
    let listener = running.envoy.listeners["public"];
    let request = b"GET / HTTP/1.1\r\nhost: a.test\r\n\r\n";
    assert!(support::nothing_comes(listener, request, std::time::Duration::from_millis(500)));
    let log = std::fs::read_to_string(running.folder.path().join("envoy.log")).expect("the log");
    assert!(log.contains("proxy_send_local_response"), "{log}");
}

#[test]
fn metric_names_become_labels() {
    let running = Running::new("{ name: probe, wasm: pass.wasm }", "");
    assert_eq!(running.status(""), Some(200));
    let metrics = running.envoy.admin_get("/stats/prometheus").expect("metrics");
    let metrics = String::from_utf8(metrics.body).expect("text");
    let line = metrics.lines().find(|line| line.starts_with("portcullis_probe_denied_total{"));
    let line = line.unwrap_or_else(|| panic!("no such metric in\n{metrics}"));
    assert!(line.starts_with("portcullis_probe_denied_total{rule=\"orders-v1\",reason=\"token_expired\"} "), "{line}");
}

#[test]
fn limits_of_a_listener_hold() {
    let running = Running::new("", ", limits: { header_bytes: 4KiB, header_count: 8, header_timeout: 300ms }");
    assert_eq!(running.status(""), Some(200));
    assert_eq!(running.status(&"x-a: b\r\n".repeat(9)), Some(431));
    assert_eq!(running.status(&format!("x-a: {}\r\n", "b".repeat(5000))), Some(431));
    // Fields that never end.
    let listener = running.envoy.listeners["public"];
    assert_eq!(
        support::exchange(listener, b"GET / HTTP/1.1\r\nhost: a.test\r\n").map(|answer| answer.status),
        Some(408)
    );
}

#[test]
fn what_a_client_says_about_itself_is_not_believed() {
    let running = Running::with("trusted_proxies: [\"10.0.0.0/8\"]", "", "");
    let upstream = running.upstream_fields("x-forwarded-for: 192.0.2.7\r\nx-forwarded-proto: https\r\n");
    assert!(upstream.contains("x-forwarded-proto: http\r\n"), "{upstream}");
    assert_eq!(running.logged_client(1), "127.0.0.1");
}

#[test]
fn what_a_trusted_proxy_says_is_believed_up_to_the_first_address_that_is_not_one() {
    let running = Running::with("trusted_proxies: [\"10.0.0.0/8\", \"127.0.0.0/8\"]", "", "");
    let said = "x-forwarded-for: 198.51.100.1, 192.0.2.7, 10.1.2.3\r\nx-forwarded-proto: https\r\n";
    let upstream = running.upstream_fields(said);
    assert!(upstream.contains("x-forwarded-proto: https\r\n"), "{upstream}");
    assert_eq!(running.logged_client(1), "192.0.2.7");
}

#[test]
fn clients_cannot_give_orders_to_envoy() {
    for head in ["", "trusted_proxies: [\"127.0.0.0/8\"]"] {
        let running = Running::with(head, "", "");
        let upstream = running.upstream_fields(
            "x-envoy-upstream-rq-timeout-ms: 1\r\nx-envoy-original-path: /x\r\nx-envoy-internal: true\r\nx-request-id: mine\r\n",
        );
        assert!(!upstream.contains("x-envoy-"), "{upstream}");
        assert!(upstream.contains("x-request-id: ") && !upstream.contains("mine"), "{upstream}");
    }
}

#[test]
fn tls_is_served() {
    let running = Running::new("", ", tls: { certificate: server.pem, private_key: server.key }");
    let address = running.envoy.listeners["public"];
    // Plain HTTP gets no answer there; the handshake is checked by the port that Envoy reports for it.
    assert!(support::exchange(address, b"GET / HTTP/1.1\r\nhost: a.test\r\nconnection: close\r\n\r\n").is_none());
    let certificates = running.envoy.admin_get("/certs").expect("certificates");
    let certificates = String::from_utf8_lossy(&certificates.body).into_owned();
    assert!(certificates.contains("server.pem") && certificates.contains("localhost"), "{certificates}");
}

#[test]
fn connections_beyond_the_limit_are_closed() {
    let running = Running::with("trusted_proxies: [\"127.0.0.0/8\"]", "", ", limits: { max_connections: 2 }");
    let address = running.envoy.listeners["public"];
    let held: Vec<std::net::TcpStream> =
        (0..2).map(|_| std::net::TcpStream::connect(address).expect("a connection")).collect();
    // Envoy takes connections in its own time; the held ones have been counted once the third is refused.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while running.status("").is_some() {
        assert!(std::time::Instant::now() < deadline, "a third connection is served");
    }
    assert_eq!(running.envoy.admin_get("/ready").map(|answer| answer.status), Some(200));
    drop(held);
    while running.status("") != Some(200) {
        assert!(std::time::Instant::now() < deadline, "nothing is served after the connections were closed");
    }
}

#[test]
fn a_listener_for_every_address_takes_ipv4_too() {
    let folder = support::folder();
    let text = "version: 1\nlisteners: [{ name: public, address: \"[::]:8080\" }]\nroutes: [{ name: all, respond: { status: 204 } }]\n";
    let policy: Policy = support::policy_in(folder.path(), text);
    let envoy = support::Envoy::start_at(folder.path(), &policy, ([0_u16; 8], 0).into());
    let address = ([127, 0, 0, 1], envoy.listeners["public"].port()).into();
    let answer = support::exchange(address, b"GET / HTTP/1.1\r\nhost: a.test\r\nconnection: close\r\n\r\n");
    assert_eq!(answer.map(|answer| answer.status), Some(204));
}
