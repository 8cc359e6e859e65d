//! From a blob to a tree, in one pass over the bytes.
//!
//! ```text
//! blob -> decompress -> diff ID  |  tar -> tree
//!      (a thread that reads ahead)   |      \-> tar-split
//! ```
//!
//! Decompression and hashing cost about as much as making files, so the two halves keep two
//! processors busy; more threads would wait for one of them.

use std::io::{self, Read};
use std::os::fd::BorrowedFd;
use std::thread;

use plies_oci::{Compression, DiffId, ErrorKind};

use crate::apply::{Applied, ApplyError, ApplyStyle, apply};
use crate::compress::Decoder;
use crate::hash::HashingReader;
use crate::limits::Limits;
use crate::prefetch::Prefetch;
use crate::tar::Reader;
use crate::tarsplit::{Output, Recorded, Recorder};

/// A blob that became a tree.
#[derive(Debug)]
pub struct Unpacked {
    /// The sha256 of the uncompressed archive, all of it. The caller compares it with what the
    /// image says before it lets anybody see the tree.
    pub diff_id: DiffId,
    /// Bytes of the uncompressed archive.
    pub unpacked_bytes: u64,
    /// What was done to the tree.
    pub applied: Applied,
    /// What the archive held besides the contents of its files.
    pub tar_split: Recorded,
}

/// Why a blob could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// The decompressor could not be set up.
    #[error("set up decompression")]
    Decoder {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The archive could not be read or applied.
    #[error(transparent)]
    Apply(#[from] ApplyError),
}

impl UnpackError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Decoder { .. } => ErrorKind::Unavailable,
            Self::Apply(error) => error.kind(),
        }
    }
}

/// Applies a layer blob to the tree at `root`, reading it to its end; records its tar-split into
/// `tar_split`. `progress` hears how many bytes of the blob were read so far, from another thread.
///
/// # Errors
/// [`UnpackError`]; see [`apply`] for the state of the tree.
pub fn unpack(
    blob: impl Read + Send,
    compression: Compression,
    root: BorrowedFd<'_>,
    style: ApplyStyle,
    limits: &Limits,
    tar_split: Output,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<Unpacked, UnpackError> {
    thread::scope(|scope| {
        let blob = Progress { inner: blob, done_bytes: 0, report: progress };
        let decoder = Decoder::new(blob, compression, limits).map_err(|source| UnpackError::Decoder { source })?;
        let ahead = Prefetch::spawn(scope, HashingReader::new(decoder));
        let mut reader = Reader::new(ahead, limits).with_recorder(Recorder::new(tar_split));
        let applied = apply(&mut reader, root, style, limits)?;
        let finished = reader.finish().map_err(ApplyError::from)?;
        let (_, hashed) = finished.inner.join().finish();
        Ok(Unpacked {
            diff_id: DiffId::from_bytes(hashed.sha256),
            unpacked_bytes: hashed.size_bytes,
            applied,
            tar_split: finished.recorded.expect("because a recorder was given"),
        })
    })
}

/// Tells how far a reader got.
struct Progress<'a, R> {
    inner: R,
    done_bytes: u64,
    report: &'a (dyn Fn(u64) + Sync),
}

impl<R: Read> Read for Progress<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.done_bytes += n as u64;
        if n > 0 {
            (self.report)(self.done_bytes);
        }
        Ok(n)
    }
}
