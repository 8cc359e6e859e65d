//! A layer in memory: what [`crate::apply()`] makes of an archive in [`crate::ApplyStyle::Layer`], without a file.
//!
//! The rules are those of `apply`, and tests hold both against each other. What the kernel does there to attributes and
//! access control lists while they are set is done here by hand.

use std::collections::{BTreeMap, HashSet};
use std::io::Read;

use rustix::io::Errno;

use super::IndexingError;
use super::attributes::{self, Sort};
use super::sparse::{Chunks, Plan};
use crate::apply::dirs::{EPOCH, IMPLIED_MODE, LINKS, Missing};
use crate::apply::{Applied, ApplyError, BaseNeed, Refusal};
use crate::index::{DirIndex, Implied, Usage};
use crate::limits::{LimitExceeded, Limits};
use crate::tar::{Device, Entry, EntryKind, EntryPath, Reader, SparseRun, Timestamp};
use crate::whiteout::{self, Mark, Meaning};
use crate::xattr::Xattrs;

/// Number of an inode. The root is [`ROOT`].
pub(super) type Id = usize;
pub(super) const ROOT: Id = 0;

/// Bytes of a name: `EROFS_NAME_LEN`, and `NAME_MAX` of all common file systems.
const NAME_BYTES_MAX: usize = 255;

/// Bytes of a link target: the kernel's `PATH_MAX` less the NUL.
const TARGET_BYTES_MAX: usize = 4095;

/// Bytes of an attribute's value, which has 16 bits for its length on disk.
const VALUE_BYTES_MAX: usize = u16::MAX as usize;

/// Bytes of all attributes of an inode, with four for each and the name, which on disk has 16 bits for their number in
/// units of four.
const XATTRS_BYTES_MAX: usize = 4 * (u16::MAX as usize - 1);

/// An inode.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timestamp,
    /// What is content, sorted by name.
    pub(super) xattrs: Xattrs,
}

#[derive(Debug)]
pub(super) enum Kind {
    Directory(Box<Dir>),
    File { size_bytes: u64, data: Data },
    Symlink(Box<[u8]>),
    CharDevice(Device),
    BlockDevice(Device),
    Fifo,
    Whiteout,
}

/// Where a file's bytes are.
#[derive(Debug)]
pub(super) enum Data {
    /// One after the other in the tar, from this block of 512 bytes on.
    Stored(u32),
    /// Here and there.
    Sparse(Box<Chunks>),
}

#[derive(Debug, Default)]
pub(super) struct Dir {
    pub(super) parent: Id,
    name: Box<[u8]>,
    depth: u64,
    /// No entry of the archive says what it is like.
    implied: bool,
    /// Hides what lower layers have in it.
    pub(super) opaque: bool,
    /// Has whiteouts in it.
    pub(super) whiteouts: bool,
    /// An entry of the archive stands in it that is no mark: whatever lower layers have there, it is a directory.
    entered: bool,
    pub(super) subdirs: BTreeMap<Box<[u8]>, Id>,
    /// Names of all that is no directory.
    pub(super) others: BTreeMap<Box<[u8]>, Id>,
}

/// The layer as far as its archive was read.
#[derive(Debug)]
pub(super) struct Tree {
    path_depth_max: u64,
    pub(super) inodes: Vec<Inode>,
    /// Blocks of sparse files that the tar does not hold as they are needed.
    pub(super) copied: Vec<u8>,
    /// What chunks of sparse files and [`Self::copied`] take up so far.
    sparse_bytes: u64,
    /// The directory that was resolved last, and its path: forgotten when a directory or a link goes away.
    last: Option<(Vec<u8>, Id)>,
    entries: u64,
    xattrs_left_out: u64,
}

fn refuse(path: &EntryPath, why: Refusal) -> IndexingError {
    ApplyError::Refused { path: path.clone(), why }.into()
}

fn failed(op: &'static str, path: &EntryPath, error: Errno) -> IndexingError {
    ApplyError::Io { op, path: path.clone(), source: error.into() }.into()
}

impl Tree {
    pub(super) fn new(limits: &Limits) -> Self {
        let mut tree = Self {
            path_depth_max: limits.path_depth,
            inodes: Vec::new(),
            copied: Vec::new(),
            sparse_bytes: 0,
            last: None,
            entries: 0,
            xattrs_left_out: 0,
        };
        tree.add_directory(Dir { implied: true, ..Dir::default() });
        tree
    }

    /// Takes up an entry that `reader` just gave, with its data.
    pub(super) fn entry<R: Read>(&mut self, entry: &Entry, reader: &mut Reader<R>) -> Result<(), IndexingError> {
        self.entries += 1;
        let path = &entry.path;
        let meaning = whiteout::meaning(path).map_err(|_| refuse(path, Refusal::BadMark))?;
        if meaning == Meaning::Ignored {
            return Ok(());
        }
        if entry.uid == u32::MAX || entry.gid == u32::MAX {
            return Err(refuse(path, Refusal::NoOwner));
        }
        let Some((outer, name)) = path.split() else {
            return match entry.kind {
                EntryKind::Directory => self.describe(ROOT, entry),
                _ => Err(refuse(path, Refusal::RootNotDirectory)),
            };
        };
        let outer = outer.as_bytes();
        if let Meaning::Mark(mark) = meaning {
            if !matches!(entry.kind, EntryKind::File { size_bytes: 0, .. }) {
                return Err(refuse(path, Refusal::MarkWithContent));
            }
            return match self.resolve(outer, Missing::CreateBesideFiles, path)? {
                Some(dir) => self.mark(dir, mark, path),
                None => Ok(()),
            };
        }
        let dir = self.resolve(outer, Missing::Create, path)?.expect("because missing parents are made");
        if name.len() > NAME_BYTES_MAX {
            return Err(failed("create", path, Errno::NAMETOOLONG));
        }
        let kind = match &entry.kind {
            EntryKind::Directory => {
                let (node, new) = self.ensure(dir, name)?;
                if !new && self.dir(node).implied {
                    self.check_marks_in(node, path)?;
                }
                return self.describe(node, entry);
            }
            EntryKind::HardLink { target } => return self.hard_link(dir, name, entry, target),
            EntryKind::File { size_bytes, sparse } => {
                Kind::File { size_bytes: *size_bytes, data: self.data(path, *size_bytes, sparse.as_deref(), reader)? }
            }
            EntryKind::Symlink { target } if target.len() > TARGET_BYTES_MAX => {
                return Err(failed("create", path, Errno::NAMETOOLONG));
            }
            EntryKind::Symlink { target } => Kind::Symlink(target.as_slice().into()),
            EntryKind::CharDevice(Device { major: 0, minor: 0 }) => return Err(refuse(path, Refusal::WhiteoutDevice)),
            EntryKind::CharDevice(device) => Kind::CharDevice(*device),
            EntryKind::BlockDevice(device) => Kind::BlockDevice(*device),
            EntryKind::Fifo => Kind::Fifo,
        };
        self.clear(dir, name);
        let id = self.add(kind);
        self.dir_mut(dir).others.insert(name.into(), id);
        self.settle(id, entry)
    }

    /// Sums up what was done, when the archive is at its end.
    pub(super) fn finish(&self) -> Applied {
        let mut index = DirIndex::default();
        let mut usage = Usage::default();
        let mut seen = HashSet::new();
        // Below an opaque directory nothing shines through, so what is there describes itself.
        let mut pending = vec![(ROOT, false)];
        while let Some((node, hidden)) = pending.pop() {
            let dir = self.dir(node);
            if dir.implied && !hidden {
                index.insert(self.path(node), Implied::OnTheWay);
            }
            usage.inodes += 1;
            for id in dir.others.values() {
                if seen.insert(*id) {
                    usage.inodes += 1;
                    if let Kind::File { size_bytes, .. } = self.inodes[*id].kind {
                        usage.content_bytes = usage.content_bytes.saturating_add(size_bytes);
                    }
                }
            }
            pending.extend(dir.subdirs.values().map(|inner| (*inner, hidden || dir.opaque)));
        }
        Applied {
            usage,
            index,
            opaque_root: self.dir(ROOT).opaque,
            entries: self.entries,
            xattrs_left_out: self.xattrs_left_out,
            devices_left_out: 0,
        }
    }

    pub(super) fn dir(&self, node: Id) -> &Dir {
        match &self.inodes[node].kind {
            Kind::Directory(dir) => dir,
            _ => unreachable!("only directories are walked into"),
        }
    }

    fn dir_mut(&mut self, node: Id) -> &mut Dir {
        match &mut self.inodes[node].kind {
            Kind::Directory(dir) => dir,
            _ => unreachable!("only directories are walked into"),
        }
    }

    fn path(&self, mut node: Id) -> EntryPath {
        let mut names = Vec::new();
        while node != ROOT {
            names.push(&self.dir(node).name);
            node = self.dir(node).parent;
        }
        names.into_iter().rev().fold(EntryPath::root(), |path, name| path.join(name))
    }

    fn add(&mut self, kind: Kind) -> Id {
        let (mode, uid, gid, mtime, xattrs) = (0, 0, 0, EPOCH, Xattrs::new());
        self.inodes.push(Inode { kind, mode, uid, gid, mtime, xattrs });
        self.inodes.len() - 1
    }

    fn add_directory(&mut self, dir: Dir) -> Id {
        let id = self.add(Kind::Directory(Box::new(dir)));
        self.inodes[id].mode = IMPLIED_MODE;
        id
    }

    /// Makes a directory that nobody described.
    fn make(&mut self, parent: Id, name: &[u8]) -> Result<Id, IndexingError> {
        let depth = self.dir(parent).depth + 1;
        LimitExceeded::check("path_depth", self.path_depth_max, depth, "directories", Some(name))
            .map_err(ApplyError::Limit)?;
        if name.len() > NAME_BYTES_MAX {
            return Err(failed("make directory", &self.path(parent).join(name), Errno::NAMETOOLONG));
        }
        let id = self.add_directory(Dir { parent, name: name.into(), depth, implied: true, ..Dir::default() });
        self.dir_mut(parent).subdirs.insert(name.into(), id);
        Ok(id)
    }

    /// Makes a directory in place of something that is none: what lower layers have at this name stays hidden, and its
    /// metadata is our own.
    fn make_over(&mut self, parent: Id, name: &[u8]) -> Result<Id, IndexingError> {
        self.clear(parent, name);
        let node = self.make(parent, name)?;
        let dir = self.dir_mut(node);
        (dir.implied, dir.opaque) = (false, true);
        Ok(node)
    }

    /// The directory of that name, made if it is not there; says whether it is new. Whatever else stands there goes.
    fn ensure(&mut self, parent: Id, name: &[u8]) -> Result<(Id, bool), IndexingError> {
        if let Some(child) = self.dir(parent).subdirs.get(name) {
            return Ok((*child, false));
        }
        match self.dir(parent).others.contains_key(name) {
            true => Ok((self.make_over(parent, name)?, true)),
            false => Ok((self.make(parent, name)?, true)),
        }
    }

    /// Takes away a name and all below it.
    fn clear(&mut self, dir: Id, name: &[u8]) {
        if let Some(id) = self.dir_mut(dir).others.remove(name) {
            if matches!(self.inodes[id].kind, Kind::Symlink(_)) {
                self.last = None;
            }
        } else if let Some(id) = self.dir_mut(dir).subdirs.remove(name) {
            self.last = None;
            let mut pending = vec![id];
            while let Some(node) = pending.pop() {
                let gone = self.dir_mut(node);
                gone.others.clear();
                pending.extend(std::mem::take(&mut gone.subdirs).into_values());
            }
        }
    }

    /// The directory at `raw`, links resolved as if chrooted.
    fn resolve(&mut self, raw: &[u8], missing: Missing, entry: &EntryPath) -> Result<Option<Id>, IndexingError> {
        let node = match &self.last {
            Some((path, node)) if path == raw => *node,
            _ => {
                let Some(node) = self.walk(raw, missing, entry)? else { return Ok(None) };
                let (path, last) = self.last.get_or_insert_default();
                path.clear();
                path.extend_from_slice(raw);
                *last = node;
                node
            }
        };
        self.dir_mut(node).entered |= missing == Missing::Create;
        Ok(Some(node))
    }

    fn walk(&mut self, raw: &[u8], missing: Missing, entry: &EntryPath) -> Result<Option<Id>, IndexingError> {
        let mut at = ROOT;
        let mut links = 0;
        // What is still to go, innermost first: a link puts its components in place of its name.
        let components = |raw: &[u8]| raw.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec).collect::<Vec<_>>();
        let mut rest = components(raw);
        while let Some(name) = rest.pop() {
            match name.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    at = self.dir(at).parent;
                    continue;
                }
                _ => {}
            }
            if let Some(child) = self.dir(at).subdirs.get(name.as_slice()) {
                at = *child;
                continue;
            }
            let there = self.dir(at).others.get(name.as_slice()).map(|id| &self.inodes[*id].kind);
            at = match (there, missing) {
                (Some(Kind::Symlink(target)), _) => {
                    links += 1;
                    if links > LINKS {
                        return Err(refuse(entry, Refusal::TooManyLinks));
                    }
                    rest.extend(components(target));
                    if target.first() == Some(&b'/') { ROOT } else { at }
                }
                (_, Missing::Tell) => return Ok(None),
                // Below a file there is nothing to hide.
                (Some(kind), Missing::CreateBesideFiles) if !matches!(kind, Kind::Whiteout) => return Ok(None),
                (None, _) => self.make(at, &name)?,
                (Some(_), _) => self.make_over(at, &name)?,
            };
        }
        Ok(Some(at))
    }

    /// Makes a directory explicit.
    fn describe(&mut self, node: Id, entry: &Entry) -> Result<(), IndexingError> {
        self.dir_mut(node).implied = false;
        self.inodes[node].xattrs.clear();
        self.settle(node, entry)
    }

    /// Gives an inode what its entry says; what attributes it has already stay if they are not set again.
    fn settle(&mut self, id: Id, entry: &Entry) -> Result<(), IndexingError> {
        let inode = &mut self.inodes[id];
        let sort = match inode.kind {
            Kind::Directory(_) => Sort::Directory,
            Kind::File { .. } => Sort::File,
            Kind::Symlink(_) => Sort::Symlink,
            _ => Sort::Special,
        };
        if sort != Sort::Directory && (inode.uid, inode.gid) != (entry.uid, entry.gid) {
            attributes::change_owner(&mut inode.xattrs);
        }
        (inode.uid, inode.gid, inode.mtime) = (entry.uid, entry.gid, entry.mtime);
        // A symbolic link's permissions are always these, and nobody asks.
        inode.mode = if sort == Sort::Symlink { 0o777 } else { entry.mode };
        let left_out = attributes::set(&mut inode.xattrs, &entry.xattrs, sort);
        self.xattrs_left_out += left_out.map_err(|error| failed("set metadata of", &entry.path, error))?;
        attributes::change_mode(&mut inode.xattrs, inode.mode);
        let unfit = |why| Err(IndexingError::Unfit { path: entry.path.clone(), why });
        if inode.xattrs.iter().any(|(_, value)| value.len() > VALUE_BYTES_MAX) {
            return unfit("an extended attribute of more than 65,535 bytes");
        }
        // The overlay's marks come on top of these, with less than 100 bytes.
        let bytes: usize = inode.xattrs.iter().map(|(name, value)| name.len() + value.len() + 8).sum();
        if bytes + 100 > XATTRS_BYTES_MAX {
            return unfit("extended attributes of more than 256 KiB");
        }
        Ok(())
    }

    fn hard_link(&mut self, dir: Id, name: &[u8], entry: &Entry, target: &EntryPath) -> Result<(), IndexingError> {
        let path = &entry.path;
        if whiteout::meaning(target) != Ok(Meaning::Plain) {
            return Err(refuse(path, Refusal::LinkToMark));
        }
        let (target_dir, target_name) = target.split().ok_or_else(|| refuse(path, Refusal::LinkToDirectory))?;
        let missing = || {
            let why = BaseNeed::LinkTarget { target: target.clone() };
            IndexingError::from(ApplyError::NeedsBase { path: path.clone(), why })
        };
        let target_dir = self.resolve(target_dir.as_bytes(), Missing::Tell, path)?.ok_or_else(missing)?;
        if target_dir == dir && target_name == name {
            return Err(refuse(path, Refusal::LinkToSelf));
        }
        if self.dir(target_dir).subdirs.contains_key(target_name) {
            return Err(refuse(path, Refusal::LinkToDirectory));
        }
        let id = *self.dir(target_dir).others.get(target_name).ok_or_else(missing)?;
        if matches!(self.inodes[id].kind, Kind::Whiteout) {
            // Hidden by this layer itself.
            return Err(refuse(path, Refusal::LinkToNothing));
        }
        self.clear(dir, name);
        if !self.dir(target_dir).others.contains_key(target_name) {
            // It went when what stood at the new name was cleared away.
            return Err(refuse(path, Refusal::LinkToNothing));
        }
        self.dir_mut(dir).others.insert(name.into(), id);
        self.settle(id, entry)
    }

    fn mark(&mut self, dir: Id, mark: Mark<'_>, path: &EntryPath) -> Result<(), IndexingError> {
        match mark {
            Mark::Opaque => {
                if !self.dir(dir).opaque {
                    self.check_marks_in(dir, path)?;
                }
                self.dir_mut(dir).opaque = true;
                Ok(())
            }
            Mark::Whiteout(name) => self.hide(dir, name, path),
        }
    }

    /// Hides what lower layers have at a name, and nothing that this layer has.
    fn hide(&mut self, dir: Id, name: &[u8], path: &EntryPath) -> Result<(), IndexingError> {
        if let Some(child) = self.dir(dir).subdirs.get(name).copied() {
            let known = self.dir(child);
            if !known.opaque || known.implied {
                self.check_marks(child, path)?;
            }
            let known = self.dir_mut(child);
            // There is nothing left below that it could take its metadata from.
            (known.implied, known.opaque) = (false, true);
        } else if !self.dir(dir).others.contains_key(name) {
            let id = self.add(Kind::Whiteout);
            let dir = self.dir_mut(dir);
            dir.others.insert(name.into(), id);
            dir.whiteouts = true;
        }
        Ok(())
    }

    /// Asks for the base where lower layers say what stands here, and this layer is about to hide or to replace it: where
    /// a directory is here for the sake of marks alone.
    fn check_marks(&self, top: Id, path: &EntryPath) -> Result<(), IndexingError> {
        let mut subtree = vec![top];
        let mut at = 0;
        while let Some(node) = subtree.get(at) {
            subtree.extend(self.dir(*node).subdirs.values());
            at += 1;
        }
        let mut sure = HashSet::new();
        // Those below come first: what holds a sure one is sure.
        for node in subtree.into_iter().rev() {
            let dir = self.dir(node);
            if !(dir.entered || !dir.implied || sure.contains(&node)) {
                let why = BaseNeed::Marks { dir: self.path(node) };
                return Err(ApplyError::NeedsBase { path: path.clone(), why }.into());
            }
            sure.insert(dir.parent);
        }
        Ok(())
    }

    fn check_marks_in(&self, dir: Id, path: &EntryPath) -> Result<(), IndexingError> {
        self.dir(dir).subdirs.values().try_for_each(|child| self.check_marks(*child, path))
    }

    /// Where a file's bytes are in the tar; copies those that cannot stay there.
    fn data<R: Read>(
        &mut self,
        path: &EntryPath,
        size_bytes: u64,
        sparse: Option<&[SparseRun]>,
        reader: &mut Reader<R>,
    ) -> Result<Data, IndexingError> {
        let unfit = |why| IndexingError::Unfit { path: path.clone(), why };
        let last = reader.position().saturating_add(reader.remaining_bytes());
        if last > super::TAR_BYTES_MAX {
            return Err(unfit("content beyond the first 2 TiB of the archive"));
        }
        let Some(runs) = sparse else {
            let block = reader.position() / super::BLOCK_BYTES;
            return Ok(Data::Stored(u32::try_from(block).expect("because it was just compared")));
        };
        let plan = Plan::new(size_bytes, runs, reader.position());
        self.sparse_bytes = self.sparse_bytes.saturating_add(plan.cost_bytes());
        if self.sparse_bytes > super::SPARSE_BYTES_MAX {
            return Err(unfit("sparse files in too many pieces"));
        }
        let chunks = plan.carry_out(reader, &mut self.copied).map_err(ApplyError::from)?;
        Ok(Data::Sparse(Box::new(chunks)))
    }
}
