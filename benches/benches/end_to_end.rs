//! `portcullis serve` and Envoy side by side: the bare proxy, `jwt-auth` as a guest in both, and Envoy's own filter for the same check.
//!
//! All servers run at once, with one worker each; only one is asked at a time, a moment each, over and over, so that whatever
//! else the machine does meets all of them. What is said is the median over these rounds, and the ratios are medians of the
//! ratios within a round. The first figure to look at is the CPU time that a server takes for a request, as the kernel counts it: it
//! leaves out the client and the API behind the proxy, which share the machine. The log of accesses is on in both, as it is by default.
//!
//! `ROUNDS` (default 10) and `MILLISECONDS` (default 500, of each measurement) say how long; `ROUNDS=1 MILLISECONDS=50` shows whether it
//! works.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use portcullis_harness::{HostKind, SigningKey};
use portcullis_tests::process::cpu_time;
use portcullis_tests::server::Server;
use portcullis_tests::{Programs, places};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

fn main() {
    let number = |name: &str, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let plan = Plan {
        rounds: number("ROUNDS", 10) as usize,
        time: Duration::from_millis(number("MILLISECONDS", 500)),
        connections: number("CONNECTIONS", 16) as usize,
    };
    run(&plan).unwrap_or_else(|error| panic!("{error}"));
}

struct Plan {
    rounds: usize,
    /// Of one measurement.
    time: Duration,
    /// Requests under way at a time, each on a connection of its own.
    connections: usize,
}

/// Tokens that are each used once per server take time to make; so many are enough for a measurement.
const FRESH_TOKENS: usize = 400;

fn run(plan: &Plan) -> Result<(), String> {
    let origin = origin()?;
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let servers = Servers::start(folder.path(), origin)?;
    let keys = read("testdata/keys.json")?;
    let mut minutes = 0;
    let mut tokens = |algorithm: &str, kid: &str, count: usize| -> Result<Vec<String>, String> {
        let key = SigningKey::from_jwk_set(&keys, kid).map_err(|error| error.to_string())?;
        let header = json!({ "alg": algorithm, "kid": kid, "typ": "at+jwt" });
        (0..count)
            .map(|_| {
                minutes += 1;
                // From the year 2100 on, each with another end and so another token.
                let claims = json!({
                    "iss": "https://issuer.example", "aud": "orders", "sub": "alice", "scope": "orders:read",
                    "exp": 4_102_444_800u64 + 60 * minutes,
                });
                key.token(&header, &claims).map_err(|error| error.to_string())
            })
            .collect()
    };
    let remembered = tokens("ES256", "es256-1", 1)?;

    let asked =
        |name: &'static str, server: &Server| Asked { name, process: Some(server.id()), address: server.address() };
    let bare = vec![
        Asked { name: "no proxy", process: None, address: origin },
        asked("portcullis", &servers.bare),
        asked("Envoy", &servers.envoy_bare),
    ];
    let checking = vec![
        asked("portcullis, jwt-auth.wasm", &servers.guest),
        asked("Envoy, jwt-auth.wasm", &servers.envoy_guest),
        asked("Envoy, its jwt_authn", &servers.envoy_native),
    ];
    let mut sheets = vec![Sheet::new("the bare proxy", &bare)];
    for title in [
        "a token that was seen before",
        "no token: 401",
        "a new token each time, ES256",
        "a new token each time, RS256",
    ] {
        sheets.push(Sheet::new(title, &checking));
    }
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    for round in 0..=plan.rounds {
        let work = [
            Work { tokens: remembered.clone(), expected: 200, once: false },
            Work { tokens: remembered.clone(), expected: 200, once: false },
            Work { tokens: Vec::new(), expected: 401, once: false },
            Work { tokens: tokens("ES256", "es256-1", FRESH_TOKENS)?, expected: 200, once: true },
            Work { tokens: tokens("RS256", "rsa-1", FRESH_TOKENS)?, expected: 200, once: true },
        ];
        for (sheet, work) in sheets.iter_mut().zip(&work) {
            let requests = work.requests();
            let count = sheet.rows.len();
            for turn in 0..count {
                // Another one begins in each round.
                let (asked, of_rounds) = &mut sheet.rows[(turn + round) % count];
                let measured = runtime.block_on(measure(plan, asked, &requests, work));
                let measured = measured.map_err(|error| format!("{}, {}: {error}", sheet.title, asked.name))?;
                // The first round is for caches, connections and branch predictors to get warm.
                if round > 0 {
                    of_rounds.push(measured);
                }
            }
        }
        eprintln!("round {round} of {}", plan.rounds);
    }
    println!("{}", heading(plan));
    for sheet in &sheets {
        println!("{}", sheet.shown());
    }
    Ok(())
}

// ---- what is asked

/// A server that is measured.
#[derive(Clone, Copy)]
struct Asked {
    name: &'static str,
    /// Whose CPU time counts.
    process: Option<u32>,
    address: SocketAddr,
}

/// What one measurement asks for.
struct Work {
    /// One after the other.
    tokens: Vec<String>,
    expected: u16,
    /// Each token is used once, and the measurement ends with them.
    once: bool,
}

impl Work {
    fn requests(&self) -> Rc<Vec<Vec<u8>>> {
        let request = |authorization: &str| {
            format!(
                "GET /orders/1001 HTTP/1.1\r\nhost: api.example.com\r\nuser-agent: bench\r\naccept: application/json\r\n\
                 {authorization}\r\n"
            )
            .into_bytes()
        };
        Rc::new(match self.tokens.as_slice() {
            [] => vec![request("")],
            tokens => tokens.iter().map(|token| request(&format!("authorization: Bearer {token}\r\n"))).collect(),
        })
    }
}

/// What came of one measurement.
struct Measured {
    /// CPU time of the server for one request, in microseconds; none where there is no server.
    cpu: Option<f64>,
    per_second: f64,
    /// Microseconds that one of a hundred requests takes at least.
    slow: f64,
    /// Microseconds that one of two requests takes at least.
    usual: f64,
}

async fn measure(plan: &Plan, asked: &Asked, requests: &Rc<Vec<Vec<u8>>>, work: &Work) -> Result<Measured, String> {
    let Asked { process, address, .. } = *asked;
    let mut connections = Vec::new();
    for _ in 0..plan.connections {
        let stream =
            TcpStream::connect(address).await.map_err(|error| format!("cannot connect to {address}: {error}"))?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        connections.push(stream);
    }
    let next = Rc::new(std::cell::Cell::new(0));
    let cpu = |process| cpu_time(process, |_| true);
    let before = process.map(cpu).transpose()?;
    let began = Instant::now();
    let local = tokio::task::LocalSet::new();
    let (expected, once, time) = (work.expected, work.once, plan.time);
    let tasks: Vec<_> = connections
        .into_iter()
        .map(|stream| {
            let (requests, next) = (Rc::clone(requests), Rc::clone(&next));
            local.spawn_local(async move { ask(stream, &requests, &next, expected, once, began + time).await })
        })
        .collect();
    local.await;
    let took = began.elapsed();
    let after = process.map(cpu).transpose()?;
    let mut times = Vec::new();
    for task in tasks {
        times.extend(task.await.map_err(|error| error.to_string())??);
    }
    times.sort_unstable();
    let at = |part: f64| times.get((times.len() as f64 * part) as usize).map_or(0.0, |time| time.as_secs_f64() * 1e6);
    let count = times.len() as f64;
    Ok(Measured {
        cpu: before.zip(after).map(|(before, after)| (after - before).as_secs_f64() * 1e6 / count),
        per_second: count / took.as_secs_f64(),
        slow: at(0.99),
        usual: at(0.5),
    })
}

/// Asks on one connection until the time is over or the requests are; how long each took.
async fn ask(
    mut stream: TcpStream,
    requests: &[Vec<u8>],
    next: &std::cell::Cell<usize>,
    expected: u16,
    once: bool,
    end: Instant,
) -> Result<Vec<Duration>, String> {
    let mut times = Vec::new();
    let mut buffer = Vec::with_capacity(4096);
    loop {
        let number = next.get();
        if if once { number >= requests.len() } else { Instant::now() >= end } {
            return Ok(times);
        }
        next.set(number + 1);
        let began = Instant::now();
        stream.write_all(&requests[number % requests.len()]).await.map_err(|error| error.to_string())?;
        buffer.clear();
        let status = loop {
            if let Some(status) = complete(&buffer)? {
                break status;
            }
            let read = stream.read_buf(&mut buffer).await.map_err(|error| error.to_string())?;
            if read == 0 {
                return Err(format!("the connection ended within a response: `{}`", buffer.escape_ascii()));
            }
        };
        times.push(began.elapsed());
        if status != expected {
            return Err(format!("answered {status} instead of {expected}: `{}`", buffer.escape_ascii()));
        }
    }
}

/// The status, once the whole response is there. Understands what the servers here send, and no more.
fn complete(buffer: &[u8]) -> Result<Option<u16>, String> {
    let Some(end) = buffer.windows(4).position(|window| window == b"\r\n\r\n") else { return Ok(None) };
    let head = std::str::from_utf8(&buffer[..end]).map_err(|error| error.to_string())?;
    let status = head.get(9..12).and_then(|status| status.parse().ok());
    let length = head.split("\r\n").skip(1).find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let (Some(status), Some(length)) = (status, length) else {
        return Err(format!("a response that is not understood here: `{}`", head.escape_debug()));
    };
    Ok((buffer.len() >= end + 4 + length).then_some(status))
}

// ---- what is shown

/// Rows that are compared.
struct Sheet {
    title: &'static str,
    /// What was measured in each round.
    rows: Vec<(Asked, Vec<Measured>)>,
}

impl Sheet {
    fn new(title: &'static str, asked: &[Asked]) -> Sheet {
        Sheet { title, rows: asked.iter().map(|asked| (*asked, Vec::new())).collect() }
    }

    fn shown(&self) -> String {
        let mut text = format!(
            "\n### {}\n\n| | CPU per request | as against ours | requests per second | half take | one of 100 takes |\n\
             |---|---:|---:|---:|---:|---:|\n",
            self.title
        );
        let ours =
            self.rows.iter().find(|(asked, _)| asked.name.starts_with("portcullis")).map(|(_, measured)| measured);
        for (Asked { name, .. }, measured) in &self.rows {
            let of = |value: &dyn Fn(&Measured) -> f64| median(measured.iter().map(value).collect());
            let cpus: Option<Vec<f64>> = measured.iter().map(|measured| measured.cpu).collect();
            let ratio = ours.and_then(|ours| {
                let pairs = measured.iter().zip(ours);
                pairs.map(|(row, ours)| Some(row.cpu? / ours.cpu?)).collect::<Option<Vec<f64>>>()
            });
            let shown = |value: Option<f64>, unit: &str, digits: usize| {
                value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}{unit}"))
            };
            text += &format!(
                "| {name} | {} | {} | {:.0} | {:.0} µs | {:.0} µs |\n",
                shown(cpus.map(median), " µs", 1),
                shown(ratio.map(median), "", 2),
                of(&|measured| measured.per_second),
                of(&|measured| measured.usual),
                of(&|measured| measured.slow),
            );
        }
        text
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        len if len % 2 == 1 => values[len / 2],
        len => (values[len / 2 - 1] + values[len / 2]) / 2.0,
    }
}

fn heading(plan: &Plan) -> String {
    let line = |program: &str, arguments: &[&str]| {
        let output =
            std::process::Command::new(program).args(arguments).current_dir(places::workspace()).output().ok()?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned()).filter(|text| !text.is_empty())
    };
    let processor = std::fs::read_to_string("/proc/cpuinfo").ok().and_then(|text| {
        Some(text.lines().find(|line| line.starts_with("model name"))?.split_once(": ")?.1.to_owned())
    });
    let unknown = || "unknown".to_owned();
    format!(
        "{} CPUs of {}, Linux {}; commit {}; Envoy {}\n{} rounds of {} ms, {} connections",
        std::thread::available_parallelism().map_or(0, usize::from),
        processor.unwrap_or_else(unknown),
        line("uname", &["-r"]).unwrap_or_else(unknown),
        line("git", &["describe", "--always", "--dirty", "--exclude", "*"]).unwrap_or_else(unknown),
        places::ENVOY_VERSION,
        plan.rounds,
        plan.time.as_millis(),
        plan.connections,
    )
}

// ---- what is measured

struct Servers {
    bare: Server,
    guest: Server,
    envoy_bare: Server,
    envoy_guest: Server,
    envoy_native: Server,
}

fn read(path: &str) -> Result<String, String> {
    let file = places::workspace().join("filters/jwt-auth").join(path);
    std::fs::read_to_string(&file).map_err(|error| format!("{}: {error}", file.display()))
}

impl Servers {
    fn start(folder: &Path, origin: SocketAddr) -> Result<Servers, String> {
        let program = release()?;
        let wasm = places::filter("jwt-auth")?;
        let configuration = read("config/one-issuer.json")?;
        let policy = |name: &str, filters: &str| -> Result<PathBuf, String> {
            let folder = folder.join(name);
            let fail = |error: std::io::Error| format!("{}: {error}", folder.display());
            std::fs::create_dir(&folder).map_err(fail)?;
            std::fs::write(folder.join("jwt.json"), &configuration).map_err(fail)?;
            let file = folder.join("portcullis.yaml");
            let text = format!(
                "version: 1\nworkers: 1\nadmin: {{ address: \"127.0.0.1:0\" }}\n\
                 listeners:\n  - {{ name: public, address: \"127.0.0.1:0\" }}\n{filters}\
                 upstreams: {{ origin: {{ endpoints: [\"{origin}\"] }} }}\nroutes:\n  - {{ name: all, upstream: origin }}\n"
            );
            std::fs::write(&file, text).map_err(fail)?;
            Ok(file)
        };
        let guest = format!("filters:\n  - name: jwt\n    wasm: {}\n    configuration_file: jwt.json\n", json!(wasm));
        let native = native_filter(&configuration)?;
        let programs = Programs::with_portcullis(program);
        // A line per request would fill what is kept for when something fails.
        let keep = |line: &str| !line.contains("/orders/1001");
        let ours = |policy: &Path| Server::start_with(&programs, HostKind::Standalone, policy, keep);
        let envoy = |policy: &Path, filter: Option<&Value>| {
            let edit = |text: String| filter.map_or(Ok(text.clone()), |filter| with_filter(&text, filter));
            Server::envoy_edited(&programs, policy, edit, keep)
        };
        Ok(Servers {
            bare: ours(&policy("bare", "")?)?,
            guest: ours(&policy("guest", &guest)?)?,
            envoy_bare: envoy(&policy("envoy-bare", "")?, None)?,
            envoy_guest: envoy(&policy("envoy-guest", &guest)?, None)?,
            envoy_native: envoy(&policy("envoy-native", "")?, Some(&native))?,
        })
    }
}

/// The optimised program beside this one.
fn release() -> Result<PathBuf, String> {
    let here = std::env::current_exe().map_err(|error| error.to_string())?;
    let found = here.ancestors().skip(1).map(|folder| folder.join("portcullis")).find(|file| file.is_file());
    found.ok_or_else(|| {
        "the optimised program is not built\n  hint: run `cargo build --release --bin portcullis`".to_owned()
    })
}

/// Envoy's `jwt_authn` with the issuer, audience and keys that `jwt-auth` has here. It has no scopes and writes no identity.
fn native_filter(configuration: &str) -> Result<Value, String> {
    let configuration: Value = serde_json::from_str(configuration).map_err(|error| error.to_string())?;
    let provider = &configuration["providers"]["main"];
    Ok(json!({
        "name": "jwt_authn",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.jwt_authn.v3.JwtAuthentication",
            "providers": { "main": {
                "issuer": provider["issuer"],
                "audiences": provider["audiences"],
                "forward": true,
                "local_jwks": { "inline_string": provider["jwks_inline"].to_string() },
                // As `jwt-auth` does; without, each token is verified anew.
                "jwt_cache_config": { "jwt_cache_size": 1000 },
            } },
            "rules": [{ "match": { "prefix": "/" }, "requires": { "provider_name": "main" } }],
        },
    }))
}

/// Envoy's configuration with a filter before all others. JSON is YAML.
fn with_filter(envoy: &str, filter: &Value) -> Result<String, String> {
    let mark = "http_filters:\n";
    let (before, after) = envoy.split_once(mark).ok_or_else(|| format!("no `http_filters` in\n{envoy}"))?;
    let indentation: String = after.chars().take_while(|letter| *letter == ' ').collect();
    Ok(format!("{before}{mark}{indentation}- {filter}\n{after}"))
}

/// An API that answers everything the same, on a thread of its own.
fn origin() -> Result<SocketAddr, String> {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).map_err(|error| error.to_string())?;
    let address = listener.local_addr().map_err(|error| error.to_string())?;
    listener.set_nonblocking(true).map_err(|error| error.to_string())?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|error| error.to_string())?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            let Ok(listener) = TcpListener::from_std(listener) else { return };
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream));
            }
        });
    });
    Ok(address)
}

async fn answer(mut stream: TcpStream) {
    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 27\r\n\r\n{\"order\":1001,\"total\":9900}";
    let _ = stream.set_nodelay(true);
    let mut buffer = Vec::with_capacity(4096);
    while stream.read_buf(&mut buffer).await.is_ok_and(|read| read > 0) {
        if buffer.ends_with(b"\r\n\r\n") {
            buffer.clear();
            if stream.write_all(ANSWER).await.is_err() {
                return;
            }
        }
    }
}
