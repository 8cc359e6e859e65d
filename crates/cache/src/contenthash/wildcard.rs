//! Paths with wildcards in them: what they stand for in a tree.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::glob::{self, BadPattern, Pattern};
use super::inroot;
use super::walk::join;

/// How many paths one wildcard may stand for: a bound on memory.
pub const MATCHES_MAX: usize = 1_000_000;

/// A path that may have wildcards: a plain beginning, then a pattern for each further component.
#[derive(Debug)]
pub struct Wildcard {
    /// What stands before the first component with a wildcard; escapes resolved.
    pub plain: Vec<u8>,
    /// One for each component from there on; empty for a plain path.
    pub patterns: Vec<Pattern>,
}

/// Why the matches of a wildcard can't be told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExpandError {
    /// They are too many.
    #[error("more than {MATCHES_MAX} matches")]
    TooMany,
    /// A directory can't be read.
    #[error("{op} {}", path.escape_ascii())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: Vec<u8>,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl Wildcard {
    /// Takes a path apart. It is relative to the root whatever it begins with, and `..` stops there.
    ///
    /// # Errors
    /// [`BadPattern`].
    pub fn parse(path: &[u8]) -> Result<Self, BadPattern> {
        let components = normalise(path);
        let first_wild = components.iter().position(|part| glob::has_wildcards(part)).unwrap_or(components.len());
        let (plain, wild) = components.split_at(first_wild);
        let plain: Vec<Vec<u8>> = plain.iter().map(|part| glob::unescape(part)).collect();
        let patterns = wild.iter().map(|part| Pattern::new(part)).collect::<Result<_, _>>()?;
        Ok(Self { plain: plain.join(&b'/'), patterns })
    }

    /// What matches below `dir`, which is what the plain beginning leads to and is called `at`; in byte order of
    /// components. Links on the way are not followed; those that match are matches, wherever they point.
    ///
    /// # Errors
    /// [`ExpandError`].
    pub fn expand(&self, dir: OwnedFd, at: &[u8]) -> Result<Vec<Vec<u8>>, ExpandError> {
        let mut matches = Vec::new();
        expand(dir, at, &self.patterns, &mut matches)?;
        Ok(matches)
    }
}

fn expand(dir: OwnedFd, at: &[u8], patterns: &[Pattern], matches: &mut Vec<Vec<u8>>) -> Result<(), ExpandError> {
    let Some((pattern, rest)) = patterns.split_first() else { return Ok(()) };
    let names = inroot::names(dir.as_fd());
    for name in names.map_err(|source| ExpandError::Io { op: "list", path: at.to_vec(), source })? {
        if !pattern.matches(&name) {
            continue;
        }
        let path = join(at, &name);
        if rest.is_empty() {
            if matches.len() >= MATCHES_MAX {
                return Err(ExpandError::TooMany);
            }
            matches.push(path);
        } else if let Ok(dir) = inroot::open_dir(dir.as_fd(), &name) {
            expand(dir, &path, rest, matches)?;
        }
    }
    Ok(())
}

/// The components of a path that somebody asked for: relative to the root, `..` resolved in the text and stopping there.
pub fn normalise(path: &[u8]) -> Vec<&[u8]> {
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts
}
