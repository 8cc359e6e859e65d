//! Overlay mounts through the new mount API.
//!
//! The kernel takes the layers in one of three ways, best first: by descriptor (Linux 6.15), one
//! by one as short paths (6.5), or all in one option string that must fit a page. One probe finds
//! out which.

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, OnceLock};

use plies_archive::{Change, Sealed, UpperForm};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, fsconfig_create, fsconfig_set_fd, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

use super::{Driver, Form, Lower, Tree, Upper};
use crate::error::{At as _, FileError};
use crate::idmap::MappedDirs;
use crate::open::make_dir;
use crate::packed;
use crate::snapshots::{MountOptions, SnapshotError};
use crate::tree::{self, Metadata};

/// Lower layers that overlayfs takes in one mount (`OVL_MAX_STACK`, fs/overlayfs/params.h).
const MAX_LOWERS: usize = 500;

/// What statfs(2) says of a file system that is an overlay (`OVERLAYFS_SUPER_MAGIC`, include/uapi/linux/magic.h).
const OVERLAYFS_MAGIC: rustix::fs::FsWord = 0x794c_7630;

/// Lower layers in an option string: one page of 4,096 bytes less what the other options take, at
/// "/proc/self/fd/1234:" each.
const MAX_LOWERS_IN_STRING: usize = 200;

/// What overlayfs may not do, since a layer would then depend on something outside of it: rename
/// directories by reference, copy up metadata alone, index by inode. An upper that has such marks
/// cannot be sealed; one that a stranger put into a layer is not followed.
const OPTIONS: [(&str, &str); 3] = [("redirect_dir", "nofollow"), ("metacopy", "off"), ("index", "off")];

/// What an overlay over packed layers gets besides. Each of them is a file system of its own, with the same small inode
/// numbers as the others; with this the overlay makes them different, and all files are of one device (`xino`,
/// Documentation/filesystems/overlayfs.rst). Without, `tar --one-file-system` would leave most of them out.
const ONE_DEVICE: (&str, &str) = ("xino", "on");

/// The mount option that gives all files of a mount one security label (mount(8), `context=`).
const LABEL: &str = "context";

/// How the kernel is told the layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverlayMethod {
    /// `lowerdir+` with a descriptor each: Linux 6.15.
    Descriptors,
    /// `lowerdir+` with a path each: Linux 6.5.
    Paths,
    /// `mount(2)` with one option string.
    OptionString,
}

#[derive(Debug)]
pub(crate) struct Overlay {
    /// A scratch directory of the store, for the empty directories below.
    run: PathBuf,
    method: OnceLock<OverlayMethod>,
    packs: Packs,
}

/// Whether layers that come as tars are kept so.
pub(crate) enum Packs {
    No,
    Yes,
    /// If this says that it works.
    If(LazyLock<bool, Box<dyn FnOnce() -> bool + Send>>),
}

impl fmt::Debug for Packs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::No => "No",
            Self::Yes => "Yes",
            Self::If(_) => "If",
        })
    }
}

/// A directory to be shown below others.
#[derive(Debug)]
enum LowerDir {
    Plain(PathBuf),
    /// The directory of a packed layer, which is to be mounted first.
    Packed(PathBuf),
}

impl LowerDir {
    fn of(lower: &Lower) -> Result<Self, FileError> {
        Ok(match packed::is_packed(&lower.dir)? {
            true => Self::Packed(lower.dir.clone()),
            false => Self::Plain(lower.dir.join("fs")),
        })
    }
}

impl Overlay {
    pub(crate) fn new(run: PathBuf, method: Option<OverlayMethod>, packs: Packs) -> Self {
        let overlay = Self { run, method: OnceLock::new(), packs };
        if let Some(method) = method {
            overlay.method.set(method).expect("because it was just made");
        }
        overlay
    }

    /// Whether this process may make overlay mounts.
    pub(crate) fn check() -> io::Result<()> {
        Ok(fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map(drop)?)
    }

    /// As [`Overlay::check`], and whether `dir`, or what is above it as long as it is not there, can hold layers that are
    /// directories, and uppers. Asked of the file system, since a trial would leave a trace at each opening.
    pub(crate) fn check_in(dir: &Path) -> io::Result<()> {
        Self::check()?;
        let dir = dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(dir);
        if rustix::fs::statfs(dir)?.f_type == OVERLAYFS_MAGIC {
            let why = "the store lies on an overlayfs, which takes neither whiteouts nor upper directories of another";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        Ok(())
    }

    fn method(&self) -> OverlayMethod {
        *self.method.get_or_init(|| probe(&self.run).unwrap_or(OverlayMethod::OptionString))
    }

    /// An overlay of lowers alone needs two of them; an empty directory hides nothing.
    fn empty(&self, number: usize) -> Result<PathBuf, FileError> {
        let path = self.run.join(format!("empty-{number}"));
        make_dir(&path)?;
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).at("change mode", &path)?;
        Ok(path)
    }

    fn make(
        &self,
        lowers: &[Lower],
        upper: Option<&Upper>,
        options: MountOptions<'_>,
        scratch: &Path,
    ) -> Result<Tree, SnapshotError> {
        // The uppermost first, as overlayfs counts.
        let mut trees = lowers.iter().rev().map(LowerDir::of).collect::<Result<Vec<_>, _>>()?;
        let needed = if upper.is_some() { 1 } else { 2 };
        for number in trees.len()..needed {
            trees.push(LowerDir::Plain(self.empty(number)?));
        }
        match (self.method(), options.ids) {
            (OverlayMethod::OptionString, None) => by_option_string(&trees, upper, options.label, scratch),
            (OverlayMethod::OptionString, Some(_)) => {
                let words = "other owners take layers that are passed one by one (Linux 6.5)".into();
                Err(SnapshotError::Mount { words, source: io::ErrorKind::Unsupported.into() })
            }
            (method, None) => by_fsconfig(method, &trees, upper, options.label, None),
            (method, Some(ids)) => {
                let layers = lowers.first().and_then(|lower| lower.dir.parent());
                let dirs = layers.into_iter().chain(upper.map(|upper| upper.dir.as_path()));
                let words = || "map the owners of files".to_owned();
                let dirs =
                    MappedDirs::new(ids, dirs).map_err(|source| SnapshotError::Mount { words: words(), source })?;
                // A thread of its own: who it acts as ends with it.
                let mount = || {
                    ids.become_root().map_err(|source| SnapshotError::Mount { words: words(), source })?;
                    by_fsconfig(method, &trees, upper, options.label, Some(&dirs))
                };
                std::thread::scope(|scope| scope.spawn(mount).join()).expect("because it does not panic")
            }
        }
    }
}

/// Asks without mounting anything: a parameter of the wrong kind is refused when it is set.
fn probe(dir: &Path) -> io::Result<OverlayMethod> {
    let dir = open_tree_root(dir)?;
    let context = || fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC);
    if fsconfig_set_fd(context()?.as_fd(), "lowerdir+", dir.as_fd()).is_ok() {
        return Ok(OverlayMethod::Descriptors);
    }
    Ok(match fsconfig_set_string(context()?.as_fd(), "lowerdir+", proc_path(dir.as_fd())) {
        Ok(()) => OverlayMethod::Paths,
        Err(_) => OverlayMethod::OptionString,
    })
}

fn open_tree_root(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// A path for a descriptor: short whatever the store's root is called, and free of the colons and
/// commas that an option string would need escaped.
fn proc_path(fd: BorrowedFd<'_>) -> String {
    format!("/proc/self/fd/{}", fd.as_raw_fd())
}

fn by_fsconfig(
    method: OverlayMethod,
    trees: &[LowerDir],
    upper: Option<&Upper>,
    label: Option<&str>,
    mapped: Option<&MappedDirs>,
) -> Result<Tree, SnapshotError> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|error| refused(None, error))?;
    let context = context.as_fd();
    let set_fd = |key: &str, dir: BorrowedFd<'_>| {
        let set = match method {
            OverlayMethod::Descriptors => fsconfig_set_fd(context, key, dir),
            _ => fsconfig_set_string(context, key, proc_path(dir)),
        };
        set.map_err(|error| refused(Some(context), error))
    };
    let set_dir = |key: &str, path: &Path| -> Result<(), SnapshotError> {
        let dir = mapped.and_then(|dirs| dirs.open(path)).unwrap_or_else(|| open_tree_root(path)).at("open", path)?;
        set_fd(key, dir.as_fd())
    };
    let set = |key: &str, value: &str| {
        fsconfig_set_string(context, key, value).map_err(|error| refused(Some(context), error))
    };
    set("source", "plies")?;
    options_over(trees).try_for_each(|(key, value)| set(key, value))?;
    label.map_or(Ok(()), |label| set(LABEL, label))?;
    // Without their descriptors they would be unmounted before the overlay has taken them over.
    let mut mounts = Vec::new();
    for tree in trees {
        match tree {
            LowerDir::Plain(path) => set_dir("lowerdir+", path)?,
            LowerDir::Packed(dir) => {
                let mount = packed::mount(dir)?;
                if let Some(mapped) = mapped {
                    mapped.map(mount.as_fd()).at("map the owners of files in", dir)?;
                }
                set_fd("lowerdir+", mount.as_fd())?;
                mounts.push(mount);
            }
        }
    }
    if let Some(upper) = upper {
        set_dir("upperdir", &upper.tree())?;
        set_dir("workdir", &upper.work())?;
        if upper.volatile {
            // What may be lost: everything in the upper. It ends with this process anyway, and
            // sealing syncs.
            fsconfig_set_flag(context, "volatile").map_err(|error| refused(Some(context), error))?;
        }
    }
    fsconfig_create(context).map_err(|error| refused(Some(context), error))?;
    let attributes = if upper.is_some() { MountAttrFlags::empty() } else { MountAttrFlags::MOUNT_ATTR_RDONLY };
    let mount =
        fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(|error| refused(Some(context), error))?;
    let root = tree::open_dir(&mount, &plies_archive::tar::EntryPath::root()).at("open", "the mount's root")?;
    Ok(Tree { root, form: Form::Detached(mount) })
}

fn options_over(trees: &[LowerDir]) -> impl Iterator<Item = (&'static str, &'static str)> + use<> {
    let has_packed = trees.iter().any(|tree| matches!(tree, LowerDir::Packed(_)));
    OPTIONS.into_iter().chain(has_packed.then_some(ONE_DEVICE))
}

/// The kernel says why in words that can be read from the context, one message at a time, each
/// with a letter and a space in front (fs/fs_context.c).
fn refused(context: Option<BorrowedFd<'_>>, error: Errno) -> SnapshotError {
    let mut words = Vec::new();
    if let Some(context) = context {
        let mut buffer = [0; 1024];
        while let Ok(n @ 1..) = rustix::io::read(context, &mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..n]);
            words.push(text.get(2..).unwrap_or_default().trim().to_owned());
        }
    }
    SnapshotError::Mount { words: words.join("; "), source: error.into() }
}

fn by_option_string(
    trees: &[LowerDir],
    upper: Option<&Upper>,
    label: Option<&str>,
    scratch: &Path,
) -> Result<Tree, SnapshotError> {
    // Held open until the kernel has resolved the paths through them.
    let mut held = Vec::new();
    let mut path_of = |tree: &LowerDir| -> Result<String, FileError> {
        let dir = match tree {
            LowerDir::Plain(path) => open_tree_root(path).at("open", path)?,
            LowerDir::Packed(dir) => packed::mount(dir)?,
        };
        let path = proc_path(dir.as_fd());
        held.push(dir);
        Ok(path)
    };
    let lowers = trees.iter().map(&mut path_of).collect::<Result<Vec<_>, _>>()?;
    let mut options = format!("lowerdir={}", lowers.join(":"));
    for (key, value) in options_over(trees) {
        options.push_str(&format!(",{key}={value}"));
    }
    if let Some(label) = label {
        // The categories of a label have commas in them.
        options.push_str(&format!(",{LABEL}=\"{label}\""));
    }
    let mut flags = MountFlags::empty();
    if let Some(upper) = upper {
        let [tree, work] = [upper.tree(), upper.work()].map(LowerDir::Plain);
        options.push_str(&format!(",upperdir={},workdir={}", path_of(&tree)?, path_of(&work)?));
        if upper.volatile {
            options.push_str(",volatile");
        }
    } else {
        flags |= MountFlags::RDONLY;
    }
    make_dir(scratch)?;
    let options = std::ffi::CString::new(options)
        .map_err(|error| SnapshotError::Mount { words: "options".into(), source: error.into() })?;
    rustix::mount::mount("plies", scratch, "overlay", flags, options.as_c_str())
        .map_err(|error| SnapshotError::Mount { words: String::new(), source: error.into() })?;
    let root = tree::open_own(scratch)?;
    Ok(Tree { root, form: Form::Attached })
}

impl Driver for Overlay {
    fn describe(&self) -> &'static str {
        match (self.packs(), self.method()) {
            (false, OverlayMethod::Descriptors) => "overlay (layers by descriptor)",
            (false, OverlayMethod::Paths) => "overlay (layers by path, one by one)",
            (false, OverlayMethod::OptionString) => "overlay (layers in one option string)",
            (true, OverlayMethod::Descriptors) => "erofs (tars under an overlay, layers by descriptor)",
            (true, OverlayMethod::Paths) => "erofs (tars under an overlay, layers by path, one by one)",
            (true, OverlayMethod::OptionString) => "erofs (tars under an overlay, layers in one option string)",
        }
    }

    fn packs(&self) -> bool {
        match &self.packs {
            Packs::No => false,
            Packs::Yes => true,
            Packs::If(works) => **works,
        }
    }

    fn max_lowers(&self) -> usize {
        match self.method() {
            OverlayMethod::OptionString => MAX_LOWERS_IN_STRING,
            _ => MAX_LOWERS,
        }
    }

    /// The root of an overlay looks as the root of its upper does, so that takes after the stack's.
    fn prepare(&self, lowers: &[Lower], upper: &Upper) -> Result<(), SnapshotError> {
        let (tree, work) = (upper.tree(), upper.work());
        make_dir(&work)?;
        make_dir(&tree)?;
        match lowers.last() {
            Some(top) => {
                let metadata = top.open().map(Metadata::of)?.at("stat", &top.dir)?;
                metadata.apply(tree::open_own(&tree)?).at("set metadata", &tree)?;
            }
            None => fs::set_permissions(&tree, std::os::unix::fs::PermissionsExt::from_mode(0o755))
                .at("change mode", &tree)?,
        }
        Ok(())
    }

    fn view(&self, lowers: &[Lower], scratch: &Path) -> Result<Tree, SnapshotError> {
        self.make(lowers, None, MountOptions::default(), scratch)
    }

    fn changes(&self, lowers: &[Lower], upper: &Upper, scratch: &Path) -> Result<Vec<Change>, SnapshotError> {
        let tree = upper.tree();
        let root = tree::open_own(&tree)?;
        let list = |below: Option<BorrowedFd<'_>>| {
            plies_archive::changes(root.as_fd(), below, UpperForm::Overlay)
                .map_err(|error| FileError::new("list changes in", &tree, std::io::Error::other(error)).into())
        };
        if lowers.is_empty() {
            return list(None);
        }
        let below = self.view(lowers, scratch)?;
        let changes = list(Some(below.root.as_fd()));
        below.end(scratch)?;
        changes
    }

    fn mount(
        &self,
        lowers: &[Lower],
        upper: &Upper,
        options: MountOptions<'_>,
        scratch: &Path,
    ) -> Result<Tree, SnapshotError> {
        // A volatile mount leaves a mark that forbids the next one, since it cannot know whether the
        // machine crashed in between. We do: the active is of this session. An ordinary work
        // directory holds nothing worth keeping either once it is unmounted.
        let work = upper.work();
        tree::remove(&work)?;
        make_dir(&work)?;
        self.make(lowers, Some(upper), options, scratch)
    }

    fn seal(&self, lowers: &[Lower], upper: &Upper, target: &Path, scratch: &Path) -> Result<Sealed, SnapshotError> {
        let tree = upper.tree();
        let upper_root = tree::open_own(&tree)?;
        let sealed = if lowers.is_empty() {
            plies_archive::seal_upper(upper_root.as_fd(), None)?
        } else {
            let below = self.view(lowers, scratch)?;
            let sealed = plies_archive::seal_upper(upper_root.as_fd(), Some(below.root.as_fd()));
            below.end(scratch)?;
            sealed?
        };
        fs::rename(&tree, target).at("rename", &tree)?;
        Ok(sealed)
    }
}
