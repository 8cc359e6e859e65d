//! containerd's databases: the metadata that its clients see, and a snapshotter's own.
//!
//! ```text
//! meta        v1/<namespace>/snapshots/<snapshotter>/<key>/{name, parent}
//!             v1/<namespace>/content/blob/<digest>/{size, labels/}
//! snapshotter v1/snapshots/<name>/{id, kind, parent}        files of it: snapshots/<id>
//! ```

use std::collections::HashMap;
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

/// A blob as the metadata has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlobInfo {
    pub(crate) diff_id: Option<DiffId>,
}

/// What one namespace has.
#[derive(Debug, Default)]
pub(crate) struct Namespace {
    pub(crate) snapshots: HashMap<String, SnapshotInfo>,
    pub(crate) blobs: HashMap<BlobDigest, BlobInfo>,
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

impl Namespace {
    /// Reads what can be read of a namespace whose snapshotter keeps its files in `dir`. What went wrong comes beside it.
    pub(crate) fn read(meta: &Bolt, own: Option<&Bolt>, namespace: &str, dir: &Path) -> (Self, Vec<BoltError>) {
        let mut found = Self::default();
        let (own, failed) = own.map_or_else(Default::default, own_snapshots);
        let mut problems: Vec<BoltError> = failed.into_iter().collect();
        let name = namespace.as_bytes();
        let snapshots = meta.root().bucket(&[b"v1", name, b"snapshots"]);
        problems
            .extend(snapshots.and_then(|bucket| bucket.map_or(Ok(()), |all| found.snapshots(&all, &own, dir))).err());
        let blobs = meta.root().bucket(&[b"v1", name, b"content", b"blob"]);
        problems.extend(blobs.and_then(|bucket| bucket.map_or(Ok(()), |all| found.blobs(&all))).err());
        (found, problems)
    }

    fn snapshots(&mut self, all: &Bucket<'_>, own: &HashMap<String, Own>, dir: &Path) -> Result<(), BoltError> {
        all.each(|snapshotter, item| {
            let Some(keys) = item.bucket() else { return Ok(()) };
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
            let label = match row.bucket(&[b"labels"])? {
                Some(labels) => text(labels.get(UNCOMPRESSED.as_bytes())?),
                None => None,
            };
            self.blobs.insert(digest, BlobInfo { diff_id: label.and_then(|text| text.parse().ok()) });
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
