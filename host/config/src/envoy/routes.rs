//! Routes, which are one list in the policy, as Envoy's virtual hosts.
//!
//! Envoy first chooses the virtual host with the most specific domain, then the first route in it that matches.
//! The policy's host patterns are either nested or disjoint. So for each pattern there is one virtual host, and it
//! gets, in order, every route that has a pattern covering it: for any host, the routes Envoy looks at are exactly
//! those whose hosts match, in the policy's order.

use super::{Document, duration, operator_cluster_name, typed_config, upstream_cluster_name};
use crate::file::Protocol;
use crate::policy::Policy;
use crate::route::{Action, FieldCondition, FieldTest, PathPattern, Response, Route, Segment};

/// The name of the route that answers what no route of the policy matches.
const NO_ROUTE: &str = "portcullis-no-route";
/// The name of the route that refuses paths which Envoy's own normalisation lets through.
const BAD_PATH: &str = "portcullis-bad-path";
/// What [`crate::Target::parse`] refuses in a path that Envoy has normalised: broken escapes, `..;` spelled with
/// escapes, and `//`. (What does not begin with `/` gets 404 from Envoy before it looks for a route.)
const BAD_PATH_REGEX: &str = r".*%[0-9A-Fa-f]?([^0-9A-Fa-f].*)?|.*/\.\.?(;|%3[Bb]).*|//";
/// The name of the route that refuses authorities which Envoy lets through: it joins two `host` lines, for example.
const BAD_AUTHORITY: &str = "portcullis-bad-authority";
/// What [`crate::normal_authority`] accepts, once Envoy has removed a final dot.
const AUTHORITY_REGEX: &str = r"(([A-Za-z0-9_-]+\.)*[A-Za-z0-9_-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?";

pub(super) fn route_config(policy: &Policy) -> Document {
    let hosts = policy.host_patterns().into_iter().map(|domain| {
        let bad_path = Document::map([("safe_regex", regex(BAD_PATH_REGEX))]);
        let routes = policy
            .routes
            .iter()
            .filter(|route| route.hosts.iter().any(|pattern| pattern.covers(domain)))
            .map(|route| route_document(policy, route));
        let any_path = Document::map([("prefix", "/".into())]);
        let bad_authority = Document::map([("prefix", Document::from(""))]).with(
            "headers",
            Document::list([Document::map([("name", Document::from(":authority"))])
                .with("string_match", Document::map([("safe_regex", regex(AUTHORITY_REGEX))]))
                .with("invert_match", true)]),
        );
        let routes = [refusal(policy, BAD_AUTHORITY, bad_authority, 400), refusal(policy, BAD_PATH, bad_path, 400)]
            .into_iter()
            .chain(routes)
            .chain([refusal(policy, NO_ROUTE, any_path, 404)]);
        let domain = domain.domain();
        Document::map([
            ("name", Document::from(domain.as_str())),
            ("domains", Document::list([domain.as_str().into()])),
            ("routes", Document::list(routes)),
        ])
    });
    let longest_body = policy.routes.iter().filter_map(|route| match &route.action {
        Action::Respond(response) => Some(response.body.len()),
        _ => None,
    });
    Document::map([
        ("name", Document::from("portcullis")),
        ("ignore_port_in_host_matching", true.into()),
        // Envoy's notes to itself, which our host does not make.
        ("request_headers_to_remove", Document::list(["x-envoy-external-address".into(), "x-envoy-internal".into()])),
        // Envoy's own limit of 4 KiB is for configurations that nobody has looked at.
        ("max_direct_response_body_size_bytes", longest_body.max().unwrap_or(0).max(4096).into()),
        ("virtual_hosts", Document::list(hosts)),
    ])
}

fn route_document(policy: &Policy, route: &Route) -> Document {
    let (key, action) = match &route.action {
        Action::Upstream(index) => {
            let name = policy.upstreams.get(*index).map_or("", upstream_cluster_name);
            ("route", forward(policy, route, name))
        }
        Action::Operator(index) => {
            let name = policy.operators.get(*index).map(operator_cluster_name).unwrap_or_default();
            ("route", forward(policy, route, &name))
        }
        Action::Respond(response) => ("direct_response", direct_response(response)),
    };
    let document =
        Document::map([("name", Document::from(route.name.as_str())), ("match", matcher(route)), (key, action)]);
    let document = match &route.action {
        Action::Respond(response) => document.with_some("response_headers_to_add", response_fields(&response.fields)),
        _ => document,
    };
    let others = http_filters(policy).filter(|index| !route.filters.contains(index));
    document.with_some("typed_per_filter_config", disabled(policy, others))
}

/// Answers with a status, and no filter runs.
fn refusal(policy: &Policy, name: &str, matches: Document, status: u64) -> Document {
    Document::map([
        ("name", Document::from(name)),
        ("match", matches),
        ("direct_response", Document::map([("status", status.into())])),
    ])
    .with_some("typed_per_filter_config", disabled(policy, http_filters(policy)))
}

fn http_filters(policy: &Policy) -> impl Iterator<Item = usize> {
    policy.filters_of(Protocol::Http).map(|(index, _)| index)
}

fn disabled(policy: &Policy, filters: impl Iterator<Item = usize>) -> Option<Document> {
    let entries: Vec<(String, Document)> = filters
        .filter_map(|index| policy.filters.get(index))
        .map(|filter| {
            (filter.name.clone(), typed_config("envoy.config.route.v3.FilterConfig", [("disabled", true.into())]))
        })
        .collect();
    (!entries.is_empty()).then(|| Document::map(entries))
}

fn matcher(route: &Route) -> Document {
    let path = match &route.path {
        PathPattern::Any => ("prefix", "/".into()),
        PathPattern::Exact(path) => ("path", path.as_str().into()),
        PathPattern::Prefix(prefix) => ("path_separated_prefix", prefix.as_str().into()),
        PathPattern::Below(prefix) => ("prefix", prefix.as_str().into()),
        PathPattern::Template(segments) => {
            let regex: String = segments
                .iter()
                .map(|segment| match segment {
                    Segment::Text(text) => format!("/{}", regex_escape(text)),
                    Segment::Variable(_) => "/[^/]+".to_owned(),
                })
                .collect();
            ("safe_regex", self::regex(&regex))
        }
    };
    let methods = route.methods.as_ref().map(|methods| {
        let test = match methods.as_slice() {
            [method] => ("exact", Document::from(method.as_str())),
            methods => {
                let regex: Vec<String> = methods.iter().map(|method| regex_escape(method)).collect();
                ("safe_regex", self::regex(&regex.join("|")))
            }
        };
        Document::map([("name", ":method".into()), ("string_match", Document::map([test]))])
    });
    let headers: Vec<Document> = methods.into_iter().chain(route.fields.iter().map(field_matcher)).collect();
    let headers = (!headers.is_empty()).then_some(Document::List(headers));
    Document::map([path]).with_some("headers", headers)
}

fn field_matcher(condition: &FieldCondition) -> Document {
    let document = Document::map([("name", Document::from(condition.name.as_str()))]);
    match &condition.test {
        FieldTest::Present => document.with("present_match", true),
        FieldTest::Absent => document.with("present_match", true).with("invert_match", true),
        FieldTest::Exact(value) => document.with("string_match", Document::map([("exact", value.as_str().into())])),
    }
}

fn forward(policy: &Policy, route: &Route, cluster: &str) -> Document {
    // A response may stay silent for as long as its route allows.
    let idle = || policy.listeners.iter().map(|listener| listener.limits.stream_idle_timeout);
    let longer = idle().any(|idle| route.timeout >= idle);
    let idle = longer.then(|| duration(idle().fold(route.timeout, std::time::Duration::max)));
    Document::map([("cluster", Document::from(cluster)), ("timeout", duration(route.timeout))])
        .with_some("idle_timeout", idle)
        .with_some("host_rewrite_literal", route.host_rewrite.as_deref().map(Document::from))
        .with_path_rewrite(route)
}

impl Document {
    fn with_path_rewrite(self, route: &Route) -> Self {
        let Some(rewrite) = &route.path_rewrite else {
            return self;
        };
        let new = rewrite.replacement.as_str();
        // Where the replacement ends with a slash, the slash after the prefix goes with the prefix; Envoy's
        // `prefix_rewrite` would leave two of them.
        let regex = match &route.path {
            PathPattern::Prefix(prefix) if new.ends_with('/') => format!("^{}/?", regex_escape(prefix)),
            PathPattern::Below(prefix) => format!("^{}", regex_escape(prefix)),
            PathPattern::Any => "^/".to_owned(),
            _ => return self.with("prefix_rewrite", new),
        };
        self.with("regex_rewrite", Document::map([("pattern", self::regex(&regex)), ("substitution", new.into())]))
    }
}

fn direct_response(response: &Response) -> Document {
    let body =
        (!response.body.is_empty()).then(|| Document::map([("inline_string", Document::from(response.body.as_str()))]));
    Document::map([("status", Document::from(u64::from(response.status)))]).with_some("body", body)
}

fn response_fields(fields: &[(String, String)]) -> Option<Document> {
    let fields: Vec<Document> = fields
        .iter()
        .map(|(name, value)| {
            // Envoy would substitute commands such as %REQ(cookie)%; a policy's value is only text.
            let value = value.replace('%', "%%");
            Document::map([
                ("header", Document::map([("key", name.as_str().into()), ("value", value.into())])),
                ("append_action", "OVERWRITE_IF_EXISTS_OR_ADD".into()),
            ])
            .with("keep_empty_value", true)
        })
        .collect();
    (!fields.is_empty()).then_some(Document::List(fields))
}

fn regex(text: &str) -> Document {
    Document::map([("regex", text.into())])
}

/// Every character that RE2 could give a meaning stands for itself.
fn regex_escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        if !(c.is_ascii_alphanumeric() || c == '_' || c == '/' || c == '-') {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}
