//! Content hashes: digests of paths in a tree, so that equal content is known to be equal wherever it came from.
//!
//! ```text
//! mod.rs       checksum: what a path, a wildcard or a filtered directory comes to
//! header.rs    what of a file counts, and in which form it is hashed
//! sum.rs       a file, and a directory with all that is in it
//! list.rs      what wildcards and patterns chose, one entry after the other
//! cache.rs     digests that are known already, and how they are stored
//! walk.rs      one entry of a tree after the other, with rules that show and hide
//! inroot.rs    resolution of hostile paths inside a directory handle
//! wildcard.rs  what a path with wildcards stands for
//! patterns.rs  lists of patterns, as in `.dockerignore`
//! glob.rs      one pattern
//! ```
//!
//! The rules are BuildKit's (`cache/contenthash`), and so are the digests wherever BuildKit's are unambiguous:
//!
//! - Mode, owner, group, extended attributes, a link's target, device numbers, a file's bytes and the names below a
//!   directory count. Times don't, nor does how a file system stores any of it. [`header`] has the details.
//! - The name of the path itself doesn't count: a file that was renamed has the digest it had.
//! - Two names of one file are two equal files.
//! - `..` in the path is resolved in its text; in a symbolic link's target it is the parent of where the link led. Both
//!   stop at the root. At most [`inroot::LINKS_MAX`] links are followed.
//!
//! Where BuildKit's intent and its behaviour differ, this follows the intent:
//!
//! - A path that isn't there is an error with patterns too, and a wildcard without matches is one; BuildKit gives both the
//!   digest of nothing, which [`ContentDigest::of_nothing`] is for.
//! - Patterns hold behind a link that is followed. BuildKit takes all of its target, or with include patterns nothing.
//! - Links inside a filtered directory whose path ends in a slash are never followed.
//! - What patterns say about a directory counts below it, whichever list it is on.
//!
//! A tree is read through directory handles only and nothing but regular files is opened, so that it can neither lead
//! out of itself nor block. It must not change meanwhile: what is seen to have changed is an error, and a
//! [`HashCache`] is only good for the tree that it was filled from, or when it is told what changed there.

mod cache;
pub mod glob;
pub mod header;
pub mod inroot;
mod list;
pub mod patterns;
mod sum;
#[cfg(test)]
mod tests;
pub mod walk;
pub mod wildcard;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use plies_archive::tar::Escaped;
use plies_oci::{ErrorKind, Sha256Hasher};
use rustix::fs::FileType;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

pub use cache::{HashCache, HashCacheError, RECORDS_MAX};

use glob::BadPattern;
use inroot::{LINKS_MAX, LastLink, Missing, Resolved};
use list::List;
use patterns::Patterns;
use sum::Sums;
use walk::{Keep, Rule, WalkError, join};
use wildcard::{ExpandError, Wildcard};

/// How many patterns one list may have: a bound on the work for each file.
pub const PATTERNS_MAX: usize = 100_000;

/// The digest of a path's content: sha256.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ContentDigest([u8; 32]);

impl ContentDigest {
    /// Wraps a sha256.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// What it comes to when patterns leave nothing: the sha256 of no bytes.
    pub fn of_nothing() -> Self {
        Self(Sha256Hasher::default().finish())
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

/// As a digest is written: `sha256:` and 64 hexadecimal digits.
impl fmt::Display for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for ContentDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// What of a path is wanted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ChecksumOptions {
    /// A path or a match that is a symbolic link stands for what it points to. Links on the way to it always do, and
    /// links in a directory never.
    pub follow_links: bool,
    /// The path may have wildcards; all that match count, with their paths from the first wildcard on, sorted.
    pub wildcard: bool,
    /// If there are any, only what they match counts, and the directories on the way to it. Relative to the path or
    /// to each match; a file that is named itself has the empty path there, which `*` and `**` match. The rules are
    /// those of `.dockerignore`.
    pub include: Vec<String>,
    /// What they match doesn't count. As [`Self::include`].
    pub exclude: Vec<String>,
}

/// Why there is no digest.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChecksumError {
    /// Nothing is at the path, or a link on the way leads nowhere.
    #[error("{path} not found")]
    NotFound {
        /// As asked for; of a wildcard, the match.
        path: Escaped,
    },
    /// Nothing matches the wildcard.
    #[error("nothing matches {pattern}")]
    NoMatch {
        /// As asked for.
        pattern: Escaped,
    },
    /// A wildcard or a pattern means nothing.
    #[error("invalid pattern {pattern}")]
    Pattern {
        /// As asked for.
        pattern: Escaped,
        /// What is wrong.
        #[source]
        source: BadPattern,
    },
    /// The path leads through too many symbolic links; most likely they go round in a circle.
    #[error("{path} leads through more than {LINKS_MAX} symbolic links")]
    TooManyLinks {
        /// As asked for.
        path: Escaped,
    },
    /// A wildcard stands for too many paths, or there are too many patterns.
    #[error("more than {max} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// The limit.
        max: usize,
    },
    /// Directories lie too deep inside one another.
    #[error("{path} is more than {max} directories deep")]
    TooDeep {
        /// The first one beyond the limit.
        path: Escaped,
        /// The limit.
        max: usize,
    },
    /// Somebody changed or removed a file while it was read.
    #[error("{path} changed while it was read")]
    Changed {
        /// Which.
        path: Escaped,
    },
    /// Something in the tree can't be read.
    #[error("{op} {path}")]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what, relative to the tree.
        path: Escaped,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl ChecksumError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::NotFound { .. } | Self::NoMatch { .. } => ErrorKind::NotFound,
            Self::Pattern { .. } => ErrorKind::InvalidInput,
            Self::TooManyLinks { .. } | Self::TooMany { .. } | Self::TooDeep { .. } => ErrorKind::Limit,
            Self::Changed { .. } | Self::Io { .. } => ErrorKind::Unavailable,
        }
    }
}

impl From<WalkError> for ChecksumError {
    fn from(error: WalkError) -> Self {
        match error {
            // What a walk looks for, it has seen before.
            WalkError::Io { path, source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Self::Changed { path: Escaped::of(&path) }
            }
            WalkError::Io { op, path, source } => Self::Io { op, path: Escaped::of(&path), source },
            WalkError::TooDeep { path, max } => Self::TooDeep { path: Escaped::of(&path), max },
        }
    }
}

/// The digest of what is at `path` in the tree below `root`. A leading slash means nothing; the empty path is the root.
///
/// Reads what `cache` does not know, and leaves there what it learns. A digest is the same with any cache that was filled
/// from this tree. Without wildcards and patterns, [`HashCache::get`] can tell whether the tree is needed at all.
///
/// # Errors
/// [`ChecksumError`]; `cache` is then as good as before.
pub fn checksum(
    root: BorrowedFd<'_>,
    path: &[u8],
    options: &ChecksumOptions,
    cache: &mut HashCache,
) -> Result<ContentDigest, ChecksumError> {
    checksum_while(root, path, options, cache, &|| Ok(()))
}

/// As [`checksum`], and asks `go_on` before each file and each 128 KiB of it.
///
/// # Errors
/// [`ChecksumError`]; what `go_on` says becomes the source of a [`ChecksumError::Io`].
pub fn checksum_while(
    root: BorrowedFd<'_>,
    path: &[u8],
    options: &ChecksumOptions,
    cache: &mut HashCache,
    go_on: &dyn Fn() -> io::Result<()>,
) -> Result<ContentDigest, ChecksumError> {
    let mut request = Request { root, sums: Sums::new(cache, go_on) };
    let last_link = if options.follow_links { LastLink::Follow } else { LastLink::Keep };
    if options.wildcard || !options.include.is_empty() || !options.exclude.is_empty() {
        request.chosen(path, options, last_link)
    } else {
        request.whole(&wildcard::normalise(path).join(&b'/'), last_link)
    }
}

struct Request<'a> {
    root: BorrowedFd<'a>,
    sums: Sums<'a>,
}

impl Request<'_> {
    /// Everything at a path.
    fn whole(&mut self, path: &[u8], last_link: LastLink) -> Result<ContentDigest, ChecksumError> {
        if let Some(known) = self.sums.cache.get(path, last_link == LastLink::Follow) {
            return Ok(known);
        }
        let resolved = self.resolve(path, last_link)?;
        match self.sums.cache.get(&resolved.path, false) {
            Some(known) => Ok(known),
            None => self.sums.of(&resolved)?.ok_or_else(|| not_found(path)),
        }
    }

    /// What a path leads to, which is there.
    fn resolve(&mut self, path: &[u8], last_link: LastLink) -> Result<Resolved, ChecksumError> {
        let cache = &mut *self.sums.cache;
        let mut on_link = |components: &[Vec<u8>], target: &[u8]| {
            if let Some((name, dirs)) = components.split_last()
                && let Some(dir) = cache.ensure_dirs(dirs.iter().map(Vec::as_slice))
            {
                cache.ensure_link(dir, name, target);
            }
        };
        let failed = |error: io::Error| match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::NOENT | Errno::NOTDIR) => not_found(path),
            Some(Errno::LOOP) => ChecksumError::TooManyLinks { path: Escaped::of(path) },
            _ => ChecksumError::Io { op: "resolve", path: Escaped::of(path), source: error },
        };
        let resolved = inroot::resolve_with(self.root, path, Missing::Fail, last_link, &mut on_link).map_err(failed)?;
        match &resolved.name {
            Some(name) if inroot::stat(resolved.dir(), name).map_err(failed)?.is_none() => Err(not_found(path)),
            _ => Ok(resolved),
        }
    }

    /// What wildcards and patterns leave of a path.
    fn chosen(
        &mut self,
        path: &[u8],
        options: &ChecksumOptions,
        last_link: LastLink,
    ) -> Result<ContentDigest, ChecksumError> {
        let (include, exclude) = (parse(&options.include)?, parse(&options.exclude)?);
        let rules: Vec<_> = [(&include, Keep::Matching), (&exclude, Keep::Others)]
            .into_iter()
            .filter_map(|(patterns, keep)| Some(Rule { patterns: patterns.as_ref()?, keep, base: b"" }))
            .collect();
        let literal = || Wildcard { plain: wildcard::normalise(path).join(&b'/'), patterns: Vec::new() };
        let wildcard = match options.wildcard {
            true => {
                Wildcard::parse(path).map_err(|source| ChecksumError::Pattern { pattern: Escaped::of(path), source })?
            }
            false => literal(),
        };
        let mut list = List::new(&rules);
        if wildcard.patterns.is_empty() {
            // The contents of a directory, not itself.
            list.skips_start = path.ends_with(b"/");
            self.add(&mut list, &wildcard.plain, b"", last_link)?;
        } else {
            let (base, matches) = self.expand(&wildcard, path)?;
            if matches.is_empty() {
                return Err(ChecksumError::NoMatch { pattern: Escaped::of(path) });
            }
            let asked = path.rsplit(|byte| *byte == b'/').find(|part| !part.is_empty()).unwrap_or_default();
            for found in &matches {
                list.is_named = found.rsplit(|byte| *byte == b'/').next() == Some(asked);
                self.add(&mut list, &join(&base, found), found, last_link)?;
            }
        }
        Ok(list.finish())
    }

    /// Where the plain part of a wildcard leads, and what matches below that.
    fn expand(&mut self, wildcard: &Wildcard, asked: &[u8]) -> Result<(Vec<u8>, Vec<Vec<u8>>), ChecksumError> {
        let base = match self.resolve(&wildcard.plain, LastLink::Follow) {
            Ok(base) if base.name.is_none() => base,
            Ok(_) | Err(ChecksumError::NotFound { .. }) => return Ok((Vec::new(), Vec::new())),
            Err(error) => return Err(error),
        };
        let error = |error| match error {
            ExpandError::TooMany => {
                ChecksumError::TooMany { what: "matches of a wildcard", max: wildcard::MATCHES_MAX }
            }
            ExpandError::Io { op, path, source } => {
                ChecksumError::Io { op, path: Escaped::of(&join(&base.path, &path)), source }
            }
        };
        let dir = inroot::reopen_dir(base.dir()).map_err(|source| ChecksumError::Io {
            op: "open",
            path: Escaped::of(asked),
            source,
        })?;
        let matches = wildcard.expand(dir, b"").map_err(error)?;
        Ok((base.path, matches))
    }

    /// Adds what is at `path`, and is `listed` as that, to the list.
    fn add(
        &mut self,
        list: &mut List<'_>,
        path: &[u8],
        listed: &[u8],
        last_link: LastLink,
    ) -> Result<(), ChecksumError> {
        let mut resolved = self.resolve(path, LastLink::Keep)?;
        if last_link == LastLink::Follow && self.is_link(&resolved)? {
            let target = self.resolve(path, LastLink::Follow)?;
            if target.name.is_some() || !list.has_rules() {
                if list.shows_start() {
                    let digest = self.whole(path, LastLink::Follow)?;
                    list.add(listed, b"", digest);
                }
                return Ok(());
            }
            resolved = target;
        }
        list.walk(&mut self.sums, &resolved, listed)
    }

    fn is_link(&self, resolved: &Resolved) -> Result<bool, ChecksumError> {
        let Some(name) = &resolved.name else { return Ok(false) };
        let stat = inroot::stat(resolved.dir().as_fd(), name).map_err(|source| ChecksumError::Io {
            op: "stat",
            path: Escaped::of(&resolved.path),
            source,
        })?;
        Ok(stat.is_some_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink))
    }
}

fn not_found(path: &[u8]) -> ChecksumError {
    ChecksumError::NotFound { path: Escaped::of(path) }
}

/// `None` for an empty list, which is no rule. Empty patterns are passed over, as moby does.
fn parse(list: &[String]) -> Result<Option<Patterns>, ChecksumError> {
    if list.len() > PATTERNS_MAX {
        return Err(ChecksumError::TooMany { what: "patterns", max: PATTERNS_MAX });
    }
    let mut patterns = Patterns::default();
    for text in list.iter().map(|text| text.trim().as_bytes()).filter(|text| !text.is_empty()) {
        patterns.add(text).map_err(|source| ChecksumError::Pattern { pattern: Escaped::of(text), source })?;
    }
    Ok((!list.is_empty()).then_some(patterns))
}
