//! What the guest keeps of each context, and how it tells what happens.

use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::functions::{self, Returned};
use crate::script::{self, Statement, Values};

/// One context, root or stream.
#[derive(Default)]
struct Context {
    /// The root above a stream; 0 for a root itself.
    parent: u32,
    script: Vec<Statement>,
    /// What the script is called; then callbacks are told, too.
    row: Option<String>,
    /// Which of several plugins this is.
    name: String,
    /// Calls of each callback.
    visits: BTreeMap<&'static str, u32>,
    /// What happened before the row was known.
    untold: Vec<String>,
}

/// Never borrowed across a call of the host's, which may come back in through the allocator.
#[derive(Default)]
struct State {
    contexts: BTreeMap<u32, Context>,
    /// Which context made a call, by the call's id.
    callers: BTreeMap<u32, u32>,
    values: Values,
    /// Tells the VMs of a host apart.
    instance: u32,
}

thread_local! {
    static STATE: RefCell<State> = RefCell::default();
}

const LEVEL_WARN: u32 = 3;

/// A script without a row tells no callbacks, however many there are.
const UNTOLD_MAX: usize = 16;

fn log(line: &str) {
    // SAFETY: the host reads `line.len()` bytes from the pointer before it returns.
    unsafe { functions::proxy_log(LEVEL_WARN, line.as_ptr() as u32, line.len() as u32) };
}

impl State {
    fn context(&mut self, id: u32) -> &mut Context {
        self.contexts.entry(id).or_default()
    }

    /// The row of a context, its own or its root's.
    fn row(&self, id: u32) -> Option<&str> {
        let context = self.contexts.get(&id)?;
        context.row.as_deref().or_else(|| self.contexts.get(&context.parent)?.row.as_deref())
    }

    /// Begins a line of a row: `@row@`, for a root `@row#instance@`, and the plugin's name if it has one.
    fn mark(&self, id: u32) -> Option<String> {
        let row = self.row(id)?;
        let context = self.contexts.get(&id)?;
        let root = self.contexts.get(&context.parent).unwrap_or(context);
        let gap = if root.name.is_empty() { "" } else { " " };
        let instance = if context.parent == 0 { format!("#{}", self.instance) } else { String::new() };
        Some(format!("@{row}{instance}@{}{gap}", root.name))
    }

    /// What belongs to this call of a callback: the root's statements, then the context's own.
    fn visit(&mut self, callback: &'static str, id: u32) -> Vec<Statement> {
        let context = self.context(id);
        let visit = context.visits.entry(callback).or_default();
        *visit += 1;
        let (visit, parent) = (*visit, context.parent);
        let root = self.contexts.get(&parent).map_or_else(String::new, |root| root.name.clone());
        let scripts = [parent, id].into_iter().filter_map(|owner| self.contexts.get(&owner));
        let belongs = |statement: &&Statement| {
            // Of several plugins on a request's way, a statement can name the one it is for.
            let (name, wanted) = statement.callback.split_once('/').unwrap_or((&root, &statement.callback));
            name == root && wanted == callback && statement.visit.is_none_or(|number| number == visit)
        };
        scripts.flat_map(|context| &context.script).filter(belongs).cloned().collect()
    }
}

/// Notes a context, with the root it belongs to.
pub(crate) fn create(id: u32, parent: u32) {
    STATE.with_borrow_mut(|state| {
        state.context(id).parent = parent;
        if state.instance == 0 {
            state.instance = functions::unlike_others();
        }
    });
}

/// Forgets a context; says so, in scripts that are rows of a suite.
pub(crate) fn delete(id: u32) {
    if let Some(mark) = STATE.with_borrow(|state| state.mark(id)) {
        log(&format!("{mark}end"));
    }
    STATE.with_borrow_mut(|state| state.contexts.remove(&id));
}

/// Forgets a context's statements.
pub(crate) fn clear_script(id: u32) {
    STATE.with_borrow_mut(|state| state.context(id).script.clear());
}

/// Adds to the statements of a context.
pub(crate) fn add_script(id: u32, text: &str) {
    let statements = match script::parse(text) {
        Ok(statements) => statements,
        Err(problem) => return log(&format!("[calls] the script has a mistake: {problem}")),
    };
    let untold = STATE.with_borrow_mut(|state| {
        let context = state.context(id);
        for statement in statements {
            match statement.callback.as_str() {
                "row" => context.row = Some(statement.text),
                "name" => context.name = statement.text,
                _ => context.script.push(statement),
            }
        }
        let untold = std::mem::take(&mut context.untold);
        state.mark(id).map(|mark| (mark, untold))
    });
    if let Some((mark, untold)) = untold {
        untold.iter().for_each(|line| log(&format!("{mark}{line}")));
    }
}

/// Whether the context still lacks a script of its own.
pub(crate) fn lacks_script(id: u32) -> bool {
    STATE.with_borrow(|state| state.contexts.get(&id).is_none_or(|context| context.script.is_empty()))
}

/// Whether the context's scripts have statements for this callback.
pub(crate) fn has(callback: &'static str, id: u32) -> bool {
    STATE.with_borrow_mut(|state| {
        let parent = state.context(id).parent;
        let scripts = [parent, id].into_iter().filter_map(|owner| state.contexts.get(&owner));
        scripts.flat_map(|context| &context.script).any(|statement| {
            let (_, wanted) = statement.callback.split_once('/').unwrap_or(("", &statement.callback));
            wanted == callback
        })
    })
}

/// The context that made a call, if it is still there; otherwise `root`, whom the answer comes to.
pub(crate) fn caller(root: u32, call: u32) -> u32 {
    STATE.with_borrow(|state| {
        let caller = state.callers.get(&call).copied();
        caller.filter(|id| state.contexts.contains_key(id)).unwrap_or(root)
    })
}

/// Tells a callback, in scripts that are rows of a suite.
fn tell_callback(id: u32, line: String) {
    let line = STATE.with_borrow_mut(|state| match state.mark(id) {
        Some(mark) => Some(format!("{mark}{line}")),
        None => {
            let untold = &mut state.context(id).untold;
            if untold.len() < UNTOLD_MAX {
                untold.push(line);
            }
            None
        }
    });
    if let Some(line) = line {
        log(&line);
    }
}

/// Makes the calls that belong to this callback of this context; the answer of the callback is what `return` says.
pub(crate) fn run(callback: &'static str, id: u32, arguments: &[u32], answer: u32) -> u32 {
    let shown: Vec<String> = arguments.iter().map(u32::to_string).collect();
    tell_callback(id, format!("{callback}({})", shown.join(", ")));
    let statements = STATE.with_borrow_mut(|state| {
        let row = state.row(id).unwrap_or_default().to_owned();
        let parent = state.context(id).parent;
        state.values.context = id;
        state.values.root = if parent == 0 { id } else { parent };
        state.values.row = row;
        state.visit(callback, id)
    });
    let mut answer = answer;
    for statement in statements {
        let call = STATE.with_borrow(|state| statement.prepare(&state.values));
        let line = match call {
            Ok(call) => {
                let (status, returned) = call.make();
                if let Some(number) = call.answer() {
                    answer = number;
                }
                let line = call.line(status, &returned);
                note(id, &statement, status, returned);
                line
            }
            Err(problem) => format!("{} ?? {problem}", statement.text),
        };
        if !statement.is_quiet() {
            let mark = STATE.with_borrow(|state| state.mark(id));
            let mark = mark.map_or_else(|| format!("[calls] {callback} "), |mark| format!("{mark}  "));
            log(&format!("{mark}{line}"));
        }
    }
    answer
}

/// Keeps what a call returned.
fn note(id: u32, statement: &Statement, status: u32, returned: Vec<Returned>) {
    STATE.with_borrow_mut(|state| {
        if let (Some(name), Some(value)) = (&statement.keep, returned.first()) {
            let key = (state.values.row.clone(), name.clone());
            state.values.kept.insert(key, value.clone());
        }
        if let (true, 0, Some(Returned::Number(call))) = (statement.makes_call(), status, returned.first()) {
            state.callers.insert(*call as u32, id);
        }
        state.values.last = returned;
    });
}

/// Logs a callback of a root context's where the script is no row, so that its arguments are known.
pub(crate) fn tell_root(root: u32, line: &str) {
    if STATE.with_borrow(|state| state.row(root).is_none()) {
        log(&format!("[calls] {line}"));
    }
}
