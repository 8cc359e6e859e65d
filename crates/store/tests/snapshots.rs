//! Layers, snapshots, actives and mounts, with every driver.

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use common::Item::{Dir, File, HardLink, Opaque, Symlink, Whiteout};
use common::{
    Rig, assert_healthy, listing, listing_at, owner, path_of, privileged, process_lease, publish, put_blob, stage_layer,
};
use plies_oci::{ChainId, DiffId, ErrorKind};
use plies_store::{
    ActiveOptions, Attach, DriverKind, GcMode, LayerContents, LayerError, LayerId, Lease, Mounted, OverlayMethod,
    SnapshotError, Store, UsageKind,
};

const VOLATILE: ActiveOptions = ActiveOptions { volatile: true };
const PERSISTENT: ActiveOptions = ActiveOptions { volatile: false };

fn diff_id(n: u8) -> DiffId {
    DiffId::from_bytes([n; 32])
}

fn each_driver(test: impl Fn(&Rig)) {
    for driver in [
        DriverKind::Auto,
        DriverKind::Native,
        DriverKind::Overlay,
        DriverKind::OverlayBy(OverlayMethod::Paths),
        DriverKind::OverlayBy(OverlayMethod::OptionString),
    ] {
        eprintln!("driver: {driver:?}");
        let rig = Rig::with_driver(driver);
        test(&rig);
        rig.assert_no_warnings();
        assert_no_mounts(&rig);
    }
}

fn assert_no_mounts(rig: &Rig) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let dir = rig.dir.path().to_str().unwrap();
    assert!(!table.contains(dir), "left behind:\n{table}");
}

fn tree(mounted: &Mounted) -> BTreeMap<String, String> {
    listing(mounted.root())
}

fn view_of(store: &Store, layers: &[LayerId], lease: &Lease) -> BTreeMap<String, String> {
    let snapshot = store.snapshots().ensure(layers, lease).unwrap();
    let view = store.snapshots().view(snapshot, Attach::Detached).unwrap();
    let lines = tree(&view);
    view.unmount().unwrap();
    lines
}

fn lines(expected: &[(&str, &str)]) -> BTreeMap<String, String> {
    expected.iter().map(|(path, what)| ((*path).to_owned(), format!("{what} 0:0"))).collect()
}

#[test]
fn privileged_a_view_shows_the_layers_one_over_the_other() {
    if !privileged("a_view_shows_the_layers_one_over_the_other") {
        return;
    }
    each_driver(|rig| {
        let store = rig.open();
        let lease = process_lease(&store);
        let base = publish(
            &store,
            &lease,
            &[
                Dir("", 0o755),
                Dir("etc", 0o755),
                File("etc/a", "base"),
                File("etc/b", "base"),
                Dir("gone", 0o700),
                File("gone/x", "x"),
                Dir("full", 0o755),
                File("full/old", "old"),
                Symlink("link", "etc"),
                File("becomes-dir", "file"),
            ],
        );
        let top = publish(
            &store,
            &lease,
            &[
                File("etc/a", "top"),
                Whiteout("etc/b"),
                Whiteout("gone"),
                Dir("full", 0o711),
                Opaque("full"),
                File("full/new", "new"),
                Dir("becomes-dir", 0o755),
                File("one", "same"),
                HardLink("two", "one"),
            ],
        );
        let shown = view_of(&store, &[base, top], &lease);
        assert_eq!(
            shown,
            lines(&[
                ("", "dir 755"),
                ("becomes-dir", "dir 755"),
                ("etc", "dir 755"),
                ("etc/a", "file \"top\" 644"),
                ("full", "dir 711"),
                ("full/new", "file \"new\" 644"),
                ("link", "-> etc 0"),
                ("one", "file \"same\" 644"),
                ("two", "file \"same\" 644"),
            ])
        );
        assert_eq!(view_of(&store, &[base], &lease)["gone/x"], "file \"x\" 644 0:0");
        assert_eq!(view_of(&store, &[], &lease), lines(&[("", "dir 755")]));
        assert_healthy(&store);
    });
}

#[test]
fn privileged_the_tmp_trap_a_layer_that_lists_a_file_only_keeps_the_directory_1777() {
    if !privileged("the_tmp_trap") {
        return;
    }
    each_driver(|rig| {
        let store = rig.open();
        let lease = process_lease(&store);
        let base =
            publish(&store, &lease, &[Dir("", 0o755), Dir("tmp", 0o1777), Dir("var", 0o750), Dir("var/x", 0o711)]);
        let top = publish(&store, &lease, &[File("tmp/x", "x"), File("var/x/y", "y")]);
        let shown = view_of(&store, &[base, top], &lease);
        assert_eq!(shown["tmp"], "dir 1777 0:0");
        assert_eq!(shown["var"], "dir 750 0:0");
        assert_eq!(shown["var/x"], "dir 711 0:0");
        assert_eq!(shown["tmp/x"], "file \"x\" 644 0:0");

        let snapshot = store.snapshots().ensure(&[base, top], &lease).unwrap();
        let info = store.snapshots().info(snapshot).unwrap();
        assert_eq!(info.layers, [base, top], "the fix-up is not one of the layers");
        let fixup = store.layers().info(info.fixup.unwrap()).unwrap();
        assert!(fixup.derived && fixup.diff_id.is_none());
        assert_eq!(
            listing(store.layers().root(fixup.id).unwrap()).keys().collect::<Vec<_>>(),
            ["", "tmp", "var", "var/x"]
        );
        // An active stands on the fixed tree, and its own root looks as it should.
        let active = store.snapshots().prepare(Some(snapshot), &lease, VOLATILE).unwrap();
        let mounted = store.snapshots().mount_active(active, Attach::Detached).unwrap();
        assert_eq!(tree(&mounted)["tmp"], "dir 1777 0:0");
        mounted.unmount().unwrap();
        assert_healthy(&store);
    });
}

#[test]
fn a_stack_that_shows_everything_right_gets_no_fix_up() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let base = publish(&store, &lease, &[Dir("", 0o755), Dir("etc", 0o755), File("etc/a", "a")]);
    let same = publish(&store, &lease, &[File("etc/b", "b")]);
    let snapshot = store.snapshots().ensure(&[base, same], &lease).unwrap();
    assert_eq!(store.snapshots().info(snapshot).unwrap().fixup, None);
    // Nobody sets it explicitly: what the layer has will do.
    let alone = store.snapshots().ensure(&[same], &lease).unwrap();
    assert_eq!(store.snapshots().info(alone).unwrap().fixup, None);
    // An explicit one above an implied one decides anyway.
    let loud = publish(&store, &lease, &[Dir("", 0o755), Dir("etc", 0o700)]);
    let snapshot = store.snapshots().ensure(&[base, same, loud], &lease).unwrap();
    assert_eq!(store.snapshots().info(snapshot).unwrap().fixup, None);
    assert_healthy(&store);
}

#[test]
fn privileged_a_fix_up_does_not_look_through_what_hides_the_lower_directory() {
    if !privileged("a_fix_up_does_not_look_through_what_hides_the_lower_directory") {
        return;
    }
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let base = publish(&store, &lease, &[Dir("", 0o755), Dir("a", 0o700), Dir("a/b", 0o711), Dir("c", 0o700)]);
    let hides = publish(&store, &lease, &[Dir("", 0o755), Dir("a", 0o755), Opaque("a"), Whiteout("c")]);
    let top = publish(&store, &lease, &[File("a/b/f", "f"), File("c/f", "f")]);
    let shown = view_of(&store, &[base, hides, top], &lease);
    assert_eq!((&*shown["a"], &*shown["a/b"], &*shown["c"]), ("dir 755 0:0", "dir 755 0:0", "dir 755 0:0"));
    let snapshot = store.snapshots().ensure(&[base, hides, top], &lease).unwrap();
    assert_eq!(store.snapshots().info(snapshot).unwrap().fixup, None);
}

#[test]
fn privileged_a_directory_that_is_only_emptied_keeps_its_metadata_and_nothing_below_it() {
    if !privileged("a_directory_that_is_only_emptied_keeps_its_metadata_and_nothing_below_it") {
        return;
    }
    each_driver(|rig| {
        let store = rig.open();
        let lease = process_lease(&store);
        let base = publish(&store, &lease, &[Dir("", 0o755), Dir("a", 0o700), Dir("a/b", 0o711), File("a/old", "")]);
        let empties = publish(&store, &lease, &[File("a/new", "new"), Opaque("a")]);
        let top = publish(&store, &lease, &[File("a/b/f", "f")]);
        let shown = view_of(&store, &[base, empties, top], &lease);
        let names: Vec<&str> = shown.keys().map(String::as_str).collect();
        assert_eq!(names, ["", "a", "a/b", "a/b/f", "a/new"]);
        // The lower `a/b` went with what `a` held; the new one is another.
        assert_eq!((&*shown["a"], &*shown["a/b"]), ("dir 700 0:0", "dir 755 0:0"));
        // Below a layer that says how `a` looks nothing counts.
        let says = publish(&store, &lease, &[Dir("a", 0o750), Opaque("a")]);
        let shown = view_of(&store, &[base, says, empties], &lease);
        assert_eq!(shown["a"], "dir 750 0:0");
    });
}

#[test]
fn p05_an_implied_directory_over_a_symlink_needs_its_base() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let base =
        publish(&store, &lease, &[Dir("", 0o755), Dir("usr", 0o755), Dir("usr/lib", 0o755), Symlink("lib", "usr/lib")]);
    let mid = publish(&store, &lease, &[File("etc/x", "x")]);
    let top = publish(&store, &lease, &[File("lib/mod/x", "x")]);
    let over = publish(&store, &lease, &[File("lib/y", "y")]);
    let error = store.snapshots().ensure(&[base, mid, top, over], &lease).unwrap_err();
    let SnapshotError::NeedsBase { layer, path } = &error else { panic!("{error}") };
    assert_eq!((*layer, path.as_bytes()), (top, &b"lib"[..]), "the lowest is named");
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    // A layer that sets the directory itself replaces the link, as everywhere.
    let explicit = publish(&store, &lease, &[Dir("lib", 0o755), File("lib/z", "z")]);
    store.snapshots().ensure(&[base, explicit], &lease).unwrap();
    // And one that removes the link first is at liberty.
    if privileged("p05 with a whiteout") {
        let removes = publish(&store, &lease, &[Whiteout("lib")]);
        store.snapshots().ensure(&[base, removes, top], &lease).unwrap();
    }
    assert_healthy(&store);
}

#[test]
fn the_same_list_is_the_same_snapshot_and_repetitions_keep_the_uppermost() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let layer = |text: &'static str| publish(&store, &lease, &[Dir("", 0o755), File("f", text)]);
    let (a, b, c) = (layer("a"), layer("b"), layer("c"));
    let snapshots = store.snapshots();
    let id = snapshots.ensure(&[a, b, c], &lease).unwrap();
    assert_eq!(snapshots.ensure(&[a, b, c], &lease).unwrap(), id);
    assert_eq!(snapshots.ensure(&[b, a, b, b, c], &lease).unwrap(), id);
    assert_ne!(snapshots.ensure(&[b, a, c], &lease).unwrap(), id);
    assert_eq!(snapshots.info(id).unwrap().layers, [a, b, c]);
    let absent: LayerId = "00000000000000ff".parse().unwrap();
    assert_eq!(snapshots.ensure(&[a, absent], &lease).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn layers_are_found_by_diff_id_and_published_once() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let stage = |text, n| stage_layer(&store, &[Dir("", 0o755), File("f", text)], n);
    let made = store.layers().publish(&lease, vec![stage("1", Some(diff_id(1))), stage("2", None)]).unwrap();
    let again = store.layers().publish(&lease, vec![stage("1", Some(diff_id(1)))]).unwrap();
    assert_eq!(again, made[..1], "the second pull of a layer yields the first");
    let other = process_lease(&store);
    assert_eq!(store.layers().hold_by_diff_id(diff_id(1), &other).unwrap(), Some(made[0]));
    assert_eq!(store.layers().hold_by_diff_id(diff_id(9), &other).unwrap(), None);
    assert_eq!(other.resources().unwrap(), [made[0].into()]);

    // A sealed layer learns its diff ID later.
    // Two builds may export what they share at the same time.
    std::thread::scope(|threads| {
        let set = || store.layers().set_diff_id(made[1], diff_id(2)).unwrap();
        (0..8).for_each(|_| drop(threads.spawn(set)));
    });
    let error = store.layers().set_diff_id(made[1], diff_id(3)).unwrap_err();
    assert!(matches!(error, LayerError::OtherDiffId { .. }), "{error}");
    assert_eq!(store.layers().hold_by_diff_id(diff_id(2), &lease).unwrap(), Some(made[1]));
    assert_healthy(&store);

    // Layers that are only good in one chain are found by it alone.
    let chain = ChainId::of(&[diff_id(1), diff_id(4)]).unwrap();
    let staged = store.layers().stage().unwrap();
    let contents = LayerContents { diff_id: Some(diff_id(4)), chain_id: Some(chain), ..LayerContents::default() };
    let usage = common::measure(&path_of(&staged.root()));
    let chained = store.layers().publish(&lease, vec![staged.finish(LayerContents { usage, ..contents })]).unwrap()[0];
    assert_eq!(store.layers().hold_by_diff_id(diff_id(4), &lease).unwrap(), None);
    assert_eq!(store.layers().hold_by_chain(chain, &lease).unwrap(), Some(chained));
    assert_healthy(&store);
}

#[test]
fn a_layer_comes_with_its_index_and_tar_split() {
    use std::io::{Read as _, Write as _};
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let id = publish(&store, &lease, &[File("a/b", "x")]);
    let index = store.layers().index(id).unwrap();
    assert_eq!(index.implied().map(|path| path.to_string()).collect::<Vec<_>>(), ["/", "/a"]);
    assert!(store.layers().tar_split(id).unwrap().is_none());

    let mut stage = store.layers().stage().unwrap();
    stage.tar_split_file().unwrap().write_all(b"split").unwrap();
    let usage = common::measure(&path_of(&stage.root()));
    let finished = stage.finish(LayerContents { usage, ..LayerContents::default() });
    let id = store.layers().publish(&lease, vec![finished]).unwrap()[0];
    let mut text = String::new();
    store.layers().tar_split(id).unwrap().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "split");
    assert!(store.layers().info(id).unwrap().has_tar_split);
    assert_healthy(&store);
    fs::remove_dir_all(rig.root().join(format!("layers/{id}/fs"))).unwrap();
    assert_eq!(store.layers().root(id).unwrap_err().kind(), ErrorKind::DataLoss);
}

#[test]
fn stages_that_are_dropped_or_left_leave_nothing() {
    let rig = Rig::new();
    let store = rig.open();
    let count = || fs::read_dir(rig.root().join("layers/stage")).unwrap().count();
    let stage = store.layers().stage().unwrap();
    fs::write(path_of(&stage.root()).join("f"), "x").unwrap();
    assert_eq!(count(), 1);
    drop(stage);
    assert_eq!(count(), 0);
    let lease = process_lease(&store);
    let released = lease.id();
    lease.release().unwrap();
    let lease = store.reopen_lease(released).err();
    assert!(lease.is_some());
    drop(store);
    fs::create_dir_all(rig.root().join("layers/stage/0000000100000001/fs/deep")).unwrap();
    let _store = rig.open();
    assert_eq!(count(), 0);
}

/// What a step writes, in all its variety.
fn write_things(root: &Path) {
    fs::write(root.join("etc/a"), "changed").unwrap();
    fs::remove_file(root.join("etc/b")).unwrap();
    fs::write(root.join("new"), "new").unwrap();
    fs::hard_link(root.join("new"), root.join("new-too")).unwrap();
    fs::remove_dir_all(root.join("gone")).unwrap();
    fs::remove_dir_all(root.join("again")).unwrap();
    fs::create_dir(root.join("again")).unwrap();
    fs::write(root.join("again/fresh"), "fresh").unwrap();
    fs::remove_file(root.join("file")).unwrap();
    fs::create_dir(root.join("file")).unwrap();
    std::os::unix::fs::symlink("new", root.join("link")).unwrap();
    fs::set_permissions(root.join("mode"), fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(root.join("meanwhile"), "").unwrap();
    fs::remove_file(root.join("meanwhile")).unwrap();
}

const BASE: [common::Item; 13] = [
    Dir("", 0o755),
    Dir("etc", 0o755),
    File("etc/a", "a"),
    File("etc/b", "b"),
    File("etc/untouched", "u"),
    Dir("gone", 0o755),
    File("gone/x", "x"),
    Dir("again", 0o755),
    File("again/stale", "stale"),
    File("file", "file"),
    Dir("mode", 0o755),
    File("mode/inside", "i"),
    Dir("quiet", 0o755),
];

#[test]
fn privileged_what_is_written_to_an_active_becomes_a_layer() {
    if !privileged("what_is_written_to_an_active_becomes_a_layer") {
        return;
    }
    let sealed = std::cell::RefCell::new(Vec::new());
    for options in [VOLATILE, PERSISTENT] {
        each_driver(|rig| {
            let store = rig.open();
            let lease = process_lease(&store);
            let base = publish(&store, &lease, &BASE);
            let snapshot = store.snapshots().ensure(&[base], &lease).unwrap();
            let active = store.snapshots().prepare(Some(snapshot), &lease, options).unwrap();
            // Mounted more than once, also when volatile.
            for round in 0..2 {
                let mounted = store.snapshots().mount_active(active, Attach::InStore).unwrap();
                let again = store.snapshots().mount_active(active, Attach::Detached).unwrap_err();
                assert!(matches!(again, SnapshotError::InUse { .. }), "{again}");
                assert!(matches!(store.snapshots().seal(active, &lease), Err(SnapshotError::InUse { .. })));
                if round == 0 {
                    write_things(mounted.path().unwrap());
                } else {
                    assert_eq!(tree(&mounted)["new"], "file \"new\" 644 0:0");
                }
                mounted.unmount().unwrap();
            }
            let measured = store.snapshots().measure(active).unwrap();
            assert!(measured.inodes > 5);
            assert_healthy(&store);
            let before = {
                let mounted = store.snapshots().mount_active(active, Attach::Detached).unwrap();
                tree(&mounted)
            };
            let top = store.snapshots().seal(active, &lease).unwrap();
            assert!(
                matches!(store.snapshots().seal(active, &lease), Err(SnapshotError::Sealed { layer, .. }) if layer == top)
            );
            assert_eq!(view_of(&store, &[base, top], &lease), before, "the layer shows what the active did");
            sealed.borrow_mut().push(listing(store.layers().root(top).unwrap()));
            assert!(!store.layers().info(top).unwrap().derived);
            assert_healthy(&store);

            lease.release().unwrap();
            store.gc(GcMode::Run).unwrap();
            assert!(store.usage().unwrap().iter().all(|row| matches!(
                row.kind,
                UsageKind::Catalogue | UsageKind::Directories | UsageKind::Reserve | UsageKind::Scratch
            ) || row.count == 0));
            for dir in ["layers", "active", "mounts"] {
                let left: Vec<_> =
                    fs::read_dir(rig.root().join(dir)).unwrap().map(|e| e.unwrap().file_name()).collect();
                assert!(left.iter().all(|name| name == "stage"), "{dir}: {left:?}");
            }
            assert_healthy(&store);
        });
    }
    let sealed = sealed.into_inner();
    for layer in &sealed {
        assert!(
            !layer.contains_key("etc/untouched") && !layer.contains_key("quiet") && !layer.contains_key("meanwhile")
        );
        assert_eq!(layer["etc/b"], "device 0 0 0:0");
    }
    // Overlay marks the remade directory opaque, the comparison hides its names one by one: the same
    // tree said in two ways. Everything else is equal.
    let plain = |layer: &BTreeMap<String, String>| {
        let mut layer = layer.clone();
        layer.remove("again/stale");
        layer
    };
    for layer in &sealed {
        assert_eq!(plain(layer), plain(&sealed[0]));
    }
}

#[test]
fn privileged_a_persistent_active_survives_its_process_and_a_volatile_one_does_not() {
    if !privileged("a_persistent_active_survives_its_process_and_a_volatile_one_does_not") {
        return;
    }
    each_driver(|rig| {
        let (kept, lost) = {
            let store = rig.open();
            let lease = process_lease(&store);
            let base = publish(&store, &lease, &BASE);
            let snapshot = store.snapshots().ensure(&[base], &lease).unwrap();
            let made = [PERSISTENT, VOLATILE].map(|options| {
                let active = store.snapshots().prepare(Some(snapshot), &lease, options).unwrap();
                store.write(|tx| tx.hold(&owner("ref"), active)).unwrap();
                let mounted = store.snapshots().mount_active(active, Attach::Detached).unwrap();
                fs::write(path_of(&mounted.root()).join("written"), "w").unwrap();
                mounted.unmount().unwrap();
                active
            });
            (made[0], made[1])
        };
        let store = rig.open();
        assert!(store.leases().unwrap().is_empty());
        let error = store.snapshots().mount_active(lost, Attach::Detached).unwrap_err();
        assert!(matches!(error, SnapshotError::Stale { .. }), "{error}");
        store.gc(GcMode::Run).unwrap();
        let mounted = store.snapshots().mount_active(kept, Attach::Detached).unwrap();
        assert_eq!(tree(&mounted)["written"], "file \"w\" 644 0:0");
        assert_eq!(tree(&mounted)["etc/a"], "file \"a\" 644 0:0", "its base is kept by it");
        mounted.unmount().unwrap();
        let lease = process_lease(&store);
        store.snapshots().seal(kept, &lease).unwrap();
        assert_healthy(&store);
    });
}

#[test]
fn privileged_an_interrupted_seal_gives_a_persistent_active_back() {
    if !privileged("an_interrupted_seal_gives_a_persistent_active_back") {
        return;
    }
    let rig = Rig::new();
    let (active, layer) = {
        let store = rig.open();
        let lease = process_lease(&store);
        let active = store.snapshots().prepare(None, &lease, PERSISTENT).unwrap();
        store.write(|tx| tx.hold(&owner("ref"), active)).unwrap();
        fs::write(path_of(&store.snapshots().upper(active).unwrap()).join("f"), "mine").unwrap();
        // By hand, what a crash between the rename and the commit leaves.
        const SEALING: plies_store::Table<plies_store::ActiveId, plies_store::LayerId> =
            plies_store::Table::new("sealing");
        let layer: LayerId = "0000000100000999".parse().unwrap();
        store.write(|tx| tx.put(&SEALING, &active, &layer)).unwrap();
        (active, layer)
    };
    for place in [format!("layers/stage/{layer}"), format!("layers/{layer}")] {
        let dir = rig.root().join(&place);
        fs::create_dir(&dir).unwrap();
        fs::rename(rig.root().join(format!("active/{active}/fs")), dir.join("fs")).unwrap();
        let store = rig.open();
        let upper = store.snapshots().upper(active).unwrap();
        assert_eq!(fs::read_to_string(path_of(&upper).join("f")).unwrap(), "mine", "{place}");
        assert!(!dir.exists());
        assert_healthy(&store);
        const SEALING: plies_store::Table<plies_store::ActiveId, plies_store::LayerId> =
            plies_store::Table::new("sealing");
        store.write(|tx| tx.put(&SEALING, &active, &layer)).unwrap();
    }
}

#[test]
fn privileged_mounts_hold_what_they_show() {
    if !privileged("mounts_hold_what_they_show") {
        return;
    }
    each_driver(|rig| {
        let store = rig.open();
        let lease = process_lease(&store);
        let base = publish(&store, &lease, &BASE);
        let snapshot = store.snapshots().ensure(&[base], &lease).unwrap();
        let view = store.snapshots().view(snapshot, Attach::Detached).unwrap();
        lease.release().unwrap();
        assert!(store.gc(GcMode::Run).unwrap().collected.is_empty());
        assert_eq!(tree(&view)["etc/a"], "file \"a\" 644 0:0");
        drop(view);
        assert_eq!(store.gc(GcMode::Run).unwrap().collected.len(), 2);
        let error = store.snapshots().view(snapshot, Attach::Detached).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(store.leases().unwrap().is_empty());
    });
}

#[test]
fn privileged_a_tree_can_be_attached_where_the_caller_wants_it() {
    if !privileged("a_tree_can_be_attached_where_the_caller_wants_it") {
        return;
    }
    each_driver(|rig| {
        let store = rig.open();
        let lease = process_lease(&store);
        let base = publish(&store, &lease, &BASE);
        let snapshot = store.snapshots().ensure(&[base], &lease).unwrap();
        let target = rig.dir.path().join("target");
        fs::create_dir(&target).unwrap();
        let view = store.snapshots().view(snapshot, Attach::At(&target)).unwrap();
        assert_eq!(view.path(), Some(&*target));
        assert_eq!(listing_at(&target)["etc/a"], "file \"a\" 644 0:0");
        assert_eq!(listing_at(&target), tree(&view));
        view.unmount().unwrap();
        assert_eq!(fs::read_dir(&target).unwrap().count(), 0);

        let view = store.snapshots().view(snapshot, Attach::InStore).unwrap();
        let path = view.path().unwrap().to_owned();
        assert_eq!(listing_at(&path)["etc/a"], "file \"a\" 644 0:0");
        if rig.driver != DriverKind::Native {
            assert!(fs::write(path.join("f"), "x").is_err(), "a view is read-only");
        }
        view.unmount().unwrap();
        assert!(!path.exists());
    });
}

#[test]
fn privileged_a_busy_mount_is_reported_and_detached() {
    if !privileged("a_busy_mount_is_reported_and_detached") {
        return;
    }
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let active = store.snapshots().prepare(None, &lease, VOLATILE).unwrap();
    let mounted = store.snapshots().mount_active(active, Attach::InStore).unwrap();
    let user = fs::File::create(mounted.path().unwrap().join("open")).unwrap();
    let error = mounted.unmount().unwrap_err();
    assert!(matches!(error, SnapshotError::MountBusy { .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert_no_mounts(&rig);
    drop(user);
    store.snapshots().seal(active, &lease).unwrap();
}

#[test]
fn privileged_mounts_that_a_process_left_are_ended_at_open() {
    if !privileged("mounts_that_a_process_left_are_ended_at_open") {
        return;
    }
    let rig = Rig::new();
    {
        let store = rig.open();
        let lease = process_lease(&store);
        let base = publish(&store, &lease, &BASE);
        store.write(|tx| tx.hold(&owner("base"), base)).unwrap();
    }
    let left = rig.root().join("mounts/with space");
    fs::create_dir(&left).unwrap();
    rustix::mount::mount("plies", &left, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    fs::create_dir(left.join("on-top")).unwrap();
    rustix::mount::mount("plies", left.join("on-top"), "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    let store = rig.open();
    assert_no_mounts(&rig);
    assert!(!left.exists());
    assert_healthy(&store);
}

fn deep_stack(store: &Store, lease: &Lease, depth: usize) -> Vec<LayerId> {
    let mut finished = Vec::new();
    for n in 0..depth {
        let stage = store.layers().stage().unwrap();
        let root = path_of(&stage.root());
        fs::create_dir(root.join("dir")).unwrap();
        fs::write(root.join(format!("dir/{n}")), n.to_string()).unwrap();
        fs::write(root.join("top"), n.to_string()).unwrap();
        if n >= 2 && n % 10 == 0 {
            let kind = rustix::fs::FileType::CharacterDevice;
            let name = root.join(format!("dir/{}", n - 1));
            rustix::fs::mknodat(rustix::fs::CWD, name, kind, rustix::fs::Mode::empty(), 0).unwrap();
        }
        let usage = common::measure(&root);
        finished.push(stage.finish(LayerContents { usage, ..LayerContents::default() }));
    }
    store.layers().publish(lease, finished).unwrap()
}

#[test]
fn privileged_stacks_of_300_and_601_layers_mount() {
    if !privileged("stacks_of_300_and_601_layers_mount") {
        return;
    }
    for driver in [DriverKind::Overlay, DriverKind::OverlayBy(OverlayMethod::OptionString), DriverKind::Native] {
        let rig = Rig::with_driver(driver);
        let store = rig.open();
        let lease = process_lease(&store);
        let layers = deep_stack(&store, &lease, 605);
        for depth in [300, 601] {
            let shown = view_of(&store, &layers[..depth], &lease);
            assert_eq!(shown["top"], format!("file \"{}\" 644 0:0", depth - 1));
            let expected = (0..depth).filter(|n| *n < 9 || n % 10 != 9 || *n + 1 == depth).count();
            assert_eq!(shown.keys().filter(|path| path.starts_with("dir/")).count(), expected, "{driver:?} {depth}");
        }
        let squashes = |store: &Store| {
            let usage = store.usage().unwrap();
            usage.iter().find(|row| row.kind == UsageKind::Layers).unwrap().count - 605
        };
        let made = squashes(&store);
        assert_eq!(made == 0, driver == DriverKind::Native);
        // A stack that is a little deeper finds the squash of this one.
        let snapshot = store.snapshots().ensure(&layers[..605], &lease).unwrap();
        let active = store.snapshots().prepare(Some(snapshot), &lease, VOLATILE).unwrap();
        let mounted = store.snapshots().mount_active(active, Attach::Detached).unwrap();
        assert_eq!(squashes(&store), made);
        fs::write(path_of(&mounted.root()).join("dir/1"), "written").unwrap();
        mounted.unmount().unwrap();
        let top = store.snapshots().seal(active, &lease).unwrap();
        assert_eq!(listing(store.layers().root(top).unwrap())["dir/1"], "file \"written\" 644 0:0");
        let first = fs::metadata(path_of(&store.layers().root(layers[1]).unwrap()).join("dir/1")).unwrap();
        assert_eq!(first.len(), 1, "a write does not reach through hard links");
        assert_eq!(first.nlink() > 1, driver != DriverKind::Native);
        assert_healthy(&store);
        lease.release().unwrap();
        store.gc(GcMode::Run).unwrap();
        assert!(store.usage().unwrap().iter().all(|row| matches!(
            row.kind,
            UsageKind::Catalogue | UsageKind::Directories | UsageKind::Reserve | UsageKind::Scratch
        ) || row.count == 0));
        assert_healthy(&store);
        rig.assert_no_warnings();
    }
}

#[test]
fn trees_deeper_than_any_path_are_removed() {
    let rig = Rig::new();
    let store = rig.open();
    let stage = store.layers().stage().unwrap();
    // 5,000 levels: more than PATH_MAX allows to name and than there are descriptors.
    let mut dir = rustix::io::fcntl_dupfd_cloexec(stage.root(), 0).unwrap();
    for _ in 0..5000 {
        rustix::fs::mkdirat(&dir, c"d", rustix::fs::Mode::RWXU).unwrap();
        let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        dir = rustix::fs::openat(&dir, c"d", flags, rustix::fs::Mode::empty()).unwrap();
    }
    drop(stage);
    assert_eq!(fs::read_dir(rig.root().join("layers/stage")).unwrap().count(), 0);
    rig.assert_no_warnings();
}

#[test]
fn privileged_c03_native_sees_through_equal_sizes_and_times() {
    if !privileged("c03_native_sees_through_equal_sizes_and_times") {
        return;
    }
    each_driver(|rig| {
        let store = rig.open();
        let lease = process_lease(&store);
        let base = publish(
            &store,
            &lease,
            &[
                Dir("", 0o755),
                Dir("one", 0o755),
                File("one/f", "AAAA"),
                Dir("two", 0o755),
                File("two/f", "BBBB"),
                File("written", "CCCC"),
            ],
        );
        let snapshot = store.snapshots().ensure(&[base], &lease).unwrap();
        let active = store.snapshots().prepare(Some(snapshot), &lease, VOLATILE).unwrap();
        let mounted = store.snapshots().mount_active(active, Attach::Detached).unwrap();
        let root = path_of(&mounted.root());
        let times = rustix::fs::Timestamps { last_access: common::MTIME, last_modification: common::MTIME };
        // A directory swapped for another one, whose file has the same size and time.
        fs::rename(root.join("two/f"), root.join("kept")).unwrap();
        fs::remove_dir(root.join("two")).unwrap();
        fs::create_dir(root.join("two")).unwrap();
        fs::rename(root.join("one/f"), root.join("two/f")).unwrap();
        fs::write(root.join("written"), "DDDD").unwrap();
        for path in ["written", "two"] {
            rustix::fs::utimensat(rustix::fs::CWD, root.join(path), &times, rustix::fs::AtFlags::empty()).unwrap();
        }
        let before = tree(&mounted);
        drop(root);
        mounted.unmount().unwrap();
        let top = store.snapshots().seal(active, &lease).unwrap();
        let after = view_of(&store, &[base, top], &lease);
        assert_eq!(after, before);
        assert_eq!((&*after["two/f"], &*after["written"]), ("file \"AAAA\" 644 0:0", "file \"DDDD\" 644 0:0"));
    });
}

#[test]
fn privileged_a_seal_that_fails_leaves_the_active_usable() {
    if !privileged("a_seal_that_fails_leaves_the_active_usable") {
        return;
    }
    each_driver(|rig| {
        for options in [VOLATILE, PERSISTENT] {
            let store = rig.open();
            let lease = process_lease(&store);
            let active = store.snapshots().prepare(None, &lease, options).unwrap();
            let mounted = store.snapshots().mount_active(active, Attach::Detached).unwrap();
            fs::write(path_of(&mounted.root()).join("f"), "mine").unwrap();
            mounted.unmount().unwrap();
            // A lease that is gone cannot hold what comes of it.
            let gone =
                store.lease(plies_store::LeaseOptions::expiring("short", std::time::Duration::from_secs(1))).unwrap();
            rig.advance(std::time::Duration::from_secs(2));
            let error = store.snapshots().seal(active, &gone).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
            let mounted = store.snapshots().mount_active(active, Attach::Detached).unwrap();
            assert_eq!(tree(&mounted)["f"], "file \"mine\" 644 0:0");
            mounted.unmount().unwrap();
            assert_healthy(&store);
            store.snapshots().seal(active, &lease).unwrap();
            assert_healthy(&store);
        }
    });
}

#[test]
fn privileged_bytes_that_cannot_be_removed_keep_no_others() {
    if !privileged("cannot be removed") {
        return;
    }
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let names = ["1", "2", "3", "4", "5", "6"];
    let blobs = names.map(|name| put_blob(&store, name.as_bytes(), &lease));
    let layers = names.map(|name| publish(&store, &lease, &[File(name, "text")]));
    let (blob_dir, layer_dir) = (rig.root().join("content/blobs/sha256"), rig.root().join("layers"));
    let left = || -> BTreeSet<String> {
        let all = [&blob_dir, &layer_dir].into_iter().flat_map(|dir| fs::read_dir(dir).unwrap());
        all.map(|entry| entry.unwrap().file_name().into_string().unwrap()).filter(|name| name != "stage").collect()
    };
    assert_eq!(left().len(), 12);
    let (blob, layer) = (blobs[1].hex().to_string(), layers[2].to_string());
    let busy = [blob_dir.join(&blob), layer_dir.join(&layer).join("fs/3")];
    for path in &busy {
        rustix::mount::mount_bind(path, path).unwrap();
    }
    lease.release().unwrap();
    let failed = store.gc(GcMode::Run);
    for path in &busy {
        rustix::mount::unmount(path, rustix::mount::UnmountFlags::empty()).unwrap();
    }
    let error = failed.expect_err("somebody's mounts are on them").to_string();
    assert!(error.contains(&blob), "{error}");
    assert_eq!(left(), BTreeSet::from([blob, layer]));
    drop(store);
    let store = rig.open();
    assert_eq!(left(), BTreeSet::new(), "what could not go then goes with the next start");
    assert_healthy(&store);
}
