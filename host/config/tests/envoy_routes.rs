//! The real Envoy, run with the rendering of a policy, takes the same decisions as [`Policy::route`]: which requests
//! are refused, which route the others take, and what the upstream sees.

mod support;

use std::fmt;

use portcullis_config::{Action, Policy, RequestParts, Target, normal_authority};

/// What becomes of a request.
#[derive(PartialEq, Eq)]
enum Outcome {
    Refused,
    NoRoute,
    Denied,
    Answered { status: u16, note: String, body: String },
    Forwarded { upstream: String, target: Vec<u8>, authority: Vec<u8> },
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused => f.write_str("refused"),
            Self::NoRoute => f.write_str("no route"),
            Self::Denied => f.write_str("denied by the filter"),
            Self::Answered { status, note, body } => write!(f, "answered {status} {note:?} {body:?}"),
            Self::Forwarded { upstream, target, authority } => {
                write!(f, "{upstream}: {} at {}", target.escape_ascii(), authority.escape_ascii())
            }
        }
    }
}

struct Request<'a> {
    method: &'a str,
    target: Vec<u8>,
    authority: &'a str,
    fields: &'a [(&'a str, &'a str)],
}

impl Request<'_> {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = [self.method.as_bytes(), b" ", &self.target, b" HTTP/1.1\r\nhost: "].concat();
        bytes.extend_from_slice(self.authority.as_bytes());
        for (name, value) in self.fields {
            bytes.extend_from_slice(format!("\r\n{name}: {value}").as_bytes());
        }
        bytes.extend_from_slice(b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
        bytes
    }
}

fn ours(policy: &Policy, request: &Request<'_>) -> Outcome {
    let Ok(target) = Target::parse(&request.target) else { return Outcome::Refused };
    let Some(authority) = normal_authority(request.authority.as_bytes()) else { return Outcome::Refused };
    let fields: Vec<(&[u8], &[u8])> =
        request.fields.iter().map(|(name, value)| (name.as_bytes(), value.trim().as_bytes())).collect();
    let fields = Fields(fields);
    let parts =
        RequestParts { method: request.method.as_bytes(), authority: &authority, target: &target, fields: &fields };
    let Some(route) = policy.route(&parts) else { return Outcome::NoRoute };
    if !route.filters.is_empty() {
        return Outcome::Denied;
    }
    match &route.action {
        Action::Respond(response) => Outcome::Answered {
            status: response.status,
            note: response
                .fields
                .iter()
                .find(|(name, _)| name == "x-note")
                .map(|(_, value)| value.clone())
                .unwrap_or_default(),
            body: response.body.clone(),
        },
        Action::Upstream(index) => Outcome::Forwarded {
            upstream: policy.upstreams[*index].name.clone(),
            target: route.upstream_target(&target).into_owned(),
            authority: route.host_rewrite.as_ref().map_or(authority.to_vec(), |host| host.clone().into_bytes()),
        },
        Action::Operator(_) => unreachable!("the policy has no operators"),
    }
}

struct Fields<'a>(Vec<(&'a [u8], &'a [u8])>);

impl portcullis_config::FieldLines for Fields<'_> {
    fn for_each_value(&self, name: &str, each: &mut dyn FnMut(&[u8])) {
        self.0.as_slice().for_each_value(name, each);
    }
}

struct Bench {
    _folder: tempfile::TempDir,
    envoy: support::Envoy,
    policy: Policy,
}

impl Bench {
    fn new() -> Self {
        let folder = support::folder();
        let mut text = include_str!("policies/routes.yaml").to_owned();
        for (name, place) in [("one", "127.0.0.1:9001"), ("two", "127.0.0.1:9002"), ("three", "127.0.0.1:9003")] {
            text = text.replace(place, &support::echo(name).to_string());
        }
        let policy = support::policy_in(folder.path(), &text);
        let envoy = support::Envoy::start(folder.path(), &policy);
        Self { envoy, policy, _folder: folder }
    }

    fn envoys(&self, request: &Request<'_>) -> Outcome {
        let answer = support::exchange(self.envoy.listeners["public"], &request.bytes())
            .unwrap_or_else(|| panic!("no answer to {}", request.bytes().escape_ascii()));
        match answer.status {
            200 => {
                let mut lines = answer.body.split(|byte| *byte == b'\n');
                let mut line = || lines.next().unwrap_or_default().to_vec();
                let (upstream, start, authority) = (line(), line(), line());
                let target = start.split(|byte| *byte == b' ').nth(1).unwrap_or_default().to_vec();
                Outcome::Forwarded { upstream: String::from_utf8_lossy(&upstream).into_owned(), target, authority }
            }
            400 => Outcome::Refused,
            403 => Outcome::Denied,
            // What does not begin with a slash gets 404 from Envoy before it looks for a route.
            404 if !request.target.starts_with(b"/") => Outcome::Refused,
            404 => Outcome::NoRoute,
            status => Outcome::Answered {
                status,
                note: answer.field("x-note").unwrap_or_default().to_owned(),
                body: String::from_utf8_lossy(&answer.body).into_owned(),
            },
        }
    }

    fn differences<'a>(&self, requests: impl IntoIterator<Item = Request<'a>>) -> (Vec<String>, Vec<Outcome>) {
        let mut differences = Vec::new();
        let mut outcomes = Vec::new();
        for request in requests {
            let (ours, envoys) = (ours(&self.policy, &request), self.envoys(&request));
            if ours != envoys {
                let shown = request.bytes().escape_ascii().to_string();
                differences.push(format!("{shown}\n  ours:  {ours:?}\n  envoy: {envoys:?}"));
            }
            outcomes.push(ours);
        }
        (differences, outcomes)
    }
}

const HOSTS: [&str; 36] = [
    "api.example.com",
    "API.Example.COM",
    "api.example.com:8080",
    "api.example.com.",
    "api.example.com.:80",
    "api.example.com:80.",
    "a.api.example.com",
    "a.b.api.example.com:1",
    "www.example.com",
    "www.example.com.",
    "example.com",
    ".example.com",
    "rest.example.org",
    "other.example.net",
    "[::1]",
    "[::1]:80",
    "[::1].:80",
    "::1",
    "127.0.0.1",
    "127.0.0.1:65535",
    "127.0.0.1:123456",
    "api.example.com..",
    "api.example.com:",
    "api.example.com:x",
    "user@api.example.com",
    "api.example.com,x.example.com",
    "api%2eexample.com",
    "a_b.example.com",
    ".",
    ":80",
    "[::1",
    "[::1]x",
    "[x.example.com]",
    "a:b.example.com",
    "a..example.com",
    "api.example.com:+1",
];

const TARGETS: [&str; 92] = [
    "/",
    "/a",
    "/A",
    "/api",
    "/api/",
    "/api/x",
    "/api?x=/../y",
    "/api/?x",
    "/apix",
    "/API/x",
    "/api//x",
    "/api/./x",
    "/api/../old/x",
    "/api/%2e%2e/old/x",
    "/api%2fx",
    "/api%2Fx",
    "/api%5cx",
    "/api\\x",
    "/api\\..\\old",
    "/%61pi/x",
    "/api%20/x",
    "/api/%41",
    "/old",
    "/old/",
    "/old/1?q",
    "/older",
    "/was",
    "/was/",
    "/was/1",
    "/was?q",
    "/below",
    "/below/",
    "/below/1",
    "/below//1",
    "/one/two",
    "/one/two/",
    "/one/two?x",
    "/one//two",
    "/one/./two",
    "/one/two;x",
    "/orders/1/items/2",
    "/orders/1/items/",
    "/orders/1/items",
    "/orders//items/2",
    "/orders/1/items/2/",
    "/orders/a%20b/items/%c3%a9",
    "/orders/1%2f2/items/3",
    "/orders/1/items/2?x=1",
    "/orders/;/items/;",
    "/a.b(c)+d/1",
    "/aXb(c)+d/1",
    "/a.b(c)d/1",
    "/a.bcd/1",
    "/created",
    "/created?x",
    "/denied",
    "/denied/x",
    "/x/../denied",
    "/deniedx",
    "/%64enied",
    "/v",
    "/v/1",
    "//",
    "/\\",
    "///",
    "//x",
    "/.",
    "/..",
    "/...",
    "/x/..;/denied",
    "/x/.;a/y",
    "/x/%2e%2e;/y",
    "/x/..%3b/y",
    "/x\\..;\\y",
    "/x;/../y",
    "/%",
    "/%2",
    "/%zz",
    "/%%34%31",
    "/%%2",
    "/x%00y",
    "/x%0ay",
    "/x#y",
    "/x?y#z",
    "/x\"<>^`{|}y",
    "/x?\"<>^`{|}\\y",
    "/x|y",
    "*",
    "x",
    "",
    "?x",
    "/\u{e9}",
];

#[test]
fn envoy_and_the_policy_agree_on_awkward_requests() {
    let bench = Bench::new();
    let no_fields: &[(&str, &str)] = &[];
    let hosts = HOSTS.iter().flat_map(|authority| {
        ["/", "/a/1", "/api/1"].map(|target| Request {
            method: "GET",
            target: target.into(),
            authority,
            fields: no_fields,
        })
    });
    let targets = TARGETS.iter().flat_map(|target| {
        ["api.example.com", "other.example.net", "www.example.com"].map(|authority| Request {
            method: "GET",
            target: (*target).into(),
            authority,
            fields: no_fields,
        })
    });
    // Every byte in a path, as it is and escaped in both cases, and in a query. A space or a line end would be
    // another request line.
    let bytes = (0..=255_u8).flat_map(|byte| {
        let raw = |start: &[u8]| [start, &[byte], b"y"].concat();
        let mut targets = vec![format!("/x%{byte:02x}y").into_bytes(), format!("/x%{byte:02X}y").into_bytes()];
        if !matches!(byte, 0 | b' ' | b'\r' | b'\n') {
            targets.extend([raw(b"/x"), raw(b"/x?")]);
        }
        targets.into_iter().map(|target| Request {
            method: "GET",
            target,
            authority: "rest.example.org",
            fields: no_fields,
        })
    });
    let methods = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"].into_iter().flat_map(|method| {
        ["/orders/1/items/2", "/x", "/denied"].map(|target| Request {
            method,
            target: target.into(),
            authority: "api.example.com",
            fields: no_fields,
        })
    });
    let fields: [&[(&str, &str)]; 10] = [
        &[("x-version", "1,2")],
        &[("x-version", "1"), ("X-Version", "2")],
        &[("x-version", "2"), ("x-version", "1")],
        &[("x-version", "1"), ("x-version", "2"), ("x-debug", "")],
        &[("x-version", ""), ("x-debug", "1")],
        &[("x-version", "")],
        &[("x-debug", "1")],
        &[("x-version", " 1,2 ")],
        &[("x-version", "1, 2")],
        &[("x-version", "0"), ("x-version", "1,2")],
    ];
    let fields = fields.into_iter().flat_map(|fields| {
        ["api.example.com", "www.example.com", "other.example.net"].map(|authority| Request {
            method: "GET",
            target: "/v/1?x".into(),
            authority,
            fields,
        })
    });
    let requests = hosts.chain(targets).chain(bytes).chain(methods).chain(fields);
    let (differences, outcomes) = bench.differences(requests);
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));

    // The list must reach everything, or it shows nothing.
    for route in &bench.policy.routes {
        let reached = outcomes.iter().any(|outcome| match (&route.action, outcome) {
            (Action::Respond(response), Outcome::Answered { status, .. }) => *status == response.status,
            (Action::Upstream(index), Outcome::Forwarded { upstream, .. }) => {
                *upstream == bench.policy.upstreams[*index].name
            }
            (_, Outcome::Denied) => !route.filters.is_empty(),
            _ => false,
        });
        assert!(reached, "no request reached a route like `{}`", route.name);
    }
    for outcome in [Outcome::Refused, Outcome::NoRoute, Outcome::Denied] {
        assert!(outcomes.contains(&outcome), "no request was {outcome:?}");
    }
}

#[test]
fn envoy_and_the_policy_agree_on_random_requests() {
    const PIECES: [&str; 32] = [
        "/", "/", "/", "/", ".", "..", "%2e", "%2E", "\\", ";", "..;", "a", "api", "old", "was", "orders", "items",
        "%", "2", "f", "e", "5", "%41", "%3b", "%32", "%6", "?", ":", "|", "%c3", "one/two", "denied",
    ];
    const HOSTS: [&str; 5] =
        ["api.example.com", "x.api.example.com", "www.example.com:80", "rest.example.org.", "a.test"];
    let bench = Bench::new();
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed % below as u64).unwrap_or(0)
    };
    let requests: Vec<Request<'_>> = (0..5_000)
        .map(|_| {
            let mut target = b"/".to_vec();
            for _ in 0..random(12) {
                target.extend_from_slice(PIECES[random(PIECES.len())].as_bytes());
            }
            Request { method: "GET", target, authority: HOSTS[random(HOSTS.len())], fields: &[] }
        })
        .collect();
    let (differences, outcomes) = bench.differences(requests);
    assert!(differences.is_empty(), "{} differences:\n{}", differences.len(), differences.join("\n"));
    let forwarded = outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Forwarded { .. })).count();
    assert!(forwarded > 1_000, "only {forwarded} of 5000 were forwarded, so little was compared");
}
