//! Archives from trees: a stored layer as the archive it stands for, and two trees as the layer
//! that leads from one to the other.
//!
//! The same tree gives the same bytes: names come in byte order, a directory before what it
//! holds, and of several names of one file the first holds the content and the others are hard
//! links to it. Sockets have no place in an archive and are passed over, as all peers do. A file
//! whose own name begins with `.wh.` cannot be told from a mark and is refused.

use std::collections::{HashMap, HashSet};
use std::io::{self, Write};
use std::os::fd::BorrowedFd;

use plies_oci::ErrorKind;
use rustix::fs::{FileType, Stat};
use rustix::io::{Errno, Result as SysResult};

use crate::index::{DirIndex, Implied};
use crate::sys::{self, Subject};
use crate::tar::{Entry, EntryKind, EntryPath, Timestamp, WriteError, Writer};
use crate::tree::{self, Below, Descent, Found, Kind, Names, WalkError};
use crate::whiteout::{self, Mark, Meaning};
use crate::xattr;

#[cfg(test)]
mod tests;

/// Why a tree could not be made an archive.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiffError {
    /// A tree could not be read.
    #[error(transparent)]
    Read(#[from] WalkError),
    /// Something that no layer archive has a place for.
    #[error("{path}: {why}")]
    Unrepresentable {
        /// Where.
        path: EntryPath,
        /// What does not fit.
        why: &'static str,
    },
    /// The archive could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl DiffError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Read(_) => ErrorKind::Unavailable,
            Self::Unrepresentable { .. } => ErrorKind::InvalidInput,
            Self::Write(error) => error.kind(),
        }
    }
}

fn read_error(path: &EntryPath) -> impl FnOnce(Errno) -> DiffError + '_ {
    |error| DiffError::Read(WalkError { path: path.clone(), source: error.into() })
}

/// Writes a stored layer as an archive; `index` says which directories to leave out:
/// those on the way, of which nothing is known. Gives the
/// number of entries. The caller finishes `out`.
///
/// # Errors
/// [`DiffError`]. `out` then ends in the middle of something.
pub fn layer_to_tar<W: Write>(layer: BorrowedFd<'_>, index: &DirIndex, out: &mut Writer<W>) -> Result<u64, DiffError> {
    let mut archive = Archive::new(out);
    tree::walk(layer, |found| {
        if found.is_whiteout() {
            let (dir, name) = found.path.split().expect("because the root is a directory");
            return archive.mark(&dir, Mark::Whiteout(name));
        }
        if index.why_implied(found.path) != Some(Implied::OnTheWay) {
            archive.found(&found)?;
        }
        if found.kind == Kind::Directory && found.is_opaque().map_err(|source| WalkError::at(found.path, source))? {
            archive.mark(found.path, Mark::Opaque)?;
        }
        Ok(())
    })?;
    Ok(archive.entries)
}

/// Whether the archive of a stored layer has an entry that was changed later than `than`. Reads no file.
///
/// # Errors
/// [`DiffError::Read`].
pub fn is_newer(layer: BorrowedFd<'_>, index: &DirIndex, than: Timestamp) -> Result<bool, DiffError> {
    let mut newer = false;
    tree::walk(layer, |found| {
        let is_entry = !found.is_whiteout() && index.why_implied(found.path) != Some(Implied::OnTheWay);
        newer |= is_entry && found.mtime > than;
        Ok::<_, DiffError>(())
    })?;
    Ok(newer)
}

/// Writes the layer that makes `upper` of `lower` (of nothing, if there is no lower), both plain
/// or mounted trees without marks. Gives the number of entries. The caller finishes `out`.
///
/// Two files are the same when type, owner, mode, time, attributes and content are, and the same
/// names lead to them; content is read where all else agrees, for a build that sets all times to
/// the same value changes files without a trace in their metadata. Reads no file of which the
/// trees share the inode.
///
/// # Errors
/// [`DiffError`]. `out` then ends in the middle of something.
pub fn diff_trees<W: Write>(
    lower: Option<BorrowedFd<'_>>,
    upper: BorrowedFd<'_>,
    out: &mut Writer<W>,
) -> Result<u64, DiffError> {
    let root = EntryPath::root();
    let mut diff = Diff {
        archive: Archive::new(out),
        relinked: lower.map_or_else(|| Ok(HashSet::new()), |lower| relinked(lower, upper))?,
        upper: Descent::new(upper).map_err(read_error(&root))?,
        lower: Below::new(lower).map_err(read_error(&root))?,
        here: root,
    };
    let stat = rustix::fs::fstat(diff.upper.here()).map_err(read_error(&diff.here))?;
    let mut frames = vec![diff.directory(&stat)?];
    while let Some(frame) = frames.last_mut() {
        let Some((name, in_upper, in_lower)) = frame.next() else {
            frames.pop();
            if !frames.is_empty() {
                diff.leave()?;
            }
            continue;
        };
        if in_upper {
            frames.extend(diff.name(&name, in_lower)?);
        } else {
            diff.archive.mark(&diff.here, Mark::Whiteout(&name))?;
        }
    }
    Ok(diff.archive.entries)
}

/// The names of a directory in both trees.
struct Frame {
    upper: Names,
    lower: Names,
}

impl Frame {
    /// The next name, and which trees have it.
    fn next(&mut self) -> Option<(Vec<u8>, bool, bool)> {
        let name = match (self.upper.peek(), self.lower.peek()) {
            (Some(upper), Some(lower)) => upper.min(lower),
            (upper, lower) => upper.or(lower)?,
        }
        .to_vec();
        let in_upper = self.upper.peek() == Some(&name);
        let in_lower = self.lower.peek() == Some(&name);
        if in_upper {
            self.upper.advance();
        }
        if in_lower {
            self.lower.advance();
        }
        Some((name, in_upper, in_lower))
    }
}

struct Diff<'w, W: Write> {
    archive: Archive<'w, W>,
    /// Paths whose names for the same file changed.
    relinked: HashSet<EntryPath>,
    upper: Descent,
    lower: Below,
    here: EntryPath,
}

impl<W: Write> Diff<'_, W> {
    /// Writes the directory where the walk stands, if it is new or changed.
    fn directory(&mut self, stat: &Stat) -> Result<Frame, DiffError> {
        let upper = self.upper.here();
        let look = || -> SysResult<_> {
            let Some(lower) = self.lower.here() else { return Ok((false, Names::default())) };
            let below = rustix::fs::fstat(lower)?;
            let same = is_same_metadata(stat, &below) && is_same_xattrs(Subject::Fd(upper), Subject::Fd(lower))?;
            Ok((same, Names::sorted(lower)?))
        };
        let (same, lower) = look().map_err(read_error(&self.here))?;
        if !same {
            self.archive.found(&found(&self.here, stat, Subject::Fd(upper))?)?;
        }
        Ok(Frame { upper: Names::sorted(upper).map_err(read_error(&self.here))?, lower })
    }

    /// Writes a name of the upper tree, if it is new or changed. A frame for a directory.
    fn name(&mut self, name: &[u8], in_lower: bool) -> Result<Option<Frame>, DiffError> {
        let path = self.here.join(name);
        let at = || read_error(&path);
        let stat = sys::stat_at(self.upper.here(), name).map_err(at())?;
        if sys::kind(&stat) == FileType::Directory {
            self.upper.enter(name).map_err(at())?;
            self.lower.enter(name).map_err(at())?;
            self.here = path;
            return self.directory(&stat).map(Some);
        }
        let below = if in_lower { self.lower.stat(name).map_err(at())? } else { None };
        if sys::kind(&stat) == FileType::Socket {
            if below.is_some_and(|below| sys::kind(&below) != FileType::Socket) {
                self.archive.mark(&self.here, Mark::Whiteout(name))?;
            }
            return Ok(None);
        }
        let upper = (self.upper.here(), name);
        let same = match (below, self.lower.here()) {
            (Some(below), Some(lower)) if !self.relinked.contains(&path) => {
                is_same_file(&stat, upper, &below, (lower, name)).map_err(at())?
            }
            _ => false,
        };
        if !same {
            let found = found(&path, &stat, Subject::At(upper.0, name))?;
            if found.is_whiteout() {
                let why = "a character device 0:0 would hide a file";
                return Err(DiffError::Unrepresentable { path: path.clone(), why });
            }
            self.archive.found(&found)?;
        }
        Ok(None)
    }

    fn leave(&mut self) -> Result<(), DiffError> {
        self.upper.leave().and_then(|_| self.lower.leave()).map_err(read_error(&self.here))?;
        self.here = self.here.split().map_or_else(EntryPath::root, |(outer, _)| outer);
        Ok(())
    }
}

fn found<'a>(path: &'a EntryPath, stat: &Stat, at: Subject<'a>) -> Result<Found<'a>, DiffError> {
    Found::new(path, stat, at).map_err(|source| WalkError::at(path, source).into())
}

pub(crate) fn is_same_metadata(a: &Stat, b: &Stat) -> bool {
    sys::kind(a) == sys::kind(b)
        && sys::mode_bits(a) == sys::mode_bits(b)
        && (a.st_uid, a.st_gid) == (b.st_uid, b.st_gid)
        && sys::mtime(a) == sys::mtime(b)
}

pub(crate) fn is_same_xattrs(a: Subject<'_>, b: Subject<'_>) -> SysResult<bool> {
    Ok(xattr::read(a)? == xattr::read(b)?)
}

/// Whether two files are the same to [`diff_trees`], the names that lead to them aside. Neither is a directory.
///
/// # Errors
/// The kernel's.
pub fn same_file(a: At<'_>, b: At<'_>) -> io::Result<bool> {
    let (stat_a, stat_b) = (sys::stat_at(a.0, a.1)?, sys::stat_at(b.0, b.1)?);
    Ok(is_same_file(&stat_a, a, &stat_b, b)?)
}

/// Whether two things that are no directories are the same.
pub(crate) fn is_same_file(a: &Stat, (a_dir, a_name): At<'_>, b: &Stat, (b_dir, b_name): At<'_>) -> SysResult<bool> {
    if (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino) {
        return Ok(true);
    }
    if !is_same_metadata(a, b) || !is_same_xattrs(Subject::At(a_dir, a_name), Subject::At(b_dir, b_name))? {
        return Ok(false);
    }
    match sys::kind(a) {
        FileType::RegularFile if a.st_size != b.st_size => Ok(false),
        FileType::RegularFile if a.st_size == 0 => Ok(true),
        FileType::RegularFile => is_same_content(a_dir, a_name, b_dir, b_name),
        FileType::Symlink => Ok(sys::read_link(a_dir, a_name)? == sys::read_link(b_dir, b_name)?),
        FileType::CharacterDevice | FileType::BlockDevice => Ok(a.st_rdev == b.st_rdev),
        _ => Ok(true),
    }
}

/// A name in a directory.
pub type At<'a> = (BorrowedFd<'a>, &'a [u8]);

fn is_same_content(a_dir: BorrowedFd<'_>, a_name: &[u8], b_dir: BorrowedFd<'_>, b_name: &[u8]) -> SysResult<bool> {
    let (a, b) = (sys::open_file(a_dir, a_name)?, sys::open_file(b_dir, b_name)?);
    let mut buffers = [vec![0; 64 << 10], vec![0; 64 << 10]];
    let mut offset = 0;
    loop {
        let [in_a, in_b] = &mut buffers;
        let n = rustix::io::pread(&a, &mut in_a[..], offset)?;
        // A short read of one is no difference.
        let mut m = 0;
        while m < n {
            match rustix::io::pread(&b, &mut in_b[m..n], offset + m as u64)? {
                0 => return Ok(false),
                more => m += more,
            }
        }
        if n == 0 {
            return Ok(rustix::io::pread(&b, &mut in_b[..1], offset)? == 0);
        }
        if in_a[..n] != in_b[..n] {
            return Ok(false);
        }
        offset += n as u64;
    }
}

/// Paths of files in the upper tree that share their file with other paths than in the lower one.
///
/// All names of such a file are written again, for a hard link to a file that the layer does not
/// hold would need its base.
fn relinked(lower: BorrowedFd<'_>, upper: BorrowedFd<'_>) -> Result<HashSet<EntryPath>, DiffError> {
    let mut lower_inodes = HashMap::new();
    tree::walk(lower, |found| {
        if found.kind != Kind::Directory && found.links_count > 1 {
            lower_inodes.insert(found.path.clone(), found.inode);
        }
        Ok::<_, WalkError>(())
    })?;
    // By inode of the lower and of the upper tree: the paths in the upper tree.
    let mut kept: HashMap<(u64, u64), Vec<EntryPath>> = HashMap::new();
    let mut shared: HashMap<(u64, u64), Vec<EntryPath>> = HashMap::new();
    tree::walk(upper, |found| {
        if found.kind == Kind::Directory {
            return Ok(());
        }
        let below = lower_inodes.get(found.path);
        if let Some(inode) = below {
            kept.entry(*inode).or_default().push(found.path.clone());
        }
        if found.links_count > 1 || below.is_some() {
            shared.entry(found.inode).or_default().push(found.path.clone());
        }
        Ok::<_, WalkError>(())
    })?;
    let mut relinked = HashSet::new();
    for paths in shared.into_values() {
        let before = lower_inodes.get(&paths[0]).and_then(|inode| kept.get(inode));
        // A file with one name in both trees is in neither map of the lower tree.
        let same = before.map_or(paths.len() == 1, |before| *before == paths);
        if !same {
            relinked.extend(paths);
        }
    }
    Ok(relinked)
}

/// An archive that is being written.
struct Archive<'w, W: Write> {
    out: &'w mut Writer<W>,
    /// The first name of each file that has several.
    linked: HashMap<(u64, u64), EntryPath>,
    entries: u64,
}

impl<'w, W: Write> Archive<'w, W> {
    fn new(out: &'w mut Writer<W>) -> Self {
        Self { out, linked: HashMap::new(), entries: 0 }
    }

    fn mark(&mut self, dir: &EntryPath, mark: Mark<'_>) -> Result<(), DiffError> {
        let path = dir.join(&mark.file_name());
        // The mark of a file that is itself called like a mark reads back as something else.
        if whiteout::meaning(&path) != Ok(Meaning::Mark(mark)) {
            return Err(DiffError::Unrepresentable { path, why: "a whiteout of a name that begins like one" });
        }
        let entry = Entry {
            path,
            kind: EntryKind::File { size_bytes: 0, sparse: None },
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: Vec::new(),
        };
        self.append(&entry, &mut io::empty())
    }

    fn found(&mut self, found: &Found<'_>) -> Result<(), DiffError> {
        let path = found.path;
        if whiteout::meaning(path) != Ok(Meaning::Plain) {
            return Err(DiffError::Unrepresentable { path: path.clone(), why: "a name that begins like a whiteout" });
        }
        let read_error = |source| DiffError::Read(WalkError::at(path, source));
        let mut data = None;
        let mut kind = match found.kind {
            Kind::Socket => return Ok(()),
            Kind::File => EntryKind::File { size_bytes: found.size_bytes, sparse: None },
            Kind::Directory => EntryKind::Directory,
            Kind::Symlink => EntryKind::Symlink { target: found.link_target().map_err(read_error)? },
            Kind::CharDevice(device) => EntryKind::CharDevice(device),
            Kind::BlockDevice(device) => EntryKind::BlockDevice(device),
            Kind::Fifo => EntryKind::Fifo,
        };
        if found.kind != Kind::Directory && found.links_count > 1 {
            match self.linked.get(&found.inode) {
                Some(first) => kind = EntryKind::HardLink { target: first.clone() },
                None => drop(self.linked.insert(found.inode, path.clone())),
            }
        }
        if matches!(kind, EntryKind::File { size_bytes: 1.., .. }) {
            data = Some(found.open().map_err(read_error)?);
        }
        let entry = Entry {
            path: path.clone(),
            kind,
            mode: found.mode,
            uid: found.uid,
            gid: found.gid,
            mtime: found.mtime,
            xattrs: found.xattrs().map_err(read_error)?,
        };
        match &mut data {
            Some(file) => self.append(&entry, file),
            None => self.append(&entry, &mut io::empty()),
        }
    }

    fn append(&mut self, entry: &Entry, data: &mut dyn io::Read) -> Result<(), DiffError> {
        self.entries += 1;
        Ok(self.out.append(entry, data)?)
    }
}
