//! From the file to the policy: resolves names, reads files, parses addresses, fills in defaults, and collects
//! every mistake on the way.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use crate::file::{self, Protocol};
use crate::files::{Files, Folder};
use crate::mistake::{Mistake, Mistakes, Position, did_you_mean, listed};
use crate::policy::{CodeCache, Policy};
use crate::read::{Finding, Reader, Stop};
use crate::units::{Size, Time};
use crate::yaml::{self, Node};

mod filters;
mod listeners;
mod names;
mod operators;
mod read;
mod routes;
mod tcp;
mod upstreams;

/// Keys of the top level, in the order in which the sections are read.
pub(crate) const SECTIONS: [&str; 13] = [
    "version",
    "admin",
    "workers",
    "trusted_proxies",
    "logging",
    "code_cache",
    "pool",
    "listeners",
    "filters",
    "upstreams",
    "operator_host",
    "operators",
    "routes",
];

// What compares every element with every other stays quick, and a request looks at no more routes than this.
const LISTENERS_MAX: usize = 64;
const FILTERS_MAX: usize = 64;
const UPSTREAMS_MAX: usize = 1000;
const OPERATORS_MAX: usize = 1000;
const ROUTES_MAX: usize = 2000;

/// Reads and compiles a policy file; paths in it are relative to its folder.
///
/// # Errors
/// Every mistake in the file, or that it cannot be read.
pub fn load(path: &Path) -> Result<Policy, Mistakes> {
    let name = path.display().to_string();
    let whole_file = |problem: String, hint: &str| {
        Mistakes::new(
            vec![Mistake {
                file: name.clone(),
                position: None,
                source_line: None,
                path: String::new(),
                problem,
                hint: Some(hint.to_owned()),
            }],
            0,
        )
    };
    let base = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let folder = Folder::new(base).map_err(|error| {
        whole_file(format!("cannot tell which folder this is: {error}"), "give the policy file as an absolute path")
    })?;
    let bytes = std::path::absolute(path).and_then(|path| folder.read(&path, yaml::TEXT_BYTES_MAX as u64)).map_err(
        |error| match error.kind() {
            io::ErrorKind::NotFound => {
                whole_file("there is no such file".to_owned(), "name the policy file, e.g. `portcullis.yaml`")
            }
            io::ErrorKind::FileTooLarge => whole_file(
                format!("the file is larger than {}", Size(yaml::TEXT_BYTES_MAX as u64)),
                "move filters' configurations into files of their own and name them with `configuration_file`",
            ),
            _ => whole_file(format!("cannot read the file: {error}"), "check its permissions and that it is a file"),
        },
    )?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let line =
            error.as_bytes().iter().take(error.utf8_error().valid_up_to()).filter(|byte| **byte == b'\n').count();
        whole_file(format!("line {} is not UTF-8", line + 1), "save the file as UTF-8")
    })?;
    compile(&name, &text, &folder)
}

/// Compiles a policy from its text. `name` is what messages call the file.
///
/// # Errors
/// Every mistake in the text and in the files it names.
pub fn compile(name: &str, text: &str, files: &dyn Files) -> Result<Policy, Mistakes> {
    let root = match yaml::parse(text) {
        Ok(root) => root,
        Err(not_yaml) => {
            return Err(Mistakes::new(
                vec![Mistake {
                    file: name.to_owned(),
                    position: Some(not_yaml.at),
                    source_line: line_of(text, not_yaml.at),
                    path: String::new(),
                    problem: not_yaml.problem,
                    hint: not_yaml.hint.map(str::to_owned),
                }],
                0,
            ));
        }
    };
    let findings = RefCell::new(Vec::new());
    let reader = Reader { node: &root, path: String::new(), findings: &findings };
    let written = Written::read(&reader);
    let mut compiler = Compiler { name, text, root: &root, files, mistakes: Vec::new(), unlisted: 0 };
    let policy = written.and_then(|written| compiler.policy(written));
    for finding in findings.into_inner() {
        compiler.add(finding);
    }
    match policy {
        Some(policy) if compiler.mistakes.is_empty() => Ok(policy),
        _ => Err(Mistakes::new(compiler.mistakes, compiler.unlisted)),
    }
}

fn line_of(text: &str, at: Position) -> Option<String> {
    text.lines().nth(at.line.saturating_sub(1)).map(str::to_owned)
}

/// What could be read of the file, element by element. `None` in a list marks an element that could not: its
/// fault has been noted, and its name must not be reported as missing elsewhere.
struct Written {
    version: Option<u32>,
    admin: Option<file::Admin>,
    workers: Option<u32>,
    trusted_proxies: Vec<Option<String>>,
    logging: file::Logging,
    code_cache: file::CodeCache,
    pool: Option<String>,
    listeners: Vec<Option<file::Listener>>,
    filters: Vec<Option<file::Filter>>,
    upstreams: Named<file::Upstream>,
    operator_host: file::OperatorHost,
    operators: Named<file::Operator>,
    routes: Vec<Option<file::Route>>,
}

/// A section whose elements have their names as keys. An element that could not be read still has its name; a
/// section that is no mapping is `None`.
type Named<T> = Option<Vec<(String, Option<T>)>>;

impl Written {
    fn read(root: &Reader<'_>) -> Option<Self> {
        let Some(entries) = root.entries() else {
            root.note(
                Position::START,
                String::new(),
                "the file holds no settings".to_owned(),
                Some("start with `version: 1`".to_owned()),
            );
            return None;
        };
        let mut written = Self {
            version: None,
            admin: None,
            workers: None,
            trusted_proxies: Vec::new(),
            logging: file::Logging::default(),
            code_cache: file::CodeCache::default(),
            pool: None,
            listeners: Vec::new(),
            filters: Vec::new(),
            upstreams: Some(Vec::new()),
            operator_host: file::OperatorHost::default(),
            operators: Some(Vec::new()),
            routes: Vec::new(),
        };
        for entry in entries {
            let value = root.of_entry(entry);
            match entry.key.as_str() {
                "version" => written.version = Some(one(&value).unwrap_or(1)),
                "admin" => written.admin = one(&value),
                "workers" => written.workers = one(&value),
                "trusted_proxies" => written.trusted_proxies = list(&value),
                "logging" => written.logging = one(&value).unwrap_or_default(),
                "code_cache" => written.code_cache = one(&value).unwrap_or_default(),
                "pool" => written.pool = one(&value),
                "listeners" => written.listeners = list(&value),
                "filters" => written.filters = list(&value),
                "upstreams" => written.upstreams = named(&value),
                "operator_host" => written.operator_host = one(&value).unwrap_or_default(),
                "operators" => written.operators = named(&value),
                "routes" => written.routes = list(&value),
                _ => root.note_unknown_key(entry, &SECTIONS),
            }
        }
        for (key, hint) in [
            ("version", "add `version: 1`"),
            ("listeners", "add e.g. `listeners: [{ name: public, address: \"127.0.0.1:8080\" }]`"),
            ("routes", "add e.g. `routes: [{ name: all, upstream: NAME }]`"),
        ] {
            let needed = key != "routes" || written.serves(Protocol::Http) == Some(true);
            if needed && !entries.iter().any(|entry| entry.key == key) {
                root.note(Position::START, String::new(), format!("`{key}` is missing"), Some(hint.to_owned()));
            }
        }
        Some(written)
    }

    /// Whether some listener takes requests, or TCP connections. `None` where that cannot be told, since one could not
    /// be read. Without any listener, requests are what a policy is about.
    fn serves(&self, protocol: Protocol) -> Option<bool> {
        let tcp = protocol == Protocol::Tcp;
        if self.listeners.is_empty() || self.listeners.iter().flatten().any(|listener| listener.tcp.is_some() == tcp) {
            return Some(!(tcp && self.listeners.is_empty()));
        }
        self.listeners.iter().all(Option::is_some).then_some(false)
    }
}

fn one<'n, T: Deserialize<'n>>(reader: &Reader<'n>) -> Option<T> {
    match T::deserialize(reader.clone()) {
        Ok(value) => Some(value),
        Err(stop) => {
            note(reader, stop);
            None
        }
    }
}

fn list<'n, T: Deserialize<'n>>(reader: &Reader<'n>) -> Vec<Option<T>> {
    match reader.elements() {
        Some(elements) => elements.map(|element| one(&element)).collect(),
        None => {
            // Asking for a list of anything gives the error message for what is there instead.
            if let Err(stop) = Vec::<serde::de::IgnoredAny>::deserialize(reader.clone()) {
                note(reader, stop);
            }
            vec![None]
        }
    }
}

fn named<'n, T: Deserialize<'n>>(reader: &Reader<'n>) -> Named<T> {
    match reader.entries() {
        Some(entries) => Some(entries.iter().map(|entry| (entry.key.clone(), one(&reader.of_entry(entry)))).collect()),
        None => {
            if let Err(stop) = BTreeMap::<String, serde::de::IgnoredAny>::deserialize(reader.clone()) {
                note(reader, stop);
            }
            None
        }
    }
}

fn note(reader: &Reader<'_>, stop: Stop) {
    let finding = stop.into_finding(reader);
    reader.findings.borrow_mut().push(finding);
}

struct Compiler<'a> {
    name: &'a str,
    text: &'a str,
    root: &'a Node,
    files: &'a dyn Files,
    mistakes: Vec<Mistake>,
    unlisted: usize,
}

/// Names that later sections refer to. `complete` is false when an element could not be read, so that its name
/// is unknown and references cannot be judged.
struct Names {
    what: &'static str,
    section: &'static str,
    names: Vec<String>,
    complete: bool,
}

/// What other sections refer to.
struct References {
    upstreams: Names,
    operators: Names,
    filters: Names,
    /// By index of the filter.
    protocols: Vec<Protocol>,
    /// By index of the upstream: the listener whose TCP connections it carries.
    tcp_upstreams: BTreeMap<usize, String>,
    /// Whether a listener takes requests, and TCP connections; `None`: that cannot be told.
    serves_http: Option<bool>,
    serves_tcp: Option<bool>,
}

impl References {
    fn new(written: &Written) -> References {
        References {
            upstreams: Names {
                what: "upstream",
                section: "upstreams",
                names: written.upstreams.iter().flatten().map(|(name, _)| name.clone()).collect(),
                complete: written.upstreams.is_some(),
            },
            operators: Names {
                what: "operator",
                section: "operators",
                names: written.operators.iter().flatten().map(|(name, _)| name.clone()).collect(),
                complete: written.operators.is_some(),
            },
            filters: Names {
                what: "filter",
                section: "filters",
                names: written.filters.iter().flatten().map(|filter| filter.name.clone()).collect(),
                complete: written.filters.iter().all(Option::is_some),
            },
            protocols: written.filters.iter().flatten().map(|filter| filter.protocol).collect(),
            tcp_upstreams: BTreeMap::new(),
            serves_http: written.serves(Protocol::Http),
            serves_tcp: written.serves(Protocol::Tcp),
        }
    }

    fn filters_of(&self, protocol: Protocol) -> impl Iterator<Item = usize> {
        self.protocols.iter().enumerate().filter(move |(_, own)| **own == protocol).map(|(index, _)| index)
    }
}

impl Compiler<'_> {
    fn add(&mut self, finding: Finding) {
        if self.is_full() {
            return;
        }
        let Finding { path, at, problem, hint } = finding;
        self.mistakes.push(Mistake {
            file: self.name.to_owned(),
            position: Some(at),
            source_line: line_of(self.text, at),
            path,
            problem,
            hint,
        });
    }

    /// Counts a mistake that will not be listed.
    fn is_full(&mut self) -> bool {
        let full = self.mistakes.len() >= Mistakes::LISTED_MAX;
        self.unlisted += usize::from(full);
        full
    }

    fn wrong(&mut self, path: &str, problem: impl Into<String>, hint: impl Into<String>) {
        if self.is_full() {
            return;
        }
        let finding = Finding {
            path: path.to_owned(),
            at: self.root.locate(path),
            problem: problem.into(),
            hint: Some(hint.into()),
        };
        self.add(finding);
    }

    fn policy(&mut self, written: Written) -> Option<Policy> {
        if written.version.is_some_and(|version| version != 1) {
            let version = written.version.unwrap_or_default();
            self.wrong("version", format!("version {version} is not known"), "write `version: 1`");
        }
        for (section, count, max) in [
            ("listeners", written.listeners.len(), LISTENERS_MAX),
            ("filters", written.filters.len(), FILTERS_MAX),
            ("upstreams", written.upstreams.as_ref().map_or(0, Vec::len), UPSTREAMS_MAX),
            ("operators", written.operators.as_ref().map_or(0, Vec::len), OPERATORS_MAX),
            ("routes", written.routes.len(), ROUTES_MAX),
        ] {
            if count > max {
                self.wrong(
                    section,
                    format!("there are {count}, more than the {max} that are supported"),
                    "split the policy",
                );
                return None;
            }
        }
        let workers = self.workers(written.workers);
        let trusted_proxies = self.trusted_proxies(&written.trusted_proxies);
        if let Some(pool) = &written.pool {
            self.name("pool", pool);
        }
        let code_cache = self.code_cache(&written.code_cache);
        let admin = written.admin.as_ref().and_then(|admin| self.admin(admin));
        let mut references = References::new(&written);
        self.served(&references, !written.routes.is_empty());
        let listeners = self.listeners(written.listeners, admin, &mut references);
        let upstreams = self.upstreams(written.upstreams.unwrap_or_default(), &references);
        let operator_host = self.operator_host(written.operator_host);
        let operators = self.operators(written.operators.unwrap_or_default(), operator_host.storage.is_some());
        let filters = self.filters(written.filters, &references);
        let routes = self.routes(written.routes, &references, &upstreams, &operators);
        Some(Policy {
            name: self.name.to_owned(),
            admin,
            workers,
            trusted_proxies,
            logging: written.logging,
            code_cache,
            pool: written.pool,
            listeners,
            filters,
            upstreams,
            operator_host,
            operators,
            routes,
        })
    }

    fn code_cache(&mut self, written: &file::CodeCache) -> CodeCache {
        let at = |field: &str| format!("code_cache.{field}");
        if written.directory.as_ref().is_some_and(String::is_empty) {
            self.wrong(&at("directory"), "the folder's name is empty", "name a folder, or write `enabled: false`");
        }
        self.size(&at("max_bytes"), written.max_bytes, Size::mib(1), Size::mib(1024 * 1024));
        self.count(&at("max_entries"), written.max_entries, 1, 10_000);
        CodeCache {
            enabled: written.enabled,
            directory: written.directory.as_ref().map(|directory| self.files.resolve(directory)),
            bytes_max: written.max_bytes.0,
            entries_max: written.max_entries as usize,
            unused_max: self.time(&at("max_unused"), written.max_unused, Time::secs(365 * 86_400)),
        }
    }

    fn workers(&mut self, workers: Option<u32>) -> usize {
        // As found first: a host that keeps its threads off some CPUs later would count fewer when it reads the file again.
        static CPUS: std::sync::OnceLock<usize> = std::sync::OnceLock::new();
        match workers {
            None => *CPUS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from)),
            Some(count @ 1..=1024) => count as usize,
            Some(count) => {
                self.wrong("workers", format!("{count} is not from 1 to 1024"), "remove it to get one per CPU");
                1
            }
        }
    }

    /// A name that is a key. Like [`Self::name`], but points to the key.
    fn key(&mut self, path: &str, name: &str) {
        let before = self.mistakes.len();
        self.name(path, name);
        self.point_to_key(path, before);
    }

    /// What is wrong about a key itself.
    fn wrong_key(&mut self, path: &str, problem: impl Into<String>, hint: impl Into<String>) {
        let before = self.mistakes.len();
        self.wrong(path, problem, hint);
        self.point_to_key(path, before);
    }

    fn point_to_key(&mut self, path: &str, before: usize) {
        let at = self.root.locate_key(path);
        for mistake in self.mistakes.iter_mut().skip(before) {
            mistake.position = Some(at);
            mistake.source_line = line_of(self.text, at);
        }
    }

    /// A name that appears in logs, metrics and Envoy's configuration.
    fn name(&mut self, path: &str, name: &str) {
        let well_formed = name.len() <= 64
            && name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_'))
            && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
        if !well_formed {
            self.wrong(
                path,
                format!("`{}` is not a usable name", name.chars().take(80).collect::<String>()),
                "use 1 to 64 lower-case letters, digits, `-` and `_`, beginning with a letter or digit",
            );
        }
    }

    /// Well-formed names, none of them twice.
    fn unique_names<'n>(&mut self, section: &str, names: impl Iterator<Item = (usize, &'n str)>) {
        let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
        for (index, name) in names {
            let path = format!("{section}[{index}].name");
            self.name(&path, name);
            match seen.get(name) {
                Some(first) => self.wrong(
                    &path,
                    format!("the name `{name}` is already used by `{section}[{first}]`"),
                    "give it a name of its own",
                ),
                None => {
                    seen.insert(name, index);
                }
            }
        }
    }

    fn find(&mut self, path: &str, name: &str, names: &Names) -> Option<usize> {
        let found = names.names.iter().position(|known| known == name);
        if found.is_none() && names.complete {
            let hint = match did_you_mean(name, names.names.iter().map(String::as_str)) {
                Some(meant) => format!("did you mean `{meant}`?"),
                None if names.names.is_empty() => format!("add it under `{}`", names.section),
                None => format!(
                    "add it under `{}`, where there is now {}",
                    names.section,
                    listed(names.names.iter().map(String::as_str))
                ),
            };
            self.wrong(path, format!("there is no {} named `{name}`", names.what), hint);
        }
        found
    }

    fn time(&mut self, path: &str, time: Time, max: Time) -> Duration {
        if time.0.is_zero() || time > max {
            let shown = if time.0.is_zero() { "zero".to_owned() } else { format!("`{time}`") };
            self.wrong(path, format!("{shown} is outside the range of this limit"), format!("use `1ms` to `{max}`"));
        }
        time.0
    }

    fn size(&mut self, path: &str, size: Size, min: Size, max: Size) {
        if size < min || size > max {
            self.wrong(path, format!("`{size}` is outside the range of this limit"), format!("use `{min}` to `{max}`"));
        }
    }

    fn count(&mut self, path: &str, count: u32, min: u32, max: u32) {
        if count < min || count > max {
            self.wrong(path, format!("{count} is outside the range of this limit"), format!("use {min} to {max}"));
        }
    }

    fn root_has(&self, key: &str) -> bool {
        matches!(&self.root.value, yaml::Value::Mapping(entries) if entries.iter().any(|entry| entry.key == key))
    }
}

fn present<T>(written: &[Option<T>]) -> impl Iterator<Item = (usize, &T)> {
    written.iter().enumerate().filter_map(|(index, value)| value.as_ref().map(|value| (index, value)))
}

fn owned<T>(written: Vec<Option<T>>) -> impl Iterator<Item = (usize, T)> {
    written.into_iter().enumerate().filter_map(|(index, value)| value.map(|value| (index, value)))
}
