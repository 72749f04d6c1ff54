//! The admin endpoint: `/healthz`, `/readyz`, `/metrics`, `/config`. It runs on the control thread, away from requests.
//!
//! No answer holds a secret: `/config` names files and sizes where the policy holds configurations and keys.

use std::convert::Infallible;
use std::fmt::Write as _;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use portcullis_abi::PluginState;
use portcullis_config::{Action, Policy};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::server::Handle;

/// Connections at a time: scrapers and probes need a handful.
const CONNECTIONS_MAX: usize = 64;
/// Time for a request to arrive, and for an unused connection.
const HEAD_TIME: Duration = Duration::from_secs(10);

/// Serves until the task is dropped.
pub(crate) async fn serve(listener: TcpListener, handle: Handle) {
    let slots = std::rc::Rc::new(tokio::sync::Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        let (handle, slots) = (handle.clone(), std::rc::Rc::clone(&slots));
        tokio::task::spawn_local(async move {
            let Ok(_slot) = slots.try_acquire() else { return };
            let service = service_fn(|request| answer(handle.clone(), request));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIME)
                .max_buf_size(16 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            // A prober that hangs up concerns nobody.
            drop(connection.await);
        });
    }
}

async fn answer(handle: Handle, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    const TEXT: &str = "text/plain; charset=utf-8";
    const JSON: &str = "application/json";
    if request.method() != Method::GET && request.method() != Method::HEAD {
        let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET and HEAD\n".to_owned());
        response.headers_mut().insert(header::ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Ok(response);
    }
    Ok(match request.uri().path() {
        "/healthz" => {
            let stuck = handle.health().await.iter().filter(|health| health.is_none()).count();
            match stuck {
                0 => plain(StatusCode::OK, TEXT, "ok\n".to_owned()),
                stuck => plain(StatusCode::SERVICE_UNAVAILABLE, TEXT, format!("{stuck} workers do not answer\n")),
            }
        }
        "/readyz" => {
            if handle.is_accepting() {
                plain(StatusCode::OK, TEXT, "ready\n".to_owned())
            } else {
                plain(StatusCode::SERVICE_UNAVAILABLE, TEXT, "draining\n".to_owned())
            }
        }
        "/metrics" => {
            let mut text = handle.metrics_text();
            write_health(&handle, &mut text).await;
            plain(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
        }
        "/config" => {
            let text = serde_json::to_string_pretty(&describe(&handle.policy())).unwrap_or_default();
            plain(StatusCode::OK, JSON, text + "\n")
        }
        "/" => plain(StatusCode::OK, TEXT, "/healthz\n/readyz\n/metrics\n/config\n".to_owned()),
        _ => plain(StatusCode::NOT_FOUND, TEXT, "there are /healthz, /readyz, /metrics and /config\n".to_owned()),
    })
}

fn plain(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    response
}

/// Appends what only the workers know: how their filters are.
async fn write_health(handle: &Handle, text: &mut String) {
    let healths = handle.health().await;
    let filters: Vec<String> = handle.policy().filters.iter().map(|filter| filter.name.clone()).collect();
    let each = |of: &dyn Fn(&portcullis_abi::PluginHealth) -> u64| -> Vec<u64> {
        filters
            .iter()
            .map(|name| healths.iter().flatten().flatten().filter(|health| health.plugin == *name).map(of).sum())
            .collect()
    };
    let families: [(&str, &str, &str, Vec<u64>); 3] = [
        (
            "portcullis_filter_traps",
            "gauge",
            "Crashes of the filter's present VMs and those before them since the last reload of the policy.",
            each(&|health| health.traps),
        ),
        (
            "portcullis_filter_reloads",
            "gauge",
            "Times that a new VM took a crashed one's place since the last reload of the policy.",
            each(&|health| health.reloads),
        ),
        (
            "portcullis_filter_failed_workers",
            "gauge",
            "Workers on which the filter is down at the moment.",
            each(&|health| u64::from(matches!(health.state, PluginState::Failed(_)))),
        ),
    ];
    for (name, kind, help, values) in families {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (filter, value) in filters.iter().zip(values) {
            let _ = writeln!(text, "{name}{{filter=\"{filter}\"}} {value}");
        }
    }
    let stuck = healths.iter().filter(|health| health.is_none()).count();
    let _ = writeln!(
        text,
        "# HELP portcullis_workers_stuck Workers that did not answer in time.\n# TYPE portcullis_workers_stuck gauge\n\
         portcullis_workers_stuck {stuck}"
    );
}

/// The policy in force, without secrets.
fn describe(policy: &Policy) -> Value {
    let name_of = |index: usize| policy.filters.get(index).map_or("", |filter| filter.name.as_str());
    json!({
        "file": policy.name,
        "workers": policy.workers,
        "trusted_proxies": policy.trusted_proxies.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "listeners": policy.listeners.iter().map(|listener| json!({
            "name": listener.name,
            "address": listener.address.to_string(),
            "certificate": listener.tls.as_ref().map(|tls| tls.certificate_path.display().to_string()),
        })).collect::<Vec<_>>(),
        "filters": policy.filters.iter().map(|filter| json!({
            "name": filter.name,
            "wasm": filter.module_path.display().to_string(),
            "configuration_bytes": filter.configuration.len(),
            "failure_policy": format!("{:?}", filter.failure_policy),
            "allowed_upstreams": filter.allowed_upstreams.iter()
                .filter_map(|index| policy.upstreams.get(*index))
                .map(|upstream| upstream.name.as_str())
                .collect::<Vec<_>>(),
        })).collect::<Vec<_>>(),
        "upstreams": policy.upstreams.iter().map(|upstream| json!({
            "name": upstream.name,
            "endpoints": upstream.endpoints.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "tls": upstream.tls.is_some(),
            "http2": upstream.http2,
        })).collect::<Vec<_>>(),
        "operators": policy.operators.iter().map(|operator| operator.name.as_str()).collect::<Vec<_>>(),
        "routes": policy.routes.iter().map(|route| json!({
            "name": route.name,
            "filters": route.filters.iter().map(|index| name_of(*index)).collect::<Vec<_>>(),
            "to": match &route.action {
                Action::Upstream(index) => {
                    json!({ "upstream": policy.upstreams.get(*index).map(|upstream| upstream.name.as_str()) })
                }
                Action::Operator(index) => {
                    json!({ "operator": policy.operators.get(*index).map(|operator| operator.name.as_str()) })
                }
                Action::Respond(response) => json!({ "respond": response.status }),
            },
        })).collect::<Vec<_>>(),
    })
}
