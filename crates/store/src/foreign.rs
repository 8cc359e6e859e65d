//! Layers out of directories that another program keeps: its snapshots, by hard link or copy, made canonical on the way.
//!
//! What a link leads to is still the other program's file as much as ours, so nothing is ever changed about one:
//! directories are made anew, and what carries marks of overlayfs, which have to go, is copied.

use std::collections::HashMap;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};

use plies_archive::tar::EntryPath;
use rustix::fs::{AtFlags, FileType, Mode, XattrFlags};
use rustix::io::Errno;

use crate::driver::{Compare, NOTHING_IS_CERTAIN};
use crate::error::At as _;
use crate::layers::Stage;
use crate::open::make_dir;
use crate::snapshots::{SnapshotError, Snapshots};
use crate::tree::{self, Material, Metadata};
use crate::{Cancel, FinishedStage, LayerContents, LayerId, Lease};

/// How files come over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taking {
    /// By hard link where the file system allows it, else by reflink or copy. Only for what nobody will write to any more.
    Link,
    /// By reflink or copy.
    Copy,
}

/// A directory of another program.
#[derive(Debug)]
pub enum ForeignTree {
    /// What an overlay has written: its upper directory, with the kernel's marks.
    Upper(OwnedFd),
    /// A whole tree, and the one that it began as.
    Whole {
        /// As it began; `None` for nothing.
        before: Option<OwnedFd>,
        /// As it is.
        after: OwnedFd,
    },
}

/// What a foreign tree is a difference to.
#[derive(Debug, Clone, Copy)]
pub enum Over<'a> {
    /// These layers, bottom first, held by this lease or otherwise: what says nothing new over them goes, and what hides
    /// nothing.
    Layers(&'a [LayerId], &'a Lease),
    /// Whatever lies below: it is what a tar unpacked to.
    Anything,
}

/// What overlayfs says of a file whose content is not in this layer.
const NEEDS_LOWER: [(&[u8], &str); 4] = [
    (b"trusted.overlay.redirect", "trusted.overlay.redirect"),
    (b"trusted.overlay.metacopy", "trusted.overlay.metacopy"),
    (b"user.overlay.redirect", "user.overlay.redirect"),
    (b"user.overlay.metacopy", "user.overlay.metacopy"),
];
const OPAQUE: &CStr = c"trusted.overlay.opaque";
/// As [`OPAQUE`], where somebody else than root mounted.
const USER_OPAQUE: &[u8] = b"user.overlay.opaque";

impl Snapshots<'_> {
    /// A stage with what `tree` changes of what it lies over, not published yet; the source is only read. The caller holds
    /// the layers below.
    /// `judge` sees the stage with the canonical layer, may keep a tar-split with it, and says what else is known of it; or that
    /// there shall be none.
    ///
    /// # Errors
    /// [`SnapshotError::Seal`] for an upper whose files lie elsewhere in part, and over anything for one with opaque directories;
    /// [`SnapshotError::File`].
    pub fn stage_foreign(
        &self,
        over: Over<'_>,
        tree: &ForeignTree,
        taking: Taking,
        cancel: &Cancel,
        judge: impl FnOnce(&mut Stage, LayerContents) -> Option<LayerContents>,
    ) -> Result<Option<FinishedStage>, SnapshotError> {
        let mut stage = Stage::new(self.store())?;
        let (path, material) = (stage.tree(), Material::from(taking));
        match tree {
            ForeignTree::Upper(upper) => {
                let mut copy = Copying { material, over: false, cancel, linked: HashMap::new() };
                copy.run(upper, stage.root())?;
            }
            ForeignTree::Whole { before, after } => {
                let empty = || {
                    let path = self.store().run_dir().join("empty-source");
                    make_dir(&path)?;
                    tree::open_own(&path)
                };
                let before = match before {
                    Some(before) => before.try_clone().at("open", &path)?,
                    None => empty()?,
                };
                let target = stage.root().try_clone_to_owned().at("open", &path)?;
                let after = after.try_clone().at("open", &path)?;
                let compare = Compare { before, after, target, prepared: NOTHING_IS_CERTAIN, material };
                compare.run().at("compare", &path)?;
            }
        }
        let sealed = match over {
            Over::Layers(below, lease) => self.seal_over(below, lease, stage.root())?,
            Over::Anything => plies_archive::seal_alone(stage.root())?,
        };
        let contents = LayerContents { usage: sealed.usage, index: sealed.index, ..LayerContents::default() };
        let judged = judge(&mut stage, contents);
        Ok(judged.map(|contents| stage.finish(contents)))
    }

    /// Fills an empty directory with a copy of a plain tree, which may still be written to.
    ///
    /// # Errors
    /// [`SnapshotError::File`].
    pub fn copy_foreign(&self, from: &OwnedFd, to: BorrowedFd<'_>, cancel: &Cancel) -> Result<(), SnapshotError> {
        Copying { material: Material::Copy, over: false, cancel, linked: HashMap::new() }.run(from, to)
    }

    /// Does to a mounted tree what an overlay has written to its upper directory `from`: copies what is there, removes what
    /// is hidden.
    ///
    /// # Errors
    /// [`SnapshotError::Seal`] for an upper whose files lie elsewhere in part; [`SnapshotError::File`].
    pub fn copy_changes(&self, from: &OwnedFd, to: BorrowedFd<'_>, cancel: &Cancel) -> Result<(), SnapshotError> {
        Copying { material: Material::Copy, over: true, cancel, linked: HashMap::new() }.run(from, to)
    }
}

impl From<Taking> for Material {
    fn from(taking: Taking) -> Self {
        match taking {
            Taking::Link => Self::Link,
            Taking::Copy => Self::Copy,
        }
    }
}

/// One tree on its way.
struct Copying<'a> {
    material: Material,
    /// The target is a tree in use, not an upper directory: what marks say is done to it.
    over: bool,
    cancel: &'a Cancel,
    /// Copies of files that have more names: inode to where the first one is now.
    linked: HashMap<u64, EntryPath>,
}

impl Copying<'_> {
    fn run(&mut self, from: &OwnedFd, to: BorrowedFd<'_>) -> Result<(), SnapshotError> {
        let mut dirs = Vec::new();
        let mut pending = vec![EntryPath::root()];
        while let Some(path) = pending.pop() {
            self.cancel.check().at("copy", path.to_string())?;
            let metadata = self.directory(&path, from, to, &mut pending).at("copy", path.to_string())??;
            dirs.push((path, metadata));
        }
        // Filling a directory changes its time; what is below comes before it.
        for (path, metadata) in dirs.iter().rev() {
            tree::open_dir(to, path).and_then(|dir| metadata.apply(dir)).at("set metadata of", path.to_string())?;
        }
        Ok(())
    }

    fn directory(
        &mut self,
        path: &EntryPath,
        from_root: &OwnedFd,
        to_root: BorrowedFd<'_>,
        pending: &mut Vec<EntryPath>,
    ) -> io::Result<Result<Metadata, SnapshotError>> {
        let (from, to) = (tree::open_dir(from_root, path)?, tree::open_dir(to_root, path)?);
        let marks = marks_of(|list| rustix::fs::flistxattr(&from, list))?;
        if let Err(error) = self_contained(path, &marks) {
            return Ok(Err(error));
        }
        let mut value = [0; 1];
        let user_opaque = marks.iter().any(|mark| mark == USER_OPAQUE)
            && rustix::fs::fgetxattr(&from, USER_OPAQUE, &mut value).is_ok()
            && value == *b"y";
        if (tree::is_opaque(&from)? || user_opaque) && !path.is_root() {
            match self.over {
                true => tree::clear_dir(&to)?,
                false => rustix::fs::fsetxattr(&to, OPAQUE, b"y", XattrFlags::empty())?,
            }
        }
        for name in tree::list(&from)? {
            let Some(stat) = tree::stat(&from, &name)? else { continue };
            let is_dir = tree::file_type(&stat) == FileType::Directory;
            if self.over
                && let Some(below) = tree::stat(&to, &name)?
            {
                if is_dir && tree::file_type(&below) == FileType::Directory {
                    pending.push(path.join(name.to_bytes()));
                    continue;
                }
                tree::remove_at(&to, &name)?;
            }
            if is_dir {
                rustix::fs::mkdirat(&to, &name, Mode::RWXU)?;
                pending.push(path.join(name.to_bytes()));
                continue;
            }
            if tree::is_whiteout(&stat) {
                if self.over {
                    continue;
                }
                rustix::fs::mknodat(&to, &name, FileType::CharacterDevice, Mode::empty(), 0)?;
                continue;
            }
            let marks = marks_of(|list| {
                let mut path = format!("/proc/self/fd/{}/", from.as_raw_fd()).into_bytes();
                path.extend_from_slice(name.to_bytes());
                rustix::fs::llistxattr(path, list)
            })?;
            let child = path.join(name.to_bytes());
            if let Err(error) = self_contained(&child, &marks) {
                return Ok(Err(error));
            }
            if self.material == Material::Link && marks.is_empty() && tree::link(&from, &name, &to, &name)? {
                continue;
            }
            if stat.st_nlink > 1 {
                if let Some(first) = self.linked.get(&stat.st_ino) {
                    let (dir, first) = first.split().expect("because a file is not the root");
                    let dir = tree::open_dir(to_root, &dir)?;
                    rustix::fs::linkat(dir, first, &to, &name, AtFlags::empty())?;
                    continue;
                }
                self.linked.insert(stat.st_ino, child);
            }
            // Marks come along here and there, and go when the copy is sealed.
            tree::copy(&from, &name, &stat, &to)?;
        }
        Metadata::of(&from).map(Ok)
    }
}

/// Overlay's own attributes of a file.
fn marks_of(list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> io::Result<Vec<Vec<u8>>> {
    let names = match tree::grow(list) {
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        names => names?,
    };
    let is_mark = |name: &&[u8]| name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
    Ok(names.split(|byte| *byte == 0).filter(is_mark).map(<[u8]>::to_vec).collect())
}

fn self_contained(path: &EntryPath, marks: &[Vec<u8>]) -> Result<(), SnapshotError> {
    match NEEDS_LOWER.iter().find(|(mark, _)| marks.iter().any(|found| found == mark)) {
        Some((_, mark)) => Err(plies_archive::SealError::NotSelfContained { path: path.clone(), mark }.into()),
        None => Ok(()),
    }
}
