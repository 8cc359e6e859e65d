//! What was changed in a writable tree: the list that `docker diff` shows.
//!
//! One walk over the upper directory, with the tree below it as a guide. A directory that is there only because
//! something in it changed is listed too, as docker does it; the root never is.

use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, Stat};
use rustix::io::{Errno, Result as SysResult};

use crate::diff::{is_same_file, is_same_metadata, is_same_xattrs};
use crate::sys::{self, Subject};
use crate::tar::EntryPath;
use crate::tree::{Below, Descent, Names, WalkError};
use crate::xattr;

/// How a path differs from the tree below.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChangeKind {
    /// It was there, and is another now.
    Modified,
    /// It was not there.
    Added,
    /// It is no longer there. What was in it is not listed.
    Deleted,
}

/// One path that was changed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    /// Which.
    pub path: EntryPath,
    /// How.
    pub kind: ChangeKind,
}

/// What a writable tree holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UpperForm {
    /// What was written, with overlayfs' marks for what was deleted.
    Overlay,
    /// Everything, changed or not.
    Whole,
}

/// Lists what `upper` changes of `lower` (of nothing, if there is no lower), sorted by path. Nobody needs to have
/// stopped writing, but what is changed meanwhile may be listed or not.
///
/// # Errors
/// [`WalkError`].
pub fn changes(
    upper: BorrowedFd<'_>,
    lower: Option<BorrowedFd<'_>>,
    form: UpperForm,
) -> Result<Vec<Change>, WalkError> {
    let root = EntryPath::root();
    let begin = || Ok((Descent::new(upper)?, Below::new(lower)?));
    let (upper, lower) = begin().map_err(at(&root))?;
    let mut walk = Walk { upper, lower, here: root, changes: Vec::new() };
    let first = walk.frame(form == UpperForm::Whole, true).map_err(at(&walk.here))?;
    let mut frames = vec![first];
    while let Some(frame) = frames.last_mut() {
        let Some((name, in_upper)) = frame.next() else {
            frames.pop();
            if !frames.is_empty() {
                walk.leave().map_err(at(&walk.here))?;
            }
            continue;
        };
        let path = walk.here.join(&name);
        if in_upper {
            let inner = walk.name(frame, &name, &path).map_err(at(&path))?;
            frames.extend(inner);
        } else {
            walk.add(frame, &path, ChangeKind::Deleted);
        }
    }
    walk.changes.sort_unstable();
    Ok(walk.changes)
}

fn at(path: &EntryPath) -> impl FnOnce(Errno) -> WalkError + '_ {
    |error| WalkError { path: path.clone(), source: error.into() }
}

/// A directory that is walked.
struct Frame {
    upper: Names,
    /// Empty where the upper directory says by itself what was deleted.
    lower: Names,
    whole: bool,
    /// The directory itself is in the list, or must not be.
    listed: bool,
}

impl Frame {
    /// The next name, and whether the upper tree has it.
    fn next(&mut self) -> Option<(Vec<u8>, bool)> {
        let name = match (self.upper.peek(), self.lower.peek()) {
            (Some(upper), Some(lower)) => upper.min(lower),
            (upper, lower) => upper.or(lower)?,
        }
        .to_vec();
        let in_upper = self.upper.peek() == Some(&name);
        if in_upper {
            self.upper.advance();
        }
        if self.lower.peek() == Some(&name) {
            self.lower.advance();
        }
        Some((name, in_upper))
    }
}

struct Walk {
    upper: Descent,
    lower: Below,
    here: EntryPath,
    changes: Vec<Change>,
}

impl Walk {
    /// Begins the directory where the walk stands.
    fn frame(&self, whole: bool, listed: bool) -> SysResult<Frame> {
        let lower = match self.lower.here() {
            Some(lower) if whole => Names::sorted(lower)?,
            _ => Names::default(),
        };
        Ok(Frame { upper: Names::sorted(self.upper.here())?, lower, whole, listed })
    }

    fn add(&mut self, frame: &mut Frame, path: &EntryPath, kind: ChangeKind) {
        if kind != ChangeKind::Modified && !std::mem::replace(&mut frame.listed, true) {
            self.changes.push(Change { path: self.here.clone(), kind: ChangeKind::Modified });
        }
        self.changes.push(Change { path: path.clone(), kind });
    }

    /// Judges a name of the upper tree. A frame for a directory.
    fn name(&mut self, frame: &mut Frame, name: &[u8], path: &EntryPath) -> SysResult<Option<Frame>> {
        let stat = sys::stat_at(self.upper.here(), name)?;
        let below = self.lower.stat(name)?;
        if sys::kind(&stat) != FileType::Directory {
            match below {
                _ if !frame.whole && sys::is_whiteout(&stat) => {
                    if below.is_some() {
                        self.add(frame, path, ChangeKind::Deleted);
                    }
                }
                None => self.add(frame, path, ChangeKind::Added),
                Some(below) if frame.whole && self.is_same(name, &stat, &below)? => {}
                Some(_) => self.add(frame, path, ChangeKind::Modified),
            }
            return Ok(None);
        }
        self.upper.enter(name)?;
        let has_lower = self.lower.enter(name)?;
        let upper = self.upper.here();
        let same = match (self.lower.here(), &below) {
            (Some(lower), Some(below)) => {
                is_same_metadata(&stat, below) && is_same_xattrs(Subject::Fd(upper), Subject::Fd(lower))?
            }
            _ => false,
        };
        let opaque = !frame.whole && Subject::Fd(upper).get(xattr::OPAQUE)?.as_deref() == Some(b"y");
        if !same {
            let kind = if below.is_some() { ChangeKind::Modified } else { ChangeKind::Added };
            self.add(frame, path, kind);
        }
        self.here = path.clone();
        self.frame(frame.whole || (opaque && has_lower), !same).map(Some)
    }

    fn is_same(&self, name: &[u8], stat: &Stat, below: &Stat) -> SysResult<bool> {
        match self.lower.here() {
            Some(lower) => is_same_file(stat, (self.upper.here(), name), below, (lower, name)),
            None => Ok(false),
        }
    }

    fn leave(&mut self) -> SysResult<()> {
        self.upper.leave()?;
        self.lower.leave()?;
        self.here = self.here.split().map_or_else(EntryPath::root, |(outer, _)| outer);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ApplyStyle::{Layer, Merged};
    use crate::testing::*;
    use std::os::fd::AsFd as _;

    fn listed(upper: &std::path::Path, lower: &std::path::Path, form: UpperForm) -> Vec<String> {
        let found = changes(open(upper).as_fd(), Some(open(lower).as_fd()), form).unwrap();
        found.iter().map(|change| format!("{:?} {}", change.kind, change.path)).collect()
    }

    #[test]
    fn privileged_an_upper_and_a_whole_tree_give_the_same_list() {
        if skip_unprivileged() {
            return;
        }
        let base = [
            dir("etc"),
            file("etc/gone", "1"),
            file("etc/kept", "1"),
            file("etc/other", "1"),
            dir("deep"),
            dir("deep/in"),
            file("deep/in/x", "1"),
            dir("cleared"),
            file("cleared/old", "1"),
            file("cleared/both", "1"),
            file("was-file", "1"),
        ];
        let change = [
            file("etc/.wh.gone", ""),
            file("etc/other", "2"),
            file("etc/new", "n"),
            file("deep/in/x", "22"),
            dir("cleared"),
            file("cleared/.wh..wh..opq", ""),
            file("cleared/both", "2"),
            file("cleared/fresh", "f"),
            dir("was-file"),
            file("was-file/in", "1"),
            dir("added"),
            file("added/x", "1"),
        ];
        let expected = [
            "Added /added",
            "Added /added/x",
            "Modified /cleared",
            "Modified /cleared/both",
            "Added /cleared/fresh",
            "Deleted /cleared/old",
            "Modified /deep/in/x",
            "Modified /etc",
            "Deleted /etc/gone",
            "Added /etc/new",
            "Modified /etc/other",
            "Modified /was-file",
            "Added /was-file/in",
        ];
        let place = Place::new();
        let [lower, whole, upper] = ["lower", "whole", "upper"].map(|name| place.tree(name));
        apply_archive(&lower, Merged, &archive(&base)).unwrap();
        apply_archive(&whole, Merged, &archive(&base)).unwrap();
        apply_archive(&whole, Merged, &archive(&change)).unwrap();
        // Directories that were only on the way look in an upper as they look below.
        let mut in_upper = vec![dir("etc"), dir("deep"), dir("deep/in")];
        in_upper.extend(change);
        apply_archive(&upper, Layer, &archive(&in_upper)).unwrap();
        assert_eq!(listed(&upper, &lower, UpperForm::Overlay), expected);
        // There the directory in which names came and went has another time by itself.
        let in_whole = listed(&whole, &lower, UpperForm::Whole);
        assert_eq!(in_whole, expected);
        assert_eq!(listed(&lower, &lower, UpperForm::Whole), [""; 0]);
    }
}
