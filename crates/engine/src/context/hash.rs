//! The content hash: what a `COPY` of a selection would give, as 32 bytes.

use std::fmt;
use std::io::{self, Read as _};

use plies_archive::tar::Escaped;
use plies_oci::ErrorKind;
use rustix::fs::FileType;
use sha2::{Digest as _, Sha256};

use super::select::{SelectedKind, Selection, owner, source_path};
use super::walk::{self, Found, Visitor, WalkError};
use super::{Owners, Tree};
use crate::exec::Cancel;

/// Begins every hash, so that a change of what is hashed changes all of them.
const DOMAIN: &[u8] = b"plies content hash v1\0";

/// How much of a file is read at a time, in bytes: large enough for the hash to be what takes the time.
const READ_BYTES: usize = 128 << 10;

/// The hash of a selection's content.
///
/// Equal hashes mean that copying gives the same: names, kinds, modes, owners, extended attributes, link texts, device
/// numbers, hard links inside a source, and bytes. Times of modification don't count, nor does a source directory's own
/// metadata, because `COPY` copies what is in it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContentHash([u8; 32]);

impl ContentHash {
    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why content can't be hashed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HashError {
    /// Something in the tree can't be read.
    #[error("{op} {path}")]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what, relative to the tree.
        path: Escaped,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A context holds something that can't be copied.
    #[error("{path} is a pipe or a device")]
    Special {
        /// What, relative to its source.
        path: Escaped,
    },
}

impl HashError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Io { .. } => ErrorKind::Unavailable,
            Self::Special { .. } => ErrorKind::InvalidInput,
        }
    }
}

impl From<WalkError> for HashError {
    fn from(error: WalkError) -> Self {
        Self::Io { op: error.op, path: Escaped::of(&error.path), source: error.source }
    }
}

impl Tree {
    /// Hashes what copying `selection` would give. Reads every chosen byte.
    ///
    /// # Errors
    /// [`HashError::Special`] for a pipe or a device in a context (a stage may have them), [`HashError::Io`].
    pub fn hash(&self, selection: &Selection) -> Result<ContentHash, HashError> {
        let mut hasher = Hasher {
            sum: Sha256::new(),
            source: Vec::new(),
            owners: self.owners,
            buffer: vec![0; READ_BYTES],
            cancel: self.cancel.clone(),
        };
        hasher.sum.update(DOMAIN);
        for item in &selection.items {
            // A directory's name doesn't appear in the copy.
            hasher.bytes(if item.is_dir() { b"" } else { &item.name });
            match &item.kind {
                SelectedKind::Inline { bytes, mode } => {
                    hasher.sum.update([b'i']);
                    hasher.number(u64::from(*mode));
                    hasher.bytes(bytes);
                }
                SelectedKind::Tree { is_dir, path } => {
                    hasher.source.clone_from(path);
                    hasher.sum.update([if *is_dir { b'D' } else { b'F' }]);
                    walk::walk(self, selection, item, &mut hasher)?;
                }
            }
            // No entry begins so.
            hasher.sum.update([0]);
        }
        Ok(ContentHash(hasher.sum.finalize().into()))
    }
}

struct Hasher {
    sum: Sha256,
    /// The source that is being walked, for messages.
    source: Vec<u8>,
    owners: Owners,
    buffer: Vec<u8>,
    cancel: Cancel,
}

impl Hasher {
    fn number(&mut self, number: u64) {
        self.sum.update(number.to_le_bytes());
    }

    /// With the length in front, so that no two lists of fields look alike.
    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.sum.update(bytes);
    }

    fn metadata(&mut self, kind: u8, found: &Found) -> Result<(), HashError> {
        let (uid, gid) = owner(self.owners, found.stat.st_uid, found.stat.st_gid);
        self.sum.update([kind]);
        self.bytes(&found.path);
        // A link has no mode of its own.
        self.number(if kind == b'l' { 0 } else { u64::from(found.stat.st_mode & 0o7777) });
        self.number(u64::from(uid));
        self.number(u64::from(gid));
        let xattrs = found.xattrs().map_err(failed("read the attributes of", found))?;
        self.number(xattrs.len() as u64);
        for (name, value) in xattrs {
            self.bytes(&name);
            self.bytes(&value);
        }
        Ok(())
    }
}

fn failed(op: &'static str, found: &Found) -> impl FnOnce(io::Error) -> HashError {
    let path = Escaped::of(&found.path);
    move |source| HashError::Io { op, path, source }
}

impl Visitor for Hasher {
    type Error = HashError;

    fn enter(&mut self, found: &Found) -> Result<(), HashError> {
        if found.path.is_empty() {
            return Ok(());
        }
        self.metadata(b'd', found)
    }

    fn leave(&mut self, _: &Found) -> Result<(), HashError> {
        Ok(())
    }

    fn leaf(&mut self, found: &Found) -> Result<(), HashError> {
        if let Some(first) = &found.link_to {
            self.sum.update([b'h']);
            self.bytes(&found.path);
            self.bytes(first);
            return Ok(());
        }
        match found.kind() {
            FileType::RegularFile => {
                self.metadata(b'f', found)?;
                // The bytes' own hash, whose length is known: the file's may change while it is read.
                let mut file = std::fs::File::from(found.open().map_err(failed("open", found))?);
                let mut sum = Sha256::new();
                loop {
                    self.cancel.check().map_err(failed("read", found))?;
                    match file.read(&mut self.buffer) {
                        Ok(0) => break,
                        Ok(length) => sum.update(&self.buffer[..length]),
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) => return Err(failed("read", found)(error)),
                    }
                }
                self.sum.update(sum.finalize());
            }
            FileType::Symlink => {
                self.metadata(b'l', found)?;
                let link = found.link().map_err(failed("read the link", found))?;
                self.bytes(&link);
            }
            kind @ (FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice) => {
                if self.owners == Owners::Root {
                    return Err(HashError::Special { path: Escaped::of(&source_path(&self.source, &found.path)) });
                }
                let (letter, device) = match kind {
                    FileType::Fifo => (b'p', 0),
                    FileType::CharacterDevice => (b'c', found.stat.st_rdev),
                    _ => (b'b', found.stat.st_rdev),
                };
                self.metadata(letter, found)?;
                self.number(device);
            }
            _ => {}
        }
        Ok(())
    }
}
