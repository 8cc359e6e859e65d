//! BuildKit's state, made by hand.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::bolt::{self, Node, Tree};
use crate::sha256_hex;

/// containerd's kind of a snapshot that somebody writes to.
pub const ACTIVE: u8 = 2;
/// containerd's kind of a snapshot that nobody will write to again.
pub const COMMITTED: u8 = 3;

/// As Go's library has them on most machines; as many elements in one as a page of short ones has.
const PAGE_BYTES: usize = 4096;
const FAN: usize = 20;

/// A worker with metadata of version 2: rows, snapshots of one snapshotter, content.
#[derive(Debug)]
pub struct Worker {
    dir: PathBuf,
    snapshotter: &'static str,
    rows: Tree,
    meta: Tree,
    own: Tree,
    blobs: Tree,
}

/// A bucket of these keys.
pub fn bucket<K: AsRef<[u8]>>(entries: impl IntoIterator<Item = (K, Node)>) -> Node {
    Node::Bucket(entries.into_iter().map(|(key, node)| (key.as_ref().to_vec(), node)).collect())
}

/// A key's bytes.
pub fn bytes(bytes: impl AsRef<[u8]>) -> Node {
    Node::Value(bytes.as_ref().to_vec())
}

/// Writes a database file.
///
/// # Panics
/// If it cannot be written.
pub fn write(path: &Path, entries: Vec<(&str, Node)>) {
    let Node::Bucket(tree) = bucket(entries) else { unreachable!() };
    fs::write(path, bolt::file(&tree, PAGE_BYTES, FAN)).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// Go's `binary.PutUvarint`.
fn uvarint(mut number: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

impl Worker {
    /// One without anything, in a directory that is made if it is not there.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn new(dir: PathBuf, snapshotter: &'static str) -> Self {
        fs::create_dir_all(dir.join("snapshots/snapshots")).expect("because the scratch is ours");
        fs::create_dir_all(dir.join("content/blobs/sha256")).expect("because the scratch is ours");
        let none = Tree::new;
        Self { dir, snapshotter, rows: none(), meta: none(), own: none(), blobs: none() }
    }

    /// A record with these keys of its metadata.
    ///
    /// # Panics
    /// If `keys` is no object.
    pub fn row(&mut self, id: &str, keys: Value) -> &mut Self {
        let keys = keys.as_object().expect("because rows have keys");
        let entry = |(key, value): (&String, &Value)| (key.clone(), bytes(json!({ "value": value }).to_string()));
        self.rows.insert(id.as_bytes().to_vec(), bucket(keys.iter().map(entry)));
        self
    }

    /// A snapshot; the directory that its files go to.
    ///
    /// # Panics
    /// If it cannot be made.
    pub fn snapshot(&mut self, key: &str, kind: u8, parent: Option<&str>) -> PathBuf {
        let number = self.own.len() + 1;
        let name = |key: &str| format!("buildkit/1/{key}");
        let mut meta = vec![("name", bytes(name(key)))];
        let mut own = vec![("id", bytes(uvarint(number))), ("kind", bytes([kind]))];
        if let Some(parent) = parent {
            meta.push(("parent", bytes(parent)));
            own.push(("parent", bytes(name(parent))));
        }
        self.meta.insert(key.as_bytes().to_vec(), bucket(meta));
        self.own.insert(name(key).into_bytes(), bucket(own));
        let dir = self.dir.join("snapshots/snapshots").join(number.to_string());
        let dir = if self.snapshotter == "native" { dir } else { dir.join("fs") };
        fs::create_dir_all(&dir).expect("because the scratch is ours");
        dir
    }

    /// A blob with labels; its digest.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn blob(&mut self, content: &[u8], labels: &[(&str, &str)]) -> String {
        let hex = sha256_hex(content);
        fs::write(self.dir.join("content/blobs/sha256").join(&hex), content).expect("because the scratch is ours");
        let digest = format!("sha256:{hex}");
        let labels = bucket(labels.iter().map(|(key, value)| (*key, bytes(value))));
        self.blobs.insert(digest.clone().into_bytes(), bucket([("labels", labels)]));
        digest
    }

    /// Writes its databases.
    ///
    /// # Panics
    /// If they cannot be written.
    pub fn write(&self) {
        write(&self.dir.join("metadata_v2.db"), vec![("_main", Node::Bucket(self.rows.clone()))]);
        let snapshots = bucket([(self.snapshotter, Node::Bucket(self.meta.clone()))]);
        let content = bucket([("blob", Node::Bucket(self.blobs.clone()))]);
        let namespace = bucket([("snapshots", snapshots), ("content", content)]);
        write(&self.dir.join("containerdmeta.db"), vec![("v1", bucket([("buildkit", namespace)]))]);
        let own = bucket([("snapshots", Node::Bucket(self.own.clone()))]);
        write(&self.dir.join("snapshots/metadata.db"), vec![("v1", own)]);
    }
}
