//! From version 1 of the metadata to version 2: what a BuildKit before 0.7 knew from its snapshotter, written into the rows.
//!
//! BuildKit did this when its next version started, on a copy of the file. Here the rows are worked out in memory from the
//! same three places, and nothing is written: so there is no copy to be switched to, an import that was cut off begins
//! anew, and holds on what the rows name are those that every record of this store has.

use std::collections::BTreeMap;

use plies_oci::{BlobDigest, ChainId, DiffId};
use serde::Deserialize;

use super::rows::{RawRow, RawRows, get, put};
use crate::containerd::{Namespace, SnapshotKind};

/// What blobs were before their media types were written down (docker's image manifest, version 2.2).
const MEDIA_TYPE: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

/// What version 1 kept of a record's blob.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct BlobMapping {
    blobsum: BlobDigest,
    #[serde(rename = "DiffID")]
    diff_id: DiffId,
}

/// Rows of version 2 out of those of version 1, and the rows that could not be moved, with why.
pub(crate) fn migrate(mut rows: RawRows, namespace: &Namespace) -> (RawRows, BTreeMap<String, String>) {
    let mut failed = BTreeMap::new();
    for (id, row) in &mut rows {
        if let Err(why) = first_pass(id, row, namespace) {
            failed.insert(id.clone(), why);
        }
    }
    // What shares a mutable record's files stands on what that stands on.
    let parents: Vec<(String, String)> = rows
        .iter()
        .filter(|(_, row)| !row.contains_key("cache.parent"))
        .filter_map(|(id, row)| {
            let mutable: String = get(row, "cache.equalMutable").ok()??;
            Some((id.clone(), get(rows.get(&mutable)?, "cache.parent").ok()??))
        })
        .collect();
    for (id, parent) in parents {
        rows.entry(id).and_modify(|row| put(row, "cache.parent", parent, None));
    }
    chains(&mut rows);
    rows.retain(|id, _| !failed.contains_key(id));
    (rows, failed)
}

fn first_pass(id: &str, row: &mut RawRow, namespace: &Namespace) -> Result<(), String> {
    if get::<String>(row, "cache.equalMutable")?.is_none_or(|mutable| mutable.is_empty()) {
        let snapshot = namespace.snapshots.get(id).ok_or("its snapshot is gone")?;
        if snapshot.kind == SnapshotKind::Committed {
            put(row, "snapshot.committed", true, None);
        }
        if let Some(parent) = &snapshot.parent {
            put(row, "cache.parent", parent, None);
        }
    } else {
        put(row, "snapshot.committed", true, None);
    }
    put(row, "cache.snapshot", id, None);
    if let Some(BlobMapping { blobsum, diff_id }) = get(row, "blobmapping.blob")?
        && namespace.blobs.contains_key(&blobsum)
    {
        put(row, "cache.diffID", diff_id, None);
        put(row, "cache.blob", blobsum, None);
        put(row, "cache.mediatype", MEDIA_TYPE, None);
    }
    Ok(())
}

/// Chain IDs for rows that have a blob, on parents that have them.
fn chains(rows: &mut RawRows) {
    // From each row down to one that is known or stands on nothing, and up again; what a circle has gets none.
    let ids: Vec<String> = rows.keys().cloned().collect();
    let mut seen = std::collections::HashSet::new();
    for id in ids {
        let mut way = Vec::new();
        let mut next = Some(id);
        while let Some(id) = next {
            let Some(row) = rows.get(&id).filter(|_| seen.insert(id.clone())) else { break };
            next = get::<String>(row, "cache.parent").ok().flatten();
            way.push(id);
        }
        while let Some(id) = way.pop() {
            if let Some((chain, blob_chain)) = chain_of(rows, &id) {
                let row = rows.entry(id).or_default();
                put(row, "cache.chainID", chain, Some(format!("chainid:{chain}")));
                put(row, "cache.blobChainID", blob_chain, Some(format!("blobchainid:{blob_chain}")));
            }
        }
    }
}

/// The two chain IDs that a row lacks, if they can be told.
fn chain_of(rows: &RawRows, id: &str) -> Option<(ChainId, BlobDigest)> {
    let row = rows.get(id)?;
    let pair = |row: &RawRow| -> Option<(ChainId, BlobDigest)> {
        Some((get(row, "cache.chainID").ok()??, get(row, "cache.blobChainID").ok()??))
    };
    if pair(row).is_some() {
        return None;
    }
    let (diff_id, blob): (DiffId, BlobDigest) = (get(row, "cache.diffID").ok()??, get(row, "cache.blob").ok()??);
    let own = BlobDigest::of(format!("{blob} {diff_id}").as_bytes());
    match get::<String>(row, "cache.parent").ok()? {
        None => Some((ChainId::extend(None, diff_id), own)),
        Some(parent) => {
            // On a parent that nobody knows, or that has no blob, it has no chain either.
            let (chain, blob_chain) = pair(rows.get(&parent)?)?;
            let blob_chain = BlobDigest::of(format!("{blob_chain} {own}").as_bytes());
            Some((ChainId::extend(Some(chain), diff_id), blob_chain))
        }
    }
}

#[cfg(test)]
mod tests;
