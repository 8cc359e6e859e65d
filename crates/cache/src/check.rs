//! Do the records agree with each other, with their indexes and with what the store has?

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::ControlFlow;

use plies_oci::{BlobDigest, ChainId};
use plies_store::fsck::{Change, Findings, Remedy};
use plies_store::{CatalogueError, LayerId, Owner, ReadTx, Resource, Rows as _};

use crate::RecordId;
use crate::manager::extend_blob_chain;
use crate::record::{
    self, ACTIVES, BY_BLOB_CHAIN, BY_CHAIN, CHILDREN, COMPOSITIONS, IdRow, Parents, RECORDS, RecordRow, State, USES,
};

type Records = BTreeMap<RecordId, RecordRow>;

/// Checks all tables of this crate, and the holds of records. What it found goes to `findings`.
///
/// # Errors
/// [`CatalogueError::Database`].
pub fn check(rows: &ReadTx, findings: &mut Findings) -> Result<(), CatalogueError> {
    let records: Records = findings.rows_or_drop(rows, &RECORDS)?.into_iter().collect();
    let mut known: BTreeSet<RecordId> = BTreeSet::new();
    rows.scan_each(&RECORDS, |id, _| {
        known.extend(id);
        ControlFlow::Continue(())
    })?;
    lineage(&records, &known, findings);
    for (id, row) in &records {
        state(rows, &records, *id, row, findings)?;
        chains(&records, *id, row, findings);
    }
    derived(rows, &records, findings)?;
    for (id, _) in findings.rows(rows, &USES, |_, changes| Remedy::Rewrite(changes))? {
        if !known.contains(&id) {
            let remedy = Remedy::Rewrite(vec![Change::remove(&USES, &id)]);
            findings.add("uses-stray", format!("record {id}"), "has uses and does not exist", remedy);
        }
    }
    crate::metadata::check(rows, &known, findings)?;
    crate::solver::check(rows, &known, findings)?;
    let should: BTreeMap<Owner, Vec<Resource>> =
        records.iter().map(|(id, row)| (record::owner(*id), row.resources().into_iter().collect())).collect();
    let owners: HashSet<Owner> = known.iter().map(|id| record::owner(*id)).collect();
    findings.compare_holds(rows, "record-hold-wrong", "record", &should, |owner, held| {
        // Variants of its blob; or nobody can say.
        owners.contains(owner) && (matches!(held, Resource::Blob(_)) || !should.contains_key(owner))
    })
}

fn drops(id: RecordId) -> Vec<Change> {
    vec![Change::remove(&RECORDS, &id)]
}

fn subject(id: RecordId) -> String {
    format!("record {id}")
}

/// What a record stands on is there, and nothing stands on itself.
fn lineage(records: &Records, known: &BTreeSet<RecordId>, findings: &mut Findings) {
    let mut children: HashMap<RecordId, Vec<RecordId>> = HashMap::new();
    let mut waits_for: HashMap<RecordId, usize> = HashMap::new();
    let mut doomed: BTreeMap<RecordId, RecordId> = BTreeMap::new();
    for (id, row) in records {
        for parent in row.parents.ids().into_iter().collect::<BTreeSet<_>>() {
            if !known.contains(&parent) {
                doomed.insert(*id, parent);
            } else if records.contains_key(&parent) {
                children.entry(parent).or_default().push(*id);
                *waits_for.entry(*id).or_default() += 1;
            }
        }
    }
    // Those whose parents are all in order are in order themselves; the others go round in circles.
    let mut ready: Vec<RecordId> = records.keys().filter(|id| !waits_for.contains_key(id)).copied().collect();
    while let Some(id) = ready.pop() {
        for child in children.get(&id).into_iter().flatten() {
            if let Some(missing) = doomed.get(&id).copied() {
                doomed.entry(*child).or_insert(missing);
            }
            let waits = waits_for.entry(*child).or_default();
            *waits = waits.saturating_sub(1);
            if *waits == 0 {
                ready.push(*child);
            }
        }
    }
    for (id, missing) in doomed {
        let what = format!("stands on record {missing}, which does not exist");
        findings.add("record-parent-missing", subject(id), what, Remedy::Drop(drops(id)));
    }
    for (id, _) in waits_for.into_iter().filter(|(_, waits)| *waits > 0).collect::<BTreeMap<_, _>>() {
        findings.add("record-cycle", subject(id), "stands on itself, over others", Remedy::Drop(drops(id)));
    }
}

/// Where a record's files are, they are.
fn state(
    rows: &ReadTx,
    records: &Records,
    id: RecordId,
    row: &RecordRow,
    findings: &mut Findings,
) -> Result<(), CatalogueError> {
    let mut lost = |code, what: String, resource: Resource| -> Result<(), CatalogueError> {
        if !rows.has(resource)? {
            let remedy = Remedy::Restore { resource, otherwise: drops(id) };
            findings.add(code, subject(id), format!("{what} {resource}, which is not in the store"), remedy);
        }
        Ok(())
    };
    match &row.state {
        State::Mutable { active, .. } | State::Shared { active, .. } => {
            lost("record-active-missing", "has its files in".to_owned(), (*active).into())?;
        }
        State::Sealed { layer: Some(layer) } => {
            lost("record-layer-missing", "has its files in".to_owned(), (*layer).into())?;
        }
        State::Stack(snapshot) => lost("record-snapshot-missing", "is".to_owned(), (*snapshot).into())?,
        State::Sealed { layer: None } | State::Lazy | State::Composed => {}
    }
    match (&row.state, &row.parents) {
        (State::Lazy, _) if row.blob.as_ref().is_none_or(|blob| blob.digest.is_none()) => {
            let what = "has neither a layer nor a blob";
            findings.add("record-blob-missing", subject(id), what, Remedy::Drop(drops(id)));
        }
        (State::Composed, Parents::None | Parents::Layer(_)) => {
            let what = "is said to be composed, and is of nothing";
            findings.add("record-state-wrong", subject(id), what, Remedy::Drop(drops(id)));
        }
        (State::Mutable { active, committed_as: Some(other) }, _) => {
            let is_pair = records.get(other).is_some_and(|other| {
                matches!(&other.state, State::Shared { mutable, active: shared } if *mutable == id && shared == active)
            });
            if !is_pair {
                let state = State::Mutable { active: *active, committed_as: None };
                let put = Change::put(&RECORDS, &id, &RecordRow { state, ..row.clone() });
                let what = format!("was committed as record {other}, which does not say so");
                findings.add("record-pair-broken", subject(id), what, Remedy::Rewrite(vec![put]));
            }
        }
        (State::Shared { mutable, active }, _) => {
            let is_pair = records.get(mutable).is_some_and(|other| {
                matches!(&other.state, State::Mutable { active: own, committed_as: Some(of) } if *of == id && own == active)
            });
            if !is_pair {
                // A mutable record is nothing but its directory and what it stands on.
                let state = State::Mutable { active: *active, committed_as: Some(id) };
                let (parents, created_at) = (row.parents.clone(), row.created_at);
                let mutable_row = match records.get(mutable) {
                    Some(other) => RecordRow { state, ..other.clone() },
                    None => RecordRow::new(state, parents, created_at),
                };
                let what = format!("shares its files with record {mutable}, which does not say so");
                let remedy = Remedy::Rewrite(vec![Change::put(&RECORDS, mutable, &mutable_row)]);
                findings.add("record-pair-broken", subject(id), what, remedy);
            }
        }
        _ => {}
    }
    if let Some(snapshot) = row.snapshot
        && !rows.has(snapshot)?
    {
        let without = Change::put(&RECORDS, &id, &RecordRow { snapshot: None, ..row.clone() });
        let remedy = match layers_of(rows, id)? {
            // Actives may stand on it.
            Some(layers) => Remedy::Restack { layers, otherwise: vec![without] },
            None => Remedy::Rewrite(vec![without]),
        };
        findings.add(
            "record-tree-missing",
            subject(id),
            format!("shows {snapshot}, which is not in the store"),
            remedy,
        );
    }
    Ok(())
}

/// The layers of a record all of whose tree is in layers.
fn layers_of(rows: &ReadTx, id: RecordId) -> Result<Option<Vec<LayerId>>, CatalogueError> {
    let walk = match record::walk(rows, id) {
        Err(error @ CatalogueError::Database { .. }) => return Err(error),
        Err(_) | Ok(Err(_)) => return Ok(None),
        Ok(Ok(walk)) => walk,
    };
    let mut layers = Vec::new();
    for (_, row) in walk {
        match row.state {
            State::Sealed { layer } => layers.extend(layer),
            _ => return Ok(None),
        }
    }
    Ok((!layers.is_empty()).then_some(layers))
}

/// A row with the chain IDs that follow from what lies below and from its own blob, where it has any. Those of merges, and
/// of what stands on something without, are what they are.
pub(crate) fn with_right_chains<'r>(
    row: &RecordRow,
    parent: impl FnOnce(RecordId) -> Option<&'r RecordRow>,
) -> RecordRow {
    let mut right = row.clone();
    let Some(blob) = &row.blob else { return right };
    let (chain, blob_chain) = match &row.parents {
        Parents::None => (None, None),
        Parents::Layer(id) => match parent(*id).map(|parent| (parent.chain_id, parent.blob_chain_id)) {
            Some(both @ (Some(_), Some(_))) => both,
            _ => return right,
        },
        Parents::Merge(_) | Parents::Diff { .. } => return right,
    };
    if row.chain_id.is_some() {
        right.chain_id = Some(ChainId::extend(chain, blob.diff_id));
    }
    if let (Some(_), Some(digest)) = (row.blob_chain_id, blob.digest) {
        right.blob_chain_id = Some(extend_blob_chain(blob_chain, digest, blob.diff_id));
    }
    right
}

/// Chain IDs are those of what lies below, and of the record's own blob.
fn chains(records: &Records, id: RecordId, row: &RecordRow, findings: &mut Findings) {
    let right = with_right_chains(row, |parent| records.get(&parent));
    if right != *row {
        let what = "has another chain ID than its layers make";
        let remedy = Remedy::Rewrite(vec![Change::put(&RECORDS, &id, &right)]);
        findings.add("record-chain-wrong", subject(id), what, remedy);
    }
}

fn derived(rows: &ReadTx, records: &Records, findings: &mut Findings) -> Result<(), CatalogueError> {
    let (mut children, mut by_chain, mut by_blob_chain, mut actives) =
        (BTreeMap::new(), BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let mut composed: BTreeMap<BlobDigest, Vec<RecordId>> = BTreeMap::new();
    for (id, row) in records {
        children.extend(row.parents.ids().into_iter().map(|parent| ((parent, *id), ())));
        by_chain.extend(row.chain_id.map(|chain| ((chain, *id), ())));
        by_blob_chain.extend(row.blob_chain_id.map(|chain| ((chain, *id), ())));
        if let State::Mutable { active, .. } = row.state {
            actives.insert(active, IdRow(*id));
        }
        if let Some(composition) = row.parents.composition() {
            composed.entry(composition).or_default().push(*id);
        }
    }
    findings.compare(rows, "children-wrong", &CHILDREN, children)?;
    findings.compare(rows, "by-chain-wrong", &BY_CHAIN, by_chain)?;
    findings.compare(rows, "by-blob-chain-wrong", &BY_BLOB_CHAIN, by_blob_chain)?;
    findings.compare(rows, "record-actives-wrong", &ACTIVES, actives)?;
    let mut compositions = BTreeMap::new();
    for (composition, ids) in composed {
        // Of several that are made of the same, the one that is found is as good as another.
        let found = rows.get(&COMPOSITIONS, &composition).ok().flatten().filter(|IdRow(found)| ids.contains(found));
        let found = found.or(ids.first().map(|id| IdRow(*id)));
        compositions.extend(found.map(|found| (composition, found)));
    }
    findings.compare(rows, "compositions-wrong", &COMPOSITIONS, compositions)
}
