//! The commands for authors and for platform engineers, as the library that stands behind them.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

mod support;

use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use portcullis_operators::author::{self, DevEvent};
use portcullis_operators::jail::Isolation;
use portcullis_operators::{ApplyError, Doctor, Front, OperatorConfig};

use support::{Host, deno, eventually, settings};

#[test]
fn the_doctor_tells_what_holds() {
    let folder = tempfile::tempdir().unwrap();
    let mut settings = settings(folder.path());
    let doctor = Doctor::examine(&settings, &deno()).unwrap();
    assert!(doctor.is_well(), "{doctor}");
    let text = doctor.to_string();
    for layer in ["seccomp", "landlock", "mount_namespace", "uid", "rlimits"] {
        assert!(text.contains(layer), "{text}");
    }
    settings.isolation = Isolation::Required;
    let required = Doctor::examine(&settings, &deno()).unwrap();
    let missing =
        required.layers.iter().any(|row| matches!(row.state, portcullis_operators::jail::LayerState::Missing { .. }));
    assert_eq!(required.is_well(), !missing, "{required}");
}

#[tokio::test]
async fn check_finds_mistakes_and_passes_what_loads() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(folder.path());
    author::create(folder.path(), "good").unwrap();
    std::fs::create_dir(folder.path().join("bad")).unwrap();
    std::fs::write(folder.path().join("bad/main.ts"), "import 'npm:x';\nexport default {};").unwrap();
    std::fs::create_dir(folder.path().join("throws")).unwrap();
    std::fs::write(folder.path().join("throws/main.ts"), "null!.x;\nexport default { fetch() {} };").unwrap();
    let operators = ["good", "bad", "throws"]
        .map(|name| OperatorConfig::new(format!("{name}/main.ts")).compile(name, folder.path(), &settings).unwrap());
    let (checked, errors) = author::check(operators.to_vec(), settings, Arc::new(deno())).await.unwrap();
    assert_eq!(checked.iter().map(|one| one.operator.as_str()).collect::<Vec<_>>(), ["good"]);
    assert_eq!(errors.len(), 2, "{errors:?}");
    assert!(errors[0].to_string().contains("main.ts:1:8: `npm:x` is a package"), "{}", errors[0]);
    assert!(matches!(&errors[1], ApplyError::Load { message, .. } if message.contains("main.ts:1:7")), "{}", errors[1]);
}

#[tokio::test]
async fn development_follows_the_files() {
    let host = Host::with(|settings| settings.dev = true);
    author::create(host.folder.path(), "hello").unwrap();
    let events = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&events);
    let said = move |text: &str| seen.lock().unwrap().iter().any(|event: &String| event.contains(text));
    let (folder, settings) = (host.folder.path().to_owned(), host.settings.clone());
    let load = move || Ok(vec![OperatorConfig::new("hello/main.ts").compile("hello", &folder, &settings)?]);
    let operators = host.operators.clone();
    let record = move |event: DevEvent| events.lock().unwrap().push(event.to_string());
    let developing = tokio::spawn(async move { author::develop(&operators, Vec::new(), load, record).await });
    eventually("it serves", async || said("serving hello")).await;
    assert_eq!(host.text("hello", "/?name=x").await, r#"{"hello":"x"}"#);
    eventually("the log is shown", async || said("GET /")).await;
    host.write(
        "hello/main.ts",
        "import { answer } from './more.ts';\nexport default { fetch: () => new Response(answer) };",
    );
    eventually("the mistake is shown", async || said("there is no module `./more.ts`")).await;
    host.write("hello/more.ts", "export const answer: string = 'changed';");
    eventually("the change is there", async || host.text("hello", "/").await == "changed").await;
    developing.abort();
}

#[tokio::test]
async fn another_process_reaches_operators_over_sockets() {
    let host = Host::new();
    let code = "export default { fetch(r: Request) { if (r.url.endsWith('/throw')) throw 1; return new Response(r.url + ' ' + r.headers.get('x-portcullis-sub')); } };";
    host.serve(vec![host.operator("hello", code, |_| {})]).await;
    let front = Front { folder: host.folder.path().join("front"), users: Vec::new() };
    let socket = front.socket("hello");
    let operators = host.operators.clone();
    let serving = tokio::spawn(async move { front.serve(&operators, &["hello".to_owned()]).await });
    eventually("the socket is there", async || socket.exists()).await;
    let send = async |path: &str| {
        let stream = tokio::net::UnixStream::connect(&socket).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = http::Request::get(path)
            .header("host", "api.example.com")
            .header("x-request-id", "r-1")
            .header("x-portcullis-sub", "alice")
            .body(Full::<bytes::Bytes>::default())
            .unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        (status, String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap())
    };
    assert_eq!(send("/a").await, (200, "http://api.example.com/a alice".to_owned()));
    let (status, body) = send("/throw").await;
    assert_eq!(status, 500);
    assert!(body.contains("\"reason\":\"operator_exception\"") && body.contains("\"request_id\":\"r-1\""), "{body}");
    serving.abort();
}
