//! Digests of paths in a record: of what is there, wherever it came from, and kept with the record.

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod common;

use common::Op::{Chmod, Dir, File, Rm};
use common::{Cache, Rig};
use plies_cache::contenthash::{ChecksumOptions, ContentDigest};
use plies_cache::{ImmutableRef, RecordOptions};
use plies_oci::ErrorKind;
use plies_store::{Cancel, DriverKind};

fn drivers() -> Vec<DriverKind> {
    if rustix::process::geteuid().is_root() {
        return vec![DriverKind::Auto, DriverKind::Overlay, DriverKind::Native];
    }
    eprintln!("SKIPPED: needs root, to mount overlays and to keep owners");
    vec![]
}

fn digest(held: &ImmutableRef, path: &str) -> ContentDigest {
    held.checksum(path.as_bytes(), &ChecksumOptions::default(), &Cancel::new()).unwrap()
}

/// The same tree in one layer, and in three with detours.
fn twice(cache: &Cache) -> [ImmutableRef; 2] {
    let straight = cache.finalized(None, &[Dir("d", 0o755), File("d/a", "one"), File("d/b", "two")]);
    let below = cache.finalized(None, &[Dir("d", 0o700), File("d/a", "other"), File("d/c", "gone")]);
    let middle = cache.finalized(Some(&below), &[Rm("d/c"), File("d/b", "two")]);
    let detour = cache.finalized(Some(&middle), &[File("d/a", "one"), Chmod("d", 0o755)]);
    [straight, detour]
}

#[test]
fn privileged_equal_trees_have_equal_digests_whatever_their_layers_and_driver() {
    let mut all = Vec::new();
    for driver in drivers() {
        let rig = Rig::with_driver(driver);
        let cache = rig.open();
        let [straight, detour] = twice(&cache);
        for path in ["d", "/d/", "d/a", "d/b"] {
            assert_eq!(digest(&straight, path), digest(&detour, path), "{driver:?} {path}");
        }
        assert_ne!(digest(&straight, "d/a"), digest(&straight, "d/b"));
        all.push(digest(&straight, "d"));
        let merged = cache.merged(&[&straight, &cache.finalized(None, &[File("e", "e")])]);
        assert_eq!(digest(&merged, "d"), all[0], "the same in a merge");
        let missing = straight.checksum(b"nowhere", &ChecksumOptions::default(), &Cancel::new()).unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::NotFound);
    }
    all.dedup();
    assert!(all.len() <= 1, "{all:?}");
}

#[test]
fn privileged_what_was_hashed_is_not_read_again_also_after_a_restart() {
    for driver in drivers() {
        let rig = Rig::with_driver(driver);
        let cache = rig.open();
        let held = cache.finalized(None, &[Dir("d", 0o755), File("d/a", "one"), File("d/b", "two")]);
        let (id, before) = (held.id(), digest(&held, "d"));
        // The layer's files go, behind the store's back: whoever looked would fail.
        let layers = rig.root().join("layers");
        for entry in std::fs::read_dir(&layers).unwrap() {
            let tree = entry.unwrap().path().join("fs");
            if tree.exists() {
                std::fs::remove_dir_all(tree).unwrap();
            }
        }
        assert_eq!(digest(&held, "d"), before);
        assert_eq!(digest(&held, "d/a"), digest(&held, "d/a"));
        drop(held);
        cache.close();
        let cache = rig.open();
        let held = cache.accessor.get(id, &RecordOptions::by("test")).unwrap();
        assert_eq!(digest(&held, "d"), before, "it is kept with the record");
        assert!(held.checksum(b"d/never-asked", &ChecksumOptions::default(), &Cancel::new()).is_err());
    }
}

#[test]
fn privileged_patterns_wildcards_and_a_cancel() {
    for driver in drivers() {
        let rig = Rig::with_driver(driver);
        let cache = rig.open();
        let held = cache.finalized(None, &[Dir("d", 0o755), File("d/a", "one"), File("d/b", "two")]);
        let without_b = cache.finalized(None, &[Dir("d", 0o755), File("d/a", "one")]);
        let options = ChecksumOptions { exclude: vec!["b".into()], ..ChecksumOptions::default() };
        let of = |held: &ImmutableRef| held.checksum(b"d", &options, &Cancel::new()).unwrap();
        assert_eq!(of(&held), of(&without_b));
        let options = ChecksumOptions { wildcard: true, ..ChecksumOptions::default() };
        let of = |path: &[u8]| held.checksum(path, &options, &Cancel::new());
        assert_eq!(of(b"d/?").unwrap(), of(b"d/*").unwrap());
        assert_eq!(of(b"x*").unwrap_err().kind(), ErrorKind::NotFound);
        let cancel = Cancel::new();
        cancel.cancel();
        let error = held.checksum(b"d/b", &ChecksumOptions::default(), &cancel);
        assert!(error.is_ok() || error.unwrap_err().kind() == ErrorKind::Canceled);
    }
}
