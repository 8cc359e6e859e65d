//! Everything below a source, in byte order, with what copying and hashing need to know.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, OFlags, Stat};
use rustix::io::Errno;

use super::Tree;
use super::inroot;
use super::select::{Selected, SelectedKind, Selection, join};
use crate::dockerfile::{Ignore, Verdict};

/// How deep a source may be, in directories below it: each costs two open files. Paths of that depth don't fit the
/// kernel's `PATH_MAX` with names of four characters.
const DEPTH_MAX: usize = 200;

/// The largest value of an extended attribute (`XATTR_SIZE_MAX`) and of a list of names (`XATTR_LIST_MAX`), in bytes.
const XATTR_BYTES_MAX: usize = 64 << 10;

/// Something on the way through a source.
#[derive(Debug)]
pub(super) struct Found {
    /// Relative to the source; empty for the source itself.
    pub(super) path: Vec<u8>,
    /// A handle of the thing itself, never of what it links to.
    pub(super) handle: OwnedFd,
    pub(super) stat: Stat,
    /// Another name of a file that came earlier in the same source: that name.
    pub(super) link_to: Option<Vec<u8>>,
}

impl Found {
    pub(super) fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    /// The text of a symbolic link.
    pub(super) fn link(&self) -> io::Result<Vec<u8>> {
        inroot::read_link(self.handle.as_fd(), b"")
    }

    /// A regular file's bytes. What is at the path by then doesn't matter: it is opened by handle.
    pub(super) fn open(&self) -> io::Result<OwnedFd> {
        debug_assert_eq!(self.kind(), FileType::RegularFile);
        inroot::reopen(self.handle.as_fd(), OFlags::RDONLY | OFlags::NOATIME)
            // Only owners may leave the access time alone.
            .or_else(|_| inroot::reopen(self.handle.as_fd(), OFlags::RDONLY))
    }

    /// The extended attributes that belong to the file, sorted by name. What the host's security modules or overlay
    /// mounts put there does not.
    pub(super) fn xattrs(&self) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
        // A path handle has no attributes of its own, but its name in /proc leads to the file. For a link that would be
        // the file it points to; links carry only what we drop anyway.
        if self.kind() == FileType::Symlink {
            return Ok(Vec::new());
        }
        let path = inroot::fd_path(self.handle.as_fd());
        // Nearly all files have none: no large buffer for those.
        let mut names = vec![0; 256];
        let length = loop {
            match rustix::fs::listxattr(path.as_str(), &mut names[..]) {
                Ok(length) => break length,
                Err(Errno::RANGE) if names.len() < XATTR_BYTES_MAX => names.resize(XATTR_BYTES_MAX, 0),
                Err(Errno::NOTSUP) => return Ok(Vec::new()),
                Err(error) => return Err(error.into()),
            }
        };
        let mut xattrs = Vec::new();
        for name in names[..length].split(|byte| *byte == 0).filter(|name| kept_xattr(name)) {
            let mut value = vec![0; XATTR_BYTES_MAX];
            match rustix::fs::getxattr(path.as_str(), name, &mut value[..]) {
                Ok(length) => {
                    value.truncate(length);
                    xattrs.push((name.to_vec(), value));
                }
                // Gone since it was listed.
                Err(Errno::NODATA) => {}
                Err(error) => return Err(error.into()),
            }
        }
        xattrs.sort_unstable();
        Ok(xattrs)
    }
}

fn kept_xattr(name: &[u8]) -> bool {
    let dropped: [&[u8]; 6] =
        [b"security.selinux", b"security.ima", b"security.evm", b"security.apparmor", b"trusted.", b"user.overlay."];
    !name.is_empty() && !dropped.iter().any(|prefix| name.starts_with(prefix))
}

/// What went wrong where: `path` is relative to the tree.
#[derive(Debug)]
pub(super) struct WalkError {
    pub(super) op: &'static str,
    pub(super) path: Vec<u8>,
    pub(super) source: io::Error,
}

/// What a walk tells about.
pub(super) trait Visitor {
    type Error: From<WalkError>;
    /// A directory, before what is in it.
    fn enter(&mut self, found: &Found) -> Result<(), Self::Error>;
    /// The same directory, after what is in it.
    fn leave(&mut self, found: &Found) -> Result<(), Self::Error>;
    /// Anything else. Sockets are passed over: they mean nothing without their process.
    fn leaf(&mut self, found: &Found) -> Result<(), Self::Error>;
}

/// Walks one source of a selection. Hidden and excluded things are left out; a directory that is hidden itself appears
/// when something below it is shown.
pub(super) fn walk<V: Visitor>(
    tree: &Tree,
    selection: &Selection,
    item: &Selected,
    visitor: &mut V,
) -> Result<(), V::Error> {
    let SelectedKind::Tree { path, .. } = &item.kind else { return Ok(()) };
    let error = |op| move |source| WalkError { op, path: path.clone(), source };
    let handle = inroot::open(tree.as_fd(), path, OFlags::PATH | OFlags::NOFOLLOW).map_err(error("open"))?;
    let stat = rustix::fs::fstat(&handle).map_err(io::Error::from).map_err(error("stat"))?;
    let mut walk =
        Walk { base: path, ignore: tree.ignore.as_ref(), excludes: selection.excludes.as_ref(), links: HashMap::new() };
    let root = Found { path: Vec::new(), handle, stat, link_to: None };
    if root.kind() != FileType::Directory {
        // An excluded file is excluded by its name.
        if walk.excludes.is_some_and(|excludes| excludes.hides(&item.name)) || root.kind() == FileType::Socket {
            return Ok(());
        }
        return visitor.leaf(&root);
    }
    visitor.enter(&root)?;
    // What the rules say about the directories above the source counts below it.
    let mut above = Verdict::default();
    if let Some(ignore) = walk.ignore
        && !path.is_empty()
    {
        let slashes = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| at);
        for end in slashes.chain([path.len()]) {
            above = ignore.verdict(&path[..end], &above);
        }
    }
    let mut frames = vec![Frame { found: root, entered: true, ignored: above, excluded: Verdict::default() }];
    walk.directory(&mut frames, visitor)?;
    let root = frames.pop().expect("the walk leaves what it found");
    visitor.leave(&root.found)
}

struct Walk<'a> {
    base: &'a [u8],
    ignore: Option<&'a Ignore>,
    excludes: Option<&'a Ignore>,
    /// Files with several names, by device and inode.
    links: HashMap<(u64, u64), Vec<u8>>,
}

struct Frame {
    found: Found,
    /// The visitor was told.
    entered: bool,
    ignored: Verdict,
    excluded: Verdict,
}

impl Walk<'_> {
    /// Walks the directory of the last frame.
    fn directory<V: Visitor>(&mut self, frames: &mut Vec<Frame>, visitor: &mut V) -> Result<(), V::Error> {
        let frame = frames.last().expect("there is a directory to walk");
        let here = frame.found.path.clone();
        let base = self.base;
        let error = |op, path: &[u8]| {
            let path = if path.is_empty() { base.to_vec() } else { join(base, path) };
            move |source: io::Error| WalkError { op, path, source }
        };
        if frames.len() > DEPTH_MAX {
            let source = io::Error::other(format!("more than {DEPTH_MAX} directories inside one another"));
            return Err(error("walk", &here)(source).into());
        }
        let dir = inroot::reopen_dir(frame.found.handle.as_fd()).map_err(error("open", &here))?;
        for name in inroot::names(dir.as_fd()).map_err(error("list", &here))? {
            let path = join(&here, &name);
            let frame = frames.last().expect("the directory being walked");
            let judge = |rules: Option<&Ignore>, path: &[u8], above: &Verdict| {
                rules.map_or_else(Verdict::default, |rules| rules.verdict(path, above))
            };
            let ignored = judge(self.ignore, &join(base, &path), &frame.ignored);
            let excluded = judge(self.excludes, &path, &frame.excluded);
            let hidden = ignored.hidden || excluded.hidden;
            let final_word = |rules: Option<&Ignore>, verdict: &Verdict| {
                verdict.hidden && !rules.is_some_and(Ignore::may_show_again)
            };
            if final_word(self.ignore, &ignored) || final_word(self.excludes, &excluded) {
                continue;
            }
            let Some(mut found) = find(dir.as_fd(), &name, path).map_err(|(op, path, e)| error(op, &path)(e))? else {
                continue;
            };
            let kind = found.kind();
            if hidden && kind != FileType::Directory || kind == FileType::Socket {
                continue;
            }
            if !hidden {
                for frame in frames.iter_mut().filter(|frame| !frame.entered) {
                    visitor.enter(&frame.found)?;
                    frame.entered = true;
                }
            }
            if kind == FileType::Directory {
                if !hidden {
                    visitor.enter(&found)?;
                }
                frames.push(Frame { found, entered: !hidden, ignored, excluded });
                self.directory(frames, visitor)?;
                let frame = frames.pop().expect("the walk leaves what it found");
                if frame.entered {
                    visitor.leave(&frame.found)?;
                }
                continue;
            }
            if kind == FileType::RegularFile && found.stat.st_nlink > 1 {
                let key = (found.stat.st_dev, found.stat.st_ino);
                found.link_to = self.links.get(&key).cloned();
                self.links.entry(key).or_insert_with(|| found.path.clone());
            }
            visitor.leaf(&found)?;
        }
        Ok(())
    }
}

/// A name of a directory; `None` if it is gone since it was listed.
fn find(dir: BorrowedFd<'_>, name: &[u8], path: Vec<u8>) -> Result<Option<Found>, (&'static str, Vec<u8>, io::Error)> {
    let handle = match inroot::open_handle(dir, name) {
        Ok(handle) => handle,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(("open", path, error)),
    };
    match rustix::fs::fstat(&handle) {
        Ok(stat) => Ok(Some(Found { path, handle, stat, link_to: None })),
        Err(error) => Err(("stat", path, error.into())),
    }
}
