//! The envelope around every filter's configuration: what holds where.
//!
//! Envoy's Wasm filter has no configuration per route, so a filter carries its own rules: the first whose `match` fits
//! a request decides which policy holds, and `default_policy` holds where none fits. There is no silent default.

use std::cell::OnceCell;
use std::collections::BTreeSet;

use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::config_error::{ConfigErrors, JsonPath};
use crate::host::Host;
use crate::path::{Oddities, Oddity, Template, literal_path};
use crate::request::Request;

/// What a filter's decisions do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// A request that is denied goes no further.
    #[default]
    Enforce,
    /// Denials are counted and logged, and every request passes.
    Shadow,
    /// The filter decides nothing. Client-sent `x-portcullis-*` fields are still removed.
    Off,
}

/// What happens when something a check depends on (a key server, a limit service) does not answer. It never excuses
/// credentials that are missing or bad.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FailureMode {
    /// The request is denied with 503.
    #[default]
    Deny,
    /// The request passes, and a metric and a log line say so.
    Allow,
}

/// The part of a configuration that all filters share; `C` is what the filter calls a policy.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Envelope<C> {
    /// What the filter's decisions do. Default `enforce`.
    #[serde(default)]
    pub mode: Mode,
    /// What happens when a check cannot be made because something it depends on does not answer. Default `deny`.
    #[serde(default)]
    pub failure_mode: FailureMode,
    /// Policies for some requests; the first rule that fits decides. Absent: `default_policy` holds for all.
    pub rules: Option<Vec<RuleConfig<C>>>,
    /// The policy where no rule fits. It has no default: the operator says what holds for everything else.
    pub default_policy: C,
}

/// The keys of [`Envelope`]; a filter's own keys stand beside them.
pub(crate) const ENVELOPE_KEYS: &[&str] = &["mode", "failure_mode", "rules", "default_policy"];

/// One rule: a policy and the requests for which it holds.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RuleConfig<C> {
    /// The rule's name in metrics and logs: 1 to 64 of `a-z`, `0-9`, `_` and `-`; `default` is taken.
    pub name: String,
    /// The requests for which the rule holds.
    #[serde(rename = "match")]
    pub matches: MatchConfig,
    /// What a path of this rule may contain although servers disagree on what it means. Absent: nothing of the kind.
    #[serde(default)]
    pub dangerously_allow_in_path: Vec<Oddity>,
    /// The policy that holds.
    pub policy: C,
}

/// What a request must look like; an absent key matches every request.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MatchConfig {
    /// Hosts without port: `api.example.com`, or `*.example.com` for all hosts below `example.com`, or `*`.
    pub hosts: Option<Vec<String>>,
    /// Methods, in capitals: `GET`. `HEAD` is not implied by `GET`.
    pub methods: Option<Vec<String>>,
    /// The path, compared in normalised form.
    pub path: Option<PathMatchConfig>,
    /// Fields of the request. The client chooses these, so no rule with a weaker policy should rest on them.
    pub headers: Option<Vec<HeaderMatchConfig>>,
    /// Names of the proxy's own routes (the property `xds.route_name`).
    pub route_names: Option<Vec<String>>,
}

/// One way to match a path.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PathMatchConfig {
    /// The whole path: `/orders`.
    Exact(String),
    /// A path and all paths below it, in whole segments: `/orders` takes in `/orders/1` but not `/ordersx`.
    Prefix(String),
    /// The whole path, with parameters for some segments: `/orders/{order_id}`.
    Template(String),
}

/// A condition on one field of the request.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeaderMatchConfig {
    /// The field's name.
    pub name: String,
    /// The field occurs once and has exactly this value.
    pub exact: Option<String>,
    /// The field occurs (`true`) or does not (`false`).
    pub present: Option<bool>,
}

/// The name of the rule that `default_policy` stands for, in metrics and logs.
pub(crate) const DEFAULT_RULE: &str = "default";

/// More rules than this are refused: they are searched in order, for every request.
const RULES_MAX: usize = 500;

/// Compiled rules, searched in order.
#[derive(Debug)]
pub struct Rules<P> {
    rules: Vec<Rule<P>>,
    default: P,
}

#[derive(Debug)]
struct Rule<P> {
    name: String,
    matches: Match,
    allowed_in_path: Oddities,
    policy: P,
}

/// Which rule decides about a request.
#[derive(Debug)]
pub struct Selected<'a, P> {
    /// The rule's position; one past the last if none fits.
    pub index: usize,
    /// The rule's name; `default` if none fits.
    pub name: &'a str,
    /// The policy that holds.
    pub policy: &'a P,
    /// What in the request's path is ambiguous and not allowed by this rule.
    pub oddity: Option<Oddity>,
}

impl<P> Rules<P> {
    /// Finds the rule for a request.
    pub fn select(&self, request: &Request<'_>, host: &dyn Host) -> Selected<'_, P> {
        let oddities = request.path().oddities();
        // Asked at most once, and only if a rule wants to know.
        let asked = OnceCell::new();
        let route_name = || asked.get_or_init(|| host.property(&["xds", "route_name"])).as_deref();
        match self.rules.iter().enumerate().find(|(_, rule)| rule.matches.fits(request, route_name)) {
            Some((index, rule)) => Selected {
                index,
                name: &rule.name,
                policy: &rule.policy,
                oddity: oddities.first_beyond(rule.allowed_in_path),
            },
            None => Selected {
                index: self.rules.len(),
                name: DEFAULT_RULE,
                policy: &self.default,
                oddity: oddities.first_beyond(Oddities::default()),
            },
        }
    }
}

impl<C: DeserializeOwned> Envelope<C> {
    /// Reads the envelope's part of a configuration.
    pub(crate) fn read(part: Map<String, Value>, errors: &mut ConfigErrors) -> Option<Self> {
        if !part.contains_key("default_policy") {
            let hint = "say what holds where no rule fits; there is no silent default";
            errors.push_with_hint(&JsonPath::default(), "`default_policy` is missing", hint);
            return None;
        }
        errors.deserialize(Value::Object(part), &JsonPath::default(), &[])
    }

    /// Checks names and matches, and compiles each policy with `compile_policy`. `None` if anything is wrong.
    pub fn compile<P>(
        self,
        errors: &mut ConfigErrors,
        mut compile_policy: impl FnMut(C, &JsonPath, &mut ConfigErrors) -> Option<P>,
    ) -> Option<Rules<P>> {
        let before = errors.len();
        let root = JsonPath::default();
        let rules_at = root.key("rules");
        match self.rules.as_ref().map(Vec::len) {
            Some(0) => errors.push_with_hint(
                &rules_at,
                "the list is empty",
                "leave `rules` out if `default_policy` is to hold for all",
            ),
            Some(number) if number > RULES_MAX => errors.push_with_hint(
                &rules_at,
                format!("{number} rules, and at most {RULES_MAX} are taken"),
                "use templates and prefixes, or several filters",
            ),
            _ => {}
        }
        let mut rules: Vec<Rule<P>> = Vec::new();
        let mut names = BTreeSet::new();
        for (index, rule) in self.rules.unwrap_or_default().into_iter().enumerate() {
            let at = rules_at.index(index);
            check_rule_name(&rule.name, &names, &at.key("name"), errors);
            names.insert(rule.name.clone());
            let errors_before_match = errors.len();
            let matches = rule.matches.compile(&at.key("match"), errors);
            let match_is_good = errors.len() == errors_before_match;
            if let Some(earlier) = rules.iter().find(|earlier| match_is_good && earlier.matches.covers(&matches)) {
                errors.push_with_hint(
                    &at,
                    format!(
                        "`{}` is never reached: `{}` before it fits every request that this rule fits",
                        rule.name, earlier.name
                    ),
                    "put the narrower rule first",
                );
            }
            if let Some(policy) = compile_policy(rule.policy, &at.key("policy"), errors).filter(|_| match_is_good) {
                let allowed_in_path = rule.dangerously_allow_in_path.into_iter().collect();
                rules.push(Rule { name: rule.name, matches, allowed_in_path, policy });
            }
        }
        let default = compile_policy(self.default_policy, &root.key("default_policy"), errors)?;
        (errors.len() == before).then_some(Rules { rules, default })
    }
}

fn check_rule_name(name: &str, earlier: &BTreeSet<String>, at: &JsonPath, errors: &mut ConfigErrors) {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'-';
    if !(1..=64).contains(&name.len()) || !name.bytes().all(allowed) {
        errors.push_with_hint(at, format!("`{name}` is not a rule name"), "use 1 to 64 of `a-z`, `0-9`, `_` and `-`");
    } else if name == DEFAULT_RULE {
        errors.push_with_hint(at, "`default` is taken: metrics call `default_policy` so", "choose another name");
    } else if earlier.contains(name) {
        errors.push_with_hint(
            at,
            format!("another rule is called `{name}` too"),
            "metrics and logs need a name for each",
        );
    }
}

/// Conditions that must all hold; an empty list is no condition.
#[derive(Debug, PartialEq)]
struct Match {
    hosts: Vec<HostMatch>,
    methods: BTreeSet<String>,
    path: Option<PathMatch>,
    headers: Vec<HeaderMatch>,
    route_names: BTreeSet<String>,
}

#[derive(Debug, PartialEq)]
enum HostMatch {
    Exact(String),
    /// The part that begins with the dot: `.example.com`.
    Below(String),
    Any,
}

#[derive(Debug, PartialEq)]
enum PathMatch {
    Exact(String),
    /// Without the final slash, so the empty string stands for all paths.
    Prefix(String),
    Template(Template),
}

#[derive(Debug, PartialEq)]
struct HeaderMatch {
    name: String,
    condition: HeaderCondition,
}

#[derive(Debug, PartialEq)]
enum HeaderCondition {
    Exact(String),
    Present(bool),
}

impl Match {
    fn fits<'a>(&self, request: &Request<'_>, route_name: impl FnOnce() -> Option<&'a [u8]>) -> bool {
        (self.hosts.is_empty() || self.hosts.iter().any(|pattern| pattern.fits(request.host())))
            && (self.methods.is_empty() || self.methods.iter().any(|method| method.as_bytes() == request.method()))
            && self.path.as_ref().is_none_or(|path| path.fits(request))
            && self.headers.iter().all(|header| header.fits(request))
            && (self.route_names.is_empty()
                || route_name().is_some_and(|actual| self.route_names.iter().any(|name| name.as_bytes() == actual)))
    }

    /// Whether every request that fits `other` is known to fit `self` too.
    fn covers(&self, other: &Self) -> bool {
        let hosts = self.hosts.is_empty()
            || !other.hosts.is_empty() && other.hosts.iter().all(|b| self.hosts.iter().any(|a| a.covers(b)));
        let subset = |a: &BTreeSet<String>, b: &BTreeSet<String>| a.is_empty() || !b.is_empty() && b.is_subset(a);
        let path = match (&self.path, &other.path) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(a), Some(b)) => a.covers(b),
        };
        hosts
            && subset(&self.methods, &other.methods)
            && path
            && self.headers.iter().all(|header| other.headers.contains(header))
            && subset(&self.route_names, &other.route_names)
    }
}

impl HostMatch {
    fn fits(&self, host: &str) -> bool {
        match self {
            Self::Exact(exact) => exact == host,
            Self::Below(suffix) => host.len() > suffix.len() && host.ends_with(suffix),
            Self::Any => true,
        }
    }

    fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Any, _) => true,
            (_, Self::Any) => false,
            (_, Self::Exact(host)) => self.fits(host),
            (Self::Below(a), Self::Below(b)) => b.ends_with(a),
            (Self::Exact(_), Self::Below(_)) => false,
        }
    }
}

impl PathMatch {
    fn fits(&self, request: &Request<'_>) -> bool {
        let path = request.path();
        match self {
            Self::Exact(exact) => path.as_str() == exact,
            Self::Prefix(prefix) => below(path.as_str(), prefix),
            Self::Template(template) => template.matches(path),
        }
    }

    fn covers(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Exact(a), Self::Exact(b)) => a == b,
            (Self::Prefix(a), Self::Exact(b) | Self::Prefix(b)) => below(b, a),
            (Self::Prefix(a), Self::Template(b)) => b.begins_with(a),
            (Self::Template(a), Self::Template(b)) => a.covers(b),
            (Self::Template(a), Self::Exact(b)) => literal_path(b).is_ok_and(|path| a.matches(&path)),
            (Self::Exact(_) | Self::Template(_), _) => false,
        }
    }
}

/// Whether `path` is `prefix` or lies below it.
fn below(path: &str, prefix: &str) -> bool {
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

impl HeaderMatch {
    fn fits(&self, request: &Request<'_>) -> bool {
        let mut values = request.field_values(&self.name);
        match &self.condition {
            HeaderCondition::Exact(exact) => values.next() == Some(exact.as_bytes()) && values.next().is_none(),
            HeaderCondition::Present(present) => values.next().is_some() == *present,
        }
    }
}

impl MatchConfig {
    fn compile(self, at: &JsonPath, errors: &mut ConfigErrors) -> Match {
        let (hosts_at, methods_at, headers_at) = (at.key("hosts"), at.key("methods"), at.key("headers"));
        let hosts = list(self.hosts, &hosts_at, errors)
            .into_iter()
            .enumerate()
            .filter_map(|(index, host)| compile_host(&host, &hosts_at.index(index), errors))
            .collect();
        let methods = list(self.methods, &methods_at, errors);
        for (index, method) in methods.iter().enumerate() {
            if method.is_empty() || !method.bytes().all(|b| b.is_ascii_uppercase() || b == b'-') {
                let hint = "methods are case-sensitive; the usual ones are written in capitals, such as `GET`";
                errors.push_with_hint(&methods_at.index(index), format!("`{method}` is not a method"), hint);
            }
        }
        let headers = list(self.headers, &headers_at, errors)
            .into_iter()
            .enumerate()
            .filter_map(|(index, header)| header.compile(&headers_at.index(index), errors))
            .collect();
        Match {
            hosts,
            methods: methods.into_iter().collect(),
            path: self.path.and_then(|path| path.compile(&at.key("path"), errors)),
            headers,
            route_names: list(self.route_names, &at.key("route_names"), errors).into_iter().collect(),
        }
    }
}

/// An empty list would fit no request, or every request, depending on the reader.
fn list<T>(list: Option<Vec<T>>, at: &JsonPath, errors: &mut ConfigErrors) -> Vec<T> {
    if list.as_ref().is_some_and(Vec::is_empty) {
        errors.push_with_hint(at, "the list is empty", "leave the key out to match all");
    }
    list.unwrap_or_default()
}

fn compile_host(host: &str, at: &JsonPath, errors: &mut ConfigErrors) -> Option<HostMatch> {
    if host == "*" {
        return Some(HostMatch::Any);
    }
    let plain = host.strip_prefix("*.").unwrap_or(host);
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._[]:".contains(&b);
    let port = !plain.starts_with('[') && plain.contains(':') || plain.contains("]:");
    if plain.is_empty() || plain.starts_with('.') || plain.ends_with('.') || !plain.bytes().all(allowed) || port {
        let hint =
            "write a host in lower case without port, such as `api.example.com`, or `*.example.com` for all below it";
        errors.push_with_hint(at, format!("`{host}` is not a host"), hint);
        return None;
    }
    Some(match host.strip_prefix('*') {
        Some(suffix) => HostMatch::Below(suffix.to_owned()),
        None => HostMatch::Exact(host.to_owned()),
    })
}

impl PathMatchConfig {
    fn compile(self, at: &JsonPath, errors: &mut ConfigErrors) -> Option<PathMatch> {
        let (at, compiled) = match self {
            Self::Exact(exact) => (at.key("exact"), literal_path(&exact).map(|_| PathMatch::Exact(exact))),
            Self::Prefix(prefix) => {
                let bare = prefix.strip_suffix('/').unwrap_or(&prefix).to_owned();
                (at.key("prefix"), literal_path(&prefix).map(|_| PathMatch::Prefix(bare)))
            }
            Self::Template(template) => (at.key("template"), Template::parse(&template).map(PathMatch::Template)),
        };
        compiled.map_err(|problem| errors.push(&at, problem)).ok()
    }
}

impl HeaderMatchConfig {
    fn compile(self, at: &JsonPath, errors: &mut ConfigErrors) -> Option<HeaderMatch> {
        if !is_field_name(&self.name) {
            let hint = "write it in lower case, such as `x-tenant`";
            errors.push_with_hint(&at.key("name"), format!("`{}` is not a field name", self.name), hint);
        }
        let condition = match (self.exact, self.present) {
            (Some(exact), None) => HeaderCondition::Exact(exact),
            (None, Some(present)) => HeaderCondition::Present(present),
            _ => {
                errors.push_with_hint(at, "one condition is needed", "give either `exact` or `present`");
                return None;
            }
        };
        Some(HeaderMatch { name: self.name, condition })
    }
}

/// Whether this is a field name (RFC 9110, section 5.1) in lower case, as HTTP/2 and the hosts write it.
pub fn is_field_name(name: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"!#$%&'*+-.^_`|~".contains(&b);
    !name.is_empty() && name.bytes().all(allowed)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::request::FieldLine;
    use crate::testing::TestHost;

    fn compile(config: Value) -> Result<Rules<u32>, String> {
        let mut errors = ConfigErrors::new("demo");
        let Value::Object(config) = config else { panic!("an object") };
        let envelope: Option<Envelope<u32>> = Envelope::read(config, &mut errors);
        let rules = envelope.and_then(|envelope| {
            envelope.compile(&mut errors, |policy, at, errors| {
                if policy == 13 {
                    errors.push(at, "13 brings bad luck");
                }
                Some(policy)
            })
        });
        assert_eq!(rules.is_none(), !errors.is_empty());
        rules.ok_or_else(|| errors.to_string())
    }

    /// Which rule a request meets when one rule has this match.
    #[track_caller]
    #[expect(clippy::needless_pass_by_value, reason = "so that calls read `check(json!(...), ...)`")]
    fn check(matches: Value, request: (&str, &str, &str), fields: &[FieldLine<'_>], expected: bool) {
        let config = json!({"rules": [{"name": "r", "match": matches, "policy": 1}], "default_policy": 0});
        let rules = compile(config).expect("a good configuration");
        let (method, authority, path) = request;
        let mut lines: Vec<FieldLine<'_>> =
            vec![(b":method", method.as_bytes()), (b":authority", authority.as_bytes()), (b":path", path.as_bytes())];
        lines.extend_from_slice(fields);
        let request = Request::from_field_lines(lines).expect("well-formed");
        let host = TestHost::default().with_property(&["xds", "route_name"], b"orders");
        let selected = rules.select(&request, &host);
        let name = if expected { "r" } else { "default" };
        assert_eq!((selected.name, *selected.policy), (name, u32::from(expected)));
    }

    #[test]
    fn hosts_match_without_port_and_case_and_wildcards_match_whole_labels() {
        let at = |host: &'static str| ("GET", host, "/");
        for (pattern, host, fits) in [
            ("api.example.com", "API.example.com:443", true),
            ("api.example.com", "api.example.com.", true),
            ("api.example.com", "xapi.example.com", false),
            ("*.example.com", "a.example.com", true),
            ("*.example.com", "a.b.example.com", true),
            ("*.example.com", "example.com", false),
            ("*.example.com", "badexample.com", false),
            ("*.example.com", ".example.com", false),
            ("*", "", true),
            ("[2001:db8::1]", "[2001:DB8::1]:80", true),
        ] {
            check(json!({"hosts": ["other", pattern]}), at(host), &[], fits);
        }
    }

    #[test]
    fn methods_and_paths_and_routes_match() {
        check(json!({}), ("GET", "a", "/"), &[], true);
        check(json!({"methods": ["GET", "HEAD"]}), ("HEAD", "a", "/"), &[], true);
        check(json!({"methods": ["GET"]}), ("get", "a", "/"), &[], false);
        check(json!({"path": {"exact": "/a"}}), ("GET", "a", "/%61?x"), &[], true);
        check(json!({"path": {"exact": "/a"}}), ("GET", "a", "/a/"), &[], false);
        for prefix in ["/orders", "/orders/"] {
            check(json!({"path": {"prefix": prefix}}), ("GET", "a", "/orders"), &[], true);
            check(json!({"path": {"prefix": prefix}}), ("GET", "a", "/orders/1"), &[], true);
            check(json!({"path": {"prefix": prefix}}), ("GET", "a", "/ordersx"), &[], false);
        }
        check(json!({"path": {"prefix": "/"}}), ("GET", "a", "/x/y"), &[], true);
        check(json!({"path": {"template": "/o/{id}"}}), ("GET", "a", "/o/1"), &[], true);
        check(json!({"path": {"template": "/o/{id}"}}), ("GET", "a", "/o/"), &[], false);
        check(json!({"route_names": ["orders"]}), ("GET", "a", "/"), &[], true);
        check(json!({"route_names": ["order"]}), ("GET", "a", "/"), &[], false);
    }

    #[test]
    fn headers_match_only_what_is_there_once() {
        let exact = json!({"headers": [{"name": "x-tenant", "exact": "acme"}]});
        let get = ("GET", "a", "/");
        check(exact.clone(), get, &[(b"X-Tenant", b"acme")], true);
        check(exact.clone(), get, &[(b"x-tenant", b"acme"), (b"x-tenant", b"evil")], false);
        check(exact.clone(), get, &[(b"x-tenant", b"evil"), (b"x-tenant", b"acme")], false);
        check(exact, get, &[], false);
        let absent = json!({"headers": [{"name": "x-debug", "present": false}]});
        check(absent.clone(), get, &[], true);
        check(absent, get, &[(b"x-debug", b"")], false);
        check(json!({"headers": [{"name": "x-debug", "present": true}]}), get, &[(b"x-debug", b"")], true);
    }

    #[test]
    fn the_first_rule_that_fits_decides_also_about_its_path() {
        let config = json!({"default_policy": 0, "rules": [
            {"name": "matrix", "match": {"path": {"prefix": "/m"}}, "dangerously_allow_in_path": ["semicolon"], "policy": 1},
            {"name": "rest", "match": {"hosts": ["a"]}, "policy": 2},
        ]});
        let rules = compile(config).expect("a good configuration");
        let select = |path: &str| {
            let lines: [FieldLine<'_>; 3] = [(b":method", b"GET"), (b":authority", b"a"), (b":path", path.as_bytes())];
            let request = Request::from_field_lines(lines).expect("well-formed");
            let selected = rules.select(&request, &TestHost::default());
            (selected.name.to_owned(), selected.oddity)
        };
        assert_eq!(select("/m/a;b"), ("matrix".to_owned(), None));
        assert_eq!(select("/m/a;b//c"), ("matrix".to_owned(), Some(Oddity::EmptySegment)));
        assert_eq!(select("/m/..;/c"), ("matrix".to_owned(), Some(Oddity::DotSegment)));
        assert_eq!(select("/x;b"), ("rest".to_owned(), Some(Oddity::Semicolon)));
    }

    #[test]
    fn mistakes_are_told_all_at_once() {
        let config = json!({"default_policy": 13, "rules": [
            {"name": "Orders", "match": {"hosts": ["API.example.com", "a:80", "*"], "methods": ["get"]}, "policy": 1},
            {"name": "default", "match": {"hosts": [], "path": {"exact": "a"}}, "policy": 13},
            {"name": "r", "match": {"headers": [{"name": "X", "exact": "a", "present": true}]}, "policy": 1},
            {"name": "r", "match": {"path": {"template": "/{}"}, "hosts": ["b"]}, "policy": 1},
        ]});
        assert_eq!(
            compile(config).expect_err("mistakes"),
            "\
demo: rules[0].name: `Orders` is not a rule name
  hint: use 1 to 64 of `a-z`, `0-9`, `_` and `-`
demo: rules[0].match.hosts[0]: `API.example.com` is not a host
  hint: write a host in lower case without port, such as `api.example.com`, or `*.example.com` for all below it
demo: rules[0].match.hosts[1]: `a:80` is not a host
  hint: write a host in lower case without port, such as `api.example.com`, or `*.example.com` for all below it
demo: rules[0].match.methods[0]: `get` is not a method
  hint: methods are case-sensitive; the usual ones are written in capitals, such as `GET`
demo: rules[1].name: `default` is taken: metrics call `default_policy` so
  hint: choose another name
demo: rules[1].match.hosts: the list is empty
  hint: leave the key out to match all
demo: rules[1].match.path.exact: a path begins with `/`
demo: rules[1].policy: 13 brings bad luck
demo: rules[2].match.headers[0].name: `X` is not a field name
  hint: write it in lower case, such as `x-tenant`
demo: rules[2].match.headers[0]: one condition is needed
  hint: give either `exact` or `present`
demo: rules[3].name: another rule is called `r` too
  hint: metrics and logs need a name for each
demo: rules[3].match.path.template: `{}` is not a parameter: its name is made of `a-z`, `0-9` and `_`
demo: default_policy: 13 brings bad luck"
        );
    }

    #[test]
    fn a_list_of_no_rules_is_refused() {
        assert_eq!(
            compile(json!({"default_policy": 0, "rules": []})).expect_err("empty"),
            "demo: rules: the list is empty\n  hint: leave `rules` out if `default_policy` is to hold for all"
        );
        let many: Vec<_> = (0..501)
            .map(|i| json!({"name": format!("r{i}"), "match": {"path": {"exact": format!("/{i}")}}, "policy": 1}))
            .collect();
        assert_eq!(
            compile(json!({"default_policy": 0, "rules": many})).expect_err("too many"),
            "demo: rules: 501 rules, and at most 500 are taken\n  hint: use templates and prefixes, or several filters"
        );
    }

    #[test]
    fn there_is_no_silent_default() {
        assert_eq!(
            compile(json!({})).expect_err("no default"),
            "demo: `default_policy` is missing\n  hint: say what holds where no rule fits; there is no silent default"
        );
    }

    #[test]
    fn a_rule_that_is_never_reached_is_refused() {
        let reached = |first: Value, second: Value| {
            compile(json!({"default_policy": 0, "rules": [
                {"name": "first", "match": first, "policy": 1},
                {"name": "second", "match": second, "policy": 1},
            ]}))
        };
        for (first, second) in [
            (json!({}), json!({"hosts": ["a"]})),
            (json!({"hosts": ["*"]}), json!({"hosts": ["a"]})),
            (json!({"hosts": ["*.example.com"]}), json!({"hosts": ["a.example.com", "*.b.example.com"]})),
            (json!({"methods": ["GET", "PUT"]}), json!({"methods": ["PUT"], "hosts": ["a"]})),
            (json!({"path": {"prefix": "/a"}}), json!({"path": {"prefix": "/a/b"}})),
            (json!({"path": {"prefix": "/a/"}}), json!({"path": {"exact": "/a"}})),
            (json!({"path": {"prefix": "/a"}}), json!({"path": {"template": "/a/{b}"}})),
            (json!({"path": {"prefix": "/"}}), json!({"path": {"template": "/{b}"}})),
            (json!({"path": {"template": "/a/{b}"}}), json!({"path": {"exact": "/a/b"}})),
            (json!({"path": {"template": "/{a}/{b}"}}), json!({"path": {"template": "/a/{c}"}})),
            (
                json!({"headers": [{"name": "x", "present": true}]}),
                json!({"headers": [{"name": "x", "present": true}, {"name": "y", "present": true}]}),
            ),
            (json!({"route_names": ["a", "b"]}), json!({"route_names": ["b"]})),
        ] {
            assert_eq!(
                reached(first.clone(), second.clone()).expect_err("never reached"),
                "demo: rules[1]: `second` is never reached: `first` before it fits every request that this rule fits\n  hint: put the narrower rule first",
                "{first} {second}"
            );
        }
        for (first, second) in [
            (json!({"hosts": ["a"]}), json!({})),
            (json!({"hosts": ["*.example.com"]}), json!({"hosts": ["example.com"]})),
            (json!({"methods": ["GET"]}), json!({"methods": ["GET", "PUT"]})),
            (json!({"path": {"prefix": "/a/b"}}), json!({"path": {"prefix": "/a"}})),
            (json!({"path": {"prefix": "/a"}}), json!({"path": {"prefix": "/ab"}})),
            (json!({"path": {"prefix": "/a/b"}}), json!({"path": {"template": "/a/{b}"}})),
            (json!({"path": {"prefix": "/a/b"}}), json!({"path": {"template": "/a"}})),
            (json!({"path": {"template": "/a/{b}"}}), json!({"path": {"template": "/a/"}})),
            (json!({"path": {"exact": "/a"}}), json!({"path": {"prefix": "/a"}})),
            (json!({"headers": [{"name": "x", "exact": "1"}]}), json!({"headers": [{"name": "x", "exact": "2"}]})),
            (json!({"route_names": ["a"]}), json!({})),
        ] {
            assert!(reached(first.clone(), second.clone()).is_ok(), "{first} {second}");
        }
    }
}
