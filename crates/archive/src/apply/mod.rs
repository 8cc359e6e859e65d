//! Putting a layer archive into a directory.
//!
//! Two styles, one meaning. [`ApplyStyle::Layer`] makes a canonical layer, whatever will lie
//! below it: what the archive takes away becomes overlayfs' own marks (a character device 0:0
//! hides a name, the attribute `trusted.overlay.opaque=y` all that lower layers have in a
//! directory, an empty `trusted.overlay.origin` says that a directory has whiteouts), and directories that no entry describes are *implied*: mode 0755, owner 0:0, time
//! 0, listed in the [`DirIndex`]. [`ApplyStyle::Merged`] works in a mounted tree and deletes. A
//! layer over its base, mounted, is the same tree as the archive applied to the base; a lower
//! link or file where the archive has an undescribed directory is the exception: a layer hides
//! the link, a merged tree is entered through it.
//!
//! What holds whatever the archive says:
//! - Nothing outside the root is read or changed. Directories are opened one component at a time,
//!   never through a link; links are resolved here as if chrooted; the last component of a name is
//!   never followed. Another process that moves things about can make apply fail, not escape.
//! - A mark never hides what the same archive adds, whichever comes first.
//! - Of entries with the same name the last wins, whatever their types.
//! - Times, owners and modes are exact: owner before mode (changing the owner drops setuid),
//!   attributes after the owner (so do capabilities), times of directories at the very end.
//!
//! Nothing is synced: one `syncfs` for many layers is far cheaper. After an error or a crash the
//! directory holds a part of the layer, and whoever staged it throws it away.

pub(crate) mod dirs;
#[cfg(test)]
mod tests;

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};

use plies_oci::ErrorKind;
use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;

use self::dirs::{Dirs, EPOCH, IMPLIED_MODE, Missing, Node, Origin, ROOT};
use crate::index::{DirIndex, Implied, Usage};
use crate::limits::{LimitExceeded, Limits};
use crate::root::Root;
use crate::sys::{self, Subject};
use crate::tar::{Device, Entry, EntryKind, EntryPath, Reader, SparseRun, TarError, Timestamp};
use crate::tarsplit::Unfaithful;
use crate::tree::{self, Names};
use crate::whiteout::{self, Mark, Meaning};
use crate::xattr;

/// What the directory is that an archive goes into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ApplyStyle {
    /// An empty directory, to become a layer that depends on nothing below it.
    Layer,
    /// A whole tree, mounted or plain: what the archive takes away is deleted.
    Merged,
    /// A whole tree, to which files of any archive are added, as `ADD` does: names that layers keep for what they take
    /// away are refused, since no layer could hold them.
    Added {
        /// Whose the files are, whatever the archive says: `ADD --chown`.
        owner: Option<NewOwner>,
    },
}

/// Who gets the files of an archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NewOwner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

/// What an apply did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Applied {
    /// What the layer costs. Zero for [`ApplyStyle::Merged`]: sealing tells.
    pub usage: Usage,
    /// The implied directories. Empty for [`ApplyStyle::Merged`]: sealing tells.
    pub index: DirIndex,
    /// The archive hides all that lies below it. Its root carries the mark, but overlayfs merges
    /// the roots of all its layers whatever they carry: nothing must be mounted below it.
    pub opaque_root: bool,
    /// Entries of the archive, marks included.
    pub entries: u64,
    /// Extended attributes that were not set: overlayfs' own, host labels, damaged capabilities,
    /// and those that this kernel has no place for.
    pub xattrs_left_out: u64,
    /// Devices that could not be made because this process may not.
    pub devices_left_out: u64,
}

/// Why an archive could not be applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// The archive cannot be read.
    #[error("read layer")]
    Tar(#[from] TarError),
    /// The archive asks for something that no layer may do, or that makes no sense.
    #[error("{path}: {why}")]
    Refused {
        /// The entry.
        path: EntryPath,
        /// What is wrong with it.
        why: Refusal,
    },
    /// The archive needs the layers below it: apply it again in [`ApplyStyle::Merged`] over them.
    #[error("{path}: {why}")]
    NeedsBase {
        /// The entry.
        path: EntryPath,
        /// What for.
        why: BaseNeed,
    },
    /// The archive is about to take away content that it put there itself, and whoever records it wants to save it
    /// first. [`apply`] deals with it.
    #[error("{path} is about to be replaced")]
    Displaces {
        /// What goes.
        path: EntryPath,
    },
    /// A directory to make a layer in holds something already.
    #[error("the directory to apply a layer in is not empty")]
    NotEmpty,
    /// A limit was hit.
    #[error(transparent)]
    Limit(LimitExceeded),
    /// The file system did not do its part.
    #[error("{op} {path}")]
    Io {
        /// What was tried.
        op: &'static str,
        /// Where.
        path: EntryPath,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
}

/// What is wrong with an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The root of the tree as a file, a link, a device.
    #[error("the root must stay a directory")]
    RootNotDirectory,
    /// `.wh.`, `.wh..`, `.wh...`, or a path through a whiteout.
    #[error("whiteout of an impossible name, or something inside a whiteout")]
    BadMark,
    /// A name of a whiteout, in an archive that is no layer.
    #[error("names that begin with .wh. are kept for what layers take away")]
    Reserved,
    /// A whiteout that is not an empty file.
    #[error("whiteout that is not an empty file")]
    MarkWithContent,
    /// A hard link to a whiteout.
    #[error("hard link to a whiteout")]
    LinkToMark,
    /// A hard link to a directory.
    #[error("hard link to a directory")]
    LinkToDirectory,
    /// A hard link to its own name.
    #[error("hard link to itself")]
    LinkToSelf,
    /// A hard link to nothing.
    #[error("hard link to something that is not there")]
    LinkToNothing,
    /// More hard links to one file than the file system can count.
    #[error("too many hard links to one file")]
    HardLinksCount,
    /// More than 40 symbolic links on the way to an entry.
    #[error("too many levels of symbolic links")]
    TooManyLinks,
    /// A character device 0:0, with which overlayfs hides files.
    #[error("character device 0:0, which would hide a file")]
    WhiteoutDevice,
    /// The owner or group -1, with which `chown` leaves things as they are.
    #[error("owner or group 4294967295")]
    NoOwner,
    /// The data does not fit the entry's size.
    #[error("data does not have the length that the entry says")]
    DataLength,
}

/// What an archive needs the layers below it for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BaseNeed {
    /// A hard link to a file of a lower layer.
    #[error("hard link to {target}, which this layer does not have")]
    LinkTarget {
        /// The other name.
        target: EntryPath,
    },
    /// It takes away or describes what stands where it had only marks below before: they mean something below a
    /// directory of a lower layer and nothing below a file.
    #[error("marks below {dir}, which the layers below decide on")]
    Marks {
        /// The place.
        dir: EntryPath,
    },
}

impl ApplyError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Tar(error) => error.kind(),
            Self::Refused { .. } => ErrorKind::InvalidInput,
            Self::NeedsBase { .. } | Self::NotEmpty => ErrorKind::FailedPrecondition,
            Self::Displaces { .. } => ErrorKind::Internal,
            Self::Limit(_) => ErrorKind::Limit,
            Self::Io { .. } => ErrorKind::Unavailable,
        }
    }
}

fn io_error<'a>(op: &'static str, path: &'a EntryPath) -> impl FnOnce(Errno) -> ApplyError + 'a {
    move |error| ApplyError::Io { op, path: path.clone(), source: error.into() }
}

fn refuse(path: &EntryPath, why: Refusal) -> ApplyError {
    ApplyError::Refused { path: path.clone(), why }
}

/// Applies what is left in `reader` to the tree at `root`, to the end of its entries; the caller
/// finishes the reader. When the tree will not hold all content that went by, the reader preserves
/// the archive in its spool, or without one its recording is marked as unfaithful.
///
/// # Errors
/// [`ApplyError`]. The tree is then half done. [`ApplyError::NeedsBase`] asks for another try
/// over the lower layers, from the start of the archive.
pub fn apply<R: Read>(
    reader: &mut Reader<R>,
    root: BorrowedFd<'_>,
    style: ApplyStyle,
    limits: &Limits,
) -> Result<Applied, ApplyError> {
    let mut applier = Applier::new(root, style, limits)?;
    let tree = Root::new(root).map_err(|source| ApplyError::Io { op: "open", path: EntryPath::root(), source })?;
    while let Some(entry) = reader.next_entry()? {
        if reader.must_preserve() {
            reader.preserve(&tree)?;
        }
        applier.dirs.tell_before_displacing(reader.can_preserve());
        match applier.entry(&entry, reader) {
            // Nothing was displaced yet, and no data consumed: the entry can be begun again.
            Err(ApplyError::Displaces { path }) => {
                reader.mark_unfaithful(Unfaithful::Replaced { path });
                reader.preserve(&tree)?;
                applier.dirs.tell_before_displacing(false);
                applier.entries -= 1;
                applier.entry(&entry, reader)?;
            }
            result => result?,
        }
        if let Some(path) = applier.dirs.take_displaced() {
            reader.mark_unfaithful(Unfaithful::Replaced { path });
        }
        if std::mem::take(&mut applier.not_extracted) {
            reader.keep_data();
        }
    }
    applier.finish()
}

/// Where the stored bytes of an entry come from.
trait Data {
    /// The next bytes, the same again until they are consumed; none at the end.
    fn chunk(&mut self) -> Result<&[u8], TarError>;
    fn consume(&mut self, n: usize);
}

impl<R: Read> Data for Reader<R> {
    fn chunk(&mut self) -> Result<&[u8], TarError> {
        self.data()
    }

    fn consume(&mut self, n: usize) {
        Self::consume(self, n);
    }
}

/// Changes the owner if it is another; says whether it did.
fn own_fd(fd: BorrowedFd<'_>, stat: &Stat, uid: u32, gid: u32) -> Result<bool, Errno> {
    if stat.st_uid == uid && stat.st_gid == gid {
        return Ok(false);
    }
    rustix::fs::fchown(fd, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    Ok(true)
}

/// Removes access control lists that something new took over from its directory.
fn strip_acls(subject: Subject<'_>) -> Result<(), Errno> {
    subject.remove(xattr::ACL_ACCESS)?;
    match subject.remove(xattr::ACL_DEFAULT) {
        // Only directories have one.
        Ok(_) | Err(Errno::ACCESS) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether the mode must be set, seen from before the owner and the attributes were: another
/// owner drops setuid and setgid, and an access control list carries permissions of its own.
fn needs_chmod(stat: &Stat, mode: u32, chowned: bool, xattrs: &[(Vec<u8>, Vec<u8>)]) -> bool {
    sys::mode_bits(stat) != mode || (chowned && mode & 0o6000 != 0) || !xattrs.is_empty()
}

struct Applier {
    dirs: Dirs,
    style: ApplyStyle,
    usage: Usage,
    /// The current entry has content that no tree gets, such as AUFS's own files.
    not_extracted: bool,
    entries: u64,
    xattrs_left_out: u64,
    devices_left_out: u64,
}

impl Applier {
    fn new(root: BorrowedFd<'_>, style: ApplyStyle, limits: &Limits) -> Result<Self, ApplyError> {
        let mut dirs = Dirs::new(root, style, limits)?;
        if style == ApplyStyle::Layer {
            // What is there already would be neither counted nor indexed.
            let names = Names::sorted((*dirs.fd(ROOT)?).as_fd()).map_err(io_error("read", &EntryPath::root()))?;
            if !names.is_empty() {
                return Err(ApplyError::NotEmpty);
            }
        }
        Ok(Self {
            dirs,
            style,
            usage: Usage::default(),
            not_extracted: false,
            entries: 0,
            xattrs_left_out: 0,
            devices_left_out: 0,
        })
    }

    fn entry(&mut self, entry: &Entry, data: &mut dyn Data) -> Result<(), ApplyError> {
        self.entries += 1;
        let path = &entry.path;
        let meaning = whiteout::meaning(path).map_err(|_| refuse(path, Refusal::BadMark))?;
        if matches!(self.style, ApplyStyle::Added { .. }) && meaning != Meaning::Plain {
            return Err(refuse(path, Refusal::Reserved));
        }
        let given;
        let entry = match self.style {
            ApplyStyle::Added { owner: Some(NewOwner { uid, gid }) } => {
                given = Entry { uid, gid, ..entry.clone() };
                &given
            }
            _ => entry,
        };
        let path = &entry.path;
        if meaning == Meaning::Ignored {
            self.not_extracted = true;
            return Ok(());
        }
        if entry.uid == u32::MAX || entry.gid == u32::MAX {
            return Err(refuse(path, Refusal::NoOwner));
        }
        let raw = path.as_bytes();
        if raw.is_empty() {
            return match entry.kind {
                EntryKind::Directory => self.describe(ROOT, Description::of(entry), false),
                _ => Err(refuse(path, Refusal::RootNotDirectory)),
            };
        }
        let (outer, name) = match raw.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&raw[..slash], &raw[slash + 1..]),
            None => (&raw[..0], raw),
        };
        if let Meaning::Mark(mark) = meaning {
            if !matches!(entry.kind, EntryKind::File { size_bytes: 0, .. }) {
                return Err(refuse(path, Refusal::MarkWithContent));
            }
            // Below a file there is nothing to hide, and a mark is no reason to take the file away.
            return match self.dirs.resolve(outer, Missing::CreateBesideFiles, path)? {
                Some(dir) => self.mark(dir, mark, path),
                None => Ok(()),
            };
        }
        let dir = self.dirs.resolve(outer, Missing::Create, path)?.expect("because missing parents are made");
        match &entry.kind {
            EntryKind::File { size_bytes, sparse } => self.file(dir, name, entry, *size_bytes, sparse.as_deref(), data),
            EntryKind::Directory => {
                let (node, new) = self.dirs.ensure(dir, name)?;
                if !new && self.dirs.get(node).origin == Origin::Implied {
                    self.check_marks_in(node, path)?;
                }
                self.describe(node, Description::of(entry), new)
            }
            EntryKind::Symlink { target } => {
                self.make(dir, name, path, |dir| rustix::fs::symlinkat(target.as_slice(), dir, name))?;
                self.settle(dir, name, entry, true)
            }
            EntryKind::HardLink { target } => self.hard_link(dir, name, entry, target),
            EntryKind::CharDevice(Device { major: 0, minor: 0 }) => Err(refuse(path, Refusal::WhiteoutDevice)),
            EntryKind::CharDevice(device) => self.device(dir, name, entry, FileType::CharacterDevice, *device),
            EntryKind::BlockDevice(device) => self.device(dir, name, entry, FileType::BlockDevice, *device),
            EntryKind::Fifo => {
                let mode = sys::mode(entry.mode & 0o777);
                self.make(dir, name, path, |dir| rustix::fs::mkfifoat(dir, name, mode))?;
                self.settle(dir, name, entry, true)
            }
        }
    }

    /// Creates something at a name, in place of whatever stands there.
    fn make<T>(
        &mut self,
        dir: Node,
        name: &[u8],
        path: &EntryPath,
        create: impl Fn(BorrowedFd<'_>) -> Result<T, Errno>,
    ) -> Result<T, ApplyError> {
        // Once for what the archive put there, once more for whoever else is at work.
        const TRIES: usize = 3;
        let outer = self.dirs.fd(dir)?;
        for _ in 1..TRIES {
            match create((*outer).as_fd()) {
                Err(Errno::EXIST) => self.dirs.clear(dir, name)?,
                result => {
                    let made = result.map_err(io_error("create", path))?;
                    self.dirs.note_added(dir, name);
                    return Ok(made);
                }
            }
        }
        Err(io_error("create", path)(Errno::EXIST))
    }

    fn file(
        &mut self,
        dir: Node,
        name: &[u8],
        entry: &Entry,
        size_bytes: u64,
        sparse: Option<&[SparseRun]>,
        data: &mut dyn Data,
    ) -> Result<(), ApplyError> {
        let path = &entry.path;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        // The right mode from the start, where the umask lets it through, saves a call for each file.
        let mode = sys::mode(entry.mode & 0o777);
        let fd = self.make(dir, name, path, |dir| rustix::fs::openat(dir, name, flags, mode))?;
        let fd = fd.as_fd();

        let whole = SparseRun { offset: 0, length: size_bytes };
        for run in sparse.unwrap_or(std::slice::from_ref(&whole)) {
            write_run(fd, *run, data, path)?;
        }
        if !data.chunk()?.is_empty() {
            return Err(refuse(path, Refusal::DataLength));
        }

        let acl_default = self.dirs.get(dir).acl_default;
        let mut finish = || {
            if sparse.is_some() {
                rustix::fs::ftruncate(fd, size_bytes)?;
            }
            if acl_default {
                strip_acls(Subject::Fd(fd))?;
            }
            let mut stat = rustix::fs::fstat(fd)?;
            let chowned = own_fd(fd, &stat, entry.uid, entry.gid)?;
            let chmod = needs_chmod(&stat, entry.mode, chowned, &entry.xattrs);
            if !entry.xattrs.is_empty() {
                self.xattrs_left_out += xattr::write(Subject::Fd(fd), &entry.xattrs, false)?;
                // They may have taken a block.
                stat = rustix::fs::fstat(fd)?;
            }
            if chmod {
                rustix::fs::fchmod(fd, sys::mode(entry.mode))?;
            }
            rustix::fs::futimens(fd, &sys::times(entry.mtime))?;
            Ok(stat)
        };
        let stat = finish().map_err(io_error("set metadata of", path))?;
        self.usage.add(&stat);
        Ok(())
    }

    fn hard_link(&mut self, dir: Node, name: &[u8], entry: &Entry, target: &EntryPath) -> Result<(), ApplyError> {
        let path = &entry.path;
        if whiteout::meaning(target) != Ok(Meaning::Plain) {
            return Err(refuse(path, Refusal::LinkToMark));
        }
        let (target_dir, target_name) = target.split().ok_or_else(|| refuse(path, Refusal::LinkToDirectory))?;
        let missing = || match self.style {
            ApplyStyle::Layer => {
                ApplyError::NeedsBase { path: path.clone(), why: BaseNeed::LinkTarget { target: target.clone() } }
            }
            ApplyStyle::Merged | ApplyStyle::Added { .. } => refuse(path, Refusal::LinkToNothing),
        };
        let target_dir = self.dirs.resolve(target_dir.as_bytes(), Missing::Tell, path)?.ok_or_else(missing)?;
        if target_dir == dir && target_name == name {
            return Err(refuse(path, Refusal::LinkToSelf));
        }
        let from = self.dirs.fd(target_dir)?;
        let from = (*from).as_fd();
        match sys::stat_if_exists(from, target_name).map_err(io_error("read", target))? {
            None => return Err(missing()),
            // Hidden by this layer itself.
            Some(stat) if self.style == ApplyStyle::Layer && sys::is_whiteout(&stat) => {
                return Err(refuse(path, Refusal::LinkToNothing));
            }
            Some(stat) if sys::kind(&stat) == FileType::Directory => {
                return Err(refuse(path, Refusal::LinkToDirectory));
            }
            Some(_) => {}
        }
        // Without AT_SYMLINK_FOLLOW: a link to a symbolic link is one to the link itself.
        self.make(dir, name, path, |dir| rustix::fs::linkat(from, target_name, dir, name, AtFlags::empty())).map_err(
            |error| match &error {
                ApplyError::Io { source, .. } if source.raw_os_error() == Some(Errno::MLINK.raw_os_error()) => {
                    refuse(path, Refusal::HardLinksCount)
                }
                // It went when what stood at the new name was cleared away.
                ApplyError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                    refuse(path, Refusal::LinkToNothing)
                }
                _ => error,
            },
        )?;
        self.settle(dir, name, entry, false)
    }

    fn device(
        &mut self,
        dir: Node,
        name: &[u8],
        entry: &Entry,
        kind: FileType,
        device: Device,
    ) -> Result<(), ApplyError> {
        let mode = sys::mode(entry.mode & 0o777);
        let create = |dir: BorrowedFd<'_>| rustix::fs::mknodat(dir, name, kind, mode, sys::raw_device(device));
        match self.make(dir, name, &entry.path, create) {
            Ok(()) => self.settle(dir, name, entry, true),
            // In a user namespace, or without CAP_MKNOD. The peers pass over it too.
            Err(ApplyError::Io { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
                self.devices_left_out += 1;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Gives something that was not opened (a link, a device, another name of a file) what its
    /// entry says. `new`: it is an inode of its own, to be counted.
    fn settle(&mut self, dir: Node, name: &[u8], entry: &Entry, new: bool) -> Result<(), ApplyError> {
        let outer = self.dirs.fd(dir)?;
        let outer = (*outer).as_fd();
        let acl_default = self.dirs.get(dir).acl_default;
        let mut finish = || {
            let stat = sys::stat_at(outer, name)?;
            let is_link = sys::kind(&stat) == FileType::Symlink;
            if new && acl_default && !is_link {
                strip_acls(Subject::At(outer, name))?;
            }
            let chown = stat.st_uid != entry.uid || stat.st_gid != entry.gid;
            if chown {
                let (uid, gid) = (Uid::from_raw(entry.uid), Gid::from_raw(entry.gid));
                rustix::fs::chownat(outer, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            let special = sys::kind(&stat) != FileType::RegularFile;
            self.xattrs_left_out += xattr::write(Subject::At(outer, name), &entry.xattrs, special)?;
            if !is_link && (needs_chmod(&stat, entry.mode, chown, &entry.xattrs) || (new && acl_default)) {
                sys::chmod_at(outer, name, entry.mode)?;
            }
            if sys::mtime(&stat) != entry.mtime {
                rustix::fs::utimensat(outer, name, &sys::times(entry.mtime), AtFlags::SYMLINK_NOFOLLOW)?;
            }
            if entry.xattrs.is_empty() { Ok(stat) } else { sys::stat_at(outer, name) }
        };
        let stat = finish().map_err(io_error("set metadata of", &entry.path))?;
        if new {
            self.usage.add(&stat);
        }
        Ok(())
    }

    /// Makes a directory explicit. `new`: it has no attributes yet.
    fn describe(&mut self, node: Node, said: Description<'_>, new: bool) -> Result<(), ApplyError> {
        let fd = self.dirs.fd(node)?;
        let fd = (*fd).as_fd();
        // A directory that its owner cannot enter would stop us too, unless we are root.
        let late_mode = (said.mode & 0o700 != 0o700).then_some(said.mode);
        let mode = said.mode | if late_mode.is_some() { 0o700 } else { 0 };
        let mut set = || {
            if !new {
                xattr::remove_others(Subject::Fd(fd), said.xattrs)?;
            }
            let stat = rustix::fs::fstat(fd)?;
            let chowned = own_fd(fd, &stat, said.uid, said.gid)?;
            self.xattrs_left_out += xattr::write(Subject::Fd(fd), said.xattrs, false)?;
            if needs_chmod(&stat, mode, chowned, said.xattrs) {
                rustix::fs::fchmod(fd, sys::mode(mode))?;
            }
            Ok(())
        };
        set().map_err(|error| io_error("set metadata of", &self.dirs.path(node))(error))?;
        let dir = self.dirs.get_mut(node);
        dir.origin = Origin::Explicit { mtime: said.mtime, late_mode };
        dir.acl_default = said.xattrs.iter().any(|(name, _)| name == xattr::ACL_DEFAULT);
        Ok(())
    }

    fn mark(&mut self, dir: Node, mark: Mark<'_>, path: &EntryPath) -> Result<(), ApplyError> {
        match (self.style, mark) {
            (ApplyStyle::Layer, Mark::Opaque) => {
                if !self.dirs.get(dir).opaque {
                    self.check_marks_in(dir, path)?;
                }
                self.dirs.set_opaque(dir)
            }
            (ApplyStyle::Layer, Mark::Whiteout(name)) => self.hide(dir, name, path),
            (ApplyStyle::Merged | ApplyStyle::Added { .. }, Mark::Opaque) => self.sweep(dir, vec![dir]),
            (ApplyStyle::Merged | ApplyStyle::Added { .. }, Mark::Whiteout(name)) => {
                let mut pending = Vec::new();
                self.take_away(dir, name, &mut pending)?;
                self.sweep(dir, pending)
            }
        }
    }

    /// Hides what lower layers have at a name, and nothing that this layer has.
    fn hide(&mut self, dir: Node, name: &[u8], path: &EntryPath) -> Result<(), ApplyError> {
        if let Some(child) = self.dirs.child(dir, name) {
            let known = self.dirs.get(child);
            if !known.opaque || known.origin == Origin::Implied {
                self.check_marks(child, path)?;
            }
            let child_dir = self.dirs.get_mut(child);
            if child_dir.origin == Origin::Implied {
                // There is nothing left below that it could take its metadata from.
                child_dir.origin = Origin::Explicit { mtime: EPOCH, late_mode: None };
            }
            return self.dirs.set_opaque(child);
        }
        let outer = self.dirs.fd(dir)?;
        let create = || {
            rustix::fs::mknodat(&*outer, name, FileType::CharacterDevice, Mode::empty(), 0)?;
            sys::stat_at((*outer).as_fd(), name).map(Some)
        };
        // What stands there is of this layer: it hides what is below by being there.
        match create() {
            Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(io_error("create", path)(error)),
            Ok(stat) => {
                self.dirs.get_mut(dir).touched = true;
                stat.iter().for_each(|stat| self.usage.add(stat));
                self.dirs.set_whiteouts(dir)
            }
        }
    }

    /// Asks for the base where lower layers say what stands here, and this layer is about to hide or to replace it.
    fn check_marks(&self, top: Node, path: &EntryPath) -> Result<(), ApplyError> {
        match self.dirs.doubtful(top) {
            // In the other styles the base is there.
            Some(dir) if self.style == ApplyStyle::Layer => {
                let why = BaseNeed::Marks { dir: self.dirs.path(dir) };
                Err(ApplyError::NeedsBase { path: path.clone(), why })
            }
            _ => Ok(()),
        }
    }

    fn check_marks_in(&self, dir: Node, path: &EntryPath) -> Result<(), ApplyError> {
        self.dirs.children(dir).try_for_each(|child| self.check_marks(child, path))
    }

    /// Deletes what was at a name before this archive. A directory that holds something of the
    /// archive's stays for its sake, and goes to `pending` to have the rest deleted.
    fn take_away(&mut self, dir: Node, name: &[u8], pending: &mut Vec<Node>) -> Result<(), ApplyError> {
        if self.dirs.is_added(dir, name) {
            return Ok(());
        }
        match self.dirs.child(dir, name) {
            Some(child) if self.dirs.holds_own(child) => pending.push(child),
            _ => self.dirs.clear(dir, name)?,
        }
        Ok(())
    }

    /// Deletes what was in these directories before this archive. All but `top` were taken away
    /// themselves and lose their metadata, if the archive did not describe them.
    fn sweep(&mut self, top: Node, mut pending: Vec<Node>) -> Result<(), ApplyError> {
        while let Some(node) = pending.pop() {
            let fd = self.dirs.fd(node)?;
            let mut names =
                Names::sorted((*fd).as_fd()).map_err(|error| io_error("read", &self.dirs.path(node))(error))?;
            while let Some((name, _)) = names.advance() {
                self.take_away(node, name, &mut pending)?;
            }
            if node != top && matches!(self.dirs.get(node).origin, Origin::Existing { .. }) {
                let fresh = Description { mode: IMPLIED_MODE, uid: 0, gid: 0, mtime: EPOCH, xattrs: &[] };
                self.describe(node, fresh, false)?;
            }
        }
        Ok(())
    }

    /// Sets what had to wait, and sums up.
    fn finish(mut self) -> Result<Applied, ApplyError> {
        let root = EntryPath::root();
        if self.style == ApplyStyle::Layer && self.dirs.get(ROOT).origin == Origin::Implied {
            let fresh = Description { mode: IMPLIED_MODE, uid: 0, gid: 0, mtime: EPOCH, xattrs: &[] };
            self.describe(ROOT, fresh, false)?;
            self.dirs.get_mut(ROOT).origin = Origin::Implied;
        }
        // Below an opaque directory nothing shines through, so what is there describes itself.
        let mut hidden = vec![false; self.dirs.live().next_back().map_or(0, |last| last + 1)];
        for node in self.dirs.live() {
            let dir = self.dirs.get(node);
            hidden[node] = node != ROOT && (hidden[dir.parent] || self.dirs.get(dir.parent).opaque);
        }
        let mut index = DirIndex::default();
        // Innermost first: a mode that keeps us out is set when nothing is left to do inside.
        for node in self.dirs.live().rev() {
            let (origin, touched) = (self.dirs.get(node).origin, self.dirs.get(node).touched);
            if origin == Origin::Implied && !hidden[node] {
                index.insert(self.dirs.path(node), Implied::OnTheWay);
            }
            let (mtime, late_mode) = match origin {
                Origin::Implied => (EPOCH, None),
                Origin::Explicit { mtime, late_mode } => (mtime, late_mode),
                Origin::Existing { mtime } if touched => (mtime, None),
                Origin::Existing { .. } => continue,
            };
            let fd = self.dirs.fd(node)?;
            let set = || {
                if let Some(mode) = late_mode {
                    rustix::fs::fchmod(&*fd, sys::mode(mode))?;
                }
                rustix::fs::futimens(&*fd, &sys::times(mtime))?;
                rustix::fs::fstat(&*fd)
            };
            let stat = set().map_err(|error| io_error("set metadata of", &self.dirs.path(node))(error))?;
            self.usage.add(&stat);
        }
        let (usage, index) = match self.style {
            ApplyStyle::Merged | ApplyStyle::Added { .. } => Default::default(),
            // What was counted and then replaced is not worth keeping books for.
            ApplyStyle::Layer if self.dirs.replaced() => {
                let fd = self.dirs.fd(ROOT)?;
                (tree::measure((*fd).as_fd()).map_err(io_error("measure", &root))?, index)
            }
            ApplyStyle::Layer => (self.usage, index),
        };
        Ok(Applied {
            usage,
            index,
            opaque_root: self.style == ApplyStyle::Layer && self.dirs.get(ROOT).opaque,
            entries: self.entries,
            xattrs_left_out: self.xattrs_left_out,
            devices_left_out: self.devices_left_out,
        })
    }
}

/// Metadata of a directory.
#[derive(Clone, Copy)]
struct Description<'a> {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: Timestamp,
    xattrs: &'a [(Vec<u8>, Vec<u8>)],
}

impl<'a> Description<'a> {
    fn of(entry: &'a Entry) -> Self {
        Self { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime, xattrs: &entry.xattrs }
    }
}

/// Writes the stored bytes of one run where they belong.
fn write_run(fd: BorrowedFd<'_>, run: SparseRun, data: &mut dyn Data, path: &EntryPath) -> Result<(), ApplyError> {
    let mut done = 0;
    while done < run.length {
        let chunk = data.chunk()?;
        let chunk = &chunk[..chunk.len().min(usize::try_from(run.length - done).unwrap_or(usize::MAX))];
        if chunk.is_empty() {
            return Err(refuse(path, Refusal::DataLength));
        }
        let written = rustix::io::pwrite(fd, chunk, run.offset + done).map_err(io_error("write", path))?;
        if written == 0 {
            return Err(io_error("write", path)(Errno::IO));
        }
        data.consume(written);
        done += written as u64;
    }
    Ok(())
}
