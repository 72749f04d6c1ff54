//! What the snapshot is made of, so that a program never starts from the snapshot of other sources.
//!
//! Cargo tells by their age whether files have changed. Where that misleads it (a target folder that two checkouts share,
//! sources unpacked with the age that they had elsewhere), it may put an older snapshot into a newer program. Operations
//! are numbered alike in both, so such a program would call one for another.

const SOURCES: [&[u8]; 10] = [
    include_bytes!("../js/bodies.js"),
    include_bytes!("../js/fetch.js"),
    include_bytes!("../js/globals.js"),
    include_bytes!("../js/http_client.js"),
    include_bytes!("../js/main.js"),
    include_bytes!("../js/serve.js"),
    include_bytes!("../ops.txt"),
    include_bytes!("bridge.rs"),
    include_bytes!("extensions.rs"),
    include_bytes!("ops.rs"),
];

/// FNV-1a over all of them: enough to tell versions apart, and computed while compiling.
pub(crate) const DIGEST: u64 = {
    let mut digest = 0xcbf2_9ce4_8422_2325_u64;
    let mut at = 0;
    while at < SOURCES.len() {
        let mut byte = 0;
        while byte < SOURCES[at].len() {
            digest = (digest ^ SOURCES[at][byte] as u64).wrapping_mul(0x0100_0000_01b3);
            byte += 1;
        }
        at += 1;
    }
    digest
};
