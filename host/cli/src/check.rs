//! `portcullis check`: everything that `serve` would check before it listens, and nothing else.

use std::sync::Arc;

use portcullis_config::Policy;
use portcullis_proxy::Options;

use crate::failure::Failure;
use crate::operators::{Host, Purpose};
use crate::{PolicyFile, code_cache, print};

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) policy: PolicyFile,
    #[command(flatten)]
    code_cache: code_cache::CacheArguments,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let policy = arguments.policy.load()?;
    let summary = summary(&policy);
    let loading = arguments.code_cache.loading(&policy.code_cache);
    let operators = Arc::new(Host::new(Purpose::Check));
    let options = Options { loading, operators: Some(Arc::<Host>::clone(&operators)), ..Options::default() };
    let checked = portcullis_proxy::check(policy, options);
    operators.stop();
    checked?;
    print(&summary)
}

fn summary(policy: &Policy) -> String {
    let count = |number: usize, one: &str| match number {
        1 => format!("1 {one}"),
        number => format!("{number} {one}s"),
    };
    format!(
        "{}: ok ({}, {}, {}, {}{})\n",
        policy.name,
        count(policy.listeners.len(), "listener"),
        count(policy.filters.len(), "filter"),
        count(policy.upstreams.len(), "upstream"),
        count(policy.routes.len(), "route"),
        if policy.operators.is_empty() {
            String::new()
        } else {
            format!(", {}", count(policy.operators.len(), "operator"))
        },
    )
}
