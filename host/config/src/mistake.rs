//! What is wrong with a policy file: where, what, and how to fix it. All of it at once.

use std::fmt;

/// A place in a text file, counted from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Position {
    /// The line.
    pub line: usize,
    /// The column, in characters.
    pub column: usize,
    /// How many characters the thing pointed at has; it may reach beyond the line.
    pub width: usize,
}

impl Position {
    pub(crate) const START: Self = Self { line: 1, column: 1, width: 1 };
}

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistake {
    /// The file to edit, as the user named it.
    pub file: String,
    /// Where in that file; absent when the file as a whole is the problem.
    pub position: Option<Position>,
    /// The line of the file that `position` points to.
    pub source_line: Option<String>,
    /// The setting, e.g. `routes[2].upstream`; empty when the file could not be read as YAML.
    pub path: String,
    /// What is wrong. Starts in lower case, has no final stop.
    pub problem: String,
    /// How to fix it.
    pub hint: Option<String>,
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", Printable(&self.problem))?;
        let number = self.position.map_or_else(String::new, |position| position.line.to_string());
        let gutter = " ".repeat(number.len().max(1));
        write!(f, "\n{gutter}--> {}", Printable(&self.file))?;
        if let Some(position) = self.position {
            write!(f, ":{}:{}", position.line, position.column)?;
            if let Some(line) = &self.source_line {
                let (line, column, width) = visible_part(line, position);
                write!(f, "\n{gutter} |\n{number} | {line}\n{gutter} | {}{}", " ".repeat(column), "^".repeat(width))?;
            }
        }
        if !self.path.is_empty() {
            write!(f, "\n{gutter} = at: {}", Printable(&self.path))?;
        }
        match &self.hint {
            Some(hint) => write!(f, "\n{gutter} = hint: {}", Printable(hint)),
            None => Ok(()),
        }
    }
}

/// Text from a policy, which may come from anywhere, without what would command the terminal it is shown on.
struct Printable<'a>(&'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            fmt::Write::write_char(f, if c.is_control() { '\u{fffd}' } else { c })?;
        }
        Ok(())
    }
}

/// The line as a terminal shows it, with the column and width of the caret below it. Long lines are cut around
/// the caret.
fn visible_part(line: &str, position: Position) -> (String, usize, usize) {
    const SHOWN_MAX: usize = 120;
    let characters: Vec<char> = line
        .trim_end()
        .chars()
        .map(|c| if c.is_control() { if c == '\t' { ' ' } else { '\u{fffd}' } } else { c })
        .collect();
    let column = position.column.saturating_sub(1).min(characters.len());
    let from = if characters.len() > SHOWN_MAX && column > SHOWN_MAX / 2 { column - SHOWN_MAX / 2 } else { 0 };
    let shown: String = characters.iter().skip(from).take(SHOWN_MAX).collect();
    let column = column - from;
    let room = shown.chars().count().saturating_sub(column).max(1);
    (shown, column, position.width.clamp(1, room))
}

/// Every mistake of one policy file, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mistakes {
    list: Vec<Mistake>,
    unlisted: usize,
}

impl Mistakes {
    /// Mistakes beyond this are only counted: nobody reads them, and finding the place of each takes time.
    pub const LISTED_MAX: usize = 100;

    pub(crate) fn new(mut list: Vec<Mistake>, unlisted: usize) -> Self {
        list.sort_by_key(|mistake| mistake.position.map_or((0, 0), |at| (at.line, at.column)));
        list.dedup();
        Self { list, unlisted }
    }

    /// The mistakes, sorted by place; there is at least one and at most [`Self::LISTED_MAX`].
    #[must_use]
    pub fn list(&self) -> &[Mistake] {
        &self.list
    }

    /// How many more there are.
    #[must_use]
    pub fn unlisted(&self) -> usize {
        self.unlisted
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, mistake) in self.list.iter().enumerate() {
            if index > 0 {
                f.write_str("\n\n")?;
            }
            write!(f, "{mistake}")?;
        }
        match self.unlisted {
            0 => Ok(()),
            more => write!(f, "\n\nerror: there are {more} more mistakes"),
        }
    }
}

impl std::error::Error for Mistakes {}

/// The candidate that was probably meant: close in spelling, or the same but for case, dashes and underscores.
pub(crate) fn did_you_mean<'a>(written: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |text: &str| text.to_ascii_lowercase().replace(['-', ' '], "_");
    let wanted = plain(written);
    let near = |candidate: &&str| {
        let candidate = plain(candidate);
        let distance = edit_distance(&wanted, &candidate);
        let cut_short = wanted.len().min(candidate.len()) >= 3
            && (wanted.starts_with(&candidate) || candidate.starts_with(&wanted));
        (cut_short || distance <= 1 + candidate.len().min(wanted.len()) / 4).then_some(distance)
    };
    candidates
        .into_iter()
        .filter_map(|candidate| near(&candidate).map(|distance| (distance, candidate)))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Optimal string alignment distance: insertions, deletions, substitutions and swapped neighbours count one each.
fn edit_distance(a: &str, b: &str) -> usize {
    const LENGTH_MAX: usize = 80; // quadratic, so long input (which is never a near miss) is not compared
    let a: Vec<char> = a.chars().collect();
    let b: Vec<char> = b.chars().collect();
    if a.len() > LENGTH_MAX || b.len() > LENGTH_MAX {
        return usize::MAX;
    }
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, cb) in b.iter().enumerate() {
            let get = |row: &[usize], index: usize| row.get(index).copied().unwrap_or(usize::MAX - 1);
            let mut best = (get(&last, j + 1) + 1).min(get(&row, j) + 1).min(get(&last, j) + usize::from(ca != cb));
            let swapped = i > 0 && j > 0 && a.get(i - 1) == Some(cb) && b.get(j - 1) == Some(ca);
            if swapped {
                best = best.min(get(&before, j - 1) + 1);
            }
            row.push(best);
        }
        before = std::mem::replace(&mut last, row);
    }
    last.last().copied().unwrap_or(usize::MAX)
}

/// "`a`, `b` and `c`", for hints that list what exists.
pub(crate) fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    const SHOWN_MAX: usize = 12;
    let names: Vec<&str> = names.into_iter().collect();
    let mut shown: Vec<String> = names.iter().take(SHOWN_MAX).map(|name| format!("`{name}`")).collect();
    if names.len() > SHOWN_MAX {
        shown.push(format!("{} more", names.len() - SHOWN_MAX));
    }
    match shown.pop() {
        None => String::new(),
        Some(last) if shown.is_empty() => last,
        Some(last) => format!("{} and {last}", shown.join(", ")),
    }
}
