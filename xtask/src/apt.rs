//! Downloads single Debian packages from a suite that this machine does not list, without changing the machine.
//!
//! The mirror and the key come from the machine's own configuration (sources.list(5)); lists, cache and packages stay
//! in a folder of ours. Packages are not installed: the caller unpacks them where it needs them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process::{Failure, query, run_quietly, with_retries};

/// One entry of the machine's package sources, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Source {
    uris: Vec<String>,
    suites: Vec<String>,
    /// Options that say how the archive is trusted, under their deb822 names.
    trust: Vec<(&'static str, String)>,
}

/// Options carried over to the suite that is asked for: each pair is the one-line name and the deb822 name.
const TRUST_OPTIONS: [(&str, &str); 3] =
    [("signed-by", "Signed-By"), ("trusted", "Trusted"), ("check-valid-until", "Check-Valid-Until")];

/// Reads the machine's package sources.
pub(crate) fn configured_sources() -> Vec<Source> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    let mut parts: Vec<PathBuf> =
        fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    parts.sort();
    files.extend(parts);
    let mut sources = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else { continue };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => sources.extend(parse_one_line_style(&text)),
            Some("sources") => sources.extend(parse_deb822_style(&text)),
            // apt ignores every other name, such as `.disabled` and `.save`.
            _ => {}
        }
    }
    sources
}

/// `deb [option=value ...] uri suite component ...`
fn parse_one_line_style(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_one_line).collect()
}

fn parse_one_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim();
    let rest = line.strip_prefix("deb")?;
    // `deb-src` lists sources, not packages.
    let rest = rest.strip_prefix(|c: char| c.is_whitespace() || c == '[').map(|_| rest.trim_start())?;
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    let trust = options.split_whitespace().filter_map(|option| {
        let (name, value) = option.split_once('=')?;
        let (_, field) = TRUST_OPTIONS.into_iter().find(|(known, _)| *known == name.to_ascii_lowercase())?;
        Some((field, value.to_owned()))
    });
    Some(Source { uris: vec![uri.to_owned()], suites: vec![suite.to_owned()], trust: trust.collect() })
}

/// Stanzas of `Field: value`, separated by empty lines; a value goes on in lines that begin with a space.
fn parse_deb822_style(text: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut stanza: Vec<(String, String)> = Vec::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            sources.extend(source_from_stanza(&stanza));
            stanza.clear();
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = stanza.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((field, value)) = line.split_once(':') {
            stanza.push((field.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }
    sources
}

fn source_from_stanza(stanza: &[(String, String)]) -> Option<Source> {
    let field = |name: &str| stanza.iter().find(|(field, _)| field == name).map(|(_, value)| value.as_str());
    let words = |name: &str| field(name).unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let enabled = !matches!(field("enabled"), Some("no" | "false" | "0"));
    if !enabled || !words("types").iter().any(|kind| kind == "deb") {
        return None;
    }
    let trust = TRUST_OPTIONS.iter().filter_map(|(name, title)| Some((*title, field(name)?.to_owned())));
    Some(Source { uris: words("uris"), suites: words("suites"), trust: trust.collect() })
}

/// The suites worth asking for a newer package, most likely first, each with the archive that should have it.
pub(crate) fn candidate_suites(sources: &[Source]) -> Vec<(String, Source)> {
    // The main archive: a suite named by its bare codename. Security updates live elsewhere and have no backports.
    let is_remote = |uri: &String| uri.starts_with("http:") || uri.starts_with("https:") || uri.starts_with("mirror");
    let main = sources.iter().find_map(|source| {
        let codename = source.suites.iter().find(|suite| !suite.contains(['-', '/']))?;
        source.uris.iter().any(is_remote).then_some((source, codename))
    });
    let Some((archive, codename)) = main else {
        return Vec::new();
    };
    let mut suites = vec!["trixie-backports".to_owned(), format!("{codename}-backports"), codename.clone()];
    suites.extend(["testing", "unstable"].map(str::to_owned));
    let mut seen = Vec::new();
    suites.retain(|suite| {
        !seen.contains(suite) && {
            seen.push(suite.clone());
            true
        }
    });
    suites.into_iter().map(|suite| (suite, archive.clone())).collect()
}

/// apt with lists and cache of its own, looking at one suite.
#[derive(Debug)]
pub(crate) struct PrivateApt {
    folder: PathBuf,
}

impl PrivateApt {
    /// Fetches the lists of `suite`.
    pub(crate) fn open(folder: &Path, suite: &str, archive: &Source) -> Result<Self, Failure> {
        let prepare = || {
            fs::create_dir_all(folder.join("lists/partial"))?;
            fs::create_dir_all(folder.join("cache/archives/partial"))?;
            fs::write(folder.join("suite.sources"), stanza(suite, archive))
        };
        prepare().map_err(|error| Failure::new(folder.display().to_string(), error.to_string()))?;
        let apt = Self { folder: folder.to_owned() };
        with_retries(|| run_quietly(apt.command("apt-get").arg("update")))?;
        Ok(apt)
    }

    /// The versions on offer, best first.
    pub(crate) fn versions(&self, package: &str) -> Result<Vec<String>, Failure> {
        let table = query(self.command("apt-cache").args(["madison", package]))?;
        Ok(table.lines().filter_map(|line| line.split('|').nth(1)).map(|version| version.trim().to_owned()).collect())
    }

    /// Downloads packages, given as `name=version`, and unpacks them below `destination`.
    pub(crate) fn unpack(&self, packages: &[String], destination: &Path) -> Result<(), Failure> {
        let mut download = self.command("apt-get");
        download.arg("download").args(packages).current_dir(&self.folder);
        with_retries(|| run_quietly(&mut download))?;
        let archives = fs::read_dir(&self.folder).into_iter().flatten().flatten().map(|entry| entry.path());
        for archive in archives.filter(|path| path.extension().is_some_and(|extension| extension == "deb")) {
            run_quietly(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(destination))?;
        }
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let folder = self.folder.display();
        for option in [
            format!("Dir::Etc::SourceList={folder}/suite.sources"),
            "Dir::Etc::SourceParts=-".to_owned(),
            format!("Dir::State::Lists={folder}/lists"),
            format!("Dir::Cache={folder}/cache"),
            "Acquire::Languages=none".to_owned(),
            // Catalogues for software centres: larger than the package lists, and not asked for here.
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

fn stanza(suite: &str, archive: &Source) -> String {
    let mut text = format!("Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\n", archive.uris.join(" "));
    for (field, value) in &archive.trust {
        text.push_str(&format!("{field}: {value}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(uri: &str, suites: &[&str], trust: &[(&'static str, &str)]) -> Source {
        Source {
            uris: vec![uri.to_owned()],
            suites: suites.iter().map(|suite| (*suite).to_owned()).collect(),
            trust: trust.iter().map(|(field, value)| (*field, (*value).to_owned())).collect(),
        }
    }

    #[test]
    fn one_line_style_with_and_without_options() {
        let text = "\
# a comment
deb http://mirror.example/debian bookworm main contrib # trailing
deb-src http://mirror.example/debian bookworm main
deb [arch=amd64 signed-by=/usr/share/keyrings/a.gpg] https://other.example/debian trixie main
deb [ trusted=yes ] https://third.example/debian sid main
 deb http://indented.example/debian trixie main
debris http://not.example/debian trixie main
deb http://no-suite.example/debian
";
        let expected = [
            source("http://mirror.example/debian", &["bookworm"], &[]),
            source("https://other.example/debian", &["trixie"], &[("Signed-By", "/usr/share/keyrings/a.gpg")]),
            source("https://third.example/debian", &["sid"], &[("Trusted", "yes")]),
            source("http://indented.example/debian", &["trixie"], &[]),
        ];
        assert_eq!(parse_one_line_style(text), expected);
    }

    #[test]
    fn deb822_style_with_comments_disabled_stanzas_and_an_inline_key() {
        let text = "\
Types: deb deb-src
# where it came from
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/a.gpg

Types: deb
Enabled: no
URIs: http://disabled.example/debian
Suites: bookworm

Types: deb-src
URIs: http://sources.example/debian
Suites: bookworm

types: deb
uris: https://inline.example/debian
suites: trixie
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 abc=
 -----END PGP PUBLIC KEY BLOCK-----
";
        let key = "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc=\n -----END PGP PUBLIC KEY BLOCK-----";
        let parsed = parse_deb822_style(text);
        let expected = [
            source(
                "http://mirror.example/debian",
                &["bookworm", "bookworm-updates"],
                &[("Signed-By", "/usr/share/keyrings/a.gpg")],
            ),
            source("https://inline.example/debian", &["trixie"], &[("Signed-By", key)]),
        ];
        assert_eq!(parsed, expected);
        // What is written for apt reads back as what was meant.
        let written = stanza("trixie-backports", &parsed[1]);
        let again = source("https://inline.example/debian", &["trixie-backports"], &[("Signed-By", key)]);
        assert_eq!(parse_deb822_style(&written), [again]);
    }

    #[test]
    fn candidates_come_from_the_main_archive_and_name_no_suite_twice() {
        let security = source("http://mirror.example/debian-security", &["trixie-security"], &[]);
        let cdrom = source("cdrom:[Debian]/", &["trixie"], &[]);
        let main = source("http://mirror.example/debian", &["trixie", "trixie-updates"], &[]);
        let candidates = candidate_suites(&[security, cdrom, main.clone()]);
        let suites: Vec<&str> = candidates.iter().map(|(suite, _)| suite.as_str()).collect();
        assert_eq!(suites, ["trixie-backports", "trixie", "testing", "unstable"]);
        assert!(candidates.iter().all(|(_, archive)| *archive == main));
    }

    #[test]
    fn no_main_archive_means_no_candidates() {
        assert_eq!(candidate_suites(&[source("http://mirror.example/x", &["bookworm-security"], &[])]), []);
    }
}
