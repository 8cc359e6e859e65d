//! Walking trees by directory handle: in byte order, at any depth, with few descriptors open.
//!
//! A process may build a tree far deeper than any path can say, so nothing here recurses or joins
//! path strings for the kernel, and a walk holds the innermost few directories open only.
//! On the way back up a closed one is opened again from the root, component by component and
//! never through a link; `..` would trust that nobody moved the directory meanwhile.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, RawDir, SeekFrom, Stat};
use rustix::io::{Errno, Result};

use crate::index::Usage;
use crate::sys::{self, Subject};
use crate::tar::{Device, EntryPath, Timestamp};
use crate::xattr::{self, Xattrs};

/// Directories that a walk keeps open. Image trees are rarely deeper than 20, and even several
/// walks at once stay far from the usual limit of 1,024 descriptors.
const HELD: usize = 32;

/// The names in one directory.
///
/// One allocation for all of them: a directory with a million files costs their names and ten
/// bytes each.
#[derive(Debug, Default)]
pub struct Names {
    bytes: Vec<u8>,
    spans: Vec<(u32, u8, FileType)>,
    next: usize,
}

impl Names {
    /// All names of the directory but `.` and `..`, in byte order. `dir` must be open for reading; its position moves.
    ///
    /// # Errors
    /// The kernel's.
    pub fn sorted(dir: BorrowedFd<'_>) -> Result<Self> {
        let mut names = Self::default();
        names.fill(dir, usize::MAX)?;
        let bytes = &names.bytes;
        names.spans.sort_unstable_by_key(|span| &bytes[range(span)]);
        Ok(names)
    }

    /// Some names of the directory, at least one if there is one, in no order.
    fn some(dir: BorrowedFd<'_>) -> Result<Self> {
        // Enough to make the repeated reading cheap, few enough that memory is bounded.
        const BATCH: usize = 16_384;
        let mut names = Self::default();
        names.fill(dir, BATCH)?;
        Ok(names)
    }

    fn fill(&mut self, dir: BorrowedFd<'_>, most: usize) -> Result<()> {
        rustix::fs::seek(dir, SeekFrom::Start(0))?;
        let mut buffer = [MaybeUninit::uninit(); 16 << 10];
        let mut entries = RawDir::new(dir, &mut buffer);
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            if self.spans.len() == most {
                break;
            }
            // 4 GiB of names in one directory, or one of 256 bytes: no Linux file system has either.
            let start = u32::try_from(self.bytes.len()).map_err(|_| Errno::OVERFLOW)?;
            let length = u8::try_from(name.len()).map_err(|_| Errno::NAMETOOLONG)?;
            self.spans.push((start, length, entry.file_type()));
            self.bytes.extend_from_slice(name);
        }
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The name that [`Self::advance`] stands before.
    pub(crate) fn peek(&self) -> Option<&[u8]> {
        self.spans.get(self.next).map(|span| &self.bytes[range(span)])
    }

    /// Steps over a name and gives it, with its type as far as the directory says.
    pub fn advance(&mut self) -> Option<(&[u8], FileType)> {
        let span = self.spans.get(self.next)?;
        self.next += 1;
        Some((&self.bytes[range(span)], span.2))
    }
}

fn range(&(start, length, _): &(u32, u8, FileType)) -> Range<usize> {
    start as usize..start as usize + usize::from(length)
}

/// A position in a tree: the directories from its root to where a walk stands.
///
/// Only the innermost 32 directories are open, whatever the depth.
#[derive(Debug)]
pub struct Descent {
    root: OwnedFd,
    /// All below the root, outermost first. A level deeper than [`HELD`] from the end is closed.
    levels: Vec<Level>,
    path: Vec<u8>,
}

#[derive(Debug)]
struct Level {
    fd: Option<OwnedFd>,
    /// Where its name begins in the path.
    name: usize,
}

impl Descent {
    /// Stands at the root, of which it takes a descriptor of its own.
    pub(crate) fn new(root: BorrowedFd<'_>) -> Result<Self> {
        Ok(Self::from(rustix::fs::openat(root, ".", sys::DIRECTORY, rustix::fs::Mode::empty())?))
    }

    /// The directory where it stands.
    pub fn here(&self) -> BorrowedFd<'_> {
        match self.levels.last() {
            None => self.root.as_fd(),
            Some(level) => level.fd.as_ref().expect("because the innermost level is open").as_fd(),
        }
    }

    /// Steps into a directory below. `ENOTDIR` or `ELOOP` when it is something else.
    pub(crate) fn enter(&mut self, name: &[u8]) -> Result<()> {
        let fd = sys::open_dir(self.here(), name)?;
        self.push(fd, name);
        Ok(())
    }

    /// Steps into a directory below that is open already, for itself alone.
    pub fn push(&mut self, fd: OwnedFd, name: &[u8]) {
        if !self.levels.is_empty() {
            self.path.push(b'/');
        }
        self.levels.push(Level { fd: Some(fd), name: self.path.len() });
        self.path.extend_from_slice(name);
        if let Some(closed) = self.levels.len().checked_sub(HELD + 1) {
            self.levels[closed].fd = None;
        }
    }

    /// Steps back up, and gives the name of the directory left.
    ///
    /// # Errors
    /// The kernel's, when a directory that was closed on the way down can't be opened again.
    ///
    /// # Panics
    /// At the root.
    pub fn leave(&mut self) -> Result<Vec<u8>> {
        let left = self.levels.pop().expect("because a walk leaves only what it entered");
        let name = self.path.split_off(left.name);
        // Before the name stands a slash, except at the first level.
        self.path.pop();
        if self.levels.last().is_some_and(|level| level.fd.is_none()) {
            self.reopen()?;
        }
        Ok(name)
    }

    /// Opens the innermost levels again. Costs a step for each level, once in [`HELD`] steps up.
    fn reopen(&mut self) -> Result<()> {
        let first_held = self.levels.len().saturating_sub(HELD);
        let mut outer: Option<OwnedFd> = None;
        for at in 0..self.levels.len() {
            let name = self.name_at(at);
            let parent = match at.checked_sub(1).and_then(|up| self.levels[up].fd.as_ref()).or(outer.as_ref()) {
                Some(parent) => parent.as_fd(),
                None => self.root.as_fd(),
            };
            let fd = sys::open_dir(parent, name)?;
            if at >= first_held {
                self.levels[at].fd = Some(fd);
                outer = None;
            } else {
                outer = Some(fd);
            }
        }
        Ok(())
    }

    /// Opens a directory on the way from the root to where it stands: 0 is the root. `above` is the one before it, if
    /// that is at hand; without it, an outer directory that was closed costs a step for each level.
    ///
    /// # Errors
    /// The kernel's.
    pub fn open_level(&self, level: usize, above: Option<BorrowedFd<'_>>) -> Result<OwnedFd> {
        let held = match level.checked_sub(1) {
            None => Some(&self.root),
            Some(at) => self.levels[at].fd.as_ref(),
        };
        if let Some(fd) = held {
            return rustix::io::fcntl_dupfd_cloexec(fd, 0);
        }
        if let Some(above) = above {
            return sys::open_dir(above, self.name_at(level - 1));
        }
        let mut at = sys::open_dir(self.root.as_fd(), self.name_at(0))?;
        for inner in 1..level {
            at = sys::open_dir(at.as_fd(), self.name_at(inner))?;
        }
        Ok(at)
    }

    /// The name of one of the levels.
    fn name_at(&self, at: usize) -> &[u8] {
        let end = self.levels.get(at + 1).map_or(self.path.len(), |next| next.name - 1);
        &self.path[self.levels[at].name..end]
    }

    /// How many steps below the root.
    pub fn depth(&self) -> usize {
        self.levels.len()
    }
}

impl From<OwnedFd> for Descent {
    /// `root` must have been opened for itself alone: walks move its read position.
    fn from(root: OwnedFd) -> Self {
        Self { root, levels: Vec::new(), path: Vec::new() }
    }
}

/// The tree below one that is walked: follows its steps as far as directories lie there.
#[derive(Debug)]
pub(crate) struct Below {
    descent: Option<Descent>,
    /// Steps taken that this tree has no directory for.
    missing: usize,
}

impl Below {
    pub(crate) fn new(root: Option<BorrowedFd<'_>>) -> Result<Self> {
        Ok(Self { descent: root.map(Descent::new).transpose()?, missing: 0 })
    }

    /// The directory at the same place, if there is one.
    pub(crate) fn here(&self) -> Option<BorrowedFd<'_>> {
        (self.missing == 0).then_some(self.descent.as_ref()?.here())
    }

    /// Steps along; says whether there is a directory.
    pub(crate) fn enter(&mut self, name: &[u8]) -> Result<bool> {
        if let (Some(descent), 0) = (&mut self.descent, self.missing) {
            match descent.enter(name) {
                Ok(()) => return Ok(true),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(error),
            }
        }
        self.missing += 1;
        Ok(false)
    }

    /// From here on until [`Self::leave`], nothing lies below.
    pub(crate) fn hide(&mut self) -> Result<()> {
        if let (Some(descent), 0) = (&mut self.descent, self.missing)
            && descent.depth() > 0
        {
            descent.leave()?;
            self.missing = 1;
        }
        Ok(())
    }

    pub(crate) fn leave(&mut self) -> Result<()> {
        match (self.missing.checked_sub(1), &mut self.descent) {
            (Some(less), _) => self.missing = less,
            (None, Some(descent)) => drop(descent.leave()?),
            (None, None) => {}
        }
        Ok(())
    }

    /// What stands at `name` where this tree is, not following it.
    pub(crate) fn stat(&self, name: &[u8]) -> Result<Option<Stat>> {
        self.here().map_or(Ok(None), |dir| sys::stat_if_exists(dir, name))
    }
}

/// Deletes `name` in `dir` and all below it; nothing is followed. Gone already is fine.
///
/// A directory that something is mounted on is not entered: `EXDEV` or `EBUSY`, and what is
/// mounted stays whole.
pub(crate) fn remove(dir: BorrowedFd<'_>, name: &[u8]) -> Result<()> {
    match rustix::fs::unlinkat(dir, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        // POSIX says EPERM for a directory, Linux EISDIR; an immutable file is EPERM too.
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(error) => return Err(error),
    }
    match sys::open_dir_same_mount(dir, name) {
        Ok(top) => empty(Descent::from(top))?,
        Err(Errno::NOTDIR | Errno::LOOP) => return rustix::fs::unlinkat(dir, name, AtFlags::empty()),
        Err(error) => return Err(error),
    }
    rustix::fs::unlinkat(dir, name, AtFlags::REMOVEDIR)
}

fn empty(mut descent: Descent) -> Result<()> {
    let mut frames = vec![Names::some(descent.here())?];
    while let Some(names) = frames.last_mut() {
        if let Some((name, _)) = names.advance() {
            match rustix::fs::unlinkat(descent.here(), name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR | Errno::PERM) => {
                    let inner = match sys::open_dir_same_mount(descent.here(), name) {
                        Ok(inner) => inner,
                        Err(Errno::NOTDIR | Errno::LOOP) => return Err(Errno::PERM),
                        Err(error) => return Err(error),
                    };
                    let inside = Names::some(inner.as_fd())?;
                    descent.push(inner, name);
                    frames.push(inside);
                }
                Err(error) => return Err(error),
            }
            continue;
        }
        // Deleting may have made room for names that the first reading did not give.
        let more = Names::some(descent.here())?;
        if !more.is_empty() {
            *names = more;
            continue;
        }
        frames.pop();
        if !frames.is_empty() {
            let name = descent.leave()?;
            rustix::fs::unlinkat(descent.here(), &name, AtFlags::REMOVEDIR)?;
        }
    }
    Ok(())
}

/// What a layer's tree costs. Reads no file.
pub(crate) fn measure(root: BorrowedFd<'_>) -> Result<Usage> {
    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    let mut descent = Descent::new(root)?;
    usage.add(&rustix::fs::fstat(descent.here())?);
    let mut frames = vec![Names::sorted(descent.here())?];
    while let Some(names) = frames.last_mut() {
        let Some((name, _)) = names.advance() else {
            frames.pop();
            if !frames.is_empty() {
                descent.leave()?;
            }
            continue;
        };
        let stat = sys::stat_at(descent.here(), name)?;
        if sys::kind(&stat) == FileType::Directory {
            descent.enter(name)?;
            usage.add(&stat);
            frames.push(Names::sorted(descent.here())?);
        } else if stat.st_nlink == 1 || linked.insert((stat.st_dev, stat.st_ino)) {
            usage.add(&stat);
        }
    }
    Ok(usage)
}

/// What stands at a path of a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice(Device),
    /// A block device.
    BlockDevice(Device),
    /// A named pipe.
    Fifo,
    /// A socket, which no archive can hold.
    Socket,
}

/// One path of a tree, as [`walk`] finds it.
#[derive(Debug)]
pub struct Found<'a> {
    /// Where, relative to the root.
    pub path: &'a EntryPath,
    /// What.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Length in bytes, of a regular file or a symbolic link.
    pub size_bytes: u64,
    /// Names that lead to this inode, inside the tree or not.
    pub links_count: u64,
    /// Device and inode: equal for two names of one file.
    pub inode: (u64, u64),
    at: Subject<'a>,
}

impl<'a> Found<'a> {
    /// For a directory, `at` is itself, open; otherwise its directory and its name.
    pub(crate) fn new(path: &'a EntryPath, stat: &Stat, at: Subject<'a>) -> io::Result<Self> {
        let kind = match sys::kind(stat) {
            FileType::RegularFile => Kind::File,
            FileType::Directory => Kind::Directory,
            FileType::Symlink => Kind::Symlink,
            FileType::CharacterDevice => Kind::CharDevice(sys::device(stat)),
            FileType::BlockDevice => Kind::BlockDevice(sys::device(stat)),
            FileType::Fifo => Kind::Fifo,
            FileType::Socket => Kind::Socket,
            FileType::Unknown => return Err(io::Error::other("unknown type of file")),
        };
        Ok(Self {
            path,
            kind,
            mode: sys::mode_bits(stat),
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: sys::mtime(stat),
            size_bytes: stat.st_size as u64,
            // 32 bits wide on some architectures.
            links_count: stat.st_nlink as _,
            inode: (stat.st_dev, stat.st_ino),
            at,
        })
    }

    /// Extended attributes that are content: none of overlayfs' own, no host labels. Sorted.
    ///
    /// # Errors
    /// The kernel's.
    pub fn xattrs(&self) -> io::Result<Xattrs> {
        Ok(xattr::read(self.at)?)
    }

    /// Whether this is how a stored layer hides a name.
    pub(crate) fn is_whiteout(&self) -> bool {
        self.kind == Kind::CharDevice(Device { major: 0, minor: 0 })
    }

    /// Whether this is a directory of a stored layer that hides all that lies below it.
    pub(crate) fn is_opaque(&self) -> io::Result<bool> {
        Ok(self.at.get(xattr::OPAQUE)?.as_deref() == Some(b"y"))
    }

    /// What a symbolic link says.
    ///
    /// # Errors
    /// The kernel's: `EINVAL` for anything else.
    pub fn link_target(&self) -> io::Result<Vec<u8>> {
        match self.at {
            Subject::At(dir, name) => Ok(sys::read_link(dir, name)?),
            Subject::Fd(_) => Err(Errno::INVAL.into()),
        }
    }

    /// Opens a regular file for reading.
    ///
    /// # Errors
    /// The kernel's: `EINVAL` for anything else.
    pub fn open(&self) -> io::Result<File> {
        match self.at {
            Subject::At(dir, name) => Ok(File::from(sys::open_file(dir, name)?)),
            Subject::Fd(_) => Err(Errno::INVAL.into()),
        }
    }
}

/// Calls `visit` for every path below and including `root`: a directory before what it holds,
/// names in byte order. Follows nothing; any depth.
///
/// # Errors
/// The visitor's, and the kernel's with the path where it happened.
pub fn walk<E: From<WalkError>>(
    root: BorrowedFd<'_>,
    mut visit: impl FnMut(Found<'_>) -> std::result::Result<(), E>,
) -> std::result::Result<(), E> {
    let at = |path: &EntryPath| {
        let path = path.clone();
        move |source: io::Error| E::from(WalkError { path, source })
    };
    let mut here = EntryPath::root();
    let start = |root| -> Result<_> {
        let descent = Descent::new(root)?;
        let stat = rustix::fs::fstat(descent.here())?;
        let names = Names::sorted(descent.here())?;
        Ok((descent, stat, names))
    };
    let (mut descent, stat, names) = start(root).map_err(io::Error::from).map_err(at(&here))?;
    visit(Found::new(&here, &stat, Subject::Fd(descent.here())).map_err(at(&here))?)?;
    let mut frames = vec![names];
    while let Some(names) = frames.last_mut() {
        let Some((name, _)) = names.advance() else {
            frames.pop();
            if !frames.is_empty() {
                descent.leave().map_err(io::Error::from).map_err(at(&here))?;
                here = here.split().map_or_else(EntryPath::root, |(outer, _)| outer);
            }
            continue;
        };
        let path = here.join(name);
        let stat = sys::stat_at(descent.here(), name).map_err(io::Error::from).map_err(at(&path))?;
        if sys::kind(&stat) == FileType::Directory {
            let mut step = || {
                descent.enter(name)?;
                Names::sorted(descent.here())
            };
            let inside = step().map_err(io::Error::from).map_err(at(&path))?;
            visit(Found::new(&path, &stat, Subject::Fd(descent.here())).map_err(at(&path))?)?;
            frames.push(inside);
            here = path;
        } else {
            visit(Found::new(&path, &stat, Subject::At(descent.here(), name)).map_err(at(&path))?)?;
        }
    }
    Ok(())
}

/// A tree could not be read.
#[derive(Debug, thiserror::Error)]
#[error("read {path}")]
pub struct WalkError {
    /// Where.
    pub path: EntryPath,
    /// The kernel's error.
    #[source]
    pub source: io::Error,
}

impl WalkError {
    pub(crate) fn at(path: &EntryPath, source: io::Error) -> Self {
        Self { path: path.clone(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn open(path: &std::path::Path) -> OwnedFd {
        fs::File::open(path).unwrap().into()
    }

    /// A chain of directories far deeper than a path can say, with a file at its end.
    fn deep(root: &std::path::Path, depth: usize) {
        let mut at = open(root);
        for _ in 0..depth {
            rustix::fs::mkdirat(&at, "directory", rustix::fs::Mode::RWXU).unwrap();
            at = sys::open_dir(at.as_fd(), b"directory").unwrap();
        }
        rustix::fs::mkdirat(&at, "last", rustix::fs::Mode::RWXU).unwrap();
    }

    #[test]
    fn a_tree_deeper_than_any_path_is_walked_and_deleted() {
        const DEPTH: usize = 3_000;
        let dir = tempfile::tempdir().unwrap();
        deep(dir.path(), DEPTH);
        let root = open(dir.path());
        assert_eq!(measure(root.as_fd()).unwrap().inodes as usize, DEPTH + 2);
        let mut deepest = 0;
        walk(root.as_fd(), |found| {
            deepest = deepest.max(found.path.components().count());
            Ok::<_, WalkError>(())
        })
        .unwrap();
        assert_eq!(deepest, DEPTH + 1);
        remove(root.as_fd(), b"directory").unwrap();
        assert_eq!(measure(root.as_fd()).unwrap().inodes, 1);
    }

    #[test]
    fn names_come_in_byte_order_and_a_directory_before_its_contents() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b", "a", "a.txt", "é", "Z"] {
            fs::write(dir.path().join(name), name).unwrap();
        }
        fs::remove_file(dir.path().join("a")).unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        fs::write(dir.path().join("a/x"), "").unwrap();
        let mut seen = Vec::new();
        walk(open(dir.path()).as_fd(), |found| {
            seen.push(String::from_utf8(found.path.as_bytes().to_vec()).unwrap());
            Ok::<_, WalkError>(())
        })
        .unwrap();
        assert_eq!(seen, ["", "Z", "a", "a/x", "a.txt", "b", "é"]);
    }

    #[test]
    fn w07_removing_a_link_leaves_its_target() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("victim/kept")).unwrap();
        fs::create_dir(dir.path().join("d")).unwrap();
        std::os::unix::fs::symlink("../victim", dir.path().join("d/x")).unwrap();
        std::os::unix::fs::symlink("victim", dir.path().join("y")).unwrap();
        let root = open(dir.path());
        for name in [&b"y"[..], b"d", b"never was"] {
            remove(root.as_fd(), name).unwrap();
        }
        assert!(dir.path().join("victim/kept").is_dir());
        assert!(!dir.path().join("d").exists());
    }

    #[test]
    fn below_follows_until_there_is_nothing_and_back() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("a/b")).unwrap();
        fs::write(dir.path().join("f"), "").unwrap();
        let root = open(dir.path());
        let mut below = Below::new(Some(root.as_fd())).unwrap();
        assert!(below.enter(b"a").unwrap());
        assert!(below.stat(b"b").unwrap().is_some());
        assert!(!below.enter(b"none").unwrap());
        assert!(!below.enter(b"b").unwrap(), "nothing lies below a missing directory");
        assert!(below.here().is_none());
        below.leave().unwrap();
        below.leave().unwrap();
        assert!(below.enter(b"b").unwrap());
        below.leave().unwrap();
        below.hide().unwrap();
        assert!(below.here().is_none());
        below.leave().unwrap();
        assert!(below.enter(b"a").unwrap());
        below.leave().unwrap();
        assert!(!below.enter(b"f").unwrap());
        below.leave().unwrap();
        assert!(!Below::new(None).unwrap().enter(b"a").unwrap());
    }
}
