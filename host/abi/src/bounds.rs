//! [`ModuleLimits`]: what a module may hold, looked at before anything is compiled.
//!
//! One pass over the headers of its sections, which takes time in proportion to the file. These bounds keep what is declared in a few
//! bytes from costing megabytes; they do not bound the compiler, for which some kilobytes of code can be work for hours. That
//! takes a limit on time and memory (see `host/code`).

use wasmparser::{Parser, Payload};

use crate::engine::ModuleError;

/// What a module may hold when it is loaded.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ModuleLimits {
    /// Bytes of the `.wasm` file. Default 32 MiB: Go guests have 1 to 4 MiB, and compiling takes memory in proportion.
    pub module_bytes_max: usize,
    /// Bytes of linear memory that it may begin with. Default: no bound of its own; a plugin's limit holds when it starts.
    pub memory_bytes_max: u64,
    /// Functions of its own. Default 200,000: a Go guest has some ten thousand.
    pub functions_max: u32,
    /// Bytes of one function's code. Default 1 MiB: the largest of real modules have a few hundred KiB.
    pub function_bytes_max: usize,
    /// Imports. Default 1,000: this host has some hundred functions to import.
    pub imports_max: u32,
    /// Exports. Default 10,000.
    pub exports_max: u32,
    /// Globals. Default 10,000: compilers use a few.
    pub globals_max: u32,
    /// Tables, and memories. Default 100 each: compilers use one.
    pub tables_max: u32,
    /// Data segments, and element segments. Default 100,000 each: TinyGo writes one for each string.
    pub segments_max: u32,
}

impl Default for ModuleLimits {
    fn default() -> ModuleLimits {
        ModuleLimits {
            module_bytes_max: 32 * 1024 * 1024,
            memory_bytes_max: u64::MAX,
            functions_max: 200_000,
            function_bytes_max: 1024 * 1024,
            imports_max: 1_000,
            exports_max: 10_000,
            globals_max: 10_000,
            tables_max: 100,
            segments_max: 100_000,
        }
    }
}

/// Bytes of a page of linear memory.
const PAGE: u64 = 65536;

impl ModuleLimits {
    /// Whether a module may be compiled at all. What is not WebAssembly passes; the compiler says so better.
    ///
    /// # Errors
    /// The limit that it is above.
    pub fn check(&self, wasm: &[u8]) -> Result<(), ModuleError> {
        if wasm.len() > self.module_bytes_max {
            return Err(ModuleError::TooLarge { bytes: wasm.len(), max: self.module_bytes_max });
        }
        let many = |what, count, max| match count <= max {
            true => Ok(()),
            false => Err(ModuleError::TooMany { what, count: u64::from(count), max: u64::from(max) }),
        };
        let mut number = 0u32;
        for payload in Parser::new(0).parse_all(wasm).map_while(Result::ok) {
            match payload {
                Payload::ImportSection(section) => many("imports", section.count(), self.imports_max)?,
                Payload::FunctionSection(section) => many("functions", section.count(), self.functions_max)?,
                Payload::ExportSection(section) => many("exports", section.count(), self.exports_max)?,
                Payload::GlobalSection(section) => many("globals", section.count(), self.globals_max)?,
                Payload::TableSection(section) => many("tables", section.count(), self.tables_max)?,
                Payload::ElementSection(section) => many("element segments", section.count(), self.segments_max)?,
                Payload::DataSection(section) => many("data segments", section.count(), self.segments_max)?,
                Payload::MemorySection(section) => {
                    many("memories", section.count(), self.tables_max)?;
                    let memories = section.into_iter().map_while(Result::ok);
                    let pages = memories.map(|memory| memory.initial).fold(0, u64::saturating_add);
                    let bytes = pages.saturating_mul(PAGE);
                    if bytes > self.memory_bytes_max {
                        return Err(ModuleError::MemoryTooLarge { bytes, max: self.memory_bytes_max });
                    }
                }
                Payload::CodeSectionEntry(body) => {
                    let bytes = body.range().len();
                    if bytes > self.function_bytes_max {
                        return Err(ModuleError::FunctionTooLarge { number, bytes, max: self.function_bytes_max });
                    }
                    number += 1;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(wat: &str, change: impl FnOnce(&mut ModuleLimits)) -> Result<(), String> {
        let mut limits = ModuleLimits::default();
        change(&mut limits);
        limits.check(&wat::parse_str(wat).expect("WAT")).map_err(|error| error.to_string())
    }

    #[test]
    fn what_a_module_declares_is_counted() {
        let three = |each: &str| format!("(module (memory 1) (table 1 funcref) (func) {})", each.repeat(3));
        type Change = fn(&mut ModuleLimits, u32);
        let cases: [(&str, String, Change); 8] = [
            ("imports", "(module (import \"a\" \"b\" (func)) (import \"a\" \"c\" (func)))".into(), |l, n| {
                l.imports_max = n;
            }),
            ("functions", "(module (func) (func))".into(), |l, n| l.functions_max = n),
            ("exports", "(module (func) (export \"a\" (func 0)) (export \"b\" (func 0)))".into(), |l, n| {
                l.exports_max = n;
            }),
            ("globals", "(module (global i32 (i32.const 0)) (global i32 (i32.const 0)))".into(), |l, n| {
                l.globals_max = n;
            }),
            ("tables", "(module (table 1 funcref) (table 1 funcref))".into(), |l, n| l.tables_max = n),
            ("memories", "(module (memory 1) (memory 1))".into(), |l, n| l.tables_max = n),
            ("data segments", three("(data (i32.const 0) \"x\")"), |l, n| l.segments_max = n + 1),
            ("element segments", three("(elem (i32.const 0) 0)"), |l, n| l.segments_max = n + 1),
        ];
        for (what, wat, set) in cases {
            assert_eq!(check(&wat, |limits| set(limits, 2)), Ok(()), "{what}");
            let error = check(&wat, |limits| set(limits, 1)).unwrap_err();
            let count = if what.ends_with("segments") { 3 } else { 2 };
            let expected = format!("the module has {count} {what}, more than the {} allowed\n  hint: ", count - 1);
            assert!(error.starts_with(&expected), "{error}");
        }
    }

    #[test]
    fn a_function_is_bounded_by_itself() {
        let wat = format!("(module (func) (func {}))", "nop ".repeat(100));
        assert_eq!(check(&wat, |limits| limits.function_bytes_max = 102), Ok(()));
        let error = check(&wat, |limits| limits.function_bytes_max = 101).unwrap_err();
        assert!(
            error.starts_with("function 1 of the module has 102 bytes, more than the 101 allowed\n  hint: "),
            "{error}"
        );
    }

    #[test]
    fn the_memory_that_a_module_begins_with_is_bounded() {
        let wat = "(module (memory 2) (memory 1 9))";
        assert_eq!(check(wat, |limits| limits.memory_bytes_max = 3 * PAGE), Ok(()));
        let error = check(wat, |limits| limits.memory_bytes_max = 3 * PAGE - 1).unwrap_err();
        let expected = "the module begins with 196608 bytes of memory, more than the 196607 allowed\n  hint: ";
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn what_is_cut_off_or_junk_is_left_to_the_compiler() {
        let wasm = wat::parse_str("(module (func) (func) (memory 1))").expect("WAT");
        for len in 0..wasm.len() {
            assert!(ModuleLimits::default().check(&wasm[..len]).is_ok(), "{len}");
        }
        assert!(ModuleLimits::default().check(b"junk").is_ok());
    }
}
