//! Pages that readers follow step by step, followed by a test.
//!
//! A page is Markdown. What a reader types and sees stands in fenced blocks, and comments, which readers do not see, tell the test
//! what to do with them:
//!
//! | Block | The test |
//! |---|---|
//! | `console` | runs each line that begins with `$ `, and compares what it says with the lines below, if there are any |
//! | `console` after `<!-- exit: 1 -->` | the same, and the exit code of the last command is this one instead of 0 |
//! | `console` after `<!-- in the background: NAME on PORT -->` | starts its one command, and waits for it to listen |
//! | any after `<!-- file: PATH -->` | writes the file |
//! | `diff` after `<!-- change: PATH -->` | changes the file; the old lines must stand in it once |
//! | any after `<!-- not run: REASON -->` | nothing |
//!
//! `<!-- Ctrl-C: NAME -->` ends what runs in the background, and `<!-- elsewhere -->` goes to a folder outside of the checkout.
//! Any other block is a mistake in the page, so that nothing is left out by accident. `...` on a line of its own stands for any
//! lines, within a line for any text.
//!
//! Ports on a page are fixed; the test puts free ones in their place.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use crate::process::{DEADLINE, Process};

/// A page, taken apart.
#[derive(Debug)]
pub struct Page {
    name: String,
    steps: Vec<(usize, Step)>,
}

#[derive(Debug, PartialEq, Eq)]
enum Step {
    Elsewhere,
    Commands { commands: Vec<Typed>, exit: i32 },
    Background { name: String, port: u16, typed: Typed },
    Interrupt { name: String },
    File { path: String, text: String },
    Change { path: String, old: String, new: String },
}

/// A command, and what it shows.
#[derive(Debug, PartialEq, Eq)]
struct Typed {
    command: String,
    shown: Vec<String>,
}

impl Page {
    /// Reads a page. An error says in which line of it the mistake is.
    pub fn parse(name: &str, text: &str) -> Result<Page, String> {
        let mut steps = Vec::new();
        let mut marker = None;
        let mut lines = text.lines().enumerate();
        while let Some((index, line)) = lines.next() {
            let at = |problem: &str| format!("{name}:{}: {problem}", index + 1);
            if let Some(comment) = line.strip_prefix("<!-- ").and_then(|rest| rest.strip_suffix(" -->")) {
                match comment.split_once(": ") {
                    None if comment == "elsewhere" => steps.push((index + 1, Step::Elsewhere)),
                    Some(("Ctrl-C", name)) => steps.push((index + 1, Step::Interrupt { name: name.to_owned() })),
                    Some((what, value)) if marker.is_none() => marker = Some((what, value)),
                    _ => return Err(at("this comment is none that the test knows, or the one before it has no block")),
                }
            } else if let Some(language) = line.strip_prefix("```") {
                let body = lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```").collect::<Vec<_>>();
                let step = block(language, marker.take(), &body).map_err(|problem| at(&problem))?;
                steps.extend(step.map(|step| (index + 1, step)));
            } else if marker.is_some() && !line.is_empty() {
                return Err(at("a block is missing after the comment"));
            }
        }
        if steps.is_empty() {
            return Err(format!("{name}: nothing on this page can be done"));
        }
        Ok(Page { name: name.to_owned(), steps })
    }
}

fn block(language: &str, marker: Option<(&str, &str)>, body: &[&str]) -> Result<Option<Step>, String> {
    let step = match (language, marker) {
        (_, Some(("not run", _))) => return Ok(None),
        (_, Some(("file", path))) => Step::File { path: path.to_owned(), text: joined(body) },
        ("diff", Some(("change", path))) => {
            let side = |mark: char| {
                let lines = body.iter().filter(|line| line.is_empty() || line.starts_with([' ', mark]));
                lines.map(|line| format!("{}\n", line.get(1..).unwrap_or_default())).collect::<String>()
            };
            Step::Change { path: path.to_owned(), old: side('-'), new: side('+') }
        }
        ("console", Some(("in the background", place))) => {
            let (name, port) = place.split_once(" on ").ok_or("write `NAME on PORT`")?;
            let port = port.parse().map_err(|_| format!("`{port}` is no port"))?;
            let Ok([typed]) = <[Typed; 1]>::try_from(commands(body)?) else {
                return Err("one command can stay in the background".to_owned());
            };
            Step::Background { name: name.to_owned(), port, typed }
        }
        ("console", Some(("exit", code))) => {
            let exit = code.parse().map_err(|_| format!("`{code}` is no exit code"))?;
            Step::Commands { commands: commands(body)?, exit }
        }
        ("console", None) => Step::Commands { commands: commands(body)?, exit: 0 },
        _ => return Err(format!("what is a reader to do with this block (`{language}`)?")),
    };
    Ok(Some(step))
}

fn commands(body: &[&str]) -> Result<Vec<Typed>, String> {
    let mut commands: Vec<Typed> = Vec::new();
    for line in body {
        if let Some(command) = line.strip_prefix("$ ") {
            commands.push(Typed { command: command.to_owned(), shown: Vec::new() });
        } else {
            commands.last_mut().ok_or("a block of commands begins with `$ `")?.shown.push((*line).to_owned());
        }
    }
    if commands.is_empty() { Err("there is no command in this block".to_owned()) } else { Ok(commands) }
}

fn joined(lines: &[&str]) -> String {
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// Whether lines are those that a page shows.
fn shows(shown: &[&str], said: &[&str]) -> bool {
    match (shown, said) {
        ([], []) => true,
        (["...", rest @ ..], _) => (0..=said.len()).any(|skipped| shows(rest, &said[skipped..])),
        ([first, shown @ ..], [line, said @ ..]) => fits(first, line) && shows(shown, said),
        _ => false,
    }
}

/// Whether a line is one with `...` for any text.
fn fits(pattern: &str, line: &str) -> bool {
    let Some((start, rest)) = pattern.split_once("...") else { return pattern == line };
    let Some(line) = line.strip_prefix(start) else { return false };
    (0..=line.len()).filter(|skipped| line.is_char_boundary(*skipped)).any(|skipped| fits(rest, &line[skipped..]))
}

/// A reader at work: where they are, and what runs for them.
pub struct Reader {
    folder: PathBuf,
    state: tempfile::TempDir,
    ports: BTreeMap<u16, u16>,
    running: BTreeMap<String, Process>,
    elsewhere: PathBuf,
    variables: Vec<(String, String)>,
}

impl Reader {
    /// A reader in `folder`, with the variables of this process. `<!-- elsewhere -->` goes to another folder, where some
    /// more `variables` hold; an empty value takes one away.
    pub fn new(folder: &Path, elsewhere: &Path, variables: Vec<(String, String)>) -> Reader {
        let state = tempfile::tempdir().expect("a folder");
        std::fs::write(state.path().join("variables"), "").expect("a file");
        Reader {
            folder: folder.to_owned(),
            state,
            ports: BTreeMap::new(),
            running: BTreeMap::new(),
            elsewhere: elsewhere.to_owned(),
            variables,
        }
    }

    /// Does what a page says. `after` is called after each command, with the folder it was typed in.
    ///
    /// # Panics
    ///
    /// With the line of the page, if what happens is not what it says.
    pub fn follow(&mut self, page: &Page, after: impl Fn(&mut Reader, &str, &Path)) {
        for (_, step) in &page.steps {
            if let Step::Background { port, .. } = step {
                self.ports.entry(*port).or_insert_with(free_port);
            }
        }
        for (line, step) in &page.steps {
            let at = format!("{}:{line}", page.name);
            match step {
                Step::Elsewhere => {
                    self.folder.clone_from(&self.elsewhere);
                    for (name, value) in self.variables.clone() {
                        let command =
                            if value.is_empty() { format!("unset {name}") } else { format!("export {name}='{value}'") };
                        self.run(&at, &command);
                    }
                }
                Step::Commands { commands, exit } => {
                    for (index, typed) in commands.iter().enumerate() {
                        let folder = self.folder.clone();
                        let (said, code) = self.run(&at, &typed.command);
                        let expected = if index + 1 == commands.len() { *exit } else { 0 };
                        assert_eq!(code, Some(expected), "{at}: `{}`\n{said}", typed.command);
                        self.compare(&at, typed, &said);
                        after(self, &typed.command, &folder);
                    }
                }
                Step::Background { name, port, typed } => self.start(&at, name, *port, typed),
                Step::Interrupt { name } => {
                    let mut process =
                        self.running.remove(name).unwrap_or_else(|| panic!("{at}: `{name}` does not run"));
                    let killed = Command::new("kill").args(["-INT", &process.id().to_string()]).status();
                    assert!(killed.is_ok_and(|status| status.success()), "{at}: `{name}` cannot be ended");
                    let status = process.wait().unwrap_or_else(|error| panic!("{at}: {error}"));
                    assert!(status.success(), "{at}: `{name}` ended with {status}\n{}", process.log());
                }
                Step::File { path, text } => {
                    let path = self.folder.join(path);
                    let text = self.with_free_ports(text);
                    let folder = path.parent().unwrap_or(&path);
                    let written = std::fs::create_dir_all(folder).and_then(|()| std::fs::write(&path, text));
                    written.unwrap_or_else(|error| panic!("{at}: {}: {error}", path.display()));
                }
                Step::Change { path, old, new } => {
                    let (old, new) = (self.with_free_ports(old), self.with_free_ports(new));
                    self.change(&at, path, &old, &new);
                }
            }
        }
        assert!(self.running.is_empty(), "{}: still in the background: {:?}", page.name, self.running.keys());
    }

    /// Programs in this folder are found, if they are nowhere else.
    pub fn add_to_path(&mut self, folder: &Path) {
        self.run("PATH", &format!("export PATH=\"$PATH:{}\"", folder.display()));
    }

    /// Puts free ports in the place of those of the page, in a file that a command has made.
    pub fn free_ports_in(&self, file: &Path) {
        let text = std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        std::fs::write(file, self.with_free_ports(&text)).expect("to write");
    }

    fn change(&self, at: &str, path: &str, old: &str, new: &str) {
        let file = self.folder.join(path);
        let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{at}: {path}: {error}"));
        assert_eq!(text.matches(old).count(), 1, "{at}: not once in {path}:\n{old}\n{text}");
        std::fs::write(&file, text.replace(old, new)).expect("to write");
    }

    /// A shell in the current folder, with the variables that earlier commands have left.
    fn shell(&self, command: &str) -> Command {
        let state = self.state.path().display();
        // Variables outlive the command that sets them, as in a reader's own shell.
        let script = format!("exec 2>&1\nset -a\n. '{state}/variables'\n{}", self.with_free_ports(command));
        let mut shell = Command::new("bash");
        shell.args(["-c", &script]).current_dir(&self.folder).stdin(Stdio::null());
        shell
    }

    fn run(&mut self, at: &str, command: &str) -> (String, Option<i32>) {
        let state = self.state.path().display().to_string();
        let script =
            format!("{command}\ncode=$?\ndeclare -x > '{state}/variables'\npwd > '{state}/folder'\nexit $code");
        let output = self.shell(&script).output().unwrap_or_else(|error| panic!("{at}: bash: {error}"));
        let said = self.with_ports_of_the_page(&String::from_utf8_lossy(&output.stdout));
        let folder = std::fs::read_to_string(self.state.path().join("folder"))
            .unwrap_or_else(|error| panic!("{at}: `{command}` ended the shell: {error}\n{said}"));
        self.folder = PathBuf::from(folder.trim_end());
        (said, output.status.code())
    }

    fn compare(&self, at: &str, typed: &Typed, said: &str) {
        if typed.shown.is_empty() {
            return;
        }
        let shown: Vec<&str> = typed.shown.iter().map(|line| line.trim_end()).collect();
        let lines: Vec<&str> = said.lines().map(str::trim_end).collect();
        let lines = if lines.last() == Some(&"") { &lines[..lines.len() - 1] } else { &lines[..] };
        let expected = shown.join("\n");
        assert!(shows(&shown, lines), "{at}: `{}` says\n{said}\nand the page shows\n{expected}", typed.command);
    }

    fn start(&mut self, at: &str, name: &str, port: u16, typed: &Typed) {
        let mut process = Process::start(name, &mut self.shell(&format!("exec {}", typed.command)))
            .unwrap_or_else(|error| panic!("{at}: {error}"));
        let address = (Ipv4Addr::LOCALHOST, self.ports[&port]);
        let deadline = Instant::now() + DEADLINE;
        while TcpStream::connect(address).is_err() {
            assert!(process.is_running(), "{at}: `{}` has ended\n{}", typed.command, process.log());
            assert!(Instant::now() < deadline, "{at}: `{name}` does not listen\n{}", process.log());
            std::thread::sleep(Duration::from_millis(50));
        }
        self.compare(at, typed, &self.with_ports_of_the_page(&process.log()));
        self.running.insert(name.to_owned(), process);
    }

    fn with_free_ports(&self, text: &str) -> String {
        self.ports.iter().fold(text.to_owned(), |text, (page, free)| with_number(&text, *page, *free))
    }

    fn with_ports_of_the_page(&self, text: &str) -> String {
        self.ports.iter().fold(text.to_owned(), |text, (page, free)| with_number(&text, *free, *page))
    }
}

/// The text with another number wherever this one stands by itself.
fn with_number(text: &str, old: u16, new: u16) -> String {
    let old = old.to_string();
    let mut out = String::new();
    let mut copied = 0;
    for (start, _) in text.match_indices(&old) {
        let end = start + old.len();
        let is_part = |c: char| c.is_ascii_alphanumeric();
        if !text[..start].ends_with(is_part) && !text[end..].starts_with(is_part) {
            out.push_str(&text[copied..start]);
            out.push_str(&new.to_string());
            copied = end;
        }
    }
    out + &text[copied..]
}

/// A port below those that systems give to outgoing connections, so that nobody takes it by chance before it is used. Each
/// call gives another one.
fn free_port() -> u16 {
    static TRIED: AtomicU16 = AtomicU16::new(0);
    let first = u16::try_from(std::process::id() % 10_000).unwrap_or_default();
    let mut ports = (0..10_000).map(|_| 20_000 + (first + TRIED.fetch_add(1, Ordering::Relaxed) % 10_000) % 10_000);
    let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    ports.find(is_free).expect("a free port")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(page: &str, expected: Result<&[Step], &str>) {
        let parsed = Page::parse("page", page);
        match (&parsed, expected) {
            (Ok(page), Ok(steps)) => {
                assert!(page.steps.iter().map(|(_, step)| step).eq(steps), "{:#?}", page.steps);
            }
            (Err(error), Err(expected)) => assert_eq!(error, expected),
            _ => panic!("{parsed:#?}"),
        }
    }

    fn typed(command: &str, shown: &[&str]) -> Typed {
        Typed { command: command.to_owned(), shown: shown.iter().map(|line| (*line).to_owned()).collect() }
    }

    #[test]
    fn a_page_is_what_a_reader_types_writes_and_ends() {
        let page = "# a\n```console\n$ a b\nc\n$ d\n```\n<!-- exit: 1 -->\n\n```console\n$ e\n```\n<!-- file: f -->\n```yaml\ng: 1\n```\n\
                    <!-- change: f -->\n```diff\n a\n-b\n+c\n\n```\n<!-- in the background: x on 80 -->\n```console\n$ y\n```\n\
                    <!-- elsewhere -->\n<!-- Ctrl-C: x -->\n<!-- not run: needs a cluster -->\n```console\n$ rm\n```\n";
        let steps = [
            Step::Commands { commands: vec![typed("a b", &["c"]), typed("d", &[])], exit: 0 },
            Step::Commands { commands: vec![typed("e", &[])], exit: 1 },
            Step::File { path: "f".to_owned(), text: "g: 1\n".to_owned() },
            Step::Change { path: "f".to_owned(), old: "a\nb\n\n".to_owned(), new: "a\nc\n\n".to_owned() },
            Step::Background { name: "x".to_owned(), port: 80, typed: typed("y", &[]) },
            Step::Elsewhere,
            Step::Interrupt { name: "x".to_owned() },
        ];
        check(page, Ok(&steps));
    }

    #[test]
    fn nothing_on_a_page_is_left_out_by_accident() {
        check("```yaml\na: 1\n```\n", Err("page:1: what is a reader to do with this block (`yaml`)?"));
        check("```console\nls\n```\n", Err("page:1: a block of commands begins with `$ `"));
        check("<!-- file: a -->\ntext\n", Err("page:2: a block is missing after the comment"));
        check("text\n", Err("page: nothing on this page can be done"));
        let unknown = "page:1: this comment is none that the test knows, or the one before it has no block";
        check("<!-- what -->\n", Err(unknown));
    }

    #[test]
    fn dots_stand_for_any_lines_and_any_text() {
        let check = |shown: &str, said: &str, expected| {
            let (shown, said): (Vec<_>, Vec<_>) = (shown.lines().collect(), said.lines().collect());
            assert_eq!(shows(&shown, &said), expected, "{shown:?} {said:?}");
        };
        check("a\nb", "a\nb", true);
        check("a\nb", "a\nb\nc", false);
        check("a\n...\nb", "a\nx\ny\nb", true);
        check("a\n...\nb", "a\nb", true);
        check("a\n...", "b", false);
        check("x ... z", "x y z", true);
        check("x ... z", "x y", false);
        check("...", "", true);
    }

    #[test]
    fn ports_are_replaced_where_they_stand_alone() {
        assert_eq!(with_number("a:80 80 180 8080 x80, 80", 80, 9), "a:9 9 180 8080 x80, 9");
        assert_ne!(free_port(), free_port());
    }

    #[test]
    fn variables_and_folders_stay_from_command_to_command() {
        let folder = tempfile::tempdir().expect("a folder");
        let page = "<!-- file: sub/a.txt -->\n```text\none\ntwo\n```\n<!-- change: sub/a.txt -->\n```diff\n-one\n+1\n two\n```\n\
                    ```console\n$ A=\"it's\"\n$ cd sub\n$ echo $A; cat a.txt\nit's\n1\ntwo\n```\n\
                    <!-- exit: 3 -->\n```console\n$ (exit 3)\n```\n";
        let page = Page::parse("page", page).expect("a page");
        Reader::new(folder.path(), folder.path(), Vec::new()).follow(&page, |_, _, _| {});
    }

    #[test]
    #[should_panic(expected = "page:1: `echo a` says\na\n\nand the page shows\nb")]
    fn what_a_page_shows_must_be_what_is_said() {
        let folder = tempfile::tempdir().expect("a folder");
        let page = Page::parse("page", "```console\n$ echo a\nb\n```\n").expect("a page");
        Reader::new(folder.path(), folder.path(), Vec::new()).follow(&page, |_, _, _| {});
    }
}
