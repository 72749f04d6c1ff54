//! The one policy that both hosts run: a filter for all plain rows, and one per plugin of those rows that have their own.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::row::{Module, Plugin, Row};
use crate::places;

/// The filter that rows without plugins share.
pub const SHARED: &str = "calls";
/// The same for those that are strict.
pub const STRICT: &str = "strict";

/// Where the upstreams are.
pub struct Upstreams {
    /// Where requests go.
    pub origin: SocketAddr,
    /// What guests call.
    pub callee: SocketAddr,
    /// Nobody listens here.
    pub closed: SocketAddr,
    /// Where TCP connections go.
    pub tcp: SocketAddr,
}

/// Writes the policy, and what it names, into `folder`; returns its path.
pub fn write<'a>(
    folder: &Path,
    rows: impl IntoIterator<Item = &'a Row>,
    upstreams: &Upstreams,
) -> Result<PathBuf, String> {
    let strict = Plugin::new(STRICT).settings(json!({ "allow_on_headers_stop_iteration": false }));
    let mut filters =
        vec![filter(SHARED, SHARED, &Plugin::new(SHARED), folder)?, filter(STRICT, STRICT, &strict, folder)?];
    let mut routes: Vec<Value> = [SHARED, STRICT]
        .iter()
        .map(|name| {
            let path = json!({ "path": { "prefix": format!("/{name}/") } });
            json!({ "name": name, "match": path, "filters": [name], "upstream": "origin" })
        })
        .collect();
    let mut listeners = vec![json!({
        "name": "public",
        "address": "127.0.0.1:0",
        "limits": { "header_bytes": "512KiB", "header_count": 500 },
    })];
    for row in rows.into_iter().filter(|row| !row.plugins.is_empty()) {
        let slug = row.slug();
        let mut names = Vec::new();
        for plugin in &row.plugins {
            let name = format!("{slug}-{}", plugin.name);
            filters.push(if row.is_tcp() {
                filter(&name, &slug, &tcp_plugin(row, plugin), folder)?
            } else {
                filter(&name, &slug, plugin, folder)?
            });
            names.push(name);
        }
        if row.is_tcp() {
            let tcp = json!({ "upstream": row.origin, "filters": names });
            listeners.push(json!({ "name": slug, "address": "127.0.0.1:0", "tcp": tcp }));
            continue;
        }
        let path = json!({ "path": { "prefix": format!("/{slug}/") } });
        routes.push(json!({ "name": slug, "match": path, "filters": names, "upstream": "origin" }));
    }
    let policy = json!({
        "version": 1,
        "workers": 1,
        "admin": { "address": "127.0.0.1:0" },
        "logging": { "format": "json", "access_log": false },
        "listeners": listeners,
        "filters": filters,
        "upstreams": {
            "origin": { "endpoints": [upstreams.origin.to_string()] },
            "callee": { "endpoints": [upstreams.callee.to_string()] },
            "closed": { "endpoints": [upstreams.closed.to_string()] },
            "tcp": { "endpoints": [upstreams.tcp.to_string()] },
            "tcp-closed": { "endpoints": [upstreams.closed.to_string()] },
        },
        "routes": routes,
    });
    let file = folder.join("portcullis.yaml");
    put(&file, format!("{policy:#}").as_bytes())?;
    Ok(file)
}

/// A TCP connection has no field for a script, which stands in its plugins' configuration instead.
fn tcp_plugin(row: &Row, plugin: &Plugin) -> Plugin {
    let mut settings = plugin.settings.clone();
    if let Some(settings) = settings.as_object_mut() {
        settings.insert("protocol".to_owned(), "tcp".into());
    }
    let configuration =
        format!("row: {}\n{}\n{}", row.id, plugin.configuration, row.script.replace("ROW", &row.slug()));
    plugin.clone().configuration(&configuration).settings(settings)
}

fn filter(name: &str, vm_id: &str, plugin: &Plugin, folder: &Path) -> Result<Value, String> {
    let wasm = match &plugin.module {
        Module::Guest(guest) => places::filter(guest)?,
        Module::Prebuilt(language) => places::workspace().join(format!("tests/guests/{language}/gate.wasm")),
        Module::Text(text) => {
            let file = folder.join(format!("{name}.wasm"));
            put(&file, &wat::parse_str(text).map_err(|error| format!("the module of `{name}`: {error}"))?)?;
            file
        }
    };
    let mut filter = Map::new();
    filter.insert("name".to_owned(), name.into());
    filter.insert("wasm".to_owned(), wasm.display().to_string().into());
    filter.insert("vm_id".to_owned(), vm_id.into());
    filter.insert("allowed_upstreams".to_owned(), json!(["callee", "closed", "origin"]));
    if !plugin.configuration.is_empty() {
        filter.insert("configuration".to_owned(), plugin.configuration.as_str().into());
    }
    let mut limits = Map::new();
    // The guest tells what it sees in its log; that is not what is limited here.
    limits.insert("log_lines_per_second".to_owned(), 1_000_000.into());
    for (key, value) in plugin.settings.as_object().into_iter().flatten() {
        match value.as_object() {
            Some(settings) if key == "limits" => limits.extend(settings.clone()),
            _ => drop(filter.insert(key.clone(), value.clone())),
        }
    }
    filter.insert("limits".to_owned(), limits.into());
    Ok(filter.into())
}

fn put(file: &Path, bytes: &[u8]) -> Result<(), String> {
    std::fs::write(file, bytes).map_err(|error| format!("{}: {error}", file.display()))
}
