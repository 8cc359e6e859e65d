//! How a store behaves as it grows: what an open costs after a clean stop and after a kill, how long
//! a collection keeps writers waiting, and what one read and one commit cost.
//!
//! `cargo bench -p plies-store --bench scale -- [--dir DIR] [ROWS…]`, by default with 1,000, 10,000,
//! 100,000 and 1,000,000. DIR must be on the disk that is to be measured.
//!
//! Every open is timed in a process of its own, whose peak memory is then known. Rows are those of as
//! many cache records: a snapshot, two edges, a hold, and a row of 190 bytes.

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used, clippy::disallowed_methods, missing_docs)]

use std::fs;
use std::hint::black_box;
use std::io::{BufRead as _, BufReader, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use plies_archive::{DirIndex, Usage};
use plies_store::{
    CatalogueError, GcMode, LayerContents, LayerId, LeaseOptions, OpenOptions, Owner, Row, Rows as _, SnapshotId,
    Stamp, Store, Table, WaitPolicy,
};
use serde::{Deserialize, Serialize};

/// As in `ply`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// As the store has it: rows are put past [`plies_store::Snapshots`], which would sync for each.
#[derive(Serialize, Deserialize)]
struct SnapshotRow {
    layers: Vec<LayerId>,
    fixup: Option<LayerId>,
    created: Stamp,
}

impl Row for SnapshotRow {
    const VERSION: u8 = 1;
}

/// As long as a cache record's.
#[derive(Serialize, Deserialize)]
struct Record {
    last_used: u64,
    description: String,
}

impl Row for Record {
    const VERSION: u8 = 1;
}

const SNAPSHOTS: Table<SnapshotId, SnapshotRow> = Table::new("snapshots");
const RECORDS: Table<u64, Record> = Table::new("bench.records");

/// Layers that all snapshots are made of.
const LAYERS: usize = 64;

/// Rows per transaction while building.
const BUILD_BATCH: u64 = 10_000;

fn open(root: &Path) -> Store {
    let mut options = OpenOptions::new(Arc::new(SystemTime::now));
    options.command = "scale".into();
    Store::open(root, options, WaitPolicy::Fail).unwrap()
}

fn owner(n: u64) -> Owner {
    Owner::new("record", format_args!("{n:032x}"))
}

/// Spreads over the key space, as digests do; never the same twice.
fn scattered(n: u64) -> u64 {
    let mut x = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
    x ^ (x >> 32)
}

fn snapshot(n: u64) -> SnapshotId {
    format!("{:016x}{n:016x}", scattered(n)).parse().unwrap()
}

fn record(n: u64) -> Record {
    Record { last_used: n, description: format!("{:180}", "RUN apt-get install") }
}

fn put_rows(store: &Store, layers: &[LayerId], rows: Range<u64>) {
    for start in rows.clone().step_by(BUILD_BATCH as usize) {
        store
            .write(|tx| {
                for n in start..rows.end.min(start + BUILD_BATCH) {
                    let id = snapshot(n);
                    let pair = [0, 1].map(|at| layers[(scattered(n + at) % layers.len() as u64) as usize]);
                    tx.put(&SNAPSHOTS, &id, &SnapshotRow { layers: pair.to_vec(), fixup: None, created: tx.now() })?;
                    tx.hold(&owner(scattered(n)), id)?;
                    pair.iter().try_for_each(|layer| tx.add_edge(id, *layer))?;
                    tx.put(&RECORDS, &scattered(n), &record(n))?;
                }
                Ok::<_, CatalogueError>(())
            })
            .unwrap();
    }
}

fn build(root: &Path, rows: u64) {
    let store = open(root);
    let lease = store.lease(LeaseOptions::process("scale")).unwrap();
    let stages = (0..LAYERS).map(|_| {
        let contents =
            LayerContents { usage: Usage::default(), index: DirIndex::default(), ..LayerContents::default() };
        store.layers().stage().unwrap().finish(contents)
    });
    let layers = store.layers().publish(&lease, stages.collect()).unwrap();
    put_rows(&store, &layers, 0..rows);
    lease.release().unwrap();
    store.close().unwrap();
}

/// Peak resident memory of this process, in KiB.
fn peak_kib() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

fn timed<T>(run: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let result = run();
    (result, start.elapsed())
}

/// Child: opens, says how long that took and what memory it needed.
fn child_open(root: &Path) {
    let (store, took) = timed(|| open(root));
    println!("{} {}", took.as_micros(), peak_kib());
    store.close().unwrap();
}

/// Child: commits until it is killed.
fn child_write(root: &Path, rows: u64) {
    let store = open(root);
    let lease = store.lease(LeaseOptions::process("writer")).unwrap();
    for n in 0.. {
        let id = snapshot(scattered(n) % rows);
        assert!(lease.hold_if_present(id).unwrap());
        store.write(|tx| tx.put(&RECORDS, &scattered(n), &record(n))).unwrap();
        println!("{n}");
    }
}

fn this(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(args).stdout(Stdio::piped());
    command
}

fn open_in_child(root: &Path) -> (f64, f64) {
    let output = this(&["open", root.to_str().unwrap()]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let (micros, kib) = text.trim().split_once(' ').unwrap();
    (micros.parse::<f64>().unwrap() / 1e3, kib.parse::<f64>().unwrap() / 1024.0)
}

fn kill_a_writer(root: &Path, rows: u64) {
    let mut child = this(&["write", root.to_str().unwrap(), &rows.to_string()]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.by_ref().take(100).all(|line| line.is_ok()));
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Microseconds per call, over `count` calls.
fn each(count: u64, mut run: impl FnMut(u64)) -> f64 {
    let ((), took) = timed(|| (0..count).for_each(&mut run));
    took.as_secs_f64() * 1e6 / count as f64
}

fn reads(store: &Store, rows: u64) {
    let at = |n: u64| scattered(scattered(n) % rows);
    let get = |n| {
        let row: Result<_, CatalogueError> = store.read(|tx| tx.get(&RECORDS, &at(n)));
        assert!(black_box(row.unwrap()).is_some());
    };
    // Until the file is in the page cache.
    each(rows, get);
    let single = each(100_000, get);
    let many = store
        .read(|tx| {
            Ok::<_, CatalogueError>(each(100_000, |n| {
                assert!(black_box(tx.get(&RECORDS, &at(n)).unwrap()).is_some());
            }))
        })
        .unwrap();
    println!("  reads: {single:.2} µs each in its own transaction, {many:.2} µs in one");
}

fn writes(store: &Store, rows: u64) {
    let at = |n: u64| scattered(scattered(n) % rows);
    let put = |n: u64| {
        store
            .write_lazily(|tx| (0..1000).try_for_each(|k| tx.put(&RECORDS, &at(n * 1000 + k), &record(k)).map(drop)))
            .unwrap();
    };
    let batch = each(100, put);
    println!("  lazy writes: {:.2} ms per transaction of 1,000 puts at random", batch / 1e3);
    let lazy = each(5_000, |n| store.write_lazily(|tx| tx.put(&RECORDS, &at(n), &record(n)).map(drop)).unwrap());
    println!("  lazy writes: {lazy:.1} µs per transaction of one put");
    let mixed = each(20_000, |n| {
        let row: Result<_, CatalogueError> = store.read(|tx| tx.get(&RECORDS, &at(n)));
        assert!(row.unwrap().is_some());
        if n % 10 == 0 {
            store.write_lazily(|tx| tx.put(&RECORDS, &at(n), &record(n)).map(drop)).unwrap();
        }
    });
    println!("  ten reads to a lazy write: {mixed:.1} µs each");
}

fn commits(store: &Store) {
    for threads in [1u64, 16] {
        let until = Instant::now() + Duration::from_secs(3);
        let total: u64 = thread::scope(|scope| {
            let writers: Vec<_> = (0..threads)
                .map(|thread| {
                    scope.spawn(move || {
                        let mut done = 0;
                        while Instant::now() < until {
                            let key = scattered(thread << 32 | done);
                            store.write(|tx| tx.put(&RECORDS, &key, &record(done)).map(drop)).unwrap();
                            done += 1;
                        }
                        done
                    })
                })
                .collect();
            writers.into_iter().map(|writer| writer.join().unwrap()).sum()
        });
        println!("  durable commits: {:.0}/s from {threads} threads", total as f64 / 3.0);
    }
}

/// The longest that a lazy write waited while `work` ran.
fn longest_wait<T>(store: &Store, work: impl FnOnce() -> T) -> (T, Duration, Duration) {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut longest = Duration::ZERO;
            let mut n = 0;
            while !done.load(Ordering::Relaxed) {
                let ((), took) = timed(|| store.write_lazily(|tx| tx.put(&RECORDS, &0, &record(n)).map(drop)).unwrap());
                longest = longest.max(took);
                n += 1;
                thread::sleep(Duration::from_micros(200));
            }
            longest
        });
        let (result, took) = timed(work);
        done.store(true, Ordering::Relaxed);
        (result, took, writer.join().unwrap())
    })
}

fn collections(store: &Store, rows: u64) {
    let gc = || store.gc(GcMode::Run).unwrap().collected.len();
    let (found, took, wait) = longest_wait(store, gc);
    println!("  gc of {found} of {rows}: {:.1} ms, a writer waited {:.1} ms", millis(took), millis(wait));
    // Beyond those that the writers use.
    let garbage = rows..rows + (rows / 10).min(10_000);
    let layers = store.snapshots().info(snapshot(0)).unwrap().layers;
    put_rows(store, &layers, garbage.clone());
    store.write(|tx| garbage.clone().try_for_each(|n| tx.unhold(&owner(scattered(n)), snapshot(n)).map(drop))).unwrap();
    let (found, took, wait) = longest_wait(store, gc);
    println!("  gc of {found} of {rows}: {:.1} ms, a writer waited {:.1} ms", millis(took), millis(wait));
    let (_, _, wait) = longest_wait(store, || thread::sleep(Duration::from_secs(1)));
    println!("  (with no collection, a writer waited {:.1} ms)", millis(wait));
}

fn millis(took: Duration) -> f64 {
    took.as_secs_f64() * 1e3
}

fn measure(dir: &Path, rows: u64) {
    let root = dir.join(format!("store-{rows}"));
    if !root.exists() {
        let ((), took) = timed(|| build(&root, rows));
        println!("{rows} rows: built in {:.1} s", took.as_secs_f64());
    }
    let size = fs::metadata(root.join("catalog/plies.redb")).unwrap().len();
    println!("{rows} rows: catalogue of {} MB", size >> 20);
    let (ms, mib) = open_in_child(&root);
    println!("  open: {ms:.1} ms, {mib:.0} MiB resident (a clean stop, first)");
    let (ms, mib) = open_in_child(&root);
    println!("  open: {ms:.1} ms, {mib:.0} MiB resident (a clean stop)");
    for _ in 0..2 {
        kill_a_writer(&root, rows);
        let (ms, mib) = open_in_child(&root);
        println!("  open: {ms:.1} ms, {mib:.0} MiB resident (after a kill)");
    }
    let store = open(&root);
    reads(&store, rows);
    writes(&store, rows);
    commits(&store);
    collections(&store, rows);
    println!("  peak of this process: {} MiB", peak_kib() >> 10);
    store.close().unwrap();
    std::io::stdout().flush().unwrap();
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["open", root] => child_open(root.as_ref()),
        ["write", root, rows] => child_write(root.as_ref(), rows.parse().unwrap()),
        ["commits", root] => commits(&open(root.as_ref())),
        ["measure", dir, rows] => measure(dir.as_ref(), rows.parse().unwrap()),
        args => {
            let (dir, counts) = match args {
                ["--dir", dir, counts @ ..] => (Some(PathBuf::from(dir)), counts),
                counts => (None, counts),
            };
            let temporary = tempfile::tempdir().unwrap();
            let dir = dir.unwrap_or_else(|| temporary.path().to_owned());
            let all: &[&str] = &["1000", "10000", "100000", "1000000"];
            for rows in if counts.is_empty() { all } else { counts } {
                // In a process of its own, so that its memory is its own.
                let mut child =
                    this(&["measure", dir.to_str().unwrap(), rows]).stdout(Stdio::inherit()).spawn().unwrap();
                assert!(child.wait().unwrap().success());
            }
        }
    }
}
