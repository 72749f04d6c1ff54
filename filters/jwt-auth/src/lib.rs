//! OAuth 2.0 resource server: checks signed JSON Web Tokens (RFC 6750, 7515 to 7519, 8725, 9068).
//!
//! [`config`] says what a configuration means, [`policy`] decides about a request. A token is read by [`token`], its
//! signature is checked by [`signature`] against the keys in [`jwks`], and what it claims by [`claims`]; only [`verify`]
//! can put these together into a [`verify::Verified`] token. Keys are those in the configuration; none is ever fetched
//! or taken from a token.

pub mod budget;
pub mod cache;
pub mod claims;
pub mod config;
pub mod jwks;
pub mod policy;
pub mod signature;
pub mod token;
pub mod verify;

pub use policy::JwtAuth;

portcullis_kit::export!(JwtAuth);
