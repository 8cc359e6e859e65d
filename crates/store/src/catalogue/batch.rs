use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError};

use super::view::{Base, Changes, View};
use super::{CatalogueError, ReadTx, Tx};
use crate::Stamp;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::thread::{self, ThreadId};
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::tree::STAT_BLOCK_BYTES;

/// Rows that lazy writes may leave in memory. More are written down by whoever put them: some 4 MB of rows of 200
/// bytes, 30 ms of writing on the slowest day, and far more than a build's worth of holds and stamps.
const PENDING_ROWS_MAX: usize = 16_384;

/// From so much of the file on that was ever written to, every commit also writes which pages are in use, so that an open after a kill need
/// not read the whole file to find out. Measured with redb 4.5 over a million rows (1 GiB): 1 ms instead of 0.7 s with
/// the file in the page cache, and several seconds from a disk; but half as many commits a second from one thread, as
/// the list is 64 KiB long. What is smaller is read in less than 0.2 s, and has its checksums verified by it.
const QUICK_REPAIR_FROM_BYTES: u64 = 256 << 20;

/// Rows that a session removes before its end is worth a compaction: some 3 MB of rows of 200 bytes. Another condition is
/// that they are more than what is left, so that a compaction never costs more than what it follows.
const COMPACT_FROM_ROWS: u64 = 16_384;

/// When a write must be safe from a power failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// Before `write` returns.
    Durable,
    /// With the next durable write. For stamps and for holds that no crash outlives anyway.
    Lazy,
}

/// The database, and what is not in it yet.
pub(crate) struct Catalogue {
    db: redb::Database,
    path: PathBuf,
    /// [`QUICK_REPAIR_FROM_BYTES`], but for tests.
    quick_repair_from_bytes: u64,
    /// Whoever holds it may run a closure. Never taken inside a closure.
    gate: Mutex<()>,
    /// The thread that is running its closure, to turn a write within a write into a panic
    /// instead of a deadlock.
    running: Mutex<Option<ThreadId>>,
    /// A leaf, held for a few instructions or the merge of one closure's changes.
    state: Mutex<State>,
    /// A flush has ended.
    flushed: Condvar,
    /// Rows that went since it was opened.
    removed_count: AtomicU64,
}

struct State {
    view: View,
    /// Somebody is writing `view.flushing` down.
    is_flushing: bool,
    /// Closures whose changes are in the view, and those whose changes are durable.
    published: u64,
    durable: u64,
    /// A flush failed: nothing was written since, and nothing will be.
    failed: Option<CatalogueError>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A closure that panics has changed nothing that others see, and nothing panics while holding the state.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Notes who runs a closure, until it is done or panics.
struct Running<'a>(&'a Mutex<Option<ThreadId>>);

impl<'a> Running<'a> {
    fn note(running: &'a Mutex<Option<ThreadId>>) -> Self {
        *lock(running) = Some(thread::current().id());
        Self(running)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        *lock(self.0) = None;
    }
}

impl Catalogue {
    pub(crate) fn new(db: redb::Database, path: &Path) -> Result<Self, redb::DatabaseError> {
        let base = Base::begin(&db).map_err(|error| match error {
            redb::TransactionError::Storage(error) => redb::DatabaseError::Storage(error),
            error => redb::DatabaseError::Storage(redb::StorageError::Corrupted(error.to_string())),
        })?;
        let base = Arc::new(base);
        Ok(Self {
            db,
            path: path.to_owned(),
            quick_repair_from_bytes: QUICK_REPAIR_FROM_BYTES,
            gate: Mutex::new(()),
            running: Mutex::new(None),
            state: Mutex::new(State {
                view: View { base, flushing: Arc::default(), pending: Arc::default() },
                is_flushing: false,
                published: 0,
                durable: 0,
                failed: None,
            }),
            flushed: Condvar::new(),
            removed_count: AtomicU64::new(0),
        })
    }

    pub(crate) fn builder(cache_bytes: usize) -> redb::Builder {
        let mut builder = redb::Database::builder();
        builder.set_cache_size(cache_bytes);
        builder
    }

    pub(crate) fn open(path: &Path, cache_bytes: usize) -> Result<Self, redb::DatabaseError> {
        Self::new(Self::builder(cache_bytes).open(path)?, path)
    }

    pub(crate) fn read<T, E: From<CatalogueError>>(&self, read: impl FnOnce(&ReadTx) -> Result<T, E>) -> Result<T, E> {
        let view = lock(&self.state).view.clone();
        read(&ReadTx::new(view))
    }

    /// Runs `change` over everything that was changed before, and returns once what it changed is as safe as asked for, or, if
    /// it changed nothing, what it found; see the module.
    ///
    /// # Panics
    /// If called from within a closure of this catalogue, and with the panic of `change`.
    pub(crate) fn write<T, E: From<CatalogueError>>(
        &self,
        urgency: Urgency,
        now: &dyn Fn() -> Stamp,
        change: impl FnOnce(&mut Tx<'_>) -> Result<T, E>,
    ) -> Result<T, E> {
        assert!(*lock(&self.running) != Some(thread::current().id()), "a write inside a write would wait for itself");
        let gate = lock(&self.gate);
        let (view, seen) = {
            let state = lock(&self.state);
            state.failed.clone().map_or(Ok(()), Err)?;
            (state.view.clone(), state.published)
        };
        let mut tx = Tx::new(&view, now());
        let running = Running::note(&self.running);
        let result = change(&mut tx)?;
        drop(running);
        let changes = tx.finish();
        if changes.rows() == 0 {
            drop(gate);
            if urgency == Urgency::Durable {
                // What it found as it was to be may be there in memory only, or on its way and never arrive.
                self.flush_up_to(seen)?;
            }
            return Ok(result);
        }
        let traceless = view.traceless(&changes)?;
        let View { base, flushing, pending } = view;
        // Else the pending changes would be copied for the sake of our own view.
        drop(pending);
        let (number, waiting) = {
            let mut state = lock(&self.state);
            state.failed.clone().map_or(Ok(()), Err)?;
            let is_as_it_was = Arc::ptr_eq(&state.view.base, &base) && Arc::ptr_eq(&state.view.flushing, &flushing);
            let pending = Arc::make_mut(&mut state.view.pending);
            pending.extend(&changes);
            if is_as_it_was {
                traceless.iter().for_each(|(table, key)| pending.forget(table, key));
            }
            state.published += 1;
            (state.published, state.view.pending.rows())
        };
        drop(gate);
        if urgency == Urgency::Durable || waiting > PENDING_ROWS_MAX {
            self.flush_up_to(number)?;
        }
        Ok(result)
    }

    /// Writes down whatever is not yet.
    pub(crate) fn flush(&self) -> Result<(), CatalogueError> {
        let published = lock(&self.state).published;
        self.flush_up_to(published)
    }

    /// Returns when the changes of the first `number` closures are durable. One writes for all who wait; who comes
    /// meanwhile waits for the next time, together with others.
    fn flush_up_to(&self, number: u64) -> Result<(), CatalogueError> {
        let mut state = lock(&self.state);
        loop {
            if state.durable >= number {
                return Ok(());
            }
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            if state.is_flushing {
                state = self.flushed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.is_flushing = true;
            let changes = std::mem::take(&mut state.view.pending);
            state.view.flushing = Arc::clone(&changes);
            let published = state.published;
            drop(state);

            // A panic inside the database must not leave the others waiting.
            let written = catch_unwind(AssertUnwindSafe(|| self.commit(&changes)));

            state = lock(&self.state);
            state.is_flushing = false;
            // Thousands of rows are freed when nobody is kept waiting by it.
            let old = (Arc::clone(&state.view.base), std::mem::take(&mut state.view.flushing), changes);
            let done = match written {
                Ok(Ok(base)) => {
                    state.view.base = Arc::new(base);
                    state.durable = published;
                    Ok(Ok(()))
                }
                Ok(Err(error)) => Ok(Err(error)),
                Err(panic) => Err(panic),
            };
            let failed = match &done {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error.clone()),
                Err(_) => {
                    let broken = redb::Error::Corrupted("the database panicked during the commit".to_owned());
                    Some(CatalogueError::database("commit")(broken))
                }
            };
            if failed.is_some() {
                // As a crash would have it: what was not written down never was.
                state.view.pending = Arc::default();
                state.failed = failed;
            }
            self.flushed.notify_all();
            drop(state);
            drop(old);
            // What was asked for was among what was written.
            return done.unwrap_or_else(|panic| resume_unwind(panic));
        }
    }

    fn commit(&self, changes: &Changes) -> Result<Base, CatalogueError> {
        let mut txn = self.db.begin_write().map_err(|error| CatalogueError::database("begin write")(error.into()))?;
        changes.apply(&txn)?;
        // Its length says little: the database makes the file longer by doubling, and most of that is a hole. A file that
        // cannot be asked is dealt with as a large one: that is right for all.
        let written_bytes = |file: fs::Metadata| file.blocks() * STAT_BLOCK_BYTES;
        let is_large =
            fs::metadata(&self.path).map_or(true, |file| written_bytes(file) >= self.quick_repair_from_bytes);
        txn.set_two_phase_commit(true);
        txn.set_quick_repair(is_large);
        // Before the commit, which is one step to a scheduler in place of threads: here it lets others see that it is not done.
        self.removed_count.fetch_add(changes.removed_count(), Ordering::Relaxed);
        txn.commit().map_err(|error| CatalogueError::database("commit")(error.into()))?;
        Base::begin(&self.db).map_err(|error| CatalogueError::database("begin read")(error.into()))
    }
}

impl Catalogue {
    /// Whether so much went since it was opened that the file is mostly free pages.
    pub(crate) fn is_hollow(&self) -> Result<bool, CatalogueError> {
        let removed_count = self.removed_count.load(Ordering::Relaxed);
        if removed_count < COMPACT_FROM_ROWS {
            return Ok(false);
        }
        let base = Arc::clone(&lock(&self.state).view.base);
        Ok(base.rows_count()? < removed_count)
    }

    /// Moves what is in the file to its beginning and gives the rest back to the file system. Costs time and writes for
    /// what is in it, and nothing else can be done meanwhile. A kill leaves a database that the next open repairs.
    pub(crate) fn compact(&mut self) -> Result<(), CatalogueError> {
        self.flush()?;
        let failed = |error: redb::Error| CatalogueError::database("compact")(error);
        // Compaction wants nobody to read, and there is no view without a base: for that time it is an empty one.
        let empty = Self::builder(0)
            .create_with_backend(redb::backends::InMemoryBackend::new())
            .map_err(|error| failed(error.into()))?;
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.view.base = Arc::new(Base::begin(&empty).map_err(|error| failed(error.into()))?);
        let compacted = self.db.compact();
        state.view.base = Arc::new(Base::begin(&self.db).map_err(|error| failed(error.into()))?);
        self.removed_count.store(0, Ordering::Relaxed);
        compacted.map(drop).map_err(|error| failed(error.into()))
    }
}

impl Drop for Catalogue {
    fn drop(&mut self) {
        // Whoever cares for the error flushed before.
        let _ = self.flush();
    }
}

impl fmt::Debug for Catalogue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Catalogue")
    }
}

#[cfg(test)]
mod power;

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

    use redb::StorageBackend;
    use redb::backends::FileBackend;

    use super::super::{Rows as _, Table};
    use super::*;

    const NUMBERS: Table<u64, u64> = Table::new("numbers");

    fn catalogue(dir: &tempfile::TempDir) -> Catalogue {
        let path = dir.path().join("db");
        Catalogue::new(Catalogue::builder(1 << 20).create(&path).unwrap(), &path).unwrap()
    }

    fn write<T>(
        catalogue: &Catalogue,
        change: impl FnOnce(&mut Tx<'_>) -> Result<T, CatalogueError>,
    ) -> Result<T, CatalogueError> {
        catalogue.write(Urgency::Durable, &Stamp::default, change)
    }

    fn write_lazily(catalogue: &Catalogue, number: u64) {
        catalogue.write(Urgency::Lazy, &Stamp::default, |tx| tx.put(&NUMBERS, &number, &0)).unwrap()
    }

    fn refused() -> CatalogueError {
        CatalogueError::Damaged { table: "test", key: String::new(), what: "on purpose" }
    }

    #[test]
    fn a_file_that_is_mostly_free_is_compacted_and_keeps_its_rows() {
        const TEXTS: Table<String, u64> = Table::new("texts");
        let dir = tempfile::tempdir().unwrap();
        let mut catalogue = catalogue(&dir);
        let size = |catalogue: &Catalogue| fs::metadata(&catalogue.path).unwrap().len();
        let text = |number: u64| format!("{number:0200}");
        let count = 100_000;
        for from in (0..count).step_by(10_000) {
            write(&catalogue, |tx| (from..from + 10_000).try_for_each(|number| tx.put(&TEXTS, &text(number), &number)))
                .unwrap();
        }
        assert!(!catalogue.is_hollow().unwrap(), "nothing was removed");
        // Half is not enough: what would be moved is as much as what went.
        write(&catalogue, |tx| (0..count / 2 - 1).try_for_each(|number| tx.remove(&TEXTS, &text(number)).map(drop)))
            .unwrap();
        assert!(!catalogue.is_hollow().unwrap());
        write(&catalogue, |tx| {
            (count / 2 - 1..count - 100).try_for_each(|number| tx.remove(&TEXTS, &text(number)).map(drop))
        })
        .unwrap();
        assert!(catalogue.is_hollow().unwrap());
        let before = size(&catalogue);
        catalogue.compact().unwrap();
        assert!(before > 20_000_000 && size(&catalogue) < 5_000_000, "{before} bytes, then {}", size(&catalogue));
        assert!(!catalogue.is_hollow().unwrap(), "done");

        let numbers = |catalogue: &Catalogue| -> Vec<u64> {
            let rows: Result<_, CatalogueError> = catalogue.read(|tx| tx.all(&TEXTS));
            rows.unwrap().into_iter().map(|(_, number)| number).collect()
        };
        let expected: Vec<u64> = (count - 100..count).collect();
        assert_eq!(numbers(&catalogue), expected);
        write(&catalogue, |tx| tx.put(&TEXTS, &text(count), &count)).unwrap();
        let path = catalogue.path.clone();
        drop(catalogue);
        let reopened = Catalogue::open(&path, 1 << 20).unwrap();
        assert_eq!(numbers(&reopened).last(), Some(&count));
    }

    fn all(catalogue: &Catalogue) -> Vec<u64> {
        let rows: Result<_, CatalogueError> = catalogue.read(|tx| tx.all(&NUMBERS));
        rows.unwrap().into_iter().map(|(number, _)| number).collect()
    }

    /// What a test does to the disk, and sees of it.
    #[derive(Debug, Default)]
    struct Disk {
        syncs: AtomicUsize,
        fails: AtomicBool,
        /// A sync waits while it is held.
        is_stuck: Mutex<()>,
    }

    #[derive(Debug)]
    struct DiskBackend(FileBackend, Arc<Disk>);

    impl StorageBackend for DiskBackend {
        fn len(&self) -> io::Result<u64> {
            self.0.len()
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            self.0.read(offset, out)
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.0.set_len(len)
        }

        fn sync_data(&self) -> io::Result<()> {
            self.1.syncs.fetch_add(1, Ordering::SeqCst);
            let _stuck = lock(&self.1.is_stuck);
            if self.1.fails.load(Ordering::SeqCst) {
                return Err(io::Error::from_raw_os_error(5));
            }
            self.0.sync_data()
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.0.write(offset, data)
        }

        fn close(&self) -> io::Result<()> {
            self.0.close()
        }
    }

    fn on_a_disk(dir: &tempfile::TempDir) -> (Catalogue, Arc<Disk>) {
        let path = dir.path().join("db");
        let file = fs::File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        let disk = Arc::new(Disk::default());
        let backend = DiskBackend(FileBackend::new(file).unwrap(), Arc::clone(&disk));
        let db = Catalogue::builder(1 << 20).create_with_backend(backend).unwrap();
        (Catalogue::new(db, &path).unwrap(), disk)
    }

    fn wait_until(happens: impl Fn() -> bool) {
        while !happens() {
            thread::yield_now();
        }
    }

    #[test]
    fn nobody_waits_for_the_disk_who_need_not_and_the_others_share_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let (catalogue, disk) = on_a_disk(&dir);
        let catalogue = &catalogue;
        let before = disk.syncs.load(Ordering::SeqCst);
        write(catalogue, |tx| tx.put(&NUMBERS, &0, &0)).unwrap();
        let of_one = disk.syncs.load(Ordering::SeqCst) - before;
        assert!(of_one > 0);

        let stuck = lock(&disk.is_stuck);
        thread::scope(|scope| {
            let first = scope.spawn(|| write(catalogue, |tx| tx.put(&NUMBERS, &1, &0)));
            wait_until(|| disk.syncs.load(Ordering::SeqCst) > before + of_one);
            // Its changes are on the way, and seen by those who read and write.
            assert_eq!(all(catalogue), [0, 1]);
            write_lazily(catalogue, 2);
            let others: Vec<_> = (3..11)
                .map(|number| {
                    scope.spawn(move || {
                        write(catalogue, |tx| {
                            assert!(tx.contains(&NUMBERS, &1)? && tx.contains(&NUMBERS, &2)?);
                            tx.put(&NUMBERS, &number, &0)
                        })
                    })
                })
                .collect();
            wait_until(|| lock(&catalogue.state).published == 11);
            assert_eq!(all(catalogue), (0..11).collect::<Vec<_>>());
            assert!(!first.is_finished() && others.iter().all(|other| !other.is_finished()));
            drop(stuck);
            first.join().unwrap().unwrap();
            others.into_iter().for_each(|other| other.join().unwrap().unwrap());
        });
        // The first, the one that was stuck, and the eight together.
        assert_eq!(disk.syncs.load(Ordering::SeqCst) - before, 3 * of_one);
        assert_eq!(all(catalogue), (0..11).collect::<Vec<_>>());
    }

    #[test]
    fn a_durable_write_that_finds_nothing_to_change_waits_for_what_it_found() {
        let dir = tempfile::tempdir().unwrap();
        let (catalogue, disk) = on_a_disk(&dir);
        let catalogue = &catalogue;
        let is_there = || write(catalogue, |tx| tx.contains(&NUMBERS, &1));
        let before = disk.syncs.load(Ordering::SeqCst);
        assert!(!is_there().unwrap());
        assert_eq!(disk.syncs.load(Ordering::SeqCst), before, "nothing was found that could be lost");
        write_lazily(catalogue, 1);
        assert!(is_there().unwrap());
        assert!(disk.syncs.load(Ordering::SeqCst) > before, "found in memory only");

        // Somebody else's, which is on its way to the disk and does not arrive.
        let (before, stuck) = (disk.syncs.load(Ordering::SeqCst), lock(&disk.is_stuck));
        thread::scope(|scope| {
            let first = scope.spawn(|| write(catalogue, |tx| tx.put(&NUMBERS, &2, &0)));
            wait_until(|| disk.syncs.load(Ordering::SeqCst) > before);
            let second = scope.spawn(|| write(catalogue, |tx| tx.contains(&NUMBERS, &2)));
            disk.fails.store(true, Ordering::SeqCst);
            drop(stuck);
            assert!(first.join().unwrap().is_err());
            assert!(second.join().unwrap().is_err(), "what it found is not there");
        });
    }

    #[test]
    fn a_sync_that_fails_acknowledges_nothing_and_leaves_what_was_durable() {
        let dir = tempfile::tempdir().unwrap();
        let (catalogue, disk) = on_a_disk(&dir);
        write(&catalogue, |tx| tx.put(&NUMBERS, &0, &0)).unwrap();
        write_lazily(&catalogue, 1);
        disk.fails.store(true, Ordering::SeqCst);
        let error = write(&catalogue, |tx| tx.put(&NUMBERS, &2, &0)).unwrap_err();
        assert_eq!(error.kind(), plies_oci::ErrorKind::Unavailable);
        disk.fails.store(false, Ordering::SeqCst);
        assert_eq!(all(&catalogue), [0]);
        for urgency in [Urgency::Durable, Urgency::Lazy] {
            let again = catalogue.write(urgency, &Stamp::default, |tx| tx.put(&NUMBERS, &3, &0));
            assert_eq!(again.unwrap_err().kind(), plies_oci::ErrorKind::Unavailable, "{urgency:?}");
        }
        assert!(catalogue.flush().is_err());
        drop(catalogue);
        let reopened = Catalogue::open(&dir.path().join("db"), 1 << 20).unwrap();
        assert!(!all(&reopened).contains(&3));
        assert!(all(&reopened).contains(&0));
    }

    #[test]
    fn a_closure_that_fails_or_panics_has_changed_nothing() {
        for panics in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let catalogue = &catalogue(&dir);
            write_lazily(catalogue, 1);
            let bad = thread::scope(|scope| {
                let bad = scope.spawn(|| {
                    write(catalogue, |tx| {
                        tx.put(&NUMBERS, &2, &0)?;
                        tx.remove(&NUMBERS, &1)?;
                        assert_eq!(tx.all(&NUMBERS)?, [(2, 0)]);
                        assert!(!panics, "on purpose");
                        Err::<(), _>(refused())
                    })
                });
                bad.join()
            });
            match bad {
                Ok(result) => assert!(!panics && result.is_err()),
                Err(_) => assert!(panics),
            }
            assert_eq!(all(catalogue), [1]);
            write(catalogue, |tx| tx.put(&NUMBERS, &3, &0)).unwrap();
            assert_eq!(all(catalogue), [1, 3]);
        }
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
    fn a_view_stays_as_it_was_while_others_write_and_write_down() {
        let dir = tempfile::tempdir().unwrap();
        let catalogue = &catalogue(&dir);
        write(catalogue, |tx| tx.put(&NUMBERS, &1, &0)).unwrap();
        write_lazily(catalogue, 2);
        let seen: Result<_, CatalogueError> = catalogue.read(|rows| {
            write_lazily(catalogue, 3);
            write(catalogue, |tx| {
                tx.put(&NUMBERS, &4, &0)?;
                tx.remove(&NUMBERS, &1)
            })?;
            Ok((rows.all(&NUMBERS)?, rows.rows_count(&NUMBERS)?))
        });
        assert_eq!(seen.unwrap(), (vec![(1, 0), (2, 0)], 2));
        assert_eq!(all(catalogue), [2, 3, 4]);
    }

    #[test]
    fn what_is_removed_while_it_is_written_down_stays_removed() {
        let dir = tempfile::tempdir().unwrap();
        let first = catalogue(&dir);
        write_lazily(&first, 1);
        write(&first, |tx| {
            // What the closure sees is not in the file; when its changes are added, it is.
            thread::scope(|scope| scope.spawn(|| first.flush()).join().unwrap())?;
            tx.remove(&NUMBERS, &1)
        })
        .unwrap();
        assert_eq!(all(&first), [0; 0]);
        drop(first);
        assert_eq!(all(&Catalogue::open(&dir.path().join("db"), 1 << 20).unwrap()), [0; 0]);
    }

    #[test]
    fn a_lazy_write_is_visible_at_once_and_kept_by_a_clean_close() {
        let dir = tempfile::tempdir().unwrap();
        let first = catalogue(&dir);
        write_lazily(&first, 7);
        assert_eq!(all(&first), [7]);
        drop(first);
        assert_eq!(all(&Catalogue::open(&dir.path().join("db"), 1 << 20).unwrap()), [7]);
    }

    #[test]
    fn lazy_writes_do_not_gather_without_end() {
        let dir = tempfile::tempdir().unwrap();
        let catalogue = catalogue(&dir);
        let fill = |from: u64, count: usize| {
            let written: Result<(), CatalogueError> = catalogue.write(Urgency::Lazy, &Stamp::default, |tx| {
                (from..).take(count).try_for_each(|number| tx.put(&NUMBERS, &number, &0))
            });
            written.unwrap();
        };
        fill(0, PENDING_ROWS_MAX);
        assert_eq!(lock(&catalogue.state).view.pending.rows(), PENDING_ROWS_MAX);
        fill(PENDING_ROWS_MAX as u64, 1);
        assert_eq!(lock(&catalogue.state).view.pending.rows(), 0);
        assert_eq!(all(&catalogue).len(), PENDING_ROWS_MAX + 1);
    }

    #[test]
    fn a_large_file_is_not_read_through_after_a_kill() {
        for (from_bytes, repairs) in [(0, false), (u64::MAX, true)] {
            let dir = tempfile::tempdir().unwrap();
            let mut catalogue = catalogue(&dir);
            catalogue.quick_repair_from_bytes = from_bytes;
            write(&catalogue, |tx| tx.put(&NUMBERS, &7, &0)).unwrap();
            write_lazily(&catalogue, 8);
            // What a kill would leave.
            let killed = dir.path().join("killed");
            fs::copy(dir.path().join("db"), &killed).unwrap();
            let repaired = Arc::new(AtomicBool::new(false));
            let saw_repair = Arc::clone(&repaired);
            let mut builder = Catalogue::builder(1 << 20);
            builder.set_repair_callback(move |_| saw_repair.store(true, Ordering::SeqCst));
            let opened = Catalogue::new(builder.open(&killed).unwrap(), &killed).unwrap();
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
