//! containerd's databases: the metadata that its clients see, and a snapshotter's own.
//!
//! ```text
//! meta        v1/<namespace>/snapshots/<snapshotter>/<key>/{name, parent}
//!             v1/<namespace>/content/blob/<digest>/{size, labels/}
//!             v1/<namespace>/images/<name>/target/{digest, mediatype}
//!             v1/<namespace>/containers/<id>/{image, snapshotter, snapshotKey}
//! snapshotter v1/snapshots/<name>/{id, kind, parent}        files of it: snapshots/<id>
//! ```

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use plies_bolt::{Bolt, BoltError, Bucket, Item};
use plies_oci::{BlobDigest, DiffId};

/// Label of a blob with the digest of its tar.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";

/// What a snapshot is, as its snapshotter has it (containerd, `core/snapshots`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SnapshotKind {
    /// A look at another one.
    View,
    /// Somebody may write to it.
    Active,
    /// Nobody will again.
    Committed,
}

/// A snapshot by the key that its namespace has for it.
#[derive(Debug, Clone)]
pub(crate) struct SnapshotInfo {
    pub(crate) kind: SnapshotKind,
    /// The key of what it stands on.
    pub(crate) parent: Option<String>,
    /// Its directory.
    pub(crate) dir: PathBuf,
    /// The directory holds the whole tree, not what changed.
    pub(crate) whole: bool,
}

impl SnapshotInfo {
    /// An overlay's upper directory that nobody writes to.
    pub(crate) fn upper(dir: PathBuf) -> Self {
        Self { kind: SnapshotKind::Committed, parent: None, dir, whole: false }
    }
}

/// Label of a blob with repositories that have it, each of one host, whose name stands behind the dot (containerd,
/// `core/remotes/docker`).
const SOURCE_PREFIX: &str = "containerd.io/distribution.source.";

/// A blob as the metadata has it.
#[derive(Debug, Clone, Default)]
pub(crate) struct BlobInfo {
    pub(crate) diff_id: Option<DiffId>,
    /// Repositories that have it, with their hosts: `docker.io/library/busybox`.
    pub(crate) repositories: Vec<String>,
}

/// What an image's name stands for.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) digest: BlobDigest,
    pub(crate) media_type: String,
}

/// A container as the metadata has it.
#[derive(Debug, Clone)]
pub(crate) struct ContainerInfo {
    /// The name of the image that it was made of.
    pub(crate) image: String,
    pub(crate) snapshotter: String,
    /// The key of its writable snapshot; empty: it has none.
    pub(crate) snapshot: String,
}

/// What one namespace has.
#[derive(Debug, Default)]
pub(crate) struct Namespace {
    pub(crate) snapshots: HashMap<String, SnapshotInfo>,
    pub(crate) blobs: HashMap<BlobDigest, BlobInfo>,
}

/// What clients made of it.
#[derive(Debug, Default)]
pub(crate) struct Clients {
    /// By name; `None`: the row has no target.
    pub(crate) images: BTreeMap<String, Option<Target>>,
    pub(crate) containers: BTreeMap<String, ContainerInfo>,
}

fn text(item: Option<Item<'_>>) -> Option<String> {
    item.and_then(Item::value).and_then(|bytes| String::from_utf8(bytes).ok()).filter(|text| !text.is_empty())
}

/// Go's `binary.PutUvarint`: seven bits a byte, the lowest first.
fn uvarint(bytes: &[u8]) -> Option<u64> {
    let mut number = 0u64;
    for (place, byte) in bytes.iter().enumerate().take(10) {
        number |= u64::from(byte & 0x7f).checked_shl(7 * u32::try_from(place).ok()?)?;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// Names of a snapshotter, with where their files are.
struct Own {
    kind: SnapshotKind,
    id: u64,
}

/// What can be read of a snapshotter's own database. The second value is what went wrong on the way, if anything did.
fn own_snapshots(bolt: &Bolt) -> (HashMap<String, Own>, Option<BoltError>) {
    let mut found = HashMap::new();
    let mut look = || -> Result<(), BoltError> {
        let Some(all) = bolt.root().bucket(&[b"v1", b"snapshots"])? else { return Ok(()) };
        all.each(|name, item| {
            let Some(row) = item.bucket() else { return Ok(()) };
            let id = row.get(b"id")?.and_then(Item::value).and_then(|bytes| uvarint(&bytes));
            let kind = match row.get(b"kind")?.and_then(Item::value).as_deref() {
                Some([1, ..]) => Some(SnapshotKind::View),
                Some([2, ..]) => Some(SnapshotKind::Active),
                Some([3, ..]) => Some(SnapshotKind::Committed),
                _ => None,
            };
            if let (Some(id), Some(kind), Ok(name)) = (id, kind, std::str::from_utf8(name)) {
                found.insert(name.to_owned(), Own { kind, id });
            }
            Ok::<_, BoltError>(())
        })
    };
    let failed = look().err();
    (found, failed)
}

/// The names of all namespaces. The second value is what went wrong on the way, if anything did.
pub(crate) fn namespaces(meta: &Bolt) -> (Vec<String>, Option<BoltError>) {
    let mut found = Vec::new();
    let mut look = || -> Result<(), BoltError> {
        let Some(all) = meta.root().bucket(&[b"v1"])? else { return Ok(()) };
        all.each(|name, item| {
            if let (Some(_), Ok(name)) = (item.bucket(), std::str::from_utf8(name)) {
                found.push(name.to_owned());
            }
            Ok::<_, BoltError>(())
        })
    };
    let failed = look().err();
    (found, failed)
}

impl Namespace {
    /// Reads what can be read of a namespace whose only snapshotter keeps its files in `dir`. What went wrong comes beside it.
    pub(crate) fn read(meta: &Bolt, own: Option<&Bolt>, namespace: &str, dir: &Path) -> (Self, Vec<BoltError>) {
        Self::read_of(meta, own, namespace, None, dir)
    }

    /// As [`Namespace::read`], for one of several snapshotters.
    pub(crate) fn read_of(
        meta: &Bolt,
        own: Option<&Bolt>,
        namespace: &str,
        snapshotter: Option<&str>,
        dir: &Path,
    ) -> (Self, Vec<BoltError>) {
        let mut found = Self::default();
        let (own, failed) = own.map_or_else(Default::default, own_snapshots);
        let mut problems: Vec<BoltError> = failed.into_iter().collect();
        let bucket = |path: &[&[u8]]| meta.root().bucket(&[&[b"v1", namespace.as_bytes()], path].concat());
        let snapshots = bucket(&[b"snapshots"]);
        let read = |all: Bucket<'_>| found.snapshots(&all, &own, snapshotter, dir);
        problems.extend(snapshots.and_then(|all| all.map_or(Ok(()), read)).err());
        let blobs = bucket(&[b"content", b"blob"]);
        problems.extend(blobs.and_then(|all| all.map_or(Ok(()), |all| found.blobs(&all))).err());
        (found, problems)
    }

    fn snapshots(
        &mut self,
        all: &Bucket<'_>,
        own: &HashMap<String, Own>,
        only: Option<&str>,
        dir: &Path,
    ) -> Result<(), BoltError> {
        all.each(|snapshotter, item| {
            let Some(keys) = item.bucket() else { return Ok(()) };
            if only.is_some_and(|only| snapshotter != only.as_bytes()) {
                return Ok(());
            }
            // The one that keeps whole trees; all others of containerd's and BuildKit's mount overlays.
            let whole = snapshotter == b"native";
            keys.each(|key, item| {
                let (Some(row), Ok(key)) = (item.bucket(), std::str::from_utf8(key)) else { return Ok(()) };
                let Some(name) = text(row.get(b"name")?) else { return Ok(()) };
                let Some(Own { kind, id }) = own.get(&name) else { return Ok(()) };
                let dir = dir.join("snapshots").join(id.to_string());
                let dir = if whole { dir } else { dir.join("fs") };
                let info = SnapshotInfo { kind: *kind, parent: text(row.get(b"parent")?), dir, whole };
                self.snapshots.insert(key.to_owned(), info);
                Ok(())
            })
        })
    }

    fn blobs(&mut self, all: &Bucket<'_>) -> Result<(), BoltError> {
        all.each(|digest, item| {
            let digest = std::str::from_utf8(digest).ok().and_then(|text| text.parse().ok());
            let (Some(digest), Some(row)) = (digest, item.bucket()) else { return Ok(()) };
            let mut blob = BlobInfo::default();
            if let Some(labels) = row.bucket(&[b"labels"])? {
                labels.each(|label, item| {
                    let (Ok(label), Some(value)) = (std::str::from_utf8(label), text(Some(item))) else {
                        return Ok(());
                    };
                    if label == UNCOMPRESSED {
                        blob.diff_id = value.parse().ok();
                    } else if let Some(host) = label.strip_prefix(SOURCE_PREFIX) {
                        blob.repositories.extend(value.split(',').map(|name| format!("{host}/{name}")));
                    }
                    Ok::<_, BoltError>(())
                })?;
            }
            self.blobs.insert(digest, blob);
            Ok(())
        })
    }
}

impl Clients {
    /// Reads what can be read of a namespace. What went wrong comes beside it.
    pub(crate) fn read(meta: &Bolt, namespace: &str) -> (Self, Vec<BoltError>) {
        let mut found = Self::default();
        let bucket = |name: &[u8]| meta.root().bucket(&[b"v1", namespace.as_bytes(), name]);
        let images = bucket(b"images").and_then(|all| all.map_or(Ok(()), |all| found.images(&all)));
        let containers = bucket(b"containers").and_then(|all| all.map_or(Ok(()), |all| found.containers(&all)));
        (found, images.err().into_iter().chain(containers.err()).collect())
    }

    fn images(&mut self, all: &Bucket<'_>) -> Result<(), BoltError> {
        all.each(|name, item| {
            let (Some(row), Ok(name)) = (item.bucket(), std::str::from_utf8(name)) else { return Ok(()) };
            let target = match row.bucket(&[b"target"])? {
                Some(target) => text(target.get(b"digest")?).zip(text(target.get(b"mediatype")?)),
                None => None,
            };
            let target =
                target.and_then(|(digest, media_type)| digest.parse().ok().map(|digest| Target { digest, media_type }));
            self.images.insert(name.to_owned(), target);
            Ok(())
        })
    }

    fn containers(&mut self, all: &Bucket<'_>) -> Result<(), BoltError> {
        all.each(|id, item| {
            let (Some(row), Ok(id)) = (item.bucket(), std::str::from_utf8(id)) else { return Ok(()) };
            let field = |key: &[u8]| Ok::<_, BoltError>(text(row.get(key)?).unwrap_or_default());
            let (image, snapshotter, snapshot) = (field(b"image")?, field(b"snapshotter")?, field(b"snapshotKey")?);
            self.containers.insert(id.to_owned(), ContainerInfo { image, snapshotter, snapshot });
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_seven_bits_a_byte() {
        assert_eq!(uvarint(&[5]), Some(5));
        assert_eq!(uvarint(&[0xac, 2]), Some(300));
        assert_eq!(uvarint(&[0x80]), None);
        assert_eq!(uvarint(&[0xff; 12]), None);
        assert_eq!(uvarint(&[]), None);
    }
}
