//! The `portcullis` binary as its users meet it: exit codes, what it says, signals.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

/// How long a test waits for what must happen. Reached only when it fails.
const PATIENCE: Duration = Duration::from_secs(30);

fn portcullis() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_portcullis"));
    command.env_remove("PORTCULLIS_LOG");
    command
}

fn run(arguments: &[&str]) -> Output {
    portcullis().args(arguments).stdin(Stdio::null()).output().expect("the binary to run")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Runs a command that must fail without a word on standard output; gives what it said on standard error.
fn check_failure(arguments: &[&str], code: i32) -> String {
    let output = run(arguments);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert_eq!(text(&output.stdout), "", "{said}");
    said
}

fn write_policy(folder: &Path, rest: &str) -> PathBuf {
    let path = folder.join("portcullis.yaml");
    let yaml = format!(
        "version: 1\nworkers: 1\nadmin: {{ address: \"127.0.0.1:0\" }}\n\
         listeners: [{{ name: public, address: \"127.0.0.1:0\" }}]\n{rest}\n"
    );
    std::fs::write(&path, yaml).expect("a policy file");
    path
}

const HELLO: &str = "routes: [{ name: hello, respond: { status: 200, body: hello } }]";

/// `portcullis serve` with a policy, once it listens.
struct Served {
    child: Child,
    lines: BufReader<std::process::ChildStderr>,
    address: SocketAddr,
    ready: serde_json::Value,
}

impl Served {
    fn start(policy: &Path) -> Served {
        Served::start_with(policy, &[])
    }

    fn start_with(policy: &Path, options: &[&str]) -> Served {
        let ready_file = policy.with_file_name("ready.json");
        let mut child = portcullis()
            .arg("serve")
            .arg(policy)
            .args(options)
            .arg("--ready-file")
            .arg(&ready_file)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary to start");
        let lines = BufReader::new(child.stderr.take().expect("standard error"));
        let mut served =
            Served { child, lines, address: SocketAddr::from(([0, 0, 0, 0], 0)), ready: serde_json::Value::Null };
        let line = served.wait_for("admin on http://");
        assert!(line.contains("127.0.0.1:"), "{line}");
        // The file follows the lines; the connection below can be made only when the sockets listen.
        let deadline = std::time::Instant::now() + PATIENCE;
        while !ready_file.exists() {
            assert!(std::time::Instant::now() < deadline, "no ready file");
            std::thread::yield_now();
        }
        let ready: serde_json::Value =
            serde_json::from_slice(&std::fs::read(&ready_file).expect("the ready file")).expect("JSON");
        served.address = ready["listeners"]["public"].as_str().expect("an address").parse().expect("an address");
        served.ready = ready;
        served
    }

    /// Reads the log up to a line that contains `what`.
    fn wait_for(&mut self, what: &str) -> String {
        let mut seen = String::new();
        loop {
            let mut line = String::new();
            let count = self.lines.read_line(&mut line).expect("a line");
            assert!(count > 0, "the log ended without `{what}`:\n{seen}");
            seen.push_str(&line);
            if line.contains(what) {
                return seen;
            }
        }
    }

    fn get(&self, path: &str) -> String {
        get(self.address, path)
    }

    fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status();
        assert!(sent.expect("`kill` to run").success());
    }

    fn end(mut self) -> (ExitStatus, String) {
        let mut access_log = String::new();
        let mut out = self.child.stdout.take().expect("standard output");
        let reader = std::thread::spawn(move || {
            out.read_to_string(&mut access_log).expect("text");
            access_log
        });
        let status = self.child.wait().expect("an end");
        (status, reader.join().expect("the access log"))
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(PATIENCE)).expect("a read timeout");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").expect("to send");
    let mut response = String::new();
    stream.read_to_string(&mut response).expect("a response");
    response
}

#[test]
fn says_its_version_and_refuses_what_it_does_not_know() {
    let output = run(&["--version"]);
    assert_eq!(text(&output.stdout), format!("portcullis {}\n", env!("CARGO_PKG_VERSION")));
    assert!(check_failure(&["sreve"], 2).contains("serve"));
    assert!(check_failure(&["serve", "--prot", "1"], 2).contains("--prot"));
}

#[test]
fn a_missing_policy_file_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("portcullis.yaml");
    for command in ["serve", "check", "envoy-config"] {
        let said = check_failure(&[command, &path.display().to_string()], 2);
        assert!(said.contains("there is no such file") && said.contains(&path.display().to_string()), "{said}");
        assert!(said.contains("hint: "), "{said}");
    }
}

#[test]
fn a_mistake_in_the_policy_is_shown_with_its_line() {
    let folder = tempfile::tempdir().expect("a folder");
    for (rest, what) in [
        ("routes: [{ name: hello, respnd: { status: 200 } }]", "respond"),
        ("routes: [{ name: hello, respond: { status: 99 } }]", "status"),
        ("routes: [", ""),
        (
            "filters: [{ name: a, wasm: missing.wasm }]\nroutes: [{ name: hello, respond: { status: 200 } }]",
            "missing.wasm",
        ),
    ] {
        let policy = write_policy(folder.path(), rest).display().to_string();
        for command in ["serve", "check"] {
            let said = check_failure(&[command, &policy], 2);
            assert!(
                said.starts_with("error: ") && said.contains(&format!("{policy}:")) && said.contains(what),
                "{said}"
            );
        }
    }
}

#[test]
fn a_module_without_the_abi_is_refused_and_so_is_a_port_in_use() {
    let folder = tempfile::tempdir().expect("a folder");
    // The smallest module there is.
    std::fs::write(folder.path().join("empty.wasm"), b"\0asm\x01\0\0\0").expect("a module");
    let policy = write_policy(
        folder.path(),
        "filters: [{ name: empty, wasm: empty.wasm }]\nroutes: [{ name: hello, respond: { status: 200 } }]",
    );
    for command in ["serve", "check"] {
        let said = check_failure(&[command, &policy.display().to_string()], 2);
        assert!(said.contains("filter `empty`") && said.contains("proxy_abi_version_0_2_1"), "{said}");
    }

    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("an address").to_string();
    let yaml = std::fs::read_to_string(write_policy(folder.path(), HELLO)).expect("the policy");
    std::fs::write(
        &policy,
        yaml.replace("name: public, address: \"127.0.0.1:0\"", &format!("name: public, address: \"{address}\"")),
    )
    .expect("a policy");
    let said = check_failure(&["serve", &policy.display().to_string()], 1);
    assert!(said.contains("listener `public`") && said.contains(&address) && said.contains("hint: "), "{said}");
}

#[test]
fn check_sums_up_what_it_found() {
    let folder = tempfile::tempdir().expect("a folder");
    let policy = write_policy(folder.path(), HELLO).display().to_string();
    let output = run(&["check", &policy]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert_eq!(text(&output.stdout), format!("{policy}: ok (1 listener, 0 filters, 0 upstreams, 1 route)\n"));
}

#[test]
fn serves_reloads_and_ends_by_signals() {
    let folder = tempfile::tempdir().expect("a folder");
    let policy = write_policy(folder.path(), HELLO);
    let mut served = Served::start(&policy);
    assert!(served.get("/").ends_with("\r\n\r\nhello"));
    assert_eq!(served.ready["pid"], served.child.id());
    let admin: SocketAddr = served.ready["admin"].as_str().expect("an address").parse().expect("an address");
    assert!(get(admin, "/readyz").ends_with("ready\n"));

    write_policy(folder.path(), &HELLO.replace("body: hello", "body: good day"));
    served.signal("HUP");
    served.wait_for("is in force");
    assert!(served.get("/").ends_with("good day"));

    write_policy(folder.path(), "routes: nonsense");
    served.signal("HUP");
    let said = served.wait_for("routes");
    assert!(said.contains("the running policy stays in force"), "{said}");
    assert!(served.get("/").ends_with("good day"));

    served.signal("TERM");
    served.wait_for("ended");
    let (status, access_log) = served.end();
    assert!(status.success(), "{status}");
    assert_eq!(access_log.lines().count(), 3, "{access_log}");
    assert!(access_log.lines().all(|line| line.contains(" GET / 200 direct_response ")), "{access_log}");
}

#[test]
fn serve_warns_of_what_filters_do_in_vain_where_that_is_asked_for() {
    let folder = tempfile::tempdir().expect("a folder");
    // Asks for the request's path when that is gone, and notes the status.
    let module = r#"(module
        (import "env" "proxy_get_header_map_value" (func $get (param i32 i32 i32 i32 i32) (result i32)))
        (import "env" "proxy_add_header_map_value" (func $add (param i32 i32 i32 i32 i32) (result i32)))
        (memory (export "memory") 1)
        (data (i32.const 16) ":pathx-answer")
        (func (export "proxy_abi_version_0_2_1"))
        (func (export "malloc") (param i32) (result i32) (i32.const 1024))
        (func (export "proxy_on_response_headers") (param i32 i32 i32) (result i32)
            (i32.store8 (i32.const 64)
                (i32.add (i32.const 48) (call $get (i32.const 0) (i32.const 16) (i32.const 5) (i32.const 96) (i32.const 100))))
            (call $add (i32.const 2) (i32.const 21) (i32.const 8) (i32.const 64) (i32.const 1))))"#;
    std::fs::write(folder.path().join("late.wasm"), wat::parse_str(module).expect("a module")).expect("a file");
    let policy = write_policy(
        folder.path(),
        "filters: [{ name: late, wasm: late.wasm }]\n\
         routes: [{ name: hello, filters: [late], respond: { status: 200 } }]",
    );
    let said = |options: &[&str]| {
        let mut served = Served::start_with(&policy, options);
        let response = served.get("/");
        assert!(response.contains("\r\nx-answer: 2\r\n"), "{response}");
        served.signal("TERM");
        let said = served.wait_for("ended");
        assert!(served.end().0.success());
        said
    };
    let warned = said(&["--lint"]);
    let line = warned.lines().find(|line| line.contains("BadArgument (2)")).expect("a warning");
    assert!(line.contains(" WARN ") && line.contains("on which SDKs panic: "), "{line}");
    for part in ["filter=\"late\"", "callback=\"proxy_on_response_headers\"", "call=\"proxy_get_header_map_value\""] {
        assert!(line.contains(part), "{line}");
    }
    let silent = said(&[]);
    assert!(!silent.contains("BadArgument"), "{silent}");
}

#[test]
fn a_ready_file_of_an_earlier_start_is_gone_from_the_beginning() {
    let folder = tempfile::tempdir().expect("a folder");
    let ready_file = folder.path().join("ready.json");
    std::fs::write(&ready_file, r#"{"listeners":{"public":"127.0.0.1:1"}}"#).expect("a file");
    let policy = write_policy(folder.path(), "routes: [").display().to_string();
    let ready = ready_file.display().to_string();
    check_failure(&["serve", &policy, "--ready-file", &ready], 2);
    assert!(!ready_file.exists());
    // A folder cannot be replaced by a file: said before anything is served.
    let said = check_failure(&["serve", &policy, "--ready-file", &folder.path().display().to_string()], 2);
    assert!(said.contains("ready file") && said.contains("hint: "), "{said}");
}

#[test]
fn a_ready_file_that_cannot_be_written_ends_it() {
    let folder = tempfile::tempdir().expect("a folder");
    let policy = write_policy(folder.path(), HELLO).display().to_string();
    let said = text(&run(&["serve", &policy, "--ready-file", "/nonexistent/ready.json"]).stderr);
    assert!(said.contains("/nonexistent/ready.json") && said.contains("hint: "), "{said}");
}

#[test]
fn renders_for_envoy() {
    let folder = tempfile::tempdir().expect("a folder");
    let policy = write_policy(folder.path(), HELLO).display().to_string();
    let output = run(&["envoy-config", &policy]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("static_resources:"));
    let filters = text(&run(&["envoy-config", "--http-filters", &policy]).stdout);
    assert!(filters.contains("http_filters:") && !filters.contains("static_resources:"), "{filters}");
    let said = check_failure(&["envoy-config", &policy, "--listen", "other=127.0.0.1:1"], 2);
    assert!(said.contains("there is no listener `other`"), "{said}");
    let file = folder.path().join("envoy.yaml");
    let output =
        run(&["envoy-config", &policy, "--listen", "public=127.0.0.1:18080", "-o", &file.display().to_string()]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    assert!(std::fs::read_to_string(&file).expect("the rendering").contains("18080"));
}

#[test]
fn completes_shells() {
    for shell in ["bash", "zsh", "fish"] {
        let output = run(&["completions", shell]);
        assert!(output.status.success() && text(&output.stdout).contains("envoy-config"), "{shell}");
    }
}
