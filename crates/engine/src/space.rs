//! `ply du`, `ply tree`, `ply gc`, `ply info`: what there is and what it costs. Sums of rows; nothing here walks a tree.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;

use plies_cache::CacheError;
use plies_image::LayerStoreError;
use plies_oci::ErrorKind;
use plies_store::{
    BlobError, CatalogueError, GcError, GcMode, LayerError, LayerId, Resource, SnapshotError, UsageError, UsageKind,
};
use serde::Serialize;

use crate::Engine;
use crate::images::{ImagesError, chain};
use crate::records::{RecordSummary, RecordsError};
use crate::run::RunError;

/// Records on top of one another that `ply tree` shows; more are left out, with dots.
const TREE_DEPTH_MAX: usize = 1000;

/// Why space could not be accounted for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SpaceError {
    /// Images.
    #[error(transparent)]
    Images(#[from] ImagesError),
    /// Records.
    #[error(transparent)]
    Records(#[from] RecordsError),
    /// What was named.
    #[error(transparent)]
    Target(#[from] RunError),
    /// Totals.
    #[error("add up what is in use")]
    Usage(#[from] UsageError),
    /// Blobs.
    #[error("read blobs")]
    Blobs(#[from] BlobError),
    /// Layers.
    #[error("read layers")]
    Layers(#[from] LayerError),
    /// Snapshots.
    #[error("read snapshots")]
    Snapshots(#[from] SnapshotError),
    /// The layer store.
    #[error(transparent)]
    LayerStore(#[from] LayerStoreError),
    /// Collecting.
    #[error("collect")]
    Gc(#[from] GcError),
    /// The build cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The catalogue failed.
    #[error("read the catalogue")]
    Catalogue(#[from] CatalogueError),
}

impl SpaceError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Images(source) => source.kind(),
            Self::Records(source) => source.kind(),
            Self::Target(source) => source.kind(),
            Self::Usage(source) => source.kind(),
            Self::Blobs(source) => source.kind(),
            Self::Layers(source) => source.kind(),
            Self::Snapshots(source) => source.kind(),
            Self::LayerStore(source) => source.kind(),
            Self::Gc(source) => source.kind(),
            Self::Cache(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
        }
    }
}

/// One line of `ply du`. Every byte is in one line only.
#[derive(Debug, Clone, Serialize)]
pub struct SpaceRow {
    /// `layer`, `blob` or `active`; `image` or `record` for one that is damaged.
    pub kind: &'static str,
    /// Its ID or digest.
    pub id: String,
    /// What it takes on disk.
    pub size_bytes: u64,
    /// How many images and records stand on it. Of a blob nobody counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub users_count: Option<usize>,
    /// One of them.
    pub description: String,
    /// What is wrong with it, if it is damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What `ply du` shows.
#[derive(Debug, Clone, Serialize)]
pub struct SpaceReport {
    /// Layers, blobs and upper directories, the largest first.
    pub rows: Vec<SpaceRow>,
    /// Bytes by kind: all kinds, those without rows included.
    pub totals: BTreeMap<&'static str, u64>,
    /// The sum of the totals.
    pub total_bytes: u64,
}

/// Something that `ply tree` shows, with what it stands on below it.
#[derive(Debug, Clone, Serialize)]
pub struct TreeNode {
    /// What it is.
    pub label: String,
    /// What it takes on disk itself.
    pub size_bytes: Option<u64>,
    /// What it stands on.
    pub children: Vec<TreeNode>,
    /// What is wrong with it, if it is damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl TreeNode {
    /// With what it stands on, or why that is not known.
    fn new(label: String, children: Result<Vec<TreeNode>, SpaceError>) -> Self {
        match children {
            Ok(children) => Self { label, size_bytes: None, children, error: None },
            Err(error) => Self { label, size_bytes: None, children: vec![], error: Some(chain(&error)) },
        }
    }

    /// How many things in it are damaged.
    pub fn damaged_count(&self) -> usize {
        usize::from(self.error.is_some()) + self.children.iter().map(Self::damaged_count).sum::<usize>()
    }
}

/// What was collected, or would be.
#[derive(Debug, Clone, Serialize)]
pub struct GcSummary {
    /// Thing by thing.
    pub removed: Vec<GcRow>,
    /// The bytes of all that went.
    pub total_bytes: u64,
}

/// One thing that was collected.
#[derive(Debug, Clone, Serialize)]
pub struct GcRow {
    /// `blob`, `layer`, `snapshot`, `active` or `ingest`.
    pub kind: &'static str,
    /// Its ID or digest.
    pub id: String,
    /// Its bytes on disk.
    pub size_bytes: u64,
}

/// What `ply info` shows.
#[derive(Debug, Clone, Serialize)]
pub struct Info {
    /// The version of this program.
    pub version: &'static str,
    /// The state directory.
    pub root: String,
    /// How layers are kept and mounted.
    pub driver: &'static str,
    /// How many images there are.
    pub images_count: usize,
    /// How many records the build cache has.
    pub records_count: usize,
    /// How many layers there are.
    pub layers_count: usize,
    /// What everything takes on disk.
    pub total_bytes: u64,
}

impl Info {
    /// All but the bytes as a table.
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        vec![
            ("version", self.version.into()),
            ("root", self.root.clone()),
            ("driver", self.driver.into()),
            ("images", self.images_count.to_string()),
            ("records", self.records_count.to_string()),
            ("layers", self.layers_count.to_string()),
        ]
    }
}

/// A record on what it stands on. One that was shown before stands there without what is below it.
fn record_node<'a>(
    records: &'a HashMap<String, RecordSummary>,
    id: &'a String,
    seen: &mut HashSet<&'a String>,
    depth: usize,
) -> TreeNode {
    let Some(record) = records.get(id) else {
        let error = Some("it is gone".to_owned());
        return TreeNode { label: format!("record {id}"), size_bytes: None, children: vec![], error };
    };
    let again = !seen.insert(id);
    let children = match again || depth == TREE_DEPTH_MAX {
        true => vec![],
        false => record.parents.iter().map(|parent| record_node(records, parent, seen, depth + 1)).collect(),
    };
    let more = if children.is_empty() && !record.parents.is_empty() { " …" } else { "" };
    let label = format!("record {} ({}) {}", &record.id[..12], record.state, record.description);
    TreeNode {
        label: format!("{}{more}", label.trim_end()),
        size_bytes: Some(record.size_bytes),
        children,
        error: record.error.clone(),
    }
}

fn add_layers(users: &mut HashMap<LayerId, (usize, String)>, layers: Vec<LayerId>, name: &str) {
    for layer in layers {
        users.entry(layer).or_insert_with(|| (0, name.to_owned())).0 += 1;
    }
}

fn kind_name(kind: UsageKind) -> &'static str {
    match kind {
        UsageKind::Blobs => "blobs",
        UsageKind::Layers => "layers",
        UsageKind::Actives => "actives",
        UsageKind::Ingests => "ingests",
        UsageKind::Trash => "trash",
        UsageKind::Catalogue => "catalogue",
    }
}

impl Engine {
    /// What everything takes on disk.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn usage(&self) -> Result<SpaceReport, SpaceError> {
        let mut rows = Vec::new();
        let users = self.layer_users(&mut rows)?;
        self.store().layers().scan(|layer| {
            let (count, first) = users.get(&layer.id).cloned().unwrap_or_default();
            let description = if layer.derived { "directories' metadata (fix-up)".into() } else { first };
            rows.push(SpaceRow {
                kind: "layer",
                id: layer.id.to_string(),
                size_bytes: layer.usage.size_bytes,
                users_count: Some(count),
                description,
                error: None,
            });
            ControlFlow::Continue(())
        })?;
        let mut blobs = Vec::new();
        self.store().content().scan(|digest, info| {
            blobs.push((digest, info.size_bytes));
            ControlFlow::Continue(())
        })?;
        for (digest, size_bytes) in blobs {
            let of = self.store().read(|rows| plies_store::transfer::diff_id_of_blob(rows, digest));
            let (description, error) = match of {
                Ok(Some(diff_id)) => (format!("layer {diff_id}"), None),
                Ok(None) => ("document".into(), None),
                Err(error) => (String::new(), Some(chain(&error))),
            };
            rows.push(SpaceRow {
                kind: "blob",
                id: digest.to_string(),
                size_bytes,
                users_count: None,
                description,
                error,
            });
        }
        let mut actives = Vec::new();
        self.store().snapshots().scan_actives(|info| {
            actives.push(info);
            ControlFlow::Continue(())
        })?;
        let records = self.records()?;
        let writable = self.layer_store()?.list_rw()?;
        // Before the totals are read, which are of what was measured last.
        for info in actives {
            let active = info.id.to_string();
            let users: Vec<_> = records.iter().filter(|record| record.active.as_ref() == Some(&active)).collect();
            let named = writable.iter().find(|rw| rw.active == info.id);
            rows.push(SpaceRow {
                kind: "active",
                id: info.id.to_string(),
                size_bytes: self.active_bytes(&info),
                users_count: Some(users.len() + usize::from(named.is_some())),
                description: match (users.first(), named) {
                    (Some(record), _) => {
                        format!("record {} {}", &record.id[..12], record.description).trim_end().to_owned()
                    }
                    (None, Some(rw)) => format!("writable layer {}", rw.name),
                    (None, None) => String::new(),
                },
                error: None,
            });
        }
        rows.sort_by(|a, b| b.size_bytes.cmp(&a.size_bytes).then_with(|| a.id.cmp(&b.id)));
        let totals: BTreeMap<_, _> =
            self.store().usage()?.into_iter().map(|row| (kind_name(row.kind), row.size_bytes)).collect();
        let total_bytes = totals.values().sum();
        Ok(SpaceReport { rows, totals, total_bytes })
    }

    /// For each layer, how many images and records stand on it, and the name of one. What is damaged gets a row.
    fn layer_users(&self, rows: &mut Vec<SpaceRow>) -> Result<HashMap<LayerId, (usize, String)>, SpaceError> {
        let mut users: HashMap<LayerId, (usize, String)> = HashMap::new();
        for image in self.store().read(plies_image::list)? {
            let name = image.names.first().map_or_else(|| image.id.to_string(), |name| crate::familiar(name));
            let Some(snapshot) = image.row.snapshot else { continue };
            match self.store().snapshots().info(snapshot) {
                Ok(info) => add_layers(&mut users, info.layers, &name),
                Err(error) => rows.push(SpaceRow {
                    kind: "image",
                    id: image.id.to_string(),
                    size_bytes: 0,
                    users_count: None,
                    description: name,
                    error: Some(chain(&error)),
                }),
            }
        }
        let mut records = Vec::new();
        self.cache().scan(|id, row, _| {
            records.push((id, row));
            ControlFlow::Continue(())
        })?;
        for (id, row) in records {
            let known = row.and_then(|row| Ok((self.cache().known_layers(id)?, row.description)));
            match known {
                Ok((layers, name)) => add_layers(&mut users, layers, &name),
                Err(error) => rows.push(SpaceRow {
                    kind: "record",
                    id: id.to_string(),
                    size_bytes: 0,
                    users_count: None,
                    description: String::new(),
                    error: Some(chain(&error)),
                }),
            }
        }
        // What an image or a record stands on is theirs, whoever has registered it as well.
        for info in self.layer_store()?.list()? {
            let name = || format!("registered layer {}", &info.chain_id.hex()[..12]);
            users.entry(info.layer).or_insert_with(|| (1, name()));
        }
        Ok(users)
    }

    /// What stands on what: all images and records, or one of them. What is damaged is shown with its error.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn tree(&self, wanted: Option<&str>) -> Result<Vec<TreeNode>, SpaceError> {
        if let Some(wanted) = wanted {
            if let Ok(found) = self.find_image(wanted) {
                let children = found.row.snapshot.map_or(Ok(vec![]), |snapshot| self.layer_nodes(snapshot));
                return Ok(vec![TreeNode::new(wanted.to_owned(), children)]);
            }
            let id = match self.cache().find(wanted) {
                Ok(id) => id.to_string(),
                Err(CacheError::NotFound { .. }) => return Err(RunError::NotFound { wanted: wanted.to_owned() }.into()),
                Err(other) => return Err(other.into()),
            };
            return Ok(vec![record_node(&self.records_by_id()?, &id, &mut HashSet::new(), 0)]);
        }
        let mut nodes = Vec::new();
        for image in self.store().read(plies_image::list)? {
            let names: Vec<String> = image.names.iter().map(|name| crate::familiar(name)).collect();
            let name = if names.is_empty() { "<none>".to_owned() } else { names.join(", ") };
            let children = image.row.snapshot.map_or(Ok(vec![]), |snapshot| self.layer_nodes(snapshot));
            nodes.push(TreeNode::new(format!("image {name} {}", &image.id.hex()[..12]), children));
        }
        let records = self.records_by_id()?;
        let below: HashSet<&String> = records.values().flat_map(|record| &record.parents).collect();
        let mut tops: Vec<&RecordSummary> = records.values().filter(|record| !below.contains(&record.id)).collect();
        tops.sort_by(|a, b| (&a.created, &a.id).cmp(&(&b.created, &b.id)));
        let mut seen = HashSet::new();
        nodes.extend(tops.into_iter().map(|record| record_node(&records, &record.id, &mut seen, 0)));
        Ok(nodes)
    }

    fn records_by_id(&self) -> Result<HashMap<String, RecordSummary>, SpaceError> {
        Ok(self.records()?.into_iter().map(|record| (record.id.clone(), record)).collect())
    }

    /// The layers of a snapshot, the topmost first.
    fn layer_nodes(&self, snapshot: plies_store::SnapshotId) -> Result<Vec<TreeNode>, SpaceError> {
        let info = self.store().snapshots().info(snapshot)?;
        let mut nodes = Vec::new();
        for layer in info.fixup.into_iter().chain(info.layers.into_iter().rev()) {
            let info = match self.store().layers().info(layer) {
                Ok(info) => info,
                Err(error) => {
                    nodes.push(TreeNode::new(format!("layer {layer}"), Err(error.into())));
                    continue;
                }
            };
            let what = match info.diff_id {
                Some(diff_id) => diff_id.to_string(),
                None if info.derived => "fix-up".into(),
                None => "no diff ID yet".into(),
            };
            let node = TreeNode::new(format!("layer {layer} {what}"), Ok(vec![]));
            nodes.push(TreeNode { size_bytes: Some(info.usage.size_bytes), ..node });
        }
        Ok(nodes)
    }

    /// Removes what nothing holds, or says what it would remove.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn gc(&self, dry_run: bool) -> Result<GcSummary, SpaceError> {
        self.forget_dead_mounts()?;
        // References of processes that were killed end here.
        self.layer_store()?;
        let report = self.store().gc(if dry_run { GcMode::DryRun } else { GcMode::Run })?;
        let collected = report.collected.into_iter().map(|one| {
            let (kind, id) = match one.resource {
                Resource::Blob(digest) => ("blob", digest.to_string()),
                Resource::Layer(id) => ("layer", id.to_string()),
                Resource::Snapshot(id) => ("snapshot", id.to_string()),
                Resource::Active(id) => ("active", id.to_string()),
            };
            GcRow { kind, id, size_bytes: one.size_bytes }
        });
        let ingests = report.ingests.into_iter().map(|ingest| GcRow {
            kind: "ingest",
            id: ingest.ingest.to_string(),
            size_bytes: ingest.offset_bytes,
        });
        let removed: Vec<GcRow> = collected.chain(ingests).collect();
        let total_bytes = removed.iter().map(|row| row.size_bytes).sum();
        Ok(GcSummary { removed, total_bytes })
    }

    /// What this store is.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn info(&self) -> Result<Info, SpaceError> {
        let usage = self.store().usage()?;
        let layers = usage.iter().find(|row| row.kind == UsageKind::Layers).map_or(0, |row| row.count);
        Ok(Info {
            version: env!("CARGO_PKG_VERSION"),
            root: self.store().root().display().to_string(),
            driver: self.store().driver(),
            images_count: self.store().read(plies_image::list)?.len(),
            records_count: self.cache().count()?,
            layers_count: usize::try_from(layers).unwrap_or(usize::MAX),
            total_bytes: usage.iter().map(|row| row.size_bytes).sum(),
        })
    }
}
