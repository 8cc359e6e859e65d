//! Layers become tars and blobs again.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::AsFd as _;

use plies_archive::compress;
use plies_archive::hash::HashingWriter;
use plies_archive::{DiffError, Root, layer_to_tar, tar, tarsplit};
use plies_oci::{BlobDigest, Compression, DiffId};

use super::known::{BLOBS_OF_DIFF, LayerBlobRow, blobs_of_diff_id, diff_id_of_blob, remember_blob};
use super::{LayerBlob, Packing, Transfer, TransferError, scratch, threads};
use crate::cancel::canceled_inside;
use crate::catalogue::{CatalogueError, Rows as _};
use crate::progress::{Outcome, Task, Watched};
use crate::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use crate::sync::thread;
use crate::{Canceled, Expected, LayerError, LayerId};

/// Bytes of a tar that one thread hands to another at once: half a processor's second-level cache or less.
const PIECE_BYTES: usize = 256 << 10;

/// Pieces that are made before the first of them must be taken.
const PIECES_AHEAD_MAX: usize = 4;

/// Levels by which a lost gzip blob is tried to be made again: ours, then the others of the format.
const GZIP_LEVELS: [Option<i32>; 4] = [None, Some(9), Some(6), Some(1)];

/// The same of zstd: ours, then those that BuildKit's four speeds stand for.
const ZSTD_LEVELS: [Option<i32>; 4] = [None, Some(1), Some(7), Some(11)];

impl Transfer<'_> {
    /// The diff ID of a layer; its tar is written into a hash if nobody knows it yet.
    ///
    /// # Errors
    /// [`TransferError`].
    pub fn diff_id_of(&self, layer: LayerId) -> Result<DiffId, TransferError> {
        let layers = self.store().layers();
        if let Some(diff_id) = layers.info(layer)?.diff_id {
            return Ok(diff_id);
        }
        let mut tar = HashingWriter::new(self.nowhere());
        self.write_canonical_tar(layer, &mut tar)?;
        let diff_id = DiffId::from_bytes(tar.finish().1.sha256);
        layers.set_diff_id(layer, diff_id)?;
        Ok(diff_id)
    }

    /// Writes the tar that a layer's files make today: its own, unless it came from an archive.
    pub(super) fn write_canonical_tar(&self, layer: LayerId, out: &mut impl Write) -> Result<(), TransferError> {
        let layers = self.store().layers();
        let (root, index) = (layers.root(layer)?, layers.index(layer)?);
        let failed = |source: DiffError| match canceled_inside(&source) {
            true => Canceled.into(),
            false => TransferError::Diff { layer, source },
        };
        let mut tar = tar::Writer::new(out);
        layer_to_tar(root.as_fd(), &index, &mut tar).map_err(failed)?;
        tar.finish().map(drop).map_err(|source| failed(source.into()))
    }

    /// Writes the tar of a diff ID, byte for byte: out of a blob that is here, put together again from `layer` and its
    /// tar-split, or from the layer's files if they came from no archive. It is hashed on the way; what does not have
    /// the diff ID in the end is an error, and the caller throws away what it has of it.
    ///
    /// # Errors
    /// [`TransferError::Changed`], [`TransferError::Gone`] and the others.
    pub fn write_tar(&self, diff_id: DiffId, layer: Option<LayerId>, out: impl Write) -> Result<(), TransferError> {
        let mut tar = HashingWriter::new(Watched { inner: out, task: None, cancel: self.cancel });
        let (made, written) = make_ahead(|ahead| self.make_tar(diff_id, layer, ahead), &mut tar);
        match written {
            // It has the cause of what its maker says.
            Err(error) if canceled_inside(&error) => return Err(Canceled.into()),
            Err(source) => return Err(TransferError::Write { diff_id, source }),
            Ok(()) => made?,
        }
        match DiffId::from_bytes(tar.finish().1.sha256) {
            actual if actual == diff_id => Ok(()),
            actual => Err(TransferError::Changed { diff_id, actual }),
        }
    }

    /// Makes the tar of a diff ID, which nobody has compared with it yet.
    fn make_tar(&self, diff_id: DiffId, layer: Option<LayerId>, tar: &mut impl Write) -> Result<(), TransferError> {
        if let Some(layer) = layer
            && let Some(kept) = self.store().layers().packed_tar(layer)?
        {
            return self.copy_packed(layer, kept, tar);
        }
        if let Some(blob) = self.blobs_of(diff_id)?.first() {
            let broken = |source| self.reading(&blob.digest.to_string(), source);
            let bytes = self.store().content().open(blob.digest)?;
            let mut decoder = compress::Decoder::new(bytes, blob.compression, self.limits).map_err(broken)?;
            return io::copy(&mut decoder, tar).map(drop).map_err(broken);
        }
        self.write_tree(layer.ok_or(TransferError::Gone { diff_id })?, tar)
    }

    pub(super) fn assemble(
        &self,
        layer: LayerId,
        recording: impl Read,
        tar: &mut impl Write,
    ) -> Result<(), TransferError> {
        let root = self.store().layers().root(layer)?;
        let root = Root::new(root.as_fd()).map_err(|error| self.reading(&layer.to_string(), error))?;
        let assembled = tarsplit::assemble(recording, |name, _| tarsplit::open_in(&root, name), tar);
        assembled.map(drop).map_err(|source| match canceled_inside(&source) {
            true => Canceled.into(),
            false => TransferError::Assemble { layer, source },
        })
    }

    /// The blobs that are here and known to decompress to the tar of a diff ID; held from now on.
    ///
    /// # Errors
    /// [`CatalogueError`].
    pub fn blobs_of(&self, diff_id: DiffId) -> Result<Vec<LayerBlob>, CatalogueError> {
        let mut here = Vec::new();
        for blob in self.store().read(|rows| blobs_of_diff_id(rows, diff_id))? {
            if self.lease.hold_if_present(blob.digest)? {
                here.push(blob);
            }
        }
        Ok(here)
    }

    /// A blob of the layer with this diff ID: the one that it came with, or one packed here as is asked for, made now
    /// if need be and kept with the layer. Which other blobs happen to be here changes nothing.
    ///
    /// # Errors
    /// [`TransferError`].
    pub fn blob_as(&self, diff_id: DiffId, packing: &Packing) -> Result<LayerBlob, TransferError> {
        let Packing { compression, level, force } = *packing;
        let rows = self.store().read(|rows| rows.prefixed(&BLOBS_OF_DIFF, &diff_id))?;
        let came = |row: &LayerBlobRow| {
            row.made_at_level.is_none() && (!force || (row.compression == compression && level.is_none()))
        };
        let wanted = Some(compress::level_of(compression, level));
        let made = |row: &LayerBlobRow| row.compression == compression && row.made_at_level == wanted;
        let mut rows: Vec<_> = rows.into_iter().filter(|(_, row)| came(row) || made(row)).collect();
        rows.sort_by_key(|(_, row)| row.made_at_level.is_some());
        for ((_, digest), row) in rows {
            if self.lease.hold_if_present(digest)? {
                return Ok(LayerBlob { digest, size_bytes: row.size_bytes, compression: row.compression });
            }
        }
        self.make_blob(diff_id, None, compression, level)
    }

    /// Compresses the tar of a diff ID into a blob, which is kept with the layer. `layer` says where its files are, if
    /// not in the self-contained layer of this diff ID. `level` is the format's own scale; `None` its default.
    ///
    /// # Errors
    /// [`TransferError`].
    pub fn make_blob(
        &self,
        diff_id: DiffId,
        layer: Option<LayerId>,
        compression: Compression,
        level: Option<i32>,
    ) -> Result<LayerBlob, TransferError> {
        let layer = match layer {
            None => self.store().layers().hold_by_diff_id(diff_id, self.lease)?,
            layer => layer,
        };
        let task = Task::start(self.progress, &format!("compress layer {diff_id}"), None);
        let mut ingest = self.store().content().ingest_unnamed()?;
        let broken = |source| self.reading(&diff_id.to_string(), source);
        let encoder = compress::Encoder::with_level(&mut ingest, compression, level, threads()).map_err(broken)?;
        let mut watched = Watched { inner: encoder, task: Some(&task), cancel: self.cancel };
        self.write_tar(diff_id, layer, &mut watched)?;
        watched.inner.finish().map_err(broken)?;
        let size_bytes = ingest.offset_bytes();
        let digest = ingest.commit(Expected::anything(), self.lease)?;
        let blob = LayerBlob { digest, size_bytes, compression };
        let made_at_level = Some(compress::level_of(compression, level));
        self.store().write(|tx| {
            remember_blob(tx, diff_id, &blob, made_at_level)?;
            layer.map_or(Ok(()), |layer| tx.add_edge(layer, digest))
        })?;
        task.end(Outcome::Done);
        Ok(blob)
    }

    /// Whether the tree of a layer gives the tar of `diff_id` back. One that was unpacked over the layers below it is believed.
    pub(crate) fn tree_is(&self, layer: LayerId, diff_id: DiffId, needs_base: bool) -> Result<bool, TransferError> {
        if needs_base || self.tree_diff_id(layer)? == diff_id {
            return Ok(true);
        }
        if self.store().layers().tar_split(layer)?.is_some() {
            return Ok(false);
        }
        // Of an archive that no recording gives back: what its blob unpacks to now is what it unpacked to then.
        let mut tree = HashingWriter::new(self.nowhere());
        self.write_canonical_tar(layer, &mut tree)?;
        let Some(stage) = self.restage(layer, diff_id)? else { return Ok(false) };
        let mut again = HashingWriter::new(self.nowhere());
        let (root, index) = (stage.open_root().map_err(LayerError::from)?, &stage.contents().index);
        let failed = |source: DiffError| TransferError::Diff { layer, source };
        let mut tar = tar::Writer::new(&mut again);
        layer_to_tar(root.as_fd(), index, &mut tar).map_err(failed)?;
        tar.finish().map_err(|source| failed(source.into()))?;
        Ok(tree.finish().1.sha256 == again.finish().1.sha256)
    }

    /// The digest of the tar that a layer's own files make, whatever blobs there are of it.
    pub(super) fn tree_diff_id(&self, layer: LayerId) -> Result<DiffId, TransferError> {
        let mut tar = HashingWriter::new(self.nowhere());
        self.write_tree(layer, &mut tar)?;
        Ok(DiffId::from_bytes(tar.finish().1.sha256))
    }

    pub(super) fn nowhere(&self) -> Watched<'_, io::Sink> {
        Watched { inner: io::sink(), task: None, cancel: self.cancel }
    }

    /// Makes the bytes of a blob again from its layer: the file, if they have its digest. The way in which it was compressed
    /// is not known, so the formats' own levels are tried.
    pub(crate) fn remake_blob(&self, digest: BlobDigest) -> Result<Option<File>, TransferError> {
        let Some(diff_id) = self.store().read(|rows| diff_id_of_blob(rows, digest))? else { return Ok(None) };
        let rows = self.store().read(|rows| blobs_of_diff_id(rows, diff_id))?;
        let Some(blob) = rows.into_iter().find(|blob| blob.digest == digest) else { return Ok(None) };
        let Some(layer) = self.store().layers().hold_by_diff_id(diff_id, self.lease)? else { return Ok(None) };
        let levels: &[Option<i32>] = match blob.compression {
            Compression::None => &[None],
            // The default first: it is what `ply` itself writes.
            Compression::Gzip => &GZIP_LEVELS,
            Compression::Zstd => &ZSTD_LEVELS,
        };
        for level in levels {
            let broken = |source| self.reading(&digest.to_string(), source);
            let file = HashingWriter::new(BufWriter::new(self.scratch_file()?));
            let mut encoder =
                compress::Encoder::with_level(file, blob.compression, *level, threads()).map_err(broken)?;
            let mut tar = HashingWriter::new(Watched { inner: &mut encoder, task: None, cancel: self.cancel });
            self.write_tree(layer, &mut tar)?;
            if DiffId::from_bytes(tar.finish().1.sha256) != diff_id {
                return Ok(None);
            }
            let (file, hashed) = encoder.finish().map_err(broken)?.finish();
            if BlobDigest::from_bytes(hashed.sha256) == digest {
                return Ok(Some(file.into_inner().map_err(|error| scratch("write")(error.into_error()))?));
            }
        }
        Ok(None)
    }

    fn copy_packed(&self, layer: LayerId, mut kept: File, tar: &mut impl Write) -> Result<(), TransferError> {
        io::copy(&mut kept, tar).map(drop).map_err(|source| self.reading(&layer.to_string(), source))
    }

    /// Makes the tar of a layer from its own files.
    pub(super) fn write_tree(&self, layer: LayerId, tar: &mut impl Write) -> Result<(), TransferError> {
        if let Some(kept) = self.store().layers().packed_tar(layer)? {
            return self.copy_packed(layer, kept, tar);
        }
        match self.store().layers().tar_split(layer)? {
            Some(recording) => self.assemble(layer, recording, tar),
            None => self.write_canonical_tar(layer, tar),
        }
    }

    pub(super) fn reading(&self, digest: &str, source: io::Error) -> TransferError {
        if canceled_inside(&source) {
            return Canceled.into();
        }
        TransferError::Read { digest: digest.to_owned(), source }
    }
}

/// What a thread makes for another one to take, in pieces, a few of them ahead.
struct Ahead {
    piece: Vec<u8>,
    pieces: SyncSender<Vec<u8>>,
    /// Pieces that were taken, to be filled again.
    empty: Receiver<Vec<u8>>,
}

impl Ahead {
    fn send(&mut self) -> io::Result<()> {
        let next = self.empty.try_recv().unwrap_or_else(|_| Vec::with_capacity(PIECE_BYTES));
        let piece = std::mem::replace(&mut self.piece, next);
        // Whoever took them has stopped, and says why.
        self.pieces.send(piece).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Write for Ahead {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.piece.len() == PIECE_BYTES {
            self.send()?;
        }
        let n = bytes.len().min(PIECE_BYTES - self.piece.len());
        self.piece.extend_from_slice(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Has a thread make bytes while this one writes what was made: what it says, and how the writing went. To find and read
/// a layer's files takes as long as to hash and write them.
fn make_ahead<E: Send>(
    make: impl FnOnce(&mut Ahead) -> Result<(), E> + Send,
    out: &mut impl Write,
) -> (Result<(), E>, io::Result<()>) {
    let (pieces, made) = sync_channel(PIECES_AHEAD_MAX);
    let (taken, empty) = channel();
    let mut ahead = Ahead { piece: Vec::with_capacity(PIECE_BYTES), pieces, empty };
    thread::scope(|scope| {
        let making = scope.spawn(move || {
            let result = make(&mut ahead);
            // Nobody takes it any more where that fails.
            drop(ahead.send());
            result
        });
        let mut written = Ok(());
        for mut piece in made {
            written = out.write_all(&piece);
            if written.is_err() {
                break;
            }
            piece.clear();
            drop(taken.send(piece));
        }
        (making.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), written)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_made_ahead_is_written_in_order_and_both_sides_say_how_they_ended() {
        let bytes: Vec<u8> = (0..3 * PIECE_BYTES * PIECES_AHEAD_MAX + 17).map(|n| (n / 7) as u8).collect();
        let mut out = Vec::new();
        let made = |ahead: &mut Ahead| bytes.chunks(1000).try_for_each(|chunk| ahead.write_all(chunk));
        let (made, written) = make_ahead(made, &mut out);
        made.and(written).unwrap();
        assert!(out == bytes);
        let (made, written) = make_ahead(|ahead| ahead.write_all(b"half").and(Err(io::Error::other("made"))), &mut out);
        assert_eq!((made.unwrap_err().to_string(), written.is_ok()), ("made".to_owned(), true));
        assert!(out.ends_with(b"half"));
        // However much is left to make, it ends.
        let mut full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let endless = |ahead: &mut Ahead| loop {
            ahead.write_all(&bytes)?;
        };
        let (made, written): (io::Result<()>, _) = make_ahead(endless, &mut full);
        assert_eq!(made.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
        assert_eq!(written.unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
