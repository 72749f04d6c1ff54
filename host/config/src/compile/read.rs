//! Reading the files that a policy names, and saying what is wrong with them.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use super::Compiler;
use crate::mistake::listed;
use crate::units::Size;

pub(super) const PEM_BYTES_MAX: u64 = 1024 * 1024;

impl Compiler<'_> {
    /// Reads a file that the policy names.
    pub(super) fn read(&mut self, path: &str, written: &str, bytes_max: u64) -> Option<(PathBuf, Vec<u8>)> {
        if written.is_empty() {
            self.wrong(path, "the file name is empty", "name a file, relative to the policy's folder");
            return None;
        }
        let resolved = self.files.resolve(written);
        match self.files.read(&resolved, bytes_max) {
            Ok(bytes) => return Some((resolved, bytes)),
            Err(error) => match error.kind() {
                io::ErrorKind::NotFound => self.wrong(
                    path,
                    format!("there is no file `{written}`"),
                    format!("relative names start at the policy's folder; looked for `{}`", resolved.display()),
                ),
                io::ErrorKind::PermissionDenied => self.wrong(
                    path,
                    format!("`{written}` may not be read by the user that runs this"),
                    format!("check the owner and mode of `{}` and its folders", resolved.display()),
                ),
                io::ErrorKind::FileTooLarge => self.wrong(
                    path,
                    format!("`{written}` is larger than {}", Size(bytes_max)),
                    if path.ends_with(".wasm") {
                        "raise `limits.module_bytes`, or build the module without debug information"
                    } else {
                        "name a smaller file"
                    },
                ),
                _ => self.wrong(
                    path,
                    format!("cannot read `{written}`: {error}"),
                    format!("check `{}`", resolved.display()),
                ),
            },
        }
        None
    }

    /// Reads a PEM file that must hold a block whose label ends with `label`.
    pub(super) fn pem(&mut self, path: &str, written: &str, label: &str) -> Option<(PathBuf, Arc<[u8]>)> {
        let (resolved, bytes) = self.read(path, written, PEM_BYTES_MAX)?;
        let labels = pem_labels(&bytes);
        if !labels.iter().any(|found| found.ends_with(label)) {
            let holds = if labels.is_empty() {
                "it is not PEM".to_owned()
            } else {
                format!("it holds {}", listed(labels.iter().map(String::as_str)))
            };
            self.wrong(
                path,
                format!("`{written}` holds no `-----BEGIN {label}-----` block"),
                format!("{holds}; name the right file, or convert it with `openssl`"),
            );
            return None;
        }
        if labels.iter().any(|found| found.contains("ENCRYPTED")) {
            self.wrong(
                path,
                format!("the key in `{written}` is encrypted"),
                "store it without a passphrase, mode 0600",
            );
            return None;
        }
        Some((resolved, bytes.into()))
    }
}

/// Labels of the PEM blocks in a file, e.g. `CERTIFICATE`.
fn pem_labels(bytes: &[u8]) -> Vec<String> {
    bytes
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.trim_ascii().strip_prefix(b"-----BEGIN ")?.strip_suffix(b"-----"))
        .map(|label| String::from_utf8_lossy(label).into_owned())
        .collect()
}
