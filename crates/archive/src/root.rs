//! A directory handle that nothing leads out of.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::sys;
use crate::tar::EntryPath;

/// The root of a tree, held open. Paths are resolved beneath it as if the process were chrooted
/// there: absolute links start at the root, `..` stops at it, magic links (`/proc/…/exe`) fail.
///
/// Nothing is ever checked and then used: the kernel resolves and opens in one step, so a process
/// that swaps directories meanwhile gains nothing.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
}

impl Root {
    /// Holds another handle of `dir`.
    ///
    /// # Errors
    /// When `dir` is not a directory, or no descriptor is left.
    pub fn new(dir: impl AsFd) -> io::Result<Self> {
        let fd = rustix::fs::openat(dir, ".", sys::DIRECTORY, Mode::empty())?;
        Ok(Self { fd })
    }

    /// Opens what stands at `path`, following links inside the root.
    ///
    /// `flags` as for `openat`; [`OFlags::NOFOLLOW`] holds for the last component. A file that
    /// might be a fifo or a device wants [`OFlags::NONBLOCK`].
    ///
    /// # Errors
    /// The kernel's: `ENOENT`, `ELOOP`, `EXDEV` for a magic link, and so on.
    pub fn open(&self, path: &EntryPath, flags: OFlags, mode: Mode) -> io::Result<OwnedFd> {
        let raw = if path.is_root() { b"." } else { path.as_bytes() };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(sys::open_resolved(self.fd.as_fd(), raw, flags | OFlags::CLOEXEC, mode, resolve)?)
    }

    /// Opens the directory at `path`, following links inside the root.
    ///
    /// # Errors
    /// As [`Self::open`], and `ENOTDIR`.
    pub fn open_dir(&self, path: &EntryPath) -> io::Result<OwnedFd> {
        self.open(path, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty())
    }

    /// Opens a regular file for reading, following links inside the root. Never blocks.
    ///
    /// # Errors
    /// As [`Self::open`], and `EINVAL` for anything but a regular file.
    pub fn open_file(&self, path: &EntryPath) -> io::Result<OwnedFd> {
        let fd = self.open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty())?;
        match sys::kind(&rustix::fs::fstat(&fd)?) {
            rustix::fs::FileType::RegularFile => Ok(fd),
            _ => Err(rustix::io::Errno::INVAL.into()),
        }
    }
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::unix::fs::symlink;

    fn read(root: &Root, path: &str) -> io::Result<String> {
        let mut text = String::new();
        std::fs::File::from(root.open_file(&EntryPath::clean(path.as_bytes()).unwrap())?).read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn p20_reading_through_a_link_stays_in_the_root() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("root/etc")).unwrap();
        std::fs::create_dir_all(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/passwd"), "outside").unwrap();
        std::fs::write(dir.path().join("root/etc/passwd"), "inside").unwrap();
        symlink("/etc/passwd", dir.path().join("root/absolute")).unwrap();
        symlink("../../../etc/passwd", dir.path().join("root/up")).unwrap();
        symlink("..", dir.path().join("root/parent")).unwrap();
        symlink("/proc/self/root", dir.path().join("root/magic")).unwrap();
        symlink("b", dir.path().join("root/a")).unwrap();
        symlink("a", dir.path().join("root/b")).unwrap();

        let root = Root::new(std::fs::File::open(dir.path().join("root")).unwrap()).unwrap();
        for path in ["absolute", "up", "parent/etc/passwd", "parent/../etc/passwd"] {
            assert_eq!(read(&root, path).unwrap(), "inside", "{path}");
        }
        assert_eq!(read(&root, "magic/etc/passwd").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(read(&root, "a").unwrap_err().raw_os_error(), Some(rustix::io::Errno::LOOP.raw_os_error()));
    }

    #[test]
    fn f07_a_fifo_is_refused_and_does_not_hang() {
        let dir = tempfile::tempdir().unwrap();
        let root = Root::new(std::fs::File::open(dir.path()).unwrap()).unwrap();
        rustix::fs::mkfifoat(root.as_fd(), "fifo", Mode::from_raw_mode(0o600)).unwrap();
        assert!(root.open_file(&EntryPath::clean(b"fifo").unwrap()).is_err());
    }
}
