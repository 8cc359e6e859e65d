//! How long an import of a BuildKit worker takes: `cargo bench -p plies-import --bench buildkit [-- KIND... COUNT...]`, as root.
//!
//! The worker is made first, and does not count: chains of ten records, each with a result and the link that leads to it.
//! Then it is imported, files by hard link, and imported again.
//!
//! ```text
//! lazy     COUNT records as of a remote cache, never needed here
//! layers   COUNT records, each with a committed snapshot of one file
//! files    ten records with COUNT files; beside it, `cp -al` of the same snapshots, and a sync of the file system
//! ```

// A program of its own, for people to read.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use plies_archive::Limits;
use plies_cache::{Manager, ManagerOptions};
use plies_import::{Import, ImportOptions, ImportReport, Outcome, buildkit};
use plies_oci::DocumentLimits;
use plies_store::{Cancel, NotLinked, OpenOptions, Store, WaitPolicy, progress};
use plies_testkit::buildkit::{COMMITTED, Worker, bucket, bytes, write};
use plies_testkit::scratch::Scratch;
use plies_testkit::{sha256_hex, tools};
use serde_json::json;

/// As in `ply`.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Steps of a build.
const CHAIN: usize = 10;
/// Files in one directory.
const FAN: usize = 100;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Lazy,
    Layers,
    Files,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Lazy => "lazy",
            Self::Layers => "layers",
            Self::Files => "files",
        }
    }
}

fn make(state: &Path, kind: Kind, records: usize, files: usize) {
    let mut worker = Worker::new(state.join("runc-overlayfs"), "overlayfs");
    let (mut results, mut links) = (Vec::new(), Vec::new());
    for n in 0..records {
        // As BuildKit calls them: 25 characters that tell nothing.
        let name = |n: usize| sha256_hex(&n.to_le_bytes())[..25].to_owned();
        let key = |n: usize| format!("sha256:{}", sha256_hex(name(n).as_bytes()));
        let (id, parent) = (name(n), (n % CHAIN > 0).then(|| name(n - 1)));
        let mut row = json!({
            "snapshot.committed": true, "snapshot.size": 8192, "cache.snapshot": id, "cache.parent": parent,
            "cache.createdAt": 1_700_000_000_000_000_000_u64 + n as u64,
            "cache.lastUsedAt": 1_710_000_000_000_000_000_u64 + n as u64,
            "cache.usageCount": 3, "cache.recordType": "regular", "cache.layerType": "",
            "cache.description": format!("[stage {}/{CHAIN}] RUN make {n}", n % CHAIN + 1),
            "cache.imageRefs": [], "cache.cachePolicy": 0, "cache.blobonly": kind == Kind::Lazy,
        });
        if kind != Kind::Lazy {
            let snapshot = worker.snapshot(&id, COMMITTED, parent.as_deref());
            for file in 0..files / records {
                let dir =
                    if files > records { snapshot.join(format!("{id}-{}", file / FAN)) } else { snapshot.clone() };
                fs::create_dir_all(&dir).unwrap();
                fs::write(dir.join(format!("{id}-{file}")), &id).unwrap();
            }
        } else {
            row["cache.blob"] = key(n + 2 * records).into();
            row["cache.diffID"] = key(n + 3 * records).into();
            row["cache.mediatype"] = "application/vnd.oci.image.layer.v1.tar+gzip".into();
        }
        worker.row(&id, row);
        results.push((key(n), bucket([(format!("worker::{id}"), bytes("{}"))])));
        if parent.is_some() {
            let link = json!({"Digest": key(n + records), "Input": 0}).to_string();
            links.push((key(n - 1), bucket([(format!("{link}@{}", key(n)), bytes(""))])));
        }
    }
    worker.write();
    fs::write(state.join("runc-overlayfs/workerid"), "worker").unwrap();
    write(&state.join("cache.db"), vec![("_result", bucket(results)), ("_links", bucket(links))]);
}

fn import(root: &Path, state: &Path) -> ImportReport {
    let mut options = OpenOptions::new(Arc::new(SystemTime::now));
    options.command = "bench".into();
    let store = Store::open(root, options, WaitPolicy::Fail).unwrap();
    let warn: plies_store::Warn = Arc::new(|error| eprintln!("{error}"));
    let limits = Limits::default();
    let manager = Manager::open(store.clone(), ManagerOptions { limits: limits.clone(), checker: None, warn }).unwrap();
    let (cache, cancel) = (manager.accessor(), Cancel::default());
    let (options, progress) = (ImportOptions::default(), &progress::Silent);
    let documents = DocumentLimits::default();
    let import = Import {
        store: &store,
        cache: &cache,
        limits: &limits,
        documents: &documents,
        options,
        progress,
        cancel: &cancel,
        not_linked: &NotLinked::default(),
    };
    buildkit::import(&import, state).unwrap()
}

fn main() {
    let mut counts: Vec<usize> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    if counts.is_empty() {
        counts = vec![1_000, 10_000];
    }
    let all = [Kind::Lazy, Kind::Layers, Kind::Files];
    let mut kinds: Vec<Kind> = all.into_iter().filter(|kind| std::env::args().any(|arg| arg == kind.name())).collect();
    if kinds.is_empty() {
        kinds = all.to_vec();
    }
    println!("{:>9} {:<7} {:>9} {:>9} {:>9} {:>9}", "count", "", "import", "again", "cp -al", "and sync");
    for (count, kind) in counts.into_iter().flat_map(|count| kinds.iter().map(move |kind| (count, *kind))) {
        let scratch = Scratch::new();
        let (root, state) = (scratch.join("store"), scratch.join("state"));
        let records = if kind == Kind::Files { CHAIN } else { count };
        make(&state, kind, records, count);
        // What was just made is not ours to write down.
        tools::run(Command::new("sync").arg("-f").arg(&state));
        let seconds = |work: &mut dyn FnMut()| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        };
        let took = seconds(&mut || {
            let report = import(&root, &state);
            assert_eq!(report.count(Outcome::Taken), records);
            assert_eq!(report.keys_count, records);
        });
        let again = seconds(&mut || assert_eq!(import(&root, &state).count(Outcome::Here), records));
        print!("{count:>9} {:<7} {took:>8.2}s {again:>8.2}s", kind.name());
        if kind != Kind::Lazy {
            let (from, to) = (state.join("runc-overlayfs/snapshots"), scratch.join("copy"));
            let copied = seconds(&mut || drop(tools::run(Command::new("cp").arg("-al").arg(&from).arg(&to))));
            let synced = seconds(&mut || drop(tools::run(Command::new("sync").arg("-f").arg(&to))));
            print!(" {copied:>8.2}s {:>8.2}s", copied + synced);
        }
        println!();
    }
}
