//! A storage of podman, buildah and CRI-O with the overlay driver: what the library containers/storage keeps below its graph root.
//!
//! ```text
//! <root>/overlay-layers/layers.json               layers: id, parent, diff-digest, flags, uidmap; volatile-layers.json: more of them
//!                       <layer>.tar-split.gz
//! <root>/overlay/<layer>/diff                     files, with overlayfs' marks
//! <root>/overlay-images/images.json               images: id, names, big-data-names
//!                       <image>/<big data>        its config, by `sha256:<image>`
//! <root>/overlay-containers/containers.json       containers: id, names, layer; volatile-containers.json: more of them
//! ```
//!
//! Layers have IDs of their own there; an image names its layers by diff IDs, and those in order are their chains, so two layers
//! of one chain are one layer here. A name with a digest stays there, since the compressed layers that its manifest names are
//! not kept.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use plies_oci::{ChainId, DiffId, DocumentLimits, ImageId, Reference};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::images::{self, Container, Containers, Files, Image, Layer, Name, Read, Source, read_bytes, tell};
use crate::{Import, ImportError, ImportReport, Outcome, chain};

const WANTED: &str =
    "storage of podman or buildah with the overlay driver: there is no overlay-layers in it (give its graphroot)";
const WANTED_NO_VFS: &str =
    "storage with the overlay driver but with vfs, which copies a whole tree for each layer: it cannot be taken over";
/// Layers, images or containers of one storage: 100,000 of a kilobyte each.
const LIST_BYTES_MAX: u64 = 128 << 20;

/// A layer as the library writes it down.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct LayerRow {
    id: String,
    parent: Option<String>,
    diff_digest: Option<String>,
    #[serde(default)]
    flags: BTreeMap<String, serde_json::Value>,
    #[serde(default)]
    uidmap: Vec<MapRow>,
    #[serde(default)]
    gidmap: Vec<MapRow>,
}

/// A range of owners in a user namespace.
#[derive(Debug, Deserialize)]
struct MapRow {
    container_id: u64,
    host_id: u64,
}

#[derive(Debug, Deserialize)]
struct ImageRow {
    id: String,
    #[serde(default)]
    names: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct ContainerRow {
    id: String,
    #[serde(default)]
    names: Vec<String>,
    layer: String,
}

/// Takes over what can be taken of the storage at `path`.
///
/// # Errors
/// [`ImportError::NotOne`]; [`ImportError::OtherFileSystem`]; what the store says. What of the source cannot be read is in
/// the report instead.
pub fn import(import: &Import<'_>, path: &Path, containers: Containers) -> Result<ImportReport, ImportError> {
    let mut report = ImportReport { dry_run: import.options.dry_run, ..ImportReport::default() };
    if !path.join("overlay-layers").is_dir() {
        let wanted = if path.join("vfs-layers").is_dir() { WANTED_NO_VFS } else { WANTED };
        return Err(ImportError::NotOne { path: path.to_owned(), wanted });
    }
    import.check_file_system(&path.join("overlay"))?;
    report.sources.push(path.to_owned());
    let source = read(path, import.documents, &mut report);
    images::take(import, &source, containers, report)
}

fn read(root: &Path, limits: &DocumentLimits, report: &mut ImportReport) -> Source {
    if root.join("vfs-layers").is_dir() {
        let why = "it is of the vfs driver, which copies a whole tree for each layer";
        tell(report, "directory", "vfs-layers", Outcome::Left, None, 0, Some(why.into()));
    }
    let mut source = Source::default();
    let mut rows: BTreeMap<String, LayerRow> = BTreeMap::new();
    for name in ["layers.json", "volatile-layers.json"] {
        for row in rows_of::<LayerRow>(&root.join("overlay-layers").join(name), "layer", report) {
            match rows.get(&row.id) {
                Some(_) => report.problem("layer", row.id, "another layer has its ID"),
                None => drop(rows.insert(row.id.clone(), row)),
            }
        }
    }
    let mut container_rows = Vec::new();
    for name in ["containers.json", "volatile-containers.json"] {
        container_rows.extend(rows_of::<ContainerRow>(
            &root.join("overlay-containers").join(name),
            "container",
            report,
        ));
    }
    let chains = chains(&rows);
    let writable: BTreeSet<&str> = container_rows.iter().map(|row| &*row.layer).collect();
    // One whose owners were shifted comes after one of the same chain whose were not.
    let mut ordered: Vec<&LayerRow> = rows.values().filter(|row| !writable.contains(&*row.id)).collect();
    ordered.sort_by_key(|row| row.is_shifted());
    for row in ordered {
        match chains.get(&*row.id) {
            Some(Ok((chain_id, diff_id, parent))) => {
                let layer = read_layer(root, row, *diff_id, *parent);
                match source.layers.get(chain_id) {
                    Some(Ok(_)) => {
                        let why = format!("it is layer {chain_id} once more");
                        tell(report, "layer", &row.id, Outcome::Left, None, 0, Some(why));
                    }
                    Some(Err(_)) | None => drop(source.layers.insert(*chain_id, layer)),
                }
            }
            Some(Err(why)) => report.problem("layer", &row.id, why),
            None => {}
        }
    }
    for row in rows_of::<ImageRow>(&root.join("overlay-images/images.json"), "image", report) {
        let Ok(id) = ImageId::from_hex(&row.id) else {
            report.problem("image", row.id, "its ID is no digest of a config");
            continue;
        };
        let config = root.join("overlay-images").join(&row.id).join(config_file(id));
        source.images.insert(id, Image::read(id, &config, limits));
        for name in row.names {
            let reference = name.parse::<Reference>().map_err(|error| chain(&error));
            if reference.as_ref().is_ok_and(|reference| reference.digest().is_some()) {
                let why = "the compressed layers that its manifest names are not kept there";
                tell(report, "name", name, Outcome::Left, None, 0, Some(why.into()));
                continue;
            }
            source.names.push((name, reference.map(|reference| Name::of(reference, id))));
        }
    }
    for row in container_rows {
        let container = read_container(root, &row, &rows, &chains);
        source.containers.insert(row.id, container);
    }
    source
}

/// The elements of a list that is a file; those that are none are told. A list that is not there has none.
fn rows_of<T: DeserializeOwned>(path: &Path, kind: &'static str, report: &mut ImportReport) -> Vec<T> {
    if !path.exists() {
        return Vec::new();
    }
    let parse = |raw: Vec<u8>| match raw.iter().all(u8::is_ascii_whitespace) {
        true => Ok(Vec::new()),
        false => serde_json::from_slice::<Vec<serde_json::Value>>(&raw).map_err(|error| chain(&error)),
    };
    let values = read_bytes(path, LIST_BYTES_MAX).and_then(parse).unwrap_or_else(|why| {
        report.problem("file", path.display().to_string(), why);
        Vec::new()
    });
    let mut rows = Vec::new();
    for (place, value) in values.into_iter().enumerate() {
        let name = value["id"].as_str().map_or_else(|| format!("number {place}"), str::to_owned);
        match serde_json::from_value(value) {
            Ok(row) => rows.push(row),
            Err(error) => report.problem(kind, name, format!("{}: {}", path.display(), chain(&error))),
        }
    }
    rows
}

/// What a layer is here, by its ID there: chain ID, diff ID and the chain below.
type Chains<'r> = BTreeMap<&'r str, Read<(ChainId, DiffId, Option<ChainId>)>>;

/// The chains that layers complete. Those without a digest complete none, nor do those that stand on such.
fn chains(rows: &BTreeMap<String, LayerRow>) -> Chains<'_> {
    let mut chains = Chains::new();
    for first in rows.values() {
        // Down to what is known; then up again.
        let mut line: Vec<&LayerRow> = Vec::new();
        let mut on_the_way = BTreeSet::new();
        let mut next = Some(first);
        let mut below = Ok(None);
        while let Some(row) = next {
            if let Some(known) = chains.get(&*row.id) {
                below = known.as_ref().map(|(chain_id, ..)| Some(*chain_id)).map_err(String::clone);
                break;
            }
            if !on_the_way.insert(&*row.id) {
                below = Err("its parents lead in a circle".to_owned());
                break;
            }
            line.push(row);
            next = match row.parent.as_deref().filter(|parent| !parent.is_empty()) {
                None => None,
                Some(parent) => match rows.get(parent) {
                    Some(parent) => Some(parent),
                    None => {
                        below = Err(format!("there is no layer {parent}, which it stands on"));
                        None
                    }
                },
            };
        }
        for row in line.into_iter().rev() {
            let diff_id = match row.diff_digest.as_deref() {
                None | Some("") => Err("it has no diff ID".to_owned()),
                Some(text) => text.parse::<DiffId>().map_err(|error| chain(&error)),
            };
            let made = below.clone().and_then(|parent| {
                let diff_id = diff_id?;
                Ok((ChainId::extend(parent, diff_id), diff_id, parent))
            });
            below = match &made {
                Ok((chain_id, ..)) => Ok(Some(*chain_id)),
                Err(why) => Err(format!("layer {}, which it stands on: {why}", row.id)),
            };
            chains.insert(&row.id, made);
        }
    }
    chains
}

impl LayerRow {
    /// Whether its files have other owners on disk than in the layer.
    fn is_shifted(&self) -> bool {
        self.uidmap.iter().chain(&self.gidmap).any(|map| map.container_id != map.host_id)
    }

    /// Where its files are.
    fn tree(&self, root: &Path) -> Read<PathBuf> {
        // An ID comes from a file, so it is not any path.
        let mut parts = Path::new(&self.id).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(only)), None) if only == &*self.id) {
            return Err(format!("its ID is none: {:?}", self.id));
        }
        let dir = root.join("overlay").join(&self.id);
        let tree = dir.join("diff");
        match (tree.is_dir(), dir.join("composefs-data").exists()) {
            (_, true) => Err("its files are kept for composefs, by their digests and not as a tree".into()),
            (true, false) => Ok(tree),
            (false, false) => Err(format!("its files are gone: no directory {}", tree.display())),
        }
    }
}

fn read_layer(root: &Path, row: &LayerRow, diff_id: DiffId, parent: Option<ChainId>) -> Read<Layer> {
    // While it is written (containers/storage, `layers.go`: the next writer removes it).
    if row.flags.get("incomplete").is_some_and(|flag| *flag != serde_json::Value::Bool(false)) {
        return Err("it was not written to its end".into());
    }
    let tree = row.tree(root)?;
    let recording = root.join("overlay-layers").join(format!("{}.tar-split.gz", row.id));
    match recording.is_file() {
        true => Ok(Layer { diff_id, parent, files: Files::Split { tree, recording } }),
        false => Err("it has no tar-split".into()),
    }
}

fn read_container(
    root: &Path,
    row: &ContainerRow,
    rows: &BTreeMap<String, LayerRow>,
    chains: &Chains<'_>,
) -> Read<Container> {
    let layer = rows.get(&row.layer).ok_or_else(|| format!("there is no layer {}", row.layer))?;
    if layer.is_shifted() {
        return Err("it has a user namespace of its own, and its files the owners that they have there".into());
    }
    let parent = match layer.parent.as_deref().filter(|parent| !parent.is_empty()) {
        None => None,
        Some(parent) => {
            let known = chains.get(parent).ok_or_else(|| format!("there is no layer {parent}, which it stands on"))?;
            let (chain_id, ..) = known.as_ref().map_err(|why| format!("layer {parent}, which it stands on: {why}"))?;
            Some(*chain_id)
        }
    };
    let description = row.names.join(", ");
    Ok(Container { parent, upper: layer.tree(root)?, init: None, description })
}

/// The file of an image's config. A key that has more in it than lower-case letters, digits and dots becomes `=` and the
/// key in base64 (containers/storage, `store.go`).
fn config_file(id: ImageId) -> String {
    format!("={}", STANDARD.encode(id.to_string()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// What layers.json says of a layer, but for its ID: parent and digest, by their first letters.
    type Said = (Option<usize>, Option<u8>);

    const IDS: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

    fn digest(of: u8) -> String {
        // One of the seven is none.
        if of == 6 { "sha256:none".to_owned() } else { format!("sha256:{:064x}", u32::from(of) + 1) }
    }

    fn layers() -> impl Strategy<Value = Vec<Said>> {
        // The last parent is a layer that is not there.
        prop::collection::vec((prop::option::of(0..=IDS.len()), prop::option::weighted(0.9, 0..7_u8)), 0..=IDS.len())
    }

    fn rows(said: &[Said]) -> Value {
        let parent = |at: usize| IDS.get(at).copied().unwrap_or("nowhere");
        let row = |(id, (from, of)): (&&str, &Said)| json!({ "id": id, "parent": from.map(parent), "diff-digest": of.map(digest) });
        IDS.iter().zip(said).map(row).collect()
    }

    /// The same, found from the definition.
    fn chain_of(said: &[Said], at: usize, depth: usize) -> Option<ChainId> {
        let (parent, of) = said.get(at)?;
        let below = match parent {
            Some(_) if depth > said.len() => return None,
            Some(parent) => Some(chain_of(said, *parent, depth + 1)?),
            None => None,
        };
        Some(ChainId::extend(below, digest((*of)?).parse().ok()?))
    }

    /// A storage whose lists are these bytes.
    fn storage(layers: &[u8], images: &[u8], containers: &[u8]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, bytes) in [
            ("overlay-layers/layers.json", layers),
            ("overlay-images/images.json", images),
            ("overlay-containers/containers.json", containers),
        ] {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        for id in IDS {
            fs::create_dir_all(dir.path().join("overlay").join(id).join("diff")).unwrap();
            fs::write(dir.path().join("overlay-layers").join(format!("{id}.tar-split.gz")), "").unwrap();
        }
        dir
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn chains_are_those_of_the_definition(said in layers()) {
            let rows: Vec<LayerRow> = serde_json::from_value(rows(&said)).unwrap();
            let rows: BTreeMap<String, LayerRow> = rows.into_iter().map(|row| (row.id.clone(), row)).collect();
            let chains = chains(&rows);
            prop_assert_eq!(chains.len(), said.len());
            for (at, id) in IDS.iter().enumerate().take(said.len()) {
                let found = chains[id].as_ref().ok().map(|(chain_id, ..)| *chain_id);
                prop_assert_eq!(found, chain_of(&said, at, 0), "{}", id);
            }
        }

        #[test]
        fn changed_lists_are_read_without_harm(
            said in layers(),
            changes in prop::collection::vec((0..3_usize, any::<prop::sample::Index>(), any::<u8>()), 0..6),
            cut in prop::option::of((0..3_usize, any::<prop::sample::Index>())),
        ) {
            let images = json!([{ "id": "1".repeat(64), "names": ["x:1", "NO NAME"] }, { "id": "2" }]);
            let containers = json!([{ "id": "k", "names": ["k"], "layer": "a" }, { "id": "l", "layer": "nowhere" }]);
            let mut lists = [rows(&said), images, containers].map(|list| list.to_string().into_bytes());
            for (list, at, byte) in changes {
                let at = at.index(lists[list].len());
                lists[list][at] = byte;
            }
            if let Some((list, at)) = cut {
                let at = at.index(lists[list].len());
                lists[list].truncate(at);
            }
            let dir = storage(&lists[0], &lists[1], &lists[2]);
            let mut report = ImportReport::default();
            let source = read(dir.path(), &DocumentLimits::default(), &mut report);
            let root = dir.path().join("overlay");
            let trees = source.layers.values().flatten().map(|layer| match &layer.files {
                Files::Split { tree, .. } => tree,
                Files::Blob { .. } => unreachable!("because there are no blobs"),
            });
            for tree in trees.chain(source.containers.values().flatten().map(|container| &container.upper)) {
                let canonical = tree.canonicalize().unwrap();
                prop_assert!(canonical.starts_with(root.canonicalize().unwrap()), "{}", canonical.display());
            }
        }
    }
}
