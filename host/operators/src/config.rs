//! What is asked for, and what can run.
//!
//! [`OperatorConfig`] is what an embedder fills from its policy file; [`OperatorConfig::compile`] is the only way to an [`Operator`]. It collects all
//! mistakes, not only the first.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::egress::{Grants, Secret};
use crate::engine::Class;
use crate::jail::Isolation;
use crate::placement;

/// One operator as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperatorConfig {
    /// The entry module, relative to the policy file, e.g. `operators/hello/main.ts`.
    pub entry: PathBuf,
    /// Folder outside of which nothing is imported. Default: the folder of `entry`.
    pub root: Option<PathBuf>,
    /// What it may reach, as `host:port`, e.g. `api.example.com:443`. Public addresses only. Default: nothing.
    pub net: Vec<String>,
    /// What it may reach although the address is private, loopback or link-local, as `host:port`. Default: nothing.
    pub private_net: Vec<String>,
    /// Plain values of `env`. Default: none.
    pub env: BTreeMap<String, String>,
    /// Values that it may use in requests without ever holding them. Default: none.
    pub secrets: BTreeMap<String, SecretConfig>,
    /// A store of its own, `env.kv`. Default: none.
    pub kv: Option<KvConfig>,
    /// Files whose contents it is handed: the name under which it asks for one, and where that is, relative to the policy
    /// file. Default: none.
    pub read: BTreeMap<String, PathBuf>,
    /// Limits; each has a default.
    pub limits: Limits,
    /// How many processes.
    pub replicas: Replicas,
    /// Where it runs. Default: anywhere.
    pub placement: Placement,
    /// Runs without a just-in-time compiler: slower, but a whole class of engine flaws is out of reach.
    pub interpreter_only: bool,
    /// Lets `eval` and `new Function` work.
    pub dangerously_allow_code_generation: bool,
    /// Which missing layers are tolerated. The host's own [`Settings::isolation`] may be stricter, never laxer.
    pub isolation: Isolation,
}

/// Where a secret comes from and where it may go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretConfig {
    /// Where the value is.
    pub from: SecretSource,
    /// The only destinations to which it is sent, as `host:port`; each must be granted as well.
    pub hosts: Vec<String>,
}

/// Where a secret's value is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretSource {
    /// A variable of the host's environment.
    Env(String),
    /// A file, relative to the policy file; a final line break is dropped.
    File(PathBuf),
}

impl SecretSource {
    fn read(&self, folder: &Path) -> Result<Vec<u8>, String> {
        match self {
            Self::File(file) => read_limited(&folder.join(file), 64 << 10),
            Self::Env(name) => std::env::var(name)
                .map(String::into_bytes)
                .map_err(|_| format!("the host's environment has no text in `{name}`")),
        }
    }
}

/// The key-value store of one operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvConfig {
    /// Most that keys and values together may take.
    pub bytes_max: u64,
}

/// Limits of one operator. Each has a named [`crate::Cause`], but those on what it asks of the host, which it sees as
/// exceptions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From the moment a process takes the request to the last byte of the answer.
    pub wall: Duration,
    /// CPU time for one request. With several at once, what the process used is shared out among them.
    pub cpu: Duration,
    /// CPU time between two requests (timers, `waitUntil`).
    pub background_cpu: Duration,
    /// From a request for a process to its readiness; also what the modules may take to run.
    pub start: Duration,
    /// JavaScript heap.
    pub heap_bytes: u64,
    /// All memory beyond what the engine needs for itself: heap, buffers, WebAssembly, private files.
    pub memory_bytes: u64,
    /// Request body.
    pub request_bytes: u64,
    /// Response body.
    pub response_bytes: u64,
    /// Requests that one process answers at the same time.
    pub concurrency: u32,
    /// Outgoing requests and uses of the store per incoming request.
    pub subrequests: u32,
    /// Body of an outgoing request.
    pub subrequest_bytes: u64,
    /// Body of the answer to an outgoing request.
    pub subresponse_bytes: u64,
    /// For an outgoing request, from resolution to the last byte of its answer.
    pub subrequest: Duration,
    /// Log lines a second, with ten times as many at once.
    pub log_lines_per_second: u32,
    /// Private files (caches of the platform; gone with the process).
    pub private_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            wall: Duration::from_secs(15),
            cpu: Duration::from_secs(1),
            background_cpu: Duration::from_secs(1),
            start: Duration::from_secs(10),
            heap_bytes: 64 << 20,
            memory_bytes: 192 << 20,
            request_bytes: 10 << 20,
            response_bytes: 50 << 20,
            concurrency: 100,
            subrequests: 50,
            subrequest_bytes: 1 << 20,
            subresponse_bytes: 10 << 20,
            subrequest: Duration::from_secs(10),
            log_lines_per_second: 100,
            private_bytes: 4 << 20,
        }
    }
}

/// How many processes of one operator there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Replicas {
    /// Kept even when idle; 0 means started by the first request.
    pub min: u32,
    /// Never more.
    pub max: u32,
    /// A process above `min` without a request for so long is stopped.
    pub idle: Duration,
}

impl Default for Replicas {
    fn default() -> Self {
        Self { min: 1, max: 4, idle: Duration::from_secs(60) }
    }
}

/// Where an operator runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Placement {
    /// CPUs that run this operator and no other. Default: shared ones.
    pub cpus: Vec<usize>,
    /// Runs only on hosts of this pool. Default: on any.
    pub pool: Option<String>,
}

/// Settings of the host that hold for all operators.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Which missing layers are tolerated.
    pub isolation: Isolation,
    /// For sockets and staging; a folder of its own is made in it. Default: the system's temporary folder.
    pub run_folder: PathBuf,
    /// Generic processes kept ready for each class of operator.
    pub prewarmed: usize,
    /// Where stores are kept. Without it, `kv` is refused.
    pub kv_folder: Option<PathBuf>,
    /// For checks: stores are empty, lie elsewhere, and are gone with the host, so that a host that serves is not disturbed.
    pub keeps_nothing: bool,
    /// Which pool this host belongs to.
    pub pool: Option<String>,
    /// First of the user ids that operators get, one each, where the host is root.
    pub uid_first: u32,
    /// How to start the launcher.
    pub launcher: crate::jail::Launcher,
    /// After the host is asked to stop: how long requests may go on. A process that is replaced or not needed any more is
    /// waited for as long as its requests may take.
    pub drain: Duration,
    /// After SIGTERM: how long until SIGKILL.
    pub kill_after: Duration,
    /// Stack traces go to the client, too.
    pub dev: bool,
    /// Further certificate authorities for outgoing TLS, PEM. Beside the well-known ones.
    pub extra_roots: Option<PathBuf>,
    /// What runs operators' code.
    pub engine: crate::engine::Choice,
    /// Keeps every thread of the embedding process off the CPUs that belong to one operator each. For a process that
    /// does nothing else and holds one [`crate::Operators`].
    pub keep_host_off_reserved_cpus: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            isolation: Isolation::default(),
            run_folder: std::env::temp_dir(),
            prewarmed: 1,
            kv_folder: None,
            keeps_nothing: false,
            pool: None,
            uid_first: 1_950_000_000,
            launcher: crate::jail::Launcher::default(),
            drain: Duration::from_secs(15),
            kill_after: Duration::from_secs(2),
            dev: false,
            extra_roots: None,
            engine: crate::engine::Choice::default(),
            keep_host_off_reserved_cpus: false,
        }
    }
}

/// A mistake: where, what, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// As the policy file has it, e.g. `operators.hello.permissions.net[1]`.
    pub path: String,
    /// What is wrong.
    pub problem: String,
    /// How to put it right.
    pub hint: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}\n  hint: {}", self.path, self.problem, self.hint)
    }
}

impl std::error::Error for ConfigError {}

/// An operator that can run: everything checked, nothing read yet but secrets and granted files.
#[derive(Clone, PartialEq, Eq)]
pub struct Operator {
    pub(crate) name: String,
    pub(crate) entry: PathBuf,
    pub(crate) root: PathBuf,
    pub(crate) grants: Grants,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    pub(crate) kv_bytes_max: Option<u64>,
    pub(crate) limits: Limits,
    pub(crate) replicas: Replicas,
    pub(crate) cpus: Vec<usize>,
    pub(crate) class: Class,
}

impl fmt::Debug for Operator {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Operator").field("name", &self.name).field("entry", &self.entry).finish_non_exhaustive()
    }
}

impl Operator {
    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its entry module.
    #[must_use]
    pub fn entry(&self) -> &Path {
        &self.entry
    }

    /// The folder outside of which nothing is imported.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }
}

const GRANTED_FILE_BYTES_MAX: u64 = 1 << 20;
const GRANTED_FILES_BYTES_MAX: usize = 4 << 20;
const NAME_BYTES_MAX: usize = 64;

/// Whether a name can be used in metrics, paths and sockets.
#[must_use]
pub fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'_')
        && !name.starts_with('-')
}

struct Mistakes<'a> {
    operator: &'a str,
    found: Vec<ConfigError>,
}

impl Mistakes<'_> {
    fn add(&mut self, path: &str, problem: impl Into<String>, hint: impl Into<String>) {
        let path = format!("operators.{}{}{path}", self.operator, if path.is_empty() { "" } else { "." });
        self.found.push(ConfigError { path, problem: problem.into(), hint: hint.into() });
    }
}

impl OperatorConfig {
    /// The smallest configuration: an entry and nothing granted.
    #[must_use]
    pub fn new(entry: impl Into<PathBuf>) -> Self {
        Self {
            entry: entry.into(),
            root: None,
            net: Vec::new(),
            private_net: Vec::new(),
            env: BTreeMap::new(),
            secrets: BTreeMap::new(),
            kv: None,
            read: BTreeMap::new(),
            limits: Limits::default(),
            replicas: Replicas::default(),
            placement: Placement::default(),
            interpreter_only: false,
            dangerously_allow_code_generation: false,
            isolation: Isolation::default(),
        }
    }

    /// Checks everything and reads secrets and granted files. `folder` is where relative paths start: the policy file's.
    ///
    /// # Errors
    /// Every mistake that was found.
    pub fn compile(&self, name: &str, folder: &Path, settings: &Settings) -> Result<Operator, Vec<ConfigError>> {
        let mut mistakes = Mistakes { operator: name, found: Vec::new() };
        if !is_name(name) {
            mistakes.add(
                "",
                format!("`{name}` is no name for an operator"),
                "use 1 to 64 of a-z, 0-9, `-` and `_`, and no leading `-`",
            );
        }
        let entry = folder.join(&self.entry);
        if !entry.is_file() {
            mistakes.add("entry", format!("there is no file `{}`", entry.display()), "paths start at the policy file");
        }
        let root = match &self.root {
            Some(root) => folder.join(root),
            None => entry.parent().unwrap_or(folder).to_owned(),
        };
        if !entry.starts_with(&root) {
            mistakes.add("root", "`entry` is not inside `root`", "name a folder that holds the entry module");
        }
        let grants = self.grants(folder, &mut mistakes);
        let env = self.environment(&grants, &mut mistakes);
        let files = self.granted_files(folder, &mut mistakes);
        if self.kv.is_some() && settings.kv_folder.is_none() {
            mistakes.add(
                "permissions.kv",
                "this host has no folder for stores",
                "give the host a folder for them, or remove `kv`",
            );
        }
        self.check_limits(&mut mistakes);
        if self.replicas.max == 0 || self.replicas.min > self.replicas.max {
            mistakes.add("replicas", "`max` must be at least 1 and at least `min`", "e.g. `{ min: 1, max: 2 }`");
        }
        if self.placement.pool != settings.pool {
            let named =
                |pool: &Option<String>| pool.as_ref().map_or("no pool".to_owned(), |pool| format!("pool `{pool}`"));
            mistakes.add(
                "placement.pool",
                format!(
                    "this operator runs in {} only, and this host is in {}",
                    named(&self.placement.pool),
                    named(&settings.pool)
                ),
                "serve it from a host of that pool",
            );
        }
        for (index, cpu) in self.placement.cpus.iter().enumerate() {
            if !placement::usable().contains(cpu) {
                mistakes.add(
                    &format!("placement.cpus[{index}]"),
                    format!("this host has no CPU {cpu}"),
                    format!("it has {}", listed(placement::usable())),
                );
            }
        }
        if !mistakes.found.is_empty() {
            return Err(mistakes.found);
        }
        Ok(Operator {
            name: name.to_owned(),
            entry,
            root,
            grants,
            env,
            files,
            kv_bytes_max: self.kv.map(|kv| kv.bytes_max),
            limits: self.limits,
            replicas: self.replicas,
            cpus: self.placement.cpus.clone(),
            class: Class {
                heap_bytes: self.limits.heap_bytes,
                memory_bytes: self.limits.memory_bytes,
                interpreter_only: self.interpreter_only,
                code_generation: self.dangerously_allow_code_generation,
                private_bytes: self.limits.private_bytes,
                required: Isolation::Required == self.isolation || Isolation::Required == settings.isolation,
            },
        })
    }

    fn grants(&self, folder: &Path, mistakes: &mut Mistakes<'_>) -> Grants {
        let mut grants = Grants::default();
        for (list, name, private) in
            [(&self.net, "permissions.net", false), (&self.private_net, "permissions.private_net", true)]
        {
            for (index, text) in list.iter().enumerate() {
                if let Err((problem, hint)) = grants.allow(text, private) {
                    mistakes.add(&format!("{name}[{index}]"), problem, hint);
                }
            }
        }
        for (name, secret) in &self.secrets {
            let path = format!("permissions.secrets.{name}");
            if !is_environment_name(name) {
                mistakes.add(&path, "not a name for `env`", "use letters, digits and `_`, and no leading digit");
            }
            if secret.hosts.is_empty() {
                mistakes.add(&path, "`hosts` is empty, so it could not be used", "list where it goes, as `host:port`");
            }
            for (index, text) in secret.hosts.iter().enumerate() {
                if !grants.is_granted(text) {
                    mistakes.add(
                        &format!("{path}.hosts[{index}]"),
                        format!("`{text}` is not granted"),
                        format!("add `{text}` to `permissions.net`"),
                    );
                }
            }
            match secret.from.read(folder).map(Secret::new) {
                Ok(Some(value)) => grants.add_secret(name, value, &secret.hosts),
                Ok(None) => mistakes.add(&path, "the value is empty or cannot stand in a header", "one line of text"),
                Err(problem) => mistakes.add(&path, problem, "name a readable file or a variable that is set"),
            }
        }
        grants
    }

    fn environment(&self, grants: &Grants, mistakes: &mut Mistakes<'_>) -> BTreeMap<String, String> {
        let mut env = self.env.clone();
        for name in self.env.keys() {
            if !is_environment_name(name) || matches!(name.as_str(), "kv" | "files" | "__proto__") {
                mistakes.add(
                    &format!("permissions.env.{name}"),
                    "not a name for `env`",
                    "use letters, digits and `_`; `kv` and `files` are taken",
                );
            }
            if self.secrets.contains_key(name) {
                mistakes.add(&format!("permissions.env.{name}"), "also a secret", "use each name once");
            }
        }
        env.extend(grants.placeholders());
        env
    }

    fn granted_files(&self, folder: &Path, mistakes: &mut Mistakes<'_>) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut total = 0_usize;
        for (name, path) in &self.read {
            let field = format!("permissions.read.{name}");
            match read_limited(&folder.join(path), GRANTED_FILE_BYTES_MAX) {
                Ok(contents) => {
                    total = total.saturating_add(contents.len());
                    files.insert(name.clone(), contents);
                }
                Err(problem) => mistakes.add(&field, problem, "name a readable file of at most 1 MiB"),
            }
        }
        if total > GRANTED_FILES_BYTES_MAX {
            mistakes.add(
                "permissions.read",
                "the files are longer than 4 MiB together",
                "hand over fewer, or serve them otherwise",
            );
        }
        files
    }

    fn check_limits(&self, mistakes: &mut Mistakes<'_>) {
        let limits = &self.limits;
        let positive = [
            ("wall", limits.wall.is_zero()),
            ("cpu", limits.cpu.is_zero()),
            ("background_cpu", limits.background_cpu.is_zero()),
            ("start", limits.start.is_zero()),
            ("subrequest", limits.subrequest.is_zero()),
            ("concurrency", limits.concurrency == 0),
            ("log_lines_per_second", limits.log_lines_per_second == 0),
            ("private_bytes", limits.private_bytes == 0),
        ];
        for (name, is_zero) in positive {
            if is_zero {
                mistakes.add(&format!("limits.{name}"), "must be more than nothing", "leave it out for the default");
            }
        }
        if !(16 << 20..=4096 << 20).contains(&limits.heap_bytes) {
            mistakes.add("limits.heap_bytes", "must be 16 MiB to 4 GiB", "64 MiB is the default");
        }
        if limits.memory_bytes < limits.heap_bytes || limits.memory_bytes > 64 << 30 {
            mistakes.add(
                "limits.memory_bytes",
                "must be at least `heap_bytes` and at most 64 GiB",
                "twice the heap is usual",
            );
        }
        if limits.concurrency > 4096 {
            mistakes.add("limits.concurrency", "must be at most 4096", "raise `replicas.max` instead");
        }
    }
}

/// CPUs must belong to one operator each.
///
/// # Errors
/// One mistake for each CPU that two operators claim, and one when none is left for the others.
pub fn check_placement(operators: &[Operator]) -> Result<BTreeSet<usize>, Vec<ConfigError>> {
    let mut owners: BTreeMap<usize, &str> = BTreeMap::new();
    let mut mistakes = Vec::new();
    for operator in operators {
        for cpu in &operator.cpus {
            if let Some(other) = owners.insert(*cpu, &operator.name)
                && other != operator.name
            {
                mistakes.push(ConfigError {
                    path: format!("operators.{}.placement.cpus", operator.name),
                    problem: format!("CPU {cpu} belongs to operator `{other}` already"),
                    hint: "a CPU in `placement` is nobody else's".to_owned(),
                });
            }
        }
    }
    if !owners.is_empty() && placement::usable().iter().all(|cpu| owners.contains_key(cpu)) {
        mistakes.push(ConfigError {
            path: "operators".to_owned(),
            problem: "`placement.cpus` leaves no CPU for the host and the other operators".to_owned(),
            hint: "leave at least one CPU unnamed".to_owned(),
        });
    }
    if mistakes.is_empty() { Ok(owners.into_keys().collect()) } else { Err(mistakes) }
}

/// Numbers in order, e.g. `0 to 3, 6`.
fn listed(numbers: &BTreeSet<usize>) -> String {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for number in numbers {
        match runs.last_mut() {
            Some((_, last)) if *last + 1 == *number => *last = *number,
            _ => runs.push((*number, *number)),
        }
    }
    let run = |(first, last): &(usize, usize)| {
        if first == last { first.to_string() } else { format!("{first} to {last}") }
    };
    runs.iter().map(run).collect::<Vec<_>>().join(", ")
}

fn is_environment_name(name: &str) -> bool {
    let mut bytes = name.bytes();
    bytes.next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && name.len() <= NAME_BYTES_MAX
}

fn read_limited(path: &Path, bytes_max: u64) -> Result<Vec<u8>, String> {
    let said = |error: std::io::Error| format!("`{}`: {error}", path.display());
    let metadata = std::fs::metadata(path).map_err(said)?;
    if !metadata.is_file() || metadata.len() > bytes_max {
        return Err(format!("`{}` is not a file of at most {bytes_max} bytes", path.display()));
    }
    std::fs::read(path).map_err(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("main.ts"), "export default {}").unwrap();
        std::fs::write(folder.path().join("token"), "s3cret\n").unwrap();
        folder
    }

    fn mistakes(change: impl FnOnce(&mut OperatorConfig)) -> Vec<String> {
        let folder = folder();
        let mut config = OperatorConfig::new("main.ts");
        change(&mut config);
        match config.compile("hello", folder.path(), &Settings::default()) {
            Ok(_) => Vec::new(),
            Err(mistakes) => mistakes.iter().map(|mistake| format!("{}: {}", mistake.path, mistake.problem)).collect(),
        }
    }

    #[test]
    fn the_smallest_configuration_grants_nothing() {
        let folder = folder();
        let operator = OperatorConfig::new("main.ts").compile("hello", folder.path(), &Settings::default()).unwrap();
        assert!(operator.env.is_empty() && operator.files.is_empty() && operator.kv_bytes_max.is_none());
        assert!(!operator.grants.is_granted("api.example.com:443"));
        assert!(!operator.class.code_generation);
    }

    #[test]
    fn each_mistake_names_its_place() {
        assert_eq!(mistakes(|config| config.net = vec!["api.example.com".into()]).len(), 1);
        assert!(
            mistakes(|config| config.entry = "absent.ts".into())[0].starts_with("operators.hello.entry: there is no")
        );
        assert!(mistakes(|config| config.limits.concurrency = 0)[0].starts_with("operators.hello.limits.concurrency"));
        assert!(
            mistakes(|config| config.placement.cpus = vec![9999])[0].starts_with("operators.hello.placement.cpus[0]")
        );
        assert!(
            mistakes(|config| config.placement.pool = Some("acme".into()))[0]
                .contains("in pool `acme` only, and this host is in no pool")
        );
        assert!(mistakes(|config| config.kv = Some(KvConfig { bytes_max: 1 }))[0].contains("no folder for stores"));
        assert!(mistakes(|config| config.replicas.max = 0)[0].starts_with("operators.hello.replicas"));
        assert!(mistakes(|config| drop(config.env.insert("kv".into(), "x".into())))[0].contains("env.kv"));
    }

    #[test]
    fn a_secret_needs_a_granted_destination() {
        let secret =
            SecretConfig { from: SecretSource::File("token".into()), hosts: vec!["api.example.com:443".into()] };
        let found = mistakes(|config| drop(config.secrets.insert("TOKEN".into(), secret.clone())));
        assert_eq!(found, ["operators.hello.permissions.secrets.TOKEN.hosts[0]: `api.example.com:443` is not granted"]);
        let found = mistakes(|config| {
            config.net = vec!["api.example.com:443".into()];
            config.secrets.insert("TOKEN".into(), secret);
        });
        assert_eq!(found, Vec::<String>::new());
    }

    #[test]
    fn debug_output_never_shows_a_secret() {
        let folder = folder();
        let mut config = OperatorConfig::new("main.ts");
        config.net = vec!["api.example.com:443".into()];
        config
            .secrets
            .insert("T".into(), SecretConfig { from: SecretSource::File("token".into()), hosts: config.net.clone() });
        let operator = config.compile("hello", folder.path(), &Settings::default()).unwrap();
        assert!(!format!("{operator:?} {:?} {:?}", operator.grants, operator.env).contains("s3cret"));
    }

    #[test]
    fn two_operators_cannot_own_one_cpu() {
        let folder = folder();
        let mut config = OperatorConfig::new("main.ts");
        config.placement.cpus = vec![0];
        let operators = ["a", "b"].map(|name| config.compile(name, folder.path(), &Settings::default()).unwrap());
        let mistakes = check_placement(&operators).unwrap_err();
        assert!(mistakes[0].to_string().contains("CPU 0 belongs to operator `a` already"), "{}", mistakes[0]);
    }

    #[test]
    fn numbers_are_listed_as_runs() {
        assert_eq!(listed(&BTreeSet::from([0, 1, 2, 3, 6, 8, 9])), "0 to 3, 6, 8 to 9");
        assert_eq!(listed(&BTreeSet::new()), "");
    }

    #[test]
    fn names_are_safe_in_paths_and_metrics() {
        assert!(is_name("hello-2_x") && is_name(&"a".repeat(64)));
        for bad in ["", "a.b", "A", "../x", "-x", "a/b", &"a".repeat(65)] {
            assert!(!is_name(bad), "{bad}");
        }
    }
}
