//! `portcullis envoy-config`: the same policy, for Envoy.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use portcullis_config::envoy;

use crate::failure::Failure;
use crate::{PolicyFile, print};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    policy: PolicyFile,
    /// Only the HTTP filters, for an Envoy whose listeners, routes and clusters come from elsewhere.
    #[arg(long)]
    http_filters: bool,
    /// Write to this file instead of standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Another address for a listener, e.g. `public=127.0.0.1:8081`; for an Envoy beside a host that has the policy's.
    #[arg(long, value_name = "NAME=ADDRESS", value_parser = named_address, conflicts_with = "http_filters")]
    listen: Vec<(String, SocketAddr)>,
    /// The folder of operators' sockets, as given to `portcullis operators run --sockets`.
    #[arg(long, value_name = "FOLDER", conflicts_with = "http_filters")]
    operator_sockets: Option<PathBuf>,
    /// Another address for the admin endpoints.
    #[arg(long, value_name = "ADDRESS", conflicts_with = "http_filters")]
    admin: Option<SocketAddr>,
}

fn named_address(text: &str) -> Result<(String, SocketAddr), String> {
    let (name, address) = text.split_once('=').ok_or("write NAME=ADDRESS, e.g. public=127.0.0.1:8081")?;
    let address = address.parse().map_err(|_| format!("`{address}` is no IP address with a port"))?;
    Ok((name.to_owned(), address))
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let policy = arguments.policy.load()?;
    let rendering = if arguments.http_filters {
        envoy::render_http_filters(&policy)
    } else {
        for (name, _) in &arguments.listen {
            if !policy.listeners.iter().any(|listener| listener.name == *name) {
                let names: Vec<&str> = policy.listeners.iter().map(|listener| listener.name.as_str()).collect();
                return Err(Failure::Configuration(format!(
                    "--listen: there is no listener `{name}`\n  hint: the policy has {}",
                    names.join(", ")
                )));
            }
        }
        let default = envoy::Options::default();
        let options = envoy::Options {
            listen: arguments.listen.iter().cloned().collect(),
            admin: arguments.admin,
            operator_sockets: arguments.operator_sockets.clone().unwrap_or(default.operator_sockets),
            ..default
        };
        envoy::render_bootstrap(&policy, &options)
    };
    write(arguments.output.as_deref(), &rendering.yaml)
}

/// Writes a rendering to a file, or to standard output.
pub(crate) fn write(output: Option<&Path>, yaml: &str) -> Result<(), Failure> {
    let Some(path) = output else { return print(yaml) };
    std::fs::write(path, yaml).map_err(|error| {
        let path = path.display();
        Failure::Running(format!("cannot write `{path}`: {error}\n  hint: its folder must exist and be writable"))
    })
}
