//! When and how often records were used: gathered in memory, written in heaps, never with a sync of their own. A crash
//! may lose the last few thousand.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use plies_store::{CatalogueError, Rows as _, Stamp};

use crate::manager::Inner;
use crate::record::{RECORDS, USES, UseRow};
use crate::{CacheError, RecordId};

/// Uses that are gathered before they are written down: some 200 KiB.
const GATHERED_MAX: usize = 4096;

/// Uses that are not written down yet.
#[derive(Debug, Default)]
pub(crate) struct Uses(Mutex<HashMap<RecordId, UseRow>>);

impl Uses {
    fn lock(&self) -> MutexGuard<'_, HashMap<RecordId, UseRow>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes one; true if it is time to write them down.
    pub(crate) fn note(&self, id: RecordId, now: Stamp) -> bool {
        let mut gathered = self.lock();
        let use_row = gathered.entry(id).or_default();
        use_row.last_used_at = use_row.last_used_at.max(Some(now));
        use_row.count = use_row.count.saturating_add(1);
        gathered.len() >= GATHERED_MAX
    }

    /// What is known of a record's uses: what was written and what is gathered.
    pub(crate) fn with(&self, id: RecordId, written: UseRow) -> UseRow {
        self.lock().get(&id).map_or(written, |gathered| add(written, *gathered))
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
        if self.uses.note(id, self.store.now())
            && let Err(error) = self.flush_uses()
        {
            (self.warn)(&error);
        }
    }

    /// Writes down what was gathered. What others note meanwhile waits for the next time.
    pub(crate) fn flush_uses(&self) -> Result<(), CacheError> {
        let gathered = std::mem::take(&mut *self.uses.lock());
        if gathered.is_empty() {
            return Ok(());
        }
        let mut sorted: Vec<(RecordId, UseRow)> = gathered.into_iter().collect();
        sorted.sort_unstable_by_key(|(id, _)| *id);
        Ok(self.store.write_lazily(|tx| {
            for (id, gathered) in &sorted {
                // A record may be gone by now.
                if tx.contains(&RECORDS, id)? {
                    let written = tx.get(&USES, id)?.unwrap_or_default();
                    tx.put(&USES, id, &add(written, *gathered))?;
                }
            }
            Ok::<_, CatalogueError>(())
        })?)
    }
}
