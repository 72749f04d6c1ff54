//! Expressions of the Common Expression Language (CEL) that guests have the host evaluate: `expr_create` and its kin.
//!
//! An expression is a guest's, and so hostile: its length, its depth and the steps of one evaluation are bounded, and whatever
//! takes time or memory in proportion to something takes steps in proportion to it. That is why no library does it: those
//! there are can't be stopped once they evaluate.
//!
//! Grammar, conversions and errors are those of cel-cpp in Envoy 1.40, whose answers stand in `testdata/expressions`. Absent
//! are messages that an expression makes itself and time zones by name.

mod evaluate;
mod function;
mod pattern;
mod syntax;
mod time;
mod value;

use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use crate::abi::Status;
use crate::property::Attributes;
use crate::state::Refused;
use pattern::Pattern;
use syntax::Node;

/// Bytes of one expression.
const BYTES_MAX: usize = 16 * 1024;
/// Bytes of all expressions of a VM; a small one counts as [`COST_MIN`].
const VM_BYTES_MAX: usize = 256 * 1024;
/// What a small expression counts as.
const COST_MIN: usize = 64;
/// Steps of one evaluation: a node, an element, or [`BYTES_PER_STEP`] bytes. All of them take some milliseconds.
const STEPS_MAX: u32 = 100_000;
/// Bytes that are copied or compared in a step.
const BYTES_PER_STEP: usize = 16;

/// An expression, ready to be evaluated.
#[derive(Debug)]
pub(crate) struct Expression {
    node: Node,
    bytes: usize,
}

impl Expression {
    /// # Errors
    /// It is too long, or none of CEL's.
    pub(crate) fn parse(source: &[u8]) -> Result<Expression, Refused> {
        if source.len() > BYTES_MAX {
            let reason = format!("the expression has {} bytes, more than {BYTES_MAX}", source.len());
            return Err(Refused { status: Status::InternalFailure, reason: reason.into() });
        }
        let refused = |reason: String| Refused { status: Status::BadArgument, reason: reason.into() };
        let text =
            std::str::from_utf8(source).map_err(|error| refused(format!("the expression is not text: {error}")))?;
        let node = syntax::parse(text).map_err(|error| refused(error.to_string()))?;
        Ok(Expression { node, bytes: source.len().max(COST_MIN) })
    }

    /// Appends what it comes to, in the form of a property, to `out`.
    ///
    /// # Errors
    /// It comes to an error, or to something that cannot be encoded, or takes too many steps.
    pub(crate) fn evaluate(&self, attributes: Attributes<'_>, out: &mut Vec<u8>) -> Result<(), Refused> {
        let steps = Steps::new();
        let failed = |Failed(reason)| Refused { status: Status::InternalFailure, reason };
        let value = evaluate::evaluate(&self.node, attributes, &steps).map_err(failed)?;
        match value.encode(&steps, out).map_err(failed)? {
            Status::Ok => Ok(()),
            status => Err(Refused { status, reason: "what it comes to has no encoding".into() }),
        }
    }
}

/// The expressions of a root context, by the tokens that it got for them.
#[derive(Debug, Default)]
pub(crate) struct Expressions {
    by_token: HashMap<u32, Rc<Expression>>,
    next: u32,
    bytes: usize,
}

impl Expressions {
    /// Keeps an expression, unless there are too many with the `others` of the VM.
    pub(crate) fn add(&mut self, expression: Expression, others: usize) -> Result<u32, Refused> {
        if expression.bytes + others + self.bytes > VM_BYTES_MAX {
            let reason = format!("the expressions of the VM have more than {VM_BYTES_MAX} bytes");
            return Err(Refused { status: Status::InternalFailure, reason: reason.into() });
        }
        while self.by_token.contains_key(&self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let token = self.next;
        self.next = token.wrapping_add(1);
        self.bytes += expression.bytes;
        self.by_token.insert(token, Rc::new(expression));
        Ok(token)
    }

    pub(crate) fn get(&self, token: u32) -> Option<Rc<Expression>> {
        self.by_token.get(&token).cloned()
    }

    pub(crate) fn remove(&mut self, token: u32) {
        self.bytes -= self.by_token.remove(&token).map_or(0, |expression| expression.bytes);
    }

    /// What they count as.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Why an evaluation comes to nothing.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Failed(Cow<'static, str>);

impl Failed {
    fn new(reason: &'static str) -> Failed {
        Failed(reason.into())
    }
}

/// The steps that an evaluation may still take, and the patterns that it has compiled.
struct Steps {
    left: Cell<u32>,
    patterns: RefCell<HashMap<Vec<u8>, Rc<Pattern>>>,
}

impl Steps {
    fn new() -> Steps {
        Steps { left: Cell::new(STEPS_MAX), patterns: RefCell::default() }
    }

    /// Once there are none left, whatever follows fails, too.
    fn take(&self, steps: usize) -> Result<(), Failed> {
        let left = u32::try_from(steps).ok().and_then(|steps| self.left.get().checked_sub(steps));
        self.left.set(left.unwrap_or(0));
        left.map(drop).ok_or_else(|| Failed(format!("the expression takes more than {STEPS_MAX} steps").into()))
    }

    fn take_bytes(&self, bytes: usize) -> Result<(), Failed> {
        self.take(bytes / BYTES_PER_STEP)
    }

    /// The pattern, compiled once.
    fn pattern(&self, source: &[u8]) -> Result<Rc<Pattern>, Failed> {
        if let Some(known) = self.patterns.borrow().get(source) {
            return Ok(Rc::clone(known));
        }
        let pattern = Rc::new(Pattern::new(source, self)?);
        self.patterns.borrow_mut().insert(source.to_owned(), Rc::clone(&pattern));
        Ok(pattern)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plugin::Plugin;

    fn plugin() -> Plugin {
        let engine = crate::Engine::new(&crate::EngineOptions::default()).unwrap();
        let wat = r#"(module
            (memory (export "memory") 1)
            (func (export "malloc") (param i32) (result i32) i32.const 0)
            (func (export "proxy_abi_version_0_2_1")))"#;
        let wasm = wat::parse_str(wat).unwrap();
        Plugin::new("probe", crate::Module::from_bytes(&engine, &wasm, &crate::ModuleLimits::default()).unwrap())
    }

    /// The answer in the form of the table: a status, and bytes behind a 0.
    fn answer(source: &str, plugin: &Plugin) -> String {
        let mut out = Vec::new();
        let evaluated = Expression::parse(source.as_bytes())
            .and_then(|expression| expression.evaluate(Attributes { plugin, stream: None }, &mut out));
        match evaluated {
            Ok(()) => format!("0 \"{}\"", out.escape_ascii()),
            Err(refused) => (refused.status as u32).to_string(),
        }
    }

    #[test]
    fn expressions_come_to_what_they_come_to_in_envoy() {
        let plugin = plugin();
        let same = include_str!("../testdata/expressions/envoy.txt").lines();
        let same = same.map(|line| line.rsplit_once(" => ").unwrap());
        // Between the two is Envoy's answer.
        let other = include_str!("../testdata/expressions/deviations.txt").lines();
        let other = other.map(|line| line.rsplit_once(" => ").unwrap()).map(|(line, answer)| {
            let (source, of_envoy) = line.rsplit_once(" => ").unwrap();
            assert_ne!(of_envoy, answer, "{source}");
            (source, answer)
        });
        let differ: Vec<String> = same
            .chain(other)
            .map(|(source, expected)| (source, expected, answer(source, &plugin)))
            .filter(|(_, expected, answer)| answer != expected)
            .map(|(source, expected, answer)| format!("{source}\n  expected {expected}\n  came to  {answer}"))
            .collect();
        assert!(differ.is_empty(), "{}", differ.join("\n"));
    }

    fn status(source: &str, plugin: &Plugin) -> String {
        let answer = answer(source, plugin);
        answer.split(' ').next().unwrap_or_default().to_owned()
    }

    fn reason(source: &str, plugin: &Plugin) -> String {
        let mut out = Vec::new();
        let evaluated = Expression::parse(source.as_bytes())
            .and_then(|expression| expression.evaluate(Attributes { plugin, stream: None }, &mut out));
        evaluated.expect_err(source).reason.into_owned()
    }

    #[test]
    fn an_expression_is_bounded_in_length_and_depth() {
        let plugin = plugin();
        let long = |bytes: usize| format!("'{}'.size() > 1", "a".repeat(bytes - 13));
        assert_eq!(long(BYTES_MAX).len(), BYTES_MAX);
        assert_eq!(answer(&long(BYTES_MAX), &plugin), r#"0 "\x01""#);
        assert_eq!(reason(&long(BYTES_MAX + 1), &plugin), "the expression has 16385 bytes, more than 16384");
        // The bounds are those of Envoy, where they were measured.
        type Build = fn(usize) -> String;
        let cases: [(&str, usize, Build); 9] = [
            ("parentheses", 32, |n| format!("{}1{}", "(".repeat(n), ")".repeat(n))),
            ("lists", 31, |n| format!("{}1{}", "[".repeat(n), "]".repeat(n))),
            ("sums", 31, |n| format!("1{}", "+1".repeat(n))),
            ("products", 31, |n| format!("1{}", "*1".repeat(n))),
            ("conditions", 31, |n| format!("{}2", "false?1:".repeat(n))),
            ("negations", 31, |n| format!("{}1{}", "-(".repeat(n), ")".repeat(n))),
            ("comparisons", 31, |n| format!("{}true{}", "true==(".repeat(n), ")".repeat(n))),
            ("maps", 31, |n| format!("{}1{}", "{1:".repeat(n), "}".repeat(n))),
            ("macros", 30, |n| format!("[1]{}", ".map(x,x)".repeat(n))),
        ];
        for (what, most, build) in cases {
            assert_eq!(status(&build(most), &plugin), "0", "{what}");
            assert!(reason(&build(most + 1), &plugin).contains("more than 32 deep"), "{what}");
        }
        for flat in [format!("false{}", "||false".repeat(2000)), format!("true{}", "&&true".repeat(2000))] {
            assert_eq!(status(&flat, &plugin), "0");
        }
        assert_eq!(status(&format!("{}true", "!".repeat(10_000)), &plugin), "0");
    }

    #[test]
    fn an_evaluation_is_bounded() {
        let plugin = plugin();
        let list = format!("[{}]", "1,".repeat(100));
        let text = "a".repeat(1000);
        let cases = [
            // Goes through 100 items for each of 100 for each of 100.
            format!("{list}.all(x,{list}.all(y,{list}.all(z,true)))"),
            format!("{list}.exists(x,{list}.exists(y,{list}.exists(z,false)))"),
            format!("size({list}.map(x,{list}.map(y,{list})))"),
            // Doubles 20 times.
            format!("size(['{text}']{})", ".map(x,x+x)".repeat(20)),
            format!("size([{list}]{})", ".map(x,x+x)".repeat(20)),
            format!("[{list}]{}", ".map(x,[x,x])".repeat(20)),
            format!("[{list}]{0}==[{list}]{0}", ".map(x,[x,x])".repeat(20)),
            format!("[{list}]{}", ".map(x,{1:x,2:x})".repeat(20)),
            // Compiles and runs what takes long.
            format!("{list}.all(x,'{text}{text}{text}'.matches('(a|aa)+$'))"),
            format!("'{text}'.matches('(a{{0,100}}b?){{50}}c')"),
            "['a','b','c','d','e','f','g','h','i','j','k','l','m','n','o','p','q','r','s','t','u'].all(x,''.matches(x)||true)"
                .to_owned(),
            format!("'a'.matches('{}')", "\\\\pL".repeat(20)),
            format!("'a'.matches('(?i){}')", "[a-z]".repeat(50)),
            format!("'a'.matches('{}')", ".".repeat(200)),
            format!("'{text}{text}'.matches('a{{1000}}b')"),
        ];
        for source in cases {
            let reason = reason(&source, &plugin);
            let is_bounded =
                reason.contains("more than 100000 steps") || reason.contains("the pattern is not possible");
            assert!(is_bounded, "{}\n{reason}", &source[..source.len().min(200)]);
        }
        // Lists in lists, 30 each time.
        let nested = format!("[1]{}", format!(".map(x,{}x{})", "[".repeat(25), "]".repeat(25)).repeat(3));
        assert!(reason(&nested, &plugin).contains("too deep"), "{nested}");
    }

    #[test]
    fn what_nothing_decides_fails_with_the_first_that_failed() {
        let plugin = plugin();
        assert_eq!(reason("1/0 == 1 || undefined", &plugin), "a number is divided by zero");
        assert_eq!(reason("[undefined, 1/0]", &plugin), "there is no `undefined` here");
        assert_eq!(reason("1 +\n  $", &plugin), "byte 6 of the expression: `$` has no meaning here");
        assert_eq!(
            reason("'a'.lower()", &plugin),
            "byte 3 of the expression: there is no method `lower` of 0 arguments"
        );
    }

    #[test]
    fn a_vm_keeps_so_many_expressions_and_no_more() {
        let small = || Expression::parse(b"1").unwrap();
        let mut expressions = Expressions::default();
        for expected in 0..VM_BYTES_MAX / COST_MIN {
            assert_eq!(expressions.add(small(), 0), Ok(expected as u32));
        }
        assert_eq!(expressions.add(small(), 0).unwrap_err().status, Status::InternalFailure);
        expressions.remove(7);
        expressions.remove(7);
        assert!(expressions.add(small(), 1).is_err(), "another root's count, too");
        // A token is not given twice before all others were.
        assert_eq!(expressions.add(small(), 0), Ok(4096));
        assert!(expressions.get(7).is_none());
        assert!(expressions.get(4096).is_some());
    }

    #[test]
    fn whatever_a_guest_takes_for_an_expression_has_an_answer() {
        let plugin = plugin();
        let sources: Vec<&str> = include_str!("../testdata/expressions/envoy.txt")
            .lines()
            .map(|line| line.rsplit_once(" => ").unwrap().0)
            .collect();
        let mut random = 1u64;
        let mut next = move |below: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % below
        };
        for _ in 0..20_000 {
            let mut source: Vec<char> = sources[next(sources.len())].chars().collect();
            let other: Vec<char> = sources[next(sources.len())].chars().collect();
            for _ in 0..=next(3) {
                let at = next(source.len() + 1);
                let piece = &other[next(other.len())..];
                source.splice(at..at, piece[..next(piece.len() + 1)].iter().copied());
                let at = next(source.len().max(1));
                let end = (at + next(4)).min(source.len());
                source.drain(at.min(end)..end);
            }
            let _ = answer(&source.into_iter().collect::<String>(), &plugin);
        }
    }
}
