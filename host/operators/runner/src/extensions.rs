//! Of which parts an isolate is made, the same for the snapshot and for the process that starts from it.
//!
//! deno_core, deno_web and deno_crypto bring operations for more than operators have (other isolates, files, terminals).
//! What is not in `ops.txt` does not exist in an isolate, or throws.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::{Arc, LazyLock};

use deno_core::{Extension, ExtensionFileSource, OpDecl};
use deno_web::{BlobStore, InMemoryBroadcastChannel};

use crate::ops;

/// Every operation that an isolate can reach, with its reason.
pub(crate) const OPS: &str = include_str!("../ops.txt");

/// Whether an isolate may reach an operation. Asked several hundred times for each isolate.
pub(crate) fn is_listed(name: &str) -> bool {
    static LISTED: LazyLock<HashSet<&str>> =
        LazyLock::new(|| OPS.lines().filter_map(|line| line.split_whitespace().next()).collect());
    LISTED.contains(name)
}

/// All extensions in their order. Scripts belong into a snapshot only; `take_scripts` gets them there.
pub(crate) fn extensions(
    mut take_scripts: impl FnMut(&'static str, Cow<'static, [ExtensionFileSource]>),
) -> Vec<Extension> {
    let web =
        deno_web::deno_web::init(Arc::new(BlobStore::default()), None, false, InMemoryBroadcastChannel::default());
    let mut extensions =
        vec![deno_webidl::deno_webidl::init(), web, deno_crypto::deno_crypto::init(None), ops::portcullis::init()];
    for extension in &mut extensions {
        let listed = |op: &&OpDecl| is_listed(op.name);
        extension.ops = Cow::Owned(extension.ops.iter().filter(listed).copied().collect());
        let classes = extension.objects.iter().filter(|class| is_listed(class.name.1.as_str()));
        extension.objects = Cow::Owned(classes.copied().collect());
        extension.js_files = Cow::Borrowed(&[]);
        extension.esm_files = Cow::Borrowed(&[]);
        extension.lazy_loaded_esm_files = Cow::Borrowed(&[]);
        take_scripts(extension.name, std::mem::take(&mut extension.lazy_loaded_js_files));
    }
    // deno_core's own operations cannot be left out, so those that are not listed throw when they are called.
    if let Some(ours) = extensions.last_mut() {
        ours.middleware_fn = Some(Box::new(|op| match op.name {
            "op_now" => op.with_implementation_from(&ops::op_operator_now()),
            "op_dispatch_exception" => op.with_implementation_from(&ops::op_operator_exception()),
            name if is_listed(name) => op,
            _ => op.disable(),
        }));
    }
    extensions
}
