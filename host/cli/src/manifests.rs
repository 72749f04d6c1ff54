//! `portcullis manifests`: a policy's filters as Kubernetes resources.

use std::path::PathBuf;

use portcullis_config::Policy;
use portcullis_config::envoy::Rendering;
use portcullis_config::envoy::kubernetes::{
    Cluster, ModuleSource, Target, Unrenderables, is_resource_name, render_envoy_gateway, render_istio,
};

use crate::failure::Failure;
use crate::{PolicyFile, envoy_config};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// A `WasmPlugin` for each filter, for Istio.
    Istio(Arguments),
    /// An `EnvoyExtensionPolicy` with the HTTP filters, for Envoy Gateway.
    EnvoyGateway(Arguments),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    policy: PolicyFile,
    /// Where a filter's module is, e.g. `jwt=registry.example/filters/jwt-auth@sha256:...`: an image, as `portcullis package`
    /// makes it, or an `https` URL of the module itself.
    #[arg(long, value_name = "FILTER=IMAGE", value_parser = module)]
    image: Vec<(String, ModuleSource)>,
    /// What the filters are attached to, e.g. `Gateway/edge`, `HTTPRoute/orders`; for Istio also labels of pods, e.g.
    /// `istio=ingressgateway`.
    #[arg(long, value_name = "KIND/NAME|LABEL=VALUE")]
    target: Vec<Target>,
    /// The namespace of the resources.
    #[arg(long, value_parser = resource_name)]
    namespace: Option<String>,
    /// The secret with the registry's credentials.
    #[arg(long, value_name = "SECRET", value_parser = resource_name)]
    pull_secret: Option<String>,
    /// Write to this file instead of standard output.
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
}

fn module(text: &str) -> Result<(String, ModuleSource), String> {
    let (filter, source) = text.split_once('=').ok_or("write FILTER=IMAGE")?;
    Ok((filter.to_owned(), source.parse()?))
}

fn resource_name(text: &str) -> Result<String, String> {
    if is_resource_name(text) { Ok(text.to_owned()) } else { Err("Kubernetes takes no such name".to_owned()) }
}

pub(crate) fn run(command: &Command) -> Result<(), Failure> {
    match command {
        Command::Istio(arguments) => render(arguments, render_istio),
        Command::EnvoyGateway(arguments) => render(arguments, render_envoy_gateway),
    }
}

fn render(
    arguments: &Arguments,
    render: impl Fn(&Policy, &Cluster) -> Result<Rendering, Unrenderables>,
) -> Result<(), Failure> {
    let policy = arguments.policy.load()?;
    let cluster = Cluster {
        modules: arguments.image.iter().cloned().collect(),
        namespace: arguments.namespace.clone(),
        targets: arguments.target.clone(),
        pull_secret: arguments.pull_secret.clone(),
    };
    let rendering = render(&policy, &cluster).map_err(|problems| Failure::Configuration(problems.to_string()))?;
    envoy_config::write(arguments.output.as_deref(), &rendering.yaml)
}
