//! What records cost, at several sizes of a store: `cargo bench -p plies-cache --bench records [-- RECORDS...]`.
//!
//! ```text
//! durable/16, /1   create + durable commit (`seal`: commit and finalize in one) + release of an empty record a second, by
//!                  16 threads and by one; each waits until it is durable
//! random           get + release a second, all records in turn at random, one thread
//! hot              the same of one record that somebody else holds as well; cold: that nobody else holds
//! merge            of 10 layers, found nowhere yet
//! open             of the store and the cache, after a clean stop
//! ```

// A program of its own, for people to read; see the test for what is asserted.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use plies_archive::Limits;
use plies_cache::{Manager, ManagerOptions, RecordId, RecordOptions};
use plies_store::{OpenOptions, Rows as _, Store, Table, WaitPolicy};

/// As in `ply`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const RECORDS: Table<RecordId, plies_cache::RecordRow> = Table::new("cache.records");
/// BuildKit's cache manager of 2026 as a library, overlayfs snapshotter, on the machine that the targets were set on; the
/// same columns. It does not group commits, so 16 threads give what one gives. 100,000 is extrapolated from 30,000.
const BUILDKIT: [(usize, [&str; 8]); 3] = [
    (1_000, ["125", "125", "25400", "25400", "25400", "2500", "24.0", "44"]),
    (10_000, ["136", "136", "26400", "26400", "26400", "2500", "235.0", "230"]),
    (100_000, ["-", "-", "20800", "20800", "20800", "2500", "2600.0", "2100"]),
];
/// How long each figure is measured.
const WHILE: Duration = Duration::from_secs(2);

fn open(root: &Path) -> (Store, Manager) {
    let mut options = OpenOptions::new(Arc::new(SystemTime::now));
    options.command = "bench".into();
    let store = Store::open(root, options, WaitPolicy::Fail).unwrap();
    let warn: plies_store::Warn = Arc::new(|error| eprintln!("{error}"));
    let manager =
        Manager::open(store.clone(), ManagerOptions { limits: Limits::default(), checker: None, warn }).unwrap();
    (store, manager)
}

fn by() -> RecordOptions {
    RecordOptions::by("bench")
}

fn one_record(manager: &Manager) -> RecordId {
    let made = manager.accessor().create(None, &by()).unwrap().seal(&[], None).unwrap();
    let id = made.id();
    made.release().unwrap();
    id
}

/// Adds rows like those of finished records, without the way there.
fn fill(store: &Store, manager: &Manager, count: usize, seed: u64) {
    let sample = one_record(manager);
    let row = store.read(|rows| rows.get(&RECORDS, &sample)).unwrap().unwrap();
    let mut random = Random(seed);
    for chunk in (0..count).collect::<Vec<_>>().chunks(20_000) {
        let first = random.clone();
        store
            .write(|tx| {
                random = first.clone();
                for _ in chunk {
                    tx.put(&RECORDS, &random.id(), &row)?;
                }
                Ok::<_, plies_store::CatalogueError>(())
            })
            .unwrap();
    }
}

#[derive(Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn id(&mut self) -> RecordId {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.next().to_be_bytes());
        bytes[8..].copy_from_slice(&self.next().to_be_bytes());
        RecordId::from_bytes(bytes)
    }
}

/// How often `work` is done a second by so many threads.
fn rate(threads: usize, work: impl Fn(usize) + Sync) -> f64 {
    let done = AtomicUsize::new(0);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..threads {
            let (done, work) = (&done, &work);
            scope.spawn(move || {
                while began.elapsed() < WHILE {
                    work(thread);
                    done.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    done.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64()
}

fn memory_high_water_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

fn row(cells: &[String]) {
    println!("{}", cells.iter().map(|cell| format!("{cell:>12}")).collect::<String>());
}

fn main() {
    let mut sizes: Vec<usize> = std::env::args().filter_map(|arg| arg.replace('_', "").parse().ok()).collect();
    if sizes.is_empty() {
        sizes = vec![1_000, 10_000, 100_000];
    }
    let parent = std::env::var_os("CARGO_TARGET_TMPDIR").map_or_else(std::env::temp_dir, Into::into);
    row(&["records", "durable/16", "durable/1", "random", "hot", "cold", "merge us", "open ms", "VmHWM MiB"]
        .map(str::to_owned));
    let mut seed = 1;
    for size in sizes {
        let dir = tempfile::tempdir_in(&parent).unwrap();
        let root = dir.path().join("store");
        let (store, manager) = open(&root);
        seed += 1;
        fill(&store, &manager, size, seed);
        let accessor = manager.accessor();

        let never = RecordId::from_bytes([0; 16]);
        let sixteen = rate(16, |_| assert!(one_record(&manager) != never));
        let alone = rate(1, |_| assert!(one_record(&manager) != never));

        let mut walk = Random(seed);
        let ids: Vec<RecordId> = (0..size).map(|_| walk.id()).collect();
        let turn = AtomicUsize::new(0);
        // A step that shares no factor with the size visits all of them.
        let random = rate(1, |_| {
            let at = turn.fetch_add(1, Ordering::Relaxed).wrapping_mul(7_368_787) % ids.len();
            accessor.get(ids[at], &by()).unwrap().release().unwrap();
        });
        let cold = rate(1, |_| accessor.get(ids[0], &by()).unwrap().release().unwrap());
        let kept = accessor.get(ids[0], &by()).unwrap();
        let options = by();
        let hot = rate(1, |_| accessor.get(ids[0], &options).unwrap().release().unwrap());
        drop(kept);

        let inputs: Vec<_> = ids[..10].iter().map(|id| accessor.get(*id, &by()).unwrap()).collect();
        let mut order: Vec<_> = inputs.iter().map(Some).collect();
        let merges = 10;
        let began = Instant::now();
        for _ in 0..merges {
            order.rotate_left(1);
            drop(accessor.merge(&order, &by()).unwrap());
        }
        let merge = began.elapsed() / merges;
        drop(order);
        drop(inputs);

        drop(accessor);
        manager.close().unwrap();
        store.close().unwrap();
        let began = Instant::now();
        let opened = open(&root);
        let opening = began.elapsed();
        drop(opened);
        row(&[
            size.to_string(),
            format!("{sixteen:.0}"),
            format!("{alone:.0}"),
            format!("{random:.0}"),
            format!("{hot:.0}"),
            format!("{cold:.0}"),
            merge.as_micros().to_string(),
            format!("{:.1}", opening.as_secs_f64() * 1e3),
            memory_high_water_mib().to_string(),
        ]);
        if let Some((_, theirs)) = BUILDKIT.iter().find(|(records, _)| *records == size) {
            row(&["BuildKit"].iter().chain(theirs).map(|cell| (*cell).to_owned()).collect::<Vec<_>>());
        }
    }
}
