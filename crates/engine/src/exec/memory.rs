//! Directories that no disk sees: for secrets, and for what a runtime writes down about a step that has one.
//!
//! ```text
//! <state dir>/memory/<number>/    a tmpfs each, gone with its step
//! ```

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mount::{MountFlags, UnmountFlags};

use super::ExecError;

/// Below a state directory.
const DIR: &str = "memory";

/// Bytes that one may hold: some secrets of the largest size there is, and a runtime's notes.
const OPTIONS: &std::ffi::CStr = c"mode=700,size=32m";

/// Numbers them in this process; a dead one's are swept before.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// A tmpfs, unmounted when dropped.
#[derive(Debug)]
pub struct MemoryDir {
    path: PathBuf,
}

impl MemoryDir {
    /// Mounts one below `state_dir`.
    ///
    /// # Errors
    /// [`ExecError::Io`]; mounting needs root.
    pub fn new(state_dir: &Path) -> Result<Self, ExecError> {
        let dir = std::path::absolute(state_dir).unwrap_or_else(|_| state_dir.to_owned()).join(DIR);
        let path = dir.join(NEXT.fetch_add(1, Ordering::Relaxed).to_string());
        let failed = |op| {
            let path = path.clone();
            move |source: io::Error| ExecError::Io { op, path, source }
        };
        std::fs::create_dir_all(&path).map_err(failed("make the directory"))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("plies", &path, "tmpfs", flags, OPTIONS)
            .map_err(|errno| failed("mount a tmpfs for secrets on")(errno.into()))?;
        Ok(Self { path })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for MemoryDir {
    fn drop(&mut self) {
        end(&self.path);
    }
}

/// The directories that there are below a state directory.
pub(super) fn all(state_dir: &Path) -> impl Iterator<Item = PathBuf> {
    std::fs::read_dir(state_dir.join(DIR)).into_iter().flatten().flatten().map(|entry| entry.path())
}

/// Unmounts one. What can't be unmounted now is when the next process sweeps.
pub(super) fn end(path: &Path) {
    // Whoever still has a file of it open keeps the memory, but nobody finds it any more.
    let _ = rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    let _ = std::fs::remove_dir(path);
}
