//! The layer store as Docker's has it, statement by statement.

#![allow(clippy::unwrap_used)] // the exemption for tests does not see their helpers

mod common;

use std::fs;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Barrier};
use std::time::{Duration, UNIX_EPOCH};

use common::{Open, Rig, diff_id, tar};
use plies_archive::ChangeKind;
use plies_image::{LayerRef, LayerStore, LayerStoreError, LayerStoreOptions, NewRwLayer, RemovedLayer, RwRef};
use plies_oci::{ChainId, Compression, ErrorKind};
use plies_store::{Attach, DriverKind, IdMaps, LeaseId, Mounted, OpenError, OpenOptions, Store, Table, WaitPolicy};
use plies_testkit::tar::{Member, archive};
use plies_testkit::tools;
use rustix::thread::CapabilitySet;

const REFS: Table<(ChainId, LeaseId), ()> = Table::new("image.chain_refs");
const RW_REFS: Table<(String, LeaseId), ()> = Table::new("image.rw_refs");
/// A lease that nobody has.
fn dead() -> LeaseId {
    "0909090909090909".parse().unwrap()
}

fn path_of(dir: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/.", dir.as_fd().as_raw_fd()))
}

fn read(mounted: &Mounted, path: &str) -> Option<String> {
    fs::read_to_string(path_of(&mounted.root()).join(path)).ok()
}

fn kind<T: std::fmt::Debug>(result: Result<T, LayerStoreError>) -> ErrorKind {
    result.unwrap_err().kind()
}

fn chains(removed: &[RemovedLayer]) -> Vec<ChainId> {
    removed.iter().map(|layer| layer.chain_id).collect()
}

fn new_rw<'a>(parent: Option<ChainId>) -> NewRwLayer<'a> {
    NewRwLayer { parent, ..NewRwLayer::default() }
}

fn rw(open: &Open, name: &str, parent: Option<ChainId>) -> RwRef {
    open.layers.create_rw(name, new_rw(parent), &open.lease).unwrap()
}

/// Writes to a writable layer.
fn write(open: &Open, rw: &RwRef, path: &str, text: &str) {
    let mounted = open.layers.mount_rw(rw, Attach::Detached).unwrap();
    let path = path_of(&mounted.root()).join(path);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    mounted.unmount().unwrap();
}

#[test]
fn e01_a_parent_as_deep_as_the_limit_is_refused_and_released() {
    if !tools::privileged() {
        return;
    }
    let rig = Rig { options: LayerStoreOptions { depth_max: 3 }, ..Rig::new() };
    let mut open = rig.open();
    let deepest = open.chain(&[tar(1), tar(2), tar(3)]);
    assert_eq!(deepest.info().depth, 3);
    let parent = deepest.chain_id();
    let error = open.register(&tar(4), Some(parent)).unwrap_err();
    assert!(matches!(error, LayerStoreError::MaxDepth { depth: 3, maximum: 3, .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::Limit);
    assert_eq!(open.layers.users(parent).unwrap().refs_count, 1, "the parent was released");
    assert_eq!(open.layers.release(deepest).unwrap().len(), 3);
    open.collect();
    assert_eq!(open.counts(), (0, 0));
    assert_eq!(LayerStoreOptions::default().depth_max, 500);
}

#[test]
fn e02_a_driver_that_does_not_work_is_told_when_the_store_is_opened() {
    if !tools::privileged() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let open = |driver| {
        let mut options = OpenOptions::new(Arc::new(|| UNIX_EPOCH + Duration::from_secs(4_000_000_000)));
        options.driver = driver;
        Store::open(&dir.path().join("store"), options, WaitPolicy::Fail)
    };
    let opened = std::thread::scope(|scope| {
        let without_mounts = || {
            // Of this thread alone.
            let mut sets = rustix::thread::capabilities(None).unwrap();
            sets.effective.remove(CapabilitySet::SYS_ADMIN);
            rustix::thread::set_capabilities(None, sets).unwrap();
            let asked_for = open(DriverKind::Overlay).map(drop).unwrap_err();
            assert!(matches!(asked_for, OpenError::Driver { driver: "overlay", .. }), "{asked_for}");
            assert_eq!(asked_for.kind(), ErrorKind::Unavailable);
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "nothing was made");
            open(DriverKind::Auto).map(|store| store.driver())
        };
        scope.spawn(without_mounts).join().unwrap()
    });
    assert_eq!(opened.unwrap(), "native (copies)");
    // The layers are the same with either driver.
    let with_mounts = open(DriverKind::Overlay).unwrap();
    assert!(with_mounts.driver().starts_with("overlay"), "{}", with_mounts.driver());
}

#[test]
fn e03_after_a_restart_a_layer_is_held_by_its_children_and_holders_only() {
    if !tools::privileged() {
        return;
    }
    let rig = Rig::new();
    let (kept, lost) = {
        let open = rig.open();
        let kept = open.chain(&[tar(1), tar(2)]);
        open.layers.hold(&kept, "user").unwrap();
        let lost = open.register(&tar(3), Some(kept.chain_id())).unwrap();
        let ids = (kept.chain_id(), lost.chain_id());
        // As a process that is killed leaves them: nobody released.
        for chain in [ids.0, ids.1] {
            open.store().write(|tx| tx.put(&REFS, &(chain, dead()), &()).map(drop)).unwrap();
        }
        ids
    };
    let mut open = rig.open();
    let parent = open.layers.info(kept).unwrap().parent.unwrap();
    assert_eq!(open.layers.users(parent).unwrap().children, [kept]);
    let users = open.layers.users(kept).unwrap();
    assert_eq!((users.refs_count, users.children.len()), (0, 0));
    assert_eq!(users.holders, [("user".to_owned(), 1)]);
    assert_eq!(kind(open.layers.get(lost)), ErrorKind::NotFound);
    open.collect();
    assert_eq!(open.counts().0, 2);
    assert_eq!(open.layers.let_go(kept, "user").unwrap().len(), 2);
}

#[test]
fn e04_a_layer_knows_its_diff_size_and_parent() {
    if !tools::privileged() {
        return;
    }
    let open = Rig::new().open();
    let bottom = open.register(&archive(&[Member::file("a", vec![1; 1000])]), None).unwrap();
    let tar = archive(&[Member::file("b", vec![2; 234]), Member::hard_link("c", "b")]);
    let top = open.register(&tar, Some(bottom.chain_id())).unwrap();
    let info = open.layers.info(top.chain_id()).unwrap();
    assert_eq!(&info, top.info());
    assert_eq!((info.diff_id, info.parent, info.depth), (diff_id(&tar), Some(bottom.chain_id()), 2));
    assert_eq!((info.diff_bytes, info.chain_bytes), (234, 1234));
}

#[test]
fn e05_what_is_known_of_a_writable_layer_is_read_again_whatever_is_missing_of_it() {
    if !tools::privileged() {
        return;
    }
    let rig = Rig::new();
    let before = {
        let open = rig.open();
        let parent = open.register(&tar(1), None).unwrap();
        rw(&open, "alone", None);
        rw(&open, "child", Some(parent.chain_id()));
        let mut init = |root: std::os::fd::BorrowedFd<'_>| fs::write(path_of(&root).join(".init"), "made");
        let new = NewRwLayer { init: Some(&mut init), ..new_rw(Some(parent.chain_id())) };
        let made = open.layers.create_rw("with init", new, &open.lease);
        assert_eq!(kind(made), ErrorKind::InvalidInput);
        let new = NewRwLayer { init: Some(&mut init), ..new_rw(Some(parent.chain_id())) };
        drop(open.layers.create_rw("with-init", new, &open.lease).unwrap());
        open.layers.list_rw().unwrap()
    };
    let known: Vec<_> =
        before.iter().map(|info| (info.name.as_str(), info.parent.is_some(), info.init_id().is_some())).collect();
    assert_eq!(known, [("alone", false, false), ("child", true, false), ("with-init", true, true)]);
    // Opening again, and the layer store a second time, changes neither what is known nor what is counted.
    let open = rig.open();
    let again = LayerStore::open(open.store(), LayerStoreOptions::default()).unwrap();
    for layers in [&open.layers, &again] {
        assert_eq!(layers.list_rw().unwrap(), before);
        let users = layers.users(before[1].parent.unwrap()).unwrap();
        assert_eq!(users.holders, [("rw:child".to_owned(), 1), ("rw:with-init".to_owned(), 1)]);
    }
}

#[test]
fn e06_bytes_behind_the_end_belong_to_the_diff_id_and_the_tar() {
    if !tools::privileged() {
        return;
    }
    let open = Rig::new().open();
    for trailing in [vec![], vec![0; 10_240], b"garbage".to_vec(), vec![7; 3 << 20]] {
        let tar = [tar(1), trailing].concat();
        let layer = open.register(&tar, None).unwrap();
        assert_eq!(layer.info().diff_id, diff_id(&tar));
        assert!(open.export(&layer).unwrap() == tar);
    }
}

#[test]
fn e07_an_unknown_parent_does_not_exist() {
    let open = Rig::new().open();
    let nobody = ChainId::from_bytes([7; 32]);
    let never_read = |_: &mut [u8]| -> io::Result<usize> { panic!("a stream is not read for nothing") };
    struct Stream<F>(F);
    impl<F: FnMut(&mut [u8]) -> io::Result<usize>> Read for Stream<F> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            (self.0)(buf)
        }
    }
    let result = open.layers.register(Stream(never_read), Compression::None, Some(nobody), &open.transfer());
    assert!(matches!(result, Err(LayerStoreError::DoesNotExist { .. })));
    assert_eq!(kind(open.layers.get(nobody)), ErrorKind::NotFound);
    assert_eq!(kind(open.layers.create_rw("x", new_rw(Some(nobody)), &open.lease)), ErrorKind::NotFound);
    assert!(open.layers.list_rw().unwrap().is_empty());
}

#[test]
fn e08_no_layer_gets_an_id_twice_and_one_that_cannot_be_begun_leaves_nothing() {
    if !tools::privileged() {
        return;
    }
    let rig = Rig::new();
    let before = {
        let mut open = rig.open();
        let layer = open.register(&tar(1), None).unwrap();
        let id = layer.info().layer;
        open.layers.release(layer).unwrap();
        open.collect();
        id
    };
    let mut open = rig.open();
    let parent = open.register(&tar(1), None).unwrap();
    assert_ne!(parent.info().layer, before, "of the same tar, in another session");
    // No place for its directory.
    let stages = open.store().root().join("layers/stage");
    let aside = open.store().root().join("layers-stage");
    fs::rename(&stages, &aside).unwrap();
    assert_eq!(kind(open.register(&tar(2), Some(parent.chain_id()))), ErrorKind::Unavailable);
    fs::rename(&aside, &stages).unwrap();
    let users = open.layers.users(parent.chain_id()).unwrap();
    assert_eq!((users.refs_count, users.children.len()), (1, 0));
    open.collect();
    assert_eq!(open.counts(), (1, 0));
    assert_eq!(open.register(&tar(2), Some(parent.chain_id())).unwrap().info().parent, Some(parent.chain_id()));
}

#[test]
fn e09_a_tar_that_is_cut_registers_nothing_leaks_nothing_and_releases_the_parent() {
    if !tools::privileged() {
        return;
    }
    let mut open = Rig::new().open();
    let parent = open.register(&tar(1), None).unwrap();
    let whole = tar(2);
    for length in (0..whole.len() - 1024).step_by(100).chain([whole.len() - 1024, whole.len() - 512]) {
        let error = open.register(&whole[..length], Some(parent.chain_id())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{length}: {error}");
    }
    assert_eq!(open.layers.users(parent.chain_id()).unwrap().refs_count, 1);
    assert_eq!(open.layers.list().unwrap().len(), 1);
    open.collect();
    assert_eq!(open.counts(), (1, 0));
}

#[test]
fn e10_the_chain_id_is_the_diff_id_or_the_digest_of_parent_and_diff_id() {
    if !tools::privileged() {
        return;
    }
    let open = Rig::new().open();
    let bottom = open.register(&tar(1), None).unwrap();
    assert_eq!(bottom.chain_id().as_bytes(), diff_id(&tar(1)).as_bytes());
    let top = open.register(&tar(2), Some(bottom.chain_id())).unwrap();
    assert_eq!(Some(top.chain_id()), ChainId::of(&[diff_id(&tar(1)), diff_id(&tar(2))]));
}

#[test]
fn e11_registering_a_layer_again_gives_the_one_that_is_there() {
    if !tools::privileged() {
        return;
    }
    let mut open = Rig::new().open();
    let parent = open.register(&tar(1), None).unwrap();
    let one = open.register(&tar(2), Some(parent.chain_id())).unwrap();
    let two = open.register(&tar(2), Some(parent.chain_id())).unwrap();
    assert_eq!(one.info(), two.info());
    let users = open.layers.users(parent.chain_id()).unwrap();
    assert_eq!((users.children.len(), users.refs_count), (1, 1));
    open.collect();
    assert_eq!(open.counts(), (2, 0));
    assert!(open.layers.release(one).unwrap().is_empty(), "another reference is left");
    assert_eq!(open.layers.release(two).unwrap().len(), 1);
    // The same tar on another parent is another chain, and the same layer.
    let other = open.register(&tar(1), Some(parent.chain_id())).unwrap();
    assert_ne!(other.chain_id(), parent.chain_id());
    assert_eq!(other.info().layer, parent.info().layer);
}

#[test]
fn e11_registered_by_many_at_once_one_layer_stays_and_counts_are_exact() {
    if !tools::privileged() {
        return;
    }
    let mut open = Rig::new().open();
    let parent = open.register(&tar(1), None).unwrap();
    let barrier = Barrier::new(4);
    let refs: Vec<LayerRef> = std::thread::scope(|scope| {
        let register = || {
            barrier.wait();
            open.register(&tar(2), Some(parent.chain_id())).unwrap()
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(register)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(refs.iter().all(|layer| layer.info() == refs[0].info()));
    assert_eq!(open.layers.users(refs[0].chain_id()).unwrap().refs_count, 4);
    let users = open.layers.users(parent.chain_id()).unwrap();
    assert_eq!((users.children.len(), users.refs_count), (1, 1));
    open.collect();
    assert_eq!(open.counts(), (2, 0));
    let gone: Vec<_> = refs.into_iter().map(|layer| open.layers.release(layer).unwrap().len()).collect();
    assert_eq!(gone, [0, 0, 0, 1]);
}

#[test]
fn e12_registrations_run_side_by_side_up_to_the_commit() {
    if !tools::privileged() {
        return;
    }
    let open = Rig::new().open();
    // Each stream ends only when the other has begun: one after the other they would wait for ever.
    let barrier = Barrier::new(2);
    struct Waits<'a>(&'a Barrier, bool, io::Cursor<Vec<u8>>);
    impl Read for Waits<'_> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            if !std::mem::replace(&mut self.1, true) {
                self.0.wait();
            }
            self.2.read(buf)
        }
    }
    std::thread::scope(|scope| {
        for n in 0..2 {
            let (open, barrier) = (&open, &barrier);
            scope.spawn(move || {
                let stream = Waits(barrier, false, io::Cursor::new(tar(n)));
                let layer = open.layers.register(stream, Compression::None, None, &open.transfer()).unwrap();
                open.layers.hold(&layer, "user").unwrap();
            });
        }
    });
    assert_eq!(open.layers.list().unwrap().len(), 2);
}

#[test]
fn e13_references_are_distinct_and_counted() {
    if !tools::privileged() {
        return;
    }
    let open = Rig::new().open();
    let one = open.register(&tar(1), None).unwrap();
    let chain = one.chain_id();
    let (two, three) = (open.layers.get(chain).unwrap(), open.layers.get(chain).unwrap());
    assert_eq!(open.layers.users(chain).unwrap().refs_count, 3);
    open.layers.release(two).unwrap();
    drop(three);
    assert_eq!(open.layers.users(chain).unwrap().refs_count, 1);
    assert_eq!(chains(&open.layers.release(one).unwrap()), [chain]);
    assert_eq!(kind(open.layers.get(chain)), ErrorKind::NotFound);
}

#[test]
fn e14_what_is_not_held_is_not_released() {
    if !tools::privileged() {
        return;
    }
    let open = Rig::new().open();
    assert!(open.layers.let_go(ChainId::from_bytes([1; 32]), "user").unwrap().is_empty(), "unknown");
    let layer = open.register(&tar(1), None).unwrap();
    let error = open.layers.let_go(layer.chain_id(), "user").unwrap_err();
    assert!(matches!(error, LayerStoreError::NotRetained { .. }), "{error}");
    open.layers.hold(&layer, "user").unwrap();
    open.layers.hold(&layer, "user").unwrap();
    for left in [true, true, false] {
        assert_eq!(open.layers.let_go(layer.chain_id(), "user").is_ok(), left);
    }
    // A reference of another store's is none of ours.
    let elsewhere = Rig::new();
    let other = elsewhere.open();
    let theirs = other.register(&tar(1), None).unwrap();
    let error = open.layers.release(theirs).unwrap_err();
    assert!(matches!(error, LayerStoreError::NotRetained { .. }), "{error}");
}

#[test]
fn e15_the_last_release_removes_down_the_chain_and_says_what_went() {
    if !tools::privileged() {
        return;
    }
    let mut open = Rig::new().open();
    let base = open.chain(&[tar(1), tar(2)]);
    let left = open.register(&tar(3), Some(base.chain_id())).unwrap();
    let right = open.register(&tar(4), Some(base.chain_id())).unwrap();
    let (parent, bottom) = (base.chain_id(), base.info().parent.unwrap());
    assert!(open.layers.release(base).unwrap().is_empty());
    let expected = [left.chain_id()];
    assert_eq!(chains(&open.layers.release(left).unwrap()), expected);
    open.collect();
    assert_eq!(open.counts().0, 3);
    let info = right.info().clone();
    let removed = open.layers.release(right).unwrap();
    assert_eq!(chains(&removed), [info.chain_id, parent, bottom], "child before parent");
    assert_eq!(removed[0].diff_id, diff_id(&tar(4)));
    assert_eq!((removed[0].diff_bytes, removed[0].chain_bytes), (9, 27));
    assert_eq!((removed[2].diff_bytes, removed[2].chain_bytes), (9, 9));
    open.collect();
    assert_eq!(open.counts(), (0, 0));
}

#[test]
fn e16_a_layer_with_a_child_or_a_reference_stays() {
    if !tools::privileged() {
        return;
    }
    let mut open = Rig::new().open();
    let parent = open.register(&tar(1), None).unwrap();
    let chain = parent.chain_id();
    let child = open.register(&tar(2), Some(chain)).unwrap();
    open.layers.hold(&parent, "user").unwrap();
    assert!(open.layers.release(parent).unwrap().is_empty());
    assert!(open.layers.let_go(chain, "user").unwrap().is_empty());
    open.collect();
    let again = open.layers.get(chain).unwrap();
    assert!(open.export(&again).unwrap() == tar(1));
    assert!(open.export(&child).unwrap() == tar(2));
}

#[test]
fn e17_the_name_of_a_writable_layer_is_taken_once() {
    if !tools::privileged() {
        return;
    }
    let mut open = Rig::new().open();
    let parent = open.register(&tar(1), None).unwrap();
    let first = rw(&open, "c", Some(parent.chain_id()));
    assert_eq!(kind(open.layers.create_rw("c", new_rw(None), &open.lease)), ErrorKind::AlreadyExists);
    for bad in ["", "a/b", "..\0", "a b", &"n".repeat(129)] {
        assert_eq!(kind(open.layers.create_rw(bad, new_rw(None), &open.lease)), ErrorKind::InvalidInput, "{bad:?}");
    }
    let users = open.layers.users(parent.chain_id()).unwrap();
    assert_eq!((users.refs_count, users.holders), (1, vec![("rw:c".to_owned(), 1)]));
    let barrier = Barrier::new(4);
    let made: Vec<bool> = std::thread::scope(|scope| {
        let create = || {
            barrier.wait();
            open.layers.create_rw("race", new_rw(Some(parent.chain_id())), &open.lease).map(drop).is_ok()
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(create)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(made.iter().filter(|made| **made).count(), 1);
    let users = open.layers.users(parent.chain_id()).unwrap();
    assert_eq!((users.refs_count, users.holders.len()), (1, 2), "the losers released the parent");
    drop(first);
    open.collect();
    assert_eq!(open.layers.list_rw().unwrap().len(), 2, "dropping a reference removes nothing");
}

#[test]
fn e18_the_init_layer_lies_between_the_parent_and_the_writable_layer() {
    if !tools::privileged() {
        return;
    }
    for driver in [DriverKind::Auto, DriverKind::Overlay, DriverKind::Native] {
        let open = Rig { driver, ..Rig::new() }.open();
        let parent = open.register(&tar(1), None).unwrap();
        let mut init = |root: std::os::fd::BorrowedFd<'_>| {
            assert!(path_of(&root).join("d/1").exists(), "on the parent");
            fs::write(path_of(&root).join(".init"), "made")
        };
        let new = NewRwLayer { init: Some(&mut init), ..new_rw(Some(parent.chain_id())) };
        let made = open.layers.create_rw("c", new, &open.lease).unwrap();
        assert_eq!(made.info().init_id(), Some(format!("{}-init", made.info().mount_id())));
        write(&open, &made, "own", "1");
        let mounted = open.layers.mount_rw(&made, Attach::Detached).unwrap();
        assert_eq!(read(&mounted, ".init").as_deref(), Some("made"));
        assert_eq!(read(&mounted, "d/1").as_deref(), Some("content 1"));
        mounted.unmount().unwrap();
        let changes = open.layers.changes(&made).unwrap();
        assert_eq!(changes.len(), 1, "what init made is no change: {changes:?}");
        let committed = open.layers.commit_rw(&made, &open.transfer()).unwrap();
        assert_eq!(committed.info().parent, Some(parent.chain_id()));
        let tar = open.export(&committed).unwrap();
        assert!(!tar.windows(5).any(|window| window == b".init"), "nor is it in a layer made of them");
    }
}

#[test]
fn e18_an_init_that_fails_leaves_nothing() {
    if !tools::privileged() {
        return;
    }
    let rig = Rig::new();
    let mut open = rig.open();
    let parent = open.register(&tar(1), None).unwrap();
    let mut init = |root: std::os::fd::BorrowedFd<'_>| {
        fs::write(path_of(&root).join("half"), "x")?;
        Err(io::Error::other("on purpose"))
    };
    let new = NewRwLayer { init: Some(&mut init), ..new_rw(Some(parent.chain_id())) };
    let error = open.layers.create_rw("c", new, &open.lease).unwrap_err();
    assert!(matches!(error, LayerStoreError::Init { .. }), "{error}");
    assert!(open.layers.list_rw().unwrap().is_empty());
    assert_eq!(open.layers.users(parent.chain_id()).unwrap().refs_count, 1);
    open.collect();
    assert_eq!(open.counts(), (1, 0));
    assert_eq!(fs::read_dir(open.store().root().join("active")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(open.store().root().join("mounts")).unwrap().count(), 0);
}

#[test]
fn e19_a_writable_layer_survives_its_process_with_all_that_it_stands_on() {
    if !tools::privileged() {
        return;
    }
    let rig = Rig::new();
    {
        let open = rig.open();
        let parent = open.register(&tar(1), None).unwrap();
        let made = rw(&open, "c", Some(parent.chain_id()));
        write(&open, &made, "own", "kept");
        open.store().write(|tx| tx.put(&RW_REFS, &("c".to_owned(), dead()), &()).map(drop)).unwrap();
    }
    let mut open = rig.open();
    open.collect();
    let again = open.layers.get_rw("c").unwrap();
    let mounted = open.layers.mount_rw(&again, Attach::Detached).unwrap();
    assert_eq!(read(&mounted, "own").as_deref(), Some("kept"));
    assert_eq!(read(&mounted, "d/1").as_deref(), Some("content 1"));
    mounted.unmount().unwrap();
    let info = open.layers.list_rw().unwrap();
    assert_eq!((info.len(), info[0].init), (1, None));
    assert_eq!(open.layers.release_rw(again).unwrap().len(), 1, "the dead process's reference does not count");
}

#[test]
fn e19_a_mount_label_is_the_kernels_to_take() {
    if !tools::privileged() {
        return;
    }
    let open = Rig::new().open();
    let label = "system_u:object_r:container_file_t:s0:c1,c2";
    let new = NewRwLayer { label: Some(label.to_owned()), ..new_rw(None) };
    let made = open.layers.create_rw("c", new, &open.lease).unwrap();
    assert_eq!(made.info().label.as_deref(), Some(label));
    let mounted = open.layers.mount_rw(&made, Attach::Detached);
    if std::path::Path::new("/sys/fs/selinux/enforce").exists() {
        mounted.unwrap().unmount().unwrap();
    } else {
        assert_eq!(kind(mounted), ErrorKind::Unavailable, "without SELinux it is refused, not left out");
    }
}

#[test]
fn e19_a_mount_shows_mapped_owners_and_changes_have_those_on_disk() {
    if !tools::privileged() {
        return;
    }
    let range = |text: &str| vec![text.parse().unwrap()];
    let ids = IdMaps::new(range("0:100000:65536"), range("0:200000:65536")).unwrap();
    let base = archive(&[
        Member::dir("d").owner(0, 0),
        Member::file("d/old", "old").owner(5, 6),
        Member::file("root", "root's").owner(0, 0),
    ]);
    let rig = Rig { driver: DriverKind::Overlay, ..Rig::new() };
    let shown_on = rig.dir.path().join("shown");
    fs::create_dir(&shown_on).unwrap();
    for dir in [rig.dir.path(), &shown_on] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
    }
    let owner = |path: PathBuf| {
        let stat = fs::symlink_metadata(path).unwrap();
        (stat.uid(), stat.gid())
    };
    let chain = {
        let open = rig.open();
        let parent = open.chain(&[base, archive(&[Member::file("d/second", "2").owner(7, 8)])]);
        let mut init = |root: std::os::fd::BorrowedFd<'_>| fs::write(path_of(&root).join(".init"), "made");
        let new = NewRwLayer { ids: Some(ids.clone()), init: Some(&mut init), ..new_rw(Some(parent.chain_id())) };
        let made = open.layers.create_rw("c", new, &open.lease).unwrap();
        open.layers.hold(&parent, "user").unwrap();
        assert_eq!(made.info().ids, Some(ids.clone()));
        parent.chain_id()
    };
    // What it was made with is known to the next process.
    let open = rig.open();
    let made = open.layers.get_rw("c").unwrap();
    for turn in 0..2 {
        let mounted = open.layers.mount_rw(&made, Attach::At(&shown_on)).unwrap();
        let there = [(".init", 0, 0), ("d/old", 5, 6), ("root", 0, 0), ("", 0, 0), ("d/second", 7, 8)];
        for (name, uid, gid) in &there[..there.len() - turn] {
            assert_eq!(owner(shown_on.join(name)), (100_000 + uid, 200_000 + gid), "{name}, turn {turn}");
        }
        if turn == 0 {
            // As the mapped root, who owns and may change only what shows as its own.
            let script = "echo new > d/new && echo more >> root && rm d/second && mkdir e && ! echo x >> d/old";
            let mut shell = std::process::Command::new("sh");
            shell.args(["-c", script]).current_dir(&shown_on).uid(100_000).gid(200_000);
            tools::run(&mut shell);
            fs::write(shown_on.join("nobodys"), "").unwrap_err();
        }
        mounted.unmount().unwrap();
    }
    let upper = open.store().root().join(format!("active/{}/fs", made.info().active));
    for name in ["d/new", "root", "e"] {
        assert_eq!(owner(upper.join(name)), (0, 0), "{name} on disk");
    }
    let changes: Vec<String> =
        open.layers.changes(&made).unwrap().iter().map(|change| format!("{:?} {}", change.kind, change.path)).collect();
    assert_eq!(changes, ["Modified /d", "Added /d/new", "Deleted /d/second", "Added /e", "Modified /root"]);
    let committed = open.layers.commit_rw(&made, &open.transfer()).unwrap();
    assert_eq!(committed.info().parent, Some(chain));
    let plain = rw(&open, "plain", Some(committed.chain_id()));
    let mounted = open.layers.mount_rw(&plain, Attach::Detached).unwrap();
    for (name, expected) in [("d/new", (0, 0)), ("d/old", (5, 6)), ("root", (0, 0))] {
        assert_eq!(owner(path_of(&mounted.root()).join(name)), expected, "{name}, committed");
    }
    assert_eq!(read(&mounted, "root").as_deref(), Some("root'smore\n"));
    mounted.unmount().unwrap();

    let native = Rig { driver: DriverKind::Native, ..Rig::new() }.open();
    let made = native.layers.create_rw("c", NewRwLayer { ids: Some(ids), ..new_rw(None) }, &native.lease).unwrap();
    assert_eq!(kind(native.layers.mount_rw(&made, Attach::Detached)), ErrorKind::Unavailable, "refused, not left out");
}

#[test]
fn e20_each_reference_to_a_writable_layer_is_a_new_one() {
    if !tools::privileged() {
        return;
    }
    let open = Rig::new().open();
    assert_eq!(kind(open.layers.get_rw("c")), ErrorKind::NotFound);
    let one = rw(&open, "c", None);
    let two = open.layers.get_rw("c").unwrap();
    assert_eq!(one.info(), two.info());
    assert!(open.layers.release_rw(one).unwrap().is_empty());
    assert_eq!(open.layers.list_rw().unwrap().len(), 1);
    open.layers.release_rw(two).unwrap();
    assert!(open.layers.list_rw().unwrap().is_empty());
}

#[test]
fn e21_the_last_release_removes_the_writable_layer_and_releases_its_parent() {
    if !tools::privileged() {
        return;
    }
    let mut open = Rig::new().open();
    let parent = open.chain(&[tar(1), tar(2)]);
    let (top, bottom) = (parent.chain_id(), parent.info().parent.unwrap());
    let mut init = |root: std::os::fd::BorrowedFd<'_>| fs::write(path_of(&root).join(".init"), "made");
    let new = NewRwLayer { init: Some(&mut init), ..new_rw(Some(top)) };
    let made = open.layers.create_rw("c", new, &open.lease).unwrap();
    open.layers.release(parent).unwrap();
    write(&open, &made, "own", "1");
    open.collect();
    assert_eq!(open.counts().0, 3);
    let other = open.layers.get_rw("c").unwrap();
    assert!(open.layers.release_rw(other).unwrap().is_empty(), "others hold it");
    assert_eq!(chains(&open.layers.release_rw(made).unwrap()), [top, bottom]);
    open.collect();
    assert_eq!(open.counts(), (0, 0));
    assert_eq!(fs::read_dir(open.store().root().join("active")).unwrap().count(), 0);
}

#[test]
fn e22_getting_and_releasing_the_same_layer_from_many_threads_neither_locks_up_nor_miscounts() {
    if !tools::privileged() {
        return;
    }
    let open = Rig::new().open();
    let layer = open.register(&tar(1), None).unwrap();
    let chain = layer.chain_id();
    std::thread::scope(|scope| {
        for n in 0..4 {
            let open = &open;
            scope.spawn(move || {
                for turn in 0..10 {
                    let held = open.layers.get(chain).unwrap();
                    let made = rw(open, &format!("c{n}-{turn}"), Some(chain));
                    open.layers.release(held).unwrap();
                    open.layers.release_rw(made).unwrap();
                }
            });
        }
    });
    let users = open.layers.users(chain).unwrap();
    assert_eq!((users.refs_count, users.holders.len(), users.children.len()), (1, 0, 0));
}

#[test]
fn e23_a_tar_comes_back_byte_by_byte_whatever_it_holds() {
    if !tools::privileged() {
        return;
    }
    let long = format!("{}/{}", "directory-".repeat(20), "name-".repeat(40));
    let big = vec![b'x'; 300_000];
    let base = archive(&[
        Member::dir("usr"),
        Member::dir("usr/lib"),
        Member::symlink("lib", "usr/lib"),
        Member::file("shared", "shared"),
        Member::file("old", "old"),
    ]);
    /// Who keeps the tar besides what it became.
    enum Kept {
        Never,
        /// Trees cannot give it back; with the driver `erofs` it is the layer.
        WithTrees,
        Always,
    }
    use Kept::{Always, Never, WithTrees};
    let cases: Vec<(&str, Vec<u8>, Kept)> = vec![
        ("long names", archive(&[Member::file(&long, "x"), Member::symlink("l", &long)]), Never),
        ("names that are no UTF-8", archive(&[Member::file(b"\xff\xfe", "x"), Member::dir(b"\x80")]), Never),
        ("attributes", archive(&[Member::file("f", "x").xattr("user.a", "b").mtime(1, 5)]), Never),
        (
            "a name twice",
            archive(&[Member::file("a", &big), Member::file("b", "b"), Member::file("a", "2")]),
            WithTrees,
        ),
        (
            "a directory over a file",
            archive(&[Member::file("a", &big), Member::dir("a"), Member::file("a/b", "")]),
            WithTrees,
        ),
        ("a link into a lower layer", archive(&[Member::file("a", &big), Member::hard_link("h", "shared")]), Always),
        ("below a lower link", archive(&[Member::file("lib/x", &big), Member::file("y", "y")]), Always),
        ("hides all that is below", archive(&[Member::file(".wh..wh..opq", ""), Member::file("new", "new")]), Always),
        ("nothing", archive(&[]), Never),
    ];
    for driver in [DriverKind::Auto, DriverKind::Overlay, DriverKind::Native] {
        let mut open = Rig { driver, ..Rig::new() }.open();
        let packs = open.layers.driver().starts_with("erofs");
        let parent = open.register(&base, None).unwrap();
        for (what, tar, kept) in &cases {
            let layer = open.register(tar, Some(parent.chain_id())).unwrap_or_else(|error| panic!("{what}: {error}"));
            open.collect();
            assert!(open.export(&layer).unwrap() == *tar, "{what}");
            let is_kept = match kept {
                Never => false,
                WithTrees => !packs,
                Always => true,
            };
            assert_eq!(open.counts().1, usize::from(is_kept), "{what}: blobs with {driver:?}");
            // What is mounted is what the tar makes of the parent.
            let made = rw(&open, "c", Some(layer.chain_id()));
            let mounted = open.layers.mount_rw(&made, Attach::Detached).unwrap();
            match *what {
                "a name twice" => assert_eq!(read(&mounted, "a").as_deref(), Some("2")),
                "a link into a lower layer" => assert_eq!(read(&mounted, "h").as_deref(), Some("shared")),
                "below a lower link" => assert_eq!(read(&mounted, "usr/lib/x").map(|text| text.len()), Some(300_000)),
                "hides all that is below" => {
                    assert_eq!((read(&mounted, "old"), read(&mounted, "new").as_deref()), (None, Some("new")))
                }
                _ => assert_eq!(read(&mounted, "old").as_deref(), Some("old")),
            }
            mounted.unmount().unwrap();
            open.layers.release_rw(made).unwrap();
            open.layers.release(layer).unwrap();
            open.collect();
            assert_eq!(open.counts(), (1, 0), "{what}: left over");
        }
    }
}

#[test]
fn e23_a_layer_that_was_changed_on_disk_does_not_go_out_as_what_it_was() {
    if !tools::privileged() {
        return;
    }
    for driver in [DriverKind::Auto, DriverKind::Overlay] {
        let open = Rig { driver, ..Rig::new() }.open();
        let layer = open.register(&tar(1), None).unwrap();
        let dir = open.store().root().join(format!("layers/{}", layer.info().layer));
        let file = ["fs/d/1", "layer.tar"].map(|name| dir.join(name)).into_iter().find(|file| file.exists()).unwrap();
        for damage in ["content 2", "longer than before", ""] {
            fs::write(&file, damage).unwrap();
            assert_eq!(kind(open.export(&layer)), ErrorKind::DataLoss, "{damage:?}");
        }
        fs::remove_file(&file).unwrap();
        assert_eq!(kind(open.export(&layer)), ErrorKind::DataLoss);
    }
}

#[test]
fn e24_the_driver_is_told() {
    let open = Rig { driver: DriverKind::Native, ..Rig::new() }.open();
    assert_eq!(open.layers.driver(), "native (copies)");
}

#[test]
fn changes_are_listed_as_docker_does_and_become_a_layer() {
    if !tools::privileged() {
        return;
    }
    let base = archive(&[
        Member::dir("etc"),
        Member::file("etc/kept", "kept"),
        Member::file("etc/changed", "old"),
        Member::file("etc/gone", "gone"),
        Member::dir("dir"),
        Member::file("dir/in", "in"),
    ]);
    for driver in [DriverKind::Auto, DriverKind::Overlay, DriverKind::Native] {
        let mut open = Rig { driver, ..Rig::new() }.open();
        let parent = open.register(&base, None).unwrap();
        let made = rw(&open, "c", Some(parent.chain_id()));
        assert!(open.layers.changes(&made).unwrap().is_empty());
        let mounted = open.layers.mount_rw(&made, Attach::Detached).unwrap();
        let root = path_of(&mounted.root());
        fs::write(root.join("etc/changed"), "new").unwrap();
        fs::remove_file(root.join("etc/gone")).unwrap();
        fs::remove_dir_all(root.join("dir")).unwrap();
        fs::create_dir(root.join("added")).unwrap();
        fs::write(root.join("added/file"), "x").unwrap();
        let expected = [
            (ChangeKind::Added, "/added"),
            (ChangeKind::Added, "/added/file"),
            (ChangeKind::Deleted, "/dir"),
            (ChangeKind::Modified, "/etc"),
            (ChangeKind::Modified, "/etc/changed"),
            (ChangeKind::Deleted, "/etc/gone"),
        ];
        let list = || -> Vec<(ChangeKind, String)> {
            let changes = open.layers.changes(&made).unwrap();
            changes.iter().map(|change| (change.kind, change.path.to_string())).collect()
        };
        let listed = list();
        assert_eq!(
            listed.iter().map(|(kind, path)| (*kind, path.as_str())).collect::<Vec<_>>(),
            expected,
            "while mounted"
        );
        assert_eq!(kind(open.layers.commit_rw(&made, &open.transfer())), ErrorKind::Busy);
        mounted.unmount().unwrap();
        assert_eq!(list(), listed);

        let committed = open.layers.commit_rw(&made, &open.transfer()).unwrap();
        assert_eq!(committed.info().parent, Some(parent.chain_id()));
        let tar = open.export(&committed).unwrap();
        assert_eq!(diff_id(&tar), committed.info().diff_id);
        let other = rw(&open, "other", Some(committed.chain_id()));
        let mounted = open.layers.mount_rw(&other, Attach::Detached).unwrap();
        let found = ["etc/kept", "etc/changed", "etc/gone", "dir/in", "added/file"].map(|path| read(&mounted, path));
        let expected = [Some("kept"), Some("new"), None, None, Some("x")].map(|text| text.map(str::to_owned));
        assert_eq!(found, expected);
        mounted.unmount().unwrap();
        // The writable layer is as it was.
        assert_eq!(list(), listed);
        open.layers.release_rw(made).unwrap();
        open.layers.release_rw(other).unwrap();
        assert_eq!(open.layers.release(committed).unwrap().len(), 1);
        open.collect();
        assert_eq!(open.counts(), (1, 0));
    }
}

#[test]
fn a_chain_of_the_deepest_kind_is_mounted() {
    if !tools::privileged() {
        return;
    }
    let open = Rig::new().open();
    let tars: Vec<Vec<u8>> = (0..130).map(|n| archive(&[Member::file(format!("{n}"), n.to_string())])).collect();
    let deepest = open.chain(&tars);
    assert_eq!(deepest.info().depth, 130, "more than Docker's 125");
    let made = rw(&open, "c", Some(deepest.chain_id()));
    let mounted = open.layers.mount_rw(&made, Attach::Detached).unwrap();
    assert_eq!((read(&mounted, "0").as_deref(), read(&mounted, "129").as_deref()), (Some("0"), Some("129")));
    mounted.unmount().unwrap();
    assert_eq!(open.layers.release_rw(made).unwrap().len(), 0);
    assert_eq!(open.layers.release(deepest).unwrap().len(), 130);
}

#[test]
fn layers_are_found_by_the_beginning_of_their_chain_id() {
    if !tools::privileged() {
        return;
    }
    let open = Rig::new().open();
    let one = open.register(&tar(1), None).unwrap();
    let hex = one.chain_id().hex();
    for wanted in [hex.as_str(), &hex[..12], &hex[..2], &one.chain_id().to_string(), &format!("sha256:{}", &hex[..9])] {
        assert_eq!(open.layers.find(wanted).unwrap(), one.chain_id(), "{wanted}");
    }
    for wanted in ["", &hex[..1], "zz", "sha256:", &ChainId::from_bytes([0; 32]).to_string()] {
        assert_eq!(kind(open.layers.find(wanted)), ErrorKind::NotFound, "{wanted}");
    }
}
