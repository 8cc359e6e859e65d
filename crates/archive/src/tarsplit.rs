//! Docker's tar-split: what an archive holds besides the contents of its files.

use std::fs::File;

use crate::tar::EntryPath;

/// Where a recording goes.
#[derive(Debug)]
pub enum Output {
    /// Into memory.
    Memory(Vec<u8>),
    /// Into a file, from its current position.
    File(File),
}

/// Why the extracted tree cannot give the archive back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unfaithful {
    /// A later entry of the archive takes the place of a file with content.
    #[error("{path} is replaced later in the same archive")]
    Replaced {
        /// The path that stands twice.
        path: EntryPath,
    },
}

/// Records an archive while a [`Reader`](crate::tar::Reader) goes through it.
#[derive(Debug)]
pub struct Recorder {
    output: Output,
}

/// A finished recording.
#[derive(Debug)]
pub struct Recorded {
    /// The gzipped JSON lines.
    pub output: Output,
    /// `None`: the archive can be assembled from this and the extracted files. Otherwise the
    /// recording is useless and the archive itself must be kept.
    pub unfaithful: Option<Unfaithful>,
    /// Records written.
    pub records_count: u64,
}

impl Recorder {
    /// Records into `output`.
    pub fn new(output: Output) -> Self {
        Self { output }
    }

    /// Records into memory.
    pub fn in_memory() -> Self {
        Self::new(Output::Memory(Vec::new()))
    }
}
