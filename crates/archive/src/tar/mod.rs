//! The tar format.

mod entry;
mod error;
mod reader;
mod writer;

pub use entry::{Device, Entry, EntryKind, EntryPath, Escaped, SparseRun, Timestamp};
pub use error::TarError;
pub use reader::{EntryData, Finished, Reader};
pub use writer::{WriteError, Writer};
