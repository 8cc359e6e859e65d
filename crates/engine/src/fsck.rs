//! `ply fsck`: what is wrong with a store, and putting it right.
//!
//! ```text
//! engine.fsck   "next"  -> u64    the part of a hundred at which the next sample begins
//! ```
//!
//! Each crate checks its own tables; here their findings come together with those of the mounts, and go to the store's
//! mender, round after round, until a round finds nothing that could be helped. What a drop leaves behind is found by the
//! next round, so a repair needs no notion of what depends on what, and one that was killed is done again.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use plies_cache::{CacheError, RecordOptions};
use plies_image::{ImageError, LayerStore, LayerStoreError, LayerStoreOptions, NewImage};
use plies_oci::{
    BlobDigest, ChainId, Compression, ErrorKind, ImageConfig, ImageId, Manifest, MediaClass, classify, limits,
};
use plies_store::fsck::{MendError, Mender, Rebuilt, Sample, rebuild_owner};
use plies_store::{
    Cancel, CatalogueError, CheckError, CheckOptions, Depth, FileError, Finding, Findings, Keeper, LayerError, LayerId,
    LayerSource, Origin, Resource, Rows as _, SnapshotError, Table, TransferError, fsck, keepers_of,
};
use serde::Serialize;

use crate::progress::{Progress, Silent};
use crate::{Engine, EngineError, EngineOptions, RunError};

const FSCK: Table<String, u64> = Table::new("engine.fsck");
const NEXT: &str = "next";

/// Rounds of a repair. Three follow from the deepest chain of consequences that is known (a layer, its record, its results);
/// what goes on beyond this goes round in circles.
const ROUNDS_MAX: usize = 64;

/// What only reading finds, which a round of a repair does not repeat: what they found is carried over until it was dealt with.
const READ_CODES: [&str; 4] = ["blob-damaged", "layer-tree-damaged", "layer-index-wrong", "layer-usage-wrong"];

/// What must be right before images can be made of configs.
const FOUND_BY: [&str; 8] = [
    "row-unreadable",
    "refs-wrong",
    "loose-wrong",
    "totals-wrong",
    "squashes-wrong",
    "layers-by-diff-wrong",
    "layers-by-chain-wrong",
    "blob-diff-wrong",
];

/// Kinds of owners whose holds somebody accounts for.
const OWNERS: [&str; 6] = ["record:", "image:", "chain:", "rw:", "mount:", "fsck:"];

/// Why a check or a repair could not be done. What is wrong with the store is no error, but in the report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FsckError {
    /// Looking.
    #[error("check the store")]
    Check(#[from] CheckError),
    /// Repairing.
    #[error("repair the store")]
    Mend(#[from] MendError),
    /// The database cannot be read where it says that there are rows.
    #[error("the catalogue is damaged: see what is left of it with `ply fsck --rebuild`")]
    Damaged,
    /// Rows.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
    /// References to layers that dead processes left.
    #[error("open the layer store")]
    Layers(#[from] LayerStoreError),
    /// Mounts.
    #[error("look at the mounts")]
    Mounts(#[source] Box<RunError>),
    /// Emptying `lost/`.
    #[error(transparent)]
    File(#[from] FileError),
    /// Making records of layers that nothing needs.
    #[error("keep a layer that was found")]
    Cache(#[from] CacheError),
    /// A layer that was found.
    #[error("keep a layer that was found")]
    Layer(#[from] LayerError),
    /// Reading a layer that was found.
    #[error("keep a layer that was found")]
    Transfer(#[from] TransferError),
}

impl FsckError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Check(source) => source.kind(),
            Self::Mend(source) => source.kind(),
            Self::Damaged => ErrorKind::DataLoss,
            Self::Catalogue(source) => source.kind(),
            Self::Layers(source) => source.kind(),
            Self::Mounts(source) => source.kind(),
            Self::File(source) => source.kind(),
            Self::Cache(source) => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::Transfer(source) => source.kind(),
        }
    }
}

/// How deep `ply fsck` looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FsckDepth {
    /// The store's directories against its rows.
    Quick,
    /// All references, counts and sums.
    #[default]
    Graph,
    /// Also the bytes of so many in a hundred blobs and layers; another part of them each time.
    Data(u8),
}

/// What to do.
#[derive(Debug, Clone, Default)]
pub struct FsckRequest {
    /// How deep to look.
    pub depth: FsckDepth,
    /// Put right what can be put right.
    pub repair: bool,
    /// A rebuild comes before: images and records are made of what it found.
    pub rebuilt: Option<Rebuild>,
}

/// A catalogue that was made anew, and whose store is to be repaired.
#[derive(Debug, Clone)]
pub struct Rebuild {
    found: Rebuilt,
    /// Below `lost/`.
    name: String,
}

/// Something that is, or was, wrong.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct FsckFinding {
    /// What is wrong, for programs.
    pub code: &'static str,
    /// With what.
    pub subject: String,
    /// What is wrong, for people.
    pub what: String,
    /// What would put it right: `rewrite`, `restore`, `quarantine`, `drop`, …
    pub remedy: &'static str,
    /// What a repair did: `rewritten`, `restored`, `set aside`, `dropped`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub done: Option<&'static str>,
}

impl FsckFinding {
    fn new(finding: Finding, done: Option<&'static str>) -> Self {
        let remedy = finding.remedy.word();
        let what = match finding.remedy {
            fsck::Remedy::Advice(advice) => format!("{}: {advice}", finding.what),
            _ => finding.what,
        };
        Self { code: finding.code, subject: finding.subject, what, remedy, done }
    }
}

/// What `ply fsck` found and did.
#[derive(Debug, Clone, Serialize)]
pub struct FsckReport {
    /// Rows that were looked at.
    pub rows_count: u64,
    /// Of a hundred parts of all blobs and layers, those that were read: the first, and how many.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parts_read: Option<(u8, u8)>,
    /// What was found, or, after a repair, what was dealt with.
    pub findings: Vec<FsckFinding>,
    /// What is still wrong.
    pub left: Vec<FsckFinding>,
    /// Where what a repair took away is kept, below the root.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost: Option<String>,
    /// What a rebuild found.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rebuilt: Option<RebuiltSummary>,
}

/// What a rebuild found.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct RebuiltSummary {
    /// Rows that could still be read.
    pub salvaged_rows_count: u64,
    /// Layers that only their directories knew of.
    pub layers_count: u64,
    /// Blobs that only their files knew of.
    pub blobs_count: u64,
    /// Images that only their configs knew of; they have no names.
    pub images_count: u64,
    /// Layers that no image needs, kept as records of the build cache.
    pub records_count: u64,
}

impl Engine {
    /// Makes a new catalogue of what is left of the old one and of the data, whether or not the old one opens. The store is to
    /// be opened then, and [`Engine::fsck`] asked to go on with what this returns.
    ///
    /// # Errors
    /// [`EngineError::Open`]; the store is as it was.
    pub fn rebuild(
        root: &Path,
        options: &mut EngineOptions,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Rebuild, EngineError> {
        let check = CheckOptions { progress, cancel: cancel.clone(), ..CheckOptions::new(Depth::Graph) };
        let store_options = Self::store_options(options);
        let name = lost_name(std::time::SystemTime::now().into());
        let found = plies_store::Store::rebuild(root, &store_options, &check, Self::wait_policy(options), &name)?;
        Ok(Rebuild { found, name })
    }

    /// Checks the store, and repairs it if that is asked for.
    ///
    /// # Errors
    /// [`FsckError`]: it could not be done. What a repair had done until then stays done.
    pub fn fsck(
        &self,
        request: &FsckRequest,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<FsckReport, FsckError> {
        // redb may panic over a page that is not what it was.
        catch_unwind(AssertUnwindSafe(|| self.check_and_repair(request, progress, cancel)))
            .unwrap_or(Err(FsckError::Damaged))
    }

    fn check_and_repair(
        &self,
        request: &FsckRequest,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<FsckReport, FsckError> {
        let (depth, parts_read) = match request.depth {
            FsckDepth::Quick => (Depth::Quick, None),
            FsckDepth::Graph => (Depth::Graph, None),
            FsckDepth::Data(100) => (Depth::Deep(Sample::ALL), None),
            FsckDepth::Data(count) => {
                let from = self.store.read(|rows| rows.get(&FSCK, &NEXT.to_owned())).ok().flatten().unwrap_or(0);
                let from = u8::try_from(from % 100).unwrap_or(0);
                (Depth::Deep(Sample { from, count }), Some((from, count)))
            }
        };
        let options = |depth| CheckOptions { depth, limits: self.limits.clone(), progress, cancel: cancel.clone() };
        // References of processes that are gone are nothing wrong.
        LayerStore::open(&self.store, LayerStoreOptions::default())?;
        let found = self.check_all(&options(depth))?;
        if let Some((from, count)) = parts_read {
            let next = u64::from(from) + u64::from(count);
            self.store.write_lazily(|tx| tx.put(&FSCK, &NEXT.to_owned(), &(next % 100)))?;
        }
        let mut report = FsckReport {
            rows_count: found.rows_count,
            parts_read,
            findings: vec![],
            left: vec![],
            lost: None,
            rebuilt: request.rebuilt.as_ref().map(|rebuilt| RebuiltSummary {
                salvaged_rows_count: rebuilt.found.salvaged_count,
                layers_count: rebuilt.found.layers_count,
                blobs_count: rebuilt.found.blobs_count,
                images_count: 0,
                records_count: 0,
            }),
        };
        if !request.repair && request.rebuilt.is_none() {
            report.left = found.found.into_iter().map(|finding| FsckFinding::new(finding, None)).collect();
            report.findings.clone_from(&report.left);
            return Ok(report);
        }
        let graph = options(Depth::Graph);
        let name = request.rebuilt.as_ref().map_or_else(|| lost_name(self.store.now()), |rebuilt| rebuilt.name.clone());
        let mut repair =
            Repair { engine: self, mender: Mender::new(&self.store, &graph, &name)?, options: &graph, done: vec![] };
        let unfinished = !self.store.read(|rows| plies_store::held_by(rows, &rebuild_owner()))?.is_empty();
        if unfinished || request.rebuilt.is_some() {
            // What images and layers are found by comes first.
            repair.rounds(found.found, |finding| FOUND_BY.contains(&finding.code))?;
            let images_count = repair.adopt_images(cancel)?;
            repair.rounds(self.check_all(&graph)?.found, |_| true)?;
            let records_count = repair.adopt_layers(progress, cancel)?;
            self.store.write(|tx| tx.unhold_all(&rebuild_owner()))?;
            report.rebuilt = report.rebuilt.map(|rebuilt| RebuiltSummary { images_count, records_count, ..rebuilt });
            report.left = repair.rounds(self.check_all(&graph)?.found, |_| true)?;
        } else {
            report.left = repair.rounds(found.found, |_| true)?;
        }
        // What came back was not read yet, and what was repaired has to prove it.
        if matches!(depth, Depth::Deep(_)) && !repair.done.is_empty() {
            report.left = repair.rounds(self.check_all(&options(depth))?.found, |_| true)?;
        }
        let Repair { mender, done, .. } = repair;
        mender.finish()?;
        // A row that was found wrong in several rounds was put right in the last.
        let mut seen = BTreeSet::new();
        report.findings = done.into_iter().filter(|finding| seen.insert(finding.clone())).collect();
        let lost = self.store.root().join("lost").join(&name);
        report.lost = lost.exists().then(|| format!("lost/{name}"));
        Ok(report)
    }

    fn check_all(&self, options: &CheckOptions<'_>) -> Result<Findings, FsckError> {
        let mut findings = self.store.check(options)?;
        if options.depth != Depth::Quick {
            self.store.read(|rows| {
                plies_cache::check(rows, &mut findings)?;
                plies_image::check(&self.store, rows, &mut findings)?;
                crate::pull::check(rows, &mut findings)?;
                findings.rows(rows, &FSCK, |_, changes| fsck::Remedy::Rewrite(changes))?;
                let mut unknown = Vec::new();
                plies_store::scan_holds(rows, |owner, held| {
                    if !OWNERS.iter().any(|kind| owner.as_str().starts_with(kind)) {
                        unknown.push((owner.clone(), held));
                    }
                    ControlFlow::Continue(())
                })?;
                for (owner, held) in unknown {
                    let remedy = fsck::Remedy::Rewrite(vec![fsck::Change::unhold(&owner, held)]);
                    findings.add("hold-unknown-owner", &owner, format!("holds {held} and is nobody"), remedy);
                }
                Ok::<_, CatalogueError>(())
            })?;
            self.check_mounts(&mut findings).map_err(|error| FsckError::Mounts(Box::new(error)))?;
        }
        self.say_who_has(&mut findings)?;
        Ok(findings)
    }

    /// Blobs that are lost here may be had where they came from.
    fn say_who_has(&self, findings: &mut Findings) -> Result<(), FsckError> {
        for finding in &mut findings.found {
            if let fsck::Remedy::Restore { resource: Resource::Blob(digest), .. } = finding.remedy
                && finding.code.starts_with("blob-")
                && let Some(place) = self.store.read(|rows| crate::pull::sources_of(rows, digest))?.first()
            {
                finding.what.push_str(&format!("; what needs it fetches it again from {place}"));
            }
        }
        Ok(())
    }

    /// Removes what repairs have put aside: how many bytes that were.
    ///
    /// # Errors
    /// [`FsckError::File`].
    pub fn empty_lost(&self) -> Result<u64, FsckError> {
        Ok(self.store.empty_lost()?)
    }
}

/// The directory below `lost/` of a repair that begins now.
fn lost_name(now: plies_store::Stamp) -> String {
    crate::rfc3339(now).chars().filter(|c| c.is_ascii_alphanumeric()).take("20260102T030405".len()).collect()
}

struct Repair<'a> {
    engine: &'a Engine,
    mender: Mender<'a>,
    options: &'a CheckOptions<'a>,
    done: Vec<FsckFinding>,
}

impl Repair<'_> {
    /// Mends and checks again until nothing more can be done: what is left.
    fn rounds(&mut self, found: Vec<Finding>, only: impl Fn(&Finding) -> bool) -> Result<Vec<FsckFinding>, FsckError> {
        let mut read: Vec<Finding> =
            found.iter().filter(|finding| READ_CODES.contains(&finding.code)).cloned().collect();
        let mut found = found;
        for _ in 0..ROUNDS_MAX {
            found.retain(&only);
            let done = self.mender.mend(found.clone())?;
            if done.is_empty() {
                break;
            }
            let dealt_with: HashSet<(&str, &str)> =
                done.iter().map(|(finding, _)| (finding.code, finding.subject.as_str())).collect();
            read.retain(|finding| !dealt_with.contains(&(finding.code, finding.subject.as_str())));
            self.done.extend(done.into_iter().map(|(finding, done)| FsckFinding::new(finding, Some(done))));
            found = self.engine.check_all(self.options)?.found;
            found.extend(read.iter().cloned());
        }
        Ok(found.into_iter().map(|finding| FsckFinding::new(finding, None)).collect())
    }

    /// Makes images of configs that none is listed for and whose layers are all here, as layers or as blobs.
    fn adopt_images(&self, cancel: &Cancel) -> Result<u64, FsckError> {
        let store = &self.engine.store;
        let mut small = Vec::new();
        store.content().scan(|digest, info| {
            if info.size_bytes <= limits::CONFIG_BYTES_MAX {
                small.push(digest);
            }
            ControlFlow::Continue(())
        })?;
        let mut manifests: HashMap<BlobDigest, Vec<Manifest>> = HashMap::new();
        let mut configs: BTreeMap<ImageId, ImageConfig> = BTreeMap::new();
        for digest in small {
            // What is damaged is found by the check.
            let Ok(raw) = store.content().read(digest) else { continue };
            if let Ok(manifest) = Manifest::parse(&raw) {
                manifests.entry(manifest.config().digest).or_default().push(manifest);
            } else if let Ok(config) = ImageConfig::parse(&raw) {
                configs.insert(config.id(), config);
            }
        }
        let mut count = 0;
        for (id, config) in configs {
            let known = store.read(|rows| plies_image::get(rows, &id));
            if matches!(known, Ok(Some(_))) {
                continue;
            }
            let manifests = manifests.get(&BlobDigest::from_bytes(*id.as_bytes())).map_or(&[][..], Vec::as_slice);
            // One that cannot be made is none; its blobs stay until they are collected.
            count += u64::from(self.adopt_image(&config, manifests, cancel).is_ok());
        }
        Ok(count)
    }

    fn adopt_image(&self, config: &ImageConfig, manifests: &[Manifest], cancel: &Cancel) -> Result<(), ImageError> {
        let store = &self.engine.store;
        let lease = self.mender.lease();
        let snapshots = store.snapshots();
        let fits = manifests.iter().find(|manifest| manifest.layers().len() == config.diff_ids().len());
        let from_blobs = fits.and_then(|manifest| self.layers_from_blobs(config, manifest, cancel));
        let layers = match from_blobs {
            Some(layers) => layers,
            None => {
                let mut layers = Vec::new();
                let mut chain = None;
                for diff_id in config.diff_ids() {
                    let chain_id = ChainId::extend(chain, *diff_id);
                    chain = Some(chain_id);
                    let found = match store.layers().hold_by_diff_id(*diff_id, lease) {
                        Ok(None) => store.layers().hold_by_chain(chain_id, lease),
                        found => found,
                    };
                    let Some(layer) = found.map_err(SnapshotError::from)? else {
                        let (id, diff_ids, layers) = (config.id(), config.diff_ids().len(), layers.len());
                        return Err(ImageError::Layers { id, diff_ids, layers });
                    };
                    layers.push(layer);
                }
                layers
            }
        };
        let snapshot = if layers.is_empty() { None } else { Some(snapshots.ensure(&layers, lease)?) };
        let mut size_bytes = 0;
        for layer in &layers {
            size_bytes += store.layers().info(*layer).map_err(SnapshotError::from)?.usage.size_bytes;
        }
        let chain = plies_image::chain_layers(store, config.diff_ids(), &layers).map_err(SnapshotError::from)?;
        let new = NewImage {
            config,
            manifests: manifests.iter().map(Into::into).collect(),
            snapshot,
            layers: Some(&chain),
            size_bytes,
            // Nobody knows, and only what was built here may answer for a build step.
            built_here: false,
        };
        store.write(|tx| {
            for manifest in manifests {
                let needed = [manifest.config().digest].into_iter().chain(manifest.layers().iter().map(|it| it.digest));
                for needed in needed {
                    match tx.add_edge(manifest.document().digest(), needed) {
                        Err(CatalogueError::NoSuchResource { .. }) => {}
                        added => added?,
                    }
                }
            }
            plies_image::put(tx, &new).map(drop)
        })
    }

    /// The layers of an image whose blobs are here, unpacked where they are not.
    fn layers_from_blobs(&self, config: &ImageConfig, manifest: &Manifest, cancel: &Cancel) -> Option<Vec<LayerId>> {
        let mut offered = Vec::new();
        let mut chain = None;
        for (diff_id, blob) in config.diff_ids().iter().zip(manifest.layers()) {
            let compression: Compression = match classify(&blob.media_type) {
                Some(MediaClass::Layer(compression)) => compression,
                _ => return None,
            };
            if !self.engine.store.read(|rows| rows.has(blob.digest)).ok()? {
                return None;
            }
            let chain_id = ChainId::extend(chain, *diff_id);
            chain = Some(chain_id);
            offered.push(LayerSource {
                digest: Some(blob.digest),
                size_bytes: blob.size_bytes,
                compression,
                diff_id: *diff_id,
                chain_id,
                origin: Origin::Near,
                open: Box::new(|_| Err(io::ErrorKind::NotFound.into())),
            });
        }
        let transfer = self.engine.transfer(self.mender.lease(), &Silent, cancel);
        transfer.take_layers(&offered, &[]).ok().map(|taken| taken.layers)
    }

    /// Makes records of layers that nothing but the rebuild holds: whoever looks after space decides about those.
    fn adopt_layers(&self, progress: &dyn Progress, cancel: &Cancel) -> Result<u64, FsckError> {
        let store = &self.engine.store;
        let mut layers = Vec::new();
        store.layers().scan(|info| {
            if !info.derived && info.chain_id.is_none() {
                layers.push(info);
            }
            ControlFlow::Continue(())
        })?;
        let wanted = layers.iter().map(|info| info.id.into()).collect();
        let keepers = store.read(|rows| keepers_of(rows, &wanted))?;
        let mut count = 0;
        for info in layers {
            let keepers = keepers.get(&info.id.into()).map_or(&[][..], Vec::as_slice);
            let is_ours = |keeper: &Keeper| match keeper {
                Keeper::Owner(owner) => *owner == rebuild_owner(),
                Keeper::Lease(lease) => *lease == self.mender.lease().id(),
                Keeper::Resource(_) => false,
            };
            if keepers.is_empty() || !keepers.iter().all(is_ours) {
                continue;
            }
            let diff_id = self.engine.transfer(self.mender.lease(), progress, cancel).diff_id_of(info.id)?;
            let options =
                RecordOptions { description: Some("recovered by fsck".to_owned()), ..RecordOptions::by("fsck") };
            if let Some(record) = self.engine.cache().get_by_diff_id(diff_id, None, &options)? {
                record.release()?;
                count += 1;
            }
        }
        Ok(count)
    }
}
