//! A Docker data root whose images are in the classic image store, on the overlay2 driver.
//!
//! ```text
//! <root>/image/overlay2/layerdb/sha256/<chain>/   diff  parent  cache-id  tar-split.json.gz
//!                       layerdb/mounts/<container>/   mount-id  init-id  parent
//!                       imagedb/content/sha256/<image>     its config
//!                       imagedb/metadata/sha256/<image>/   parent  builtLocally
//!                       repositories.json                  names
//! <root>/overlay2/<cache-id, mount-id or init-id>/diff     files, with overlayfs' marks
//! <root>/containers/<container>/config.v2.json             what people call it
//! ```
//!
//! A name with a digest stays there: Docker does not keep the manifest that it names.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use plies_oci::{ChainId, DiffId, DocumentLimits, ImageId, Reference};
use serde::Deserialize;

use crate::images::{self, Container, Containers, Files, Image, Layer, Name, Read, Source, entries, read_bytes, tell};
use crate::{Import, ImportError, ImportReport, Outcome, chain};

const WANTED: &str = "data root of Docker with the overlay2 driver: there is no image/overlay2/layerdb in it";
/// Docker's own files of one ID or number are shorter by far.
const TEXT_BYTES_MAX: u64 = 4096;
/// Names of all images: 100,000 of 200 bytes, twice.
const REPOSITORIES_BYTES_MAX: u64 = 64 << 20;
/// As of an image: most of a container's is the same.
const CONTAINER_BYTES_MAX: u64 = 8 << 20;
/// Docker calls a layer so while it removes it.
const REMOVING: &str = "-removing";

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct Repositories {
    repositories: BTreeMap<String, BTreeMap<String, String>>,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct ContainerConfig {
    name: String,
}

/// Takes over what can be taken of the data root at `path`.
///
/// # Errors
/// [`ImportError::NotOne`]; [`ImportError::OtherFileSystem`]; what the store says. What of the source cannot be read is in
/// the report instead.
pub fn import(import: &Import<'_>, path: &Path, containers: Containers) -> Result<ImportReport, ImportError> {
    let mut report = ImportReport { dry_run: import.options.dry_run, ..ImportReport::default() };
    if !path.join("image/overlay2/layerdb").is_dir() {
        return Err(ImportError::NotOne { path: path.to_owned(), wanted: WANTED });
    }
    import.check_file_system(&path.join("overlay2"))?;
    report.sources.push(path.to_owned());
    let source = read(path, import.documents, &mut report);
    images::take(import, &source, containers, report)
}

/// A short text; `None` if the file is not there.
fn read_text(path: &Path) -> Read<Option<String>> {
    if fs::symlink_metadata(path).is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        return Ok(None);
    }
    let bytes = read_bytes(path, TEXT_BYTES_MAX)?;
    let text = String::from_utf8(bytes).map_err(|_| format!("{} is no text", path.display()))?;
    Ok(Some(text.trim().to_owned()))
}

fn read_id<T: std::str::FromStr>(path: &Path) -> Read<Option<T>> {
    let parse = |text: String| text.parse().map_err(|_| format!("{} has no digest: {text:?}", path.display()));
    read_text(path)?.filter(|text| !text.is_empty()).map(parse).transpose()
}

/// The `diff` of a directory of the driver; its name comes from a file, so it is not any path (moby, `layer/filestore.go`).
fn tree_of(root: &Path, from: &Path) -> Read<Option<PathBuf>> {
    let Some(id) = read_text(from)? else { return Ok(None) };
    let digits = id.strip_suffix("-init").unwrap_or(&id);
    if digits.len() != 64 || !digits.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(format!("{} has no ID: {id:?}", from.display()));
    }
    let tree = root.join("overlay2").join(&id).join("diff");
    match tree.is_dir() {
        true => Ok(Some(tree)),
        false => Err(format!("its files are gone: no directory {}", tree.display())),
    }
}

fn read(root: &Path, limits: &DocumentLimits, report: &mut ImportReport) -> Source {
    let image = root.join("image/overlay2");
    let mut source = Source::default();
    for (name, dir) in entries(&image.join("layerdb/sha256"), report) {
        match ChainId::from_hex(&name) {
            Ok(chain_id) => drop(source.layers.insert(chain_id, read_layer(root, &dir, chain_id))),
            Err(_) if name.ends_with(REMOVING) => {
                tell(report, "layer", &name, Outcome::Left, None, 0, Some("Docker was removing it".into()));
            }
            Err(_) => report.problem("layer", name, "its name is no chain ID"),
        }
    }
    for (name, path) in entries(&image.join("imagedb/content/sha256"), report) {
        match ImageId::from_hex(&name) {
            Ok(id) => {
                let metadata = image.join("imagedb/metadata/sha256").join(&name);
                source.images.insert(id, read_image(id, &path, &metadata, limits));
            }
            Err(_) => report.problem("image", name, "its name is no image ID"),
        }
    }
    let path = image.join("repositories.json");
    let parse = |raw: Vec<u8>| serde_json::from_slice(&raw).map_err(|error| chain(&error));
    let names: Repositories = match path.exists() {
        false => Repositories::default(),
        true => read_bytes(&path, REPOSITORIES_BYTES_MAX).and_then(parse).unwrap_or_else(|why| {
            report.problem("file", path.display().to_string(), why);
            Repositories::default()
        }),
    };
    for (name, id) in names.repositories.into_values().flatten() {
        let reference = name.parse::<Reference>().map_err(|error| chain(&error));
        if reference.as_ref().is_ok_and(|reference| reference.digest().is_some()) {
            let why = "Docker does not keep the manifest that it names";
            tell(report, "name", name, Outcome::Left, None, 0, Some(why.into()));
            continue;
        }
        let id = id.parse::<ImageId>().map_err(|error| chain(&error));
        source.names.push((name, reference.and_then(|reference| Ok(Name::of(reference, id?)))));
    }
    let is_shifted = is_shifted(root);
    for (name, dir) in entries(&image.join("layerdb/mounts"), report) {
        if is_shifted {
            let why = "Docker shifted the owners of its files (userns-remap), and does not say there by how much";
            tell(report, "container", name, Outcome::Left, None, 0, Some(why.into()));
            continue;
        }
        let container = read_container(root, &name, &dir);
        source.containers.insert(name, container);
    }
    source
}

/// Whether containers ran in a user namespace, so that files have other owners than they say: then the driver's directory has the
/// group that root is there (moby, `daemon/graphdriver/overlay2`).
fn is_shifted(root: &Path) -> bool {
    fs::metadata(root.join("overlay2")).is_ok_and(|meta| meta.gid() != 0)
}

fn read_layer(root: &Path, dir: &Path, chain_id: ChainId) -> Read<Layer> {
    let diff_id: DiffId = read_id(&dir.join("diff"))?.ok_or("it has no diff ID")?;
    let parent = read_id(&dir.join("parent"))?;
    if ChainId::extend(parent, diff_id) != chain_id {
        return Err("its diff ID and its parent do not make its chain ID".into());
    }
    let tree = tree_of(root, &dir.join("cache-id"))?.ok_or("it does not say where its files are")?;
    let recording = dir.join("tar-split.json.gz");
    match recording.is_file() {
        true => Ok(Layer { diff_id, parent, files: Files::Split { tree, recording } }),
        false => Err("it has no tar-split".into()),
    }
}

fn read_image(id: ImageId, path: &Path, metadata: &Path, limits: &DocumentLimits) -> Read<Image> {
    let mut image = Image::read(id, path, limits)?;
    image.parent = read_id(&metadata.join("parent"))?;
    image.built_here = metadata.join("builtLocally").exists();
    Ok(image)
}

fn read_container(root: &Path, name: &str, dir: &Path) -> Read<Container> {
    let parent = read_id(&dir.join("parent"))?;
    let upper = tree_of(root, &dir.join("mount-id"))?.ok_or("it does not say where its files are")?;
    let init = tree_of(root, &dir.join("init-id"))?;
    // Only what people call it: it does without.
    let config = read_bytes(&root.join("containers").join(name).join("config.v2.json"), CONTAINER_BYTES_MAX);
    let config = config.ok().and_then(|raw| serde_json::from_slice::<ContainerConfig>(&raw).ok()).unwrap_or_default();
    Ok(Container { parent, upper, init, description: config.name.trim_start_matches('/').to_owned() })
}
