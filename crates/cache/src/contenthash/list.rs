//! The digest of what wildcards and patterns chose: the sha256 of one line for each entry, in byte order of components.
//!
//! ```text
//! NUL <component> NUL <component> …  "sha256:" <hex of the digest of a file, or of a directory's header>
//! ```
//!
//! Paths are relative to the plain beginning of what was asked for, whose own is empty. What is in a directory stands in
//! lines of its own, because patterns may have left some of it out; a link that was followed has the digest of all
//! that it leads to. An entry that is alone and was asked for by its name has its own digest, without a line.

use plies_oci::Sha256Hasher;

use super::cache::RecordIndex;
use super::inroot::Resolved;
use super::patterns::Verdict;
use super::sum::{self, Place, Sums};
use super::walk::{Found, Keep, Rule, Step, Visitor, join};
use super::{ChecksumError, ContentDigest};

/// Adds up a list.
pub(super) struct List<'a> {
    rules: &'a [Rule<'a>],
    /// A directory's own header is left out where a walk begins.
    pub(super) skips_start: bool,
    /// What comes next was asked for by its name, not found by a pattern.
    pub(super) is_named: bool,
    sum: Sha256Hasher,
    count: u64,
    /// The digest of an entry that was asked for by its name.
    named: Option<ContentDigest>,
}

impl<'a> List<'a> {
    pub(super) fn new(rules: &'a [Rule<'a>]) -> Self {
        Self { rules, skips_start: false, is_named: true, sum: Sha256Hasher::default(), count: 0, named: None }
    }

    pub(super) fn has_rules(&self) -> bool {
        !self.rules.is_empty()
    }

    /// Whether the rules show what is asked for itself.
    pub(super) fn shows_start(&self) -> bool {
        self.rules.iter().all(|rule| {
            let Verdict { matches, .. } = rule.patterns.verdict_on_path(b"");
            matches == (rule.keep == Keep::Matching)
        })
    }

    /// Adds an entry: `path` below what is `listed` as that.
    pub(super) fn add(&mut self, listed: &[u8], path: &[u8], digest: ContentDigest) {
        sum::add_line(&mut self.sum, &join(listed, path), &digest);
        self.count += 1;
        if path.is_empty() && self.is_named {
            self.named = Some(digest);
        }
    }

    /// Adds what the rules show of what is there.
    pub(super) fn walk(
        &mut self,
        sums: &mut Sums<'_>,
        resolved: &Resolved,
        listed: &[u8],
    ) -> Result<(), ChecksumError> {
        let place = Place::of(sums.cache, resolved);
        let walk = sum::walk(&resolved.path, self.rules.to_vec());
        let mut lines = Lines { list: self, sums, base: &resolved.path, listed, place, dirs: Vec::new() };
        walk.run(resolved, &mut lines)
    }

    pub(super) fn finish(self) -> ContentDigest {
        match (self.count, self.named) {
            (1, Some(named)) => named,
            _ => ContentDigest(self.sum.finish()),
        }
    }
}

/// Adds the lines of one walk.
struct Lines<'s, 'l, 'a> {
    list: &'s mut List<'l>,
    sums: &'s mut Sums<'a>,
    base: &'s [u8],
    listed: &'s [u8],
    place: Place,
    /// The records of the directories that the walk is in.
    dirs: Vec<Option<RecordIndex>>,
}

impl Visitor for Lines<'_, '_, '_> {
    type Error = ChecksumError;

    fn enter(&mut self, found: &Found<'_>) -> Result<Step, ChecksumError> {
        let record = self.place.dir(self.sums.cache, self.dirs.last().copied(), found);
        self.dirs.push(record);
        if !(found.path.is_empty() && self.list.skips_start) {
            let header = self.sums.header(record, self.base, found)?;
            self.list.add(self.listed, found.path, header);
        }
        Ok(Step::Into)
    }

    fn leave(&mut self, _: &Found<'_>) -> Result<(), ChecksumError> {
        self.dirs.pop();
        Ok(())
    }

    fn leaf(&mut self, found: &Found<'_>) -> Result<(), ChecksumError> {
        let (dir, name) = self.place.leaf(self.dirs.last().copied(), found);
        let digest = self.sums.leaf(dir, name, self.base, found)?;
        self.list.add(self.listed, found.path, digest);
        Ok(())
    }
}
