//! Which directories' metadata a stack would hide, and the fix-up layer that restores them.
//!
//! In an overlay the uppermost layer that has a directory says how it looks. If that layer only
//! implied it (its archive had `tmp/x` but no `tmp/`), a lower layer that set it explicitly must
//! win, or /tmp would be 0755 from then on. The fix-up layer holds just such directories and their
//! parents, with the metadata that should show.
//!
//! Only directories that some layer implies can be wrong, so only they are looked at: one walk down
//! the tree of their paths, asking in each directory only the layers that are visible there.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use plies_archive::tar::EntryPath;
use plies_archive::{DirIndex, Implied};
use rustix::fs::{FileType, Mode};

use crate::LayerId;
use crate::error::{At as _, FileError};
use crate::packed;
use crate::snapshots::SnapshotError;
use crate::tree::{self, Metadata};

/// One layer of the stack to judge.
#[derive(Debug)]
pub(crate) struct StackLayer {
    pub(crate) id: LayerId,
    /// Its directory, whose tree is opened for each look: a deep stack has more layers than a process may have
    /// descriptors.
    pub(crate) dir: PathBuf,
    /// The tree of a packed layer: to mount it takes longer than a look.
    pub(crate) mounted: Option<OwnedFd>,
    pub(crate) index: DirIndex,
}

impl StackLayer {
    fn open(&self, path: &EntryPath) -> io::Result<OwnedFd> {
        match &self.mounted {
            Some(root) => tree::open_dir(root, path),
            None => tree::open_dir(packed::open_tree(&self.dir).map_err(|error| error.source)?, path),
        }
    }
}

/// Directories to restore, with the metadata that should show; parents included. Empty if the stack
/// shows everything as it should.
pub(crate) type FixUp = BTreeMap<EntryPath, Metadata>;

/// Judges a stack, bottom first.
///
/// # Errors
/// [`SnapshotError::NeedsBase`] for the lowest layer that has a directory on the way only where the
/// stack below it has something else. (A directory that was copied up has an entry in the layer's
/// archive, and replaces what is there as that would.)
pub(crate) fn judge(stack: &[StackLayer]) -> Result<FixUp, SnapshotError> {
    let candidates: BTreeSet<&EntryPath> = stack.iter().flat_map(|layer| layer.index.implied()).collect();
    let mut tries = Trie::default();
    for path in candidates {
        tries.insert(path);
    }
    let mut fix = FixUp::new();
    // The candidate directories yet to look at. Parents come before children.
    let mut pending: Vec<(EntryPath, &Trie, Seen)> = Vec::new();
    if tries.wanted || !tries.children.is_empty() {
        let all: Vec<usize> = (0..stack.len()).rev().collect();
        pending.push((EntryPath::root(), &tries, Seen { describing: all.clone(), visible: all }));
    }
    while let Some((path, trie, seen)) = pending.pop() {
        judge_one(stack, &path, &seen.describing, &mut fix)?;
        for (name, child) in &trie.children {
            let child_path = path.join(name.to_bytes());
            let below = seen_below(stack, &path, name, &seen.visible, &child_path)?;
            if !below.describing.is_empty() {
                pending.push((child_path, child, below));
            }
        }
    }
    // The fix-up itself goes on top: whatever it passes through must look right as well.
    let parents: BTreeSet<EntryPath> = fix.keys().flat_map(ancestors).collect();
    for path in parents {
        if let Entry::Vacant(parent) = fix.entry(path) {
            let shown = shown(stack, parent.key())?;
            parent.insert(shown);
        }
    }
    Ok(fix)
}

/// Which layers have a say in a directory, uppermost first.
struct Seen {
    /// Those that may say how it looks. A layer that only empties the directory (an opaque mark and no entry for it)
    /// leaves that to those below.
    describing: Vec<usize>,
    /// Those of which its contents are seen.
    visible: Vec<usize>,
}

fn ancestors(path: &EntryPath) -> Vec<EntryPath> {
    let mut found = Vec::new();
    let mut path = path.clone();
    while let Some((parent, _)) = path.split() {
        found.push(parent.clone());
        path = parent;
    }
    found
}

/// Looks at one directory: if the uppermost layer only implies it, the uppermost that set it wins.
fn judge_one(
    stack: &[StackLayer],
    path: &EntryPath,
    describing: &[usize],
    fix: &mut FixUp,
) -> Result<(), SnapshotError> {
    let explicit = describing.iter().position(|layer| !stack[*layer].index.is_implied(path));
    let (Some(top), Some(wins)) = (describing.first(), explicit.map(|at| describing[at])) else { return Ok(()) };
    if *top == wins {
        return Ok(());
    }
    let shows = metadata(stack, *top, path)?;
    let should = metadata(stack, wins, path)?;
    if shows != should {
        fix.insert(path.clone(), should);
    }
    Ok(())
}

/// Which of the layers that are visible in `parent` have a say in the directory `name` in it.
fn seen_below(
    stack: &[StackLayer],
    parent: &EntryPath,
    name: &CString,
    visible: &[usize],
    path: &EntryPath,
) -> Result<Seen, SnapshotError> {
    let mut found = Seen { describing: Vec::new(), visible: Vec::new() };
    let mut hidden = false;
    for layer in visible {
        let dir = stack[*layer].open(parent).at("open", shown_path(parent))?;
        let Some(stat) = tree::stat(&dir, name).at("stat", shown_path(path))? else { continue };
        if tree::file_type(&stat) != FileType::Directory {
            let whiteout = tree::is_whiteout(&stat);
            if let Some(lowest) = found.describing.last().map(|at: &usize| &stack[*at])
                && !whiteout
                && lowest.index.why_implied(path) == Some(Implied::OnTheWay)
            {
                return Err(SnapshotError::NeedsBase { layer: lowest.id, path: path.clone() });
            }
            break;
        }
        found.describing.push(*layer);
        if !hidden {
            found.visible.push(*layer);
        }
        let child = stack[*layer].open(path).at("open", shown_path(path))?;
        hidden |= tree::is_opaque(child).at("read attributes", shown_path(path))?;
        if hidden && !stack[*layer].index.is_implied(path) {
            break;
        }
    }
    Ok(found)
}

/// What the stack shows of a directory that is not a candidate itself: the uppermost layer's.
fn shown(stack: &[StackLayer], path: &EntryPath) -> Result<Metadata, SnapshotError> {
    for layer in (0..stack.len()).rev() {
        if let Ok(dir) = stack[layer].open(path) {
            return Ok(Metadata::of(dir).at("stat", shown_path(path))?);
        }
    }
    unreachable!("because a visible directory has visible parents")
}

fn metadata(stack: &[StackLayer], layer: usize, path: &EntryPath) -> Result<Metadata, FileError> {
    stack[layer].open(path).and_then(Metadata::of).at("stat", shown_path(path))
}

fn shown_path(path: &EntryPath) -> String {
    path.to_string()
}

/// Makes the directories of a fix-up in an empty directory.
pub(crate) fn build(fix: &FixUp, target: impl AsFd) -> io::Result<()> {
    for path in fix.keys() {
        let Some((parent, name)) = path.split() else { continue };
        let name = CString::new(name).expect("because names have no NUL");
        rustix::fs::mkdirat(tree::open_dir(&target, &parent)?, &name, Mode::RWXU)?;
    }
    // Children first: making them changed their parents' times.
    for (path, metadata) in fix.iter().rev() {
        metadata.apply(tree::open_dir(&target, path)?)?;
    }
    Ok(())
}

/// The candidates' paths as a tree.
#[derive(Debug, Default)]
struct Trie {
    wanted: bool,
    children: BTreeMap<CString, Trie>,
}

impl Trie {
    fn insert(&mut self, path: &EntryPath) {
        let mut node = self;
        for name in path.components() {
            let name = CString::new(name).expect("because names have no NUL");
            node = node.children.entry(name).or_default();
        }
        node.wanted = true;
    }
}

/// Without recursion, since a path may be thousands of components long.
impl Drop for Trie {
    fn drop(&mut self) {
        let mut pending: Vec<Trie> = std::mem::take(&mut self.children).into_values().collect();
        while let Some(mut trie) = pending.pop() {
            pending.extend(std::mem::take(&mut trie.children).into_values());
        }
    }
}
