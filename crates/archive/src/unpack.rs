//! From a blob to a tree, in one pass over the bytes.
//!
//! ```text
//! blob  |  decompress  |  diff ID, tar -> tree
//!       |              |            \-> tar-split
//! ```
//!
//! Each bar is a border between threads: who reads the blob may also hash it and write it down, inflating takes longest, and
//! hashing with making files about as long, so even one layer keeps two processors busy. The thread that makes files can
//! reach nothing but its tree, where the kernel sees to that.

use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::thread::{self, Scope};

use plies_oci::{Compression, DiffId, ErrorKind};

use crate::apply::{Applied, ApplyError, ApplyStyle, apply};
use crate::compress::Decoder;
use crate::confine::confined;
use crate::erofs::{self, IndexingError};
use crate::hash::HashingReader;
use crate::limits::Limits;
use crate::prefetch::Prefetch;
use crate::root::Root;
use crate::tar::{EntryPath, Reader};
use crate::tarsplit::{Recorded, Recorder};

/// A blob that became a tree.
#[derive(Debug)]
pub struct Unpacked {
    /// The sha256 of the uncompressed archive, all of it. The caller compares it with what the
    /// image says before it lets anybody see the tree.
    pub diff_id: DiffId,
    /// Bytes of the uncompressed archive.
    pub unpacked_bytes: u64,
    /// What was done to the tree.
    pub applied: Applied,
    /// What the archive held besides the contents of its files, if that was recorded.
    pub tar_split: Option<Recorded>,
}

/// What became of an archive that came by once, and cannot be read again.
#[derive(Debug)]
pub struct Received {
    /// The sha256 of the uncompressed archive, all of it.
    pub diff_id: DiffId,
    /// Bytes of the uncompressed archive.
    pub unpacked_bytes: u64,
    /// What was done to the tree. `None`: the archive needs the layers below it, and the tree is to be thrown away. The
    /// archive is then in the recorder's spool.
    pub applied: Option<Applied>,
    /// What the archive held besides the contents of its files; the archive itself, if those cannot give it back.
    pub recorded: Recorded,
}

/// A blob that became a tar with an index.
#[derive(Debug)]
pub struct Packed {
    /// The sha256 of the tar, all of it.
    pub diff_id: DiffId,
    /// Bytes of the tar.
    pub tar_bytes: u64,
    /// Where in the tar everything is. `None`: it needs the layers below it, or holds what no index can; it was written all
    /// the same, to be unpacked in another way.
    pub index: Option<erofs::Index>,
}

/// Why a blob could not be unpacked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UnpackError {
    /// The decompressor could not be set up.
    #[error("set up decompression")]
    Decoder {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The archive could not be read or applied.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The tar could not be written down.
    #[error("write the tar")]
    Write {
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl UnpackError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Decoder { .. } | Self::Write { .. } => ErrorKind::Unavailable,
            Self::Apply(error) => error.kind(),
        }
    }
}

/// Applies a layer blob to the tree at `root`, reading it to its end, in another thread. With a
/// `recorder`, what is needed to assemble the archive again goes there.
///
/// # Errors
/// [`UnpackError`]; see [`apply`] for the state of the tree.
pub fn unpack(
    blob: impl Read + Send,
    compression: Compression,
    root: BorrowedFd<'_>,
    style: ApplyStyle,
    limits: &Limits,
    recorder: Option<Recorder>,
) -> Result<Unpacked, UnpackError> {
    thread::scope(|scope| {
        let mut reader = Reader::new(HashingReader::new(tar_of(scope, blob, compression, limits)?), limits);
        if let Some(recorder) = recorder {
            reader = reader.with_recorder(recorder);
        }
        let applied = confined(root, || apply(&mut reader, root, style, limits))?;
        let finished = reader.finish().map_err(ApplyError::from)?;
        let (_, hashed) = finished.inner.finish();
        Ok(Unpacked {
            diff_id: DiffId::from_bytes(hashed.sha256),
            unpacked_bytes: hashed.size_bytes,
            applied,
            tar_split: finished.recorded,
        })
    })
}

/// Makes a layer of a blob in the empty directory `root`, in one pass: whatever the archive asks for, it can be given
/// back afterwards, from the tree and the recording or, where that cannot be, from the recorder's spool. Only there is
/// anything written twice.
///
/// # Errors
/// [`UnpackError`], but never [`ApplyError::NeedsBase`].
pub fn receive(
    blob: impl Read + Send,
    compression: Compression,
    root: BorrowedFd<'_>,
    limits: &Limits,
    recorder: Recorder,
) -> Result<Received, UnpackError> {
    thread::scope(|scope| {
        let decoder = Decoder::new(blob, compression, limits).map_err(|source| UnpackError::Decoder { source })?;
        let ahead = Prefetch::spawn(scope, HashingReader::new(decoder));
        let mut reader = Reader::new(ahead, limits).with_recorder(recorder);
        let applied = match confined(root, || apply(&mut reader, root, ApplyStyle::Layer, limits)) {
            // The entry that asked for it has consumed no data, so nothing was lost.
            Err(ApplyError::NeedsBase { .. }) => {
                let tree = Root::new(root);
                let tree = tree.map_err(|source| ApplyError::Io { op: "open", path: EntryPath::root(), source })?;
                reader.preserve(&tree).map_err(ApplyError::from)?;
                None
            }
            applied => Some(applied?),
        };
        let finished = reader.finish().map_err(ApplyError::from)?;
        let (_, hashed) = finished.inner.join().finish();
        Ok(Received {
            diff_id: DiffId::from_bytes(hashed.sha256),
            unpacked_bytes: hashed.size_bytes,
            applied,
            recorded: finished.recorded.expect("because the reader was given a recorder"),
        })
    })
}

/// Writes the tar that a blob decompresses to, and indexes it on the way.
///
/// # Errors
/// [`UnpackError`], but never [`ApplyError::NeedsBase`]; `tar` then has a part of it.
pub fn pack(
    blob: impl Read + Send,
    compression: Compression,
    tar: impl Write,
    limits: &Limits,
) -> Result<Packed, UnpackError> {
    thread::scope(|scope| {
        let hashing = HashingReader::new(tar_of(scope, blob, compression, limits)?);
        let mut copying = Copying { inner: hashing, out: tar, failed: None };
        let read = |copying: &mut Copying<_, _>| {
            let mut reader = Reader::new(copying, limits);
            let index = match erofs::index(&mut reader, limits) {
                Ok(index) => Some(index),
                Err(IndexingError::Unfit { .. } | IndexingError::Apply(ApplyError::NeedsBase { .. })) => None,
                Err(IndexingError::Apply(error)) => return Err(error),
            };
            Ok((index, reader.finish()?.size_bytes))
        };
        let read = read(&mut copying);
        if let Some(source) = copying.failed {
            return Err(UnpackError::Write { source });
        }
        let (index, tar_bytes) = read?;
        let (_, hashed) = copying.inner.finish();
        Ok(Packed { diff_id: DiffId::from_bytes(hashed.sha256), tar_bytes, index })
    })
}

/// The tar that a blob decompresses to: one other thread reads the blob and, unless it is plain, one more decompresses it.
fn tar_of<'scope>(
    scope: &'scope Scope<'scope, '_>,
    blob: impl Read + Send + 'scope,
    compression: Compression,
    limits: &Limits,
) -> Result<Box<dyn Read + Send + 'scope>, UnpackError> {
    let decoder = Decoder::buffered(Prefetch::spawn(scope, blob), compression, limits);
    let decoder = decoder.map_err(|source| UnpackError::Decoder { source })?;
    Ok(match compression {
        Compression::None => Box::new(decoder),
        Compression::Gzip | Compression::Zstd => Box::new(Prefetch::spawn(scope, decoder)),
    })
}

/// Writes down all that is read through it.
struct Copying<R, W> {
    inner: R,
    out: W,
    /// Why that failed: a reader takes an error for one of its source.
    failed: Option<io::Error>,
}

impl<R: Read, W: Write> Read for Copying<R, W> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        if let Err(error) = self.out.write_all(&buffer[..n]) {
            self.failed = Some(error);
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::os::fd::AsFd;

    use super::*;
    use crate::compress::Encoder;
    use crate::tarsplit::{Output, assemble, open_in};
    use crate::testing::*;

    fn compressed(bytes: &[u8], compression: Compression) -> Vec<u8> {
        let mut encoder = Encoder::new(Vec::new(), compression, NonZeroUsize::MIN).unwrap();
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn run(place: &Place, blob: &[u8], compression: Compression) -> Result<Unpacked, UnpackError> {
        let (root, limits) = (open(&place.root()), Limits::default());
        unpack(blob, compression, root.as_fd(), ApplyStyle::Layer, &limits, Some(Recorder::in_memory()))
    }

    #[test]
    fn privileged_a_blob_becomes_a_layer_and_its_archive_comes_back() {
        if skip_unprivileged() {
            return;
        }
        let items = [
            dir("etc"),
            file("etc/a", "content"),
            hard_link("etc/b", "etc/a"),
            symlink("lib", "usr/lib"),
            file("usr/lib/big", &"x".repeat(300_000)),
            file("lib/through", "a link"),
            file("etc/.wh.gone", ""),
            file("empty", ""),
        ];
        let mut tar = archive(&items);
        // Bytes behind the end marker belong to the diff ID.
        tar.extend([0; 1024]);
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let blob = compressed(&tar, compression);
            let place = Place::new();
            let root = open(&place.root());
            let unpacked = run(&place, &blob, compression).unwrap();
            assert_eq!(unpacked.unpacked_bytes, tar.len() as u64);
            assert_eq!(unpacked.applied.entries, 8);
            let mut hasher = plies_oci::Sha256Hasher::default();
            hasher.update(&tar);
            assert_eq!(unpacked.diff_id, DiffId::from_bytes(hasher.finish()));

            let recorded = unpacked.tar_split.unwrap();
            assert!(recorded.unfaithful.is_none());
            let Output::Memory(tar_split) = recorded.output else { panic!("asked for memory") };
            let tree = Root::new(&root).unwrap();
            let mut again = Vec::new();
            assemble(tar_split.as_slice(), |name, _| open_in(&tree, name), &mut again).unwrap();
            assert!(again == tar, "{compression:?}");
        }
    }

    #[test]
    fn privileged_t13_a_cut_blob_is_an_error_at_any_length() {
        if skip_unprivileged() {
            return;
        }
        let tar = archive(&[file("a", "1"), file("b", &"2".repeat(1_000))]);
        let blob = compressed(&tar, Compression::Gzip);
        for length in 0..blob.len() {
            run(&Place::new(), &blob[..length], Compression::Gzip).unwrap_err();
        }
        for length in (0..tar.len() - 1_024).step_by(97) {
            run(&Place::new(), &tar[..length], Compression::None).unwrap_err();
        }
    }

    #[test]
    fn privileged_a_failing_blob_ends_the_threads_and_tells_why() {
        if skip_unprivileged() {
            return;
        }
        struct Endless;
        impl Read for Endless {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                buf.fill(b'x');
                Ok(buf.len())
            }
        }
        let place = Place::new();
        let root = open(&place.root());
        let limits = Limits::default();
        let error = unpack(Endless, Compression::None, root.as_fd(), ApplyStyle::Layer, &limits, None).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);

        // One that breaks off is told of as what it is, through however many threads.
        struct BreaksOff<'a>(&'a [u8]);
        impl Read for BreaksOff<'_> {
            fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
                match self.0.is_empty() {
                    true => Err(io::ErrorKind::ConnectionReset.into()),
                    false => self.0.read(buf),
                }
            }
        }
        let tar = archive(&[file("a", &"1".repeat(100_000))]);
        for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
            let blob = compressed(&tar, compression);
            let blob = BreaksOff(&blob[..blob.len() / 2]);
            let place = Place::new();
            let root = open(&place.root());
            let error = unpack(blob, compression, root.as_fd(), ApplyStyle::Layer, &limits, None).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unavailable, "{compression:?}: {error:?}");
        }
    }

    /// Receives an archive and gives it back, from the spool if it is there.
    fn there_and_back(tar: &[u8]) -> (Received, Vec<u8>) {
        let place = Place::new();
        let root = open(&place.root());
        let limits = Limits::default();
        let recorder = Recorder::in_memory().with_spool(tempfile::tempfile().unwrap());
        let blob = compressed(tar, Compression::Gzip);
        let mut received = receive(blob.as_slice(), Compression::Gzip, root.as_fd(), &limits, recorder).unwrap();
        let mut back = Vec::new();
        match &mut received.recorded.archive {
            Some(archive) => {
                io::Seek::rewind(archive).unwrap();
                archive.read_to_end(&mut back).unwrap();
            }
            None => {
                let Output::Memory(tar_split) = &received.recorded.output else { panic!("asked for memory") };
                let tree = Root::new(&root).unwrap();
                assemble(tar_split.as_slice(), |name, _| open_in(&tree, name), &mut back).unwrap();
            }
        }
        (received, back)
    }

    #[test]
    fn privileged_t18_whatever_is_received_comes_back_byte_by_byte() {
        if skip_unprivileged() {
            return;
        }
        let big = "x".repeat(300_000);
        for (what, spooled, needs_base, items) in [
            ("plain", false, false, vec![dir("d"), file("d/a", &big), file("e", "")]),
            ("a file twice", true, false, vec![file("a", &big), file("b", "b"), file("a", "2"), file("c", &big)]),
            ("other spelling", true, false, vec![file("d/a", "1"), file("./d//a", "22"), file("z", "z")]),
            ("a file where one was", true, false, vec![file("a", "1"), dir("a"), file("a/b", "1")]),
            (
                "through a link that goes",
                true,
                false,
                vec![symlink("l", "r"), dir("r"), file("l/a", &big), dir("l"), file("l/b", "b")],
            ),
            ("a link into a lower layer", true, true, vec![file("a", &big), hard_link("b", "lower"), file("c", &big)]),
            ("first of all", true, true, vec![hard_link("b", "lower"), file("c", &big)]),
            ("both", true, true, vec![file("a", "1"), file("a", "2"), hard_link("b", "lower"), file("c", "3")]),
            ("aufs", false, false, vec![file(".wh..wh.plnk/1", &big), file("a", "1")]),
        ] {
            let mut tar = archive(&items);
            tar.extend([7; 1000]);
            let (received, back) = there_and_back(&tar);
            assert!(back == tar, "{what}");
            assert_eq!(received.recorded.archive.is_some(), spooled, "{what}");
            assert_eq!(received.applied.is_none(), needs_base, "{what}");
            assert_eq!(received.unpacked_bytes, tar.len() as u64, "{what}");
        }
    }

    #[test]
    fn a_blob_is_packed_whole_whether_or_not_it_can_be_indexed() {
        let fits = archive(&[dir("d"), file("d/f", &"x".repeat(300_000))]);
        let needs_base = archive(&[file("a", "1"), hard_link("b", "below"), file("c", &"x".repeat(300_000))]);
        for (tar, indexed) in [(fits, true), (needs_base, false)] {
            for compression in [Compression::None, Compression::Gzip, Compression::Zstd] {
                let mut written = Vec::new();
                let blob = compressed(&tar, compression);
                let packed = pack(blob.as_slice(), compression, &mut written, &Limits::default()).unwrap();
                assert!(written == tar);
                assert_eq!(packed.diff_id, DiffId::from_bytes(*plies_oci::BlobDigest::of(&tar).as_bytes()));
                assert_eq!((packed.tar_bytes, packed.index.is_some()), (tar.len() as u64, indexed));
            }
        }
    }

    #[test]
    fn what_cannot_be_packed_says_whose_fault_it_is() {
        let tar = archive(&[file("f", "content")]);
        let (limits, none) = (Limits::default(), Compression::None);
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let full = pack(tar.as_slice(), none, full, &limits).unwrap_err();
        assert!(matches!(full, UnpackError::Write { source } if source.kind() == io::ErrorKind::StorageFull));
        let cut = pack(&tar[..600], none, io::sink(), &limits).unwrap_err();
        assert!(matches!(cut, UnpackError::Apply(ApplyError::Tar(_))), "{cut:?}");
        let refused = archive(&[file(".wh.x", "content")]);
        let refused = pack(refused.as_slice(), none, io::sink(), &limits).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    }
}
