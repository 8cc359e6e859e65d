//! How long disk usage and prune take, by the number of records: `cargo bench -p plies-cache --bench space [-- COUNT… [du]]`.
//!
//! With `du` nothing but the sums is measured, so that a million records are no matter of an hour.
//!
//! Records are rows in chains of ten, each with a blob of its own that costs 100 bytes and is a row as well, with the two rows
//! that say which tar it holds: nothing is unpacked, so what is measured is the catalogue. "du" is the sums by kind (with an empty file for each blob, since names
//! are counted), "records" the list of all records. While it is pruned, two others write: one waits until it is durable, and
//! so for the disk, the other does not: how long that one waits is how long anything is locked.
#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use plies_archive::Limits;
use plies_cache::{
    BlobRow, Manager, ManagerOptions, Parents, PruneOptions, RecordId, RecordRow, RecordType, State, UsageOptions,
    UseRow,
};
use plies_oci::{BlobDigest, Compression, DiffId};
use plies_store::{Cancel, CatalogueError, OpenOptions, Owner, Row, Stamp, Store, Table, WaitPolicy};

/// As in `ply`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const RECORDS: Table<RecordId, RecordRow> = Table::new("cache.records");
const CHILDREN: Table<(RecordId, RecordId), ()> = Table::new("cache.children");
const USES: Table<RecordId, UseRow> = Table::new("cache.uses");
const BLOBS: Table<BlobDigest, StoredBlob> = Table::new("blobs");
const BLOBS_OF_DIFF: Table<(DiffId, BlobDigest), StoredLayerBlob> = Table::new("image.blobs");
const DIFF_OF_BLOB: Table<BlobDigest, StoredDiffId> = Table::new("image.diffs");
const OTHERS: Table<u64, u64> = Table::new("bench.others");

/// As the store keeps it.
#[derive(serde::Serialize, serde::Deserialize)]
struct StoredBlob {
    size_bytes: u64,
    created: Stamp,
}

impl Row for StoredBlob {
    const VERSION: u8 = 1;
}

/// As the store keeps it.
#[derive(serde::Serialize, serde::Deserialize)]
struct StoredLayerBlob {
    size_bytes: u64,
    compression: Compression,
    made_at_level: Option<i32>,
}

impl Row for StoredLayerBlob {
    const VERSION: u8 = 2;
}

/// As the store keeps it.
#[derive(serde::Serialize, serde::Deserialize)]
struct StoredDiffId(DiffId);

impl Row for StoredDiffId {
    const VERSION: u8 = 1;
}

fn main() {
    let counts: Vec<u64> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    let counts = if counts.is_empty() { vec![1_000, 10_000, 100_000] } else { counts };
    println!(
        "{:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        "count",
        "make",
        "du",
        "records",
        "again",
        "dry run",
        "half",
        "per s",
        "with gc",
        "all",
        "p99 sync",
        "max sync",
        "p99 lock",
        "max lock"
    );
    for count in counts {
        measure(count);
    }
}

fn timed<T>(work: impl FnOnce() -> T) -> (Duration, T) {
    let began = Instant::now();
    let result = work();
    (began.elapsed(), result)
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

fn measure(count: u64) {
    let dir = tempfile::Builder::new().tempdir_in(std::env::current_dir().unwrap().join("../../target")).unwrap();
    let options = OpenOptions::new(Arc::new(SystemTime::now));
    let store = Store::open(&dir.path().join("store"), options, WaitPolicy::Fail).unwrap();
    let manager_options =
        ManagerOptions { limits: Limits::default(), checker: None, warn: Arc::new(|error| eprintln!("{error}")) };
    let manager = Manager::open(store.clone(), manager_options).unwrap();
    let control = manager.controller();
    let (make, ()) = timed(|| make(&store, count));

    let blobs = store.root().join("content/blobs/sha256");
    let files = (0..count).map(|n| blobs.join(blob(n).hex()));
    files.clone().for_each(|path| drop(std::fs::File::create(path).unwrap()));
    let (sums, _) = timed(|| store.usage().unwrap());
    if std::env::args().any(|arg| arg == "du") {
        println!("{count:>9} {:>9} {:>9}", ms(make), ms(sums));
        return;
    }
    files.for_each(|path| std::fs::remove_file(path).unwrap());

    let du = || control.scan_usage(&UsageOptions::default(), &mut |_| ()).unwrap();
    let (first, totals) = timed(du);
    assert_eq!((totals.records_count, totals.total_bytes), (count, count * 100));
    let (again, _) = timed(du);

    let half = [PruneOptions { max_used_space_bytes: count * 100 / 2, ..PruneOptions::default() }];
    let (dry, _) = timed(|| control.prune_dry_run(&half, &mut |_| (), &Cancel::new()).unwrap());

    let stop = AtomicBool::new(false);
    let began = Instant::now();
    let mut rows = Duration::ZERO;
    // What another thread waits, again and again, for its own work to be done.
    let others = |work: &(dyn Fn(u64) + Sync)| {
        let mut waits = Vec::new();
        while !stop.load(Ordering::SeqCst) {
            waits.push(timed(|| work(waits.len() as u64)).0);
            std::thread::sleep(Duration::from_micros(500));
        }
        waits.sort();
        waits
    };
    let (with_gc, removed, waits, lazy_waits) = std::thread::scope(|scope| {
        let durable = scope.spawn(|| others(&|at| store.write(|tx| tx.put(&OTHERS, &(at % 64), &at)).unwrap()));
        let lazy = scope.spawn(|| others(&|at| store.write_lazily(|tx| tx.put(&OTHERS, &(at % 64), &at)).unwrap()));
        let report = control.prune(&half, &mut |_| rows = began.elapsed(), &Cancel::new()).unwrap();
        let with_gc = began.elapsed();
        stop.store(true, Ordering::SeqCst);
        (with_gc, report.removed_count, durable.join().unwrap(), lazy.join().unwrap())
    });
    let (all, _) = timed(|| control.prune(&[PruneOptions::default()], &mut |_| (), &Cancel::new()).unwrap());
    println!(
        "{count:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9.0} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
        ms(make),
        ms(sums),
        ms(first),
        ms(again),
        ms(dry),
        ms(rows),
        removed as f64 / rows.as_secs_f64(),
        ms(with_gc),
        ms(all),
        ms(waits[waits.len() * 99 / 100]),
        ms(waits[waits.len() - 1]),
        ms(lazy_waits[lazy_waits.len() * 99 / 100]),
        ms(lazy_waits[lazy_waits.len() - 1]),
    );
}

fn blob(n: u64) -> BlobDigest {
    BlobDigest::of(format!("blob {n}").as_bytes())
}

fn make(store: &Store, count: u64) {
    let now = store.now();
    let id = |n: u64| RecordId::from_bytes(*BlobDigest::of(&n.to_le_bytes()).as_bytes().first_chunk().unwrap());
    for from in (0..count).step_by(5000) {
        let put: Result<(), CatalogueError> = store.write_lazily(|tx| {
            for n in from..(from + 5000).min(count) {
                let digest = blob(n);
                tx.put(&BLOBS, &digest, &StoredBlob { size_bytes: 100, created: now })?;
                let diff_id = DiffId::from_bytes(*digest.as_bytes());
                let known = StoredLayerBlob { size_bytes: 100, compression: Compression::Gzip, made_at_level: None };
                tx.put(&BLOBS_OF_DIFF, &(diff_id, digest), &known)?;
                tx.put(&DIFF_OF_BLOB, &digest, &StoredDiffId(diff_id))?;
                let parents = if n % 10 == 0 { Parents::None } else { Parents::Layer(id(n - 1)) };
                for parent in parents.ids() {
                    tx.put(&CHILDREN, &(parent, id(n)), &())?;
                }
                let row = RecordRow {
                    state: State::Lazy,
                    parents,
                    description: format!("RUN step {n}"),
                    record_type: RecordType::Regular,
                    retain: false,
                    pinned: false,
                    created_at: now,
                    blob: Some(BlobRow {
                        digest: Some(digest),
                        diff_id,
                        media_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
                        size_bytes: 100,
                        urls: Vec::new(),
                        annotations: Vec::new(),
                    }),
                    chain_id: None,
                    blob_chain_id: None,
                    image_refs: Vec::new(),
                    snapshot: None,
                    took: None,
                };
                tx.put(&RECORDS, &id(n), &row)?;
                tx.put(
                    &USES,
                    &id(n),
                    &UseRow { last_used_at: Some(Stamp::from_micros(n * 7919 % count)), count: n % 7 },
                )?;
                tx.hold(&Owner::new("record", id(n)), digest)?;
            }
            Ok(())
        });
        put.unwrap();
    }
    store.write(|tx| tx.put(&OTHERS, &0, &0)).unwrap();
}
