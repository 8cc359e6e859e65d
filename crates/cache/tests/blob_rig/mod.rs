//! Stores with a build cache on them, layers as blobs, and somebody who hands the blobs out and counts.
#![allow(dead_code, missing_docs, missing_debug_implementations, unreachable_pub, clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use plies_cache::{
    Accessor, BlobRow, ImmutableRef, Manager, ManagerOptions, MutableRef, Provider, Providers, RecordOptions,
    UNCOMPRESSED,
};
use plies_oci::{BlobDigest, Descriptor, DiffId, MediaType};
use plies_store::{Attach, DriverKind, OpenOptions, Store, WaitPolicy};
use plies_testkit::image::Packing;
use plies_testkit::scratch::Scratch;
use plies_testkit::tar::{Member, archive};

/// Seconds since 1970 that the clock shows at first: 2022-03-01T00:00:00Z.
pub const EPOCH_SECONDS: u64 = 1_646_092_800;

pub struct Rig {
    pub scratch: Scratch,
    pub clock_micros: Arc<AtomicU64>,
    pub warnings: Arc<Mutex<Vec<String>>>,
    pub driver: DriverKind,
}

impl Rig {
    /// `None`, said aloud, without the right to give files to anybody.
    pub fn new() -> Option<Self> {
        Self::with_driver(DriverKind::Native)
    }

    pub fn with_driver(driver: DriverKind) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: needs root, to unpack files of others");
            return None;
        }
        let clock_micros = Arc::new(AtomicU64::new(EPOCH_SECONDS * 1_000_000));
        Some(Self { scratch: Scratch::new(), clock_micros, warnings: Arc::default(), driver })
    }

    pub fn root(&self) -> PathBuf {
        self.scratch.join("store")
    }

    pub fn store(&self) -> Store {
        let (clock, warnings) = (Arc::clone(&self.clock_micros), Arc::clone(&self.warnings));
        let now = move || UNIX_EPOCH + Duration::from_micros(clock.load(Ordering::SeqCst));
        let mut options = OpenOptions::new(Arc::new(now));
        options.warn = Arc::new(move |error| warnings.lock().unwrap().push(error.to_string()));
        options.driver = self.driver;
        Store::open(&self.root(), options, WaitPolicy::Fail).unwrap()
    }

    pub fn open(&self) -> (Store, Manager) {
        let store = self.store();
        let manager = self.manager(&store);
        (store, manager)
    }

    pub fn manager(&self, store: &Store) -> Manager {
        let warnings = Arc::clone(&self.warnings);
        let options = ManagerOptions {
            limits: plies_archive::Limits::default(),
            checker: None,
            warn: Arc::new(move |error| warnings.lock().unwrap().push(error.to_string())),
        };
        Manager::open(store.clone(), options).unwrap()
    }

    pub fn advance(&self, by: Duration) {
        self.clock_micros.fetch_add(u64::try_from(by.as_micros()).unwrap(), Ordering::SeqCst);
    }
}

/// A layer as somebody would push it.
#[derive(Debug, Clone)]
pub struct Layer {
    pub tar: Vec<u8>,
    pub bytes: Vec<u8>,
    pub descriptor: Descriptor,
}

impl Layer {
    pub fn new(members: &[Member], packing: Packing) -> Self {
        Self::of_tar(archive(members), packing)
    }

    pub fn of_tar(tar: Vec<u8>, packing: Packing) -> Self {
        let bytes = packing.pack(&tar);
        let media_type = MediaType::from(packing.media_type());
        let mut descriptor = Descriptor::new(media_type, BlobDigest::of(&bytes), bytes.len() as u64);
        let diff_id = format!("sha256:{}", plies_testkit::sha256_hex(&tar));
        descriptor.annotations.insert(UNCOMPRESSED.to_owned(), diff_id);
        Self { tar, bytes, descriptor }
    }

    /// One file.
    pub fn file(name: &str, data: &str) -> Self {
        Self::new(&[Member::file(name, data)], Packing::Gzip)
    }

    pub fn repacked(&self, packing: Packing) -> Self {
        Self::of_tar(self.tar.clone(), packing)
    }

    pub fn digest(&self) -> BlobDigest {
        self.descriptor.digest
    }

    pub fn diff_id(&self) -> DiffId {
        self.descriptor.annotations[UNCOMPRESSED].parse().unwrap()
    }
}

/// Hands blobs out, and counts how often.
#[derive(Default)]
pub struct Source {
    pub blobs: Mutex<HashMap<BlobDigest, Vec<u8>>>,
    pub opens: AtomicUsize,
    /// Bytes come one by one, a thousand a second at most.
    pub slow: Arc<AtomicBool>,
    pub failing: AtomicBool,
    pub panicking: AtomicBool,
    pub asked_for: Mutex<Vec<BlobDigest>>,
}

struct Slow {
    bytes: io::Cursor<Vec<u8>>,
    slow: Arc<AtomicBool>,
}

impl Read for Slow {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.slow.load(Ordering::SeqCst) && !buffer.is_empty() {
            std::thread::sleep(Duration::from_millis(1));
            return self.bytes.read(&mut buffer[..1]);
        }
        self.bytes.read(buffer)
    }
}

impl Provider for Source {
    fn open(&self, blob: &BlobRow) -> io::Result<Box<dyn Read + Send>> {
        self.opens.fetch_add(1, Ordering::SeqCst);
        let digest = blob.digest.unwrap();
        self.asked_for.lock().unwrap().push(digest);
        assert!(!self.panicking.load(Ordering::SeqCst), "the provider panics, as the test wants");
        if self.failing.load(Ordering::SeqCst) {
            return Err(io::Error::new(io::ErrorKind::ConnectionRefused, "no route"));
        }
        let bytes = self.blobs.lock().unwrap().get(&digest).cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(Slow { bytes: io::Cursor::new(bytes), slow: Arc::clone(&self.slow) }))
    }
}

impl Source {
    pub fn of(layers: &[&Layer]) -> Arc<Self> {
        let source = Arc::new(Self::default());
        for layer in layers {
            source.blobs.lock().unwrap().insert(layer.digest(), layer.bytes.clone());
        }
        source
    }

    pub fn opens(&self) -> usize {
        self.opens.load(Ordering::SeqCst)
    }

    pub fn providers(self: &Arc<Self>, layers: &[&Layer]) -> Providers {
        let provider = |layer: &&Layer| (layer.digest(), Arc::clone(self) as Arc<dyn Provider>);
        layers.iter().map(provider).collect()
    }

    pub fn options(self: &Arc<Self>, layers: &[&Layer]) -> RecordOptions {
        RecordOptions { providers: self.providers(layers), ..RecordOptions::default() }
    }
}

/// A lazy record whose blob `source` has.
pub fn lazy(cache: &Accessor, layer: &Layer, parent: Option<&ImmutableRef>, source: &Arc<Source>) -> ImmutableRef {
    cache.get_by_blob(&layer.descriptor, parent, &source.options(&[layer])).unwrap()
}

/// Writes a file into a mutable record.
pub fn write(record: &MutableRef, name: &str, data: &str) {
    let mounted = record.mount(Attach::InStore).unwrap();
    let path = mounted.path().unwrap().join(name);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, data).unwrap();
    mounted.unmount().unwrap();
}

/// A record of one file on top of `parent`, as a step makes it.
pub fn built(cache: &Accessor, parent: Option<&ImmutableRef>, name: &str, data: &str) -> ImmutableRef {
    let record = cache.create(parent, &RecordOptions::by("build")).unwrap();
    write(&record, name, data);
    let committed = record.commit().unwrap();
    committed.finalize().unwrap();
    committed
}

pub fn read_file(record: &ImmutableRef, name: &str) -> Option<String> {
    let mounted = record.mount(Attach::InStore, &plies_store::Cancel::new()).unwrap()?;
    let text = std::fs::read_to_string(mounted.path().unwrap().join(name)).ok();
    mounted.unmount().unwrap();
    text
}

pub fn blobs(store: &Store) -> Vec<BlobDigest> {
    let mut all = Vec::new();
    let visit = |digest, _| {
        all.push(digest);
        std::ops::ControlFlow::Continue(())
    };
    store.content().scan(visit).unwrap();
    all
}

pub fn layers_count(store: &Store) -> usize {
    let mut count = 0;
    let visit = |_| {
        count += 1;
        std::ops::ControlFlow::Continue(())
    };
    store.layers().scan(visit).unwrap();
    count
}

fn is_empty(dir: &Path) -> bool {
    std::fs::read_dir(dir).map_or(true, |mut entries| entries.next().is_none())
}

/// Nothing is on its way: no lease, no ingest, no stage.
pub fn is_idle(store: &Store) -> bool {
    let root = store.root();
    store.leases().unwrap().is_empty()
        && ["content/ingest", "layers/stage", "run"].iter().all(|dir| is_empty(&root.join(dir)))
}

/// Puts a row past the cache, as another version of it would have left it.
pub fn put_row(store: &Store, id: plies_cache::RecordId, row: &plies_cache::RecordRow) {
    let table = plies_store::Table::new("cache.records");
    store.write(|tx| tx.put(&table, &id, row).map(drop)).unwrap();
}
