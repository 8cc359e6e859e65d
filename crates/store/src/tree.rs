//! Trees of files below a directory handle: removing, measuring, merging.
//!
//! What lies in a layer or an upper was written by strangers. Nothing here resolves a symbolic
//! link in it or leaves the handle it was given: directories are opened with `openat2` beneath the
//! root, everything else is named relative to its open parent.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use plies_archive::tar::{Entry, EntryPath};
use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, RawDir, RenameFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;

use crate::error::{At as _, FileError};
use plies_archive::{DirIndex, Usage};

/// How deep the removal recurses before it moves the rest of the tree up. Each level costs a
/// descriptor (a process has 1,024 by default) and a stack frame.
const REMOVE_DEPTH: usize = 64;

/// The xattr by which an opaque directory is marked, and its value (kernel, `overlayfs.rst`).
const OPAQUE: (&CStr, &[u8]) = (c"trusted.overlay.opaque", b"y");
/// The xattr of a directory that was copied up; empty: from somewhere (docs/format/layer.md).
const ORIGIN: &CStr = c"trusted.overlay.origin";
/// Attributes of overlayfs itself; they never belong to the content.
const OVERLAY_PREFIX: &[u8] = b"trusted.overlay.";
/// Of a long path, opened in one call; the kernel takes 4,095 (PATH_MAX, limits.h).
const PATH_STEP_BYTES: usize = 4_000;
/// Size of st_blocks' unit, whatever the file system's block size (stat(3type)).
pub(crate) const STAT_BLOCK_BYTES: u64 = 512;
/// Asked of the kernel in one call; it stops at 2 GiB (copy_file_range(2)).
const COPY_CHUNK_BYTES: usize = 1 << 30;
/// Buffer where the kernel does not copy by itself.
const COPY_BUFFER_BYTES: usize = 128 << 10;

/// Opens a directory below `root` that was reached through directories only, however long its path is.
pub(crate) fn open_dir(root: impl AsFd, path: &EntryPath) -> io::Result<OwnedFd> {
    let mut rest = if path.is_root() { b"." } else { path.as_bytes() };
    let mut reached: Option<OwnedFd> = None;
    loop {
        let (step, after) = match rest.get(..PATH_STEP_BYTES).map(|head| head.iter().rposition(|byte| *byte == b'/')) {
            Some(slash) => rest.split_at(slash.expect("because a name has at most 255 bytes")),
            None => (rest, &b""[..]),
        };
        let from = reached.as_ref().map_or_else(|| root.as_fd(), OwnedFd::as_fd);
        let opened = rustix::fs::openat2(
            from,
            step,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS,
        )?;
        match after {
            [] => return Ok(opened),
            [_, below @ ..] => (reached, rest) = (Some(opened), below),
        }
    }
}

/// Opens one of the store's own directories.
pub(crate) fn open_own(path: &Path) -> Result<OwnedFd, FileError> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::open(path, flags, Mode::empty()).at("open", path)
}

pub(crate) fn open_child(dir: impl AsFd, name: &CStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

/// The names in a directory, sorted by their bytes.
pub(crate) fn list(dir: impl AsFd) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// What `name` in `dir` is; `None` if nothing.
pub(crate) fn stat(dir: impl AsFd, name: &CStr) -> io::Result<Option<Stat>> {
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

pub(crate) fn file_type(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Whether it hides one name of the layers below: a character device 0:0.
pub(crate) fn is_whiteout(stat: &Stat) -> bool {
    file_type(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// Whether it hides all names that the layers below have in this directory.
pub(crate) fn is_opaque(dir: impl AsFd) -> io::Result<bool> {
    let mut value = [0; 2];
    match rustix::fs::fgetxattr(dir, OPAQUE.0, &mut value) {
        Ok(n) => Ok(value.get(..n) == Some(OPAQUE.1)),
        // ERANGE: longer than the mark, so another value.
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::RANGE) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Tells overlayfs that there are whiteouts in a directory: it would show their names where no other layer has it.
pub(crate) fn mark_whiteouts(dir: impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::fsetxattr(dir, ORIGIN, b"", XattrFlags::empty())?)
}

// ---- removing ---------------------------------------------------------------------------------

/// Removes whatever is at `path`; nothing there is fine, and so is somebody else who removes it meanwhile. Works at any depth, in constant stack and
/// descriptors: what lies deeper than [`REMOVE_DEPTH`] is moved to the top and goes next.
pub(crate) fn remove(path: &Path) -> Result<(), FileError> {
    let parent = path.parent().expect("because the store removes nothing but entries of its directories");
    let name = path.file_name().expect("because the store's paths end in a name");
    let name = CString::new(name.as_bytes()).expect("because paths have no NUL");
    let parent = match open_own(parent) {
        Err(error) if error.source.kind() == io::ErrorKind::NotFound => return Ok(()),
        parent => parent?,
    };
    remove_at(&parent, &name).at("remove", path)
}

/// As [`remove`], by open parent and name.
pub(crate) fn remove_at(parent: impl AsFd, name: &CStr) -> io::Result<()> {
    match rustix::fs::unlinkat(&parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR) => {}
        Err(error) => return Err(error.into()),
    }
    let Some(top) = open_for_removal(parent.as_fd(), name)? else { return Ok(()) };
    let mut moved = 0;
    loop {
        let before = moved;
        clear(top.as_fd(), top.as_fd(), 0, &mut moved)?;
        if moved == before {
            break;
        }
    }
    remove_empty(parent.as_fd(), name)
}

fn remove_empty(parent: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Removes everything in an open directory.
pub(crate) fn clear_dir(dir: impl AsFd) -> io::Result<()> {
    for name in list(&dir)? {
        remove_at(&dir, &name)?;
    }
    Ok(())
}

fn open_for_removal(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<OwnedFd>> {
    let opened = match open_child(dir, name) {
        Err(Errno::ACCESS) => {
            // An unprivileged owner may have locked itself out.
            rustix::fs::chmodat(dir, name, Mode::RWXU, AtFlags::empty())?;
            open_child(dir, name)
        }
        opened => opened,
    };
    match opened {
        Err(Errno::NOENT) => Ok(None),
        opened => Ok(Some(opened?)),
    }
}

fn clear(top: BorrowedFd<'_>, dir: BorrowedFd<'_>, depth: usize, moved: &mut u64) -> io::Result<()> {
    for name in list(dir)? {
        match rustix::fs::unlinkat(dir, &name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR) => {}
            Err(error) => return Err(error.into()),
        }
        if depth == REMOVE_DEPTH {
            // The first free name: the top may hold names of the same form.
            loop {
                *moved += 1;
                let target = format!(".plies-{moved}");
                match rustix::fs::renameat_with(dir, &name, top, &target, RenameFlags::NOREPLACE) {
                    Ok(()) => break,
                    Err(Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            continue;
        }
        let Some(child) = open_for_removal(dir, &name)? else { continue };
        clear(top, child.as_fd(), depth + 1, moved)?;
        remove_empty(dir, &name)?;
    }
    Ok(())
}

// ---- measuring --------------------------------------------------------------------------------

/// What a tree costs: blocks and inodes of everything in it that is on its file system, the root included, hard links
/// once.
pub(crate) fn measure(root: impl AsFd) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut seen = HashSet::new();
    let mut count = |stat: &Stat| {
        let shared = file_type(stat) != FileType::Directory && stat.st_nlink > 1;
        if shared && !seen.insert((stat.st_dev, stat.st_ino)) {
            return;
        }
        usage.add(stat);
    };
    let own = rustix::fs::fstat(&root)?;
    count(&own);
    let mut pending = vec![EntryPath::root()];
    while let Some(path) = pending.pop() {
        let dir = open_dir(&root, &path)?;
        for name in list(&dir)? {
            let Some(stat) = stat(&dir, &name)? else { continue };
            if stat.st_dev != own.st_dev {
                continue;
            }
            count(&stat);
            if file_type(&stat) == FileType::Directory {
                pending.push(path.join(name.to_bytes()));
            }
        }
    }
    Ok(usage)
}

/// How many names a directory has.
pub(crate) fn names_count(dir: &Path) -> io::Result<u64> {
    // The names of a million blobs are 90 MB: few calls, and nothing is kept of them.
    let mut buffer = Vec::with_capacity(256 << 10);
    let dir = open_own(dir).map_err(|error| error.source)?;
    let mut entries = RawDir::new(dir, buffer.spare_capacity_mut());
    let mut count = 0;
    while let Some(entry) = entries.next() {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        count += u64::from(name != b"." && name != b"..");
    }
    Ok(count)
}

// ---- metadata ---------------------------------------------------------------------------------

/// What a layer may say about a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Metadata {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, i64),
    xattrs: BTreeMap<CString, Vec<u8>>,
}

impl Metadata {
    /// Of a directory that nobody described.
    pub(crate) fn implied() -> Self {
        Self { mode: 0o755, uid: 0, gid: 0, mtime: (0, 0), xattrs: BTreeMap::new() }
    }

    pub(crate) fn of(file: impl AsFd) -> io::Result<Self> {
        let stat = rustix::fs::fstat(&file)?;
        let xattrs = xattrs_of(
            |names| rustix::fs::flistxattr(&file, names),
            |name, value| rustix::fs::fgetxattr(&file, name, value),
        )?;
        Ok(Self::from_stat(&stat, xattrs))
    }

    fn from_stat(stat: &Stat, xattrs: BTreeMap<CString, Vec<u8>>) -> Self {
        #[allow(clippy::unnecessary_cast)] // the types differ between architectures
        Self {
            mode: stat.st_mode & 0o7777,
            uid: stat.st_uid,
            gid: stat.st_gid,
            mtime: (stat.st_mtime as i64, stat.st_mtime_nsec as i64),
            xattrs,
        }
    }

    /// The same, but looking as an archive's entry says.
    pub(crate) fn like(self, entry: &Entry) -> Self {
        let Entry { mode, uid, gid, mtime, .. } = entry;
        Self { mode: *mode, uid: *uid, gid: *gid, mtime: (mtime.seconds, mtime.nanos.into()), ..self }
    }

    /// The same, without these attributes.
    pub(crate) fn without(mut self, names: &[Vec<u8>]) -> Self {
        self.xattrs.retain(|name, _| !names.iter().any(|without| without == name.to_bytes()));
        self
    }

    /// Whether its owner may list it and reach what lies below.
    pub(crate) fn lets_owner_through(&self) -> bool {
        self.mode & 0o500 == 0o500
    }

    fn times(&self) -> Timestamps {
        let mtime = Timespec { tv_sec: self.mtime.0, tv_nsec: self.mtime.1 as _ };
        Timestamps { last_access: mtime, last_modification: mtime }
    }

    /// Makes `file` be as described; its overlay marks stay as they are.
    pub(crate) fn apply(&self, file: impl AsFd) -> io::Result<()> {
        let now = Self::of(&file)?;
        // Owner before mode and capabilities: a change of owner clears both.
        if (now.uid, now.gid) != (self.uid, self.gid) {
            rustix::fs::fchown(&file, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))?;
        }
        rustix::fs::fchmod(&file, Mode::from_raw_mode(self.mode))?;
        for name in now.xattrs.keys().filter(|name| !self.xattrs.contains_key(*name)) {
            rustix::fs::fremovexattr(&file, name)?;
        }
        for (name, value) in &self.xattrs {
            if now.xattrs.get(name) != Some(value) {
                rustix::fs::fsetxattr(&file, name, value, XattrFlags::empty())?;
            }
        }
        Ok(rustix::fs::futimens(&file, &self.times())?)
    }
}

/// Reads all attributes but overlay's own, through a list and a get call.
fn xattrs_of(
    list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>,
    get: impl Fn(&CStr, &mut [u8]) -> rustix::io::Result<usize>,
) -> io::Result<BTreeMap<CString, Vec<u8>>> {
    let names = match grow(list) {
        Err(Errno::OPNOTSUPP) => return Ok(BTreeMap::new()),
        names => names?,
    };
    let mut found = BTreeMap::new();
    for name in names.split_inclusive(|byte| *byte == 0) {
        let name = CStr::from_bytes_with_nul(name).map_err(|_| io::ErrorKind::InvalidData)?;
        if name.to_bytes().starts_with(OVERLAY_PREFIX) {
            continue;
        }
        match grow(|value| get(name, value)) {
            Ok(value) => drop(found.insert(name.to_owned(), value)),
            // Removed since it was listed.
            Err(Errno::NODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(found)
}

/// Calls with growing buffers up to 64 KiB, the kernel's limit for names and values (xattr(7)).
pub(crate) fn grow(call: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> rustix::io::Result<Vec<u8>> {
    let mut size = 256;
    loop {
        let mut buffer = vec![0; size];
        match call(&mut buffer) {
            Ok(n) => {
                buffer.truncate(n);
                return Ok(buffer);
            }
            Err(Errno::RANGE) if size < 64 << 10 => size = (size * 16).min(64 << 10),
            Err(error) => return Err(error),
        }
    }
}

// ---- merging ----------------------------------------------------------------------------------

/// How files come into a merged tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Material {
    /// By hard link: free, but whoever writes to the tree writes to the layers.
    Link,
    /// By reflink or copy.
    Copy,
}

/// One layer to merge.
#[derive(Debug)]
pub(crate) struct MergeLayer {
    pub(crate) root: OwnedFd,
    pub(crate) index: DirIndex,
}

/// Puts `layers` (bottom first, opened one at a time) together in the empty directory `target`: what
/// a mount of them would show, as plain files without marks.
pub(crate) fn merge<E: From<MergeError>>(
    layers: impl IntoIterator<Item = Result<MergeLayer, E>>,
    target: impl AsFd,
    material: Material,
) -> Result<(), E> {
    let target = target.as_fd();
    // How each directory shall look. Set at the end, since filling a directory changes its mtime.
    let mut dirs: BTreeMap<EntryPath, Metadata> = BTreeMap::new();
    for layer in layers {
        merge_one(&layer?, target, material, &mut dirs).map_err(MergeError)?;
    }
    for (path, metadata) in dirs.iter().rev() {
        open_dir(target, path).and_then(|dir| metadata.apply(dir)).map_err(MergeError)?;
    }
    Ok(())
}

/// A merge failed on the file system.
#[derive(Debug)]
pub(crate) struct MergeError(pub(crate) io::Error);

fn merge_one(
    layer: &MergeLayer,
    target: BorrowedFd<'_>,
    material: Material,
    dirs: &mut BTreeMap<EntryPath, Metadata>,
) -> io::Result<()> {
    if !dirs.contains_key(&EntryPath::root()) || !layer.index.is_implied(&EntryPath::root()) {
        dirs.insert(EntryPath::root(), Metadata::of(&layer.root)?);
    }
    // Files of this layer that have more names: inode to its first name in the target.
    let mut linked: HashMap<u64, EntryPath> = HashMap::new();
    let mut pending = vec![EntryPath::root()];
    while let Some(path) = pending.pop() {
        let from = open_dir(&layer.root, &path)?;
        let to = open_dir(target, &path)?;
        for name in list(&from)? {
            let Some(there) = stat(&from, &name)? else { continue };
            let child = path.join(name.to_bytes());
            let below = stat(&to, &name)?;
            let below_is_dir = below.as_ref().is_some_and(|below| file_type(below) == FileType::Directory);
            if file_type(&there) == FileType::Directory {
                let child_dir = open_child(&from, &name)?;
                if below_is_dir {
                    if is_opaque(&child_dir)? {
                        clear_dir(open_child(&to, &name)?)?;
                        forget_below(dirs, &child);
                    }
                } else {
                    if below.is_some() {
                        remove_at(&to, &name)?;
                    }
                    rustix::fs::mkdirat(&to, &name, Mode::RWXU)?;
                }
                if !below_is_dir || !layer.index.is_implied(&child) {
                    dirs.insert(child.clone(), Metadata::of(&child_dir)?);
                }
                pending.push(child);
                continue;
            }
            if below.is_some() {
                remove_at(&to, &name)?;
                if below_is_dir {
                    forget_below(dirs, &child);
                    dirs.remove(&child);
                }
            }
            if is_whiteout(&there) {
                continue;
            }
            let shared = there.st_nlink > 1;
            match material {
                Material::Link if link(&from, &name, &to, &name)? => continue,
                Material::Copy if shared => {
                    if let Some(first) = linked.get(&there.st_ino) {
                        let (first_dir, first_name) = first.split().expect("because a file is not the root");
                        let first_name = CString::new(first_name).expect("because names have no NUL");
                        if link(open_dir(target, &first_dir)?, &first_name, &to, &name)? {
                            continue;
                        }
                    }
                }
                _ => {}
            }
            copy(&from, &name, &there, &to)?;
            if shared {
                linked.insert(there.st_ino, child);
            }
        }
    }
    Ok(())
}

/// Drops what is known of the directories strictly below `dir`.
fn forget_below(dirs: &mut BTreeMap<EntryPath, Metadata>, dir: &EntryPath) {
    dirs.retain(|path, _| path == dir || !path.is_within(dir));
}

/// False if the file has as many names as its file system takes (ext4: 65,000) or may not get
/// another: the caller copies.
pub(crate) fn link(from: impl AsFd, old: &CStr, to: impl AsFd, new: &CStr) -> io::Result<bool> {
    match rustix::fs::linkat(from, old, to, new, AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::MLINK | Errno::PERM | Errno::XDEV) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Copies anything but a directory, with its metadata, under the same name.
pub(crate) fn copy(from: &OwnedFd, name: &CStr, stat: &Stat, to: &OwnedFd) -> io::Result<()> {
    if file_type(stat) == FileType::RegularFile {
        let flags = OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let source = rustix::fs::openat(from, name, OFlags::RDONLY | flags, Mode::empty())?;
        let create = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | flags;
        let target = rustix::fs::openat(to, name, create, Mode::RUSR | Mode::WUSR)?;
        if rustix::fs::ioctl_ficlone(&target, &source).is_err() {
            copy_data(&source, &target, u64::try_from(stat.st_size).unwrap_or(0))?;
        }
        return Metadata::of(&source)?.apply(&target);
    }
    match file_type(stat) {
        FileType::Symlink => {
            let points_to = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(points_to, to, name)?;
        }
        kind => rustix::fs::mknodat(to, name, kind, Mode::from_raw_mode(stat.st_mode & 0o7777), stat.st_rdev)?,
    }
    // Neither links nor devices can be opened for this: their attributes go by a path through the
    // open parent, the only form these calls have.
    let by_path = |dir: &OwnedFd| {
        let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
        path.extend_from_slice(name.to_bytes());
        path
    };
    let (source, target) = (by_path(from), by_path(to));
    let xattrs = xattrs_of(
        |names| rustix::fs::llistxattr(source.as_slice(), names),
        |name, value| rustix::fs::lgetxattr(source.as_slice(), name, value),
    )?;
    let metadata = Metadata::from_stat(stat, xattrs);
    rustix::fs::chownat(
        to,
        name,
        Some(Uid::from_raw(metadata.uid)),
        Some(Gid::from_raw(metadata.gid)),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    if file_type(stat) != FileType::Symlink {
        rustix::fs::chmodat(to, name, Mode::from_raw_mode(metadata.mode), AtFlags::empty())?;
    }
    for (attribute, value) in &metadata.xattrs {
        rustix::fs::lsetxattr(target.as_slice(), attribute, value, XattrFlags::empty())?;
    }
    Ok(rustix::fs::utimensat(to, name, &metadata.times(), AtFlags::SYMLINK_NOFOLLOW)?)
}

/// Copies the data runs of a file and keeps its holes.
fn copy_data(source: &OwnedFd, target: &OwnedFd, size_bytes: u64) -> io::Result<()> {
    use rustix::fs::SeekFrom;
    rustix::fs::ftruncate(target, size_bytes)?;
    let mut at = 0;
    loop {
        let start = match rustix::fs::seek(source, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(source, SeekFrom::Hole(start))?;
        let (mut read_at, mut write_at) = (start, start);
        while read_at < end {
            let chunk = usize::try_from(end - read_at).unwrap_or(COPY_CHUNK_BYTES).min(COPY_CHUNK_BYTES);
            match rustix::fs::copy_file_range(source, Some(&mut read_at), target, Some(&mut write_at), chunk) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    copy_through_buffer(source, target, read_at, end)?;
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        at = end;
    }
}

fn copy_through_buffer(source: &OwnedFd, target: &OwnedFd, mut at: u64, end: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt as _;
    let (source, target) = (std::fs::File::from(source.try_clone()?), std::fs::File::from(target.try_clone()?));
    let mut buffer = vec![0; COPY_BUFFER_BYTES];
    while at < end {
        let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        match source.read_at(&mut buffer[..wanted], at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                target.write_all_at(&buffer[..n], at)?;
                at += n as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
