//! The commands for authors and for platform engineers, as the library that stands behind them.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::path::Path;
use std::sync::Arc;

use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use portcullis_operators::author;
use portcullis_operators::engine::{Class, Engine, Start};
use portcullis_operators::jail::Isolation;
use portcullis_operators::{ApplyError, Doctor, Front, OperatorConfig, Operators, control};

use support::{Host, Kind, eventually, settings};

on_each_engine! {
    async check_finds_mistakes_and_passes_what_loads;
    async another_process_asks_what_runs_and_what_was_printed;
    async another_process_reaches_operators_over_sockets;
    async an_engine_that_does_not_start_is_told_with_a_remedy;
    sync the_doctor_tells_what_holds;
    sync the_doctor_sees_that_an_engine_does_not_start;
}

fn the_doctor_tells_what_holds(engine: Kind) {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = settings(folder.path());
    let doctor = Doctor::examine(&settings, &*engine.engine()).unwrap();
    assert!(doctor.is_well(), "{doctor}");
    let text = doctor.to_string();
    for layer in ["seccomp", "landlock", "mount_namespace", "uid", "rlimits"] {
        assert!(text.contains(layer), "{text}");
    }
    settings.isolation = Isolation::Required;
    let required = Doctor::examine(&settings, &*engine.engine()).unwrap();
    let missing =
        required.layers.iter().any(|row| matches!(row.state, portcullis_operators::jail::LayerState::Missing { .. }));
    assert_eq!(required.is_well(), !missing, "{required}");
}

/// An engine that is started with something that it does not know.
#[derive(Debug)]
struct Broken(Arc<dyn Engine>);

impl Engine for Broken {
    fn name(&self) -> String {
        self.0.name()
    }

    fn program(&self) -> &Path {
        self.0.program()
    }

    fn remedy(&self) -> String {
        self.0.remedy()
    }

    fn start(&self, class: &Class) -> Start {
        let mut start = self.0.start(class);
        start.argv.insert(1, "--nonsense".to_owned());
        start
    }
}

fn the_doctor_sees_that_an_engine_does_not_start(engine: Kind) {
    let folder = tempfile::tempdir().unwrap();
    let doctor = Doctor::examine(&settings(folder.path()), &Broken(engine.engine())).unwrap();
    assert!(!doctor.is_well(), "{doctor}");
    let text = doctor.to_string();
    assert!(text.contains("the engine does not start") && text.contains("--nonsense"), "{text}");
    assert!(text.contains("\n  hint: "), "{text}");
    assert!(!text.contains("panicked"), "{text}");
}

async fn an_engine_that_does_not_start_is_told_with_a_remedy(engine: Kind) {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(folder.path());
    author::create(folder.path(), "good").unwrap();
    let operator = OperatorConfig::new("good/main.ts").compile("good", folder.path(), &settings).unwrap();
    let host = Operators::start(settings, Arc::new(Broken(engine.engine()))).unwrap();
    let errors = host.prepare(vec![operator]).await.unwrap_err();
    let text = errors.iter().map(ToString::to_string).collect::<String>();
    assert!(text.starts_with("operator `good` cannot be started: the engine does not start: "), "{text}");
    assert!(text.contains("--nonsense") && text.contains("\n  hint: "), "{text}");
    host.stop().await;
}

async fn check_finds_mistakes_and_passes_what_loads(engine: Kind) {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(folder.path());
    author::create(folder.path(), "good").unwrap();
    std::fs::create_dir(folder.path().join("bad")).unwrap();
    std::fs::write(folder.path().join("bad/main.ts"), "import 'npm:x';\nexport default {};").unwrap();
    std::fs::create_dir(folder.path().join("throws")).unwrap();
    std::fs::write(folder.path().join("throws/main.ts"), "null!.x;\nexport default { fetch() {} };").unwrap();
    let operators = ["good", "bad", "throws"]
        .map(|name| OperatorConfig::new(format!("{name}/main.ts")).compile(name, folder.path(), &settings).unwrap());
    let (checked, errors) = author::check(operators.to_vec(), settings, engine.engine()).await.unwrap();
    assert_eq!(checked.iter().map(|one| one.operator.as_str()).collect::<Vec<_>>(), ["good"]);
    assert_eq!(errors.len(), 2, "{errors:?}");
    assert!(errors[0].to_string().contains("main.ts:1:8: `npm:x` is a package"), "{}", errors[0]);
    assert!(matches!(&errors[1], ApplyError::Load { message, .. } if message.contains("main.ts:1:7")), "{}", errors[1]);
}

async fn another_process_asks_what_runs_and_what_was_printed(engine: Kind) {
    let host = Host::new(engine);
    let code = "export default { fetch(r: Request) { console.log('asked for', new URL(r.url).pathname); return new Response('ok'); } };";
    host.serve(vec![host.operator("a", code, |_| {}), host.operator("b", code, |_| {})]).await;
    host.text("a", "/one").await;
    host.text("b", "/two").await;
    eventually("both were logged", async || host.log("a").contains("/one") && host.log("b").contains("/two")).await;
    let found = control::hosts(&host.settings.run_folder).unwrap();
    let [socket] = found.as_slice() else { panic!("{found:?}") };
    let socket = socket.clone();

    let (lines, mut follow) = tokio::sync::mpsc::unbounded_channel();
    let of = socket.clone();
    let following = std::thread::spawn(move || {
        control::read_logs(&of, Some("a"), true, |line| lines.send(line.text).map_err(std::io::Error::other))
    });
    assert_eq!(follow.recv().await.unwrap(), "asked for /one");
    host.text("b", "/other").await;
    host.text("a", "/three").await;
    assert_eq!(follow.recv().await.unwrap(), "asked for /three");
    drop(follow);
    host.text("a", "/four").await;
    assert!(following.join().unwrap().is_err());

    let asked = tokio::task::spawn_blocking(move || {
        let mut all = Vec::new();
        control::read_logs(&socket, None, false, |line| {
            all.push(format!("{} {}", line.operator, line.text));
            Ok(())
        })
        .unwrap();
        (all, control::read_status(&socket).unwrap())
    });
    let (all, status) = asked.await.unwrap();
    assert_eq!(all[..2], ["a asked for /one", "b asked for /two"]);
    let [a, b] = status.operators.as_slice() else { panic!("{status:?}") };
    assert_eq!((a.name.as_str(), a.requests, a.failed, b.requests), ("a", 3, 0, 2));
    assert_eq!(a.processes.iter().map(|process| process.pid).collect::<Vec<_>>(), host.pids("a").await);
    assert!(a.processes[0].resident_bytes > 10 << 20);
}

async fn another_process_reaches_operators_over_sockets(engine: Kind) {
    let host = Host::new(engine);
    let code = "export default { fetch(r: Request) { if (r.url.endsWith('/throw')) throw 1; return new Response(r.url + ' ' + r.headers.get('x-portcullis-sub')); } };";
    host.serve(vec![host.operator("hello", code, |_| {})]).await;
    let mut front = Front::new(host.folder.path().join("front"), &[]).unwrap();
    let socket = front.socket("hello");
    front.serve(&host.operators, &["hello".to_owned()]).unwrap();
    let send = async |path: &str| {
        let stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::get(path)
            .header("host", "api.example.com")
            .header("x-request-id", "r-1")
            .header("x-portcullis-sub", "alice")
            .header("x-forwarded-proto", "https")
            .body(Full::<bytes::Bytes>::default())
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        (status, String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap())
    };
    assert_eq!(send("/a").await, (200, "https://api.example.com/a alice".to_owned()));
    let (status, body) = send("/throw").await;
    assert_eq!(status, 500);
    assert!(body.contains("\"reason\":\"operator_exception\"") && body.contains("\"request_id\":\"r-1\""), "{body}");
    front.serve(&host.operators, &["other".to_owned()]).unwrap();
    assert!(!socket.exists() && front.socket("other").exists());
    // What is no socket is not ours to remove.
    std::fs::write(front.socket("file"), "").unwrap();
    assert!(front.serve(&host.operators, &["file".to_owned()]).unwrap_err().to_string().contains("is no socket"));
    let folder = front.socket("other");
    drop(front);
    assert!(!folder.exists());
}
