//! Filters.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::document::Document;
use super::{duration, file_name, typed};
use crate::capabilities::CALLBACKS;
use crate::file::{FailurePolicy, Protocol};
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
    .with_some(
        "allow_on_headers_stop_iteration",
        (filter.protocol == Protocol::Http).then(|| filter.allow_on_headers_stop_iteration.into()),
    )
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
    let kind = match filter.protocol {
        Protocol::Http => "envoy.extensions.filters.http.wasm.v3.Wasm",
        Protocol::Tcp => "envoy.extensions.filters.network.wasm.v3.Wasm",
    };
    typed(&filter.name, kind, [("config", config)])
}

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
