//! Records whose blobs are elsewhere: getting them by blob, and fetching them when somebody looks.
#![allow(missing_docs, clippy::unwrap_used)]

mod blob_rig;

use std::io::Read;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use blob_rig::{Layer, Rig, Source, blobs, built, is_idle, layers_count, lazy, read_file};
use plies_cache::{
    BlobRow, CacheError, ImmutableRef, Parents, Provider, RangeProvider, RecordId, RecordOptions, RemoteOptions, State,
    UNCOMPRESSED,
};
use plies_oci::{BlobDigest, ChainId, ErrorKind, MediaType};
use plies_store::{Cancel, DriverKind, GcMode, LeaseOptions, Rows as _, held_by};
use plies_testkit::eventually;
use plies_testkit::image::Packing;
use plies_testkit::tar::Member;

fn noise(lines: u32) -> String {
    (0..lines).map(|n| format!("{}\n", n.wrapping_mul(2_654_435_761))).collect()
}

fn row_of(record: &ImmutableRef) -> plies_cache::RecordRow {
    record.row().unwrap()
}

#[test]
fn a08_the_descriptor_must_say_what_it_decompresses_to() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let layer = Layer::file("f", "text");
    let source = Source::of(&[&layer]);
    let mut without = layer.descriptor.clone();
    without.annotations.remove(UNCOMPRESSED);
    let refused = cache.get_by_blob(&without, None, &source.options(&[&layer])).unwrap_err();
    assert!(matches!(&refused, CacheError::NoDiffId { digest } if *digest == layer.digest().to_string()));
    assert!(refused.to_string().contains(&layer.digest().to_string()));
    for text in ["", "sha256:12", "md5:0123", "nonsense"] {
        let mut bad = layer.descriptor.clone();
        bad.annotations.insert(UNCOMPRESSED.into(), text.into());
        let refused = cache.get_by_blob(&bad, None, &source.options(&[&layer])).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
        let message = refused.to_string();
        assert!(message.contains(&layer.digest().to_string()) && message.contains(text), "{message}");
    }
    let mut other = layer.descriptor.clone();
    other.media_type = MediaType::ImageConfig;
    let refused = cache.get_by_blob(&other, None, &source.options(&[&layer])).unwrap_err();
    assert!(matches!(refused, CacheError::NotALayer { .. }));
    assert!(manager.held().is_empty() && is_idle(&store));
}

#[test]
fn a09_without_parent_the_chain_is_the_layer() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let layer = Layer::file("f", "text");
    let record = lazy(&manager.accessor(), &layer, None, &Source::of(&[&layer]));
    let row = row_of(&record);
    assert_eq!(row.chain_id.unwrap().to_string(), layer.diff_id().to_string());
    let expected = BlobDigest::of(format!("{} {}", layer.digest(), layer.diff_id()).as_bytes());
    assert_eq!(row.blob_chain_id, Some(expected));
}

#[test]
fn a10_with_parent_the_chains_are_folded() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let (below, above) = (Layer::file("a", "one"), Layer::file("b", "two"));
    let source = Source::of(&[&below, &above]);
    let base = lazy(&cache, &below, None, &source);
    let top = lazy(&cache, &above, Some(&base), &source);
    let fold = |a: &str, b: &str| BlobDigest::of(format!("{a} {b}").as_bytes()).to_string();
    let chain = fold(&below.diff_id().to_string(), &above.diff_id().to_string());
    let own = |layer: &Layer| fold(&layer.digest().to_string(), &layer.diff_id().to_string());
    let row = row_of(&top);
    assert_eq!(row.chain_id.unwrap().to_string(), chain);
    assert_eq!(row.blob_chain_id.unwrap().to_string(), fold(&own(&below), &own(&above)));
    assert_eq!(row.parents, Parents::Layer(base.id()));
}

#[test]
fn a11_a_blob_that_is_not_here_needs_a_provider_and_one_that_is_does_not() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let layer = Layer::file("f", "text");
    let refused = cache.get_by_blob(&layer.descriptor, None, &RecordOptions::default()).unwrap_err();
    assert!(matches!(&refused, CacheError::NeedsProviders(missing) if *missing == [layer.digest()]));
    assert_eq!(refused.kind(), ErrorKind::Unavailable);
    assert!(manager.held().is_empty(), "nothing is held for what failed");

    let lease = store.lease(LeaseOptions::process("test")).unwrap();
    let mut ingest = store.content().ingest_unnamed().unwrap();
    std::io::Write::write_all(&mut ingest, &layer.bytes).unwrap();
    ingest.commit(plies_store::Expected::digest(layer.digest()), &lease).unwrap();
    let record = cache.get_by_blob(&layer.descriptor, None, &RecordOptions::default()).unwrap();
    // A19: from here the record keeps it.
    lease.release().unwrap();
    store.gc(GcMode::Run).unwrap();
    assert_eq!(read_file(&record, "f").as_deref(), Some("text"));
}

#[test]
fn a12_the_parent_is_finalized_and_not_used_up() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let open = cache.create(None, &RecordOptions::default()).unwrap();
    blob_rig::write(&open, "a", "one");
    let parent = open.commit().unwrap();
    assert!(matches!(row_of(&parent).state, State::Shared { .. }));
    let layer = Layer::file("b", "two");
    let source = Source::of(&[&layer]);
    let refused = cache.get_by_blob(&layer.descriptor, Some(&parent), &source.options(&[&layer])).unwrap_err();
    // A13
    assert!(matches!(refused, CacheError::NotAddressable { id } if id == parent.id()));
    assert!(matches!(row_of(&parent).state, State::Sealed { layer: Some(_) }));
    let held: usize = manager.held().iter().map(|(_, holders)| holders.len()).sum();
    assert_eq!(held, 1, "only the ref of this test");
    parent.get_remotes(true, &RemoteOptions::default(), false, &Cancel::new()).unwrap();
    let child = lazy(&cache, &layer, Some(&parent), &source);
    assert_eq!(read_file(&child, "a").as_deref(), Some("one"));
    assert_eq!(read_file(&child, "b").as_deref(), Some("two"));
}

#[test]
fn a14_two_who_ask_for_one_blob_get_one_record_and_two_refs() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let layer = Layer::file("f", "text");
    let source = Source::of(&[&layer]);
    let start = Barrier::new(8);
    let refs: Vec<ImmutableRef> = std::thread::scope(|scope| {
        let ask = || {
            start.wait();
            lazy(&cache, &layer, None, &source)
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(ask)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(refs.iter().all(|record| record.id() == refs[0].id()));
    let held = manager.held();
    assert_eq!(held.len(), 1);
    assert_eq!(held[0].1.len(), 8);
    drop(refs);
    assert!(manager.held().is_empty());
}

#[test]
fn a15_the_record_of_the_same_blobs_is_found_and_gets_the_image_refs() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let layer = Layer::file("f", "text");
    let source = Source::of(&[&layer]);
    let named = |name: &str| RecordOptions { image_refs: vec![name.into()], ..source.options(&[&layer]) };
    let one = cache.get_by_blob(&layer.descriptor, None, &named("a:1")).unwrap();
    let two = cache.get_by_blob(&layer.descriptor, None, &named("b:1")).unwrap();
    let again = cache.get_by_blob(&layer.descriptor, None, &named("a:1")).unwrap();
    assert_eq!((one.id(), one.id()), (two.id(), again.id()));
    assert_eq!(row_of(&one).image_refs, ["a:1", "b:1"]);
    // One that is gone is not found again.
    let id = one.id();
    drop((one, two, again));
    cache.remove(&[id]).unwrap();
    assert_ne!(lazy(&cache, &layer, None, &source).id(), id);
}

#[test]
fn a16_the_same_layer_by_another_blob_lends_its_files() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let gzip = Layer::file("f", "text");
    let zstd = gzip.repacked(Packing::Zstd);
    let source = Source::of(&[&gzip, &zstd]);
    let one = lazy(&cache, &gzip, None, &source);
    one.extract(&Cancel::new()).unwrap();
    let other = lazy(&cache, &zstd, None, &source);
    assert_ne!(one.id(), other.id());
    assert_eq!(row_of(&one).state, row_of(&other).state, "the layer is shared");
    assert_eq!(row_of(&one).chain_id, row_of(&other).chain_id);
    assert_ne!(row_of(&one).blob_chain_id, row_of(&other).blob_chain_id);
    assert_eq!(read_file(&other, "f").as_deref(), Some("text"));
    assert_eq!(*source.asked_for.lock().unwrap(), [gzip.digest()]);
}

#[test]
fn a16_a_layer_that_came_meanwhile_is_taken_without_fetching() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let gzip = Layer::file("f", "text");
    let zstd = gzip.repacked(Packing::Zstd);
    let bases = [Layer::file("a", "one"), Layer::file("b", "two")];
    let source = Source::of(&[&gzip, &zstd, &bases[0], &bases[1]]);
    let parents = bases.each_ref().map(|layer| lazy(&cache, layer, None, &source));
    // All are made before any is unpacked: on two parents, and by two blobs.
    let records = [
        lazy(&cache, &gzip, Some(&parents[0]), &source),
        lazy(&cache, &gzip, Some(&parents[1]), &source),
        lazy(&cache, &zstd, None, &source),
    ];
    for record in &records {
        assert_eq!(row_of(record).state, State::Lazy);
        let with_all = source.options(&[&gzip, &zstd, &bases[0], &bases[1]]);
        let record = cache.get(record.id(), &with_all).unwrap();
        assert_eq!(read_file(&record, "f").as_deref(), Some("text"));
    }
    assert_eq!(layers_count(&store), 3, "one a diff ID");
    let mut asked = source.asked_for.lock().unwrap().clone();
    asked.sort();
    let mut expected = [gzip.digest(), bases[0].digest(), bases[1].digest()];
    expected.sort();
    assert_eq!(asked, expected);
}

#[test]
fn a17_a_new_record_is_lazy_and_costs_nothing() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let layer = Layer::file("f", "text");
    let source = Source::of(&[&layer]);
    let record = lazy(&manager.accessor(), &layer, None, &source);
    assert!(record.is_lazy().unwrap());
    assert_eq!(row_of(&record).state, State::Lazy);
    assert_eq!((source.opens(), layers_count(&store), blobs(&store).len()), (0, 0, 0));
    record.extract(&Cancel::new()).unwrap();
    assert!(!record.is_lazy().unwrap());
}

#[test]
fn a18_a_record_holds_for_itself_and_leaves_no_lease() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let layer = Layer::file("f", "text");
    let record = lazy(&cache, &layer, None, &Source::of(&[&layer]));
    record.extract(&Cancel::new()).unwrap();
    assert!(is_idle(&store));
    let owner = plies_store::Owner::new("record", record.id());
    let held = store.read(|rows| held_by(rows, &owner)).unwrap();
    assert_eq!(held.len(), 3, "its layer, its blob (A19) and its tree: {held:?}");
    let id = record.id();
    drop(record);
    cache.remove(&[id]).unwrap();
    assert!(store.read(|rows| held_by(rows, &owner)).unwrap().is_empty());
    store.gc(GcMode::Run).unwrap();
    assert_eq!((layers_count(&store), blobs(&store).len()), (0, 0));
}

#[test]
fn a20_all_of_a_record_is_there_at_once_and_after_a_restart() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let mut layer = Layer::file("f", "text");
    layer.descriptor.urls = vec!["https://example.org/f".into()];
    layer.descriptor.annotations.insert("org.example.note".into(), "kept".into());
    let source = Source::of(&[&layer]);
    let options = RecordOptions {
        description: Some("pulled".into()),
        image_refs: vec!["a:1".into()],
        ..source.options(&[&layer])
    };
    let record = cache.get_by_blob(&layer.descriptor, None, &options).unwrap();
    let (id, row) = (record.id(), row_of(&record));
    assert_eq!((row.description.as_str(), &row.image_refs[..]), ("pulled", &["a:1".to_owned()][..]));
    assert_eq!(row.created_at.as_micros(), blob_rig::EPOCH_SECONDS * 1_000_000);
    let annotations = vec![
        (UNCOMPRESSED.to_owned(), layer.diff_id().to_string()),
        ("org.example.note".to_owned(), "kept".to_owned()),
    ];
    let blob = BlobRow {
        digest: Some(layer.digest()),
        diff_id: layer.diff_id(),
        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
        size_bytes: layer.bytes.len() as u64,
        urls: vec!["https://example.org/f".into()],
        annotations,
    };
    assert_eq!(row.blob, Some(blob));
    drop((record, cache));
    manager.close().unwrap();
    store.close().unwrap();
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    // A24: known, but not to be had any more without somebody who fetches it.
    let refused = cache.get(id, &RecordOptions::default()).unwrap_err();
    assert!(matches!(&refused, CacheError::NeedsProviders(missing) if *missing == [layer.digest()]));
    let record = cache.get(id, &source.options(&[&layer])).unwrap();
    assert_eq!(row_of(&record), row);
    assert_eq!(cache.search_chain(ChainId::extend(None, layer.diff_id())).unwrap(), [id]);
    assert_eq!(read_file(&record, "f").as_deref(), Some("text"));
}

#[test]
fn a21_a_failed_get_by_blob_leaves_no_row() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let layer = Layer::file("f", "text");
    let source = Source::of(&[&layer]);
    let parent = built(&cache, None, "a", "one");
    cache.get_by_blob(&layer.descriptor, Some(&parent), &source.options(&[&layer])).unwrap_err();
    cache.get_by_blob(&layer.descriptor, None, &RecordOptions::default()).unwrap_err();
    let chains = [ChainId::extend(None, layer.diff_id())];
    assert!(chains.iter().all(|chain| cache.search_chain(*chain).unwrap().is_empty()));
    let mut ids: Vec<RecordId> = Vec::new();
    let table = plies_store::Table::<RecordId, plies_cache::RecordRow>::new("cache.records");
    store.read(|rows| rows.all(&table)).unwrap().into_iter().for_each(|(id, _)| ids.push(id));
    assert_eq!(ids, [parent.id()]);
    assert!(is_idle(&store));
}

#[test]
fn a24_missing_providers_are_reported_together_for_all_ancestors() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let layers = [Layer::file("a", "one"), Layer::file("b", "two"), Layer::file("c", "three"), Layer::file("d", "4")];
    let source = Source::of(&layers.each_ref());
    let a = lazy(&cache, &layers[0], None, &source);
    let b = lazy(&cache, &layers[1], Some(&a), &source);
    let c = lazy(&cache, &layers[2], None, &source);
    let d = lazy(&cache, &layers[3], None, &source);
    d.extract(&Cancel::new()).unwrap();
    let merge = cache.merge(&[Some(&b), Some(&c), Some(&d)], &RecordOptions::default()).unwrap().unwrap();
    let id = merge.id();
    drop((a, b, c, d, merge));
    let missing = |options: &RecordOptions| match cache.get(id, options) {
        Err(CacheError::NeedsProviders(mut missing)) => {
            missing.sort();
            missing
        }
        other => panic!("{other:?}"),
    };
    let sorted = |layers: &[&Layer]| {
        let mut digests: Vec<BlobDigest> = layers.iter().map(|layer| layer.digest()).collect();
        digests.sort();
        digests
    };
    assert_eq!(missing(&RecordOptions::default()), sorted(&[&layers[0], &layers[1], &layers[2]]), "d is here");
    assert_eq!(missing(&source.options(&[&layers[1]])), sorted(&[&layers[0], &layers[2]]));
    // A35: a get that failed leaves no ref and no other outcome behind.
    assert!(manager.held().is_empty());
    assert_eq!(missing(&source.options(&[&layers[1]])), sorted(&[&layers[0], &layers[2]]));
    // A37: what is brought together reaches every parent.
    let merge = cache.get(id, &source.options(&[&layers[0], &layers[1], &layers[2]])).unwrap();
    assert_eq!(read_file(&merge, "a").as_deref(), Some("one"));
    assert_eq!(source.opens(), 4);
}

#[test]
fn unlazying_is_done_once_however_many_ask() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let layer = Layer::file("f", &noise(10_000));
    let source = Source::of(&[&layer]);
    let record = lazy(&cache, &layer, None, &source);
    let start = Barrier::new(16);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                start.wait();
                record.extract(&Cancel::new()).unwrap();
            });
        }
    });
    assert_eq!(source.opens(), 1);
    assert_eq!(layers_count(&store), 1);
    assert!(eventually(|| is_idle(&store)));
}

#[test]
fn a_waiter_that_is_cancelled_leaves_the_others() {
    // Others who come too late, on a busy machine, rightly begin anew: they get more time to come then.
    let joined = (0..6).any(|attempt| opens_when_the_first_of_four_leaves(Duration::from_millis(50 << attempt)) == 1);
    assert!(joined, "the work ended with the waiter that began it");
}

fn opens_when_the_first_of_four_leaves(others_come_within: Duration) -> usize {
    let Some(rig) = Rig::new() else { return 1 };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let layer = Layer::file("f", &noise(10_000));
    let source = Source::of(&[&layer]);
    source.slow.store(true, Ordering::SeqCst);
    let record = lazy(&cache, &layer, None, &source);
    let (leaves, stays) = (Cancel::new(), Cancel::new());
    std::thread::scope(|scope| {
        // The one that began the work is the one that leaves.
        let first = scope.spawn(|| record.extract(&leaves));
        assert!(eventually(|| source.opens() == 1));
        let others: Vec<_> = (0..3).map(|_| scope.spawn(|| record.extract(&stays))).collect();
        std::thread::sleep(others_come_within);
        leaves.cancel();
        assert_eq!(first.join().unwrap().unwrap_err().kind(), ErrorKind::Canceled);
        assert!(others.iter().all(|other| !other.is_finished()));
        source.slow.store(false, Ordering::SeqCst);
        for other in others {
            assert!(other.join().unwrap().unwrap().is_some());
        }
    });
    assert!(eventually(|| is_idle(&store)));
    source.opens()
}

#[test]
fn when_all_are_cancelled_the_work_stops_and_leaves_nothing() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let layer = Layer::file("f", &noise(10_000));
    let source = Source::of(&[&layer]);
    source.slow.store(true, Ordering::SeqCst);
    let record = lazy(&cache, &layer, None, &source);
    let cancel = Cancel::new();
    std::thread::scope(|scope| {
        let waiters: Vec<_> = (0..3).map(|_| scope.spawn(|| record.extract(&cancel))).collect();
        assert!(eventually(|| source.opens() == 1));
        cancel.cancel();
        for waiter in waiters {
            assert_eq!(waiter.join().unwrap().unwrap_err().kind(), ErrorKind::Canceled);
        }
    });
    // At a byte a millisecond the rest would take a minute: it ends since it was told to.
    assert!(eventually(|| is_idle(&store)));
    assert_eq!((layers_count(&store), blobs(&store).len()), (0, 0));
    assert_eq!(row_of(&record).state, State::Lazy);
    let held: usize = manager.held().iter().map(|(_, holders)| holders.len()).sum();
    assert_eq!(held, 1, "only the ref of this test");
    assert_eq!(record.extract(&cancel).unwrap_err().kind(), ErrorKind::Canceled, "cancelled before it began");
    source.slow.store(false, Ordering::SeqCst);
    record.extract(&Cancel::new()).unwrap();
}

#[test]
fn a_providers_error_reaches_all_and_a_retry_works() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let layer = Layer::file("f", "text");
    let source = Source::of(&[&layer]);
    source.failing.store(true, Ordering::SeqCst);
    let record = lazy(&cache, &layer, None, &source);
    let start = Barrier::new(4);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                start.wait();
                let error = record.extract(&Cancel::new()).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Unavailable);
                let mut causes = vec![error.to_string()];
                let mut cause = std::error::Error::source(&error);
                while let Some(error) = cause {
                    causes.push(error.to_string());
                    cause = error.source();
                }
                assert!(causes.last().unwrap().contains("no route"), "{causes:?}");
            });
        }
    });
    assert!(eventually(|| is_idle(&store)));
    assert_eq!(row_of(&record).state, State::Lazy);
    source.failing.store(false, Ordering::SeqCst);
    assert_eq!(read_file(&record, "f").as_deref(), Some("text"));
}

#[test]
fn a_provider_that_panics_is_an_error_and_no_hang() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let layer = Layer::file("f", "text");
    let source = Source::of(&[&layer]);
    source.panicking.store(true, Ordering::SeqCst);
    let record = lazy(&cache, &layer, None, &source);
    assert_eq!(record.extract(&Cancel::new()).unwrap_err().kind(), ErrorKind::Unavailable);
    source.panicking.store(false, Ordering::SeqCst);
    record.extract(&Cancel::new()).unwrap();
}

#[test]
fn wrong_bytes_are_data_loss_and_nothing_of_them_stays() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let layer = Layer::new(&[Member::file("f", "text"), Member::file("g", noise(3000))], Packing::Gzip);
    let other = layer.repacked(Packing::Gzip);
    assert_eq!(other.digest(), layer.digest());
    let source = Source::of(&[&layer]);
    let record = lazy(&cache, &layer, None, &source);
    let half = layer.bytes.len() / 2;
    let mut flipped = layer.bytes.clone();
    flipped[half] ^= 1;
    let other_header = {
        // The same tar in a gzip with another name in its header: only the blob's digest differs.
        let mut bytes = layer.bytes.clone();
        bytes[10] ^= 1;
        bytes
    };
    let cases = [
        ("flipped", flipped),
        ("short", layer.bytes[..half].to_vec()),
        ("empty", Vec::new()),
        ("long", [&layer.bytes[..], &layer.bytes[..]].concat()),
        ("junk behind", [&layer.bytes[..], b"junk"].concat()),
        ("another header", other_header),
        ("another layer", Layer::file("f", "evil").bytes),
    ];
    let zstd = RemoteOptions { force: true, compression: plies_cache::LayerFormat::Zstd, ..RemoteOptions::default() };
    for (what, bytes) in cases {
        source.blobs.lock().unwrap().insert(layer.digest(), bytes);
        let error = record.extract(&Cancel::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DataLoss, "{what}: {error:?}");
        let error = record.get_remotes(true, &zstd, false, &Cancel::new()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DataLoss, "{what}, converted: {error:?}");
        assert!(eventually(|| is_idle(&store)), "{what}");
        assert_eq!((layers_count(&store), blobs(&store).len()), (0, 0), "{what}");
        assert_eq!(row_of(&record).state, State::Lazy);
    }
    // The right bytes, and a descriptor that lies of what they decompress to.
    let mut lie = layer.clone();
    lie.descriptor.annotations.insert(UNCOMPRESSED.into(), Layer::file("x", "y").diff_id().to_string());
    source.blobs.lock().unwrap().insert(layer.digest(), layer.bytes.clone());
    let lying = lazy(&cache, &lie, None, &source);
    assert_eq!(lying.extract(&Cancel::new()).unwrap_err().kind(), ErrorKind::DataLoss);
    assert_eq!(lying.get_remotes(true, &zstd, false, &Cancel::new()).unwrap_err().kind(), ErrorKind::DataLoss);
    assert_eq!((layers_count(&store), blobs(&store).len()), (0, 0));
    assert_eq!(read_file(&record, "f").as_deref(), Some("text"));
}

/// Sends far more than it should, and counts that.
#[derive(Clone, Default)]
struct Endless(Arc<std::sync::atomic::AtomicU64>);

impl Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        // Not for ever, or the test would do what it warns of.
        let sent = self.0.fetch_add(buffer.len() as u64, Ordering::SeqCst);
        Ok(if sent < 64 << 20 { buffer.len() } else { 0 })
    }
}

impl Provider for Endless {
    fn open(&self, _: &BlobRow) -> std::io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(self.clone()))
    }

    fn ranges(&self) -> Option<&dyn RangeProvider> {
        Some(self)
    }
}

impl RangeProvider for Endless {
    fn read_range(&self, _: &BlobRow, _: u64, length: u64) -> std::io::Result<Vec<u8>> {
        Ok(vec![0; usize::try_from(length).unwrap()])
    }
}

#[test]
fn a_provider_that_never_ends_does_not_fill_the_disk() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let layer = Layer::file("f", "text").repacked(Packing::Plain);
    let endless = Endless::default();
    let provider: Arc<dyn Provider> = Arc::new(endless.clone());
    assert_eq!(provider.ranges().unwrap().read_range(&dummy(&layer), 0, 3).unwrap(), [0; 3]);
    let options =
        RecordOptions { providers: [(layer.digest(), provider)].into_iter().collect(), ..RecordOptions::default() };
    let record = cache.get_by_blob(&layer.descriptor, None, &options).unwrap();
    assert_eq!(record.extract(&Cancel::new()).unwrap_err().kind(), ErrorKind::DataLoss);
    assert!(endless.0.load(Ordering::SeqCst) < 1 << 20, "it was read on and on");
    assert!(eventually(|| is_idle(&store)));
}

fn dummy(layer: &Layer) -> BlobRow {
    BlobRow {
        digest: Some(layer.digest()),
        diff_id: layer.diff_id(),
        media_type: layer.descriptor.media_type.to_string(),
        size_bytes: 0,
        urls: Vec::new(),
        annotations: Vec::new(),
    }
}

#[test]
fn only_what_a_tree_shows_is_fetched() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let layers = [Layer::file("a", "one"), Layer::file("b", "two"), Layer::file("c", "three")];
    let source = Source::of(&layers.each_ref());
    let a = lazy(&cache, &layers[0], None, &source);
    let b = lazy(&cache, &layers[1], Some(&a), &source);
    let c = lazy(&cache, &layers[2], None, &source);
    let diff = cache.diff(Some(&a), Some(&b), &RecordOptions::default()).unwrap();
    let merge = cache.merge(&[Some(&c), Some(&diff)], &RecordOptions::default()).unwrap().unwrap();
    assert_eq!(source.opens(), 0, "composing fetches nothing");
    merge.finalize().unwrap();
    assert_eq!(source.opens(), 0, "and finalizing neither");
    assert_eq!(read_file(&merge, "b").as_deref(), Some("two"));
    assert_eq!(read_file(&merge, "a"), None);
    let asked = source.asked_for.lock().unwrap().clone();
    assert!(!asked.contains(&layers[0].digest()), "what the diff leads from is no part of it");
    assert_eq!(asked.len(), 2);
    assert_eq!(row_of(&a).state, State::Lazy);
}

#[test]
fn privileged_a_layer_that_links_into_a_lower_one_is_unpacked_over_it() {
    for driver in [DriverKind::Auto, DriverKind::Overlay, DriverKind::Native] {
        let Some(rig) = Rig::with_driver(driver) else { return };
        let (store, manager) = rig.open();
        let cache = manager.accessor();
        let below = Layer::file("a", "one");
        let above = Layer::new(&[Member::hard_link("b", "a"), Member::file("c", "two")], Packing::Zstd);
        let source = Source::of(&[&below, &above]);
        let base = lazy(&cache, &below, None, &source);
        let top = lazy(&cache, &above, Some(&base), &source);
        // Its bytes alone, without its files, can be had in any form.
        let remote = top.get_remotes(true, &forced_gzip(), false, &Cancel::new()).unwrap().remove(0);
        assert_eq!(remote.descriptors.len(), 2);
        assert_eq!((layers_count(&store), source.opens()), (0, 1));
        for name in ["a", "b"] {
            assert_eq!(read_file(&top, name).as_deref(), Some("one"), "{name} with {driver:?}");
        }
        assert_eq!(read_file(&top, "c").as_deref(), Some("two"));
        assert_eq!(source.opens(), 2, "each blob once");
        let State::Sealed { layer: Some(layer) } = row_of(&top).state else { panic!("{:?}", row_of(&top)) };
        assert!(store.layers().info(layer).unwrap().chain_id.is_some(), "it is good for this chain alone");
        // Over another base it is another layer, of the same blob.
        let other = Layer::file("a", "ONE");
        source.blobs.lock().unwrap().insert(other.digest(), other.bytes.clone());
        let other_base = lazy(&cache, &other, None, &source);
        let other_top = lazy(&cache, &above, Some(&other_base), &source);
        assert_eq!(read_file(&other_top, "b").as_deref(), Some("ONE"));
        assert_eq!(read_file(&top, "b").as_deref(), Some("one"));
        assert_eq!(source.opens(), 3);
    }
}

fn forced_gzip() -> RemoteOptions {
    RemoteOptions { force: true, ..RemoteOptions::default() }
}
