//! `portcullis trace`: a request's way through a module, hostcall by hostcall.

use std::path::PathBuf;

use clap::ValueEnum;
use portcullis_harness::{
    Guest, Host, Observed, Ran, RequestPlan, ResponsePlan, Scenario, Secrets, Trace, find_module, simulate,
};
use serde_json::{Value, json};

use crate::failure::Failure;
use crate::print;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// A scenario (`.yaml`), or a module (`.wasm`).
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The module, instead of the one that the scenario belongs to.
    #[arg(long, value_name = "WASM")]
    filter: Option<PathBuf>,
    /// The request to send through a module.
    #[arg(long, value_name = "'METHOD TARGET'", default_value = "GET /", value_parser = request_line)]
    request: (String, String),
    /// A field of the request.
    #[arg(short = 'H', long, value_name = "'NAME: VALUE'", value_parser = field)]
    header: Vec<(String, String)>,
    /// A piece of the request's body; several come one after the other.
    #[arg(short, long, value_name = "TEXT")]
    body: Vec<String>,
    /// The plugin configuration.
    #[arg(short, long, value_name = "FILE")]
    configuration: Option<PathBuf>,
    /// An upstream that the module may call; it answers 200.
    #[arg(long, value_name = "NAME")]
    upstream: Vec<String>,
    /// How to tell it.
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "human")]
    format: Format,
    /// Leave out how the module starts.
    #[arg(long)]
    requests_only: bool,
    /// Show credentials.
    #[arg(long)]
    show_secrets: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Lines, for people.
    Human,
    /// JSON, for programs.
    Json,
}

fn request_line(text: &str) -> Result<(String, String), String> {
    match text.split_whitespace().collect::<Vec<_>>().as_slice() {
        [method, target] => Ok(((*method).to_owned(), (*target).to_owned())),
        [target] if target.starts_with('/') => Ok(("GET".to_owned(), (*target).to_owned())),
        _ => Err("write a method and a target, e.g. 'GET /orders'".to_owned()),
    }
}

fn field(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once(':').ok_or("write a name and a value, e.g. 'accept: text/html'")?;
    if name.trim().is_empty() {
        return Err("the name is empty; `:path` and its like are set by `--request`".to_owned());
    }
    Ok((name.trim().to_owned(), value.trim().to_owned()))
}

/// What passed, and what came of it: how the module starts, then each request.
struct Traced {
    start: Trace,
    requests: Vec<(String, Vec<Observed>)>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let secrets = if arguments.show_secrets { Secrets::Shown } else { Secrets::Masked };
    let is_module = arguments.file.extension().is_some_and(|ending| ending == "wasm");
    let traced = if is_module { module(arguments, secrets)? } else { scenario(arguments, secrets)? };
    match arguments.format {
        Format::Human => print(&human(arguments, &traced)),
        Format::Json => print(&format!("{:#}\n", json(&traced))),
    }
}

fn scenario(arguments: &Arguments, secrets: Secrets) -> Result<Traced, Failure> {
    let scenario =
        Scenario::load_unfinished(&arguments.file).map_err(|error| Failure::Configuration(error.to_string()))?;
    let module = arguments.filter.clone().map_or_else(|| find_module(&scenario), Ok).map_err(Failure::Configuration)?;
    let guest = Guest::load(module).map_err(|error| Failure::Configuration(error.to_string()))?;
    match simulate(&scenario, &guest, secrets).map_err(Failure::Configuration)? {
        Ran::Refused(message) => Err(Failure::Configuration(message)),
        Ran::Steps { steps, start, .. } => {
            let requests = steps.into_iter().enumerate().map(|(index, (step, outcomes))| {
                let title = step.name.unwrap_or_else(|| match &step.request {
                    Some(request) => format!("{} {}", request.method, request.path),
                    None => format!("step {}", index + 1),
                });
                (title, outcomes)
            });
            Ok(Traced { start, requests: requests.collect() })
        }
    }
}

fn module(arguments: &Arguments, secrets: Secrets) -> Result<Traced, Failure> {
    let configuration = match &arguments.configuration {
        None => Vec::new(),
        Some(file) => std::fs::read(file)
            .map_err(|error| Failure::Configuration(format!("{}: cannot be read: {error}", file.display())))?,
    };
    let mut host = Host::new();
    if secrets == Secrets::Shown {
        host = host.showing_secrets();
    }
    for upstream in &arguments.upstream {
        host.upstream(upstream).always(ResponsePlan::default());
    }
    let filter = host
        .load(&arguments.file)
        .configuration(configuration)
        .start()
        .map_err(|error| Failure::Configuration(format!("{error}\n\n{}", host.trace())))?;
    let start = host.trace();
    let (method, target) = &arguments.request;
    let mut request = RequestPlan::new(method, target);
    for (name, value) in &arguments.header {
        if name.eq_ignore_ascii_case("host") {
            request.authority.clone_from(value);
        } else {
            request.fields.push(name, value.as_bytes());
        }
    }
    request.body =
        arguments.body.iter().filter(|piece| !piece.is_empty()).map(|piece| piece.as_bytes().to_vec()).collect();
    let seen = filter.exchange(&request, &ResponsePlan::default());
    Ok(Traced { start, requests: vec![(format!("{method} {target}"), vec![seen])] })
}

fn human(arguments: &Arguments, traced: &Traced) -> String {
    let mut text = String::new();
    if !arguments.requests_only {
        text.push_str(&format!("start\n\n{}\n", indented(&traced.start.to_string())));
    }
    for (title, outcomes) in &traced.requests {
        for observed in outcomes {
            let mut outcome = observed.clone();
            outcome.trace = Trace::default();
            let trace = indented(&observed.trace.to_string());
            text.push_str(&format!("{title}\n\n{trace}\n{}\n", indented(&outcome.to_string())));
        }
    }
    text
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}

fn json(traced: &Traced) -> Value {
    let requests = traced.requests.iter().flat_map(|(title, outcomes)| {
        outcomes.iter().map(move |observed| {
            json!({
                "request": title, "status": observed.status(), "local": observed.local, "trace": observed.trace.to_json(),
            })
        })
    });
    json!({ "start": traced.start.to_json(), "requests": requests.collect::<Vec<_>>() })
}
