//! The tar format.

mod entry;
mod error;
mod header;
mod pax;
mod reader;
mod sparse;
mod writer;

pub use entry::{Device, Entry, EntryKind, EntryPath, Escaped, SparseRun, Timestamp};
pub use error::TarError;
pub use reader::{EntryData, Finished, Reader};
pub use writer::{WriteError, Writer};
