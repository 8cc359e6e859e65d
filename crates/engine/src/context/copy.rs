//! Putting a selection into a tree, as `COPY` does.

use std::ffi::OsStr;
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use plies_archive::tar::Escaped;
use plies_cache::contenthash::inroot::{self, MadeDir, Missing};
use plies_oci::ErrorKind;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, XattrFlags};
use rustix::io::{Errno, retry_on_intr};

use super::select::{Selected, SelectedKind, Selection, owner, source_path};
use super::walk::{self, Found, Links, Step, Visitor, WalkError};
use super::{Owners, Tree};
use crate::exec::Cancel;

/// How much is asked of `copy_file_range` or read at a time, in bytes.
const CHUNK_BYTES: usize = 1 << 20;

/// Where a selection goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Destination {
    path: Vec<u8>,
    is_directory: bool,
}

impl Destination {
    /// A destination as written, relative to the step's working directory `cwd` unless it begins with a slash. With a
    /// slash at the end, or `.` as last component, it is a directory, there or not.
    pub fn new(cwd: &[u8], dest: &[u8]) -> Self {
        let last = dest.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        let is_directory = matches!(last, b"" | b"." | b"..");
        let path = if dest.starts_with(b"/") { dest.to_vec() } else { [cwd, b"/", dest].concat() };
        Self { path, is_directory }
    }
}

/// How a selection is copied.
#[derive(Debug, Clone)]
pub struct CopyOptions {
    /// Where to.
    pub dest: Destination,
    /// `--chown`, in numbers: the owner of everything copied and of every directory made for it.
    pub owner: Option<Owner>,
    /// `--chmod`: applied to everything copied but symbolic links.
    pub chmod: Option<Chmod>,
}

/// A user and a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// What a copy did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Copied {
    /// How many files of any kind but directories.
    pub files: u64,
    /// How many bytes in regular files, whether shared with the source or not.
    pub bytes: u64,
}

/// Why a copy stopped. What was copied until then stays.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CopyError {
    /// A directory should go where something else is.
    #[error("can't copy a directory over {path}: it is there and not a directory")]
    NotADirectory {
        /// What is in the way, in the destination.
        path: Escaped,
    },
    /// Something else should go where a directory is.
    #[error("can't copy a file over {path}: it is a directory")]
    IsADirectory {
        /// What is in the way, in the destination.
        path: Escaped,
    },
    /// A context holds something that can't be copied.
    #[error("{path} is a pipe or a device: only a stage's can be copied")]
    Special {
        /// What, in the source.
        path: Escaped,
    },
    /// A name that no layer can hold.
    #[error("{path} can't be copied: names that begin with .wh. are kept for what layers take away")]
    Reserved {
        /// What, in the source.
        path: Escaped,
    },
    /// A file system did not do its part.
    #[error("{op} {path}")]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: Escaped,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl CopyError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotADirectory { .. } | Self::IsADirectory { .. } | Self::Special { .. } | Self::Reserved { .. } => {
                ErrorKind::InvalidInput
            }
            Self::Io { .. } => ErrorKind::Unavailable,
        }
    }
}

impl From<WalkError> for CopyError {
    fn from(error: WalkError) -> Self {
        let (op, path, source) = walk::parts(error);
        Self::Io { op, path: Escaped::of(&path), source }
    }
}

/// Copies `selection` out of `tree` into the tree below `root`.
///
/// The destination is resolved inside `root`, its last component included; missing directories are made, with the mode
/// that an octal `--chmod` says, else 0755. A source
/// directory's contents go into the destination; a file goes to the destination, or into it if that is a directory, is
/// written as one, or if there are several sources. Existing files are replaced, links too; existing directories are
/// kept, those below the destination with the source's metadata. Modes, times and extended attributes come along, owners
/// as the tree counts them, hard links inside one source stay linked.
///
/// # Errors
/// [`CopyError`]; the destination then holds a part of the selection.
pub fn copy(
    tree: &Tree,
    selection: &Selection,
    root: BorrowedFd<'_>,
    options: &CopyOptions,
) -> Result<Copied, CopyError> {
    let mut copied = Copied::default();
    let several = selection.items.len() > 1;
    for item in &selection.items {
        let target = target(item, root, options, several)?;
        let mut copier = Copier {
            dirs: Vec::new(),
            links: Links::default(),
            base: target.dir,
            base_path: target.path,
            name: target.name,
            source: item.path().unwrap_or_default(),
            owners: tree.owners,
            options,
            copied: &mut copied,
            cancel: &tree.cancel,
            can_clone: true,
            can_range: true,
            buffer: Vec::new(),
        };
        match &item.kind {
            SelectedKind::Tree { .. } => walk::walk(tree, selection, item, &mut copier)?,
            SelectedKind::Inline { bytes, mode } => copier.inline(bytes, *mode)?,
        }
    }
    Ok(copied)
}

/// Where one source goes: into `dir`, under `name` unless it is a directory whose contents are copied.
struct Target {
    dir: OwnedFd,
    name: Option<Vec<u8>>,
    /// For messages.
    path: Vec<u8>,
}

fn target(item: &Selected, root: BorrowedFd<'_>, options: &CopyOptions, several: bool) -> Result<Target, CopyError> {
    let path = &options.dest.path;
    let failed = |op| move |source| CopyError::Io { op, path: Escaped::of(path), source };
    // A directory made for the copy belongs to whom the copies belong, and has the mode they get.
    let mode = Mode::from_raw_mode(options.chmod.as_ref().and_then(Chmod::octal).unwrap_or(0o755));
    let own = |dir: BorrowedFd<'_>| {
        if let Some(owner) = options.owner {
            rustix::fs::fchown(dir, Some(Uid::from_raw(owner.uid)), Some(Gid::from_raw(owner.gid)))?;
        }
        rustix::fs::fchmod(dir, mode)
    };
    let mut made = |_: BorrowedFd<'_>, dir: Option<MadeDir>| match dir {
        Some(made) => Ok(own(made.dir.as_fd())?),
        None => Ok(()),
    };
    let resolved = inroot::resolve(root, path, Missing::Make(&mut made)).map_err(|error| {
        match error.raw_os_error() == Some(Errno::NOTDIR.raw_os_error()) {
            true => CopyError::NotADirectory { path: Escaped::of(path) },
            false => failed("resolve")(error),
        }
    })?;
    let wants_directory = item.is_dir() || options.dest.is_directory || several;
    let dup = |fd: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(fd, 0).map_err(|e| failed("open")(e.into()));
    let (dir, shown) = match &resolved.name {
        // It is a directory already.
        None => (dup(resolved.dir())?, resolved.path.clone()),
        Some(name) if wants_directory => {
            if inroot::stat(resolved.dir(), name).map_err(failed("stat"))?.is_some() {
                return Err(CopyError::NotADirectory { path: Escaped::of(path) });
            }
            let name_os = OsStr::from_bytes(name);
            rustix::fs::mkdirat(resolved.dir(), name_os, Mode::from_raw_mode(0o755))
                .map_err(|e| failed("make the directory")(e.into()))?;
            let dir = inroot::open_dir(resolved.dir(), name).map_err(failed("open"))?;
            own(dir.as_fd()).map_err(|e| failed("change the owner or mode of")(e.into()))?;
            (dir, resolved.path.clone())
        }
        Some(name) => {
            return Ok(Target { dir: dup(resolved.dir())?, name: Some(name.clone()), path: resolved.path.clone() });
        }
    };
    let name = (!item.is_dir()).then(|| item.name.clone());
    let path = name.as_ref().map_or_else(|| shown.clone(), |name| super::select::join(&shown, name));
    Ok(Target { dir, name, path })
}

struct Copier<'a> {
    /// The directories being filled, below `base`.
    dirs: Vec<OwnedFd>,
    links: Links,
    base: OwnedFd,
    base_path: Vec<u8>,
    name: Option<Vec<u8>>,
    /// What is copied, in the source.
    source: &'a [u8],
    owners: Owners,
    options: &'a CopyOptions,
    copied: &'a mut Copied,
    cancel: &'a Cancel,
    can_clone: bool,
    can_range: bool,
    /// Bytes on their way, where the kernel copies none.
    buffer: Vec<u8>,
}

impl Copier<'_> {
    fn here(&self) -> BorrowedFd<'_> {
        self.dirs.last().map_or(self.base.as_fd(), AsFd::as_fd)
    }

    /// The name of something found, where it goes.
    fn name<'f>(&'f self, found: &'f Found<'_>) -> &'f [u8] {
        match &self.name {
            Some(name) => name,
            None => found.name(),
        }
    }

    /// Its path in the source, for messages.
    fn source(&self, found: &Found<'_>) -> Escaped {
        Escaped::of(&source_path(self.source, found.path))
    }

    /// Refuses a name that a layer could not hold, before the step is done rather than when the image is.
    fn admit(&self, found: &Found<'_>) -> Result<(), CopyError> {
        match is_reserved(self.name(found)) {
            true => Err(CopyError::Reserved { path: self.source(found) }),
            false => Ok(()),
        }
    }

    /// Its path in the destination, for messages.
    fn shown(&self, found: &Found<'_>) -> Escaped {
        if found.path.is_empty() {
            return Escaped::of(&self.base_path);
        }
        Escaped::of(&super::select::join(&self.base_path, found.path))
    }

    fn failed<E: Into<io::Error>>(&self, op: &'static str, found: &Found<'_>) -> impl FnOnce(E) -> CopyError + use<E> {
        let path = self.shown(found);
        move |source| CopyError::Io { op, path, source: source.into() }
    }

    /// Makes room for a new file.
    fn clear(&self, name: &[u8], path: &dyn Fn() -> Escaped) -> Result<(), CopyError> {
        match rustix::fs::unlinkat(self.here(), OsStr::from_bytes(name), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(Errno::ISDIR) => Err(CopyError::IsADirectory { path: path() }),
            Err(error) => Err(CopyError::Io { op: "replace", path: path(), source: error.into() }),
        }
    }

    fn owner(&self, uid: u32, gid: u32) -> (Option<Uid>, Option<Gid>) {
        let (uid, gid) = match self.options.owner {
            Some(owner) => (owner.uid, owner.gid),
            None => owner(self.owners, uid, gid),
        };
        (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
    }

    fn mode(&self, mode: u32, is_dir: bool) -> Mode {
        let mode = mode & 0o7777;
        Mode::from_raw_mode(self.options.chmod.as_ref().map_or(mode, |chmod| chmod.apply(mode, is_dir)))
    }

    fn create(&self, name: &[u8]) -> rustix::io::Result<OwnedFd> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(self.here(), OsStr::from_bytes(name), flags, Mode::from_raw_mode(0o600))
    }

    fn inline(&mut self, bytes: &[u8], mode: u32) -> Result<(), CopyError> {
        let name = self.name.clone().expect("a file has a name");
        let shown = || Escaped::of(&self.base_path);
        if is_reserved(&name) {
            return Err(CopyError::Reserved { path: shown() });
        }
        let failed = |op| move |source: io::Error| CopyError::Io { op, path: shown(), source };
        self.clear(&name, &shown)?;
        let file = self.create(&name).map_err(|e| failed("create")(e.into()))?;
        let mut file = std::fs::File::from(file);
        file.write_all(bytes).map_err(failed("write"))?;
        let (uid, gid) = self.owner(0, 0);
        rustix::fs::fchown(&file, uid, gid).map_err(|e| failed("change the owner of")(e.into()))?;
        rustix::fs::fchmod(&file, self.mode(mode, false)).map_err(|e| failed("change the mode of")(e.into()))?;
        self.copied.files += 1;
        self.copied.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Owner, attributes, mode and times of a file or a directory, in the order in which none undoes another.
    fn metadata(&self, found: &Found<'_>, fd: BorrowedFd<'_>) -> Result<(), CopyError> {
        let (uid, gid) = self.owner(found.stat.st_uid, found.stat.st_gid);
        let has = rustix::fs::fstat(fd).map_err(self.failed("look at", found))?;
        // Clears setuid bits and capabilities: first. It costs more than a look, and root's files are root's already.
        if (uid, gid) != (Some(Uid::from_raw(has.st_uid)), Some(Gid::from_raw(has.st_gid))) {
            rustix::fs::fchown(fd, uid, gid).map_err(self.failed("change the owner of", found))?;
        }
        for (name, value) in walk::xattrs(found).map_err(self.failed("read the attributes of the source of", found))? {
            match rustix::fs::fsetxattr(fd, name.as_slice(), &value, XattrFlags::empty()) {
                // A file system without attributes, or one that has none of that kind: as docker, not worth failing.
                Ok(()) | Err(Errno::NOTSUP) => {}
                Err(error) => return Err(self.failed("set an attribute of", found)(error)),
            }
        }
        let is_dir = found.kind() == FileType::Directory;
        rustix::fs::fchmod(fd, self.mode(found.stat.st_mode, is_dir))
            .map_err(self.failed("change the mode of", found))?;
        rustix::fs::futimens(fd, &times(found)).map_err(self.failed("change the times of", found))
    }

    fn file(&mut self, found: &Found<'_>) -> Result<(), CopyError> {
        let source = found.open().map_err(self.failed("open the source of", found))?;
        // Most names are free: what has one is looked for only then.
        let target = match self.create(self.name(found)) {
            Err(Errno::EXIST) => {
                self.clear(self.name(found), &|| self.shown(found))?;
                self.create(self.name(found))
            }
            created => created,
        };
        let target = target.map_err(self.failed("create", found))?;
        let bytes = self.data(&source, &target).map_err(self.failed("write", found))?;
        self.copied.bytes += bytes;
        self.metadata(found, target.as_fd())
    }

    /// Shares the bytes if the file system can, has the kernel copy them if it can, and else copies them.
    fn data(&mut self, source: &OwnedFd, target: &OwnedFd) -> io::Result<u64> {
        if self.can_clone {
            match rustix::fs::ioctl_ficlone(target, source) {
                Ok(()) => return Ok(u64::try_from(rustix::fs::fstat(target)?.st_size).unwrap_or(0)),
                // Once refused, always refused: both sides stay on their file systems for nearly all files.
                Err(_) => self.can_clone = false,
            }
        }
        let mut total = 0;
        while self.can_range {
            self.cancel.check()?;
            match rustix::fs::copy_file_range(source, None, target, None, CHUNK_BYTES) {
                // Files of /proc and the like end at once here though they have bytes: reading finds out.
                Ok(0) if total == 0 => break,
                Ok(0) => return Ok(total),
                Ok(length) => total += length as u64,
                Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::NOTSUP | Errno::PERM | Errno::BADF) => {
                    self.can_range = false;
                }
                Err(error) => return Err(error.into()),
            }
        }
        self.buffer.resize(CHUNK_BYTES, 0);
        loop {
            self.cancel.check()?;
            let length = retry_on_intr(|| rustix::io::read(source, &mut self.buffer[..]))?;
            if length == 0 {
                return Ok(total);
            }
            total += length as u64;
            let mut rest = &self.buffer[..length];
            while !rest.is_empty() {
                rest = &rest[retry_on_intr(|| rustix::io::write(target, rest))?..];
            }
        }
    }

    /// Another name for a file that was copied before. Nobody else works in the destination, but what is there came from
    /// an image: no link on the way is followed.
    fn hard_link(&self, found: &Found<'_>, first: &[u8]) -> Result<(), CopyError> {
        let (dir, name) = match first.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (&first[..at], &first[at + 1..]),
            None => (&b"."[..], first),
        };
        let dir = inroot::open_no_links(self.base.as_fd(), dir, OFlags::PATH | OFlags::DIRECTORY)
            .map_err(self.failed("find the other name of", found))?;
        let new = OsStr::from_bytes(self.name(found));
        rustix::fs::linkat(&dir, OsStr::from_bytes(name), self.here(), new, AtFlags::empty())
            .map_err(self.failed("link", found))
    }
}

fn times(found: &Found<'_>) -> Timestamps {
    let time = |seconds, nanos| Timespec { tv_sec: seconds, tv_nsec: i64::try_from(nanos).unwrap_or(0) };
    let modified = time(found.stat.st_mtime, found.stat.st_mtime_nsec);
    Timestamps { last_access: modified, last_modification: modified }
}

/// Whether layers keep a name for what they take away.
fn is_reserved(name: &[u8]) -> bool {
    name.starts_with(b".wh.")
}

impl Visitor for Copier<'_> {
    type Error = CopyError;

    fn enter(&mut self, found: &Found<'_>) -> Result<Step, CopyError> {
        if found.path.is_empty() {
            return Ok(Step::Into);
        }
        self.admit(found)?;
        let name = self.name(found).to_vec();
        match rustix::fs::mkdirat(self.here(), OsStr::from_bytes(&name), Mode::from_raw_mode(0o700)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(error) => return Err(self.failed("make the directory", found)(error)),
        }
        match inroot::open_dir(self.here(), &name) {
            Ok(dir) => {
                self.dirs.push(dir);
                Ok(Step::Into)
            }
            Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
                Some(Errno::NOTDIR | Errno::LOOP) => Err(CopyError::NotADirectory { path: self.shown(found) }),
                _ => Err(self.failed("open", found)(error)),
            },
        }
    }

    fn leave(&mut self, found: &Found<'_>) -> Result<(), CopyError> {
        if found.path.is_empty() {
            return Ok(());
        }
        let dir = self.dirs.pop().expect("what is left was entered");
        self.metadata(found, dir.as_fd())
    }

    fn leaf(&mut self, found: &Found<'_>) -> Result<(), CopyError> {
        self.admit(found)?;
        let kind = found.kind();
        let special = matches!(kind, FileType::Fifo | FileType::CharacterDevice | FileType::BlockDevice);
        if special && self.owners == Owners::Root {
            return Err(CopyError::Special { path: self.source(found) });
        }
        self.copied.files += 1;
        let first = self.links.first(found);
        if kind == FileType::RegularFile && first.is_none() {
            return self.file(found);
        }
        let name = self.name(found).to_vec();
        self.clear(&name, &|| self.shown(found))?;
        if let Some(first) = first {
            return self.hard_link(found, &first);
        }
        let name = OsStr::from_bytes(&name);
        let (uid, gid) = self.owner(found.stat.st_uid, found.stat.st_gid);
        let nofollow = AtFlags::SYMLINK_NOFOLLOW;
        if kind == FileType::Symlink {
            let link = found.link().map_err(self.failed("read the source of", found))?;
            rustix::fs::symlinkat(OsStr::from_bytes(&link), self.here(), name).map_err(self.failed("link", found))?;
        } else {
            let mode = self.mode(found.stat.st_mode, false);
            rustix::fs::mknodat(self.here(), name, kind, mode, found.stat.st_rdev)
                .map_err(self.failed("make", found))?;
        }
        rustix::fs::chownat(self.here(), name, uid, gid, nofollow)
            .map_err(self.failed("change the owner of", found))?;
        if kind != FileType::Symlink {
            // Nothing but us is in this directory, and it was just made: no link can be there.
            rustix::fs::chmodat(self.here(), name, self.mode(found.stat.st_mode, false), AtFlags::empty())
                .map_err(self.failed("change the mode of", found))?;
        }
        rustix::fs::utimensat(self.here(), name, &times(found), nofollow)
            .map_err(self.failed("change the times of", found))
    }
}

/// `--chmod`: an octal number or changes as `chmod(1)` takes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chmod(ChmodKind);

#[derive(Debug, Clone, PartialEq, Eq)]
enum ChmodKind {
    Octal(u32),
    Changes(Vec<Change>),
}

/// One operator of one clause.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Change {
    /// Which of user, group, others, as bits of 0o7: u = 4, g = 2, o = 1.
    who: u32,
    operator: char,
    what: What,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    Bits {
        rwx: u32,
        x_if_any: bool,
        set_id: bool,
        sticky: bool,
    },
    /// The bits that this class has: the shift of its three bits.
    CopyOf(u32),
}

/// A `--chmod` that is neither octal nor changes like `u=rwX,go-w`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid mode {mode:?}: expected an octal number up to 7777, or changes like u=rwX,go-w")]
pub struct ChmodError {
    /// As written.
    pub mode: String,
}

impl Chmod {
    /// Parses it.
    ///
    /// # Errors
    /// [`ChmodError`]
    pub fn parse(text: &str) -> Result<Self, ChmodError> {
        let error = || ChmodError { mode: text.to_owned() };
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777).ok_or_else(error)?;
            return Ok(Self(ChmodKind::Octal(mode)));
        }
        let mut changes = Vec::new();
        for clause in text.split(',') {
            let operators = clause.find(['+', '-', '=']).ok_or_else(error)?;
            let (classes, mut rest) = clause.split_at(operators);
            let mut who = 0;
            for class in classes.chars() {
                who |= match class {
                    'u' => 4,
                    'g' => 2,
                    'o' => 1,
                    'a' => 7,
                    _ => return Err(error()),
                };
            }
            let who = if who == 0 { 7 } else { who };
            while let Some(operator) = rest.chars().next() {
                rest = &rest[1..];
                let end = rest.find(['+', '-', '=']).unwrap_or(rest.len());
                let what = match &rest[..end] {
                    "u" => What::CopyOf(6),
                    "g" => What::CopyOf(3),
                    "o" => What::CopyOf(0),
                    letters => {
                        let (mut rwx, mut x_if_any, mut set_id, mut sticky) = (0, false, false, false);
                        for letter in letters.chars() {
                            match letter {
                                'r' => rwx |= 4,
                                'w' => rwx |= 2,
                                'x' => rwx |= 1,
                                'X' => x_if_any = true,
                                's' => set_id = true,
                                't' => sticky = true,
                                _ => return Err(error()),
                            }
                        }
                        What::Bits { rwx, x_if_any, set_id, sticky }
                    }
                };
                rest = &rest[end..];
                changes.push(Change { who, operator, what });
            }
        }
        Ok(Self(ChmodKind::Changes(changes)))
    }

    /// The mode itself, if it is one.
    fn octal(&self) -> Option<u32> {
        match &self.0 {
            ChmodKind::Octal(mode) => Some(*mode),
            ChmodKind::Changes(_) => None,
        }
    }

    /// The mode that a file of mode `mode` gets.
    fn apply(&self, mode: u32, is_dir: bool) -> u32 {
        let changes = match &self.0 {
            ChmodKind::Octal(mode) => return *mode,
            ChmodKind::Changes(changes) => changes,
        };
        changes.iter().fold(mode, |mode, change| {
            let (rwx, set_id, sticky) = match &change.what {
                What::CopyOf(shift) => (mode >> shift & 7, false, false),
                What::Bits { rwx, x_if_any, set_id, sticky } => {
                    let x = *x_if_any && (is_dir || mode & 0o111 != 0);
                    (rwx | u32::from(x), *set_id, *sticky)
                }
            };
            let mut bits = 0;
            let mut mask = 0;
            for (class, shift, id_bit) in [(4, 6, 0o4000), (2, 3, 0o2000), (1, 0, 0)] {
                if change.who & class != 0 {
                    bits |= rwx << shift;
                    mask |= 7 << shift;
                    if set_id {
                        bits |= id_bit;
                    }
                    // As chmod(1): `=` on a directory leaves its set-id bits alone.
                    if !is_dir {
                        mask |= id_bit;
                    }
                }
            }
            if sticky && change.who & 1 != 0 {
                bits |= 0o1000;
            }
            match change.operator {
                '+' => mode | bits,
                '-' => mode & !bits,
                _ => mode & !mask | bits,
            }
        })
    }
}

#[cfg(test)]
mod chmod_tests {
    use super::Chmod;

    #[test]
    fn modes_as_chmod_makes_them() {
        let table = [
            ("755", 0o600, false, 0o755),
            ("0", 0o777, false, 0),
            ("7777", 0o600, true, 0o7777),
            ("u+x", 0o644, false, 0o744),
            ("a-w", 0o666, false, 0o444),
            ("+x", 0o644, false, 0o755),
            ("u=rwX,go=rX", 0o600, false, 0o644),
            ("u=rwX,go=rX", 0o700, false, 0o755),
            ("u=rwX,go=rX", 0o600, true, 0o755),
            ("g=u,o=", 0o754, false, 0o770),
            ("u+s,o+t", 0o755, false, 0o5755),
            ("u=rw", 0o4755, false, 0o655),
            ("u+r-w", 0o200, false, 0o400),
        ];
        for (text, mode, is_dir, expected) in table {
            assert_eq!(Chmod::parse(text).unwrap().apply(mode, is_dir), expected, "{text} on {mode:o}");
        }
        for bad in ["", "888", "17777", "u", "z+x", "u+q", "rwx", "u=rwx,", "-1x"] {
            assert!(Chmod::parse(bad).is_err(), "{bad:?}");
        }
    }
}
