//! `ply prune`: what goes from the build cache, and why the rest stays.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use plies_cache::{CacheError, Fate, Judged, PruneOptions, PrunedRecord, Reason, RecordId, SharedChecker};
use plies_oci::{ChainId, DiffId, ErrorKind, ImageConfig};
use plies_store::{Cancel, CatalogueError, Store};
use serde::Serialize;

use crate::Engine;
use crate::run::RunError;

/// How long an answer about images is good for. A prune asks once for every record, in a row; an answer that is out of
/// date costs a record that goes or stays too early, and never bytes that anybody holds.
const CHECKED_FOR: Duration = Duration::from_secs(1);

/// Why a prune failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PruneError {
    /// The build cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// What is mounted.
    #[error(transparent)]
    Mounts(#[from] Box<RunError>),
    /// What there is.
    #[error("add up what is stored")]
    Catalogue(#[from] CatalogueError),
    /// How full the file system is.
    #[error("stat the file system of {}", root.display())]
    FileSystem {
        /// The state directory.
        root: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What is in use alone is more than the cache may take.
    #[error(
        "what is in use takes {in_use_bytes} bytes of the build cache, which may take {limit_bytes}: raise \
         max-used-space in [gc] of the config file, or end what else is using it"
    )]
    OverLimit {
        /// What is in use.
        in_use_bytes: u64,
        /// What the policy allows.
        limit_bytes: u64,
    },
}

impl PruneError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Cache(source) => source.kind(),
            Self::Mounts(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
            Self::FileSystem { .. } => ErrorKind::Unavailable,
            Self::OverLimit { .. } => ErrorKind::Limit,
        }
    }
}

/// What becomes of one record.
#[derive(Debug, Clone, Serialize)]
pub struct PruneRow {
    /// The record's ID.
    pub id: String,
    /// What it is.
    pub description: String,
    /// What it keeps on disk.
    pub size_bytes: u64,
    /// What no record keeps any more once it is gone.
    pub freed_bytes: u64,
    /// The lowest goes first; `None` if it is not its turn that decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
    /// Why it stays; `None`: it goes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stays: Option<&'static str>,
}

/// What a prune did, or would do.
#[derive(Debug, Clone, Serialize)]
pub struct PruneSummary {
    /// Records that went, in order; of a dry run also those that stay.
    pub records: Vec<PruneRow>,
    /// How many went.
    pub removed_count: u64,
    /// What the disk has more of now. Of a dry run, what no record would keep; an image may.
    pub freed_bytes: u64,
}

impl Engine {
    /// Removes records by a rule, and the bytes that nothing needs any more; or says what it would do with each.
    ///
    /// # Errors
    /// [`PruneError`].
    pub fn prune(&self, rule: &PruneOptions, dry_run: bool, cancel: &Cancel) -> Result<PruneSummary, PruneError> {
        self.forget_dead_mounts().map_err(Box::new)?;
        let controller = self.cache.controller();
        let rules = std::slice::from_ref(rule);
        let mut records = Vec::new();
        if dry_run {
            let mut judged = |judged: &Judged| {
                let stays = match judged.fate {
                    Fate::Goes { .. } => None,
                    Fate::Stays(reason) => Some(why(reason)),
                };
                records.push(PruneRow { score: judged.score, ..row(&judged.usage, judged.freed_bytes, stays) });
            };
            let report = controller.prune_dry_run(rules, &mut judged, cancel)?;
            return Ok(PruneSummary { records, removed_count: report.removed_count, freed_bytes: report.freed_bytes });
        }
        let mut removed = |gone: &PrunedRecord| records.push(row(&gone.usage, gone.freed_bytes, None));
        let report = controller.prune(rules, &mut removed, cancel)?;
        self.policy.forget();
        let freed_bytes = report.collected.map_or(0, |collected| collected.freed_bytes);
        Ok(PruneSummary { records, removed_count: report.removed_count, freed_bytes })
    }
}

fn row(usage: &plies_cache::RecordUsage, freed_bytes: u64, stays: Option<&'static str>) -> PruneRow {
    PruneRow {
        id: usage.id.to_string(),
        description: usage.description.clone(),
        size_bytes: usage.size_bytes,
        freed_bytes,
        score: None,
        stays,
    }
}

fn why(reason: Reason) -> &'static str {
    match reason {
        Reason::Held => "in use",
        Reason::HasChildren => "another record that stays stands on it",
        Reason::Pinned => "pinned",
        Reason::Internal => "internal (--all takes it too)",
        Reason::Shared => "an image has it as well (--all takes it too)",
        Reason::NotMatched => "no filter matches",
        Reason::UsedRecently => "used within the keep duration",
        Reason::UnderCap => "there is space enough without it",
        Reason::UsedMeanwhile => "used meanwhile",
        Reason::Failed => "could not be removed",
    }
}

/// Says which records are the layers of an image as well.
pub(crate) struct ImageChecker {
    store: Store,
    known: Mutex<Option<(Instant, HashSet<ChainId>)>>,
}

impl ImageChecker {
    pub(crate) fn new(store: Store) -> Self {
        Self { store, known: Mutex::new(None) }
    }

    /// All chains of layers that images begin with. Of an image that is damaged nothing is known.
    fn chains(&self) -> Result<HashSet<ChainId>, CatalogueError> {
        let mut chains = HashSet::new();
        for image in self.store.read(plies_image::list)? {
            let config = plies_oci::BlobDigest::from_bytes(*image.id.as_bytes());
            let Ok(mut blob) = self.store.content().open(config) else { continue };
            let mut raw = Vec::new();
            if std::io::Read::read_to_end(&mut blob, &mut raw).is_err() {
                continue;
            }
            let Ok(config) = ImageConfig::parse(&raw) else { continue };
            let mut chain = None;
            for diff_id in config.diff_ids() {
                let next = ChainId::extend(chain, *diff_id);
                chains.insert(next);
                chain = Some(next);
            }
        }
        Ok(chains)
    }
}

impl SharedChecker for ImageChecker {
    fn exists(&self, _: RecordId, layers: &[DiffId]) -> Result<bool, Box<dyn std::error::Error + Send + Sync>> {
        let Some(chain) = ChainId::of(layers) else { return Ok(false) };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((asked, chains)) = &*known
            && asked.elapsed() < CHECKED_FOR
        {
            return Ok(chains.contains(&chain));
        }
        let chains = self.chains()?;
        let exists = chains.contains(&chain);
        *known = Some((Instant::now(), chains));
        Ok(exists)
    }
}
