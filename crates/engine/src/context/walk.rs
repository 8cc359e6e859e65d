//! Everything below a source that is copied, in byte order, with what copying and hashing need to know.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd as _;

use plies_cache::contenthash::inroot::{self, LastLink, Missing};
pub(super) use plies_cache::contenthash::walk::{Found, Step, Visitor, WalkError};
use plies_cache::contenthash::walk::{Keep, Rule, Walk, Xattrs};
use rustix::fs::FileType;

use super::Tree;
use super::select::{Selected, SelectedKind, Selection};

/// How deep a source may be, in directories below it: copying holds one open file for each, of 1,024 that a process
/// usually may. Paths of that depth don't fit the kernel's `PATH_MAX` with names of twenty characters.
const DEPTH_MAX: usize = 200;

/// Walks one source of a selection. Hidden and excluded things are left out; a directory that is hidden itself appears
/// when something below it is shown.
pub(super) fn walk<V: Visitor>(
    tree: &Tree,
    selection: &Selection,
    item: &Selected,
    visitor: &mut V,
) -> Result<(), V::Error> {
    let SelectedKind::Tree { path, is_dir, include } = &item.kind else { return Ok(()) };
    let mut rules = Vec::new();
    if let Some(excludes) = &selection.excludes {
        // An excluded file is excluded by its name.
        if !is_dir && excludes.hides(&item.name) {
            return Ok(());
        }
        rules.push(Rule { patterns: excludes.patterns(), keep: Keep::Others, base: b"" });
    }
    if let Some(include) = include {
        rules.push(Rule { patterns: include, keep: Keep::Matching, base: b"" });
    }
    if let Some(ignore) = &tree.ignore {
        rules.push(Rule { patterns: ignore.patterns(), keep: Keep::Others, base: path });
    }
    // The path has no links left, so that only one that came since is kept.
    let resolved = inroot::resolve_with(tree.as_fd(), path, Missing::Fail, LastLink::Keep, &mut |_, _| {})
        .map_err(|source| WalkError::Io { op: "open", path: path.clone(), source })?;
    Walk { base: path, rules, shows_start: true, is_live: true, depth_max: DEPTH_MAX }.run(&resolved, visitor)
}

/// What went wrong where, for errors of whoever walked: the operation, the path relative to the tree, the cause.
pub(super) fn parts(error: WalkError) -> (&'static str, Vec<u8>, io::Error) {
    match error {
        WalkError::Io { op, path, source } => (op, path, source),
        WalkError::TooDeep { path, max } => {
            ("walk", path, io::Error::other(format!("more than {max} directories inside one another")))
        }
        error => ("walk", Vec::new(), io::Error::other(error)),
    }
}

/// The extended attributes that a copy gets. What the host's security modules or overlay mounts put on a file does not
/// belong to it.
pub(super) fn xattrs(found: &Found<'_>) -> io::Result<Xattrs> {
    // Links carry only what we drop anyway.
    if found.kind() == FileType::Symlink { Ok(Vec::new()) } else { found.xattrs(kept_xattr) }
}

fn kept_xattr(name: &[u8]) -> bool {
    let dropped: [&[u8]; 6] =
        [b"security.selinux", b"security.ima", b"security.evm", b"security.apparmor", b"trusted.", b"user.overlay."];
    !dropped.iter().any(|prefix| name.starts_with(prefix))
}

/// Files with several names inside one source, by device and inode.
#[derive(Debug, Default)]
pub(super) struct Links(HashMap<(u64, u64), Vec<u8>>);

impl Links {
    /// If this is another name of a file that came earlier: that name, relative to the source.
    pub(super) fn first(&mut self, found: &Found<'_>) -> Option<Vec<u8>> {
        if found.kind() != FileType::RegularFile || found.stat.st_nlink < 2 {
            return None;
        }
        let inode = (found.stat.st_dev, found.stat.st_ino);
        let first = self.0.get(&inode).cloned();
        if first.is_none() {
            self.0.insert(inode, found.path.to_vec());
        }
        first
    }
}
