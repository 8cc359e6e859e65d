//! Merges and diffs as records: which are made and found again, the laws that follow from "a merge is a list of layers",
//! and that none of it costs files. (What they show: `merge_diff_cases.rs`.)

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::io::{self, Read};
use std::sync::Arc;
use std::time::Instant;

use common::Op::{Dir, File};
use common::{Cache, Rig, Tree, assert_idle, assert_sound, inodes_below, layers_count, tree, tree_after};
use plies_archive::tar::EntryPath;
use plies_cache::{
    BlobRow, CacheError, ImmutableRef, Parents, Provider, Providers, RecordOptions, State, UNCOMPRESSED,
};
use plies_oci::{BlobDigest, Descriptor, MediaType};
use plies_store::{Cancel, DriverKind, GcMode};
use plies_testkit::tar::{Member, archive};

fn by(name: &str) -> RecordOptions {
    RecordOptions::by(name)
}

/// With every driver where this process may mount.
fn each_driver(test: impl Fn(&Rig)) {
    let kinds: &[DriverKind] = if rustix::process::geteuid().is_root() {
        &[DriverKind::Auto, DriverKind::Overlay, DriverKind::Native]
    } else {
        eprintln!("SKIPPED with overlay: needs root, to mount overlays");
        &[DriverKind::Native]
    };
    for kind in kinds {
        eprintln!("driver: {kind:?}");
        let rig = Rig::with_driver(*kind);
        test(&rig);
        rig.assert_no_warnings();
    }
}

fn owners(held: &ImmutableRef) -> Vec<plies_cache::RecordId> {
    held.row().unwrap().parents.ids()
}

// --- which records are made ---

#[test]
fn a44_a46_none_one_and_flat_inputs() {
    let rig = Rig::new();
    let cache = rig.open();
    assert!(cache.merge(&[], &by("me")).unwrap().is_none());
    assert!(cache.merge(&[None, None], &by("me")).unwrap().is_none());
    let a = cache.layer(None, &[File("A", "")]);
    let b = cache.layer(None, &[File("B", "")]);
    let c = cache.layer(None, &[File("C", "")]);
    let named =
        RecordOptions { description: Some("not taken".into()), image_refs: vec!["nor this".into()], ..by("me") };
    let one = cache.merge(&[None, Some(&a), None], &named).unwrap().unwrap();
    assert_eq!(one.id(), a.id());
    let row = a.row().unwrap();
    assert_eq!((row.description.as_str(), row.image_refs.len()), ("", 0));

    let ab = cache.merged(&[&a, &b]);
    let abc = cache.merged(&[&ab, &c]);
    assert_eq!(owners(&abc), [a.id(), b.id(), c.id()]);
    // One merge alone is that merge, and one record however often it is named.
    assert_eq!(cache.merged(&[&ab]).id(), ab.id());
    assert_eq!(cache.merged(&[&a, &a, &a]).id(), a.id());
    drop(one);
    let held: usize = cache.manager.held().iter().map(|(_, holders)| holders.len()).sum();
    assert_eq!(held, 5, "inputs are held by nobody but the caller");
    assert_sound(&cache);
}

#[test]
fn a44_merging_is_associative_and_keeps_the_uppermost_of_what_is_repeated() {
    let rig = Rig::new();
    let cache = rig.open();
    let [a, b, c] = ["a", "b", "c"].map(|name| cache.finalized(None, &[File("f", name), File(name, "")]));
    let left = cache.merged(&[&cache.merged(&[&a, &b]), &c]);
    let right = cache.merged(&[&a, &cache.merged(&[&b, &c])]);
    assert_eq!(left.id(), right.id());
    let repeated = cache.merged(&[&c, &a, &c, &b, &a, &b, &c]);
    assert_eq!(owners(&repeated), [a.id(), b.id(), c.id()]);
    assert_eq!(repeated.id(), left.id());
    let other_order = cache.merged(&[&c, &b, &a]);
    assert_ne!(other_order.id(), left.id());
    assert_eq!(tree(&other_order)["f"], "file \"a\" 644");
    assert_eq!(tree(&left)["f"], "file \"c\" 644");
    assert_sound(&cache);
}

#[test]
fn equal_merges_and_diffs_are_found_again_also_after_a_restart() {
    let rig = Rig::new();
    let cache = rig.open();
    let a = cache.finalized(None, &[File("A", "")]);
    let b = cache.finalized(None, &[File("B", "")]);
    let a2 = cache.finalized(Some(&a), &[File("A2", "")]);
    let options = |name: &str| RecordOptions { image_refs: vec![name.into()], ..by("me") };
    let first = cache.merge(&[Some(&a), Some(&b)], &options("one")).unwrap().unwrap();
    let diff = cache.diffed(&a, &a2).id();
    let (ids, merge) = ([a.id(), b.id(), a2.id()], first.id());
    drop((first, a, b, a2));
    cache.close();
    let cache = rig.open();
    let [a, b, a2] = ids.map(|id| cache.get(id, &by("me")).unwrap());
    let again = cache.merge(&[Some(&a), Some(&b)], &options("two")).unwrap().unwrap();
    assert_eq!(again.id(), merge);
    assert_eq!(again.row().unwrap().image_refs, ["one", "two"]);
    assert_eq!(cache.diffed(&a, &a2).id(), diff);
    // Once removed, it is made anew.
    drop(again);
    cache.remove(&[merge]).unwrap();
    let anew = cache.merged(&[&a, &b]);
    assert_ne!(anew.id(), merge);
    assert_eq!(cache.merged(&[&a, &b]).id(), anew.id());
    assert_sound(&cache);
}

struct Named(&'static str);

impl Provider for Named {
    fn open(&self, _: &BlobRow) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(io::Cursor::new(archive(&[Member::file("f", self.0)]))))
    }
}

fn remote(text: &'static str) -> (Descriptor, Providers) {
    let bytes = archive(&[Member::file("f", text)]);
    let digest = BlobDigest::of(&bytes);
    let mut descriptor = Descriptor::new(MediaType::ImageLayer, digest, bytes.len() as u64);
    descriptor.annotations.insert(UNCOMPRESSED.into(), digest.to_string());
    (descriptor, Providers::one(digest, Arc::new(Named(text))))
}

#[test]
fn a45_providers_of_all_inputs_are_brought_together_and_errors_hold_nothing() {
    let rig = Rig::new();
    let cache = rig.open();
    let lazy = |text| {
        let (descriptor, providers) = remote(text);
        cache.get_by_blob(&descriptor, None, &RecordOptions { providers, ..by("me") }).unwrap()
    };
    let (a, b) = (lazy("a"), lazy("b"));
    let merge = cache.merged(&[&a, &b]);
    for digest in [remote("a").0.digest, remote("b").0.digest] {
        assert!(merge.providers().get(digest).is_some());
    }
    assert!(merge.is_lazy().unwrap() && layers_count(&cache) == 0, "nothing was fetched for it");
    let id = b.id();
    drop(merge);
    drop(b);
    let b = {
        let (_, providers) = remote("b");
        cache.get(id, &RecordOptions { providers, ..by("me") }).unwrap()
    };
    cache.spoil(id);
    assert!(matches!(cache.merge(&[Some(&a), Some(&b)], &by("me")).unwrap_err(), CacheError::Damaged { .. }));
    drop((a, b));
    assert_idle(&cache);
}

#[test]
fn a47_a_merge_finalizes_its_inputs_makes_no_snapshot_and_reloads() {
    let rig = Rig::new();
    let cache = rig.open();
    let a = cache.layer(None, &[File("A", "")]);
    let b = cache.layer(None, &[File("B", "")]);
    let options = RecordOptions { description: Some("both".into()), ..by("me") };
    let merge = cache.merge(&[Some(&a), Some(&b)], &options).unwrap().unwrap();
    for input in [&a, &b] {
        assert!(matches!(input.row().unwrap().state, State::Sealed { .. }));
    }
    let row = merge.row().unwrap();
    assert_eq!((row.state, row.snapshot, row.description.as_str()), (State::Composed, None, "both"));
    assert_eq!(row.parents, Parents::Merge(vec![a.id(), b.id()]));
    // It keeps its inputs, and they do not keep it.
    let (ids, id) = ([a.id(), b.id()], merge.id());
    drop((a, b, merge));
    assert!(matches!(cache.remove(&ids).unwrap_err(), CacheError::HasChildren { child, .. } if child == id));
    cache.store.gc(GcMode::Run).unwrap();
    assert_eq!(tree(&cache.get(id, &by("me")).unwrap()).len(), 2);
    cache.remove(&[id]).unwrap();
    cache.remove(&ids).unwrap();
    assert_sound(&cache);
}

#[test]
fn a48_a_diff_needs_a_lower_and_no_upper() {
    let rig = Rig::new();
    let cache = rig.open();
    let a = cache.layer(None, &[File("A", "")]);
    assert!(matches!(cache.diff(None, Some(&a), &by("me")).unwrap_err(), CacheError::NoLower));
    let nothing = cache.diff(Some(&a), None, &by("me")).unwrap();
    assert_eq!(nothing.row().unwrap().parents, Parents::Diff { lower: a.id(), upper: None });
    assert_sound(&cache);
}

#[test]
fn a49_a50_layers_in_between_are_a_merge_of_described_diffs() {
    let rig = Rig::new();
    let cache = rig.open();
    let a = cache.finalized(None, &[File("A", "")]);
    let b = cache.finalized(Some(&a), &[File("B", "")]);
    let c = cache.finalized(Some(&b), &[File("C", "")]);
    let options = RecordOptions { description: Some("not taken".into()), ..by("me") };
    let diff = cache.diff(Some(&a), Some(&c), &options).unwrap();
    let row = diff.row().unwrap();
    assert_eq!(row.description, "");
    let Parents::Merge(singles) = row.parents else { panic!() };
    let single = |at: usize| cache.must(singles[at]);
    assert_eq!(single(0).parents, Parents::Diff { lower: a.id(), upper: Some(b.id()) });
    assert_eq!(single(0).description, format!("diff \"{}\" -> \"{}\"", a.id(), b.id()));
    assert_eq!(single(1).parents, Parents::Diff { lower: b.id(), upper: Some(c.id()) });
    assert_eq!(tree(&diff), tree_after(&[File("B", ""), File("C", "")]));
    // Nothing was computed: the layers are those that were there.
    assert_eq!(diff.layers(&Cancel::new()).unwrap(), c.layers(&Cancel::new()).unwrap()[1..]);
    assert_eq!(layers_count(&cache), 3);
    // A layer that stands on nothing is used itself.
    let other = cache.finalized(None, &[File("O", "")]);
    let merge = cache.merged(&[&a, &b, &other]);
    let diff = cache.diffed(&cache.merged(&[&a, &b]), &merge);
    assert_eq!(diff.id(), other.id());
    assert_sound(&cache);
}

#[test]
fn a51_one_layer_apart_is_one_diff_that_shows_that_layer() {
    let rig = Rig::new();
    let cache = rig.open();
    let a = cache.layer(None, &[File("A", "")]);
    let b = cache.layer(Some(&a), &[File("B", "")]);
    let options = RecordOptions { description: Some("mine".into()), ..by("me") };
    let diff = cache.diff(Some(&a), Some(&b), &options).unwrap();
    let row = diff.row().unwrap();
    assert_eq!(row.parents, Parents::Diff { lower: a.id(), upper: Some(b.id()) });
    assert_eq!((row.state, row.description.as_str()), (State::Composed, "mine"));
    assert!(matches!(b.row().unwrap().state, State::Sealed { .. }));
    assert_eq!(tree(&diff), tree_after(&[File("B", "")]));
    assert_eq!(diff.layers(&Cancel::new()).unwrap(), b.layers(&Cancel::new()).unwrap()[1..]);
    assert_sound(&cache);
}

#[test]
fn a_merge_copies_and_links_nothing() {
    each_driver(|rig| {
        let cache = rig.open();
        let inputs: Vec<_> = (0..10)
            .map(|n| {
                let work = cache.create(None, &by("me")).unwrap();
                let mounted = work.mount(plies_store::Attach::Detached).unwrap();
                let root = common::path_of(&mounted.root());
                (0..200).for_each(|f| std::fs::write(root.join(format!("{n}-{f}")), "x").unwrap());
                mounted.unmount().unwrap();
                let made = work.commit().unwrap();
                made.finalize().unwrap();
                made
            })
            .collect();
        let layers_dir = cache.store.root().join("layers");
        let before = (inodes_below(&layers_dir), sizes(&cache), layers_count(&cache));
        let began = Instant::now();
        let merge = cache.merged(&inputs.iter().collect::<Vec<_>>());
        merge.extract(&Cancel::new()).unwrap();
        eprintln!("merge of 10 layers: {:?}", began.elapsed());
        // (The explicit roots need no fix-up: they are all the same.)
        assert_eq!((inodes_below(&layers_dir), sizes(&cache), layers_count(&cache)), before);
        assert_eq!(tree(&merge).len(), 2000);
        assert_eq!((inodes_below(&layers_dir), sizes(&cache), layers_count(&cache)), before);
    });
}

fn sizes(cache: &Cache) -> u64 {
    // The database's file grows by pages as it likes.
    let usage = cache.store.usage().unwrap();
    usage.iter().filter(|row| row.kind != plies_store::UsageKind::Catalogue).map(|row| row.size_bytes).sum()
}

#[test]
fn a_copy_onto_tmp_leaves_its_mode_alone() {
    each_driver(|rig| {
        let cache = rig.open();
        let base = cache.finalized(None, &[Dir("tmp", 0o1777), Dir("etc", 0o750)]);
        let work = cache.create(None, &by("copy --link")).unwrap();
        common::write(&work, &[File("tmp/f", "f"), File("etc/g", "g")]);
        let on_the_way = ["tmp", "etc"].map(|path| EntryPath::clean(path.as_bytes()).unwrap());
        let copied = work.seal(&on_the_way, None).unwrap();
        let expected: Tree =
            tree_after(&[Dir("tmp", 0o1777), Dir("etc", 0o750), File("tmp/f", "f"), File("etc/g", "g")]);
        let merge = cache.merged(&[&base, &copied]);
        assert_eq!(tree(&merge), expected);
        // The same over something that stands on it, and with another input between.
        let above = cache.finalized(Some(&merge), &[File("h", "")]);
        assert_eq!(tree(&above)["tmp"], "dir 1777");
        let between = cache.finalized(None, &[File("between", "")]);
        assert_eq!(tree(&cache.merged(&[&base, &between, &copied]))["tmp"], "dir 1777");
        assert_sound(&cache);
    });
}

#[test]
fn a_layer_that_is_here_is_found_by_its_diff_id_under_every_name_and_past_damaged_rows() {
    let rig = Rig::new();
    let cache = rig.open();
    let (descriptor, providers) = remote("x");
    let lazy = cache.get_by_blob(&descriptor, None, &RecordOptions { providers, ..by("me") }).unwrap();
    tree(&lazy);
    let diff_id = lazy.row().unwrap().blob.unwrap().diff_id;
    let get = |name: &str| {
        let options = RecordOptions { image_refs: vec![name.into()], ..by("me") };
        cache.get_by_diff_id(diff_id, None, &options).unwrap().unwrap()
    };
    assert_eq!(get("first").id(), lazy.id());
    assert_eq!(get("second").row().unwrap().image_refs, ["first", "second"]);
    let damaged = lazy.id();
    drop(lazy);
    cache.spoil(damaged);
    let other = get("third");
    assert_ne!(other.id(), damaged, "one bad row is no reason for others to fail");
    assert_eq!(tree(&other), tree_after(&[File("f", "x")]));
    assert_eq!(layers_count(&cache), 1);
}

#[test]
fn layers_are_kept_once_whatever_they_stand_on() {
    // Two chains with the same layer on top of different bases: BuildKit would have it twice.
    let rig = Rig::new();
    let cache = rig.open();
    let (below_a, below_b, above) = (remote("a"), remote("b"), remote("above"));
    let get = |(descriptor, providers): &(Descriptor, Providers), parent: Option<&ImmutableRef>| {
        cache.get_by_blob(descriptor, parent, &RecordOptions { providers: providers.clone(), ..by("me") }).unwrap()
    };
    let on_a = get(&above, Some(&get(&below_a, None)));
    assert_eq!(tree(&on_a), tree_after(&[File("f", "above")]));
    assert_eq!(layers_count(&cache), 2);
    let on_b = get(&above, Some(&get(&below_b, None)));
    assert_ne!(on_a.id(), on_b.id());
    assert!(matches!(on_b.row().unwrap().state, State::Sealed { layer: Some(_) }), "found by its diff ID");
    tree(&on_b);
    assert_eq!(layers_count(&cache), 3);
    assert_eq!(on_a.layers(&Cancel::new()).unwrap()[1], on_b.layers(&Cancel::new()).unwrap()[1]);
    assert_sound(&cache);
}

#[test]
fn many_layers_are_merged_and_mounted() {
    let rig = Rig::new();
    let cache = rig.open();
    let mut inputs = Vec::new();
    for n in 0..150 {
        let work = cache.create(None, &by("me")).unwrap();
        let mounted = work.mount(plies_store::Attach::Detached).unwrap();
        std::fs::write(common::path_of(&mounted.root()).join(format!("{n}")), "").unwrap();
        mounted.unmount().unwrap();
        inputs.push(work.commit().unwrap());
    }
    let merge = cache.merged(&inputs.iter().collect::<Vec<_>>());
    assert_eq!(tree(&merge).len(), 150);
    assert_sound(&cache);
}
