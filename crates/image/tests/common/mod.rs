//! What the tests of this crate share: a store with a layer store on it, and tars to put in.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use plies_archive::Limits;
use plies_image::{LayerRef, LayerStore, LayerStoreError, LayerStoreOptions};
use plies_oci::{ChainId, Compression, DiffId, Sha256Hasher};
use plies_store::progress::Silent;
use plies_store::{
    Cancel, CheckOptions, DriverKind, GcMode, Lease, LeaseOptions, OpenOptions, Store, Transfer, WaitPolicy,
};
use plies_testkit::tar::{Member, archive};
use tempfile::TempDir;

pub struct Rig {
    pub dir: Arc<TempDir>,
    pub driver: DriverKind,
    pub options: LayerStoreOptions,
    pub warnings: Arc<Mutex<Vec<String>>>,
}

/// An open store, and what requests on it need.
pub struct Open {
    pub layers: LayerStore,
    pub lease: Lease,
    limits: Limits,
    cancel: Cancel,
    // Dropped last: it removes the store.
    _dir: Arc<TempDir>,
}

impl Rig {
    pub fn new() -> Self {
        Self {
            dir: Arc::new(tempfile::tempdir().unwrap()),
            driver: DriverKind::default(),
            options: LayerStoreOptions::default(),
            warnings: Arc::default(),
        }
    }

    pub fn open(&self) -> Open {
        // A second later whenever somebody looks: what is made again shows.
        let seconds = AtomicU64::new(4_000_000_000);
        let clock = move || UNIX_EPOCH + Duration::from_secs(seconds.fetch_add(1, Ordering::Relaxed));
        let mut options = OpenOptions::new(Arc::new(clock));
        options.driver = self.driver;
        let warnings = Arc::clone(&self.warnings);
        options.warn = Arc::new(move |error| warnings.lock().unwrap().push(error.to_string()));
        let store = Store::open(&self.dir.path().join("store"), options, WaitPolicy::Fail).unwrap();
        let layers = LayerStore::open(&store, self.options).unwrap();
        let lease = store.lease(LeaseOptions::process("test")).unwrap();
        Open { layers, lease, limits: Limits::default(), cancel: Cancel::new(), _dir: Arc::clone(&self.dir) }
    }
}

impl Open {
    pub fn store(&self) -> &Store {
        self.layers.store()
    }

    pub fn transfer(&self) -> Transfer<'_> {
        Transfer { lease: &self.lease, limits: &self.limits, progress: &Silent, cancel: &self.cancel }
    }

    pub fn register(&self, tar: &[u8], parent: Option<ChainId>) -> Result<LayerRef, LayerStoreError> {
        self.layers.register(tar, Compression::None, parent, &self.transfer())
    }

    /// A chain of layers that are held by nothing but the reference that is given.
    pub fn chain(&self, tars: &[Vec<u8>]) -> LayerRef {
        let mut last: Option<LayerRef> = None;
        for tar in tars {
            last = Some(self.register(tar, last.as_ref().map(LayerRef::chain_id)).unwrap());
        }
        last.unwrap()
    }

    pub fn export(&self, layer: &LayerRef) -> Result<Vec<u8>, LayerStoreError> {
        let mut tar = Vec::new();
        self.layers.export(layer, &mut tar, &self.transfer())?;
        Ok(tar)
    }

    /// Everything that nothing holds goes, also what only this process's requests held; then all must be in order.
    pub fn collect(&mut self) {
        let fresh = self.store().lease(LeaseOptions::process("test")).unwrap();
        std::mem::replace(&mut self.lease, fresh).release().unwrap();
        self.store().gc(GcMode::Run).unwrap();
        let mut findings = self.store().check(&CheckOptions::deep()).unwrap();
        self.store().read(|rows| plies_image::check(self.store(), rows, &mut findings)).unwrap();
        assert!(findings.found.is_empty(), "{:#?}", findings.found);
    }

    /// How many layers and blobs there are.
    pub fn counts(&self) -> (usize, usize) {
        let (mut layers, mut blobs) = (0, 0);
        let count = |n: &mut usize| {
            *n += 1;
            std::ops::ControlFlow::Continue(())
        };
        self.store().layers().scan(|_| count(&mut layers)).unwrap();
        self.store().content().scan(|_, _| count(&mut blobs)).unwrap();
        (layers, blobs)
    }
}

pub fn diff_id(tar: &[u8]) -> DiffId {
    let mut hasher = Sha256Hasher::default();
    hasher.update(tar);
    DiffId::from_bytes(hasher.finish())
}

/// A tar of one file, unlike all others.
pub fn tar(n: usize) -> Vec<u8> {
    archive(&[Member::dir("d"), Member::file(format!("d/{n}"), format!("content {n}"))])
}
