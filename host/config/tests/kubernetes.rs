//! What is rendered for Istio and Envoy Gateway has the fields that their resources have, and no others.
//!
//! The files in `kubernetes/` state these fields, as the references of `WasmPlugin` and `EnvoyExtensionPolicy` list them. No
//! cluster is asked.

mod support;

use portcullis_config::envoy::Rendering;
use portcullis_config::envoy::kubernetes::{Cluster, Unrenderable, render_envoy_gateway, render_istio};
use portcullis_config::{InMemory, Policy, compile};
use serde_json::{Value, json};

const MODULE: &[u8] = b"\0asm\x01\0\0\0";
const DIGEST: &str = "sha256:93a44bbb96c751218e4c00d479e4c14358122a389acca16205b1e4d0dc5f9476";

fn policy(text: &str) -> Policy {
    let files = InMemory::default()
        .with("pass.wasm", MODULE)
        .with("third.bin", *b"\xff\xfe")
        .with("jwt.json", r#"{ "zebra": [1, -2, 0.5, null, true], "apple": { "": "no" }, "text": "a\nb: \"c\"" }"#);
    compile("portcullis.yaml", text, &files).unwrap_or_else(|mistakes| panic!("{mistakes}"))
}

/// Two filters, one of them on one route only.
const TWO: &str = r#"
version: 1
listeners: [{ name: public, address: "127.0.0.1:8080" }]
filters:
  - name: jwt_auth
    wasm: pass.wasm
    configuration_file: jwt.json
    root_id: jwt
    vm_id: shared
    capabilities: [proxy_log]
    allowed_upstreams: [api]
    environment: { pass: [REGION], set: { TIER: gold } }
  - { name: log, wasm: pass.wasm, failure_policy: fail_open }
upstreams: { api: { endpoints: ["127.0.0.1:9000"] } }
routes:
  - { name: health, match: { path: { exact: /healthz } }, filters: [log], upstream: api }
  - { name: all, match: { path: { prefix: / } }, upstream: api }
"#;

fn cluster(modules: &[(&str, &str)], targets: &[&str]) -> Cluster {
    Cluster {
        modules: modules.iter().map(|(name, source)| ((*name).to_owned(), source.parse().expect("a source"))).collect(),
        targets: targets.iter().map(|target| target.parse().expect("a target")).collect(),
        ..Cluster::default()
    }
}

fn documents(rendering: &Rendering) -> Vec<Value> {
    let parts = rendering.yaml.split("\n---\n");
    parts.map(|part| serde_saphyr::from_str(part).unwrap_or_else(|error| panic!("{error}\n{part}"))).collect()
}

/// Fails where a value is not as a schema says: a small part of JSON Schema, in which an object has no properties but those
/// that are named.
fn check(value: &Value, schema: &Value, at: &str) {
    let kind = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    };
    assert!(schema["type"].is_null() || schema["type"] == kind, "{at} is {kind}, not {}", schema["type"]);
    if let Some(values) = schema["enum"].as_array() {
        assert!(values.contains(value), "{at} is {value}, none of {values:?}");
    }
    if let (Value::Object(members), "object") = (value, schema["type"].as_str().unwrap_or_default()) {
        for (key, member) in members {
            let known = schema["properties"].get(key).or_else(|| schema.get("additionalProperties"));
            check(member, known.unwrap_or_else(|| panic!("{at} has no `{key}`")), &format!("{at}.{key}"));
        }
        for key in schema["required"].as_array().into_iter().flatten() {
            assert!(members.contains_key(key.as_str().expect("a key")), "{at} lacks {key}");
        }
    }
    if let Value::Array(items) = value {
        assert!(schema["maxItems"].as_u64().is_none_or(|most| items.len() as u64 <= most), "{at} is too long");
        for (index, item) in items.iter().enumerate() {
            check(item, &schema["items"], &format!("{at}[{index}]"));
        }
    }
}

fn schema(file: &str) -> Value {
    let path = format!("{}/tests/kubernetes/{file}", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&std::fs::read(path).expect("the schema")).expect("JSON")
}

#[test]
fn istio_gets_a_plugin_for_each_filter_in_the_policys_order() {
    let image = format!("oci://registry.example/filters/jwt-auth:1.0@{DIGEST}");
    let cluster = Cluster {
        namespace: Some("edge".to_owned()),
        pull_secret: Some("registry".to_owned()),
        ..cluster(&[("jwt_auth", &image), ("log", "https://a.example/log.wasm")], &["istio=ingressgateway"])
    };
    let rendering = render_istio(&policy(TWO), &cluster).expect("to be rendered");
    let documents = documents(&rendering);
    for document in &documents {
        check(document, &schema("wasm-plugin.json"), "WasmPlugin");
    }
    let selector = json!({ "matchLabels": { "istio": "ingressgateway" } });
    assert_eq!(
        documents[0],
        json!({
            "apiVersion": "extensions.istio.io/v1alpha1", "kind": "WasmPlugin",
            "metadata": { "name": "jwt-auth", "namespace": "edge" },
            "spec": {
                "selector": selector, "url": image, "imagePullSecret": "registry", "pluginName": "jwt", "priority": 20,
                "failStrategy": "FAIL_RELOAD",
                "vmConfig": { "env": [
                    { "name": "REGION", "valueFrom": "HOST" }, { "name": "TIER", "valueFrom": "INLINE", "value": "gold" },
                ] },
                "pluginConfig": { "zebra": [1, -2, 0.5, null, true], "apple": { "": "no" }, "text": "a\nb: \"c\"" },
            },
        })
    );
    let sha256 = DIGEST.trim_start_matches("sha256:");
    assert_eq!(
        documents[1]["spec"],
        json!({
            "selector": selector, "url": "https://a.example/log.wasm", "sha256": sha256, "imagePullSecret": "registry",
            "priority": 10, "failStrategy": "FAIL_OPEN",
        })
    );
    assert!(rendering.yaml.find("zebra:") < rendering.yaml.find("apple:"), "in its own order:\n{}", rendering.yaml);
    let notes = rendering.notes.join("\n");
    for note in [
        "route `health` does not pass `jwt_auth` in the policy",
        "MERGE_SLASHES",
        "filter `jwt_auth`: while it holds a request's fields",
        "filter `jwt_auth`: `vm_id` cannot be set",
        "filter `jwt_auth`: it can call every host function",
        "filter `jwt_auth`: the clusters that it calls have other names",
        "`FAIL_RELOAD` needs an Istio that knows it",
        "filter `log`: after a crash, requests pass WITHOUT it",
    ] {
        assert!(notes.contains(note), "{note}:\n{notes}");
    }
    assert!(!notes.contains("name the image by its digest"), "{notes}");
}

#[test]
fn envoy_gateway_gets_one_policy_with_all_filters_in_order() {
    let cluster = Cluster {
        pull_secret: Some("registry".to_owned()),
        ..cluster(
            &[("jwt_auth", "registry.example/filters/jwt-auth:1.0"), ("log", "https://a.example/log.wasm")],
            &["Gateway/edge", "HTTPRoute/orders"],
        )
    };
    let rendering = render_envoy_gateway(&policy(TWO), &cluster).expect("to be rendered");
    let documents = documents(&rendering);
    assert_eq!(documents.len(), 1);
    check(&documents[0], &schema("envoy-extension-policy.json"), "EnvoyExtensionPolicy");
    let group = "gateway.networking.k8s.io";
    assert_eq!(
        documents[0]["spec"],
        json!({
            "targetRefs": [
                { "group": group, "kind": "Gateway", "name": "edge" }, { "group": group, "kind": "HTTPRoute", "name": "orders" },
            ],
            "wasm": [
                {
                    "name": "jwt_auth", "rootID": "jwt", "failOpen": false, "env": { "hostKeys": ["REGION"] },
                    "code": { "type": "Image", "image": {
                        "url": "registry.example/filters/jwt-auth:1.0", "pullSecretRef": { "kind": "Secret", "name": "registry" },
                    } },
                    "config": { "zebra": [1, -2, 0.5, null, true], "apple": { "": "no" }, "text": "a\nb: \"c\"" },
                },
                {
                    "name": "log", "failOpen": true,
                    "code": { "type": "HTTP", "http": {
                        "url": "https://a.example/log.wasm", "sha256": DIGEST.trim_start_matches("sha256:"),
                    } },
                },
            ],
        })
    );
    let notes = rendering.notes.join("\n");
    for note in [
        "escapedSlashesAction: RejectRequest",
        "filter `jwt_auth`: it does not get the variables TIER",
        "after a crash its requests get 5xx",
        "filter `jwt_auth`: whoever can write to the registry can replace the module",
    ] {
        assert!(notes.contains(note), "{note}:\n{notes}");
    }
}

#[test]
fn a_policy_with_every_setting_becomes_resources_with_known_fields() {
    let folder = support::folder();
    let policy = support::policy_in(folder.path(), include_str!("policies/everything.yaml"));
    let mut policy = policy;
    // Kubernetes carries JSON only, which one filter's configuration is not.
    policy.filters.retain(|filter| std::str::from_utf8(&filter.configuration).is_ok());
    assert!(policy.filters.len() >= 4, "{}", policy.filters.len());
    let modules: Vec<(String, String)> =
        policy.filters.iter().map(|filter| (filter.name.clone(), format!("registry.example/a@{DIGEST}"))).collect();
    let modules: Vec<(&str, &str)> = modules.iter().map(|(name, source)| (name.as_str(), source.as_str())).collect();
    let rendered = render_istio(&policy, &cluster(&modules, &["Gateway/edge"])).expect("to be rendered");
    let plugins = documents(&rendered);
    assert_eq!(plugins.len(), policy.filters.len());
    for plugin in plugins {
        check(&plugin, &schema("wasm-plugin.json"), "WasmPlugin");
    }
    let rendered = render_envoy_gateway(&policy, &cluster(&modules, &["Gateway/edge"])).expect("to be rendered");
    check(&documents(&rendered)[0], &schema("envoy-extension-policy.json"), "EnvoyExtensionPolicy");
}

/// One filter with a configuration of its own, on TCP if that is said.
fn one(configuration: &str, protocol: &str) -> Policy {
    let listener = match protocol {
        "tcp" => r#"{ name: db, address: "127.0.0.1:5432", tcp: { upstream: api } }"#,
        _ => r#"{ name: public, address: "127.0.0.1:8080" }"#,
    };
    let routes =
        if protocol == "tcp" { "" } else { "routes: [{ name: all, match: { path: { prefix: / } }, upstream: api }]" };
    policy(&format!(
        "version: 1\nlisteners: [{listener}]\nfilters: [{{ name: a, wasm: pass.wasm, protocol: {protocol}{configuration} }}]\n\
         upstreams: {{ api: {{ endpoints: [\"127.0.0.1:9000\"] }} }}\n{routes}\n"
    ))
}

#[test]
fn a_tcp_filter_is_a_network_plugin_in_istio_and_left_out_of_envoy_gateway() {
    let source = format!("registry.example/a@{DIGEST}");
    let policy = one("", "tcp");
    let rendering = render_istio(&policy, &cluster(&[("a", &source)], &[])).expect("to be rendered");
    let documents = documents(&rendering);
    check(&documents[0], &schema("wasm-plugin.json"), "WasmPlugin");
    assert_eq!(documents[0]["spec"]["type"], "NETWORK");
    assert!(rendering.notes[0].contains("without a target, every proxy of the namespace"), "{:?}", rendering.notes);
    let refused =
        render_envoy_gateway(&policy, &cluster(&[("a", &source)], &["Gateway/edge"])).expect_err("nothing is left");
    assert_eq!(refused.0, [Unrenderable::NoFilter]);
}

#[test]
fn a_configuration_that_would_not_arrive_as_it_is_is_refused() {
    let source = format!("registry.example/a@{DIGEST}");
    let istio = |configuration: &str| {
        let policy = one(&format!(", configuration: {configuration}"), "http");
        render_istio(&policy, &cluster(&[("a", &source)], &[])).map(drop).map_err(|problems| problems.to_string())
    };
    let gateway = |configuration: &str| {
        let policy = one(&format!(", configuration: {configuration}"), "http");
        let rendered = render_envoy_gateway(&policy, &cluster(&[("a", &source)], &["Gateway/edge"]));
        rendered.map(drop).map_err(|problems| problems.to_string())
    };
    assert_eq!(istio("{ limit: 9007199254740992 }"), Ok(()));
    let refused = istio("{ limits: [9007199254740993] }").expect_err("a number");
    assert!(refused.contains("has the number 9007199254740993, which a double cannot hold\n  hint:"), "{refused}");
    assert_eq!(gateway("{ limits: [9007199254740993] }"), Ok(()));
    let refused = istio("[1]").expect_err("a list");
    assert!(refused.contains("its configuration is not a JSON object"), "{refused}");
    assert_eq!(gateway("[1]"), Ok(()));
    for refused in [istio("plain"), gateway("plain")] {
        let refused = refused.expect_err("text");
        assert!(refused.contains("filter `a`: its configuration is not JSON: "), "{refused}");
    }
    let policy = one(", configuration_file: third.bin", "http");
    render_istio(&policy, &cluster(&[("a", &source)], &[])).expect_err("bytes");
}

#[test]
fn everything_that_is_missing_is_told_at_once() {
    let refused = |render: fn(&Policy, &Cluster) -> _, modules: &[(&str, &str)], targets: &[&str]| {
        let result: Result<Rendering, portcullis_config::envoy::kubernetes::Unrenderables> =
            render(&policy(TWO), &cluster(modules, targets));
        result.expect_err("something is missing").to_string()
    };
    let said = refused(render_istio, &[("jwt", "registry.example/a")], &["a=b", "Gateway/edge"]);
    for problem in [
        "there is no filter `jwt`\n  hint: the policy has jwt_auth, log",
        "filter `jwt_auth`: it is not said where its module is\n  hint: `--image jwt_auth=",
        "filter `log`: it is not said where its module is",
        "by labels or by resources, not by both",
    ] {
        assert!(said.contains(problem), "{problem}:\n{said}");
    }
    let said = refused(render_envoy_gateway, &[], &[]);
    assert!(said.contains("it is not said what the filters are attached to") && said.contains("`log`"), "{said}");
    let said = refused(render_envoy_gateway, &[], &["a=b"]);
    assert!(said.contains("to resources, not to labels"), "{said}");
}

#[test]
fn names_that_kubernetes_cannot_tell_apart_are_refused() {
    let text = TWO.replace("name: log,", "name: jwt-auth,").replace("filters: [log]", "filters: [jwt-auth]");
    let modules = [("jwt_auth", "registry.example/a"), ("jwt-auth", "registry.example/b")];
    let refused = render_istio(&policy(&text), &cluster(&modules, &[])).expect_err("the same name");
    assert!(matches!(&refused.0[..], [Unrenderable::SameName { .. }]), "{refused}");
}
