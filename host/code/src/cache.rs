//! [`Cache`]: sealed code by what it was made from, bounded, least recently used first to go.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use portcullis_abi::{CodeKey, Engine, Module, ModuleError, SealedError};
use sha2::{Digest as _, Sha256};

use crate::directory::{Directory, Unusable, hex};

/// What ends the name of an entry.
const SUFFIX: &str = ".code";
/// A file that is still unfinished after this was left by a process that ended.
const UNFINISHED_TIME: Duration = Duration::from_secs(3600);

/// Where code is kept, and how much of it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheSettings {
    /// The folder. It is made if it is not there, and must be ours alone.
    pub directory: PathBuf,
    /// Bytes of all entries. Default 512 MiB: compiled code is three to ten times its module, which has up to 4 MiB.
    pub bytes_max: u64,
    /// Entries. Default 256: a policy has at most 64 filters, and some versions of each may lie here.
    pub entries_max: usize,
    /// How long an unused entry stays. Default 90 days: what no start wanted in a quarter is another version's.
    pub unused_max: Duration,
}

impl CacheSettings {
    /// A cache in this folder, with the default bounds.
    pub fn new(directory: impl Into<PathBuf>) -> CacheSettings {
        CacheSettings {
            directory: directory.into(),
            bytes_max: 512 * 1024 * 1024,
            entries_max: 256,
            unused_max: Duration::from_secs(90 * 86_400),
        }
    }
}

/// Compiled code on disk. Cheap to clone; processes may share a folder.
#[derive(Clone)]
pub struct Cache {
    inner: Arc<Inner>,
}

struct Inner {
    settings: CacheSettings,
    directory: Directory,
    secret: [u8; CodeKey::LEN],
    /// That a write failed is said once.
    failed: AtomicBool,
}

impl Cache {
    /// Opens the folder, and makes it and its key if they are not there.
    ///
    /// # Errors
    /// Where it is not ours alone, or cannot be used.
    pub fn open(settings: CacheSettings) -> Result<Cache, Unusable> {
        let directory = Directory::open(&settings.directory)?;
        let secret = directory.secret().map_err(|problem| Unusable { path: settings.directory.clone(), problem })?;
        Ok(Cache { inner: Arc::new(Inner { settings, directory, secret, failed: AtomicBool::new(false) }) })
    }

    /// The folder.
    pub fn path(&self) -> &std::path::Path {
        &self.inner.settings.directory
    }

    /// The module that `wasm` was compiled to, if it lies here unharmed.
    pub(crate) fn get(&self, engine: &Engine, wasm: &[u8]) -> Result<Option<Module>, ModuleError> {
        let Inner { settings, directory, secret, .. } = &*self.inner;
        let name = entry_name(engine, wasm);
        let problem = match directory.read(&name, settings.bytes_max) {
            Ok(None) => return Ok(None),
            Ok(Some(sealed)) => match Module::from_sealed(engine, wasm, &sealed, &CodeKey::new(secret)) {
                Ok(module) => return Ok(Some(module)),
                Err(SealedError::Module(error)) => return Err(error),
                Err(error) => error.to_string(),
            },
            Err(problem) => problem,
        };
        tracing::warn!(entry = %self.path().join(&name).display(), "compiled code is not used: {problem}");
        directory.remove(&name);
        Ok(None)
    }

    /// Keeps what [`Engine::compile_sealed`] made with `key`. A failure is logged and has no other effect.
    pub(crate) fn put(&self, engine: &Engine, wasm: &[u8], sealed: &[u8], key: &CodeKey) {
        let Inner { settings, directory, secret, failed } = &*self.inner;
        if sealed.len() as u64 > settings.bytes_max || settings.entries_max == 0 {
            tracing::debug!(bytes = sealed.len(), "compiled code is larger than the code cache");
            return;
        }
        let name = entry_name(engine, wasm);
        let kept = engine
            .seal_again(wasm, sealed, key, &CodeKey::new(secret))
            .map_err(std::io::Error::other)
            .and_then(|sealed| directory.write(&name, &sealed))
            .and_then(|()| directory.exclusively(|| self.tidy(&name)));
        if let Err(error) = kept
            && !failed.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(folder = %self.path().display(), "compiled code cannot be kept: {error}");
        }
    }

    /// Removes what is too old, then what was unused the longest, until all is within bounds. `newest` stays.
    fn tidy(&self, newest: &str) {
        let Inner { settings, directory, .. } = &*self.inner;
        let Ok(mut files) = directory.list(|name| is_entry(name) || Directory::is_unfinished(name)) else { return };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let before = |age: Duration| i64::try_from(now.saturating_sub(age).as_secs()).unwrap_or(i64::MAX);
        let (unused, abandoned) = (before(settings.unused_max), before(UNFINISHED_TIME));
        files.retain(|file| {
            let oldest = if is_entry(&file.name) { unused } else { abandoned };
            let stays = file.name == newest || file.used.0 >= oldest;
            if !stays {
                directory.remove(&file.name);
            }
            stays && is_entry(&file.name)
        });
        files.sort_by_key(|file| (file.name == newest, file.used));
        let (mut bytes, mut entries) = (files.iter().map(|file| file.bytes).sum::<u64>(), files.len());
        for file in &files {
            if (bytes <= settings.bytes_max && entries <= settings.entries_max) || file.name == newest {
                break;
            }
            directory.remove(&file.name);
            bytes -= file.bytes;
            entries -= 1;
        }
    }
}

impl std::fmt::Debug for Cache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cache").field("settings", &self.inner.settings).finish_non_exhaustive()
    }
}

/// The module's hash, which names it to people, and as much of the compiler's as keeps versions apart. The seal binds
/// both in full.
fn entry_name(engine: &Engine, wasm: &[u8]) -> String {
    format!("{}-{}{SUFFIX}", hex(&Sha256::digest(wasm)), hex(&engine.compiler_id()[..8]))
}

fn is_entry(name: &str) -> bool {
    name.strip_suffix(SUFFIX).and_then(|name| name.split_once('-')).is_some_and(|(wasm, compiler)| {
        let is_hex = |text: &str, len| text.len() == len && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_hex(wasm, 64) && is_hex(compiler, 16)
    })
}
