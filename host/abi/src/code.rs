//! Compiled code that leaves the process: sealed when it goes, opened only if the seal is ours.
//!
//! Loading compiled code is executing it, so wasmtime's own check of such bytes is not enough: it tells another version
//! from this one, not a forgery from the original. What this module writes therefore carries a message authentication
//! code (HMAC with SHA-256, RFC 2104) over the code, the module it was made from, and the compiler that made it. Bytes
//! without the right code are refused before wasmtime sees them. Where the bytes and the key are kept is the embedder's
//! affair (see `host/code`); this crate does no I/O.
//!
//! `unsafe` is allowed here for one call, wasmtime's `Module::deserialize`, which trusts its argument.
#![expect(unsafe_code, reason = "loading what was compiled before; the seal is checked first")]

use std::fmt;
use std::hash::{Hash as _, Hasher};

use ring::hmac;
use sha2::{Digest, Sha256};

use crate::bounds::ModuleLimits;
use crate::engine::{Engine, Module, ModuleError};

/// What every sealed code begins with: what it is, and the version of this layout.
const MAGIC: &[u8] = b"portcullis sealed code 1\n";
/// Bytes of a seal.
const SEAL_LEN: usize = 32;

/// The secret by which a host knows compiled code for its own. Whoever has it can make the host execute anything.
#[derive(Clone)]
pub struct CodeKey(hmac::Key);

impl CodeKey {
    /// Bytes of a secret.
    pub const LEN: usize = 32;

    /// The key made of a secret, which nobody must be able to guess or read.
    pub fn new(secret: &[u8; CodeKey::LEN]) -> CodeKey {
        CodeKey(hmac::Key::new(hmac::HMAC_SHA256, secret))
    }
}

/// What a seal is made over. Every part has a fixed length, so no two (compiler, module, code) give the same bytes.
fn sealed_bytes(compiler: &[u8; 32], wasm: &[u8; 32], code: &[u8]) -> Vec<u8> {
    let code: [u8; 32] = Sha256::digest(code).into();
    [MAGIC, compiler, wasm, &code].concat()
}

impl fmt::Debug for CodeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CodeKey")
    }
}

/// Why sealed code cannot be used. None of it is dangerous: compile the module anew.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealedError {
    /// The bytes are cut off, changed, made from another module, by another compiler or for another machine, or sealed
    /// with another key. Which of these cannot be told.
    #[error("it does not carry our seal for this module and this compiler")]
    Forged,
    /// The seal is right, and wasmtime refuses the code all the same.
    #[error("wasmtime does not take it back: {0:#}")]
    Refused(wasmtime::Error),
    /// The code is ours, but the module is no plugin.
    #[error(transparent)]
    Module(#[from] ModuleError),
}

impl Engine {
    /// What tells apart compilers whose code must not be mixed: wasmtime's version, its settings, the processor.
    pub fn compiler_id(&self) -> [u8; 32] {
        let mut hasher = Sha256Hasher(Sha256::new());
        self.wasmtime.precompile_compatibility_hash().hash(&mut hasher);
        hasher.0.finalize().into()
    }

    /// Compiles a module and seals the code, for [`Module::from_sealed`] in this process or another.
    ///
    /// # Errors
    /// Where [`Module::from_bytes`] fails for the module's size or validity. Whether it is a plugin is not looked at.
    pub fn compile_sealed(&self, wasm: &[u8], limits: &ModuleLimits, key: &CodeKey) -> Result<Vec<u8>, ModuleError> {
        limits.check(wasm)?;
        let code = self.wasmtime.precompile_module(wasm).map_err(ModuleError::Invalid)?;
        Ok(self.seal(wasm, &code, key))
    }

    /// Seals with another key what [`Engine::compile_sealed`] made of `wasm`: whoever compiles need not have the key of those
    /// who keep.
    ///
    /// # Errors
    /// Where the bytes are not exactly that.
    pub fn seal_again(&self, wasm: &[u8], sealed: &[u8], from: &CodeKey, to: &CodeKey) -> Result<Vec<u8>, SealedError> {
        Ok(self.seal(wasm, self.unseal(&Sha256::digest(wasm).into(), sealed, from)?, to))
    }

    fn seal(&self, wasm: &[u8], code: &[u8], key: &CodeKey) -> Vec<u8> {
        let seal = hmac::sign(&key.0, &sealed_bytes(&self.compiler_id(), &Sha256::digest(wasm).into(), code));
        [MAGIC, seal.as_ref(), code].concat()
    }

    /// The code under the seal, if the seal is right.
    fn unseal<'a>(&self, wasm: &[u8; 32], sealed: &'a [u8], key: &CodeKey) -> Result<&'a [u8], SealedError> {
        let (seal, code) =
            sealed.strip_prefix(MAGIC).and_then(|rest| rest.split_at_checked(SEAL_LEN)).ok_or(SealedError::Forged)?;
        let bytes = sealed_bytes(&self.compiler_id(), wasm, code);
        hmac::verify(&key.0, &bytes, seal).map_err(|_| SealedError::Forged)?;
        Ok(code)
    }
}

impl Module {
    /// Takes back what [`Engine::compile_sealed`] made of `wasm`, without compiling.
    ///
    /// # Errors
    /// Where the bytes are not exactly that, or the module is no plugin this host can run.
    pub fn from_sealed(engine: &Engine, wasm: &[u8], sealed: &[u8], key: &CodeKey) -> Result<Module, SealedError> {
        let sha256: [u8; 32] = Sha256::digest(wasm).into();
        let code = engine.unseal(&sha256, sealed, key)?;
        // SAFETY: `deserialize` must be given nothing but what wasmtime itself has serialised, unmodified. The seal was
        // just verified over these very bytes, which are borrowed and so cannot change meanwhile; only
        // `compile_sealed` makes seals, over what wasmtime returned, and `seal_again` of such; and the key is a secret of those who call it.
        let module = unsafe { wasmtime::Module::deserialize(&engine.wasmtime, code) }.map_err(SealedError::Refused)?;
        Ok(Module::checked(engine, &module, sha256)?)
    }
}

/// Feeds what wasmtime hashes to SHA-256, whose result is the same in every process.
struct Sha256Hasher(Sha256);

impl Hasher for Sha256Hasher {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        let digest: [u8; 32] = self.0.clone().finalize().into();
        u64::from_le_bytes([digest[0], digest[1], digest[2], digest[3], digest[4], digest[5], digest[6], digest[7]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::EngineOptions;

    fn plugin(byte: u8) -> Vec<u8> {
        wat::parse_str(format!(
            r#"(module (memory (export "memory") 1) (data (i32.const 0) "{}")
                 (func (export "malloc") (param i32) (result i32) (i32.const 8))
                 (func (export "proxy_abi_version_0_2_1")))"#,
            char::from(byte)
        ))
        .expect("WAT")
    }

    fn engine(stack_bytes_max: usize) -> Engine {
        Engine::new(&EngineOptions { stack_bytes_max }).expect("an engine")
    }

    fn key(byte: u8) -> CodeKey {
        CodeKey::new(&[byte; CodeKey::LEN])
    }

    fn forged(result: &Result<Module, SealedError>) -> bool {
        matches!(result, Err(SealedError::Forged))
    }

    #[test]
    fn code_comes_back_as_the_module_it_was_made_from() {
        let (engine, wasm) = (engine(512 * 1024), plugin(b'a'));
        let sealed = engine.compile_sealed(&wasm, &ModuleLimits::default(), &key(1)).expect("sealed");
        let again = Module::from_sealed(&engine, &wasm, &sealed, &key(1)).expect("opened");
        let compiled = Module::from_bytes(&engine, &wasm, &ModuleLimits::default()).expect("compiled");
        assert_eq!(
            (again.sha256(), again.abi(), again.imports()),
            (compiled.sha256(), compiled.abi(), compiled.imports())
        );
        let other_process = self::engine(512 * 1024);
        assert!(Module::from_sealed(&other_process, &wasm, &sealed, &key(1)).is_ok(), "another engine alike");
    }

    #[test]
    fn a_single_changed_bit_anywhere_is_refused() {
        let (engine, wasm) = (engine(512 * 1024), plugin(b'a'));
        let sealed = engine.compile_sealed(&wasm, &ModuleLimits::default(), &key(1)).expect("sealed");
        // Every byte of the frame, and bytes all over the code.
        let places = (0..MAGIC.len() + SEAL_LEN + 64).chain((0..sealed.len()).step_by(997)).chain([sealed.len() - 1]);
        for place in places {
            let mut changed = sealed.clone();
            changed[place] ^= 1;
            assert!(forged(&Module::from_sealed(&engine, &wasm, &changed, &key(1))), "byte {place}");
        }
    }

    #[test]
    fn cut_off_extended_and_empty_bytes_are_refused() {
        let (engine, wasm) = (engine(512 * 1024), plugin(b'a'));
        let sealed = engine.compile_sealed(&wasm, &ModuleLimits::default(), &key(1)).expect("sealed");
        for len in [0, 1, MAGIC.len(), MAGIC.len() + SEAL_LEN - 1, MAGIC.len() + SEAL_LEN, sealed.len() - 1] {
            assert!(forged(&Module::from_sealed(&engine, &wasm, &sealed[..len], &key(1))), "{len} bytes");
        }
        let longer = [&sealed[..], b"\0"].concat();
        assert!(forged(&Module::from_sealed(&engine, &wasm, &longer, &key(1))));
        // What wasmtime itself would take.
        let bare = engine.wasmtime.precompile_module(&wasm).expect("code");
        assert!(forged(&Module::from_sealed(&engine, &wasm, &bare, &key(1))));
    }

    #[test]
    fn code_of_another_key_module_or_compiler_is_refused() {
        let (here, wasm) = (engine(512 * 1024), plugin(b'a'));
        let sealed = here.compile_sealed(&wasm, &ModuleLimits::default(), &key(1)).expect("sealed");
        assert!(forged(&Module::from_sealed(&here, &wasm, &sealed, &key(2))), "key");
        assert!(forged(&Module::from_sealed(&here, &plugin(b'b'), &sealed, &key(1))), "module");
        let elsewhere = Engine::with_version("another compiler").expect("an engine");
        assert_ne!(here.compiler_id(), elsewhere.compiler_id());
        assert!(forged(&Module::from_sealed(&elsewhere, &wasm, &sealed, &key(1))), "compiler");
    }

    #[test]
    fn sealed_code_that_is_no_plugin_is_refused_as_a_module_would_be() {
        let engine = engine(512 * 1024);
        let wasm = b"\0asm\x01\0\0\0";
        let sealed = engine.compile_sealed(wasm, &ModuleLimits::default(), &key(1)).expect("sealed");
        let refused = Module::from_sealed(&engine, wasm, &sealed, &key(1));
        assert!(matches!(refused, Err(SealedError::Module(ModuleError::NoAbiVersion))), "{refused:?}");
    }

    #[test]
    fn only_what_is_sealed_is_sealed_again() {
        let (engine, wasm) = (engine(512 * 1024), plugin(b'a'));
        let sealed = engine.compile_sealed(&wasm, &ModuleLimits::default(), &key(1)).expect("sealed");
        let again = engine.seal_again(&wasm, &sealed, &key(1), &key(2)).expect("sealed again");
        assert!(Module::from_sealed(&engine, &wasm, &again, &key(2)).is_ok());
        assert!(forged(&Module::from_sealed(&engine, &wasm, &again, &key(1))));
        let mut changed = sealed.clone();
        *changed.last_mut().expect("bytes") ^= 1;
        for (wasm, sealed, from) in [(&wasm, &changed, 1), (&wasm, &sealed, 3), (&plugin(b'b'), &sealed, 1)] {
            let refused = engine.seal_again(wasm, sealed, &key(from), &key(2));
            assert!(matches!(refused, Err(SealedError::Forged)));
        }
    }

    #[test]
    fn a_key_is_not_shown() {
        assert_eq!(format!("{:?}", key(7)), "CodeKey");
    }
}
