//! What the tests of disk usage and prune share: a cache with a clock that stands still, and records written row by
//! row, so that any state can be had without running anything.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use plies_archive::{Limits, Usage as Cost};
use plies_cache::{
    Accessor, BlobRow, Controller, Manager, ManagerOptions, Parents, RecordId, RecordRow, RecordType, RecordUsage,
    SharedChecker, State, UseRow,
};
use plies_oci::{BlobDigest, DiffId};
use plies_store::{
    Expected, LayerContents, LayerId, LeaseOptions, OpenOptions, Owner, Row, Stamp, Store, Table, WaitPolicy, Warn,
};
use tempfile::TempDir;

pub const RECORDS: Table<RecordId, RecordRow> = Table::new("cache.records");
pub const CHILDREN: Table<(RecordId, RecordId), ()> = Table::new("cache.children");
pub const USES: Table<RecordId, UseRow> = Table::new("cache.uses");
/// The same tables, for rows that are none.
pub const RECORDS_AS_NUMBERS: Table<RecordId, u64> = Table::new("cache.records");
pub const RECORDS_TOO_NEW: Table<RecordId, TooNew> = Table::new("cache.records");
pub const RECORDS_BY_TEXT: Table<String, u64> = Table::new("cache.records");

#[derive(serde::Serialize, serde::Deserialize)]
pub struct TooNew(pub u8);

impl Row for TooNew {
    const VERSION: u8 = 200;
}

/// What the clock shows, in seconds since 1970.
pub const NOW: u64 = 4_000_000_000;

pub const HOUR: Duration = Duration::from_secs(3600);

pub struct Rig {
    pub dir: TempDir,
    pub clock: Arc<AtomicU64>,
    pub store: Store,
    pub manager: Manager,
    pub cache: Accessor,
    pub control: Controller,
    pub warnings: Arc<Mutex<Vec<String>>>,
}

pub fn open_store(root: &Path, clock: &Arc<AtomicU64>) -> Store {
    let clock = Arc::clone(clock);
    let mut options =
        OpenOptions::new(Arc::new(move || UNIX_EPOCH + Duration::from_secs(clock.load(Ordering::SeqCst))));
    options.command = "test".into();
    Store::open(root, options, WaitPolicy::Fail).unwrap()
}

impl Rig {
    pub fn new() -> Self {
        Self::with_checker(None)
    }

    pub fn with_checker(checker: Option<Arc<dyn SharedChecker>>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let clock = Arc::new(AtomicU64::new(NOW));
        let store = open_store(&dir.path().join("store"), &clock);
        let warnings: Arc<Mutex<Vec<String>>> = Arc::default();
        let told = Arc::clone(&warnings);
        let warn = Arc::new(move |error: &dyn std::error::Error| told.lock().unwrap().push(error.to_string()));
        let manager = manager(store.clone(), checker, warn);
        let (cache, control) = (manager.accessor(), manager.controller());
        Self { dir, clock, store, manager, cache, control, warnings }
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// A sealed record with a layer of its own that costs so much.
    pub fn record(&self, name: u8, bytes: u64, parents: Parents) -> RecordId {
        let layer = (bytes > 0).then(|| layer(&self.store, bytes, Some(diff_id(name))));
        self.put(name, |row| {
            row.state = State::Sealed { layer };
            row.parents = parents;
        })
    }

    /// A record of one byte's name, with what it holds.
    pub fn put(&self, name: u8, change: impl FnOnce(&mut RecordRow)) -> RecordId {
        let mut row = blank();
        change(&mut row);
        put(&self.store, id(name), &row);
        id(name)
    }

    pub fn change(&self, id: RecordId, change: impl Fn(&mut RecordRow)) {
        let changed: Result<(), plies_store::CatalogueError> = self.store.write(|tx| {
            let mut row = plies_store::Rows::get(tx, &RECORDS, &id)?.unwrap();
            change(&mut row);
            tx.put(&RECORDS, &id, &row).map(drop)
        });
        changed.unwrap();
    }

    /// Used so long ago, so often.
    pub fn used(&self, id: RecordId, ago: Duration, count: u64) {
        let row = UseRow { last_used_at: Some(stamp_before(ago)), count };
        self.store.write(|tx| tx.put(&USES, &id, &row)).unwrap();
    }

    pub fn ids(&self) -> Vec<RecordId> {
        let mut found = Vec::new();
        self.store
            .read(|rows| {
                plies_store::Rows::scan_each(rows, &RECORDS, |id, _| {
                    found.extend(id);
                    std::ops::ControlFlow::Continue(())
                })
            })
            .unwrap();
        found
    }

    pub fn du(&self) -> Vec<RecordUsage> {
        self.control.disk_usage(&plies_cache::UsageOptions::default()).unwrap().records
    }

    pub fn row(&self, id: RecordId) -> RecordUsage {
        self.du().into_iter().find(|record| record.id == id).unwrap()
    }
}

pub fn manager(store: Store, checker: Option<Arc<dyn SharedChecker>>, warn: Warn) -> Manager {
    Manager::open(store, ManagerOptions { limits: Limits::default(), checker, warn }).unwrap()
}

pub fn id(name: u8) -> RecordId {
    // Spread over all IDs, so that their order is not that in which they are made.
    let mut bytes = [name; 16];
    bytes[0] = name.reverse_bits();
    RecordId::from_bytes(bytes)
}

pub fn diff_id(name: u8) -> DiffId {
    DiffId::from_bytes([name; 32])
}

pub fn stamp_before(ago: Duration) -> Stamp {
    Stamp::from(UNIX_EPOCH + Duration::from_secs(NOW) - ago)
}

pub fn blank() -> RecordRow {
    RecordRow {
        state: State::Sealed { layer: None },
        parents: Parents::None,
        description: String::new(),
        record_type: RecordType::Regular,
        retain: false,
        pinned: false,
        created_at: stamp_before(100 * HOUR),
        blob: None,
        chain_id: None,
        blob_chain_id: None,
        image_refs: Vec::new(),
        snapshot: None,
        took: None,
    }
}

pub fn owner(id: RecordId) -> Owner {
    Owner::new("record", id)
}

pub fn put(store: &Store, id: RecordId, row: &RecordRow) {
    let written: Result<(), plies_store::CatalogueError> = store.write(|tx| {
        tx.put(&RECORDS, &id, row)?;
        for parent in row.parents.ids() {
            tx.put(&CHILDREN, &(parent, id), &())?;
        }
        match row.state {
            State::Sealed { layer: Some(layer) } => tx.hold(&owner(id), layer)?,
            State::Mutable { active, .. } | State::Shared { active, .. } => tx.hold(&owner(id), active)?,
            _ => {}
        }
        if let Some(digest) = row.blob.as_ref().and_then(|blob| blob.digest) {
            tx.hold(&owner(id), digest)?;
        }
        row.snapshot.map(|snapshot| tx.hold(&owner(id), snapshot)).transpose()?;
        Ok(())
    });
    written.unwrap();
}

/// A layer with one file, that says it costs so much.
pub fn layer(store: &Store, bytes: u64, diff_id: Option<DiffId>) -> LayerId {
    let lease = store.lease(LeaseOptions::process("test")).unwrap();
    let stage = store.layers().stage().unwrap();
    std::fs::write(fd_path(&stage.root()).join("f"), "f").unwrap();
    let usage = Cost { size_bytes: bytes, inodes: 2, content_bytes: 1 };
    let finished = stage.finish(LayerContents { diff_id, usage, ..LayerContents::default() });
    let made = store.layers().publish(&lease, vec![finished]).unwrap()[0];
    // Nothing is collected before the test has a record hold it.
    lease.release().unwrap();
    made
}

pub fn fd_path(dir: &impl std::os::fd::AsFd) -> PathBuf {
    use std::os::fd::AsRawFd as _;
    PathBuf::from(format!("/proc/self/fd/{}/.", dir.as_fd().as_raw_fd()))
}

pub fn blob(store: &Store, text: &str) -> BlobDigest {
    let lease = store.lease(LeaseOptions::process("test")).unwrap();
    let mut ingest = store.content().ingest_unnamed().unwrap();
    ingest.write_all(text.as_bytes()).unwrap();
    let digest = ingest.commit(Expected::anything(), &lease).unwrap();
    lease.release().unwrap();
    digest
}

pub fn blob_row(digest: BlobDigest, diff_id: DiffId) -> BlobRow {
    BlobRow {
        digest: Some(digest),
        diff_id,
        media_type: "application/vnd.oci.image.layer.v1.tar".into(),
        size_bytes: 0,
        urls: Vec::new(),
        annotations: Vec::new(),
    }
}
