//! No policy file, however broken, brings the compiler down or keeps it busy.

use std::time::Instant;

use portcullis_config::{InMemory, Mistakes, compile};

fn files() -> InMemory {
    InMemory::default().with("pass.wasm", *b"\0asm\x01\0\0\0").with("third.json", "{}").with("second.bin", "")
}

/// Compiles, and checks that every mistake can be shown where it says.
fn check(text: &str) -> Option<Mistakes> {
    let mistakes = compile("portcullis.yaml", text, &files()).err()?;
    assert!(!mistakes.list().is_empty() && mistakes.list().len() <= Mistakes::LISTED_MAX);
    for mistake in mistakes.list() {
        let shown = mistake.to_string();
        assert!(shown.starts_with("error: ") && !mistake.problem.is_empty(), "{shown}");
        let first = mistake.problem.chars().next().unwrap_or('A');
        assert!(!first.is_uppercase() && !mistake.problem.ends_with('.'), "{shown}");
        if let Some(position) = mistake.position.filter(|_| mistake.file == "portcullis.yaml") {
            assert!(position.line <= text.lines().count().max(1) + 1, "{shown}\n{text}");
        }
    }
    Some(mistakes)
}

#[test]
fn damaged_policies() {
    let whole = include_str!("policies/everything.yaml");
    let lines: Vec<&str> = whole.lines().collect();
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        usize::try_from(seed % below as u64).unwrap_or(0)
    };
    const PIECES: [&str; 20] = [
        "",
        " ",
        "\n",
        "\t",
        ":",
        "- ",
        "{",
        "}",
        "[",
        "]",
        "\"",
        "'",
        "#",
        "&a ",
        "*a",
        "|",
        "~",
        "!!str ",
        "\u{e9}\u{1F600}",
        "-1",
    ];
    let mut refused = 0;
    for _ in 0..1_500 {
        let mut text = String::new();
        for line in &lines {
            match random(60) {
                0 => {}
                1 => text.push_str(&format!("{line}\n{line}\n")),
                2 => {
                    let mut characters: Vec<char> = line.chars().collect();
                    let at = random(characters.len() + 1);
                    let end = (at + random(4)).min(characters.len());
                    characters.splice(at..end, PIECES[random(PIECES.len())].chars());
                    text.extend(characters);
                    text.push('\n');
                }
                _ => text.push_str(&format!("{line}\n")),
            }
        }
        refused += usize::from(check(&text).is_some());
    }
    assert!(refused > 1_000, "only {refused} of 1500 were refused, so little was tried");
}

#[test]
fn large_policies_take_seconds_at_the_most() {
    let many = |line: &str, count: usize| line.repeat(count);
    let head = "version: 1\nlisteners: [{ name: a, address: \"127.0.0.1:0\" }]\n";
    let routes: String = (0..2000)
        .map(|index| {
            format!("  - {{ name: r{index}, match: {{ path: {{ exact: /{index} }} }}, respond: {{ status: 200 }} }}\n")
        })
        .collect();
    for (what, text) in [
        ("unknown keys", (0..50_000).map(|index| format!("k{index}: 1\n")).collect()),
        ("nested lists", format!("version: {}{}\n", many("[", 500_000), many("]", 500_000))),
        ("nested mappings", format!("version: {}1{}\n", many("{a: ", 200_000), many("}", 200_000))),
        // As deep as is allowed, where it is kept: on the stack of an ordinary thread.
        (
            "a deep configuration",
            format!("filters: [{{ name: a, configuration: {}1{} }}]\n", many("{a: ", 60), many("}", 60)),
        ),
        ("nested blocks", (0..1_000).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect()),
        ("a long line", format!("version: \"{}\"\n", many("x", 1_000_000))),
        ("routes", format!("{head}routes:\n{routes}")),
        ("too many routes", format!("{head}routes:\n{}", many("  - {}\n", 50_000))),
        ("anchors", format!("version: {}1\n", (0..50_000).map(|index| format!("[&a{index} 1, ")).collect::<String>())),
        ("many aliases", format!("a: &a [1]\nb: [{}]\n", many("*a, ", 200_000))),
        ("documents", many("---\n", 200_000)),
        ("comments", many("# x\n", 200_000)),
    ] {
        let start = Instant::now();
        let mistakes = check(&text);
        assert!(start.elapsed().as_secs() < 10, "{what} took {:?}", start.elapsed());
        assert_eq!(
            mistakes.is_none(),
            what == "routes",
            "{what}: {}",
            mistakes.map_or_else(String::new, |m| m.to_string())
        );
    }
}

#[test]
fn mistakes_beyond_a_hundred_are_counted() {
    let text: String = (0..150).map(|index| format!("key{index}: 1\n")).collect();
    let mistakes = check(&text).expect("unknown keys");
    assert_eq!((mistakes.list().len(), mistakes.unlisted()), (100, 53)); // version, listeners and routes are missing too
    assert!(mistakes.to_string().ends_with("\n\nerror: there are 53 more mistakes"), "{mistakes}");
}
