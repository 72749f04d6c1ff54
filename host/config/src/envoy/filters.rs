//! Filters.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::document::Document;
use super::{duration, file_name, typed};
use crate::file::FailurePolicy;
use crate::policy::Filter;

pub(super) fn wasm_filter(filter: &Filter) -> Document {
    let environment = (!filter.environment_pass.is_empty() || !filter.environment_set.is_empty()).then(|| {
        Document::map([
            ("host_env_keys", Document::list(filter.environment_pass.iter().map(|name| name.as_str().into()))),
            (
                "key_values",
                Document::map(
                    filter.environment_set.iter().map(|(name, value)| (name.as_str(), value.as_str().into())),
                ),
            ),
        ])
    });
    let code = Document::map([("local", file_name(&filter.module_path))]);
    let vm_config = Document::map([
        ("vm_id", Document::from(filter.vm_id.as_str())),
        ("runtime", "envoy.wasm.runtime.v8".into()),
        ("code", code),
    ])
    .with_some("configuration", configuration(&filter.vm_configuration))
    .with_some("environment_variables", environment);
    let failure_policy = match filter.failure_policy {
        FailurePolicy::FailReload => "FAIL_RELOAD",
        FailurePolicy::FailClosed => "FAIL_CLOSED",
        FailurePolicy::FailOpen => "FAIL_OPEN",
    };
    let reload = (filter.failure_policy == FailurePolicy::FailReload).then(|| {
        Document::map([(
            "backoff",
            Document::map([
                ("base_interval", duration(filter.reload_base_interval)),
                ("max_interval", duration(filter.reload_max_interval)),
            ]),
        )])
    });
    let config = Document::map([
        ("name", Document::from(filter.name.as_str())),
        ("root_id", filter.root_id.as_str().into()),
        ("vm_config", vm_config),
    ])
    .with_some("configuration", configuration(&filter.configuration))
    .with("failure_policy", failure_policy)
    .with_some("reload_config", reload)
    .with("allow_on_headers_stop_iteration", filter.allow_on_headers_stop_iteration)
    .with_some(
        "capability_restriction_config",
        filter.capabilities.as_ref().map(|capabilities| {
            // Envoy's list covers callbacks as well; those are always delivered.
            let names = CALLBACKS.iter().copied().chain(capabilities.iter().map(String::as_str));
            Document::map([(
                "allowed_capabilities",
                Document::map(names.map(|name| (name, Document::map::<String>([])))),
            )])
        }),
    );
    typed(&filter.name, "envoy.extensions.filters.http.wasm.v3.Wasm", [("config", config)])
}

/// Callbacks of Proxy-Wasm 0.1.0 to 0.2.1 and Envoy's own, as Envoy names them in `allowed_capabilities`.
const CALLBACKS: [&str; 32] = [
    "proxy_on_context_create",
    "proxy_on_vm_start",
    "proxy_on_configure",
    "proxy_validate_configuration",
    "proxy_on_tick",
    "proxy_on_queue_ready",
    "proxy_on_done",
    "proxy_on_log",
    "proxy_on_delete",
    "proxy_on_new_connection",
    "proxy_on_downstream_data",
    "proxy_on_upstream_data",
    "proxy_on_downstream_connection_close",
    "proxy_on_upstream_connection_close",
    "proxy_on_request_headers",
    "proxy_on_request_body",
    "proxy_on_request_trailers",
    "proxy_on_request_metadata",
    "proxy_on_response_headers",
    "proxy_on_response_body",
    "proxy_on_response_trailers",
    "proxy_on_response_metadata",
    "proxy_on_http_call_response",
    "proxy_on_grpc_receive_initial_metadata",
    "proxy_on_grpc_receive",
    "proxy_on_grpc_receive_trailing_metadata",
    "proxy_on_grpc_close",
    "proxy_on_foreign_function",
    "proxy_on_memory_allocate",
    "envoy_on_resolve_dns",
    "envoy_on_stats_update",
    "proxy_on_stats_update",
];

/// A configuration as Envoy hands it to the module unchanged: text, or bytes where it is not text.
fn configuration(bytes: &[u8]) -> Option<Document> {
    if bytes.is_empty() {
        return None;
    }
    let (kind, value) = match std::str::from_utf8(bytes) {
        Ok(text) => ("StringValue", text.to_owned()),
        Err(_) => ("BytesValue", STANDARD.encode(bytes)),
    };
    Some(Document::map([
        ("@type", format!("type.googleapis.com/google.protobuf.{kind}").into()),
        ("value", value.into()),
    ]))
}
