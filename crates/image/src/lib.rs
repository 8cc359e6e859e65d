//! Docker's model over the store: layers by chain, images by config digest, and the cache that reads histories.
//!
//! ```text
//! layerstore/        chain ID -> layer, with references, holds and parents; writable layers by name
//! images.rs          image ID -> image, and the names that point at them
//! history_cache.rs   which image a build step could have come from; pure functions
//! ```
//!
//! Nothing here knows the build cache. There are no locks: whoever changes something does so in the transaction that he
//! is given, or in one of his own.

mod check;
pub mod history_cache;
mod images;
mod layerstore;

pub use check::check;
pub use images::*;
pub use layerstore::*;
