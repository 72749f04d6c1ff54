//! From the text of an expression to a tree: a lexer, and a parser by recursive descent.

use super::function::Function;

/// How deep a tree may be, as in Envoy. Chains of `&&` and `||` are flat, and a row of `!` or `-` is one.
const DEPTH_MAX: u32 = 32;

/// A part of an expression.
#[derive(Debug)]
pub(super) enum Node {
    Null,
    Bool(bool),
    Int(i64),
    Uint(u64),
    Double(f64),
    Text(Vec<u8>),
    Bytes(Vec<u8>),
    Name {
        name: String,
        /// A dot stands before it: it is no variable.
        absolute: bool,
    },
    Field(Box<Node>, String),
    /// `has(e.f)`
    Has(Box<Node>, String),
    Index(Box<[Node; 2]>),
    List(Vec<Node>),
    Map(Vec<[Node; 2]>),
    Not(Box<Node>),
    Negative(Box<Node>),
    Binary(Operator, Box<[Node; 2]>),
    /// `&&` or `||`
    Logic {
        /// The value that decides: `false` for `&&`.
        decides: bool,
        operands: Vec<Node>,
    },
    Conditional(Box<[Node; 3]>),
    Call(Function, Vec<Node>),
    Macro(Box<Macro>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operator {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
    Add,
    Subtract,
    Multiply,
    Divide,
    Remainder,
}

/// `over.kind(variable, step)`; `map` may have a condition before its step.
#[derive(Debug)]
pub(super) struct Macro {
    pub(super) kind: MacroKind,
    pub(super) over: Node,
    pub(super) variable: String,
    pub(super) condition: Option<Node>,
    pub(super) step: Node,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MacroKind {
    All,
    Exists,
    ExistsOne,
    Map,
    Filter,
}

/// What is wrong with an expression, and at which byte.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("byte {at} of the expression: {reason}")]
pub(super) struct SyntaxError {
    at: usize,
    reason: String,
}

fn error<T>(at: usize, reason: impl Into<String>) -> Result<T, SyntaxError> {
    Err(SyntaxError { at, reason: reason.into() })
}

pub(super) fn parse(text: &str) -> Result<Node, SyntaxError> {
    let mut tokens = Vec::new();
    let mut lexer = Lexer { text, at: 0 };
    while let Some(token) = lexer.next()? {
        tokens.push(token);
    }
    let mut parser = Parser { tokens, next: 0, end: text.len(), nested: 0 };
    let tree = parser.expression()?;
    match parser.tokens.get(parser.next) {
        None => Ok(tree.node),
        Some((at, _)) => error(*at, "nothing should follow here"),
    }
}

// ---- lexer

#[derive(Clone, Debug, PartialEq)]
enum Token<'t> {
    /// The size of a number; its sign is a token of its own.
    Int(u64),
    Uint(u64),
    Double(f64),
    Text(Vec<u8>),
    Bytes(Vec<u8>),
    /// A name or a word of the language.
    Word(&'t str),
    /// A field's name in backquotes.
    Quoted(&'t str),
    Symbol(&'static str),
}

/// Longer ones first.
const SYMBOLS: [&str; 24] = [
    "==", "!=", "<=", ">=", "&&", "||", "<", ">", "!", "+", "-", "*", "/", "%", "?", ":", ".", ",", "(", ")", "[", "]",
    "{", "}",
];

struct Lexer<'t> {
    text: &'t str,
    at: usize,
}

impl<'t> Lexer<'t> {
    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    /// How many bytes from here on are such.
    fn run(&self, of: impl Fn(&u8) -> bool) -> usize {
        self.rest().bytes().take_while(of).count()
    }

    fn next(&mut self) -> Result<Option<(usize, Token<'t>)>, SyntaxError> {
        loop {
            self.at += self.run(|byte| matches!(byte, b' ' | b'\t' | b'\r' | b'\n' | 0x0c));
            if !self.rest().starts_with("//") {
                break;
            }
            self.at += self.run(|byte| *byte != b'\n');
        }
        let start = self.at;
        let rest = self.rest();
        let Some(first) = rest.chars().next() else {
            return Ok(None);
        };
        let starts_number =
            first.is_ascii_digit() || first == '.' && rest.as_bytes().get(1).is_some_and(u8::is_ascii_digit);
        let token = if let Some((prefix, quote)) = string_start(rest) {
            self.at += prefix.len();
            self.string(prefix, quote)?
        } else if starts_number {
            self.number()?
        } else if first.is_ascii_alphabetic() || first == '_' {
            let len = self.run(|byte| byte.is_ascii_alphanumeric() || *byte == b'_');
            self.at += len;
            Token::Word(&rest[..len])
        } else if first == '`' {
            self.at += 1;
            let len = self.run(|byte| byte.is_ascii_alphanumeric() || b"_.-/ ".contains(byte));
            self.at += len + 1;
            match rest.as_bytes().get(len + 1) {
                Some(b'`') if len > 0 => Token::Quoted(&rest[1..=len]),
                _ => return error(start, "is no name in backquotes"),
            }
        } else if let Some(symbol) = SYMBOLS.iter().find(|symbol| rest.starts_with(**symbol)) {
            self.at += symbol.len();
            Token::Symbol(symbol)
        } else {
            return error(start, format!("`{}` has no meaning here", first.escape_default()));
        };
        Ok(Some((start, token)))
    }

    fn number(&mut self) -> Result<Token<'t>, SyntaxError> {
        let start = self.at;
        let whole = self.rest();
        let too_large = |error| SyntaxError { at: start, reason: format!("the number is not possible: {error}") };
        if let Some(hex) = whole.strip_prefix("0x")
            && hex.starts_with(|first: char| first.is_ascii_hexdigit())
        {
            self.at += 2;
            let len = self.run(u8::is_ascii_hexdigit);
            self.at += len;
            let value = u64::from_str_radix(&hex[..len], 16).map_err(too_large)?;
            return Ok(self.whole(value));
        }
        self.at += self.run(u8::is_ascii_digit);
        let mut is_double = false;
        if let Some(fraction) = self.rest().strip_prefix('.')
            && fraction.starts_with(|first: char| first.is_ascii_digit())
        {
            is_double = true;
            self.at += 1;
            self.at += self.run(u8::is_ascii_digit);
        }
        if let Some(exponent) = self.rest().strip_prefix(['e', 'E']) {
            let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            if digits.starts_with(|first: char| first.is_ascii_digit()) {
                is_double = true;
                self.at = self.text.len() - digits.len();
                self.at += self.run(u8::is_ascii_digit);
            }
        }
        let written = &self.text[start..self.at];
        if is_double {
            return match written.parse() {
                Ok(value) => Ok(Token::Double(value)),
                Err(_) => error(start, "is no number"),
            };
        }
        let value = written.parse().map_err(too_large)?;
        Ok(self.whole(value))
    }

    fn whole(&mut self, value: u64) -> Token<'t> {
        if self.rest().starts_with(['u', 'U']) {
            self.at += 1;
            return Token::Uint(value);
        }
        Token::Int(value)
    }

    /// A string, from its opening quotes on.
    fn string(&mut self, prefix: &str, quote: &'static str) -> Result<Token<'t>, SyntaxError> {
        let start = self.at;
        let is_raw = prefix.contains(['r', 'R']);
        let is_bytes = prefix.contains(['b', 'B']);
        self.at += quote.len();
        let mut content = Vec::new();
        loop {
            let rest = self.rest();
            if rest.starts_with(quote) {
                self.at += quote.len();
                break;
            }
            let Some(next) = rest.chars().next() else {
                return error(start, "the string has no end");
            };
            self.at += next.len_utf8();
            match next {
                '\n' | '\r' if quote.len() == 1 => return error(start, "the string has no end in its line"),
                '\\' if is_raw => {
                    content.push(b'\\');
                    if self.rest().starts_with('\\') {
                        self.at += 1;
                        content.push(b'\\');
                    } else if self.rest().starts_with(quote) {
                        return error(self.at - 1, "a raw string cannot end with a single backslash");
                    }
                }
                '\\' => self.escape(is_bytes, &mut content)?,
                next => content.extend_from_slice(next.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
        Ok(if is_bytes { Token::Bytes(content) } else { Token::Text(content) })
    }

    /// What stands behind a backslash.
    fn escape(&mut self, is_bytes: bool, content: &mut Vec<u8>) -> Result<(), SyntaxError> {
        let start = self.at - 1;
        let Some(letter) = self.rest().chars().next() else {
            return error(start, "the string has no end");
        };
        let digits = match letter {
            'x' | 'X' => 2,
            'u' if !is_bytes => 4,
            'U' if !is_bytes => 8,
            '0'..='3' => 3,
            letter => {
                let Some(at) = "abfnrtv\\?\"'`".find(letter) else {
                    return error(start, "the string has no such escape");
                };
                content.push(b"\x07\x08\x0c\n\r\t\x0b\\?\"'`"[at]);
                self.at += 1;
                return Ok(());
            }
        };
        let radix = if letter.is_ascii_digit() { 8 } else { 16 };
        self.at += usize::from(radix == 16);
        let code =
            self.rest().get(..digits).filter(|written| written.bytes().all(|byte| char::from(byte).is_digit(radix)));
        let Some(code) = code.and_then(|written| u32::from_str_radix(written, radix).ok()) else {
            return error(start, format!("the escape needs {digits} digits"));
        };
        self.at += digits;
        match (is_bytes, char::from_u32(code)) {
            // Two or three digits are at most 255.
            (true, _) => content.push(code as u8),
            (false, Some(character)) => content.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
            (false, None) => return error(start, "there is no such character"),
        }
        Ok(())
    }
}

/// Letters before a string, and the quotes that it stands in.
fn string_start(text: &str) -> Option<(&str, &'static str)> {
    let len = text.bytes().take(2).take_while(|byte| b"rRbB".contains(byte)).count();
    let (prefix, rest) = text.split_at(len);
    let possible = match prefix.as_bytes() {
        [] | [_] => true,
        [first, second] => matches!(first, b'b' | b'B') && matches!(second, b'r' | b'R'),
        _ => false,
    };
    let quote = ["'''", "\"\"\"", "'", "\""].into_iter().find(|quote| rest.starts_with(quote))?;
    possible.then_some((prefix, quote))
}

// ---- parser

struct Parser<'t> {
    tokens: Vec<(usize, Token<'t>)>,
    next: usize,
    end: usize,
    /// Expressions around the one at hand.
    nested: u32,
}

/// A node, and how deep the tree below it is.
struct Tree {
    node: Node,
    depth: u32,
}

impl Tree {
    fn leaf(node: Node) -> Tree {
        Tree { node, depth: 1 }
    }
}

/// What cannot be a name, beside the words that mean something.
const RESERVED: [&str; 17] = [
    "as",
    "break",
    "const",
    "continue",
    "else",
    "for",
    "function",
    "if",
    "import",
    "let",
    "loop",
    "namespace",
    "package",
    "return",
    "var",
    "void",
    "while",
];

impl<'t> Parser<'t> {
    fn at(&self) -> usize {
        self.tokens.get(self.next).map_or(self.end, |(at, _)| *at)
    }

    fn peek(&self, ahead: usize) -> Option<&Token<'t>> {
        self.tokens.get(self.next + ahead).map(|(_, token)| token)
    }

    fn is_next(&self, symbol: &str) -> bool {
        matches!(self.peek(0), Some(Token::Symbol(next)) if *next == symbol)
    }

    /// Takes the next token if it is this symbol.
    fn take(&mut self, symbol: &str) -> bool {
        let is_next = self.is_next(symbol);
        self.next += usize::from(is_next);
        is_next
    }

    fn expect(&mut self, symbol: &str) -> Result<(), SyntaxError> {
        if self.take(symbol) { Ok(()) } else { error(self.at(), format!("expected `{symbol}`")) }
    }

    /// A node above others.
    fn above(&self, node: Node, below: impl IntoIterator<Item = u32>) -> Result<Tree, SyntaxError> {
        let depth = 1 + below.into_iter().max().unwrap_or(0);
        if depth > DEPTH_MAX {
            return error(self.at(), format!("the expression is more than {DEPTH_MAX} deep"));
        }
        Ok(Tree { node, depth })
    }

    fn expression(&mut self) -> Result<Tree, SyntaxError> {
        // One more than there may be, for parentheses around a leaf.
        if self.nested > DEPTH_MAX {
            return error(self.at(), format!("the expression is more than {DEPTH_MAX} deep"));
        }
        self.nested += 1;
        let condition = self.logic(true)?;
        let tree = if self.take("?") {
            let yes = self.logic(true)?;
            self.expect(":")?;
            let no = self.expression()?;
            let depths = [condition.depth, yes.depth, no.depth];
            self.above(Node::Conditional(Box::new([condition.node, yes.node, no.node])), depths)?
        } else {
            condition
        };
        self.nested -= 1;
        Ok(tree)
    }

    /// A chain of `||`, or of the `&&` in it.
    fn logic(&mut self, decides: bool) -> Result<Tree, SyntaxError> {
        let operand = |parser: &mut Parser<'t>| if decides { parser.logic(false) } else { parser.relation() };
        let first = operand(self)?;
        let mut depth = first.depth;
        let mut operands = vec![first.node];
        while self.take(if decides { "||" } else { "&&" }) {
            let next = operand(self)?;
            depth = depth.max(next.depth);
            operands.push(next.node);
        }
        if operands.len() == 1 {
            return Ok(Tree { node: operands.remove(0), depth });
        }
        self.above(Node::Logic { decides, operands }, [depth])
    }

    fn relation(&mut self) -> Result<Tree, SyntaxError> {
        let operators = [
            ("==", Operator::Equal),
            ("!=", Operator::NotEqual),
            ("<", Operator::Less),
            ("<=", Operator::LessOrEqual),
            (">", Operator::Greater),
            (">=", Operator::GreaterOrEqual),
        ];
        let mut left = self.sum()?;
        loop {
            let found = if matches!(self.peek(0), Some(Token::Word("in"))) {
                self.next += 1;
                Some(Operator::In)
            } else {
                self.take_one_of(&operators)
            };
            let Some(operator) = found else {
                return Ok(left);
            };
            let right = self.sum()?;
            left = self.binary(operator, left, right)?;
        }
    }

    fn sum(&mut self) -> Result<Tree, SyntaxError> {
        let mut left = self.product()?;
        while let Some(operator) = self.take_one_of(&[("+", Operator::Add), ("-", Operator::Subtract)]) {
            let right = self.product()?;
            left = self.binary(operator, left, right)?;
        }
        Ok(left)
    }

    fn product(&mut self) -> Result<Tree, SyntaxError> {
        let operators = [("*", Operator::Multiply), ("/", Operator::Divide), ("%", Operator::Remainder)];
        let mut left = self.unary()?;
        while let Some(operator) = self.take_one_of(&operators) {
            let right = self.unary()?;
            left = self.binary(operator, left, right)?;
        }
        Ok(left)
    }

    fn take_one_of(&mut self, operators: &[(&str, Operator)]) -> Option<Operator> {
        operators.iter().find(|(symbol, _)| self.take(symbol)).map(|(_, operator)| *operator)
    }

    fn binary(&self, operator: Operator, left: Tree, right: Tree) -> Result<Tree, SyntaxError> {
        let depths = [left.depth, right.depth];
        self.above(Node::Binary(operator, Box::new([left.node, right.node])), depths)
    }

    /// Pairs of `!`, and of `-`, cancel each other out. A single `-` before a number is the number's own.
    fn unary(&mut self) -> Result<Tree, SyntaxError> {
        let symbol = if self.is_next("!") { "!" } else { "-" };
        let mut count = 0;
        while !(symbol == "-" && count == 0 && self.negative_number().is_some()) && self.take(symbol) {
            count += 1;
        }
        let operand = self.member()?;
        if count % 2 == 0 {
            return Ok(operand);
        }
        let node = Box::new(operand.node);
        self.above(if symbol == "!" { Node::Not(node) } else { Node::Negative(node) }, [operand.depth])
    }

    fn negative_number(&self) -> Option<Token<'t>> {
        let number = self.peek(1).filter(|token| matches!(token, Token::Int(_) | Token::Double(_)));
        number.filter(|_| self.is_next("-")).cloned()
    }

    fn member(&mut self) -> Result<Tree, SyntaxError> {
        let mut tree = self.primary()?;
        loop {
            if self.take("[") {
                let index = self.expression()?;
                self.expect("]")?;
                let depths = [tree.depth, index.depth];
                tree = self.above(Node::Index(Box::new([tree.node, index.node])), depths)?;
                continue;
            }
            let at = self.at();
            if !self.take(".") {
                return Ok(tree);
            }
            let name = match self.peek(0) {
                Some(Token::Quoted(name)) => *name,
                Some(Token::Word(name)) if !matches!(*name, "in" | "true" | "false" | "null") => *name,
                _ => return error(self.at(), "a field's name should stand behind the dot"),
            };
            let is_quoted = matches!(self.peek(0), Some(Token::Quoted(_)));
            self.next += 1;
            tree = if !is_quoted && self.take("(") {
                let arguments = self.list(")")?;
                self.method(at, tree, name, arguments)?
            } else {
                self.above(Node::Field(Box::new(tree.node), name.to_owned()), [tree.depth])?
            };
        }
    }

    fn primary(&mut self) -> Result<Tree, SyntaxError> {
        let at = self.at();
        let Some(token) = self.peek(0).cloned() else {
            return error(at, "something is missing at the end");
        };
        let too_large = |_| SyntaxError { at, reason: "the number is too large for an `int`".into() };
        let negative = self.negative_number();
        self.next += 1;
        let leaf = match token {
            Token::Symbol("(") => {
                let tree = self.expression()?;
                self.expect(")")?;
                return Ok(tree);
            }
            Token::Symbol("[") => {
                let items = self.list("]")?;
                let (nodes, depths) = split(items);
                return self.above(Node::List(nodes), depths);
            }
            Token::Symbol("{") => return self.map(),
            Token::Symbol("-") => {
                self.next += 1;
                match negative {
                    Some(Token::Int(size)) => Node::Int(0i64.checked_sub_unsigned(size).ok_or(()).map_err(too_large)?),
                    Some(Token::Double(size)) => Node::Double(-size),
                    _ => return error(at, "`-` has no meaning here"),
                }
            }
            Token::Symbol(".") => match self.peek(0) {
                Some(Token::Word(name)) => {
                    let name = *name;
                    self.next += 1;
                    return self.name(at, name, true);
                }
                _ => return error(at, "a name should stand behind the dot"),
            },
            Token::Word("true") => Node::Bool(true),
            Token::Word("false") => Node::Bool(false),
            Token::Word("null") => Node::Null,
            Token::Word(name) => return self.name(at, name, false),
            Token::Int(value) => Node::Int(i64::try_from(value).map_err(|_| ()).map_err(too_large)?),
            Token::Uint(value) => Node::Uint(value),
            Token::Double(value) => Node::Double(value),
            Token::Text(value) => Node::Text(value),
            Token::Bytes(value) => Node::Bytes(value),
            Token::Quoted(_) => return error(at, "only a field can have its name in backquotes"),
            Token::Symbol(symbol) => return error(at, format!("`{symbol}` has no meaning here")),
        };
        Ok(Tree::leaf(leaf))
    }

    /// A name, or a function that is called by it.
    fn name(&mut self, at: usize, name: &str, absolute: bool) -> Result<Tree, SyntaxError> {
        if RESERVED.contains(&name) || matches!(name, "in" | "true" | "false" | "null") {
            return error(at, format!("`{name}` is reserved"));
        }
        if !self.take("(") {
            if self.is_next("{") {
                return error(at, "messages cannot be made here");
            }
            return Ok(Tree::leaf(Node::Name { name: name.to_owned(), absolute }));
        }
        let mut arguments = self.list(")")?;
        if name == "has" && arguments.len() == 1 && !absolute {
            let tree = arguments.remove(0);
            return match tree.node {
                Node::Field(of, field) => Ok(Tree { node: Node::Has(of, field), depth: tree.depth }),
                _ => error(at, "`has` needs a field"),
            };
        }
        match Function::global(name, arguments.len()) {
            Some(function) => self.call(function, arguments),
            None => error(at, format!("there is no function `{name}` of {} arguments", arguments.len())),
        }
    }

    /// A function, or a macro, that is called of something.
    fn method(&mut self, at: usize, of: Tree, name: &str, mut arguments: Vec<Tree>) -> Result<Tree, SyntaxError> {
        let kind = match (name, arguments.len()) {
            ("all", 2) => MacroKind::All,
            ("exists", 2) => MacroKind::Exists,
            ("exists_one", 2) => MacroKind::ExistsOne,
            ("map", 2 | 3) => MacroKind::Map,
            ("filter", 2) => MacroKind::Filter,
            (_, count) => {
                let Some(function) = Function::method(name, count) else {
                    return error(at, format!("there is no method `{name}` of {count} arguments"));
                };
                arguments.insert(0, of);
                return self.call(function, arguments);
            }
        };
        let Node::Name { name: variable, absolute: false } = arguments.remove(0).node else {
            return error(at, format!("the first argument of `{name}` should be the name of a variable"));
        };
        let condition = if arguments.len() == 2 { Some(arguments.remove(0)) } else { None };
        let step = arguments.remove(0);
        let depths = [of.depth, step.depth, condition.as_ref().map_or(0, |condition| condition.depth)];
        let condition = condition.map(|condition| condition.node);
        let node = Macro { kind, over: of.node, variable, condition, step: step.node };
        self.above(Node::Macro(Box::new(node)), depths)
    }

    fn call(&mut self, function: Function, arguments: Vec<Tree>) -> Result<Tree, SyntaxError> {
        let (nodes, depths) = split(arguments);
        self.above(Node::Call(function, nodes), depths)
    }

    /// Expressions up to a closing bracket; behind those of a list there may be one more comma.
    fn list(&mut self, close: &'static str) -> Result<Vec<Tree>, SyntaxError> {
        let mut items = Vec::new();
        while !self.take(close) {
            // Nothing but a comma is an empty list.
            if close == "]" && items.is_empty() && self.take(",") {
                self.expect(close)?;
                break;
            }
            items.push(self.expression()?);
            if !self.take(",") {
                self.expect(close)?;
                break;
            }
            if close == ")" && self.is_next(close) {
                return error(self.at(), "an argument is missing");
            }
        }
        Ok(items)
    }

    fn map(&mut self) -> Result<Tree, SyntaxError> {
        let mut entries = Vec::new();
        let mut depth = 0;
        while !self.take("}") {
            if entries.is_empty() && self.take(",") {
                self.expect("}")?;
                break;
            }
            let key = self.expression()?;
            self.expect(":")?;
            let value = self.expression()?;
            depth = depth.max(key.depth).max(value.depth);
            entries.push([key.node, value.node]);
            if !self.take(",") {
                self.expect("}")?;
                break;
            }
        }
        self.above(Node::Map(entries), [depth])
    }
}

fn split(trees: Vec<Tree>) -> (Vec<Node>, Vec<u32>) {
    trees.into_iter().map(|tree| (tree.node, tree.depth)).unzip()
}
