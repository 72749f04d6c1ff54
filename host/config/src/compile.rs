//! From the file to the policy: resolves names, reads files, parses addresses, fills in defaults, and collects
//! every mistake on the way.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;

use crate::capabilities::HOST_FUNCTIONS;
use crate::file;
use crate::files::{Files, Folder};
use crate::mistake::{Mistake, Mistakes, Position, did_you_mean, listed};
use crate::policy::{
    Authorities, Bytes, Endpoint, FieldPattern, Filter, HostPort, Listener, ListenerLimits, ListenerTls, Network,
    Operator, OperatorSecret, Policy, Secret, SecretSource, Upstream, UpstreamTls,
};
use crate::read::{Finding, Reader, Stop};
use crate::route::{
    Action, FieldCondition, FieldTest, HostPattern, PathPattern, PathRewrite, Response, Route, Segment,
};
use crate::target::Target;
use crate::units::{Size, Time};
use crate::yaml::{self, Node};

/// Keys of the top level, in the order in which the sections are read.
pub(crate) const SECTIONS: [&str; 11] = [
    "version",
    "admin",
    "workers",
    "trusted_proxies",
    "logging",
    "pool",
    "listeners",
    "filters",
    "upstreams",
    "operators",
    "routes",
];

// What compares every element with every other stays quick, and a request looks at no more routes than this.
const LISTENERS_MAX: usize = 64;
const FILTERS_MAX: usize = 64;
const UPSTREAMS_MAX: usize = 1000;
const OPERATORS_MAX: usize = 1000;
const ROUTES_MAX: usize = 2000;
const PEM_BYTES_MAX: u64 = 1024 * 1024;
const CONFIGURATION_BYTES_MAX: u64 = 16 * 1024 * 1024;
const OPERATOR_FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;
const RESPONSE_BODY_BYTES_MAX: usize = 64 * 1024;

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
    pool: Option<String>,
    listeners: Vec<Option<file::Listener>>,
    filters: Vec<Option<file::Filter>>,
    upstreams: Named<file::Upstream>,
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
            pool: None,
            listeners: Vec::new(),
            filters: Vec::new(),
            upstreams: Some(Vec::new()),
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
                "pool" => written.pool = one(&value),
                "listeners" => written.listeners = list(&value),
                "filters" => written.filters = list(&value),
                "upstreams" => written.upstreams = named(&value),
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
            if !entries.iter().any(|entry| entry.key == key) {
                root.note(Position::START, String::new(), format!("`{key}` is missing"), Some(hint.to_owned()));
            }
        }
        Some(written)
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
        let admin = written.admin.as_ref().and_then(|admin| self.admin(admin));
        let listeners = self.listeners(written.listeners, admin);

        let upstream_names = Names {
            what: "upstream",
            section: "upstreams",
            names: written.upstreams.iter().flatten().map(|(name, _)| name.clone()).collect(),
            complete: written.upstreams.is_some(),
        };
        let operator_names = Names {
            what: "operator",
            section: "operators",
            names: written.operators.iter().flatten().map(|(name, _)| name.clone()).collect(),
            complete: written.operators.is_some(),
        };
        let filter_names = Names {
            what: "filter",
            section: "filters",
            names: written.filters.iter().flatten().map(|filter| filter.name.clone()).collect(),
            complete: written.filters.iter().all(Option::is_some),
        };
        let upstreams = self.upstreams(written.upstreams.unwrap_or_default());
        let operators = self.operators(written.operators.unwrap_or_default());
        let filters = self.filters(written.filters, &upstream_names);
        let routes =
            self.routes(written.routes, &filter_names, &upstream_names, &operator_names, &upstreams, &operators);
        Some(Policy {
            name: self.name.to_owned(),
            admin,
            workers,
            trusted_proxies,
            logging: written.logging,
            pool: written.pool,
            listeners,
            filters,
            upstreams,
            operators,
            routes,
        })
    }

    fn workers(&mut self, workers: Option<u32>) -> usize {
        match workers {
            None => std::thread::available_parallelism().map_or(1, usize::from),
            Some(count @ 1..=1024) => count as usize,
            Some(count) => {
                self.wrong("workers", format!("{count} is not from 1 to 1024"), "remove it to get one per CPU");
                1
            }
        }
    }

    fn trusted_proxies(&mut self, written: &[Option<String>]) -> Vec<Network> {
        let mut networks = Vec::new();
        for (index, text) in written.iter().enumerate() {
            let path = format!("trusted_proxies[{index}]");
            let Some(text) = text else { continue };
            match network(text) {
                Ok(network) => networks.push(network),
                Err((problem, hint)) => self.wrong(&path, problem, hint),
            }
        }
        networks
    }

    /// A name that is a key. Like [`Self::name`], but points to the key.
    fn key(&mut self, path: &str, name: &str) {
        let before = self.mistakes.len();
        self.name(path, name);
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

    fn address(&mut self, path: &str, text: &str) -> Option<SocketAddr> {
        if let Ok(address) = text.parse() {
            return Some(address);
        }
        let hint = if text.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv4()) {
            format!("add a port, e.g. `{text}:8080`")
        } else if text.parse::<IpAddr>().is_ok() {
            format!("put it in brackets and add a port, e.g. `[{text}]:8080`")
        } else if let Some(port) = text.strip_prefix("localhost:") {
            format!("names are not looked up here; write `127.0.0.1:{port}`")
        } else if let Some(port) = text.strip_prefix(':').or_else(|| text.strip_prefix("*:")) {
            format!("for every address of this machine write `0.0.0.0:{port}` or `[::]:{port}`")
        } else {
            "write an IP address and a port up to 65535, e.g. `127.0.0.1:8080` or `[::1]:8080`".to_owned()
        };
        self.wrong(path, format!("`{text}` is not an address to listen on"), hint);
        None
    }

    fn admin(&mut self, admin: &file::Admin) -> Option<SocketAddr> {
        let address = self.address("admin.address", &admin.address)?;
        if !address.ip().is_loopback() && !admin.dangerously_allow_remote {
            self.wrong(
                "admin.address",
                format!("`{address}` can be reached by other machines, and the admin endpoints have no authentication"),
                format!("write `127.0.0.1:{}`", address.port()),
            );
        }
        Some(address)
    }

    fn listeners(&mut self, written: Vec<Option<file::Listener>>, admin: Option<SocketAddr>) -> Vec<Listener> {
        if written.is_empty() && self.root_has("listeners") {
            self.wrong(
                "listeners",
                "the list is empty, so nothing would be served",
                "add e.g. `{ name: public, address: \"127.0.0.1:8080\" }`",
            );
        }
        self.unique_names("listeners", present(&written).map(|(index, listener)| (index, listener.name.as_str())));
        let mut used: Vec<(SocketAddr, String)> =
            admin.map(|address| (address, "`admin`".to_owned())).into_iter().collect();
        let mut listeners = Vec::new();
        for (index, listener) in owned(written) {
            let path = format!("listeners[{index}]");
            let tls = listener.tls.and_then(|tls| self.listener_tls(&format!("{path}.tls"), &tls));
            let limits = self.listener_limits(&format!("{path}.limits"), &listener.limits);
            let Some(address) = self.address(&format!("{path}.address"), &listener.address) else {
                continue;
            };
            if let Some((_, user)) = used.iter().find(|(other, _)| collide(*other, address)) {
                self.wrong(
                    &format!("{path}.address"),
                    format!("`{address}` is already taken by {user}"),
                    "give each its own port",
                );
            }
            used.push((address, format!("listener `{}`", listener.name)));
            listeners.push(Listener { name: listener.name, address, tls, limits });
        }
        listeners
    }

    fn root_has(&self, key: &str) -> bool {
        matches!(&self.root.value, yaml::Value::Mapping(entries) if entries.iter().any(|entry| entry.key == key))
    }

    fn listener_tls(&mut self, path: &str, tls: &file::ListenerTls) -> Option<ListenerTls> {
        let certificate = self.pem(&format!("{path}.certificate"), &tls.certificate, "CERTIFICATE");
        let private_key = self.pem(&format!("{path}.private_key"), &tls.private_key, "PRIVATE KEY");
        let (certificate_path, certificate_pem) = certificate?;
        let (private_key_path, private_key_pem) = private_key?;
        Some(ListenerTls {
            certificate_path,
            certificate_pem,
            private_key_path,
            private_key_pem: Secret(private_key_pem),
        })
    }

    fn listener_limits(&mut self, path: &str, limits: &file::ListenerLimits) -> ListenerLimits {
        let at = |field: &str| format!("{path}.{field}");
        self.size(&at("header_bytes"), limits.header_bytes, Size::kib(1), Size::mib(8));
        if !limits.header_bytes.0.is_multiple_of(1024) {
            self.wrong(
                &at("header_bytes"),
                format!("`{}` is not a whole number of KiB", limits.header_bytes),
                format!("use `{}KiB`", limits.header_bytes.0.div_ceil(1024)),
            );
        }
        self.count(&at("header_count"), limits.header_count, 1, 1000);
        self.count(&at("max_connections"), limits.max_connections, 1, 10_000_000);
        ListenerLimits {
            header_bytes: limits.header_bytes.as_usize(),
            header_count: limits.header_count as usize,
            header_timeout: self.time(&at("header_timeout"), limits.header_timeout, Time::secs(3600)),
            request_timeout: self.time(&at("request_timeout"), limits.request_timeout, Time::secs(86_400)),
            idle_timeout: self.time(&at("idle_timeout"), limits.idle_timeout, Time::secs(86_400)),
            max_connections: limits.max_connections as usize,
        }
    }

    /// Reads a file that the policy names.
    fn read(&mut self, path: &str, written: &str, bytes_max: u64) -> Option<(PathBuf, Vec<u8>)> {
        if written.is_empty() {
            self.wrong(path, "the file name is empty", "name a file, relative to the policy's folder");
            return None;
        }
        let resolved = self.files.resolve(written);
        match self.files.read(&resolved, bytes_max) {
            Ok(bytes) => return Some((resolved, bytes)),
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound => self.wrong(
                    path,
                    format!("there is no file `{written}`"),
                    format!("relative names start at the policy's folder; looked for `{}`", resolved.display()),
                ),
                io::ErrorKind::PermissionDenied => self.wrong(
                    path,
                    format!("`{written}` may not be read by the user that runs this"),
                    format!("check the owner and mode of `{}` and its folders", resolved.display()),
                ),
                io::ErrorKind::FileTooLarge => self.wrong(
                    path,
                    format!("`{written}` is larger than {}", Size(bytes_max)),
                    if path.ends_with(".wasm") {
                        "raise `limits.module_bytes`, or build the module without debug information"
                    } else {
                        "name a smaller file"
                    },
                ),
                _ => self.wrong(
                    path,
                    format!("cannot read `{written}`: {error}"),
                    format!("check `{}`", resolved.display()),
                ),
            },
        }
        None
    }

    /// Reads a PEM file that must hold a block whose label ends with `label`.
    fn pem(&mut self, path: &str, written: &str, label: &str) -> Option<(PathBuf, Arc<[u8]>)> {
        let (resolved, bytes) = self.read(path, written, PEM_BYTES_MAX)?;
        let labels = pem_labels(&bytes);
        if !labels.iter().any(|found| found.ends_with(label)) {
            let holds = if labels.is_empty() {
                "it is not PEM".to_owned()
            } else {
                format!("it holds {}", listed(labels.iter().map(String::as_str)))
            };
            self.wrong(
                path,
                format!("`{written}` holds no `-----BEGIN {label}-----` block"),
                format!("{holds}; name the right file, or convert it with `openssl`"),
            );
            return None;
        }
        if labels.iter().any(|found| found.contains("ENCRYPTED")) {
            self.wrong(
                path,
                format!("the key in `{written}` is encrypted"),
                "store it without a passphrase, mode 0600",
            );
            return None;
        }
        Some((resolved, bytes.into()))
    }

    fn filters(&mut self, written: Vec<Option<file::Filter>>, upstreams: &Names) -> Vec<Filter> {
        self.unique_names("filters", present(&written).map(|(index, filter)| (index, filter.name.as_str())));
        let mut filters = Vec::new();
        for (index, filter) in owned(written) {
            filters.push(self.filter(&format!("filters[{index}]"), filter, upstreams));
        }
        filters
    }

    fn filter(&mut self, path: &str, filter: file::Filter, upstreams: &Names) -> Filter {
        let at = |field: &str| format!("{path}.{field}");
        self.filter_limits(&at("limits"), &filter.limits);
        let module = self.read(&at("wasm"), &filter.wasm, filter.limits.module_bytes.0);
        if let Some((_, bytes)) = &module {
            self.wasm_header(&at("wasm"), &filter.wasm, bytes);
        }
        let (module_path, module) = module.unwrap_or_default();
        let configuration = match (&filter.configuration, &filter.configuration_file) {
            (Some(_), Some(_)) => {
                self.wrong(
                    &at("configuration_file"),
                    "there is both `configuration` and `configuration_file`",
                    "keep one of the two",
                );
                Vec::new()
            }
            (Some(value), None) => self.configuration(&at("configuration"), value),
            (None, Some(file)) => self.configuration_file(&at("configuration_file"), file),
            (None, None) => Vec::new(),
        };
        let vm_configuration = match &filter.vm_configuration {
            Some(value) => self.configuration(&at("vm_configuration"), value),
            None => Vec::new(),
        };
        self.environment(&at("environment"), &filter.environment);
        let reload_base_interval =
            self.time(&at("reload.base_interval"), filter.reload.base_interval, Time::secs(3600));
        let reload_max_interval = self.time(&at("reload.max_interval"), filter.reload.max_interval, Time::secs(86_400));
        if filter.reload.max_interval < filter.reload.base_interval {
            self.wrong(
                &at("reload.max_interval"),
                format!("`{}` is less than `base_interval`", filter.reload.max_interval),
                format!("use at least `{}`", filter.reload.base_interval),
            );
        }
        let capabilities =
            filter.capabilities.map(|capabilities| self.capabilities(&at("capabilities"), &capabilities));
        let mut allowed_upstreams = BTreeSet::new();
        for (index, name) in filter.allowed_upstreams.iter().enumerate() {
            allowed_upstreams.extend(self.find(&format!("{path}.allowed_upstreams[{index}]"), name, upstreams));
        }
        let settable_fields = filter.settable_fields.map(|fields| {
            let each = fields.iter().enumerate();
            each.filter_map(|(index, field)| self.field_pattern(&format!("{path}.settable_fields[{index}]"), field))
                .collect()
        });
        Filter {
            name: filter.name,
            module_path,
            module: Bytes::new(module),
            configuration: Bytes::new(configuration),
            root_id: filter.root_id,
            vm_id: filter.vm_id,
            vm_configuration: Bytes::new(vm_configuration),
            environment_pass: filter.environment.pass,
            environment_set: filter.environment.set.into_iter().collect(),
            failure_policy: filter.failure_policy,
            reload_base_interval,
            reload_max_interval,
            allow_on_headers_stop_iteration: filter.allow_on_headers_stop_iteration,
            capabilities,
            allowed_upstreams: allowed_upstreams.into_iter().collect(),
            settable_fields,
            limits: filter.limits,
        }
    }

    fn filter_limits(&mut self, path: &str, limits: &file::FilterLimits) {
        let at = |field: &str| format!("{path}.{field}");
        let gib = Size::mib(1024);
        self.size(&at("memory"), limits.memory, Size::mib(1), Size::mib(4096));
        self.time(&at("callback_time"), limits.callback_time, Time::secs(10));
        self.size(&at("buffered_bytes"), limits.buffered_bytes, Size::kib(1), gib);
        self.size(&at("shared_data_bytes"), limits.shared_data_bytes, Size(0), gib);
        self.size(&at("map_bytes"), limits.map_bytes, Size::kib(1), Size::mib(64));
        self.count(&at("map_pairs"), limits.map_pairs, 1, 100_000);
        self.size(&at("module_bytes"), limits.module_bytes, Size::kib(1), gib);
        self.time(&at("compile_time"), limits.compile_time, Time::secs(3600));
    }

    fn wasm_header(&mut self, path: &str, written: &str, bytes: &[u8]) {
        if bytes.starts_with(b"\0asm\x01\0\0\0") {
            return;
        }
        if bytes.starts_with(b"\0asm\x0d\0\x01\0") {
            self.wrong(
                path,
                format!("`{written}` is a WebAssembly component; filters are core modules"),
                "build for the target `wasm32-wasip1`",
            );
        } else {
            self.wrong(
                path,
                format!("`{written}` is not a WebAssembly module"),
                "name the `.wasm` file that the build made; it starts with the bytes `\\0asm`",
            );
        }
    }

    fn configuration(&mut self, path: &str, value: &serde_json::Value) -> Vec<u8> {
        match value {
            serde_json::Value::Null => {
                self.wrong(path, "expected a configuration, found nothing", "write `{}`, or remove the key");
                Vec::new()
            }
            serde_json::Value::String(text) => text.clone().into_bytes(),
            value => value.to_string().into_bytes(),
        }
    }

    fn configuration_file(&mut self, path: &str, written: &str) -> Vec<u8> {
        let Some((resolved, bytes)) = self.read(path, written, CONFIGURATION_BYTES_MAX) else {
            return Vec::new();
        };
        let is_json = resolved.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("json"));
        if is_json && let Err(error) = serde_json::from_slice::<serde::de::IgnoredAny>(&bytes) {
            let problem = error.to_string();
            let problem = problem.split(" at line ").next().unwrap_or(&problem);
            // The line is not shown: configurations may hold key material.
            self.mistakes.push(Mistake {
                file: written.to_owned(),
                position: Some(Position { line: error.line(), column: error.column().max(1), width: 1 }),
                source_line: None,
                path: path.to_owned(),
                problem: format!("this is not valid JSON: {problem}"),
                hint: Some("look at commas and quotes here and just before".to_owned()),
            });
        }
        bytes
    }

    fn environment(&mut self, path: &str, environment: &file::Environment) {
        let names = environment.pass.iter().enumerate().map(|(index, name)| (format!("{path}.pass[{index}]"), name));
        let names = names.chain(environment.set.keys().map(|name| (format!("{path}.set.{name}"), name)));
        let mut seen = BTreeSet::new();
        for (path, name) in names {
            if name.is_empty() || name.contains(['=', '\0']) {
                self.wrong(
                    &path,
                    format!("`{}` cannot be a variable's name", name.escape_debug()),
                    "write e.g. `REGION`",
                );
            }
            if !seen.insert(name) {
                self.wrong(&path, format!("the variable `{name}` is given twice"), "keep one of the two");
            }
        }
        for (name, value) in &environment.set {
            if value.contains('\0') {
                self.wrong(&format!("{path}.set.{name}"), "a variable's value cannot hold NUL", "remove the NUL");
            }
        }
    }

    fn capabilities(&mut self, path: &str, written: &[String]) -> Vec<String> {
        let mut capabilities = BTreeSet::new();
        for (index, name) in written.iter().enumerate() {
            let path = format!("{path}[{index}]");
            if HOST_FUNCTIONS.contains(&name.as_str()) {
                capabilities.insert(name.clone());
            } else if name.starts_with("proxy_on_") {
                self.wrong(
                    &path,
                    format!("`{name}` is a callback, and callbacks are always delivered"),
                    "list host functions only",
                );
            } else {
                let hint = match did_you_mean(name, HOST_FUNCTIONS.iter().copied()) {
                    Some(meant) => format!("did you mean `{meant}`?"),
                    None => {
                        "use names of Proxy-Wasm 0.2.1 or WASI preview 1, e.g. `proxy_log` or `fd_write`".to_owned()
                    }
                };
                self.wrong(&path, format!("there is no host function `{name}`"), hint);
            }
        }
        capabilities.into_iter().collect()
    }

    fn field_pattern(&mut self, path: &str, written: &str) -> Option<FieldPattern> {
        let lower = written.to_ascii_lowercase();
        if let Some(prefix) = lower.strip_suffix('*')
            && (prefix.is_empty() || is_token(prefix))
        {
            return Some(FieldPattern::Prefix(prefix.to_owned()));
        }
        // Pseudo-fields are how a filter changes method, path, authority and status.
        if is_token(lower.strip_prefix(':').unwrap_or(&lower)) {
            return Some(FieldPattern::Exact(lower));
        }
        self.wrong(
            path,
            format!("`{written}` is not a field name"),
            "write e.g. `authorization` or `\"x-portcullis-*\"`",
        );
        None
    }

    fn upstreams(&mut self, written: Vec<(String, Option<file::Upstream>)>) -> Vec<Upstream> {
        let mut upstreams = Vec::new();
        for (name, upstream) in written {
            let path = format!("upstreams.{name}");
            self.key(&path, &name);
            // A place is kept for what could not be read, so that indices stay those of the names.
            let upstream = upstream.unwrap_or_else(|| file::Upstream {
                endpoints: vec!["127.0.0.1:1".to_owned()],
                tls: None,
                connect_timeout: Time::secs(1),
                request_timeout: Time::secs(1),
                max_connections: 1,
                http2: false,
            });
            upstreams.push(self.upstream(&path, name, &upstream));
        }
        upstreams
    }

    fn upstream(&mut self, path: &str, name: String, upstream: &file::Upstream) -> Upstream {
        let at = |field: &str| format!("{path}.{field}");
        let mut endpoints: Vec<Endpoint> = Vec::new();
        for (index, text) in upstream.endpoints.iter().enumerate() {
            let path = format!("{path}.endpoints[{index}]");
            match self.endpoint(text) {
                Ok(endpoint) if endpoints.contains(&endpoint) => {
                    self.wrong(&path, format!("`{text}` is in the list twice"), "keep one of the two");
                }
                Ok(endpoint) => endpoints.push(endpoint),
                Err(hint) => self.wrong(&path, format!("`{text}` is not an endpoint"), hint),
            }
        }
        if upstream.endpoints.is_empty() {
            self.wrong(&at("endpoints"), "the list is empty", "add e.g. `\"127.0.0.1:9000\"`");
        }
        let named = endpoints.iter().any(|endpoint| matches!(endpoint, Endpoint::Name { .. }));
        let unix = endpoints.iter().any(|endpoint| matches!(endpoint, Endpoint::Unix(_)));
        if named && unix {
            self.wrong(&at("endpoints"), "host names and Unix sockets are mixed", "make two upstreams of them");
        }
        self.count(&at("max_connections"), upstream.max_connections, 1, 10_000_000);
        let tls = upstream.tls.as_ref().and_then(|tls| self.upstream_tls(&at("tls"), tls, &endpoints));
        Upstream {
            name,
            endpoints,
            tls,
            connect_timeout: self.time(&at("connect_timeout"), upstream.connect_timeout, Time::secs(300)),
            request_timeout: self.time(&at("request_timeout"), upstream.request_timeout, Time::secs(86_400)),
            max_connections: upstream.max_connections as usize,
            http2: upstream.http2,
        }
    }

    fn endpoint(&self, text: &str) -> Result<Endpoint, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            let path = self.files.resolve(path);
            // sun_path has 108 bytes, the last of which is NUL.
            return if path.as_os_str().len() < 108 && !path.as_os_str().is_empty() {
                Ok(Endpoint::Unix(path))
            } else {
                Err("the path of a Unix socket has at most 107 bytes".to_owned())
            };
        }
        if let Ok(address) = text.parse::<SocketAddr>() {
            return if address.port() == 0 {
                Err("port 0 cannot be connected to".to_owned())
            } else {
                Ok(Endpoint::Address(address))
            };
        }
        if text.starts_with("http://") || text.starts_with("https://") {
            return Err(
                "leave out the scheme: write `name:port`, and `tls: {}` beside `endpoints` for HTTPS".to_owned()
            );
        }
        host_port(text)
            .map(|HostPort { host, port }| Endpoint::Name { host, port })
            .ok_or_else(|| "write `address:port`, `name:port` or `unix:/path`, e.g. `10.0.0.5:9000`".to_owned())
    }

    fn upstream_tls(&mut self, path: &str, tls: &file::UpstreamTls, endpoints: &[Endpoint]) -> Option<UpstreamTls> {
        let ca = match &tls.ca {
            Some(ca) => {
                let (path, pem) = self.pem(&format!("{path}.ca"), ca, "CERTIFICATE")?;
                Some(Authorities { path, pem })
            }
            None => None,
        };
        if let Some(server_name) = &tls.server_name {
            if !is_dns_name(server_name) && server_name.parse::<IpAddr>().is_err() {
                self.wrong(
                    &format!("{path}.server_name"),
                    format!("`{server_name}` is neither a host name nor an IP address"),
                    "write e.g. `orders.internal`, without a port",
                );
            }
            return Some(UpstreamTls { server_name: server_name.clone(), ca });
        }
        let mut hosts: Vec<String> = endpoints
            .iter()
            .map(|endpoint| match endpoint {
                Endpoint::Name { host, .. } => host.clone(),
                Endpoint::Address(address) => address.ip().to_string(),
                Endpoint::Unix(_) => String::new(),
            })
            .collect();
        hosts.dedup();
        match hosts.as_slice() {
            [host] if !host.is_empty() => Some(UpstreamTls { server_name: host.clone(), ca }),
            [] => None,
            _ => {
                self.wrong(
                    path,
                    "the endpoints do not share one host name that the certificate could have",
                    "add `server_name: NAME`",
                );
                None
            }
        }
    }

    fn operators(&mut self, written: Vec<(String, Option<file::Operator>)>) -> Vec<Operator> {
        let mut operators: Vec<Operator> = Vec::new();
        for (name, operator) in written {
            let path = format!("operators.{name}");
            self.key(&path, &name);
            let Some(operator) = operator else {
                operators.push(unread_operator(name));
                continue;
            };
            let operator = self.operator(&path, name, operator);
            if let Some(cpus) = &operator.cpus {
                let taken = operators.iter().find_map(|other| {
                    let cpu = other.cpus.iter().flatten().find(|cpu| cpus.contains(cpu))?;
                    Some((*cpu, other.name.clone()))
                });
                if let Some((cpu, other)) = taken {
                    self.wrong(
                        &format!("{path}.placement.cpus"),
                        format!("CPU {cpu} already belongs to operator `{other}`"),
                        "give each operator CPUs of its own",
                    );
                }
            }
            operators.push(operator);
        }
        operators
    }

    fn operator(&mut self, path: &str, name: String, operator: file::Operator) -> Operator {
        let at = |field: &str| format!("{path}.{field}");
        let entry = self.read(&at("entry"), &operator.entry, OPERATOR_FILE_BYTES_MAX);
        const EXTENSIONS: [&str; 6] = ["ts", "js", "mts", "mjs", "tsx", "jsx"];
        let extension = Path::new(&operator.entry).extension().and_then(|extension| extension.to_str());
        if entry.is_some() && !extension.is_some_and(|extension| EXTENSIONS.contains(&extension)) {
            self.wrong(
                &at("entry"),
                format!("`{}` is not a JavaScript or TypeScript module", operator.entry),
                format!("name a file that ends in one of {}", listed(EXTENSIONS)),
            );
        }
        let permissions = operator.permissions;
        let net = self.host_ports(&at("permissions.net"), &permissions.net);
        for (index, variable) in permissions.env.iter().enumerate() {
            self.variable(&format!("{path}.permissions.env[{index}]"), variable);
        }
        let mut secrets = Vec::new();
        for (secret_name, secret) in permissions.secrets {
            secrets.extend(self.secret(
                &format!("{path}.permissions.secrets.{secret_name}"),
                secret_name,
                &secret,
                &net,
            ));
        }
        let mut read = Vec::new();
        for (index, file) in permissions.read.iter().enumerate() {
            let found = self.read(&format!("{path}.permissions.read[{index}]"), file, OPERATOR_FILE_BYTES_MAX);
            read.extend(found.map(|(resolved, _)| (file.clone(), resolved)));
        }
        self.operator_limits(&at("limits"), &operator.limits);
        let replicas = operator.replicas;
        self.count(&at("replicas.max"), replicas.max, 1, 1024);
        if replicas.min > replicas.max {
            self.wrong(
                &at("replicas.min"),
                format!("{} is more than `max`, which is {}", replicas.min, replicas.max),
                "raise `max` or lower `min`",
            );
        }
        if let Some(pool) = &operator.placement.pool {
            self.name(&at("placement.pool"), pool);
        }
        let cpus = operator.placement.cpus.map(|mut cpus| {
            if cpus.is_empty() {
                self.wrong(&at("placement.cpus"), "the list is empty", "name CPUs, or remove it to share all of them");
            }
            let named = cpus.len();
            cpus.sort_unstable();
            cpus.dedup();
            if cpus.len() < named {
                self.wrong(&at("placement.cpus"), "a CPU is in the list twice", "keep one of the two");
            }
            if let Some(cpu) = cpus.iter().find(|cpu| **cpu >= 4096) {
                self.wrong(&at("placement.cpus"), format!("there is no CPU {cpu}"), "see `lscpu -e` for their numbers");
            }
            cpus
        });
        Operator {
            name,
            entry: entry.map(|(resolved, _)| resolved).unwrap_or_default(),
            net,
            env: permissions.env,
            secrets,
            kv: permissions.kv,
            read,
            limits: operator.limits,
            replicas,
            cpus,
            pool: operator.placement.pool,
            isolation: operator.isolation,
        }
    }

    fn operator_limits(&mut self, path: &str, limits: &file::OperatorLimits) {
        let at = |field: &str| format!("{path}.{field}");
        let gib = Size::mib(1024);
        self.time(&at("wall_time"), limits.wall_time, Time::secs(3600));
        self.time(&at("cpu_time"), limits.cpu_time, Time::secs(3600));
        self.time(&at("start_time"), limits.start_time, Time::secs(300));
        self.size(&at("heap"), limits.heap, Size::mib(8), Size::mib(65_536));
        if limits.memory < limits.heap {
            self.wrong(
                &at("memory"),
                format!("`{}` is less than `heap`, which is `{}`", limits.memory, limits.heap),
                "memory holds the heap, buffers and WebAssembly; raise it or lower `heap`",
            );
        }
        self.size(&at("request_bytes"), limits.request_bytes, Size(0), gib);
        self.size(&at("response_bytes"), limits.response_bytes, Size(0), Size::mib(65_536));
        self.count(&at("concurrency"), limits.concurrency, 1, 100_000);
    }

    fn variable(&mut self, path: &str, name: &str) {
        if name.is_empty() || name.contains(['=', '\0']) {
            self.wrong(path, format!("`{}` cannot be a variable's name", name.escape_debug()), "write e.g. `REGION`");
        }
    }

    fn host_ports(&mut self, path: &str, written: &[String]) -> Vec<HostPort> {
        let mut list = Vec::new();
        for (index, text) in written.iter().enumerate() {
            match host_port(text) {
                Some(host_port) => list.push(host_port),
                None => self.wrong(
                    &format!("{path}[{index}]"),
                    format!("`{text}` is not a host and a port"),
                    "write e.g. `api.example.com:443`; wildcards are not possible",
                ),
            }
        }
        list
    }

    fn secret(&mut self, path: &str, name: String, secret: &file::Secret, net: &[HostPort]) -> Option<OperatorSecret> {
        self.key(path, &name);
        let hosts = self.host_ports(&format!("{path}.hosts"), &secret.hosts);
        if secret.hosts.is_empty() {
            self.wrong(
                &format!("{path}.hosts"),
                "the list is empty, so the secret could go nowhere",
                "name the hosts that need it",
            );
        }
        for (index, host) in hosts.iter().enumerate() {
            if !net.contains(host) {
                self.wrong(
                    &format!("{path}.hosts[{index}]"),
                    format!("the operator may not reach `{host}`"),
                    "add it to `permissions.net` as well",
                );
            }
        }
        let source = match &secret.from {
            file::SecretSource::Env(variable) => {
                self.variable(&format!("{path}.from.env"), variable);
                SecretSource::Env(variable.clone())
            }
            file::SecretSource::File(file) => {
                SecretSource::File(self.read(&format!("{path}.from.file"), file, PEM_BYTES_MAX)?.0)
            }
        };
        Some(OperatorSecret { name, source, hosts })
    }

    fn routes(
        &mut self,
        written: Vec<Option<file::Route>>,
        filters: &Names,
        upstream_names: &Names,
        operator_names: &Names,
        upstreams: &[Upstream],
        operators: &[Operator],
    ) -> Vec<Route> {
        if written.is_empty() && self.root_has("routes") {
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
            let compiled = self.route(&path, route, filters, upstream_names, operator_names, upstreams, operators);
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

    #[expect(clippy::too_many_arguments, reason = "each is a section that a route may refer to")]
    fn route(
        &mut self,
        path: &str,
        route: file::Route,
        filters: &Names,
        upstream_names: &Names,
        operator_names: &Names,
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
            None => (0..filters.names.len()).collect(),
            Some(names) => {
                let mut chosen = BTreeSet::new();
                for (index, name) in names.iter().enumerate() {
                    let path = format!("{path}.filters[{index}]");
                    if let Some(found) = self.find(&path, name, filters)
                        && !chosen.insert(found)
                    {
                        self.wrong(&path, format!("the filter `{name}` is in the list twice"), "keep one of the two");
                    }
                }
                chosen
            }
        };
        let action = match (route.upstream, route.operator, route.respond) {
            (Some(name), None, None) => self.find(&at("upstream"), &name, upstream_names).map(Action::Upstream),
            (None, Some(name), None) => self.find(&at("operator"), &name, operator_names).map(Action::Operator),
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
            (None, Some(Action::Operator(index))) => {
                operators.get(*index).map_or(Duration::ZERO, |operator| operator.limits.wall_time.0)
            }
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

fn present<T>(written: &[Option<T>]) -> impl Iterator<Item = (usize, &T)> {
    written.iter().enumerate().filter_map(|(index, value)| value.as_ref().map(|value| (index, value)))
}

fn owned<T>(written: Vec<Option<T>>) -> impl Iterator<Item = (usize, T)> {
    written.into_iter().enumerate().filter_map(|(index, value)| value.map(|value| (index, value)))
}

/// Stands where an operator could not be read, so that indices stay those of the names. Never runs: there is a
/// mistake already.
fn unread_operator(name: String) -> Operator {
    Operator {
        name,
        entry: PathBuf::new(),
        net: Vec::new(),
        env: Vec::new(),
        secrets: Vec::new(),
        kv: false,
        read: Vec::new(),
        limits: file::OperatorLimits::default(),
        replicas: file::Replicas::default(),
        cpus: None,
        pool: None,
        isolation: file::Isolation::Required,
    }
}

/// Whether two listeners cannot both have their address: same port, and same IP or one that stands for all.
fn collide(a: SocketAddr, b: SocketAddr) -> bool {
    // An IPv6 wildcard socket takes IPv4 connections as well, unless told otherwise; we do not tell it.
    let same_family = a.is_ipv4() == b.is_ipv4();
    let ip = if same_family {
        a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified()
    } else {
        (a.is_ipv6() && a.ip().is_unspecified()) || (b.is_ipv6() && b.ip().is_unspecified())
    };
    a.port() != 0 && a.port() == b.port() && ip
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

/// RFC 9110, section 5.6.2.
fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

fn is_dns_name(text: &str) -> bool {
    !text.is_empty()
        && text.len() <= 253
        && text.split('.').all(|label| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
        // All digits and dots would be an IP address with a typing error.
        && !text.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.')
}

/// `name:port`, `1.2.3.4:port` or `[::1]:port`.
fn host_port(text: &str) -> Option<HostPort> {
    let (host, port) = text.rsplit_once(':')?;
    let port = Some(port)
        .filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()))?
        .parse()
        .ok()
        .filter(|port| *port != 0)?;
    let host = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(ip) => ip.parse::<std::net::Ipv6Addr>().ok()?.to_string(),
        None if is_dns_name(host) => host.to_ascii_lowercase(),
        None => host.parse::<std::net::Ipv4Addr>().ok()?.to_string(),
    };
    Some(HostPort { host, port })
}

fn host_pattern(text: &str) -> Result<HostPattern, String> {
    let lower = text.to_ascii_lowercase();
    if lower == "*" {
        return Ok(HostPattern::Any);
    }
    if let Some(suffix) = lower.strip_prefix('*') {
        return match suffix.strip_prefix('.') {
            Some(name) if is_dns_name(name) => Ok(HostPattern::Below(suffix.to_owned())),
            _ => Err("a wildcard stands for whole labels at the start: `*.example.com`".to_owned()),
        };
    }
    let is_ip = lower.parse::<std::net::Ipv4Addr>().is_ok()
        || lower
            .strip_prefix('[')
            .and_then(|ip| ip.strip_suffix(']'))
            .is_some_and(|ip| ip.parse::<std::net::Ipv6Addr>().is_ok());
    if is_dns_name(&lower) || is_ip {
        return Ok(HostPattern::Exact(lower));
    }
    Err(match lower.rsplit_once(':') {
        _ if lower.contains("//") => "write the host only, without scheme and path".to_owned(),
        Some((host, _)) if is_dns_name(host) => format!("the port does not matter; write `{host}`"),
        _ if lower.ends_with('.') && is_dns_name(lower.trim_end_matches('.')) => {
            format!("leave out the final dot: `{}`", lower.trim_end_matches('.'))
        }
        _ => "write e.g. `api.example.com`, `*.example.com` or `*`".to_owned(),
    })
}

fn network(text: &str) -> Result<Network, (String, String)> {
    let wrong =
        || (format!("`{text}` is not a network"), "write an address and a prefix length, e.g. `10.0.0.0/8`".to_owned());
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address, Some(prefix)),
        None => (text, None),
    };
    let address: IpAddr = address.parse().map_err(|_| wrong())?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    let prefix: u8 = match prefix {
        None => longest,
        Some(prefix) => prefix.parse().ok().filter(|prefix| *prefix <= longest).ok_or_else(wrong)?,
    };
    if prefix == 0 {
        return Err((
            format!("`{text}` is every address, so any client could claim to be any other"),
            "name the networks of your proxies only".to_owned(),
        ));
    }
    let start = match address {
        IpAddr::V4(ip) => IpAddr::V4((ip.to_bits() & u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)).into()),
        IpAddr::V6(ip) => {
            IpAddr::V6((ip.to_bits() & u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0)).into())
        }
    };
    if start != address {
        return Err((format!("`{text}` has bits set after its prefix"), format!("write `{start}/{prefix}`")));
    }
    Ok(Network { address, prefix })
}

/// Labels of the PEM blocks in a file, e.g. `CERTIFICATE`.
fn pem_labels(bytes: &[u8]) -> Vec<String> {
    bytes
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.trim_ascii().strip_prefix(b"-----BEGIN ")?.strip_suffix(b"-----"))
        .map(|label| String::from_utf8_lossy(label).into_owned())
        .collect()
}
