//! `docs/compatibility.md`, made of what was seen.

use std::fmt::Write as _;

use super::row::Row;
use super::suite::Compared;

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
