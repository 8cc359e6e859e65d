//! Blobs, ingests, leases and collection, as the crates above use them.

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use common::{Rig, assert_healthy, owner, process_lease, put_blob};
use plies_oci::{BlobDigest, ErrorKind};
use plies_store::{
    BlobError, CatalogueError, CommitError, Expected, GcMode, IngestError, IngestRef, LeaseOptions, OpenError,
    Resource, Row, Rows as _, Store, Table, UsageKind, WaitPolicy, held_by,
};

fn blob_file(rig: &Rig, digest: BlobDigest) -> std::path::PathBuf {
    rig.root().join("content/blobs/sha256").join(digest.hex())
}

#[test]
fn a_blob_comes_back_as_it_was_written() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let digest = put_blob(&store, b"hello, blob", &lease);
    let mut blob = store.content().open(digest).unwrap();
    assert_eq!(blob.size_bytes(), 11);
    let mut text = String::new();
    blob.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello, blob");
    blob.seek(SeekFrom::Start(7)).unwrap();
    text.clear();
    blob.read_to_string(&mut text).unwrap();
    assert_eq!(text, "blob");
    assert_eq!(lease.resources().unwrap(), [Resource::Blob(digest)]);
    assert_eq!(fs::metadata(blob_file(&rig, digest)).unwrap().permissions().mode() & 0o777, 0o444);
    assert_eq!(fs::read_dir(rig.root().join("content/ingest")).unwrap().count(), 0);
    assert_healthy(&store);
}

#[test]
fn state_directories_are_private() {
    let rig = Rig::new();
    let _store = rig.open();
    for dir in ["", "catalog", "content", "content/blobs", "layers", "active", "mounts", "run"] {
        let mode = fs::metadata(rig.root().join(dir)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o700, "{dir:?} is {mode:o}");
    }
    let layout = fs::read_to_string(rig.root().join("content/oci-layout")).unwrap();
    assert_eq!(layout, r#"{"imageLayoutVersion":"1.0.0"}"#);
}

#[test]
fn size_is_checked_before_digest_and_a_mismatch_leaves_nothing() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let wrong = BlobDigest::of(b"something else");
    for (expected, size_first) in [
        (Expected { digest: Some(wrong), size_bytes: Some(3) }, true),
        (Expected { digest: Some(wrong), size_bytes: Some(5) }, false),
        (Expected::digest(wrong), false),
    ] {
        let mut ingest = store.content().ingest(IngestRef::new("a")).unwrap();
        ingest.write_all(b"bytes").unwrap();
        let error = ingest.commit(expected, &lease).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DataLoss);
        assert_eq!(matches!(error, CommitError::SizeMismatch { .. }), size_first, "{error}");
        assert!(store.content().ingests().unwrap().is_empty());
        assert!(lease.resources().unwrap().is_empty());
    }
    assert_eq!(fs::read_dir(rig.root().join("content/blobs/sha256")).unwrap().count(), 0);
    assert_healthy(&store);
}

#[test]
fn committing_a_blob_that_is_there_succeeds_and_drops_the_ingest() {
    let rig = Rig::new();
    let store = rig.open();
    let (first, second) = (process_lease(&store), process_lease(&store));
    let digest = put_blob(&store, b"twice", &first);
    assert_eq!(put_blob(&store, b"twice", &second), digest);
    assert_eq!(second.resources().unwrap(), [Resource::Blob(digest)]);
    assert!(store.content().ingests().unwrap().is_empty());
    first.release().unwrap();
    assert!(store.gc(GcMode::Run).unwrap().collected.is_empty(), "the second lease still holds it");
    assert_healthy(&store);
}

#[test]
fn an_ingest_is_resumed_by_another_process_and_hashed_again() {
    let rig = Rig::new();
    let key = IngestRef::new("layer-1");
    {
        let store = rig.open();
        let mut ingest = store.content().ingest(key.clone()).unwrap();
        ingest.write_all(b"first half, ").unwrap();
        let error = store.content().ingest(key.clone()).unwrap_err();
        assert!(matches!(error, IngestError::Busy { .. }));
        assert_eq!(error.kind(), ErrorKind::Busy);
    }
    let store = rig.open();
    let lease = process_lease(&store);
    let [status] = &store.content().ingests().unwrap()[..] else { panic!("one ingest") };
    assert_eq!((status.ingest.clone(), status.offset_bytes), (key.clone(), 12));
    // As a commit that was interrupted between its sync and its rename leaves it.
    let dir = fs::read_dir(rig.root().join("content/ingest")).unwrap().next().unwrap().unwrap().path();
    fs::set_permissions(dir.join("data"), fs::Permissions::from_mode(0o444)).unwrap();
    let mut ingest = store.content().ingest(key).unwrap();
    assert_eq!(ingest.offset_bytes(), 12);
    ingest.write_all(b"second half").unwrap();
    let digest = ingest.commit(Expected::digest(BlobDigest::of(b"first half, second half")), &lease).unwrap();
    assert_eq!(store.content().info(digest).unwrap().unwrap().size_bytes, 23);
    assert_healthy(&store);
}

#[test]
fn a_resumed_ingest_that_a_crash_damaged_does_not_pass() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let key = IngestRef::new("damaged");
    let mut ingest = store.content().ingest(key.clone()).unwrap();
    ingest.write_all(b"good bytes").unwrap();
    drop(ingest);
    let dir = fs::read_dir(rig.root().join("content/ingest")).unwrap().next().unwrap().unwrap().path();
    fs::write(dir.join("data"), b"bad! bytes").unwrap();
    let ingest = store.content().ingest(key).unwrap();
    let error = ingest.commit(Expected::digest(BlobDigest::of(b"good bytes")), &lease).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DataLoss);
}

#[test]
fn an_ingest_can_start_over_or_be_given_up() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let mut ingest = store.content().ingest(IngestRef::new("x")).unwrap();
    ingest.write_all(b"wrong").unwrap();
    ingest.restart().unwrap();
    assert_eq!(ingest.offset_bytes(), 0);
    ingest.write_all(b"right").unwrap();
    let digest = ingest.commit(Expected::anything(), &lease).unwrap();
    assert_eq!(digest, BlobDigest::of(b"right"));

    let mut ingest = store.content().ingest(IngestRef::new("y")).unwrap();
    ingest.write_all(b"no").unwrap();
    assert_eq!(store.content().abort(&IngestRef::new("y")).unwrap_err().kind(), ErrorKind::Busy);
    ingest.abort().unwrap();
    assert!(!store.content().abort(&IngestRef::new("y")).unwrap());
    drop(store.content().ingest_unnamed().unwrap());
    assert!(store.content().ingests().unwrap().is_empty());
    rig.assert_no_warnings();
}

#[test]
fn many_ingests_become_blobs_together_or_not_at_all() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let texts: Vec<String> = (0..20).map(|n| format!("blob {n}")).collect();
    let ingests = |broken: Option<usize>| {
        let begin = |(at, text): (usize, &String)| {
            let mut ingest = store.content().ingest(IngestRef::new(text)).unwrap();
            ingest.restart().unwrap();
            ingest.write_all(if broken == Some(at) { b"broken" } else { text.as_bytes() }).unwrap();
            (ingest, Expected::digest(BlobDigest::of(text.as_bytes())))
        };
        texts.iter().enumerate().map(begin).collect::<Vec<_>>()
    };
    let error = store.content().commit_all(ingests(Some(7)), &lease).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DataLoss);
    assert!(lease.resources().unwrap().is_empty());
    assert_eq!(store.content().ingests().unwrap().len(), 19, "only the broken one is gone");

    let digests = store.content().commit_all(ingests(None), &lease).unwrap();
    assert_eq!(digests, texts.iter().map(|text| BlobDigest::of(text.as_bytes())).collect::<Vec<_>>());
    assert_eq!(lease.resources().unwrap().len(), 20);
    assert_healthy(&store);
}

#[test]
fn a_missing_or_short_blob_is_data_loss_and_heals_when_it_comes_again() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let digest = put_blob(&store, b"precious", &lease);
    let absent = BlobDigest::of(b"never seen");
    assert_eq!(store.content().open(absent).unwrap_err().kind(), ErrorKind::NotFound);

    fs::remove_file(blob_file(&rig, digest)).unwrap();
    let error = store.content().open(digest).unwrap_err();
    assert!(matches!(error, BlobError::Damaged { actual: None, .. }), "{error}");
    assert_eq!(error.kind(), ErrorKind::DataLoss);
    put_blob(&store, b"precious", &lease);
    store.content().open(digest).unwrap();

    fs::remove_file(blob_file(&rig, digest)).unwrap();
    fs::write(blob_file(&rig, digest), b"prec").unwrap();
    let error = store.content().open(digest).unwrap_err();
    assert!(matches!(error, BlobError::Damaged { actual: Some(4), expected: 8, .. }), "{error}");
    put_blob(&store, b"precious", &lease);
    assert_healthy(&store);
}

#[test]
fn check_reads_what_the_catalogue_cannot_know() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let digest = put_blob(&store, b"same size", &lease);
    fs::remove_file(blob_file(&rig, digest)).unwrap();
    fs::write(blob_file(&rig, digest), b"SAME SIZE").unwrap();
    fs::write(rig.root().join("content/blobs/sha256/stray"), b"").unwrap();
    let found = store.check(&plies_store::CheckOptions::deep()).unwrap().found;
    let codes: Vec<&str> = found.iter().map(|finding| finding.code).collect();
    assert_eq!(codes, ["blob-mode-wrong", "blob-damaged", "blob-unlisted"], "{found:#?}");
    assert!(found[1].what.contains("hash to") && found[2].subject.ends_with("/stray"), "{found:#?}");
}

#[test]
fn gc_keeps_what_leases_owners_and_edges_hold_and_nothing_else() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let manifest = put_blob(&store, b"manifest", &lease);
    let config = put_blob(&store, b"config", &lease);
    let leased = put_blob(&store, b"leased", &lease);
    let garbage = put_blob(&store, b"garbage!", &lease);
    store
        .write(|tx| {
            tx.add_edge(manifest, config)?;
            tx.hold(&owner("image"), manifest)
        })
        .unwrap();
    let keeper = process_lease(&store);
    assert!(keeper.hold_if_present(leased).unwrap());
    lease.release().unwrap();

    let dry = store.gc(GcMode::DryRun).unwrap();
    assert!(store.content().info(garbage).unwrap().is_some(), "a dry run removes nothing");
    let report = store.gc(GcMode::Run).unwrap();
    assert_eq!(report, dry);
    assert_eq!(report.collected.len(), 1);
    assert_eq!((report.collected[0].resource, report.freed_bytes, report.kept_count), (garbage.into(), 8, 3));
    assert!(!blob_file(&rig, garbage).exists());
    assert_healthy(&store);

    assert_eq!(store.read(|tx| held_by(tx, &owner("image"))).unwrap(), [Resource::Blob(manifest)]);
    assert_eq!(store.write(|tx| tx.unhold_all(&owner("image"))).unwrap(), 1);
    keeper.release().unwrap();
    assert_eq!(store.gc(GcMode::Run).unwrap().collected.len(), 3, "the edge goes with the manifest");
    assert!(store.usage().unwrap().iter().all(|row| matches!(
        row.kind,
        UsageKind::Catalogue | UsageKind::Directories | UsageKind::Reserve | UsageKind::Scratch
    ) || row.count == 0));
    assert_healthy(&store);
}

#[test]
fn nothing_is_held_that_is_not_there() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let absent = BlobDigest::of(b"absent");
    assert!(!lease.hold_if_present(absent).unwrap());
    let there = put_blob(&store, b"there", &lease);
    for error in [
        store.write(|tx| tx.hold(&owner("x"), absent)).unwrap_err(),
        store.write(|tx| tx.add_edge(there, absent)).unwrap_err(),
        store.write(|tx| tx.add_edge(absent, there)).unwrap_err(),
    ] {
        assert!(matches!(error, CatalogueError::NoSuchResource { .. }), "{error}");
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
    assert_healthy(&store);
}

#[test]
fn r10_leases_with_expiry_survive_restarts_and_end_by_the_injected_clock() {
    let rig = Rig::new();
    let hour = Duration::from_secs(3600);
    let (digest, id) = {
        let store = rig.open();
        let lease = store.lease(LeaseOptions::expiring("download", hour)).unwrap();
        let digest = put_blob(&store, b"for an hour", &lease);
        (digest, lease.id())
    };
    let store = rig.open();
    assert!(store.gc(GcMode::Run).unwrap().collected.is_empty());
    assert_eq!(store.leases().unwrap()[0].label, "download");
    rig.advance(hour);
    let lease = store.reopen_lease(id).unwrap();
    assert!(matches!(lease.hold_if_present(digest), Err(CatalogueError::NoSuchLease { .. })));
    let report = store.gc(GcMode::Run).unwrap();
    assert_eq!((report.leases, report.collected.len()), (vec![id], 1));
    assert!(matches!(store.reopen_lease(id), Err(CatalogueError::NoSuchLease { .. })));
    assert_healthy(&store);
}

#[test]
fn leases_of_a_process_that_is_gone_are_dropped_at_open() {
    let rig = Rig::new();
    {
        let store = rig.open();
        let lease = process_lease(&store);
        put_blob(&store, b"x", &lease);
        // As a kill would: no destructor of the lease runs, but the store's lock goes.
        let id = lease.id();
        store.write(|tx| tx.hold(&owner("x"), BlobDigest::of(b"x"))).unwrap();
        drop(lease);
        assert!(store.leases().unwrap().iter().all(|lease| lease.id != id));
    }
    let store = rig.open();
    assert!(store.leases().unwrap().is_empty());
    assert_healthy(&store);
}

#[test]
fn abandoned_ingests_go_with_age_and_open_ones_stay() {
    let rig = Rig::new();
    let store = rig.open();
    let mut open = store.content().ingest(IngestRef::new("open")).unwrap();
    open.write_all(b"12345").unwrap();
    let mut left = store.content().ingest(IngestRef::new("left")).unwrap();
    left.write_all(b"123").unwrap();
    drop(left);
    // Their times are the file system's, long before the tests' clock.
    let dry = store.gc(GcMode::DryRun).unwrap();
    let report = store.gc(GcMode::Run).unwrap();
    assert_eq!(report, dry);
    assert_eq!(report.ingests.iter().map(|status| status.ingest.as_str()).collect::<Vec<_>>(), ["left"]);
    assert_eq!(report.freed_bytes, 3);
    assert_eq!(store.content().ingests().unwrap().len(), 1);
}

#[test]
fn usage_is_the_sum_of_the_rows() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    put_blob(&store, &[7; 1000], &lease);
    put_blob(&store, &[8; 234], &lease);
    put_blob(&store, &[8; 234], &lease);
    let mut ingest = store.content().ingest(IngestRef::new("i")).unwrap();
    ingest.write_all(b"four").unwrap();
    let of = |kind| store.usage().unwrap().into_iter().find(|row| row.kind == kind).unwrap();
    assert_eq!((of(UsageKind::Blobs).count, of(UsageKind::Blobs).size_bytes), (2, 1234));
    assert_eq!((of(UsageKind::Ingests).count, of(UsageKind::Ingests).size_bytes), (1, 4));
    assert!(of(UsageKind::Catalogue).size_bytes > 0);
}

#[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct Stamped {
    uses: u32,
}

impl Row for Stamped {
    const VERSION: u8 = 1;
}

const STAMPS: Table<(String, u64), Stamped> = Table::new("test.stamps");

#[test]
fn other_crates_keep_their_rows_in_the_same_transaction() {
    let rig = Rig::new();
    {
        let store = rig.open();
        let lease = process_lease(&store);
        let digest = put_blob(&store, b"x", &lease);
        store
            .write(|tx| {
                tx.hold(&owner("x"), digest)?;
                for n in 0..600 {
                    tx.put(&STAMPS, &(format!("k{}", n % 2), n), &Stamped { uses: 1 })?;
                }
                // A scan inside a write may look at other rows, over page boundaries.
                let mut seen = 0;
                tx.scan_prefix(&STAMPS, &"k1".to_owned(), |key, _| {
                    assert!(tx.contains(&STAMPS, &key).unwrap());
                    seen += 1;
                    std::ops::ControlFlow::Continue(())
                })?;
                assert_eq!(seen, 300);
                Ok::<_, CatalogueError>(())
            })
            .unwrap();
        store.write_lazily(|tx| tx.put(&STAMPS, &("k0".to_owned(), 0), &Stamped { uses: 2 }).map(drop)).unwrap();
    }
    let store = rig.open();
    assert_eq!(store.read(|tx| tx.get(&STAMPS, &("k0".to_owned(), 0))).unwrap(), Some(Stamped { uses: 2 }));
    assert_eq!(store.read(|tx| tx.prefixed(&STAMPS, &"k0".to_owned())).unwrap().len(), 300);
    assert!(store.gc(GcMode::Run).unwrap().collected.is_empty());
}

#[test]
fn stores_that_cannot_be_opened_say_why() {
    let rig = Rig::new();
    let mut options = rig.options();
    options.create = false;
    let error = Store::open(&rig.root(), options, WaitPolicy::Fail).unwrap_err();
    assert!(matches!(error, OpenError::Missing { .. }), "{error}");
    assert!(!rig.root().exists(), "looking for a store makes none");

    let store = rig.open();
    let error = Store::open(&rig.root(), rig.options(), WaitPolicy::Fail).unwrap_err();
    let OpenError::InUse { holder } = &error else { panic!("{error}") };
    assert_eq!((holder.pid, holder.command.as_str()), (Some(std::process::id()), "test"));
    assert_eq!(error.kind(), ErrorKind::Busy);
    let lease = process_lease(&store);
    put_blob(&store, b"data", &lease);
    drop(lease);
    store.close().unwrap();

    let database = rig.root().join("catalog/plies.redb");
    let good = fs::read(&database).unwrap();
    let fails = || Store::open(&rig.root(), rig.options(), WaitPolicy::Fail).unwrap_err();
    for bytes in [&b""[..], b"not a database", &good[..good.len() / 3]] {
        fs::write(&database, bytes).unwrap();
        let error = fails();
        assert!(matches!(error, OpenError::Corrupt { .. }), "{} bytes: {error:?}", bytes.len());
        assert_eq!(error.kind(), ErrorKind::DataLoss);
        assert_eq!(fs::read(&database).unwrap(), bytes, "a store that is corrupt is left as it is");
    }
    fs::remove_file(&database).unwrap();
    let error = fails();
    assert!(matches!(error, OpenError::CatalogueMissing { .. }), "{error}");

    fs::write(&database, &good).unwrap();
    let store = rig.open();
    const META: Table<String, u64> = Table::new("meta");
    store.write(|tx| tx.put(&META, &"schema".to_owned(), &99)).unwrap();
    drop(store);
    let error = fails();
    assert!(matches!(error, OpenError::TooNew { found: 99, supported: 3 }), "{error}");
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
}

#[test]
fn reading_leaves_no_trace() {
    let rig = Rig::new();
    drop(rig.open());
    let database = rig.root().join("catalog/plies.redb");
    let before = fs::metadata(&database).unwrap().len();
    let store = rig.open();
    store.usage().unwrap();
    store.gc(GcMode::DryRun).unwrap();
    drop(store);
    assert_eq!(fs::metadata(&database).unwrap().len(), before);
    const META: Table<String, u64> = Table::new("meta");
    let store = rig.open();
    assert_eq!(store.read(|tx| tx.get(&META, &"session".to_owned())).unwrap(), None);
}

#[test]
fn publish_and_collect_the_same_blob_at_once() {
    // Hazard: a collection unlinks what was published again after its row had gone.
    let rig = Rig::new();
    let store = rig.open();
    std::thread::scope(|scope| {
        let publisher = scope.spawn(|| {
            for _ in 0..60 {
                let lease = process_lease(&store);
                let digest = put_blob(&store, b"contended", &lease);
                store.content().open(digest).unwrap();
                lease.release().unwrap();
            }
        });
        while !publisher.is_finished() {
            store.gc(GcMode::Run).unwrap();
        }
        publisher.join().unwrap();
    });
    assert_healthy(&store);
}

#[test]
fn i10_a_catalogue_with_flipped_bits_is_reported_and_never_panics_at_open() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    for n in 0..50u32 {
        let digest = put_blob(&store, &n.to_be_bytes(), &lease);
        store.write(|tx| tx.hold(&owner(n), digest)).unwrap();
    }
    lease.release().unwrap();
    store.close().unwrap();
    let database = rig.root().join("catalog/plies.redb");
    let good = fs::read(&database).unwrap();
    let mut refused = 0;
    // A fixed walk over the file, so that a failure can be found again.
    for step in 0..150usize {
        let at = if step < 64 { step * 5 } else { step * 7919 * 64 % good.len() };
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (step % 8);
        fs::write(&database, &bytes).unwrap();
        match Store::open(&rig.root(), rig.options(), WaitPolicy::Fail) {
            Ok(store) => drop(store),
            Err(error) => {
                refused += 1;
                assert!(matches!(error.kind(), ErrorKind::DataLoss | ErrorKind::FailedPrecondition), "{at}: {error:?}");
            }
        }
    }
    assert!(refused > 0);
}
