//! The policy's filters as Kubernetes resources, for the Envoys that Istio and Envoy Gateway run.
//!
//! Only filters are rendered. Listeners, routes and upstreams are the mesh's or the gateway's own there, so that a filter
//! sees every request of what it is attached to. Fields are those of `WasmPlugin` (`extensions.istio.io/v1alpha1`) and of
//! `EnvoyExtensionPolicy` (`gateway.envoyproxy.io/v1alpha1`).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

use super::document::{Document, JsonRefused};
use super::notes::filter_notes;
use super::{Rendering, level_name};
use crate::file::{FailurePolicy, LogLevel, Protocol};
use crate::policy::{Filter, Policy, Service};

/// What a policy does not say and Kubernetes must know.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// Where the proxies get each filter's module from, by the filter's name.
    pub modules: BTreeMap<String, ModuleSource>,
    /// The namespace of the resources; without one, that of whoever applies them.
    pub namespace: Option<String>,
    /// What the filters are attached to.
    pub targets: Vec<Target>,
    /// The secret with the registry's credentials.
    pub pull_secret: Option<String>,
}

/// Where a module is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModuleSource {
    /// An image in a registry: `registry.example/filters/jwt-auth:1.0@sha256:...`.
    Image(String),
    /// The module itself, at an `http` or `https` address.
    Url(String),
}

impl FromStr for ModuleSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("spaces and characters beyond ASCII have no place in it".to_owned());
        }
        if let Some(rest) = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://")) {
            return if rest.contains('/') {
                Ok(Self::Url(text.to_owned()))
            } else {
                Err("the URL has no path".to_owned())
            };
        }
        let image = text.strip_prefix("oci://").unwrap_or(text);
        if image.contains("://") {
            return Err("write an image (`registry.example/filter:1.0`), or an `https` URL".to_owned());
        }
        let (name, digest) = image.split_once('@').map_or((image, None), |(name, digest)| (name, Some(digest)));
        if !name.contains('/') || name.starts_with('/') || name.ends_with(['/', ':']) {
            return Err("an image begins with its registry: `registry.example/filter:1.0`".to_owned());
        }
        if let Some(digest) = digest {
            let hex = digest.strip_prefix("sha256:").unwrap_or_default();
            if hex.len() != 64 || !hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
                return Err("what follows `@` is not a digest: `sha256:` and 64 hexadecimal digits".to_owned());
            }
        }
        Ok(Self::Image(image.to_owned()))
    }
}

/// What filters are attached to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A resource of the Gateway API, such as `Gateway/edge`.
    Resource {
        /// Its kind.
        kind: String,
        /// Its name.
        name: String,
    },
    /// Pods with this label; Istio only.
    Label {
        /// The label.
        key: String,
        /// Its value.
        value: String,
    },
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const KINDS: [&str; 3] = ["Gateway", "HTTPRoute", "GRPCRoute"];
        if let Some((key, value)) = text.split_once('=') {
            let allowed = |text: &str, more: &str| {
                text.bytes().all(|byte| byte.is_ascii_alphanumeric() || more.as_bytes().contains(&byte))
            };
            return if !key.is_empty() && value.len() <= 63 && allowed(key, "-_./") && allowed(value, "-_.") {
                Ok(Self::Label { key: key.to_owned(), value: value.to_owned() })
            } else {
                Err("that is no label: write it as `istio=ingressgateway`".to_owned())
            };
        }
        match text.split_once('/') {
            Some((kind, name)) if KINDS.contains(&kind) && is_resource_name(name) => {
                Ok(Self::Resource { kind: kind.to_owned(), name: name.to_owned() })
            }
            _ => Err("write a kind and a name, as in `Gateway/edge` or `HTTPRoute/orders`, or a label: `app=edge`"
                .to_owned()),
        }
    }
}

/// Whether Kubernetes takes this as a resource's name (RFC 1123).
#[must_use]
pub fn is_resource_name(name: &str) -> bool {
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    (1..=253).contains(&name.len())
        && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.'))
        && ends(name.as_bytes().first())
        && ends(name.as_bytes().last())
}

/// Why a policy cannot be rendered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unrenderable {
    /// The policy has no filter of this name.
    #[error("there is no filter `{name}`\n  hint: the policy has {known}")]
    NoSuchFilter {
        /// The name.
        name: String,
        /// Those that there are.
        known: String,
    },
    /// Nobody said where the module is.
    #[error(
        "filter `{filter}`: it is not said where its module is\n  hint: `--image {filter}=registry.example/{filter}:1.0@sha256:...`; \
         `portcullis package` makes the image and prints the digest"
    )]
    NoModule {
        /// The filter.
        filter: String,
    },
    /// The resource cannot carry the configuration unchanged.
    #[error("filter `{filter}`: its configuration {problem}\n  hint: {hint}")]
    Configuration {
        /// The filter.
        filter: String,
        /// What is wrong.
        problem: String,
        /// What to do.
        hint: &'static str,
    },
    /// The targets do not fit.
    #[error("{problem}\n  hint: {hint}")]
    Target {
        /// What is wrong.
        problem: String,
        /// What to do.
        hint: &'static str,
    },
    /// Two filters would be one resource.
    #[error("filters `{first}` and `{second}` would have the same name in Kubernetes\n  hint: rename one")]
    SameName {
        /// One.
        first: String,
        /// The other.
        second: String,
    },
    /// There is nothing to render.
    #[error("the policy has no filter to render\n  hint: add one under `filters`")]
    NoFilter,
}

/// Everything that is in the way.
#[derive(Clone, Debug, thiserror::Error)]
pub struct Unrenderables(pub Vec<Unrenderable>);

impl fmt::Display for Unrenderables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, problem) in self.0.iter().enumerate() {
            let newline = if index == 0 { "" } else { "\n" };
            write!(f, "{newline}{problem}")?;
        }
        Ok(())
    }
}

/// One `WasmPlugin` for each filter, for Istio.
///
/// # Errors
/// What Istio cannot express, and what `cluster` does not say.
pub fn render_istio(policy: &Policy, cluster: &Cluster) -> Result<Rendering, Unrenderables> {
    let mut problems = misnamed_modules(policy, cluster);
    if policy.filters.is_empty() {
        problems.push(Unrenderable::NoFilter);
    }
    let labels: Vec<(&str, Document)> = cluster
        .targets
        .iter()
        .filter_map(|target| match target {
            Target::Label { key, value } => Some((key.as_str(), value.as_str().into())),
            Target::Resource { .. } => None,
        })
        .collect();
    let references: Vec<Document> = references(cluster);
    let attached = match (labels.is_empty(), references.is_empty()) {
        (true, true) => None,
        (false, true) => Some(("selector", Document::map([("matchLabels", Document::map(labels))]))),
        (true, false) => Some(("targetRefs", Document::list(references))),
        (false, false) => {
            problems.push(Unrenderable::Target {
                problem: "Istio selects pods by labels or by resources, not by both".to_owned(),
                hint: "leave one kind of `--target` out",
            });
            None
        }
    };
    let mut notes = Vec::new();
    if attached.is_none() {
        let (scope, advice) = (
            "without a target, every proxy of the namespace runs the filters",
            "in Istio's root namespace, every proxy of the mesh",
        );
        notes.push(format!("{scope}; {advice}"));
    }
    notes.extend(shared_notes(policy));
    notes.push(
        "Istio must normalise paths: `meshConfig.pathNormalization.normalization: MERGE_SLASHES`; it cannot refuse escaped \
         slashes, as the policy does"
            .to_owned(),
    );
    let mut documents = Vec::new();
    let mut names: BTreeMap<String, &str> = BTreeMap::new();
    for (index, filter) in policy.filters.iter().enumerate() {
        let name = resource_name(&filter.name);
        if let Some(first) = names.insert(name.clone(), &filter.name) {
            problems.push(Unrenderable::SameName { first: first.to_owned(), second: filter.name.clone() });
        }
        let configuration = match istio_configuration(filter) {
            Ok(configuration) => configuration,
            Err(problem) => {
                problems.push(problem);
                None
            }
        };
        let Some(module) = cluster.modules.get(&filter.name) else {
            problems.push(Unrenderable::NoModule { filter: filter.name.clone() });
            continue;
        };
        let (url, sha256) = match module {
            ModuleSource::Image(image) => (format!("oci://{image}"), None),
            ModuleSource::Url(url) => (url.clone(), Some(Document::from(sha256_of(filter)))),
        };
        let strategy = match filter.failure_policy {
            FailurePolicy::FailReload => "FAIL_RELOAD",
            FailurePolicy::FailClosed => "FAIL_CLOSE",
            FailurePolicy::FailOpen => "FAIL_OPEN",
        };
        let mut spec = Document::map::<String>([]);
        if let Some((key, document)) = &attached {
            spec = spec.with(key, document.clone());
        }
        let root_id = (!filter.root_id.is_empty()).then(|| filter.root_id.as_str().into());
        spec = spec
            .with("url", url)
            .with_some("sha256", sha256)
            .with_some("imagePullSecret", cluster.pull_secret.as_deref().map(Document::from))
            .with_some("type", (filter.protocol == Protocol::Tcp).then(|| "NETWORK".into()))
            .with_some("pluginName", root_id)
            // Istio runs plugins in descending order; the policy's first filter is the first to run.
            .with("priority", (policy.filters.len() - index) * 10)
            .with("failStrategy", strategy)
            .with_some("vmConfig", istio_environment(filter))
            .with_some("pluginConfig", configuration);
        documents.push(resource("extensions.istio.io/v1alpha1", "WasmPlugin", &name, cluster, spec));
        notes.extend(module_notes(module, filter));
        notes.extend(kubernetes_notes(filter));
        if filter.failure_policy == FailurePolicy::FailReload {
            notes.push(format!(
                "filter `{}`: `FAIL_RELOAD` needs an Istio that knows it: 1.27 does, 1.23 does not; pauses between reloads are Envoy's own",
                filter.name
            ));
        }
        notes.extend(filter_notes(policy, filter));
    }
    if !problems.is_empty() {
        return Err(Unrenderables(problems));
    }
    let title =
        format!("Istio resources for {}. Made by `portcullis manifests istio`; edit the policy instead.", policy.name);
    Ok(Rendering::of_several(&title, notes, &documents))
}

/// One `EnvoyExtensionPolicy` with all HTTP filters, for Envoy Gateway.
///
/// # Errors
/// What Envoy Gateway cannot express, and what `cluster` does not say.
pub fn render_envoy_gateway(policy: &Policy, cluster: &Cluster) -> Result<Rendering, Unrenderables> {
    /// Envoy Gateway's limit on the list.
    const FILTERS_MAX: usize = 16;

    let mut problems = misnamed_modules(policy, cluster);
    let filters: Vec<&Filter> = policy.filters_of(Protocol::Http).map(|(_, filter)| filter).collect();
    if filters.is_empty() {
        problems.push(Unrenderable::NoFilter);
    }
    let references = references(cluster);
    if references.len() < cluster.targets.len() {
        problems.push(Unrenderable::Target {
            problem: "Envoy Gateway attaches filters to resources, not to labels".to_owned(),
            hint: "name a resource, as in `--target Gateway/edge`",
        });
    } else if references.is_empty() {
        problems.push(Unrenderable::Target {
            problem: "it is not said what the filters are attached to".to_owned(),
            hint: "name a resource, as in `--target Gateway/edge` or `--target HTTPRoute/orders`",
        });
    }
    if filters.len() > FILTERS_MAX {
        problems.push(Unrenderable::Target {
            problem: format!(
                "Envoy Gateway takes at most {FILTERS_MAX} filters in one policy, and there are {}",
                filters.len()
            ),
            hint: "split the policy",
        });
    }
    let mut notes = shared_notes(policy);
    for (_, filter) in policy.filters_of(Protocol::Tcp) {
        notes.push(format!("filter `{}`: it is left out, since Envoy Gateway has no filters for TCP", filter.name));
    }
    notes.push(
        "Envoy Gateway must refuse escaped slashes as the policy does: `path.escapedSlashesAction: RejectRequest` in a \
         `ClientTrafficPolicy`"
            .to_owned(),
    );
    let mut wasm = Vec::new();
    for filter in filters {
        let configuration = json(filter).unwrap_or_else(|problem| {
            problems.push(problem);
            None
        });
        let Some(module) = cluster.modules.get(&filter.name) else {
            problems.push(Unrenderable::NoModule { filter: filter.name.clone() });
            continue;
        };
        let code = match module {
            ModuleSource::Image(image) => {
                let secret = cluster.pull_secret.as_deref();
                let secret = secret.map(|name| Document::map([("kind", "Secret".into()), ("name", name.into())]));
                let image = Document::map([("url", Document::from(image.as_str()))]).with_some("pullSecretRef", secret);
                Document::map([("type", "Image".into()), ("image", image)])
            }
            ModuleSource::Url(url) => {
                let http = Document::map([("url", Document::from(url.as_str())), ("sha256", sha256_of(filter).into())]);
                Document::map([("type", "HTTP".into()), ("http", http)])
            }
        };
        let keys = filter.environment_pass.iter().map(|name| Document::from(name.as_str()));
        let environment =
            (!filter.environment_pass.is_empty()).then(|| Document::map([("hostKeys", Document::list(keys))]));
        wasm.push(
            Document::map([("name", Document::from(filter.name.as_str()))])
                .with_some("rootID", (!filter.root_id.is_empty()).then(|| filter.root_id.as_str().into()))
                .with("code", code)
                .with("failOpen", filter.failure_policy == FailurePolicy::FailOpen)
                .with_some("env", environment)
                .with_some("config", configuration),
        );
        notes.extend(module_notes(module, filter));
        notes.extend(kubernetes_notes(filter));
        if !filter.environment_set.is_empty() {
            let names: Vec<&str> = filter.environment_set.iter().map(|(name, _)| name.as_str()).collect();
            notes.push(format!(
                "filter `{}`: it does not get the variables {}, whose values Envoy Gateway has no place for",
                filter.name,
                names.join(", ")
            ));
        }
        if filter.failure_policy == FailurePolicy::FailReload {
            notes.push(format!(
                "filter `{}`: after a crash its requests get 5xx until the proxy starts again; there is no `fail_reload`",
                filter.name
            ));
        }
        notes.extend(filter_notes(policy, filter));
    }
    if !problems.is_empty() {
        return Err(Unrenderables(problems));
    }
    let spec = Document::map([("targetRefs", Document::list(references)), ("wasm", Document::list(wasm))]);
    let document = resource("gateway.envoyproxy.io/v1alpha1", "EnvoyExtensionPolicy", "portcullis", cluster, spec);
    let title = format!(
        "Envoy Gateway resources for {}. Made by `portcullis manifests envoy-gateway`; edit the policy instead.",
        policy.name
    );
    Ok(Rendering::of_several(&title, notes, &[document]))
}

fn misnamed_modules(policy: &Policy, cluster: &Cluster) -> Vec<Unrenderable> {
    let known: Vec<&str> = policy.filters.iter().map(|filter| filter.name.as_str()).collect();
    let misnamed = cluster.modules.keys().filter(|name| !known.contains(&name.as_str()));
    misnamed.map(|name| Unrenderable::NoSuchFilter { name: name.clone(), known: known.join(", ") }).collect()
}

fn resource(version: &str, kind: &str, name: &str, cluster: &Cluster, spec: Document) -> Document {
    let namespace = cluster.namespace.as_deref().map(Document::from);
    let metadata = Document::map([("name", Document::from(name))]).with_some("namespace", namespace);
    Document::map([("apiVersion", version.into()), ("kind", kind.into()), ("metadata", metadata), ("spec", spec)])
}

fn references(cluster: &Cluster) -> Vec<Document> {
    let resources = cluster.targets.iter().filter_map(|target| match target {
        Target::Resource { kind, name } => Some((kind, name)),
        Target::Label { .. } => None,
    });
    let reference = |(kind, name): (&String, &String)| {
        let group = "gateway.networking.k8s.io";
        Document::map([
            ("group", Document::from(group)),
            ("kind", kind.as_str().into()),
            ("name", name.as_str().into()),
        ])
    };
    resources.map(reference).collect()
}

/// A filter's name as Kubernetes takes it.
fn resource_name(filter: &str) -> String {
    let name = filter.replace('_', "-");
    let trimmed = name.trim_matches('-');
    if trimmed.is_empty() { "filter".to_owned() } else { trimmed.to_owned() }
}

fn sha256_of(filter: &Filter) -> String {
    Sha256::digest(&*filter.module).iter().map(|byte| format!("{byte:02x}")).collect()
}

const NOT_JSON: &str = "Kubernetes carries JSON only; give the filter a configuration in JSON";

/// The configuration, which must be JSON.
fn json(filter: &Filter) -> Result<Option<Document>, Unrenderable> {
    if filter.configuration.is_empty() {
        return Ok(None);
    }
    let refused = |problem: String, hint| Unrenderable::Configuration { filter: filter.name.clone(), problem, hint };
    Document::from_json(&filter.configuration).map(Some).map_err(|error| match error {
        JsonRefused::Syntax(error) => refused(format!("is not JSON: {error}"), NOT_JSON),
        JsonRefused::Twice(key) => {
            refused(format!("has the key `{key}` twice in one object"), "remove one; readers differ in which they use")
        }
    })
}

/// The same for Istio, which hands the configuration on as a protobuf `Struct`: an object whose numbers are doubles.
fn istio_configuration(filter: &Filter) -> Result<Option<Document>, Unrenderable> {
    let Some(document) = json(filter)? else { return Ok(None) };
    let refused =
        |problem: String, hint| Err(Unrenderable::Configuration { filter: filter.name.clone(), problem, hint });
    if !matches!(document, Document::Map(_)) {
        return refused("is not a JSON object".to_owned(), "Istio carries objects only: write `{ ... }`");
    }
    if let Some(number) = document.number_beyond_double() {
        return refused(
            format!("has the number {number}, which a double cannot hold"),
            "Istio turns numbers into doubles: write it as a string, if the filter takes one",
        );
    }
    Ok(Some(document))
}

fn istio_environment(filter: &Filter) -> Option<Document> {
    let passed = filter
        .environment_pass
        .iter()
        .map(|name| Document::map([("name", Document::from(name.as_str())), ("valueFrom", "HOST".into())]));
    let set = filter.environment_set.iter().map(|(name, value)| {
        Document::map([
            ("name", Document::from(name.as_str())),
            ("valueFrom", "INLINE".into()),
            ("value", value.as_str().into()),
        ])
    });
    let all: Vec<Document> = passed.chain(set).collect();
    (!all.is_empty()).then(|| Document::map([("env", Document::list(all))]))
}

/// What holds for all filters, in either.
fn shared_notes(policy: &Policy) -> Vec<String> {
    let mut notes = vec![
        "only filters are here: listeners, routes and upstreams of the policy are not, and each filter sees every request of \
         what it is attached to"
            .to_owned(),
    ];
    let all: BTreeSet<usize> = policy.filters_of(Protocol::Http).map(|(index, _)| index).collect();
    for route in &policy.routes {
        let without: Vec<String> = all
            .iter()
            .filter(|index| !route.filters.contains(index))
            .filter_map(|index| policy.filters.get(*index))
            .map(|filter| format!("`{}`", filter.name))
            .collect();
        if !without.is_empty() {
            notes.push(format!(
                "route `{}` does not pass {} in the policy; here its requests do, unless rules in the filter's own configuration say otherwise",
                route.name,
                without.join(", ")
            ));
        }
    }
    if policy.logging.level != LogLevel::Info {
        notes.push(format!("the log level `{}` is set elsewhere", level_name(policy.logging.level)));
    }
    for listener in &policy.listeners {
        if matches!(listener.service, Service::Tcp(_)) {
            notes.push(format!("listener `{}` forwards TCP, and is not here", listener.name));
        }
    }
    notes
}

/// What a filter is not promised, in either.
fn kubernetes_notes(filter: &Filter) -> Vec<String> {
    let name = &filter.name;
    let mut notes = Vec::new();
    if !filter.configuration.is_empty() {
        notes.push(format!("filter `{name}`: it gets its configuration as JSON written anew, not byte by byte"));
    }
    if filter.protocol == Protocol::Http && filter.allow_on_headers_stop_iteration {
        notes.push(format!(
            "filter `{name}`: while it holds a request's fields it does not see the body: `allow_on_headers_stop_iteration` cannot be set"
        ));
    }
    if !filter.vm_id.is_empty() {
        notes.push(format!(
            "filter `{name}`: `vm_id` cannot be set, so it shares no data and no queues with other filters"
        ));
    }
    if !filter.vm_configuration.is_empty() {
        notes.push(format!("filter `{name}`: `vm_configuration` cannot be set"));
    }
    if filter.capabilities.is_some() {
        notes.push(format!("filter `{name}`: it can call every host function; `capabilities` is not enforced"));
    }
    if !filter.allowed_upstreams.is_empty() {
        notes.push(format!(
            "filter `{name}`: the clusters that it calls have other names there, such as `outbound|443||keys.example`"
        ));
    }
    notes
}

fn module_notes(module: &ModuleSource, filter: &Filter) -> Option<String> {
    let name = &filter.name;
    match module {
        ModuleSource::Image(image) if !image.contains('@') => Some(format!(
            "filter `{name}`: whoever can write to the registry can replace the module: name the image by its digest, \
             `{image}@sha256:...`"
        )),
        ModuleSource::Image(_) | ModuleSource::Url(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_images_with_a_registry_or_urls_with_a_path() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        let image = |text: &str| ModuleSource::Image(text.to_owned());
        assert_eq!("r.example:5000/a/b:1".parse(), Ok(image("r.example:5000/a/b:1")));
        assert_eq!(format!("oci://r.example/a@{digest}").parse(), Ok(image(&format!("r.example/a@{digest}"))));
        assert_eq!("https://a.example/b.wasm".parse(), Ok(ModuleSource::Url("https://a.example/b.wasm".to_owned())));
        for bad in [
            "",
            "a",
            "a/",
            "/a",
            "r.example/a:",
            "r.example/a@sha256:00",
            "r.example/a@md5:00",
            "ftp://a/b",
            "https://a",
            "a b/c",
        ] {
            bad.parse::<ModuleSource>().expect_err(bad);
        }
    }

    #[test]
    fn targets_are_resources_or_labels() {
        let resource = |kind: &str, name: &str| Target::Resource { kind: kind.to_owned(), name: name.to_owned() };
        assert_eq!("Gateway/edge".parse(), Ok(resource("Gateway", "edge")));
        assert_eq!("HTTPRoute/a.b".parse(), Ok(resource("HTTPRoute", "a.b")));
        let label = Target::Label { key: "app.kubernetes.io/name".to_owned(), value: "edge".to_owned() };
        assert_eq!("app.kubernetes.io/name=edge".parse(), Ok(label));
        for bad in ["", "Gateway", "gateway/edge", "Gateway/", "Gateway/Edge", "Gateway/-a", "=a", "a=b c", "Service/a"]
        {
            bad.parse::<Target>().expect_err(bad);
        }
    }

    #[test]
    fn names_of_filters_become_names_of_resources() {
        assert_eq!(resource_name("a_b"), "a-b");
        assert_eq!(resource_name("a_"), "a");
        assert!(
            is_resource_name("a-b.c") && !is_resource_name("a_b") && !is_resource_name("") && !is_resource_name("a-")
        );
    }
}
