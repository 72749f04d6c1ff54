//! What a policy may ask of the proxy that runs it. To be without an answer is normal: hosts differ.

/// The proxy, as far as a policy can ask it. The adapter answers in a filter; a table answers in tests.
pub trait Host {
    /// A property such as `["source", "address"]`, in the host's encoding; `None` where it is not known.
    fn property(&self, path: &[&str]) -> Option<Vec<u8>>;

    /// Calls one of the host's own functions, such as `verify_signature`.
    fn call_foreign_function(&self, name: &str, argument: &[u8]) -> Result<Vec<u8>, ForeignCallError>;
}

/// Why a function of the host gave no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForeignCallError {
    /// The host has no function of this name, or does not let the filter call it, and will not later either.
    Absent,
    /// The host has the function but did not take the argument.
    Refused,
}
