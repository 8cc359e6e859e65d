//! What `COPY` takes.

use std::io;
use std::os::fd::AsFd;

use plies_archive::tar::Escaped;
pub(super) use plies_cache::contenthash::walk::join;
use plies_cache::contenthash::{
    inroot::{self, Missing},
    patterns::{BadPattern, Patterns},
    wildcard::{ExpandError, MATCHES_MAX, Wildcard},
};
use plies_oci::ErrorKind;
use rustix::fs::{FileType, OFlags};

use super::{Owners, Tree};
use crate::dockerfile::Ignore;

/// Why sources can't be chosen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SelectError {
    /// There is no such file.
    #[error("{path} not found{}", if *.ignored { " (it is excluded by the ignore file)" } else { "" })]
    NotFound {
        /// As asked for.
        path: Escaped,
        /// It is there, but an ignore rule hides it.
        ignored: bool,
    },
    /// The pattern means nothing.
    #[error("invalid pattern {pattern}: {why}")]
    Pattern {
        /// As asked for.
        pattern: Escaped,
        /// What is wrong.
        why: &'static str,
    },
    /// The pattern stands for too many files.
    #[error("{pattern} matches more than {MATCHES_MAX} files")]
    TooMany {
        /// As asked for.
        pattern: Escaped,
    },
    /// The tree can't be read.
    #[error("{op} {path}")]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: Escaped,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl SelectError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } => ErrorKind::NotFound,
            Self::Pattern { .. } => ErrorKind::InvalidInput,
            Self::TooMany { .. } => ErrorKind::Limit,
            Self::Io { .. } => ErrorKind::Unavailable,
        }
    }
}

/// The sources of one `COPY`, in order, from one tree.
#[derive(Debug, Default)]
pub struct Selection {
    pub(super) items: Vec<Selected>,
    /// `--exclude`, relative to each source.
    pub(super) excludes: Option<Ignore>,
}

/// One source.
#[derive(Debug, Clone)]
pub struct Selected {
    /// What it is called when it is put into a directory: the last component as asked for.
    pub(super) name: Vec<u8>,
    pub(super) kind: SelectedKind,
}

#[derive(Debug, Clone)]
pub(super) enum SelectedKind {
    /// Something in the tree; all links of the path resolved, no leading slash, empty for the root. Of a directory only
    /// what `include` matches, with the directories on the way to it.
    Tree { path: Vec<u8>, is_dir: bool, include: Option<Patterns> },
    /// A file whose bytes came with the Dockerfile.
    Inline { bytes: Vec<u8>, mode: u32 },
}

impl Selected {
    /// The name it gets in a directory.
    pub fn name(&self) -> &[u8] {
        &self.name
    }

    /// Its path in the tree, links resolved; `None` for a here-document.
    pub fn path(&self) -> Option<&[u8]> {
        match &self.kind {
            SelectedKind::Tree { path, .. } => Some(path),
            SelectedKind::Inline { .. } => None,
        }
    }

    /// Whether it is a directory, whose contents are copied.
    pub fn is_dir(&self) -> bool {
        matches!(self.kind, SelectedKind::Tree { is_dir: true, .. })
    }
}

impl Selection {
    /// Nothing yet. `excludes` are the `--exclude` patterns, matched relative to each source directory, or against the
    /// name of a source file.
    pub fn new(excludes: Option<Ignore>) -> Self {
        Self { items: Vec::new(), excludes: excludes.filter(|excludes| !excludes.is_empty()) }
    }

    /// Adds what `source` stands for in `tree`: one path, or, with wildcards, every match in byte order (which may be
    /// none, as in docker). A source that is a symbolic link stands for what it points to inside the tree. Tells how
    /// many were added.
    ///
    /// # Errors
    /// [`SelectError::NotFound`] for a path that is not there or ignored.
    pub fn add(&mut self, tree: &Tree, source: &[u8]) -> Result<usize, SelectError> {
        let before = self.items.len();
        let wildcard =
            Wildcard::parse(source).map_err(|why| SelectError::Pattern { pattern: Escaped::of(source), why: why.0 })?;
        let plain = &wildcard.plain;
        if wildcard.patterns.is_empty() {
            let name = plain.rsplit(|byte| *byte == b'/').next().unwrap_or_default().to_vec();
            let item = self.found(tree, plain, name, source)?;
            self.items.push(item);
        } else {
            let base = resolve(tree, plain, source)?;
            let matches = match inroot::open(tree.as_fd(), &base, OFlags::RDONLY | OFlags::DIRECTORY) {
                Ok(dir) => wildcard.expand(dir, &base).map_err(|error| match error {
                    ExpandError::Io { op, path, source } => io_error(op, &path)(source),
                    _ => SelectError::TooMany { pattern: Escaped::of(source) },
                })?,
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOTDIR.raw_os_error()) => Vec::new(),
                Err(error) => return Err(io_error("open", &base)(error)),
            };
            for path in matches {
                let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default().to_vec();
                match self.found(tree, &path, name, source) {
                    Ok(item) => self.items.push(item),
                    // Hidden, or a link to nowhere: no match.
                    Err(SelectError::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(self.items.len() - before)
    }

    /// Adds what `source` stands for as `COPY --parents` does: with the directories that lead to it, those behind a `/./`
    /// if there is one. Any number of directories can be written `**` behind that. Tells how many were added.
    ///
    /// # Errors
    /// As [`Selection::add`]; a path without wildcards must be there.
    pub fn add_with_parents(&mut self, tree: &Tree, source: &[u8]) -> Result<usize, SelectError> {
        let pivot = source.windows(3).position(|part| part == b"/./");
        let (base, pattern) = pivot.map_or((&b"/"[..], source), |at| (&source[..at], &source[at + 3..]));
        let bad = |why: BadPattern| SelectError::Pattern { pattern: Escaped::of(source), why: why.0 };
        let mut include = Patterns::default();
        // At the front it would take back.
        let escaped = if pattern.starts_with(b"!") { [b"\\", pattern].concat() } else { pattern.to_vec() };
        if !escaped.is_empty() {
            include.add(&escaped).map_err(bad)?;
        }
        let whole = Wildcard::parse(&[base, b"/", pattern].concat()).map_err(bad)?;
        if whole.patterns.is_empty() {
            self.found(tree, &whole.plain, Vec::new(), source)?;
        }
        let before = self.items.len();
        self.add(tree, base)?;
        for item in &mut self.items[before..] {
            if let SelectedKind::Tree { is_dir: true, include: of, .. } = &mut item.kind {
                *of = (!include.is_empty()).then(|| include.clone());
            }
        }
        Ok(self.items.len() - before)
    }

    /// Adds a file whose bytes stand in the Dockerfile: mode 0644, root's.
    pub fn add_inline(&mut self, name: &[u8], bytes: Vec<u8>) {
        let kind = SelectedKind::Inline { bytes, mode: 0o644 };
        self.items.push(Selected { name: name.to_vec(), kind });
    }

    /// Nothing yet, with the same excludes.
    #[must_use]
    pub(crate) fn emptied(&self) -> Self {
        Self { items: Vec::new(), excludes: self.excludes.clone() }
    }

    /// Adds a source that was chosen before.
    pub(crate) fn push(&mut self, selected: Selected) {
        self.items.push(selected);
    }

    /// The sources, in order.
    pub fn items(&self) -> &[Selected] {
        &self.items
    }

    fn found(&self, tree: &Tree, path: &[u8], name: Vec<u8>, asked: &[u8]) -> Result<Selected, SelectError> {
        let missing = |ignored| SelectError::NotFound { path: Escaped::of(asked), ignored };
        let resolved = resolve(tree, path, asked)?;
        let handle = match inroot::open(tree.as_fd(), &resolved, OFlags::PATH | OFlags::NOFOLLOW) {
            Ok(handle) => handle,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(missing(false)),
            Err(error) => return Err(io_error("open", &resolved)(error)),
        };
        let mode = rustix::fs::fstat(&handle).map_err(|e| io_error("stat", &resolved)(e.into()))?.st_mode;
        let is_dir = FileType::from_raw_mode(mode) == FileType::Directory;
        if let Some(ignore) = &tree.ignore {
            let hides = |path: &[u8]| !path.is_empty() && ignore.hides(path);
            // A directory that is hidden may hold what is shown again: the walk finds out.
            if (hides(&resolved) || hides(path)) && !(is_dir && ignore.may_show_again()) {
                return Err(missing(true));
            }
        }
        Ok(Selected { name, kind: SelectedKind::Tree { path: resolved, is_dir, include: None } })
    }
}

/// The path with all links resolved inside the tree.
fn resolve(tree: &Tree, path: &[u8], asked: &[u8]) -> Result<Vec<u8>, SelectError> {
    match inroot::resolve(tree.as_fd(), path, Missing::Fail) {
        Ok(resolved) => Ok(resolved.path),
        Err(error) if error.kind() == io::ErrorKind::NotFound || error.kind() == io::ErrorKind::NotADirectory => {
            Err(SelectError::NotFound { path: Escaped::of(asked), ignored: false })
        }
        Err(error) => Err(io_error("resolve", path)(error)),
    }
}

/// The path in its tree of what was found below a source.
pub(super) fn source_path(source: &[u8], found: &[u8]) -> Vec<u8> {
    if found.is_empty() { source.to_vec() } else { join(source, found) }
}

fn io_error<'a>(op: &'static str, path: &'a [u8]) -> impl Fn(io::Error) -> SelectError + 'a {
    move |source| SelectError::Io { op, path: Escaped::of(path), source }
}

/// Owners as the tree counts them.
pub(super) fn owner(owners: Owners, uid: u32, gid: u32) -> (u32, u32) {
    match owners {
        Owners::AsTheyAre => (uid, gid),
        Owners::Root => (0, 0),
    }
}
