//! An index of a layer's tar that the kernel mounts: an EROFS image without the contents of files.
//!
//! ```text
//! layer.tar   kept verbatim, the image's second device
//! index       superblock, inodes, names, attributes; of each file where in the tar it lies
//! ```
//!
//! [`index()`] reads an archive once and keeps in memory what its layer looks like: about 250 bytes an entry, however long
//! files are. [`Index::write`] makes the image, the same bytes for the same archive. Mounted with the tar, it is the tree
//! that [`crate::apply()`] makes in [`crate::ApplyStyle::Layer`]: the same entries win, the same directories are implied,
//! whiteouts and opaque directories have the form that overlayfs takes in a lower layer; and the same archives are refused,
//! in the same words. Two things are different: nothing that a file system may not take (devices without the right to make them, long
//! attributes, times before 1901) is missing, and what an index cannot hold is [`IndexingError::Unfit`].
//!
//! Blocks have 512 bytes, as tar's do, so a file's content is where it is. Only sparse files whose pieces lie askew need
//! some of theirs copied into the image.
//!
//! The kernel's checksum covers the superblock. The image's last block, which the kernel never reads, has ours: [`verify`]
//! tells an image that was written here, whole, for this tar, from any other.

mod attributes;
mod image;
mod sparse;
mod tree;

use std::io::{self, Read, Write};

use plies_oci::{DiffId, ErrorKind, Sha256Hasher};

use self::image::Image;
use self::tree::Tree;
use crate::apply::{Applied, ApplyError};
use crate::limits::Limits;
use crate::tar::{EntryPath, Reader};

/// Bytes of a block of the image, and of tar.
const BLOCK_BYTES: u64 = 512;

/// Bytes of a tar that an index reaches: 2^32 blocks, the last of which means "none".
const TAR_BYTES_MAX: u64 = (u32::MAX as u64 - 1) * BLOCK_BYTES;

/// Bytes that the sparse files of one layer may take in the index, in tables and in copied blocks. Ordinary ones take eight
/// bytes a piece; more is a sign of an archive made to be expensive.
const SPARSE_BYTES_MAX: u64 = 16 << 20;

/// The image's last block: these bytes, [`VERSION`] in four, four of zero, the sha256 of all before it, zeros.
const MAGIC: [u8; 8] = *b"pliesidx";
/// The version of the format (docs/format/erofs.md).
const VERSION: u32 = 1;
const TRAILER_BYTES: u64 = BLOCK_BYTES;

/// Why an archive could not be indexed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IndexingError {
    /// It is not a layer that can be applied either.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// It has something that a directory can hold and an index cannot.
    #[error("{path}: {why}, which an EROFS index cannot hold")]
    Unfit {
        /// The entry.
        path: EntryPath,
        /// What it has.
        why: &'static str,
    },
}

impl IndexingError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Apply(error) => error.kind(),
            Self::Unfit { .. } => ErrorKind::FailedPrecondition,
        }
    }
}

/// What is in an archive and where, ready to be written.
#[derive(Debug)]
pub struct Index {
    tree: Tree,
    applied: Applied,
}

/// Reads what is left of an archive up to the end of its entries; the caller finishes the reader.
///
/// # Errors
/// [`IndexingError`]. [`ApplyError::NeedsBase`] asks for the archive to be applied over the layers below it.
pub fn index<R: Read>(reader: &mut Reader<R>, limits: &Limits) -> Result<Index, IndexingError> {
    let mut tree = Tree::new(limits);
    while let Some(entry) = reader.next_entry().map_err(ApplyError::from)? {
        tree.entry(&entry, reader)?;
    }
    let applied = tree.finish();
    Ok(Index { tree, applied })
}

impl Index {
    /// What applying the archive would have said, but for the bytes on disk: those depend on where tar and image are put.
    pub fn applied(&self) -> &Applied {
        &self.applied
    }

    /// Writes the image for the tar with this diff ID and length.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn write(&self, diff_id: DiffId, tar_bytes: u64, out: impl Write) -> io::Result<()> {
        Image::new(&self.tree).write(diff_id, tar_bytes, out)
    }
}

/// Why an image is not the index of a tar.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// It could not be read.
    #[error("read the EROFS index")]
    Read(#[from] io::Error),
    /// Written by a later version of this program.
    #[error("the EROFS index has version {found}, this program knows {VERSION}")]
    TooNew {
        /// The version found.
        found: u32,
    },
    /// Not what [`Index::write`] wrote.
    #[error("the EROFS index is damaged")]
    Damaged,
    /// It belongs to another tar.
    #[error("the EROFS index belongs to another layer than {wanted}")]
    OtherTar {
        /// The one it should belong to.
        wanted: DiffId,
    },
}

impl VerifyError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Read(_) => ErrorKind::Unavailable,
            Self::TooNew { .. } => ErrorKind::FailedPrecondition,
            Self::Damaged | Self::OtherTar { .. } => ErrorKind::DataLoss,
        }
    }
}

/// Reads an image to its end and checks that it is, byte by byte, one that was written for the tar with this diff ID.
///
/// # Errors
/// [`VerifyError`].
pub fn verify(mut image: impl Read, diff_id: DiffId) -> Result<(), VerifyError> {
    const SLOT: usize = image::DEVICE_SLOT_AT as usize;
    let mut hasher = Sha256Hasher::default();
    // The last block is not hashed, and which is the last shows at the end.
    let mut held = Vec::new();
    let mut buffer = vec![0; 64 << 10];
    let mut tag = None;
    loop {
        let n = match image.read(&mut buffer) {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        held.extend_from_slice(&buffer[..n]);
        if n > 0 && held.len() < buffer.len() {
            continue;
        }
        tag = tag.or_else(|| held.get(SLOT..SLOT + 64).map(<[u8]>::to_vec));
        let sure = held.len().checked_sub(TRAILER_BYTES as usize).ok_or(VerifyError::Damaged)?;
        hasher.update(&held[..sure]);
        held.drain(..sure);
        if n == 0 {
            break;
        }
    }
    let version = held[8..12].try_into().map(u32::from_le_bytes).map_err(|_| VerifyError::Damaged)?;
    if held[..8] == MAGIC && version > VERSION {
        return Err(VerifyError::TooNew { found: version });
    }
    if held != image::trailer(&hasher.finish()) {
        return Err(VerifyError::Damaged);
    }
    match tag {
        Some(tag) if tag == diff_id.hex().as_bytes() => Ok(()),
        _ => Err(VerifyError::OtherTar { wanted: diff_id }),
    }
}
