//! containerd's root directory: images of all namespaces, with their blobs and what the overlayfs snapshotter unpacked of them.
//!
//! ```text
//! databases.rs   its two databases, which BuildKit has too: what the names in them stand for
//!
//! <root>/io.containerd.metadata.v1.bolt/meta.db                    what its clients see, by namespace
//!        io.containerd.content.v1.content/blobs/sha256/<hex>       manifests, configs, packed layers
//!        io.containerd.snapshotter.v1.overlayfs/metadata.db        snapshots by name
//!                                               snapshots/<id>/fs  files, with overlayfs' marks
//! ```
//!
//! An image comes with its manifest and its blobs, so it goes out again as it came in; of an index, the image for this machine.
//! A layer's files are those of the committed snapshot of its chain, if it is there and the blob lists the same; else the
//! blob is unpacked. A layer without its blob cannot be had: nothing else says whose bytes a snapshot holds.
//!
//! Namespaces come in order, and a name that several have is that of the first. containerd must not run.

mod databases;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use plies_bolt::{Bolt, BoltError};
use plies_oci::{
    BlobDigest, ChainId, DocumentLimits, ImageId, Index, Manifest, MediaClass, MediaType, Platform, Reference, classify,
};

#[cfg(test)]
pub(crate) use self::databases::BlobInfo;
use self::databases::{Clients, ContainerInfo};
pub(crate) use self::databases::{Namespace, SnapshotInfo, SnapshotKind, Target};
use crate::images::{self, Container, Containers, Files, Image, Layer, Name, Read, Source, read_bytes, tell};
use crate::take::WantedBlob;
use crate::{Import, ImportError, ImportReport, Outcome, chain};

const WANTED: &str = "root directory of containerd: there is no io.containerd.metadata.v1.bolt/meta.db in it";
const META: &str = "io.containerd.metadata.v1.bolt/meta.db";
const CONTENT: &str = "io.containerd.content.v1.content/blobs/sha256";
const SNAPSHOTTER_DIR: &str = "io.containerd.snapshotter.v1.overlayfs";
const SNAPSHOTTER: &str = "overlayfs";
/// How CRI calls images beside their names: by the IDs that they have here as well.
const ID_PREFIX: &str = "sha256:";
/// How dockerd calls images that have no name.
const DANGLING_PREFIX: &str = "moby-dangling@";

/// What of containerd's state is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerdOptions {
    /// Namespaces, in the order in which they come; none: all of them.
    pub namespaces: Vec<String>,
    /// What becomes of writable layers.
    pub containers: Containers,
}

/// Takes over what can be taken of containerd's root directory at `path`.
///
/// # Errors
/// [`ImportError::NotOne`]; [`ImportError::Bolt`] if containerd is running, or nothing of its metadata can be read;
/// [`ImportError::OtherFileSystem`]; what the store says. What else of the source cannot be read is in the report instead.
pub fn import(import: &Import<'_>, path: &Path, options: &ContainerdOptions) -> Result<ImportReport, ImportError> {
    let mut report = ImportReport { dry_run: import.options.dry_run, ..ImportReport::default() };
    let (meta_path, dir) = (path.join(META), path.join(SNAPSHOTTER_DIR));
    if !meta_path.is_file() {
        return Err(ImportError::NotOne { path: path.to_owned(), wanted: WANTED });
    }
    if dir.is_dir() {
        import.check_file_system(&dir)?;
    }
    report.sources.push(path.to_owned());
    let mut problem = |path: &Path, error: &BoltError| {
        report.problem("database", path.display().to_string(), chain(error));
    };
    // Both stay open, and so locked, until all is done.
    let meta = Bolt::open(&meta_path)?;
    let own_path = dir.join("metadata.db");
    let own = match own_path.exists().then(|| Bolt::open(&own_path)).transpose() {
        Err(error @ BoltError::InUse { .. }) => return Err(error.into()),
        opened => opened.inspect_err(|error| problem(&own_path, error)).ok().flatten(),
    };
    let (there, failed) = databases::namespaces(&meta);
    failed.iter().for_each(|error| problem(&meta_path, error));
    let namespaces = if options.namespaces.is_empty() { &there } else { &options.namespaces };
    let mut reading = Reading::new(path.join(CONTENT), import.documents, report);
    for name in namespaces {
        if !there.contains(name) {
            reading.report.problem("namespace", name, "there is none of this name");
            continue;
        }
        let (rows, failed) = Namespace::read_of(&meta, own.as_ref(), name, Some(SNAPSHOTTER), &dir);
        let (clients, more) = Clients::read(&meta, name);
        for error in failed.into_iter().chain(more) {
            reading.report.problem("database", format!("{} ({name})", meta_path.display()), chain(&error));
        }
        let namespace = NamespaceReading::new(name, &rows);
        reading.read(namespace, &clients);
    }
    images::take(import, &reading.source, options.containers, reading.report)
}

/// What a name stands for on this machine.
pub(crate) enum Found {
    Image(Box<Manifest>),
    /// Nothing that is of use here.
    Left(String),
}

pub(crate) struct Reading<'a> {
    content: PathBuf,
    pub(crate) limits: &'a DocumentLimits,
    pub(crate) source: Source,
    pub(crate) report: ImportReport,
}

/// A namespace, and what of it somebody needs.
pub(crate) struct NamespaceReading<'a> {
    name: &'a str,
    rows: &'a Namespace,
    blobs: BTreeSet<BlobDigest>,
    snapshots: BTreeSet<String>,
}

impl<'a> Reading<'a> {
    /// Of blobs in the directory `content`.
    pub(crate) fn new(content: PathBuf, limits: &'a DocumentLimits, report: ImportReport) -> Self {
        Self { content, limits, source: Source::default(), report }
    }

    fn read(&mut self, mut namespace: NamespaceReading<'_>, clients: &Clients) {
        for (name, target) in &clients.images {
            if let Err((outcome, why)) = self.image(name, target.as_ref(), &mut namespace) {
                self.tell("image", name, outcome, &why, &namespace);
            }
        }
        for (id, row) in &clients.containers {
            let left = if row.snapshot.is_empty() {
                "it has no snapshot".to_owned()
            } else if row.snapshotter != SNAPSHOTTER {
                format!("its files are kept by the snapshotter {:?}", row.snapshotter)
            } else if self.source.containers.contains_key(id) {
                "a container of another namespace has its ID".to_owned()
            } else {
                self.source.containers.insert(id.clone(), namespace.container(row));
                continue;
            };
            self.tell("container", id, Outcome::Left, &left, &namespace);
        }
        self.tell_unused(&namespace);
    }

    fn tell(
        &mut self,
        kind: &'static str,
        name: impl ToString,
        outcome: Outcome,
        why: &str,
        namespace: &NamespaceReading<'_>,
    ) {
        tell(&mut self.report, kind, name, outcome, None, 0, Some(why.to_owned()));
        if let Some(item) = self.report.items.last_mut() {
            item.description = namespace.description();
        }
    }

    /// Adds what a name stands for, or says what becomes of it instead.
    fn image(
        &mut self,
        name: &str,
        target: Option<&Target>,
        namespace: &mut NamespaceReading<'_>,
    ) -> Result<(), (Outcome, String)> {
        let failed = |why: String| (Outcome::Failed, why);
        let target = target.ok_or_else(|| failed("it does not say what it stands for".to_owned()))?;
        let manifest = match self.resolve(target, namespace, 0).map_err(failed)? {
            Found::Image(manifest) => manifest,
            Found::Left(why) => return Err((Outcome::Left, why)),
        };
        let (image, digest) = self.add_image(*manifest, namespace).map_err(failed)?;
        let left = if name.starts_with(ID_PREFIX) {
            "it is an ID, by which the image is known here as well"
        } else if name.starts_with(DANGLING_PREFIX) {
            "it stands for having no name"
        } else {
            let reference = name.parse::<Reference>().map_err(|error| chain(&error));
            let read = reference.and_then(|reference| match reference.digest() {
                Some(digest) if digest != target.digest => Err(format!("it stands for {}", target.digest)),
                _ => Ok(Name { reference, image, manifest: Some(digest), description: namespace.description() }),
            });
            self.source.names.push((name.to_owned(), read));
            return Ok(());
        };
        self.tell("name", name, Outcome::Left, left, namespace);
        Ok(())
    }

    fn path_of(&self, digest: BlobDigest) -> PathBuf {
        self.content.join(digest.hex())
    }

    /// A document's bytes, which have the digest that they are called by.
    fn document(&self, digest: BlobDigest) -> Read<Vec<u8>> {
        let raw = read_bytes(&self.path_of(digest), self.limits.manifest_bytes)?;
        match BlobDigest::of(&raw) {
            actual if actual == digest => Ok(raw),
            actual => Err(format!("blob {digest} has other bytes: they give {actual}")),
        }
    }

    /// Follows indexes down to the manifest for this machine.
    pub(crate) fn resolve(&self, target: &Target, namespace: &mut NamespaceReading<'_>, depth: u64) -> Read<Found> {
        namespace.blobs.insert(target.digest);
        match classify(&MediaType::from(target.media_type.as_str())) {
            Some(MediaClass::Manifest) => {
                let manifest = Manifest::parse(&self.document(target.digest)?).map_err(|error| chain(&error))?;
                Ok(Found::Image(Box::new(manifest)))
            }
            Some(MediaClass::Index) if depth < self.limits.index_depth => {
                let index = Index::parse(&self.document(target.digest)?).map_err(|error| chain(&error))?;
                let wanted = Platform::host();
                let all = index.manifests();
                let exact = all.iter().find(|one| one.platform.as_ref() == Some(&wanted));
                let serves = || all.iter().find(|one| one.platform.as_ref().is_none_or(|there| there.serves(&wanted)));
                let Some(chosen) = exact.or_else(serves) else {
                    return Ok(Found::Left(format!("it has no image for {wanted}")));
                };
                // An index comes whole, and of its images those that somebody asked for.
                if !self.path_of(chosen.digest).exists() {
                    return Ok(Found::Left(format!("its image for {wanted} was not fetched")));
                }
                let target = Target { digest: chosen.digest, media_type: chosen.media_type.to_string() };
                self.resolve(&target, namespace, depth + 1)
            }
            Some(MediaClass::Index) => Err(format!("indexes are nested more than {} deep", self.limits.index_depth)),
            _ => Ok(Found::Left(format!("it is no image, but {:?}", target.media_type))),
        }
    }

    /// Adds an image with its layers; its ID, and its manifest's digest.
    pub(crate) fn add_image(
        &mut self,
        manifest: Manifest,
        namespace: &mut NamespaceReading<'_>,
    ) -> Read<(ImageId, BlobDigest)> {
        let (config, digest) = (manifest.config().digest, manifest.document().digest());
        namespace.blobs.insert(config);
        namespace.blobs.extend(manifest.layers().iter().map(|layer| layer.digest));
        let id = ImageId::from_bytes(*config.as_bytes());
        let image = Image::read(id, &self.path_of(config), self.limits)?;
        if image.diff_ids.len() != manifest.layers().len() {
            let (layers, diff_ids) = (manifest.layers().len(), image.diff_ids.len());
            return Err(format!("it has {layers} layers but {diff_ids} diff IDs"));
        }
        let mut parent = None;
        let mut blobs = Vec::new();
        for (layer, diff_id) in manifest.layers().iter().zip(&image.diff_ids) {
            let chain_id = ChainId::extend(parent, *diff_id);
            let blob = WantedBlob { digest: layer.digest, diff_id: *diff_id, path: self.path_of(layer.digest) };
            let tree = namespace.tree(chain_id);
            let found = match blob.path.is_file() {
                true => Ok(Layer { diff_id: *diff_id, parent, files: Files::Blob { blob: blob.clone(), tree } }),
                false => Err(format!("its blob {} is not there, and nothing else says what it is", layer.digest)),
            };
            self.add_layer(chain_id, found);
            blobs.push(blob);
            parent = Some(chain_id);
        }
        // Another name may stand for it, under this manifest or another one.
        if !matches!(self.source.images.get(&id), Some(Ok(_))) {
            self.source.images.insert(id, Ok(image));
        }
        if let Some(Ok(image)) = self.source.images.get_mut(&id)
            && image.manifests.iter().all(|(known, _)| *known != manifest)
        {
            image.manifests.push((manifest, blobs));
        }
        Ok((id, digest))
    }

    /// Adds a layer, or what another image or namespace has more of it: its blob, its files.
    fn add_layer(&mut self, chain_id: ChainId, found: Read<Layer>) {
        let has = |layer: &Read<Layer>| match layer.as_ref().map(|layer| &layer.files) {
            Err(_) => 0,
            Ok(Files::Blob { tree: None, .. }) => 1,
            Ok(Files::Blob { tree: Some(_), .. } | Files::Split { .. }) => 2,
        };
        if self.source.layers.get(&chain_id).is_none_or(|known| has(known) < has(&found)) {
            self.source.layers.insert(chain_id, found);
        }
    }

    fn tell_unused(&mut self, namespace: &NamespaceReading<'_>) {
        let snapshots: BTreeMap<_, _> =
            namespace.rows.snapshots.iter().filter(|(key, _)| !namespace.snapshots.contains(*key)).collect();
        for (key, snapshot) in snapshots {
            let why = match snapshot.kind {
                SnapshotKind::View => "it is a look at another one",
                SnapshotKind::Active => "no container has it",
                SnapshotKind::Committed => "no image needs it",
            };
            self.tell("snapshot", key, Outcome::Left, why, namespace);
        }
        let blobs: BTreeSet<_> =
            namespace.rows.blobs.keys().filter(|digest| !namespace.blobs.contains(digest)).collect();
        for digest in blobs {
            self.tell("blob", digest, Outcome::Left, "no image needs it", namespace);
        }
    }
}

impl<'a> NamespaceReading<'a> {
    pub(crate) fn new(name: &'a str, rows: &'a Namespace) -> Self {
        Self { name, rows, blobs: BTreeSet::new(), snapshots: BTreeSet::new() }
    }

    fn description(&self) -> String {
        format!("namespace {}", self.name)
    }

    /// The files that the top layer of a chain was unpacked to.
    fn tree(&mut self, chain_id: ChainId) -> Option<PathBuf> {
        let key = chain_id.to_string();
        let snapshot = self.rows.snapshots.get(&key).filter(|snapshot| snapshot.kind == SnapshotKind::Committed)?;
        self.snapshots.insert(key);
        snapshot.dir.is_dir().then(|| snapshot.dir.clone())
    }

    fn container(&mut self, row: &ContainerInfo) -> Read<Container> {
        let mut snapshot = |key: &str| {
            self.snapshots.insert(key.to_owned());
            self.rows.snapshots.get(key).ok_or_else(|| format!("there is no snapshot {key:?}"))
        };
        let upper = snapshot(&row.snapshot)?;
        if upper.kind != SnapshotKind::Active {
            return Err(format!("its snapshot {:?} is no writable one", row.snapshot));
        }
        let mut parent = upper.parent.as_deref();
        let mut init = None;
        // dockerd puts a snapshot in between, with what it mounts on.
        if let Some(key) = parent.filter(|key| key.parse::<ChainId>().is_err()) {
            let between = snapshot(key)?;
            init = Some(between.dir.clone());
            parent = between.parent.as_deref();
        }
        let parent = parent.map(|key| {
            key.parse::<ChainId>().map_err(|_| format!("it stands on the snapshot {key:?}, which is no layer"))
        });
        let (parent, upper) = (parent.transpose()?, upper.dir.clone());
        let description = format!("{}, image {}", self.description(), row.image);
        match upper.is_dir() {
            true => Ok(Container { parent, upper, init, description }),
            false => Err(format!("its files are gone: no directory {}", upper.display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use plies_testkit::bolt::{self, Node, Tree};
    use proptest::prelude::*;

    use super::*;

    fn bucket<const N: usize>(rows: [(&str, Node); N]) -> Node {
        Node::Bucket(rows.into_iter().map(|(key, node)| (key.as_bytes().to_vec(), node)).collect())
    }

    fn value(text: &str) -> Node {
        Node::Value(text.as_bytes().to_vec())
    }

    /// The metadata of one namespace: two images, a container, snapshots and a blob; and the snapshotter's own.
    fn databases() -> [Tree; 2] {
        let digest = format!("sha256:{}", "1".repeat(64));
        let target =
            || bucket([("digest", value(&digest)), ("mediatype", value("application/vnd.oci.image.index.v1+json"))]);
        let image = || bucket([("target", target())]);
        let snapshot = |name: &str, parent: &str| bucket([("name", value(name)), ("parent", value(parent))]);
        let namespace = bucket([
            ("images", bucket([("example.com/x:1", image()), ("sha256:2", image()), ("without", bucket([]))])),
            (
                "containers",
                bucket([("box", bucket([("snapshotKey", value("box")), ("snapshotter", value("overlayfs"))]))]),
            ),
            (
                "snapshots",
                bucket([(
                    "overlayfs",
                    bucket([("box", snapshot("n/1/box", &digest)), (&*digest, snapshot("n/2/x", ""))]),
                )]),
            ),
            ("content", bucket([("blob", bucket([(&*digest, bucket([("labels", bucket([]))]))]))])),
        ]);
        let own = |id: u8, kind: u8| bucket([("id", Node::Value(vec![id])), ("kind", Node::Value(vec![kind]))]);
        let own = bucket([("snapshots", bucket([("n/1/box", own(1, 2)), ("n/2/x", own(2, 3))]))]);
        let file = |inner: Node| Tree::from([(b"v1".to_vec(), inner)]);
        [file(bucket([("default", namespace)])), file(own)]
    }

    /// What is read of databases of these bytes, if they are any.
    fn read(meta: &[u8], own: &[u8]) -> Option<(Source, ImportReport)> {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("meta"), meta).unwrap();
        fs::write(at("own"), own).unwrap();
        let (meta, own) = (Bolt::open(&at("meta")).ok()?, Bolt::open(&at("own")).ok());
        let limits = DocumentLimits::default();
        let mut reading = Reading::new(at("blobs"), &limits, ImportReport::default());
        for name in databases::namespaces(&meta).0 {
            let (rows, _) = Namespace::read_of(&meta, own.as_ref(), &name, Some(SNAPSHOTTER), dir.path());
            let (clients, _) = Clients::read(&meta, &name);
            reading.read(NamespaceReading::new(&name, &rows), &clients);
        }
        Some((reading.source, reading.report))
    }

    #[test]
    fn what_stands_for_nothing_is_named() {
        let [meta, own] = databases().map(|tree| bolt::file(&tree, 4096, 4));
        let (source, report) = read(&meta, &own).unwrap();
        let failed: Vec<&str> =
            report.items.iter().filter(|item| item.outcome == Outcome::Failed).map(|item| &*item.name).collect();
        assert_eq!(failed, ["example.com/x:1", "sha256:2", "without"], "{report:#?}");
        assert!(source.containers["box"].as_ref().is_err_and(|why| why.contains("are gone")), "{source:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn changed_databases_are_read_without_harm(
            changes in prop::collection::vec((any::<bool>(), any::<prop::sample::Index>(), any::<u8>()), 1..12),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let mut files = databases().map(|tree| bolt::file(&tree, 512, 2));
            for (own, at, byte) in changes {
                let file = &mut files[usize::from(own)];
                // Behind the meta pages, whose checksums would tell.
                let at = 1024 + at.index(file.len() - 1024);
                file[at] = byte;
            }
            if let Some(at) = cut {
                let at = 1024 + at.index(files[0].len() - 1024);
                files[0].truncate(at);
            }
            read(&files[0], &files[1]);
        }
    }
}
