//! `portcullis.yaml`: its model, its mistakes, the policy that runs, and the Envoy configuration that enforces
//! the same.
//!
//! ```text
//! portcullis.yaml --load/compile--> Policy --> host: Policy::route, Policy::filters, ...
//!        |                            \------> envoy::render_bootstrap
//!        \--> Mistakes (all of them: file, line, column, setting, problem, hint)
//! ```
//!
//! * [`load`] reads a policy file, [`compile`] takes its text and a [`Files`] to read what it names. Both collect
//!   every mistake. Nothing else here does I/O.
//! * [`mod@file`] is the file as written, with the documentation of every setting. [`Policy`] is what runs: names
//!   resolved to indices, files read, defaults filled in. There is no other way to make one.
//! * [`Target::parse`] normalises a request target, once, before anything looks at it; [`Policy::route`] finds
//!   the route; [`Route::upstream_target`] is the path that the upstream sees. All pure, on bytes.
//! * [`envoy`] renders the policy for Envoy, with notes on what Envoy cannot enforce.
//! * [`mod@reference`] makes the JSON Schema and the reference page from the doc comments in [`mod@file`].
//!
//! A host that embeds this keeps to the following. A target that [`Target::parse`] refuses and an authority that
//! [`normal_authority`] refuses get 400; a request that no route matches gets 404; none of them meets a filter. The
//! filters of a route are those of [`Policy::filters`] whose indices it names, in that order. The upstream sees
//! [`Route::upstream_target`] and, as the authority, `host_rewrite` or what [`normal_authority`] made of the
//! client's. For a target in absolute-form (RFC 9112, section 3.2.2), path and query are the target and its
//! authority replaces `host`.

mod capabilities;
mod compile;
pub mod envoy;
pub mod file;
mod files;
mod mistake;
mod policy;
mod read;
pub mod reference;
mod route;
mod target;
mod units;
mod yaml;

pub use capabilities::{CALLBACKS, FOREIGN_FUNCTIONS, HOST_FUNCTIONS};
pub use compile::{compile, load};
pub use file::{
    FailurePolicy, FilterLimits, Isolation, LogFormat, LogLevel, Logging, OperatorEngine, OperatorLimits, Protocol,
    Replicas,
};
pub use files::{Files, Folder, InMemory};
pub use mistake::{Mistake, Mistakes, Position};
pub use policy::{
    Authorities, Bytes, CodeCache, Endpoint, Filter, HostPort, Listener, ListenerLimits, ListenerTls, NamePattern,
    Network, Operator, OperatorHost, OperatorSecret, Policy, RequestParts, Secret, SecretSource, Service, TcpForward,
    Upstream, UpstreamTls,
};
pub use route::{
    Action, FieldCondition, FieldLines, FieldTest, HostPattern, PathPattern, PathRewrite, Response, Route, Segment,
    host_of, normal_authority,
};
pub use target::{Target, TargetRefused};
pub use units::{Size, Time};
