//! Layers, blobs and mutable trees on their way into a store.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek as _, SeekFrom, Write};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::ScopedJoinHandle;

use plies_archive::hash::{HashingReader, HashingWriter};
use plies_archive::tar::{Escaped, Reader};
use plies_archive::tarsplit::{self, AssembleError, Headers, Recorder};
use plies_archive::{Root, SealError, Usage, compress};
use plies_oci::{BlobDigest, ChainId, Compression, DiffId};
use plies_store::progress::{self, Task};
use plies_store::{
    ActiveId, ActiveOptions, Attach, Cancel, ForeignTree, Indexes, LayerBlob, LayerContents, LayerId, LayerSource,
    Lease, Origin, SnapshotError, Stage, Taking, Transfer, TransferError, Unpacked, parallel,
};

use crate::containerd::SnapshotInfo;
use crate::listing::{Agreed, Listing};
use crate::{Import, ImportError, chain};

/// Layers that are published together: one sync of the file system for all of them, while the next ones are staged. What is staged
/// and not published is lost when the process is killed.
const BATCH_MAX: usize = 2048;

/// Layers that are staged at the same time for each that a core works on: the others wait for the disk, from which the source's
/// directories are read.
const STAGED_PER_WORKER: usize = 4;

/// Of one `st_blocks` (stat(3type)).
const STAT_BLOCK_BYTES: u64 = 512;

/// A layer to be taken in.
#[derive(Debug)]
pub(crate) struct WantedLayer {
    /// Where its files are.
    pub(crate) snapshot: SnapshotInfo,
    /// Where those are that it began as, if the snapshot is a whole tree.
    pub(crate) before: Option<PathBuf>,
    /// The layers that it stands on here, bottom first, where its tree was made by writing to them.
    pub(crate) below: Vec<LayerId>,
    /// The digest of its tar, and where that can be had.
    pub(crate) tar: Option<(DiffId, Tar)>,
    /// Whether somebody may still write to it.
    pub(crate) may_change: bool,
}

impl WantedLayer {
    /// What grows with the work that it makes, for layers of one source.
    fn weight(&self) -> u64 {
        match &self.tar {
            Some((_, Tar::Split(recording))) => fs::metadata(recording).map_or(0, |meta| meta.len()),
            Some((_, Tar::Blob(blob) | Tar::Unpacked(blob))) => blob.size_bytes,
            None => 0,
        }
    }
}

/// Where the tar of a tree can be had.
#[derive(Debug)]
pub(crate) enum Tar {
    /// In a blob that was taken in and that was made of the tree.
    Blob(LayerBlob),
    /// In a blob that was taken in and that the tree was unpacked from.
    Unpacked(LayerBlob),
    /// From the tree itself, with a tar-split recording in this file.
    Split(PathBuf),
}

/// A layer that was taken in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct TakenLayer {
    pub(crate) id: LayerId,
    pub(crate) size_bytes: u64,
    /// It was here already.
    pub(crate) was_here: bool,
}

/// What became of a layer.
#[derive(Debug)]
pub(crate) enum TookLayer {
    Taken(TakenLayer),
    /// The tree is not what its blob unpacks to, which is what others know by the diff ID.
    Differs,
    /// The tree and its recording give no tar, or another one.
    Wrong(String),
    Failed(SnapshotError),
}

/// A blob to be taken in.
#[derive(Debug, Clone)]
pub(crate) struct WantedBlob {
    pub(crate) digest: BlobDigest,
    /// Digest of the tar that is said to be in it.
    pub(crate) diff_id: DiffId,
    pub(crate) path: PathBuf,
}

/// Threads that take things in: beyond that they wait for the disk.
pub(crate) fn workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from).min(8)
}

impl Import<'_> {
    /// Refuses a source from which no hard link leads into the store, unless files are to be copied.
    pub(crate) fn check_file_system(&self, dir: &Path) -> Result<(), ImportError> {
        let device = |path: &Path| {
            let io = |source| ImportError::Io { op: "stat", path: path.to_owned(), source };
            fs::metadata(path).map(|meta| meta.dev()).map_err(io)
        };
        if self.options.copy || self.options.dry_run || device(dir)? == device(self.store.root())? {
            return Ok(());
        }
        Err(ImportError::OtherFileSystem { path: dir.to_owned() })
    }

    /// Takes in layers, held by `lease`; each of them or why not. Errors of the store itself end it all.
    /// `indexes` are for all calls that may ask for the same layers.
    pub(crate) fn take_layers(
        &self,
        wanted: &[WantedLayer],
        indexes: &Indexes,
        lease: &Lease,
    ) -> Result<Vec<TookLayer>, ImportError> {
        let mut taken = Vec::with_capacity(wanted.len());
        if wanted.is_empty() {
            return Ok(taken);
        }
        let task = Task::start(self.progress, &format!("take {} layers", wanted.len()), None);
        std::thread::scope(|scope| {
            let mut publishing: Option<ScopedJoinHandle<'_, Result<Vec<TookLayer>, ImportError>>> = None;
            let mut published = |handle: ScopedJoinHandle<'_, Result<_, _>>| {
                taken.extend(handle.join().expect("because it does not panic")?);
                Ok::<_, ImportError>(())
            };
            for batch in wanted.chunks(BATCH_MAX) {
                let staged = parallel(batch, workers() * STAGED_PER_WORKER, WantedLayer::weight, |wanted| {
                    self.cancel.check().map_err(|_| plies_store::Canceled)?;
                    let staged = self.stage(wanted, indexes, lease);
                    task.advance(staged.as_ref().map_or(0, Staged::size_bytes));
                    Ok::<_, plies_store::Canceled>(staged)
                })?;
                // What was cut off on the way looks like a failure.
                if self.cancel.is_canceled() {
                    return Err(plies_store::Canceled.into());
                }
                publishing.take().map_or(Ok(()), &mut published)?;
                // It waits for the disk while the next ones are staged.
                publishing = Some(scope.spawn(|| self.publish(staged, lease)));
            }
            publishing.map_or(Ok(()), &mut published)
        })?;
        task.end(progress::Outcome::Done);
        Ok(taken)
    }

    /// Publishes what was staged, together.
    fn publish(
        &self,
        staged: Vec<Result<Staged, SnapshotError>>,
        lease: &Lease,
    ) -> Result<Vec<TookLayer>, ImportError> {
        let mut stages = Vec::new();
        let places: Vec<_> = staged
            .into_iter()
            .map(|staged| match staged {
                Ok(Staged::Here(layer)) => Place::Here(layer),
                Ok(Staged::Differs) => Place::Without(TookLayer::Differs),
                Ok(Staged::Wrong(why)) => Place::Without(TookLayer::Wrong(why)),
                Ok(Staged::New(stage)) => {
                    stages.push(*stage);
                    Place::Published(stages.len() - 1)
                }
                Err(error) => Place::Without(TookLayer::Failed(error)),
            })
            .collect();
        let published = self.store.layers().publish(lease, stages)?;
        let took = |place| {
            let (id, was_here) = match place {
                Place::Published(place) => (published[place], false),
                Place::Here(layer) => (layer, true),
                Place::Without(why) => return Ok(why),
            };
            let size_bytes = self.store.layers().info(id)?.usage.size_bytes;
            Ok(TookLayer::Taken(TakenLayer { id, size_bytes, was_here }))
        };
        places.into_iter().map(took).collect()
    }

    fn stage(&self, wanted: &WantedLayer, indexes: &Indexes, lease: &Lease) -> Result<Staged, SnapshotError> {
        if let Some((diff_id, _)) = &wanted.tar
            && let Some(layer) = self.store.layers().hold_by_diff_id(*diff_id, lease)?
            && self.store.layers().root(layer).is_ok()
        {
            return Ok(Staged::Here(layer));
        }
        let taking = if self.options.copy || wanted.may_change { Taking::Copy } else { Taking::Link(self.not_linked) };
        let tree = open_dir(&wanted.snapshot.dir)?;
        match &wanted.tar {
            Some((diff_id, Tar::Unpacked(blob))) => {
                let mut stage = self.store.layers().stage()?;
                let Ok(Some(listing)) = self.listing(blob, &mut stage) else { return Ok(Staged::Differs) };
                let filled = self.fill(&stage, &tree, taking, &listing)?;
                let contents = filled.map(|(usage, agreed)| LayerContents {
                    diff_id: Some(*diff_id),
                    usage,
                    index: agreed.index,
                    ..LayerContents::default()
                });
                return Ok(contents.map_or(Staged::Differs, |contents| Staged::New(Box::new(stage.finish(contents)))));
            }
            Some((diff_id, Tar::Split(recording))) => return self.stage_split(&tree, *diff_id, recording, taking),
            _ => {}
        }
        let tree = match wanted.snapshot.whole {
            false => ForeignTree::Upper(tree),
            true => ForeignTree::Whole { before: wanted.before.as_deref().map(open_dir).transpose()?, after: tree },
        };
        let judge = |stage: &mut Stage, contents: LayerContents| {
            let Some((diff_id, Tar::Blob(blob))) = &wanted.tar else { return Some(contents) };
            let listing = self.listing(blob, stage).ok().flatten()?;
            let index = listing.judge(stage.root(), &contents.index)?;
            Some(LayerContents { diff_id: Some(*diff_id), index, ..contents })
        };
        let over = (wanted.below.as_slice(), indexes);
        let stage = self.store.snapshots().stage_foreign(over, &tree, taking, self.cancel, judge)?;
        Ok(stage.map_or(Staged::Differs, |stage| Staged::New(Box::new(stage))))
    }

    /// Fills a stage with a tree that was unpacked, if it is what its tar lists; what it costs then.
    fn fill(
        &self,
        stage: &Stage,
        tree: &OwnedFd,
        taking: Taking<'_>,
        listing: &Listing,
    ) -> Result<Option<(Usage, Agreed)>, SnapshotError> {
        let comparison = listing.compare();
        let unpacked = Unpacked { root: listing.root(), agrees: &|name| comparison.agrees(name) };
        match self.store.snapshots().fill_unpacked(stage, tree, taking, unpacked, self.cancel) {
            Ok(usage) => Ok(usage.zip(comparison.finish())),
            // Its tar says what is meant.
            Err(SnapshotError::Seal(SealError::NotSelfContained { .. } | SealError::Unclear { .. })) => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// Stages a tree that gives its tar back with a recording. What the recording lists must be there, as it says; that
    /// the bytes are those of the diff ID is the source's word, unless somebody wants to know or a file was written to.
    fn stage_split(
        &self,
        tree: &OwnedFd,
        diff_id: DiffId,
        recording: &Path,
        taking: Taking<'_>,
    ) -> Result<Staged, SnapshotError> {
        let mut stage = self.store.layers().stage()?;
        let filled = match self.recorded(recording) {
            Some(listing) => self.fill(&stage, tree, taking, &listing)?,
            None => None,
        };
        let unverified = !self.options.verify && filled.as_ref().is_some_and(|(_, agreed)| agreed.same_times);
        let read = if filled.is_some() { stage.root() } else { tree.as_fd() };
        if !unverified && let Err(why) = self.check_recording(diff_id, recording, read) {
            return Ok(Staged::Wrong(why));
        }
        let Some((usage, Agreed { index, .. })) = filled else { return Ok(Staged::Differs) };
        let copied = stage.tar_split_file().map_err(|error| chain(&error)).and_then(|mut to| {
            let mut from = open_file(recording).map_err(|error| chain(&error))?;
            io::copy(&mut from, &mut to).map_err(|error| chain(&error))
        });
        if let Err(why) = copied {
            return Ok(Staged::Wrong(why));
        }
        let contents = LayerContents { diff_id: Some(diff_id), usage, index, unverified, ..LayerContents::default() };
        Ok(Staged::New(Box::new(stage.finish(contents))))
    }

    /// What a tar-split recording lists, by its headers alone; `None` if no tree can be held against that.
    fn recorded(&self, recording: &Path) -> Option<Listing> {
        let mut headers = Headers::new(open_file(recording).ok()?);
        let mut reader = Reader::new(&mut headers, self.limits).without_data();
        let listing = Listing::read_from(&mut reader)?;
        let left_out = reader.left_out().to_vec();
        // What stands behind the end mark, too.
        io::copy(&mut headers, &mut io::sink()).ok()?;
        (left_out == headers.left_out()).then_some(listing)
    }

    /// Whether a tree would come over with a tar-split recording, without doing it; why not.
    pub(crate) fn would_take(&self, diff_id: DiffId, recording: &Path, tree: &Path) -> Result<(), String> {
        let tree = open_dir(tree).map_err(|error| chain(&error))?;
        let listing = self.recorded(recording).filter(|_| !self.options.verify);
        let agreed = listing.and_then(|listing| listing.judge_below(tree.as_fd()).ok()?);
        match agreed {
            Some(Agreed { same_times: true, .. }) => Ok(()),
            _ => self.check_recording(diff_id, recording, tree.as_fd()),
        }
    }

    /// Whether a tree and a tar-split recording give the tar of `diff_id`, all of which is read.
    fn check_recording(&self, diff_id: DiffId, recording: &Path, tree: BorrowedFd<'_>) -> Result<(), String> {
        let mut tar = HashingWriter::new(Checked { cancel: self.cancel });
        assemble(recording, tree, &mut tar).map_err(|error| does_not_fit(&error))?;
        match DiffId::from_bytes(tar.finish().1.sha256) {
            actual if actual == diff_id => Ok(()),
            actual => Err(other_tar(actual, diff_id)),
        }
    }

    /// Unpacks the tar that a tree and a recording give, of which it is known that it has `diff_id`, over the layers `below`.
    pub(crate) fn unpack_recording(
        &self,
        diff_id: DiffId,
        recording: &Path,
        tree: &Path,
        (below, parent): (&[LayerId], Option<ChainId>),
        lease: &Lease,
    ) -> Result<LayerId, String> {
        let root = open_dir(tree).map_err(|error| chain(&error))?;
        let (stream, tar) = io::pipe().map_err(|error| chain(&error))?;
        let transfer = Transfer { lease, limits: self.limits, progress: self.progress, cancel: self.cancel };
        let (received, assembled) = std::thread::scope(|scope| {
            let assembled = scope.spawn(|| assemble(recording, root.as_fd(), &mut BufWriter::new(tar)));
            let received = transfer.receive_layer(stream, Compression::None, below, parent);
            (received, assembled.join())
        });
        match received.map_err(|error| chain(&error))? {
            received if received.diff_id == diff_id => Ok(received.layer),
            _ => match assembled {
                Ok(Err(error)) => Err(does_not_fit(&error)),
                _ => Err("it changed meanwhile".to_owned()),
            },
        }
    }

    /// Takes in a blob and the layer that it unpacks to over the layers `below`, with which it completes a chain.
    pub(crate) fn unpack_blob(
        &self,
        wanted: &WantedBlob,
        chain_id: ChainId,
        below: &[LayerId],
        lease: &Lease,
    ) -> Result<LayerId, String> {
        let transfer = Transfer { lease, limits: self.limits, progress: self.progress, cancel: self.cancel };
        let source = layer_source(wanted, chain_id).map_err(|error| chain(&error))?;
        let taken = transfer.take_layers(&[source], below).map_err(|error| chain(&error))?;
        Ok(*taken.layers.first().expect("because one source makes one layer"))
    }

    /// Whether a blob has its digest and decompresses to the tar that it is said to hold; what it is, and the bytes of that tar.
    pub(crate) fn check_blob(&self, wanted: &WantedBlob) -> Result<(LayerBlob, u64), String> {
        let failed = |error: io::Error| format!("read {}: {}", wanted.path.display(), chain(&error));
        let LayerSource { size_bytes, compression, .. } =
            layer_source(wanted, ChainId::extend(None, wanted.diff_id)).map_err(failed)?;
        let mut blob = HashingReader::new(open_file(&wanted.path).map_err(failed)?);
        let decoder = compress::Decoder::new(&mut blob, compression, self.limits);
        let mut tar = HashingReader::new(decoder.map_err(failed)?);
        let read = io::copy(&mut tar, &mut Checked { cancel: self.cancel });
        let (_, tar) = tar.finish();
        // The rest of the blob, and all of it if it does not decompress: other bytes explain that.
        io::copy(&mut blob, &mut Checked { cancel: self.cancel }).map_err(failed)?;
        match BlobDigest::from_bytes(blob.finish().1.sha256) {
            actual if actual == wanted.digest => {}
            actual => return Err(format!("blob {} has other bytes: they give {actual}", wanted.digest)),
        }
        read.map_err(failed)?;
        match DiffId::from_bytes(tar.sha256) {
            actual if actual == wanted.diff_id => {
                Ok((LayerBlob { digest: wanted.digest, size_bytes, compression }, tar.size_bytes))
            }
            actual => Err(format!("blob {} decompresses to {actual}, not {}", wanted.digest, wanted.diff_id)),
        }
    }

    /// What a blob that was taken in lists. How its tar comes out of the tree again is kept with the stage.
    fn listing(&self, blob: &LayerBlob, stage: &mut Stage) -> Result<Option<Listing>, Box<dyn std::error::Error>> {
        let packed = self.store.content().open(blob.digest)?;
        let tar = compress::Decoder::new(packed, blob.compression, self.limits)?;
        let recorder = Recorder::new(tarsplit::Output::File(stage.tar_split_file()?));
        let mut reader = Reader::new(tar, self.limits).with_recorder(recorder);
        let Some(listing) = Listing::read_from(&mut reader) else { return Ok(None) };
        if reader.finish()?.recorded.is_none_or(|recorded| recorded.unfaithful.is_some()) {
            stage.forget_tar_split()?;
        }
        Ok(Some(listing))
    }

    /// Copies a tree that goes on changing into an active of its own, held by `lease`.
    pub(crate) fn take_active(&self, from: &Path, lease: &Lease) -> Result<ActiveId, SnapshotError> {
        let snapshots = self.store.snapshots();
        let active = snapshots.prepare(None, lease, ActiveOptions { volatile: false })?;
        let mounted = snapshots.mount_active(active, Attach::Detached)?;
        let copied = snapshots.copy_foreign(&open_dir(from)?, mounted.root(), self.cancel);
        // The active may be there after a power cut; so must its files.
        let synced = rustix::fs::syncfs(mounted.root());
        mounted.unmount()?;
        copied?;
        synced.map_err(|errno| SnapshotError::Mount { words: "sync a copied tree".into(), source: errno.into() })?;
        Ok(active)
    }

    /// Takes in blobs, held by `lease`; of each its length, or why not. Their bytes are checked against their digests, and
    /// what they decompress to against what they are said to.
    pub(crate) fn take_blobs(
        &self,
        wanted: &[WantedBlob],
        lease: &Lease,
    ) -> Result<HashMap<BlobDigest, Result<LayerBlob, TransferError>>, ImportError> {
        let transfer = Transfer { lease, limits: self.limits, progress: self.progress, cancel: self.cancel };
        let taken = Mutex::new(HashMap::new());
        parallel(
            wanted,
            workers(),
            |_| 0,
            |wanted| {
                self.cancel.check().map_err(|_| plies_store::Canceled)?;
                let blob = take_blob(&transfer, wanted);
                taken.lock().unwrap_or_else(PoisonError::into_inner).insert(wanted.digest, blob);
                Ok::<_, plies_store::Canceled>(())
            },
        )?;
        Ok(taken.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Writes the tar that a tree and a tar-split recording give.
fn assemble(recording: &Path, tree: BorrowedFd<'_>, tar: &mut impl Write) -> Result<(), AssembleError> {
    let records = open_file(recording).map_err(|source| AssembleError::Records { source })?;
    let root = Root::new(tree).map_err(|source| AssembleError::File { path: Escaped::of(b"/"), source })?;
    let open = |name: &[u8], _| tarsplit::open_in(&root, name);
    tarsplit::assemble(records, open, tar)?;
    tar.flush().map_err(|source| AssembleError::Write { source })
}

fn does_not_fit(error: &AssembleError) -> String {
    format!("its tar-split and its files do not fit: {}", chain(error))
}

fn other_tar(actual: DiffId, diff_id: DiffId) -> String {
    format!("its files and its tar-split give {actual}, not {diff_id}")
}

/// Takes bytes that are only hashed, until somebody cancels.
struct Checked<'a> {
    cancel: &'a Cancel,
}

impl Write for Checked<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.cancel.check()?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Where a layer of a batch is to be found.
enum Place {
    Published(usize),
    Here(LayerId),
    Without(TookLayer),
}

enum Staged {
    Here(LayerId),
    Differs,
    Wrong(String),
    New(Box<plies_store::FinishedStage>),
}

impl Staged {
    /// What was brought.
    fn size_bytes(&self) -> u64 {
        match self {
            Self::New(stage) => stage.contents().usage.size_bytes,
            Self::Here(_) | Self::Differs | Self::Wrong(_) => 0,
        }
    }
}

/// A blob of the source, as something that is offered for the chain `chain_id`.
fn layer_source(wanted: &WantedBlob, chain_id: ChainId) -> io::Result<LayerSource<'_>> {
    let mut file = open_file(&wanted.path)?;
    let mut first = Vec::new();
    Read::by_ref(&mut file).take(8).read_to_end(&mut first)?;
    let size_bytes = file.metadata()?.len();
    let open = |at: u64| -> io::Result<Box<dyn Read + Send>> {
        let mut file = open_file(&wanted.path)?;
        file.seek(SeekFrom::Start(at))?;
        Ok(Box::new(file))
    };
    Ok(LayerSource {
        digest: Some(wanted.digest),
        size_bytes,
        compression: compress::detect(&first),
        diff_id: wanted.diff_id,
        chain_id,
        origin: Origin::Near,
        open: Box::new(open),
    })
}

fn take_blob(transfer: &Transfer<'_>, wanted: &WantedBlob) -> Result<LayerBlob, TransferError> {
    let failed = |source| TransferError::Read { digest: wanted.digest.to_string(), source };
    transfer.take_blob(&layer_source(wanted, ChainId::extend(None, wanted.diff_id)).map_err(failed)?)
}

pub(crate) fn open_file(path: &Path) -> io::Result<File> {
    use rustix::fs::OFlags;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    Ok(File::from(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?))
}

pub(crate) fn open_dir(path: &Path) -> Result<OwnedFd, SnapshotError> {
    use rustix::fs::OFlags;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::open(path, flags, rustix::fs::Mode::empty())
        .map_err(|errno| plies_store::FileError { op: "open", path: path.to_owned(), source: errno.into() }.into())
}

/// What a tree takes on disk, hard links once. What cannot be read counts as nothing.
pub(crate) fn measure(dir: &Path) -> u64 {
    let mut seen = std::collections::HashSet::new();
    let mut pending = vec![dir.to_owned()];
    let mut bytes = 0;
    while let Some(path) = pending.pop() {
        let Ok(meta) = fs::symlink_metadata(&path) else { continue };
        if meta.is_dir() {
            pending.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
        } else if meta.nlink() > 1 && !seen.insert((meta.dev(), meta.ino())) {
            continue;
        }
        bytes += meta.blocks() * STAT_BLOCK_BYTES;
    }
    bytes
}
