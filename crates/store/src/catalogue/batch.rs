use std::fmt;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, ThreadId};

use redb::{Durability, WriteTransaction};

use super::{CatalogueError, ReadTx, Tx};
use crate::Stamp;

/// Members of one commit. More would lengthen the wait of the first and what one failure makes
/// run again, and save no further syncs worth having (512 at 0.4 ms each is 0.2 s of syncs).
const MAX_MEMBERS: usize = 512;

/// From this size of the file on, every durable commit also writes which pages are in use, so that an
/// open after a kill need not read the whole file to find out. Measured with redb 4.5 over a million
/// rows (1 GiB): 1 ms instead of 0.7 s with the file in the page cache, and several seconds from a
/// disk; but half as many durable commits a second from one thread, as the list is 64 KiB long. What
/// is smaller is read in less than 0.2 s, and has its checksums verified by it.
const QUICK_REPAIR_FROM_BYTES: u64 = 256 << 20;

/// When a write must be safe from a power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// Before `write` returns.
    Durable,
    /// With the next durable write. For stamps and for holds that no crash outlives anyway.
    Lazy,
}

/// The database, its gate, and the commit that is being gathered.
pub(crate) struct Catalogue {
    db: redb::Database,
    path: PathBuf,
    /// [`QUICK_REPAIR_FROM_BYTES`], but for tests.
    quick_repair_from_bytes: u64,
    /// Whoever holds it may run a closure or commit. Never taken inside a closure.
    gate: Mutex<Option<Gathering>>,
    /// Writers on their way to the gate: while there are any, the commit can wait for them.
    coming: AtomicUsize,
    /// The thread that is running its closure, to turn a write within a write into a panic
    /// instead of a deadlock.
    running: Mutex<Option<ThreadId>>,
}

/// A write transaction that at least one closure has run in.
struct Gathering {
    txn: WriteTransaction,
    urgency: Urgency,
    members: usize,
    outcome: Arc<Outcome>,
}

/// What became of a commit: its members wait here.
#[derive(Default)]
struct Outcome {
    verdict: Mutex<Option<Verdict>>,
    reached: Condvar,
}

#[derive(Clone)]
enum Verdict {
    Committed,
    /// A mate failed: run again.
    Aborted,
    Failed(CatalogueError),
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A closure's panic is caught before it could poison anything, and what a panic in the
    // database leaves behind is judged by the database.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Outcome {
    fn reach(&self, verdict: Verdict) {
        *lock(&self.verdict) = Some(verdict);
        self.reached.notify_all();
    }

    fn wait(&self) -> Verdict {
        let mut verdict = lock(&self.verdict);
        loop {
            if let Some(verdict) = &*verdict {
                return verdict.clone();
            }
            verdict = self.reached.wait(verdict).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Gathering {
    /// Commits for all members. A panic inside the database must not leave them waiting.
    fn commit(mut self, quick_repair: bool) {
        let outcome = Arc::clone(&self.outcome);
        let result = catch_unwind(AssertUnwindSafe(move || {
            if self.urgency == Urgency::Lazy {
                // What may be lost: stamps, and holds of processes that a crash ends as well.
                self.txn
                    .set_durability(Durability::None)
                    .map_err(|error| CatalogueError::database("set durability")(error.into()))?;
            }
            self.txn.set_two_phase_commit(true);
            self.txn.set_quick_repair(quick_repair);
            self.txn.commit().map_err(|error| CatalogueError::database("commit")(error.into()))
        }));
        match result {
            Ok(Ok(())) => outcome.reach(Verdict::Committed),
            Ok(Err(error)) => outcome.reach(Verdict::Failed(error)),
            Err(panic) => {
                let broken = redb::Error::Corrupted("the database panicked during the commit".to_owned());
                outcome.reach(Verdict::Failed(CatalogueError::database("commit")(broken)));
                resume_unwind(panic)
            }
        }
    }

    fn abort(self) {
        // An abort that fails leaves a database that refuses further writes, which the members
        // find out when they run again.
        let _ = self.txn.abort();
        self.outcome.reach(Verdict::Aborted);
    }
}

impl Catalogue {
    pub(crate) fn new(db: redb::Database, path: &Path) -> Self {
        Self {
            db,
            path: path.to_owned(),
            quick_repair_from_bytes: QUICK_REPAIR_FROM_BYTES,
            gate: Mutex::new(None),
            coming: AtomicUsize::new(0),
            running: Mutex::new(None),
        }
    }

    pub(crate) fn builder(cache_bytes: usize) -> redb::Builder {
        let mut builder = redb::Database::builder();
        builder.set_cache_size(cache_bytes);
        builder
    }

    pub(crate) fn open(path: &Path, cache_bytes: usize) -> Result<Self, redb::DatabaseError> {
        Ok(Self::new(Self::builder(cache_bytes).open(path)?, path))
    }

    pub(crate) fn read<T, E: From<CatalogueError>>(&self, read: impl FnOnce(&ReadTx) -> Result<T, E>) -> Result<T, E> {
        read(&ReadTx::begin(&self.db)?)
    }

    /// Runs `change` in a transaction and returns once it is committed; see the module.
    ///
    /// # Panics
    /// If called from within a closure of this catalogue, and with the panic of `change`.
    pub(crate) fn write<T, E: From<CatalogueError>>(
        &self,
        urgency: Urgency,
        now: &dyn Fn() -> Stamp,
        mut change: impl FnMut(&mut Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        let me = thread::current().id();
        assert!(*lock(&self.running) != Some(me), "a write inside a write would wait for itself");
        let mut again = false;
        loop {
            self.coming.fetch_add(1, Ordering::SeqCst);
            let mut gate = lock(&self.gate);
            self.coming.fetch_sub(1, Ordering::SeqCst);
            let mut gathering = match gate.take() {
                Some(gathering) => gathering,
                None => Gathering {
                    txn: self
                        .db
                        .begin_write()
                        .map_err(|error| CatalogueError::database("begin write")(error.into()))?,
                    urgency: Urgency::Lazy,
                    members: 0,
                    outcome: Arc::default(),
                },
            };

            let mut tx = Tx::new(&gathering.txn, now());
            *lock(&self.running) = Some(me);
            let result = catch_unwind(AssertUnwindSafe(|| change(&mut tx)));
            *lock(&self.running) = None;
            let wrote = tx.wrote();

            if !matches!(result, Ok(Ok(_))) {
                if wrote || gathering.members == 0 {
                    gathering.abort();
                } else {
                    self.leave(&mut gate, gathering, false);
                }
                drop(gate);
                match result {
                    Ok(error) => return error,
                    Err(panic) => resume_unwind(panic),
                }
            }

            if !wrote && gathering.members == 0 {
                gathering.abort();
                drop(gate);
                return result.expect("because a panic was handled above");
            }
            gathering.members += 1;
            if wrote && urgency == Urgency::Durable {
                gathering.urgency = Urgency::Durable;
            }
            let outcome = Arc::clone(&gathering.outcome);
            // Whoever was aborted for another's sake once does not wait for others again.
            self.leave(&mut gate, gathering, again);
            drop(gate);
            match outcome.wait() {
                Verdict::Committed => return result.expect("because a panic was handled above"),
                Verdict::Aborted => again = true,
                Verdict::Failed(error) => return Err(error.into()),
            }
        }
    }

    /// Leaves the commit to the next writer if one is coming, else commits. The next writer counted
    /// itself before it came to the gate, so it will pass here and do the same.
    fn leave(&self, gate: &mut MutexGuard<'_, Option<Gathering>>, gathering: Gathering, now: bool) {
        if now || gathering.members >= MAX_MEMBERS || self.coming.load(Ordering::SeqCst) == 0 {
            // A file that cannot be asked is dealt with as a large one: that is right for all.
            let is_large = || fs::metadata(&self.path).map_or(true, |file| file.len() >= self.quick_repair_from_bytes);
            let quick_repair = gathering.urgency == Urgency::Durable && is_large();
            gathering.commit(quick_repair);
        } else {
            **gate = Some(gathering);
        }
    }
}

impl fmt::Debug for Catalogue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Catalogue")
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU32};

    use super::super::{Rows as _, Table};
    use super::*;

    const NUMBERS: Table<u64, u64> = Table::new("numbers");

    fn catalogue(dir: &tempfile::TempDir) -> Catalogue {
        let path = dir.path().join("db");
        Catalogue::new(Catalogue::builder(1 << 20).create(&path).unwrap(), &path)
    }

    fn write<T>(
        catalogue: &Catalogue,
        change: impl FnMut(&mut Tx<'_>) -> Result<T, CatalogueError>,
    ) -> Result<T, CatalogueError> {
        catalogue.write(Urgency::Durable, &Stamp::default, change)
    }

    fn refused() -> CatalogueError {
        CatalogueError::Damaged { table: "test", key: String::new(), what: "on purpose" }
    }

    fn all(catalogue: &Catalogue) -> Vec<u64> {
        let rows: Result<_, CatalogueError> = catalogue.read(|tx| tx.all(&NUMBERS));
        rows.unwrap().into_iter().map(|(number, _)| number).collect()
    }

    /// Lets a closure run until another writer is on its way, so that the two share a commit.
    fn until_somebody_comes(catalogue: &Catalogue) {
        while catalogue.coming.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
    }

    #[test]
    fn concurrent_writers_share_a_commit() {
        let dir = tempfile::tempdir().unwrap();
        let catalogue = &catalogue(&dir);
        let began = AtomicU32::new(0);
        thread::scope(|scope| {
            scope.spawn(|| {
                write(catalogue, |tx| {
                    began.store(1, Ordering::SeqCst);
                    until_somebody_comes(catalogue);
                    tx.put(&NUMBERS, &1, &0)
                })
                .unwrap();
            });
            while began.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            write(catalogue, |tx| {
                // The mate's row is there for us, and for nobody else yet: one commit for both.
                assert!(tx.contains(&NUMBERS, &1)?);
                assert_eq!(all(catalogue), [0; 0]);
                tx.put(&NUMBERS, &2, &0)
            })
            .unwrap();
        });
        assert_eq!(all(catalogue), [1, 2]);
    }

    #[test]
    fn a_failing_mate_leaves_nothing_and_the_others_run_again() {
        for panics in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let catalogue = &catalogue(&dir);
            let runs = AtomicU32::new(0);
            thread::scope(|scope| {
                let good = scope.spawn(|| {
                    write(catalogue, |tx| {
                        if runs.fetch_add(1, Ordering::SeqCst) == 0 {
                            until_somebody_comes(catalogue);
                        }
                        tx.put(&NUMBERS, &1, &0)
                    })
                });
                while runs.load(Ordering::SeqCst) == 0 {
                    thread::yield_now();
                }
                let bad = scope.spawn(|| {
                    write(catalogue, |tx| {
                        tx.put(&NUMBERS, &2, &0)?;
                        assert!(!panics, "on purpose");
                        Err::<(), _>(refused())
                    })
                });
                match bad.join() {
                    Ok(result) => assert!(!panics && result.is_err()),
                    Err(_) => assert!(panics),
                }
                assert!(good.join().unwrap().unwrap(), "it was not there when it ran again");
            });
            assert_eq!(runs.load(Ordering::SeqCst), 2);
            assert_eq!(all(catalogue), [1]);
            write(catalogue, |tx| tx.put(&NUMBERS, &3, &0)).unwrap();
            assert_eq!(all(catalogue), [1, 3]);
        }
    }

    #[test]
    fn a_mate_that_fails_before_it_writes_disturbs_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let catalogue = &catalogue(&dir);
        let runs = AtomicU32::new(0);
        thread::scope(|scope| {
            let good = scope.spawn(|| {
                write(catalogue, |tx| {
                    runs.fetch_add(1, Ordering::SeqCst);
                    until_somebody_comes(catalogue);
                    tx.put(&NUMBERS, &1, &0)
                })
            });
            while runs.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            scope.spawn(|| assert!(write(catalogue, |_| Err::<(), _>(refused())).is_err()));
            good.join().unwrap().unwrap();
        });
        assert_eq!((runs.load(Ordering::SeqCst), all(catalogue)), (1, vec![1]));
    }

    #[test]
    fn many_writers_lose_nothing_and_see_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let catalogue = &catalogue(&dir);
        thread::scope(|scope| {
            for writer in 0..8u64 {
                scope.spawn(move || {
                    for n in 0..25 {
                        let urgency = if n % 2 == 0 { Urgency::Lazy } else { Urgency::Durable };
                        let fails = (writer + n) % 5 == 0;
                        let result = catalogue.write(urgency, &Stamp::default, |tx| {
                            let count = tx.get(&NUMBERS, &0)?.unwrap_or(0);
                            tx.put(&NUMBERS, &0, &(count + 1))?;
                            tx.put(&NUMBERS, &(1 + writer * 100 + n), &0)?;
                            if fails { Err(refused()) } else { Ok(()) }
                        });
                        assert_eq!(result.is_err(), fails);
                    }
                });
            }
        });
        let count: Result<_, CatalogueError> = catalogue.read(|tx| tx.get(&NUMBERS, &0));
        assert_eq!(count.unwrap(), Some(160));
        assert_eq!(all(catalogue).len(), 161);
    }

    #[test]
    fn a_lazy_write_is_visible_at_once_and_kept_by_a_clean_close() {
        let dir = tempfile::tempdir().unwrap();
        let first = catalogue(&dir);
        first.write(Urgency::Lazy, &Stamp::default, |tx| tx.put(&NUMBERS, &7, &0)).unwrap();
        assert_eq!(all(&first), [7]);
        drop(first);
        assert_eq!(all(&Catalogue::open(&dir.path().join("db"), 1 << 20).unwrap()), [7]);
    }

    #[test]
    fn a_large_file_is_not_read_through_after_a_kill() {
        for (from_bytes, repairs) in [(0, false), (u64::MAX, true)] {
            let dir = tempfile::tempdir().unwrap();
            let mut catalogue = catalogue(&dir);
            catalogue.quick_repair_from_bytes = from_bytes;
            write(&catalogue, |tx| tx.put(&NUMBERS, &7, &0)).unwrap();
            catalogue.write(Urgency::Lazy, &Stamp::default, |tx| tx.put(&NUMBERS, &8, &0)).unwrap();
            // What a kill would leave.
            let killed = dir.path().join("killed");
            fs::copy(dir.path().join("db"), &killed).unwrap();
            let repaired = Arc::new(AtomicBool::new(false));
            let saw_repair = Arc::clone(&repaired);
            let mut builder = Catalogue::builder(1 << 20);
            builder.set_repair_callback(move |_| saw_repair.store(true, Ordering::SeqCst));
            let opened = Catalogue::new(builder.open(&killed).unwrap(), &killed);
            assert_eq!(repaired.load(Ordering::SeqCst), repairs);
            assert_eq!(all(&opened), [7]);
        }
    }

    #[test]
    #[should_panic(expected = "a write inside a write")]
    fn a_write_inside_a_write_panics_instead_of_waiting_for_itself() {
        let dir = tempfile::tempdir().unwrap();
        let catalogue = catalogue(&dir);
        let _ = write(&catalogue, |_| write(&catalogue, |_| Ok(())));
    }
}
