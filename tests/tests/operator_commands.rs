//! `portcullis operators ...` and `portcullis doctor` as their users meet them.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use portcullis_harness::RequestPlan;
use portcullis_tests::process::{DEADLINE, Ended, Process};
use portcullis_tests::server::Server;
use portcullis_tests::{client, places};
use serde_json::Value;

fn portcullis(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(places::portcullis().unwrap_or_else(|error| panic!("{error}")));
    command.current_dir(folder).args(arguments);
    // Tests that run at the same time do not see each other's hosts.
    if folder.starts_with(std::env::temp_dir()) {
        command.env("TMPDIR", folder);
    }
    // The engine is looked for above the current folder, which is not in the checkout here.
    let deno = places::workspace().join(".portcullis/tools/deno-2.9.8/deno");
    if std::env::var_os("PORTCULLIS_DENO").is_none() {
        command.env("PORTCULLIS_DENO", deno);
    }
    command
}

fn run(folder: &Path, arguments: &[&str]) -> Ended {
    Process::run("portcullis", &mut portcullis(folder, arguments)).unwrap_or_else(|error| panic!("{error}"))
}

fn check(folder: &Path, arguments: &[&str], code: i32, said: &[&str]) -> String {
    let ended = run(folder, arguments);
    assert_eq!(ended.status.code(), Some(code), "{arguments:?}\n{}", ended.output);
    for text in said {
        assert!(ended.output.contains(text), "{arguments:?}: nothing says `{text}`:\n{}", ended.output);
    }
    ended.output
}

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

fn write(folder: &Path, name: &str, text: &str) {
    let path = folder.join(name);
    fs::create_dir_all(path.parent().unwrap_or(folder)).expect("a folder");
    fs::write(path, text).expect("a file");
}

fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < DEADLINE, "not within {DEADLINE:?}: {what}");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let response = client::send(address, &RequestPlan::new("GET", path)).unwrap_or_else(|error| panic!("{error}"));
    let response = response.unwrap_or_else(|| panic!("no answer to {path}"));
    (response.status, String::from_utf8_lossy(&response.body).into_owned())
}

/// The address in the line by which `dev` says where it serves.
fn served_at(process: &Process) -> SocketAddr {
    let line = |line: &str| line.split_once(" on http://")?.1.split(',').next()?.trim().parse().ok();
    process.wait_for(line).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn a_new_operator_is_written_checked_and_never_overwritten() {
    let folder = folder();
    let said = check(folder.path(), &["operators", "new", "hello"], 0, &["wrote operators/hello/main.ts", "curl"]);
    assert!(said.contains("wrote portcullis.yaml"), "{said}");
    check(folder.path(), &["operators", "check"], 0, &["hello: ok (1 file, "]);
    check(folder.path(), &["check"], 0, &["1 operator"]);
    check(folder.path(), &["operators", "new", "hello"], 2, &["main.ts", "nothing is overwritten"]);
    check(folder.path(), &["operators", "new", "../x"], 2, &["no name for an operator"]);
    let said = check(folder.path(), &["operators", "new", "second"], 0, &["Add to portcullis.yaml:"]);
    assert!(said.contains("second: { entry: operators/second/main.ts }"), "{said}");
    assert_eq!(
        fs::read_to_string(folder.path().join("portcullis.yaml")).expect("a policy").matches("entry:").count(),
        1
    );
}

#[test]
fn the_examples_load_and_their_types_are_the_ones_that_new_writes() {
    let examples = places::workspace().join("docs/examples");
    let operators = examples.join("operators/portcullis.yaml").display().to_string();
    let said =
        check(&examples, &["operators", "check", &operators], 0, &["notes: ok (2 files, ", "stock: ok (2 files, "]);
    assert!(!said.contains("error"), "{said}");
    check(&examples, &["check", &operators], 0, &["ok (1 listener, 0 filters, 0 upstreams, 2 routes, 2 operators)"]);
    check(&examples, &["check", &examples.join("demo/portcullis.yaml").display().to_string()], 0, &["2 operators"]);
    let read = |path: &str| fs::read_to_string(places::workspace().join(path)).expect("a file");
    assert_eq!(read("docs/examples/operators/operator.d.ts"), read("host/operators/runtime/operator.d.ts"));
}

#[test]
fn check_explains_what_does_not_load_and_what_is_not_there() {
    let folder = folder();
    write(folder.path(), "a/main.ts", "import { x } from './absent';\nexport default { fetch: x };");
    write(folder.path(), "b/main.ts", "const a = 1;\nnull!.x;\nexport default { fetch() {} };");
    let policy = |more: &str| {
        format!(
            "version: 1\nlisteners: [{{ name: public, address: \"127.0.0.1:0\" }}]\nroutes: [{{ name: all, operator: a }}]\n\
             operators:\n  a: {{ entry: a/main.ts{more} }}\n  b: {{ entry: b/main.ts }}\n"
        )
    };
    write(folder.path(), "portcullis.yaml", &policy(""));
    for command in [&["operators", "check"][..], &["check"], &["serve"]] {
        check(
            folder.path(),
            command,
            2,
            &["portcullis.yaml: operator `a`: main.ts:1:19: there is no module `./absent`"],
        );
    }
    check(folder.path(), &["operators", "check"], 2, &["operator `b` cannot be loaded: TypeError", "at main.ts:2:7"]);
    write(
        folder.path(),
        "portcullis.yaml",
        &policy(", permissions: { env: [PORTCULLIS_TEST_ABSENT] }, placement: { cpus: [4000] }"),
    );
    check(
        folder.path(),
        &["check"],
        2,
        &[
            "operators.a.permissions.env[0]: the host's environment has no text in `PORTCULLIS_TEST_ABSENT`",
            "hint: set it before the start",
        ],
    );
}

#[test]
fn dev_loads_what_changes_and_shows_stacks_to_author_and_client() {
    let folder = folder();
    check(folder.path(), &["operators", "new", "hello"], 0, &[]);
    let policy = fs::read_to_string(folder.path().join("portcullis.yaml")).expect("a policy");
    write(folder.path(), "portcullis.yaml", &policy.replace("127.0.0.1:8080", "127.0.0.1:0"));
    let dev = Process::start("operators dev", &mut portcullis(folder.path(), &["operators", "dev"]));
    let dev = dev.unwrap_or_else(|error| panic!("{error}"));
    let address = served_at(&dev);
    let shown = |text: &str| eventually(text, || dev.log().contains(text));
    assert_eq!(get(address, "/hello?name=you"), (200, r#"{"hello":"you"}"#.to_owned()));
    shown("hello[");

    let throws = "import type { Env } from './operator.d.ts';\nexport default {\n  async fetch(_: Request, env: Env) {\n    if (env.REGION) return new Response();\n    throw new Error('at ' + typeof env);\n  },\n};";
    write(folder.path(), "operators/hello/main.ts", throws);
    shown("operators/hello/main.ts changed");
    eventually("it is loaded", || get(address, "/hello").0 == 500);
    let (_, body) = get(address, "/hello");
    let problem: Value = serde_json::from_str(&body).unwrap_or_else(|_| panic!("{body}"));
    assert_eq!(problem["detail"], "Error: at object\n    at Object.fetch (main.ts:5:11)");
    shown("`env.REGION` is not there: add `REGION` to `env` or `secrets` in its `permissions`");
    shown("Error: at object");

    write(folder.path(), "operators/hello/main.ts", "import x from 'npm:left-pad';\nexport default { fetch: x };");
    shown("main.ts:1:15: `npm:left-pad` is a package");
    shown("not loaded: what ran before goes on");
    assert_eq!(get(address, "/hello").0, 500);
    write(folder.path(), "operators/hello/part.ts", "export default () => new Response('parts');");
    write(folder.path(), "operators/hello/main.ts", "import fetch from './part.ts';\nexport default { fetch };");
    eventually("the mended one is loaded", || get(address, "/hello") == (200, "parts".to_owned()));
    write(folder.path(), "portcullis.yaml", "version: 1\n");
    shown("`listeners` is missing");
    assert_eq!(get(address, "/hello").0, 200);

    let status = check(folder.path(), &["operators", "status"], 0, &["hello: ", " requests, ", "MiB"]);
    assert!(!status.contains("WITHOUT") || !is_root(), "{status}");
    check(folder.path(), &["operators", "logs", "hello"], 0, &["Error: at object"]);
    let json = check(folder.path(), &["operators", "logs", "--json"], 0, &["\"operator\":\"hello\""]);
    let line: Value = serde_json::from_str(json.lines().next().unwrap_or_default()).expect("JSON");
    assert!(line["time_milliseconds"].as_u64().is_some_and(|time| time > 1_700_000_000_000), "{line}");
    let mut follow = Process::start("logs", &mut portcullis(folder.path(), &["operators", "logs", "-f"]));
    let follow = follow.as_mut().unwrap_or_else(|error| panic!("{error}"));
    follow.wait_for(|line| line.contains("at object").then_some(())).unwrap_or_else(|error| panic!("{error}"));
    let pid = dev.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().expect("`kill` runs").success());
    // The host's end is the end of whoever follows it.
    assert!(follow.wait().expect("an end").success());
    check(folder.path(), &["operators", "status"], 1, &["no host of this user runs operators"]);
}

#[test]
fn dev_serves_a_single_module_and_waits_for_one_that_does_not_load() {
    let folder = folder();
    write(folder.path(), "one.ts", "export default { nothing: 1 };");
    let arguments = ["operators", "dev", "one.ts", "--listen", "127.0.0.1:0"];
    let dev = Process::start("operators dev", &mut portcullis(folder.path(), &arguments));
    let dev = dev.unwrap_or_else(|error| panic!("{error}"));
    let waits = |line: &str| line.contains("waiting for a change").then_some(());
    dev.wait_for(waits).unwrap_or_else(|error| panic!("{error}"));
    // Standard error and output are two pipes, so one may be seen before the other.
    let needs = "needs `export default { async fetch(request, env, ctx)";
    dev.wait_for(|line| line.contains(needs).then_some(())).unwrap_or_else(|error| panic!("{error}"));
    write(folder.path(), "one.ts", "export default { fetch: () => new Response('one') };");
    assert_eq!(get(served_at(&dev), "/anything"), (200, "one".to_owned()));
}

#[test]
fn dev_ends_where_no_change_of_files_would_help() {
    let folder = folder();
    write(folder.path(), "one.ts", "export default { fetch: () => new Response('one') };");
    let mut command = portcullis(folder.path(), &["operators", "dev", "one.ts", "--listen", "127.0.0.1:0"]);
    let ended = Process::run("operators dev", command.env("PORTCULLIS_OPERATOR", "/nonexistent/portcullis-operator"));
    let ended = ended.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(ended.status.code(), Some(1), "{}", ended.output);
    assert!(ended.output.contains("/nonexistent/portcullis-operator"), "{}", ended.output);
    assert!(!ended.output.contains("waiting for a change"), "{}", ended.output);
}

mod on_deno {
    #[test]
    fn the_doctor_tells_people_and_programs_what_holds() {
        super::the_doctor_tells_people_and_programs_what_holds("deno", "engine: deno 2.9.8 (V8 1");
    }
}

mod on_runner {
    #[test]
    fn the_doctor_tells_people_and_programs_what_holds() {
        super::the_doctor_tells_people_and_programs_what_holds("runner", "engine: runner 0.1.0 (V8 1");
    }
}

fn the_doctor_tells_people_and_programs_what_holds(engine: &str, named: &str) {
    let folder = folder();
    let policy = |isolation: &str| {
        let text = format!(
            "version: 1\nlisteners: [{{ name: public, address: \"127.0.0.1:0\" }}]\n\
             operator_host: {{ engine: {engine} }}\nroutes: [{{ name: all, operator: a }}]\n\
             operators: {{ a: {{ entry: main.ts, isolation: {isolation} }} }}\n"
        );
        write(folder.path(), "portcullis.yaml", &text);
    };
    write(folder.path(), "main.ts", "export default {}");
    policy("best_effort");
    let doctor = ["doctor", "-c", "portcullis.yaml"];
    let text = check(folder.path(), &doctor, 0, &["operators: start with `isolation: best_effort`", named]);
    assert!(text.contains("seccomp            active"), "{text}");
    let ended = run(folder.path(), &[&doctor[..], &["--json", "--isolation", "required"]].concat());
    let found: Value = serde_json::from_str(&ended.output).unwrap_or_else(|_| panic!("{}", ended.output));
    let layers = found["layers"].as_array().expect("layers");
    let missing: Vec<&Value> = layers.iter().filter(|layer| layer["state"] == "missing").collect();
    // Whatever this machine lacks: the answer, the exit code and the meaning agree.
    let well = missing.iter().all(|layer| layer["layer"] == "control_group");
    assert_eq!(found["operators_start"], well, "{found:#}");
    assert_eq!(ended.status.success(), well);
    assert!(missing.iter().all(|layer| layer["means"].as_str().is_some_and(|text| text.len() > 20)), "{missing:?}");
    policy("required");
    let ended = run(folder.path(), &doctor);
    assert!(ended.output.contains("`isolation: required`"), "{}", ended.output);
}

#[test]
fn without_an_engine_the_remedy_is_named() {
    let folder = folder();
    check(folder.path(), &["operators", "new", "hello"], 0, &[]);
    let policy = fs::read_to_string(folder.path().join("portcullis.yaml")).expect("a policy");
    let absent = folder.path().join("absent");
    let cases = [
        ("deno", "", "operators need Deno 2.9.8", "hint: "),
        (
            "runner",
            absent.to_str().expect("text"),
            "operators are to run on the runner: `",
            "cannot be used as the engine",
        ),
    ];
    for (engine, operator, problem, remedy) in cases {
        write(folder.path(), "portcullis.yaml", &format!("{policy}\noperator_host: {{ engine: {engine} }}\n"));
        for arguments in [&["doctor", "-c", "portcullis.yaml"][..], &["operators", "check"], &["serve"]] {
            let mut command = portcullis(folder.path(), arguments);
            command.env("PORTCULLIS_DENO", "").env("PORTCULLIS_OPERATOR", operator).env("PATH", "");
            let ended = Process::run("portcullis", &mut command).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(ended.status.code(), Some(1), "{}", ended.output);
            assert!(ended.output.contains(problem) && ended.output.contains(remedy), "{}", ended.output);
        }
    }
}

const SHOW: &str = "export default { async fetch(request: Request) { if (new URL(request.url).pathname.endsWith('/loop')) for (;;) {} return new Response([request.url, request.headers.get('x-probed')].join(' ')); } };";

/// Filters in the real Envoy, operators behind it, and the same causes as without it.
#[test]
fn envoy_reaches_operators_over_sockets() {
    let folder = folder();
    write(folder.path(), "a/main.ts", SHOW);
    let probe = places::filter("probe").unwrap_or_else(|error| panic!("{error}"));
    let policy = format!(
        "version: 1\nworkers: 1\nadmin: {{ address: \"127.0.0.1:0\" }}\n\
         listeners: [{{ name: public, address: \"127.0.0.1:0\" }}]\n\
         filters: [{{ name: probe, wasm: \"{}\" }}]\n\
         operators: {{ a: {{ entry: a/main.ts, limits: {{ cpu_time: 300ms }} }} }}\nroutes: [{{ name: all, operator: a }}]\n",
        probe.display()
    );
    write(folder.path(), "portcullis.yaml", &policy);
    let sockets = folder.path().join("sockets");
    let arguments = ["operators", "run", "--sockets", "sockets", "--admin", "127.0.0.1:0"];
    let run = Process::start("operators run", &mut portcullis(folder.path(), &arguments));
    let mut run = run.unwrap_or_else(|error| panic!("{error}"));
    let admin: SocketAddr = run
        .wait_for(|line| line.split_once("admin on http://")?.1.trim().parse().ok())
        .unwrap_or_else(|error| panic!("{error}"));
    run.wait_for(|line| line.contains("operator `a` on ").then_some(())).unwrap_or_else(|error| panic!("{error}"));
    let envoy = Server::envoy_with(
        &folder.path().join("portcullis.yaml"),
        &["--operator-sockets", &sockets.display().to_string()],
    );
    let envoy = envoy.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(get(envoy.address(), "/x?y"), (200, "http://api.example.com/x?y yes".to_owned()));
    let mut denied = RequestPlan::new("GET", "/");
    denied.fields.push("x-probe", "deny");
    let denied = client::send(envoy.address(), &denied).expect("an answer").expect("a response");
    assert_eq!(denied.status, 418);
    let (status, body) = get(envoy.address(), "/loop");
    let problem: Value = serde_json::from_str(&body).unwrap_or_else(|_| panic!("{body}"));
    assert_eq!((status, problem["reason"].as_str()), (503, Some("operator_cpu_time")));
    let metrics = get(admin, "/metrics").1;
    let line = "portcullis_operator_failed_total{operator=\"a\",reason=\"operator_cpu_time\"} 1";
    assert!(metrics.contains(line), "{metrics}");
    assert_eq!(get(admin, "/readyz").0, 200);
    eventually("the loop was replaced", || get(envoy.address(), "/again").0 == 200);

    // Reload: another operator, and the socket of the former one is gone.
    write(folder.path(), "portcullis.yaml", &policy.replace("{ a: {", "{ b: {").replace("operator: a", "operator: b"));
    let signal = |name: &str| {
        assert!(Command::new("kill").args([name, &run.id().to_string()]).status().expect("`kill` runs").success());
    };
    signal("-HUP");
    let exists = |name: &str| sockets.join(name).exists();
    eventually("the sockets changed", || exists("b.sock") && !exists("a.sock"));
    signal("-TERM");
    assert!(run.wait().expect("an end").success(), "{}", run.log());
    assert!(!exists("b.sock"));
}

/// Longer than what the kernel takes while nobody reads, shorter than what the host holds for whoever does.
const UNREAD: usize = 260_000;

#[test]
fn operators_run_answers_to_the_last_byte_before_it_ends() {
    use std::io::{Read as _, Write as _};
    let folder = folder();
    let code =
        format!("export default {{ fetch() {{ console.log('asked'); return new Response('x'.repeat({UNREAD})); }} }};");
    write(folder.path(), "a/main.ts", &code);
    write(
        folder.path(),
        "portcullis.yaml",
        "version: 1\nlisteners: [{ name: public, address: \"127.0.0.1:0\" }]\nroutes: [{ name: all, operator: a }]\n\
         operators: { a: { entry: a/main.ts } }\n",
    );
    let run = Process::start("run", &mut portcullis(folder.path(), &["operators", "run", "--sockets", "sockets"]));
    let mut run = run.unwrap_or_else(|error| panic!("{error}"));
    run.wait_for(|line| line.contains("operator `a` on ").then_some(())).unwrap_or_else(|error| panic!("{error}"));
    let connect = || std::os::unix::net::UnixStream::connect(folder.path().join("sockets/a.sock"));
    let idle = connect().expect("a connection");
    let mut stream = connect().expect("a connection");
    stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").expect("sent");
    run.wait_for(|line| line.contains("asked").then_some(())).unwrap_or_else(|error| panic!("{error}"));
    assert!(Command::new("kill").args(["-TERM", &run.id().to_string()]).status().expect("`kill` runs").success());
    eventually("nobody may connect any more", || connect().is_err());
    // Time enough to end in, if it did.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let mut answer = Vec::new();
    stream.set_read_timeout(Some(DEADLINE)).expect("a socket");
    stream.read_to_end(&mut answer).expect("an answer");
    let body = answer.iter().filter(|byte| **byte == b'x').count();
    assert!(body >= UNREAD, "{body} bytes of {UNREAD}: {}", run.log());
    assert!(run.wait().expect("an end").success(), "{}", run.log());
    drop(idle);
}

/// The kernel says who connects, whatever the modes of files allow. The test binary starts itself again as another user.
#[test]
fn operators_run_checks_who_connects() {
    const SOCKET: &str = "PORTCULLIS_TEST_SOCKET";
    if let Some(socket) = std::env::var_os(SOCKET) {
        use std::io::{Read as _, Write as _};
        let mut answer = String::new();
        let mut stream = std::os::unix::net::UnixStream::connect(socket).expect("the mode lets everybody in");
        // A connection that is refused is closed, before or after this is written.
        let _ = stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        let _ = stream.read_to_string(&mut answer);
        println!("ANSWERED {}", answer.lines().next().unwrap_or("nothing"));
        return;
    }
    let folder = folder();
    write(folder.path(), "a/main.ts", SHOW);
    write(
        folder.path(),
        "portcullis.yaml",
        "version: 1\nlisteners: [{ name: public, address: \"127.0.0.1:0\" }]\nroutes: [{ name: all, operator: a }]\n\
         operators: { a: { entry: a/main.ts } }\n",
    );
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711)).expect("a mode");
    let arguments = ["operators", "run", "--sockets", "sockets", "--allow-user", "65533"];
    let run = Process::start("operators run", &mut portcullis(folder.path(), &arguments));
    let run = run.unwrap_or_else(|error| panic!("{error}"));
    run.wait_for(|line| line.contains("operator `a` on ").then_some(())).unwrap_or_else(|error| panic!("{error}"));
    let binary = folder.path().join("again");
    fs::copy(std::env::current_exe().expect("this program"), &binary).expect("a copy");
    let connect = |user: Option<u32>| {
        use std::os::unix::process::CommandExt;
        let mut again = Command::new(&binary);
        again.args(["--exact", "operators_run_checks_who_connects", "--nocapture"]);
        again.env(SOCKET, folder.path().join("sockets/a.sock"));
        if let Some(user) = user {
            again.uid(user).gid(user);
        }
        let ended = Process::run("again", &mut again).unwrap_or_else(|error| panic!("{error}"));
        let answer = ended.output.split_once("ANSWERED ").and_then(|(_, answer)| answer.lines().next());
        answer.unwrap_or_else(|| panic!("{}", ended.output)).to_owned()
    };
    assert_eq!(connect(None), "HTTP/1.1 200 OK");
    // Only root can become somebody else to see it; the same check is what let the one above in.
    if is_root() {
        assert_eq!(connect(Some(65_533)), "HTTP/1.1 200 OK");
        assert_eq!(connect(Some(65_534)), "nothing");
        let refused = |line: &str| line.contains("refused a connection from another user").then_some(());
        run.wait_for(refused).unwrap_or_else(|error| panic!("{error}"));
    }
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0)
}
