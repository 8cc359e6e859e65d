//! BuildKit's own tests of its cache manager (`cache/manager_test.go`), all 21, as what they ask of a cache: each test is
//! named for what it shows and says which of them it is. Where one is about a mechanism that stacks of layers do not have,
//! the rule that can be observed stands for it. (Rule by rule: the tests with numbers.)

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod blob_rig;
mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read as _, Write as _};
use std::process::Command;

use blob_rig::{Layer, Source, lazy};
use common::Op::{Dir, File, Rm};
use common::{
    Cache, Op, RECORDS, Rig, Tree, assert_idle, assert_sound, layers_count, path_of, tree, tree_after, tree_of_mutable,
    write,
};
use plies_cache::{
    CacheError, Cap, ImmutableRef, LayerFormat, Parents, PruneOptions, RecordId, RecordOptions, Remote, RemoteOptions,
    State, UsageOptions, effective_keep,
};
use plies_oci::{BlobDigest, ChainId, Descriptor, DiffId, ErrorKind};
use plies_store::{Attach, Cancel, Expected, GcMode, LeaseOptions, Store};
use plies_testkit::image::Packing;
use plies_testkit::tar::Member;
use plies_testkit::tools;

const FORMATS: [LayerFormat; 3] = [LayerFormat::Uncompressed, LayerFormat::Gzip, LayerFormat::Zstd];

fn by(name: &str) -> RecordOptions {
    RecordOptions::by(name)
}

fn retained() -> RecordOptions {
    RecordOptions { retain: Some(true), ..by("retained") }
}

/// How many records are in use, and how many are not.
fn usage(cache: &Cache) -> (usize, usize) {
    let records = cache.manager.controller().disk_usage(&UsageOptions::default()).unwrap().records;
    let in_use = records.iter().filter(|record| record.in_use).count();
    (in_use, records.len() - in_use)
}

fn size_bytes(cache: &Cache, id: RecordId) -> u64 {
    let records = cache.manager.controller().disk_usage(&UsageOptions::default()).unwrap().records;
    records.iter().find(|record| record.id == id).unwrap().size_bytes
}

/// How many records went.
fn prune(cache: &Cache) -> usize {
    prune_by(cache, PruneOptions::default())
}

fn prune_all(cache: &Cache) -> usize {
    prune_by(cache, PruneOptions { all: true, ..PruneOptions::default() })
}

fn prune_by(cache: &Cache, options: PruneOptions) -> usize {
    let mut count = 0;
    cache.manager.controller().prune(&[options], &mut |_| count += 1, &Cancel::new()).unwrap();
    count
}

fn blobs(cache: &Cache) -> BTreeSet<BlobDigest> {
    blob_rig::blobs(&cache.store).into_iter().collect()
}

/// Puts a layer's blob into the store, as somebody who had it already.
fn put_blob(store: &Store, layer: &Layer) {
    let lease = store.lease(LeaseOptions::process("test")).unwrap();
    let mut ingest = store.content().ingest_unnamed().unwrap();
    ingest.write_all(&layer.bytes).unwrap();
    assert_eq!(ingest.commit(Expected::anything(), &lease).unwrap(), layer.digest());
    // Nothing is collected before a record holds it.
    lease.release().unwrap();
}

fn forced(compression: LayerFormat) -> RemoteOptions {
    RemoteOptions { compression, force: true, ..RemoteOptions::default() }
}

fn remotes(of: &ImmutableRef, create: bool, options: &RemoteOptions, all: bool) -> Vec<Remote> {
    of.get_remotes(create, options, all, &Cancel::new()).unwrap()
}

/// The one chain that comes out of an export.
fn exported(of: &ImmutableRef, options: &RemoteOptions) -> Remote {
    let mut remotes = remotes(of, true, options, false);
    assert_eq!(remotes.len(), 1);
    remotes.remove(0)
}

fn digests(remote: &Remote) -> Vec<BlobDigest> {
    remote.descriptors.iter().map(|descriptor| descriptor.digest).collect()
}

/// The tar in a blob, which has to be what its descriptor says.
fn tar_of(remote: &Remote, descriptor: &Descriptor) -> Vec<u8> {
    let mut bytes = Vec::new();
    remote.open(descriptor).unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!((BlobDigest::of(&bytes), bytes.len() as u64), (descriptor.digest, descriptor.size_bytes));
    let limits = plies_archive::Limits::default();
    let compression = plies_archive::compress::detect(&bytes);
    let mut tar = Vec::new();
    plies_archive::compress::Decoder::new(&bytes[..], compression, &limits).unwrap().read_to_end(&mut tar).unwrap();
    assert_eq!(descriptor.annotations[plies_cache::UNCOMPRESSED], BlobDigest::of(&tar).to_string());
    tar
}

fn chain(ids: &[DiffId]) -> ChainId {
    ids.iter().fold(None, |chain, id| Some(ChainId::extend(chain, *id))).unwrap()
}

/// `TestSharableMountPoolCleanup`. BuildKit keeps a directory for mounts that several share, and empties it at the start.
#[test]
fn what_a_dead_process_had_mounted_or_begun_is_gone_after_the_next_start() {
    let rig = Rig::new();
    rig.open().close();
    let places = ["run", "layers/stage", "mounts"].map(|dir| rig.root().join(dir));
    for place in &places {
        std::fs::create_dir_all(place.join("left/over")).unwrap();
        std::fs::write(place.join("left/over/file"), "").unwrap();
    }
    let cache = rig.open();
    for place in &places {
        assert_eq!(std::fs::read_dir(place).unwrap().count(), 0, "{}", place.display());
    }
    assert_sound(&cache);
}

/// `TestManager`.
#[test]
fn a_records_life_from_create_to_prune() {
    let rig = Rig::new();
    let cache = rig.open();
    assert!(cache.find("foobar").is_err());
    assert_eq!(usage(&cache), (0, 0));

    let active = cache.create(None, &retained()).unwrap();
    let id = active.id();
    assert_eq!(tree_of_mutable(&active), Tree::new());
    write(&active, &[File("f", "one")]);
    assert!(cache.get_mutable(id, &by("other")).unwrap_err().is_locked());
    assert_eq!(usage(&cache), (1, 0));
    let snap = active.commit().unwrap();
    assert_eq!(usage(&cache), (1, 0));
    assert!(cache.get_mutable(id, &by("other")).unwrap_err().is_locked());
    snap.release().unwrap();
    assert_eq!(usage(&cache), (0, 1));

    let active = cache.get_mutable(id, &retained()).unwrap();
    assert_eq!(usage(&cache), (1, 0));
    let snap = active.commit().unwrap();
    assert_eq!(usage(&cache), (1, 0));
    snap.finalize().unwrap();
    let snap_id = snap.id();
    snap.release().unwrap();
    assert!(cache.get_mutable(id, &by("other")).unwrap_err().is_not_found());
    assert_eq!(cache.get_mutable(snap_id, &by("other")).unwrap_err().kind(), ErrorKind::FailedPrecondition);

    let snap = cache.get(snap_id, &by("one")).unwrap();
    let again = cache.get(snap_id, &by("two")).unwrap();
    assert_eq!(usage(&cache), (1, 0));
    snap.release().unwrap();
    let above = cache.create(Some(&again), &retained()).unwrap();
    write(&above, &[File("g", "two")]);
    assert_eq!(usage(&cache), (2, 0));
    let above = above.commit().unwrap();
    again.release().unwrap();
    assert_eq!(usage(&cache), (2, 0), "what it stands on stays in use");
    above.release().unwrap();
    assert_eq!(usage(&cache), (0, 2));

    assert_eq!(prune(&cache), 2);
    assert_eq!(usage(&cache), (0, 0));
    assert_eq!(layers_count(&cache), 0);
    assert_sound(&cache);
    assert_idle(&cache);
    cache.close();
    assert_eq!(std::fs::read_dir(rig.root().join("layers/stage")).unwrap().count(), 0);
}

/// `TestLazyGetByBlob`.
#[test]
fn one_diff_id_by_two_blobs_is_two_lazy_records() {
    let rig = Rig::new();
    let cache = rig.open();
    let gzip = Layer::file("foo", "bar");
    let plain = gzip.repacked(Packing::Plain);
    assert_ne!(gzip.digest(), plain.digest());
    assert_eq!(gzip.diff_id(), plain.diff_id());
    let source = Source::of(&[&gzip, &plain]);
    let [one, two] = [&gzip, &plain].map(|layer| lazy(&cache, layer, None, &source));
    assert_ne!(one.id(), two.id());
    let [one_row, two_row] = [&one, &two].map(|record| record.row().unwrap());
    assert_eq!(one_row.chain_id, two_row.chain_id);
    assert_ne!(one_row.blob_chain_id, two_row.blob_chain_id);
    assert_eq!(source.opens(), 0);
    assert_sound(&cache);
}

/// `TestMergeBlobchainID`. In BuildKit, whoever asks for the merge's chain by blob gets the merge, which saves it a
/// snapshot. Here that is another record of the same layers, which costs nothing, and the merge is found by its chain.
#[test]
fn privileged_a_merge_has_the_chain_of_all_its_blobs() {
    if !tools::privileged() {
        return;
    }
    let rig = Rig::new();
    let cache = rig.open();
    let layers: Vec<Layer> = (0..9).map(|n| Layer::file(&(n / 3).to_string(), &(n % 3).to_string())).collect();
    let source = Source::of(&layers.iter().collect::<Vec<_>>());
    let mut inputs: Vec<ImmutableRef> = Vec::new();
    for three in layers.chunks(3) {
        let mut top: Option<ImmutableRef> = None;
        for layer in three {
            top = Some(lazy(&cache, layer, top.as_ref(), &source));
        }
        inputs.extend(top);
    }
    let merge = cache.merged(&inputs.iter().collect::<Vec<_>>());
    let remote = exported(&merge, &RemoteOptions::default());
    assert_eq!(digests(&remote), layers.iter().map(Layer::digest).collect::<Vec<_>>());
    let of_merge = merge.row().unwrap().blob_chain_id.unwrap();
    for input in &inputs {
        assert_ne!(input.row().unwrap().blob_chain_id, Some(of_merge));
    }
    let mut top: Option<ImmutableRef> = None;
    for layer in &layers {
        top = Some(lazy(&cache, layer, top.as_ref(), &source));
    }
    let top = top.unwrap();
    let chains = |record: &ImmutableRef| record.row().map(|row| (row.chain_id, row.blob_chain_id)).unwrap();
    assert_eq!(chains(&top), chains(&merge));
    let found = cache.search_blob_chain(of_merge).unwrap();
    assert_eq!(BTreeSet::from_iter(found), BTreeSet::from([merge.id(), top.id()]));
    assert_eq!(tree(&top), tree(&merge));
    assert_eq!(layers_count(&cache), 9);
    assert_eq!(source.opens(), 9);
    assert_sound(&cache);
}

/// `TestSnapshotExtract`.
#[test]
fn privileged_blobs_are_unpacked_when_somebody_looks_and_go_with_their_records() {
    if !tools::privileged() {
        return;
    }
    let rig = Rig::new();
    let cache = rig.open();
    let layers = [Layer::file("foo", "bar"), Layer::file("foo", "bar123")];
    layers.iter().for_each(|layer| put_blob(&cache.store, layer));
    let below = cache.get_by_blob(&layers[0].descriptor, None, &by("below")).unwrap();
    let above = cache.get_by_blob(&layers[1].descriptor, Some(&below), &by("above")).unwrap();
    assert_eq!(size_bytes(&cache, above.id()), layers[1].bytes.len() as u64);
    assert!(below.is_lazy().is_ok() && above.row().unwrap().state == State::Lazy);
    assert_eq!((layers_count(&cache), blobs(&cache).len()), (0, 2));

    above.extract(&Cancel::new()).unwrap();
    for record in [&below, &above] {
        assert!(matches!(record.row().unwrap().state, State::Sealed { layer: Some(_) }));
    }
    assert_eq!(tree(&above), tree_after(&[File("foo", "bar123")]));
    assert_eq!(layers_count(&cache), 2);
    assert_eq!((prune(&cache), usage(&cache)), (0, (2, 0)));
    assert_eq!((layers_count(&cache), blobs(&cache).len()), (2, 2));

    let id = below.id();
    below.release().unwrap();
    assert_eq!((prune(&cache), usage(&cache)), (0, (2, 0)), "another record stands on it");
    assert_eq!(layers_count(&cache), 2);
    let below = cache.get(id, &by("below")).unwrap();
    above.release().unwrap();
    assert_eq!(usage(&cache), (1, 1));
    assert_eq!((prune(&cache), usage(&cache)), (1, (1, 0)));
    assert_eq!((layers_count(&cache), blobs(&cache).len()), (1, 1));
    below.release().unwrap();
    assert_eq!((prune(&cache), usage(&cache)), (1, (0, 0)));
    assert_eq!((layers_count(&cache), blobs(&cache).len()), (0, 0));
    assert_sound(&cache);
    assert_idle(&cache);
}

/// `TestMissingMaterializedLowerDiffExtract`, and `TestDiffMissingMaterializedLowerSnapshot` of the client's tests: a
/// snapshotter lost what the metadata names. Here a snapshot is a row beside the record's, and what a record holds is not
/// collected; a diff is made of layers, whether or not anybody ever looked at the trees.
#[test]
fn privileged_a_diff_needs_no_snapshot_of_its_lower_and_what_a_record_names_is_never_collected() {
    if !tools::privileged() {
        return;
    }
    for is_extracted in [true, false] {
        let rig = Rig::new();
        let cache = rig.open();
        let layers = [Layer::file("lower", "lower"), Layer::file("upper", "upper")];
        layers.iter().for_each(|layer| put_blob(&cache.store, layer));
        let [lower, upper] =
            layers.each_ref().map(|layer| cache.get_by_blob(&layer.descriptor, None, &by("layer")).unwrap());
        if is_extracted {
            lower.extract(&Cancel::new()).unwrap();
            upper.extract(&Cancel::new()).unwrap();
        }
        let snapshots = [&lower, &upper].map(|record| record.row().unwrap().snapshot);
        assert!(snapshots.iter().all(|snapshot| snapshot.is_some() == is_extracted));
        let diff = cache.diffed(&lower, &upper);
        cache.store.gc(GcMode::Full).unwrap();
        assert!(snapshots.iter().flatten().all(|snapshot| cache.store.snapshots().info(*snapshot).is_ok()));
        assert_eq!(tree(&diff), tree_after(&[File("upper", "upper")]));
        assert_eq!(tree(&cache.merged(&[&lower, &diff])), tree_after(&[File("upper", "upper")]));
        assert_eq!(tree(&lower), tree_after(&[File("lower", "lower")]));
        assert_sound(&cache);
    }
}

/// `TestExtractOnMutable`.
#[test]
fn privileged_blobs_stand_on_a_step_once_it_has_a_blob_itself() {
    if !tools::privileged() {
        return;
    }
    let rig = Rig::new();
    let cache = rig.open();
    let step = cache.layer(None, &[File("foo", "bar")]);
    let layer = Layer::file("foo2", "1");
    put_blob(&cache.store, &layer);
    let refused = cache.get_by_blob(&layer.descriptor, Some(&step), &by("me")).unwrap_err();
    assert!(matches!(refused, CacheError::NotAddressable { id } if id == step.id()));

    exported(&step, &RemoteOptions::default());
    let above = cache.get_by_blob(&layer.descriptor, Some(&step), &by("me")).unwrap();
    step.release().unwrap();
    assert_eq!(above.row().unwrap().state, State::Lazy);
    assert_eq!(size_bytes(&cache, above.id()), layer.bytes.len() as u64);
    assert_eq!((layers_count(&cache), blobs(&cache).len()), (1, 2));
    above.extract(&Cancel::new()).unwrap();
    assert!(matches!(above.row().unwrap().state, State::Sealed { layer: Some(_) }));
    assert_eq!(tree(&above), tree_after(&[File("foo", "bar"), File("foo2", "1")]));
    assert_eq!((prune(&cache), usage(&cache)), (0, (2, 0)));
    above.release().unwrap();
    assert_eq!(usage(&cache), (0, 2));
    assert_eq!((prune(&cache), usage(&cache)), (2, (0, 0)));
    assert_eq!((layers_count(&cache), blobs(&cache).len()), (0, 0));
    assert_sound(&cache);
}

/// `TestSetBlob`.
#[test]
fn privileged_chain_ids_follow_from_blobs_and_lead_back_to_records() {
    if !tools::privileged() {
        return;
    }
    let rig = Rig::new();
    let cache = rig.open();
    let one = cache.layer(None, &[File("foo", "bar")]);
    let row = one.row().unwrap();
    assert!(row.blob.is_none() && row.chain_id.is_none() && row.blob_chain_id.is_none());
    let two = cache.layer(Some(&one), &[File("foo2", "bar2")]);
    let remote = exported(&two, &RemoteOptions::default());
    let ids: Vec<DiffId> =
        remote.descriptors.iter().map(|d| d.annotations[plies_cache::UNCOMPRESSED].parse().unwrap()).collect();
    let own = |blob: BlobDigest, id: DiffId| BlobDigest::of(format!("{blob} {id}").as_bytes());
    let over = |below: BlobDigest, own: BlobDigest| BlobDigest::of(format!("{below} {own}").as_bytes());
    let blob_chain_of_one = own(remote.descriptors[0].digest, ids[0]);
    let chains = |record: &ImmutableRef| {
        let row = record.row().unwrap();
        (row.chain_id.unwrap(), row.blob_chain_id.unwrap())
    };
    let checked = |record: &ImmutableRef, descriptor: &Descriptor| {
        let blob = record.row().unwrap().blob.unwrap();
        assert_eq!(blob.digest, Some(descriptor.digest));
        assert_eq!(blob.media_type, descriptor.media_type.to_string());
        assert_eq!(blob.diff_id.to_string(), descriptor.annotations[plies_cache::UNCOMPRESSED]);
    };
    checked(&one, &remote.descriptors[0]);
    checked(&two, &remote.descriptors[1]);
    assert_eq!(chains(&one), (chain(&ids[..1]), blob_chain_of_one));
    assert_eq!(chains(&two), (chain(&ids), over(blob_chain_of_one, own(remote.descriptors[1].digest, ids[1]))));

    let three = Layer::file("foo3", "bar3");
    let source = Source::of(&[&three]);
    let three_ref = lazy(&cache, &three, Some(&one), &source);
    checked(&three_ref, &three.descriptor);
    assert_eq!(three_ref.row().unwrap().state, State::Lazy);
    let blob_chain_of_three = over(blob_chain_of_one, own(three.digest(), three.diff_id()));
    assert_eq!(chains(&three_ref), (chain(&[ids[0], three.diff_id()]), blob_chain_of_three));
    // The same blob on the same record is the same record.
    let four = cache.get_by_blob(&remote.descriptors[1], Some(&one), &by("four")).unwrap();
    assert_eq!(four.id(), two.id());
    // The same layer by another blob is another record of the same files.
    let repacked = Layer::of_tar(tar_of(&remote, &remote.descriptors[1]), Packing::Zstd);
    let five = lazy(&cache, &repacked, Some(&one), &Source::of(&[&repacked]));
    assert_ne!(five.id(), two.id());
    assert_eq!(five.row().unwrap().state, two.row().unwrap().state);
    assert_eq!(chains(&five), (chain(&ids), over(blob_chain_of_one, own(repacked.digest(), ids[1]))));
    let six = Layer::file("foo6", "bar6");
    let six_ref = lazy(&cache, &six, Some(&three_ref), &Source::of(&[&six]));
    assert_eq!(
        chains(&six_ref),
        (chain(&[ids[0], three.diff_id(), six.diff_id()]), over(blob_chain_of_three, own(six.digest(), six.diff_id())))
    );
    // A blob that nobody has.
    let nobodys = Layer::file("not", "there");
    let refused = cache.get_by_blob(&nobodys.descriptor, Some(&three_ref), &by("me")).unwrap_err();
    assert!(matches!(refused, CacheError::NeedsProviders(missing) if missing == [nobodys.digest()]));
    assert_eq!(source.opens(), 0);
    assert_sound(&cache);
}

/// `TestPrune`.
#[test]
fn prune_takes_what_nobody_holds_and_nothing_stands_on() {
    let rig = Rig::new();
    let cache = rig.open();
    let below = cache.finalized(None, &[File("a", "")]);
    let work = cache.create(Some(&below), &retained()).unwrap();
    write(&work, &[File("b", "")]);
    let above = work.commit().unwrap();
    above.finalize().unwrap();
    assert_eq!((usage(&cache), layers_count(&cache)), ((2, 0), 2));
    assert_eq!((prune(&cache), usage(&cache), layers_count(&cache)), (0, (2, 0), 2));
    above.release().unwrap();
    assert_eq!(usage(&cache), (1, 1));
    assert_eq!((prune(&cache), usage(&cache), layers_count(&cache)), (1, (1, 0), 1));

    let work = cache.create(Some(&below), &retained()).unwrap();
    write(&work, &[File("c", "")]);
    let above = work.commit().unwrap();
    below.release().unwrap();
    assert_eq!(usage(&cache), (2, 0));
    assert_eq!((prune(&cache), usage(&cache)), (0, (2, 0)));
    above.release().unwrap();
    assert_eq!(usage(&cache), (0, 2));
    assert_eq!((prune(&cache), usage(&cache), layers_count(&cache)), (2, (0, 0), 0));
    assert_sound(&cache);
}

/// `TestLazyCommit`.
#[test]
fn a_lazy_commit_is_undone_by_get_mutable_until_it_is_finalized_also_after_restarts() {
    let rig = Rig::new();
    let cache = rig.open();
    let work = cache.create(None, &retained()).unwrap();
    let mutable = work.id();
    write(&work, &[File("f", "1")]);
    let snap = work.commit().unwrap();
    let immutable = snap.id();
    let locked = |cache: &Cache, id| assert!(cache.get_mutable(id, &by("other")).unwrap_err().is_locked());
    let gone = |cache: &Cache, id| assert!(cache.get_mutable(id, &by("other")).unwrap_err().is_not_found());
    locked(&cache, mutable);
    let again = cache.get(immutable, &by("me")).unwrap();
    snap.release().unwrap();
    again.release().unwrap();
    let again = cache.get(immutable, &by("me")).unwrap();
    locked(&cache, mutable);
    again.release().unwrap();
    // Nobody holds it: it is mutable again, and what it was committed as is gone.
    let work = cache.get_mutable(mutable, &retained()).unwrap();
    assert_eq!(work.id(), mutable);
    assert!(cache.get(immutable, &by("me")).unwrap_err().is_not_found());
    let snap = work.commit().unwrap();
    let immutable = snap.id();
    snap.finalize().unwrap();
    snap.release().unwrap();
    gone(&cache, mutable);
    cache.get(immutable, &by("me")).unwrap().release().unwrap();

    // Restarted after a commit.
    let work = cache.create(None, &retained()).unwrap();
    let mutable = work.id();
    write(&work, &[File("g", "2")]);
    let snap = work.commit().unwrap();
    let immutable = snap.id();
    drop(snap);
    cache.close();
    let cache = rig.open();
    cache.get(immutable, &by("me")).unwrap().release().unwrap();
    let work = cache.get_mutable(mutable, &retained()).unwrap();
    assert_eq!(tree_of_mutable(&work), tree_after(&[File("g", "2")]));
    assert!(cache.get(immutable, &by("me")).unwrap_err().is_not_found());
    let snap = work.commit().unwrap();
    let immutable = snap.id();
    drop(snap);
    cache.close();
    let cache = rig.open();
    let snap = cache.get(immutable, &by("me")).unwrap();
    snap.finalize().unwrap();
    assert_eq!(tree(&snap), tree_after(&[File("g", "2")]));
    snap.release().unwrap();
    gone(&cache, mutable);
    assert_sound(&cache);
}

/// `TestLoopLeaseContent`. BuildKit chains the variants of a blob by labels, which can make a ring that is never
/// collected. Here they belong to the layer, or to the one blob that they were made of.
#[test]
fn variants_of_variants_go_with_the_last_record_that_has_one_of_them() {
    if !tools::privileged() {
        return;
    }
    for is_unpacked in [false, true] {
        let rig = Rig::new();
        let cache = rig.open();
        let layer = Layer::new(&[Member::file("foo", "1")], Packing::Plain);
        let source = Source::of(&[&layer]);
        let mut refs = vec![lazy(&cache, &layer, None, &source)];
        if is_unpacked {
            refs[0].extract(&Cancel::new()).unwrap();
        }
        // Round the ring twice: each is made of the record of the one before.
        let mut made = Vec::new();
        for format in FORMATS.into_iter().chain(FORMATS) {
            let remote = exported(refs.last().unwrap(), &forced(format));
            let descriptor = &remote.descriptors[0];
            assert_eq!(tar_of(&remote, descriptor), layer.tar);
            let options = RecordOptions { providers: remote.providers.clone(), ..by("variant") };
            refs.push(cache.get_by_blob(descriptor, None, &options).unwrap());
            made.push(descriptor.digest);
        }
        assert_eq!(made[..3], made[3..], "nothing is made twice");
        let records: BTreeSet<RecordId> = refs.iter().map(ImmutableRef::id).collect();
        assert_eq!(records.len(), 3);
        drop(refs);
        assert_eq!(prune_all(&cache), 3);
        assert_eq!((blobs(&cache).len(), layers_count(&cache)), (0, 0));
        assert_sound(&cache);
        assert_idle(&cache);
    }
}

/// `TestSharingCompressionVariant`, with three forms where BuildKit has four.
#[test]
fn privileged_variants_made_for_one_record_serve_all_records_of_the_layer_and_outlive_it() {
    if !tools::privileged() {
        return;
    }
    let packing = |format| match format {
        LayerFormat::Gzip => Packing::Gzip,
        LayerFormat::Zstd => Packing::Zstd,
        _ => Packing::Plain,
    };
    let others = |of: LayerFormat| FORMATS.into_iter().filter(move |format| *format != of);
    let share = |cache: &Cache, name: &str, a: LayerFormat, b: LayerFormat, is_alone: bool| {
        let layer = Layer::new(&[Member::file(name, "1")], packing(a));
        let source = Source::of(&[&layer]);
        let a_ref = lazy(cache, &layer, None, &source);
        let of_a: BTreeMap<&str, BlobDigest> =
            FORMATS.into_iter().map(|format| (format.name(), digests(&exported(&a_ref, &forced(format)))[0])).collect();
        assert_eq!(of_a[a.name()], layer.digest());
        let b_desc = exported(&a_ref, &forced(b)).descriptors.remove(0);
        let b_ref = cache
            .get_by_blob(&b_desc, None, &RecordOptions { providers: source.providers(&[&layer]), ..by("b") })
            .unwrap();
        assert_ne!(a_ref.id(), b_ref.id());
        let check = |held: &ImmutableRef| {
            for format in FORMATS {
                let remote = exported(held, &forced(format));
                // Of several that others made of the same layer meanwhile, any will do.
                assert!(!is_alone || digests(&remote) == [of_a[format.name()]]);
                assert_eq!(tar_of(&remote, &remote.descriptors[0]), layer.tar);
            }
        };
        check(&b_ref);
        check(&a_ref);
        a_ref.release().unwrap();
        if is_alone {
            assert_eq!((prune_all(cache), usage(cache)), (1, (1, 0)));
            check(&b_ref);
        }
    };
    let rig = Rig::new();
    let cache = rig.open();
    for a in FORMATS {
        for b in others(a) {
            share(&cache, "foo", a, b, true);
            prune_all(&cache);
            assert_eq!((usage(&cache), blobs(&cache).len()), ((0, 0), 0), "{a:?} {b:?}");
        }
    }
    // All at once, of one layer for every two.
    std::thread::scope(|scope| {
        for a in FORMATS {
            for b in others(a) {
                let (cache, share) = (&cache, &share);
                scope.spawn(move || share(cache, "bar", a, b, false));
            }
        }
    });
    prune_all(&cache);
    assert_eq!((usage(&cache), blobs(&cache).len()), ((0, 0), 0));
    assert_sound(&cache);
    assert_idle(&cache);
}

/// `TestConversion`: every form into every other, of tars of two writers.
#[test]
fn privileged_converting_keeps_the_tar_to_the_byte() {
    if !tools::privileged() || !tools::have(&["tar"]) {
        return;
    }
    let members = [Member::file("foo1", "bar1"), Member::file("foo2", "bar2")];
    let scratch = tempfile::tempdir().unwrap();
    common::apply(scratch.path(), &[File("foo1", "bar1"), File("foo2", "bar2")]);
    let system = Command::new("tar").arg("-cC").arg(scratch.path()).args(["foo1", "foo2"]).output().unwrap();
    assert!(system.status.success());
    let tars = [plies_testkit::tar::archive(&members), system.stdout];
    assert_ne!(tars[0], tars[1]);
    let rig = Rig::new();
    let cache = rig.open();
    for tar in tars {
        for from in Packing::ALL {
            for to in FORMATS {
                let layer = Layer::of_tar(tar.clone(), from);
                let source = Source::of(&[&layer]);
                let record = lazy(&cache, &layer, None, &source);
                let remote = exported(&record, &forced(to));
                assert_eq!(tar_of(&remote, &remote.descriptors[0]), tar, "{from:?} to {to:?}");
                // And back, of a record of what came out, which has nothing but that.
                let id = record.id();
                let options = RecordOptions { providers: remote.providers.clone(), ..by("back") };
                let back = cache.get_by_blob(&remote.descriptors[0], None, &options).unwrap();
                let plain = exported(&back, &forced(LayerFormat::Uncompressed));
                assert_eq!(plain.descriptors[0].digest, BlobDigest::of(&tar));
                drop((record, back));
                assert!(prune_all(&cache) > 0 && cache.row(id).is_none());
            }
        }
    }
    assert_eq!(blobs(&cache).len(), 0);
}

/// `TestGetRemotes`.
#[test]
fn privileged_overlapping_chains_are_exported_at_once_and_every_blob_is_made_once() {
    if !tools::privileged() {
        return;
    }
    let rig = Rig::new();
    let cache = rig.open();
    let layers = [Layer::file("foo", "0"), Layer::file("foo", "1")];
    let source = Source::of(&layers.each_ref());
    let lazy_ref = lazy(&cache, &layers[0], None, &source);
    // Three levels of steps, two on each.
    let mut level = vec![lazy_ref];
    for depth in 0..3 {
        let mut next = Vec::new();
        for (at, below) in level.iter().enumerate() {
            for which in 0..2 {
                let work = cache.create(Some(below), &by("step")).unwrap();
                let mounted = work.mount(Attach::Detached).unwrap();
                std::fs::write(path_of(&mounted.root()).join(format!("{depth}-{at}-{which}")), "").unwrap();
                mounted.unmount().unwrap();
                next.push(work.commit().unwrap());
            }
        }
        level = next;
    }
    let mut refs = level;
    refs.push(lazy(&cache, &layers[1], None, &source));
    assert_eq!(blobs(&cache).len(), 1, "only what a step stands on was fetched");

    // By record, place in the chain and form.
    let mut all: BTreeMap<(RecordId, usize, &str), BlobDigest> = BTreeMap::new();
    std::thread::scope(|scope| {
        let mut asked = Vec::new();
        for record in &refs {
            for format in FORMATS {
                asked.push(scope.spawn(move || (record.id(), format, exported(record, &forced(format)))));
            }
        }
        for thread in asked {
            let (id, format, remote) = thread.join().unwrap();
            for (at, descriptor) in remote.descriptors.iter().enumerate() {
                let media_type = descriptor.media_type.to_string();
                assert!(media_type.ends_with(match format {
                    LayerFormat::Gzip => "tar+gzip",
                    LayerFormat::Zstd => "tar+zstd",
                    _ => "tar",
                }));
                tar_of(&remote, descriptor);
                all.insert((id, at, format.name()), descriptor.digest);
            }
        }
    });
    // One layer each: the two blobs and 2 + 4 + 8 steps, in three forms; and the two as they came.
    let expected: BTreeSet<BlobDigest> = all.values().copied().collect();
    assert_eq!(expected.len(), 16 * 3);
    let came: BTreeSet<BlobDigest> = layers.iter().map(Layer::digest).collect();
    assert!(came.is_subset(&expected), "what is gzip already is taken as it came");
    let unfetched: BTreeSet<BlobDigest> = expected.difference(&blobs(&cache)).copied().collect();
    assert!(unfetched.is_subset(&came), "and need not be here for that");
    assert!(blobs(&cache).is_subset(&expected), "nothing else was made");

    // All combinations are listed, what goes without saying first.
    for record in &refs {
        for format in FORMATS {
            let options = RemoteOptions { compression: format, ..RemoteOptions::default() };
            let [main] = &remotes(record, false, &options, false)[..] else { panic!() };
            let listed = remotes(record, false, &options, true);
            assert_eq!(digests(&listed[0]), digests(main));
            let chains: BTreeSet<Vec<BlobDigest>> = listed.iter().map(digests).collect();
            assert_eq!(chains.len(), listed.len());
            assert_eq!(chains.len(), 3_usize.pow(main.descriptors.len() as u32));
            for chain in chains {
                for (at, digest) in chain.iter().enumerate() {
                    assert!(FORMATS.iter().any(|format| all[&(record.id(), at, format.name())] == *digest));
                }
            }
        }
    }
    assert_sound(&cache);
}

/// `TestNondistributableBlobs`.
#[test]
fn privileged_media_type_and_urls_of_what_can_be_had_elsewhere_are_kept_and_left_out_on_request() {
    if !tools::privileged() {
        return;
    }
    let rig = Rig::new();
    let cache = rig.open();
    let mut layer = Layer::new(&[Member::file("foo", "bar")], Packing::Plain);
    layer.descriptor.media_type = "application/vnd.oci.image.layer.nondistributable.v1.tar".into();
    layer.descriptor.urls = vec!["https://example.org/foo".into()];
    let record = lazy(&cache, &layer, None, &Source::of(&[&layer]));
    let descriptor = |prefer_non_distributable| {
        let compression = LayerFormat::Uncompressed;
        let options = RemoteOptions { prefer_non_distributable, compression, ..RemoteOptions::default() };
        exported(&record, &options).descriptors.remove(0)
    };
    let preferred = descriptor(true);
    assert_eq!((&preferred.media_type, &preferred.urls), (&layer.descriptor.media_type, &layer.descriptor.urls));
    let other = descriptor(false);
    assert_eq!(other.media_type.to_string(), "application/vnd.oci.image.layer.v1.tar");
    assert!(other.urls.is_empty());
}

/// `TestMergeOp`.
#[test]
fn merges_keep_what_they_are_made_of_and_cost_nothing_themselves() {
    let rig = Rig::new();
    let cache = rig.open();
    assert!(cache.merge(&[], &by("me")).unwrap().is_none());
    let names = ["0", "1", "2", "3", "4", "5"];
    let base: Vec<ImmutableRef> = names.iter().map(|name| cache.layer(None, &[File(name, name)])).collect();
    let expected = |names: &[&'static str]| tree_after(&names.iter().map(|name| File(name, name)).collect::<Vec<Op>>());
    let merged = |inputs: &[ImmutableRef]| cache.merged(&inputs.iter().collect::<Vec<_>>());

    let single = merged(&base[..1]);
    assert_eq!(single.id(), base[0].id());
    assert_eq!(tree(&single), expected(&names[..1]));
    let filters = vec![format!("id=={}", single.id())];
    single.release().unwrap();
    assert_eq!(prune_by(&cache, PruneOptions { filters, ..PruneOptions::default() }), 0);

    let one = merged(&base[..3]);
    assert_eq!(tree(&one), expected(&names[..3]));
    assert_eq!((size_bytes(&cache, one.id()), usage(&cache)), (0, (7, 0)));
    let two = merged(&base[3..]);
    assert_eq!(tree(&two), expected(&names[3..]));
    assert_eq!((size_bytes(&cache, two.id()), usage(&cache)), (0, (8, 0)));
    for record in base {
        record.release().unwrap();
    }
    assert_eq!(usage(&cache), (8, 0));
    let three = merged(&[one.clone(), two.clone()]);
    one.release().unwrap();
    two.release().unwrap();
    assert_eq!(tree(&three), expected(&names));
    let Parents::Merge(parents) = three.row().unwrap().parents else { panic!() };
    assert_eq!(parents.len(), 6);
    assert_eq!((size_bytes(&cache, three.id()), usage(&cache)), (0, (7, 2)));
    three.release().unwrap();
    assert_eq!(usage(&cache), (0, 9));
    prune_all(&cache);
    assert_eq!((usage(&cache), layers_count(&cache)), ((0, 0), 0));
    assert_sound(&cache);
    assert_idle(&cache);
}

/// `TestDiffOp`.
#[test]
fn diffs_keep_what_they_are_made_of() {
    let rig = Rig::new();
    let cache = rig.open();
    let ends = |diff: ImmutableRef, records: usize, expected: &[Op]| {
        assert_eq!(usage(&cache), (records, 0), "all that it is made of is in use");
        prune_all(&cache);
        assert_eq!(usage(&cache), (records, 0));
        assert_eq!(tree(&diff), tree_after(expected));
        diff.release().unwrap();
        assert_eq!(usage(&cache), (0, records));
        prune_all(&cache);
        assert_eq!((usage(&cache), layers_count(&cache)), ((0, 0), 0));
    };
    let lower = cache.layer(None, &[File("a", "")]);
    let upper = cache.layer(None, &[File("b", "")]);
    let diff = cache.diffed(&lower, &upper);
    assert_eq!(usage(&cache), (3, 0));
    drop((lower, upper));
    ends(diff, 3, &[File("b", "")]);

    // Several layers apart: a merge of diffs of one layer.
    let mut tower = vec![cache.layer(None, &[File("a", "")])];
    for name in ["b", "c", "d", "e"] {
        tower.push(cache.layer(tower.last(), &[File(name, "")]));
    }
    let diff = cache.diffed(&tower[2], &tower[4]);
    assert_eq!(usage(&cache), (8, 0), "five, two diffs and their merge");
    drop(tower);
    ends(diff, 8, &[File("d", ""), File("e", "")]);

    let lower = cache.layer(None, &[File("a", "")]);
    let diff = cache.diff(Some(&lower), None, &by("diff")).unwrap();
    drop(lower);
    ends(diff, 2, &[]);
    assert_idle(&cache);
}

/// `TestLoadHalfFinalizedRef`: the snapshot was committed, and the metadata still says that there is a mutable. Here both
/// are one transaction; what can be half done is the directory, which another start puts right.
#[test]
fn a_finalize_that_was_cut_short_is_none_and_can_be_done_again() {
    let rig = Rig::new();
    let cache = rig.open();
    let work = cache.create(None, &retained()).unwrap();
    write(&work, &[File("f", "text"), Dir("d", 0o700), File("gone", "")]);
    write(&work, &[Rm("gone")]);
    let mutable = work.id();
    let made = work.commit().unwrap();
    let immutable = made.id();
    drop(made);
    // The rows as they are before a finalize, and the layer that it had published by then.
    let before = [mutable, immutable].map(|id| cache.must(id));
    let twin = cache.finalized(None, &[File("f", "text"), Dir("d", 0o700)]);
    assert_eq!(layers_count(&cache), 1);
    let twin_id = twin.id();
    drop(twin);
    cache.store.write(|tx| tx.unhold_all(&common::owner(twin_id))).unwrap();
    cache.store.write(|tx| tx.remove(&RECORDS, &twin_id).map(drop)).unwrap();
    cache.close();

    let cache = rig.open();
    assert_eq!([mutable, immutable].map(|id| cache.must(id)), before);
    let made = cache.get(immutable, &by("me")).unwrap();
    made.finalize().unwrap();
    assert!(cache.get_mutable(mutable, &by("me")).unwrap_err().is_not_found());
    assert!(matches!(made.row().unwrap().state, State::Sealed { layer: Some(_) }));
    assert_eq!(tree(&made), tree_after(&[File("f", "text"), Dir("d", 0o700)]));
    drop(made);
    cache.close();
    let cache = rig.open();
    cache.store.gc(GcMode::Full).unwrap();
    assert_eq!(tree(&cache.get(immutable, &by("me")).unwrap()), tree_after(&[File("f", "text"), Dir("d", 0o700)]));
    assert_eq!(layers_count(&cache), 1);
}

/// `TestMountReadOnly`. There is no way to ask for a mount of an immutable record that can be written to.
#[test]
fn privileged_a_mutable_can_be_written_to_and_what_it_became_cannot() {
    if !tools::privileged() {
        return;
    }
    let rig = Rig::new();
    let cache = rig.open();
    let mut parent: Option<ImmutableRef> = None;
    for name in ["a", "b"] {
        let work = cache.create(parent.as_ref(), &by("me")).unwrap();
        let mounted = work.mount(Attach::Detached).unwrap();
        std::fs::write(path_of(&mounted.root()).join(name), "").unwrap();
        mounted.unmount().unwrap();
        let made = work.commit().unwrap();
        // Twice: a mount that is there already is no other.
        for _ in 0..2 {
            let mounted = made.mount(Attach::Detached, &Cancel::new()).unwrap().unwrap();
            let root = path_of(&mounted.root());
            for path in [root.join("new"), root.join(name)] {
                let error = std::fs::write(path, "other").unwrap_err();
                assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
            }
            mounted.unmount().unwrap();
        }
        parent = Some(made);
    }
    assert_eq!(tree(&parent.unwrap()), tree_after(&[File("a", ""), File("b", "")]));
}

/// `TestLoadBrokenParents`.
#[test]
fn a_merge_with_a_parent_that_is_gone_holds_none_of_the_others() {
    let rig = Rig::new();
    let cache = rig.open();
    let a = cache.layer(None, &[File("a", "")]);
    let b = cache.layer(None, &[File("b", "")]);
    let merge = cache.merged(&[&a, &b]);
    assert_eq!(usage(&cache), (3, 0));
    let (a, b, merge) = ((a.id(), drop(a)).0, (b.id(), drop(b)).0, (merge.id(), drop(merge)).0);
    cache.store.write(|tx| tx.remove(&RECORDS, &b)).unwrap();
    cache.close();

    let cache = rig.open();
    let error = cache.get(merge, &by("me")).unwrap_err();
    assert!(matches!(&error, CacheError::Damaged { id, what } if *id == merge && what.contains(&b.to_string())));
    assert_idle(&cache);
    // (BuildKit forgets the merge without a word; here it is listed, says what is wrong, and can be removed.)
    assert_eq!(usage(&cache), (0, 2));
    let held = cache.get(a, &by("me")).unwrap();
    let holders: Vec<usize> = cache.manager.held().iter().map(|(_, holders)| holders.len()).collect();
    assert_eq!(holders, [1]);
    assert_eq!(tree(&held), tree_after(&[File("a", "")]));
    drop(held);
    cache.remove(&[merge]).unwrap();
    cache.remove(&[a]).unwrap();
    assert_eq!(usage(&cache), (0, 0));
    assert_idle(&cache);
}

/// `TestCalculateKeepBytes`.
#[test]
fn a56_what_a_prune_keeps_is_buildkits_arithmetic() {
    // max used, min free, reserved; used, free; what is kept. The disk has 10,000.
    for (name, (max, min_free, reserved), (used, free), expected) in [
        ("empty", (0, 0, 0), (1000, 9000), Cap::Off),
        ("only buildkit max", (2000, 0, 0), (1000, 9000), Cap::Bytes(2000)),
        ("only buildkit free", (0, 5000, 0), (7000, 3000), Cap::Bytes(5000)),
        ("only buildkit free with min", (0, 5000, 6000), (7000, 3000), Cap::Bytes(6000)),
        ("only buildkit free all", (4000, 5000, 2000), (7000, 3000), Cap::Bytes(4000)),
        // Something else uses the rest.
        ("mixed max", (2000, 0, 0), (4000, 2000), Cap::Bytes(2000)),
        ("mixed free", (0, 5000, 0), (4000, 2000), Cap::Bytes(1000)),
        ("mixed free with min", (0, 5000, 2000), (4000, 2000), Cap::Bytes(2000)),
        ("mixed free all", (4000, 5000, 2000), (4000, 2000), Cap::Bytes(2000)),
    ] {
        let options = PruneOptions {
            max_used_space_bytes: max,
            min_free_space_bytes: min_free,
            reserved_space_bytes: reserved,
            ..PruneOptions::default()
        };
        assert_eq!(effective_keep(&options, used, free), expected, "{name}");
    }
}
