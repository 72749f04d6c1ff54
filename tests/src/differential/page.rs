//! `docs/compatibility.md`, made of what was seen.

use std::collections::BTreeSet;
use std::fmt::Write as _;

use super::row::Row;
use super::simulated::{self, Asked};
use super::suite::Compared;

/// Deviations that no row can show, and the test that does: they take two requests at once, a gRPC server, a stats sink, or a
/// comparison that ends Envoy.
const ELSEWHERE: &[(&str, &str)] = &[
    ("`google_grpc` in a serialised `GrpcService`", "host/abi/tests/guests/grpc.rs"),
    ("a `GrpcService` without a target, an empty upstream name", "host/abi/tests/guests/grpc.rs"),
    (
        "gRPC metadata with CR, LF or NUL, with pseudo-headers or fields that the host writes (`te`, `content-type`, ..)",
        "host/abi/tests/guests/grpc.rs",
    ),
    ("gRPC metadata that cannot be decoded", "host/abi/tests/guests/grpc.rs"),
    ("an upstream without `http2`", "tests/tests/grpc.rs"),
    ("longest gRPC message that is taken", "host/abi/tests/guests/grpc.rs"),
    ("streams that the server has ended and the guest never closes", "host/abi/tests/guests/grpc.rs"),
    ("`uncompress`", "host/abi/tests/guests/limits.rs"),
    ("`verify_signature`, `sign`", "tests/tests/calls.rs"),
    ("requests that wait in a VM that traps", "host/abi/tests/guests/hostile.rs"),
    ("TCP connections on a listener with TLS", "host/proxy/tests/proxy/tcp.rs"),
    ("TLS that a client cuts off without its closing message", "host/proxy/tests/proxy/tcp.rs"),
    ("TCP connections in a VM that traps", "host/abi/tests/guests/tcp.rs"),
    ("a path that a filter wrote", "tests/tests/calls.rs"),
    ("`upstream.*` and `xds.upstream_host_metadata` while the request's body is read", "tests/tests/calls.rs"),
    ("`request.headers`, `response.headers` as a whole", "tests/tests/calls.rs"),
    ("expressions: length, depth of values, steps", "host/abi/src/expression.rs"),
    ("expressions: messages, time zones by name, lenient forms", "tests/tests/calls.rs"),
    ("root contexts that answer no to `proxy_on_done` when the process ends", "tests/tests/calls.rs"),
    ("`path_link`, `path_symlink` of WASI", "host/abi/tests/guests/wasi.rs"),
    ("a property declared as FlatBuffers, read below `filter_state`", "tests/tests/calls.rs"),
    ("`envoy_on_stats_update`", "host/config/src/capabilities.rs"),
];

/// The names in the table of `docs/abi.md` that are neither a row's nor shown elsewhere, and the other way round.
pub fn undocumented(abi: &str, rows: &[Row]) -> Vec<String> {
    let table = abi.split_once("## Deviations").map_or("", |(_, table)| table);
    let documented: BTreeSet<&str> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split(" | ").next())
        .filter(|name| !matches!(*name, "What" | "---"))
        .collect();
    let mut shown: BTreeSet<&str> = rows.iter().filter_map(|row| row.deviation).collect();
    shown.extend(ELSEWHERE.iter().map(|(name, _)| *name));
    let missing = shown.difference(&documented).map(|name| format!("`docs/abi.md` does not list \"{name}\""));
    let idle = documented.difference(&shown).map(|name| format!("no row shows \"{name}\""));
    missing.chain(idle).collect()
}

/// The page.
pub fn render(seen: &[(&Row, &Compared)]) -> String {
    let mut page = String::from(
        "# Compatibility with Envoy\n\n\
         <!-- Made from what the differential suite saw. To renew it: UPDATE=1 cargo xtask test --only test -- --test differential -->\n\n",
    );
    let agree = seen.iter().filter(|(row, _)| row.deviation.is_none()).count();
    let _ = writeln!(
        page,
        "The differential suite (`tests/src/differential`) asks the same of the real Envoy 1.40 and of `portcullis serve`: \
         the same modules, the same policy, the same requests. Of {} questions, {agree} have the same answer in both, byte for \
         byte. The others are deviations that we chose; `docs/abi.md` gives the reason of each.\n",
        seen.len()
    );
    let simulated = seen.iter().filter(|(row, _)| simulated::asked(row) == Asked::Same).count();
    let _ = writeln!(
        page,
        "{simulated} of them have it in the harness, too, as far as it goes without connections: what filters are told and \
         answered, and the client's status (`tests/tests/simulated.rs`).\n",
    );
    let mut areas: Vec<&str> = Vec::new();
    for (row, _) in seen {
        if !areas.contains(&row.area()) {
            areas.push(row.area());
        }
    }
    page.push_str("| Area | Questions | Same answer |\n|---|---|---|\n");
    for area in &areas {
        let rows = seen.iter().filter(|(row, _)| row.area() == *area);
        let same = rows.clone().filter(|(row, _)| row.deviation.is_none()).count();
        let _ = writeln!(page, "| {area} | {} | {same} |", rows.count());
    }
    page.push_str("\n## Deviations\n\nLines with `-` are Envoy's, those with `+` ours.\n");
    let mut names: Vec<&str> = seen.iter().filter_map(|(row, _)| row.deviation).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let _ = writeln!(page, "\n### {name}");
        for (row, compared) in seen.iter().filter(|(row, _)| row.deviation == Some(name)) {
            let _ = writeln!(page, "\n{}\n\n```diff", row.shows);
            for line in compared.difference() {
                let _ = writeln!(page, "{line}");
            }
            page.push_str("```\n");
        }
    }
    page.push_str(
        "\n### Elsewhere\n\nThese take more than one request of one client, and are shown by tests of their own:\n\n",
    );
    for (name, test) in ELSEWHERE {
        let _ = writeln!(page, "* {name}: `{test}`");
    }
    page.push_str("\n## Questions\n");
    for area in &areas {
        let _ = writeln!(page, "\n### {area}\n");
        for (row, _) in seen.iter().filter(|(row, _)| row.area() == *area) {
            let name = row.id.split_once('/').map_or("", |(_, name)| name).replace('_', " ");
            let mark = row.deviation.map_or(String::new(), |deviation| format!(" (deviates: {deviation})"));
            let _ = writeln!(page, "* {name}: {}{mark}", row.shows);
        }
    }
    page
}
