//! Guests' code: compiled within bounds, kept on disk between starts.
//!
//! [`Loader`] turns a `.wasm` file into a [`portcullis_abi::Module`]. What it compiles it keeps in a [`Cache`], if there is
//! one: a folder of our own, in which every entry carries a seal made with a key that lies beside it. An entry without the
//! right seal is compiled anew; so is everything where no such folder can be had. A cache never makes a load fail.
//!
//! Why it is safe to execute what lies in a folder: docs/decisions/0040.

mod cache;
mod directory;
mod loader;
mod place;
pub mod process;

pub use cache::{Cache, CacheSettings};
pub use directory::Unusable;
pub use loader::{Counts, LoadError, LoadLimits, Loaded, Loader, LoaderSettings, Source};
pub use place::{VARIABLE, default_directory};
