//! What a `COPY` of a selection would give, as 32 bytes.
//!
//! What of a file counts is the build cache's rule ([`plies_cache::contenthash::header`]); what differs is what `COPY`
//! does to a file: owners of a context don't come along, and hard links inside a source do.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::thread::{Scope, ScopedJoinHandle};

use plies_archive::tar::{Device, Escaped};
use plies_archive::tree::Kind;
use plies_cache::contenthash::header::{self, Header};
use plies_oci::{BlobDigest, ErrorKind, Sha256Hasher};
use rustix::fs::FileType;

use super::select::{SelectedKind, Selection, owner, source_path};
use super::walk::{self, Found, Links, Step, Visitor, WalkError};
use super::{Owners, Tree};
use crate::exec::Cancel;

/// Begins every hash, so that a change of what is hashed changes all of them.
const DOMAIN: &[u8] = b"plies content hash v2\0";

/// Files of so many bytes are hashed by a thread of their own, beside the walk: a thread costs as much as hashing some
/// 20 KiB, and one alone hashes hardly more than 1 GB/s.
const OWN_THREAD_BYTES_MIN: u64 = 256 << 10;

/// What small files may leave for the sum while a large one is pending: headers of some thousand.
const BEHIND_BYTES_MAX: usize = 1 << 20;

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
        let (op, path, source) = walk::parts(error);
        Self::Io { op, path: Escaped::of(&path), source }
    }
}

impl Tree {
    /// Hashes what copying `selection` would give. Reads every chosen byte.
    ///
    /// # Errors
    /// [`HashError::Special`] for a pipe or a device in a context (a stage may have them), [`HashError::Io`].
    pub fn hash(&self, selection: &Selection) -> Result<ContentHash, HashError> {
        Ok(self.hash_listed(selection)?.0)
    }

    /// The same, with what is in the selection, each with a digest of its own: to say later what changed.
    ///
    /// # Errors
    /// Those of [`Tree::hash`].
    pub fn hash_listed(&self, selection: &Selection) -> Result<(ContentHash, Vec<ListedFile>), HashError> {
        std::thread::scope(|threads| {
            let mut hasher = Hasher {
                files: Vec::new(),
                sum: Sha256Hasher::default(),
                threads,
                threads_max: std::thread::available_parallelism().map_or(1, usize::from),
                pending: VecDeque::new(),
                source: Vec::new(),
                owners: self.owners,
                links: Links::default(),
                buffer: vec![0; header::READ_BYTES],
                cancel: &self.cancel,
            };
            hasher.update(DOMAIN);
            for item in &selection.items {
                // A directory's name doesn't appear in the copy.
                hasher.bytes(if item.is_dir() { b"" } else { &item.name });
                match &item.kind {
                    SelectedKind::Inline { bytes, mode } => {
                        hasher.update(b"i");
                        hasher.number(u64::from(*mode));
                        hasher.bytes(bytes);
                        hasher.list(item.name.clone(), bytes);
                    }
                    SelectedKind::Tree { is_dir, path, .. } => {
                        hasher.source.clone_from(path);
                        hasher.update(if *is_dir { b"D" } else { b"F" });
                        hasher.links = Links::default();
                        walk::walk(self, selection, item, &mut hasher)?;
                    }
                }
                // No entry begins so.
                hasher.update(&[0]);
            }
            hasher.settle(0)?;
            Ok((ContentHash(hasher.sum.finish()), hasher.files))
        })
    }
}

/// A file of a selection.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ListedFile {
    /// Where it is, relative to the tree.
    pub path: Vec<u8>,
    /// The beginning of a digest of all about it that a copy would show.
    pub digest: [u8; 8],
}

/// The beginning of the digest of some bytes.
fn short_digest(bytes: &[u8]) -> [u8; 8] {
    *BlobDigest::of(bytes).as_bytes().first_chunk().expect("because a digest has 32 bytes")
}

/// The hash of a file's bytes, whose length is known.
fn content(file: &File, buffer: &mut [u8], cancel: &Cancel) -> io::Result<[u8; 32]> {
    let mut sum = Sha256Hasher::default();
    header::add_content(file, &mut sum, buffer, &|| cancel.check())?;
    Ok(sum.finish())
}

struct Hasher<'s, 'e> {
    files: Vec<ListedFile>,
    sum: Sha256Hasher,
    threads: &'s Scope<'s, 'e>,
    /// How many large files are hashed at a time.
    threads_max: usize,
    /// The large files that the sum waits for, in order.
    pending: VecDeque<Pending<'s>>,
    /// The source that is being walked, for messages.
    source: Vec<u8>,
    owners: Owners,
    links: Links,
    buffer: Vec<u8>,
    cancel: &'e Cancel,
}

/// A file that is being hashed.
struct Pending<'s> {
    content: ScopedJoinHandle<'s, io::Result<[u8; 32]>>,
    /// For messages.
    path: Escaped,
    /// Its place among the files that are listed.
    listed_at: usize,
    /// What the sum takes in behind it.
    behind: Vec<u8>,
}

impl Hasher<'_, '_> {
    fn update(&mut self, bytes: &[u8]) {
        match self.pending.back_mut() {
            Some(last) => last.behind.extend_from_slice(bytes),
            None => self.sum.update(bytes),
        }
    }

    /// Waits for files, the first ones first, until no more than `left` are pending.
    fn settle(&mut self, left: usize) -> Result<(), HashError> {
        while self.pending.len() > left
            && let Some(Pending { content, path, listed_at, behind }) = self.pending.pop_front()
        {
            let content = content.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            let content = content.map_err(|source| HashError::Io { op: "read", path, source })?;
            self.sum.update(&content);
            self.sum.update(&behind);
            self.list_content(listed_at, &content);
        }
        Ok(())
    }

    fn number(&mut self, number: u64) {
        self.update(&number.to_le_bytes());
    }

    /// With the length in front, so that no two lists of fields look alike.
    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len() as u64);
        self.update(bytes);
    }

    /// The path and the header, without the length of a file: that may change while it is read.
    fn entry(&mut self, found: &Found<'_>, kind: Kind, link: &[u8]) -> Result<(), HashError> {
        let (uid, gid) = owner(self.owners, found.stat.st_uid, found.stat.st_gid);
        let xattrs = &walk::xattrs(found).map_err(failed("read the attributes of", found))?;
        let header = Header { kind, mode: found.stat.st_mode & 0o7777, uid, gid, size_bytes: 0, link, xattrs };
        let header = header.begin().finish();
        self.update(b"e");
        self.bytes(found.path);
        self.update(&header);
        self.list(source_path(&self.source, found.path), &header);
        Ok(())
    }

    /// Lists a file by something that tells it from others.
    fn list(&mut self, path: Vec<u8>, content: &[u8]) {
        self.files.push(ListedFile { path, digest: short_digest(content) });
    }

    /// Adds the hash of its bytes to a file that was listed by its header alone.
    fn list_content(&mut self, at: usize, content: &[u8; 32]) {
        if let Some(file) = self.files.get_mut(at) {
            file.digest = short_digest(&[&file.digest[..], content].concat());
        }
    }
}

pub(super) fn failed(op: &'static str, found: &Found<'_>) -> impl FnOnce(io::Error) -> HashError + use<> {
    let path = Escaped::of(found.path);
    move |source| HashError::Io { op, path, source }
}

impl Visitor for Hasher<'_, '_> {
    type Error = HashError;

    fn enter(&mut self, found: &Found<'_>) -> Result<Step, HashError> {
        if !found.path.is_empty() {
            self.entry(found, Kind::Directory, b"")?;
        }
        Ok(Step::Into)
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), HashError> {
        Ok(())
    }

    fn leaf(&mut self, found: &Found<'_>) -> Result<(), HashError> {
        if self.pending.back().is_some_and(|last| last.behind.len() > BEHIND_BYTES_MAX) {
            self.settle(0)?;
        }
        if let Some(first) = self.links.first(found) {
            self.update(b"h");
            self.bytes(found.path);
            self.bytes(&first);
            self.list(source_path(&self.source, found.path), &first);
            return Ok(());
        }
        let device = || {
            let number = found.stat.st_rdev;
            Device { major: rustix::fs::major(number), minor: rustix::fs::minor(number) }
        };
        match found.kind() {
            FileType::RegularFile => {
                self.entry(found, Kind::File, b"")?;
                let listed_at = self.files.len() - 1;
                let file = File::from(found.open().map_err(failed("open", found))?);
                if found.stat.st_size.cast_unsigned() < OWN_THREAD_BYTES_MIN {
                    let content = content(&file, &mut self.buffer, self.cancel).map_err(failed("read", found))?;
                    self.update(&content);
                    self.list_content(listed_at, &content);
                    return Ok(());
                }
                self.settle(self.threads_max - 1)?;
                let cancel = self.cancel;
                let content = self.threads.spawn(move || content(&file, &mut vec![0; header::READ_BYTES], cancel));
                self.pending.push_back(Pending {
                    content,
                    path: Escaped::of(found.path),
                    listed_at,
                    behind: Vec::new(),
                });
                Ok(())
            }
            FileType::Symlink => {
                let link = found.link().map_err(failed("read the link", found))?;
                self.entry(found, Kind::Symlink, &link)
            }
            FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice if self.owners == Owners::Root => {
                Err(HashError::Special { path: Escaped::of(&source_path(&self.source, found.path)) })
            }
            FileType::Fifo => self.entry(found, Kind::Fifo, b""),
            FileType::CharacterDevice => self.entry(found, Kind::CharDevice(device()), b""),
            FileType::BlockDevice => self.entry(found, Kind::BlockDevice(device()), b""),
            _ => Ok(()),
        }
    }
}
