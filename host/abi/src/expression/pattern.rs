//! Regular expressions of `matches`: RE2's, as in Envoy.
//!
//! The engine here has a syntax of its own, which is nearly the same; what means something else in it is rewritten, and what
//! it may take for something else is refused. A search takes time in proportion to the text and the size of the pattern, and
//! is charged for it.

use regex_automata::nfa::thompson::pikevm::PikeVM;
use regex_automata::nfa::thompson::{self, WhichCaptures};
use regex_automata::util::syntax;

use super::{Failed, Steps};

/// Bytes of a compiled pattern.
const COMPILED_BYTES_MAX: usize = 256 * 1024;
/// RE2's bound on what stands between braces.
const REPETITIONS_MAX: u32 = 1000;
/// What it takes to compile a pattern, and more for each byte.
const STEPS_PER_PATTERN: usize = 5_000;
const STEPS_PER_PATTERN_BYTE: usize = 5;
/// Characters with some property: up to a thousand ranges, which are put together in a millisecond.
const STEPS_PER_PROPERTY: usize = 5_000;
/// A class of which the upper and lower case is looked up.
const STEPS_PER_FOLDED_CLASS: usize = 2_000;
/// Any character: an automaton over UTF-8.
const STEPS_PER_DOT: usize = 500;
/// States of the pattern that are looked at in a step.
const STATES_PER_STEP: usize = 16;

pub(super) struct Pattern(PikeVM);

impl Pattern {
    pub(super) fn new(pattern: &[u8], steps: &Steps) -> Result<Pattern, Failed> {
        steps.take(STEPS_PER_PATTERN + pattern.len().saturating_mul(STEPS_PER_PATTERN_BYTE))?;
        let pattern = std::str::from_utf8(pattern).map_err(|_| Failed::new("the pattern is not UTF-8"))?;
        let mut rewriter = Rewriter { out: String::with_capacity(pattern.len() * 2), folds: false, steps };
        rewriter.rewrite(pattern)?;
        let compiled = PikeVM::builder()
            .syntax(syntax::Config::new().utf8(false).nest_limit(100))
            .thompson(
                thompson::Config::new()
                    .utf8(false)
                    .nfa_size_limit(Some(COMPILED_BYTES_MAX))
                    .which_captures(WhichCaptures::None),
            )
            .build(&rewriter.out);
        compiled.map(Pattern).map_err(|error| Failed(format!("the pattern is not possible: {error}").into()))
    }

    pub(super) fn is_match(&self, text: &[u8], steps: &Steps) -> Result<bool, Failed> {
        let states = self.0.get_nfa().states().len();
        steps.take(states.saturating_mul(text.len() + 1) / STATES_PER_STEP)?;
        Ok(self.0.is_match(&mut self.0.create_cache(), text))
    }
}

const UNSUPPORTED: Failed = Failed(std::borrow::Cow::Borrowed("the pattern is none of RE2's, or not supported"));

/// Writes the same pattern in the engine's syntax.
struct Rewriter<'s> {
    out: String,
    /// Case does not matter, at least somewhere.
    folds: bool,
    steps: &'s Steps,
}

impl Rewriter<'_> {
    fn rewrite(&mut self, pattern: &str) -> Result<(), Failed> {
        let mut rest = pattern;
        // Whether what was written last is a repetition: RE2 wants something to stand between two.
        let mut repeats = false;
        while let Some(next) = rest.chars().next() {
            let after = &rest[next.len_utf8()..];
            let repeated = std::mem::take(&mut repeats);
            match next {
                '\\' => rest = self.escape(after, false)?,
                '[' => rest = self.class(after)?,
                '(' => rest = self.group(after)?,
                '*' | '+' | '?' | '{' => {
                    let Some(len) = repetition(rest)? else {
                        self.literal(next);
                        rest = after;
                        continue;
                    };
                    if repeated {
                        return Err(UNSUPPORTED);
                    }
                    let lazy = usize::from(rest[len..].starts_with('?'));
                    self.out.push_str(&rest[..len + lazy]);
                    rest = &rest[len + lazy..];
                    repeats = true;
                }
                ')' | '|' | '.' | '^' | '$' => {
                    self.steps.take(if next == '.' { STEPS_PER_DOT } else { 0 })?;
                    self.out.push(next);
                    rest = after;
                }
                next => {
                    self.literal(next);
                    rest = after;
                }
            }
        }
        Ok(())
    }

    /// A character that stands for itself.
    fn literal(&mut self, character: char) {
        if character.is_ascii_punctuation() && !"<>_".contains(character) {
            self.out.push('\\');
        }
        self.out.push(character);
    }

    /// An opening parenthesis with the name or the flags that follow it.
    fn group<'p>(&mut self, after: &'p str) -> Result<&'p str, Failed> {
        let mut len = 0;
        if let Some(special) = after.strip_prefix('?') {
            let named = special.strip_prefix("P<").or_else(|| special.strip_prefix('<'));
            let (inside, ends) = match named {
                Some(named) => (named, ">"),
                None => (special, ":)"),
            };
            let inner = inside.bytes().take_while(|byte| match named {
                Some(_) => byte.is_ascii_alphanumeric() || *byte == b'_',
                None => b"imsU-".contains(byte),
            });
            let inner = inner.count();
            if !inside[inner..].starts_with(|end| ends.contains(end)) || named.is_some() && inner == 0 {
                return Err(UNSUPPORTED);
            }
            self.folds |= named.is_none() && inside[..inner].contains('i');
            len = after.len() - inside.len() + inner + 1;
        }
        self.out.push('(');
        self.out.push_str(&after[..len]);
        Ok(&after[len..])
    }

    /// A class in brackets, from behind the opening one.
    fn class<'p>(&mut self, mut rest: &'p str) -> Result<&'p str, Failed> {
        self.steps.take(if self.folds { STEPS_PER_FOLDED_CLASS } else { 0 })?;
        self.out.push('[');
        if let Some(after) = rest.strip_prefix('^') {
            self.out.push('^');
            rest = after;
        }
        let mut is_first = true;
        loop {
            let next = rest.chars().next().ok_or(UNSUPPORTED)?;
            let after = &rest[next.len_utf8()..];
            match next {
                ']' if !is_first => {
                    self.out.push(']');
                    return Ok(after);
                }
                '\\' => rest = self.escape(after, true)?,
                '[' if after.starts_with(':') => {
                    let end = after.find(":]").ok_or(UNSUPPORTED)? + 2;
                    self.out.push('[');
                    self.out.push_str(&after[..end]);
                    rest = &after[end..];
                }
                // Between two of them the engine would see sets.
                '-' if after.starts_with('-') => return Err(UNSUPPORTED),
                // The case of a million characters takes too long to look up.
                next if self.folds && !next.is_ascii() => return Err(UNSUPPORTED),
                '-' => {
                    self.out.push('-');
                    rest = after;
                }
                next => {
                    self.literal(next);
                    rest = after;
                }
            }
            is_first = false;
        }
    }

    /// What stands behind a backslash. Letters of words, digits and spaces are ASCII's in RE2.
    fn escape<'p>(&mut self, rest: &'p str, in_class: bool) -> Result<&'p str, Failed> {
        let letter = rest.chars().next().ok_or(UNSUPPORTED)?;
        let after = &rest[letter.len_utf8()..];
        let written = match letter {
            'd' => "[0-9]",
            'D' => "[^0-9]",
            's' => "[\\t\\n\\f\\r ]",
            'S' => "[^\\t\\n\\f\\r ]",
            'w' => "[0-9A-Za-z_]",
            'W' => "[^0-9A-Za-z_]",
            'b' if !in_class => "(?-u:\\b)",
            'B' if !in_class => "(?-u:\\B)",
            'C' if !in_class => "(?s-u:.)",
            'A' if !in_class => "\\A",
            'z' if !in_class => "\\z",
            'a' => "\\a",
            'f' => "\\f",
            't' => "\\t",
            'n' => "\\n",
            'r' => "\\r",
            'v' => "\\v",
            'x' if !(in_class && self.folds) => "\\x",
            'p' | 'P' => {
                self.steps.take(STEPS_PER_PROPERTY)?;
                if letter == 'p' { "\\p" } else { "\\P" }
            }
            'Q' if !in_class => {
                let (quoted, after) = after.split_once("\\E").unwrap_or((after, ""));
                quoted.chars().for_each(|character| self.literal(character));
                return Ok(after);
            }
            '0'..='7' => {
                let len = rest.bytes().take(3).take_while(|byte| (b'0'..=b'7').contains(byte)).count();
                let code = u32::from_str_radix(&rest[..len], 8).map_err(|_| UNSUPPORTED)?;
                // A single digit other than 0 would be what a group has matched.
                if len == 1 && letter != '0' {
                    return Err(UNSUPPORTED);
                }
                self.out.push_str(&format!("\\x{{{code:x}}}"));
                return Ok(&rest[len..]);
            }
            letter if letter.is_ascii() && !letter.is_ascii_alphanumeric() => {
                self.literal(letter);
                ""
            }
            _ => return Err(UNSUPPORTED),
        };
        self.steps.take(if self.folds && written.ends_with(']') { STEPS_PER_FOLDED_CLASS } else { 0 })?;
        self.out.push_str(written);
        Ok(after)
    }
}

/// How long the repetition here is; braces may also stand for themselves.
fn repetition(rest: &str) -> Result<Option<usize>, Failed> {
    let Some(braces) = rest.strip_prefix('{') else {
        return Ok(Some(1));
    };
    let Some((bounds, _)) = braces.split_once('}') else {
        return Ok(None);
    };
    let (least, most) = bounds.split_once(',').unwrap_or((bounds, ""));
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if least.is_empty() || !is_number(least) || !is_number(most) {
        return Ok(None);
    }
    let too_many = |text: &str| !text.is_empty() && text.parse::<u32>().map_or(true, |count| count > REPETITIONS_MAX);
    if too_many(least) || too_many(most) {
        return Err(UNSUPPORTED);
    }
    Ok(Some(bounds.len() + 2))
}
