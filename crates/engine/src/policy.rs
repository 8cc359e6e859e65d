//! The policy: rules by which the build cache is kept at all times, not only when somebody prunes it.
//!
//! Whenever bytes were added (a step made its layer; an image was loaded, pulled or built) it is asked whether a rule
//! asks for something to go. That must cost nothing: it is a comparison of sums. The store knows the bytes of all that it
//! has, so the cache cannot have more. Only if that is over a cap, the cache is looked at, record by record, and what is to
//! go goes; from then on it is known how much the cache has, and only what was added since then counts against it.
//!
//! Rules with a filter or a keep duration spare most records, and so may be over their cap for good. They are looked at
//! when a request has ended, and at most once in [`AGED_EVERY`].

use std::io;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use plies_cache::{Cap, PruneOptions, PruneReport, effective_keep};
use plies_store::{Cancel, CatalogueError, Rows as _, Stamp, Table};
use rustix::io::Errno;

use crate::Engine;
use crate::prune::PruneError;

/// When rules were last looked at, by 0.
const LOOKED_AT: Table<u8, u64> = Table::new("engine.policy");

/// Time between two looks at rules with a filter or a keep duration. The shortest duration of the default rules is two
/// days.
const AGED_EVERY: Duration = Duration::from_secs(60 * 60);

/// What a cap cannot be kept by, since all that is over it is used or spared: that part of the cap must come to it before
/// it is tried again within a request.
const STUCK_PART: u64 = 64;

/// When it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Something was added, and there is more to come.
    Added,
    /// A request has ended: what it held is free to go.
    Ended,
}

/// The rules, and what is known of the sums.
#[derive(Debug)]
pub(crate) struct Policy {
    rules: Vec<PruneOptions>,
    known: Mutex<Option<Known>>,
}

/// What the last look found.
#[derive(Debug, Clone, Copy)]
struct Known {
    /// What the cache used.
    used_bytes: u64,
    /// What the store had.
    stored_bytes: u64,
    /// A cap was not kept all the same.
    stuck: bool,
}

impl Policy {
    pub(crate) fn new(rules: Vec<PruneOptions>) -> Self {
        Self { rules, known: Mutex::default() }
    }

    pub(crate) fn rules(&self) -> &[PruneOptions] {
        &self.rules
    }

    /// Something else than this may have gone, so that sums say nothing about the cache any more.
    pub(crate) fn forget(&self) {
        *self.known.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// What the cache may take at the most; `None` if no rule says.
    fn limit_bytes(&self) -> Option<u64> {
        let caps = self.rules.iter().filter(|rule| is_strict(rule) && rule.max_used_space_bytes != 0);
        caps.map(|rule| rule.max_used_space_bytes.max(rule.reserved_space_bytes)).min()
    }
}

/// Whether a rule may take any record.
fn is_strict(rule: &PruneOptions) -> bool {
    rule.filters.is_empty() && rule.keep_duration.is_zero()
}

impl Known {
    /// What the cache uses at the most, now that the store has so much.
    fn at_most(self, stored_bytes: u64) -> u64 {
        self.used_bytes.saturating_add(stored_bytes.saturating_sub(self.stored_bytes)).min(stored_bytes)
    }
}

/// Whether a rule asks for something to go if the cache uses so much; with `Some`, over which cap it is.
fn is_over(rule: &PruneOptions, used_bytes: u64, free_bytes: u64) -> Option<u64> {
    match effective_keep(rule, used_bytes, free_bytes) {
        Cap::Everything => None,
        Cap::Off => Some(0),
        Cap::Bytes(keep) => (used_bytes >= keep).then_some(keep),
    }
}

/// Whether the cache is to be looked at.
fn is_due(rules: &[PruneOptions], known: Option<Known>, stored_bytes: u64, free_bytes: u64, moment: Moment) -> bool {
    let used_bytes = known.map_or(stored_bytes, |known| known.at_most(stored_bytes));
    rules.iter().filter(|rule| is_strict(rule)).any(|rule| match (is_over(rule, used_bytes, free_bytes), known) {
        (None, _) => false,
        // Rules without a cap are about what is there when all is done.
        (Some(_), _) if !rule.has_cap() => moment == Moment::Ended,
        (Some(keep), Some(known)) if known.stuck && moment == Moment::Added => {
            used_bytes - known.used_bytes.min(used_bytes) > keep / STUCK_PART
        }
        (Some(_), _) => true,
    })
}

impl Engine {
    /// Keeps the policy: removes from the build cache what it asks for.
    ///
    /// # Errors
    /// [`PruneError::OverLimit`] if what is in use alone is more than the cache may take; others of a prune.
    pub(crate) fn keep_policy(&self, moment: Moment, cancel: &Cancel) -> Result<(), PruneError> {
        if self.policy.rules.is_empty() {
            return Ok(());
        }
        // One at a time: a second one would find what the first is just removing.
        let mut known = self.policy.known.lock().unwrap_or_else(PoisonError::into_inner);
        let stored_bytes = self.store().stored_bytes()?;
        let free_bytes = match self.policy.rules.iter().any(|rule| rule.min_free_space_bytes != 0) {
            true => self.free_bytes()?,
            false => 0,
        };
        let aged = moment == Moment::Ended && self.aged_rules_are_due(stored_bytes, free_bytes)?;
        if !aged && !is_due(&self.policy.rules, *known, stored_bytes, free_bytes, moment) {
            return Ok(());
        }
        let PruneReport { used_bytes, in_use_bytes, .. } =
            self.cache.controller().prune(&self.policy.rules, &mut |_| (), cancel)?;
        let (stored_bytes, free_bytes) = (self.store().stored_bytes()?, self.free_bytes()?);
        let mut capped = self.policy.rules.iter().filter(|rule| is_strict(rule) && rule.has_cap());
        let stuck = capped.any(|rule| is_over(rule, used_bytes, free_bytes).is_some());
        *known = Some(Known { used_bytes, stored_bytes, stuck });
        if moment == Moment::Ended {
            let now = self.store().now();
            self.store().write_lazily(|tx| tx.put(&LOOKED_AT, &0, &now.as_micros()).map(drop))?;
        }
        match self.policy.limit_bytes() {
            Some(limit_bytes) if in_use_bytes > limit_bytes => Err(PruneError::OverLimit { in_use_bytes, limit_bytes }),
            _ => Ok(()),
        }
    }

    /// As [`Engine::keep_policy`], after a request that is over, well or not: what goes wrong is told, and is no failure of
    /// it.
    pub(crate) fn keep_policy_after<T, E>(&self, done: Result<T, E>, cancel: &Cancel) -> Result<T, E> {
        if !cancel.is_canceled()
            && let Err(error) = self.keep_policy(Moment::Ended, cancel)
        {
            (self.warn)(&error);
        }
        done
    }

    /// How large the file system of the store is.
    ///
    /// # Errors
    /// [`PruneError::FileSystem`].
    pub fn disk_bytes(&self) -> Result<u64, PruneError> {
        let root = self.store().root();
        disk_bytes(root).map_err(|source| PruneError::FileSystem { root: root.to_owned(), source })
    }

    fn aged_rules_are_due(&self, stored_bytes: u64, free_bytes: u64) -> Result<bool, CatalogueError> {
        let over = |rule: &PruneOptions| !is_strict(rule) && is_over(rule, stored_bytes, free_bytes).is_some();
        if !self.policy.rules.iter().any(over) {
            return Ok(false);
        }
        let looked_at = self.store().read(|rows| rows.get(&LOOKED_AT, &0))?;
        Ok(looked_at.is_none_or(|at| self.store().now().since(Stamp::from_micros(at)) >= AGED_EVERY))
    }

    fn free_bytes(&self) -> Result<u64, PruneError> {
        let root = self.store().root();
        let stat = rustix::fs::statvfs(root)
            .map_err(|error| PruneError::FileSystem { root: root.to_owned(), source: error.into() })?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

/// How large the file system is that `path` is on, or will be.
///
/// # Errors
/// If it does not say.
pub fn disk_bytes(path: &Path) -> io::Result<u64> {
    for dir in path.ancestors() {
        match rustix::fs::statvfs(dir) {
            Ok(stat) => return Ok(stat.f_blocks.saturating_mul(stat.f_frsize)),
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::ErrorKind::NotFound.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn capped(max_used_space_bytes: u64) -> PruneOptions {
        PruneOptions { max_used_space_bytes, ..PruneOptions::default() }
    }

    #[test]
    fn sums_decide_whether_the_cache_is_looked_at() {
        use Moment::{Added, Ended};
        let known = |used_bytes, stored_bytes, stuck| Some(Known { used_bytes, stored_bytes, stuck });
        let aged = PruneOptions { keep_duration: Duration::from_secs(1), ..capped(10) };
        let filtered = PruneOptions { filters: vec!["mutable".into()], ..capped(10) };
        for (rules, known, stored, free, moment, expected) in [
            // The store has less than the cap, so the cache has.
            (vec![capped(100)], None, 99, 0, Added, false),
            (vec![capped(100)], None, 100, 0, Added, true),
            // Of 500 bytes, the cache had 20: what was added since may be all its.
            (vec![capped(100)], known(20, 500, false), 579, 0, Added, false),
            (vec![capped(100)], known(20, 500, false), 580, 0, Added, true),
            // All are looked at in turn.
            (vec![capped(1000), capped(100)], None, 100, 0, Added, true),
            // What cannot go is not looked for again and again; but when a request has ended it may go.
            (vec![capped(128)], known(200, 500, true), 502, 0, Added, false),
            (vec![capped(128)], known(200, 500, true), 503, 0, Added, true),
            (vec![capped(128)], known(200, 500, true), 502, 0, Ended, true),
            // Those are for the end of a request.
            (vec![aged, filtered], None, 100, 0, Added, false),
            (vec![PruneOptions::default()], None, 100, 0, Added, false),
            (vec![PruneOptions::default()], None, 100, 0, Ended, true),
            // Free space is asked for, and is there or not.
            (vec![PruneOptions { min_free_space_bytes: 5, ..capped(0) }], None, 100, 5, Added, false),
            (vec![PruneOptions { min_free_space_bytes: 5, ..capped(0) }], None, 100, 4, Added, true),
        ] {
            let due = is_due(&rules, known, stored, free, moment);
            assert_eq!(due, expected, "{rules:?}, {known:?}, {stored} stored, {free} free, {moment:?}");
        }
    }

    #[test]
    fn the_limit_is_the_strictest_of_the_rules_that_may_take_anything() {
        let limit = |rules| Policy::new(rules).limit_bytes();
        assert_eq!(limit(vec![]), None);
        assert_eq!(limit(vec![PruneOptions { filters: vec!["mutable".into()], ..capped(5) }]), None);
        assert_eq!(limit(vec![capped(7), capped(5), capped(0)]), Some(5));
        assert_eq!(limit(vec![PruneOptions { reserved_space_bytes: 9, ..capped(5) }]), Some(9));
    }
}
