//! Reads the database files of Go's bbolt library.
//!
//! A file is a row of pages of one size. Two of them, the *meta pages*, tell where the tree of the last transaction
//! begins; each has a checksum, and the one that is whole and newer counts. From there on it is a tree of keys in order,
//! whose values may be trees of their own, *buckets*:
//!
//! ```text
//! meta 0 | meta 1 | page | page …        page = id u64, flags u16, count u16, overflow u32, then elements and their bytes
//! branch element = pos u32, key bytes u32, page u64            pos counts from the element's own first byte
//! leaf element   = flags u32, pos u32, key bytes u32, value bytes u32
//! bucket value   = root page u64, sequence u64, and, where the root page is 0, a leaf page in place
//! ```
//!
//! The list of free pages is never looked at, so files that were written without one (`NoFreelistSync`) read like all
//! others. Numbers are little-endian, as on the machines that the writers run on.
//!
//! # Trust
//! Whoever wrote the file may mean ill. Lengths and positions are checked against their page, pages against the file; a
//! page is part of one bucket at most, and read once for each look at that, so that no circle and no page in two places
//! costs more than the file has bytes. Nothing is mapped: what is read is a copy, and a page that is being written over
//! meanwhile is an error, not undefined behaviour.

#[cfg(test)]
mod tests;

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use plies_oci::ErrorKind;

/// First word of a meta page (bbolt, `internal/common/types.go`).
const MAGIC: u32 = 0xED0C_DAED;

/// The only version of the format that there ever was.
const VERSION: u32 = 2;

/// Sizes that a page may have, as powers of two: from bbolt's least to the largest that a kernel has.
const PAGE_BITS: std::ops::RangeInclusive<u32> = 10..=16;

const PAGE_HEADER_BYTES: usize = 16;
const ELEMENT_BYTES: usize = 16;
const BUCKET_BYTES: usize = 16;
/// Of a meta page behind its header; the last eight are the checksum of those before.
const META_BYTES: usize = 64;

const IS_BRANCH: u16 = 1;
const IS_LEAF: u16 = 2;
/// Of a leaf's element: its value is a bucket.
const IS_BUCKET: u32 = 1;

/// Pages from a bucket's root down to a leaf. Each level has two children at least, or it would not be there; a file
/// that a bucket of this depth fits into has more bytes than any disk.
const DEPTH_MAX: usize = 48;

/// Why a file could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BoltError {
    /// Its owner has it open for writing.
    #[error("{} is in use by the program that it belongs to: stop that, or work on a copy", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// It is no such file, or neither of its meta pages is whole.
    #[error("{} is no bbolt database: neither of its two first pages is whole", path.display())]
    NoDatabase {
        /// The file.
        path: PathBuf,
    },
    /// A part of it contradicts itself or the rest.
    #[error("{}: page {page} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Which page.
        page: u64,
        /// In which way.
        what: &'static str,
    },
    /// The file system did not do its part.
    #[error("{op} {}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl BoltError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InUse { .. } => ErrorKind::Busy,
            Self::NoDatabase { .. } => ErrorKind::InvalidInput,
            Self::Damaged { .. } => ErrorKind::DataLoss,
            Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
            Self::Io { .. } => ErrorKind::Unavailable,
        }
    }
}

/// What a key has.
#[derive(Debug)]
pub enum Item<'a> {
    /// Bytes.
    Value(Vec<u8>),
    /// More keys.
    Bucket(Bucket<'a>),
}

impl<'a> Item<'a> {
    /// The bytes, if it is no bucket.
    pub fn value(self) -> Option<Vec<u8>> {
        match self {
            Self::Value(bytes) => Some(bytes),
            Self::Bucket(_) => None,
        }
    }

    /// The bucket, if it is one.
    pub fn bucket(self) -> Option<Bucket<'a>> {
        match self {
            Self::Value(_) => None,
            Self::Bucket(bucket) => Some(bucket),
        }
    }
}

/// Which bucket a page is a part of: the page and the place in it that name the bucket; the root is named by page 0.
type Owner = (u64, usize);

/// An open file. A shared lock keeps writers out until it is dropped.
#[derive(Debug)]
pub struct Bolt {
    path: PathBuf,
    file: File,
    page_bytes: usize,
    pages_count: u64,
    root: u64,
    owners: RefCell<HashMap<u64, Owner>>,
}

/// Keys in order, of the whole file or below one key.
#[derive(Debug, Clone)]
pub struct Bucket<'a> {
    bolt: &'a Bolt,
    owner: Owner,
    tree: Tree,
}

#[derive(Debug, Clone)]
enum Tree {
    Page(u64),
    /// A leaf page that is the bucket's own value.
    Inline(Vec<u8>),
}

/// A page with all that flows over, or one in place.
struct Page {
    /// For messages.
    number: u64,
    bytes: Vec<u8>,
    flags: u16,
    count: usize,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..)?.first_chunk().copied()?))
}

/// FNV-1a with 64 bits, the checksum of a meta page.
fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3))
}

/// What a meta page says.
struct Meta {
    page_bytes: u64,
    root: u64,
    pages_count: u64,
    transaction: u64,
}

impl Meta {
    /// `None` if it is not whole.
    fn read(file: &File, at: u64) -> Option<Self> {
        let mut page = [0; PAGE_HEADER_BYTES + META_BYTES];
        file.read_exact_at(&mut page, at).ok()?;
        let meta = &page[PAGE_HEADER_BYTES..];
        let known = u32_at(meta, 0)? == MAGIC && u32_at(meta, 4)? == VERSION;
        (known && u64_at(meta, 56)? == fnv(&meta[..56])).then_some(())?;
        let page_bytes = u32_at(meta, 8)?;
        (page_bytes.is_power_of_two() && PAGE_BITS.contains(&page_bytes.ilog2())).then_some(())?;
        let (root, pages_count, transaction) = (u64_at(meta, 16)?, u64_at(meta, 40)?, u64_at(meta, 48)?);
        Some(Self { page_bytes: page_bytes.into(), root, pages_count, transaction })
    }

    /// The newer of those that are whole. If the first is not, only trying tells how long it is.
    fn newest(file: &File) -> Option<Self> {
        let first = Self::read(file, 0);
        let second = match &first {
            Some(first) => Self::read(file, first.page_bytes),
            None => PAGE_BITS.map(|bits| 1 << bits).find_map(|at| {
                let meta = Self::read(file, at)?;
                (meta.page_bytes == at).then_some(meta)
            }),
        };
        first.into_iter().chain(second).max_by_key(|meta| meta.transaction)
    }
}

impl Bolt {
    /// Opens a file for reading, and takes a shared lock on it as Go's library does.
    ///
    /// # Errors
    /// [`BoltError::InUse`] if its owner is running; [`BoltError::NoDatabase`], [`BoltError::Io`].
    pub fn open(path: &Path) -> Result<Self, BoltError> {
        let io = |op| move |source| BoltError::Io { op, path: path.to_owned(), source };
        // What is no file at all must not be waited for.
        let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::CLOEXEC;
        let flags = i32::try_from(flags.bits()).unwrap_or_default();
        let file = File::options().read(true).custom_flags(flags).open(path).map_err(io("open"))?;
        let meta = file.metadata().map_err(io("stat"))?;
        let none = || BoltError::NoDatabase { path: path.to_owned() };
        if !meta.is_file() {
            return Err(none());
        }
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockShared).map_err(|errno| match errno {
            rustix::io::Errno::WOULDBLOCK => BoltError::InUse { path: path.to_owned() },
            other => io("lock")(other.into()),
        })?;
        let Meta { page_bytes, root, pages_count, .. } = Meta::newest(&file).ok_or_else(none)?;
        // A file that was cut off has fewer than it says.
        let pages_count = pages_count.min(meta.len() / page_bytes);
        let page_bytes = usize::try_from(page_bytes).map_err(|_| none())?;
        Ok(Self { path: path.to_owned(), file, page_bytes, pages_count, root, owners: RefCell::default() })
    }

    /// The bucket that everything is in.
    pub fn root(&self) -> Bucket<'_> {
        Bucket { bolt: self, owner: (0, 0), tree: Tree::Page(self.root) }
    }

    fn damaged(&self, page: u64, what: &'static str) -> BoltError {
        BoltError::Damaged { path: self.path.clone(), page, what }
    }

    /// Reads a page that is part of the bucket `owner`.
    fn page(&self, number: u64, owner: Owner) -> Result<Page, BoltError> {
        let damaged = |what| self.damaged(number, what);
        let io = |source| BoltError::Io { op: "read", path: self.path.clone(), source };
        let start = |count: u64| count.checked_mul(self.page_bytes as u64).ok_or_else(|| damaged("it lies nowhere"));
        // Pages 0 and 1 are the meta pages.
        if !(2..self.pages_count).contains(&number) {
            return Err(damaged("it lies outside of the file"));
        }
        let mut bytes = vec![0; self.page_bytes];
        self.file.read_exact_at(&mut bytes, start(number)?).map_err(io)?;
        let (id, overflow) = (u64_at(&bytes, 0), u64::from(u32_at(&bytes, 12).unwrap_or(0)));
        if id != Some(number) {
            return Err(damaged("it has the number of another page"));
        }
        if overflow >= self.pages_count - number {
            return Err(damaged("it flows over the end of the file"));
        }
        let mut owners = self.owners.borrow_mut();
        for part in number..=number + overflow {
            if *owners.entry(part).or_insert(owner) != owner {
                return Err(damaged("it is in two buckets"));
            }
        }
        drop(owners);
        if overflow > 0 {
            let all = usize::try_from(start(1 + overflow)?).map_err(|_| damaged("it is too long"))?;
            bytes.resize(all, 0);
            self.file.read_exact_at(&mut bytes[self.page_bytes..], start(number + 1)?).map_err(io)?;
        }
        Page::parse(number, bytes).ok_or_else(|| damaged("it has more elements than room"))
    }
}

impl Page {
    fn parse(number: u64, bytes: Vec<u8>) -> Option<Self> {
        let (flags, count) = (u16_at(&bytes, 8)?, usize::from(u16_at(&bytes, 10)?));
        (PAGE_HEADER_BYTES + count * ELEMENT_BYTES <= bytes.len()).then_some(Self { number, bytes, flags, count })
    }

    fn at(place: usize) -> usize {
        PAGE_HEADER_BYTES + place * ELEMENT_BYTES
    }

    /// Bytes `from..from + length` behind the position that the element at `place` has in its word `word`.
    fn bytes_of(&self, place: usize, word: usize, skip: u32, length: u32) -> Option<&[u8]> {
        let position = usize::try_from(u32_at(&self.bytes, Self::at(place) + word)?).ok()?;
        let start = Self::at(place).checked_add(position)?.checked_add(usize::try_from(skip).ok()?)?;
        self.bytes.get(start..start.checked_add(usize::try_from(length).ok()?)?)
    }

    /// A branch's child.
    fn child(&self, place: usize) -> Option<u64> {
        u64_at(&self.bytes, Self::at(place) + 8)
    }

    /// A key of a branch.
    fn branch_key(&self, place: usize) -> Option<&[u8]> {
        self.bytes_of(place, 0, 0, u32_at(&self.bytes, Self::at(place) + 4)?)
    }

    /// A leaf's element: whether it is a bucket, key and value.
    fn leaf(&self, place: usize) -> Option<(bool, &[u8], &[u8])> {
        let word = |word: usize| u32_at(&self.bytes, Self::at(place) + word);
        let (flags, key_bytes, value_bytes) = (word(0)?, word(8)?, word(12)?);
        let key = self.bytes_of(place, 4, 0, key_bytes)?;
        Some((flags & IS_BUCKET != 0, key, self.bytes_of(place, 4, key_bytes, value_bytes)?))
    }
}

impl<'a> Bucket<'a> {
    /// Calls `visit` for every key in order, until it fails.
    ///
    /// # Errors
    /// [`BoltError`], and what `visit` says.
    pub fn each<E: From<BoltError>>(&self, mut visit: impl FnMut(&[u8], Item<'a>) -> Result<(), E>) -> Result<(), E> {
        // Pages that were read for this look, and those that are still to be read, the next one last.
        let mut seen = HashSet::new();
        let mut pending = Vec::new();
        let mut next = Some((self.top()?, 0));
        while let Some((page, depth)) = next {
            if page.flags & IS_BRANCH != 0 {
                for place in (0..page.count).rev() {
                    let child = page.child(place).ok_or_else(|| self.cut_off(&page))?;
                    pending.push((child, depth + 1));
                }
            } else {
                for place in 0..page.count {
                    let (key, item) = self.item(&page, place)?;
                    visit(key, item)?;
                }
            }
            next = match pending.pop() {
                Some((number, depth)) => {
                    if !seen.insert(number) || depth > DEPTH_MAX {
                        return Err(self.bolt.damaged(number, "it stands below itself, or twice in one tree").into());
                    }
                    Some((self.read(number)?, depth))
                }
                None => None,
            };
        }
        Ok(())
    }

    /// What a key has.
    ///
    /// # Errors
    /// [`BoltError`].
    pub fn get(&self, wanted: &[u8]) -> Result<Option<Item<'a>>, BoltError> {
        let mut page = self.top()?;
        for _ in 0..DEPTH_MAX {
            if page.flags & IS_BRANCH == 0 {
                let place = self.first_not_below(&page, wanted, |place| Some(page.leaf(place)?.1))?;
                if place == page.count {
                    return Ok(None);
                }
                let (key, item) = self.item(&page, place)?;
                return Ok((key == wanted).then_some(item));
            }
            // The last child whose first key is not above the wanted one.
            let place = self.first_not_below(&page, wanted, |place| page.branch_key(place))?;
            let exact = place < page.count && page.branch_key(place) == Some(wanted);
            let place = if exact { place } else { place.saturating_sub(1) };
            page = self.read(page.child(place).ok_or_else(|| self.cut_off(&page))?)?;
        }
        Err(self.bolt.damaged(page.number, "it stands below itself"))
    }

    /// The bucket at the end of a path of keys; `None` if there is none.
    ///
    /// # Errors
    /// [`BoltError`].
    pub fn bucket(&self, path: &[&[u8]]) -> Result<Option<Bucket<'a>>, BoltError> {
        let mut found = self.clone();
        for key in path {
            let Some(Item::Bucket(inner)) = found.get(key)? else { return Ok(None) };
            found = inner;
        }
        Ok(Some(found))
    }

    fn cut_off(&self, page: &Page) -> BoltError {
        self.bolt.damaged(page.number, "an element of it lies outside of it")
    }

    /// The place of the first key that is not below `wanted`.
    fn first_not_below<'p>(
        &self,
        page: &'p Page,
        wanted: &[u8],
        key: impl Fn(usize) -> Option<&'p [u8]>,
    ) -> Result<usize, BoltError> {
        let (mut low, mut high) = (0, page.count);
        while low < high {
            let middle = low.midpoint(high);
            match key(middle).ok_or_else(|| self.cut_off(page))? < wanted {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        Ok(low)
    }

    fn top(&self) -> Result<Page, BoltError> {
        match &self.tree {
            Tree::Page(number) => self.read(*number),
            Tree::Inline(bytes) => {
                let page = Page::parse(self.owner.0, bytes.clone()).filter(|page| page.flags & IS_LEAF != 0);
                page.ok_or_else(|| self.bolt.damaged(self.owner.0, "a bucket in it is no leaf"))
            }
        }
    }

    fn read(&self, number: u64) -> Result<Page, BoltError> {
        let page = self.bolt.page(number, self.owner)?;
        match page.flags {
            IS_BRANCH if page.count == 0 => Err(self.bolt.damaged(number, "a branch without children")),
            IS_BRANCH | IS_LEAF => Ok(page),
            _ => Err(self.bolt.damaged(number, "it is neither a branch nor a leaf")),
        }
    }

    fn item<'p>(&self, page: &'p Page, place: usize) -> Result<(&'p [u8], Item<'a>), BoltError> {
        let (is_bucket, key, value) = page.leaf(place).ok_or_else(|| self.cut_off(page))?;
        if !is_bucket {
            return Ok((key, Item::Value(value.to_vec())));
        }
        if matches!(self.tree, Tree::Inline(_)) {
            return Err(self.bolt.damaged(page.number, "a bucket in place has a bucket in it"));
        }
        let tree = match u64_at(value, 0) {
            Some(0) if value.len() >= BUCKET_BYTES => Tree::Inline(value[BUCKET_BYTES..].to_vec()),
            Some(root) if value.len() >= BUCKET_BYTES => Tree::Page(root),
            _ => return Err(self.cut_off(page)),
        };
        Ok((key, Item::Bucket(Bucket { bolt: self.bolt, owner: (page.number, place), tree })))
    }
}
