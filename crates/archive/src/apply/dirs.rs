//! The directories that one apply works in: found by path once, then known by number.
//!
//! ```text
//! "var/run/act"  --resolve-->  node 7  --fd-->  descriptor (the last few are held open)
//! ```
//!
//! Invariants:
//! - A live node is a real directory of the tree, reached from its parent's by one name. When the
//!   archive replaces it, it and all below it die with their descriptors.
//! - A parent's number is smaller than its children's.
//! - The path that was resolved last is remembered, so that a run of files in one directory costs
//!   a comparison each. It is forgotten when a directory or a link goes away, since then the same
//!   path may lead elsewhere (hazards P09, P10).

use std::collections::{HashMap, HashSet, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{AtFlags, FileType, Mode};
use rustix::io::Errno;

use super::{ApplyError, ApplyStyle, io_error};
use crate::limits::{LimitExceeded, Limits};
use crate::sys::{self, Subject};
use crate::tar::{EntryPath, Timestamp};
use crate::{tree, xattr};

/// Number of a directory. The root is [`ROOT`].
pub(super) type Node = usize;
pub(super) const ROOT: Node = 0;

/// Descriptors held besides the root's. Archives go through a tree depth first, so a few times
/// the usual depth catches nearly all.
const HELD: usize = 64;

/// Symbolic links followed for one path: the kernel's own limit (`MAXSYMLINKS`).
pub(crate) const LINKS: usize = 40;

/// Owner, mode and time of a directory that nobody described, chosen so that the same archive
/// always gives the same layer.
pub(crate) const IMPLIED_MODE: u32 = 0o755;
pub(crate) const EPOCH: Timestamp = Timestamp { seconds: 0, nanos: 0 };

/// Who says what a directory's metadata is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// It was there before this archive. Keeps the time it had.
    Existing { mtime: Timestamp },
    /// We made it on the way to something.
    Implied,
    /// An entry of the archive, or an implied directory that stands in place of something else
    /// and so cannot take its metadata from below. The mode is set at the end where it would
    /// keep us out.
    Explicit { mtime: Timestamp, late_mode: Option<u32> },
}

#[derive(Debug)]
pub(super) struct Dir {
    pub(super) parent: Node,
    name: Box<[u8]>,
    fd: Option<Rc<OwnedFd>>,
    pub(super) origin: Origin,
    /// Hides what lower layers have in it.
    pub(super) opaque: bool,
    /// Overlayfs knows that there are whiteouts in it.
    whiteouts: bool,
    /// Its access control list is handed on to what is created in it.
    pub(super) acl_default: bool,
    /// Names came or went.
    pub(super) touched: bool,
    /// Some entry of the archive stands in it, if only a mark: the archive says that it is there.
    named: bool,
    /// As `named`, and not by a mark: whatever lower layers have there, it is a directory.
    entered: bool,
    live: bool,
    depth: u64,
    subdirs: HashMap<Box<[u8]>, Node>,
    /// Names that this archive put here, directories aside. Kept in a merged tree only, where
    /// they stand among older ones.
    added: HashSet<Box<[u8]>>,
}

/// What may be done about a directory that is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    /// Make it, as if it had always been there.
    Create,
    /// Make it, unless a file stands in the way: then say so.
    CreateBesideFiles,
    /// Say so.
    Tell,
}

/// What stands at a name that should be a directory.
enum Step {
    Directory(OwnedFd),
    Link(Vec<u8>),
    Other,
    Nothing,
}

#[derive(Debug)]
pub(super) struct Dirs {
    dirs: Vec<Dir>,
    open: VecDeque<Node>,
    last: Option<(Vec<u8>, Node)>,
    /// Links that some path of the archive led through.
    followed: HashSet<(Node, Box<[u8]>)>,
    style: ApplyStyle,
    depth_max: u64,
    replaced: bool,
    displaced: Option<EntryPath>,
    tell_before_displacing: bool,
}

impl Dirs {
    pub(super) fn new(root: BorrowedFd<'_>, style: ApplyStyle, limits: &Limits) -> Result<Self, ApplyError> {
        let open = || {
            let fd = rustix::fs::openat(root, ".", sys::DIRECTORY, Mode::empty())?;
            let origin = match style {
                ApplyStyle::Layer => Origin::Implied,
                ApplyStyle::Merged | ApplyStyle::Added { .. } => {
                    Origin::Existing { mtime: sys::mtime(&rustix::fs::fstat(&fd)?) }
                }
            };
            let acl_default = Subject::Fd(fd.as_fd()).get(xattr::ACL_DEFAULT)?.is_some();
            Ok((fd, origin, acl_default))
        };
        let (fd, origin, acl_default) = open().map_err(io_error("open", &EntryPath::root()))?;
        let root = Dir {
            parent: ROOT,
            name: Box::default(),
            fd: Some(Rc::new(fd)),
            origin,
            opaque: false,
            whiteouts: false,
            acl_default,
            touched: false,
            named: false,
            entered: false,
            live: true,
            depth: 0,
            subdirs: HashMap::new(),
            added: HashSet::new(),
        };
        Ok(Self {
            dirs: vec![root],
            open: VecDeque::new(),
            last: None,
            followed: HashSet::new(),
            style,
            depth_max: limits.path_depth,
            replaced: false,
            displaced: None,
            tell_before_displacing: false,
        })
    }

    pub(super) fn get(&self, node: Node) -> &Dir {
        &self.dirs[node]
    }

    pub(super) fn get_mut(&mut self, node: Node) -> &mut Dir {
        &mut self.dirs[node]
    }

    /// All directories that still are, parents first.
    pub(super) fn live(&self) -> impl DoubleEndedIterator<Item = Node> + use<> {
        let live: Vec<Node> = (0..self.dirs.len()).filter(|node| self.dirs[*node].live).collect();
        live.into_iter()
    }

    /// Where a directory really is, all links resolved.
    pub(super) fn path(&self, mut node: Node) -> EntryPath {
        let mut names = Vec::new();
        while node != ROOT {
            names.push(&self.dirs[node].name);
            node = self.dirs[node].parent;
        }
        names.into_iter().rev().fold(EntryPath::root(), |path, name| path.join(name))
    }

    /// The subdirectory of that name, if the archive led there already.
    pub(super) fn child(&self, node: Node, name: &[u8]) -> Option<Node> {
        self.dirs[node].subdirs.get(name).copied()
    }

    pub(super) fn children(&self, node: Node) -> impl Iterator<Item = Node> {
        self.dirs[node].subdirs.values().copied()
    }

    /// Notes that the archive put a name here that is no directory.
    pub(super) fn note_added(&mut self, node: Node, name: &[u8]) {
        self.dirs[node].touched = true;
        if self.style != ApplyStyle::Layer {
            self.dirs[node].added.insert(name.into());
        }
    }

    pub(super) fn is_added(&self, node: Node, name: &[u8]) -> bool {
        self.dirs[node].added.contains(name)
    }

    /// Whether the archive says that a directory, or one below it, is there.
    pub(super) fn holds_own(&self, node: Node) -> bool {
        let mut pending = vec![node];
        while let Some(node) = pending.pop() {
            let dir = &self.dirs[node];
            if dir.named || !matches!(dir.origin, Origin::Existing { .. }) {
                return true;
            }
            pending.extend(dir.subdirs.values());
        }
        false
    }

    /// A directory at or below `top` that is here for the sake of marks alone. Over a file of a lower layer they do
    /// nothing, so whether it is there is for that layer to say.
    pub(super) fn doubtful(&self, top: Node) -> Option<Node> {
        let mut subtree = vec![top];
        let mut at = 0;
        while let Some(node) = subtree.get(at) {
            subtree.extend(self.dirs[*node].subdirs.values());
            at += 1;
        }
        let mut sure = HashSet::new();
        // Those below come first: what holds a sure one is sure.
        subtree.into_iter().rev().find(|node| {
            let dir = &self.dirs[*node];
            let is_sure = dir.entered || dir.origin != Origin::Implied || sure.contains(node);
            if is_sure {
                sure.insert(dir.parent);
            }
            !is_sure
        })
    }

    /// Deletes a name and all below it, to make room or because a whiteout says so. Nothing there
    /// is fine.
    pub(super) fn clear(&mut self, node: Node, name: &[u8]) -> Result<(), ApplyError> {
        let outer = self.fd(node)?;
        let outer = (*outer).as_fd();
        let failed = |dirs: &Self, error| io_error("remove", &dirs.path(node).join(name))(error);
        let Some(stat) = sys::stat_if_exists(outer, name).map_err(|error| failed(self, error))? else {
            return Ok(());
        };
        let kind = sys::kind(&stat);
        let ours = self.style == ApplyStyle::Layer || self.is_added(node, name);
        let had_content = ours && kind == FileType::RegularFile && stat.st_size > 0;
        if self.tell_before_displacing && (had_content || self.is_way(node, name, kind)) {
            return Err(ApplyError::Displaces { path: self.path(node).join(name) });
        }
        match kind {
            FileType::Directory => tree::remove(outer, name),
            _ => rustix::fs::unlinkat(outer, name, AtFlags::empty()),
        }
        .map_err(|error| failed(self, error))?;
        self.replaced |= ours || kind == FileType::Directory;
        if self.forget(node, name, kind) || had_content {
            self.displaced = Some(self.path(node).join(name));
        }
        Ok(())
    }

    /// Whether to fail with [`ApplyError::Displaces`] before content of this archive goes, instead of saying so after.
    pub(super) fn tell_before_displacing(&mut self, tell: bool) {
        self.tell_before_displacing = tell;
    }

    /// Whether a path of the archive led through a name, a directory's or a link's.
    fn is_way(&self, node: Node, name: &[u8], kind: FileType) -> bool {
        match kind {
            FileType::Directory => self.child(node, name).is_some(),
            FileType::Symlink => self.followed.contains(&(node, name.into())),
            _ => false,
        }
    }

    /// A path at which this archive put content that is no longer there, if that happened since
    /// the last call.
    pub(super) fn take_displaced(&mut self) -> Option<EntryPath> {
        self.displaced.take()
    }

    /// Whether anything that this archive made was deleted again.
    pub(super) fn replaced(&self) -> bool {
        self.replaced
    }

    /// Forgets a name that went away. Says whether a path of the archive led through it.
    fn forget(&mut self, node: Node, name: &[u8], kind: FileType) -> bool {
        self.dirs[node].touched = true;
        self.dirs[node].added.remove(name);
        if !matches!(kind, FileType::Directory | FileType::Symlink) {
            return false;
        }
        self.last = None;
        let mut pending: Vec<Node> = self.dirs[node].subdirs.remove(name).into_iter().collect();
        let was_path = !pending.is_empty() || self.followed.remove(&(node, name.into()));
        while let Some(node) = pending.pop() {
            let dir = &mut self.dirs[node];
            dir.live = false;
            dir.fd = None;
            dir.added = HashSet::new();
            pending.extend(std::mem::take(&mut dir.subdirs).into_values());
        }
        was_path
    }

    /// A descriptor of a directory.
    pub(super) fn fd(&mut self, node: Node) -> Result<Rc<OwnedFd>, ApplyError> {
        if let Some(fd) = &self.dirs[node].fd {
            return Ok(Rc::clone(fd));
        }
        let mut closed = vec![node];
        let mut fd = loop {
            let outer = self.dirs[closed[closed.len() - 1]].parent;
            match &self.dirs[outer].fd {
                Some(fd) => break Rc::clone(fd),
                None => closed.push(outer),
            }
        };
        for node in closed.into_iter().rev() {
            let inner = sys::open_dir((*fd).as_fd(), &self.dirs[node].name);
            fd = Rc::new(inner.map_err(|error| io_error("open", &self.path(node))(error))?);
            self.hold(node, Rc::clone(&fd));
        }
        Ok(fd)
    }

    fn hold(&mut self, node: Node, fd: Rc<OwnedFd>) {
        self.dirs[node].fd = Some(fd);
        self.open.push_back(node);
        if self.open.len() > HELD
            && let Some(oldest) = self.open.pop_front()
        {
            self.dirs[oldest].fd = None;
        }
    }

    /// Takes up a directory that stands on disk, just made or found.
    pub(super) fn adopt(&mut self, parent: Node, name: &[u8], fd: OwnedFd, origin: Origin) -> Result<Node, ApplyError> {
        let depth = self.dirs[parent].depth + 1;
        LimitExceeded::check("path_depth", self.depth_max, depth, "directories", Some(name))
            .map_err(ApplyError::Limit)?;
        let acl_default = match origin {
            Origin::Existing { .. } => Subject::Fd(fd.as_fd()).get(xattr::ACL_DEFAULT),
            _ => Ok(None),
        };
        let acl_default =
            acl_default.map_err(|error| io_error("read attributes of", &self.path(parent).join(name))(error))?;
        let node = self.dirs.len();
        self.dirs.push(Dir {
            parent,
            name: name.into(),
            fd: None,
            origin,
            opaque: false,
            whiteouts: false,
            acl_default: acl_default.is_some(),
            touched: false,
            named: false,
            entered: false,
            live: true,
            depth,
            subdirs: HashMap::new(),
            added: HashSet::new(),
        });
        self.dirs[parent].subdirs.insert(name.into(), node);
        self.hold(node, Rc::new(fd));
        Ok(node)
    }

    /// Makes a directory that nobody described. `EEXIST` comes back as such.
    fn make(&mut self, parent: Node, name: &[u8], origin: Origin) -> Result<Result<Node, Errno>, ApplyError> {
        let outer = self.fd(parent)?;
        match rustix::fs::mkdirat(&*outer, name, sys::mode(IMPLIED_MODE)) {
            Ok(()) => {}
            Err(Errno::EXIST) => return Ok(Err(Errno::EXIST)),
            Err(error) => return Err(io_error("make directory", &self.path(parent).join(name))(error)),
        }
        self.dirs[parent].touched = true;
        let inherits_acl = self.dirs[parent].acl_default;
        let settle = || {
            let fd = sys::open_dir((*outer).as_fd(), name)?;
            if inherits_acl {
                super::strip_acls(Subject::Fd(fd.as_fd()))?;
            }
            let stat = rustix::fs::fstat(&fd)?;
            super::own_fd(fd.as_fd(), &stat, 0, 0)?;
            if sys::mode_bits(&stat) != IMPLIED_MODE {
                rustix::fs::fchmod(&fd, sys::mode(IMPLIED_MODE))?;
            }
            Ok(fd)
        };
        let fd = settle().map_err(|error| io_error("make directory", &self.path(parent).join(name))(error))?;
        self.adopt(parent, name, fd, origin).map(Ok)
    }

    /// The directory of that name, made if it is not there; says whether it is new. Whatever else
    /// stands there goes.
    pub(super) fn ensure(&mut self, parent: Node, name: &[u8]) -> Result<(Node, bool), ApplyError> {
        if let Some(child) = self.child(parent, name) {
            return Ok((child, false));
        }
        if let Ok(made) = self.make(parent, name, Origin::Implied)? {
            return Ok((made, true));
        }
        match self.look(parent, name)? {
            Step::Directory(fd) => {
                let stat =
                    rustix::fs::fstat(&fd).map_err(|error| io_error("read", &self.path(parent).join(name))(error))?;
                Ok((self.adopt(parent, name, fd, Origin::Existing { mtime: sys::mtime(&stat) })?, false))
            }
            Step::Link(_) | Step::Other | Step::Nothing => Ok((self.make_over(parent, name)?, true)),
        }
    }

    /// Makes a directory in place of something that is no directory: what lower layers have at
    /// this name stays hidden, and its metadata is our own.
    fn make_over(&mut self, parent: Node, name: &[u8]) -> Result<Node, ApplyError> {
        self.clear(parent, name)?;
        let made = self.make(parent, name, Origin::Explicit { mtime: EPOCH, late_mode: None })?;
        let node = made.map_err(|error| io_error("make directory", &self.path(parent).join(name))(error))?;
        self.set_opaque(node)?;
        Ok(node)
    }

    /// From here on a directory hides what lower layers have in it. In a merged tree there is
    /// nothing to write: what it hides was deleted.
    pub(super) fn set_opaque(&mut self, node: Node) -> Result<(), ApplyError> {
        if self.style == ApplyStyle::Layer && !self.dirs[node].opaque {
            let fd = self.fd(node)?;
            Subject::Fd((*fd).as_fd())
                .set(xattr::OPAQUE, b"y")
                .map_err(|error| io_error("mark as opaque", &self.path(node))(error))?;
        }
        self.dirs[node].opaque = true;
        Ok(())
    }

    /// Tells overlayfs that a directory of a layer has whiteouts in it.
    pub(super) fn set_whiteouts(&mut self, node: Node) -> Result<(), ApplyError> {
        if !self.dirs[node].whiteouts {
            let fd = self.fd(node)?;
            Subject::Fd((*fd).as_fd())
                .set(xattr::ORIGIN, b"")
                .map_err(|error| io_error("mark as holding whiteouts", &self.path(node))(error))?;
            self.dirs[node].whiteouts = true;
        }
        Ok(())
    }

    /// The directory at `raw`, resolved as if chrooted. `entry` names it in errors.
    ///
    /// Something on the way that is neither a directory nor a link is replaced when directories
    /// may be created: the archive says that there is a directory, and later entries win.
    pub(super) fn resolve(
        &mut self,
        raw: &[u8],
        missing: Missing,
        entry: &EntryPath,
    ) -> Result<Option<Node>, ApplyError> {
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
        self.dirs[node].named |= missing != Missing::Tell;
        self.dirs[node].entered |= missing == Missing::Create;
        Ok(Some(node))
    }

    fn walk(&mut self, raw: &[u8], missing: Missing, entry: &EntryPath) -> Result<Option<Node>, ApplyError> {
        let mut at = ROOT;
        let mut links = 0;
        // What is still to go, after links have been put in their place; and where we are in it.
        let mut expanded: Option<Vec<u8>> = None;
        let mut position = 0;
        loop {
            let rest = &expanded.as_deref().unwrap_or(raw)[position..];
            let slashes = rest.iter().take_while(|byte| **byte == b'/').count();
            let rest = &rest[slashes..];
            if rest.is_empty() {
                return Ok(Some(at));
            }
            let length = rest.iter().position(|byte| *byte == b'/').unwrap_or(rest.len());
            let name = &rest[..length];
            position += slashes + length;
            match name {
                b"." => continue,
                b".." => {
                    at = self.dirs[at].parent;
                    continue;
                }
                _ => {}
            }
            if let Some(child) = self.child(at, name) {
                at = child;
                continue;
            }
            // The name is only borrowed from `expanded`, which a link replaces.
            let name = name.to_vec();
            at = match self.look(at, &name)? {
                Step::Directory(fd) => {
                    let stat = rustix::fs::fstat(&fd).map_err(io_error("read", entry))?;
                    self.adopt(at, &name, fd, Origin::Existing { mtime: sys::mtime(&stat) })?
                }
                Step::Link(mut target) => {
                    links += 1;
                    if links > LINKS {
                        return Err(super::refuse(entry, super::Refusal::TooManyLinks));
                    }
                    self.followed.insert((at, name.into()));
                    if target.first() == Some(&b'/') {
                        at = ROOT;
                    }
                    target.extend_from_slice(&expanded.as_deref().unwrap_or(raw)[position..]);
                    expanded = Some(target);
                    position = 0;
                    continue;
                }
                Step::Nothing if missing == Missing::Tell => return Ok(None),
                Step::Other if missing == Missing::Tell => return Ok(None),
                Step::Other if missing == Missing::CreateBesideFiles && !self.is_taken_away(at, &name)? => {
                    return Ok(None);
                }
                Step::Nothing => {
                    self.make(at, &name, Origin::Implied)?.map_err(|error| io_error("make directory", entry)(error))?
                }
                Step::Other => self.make_over(at, &name)?,
            };
        }
    }

    /// Whether a layer has a whiteout at a name: nothing of the layers below is there any more, and a directory may be.
    fn is_taken_away(&mut self, node: Node, name: &[u8]) -> Result<bool, ApplyError> {
        let outer = self.fd(node)?;
        let stat = sys::stat_at((*outer).as_fd(), name);
        let stat = stat.map_err(|error| io_error("read", &self.path(node).join(name))(error))?;
        Ok(self.style == ApplyStyle::Layer && sys::is_whiteout(&stat))
    }

    fn look(&mut self, node: Node, name: &[u8]) -> Result<Step, ApplyError> {
        let outer = self.fd(node)?;
        let outer = (*outer).as_fd();
        let step = || match sys::open_dir(outer, name) {
            Ok(fd) => Ok(Step::Directory(fd)),
            Err(Errno::NOENT) => Ok(Step::Nothing),
            Err(Errno::NOTDIR | Errno::LOOP) => match sys::read_link(outer, name) {
                Ok(target) => Ok(Step::Link(target)),
                Err(Errno::INVAL) => Ok(Step::Other),
                Err(error) => Err(error),
            },
            Err(error) => Err(error),
        };
        step().map_err(|error| io_error("open", &self.path(node).join(name))(error))
    }
}
