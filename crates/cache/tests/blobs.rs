//! A record's layers as blobs: which chain comes out, what is made for it, and who shares it.
#![allow(missing_docs, clippy::unwrap_used)]

mod blob_rig;

use std::io::Read as _;
use std::sync::atomic::Ordering;
use std::time::Duration;

use blob_rig::{Layer, Rig, Source, blobs, built, is_idle, layers_count, lazy, read_file};
use plies_archive::compress::{Decoder, detect};
use plies_cache::{
    CREATED_AT, CacheError, ImmutableRef, LayerFormat, Providers, RecordOptions, Remote, RemoteOptions, State,
    UNCOMPRESSED,
};
use plies_oci::{BlobDigest, ChainId, Compression, Descriptor, DiffId, ErrorKind, MediaType};
use plies_store::{Cancel, GcMode, LeaseOptions, Rows as _};
use plies_testkit::image::Packing;

const FORMATS: [(LayerFormat, &str, Compression); 3] = [
    (LayerFormat::Uncompressed, "application/vnd.oci.image.layer.v1.tar", Compression::None),
    (LayerFormat::Gzip, "application/vnd.oci.image.layer.v1.tar+gzip", Compression::Gzip),
    (LayerFormat::Zstd, "application/vnd.oci.image.layer.v1.tar+zstd", Compression::Zstd),
];

fn as_format(compression: LayerFormat) -> RemoteOptions {
    RemoteOptions { compression, ..RemoteOptions::default() }
}

fn forced(compression: LayerFormat) -> RemoteOptions {
    RemoteOptions { force: true, ..as_format(compression) }
}

fn remotes(of: &ImmutableRef, create: bool, options: &RemoteOptions, all: bool) -> Vec<Remote> {
    of.get_remotes(create, options, all, &Cancel::new()).unwrap()
}

fn the_remote(of: &ImmutableRef, create: bool, options: &RemoteOptions) -> Remote {
    let mut remotes = remotes(of, create, options, false);
    assert_eq!(remotes.len(), 1);
    remotes.remove(0)
}

fn digests(remote: &Remote) -> Vec<BlobDigest> {
    remote.descriptors.iter().map(|descriptor| descriptor.digest).collect()
}

fn diff_id(descriptor: &Descriptor) -> DiffId {
    descriptor.annotations[UNCOMPRESSED].parse().unwrap()
}

/// Reads a blob and checks that it is what its descriptor says; the tar in it.
fn checked(remote: &Remote, descriptor: &Descriptor) -> Vec<u8> {
    let mut bytes = Vec::new();
    remote.open(descriptor).unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!((BlobDigest::of(&bytes), bytes.len() as u64), (descriptor.digest, descriptor.size_bytes));
    let limits = plies_archive::Limits::default();
    let mut tar = Vec::new();
    Decoder::new(&bytes[..], detect(&bytes), &limits).unwrap().read_to_end(&mut tar).unwrap();
    assert_eq!(format!("sha256:{}", plies_testkit::sha256_hex(&tar)), descriptor.annotations[UNCOMPRESSED]);
    tar
}

#[test]
fn without_create_a_record_without_blobs_has_no_remote_and_stays_as_it_was() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let open = cache.create(None, &RecordOptions::default()).unwrap();
    blob_rig::write(&open, "f", "text");
    let record = open.commit().unwrap();
    assert!(remotes(&record, false, &RemoteOptions::default(), true).is_empty());
    assert!(matches!(record.row().unwrap().state, State::Shared { .. }), "it was finalized for nothing");
    record.finalize().unwrap();
    assert!(remotes(&record, false, &RemoteOptions::default(), true).is_empty());
    assert!(record.row().unwrap().blob.is_none());
    assert!(blobs(&store).is_empty());
}

#[test]
fn create_makes_a_chain_in_the_form_that_is_asked_for() {
    for (format, media_type, _) in FORMATS {
        let Some(rig) = Rig::new() else { return };
        let (store, manager) = rig.open();
        let cache = manager.accessor();
        let base = built(&cache, None, "a", "one");
        rig.advance(Duration::from_micros(1_500_000));
        let top = built(&cache, Some(&base), "b", "two");
        let remote = the_remote(&top, true, &as_format(format));
        assert_eq!(remote.descriptors.len(), 2);
        for descriptor in &remote.descriptors {
            assert_eq!(descriptor.media_type.to_string(), media_type);
            checked(&remote, descriptor);
        }
        let times: Vec<&str> = remote.descriptors.iter().map(|d| d.annotations[CREATED_AT].as_str()).collect();
        assert_eq!(times, ["2022-03-01T00:00:00Z", "2022-03-01T00:00:01.5Z"]);
        // The same again, from what is there now, whatever form is asked for.
        assert_eq!(digests(&the_remote(&top, false, &as_format(LayerFormat::Zstd))), digests(&remote));
        assert_eq!(digests(&the_remote(&base, false, &RemoteOptions::default())), digests(&remote)[..1]);
        assert_eq!(blobs(&store).len(), 2);
        assert!(is_idle(&store));
        drop((top, base));
        assert!(rig.warnings.lock().unwrap().is_empty());
    }
}

#[test]
fn a13_an_exported_record_has_its_chain_ids_and_carries_children() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let base = built(&cache, None, "a", "one");
    let middle = built(&cache, Some(&base), "b", "two");
    let top = built(&cache, Some(&middle), "c", "three");
    let layer = Layer::file("d", "four");
    let source = Source::of(&[&layer]);
    let refused = cache.get_by_blob(&layer.descriptor, Some(&middle), &source.options(&[&layer])).unwrap_err();
    assert!(matches!(refused, CacheError::NotAddressable { id } if id == middle.id()), "{refused}");

    let remote = the_remote(&top, true, &RemoteOptions::default());
    let [a, b, c] = &remote.descriptors[..] else { panic!("three layers, not {}", remote.descriptors.len()) };
    // As A9 and A10 say.
    let own = |d: &Descriptor| BlobDigest::of(format!("{} {}", d.digest, diff_id(d)).as_bytes());
    let over = |below: BlobDigest, d: &Descriptor| BlobDigest::of(format!("{below} {}", own(d)).as_bytes());
    let expected = [
        (&base, ChainId::extend(None, diff_id(a)), own(a)),
        (&middle, ChainId::extend(Some(ChainId::extend(None, diff_id(a))), diff_id(b)), over(own(a), b)),
    ];
    for (record, chain_id, blob_chain_id) in expected {
        let row = record.row().unwrap();
        assert_eq!((row.chain_id, row.blob_chain_id), (Some(chain_id), Some(blob_chain_id)));
        assert_eq!(cache.search_chain(chain_id).unwrap(), [record.id()]);
        assert_eq!(cache.search_blob_chain(blob_chain_id).unwrap(), [record.id()]);
    }
    assert_eq!(top.row().unwrap().blob_chain_id, Some(over(over(own(a), b), c)));

    let child = lazy(&cache, &layer, Some(&middle), &source);
    assert_eq!(child.row().unwrap().parents, plies_cache::Parents::Layer(middle.id()));
    // A15: what was exported is found again by the descriptors that came out.
    let found = cache.get_by_blob(a, None, &RecordOptions::default()).unwrap();
    assert_eq!(found.id(), base.id());
    let found = cache.get_by_blob(b, Some(&found), &RecordOptions::default()).unwrap();
    assert_eq!(found.id(), middle.id());
}

#[test]
fn a_chain_of_another_form_is_kept_unless_forced_and_converting_keeps_diff_ids() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let top = built(&cache, Some(&built(&cache, None, "a", "one")), "b", "two");
    let first = the_remote(&top, true, &as_format(LayerFormat::Gzip));
    assert_eq!(digests(&the_remote(&top, true, &as_format(LayerFormat::Zstd))), digests(&first));
    let chains = top.row().unwrap();
    for (at, (format, media_type, _)) in FORMATS.into_iter().enumerate() {
        // Also without create: the record has its blobs, and these are only others of the same.
        let converted = the_remote(&top, false, &forced(format));
        let ids = |remote: &Remote| remote.descriptors.iter().map(diff_id).collect::<Vec<_>>();
        assert_eq!(ids(&converted), ids(&first));
        for (descriptor, before) in converted.descriptors.iter().zip(&first.descriptors) {
            assert_eq!(descriptor.media_type.to_string(), media_type);
            assert_eq!(descriptor.annotations[CREATED_AT], before.annotations[CREATED_AT]);
            checked(&converted, descriptor);
        }
        assert_eq!(digests(&converted) == digests(&first), format == LayerFormat::Gzip);
        assert_eq!(digests(&the_remote(&top, true, &forced(format))), digests(&converted));
        assert_eq!(blobs(&store).len(), [4, 4, 6][at]);
    }
    assert_eq!(top.row().unwrap(), chains, "a record's own blob and its chains stay");
    assert_eq!(digests(&the_remote(&top, false, &RemoteOptions::default())), digests(&first));
}

#[test]
fn variants_live_and_go_with_their_layer_and_are_counted_once() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    // The same layer in two records, on different parents.
    let layer = Layer::file("f", &"text ".repeat(1000));
    let source = Source::of(&[&layer]);
    let parents = [built(&cache, None, "a", "one"), built(&cache, None, "b", "two")];
    for parent in &parents {
        the_remote(parent, true, &RemoteOptions::default());
    }
    let [one, two] = [0, 1].map(|at| lazy(&cache, &layer, Some(&parents[at]), &source));
    assert_ne!(one.id(), two.id());
    one.extract(&Cancel::new()).unwrap();
    let before = blobs(&store).len();
    let zstd = the_remote(&one, true, &forced(LayerFormat::Zstd)).descriptors[1].clone();
    assert_eq!(blobs(&store).len(), before + 2, "one variant of the layer, one of its parent");
    let other = the_remote(&two, true, &forced(LayerFormat::Zstd)).descriptors[1].clone();
    assert_eq!(other.digest, zstd.digest, "the variant is the layer's");
    assert_eq!(blobs(&store).len(), before + 3);
    assert_eq!(source.opens(), 1);

    let collect = || store.gc(GcMode::Run).unwrap();
    let ids = [one.id(), two.id()];
    drop((one, two));
    collect();
    assert!(blobs(&store).contains(&zstd.digest));
    cache.remove(&ids[..1]).unwrap();
    collect();
    assert!(blobs(&store).contains(&zstd.digest), "another record has the layer");
    cache.remove(&ids[1..]).unwrap();
    collect();
    assert!(!blobs(&store).contains(&zstd.digest));
    assert!(!blobs(&store).contains(&layer.digest()));
}

#[test]
fn a_variant_that_was_made_for_another_record_is_kept_by_whoever_lists_it() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    // The same layer by two blobs: converted for the one while lazy, listed for the other, which is unpacked.
    let gzip = Layer::file("f", "text");
    let plain = gzip.repacked(Packing::Plain);
    let source = Source::of(&[&gzip, &plain]);
    let one = lazy(&cache, &gzip, None, &source);
    let other = lazy(&cache, &plain, None, &source);
    let zstd = digests(&the_remote(&one, false, &forced(LayerFormat::Zstd)));
    other.extract(&Cancel::new()).unwrap();
    assert_eq!(digests(&the_remote(&other, false, &forced(LayerFormat::Zstd))), zstd);
    let id = one.id();
    drop(one);
    cache.remove(&[id]).unwrap();
    store.gc(GcMode::Run).unwrap();
    assert!(blobs(&store).contains(&zstd[0]));
    assert!(!blobs(&store).contains(&gzip.digest()));
}

#[test]
fn all_lists_every_combination_of_variants_the_main_chain_first() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let base = built(&cache, None, "a", "one");
    let top = built(&cache, Some(&base), "b", "two");
    let gzip = digests(&the_remote(&top, true, &as_format(LayerFormat::Gzip)));
    let all = || -> Vec<Vec<BlobDigest>> {
        remotes(&top, false, &RemoteOptions::default(), true).iter().map(digests).collect()
    };
    assert_eq!(all(), std::slice::from_ref(&gzip));
    let zstd = digests(&the_remote(&top, true, &forced(LayerFormat::Zstd)));
    let tar = digests(&the_remote(&base, true, &forced(LayerFormat::Uncompressed)));
    let listed = all();
    assert_eq!(listed[0], gzip);
    let mut expected: Vec<Vec<BlobDigest>> = Vec::new();
    for below in [gzip[0], zstd[0], tar[0]] {
        expected.extend([gzip[1], zstd[1]].map(|above| vec![below, above]));
    }
    let sorted = |mut chains: Vec<Vec<BlobDigest>>| {
        chains.sort();
        chains
    };
    assert_eq!(sorted(listed), sorted(expected));
    for remote in remotes(&top, false, &RemoteOptions::default(), true) {
        remote.descriptors.iter().for_each(|descriptor| drop(checked(&remote, descriptor)));
    }
    assert_eq!(remotes(&top, false, &forced(LayerFormat::Zstd), true).len(), 1, "forced, there is one form only");
}

#[test]
fn a_lazy_record_is_listed_without_fetching_and_its_provider_carried_on() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let mut layer = Layer::file("f", "text");
    layer.descriptor.annotations.insert("org.example.note".into(), "kept".into());
    layer.descriptor.annotations.insert(CREATED_AT.into(), "1999-01-01T00:00:00Z".into());
    let source = Source::of(&[&layer]);
    let record = lazy(&cache, &layer, None, &source);
    let remote = the_remote(&record, false, &as_format(LayerFormat::Zstd));
    assert_eq!(source.opens(), 0);
    let [descriptor] = &remote.descriptors[..] else { panic!() };
    let mut expected = layer.descriptor.clone();
    expected.annotations.insert(CREATED_AT.into(), "2022-03-01T00:00:00Z".into());
    assert_eq!(*descriptor, expected);
    assert_eq!(checked(&remote, descriptor), layer.tar);
    assert_eq!(source.opens(), 1, "reading asks the provider");
    assert!(blobs(&store).is_empty(), "and keeps nothing");
    assert_eq!(record.row().unwrap().state, State::Lazy);
}

#[test]
fn converting_a_lazy_record_fetches_its_blob_once_and_unpacks_nothing() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let (below, above) = (Layer::file("a", "one"), Layer::new(&[], Packing::Zstd));
    let source = Source::of(&[&below, &above]);
    let base = lazy(&cache, &below, None, &source);
    let top = lazy(&cache, &above, Some(&base), &source);
    let remote = the_remote(&top, false, &forced(LayerFormat::Zstd));
    assert_eq!(*source.asked_for.lock().unwrap(), [below.digest()], "the upper layer is zstd already");
    assert_eq!(remote.descriptors[0].media_type, MediaType::ImageLayerZstd);
    assert_eq!(remote.descriptors[1].digest, above.digest());
    assert_eq!(checked(&remote, &remote.descriptors[0]), below.tar);
    assert_eq!((layers_count(&store), base.row().unwrap().state), (0, State::Lazy));
    // Kept with the blob that it was made of.
    store.gc(GcMode::Run).unwrap();
    assert_eq!(blobs(&store).len(), 2);
    assert_eq!(digests(&the_remote(&top, false, &forced(LayerFormat::Zstd))), digests(&remote));
    // And when it is unpacked later, nothing is fetched again.
    assert_eq!(read_file(&base, "a").as_deref(), Some("one"));
    assert_eq!(source.opens(), 1);
    store.gc(GcMode::Run).unwrap();
    assert_eq!(blobs(&store).len(), 2);
}

#[test]
fn a_lost_blob_is_made_again_from_files_or_asked_for_by_name() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let (gzip, other) = (Layer::file("f", "text"), Layer::file("g", "more"));
    let source = Source::of(&[&gzip, &other]);
    lazy(&cache, &gzip, None, &source).extract(&Cancel::new()).unwrap();
    // The same layer by another blob, which was never fetched and whose provider is gone.
    let zstd = gzip.repacked(Packing::Zstd);
    let id = lazy(&cache, &zstd, None, &source).id();
    let record = cache.get(id, &RecordOptions::default()).unwrap();
    let remote = the_remote(&record, false, &RemoteOptions::default());
    assert_eq!(remote.descriptors[0].digest, gzip.digest(), "what decompresses to the same stands in for it");
    assert_eq!(checked(&remote, &remote.descriptors[0]), gzip.tar);
    assert_eq!(record.row().unwrap().blob.unwrap().digest, Some(zstd.digest()), "and does not become its own");
    assert_eq!(source.opens(), 1);
}

#[test]
fn a24_blobs_that_nobody_has_are_named_all_at_once() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let layers = [Layer::file("a", "one"), Layer::file("b", "two"), Layer::file("c", "three")];
    let source = Source::of(&layers.each_ref());
    let mut refs: Vec<ImmutableRef> = Vec::new();
    for layer in &layers {
        let record = lazy(&cache, layer, refs.last(), &source);
        refs.push(record);
    }
    // A ref without providers on a record whose rows say so: found by going round the check of `get`.
    let bare = refs[2].clone();
    let top = cache.merge(&[Some(&bare)], &RecordOptions::default()).unwrap().unwrap();
    assert_eq!(top.id(), refs[2].id());
    let missing = cache.get(refs[2].id(), &RecordOptions::default()).unwrap_err();
    let CacheError::NeedsProviders(mut missing) = missing else { panic!("{missing}") };
    missing.sort();
    let mut expected = layers.each_ref().map(|layer| layer.digest()).to_vec();
    expected.sort();
    assert_eq!(missing, expected);
    assert!(is_idle(&store));
}

#[test]
fn a20_urls_and_media_types_follow_the_preference() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let plain = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    let mut with_urls = Layer::file("f", "text");
    with_urls.descriptor.media_type = MediaType::from(foreign);
    with_urls.descriptor.urls = vec!["https://example.org/layer".into()];
    let mut without_urls = Layer::file("g", "text");
    without_urls.descriptor.media_type = MediaType::from(foreign);
    let source = Source::of(&[&with_urls, &without_urls]);
    let prefer = RemoteOptions { prefer_non_distributable: true, ..RemoteOptions::default() };
    for (layer, options, media_type, urls) in [
        (&with_urls, &prefer, foreign, 1),
        (&with_urls, &RemoteOptions::default(), plain, 0),
        (&without_urls, &prefer, plain, 0),
        (&without_urls, &RemoteOptions::default(), plain, 0),
    ] {
        let record = lazy(&cache, layer, None, &source);
        let descriptor = the_remote(&record, false, options).descriptors.remove(0);
        assert_eq!((descriptor.media_type.to_string().as_str(), descriptor.urls.len()), (media_type, urls));
    }
    // Elsewhere are the bytes that were, not those that we make.
    let record = lazy(&cache, &with_urls, None, &source);
    let converted = RemoteOptions { prefer_non_distributable: true, ..forced(LayerFormat::Zstd) };
    let descriptor = the_remote(&record, false, &converted).descriptors.remove(0);
    assert_eq!((descriptor.media_type, descriptor.urls.len()), (MediaType::ImageLayerZstd, 0));
}

#[test]
fn merges_and_diffs_are_the_chain_of_their_layers() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let base = built(&cache, None, "a", "one");
    let left = built(&cache, Some(&base), "b", "two");
    let right = built(&cache, None, "c", "three");
    let diff = cache.diff(Some(&base), Some(&left), &RecordOptions::default()).unwrap();
    let merge = cache.merge(&[Some(&right), Some(&diff)], &RecordOptions::default()).unwrap().unwrap();
    let remote = the_remote(&merge, true, &RemoteOptions::default());
    assert_eq!(remote.descriptors.len(), 2, "the diff is the one layer that leads from one to the other");
    let left_remote = the_remote(&left, true, &RemoteOptions::default());
    assert_eq!(remote.descriptors[1].digest, left_remote.descriptors[1].digest);
    let chain = |ds: &[Descriptor]| ds.iter().fold(None, |chain, d| Some(ChainId::extend(chain, diff_id(d))));
    assert_eq!(merge.row().unwrap().chain_id, chain(&remote.descriptors));
    assert_eq!(right.row().unwrap().chain_id, chain(&remote.descriptors[..1]));
    assert_eq!(diff.row().unwrap().chain_id, chain(&remote.descriptors[1..]), "not that of all that it leads to");
    assert_eq!(left.row().unwrap().chain_id, chain(&left_remote.descriptors));
    assert!(merge.row().unwrap().blob.is_none());
    // A layer on top of a merge.
    let top = built(&cache, Some(&merge), "d", "four");
    let remote = the_remote(&top, true, &RemoteOptions::default());
    assert_eq!(remote.descriptors.len(), 3);
    assert_eq!(top.row().unwrap().chain_id, chain(&remote.descriptors));
}

#[test]
fn records_that_add_nothing_are_left_out() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let cache = manager.accessor();
    let nothing = |parent: Option<&ImmutableRef>| {
        let record = cache.create(parent, &RecordOptions::default()).unwrap().commit().unwrap();
        record.finalize().unwrap();
        assert_eq!(record.row().unwrap().state, State::Sealed { layer: None });
        record
    };
    let scratch = nothing(None);
    assert!(the_remote(&scratch, true, &RemoteOptions::default()).descriptors.is_empty());
    let base = built(&cache, Some(&scratch), "a", "one");
    let idle = nothing(Some(&base));
    let remote = the_remote(&idle, true, &RemoteOptions::default());
    assert_eq!(remote.descriptors.len(), 1);
    let (base_row, idle_row) = (base.row().unwrap(), idle.row().unwrap());
    assert_eq!(idle_row.chain_id, base_row.chain_id);
    assert!(idle_row.chain_id.is_some() && idle_row.blob.is_none());
    // Whoever asks by blob gets the record that has it.
    for _ in 0..8 {
        let found = cache.get_by_blob(&remote.descriptors[0], None, &RecordOptions::default()).unwrap();
        assert_eq!(found.id(), base.id());
    }
}

#[test]
fn many_who_ask_at_once_make_each_blob_once() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let noise: String = (0..20_000u32).map(|n| format!("{}\n", n.wrapping_mul(2_654_435_761))).collect();
    let base = built(&cache, None, "a", &noise);
    let top = built(&cache, Some(&base), "b", &format!("{noise}x"));
    let start = std::sync::Barrier::new(8);
    // Each would make another blob: levels give different bytes.
    let all: Vec<Vec<BlobDigest>> = std::thread::scope(|scope| {
        let ask = |level: i32| {
            let (start, top) = (&start, &top);
            move || {
                start.wait();
                let options = RemoteOptions { level: Some(level), ..RemoteOptions::default() };
                digests(&the_remote(top, true, &options))
            }
        };
        let threads: Vec<_> = (1..=8).map(|level| scope.spawn(ask(level))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(all.iter().all(|chain| *chain == all[0]), "{all:?}");
    assert_eq!(blobs(&store).len(), 2);
}

#[test]
fn levels_count_for_what_is_made() {
    let noise: String = (0..50_000u32).map(|n| format!("{}\n", n.wrapping_mul(2_654_435_761) % 1000)).collect();
    let size = |level| {
        let rig = Rig::new()?;
        let (_store, manager) = rig.open();
        let record = built(&manager.accessor(), None, "a", &noise);
        let options = RemoteOptions { level, ..RemoteOptions::default() };
        Some(the_remote(&record, true, &options).descriptors[0].size_bytes)
    };
    let Some(sizes) = [Some(1), None, Some(9)].map(size).into_iter().collect::<Option<Vec<u64>>>() else { return };
    assert!(sizes[0] > sizes[1] && sizes[1] != sizes[2], "{sizes:?}");
}

#[test]
fn estargz_is_refused_by_name() {
    let Some(rig) = Rig::new() else { return };
    let (_store, manager) = rig.open();
    let record = built(&manager.accessor(), None, "a", "one");
    let refused = record.get_remotes(true, &as_format(LayerFormat::Estargz), false, &Cancel::new()).unwrap_err();
    assert!(matches!(&refused, CacheError::Unwritable { name } if name == "estargz"));
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    assert!(refused.to_string().contains("estargz") && refused.to_string().contains("zstd"));
}

#[test]
fn a_cancelled_export_leaves_nothing_on_its_way() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let noise: String = (0..20_000u32).map(|n| format!("{}\n", n.wrapping_mul(2_654_435_761))).collect();
    let layer = Layer::file("a", &noise);
    let source = Source::of(&[&layer]);
    source.slow.store(true, Ordering::SeqCst);
    let record = lazy(&cache, &layer, None, &source);
    let cancel = Cancel::new();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| record.get_remotes(true, &forced(LayerFormat::Zstd), false, &cancel));
        assert!(plies_testkit::eventually(|| source.opens() == 1));
        cancel.cancel();
        assert_eq!(asked.join().unwrap().unwrap_err().kind(), ErrorKind::Canceled);
    });
    assert!(plies_testkit::eventually(|| is_idle(&store)));
    assert!(blobs(&store).is_empty());
    assert_eq!(record.row().unwrap().state, State::Lazy);
    // And it works the next time.
    source.slow.store(false, Ordering::SeqCst);
    the_remote(&record, true, &forced(LayerFormat::Zstd));
}

#[test]
fn the_store_provides_ranges_of_what_it_has() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let record = built(&manager.accessor(), None, "a", "some text");
    let remote = the_remote(&record, true, &as_format(LayerFormat::Uncompressed));
    let descriptor = &remote.descriptors[0];
    let tar = checked(&remote, descriptor);
    let provider = remote.providers.get(descriptor.digest).unwrap();
    let blob = record.row().unwrap().blob.unwrap();
    let ranges = provider.ranges().unwrap();
    assert_eq!(ranges.read_range(&blob, 100, 50).unwrap(), tar[100..150]);
    let end = tar.len() as u64;
    assert_eq!(ranges.read_range(&blob, end - 3, 50).unwrap(), tar[tar.len() - 3..]);
    assert!(ranges.read_range(&blob, end + 3, 50).unwrap().is_empty());
    let nobody = Remote { descriptors: remote.descriptors.clone(), providers: Providers::none() };
    assert!(matches!(nobody.open(descriptor), Err(CacheError::NeedsProviders(_))));
    drop(store);
}

#[test]
fn what_an_export_wrote_down_survives_a_restart() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let record = built(&manager.accessor(), None, "a", "one");
    let id = record.id();
    let before = the_remote(&record, true, &RemoteOptions::default()).descriptors;
    drop(record);
    manager.close().unwrap();
    store.close().unwrap();
    let (store, manager) = rig.open();
    store.gc(GcMode::Run).unwrap();
    let record = manager.accessor().get(id, &RecordOptions::default()).unwrap();
    let remote = the_remote(&record, false, &RemoteOptions::default());
    assert_eq!(remote.descriptors, before);
    checked(&remote, &remote.descriptors[0]);
}

#[test]
fn a_record_of_an_older_version_is_a_chain_of_its_stack() {
    let Some(rig) = Rig::new() else { return };
    let (store, manager) = rig.open();
    let cache = manager.accessor();
    let top = built(&cache, Some(&built(&cache, None, "a", "one")), "b", "two");
    let snapshot = top.extract(&Cancel::new()).unwrap().unwrap();
    // As version 1 wrote it: one record for the whole stack.
    let mut row = top.row().unwrap();
    let id = top.id();
    row.state = State::Stack(snapshot);
    row.parents = plies_cache::Parents::None;
    let lease = store.lease(LeaseOptions::process("test")).unwrap();
    assert!(store.read(|rows| rows.has(snapshot)).unwrap() && lease.hold_if_present(snapshot).unwrap());
    blob_rig::put_row(&store, id, &row);
    assert!(remotes(&top, false, &RemoteOptions::default(), false).is_empty());
    let remote = the_remote(&top, true, &RemoteOptions::default());
    assert_eq!(remote.descriptors.len(), 2);
    remote.descriptors.iter().for_each(|descriptor| drop(checked(&remote, descriptor)));
    let row = top.row().unwrap();
    assert!(row.blob.is_none() && row.chain_id.is_some());
    assert_eq!(digests(&the_remote(&top, false, &RemoteOptions::default())), digests(&remote));
    let layer = Layer::file("c", "three");
    lazy(&cache, &layer, Some(&top), &Source::of(&[&layer]));
}
