//! Makes one JavaScript module of an operator's TypeScript and JavaScript files.
//!
//! An operator's process sees no file, so its code must come in one piece. Parsing, removing types and printing are
//! `oxc`'s; this module finds the files, refuses what may not be imported, and joins the modules: top-level names that
//! would clash are renamed, and an import becomes the very variable that it names, so live bindings and cycles behave as
//! the language says. Modules run in the order in which the language would run them.
//!
//! Only relative imports of files inside the root are possible. There is no network and no package registry here.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use oxc_allocator::{Allocator, TakeIn};
use oxc_ast::ast::{
    Declaration, ExportDefaultDeclarationKind, Expression, ImportDeclarationSpecifier, ModuleExportName, Program,
    Statement,
};
use oxc_codegen::{Codegen, CodegenOptions};
use oxc_parser::Parser;
use oxc_semantic::{Scoping, SemanticBuilder};
use oxc_sourcemap::{ConcatSourceMapBuilder, SourceMap, SourceMapBuilder};
use oxc_span::{GetSpan, SourceType, Span};
use oxc_syntax::module_record::{ExportExportName, ExportLocalName};
use oxc_syntax::symbol::SymbolId;
use oxc_transformer::{TransformOptions, Transformer};
use serde::{Deserialize, Serialize};

const MODULES_MAX: usize = 1000;
const BYTES_MAX: usize = 8 << 20;

/// An operator's code in one piece, with the way back to its files.
#[derive(Clone)]
pub struct Bundle {
    /// One JavaScript module.
    pub code: String,
    /// The files it was made of.
    pub files: Vec<PathBuf>,
    positions: Arc<Positions>,
}

/// Where each piece of a bundle comes from. Looked up for every stack trace that an operator prints, true or made up, so
/// a look-up is one binary search.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Positions {
    sources: Vec<String>,
    /// Line and column in the bundle, source, line and column there; all from 0, in order.
    tokens: Vec<(u32, u32, u32, u32, u32)>,
}

impl Positions {
    fn new(map: &SourceMap<'_>) -> Self {
        let mut tokens: Vec<_> = map
            .get_tokens()
            .filter_map(|token| {
                let source = token.get_source_id()?;
                Some((token.get_dst_line(), token.get_dst_col(), source, token.get_src_line(), token.get_src_col()))
            })
            .collect();
        tokens.sort_unstable();
        Self { sources: map.get_sources().map(str::to_owned).collect(), tokens }
    }

    fn locate(&self, line: u32, column: u32) -> Option<(&str, u32, u32)> {
        let after = self.tokens.partition_point(|token| (token.0, token.1) <= (line, column));
        // The last token before, or the first of the line.
        let before = after.checked_sub(1).and_then(|index| self.tokens.get(index)).filter(|token| token.0 == line);
        let token = before.or_else(|| self.tokens.get(after).filter(|token| token.0 == line))?;
        Some((self.sources.get(usize::try_from(token.2).ok()?)?, token.3, token.4))
    }
}

impl fmt::Debug for Bundle {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Bundle").field("files", &self.files).finish_non_exhaustive()
    }
}

impl PartialEq for Bundle {
    fn eq(&self, other: &Self) -> bool {
        self.code == other.code
    }
}

/// A mistake in an operator's files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BundleError {
    /// The file, relative to the root.
    pub file: String,
    /// Line and column, from 1; none where the file as a whole is meant.
    pub position: Option<(u32, u32)>,
    /// What is wrong, and what to do.
    pub message: String,
}

impl fmt::Display for BundleError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.position {
            Some((line, column)) => write!(formatter, "{}:{line}:{column}: {}", self.file, self.message),
            None => write!(formatter, "{}: {}", self.file, self.message),
        }
    }
}

impl std::error::Error for BundleError {}

impl Bundle {
    /// Reads the entry module and all that it imports.
    ///
    /// # Errors
    /// Every mistake in the files that could be read.
    pub fn build(entry: &Path, root: &Path) -> Result<Self, Vec<BundleError>> {
        let allocator = Allocator::default();
        let mut graph = Graph::new(&allocator, entry, root).map_err(|error| vec![error])?;
        graph.load();
        if graph.errors.is_empty() {
            graph.link();
        }
        if !graph.errors.is_empty() {
            return Err(graph.errors);
        }
        graph.print().map_err(|error| vec![error])
    }

    /// Where a position of the bundle (line and column, from 1) comes from: file, line and column, from 1.
    #[must_use]
    pub fn locate(&self, line: u32, column: u32) -> Option<(&str, u32, u32)> {
        let (source, line, column) = self.positions.locate(line.checked_sub(1)?, column.checked_sub(1)?)?;
        Some((source, line + 1, column + 1))
    }

    /// The way back to the files as a source map (ECMA-426).
    #[must_use]
    pub fn source_map(&self) -> String {
        let mut builder = SourceMapBuilder::default();
        for source in &self.positions.sources {
            builder.add_source_and_content(source, "");
        }
        for (line, column, source, source_line, source_column) in &self.positions.tokens {
            builder.add_token(*line, *column, *source_line, *source_column, Some(*source), None);
        }
        builder.into_sourcemap().to_json_string()
    }

    /// A stack as its author wants to see it: with positions in the files, and without what the engine and the host's own
    /// code in it add.
    #[must_use]
    pub fn in_sources(&self, stack: &str) -> String {
        let lines: Vec<String> =
            stack.lines().filter(|line| !is_frame_of_engine(line)).map(|line| self.map_positions(line)).collect();
        lines.join("\n")
    }

    /// Replaces positions in the bundle (`blob:null/…:12:34`) by those in the files.
    #[must_use]
    pub fn map_positions(&self, text: &str) -> String {
        const MARK: &str = "blob:null/";
        let mut result = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(at) = rest.find(MARK) {
            let (before, from) = rest.split_at(at);
            result.push_str(before);
            let end = from.find([')', ' ', '\n']).unwrap_or(from.len());
            let (address, after) = from.split_at(end);
            let mut parts = address.rsplitn(3, ':');
            let column = parts.next().and_then(|column| column.parse().ok());
            let line = parts.next().and_then(|line| line.parse().ok());
            let place = line.zip(column).and_then(|(line, column)| self.locate(line, column));
            match place {
                Some((file, line, column)) => result.push_str(&format!("{file}:{line}:{column}")),
                None => result.push_str("(bundle)"),
            }
            rest = after;
        }
        result.push_str(rest);
        result
    }
}

/// Whether a line is a stack frame in the engine's or the host's own scripts. An operator can print the same, and misses its
/// own line then.
pub(crate) fn is_frame_of_engine(line: &str) -> bool {
    let Some(frame) = line.strip_prefix("    at ") else { return false };
    let place = frame.rsplit_once('(').map_or(frame, |(_, place)| place);
    let place = place.strip_prefix("async ").unwrap_or(place);
    place.starts_with("ext:") || place.starts_with("file:///")
}

/// What goes between a host and the process that bundles for it.
mod apart {
    use std::io::{self, Read, Write};
    use std::os::fd::AsFd;
    use std::process::Stdio;
    use std::time::Duration;

    use rustix::process::{Resource, Rlimit};
    use serde::{Deserialize, Serialize};
    use tokio::io::AsyncReadExt;
    use tokio::net::unix::pipe;

    use super::{Arc, Bundle, BundleError, Path, PathBuf, Positions};
    use crate::jail::{Launcher, OwnChild};

    /// The argument by which the launcher knows that it is to bundle.
    pub(crate) const ARGUMENT: &str = "bundle";
    const DEADLINE: Duration = Duration::from_secs(20);
    const CPU_SECONDS: u64 = 15;
    const DATA_BYTES: u64 = 1 << 30;
    const ANSWER_BYTES_MAX: u64 = 256 << 20;

    #[derive(Serialize, Deserialize)]
    struct Task {
        entry: PathBuf,
        root: PathBuf,
    }

    #[derive(Serialize, Deserialize)]
    enum Answer {
        Done { code: String, files: Vec<PathBuf>, positions: Positions },
        Failed(Vec<BundleError>),
    }

    impl Bundle {
        /// As [`Bundle::build`], in a process of its own: source that makes the parser overflow its stack or run for
        /// ever costs that process, not the host.
        ///
        /// # Errors
        /// Every mistake in the files, or that the process failed.
        pub async fn build_apart(launcher: &Launcher, entry: &Path, root: &Path) -> Result<Self, Vec<BundleError>> {
            let failed =
                |message: String| vec![BundleError { file: entry.display().to_string(), position: None, message }];
            let answer = tokio::time::timeout(DEADLINE, ask(launcher, entry, root)).await;
            let answer = answer.map_err(|_| failed(format!("it could not be read within {DEADLINE:?}")))?;
            match answer {
                Ok(Answer::Done { code, files, positions }) => Ok(Self { code, files, positions: Arc::new(positions) }),
                Ok(Answer::Failed(errors)) => Err(errors),
                Err(error) => Err(failed(format!("it could not be read: {error}"))),
            }
        }
    }

    async fn ask(launcher: &Launcher, entry: &Path, root: &Path) -> io::Result<Answer> {
        let (program, arguments) = launcher.command.split_first().ok_or_else(|| io::Error::other("no launcher"))?;
        let (output, output_theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (input_theirs, input) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let child = std::process::Command::new(program)
            .args(arguments)
            .arg(ARGUMENT)
            .env_clear()
            .stdin(Stdio::from(input_theirs))
            .stdout(Stdio::from(output_theirs))
            .stderr(Stdio::null())
            .spawn()?;
        let mut child = OwnChild(child);
        let task = serde_json::to_vec(&Task { entry: entry.to_owned(), root: root.to_owned() })?;
        // Two paths: less than a pipe holds, so this does not block.
        rustix::io::write(&input, &task)?;
        drop(input);
        let mut text = Vec::new();
        pipe::Receiver::from_owned_fd(output)?.take(ANSWER_BYTES_MAX).read_to_end(&mut text).await?;
        let status = child.0.wait()?;
        if text.is_empty() {
            return Err(io::Error::other(format!("its nesting is too deep or it takes too much memory ({status})")));
        }
        serde_json::from_slice(&text).map_err(io::Error::other)
    }

    /// The other side: reads the task from standard input and answers on standard output.
    pub(crate) fn main() -> io::Result<()> {
        let limit = |value| Rlimit { current: Some(value), maximum: Some(value) };
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        rustix::process::setrlimit(Resource::Cpu, limit(CPU_SECONDS))?;
        rustix::process::setrlimit(Resource::Data, limit(DATA_BYTES))?;
        rustix::process::setrlimit(Resource::Core, limit(0))?;
        rustix::thread::set_no_new_privs(true)?;
        let mut text = Vec::new();
        io::stdin().take(1 << 20).read_to_end(&mut text)?;
        let task: Task = serde_json::from_slice(&text)?;
        // Best effort: what it may not read it is not asked to read either.
        crate::jail::only_read(&task.root);
        // Deep, but not endless: a deeper source ends this process.
        let built = std::thread::Builder::new()
            .stack_size(64 << 20)
            .spawn(move || Bundle::build(&task.entry, &task.root))?
            .join()
            .map_err(|_| io::Error::other("the bundler failed"))?;
        let answer = match built {
            Ok(bundle) => Answer::Done {
                code: bundle.code,
                files: bundle.files,
                positions: Arc::into_inner(bundle.positions).unwrap_or_default(),
            },
            Err(errors) => Answer::Failed(errors),
        };
        let mut output = io::stdout().as_fd().try_clone_to_owned().map(std::fs::File::from)?;
        output.write_all(&serde_json::to_vec(&answer)?)
    }
}

pub(crate) use apart::{ARGUMENT, main};

#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    Default,
    Namespace,
    Named(String),
}

#[derive(Clone, Debug)]
enum Export {
    /// A variable of the module's.
    Symbol(SymbolId),
    /// The expression of `export default`, under a name that we made.
    Made(String),
    /// Somebody else's export.
    From { module: usize, name: Name },
}

/// What a name finally means.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Symbol(usize, SymbolId),
    Made(String),
    Namespace(usize),
}

struct Import {
    symbol: SymbolId,
    module: usize,
    name: Name,
    span: Span,
}

struct Module<'a> {
    path: PathBuf,
    shown: String,
    source: &'a str,
    program: Program<'a>,
    scoping: Scoping,
    imports: Vec<Import>,
    exports: BTreeMap<String, Export>,
    stars: Vec<usize>,
    dependencies: Vec<usize>,
}

struct Graph<'a> {
    allocator: &'a Allocator,
    root: PathBuf,
    entry: PathBuf,
    modules: Vec<Module<'a>>,
    by_path: HashMap<PathBuf, usize>,
    /// Modules in the order in which they run.
    order: Vec<usize>,
    bytes: usize,
    namespaces: BTreeSet<usize>,
    errors: Vec<BundleError>,
}

impl<'a> Graph<'a> {
    fn new(allocator: &'a Allocator, entry: &Path, root: &Path) -> Result<Self, BundleError> {
        let said = |path: &Path, error: std::io::Error| BundleError {
            file: path.display().to_string(),
            position: None,
            message: error.to_string(),
        };
        let root = root.canonicalize().map_err(|error| said(root, error))?;
        let entry = entry.canonicalize().map_err(|error| said(entry, error))?;
        Ok(Self {
            allocator,
            root,
            entry,
            modules: Vec::new(),
            by_path: HashMap::new(),
            order: Vec::new(),
            bytes: 0,
            namespaces: BTreeSet::new(),
            errors: Vec::new(),
        })
    }

    fn shown(&self, path: &Path) -> String {
        path.strip_prefix(&self.root).unwrap_or(path).display().to_string()
    }

    fn load(&mut self) {
        let entry = self.entry.clone();
        if !entry.starts_with(&self.root) {
            let file = entry.display().to_string();
            self.errors.push(BundleError { file, position: None, message: "the entry is outside the root".to_owned() });
            return;
        }
        if let Err(error) = self.module(&entry) {
            self.errors.push(error);
        }
        // Modules are appended while this goes through them: every file is read once.
        let mut next = 0;
        while next < self.modules.len() {
            self.connect(next);
            next += 1;
        }
        if self.modules.is_empty() {
            return;
        }
        let mut seen = vec![false; self.modules.len()];
        self.sort(&mut seen);
    }

    /// Depth first, as the language evaluates modules; without recursion, since a chain of imports may be long.
    fn sort(&mut self, seen: &mut [bool]) {
        let mut stack = vec![(0_usize, 0_usize)];
        if let Some(first) = seen.first_mut() {
            *first = true;
        }
        while let Some((module, position)) = stack.pop() {
            let dependency = self.modules.get(module).and_then(|module| module.dependencies.get(position)).copied();
            let Some(dependency) = dependency else {
                self.order.push(module);
                continue;
            };
            stack.push((module, position + 1));
            if let Some(seen) = seen.get_mut(dependency)
                && !*seen
            {
                *seen = true;
                stack.push((dependency, 0));
            }
        }
    }

    fn module(&mut self, path: &Path) -> Result<usize, BundleError> {
        if let Some(index) = self.by_path.get(path) {
            return Ok(*index);
        }
        let shown = self.shown(path);
        let fail = |message: String| BundleError { file: shown.clone(), position: None, message };
        if self.modules.len() >= MODULES_MAX {
            return Err(fail(format!("more than {MODULES_MAX} modules")));
        }
        let text = std::fs::read_to_string(path).map_err(|error| fail(error.to_string()))?;
        self.bytes = self.bytes.saturating_add(text.len());
        if self.bytes > BYTES_MAX {
            return Err(fail(format!("the modules are longer than {BYTES_MAX} bytes together")));
        }
        let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
        let (text, source_type) = match extension {
            "ts" | "mts" => (text, SourceType::ts().with_module(true)),
            "js" | "mjs" => (text, SourceType::mjs()),
            "json" => {
                let value: serde_json::Value = serde_json::from_str(&text).map_err(|error| fail(error.to_string()))?;
                let literal = serde_json::to_string(&value.to_string()).map_err(|error| fail(error.to_string()))?;
                (format!("export default JSON.parse({literal});"), SourceType::mjs())
            }
            _ => return Err(fail("a module must be a `.ts`, `.mts`, `.js`, `.mjs` or `.json` file".to_owned())),
        };
        let source: &'a str = self.allocator.alloc_str(&text);
        let parsed = Parser::new(self.allocator, source, source_type).parse();
        let errors = |diagnostics: &[oxc_diagnostics::OxcDiagnostic]| -> Vec<BundleError> {
            diagnostics
                .iter()
                .map(|diagnostic| BundleError {
                    file: shown.clone(),
                    position: diagnostic.labels.iter().next().map(|label| position(source, label.offset())),
                    message: diagnostic.message.to_string(),
                })
                .collect()
        };
        if !parsed.diagnostics.is_empty() || parsed.panicked {
            let mut found = errors(&parsed.diagnostics);
            let last = found.pop().unwrap_or_else(|| fail("it cannot be parsed".to_owned()));
            self.errors.extend(found);
            return Err(last);
        }
        for import in &parsed.module_record.dynamic_imports {
            let message = "`import()` is not available: what an operator runs must be known when it is loaded; use a \
                           static `import`";
            self.errors.push(at(&shown, source, import.span, message));
        }
        for span in &parsed.module_record.import_metas {
            self.errors.push(at(&shown, source, *span, "`import.meta` is not available: an operator has no address"));
        }
        let mut exports = Vec::new();
        for entry in &parsed.module_record.local_export_entries {
            if let (ExportExportName::Name(exported), ExportLocalName::Name(local)) =
                (&entry.export_name, &entry.local_name)
            {
                exports.push((exported.name.to_string(), local.name.to_string()));
            }
        }
        let mut program = parsed.program;
        let analysed = SemanticBuilder::new().with_check_syntax_error(true).with_enum_eval(true).build(&program);
        let mut found = errors(&analysed.diagnostics);
        let scoping = analysed.semantic.into_scoping();
        let transformed = Transformer::new(self.allocator, path, &TransformOptions::default())
            .build_with_scoping(scoping, &mut program);
        found.extend(errors(&transformed.diagnostics));
        if let Some(last) = found.pop() {
            self.errors.extend(found);
            return Err(last);
        }
        // Anew: the transformer's own bookkeeping is about the tree before its last changes.
        let scoping = SemanticBuilder::new().build(&program).semantic.into_scoping();
        let exports = exports
            .into_iter()
            .filter_map(|(exported, local)| {
                // What is only a type has no symbol any more.
                let symbol = scoping.get_root_binding(local.as_str().into())?;
                Some((exported, Export::Symbol(symbol)))
            })
            .collect();
        let index = self.modules.len();
        self.by_path.insert(path.to_owned(), index);
        self.modules.push(Module {
            path: path.to_owned(),
            shown,
            source,
            program,
            scoping,
            imports: Vec::new(),
            exports,
            stars: Vec::new(),
            dependencies: Vec::new(),
        });
        Ok(index)
    }

    /// Takes a module's imports and exports out of its tree and loads what they name.
    fn connect(&mut self, index: usize) {
        let Some(module) = self.modules.get_mut(index) else { return };
        let body = module.program.body.take_in(&self.allocator);
        let mut kept = oxc_allocator::ArenaVec::with_capacity_in(body.len(), &self.allocator);
        for statement in body {
            if let Some(statement) = self.take(index, statement) {
                kept.push(statement);
            }
        }
        if let Some(module) = self.modules.get_mut(index) {
            module.program.body = kept;
        }
    }

    fn take(&mut self, index: usize, statement: Statement<'a>) -> Option<Statement<'a>> {
        match statement {
            Statement::ImportDeclaration(import) => {
                let from = self.import(index, &import.source.value, import.source.span)?;
                let module = self.modules.get_mut(index)?;
                for specifier in import.specifiers.iter().flatten() {
                    let (local, name) = match specifier {
                        ImportDeclarationSpecifier::ImportSpecifier(one) => (&one.local, name_of(&one.imported)),
                        ImportDeclarationSpecifier::ImportDefaultSpecifier(one) => (&one.local, Name::Default),
                        ImportDeclarationSpecifier::ImportNamespaceSpecifier(one) => (&one.local, Name::Namespace),
                    };
                    if let Some(symbol) = local.symbol_id.get() {
                        module.imports.push(Import { symbol, module: from, name, span: specifier.span() });
                    }
                }
                None
            }
            Statement::ExportAllDeclaration(export) => {
                let from = self.import(index, &export.source.value, export.source.span)?;
                let module = self.modules.get_mut(index)?;
                match &export.exported {
                    None => module.stars.push(from),
                    Some(name) => {
                        let export = Export::From { module: from, name: Name::Namespace };
                        module.exports.insert(name.name().to_string(), export);
                    }
                }
                None
            }
            Statement::ExportNamedDeclaration(mut export) => {
                if let Some(source) = &export.source {
                    let from = self.import(index, &source.value, source.span)?;
                    let module = self.modules.get_mut(index)?;
                    for specifier in &export.specifiers {
                        let name = name_of(&specifier.local);
                        let export = Export::From { module: from, name };
                        module.exports.insert(specifier.exported.name().to_string(), export);
                    }
                    return None;
                }
                let module = self.modules.get_mut(index)?;
                for specifier in &export.specifiers {
                    // `export { a as default }` and exported imports are not in what the parser lists by name alone.
                    if let Some(symbol) = module.scoping.get_root_binding(specifier.local.name().as_str().into()) {
                        module.exports.insert(specifier.exported.name().to_string(), Export::Symbol(symbol));
                    }
                }
                export.declaration.take().map(declaration)
            }
            Statement::ExportDefaultDeclaration(export) => {
                let mut export = export.unbox();
                self.default(index, &mut export.declaration)
            }
            other => Some(other),
        }
    }

    fn default(&mut self, index: usize, kind: &mut ExportDefaultDeclarationKind<'a>) -> Option<Statement<'a>> {
        let made = format!("default${index}");
        let module = self.modules.get_mut(index)?;
        let symbol = match kind {
            ExportDefaultDeclarationKind::FunctionDeclaration(function) => function.id.as_ref(),
            ExportDefaultDeclarationKind::ClassDeclaration(class) => class.id.as_ref(),
            _ => None,
        };
        let export = match symbol.and_then(|id| id.symbol_id.get()) {
            Some(symbol) => Export::Symbol(symbol),
            None => Export::Made(made.clone()),
        };
        let anonymous = matches!(export, Export::Made(_));
        module.exports.insert("default".to_owned(), export);
        let allocator = self.allocator;
        let template = |text: &str| -> Option<Statement<'a>> {
            let text: &'a str = allocator.alloc_str(text);
            Parser::new(allocator, text, SourceType::mjs()).parse().program.body.pop()
        };
        let taken = std::mem::replace(kind, ExportDefaultDeclarationKind::NullLiteral(null(allocator)?));
        match taken {
            ExportDefaultDeclarationKind::FunctionDeclaration(mut function) => {
                if anonymous
                    && let Some(Statement::FunctionDeclaration(named)) = template(&format!("function {made}(){{}}"))
                {
                    function.id = named.unbox().id;
                }
                Some(Statement::FunctionDeclaration(function))
            }
            ExportDefaultDeclarationKind::ClassDeclaration(mut class) => {
                if anonymous && let Some(Statement::ClassDeclaration(named)) = template(&format!("class {made}{{}}")) {
                    class.id = named.unbox().id;
                }
                Some(Statement::ClassDeclaration(class))
            }
            ExportDefaultDeclarationKind::TSInterfaceDeclaration(_) => None,
            other => {
                let expression = Expression::try_from(other).ok()?;
                let mut statement = template(&format!("const {made} = 0;"))?;
                if let Statement::VariableDeclaration(declaration) = &mut statement
                    && let Some(declarator) = declaration.declarations.first_mut()
                {
                    declarator.init = Some(expression);
                }
                Some(statement)
            }
        }
    }

    fn import(&mut self, importer: usize, specifier: &str, span: Span) -> Option<usize> {
        let module = self.modules.get(importer)?;
        let (shown, source) = (module.shown.clone(), module.source);
        let resolved = self.resolve(&module.path, specifier);
        let loaded = match resolved {
            Ok(path) => self.module(&path),
            Err(message) => Err(at(&shown, source, span, &message)),
        };
        match loaded {
            Ok(index) => {
                self.modules.get_mut(importer)?.dependencies.push(index);
                Some(index)
            }
            Err(error) => {
                self.errors.push(error);
                None
            }
        }
    }

    fn resolve(&self, importer: &Path, specifier: &str) -> Result<PathBuf, String> {
        let scheme = specifier.split_once(':').map(|(scheme, _)| scheme);
        match scheme {
            Some("http" | "https") => {
                return Err(format!("`{specifier}` is remote; copy the module into the operator's folder"));
            }
            Some("npm" | "jsr") => {
                return Err(format!("`{specifier}` is a package; copy what is needed into the operator's folder"));
            }
            Some("node") => {
                return Err(format!("`{specifier}` is not available; an operator has the web platform's globals only"));
            }
            Some(_) => {
                return Err(format!("`{specifier}` cannot be imported; only files of the operator's folder can"));
            }
            None => {}
        }
        if !specifier.starts_with("./") && !specifier.starts_with("../") {
            return Err(format!("`{specifier}` is not a relative path; begin it with `./` or `../`"));
        }
        let base = importer.parent().unwrap_or(&self.root).join(specifier);
        let lexical = normal(&base);
        if !lexical.starts_with(&self.root) {
            return Err(format!("`{specifier}` is outside the operator's folder; move it in, or set `root`"));
        }
        let mut candidates = vec![lexical.clone()];
        match lexical.extension().and_then(|extension| extension.to_str()) {
            // As compilers of TypeScript have it: the name of the output.
            Some("js") => candidates.push(lexical.with_extension("ts")),
            Some("mjs") => candidates.push(lexical.with_extension("mts")),
            _ => {}
        }
        for extension in ["ts", "mts", "js", "mjs"] {
            let mut name = lexical.clone().into_os_string();
            name.push(format!(".{extension}"));
            candidates.push(PathBuf::from(name));
        }
        let found = candidates.iter().find(|candidate| candidate.is_file());
        let found = found.ok_or_else(|| format!("there is no module `{specifier}`"))?;
        let found = found.canonicalize().map_err(|error| format!("`{specifier}`: {error}"))?;
        if !found.starts_with(&self.root) {
            return Err(format!("`{specifier}` is a link to outside the operator's folder"));
        }
        Ok(found)
    }

    /// What an export of a module finally is. `None` when there is no such export.
    fn export(&self, module: usize, name: &Name, visited: &mut BTreeSet<(usize, String)>) -> Option<Target> {
        let text = match name {
            Name::Namespace => return Some(Target::Namespace(module)),
            Name::Default => "default",
            Name::Named(name) => name,
        };
        if !visited.insert((module, text.to_owned())) {
            return None;
        }
        let exporter = self.modules.get(module)?;
        match exporter.exports.get(text) {
            Some(Export::Symbol(symbol)) => match exporter.imports.iter().find(|import| import.symbol == *symbol) {
                Some(import) => self.export(import.module, &import.name, visited),
                None => Some(Target::Symbol(module, *symbol)),
            },
            Some(Export::Made(name)) => Some(Target::Made(name.clone())),
            Some(Export::From { module, name }) => self.export(*module, name, visited),
            None if text == "default" => None,
            None => exporter.stars.iter().find_map(|star| self.export(*star, name, visited)),
        }
    }

    fn exported_names(&self, module: usize, visited: &mut BTreeSet<usize>) -> BTreeSet<String> {
        let mut names = BTreeSet::new();
        let Some(exporter) = self.modules.get(module).filter(|_| visited.insert(module)) else { return names };
        names.extend(exporter.exports.keys().cloned());
        for star in &exporter.stars {
            names.extend(self.exported_names(*star, visited).into_iter().filter(|name| name != "default"));
        }
        names
    }

    /// Gives every variable its final name.
    fn link(&mut self) {
        let mut uses: HashMap<String, BTreeSet<usize>> = HashMap::new();
        for (index, module) in self.modules.iter().enumerate() {
            let imported: BTreeSet<SymbolId> = module.imports.iter().map(|import| import.symbol).collect();
            let own = module.scoping.symbol_ids().filter(|symbol| !imported.contains(symbol));
            let names = own.map(|symbol| module.scoping.symbol_name(symbol).to_owned());
            let free = module.scoping.root_unresolved_references().keys().map(ToString::to_string);
            for name in names.chain(free) {
                uses.entry(name).or_default().insert(index);
            }
        }
        for index in 0..self.modules.len() {
            let Some(module) = self.modules.get_mut(index) else { continue };
            let imported: BTreeSet<SymbolId> = module.imports.iter().map(|import| import.symbol).collect();
            let top: Vec<SymbolId> =
                module.scoping.get_bindings(module.scoping.root_scope_id()).values().copied().collect();
            for symbol in top.into_iter().filter(|symbol| !imported.contains(symbol)) {
                let name = module.scoping.symbol_name(symbol).to_owned();
                let elsewhere = uses.get(&name).is_some_and(|users| users.iter().any(|user| *user != index));
                if !elsewhere {
                    continue;
                }
                let mut number = index;
                let fresh = loop {
                    let fresh = format!("{name}${number}");
                    if !uses.contains_key(&fresh) {
                        break fresh;
                    }
                    number += self.bytes.max(1);
                };
                uses.entry(fresh.clone()).or_default().insert(index);
                module.scoping.set_symbol_name(symbol, fresh.as_str().into());
            }
        }
        let mut renames = Vec::new();
        for (index, module) in self.modules.iter().enumerate() {
            for import in &module.imports {
                match self.export(import.module, &import.name, &mut BTreeSet::new()) {
                    Some(target) => renames.push((index, import.symbol, target)),
                    None => self.errors.push(self.missing(index, import.module, &import.name, import.span)),
                }
            }
        }
        for (index, symbol, target) in renames {
            let name = self.final_name(&target);
            if let Target::Namespace(module) = target {
                self.namespaces.insert(module);
            }
            if let Some(module) = self.modules.get_mut(index) {
                module.scoping.set_symbol_name(symbol, name.as_str().into());
            }
        }
        if self.export(0, &Name::Default, &mut BTreeSet::new()).is_none()
            && let Some(entry) = self.modules.first()
        {
            let message = "the entry module needs `export default { async fetch(request, env, ctx) { ... } }`";
            self.errors.push(BundleError { file: entry.shown.clone(), position: None, message: message.to_owned() });
        }
    }

    fn missing(&self, importer: usize, exporter: usize, name: &Name, span: Span) -> BundleError {
        let name = match name {
            Name::Named(name) => name.as_str(),
            Name::Default | Name::Namespace => "default",
        };
        let exporter = self.modules.get(exporter).map_or("the module", |module| module.shown.as_str());
        let message = format!("`{exporter}` has no export `{name}`");
        match self.modules.get(importer) {
            Some(module) => at(&module.shown, module.source, span, &message),
            None => BundleError { file: String::new(), position: None, message },
        }
    }

    fn final_name(&self, target: &Target) -> String {
        match target {
            Target::Made(name) => name.clone(),
            Target::Namespace(module) => format!("namespace${module}"),
            Target::Symbol(module, symbol) => self
                .modules
                .get(*module)
                .map(|module| module.scoping.symbol_name(*symbol).to_owned())
                .unwrap_or_default(),
        }
    }

    fn print(mut self) -> Result<Bundle, BundleError> {
        let mut code = String::new();
        // Objects of functions that read the variables: usable before the modules have run, as the language has it.
        let mut done = BTreeSet::new();
        while let Some(module) = self.namespaces.iter().copied().find(|module| !done.contains(module)) {
            done.insert(module);
            let mut members = String::new();
            for name in self.exported_names(module, &mut BTreeSet::new()) {
                let Some(target) = self.export(module, &Name::Named(name.clone()), &mut BTreeSet::new()) else {
                    continue;
                };
                if let Target::Namespace(other) = target {
                    self.namespaces.insert(other);
                }
                let key = serde_json::to_string(&name).unwrap_or_default();
                members.push_str(&format!("get {key}(){{return {}}},", self.final_name(&target)));
            }
            code.push_str(&format!("const namespace${module}=Object.freeze({{__proto__:null,{members}}});\n"));
        }
        let entry = self.export(0, &Name::Default, &mut BTreeSet::new()).map(|target| self.final_name(&target));
        let mut maps = Vec::new();
        let order = std::mem::take(&mut self.order);
        let files = self.modules.iter().map(|module| module.path.clone()).collect();
        for index in order {
            let Some(module) = self.modules.get_mut(index) else { continue };
            let options =
                CodegenOptions { source_map_path: Some(PathBuf::from(&module.shown)), ..CodegenOptions::default() };
            let scoping = std::mem::take(&mut module.scoping);
            let printed = Codegen::new()
                .with_options(options)
                .with_source_text(module.source)
                .with_scoping(Some(scoping))
                .build(&module.program);
            let line = u32::try_from(code.matches('\n').count()).unwrap_or(u32::MAX);
            if let Some(map) = printed.map {
                maps.push((map.into_owned(), line));
            }
            code.push_str(&printed.code);
            if !code.ends_with('\n') {
                code.push('\n');
            }
        }
        code.push_str(&format!("export {{ {} as default }};\n", entry.unwrap_or_default()));
        let map = ConcatSourceMapBuilder::from_owned_sourcemaps(maps).into_sourcemap();
        Ok(Bundle { code, files, positions: Arc::new(Positions::new(&map)) })
    }
}

fn null(allocator: &Allocator) -> Option<oxc_allocator::Box<'_, oxc_ast::ast::NullLiteral>> {
    match Parser::new(allocator, "null", SourceType::mjs()).parse().program.body.pop()? {
        Statement::ExpressionStatement(statement) => match statement.unbox().expression {
            Expression::NullLiteral(null) => Some(null),
            _ => None,
        },
        _ => None,
    }
}

fn declaration(declaration: Declaration<'_>) -> Statement<'_> {
    Statement::from(declaration)
}

fn name_of(name: &ModuleExportName<'_>) -> Name {
    match name.name().as_str() {
        "default" => Name::Default,
        name => Name::Named(name.to_owned()),
    }
}

fn at(file: &str, source: &str, span: Span, message: &str) -> BundleError {
    BundleError { file: file.to_owned(), position: Some(position(source, span.start)), message: message.to_owned() }
}

fn position(source: &str, offset: u32) -> (u32, u32) {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    let before = source.get(..offset).unwrap_or(source);
    let line = before.matches('\n').count();
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count();
    let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX).saturating_add(1);
    (number(line), number(column))
}

/// Without `.` and `..`, by name alone.
fn normal(path: &Path) -> PathBuf {
    let mut result = PathBuf::new();
    for component in path.components() {
        match component {
            Component::ParentDir => {
                result.pop();
            }
            Component::CurDir => {}
            other => result.push(other),
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_of_the_engine_are_told_from_the_authors() {
        for line in [
            "    at answer (file:///shim.js:33:22)",
            "    at file:///shim.js:26:10",
            "    at async ext:deno_http/00.js:1:2",
        ] {
            assert!(is_frame_of_engine(line), "{line}");
        }
        for line in
            ["Error: at ext:", "    at Object.fetch (blob:null/1-2:6:8)", "at ext:1", "    at f (main.ts:1:2)", ""]
        {
            assert!(!is_frame_of_engine(line), "{line}");
        }
    }

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        folder
    }

    fn build(files: &[(&str, &str)]) -> Result<Bundle, Vec<String>> {
        let folder = folder(files);
        Bundle::build(&folder.path().join("main.ts"), folder.path())
            .map_err(|errors| errors.iter().map(ToString::to_string).collect())
    }

    fn check_refused(main: &str, expected: &str) {
        let errors = build(&[("main.ts", main), ("other.ts", "export const a = 1;")]).unwrap_err();
        assert_eq!(errors, [expected]);
    }

    #[test]
    fn types_are_removed_and_files_joined() {
        let bundle = build(&[
            ("main.ts", "import { greet, type Who } from './lib/greet.ts';\nconst who: Who = 'x';\nexport default { fetch: () => greet(who) };"),
            ("lib/greet.ts", "export type Who = string;\nexport function greet(who: Who): string { return `hi ${who}`; }"),
        ])
        .unwrap();
        assert!(
            bundle.code.find("function greet").unwrap() < bundle.code.find("const who").unwrap(),
            "{}",
            bundle.code
        );
        assert!(!bundle.code.contains("import") && !bundle.code.contains("Who"), "{}", bundle.code);
        assert_eq!(bundle.files.len(), 2);
    }

    #[test]
    fn a_position_leads_back_to_its_file() {
        let bundle = build(&[
            ("main.ts", "import { f } from './a.ts';\nexport default { fetch() { return f(); } };"),
            (
                "a.ts",
                "interface Long {\n  a: string;\n}\n\nexport function f(): never {\n  throw new Error('here');\n}",
            ),
        ])
        .unwrap();
        let line = bundle.code.lines().position(|line| line.contains("throw")).unwrap();
        let column = bundle.code.lines().nth(line).unwrap().find("throw").unwrap();
        let address = format!("at f (blob:null/0a-1b:{}:{})", line + 1, column + 1);
        assert_eq!(bundle.map_positions(&address), "at f (a.ts:6:3)");
        assert_eq!(bundle.map_positions("blob:null/x and blob:null/y:999:1"), "(bundle) and (bundle)");
    }

    #[test]
    fn what_may_not_be_imported_is_named_with_its_place() {
        let default = "\nexport default {};";
        check_refused(
            &format!("import x from 'https://a.example/x.ts'; x();{default}"),
            "main.ts:1:15: `https://a.example/x.ts` is remote; copy the module into the operator's folder",
        );
        check_refused(
            &format!("import x from 'npm:left-pad'; x();{default}"),
            "main.ts:1:15: `npm:left-pad` is a package; copy what is needed into the operator's folder",
        );
        check_refused(
            &format!("import 'node:fs';{default}"),
            "main.ts:1:8: `node:fs` is not available; an operator has the web platform's globals only",
        );
        check_refused(
            &format!("import 'left-pad';{default}"),
            "main.ts:1:8: `left-pad` is not a relative path; begin it with `./` or `../`",
        );
        check_refused(
            &format!("import '/etc/passwd';{default}"),
            "main.ts:1:8: `/etc/passwd` is not a relative path; begin it with `./` or `../`",
        );
        check_refused(
            &format!("import '../../etc/passwd';{default}"),
            "main.ts:1:8: `../../etc/passwd` is outside the operator's folder; move it in, or set `root`",
        );
        check_refused(
            &format!("import 'file:///etc/passwd';{default}"),
            "main.ts:1:8: `file:///etc/passwd` cannot be imported; only files of the operator's folder can",
        );
        check_refused(&format!("import './absent.ts';{default}"), "main.ts:1:8: there is no module `./absent.ts`");
        check_refused(
            &format!("export * from 'data:text/javascript,1';{default}"),
            "main.ts:1:15: `data:text/javascript,1` cannot be imported; only files of the operator's folder can",
        );
        check_refused(
            "import { b } from './other.ts';\nexport default { b };",
            "main.ts:1:10: `other.ts` has no export `b`",
        );
        check_refused(
            "export default { f: () => import('./other.ts') };",
            "main.ts:1:27: `import()` is not available: what an operator runs must be known when it is loaded; use a static `import`",
        );
        check_refused(
            "export const a = 1;",
            "main.ts: the entry module needs `export default { async fetch(request, env, ctx) { ... } }`",
        );
        check_refused("export default {", "main.ts:1:17: Expected `}` but found `EOF`");
    }

    #[test]
    fn a_link_to_outside_is_refused() {
        let outside = folder(&[("secret.ts", "export const secret = 1;")]);
        let inside = folder(&[("main.ts", "import { secret } from './link.ts';\nexport default { secret };")]);
        std::os::unix::fs::symlink(outside.path().join("secret.ts"), inside.path().join("link.ts")).unwrap();
        let errors = Bundle::build(&inside.path().join("main.ts"), inside.path()).unwrap_err();
        assert_eq!(errors[0].to_string(), "main.ts:1:24: `./link.ts` is a link to outside the operator's folder");
    }
}
