//! Resolution of paths inside a directory handle, as if that directory were the root of the file system.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

/// How many symbolic links one path may go through: as many as in BuildKit and its copies (securejoin's limit). The
/// kernel stops at 40, and a link that needs more is one that only a builder can follow.
pub const LINKS_MAX: usize = 255;

/// Opens `path` with symbolic links followed inside `root`; `..` stops at `root`; `/proc`'s magic links are refused.
///
/// # Errors
/// As `openat2(2)`.
pub fn open(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    openat2(root, if path.is_empty() { b"." } else { path }, flags, ResolveFlags::IN_ROOT)
}

/// Opens `path` beneath `root` when no component of it is a symbolic link.
///
/// # Errors
/// `ELOOP` for a symbolic link; else as `openat2(2)`.
pub fn open_no_links(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    openat2(root, path, flags, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS)
}

fn openat2(root: BorrowedFd<'_>, path: &[u8], flags: OFlags, resolve: ResolveFlags) -> io::Result<OwnedFd> {
    let resolve = resolve | ResolveFlags::NO_MAGICLINKS;
    loop {
        match rustix::fs::openat2(root, OsStr::from_bytes(path), flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            // The kernel saw a rename or a mount on the way and can't be sure about a `..`: try again (openat2(2)).
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Opens the file `name` of `dir` itself, for `fstat` and `/proc/self/fd`, never what it links to.
///
/// # Errors
/// As `openat(2)`.
pub fn open_handle(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, OsStr::from_bytes(name), flags, Mode::empty())?)
}

/// Reads the regular file at `path`, links followed inside `root`. Pipes and devices are refused before they are opened
/// for reading, so none can hang or act on us.
///
/// # Errors
/// `InvalidInput` for anything but a regular file, `FileTooLarge`, and the kernel's.
pub fn read_file(root: BorrowedFd<'_>, path: &[u8], limit_bytes: u64) -> io::Result<Vec<u8>> {
    let handle = open(root, path, OFlags::PATH)?;
    if FileType::from_raw_mode(rustix::fs::fstat(&handle)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    let mut file = std::fs::File::from(reopen(handle.as_fd(), OFlags::RDONLY)?).take(limit_bytes.saturating_add(1));
    file.read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit_bytes {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("larger than {limit_bytes} bytes")));
    }
    Ok(bytes)
}

/// Opens for reading or writing what a path handle stands for. `/proc` is this machine's, not a tree's.
///
/// # Errors
/// As `open(2)`.
pub fn reopen(handle: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(fd_path(handle), flags | OFlags::CLOEXEC, Mode::empty())?)
}

/// The name under which the kernel knows an open file, for calls that take no descriptor.
pub fn fd_path(fd: BorrowedFd<'_>) -> String {
    use std::os::fd::AsRawFd as _;
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

/// The link's text; with an empty name, that of the link that `dir` is a handle of.
///
/// # Errors
/// As `readlinkat(2)`.
pub fn read_link(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Vec<u8>> {
    Ok(rustix::fs::readlinkat(dir, OsStr::from_bytes(name), Vec::new())?.into_bytes())
}

/// `lstat` of a name in a directory; `None` when it is not there.
///
/// # Errors
/// As `fstatat(2)`.
pub fn stat(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Option<Stat>> {
    match rustix::fs::statat(dir, OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The names in a directory, without `.` and `..`, in byte order.
///
/// # Errors
/// As `getdents(2)`.
pub fn names(dir: BorrowedFd<'_>) -> io::Result<Vec<Vec<u8>>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Where a path leads inside a root, link by link.
#[derive(Debug)]
pub struct Resolved {
    /// The directories from the root to the one that holds the last component.
    parents: Vec<OwnedFd>,
    /// The last component, which is missing or no directory; `None` when the path leads to a directory.
    pub name: Option<Vec<u8>>,
    /// The path from the root with all links resolved, without leading slash.
    pub path: Vec<u8>,
}

impl Resolved {
    /// The directory that holds the last component, or the directory itself when there is no last component.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.parents.last().expect("the root is always there").as_fd()
    }
}

/// A directory that [`resolve`] made on its way.
#[derive(Debug)]
pub struct MadeDir {
    /// The directory that holds it.
    pub parent: OwnedFd,
    /// Its name there.
    pub name: Vec<u8>,
    /// The new directory.
    pub dir: OwnedFd,
}

/// What [`resolve`] does about directories that are missing.
#[expect(missing_debug_implementations, reason = "holds a closure")]
pub enum Missing<'a> {
    /// Fails with `ENOENT`.
    Fail,
    /// Makes them (mode 0755, root's), tells about each just before and after.
    Make(&'a mut dyn FnMut(BorrowedFd<'_>, Option<MadeDir>) -> io::Result<()>),
}

/// What a path whose last component is a symbolic link leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastLink {
    /// What the link points to.
    Follow,
    /// The link itself.
    Keep,
}

/// Told of a symbolic link: the components of its own resolved path, and what it says.
pub type OnLink<'a> = dyn FnMut(&[Vec<u8>], &[u8]) + 'a;

/// Resolves every component of `path` inside `root`, the last included: if that is a symbolic link, what it points to is
/// resolved on, there or not. A last component that is missing or not a directory becomes `name`. One component at a time
/// and each by handle, so that whoever swaps directories for links meanwhile gains nothing.
///
/// # Errors
/// `ENOENT`, `ENOTDIR`, `ELOOP` beyond [`LINKS_MAX`] links, and what else the kernel says.
pub fn resolve(root: BorrowedFd<'_>, path: &[u8], missing: Missing<'_>) -> io::Result<Resolved> {
    resolve_with(root, path, missing, LastLink::Follow, &mut |_, _| {})
}

/// As [`resolve`], with a choice about a link at the end; tells of each link it goes through.
///
/// # Errors
/// As [`resolve`].
pub fn resolve_with(
    root: BorrowedFd<'_>,
    path: &[u8],
    mut missing: Missing<'_>,
    last_link: LastLink,
    on_link: &mut OnLink<'_>,
) -> io::Result<Resolved> {
    let mut parents = vec![rustix::io::fcntl_dupfd_cloexec(root, 0)?];
    let mut components: Vec<Vec<u8>> = Vec::new();
    let mut todo: VecDeque<Vec<u8>> = split(path).map(<[u8]>::to_vec).collect();
    let mut links = 0;
    while let Some(component) = todo.pop_front() {
        if component == b".." {
            // The root's parent is the root.
            if parents.len() > 1 {
                parents.pop();
                components.pop();
            }
            continue;
        }
        let is_last = todo.is_empty();
        let dir = parents.last().expect("the root is never popped").as_fd();
        let handle = match open_handle(dir, &component) {
            Ok(handle) => handle,
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {
                if is_last {
                    components.push(component.clone());
                    return Ok(Resolved { parents, name: Some(component), path: components.join(&b'/') });
                }
                let Missing::Make(made) = &mut missing else { return Err(error) };
                made(dir, None)?;
                match rustix::fs::mkdirat(dir, OsStr::from_bytes(&component), Mode::from_raw_mode(0o755)) {
                    Ok(()) => {
                        let new = open_dir(dir, &component)?;
                        // mkdir obeys the umask, which is the caller's business and not the image's.
                        rustix::fs::fchmod(&new, Mode::from_raw_mode(0o755))?;
                        let parent = rustix::io::fcntl_dupfd_cloexec(dir, 0)?;
                        let for_us = rustix::io::fcntl_dupfd_cloexec(&new, 0)?;
                        made(dir, Some(MadeDir { parent, name: component.clone(), dir: new }))?;
                        parents.push(for_us);
                        components.push(component);
                    }
                    // Somebody else was quicker: look again at what is there now.
                    Err(Errno::EXIST) => todo.push_front(component),
                    Err(error) => return Err(error.into()),
                }
                continue;
            }
            Err(error) => return Err(error),
        };
        let stat = rustix::fs::fstat(&handle)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                parents.push(reopen_dir(handle.as_fd())?);
                components.push(component);
            }
            FileType::Symlink if !(is_last && last_link == LastLink::Keep) => {
                links += 1;
                if links > LINKS_MAX {
                    return Err(Errno::LOOP.into());
                }
                let target = read_link(handle.as_fd(), b"")?;
                components.push(component);
                on_link(&components, &target);
                components.pop();
                if target.first() == Some(&b'/') {
                    parents.truncate(1);
                    components.clear();
                }
                for part in split(&target).collect::<Vec<_>>().into_iter().rev() {
                    todo.push_front(part.to_vec());
                }
            }
            _ if is_last => {
                components.push(component.clone());
                return Ok(Resolved { parents, name: Some(component), path: components.join(&b'/') });
            }
            _ => return Err(Errno::NOTDIR.into()),
        }
    }
    Ok(Resolved { parents, name: None, path: components.join(&b'/') })
}

/// The components that mean something.
pub(super) fn split(path: &[u8]) -> impl DoubleEndedIterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/').filter(|part| !part.is_empty() && *part != b".")
}

/// Opens the directory `name`, which must not be a link.
///
/// # Errors
/// As `openat(2)`.
pub fn open_dir(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(dir, OsStr::from_bytes(name), flags, Mode::empty())?)
}

/// A readable handle of a directory we hold a path handle of.
///
/// # Errors
/// As `openat(2)`.
pub fn reopen_dir(handle: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(handle, ".", flags, Mode::empty())?)
}
