//! Where compiled code is kept when nobody says.

use std::ffi::OsString;
use std::path::PathBuf;

/// The variable that names the folder, before any default. Empty: no cache.
pub const VARIABLE: &str = "PORTCULLIS_CACHE_DIR";

/// The folder that the environment suggests: [`VARIABLE`], then what systemd made for the service (`CacheDirectory=`),
/// then the user's own (`XDG_CACHE_HOME`, or `.cache` below `HOME`). `None`: there is none, or none is wanted.
pub fn default_directory() -> Option<PathBuf> {
    from_environment(|name| std::env::var_os(name))
}

fn from_environment(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    if let Some(named) = variable(VARIABLE) {
        return (!named.is_empty()).then(|| named.into());
    }
    // The XDG specification has relative paths ignored; for the others they would be a mistake too.
    let absolute = |name: &str| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    // Several folders are separated by colons; any of them would do.
    let systemd = variable("CACHE_DIRECTORY").and_then(|list| Some(list.to_str()?.split(':').next()?.to_owned()));
    let systemd = systemd.map(PathBuf::from).filter(|path| path.is_absolute());
    systemd
        .or_else(|| absolute("XDG_CACHE_HOME").map(|home| home.join("portcullis")))
        .or_else(|| absolute("HOME").map(|home| home.join(".cache/portcullis")))
        .map(|folder| folder.join("code"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_specific_word_of_the_environment_counts() {
        let check = |set: &[(&str, &str)], expected: Option<&str>| {
            let found = from_environment(|name| {
                set.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
            });
            assert_eq!(found, expected.map(PathBuf::from), "{set:?}");
        };
        check(&[], None);
        check(&[("HOME", "/home/a")], Some("/home/a/.cache/portcullis/code"));
        check(&[("HOME", "")], None);
        check(&[("HOME", "/home/a"), ("XDG_CACHE_HOME", "/x")], Some("/x/portcullis/code"));
        check(&[("HOME", "/home/a"), ("XDG_CACHE_HOME", "relative")], Some("/home/a/.cache/portcullis/code"));
        check(&[("HOME", "/home/a"), ("CACHE_DIRECTORY", "/var/cache/p:/b")], Some("/var/cache/p/code"));
        check(&[("HOME", "/home/a"), (VARIABLE, "here")], Some("here"));
        check(&[("HOME", "/home/a"), (VARIABLE, "")], None);
    }
}
