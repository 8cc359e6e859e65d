//! How long an import of a BuildKit worker takes, by its number of records: `cargo bench -p plies-import --bench buildkit
//! [-- [lazy] [layers] RECORDS...]`,
//! as root.
//!
//! The worker is made first, and does not count: chains of ten records, each with a result and the link that leads to it.
//! Once they are lazy, as what was found in a remote cache and never needed; once each has a committed snapshot of one
//! file, which is linked. Then the same is imported again.

// A program of its own, for people to read.
#![allow(clippy::unwrap_used, missing_docs)]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use plies_archive::Limits;
use plies_cache::{Manager, ManagerOptions};
use plies_import::{Import, ImportOptions, ImportReport, Outcome, buildkit};
use plies_oci::DocumentLimits;
use plies_store::{Cancel, OpenOptions, Store, WaitPolicy, progress};
use plies_testkit::buildkit::{COMMITTED, Worker, bucket, bytes, write};
use plies_testkit::scratch::Scratch;
use plies_testkit::sha256_hex;
use serde_json::json;

/// Steps of a build.
const CHAIN: usize = 10;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Lazy,
    Layers,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Lazy => "lazy",
            Self::Layers => "layers",
        }
    }
}

fn make(state: &Path, kind: Kind, records: usize) {
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
        if kind == Kind::Layers {
            let dir = worker.snapshot(&id, COMMITTED, parent.as_deref());
            fs::write(dir.join(&id), &id).unwrap();
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
    };
    buildkit::import(&import, state).unwrap()
}

fn main() {
    let mut records: Vec<usize> = std::env::args().filter_map(|arg| arg.parse().ok()).collect();
    if records.is_empty() {
        records = vec![1_000, 10_000];
    }
    let named = |kind: &Kind| std::env::args().any(|arg| arg == kind.name());
    let mut kinds: Vec<Kind> = [Kind::Lazy, Kind::Layers].into_iter().filter(named).collect();
    if kinds.is_empty() {
        kinds = vec![Kind::Lazy, Kind::Layers];
    }
    println!("{:>9} {:>7} {:>10} {:>12} {:>10}", "records", "", "import", "records/s", "again");
    for (records, kind) in records.into_iter().flat_map(|records| kinds.iter().map(move |kind| (records, *kind))) {
        let scratch = Scratch::new();
        let (root, state) = (scratch.join("store"), scratch.join("state"));
        make(&state, kind, records);
        let start = Instant::now();
        let report = import(&root, &state);
        let took = start.elapsed().as_secs_f64();
        assert_eq!(report.count(Outcome::Taken), records);
        assert_eq!(report.keys_count, records);
        let start = Instant::now();
        let again = import(&root, &state);
        let again_took = start.elapsed().as_secs_f64();
        assert_eq!(again.count(Outcome::Here), records);
        let rate = records as f64 / took;
        println!("{records:>9} {:>7} {took:>9.2}s {rate:>12.0} {again_took:>9.2}s", kind.name());
    }
}
