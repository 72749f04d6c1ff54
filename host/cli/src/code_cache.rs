//! How filters are compiled, and where compiled ones are kept: what the command line, the environment and the policy say, in
//! this order.

use std::path::PathBuf;

use portcullis_code::process::CompilerProcess;
use portcullis_code::{Cache, CacheSettings, LoaderSettings};
use portcullis_config::CodeCache;

/// The hidden subcommand that compiles one module and ends.
pub(crate) const COMPILE: &str = "__compile";

#[derive(Debug, Default, clap::Args)]
pub(crate) struct CacheArguments {
    /// Keep compiled filters in this folder, which must be this user's alone. Goes before the variable
    /// PORTCULLIS_CACHE_DIR, and before what the policy says.
    #[arg(long, value_name = "FOLDER", conflicts_with = "no_cache")]
    cache_dir: Option<PathBuf>,
    /// Compile every filter anew, and keep nothing.
    #[arg(long)]
    no_cache: bool,
}

impl CacheArguments {
    /// How to load filters. Where there is no cache the log says why.
    pub(crate) fn loading(&self, policy: &CodeCache) -> LoaderSettings {
        LoaderSettings { cache: self.open(policy), process: Some(CompilerProcess::this_program(COMPILE)) }
    }

    fn open(&self, policy: &CodeCache) -> Option<Cache> {
        if self.no_cache || (!policy.enabled && self.cache_dir.is_none()) {
            return None;
        }
        let from_environment = || std::env::var_os(portcullis_code::VARIABLE).is_some();
        let named = self.cache_dir.clone().or_else(|| policy.directory.clone().filter(|_| !from_environment()));
        let Some(directory) = named.or_else(portcullis_code::default_directory) else {
            tracing::info!(
                "no code cache: the environment names no folder for one, so every start compiles all filters"
            );
            return None;
        };
        let mut settings = CacheSettings::new(directory);
        settings.bytes_max = policy.bytes_max;
        settings.entries_max = policy.entries_max;
        settings.unused_max = policy.unused_max;
        match Cache::open(settings) {
            Ok(cache) => {
                tracing::debug!("code cache: `{}`", cache.path().display());
                Some(cache)
            }
            Err(unusable) => {
                tracing::warn!("{unusable}");
                None
            }
        }
    }
}
