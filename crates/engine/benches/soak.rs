//! Hours of work in one process, as a daemon would do it: what it takes of memory, descriptors, threads, mounts and disk must
//! not grow with time.
//!
//! ```text
//! cargo bench -p plies-engine --bench soak -- 3600     an hour
//! ```
//!
//! Two threads load, build, mount, save, merge, remove and prune in one store, each round with content of its own and some that all
//! rounds share. What is kept is bounded, so after a warm-up each figure may go up and down but not away. A line is printed every half
//! minute, and at the end a table of the second tenth of the time beside the last. It fails if descriptors, threads, mounts or loop
//! devices are more at the end, if more blobs are remembered than there are, or if `fsck` finds anything.
//!
//! Needs root, busybox and crun.

#![expect(clippy::unwrap_used, reason = "a measurement that cannot go on has failed")]

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use plies_engine::build::{BuildOutput, BuildRequest};
use plies_engine::exec::Cancel;
use plies_engine::progress::Silent;
use plies_engine::{Engine, EngineOptions, FsckDepth, FsckRequest, GcMode, Input, Output, PruneOptions, SaveFormat};
use plies_testkit::catalogue::Catalogue;
use plies_testkit::image::{Image, Packing, busybox_members};
use plies_testkit::scratch::Scratch;
use plies_testkit::tar::Member;
use plies_testkit::tools;

/// As in `ply`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Threads that work.
const WORKERS: usize = 2;
/// Rounds after which an image goes.
const KEPT_ROUNDS: u64 = 8;
/// What a prune leaves of the build cache.
const CACHE_BYTES: u64 = 4 << 20;
/// Files of a layer, and about how many bytes each has.
const FILES: usize = 300;
const FILE_BYTES: usize = 4_000;
/// A look at what the process takes.
const SAMPLE_EVERY: Duration = Duration::from_secs(30);
/// What the threads may have open at one moment and not at another.
const SWING: u64 = 16;

/// What this process and its store take at one moment; what may swing comes first.
type Sample = [u64; FIGURES.len()];
const FIGURES: [&str; 7] =
    ["memory, KiB", "catalogue, KiB", "store, KiB", "descriptors", "threads", "mounts", "loop devices"];
/// From here on a figure that is larger at the end than at the beginning is a leak.
const COUNTS: usize = 3;

fn sample(root: &Path) -> Sample {
    let names = |dir: &str| fs::read_dir(dir).unwrap().count() as u64;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let is_loop = |name: &fs::DirEntry| name.path().join("loop/backing_file").exists();
    [
        resident.trim().trim_end_matches(" kB").parse().unwrap(),
        fs::metadata(root.join("catalog/plies.redb")).unwrap().len() >> 10,
        tree_bytes(root) >> 10,
        names("/proc/self/fd"),
        names("/proc/self/task"),
        fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count() as u64,
        fs::read_dir("/sys/block").unwrap().flatten().filter(is_loop).count() as u64,
    ]
}

/// Bytes on disk below a directory in which names come and go.
fn tree_bytes(dir: &Path) -> u64 {
    let below = fs::read_dir(dir).into_iter().flatten().flatten().map(|name| match name.metadata() {
        Ok(meta) if meta.is_dir() => tree_bytes(&name.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    });
    below.sum()
}

/// Does every kind of request, again and again.
struct Worker<'a> {
    engine: &'a Engine,
    place: PathBuf,
    number: usize,
}

impl Worker<'_> {
    fn round(&self, round: u64) {
        let (engine, place, cancel) = (self.engine, &self.place, Cancel::new());
        let name = |round: u64| format!("localhost/soak-{}-{round}:latest", self.number);

        // An image of a layer that others have, too, and one of its own.
        let layer = |seed: String| {
            let text = |file: usize| format!("{seed} {file} ").repeat(FILE_BYTES / 8);
            (0..FILES).map(|file| Member::file(format!("layer-{seed}/{file}"), text(file))).collect::<Vec<_>>()
        };
        let own = format!("{}-{round}", self.number);
        let image = Image::new(&name(round)).layer(&layer((round % 5).to_string()), Packing::Gzip);
        let archive = image.layer(&layer(own.clone()), Packing::Zstd).write_oci_tar(&place.join("image.tar"));
        engine.load(&Input::Path(archive), None, &Silent, &cancel).unwrap();

        // A build of which some is new, and the same again.
        let context = place.join("context");
        fs::create_dir_all(&context).unwrap();
        fs::write(context.join("file"), (round % 7).to_string()).unwrap();
        let steps = format!("RUN echo {} > /shared\nCOPY file /file\nRUN echo {own} > /own\n", round % 3);
        fs::write(context.join("Dockerfile"), format!("FROM busybox\n{steps}")).unwrap();
        let built = format!("localhost/built-{}:latest", self.number);
        let request = BuildRequest {
            outputs: vec![BuildOutput::default()],
            context,
            names: vec![built.clone()],
            search_path: std::env::split_paths(&std::env::var_os("PATH").unwrap()).collect(),
            ..BuildRequest::default()
        };
        for _ in 0..2 {
            engine.build(&request, &Silent, &cancel).unwrap();
        }

        let at = place.join("mounted");
        fs::create_dir_all(&at).unwrap();
        for image in [&name(round), &built] {
            engine.mount(image, &at, round.is_multiple_of(2)).unwrap();
            assert!(fs::read_dir(&at).unwrap().count() > 1, "{image}");
            engine.umount(&at).unwrap();
        }
        let saved = place.join("saved.tar");
        engine.save(&[built], SaveFormat::Oci, &Output::Path(saved.clone()), &Silent, &cancel).unwrap();
        fs::remove_file(saved).unwrap();
        let records = engine.records().unwrap();
        let last: Vec<String> = records.iter().rev().take(3).map(|record| record.id.clone()).collect();
        // What the other thread prunes meanwhile cannot be merged any more.
        let _merged_or_gone = engine.merge_records(&last);

        if round >= KEPT_ROUNDS {
            engine.remove_images(&[name(round - KEPT_ROUNDS)]).unwrap();
        }
        if round.is_multiple_of(4) {
            let rule = PruneOptions { all: true, max_used_space_bytes: CACHE_BYTES, ..PruneOptions::default() };
            engine.prune(&rule, false, &cancel).unwrap();
            engine.remove_dangling_images().unwrap();
            engine.gc(GcMode::Run).unwrap();
        }
    }
}

fn print(seconds: u64, rounds: u64, figures: Sample) {
    let figures: Vec<String> = figures.iter().map(|figure| format!("{figure:>15}")).collect();
    println!("{seconds:>8}{rounds:>8}{}", figures.concat());
}

/// The median of each figure.
fn medians(samples: &[Sample]) -> Sample {
    std::array::from_fn(|at| {
        let mut values: Vec<u64> = samples.iter().map(|sample| sample[at]).collect();
        values.sort_unstable();
        values[values.len() / 2]
    })
}

fn main() {
    if !(tools::privileged() && tools::have(&["busybox", "crun"])) {
        return;
    }
    let seconds = std::env::args().filter_map(|word| word.parse().ok()).next_back().unwrap_or(3_600);
    let scratch = Scratch::new();
    let root = scratch.join("root");
    let options = EngineOptions { warn: Arc::new(|error| println!("warning: {error}")), ..EngineOptions::default() };
    let engine = Engine::open(&root, options).unwrap();
    let base = Image::new("busybox:latest").layer(&busybox_members().unwrap(), Packing::Plain);
    engine.load(&Input::Path(base.write_oci_tar(&scratch.join("base.tar"))), None, &Silent, &Cancel::new()).unwrap();

    let (begun, duration, over) = (Instant::now(), Duration::from_secs(seconds), AtomicBool::new(false));
    let rounds = AtomicU64::new(0);
    let mut samples: Vec<Sample> = Vec::new();
    std::thread::scope(|scope| {
        for number in 0..WORKERS {
            let place = scratch.join(format!("worker-{number}"));
            fs::create_dir_all(&place).unwrap();
            let worker = Worker { engine: &engine, place, number };
            let (over, rounds) = (&over, &rounds);
            scope.spawn(move || {
                for round in 0.. {
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                    worker.round(round);
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let header: Vec<String> = FIGURES.iter().map(|name| format!("{name:>15}")).collect();
        println!("{:>8}{:>8}{}", "seconds", "rounds", header.concat());
        while begun.elapsed() < duration {
            std::thread::sleep(SAMPLE_EVERY.min(duration / 20));
            samples.push(sample(&root));
            print(begun.elapsed().as_secs(), rounds.load(Ordering::Relaxed), samples[samples.len() - 1]);
        }
        over.store(true, Ordering::Relaxed);
    });

    let tenth = samples.len().div_ceil(10);
    let early = medians(&samples[tenth.min(samples.len() - 1)..(2 * tenth + 1).min(samples.len())]);
    let late = medians(&samples[samples.len() - tenth..]);
    println!("\nsoak: {seconds} s, {} rounds; medians of the second tenth and of the last", rounds.into_inner());
    for (name, (early, late)) in FIGURES.iter().zip(early.iter().zip(&late)) {
        println!("  {name:<15} {early:>12} {late:>12}");
    }
    let request = FsckRequest { depth: FsckDepth::Data(100), ..FsckRequest::default() };
    let report = engine.fsck(&request, &Silent, &Cancel::new()).unwrap();
    println!("  fsck: {} findings", report.findings.len());
    engine.close().unwrap();
    let catalogue = Catalogue::open(&root);
    let rows = |table: &String| (catalogue.rows(table).len(), table.clone());
    let mut rows: Vec<(usize, String)> = catalogue.tables().iter().map(rows).collect();
    rows.sort_unstable_by(|one, other| other.cmp(one));
    let all: Vec<String> = rows.iter().map(|(count, table)| format!("{table} {count}")).collect();
    println!("  rows: {}", all.join(", "));
    assert!(report.findings.is_empty(), "{:?}", report.findings);
    let count = |name: &str| rows.iter().find(|(_, table)| table == name).map_or(0, |(count, _)| *count);
    assert!(count("image.diffs") <= count("blobs"), "blobs that are gone are remembered");
    for at in COUNTS..FIGURES.len() {
        assert!(late[at] <= early[at] + SWING, "{} grew from {} to {}", FIGURES[at], early[at], late[at]);
    }
}
