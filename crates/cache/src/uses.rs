//! When and how often records were used: gathered in memory, written in heaps, never with a sync of their own. A crash
//! may lose the last 65,536.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, PoisonError};

use plies_store::{CatalogueError, Rows as _, Stamp};

use crate::manager::Inner;
use crate::record::{RECORDS, USES, UseRow};
use crate::sync::{Mutex, MutexGuard};
use crate::{CacheError, RecordId};

/// Uses that are gathered before some are written down: some 6 MB at the most. Written are those of neighbours, whose
/// rows share pages: of a million records used at random, eight fall on a page, where of 4,096 it is one.
const GATHERED_MAX: usize = 65_536;

/// Uses that are written in one transaction: others who write wait for no more than that, a few milliseconds.
const WRITTEN_AT_ONCE: usize = 256;

/// Uses that are not written down yet.
#[derive(Debug, Default)]
pub(crate) struct Uses(Mutex<Gathered>);

#[derive(Debug, Default)]
struct Gathered {
    uses: BTreeMap<RecordId, UseRow>,
    /// The last one that was written: its neighbours are next.
    written: Option<RecordId>,
}

impl Gathered {
    /// Takes some neighbours out, from where the last ones ended.
    fn take_some(&mut self) -> Vec<(RecordId, UseRow)> {
        let from = self.written.map_or(Bound::Unbounded, Bound::Excluded);
        let mut ids: Vec<RecordId> =
            self.uses.range((from, Bound::Unbounded)).take(WRITTEN_AT_ONCE).map(|(id, _)| *id).collect();
        if ids.is_empty() {
            ids.extend(self.uses.keys().take(WRITTEN_AT_ONCE));
        }
        self.written = ids.last().copied();
        ids.into_iter().filter_map(|id| self.uses.remove_entry(&id)).collect()
    }
}

impl Uses {
    fn lock(&self) -> MutexGuard<'_, Gathered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes one; gives some that are to be written down now.
    fn note(&self, id: RecordId, now: Stamp) -> Vec<(RecordId, UseRow)> {
        let mut gathered = self.lock();
        let use_row = gathered.uses.entry(id).or_default();
        use_row.last_used_at = use_row.last_used_at.max(Some(now));
        use_row.count = use_row.count.saturating_add(1);
        if gathered.uses.len() < GATHERED_MAX { Vec::new() } else { gathered.take_some() }
    }

    /// What is known of a record's uses: what was written and what is gathered.
    pub(crate) fn with(&self, id: RecordId, written: UseRow) -> UseRow {
        self.lock().uses.get(&id).map_or(written, |gathered| add(written, *gathered))
    }
}

fn add(written: UseRow, gathered: UseRow) -> UseRow {
    UseRow {
        last_used_at: written.last_used_at.max(gathered.last_used_at),
        count: written.count.saturating_add(gathered.count),
    }
}

impl Inner {
    pub(crate) fn note_use(self: &Arc<Self>, id: RecordId) {
        let due = self.uses.note(id, self.store.now());
        if !due.is_empty()
            && let Err(error) = self.write_uses(&due)
        {
            (self.warn)(&error);
        }
    }

    /// Writes down what was gathered. What others note meanwhile waits for the next time.
    pub(crate) fn flush_uses(&self) -> Result<(), CacheError> {
        let gathered = std::mem::take(&mut *self.uses.lock());
        let sorted: Vec<(RecordId, UseRow)> = gathered.uses.into_iter().collect();
        sorted.chunks(WRITTEN_AT_ONCE).try_for_each(|some| self.write_uses(some))
    }

    fn write_uses(&self, some: &[(RecordId, UseRow)]) -> Result<(), CacheError> {
        Ok(self.store.write_lazily(|tx| {
            for (id, gathered) in some {
                let written = tx.get(&USES, id)?;
                // A record may be gone by now, and its uses with it.
                if written.is_some() || tx.contains(&RECORDS, id)? {
                    tx.put(&USES, id, &add(written.unwrap_or_default(), *gathered))?;
                }
            }
            Ok::<_, CatalogueError>(())
        })?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_are_written_together_and_none_is_forgotten() {
        let uses = Uses::default();
        let id = |n: u32| {
            let mut bytes = [0; 16];
            // Noted in another order than they sort.
            bytes[..4].copy_from_slice(&n.reverse_bits().to_be_bytes());
            RecordId::from_bytes(bytes)
        };
        let mut written: BTreeMap<RecordId, u64> = BTreeMap::new();
        let rounds = u32::try_from(GATHERED_MAX).unwrap() * 2;
        for n in 0..rounds {
            let due = uses.note(id(n), Stamp::from_micros(n.into()));
            assert!(due.len() <= WRITTEN_AT_ONCE && due.is_sorted_by_key(|(id, _)| *id));
            for (id, row) in due {
                *written.entry(id).or_default() += row.count;
            }
        }
        let left = std::mem::take(&mut *uses.lock()).uses;
        assert!(left.len() < GATHERED_MAX && !written.is_empty());
        for (id, row) in left {
            *written.entry(id).or_default() += row.count;
        }
        assert_eq!(written.len(), rounds as usize);
        assert!(written.values().all(|count| *count == 1), "each use counts once");
    }
}
