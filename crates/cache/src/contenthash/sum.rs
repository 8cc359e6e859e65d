//! The digest of a file, and that of a directory with all that is in it.
//!
//! A directory's is the sha256 of one line for itself and each name in it, in byte order of names:
//!
//! ```text
//! NUL         "sha256:" <hex of its header's digest>
//! NUL <name>  "sha256:" <hex of the digest of what the name leads to>   …
//! ```
//!
//! No name has a NUL and all digests are of one length, so that no two lists run together.

use std::collections::HashMap;
use std::fs::File;
use std::io;

use plies_archive::tar::{Device, Escaped};
use plies_archive::tree::Kind;
use plies_oci::Sha256Hasher;
use rustix::fs::FileType;

use super::cache::{HashCache, RecordIndex};
use super::header::{self, Header};
use super::inroot::Resolved;
use super::walk::{DEPTH_MAX, Found, Step, Visitor, Walk, join};
use super::{ChecksumError, ContentDigest};

/// Digests of single files and headers, known or computed.
pub(super) struct Sums<'a> {
    pub(super) cache: &'a mut HashCache,
    go_on: &'a dyn Fn() -> io::Result<()>,
    /// What files are read through.
    buffer: Vec<u8>,
    /// Files with several names, by device and inode: they are read once.
    links: HashMap<(u64, u64), ContentDigest>,
}

impl<'a> Sums<'a> {
    pub(super) fn new(cache: &'a mut HashCache, go_on: &'a dyn Fn() -> io::Result<()>) -> Self {
        Self { cache, go_on, buffer: vec![0; header::READ_BYTES], links: HashMap::new() }
    }

    /// The digest of all there is. `None` for a socket, which no tree holds.
    pub(super) fn of(&mut self, resolved: &Resolved) -> Result<Option<ContentDigest>, ChecksumError> {
        let place = Place::of(self.cache, resolved);
        let mut sum = Sum { base: &resolved.path, place, sums: self, dirs: Vec::new(), result: None };
        walk(&resolved.path, Vec::new()).run(resolved, &mut sum)?;
        Ok(sum.result)
    }

    /// The digest of a directory's header.
    pub(super) fn header(
        &mut self,
        record: Option<RecordIndex>,
        base: &[u8],
        found: &Found<'_>,
    ) -> Result<ContentDigest, ChecksumError> {
        if let Some(known) = record.and_then(|record| self.cache.header(record)) {
            return Ok(known);
        }
        (self.go_on)().map_err(failed("read", base, found))?;
        let digest = ContentDigest(begin(base, found, b"")?.finish());
        if let Some(record) = record {
            self.cache.set_header(record, digest);
        }
        Ok(digest)
    }

    /// The digest of anything but a directory, which is called `name` in `dir`.
    pub(super) fn leaf(
        &mut self,
        dir: Option<RecordIndex>,
        name: &[u8],
        base: &[u8],
        found: &Found<'_>,
    ) -> Result<ContentDigest, ChecksumError> {
        let record = dir.and_then(|dir| self.cache.child(dir, name));
        if let Some(known) = record.and_then(|record| self.cache.digest(record)) {
            return Ok(known);
        }
        (self.go_on)().map_err(failed("read", base, found))?;
        let mut target = Vec::new();
        let digest = match found.kind() {
            FileType::RegularFile => self.file(base, found)?,
            FileType::Symlink => {
                target = found.link().map_err(failed("read the link", base, found))?;
                ContentDigest(begin(base, found, &target)?.finish())
            }
            _ => ContentDigest(begin(base, found, b"")?.finish()),
        };
        let record = dir.and_then(|dir| match found.kind() {
            FileType::Symlink => self.cache.ensure_link(dir, name, &target),
            _ => self.cache.ensure_file(dir, name),
        });
        if let Some(record) = record {
            self.cache.set_digest(record, digest);
        }
        Ok(digest)
    }

    fn file(&mut self, base: &[u8], found: &Found<'_>) -> Result<ContentDigest, ChecksumError> {
        let inode = (found.stat.st_nlink > 1).then_some((found.stat.st_dev, found.stat.st_ino));
        if let Some(known) = inode.and_then(|inode| self.links.get(&inode)) {
            return Ok(*known);
        }
        let mut sum = begin(base, found, b"")?;
        let file = File::from(found.open().map_err(failed("open", base, found))?);
        let read_bytes =
            header::add_content(&file, &mut sum, &mut self.buffer, self.go_on).map_err(failed("read", base, found))?;
        let after = rustix::fs::fstat(&file).map_err(|errno| failed("stat", base, found)(errno.into()))?;
        let modified = |stat: &rustix::fs::Stat| (stat.st_size, stat.st_mtime, stat.st_mtime_nsec);
        if read_bytes != size_bytes(found) || modified(&after) != modified(found.stat) {
            return Err(ChecksumError::Changed { path: path(base, found) });
        }
        let digest = ContentDigest(sum.finish());
        if let Some(inode) = inode {
            self.links.insert(inode, digest);
        }
        Ok(digest)
    }
}

/// Everything that hashing walks: an immutable tree, as deep as we go.
pub(super) fn walk<'a>(base: &'a [u8], rules: Vec<super::Rule<'a>>) -> Walk<'a> {
    Walk { base, rules, shows_start: false, is_live: false, depth_max: DEPTH_MAX }
}

/// Adds a line of a list: a path's components, each after a NUL, and a digest.
pub(super) fn add_line(sum: &mut Sha256Hasher, path: &[u8], digest: &ContentDigest) {
    for component in path.split(|byte| *byte == b'/') {
        sum.update(&[0]);
        sum.update(component);
    }
    sum.update(digest.to_string().as_bytes());
}

fn begin(base: &[u8], found: &Found<'_>, link: &[u8]) -> Result<Sha256Hasher, ChecksumError> {
    let device =
        || Device { major: rustix::fs::major(found.stat.st_rdev), minor: rustix::fs::minor(found.stat.st_rdev) };
    let kind = match found.kind() {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        FileType::Fifo => Kind::Fifo,
        FileType::CharacterDevice => Kind::CharDevice(device()),
        FileType::BlockDevice => Kind::BlockDevice(device()),
        FileType::Socket => Kind::Socket,
        FileType::Unknown => {
            return Err(failed("stat", base, found)(io::Error::other("unknown type of file")));
        }
    };
    let header = Header {
        kind,
        mode: found.stat.st_mode & 0o7777,
        uid: found.stat.st_uid,
        gid: found.stat.st_gid,
        size_bytes: size_bytes(found),
        link,
        xattrs: &found.xattrs(header::counts).map_err(failed("read the attributes of", base, found))?,
    };
    Ok(header.begin())
}

fn size_bytes(found: &Found<'_>) -> u64 {
    u64::try_from(found.stat.st_size).unwrap_or(0)
}

fn path(base: &[u8], found: &Found<'_>) -> Escaped {
    Escaped::of(&join(base, found.path))
}

fn failed(op: &'static str, base: &[u8], found: &Found<'_>) -> impl FnOnce(io::Error) -> ChecksumError + use<> {
    let path = path(base, found);
    move |source| ChecksumError::Io { op, path, source }
}

/// Where a walk begins, in the cache.
pub(super) struct Place {
    /// The directory that holds it; `None` for the root, and when the cache is full.
    pub(super) dir: Option<RecordIndex>,
    /// Its name there; `None` for the root.
    pub(super) name: Option<Vec<u8>>,
}

impl Place {
    pub(super) fn of(cache: &mut HashCache, resolved: &Resolved) -> Self {
        let components: Vec<_> = super::inroot::split(&resolved.path).collect();
        match components.split_last() {
            None => Self { dir: None, name: None },
            Some((name, dirs)) => Self { dir: cache.ensure_dirs(dirs.iter().copied()), name: Some(name.to_vec()) },
        }
    }

    /// The record of a directory: of where the walk begins, or in `above`.
    pub(super) fn dir(
        &self,
        cache: &mut HashCache,
        above: Option<Option<RecordIndex>>,
        found: &Found<'_>,
    ) -> Option<RecordIndex> {
        match (above, &self.name) {
            (Some(above), _) => cache.ensure_dir(above?, found.name()),
            (None, Some(name)) => cache.ensure_dir(self.dir?, name),
            (None, None) => Some(RecordIndex::ROOT),
        }
    }

    /// The directory of anything else, and its name there.
    pub(super) fn leaf<'n>(
        &'n self,
        above: Option<Option<RecordIndex>>,
        found: &'n Found<'_>,
    ) -> (Option<RecordIndex>, &'n [u8]) {
        match above {
            Some(above) => (above, found.name()),
            None => (self.dir, self.name.as_deref().unwrap_or_default()),
        }
    }
}

/// Adds up a directory with all that is in it.
struct Sum<'s, 'a> {
    base: &'s [u8],
    place: Place,
    sums: &'s mut Sums<'a>,
    /// The directories being added up, innermost last, with their records.
    dirs: Vec<(Option<RecordIndex>, Sha256Hasher)>,
    result: Option<ContentDigest>,
}

impl Sum<'_, '_> {
    fn above(&self) -> Option<Option<RecordIndex>> {
        self.dirs.last().map(|(record, _)| *record)
    }

    fn add(&mut self, found: &Found<'_>, digest: ContentDigest) {
        match self.dirs.last_mut() {
            Some((_, sum)) => add_line(sum, found.name(), &digest),
            None => self.result = Some(digest),
        }
    }
}

impl Visitor for Sum<'_, '_> {
    type Error = ChecksumError;

    fn enter(&mut self, found: &Found<'_>) -> Result<Step, ChecksumError> {
        let above = self.above();
        let record = self.place.dir(self.sums.cache, above, found);
        if let Some(known) = record.and_then(|record| self.sums.cache.digest(record)) {
            self.add(found, known);
            return Ok(Step::Over);
        }
        let header = self.sums.header(record, self.base, found)?;
        let mut sum = Sha256Hasher::default();
        add_line(&mut sum, b"", &header);
        self.dirs.push((record, sum));
        Ok(Step::Into)
    }

    fn leave(&mut self, found: &Found<'_>) -> Result<(), ChecksumError> {
        let (record, sum) = self.dirs.pop().expect("because what is left was entered");
        let digest = ContentDigest(sum.finish());
        if let Some(record) = record {
            self.sums.cache.set_digest(record, digest);
        }
        self.add(found, digest);
        Ok(())
    }

    fn leaf(&mut self, found: &Found<'_>) -> Result<(), ChecksumError> {
        let (dir, name) = self.place.leaf(self.above(), found);
        let digest = self.sums.leaf(dir, name, self.base, found)?;
        self.add(found, digest);
        Ok(())
    }
}
