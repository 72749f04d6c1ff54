//! Proxy-Wasm ABI 0.2.1 for wasmtime, without I/O.
