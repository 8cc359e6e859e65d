//! What the tests of this crate share: a cache whose clock stands still, trees made of a few words and listed the same
//! way, and a recount of everything that a row says.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use plies_archive::Limits;
use plies_cache::{
    Accessor, ImmutableRef, Manager, ManagerOptions, MutableRef, Parents, RecordId, RecordOptions, RecordRow, State,
    UseRow,
};
use plies_oci::{BlobDigest, ChainId};
use plies_store::{
    ActiveId, Attach, Cancel, CheckOptions, Depth, DriverKind, OpenOptions, Owner, Resource, Row, Rows, Stamp, Store,
    Table, WaitPolicy, held_by,
};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

pub const EPOCH_SECONDS: u64 = 4_000_000_000;

pub const RECORDS: Table<RecordId, RecordRow> = Table::new("cache.records");
/// The same table, for rows that no version of Plies wrote.
pub const RAW_RECORDS: Table<RecordId, Garbage> = Table::new("cache.records");
pub const NEWER_RECORDS: Table<RecordId, Newer> = Table::new("cache.records");
pub const USES: Table<RecordId, UseRow> = Table::new("cache.uses");
pub const CHILDREN: Table<(RecordId, RecordId), ()> = Table::new("cache.children");
pub const BY_CHAIN: Table<(ChainId, RecordId), ()> = Table::new("cache.by_chain");
pub const BY_BLOB_CHAIN: Table<(BlobDigest, RecordId), ()> = Table::new("cache.by_blob_chain");
pub const COMPOSITIONS: Table<BlobDigest, IdRow> = Table::new("cache.compositions");
pub const ACTIVES: Table<ActiveId, IdRow> = Table::new("cache.actives");
pub const HOLDS: Table<(Owner, Resource), ()> = Table::new("holds");

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdRow(pub RecordId);

impl Row for IdRow {
    const VERSION: u8 = 1;
}

/// Of the right version and nothing else.
#[derive(Debug, Serialize, Deserialize)]
pub struct Garbage(pub Vec<u8>);

impl Row for Garbage {
    const VERSION: u8 = 2;
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Newer(pub u8);

impl Row for Newer {
    const VERSION: u8 = 99;
}

/// A place for a store, over several openings.
pub struct Rig {
    root: PathBuf,
    /// Goes with the rig, unless the store is somebody else's.
    dir: Option<TempDir>,
    pub clock_seconds: Arc<AtomicU64>,
    pub warnings: Arc<Mutex<Vec<String>>>,
    pub driver: DriverKind,
}

/// An open cache.
pub struct Cache {
    pub manager: Manager,
    pub accessor: Accessor,
    pub store: Store,
}

impl std::ops::Deref for Cache {
    type Target = Accessor;

    fn deref(&self) -> &Accessor {
        &self.accessor
    }
}

impl Rig {
    pub fn new() -> Self {
        Self::with_driver(DriverKind::default())
    }

    pub fn with_driver(driver: DriverKind) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let rig = Self::at(&dir.path().join("store"));
        Self { driver, dir: Some(dir), ..rig }
    }

    /// With the store in this directory, which stays.
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            dir: None,
            clock_seconds: Arc::new(AtomicU64::new(EPOCH_SECONDS)),
            warnings: Arc::default(),
            driver: DriverKind::default(),
        }
    }

    pub fn root(&self) -> PathBuf {
        self.root.clone()
    }

    pub fn open_store(&self) -> Store {
        let clock = Arc::clone(&self.clock_seconds);
        let mut options =
            OpenOptions::new(Arc::new(move || UNIX_EPOCH + Duration::from_secs(clock.load(Ordering::SeqCst))));
        options.command = "test".into();
        let warnings = Arc::clone(&self.warnings);
        options.warn = Arc::new(move |error| warnings.lock().unwrap().push(error.to_string()));
        options.driver = self.driver;
        Store::open(&self.root(), options, WaitPolicy::Fail).unwrap()
    }

    pub fn manager_options(&self) -> ManagerOptions {
        let warnings = Arc::clone(&self.warnings);
        ManagerOptions {
            limits: Limits::default(),
            checker: None,
            warn: Arc::new(move |error| warnings.lock().unwrap().push(error.to_string())),
        }
    }

    pub fn open(&self) -> Cache {
        let store = self.open_store();
        let manager = Manager::open(store.clone(), self.manager_options()).unwrap();
        Cache { accessor: manager.accessor(), manager, store }
    }

    pub fn advance(&self, by: Duration) {
        self.clock_seconds.fetch_add(by.as_secs(), Ordering::SeqCst);
    }

    pub fn now(&self) -> Stamp {
        (UNIX_EPOCH + Duration::from_secs(self.clock_seconds.load(Ordering::SeqCst))).into()
    }

    #[track_caller]
    pub fn assert_no_warnings(&self) {
        assert_eq!(*self.warnings.lock().unwrap(), Vec::<String>::new());
    }
}

impl Cache {
    /// Closes it, as a process that ends.
    pub fn close(self) {
        let Self { manager, accessor, store } = self;
        drop(accessor);
        manager.close().unwrap();
        store.close().unwrap();
    }

    pub fn row(&self, id: RecordId) -> Option<RecordRow> {
        self.store.read(|rows| rows.get(&RECORDS, &id)).unwrap()
    }

    #[track_caller]
    pub fn must(&self, id: RecordId) -> RecordRow {
        self.row(id).unwrap_or_else(|| panic!("no row of {id}"))
    }

    pub fn ids(&self) -> BTreeSet<RecordId> {
        let mut ids = BTreeSet::new();
        let read = self.store.read(|rows| {
            rows.scan_keys_from(&RECORDS, &RecordId::from_bytes([0; 16]), |id| {
                ids.insert(id);
                std::ops::ControlFlow::Continue(())
            })
        });
        let read: Result<(), plies_store::CatalogueError> = read;
        read.unwrap();
        ids
    }

    pub fn uses(&self, id: RecordId) -> UseRow {
        self.store.read(|rows| rows.get(&USES, &id)).unwrap().unwrap_or_default()
    }

    /// Overwrites a record's row with what is none.
    pub fn spoil(&self, id: RecordId) {
        self.store.write(|tx| tx.put(&RAW_RECORDS, &id, &Garbage(vec![0xff; 3])).map(drop)).unwrap();
    }

    /// As a version to come would write it.
    pub fn put_newer(&self, id: RecordId) {
        self.store.write(|tx| tx.put(&NEWER_RECORDS, &id, &Newer(1)).map(drop)).unwrap();
    }

    /// A record with these changes on top of `parent`, committed and not finalized.
    #[track_caller]
    pub fn layer(&self, parent: Option<&ImmutableRef>, ops: &[Op]) -> ImmutableRef {
        let work = self.create(parent, &RecordOptions::by("layer")).unwrap();
        write(&work, ops);
        work.commit().unwrap()
    }

    #[track_caller]
    pub fn finalized(&self, parent: Option<&ImmutableRef>, ops: &[Op]) -> ImmutableRef {
        let made = self.layer(parent, ops);
        made.finalize().unwrap();
        made
    }

    #[track_caller]
    pub fn merged(&self, inputs: &[&ImmutableRef]) -> ImmutableRef {
        let inputs: Vec<_> = inputs.iter().map(|input| Some(*input)).collect();
        self.merge(&inputs, &RecordOptions::by("merge")).unwrap().unwrap()
    }

    #[track_caller]
    pub fn diffed(&self, lower: &ImmutableRef, upper: &ImmutableRef) -> ImmutableRef {
        self.diff(Some(lower), Some(upper), &RecordOptions::by("diff")).unwrap()
    }
}

/// One change to a tree.
#[derive(Debug, Clone, Copy)]
pub enum Op {
    /// Its directories are made.
    File(&'static str, &'static str),
    Dir(&'static str, u32),
    Chmod(&'static str, u32),
    /// With everything below it.
    Rm(&'static str),
    Symlink(&'static str, &'static str),
    /// A further name of the second, which is there.
    Link(&'static str, &'static str),
    Fifo(&'static str),
    /// Away and back.
    Shuffle(&'static str),
    Attr(&'static str, &'static str, &'static str),
    /// User and group.
    Chown(&'static str, u32, u32),
    /// A character device's major and minor number.
    Device(&'static str, u32, u32),
}

/// The path of an open directory.
pub fn path_of(dir: &impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/.", dir.as_fd().as_raw_fd()))
}

#[track_caller]
pub fn write(work: &MutableRef, ops: &[Op]) {
    if ops.is_empty() {
        return;
    }
    let mounted = work.mount(Attach::Detached).unwrap();
    apply(&path_of(&mounted.root()), ops);
    mounted.unmount().unwrap();
}

pub fn apply(root: &Path, ops: &[Op]) {
    for op in ops {
        match *op {
            Op::File(path, text) => {
                fs::create_dir_all(root.join(path).parent().unwrap()).unwrap();
                fs::write(root.join(path), text).unwrap();
            }
            Op::Dir(path, mode) => {
                fs::create_dir_all(root.join(path)).unwrap();
                fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode)).unwrap();
            }
            Op::Chmod(path, mode) => {
                fs::set_permissions(root.join(path), fs::Permissions::from_mode(mode)).unwrap();
            }
            Op::Rm(path) => {
                let path = root.join(path);
                if fs::symlink_metadata(&path).unwrap().is_dir() {
                    fs::remove_dir_all(path).unwrap();
                } else {
                    fs::remove_file(path).unwrap();
                }
            }
            Op::Symlink(path, target) => std::os::unix::fs::symlink(target, root.join(path)).unwrap(),
            Op::Link(path, target) => fs::hard_link(root.join(target), root.join(path)).unwrap(),
            Op::Fifo(path) => {
                let mode = rustix::fs::Mode::from_raw_mode(0o644);
                rustix::fs::mknodat(rustix::fs::CWD, root.join(path), rustix::fs::FileType::Fifo, mode, 0).unwrap();
            }
            Op::Shuffle(path) => {
                let away = root.join(format!("{path}.away"));
                fs::rename(root.join(path), &away).unwrap();
                fs::rename(away, root.join(path)).unwrap();
            }
            Op::Attr(path, name, value) => {
                let flags = rustix::fs::XattrFlags::empty();
                rustix::fs::setxattr(root.join(path), name, value.as_bytes(), flags).unwrap();
            }
            Op::Chown(path, user, group) => {
                std::os::unix::fs::lchown(root.join(path), Some(user), Some(group)).unwrap();
            }
            Op::Device(path, major, minor) => {
                let (mode, device) = (rustix::fs::Mode::from_raw_mode(0o644), rustix::fs::makedev(major, minor));
                let kind = rustix::fs::FileType::CharacterDevice;
                rustix::fs::mknodat(rustix::fs::CWD, root.join(path), kind, mode, device).unwrap();
            }
        }
    }
}

pub type Tree = BTreeMap<String, String>;

/// What a ref shows: a line for each path, without the root itself.
#[track_caller]
pub fn tree(held: &ImmutableRef) -> Tree {
    let Some(mounted) = held.mount(Attach::Detached, &Cancel::new()).unwrap() else { return Tree::new() };
    let listed = listing(&path_of(&mounted.root()));
    mounted.unmount().unwrap();
    listed
}

#[track_caller]
pub fn tree_of_mutable(held: &MutableRef) -> Tree {
    let mounted = held.mount(Attach::Detached).unwrap();
    let listed = listing(&path_of(&mounted.root()));
    mounted.unmount().unwrap();
    listed
}

/// What these changes make of an empty directory.
pub fn tree_after(ops: &[Op]) -> Tree {
    let dir = tempfile::tempdir().unwrap();
    apply(dir.path(), ops);
    listing(dir.path())
}

pub fn listing(root: &Path) -> Tree {
    let mut lines = Tree::new();
    let mut links: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let mut pending = vec![String::new()];
    while let Some(name) = pending.pop() {
        let path = if name.is_empty() { root.to_owned() } else { root.join(&name) };
        let metadata = fs::symlink_metadata(&path).unwrap();
        let kind = metadata.file_type();
        let what = if kind.is_dir() {
            for entry in fs::read_dir(&path).unwrap() {
                let child = entry.unwrap().file_name().into_string().unwrap();
                pending.push(if name.is_empty() { child } else { format!("{name}/{child}") });
            }
            "dir".to_owned()
        } else if kind.is_symlink() {
            format!("-> {}", fs::read_link(&path).unwrap().display())
        } else if kind.is_file() {
            links.entry(metadata.ino()).or_default().push(name.clone());
            format!("file {:?}", fs::read_to_string(&path).unwrap())
        } else if kind.is_fifo() {
            "fifo".to_owned()
        } else {
            format!("device {}", metadata.rdev())
        };
        let mode = if kind.is_symlink() { 0 } else { metadata.mode() & 0o7777 };
        lines.insert(name, format!("{what} {mode:o}"));
    }
    for names in links.values().filter(|names| names.len() > 1) {
        let first = names.iter().min().unwrap();
        for name in names.iter().filter(|name| *name != first) {
            lines.get_mut(name).unwrap().push_str(&format!(" = {first}"));
        }
    }
    lines.remove("");
    lines
}

pub fn owner(id: RecordId) -> Owner {
    Owner::new("record", id)
}

fn composition(parents: &Parents) -> Option<BlobDigest> {
    let mut bytes = match parents {
        Parents::None | Parents::Layer(_) => return None,
        Parents::Merge(_) => b"merge".to_vec(),
        Parents::Diff { .. } => b"diff".to_vec(),
    };
    parents.ids().iter().for_each(|id| bytes.extend(id.as_bytes()));
    Some(BlobDigest::of(&bytes))
}

/// Counts everything again that rows say of each other: parents and children, indexes, holds, pairs; and has the store
/// check itself.
#[track_caller]
pub fn assert_sound(cache: &Cache) {
    let store = &cache.store;
    let all: BTreeMap<RecordId, RecordRow> = store.read(|rows| rows.all(&RECORDS)).unwrap().into_iter().collect();
    let (mut children, mut chains, mut blob_chains) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
    let (mut actives, mut holds) = (BTreeMap::new(), BTreeSet::new());
    for (id, row) in &all {
        for parent in row.parents.ids() {
            assert!(all.contains_key(&parent), "{id} stands on {parent}, which is gone");
            children.insert((parent, *id));
        }
        chains.extend(row.chain_id.map(|chain| (chain, *id)));
        blob_chains.extend(row.blob_chain_id.map(|chain| (chain, *id)));
        let mut hold = |resource: Resource| {
            holds.insert((owner(*id).as_str().to_owned(), resource));
        };
        match &row.state {
            State::Mutable { active, committed_as } => {
                assert_eq!(actives.insert(*active, *id), None, "two write to {active}");
                hold((*active).into());
                if let Some(partner) = committed_as {
                    let other = &all[partner].state;
                    assert_eq!(*other, State::Shared { mutable: *id, active: *active }, "{id} and {partner}");
                }
            }
            State::Shared { mutable, active } => {
                hold((*active).into());
                let other = &all[mutable].state;
                assert_eq!(*other, State::Mutable { active: *active, committed_as: Some(*id) }, "{mutable} and {id}");
            }
            State::Sealed { layer } => layer.iter().for_each(|layer| hold((*layer).into())),
            State::Stack(snapshot) => hold((*snapshot).into()),
            State::Lazy | State::Composed => {}
        }
        row.snapshot.iter().for_each(|snapshot| hold((*snapshot).into()));
        if let Some(digest) = row.blob.as_ref().and_then(|blob| blob.digest)
            && store.read(|rows| rows.has(digest)).unwrap()
        {
            hold(digest.into());
        }
        if let Some(composition) = composition(&row.parents) {
            let found = store.read(|rows| rows.get(&COMPOSITIONS, &composition)).unwrap();
            let found = found.unwrap_or_else(|| panic!("{id} is not found again")).0;
            assert_eq!(all[&found].parents, row.parents);
        }
    }
    fn keys<K: plies_store::Key + Ord, V: Row>(store: &Store, table: &Table<K, V>) -> BTreeSet<K> {
        store.read(|rows| rows.all(table)).unwrap().into_iter().map(|(key, _)| key).collect()
    }
    assert_eq!(keys(store, &CHILDREN), children);
    assert_eq!(keys(store, &BY_CHAIN), chains);
    assert_eq!(keys(store, &BY_BLOB_CHAIN), blob_chains);
    for (composition_key, found) in store.read(|rows| rows.all(&COMPOSITIONS)).unwrap() {
        assert_eq!(composition(&all[&found.0].parents), Some(composition_key));
    }
    let listed: BTreeMap<ActiveId, RecordId> =
        store.read(|rows| rows.all(&ACTIVES)).unwrap().into_iter().map(|(active, IdRow(id))| (active, id)).collect();
    assert_eq!(listed, actives);
    assert!(keys(store, &USES).iter().all(|id| all.contains_key(id)), "uses of records that are gone");
    let held: BTreeSet<(String, Resource)> = keys(store, &HOLDS)
        .into_iter()
        .map(|(owner, resource)| (owner.as_str().to_owned(), resource))
        .filter(|(owner, _)| owner.starts_with(Owner::new("record", "").as_str()))
        .collect();
    // Variants of its blob are the only thing that a record holds and its row does not name.
    let (unnamed, named): (BTreeSet<_>, BTreeSet<_>) = held.into_iter().partition(|hold| !holds.contains(hold));
    assert_eq!(named, holds);
    for (owner, variant) in unnamed {
        let row = all.iter().find(|(id, _)| self::owner(**id).as_str() == owner).unwrap().1;
        assert!(matches!(variant, Resource::Blob(_)) && row.blob.is_some(), "{owner} holds {variant}");
    }
    assert_healthy(store);
}

#[track_caller]
pub fn assert_healthy(store: &Store) {
    let mut findings = store.check(&CheckOptions::new(Depth::Graph)).unwrap();
    store.read(|rows| plies_cache::check(rows, &mut findings)).unwrap();
    assert!(findings.found.is_empty(), "{:#?}", findings.found);
}

/// Nobody holds anything, and no lease of a request is left.
#[track_caller]
pub fn assert_idle(cache: &Cache) {
    assert_eq!(cache.manager.held(), []);
    assert_eq!(cache.store.leases().unwrap(), []);
}

pub fn holds_of(cache: &Cache, id: RecordId) -> Vec<Resource> {
    cache.store.read(|rows| held_by(rows, &owner(id))).unwrap()
}

pub fn unknown() -> RecordId {
    RecordId::from_bytes([0x5a; 16])
}

/// How many files and directories there are, and how many names they have together.
pub fn inodes_below(dir: &Path) -> (usize, u64) {
    let (mut inodes, mut names, mut pending) = (BTreeSet::new(), 0, vec![dir.to_owned()]);
    while let Some(path) = pending.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            names += 1;
        }
        inodes.insert(metadata.ino());
    }
    (inodes.len(), names)
}

pub fn layers_count(cache: &Cache) -> usize {
    let mut count = 0;
    cache
        .store
        .layers()
        .scan(|_| {
            count += 1;
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    count
}
