//! A record's layers as blobs, bottom first, as an image or a remote cache lists them.
//!
//! A record has at most one blob of its own: the one that it came from, or else the first that was made of it. Its chain
//! IDs go by that one. The same tar in another compression is a *variant*: it belongs to the layer, so that records which
//! share a layer share its variants too. As long as that was not unpacked, it belongs to the records that list it: would
//! it belong to the blob that it was made of, two could keep each other, and counts never take a ring.
//!
//! ```text
//! record --holds--> layer --edge--> blob (gzip), variant (zstd), ..
//! lazy record --holds--> blob (gzip), variant (zstd), ..
//! ```
//!
//! Blobs are made before rows name them. All rows of one request change in one transaction at its end; what was made
//! until a failure stays with the layers and is found the next time.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read};
use std::sync::Arc;

use plies_oci::{BlobDigest, ChainId, Compression, Descriptor, DiffId, MediaClass, MediaType, classify};
use plies_store::progress::Silent;
use plies_store::{
    BlobError, Cancel, CatalogueError, LayerBlob, LayerId, Lease, LeaseOptions, Rows as _, Stamp, Store, Transfer, Tx,
    parallel,
};

use crate::compose::{hold_blob, media_type};
use crate::lazy::{Provider, Providers, RangeProvider};
use crate::manager::{Inner, UNCOMPRESSED, extend_blob_chain};
use crate::record::{self, BlobRow, Parents, RecordRow, State};
use crate::{CacheError, ImmutableRef, RecordId};

/// Annotation of a layer's descriptor with the time at which its record was made, RFC 3339 (BuildKit's name for it).
pub const CREATED_AT: &str = "buildkit/createdat";

/// Combinations of variants that are listed at most. There are 2^n of n layers with two variants each; whoever asks
/// takes the first that fits.
pub const REMOTES_MAX: usize = 256;

/// Layers that are worked on at once: fetching waits for the network, and compressing has threads of its own.
const PARTS_MAX: usize = 4;

/// How often a blob is made again that a collection took between its making and its use. Once would do, but for chance.
const ATTEMPTS_MAX: usize = 5;

/// In which form layers are wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum LayerFormat {
    /// The tar itself.
    Uncompressed,
    /// gzip.
    #[default]
    Gzip,
    /// zstd.
    Zstd,
    /// gzip with an index that lets single files be fetched. Known by name only: it is not written.
    Estargz,
}

impl LayerFormat {
    /// All of them, with the names that BuildKit gives them.
    pub const NAMES: [(LayerFormat, &'static str); 4] =
        [(Self::Uncompressed, "uncompressed"), (Self::Gzip, "gzip"), (Self::Zstd, "zstd"), (Self::Estargz, "estargz")];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::NAMES.iter().find(|(format, _)| *format == self).map_or("gzip", |(_, name)| name)
    }

    /// The format of a name.
    ///
    /// # Errors
    /// [`CacheError::Unwritable`].
    pub fn parse(name: &str) -> Result<Self, CacheError> {
        let found = Self::NAMES.iter().find(|(_, has)| *has == name).map(|(format, _)| *format);
        found.ok_or_else(|| CacheError::Unwritable { name: name.chars().take(100).collect() })
    }

    /// What compresses it.
    ///
    /// # Errors
    /// [`CacheError::Unwritable`].
    pub fn compression(self) -> Result<Compression, CacheError> {
        match self {
            Self::Uncompressed => Ok(Compression::None),
            Self::Gzip => Ok(Compression::Gzip),
            Self::Zstd => Ok(Compression::Zstd),
            Self::Estargz => Err(CacheError::Unwritable { name: self.name().to_owned() }),
        }
    }
}

/// What blobs are wanted.
#[derive(Debug, Clone, Default)]
pub struct RemoteOptions {
    /// The form of blobs that are made.
    pub compression: LayerFormat,
    /// Whether layers whose blobs are of another form are converted; their variants of that form are listed then.
    pub force: bool,
    /// How hard to compress, on the format's own scale; its default, if `None`. A blob of the right form that is there
    /// is taken whatever its level.
    pub level: Option<i32>,
    /// Whether a layer that can be had elsewhere is listed as not to be distributed, with its URLs.
    pub prefer_non_distributable: bool,
}

/// A chain of blobs, and who has them. Good for as long as the ref that it was asked of is held.
#[derive(Debug, Clone)]
pub struct Remote {
    /// The blobs, bottom first. A record that adds nothing has none.
    pub descriptors: Vec<Descriptor>,
    /// Who has them: the store, or whoever was named for blobs that are not here.
    pub providers: Providers,
}

impl Remote {
    /// Begins to read one of its blobs.
    ///
    /// # Errors
    /// [`CacheError::NeedsProviders`] if it is none of them; [`CacheError::Provider`].
    pub fn open(&self, descriptor: &Descriptor) -> Result<Box<dyn Read + Send>, CacheError> {
        let digest = descriptor.digest;
        let provider = self.providers.get(digest).ok_or_else(|| CacheError::NeedsProviders(vec![digest]))?;
        let diff_id = crate::manager::diff_id_of(descriptor)?;
        let blob = crate::manager::blob_row(descriptor, diff_id);
        provider.open(&blob).map_err(|source| CacheError::Provider { digest, source })
    }
}

/// The store as a provider of the blobs that it has.
#[derive(Debug, Clone)]
pub struct StoreProvider(Store);

impl StoreProvider {
    /// Provides what is in `store`.
    pub fn new(store: &Store) -> Self {
        Self(store.clone())
    }

    fn blob(&self, blob: &BlobRow) -> io::Result<plies_store::Blob> {
        let digest = blob.digest.ok_or(io::ErrorKind::NotFound)?;
        self.0.content().open(digest).map_err(|error| match error {
            BlobError::NotFound { .. } => io::Error::new(io::ErrorKind::NotFound, error),
            other => io::Error::other(other),
        })
    }
}

impl Provider for StoreProvider {
    fn open(&self, blob: &BlobRow) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(self.blob(blob)?))
    }

    fn ranges(&self) -> Option<&dyn RangeProvider> {
        Some(self)
    }
}

impl RangeProvider for StoreProvider {
    fn read_range(&self, blob: &BlobRow, offset: u64, length: u64) -> io::Result<Vec<u8>> {
        let blob = self.blob(blob)?;
        let length = length.min(blob.size_bytes().saturating_sub(offset));
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| io::ErrorKind::OutOfMemory)?];
        let mut filled = 0;
        while filled < bytes.len() {
            match blob.read_at(&mut bytes[filled..], offset + filled as u64) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }
}

/// One layer of a record's walk.
#[derive(Debug, Clone)]
struct Part {
    record: RecordId,
    row: RecordRow,
    /// Its files, if they are unpacked.
    layer: Option<LayerId>,
    /// Whether what is made of it becomes the record's own blob: not one of several layers of an old record.
    whole: bool,
}

impl Part {
    /// The record's own blob.
    fn own(&self) -> Option<(BlobDigest, &BlobRow)> {
        if !self.whole {
            return None;
        }
        self.row.blob.as_ref().and_then(|blob| Some((blob.digest?, blob)))
    }
}

/// What stands for a layer in the chain.
type Chosen = (BlobDigest, BlobRow);

/// What is to be done about layers that have no fitting blob.
struct Job<'a> {
    create: bool,
    wanted: Compression,
    options: &'a RemoteOptions,
    providers: &'a Providers,
    lease: &'a Lease,
    cancel: &'a Cancel,
}

impl Job<'_> {
    fn transfer<'t>(&'t self, inner: &'t Inner) -> Transfer<'t> {
        Transfer { lease: self.lease, limits: &inner.limits, progress: &Silent, cancel: self.cancel }
    }
}

impl ImmutableRef {
    /// Its layers as chains of blobs: the chain to be taken, and, with `all`, the other combinations of variants that
    /// exist, at most [`REMOTES_MAX`], those of the uppermost layers first.
    ///
    /// With `create`, layers without a blob are given one. Without, a record of which some layer has no blob has no
    /// remote: the list is empty. With [`RemoteOptions::force`] blobs of another form are converted, in both cases, and
    /// `all` adds nothing. A blob that is not here is not fetched, unless it must be converted and its layer was not
    /// unpacked; nor is it unpacked for that.
    ///
    /// Layers that add nothing are left out. Several who ask at once make each blob once.
    ///
    /// # Errors
    /// [`CacheError::Unwritable`]; [`CacheError::NeedsProviders`] with all blobs that nobody has; those of finalizing, of
    /// providers and of the store; [`CacheError::Canceled`].
    pub fn get_remotes(
        &self,
        create: bool,
        options: &RemoteOptions,
        all: bool,
        cancel: &Cancel,
    ) -> Result<Vec<Remote>, CacheError> {
        let wanted = options.compression.compression()?;
        let inner = self.inner();
        let lease = inner.store.lease(LeaseOptions::process("export"))?;
        let job = Job { create, wanted, options, providers: self.providers(), lease: &lease, cancel };
        let remotes = inner.remotes(self.id(), &job, all)?;
        lease.release()?;
        Ok(remotes)
    }
}

impl Inner {
    fn remotes(self: &Arc<Self>, id: RecordId, job: &Job<'_>, all: bool) -> Result<Vec<Remote>, CacheError> {
        if job.create {
            self.finalize(id)?;
            for (at, row) in self.walk(id)? {
                if row.state == State::Composed {
                    self.extract(at, job.providers, job.cancel)?;
                }
            }
        }
        let Some(parts) = self.parts(id)? else { return Ok(Vec::new()) };
        self.all_can_be_had(&parts, job)?;
        let chosen = parallel(&parts, PARTS_MAX, |_| 1, |part| self.choose(part, job))?;
        let Some(chosen) = chosen.into_iter().collect::<Option<Vec<Chosen>>>() else { return Ok(Vec::new()) };
        self.write_down(id, &parts, &chosen)?;

        let mut choices: Vec<Vec<Chosen>> = chosen.into_iter().map(|chosen| vec![chosen]).collect();
        if all && !job.options.force {
            for (part, choices) in parts.iter().zip(&mut choices) {
                self.add_variants(part, job, choices)?;
            }
        }
        combinations(&choices).into_iter().map(|chain| self.remote(&parts, &chain, job)).collect()
    }

    /// The layers of a record's walk; `None` if one of them is not finalized or computed.
    fn parts(&self, id: RecordId) -> Result<Option<Vec<Part>>, CacheError> {
        let mut parts = Vec::new();
        for (record, row) in self.walk(id)? {
            match row.state.clone() {
                State::Sealed { layer: None } if row.blob.is_none() => {}
                State::Sealed { layer } => parts.push(Part { record, row, layer, whole: true }),
                State::Lazy => parts.push(Part { record, row, layer: None, whole: true }),
                State::Stack(snapshot) => {
                    for layer in self.store.snapshots().info(snapshot)?.layers {
                        parts.push(Part { record, row: row.clone(), layer: Some(layer), whole: false });
                    }
                }
                State::Composed | State::Mutable { .. } | State::Shared { .. } => return Ok(None),
            }
        }
        Ok(Some(parts))
    }

    /// Looks for every blob that nobody has, before anything is begun, so that whoever asks again can bring them all.
    fn all_can_be_had(&self, parts: &[Part], job: &Job<'_>) -> Result<(), CacheError> {
        let mut missing = Vec::new();
        for part in parts {
            let Some((digest, own)) = part.own() else { continue };
            let made_of_files = part.layer.is_some() && (job.create || job.options.force);
            if !made_of_files
                && !self.can_be_had(digest, job.providers)?
                && job.transfer(self).blobs_of(own.diff_id)?.is_empty()
                && !missing.contains(&digest)
            {
                missing.push(digest);
            }
        }
        if missing.is_empty() { Ok(()) } else { Err(CacheError::NeedsProviders(missing)) }
    }

    fn can_be_had(&self, digest: BlobDigest, providers: &Providers) -> Result<bool, CacheError> {
        Ok(providers.get(digest).is_some() || self.read(|rows| rows.has(digest))?)
    }

    /// The blob that stands for a layer in the chain: its own if that fits, else a variant, else one that is made now.
    /// `None` if it has none and none is to be made. What is here is held by the job's lease.
    fn choose(self: &Arc<Self>, part: &Part, job: &Job<'_>) -> Result<Option<Chosen>, CacheError> {
        let transfer = job.transfer(self);
        let mut may_make = job.create;
        let mut any_fits = false;
        if let Some((digest, own)) = part.own() {
            let fits = !job.options.force || compression_of(&own.media_type) == Some(job.wanted);
            let here = job.lease.hold_if_present(digest)?;
            if fits && (here || job.providers.get(digest).is_some()) {
                return Ok(Some((digest, own.clone())));
            }
            may_make |= job.options.force;
            // One that nobody has any more: whatever decompresses to the same will do.
            any_fits = !job.options.force;
        } else if part.whole && !job.create {
            return Ok(None);
        }
        let diff_id = match (part.own(), part.layer) {
            (Some((_, own)), _) => own.diff_id,
            (None, Some(layer)) => match self.store.layers().info(layer)?.diff_id {
                Some(diff_id) => diff_id,
                None if may_make => self.diff_id_of(layer, job.cancel)?,
                None => return Ok(None),
            },
            (None, None) => {
                let what = "it has neither a layer nor a blob".to_owned();
                return Err(CacheError::Damaged { id: part.record, what });
            }
        };
        for _ in 0..ATTEMPTS_MAX {
            let here = transfer.blobs_of(diff_id)?;
            let fitting = here.iter().find(|blob| blob.compression == job.wanted);
            if let Some(blob) = fitting.or_else(|| here.first().filter(|_| any_fits || !may_make)) {
                return Ok(Some(made_row(blob, diff_id)));
            }
            if !may_make {
                return Ok(None);
            }
            self.make(part, diff_id, job)?;
        }
        Err(CacheError::Damaged { id: part.record, what: format!("blobs of diff ID {diff_id} do not stay") })
    }

    /// The diff ID of a layer that nobody has asked for yet; computed once, however many ask.
    fn diff_id_of(self: &Arc<Self>, layer: LayerId, cancel: &Cancel) -> Result<DiffId, CacheError> {
        let inner = Arc::clone(self);
        let work = move |cancel: &Cancel| {
            let lease = inner.store.lease(LeaseOptions::process("diff ID"))?;
            let transfer = Transfer { lease: &lease, limits: &inner.limits, progress: &Silent, cancel };
            transfer.diff_id_of(layer)?;
            Ok(lease.release()?)
        };
        let key = BlobDigest::of(format!("diff ID of {layer}").as_bytes());
        self.flights.join(key, cancel, work)?;
        let diff_id = self.store.layers().info(layer)?.diff_id;
        Ok(diff_id.expect("because it was written down, and a diff ID is never taken back"))
    }

    /// Makes a blob of the wanted form, once, however many ask for it.
    fn make(self: &Arc<Self>, part: &Part, diff_id: DiffId, job: &Job<'_>) -> Result<(), CacheError> {
        let (inner, part, providers) = (Arc::clone(self), part.clone(), job.providers.clone());
        let (wanted, level) = (job.wanted, job.options.level);
        let key = BlobDigest::of(format!("{diff_id} as {wanted:?}").as_bytes());
        self.flights
            .join(key, job.cancel, move |cancel| inner.make_now(&part, diff_id, wanted, level, &providers, cancel))
    }

    fn make_now(
        self: &Arc<Self>,
        part: &Part,
        diff_id: DiffId,
        wanted: Compression,
        level: Option<i32>,
        providers: &Providers,
        cancel: &Cancel,
    ) -> Result<(), CacheError> {
        let lease = self.store.lease(LeaseOptions::process("make blob"))?;
        let transfer = Transfer { lease: &lease, limits: &self.limits, progress: &Silent, cancel };
        let here = transfer.blobs_of(diff_id)?;
        if here.iter().any(|blob| blob.compression == wanted) {
            return Ok(lease.release()?);
        }
        if here.is_empty() && part.layer.is_none() {
            self.fetch_blob(part, providers, cancel)?;
            // Whoever fetched it may have done so for another record, which may be gone: held here, or fetched again.
            transfer.take_blob(&self.source(part.record, &part.row, providers)?)?;
        }
        let made = transfer.make_blob(diff_id, part.layer, wanted, level)?;
        self.store.write(|tx| keep_variant(tx, part, made.digest))?;
        Ok(lease.release()?)
    }

    /// Fetches a lazy record's blob and does not unpack it; once, also if somebody unpacks it meanwhile.
    fn fetch_blob(self: &Arc<Self>, part: &Part, providers: &Providers, cancel: &Cancel) -> Result<(), CacheError> {
        let Some((digest, _)) = part.own() else { return Ok(()) };
        let (inner, part, providers) = (Arc::clone(self), part.clone(), providers.clone());
        self.flights.join(digest, cancel, move |cancel| {
            let lease = inner.store.lease(LeaseOptions::process("fetch"))?;
            let transfer = Transfer { lease: &lease, limits: &inner.limits, progress: &Silent, cancel };
            transfer.take_blob(&inner.source(part.record, &part.row, &providers)?)?;
            inner.store.write(|tx| hold_blob(tx, part.record))?;
            Ok(lease.release()?)
        })
    }

    /// Adds what else there is of a layer to what was chosen.
    fn add_variants(&self, part: &Part, job: &Job<'_>, choices: &mut Vec<Chosen>) -> Result<(), CacheError> {
        let diff_id = choices[0].1.diff_id;
        let variants = job.transfer(self).blobs_of(diff_id)?;
        let own = match part.own() {
            Some((digest, own)) if self.can_be_had(digest, job.providers)? => Some((digest, own.clone())),
            _ => None,
        };
        for (digest, blob) in own.into_iter().chain(variants.iter().map(|blob| made_row(blob, diff_id))) {
            if choices.iter().all(|(has, _)| *has != digest) {
                choices.push((digest, blob));
            }
        }
        // They are listed, so they must stay for as long as the record's ref.
        let others: Vec<BlobDigest> = choices[1..].iter().map(|(digest, _)| *digest).collect();
        Ok(self.store.write_lazily(|tx| others.iter().try_for_each(|digest| keep_variant(tx, part, *digest)))?)
    }

    /// Gives the records their blobs, and them and their parents the chain IDs that follow, in one transaction.
    fn write_down(&self, id: RecordId, parts: &[Part], chosen: &[Chosen]) -> Result<(), CacheError> {
        let is_new = |part: &Part, digest: BlobDigest| part.own().is_none_or(|(own, _)| own != digest);
        let nothing_new = parts.iter().zip(chosen).all(|(part, (digest, _))| !is_new(part, *digest));
        if nothing_new && self.must_have(id)?.chain_id.is_some() {
            return Ok(());
        }
        Ok(self.store.write(|tx| {
            let mut made: HashMap<RecordId, Vec<(BlobDigest, DiffId)>> = HashMap::new();
            for (part, (digest, blob)) in parts.iter().zip(chosen) {
                if is_new(part, *digest) {
                    keep_variant(tx, part, *digest)?;
                }
                let mut own = (*digest, blob.diff_id);
                if part.whole {
                    record::change(tx, part.record, |row| {
                        // Somebody else may have been first; and what a record came from stays its own.
                        match row.blob.as_ref().and_then(|has| Some((has.digest?, has.diff_id))) {
                            Some(has) => own = has,
                            None => row.blob = Some(blob.clone()),
                        }
                    })?;
                }
                // One that is there twice has its chain once.
                if !part.whole || !made.contains_key(&part.record) {
                    made.entry(part.record).or_default().push(own);
                }
            }
            set_chains(tx, id, &made)
        })?)
    }

    fn remote(&self, parts: &[Part], chain: &[&Chosen], job: &Job<'_>) -> Result<Remote, CacheError> {
        let store: Arc<dyn Provider> = Arc::new(StoreProvider::new(&self.store));
        let mut providers = Vec::with_capacity(chain.len());
        let mut descriptors = Vec::with_capacity(chain.len());
        for (part, (digest, blob)) in parts.iter().zip(chain) {
            descriptors.push(descriptor(*digest, blob, part.row.created_at, job.options.prefer_non_distributable));
            let provider = match self.read(|rows| rows.has(*digest))? {
                true => Some(Arc::clone(&store)),
                false => job.providers.get(*digest).cloned(),
            };
            providers.extend(provider.map(|provider| (*digest, provider)));
        }
        Ok(Remote { descriptors, providers: providers.into_iter().collect() })
    }
}

/// Has a variant live as long as the layer, or else as the record.
fn keep_variant(tx: &mut Tx<'_>, part: &Part, variant: BlobDigest) -> Result<(), CatalogueError> {
    // One that is still to be fetched needs no keeping.
    if !tx.has(variant)? {
        return Ok(());
    }
    if let Some(layer) = part.layer {
        return tx.add_edge(layer, variant);
    }
    match part.own() {
        Some((own, _)) if own != variant && tx.has(own)? => {
            // It may have come for another record.
            hold_blob(tx, part.record)?;
            tx.hold(&record::owner(part.record), variant)
        }
        _ => Ok(()),
    }
}

fn compression_of(media_type: &str) -> Option<Compression> {
    match classify(&MediaType::from(media_type)) {
        Some(MediaClass::Layer(compression)) => Some(compression),
        _ => None,
    }
}

/// A blob of our own making, as a record keeps it.
fn made_row(blob: &LayerBlob, diff_id: DiffId) -> Chosen {
    let row = BlobRow {
        digest: Some(blob.digest),
        diff_id,
        media_type: media_type(blob.compression).to_string(),
        size_bytes: blob.size_bytes,
        urls: Vec::new(),
        annotations: Vec::new(),
    };
    (blob.digest, row)
}

fn descriptor(digest: BlobDigest, blob: &BlobRow, created_at: Stamp, prefer_non_distributable: bool) -> Descriptor {
    // Without a place to have it from there is no reason not to distribute it, whatever it was called once.
    let (urls, media_type) = match prefer_non_distributable && !blob.urls.is_empty() {
        true => (blob.urls.clone(), non_distributable(&blob.media_type)),
        false => (Vec::new(), distributable(&blob.media_type)),
    };
    let mut descriptor = Descriptor::new(MediaType::from(media_type), digest, blob.size_bytes);
    descriptor.urls = urls;
    descriptor.annotations = blob.annotations.iter().cloned().collect();
    descriptor.annotations.insert(UNCOMPRESSED.to_owned(), blob.diff_id.to_string());
    descriptor.annotations.insert(CREATED_AT.to_owned(), rfc3339(created_at));
    descriptor
}

/// Media types of layers that may be pushed, and of the same that should not be.
const DISTRIBUTABLE: [(&str, &str); 5] = [
    ("application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.nondistributable.v1.tar"),
    ("application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
    ("application/vnd.oci.image.layer.v1.tar+zstd", "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd"),
    ("application/vnd.docker.image.rootfs.diff.tar", "application/vnd.docker.image.rootfs.foreign.diff.tar"),
    ("application/vnd.docker.image.rootfs.diff.tar.gzip", "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
];

fn non_distributable(media_type: &str) -> &str {
    DISTRIBUTABLE.iter().find(|(plain, _)| *plain == media_type).map_or(media_type, |(_, foreign)| foreign)
}

fn distributable(media_type: &str) -> &str {
    DISTRIBUTABLE.iter().find(|(_, foreign)| *foreign == media_type).map_or(media_type, |(plain, _)| plain)
}

fn rfc3339(stamp: Stamp) -> String {
    let micros = i64::try_from(stamp.as_micros()).unwrap_or(i64::MAX);
    jiff::Timestamp::from_microsecond(micros).unwrap_or(jiff::Timestamp::MAX).to_string()
}

/// One of each list, in all ways, the first of each first; the last lists vary first.
fn combinations(choices: &[Vec<Chosen>]) -> Vec<Vec<&Chosen>> {
    let mut at = vec![0; choices.len()];
    let mut all = Vec::new();
    loop {
        all.push(choices.iter().zip(&at).map(|(choices, at)| &choices[*at]).collect());
        let turns = (0..at.len()).rev().find(|place| at[*place] + 1 < choices[*place].len());
        match turns {
            Some(place) if all.len() < REMOTES_MAX => {
                at[place] += 1;
                at[place + 1..].fill(0);
            }
            _ => return all,
        }
    }
}

/// What chains are made of so far; both `None` for layers that add nothing.
#[derive(Debug, Clone, Copy, Default)]
struct Chain {
    chain_id: Option<ChainId>,
    blob_chain_id: Option<BlobDigest>,
}

impl Chain {
    fn extend(self, (blob, diff_id): (BlobDigest, DiffId)) -> Self {
        Self {
            chain_id: Some(ChainId::extend(self.chain_id, diff_id)),
            blob_chain_id: Some(extend_blob_chain(self.blob_chain_id, blob, diff_id)),
        }
    }
}

/// Gives a record, and all below it that have none, the chain IDs of their walks. `made` says which blobs stand for the
/// records of the walk.
fn set_chains(
    tx: &mut Tx<'_>,
    id: RecordId,
    made: &HashMap<RecordId, Vec<(BlobDigest, DiffId)>>,
) -> Result<(), CatalogueError> {
    let own = |chain: Chain, id: RecordId| made.get(&id).into_iter().flatten().fold(chain, |c, blob| c.extend(*blob));
    let mut known: HashMap<RecordId, Chain> = HashMap::new();
    let mut begun = HashSet::new();
    let mut pending = vec![id];
    while let Some(at) = pending.last().copied() {
        let Some(row) = record::get(tx, at)? else { return Ok(()) };
        let there = Chain { chain_id: row.chain_id, blob_chain_id: row.blob_chain_id };
        if known.contains_key(&at) || there.blob_chain_id.is_some() {
            known.entry(at).or_insert(there);
            pending.pop();
            continue;
        }
        if begun.insert(at) {
            match &row.parents {
                Parents::None => {}
                Parents::Layer(parent) => pending.push(*parent),
                Parents::Merge(parents) => pending.extend(parents),
                // What it leads from and to is no part of it.
                Parents::Diff { .. } => {}
            }
            if pending.last() != Some(&at) {
                continue;
            }
        }
        pending.pop();
        let chain = match &row.parents {
            Parents::None => own(Chain::default(), at),
            Parents::Layer(parent) => own(known.get(parent).copied().unwrap_or_default(), at),
            Parents::Merge(_) | Parents::Diff { .. } => match record::walk(tx, at)? {
                Ok(walk) => walk.iter().fold(Chain::default(), |chain, (id, _)| own(chain, *id)),
                Err(_) => return Ok(()),
            },
        };
        record::change(tx, at, |row| {
            row.chain_id = chain.chain_id;
            row.blob_chain_id = chain.blob_chain_id;
        })?;
        known.insert(at, chain);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(name: &str) -> Chosen {
        let digest = BlobDigest::of(name.as_bytes());
        let blob = LayerBlob { digest, size_bytes: 1, compression: Compression::Gzip };
        made_row(&blob, DiffId::from_bytes([0; 32]))
    }

    #[test]
    fn combinations_are_all_there_are_the_first_choices_first() {
        let choices = [vec![chosen("a")], vec![chosen("b"), chosen("B")], vec![chosen("c"), chosen("C")]];
        let listed: Vec<Vec<BlobDigest>> =
            combinations(&choices).into_iter().map(|chain| chain.iter().map(|(digest, _)| *digest).collect()).collect();
        let of = |names: [&str; 3]| names.map(|name| BlobDigest::of(name.as_bytes())).to_vec();
        let expected = [["a", "b", "c"], ["a", "b", "C"], ["a", "B", "c"], ["a", "B", "C"]].map(of);
        assert_eq!(listed, expected);
        assert_eq!(combinations(&[]).len(), 1, "of nothing there is one chain, the empty one");
    }

    #[test]
    fn combinations_end_at_their_limit() {
        let choices: Vec<_> = (0..40).map(|at| vec![chosen(&format!("a{at}")), chosen(&format!("b{at}"))]).collect();
        assert_eq!(combinations(&choices).len(), REMOTES_MAX);
    }

    #[test]
    fn media_types_map_there_and_back_and_unknown_ones_stay() {
        for (plain, foreign) in DISTRIBUTABLE {
            assert_eq!((non_distributable(plain), distributable(foreign)), (foreign, plain));
            assert_eq!((non_distributable(foreign), distributable(plain)), (foreign, plain));
        }
        assert_eq!(distributable("application/x"), "application/x");
    }

    #[test]
    fn times_are_rfc_3339_with_as_many_digits_as_needed() {
        assert_eq!(rfc3339(Stamp::from_micros(0)), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(Stamp::from_micros(1_646_092_800_120_000)), "2022-03-01T00:00:00.12Z");
    }

    #[test]
    fn formats_have_names_and_one_of_them_is_refused() {
        for (format, name) in LayerFormat::NAMES {
            assert_eq!(LayerFormat::parse(name).unwrap(), format);
            assert_eq!(format.name(), name);
        }
        assert!(LayerFormat::parse("lz4").is_err());
        assert!(matches!(LayerFormat::Estargz.compression(), Err(CacheError::Unwritable { .. })));
    }
}
