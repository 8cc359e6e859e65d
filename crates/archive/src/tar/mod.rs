//! The tar format.

mod entry;
mod error;

pub use entry::{Device, Entry, EntryKind, EntryPath, Escaped, SparseRun, Timestamp};
pub use error::TarError;
