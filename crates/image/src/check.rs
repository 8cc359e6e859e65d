//! Do images, names, chains and writable layers agree with each other, with the images' configs and with what the store has?

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::str::FromStr as _;

use plies_oci::{BlobDigest, ChainId, DiffId, ImageConfig, ImageId, Reference};
use plies_store::fsck::{Change, Findings, Remedy};
use plies_store::{BlobError, CatalogueError, LayerId, Owner, ReadTx, Resource, Rows as _, Snapshots, Store};

use crate::images::{self, IMAGES, ImageRow, Listed, NAMES, NameRow};
use crate::layerstore::{self, CHAINS, ChainRow, RW_LAYERS, RwRow};

type Chains = BTreeMap<ChainId, ChainRow>;
type Images = BTreeMap<ImageId, ImageRow>;

/// Checks all tables of this crate, and the holds of images, chains and writable layers. Reads each image's config. What it
/// found goes to `findings`.
///
/// # Errors
/// [`CatalogueError::Database`].
pub fn check(store: &Store, rows: &ReadTx, findings: &mut Findings) -> Result<(), CatalogueError> {
    let chains: Chains = findings
        .rows(rows, &CHAINS, |chain, changes| match remade_chain(store, rows, chain) {
            Ok(Some(row)) => Remedy::Rewrite(vec![Change::put(&CHAINS, &chain, &row)]),
            _ => Remedy::Drop(changes),
        })?
        .into_iter()
        .collect();
    let images: Images = findings.rows_or_drop(rows, &IMAGES)?.into_iter().collect();
    for (id, row) in &images {
        image(store, rows, &images, &chains, *id, row, findings)?;
    }
    names(rows, &images, findings)?;
    registered(store, rows, &chains, findings)?;
    let writable: BTreeMap<String, RwRow> = findings.rows_or_drop(rows, &RW_LAYERS)?.into_iter().collect();
    for (name, row) in &writable {
        writable_layer(rows, &chains, name, row, findings)?;
    }
    derived(store, rows, &images, &chains, &writable, findings)
}

fn short(id: &ImageId) -> String {
    format!("image {id}")
}

fn blob_of(id: &ImageId) -> BlobDigest {
    BlobDigest::from_bytes(*id.as_bytes())
}

fn image(
    store: &Store,
    rows: &ReadTx,
    images: &Images,
    chains: &Chains,
    id: ImageId,
    row: &ImageRow,
    findings: &mut Findings,
) -> Result<(), CatalogueError> {
    let subject = short(&id);
    let drop = vec![Change::remove(&IMAGES, &id)];
    let rewrite = |row: &ImageRow| Remedy::Rewrite(vec![Change::put(&IMAGES, &id, row)]);
    for manifest in &row.manifests {
        if !rows.has(manifest.digest)? {
            let mut without = row.clone();
            without.manifests.retain(|other| other.digest != manifest.digest);
            let otherwise = vec![Change::put(&IMAGES, &id, &without)];
            let remedy = Remedy::Restore { resource: manifest.digest.into(), otherwise };
            let what = format!("has a manifest {}, which is not in the store", manifest.digest);
            findings.add("image-manifest-missing", &subject, what, remedy);
        }
    }
    if let Some(parent) = row.parent {
        let orphan = rewrite(&ImageRow { parent: None, ..row.clone() });
        if !rows.contains(&IMAGES, &parent)? {
            let what = format!("was built on {}, which is not here", short(&parent));
            findings.add("image-parent-missing", &subject, what, orphan);
        } else if is_own_ancestor(images, id) {
            findings.add("image-parent-cycle", &subject, "was built on itself, over others", orphan);
        }
    }
    if !rows.has(blob_of(&id))? {
        let remedy = Remedy::Restore { resource: blob_of(&id).into(), otherwise: drop };
        findings.add("image-config-missing", &subject, "has no config in the store", remedy);
        return Ok(());
    }
    let raw = match store.content().read(blob_of(&id)) {
        Err(BlobError::Changed { .. }) => {
            findings.damaged_blob(blob_of(&id), "has bytes that hash to something else, and is an image's config");
            return Ok(());
        }
        // The store's check has told.
        Err(BlobError::Catalogue(error @ CatalogueError::Database { .. })) => return Err(error),
        Err(_) => return Ok(()),
        Ok(raw) => raw,
    };
    let config = match ImageConfig::parse(&raw) {
        Ok(config) => config,
        Err(error) => {
            findings.add(
                "image-config-wrong",
                &subject,
                format!("has a config that is none: {error}"),
                Remedy::Drop(drop),
            );
            return Ok(());
        }
    };
    if row.config_bytes != raw.len() as u64 {
        let what = format!("has a config of {} bytes, not {}", raw.len(), row.config_bytes);
        findings.add(
            "image-size-wrong",
            &subject,
            what,
            rewrite(&ImageRow { config_bytes: raw.len() as u64, ..row.clone() }),
        );
    }
    if let Some(listed) = &row.listed {
        let right = Listed {
            created: config.document().value().created().clone(),
            platform: config.platform().to_string(),
            layers_count: u32::try_from(config.diff_ids().len()).unwrap_or(u32::MAX),
            size_bytes: listed.size_bytes,
        };
        if right != *listed {
            let remedy = rewrite(&ImageRow { listed: Some(right), ..row.clone() });
            findings.add("image-listed-wrong", &subject, "is listed as something else than its config says", remedy);
        }
    }
    let layers = image_chain(store, rows, &config, id, row, findings)?;
    if let Some(snapshot) = row.snapshot
        && !rows.has(snapshot)?
    {
        let known = match row.chain {
            Some(chain) if chains.contains_key(&chain) => layer_list(chains, Some(chain)),
            _ => layers,
        };
        let remedy = match known {
            Some(layers) if Snapshots::id_of(&layers) == snapshot => Remedy::Restack { layers, otherwise: drop },
            _ => Remedy::Drop(drop),
        };
        findings.add("image-tree-missing", &subject, format!("shows {snapshot}, which is not in the store"), remedy);
    }
    Ok(())
}

/// An image's chain is that of its config's diff IDs, and registered. The layers, if all are here by their diff IDs.
fn image_chain(
    store: &Store,
    rows: &ReadTx,
    config: &ImageConfig,
    id: ImageId,
    row: &ImageRow,
    findings: &mut Findings,
) -> Result<Option<Vec<LayerId>>, CatalogueError> {
    let find = |diff_id: &DiffId| store.layers().find_by_diff_id(*diff_id).ok().flatten();
    let found: Option<Vec<_>> =
        config.diff_ids().iter().map(|diff_id| find(diff_id).map(|info| (*diff_id, info))).collect();
    let layers = found.as_ref().map(|found| found.iter().map(|(_, info)| info.id).collect());
    let (Some(chain), right) = (row.chain, ChainId::of(config.diff_ids())) else { return Ok(layers) };
    let is_here = match right {
        Some(right) => rows.contains(&CHAINS, &right)?,
        None => false,
    };
    if Some(chain) == right && is_here {
        return Ok(layers);
    }
    let mut changes = Vec::new();
    let mut made = right.filter(|_| is_here);
    if !is_here && let Some(found) = &found {
        let mut below: Option<(ChainId, ChainRow)> = None;
        for (diff_id, info) in found {
            let parent = below.as_ref().map(|(chain, _)| *chain);
            let chain = ChainId::extend(parent, *diff_id);
            let row = match rows.get(&CHAINS, &chain).ok().flatten() {
                Some(row) => row,
                None => {
                    let size = (info.id, info.usage.content_bytes);
                    let row =
                        ChainRow::on(below.as_ref().map(|(chain, row)| (*chain, row)), *diff_id, size, row.added_at);
                    changes.push(Change::put(&CHAINS, &chain, &row));
                    row
                }
            };
            below = Some((chain, row));
        }
        made = below.map(|(chain, _)| chain);
    }
    if row.chain != made {
        changes.push(Change::put(&IMAGES, &id, &ImageRow { chain: made, ..row.clone() }));
    }
    let (code, what) = match Some(chain) == right {
        true => ("image-chain-missing", format!("has chain {chain}, which is not registered")),
        false => ("image-chain-wrong", format!("has chain {chain}, its config makes another")),
    };
    findings.add(code, short(&id), what, Remedy::Rewrite(changes));
    Ok(layers)
}

fn is_own_ancestor(images: &Images, id: ImageId) -> bool {
    let mut seen = HashSet::new();
    let mut next = images.get(&id).and_then(|row| row.parent);
    while let Some(at) = next {
        if at == id {
            return true;
        }
        if !seen.insert(at) {
            return false;
        }
        next = images.get(&at).and_then(|row| row.parent);
    }
    false
}

fn names(rows: &ReadTx, images: &Images, findings: &mut Findings) -> Result<(), CatalogueError> {
    for (name, row) in findings.rows_or_drop(rows, &NAMES)? {
        let subject = format!("name {name}");
        let drop = || Remedy::Drop(vec![Change::remove(&NAMES, &name)]);
        if !Reference::from_str(&name).is_ok_and(|parsed| parsed.to_string() == name) {
            findings.add("name-invalid", subject, "is no full reference", drop());
        } else if !rows.contains(&IMAGES, &row.image)? {
            let what = format!("points at {}, which does not exist", short(&row.image));
            findings.add("name-dangling", subject, what, drop());
        } else if let (Some(manifest), Some(image)) = (row.manifest, images.get(&row.image))
            && !image.manifests.iter().any(|known| known.digest == manifest)
        {
            let put = Change::put(&NAMES, &name, &NameRow { manifest: None, ..row });
            let what = format!("goes with manifest {manifest}, which is none of its image's");
            findings.add("name-manifest-wrong", subject, what, Remedy::Rewrite(vec![put]));
        }
    }
    Ok(())
}

/// The layers of a chain, bottom first; `None` if one is not registered.
fn layer_list(chains: &Chains, chain: Option<ChainId>) -> Option<Vec<LayerId>> {
    let (mut layers, mut next, mut seen) = (Vec::new(), chain, HashSet::new());
    while let Some(chain) = next {
        let row = chains.get(&chain).filter(|_| seen.insert(chain))?;
        layers.push(row.layer);
        next = row.parent;
    }
    layers.reverse();
    Some(layers)
}

/// What a chain's row must have been, by the layer that it still holds: its diff ID on one of the chains that are there
/// makes the chain ID.
fn remade_chain(store: &Store, rows: &ReadTx, chain: ChainId) -> Result<Option<ChainRow>, CatalogueError> {
    let owner = layerstore::owner(&chain);
    for held in plies_store::held_by(rows, &owner)? {
        let Resource::Layer(layer) = held else { continue };
        let Ok(info) = store.layers().info(layer) else { continue };
        let Some(diff_id) = info.diff_id else { continue };
        let size = (layer, info.usage.content_bytes);
        if ChainId::extend(None, diff_id) == chain {
            return Ok(Some(ChainRow::on(None, diff_id, size, info.created)));
        }
        for (parent, row) in rows.readable(&CHAINS)? {
            if ChainId::extend(Some(parent), diff_id) == chain {
                return Ok(Some(ChainRow::on(Some((parent, &row)), diff_id, size, info.created)));
            }
        }
    }
    Ok(None)
}

fn registered(store: &Store, rows: &ReadTx, chains: &Chains, findings: &mut Findings) -> Result<(), CatalogueError> {
    for (chain, row) in chains {
        let subject = format!("chain {chain}");
        let drop = vec![Change::remove(&CHAINS, chain)];
        let rewrite = |row: &ChainRow| Remedy::Rewrite(vec![Change::put(&CHAINS, chain, row)]);
        if ChainId::extend(row.parent, row.diff_id) != *chain {
            let what = format!("is not what diff ID {} on its parent makes", row.diff_id);
            // Its layer and its ID say what the row should.
            let remedy = match remade_chain(store, rows, *chain)? {
                Some(right) if right != *row => rewrite(&right),
                _ => Remedy::Drop(drop),
            };
            findings.add("chain-id-wrong", subject, what, remedy);
            continue;
        }
        let below = match row.parent {
            None => None,
            Some(parent) => match chains.get(&parent) {
                Some(below) => Some((parent, below)),
                None if rows.contains(&CHAINS, &parent)? => continue,
                None => {
                    let remedy = match remade_chain(store, rows, parent)? {
                        Some(row) => Remedy::Rewrite(vec![Change::put(&CHAINS, &parent, &row)]),
                        None => Remedy::Drop(drop),
                    };
                    findings.add(
                        "chain-parent-missing",
                        subject,
                        format!("stands on {parent}, which is not registered"),
                        remedy,
                    );
                    continue;
                }
            },
        };
        if !rows.has(row.layer)? {
            let what = format!("is layer {}, which is not in the store", row.layer);
            let remedy = Remedy::Restore { resource: row.layer.into(), otherwise: drop };
            findings.add("chain-layer-missing", subject, what, remedy);
            continue;
        }
        let Ok(info) = store.layers().info(row.layer) else { continue };
        if info.diff_id.is_some_and(|diff_id| diff_id != row.diff_id) {
            let remedy = match store.layers().find_by_diff_id(row.diff_id).ok().flatten() {
                Some(right) => rewrite(&ChainRow { layer: right.id, ..row.clone() }),
                None => Remedy::Drop(drop),
            };
            findings.add(
                "chain-layer-wrong",
                subject,
                format!("is layer {}, which has another diff ID", row.layer),
                remedy,
            );
            continue;
        }
        let right = ChainRow::on(below, row.diff_id, (row.layer, info.usage.content_bytes), row.created);
        if right != *row {
            findings.add(
                "chain-sums-wrong",
                subject,
                "says another depth or size than its layers have",
                rewrite(&right),
            );
        }
    }
    Ok(())
}

fn writable_layer(
    rows: &ReadTx,
    chains: &Chains,
    name: &str,
    row: &RwRow,
    findings: &mut Findings,
) -> Result<(), CatalogueError> {
    let subject = format!("writable layer {name}");
    let drop = vec![Change::remove(&RW_LAYERS, &name.to_owned())];
    if !rows.has(row.active)? {
        let what = format!("has its files in active {}, which is not in the store", row.active);
        findings.add("rw-active-missing", &subject, what, Remedy::Drop(drop.clone()));
    }
    if let Some(init) = row.init
        && !rows.has(init)?
    {
        let without = Change::put(&RW_LAYERS, &name.to_owned(), &RwRow { init: None, ..row.clone() });
        let remedy = Remedy::Restore { resource: init.into(), otherwise: vec![without] };
        findings.add("rw-init-missing", &subject, format!("has init layer {init}, which is not in the store"), remedy);
    }
    let Some(mut layers) = layer_list(chains, row.parent) else {
        if let Some(parent) = row.parent
            && !rows.contains(&CHAINS, &parent)?
        {
            let what = format!("stands on chain {parent}, which is not registered");
            findings.add("rw-parent-missing", &subject, what, Remedy::Drop(drop));
        }
        return Ok(());
    };
    layers.extend(row.init);
    if !layers.is_empty() && !rows.has(Snapshots::id_of(&layers))? {
        let what = "stands on a tree that is not in the store";
        findings.add("rw-base-missing", &subject, what, Remedy::Restack { layers, otherwise: drop });
    }
    Ok(())
}

fn derived(
    store: &Store,
    rows: &ReadTx,
    images: &Images,
    chains: &Chains,
    writable: &BTreeMap<String, RwRow>,
    findings: &mut Findings,
) -> Result<(), CatalogueError> {
    let mut children = BTreeMap::new();
    let mut image_holds: BTreeMap<Owner, Vec<Resource>> = BTreeMap::new();
    let mut chain_holds = BTreeMap::new();
    for (id, row) in images {
        children.extend(row.parent.map(|parent| ((parent, *id), ())));
        let held = [blob_of(id).into()].into_iter().chain(row.manifests.iter().map(|manifest| manifest.digest.into()));
        image_holds.insert(images::owner(id), held.chain(row.snapshot.map(Resource::from)).collect());
        if let Some(chain) = row.chain.filter(|chain| chains.contains_key(chain)) {
            chain_holds.insert((chain, images::owner(id).as_str().to_owned()), 1_u64);
        }
    }
    findings.compare(rows, "image-children-wrong", &images::CHILDREN, children)?;
    let unreadable = |table: &HashSet<Owner>, owner: &Owner, known: bool| !known && table.contains(owner);
    let mut all = HashSet::new();
    rows.scan_each(&IMAGES, |id, _| {
        all.extend(id.map(|id| images::owner(&id)));
        std::ops::ControlFlow::Continue(())
    })?;
    findings.compare_holds(rows, "image-hold-wrong", "image", &image_holds, |owner, _| {
        unreadable(&all, owner, image_holds.contains_key(owner))
    })?;

    let mut rw_holds = BTreeMap::new();
    for (name, row) in writable {
        rw_holds.insert(layerstore::rw_owner(name), vec![row.active.into()]);
        if let Some(parent) = row.parent.filter(|parent| chains.contains_key(parent)) {
            chain_holds.insert((parent, layerstore::rw_owner(name).as_str().to_owned()), 1);
        }
    }
    let mut all = HashSet::new();
    rows.scan_each(&RW_LAYERS, |name, _| {
        all.extend(name.map(|name| layerstore::rw_owner(&name)));
        std::ops::ControlFlow::Continue(())
    })?;
    findings.compare_holds(rows, "rw-hold-wrong", "rw", &rw_holds, |owner, _| {
        unreadable(&all, owner, rw_holds.contains_key(owner))
    })?;

    let mut children = BTreeMap::new();
    let mut layer_holds = BTreeMap::new();
    let mut used: BTreeSet<ChainId> = BTreeSet::new();
    for (chain, row) in chains {
        children.extend(row.parent.map(|parent| ((parent, *chain), ())));
        used.extend(row.parent);
        layer_holds.insert(layerstore::owner(chain), vec![row.layer.into()]);
    }
    findings.compare(rows, "chain-children-wrong", &layerstore::CHILDREN, children)?;
    // A chain whose row is gone holds its layer still, and says by it what the row was.
    let mut all = HashSet::new();
    rows.scan_each(&CHAINS, |chain, _| {
        all.extend(chain.map(|chain| layerstore::owner(&chain)));
        std::ops::ControlFlow::Continue(())
    })?;
    let mut lost = Vec::new();
    plies_store::scan_holds(rows, |owner, _| {
        if let Some(chain) = owner.as_str().strip_prefix("chain:").and_then(|chain| chain.parse::<ChainId>().ok())
            && !all.contains(owner)
        {
            lost.push((owner.clone(), chain));
        }
        std::ops::ControlFlow::Continue(())
    })?;
    // Of those that nothing counts on, the hold alone is too much.
    let mut needed: BTreeSet<ChainId> = images.values().filter_map(|row| row.chain).collect();
    needed.extend(writable.values().filter_map(|row| row.parent).chain(used.iter().copied()));
    needed.extend(rows.readable(&layerstore::HOLDS)?.into_iter().map(|((chain, _), _)| chain));
    for (owner, chain) in lost.into_iter().filter(|(_, chain)| needed.contains(chain)) {
        if let Some(row) = remade_chain(store, rows, chain)? {
            all.insert(owner);
            let remedy = Remedy::Rewrite(vec![Change::put(&CHAINS, &chain, &row)]);
            findings.add("chain-missing", format!("chain {chain}"), "holds its layer and is not registered", remedy);
        }
    }
    findings.compare_holds(rows, "chain-hold-wrong", "chain", &layer_holds, |owner, _| {
        unreadable(&all, owner, layer_holds.contains_key(owner))
    })?;
    holders(rows, chains, chain_holds, &mut used, &all, findings)?;
    for chain in chains.keys().filter(|chain| !used.contains(chain)) {
        let remedy = Remedy::Rewrite(vec![Change::remove(&CHAINS, chain)]);
        findings.add("chain-unused", format!("chain {chain}"), "is registered, and nothing counts on it", remedy);
    }
    Ok(())
}

/// Images and writable layers hold their chains, once; users as often as they said.
fn holders(
    rows: &ReadTx,
    chains: &Chains,
    mut should: BTreeMap<(ChainId, String), u64>,
    used: &mut BTreeSet<ChainId>,
    all: &HashSet<Owner>,
    findings: &mut Findings,
) -> Result<(), CatalogueError> {
    for ((chain, holder), count) in findings.rows_or_drop(rows, &layerstore::HOLDS)? {
        // Of one that can't be read, or that can be made again, nobody can say.
        let is_theirs = holder.starts_with("image:") || holder.starts_with("rw:");
        if (!is_theirs && chains.contains_key(&chain))
            || (!chains.contains_key(&chain) && all.contains(&layerstore::owner(&chain)))
        {
            should.insert((chain, holder), count.max(1));
        }
    }
    for (chain, lease) in findings.rows_or_drop(rows, &layerstore::REFS)?.into_iter().map(|(key, ())| key) {
        if chains.contains_key(&chain) {
            used.insert(chain);
        } else {
            let remedy = Remedy::Rewrite(vec![Change::remove(&layerstore::REFS, &(chain, lease))]);
            findings.add("chain-ref-stray", format!("chain {chain}"), "is referred to and not registered", remedy);
        }
    }
    for (name, lease) in findings.rows_or_drop(rows, &layerstore::RW_REFS)?.into_iter().map(|(key, ())| key) {
        if !rows.contains(&RW_LAYERS, &name)? {
            let remedy = Remedy::Rewrite(vec![Change::remove(&layerstore::RW_REFS, &(name.clone(), lease))]);
            findings.add("rw-ref-stray", format!("writable layer {name}"), "is referred to and does not exist", remedy);
        }
    }
    used.extend(should.keys().map(|(chain, _)| *chain));
    findings.compare(rows, "chain-holders-wrong", &layerstore::HOLDS, should)
}
