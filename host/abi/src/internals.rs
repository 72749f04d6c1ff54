//! Ways in for the fuzz targets in `tests/fuzz` and for `benches`, and for nobody else: no part of this crate's interface.

use crate::code::{CodeKey, SealedError};
use crate::engine::{Engine, EngineOptions, Module};
use crate::expression::Expression;
use crate::fields::FieldMap;
use crate::plugin::Plugin;
use crate::property::Attributes;
use crate::worker::Worker;
use crate::{pairs, signature};

/// Calls a plugin's tick, due or not, with nothing around it but what every callback has.
pub fn tick(worker: &mut Worker, plugin: usize) {
    worker.tick(plugin);
}

/// Reads a guest's map. What can be read is written again the same; says what happened.
pub fn pairs(blob: &[u8]) -> Result<usize, String> {
    let bounds = pairs::Bounds::ENVOY;
    let map = pairs::decode(blob, bounds)
        .map_err(|error| format!("{error:?}").split('(').next().unwrap_or_default().to_owned())?;
    assert!(map.len() <= bounds.pairs_max && map.byte_size() <= bounds.bytes_max);
    let mut written = Vec::new();
    pairs::encode(map.iter(), &mut written);
    assert_eq!(pairs::decode(&written, bounds), Ok(map.clone()), "written and read again");
    // Field names lose their case, and pseudo-headers come first; all else is as it was.
    let lines = |map: &FieldMap| map.iter().map(|(name, value)| (name.to_vec(), value.to_vec())).collect::<Vec<_>>();
    let size: usize = lines(&map).iter().map(|(name, value)| name.len() + value.len()).sum();
    assert_eq!(size, map.byte_size());
    Ok(map.len().min(8))
}

/// The encoding of a map.
pub fn encode_pairs(lines: &[(&[u8], &[u8])]) -> Vec<u8> {
    let map: FieldMap = lines.iter().copied().collect();
    let mut out = Vec::new();
    pairs::encode(map.iter(), &mut out);
    out
}

/// Runs `verify_signature` and `sign` on an argument. No signature here is a right one.
pub fn signatures(argument: &[u8]) -> (Option<usize>, Option<usize>) {
    let verified = signature::verify(argument).ok();
    assert!(verified.as_ref().is_none_or(|answer| answer.first() != Some(&0x08)), "a signature was taken for right");
    (verified.map(|answer| answer.len()), signature::sign(argument).ok().map(|answer| answer.len().min(80)))
}

/// Evaluates an expression of a plugin's, outside any stream. The error is its status.
pub fn expression(plugin: &Plugin, source: &[u8]) -> Result<usize, u32> {
    let mut out = Vec::new();
    let expression = Expression::parse(source).map_err(|refused| refused.status as u32)?;
    let evaluated = expression.evaluate(Attributes { plugin, stream: None }, &mut out);
    evaluated.map(|()| out.len().min(64)).map_err(|refused| refused.status as u32 + 100)
}

/// Whether sealed code is opened.
pub fn open_sealed(sealed: &[u8], key: &CodeKey) -> bool {
    thread_local! {
        static ENGINE: Option<Engine> = Engine::new(&EngineOptions::default()).ok();
    }
    ENGINE.with(|engine| {
        let engine = engine.as_ref().expect("an engine");
        let opened = Module::from_sealed(engine, b"\0asm\x01\0\0\0", sealed, key);
        assert!(matches!(opened, Err(SealedError::Forged)), "{opened:?}");
        opened.is_ok()
    })
}
