//! Blobs become layers, layers become blobs.
//!
//! A [`Transfer`] is one such piece of work: what it makes is held by its lease. Layers of one request are worked on in
//! parallel; each blob is read once, hashed, decompressed, unpacked and kept on the way. Nothing is visible until all
//! of them are whole.
//!
//! ```text
//! mod.rs    blobs, archives and trees become layers
//! out.rs    layers become tars and blobs again
//! known.rs  which blob holds which layer's tar
//! repack.rs layers are kept in another form
//! ```

mod known;
mod out;
mod repack;

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::num::NonZero;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::sync::PoisonError;

use plies_archive::compress::{self, DecodeError};
use plies_archive::hash::HashingReader;
use plies_archive::tarsplit::{self, AssembleError, Recorder};
use plies_archive::{
    ApplyError, ApplyStyle, DiffError, Limits, Packed, Received, Root, UnpackError, diff_trees, erofs, is_newer,
    layer_to_tar, pack, receive, tar, unpack,
};
use plies_oci::{BlobDigest, ChainId, Compression, Descriptor, DiffId, ErrorKind, Family};

pub use known::{blobs_of_diff_id, diff_id_of_blob};
pub(crate) use known::{check_known, forget, gone, is_outgrown, trace_clamped};
use known::{clamped, record_blob, remember_blob, remember_clamped};

use crate::cancel::canceled_inside;
use crate::catalogue::CatalogueError;
use crate::progress::{Outcome, Progress, Task, Watched};
use crate::sync::{Mutex, thread};
use crate::write_back::{SyncAhead, WrittenBack};
use crate::{
    ActiveId, ActiveOptions, Attach, BlobError, Cancel, Canceled, CommitError, Expected, FinishedStage, Ingest,
    IngestError, IngestRef, LayerContents, LayerError, LayerId, Lease, Mounted, SnapshotError, SnapshotId, Stage,
    Store, packed, tree,
};

/// Buffer in front of a pipe between two threads: as much as a pipe holds (pipe(7)).
const PIPE_BYTES: usize = 64 << 10;

/// Threads that take in layers at once, at most: beyond that they wait for the disk, and each holds buffers and a
/// decompressor's window.
const WORKERS_MAX: usize = 8;

/// Threads that take in layers at once which come over a network: docker's `max-concurrent-downloads`.
const DOWNLOADS: usize = 3;

/// Why a layer could not be taken in or given out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransferError {
    /// A blob's archive could not be unpacked.
    #[error("layer {digest}")]
    Unpack {
        /// The blob.
        digest: String,
        /// What is wrong with it.
        #[source]
        source: UnpackError,
    },
    /// A blob does not decompress to the tar that its image promises.
    #[error("layer {digest}: its tar has diff ID {actual}, the image's config says {expected}")]
    DiffIdMismatch {
        /// The blob.
        digest: String,
        /// As the config says.
        expected: DiffId,
        /// As computed.
        actual: DiffId,
    },
    /// A layer's bytes could not be read.
    #[error("read layer {digest}")]
    Read {
        /// The blob.
        digest: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A layer needs files of the layers below it, and those can't be mounted with it.
    #[error("layer {digest} does not fit on the layers below it")]
    Base {
        /// The blob.
        digest: String,
        /// Why.
        #[source]
        source: SnapshotError,
    },
    /// Neither a blob nor a layer of this diff ID is here any more.
    #[error("layer with diff ID {diff_id} is not in the store")]
    Gone {
        /// The layer.
        diff_id: DiffId,
    },
    /// A layer that was changed on disk: its tar is no longer what it was.
    #[error("layer with diff ID {diff_id} was changed on disk: its tar now has {actual}")]
    Changed {
        /// The layer.
        diff_id: DiffId,
        /// What its files give now.
        actual: DiffId,
    },
    /// A layer's tar could not be put together again.
    #[error("assemble the tar of layer {layer}")]
    Assemble {
        /// The layer.
        layer: LayerId,
        /// Why.
        #[source]
        source: AssembleError,
    },
    /// A layer's tar could not be written.
    #[error("write layer {layer} as a tar")]
    Diff {
        /// The layer.
        layer: LayerId,
        /// Why.
        #[source]
        source: DiffError,
    },
    /// A layer's tar could not be handed out.
    #[error("write the tar of the layer with diff ID {diff_id}")]
    Write {
        /// The layer.
        diff_id: DiffId,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What was written to an active could not be read.
    #[error("read the changes in active {active}")]
    Changes {
        /// The active.
        active: ActiveId,
        /// Why.
        #[source]
        source: DiffError,
    },
    /// A file of our own in the run directory.
    #[error("{op} a scratch file")]
    Scratch {
        /// What was tried.
        op: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Beginning a blob.
    #[error("begin a blob")]
    Ingest(#[from] IngestError),
    /// Finishing a blob.
    #[error("keep a blob")]
    Commit(#[from] CommitError),
    /// Reading a blob.
    #[error("read a blob")]
    Blob(#[from] BlobError),
    /// Making a layer.
    #[error("keep a layer")]
    Layer(#[from] LayerError),
    /// Making a snapshot.
    #[error("stack layers")]
    Snapshot(#[from] SnapshotError),
    /// The catalogue failed.
    #[error("read or change the catalogue")]
    Catalogue(#[from] CatalogueError),
    /// The caller asked to stop.
    #[error(transparent)]
    Canceled(#[from] Canceled),
}

impl TransferError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unpack { source, .. } => source.kind(),
            Self::DiffIdMismatch { .. } | Self::Changed { .. } | Self::Gone { .. } => ErrorKind::DataLoss,
            Self::Read { source, .. } => DecodeError::kind_of(source),
            Self::Base { source, .. } | Self::Snapshot(source) => source.kind(),
            Self::Diff { source, .. } | Self::Changes { source, .. } => source.kind(),
            Self::Scratch { .. } | Self::Write { .. } => ErrorKind::Unavailable,
            Self::Assemble { source, .. } => source.kind(),
            Self::Ingest(source) => source.kind(),
            Self::Commit(source) => source.kind(),
            Self::Blob(source) => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
            Self::Canceled(source) => source.kind(),
        }
    }
}

/// A layer that somebody offers: an archive, a registry, a cache.
pub struct LayerSource<'a> {
    /// The blob's digest, where it is said. Docker's archives don't.
    pub digest: Option<BlobDigest>,
    /// The blob's length.
    pub size_bytes: u64,
    /// How the blob is compressed.
    pub compression: Compression,
    /// What the blob is said to decompress to.
    pub diff_id: DiffId,
    /// The chain that this layer completes.
    pub chain_id: ChainId,
    /// How dear the bytes are.
    pub origin: Origin,
    /// Begins to read the blob at a place: its start, or what a [`Origin::Far`] blob is to be resumed from. Asked only if
    /// it is not in the store.
    pub open: OpenBlob<'a>,
}

/// Begins to read a blob at a place.
pub type OpenBlob<'a> = Box<dyn Fn(u64) -> io::Result<Box<dyn Read + Send + 'a>> + Send + Sync + 'a>;

/// Where the bytes of a blob come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// They are at hand, and read whenever the blob is not here.
    Near,
    /// They come over a network. They are not fetched for a layer that is here, and those that came stay for a later try
    /// when the rest does not come.
    Far,
}

impl LayerSource<'_> {
    /// What messages call it.
    fn name(&self) -> String {
        self.digest.map_or_else(|| format!("with diff ID {}", self.diff_id), |digest| digest.to_string())
    }

    /// What a blob that comes from afar is resumed by.
    pub fn ingest_ref(&self) -> IngestRef {
        IngestRef::new(format!("layer-{}", self.name()))
    }

    fn expected(&self) -> Expected {
        Expected { digest: self.digest, size_bytes: Some(self.size_bytes) }
    }
}

impl fmt::Debug for LayerSource<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LayerSource({})", self.name())
    }
}

/// Layers that were taken in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    /// Their blobs, bottom first.
    pub blobs: Vec<LayerBlob>,
    /// The layers, bottom first.
    pub layers: Vec<LayerId>,
    /// All of them on top of what they were taken onto; `None` for the empty tree.
    pub snapshot: Option<SnapshotId>,
}

/// A layer that came as a tar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReceivedLayer {
    /// The digest of its tar.
    pub diff_id: DiffId,
    /// The chain that it completes.
    pub chain_id: ChainId,
    /// The layer.
    pub layer: LayerId,
    /// It on top of those below.
    pub snapshot: SnapshotId,
    /// Bytes of its tar.
    pub tar_bytes: u64,
}

/// A blob that holds a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerBlob {
    /// Which.
    pub digest: BlobDigest,
    /// Its length.
    pub size_bytes: u64,
    /// How it is compressed.
    pub compression: Compression,
}

impl LayerBlob {
    /// As a manifest of this family lists it.
    pub fn descriptor(&self, family: Family) -> Descriptor {
        Descriptor::new(family.layer(self.compression), self.digest, self.size_bytes)
    }
}

/// How layers are packed into blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packing {
    /// The format.
    pub compression: Compression,
    /// On the format's own scale; `None` is its default.
    pub level: Option<i32>,
    /// Also those layers whose blobs came from elsewhere packed in another way, which else stay as they are.
    pub force: bool,
}

impl Default for Packing {
    /// What every reader knows.
    fn default() -> Self {
        Self { compression: Compression::Gzip, level: None, force: false }
    }
}

/// What one worker made of one layer. Nothing of it is visible yet.
struct Worked {
    /// The blob, if it was not here.
    ingest: Option<Ingest>,
    /// The blob is not here and was not fetched, since its layer is here.
    blob_absent: bool,
    layer: WorkedLayer,
}

enum WorkedLayer {
    Here(LayerId),
    Staged(Box<FinishedStage>),
    /// It refers to files of the layers below: to be unpacked again over them.
    NeedsBase,
}

/// The bytes of a layer on their way from whoever offers them: whoever reads them also writes them into the blob.
struct Tee<'a> {
    blob: Watched<'a, Box<dyn Read + Send + 'a>>,
    ingest: Option<Ingest>,
    /// The next so many come out of the ingest, from an earlier try.
    kept_bytes: u64,
    /// They stopped coming, or could not be written, so nothing is known of those that are left.
    broken: bool,
}

impl Tee<'_> {
    fn pass(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.blob.read(buffer)?;
        let kept = self.kept_bytes.min(read as u64);
        self.kept_bytes -= kept;
        if let Some(ingest) = &mut self.ingest {
            ingest.write_all(&buffer[usize::try_from(kept).unwrap_or(read)..read])?;
        }
        Ok(read)
    }
}

impl Read for Tee<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let passed = self.pass(buffer);
        // A source that knows them to be wrong says so with this kind.
        self.broken |= passed.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::InvalidData);
        passed
    }
}

/// What is known of a request that turns blobs into layers or layers into blobs.
#[derive(Clone, Copy)]
pub struct Transfer<'a> {
    /// Holds whatever is made; its store is the one that is worked on.
    pub lease: &'a Lease,
    /// What archives may ask for.
    pub limits: &'a Limits,
    /// Told what happens.
    pub progress: &'a dyn Progress,
    /// Asked whether to go on.
    pub cancel: &'a Cancel,
}

impl fmt::Debug for Transfer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Transfer({})", self.lease.id())
    }
}

/// A layer that came by once.
enum Incoming {
    /// It stands by itself.
    Layer(Box<FinishedStage>),
    /// It has to be unpacked in another way: over the layers below it, or from an archive that its tree could not give back.
    Archive(File),
}

impl Transfer<'_> {
    fn store(&self) -> &Store {
        self.lease.store()
    }

    /// Takes in layers, bottom first, to stand on the layers `below`: blobs, layers and the snapshot of all. Blobs and
    /// layers that are here are not touched. The others are worked on in parallel, then synced and made visible
    /// together.
    ///
    /// # Errors
    /// [`TransferError`]; then nothing of them is visible.
    pub fn take_layers(&self, offered: &[LayerSource<'_>], below: &[LayerId]) -> Result<Taken, TransferError> {
        let (blobs, layers) = self.take_apart(offered)?;
        let (layers, snapshot) = self.stack(layers, offered, &blobs, below)?;
        Ok(Taken { blobs, layers, snapshot })
    }

    /// Takes in layers, each by itself: their blobs, and the layers, except those (`None`) that need what lies below
    /// them.
    ///
    /// # Errors
    /// [`TransferError`]; then nothing of them is visible.
    pub fn take_apart(
        &self,
        offered: &[LayerSource<'_>],
    ) -> Result<(Vec<LayerBlob>, Vec<Option<LayerId>>), TransferError> {
        // An image may list a layer more than once.
        let mut unique: Vec<&LayerSource<'_>> = Vec::new();
        let place: Vec<usize> = offered
            .iter()
            .map(|offer| {
                let same = |have: &&LayerSource<'_>| have.diff_id == offer.diff_id && have.digest == offer.digest;
                unique.iter().position(same).unwrap_or_else(|| {
                    unique.push(offer);
                    unique.len() - 1
                })
            })
            .collect();
        // Waiting for a network is not computing.
        let is_far = unique.iter().any(|offer| offer.origin == Origin::Far);
        let workers = if is_far { DOWNLOADS } else { threads().get().min(WORKERS_MAX) };
        let worked = self.syncing_ahead(|ahead| {
            parallel(&unique, workers, |offer| offer.size_bytes, |offer| self.work_on(offer, ahead))
        })??;

        let (mut ingests, mut layers, mut absent) = (Vec::new(), Vec::new(), Vec::new());
        for (work, offer) in worked.into_iter().zip(&unique) {
            ingests.push(work.ingest.map(|ingest| (ingest, offer.expected())));
            layers.push(work.layer);
            absent.push(work.blob_absent);
        }
        let blobs = self.publish_blobs(ingests, &unique)?;
        let layers = self.publish_layers(layers, &unique)?;
        let rows = unique.iter().zip(&blobs).zip(&layers).zip(&absent).filter(|(_, absent)| !**absent);
        self.connect(rows.map(|(((offer, blob), layer), _)| (offer.diff_id, *blob, *layer)))?;

        Ok((place.iter().map(|at| blobs[*at]).collect(), place.iter().map(|at| layers[*at]).collect()))
    }

    /// Does `work`, which makes many files, and syncs them while it goes on.
    fn syncing_ahead<T>(&self, work: impl FnOnce(&SyncAhead) -> T) -> Result<T, TransferError> {
        let path = &self.store().inner.paths.layers;
        let done = tree::open_own(path).and_then(|layers| SyncAhead::during(layers, path, work));
        Ok(done.map_err(LayerError::from)?)
    }

    /// Does for one layer what is missing of it.
    fn work_on(&self, offer: &LayerSource<'_>, ahead: &SyncAhead) -> Result<Worked, TransferError> {
        let progress = self.progress;
        let name = format!("layer {}", offer.name());
        let task = Task::start(progress, &name, Some(offer.size_bytes));
        let layer = match self.hold_layer(offer.diff_id)? {
            None => self.hold_layer_of_chain(offer.chain_id)?,
            found => found,
        };
        let (here, known) = self.look_for(offer)?;
        let blob_absent = here.is_none() && offer.origin == Origin::Far;
        if let (Some(layer), true) = (layer, known || blob_absent) {
            task.end(Outcome::Cached);
            return Ok(Worked { ingest: None, blob_absent, layer: WorkedLayer::Here(layer) });
        }
        let (layer, ingest) = self.with_bytes(offer, here, &task, |tee| match layer {
            Some(layer) => self.check_diff_id(tee, offer).map(|()| WorkedLayer::Here(layer)),
            None => self.unpack_alone(tee, offer, ahead),
        })?;
        task.end(Outcome::Done);
        Ok(Worked { ingest, blob_absent: false, layer })
    }

    /// The self-contained layer of a diff ID, held from now on. One that has it by another program's word is read first: whoever
    /// asks for it here did not ask that program.
    pub(crate) fn hold_layer(&self, diff_id: DiffId) -> Result<Option<LayerId>, TransferError> {
        let layers = self.store().layers();
        let Some(layer) = layers.hold_by_diff_id(diff_id, self.lease)? else { return Ok(None) };
        // A row whose files are gone is no layer to build on.
        layers.root(layer)?;
        if layers.info(layer)?.unverified {
            match self.tree_diff_id(layer)? {
                actual if actual == diff_id => layers.set_verified(layer)?,
                actual => return Err(TransferError::Changed { diff_id, actual }),
            }
        }
        Ok(Some(layer))
    }

    /// The layer that is good for this chain only, held from now on.
    fn hold_layer_of_chain(&self, chain_id: ChainId) -> Result<Option<LayerId>, TransferError> {
        let layers = self.store().layers();
        let found = layers.hold_by_chain(chain_id, self.lease)?;
        found.map(|layer| layers.root(layer)).transpose()?;
        Ok(found)
    }

    /// The blob that is offered, if it is here, and whether we found ourselves that it decompresses to its diff ID: what
    /// whoever offers it says of it may be a lie.
    fn look_for(&self, offer: &LayerSource<'_>) -> Result<(Option<BlobDigest>, bool), TransferError> {
        let here = match offer.digest {
            Some(digest) => self.lease.hold_if_present(digest)?.then_some(digest),
            None => None,
        };
        let known = here.map(|digest| self.store().read(|rows| diff_id_of_blob(rows, digest))).transpose()?.flatten();
        Ok((here, known == Some(offer.diff_id)))
    }

    /// Does `work` with the bytes that are offered: those that are here, or those that somebody brings. All of them have
    /// passed when it is done; the ingest has those that were not here.
    fn with_bytes<T>(
        &self,
        offer: &LayerSource<'_>,
        here: Option<BlobDigest>,
        task: &Task<'_>,
        work: impl FnOnce(&mut Tee<'_>) -> Result<T, TransferError>,
    ) -> Result<(T, Option<Ingest>), TransferError> {
        let mut tee = self.open(offer, here, task)?;
        let worked = work(&mut tee).and_then(|made| {
            // Whatever the decompressor left, so that the blob is whole.
            io::copy(&mut tee, &mut io::sink()).map_err(|source| read_error(offer, source))?;
            Ok(made)
        });
        match worked {
            Ok(made) => Ok((made, tee.ingest)),
            Err(error) if tee.broken || offer.origin == Origin::Near => {
                tee.ingest.map_or(Ok(()), keep_if_any)?;
                Err(error)
            }
            Err(error) => {
                // Other bytes than were asked for explain whatever came of them. To know, the rest is needed.
                let whole = io::copy(&mut tee, &mut io::sink()).is_ok();
                let ingest = tee.ingest.filter(|_| whole);
                let checked = ingest.map_or(Ok(()), |ingest| ingest.verify(offer.expected()).map(drop));
                checked.map_or_else(|mismatch| Err(mismatch.into()), |()| Err(error))
            }
        }
    }

    /// Opens the bytes that are offered, and what they are to be kept in, unless they are here.
    fn open<'o>(
        &'o self,
        offer: &'o LayerSource<'_>,
        here: Option<BlobDigest>,
        task: &'o Task<'_>,
    ) -> Result<Tee<'o>, TransferError> {
        let content = self.store().content();
        let tee = |bytes, ingest, kept_bytes| {
            let blob = Watched { inner: bytes, task: Some(task), cancel: self.cancel };
            Tee { blob, ingest, kept_bytes, broken: false }
        };
        if let Some(digest) = here {
            return Ok(tee(Box::new(content.open(digest)?), None, 0));
        }
        let mut ingest = match offer.origin {
            Origin::Near => content.ingest_unnamed()?,
            Origin::Far => match content.ingest(offer.ingest_ref()) {
                // Somebody else fetches it right now. To wait for them could be to wait for each other.
                Err(IngestError::Busy { .. }) => content.ingest_unnamed()?,
                opened => opened?,
            },
        };
        if ingest.offset_bytes() > offer.size_bytes {
            ingest.restart()?;
        }
        // It is unpacked as it comes in, and read again only if it is to go elsewhere.
        ingest.leave_the_cache();
        let kept = ingest.offset_bytes();
        let failed = |source| read_error(offer, source);
        // One byte too many tells that it is too long; more would only fill the disk.
        let left = (offer.size_bytes - kept).saturating_add(1);
        let before = ingest.read_back().map_err(failed)?.take(kept);
        let bytes: Box<dyn Read + Send + 'o> = match kept == offer.size_bytes && kept > 0 {
            true => Box::new(before),
            false => match (offer.open)(kept) {
                Ok(rest) => Box::new(before.chain(rest.take(left))),
                Err(error) => {
                    keep_if_any(ingest)?;
                    return Err(failed(error));
                }
            },
        };
        Ok(tee(bytes, Some(ingest), kept))
    }

    /// Takes in a layer's blob and does not unpack it: reads it from whoever offers it, unless it is here, and checks
    /// that it decompresses to the tar of its diff ID.
    ///
    /// # Errors
    /// [`TransferError`]; then nothing of it is visible.
    pub fn take_blob(&self, offer: &LayerSource<'_>) -> Result<LayerBlob, TransferError> {
        let name = format!("layer {}", offer.name());
        let task = Task::start(self.progress, &name, Some(offer.size_bytes));
        let (here, known) = self.look_for(offer)?;
        if let (Some(digest), true) = (here, known) {
            task.end(Outcome::Cached);
            return Ok(LayerBlob { digest, size_bytes: offer.size_bytes, compression: offer.compression });
        }
        let ((), ingest) = self.with_bytes(offer, here, &task, |tee| self.check_diff_id(tee, offer))?;
        let ingest = ingest.map(|ingest| (ingest, offer.expected()));
        let taken = self.publish_blobs(vec![ingest], &[offer])?;
        let blob = *taken.first().expect("because one source makes one blob");
        self.store().write(|tx| remember_blob(tx, offer.diff_id, &blob, None))?;
        task.end(Outcome::Done);
        Ok(blob)
    }

    /// Unpacks a layer by itself, without the layers below it.
    fn unpack_alone(
        &self,
        blob: &mut Tee<'_>,
        offer: &LayerSource<'_>,
        ahead: &SyncAhead,
    ) -> Result<WorkedLayer, TransferError> {
        if !self.store().inner.driver.packs() {
            return self.unpack_to_tree(ahead.counted(blob), offer.compression, offer);
        }
        let stage = Stage::without_tree(self.store())?;
        let tar = stage.tar_file()?;
        let packed = checked(offer, pack(blob, offer.compression, WrittenBack::new(&tar), self.limits), |packed| {
            packed.diff_id
        })?;
        match packed.index {
            Some(index) if index.applied().opaque_root => Ok(WorkedLayer::NeedsBase),
            Some(index) => {
                let contents = packed_contents(&stage, &index, packed.diff_id, packed.tar_bytes)?;
                Ok(WorkedLayer::Staged(Box::new(stage.finish(contents))))
            }
            // Here is a tar to unpack from, instead of the blob.
            None => self.unpack_to_tree(ahead.counted(FromStart { file: tar, offset: 0 }), Compression::None, offer),
        }
    }

    /// Unpacks a layer by itself into a directory.
    fn unpack_to_tree(
        &self,
        tar: impl Read + Send,
        compression: Compression,
        offer: &LayerSource<'_>,
    ) -> Result<WorkedLayer, TransferError> {
        let mut stage = self.store().layers().stage()?;
        let record = Recorder::new(tarsplit::Output::File(stage.tar_split_file()?));
        let unpacked = unpack(tar, compression, stage.root(), ApplyStyle::Layer, self.limits, Some(record));
        let unpacked = match unpacked {
            Err(UnpackError::Apply(ApplyError::NeedsBase { .. })) => return Ok(WorkedLayer::NeedsBase),
            other => checked(offer, other, |unpacked| unpacked.diff_id)?,
        };
        // The kernel does not know a root that hides everything below: such a layer is unpacked over what it hides.
        if unpacked.applied.opaque_root {
            return Ok(WorkedLayer::NeedsBase);
        }
        if unpacked.tar_split.is_none_or(|recorded| recorded.unfaithful.is_some()) {
            stage.forget_tar_split()?;
        }
        let contents = LayerContents {
            diff_id: Some(offer.diff_id),
            usage: unpacked.applied.usage,
            index: unpacked.applied.index,
            ..LayerContents::default()
        };
        Ok(WorkedLayer::Staged(Box::new(stage.finish(contents))))
    }

    /// Checks that a blob decompresses to the tar of its diff ID, for a layer that is here already.
    fn check_diff_id(&self, blob: &mut Tee<'_>, offer: &LayerSource<'_>) -> Result<(), TransferError> {
        let decoder = compress::Decoder::new(blob, offer.compression, self.limits);
        let mut tar = HashingReader::new(decoder.map_err(|source| read_error(offer, source))?);
        io::copy(&mut tar, &mut io::sink()).map_err(|source| read_error(offer, source))?;
        let (_, hashed) = tar.finish();
        same_diff_id(offer, DiffId::from_bytes(hashed.sha256))
    }

    fn publish_blobs(
        &self,
        ingests: Vec<Option<(Ingest, Expected)>>,
        offered: &[&LayerSource<'_>],
    ) -> Result<Vec<LayerBlob>, TransferError> {
        let new: Vec<bool> = ingests.iter().map(Option::is_some).collect();
        let mut committed =
            self.store().content().commit_all(ingests.into_iter().flatten().collect(), self.lease)?.into_iter();
        let blobs = new.iter().zip(offered).map(|(new, offer)| {
            let digest = if *new { committed.next() } else { offer.digest };
            LayerBlob {
                digest: digest.expect("because a blob without an ingest was found by its digest"),
                size_bytes: offer.size_bytes,
                compression: offer.compression,
            }
        });
        Ok(blobs.collect())
    }

    fn publish_layers(
        &self,
        worked: Vec<WorkedLayer>,
        offered: &[&LayerSource<'_>],
    ) -> Result<Vec<Option<LayerId>>, TransferError> {
        debug_assert_eq!(worked.len(), offered.len());
        let (mut layers, mut staged, mut places) = (vec![None; worked.len()], Vec::new(), Vec::new());
        for (at, work) in worked.into_iter().enumerate() {
            match work {
                WorkedLayer::Here(layer) => layers[at] = Some(layer),
                WorkedLayer::NeedsBase => {}
                WorkedLayer::Staged(stage) => {
                    staged.push(*stage);
                    places.push(at);
                }
            }
        }
        for (at, layer) in places.into_iter().zip(self.store().layers().publish(self.lease, staged)?) {
            layers[at] = Some(layer);
        }
        Ok(layers)
    }

    /// Writes down which blob is which layer, and that the layer keeps its blob alive; for those only that were unpacked
    /// or hashed, since what an image's config says of a blob may be a lie.
    fn connect(
        &self,
        rows: impl Iterator<Item = (DiffId, LayerBlob, Option<LayerId>)> + Clone,
    ) -> Result<(), TransferError> {
        self.store().write(|tx| {
            for (diff_id, blob, layer) in rows.clone() {
                if let Some(layer) = layer {
                    record_blob(tx, diff_id, &blob, layer)?;
                }
            }
            Ok::<_, CatalogueError>(())
        })?;
        Ok(())
    }

    /// Makes the snapshot of the layers on top of those `below`. Those that turn out to need the layers below them are
    /// unpacked again, over the stack that they stand on, and kept for this chain alone.
    fn stack(
        &self,
        mut layers: Vec<Option<LayerId>>,
        offered: &[LayerSource<'_>],
        blobs: &[LayerBlob],
        below: &[LayerId],
    ) -> Result<(Vec<LayerId>, Option<SnapshotId>), TransferError> {
        loop {
            let whole: Vec<LayerId> = layers.iter().map_while(|layer| *layer).collect();
            let stack: Vec<LayerId> = below.iter().chain(&whole).copied().collect();
            let ensured = match stack.as_slice() {
                [] => Ok(None),
                stack => self.store().snapshots().ensure(stack, self.lease).map(Some),
            };
            let needs_base = match ensured {
                Ok(snapshot) if whole.len() == layers.len() => return Ok((whole, snapshot)),
                Ok(_) => whole.len(),
                Err(SnapshotError::NeedsBase { layer, path }) => {
                    let at = whole.iter().position(|have| *have == layer);
                    match at {
                        Some(at) if self.store().layers().info(layer)?.chain_id.is_none() => at,
                        at => {
                            let digest = at.map_or_else(|| layer.to_string(), |at| offered[at].name());
                            return Err(TransferError::Base {
                                digest,
                                source: SnapshotError::NeedsBase { layer, path },
                            });
                        }
                    }
                }
                Err(other) => return Err(other.into()),
            };
            let (offer, blob) = (&offered[needs_base], &blobs[needs_base]);
            layers[needs_base] = Some(self.unpack_over(&stack[..below.len() + needs_base], offer, blob)?);
        }
    }

    /// Unpacks a layer into the mounted tree of the layers below it.
    fn unpack_over(
        &self,
        below: &[LayerId],
        offer: &LayerSource<'_>,
        blob: &LayerBlob,
    ) -> Result<LayerId, TransferError> {
        if let Some(layer) = self.store().layers().hold_by_chain(offer.chain_id, self.lease)? {
            return Ok(layer);
        }
        // That a layer of this diff ID is here may be why the blob was not fetched.
        if !self.lease.hold_if_present(blob.digest)? {
            self.take_blob(offer)?;
        }
        let active = self.unpack_into_active(below, offer.diff_id, blob)?;
        let layer = self.store().snapshots().seal_for_chain(active, offer.diff_id, offer.chain_id, self.lease)?;
        self.store().write(|tx| record_blob(tx, offer.diff_id, blob, layer))?;
        Ok(layer)
    }

    /// Unpacks a blob that is here over the mounted tree of the layers `below`: an active that is to be sealed.
    fn unpack_into_active(
        &self,
        below: &[LayerId],
        diff_id: DiffId,
        blob: &LayerBlob,
    ) -> Result<ActiveId, TransferError> {
        let Self { lease, cancel, .. } = *self;
        let snapshots = self.store().snapshots();
        let base = if below.is_empty() { None } else { Some(snapshots.ensure(below, lease)?) };
        let active = snapshots.prepare(base, lease, ActiveOptions { volatile: true })?;
        let mounted = snapshots.mount_active(active, Attach::Detached)?;
        let bytes = Watched { inner: self.store().content().open(blob.digest)?, task: None, cancel };
        let unpacked = unpack(bytes, blob.compression, mounted.root(), ApplyStyle::Merged, self.limits, None);
        let open = |_| Err(io::ErrorKind::NotFound.into());
        checked(&blob_source(blob, diff_id, Box::new(open)), unpacked, |unpacked| unpacked.diff_id)?;
        mounted.unmount()?;
        Ok(active)
    }

    /// Takes in one layer from a stream that comes by once, to stand on the layers `below`, which end the chain `parent`:
    /// unpacked, recorded and hashed in one pass, and no blob is kept. Only where the layer's tree could not give its
    /// tar back, or needs the layers below it, is the tar kept as well, assembled from what was unpacked until then.
    ///
    /// A layer that is here already is read to the end all the same, since its digest is only known then; what was
    /// unpacked goes.
    ///
    /// # Errors
    /// [`TransferError`]; then nothing of it is visible.
    pub fn receive_layer(
        &self,
        stream: impl Read + Send,
        compression: Compression,
        below: &[LayerId],
        parent: Option<ChainId>,
    ) -> Result<ReceivedLayer, TransferError> {
        let Self { lease, cancel, progress, .. } = *self;
        let task = Task::start(progress, "receive layer", None);
        let layers = self.store().layers();
        let stream = Watched { inner: stream, task: Some(&task), cancel };
        let (diff_id, tar_bytes, incoming) = match self.store().inner.driver.packs() {
            true => self.receive_tar(stream, compression)?,
            false => self.receive_tree(stream, compression)?,
        };
        let chain_id = ChainId::extend(parent, diff_id);
        let done = |layer, snapshot| ReceivedLayer { diff_id, chain_id, layer, snapshot, tar_bytes };
        let source = match incoming {
            Incoming::Layer(staged) => {
                let known = match self.hold_layer(diff_id)? {
                    None => self.hold_layer_of_chain(chain_id)?,
                    found => found,
                };
                let layer = match known {
                    Some(layer) => layer,
                    None => {
                        let published = layers.publish(lease, vec![*staged])?;
                        *published.first().expect("because one stage makes one layer")
                    }
                };
                let stack: Vec<LayerId> = below.iter().copied().chain([layer]).collect();
                match self.store().snapshots().ensure(&stack, lease) {
                    Ok(snapshot) => {
                        task.end(Outcome::Done);
                        return Ok(done(layer, snapshot));
                    }
                    Err(SnapshotError::NeedsBase { layer: at, .. }) if at == layer => {}
                    Err(other) => return Err(other.into()),
                }
                let blob = self.make_blob(diff_id, Some(layer), Compression::None, None)?;
                let open = |_| Err(io::ErrorKind::NotFound.into());
                self.plain_source(blob.digest, tar_bytes, diff_id, chain_id, Box::new(open))
            }
            Incoming::Archive(archive) => {
                // The digest of a plain blob is its diff ID.
                let digest = BlobDigest::from_bytes(*diff_id.as_bytes());
                let open = move |offset| {
                    let file = archive.try_clone()?;
                    Ok(Box::new(FromStart { file, offset }) as Box<dyn Read + Send>)
                };
                self.plain_source(digest, tar_bytes, diff_id, chain_id, Box::new(open))
            }
        };
        task.end(Outcome::Done);
        let taken = self.take_layers(&[source], below)?;
        let (layer, snapshot) = taken.layers.first().zip(taken.snapshot).expect("because one layer was offered");
        Ok(done(*layer, snapshot))
    }

    /// Makes a tree of a layer that comes by, in a stage, with what it takes to give the archive back.
    fn receive_tree(
        &self,
        stream: impl Read + Send,
        compression: Compression,
    ) -> Result<(DiffId, u64, Incoming), TransferError> {
        let mut stage = self.store().layers().stage()?;
        let recorder = Recorder::new(tarsplit::Output::File(stage.tar_split_file()?)).with_spool(self.scratch_file()?);
        let received = receive(stream, compression, stage.root(), self.limits, recorder);
        let Received { diff_id, unpacked_bytes, applied, recorded } =
            received.map_err(unpack_error(|| "from a stream".to_owned()))?;
        let incoming = match (applied, recorded.archive) {
            (Some(applied), None) if !applied.opaque_root => {
                debug_assert!(recorded.unfaithful.is_none(), "an archive that no tree gives back is spooled");
                let (usage, index) = (applied.usage, applied.index);
                let contents = LayerContents { diff_id: Some(diff_id), usage, index, ..LayerContents::default() };
                Incoming::Layer(Box::new(stage.finish(contents)))
            }
            (_, Some(archive)) => Incoming::Archive(archive),
            // It hides all that is below it, which was seen only when it was all here.
            (_, None) => {
                let mut archive = BufWriter::new(self.scratch_file()?);
                let root = Root::new(stage.root()).map_err(|error| self.reading("of a stage", error))?;
                let open = |name: &[u8], _| tarsplit::open_in(&root, name);
                tarsplit::assemble(stage.read_tar_split()?, open, &mut archive)
                    .map_err(|source| TransferError::Assemble { layer: stage.id(), source })?;
                Incoming::Archive(archive.into_inner().map_err(|error| scratch("write")(error.into_error()))?)
            }
        };
        Ok((diff_id, unpacked_bytes, incoming))
    }

    /// Writes down the tar of a layer that comes by, in a stage, with its index if it can have one.
    fn receive_tar(
        &self,
        stream: impl Read + Send,
        compression: Compression,
    ) -> Result<(DiffId, u64, Incoming), TransferError> {
        let stage = Stage::without_tree(self.store())?;
        let tar = stage.tar_file()?;
        let Packed { diff_id, tar_bytes, index } = pack(stream, compression, WrittenBack::new(&tar), self.limits)
            .map_err(unpack_error(|| "from a stream".to_owned()))?;
        let incoming = match index {
            Some(index) if !index.applied().opaque_root => {
                let contents = packed_contents(&stage, &index, diff_id, tar_bytes)?;
                Incoming::Layer(Box::new(stage.finish(contents)))
            }
            _ => Incoming::Archive(tar),
        };
        Ok((diff_id, tar_bytes, incoming))
    }

    fn plain_source<'s>(
        &self,
        digest: BlobDigest,
        size_bytes: u64,
        diff_id: DiffId,
        chain_id: ChainId,
        open: OpenBlob<'s>,
    ) -> LayerSource<'s> {
        let (digest, compression, origin) = (Some(digest), Compression::None, Origin::Near);
        LayerSource { digest, size_bytes, compression, diff_id, chain_id, origin, open }
    }

    /// A file that nobody sees and that goes with its last handle.
    fn scratch_file(&self) -> Result<File, TransferError> {
        use rustix::fs::{Mode, OFlags};
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = rustix::fs::open(self.store().run_dir(), flags, Mode::from_raw_mode(0o600));
        file.map(File::from).map_err(|errno| scratch("make")(errno.into()))
    }

    /// Makes a layer of what was written to an active, which stays as it is: the changes as against the tree below it,
    /// to stand on the layers `below`, which end the chain `parent`.
    ///
    /// # Errors
    /// [`TransferError`]; [`SnapshotError::InUse`] while the active is mounted by this process.
    pub fn receive_changes(
        &self,
        active: ActiveId,
        below: &[LayerId],
        parent: Option<ChainId>,
    ) -> Result<ReceivedLayer, TransferError> {
        let snapshots = self.store().snapshots();
        let base = match snapshots.active(active)?.base {
            Some(base) => Some(snapshots.view(base, Attach::Detached)?),
            None => None,
        };
        let mounted = snapshots.mount_active(active, Attach::Detached)?;
        let (lower, upper) = (base.as_ref().map(|base| base.root()), mounted.root());
        let write = |tar: &mut tar::Writer<_>| diff_trees(lower, upper, tar).map(drop);
        let received = self.receive_written(write, below, parent, |source| TransferError::Changes { active, source });
        mounted.unmount()?;
        base.map_or(Ok(()), Mounted::unmount)?;
        received
    }

    /// Takes in the layer that another thread writes.
    fn receive_written(
        &self,
        write: impl FnOnce(&mut tar::Writer<BufWriter<io::PipeWriter>>) -> Result<(), DiffError> + Send,
        below: &[LayerId],
        parent: Option<ChainId>,
        failed: impl FnOnce(DiffError) -> TransferError,
    ) -> Result<ReceivedLayer, TransferError> {
        let (reader, writer) = io::pipe().map_err(scratch("make"))?;
        std::thread::scope(|scope| {
            let writing = scope.spawn(move || {
                let mut tar = tar::Writer::new(BufWriter::with_capacity(PIPE_BYTES, writer));
                write(&mut tar)?;
                let mut out = tar.finish()?;
                out.flush().map_err(|source| DiffError::Write(tar::WriteError::Write { source }))
            });
            let received = self.receive_layer(reader, Compression::None, below, parent);
            match writing.join().expect("because it does not panic") {
                Ok(()) => received,
                // Whoever receives says that the tar ends too early; or stopped reading for a reason of its own.
                Err(source) => match &received {
                    Err(TransferError::Unpack { .. }) | Ok(_) => Err(failed(source)),
                    Err(_) => received,
                },
            }
        })
    }

    /// The layer that a layer becomes when nothing in it may be later than `latest`, in whole seconds since 1970, to
    /// stand on the layers `below`, which end the chain `parent`: itself, or one that is made now and found again as
    /// long as something holds it. Held by the lease.
    ///
    /// # Errors
    /// [`TransferError`].
    pub fn clamped(
        &self,
        layer: LayerId,
        latest: i64,
        below: &[LayerId],
        parent: Option<ChainId>,
    ) -> Result<LayerId, TransferError> {
        if let Some(known) = self.store().read(|rows| clamped(rows, layer, latest))?
            && self.lease.hold_if_present(known)?
        {
            return Ok(known);
        }
        let layers = self.store().layers();
        let (root, index) = (layers.root(layer)?, layers.index(layer)?);
        let failed = |source| TransferError::Diff { layer, source };
        let time = tar::Timestamp { seconds: latest, nanos: 0 };
        let became = if is_newer(root.as_fd(), &index, time).map_err(failed)? {
            let write = |tar: &mut tar::Writer<_>| {
                tar.set_latest(Some(time));
                layer_to_tar(root.as_fd(), &index, tar).map(drop)
            };
            self.receive_written(write, below, parent, failed)?.layer
        } else {
            layer
        };
        self.store().write(|tx| remember_clamped(tx, layer, latest, became))?;
        Ok(became)
    }

    /// Unpacks a layer again, from one of its blobs or else from what its own tree and recording still give: a stage with the
    /// right diff ID, or nothing if there is no such source.
    pub(crate) fn restage(&self, layer: LayerId, diff_id: DiffId) -> Result<Option<FinishedStage>, TransferError> {
        let tried = |made: Result<Option<FinishedStage>, TransferError>| match made {
            Err(error @ TransferError::Canceled(_)) => Err(error),
            // A source that does not give the layer is none.
            other => Ok(other.ok().flatten()),
        };
        for blob in self.blobs_of(diff_id)? {
            let bytes = self.store().content().open(blob.digest);
            let made = bytes.map_err(Into::into).and_then(|bytes| self.restage_from(Box::new(bytes), &blob, diff_id));
            if let Some(stage) = tried(made)? {
                return Ok(Some(stage));
            }
        }
        let own = || -> Result<Option<FinishedStage>, TransferError> {
            let layers = self.store().layers();
            if layers.tar_split(layer)?.is_none() && layers.packed_tar(layer)?.is_none() {
                return Ok(None);
            }
            let mut spool = BufWriter::new(self.scratch_file()?);
            self.write_tree(layer, &mut spool)?;
            let file = spool.into_inner().map_err(|error| scratch("write")(error.into_error()))?;
            let size_bytes = file.metadata().map_err(scratch("stat"))?.len();
            let digest = BlobDigest::from_bytes(*diff_id.as_bytes());
            let plain = LayerBlob { digest, size_bytes, compression: Compression::None };
            self.restage_from(Box::new(FromStart { file, offset: 0 }), &plain, diff_id)
        };
        tried(own())
    }

    /// As [`Transfer::restage`], for a layer that completes a chain and needs the layers below it.
    pub(crate) fn restage_over(
        &self,
        below: &[LayerId],
        diff_id: DiffId,
        chain_id: ChainId,
    ) -> Result<Option<FinishedStage>, TransferError> {
        let Some(blob) = self.blobs_of(diff_id)?.first().copied() else { return Ok(None) };
        let active = self.unpack_into_active(below, diff_id, &blob)?;
        let known = LayerContents { diff_id: Some(diff_id), chain_id: Some(chain_id), ..LayerContents::default() };
        Ok(Some(self.store().snapshots().seal_to_stage(active, known)?))
    }

    fn restage_from(
        &self,
        bytes: Box<dyn Read + Send + '_>,
        blob: &LayerBlob,
        diff_id: DiffId,
    ) -> Result<Option<FinishedStage>, TransferError> {
        let open = |_| Err(io::ErrorKind::NotFound.into());
        let offer = blob_source(blob, diff_id, Box::new(open));
        let blob = Watched { inner: bytes, task: None, cancel: self.cancel };
        let mut tee = Tee { blob, ingest: None, kept_bytes: 0, broken: false };
        match self.syncing_ahead(|ahead| self.unpack_alone(&mut tee, &offer, ahead))?? {
            WorkedLayer::Staged(stage) => Ok(Some(*stage)),
            WorkedLayer::Here(_) | WorkedLayer::NeedsBase => Ok(None),
        }
    }
}

fn scratch(op: &'static str) -> impl FnOnce(io::Error) -> TransferError {
    move |source| TransferError::Scratch { op, source }
}

/// A file read by position: other handles of it have places of their own.
pub(crate) struct FromStart {
    pub(crate) file: File,
    pub(crate) offset: u64,
}

impl Read for FromStart {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read_at(buffer, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }
}

/// Leaves an ingest for a later try, unless there is nothing in it.
fn keep_if_any(ingest: Ingest) -> Result<(), IngestError> {
    if ingest.offset_bytes() == 0 { ingest.abort() } else { Ok(()) }
}

/// A blob that is here, as something that is offered.
fn blob_source<'a>(blob: &LayerBlob, diff_id: DiffId, open: OpenBlob<'a>) -> LayerSource<'a> {
    let LayerBlob { digest, size_bytes, compression } = *blob;
    let chain_id = ChainId::extend(None, diff_id);
    LayerSource { digest: Some(digest), size_bytes, compression, diff_id, chain_id, origin: Origin::Near, open }
}

fn read_error(offer: &LayerSource<'_>, source: io::Error) -> TransferError {
    match source.get_ref().and_then(|inner| inner.downcast_ref::<Canceled>()) {
        Some(canceled) => (*canceled).into(),
        None => TransferError::Read { digest: offer.name(), source },
    }
}

fn checked<T>(
    offer: &LayerSource<'_>,
    unpacked: Result<T, UnpackError>,
    diff_id: impl FnOnce(&T) -> DiffId,
) -> Result<T, TransferError> {
    let unpacked = unpacked.map_err(unpack_error(|| offer.name()))?;
    same_diff_id(offer, diff_id(&unpacked))?;
    Ok(unpacked)
}

fn unpack_error(digest: impl FnOnce() -> String) -> impl FnOnce(UnpackError) -> TransferError {
    move |source| match canceled_inside(&source) {
        true => Canceled.into(),
        false => TransferError::Unpack { digest: digest(), source },
    }
}

/// Writes the index of a stage's tar, and says what the layer is.
fn packed_contents(
    stage: &Stage,
    index: &erofs::Index,
    diff_id: DiffId,
    tar_bytes: u64,
) -> Result<LayerContents, LayerError> {
    packed::write_image(stage.dir(), index, diff_id, tar_bytes)?;
    let usage = packed::usage(stage.dir(), index.applied().usage)?;
    Ok(LayerContents {
        diff_id: Some(diff_id),
        usage,
        index: index.applied().index.clone(),
        ..LayerContents::default()
    })
}

fn same_diff_id(offer: &LayerSource<'_>, actual: DiffId) -> Result<(), TransferError> {
    if actual == offer.diff_id {
        return Ok(());
    }
    Err(TransferError::DiffIdMismatch { digest: offer.name(), expected: offer.diff_id, actual })
}

/// How many threads work at once.
pub fn threads() -> NonZero<usize> {
    std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN)
}

/// Does `work` for all `items` on `workers` threads, the largest first so that none is left over at the end. After the
/// first failure nothing new is begun, and that failure is the result.
///
/// # Errors
/// Those of `work`.
pub fn parallel<I: Sync, T: Send, E: Send>(
    items: &[I],
    workers: usize,
    weight: impl Fn(&I) -> u64,
    work: impl Fn(&I) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|at| std::cmp::Reverse(weight(&items[*at])));
    let queue = Mutex::new(VecDeque::from(order));
    let results: Mutex<Vec<Option<Result<T, E>>>> = Mutex::new(items.iter().map(|_| None).collect());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    thread::scope(|scope| {
        for _ in 0..workers.min(items.len()) {
            scope.spawn(|| {
                while let Some(at) = next() {
                    let result = work(&items[at]);
                    if result.is_err() {
                        queue.lock().unwrap_or_else(PoisonError::into_inner).clear();
                    }
                    results.lock().unwrap_or_else(PoisonError::into_inner)[at] = Some(result);
                }
            });
        }
    });
    let results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    // An item without a result was never begun, because another one failed: that one is in here.
    let mut done = Vec::with_capacity(items.len());
    let mut first_failure = None;
    for result in results.into_iter().flatten() {
        match result {
            Ok(value) => done.push(value),
            Err(error) => first_failure = first_failure.or(Some(error)),
        }
    }
    first_failure.map_or(Ok(done), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parallel_keeps_the_order_of_items() {
        let items: Vec<u64> = (0..100).collect();
        let doubled = parallel(&items, 4, |item| *item, |item| Ok::<_, ()>(item * 2)).unwrap();
        assert_eq!(doubled, items.iter().map(|item| item * 2).collect::<Vec<_>>());
    }

    #[test]
    fn parallel_begins_nothing_after_a_failure() {
        let begun = std::sync::atomic::AtomicUsize::new(0);
        let items: Vec<u64> = (0..1000).collect();
        let result = parallel(
            &items,
            WORKERS_MAX,
            |_| 1,
            |item| {
                begun.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if *item == 0 { Err("no") } else { Ok(()) }
            },
        );
        assert_eq!(result, Err("no"));
        assert!(begun.into_inner() <= WORKERS_MAX * 2, "workers went on");
    }
}
