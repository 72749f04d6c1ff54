//! The `portcullis.yaml` that a test's hosts run: one listener, one filter, one upstream, and whatever the filter may call.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// What a policy is made of.
pub struct PolicyParts<'a> {
    /// The filter's name.
    pub filter: &'a str,
    /// Its module.
    pub wasm: &'a Path,
    /// Its configuration, byte for byte.
    pub configuration: &'a [u8],
    /// Where requests go.
    pub origin: SocketAddr,
    /// Upstreams that the filter may call.
    pub callouts: &'a [(String, SocketAddr)],
    /// Those of them that speak HTTP/2, as gRPC does.
    pub http2: &'a [String],
    /// `failure_policy`, if not the default.
    pub failure_policy: Option<&'a str>,
}

impl PolicyParts<'_> {
    /// Writes the policy and the filter's configuration into `folder`; returns the policy's path.
    pub fn write(&self, folder: &Path) -> Result<PathBuf, String> {
        self.write_with(folder, &[])
    }

    /// The same, with further lines of the filter's entry, such as `limits: { callouts: 1 }`.
    pub fn write_with(&self, folder: &Path, of_filter: &[&str]) -> Result<PathBuf, String> {
        let fail = |error: std::io::Error| format!("{}: {error}", folder.display());
        let mut yaml = String::from(
            "version: 1\nworkers: 1\nadmin: { address: \"127.0.0.1:0\" }\nlisteners:\n  \
             - { name: public, address: \"127.0.0.1:0\" }\nfilters:\n",
        );
        let _ = writeln!(yaml, "  - name: {}", quoted(self.filter));
        let _ = writeln!(yaml, "    wasm: {}", quoted(&self.wasm.display().to_string()));
        if !self.configuration.is_empty() {
            // The ending promises JSON, and some scenarios break that promise on purpose.
            let json = serde_json::from_slice::<Value>(self.configuration).is_ok();
            let file = if json { "configuration.json" } else { "configuration.txt" };
            std::fs::write(folder.join(file), self.configuration).map_err(fail)?;
            let _ = writeln!(yaml, "    configuration_file: {file}");
        }
        if let Some(failure_policy) = self.failure_policy {
            let _ = writeln!(yaml, "    failure_policy: {failure_policy}");
        }
        for line in of_filter {
            let _ = writeln!(yaml, "    {line}");
        }
        if !self.callouts.is_empty() {
            let names: Vec<String> = self.callouts.iter().map(|(name, _)| quoted(name)).collect();
            let _ = writeln!(yaml, "    allowed_upstreams: [{}]", names.join(", "));
        }
        let _ = writeln!(yaml, "upstreams:\n  origin: {{ endpoints: [\"{}\"] }}", self.origin);
        for (name, address) in self.callouts {
            let http2 = self.http2.contains(name);
            let _ = writeln!(yaml, "  {}: {{ endpoints: [\"{address}\"], http2: {http2} }}", quoted(name));
        }
        yaml.push_str("routes:\n  - { name: all, upstream: origin }\n");
        let file = folder.join("portcullis.yaml");
        std::fs::write(&file, yaml).map_err(fail)?;
        Ok(file)
    }
}

/// A JSON string is a YAML string too.
fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}
