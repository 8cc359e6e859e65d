//! Digests that are known already.

use std::collections::VecDeque;

use plies_oci::{ErrorKind, Sha256Hasher};
use serde::{Deserialize, Serialize};

use super::inroot::LINKS_MAX;
use super::{ContentDigest, inroot};

/// How many paths a cache remembers. Twice as many as the largest base images hold; 13 MB when stored, 40 MB in memory.
/// What doesn't fit is computed again each time.
pub const RECORDS_MAX: usize = 1 << 18;

/// Goes up with the stored form, and when a digest comes to mean something else.
const VERSION: u8 = 1;

/// Bytes of sha256 at the end of the stored form.
const SUM_BYTES: usize = 32;

/// Digests of paths of one tree, so that nothing is read twice. It belongs to a tree that doesn't change, or
/// whose changes it is told by [`HashCache::forget`].
///
/// A directory has two: one of its own header, and one of all that is in it. A symbolic link's target is kept too, so
/// that paths through links are found without the tree.
///
/// # Stored form
/// ```text
/// 1 byte     version
/// …          postcard: list of records, each after the directory that holds it; the first is the root
/// 32 bytes   sha256 of all that comes before
/// ```
#[derive(Debug, Clone)]
pub struct HashCache {
    /// The first is the root. A directory stands before what is in it.
    records: Vec<Record>,
    records_max: usize,
    is_modified: bool,
}

/// A place in a [`HashCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RecordIndex(u32);

impl RecordIndex {
    pub(super) const ROOT: Self = Self(0);
}

#[derive(Debug, Clone)]
struct Record {
    stored: Stored,
    /// By name.
    children: Vec<RecordIndex>,
}

/// What is kept of a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Stored {
    /// Its directory; the root's own is 0.
    parent: u32,
    /// One component; empty for the root.
    name: Box<[u8]>,
    kind: Known,
    /// Of the file, or of all that is in a directory and the directory itself.
    digest: Option<ContentDigest>,
}

/// What is known of a path beside its digest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Known {
    /// Neither a directory nor a link.
    File,
    Directory {
        /// Of the directory alone.
        header: Option<ContentDigest>,
    },
    Symlink {
        /// What it says.
        target: Box<[u8]>,
    },
}

/// Why stored digests can't be used. They can all be computed again.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HashCacheError {
    /// Another Plies wrote them.
    #[error("digests of version {found}, expected {VERSION}")]
    Version {
        /// Its version.
        found: u8,
    },
    /// The bytes are damaged.
    #[error("damaged digests: {what}")]
    Corrupt {
        /// What is wrong.
        what: &'static str,
    },
}

impl HashCacheError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Version { .. } => ErrorKind::FailedPrecondition,
            Self::Corrupt { .. } => ErrorKind::DataLoss,
        }
    }
}

impl Default for HashCache {
    fn default() -> Self {
        Self::with_records_max(RECORDS_MAX)
    }
}

impl HashCache {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty one that remembers so many paths at most, [`RECORDS_MAX`] if more are asked for.
    pub fn with_records_max(records_max: usize) -> Self {
        let root = Stored { parent: 0, name: Box::default(), kind: Known::Directory { header: None }, digest: None };
        let records = vec![Record { stored: root, children: Vec::new() }];
        Self { records, records_max: records_max.min(RECORDS_MAX), is_modified: false }
    }

    /// Whether it has learned anything since it was made or read.
    pub fn is_modified(&self) -> bool {
        self.is_modified
    }

    /// How many paths it remembers something of.
    pub fn records_count(&self) -> usize {
        self.records.len()
    }

    /// The digest of a path as [`super::checksum`] without wildcards or patterns would give it, if it can be told
    /// without the tree.
    pub fn get(&self, path: &[u8], follow_links: bool) -> Option<ContentDigest> {
        self.digest(self.resolve(path, follow_links)?)
    }

    fn resolve(&self, path: &[u8], follow_links: bool) -> Option<RecordIndex> {
        let mut at = vec![RecordIndex::ROOT];
        let mut todo: VecDeque<Vec<u8>> = super::wildcard::normalise(path).into_iter().map(<[u8]>::to_vec).collect();
        let mut links = 0;
        while let Some(component) = todo.pop_front() {
            if component == b".." {
                at.truncate((at.len() - 1).max(1));
                continue;
            }
            let child = self.child(*at.last()?, &component)?;
            match &self.record(child).stored.kind {
                Known::Symlink { target } if follow_links || !todo.is_empty() => {
                    links += 1;
                    if links > LINKS_MAX {
                        return None;
                    }
                    if target.first() == Some(&b'/') {
                        at.truncate(1);
                    }
                    for part in inroot::split(target).rev() {
                        todo.push_front(part.to_vec());
                    }
                }
                Known::File if !todo.is_empty() => return None,
                _ => at.push(child),
            }
        }
        at.pop()
    }

    fn record(&self, index: RecordIndex) -> &Record {
        &self.records[index.0 as usize]
    }

    fn find(&self, dir: RecordIndex, name: &[u8]) -> Result<usize, usize> {
        let children = &self.record(dir).children;
        // Walks come in order, so that what is new mostly goes to the end.
        if children.last().is_none_or(|last| &*self.record(*last).stored.name < name) {
            return Err(children.len());
        }
        children.binary_search_by(|child| (*self.record(*child).stored.name).cmp(name))
    }

    pub(super) fn child(&self, dir: RecordIndex, name: &[u8]) -> Option<RecordIndex> {
        self.find(dir, name).ok().map(|at| self.record(dir).children[at])
    }

    /// The record of a name in a directory, made if there is room.
    fn ensure(&mut self, dir: RecordIndex, name: &[u8], kind: Known) -> Option<RecordIndex> {
        match self.find(dir, name) {
            Ok(at) => Some(self.record(dir).children[at]),
            Err(at) => {
                let stored = Stored { parent: dir.0, name: name.into(), kind, digest: None };
                self.insert(at, stored)
            }
        }
    }

    fn insert(&mut self, at: usize, stored: Stored) -> Option<RecordIndex> {
        if self.records.len() >= self.records_max {
            return None;
        }
        let index = RecordIndex(u32::try_from(self.records.len()).expect("because RECORDS_MAX fits"));
        self.records[stored.parent as usize].children.insert(at, index);
        self.records.push(Record { stored, children: Vec::new() });
        self.is_modified = true;
        Some(index)
    }

    pub(super) fn ensure_dir(&mut self, dir: RecordIndex, name: &[u8]) -> Option<RecordIndex> {
        self.ensure(dir, name, Known::Directory { header: None })
    }

    pub(super) fn ensure_file(&mut self, dir: RecordIndex, name: &[u8]) -> Option<RecordIndex> {
        self.ensure(dir, name, Known::File)
    }

    pub(super) fn ensure_link(&mut self, dir: RecordIndex, name: &[u8], target: &[u8]) -> Option<RecordIndex> {
        self.ensure(dir, name, Known::Symlink { target: target.into() })
    }

    /// The record of the directory at `components`, of which none is a link.
    pub(super) fn ensure_dirs<'a>(&mut self, components: impl IntoIterator<Item = &'a [u8]>) -> Option<RecordIndex> {
        components.into_iter().try_fold(RecordIndex::ROOT, |dir, name| self.ensure_dir(dir, name))
    }

    pub(super) fn digest(&self, index: RecordIndex) -> Option<ContentDigest> {
        self.record(index).stored.digest
    }

    pub(super) fn set_digest(&mut self, index: RecordIndex, digest: ContentDigest) {
        self.records[index.0 as usize].stored.digest = Some(digest);
        self.is_modified = true;
    }

    pub(super) fn header(&self, index: RecordIndex) -> Option<ContentDigest> {
        match self.record(index).stored.kind {
            Known::Directory { header } => header,
            Known::File | Known::Symlink { .. } => None,
        }
    }

    pub(super) fn set_header(&mut self, index: RecordIndex, digest: ContentDigest) {
        if let Known::Directory { header } = &mut self.records[index.0 as usize].stored.kind {
            *header = Some(digest);
            self.is_modified = true;
        }
    }

    /// Forgets what was at these paths and below them, and the digests of all directories that hold them: somebody
    /// changed, made or removed what is there. Links in a path are not followed; of a directory whose header alone
    /// changed, all that is below is forgotten too. Costs a pass over all records, however many the paths.
    pub fn forget<P: AsRef<[u8]>>(&mut self, paths: impl IntoIterator<Item = P>) {
        let mut is_gone = vec![false; self.records.len()];
        for path in paths {
            let mut at = Some(RecordIndex::ROOT);
            let mut components = super::wildcard::normalise(path.as_ref()).into_iter();
            while let Some(dir) = at {
                self.records[dir.0 as usize].stored.digest = None;
                let Some(name) = components.next() else {
                    is_gone[dir.0 as usize] = true;
                    break;
                };
                at = self.child(dir, name);
            }
        }
        if is_gone[0] {
            *self = Self::with_records_max(self.records_max);
        } else {
            self.remove(&is_gone);
        }
        self.is_modified = true;
    }

    /// Drops records, and those below them.
    fn remove(&mut self, is_gone: &[bool]) {
        let old = std::mem::take(&mut self.records);
        let mut moved: Vec<Option<RecordIndex>> = Vec::with_capacity(old.len());
        for (at, record) in old.iter().enumerate() {
            let parent = if at == 0 { Some(RecordIndex::ROOT) } else { moved[record.stored.parent as usize] };
            let kept = parent.filter(|_| !is_gone[at]).map(|parent| {
                let index = u32::try_from(self.records.len()).expect("because RECORDS_MAX fits");
                let stored = Stored { parent: parent.0, ..record.stored.clone() };
                self.records.push(Record { stored, children: Vec::new() });
                RecordIndex(index)
            });
            moved.push(kept);
        }
        for (record, now) in old.iter().zip(&moved) {
            if let Some(now) = now {
                self.records[now.0 as usize].children =
                    record.children.iter().filter_map(|child| moved[child.0 as usize]).collect();
            }
        }
    }

    /// The stored form.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut records = Vec::with_capacity(self.records.len());
        records.extend(self.records.iter().map(|record| &record.stored));
        let mut bytes = postcard::to_extend(&records, vec![VERSION]).expect("because writing to a vector cannot fail");
        let mut sum = Sha256Hasher::default();
        sum.update(&bytes);
        bytes.extend_from_slice(&sum.finish());
        bytes
    }

    /// Reads the stored form.
    ///
    /// # Errors
    /// [`HashCacheError`]; whoever gets one begins with an empty cache.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, HashCacheError> {
        let corrupt = |what| HashCacheError::Corrupt { what };
        match bytes.first() {
            None => return Err(corrupt("there is nothing")),
            Some(&VERSION) => {}
            Some(found) => return Err(HashCacheError::Version { found: *found }),
        }
        let Some((body, sum)) = bytes.split_last_chunk::<SUM_BYTES>() else { return Err(corrupt("it is too short")) };
        let mut actual = Sha256Hasher::default();
        actual.update(body);
        if actual.finish() != *sum {
            return Err(corrupt("its checksum is another"));
        }
        let body = body.get(1..).ok_or(corrupt("it is too short"))?;
        let (stored, rest) = postcard::take_from_bytes::<Vec<Stored>>(body).map_err(|_| corrupt("it can't be read"))?;
        if !rest.is_empty() {
            return Err(corrupt("something follows"));
        }
        if stored.len() > RECORDS_MAX {
            return Err(corrupt("it has too many records"));
        }
        let mut stored = stored.into_iter();
        let mut cache = Self::default();
        match stored.next() {
            Some(root) if root.name.is_empty() && root.parent == 0 && matches!(root.kind, Known::Directory { .. }) => {
                cache.records[0].stored = root;
            }
            _ => return Err(corrupt("its first record is not the root")),
        }
        for record in stored {
            let parent = cache.records.get(record.parent as usize);
            if !parent.is_some_and(|parent| matches!(parent.stored.kind, Known::Directory { .. })) {
                return Err(corrupt("a record lies in no directory"));
            }
            if record.name.is_empty() || record.name.iter().any(|byte| matches!(byte, b'/' | 0)) {
                return Err(corrupt("a record has no name"));
            }
            match cache.find(RecordIndex(record.parent), &record.name) {
                Ok(_) => return Err(corrupt("two records are of one path")),
                Err(at) => cache.insert(at, record),
            };
        }
        cache.is_modified = false;
        Ok(cache)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> HashCache {
        let mut cache = HashCache::new();
        let dir = cache.ensure_dirs([&b"a"[..], b"b"]).unwrap();
        cache.set_header(dir, ContentDigest::from_bytes([1; 32]));
        let file = cache.ensure_file(dir, b"z").unwrap();
        cache.set_digest(file, ContentDigest::from_bytes([2; 32]));
        let file = cache.ensure_file(dir, b"f").unwrap();
        cache.set_digest(file, ContentDigest::from_bytes([3; 32]));
        cache.ensure_link(RecordIndex::ROOT, b"up", b"../a/./b/").unwrap();
        cache.ensure_link(dir, b"loop", b"loop").unwrap();
        cache
    }

    #[test]
    fn paths_are_found_through_links_without_the_tree() {
        let cache = sample();
        let f = Some(ContentDigest::from_bytes([3; 32]));
        for path in ["a/b/f", "/a//b/./f", "up/f", "a/../up/f", "../a/b/f/"] {
            assert_eq!(cache.get(path.as_bytes(), true), f, "{path}");
        }
        for path in ["", "a", "up", "a/b/loop", "a/b/loop/x", "a/b/f/x", "a/b/none", "none/../up/x"] {
            assert_eq!(cache.get(path.as_bytes(), true), None, "{path}");
        }
    }

    #[test]
    fn stored_and_read_it_is_the_same() {
        let cache = sample();
        assert!(cache.is_modified());
        let read = HashCache::from_bytes(&cache.to_bytes()).unwrap();
        assert!(!read.is_modified());
        assert_eq!(read.to_bytes(), cache.to_bytes());
        assert_eq!(read.get(b"up/z", false), cache.get(b"up/z", false));
        assert_eq!(read.records_count(), 7);
    }

    #[test]
    fn every_damage_is_an_error() {
        let good = sample().to_bytes();
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                let kind = HashCache::from_bytes(&bad).unwrap_err().kind();
                assert_eq!(kind, if at == 0 { ErrorKind::FailedPrecondition } else { ErrorKind::DataLoss });
            }
            assert!(HashCache::from_bytes(&good[..at]).is_err());
        }
    }

    #[test]
    fn records_that_make_no_tree_are_refused() {
        let stored = |records: &[Stored]| {
            let mut bytes = postcard::to_extend(records, vec![VERSION]).unwrap();
            let mut sum = Sha256Hasher::default();
            sum.update(&bytes);
            bytes.extend_from_slice(&sum.finish());
            HashCache::from_bytes(&bytes)
        };
        let dir = |parent, name: &[u8]| Stored {
            parent,
            name: name.into(),
            kind: Known::Directory { header: None },
            digest: None,
        };
        let file = |parent, name: &[u8]| Stored { kind: Known::File, ..dir(parent, name) };
        assert!(stored(&[dir(0, b""), dir(0, b"a"), file(1, b"b")]).is_ok());
        for bad in [
            &[][..],
            &[file(0, b"")],
            &[dir(0, b"a")],
            &[dir(0, b""), dir(1, b"a")],
            &[dir(0, b""), file(7, b"a")],
            &[dir(0, b""), file(0, b"a"), file(1, b"b")],
            &[dir(0, b""), file(0, b"a"), dir(0, b"a")],
            &[dir(0, b""), file(0, b"a/b")],
            &[dir(0, b""), file(0, b"")],
        ] {
            assert!(matches!(stored(bad), Err(HashCacheError::Corrupt { .. })), "{bad:?}");
        }
    }

    #[test]
    fn a_full_cache_takes_nothing_more() {
        let mut cache = HashCache::with_records_max(3);
        assert!(cache.ensure_dirs([&b"a"[..], b"b"]).is_some());
        assert!(cache.ensure_file(RecordIndex::ROOT, b"c").is_none());
        assert!(cache.ensure_dirs([&b"a"[..], b"b"]).is_some(), "what is there is found");
    }
}
