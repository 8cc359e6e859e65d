//! Layers that stay the tars that they came as: the driver `erofs`, and the others on what it left.
#![allow(clippy::unwrap_used)] // the exemption for tests does not see their helpers

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use common::{Rig, listing, measure, owner, path_of, privileged, process_lease};
use plies_archive::{Limits, Usage};
use plies_oci::{BlobDigest, ChainId, Compression, DiffId};
use plies_store::fsck::Mender;
use plies_store::progress::Silent;
use plies_store::{
    ActiveOptions, Attach, Cancel, CheckOptions, Depth, DriverKind, GcMode, IdMaps, LayerId, LayerSource, Lease,
    MountOptions, Origin, Store, Taken, Transfer, TransferError, WaitPolicy,
};
use plies_testkit::tar::{Member, archive};

/// A store with the driver `erofs`; none, said aloud, where it cannot be.
fn rig(test: &str) -> Option<Rig> {
    if !privileged(test) {
        return None;
    }
    let rig = Rig::with_driver(DriverKind::Erofs);
    if let Err(error) = Store::open(&rig.root(), rig.options(), WaitPolicy::Fail) {
        eprintln!("SKIPPED {test}: {error}: {:?}", std::error::Error::source(&error));
        return None;
    }
    Some(rig)
}

fn with<T>(lease: &Lease, work: impl FnOnce(&Transfer<'_>) -> T) -> T {
    let (limits, cancel) = (Limits::default(), Cancel::default());
    work(&Transfer { lease, limits: &limits, progress: &Silent, cancel: &cancel })
}

fn diff_id(tar: &[u8]) -> DiffId {
    DiffId::from_bytes(*BlobDigest::of(tar).as_bytes())
}

/// Takes in plain tars as the layers of an image.
fn try_take(lease: &Lease, tars: &[Vec<u8>]) -> Result<Taken, TransferError> {
    let mut parent = None;
    let offers: Vec<LayerSource<'_>> = tars
        .iter()
        .map(|tar| {
            let chain_id = ChainId::extend(parent, diff_id(tar));
            parent = Some(chain_id);
            LayerSource {
                digest: Some(BlobDigest::of(tar)),
                size_bytes: tar.len() as u64,
                compression: Compression::None,
                diff_id: diff_id(tar),
                chain_id,
                origin: Origin::Near,
                open: Box::new(move |at| Ok(Box::new(&tar[usize::try_from(at).unwrap()..]))),
            }
        })
        .collect();
    with(lease, |transfer| transfer.take_layers(&offers, &[]))
}

fn take(lease: &Lease, tars: &[Vec<u8>]) -> Taken {
    try_take(lease, tars).unwrap()
}

fn export(lease: &Lease, layer: LayerId, tar: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    with(lease, |transfer| transfer.write_tar(diff_id(tar), Some(layer), &mut out)).unwrap();
    out
}

fn layer_dir(rig: &Rig, layer: LayerId) -> PathBuf {
    rig.root().join("layers").join(layer.to_string())
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn view(store: &Store, taken: &Taken) -> BTreeMap<String, String> {
    let mounted = store.snapshots().view(taken.snapshot.unwrap(), Attach::Detached).unwrap();
    let lines = listing(mounted.root());
    mounted.unmount().unwrap();
    lines
}

fn findings(store: &Store) -> Vec<(&'static str, String)> {
    let found = store.check(&CheckOptions::deep()).unwrap().found;
    found.into_iter().map(|finding| (finding.code, finding.what)).collect()
}

/// An image with all that a stack decides on.
fn image() -> Vec<Vec<u8>> {
    let base = [
        Member::dir("tmp").mode(0o1777),
        Member::dir("etc"),
        Member::file("etc/kept", "base"),
        Member::file("etc/gone", "base"),
        Member::file("old/a", "base"),
        Member::file("f", "x".repeat(10_000)).owner(1000, 100),
        Member::hard_link("g", "f").owner(1000, 100),
        Member::symlink("l", "etc/kept"),
    ];
    let change = [
        Member::whiteout("etc/gone"),
        Member::file("tmp/x", "implies a directory"),
        Member::file("old/new", "top"),
        Member::opaque("old"),
        Member::file("etc/kept", "top").xattr("user.note", "n"),
    ];
    let needs_base = [Member::hard_link("etc/linked", "f"), Member::file("last", "")];
    vec![archive(&base), archive(&change), archive(&needs_base)]
}

#[test]
fn privileged_a_layer_stays_its_tar_and_shows_what_a_directory_would() {
    let Some(rig) = rig("packed") else { return };
    let tars = image();
    let store = rig.open();
    assert!(store.driver().starts_with("erofs"), "{}", store.driver());
    let lease = process_lease(&store);
    let taken = take(&lease, &tars);
    for (layer, tar) in taken.layers.iter().zip(&tars).take(2) {
        let dir = layer_dir(&rig, *layer);
        assert_eq!(names(&dir), ["index", "layer.erofs", "layer.json", "layer.tar"]);
        assert!(fs::read(dir.join("layer.tar")).unwrap() == *tar);
        assert!(export(&lease, *layer, tar) == *tar);
        let files = ["layer.tar", "layer.erofs"].map(|name| fs::metadata(dir.join(name)).unwrap().blocks() * 512);
        let usage = store.layers().info(*layer).unwrap().usage;
        assert_eq!(usage.size_bytes, files.iter().sum::<u64>());
        let tree = store.layers().root(*layer).unwrap();
        let Usage { inodes, content_bytes, .. } = measure(&path_of(&tree));
        assert_eq!((usage.inodes, usage.content_bytes), (inodes, content_bytes));
    }
    assert_eq!(names(&layer_dir(&rig, taken.layers[2])), ["fs", "index", "layer.json"], "it needs what is below it");
    let shown = view(&store, &taken);
    assert_eq!(findings(&store), []);
    // All is of one device, and only hard links are the same file.
    let mounted = store.snapshots().view(taken.snapshot.unwrap(), Attach::Detached).unwrap();
    let root = path_of(&mounted.root());
    let device = fs::metadata(&root).unwrap().dev();
    let mut files: BTreeMap<u64, Vec<&str>> = BTreeMap::new();
    for name in shown.keys() {
        let meta = fs::symlink_metadata(root.join(name)).unwrap();
        assert_eq!(meta.dev(), device, "{name}");
        files.entry(meta.ino()).or_default().push(name);
    }
    files.retain(|_, names| names.len() > 1);
    assert_eq!(files.into_values().collect::<Vec<_>>(), [["etc/linked", "f"]], "what the last layer copied up");
    mounted.unmount().unwrap();

    let plain = Rig::with_driver(DriverKind::Overlay);
    let other = plain.open();
    let other_lease = process_lease(&other);
    assert_eq!(view(&other, &take(&other_lease, &tars)), shown);
    rig.assert_no_warnings();
}

#[test]
fn privileged_every_driver_serves_what_another_made() {
    let Some(mut rig) = rig("mixed") else { return };
    let (tars, owner) = (image(), owner("mixed"));
    let (first, shown) = {
        let store = rig.open();
        let lease = process_lease(&store);
        let taken = take(&lease, &tars);
        store.write(|tx| tx.hold(&owner, taken.snapshot.unwrap())).unwrap();
        let shown = view(&store, &taken);
        (taken, shown)
    };
    for driver in [DriverKind::Overlay, DriverKind::Native, DriverKind::Erofs] {
        rig.driver = driver;
        let store = rig.open();
        let lease = process_lease(&store);
        assert_eq!(view(&store, &first), shown, "{driver:?}");
        assert_eq!(take(&lease, &tars).layers, first.layers, "nothing is made again");
        let more = [tars[0].clone(), archive(&[Member::file("by", format!("{driver:?}"))])];
        let mixed = take(&lease, &more);
        let is_packed = layer_dir(&rig, mixed.layers[1]).join("layer.tar").exists();
        assert_eq!(is_packed, driver == DriverKind::Erofs);
        assert!(view(&store, &mixed).contains_key("by"));
        rig.assert_no_warnings();
    }
}

#[test]
fn privileged_steps_write_over_packed_layers_and_see_mapped_owners() {
    let Some(rig) = rig("upper") else { return };
    let store = rig.open();
    let lease = process_lease(&store);
    let taken = take(&lease, &image()[..2]);
    let snapshots = store.snapshots();
    let active = snapshots.prepare(taken.snapshot, &lease, ActiveOptions { volatile: true }).unwrap();
    let mounted = snapshots.mount_active(active, Attach::Detached).unwrap();
    let root = path_of(&mounted.root());
    fs::write(root.join("etc/kept"), "changed").unwrap();
    fs::remove_file(root.join("f")).unwrap();
    fs::rename(root.join("g"), root.join("tmp/g")).unwrap();
    mounted.unmount().unwrap();
    let sealed = snapshots.seal(active, &lease).unwrap();
    let stack: Vec<LayerId> = taken.layers.iter().copied().chain([sealed]).collect();
    let snapshot = snapshots.ensure(&stack, &lease).unwrap();
    let shown = view(&store, &Taken { snapshot: Some(snapshot), ..taken.clone() });
    assert!(shown["etc/kept"].starts_with("file \"changed\""));
    assert_eq!((shown.contains_key("f"), shown.contains_key("g")), (false, false));
    assert!(shown["tmp/g"].contains(" 1000:100"), "{}", shown["tmp/g"]);
    assert!(shown["tmp"].contains("1777"));

    let map = |text: &str| vec![text.parse().unwrap()];
    let ids = IdMaps::new(map("0:100000:65536"), map("0:200000:65536")).unwrap();
    let active = snapshots.prepare(taken.snapshot, &lease, ActiveOptions { volatile: false }).unwrap();
    let options = MountOptions { ids: Some(&ids), ..MountOptions::default() };
    let mounted = snapshots.mount_active_with(active, options, Attach::Detached).unwrap();
    let meta = fs::metadata(path_of(&mounted.root()).join("f")).unwrap();
    assert_eq!((meta.uid(), meta.gid()), (101_000, 200_100));
    mounted.unmount().unwrap();
    rig.assert_no_warnings();
}

#[test]
fn privileged_more_layers_than_the_kernel_stacks_are_squashed() {
    let Some(rig) = rig("deep") else { return };
    let store = rig.open();
    let lease = process_lease(&store);
    let tars: Vec<Vec<u8>> = (0..520)
        .map(|n| archive(&[Member::dir("d"), Member::file(format!("d/{n}"), ""), Member::file("last", n.to_string())]))
        .collect();
    let taken = take(&lease, &tars);
    let shown = view(&store, &taken);
    assert_eq!(shown.keys().filter(|name| name.starts_with("d/")).count(), 520);
    assert!(shown["last"].starts_with("file \"519\""));
}

#[test]
fn privileged_what_breaks_off_leaves_nothing_and_what_nobody_holds_goes() {
    let Some(rig) = rig("gone") else { return };
    let store = rig.open();
    let layers = rig.root().join("layers");
    let lease = process_lease(&store);
    let whole = image().remove(0);
    for (what, tar) in
        [("cut", whole[..whole.len() - 2000].to_vec()), ("refused", archive(&[Member::file(".wh.x", "with content")]))]
    {
        try_take(&lease, &[tar]).expect_err(what);
        assert_eq!(names(&layers), ["stage"], "{what}");
        assert_eq!(names(&layers.join("stage")), [""; 0], "{what}");
    }
    let taken = take(&lease, &[whole]);
    assert_eq!(names(&layers).len(), 2);
    // Whatever is mounted, the names go at once, and the bytes with the last user.
    let mounted = store.snapshots().view(taken.snapshot.unwrap(), Attach::Detached).unwrap();
    lease.release().unwrap();
    store.gc(GcMode::Run).unwrap();
    assert_eq!(fs::read_to_string(path_of(&mounted.root()).join("etc/kept")).unwrap(), "base");
    mounted.unmount().unwrap();
    store.gc(GcMode::Run).unwrap();
    assert_eq!(names(&layers), ["stage"]);
}

#[test]
fn privileged_damage_is_found_and_repaired_from_the_blob_or_the_tar() {
    let Some(rig) = rig("fsck") else { return };
    let store = rig.open();
    let lease = process_lease(&store);
    let tar = image().remove(0);
    let taken = take(&lease, std::slice::from_ref(&tar));
    let dir = layer_dir(&rig, taken.layers[0]);
    let shown = view(&store, &taken);
    let flip = |name: &str, at: usize| {
        let path = dir.join(name);
        let mut bytes = fs::read(&path).unwrap();
        bytes[at] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let damages: [(&str, &dyn Fn()); 5] = [
        ("layer-tree-damaged", &|| flip("layer.tar", 1030)),
        ("layer-tree-damaged", &|| flip("layer.erofs", 1700)),
        ("layer-tree-missing", &|| fs::remove_file(dir.join("layer.erofs")).unwrap()),
        ("layer-tree-missing", &|| fs::remove_file(dir.join("layer.tar")).unwrap()),
        ("layer-index-wrong", &|| fs::write(dir.join("index"), b"\x01\x00").unwrap()),
    ];
    for (at, (code, damage)) in damages.into_iter().enumerate() {
        damage();
        let found = findings(&store);
        assert_eq!(found.iter().map(|(code, _)| *code).collect::<Vec<_>>(), [code], "{found:?}");
        let options = CheckOptions::deep();
        let mut mender = Mender::new(&store, &options, &at.to_string()).unwrap();
        let mended = mender.mend(store.check(&options).unwrap().found).unwrap();
        assert_eq!(mended.len(), 1, "{code}");
        mender.finish().unwrap();
        assert_eq!(findings(&store), [], "{code}");
        assert_eq!(view(&store, &taken), shown, "{code}");
        assert!(export(&lease, taken.layers[0], &tar) == tar, "{code}");
    }
    flip("layer.tar", 1030);
    let found = store.check(&CheckOptions::new(Depth::Graph)).unwrap().found;
    assert_eq!(found.len(), 0, "only a deep check reads tars");
}
