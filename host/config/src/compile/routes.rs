//! Routes: what a normalised request cannot match is refused, and so is a route that an earlier one hides.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::names::{host_pattern, is_token};
use super::{Compiler, References, owned, present};
use crate::file::{self, Protocol};
use crate::policy::{Operator, Upstream};
use crate::route::{
    Action, FieldCondition, FieldTest, HostPattern, PathPattern, PathRewrite, Response, Route, Segment,
};
use crate::target::Target;
use crate::units::Time;

const RESPONSE_BODY_BYTES_MAX: usize = 64 * 1024;

impl Compiler<'_> {
    pub(super) fn routes(
        &mut self,
        written: Vec<Option<file::Route>>,
        references: &References,
        upstreams: &[Upstream],
        operators: &[Operator],
    ) -> Vec<Route> {
        if written.is_empty() && self.root_has("routes") && references.serves_http != Some(false) {
            self.wrong(
                "routes",
                "the list is empty, so every request would get 404",
                "add e.g. `{ name: all, upstream: NAME }`",
            );
        }
        self.unique_names("routes", present(&written).map(|(index, route)| (index, route.name.as_str())));
        let mut routes: Vec<Route> = Vec::new();
        for (index, route) in owned(written) {
            let path = format!("routes[{index}]");
            let before = self.mistakes.len();
            let compiled = self.route(&path, route, references, upstreams, operators);
            let Some(compiled) = compiled else { continue };
            if self.mistakes.len() == before
                && let Some(earlier) = routes.iter().find(|earlier| hides(earlier, &compiled))
            {
                self.wrong(
                    &path,
                    format!("no request can reach route `{}`: `{}` above takes them all", compiled.name, earlier.name),
                    "put the narrower route first",
                );
            }
            routes.push(compiled);
        }
        routes
    }

    fn route(
        &mut self,
        path: &str,
        route: file::Route,
        references: &References,
        upstreams: &[Upstream],
        operators: &[Operator],
    ) -> Option<Route> {
        let at = |field: &str| format!("{path}.{field}");
        let hosts = self.hosts(&at("match.hosts"), route.matches.hosts.as_deref());
        let pattern = match &route.matches.path {
            Some(pattern) => self.path_pattern(&at("match.path"), pattern),
            None => Some(PathPattern::Any),
        };
        let methods = route.matches.methods.map(|methods| self.methods(&at("match.methods"), methods));
        let fields = self.field_conditions(&at("match.headers"), &route.matches.headers);
        let chosen: BTreeSet<usize> = match &route.filters {
            None => references.filters_of(Protocol::Http).collect(),
            Some(names) => {
                let mut chosen = BTreeSet::new();
                for (index, name) in names.iter().enumerate() {
                    let path = format!("{path}.filters[{index}]");
                    let Some(found) = self.find(&path, name, &references.filters) else { continue };
                    if references.protocols.get(found) != Some(&Protocol::Http) {
                        self.wrong(
                            &path,
                            format!("`{name}` looks at TCP connections, so a request never meets it"),
                            format!("remove `{name}`; it belongs to a listener with `tcp`"),
                        );
                    } else if !chosen.insert(found) {
                        self.wrong(&path, format!("the filter `{name}` is in the list twice"), "keep one of the two");
                    }
                }
                chosen
            }
        };
        let action = match (route.upstream, route.operator, route.respond) {
            (Some(name), None, None) => {
                let found = self.find(&at("upstream"), &name, &references.upstreams);
                if let Some(upstream) = found {
                    self.carries_requests(&at("upstream"), upstream, references);
                }
                found.map(Action::Upstream)
            }
            (None, Some(name), None) => self.find(&at("operator"), &name, &references.operators).map(Action::Operator),
            (None, None, Some(respond)) => {
                let response = self.response(&at("respond"), respond);
                Some(Action::Respond(Arc::new(response)))
            }
            (None, None, None) => {
                self.wrong(
                    path,
                    "the route leads nowhere",
                    "add `upstream: NAME`, `operator: NAME` or `respond: { status: 200 }`",
                );
                None
            }
            _ => {
                self.wrong(
                    path,
                    "the route leads to several places",
                    "keep one of `upstream`, `operator` and `respond`",
                );
                None
            }
        };
        let timeout = match (route.timeout, &action) {
            (Some(time), Some(Action::Respond(_))) => {
                self.wrong(&at("timeout"), "`respond` answers at once, so a timeout has no effect", "remove `timeout`");
                time.0
            }
            (Some(time), _) => self.time(&at("timeout"), time, Time::secs(86_400)),
            (None, Some(Action::Upstream(index))) => {
                upstreams.get(*index).map_or(Duration::ZERO, |upstream| upstream.request_timeout)
            }
            // Behind the operator's own limits, which end a request with their cause.
            (None, Some(Action::Operator(index))) => operators.get(*index).map_or(Duration::ZERO, |operator| {
                operator.limits.start_time.0 + operator.limits.wall_time.0 + Duration::from_secs(1)
            }),
            (None, _) => Duration::ZERO,
        };
        let is_response = matches!(action, Some(Action::Respond(_)));
        for (key, given) in
            [("host_rewrite", route.host_rewrite.is_some()), ("prefix_rewrite", route.prefix_rewrite.is_some())]
        {
            if given && is_response {
                self.wrong(
                    &at(key),
                    format!("`respond` forwards nothing, so `{key}` has no effect"),
                    format!("remove `{key}`"),
                );
            }
        }
        if let Some(host) = &route.host_rewrite
            && (host.is_empty() || host.contains('@') || host.parse::<http::uri::Authority>().is_err())
        {
            self.wrong(&at("host_rewrite"), format!("`{host}` is not a host"), "write e.g. `orders.internal`");
        }
        let path_rewrite = match (&route.prefix_rewrite, &pattern) {
            (Some(rewrite), Some(pattern)) => self.path_rewrite(&at("prefix_rewrite"), rewrite, pattern),
            _ => None,
        };
        Some(Route {
            name: route.name,
            hosts,
            path: pattern?,
            methods,
            fields,
            filters: chosen.into_iter().collect(),
            action: action?,
            timeout,
            host_rewrite: route.host_rewrite,
            path_rewrite,
        })
    }

    fn hosts(&mut self, path: &str, written: Option<&[String]>) -> Vec<HostPattern> {
        let Some(written) = written else {
            return vec![HostPattern::Any];
        };
        if written.is_empty() {
            self.wrong(path, "the list is empty, so no request would match", "name hosts, or remove it to match all");
        }
        let mut hosts = Vec::new();
        for (index, text) in written.iter().enumerate() {
            match host_pattern(text) {
                Ok(pattern) if hosts.contains(&pattern) => {
                    self.wrong(
                        &format!("{path}[{index}]"),
                        format!("`{text}` is in the list twice"),
                        "keep one of the two",
                    );
                }
                Ok(pattern) => hosts.push(pattern),
                Err(hint) => self.wrong(&format!("{path}[{index}]"), format!("`{text}` is not a host to match"), hint),
            }
        }
        hosts
    }

    fn path_pattern(&mut self, path: &str, written: &file::PathMatch) -> Option<PathPattern> {
        match written {
            file::PathMatch::Exact(text) => {
                self.literal_path(&format!("{path}.exact"), text).then(|| PathPattern::Exact(text.clone()))
            }
            file::PathMatch::Prefix(text) => {
                if !self.literal_path(&format!("{path}.prefix"), text) {
                    return None;
                }
                Some(match text.as_str() {
                    "/" => PathPattern::Any,
                    below if below.ends_with('/') => PathPattern::Below(below.to_owned()),
                    prefix => PathPattern::Prefix(prefix.to_owned()),
                })
            }
            file::PathMatch::Template(text) => self.template(&format!("{path}.template"), text),
        }
    }

    /// A path that a normalised request can have.
    fn literal_path(&mut self, path: &str, text: &str) -> bool {
        let problem = format!("no request path can be or begin with `{text}`");
        if !text.starts_with('/') {
            self.wrong(path, problem, "begin with `/`");
        } else if text.contains('?') {
            self.wrong(path, problem, "leave out the query: only the path is compared");
        } else if text.contains(['{', '}', '*']) {
            self.wrong(path, problem, "write `template: \"/orders/{id}\"` for a path with variable segments");
        } else {
            match Target::parse(text.as_bytes()) {
                Ok(target) if target.as_bytes() == text.as_bytes() => return true,
                Ok(target) => {
                    let normal = String::from_utf8_lossy(target.as_bytes()).into_owned();
                    self.wrong(path, problem, format!("requests are normalised first; write `{normal}`"));
                }
                Err(error) => self.wrong(path, problem, format!("{error}; write it the way clients send it")),
            }
        }
        false
    }

    fn template(&mut self, path: &str, text: &str) -> Option<PathPattern> {
        let Some(rest) = text.strip_prefix('/') else {
            self.wrong(path, format!("`{text}` is not a path template"), "begin with `/`");
            return None;
        };
        let mut segments = Vec::new();
        let mut variables = BTreeSet::new();
        for part in rest.split('/') {
            let variable = part.strip_prefix('{').and_then(|part| part.strip_suffix('}'));
            match variable {
                Some(name) => {
                    let well_formed =
                        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
                    if !well_formed {
                        self.wrong(
                            path,
                            format!("`{{{name}}}` is not a variable"),
                            "name it with letters, digits and `_`, e.g. `{order_id}`",
                        );
                        return None;
                    }
                    if !variables.insert(name) {
                        self.wrong(
                            path,
                            format!("the variable `{{{name}}}` appears twice"),
                            "give each segment its own name",
                        );
                        return None;
                    }
                    segments.push(Segment::Variable(name.to_owned()));
                }
                None if part.contains(['{', '}', '*']) => {
                    self.wrong(
                        path,
                        format!("`{part}` is not a segment"),
                        "a variable is a whole segment: `/orders/{order_id}/items`",
                    );
                    return None;
                }
                None => segments.push(Segment::Text(part.to_owned())),
            }
        }
        let literal: String = segments
            .iter()
            .map(|segment| match segment {
                Segment::Text(text) => format!("/{text}"),
                Segment::Variable(_) => "/x".to_owned(),
            })
            .collect();
        self.literal_path(path, &literal).then_some(PathPattern::Template(segments))
    }

    fn methods(&mut self, path: &str, methods: Vec<String>) -> Vec<String> {
        if methods.is_empty() {
            self.wrong(path, "the list is empty, so no request would match", "name methods, or remove it to match all");
        }
        for (index, method) in methods.iter().enumerate() {
            let path = format!("{path}[{index}]");
            let upper = method.to_ascii_uppercase();
            if !is_token(method) {
                self.wrong(&path, format!("`{method}` is not a method"), "write e.g. `GET`");
            } else if upper == "CONNECT" {
                self.wrong(&path, "`CONNECT` is not served: this is no tunnel", "remove it");
            } else if *method != upper {
                self.wrong(
                    &path,
                    format!("methods' case matters, and `{method}` is not used by anyone"),
                    format!("write `{upper}`"),
                );
            } else if methods.iter().take(index).any(|earlier| earlier == method) {
                self.wrong(&path, format!("`{method}` is in the list twice"), "keep one of the two");
            }
        }
        methods
    }

    fn field_conditions(&mut self, path: &str, written: &[file::HeaderMatch]) -> Vec<FieldCondition> {
        let mut conditions = Vec::new();
        for (index, header) in written.iter().enumerate() {
            let path = format!("{path}[{index}]");
            let name = header.name.to_ascii_lowercase();
            if !is_token(&name) {
                self.wrong(
                    &format!("{path}.name"),
                    format!("`{}` is not a field name", header.name),
                    "write e.g. `x-api-version`",
                );
            } else if name == "host" {
                self.wrong(&format!("{path}.name"), "the host is not compared here", "use `match.hosts`");
            }
            let test = match (&header.exact, header.present) {
                (Some(value), None) => {
                    if value.trim() != value || value.contains(|c: char| c.is_control()) {
                        self.wrong(
                            &format!("{path}.exact"),
                            "no field can have this value",
                            "remove spaces at its ends and control characters",
                        );
                    }
                    FieldTest::Exact(value.clone())
                }
                (None, Some(true)) => FieldTest::Present,
                (None, Some(false)) => FieldTest::Absent,
                (None, None) => {
                    self.wrong(
                        &path,
                        "the condition says nothing about the field",
                        "add `exact: VALUE` or `present: true`",
                    );
                    continue;
                }
                (Some(_), Some(_)) => {
                    self.wrong(&path, "there is both `exact` and `present`", "keep one of the two");
                    continue;
                }
            };
            conditions.push(FieldCondition { name, test });
        }
        conditions
    }

    fn response(&mut self, path: &str, respond: file::Respond) -> Response {
        if !(200..=599).contains(&respond.status) {
            self.wrong(
                &format!("{path}.status"),
                format!("{} is not from 200 to 599", respond.status),
                "write e.g. `200`",
            );
        }
        if matches!(respond.status, 204 | 205 | 304) && !respond.body.is_empty() {
            self.wrong(
                &format!("{path}.body"),
                format!("an answer with status {} has no body", respond.status),
                "remove `body`, or use another status",
            );
        }
        if respond.body.len() > RESPONSE_BODY_BYTES_MAX {
            self.wrong(
                &format!("{path}.body"),
                format!("the body has {} bytes, more than 64 KiB", respond.body.len()),
                "serve it from an upstream",
            );
        }
        let mut fields = Vec::new();
        for (name, value) in respond.fields {
            let at = format!("{path}.fields.{name}");
            let lower = name.to_ascii_lowercase();
            if !is_token(&lower) {
                self.wrong(&at, format!("`{name}` is not a field name"), "write e.g. `location`");
            } else if matches!(
                lower.as_str(),
                "content-length" | "transfer-encoding" | "connection" | "keep-alive" | "upgrade" | "te" | "trailer"
            ) {
                self.wrong(&at, format!("`{lower}` is set by the proxy itself"), "remove it");
            } else if fields.iter().any(|(earlier, _)| *earlier == lower) {
                self.wrong(&at, format!("`{lower}` is given twice"), "keep one of the two");
            } else if value.contains(|c: char| !(c == '\t' || c.is_ascii_graphic() || c == ' ')) {
                self.wrong(&at, "the value holds characters that a field cannot have", "use printable ASCII");
            }
            fields.push((lower, value));
        }
        if !respond.body.is_empty() && !fields.iter().any(|(name, _)| name == "content-type") {
            fields.push(("content-type".to_owned(), "text/plain".to_owned()));
        }
        Response { status: respond.status, fields, body: respond.body }
    }

    fn path_rewrite(&mut self, path: &str, rewrite: &str, pattern: &PathPattern) -> Option<PathRewrite> {
        if !self.literal_path(path, rewrite) {
            return None;
        }
        let with_slash = || {
            if rewrite.ends_with('/') { rewrite.to_owned() } else { format!("{rewrite}/") }
        };
        match pattern {
            PathPattern::Any => Some(PathRewrite { replaced_bytes: 1, replacement: with_slash() }),
            PathPattern::Below(prefix) => Some(PathRewrite { replaced_bytes: prefix.len(), replacement: with_slash() }),
            PathPattern::Prefix(text) | PathPattern::Exact(text) => {
                Some(PathRewrite { replaced_bytes: text.len(), replacement: rewrite.to_owned() })
            }
            PathPattern::Template(_) => {
                self.wrong(
                    path,
                    "a `template` has no prefix to replace",
                    "use `path: { prefix: ... }`, or remove `prefix_rewrite`",
                );
                None
            }
        }
    }
}

/// Whether no request can get past `earlier` to `later`.
fn hides(earlier: &Route, later: &Route) -> bool {
    let path = match (&earlier.path, &later.path) {
        (PathPattern::Any, _) => true,
        (a, b) if a == b => true,
        (PathPattern::Prefix(_) | PathPattern::Below(_), PathPattern::Exact(path)) => {
            earlier.path.matches(path.as_bytes())
        }
        (PathPattern::Prefix(_) | PathPattern::Below(_), PathPattern::Prefix(path) | PathPattern::Below(path)) => {
            earlier.path.matches(path.as_bytes())
        }
        _ => false,
    };
    let methods = match (&earlier.methods, &later.methods) {
        (None, _) => true,
        (Some(_), None) => false,
        (Some(earlier), Some(later)) => later.iter().all(|method| earlier.contains(method)),
    };
    let hosts = later.hosts.iter().all(|host| earlier.hosts.iter().any(|pattern| pattern.covers(host)));
    path && methods && hosts && earlier.fields.iter().all(|condition| later.fields.contains(condition))
}
