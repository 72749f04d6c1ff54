//! What a script can say.
//!
//! ```text
//! statement = callback ("#" number)? ":" function argument* ("=" name)?
//! argument  = number | "text" | "text"*times | { "name" "value" ... } | $ | $name | $context | $root
//! ```
//!
//! Text has the escapes of Rust's byte strings. A list in braces is a map in the ABI's form. `$` is what the call before
//! returned, `$context` the id of the context at hand, `$root` that of the root, `$name` what an earlier call kept with
//! `=name`. With `#2` a statement belongs to the callback's second call on its context only. `return N` is the answer of
//! the callback. A `!` behind a function's name hands over null where the host would write; a `raw` before it hands over
//! numbers only, pointers among them. With `map` before it bytes that are returned are told as a map, in order of names; with
//! `size` only how many there are. A callback with `-` before it logs nothing.
//!
//! Besides the host's functions there are `trap`, `overflow` (of the stack), `allocate N` (MiB), `work N` (a million additions each)
//! and `exit N`. Instead of a callback `row` and `name` say what the script is called and whose it is.

use std::collections::BTreeMap;

use crate::functions::{self, Kind, Returned};

/// What a script can refer to.
#[derive(Default)]
pub(crate) struct Values {
    pub(crate) last: Vec<Returned>,
    /// By name, with the row that keeps it.
    pub(crate) kept: BTreeMap<(String, String), Returned>,
    pub(crate) row: String,
    pub(crate) context: u32,
    pub(crate) root: u32,
}

#[derive(Clone, Debug)]
enum Argument {
    Number(u64),
    Bytes(Vec<u8>),
    Last,
    Kept(String),
    Context,
    Root,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    Bytes,
    Map,
    Size,
}

#[derive(Clone, Debug)]
pub(crate) struct Statement {
    pub(crate) callback: String,
    /// Which call of the callback it belongs to, from 1; all if absent.
    pub(crate) visit: Option<u32>,
    quiet: bool,
    function: String,
    raw: bool,
    /// How bytes that are returned are told.
    shown: Shown,
    null: bool,
    arguments: Vec<Argument>,
    /// The name under which the first thing returned is kept.
    pub(crate) keep: Option<String>,
    /// As written, for the log.
    pub(crate) text: String,
}

/// Splits a script into statements.
pub(crate) fn parse(script: &str) -> Result<Vec<Statement>, String> {
    let mut statements = Vec::new();
    let mut words = Words { rest: script };
    loop {
        words.skip(|c| c.is_whitespace() || c == ';');
        if words.rest.is_empty() {
            return Ok(statements);
        }
        if words.rest.starts_with('#') {
            words.skip(|c| c != '\n');
            continue;
        }
        let Some((callback, rest)) = words.rest.split_once(':') else {
            return Err(format!("no callback in `{}`", words.rest));
        };
        words.rest = rest;
        words.skip(|c| c == ' ');
        let began = words.rest;
        let mut function = words.word();
        let raw = function == "raw";
        let shown = match function {
            "map" => Shown::Map,
            "size" => Shown::Size,
            _ => Shown::Bytes,
        };
        if raw || shown != Shown::Bytes {
            words.skip(|c| c == ' ');
            function = words.word();
        }
        let null = function.ends_with('!');
        let function = function.trim_end_matches('!').to_owned();
        let mut arguments = Vec::new();
        let mut keep = None;
        // Names are anything up to the end of the line.
        let is_name = matches!(callback, "row" | "name");
        loop {
            words.skip(|c| c == ' ');
            if words.rest.is_empty() || words.rest.starts_with([';', '\n', '\r']) {
                break;
            }
            match words.rest.strip_prefix('=') {
                Some(rest) => {
                    words.rest = rest;
                    keep = Some(words.word().to_owned());
                }
                None if is_name => drop(words.word()),
                None => arguments.push(words.argument()?),
            }
        }
        let text = began[..began.len() - words.rest.len()].trim_end().to_owned();
        let (callback, quiet) = match callback.strip_prefix('-') {
            Some(callback) => (callback, true),
            None => (callback, false),
        };
        let (callback, visit) = match callback.split_once('#') {
            Some((callback, number)) => (callback, Some(number.parse().map_err(|_| format!("`#{number}`"))?)),
            None => (callback, None),
        };
        let callback = callback.to_owned();
        statements.push(Statement { callback, visit, quiet, function, raw, shown, null, arguments, keep, text });
    }
}

struct Words<'a> {
    rest: &'a str,
}

impl<'a> Words<'a> {
    fn skip(&mut self, skipped: impl Fn(char) -> bool) {
        self.rest = self.rest.trim_start_matches(skipped);
    }

    fn word(&mut self) -> &'a str {
        let end = self.rest.find(|c: char| c.is_whitespace() || ";}".contains(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    fn argument(&mut self) -> Result<Argument, String> {
        if self.rest.starts_with('"') {
            let text = self.text()?;
            let Some(rest) = self.rest.strip_prefix('*') else { return Ok(Argument::Bytes(text)) };
            self.rest = rest;
            let times = self.word();
            let times: usize = times.parse().map_err(|_| format!("`*{times}`"))?;
            return Ok(Argument::Bytes(text.repeat(times)));
        }
        if let Some(rest) = self.rest.strip_prefix('{') {
            self.rest = rest;
            return self.map().map(Argument::Bytes);
        }
        let word = self.word();
        let number = || match word.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok(),
            None => word.parse::<i64>().map(|number| number as u64).or_else(|_| word.parse()).ok(),
        };
        match word {
            "$" => Ok(Argument::Last),
            "$context" => Ok(Argument::Context),
            "$root" => Ok(Argument::Root),
            word if word.starts_with('$') => Ok(Argument::Kept(word[1..].to_owned())),
            _ => number().map(Argument::Number).ok_or_else(|| format!("`{word}` is no argument")),
        }
    }

    fn text(&mut self) -> Result<Vec<u8>, String> {
        let mut bytes = Vec::new();
        let mut chars = self.rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                '"' => {
                    self.rest = &self.rest[at + 1..];
                    return Ok(bytes);
                }
                '\\' => match chars.next().map(|(_, c)| c) {
                    Some('0') => bytes.push(0),
                    Some('n') => bytes.push(b'\n'),
                    Some('r') => bytes.push(b'\r'),
                    Some('t') => bytes.push(b'\t'),
                    Some('x') => {
                        let digits: String = chars.by_ref().take(2).map(|(_, c)| c).collect();
                        bytes.push(u8::from_str_radix(&digits, 16).map_err(|_| format!("`\\x{digits}`"))?);
                    }
                    Some(c) => bytes.extend(c.to_string().as_bytes()),
                    None => break,
                },
                c => bytes.extend(c.to_string().as_bytes()),
            }
        }
        Err("a text without an end".to_owned())
    }

    fn map(&mut self) -> Result<Vec<u8>, String> {
        let mut texts = Vec::new();
        loop {
            self.skip(|c| c == ' ' || c == ',');
            if let Some(rest) = self.rest.strip_prefix('}') {
                self.rest = rest;
                break;
            }
            if !self.rest.starts_with('"') {
                return Err(format!("a map holds texts, not `{}`", self.rest));
            }
            texts.push(self.text()?);
        }
        let word = |number: usize| (number as u32).to_le_bytes();
        let mut blob = word(texts.len() / 2).to_vec();
        for text in &texts {
            blob.extend(word(text.len()));
        }
        for text in &texts {
            blob.extend(text);
            blob.push(0);
        }
        Ok(blob)
    }
}

impl Statement {
    /// Whether the answer comes later, to a callback.
    pub(crate) fn makes_call(&self) -> bool {
        matches!(self.function.as_str(), "proxy_http_call" | "proxy_grpc_call" | "proxy_grpc_stream")
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Puts values in the place of what refers to them.
    pub(crate) fn prepare(&self, values: &Values) -> Result<Call<'_>, String> {
        let shape: &[Kind] = match self.function.as_str() {
            _ if self.raw => &[],
            "return" | "allocate" | "work" | "exit" => &[Kind::Number],
            "trap" | "overflow" => &[],
            name => functions::shape(name).ok_or_else(|| format!("there is no function `{name}`"))?,
        };
        let returned = |argument: &Argument| match argument {
            Argument::Last => values.last.first(),
            Argument::Kept(name) => values.kept.get(&(values.row.clone(), name.clone())),
            _ => None,
        };
        let number = |argument: &Argument| match argument {
            Argument::Number(number) => *number,
            Argument::Bytes(_) => 0,
            Argument::Last | Argument::Kept(_) => returned(argument).map_or(0, |returned| match returned {
                Returned::Number(number) => *number,
                Returned::Bytes(bytes) | Returned::Map(bytes) => {
                    bytes.iter().take(8).rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
                }
                Returned::Null => 0,
            }),
            Argument::Context => u64::from(values.context),
            Argument::Root => u64::from(values.root),
        };
        let bytes = |argument: &Argument| match argument {
            Argument::Bytes(bytes) => bytes.clone(),
            Argument::Last | Argument::Kept(_) => returned(argument).map_or_else(Vec::new, |returned| match returned {
                Returned::Bytes(bytes) | Returned::Map(bytes) => bytes.clone(),
                Returned::Number(number) => (*number as u32).to_le_bytes().to_vec(),
                Returned::Null => Vec::new(),
            }),
            argument => (number(argument) as u32).to_le_bytes().to_vec(),
        };
        if self.raw {
            let numbers = self.arguments.iter().map(|argument| Part::Number(number(argument))).collect();
            return Ok(Call { statement: self, parts: numbers });
        }
        let mut given = self.arguments.iter();
        let mut parts = Vec::new();
        for kind in shape {
            let mut next = || given.next().ok_or_else(|| format!("`{}` needs another argument", self.function));
            parts.push(match kind {
                Kind::Number => Part::Number(number(next()?)),
                Kind::Bytes => Part::Bytes(bytes(next()?)),
                Kind::Vector => Part::Vector(bytes(next()?)),
                Kind::Filled => Part::Filled(vec![0; number(next()?) as usize]),
                Kind::GivesU32 => Part::GivesU32,
                Kind::GivesU64 => Part::GivesU64,
                Kind::GivesBytes => Part::GivesBytes { map: false },
                Kind::GivesMap => Part::GivesBytes { map: true },
            });
        }
        match given.next() {
            Some(_) => Err(format!("`{}` has too many arguments", self.function)),
            None => Ok(Call { statement: self, parts }),
        }
    }
}

enum Part {
    Number(u64),
    Bytes(Vec<u8>),
    Vector(Vec<u8>),
    Filled(Vec<u8>),
    GivesU32,
    GivesU64,
    GivesBytes { map: bool },
}

/// A statement with its values.
pub(crate) struct Call<'a> {
    statement: &'a Statement,
    parts: Vec<Part>,
}

impl Call<'_> {
    /// The number of a `return`.
    pub(crate) fn answer(&self) -> Option<u32> {
        match self.parts.as_slice() {
            [Part::Number(number)] if self.statement.function == "return" => Some(*number as u32),
            _ => None,
        }
    }

    /// Calls the host; gives the status and what came back.
    pub(crate) fn make(&self) -> (u32, Vec<Returned>) {
        if let Some(status) = self.make_own() {
            return (status, Vec::new());
        }
        // One slot of eight bytes per part is room for whatever the host writes; the vector's length needs no more.
        let mut slots = vec![[UNWRITTEN; 6]; self.parts.len()];
        let mut arguments = Vec::new();
        for (part, slot) in self.parts.iter().zip(&mut slots) {
            let at = if self.statement.null { 0 } else { slot.as_mut_ptr() as u64 };
            match part {
                Part::Number(number) => arguments.push(*number),
                Part::Bytes(bytes) | Part::Filled(bytes) => {
                    arguments.extend([bytes.as_ptr() as u64, bytes.len() as u64]);
                }
                Part::Vector(bytes) => {
                    slot[..2].copy_from_slice(&[bytes.as_ptr() as u32, bytes.len() as u32]);
                    arguments.extend([slot.as_mut_ptr() as u64, 1]);
                }
                Part::GivesU32 | Part::GivesU64 => arguments.push(at),
                Part::GivesBytes { .. } => arguments.extend([at, if at == 0 { 0 } else { at + 4 }]),
            }
        }
        let status = functions::call(&self.statement.function, &arguments);
        let mut returned = Vec::new();
        for (part, slot) in self.parts.iter().zip(&slots) {
            // The host wrote behind the compiler's back.
            // SAFETY: the slot is alive and initialised.
            let slot = unsafe { std::ptr::read_volatile(slot) };
            match part {
                // What a host leaves alone is nothing that it returned, whatever the status.
                _ if slot == [UNWRITTEN; 6] => {}
                Part::GivesU32 => returned.push(Returned::Number(u64::from(slot[0]))),
                Part::GivesU64 => returned.push(Returned::Number(u64::from(slot[0]) | u64::from(slot[1]) << 32)),
                Part::GivesBytes { .. } if slot[0] == 0 && slot[1] == 0 => returned.push(Returned::Null),
                Part::GivesBytes { map: false } => returned.push(Returned::Bytes(functions::take(slot[0], slot[1]))),
                Part::GivesBytes { map: true } => returned.push(Returned::Map(functions::take(slot[0], slot[1]))),
                Part::Number(_) | Part::Bytes(_) | Part::Vector(_) | Part::Filled(_) => {}
            }
        }
        (status, returned)
    }

    /// What is no function of the host's; `None` if it is one.
    fn make_own(&self) -> Option<u32> {
        let number = match self.parts.first() {
            Some(Part::Number(number)) => *number,
            _ => 0,
        };
        match self.statement.function.as_str() {
            "return" => Some(0),
            "trap" => core::arch::wasm32::unreachable(),
            "overflow" => Some(overflow(number) as u32),
            "allocate" => {
                let mut memory: Vec<u8> = Vec::new();
                Some(u32::from(memory.try_reserve_exact(number as usize * 1024 * 1024).is_err()))
            }
            "work" => {
                // Not by the clock: on a busy machine much time is not much work.
                std::hint::black_box((0..number * 1_000_000).map(std::hint::black_box).sum::<u64>());
                Some(0)
            }
            "exit" => std::process::exit(number as i32),
            _ => None,
        }
    }

    /// What the log says of it.
    pub(crate) fn line(&self, status: u32, returned: &[Returned]) -> String {
        let mut line = format!("{} -> {status}", self.statement.text);
        for value in returned {
            match (value, self.statement.shown) {
                (Returned::Bytes(bytes), Shown::Map) => Returned::Map(functions::sorted(bytes)).write(&mut line),
                (Returned::Bytes(bytes), Shown::Size) => line.push_str(&format!(" {} bytes", bytes.len())),
                _ => value.write(&mut line),
            }
        }
        line
    }
}

/// What the places have that the host writes to, before it does.
const UNWRITTEN: u32 = 0xAAAA_AAAA;

#[expect(unconditional_recursion, reason = "that is its purpose")]
fn overflow(depth: u64) -> u64 {
    let frame = std::hint::black_box([depth; 64]);
    overflow(depth + 1) + frame[1]
}
