use std::io;
use std::path::{Path, PathBuf};

use plies_oci::ErrorKind;

/// A system call on one of the store's own files failed.
///
/// The common leaf of the error families of this crate: what was done, to which path; the
/// operating system's words are in `source()`.
#[derive(Debug, thiserror::Error)]
#[error("{op} {}", path.display())]
pub struct FileError {
    /// What was done, as a verb: "open", "rename", …
    pub op: &'static str,
    /// The path it was done to, as far as it is known; below the store's root unless absolute.
    pub path: PathBuf,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

impl FileError {
    pub(crate) fn new(op: &'static str, path: impl AsRef<Path>, source: impl Into<io::Error>) -> Self {
        Self { op, path: path.as_ref().to_owned(), source: source.into() }
    }

    /// Always [`ErrorKind::Unavailable`]: the file system did not do its part. A file that is
    /// missing although a row names it is reported by its own variant, as data loss.
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::Unavailable
    }
}

/// Adds the operation and the path to a failed system call.
pub(crate) trait At<T> {
    fn at(self, op: &'static str, path: impl AsRef<Path>) -> Result<T, FileError>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, op: &'static str, path: impl AsRef<Path>) -> Result<T, FileError> {
        self.map_err(|source| FileError::new(op, path, source))
    }
}
