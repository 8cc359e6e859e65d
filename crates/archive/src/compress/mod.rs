//! Compression of layer blobs.
//!
//! [`Decoder`] reads what registries hold: gzip with any number of members, zstd with any number
//! of frames. It is strict about the end: a stream that is cut, or followed by anything else, is an
//! error (Go's readers agree), because the digest covers those bytes and so must their meaning.
//! Expansion is bounded by ratio and in all ([`Limits`]).
//!
//! [`Encoder`] writes: [`ParallelGzip`] one gzip member from many threads, zstd likewise. The same
//! input gives the same bytes, whatever the number of threads.

mod gzip;

use std::fmt;
use std::io::{self, BufReader, Read, Write};
use std::num::NonZeroUsize;

use flate2::bufread::MultiGzDecoder;
use plies_oci::{Compression, ErrorKind};

pub use self::gzip::ParallelGzip;
use crate::limits::{LimitExceeded, Limits};

/// Largest zstd window that we make room for: 2^27 bytes = 128 MiB, which is what `zstd -d`
/// accepts by itself (`ZSTD_WINDOWLOG_LIMIT_DEFAULT`). Frames may ask for 2 GiB.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// zstd's own default.
const ZSTD_LEVEL: i32 = 3;
/// gzip's own default.
const GZIP_LEVEL: u32 = 6;
/// Compressed bytes read at once.
const INPUT_BUFFER_BYTES: usize = 128 << 10;

/// Why compressed bytes could not be read. Travels inside an [`io::Error`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Not what the format allows: damaged, cut short, or followed by something else.
    #[error("corrupt {format} stream")]
    Corrupt {
        /// `gzip` or `zstd`.
        format: &'static str,
        /// The decompressor's error.
        #[source]
        source: io::Error,
    },
    /// A limit was hit.
    #[error(transparent)]
    Limit(#[from] LimitExceeded),
}

impl DecodeError {
    /// What a caller can do about an error of a reader that may be one of ours.
    pub fn kind_of(error: &io::Error) -> ErrorKind {
        match error.get_ref().and_then(|inner| inner.downcast_ref()) {
            Some(Self::Limit(_)) => ErrorKind::Limit,
            Some(Self::Corrupt { .. }) => ErrorKind::DataLoss,
            None => ErrorKind::Unavailable,
        }
    }

    fn into_io(self) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, self)
    }
}

/// Says how a blob is compressed by its first bytes (four suffice). For input that carries no
/// media type: `ADD`, `load`, the manifests that lie.
pub fn detect(first: &[u8]) -> Compression {
    match first {
        [0x1f, 0x8b, 0x08, ..] => Compression::Gzip,
        // A frame, or a skippable frame (RFC 8878, 3.1) in front of one.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
        _ => Compression::None,
    }
}

/// Counts what the decompressor takes, and remembers whether it was the source that failed.
struct Source<R> {
    inner: R,
    taken_bytes: u64,
    failed: bool,
}

impl<R: Read> Read for Source<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self.inner.read(buf) {
            Ok(n) => {
                self.taken_bytes += n as u64;
                Ok(n)
            }
            Err(error) => {
                self.failed = error.kind() != io::ErrorKind::Interrupted;
                Err(error)
            }
        }
    }
}

enum Format<R: Read> {
    Plain(Source<R>),
    Gzip(MultiGzDecoder<BufReader<Source<R>>>),
    Zstd(zstd::stream::read::Decoder<'static, BufReader<Source<R>>>),
}

/// Decompresses a layer blob within limits.
pub struct Decoder<R: Read> {
    format: Format<R>,
    given_bytes: u64,
    limits: Limits,
}

impl<R: Read> Decoder<R> {
    /// Decompresses `source`.
    ///
    /// # Errors
    /// When there is no memory for the decompressor.
    pub fn new(source: R, compression: Compression, limits: &Limits) -> io::Result<Self> {
        let source = Source { inner: source, taken_bytes: 0, failed: false };
        let buffered = |source| BufReader::with_capacity(INPUT_BUFFER_BYTES, source);
        let format = match compression {
            Compression::None => Format::Plain(source),
            Compression::Gzip => Format::Gzip(MultiGzDecoder::new(buffered(source))),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(buffered(source))?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Format::Zstd(decoder)
            }
        };
        Ok(Self { format, given_bytes: 0, limits: limits.clone() })
    }

    fn source(&self) -> &Source<R> {
        match &self.format {
            Format::Plain(source) => source,
            Format::Gzip(decoder) => decoder.get_ref().get_ref(),
            Format::Zstd(decoder) => decoder.get_ref().get_ref(),
        }
    }

    /// The source, which stands at its end once the decoder has said that all is read.
    pub fn into_inner(self) -> R {
        match self.format {
            Format::Plain(source) => source.inner,
            Format::Gzip(decoder) => decoder.into_inner().into_inner().inner,
            Format::Zstd(decoder) => decoder.finish().into_inner().inner,
        }
    }

    fn check(&self) -> Result<(), LimitExceeded> {
        let given = self.given_bytes;
        LimitExceeded::check("unpacked_bytes", self.limits.unpacked_bytes, given, "uncompressed archive", None)?;
        if given > Limits::EXPANSION_GRACE_BYTES {
            let ratio = given / self.source().taken_bytes.max(1);
            LimitExceeded::check("expansion_ratio", self.limits.expansion_ratio, ratio, "compressed archive", None)?;
        }
        Ok(())
    }
}

impl<R: Read> Read for Decoder<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        let (name, result) = match &mut self.format {
            Format::Plain(source) => ("", source.read(buf)),
            Format::Gzip(decoder) => ("gzip", decoder.read(buf)),
            Format::Zstd(decoder) => ("zstd", decoder.read(buf)),
        };
        let n = match result {
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted || self.source().failed => return Err(error),
            Err(source) => return Err(DecodeError::Corrupt { format: name, source }.into_io()),
        };
        // zstd takes nothing at all for zero frames; gzip does not, and neither do the peers.
        if n == 0 && !matches!(self.format, Format::Plain(_)) && self.source().taken_bytes == 0 {
            let source = io::Error::from(io::ErrorKind::UnexpectedEof);
            return Err(DecodeError::Corrupt { format: name, source }.into_io());
        }
        self.given_bytes += n as u64;
        self.check().map_err(|limit| DecodeError::Limit(limit).into_io())?;
        Ok(n)
    }
}

impl<R: Read> fmt::Debug for Decoder<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").field("given_bytes", &self.given_bytes).finish_non_exhaustive()
    }
}

/// Compresses a layer blob. Nothing is complete before [`Encoder::finish`].
pub struct Encoder<W: Write>(Sink<W>);

enum Sink<W: Write> {
    Plain(W),
    Gzip(ParallelGzip<W>),
    Zstd(zstd::stream::write::Encoder<'static, W>),
}

impl<W: Write> Encoder<W> {
    /// Compresses into `out` with `threads` threads besides the caller's, at each format's default
    /// level: gzip 6, zstd 3 (with a checksum in the frame).
    ///
    /// # Errors
    /// When there is no memory for the compressor.
    pub fn new(out: W, compression: Compression, threads: NonZeroUsize) -> io::Result<Self> {
        Ok(Self(match compression {
            Compression::None => Sink::Plain(out),
            Compression::Gzip => Sink::Gzip(ParallelGzip::new(out, GZIP_LEVEL, threads)),
            Compression::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(out, ZSTD_LEVEL)?;
                encoder.include_checksum(true)?;
                // From one worker on, libzstd's output does not depend on how many there are
                // (zstd.h, ZSTD_c_nbWorkers); with none it would differ.
                encoder.multithread(u32::try_from(threads.get()).unwrap_or(u32::MAX).min(256))?;
                Sink::Zstd(encoder)
            }
        }))
    }

    /// Completes the stream and gives the output back, not flushed.
    ///
    /// # Errors
    /// Those of the output.
    pub fn finish(self) -> io::Result<W> {
        match self.0 {
            Sink::Plain(out) => Ok(out),
            Sink::Gzip(encoder) => encoder.finish(),
            Sink::Zstd(encoder) => encoder.finish(),
        }
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match &mut self.0 {
            Sink::Plain(out) => out.write(buf),
            Sink::Gzip(encoder) => encoder.write(buf),
            Sink::Zstd(encoder) => encoder.write(buf),
        }
    }

    /// Flushes the output only. The compressors keep what they hold: where a block ends must
    /// depend on the input alone.
    fn flush(&mut self) -> io::Result<()> {
        match &mut self.0 {
            Sink::Plain(out) => out.flush(),
            Sink::Gzip(encoder) => encoder.flush(),
            Sink::Zstd(encoder) => encoder.get_mut().flush(),
        }
    }
}

impl<W: Write> fmt::Debug for Encoder<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Sink::Plain(_) => "Encoder(plain)",
            Sink::Gzip(_) => "Encoder(gzip)",
            Sink::Zstd(_) => "Encoder(zstd)",
        })
    }
}
