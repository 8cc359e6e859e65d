//! Many threads at once: what may not happen twice, what may not wait, and a checker at the end.

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::Op::File;
use common::{Cache, Rig, assert_idle, assert_sound, layers_count, tree, write};
use plies_cache::{
    BlobRow, CacheError, ImmutableRef, Provider, Providers, RecordId, RecordOptions, State, UNCOMPRESSED,
};
use plies_oci::{BlobDigest, Descriptor, ErrorKind, MediaType};
use plies_store::{Attach, Cancel, GcMode};
use plies_testkit::tar::{Member, archive};

const THREADS: usize = 8;

fn by(name: &str) -> RecordOptions {
    RecordOptions::by(name)
}

fn retained() -> RecordOptions {
    RecordOptions { retain: Some(true), ..by("retained") }
}

/// Runs `work` on all threads at once, and returns what each gave.
fn at_once<T: Send>(work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let barrier = Barrier::new(THREADS);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|n| {
                let (work, barrier) = (&work, &barrier);
                scope.spawn(move || {
                    barrier.wait();
                    work(n)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Counts how often it is asked.
struct Counting {
    bytes: Vec<u8>,
    asked: Arc<AtomicUsize>,
}

impl Provider for Counting {
    fn open(&self, _: &BlobRow) -> io::Result<Box<dyn Read + Send>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(20));
        Ok(Box::new(io::Cursor::new(self.bytes.clone())))
    }
}

fn remote(name: &str) -> (Descriptor, RecordOptions, Arc<AtomicUsize>) {
    let bytes = archive(&[Member::file(name, "remote")]);
    let digest = BlobDigest::of(&bytes);
    let mut descriptor = Descriptor::new(MediaType::ImageLayer, digest, bytes.len() as u64);
    descriptor.annotations.insert(UNCOMPRESSED.into(), digest.to_string());
    let asked = Arc::new(AtomicUsize::new(0));
    let provider = Counting { bytes, asked: Arc::clone(&asked) };
    let providers = Providers::one(digest, Arc::new(provider));
    (descriptor, RecordOptions { providers, ..by("remote") }, asked)
}

fn ids(held: &[ImmutableRef]) -> BTreeSet<RecordId> {
    held.iter().map(ImmutableRef::id).collect()
}

#[test]
fn a14_one_descriptor_at_once_is_one_record() {
    let rig = Rig::new();
    let cache = rig.open();
    for round in 0..20 {
        let (descriptor, options, _) = remote(&format!("f{round}"));
        let held = at_once(|_| cache.get_by_blob(&descriptor, None, &options).unwrap());
        assert_eq!(ids(&held).len(), 1, "round {round}");
        assert_eq!(cache.manager.held()[0].1.len(), THREADS);
    }
    assert_idle(&cache);
    assert_sound(&cache);
}

#[test]
fn one_merge_and_one_diff_at_once_are_one_record() {
    let rig = Rig::new();
    let cache = rig.open();
    for _ in 0..10 {
        let (a, b) = (cache.layer(None, &[File("a", "")]), cache.layer(None, &[File("b", "")]));
        let merges = at_once(|_| cache.merged(&[&a, &b]));
        assert_eq!(ids(&merges).len(), 1);
        let above = cache.layer(Some(&a), &[File("c", "")]);
        let diffs = at_once(|_| cache.diffed(&a, &above));
        assert_eq!(ids(&diffs).len(), 1);
    }
    assert_idle(&cache);
    assert_sound(&cache);
}

#[test]
fn gets_of_one_idle_mutable_at_once_all_get_the_one_commit_of_it() {
    let rig = Rig::new();
    let cache = rig.open();
    for _ in 0..20 {
        let work = cache.create(None, &retained()).unwrap();
        let mutable = work.id();
        drop(work);
        let held = at_once(|_| cache.get(mutable, &by("me")).unwrap());
        assert_eq!(ids(&held).len(), 1);
        drop(held);
        // Whoever wants to write to it competes with them; somebody wins, and nobody waits.
        let results = at_once(|n| match n % 2 {
            0 => cache.get_mutable(mutable, &by("writer")).map(drop),
            _ => cache.get(mutable, &by("reader")).map(drop),
        });
        // A reader may also find that the commit it was led to was just undone.
        assert!(results.iter().all(|result| match result {
            Ok(()) => true,
            Err(error) => error.is_locked() || error.is_not_found(),
        }));
        assert!(cache.row(mutable).is_some());
        drop(cache.get_mutable(mutable, &by("me")).unwrap());
    }
    assert_idle(&cache);
    assert_sound(&cache);
}

#[test]
fn one_writer_at_a_time() {
    let rig = Rig::new();
    let cache = rig.open();
    let work = cache.create(None, &retained()).unwrap();
    let mutable = work.id();
    drop(work);
    let writers = AtomicUsize::new(0);
    let got = AtomicUsize::new(0);
    at_once(|_| {
        for _ in 0..200 {
            match cache.get_mutable(mutable, &by("writer")) {
                Ok(held) => {
                    assert_eq!(writers.fetch_add(1, Ordering::SeqCst), 0);
                    got.fetch_add(1, Ordering::SeqCst);
                    writers.fetch_sub(1, Ordering::SeqCst);
                    drop(held);
                }
                Err(error) => assert!(error.is_locked()),
            }
        }
    });
    assert!(got.load(Ordering::SeqCst) > 0);
}

#[test]
fn a23_a42_get_of_a_mutable_in_use_never_waits() {
    let rig = Rig::new();
    let cache = rig.open();
    let work = cache.create(None, &retained()).unwrap();
    let began = Instant::now();
    for _ in 0..1000 {
        assert_eq!(cache.get(work.id(), &by("me")).unwrap_err().kind(), ErrorKind::Busy);
        assert_eq!(cache.get_mutable(work.id(), &by("me")).unwrap_err().kind(), ErrorKind::Busy);
    }
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[test]
fn many_finalizes_of_one_record_seal_once() {
    let rig = Rig::new();
    let cache = rig.open();
    for round in 1..=10 {
        let made = cache.layer(None, &[File("f", "text")]);
        at_once(|_| made.finalize().unwrap());
        assert_eq!(layers_count(&cache), round);
        let id = made.id();
        drop(made);
        assert!(cache.row(id).is_some());
    }
    assert_sound(&cache);
}

#[test]
fn what_is_got_while_it_is_finalized_stays_when_all_let_go() {
    let rig = Rig::new();
    let cache = rig.open();
    for _ in 0..100 {
        let made = cache.layer(None, &[]);
        let id = made.id();
        let first = made.clone();
        at_once(|n| match n {
            0 => first.finalize().unwrap(),
            // Not ready yet: each of them reads the row.
            _ => drop(cache.get(id, &by("reader")).unwrap()),
        });
        drop((made, first));
        assert!(cache.row(id).is_some(), "it was finalized");
    }
    assert_idle(&cache);
    assert_sound(&cache);
}

#[test]
fn a05_many_unlazies_fetch_and_unpack_once_and_one_that_is_cancelled_leaves_the_others() {
    let rig = Rig::new();
    let cache = rig.open();
    for round in 0..5 {
        let (descriptor, options, asked) = remote(&format!("f{round}"));
        let held = cache.get_by_blob(&descriptor, None, &options).unwrap();
        let results = at_once(|n| {
            let cancel = Cancel::new();
            if n == 0 {
                let also = cancel.clone();
                thread::spawn(move || {
                    thread::sleep(Duration::from_millis(5));
                    also.cancel();
                });
            }
            held.extract(&cancel)
        });
        let canceled = results.iter().filter(|result| result.is_err()).count();
        assert!(canceled <= 1, "{results:?}");
        assert_eq!((asked.load(Ordering::SeqCst), layers_count(&cache)), (1, round + 1));
    }
    assert_sound(&cache);
}

#[test]
fn many_extracts_of_merges_that_share_inputs_agree() {
    let rig = Rig::new();
    let cache = rig.open();
    let inputs: Vec<_> = ["a", "b", "c", "d"].map(|name| cache.finalized(None, &[File(name, name)])).into();
    let trees = at_once(|n| {
        let merge = cache.merged(&[&inputs[n % 2], &inputs[2], &inputs[3]]);
        (n % 2, tree(&merge))
    });
    for (which, shown) in &trees {
        assert_eq!(shown, &trees[*which].1);
    }
    drop(inputs);
    assert_idle(&cache);
    assert_sound(&cache);
}

#[test]
fn a25_a_removal_takes_nothing_that_somebody_holds_and_nobody_holds_what_it_took() {
    let rig = Rig::new();
    let cache = rig.open();
    for _ in 0..60 {
        let made = cache.finalized(None, &[]);
        let id = made.id();
        drop(made);
        let results = at_once(|n| match n % 2 {
            0 => cache.remove(&[id]).map(|()| None),
            _ => cache.get(id, &by("me")).map(Some),
        });
        let removed = results.iter().filter(|result| matches!(result, Ok(None))).count();
        let held = results.iter().filter(|result| matches!(result, Ok(Some(_)))).count();
        // Whoever holds it now got it before, and then nobody removed it.
        assert!(removed == 0 || held == 0, "{removed} removed it, {held} hold it");
        assert_eq!(cache.row(id).is_some(), removed == 0);
        for error in results.iter().filter_map(|result| result.as_ref().err()) {
            assert!(error.is_locked() || error.is_not_found(), "{error:?}");
        }
    }
    assert_idle(&cache);
    assert_sound(&cache);
}

#[test]
fn a_slow_fetch_holds_nobody_else_up() {
    struct Slow(Arc<AtomicBool>);
    impl Provider for Slow {
        fn open(&self, _: &BlobRow) -> io::Result<Box<dyn Read + Send>> {
            while !self.0.load(Ordering::SeqCst) {
                thread::sleep(Duration::from_millis(1));
            }
            Err(io::Error::other("never"))
        }
    }
    let rig = Rig::new();
    let cache = rig.open();
    let (descriptor, _, _) = remote("slow");
    let over = Arc::new(AtomicBool::new(false));
    let providers = Providers::one(descriptor.digest, Arc::new(Slow(Arc::clone(&over))));
    let slow = cache.get_by_blob(&descriptor, None, &RecordOptions { providers, ..by("slow") }).unwrap();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| slow.extract(&Cancel::new()).unwrap_err());
        // All of this while that waits.
        let a = cache.layer(None, &[File("a", "")]);
        let b = cache.layer(Some(&a), &[File("b", "")]);
        let merge = cache.merged(&[&a, &b, &slow]);
        assert!(merge.is_lazy().unwrap());
        assert_eq!(tree(&b).len(), 2);
        drop(cache.get(slow.id(), slow_options(&slow)).unwrap());
        cache.store.gc(GcMode::Run).unwrap();
        assert!(!waiting.is_finished());
        over.store(true, Ordering::SeqCst);
        waiting.join().unwrap();
    });
    // A later try begins anew.
    let (_, options, asked) = remote("slow");
    let held = cache.get(slow.id(), &options).unwrap();
    assert_eq!(tree(&held).len(), 1);
    assert_eq!(asked.load(Ordering::SeqCst), 1);
}

fn slow_options(slow: &ImmutableRef) -> &'static RecordOptions {
    Box::leak(Box::new(RecordOptions { providers: slow.providers().clone(), ..by("another") }))
}

struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % end as u64).unwrap()
    }
}

/// What one thread does; what it keeps, others find by its ID and use as well.
fn roam(cache: &Cache, seed: u64, turns: usize, shared: &Mutex<Vec<RecordId>>) {
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut held: Vec<ImmutableRef> = Vec::new();
    let expected = |error: &CacheError| error.is_locked() || error.is_not_found();
    for turn in 0..turns {
        let pick = |random: &mut Random| {
            let shared = shared.lock().unwrap();
            (!shared.is_empty()).then(|| shared[random.below(shared.len())])
        };
        match random.below(12) {
            0 | 1 => {
                let parent = held.last().cloned();
                let options = RecordOptions { retain: Some(random.below(3) == 0), ..by("roam") };
                let work = cache.create(parent.as_ref(), &options).unwrap();
                if random.below(3) == 0 {
                    write(&work, &[File("f", "text")]);
                }
                let mutable = work.id();
                let made = work.commit().unwrap();
                shared.lock().unwrap().extend([mutable, made.id()]);
                held.push(made);
            }
            2 => {
                if let Some(made) = held.last() {
                    made.finalize().unwrap();
                }
            }
            3 | 4 => {
                if let Some(id) = pick(&mut random) {
                    match cache.get(id, &by("roam")) {
                        Ok(got) => held.push(got),
                        Err(error) => assert!(expected(&error), "{error:?}"),
                    }
                }
            }
            5 => {
                if let Some(id) = pick(&mut random) {
                    match cache.get_mutable(id, &by("roam")) {
                        Ok(work) => drop(work.mount(Attach::Detached).unwrap().unmount()),
                        Err(CacheError::WrongKind { .. }) => {}
                        Err(error) => assert!(expected(&error), "{error:?}"),
                    }
                }
            }
            6 => {
                if held.len() >= 2 {
                    let merge = cache.merged(&[&held[0], &held[held.len() - 1]]);
                    shared.lock().unwrap().push(merge.id());
                    held.push(merge);
                }
            }
            7 => {
                if let Some(id) = pick(&mut random) {
                    match cache.remove(&[id]) {
                        Ok(()) | Err(CacheError::HasChildren { .. }) => {}
                        Err(error) => assert!(expected(&error), "{error:?}"),
                    }
                }
            }
            8 if turn % 5 == 0 => drop(cache.store.gc(GcMode::Run).unwrap()),
            9 if turn % 3 == 0 => {
                if let Some(made) = held.last() {
                    // No live ref loses its data, whatever the others do.
                    tree(made);
                }
            }
            10 => held.extend(held.last().cloned()),
            _ => {
                if !held.is_empty() {
                    held.swap_remove(random.below(held.len())).release().unwrap();
                }
            }
        }
        for held in held.iter().take(3) {
            held.row().unwrap();
        }
        if held.len() > 12 {
            held.drain(..6);
        }
    }
}

#[test]
fn eight_threads_at_random_leave_a_sound_cache() {
    for seed in 0..4 {
        let rig = Rig::new();
        let cache = rig.open();
        let shared = Mutex::new(Vec::new());
        at_once(|n| roam(&cache, seed * 100 + n as u64 + 1, 150, &shared));
        assert_idle(&cache);
        assert_sound(&cache);
        cache.store.gc(GcMode::Run).unwrap();
        for id in cache.ids() {
            match cache.get(id, &by("look")) {
                Ok(held) => drop(tree(&held)),
                // The mutable one of a pair whose other was looked at before.
                Err(error) if error.is_not_found() && cache.row(id).is_none() => {}
                Err(error) => panic!("seed {seed}: {id}: {error:?} {:?}", cache.row(id)),
            }
        }
        assert_sound(&cache);
        cache.close();
        let cache = rig.open();
        assert_sound(&cache);
        for id in cache.ids() {
            assert!(!matches!(cache.must(id).state, State::Shared { .. }) || cache.get(id, &by("look")).is_ok());
        }
        rig.assert_no_warnings();
    }
}
