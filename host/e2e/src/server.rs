//! [`Server`]: `portcullis serve` or the real Envoy, running one policy on ports of its own choice.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use portcullis_harness::{HostKind, RequestPlan};
use serde_json::Value;

use crate::client;
use crate::process::{DEADLINE, Process};
use crate::programs::Programs;

/// A running host.
pub struct Server {
    process: Process,
    host: HostKind,
    listeners: BTreeMap<String, SocketAddr>,
    address: SocketAddr,
    admin: SocketAddr,
}

impl Server {
    /// Starts `portcullis serve` with a policy whose addresses have port 0.
    pub fn portcullis(policy: &Path) -> Result<Server, String> {
        Server::portcullis_with(policy, |_| {})
    }

    /// The same, with other arguments or variables.
    pub fn portcullis_with(policy: &Path, change: impl FnOnce(&mut Command)) -> Result<Server, String> {
        Server::portcullis_watched(&Programs::find(), policy, change, |_| true)
    }

    fn portcullis_watched(
        programs: &Programs,
        policy: &Path,
        change: impl FnOnce(&mut Command),
        keep: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Result<Server, String> {
        let mut command = Command::new(programs.portcullis()?);
        command.arg("serve").arg(policy);
        change(&mut command);
        let process = Process::start_keeping("portcullis serve", &mut command, keep)?;
        let mut listeners = BTreeMap::new();
        // It says where it listens once everything has started, the admin endpoints last; that is what we wait for.
        let (address, admin) = process.wait_for(|line| {
            listeners.extend(announced_listener(line));
            let admin = announced(line, "admin on")?;
            Some((*listeners.get("public")?, admin))
        })?;
        Ok(Server { process, host: HostKind::Standalone, listeners, address, admin })
    }

    /// Starts the real Envoy with the bootstrap that `portcullis envoy-config` makes of a policy.
    pub fn envoy(policy: &Path) -> Result<Server, String> {
        Server::envoy_watched(&Programs::find(), policy, &[], Ok, |_| true)
    }

    /// The same, with further arguments for `portcullis envoy-config`.
    pub fn envoy_with(policy: &Path, rendering: &[&str]) -> Result<Server, String> {
        Server::envoy_watched(&Programs::find(), policy, rendering, Ok, |_| true)
    }

    /// The same, with these programs and with the bootstrap changed. `keep` as in [`Server::start_watched`].
    pub fn envoy_edited(
        programs: &Programs,
        policy: &Path,
        edit: impl FnOnce(String) -> Result<String, String>,
        keep: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Result<Server, String> {
        Server::envoy_watched(programs, policy, &[], edit, keep)
    }

    fn envoy_watched(
        programs: &Programs,
        policy: &Path,
        rendering: &[&str],
        edit: impl FnOnce(String) -> Result<String, String>,
        keep: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Result<Server, String> {
        let folder = policy.parent().unwrap_or(Path::new("."));
        let bootstrap = folder.join("envoy.yaml");
        let admin_file = folder.join("envoy-admin-address");
        let envoy = programs.envoy()?;
        let rendered = Process::run(
            "portcullis envoy-config",
            Command::new(programs.portcullis()?)
                .arg("envoy-config")
                .arg(policy)
                .arg("--output")
                .arg(&bootstrap)
                .args(rendering),
        )?;
        if !rendered.status.success() {
            return Err(format!("`portcullis envoy-config` failed:\n{}", rendered.output));
        }
        let fail = |error: std::io::Error| format!("{}: {error}", bootstrap.display());
        let edited = edit(std::fs::read_to_string(&bootstrap).map_err(fail)?)?;
        std::fs::write(&bootstrap, edited).map_err(fail)?;
        let mut command = Command::new(envoy);
        command.arg("-c").arg(&bootstrap).arg("--admin-address-path").arg(&admin_file);
        command.args(["--concurrency", "1", "--disable-hot-restart", "--log-level", "info"]);
        let process = Process::start_keeping("envoy", &mut command, move |line| keep(line) && !lists_extensions(line))?;
        process.wait_for(|line| line.contains("starting main dispatch loop").then_some(()))?;
        let admin = std::fs::read_to_string(&admin_file)
            .map_err(|error| format!("envoy wrote no admin address: {error}\n{}", process.log()))?;
        let admin: SocketAddr =
            admin.trim().parse().map_err(|error| format!("envoy's admin address `{admin}`: {error}"))?;
        let mut server = Server { process, host: HostKind::Envoy, listeners: BTreeMap::new(), address: admin, admin };
        server.wait_until_live()?;
        server.listeners = server.envoy_listeners()?;
        let first = server.listeners.get("public").or(server.listeners.values().next()).copied();
        server.address = first.ok_or_else(|| format!("envoy has no listener:\n{}", server.log()))?;
        Ok(server)
    }

    /// Starts one or the other.
    pub fn start(host: HostKind, policy: &Path) -> Result<Server, String> {
        Server::start_watched(host, policy, |_| true)
    }

    /// The same; `keep` sees every line that the process writes, and says which ones are kept for [`Server::log`].
    pub fn start_watched(
        host: HostKind,
        policy: &Path,
        keep: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Result<Server, String> {
        Server::start_with(&Programs::find(), host, policy, keep)
    }

    /// The same, with these programs.
    pub fn start_with(
        programs: &Programs,
        host: HostKind,
        policy: &Path,
        keep: impl Fn(&str) -> bool + Send + Sync + 'static,
    ) -> Result<Server, String> {
        match host {
            HostKind::Standalone => Server::portcullis_watched(programs, policy, |_| {}, keep),
            HostKind::Envoy => Server::envoy_watched(programs, policy, &[], Ok, keep),
            HostKind::Harness => Err("the harness has no server".to_owned()),
        }
    }

    /// Sends the process a signal, e.g. `HUP`.
    pub fn signal(&self, name: &str) {
        let sent = Command::new("kill").arg(format!("-{name}")).arg(self.process.id().to_string()).status();
        assert!(sent.is_ok_and(|status| status.success()), "no signal {name} could be sent");
    }

    /// Asks the process to end, and waits until it has.
    pub fn end(&mut self) -> Result<(), String> {
        self.signal("TERM");
        let status = self.process.wait()?;
        if status.success() { Ok(()) } else { Err(format!("ended with {status}:\n{}", self.log())) }
    }

    /// Where the listener of this name is.
    pub fn listener(&self, name: &str) -> Result<SocketAddr, String> {
        self.listeners.get(name).copied().ok_or_else(|| format!("there is no listener `{name}`:\n{}", self.log()))
    }

    /// Where the listener `public` is, or the only one there is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where the administration endpoints are.
    pub fn admin(&self) -> SocketAddr {
        self.admin
    }

    /// What the process wrote so far.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        self.process.is_running()
    }

    /// What filters counted, under the names that they gave.
    pub fn counters(&self) -> Result<BTreeMap<String, i64>, String> {
        match self.host {
            HostKind::Envoy => {
                let stats = self.admin_get("/stats?filter=^wasmcustom&usedonly")?;
                Ok(stats
                    .lines()
                    .filter_map(|line| {
                        let (name, value) = line.strip_prefix("wasmcustom.")?.rsplit_once(": ")?;
                        Some((name.to_owned(), value.parse().ok()?))
                    })
                    .collect())
            }
            _ => Ok(self.admin_get("/metrics")?.lines().filter_map(counter_of_prometheus).collect()),
        }
    }

    /// Asks the administration endpoint.
    pub fn admin_get(&self, path: &str) -> Result<String, String> {
        let response = client::send(self.admin, &RequestPlan::new("GET", path))?
            .ok_or_else(|| format!("the admin endpoint closed the connection on `GET {path}`"))?;
        if response.status != 200 {
            return Err(format!("`GET {path}` of the admin endpoint: {}", response.status));
        }
        Ok(String::from_utf8_lossy(&response.body).into_owned())
    }

    fn wait_until_live(&self) -> Result<(), String> {
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            if self.admin_get("/ready").is_ok_and(|state| state.trim() == "LIVE") {
                return Ok(());
            }
            // Envoy tells nobody when it becomes ready; it can only be asked.
            std::thread::sleep(Duration::from_millis(5));
        }
        Err(format!("envoy did not become ready:\n{}", self.log()))
    }

    fn envoy_listeners(&self) -> Result<BTreeMap<String, SocketAddr>, String> {
        let text = self.admin_get("/listeners?format=json")?;
        let status: Value = serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))?;
        let listeners = status["listener_statuses"].as_array().into_iter().flatten();
        let address = |listener: &Value| {
            let port = listener["local_address"]["socket_address"]["port_value"].as_u64()?;
            Some((listener["name"].as_str()?.to_owned(), ([127, 0, 0, 1], u16::try_from(port).ok()?).into()))
        };
        Ok(listeners.filter_map(address).collect())
    }
}

/// At its start Envoy lists every extension that it has, on sixty long lines.
fn lists_extensions(line: &str) -> bool {
    line.contains("[info][main] [source/server/server.cc:4")
}

/// The listener that a line says is there: `listener `public` on http://127.0.0.1:8080`.
fn announced_listener(line: &str) -> Option<(String, SocketAddr)> {
    let (_, rest) = line.split_once("listener `")?;
    let (name, rest) = rest.split_once("` on ")?;
    Some((name.to_owned(), announced(rest, "://")?))
}

/// The address in a line that says `what` listens.
fn announced(line: &str, what: &str) -> Option<SocketAddr> {
    let (_, rest) = line.split_once(what)?;
    rest.split(|c: char| c.is_whitespace() || c == ',' || c == '"')
        .find_map(|word| word.rsplit('/').next()?.parse().ok())
}

/// `name{rule="a",reason="b"} 1` is the counter `name.rule.a.reason.b`.
fn counter_of_prometheus(line: &str) -> Option<(String, i64)> {
    if line.starts_with('#') {
        return None;
    }
    let (series, value) = line.rsplit_once(' ')?;
    let value = value.parse().ok()?;
    let Some((name, labels)) = series.split_once('{') else { return Some((series.to_owned(), value)) };
    let mut full = name.to_owned();
    for label in labels.strip_suffix('}')?.split(',').filter(|label| !label.is_empty()) {
        let (label, text) = label.split_once('=')?;
        full.push_str(&format!(".{label}.{}", text.trim_matches('"')));
    }
    Some((full, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_counters_back_into_the_names_that_filters_gave() {
        let check = |line: &str, expected: Option<(&str, i64)>| {
            let found = counter_of_prometheus(line);
            assert_eq!(found.as_ref().map(|(name, value)| (name.as_str(), *value)), expected);
        };
        check(
            r#"denied_total{rule="default",reason="expired"} 3"#,
            Some(("denied_total.rule.default.reason.expired", 3)),
        );
        check("allowed_total 1", Some(("allowed_total", 1)));
        check("# TYPE allowed_total counter", None);
    }

    #[test]
    fn finds_the_announced_listener() {
        let check = |line: &str, expected: Option<(&str, &str)>| {
            let found = announced_listener(line).map(|(name, address)| (name, address.to_string()));
            assert_eq!(found.as_ref().map(|(name, address)| (name.as_str(), address.as_str())), expected);
        };
        check("info: listener `public` on http://127.0.0.1:8080", Some(("public", "127.0.0.1:8080")));
        check(r#"{"message":"listener `db` on tcp://127.0.0.1:5432"}"#, Some(("db", "127.0.0.1:5432")));
        check("info: admin on http://127.0.0.1:8080", None);
    }
}
