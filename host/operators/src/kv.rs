//! A small store for each operator: encrypted on disk, bounded, and out of reach of every other operator.
//!
//! One file an entry. File names are keyed digests, so that names say nothing either; contents are sealed with
//! ChaCha20-Poly1305 under a key of the operator's own, bound to operator and file name, so that files cannot be
//! exchanged. What this does not hide: how many entries there are and how long they are.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use ring::{hkdf, hmac};

/// Longest key.
pub(crate) const KEY_BYTES_MAX: usize = 512;

const MASTER_BYTES: usize = 32;
const MASTER_FILE: &str = "master.key";

/// Why an entry was not read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KvError {
    #[error("a key must have 1 to {KEY_BYTES_MAX} bytes")]
    Key,
    #[error("the store is full: its quota is {0} bytes")]
    Quota(u64),
    #[error("the store cannot be used: {0}")]
    Io(#[from] io::Error),
    #[error("an entry was changed from outside")]
    Tampered,
    #[error("the stores in `{}` are in use by another host", .0.display())]
    InUse(PathBuf),
}

/// The store of one operator.
pub(crate) struct Store {
    folder: PathBuf,
    operator: String,
    sealing: LessSafeKey,
    naming: hmac::Key,
    quota: u64,
    /// Length of key and value by key.
    index: Mutex<BTreeMap<String, u64>>,
}

impl fmt::Debug for Store {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Store").field("operator", &self.operator).finish_non_exhaustive()
    }
}

struct Length(usize);

impl hkdf::KeyType for Length {
    fn len(&self) -> usize {
        self.0
    }
}

fn derive(master: &hkdf::Prk, purpose: &str, operator: &str) -> io::Result<[u8; 32]> {
    let mut key = [0; 32];
    master
        .expand(&[b"portcullis kv 1 ", purpose.as_bytes(), b" ", operator.as_bytes()], Length(32))
        .and_then(|okm| okm.fill(&mut key))
        .map_err(|_| io::Error::other("key derivation failed"))?;
    Ok(key)
}

/// Reads the master key of a folder of stores; the first use makes one.
fn master(folder: &Path) -> io::Result<hkdf::Prk> {
    fs::DirBuilder::new().mode(0o700).recursive(true).create(folder)?;
    let path = folder.join(MASTER_FILE);
    let key = match fs::read(&path) {
        Ok(key) if key.len() == MASTER_BYTES => key,
        Ok(_) => return Err(io::Error::other(format!("`{}` is not a key of {MASTER_BYTES} bytes", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let mut key = vec![0; MASTER_BYTES];
            SystemRandom::new().fill(&mut key).map_err(|_| io::Error::other("no randomness"))?;
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            file.write_all(&key)?;
            file.sync_all()?;
            key
        }
        Err(error) => return Err(error),
    };
    Ok(hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, &key))
}

/// Takes a folder of stores for one host. Others are kept off as long as the file is open, however this host ends.
pub(crate) fn claim(folder: &Path) -> Result<fs::File, KvError> {
    fs::DirBuilder::new().mode(0o700).recursive(true).create(folder)?;
    let lock = fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(folder.join("lock"))?;
    match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(lock),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(KvError::InUse(folder.to_owned())),
        Err(error) => Err(KvError::Io(error.into())),
    }
}

impl Store {
    /// Opens (or makes) the store of an operator. Entries that cannot be opened are an error: silence would look like
    /// an empty store.
    pub(crate) fn open(folder: &Path, operator: &str, quota: u64) -> Result<Self, KvError> {
        let master = master(folder)?;
        let sealing = derive(&master, "seal", operator)?;
        let sealing = UnboundKey::new(&CHACHA20_POLY1305, &sealing).map_err(|_| io::Error::other("bad key"))?;
        let naming = hmac::Key::new(hmac::HMAC_SHA256, &derive(&master, "name", operator)?);
        let own = folder.join(operator);
        fs::DirBuilder::new().mode(0o700).recursive(true).create(&own)?;
        let store = Self {
            folder: own,
            operator: operator.to_owned(),
            sealing: LessSafeKey::new(sealing),
            naming,
            quota,
            index: Mutex::default(),
        };
        let mut index = BTreeMap::new();
        for entry in fs::read_dir(&store.folder)? {
            let name = entry?.file_name();
            let Some(name) = name.to_str().filter(|name| name.len() == 64) else { continue };
            let (key, value) = store.read_file(name)?.ok_or(KvError::Tampered)?;
            index.insert(key.clone(), size(&key, value.len()));
        }
        *store.lock() = index;
        Ok(store)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, u64>> {
        self.index.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn file_name(&self, key: &str) -> String {
        hmac::sign(&self.naming, key.as_bytes()).as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn aad(&self, name: &str) -> Vec<u8> {
        format!("{}/{name}", self.operator).into_bytes()
    }

    fn read_file(&self, name: &str) -> Result<Option<(String, Vec<u8>)>, KvError> {
        let mut sealed = match fs::read(self.folder.join(name)) {
            Ok(sealed) => sealed,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let nonce = sealed.get(..NONCE_LEN).and_then(|nonce| Nonce::try_assume_unique_for_key(nonce).ok());
        let nonce = nonce.ok_or(KvError::Tampered)?;
        let opened = self
            .sealing
            .open_within(nonce, Aad::from(self.aad(name)), &mut sealed, NONCE_LEN..)
            .map_err(|_| KvError::Tampered)?;
        let length = opened.get(..2).map(|length| length.iter().fold(0, |sum, byte| (sum << 8) | usize::from(*byte)));
        let key = length.and_then(|length| opened.get(2..2 + length)).and_then(|key| std::str::from_utf8(key).ok());
        let key = key.ok_or(KvError::Tampered)?.to_owned();
        let value = opened.get(2 + key.len()..).unwrap_or_default().to_vec();
        Ok(Some((key, value)))
    }

    /// The value of a key.
    pub(crate) fn get(&self, key: &str) -> Result<Option<Vec<u8>>, KvError> {
        check_key(key)?;
        match self.read_file(&self.file_name(key))? {
            Some((found, value)) if found == key => Ok(Some(value)),
            Some(_) => Err(KvError::Tampered),
            None => Ok(None),
        }
    }

    /// Sets a value.
    pub(crate) fn put(&self, key: &str, value: &[u8]) -> Result<(), KvError> {
        check_key(key)?;
        let mut index = self.lock();
        let size = size(key, value.len());
        let others: u64 = index.iter().filter(|(other, _)| *other != key).map(|(_, size)| size).sum();
        if others.saturating_add(size) > self.quota {
            return Err(KvError::Quota(self.quota));
        }
        let name = self.file_name(key);
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).map_err(|_| io::Error::other("no randomness"))?;
        let length = u16::try_from(key.len()).map_err(|_| KvError::Key)?;
        let mut text = [&length.to_be_bytes()[..], key.as_bytes(), value].concat();
        self.sealing
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(self.aad(&name)), &mut text)
            .map_err(|_| io::Error::other("sealing failed"))?;
        // Written beside and renamed: a reader sees the old or the new value, also after a crash.
        let beside = self.folder.join(format!("{name}.new"));
        let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&beside)?;
        file.write_all(&nonce)?;
        file.write_all(&text)?;
        fs::rename(&beside, self.folder.join(&name))?;
        index.insert(key.to_owned(), size);
        Ok(())
    }

    /// Removes a key; one that is not there is no error.
    pub(crate) fn delete(&self, key: &str) -> Result<(), KvError> {
        check_key(key)?;
        let mut index = self.lock();
        match fs::remove_file(self.folder.join(self.file_name(key))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        index.remove(key);
        Ok(())
    }

    /// Keys with a prefix, in order, at most so many.
    pub(crate) fn list(&self, prefix: &str, most: usize) -> Vec<String> {
        let index = self.lock();
        index
            .range(prefix.to_owned()..)
            .map(|(key, _)| key)
            .take_while(|key| key.starts_with(prefix))
            .take(most)
            .cloned()
            .collect()
    }
}

fn check_key(key: &str) -> Result<(), KvError> {
    if (1..=KEY_BYTES_MAX).contains(&key.len()) { Ok(()) } else { Err(KvError::Key) }
}

/// Each entry costs a file, so an empty one is not free.
fn size(key: &str, value_bytes: usize) -> u64 {
    u64::try_from(key.len().saturating_add(value_bytes).saturating_add(128)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_values_over_a_restart_and_shows_none_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), "a", 10_000).unwrap();
        store.put("user/alice", b"swordfish").unwrap();
        store.put("user/alice", b"plaintext-canary").unwrap();
        store.put("user/bob", b"").unwrap();
        drop(store);
        let store = Store::open(folder.path(), "a", 10_000).unwrap();
        assert_eq!(store.get("user/alice").unwrap().unwrap(), b"plaintext-canary");
        assert_eq!(store.list("user/", 10), ["user/alice", "user/bob"]);
        assert_eq!(store.list("user/", 1).len(), 1);
        for entry in fs::read_dir(folder.path().join("a")).unwrap() {
            let entry = entry.unwrap();
            let contents = fs::read(entry.path()).unwrap();
            assert!(!contains(&contents, b"plaintext-canary") && !contains(&contents, b"alice"));
            assert!(!entry.file_name().to_string_lossy().contains("alice"));
        }
        store.delete("user/alice").unwrap();
        assert_eq!(store.get("user/alice").unwrap(), None);
    }

    fn contains(text: &[u8], part: &[u8]) -> bool {
        text.windows(part.len()).any(|window| window == part)
    }

    #[test]
    fn the_quota_counts_keys_values_and_entries() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), "a", 300).unwrap();
        store.put("k", &[0; 171]).unwrap();
        assert!(matches!(store.put("l", &[0; 1]), Err(KvError::Quota(300))));
        assert!(matches!(store.put("k", &[0; 172]), Err(KvError::Quota(300))));
        store.put("k", &[0; 10]).unwrap();
        store.put("l", &[0; 10]).unwrap();
    }

    #[test]
    fn a_changed_or_exchanged_file_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) =
            (Store::open(folder.path(), "a", 10_000).unwrap(), Store::open(folder.path(), "b", 10_000).unwrap());
        a.put("k", b"one").unwrap();
        a.put("l", b"two").unwrap();
        b.put("k", b"other").unwrap();
        let file = |store: &Store, key| store.folder.join(store.file_name(key));
        fs::copy(file(&b, "k"), file(&a, "k")).unwrap();
        assert!(matches!(a.get("k"), Err(KvError::Tampered)));
        fs::copy(file(&a, "l"), file(&a, "k")).unwrap();
        assert!(matches!(a.get("k"), Err(KvError::Tampered)));
        fs::write(file(&a, "l"), b"short").unwrap();
        assert!(matches!(a.get("l"), Err(KvError::Tampered)));
        assert!(matches!(Store::open(folder.path(), "a", 10_000), Err(KvError::Tampered)));
    }

    #[test]
    fn a_folder_of_stores_belongs_to_one_host() {
        let folder = tempfile::tempdir().unwrap();
        let first = claim(folder.path()).unwrap();
        assert!(matches!(claim(folder.path()), Err(KvError::InUse(_))));
        drop(first);
        claim(folder.path()).unwrap();
    }

    #[test]
    fn keys_have_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), "a", 10_000).unwrap();
        assert!(matches!(store.put("", b""), Err(KvError::Key)));
        assert!(matches!(store.put(&"k".repeat(KEY_BYTES_MAX + 1), b""), Err(KvError::Key)));
        store.put(&"k".repeat(KEY_BYTES_MAX), b"x").unwrap();
    }
}
