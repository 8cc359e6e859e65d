//! A directory on a real disk that unmounts and removes what a test left in it.

use std::{
    fs,
    os::unix::fs::DirBuilderExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use crate::tools;

/// statfs(2): where overlay cannot have its upper directory (overlay itself) or where a test would
/// measure memory instead of a disk (tmpfs).
const UNFIT_FILE_SYSTEMS: [u64; 2] = [0x794c_7630, 0x0102_1994];

/// A directory of the test's own, gone with everything in it when dropped.
///
/// It is made below the build directory, or below /var/tmp where that lies on a file system that
/// overlay cannot use. `PLIES_KEEP_SCRATCH=1` keeps it, unmounted, for a look after a failure.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

impl Scratch {
    /// Makes a new one, 0700.
    ///
    /// # Panics
    /// When no place to make it is fit.
    pub fn new() -> Self {
        let parent = parent();
        let path = tempfile::Builder::new()
            .prefix("t")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700))
            .tempdir_in(&parent)
            .unwrap_or_else(|error| panic!("make a directory in {}: {error}", parent.display()))
            .keep();
        Self { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in it, which need not exist.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// A directory in it, 0755, made if it is not there.
    pub fn dir(&self, name: impl AsRef<Path>) -> PathBuf {
        let path = self.path.join(name);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&path)
            .unwrap_or_else(|error| panic!("make {}: {error}", path.display()));
        path
    }

    /// A file in it with this content, its directories made.
    pub fn file(&self, name: impl AsRef<Path>, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path.join(name);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).unwrap_or_else(|error| panic!("make {}: {error}", parent.display()));
        }
        fs::write(&path, content).unwrap_or_else(|error| panic!("write {}: {error}", path.display()));
        path
    }
}

/// A kind of file system to mount for a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileSystem {
    /// In a file, through a loop device.
    Ext4,
    /// In memory.
    Tmpfs,
    /// In a file, through a loop device.
    Btrfs,
}

impl FileSystem {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Ext4, Self::Tmpfs, Self::Btrfs];
}

impl Scratch {
    /// A new file system of this kind, 2 GiB at most, mounted on a directory in it until the scratch is dropped. `None`,
    /// said aloud, where the program that makes one is missing.
    ///
    /// # Panics
    /// When it cannot be made or mounted.
    #[track_caller]
    pub fn mount(&self, name: &str, kind: FileSystem) -> Option<PathBuf> {
        let at = self.dir(name);
        let make: &[&str] = match kind {
            FileSystem::Tmpfs => {
                tools::run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=2g,mode=755", "tmpfs"]).arg(&at));
                return Some(at);
            }
            FileSystem::Ext4 => &["mkfs.ext4", "-q"],
            FileSystem::Btrfs => &["mkfs.btrfs", "-q"],
        };
        if !tools::have(&make[..1]) {
            return None;
        }
        let disk = self.join(format!("{name}.disk"));
        fs::File::create(&disk)
            .and_then(|file| file.set_len(2 << 30))
            .unwrap_or_else(|error| panic!("make {}: {error}", disk.display()));
        let program = tools::find(make[0]).expect("because it was just found");
        tools::run(Command::new(program).args(&make[1..]).arg(&disk));
        tools::run(Command::new("mount").args(["-o", "loop"]).arg(&disk).arg(&at));
        Some(at)
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        unmount_below(&self.path);
        if std::env::var_os("PLIES_KEEP_SCRATCH").is_some() {
            eprintln!("kept {}", self.path.display());
        } else if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("left behind {}: {error}", self.path.display());
        }
    }
}

fn parent() -> PathBuf {
    let beside_the_binary = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.ancestors().find(|at| at.ends_with("target"))?.join("tmp")));
    [beside_the_binary, Some(PathBuf::from("/var/tmp"))]
        .into_iter()
        .flatten()
        .find(|path| {
            fs::create_dir_all(path).is_ok()
                && rustix::fs::statfs(path).is_ok_and(|stat| {
                    !UNFIT_FILE_SYSTEMS
                        .contains(&u64::try_from(stat.f_type).expect("because magic numbers are positive"))
                })
        })
        .expect("neither the build directory nor /var/tmp is on a real disk")
}

/// The mount points at or below `path`, innermost last.
pub fn mounts_below(path: &Path) -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("because /proc is always mounted");
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|field| PathBuf::from(field.replace("\\040", " ").replace("\\011", "\t")))
        .filter(|at| at.starts_with(path))
        .collect()
}

/// Unmounts everything at or below `path`, innermost first.
pub fn unmount_below(path: &Path) {
    for at in mounts_below(path).iter().rev() {
        if let Err(error) = rustix::mount::unmount(at, rustix::mount::UnmountFlags::DETACH) {
            eprintln!("left mounted {}: {error}", at.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_when_it_is_dropped() {
        let scratch = Scratch::new();
        scratch.file("a/b/c", "text");
        let path = scratch.path().to_owned();
        assert!(path.join("a/b/c").exists());
        drop(scratch);
        assert!(!path.exists());
    }
}
