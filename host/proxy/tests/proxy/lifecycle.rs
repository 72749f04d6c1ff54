//! Starting, reloading and ending: as a whole or not at all.

use std::net::TcpListener;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use portcullis_proxy::{Options, Server, StartError};

use crate::support::{
    Client, Doing, Folder, GUEST_ROUTE, PATIENCE, PLAIN_ROUTE, Proxy, Upstream, answer, counting_guest, denying_guest,
    guest, policy_yaml,
};

fn refused(folder: &Folder, yaml: &str) -> String {
    match Server::prepare(folder.policy(yaml), Options::default()) {
        Ok(_) => panic!("it started"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_port_in_use_is_named_with_what_to_do() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("an address");
    let yaml = policy_yaml(address, PLAIN_ROUTE)
        .replace("name: public, address: \"127.0.0.1:0\"", &format!("name: public, address: \"{address}\""));
    let message = refused(&Folder::new(), &yaml);
    assert_eq!(
        message,
        format!(
            "listener `public`: cannot listen on `{address}`: the address is in use\n  hint: another program listens \
             there (`ss -ltnp` shows which); stop it or choose another port"
        )
    );
}

#[test]
fn a_second_instance_is_refused_though_workers_share_ports() {
    let upstream = Upstream::echo();
    let proxy = Proxy::start(Folder::new().policy(&policy_yaml(upstream.address, PLAIN_ROUTE)));
    let yaml = policy_yaml(upstream.address, PLAIN_ROUTE)
        .replace("name: public, address: \"127.0.0.1:0\"", &format!("name: public, address: \"{}\"", proxy.address()));
    assert!(refused(&Folder::new(), &yaml).contains("the address is in use"));
}

#[test]
fn nothing_is_left_behind_when_a_filter_does_not_start() {
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        listener.local_addr().expect("an address")
    };
    let folder = Folder::new();
    let wasm = guest(
        &[("line", b"config: $.rules: must not be empty")],
        r#"(func (export "proxy_on_configure") (param i32 i32) (result i32)
            (drop (call $log (i32.const 4) @line))
            (i32.const 0))"#,
    );
    folder.write("guest.wasm", wasm);
    let yaml = policy_yaml(port, GUEST_ROUTE)
        .replace("name: public, address: \"127.0.0.1:0\"", &format!("name: public, address: \"{port}\""));
    let message = refused(&folder, &yaml);
    assert!(message.starts_with("filter `guest`: "), "{message}");
    assert!(message.contains("config: $.rules: must not be empty"), "{message}");
    TcpListener::bind(port).expect("the port to be free again");
}

#[test]
fn a_module_that_is_no_filter_is_named_with_what_it_lacks() {
    let folder = Folder::new();
    let upstream = Upstream::echo();
    let yaml = policy_yaml(upstream.address, GUEST_ROUTE);
    folder.write("guest.wasm", wat::parse_str("(module (memory (export \"memory\") 1))").expect("a module"));
    let message = refused(&folder, &yaml);
    assert!(message.starts_with("filter `guest` (") && message.contains("guest.wasm): "), "{message}");
    assert!(message.contains("proxy_abi_version_0_2_1"), "{message}");

    folder.write(
        "guest.wasm",
        wat::parse_str("(module (memory (export \"memory\") 1) (func (export \"proxy_abi_version_0_2_1\")))")
            .expect("a module"),
    );
    let message = refused(&folder, &yaml);
    assert!(message.contains("`proxy_on_memory_allocate`"), "{message}");
}

#[test]
fn a_reload_changes_over_new_requests_and_lets_old_ones_end() {
    let (tell, told) = channel();
    let told = Arc::new(Mutex::new(told));
    let (began, has_begun) = channel();
    let upstream = Upstream::start(move |_| {
        began.send(()).expect("a waiting test");
        Doing::AnswerWhenTold(answer("from the upstream"), Arc::clone(&told))
    });
    let folder = Folder::new();
    folder.write("guest.wasm", counting_guest());
    let proxy = Proxy::start(folder.policy(&policy_yaml(upstream.address, GUEST_ROUTE)));
    let mut old = Client::connect(proxy.address());
    old.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    has_begun.recv_timeout(PATIENCE).expect("the request at the upstream");

    folder.write("guest.wasm", denying_guest());
    proxy.handle.reload(folder.policy(&policy_yaml(upstream.address, GUEST_ROUTE))).expect("a reload");
    assert_eq!(proxy.get("/").status, 403);
    tell.send(()).expect("a waiting upstream");
    assert_eq!(old.response(false).expect("a response").text(), "from the upstream");
    proxy.wait_for_metric("logged_total", 1.0);
    // The same connection takes the new policy with its next request.
    assert_eq!(old.exchange("GET / HTTP/1.1\r\nHost: a\r\n\r\n").status, 403);
    assert_eq!(proxy.metric("portcullis_reloads_total{result=\"ok\"}"), 1.0);
}

#[test]
fn a_policy_that_cannot_run_leaves_the_running_one_in_force() {
    let upstream = Upstream::echo();
    let folder = Folder::new();
    folder.write("guest.wasm", denying_guest());
    let yaml = policy_yaml(upstream.address, GUEST_ROUTE);
    let proxy = Proxy::start(folder.policy(&yaml));

    folder.write(
        "guest.wasm",
        guest(&[], r#"(func (export "proxy_on_configure") (param i32 i32) (result i32) (i32.const 0))"#),
    );
    let error = proxy.handle.reload(folder.policy(&yaml)).expect_err("a filter that refuses");
    assert!(matches!(error, StartError::Filter(_)), "{error}");
    assert_eq!(proxy.get("/").status, 403);

    let error =
        proxy.handle.reload(folder.policy(&yaml.replace("workers: 1", "workers: 2"))).expect_err("other workers");
    assert_eq!(
        error.to_string(),
        "`workers` cannot change while running\n  hint: restart, or undo that change and reload again"
    );
    assert_eq!(proxy.get("/").status, 403);
    assert_eq!(proxy.metric("portcullis_reloads_total{result=\"failed\"}"), 2.0);
}

#[test]
fn ends_after_the_requests_under_way() {
    let (tell, told) = channel();
    let told = Arc::new(Mutex::new(told));
    let (began, has_begun) = channel();
    let upstream = Upstream::start(move |_| {
        began.send(()).expect("a waiting test");
        Doing::AnswerWhenTold(answer("late"), Arc::clone(&told))
    });
    let mut proxy = Proxy::start(Folder::new().policy(&policy_yaml(upstream.address, PLAIN_ROUTE)));
    let address = proxy.address();
    let mut client = Client::connect(address);
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    has_begun.recv_timeout(PATIENCE).expect("the request at the upstream");
    let mut idle = Client::connect(address);
    proxy.handle.shutdown();
    assert!(idle.is_closed(), "a connection without a request ends at once");
    assert!(!proxy.handle.is_accepting() || proxy.admin("/readyz").status == 503);
    tell.send(()).expect("a waiting upstream");
    assert_eq!(client.response(false).expect("the response").text(), "late");
    proxy.join().expect("a good end");
    assert!(std::net::TcpStream::connect(address).is_err(), "nobody listens any more");
}

#[test]
fn ends_at_once_when_told_twice_and_ends_its_requests_in_the_filters() {
    let (_never, told) = channel();
    let told = Arc::new(Mutex::new(told));
    let (began, has_begun) = channel();
    let upstream = Upstream::start(move |_| {
        began.send(()).expect("a waiting test");
        Doing::AnswerWhenTold(answer("never"), Arc::clone(&told))
    });
    let mut proxy = Proxy::start(Folder::new().policy(&policy_yaml(upstream.address, PLAIN_ROUTE)));
    let mut client = Client::connect(proxy.address());
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    has_begun.recv_timeout(PATIENCE).expect("the request at the upstream");
    proxy.handle.shutdown();
    proxy.handle.shutdown_now();
    proxy.join().expect("a good end");
    assert!(client.is_closed());
}

#[test]
fn the_drain_time_bounds_the_end() {
    let (_never, told) = channel();
    let told = Arc::new(Mutex::new(told));
    let (began, has_begun) = channel();
    let upstream = Upstream::start(move |_| {
        began.send(()).expect("a waiting test");
        Doing::AnswerWhenTold(answer("never"), Arc::clone(&told))
    });
    let policy = Folder::new().policy(&policy_yaml(upstream.address, PLAIN_ROUTE));
    let mut proxy = Proxy::start_with(policy, Some(Duration::from_millis(50))).expect("a server");
    let mut client = Client::connect(proxy.address());
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n");
    has_begun.recv_timeout(PATIENCE).expect("the request at the upstream");
    proxy.handle.shutdown();
    proxy.join().expect("a good end");
    assert!(client.is_closed());
}

/// The wire form of a request's fields, for a guest.
fn fields_for(path: &str) -> Vec<u8> {
    let fields = [(":method", "GET"), (":path", path), (":authority", "a")];
    let mut map = (fields.len() as u32).to_le_bytes().to_vec();
    for (name, value) in fields {
        map.extend((name.len() as u32).to_le_bytes());
        map.extend((value.len() as u32).to_le_bytes());
    }
    for (name, value) in fields {
        map.extend(format!("{name}\0{value}\0").bytes());
    }
    map
}

/// A guest whose root context is done once it has told the upstream `api` so, and was answered, in two requests.
fn guest_that_says_goodbye() -> Vec<u8> {
    guest(
        &[("api", b"api"), ("first", &fields_for("/farewell")), ("second", &fields_for("/and-again"))],
        r#"(global $answers (mut i32) (i32.const 0))
        (func (export "proxy_on_done") (param i32) (result i32)
            (drop (call $http_call @api @first (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
                (i32.const 5000) (i32.const 16)))
            (i32.const 0))
        (func (export "proxy_on_http_call_response") (param i32 i32 i32 i32 i32)
            (global.set $answers (i32.add (global.get $answers) (i32.const 1)))
            (if (i32.eq (global.get $answers) (i32.const 1)) (then
                (drop (call $http_call @api @second (i32.const 0) (i32.const 0) (i32.const 0) (i32.const 0)
                    (i32.const 5000) (i32.const 16)))))
            (if (i32.eq (global.get $answers) (i32.const 2)) (then (drop (call $done)))))"#,
    )
}

/// [`GUEST_ROUTE`], for a guest that may ask `api`.
fn route_of_an_asking_guest() -> String {
    GUEST_ROUTE.replace("guest.wasm,", "guest.wasm, allowed_upstreams: [api],")
}

fn paths(upstream: &Upstream) -> Vec<String> {
    upstream.received().iter().map(|request| request.path().to_owned()).collect()
}

#[test]
fn filters_finish_their_last_callouts_before_the_server_ends() {
    let upstream = Upstream::echo();
    let folder = Folder::new();
    folder.write("guest.wasm", guest_that_says_goodbye());
    let proxy = Proxy::start(folder.policy(&policy_yaml(upstream.address, &route_of_an_asking_guest())));
    proxy.end();
    assert_eq!(paths(&upstream), ["/farewell", "/and-again"]);
}

#[test]
fn filters_that_a_reload_replaces_finish_their_last_callouts() {
    let upstream = Upstream::echo();
    let folder = Folder::new();
    folder.write("guest.wasm", guest_that_says_goodbye());
    let proxy = Proxy::start(folder.policy(&policy_yaml(upstream.address, &route_of_an_asking_guest())));
    folder.write("guest.wasm", denying_guest());
    proxy.handle.reload(folder.policy(&policy_yaml(upstream.address, GUEST_ROUTE))).expect("a reload");
    let deadline = std::time::Instant::now() + PATIENCE;
    while paths(&upstream).len() < 2 {
        assert!(std::time::Instant::now() < deadline, "{:?}", paths(&upstream));
        assert_eq!(proxy.get("/").status, 403, "others are served meanwhile");
    }
    assert_eq!(paths(&upstream), ["/farewell", "/and-again"]);
}

/// A guest whose root contexts are never done, and that counts in `ended_total` how many ended all the same.
fn guest_that_is_never_done() -> Vec<u8> {
    guest(
        &[("name", b"ended_total")],
        r#"(func (export "proxy_on_vm_start") (param i32 i32) (result i32)
            (drop (call $define_metric (i32.const 0) @name (i32.const 16)))
            (i32.const 1))
        (func (export "proxy_on_done") (param i32) (result i32) (i32.const 0))
        (func (export "proxy_on_delete") (param i32)
            (drop (call $increment (i32.load (i32.const 16)) (i64.const 1))))"#,
    )
}

#[test]
fn a_filter_that_is_never_done_is_ended_in_the_end() {
    let upstream = Upstream::echo();
    let folder = Folder::new();
    folder.write("guest.wasm", guest_that_is_never_done());
    let policy = folder.policy(&policy_yaml(upstream.address, GUEST_ROUTE));
    let mut proxy = Proxy::start(policy);
    // After a reload the old one has a moment, in which the server goes on.
    proxy.handle.reload(folder.policy(&policy_yaml(upstream.address, GUEST_ROUTE))).expect("a reload");
    assert_eq!(proxy.get("/").status, 200);
    // The context of the request is one of them.
    proxy.wait_for_metric("ended_total", 2.0);
    // Who insists does not have to wait for the new one.
    proxy.handle.shutdown();
    proxy.handle.shutdown_now();
    proxy.join().expect("a good end");
}

#[test]
fn the_admin_endpoints_tell_how_it_is_and_no_secret() {
    let upstream = Upstream::echo();
    let folder = Folder::new();
    folder.write("guest.wasm", counting_guest());
    let route = GUEST_ROUTE.replace("guest.wasm,", "guest.wasm, configuration: { secret: hush },");
    let proxy = Proxy::start(folder.policy(&policy_yaml(upstream.address, &route)));
    assert_eq!(proxy.admin("/healthz").text(), "ok\n");
    assert_eq!(proxy.admin("/readyz").text(), "ready\n");
    assert_eq!(proxy.get("/").status, 200);
    proxy.wait_for_metric("portcullis_responses_total{class=\"2xx\"}", 1.0);
    assert_eq!(proxy.metric("portcullis_requests_total"), 1.0);
    assert_eq!(proxy.metric("portcullis_request_duration_seconds_count"), 1.0);
    assert_eq!(proxy.metric("portcullis_request_duration_seconds_bucket{le=\"+Inf\"}"), 1.0);
    assert_eq!(proxy.metric("logged_total"), 1.0);
    let config = proxy.admin("/config").text();
    assert!(config.contains("guest.wasm") && config.contains(&upstream.address.to_string()), "{config}");
    assert!(!config.contains("hush"), "{config}");
    assert_eq!(proxy.admin("/other").status, 404);
    let address = proxy.handle.admin_address().expect("an admin address");
    let post = Client::connect(address).exchange("POST /metrics HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
    assert_eq!(post.status, 405);
}

#[test]
fn several_workers_serve_one_port() {
    let upstream = Upstream::echo();
    let yaml = policy_yaml(upstream.address, PLAIN_ROUTE).replace("workers: 1", "workers: 4");
    let proxy = Proxy::start(Folder::new().policy(&yaml));
    for _ in 0..50 {
        assert_eq!(proxy.get("/").status, 200);
    }
    proxy.wait_for_metric("portcullis_responses_total{class=\"2xx\"}", 50.0);
}

#[test]
fn check_starts_the_filters_and_nothing_else() {
    let folder = Folder::new();
    folder.write("guest.wasm", denying_guest());
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("an address");
    let yaml = policy_yaml(address, GUEST_ROUTE)
        .replace("name: public, address: \"127.0.0.1:0\"", &format!("name: public, address: \"{address}\""));
    portcullis_proxy::check(folder.policy(&yaml), Options::default()).expect("a policy without mistakes");
    folder.write(
        "guest.wasm",
        guest(&[], r#"(func (export "proxy_on_vm_start") (param i32 i32) (result i32) (i32.const 0))"#),
    );
    assert!(portcullis_proxy::check(folder.policy(&yaml), Options::default()).is_err());
}
