//! Mount points that a tree lacks.
//!
//! The kernel mounts on what is there, so `/proc` or `/etc/resolv.conf` must be made when an image has none. They are no
//! part of what a step does: afterwards each is taken away again, by directory handle and only if it is still the very
//! thing that was made and still empty, whatever the step did to the path; and the directory it stood in gets its time
//! of modification back, so that no layer has a directory in it for that alone.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use plies_cache::contenthash::inroot::{self, MadeDir, Missing};
use rustix::fs::{AtFlags, Mode, OFlags, Stat, Timespec, Timestamps};

use super::{ExecError, MountSource, Step};
use crate::context::Tree;

/// What every step has mounted, by either executor.
const ALWAYS: [&str; 3] = ["/proc", "/dev", "/sys"];

/// The mount points made for one step.
#[derive(Debug, Default)]
pub(super) struct Stubs(Vec<Stub>);

#[derive(Debug)]
struct Stub {
    parent: OwnedFd,
    name: Vec<u8>,
    /// Keeps the inode's number from being used again.
    handle: OwnedFd,
    is_dir: bool,
    /// The parent's time of modification before the stub was made, and with it.
    before: Time,
    with: Time,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Time {
    seconds: i64,
    nanos: i64,
}

impl Time {
    fn of(stat: &Stat) -> Self {
        Self { seconds: stat.st_mtime, nanos: i64::try_from(stat.st_mtime_nsec).unwrap_or(0) }
    }
}

impl Stubs {
    /// Makes what is missing in `step`'s tree. What lies below `/proc`, `/dev` and `/sys` is the executor's: it mounts
    /// those first.
    pub(super) fn make(step: &Step) -> Result<Self, ExecError> {
        let root = Tree::open_dir(&step.rootfs).map_err(|source| ExecError::Io {
            op: "open the root file system",
            path: step.rootfs.clone(),
            source,
        })?;
        let mut stubs = Self::default();
        for target in ALWAYS {
            // A link here would have the executor mount somewhere else.
            match inroot::stat(root.as_fd(), &target.as_bytes()[1..]) {
                Ok(Some(stat)) if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() => {
                    stubs.remove()?;
                    return Err(ExecError::MountPoint { target: target.into(), why: "it is not a directory" });
                }
                _ => {}
            }
        }
        let wanted = ALWAYS.iter().map(|target| Ok((PathBuf::from(target), true)));
        let asked = step.mounts.iter().map(|mount| Ok((mount.target.clone(), source_is_dir(&mount.source)?)));
        for target in wanted.chain(asked) {
            let made = target.and_then(|(target, is_dir)| {
                let below = |always: &&str| target != Path::new(always) && target.starts_with(always);
                if ALWAYS.iter().any(below) { Ok(()) } else { stubs.make_one(root.as_fd(), &target, is_dir) }
            });
            if let Err(error) = made {
                // The first error is the one to tell.
                let _ = stubs.remove();
                return Err(error);
            }
        }
        Ok(stubs)
    }

    fn make_one(&mut self, root: BorrowedFd<'_>, target: &Path, is_dir: bool) -> Result<(), ExecError> {
        let failed = |source| ExecError::Io { op: "make the mount point", path: target.to_owned(), source };
        let mut before = None;
        let made = &mut self.0;
        let mut on_way = |parent: BorrowedFd<'_>, new: Option<MadeDir>| {
            match new {
                None => before = Some(Time::of(&rustix::fs::fstat(parent)?)),
                Some(new) => made.push(Stub {
                    with: Time::of(&rustix::fs::fstat(parent)?),
                    before: before.take().expect("it is told before"),
                    parent: new.parent,
                    name: new.name,
                    handle: new.dir,
                    is_dir: true,
                }),
            }
            Ok(())
        };
        let resolved =
            inroot::resolve(root, target.as_os_str().as_bytes(), Missing::Make(&mut on_way)).map_err(failed)?;
        let Some(name) = &resolved.name else {
            return if is_dir { Ok(()) } else { Err(mismatch(target, "a file can't be mounted on a directory")) };
        };
        if inroot::stat(resolved.dir(), name).map_err(failed)?.is_some() {
            return if is_dir { Err(mismatch(target, "a directory can't be mounted on a file")) } else { Ok(()) };
        }
        self.0.push(Stub::make(resolved.dir(), name, is_dir).map_err(failed)?);
        Ok(())
    }

    /// Takes away what is still as it was made. The last made goes first, so that directories are empty by then.
    pub(super) fn remove(&mut self) -> Result<(), ExecError> {
        let mut result = Ok(());
        while let Some(stub) = self.0.pop() {
            if let Err(source) = stub.remove() {
                let path = PathBuf::from(OsStr::from_bytes(&stub.name));
                result = Err(ExecError::Io { op: "take away the mount point", path, source });
            }
        }
        result
    }
}

fn mismatch(target: &Path, why: &'static str) -> ExecError {
    ExecError::MountPoint { target: target.to_owned(), why }
}

fn source_is_dir(source: &MountSource) -> Result<bool, ExecError> {
    match source {
        MountSource::Tmpfs { .. } => Ok(true),
        MountSource::Bind { path, .. } => match std::fs::metadata(path) {
            Ok(metadata) => Ok(metadata.is_dir()),
            Err(source) => Err(ExecError::Io { op: "mount", path: path.clone(), source }),
        },
    }
}

impl Stub {
    fn make(parent: BorrowedFd<'_>, name: &[u8], is_dir: bool) -> io::Result<Self> {
        let before = Time::of(&rustix::fs::fstat(parent)?);
        let os_name = OsStr::from_bytes(name);
        if is_dir {
            rustix::fs::mkdirat(parent, os_name, Mode::from_raw_mode(0o755))?;
        } else {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(parent, os_name, flags, Mode::from_raw_mode(0o644))?;
        }
        Ok(Self {
            handle: inroot::open_handle(parent, name)?,
            with: Time::of(&rustix::fs::fstat(parent)?),
            parent: rustix::io::fcntl_dupfd_cloexec(parent, 0)?,
            name: name.to_vec(),
            is_dir,
            before,
        })
    }

    fn remove(&self) -> io::Result<()> {
        let Some(now) = inroot::stat(self.parent.as_fd(), &self.name)? else { return Ok(()) };
        let made = rustix::fs::fstat(&self.handle)?;
        let is_it = (now.st_dev, now.st_ino) == (made.st_dev, made.st_ino);
        if !is_it || (!self.is_dir && now.st_size != 0) {
            return Ok(());
        }
        let parent = Time::of(&rustix::fs::fstat(&self.parent)?);
        let flags = if self.is_dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        match rustix::fs::unlinkat(&self.parent, OsStr::from_bytes(&self.name), flags) {
            Ok(()) => {}
            // The step put something into it: it is the step's now.
            Err(rustix::io::Errno::NOTEMPTY | rustix::io::Errno::EXIST) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        let restore = if parent == self.with { self.before } else { parent };
        let time = Timespec { tv_sec: restore.seconds, tv_nsec: restore.nanos };
        let keep = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_OMIT };
        rustix::fs::futimens(&self.parent, &Timestamps { last_access: keep, last_modification: time })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::exec::{Access, StepMount};

    fn step(root: &Path) -> Step {
        let mut step = Step::new(root, ["true"]);
        let source = MountSource::Bind { path: "/dev/null".into(), access: Access::ReadOnly };
        step.mounts.push(StepMount { target: "/etc/resolv.conf".into(), source });
        step.mounts.push(StepMount {
            target: "/run/a/b".into(),
            source: MountSource::Tmpfs { size_bytes: None, access: Access::ReadWrite },
        });
        step.mounts.push(StepMount {
            target: "/dev/pipes".into(),
            source: MountSource::Tmpfs { size_bytes: None, access: Access::ReadWrite },
        });
        step
    }

    fn listing(root: &Path) -> Vec<String> {
        let mut names = Vec::new();
        let mut todo = vec![root.to_owned()];
        while let Some(dir) = todo.pop() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                if path.symlink_metadata().unwrap().is_dir() {
                    todo.push(path.clone());
                }
                names.push(path.strip_prefix(root).unwrap().display().to_string());
            }
        }
        names.sort();
        names
    }

    #[test]
    fn stubs_leave_no_trace() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        let times = |path: &Path| {
            let metadata = path.metadata().unwrap();
            (metadata.mtime(), metadata.mtime_nsec())
        };
        let before = (times(root.path()), times(&root.path().join("etc")));
        let mut stubs = Stubs::make(&step(root.path())).unwrap();
        assert_eq!(listing(root.path()), ["dev", "etc", "etc/resolv.conf", "proc", "run", "run/a", "run/a/b", "sys"]);
        stubs.remove().unwrap();
        assert_eq!(listing(root.path()), ["etc"]);
        assert_eq!((times(root.path()), times(&root.path().join("etc"))), before);
    }

    #[test]
    fn f02_only_what_was_made_is_removed_wherever_it_went() {
        let outside = tempfile::tempdir().unwrap();
        let canary = outside.path().join("resolv.conf");
        std::fs::write(&canary, "").unwrap();
        let root = tempfile::tempdir().unwrap();
        let mut stubs = Stubs::make(&step(root.path())).unwrap();
        // The step replaces the stub's parent by a link, and fills another stub.
        std::fs::rename(root.path().join("etc"), root.path().join("old")).unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("run/a/b/mine"), "x").unwrap();
        stubs.remove().unwrap();
        assert!(canary.exists());
        assert_eq!(listing(root.path()), ["etc", "old", "run", "run/a", "run/a/b", "run/a/b/mine"]);
    }

    #[test]
    fn f02_a_file_put_in_the_stubs_place_stays() {
        let root = tempfile::tempdir().unwrap();
        let mut stubs = Stubs::make(&step(root.path())).unwrap();
        let path = root.path().join("etc/resolv.conf");
        std::fs::rename(&path, root.path().join("gone")).unwrap();
        std::fs::write(&path, "").unwrap();
        stubs.remove().unwrap();
        assert!(path.exists() && root.path().join("gone").exists());
    }

    #[test]
    fn f10_a_linked_dev_or_proc_is_refused() {
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/", root.path().join("dev")).unwrap();
        assert!(matches!(Stubs::make(&step(root.path())), Err(ExecError::MountPoint { .. })));
        assert_eq!(listing(root.path()), ["dev"]);
    }
}
