//! Getting, making, committing and releasing records. The numbers are those of the list of behaviours: A for BuildKit's
//! cache manager of 2022, B for that of 2017.

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use common::Op::{Dir, File};
use common::{
    Cache, RECORDS, Rig, assert_idle, assert_sound, holds_of, layers_count, tree, tree_after, tree_of_mutable, unknown,
    write,
};
use plies_cache::{
    BlobRow, CacheError, ImmutableRef, Manager, Parents, Provider, Providers, RecordId, RecordOptions, RecordType,
    State, UNCOMPRESSED, UseRow,
};
use plies_oci::{BlobDigest, Descriptor, ErrorKind, MediaType};
use plies_store::{Attach, Cancel, GcMode, Resource};
use plies_testkit::tar::{Member, archive};

fn by(name: &str) -> RecordOptions {
    RecordOptions::by(name)
}

fn retained() -> RecordOptions {
    RecordOptions { retain: Some(true), ..by("retained") }
}

fn quiet() -> RecordOptions {
    RecordOptions { keep_last_used: true, ..by("quiet") }
}

fn active_of(cache: &Cache, id: RecordId) -> plies_store::ActiveId {
    match cache.must(id).state {
        State::Mutable { active, .. } | State::Shared { active, .. } => active,
        other => panic!("{other:?}"),
    }
}

fn is_sealed(held: &ImmutableRef) -> bool {
    matches!(held.row().unwrap().state, State::Sealed { .. })
}

struct Bytes(Vec<u8>);

impl Provider for Bytes {
    fn open(&self, _: &BlobRow) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(io::Cursor::new(self.0.clone())))
    }
}

/// A layer that only a provider has.
fn remote(file: &str) -> (Descriptor, Providers) {
    let bytes = archive(&[Member::file(file, "remote")]);
    let digest = BlobDigest::of(&bytes);
    let mut descriptor = Descriptor::new(MediaType::ImageLayer, digest, bytes.len() as u64);
    descriptor.annotations.insert(UNCOMPRESSED.into(), digest.to_string());
    (descriptor, Providers::one(digest, Arc::new(Bytes(bytes))))
}

fn lazy(cache: &Cache, file: &str, parent: Option<&ImmutableRef>) -> ImmutableRef {
    let (descriptor, providers) = remote(file);
    cache.get_by_blob(&descriptor, parent, &RecordOptions { providers, ..by("lazy") }).unwrap()
}

// --- errors, options, opening ---

#[test]
fn a01_b01_errors_name_the_record_and_are_matched_by_kind() {
    let rig = Rig::new();
    let cache = rig.open();
    let error = cache.get(unknown(), &by("me")).unwrap_err();
    assert!(error.is_not_found() && !error.is_locked());
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert!(error.to_string().contains(&unknown().to_string()), "{error}");

    let work = cache.create(None, &by("the writer")).unwrap();
    let error = cache.get(work.id(), &by("me")).unwrap_err();
    assert!(error.is_locked() && !error.is_not_found());
    assert_eq!(error.kind(), ErrorKind::Busy);
    let text = error.to_string();
    assert!(text.contains(&work.id().to_string()) && text.contains("the writer"), "{text}");

    let made = work.commit().unwrap();
    let error = cache.get_mutable(made.id(), &by("me")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    assert!(error.to_string().contains(&made.id().to_string()), "{error}");
}

#[test]
fn a02_b02_b03_one_manager_gives_both_roles() {
    let rig = Rig::new();
    let cache = rig.open();
    let other = cache.manager.accessor();
    let _controller = cache.manager.controller();
    let made = cache.layer(None, &[]);
    assert_eq!(other.get(made.id(), &by("other role")).unwrap().id(), made.id());
    // Without a name, the holder is the place in the code.
    let unnamed = other.get(made.id(), &RecordOptions::default()).unwrap();
    assert!(unnamed.holder().to_string().contains("refs.rs:"), "{}", unnamed.holder());
    assert!(format!("{unnamed:?}").contains("refs.rs:"));
}

#[test]
fn a04_opening_loads_nothing_and_needs_no_row_to_be_sound() {
    let rig = Rig::new();
    let cache = rig.open();
    let id = cache.finalized(None, &[]).id();
    cache.spoil(id);
    cache.close();
    let cache = rig.open();
    assert!(cache.ids().contains(&id));
    assert_idle(&cache);
}

#[test]
fn a06_b04_a_row_that_does_not_decode_is_the_trouble_of_its_record_alone() {
    let rig = Rig::new();
    let cache = rig.open();
    let bad = cache.finalized(None, &[File("bad", "")]);
    let good = cache.finalized(None, &[File("good", "")]);
    let above = cache.finalized(Some(&bad), &[File("above", "")]);
    let ids = [bad.id(), good.id(), above.id()];
    drop((bad, good, above));
    cache.spoil(ids[0]);
    cache.close();

    let cache = rig.open();
    let error = cache.get(ids[0], &by("me")).unwrap_err();
    assert!(matches!(&error, CacheError::Damaged { id, .. } if *id == ids[0]), "{error:?}");
    assert_eq!(error.kind(), ErrorKind::DataLoss);
    let error = cache.get(ids[2], &by("me")).unwrap_err();
    assert!(matches!(&error, CacheError::Damaged { id, .. } if *id == ids[2]), "{error:?}");
    assert_eq!(tree(&cache.get(ids[1], &by("me")).unwrap()), tree_after(&[File("good", "")]));
    assert_idle(&cache);
    // What cannot be read can be removed, after what stands on it, with all that it held.
    let error = cache.remove(&[ids[0]]).unwrap_err();
    assert!(matches!(error, CacheError::HasChildren { child, .. } if child == ids[2]), "{error:?}");
    assert_ne!(holds_of(&cache, ids[0]), []);
    cache.remove(&[ids[0], ids[2]]).unwrap();
    assert_eq!(holds_of(&cache, ids[0]), []);
    assert!(cache.get(ids[0], &by("me")).unwrap_err().is_not_found());
    assert_sound(&cache);
}

#[test]
fn a06_a_row_of_a_later_version_is_refused_and_stays() {
    let rig = Rig::new();
    let cache = rig.open();
    let id = cache.finalized(None, &[]).id();
    cache.put_newer(id);
    let error = cache.get(id, &by("me")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error:?}");
    cache.close();
    let cache = rig.open();
    assert!(cache.ids().contains(&id));
}

#[test]
fn a07_b16_close_writes_down_what_was_gathered() {
    let rig = Rig::new();
    let cache = rig.open();
    let id = cache.finalized(None, &[]).id();
    rig.advance(Duration::from_secs(5));
    cache.get(id, &by("me")).unwrap().release().unwrap();
    let now = rig.now();
    cache.close();
    let cache = rig.open();
    assert_eq!(cache.uses(id), UseRow { last_used_at: Some(now), count: 2 });
    rig.assert_no_warnings();
}

// --- get ---

#[test]
fn a22_a_quiet_ref_is_no_use() {
    let rig = Rig::new();
    let cache = rig.open();
    let work = cache.create(None, &quiet()).unwrap();
    let made = work.commit().unwrap();
    made.finalize().unwrap();
    let id = made.id();
    made.release().unwrap();
    cache.get(id, &quiet()).unwrap().release().unwrap();
    cache.close();
    let cache = rig.open();
    assert_eq!(cache.uses(id), UseRow::default());
    rig.advance(Duration::from_secs(60));
    // Each release counts, also that of a clone, and the last one says when.
    let first = cache.get(id, &by("me")).unwrap();
    let second = first.clone();
    first.release().unwrap();
    rig.advance(Duration::from_secs(60));
    second.release().unwrap();
    let now = rig.now();
    cache.close();
    assert_eq!(rig.open().uses(id), UseRow { last_used_at: Some(now), count: 2 });
}

#[test]
fn a23_b09_get_of_a_mutable_in_use_is_locked_at_once() {
    let rig = Rig::new();
    let cache = rig.open();
    let work = cache.create(None, &by("builder 7")).unwrap();
    let CacheError::Locked { id, holder } = cache.get(work.id(), &by("me")).unwrap_err() else { panic!() };
    assert_eq!((id, holder.to_string().as_str()), (work.id(), "builder 7"));
    let error = cache.get_mutable(work.id(), &by("me")).unwrap_err();
    assert!(matches!(&error, CacheError::Locked { holder, .. } if holder.to_string() == "builder 7"), "{error:?}");
    // Nothing was changed by asking.
    work.commit().unwrap();
}

#[test]
fn a23_get_of_an_idle_mutable_commits_it_once() {
    let rig = Rig::new();
    let cache = rig.open();
    let work = cache.create(None, &retained()).unwrap();
    write(&work, &[File("f", "text")]);
    let mutable = work.id();
    work.release().unwrap();

    let first = cache.get(mutable, &by("me")).unwrap();
    assert_ne!(first.id(), mutable);
    assert_eq!(cache.must(first.id()).state, State::Shared { mutable, active: active_of(&cache, mutable) });
    let again = cache.get(mutable, &by("me")).unwrap();
    assert_eq!(first.id(), again.id());
    drop((first, again));
    // It stays so while nobody holds it.
    let later = cache.get(mutable, &by("me")).unwrap();
    assert_eq!(tree(&later), tree_after(&[File("f", "text")]));
    assert_sound(&cache);
}

#[test]
fn a25_what_was_removed_is_not_found_nor_is_its_partner() {
    let rig = Rig::new();
    let cache = rig.open();
    let made = cache.create(None, &retained()).unwrap().commit().unwrap();
    let State::Shared { mutable, .. } = cache.must(made.id()).state else { panic!() };
    let immutable = made.id();
    assert!(cache.remove(&[immutable]).unwrap_err().is_locked());
    assert!(cache.remove(&[mutable]).unwrap_err().is_locked(), "its partner is held");
    drop(made);
    cache.remove(&[immutable]).unwrap();
    for id in [immutable, mutable] {
        assert!(cache.get(id, &by("me")).unwrap_err().is_not_found());
        assert!(cache.get_mutable(id, &by("me")).unwrap_err().is_not_found());
        assert!(cache.remove(&[id]).unwrap_err().is_not_found());
    }
    assert_sound(&cache);
    assert_idle(&cache);
}

#[test]
fn a26_no_row_is_not_found_and_a_missing_parent_is_damage() {
    let rig = Rig::new();
    let cache = rig.open();
    assert!(cache.get(unknown(), &by("me")).unwrap_err().is_not_found());
    let below = cache.finalized(None, &[File("below", "")]);
    let above = cache.finalized(Some(&below), &[File("above", "")]);
    let ((below, _), (above, _)) = ((below.id(), drop(below)), (above.id(), drop(above)));
    cache.store.write(|tx| tx.remove(&RECORDS, &below)).unwrap();
    let error = cache.get(above, &by("me")).unwrap_err();
    assert!(matches!(&error, CacheError::Damaged { id, what } if *id == above && what.contains(&below.to_string())));
    assert!(matches!(cache.merge(&[], &by("me")), Ok(None)));
    assert_idle(&cache);
    cache.remove(&[above]).unwrap();
}

#[test]
fn a27_b06_a_pair_that_is_retained_is_a_pair_again_after_a_restart() {
    let rig = Rig::new();
    let cache = rig.open();
    let base = cache.finalized(None, &[File("base", "")]);
    let work = cache.create(Some(&base), &retained()).unwrap();
    write(&work, &[File("f", "text")]);
    let mutable = work.id();
    let made = work.commit().unwrap();
    let immutable = made.id();
    drop((made, base));
    cache.close();

    let cache = rig.open();
    assert_sound(&cache);
    let made = cache.get(mutable, &by("me")).unwrap();
    assert_eq!(made.id(), immutable);
    assert!(cache.get_mutable(mutable, &by("me")).unwrap_err().is_locked());
    drop(made);
    let made = cache.get(immutable, &by("me")).unwrap();
    assert_eq!(cache.must(immutable).parents, cache.must(mutable).parents);
    assert_eq!(tree(&made), tree_after(&[File("base", ""), File("f", "text")]));
    assert!(cache.row(mutable).is_none(), "a tree is mounted of what was finalized");
    assert_sound(&cache);
}

#[test]
fn a28_a_pair_whose_files_are_gone_is_cleared() {
    let rig = Rig::new();
    let cache = rig.open();
    let made = cache.create(None, &retained()).unwrap().commit().unwrap();
    let immutable = made.id();
    let State::Shared { mutable, active } = cache.must(immutable).state else { panic!() };
    drop(made);
    cache
        .store
        .write(|tx| {
            tx.remove(&RECORDS, &mutable)?;
            tx.remove(&common::ACTIVES, &active)?;
            tx.unhold_all(&common::owner(mutable))?;
            tx.unhold_all(&common::owner(immutable)).map(drop)
        })
        .unwrap();
    cache.store.gc(GcMode::Run).unwrap();
    cache.close();
    let cache = rig.open();
    assert!(cache.get(immutable, &by("me")).unwrap_err().is_not_found());
    assert!(cache.row(immutable).is_none());
    assert_sound(&cache);
    assert_idle(&cache);
}

#[test]
fn a29_a_pair_that_lost_its_mutable_row_goes_on_with_its_files() {
    for spoiled in [false, true] {
        let rig = Rig::new();
        let cache = rig.open();
        let work = cache.create(None, &retained()).unwrap();
        write(&work, &[File("f", "text")]);
        let mutable = work.id();
        let made = work.commit().unwrap();
        let immutable = made.id();
        drop(made);
        if spoiled {
            cache.spoil(mutable);
        } else {
            cache.store.write(|tx| tx.remove(&RECORDS, &mutable)).unwrap();
        }
        cache.close();
        let cache = rig.open();
        cache.get(immutable, &by("me")).unwrap().release().unwrap();
        let made = cache.get(immutable, &by("me")).unwrap();
        made.finalize().unwrap();
        assert_eq!(tree(&made), tree_after(&[File("f", "text")]));
        assert!(cache.row(mutable).is_none());
        drop(made);
        cache.close();
        let cache = rig.open();
        assert!(is_sealed(&cache.get(immutable, &by("me")).unwrap()));
    }
}

#[test]
fn a30_another_error_of_the_mutable_is_returned() {
    let rig = Rig::new();
    let cache = rig.open();
    let made = cache.create(None, &retained()).unwrap().commit().unwrap();
    let immutable = made.id();
    let State::Shared { mutable, .. } = cache.must(immutable).state else { panic!() };
    drop(made);
    cache.put_newer(mutable);
    let error = cache.get(immutable, &by("me")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition, "{error:?}");
    assert!(cache.row(immutable).is_some(), "nothing was removed for it");
    assert_idle(&cache);
}

#[test]
fn a31_merges_and_diffs_are_immutable_after_a_restart() {
    let rig = Rig::new();
    let cache = rig.open();
    let (one, two) = (cache.finalized(None, &[File("1", "")]), cache.finalized(None, &[File("2", "")]));
    let above = cache.finalized(Some(&one), &[File("3", "")]);
    let (merge, diff) = (cache.merged(&[&one, &two]), cache.diffed(&one, &above));
    let ids = [merge.id(), diff.id()];
    drop((one, two, above, merge, diff));
    cache.close();
    let cache = rig.open();
    for id in ids {
        assert!(!cache.get(id, &by("me")).unwrap().row().unwrap().is_mutable());
        let error = cache.get_mutable(id, &by("me")).unwrap_err();
        assert!(matches!(error, CacheError::WrongKind { .. }), "{error:?}");
    }
    assert_sound(&cache);
}

#[test]
fn a32_a_removal_is_all_or_nothing() {
    let rig = Rig::new();
    let cache = rig.open();
    let one = cache.finalized(None, &[File("1", "")]).id();
    let two = cache.finalized(None, &[File("2", "")]).id();
    let busy = cache.finalized(None, &[File("3", "")]);
    assert!(cache.remove(&[one, two, busy.id()]).unwrap_err().is_locked());
    assert!(cache.remove(&[one, two, unknown()]).unwrap_err().is_not_found());
    assert_eq!(cache.ids().len(), 3);
    // Those that were already looked at can be had again.
    drop(busy);
    drop(cache.get(one, &by("me")).unwrap());
    cache.remove(&[one, two, one]).unwrap();
    cache.close();
    let cache = rig.open();
    assert!(cache.get(one, &by("me")).unwrap_err().is_not_found());
    assert_sound(&cache);
    let before = layers_count(&cache);
    cache.store.gc(GcMode::Run).unwrap();
    assert_eq!((before, layers_count(&cache)), (3, 1));
}

#[test]
fn a33_b07_a_mutable_whose_files_are_gone_is_removed() {
    let rig = Rig::new();
    let cache = rig.open();
    let kept = cache.create(None, &retained()).unwrap();
    let (kept_id, active) = (kept.id(), active_of(&cache, kept.id()));
    kept.release().unwrap();
    cache.store.write(|tx| tx.unhold_all(&common::owner(kept_id))).unwrap();
    assert_eq!(holds_of(&cache, kept_id), []);
    cache.store.gc(GcMode::Run).unwrap();
    assert!(cache.store.snapshots().active(active).is_err());
    assert!(cache.get_mutable(kept_id, &by("me")).unwrap_err().is_not_found());
    assert!(cache.row(kept_id).is_none());
    assert_sound(&cache);
    assert_idle(&cache);
}

#[test]
fn a34_get_adds_image_refs_and_changes_nothing_else() {
    let rig = Rig::new();
    let cache = rig.open();
    let made = cache.finalized(None, &[]);
    let before = cache.must(made.id());
    rig.advance(Duration::from_secs(9));
    let options = |refs: &[&str]| RecordOptions {
        image_refs: refs.iter().map(|name| (*name).to_owned()).collect(),
        description: Some("another".into()),
        record_type: Some(RecordType::Internal),
        created_at: Some(rig.now()),
        retain: Some(true),
        ..by("me")
    };
    drop(cache.get(made.id(), &options(&["b", "a"])).unwrap());
    // Also while it is held and known to be ready, each once.
    drop(cache.get(made.id(), &options(&["a", "c"])).unwrap());
    let after = cache.must(made.id());
    assert_eq!(after.image_refs, ["b", "a", "c"]);
    assert_eq!(plies_cache::RecordRow { image_refs: Vec::new(), ..after }, before);
}

#[test]
fn a34_image_refs_are_bounded_and_the_newest_stay() {
    let rig = Rig::new();
    let cache = rig.open();
    let made = cache.finalized(None, &[]);
    for n in 0..70 {
        drop(cache.get(made.id(), &RecordOptions { image_refs: vec![format!("name {n}")], ..by("me") }).unwrap());
    }
    let refs = cache.must(made.id()).image_refs;
    assert_eq!((refs.len(), refs.first().unwrap().as_str()), (64, "name 6"));
}

#[test]
fn a35_a_get_that_fails_holds_nothing_and_a_later_one_can_succeed() {
    let rig = Rig::new();
    let cache = rig.open();
    let below = lazy(&cache, "below", None);
    let above = lazy(&cache, "above", Some(&below));
    let id = above.id();
    let providers = above.providers().clone();
    drop((below, above));
    for _ in 0..2 {
        let CacheError::NeedsProviders(missing) = cache.get(id, &by("me")).unwrap_err() else { panic!() };
        assert_eq!(missing.len(), 2);
        assert_idle(&cache);
    }
    let held = cache.get(id, &RecordOptions { providers, ..by("me") }).unwrap();
    assert_eq!(tree(&held), tree_after(&[File("below", "remote"), File("above", "remote")]));
    assert_sound(&cache);
}

#[test]
fn a36_parents_are_kept_in_order() {
    let rig = Rig::new();
    let cache = rig.open();
    let made: Vec<_> = ["1", "2", "3"].map(|name| cache.finalized(None, &[File(name, "")])).into();
    let above = cache.finalized(Some(&made[0]), &[]);
    assert_eq!(above.row().unwrap().parents, Parents::Layer(made[0].id()));
    let merge = cache.merged(&[&made[2], &made[0], &made[1]]);
    assert_eq!(merge.row().unwrap().parents.ids(), [made[2].id(), made[0].id(), made[1].id()]);
    let diff = cache.diffed(&made[1], &made[0]);
    assert_eq!(diff.row().unwrap().parents.ids(), [made[1].id(), made[0].id()]);
    let nothing = cache.diff(Some(&made[1]), None, &by("me")).unwrap();
    assert_eq!(nothing.row().unwrap().parents, Parents::Diff { lower: made[1].id(), upper: None });
}

#[test]
fn a37_b08_options_reach_parents_and_nothing_of_them_is_left_held() {
    let rig = Rig::new();
    let cache = rig.open();
    let below = lazy(&cache, "below", None);
    let (descriptor, providers) = remote("above");
    let above = cache.get_by_blob(&descriptor, Some(&below), &RecordOptions { providers, ..by("me") }).unwrap();
    let (below_id, id, providers) = (below.id(), above.id(), above.providers().clone());
    drop((below, above));
    cache.close();
    let cache = rig.open();
    let before = (cache.uses(below_id), cache.uses(id));
    // Its providers serve the parents; being used as a parent is no use.
    let held = cache.get(id, &RecordOptions { providers, ..quiet() }).unwrap();
    assert_eq!(tree(&held).len(), 2);
    held.release().unwrap();
    assert_idle(&cache);
    cache.close();
    let cache = rig.open();
    assert_eq!((cache.uses(below_id), cache.uses(id)), before);
}

// --- create and get_mutable ---

#[test]
fn a38_b10_create_finalizes_and_extracts_the_parent_and_leaks_no_hold_of_it() {
    let rig = Rig::new();
    let cache = rig.open();
    let parent = cache.layer(None, &[File("p", "")]);
    assert!(!is_sealed(&parent));
    let work = cache.create(Some(&parent), &by("me")).unwrap();
    assert!(is_sealed(&parent));
    assert!(parent.row().unwrap().snapshot.is_some());
    // The ref is the caller's; the record stands on the parent without one.
    let id = parent.id();
    parent.release().unwrap();
    assert_eq!(cache.manager.held().len(), 1);
    assert!(matches!(cache.remove(&[id]).unwrap_err(), CacheError::HasChildren { .. }));
    assert_eq!(tree_of_mutable(&work), tree_after(&[File("p", "")]));
    drop(work);

    let parent = lazy(&cache, "gone", None);
    let id = parent.id();
    drop(parent);
    cache.store.write(|tx| tx.remove(&RECORDS, &id)).unwrap();
    assert!(cache.get(id, &by("me")).is_err());
    assert_idle(&cache);
}

#[test]
fn a39_a40_a_create_that_fails_leaves_no_record_no_lease_and_no_directory() {
    struct Broken;
    impl Provider for Broken {
        fn open(&self, _: &BlobRow) -> io::Result<Box<dyn Read + Send>> {
            Err(io::Error::other("the network is down"))
        }
    }
    let rig = Rig::new();
    let cache = rig.open();
    let (descriptor, _) = remote("f");
    let providers = Providers::one(descriptor.digest, Arc::new(Broken));
    let parent = cache.get_by_blob(&descriptor, None, &RecordOptions { providers, ..by("me") }).unwrap();
    let error = cache.create(Some(&parent), &by("me")).unwrap_err();
    let mut chain = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(error) = source {
        chain.push_str(&error.to_string());
        source = error.source();
    }
    assert!(chain.contains("the network is down"), "{chain}");
    assert_eq!(cache.ids().len(), 1);
    assert_eq!(cache.store.leases().unwrap(), []);
    assert_eq!(fs::read_dir(cache.store.root().join("active")).unwrap().count(), 0);
    parent.release().unwrap();
    assert_idle(&cache);
    assert_sound(&cache);
}

#[test]
fn a41_a_new_record_is_mutable_held_once_and_inherits_providers() {
    let rig = Rig::new();
    let cache = rig.open();
    let parent = lazy(&cache, "f", None);
    let options = RecordOptions {
        description: Some("step 1".into()),
        record_type: Some(RecordType::CacheMount),
        image_refs: vec!["name".into()],
        ..retained()
    };
    let work = cache.create(Some(&parent), &options).unwrap();
    let row = work.row().unwrap();
    assert!(row.is_mutable() && row.retain && !row.pinned);
    assert_eq!((row.description.as_str(), row.record_type), ("step 1", RecordType::CacheMount));
    assert_eq!((row.parents, row.image_refs.as_slice()), (Parents::Layer(parent.id()), &["name".to_owned()][..]));
    assert_eq!(holds_of(&cache, work.id()).len(), 1);
    let id = work.id();
    let made = work.commit().unwrap();
    assert_eq!(format!("{:?}", made.providers()), format!("{:?}", parent.providers()));
    // The description goes along, the rest is the mutable record's.
    let row = made.row().unwrap();
    assert_eq!((row.description.as_str(), row.record_type, row.retain), ("step 1", RecordType::Regular, false));
    drop(made);
    assert!(cache.row(id).is_some());
}

#[test]
fn a42_b11_get_mutable_says_why_not() {
    let rig = Rig::new();
    let cache = rig.open();
    assert!(cache.get_mutable(unknown(), &by("me")).unwrap_err().is_not_found());
    // Immutable, whether anybody uses it or not.
    let immutable = cache.finalized(None, &[]);
    let id = immutable.id();
    for held in [Some(immutable), None] {
        let error = cache.get_mutable(id, &by("me")).unwrap_err();
        assert!(matches!(error, CacheError::WrongKind { .. }), "{error:?}");
        drop(held);
    }
    // In use.
    let work = cache.create(None, &retained()).unwrap();
    let mutable = work.id();
    assert!(cache.get_mutable(mutable, &by("me")).unwrap_err().is_locked());
    // Its immutable in use.
    let made = work.commit().unwrap();
    let CacheError::Locked { id, .. } = cache.get_mutable(mutable, &by("me")).unwrap_err() else { panic!() };
    assert_eq!(id, made.id());
    // Of the pair, the immutable is not mutable.
    assert!(matches!(cache.get_mutable(made.id(), &by("me")).unwrap_err(), CacheError::WrongKind { .. }));
    drop(made);
    drop(cache.get_mutable(mutable, &by("me")).unwrap());
    assert_idle(&cache);
}

#[test]
fn a43_get_mutable_undoes_a_lazy_commit() {
    let rig = Rig::new();
    let cache = rig.open();
    let work = cache.create(None, &retained()).unwrap();
    write(&work, &[File("first", "")]);
    let mutable = work.id();
    let made = work.commit().unwrap();
    let immutable = made.id();
    cache.set_value(immutable, "key", "value", Some("index")).unwrap();
    drop(made);
    let work = cache.get_mutable(mutable, &by("me")).unwrap();
    assert!(cache.row(immutable).is_none());
    assert_eq!(cache.search("index").unwrap(), []);
    assert!(cache.get(immutable, &by("me")).unwrap_err().is_not_found());
    assert_sound(&cache);
    // The files are the same, and can be written to again.
    assert_eq!(tree_of_mutable(&work), tree_after(&[File("first", "")]));
    write(&work, &[File("second", "")]);
    let made = work.commit().unwrap();
    assert_ne!(made.id(), immutable);
    assert_eq!(tree(&made), tree_after(&[File("first", ""), File("second", "")]));
    // Finalized now: there is no way back.
    assert!(cache.get_mutable(mutable, &by("me")).unwrap_err().is_not_found());
    assert_sound(&cache);
}

// --- commit, finalize, release ---

#[test]
fn commit_is_lazy_and_finalize_makes_it_a_layer_once() {
    let rig = Rig::new();
    let cache = rig.open();
    let work = cache.create(None, &by("me")).unwrap();
    write(&work, &[File("a", "text"), Dir("d", 0o700)]);
    let mutable = work.id();
    let made = work.commit().unwrap();
    let active = active_of(&cache, made.id());
    assert_eq!(layers_count(&cache), 0);
    assert_eq!(active_of(&cache, mutable), active);
    assert_sound(&cache);
    made.finalize().unwrap();
    made.finalize().unwrap();
    assert_eq!(layers_count(&cache), 1);
    assert!(cache.row(mutable).is_none());
    let expected = tree_after(&[File("a", "text"), Dir("d", 0o700)]);
    assert_eq!(tree(&made), expected);
    let id = made.id();
    made.release().unwrap();
    cache.store.gc(GcMode::Run).unwrap();
    cache.close();
    let cache = rig.open();
    assert_eq!(tree(&cache.get(id, &by("me")).unwrap()), expected);
    assert_sound(&cache);
    rig.assert_no_warnings();
}

#[test]
fn what_was_not_finalized_goes_with_its_last_ref_unless_retained() {
    // (is it retained, what is done with it, which of mutable and immutable are there afterwards)
    type Case = (bool, fn(ImmutableRef), (bool, bool));
    let cases: [Case; 5] = [
        (false, |made| made.release().unwrap(), (false, false)),
        (false, |made| drop((made.clone(), made)), (false, false)),
        (true, |made| made.release().unwrap(), (true, true)),
        (false, |made| made.finalize().unwrap(), (false, true)),
        (false, |made| made.retain().unwrap(), (false, true)),
    ];
    for (at, (retain, done, expected)) in cases.into_iter().enumerate() {
        let rig = Rig::new();
        let cache = rig.open();
        let work = cache.create(None, &RecordOptions { retain: Some(retain), ..by("me") }).unwrap();
        let mutable = work.id();
        let made = work.commit().unwrap();
        let immutable = made.id();
        done(made);
        assert_eq!((cache.row(mutable).is_some(), cache.row(immutable).is_some()), expected, "case {at}");
        assert_sound(&cache);
        assert_idle(&cache);
        cache.close();
        let cache = rig.open();
        assert_eq!((cache.row(mutable).is_some(), cache.row(immutable).is_some()), expected, "case {at}, reopened");
        assert_sound(&cache);
    }
}

#[test]
fn a_mutable_that_is_dropped_goes_with_its_files_unless_retained() {
    for retain in [false, true] {
        let rig = Rig::new();
        let cache = rig.open();
        let work = cache.create(None, &RecordOptions { retain: Some(retain), ..by("me") }).unwrap();
        write(&work, &[File("f", "")]);
        let id = work.id();
        work.release().unwrap();
        assert_eq!(cache.row(id).is_some(), retain);
        cache.store.gc(GcMode::Run).unwrap();
        let dirs = fs::read_dir(cache.store.root().join("active")).unwrap().count();
        assert_eq!(dirs, usize::from(retain));
        if retain {
            cache.close();
            let cache = rig.open();
            let work = cache.get_mutable(id, &by("me")).unwrap();
            assert_eq!(tree_of_mutable(&work), tree_after(&[File("f", "")]));
        }
    }
}

#[test]
fn seal_commits_and_finalizes_in_one() {
    let rig = Rig::new();
    let cache = rig.open();
    let base = cache.finalized(None, &[File("base", "")]);
    let work = cache.create(Some(&base), &RecordOptions { description: Some("d".into()), ..by("me") }).unwrap();
    write(&work, &[File("f", "text")]);
    let mutable = work.id();
    cache.pin(mutable, true).unwrap();
    let made = work.seal(&[], None).unwrap();
    let row = made.row().unwrap();
    assert!(matches!(row.state, State::Sealed { layer: Some(_) }) && row.pinned);
    assert_eq!((row.parents, row.description.as_str()), (Parents::Layer(base.id()), "d"));
    assert!(cache.row(mutable).is_none());
    assert_eq!(tree(&made), tree_after(&[File("base", ""), File("f", "text")]));
    assert_sound(&cache);
}

#[test]
fn a_pin_set_meanwhile_survives_the_commit() {
    let rig = Rig::new();
    let cache = rig.open();
    let work = cache.create(None, &retained()).unwrap();
    cache.pin(work.id(), true).unwrap();
    let mutable = work.id();
    let made = work.commit().unwrap();
    assert!(cache.must(mutable).pinned);
    assert!(cache.pin(unknown(), true).unwrap_err().is_not_found());
    drop(made);
}

#[test]
fn nothing_written_is_no_layer() {
    let rig = Rig::new();
    let cache = rig.open();
    let made = cache.finalized(None, &[]);
    assert_eq!(made.row().unwrap().state, State::Sealed { layer: None });
    assert_eq!(made.extract(&Cancel::new()).unwrap(), None);
    assert_eq!(layers_count(&cache), 0);
    let above = cache.finalized(Some(&made), &[File("f", "")]);
    assert_eq!(tree(&above), tree_after(&[File("f", "")]));
    cache.store.gc(GcMode::Run).unwrap();
    assert_sound(&cache);
}

#[test]
fn what_is_mounted_is_not_finalized_and_can_be_afterwards() {
    let rig = Rig::new();
    let cache = rig.open();
    let work = cache.create(None, &by("me")).unwrap();
    let mounted = work.mount(Attach::Detached).unwrap();
    common::apply(&common::path_of(&mounted.root()), &[File("f", "")]);
    let made = work.commit().unwrap();
    assert_eq!(made.finalize().unwrap_err().kind(), ErrorKind::Busy);
    assert_sound(&cache);
    mounted.unmount().unwrap();
    made.finalize().unwrap();
    assert_eq!(tree(&made), tree_after(&[File("f", "")]));
    assert_sound(&cache);
}

#[test]
fn a_mount_outlives_the_ref_that_it_was_made_from() {
    let rig = Rig::new();
    let cache = rig.open();
    let made = cache.finalized(None, &[File("f", "text")]);
    let id = made.id();
    let mounted = made.mount(Attach::Detached, &Cancel::new()).unwrap().unwrap();
    made.release().unwrap();
    cache.remove(&[id]).unwrap();
    cache.store.gc(GcMode::Run).unwrap();
    assert_eq!(fs::read_to_string(common::path_of(&mounted.root()).join("f")).unwrap(), "text");
    mounted.unmount().unwrap();
    cache.store.gc(GcMode::Run).unwrap();
    assert_eq!(layers_count(&cache), 0);
}

#[test]
fn a_read_only_mount_is_read_only() {
    let rig = Rig::new();
    let cache = rig.open();
    if !cache.store.snapshots().views_can_be_kept() {
        eprintln!("SKIPPED: needs root, to mount overlays");
        return;
    }
    let made = cache.finalized(None, &[File("f", "text")]);
    let mounted = made.mount(Attach::Detached, &Cancel::new()).unwrap().unwrap();
    let error = fs::write(common::path_of(&mounted.root()).join("g"), "").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    mounted.unmount().unwrap();
}

#[test]
fn b05_a_record_that_is_held_is_had_again_without_a_look_at_its_row() {
    let rig = Rig::new();
    let cache = rig.open();
    let id = cache.finalized(None, &[]).id();
    let first = cache.get(id, &by("me")).unwrap();
    cache.spoil(id);
    let second = cache.get(id, &by("me")).unwrap();
    assert_eq!(cache.manager.held()[0].1.len(), 2);
    drop((first, second));
    assert!(cache.get(id, &by("me")).is_err());
}

#[test]
fn b14_b15_a_creation_time_in_the_options_is_taken() {
    let rig = Rig::new();
    let cache = rig.open();
    let long_ago = rig.now();
    rig.advance(Duration::from_secs(100));
    let work = cache.create(None, &RecordOptions { created_at: Some(long_ago), ..by("me") }).unwrap();
    assert_eq!(work.row().unwrap().created_at, long_ago);
    let other = cache.create(None, &by("me")).unwrap();
    assert_eq!(other.row().unwrap().created_at, rig.now());
}

#[test]
fn holders_are_listed_until_they_let_go() {
    let rig = Rig::new();
    let cache = rig.open();
    let work = cache.create(None, &by("a")).unwrap();
    assert_eq!(format!("{:?}", cache.manager.held()[0].1[0]).split(' ').next().unwrap(), "Holder(\"a\"");
    let made = work.commit().unwrap();
    let clone = made.clone();
    let other = cache.get(made.id(), &by("b")).unwrap();
    let held = cache.manager.held();
    let names: Vec<_> = held[0].1.iter().map(ToString::to_string).collect();
    assert_eq!((held.len(), held[0].0, names), (1, made.id(), vec!["a".to_owned(), "a".into(), "b".into()]));
    drop((made, clone, other));
    assert_idle(&cache);
}

#[test]
fn a_dropped_ref_that_cannot_be_released_says_so() {
    // A ref outlives its manager: nothing is lost but the time of its use.
    let rig = Rig::new();
    let cache = rig.open();
    let made = cache.finalized(None, &[]);
    let Cache { manager, accessor, store } = cache;
    manager.close().unwrap();
    drop(accessor);
    made.release().unwrap();
    store.close().unwrap();
    rig.assert_no_warnings();
}

// --- bad input ---

#[test]
fn ids_of_the_wrong_kind_and_unknown_ones_are_refused() {
    let rig = Rig::new();
    let cache = rig.open();
    let work = cache.create(None, &by("me")).unwrap();
    for prefix in ["", "x", "XY", "0123456789abcdef0123456789abcdef0", "ééé"] {
        assert!(cache.find(prefix).unwrap_err().is_not_found(), "{prefix:?}");
    }
    let id = work.id().to_string();
    assert_eq!(cache.find(&id).unwrap(), work.id());
    assert_eq!(cache.find(&id[..20]).unwrap(), work.id());
    assert!(cache.get_by_prefix(&id[..20], &by("me")).unwrap_err().is_locked());
    assert!(cache.set_value(unknown(), "k", "v", None).unwrap_err().is_not_found());
    assert!(cache.remove(&[unknown()]).unwrap_err().is_not_found());
    assert!(cache.remove(&[work.id()]).unwrap_err().is_locked());
    assert_eq!(cache.manager.held().len(), 1);
}

#[test]
fn a_prefix_of_several_ids_is_ambiguous() {
    let rig = Rig::new();
    let cache = rig.open();
    let row = cache.finalized(None, &[]).row().unwrap();
    for last in 0..3 {
        let mut bytes = [0xab; 16];
        bytes[15] = last;
        cache.store.write(|tx| tx.put(&RECORDS, &RecordId::from_bytes(bytes), &row)).unwrap();
    }
    let error = cache.find("abab").unwrap_err();
    assert!(matches!(error, CacheError::Ambiguous { count: 3, .. }), "{error:?}");
    assert_eq!(cache.find(&format!("{}02", "ab".repeat(15))).unwrap().as_bytes()[15], 2);
}

#[test]
fn a_layer_directory_that_vanished_is_an_error_of_its_records_alone() {
    let rig = Rig::new();
    let cache = rig.open();
    let bad = cache.finalized(None, &[File("bad", "")]);
    let good = cache.finalized(None, &[File("good", "")]);
    let State::Sealed { layer: Some(layer) } = bad.row().unwrap().state else { panic!() };
    fs::remove_dir_all(cache.store.root().join("layers").join(layer.to_string())).unwrap();
    let error = bad.mount(Attach::Detached, &Cancel::new()).unwrap_err();
    eprintln!("{error:?}");
    assert!(cache.create(Some(&bad), &by("me")).is_err());
    let merge = cache.merged(&[&bad, &good]);
    assert!(merge.mount(Attach::Detached, &Cancel::new()).is_err());
    assert_eq!(tree(&good), tree_after(&[File("good", "")]));
    let ids = [merge.id(), bad.id()];
    drop((bad, merge));
    cache.remove(&ids).unwrap();
    cache.store.gc(GcMode::Run).unwrap();
    assert_sound(&cache);
}

#[test]
fn a_removed_bad_row_leaves_no_trace_in_what_is_searched() {
    let rig = Rig::new();
    let cache = rig.open();
    let made = lazy(&cache, "f", None);
    let row = made.row().unwrap();
    let (chain, blob_chain) = (row.chain_id.unwrap(), row.blob_chain_id.unwrap());
    let id = made.id();
    drop(made);
    assert_eq!(cache.search_chain(chain).unwrap(), [id]);
    cache.spoil(id);
    // Found, and it says itself what is wrong; whoever wants the blob gets a new record.
    assert_eq!(cache.search_chain(chain).unwrap(), [id]);
    let other = lazy(&cache, "f", None);
    assert_ne!(other.id(), id);
    cache.remove(&[id]).unwrap();
    assert_eq!(cache.search_chain(chain).unwrap(), [other.id()]);
    assert_eq!(cache.search_blob_chain(blob_chain).unwrap(), [other.id()]);
}

#[test]
fn a_bad_row_of_an_unfinished_tree_does_not_stop_the_next_start() {
    let rig = Rig::new();
    let cache = rig.open();
    let work = cache.create(None, &by("me")).unwrap();
    let id = work.id();
    cache.spoil(id);
    // As a process that is killed after its catalogue was synced.
    cache.pin(cache.finalized(None, &[]).id(), true).unwrap();
    std::mem::forget(work);
    let row = cache.ids();
    assert!(row.contains(&id));
    let Cache { manager, accessor, store } = cache;
    std::mem::forget((manager, accessor));
    let root = store.root().to_owned();
    std::mem::forget(store);
    // The lock goes with the process: a copy has none.
    let copy = Rig::new();
    let status = std::process::Command::new("cp").arg("-a").arg(&root).arg(copy.root()).status().unwrap();
    assert!(status.success());
    let cache = copy.open();
    assert!(cache.row(id).is_none());
    cache.manager.accessor();
}

#[test]
fn a_reopened_manager_finds_everything_again() {
    let rig = Rig::new();
    let cache = rig.open();
    let one = cache.finalized(None, &[File("1", "one")]);
    let two = cache.finalized(Some(&one), &[File("2", "two")]);
    let other = cache.finalized(None, &[File("3", "three")]);
    let merge = cache.merged(&[&two, &other]);
    let ids = [one.id(), two.id(), other.id(), merge.id()];
    let trees = [tree(&one), tree(&two), tree(&other), tree(&merge)];
    drop((one, two, other, merge));
    cache.close();
    let cache = rig.open();
    cache.store.gc(GcMode::Run).unwrap();
    for (id, expected) in ids.iter().zip(trees) {
        assert_eq!(tree(&cache.get(*id, &by("me")).unwrap()), expected);
    }
    let held: Vec<Resource> = holds_of(&cache, ids[3]);
    assert!(matches!(held.as_slice(), [Resource::Snapshot(_)]), "{held:?}");
    assert_sound(&cache);
    // Opening it a second time over the same store is possible, too.
    let second = Manager::open(cache.store.clone(), rig.manager_options()).unwrap();
    second.close().unwrap();
    rig.assert_no_warnings();
}
