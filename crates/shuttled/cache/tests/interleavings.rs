//! What the build cache promises to several threads, in whatever order they get on: gets against removals and prunes, commits
//! against those who want to write on, what is fetched or made once, and all of it at random.

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

extern crate plies_shuttled_cache as plies_cache;

#[path = "../../../cache/tests/common/mod.rs"]
mod common;
#[path = "../../explore.rs"]
mod explore;

use std::io::{self, Read};
use std::sync::Arc;

use common::Op::File;
use common::{Cache, Rig, assert_idle, assert_sound, layers_count, write};
use explore::explore;
use plies_cache::{
    BlobRow, CacheError, ImmutableRef, Provider, Providers, PruneOptions, RecordId, RecordOptions, State, UNCOMPRESSED,
};
use plies_oci::{BlobDigest, Descriptor, ErrorKind, MediaType};
use plies_store::{Attach, Cancel, DriverKind, GcMode};
use plies_testkit::tar::{Member, archive};
use shuttle::rand::{Rng as _, thread_rng};
use shuttle::sync::atomic::{AtomicUsize, Ordering};
use shuttle::sync::{Condvar, Mutex};
use shuttle::thread;

fn rig() -> Rig {
    Rig::with_driver(DriverKind::Native)
}

fn by(name: &str) -> RecordOptions {
    RecordOptions::by(name)
}

fn retained() -> RecordOptions {
    RecordOptions { retain: Some(true), ..by("retained") }
}

/// Somebody else was there first: what may happen to who wants a record that others use.
fn is_expected(error: &CacheError) -> bool {
    error.is_locked() || error.is_not_found()
}

fn prune_all(cache: &Cache) {
    let everything = PruneOptions { all: true, ..PruneOptions::default() };
    cache.manager.controller().prune(&[everything], &mut |_| {}, &Cancel::new()).unwrap();
}

/// Nobody holds anything, and every row agrees with the others.
fn assert_quiet(cache: Cache) {
    assert_idle(&cache);
    assert_sound(&cache);
    cache.close();
}

#[test]
fn r01_a_prune_takes_nothing_that_somebody_got_and_nobody_gets_what_it_took() {
    explore("gets, removals and prunes", 500, || {
        let rig = rig();
        let cache = rig.open();
        let made = cache.finalized(None, &[]);
        let id = made.id();
        drop(made);
        let (removed, got) = thread::scope(|scope| {
            let removal = scope.spawn(|| cache.remove(&[id]));
            scope.spawn(|| prune_all(&cache));
            let get = scope.spawn(|| {
                let held = cache.get(id, &by("me"))?;
                // As long as it is held, whatever happens.
                held.row().unwrap();
                thread::yield_now();
                held.row().unwrap();
                Ok::<_, CacheError>(held)
            });
            (removal.join().unwrap(), get.join().unwrap())
        });
        assert!([removed.as_ref().err(), got.as_ref().err()].into_iter().flatten().all(is_expected));
        assert!(removed.is_err() || got.is_err(), "one removed what the other holds");
        assert_eq!(cache.row(id).is_some(), got.is_ok(), "only what is held is left of what a prune saw");
        drop(got);
        assert_quiet(cache);
    });
}

#[test]
fn r05_whoever_writes_on_undoes_the_commit_or_comes_too_late() {
    explore("finalizing and writing on", 500, || {
        let rig = rig();
        let cache = rig.open();
        let work = cache.create(None, &retained()).unwrap();
        write(&work, &[File("f", "text")]);
        let mutable = work.id();
        let made = work.commit().unwrap();
        let id = made.id();
        drop(made);
        thread::scope(|scope| {
            let finalized = scope.spawn(|| cache.get(id, &by("finalizer")).and_then(|held| held.finalize()));
            let read = scope.spawn(|| cache.get(id, &by("reader")).map(drop));
            let wrote = scope.spawn(|| {
                let work = cache.get_mutable(mutable, &by("writer"))?;
                // Alone: nobody reads while it writes.
                write(&work, &[File("g", "text")]);
                work.release()
            });
            let (finalized, wrote) = (finalized.join().unwrap(), wrote.join().unwrap());
            assert!(finalized.is_err() || wrote.is_err() || cache.row(id).is_none_or(|row| is_sealed(&row.state)));
            let errors = [finalized.err(), read.join().unwrap().err(), wrote.err()];
            assert!(errors.iter().flatten().all(is_expected), "{errors:?}");
        });
        // Both of a pair, or the one that was sealed, or the one that is written to.
        match (cache.row(id), cache.row(mutable)) {
            (Some(row), None) => assert!(is_sealed(&row.state)),
            (Some(row), Some(_)) => assert!(matches!(row.state, State::Shared { .. })),
            (None, Some(_)) => {}
            (None, None) => panic!("what was to be retained is gone"),
        }
        assert_quiet(cache);
    });
}

fn is_sealed(state: &State) -> bool {
    matches!(state, State::Sealed { .. })
}

#[test]
fn r07_a_record_that_is_made_of_another_keeps_it() {
    explore("records made of others", 400, || {
        let rig = rig();
        let cache = rig.open();
        let base = cache.finalized(None, &[File("f", "text")]);
        let id = base.id();
        drop(base);
        let made = thread::scope(|scope| {
            let made = scope.spawn(|| {
                let base = cache.get(id, &by("maker"))?;
                let work = cache.create(Some(&base), &by("maker"))?;
                drop(base);
                work.commit()
            });
            scope.spawn(|| prune_all(&cache));
            scope.spawn(|| drop(cache.store.gc(GcMode::Run).unwrap()));
            made.join().unwrap()
        });
        match &made {
            Ok(made) => assert_eq!(common::tree(made).len(), 1),
            Err(error) => assert!(is_expected(error), "{error:?}"),
        }
        assert_eq!(cache.row(id).is_some(), made.is_ok());
        drop(made);
        assert_quiet(cache);
    });
}

#[test]
fn many_finalizes_of_one_record_seal_once() {
    explore("finalizes at once", 400, || {
        let rig = rig();
        let cache = rig.open();
        let made = cache.layer(None, &[File("f", "text")]);
        let id = made.id();
        let also = made.clone();
        thread::scope(|scope| {
            scope.spawn(|| {
                made.finalize().unwrap();
                drop(made);
            });
            scope.spawn(|| {
                also.finalize().unwrap();
                drop(also);
            });
            // Reads the row before or after, and may be the last to let go.
            scope.spawn(|| drop(cache.get(id, &by("reader"))));
        });
        assert!(cache.row(id).is_some_and(|row| is_sealed(&row.state)));
        assert_eq!(layers_count(&cache), 1);
        assert_quiet(cache);
    });
}

/// Says no, and counts how often it is asked, and by how many at once at most.
#[derive(Default)]
struct Refusing {
    asked: AtomicUsize,
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Provider for Refusing {
    fn open(&self, _: &BlobRow) -> io::Result<Box<dyn Read + Send>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.most.fetch_max(self.now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        thread::yield_now();
        self.now.fetch_sub(1, Ordering::SeqCst);
        Err(io::Error::other("no"))
    }
}

fn remote(name: &str) -> (Descriptor, RecordOptions, Arc<Refusing>) {
    let bytes = archive(&[Member::file(name, "remote")]);
    let digest = BlobDigest::of(&bytes);
    let mut descriptor = Descriptor::new(MediaType::ImageLayer, digest, bytes.len() as u64);
    descriptor.annotations.insert(UNCOMPRESSED.into(), digest.to_string());
    let provider = Arc::new(Refusing::default());
    let providers = Providers::one(digest, Arc::clone(&provider) as Arc<dyn Provider>);
    (descriptor, RecordOptions { providers, ..by("remote") }, provider)
}

/// Has three want one blob, the first of whom may leave; what they hear, and who was asked for it.
fn fetched_by_three(first: &Cancel, cancels: impl FnOnce() + Send) -> ([ErrorKind; 3], Arc<Refusing>) {
    let rig = rig();
    let cache = rig.open();
    let (descriptor, options, provider) = remote("f");
    let held = cache.get_by_blob(&descriptor, None, &options).unwrap();
    let heard = thread::scope(|scope| {
        let want = |cancel: Cancel| held.extract(&cancel).unwrap_err().kind();
        let three = [first.clone(), Cancel::new(), Cancel::new()].map(|cancel| scope.spawn(move || want(cancel)));
        scope.spawn(cancels);
        three.map(|one| one.join().unwrap())
    });
    // Nobody is waited for that has left.
    assert_eq!(held.extract(&Cancel::new()).unwrap_err().kind(), ErrorKind::Unavailable);
    drop(held);
    // The threads that fetched may still be about to let their leases go.
    while !cache.store.leases().unwrap().is_empty() {
        thread::yield_now();
    }
    assert_quiet(cache);
    (heard, provider)
}

#[test]
fn r03_of_those_who_want_one_blob_the_first_may_leave() {
    explore("one fetch for all, and one leaves", 400, || {
        let cancel = Cancel::new();
        let ([left, others @ ..], provider) = fetched_by_three(&cancel, || cancel.cancel());
        assert!(matches!(left, ErrorKind::Canceled | ErrorKind::Unavailable), "{left:?}");
        // They hear what the provider said, and nothing of the one who left.
        assert_eq!(others, [ErrorKind::Unavailable; 2]);
        assert!(provider.most.load(Ordering::SeqCst) <= 2, "one that is given up, and one that is not");
    });
}

#[test]
fn one_blob_is_not_fetched_twice_at_once() {
    explore("one fetch for all", 400, || {
        let (heard, provider) = fetched_by_three(&Cancel::new(), || {});
        assert_eq!(heard, [ErrorKind::Unavailable; 3]);
        assert_eq!(provider.most.load(Ordering::SeqCst), 1);
        assert!((2..=4).contains(&provider.asked.load(Ordering::SeqCst)));
    });
}

/// Says that it was asked, and no once somebody has left, or asks a second time.
#[derive(Default)]
struct Stuck {
    /// How often it was asked, and whether somebody has left.
    state: Mutex<(usize, bool)>,
    changed: Condvar,
}

impl Stuck {
    fn change(&self, change: impl Fn(&mut (usize, bool))) {
        change(&mut self.state.lock().unwrap());
        self.changed.notify_all();
    }

    fn wait_until(&self, is: impl Fn(&(usize, bool)) -> bool) {
        let mut state = self.state.lock().unwrap();
        while !is(&state) {
            state = self.changed.wait(state).unwrap();
        }
    }
}

impl Provider for Stuck {
    fn open(&self, _: &BlobRow) -> io::Result<Box<dyn Read + Send>> {
        self.change(|state| state.0 += 1);
        self.wait_until(|state| state.1 || state.0 > 1);
        Err(io::Error::other("no"))
    }
}

/// Has somebody want a blob whose fetch is stuck, and leave when `when` is over. Then comes `after`.
fn leave_what_is_stuck(when: impl Fn(&Stuck) + Sync, after: impl Fn(&ImmutableRef)) {
    let rig = rig();
    let cache = rig.open();
    let (descriptor, options, _) = remote("f");
    let stuck = Arc::new(Stuck::default());
    let providers = Providers::one(descriptor.digest, Arc::clone(&stuck) as Arc<dyn Provider>);
    let held = cache.get_by_blob(&descriptor, None, &RecordOptions { providers, ..options }).unwrap();
    let cancel = Cancel::new();
    thread::scope(|scope| {
        let leaves = scope.spawn(|| held.extract(&cancel).unwrap_err().kind());
        scope.spawn(|| {
            when(&stuck);
            cancel.cancel();
        });
        assert_eq!(leaves.join().unwrap(), ErrorKind::Canceled);
    });
    after(&held);
    stuck.change(|state| state.1 = true);
    drop(held);
    while !cache.store.leases().unwrap().is_empty() {
        thread::yield_now();
    }
    assert_quiet(cache);
}

#[test]
fn who_leaves_does_not_wait_for_a_fetch_that_is_stuck() {
    explore("leaving a fetch that is stuck", 600, || {
        leave_what_is_stuck(|stuck| stuck.wait_until(|state| state.0 > 0), |_| {});
    });
}

#[test]
fn who_leaves_at_any_moment_is_heard() {
    // When the first looks, and when it waits, depends on how many steps come before: all the same to who leaves.
    explore("leaving a fetch that has just begun", 3000, || {
        leave_what_is_stuck(|_| (0..thread_rng().gen_range(0..150)).for_each(|_| thread::yield_now()), |_| {});
    });
}

#[test]
fn who_comes_after_the_last_has_left_begins_anew() {
    explore("a fetch after one that was given up", 300, || {
        let asked = |stuck: &Stuck| stuck.wait_until(|state| state.0 > 0);
        // The first fetch ends when a second one has begun: who waited for it would wait for ever.
        leave_what_is_stuck(asked, |held| {
            assert_eq!(held.extract(&Cancel::new()).unwrap_err().kind(), ErrorKind::Unavailable);
        });
    });
}

#[test]
fn one_layer_under_several_records_is_made_once() {
    explore("one tree for all", 200, || {
        let rig = rig();
        let cache = rig.open();
        let (a, b) = (cache.layer(None, &[File("a", "")]), cache.layer(None, &[File("b", "")]));
        let merges = thread::scope(|scope| {
            let merge = || {
                let merged = cache.merged(&[&a, &b]);
                let snapshot = merged.extract(&Cancel::new()).unwrap();
                (merged, snapshot)
            };
            let others: Vec<_> = (0..2).map(|_| scope.spawn(merge)).collect();
            others.into_iter().map(|other| other.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(merges[0].0.id(), merges[1].0.id());
        assert_eq!(merges[0].1, merges[1].1);
        assert_eq!(layers_count(&cache), 2);
        drop((a, b, merges));
        assert_quiet(cache);
    });
}

/// What one thread does; what it makes, others find by its ID and use as well.
fn roam(cache: &Cache, shared: &std::sync::Mutex<Vec<RecordId>>) {
    let mut held: Vec<ImmutableRef> = Vec::new();
    let pick = || {
        let ids = shared.lock().unwrap();
        (!ids.is_empty()).then(|| ids[thread_rng().gen_range(0..ids.len())])
    };
    for _ in 0..4 {
        match (thread_rng().gen_range(0..8), pick()) {
            (0 | 1, _) => {
                let options = RecordOptions { retain: Some(thread_rng().gen_range(0..3) == 0), ..by("roam") };
                let work = cache.create(held.last(), &options).unwrap();
                let mutable = work.id();
                let made = work.commit().unwrap();
                shared.lock().unwrap().extend([mutable, made.id()]);
                held.push(made);
            }
            (2, _) => held.iter().for_each(|held| held.finalize().unwrap()),
            (3, Some(id)) => match cache.get(id, &by("roam")) {
                Ok(got) => held.push(got),
                Err(error) => assert!(is_expected(&error), "{error:?}"),
            },
            (4, Some(id)) => match cache.get_mutable(id, &by("roam")) {
                Ok(work) => drop(work.mount(Attach::Detached).unwrap().unmount()),
                Err(CacheError::WrongKind { .. }) => {}
                Err(error) => assert!(is_expected(&error), "{error:?}"),
            },
            (5, Some(id)) => match cache.remove(&[id]) {
                Ok(()) | Err(CacheError::HasChildren { .. }) => {}
                Err(error) => assert!(is_expected(&error), "{error:?}"),
            },
            (6, _) => prune_all(cache),
            _ => drop(held.pop()),
        }
        held.iter().for_each(|held| drop(held.row().unwrap()));
    }
}

#[test]
fn three_threads_at_random_leave_a_sound_cache() {
    explore("anything at once", 300, || {
        let rig = rig();
        let cache = rig.open();
        let shared = std::sync::Mutex::new(Vec::new());
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| roam(&cache, &shared));
            }
        });
        assert_idle(&cache);
        assert_sound(&cache);
        cache.close();
        // After a restart as well, with nothing to warn of.
        assert_quiet(rig.open());
        rig.assert_no_warnings();
    });
}
