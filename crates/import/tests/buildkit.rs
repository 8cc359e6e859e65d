//! Imports of BuildKit's state that are told to stop, and of state in which anything may stand.
#![allow(clippy::unwrap_used)] // the exemption for tests does not see their helpers

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use plies_archive::Limits;
use plies_cache::{Manager, ManagerOptions, State};
use plies_import::{Import, ImportError, ImportOptions, ImportReport, Outcome, buildkit};
use plies_oci::{DocumentLimits, ErrorKind};
use plies_store::progress::{Event, Progress, TaskId};
use plies_store::{Cancel, NotLinked, OpenOptions, Store, WaitPolicy};
use plies_testkit::buildkit::{ACTIVE, COMMITTED, Worker};
use plies_testkit::scratch::Scratch;
use plies_testkit::tools;
use serde_json::json;

const NEVER: usize = usize::MAX;

/// Asks to stop at the n-th thing that it is told.
struct StopAt {
    left: AtomicUsize,
    cancel: Cancel,
}

impl Progress for StopAt {
    fn report(&self, _: TaskId, _: Event<'_>) {
        if self.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.cancel.cancel();
        }
    }
}

fn root(scratch: &Scratch, name: &str) -> PathBuf {
    let packed = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../testkit/fixtures/buildkit/{name}.tar.gz"));
    let dir = scratch.dir(name);
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xzf"]).arg(packed).arg("-C").arg(&dir);
    tools::run(&mut tar);
    dir
}

struct Rig {
    store: Store,
    manager: Manager,
}

impl Rig {
    fn new(root: &Path) -> Self {
        let options = OpenOptions::new(Arc::new(SystemTime::now));
        let store = Store::open(root, options, WaitPolicy::Fail).unwrap();
        let warn: plies_store::Warn = Arc::new(|error| panic!("{error}"));
        let options = ManagerOptions { limits: Limits::default(), checker: None, warn };
        let manager = Manager::open(store.clone(), options).unwrap();
        Self { store, manager }
    }

    /// An import that is asked to stop after so many reports, and how many of those there were no time for.
    fn import(&self, source: &Path, reports: usize) -> (Result<ImportReport, ImportError>, usize) {
        self.import_with(source, reports, ImportOptions::default())
    }

    fn import_with(
        &self,
        source: &Path,
        reports: usize,
        options: ImportOptions,
    ) -> (Result<ImportReport, ImportError>, usize) {
        let cancel = Cancel::new();
        let progress = StopAt { left: AtomicUsize::new(reports), cancel: cancel.clone() };
        let import = Import {
            store: &self.store,
            cache: &self.manager.accessor(),
            limits: &Limits::default(),
            documents: &DocumentLimits::default(),
            options,
            progress: &progress,
            cancel: &cancel,
            not_linked: &NotLinked::default(),
        };
        let done = buildkit::import(&import, source);
        (done, progress.left.into_inner())
    }

    /// The records of the whole import that are here; each of them has its layers.
    fn here(&self, all: &BTreeSet<String>) -> BTreeSet<String> {
        let cache = self.manager.accessor();
        let known = cache.known(all.iter().map(|name| buildkit::record_id(name))).unwrap();
        for id in &known {
            let row = cache.row(*id).unwrap();
            if let State::Sealed { layer: Some(layer) } = row.state {
                assert!(self.store.layers().root(layer).is_ok(), "{id}");
                assert_eq!(cache.known_layers(*id).unwrap().last(), Some(&layer), "{id}");
            }
            row.parents
                .ids()
                .into_iter()
                .for_each(|parent| assert!(known.contains(&parent), "{id} stands on {parent}"));
        }
        all.iter().filter(|name| known.contains(&buildkit::record_id(name))).cloned().collect()
    }
}

fn taken(report: &ImportReport) -> BTreeSet<String> {
    assert_eq!(report.count(Outcome::Failed), 0, "{report:#?}");
    let here = |item: &&plies_import::ImportedItem| matches!(item.outcome, Outcome::Taken | Outcome::Here);
    report.items.iter().filter(here).map(|item| item.name.clone()).collect()
}

/// BuildKit's migration could not be stopped once it had begun to write; ours can be at any time, since what was written is
/// whole.
#[test]
fn c08_an_import_that_is_cancelled_leaves_whole_records_and_the_next_one_brings_the_rest() {
    if !tools::privileged() {
        return;
    }
    let scratch = Scratch::new();
    let source = root(&scratch, "v2-root");
    let (whole, left) = Rig::new(&scratch.join("whole")).import(&source, NEVER);
    let all = taken(&whole.unwrap());
    let reports = NEVER - left;
    assert!(reports > 20, "too few places to stop at: {reports}");
    let mut stopped = BTreeSet::new();
    for at in (1..=reports).step_by(reports.div_ceil(20)) {
        let rig = Rig::new(&scratch.join(format!("store-{at}")));
        let (done, _) = rig.import(&source, at);
        match done {
            Ok(report) => assert_eq!(taken(&report), all, "it was asked too late"),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Canceled, "{error}");
                let here = rig.here(&all);
                assert!(here.len() < all.len());
                stopped.insert(here.len());
            }
        }
        assert_eq!(taken(&rig.import(&source, NEVER).0.unwrap()), all, "after {at}");
        assert_eq!(rig.here(&all), all);
    }
    assert!(!stopped.is_empty());
}

/// Numbers that are the same in every run (splitmix64).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end as u64).unwrap()
    }
}

/// Each of the databases with other bytes, cut off, or with pages in other places: what cannot be read is told, and never more
/// comes over than was there.
#[test]
fn databases_with_anything_in_them_are_told_and_never_end_in_a_panic() {
    if !tools::privileged() {
        return;
    }
    const TRIES: usize = 150;
    const PAGE_BYTES: usize = 4096;
    let scratch = Scratch::new();
    let rig = Rig::new(&scratch.join("store"));
    let dry_run = ImportOptions { dry_run: true, ..ImportOptions::default() };
    for (name, metadata) in [("v1-root", "metadata.db"), ("v2-root", "metadata_v2.db")] {
        let source = root(&scratch, name);
        let sound = rig.import_with(&source, NEVER, dry_run).0.unwrap();
        let worker = source.join("runc-overlayfs");
        let databases = ["containerdmeta.db", "snapshots/metadata.db", metadata];
        let databases = databases.map(|name| worker.join(name)).into_iter().chain([source.join("cache.db")]);
        for (seed, path) in databases.enumerate() {
            let before = fs::read(&path).unwrap();
            let mut random = Random(seed as u64);
            let mut differed = 0;
            for _ in 0..TRIES {
                let mut bytes = before.clone();
                match random.below(8) {
                    0 => bytes.truncate(random.below(bytes.len())),
                    1 => {
                        let page = |random: &mut Random| PAGE_BYTES * random.below(before.len() / PAGE_BYTES);
                        let (from, to) = (page(&mut random), page(&mut random));
                        bytes[to..to + PAGE_BYTES].copy_from_slice(&before[from..from + PAGE_BYTES]);
                    }
                    _ => {
                        for _ in 0..=random.below(30) {
                            // Most of a file is room that was never written to.
                            let at = random.below(bytes.len());
                            let at = (at..bytes.len()).find(|at| bytes[*at] != 0).unwrap_or(at);
                            bytes[at] ^= 1 << random.below(8);
                        }
                    }
                }
                fs::write(&path, bytes).unwrap();
                let told = rig.import_with(&source, NEVER, dry_run).0;
                let Ok(report) = told else {
                    differed += 1;
                    continue;
                };
                differed += usize::from(report.count(Outcome::Failed) > 0);
                let names: BTreeSet<_> = report.items.iter().map(|item| (item.kind, &item.name)).collect();
                assert!(names.len() <= report.items.len());
                assert!(report.keys_count <= sound.keys_count, "{}", path.display());
            }
            assert!(differed > TRIES / 10, "{}: only {differed} were noticed", path.display());
            fs::write(&path, before).unwrap();
        }
    }
}

/// Records that stand on each other in any way: each is told once, with what became of it, and what came over is whole.
#[test]
fn records_that_stand_on_each_other_at_random_are_each_told_once() {
    if !tools::privileged() {
        return;
    }
    const GRAPHS: u64 = 12;
    const RECORDS: usize = 40;
    let scratch = Scratch::new();
    for seed in 0..GRAPHS {
        let mut random = Random(seed);
        let dir = scratch.join(format!("{seed}"));
        let mut worker = Worker::new(dir.join("state/runc-overlayfs"), "overlayfs");
        let name = |number: usize| format!("r{number}");
        for number in 0..RECORDS {
            // Mostly older ones; some newer, itself, or nobody.
            let other = |random: &mut Random| match random.below(6) {
                0 => name(random.below(RECORDS + 5)),
                _ => name(random.below(number + 1)),
            };
            let (a, b) = (other(&mut random), other(&mut random));
            let mut keys = match random.below(7) {
                0 => json!({"cache.mergeParents": [a, b]}),
                1 => json!({"cache.lowerDiffParent": a, "cache.upperDiffParent": b}),
                2 => json!({"cache.equalMutable": a, "snapshot.committed": true}),
                3 => json!({"cache.parent": a}),
                _ => json!({"cache.parent": if number % 3 == 0 { None } else { Some(a) }, "snapshot.committed": true}),
            };
            if random.below(4) == 0 {
                keys["cache.cachePolicy"] = random.below(3).into();
                keys["cache.snapshot"] = b.into();
            }
            worker.row(&name(number), keys);
            let kind = if random.below(4) == 0 { ACTIVE } else { COMMITTED };
            let files = worker.snapshot(&name(number), kind, None);
            match random.below(8) {
                0 => fs::remove_dir_all(files).unwrap(),
                _ => fs::write(files.join("f"), name(number)).unwrap(),
            }
        }
        worker.write();
        let rig = Rig::new(&dir.join("store"));
        let all: BTreeSet<String> = (0..RECORDS).map(name).collect();
        let report = rig.import(&dir.join("state"), NEVER).0.unwrap();
        let told: Vec<&String> = report.items.iter().map(|item| &item.name).collect();
        assert_eq!(told, all.iter().collect::<Vec<_>>(), "graph {seed}");
        let came = |item: &&plies_import::ImportedItem| matches!(item.outcome, Outcome::Taken | Outcome::Here);
        let came: BTreeSet<String> = report.items.iter().filter(came).map(|item| item.name.clone()).collect();
        assert_eq!(rig.here(&all), came, "graph {seed}");
        let again = rig.import(&dir.join("state"), NEVER).0.unwrap();
        assert_eq!((again.count(Outcome::Taken), again.count(Outcome::Here)), (0, came.len()), "graph {seed}");
    }
}

/// More layers than are published together, while others are staged: each record gets its own.
#[test]
fn records_of_several_batches_each_get_their_own_layer() {
    if !tools::privileged() {
        return;
    }
    // Two whole batches of 2,048 and a part of a third.
    const RECORDS: usize = 4_100;
    let scratch = Scratch::new();
    let mut worker = Worker::new(scratch.join("state/runc-overlayfs"), "overlayfs");
    let all: BTreeSet<String> = (0..RECORDS).map(|number| format!("r{number}")).collect();
    for name in &all {
        worker.row(name, json!({"snapshot.committed": true, "cache.snapshot": name}));
        fs::write(worker.snapshot(name, COMMITTED, None).join("f"), name).unwrap();
    }
    worker.write();
    let rig = Rig::new(&scratch.join("store"));
    let report = rig.import(&scratch.join("state"), NEVER).0.unwrap();
    assert_eq!(report.count(Outcome::Taken), RECORDS);
    assert_eq!(rig.here(&all), all);
    let cache = rig.manager.accessor();
    for name in &all {
        let State::Sealed { layer: Some(layer) } = cache.row(buildkit::record_id(name)).unwrap().state else {
            panic!("{name} has no layer");
        };
        let root = rig.store.layers().root(layer).unwrap();
        let file = format!("/proc/self/fd/{}/f", root.as_raw_fd());
        assert_eq!(fs::read_to_string(file).unwrap(), *name);
    }
}
