//! `portcullis.yaml`.

use portcullis_config::{InMemory, Mistakes, compile};

use super::outcome;
use crate::Target;

fn files() -> InMemory {
    InMemory::default()
        .with("pass.wasm", *b"\0asm\x01\0\0\0")
        .with("good.wasm", *b"\0asm\x01\0\0\0")
        .with("third.json", "{}")
        .with("second.bin", "")
}

/// Any text is a policy or a list of mistakes, each of which says where it is, what is wrong and how to fix it.
pub(super) const POLICY: Target = Target {
    name: "policy",
    about: "the policy file",
    run: |input| {
        let text = String::from_utf8_lossy(input);
        let Err(mistakes) = compile("portcullis.yaml", &text, &files()) else { return 0 };
        assert!(!mistakes.list().is_empty() && mistakes.list().len() <= Mistakes::LISTED_MAX);
        for mistake in mistakes.list() {
            let shown = mistake.to_string();
            assert!(!mistake.file.is_empty() && !mistake.problem.is_empty(), "{shown}");
            assert!(mistake.position.is_some(), "{shown}");
            assert!(mistake.hint.as_ref().is_some_and(|hint| !hint.is_empty()), "{shown}");
            if let Some(position) = mistake.position.filter(|_| mistake.file == "portcullis.yaml") {
                assert!(position.line >= 1 && position.column >= 1, "{shown}");
                // YAML ends lines also with a CR alone.
                let lines = text.bytes().filter(|byte| matches!(byte, b'\n' | b'\r')).count() + 1;
                assert!(position.line <= lines + 1, "{shown}");
            }
            assert!(!shown.chars().any(|c| c.is_control() && c != '\n'), "{shown:?}");
        }
        // Values in backticks are the input's own; what is said around them tells mistakes apart.
        let said = mistakes.list()[0].problem.split('`').step_by(2).collect::<String>();
        outcome((said, mistakes.list().len().min(3)))
    },
    seeds: || {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../host/config/tests");
        let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default();
        let mut seeds = vec![read(folder.join("policies/everything.yaml")).into_bytes()];
        let mut mistakes: Vec<_> = std::fs::read_dir(folder.join("mistakes")).into_iter().flatten().flatten().collect();
        mistakes.sort_by_key(std::fs::DirEntry::path);
        for file in mistakes {
            // The policies in a list of mistakes; see the tests beside it.
            let text = read(file.path());
            let cases = text.split("## ").skip(1).filter_map(|case| case.split_once('\n')?.1.split_once("----\n"));
            seeds.extend(cases.map(|(policy, _)| policy.as_bytes().to_vec()));
        }
        assert!(seeds.len() > 20 && seeds[0].len() > 1000, "the policies of the configuration's tests have moved");
        seeds
    },
    words: &[
        b"\n",
        b"  ",
        b"- ",
        b": ",
        b"{",
        b"}",
        b"[",
        b"]",
        b"\"",
        b"'",
        b"#",
        b"&a ",
        b"*a",
        b"|\n",
        b"~",
        b"!!str ",
        b"<<: ",
        b"---\n",
        b"...\n",
        b"\t",
        b"\xef\xbb\xbf",
        b"-1",
        b"1e999",
        b"0x10",
        b"64MiB",
        b"10s",
        b"null",
        b"true",
        b"version: 1\n",
        b"limits: ",
        b"listeners",
        b"filters",
        b"upstreams",
        b"routes",
        b"operators",
        b"code_cache",
        b"match: ",
        b"127.0.0.1:0",
    ],
};
