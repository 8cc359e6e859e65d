//! One entry of a tree after the other, in byte order, with what hashing and copying need to know.
//!
//! Nothing is followed, nothing but a regular file is opened for reading, and a directory as deep as [`DEPTH_MAX`] needs
//! no more open files than a flat one.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use plies_archive::tree::{Descent, Names};
use rustix::fs::{FileType, OFlags, Stat};
use rustix::io::Errno;

use super::inroot::{self, Resolved};
use super::patterns::{Patterns, Verdict};

/// How many directories may lie inside one another: four times what a path of the kernel's `PATH_MAX` can say. A process
/// can make deeper ones, and coming back up out of `n` of them costs `n²/64` steps.
pub const DEPTH_MAX: usize = 8_192;

/// The largest value of an extended attribute (`XATTR_SIZE_MAX`) and of a list of names (`XATTR_LIST_MAX`), in bytes.
const XATTR_BYTES_MAX: usize = 64 << 10;

/// Extended attributes, sorted by name.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// Something on the way.
#[derive(Debug, Clone, Copy)]
pub struct Found<'a> {
    /// Relative to where the walk began; empty for that itself.
    pub path: &'a [u8],
    /// What the kernel says about it.
    pub stat: &'a Stat,
    /// Of the thing itself, never of what it links to. A directory's is readable, all others are path handles.
    handle: BorrowedFd<'a>,
}

impl Found<'_> {
    /// Its type.
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    /// The last component of its path.
    pub fn name(&self) -> &[u8] {
        self.path.rsplit(|byte| *byte == b'/').next().unwrap_or_default()
    }

    /// The text of a symbolic link.
    ///
    /// # Errors
    /// As `readlinkat(2)`.
    pub fn link(&self) -> io::Result<Vec<u8>> {
        inroot::read_link(self.handle, b"")
    }

    /// Opens a regular file. What is at the path by then doesn't matter: it is opened by handle.
    ///
    /// # Errors
    /// As `open(2)`.
    pub fn open(&self) -> io::Result<OwnedFd> {
        debug_assert_eq!(self.kind(), FileType::RegularFile);
        inroot::reopen(self.handle, OFlags::RDONLY | OFlags::NOATIME)
            // Only owners may leave the access time alone.
            .or_else(|_| inroot::reopen(self.handle, OFlags::RDONLY))
    }

    /// The extended attributes whose names `keep` wants, sorted by name.
    ///
    /// # Errors
    /// As `listxattr(2)` and `getxattr(2)`.
    pub fn xattrs(&self, keep: impl Fn(&[u8]) -> bool) -> io::Result<Xattrs> {
        // A path handle has no attributes of its own, but its name in /proc leads to the file, and no further.
        let path = inroot::fd_path(self.handle);
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
        for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty() && keep(name)) {
            let mut value = vec![0; XATTR_BYTES_MAX];
            match rustix::fs::getxattr(path.as_str(), name, &mut value[..]) {
                Ok(length) => {
                    value.truncate(length);
                    value.shrink_to_fit();
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

/// Why a walk can't go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WalkError {
    /// Something can't be read.
    #[error("{op} {}", path.escape_ascii())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what: the walk's base, and the path below it.
        path: Vec<u8>,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The tree is too deep.
    #[error("{}: more than {max} directories inside one another", path.escape_ascii())]
    TooDeep {
        /// The first directory that is too deep.
        path: Vec<u8>,
        /// The limit.
        max: usize,
    },
}

/// Whether what is in a directory is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Go in; [`Visitor::leave`] follows.
    Into,
    /// Go on behind it; nothing below it is told, and [`Visitor::leave`] isn't either.
    Over,
}

/// What a walk tells about.
pub trait Visitor {
    /// Why it may stop.
    type Error: From<WalkError>;

    /// A directory, before what is in it.
    ///
    /// # Errors
    /// The visitor's own.
    fn enter(&mut self, found: &Found<'_>) -> Result<Step, Self::Error>;

    /// The same directory, after what is in it.
    ///
    /// # Errors
    /// The visitor's own.
    fn leave(&mut self, found: &Found<'_>) -> Result<(), Self::Error>;

    /// Anything else. Sockets are passed over: they mean nothing without their process, and no layer holds them.
    ///
    /// # Errors
    /// The visitor's own.
    fn leaf(&mut self, found: &Found<'_>) -> Result<(), Self::Error>;
}

/// What patterns do to what they match.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// It is shown, and the rest is not.
    Matching,
    /// It is hidden.
    Others,
}

/// Patterns that show or hide.
#[derive(Debug, Clone, Copy)]
pub struct Rule<'a> {
    /// The patterns.
    pub patterns: &'a Patterns,
    /// What they do.
    pub keep: Keep,
    /// What their paths begin with, where the walk begins. What they say about the directories on that way counts below.
    pub base: &'a [u8],
}

impl Rule<'_> {
    fn at_start(&self) -> Verdict {
        self.patterns.verdict_on_path(self.base)
    }

    fn verdict(&self, path: &[u8], above: &Verdict) -> Verdict {
        if self.base.is_empty() {
            self.patterns.verdict(path, above)
        } else {
            self.patterns.verdict(&join(self.base, path), above)
        }
    }

    fn hides(&self, verdict: &Verdict) -> bool {
        verdict.matches == (self.keep == Keep::Others)
    }

    /// Whether everything below something hidden is hidden too, so that nobody need look.
    fn hides_all_below(&self, path: &[u8], verdict: &Verdict) -> bool {
        self.hides(verdict)
            && match self.keep {
                Keep::Others => !self.patterns.has_negation(),
                Keep::Matching => !self.patterns.may_match_below(&join(self.base, path)),
            }
    }
}

/// How a tree is walked.
#[derive(Debug)]
pub struct Walk<'a> {
    /// Where it begins, for messages.
    pub base: &'a [u8],
    /// What is shown. A directory that is hidden itself appears when something below it is shown.
    pub rules: Vec<Rule<'a>>,
    /// Where it begins is told, whatever the rules say.
    pub shows_start: bool,
    /// Somebody may change the tree meanwhile: what is gone since it was listed was never there. Otherwise it is an error.
    pub is_live: bool,
    /// How many directories may lie inside one another.
    pub depth_max: usize,
}

struct Frame {
    names: Names,
    stat: Stat,
    /// Length of the directory's path.
    path_len: usize,
    /// The visitor was told.
    entered: bool,
    /// What each rule says about it.
    verdicts: Vec<Verdict>,
}

impl Walk<'_> {
    fn error<E: Into<io::Error>>(&self, op: &'static str, path: &[u8]) -> impl FnOnce(E) -> WalkError + use<E> {
        let path = if path.is_empty() { self.base.to_vec() } else { join(self.base, path) };
        move |source| WalkError::Io { op, path, source: source.into() }
    }

    /// Walks what `from` leads to, itself first.
    ///
    /// # Errors
    /// The visitor's, [`WalkError`] among them.
    pub fn run<V: Visitor>(&self, from: &Resolved, visitor: &mut V) -> Result<(), V::Error> {
        let verdicts: Vec<_> = self.rules.iter().map(Rule::at_start).collect();
        let hidden = !self.shows_start && self.rules.iter().zip(&verdicts).any(|(rule, verdict)| rule.hides(verdict));
        if let Some(name) = &from.name {
            let handle = inroot::open_handle(from.dir(), name).map_err(self.error("open", b""))?;
            let stat = rustix::fs::fstat(&handle).map_err(self.error("stat", b""))?;
            let found = Found { path: b"", stat: &stat, handle: handle.as_fd() };
            return match found.kind() {
                // It was none when the path was resolved.
                FileType::Directory => Err(self.error("walk", b"")(Errno::AGAIN).into()),
                FileType::Socket => Ok(()),
                _ if hidden => Ok(()),
                _ => visitor.leaf(&found),
            };
        }
        let dir = inroot::reopen_dir(from.dir()).map_err(self.error("open", b""))?;
        let stat = rustix::fs::fstat(&dir).map_err(self.error("stat", b""))?;
        if !hidden {
            let found = Found { path: b"", stat: &stat, handle: dir.as_fd() };
            if visitor.enter(&found)? == Step::Over {
                return Ok(());
            }
        }
        let names = Names::sorted(dir.as_fd()).map_err(self.error("list", b""))?;
        let mut frames = vec![Frame { names, stat, path_len: 0, entered: !hidden, verdicts }];
        let mut descent = Descent::from(dir);
        // Of what is looked at; a directory's own path is its beginning.
        let mut path = Vec::new();
        while let Some(frame) = frames.last_mut() {
            path.truncate(frame.path_len);
            let Some((name, listed_as)) = frame.names.advance() else {
                let frame = frames.pop().expect("because there is one");
                if frame.entered {
                    visitor.leave(&Found { path: &path, stat: &frame.stat, handle: descent.here() })?;
                }
                if !frames.is_empty() {
                    descent.leave().map_err(self.error("come back from", &path))?;
                }
                continue;
            };
            if !path.is_empty() {
                path.push(b'/');
            }
            let name_at = path.len();
            path.extend_from_slice(name);
            let verdicts: Vec<_> =
                self.rules.iter().zip(&frame.verdicts).map(|(rule, above)| rule.verdict(&path, above)).collect();
            let judged = || self.rules.iter().zip(&verdicts);
            if judged().any(|(rule, verdict)| rule.hides_all_below(&path, verdict)) {
                continue;
            }
            let hidden = judged().any(|(rule, verdict)| rule.hides(verdict));
            if hidden && !matches!(listed_as, FileType::Directory | FileType::Unknown) {
                continue;
            }
            let handle = match inroot::open_handle(descent.here(), &path[name_at..]) {
                Err(error) if self.is_live && error.kind() == io::ErrorKind::NotFound => continue,
                other => other.map_err(self.error("open", &path))?,
            };
            let stat = rustix::fs::fstat(&handle).map_err(self.error("stat", &path))?;
            let kind = FileType::from_raw_mode(stat.st_mode);
            if hidden && kind != FileType::Directory || kind == FileType::Socket {
                continue;
            }
            if !hidden {
                self.show(&mut frames, &descent, &path, visitor)?;
            }
            if kind != FileType::Directory {
                visitor.leaf(&Found { path: &path, stat: &stat, handle: handle.as_fd() })?;
                continue;
            }
            if frames.len() >= self.depth_max {
                return Err(WalkError::TooDeep { path: join(self.base, &path), max: self.depth_max }.into());
            }
            let dir = inroot::reopen_dir(handle.as_fd()).map_err(self.error("open", &path))?;
            if !hidden {
                let found = Found { path: &path, stat: &stat, handle: dir.as_fd() };
                if visitor.enter(&found)? == Step::Over {
                    continue;
                }
            }
            let names = Names::sorted(dir.as_fd()).map_err(self.error("list", &path))?;
            descent.push(dir, &path[name_at..]);
            frames.push(Frame { names, stat, path_len: path.len(), entered: !hidden, verdicts });
        }
        Ok(())
    }

    /// Tells of the directories on the way to something that is shown.
    fn show<V: Visitor>(
        &self,
        frames: &mut [Frame],
        descent: &Descent,
        path: &[u8],
        visitor: &mut V,
    ) -> Result<(), V::Error> {
        // What lies in a directory that was entered was entered or is to be: the rest are the innermost ones.
        let first = frames.iter().rposition(|frame| frame.entered).map_or(0, |last| last + 1);
        let mut above: Option<OwnedFd> = None;
        for (level, frame) in frames.iter_mut().enumerate().skip(first) {
            let path = &path[..frame.path_len];
            let dir = descent.open_level(level, above.as_ref().map(AsFd::as_fd)).map_err(self.error("open", path))?;
            // Nobody can step over what something shown lies in.
            visitor.enter(&Found { path, stat: &frame.stat, handle: dir.as_fd() })?;
            frame.entered = true;
            above = Some(dir);
        }
        Ok(())
    }
}

/// A name below a directory; both relative, the directory's empty for the root.
pub fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    match (dir.is_empty(), name.is_empty()) {
        (true, _) => name.to_vec(),
        (_, true) => dir.to_vec(),
        _ => [dir, b"/", name].concat(),
    }
}
