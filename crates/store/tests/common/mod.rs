//! What the tests of this crate share: stores with a clock that stands still, layers made of plain
//! words, and a listing of trees to compare.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use plies_archive::tar::EntryPath;
use plies_archive::{DirIndex, Implied, Usage};
use plies_oci::{BlobDigest, DiffId};
use plies_store::{
    CheckOptions, DriverKind, Expected, FinishedStage, LayerContents, LayerId, Lease, LeaseOptions, OpenOptions, Owner,
    Store, WaitPolicy,
};
use tempfile::TempDir;

/// Seconds since 1970 that the tests' clock shows at first: later than any file that they make, so
/// that ages are under the tests' control.
pub const EPOCH_SECONDS: u64 = 4_000_000_000;

pub struct Rig {
    pub dir: TempDir,
    pub clock_seconds: Arc<AtomicU64>,
    pub warnings: Arc<Mutex<Vec<String>>>,
    pub driver: DriverKind,
}

impl Rig {
    pub fn new() -> Self {
        Self::with_driver(DriverKind::default())
    }

    pub fn with_driver(driver: DriverKind) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            clock_seconds: Arc::new(AtomicU64::new(EPOCH_SECONDS)),
            warnings: Arc::default(),
            driver,
        }
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub fn options(&self) -> OpenOptions {
        let clock = Arc::clone(&self.clock_seconds);
        let warnings = Arc::clone(&self.warnings);
        let mut options =
            OpenOptions::new(Arc::new(move || UNIX_EPOCH + Duration::from_secs(clock.load(Ordering::SeqCst))));
        options.command = "test".into();
        options.warn = Arc::new(move |error| warnings.lock().unwrap().push(error.to_string()));
        options.driver = self.driver;
        options
    }

    pub fn open(&self) -> Store {
        Store::open(&self.root(), self.options(), WaitPolicy::Fail).unwrap()
    }

    pub fn advance(&self, by: Duration) {
        self.clock_seconds.fetch_add(by.as_secs(), Ordering::SeqCst);
    }

    pub fn assert_no_warnings(&self) {
        assert_eq!(*self.warnings.lock().unwrap(), Vec::<String>::new());
    }
}

/// Says so and returns false where there is no right to mount.
pub fn privileged(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED {test}: needs root, to mount overlays and make device nodes");
    }
    root
}

pub fn process_lease(store: &Store) -> Lease {
    store.lease(LeaseOptions::process("test")).unwrap()
}

pub fn put_blob(store: &Store, bytes: &[u8], lease: &Lease) -> BlobDigest {
    let mut ingest = store.content().ingest_unnamed().unwrap();
    ingest.write_all(bytes).unwrap();
    let expected = Expected::exactly(BlobDigest::of(bytes), bytes.len() as u64);
    ingest.commit(expected, lease).unwrap()
}

pub fn owner(name: impl std::fmt::Display) -> Owner {
    Owner::new("test", name)
}

pub fn assert_healthy(store: &Store) {
    let mut found = store.check(&CheckOptions::deep()).unwrap().found;
    // Most diff IDs in these tests are made up.
    found.retain(|finding| finding.code != "layer-tree-damaged");
    assert!(found.is_empty(), "{found:#?}");
}

/// One line of a layer: what is at a path. Parents that no `Dir` line names are implied.
#[derive(Debug, Clone)]
pub enum Item {
    File(&'static str, &'static str),
    /// Explicit, with a mode.
    Dir(&'static str, u32),
    Symlink(&'static str, &'static str),
    Whiteout(&'static str),
    /// Marks a directory that another line made.
    Opaque(&'static str),
    HardLink(&'static str, &'static str),
}
use Item::*;

/// The path of an open directory.
pub fn path_of(dir: &impl AsFd) -> PathBuf {
    // With a dot, so that it is the directory and not the link to it.
    PathBuf::from(format!("/proc/self/fd/{}/.", dir.as_fd().as_raw_fd()))
}

/// The modification time of everything that the tests make.
pub const MTIME: rustix::fs::Timespec = rustix::fs::Timespec { tv_sec: 1_000_000_000, tv_nsec: 5 };

fn set_mtime(path: &Path) {
    let times = rustix::fs::Timestamps { last_access: MTIME, last_modification: MTIME };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// Makes a layer as an extraction would leave it.
pub fn stage_layer(store: &Store, items: &[Item], diff_id: Option<DiffId>) -> FinishedStage {
    let stage = store.layers().stage().unwrap();
    let root = path_of(&stage.root());
    let mut index = DirIndex::default();
    let explicit: Vec<&str> = items
        .iter()
        .filter_map(|item| match item {
            Dir(path, _) => Some(*path),
            _ => None,
        })
        .collect();
    let entry = |path: &str| EntryPath::clean(path.as_bytes()).unwrap();
    if !explicit.contains(&"") {
        index.insert(EntryPath::root(), Implied::OnTheWay);
    }
    let mut dirs = vec![root.clone()];
    let mut parents = |path: &str| {
        let parts: Vec<&str> = path.split('/').collect();
        for end in 1..parts.len() {
            let parent = parts[..end].join("/");
            if !root.join(&parent).exists() {
                fs::create_dir(root.join(&parent)).unwrap();
                dirs.push(root.join(&parent));
            }
            if !explicit.contains(&parent.as_str()) {
                index.insert(entry(&parent), Implied::OnTheWay);
            }
        }
    };
    let mut made = Vec::new();
    for item in items {
        match item {
            File(path, text) => {
                parents(path);
                fs::write(root.join(path), text).unwrap();
                made.push(root.join(path));
            }
            Dir(path, mode) => {
                parents(path);
                if !path.is_empty() && !root.join(path).exists() {
                    fs::create_dir(root.join(path)).unwrap();
                }
                fs::set_permissions(root.join(path), fs::Permissions::from_mode(*mode)).unwrap();
                made.push(root.join(path));
            }
            Symlink(path, target) => {
                parents(path);
                std::os::unix::fs::symlink(target, root.join(path)).unwrap();
                made.push(root.join(path));
            }
            Whiteout(path) => {
                parents(path);
                let kind = rustix::fs::FileType::CharacterDevice;
                rustix::fs::mknodat(rustix::fs::CWD, root.join(path), kind, rustix::fs::Mode::empty(), 0).unwrap();
                made.push(root.join(path));
            }
            Opaque(path) => {
                let flags = rustix::fs::XattrFlags::empty();
                rustix::fs::setxattr(root.join(path), c"trusted.overlay.opaque", b"y", flags).unwrap();
            }
            HardLink(path, target) => {
                parents(path);
                fs::hard_link(root.join(target), root.join(path)).unwrap();
                made.push(root.join(path));
            }
        }
    }
    for path in made.iter().chain(dirs.iter().rev()) {
        set_mtime(path);
    }
    let usage = measure(&root);
    stage.finish(LayerContents { diff_id, usage, index, ..LayerContents::default() })
}

pub fn publish(store: &Store, lease: &Lease, items: &[Item]) -> LayerId {
    store.layers().publish(lease, vec![stage_layer(store, items, None)]).unwrap()[0]
}

/// What the store's own count must agree with.
pub fn measure(root: &Path) -> Usage {
    let mut usage = Usage::default();
    let mut seen = std::collections::HashSet::new();
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
        if seen.insert((metadata.dev(), metadata.ino())) {
            usage.inodes += 1;
            usage.size_bytes += metadata.blocks() * 512;
            usage.content_bytes += if metadata.is_file() { metadata.len() } else { 0 };
        }
    }
    usage
}

/// A tree as text: one line per path with type, mode, owner and content (or target).
pub fn listing(root: impl AsFd) -> BTreeMap<String, String> {
    listing_at(&path_of(&root))
}

pub fn listing_at(root: &Path) -> BTreeMap<String, String> {
    let mut lines = BTreeMap::new();
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
            format!("file {:?}", fs::read_to_string(&path).unwrap())
        } else {
            format!("device {}", metadata.rdev())
        };
        let mode = if kind.is_symlink() { 0 } else { metadata.mode() & 0o7777 };
        lines.insert(name, format!("{what} {mode:o} {}:{}", metadata.uid(), metadata.gid()));
    }
    lines
}
