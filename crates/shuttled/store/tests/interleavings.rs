//! What the store promises to several threads, in whatever order they get on: the group commit, holds against collections,
//! blobs that go while they come, mounts, turns and cancels.

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

extern crate plies_shuttled_store as plies_store;

#[path = "../../../store/tests/common/mod.rs"]
mod common;
#[path = "../../explore.rs"]
mod explore;

use std::fs;
use std::sync::Arc;

use common::{Rig, assert_healthy, owner, process_lease, put_blob};
use explore::explore;
use plies_oci::{BlobDigest, ErrorKind};
use plies_store::{
    ActiveOptions, Attach, Cancel, Canceled, CatalogueError, DriverKind, GcMode, LeaseOptions, Rows as _, Store, Table,
    Turns, Tx, parallel,
};
use shuttle::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use shuttle::thread;

const NUMBERS: Table<u64, u64> = Table::new("test.numbers");

fn rig() -> Rig {
    Rig::with_driver(DriverKind::Native)
}

fn refused() -> CatalogueError {
    CatalogueError::NoSuchResource { resource: BlobDigest::of(b"none").into() }
}

fn numbers(store: &Store) -> Vec<u64> {
    let rows: Result<_, CatalogueError> = store.read(|rows| rows.all(&NUMBERS));
    rows.unwrap().into_iter().map(|(number, _)| number).collect()
}

fn put(number: u64) -> impl Fn(&mut Tx<'_>) -> Result<(), CatalogueError> {
    move |tx| tx.put(&NUMBERS, &number, &0)
}

/// The store as a kill at this moment would leave it.
fn killed(rig: &Rig) -> Rig {
    let copy = Rig::with_driver(DriverKind::Native);
    let catalog = |rig: &Rig| rig.root().join("catalog");
    fs::create_dir_all(catalog(&copy)).unwrap();
    fs::copy(catalog(rig).join("plies.redb"), catalog(&copy).join("plies.redb")).unwrap();
    copy
}

#[test]
fn what_is_acknowledged_outlives_a_kill_whoever_wrote_it_down() {
    explore("acknowledged writes", 500, || {
        let rig = rig();
        let store = rig.open();
        store.write(put(0)).unwrap();
        let left = thread::scope(|scope| {
            let left = scope.spawn(|| {
                store.write(put(1)).unwrap();
                (killed(&rig), 1)
            });
            scope.spawn(|| {
                store.write_lazily(put(2)).unwrap();
                store.write(put(3)).unwrap();
            });
            let synced = scope.spawn(|| {
                store.write_lazily(put(4)).unwrap();
                store.sync().unwrap();
                (killed(&rig), 4)
            });
            [left.join().unwrap(), synced.join().unwrap()]
        });
        assert_eq!(numbers(&store), [0, 1, 2, 3, 4]);
        for (copy, acknowledged) in left {
            assert!(numbers(&copy.open()).contains(&acknowledged), "{acknowledged} was acknowledged and is lost");
        }
        store.close().unwrap();
    });
}

#[test]
fn closures_run_one_at_a_time_and_nothing_is_lost_or_seen_in_part() {
    explore("closures", 600, || {
        let rig = rig();
        let store = rig.open();
        let running = AtomicBool::new(false);
        let add = |tx: &mut Tx<'_>, fails: bool| {
            assert!(!running.swap(true, Ordering::SeqCst), "two closures at once");
            let count = tx.get(&NUMBERS, &0)?.unwrap_or(0) + 1;
            // Both or neither.
            tx.put(&NUMBERS, &0, &count)?;
            tx.put(&NUMBERS, &1, &count)?;
            running.store(false, Ordering::SeqCst);
            if fails { Err(refused()) } else { Ok(()) }
        };
        thread::scope(|scope| {
            for writer in 0..3 {
                let (store, add) = (&store, &add);
                scope.spawn(move || {
                    store.write(|tx| add(tx, false)).unwrap();
                    store.write_lazily(|tx| add(tx, writer == 0)).map_or_else(|_| assert_eq!(writer, 0), drop);
                });
            }
            scope.spawn(|| {
                let mut last = 0;
                for _ in 0..3 {
                    let seen: Result<_, CatalogueError> =
                        store.read(|rows| Ok((rows.get(&NUMBERS, &0)?, rows.get(&NUMBERS, &1)?)));
                    let (count, twin) = seen.unwrap();
                    assert_eq!(count, twin, "half of a closure was seen");
                    assert!(count.unwrap_or(0) >= last, "what was seen is gone");
                    last = count.unwrap_or(0);
                }
            });
        });
        let count: Result<_, CatalogueError> = store.read(|rows| rows.get(&NUMBERS, &0));
        assert_eq!(count.unwrap(), Some(5));
        store.close().unwrap();
    });
}

fn collect(store: &Store) {
    store.gc(GcMode::Run).unwrap();
}

fn bytes_of(store: &Store, digest: BlobDigest) -> Vec<u8> {
    store.content().read(digest).unwrap()
}

/// Nothing is held any more: a collection takes all that there is.
fn assert_all_goes(store: Store) {
    collect(&store);
    assert_eq!(store.leases().unwrap(), []);
    for dir in ["content/blobs/sha256", "content/ingest", "layers/stage", "active", "mounts"] {
        let left: Vec<_> = fs::read_dir(store.root().join(dir)).unwrap().collect();
        assert!(left.is_empty(), "{left:?} leaked");
    }
    assert_healthy(&store);
    store.close().unwrap();
}

#[test]
fn what_is_found_is_held_whatever_a_collection_takes_meanwhile() {
    for (name, mode) in [("holds and collections", GcMode::Run), ("holds and full collections", GcMode::Full)] {
        explore(name, 500, move || {
            let rig = rig();
            let store = rig.open();
            let first = process_lease(&store);
            let digest = put_blob(&store, b"bytes", &first);
            thread::scope(|scope| {
                scope.spawn(|| first.release().unwrap());
                scope.spawn(|| drop(store.gc(mode).unwrap()));
                scope.spawn(|| {
                    let lease = process_lease(&store);
                    if lease.hold_if_present(digest).unwrap() {
                        assert_eq!(bytes_of(&store, digest), b"bytes");
                        store.gc(mode).unwrap();
                        assert_eq!(bytes_of(&store, digest), b"bytes");
                    }
                    lease.release().unwrap();
                });
            });
            assert_all_goes(store);
        });
    }
}

#[test]
fn a_blob_that_comes_again_while_it_goes_is_there() {
    explore("blobs that come again", 600, || {
        let rig = rig();
        let store = rig.open();
        let first = process_lease(&store);
        put_blob(&store, b"bytes", &first);
        first.release().unwrap();
        thread::scope(|scope| {
            scope.spawn(|| collect(&store));
            for _ in 0..2 {
                scope.spawn(|| {
                    let lease = process_lease(&store);
                    let digest = put_blob(&store, b"bytes", &lease);
                    assert_eq!(bytes_of(&store, digest), b"bytes");
                    lease.release().unwrap();
                });
            }
        });
        assert_all_goes(store);
    });
}

#[test]
fn r02_a_lease_that_ends_during_a_copy_says_so_and_takes_nothing_from_others() {
    explore("leases that end", 600, || {
        let rig = rig();
        let store = rig.open();
        let seconds = std::time::Duration::from_secs;
        let ending = store.lease(LeaseOptions::expiring("copy", seconds(10))).unwrap();
        let shared = put_blob(&store, b"shared", &ending);
        thread::scope(|scope| {
            scope.spawn(|| {
                rig.advance(seconds(20));
                collect(&store);
            });
            scope.spawn(|| {
                let mut ingest = store.content().ingest_unnamed().unwrap();
                std::io::Write::write_all(&mut ingest, b"copied").unwrap();
                match ingest.commit(plies_store::Expected::anything(), &ending) {
                    // In time, and at the mercy of the clock from then on.
                    Ok(_) => {}
                    Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "{error:?}"),
                }
            });
            scope.spawn(|| {
                let lasting = process_lease(&store);
                if lasting.hold_if_present(shared).unwrap() {
                    collect(&store);
                    assert_eq!(bytes_of(&store, shared), b"shared");
                }
                lasting.release().unwrap();
            });
        });
        let late = ending.hold_if_present(shared);
        assert!(matches!(late, Err(CatalogueError::NoSuchLease { .. })), "{late:?}");
        drop(ending);
        // Bytes that came too late to be held have no row: the next open looks for them.
        store.close().unwrap();
        assert_all_goes(rig.open());
    });
}

#[test]
fn r04_a_layer_that_two_images_share_goes_with_the_second() {
    explore("images that share a layer", 500, || {
        let rig = rig();
        let store = rig.open();
        let first = process_lease(&store);
        let layer = put_blob(&store, b"layer", &first);
        store.write(|tx| tx.hold(&owner("one"), layer)).unwrap();
        first.release().unwrap();
        let pulled = thread::scope(|scope| {
            // One image is removed while another one is pulled that begins with what it finds.
            scope.spawn(|| {
                store.write(|tx| tx.unhold_all(&owner("one"))).unwrap();
                collect(&store);
            });
            let pull = scope.spawn(|| {
                let lease = process_lease(&store);
                if !lease.hold_if_present(layer).unwrap() {
                    put_blob(&store, b"layer", &lease);
                }
                store.write(|tx| tx.hold(&owner("two"), layer)).unwrap();
                lease.release().unwrap();
            });
            scope.spawn(|| collect(&store));
            pull.join()
        });
        pulled.unwrap();
        collect(&store);
        assert_eq!(bytes_of(&store, layer), b"layer");
        store.write(|tx| tx.unhold_all(&owner("two"))).unwrap();
        assert_all_goes(store);
    });
}

#[test]
fn r06_one_mounts_at_a_time_and_what_is_mounted_stays_until_it_is_not() {
    explore("mounts, unmounts and removals", 500, || {
        let rig = rig();
        let store = rig.open();
        let lease = process_lease(&store);
        let active = store.snapshots().prepare(None, &lease, ActiveOptions::default()).unwrap();
        let mounted = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| match store.snapshots().mount_active(active, Attach::Detached) {
                    Ok(tree) => {
                        assert!(!mounted.swap(true, Ordering::SeqCst), "two have it mounted");
                        let file = common::path_of(&tree.root()).join("f");
                        fs::write(&file, "text").unwrap();
                        collect(&store);
                        assert_eq!(fs::read_to_string(&file).unwrap(), "text", "it went while it was mounted");
                        assert!(mounted.swap(false, Ordering::SeqCst));
                        tree.unmount().unwrap();
                    }
                    Err(error) => assert!(matches!(error.kind(), ErrorKind::Busy | ErrorKind::NotFound), "{error:?}"),
                });
            }
            scope.spawn(|| {
                lease.release().unwrap();
                collect(&store);
            });
        });
        let late = store.snapshots().mount_active(active, Attach::Detached);
        if let Ok(tree) = late {
            tree.unmount().unwrap();
        }
        assert_all_goes(store);
    });
}

#[test]
fn r07_what_is_made_of_a_base_keeps_it() {
    explore("bases of what is made", 300, || {
        let rig = rig();
        let store = rig.open();
        let first = process_lease(&store);
        let staged = common::stage_layer(&store, &[common::Item::File("f", "text")], None);
        let layers = store.layers().publish(&first, vec![staged]).unwrap();
        let base = store.snapshots().ensure(&layers, &first).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| first.release().unwrap());
            scope.spawn(|| collect(&store));
            scope.spawn(|| {
                let lease = process_lease(&store);
                if lease.hold_if_present(base).unwrap() {
                    let volatile = ActiveOptions { volatile: true };
                    let active = store.snapshots().prepare(Some(base), &lease, volatile).unwrap();
                    lease.let_go(base).unwrap();
                    collect(&store);
                    let tree = store.snapshots().mount_active(active, Attach::Detached).unwrap();
                    assert_eq!(fs::read_to_string(common::path_of(&tree.root()).join("f")).unwrap(), "text");
                    tree.unmount().unwrap();
                }
                lease.release().unwrap();
            });
        });
        assert_all_goes(store);
    });
}

#[test]
fn r08_what_is_written_while_the_store_closes_is_kept() {
    explore("writes while the store closes", 500, || {
        let rig = rig();
        let store = rig.open();
        let (first, second) = (store.clone(), store.clone());
        thread::scope(|scope| {
            scope.spawn(move || {
                first.write(put(1)).unwrap();
                first.close().unwrap();
            });
            scope.spawn(move || {
                second.write_lazily(put(2)).unwrap();
                // As a hold that goes with an error.
                drop(second);
            });
            scope.spawn(move || store.close().unwrap());
        });
        assert_eq!(numbers(&rig.open()), [1, 2]);
        rig.assert_no_warnings();
    });
}

#[test]
fn turns_exclude_each_other_and_a_cancel_ends_any_wait() {
    explore("turns", 2000, || {
        let (turns, cancel) = (Turns::default(), Cancel::new());
        let busy: [AtomicBool; 3] = Default::default();
        let at_work = |keys: [usize; 2], cancel: &Cancel| {
            let turn = turns.take(keys, cancel)?;
            for key in keys {
                assert!(!busy[key].swap(true, Ordering::SeqCst), "two at one key");
            }
            thread::yield_now();
            for key in keys {
                busy[key].store(false, Ordering::SeqCst);
            }
            drop(turn);
            Ok::<_, Canceled>(())
        };
        let never = Cancel::new();
        thread::scope(|scope| {
            scope.spawn(|| at_work([0, 1], &never).unwrap());
            scope.spawn(|| at_work([1, 2], &never).unwrap());
            // Cancelled or not, it ends, and nobody waits for it any longer.
            scope.spawn(|| at_work([2, 0], &cancel).unwrap_or_default());
            scope.spawn(|| cancel.cancel());
        });
        at_work([0, 1], &never).unwrap();
        at_work([1, 2], &never).unwrap();
        let held = turns.take([0], &never).unwrap();
        assert_eq!(turns.take([0], &cancel).map(drop), Err(Canceled), "it was cancelled before");
        drop(held);
    });
}

#[test]
fn a_wait_for_a_turn_that_never_comes_ends_with_a_cancel() {
    explore("cancelled waits for turns", 2000, || {
        let (turns, cancel) = (Turns::default(), Cancel::new());
        let held = turns.take([0], &Cancel::new()).unwrap();
        // Nobody else wakes it: a cancel that comes between its look and its sleep must not be missed.
        thread::scope(|scope| {
            let waits = scope.spawn(|| turns.take([0], &cancel).map(drop));
            scope.spawn(|| cancel.cancel());
            assert_eq!(waits.join().unwrap(), Err(Canceled));
        });
        drop(held);
    });
}

#[test]
fn work_in_parallel_is_done_once_each_and_a_failure_is_told() {
    explore("work in parallel", 2000, || {
        let items = [0_usize, 1, 2, 3, 4];
        let done: Arc<[AtomicUsize; 5]> = Arc::default();
        let fails_at = shuttle::rand::Rng::gen_range(&mut shuttle::rand::thread_rng(), 0..10);
        let work = |item: &usize| {
            assert_eq!(done[*item].fetch_add(1, Ordering::SeqCst), 0, "done twice");
            if *item == fails_at { Err("no") } else { Ok(item * 2) }
        };
        match parallel(&items, 3, |item| *item as u64, work) {
            Ok(results) => assert_eq!((results, fails_at < 5), (vec![0, 2, 4, 6, 8], false)),
            Err(error) => assert_eq!((error, fails_at < 5), ("no", true)),
        }
    });
}
