//! Making the upper directory of an overlay a canonical layer, in place.
//!
//! Overlayfs leaves marks that its own next mount understands but that mean nothing to another
//! stack: handles of origins and counters in attributes, whiteouts of names that only existed meanwhile,
//! opaque directories, files and directories about which nothing changed after all. Sealing takes one walk, which also tells
//! explicit directories from implied ones and counts what the layer costs. No file is copied, and none is read but those
//! that look in every way, to the nanosecond, as in the lower tree: what a `chmod -R` that changes nothing leaves, or a
//! file that was moved away and back.
//!
//! The directory must be unmounted and nobody else may use it. Sealing again what was sealed, over
//! the same lower tree, gives the same layer. After a crash the directory is half sealed; uppers of
//! dead processes are never trusted anyway.

use std::collections::HashSet;
use std::io;
use std::os::fd::BorrowedFd;

use plies_oci::ErrorKind;
use rustix::fs::{AtFlags, FileType, Mode, Stat};
use rustix::io::Result as SysResult;

use crate::diff::is_same_file;
use crate::index::{DirIndex, Implied, Usage};
use crate::sys::{self, Subject};
use crate::tar::EntryPath;
use crate::tree::{Below, Descent, Names};
use crate::xattr;

#[cfg(test)]
mod tests;

const REDIRECT: &[u8] = b"trusted.overlay.redirect";
const METACOPY: &[u8] = b"trusted.overlay.metacopy";
/// What makes an empty file a whiteout (Linux 6.7). An opaque mark `x` on its directory only spares the kernel work where it
/// lists one without such files: wherever it is, nobody can open it.
const WHITEOUT: &[u8] = b"trusted.overlay.whiteout";

/// What sealing found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sealed {
    /// What the layer costs.
    pub usage: Usage,
    /// Its implied directories: those that are in the lower tree with the same owner, mode, time
    /// and attributes. The root is one of them if nothing was changed about it.
    pub index: DirIndex,
}

/// Why an upper directory could not be sealed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SealError {
    /// A directory or file whose content lies elsewhere in the lower tree (mount with `redirect_dir=off` and
    /// `metacopy=off`), or whose owner and mode are in an attribute.
    #[error("{path} carries {mark}, so the layer alone does not say what it is")]
    NotSelfContained {
        /// Where.
        path: EntryPath,
        /// The attribute.
        mark: &'static str,
    },
    /// A name that one program takes for a mark and another for a file.
    #[error("{path} {why}")]
    Unclear {
        /// Where.
        path: EntryPath,
        /// What it is.
        why: &'static str,
    },
    /// The file system did not do its part.
    #[error("seal {path}")]
    Io {
        /// Where.
        path: EntryPath,
        /// The kernel's error.
        #[source]
        source: io::Error,
    },
}

impl SealError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotSelfContained { .. } | Self::Unclear { .. } => ErrorKind::FailedPrecondition,
            Self::Io { .. } => ErrorKind::Unavailable,
        }
    }
}

/// The tree below an upper directory, for a walk through that: what the layers below show together. Where they show
/// nothing, whatever is asked of it has no answer.
pub trait Lower {
    /// Steps along into the directory `name`; says whether this tree has one there.
    ///
    /// # Errors
    /// The kernel's, or the implementor's.
    fn enter(&mut self, name: &[u8]) -> io::Result<bool>;

    /// Steps back up.
    ///
    /// # Errors
    /// As [`Lower::enter`].
    fn leave(&mut self) -> io::Result<()>;

    /// A directory that looks as this tree shows the one where the walk stands; of what it holds nothing is said.
    ///
    /// # Errors
    /// As [`Lower::enter`].
    fn look(&mut self) -> io::Result<Option<BorrowedFd<'_>>>;

    /// The directory that holds what this tree shows at `name` where the walk stands, if it shows anything.
    ///
    /// # Errors
    /// As [`Lower::enter`].
    fn find(&mut self, name: &[u8]) -> io::Result<Option<BorrowedFd<'_>>>;

    /// The names that this tree shows where the walk stands.
    ///
    /// # Errors
    /// As [`Lower::enter`].
    fn names(&mut self) -> io::Result<Vec<Vec<u8>>>;
}

/// A tree that is mounted.
impl Lower for Below {
    fn enter(&mut self, name: &[u8]) -> io::Result<bool> {
        Ok(Self::enter(self, name)?)
    }

    fn leave(&mut self) -> io::Result<()> {
        Ok(Self::leave(self)?)
    }

    fn look(&mut self) -> io::Result<Option<BorrowedFd<'_>>> {
        Ok(self.here())
    }

    fn find(&mut self, name: &[u8]) -> io::Result<Option<BorrowedFd<'_>>> {
        Ok(self.stat(name)?.and(self.here()))
    }

    fn names(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let mut found = Vec::new();
        if let Some(dir) = self.here() {
            let mut names = Names::sorted(dir)?;
            while let Some((name, _)) = names.advance() {
                found.push(name.to_vec());
            }
        }
        Ok(found)
    }
}

/// One directory that is being sealed.
struct Frame {
    names: Names,
    stat: Stat,
    /// Names came or went, so its time has to be set back.
    changed: bool,
    /// Whiteouts stayed in it.
    whiteouts: bool,
    /// It was made anew where the lower tree has a directory: what that has and this does not was taken away.
    anew: bool,
    /// Nothing about it differs from the lower tree's.
    implied: bool,
    /// It says something: it hides, it is not implied, or something stayed in it.
    needed: bool,
}

/// Makes `upper` a canonical layer over `lower`, the merged tree of the layers below it, if any.
///
/// # Errors
/// [`SealError`]. The directory is still a valid upper then, for another try or a mount.
pub fn seal_upper(upper: BorrowedFd<'_>, lower: Option<BorrowedFd<'_>>) -> Result<Sealed, SealError> {
    let below = Below::new(lower).map_err(io_error(&EntryPath::root()))?;
    seal(upper, (below, lower.is_some()))
}

/// As [`seal_upper`], over a tree that need not be mounted and has a root.
///
/// # Errors
/// [`SealError`], also with what `lower` says.
pub fn seal_over(upper: BorrowedFd<'_>, lower: impl Lower) -> Result<Sealed, SealError> {
    seal(upper, (lower, true))
}

fn seal<L: Lower>(upper: BorrowedFd<'_>, (lower, has_root): (L, bool)) -> Result<Sealed, SealError> {
    let mut seal = Seal {
        upper: Descent::new(upper).map_err(io_error(&EntryPath::root()))?,
        lower,
        here: EntryPath::root(),
        linked: HashSet::new(),
        sealed: Sealed::default(),
    };
    let mut frames = vec![seal.directory(has_root, false)?];
    while let Some(frame) = frames.last_mut() {
        if let Some((name, _)) = frame.names.advance() {
            let name = name.to_vec();
            if let Some(inner) = seal.name(frame, &name)? {
                frames.push(inner);
            }
            continue;
        }
        let frame = frames.pop().expect("because it was just there");
        let needed = seal.leave(&frame)?;
        if let Some(outer) = frames.last_mut() {
            outer.needed |= needed;
            outer.changed |= !needed;
        }
    }
    Ok(seal.sealed)
}

fn io_error<E: Into<io::Error>>(path: &EntryPath) -> impl FnOnce(E) -> SealError + '_ {
    |error| SealError::Io { path: path.clone(), source: error.into() }
}

struct Seal<L> {
    upper: Descent,
    lower: L,
    here: EntryPath,
    linked: HashSet<(u64, u64)>,
    sealed: Sealed,
}

impl<L: Lower> Seal<L> {
    /// Cleans the directory where the walk stands, and says whether it is implied. `has_lower`:
    /// the lower tree has a directory there. `anew`: the directory around it was made anew, and so this one too.
    ///
    /// An opaque mark says that everything is hidden, whatever lies below; what is known is which names were taken
    /// away. So those get a whiteout each and the mark goes: over another tree, the layer takes away the same names and
    /// no others, as the layers of the other builders do.
    fn directory(&mut self, has_lower: bool, anew: bool) -> Result<Frame, SealError> {
        let subject = Subject::Fd(self.upper.here());
        let opaque = self.clean(subject, &self.here)?;
        let here = self.here.clone();
        let mut look = || -> io::Result<_> {
            let upper = self.upper.here();
            let stat = rustix::fs::fstat(upper)?;
            let mut implied = false;
            if has_lower && let Some(lower) = self.lower.look()? {
                implied = is_same(upper, &stat, lower)?;
            }
            if opaque.is_some() {
                Subject::Fd(upper).remove(xattr::OPAQUE)?;
            }
            // An opaque root would hide nothing: overlayfs always merges the roots of its layers.
            let anew = has_lower && (anew || (opaque.as_deref() == Some(b"y") && !here.is_root()));
            let mut hidden = false;
            for name in if anew { self.lower.names()? } else { Vec::new() } {
                if sys::stat_if_exists(upper, &name)?.is_none() {
                    rustix::fs::mknodat(upper, &name, FileType::CharacterDevice, Mode::empty(), 0)?;
                    hidden = true;
                }
            }
            let names = Names::sorted(upper)?;
            Ok((stat, implied, anew, hidden, names))
        };
        let (stat, implied, anew, hidden, names) = look().map_err(io_error(&here))?;
        Ok(Frame { names, stat, changed: hidden, whiteouts: false, anew, implied, needed: !implied || here.is_root() })
    }

    /// Finishes a directory and steps back up; says whether it stayed. One that changes nothing
    /// goes: an archive could not even name it.
    fn leave(&mut self, frame: &Frame) -> Result<bool, SealError> {
        let upper = self.upper.here();
        let finish = || -> SysResult<_> {
            if frame.whiteouts {
                Subject::Fd(upper).set(xattr::ORIGIN, b"")?;
            }
            if frame.changed && frame.needed {
                rustix::fs::futimens(upper, &sys::times(sys::mtime(&frame.stat)))?;
            }
            rustix::fs::fstat(upper)
        };
        let stat = finish().map_err(io_error(&self.here))?;
        if frame.needed {
            self.sealed.usage.add(&stat);
            if frame.implied {
                self.sealed.index.insert(self.here.clone(), Implied::CopiedUp);
            }
        }
        if let Some((outer, _)) = self.here.split() {
            let mut step = || -> io::Result<()> {
                let name = self.upper.leave()?;
                self.lower.leave()?;
                if !frame.needed {
                    rustix::fs::unlinkat(self.upper.here(), &name, AtFlags::REMOVEDIR)?;
                }
                Ok(())
            };
            step().map_err(io_error(&self.here))?;
            self.here = outer;
        }
        Ok(frame.needed)
    }

    /// Cleans one name of a directory; a frame if it is a directory itself.
    fn name(&mut self, frame: &mut Frame, name: &[u8]) -> Result<Option<Frame>, SealError> {
        let path = self.here.join(name);
        let stat = sys::stat_at(self.upper.here(), name).map_err(io_error(&path))?;
        if sys::kind(&stat) == FileType::Directory {
            self.upper.enter(name).map_err(io_error(&path))?;
            let has_lower = self.lower.enter(name).map_err(io_error(&path))?;
            self.here = path;
            return self.directory(has_lower, frame.anew).map(Some);
        }
        let subject = Subject::At(self.upper.here(), name);
        let as_file = sys::kind(&stat) == FileType::RegularFile
            && stat.st_size == 0
            && subject.get(WHITEOUT).map_err(io_error(&path))?.is_some();
        if as_file || sys::is_whiteout(&stat) {
            let hides = self.lower.find(name).map_err(io_error(&path))?.is_some();
            let upper = self.upper.here();
            if as_file || !hides {
                frame.changed = true;
                rustix::fs::unlinkat(upper, name, AtFlags::empty()).map_err(io_error(&path))?;
            }
            if as_file && hides {
                rustix::fs::mknodat(upper, name, FileType::CharacterDevice, Mode::empty(), 0)
                    .map_err(io_error(&path))?;
            }
            if !hides {
                return Ok(None);
            }
            frame.whiteouts = true;
        } else {
            self.clean(subject, &path)?;
            // Of several names that are one file, this one may be all that the layer has of it.
            if stat.st_nlink == 1 && self.is_as_below(name, &stat).map_err(io_error(&path))? {
                frame.changed = true;
                rustix::fs::unlinkat(self.upper.here(), name, AtFlags::empty()).map_err(io_error(&path))?;
                return Ok(None);
            }
        }
        frame.needed = true;
        let stat = sys::stat_at(self.upper.here(), name).map_err(io_error(&path))?;
        if stat.st_nlink == 1 || self.linked.insert((stat.st_dev, stat.st_ino)) {
            self.sealed.usage.add(&stat);
        }
        Ok(None)
    }

    /// Whether a name shows what the lower tree shows there: it was copied up, and nothing came of it.
    fn is_as_below(&mut self, name: &[u8], stat: &Stat) -> io::Result<bool> {
        let Some(lower) = self.lower.find(name)? else { return Ok(false) };
        let below = sys::stat_at(lower, name)?;
        Ok(is_same_file(&below, (lower, name), stat, (self.upper.here(), name))?)
    }

    /// Removes what overlayfs keeps for itself, the opaque mark aside, whose value it gives.
    fn clean(&self, subject: Subject<'_>, path: &EntryPath) -> Result<Option<Vec<u8>>, SealError> {
        let list = subject.list().map_err(io_error(path))?;
        let mut opaque = None;
        for name in xattr::names(&list) {
            for (mark, text) in [(REDIRECT, "trusted.overlay.redirect"), (METACOPY, "trusted.overlay.metacopy")] {
                if name == mark {
                    return Err(SealError::NotSelfContained { path: path.clone(), mark: text });
                }
            }
            if name == xattr::OPAQUE {
                opaque = subject.get(name).map_err(io_error(path))?;
            } else if name.starts_with(xattr::OVERLAY) || name.starts_with(xattr::USER_OVERLAY) {
                subject.remove(name).map_err(io_error(path))?;
            }
        }
        Ok(opaque)
    }
}

/// Whether two directories look the same, as far as a layer says how a directory looks.
///
/// # Errors
/// The kernel's.
pub fn same_directory(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(is_same(a, &rustix::fs::fstat(a)?, b)?)
}

/// Whether nothing was changed about a directory itself.
fn is_same(upper: BorrowedFd<'_>, stat: &Stat, lower: BorrowedFd<'_>) -> SysResult<bool> {
    let below = rustix::fs::fstat(lower)?;
    Ok(sys::mode_bits(stat) == sys::mode_bits(&below)
        && (stat.st_uid, stat.st_gid) == (below.st_uid, below.st_gid)
        && sys::mtime(stat) == sys::mtime(&below)
        && xattr::read(Subject::Fd(upper))? == xattr::read(Subject::Fd(lower))?)
}
