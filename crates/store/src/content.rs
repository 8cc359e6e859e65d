//! Content: verified blobs by digest, and the ingests that become them.
//!
//! ```text
//! content/oci-layout
//! content/blobs/sha256/<hex>             0444; what the name says, hashed as it came in
//! content/ingest/<sha256 of ref>/ref     the resume key
//! content/ingest/<sha256 of ref>/data    the bytes so far
//! ```
//!
//! Publishing: bytes, size check, digest check, sync, rename, directory sync, row and hold in one
//! transaction. A mismatch is [`ErrorKind::DataLoss`] and leaves nothing. A crash leaves an ingest
//! to resume, or (between rename and row) a file that the next open removes. A resumed ingest is
//! hashed again from its first byte, so nothing that a crash did to it can pass.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;

use plies_oci::{BlobDigest, ErrorKind, Sha256Hasher};

use crate::catalogue::schema::{BLOBS, BlobRow};
use crate::catalogue::{CatalogueError, Rows as _};
use crate::error::{At as _, FileError};
use crate::open::sync_dir;
use crate::transfer::FromStart;
use crate::write_back::WriteBack;
use crate::{Lease, Stamp, Store};

/// Read buffer when an ingest is hashed again; a few pages of read-ahead.
const REHASH_BUFFER_BYTES: usize = 256 << 10;

/// Longest resume key. Keys are made by programs ("layer-sha256:…"), and one is kept per ingest.
const REF_MAX_BYTES: usize = 4096;

/// The name under which an ingest can be resumed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IngestRef(String);

impl IngestRef {
    /// Any text up to 4,096 bytes, longer is cut there; by convention says what the bytes will be.
    pub fn new(key: impl Into<String>) -> Self {
        let mut key = key.into();
        key.truncate(key.floor_char_boundary(REF_MAX_BYTES));
        Self(key)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn hash(&self) -> [u8; 32] {
        *BlobDigest::of(self.0.as_bytes()).as_bytes()
    }
}

impl fmt::Display for IngestRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0.escape_debug(), f)
    }
}

/// Why an ingest could not be begun, listed or given up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IngestError {
    /// Somebody in this process is writing to it.
    #[error("ingest {ingest} is being written to")]
    Busy {
        /// Which.
        ingest: IngestRef,
    },
    /// Its files.
    #[error(transparent)]
    File(#[from] FileError),
    /// Beginning the session.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

impl IngestError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Busy { .. } => ErrorKind::Busy,
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
        }
    }
}

/// Why an ingest could not become a blob.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommitError {
    /// Too many or too few bytes. The ingest is gone.
    #[error("ingest {ingest}: expected {expected} bytes, got {actual}")]
    SizeMismatch {
        /// Which.
        ingest: IngestRef,
        /// As announced.
        expected: u64,
        /// As received.
        actual: u64,
    },
    /// Other bytes than announced. The ingest is gone.
    #[error("ingest {ingest}: expected {expected}, got {actual}")]
    DigestMismatch {
        /// Which.
        ingest: IngestRef,
        /// As announced.
        expected: BlobDigest,
        /// As received.
        actual: BlobDigest,
    },
    /// The file system.
    #[error(transparent)]
    File(#[from] FileError),
    /// The row or the hold.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

impl CommitError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::SizeMismatch { .. } | Self::DigestMismatch { .. } => ErrorKind::DataLoss,
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
        }
    }
}

/// Why a blob could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlobError {
    /// Not in the store.
    #[error("blob {digest} is not in the store")]
    NotFound {
        /// Which.
        digest: BlobDigest,
    },
    /// In the catalogue, but its bytes are not all there.
    #[error("blob {digest}: expected {expected} bytes on disk, found {}", found(*actual))]
    Damaged {
        /// Which.
        digest: BlobDigest,
        /// By the catalogue.
        expected: u64,
        /// On disk; `None` if there is no file.
        actual: Option<u64>,
    },
    /// Its bytes are not those of its digest.
    #[error("blob {digest} was changed on disk: its bytes now have {actual}")]
    Changed {
        /// Which.
        digest: BlobDigest,
        /// The digest of what is there.
        actual: BlobDigest,
    },
    /// Its file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its row.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
}

fn found(actual: Option<u64>) -> String {
    actual.map_or_else(|| "no file".to_owned(), |bytes| bytes.to_string())
}

impl BlobError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Damaged { .. } | Self::Changed { .. } => ErrorKind::DataLoss,
            Self::File(error) => error.kind(),
            Self::Catalogue(error) => error.kind(),
        }
    }
}

/// What an ingest must turn out to be. Nothing announced means whatever it is will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Expected {
    /// The digest, if known.
    pub digest: Option<BlobDigest>,
    /// The size, if known.
    pub size_bytes: Option<u64>,
}

impl Expected {
    /// Exactly this blob.
    pub fn exactly(digest: BlobDigest, size_bytes: u64) -> Self {
        Self { digest: Some(digest), size_bytes: Some(size_bytes) }
    }

    /// This digest, whatever its size.
    pub fn digest(digest: BlobDigest) -> Self {
        Self { digest: Some(digest), size_bytes: None }
    }

    /// Whatever was written.
    pub fn anything() -> Self {
        Self::default()
    }
}

/// How far an ingest is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IngestStatus {
    /// Its resume key.
    pub ingest: IngestRef,
    /// Bytes written so far: where to go on.
    pub offset_bytes: u64,
    /// When it was begun, by the file system's clock.
    pub started: Stamp,
    /// When it was last written to, by the file system's clock.
    pub updated: Stamp,
}

/// A blob in the catalogue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobInfo {
    /// Its size.
    pub size_bytes: u64,
    /// When it was first published here.
    pub created: Stamp,
}

impl From<BlobRow> for BlobInfo {
    fn from(BlobRow { size_bytes, created }: BlobRow) -> Self {
        Self { size_bytes, created }
    }
}

/// Blobs and ingests of a store.
#[derive(Debug, Clone, Copy)]
pub struct Content<'a> {
    store: &'a Store,
}

impl<'a> Content<'a> {
    pub(crate) fn new(store: &'a Store) -> Self {
        Self { store }
    }

    /// Begins the ingest `ingest`, or goes on where it was left: what is there is hashed again, and
    /// [`Ingest::offset_bytes`] says how much that is.
    ///
    /// # Errors
    /// [`IngestError::Busy`] if it is open.
    pub fn ingest(&self, ingest: IngestRef) -> Result<Ingest, IngestError> {
        Ingest::open(self.store, ingest, true)
    }

    /// Begins an ingest that nobody will resume: it goes when it is dropped.
    ///
    /// # Errors
    /// [`IngestError`].
    pub fn ingest_unnamed(&self) -> Result<Ingest, IngestError> {
        let id = u64::from_be_bytes(self.store.inner.fresh_id()?);
        Ingest::open(self.store, IngestRef(format!("unnamed-{id:016x}")), false)
    }

    /// All ingests, open or left behind, in the order of their keys' hashes. Reads one small
    /// directory per ingest.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn ingests(&self) -> Result<Vec<IngestStatus>, FileError> {
        let dir = &self.store.inner.paths.ingest;
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(dir).at("read directory", dir)? {
            let path = entry.at("read directory", dir)?.path();
            // It may be committed or aborted under our eyes.
            if let Some(status) = read_status(&path)? {
                found.insert(path, status);
            }
        }
        Ok(found.into_values().collect())
    }

    /// Gives up an ingest that is not open; false if there is none.
    ///
    /// # Errors
    /// [`IngestError::Busy`] if it is open.
    pub fn abort(&self, ingest: &IngestRef) -> Result<bool, IngestError> {
        let claim = Claim::take(self.store, ingest, true)?;
        let there = claim.dir.try_exists().at("stat", &claim.dir)?;
        claim.remove()?;
        Ok(there)
    }

    /// Whether somebody in this process is writing to it.
    pub(crate) fn is_open(&self, ingest: &IngestRef) -> bool {
        let open = self.store.inner.open_ingests.lock().unwrap_or_else(PoisonError::into_inner);
        open.contains(&ingest.hash())
    }

    /// Turns several ingests into blobs with one sync of the file system, one of the directory and
    /// one transaction, held by `lease`. All or none become visible.
    ///
    /// # Errors
    /// [`CommitError`] of the first that is not as expected; that one is gone, the others are as if
    /// dropped.
    pub fn commit_all(&self, ingests: Vec<(Ingest, Expected)>, lease: &Lease) -> Result<Vec<BlobDigest>, CommitError> {
        commit_all(self.store, ingests, lease)
    }

    /// Whether a blob's file is there, of its size or not: one look at the directory, for lists of many.
    pub fn has_file(&self, digest: BlobDigest) -> bool {
        blob_path(self.store, digest).exists()
    }

    /// Whether a blob is there and what is known of it; does not look at the disk.
    ///
    /// # Errors
    /// [`CatalogueError`].
    pub fn info(&self, digest: BlobDigest) -> Result<Option<BlobInfo>, CatalogueError> {
        Ok(self.store.read(|tx| tx.get(&BLOBS, &digest))?.map(Into::into))
    }

    /// Reads a document whole, and checks its digest: for blobs whose size the caller has limited when they came in.
    ///
    /// # Errors
    /// As [`Content::open`]; [`BlobError::Changed`].
    pub fn read(&self, digest: BlobDigest) -> Result<Vec<u8>, BlobError> {
        let mut blob = self.open(digest)?;
        let mut bytes = Vec::with_capacity(usize::try_from(blob.size_bytes()).unwrap_or(0));
        blob.read_to_end(&mut bytes).at("read", blob_path(self.store, digest))?;
        match BlobDigest::of(&bytes) {
            actual if actual == digest => Ok(bytes),
            actual => Err(BlobError::Changed { digest, actual }),
        }
    }

    /// Calls `visit` for every blob, in the order of their digests, until it breaks.
    ///
    /// # Errors
    /// [`CatalogueError`].
    pub fn scan(&self, mut visit: impl FnMut(BlobDigest, BlobInfo) -> ControlFlow<()>) -> Result<(), CatalogueError> {
        self.store.read(|tx| tx.scan(&BLOBS, |digest, row| visit(digest, row.into())))
    }

    /// Opens a blob for reading. What is open stays readable, whatever becomes of the blob.
    ///
    /// # Errors
    /// [`BlobError::NotFound`]; [`BlobError::Damaged`] if the catalogue has it but the disk has not
    /// all of it. Bytes are not hashed again here.
    pub fn open(&self, digest: BlobDigest) -> Result<Blob, BlobError> {
        let row: Option<BlobRow> = self.store.read(|tx| tx.get(&BLOBS, &digest))?;
        let expected = row.ok_or(BlobError::NotFound { digest })?.size_bytes;
        let path = blob_path(self.store, digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // A collection may have passed between the row and the file.
                let still: bool = self.store.read(|tx| tx.contains(&BLOBS, &digest))?;
                return Err(match still {
                    true => BlobError::Damaged { digest, expected, actual: None },
                    false => BlobError::NotFound { digest },
                });
            }
            Err(error) => return Err(FileError::new("open", path, error).into()),
        };
        let actual = file.metadata().at("stat", &path)?.len();
        if actual != expected {
            return Err(BlobError::Damaged { digest, expected, actual: Some(actual) });
        }
        Ok(Blob { file, digest, size_bytes: expected })
    }
}

pub(crate) fn blob_path(store: &Store, digest: BlobDigest) -> PathBuf {
    store.inner.paths.blobs.join(digest.hex())
}

/// A blob being read.
#[derive(Debug)]
pub struct Blob {
    file: File,
    digest: BlobDigest,
    size_bytes: u64,
}

impl Blob {
    /// Its digest.
    pub fn digest(&self) -> BlobDigest {
        self.digest
    }

    /// Its size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Reads at an offset without moving the position.
    ///
    /// # Errors
    /// As `pread`.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }
}

impl Read for Blob {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file.read(buffer)
    }
}

impl Seek for Blob {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file.seek(to)
    }
}

/// The right to write to one ingest, in this process (others are kept off the whole store).
#[derive(Debug)]
struct Claim {
    store: Store,
    hash: [u8; 32],
    dir: PathBuf,
}

impl Claim {
    /// One that nobody will resume lies among what goes with the process.
    fn take(store: &Store, ingest: &IngestRef, named: bool) -> Result<Self, IngestError> {
        let hash = ingest.hash();
        let mut open = store.inner.open_ingests.lock().unwrap_or_else(PoisonError::into_inner);
        if !open.insert(hash) {
            return Err(IngestError::Busy { ingest: ingest.clone() });
        }
        let hex = BlobDigest::from_bytes(hash).hex();
        let dir = match named {
            true => store.inner.paths.ingest.join(hex),
            false => store.inner.paths.run.join(format!("ingest-{hex}")),
        };
        Ok(Self { store: store.clone(), hash, dir })
    }

    /// Removes the directory; the key can be begun afresh.
    fn remove(&self) -> Result<(), FileError> {
        remove_ingest(&self.dir)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.store.inner.open_ingests.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.hash);
    }
}

fn remove_ingest(dir: &Path) -> Result<(), FileError> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(FileError::new("remove", dir, error)),
        _ => Ok(()),
    }
}

fn read_status(dir: &Path) -> Result<Option<IngestStatus>, FileError> {
    let read = || -> io::Result<IngestStatus> {
        let key = dir.join("ref");
        let data = fs::metadata(dir.join("data"))?;
        Ok(IngestStatus {
            ingest: IngestRef(String::from_utf8_lossy(&fs::read(&key)?).into_owned()),
            offset_bytes: data.len(),
            started: fs::metadata(&key)?.modified()?.into(),
            updated: data.modified()?.into(),
        })
    };
    match read() {
        Ok(status) => Ok(Some(status)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(FileError::new("stat", dir, error)),
    }
}

/// A write not yet visible.
///
/// Write to it, then [`Ingest::commit`]. Dropping it keeps the bytes for resuming (unless it is
/// unnamed); [`Ingest::abort`] does not.
#[derive(Debug)]
#[must_use = "an ingest is not visible until it is committed"]
pub struct Ingest {
    claim: Claim,
    ingest: IngestRef,
    file: File,
    hasher: Sha256Hasher,
    offset_bytes: u64,
    write_back: WriteBack,
    named: bool,
    spent: bool,
}

impl Ingest {
    fn open(store: &Store, ingest: IngestRef, named: bool) -> Result<Self, IngestError> {
        // Any id will do: asking for one marks the store as being written to.
        store.inner.fresh_id()?;
        let claim = Claim::take(store, &ingest, named)?;
        match fs::DirBuilder::new().mode(0o700).create(&claim.dir) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(FileError::new("create directory", &claim.dir, error).into());
            }
            _ => {}
        }
        let key = claim.dir.join("ref");
        if !key.try_exists().at("stat", &key)? {
            fs::write(&key, ingest.as_str()).at("write", &key)?;
        }
        let data = claim.dir.join("data");
        let open = || OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&data);
        let file = match open() {
            // A commit that came to nothing had made it read-only already.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                fs::set_permissions(&data, fs::Permissions::from_mode(0o600)).at("change mode", &data)?;
                open().at("open", &data)?
            }
            opened => opened.at("open", &data)?,
        };
        let mut opened = Self {
            claim,
            ingest,
            file,
            hasher: Sha256Hasher::default(),
            offset_bytes: 0,
            write_back: WriteBack::default(),
            named,
            spent: false,
        };
        opened.rehash().at("read", &data)?;
        Ok(opened)
    }

    fn rehash(&mut self) -> io::Result<()> {
        let mut buffer = Vec::new();
        loop {
            if buffer.is_empty() {
                if self.file.metadata()?.len() == 0 {
                    return Ok(());
                }
                buffer = vec![0; REHASH_BUFFER_BYTES];
            }
            match self.file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(n) => {
                    self.hasher.update(&buffer[..n]);
                    self.offset_bytes += n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Its resume key.
    pub fn ingest_ref(&self) -> &IngestRef {
        &self.ingest
    }

    /// Bytes written so far, those of earlier processes included.
    pub fn offset_bytes(&self) -> u64 {
        self.offset_bytes
    }

    /// Nobody is going to read it soon, so the page cache need not keep it: see [`WriteBack::leave_the_cache`].
    pub(crate) fn leave_the_cache(&mut self) {
        self.write_back.leave_the_cache();
    }

    /// The bytes so far, from the first on.
    pub(crate) fn read_back(&self) -> io::Result<impl Read + Send + use<>> {
        Ok(FromStart { file: self.file.try_clone()?, offset: 0 })
    }

    /// Forgets all bytes: the source cannot go on where it was left.
    ///
    /// # Errors
    /// [`IngestError::File`].
    pub fn restart(&mut self) -> Result<(), IngestError> {
        let path = || self.claim.dir.join("data");
        self.file.set_len(0).at("truncate", path())?;
        self.file.rewind().at("seek", path())?;
        self.hasher = Sha256Hasher::default();
        self.offset_bytes = 0;
        self.write_back.restart();
        Ok(())
    }

    /// Checks size, then digest, and makes the bytes a blob held by `lease`: durable when this
    /// returns. If the blob is there already the ingest is dropped and the blob held: success.
    ///
    /// # Errors
    /// [`CommitError`]; after a mismatch the bytes are gone.
    pub fn commit(self, expected: Expected, lease: &Lease) -> Result<BlobDigest, CommitError> {
        let store = self.claim.store.clone();
        commit_all(&store, vec![(self, expected)], lease).map(|digests| digests[0])
    }

    /// Gives the bytes up.
    ///
    /// # Errors
    /// [`IngestError::File`].
    pub fn abort(mut self) -> Result<(), IngestError> {
        self.spent = true;
        Ok(self.claim.remove()?)
    }

    /// Size before digest: a wrong size is the cheaper and the more telling answer.
    pub(crate) fn verify(&self, expected: Expected) -> Result<BlobDigest, CommitError> {
        if let Some(size) = expected.size_bytes
            && size != self.offset_bytes
        {
            let (ingest, actual) = (self.ingest.clone(), self.offset_bytes);
            return Err(CommitError::SizeMismatch { ingest, expected: size, actual });
        }
        let actual = BlobDigest::from_bytes(self.hasher.clone().finish());
        match expected.digest {
            Some(expected) if expected != actual => {
                Err(CommitError::DigestMismatch { ingest: self.ingest.clone(), expected, actual })
            }
            _ => Ok(actual),
        }
    }
}

impl Write for Ingest {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.offset_bytes += n as u64;
        self.write_back.grown_to(&self.file, self.offset_bytes);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        if !self.named
            && !self.spent
            && let Err(error) = self.claim.remove()
        {
            self.claim.store.inner.warn(&error);
        }
    }
}

fn commit_all(
    store: &Store,
    mut ingests: Vec<(Ingest, Expected)>,
    lease: &Lease,
) -> Result<Vec<BlobDigest>, CommitError> {
    let mut digests = Vec::with_capacity(ingests.len());
    for (ingest, expected) in &mut ingests {
        match ingest.verify(*expected) {
            Ok(digest) => digests.push(digest),
            Err(error) => {
                // Never retried into success: a resume would only append to wrong bytes.
                ingest.claim.remove()?;
                ingest.spent = true;
                return Err(error);
            }
        }
    }
    sync(store, &mut ingests)?;

    let paths = &store.inner.paths;
    // Until the rows are committed no collection may unlink what we rename, or count on, here.
    let publishing = store.inner.publishing.read().unwrap_or_else(PoisonError::into_inner);
    let mut renamed = false;
    let mut rename_all = || {
        for ((ingest, _), digest) in ingests.iter().zip(&digests) {
            let target = blob_path(store, *digest);
            // Bytes that are there and as long as they should be were verified when they came; a
            // damaged blob is healed.
            if fs::metadata(&target).is_ok_and(|there| there.len() == ingest.offset_bytes) {
                continue;
            }
            fs::rename(ingest.claim.dir.join("data"), &target).at("rename", &target)?;
            renamed = true;
        }
        if renamed { sync_dir(&paths.blobs) } else { Ok(()) }
    };
    if let Err(error) = rename_all() {
        // What was renamed has no row: the next open looks.
        store.inner.leave_unclean();
        return Err(error.into());
    }
    // The point of no return: from here the blobs are visible and held.
    let published = store.write(|tx| {
        for ((ingest, _), digest) in ingests.iter().zip(&digests) {
            tx.put_blob(*digest, ingest.offset_bytes)?;
            tx.lease_hold(lease.id(), *digest)?;
        }
        Ok::<_, CatalogueError>(())
    });
    drop(publishing);
    if let Err(error) = published {
        // What was renamed has no row, or has one after all: the next open looks.
        store.inner.leave_unclean();
        return Err(error.into());
    }

    for (ingest, _) in &mut ingests {
        ingest.spent = true;
        // The blob is safe; what is left of its ingest goes with age.
        if let Err(error) = ingest.claim.remove() {
            store.inner.warn(&error);
        }
    }
    Ok(digests)
}

/// One file is synced alone, several with their file system.
fn sync(store: &Store, ingests: &mut [(Ingest, Expected)]) -> Result<(), FileError> {
    for (ingest, _) in ingests.iter() {
        let path = &ingest.claim.dir;
        ingest.file.set_permissions(fs::Permissions::from_mode(0o444)).at("change mode", path)?;
    }
    let result = match ingests {
        [(one, _)] => one.file.sync_all().at("sync", &one.claim.dir),
        [] => Ok(()),
        [(first, _), ..] => rustix::fs::syncfs(&first.file).at("sync", &store.inner.paths.ingest),
    };
    if result.is_err() {
        // After a failed sync the kernel may have dropped the bytes and call them clean: none of
        // these files may ever be synced "again" and believed.
        for (ingest, _) in ingests.iter_mut() {
            ingest.spent = true;
            if let Err(error) = ingest.claim.remove() {
                store.inner.warn(&error);
            }
        }
    } else {
        ingests.iter().for_each(|(ingest, _)| ingest.write_back.synced(&ingest.file));
    }
    result
}
