//! Operators: every grant is checked against what it refers to; nothing is granted that is not written.
//!
//! Modules and files are only known to exist; the operators' own crate reads them when it starts a process.

use std::path::{Path, PathBuf};

use super::Compiler;
use super::names::host_port;
use super::read::PEM_BYTES_MAX;
use crate::file;
use crate::mistake::listed;
use crate::policy::{Authorities, HostPort, Operator, OperatorHost, OperatorSecret, SecretSource};
use crate::units::{Size, Time};

const OPERATOR_FILE_BYTES_MAX: u64 = 16 * 1024 * 1024;

impl Compiler<'_> {
    pub(super) fn operator_host(&mut self, written: file::OperatorHost) -> OperatorHost {
        let mut folder = |path: &str, name: Option<String>| {
            let name = name?;
            if name.is_empty() {
                self.wrong(path, "the name is empty", "name a folder, relative to the policy's");
            }
            Some(self.files.resolve(&name))
        };
        let storage = folder("operator_host.storage", written.storage);
        let run_folder = folder("operator_host.run_folder", written.run_folder);
        self.count("operator_host.prewarmed", written.prewarmed, 0, 64);
        let ca = written.ca.and_then(|file| self.pem("operator_host.ca", &file, "CERTIFICATE"));
        OperatorHost {
            storage,
            run_folder,
            engine: written.engine,
            isolation: written.isolation,
            prewarmed: written.prewarmed as usize,
            ca: ca.map(|(path, pem)| Authorities { path, pem }),
        }
    }

    pub(super) fn operators(
        &mut self,
        written: Vec<(String, Option<file::Operator>)>,
        has_storage: bool,
    ) -> Vec<Operator> {
        let mut operators: Vec<Operator> = Vec::new();
        for (name, operator) in written {
            let path = format!("operators.{name}");
            self.key(&path, &name);
            let Some(operator) = operator else {
                operators.push(unread_operator(name));
                continue;
            };
            if operator.permissions.kv && !has_storage {
                self.wrong(
                    &format!("{path}.permissions.kv"),
                    "there is no folder for stores",
                    "name one: `operator_host: { storage: kv }`",
                );
            }
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
        const EXTENSIONS: [&str; 4] = ["ts", "js", "mts", "mjs"];
        let extension = Path::new(&operator.entry).extension().and_then(|extension| extension.to_str());
        if entry.is_some() && !extension.is_some_and(|extension| EXTENSIONS.contains(&extension)) {
            self.wrong(
                &at("entry"),
                format!("`{}` is not a JavaScript or TypeScript module", operator.entry),
                format!("name a file that ends in one of {}", listed(EXTENSIONS)),
            );
        }
        let entry = entry.map(|(resolved, _)| resolved).unwrap_or_default();
        let root = match &operator.root {
            None => entry.parent().map(Path::to_owned).unwrap_or_default(),
            Some(root) => {
                let root = self.files.resolve(root);
                if !entry.as_os_str().is_empty() && !entry.starts_with(&root) {
                    self.wrong(
                        &at("root"),
                        format!("`{}` does not hold `{}`", root.display(), entry.display()),
                        "name a folder above the entry module, relative to the policy's",
                    );
                }
                root
            }
        };
        let permissions = operator.permissions;
        let net = self.host_ports(&at("permissions.net"), &permissions.net);
        let private_net = self.host_ports(&at("permissions.private_net"), &permissions.private_net);
        let granted: Vec<HostPort> = net.iter().chain(&private_net).cloned().collect();
        for (index, variable) in permissions.env.iter().enumerate() {
            let path = format!("{path}.permissions.env[{index}]");
            self.variable(&path, variable);
            if permissions.secrets.contains_key(variable) {
                self.wrong(&path, format!("`{variable}` is also a secret"), "use each name once");
            }
        }
        let mut secrets = Vec::new();
        for (secret_name, secret) in permissions.secrets {
            secrets.extend(self.secret(
                &format!("{path}.permissions.secrets.{secret_name}"),
                secret_name,
                &secret,
                &granted,
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
            entry,
            root,
            net,
            private_net,
            env: permissions.env,
            secrets,
            kv: permissions.kv,
            read,
            limits: operator.limits,
            replicas,
            cpus,
            pool: operator.placement.pool,
            isolation: operator.isolation,
            interpreter_only: operator.interpreter_only,
            code_generation: operator.dangerously_allow_code_generation,
        }
    }

    fn operator_limits(&mut self, path: &str, limits: &file::OperatorLimits) {
        let at = |field: &str| format!("{path}.{field}");
        let gib = Size::mib(1024);
        self.time(&at("wall_time"), limits.wall_time, Time::secs(3600));
        self.time(&at("cpu_time"), limits.cpu_time, Time::secs(3600));
        self.time(&at("background_cpu_time"), limits.background_cpu_time, Time::secs(3600));
        self.time(&at("start_time"), limits.start_time, Time::secs(300));
        self.time(&at("subrequest_time"), limits.subrequest_time, Time::secs(3600));
        self.size(&at("heap"), limits.heap, Size::mib(16), Size::mib(4096));
        self.size(&at("memory"), limits.memory, Size::mib(16), Size::mib(65_536));
        if limits.memory < limits.heap {
            self.wrong(
                &at("memory"),
                format!("`{}` is less than `heap`, which is `{}`", limits.memory, limits.heap),
                "memory holds the heap, buffers and WebAssembly; raise it or lower `heap`",
            );
        }
        self.size(&at("request_bytes"), limits.request_bytes, Size(0), gib);
        self.size(&at("response_bytes"), limits.response_bytes, Size(0), Size::mib(65_536));
        self.size(&at("subrequest_bytes"), limits.subrequest_bytes, Size(0), gib);
        self.size(&at("subresponse_bytes"), limits.subresponse_bytes, Size(0), gib);
        self.count(&at("concurrency"), limits.concurrency, 1, 4096);
        self.count(&at("log_lines_per_second"), limits.log_lines_per_second, 1, 1_000_000);
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
        // The operator reads its mark as `env.NAME`.
        let mut letters = name.chars();
        let is_identifier = letters.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
            && letters.all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
            && name.len() <= 64
            && !matches!(name.as_str(), "kv" | "files");
        if !is_identifier {
            self.wrong_key(
                path,
                format!("`{}` cannot be a name in `env`", name.escape_debug()),
                "use 1 to 64 letters, digits and `_`, and no digit first, e.g. `API_KEY`; `kv` and `files` are taken",
            );
        }
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
                    "add it to `permissions.net` or `permissions.private_net` as well",
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
}

/// Stands where an operator could not be read, so that indices stay those of the names. Never runs: there is a
/// mistake already.
fn unread_operator(name: String) -> Operator {
    Operator {
        name,
        entry: PathBuf::new(),
        root: PathBuf::new(),
        net: Vec::new(),
        private_net: Vec::new(),
        env: Vec::new(),
        secrets: Vec::new(),
        kv: false,
        read: Vec::new(),
        limits: file::OperatorLimits::default(),
        replicas: file::Replicas::default(),
        cpus: None,
        pool: None,
        isolation: file::Isolation::Required,
        interpreter_only: false,
        code_generation: false,
    }
}
