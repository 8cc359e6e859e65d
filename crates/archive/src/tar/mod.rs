//! The tar format: a strict [`Reader`], a deterministic [`Writer`], and the [`Entry`] between them.
//!
//! Formats read: v7, ustar, PAX (`x`, and `g` without effect), GNU (`L`, `K`, base-256 numbers), star's
//! prefix, and the four sparse formats. Written: ustar with PAX where that does not suffice.

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

/// Whether a block of 512 bytes is the header of an entry: what a file begins with if it is an archive.
pub fn is_header(block: &[u8; 512]) -> bool {
    header::format(block).is_ok()
}
