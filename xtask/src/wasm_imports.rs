//! Reads which functions a WebAssembly module imports: what a filter may ask of its host.
//!
//! Follows the binary format of the WebAssembly core specification, section 5.5, as far as the import section (5.5.5).

use std::fmt;

/// An import, shown as `module.name`, with its kind unless it is a function.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Import {
    pub(crate) module: String,
    pub(crate) name: String,
    pub(crate) kind: Kind,
}

/// What is imported.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Function,
    Table,
    Memory,
    Global,
    Tag,
}

impl fmt::Display for Import {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.module, self.name)?;
        match self.kind {
            Kind::Function => Ok(()),
            other => write!(f, " ({other:?})"),
        }
    }
}

const IMPORT_SECTION: u8 = 2;

/// The imports of a module, sorted; `None` if the bytes are not a module.
pub(crate) fn imports(module: &[u8]) -> Option<Vec<Import>> {
    let mut bytes = Reader(module.strip_prefix(b"\0asm\x01\0\0\0")?);
    while !bytes.0.is_empty() {
        let id = bytes.byte()?;
        let length = bytes.length()?;
        let content = bytes.take(length)?;
        if id == IMPORT_SECTION {
            let mut found = import_section(&mut Reader(content))?;
            found.sort();
            return Some(found);
        }
    }
    Some(Vec::new())
}

fn import_section(bytes: &mut Reader<'_>) -> Option<Vec<Import>> {
    (0..bytes.length()?)
        .map(|_| {
            let (module, name) = (bytes.name()?, bytes.name()?);
            let kind = match bytes.byte()? {
                0 => {
                    bytes.length()?;
                    Kind::Function
                }
                1 => {
                    bytes.byte()?;
                    bytes.limits()?;
                    Kind::Table
                }
                2 => {
                    bytes.limits()?;
                    Kind::Memory
                }
                3 => {
                    bytes.take(2)?;
                    Kind::Global
                }
                4 => {
                    bytes.byte()?;
                    bytes.length()?;
                    Kind::Tag
                }
                _ => return None,
            };
            Some(Import { module, name, kind })
        })
        .collect()
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    /// An unsigned LEB128 integer of at most 32 bits (5.2.2).
    fn length(&mut self) -> Option<usize> {
        let mut value = 0_u64;
        for shift in [0, 7, 14, 21, 28] {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return u32::try_from(value).ok()?.try_into().ok();
            }
        }
        None
    }

    fn name(&mut self) -> Option<String> {
        let length = self.length()?;
        String::from_utf8(self.take(length)?.to_vec()).ok()
    }

    fn limits(&mut self) -> Option<()> {
        let has_maximum = self.byte()? & 1 == 1;
        self.length()?;
        if has_maximum {
            self.length()?;
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(sections: &[(u8, &[u8])]) -> Vec<u8> {
        let mut bytes = b"\0asm\x01\0\0\0".to_vec();
        for (id, content) in sections {
            bytes.push(*id);
            bytes.push(u8::try_from(content.len()).unwrap());
            bytes.extend_from_slice(content);
        }
        bytes
    }

    #[test]
    fn every_kind_of_import_is_read() {
        let section = [
            b"\x05".as_slice(),
            b"\x03env\x09proxy_log\x00\x80\x01", // a function of type 128
            b"\x01a\x01t\x01\x70\x01\x00\x10",   // a table of funcref, 0 to 16
            b"\x01a\x01m\x02\x00\x01",           // a memory from 1 page
            b"\x01a\x01g\x03\x7f\x00",           // a constant i32
            b"\x01a\x01e\x04\x00\x02",           // a tag of type 2
        ]
        .concat();
        let found = imports(&module(&[(1, b"\0"), (2, &section)])).unwrap();
        let shown: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["a.e (Tag)", "a.g (Global)", "a.m (Memory)", "a.t (Table)", "env.proxy_log"]);
    }

    #[test]
    fn module_without_imports_has_none() {
        assert_eq!(imports(&module(&[(1, b"\0")])), Some(Vec::new()));
    }

    #[test]
    fn what_is_not_a_module_is_refused() {
        assert_eq!(imports(b"\x7fELF"), None);
        assert_eq!(imports(&module(&[(2, b"\x01\x03env")])), None, "cut short");
        assert_eq!(imports(b"\0asm\x01\0\0\0\x02\xff\xff\xff\xff\xff"), None, "length of more than 32 bits");
    }
}
