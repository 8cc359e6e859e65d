//! What is remembered of layers and blobs: which blob holds which layer's tar, and what a layer became elsewhere.

use std::collections::BTreeMap;

use plies_oci::{BlobDigest, Compression, DiffId};
use serde::{Deserialize, Serialize};

use super::LayerBlob;
use crate::catalogue::{CatalogueError, Row, Rows, Table, Tx};
use crate::fsck::{Change, Findings, Remedy};
use crate::{LayerId, Resource};

// Named for the crate that they began in. Which blobs hold a layer's tar, both ways, as we found it ourselves: memory,
// not holds, so the blob may be gone.
pub(super) const BLOBS_OF_DIFF: Table<(DiffId, BlobDigest), LayerBlobRow> = Table::new("image.blobs");
pub(super) const DIFF_OF_BLOB: Table<BlobDigest, DiffIdRow> = Table::new("image.diffs");

// What a layer became when the times in it were cut off at so many seconds since 1970 (as the bits of an `i64`): memory
// as well. A layer that is its own has nothing later.
pub(super) const CLAMPED: Table<(LayerId, u64), LayerId> = Table::new("image.clamped");

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LayerBlobRow {
    pub(super) size_bytes: u64,
    pub(super) compression: Compression,
    /// The level that it was packed at here. `None`: it came from elsewhere, or from before this was kept.
    pub(super) made_at_level: Option<i32>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct DiffIdRow(DiffId);

impl Row for LayerBlobRow {
    const VERSION: u8 = 2;

    fn upgrade(version: u8, body: &[u8]) -> Option<Self> {
        (version == 1).then_some(())?;
        let (size_bytes, compression) = postcard::from_bytes(body).ok()?;
        Some(Self { size_bytes, compression, made_at_level: None })
    }
}
impl Row for DiffIdRow {
    const VERSION: u8 = 1;
}

/// Remembers that a blob, decompressed, is the tar of a diff ID. Only for what was hashed here.
pub(super) fn remember_blob(
    tx: &mut Tx<'_>,
    diff_id: DiffId,
    blob: &LayerBlob,
    made_at_level: Option<i32>,
) -> Result<(), CatalogueError> {
    // What was made here and comes back is still what is made here.
    let known = tx.get(&BLOBS_OF_DIFF, &(diff_id, blob.digest))?.and_then(|row| row.made_at_level);
    let made_at_level = made_at_level.or(known);
    let row = LayerBlobRow { size_bytes: blob.size_bytes, compression: blob.compression, made_at_level };
    tx.put(&BLOBS_OF_DIFF, &(diff_id, blob.digest), &row)?;
    tx.put(&DIFF_OF_BLOB, &blob.digest, &DiffIdRow(diff_id))?;
    Ok(())
}

/// As [`remember_blob`], and that the layer keeps the blob alive.
pub(super) fn record_blob(
    tx: &mut Tx<'_>,
    diff_id: DiffId,
    blob: &LayerBlob,
    layer: LayerId,
) -> Result<(), CatalogueError> {
    remember_blob(tx, diff_id, blob, None)?;
    tx.add_edge(layer, blob.digest)
}

/// The diff ID of a blob, if it was unpacked here before.
///
/// # Errors
/// [`CatalogueError`].
pub fn diff_id_of_blob(rows: &impl Rows, blob: BlobDigest) -> Result<Option<DiffId>, CatalogueError> {
    Ok(rows.get(&DIFF_OF_BLOB, &blob)?.map(|row| row.0))
}

/// Blobs that are known to hold the tar of a diff ID; they may be gone by now.
///
/// # Errors
/// [`CatalogueError`].
pub fn blobs_of_diff_id(rows: &impl Rows, diff_id: DiffId) -> Result<Vec<LayerBlob>, CatalogueError> {
    let rows = rows.prefixed(&BLOBS_OF_DIFF, &diff_id)?;
    let blob =
        |((_, digest), LayerBlobRow { size_bytes, compression, .. })| LayerBlob { digest, size_bytes, compression };
    Ok(rows.into_iter().map(blob).collect())
}

/// Compares the two tables of what is known of blobs with each other: a blob has one diff ID, and is listed under it.
pub(crate) fn check_blobs_of_layers(rows: &impl Rows, findings: &mut Findings) -> Result<(), CatalogueError> {
    let listed = findings.rows(rows, &BLOBS_OF_DIFF, |_, changes| Remedy::Rewrite(changes))?;
    let mut diffs: BTreeMap<BlobDigest, DiffIdRow> = BTreeMap::new();
    for ((diff_id, digest), _) in listed {
        match diffs.get(&digest).map(|row| row.0) {
            Some(other) => {
                // Both were hashed here, they say, and one of them lies: to know neither is safe.
                let what = format!("is listed under {diff_id} and {other}");
                let changes =
                    [diff_id, other].map(|diff_id| Change::remove(&BLOBS_OF_DIFF, &(diff_id, digest))).to_vec();
                findings.add("blob-diff-ambiguous", Resource::from(digest), what, Remedy::Rewrite(changes));
            }
            None => drop(diffs.insert(digest, DiffIdRow(diff_id))),
        }
    }
    findings.compare(rows, "blob-diff-wrong", &DIFF_OF_BLOB, diffs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blobs_row_of_the_first_version_came_from_elsewhere() {
        let body = postcard::to_stdvec(&(5_u64, Compression::Zstd)).unwrap();
        let row = LayerBlobRow { size_bytes: 5, compression: Compression::Zstd, made_at_level: None };
        assert_eq!(LayerBlobRow::upgrade(1, &body), Some(row));
        assert_eq!((LayerBlobRow::upgrade(0, &body), LayerBlobRow::upgrade(1, &[5])), (None, None));
    }
}
