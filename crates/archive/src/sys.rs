//! System calls of the file system half, with the flags that keep them in place.
//!
//! Names given here are single components. A directory is opened one component at a time and
//! never through a symbolic link; files are touched by descriptor, or by parent descriptor and
//! name without following. Where Linux has no such call (extended attributes of something that
//! cannot be opened, `fchmodat2` before 6.6), the way leads through `/proc/self/fd`, whose links
//! lead to what the descriptor holds and nowhere else.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{self, AtFlags, Dev, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps};
use rustix::io::{Errno, Result};

use crate::tar::{Device, Timestamp};

/// How a directory is opened for reading names and for work on what it holds.
pub(crate) const DIRECTORY: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// One component, nothing followed.
const ONE_STEP: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_MAGICLINKS);

/// Tries of a call that Linux breaks off because somebody renames at the same time. Each try
/// needs another rename at the wrong moment, so this many mean that something is wrong.
const RENAME_TRIES: usize = 100;

/// Calls `openat2`, again when a rename elsewhere made the kernel give up.
pub(crate) fn open_resolved(
    dir: BorrowedFd<'_>,
    path: &[u8],
    flags: OFlags,
    mode: Mode,
    resolve: ResolveFlags,
) -> Result<OwnedFd> {
    for _ in 1..RENAME_TRIES {
        match fs::openat2(dir, path, flags, mode, resolve) {
            Err(Errno::AGAIN) => {}
            result => return result,
        }
    }
    fs::openat2(dir, path, flags, mode, resolve)
}

/// Opens the directory `name` of `dir`. `ENOTDIR` or `ELOOP` when it is something else.
pub(crate) fn open_dir(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    open_resolved(dir, name, DIRECTORY, Mode::empty(), ONE_STEP)
}

/// As [`open_dir`], but `EXDEV` when another file system is mounted there.
pub(crate) fn open_dir_same_mount(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    open_resolved(dir, name, DIRECTORY, Mode::empty(), ONE_STEP.union(ResolveFlags::NO_XDEV))
}

/// What stands at `name` in `dir`, not following it.
pub(crate) fn stat_at(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Stat> {
    fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
}

/// As [`stat_at`], `None` when there is nothing.
pub(crate) fn stat_if_exists(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Option<Stat>> {
    match stat_at(dir, name) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What a symbolic link says. `EINVAL` when `name` is none.
pub(crate) fn read_link(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Vec<u8>> {
    Ok(fs::readlinkat(dir, name, Vec::new())?.into_bytes())
}

/// Opens a regular file for reading. Anything else fails, and never blocks (a fifo would).
pub(crate) fn open_file(dir: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let fd = open_resolved(dir, name, flags, Mode::empty(), ONE_STEP)?;
    match kind(&fs::fstat(&fd)?) {
        FileType::RegularFile => Ok(fd),
        _ => Err(Errno::INVAL),
    }
}

/// The type of what `stat` tells of.
pub(crate) fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

/// Permission bits with setuid, setgid and sticky.
pub(crate) fn mode_bits(stat: &Stat) -> u32 {
    stat.st_mode & 0o7777
}

/// Device numbers, of a device.
pub(crate) fn device(stat: &Stat) -> Device {
    Device { major: fs::major(stat.st_rdev), minor: fs::minor(stat.st_rdev) }
}

/// Device numbers as `mknodat` takes them.
pub(crate) fn raw_device(device: Device) -> Dev {
    fs::makedev(device.major, device.minor)
}

/// Whether this is how overlayfs spells "nothing here".
pub(crate) fn is_whiteout(stat: &Stat) -> bool {
    kind(stat) == FileType::CharacterDevice && stat.st_rdev == 0
}

/// The time of last modification.
pub(crate) fn mtime(stat: &Stat) -> Timestamp {
    Timestamp { seconds: stat.st_mtime, nanos: u32::try_from(stat.st_mtime_nsec).unwrap_or(0) }
}

/// Both times set to `mtime`: an archive carries no time of last access worth keeping, and a
/// fixed one keeps layers the same whenever they are unpacked.
pub(crate) fn times(mtime: Timestamp) -> Timestamps {
    let time = Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanos.into() };
    Timestamps { last_access: time, last_modification: time }
}

/// The permission bits as the kernel's type; nothing above 0o7777.
pub(crate) fn mode(bits: u32) -> Mode {
    Mode::from_raw_mode(bits & 0o7777)
}

/// Sets the mode of something that cannot be opened (a device, a fifo without a peer), or of
/// which only the name is known. Symbolic links have no mode and are refused.
pub(crate) fn chmod_at(dir: BorrowedFd<'_>, name: &[u8], bits: u32) -> Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let held = open_resolved(dir, name, flags, Mode::empty(), ONE_STEP)?;
    // O_PATH together with O_NOFOLLOW opens a link itself, RESOLVE_NO_SYMLINKS or not.
    if kind(&fs::fstat(&held)?) == FileType::Symlink {
        return Err(Errno::LOOP);
    }
    fs::chmod(format!("/proc/self/fd/{}", held.as_raw_fd()), mode(bits))
}

/// Something whose extended attributes are wanted.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Subject<'a> {
    /// An open file or directory.
    Fd(BorrowedFd<'a>),
    /// A name in a directory, not followed.
    At(BorrowedFd<'a>, &'a [u8]),
}

impl Subject<'_> {
    fn path(dir: BorrowedFd<'_>, name: &[u8]) -> Vec<u8> {
        let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
        path.extend_from_slice(name);
        path
    }

    /// The raw list of names, each ended by a NUL. Empty where the file system has none.
    pub(crate) fn list(self) -> Result<Vec<u8>> {
        let once = |buffer: &mut Vec<u8>| {
            let spare = rustix::buffer::spare_capacity(buffer);
            match self {
                Self::Fd(fd) => fs::flistxattr(fd, spare),
                Self::At(dir, name) => fs::llistxattr(Self::path(dir, name), spare),
            }
        };
        match grown(256, once) {
            Err(Errno::OPNOTSUPP) => Ok(Vec::new()),
            result => result,
        }
    }

    /// One value, `None` when there is none.
    pub(crate) fn get(self, xattr: &[u8]) -> Result<Option<Vec<u8>>> {
        let once = |buffer: &mut Vec<u8>| {
            let spare = rustix::buffer::spare_capacity(buffer);
            match self {
                Self::Fd(fd) => fs::fgetxattr(fd, xattr, spare),
                Self::At(dir, name) => fs::lgetxattr(Self::path(dir, name), xattr, spare),
            }
        };
        match grown(256, once) {
            Ok(value) => Ok(Some(value)),
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sets one value.
    pub(crate) fn set(self, xattr: &[u8], value: &[u8]) -> Result<()> {
        match self {
            Self::Fd(fd) => fs::fsetxattr(fd, xattr, value, fs::XattrFlags::empty()),
            Self::At(dir, name) => {
                fs::lsetxattr(Self::path(dir, name).as_slice(), xattr, value, fs::XattrFlags::empty())
            }
        }
    }

    /// Removes one value; says whether there was one.
    pub(crate) fn remove(self, xattr: &[u8]) -> Result<bool> {
        let result = match self {
            Self::Fd(fd) => fs::fremovexattr(fd, xattr),
            Self::At(dir, name) => fs::lremovexattr(Self::path(dir, name).as_slice(), xattr),
        };
        match result {
            Ok(()) => Ok(true),
            Err(Errno::NODATA | Errno::OPNOTSUPP) => Ok(false),
            Err(error) => Err(error),
        }
    }
}

/// Calls `once` with a buffer that grows until the answer fits.
fn grown(mut capacity: usize, mut once: impl FnMut(&mut Vec<u8>) -> Result<usize>) -> Result<Vec<u8>> {
    // 64 KiB is the kernel's own limit on both the list and a value (XATTR_LIST_MAX, XATTR_SIZE_MAX).
    const MOST: usize = 64 << 10;
    loop {
        let mut buffer = Vec::with_capacity(capacity);
        match once(&mut buffer) {
            Ok(_) => return Ok(buffer),
            Err(Errno::RANGE) if capacity < MOST => capacity = (capacity * 16).min(MOST),
            Err(error) => return Err(error),
        }
    }
}
