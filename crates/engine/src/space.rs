//! `ply du`, `ply tree`, `ply gc`, `ply info`: what there is and what it costs. Sums of rows; nothing here walks a tree
//! but uppers that were mounted for writing since they were last measured.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;

use plies_cache::{CacheError, PruneOptions, RecordUsage, UsageOptions};
use plies_image::LayerStoreError;
use plies_oci::ErrorKind;
use plies_store::{
    ActiveInfo, BlobError, CatalogueError, FileError, GcError, GcMode, LayerError, LayerId, Resource, SnapshotError,
    UsageError, UsageKind,
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
    /// Ingests.
    #[error("read ingests")]
    Ingests(#[from] FileError),
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
            Self::Ingests(source) => source.kind(),
            Self::Layers(source) => source.kind(),
            Self::Snapshots(source) => source.kind(),
            Self::LayerStore(source) => source.kind(),
            Self::Gc(source) => source.kind(),
            Self::Cache(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
        }
    }
}

/// What is neither image nor record, as a line of `ply du -v`. Every byte is in one line only.
#[derive(Debug, Clone, Serialize)]
pub struct SpaceRow {
    /// `layer`, `blob`, `active`, `ingest` or `orphan`; `image` or `record` for one that is damaged.
    pub kind: &'static str,
    /// Its ID or digest; of an orphan its path.
    pub id: String,
    /// What it takes on disk; of a layer without what lies beside its tree.
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

/// A record of the build cache, as a line of `ply du -v`.
#[derive(Debug, Clone, Serialize)]
pub struct RecordSpace {
    /// Its ID.
    pub id: String,
    /// What kind of thing it is, as BuildKit names it.
    pub record_type: &'static str,
    /// Whether it can still be written to.
    pub mutable: bool,
    /// Whether somebody holds it, or a record that stands on it.
    pub in_use: bool,
    /// Whether an image has its layers as well.
    pub shared: bool,
    /// Never pruned.
    pub pinned: bool,
    /// All that it keeps, without what it stands on.
    pub size_bytes: u64,
    /// Of that, what no other record keeps.
    pub unique_bytes: u64,
    /// Of that, what other records keep as well.
    pub shared_bytes: u64,
    /// Of that, what no record before it in this list keeps: these add up.
    pub charged_bytes: u64,
    /// What it stands on.
    pub parents: Vec<String>,
    /// RFC 3339; `None` if its row does not say.
    pub created: Option<String>,
    /// RFC 3339; `None` if it was never used.
    pub last_used: Option<String>,
    /// Uses since it was made.
    pub usage_count: u64,
    /// How long it took to make; `None` if nobody saw it.
    pub took_seconds: Option<f64>,
    /// What it is.
    pub description: String,
    /// What is wrong with it, if it is damaged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl From<RecordUsage> for RecordSpace {
    fn from(usage: RecordUsage) -> Self {
        Self {
            id: usage.id.to_string(),
            record_type: usage.record_type.name(),
            mutable: usage.mutable,
            in_use: usage.in_use,
            shared: usage.shared,
            pinned: usage.pinned,
            size_bytes: usage.size_bytes,
            unique_bytes: usage.unique_bytes,
            shared_bytes: usage.size_bytes - usage.unique_bytes,
            charged_bytes: usage.charged_bytes,
            parents: usage.parents.iter().map(ToString::to_string).collect(),
            created: usage.created_at.map(crate::rfc3339),
            last_used: usage.last_used_at.map(crate::rfc3339),
            usage_count: usage.usage_count,
            took_seconds: usage.took.map(|took| took.as_secs_f64()),
            description: usage.description,
            error: usage.error,
        }
    }
}

/// What the listed records cost together, each byte once.
#[derive(Debug, Clone, Serialize)]
pub struct RecordTotals {
    /// How many are listed.
    pub count: u64,
    /// Their bytes.
    pub total_bytes: u64,
    /// Of these, what one record alone keeps.
    pub unique_bytes: u64,
    /// Of these, what several keep.
    pub shared_bytes: u64,
    /// Of these, what no prune can take now.
    pub in_use_bytes: u64,
}

/// What everything below the root takes on disk.
#[derive(Debug, Clone, Serialize)]
pub struct SpaceTotals {
    /// Bytes by kind. Each byte is of one kind.
    pub totals: BTreeMap<&'static str, u64>,
    /// How many there are of each kind.
    pub counts: BTreeMap<&'static str, u64>,
    /// The sum of the totals: what `du -x` says of the root, but for the last block of each blob.
    pub total_bytes: u64,
}

/// What `ply du -v` shows.
#[derive(Debug, Clone, Serialize)]
pub struct SpaceReport {
    /// Layers, blobs, upper directories, ingests and orphans, the largest first. Empty if records were filtered.
    pub rows: Vec<SpaceRow>,
    /// Records of the build cache that match, by ID. What they keep is among the rows.
    pub records: Vec<RecordSpace>,
    /// The listed records together.
    pub record_totals: RecordTotals,
    /// Everything.
    #[serde(flatten)]
    pub everything: SpaceTotals,
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
    /// Counts that were wrong and were put right; `None` if nobody looked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repaired_count: Option<u64>,
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
    /// Why the driver `overlay` cannot be used here; `None` if it can.
    pub overlay_unusable: Option<String>,
    /// Why the driver `erofs` cannot be used here; `None` if it can.
    pub erofs_unusable: Option<String>,
    /// How many images there are.
    pub images_count: usize,
    /// How many records the build cache has.
    pub records_count: usize,
    /// How many layers there are.
    pub layers_count: usize,
    /// What everything takes on disk.
    pub total_bytes: u64,
    /// The rules that the build cache is kept by.
    pub policy: Vec<PolicyRow>,
}

/// A rule of the policy; sizes of 0 are no limits.
#[derive(Debug, Clone, Serialize)]
pub struct PolicyRow {
    /// Also internal records, frontends, and what an image has as well.
    pub all: bool,
    /// Only records that match one of these.
    pub filters: Vec<String>,
    /// Only what was not used for so long.
    pub keep_duration_seconds: u64,
    /// Never less than this is left.
    pub reserved_space_bytes: u64,
    /// No more than this is used.
    pub max_used_space_bytes: u64,
    /// So much of the file system stays free.
    pub min_free_space_bytes: u64,
}

impl From<&PruneOptions> for PolicyRow {
    fn from(rule: &PruneOptions) -> Self {
        Self {
            all: rule.all,
            filters: rule.filters.clone(),
            keep_duration_seconds: rule.keep_duration.as_secs(),
            reserved_space_bytes: rule.reserved_space_bytes,
            max_used_space_bytes: rule.max_used_space_bytes,
            min_free_space_bytes: rule.min_free_space_bytes,
        }
    }
}

impl Info {
    /// All but the bytes and the policy as a table.
    pub fn lines(&self) -> Vec<(&'static str, String)> {
        vec![
            ("version", self.version.into()),
            ("root", self.root.clone()),
            ("driver", self.driver.into()),
            ("overlay", self.overlay_unusable.as_ref().map_or("usable".into(), |why| format!("not usable: {why}"))),
            (
                "erofs",
                match &self.erofs_unusable {
                    Some(why) => format!("not usable: {why}"),
                    None if self.driver.starts_with("erofs") => "usable".into(),
                    None => "usable (ply migrate --driver erofs)".into(),
                },
            ),
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
        UsageKind::Sidecars => "sidecars",
        UsageKind::Actives => "actives",
        UsageKind::Ingests => "ingests",
        UsageKind::Trash => "trash",
        UsageKind::Catalogue => "catalogue",
        UsageKind::Reserve => "reserve",
        UsageKind::Directories => "directories",
        UsageKind::Scratch => "scratch",
        UsageKind::Orphans => "orphans",
        UsageKind::Lost => "lost",
    }
}

impl Engine {
    /// What everything takes on disk, by kind. Costs the same for any number of records, images and blobs, but for the
    /// names in their directories, which are counted.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn usage_totals(&self) -> Result<SpaceTotals, SpaceError> {
        self.measure_changed()?;
        self.totals()
    }

    /// Measures the uppers that somebody may have written to since the last time.
    fn measure_changed(&self) -> Result<(), SpaceError> {
        let mounted = self.mounted_uppers()?;
        if !mounted.is_empty() {
            self.store().write_lazily(|tx| mounted.iter().try_for_each(|active| tx.mark_changed(*active)))?;
        }
        for info in self.actives()?.iter().filter(|info| info.changed) {
            self.active_bytes(info);
        }
        Ok(())
    }

    /// The totals, of uppers as last measured.
    fn totals(&self) -> Result<SpaceTotals, SpaceError> {
        let rows = self.store().usage()?;
        Ok(SpaceTotals {
            totals: rows.iter().map(|row| (kind_name(row.kind), row.size_bytes)).collect(),
            counts: rows.iter().map(|row| (kind_name(row.kind), row.count)).collect(),
            total_bytes: rows.iter().map(|row| row.size_bytes).sum(),
        })
    }

    fn actives(&self) -> Result<Vec<ActiveInfo>, SpaceError> {
        let mut actives = Vec::new();
        self.store().snapshots().scan_actives(|info| {
            actives.push(info);
            ControlFlow::Continue(())
        })?;
        Ok(actives)
    }

    /// What everything takes on disk, thing by thing; with `filters` (BuildKit's), only the records that match one.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn usage(&self, filters: &[String]) -> Result<SpaceReport, SpaceError> {
        self.measure_changed()?;
        let options = UsageOptions { filters: filters.to_vec(), ..UsageOptions::default() };
        let mut records = Vec::new();
        let totals = self.cache.controller().scan_usage(&options, &mut |usage| records.push(usage.into()))?;
        let rows = if filters.is_empty() { self.usage_rows()? } else { Vec::new() };
        let record_totals = RecordTotals {
            count: totals.records_count,
            total_bytes: totals.total_bytes,
            unique_bytes: totals.unique_bytes,
            shared_bytes: totals.total_bytes - totals.unique_bytes,
            in_use_bytes: totals.in_use_bytes,
        };
        // After what may have been measured on the way.
        Ok(SpaceReport { rows, records, record_totals, everything: self.totals()? })
    }

    /// Everything but records.
    fn usage_rows(&self) -> Result<Vec<SpaceRow>, SpaceError> {
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
        let plain = |kind, id: String, size_bytes| SpaceRow {
            kind,
            id,
            size_bytes,
            users_count: None,
            description: String::new(),
            error: None,
        };
        for ingest in self.store().content().ingests()? {
            rows.push(plain("ingest", ingest.ingest.to_string(), ingest.offset_bytes));
        }
        for (path, size_bytes) in self.store().orphans()? {
            rows.push(plain("orphan", path.display().to_string(), size_bytes));
        }
        let records = self.records()?;
        let writable = self.layer_store()?.list_rw()?;
        for info in self.actives()? {
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
        Ok(rows)
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

    /// Removes what nothing holds, or says what it would remove; with [`GcMode::Full`], by following everything that
    /// holds something instead of trusting the counts.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn gc(&self, mode: GcMode) -> Result<GcSummary, SpaceError> {
        self.forget_dead_mounts()?;
        // References of processes that were killed end here.
        self.layer_store()?;
        let report = self.store().gc(mode)?;
        self.policy.forget();
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
        Ok(GcSummary { removed, total_bytes, repaired_count: (mode == GcMode::Full).then_some(report.repaired_count) })
    }

    /// Asks for the catalogue's file to be made as small as what is in it when the engine closes.
    pub fn compact_at_close(&self) {
        self.store().compact_at_close();
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
            overlay_unusable: self.store().try_overlay().err().map(|error| error.to_string()),
            erofs_unusable: self.store().try_erofs().err().map(|error| format!("{error}: {}", error.source)),
            images_count: self.store().read(plies_image::list)?.len(),
            records_count: self.cache().count()?,
            layers_count: usize::try_from(layers).unwrap_or(usize::MAX),
            total_bytes: usage.iter().map(|row| row.size_bytes).sum(),
            policy: self.policy.rules().iter().map(PolicyRow::from).collect(),
        })
    }
}
