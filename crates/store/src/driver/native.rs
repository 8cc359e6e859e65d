//! Plain copies, reflinked where the file system can.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use plies_archive::tar::EntryPath;
use plies_archive::{Change, Sealed, UpperForm, same_file};
use rustix::fs::{AtFlags, FileType, Mode, Stat, Timespec, Timestamps};

use super::{Driver, Form, Lower, Tree, Upper};
use crate::error::{At as _, FileError};
use crate::layers::read_index_at;
use crate::open::make_dir;
use crate::snapshots::{MountOptions, SnapshotError};
use crate::tree::{self, Material, MergeLayer, Metadata};

/// Written when the copy was whole: what changes later gets a later inode change time, which programs
/// cannot set.
const MARKER: &str = "prepared";

#[derive(Debug)]
pub(crate) struct Native;

/// Merges the stack in a new directory.
fn merged(lowers: &[Lower], target: &Path, material: Material) -> Result<OwnedFd, SnapshotError> {
    make_dir(target)?;
    fs::set_permissions(target, fs::Permissions::from_mode(0o755)).at("change mode", target)?;
    let root = tree::open_own(target)?;
    let layers = lowers.iter().map(|lower| {
        Ok::<_, SnapshotError>(MergeLayer { root: lower.open()?, index: read_index_at(&lower.dir, lower.id)? })
    });
    tree::merge(layers, &root, material)?;
    if lowers.is_empty() {
        // No layer says how the root of nothing looks: the same each time, or it would look changed.
        let epoch = Timespec { tv_sec: 0, tv_nsec: 0 };
        let times = Timestamps { last_access: epoch, last_modification: epoch };
        rustix::fs::futimens(&root, &times).at("set times", target)?;
    }
    Ok(root)
}

impl Driver for Native {
    fn describe(&self) -> &'static str {
        "native (copies)"
    }

    fn views_are_copies(&self) -> bool {
        true
    }

    fn max_lowers(&self) -> usize {
        usize::MAX
    }

    fn prepare(&self, lowers: &[Lower], upper: &Upper) -> Result<(), SnapshotError> {
        merged(lowers, &upper.tree(), Material::Copy)?;
        let marker = upper.dir.join(MARKER);
        fs::File::create(&marker).at("create", marker)?;
        Ok(())
    }

    /// A copy, not links: a reader that writes after all must not write to the layers.
    fn view(&self, lowers: &[Lower], scratch: &Path) -> Result<Tree, SnapshotError> {
        let root = match merged(lowers, scratch, Material::Copy) {
            Ok(root) => root,
            Err(error) => {
                tree::remove(scratch)?;
                return Err(error);
            }
        };
        Ok(Tree { root, form: Form::Directory { path: scratch.to_owned(), scratch: true } })
    }

    fn changes(&self, lowers: &[Lower], upper: &Upper, scratch: &Path) -> Result<Vec<Change>, SnapshotError> {
        let tree = upper.tree();
        let root = tree::open_own(&tree)?;
        let below = merged(lowers, scratch, Material::Link)?;
        let changes = plies_archive::changes(root.as_fd(), Some(below.as_fd()), UpperForm::Whole);
        drop(below);
        tree::remove(scratch)?;
        Ok(changes.map_err(|error| FileError::new("list changes in", &tree, io::Error::other(error)))?)
    }

    /// Files get no label and no other owners: that takes a mount.
    fn mount(&self, _: &[Lower], upper: &Upper, options: MountOptions<'_>, _: &Path) -> Result<Tree, SnapshotError> {
        if options.label.is_some() || options.ids.is_some() {
            let source = io::ErrorKind::Unsupported.into();
            let words = "the native driver mounts nothing that could have a label or other owners".into();
            return Err(SnapshotError::Mount { words, source });
        }
        let path = upper.tree();
        Ok(Tree { root: tree::open_own(&path)?, form: Form::Directory { path, scratch: false } })
    }

    /// Compares the copy with the stack, links what differs to `target` as an overlay's upper would
    /// have it, and seals that.
    fn seal(&self, lowers: &[Lower], upper: &Upper, target: &Path, scratch: &Path) -> Result<Sealed, SnapshotError> {
        let marker = upper.dir.join(MARKER);
        let prepared = tree::open_own(&upper.dir)
            .and_then(|dir| tree::stat(&dir, c"prepared").at("stat", &marker))?
            .ok_or_else(|| FileError::new("stat", &marker, io::ErrorKind::NotFound))?;
        // Links are as good as copies here: nobody else sees this tree.
        let below = merged(lowers, scratch, Material::Link)?;
        make_dir(target)?;
        let compare = Compare {
            before: below,
            after: tree::open_own(&upper.tree())?,
            target: tree::open_own(target)?,
            prepared: change_time(&prepared),
            material: Material::Link,
        };
        compare.run().at("compare", upper.tree())?;
        // With nothing below, the empty directory that stands for it says nothing either: that its time may be the same
        // is chance.
        let before = (!lowers.is_empty()).then(|| compare.before.as_fd());
        let sealed = plies_archive::seal_upper(compare.target.as_fd(), before);
        drop(compare);
        tree::remove(scratch)?;
        Ok(sealed?)
    }
}

fn change_time(stat: &Stat) -> (i64, i64) {
    #[allow(clippy::unnecessary_cast)] // the types differ between architectures
    (stat.st_ctime as i64, stat.st_ctime_nsec as i64)
}

/// A directory to compare.
struct Pending {
    path: EntryPath,
    /// It or one above it may have come here by a rename, which the files in it do not show.
    moved: bool,
}

/// Two plain trees, and the upper directory that would make the second of the first.
#[derive(Debug)]
pub(crate) struct Compare {
    pub(crate) before: OwnedFd,
    pub(crate) after: OwnedFd,
    /// Where the upper directory is to be; empty.
    pub(crate) target: OwnedFd,
    /// What was changed last before this has not changed since `before` was made.
    pub(crate) prepared: (i64, i64),
    pub(crate) material: Material,
}

/// Of trees whose history nobody knows: files that look alike are read.
pub(crate) const NOTHING_IS_CERTAIN: (i64, i64) = (i64::MIN, 0);

impl Compare {
    pub(crate) fn run(&self) -> io::Result<()> {
        let mut dirs = Vec::new();
        let mut pending = vec![Pending { path: EntryPath::root(), moved: false }];
        while let Some(dir) = pending.pop() {
            self.directory(&dir, &mut pending)?;
            dirs.push(dir.path);
        }
        // Children were pushed after their parents, so backwards is deepest first.
        for path in dirs.iter().rev() {
            let metadata = Metadata::of(tree::open_dir(&self.after, path)?)?;
            let before = tree::open_dir(&self.before, path).and_then(Metadata::of).ok();
            let target = tree::open_dir(&self.target, path)?;
            match path.split() {
                Some((parent, name)) if before.as_ref() == Some(&metadata) && tree::list(&target)?.is_empty() => {
                    let name = std::ffi::CString::new(name).expect("because names have no NUL");
                    let parent = tree::open_dir(&self.target, &parent)?;
                    rustix::fs::unlinkat(parent, &name, AtFlags::REMOVEDIR)?;
                }
                _ => metadata.apply(target)?,
            }
        }
        Ok(())
    }

    fn directory(&self, Pending { path, moved }: &Pending, pending: &mut Vec<Pending>) -> io::Result<()> {
        let after = tree::open_dir(&self.after, path)?;
        let target = tree::open_dir(&self.target, path)?;
        let before = match tree::open_dir(&self.before, path) {
            Ok(dir) => Some(dir),
            // Not there, or not a directory before.
            Err(error) if matches!(error.raw_os_error(), Some(code) if is_absent(code)) => None,
            Err(error) => return Err(error),
        };
        let mut gone: BTreeSet<_> = match &before {
            Some(dir) => tree::list(dir)?.into_iter().collect(),
            None => BTreeSet::new(),
        };
        for name in tree::list(&after)? {
            gone.remove(&name);
            let Some(stat) = tree::stat(&after, &name)? else { continue };
            if tree::file_type(&stat) == FileType::Directory {
                rustix::fs::mkdirat(&target, &name, Mode::RWXU)?;
                let moved = *moved || change_time(&stat) >= self.prepared;
                pending.push(Pending { path: path.join(name.to_bytes()), moved });
                continue;
            }
            let unchanged = match &before {
                Some(before) => self.is_unchanged(before, &after, &name, &stat, *moved)?,
                None => false,
            };
            if unchanged || (self.material == Material::Link && tree::link(&after, &name, &target, &name)?) {
                continue;
            }
            tree::copy(&after, &name, &stat, &target)?;
        }
        for name in gone {
            rustix::fs::mknodat(&target, &name, FileType::CharacterDevice, Mode::empty(), 0)?;
        }
        Ok(())
    }

    /// A file that looks as before is read unless it is certain that nobody wrote to it.
    fn is_unchanged(
        &self,
        before: &OwnedFd,
        after: &OwnedFd,
        name: &CStr,
        stat: &Stat,
        moved: bool,
    ) -> io::Result<bool> {
        let Some(was) = tree::stat(before, name)? else { return Ok(false) };
        let look = |stat: &Stat| {
            (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_rdev, stat.st_size, stat.st_mtime, stat.st_mtime_nsec)
        };
        if look(&was) != look(stat) {
            return Ok(false);
        }
        if !moved && change_time(stat) < self.prepared {
            return Ok(true);
        }
        // Of a file with several names, one may be new.
        Ok(stat.st_nlink == 1 && same_file((before.as_fd(), name.to_bytes()), (after.as_fd(), name.to_bytes()))?)
    }
}

fn is_absent(code: i32) -> bool {
    use rustix::io::Errno;
    [Errno::NOENT, Errno::NOTDIR, Errno::LOOP].iter().any(|errno| errno.raw_os_error() == code)
}
