//! Compression of layer blobs.

use std::io;

use plies_oci::ErrorKind;

use crate::limits::LimitExceeded;

/// Why compressed bytes could not be read. Travels inside an [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Not what the format allows: damaged, cut short, or followed by something else.
    #[error("corrupt {format} stream")]
    Corrupt {
        /// `gzip` or `zstd`.
        format: &'static str,
        /// The decompressor's error.
        #[source]
        source: io::Error,
    },
    /// A limit was hit.
    #[error(transparent)]
    Limit(#[from] LimitExceeded),
}

impl DecodeError {
    /// What a caller can do about an error of a reader that may be one of ours.
    pub fn kind_of(error: &io::Error) -> ErrorKind {
        match error.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(Self::Limit(_)) => ErrorKind::Limit,
            Some(Self::Corrupt { .. }) => ErrorKind::DataLoss,
            None => ErrorKind::Unavailable,
        }
    }
}
