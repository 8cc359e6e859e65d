//! Layers out of directories that another program keeps: its snapshots, by hard link or copy, made canonical on the way.
//!
//! What a link leads to is still the other program's file as much as ours, so nothing is ever changed about one:
//! directories are made anew, and what carries marks of overlayfs, which have to go, is copied.

use std::collections::{HashMap, HashSet};
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use plies_archive::tar::{Entry, EntryPath};
use plies_archive::whiteout::{self, Mark, Meaning};
use plies_archive::xattr;
use plies_archive::{DirIndex, Implied, SealError, Sealed, Usage};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Stat, StatxFlags, XattrFlags, openat2};
use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::driver::{Compare, NOTHING_IS_CERTAIN};
use crate::error::At as _;
use crate::layers::Stage;
use crate::open::make_dir;
use crate::snapshots::{SnapshotError, Snapshots};
use crate::stack::{Merged, c_name};
use crate::transfer::threads;
use crate::tree::{self, Material, Metadata};
use crate::{Cancel, FinishedStage, Indexes, LayerContents, LayerId};

/// How files come over.
#[derive(Debug, Clone, Copy)]
pub enum Taking<'a> {
    /// By hard link where the file system allows it, else by reflink or copy, and counted. Only for what nobody will write to
    /// any more.
    Link(&'a NotLinked),
    /// By reflink or copy.
    Copy,
}

/// Files that were to be linked and were copied: a mount lies between, they may not be linked, or have all the names that they
/// can have.
#[derive(Debug, Default)]
pub struct NotLinked(AtomicU64);

impl NotLinked {
    /// How many there were up to now.
    pub fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
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

/// One name of a foreign tree.
#[derive(Debug, Clone, Copy)]
pub struct ForeignName<'a> {
    /// Where it is in the tree.
    pub path: &'a EntryPath,
    /// What it is.
    pub stat: &'a Stat,
    /// The directory that it is in.
    pub dir: BorrowedFd<'a>,
    /// Its last component.
    pub name: &'a [u8],
    /// The names of its extended attributes, each with a NUL behind it.
    pub xattrs: &'a [u8],
}

impl ForeignName<'_> {
    /// Where it leads, if it is a symbolic link.
    ///
    /// # Errors
    /// The kernel's.
    pub fn link_target(&self) -> io::Result<Vec<u8>> {
        Ok(rustix::fs::readlinkat(self.dir, self.name, Vec::new())?.into_bytes())
    }

    /// The names of the extended attributes of what lies under `name` in `dir`, as [`ForeignName::xattrs`] has them. A link is
    /// not followed.
    ///
    /// # Errors
    /// The kernel's; a file system that knows no attributes has none.
    pub fn list_xattrs(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Vec<u8>> {
        let path = path_of(dir, name);
        list_of(|list| rustix::fs::llistxattr(&path, list))
    }

    /// The value of one of its extended attributes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn xattr(&self, name: &[u8]) -> io::Result<Vec<u8>> {
        let path = path_of(self.dir, self.name);
        Ok(tree::grow(|value| rustix::fs::lgetxattr(&path, name, value))?)
    }
}

/// What a tree is to be that a tar was unpacked to.
#[derive(Clone, Copy)]
pub struct Unpacked<'a> {
    /// How its root is to look; `None`: as in the source.
    pub root: Option<&'a Entry>,
    /// Whether a name other than the root is what it should be. Asked on several threads, and in no order.
    pub agrees: &'a (dyn Fn(&ForeignName<'_>) -> io::Result<bool> + Sync),
}

impl std::fmt::Debug for Unpacked<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacked").field("root", &self.root).finish_non_exhaustive()
    }
}

/// What begins so is no content but a mark: of overlayfs, of its mounts with `userxattr` (kernel, `overlayfs.rst`), and of
/// fuse-overlayfs (its `main.c` and `utils.h`). Marks of an overlay inside this one (`trusted.overlay.overlay.…`) begin so, too; here
/// they mean nothing, and no layer keeps them.
const MARKS: [&str; 4] = ["trusted.overlay.", "user.overlay.", "user.fuseoverlayfs.", "security.fuseoverlayfs."];
/// Owner and mode that a file is to have, where fuse-overlayfs or containers/storage could not give it them.
const OVERRIDE_STAT: &str = "user.containers.override_stat";
/// What is said of a file whose content, owner or mode is not in this layer.
const NEEDS_MORE: [&str; 7] = [
    "trusted.overlay.redirect",
    "trusted.overlay.metacopy",
    "user.overlay.redirect",
    "user.overlay.metacopy",
    "user.fuseoverlayfs.override_stat",
    "security.fuseoverlayfs.override_stat",
    OVERRIDE_STAT,
];
const OPAQUE: &CStr = c"trusted.overlay.opaque";
/// Any of them makes a directory opaque.
const OPAQUES: [&[u8]; 3] = [OPAQUE.to_bytes(), b"user.overlay.opaque", b"user.fuseoverlayfs.opaque"];
/// What makes an empty file a whiteout (Linux 6.7). That its directory be marked with an opaque `x` spares the kernel work
/// where it lists a directory; it opens no such file anywhere.
const WHITEOUTS: [&[u8]; 2] = [b"trusted.overlay.whiteout", b"user.overlay.whiteout"];

/// Directories that wait to be taken before other threads are started to help with them.
const SHARED_FROM: usize = 16;
/// Threads that work on one tree: beyond that they wait for the journal.
const THREADS_MAX: usize = 8;

impl Snapshots<'_> {
    /// A stage with what `tree` changes of the layers `below`, bottom first, not published yet; the source is only read. The caller
    /// holds those layers: what says nothing new over them goes, and what hides nothing. What is read of them is kept in `indexes`,
    /// for the next one.
    /// `judge` sees the stage with the canonical layer, may keep a tar-split with it, and says what else is known of it; or that
    /// there shall be none.
    ///
    /// # Errors
    /// [`SnapshotError::Seal`] for an upper whose files lie elsewhere in part; [`SnapshotError::File`].
    pub fn stage_foreign(
        &self,
        (below, indexes): (&[LayerId], &Indexes),
        tree: &ForeignTree,
        taking: Taking<'_>,
        cancel: &Cancel,
        judge: impl FnOnce(&mut Stage, LayerContents) -> Option<LayerContents>,
    ) -> Result<Option<FinishedStage>, SnapshotError> {
        let mut stage = Stage::new(self.store())?;
        let path = stage.tree();
        let mut merged = self.merged(below, indexes)?;
        let mut decided = None;
        match tree {
            ForeignTree::Upper(upper) => {
                let near = linkable(upper, stage.root(), taking);
                let (from, to) = near.as_ref().map_or((upper, stage.root()), |(from, to)| (from, to.as_fd()));
                let filled = Copying::new(from, to, taking, cancel).run()?;
                decided = decide(filled, merged.as_mut(), stage.root())?;
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
                let compare = Compare { before, after, target, prepared: NOTHING_IS_CERTAIN, material: taking.into() };
                compare.run().at("compare", &path)?;
            }
        }
        let sealed = match (decided, merged) {
            (Some(sealed), _) => sealed,
            (None, Some(mut merged)) => {
                merged.restart();
                plies_archive::seal_over(stage.root(), merged)?
            }
            (None, None) => plies_archive::seal_upper(stage.root(), None)?,
        };
        let contents = LayerContents { usage: sealed.usage, index: sealed.index, ..LayerContents::default() };
        let judged = judge(&mut stage, contents);
        Ok(judged.map(|contents| stage.finish(contents)))
    }

    /// Fills an empty stage with what a tar was unpacked to: an upper directory whose meaning does not depend on what lies below.
    /// What it costs then; `None` if it is not what it should be. The source is only read.
    ///
    /// # Errors
    /// [`SnapshotError::Seal`] for a tree with opaque directories or whose files lie elsewhere in part; [`SnapshotError::File`].
    pub fn fill_unpacked(
        &self,
        stage: &Stage,
        tree: &OwnedFd,
        taking: Taking<'_>,
        unpacked: Unpacked<'_>,
        cancel: &Cancel,
    ) -> Result<Option<Usage>, SnapshotError> {
        let near = linkable(tree, stage.root(), taking);
        let (from, to) = near.as_ref().map_or((tree, stage.root()), |(from, to)| (from, to.as_fd()));
        let copying = Copying::new(from, to, taking, cancel);
        let filled = Copying { unpacked: Some(unpacked), ..copying }.run()?;
        Ok(match filled.refused {
            true => None,
            false => Some(filled.usage),
        })
    }

    /// Fills an empty directory with a copy of a plain tree, which may still be written to.
    ///
    /// # Errors
    /// [`SnapshotError::File`].
    pub fn copy_foreign(&self, from: &OwnedFd, to: BorrowedFd<'_>, cancel: &Cancel) -> Result<(), SnapshotError> {
        let copying = Copying::new(from, to, Taking::Copy, cancel);
        Copying { plain: true, ..copying }.run().map(drop)
    }

    /// Does to a mounted tree what an overlay has written to its upper directory `from`: copies what is there, removes what
    /// is hidden.
    ///
    /// # Errors
    /// [`SnapshotError::Seal`] for an upper whose files lie elsewhere in part; [`SnapshotError::File`].
    pub fn copy_changes(&self, from: &OwnedFd, to: BorrowedFd<'_>, cancel: &Cancel) -> Result<(), SnapshotError> {
        let copying = Copying::new(from, to, Taking::Copy, cancel);
        Copying { over: true, ..copying }.run().map(drop)
    }
}

impl From<Taking<'_>> for Material {
    fn from(taking: Taking<'_>) -> Self {
        match taking {
            Taking::Link(_) => Self::Link,
            Taking::Copy => Self::Copy,
        }
    }
}

/// A tree and a stage, opened once more so that links lead from one to the other, if they are directories of one file system that
/// were reached through different mounts: no link leads out of a mount, not even of one that shows a directory at its own place,
/// as podman leaves its storage. Both are reached through a private copy of the mount that lies below.
fn linkable(from: &OwnedFd, to: BorrowedFd<'_>, taking: Taking<'_>) -> Option<(OwnedFd, OwnedFd)> {
    let place = |dir: BorrowedFd<'_>| {
        let fields = StatxFlags::INO | StatxFlags::MNT_ID;
        let stat = rustix::fs::statx(dir, c"", AtFlags::EMPTY_PATH, fields).ok()?;
        Some((stat.stx_mnt_id, (stat.stx_dev_major, stat.stx_dev_minor, stat.stx_ino)))
    };
    let ((from_mount, from_place), (to_mount, to_place)) = (place(from.as_fd())?, place(to)?);
    let is_one_device = (from_place.0, from_place.1) == (to_place.0, to_place.1);
    if matches!(taking, Taking::Copy) || from_mount == to_mount || !is_one_device {
        return None;
    }
    let path = |dir: BorrowedFd<'_>| std::fs::read_link(format!("/proc/self/fd/{}", dir.as_raw_fd())).ok();
    let (from_path, to_path) = (path(from.as_fd())?, path(to)?);
    let shared = from_path.components().zip(to_path.components()).take_while(|(from, to)| from == to);
    let common: PathBuf = shared.map(|(component, _)| component).collect();
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let clone = open_tree(CWD, &common, flags).ok()?;
    let open = |path: &Path, expected| {
        let below = path.strip_prefix(&common).ok().filter(|below| !below.as_os_str().is_empty());
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let dir = openat2(&clone, below.unwrap_or(Path::new(".")), flags, Mode::empty(), resolve).ok()?;
        // Something else may lie where another file system is mounted.
        (place(dir.as_fd())?.1 == expected).then_some(dir)
    };
    Some((open(&from_path, from_place)?, open(&to_path, to_place)?))
}

/// What sealing a copied upper over `below` would find, if that changes nothing about it: all of its files are links, none of
/// which is taken for one that only was copied up, nothing is hidden, and each directory says something.
fn decide(
    filled: Filled,
    below: Option<&mut Merged<'_>>,
    root: BorrowedFd<'_>,
) -> Result<Option<Sealed>, SnapshotError> {
    if filled.undecided {
        return Ok(None);
    }
    let mut index = DirIndex::default();
    if let Some(below) = below {
        let mut needed: HashSet<EntryPath> = HashSet::new();
        let mut dirs = filled.dirs;
        dirs.sort_unstable();
        // What is below comes before it.
        for (path, has_files) in dirs.iter().rev() {
            let same = tree::open_dir(root, path).and_then(|dir| below.has_same(path, dir.as_fd()));
            let implied = same.at("compare", path.to_string())?;
            if implied && !has_files && !path.is_root() && !needed.contains(path) {
                return Ok(None);
            }
            needed.extend(path.split().map(|(outer, _)| outer));
            if implied {
                index.insert(path.clone(), Implied::CopiedUp);
            }
        }
    }
    Ok(Some(Sealed { usage: filled.usage, index }))
}

/// One tree on its way.
struct Copying<'a> {
    from: &'a OwnedFd,
    to: BorrowedFd<'a>,
    taking: Taking<'a>,
    /// The target is a tree in use, not an upper directory: what marks say is done to it.
    over: bool,
    /// It is no upper directory, and nothing in it is a mark.
    plain: bool,
    /// It is what a tar was unpacked to.
    unpacked: Option<Unpacked<'a>>,
    cancel: &'a Cancel,
    /// Files that have more names, by inode.
    files: Mutex<Files>,
}

#[derive(Default)]
struct Files {
    /// Those that were copied, and where the first name is now.
    copied: HashMap<u64, EntryPath>,
    /// Those that were counted.
    counted: HashSet<u64>,
}

/// What is done, and what is to be done.
#[derive(Default)]
struct Filling {
    pending: Vec<EntryPath>,
    /// Threads that are busy with a directory, of which more may come.
    busy: usize,
    /// Directories that nobody could pass through if they looked as they shall.
    closed: Vec<(EntryPath, Metadata)>,
    filled: Filled,
    failed: Option<SnapshotError>,
}

/// What became of a tree.
#[derive(Default)]
struct Filled {
    usage: Usage,
    /// Something is not what it should be; the rest was left.
    refused: bool,
    /// Something hides what lies below, or was copied and may be as it was there.
    undecided: bool,
    /// All directories, and whether anything else is in them; not of what was unpacked.
    dirs: Vec<(EntryPath, bool)>,
}

impl<'a> Copying<'a> {
    fn new(from: &'a OwnedFd, to: BorrowedFd<'a>, taking: Taking<'a>, cancel: &'a Cancel) -> Self {
        Self { from, to, taking, over: false, plain: false, unpacked: None, cancel, files: Mutex::default() }
    }

    fn run(&self) -> Result<Filled, SnapshotError> {
        let filling = Mutex::new(Filling { pending: vec![EntryPath::root()], ..Filling::default() });
        let (changed, lock) = (Condvar::new(), || filling.lock().unwrap_or_else(PoisonError::into_inner));
        // Until there is nothing left, or enough for more threads.
        let work = |enough: usize| {
            let mut now = lock();
            while now.failed.is_none() && !now.filled.refused && now.pending.len() < enough {
                let Some(path) = now.pending.pop() else {
                    if now.busy == 0 {
                        break;
                    }
                    now = changed.wait(now).unwrap_or_else(PoisonError::into_inner);
                    continue;
                };
                now.busy += 1;
                drop(now);
                let mut own = Filling::default();
                let done =
                    self.cancel.check().and_then(|()| self.directory(&path, &mut own)).at("copy", path.to_string());
                now = lock();
                now.busy -= 1;
                now.pending.append(&mut own.pending);
                now.closed.append(&mut own.closed);
                now.filled.usage += own.filled.usage;
                now.filled.refused |= own.filled.refused;
                now.filled.undecided |= own.filled.undecided;
                now.filled.dirs.append(&mut own.filled.dirs);
                if let Err(error) = done.map_err(SnapshotError::from).and_then(|done| done) {
                    now.failed.get_or_insert(error);
                }
                changed.notify_all();
            }
        };
        work(SHARED_FROM);
        if !lock().pending.is_empty() {
            std::thread::scope(|scope| {
                (1..threads().get().min(THREADS_MAX)).for_each(|_| drop(scope.spawn(|| work(usize::MAX))));
                work(usize::MAX);
            });
        }
        let Filling { closed, mut filled, failed, .. } = filling.into_inner().unwrap_or_else(PoisonError::into_inner);
        failed.map_or(Ok(()), Err)?;
        // What is below comes before it.
        for (path, metadata) in closed.iter().rev().take_while(|_| !filled.refused) {
            let dir = tree::open_dir(self.to, path);
            let described = dir.and_then(|dir| {
                metadata.apply(&dir)?;
                Ok(rustix::fs::fstat(&dir)?)
            });
            filled.usage.add(&described.at("set metadata of", path.to_string())?);
        }
        Ok(filled)
    }

    /// Fills one directory, which is there, and makes those in it.
    fn directory(&self, path: &EntryPath, own: &mut Filling) -> io::Result<Result<(), SnapshotError>> {
        let (from, to) = (tree::open_dir(self.from, path)?, tree::open_dir(self.to, path)?);
        let marks = self.marks_in(&list_of(|list| rustix::fs::flistxattr(&from, list))?);
        if let Err(error) = self_contained(path, &marks) {
            return Ok(Err(error));
        }
        let names = tree::list(&from)?;
        let opaque_file = Mark::Opaque.file_name();
        let mut opaque = !self.plain && names.iter().any(|name| name.to_bytes() == opaque_file);
        for mark in marks.iter().filter(|mark| OPAQUES.contains(&mark.as_slice())) {
            // Anything longer is another value.
            let mut value = [0; 1];
            opaque |= rustix::fs::fgetxattr(&from, mark.as_slice(), &mut value).is_ok() && value == *b"y";
        }
        if opaque && !path.is_root() {
            match (self.over, &self.unpacked) {
                (true, _) => tree::clear_dir(&to)?,
                // Which names it hides is known over a lower tree only.
                (false, Some(_)) => return Ok(Err(not_self_contained(path, "trusted.overlay.opaque"))),
                (false, None) => rustix::fs::fsetxattr(&to, OPAQUE, b"y", XattrFlags::empty())?,
            }
        }
        own.filled.undecided |= opaque;
        let (mut whiteouts, mut has_files) = (false, false);
        for mut name in names {
            let Some(stat) = tree::stat(&from, &name)? else { continue };
            let child = path.join(name.to_bytes());
            let is_dir = tree::file_type(&stat) == FileType::Directory;
            // A directory's are looked at when it is opened, too.
            let xattrs = match is_dir && self.unpacked.is_none() {
                true => Vec::new(),
                false => ForeignName::list_xattrs(from.as_fd(), name.to_bytes())?,
            };
            if let Some(unpacked) = &self.unpacked {
                let (dir, name) = (from.as_fd(), name.to_bytes());
                let found = ForeignName { path: &child, stat: &stat, dir, name, xattrs: &xattrs };
                if !(unpacked.agrees)(&found)? {
                    own.filled.refused = true;
                    return Ok(Ok(()));
                }
            }
            let says = match self.plain {
                true if tree::is_whiteout(&stat) => Says::Whiteout(name.clone()),
                true => Says::Itself,
                false => match says(&child, &name, &stat, &xattrs) {
                    Ok(says) => says,
                    Err(error) => return Ok(Err(error)),
                },
            };
            let is_whiteout = matches!(says, Says::Whiteout(_));
            match says {
                Says::Opaque => continue,
                // The tar says what is meant.
                Says::Whiteout(_) if self.unpacked.is_some() && !tree::is_whiteout(&stat) => {
                    own.filled.refused = true;
                    return Ok(Ok(()));
                }
                Says::Whiteout(hidden) if hidden != name => {
                    if tree::stat(&from, &hidden)?.is_some() {
                        return Ok(Err(unclear(&child, "is a whiteout of a name that is there")));
                    }
                    name = hidden;
                }
                Says::Whiteout(_) | Says::Itself => {}
            }
            if self.over
                && let Some(below) = tree::stat(&to, &name)?
            {
                if is_dir && tree::file_type(&below) == FileType::Directory {
                    own.pending.push(child);
                    continue;
                }
                tree::remove_at(&to, &name)?;
            }
            has_files |= !is_dir;
            if is_dir {
                rustix::fs::mkdirat(&to, &name, Mode::RWXU)?;
                own.pending.push(child);
            } else if is_whiteout {
                if !self.over {
                    rustix::fs::mknodat(&to, &name, FileType::CharacterDevice, Mode::empty(), 0)?;
                    whiteouts = true;
                    own.filled.undecided = true;
                    own.filled.usage.add(&stat);
                }
            } else if let Err(error) = self.file(&child, &name, (&stat, &xattrs), &from, &to, &mut own.filled)? {
                return Ok(Err(error));
            }
        }
        if whiteouts && self.unpacked.is_some() {
            tree::mark_whiteouts(&to)?;
        }
        if self.unpacked.is_none() {
            own.filled.dirs.push((path.clone(), has_files));
        }
        let mut metadata = Metadata::of(&from)?.without(&marks);
        if let Some(root) = self.unpacked.and_then(|unpacked| unpacked.root).filter(|_| path.is_root()) {
            metadata = metadata.like(root);
        }
        // Now nothing comes or goes in it any more, which would change its time.
        match metadata.lets_owner_through() {
            true => {
                metadata.apply(&to)?;
                own.filled.usage.add(&rustix::fs::fstat(&to)?);
            }
            false => own.closed.push((path.clone(), metadata)),
        }
        Ok(Ok(()))
    }

    /// Brings anything but a directory or a whiteout.
    fn file(
        &self,
        path: &EntryPath,
        name: &CStr,
        (stat, xattrs): (&Stat, &[u8]),
        from: &OwnedFd,
        to: &OwnedFd,
        filled: &mut Filled,
    ) -> io::Result<Result<(), SnapshotError>> {
        let marks = self.marks_in(xattrs);
        if let Err(error) = self_contained(path, &marks) {
            return Ok(Err(error));
        }
        let files = || self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Taking::Link(not_linked) = self.taking
            && marks.is_empty()
        {
            if tree::link(from, name, to, name)? {
                if stat.st_nlink == 1 || files().counted.insert(stat.st_ino) {
                    filled.usage.add(stat);
                }
                return Ok(Ok(()));
            }
            not_linked.0.fetch_add(1, Ordering::Relaxed);
        }
        filled.undecided = true;
        // Others wait, who may have another name of it.
        let mut copied = (stat.st_nlink > 1).then(files);
        if let Some(first) = copied.as_ref().and_then(|files| files.copied.get(&stat.st_ino)) {
            let (dir, first) = first.split().expect("because a file is not the root");
            let dir = tree::open_dir(self.to, &dir)?;
            rustix::fs::linkat(dir, first, to, name, AtFlags::empty())?;
            return Ok(Ok(()));
        }
        tree::copy(from, name, stat, to)?;
        // Those of root's overlays did not come along.
        for mark in marks.iter().filter(|mark| !mark.starts_with(b"trusted.")) {
            rustix::fs::lremovexattr(path_of(to.as_fd(), name.to_bytes()), mark.as_slice())?;
        }
        if let Some(files) = &mut copied {
            files.copied.insert(stat.st_ino, path.clone());
        }
        filled.usage.add(&rustix::fs::statat(to, name, AtFlags::SYMLINK_NOFOLLOW)?);
        Ok(Ok(()))
    }

    /// The marks among the names of attributes.
    fn marks_in(&self, names: &[u8]) -> Vec<Vec<u8>> {
        let is_mark = |name: &&[u8]| {
            *name == OVERRIDE_STAT.as_bytes() || MARKS.iter().any(|prefix| name.starts_with(prefix.as_bytes()))
        };
        xattr::names(names).filter(|name| !self.plain && is_mark(name)).map(<[u8]>::to_vec).collect()
    }
}

/// What a name of an upper directory means.
#[derive(Debug, PartialEq, Eq)]
enum Says {
    Itself,
    /// That there is nothing of this name.
    Whiteout(CString),
    /// That its directory is opaque.
    Opaque,
}

/// What a name of an upper directory means, whoever wrote that. fuse-overlayfs writes files that are named as the marks of an archive
/// where it can make no devices, as does containers/storage for it. To the kernel these are files like others, but no archive can
/// hold such a name otherwise.
fn says(path: &EntryPath, name: &CStr, stat: &Stat, xattrs: &[u8]) -> Result<Says, SnapshotError> {
    let is_empty = tree::file_type(stat) == FileType::RegularFile && stat.st_size == 0;
    Ok(match whiteout::meaning(path) {
        Ok(Meaning::Plain) => {
            let by_attribute = is_empty && xattr::names(xattrs).any(|name| WHITEOUTS.contains(&name));
            if by_attribute || tree::is_whiteout(stat) { Says::Whiteout(name.to_owned()) } else { Says::Itself }
        }
        Ok(Meaning::Mark(Mark::Whiteout(hidden))) if is_empty => Says::Whiteout(c_name(hidden)),
        Ok(Meaning::Mark(Mark::Opaque)) if is_empty => Says::Opaque,
        _ => return Err(unclear(path, "is named like a whiteout, and is none")),
    })
}

fn path_of(dir: BorrowedFd<'_>, name: &[u8]) -> Vec<u8> {
    let mut path = format!("/proc/self/fd/{}/", dir.as_raw_fd()).into_bytes();
    path.extend_from_slice(name);
    path
}

fn list_of(list: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> io::Result<Vec<u8>> {
    match tree::grow(list) {
        Err(Errno::OPNOTSUPP) => Ok(Vec::new()),
        names => Ok(names?),
    }
}

fn self_contained(path: &EntryPath, marks: &[Vec<u8>]) -> Result<(), SnapshotError> {
    match NEEDS_MORE.into_iter().find(|mark| marks.iter().any(|found| found == mark.as_bytes())) {
        Some(mark) => Err(not_self_contained(path, mark)),
        None => Ok(()),
    }
}

fn not_self_contained(path: &EntryPath, mark: &'static str) -> SnapshotError {
    SealError::NotSelfContained { path: path.clone(), mark }.into()
}

fn unclear(path: &EntryPath, why: &'static str) -> SnapshotError {
    SealError::Unclear { path: path.clone(), why }.into()
}
