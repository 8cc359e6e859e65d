//! What is remembered of layers and blobs: which blob holds which layer's tar, and what a layer became elsewhere.
//!
//! Memory keeps nothing alive, and there is no more of it than of what it is about: whoever reads it makes use of a row only
//! if the blob, or the layer that another one became, is here. So the collection that takes a blob takes its rows in the same
//! transaction ([`forget`]), whether or not there are layers of its diff ID: if those bytes come again, they are hashed again
//! anyway. Of layers it takes the rows that name them on either side. Nothing is remembered of what is not here.
//!
//! Earlier versions left these rows for ever. [`is_outgrown`] sees that by counting, and [`gone`] finds them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use plies_oci::{BlobDigest, Compression, DiffId};
use serde::{Deserialize, Serialize};

use super::LayerBlob;
use crate::catalogue::schema::BLOBS;
use crate::catalogue::{CatalogueError, Row, Rows, Table, Tx};
use crate::fsck::{Change, Findings, Remedy};
use crate::open::unless_damaged;
use crate::refs::count_of;
use crate::{LayerId, Resource};

// Named for the crate that they began in. Which blobs hold a layer's tar, both ways, as we found it ourselves: no holds. A
// blob has one diff ID.
pub(super) const BLOBS_OF_DIFF: Table<(DiffId, BlobDigest), LayerBlobRow> = Table::new("image.blobs");
const DIFF_OF_BLOB: Table<BlobDigest, DiffIdRow> = Table::new("image.diffs");

// What a layer became when the times in it were cut off at so many seconds since 1970 (as the bits of an `i64`): no holds
// either. A layer that is its own has nothing later, so that is said of the earliest time only.
const CLAMPED: Table<(LayerId, u64), LayerId> = Table::new("image.clamped");

// The same from what it became to what it was, derived: as many rows.
const CLAMPED_FROM: Table<(LayerId, LayerId, u64), ()> = Table::new("image.clamped_from");

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LayerBlobRow {
    pub(super) size_bytes: u64,
    pub(super) compression: Compression,
    /// The level that it was packed at here. `None`: it came from elsewhere, or from before this was kept.
    pub(super) made_at_level: Option<i32>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct DiffIdRow(DiffId);

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

/// Remembers that a blob, decompressed, is the tar of a diff ID. Only for what was hashed here; nothing if the blob is not
/// here any more.
pub(super) fn remember_blob(
    tx: &mut Tx<'_>,
    diff_id: DiffId,
    blob: &LayerBlob,
    made_at_level: Option<i32>,
) -> Result<(), CatalogueError> {
    if !tx.has(blob.digest)? {
        return Ok(());
    }
    // The same bytes taken for another format are another tar. The last counts, as what is asked for now.
    if let Some(DiffIdRow(other)) = tx.get(&DIFF_OF_BLOB, &blob.digest)?.filter(|row| row.0 != diff_id) {
        tx.remove(&BLOBS_OF_DIFF, &(other, blob.digest))?;
    }
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

/// Blobs that are known to hold the tar of a diff ID; they may be gone once this has been read.
///
/// # Errors
/// [`CatalogueError`].
pub fn blobs_of_diff_id(rows: &impl Rows, diff_id: DiffId) -> Result<Vec<LayerBlob>, CatalogueError> {
    let rows = rows.prefixed(&BLOBS_OF_DIFF, &diff_id)?;
    let blob =
        |((_, digest), LayerBlobRow { size_bytes, compression, .. })| LayerBlob { digest, size_bytes, compression };
    Ok(rows.into_iter().map(blob).collect())
}

/// What a layer is known to have become when nothing in it was to be later than `latest`, in seconds since 1970.
pub(super) fn clamped(rows: &impl Rows, layer: LayerId, latest: i64) -> Result<Option<LayerId>, CatalogueError> {
    let mut known = None;
    rows.scan_prefix(&CLAMPED, &layer, |(_, seconds), became| {
        let seconds = seconds.cast_signed();
        if seconds == latest || (became == layer && seconds < latest) {
            known = Some(became);
        }
        ControlFlow::Continue(())
    })?;
    Ok(known)
}

/// Remembers what a layer became, if both are still here.
pub(super) fn remember_clamped(
    tx: &mut Tx<'_>,
    layer: LayerId,
    latest: i64,
    became: LayerId,
) -> Result<(), CatalogueError> {
    if !(tx.has(layer)? && tx.has(became)?) {
        return Ok(());
    }
    if layer == became {
        if clamped(tx, layer, latest)? == Some(layer) {
            return Ok(());
        }
        for (later, of) in tx.prefixed(&CLAMPED, &layer)? {
            if of == layer {
                forget_clamped(tx, later)?;
            }
        }
    }
    // Two that made it at the same time made two layers: the last counts.
    let key = (layer, latest.cast_unsigned());
    forget_clamped(tx, key)?;
    tx.put(&CLAMPED, &key, &became)?;
    tx.put(&CLAMPED_FROM, &(became, layer, key.1), &())
}

fn forget_clamped(tx: &mut Tx<'_>, key: (LayerId, u64)) -> Result<(), CatalogueError> {
    if let Some(became) = unless_damaged(tx.get(&CLAMPED, &key))? {
        tx.remove(&CLAMPED_FROM, &(became, key.0, key.1))?;
    }
    tx.remove(&CLAMPED, &key).map(drop)
}

/// Forgets what is known of a resource, which goes.
pub(crate) fn forget(tx: &mut Tx<'_>, resource: Resource) -> Result<(), CatalogueError> {
    match resource {
        Resource::Blob(digest) => {
            if let Some(DiffIdRow(diff_id)) = unless_damaged(tx.get(&DIFF_OF_BLOB, &digest))? {
                tx.remove(&BLOBS_OF_DIFF, &(diff_id, digest))?;
            }
            tx.remove(&DIFF_OF_BLOB, &digest)?;
        }
        Resource::Layer(id) => {
            for key in tx.prefixed_keys(&CLAMPED, &id)? {
                forget_clamped(tx, key)?;
            }
            for key in tx.prefixed_keys(&CLAMPED_FROM, &id)? {
                tx.remove(&CLAMPED, &(key.1, key.2))?;
                tx.remove(&CLAMPED_FROM, &key)?;
            }
        }
        Resource::Snapshot(_) | Resource::Active(_) => {}
    }
    Ok(())
}

/// Whether there are more rows than what is here accounts for, as earlier versions left them: more blobs with a diff ID than
/// blobs, or layers of which it is not known what they came from. Costs the same for any number of rows.
pub(crate) fn is_outgrown(rows: &impl Rows) -> Result<bool, CatalogueError> {
    Ok(rows.rows_count(&DIFF_OF_BLOB)? > rows.rows_count(&BLOBS)?
        || rows.rows_count(&CLAMPED)? != rows.rows_count(&CLAMPED_FROM)?)
}

/// The blobs and layers that are remembered and gone, to be [forgotten](forget). What something still holds is missing, which
/// is another matter: a repair may make it again from what is known of it. Cost: a look at every row, and some 50 bytes of memory
/// for each.
pub(crate) fn gone(rows: &impl Rows) -> Result<BTreeSet<Resource>, CatalogueError> {
    let mut named = BTreeSet::new();
    rows.scan_each(&DIFF_OF_BLOB, |digest, _| {
        named.extend(digest.map(Resource::from));
        ControlFlow::Continue(())
    })?;
    rows.scan_each(&CLAMPED, |key, became| {
        named.extend(key.map(|(layer, _)| layer).into_iter().chain(became.ok()).map(Resource::from));
        ControlFlow::Continue(())
    })?;
    let mut gone = BTreeSet::new();
    for resource in named {
        if !rows.has(resource)? && count_of(rows, resource)? == 0 {
            gone.insert(resource);
        }
    }
    Ok(gone)
}

/// Makes the derived side of what layers became again: earlier versions did not write it.
pub(crate) fn trace_clamped(tx: &mut Tx<'_>) -> Result<(), CatalogueError> {
    let rows = tx.readable(&CLAMPED)?;
    let mut missing: BTreeSet<_> =
        rows.into_iter().map(|((layer, seconds), became)| (became, layer, seconds)).collect();
    for (key, ()) in tx.readable(&CLAMPED_FROM)? {
        if !missing.remove(&key) {
            tx.remove(&CLAMPED_FROM, &key)?;
        }
    }
    missing.iter().try_for_each(|key| tx.put(&CLAMPED_FROM, key, &()))
}

/// Compares the tables of what is known with each other: a blob has one diff ID, and is listed under it; what is known to have
/// been made of a layer is so from both sides.
pub(crate) fn check_known(rows: &impl Rows, findings: &mut Findings) -> Result<(), CatalogueError> {
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
    findings.compare(rows, "blob-diff-wrong", &DIFF_OF_BLOB, diffs)?;
    let mut from = BTreeMap::new();
    for ((layer, seconds), became) in findings.rows(rows, &CLAMPED, |_, changes| Remedy::Rewrite(changes))? {
        // A row of an earlier version has none: the next collection sees that.
        let key = (became, layer, seconds);
        if rows.contains(&CLAMPED_FROM, &key)? {
            from.insert(key, ());
        }
    }
    findings.compare(rows, "clamped-from-wrong", &CLAMPED_FROM, from)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, UNIX_EPOCH};

    use plies_oci::ChainId;

    use super::*;
    use crate::catalogue::Catalogue;
    use crate::catalogue::schema::{LAYERS, LayerKind, LayerRow, StoredUsage};
    use crate::{GcMode, LeaseOptions, OpenOptions, Owner, Store, WaitPolicy, gc};

    const DOCUMENTS: u8 = 8;

    /// Rows without bytes, since it is about rows only.
    struct Rig {
        store: Store,
        _dir: tempfile::TempDir,
    }

    impl Rig {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let options = OpenOptions::new(Arc::new(|| UNIX_EPOCH + Duration::from_secs(1000)));
            let store = Store::open(&dir.path().join("store"), options, WaitPolicy::Fail).unwrap();
            let rig = Self { store, _dir: dir };
            // Of which nothing is known: so a few rows that are left over are not more than there are blobs.
            for n in 0..DOCUMENTS {
                let digest = BlobDigest::of(&[n, n]);
                rig.write(|tx| tx.put_blob(digest, 1));
                rig.hold(digest);
            }
            rig
        }

        fn write<T>(&self, change: impl FnMut(&mut Tx<'_>) -> Result<T, CatalogueError>) -> T {
            self.store.write(change).unwrap()
        }

        fn hold(&self, resource: impl Into<Resource>) {
            let resource = resource.into();
            self.write(|tx| tx.hold(&owner(resource), resource));
        }

        /// Lets go of what [`Rig::hold`] holds, and collects.
        fn collect(&self, resource: impl Into<Resource>) {
            let resource = resource.into();
            assert!(self.write(|tx| tx.unhold(&owner(resource), resource)), "{resource} was held");
            self.gc();
            assert!(!self.store.read(|rows| rows.has(resource)).unwrap(), "{resource} is still there");
        }

        fn gc(&self) {
            self.store.gc(GcMode::Run).unwrap();
        }

        /// A layer that is held.
        fn layer(&self, n: u8, diff_id: DiffId) -> LayerId {
            let (id, usage) = (LayerId::from_bytes([n; 8]), StoredUsage::default());
            let chain_id: Option<ChainId> = None;
            self.write(|tx| {
                let created = tx.now();
                let (kind, diff_id, beside) = (LayerKind::Full, Some(diff_id), usage);
                let (tar_split, unverified) = (false, false);
                let row = LayerRow { kind, diff_id, chain_id, usage, created, tar_split, beside, unverified };
                tx.put_layer(id, &row)
            });
            self.hold(id);
            id
        }

        /// A blob that is held and whose diff ID is known.
        fn blob(&self, n: u8, diff_id: DiffId) -> LayerBlob {
            let blob = blob(n);
            self.write(|tx| tx.put_blob(blob.digest, 1));
            self.hold(blob.digest);
            self.write(|tx| remember_blob(tx, diff_id, &blob, None));
            blob
        }

        fn diff_id_of(&self, blob: LayerBlob) -> Option<DiffId> {
            self.store.read(|rows| diff_id_of_blob(rows, blob.digest)).unwrap()
        }

        fn blobs_of(&self, diff_id: DiffId) -> Vec<LayerBlob> {
            self.store.read(|rows| blobs_of_diff_id(rows, diff_id)).unwrap()
        }

        fn clamped(&self, layer: LayerId, latest: i64) -> Option<LayerId> {
            self.store.read(|rows| clamped(rows, layer, latest)).unwrap()
        }

        fn remember_clamped(&self, layer: LayerId, latest: i64, became: LayerId) {
            self.write(|tx| remember_clamped(tx, layer, latest, became));
        }

        /// Rows of the four tables, in the order in which they are declared.
        fn counts(&self) -> [u64; 4] {
            self.store
                .read(|rows| {
                    let blobs = (rows.rows_count(&BLOBS_OF_DIFF)?, rows.rows_count(&DIFF_OF_BLOB)?);
                    let clamped = (rows.rows_count(&CLAMPED)?, rows.rows_count(&CLAMPED_FROM)?);
                    Ok::<_, CatalogueError>([blobs.0, blobs.1, clamped.0, clamped.1])
                })
                .unwrap()
        }

        fn findings(&self) -> Vec<(&'static str, String)> {
            let mut findings = Findings::default();
            self.store.read(|rows| check_known(rows, &mut findings)).unwrap();
            findings.found.into_iter().map(|finding| (finding.code, finding.what)).collect()
        }
    }

    fn owner(resource: Resource) -> Owner {
        Owner::new("test", resource)
    }

    fn diff_id(n: u8) -> DiffId {
        DiffId::from_bytes([n; 32])
    }

    fn blob(n: u8) -> LayerBlob {
        LayerBlob { digest: BlobDigest::of(&[n]), size_bytes: 1, compression: Compression::Gzip }
    }

    #[test]
    fn a_blobs_row_of_the_first_version_came_from_elsewhere() {
        let body = postcard::to_stdvec(&(5_u64, Compression::Zstd)).unwrap();
        let row = LayerBlobRow { size_bytes: 5, compression: Compression::Zstd, made_at_level: None };
        assert_eq!(LayerBlobRow::upgrade(1, &body), Some(row));
        assert_eq!((LayerBlobRow::upgrade(0, &body), LayerBlobRow::upgrade(1, &[5])), (None, None));
    }

    #[test]
    fn what_is_known_of_a_blob_goes_with_it_if_its_layer_went_before() {
        let rig = Rig::new();
        let (layer, blob) = (rig.layer(1, diff_id(1)), rig.blob(1, diff_id(1)));
        rig.write(|tx| record_blob(tx, diff_id(1), &blob, layer));
        rig.collect(layer);
        assert_eq!((rig.diff_id_of(blob), rig.blobs_of(diff_id(1))), (Some(diff_id(1)), vec![blob]));
        rig.collect(blob.digest);
        assert_eq!(rig.counts(), [0; 4]);
    }

    #[test]
    fn what_is_known_of_a_blob_goes_with_it_if_its_layer_stays_and_comes_back_with_it() {
        let rig = Rig::new();
        let (_layer, gone) = (rig.layer(1, diff_id(1)), rig.blob(1, diff_id(1)));
        rig.collect(gone.digest);
        assert_eq!(rig.counts(), [0; 4]);
        let back = rig.blob(1, diff_id(1));
        assert_eq!((rig.diff_id_of(back), rig.blobs_of(diff_id(1))), (Some(diff_id(1)), vec![back]));
    }

    #[test]
    fn of_a_layers_two_blobs_the_one_that_stays_is_still_known() {
        let rig = Rig::new();
        let (gone, stays) = (rig.blob(1, diff_id(1)), rig.blob(2, diff_id(1)));
        rig.collect(gone.digest);
        assert_eq!((rig.diff_id_of(stays), rig.blobs_of(diff_id(1))), (Some(diff_id(1)), vec![stays]));
        assert_eq!(rig.counts(), [1, 1, 0, 0]);
    }

    #[test]
    fn a_blob_that_is_taken_for_another_tar_has_one_diff_id_and_leaves_nothing() {
        let rig = Rig::new();
        rig.blob(1, diff_id(1));
        let blob = rig.blob(1, diff_id(2));
        assert_eq!((rig.diff_id_of(blob), rig.blobs_of(diff_id(1))), (Some(diff_id(2)), vec![]));
        assert_eq!(rig.findings(), []);
        rig.collect(blob.digest);
        assert_eq!(rig.counts(), [0; 4]);
    }

    #[test]
    fn what_is_leased_or_kept_by_its_layer_stays_known() {
        let rig = Rig::new();
        let (layer, kept, leased) = (rig.layer(1, diff_id(1)), rig.blob(1, diff_id(1)), rig.blob(2, diff_id(2)));
        rig.write(|tx| record_blob(tx, diff_id(1), &kept, layer));
        let lease = rig.store.lease(LeaseOptions::process("test")).unwrap();
        assert!(lease.hold_if_present(leased.digest).unwrap());
        for blob in [kept, leased] {
            rig.write(|tx| tx.unhold(&owner(blob.digest.into()), blob.digest));
        }
        for mode in [GcMode::DryRun, GcMode::Run, GcMode::Full] {
            rig.store.gc(mode).unwrap();
            assert_eq!(rig.counts(), [2, 2, 0, 0], "{mode:?}");
        }
        lease.release().unwrap();
        rig.gc();
        assert_eq!((rig.diff_id_of(kept), rig.counts()), (Some(diff_id(1)), [1, 1, 0, 0]));
        rig.collect(layer);
        assert_eq!(rig.counts(), [0; 4]);
    }

    #[test]
    fn a_full_collection_forgets_as_well() {
        let rig = Rig::new();
        let (was, became, blob) = (rig.layer(1, diff_id(1)), rig.layer(2, diff_id(2)), rig.blob(1, diff_id(1)));
        rig.remember_clamped(was, 7, became);
        for resource in [was.into(), became.into(), blob.digest.into()] {
            rig.write(|tx| tx.unhold(&owner(resource), resource));
        }
        rig.store.gc(GcMode::Full).unwrap();
        assert_eq!(rig.counts(), [0; 4]);
    }

    #[test]
    fn nothing_is_remembered_of_what_is_not_here() {
        let rig = Rig::new();
        let (here, gone) = (rig.layer(1, diff_id(1)), LayerId::from_bytes([9; 8]));
        rig.write(|tx| remember_blob(tx, diff_id(1), &blob(1), None));
        rig.remember_clamped(here, 7, gone);
        rig.remember_clamped(gone, 7, here);
        rig.remember_clamped(gone, 7, gone);
        assert_eq!(rig.counts(), [0; 4]);
    }

    #[test]
    fn what_a_layer_became_is_known_while_both_are_here() {
        for first in [0, 1] {
            let rig = Rig::new();
            let [was, became, other] = [1, 2, 3].map(|n| rig.layer(n, diff_id(n)));
            rig.remember_clamped(was, 7, became);
            rig.remember_clamped(was, 8, other);
            rig.remember_clamped(other, 7, became);
            rig.gc();
            assert_eq!([was, other].map(|layer| rig.clamped(layer, 7)), [Some(became); 2]);
            assert_eq!((rig.counts(), rig.findings()), ([0, 0, 3, 3], vec![]));
            rig.collect([was, became][first]);
            let left = [rig.clamped(was, 7), rig.clamped(was, 8), rig.clamped(other, 7)];
            assert_eq!(left, [[None, None, Some(became)], [None, Some(other), None]][first]);
            assert_eq!((rig.counts(), rig.findings()), ([0, 0, 1, 1], vec![]));
            rig.collect(other);
            assert_eq!(rig.counts(), [0; 4]);
        }
    }

    #[test]
    fn of_two_that_a_layer_became_at_the_same_time_the_last_is_known() {
        let rig = Rig::new();
        let [was, one, other] = [1, 2, 3].map(|n| rig.layer(n, diff_id(n)));
        rig.remember_clamped(was, 7, one);
        rig.remember_clamped(was, 7, other);
        rig.collect(one);
        assert_eq!((rig.clamped(was, 7), rig.counts()), (Some(other), [0, 0, 1, 1]));
    }

    #[test]
    fn that_nothing_in_a_layer_is_late_is_one_row_whatever_the_times() {
        let rig = Rig::new();
        let [layer, became] = [1, 2].map(|n| rig.layer(n, diff_id(n)));
        rig.remember_clamped(layer, -3, became);
        for latest in [20, 10, 30, -1, 5] {
            rig.remember_clamped(layer, latest, layer);
            assert_eq!(rig.counts(), [0, 0, 2, 2], "{latest}");
        }
        let known = [-3, -2, -1, 0, i64::MAX].map(|latest| rig.clamped(layer, latest));
        assert_eq!(known, [Some(became), None, Some(layer), Some(layer), Some(layer)]);
        rig.collect(layer);
        assert_eq!(rig.counts(), [0; 4]);
    }

    #[test]
    fn a_kill_leaves_a_blob_and_what_is_known_of_it_or_neither() {
        let rig = Rig::new();
        let digest = |n: u64| BlobDigest::of(&n.to_be_bytes());
        // More than an opening takes.
        let all = 4096;
        rig.write(|tx| {
            (0..all).try_for_each(|n| {
                let blob = LayerBlob { digest: digest(n), ..blob(0) };
                tx.put_blob(blob.digest, 1)?;
                remember_blob(tx, diff_id(0), &blob, None)
            })
        });
        gc::collect_some(&rig.store).unwrap();
        // What a kill would leave: lazy commits are in this process only.
        let database = rig.store.inner.paths.database();
        let killed = database.with_extension("killed");
        std::fs::copy(&database, &killed).unwrap();
        let killed = Catalogue::open(&killed, OpenOptions::CACHE_BYTES).unwrap();
        let left = killed.read(|rows| {
            let listed: BTreeSet<_> = blobs_of_diff_id(rows, diff_id(0))?.iter().map(|blob| blob.digest).collect();
            let mut left = 0;
            for digest in (0..all).map(digest) {
                let is_here = rows.has(digest)?;
                assert_eq!(diff_id_of_blob(rows, digest)?.is_some(), is_here);
                assert_eq!(listed.contains(&digest), is_here);
                left += u64::from(is_here);
            }
            Ok::<_, CatalogueError>(left)
        });
        assert!((1..all).contains(&left.unwrap()));
    }

    #[test]
    fn a_collection_forgets_blobs_that_an_earlier_version_remembered_for_ever() {
        for mode in [GcMode::Run, GcMode::Full] {
            let rig = Rig::new();
            let kept = rig.blob(0, diff_id(0));
            rig.write(|tx| {
                for n in 1..=200 {
                    let row = LayerBlobRow { size_bytes: 1, compression: Compression::Gzip, made_at_level: None };
                    tx.put(&BLOBS_OF_DIFF, &(diff_id(n), blob(n).digest), &row)?;
                    tx.put(&DIFF_OF_BLOB, &blob(n).digest, &DiffIdRow(diff_id(n)))?;
                }
                Ok(())
            });
            rig.store.gc(GcMode::DryRun).unwrap();
            assert_eq!((rig.counts(), rig.findings()), ([201, 201, 0, 0], vec![]), "they do no harm");
            rig.store.gc(mode).unwrap();
            assert_eq!((rig.counts(), rig.diff_id_of(kept)), ([1, 1, 0, 0], Some(diff_id(0))), "{mode:?}");
            assert!(!rig.store.read(is_outgrown).unwrap());
        }
    }

    #[test]
    fn a_collection_forgets_what_layers_became_that_an_earlier_version_remembered_for_ever() {
        for mode in [GcMode::Run, GcMode::Full] {
            let rig = Rig::new();
            let (layer, gone) = (rig.layer(1, diff_id(0)), [7, 8].map(|n| LayerId::from_bytes([n; 8])));
            rig.write(|tx| {
                tx.put(&CLAMPED, &(layer, 5), &layer)?;
                tx.put(&CLAMPED, &(layer, 4), &gone[0])?;
                tx.put(&CLAMPED, &(gone[0], 5), &layer)?;
                tx.put(&CLAMPED, &(gone[0], 4), &gone[1])
            });
            assert_eq!(rig.findings(), [], "they do no harm");
            rig.store.gc(mode).unwrap();
            assert_eq!((rig.counts(), rig.findings()), ([0, 0, 1, 1], vec![]), "{mode:?}");
            assert_eq!(rig.clamped(layer, 5), Some(layer));
            // A row too many on the other side is seen as well.
            rig.write(|tx| tx.put(&CLAMPED_FROM, &(gone[0], layer, 5), &()));
            assert_eq!(rig.findings().len(), 1);
            rig.store.gc(mode).unwrap();
            assert_eq!((rig.counts(), rig.findings()), ([0, 0, 1, 1], vec![]), "{mode:?}");
        }
    }

    #[test]
    fn what_a_repair_may_need_of_a_blob_that_is_missing_stays() {
        let rig = Rig::new();
        let lost = rig.blob(1, diff_id(1));
        rig.write(|tx| tx.remove(&BLOBS, &lost.digest));
        for mode in [GcMode::Run, GcMode::Full] {
            rig.store.gc(mode).unwrap();
            assert_eq!(rig.diff_id_of(lost), Some(diff_id(1)), "{mode:?}");
        }
    }

    #[test]
    fn rows_that_cannot_be_read_stop_no_collection() {
        let rig = Rig::new();
        let [was, became] = [1, 2].map(|n| rig.layer(n, diff_id(n)));
        let blob = rig.blob(1, diff_id(1));
        rig.remember_clamped(was, 7, became);
        rig.write(|tx| {
            use crate::catalogue::Key as _;
            tx.set_raw(DIFF_OF_BLOB.name(), blob.digest.to_bytes(), Some(vec![1, 9]));
            tx.set_raw(CLAMPED.name(), (was, 7_u64).to_bytes(), Some(vec![1, 9]));
            Ok(())
        });
        let codes: Vec<_> = rig.findings().into_iter().map(|(code, _)| code).collect();
        assert_eq!(codes, ["blob-diff-wrong", "row-unreadable", "clamped-from-wrong"]);
        rig.collect(blob.digest);
        rig.collect(was);
        rig.collect(became);
        assert_eq!(rig.counts()[1..], [0; 3]);
        assert_eq!(rig.store.read(|rows| rows.rows_count(&LAYERS)).unwrap(), 0);
    }
}
