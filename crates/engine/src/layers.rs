//! Blobs become layers, layers become blobs.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::num::NonZero;
use std::os::fd::AsFd as _;
use std::sync::{Mutex, PoisonError};

use plies_archive::compress::{self, DecodeError};
use plies_archive::hash::{HashingReader, HashingWriter};
use plies_archive::tar;
use plies_archive::tarsplit::{self, Recorder};
use plies_archive::{ApplyError, ApplyStyle, DiffError, UnpackError, Unpacked, layer_to_tar, unpack};
use plies_image::BlobRow;
use plies_oci::{BlobDigest, ChainId, Compression, Descriptor, DiffId, ErrorKind, MediaType};
use plies_store::{
    ActiveOptions, Attach, BlobError, CatalogueError, CommitError, Expected, FinishedStage, Ingest, IngestError,
    LayerContents, LayerError, LayerId, Lease, SnapshotError, SnapshotId, Tx,
};

use crate::archive::Section;
use crate::exec::Cancel;
use crate::progress::{Outcome, Progress, Task, Watched};
use crate::{Canceled, Engine};

/// Threads that take in layers at once, at most: beyond that they wait for the disk, and each holds buffers and a
/// decompressor's window.
const WORKERS_MAX: usize = 8;

/// Why a layer could not be taken in or given out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LayerTransferError {
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
    /// A layer's tar could not be written.
    #[error("write layer {layer} as a tar")]
    Diff {
        /// The layer.
        layer: LayerId,
        /// Why.
        #[source]
        source: DiffError,
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

impl LayerTransferError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Unpack { source, .. } => source.kind(),
            Self::DiffIdMismatch { .. } | Self::Changed { .. } | Self::Gone { .. } => ErrorKind::DataLoss,
            Self::Read { source, .. } => DecodeError::kind_of(source),
            Self::Base { source, .. } | Self::Snapshot(source) => source.kind(),
            Self::Diff { source, .. } => source.kind(),
            Self::Ingest(source) => source.kind(),
            Self::Commit(source) => source.kind(),
            Self::Blob(source) => source.kind(),
            Self::Layer(source) => source.kind(),
            Self::Catalogue(source) => source.kind(),
            Self::Canceled(source) => source.kind(),
        }
    }
}

/// A layer that an archive offers.
#[derive(Debug)]
pub(crate) struct Offered {
    /// The blob's bytes.
    pub(crate) section: Section,
    /// The blob's digest, where the archive says it. Docker archives don't.
    pub(crate) digest: Option<BlobDigest>,
    pub(crate) compression: Compression,
    /// What the image's config says that the blob decompresses to.
    pub(crate) diff_id: DiffId,
    /// The chain that this layer completes in its image.
    pub(crate) chain_id: ChainId,
}

impl Offered {
    /// What messages call it.
    fn name(&self) -> String {
        self.digest.map_or_else(|| format!("with diff ID {}", self.diff_id), |digest| digest.to_string())
    }

    fn expected(&self) -> Expected {
        Expected { digest: self.digest, size_bytes: Some(self.section.size_bytes()) }
    }
}

/// A blob that holds a layer.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerBlob {
    pub(crate) digest: BlobDigest,
    pub(crate) size_bytes: u64,
    pub(crate) compression: Compression,
}

impl LayerBlob {
    /// As a manifest lists it.
    pub(crate) fn descriptor(&self) -> Descriptor {
        let media_type = match self.compression {
            Compression::None => MediaType::ImageLayer,
            Compression::Gzip => MediaType::ImageLayerGzip,
            Compression::Zstd => MediaType::ImageLayerZstd,
        };
        Descriptor::new(media_type, self.digest, self.size_bytes)
    }
}

/// What one worker made of one layer. Nothing of it is visible yet.
struct Worked {
    /// The blob, if it was not here.
    ingest: Option<Ingest>,
    layer: WorkedLayer,
}

enum WorkedLayer {
    Here(LayerId),
    Staged(Box<FinishedStage>),
    /// It refers to files of the layers below: to be unpacked again over them.
    NeedsBase,
}

/// The bytes of a layer on their way from an archive: whoever reads them also writes them into the blob.
struct Tee<'a> {
    section: Watched<'a, Section>,
    ingest: Option<&'a mut Ingest>,
}

impl Read for Tee<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.section.read(buffer)?;
        if let Some(ingest) = &mut self.ingest {
            ingest.write_all(&buffer[..read])?;
        }
        Ok(read)
    }
}

impl Engine {
    /// Takes in the layers of one image, bottom first: blobs, layers and the snapshot of all, held by `lease`. Blobs
    /// and layers that are here are not touched. The others are worked on in parallel, then synced and made visible
    /// together.
    pub(crate) fn take_layers(
        &self,
        offered: &[Offered],
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<(Vec<LayerBlob>, Option<SnapshotId>), LayerTransferError> {
        // An image may list a layer more than once.
        let mut unique: Vec<&Offered> = Vec::new();
        let place: Vec<usize> = offered
            .iter()
            .map(|offer| {
                let same = |have: &&Offered| have.diff_id == offer.diff_id && have.digest == offer.digest;
                unique.iter().position(same).unwrap_or_else(|| {
                    unique.push(offer);
                    unique.len() - 1
                })
            })
            .collect();
        let work = |offer: &&Offered| self.work_on(offer, lease, progress, cancel);
        let worked = parallel(&unique, |offer| offer.section.size_bytes(), work)?;

        let (mut ingests, mut layers) = (Vec::new(), Vec::new());
        for (work, offer) in worked.into_iter().zip(&unique) {
            ingests.push(work.ingest.map(|ingest| (ingest, offer.expected())));
            layers.push(work.layer);
        }
        let blobs = self.publish_blobs(ingests, &unique, lease)?;
        let layers = self.publish_layers(layers, &unique, lease)?;
        self.connect(&unique, &blobs, &layers)?;

        let blobs: Vec<LayerBlob> = place.iter().map(|at| blobs[*at]).collect();
        let layers: Vec<Option<LayerId>> = place.iter().map(|at| layers[*at]).collect();
        let snapshot = self.stack(layers, offered, &blobs, lease, cancel)?;
        Ok((blobs, snapshot))
    }

    /// Does for one layer what is missing of it.
    fn work_on(
        &self,
        offer: &Offered,
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Worked, LayerTransferError> {
        let name = format!("layer {}", offer.name());
        let task = Task::start(progress, &name, Some(offer.section.size_bytes()));
        let layers = self.store().layers();
        let layer = match layers.hold_by_diff_id(offer.diff_id, lease)? {
            None => layers.hold_by_chain(offer.chain_id, lease)?,
            found => found,
        };
        if let Some(layer) = layer {
            // A row whose files are gone is no layer to build an image on.
            layers.root(layer)?;
        }
        let blob_here = match offer.digest {
            // That it decompresses to this diff ID must be our own finding, not the image's claim.
            Some(digest) => {
                lease.hold_if_present(digest)?
                    && self.store().read(|rows| plies_image::diff_id_of_blob(rows, digest))? == Some(offer.diff_id)
            }
            None => false,
        };
        if let (Some(layer), true) = (layer, blob_here) {
            task.end(Outcome::Cached);
            return Ok(Worked { ingest: None, layer: WorkedLayer::Here(layer) });
        }
        let mut ingest = if blob_here { None } else { Some(self.store().content().ingest_unnamed()?) };
        let section = Watched { inner: offer.section.clone(), task: Some(&task), cancel };
        let mut tee = Tee { section, ingest: ingest.as_mut() };
        let layer = match layer {
            Some(layer) => {
                self.check_diff_id(&mut tee, offer)?;
                WorkedLayer::Here(layer)
            }
            None => self.unpack_alone(&mut tee, offer)?,
        };
        // Whatever the decompressor left, so that the blob is whole.
        io::copy(&mut tee, &mut io::sink()).map_err(|source| read_error(offer, source))?;
        task.end(Outcome::Done);
        Ok(Worked { ingest, layer })
    }

    /// Unpacks a layer by itself, without the layers below it.
    fn unpack_alone(&self, blob: &mut Tee<'_>, offer: &Offered) -> Result<WorkedLayer, LayerTransferError> {
        let mut stage = self.store().layers().stage()?;
        let record = Recorder::new(tarsplit::Output::File(stage.tar_split_file()?));
        let unpacked = unpack(blob, offer.compression, stage.root(), ApplyStyle::Layer, self.limits(), Some(record));
        let unpacked = match unpacked {
            Err(UnpackError::Apply(ApplyError::NeedsBase { .. })) => return Ok(WorkedLayer::NeedsBase),
            other => checked(offer, other)?,
        };
        // The kernel does not know a root that hides everything below: such a layer is unpacked over what it hides.
        if unpacked.applied.opaque_root {
            return Ok(WorkedLayer::NeedsBase);
        }
        let contents = LayerContents {
            diff_id: Some(offer.diff_id),
            chain_id: None,
            usage: unpacked.applied.usage,
            index: unpacked.applied.index,
        };
        Ok(WorkedLayer::Staged(Box::new(stage.finish(contents))))
    }

    /// Checks that a blob decompresses to the tar of its diff ID, for a layer that is here already.
    fn check_diff_id(&self, blob: &mut Tee<'_>, offer: &Offered) -> Result<(), LayerTransferError> {
        let decoder = compress::Decoder::new(blob, offer.compression, self.limits());
        let mut tar = HashingReader::new(decoder.map_err(|source| read_error(offer, source))?);
        io::copy(&mut tar, &mut io::sink()).map_err(|source| read_error(offer, source))?;
        let (_, hashed) = tar.finish();
        same_diff_id(offer, DiffId::from_bytes(hashed.sha256))
    }

    fn publish_blobs(
        &self,
        ingests: Vec<Option<(Ingest, Expected)>>,
        offered: &[&Offered],
        lease: &Lease,
    ) -> Result<Vec<LayerBlob>, LayerTransferError> {
        let new: Vec<bool> = ingests.iter().map(Option::is_some).collect();
        let mut committed =
            self.store().content().commit_all(ingests.into_iter().flatten().collect(), lease)?.into_iter();
        let blobs = new.iter().zip(offered).map(|(new, offer)| {
            let digest = if *new { committed.next() } else { offer.digest };
            LayerBlob {
                digest: digest.expect("because a blob without an ingest was found by its digest"),
                size_bytes: offer.section.size_bytes(),
                compression: offer.compression,
            }
        });
        Ok(blobs.collect())
    }

    fn publish_layers(
        &self,
        worked: Vec<WorkedLayer>,
        offered: &[&Offered],
        lease: &Lease,
    ) -> Result<Vec<Option<LayerId>>, LayerTransferError> {
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
        for (at, layer) in places.into_iter().zip(self.store().layers().publish(lease, staged)?) {
            layers[at] = Some(layer);
        }
        Ok(layers)
    }

    /// Writes down which blob is which layer, and that the layer keeps its blob alive; for those only that were unpacked
    /// or hashed, since what an image's config says of a blob may be a lie.
    fn connect(
        &self,
        offered: &[&Offered],
        blobs: &[LayerBlob],
        layers: &[Option<LayerId>],
    ) -> Result<(), LayerTransferError> {
        self.store().write(|tx| {
            for ((offer, blob), layer) in offered.iter().zip(blobs).zip(layers) {
                if let Some(layer) = layer {
                    record_blob(tx, offer.diff_id, blob, *layer)?;
                }
            }
            Ok::<_, CatalogueError>(())
        })?;
        Ok(())
    }

    /// Makes the snapshot of an image's layers. Those that turn out to need the layers below them are unpacked again,
    /// over the stack that they stand on, and kept for this chain alone.
    fn stack(
        &self,
        mut layers: Vec<Option<LayerId>>,
        offered: &[Offered],
        blobs: &[LayerBlob],
        lease: &Lease,
        cancel: &Cancel,
    ) -> Result<Option<SnapshotId>, LayerTransferError> {
        if layers.is_empty() {
            return Ok(None);
        }
        loop {
            let missing = layers.iter().position(Option::is_none);
            let below: Vec<LayerId> = layers.iter().map_while(|layer| *layer).collect();
            let needs_base = match self.store().snapshots().ensure(&below, lease) {
                Ok(snapshot) => match missing {
                    None => return Ok(Some(snapshot)),
                    Some(at) => at,
                },
                Err(SnapshotError::NeedsBase { layer, path }) => {
                    let at = below.iter().position(|have| *have == layer);
                    let at = at.expect("because the store names a layer that it was given");
                    if self.store().layers().info(layer)?.chain_id.is_some() {
                        let source = SnapshotError::NeedsBase { layer, path };
                        return Err(LayerTransferError::Base { digest: offered[at].name(), source });
                    }
                    at
                }
                Err(other) => return Err(other.into()),
            };
            let (offer, blob) = (&offered[needs_base], &blobs[needs_base]);
            layers[needs_base] = Some(self.unpack_over(&below[..needs_base], offer, blob, lease, cancel)?);
        }
    }

    /// Unpacks a layer into the mounted tree of the layers below it.
    fn unpack_over(
        &self,
        below: &[LayerId],
        offer: &Offered,
        blob: &LayerBlob,
        lease: &Lease,
        cancel: &Cancel,
    ) -> Result<LayerId, LayerTransferError> {
        if let Some(layer) = self.store().layers().hold_by_chain(offer.chain_id, lease)? {
            return Ok(layer);
        }
        let snapshots = self.store().snapshots();
        let base = if below.is_empty() { None } else { Some(snapshots.ensure(below, lease)?) };
        let active = snapshots.prepare(base, lease, ActiveOptions { volatile: true })?;
        let mounted = snapshots.mount_active(active, Attach::Detached)?;
        let bytes = Watched { inner: self.store().content().open(blob.digest)?, task: None, cancel };
        let unpacked = unpack(bytes, blob.compression, mounted.root(), ApplyStyle::Merged, self.limits(), None);
        checked(offer, unpacked)?;
        mounted.unmount()?;
        let layer = snapshots.seal_for_chain(active, offer.diff_id, offer.chain_id, lease)?;
        self.store().write(|tx| record_blob(tx, offer.diff_id, blob, layer))?;
        Ok(layer)
    }

    /// The diff ID of a layer; its tar is written into a hash if nobody knows it yet.
    pub(crate) fn diff_id_of(&self, layer: LayerId, cancel: &Cancel) -> Result<DiffId, LayerTransferError> {
        let layers = self.store().layers();
        if let Some(diff_id) = layers.info(layer)?.diff_id {
            return Ok(diff_id);
        }
        let sink = Watched { inner: io::sink(), task: None, cancel };
        let (_, hashed) = self.write_tar(layer, sink)?.finish();
        let diff_id = DiffId::from_bytes(hashed.sha256);
        layers.set_diff_id(layer, diff_id)?;
        Ok(diff_id)
    }

    /// Writes a layer's tar, hashing it on the way.
    fn write_tar<W: Write>(&self, layer: LayerId, out: W) -> Result<HashingWriter<W>, LayerTransferError> {
        let layers = self.store().layers();
        let (root, index) = (layers.root(layer)?, layers.index(layer)?);
        let failed = |source: DiffError| match canceled_inside(&source) {
            true => Canceled.into(),
            false => LayerTransferError::Diff { layer, source },
        };
        let mut tar = tar::Writer::new(HashingWriter::new(out));
        layer_to_tar(root.as_fd(), &index, &mut tar).map_err(failed)?;
        tar.finish().map_err(|source| failed(source.into()))
    }

    /// A blob of the layer with this diff ID, held by `lease`: one that is here, or a gzip of the layer's tar, made now
    /// and kept with the layer.
    pub(crate) fn blob_of(
        &self,
        diff_id: DiffId,
        lease: &Lease,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<LayerBlob, LayerTransferError> {
        for (digest, row) in self.store().read(|rows| plies_image::blobs_of_diff_id(rows, diff_id))? {
            if lease.hold_if_present(digest)? {
                return Ok(LayerBlob { digest, size_bytes: row.size_bytes, compression: row.compression });
            }
        }
        let found = self.store().layers().hold_by_diff_id(diff_id, lease)?;
        let layer = found.ok_or(LayerTransferError::Gone { diff_id })?;
        let task = Task::start(progress, &format!("compress layer {diff_id}"), None);
        let mut ingest = self.store().content().ingest_unnamed()?;
        let broken = |source| LayerTransferError::Read { digest: diff_id.to_string(), source };
        let encoder = compress::Encoder::new(&mut ingest, Compression::Gzip, threads()).map_err(broken)?;
        let watched = Watched { inner: encoder, task: Some(&task), cancel };
        let (watched, hashed) = self.write_tar(layer, watched)?.finish();
        watched.inner.finish().map_err(broken)?;
        let actual = DiffId::from_bytes(hashed.sha256);
        if actual != diff_id {
            return Err(LayerTransferError::Changed { diff_id, actual });
        }
        let size_bytes = ingest.offset_bytes();
        let digest = ingest.commit(Expected::anything(), lease)?;
        let blob = LayerBlob { digest, size_bytes, compression: Compression::Gzip };
        self.store().write(|tx| record_blob(tx, diff_id, &blob, layer))?;
        task.end(Outcome::Done);
        Ok(blob)
    }
}

/// Writes down that a blob, decompressed, is the tar of a layer, and that the layer keeps it alive.
fn record_blob(tx: &mut Tx<'_>, diff_id: DiffId, blob: &LayerBlob, layer: LayerId) -> Result<(), CatalogueError> {
    let row = BlobRow { size_bytes: blob.size_bytes, compression: blob.compression };
    plies_image::record_blob(tx, blob.digest, diff_id, row)?;
    tx.add_edge(layer, blob.digest)
}

fn read_error(offer: &Offered, source: io::Error) -> LayerTransferError {
    match source.get_ref().and_then(|inner| inner.downcast_ref::<Canceled>()) {
        Some(canceled) => (*canceled).into(),
        None => LayerTransferError::Read { digest: offer.name(), source },
    }
}

fn checked(offer: &Offered, unpacked: Result<Unpacked, UnpackError>) -> Result<Unpacked, LayerTransferError> {
    let unpacked = unpacked.map_err(|source| {
        if canceled_inside(&source) {
            return Canceled.into();
        }
        LayerTransferError::Unpack { digest: offer.name(), source }
    })?;
    same_diff_id(offer, unpacked.diff_id)?;
    Ok(unpacked)
}

fn same_diff_id(offer: &Offered, actual: DiffId) -> Result<(), LayerTransferError> {
    if actual == offer.diff_id {
        return Ok(());
    }
    Err(LayerTransferError::DiffIdMismatch { digest: offer.name(), expected: offer.diff_id, actual })
}

/// Whether the cause of an error, however deep, is that the caller asked to stop.
pub(crate) fn canceled_inside(error: &(dyn std::error::Error + 'static)) -> bool {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if error.is::<Canceled>() || inner.is_some_and(|inner| inner.is::<Canceled>()) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// How many threads work at once.
pub(crate) fn threads() -> NonZero<usize> {
    std::thread::available_parallelism().unwrap_or(NonZero::<usize>::MIN)
}

/// Does `work` for all `items` on a few threads, the largest first so that none is left over at the end. After the
/// first failure nothing new is begun, and that failure is the result.
fn parallel<I: Sync, T: Send, E: Send>(
    items: &[I],
    weight: impl Fn(&I) -> u64,
    work: impl Fn(&I) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|at| std::cmp::Reverse(weight(&items[*at])));
    let queue = Mutex::new(VecDeque::from(order));
    let results: Mutex<Vec<Option<Result<T, E>>>> = Mutex::new(items.iter().map(|_| None).collect());
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
    std::thread::scope(|scope| {
        for _ in 0..threads().get().min(WORKERS_MAX).min(items.len()) {
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
        let doubled = parallel(&items, |item| *item, |item| Ok::<_, ()>(item * 2)).unwrap();
        assert_eq!(doubled, items.iter().map(|item| item * 2).collect::<Vec<_>>());
    }

    #[test]
    fn parallel_begins_nothing_after_a_failure() {
        let begun = std::sync::atomic::AtomicUsize::new(0);
        let items: Vec<u64> = (0..1000).collect();
        let result = parallel(
            &items,
            |_| 1,
            |item| {
                begun.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                if *item == 0 { Err("no") } else { Ok(()) }
            },
        );
        assert_eq!(result, Err("no"));
        assert!(begun.into_inner() <= threads().get() * 2 + WORKERS_MAX, "workers went on");
    }
}
