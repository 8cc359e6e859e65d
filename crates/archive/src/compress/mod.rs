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
use std::io::{self, BufRead, BufReader, Read, Write};
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
const GZIP_LEVEL: i32 = 6;
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

impl<R: BufRead> Read for Source<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buf);
        match &read {
            Ok(n) => self.taken_bytes += *n as u64,
            Err(error) => self.failed |= error.kind() != io::ErrorKind::Interrupted,
        }
        read
    }
}

impl<R: BufRead> BufRead for Source<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        let filled = self.inner.fill_buf();
        self.failed |= filled.as_ref().is_err_and(|error| error.kind() != io::ErrorKind::Interrupted);
        filled
    }

    fn consume(&mut self, n: usize) {
        self.taken_bytes += n as u64;
        self.inner.consume(n);
    }
}

enum Format<R: BufRead> {
    Plain(Source<R>),
    Gzip(Box<MultiGzDecoder<Source<R>>>),
    Zstd(zstd::stream::read::Decoder<'static, Source<R>>),
}

/// Decompresses a layer blob within limits.
pub struct Decoder<R: BufRead> {
    format: Format<R>,
    given_bytes: u64,
    limits: Limits,
}

impl<R: Read> Decoder<BufReader<R>> {
    /// Decompresses `source`, which is read in pieces of 128 KiB.
    ///
    /// # Errors
    /// When there is no memory for the decompressor.
    pub fn new(source: R, compression: Compression, limits: &Limits) -> io::Result<Self> {
        Self::buffered(BufReader::with_capacity(INPUT_BUFFER_BYTES, source), compression, limits)
    }
}

impl<R: BufRead> Decoder<R> {
    /// Decompresses `source`, which has a buffer of its own.
    ///
    /// # Errors
    /// When there is no memory for the decompressor.
    pub fn buffered(source: R, compression: Compression, limits: &Limits) -> io::Result<Self> {
        let source = Source { inner: source, taken_bytes: 0, failed: false };
        let format = match compression {
            Compression::None => Format::Plain(source),
            Compression::Gzip => Format::Gzip(Box::new(MultiGzDecoder::new(source))),
            Compression::Zstd => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(source)?;
                decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
                Format::Zstd(decoder)
            }
        };
        Ok(Self { format, given_bytes: 0, limits: limits.clone() })
    }

    fn source(&self) -> &Source<R> {
        match &self.format {
            Format::Plain(source) => source,
            Format::Gzip(decoder) => decoder.get_ref(),
            Format::Zstd(decoder) => decoder.get_ref(),
        }
    }

    /// The source, which stands at its end once the decoder has said that all is read.
    pub fn into_inner(self) -> R {
        match self.format {
            Format::Plain(source) => source.inner,
            Format::Gzip(decoder) => decoder.into_inner().inner,
            Format::Zstd(decoder) => decoder.finish().inner,
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

impl<R: BufRead> Read for Decoder<R> {
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

impl<R: BufRead> fmt::Debug for Decoder<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").field("given_bytes", &self.given_bytes).finish_non_exhaustive()
    }
}

/// The level that a format works at when one is asked for, on its own scale: gzip 0 to 9, zstd 1 to 22; others are
/// brought into that range. `None` is the format's default.
pub fn level_of(compression: Compression, level: Option<i32>) -> i32 {
    match compression {
        Compression::None => 0,
        Compression::Gzip => level.map_or(GZIP_LEVEL, |level| level.clamp(0, 9)),
        // libzstd takes 0 for its default.
        Compression::Zstd => level.filter(|level| *level != 0).map_or(ZSTD_LEVEL, |level| level.clamp(1, 22)),
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
        Self::with_level(out, compression, None, threads)
    }

    /// As [`Encoder::new`], at a level of the format's own scale ([`level_of`]).
    ///
    /// # Errors
    /// As [`Encoder::new`].
    pub fn with_level(out: W, compression: Compression, level: Option<i32>, threads: NonZeroUsize) -> io::Result<Self> {
        let level = level_of(compression, level);
        Ok(Self(match compression {
            Compression::None => Sink::Plain(out),
            Compression::Gzip => Sink::Gzip(ParallelGzip::new(out, level.unsigned_abs(), threads)),
            Compression::Zstd => {
                let mut encoder = zstd::stream::write::Encoder::new(out, level)?;
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ONE: NonZeroUsize = NonZeroUsize::MIN;

    fn compress(data: &[u8], compression: Compression, threads: usize) -> Vec<u8> {
        let mut encoder = Encoder::new(Vec::new(), compression, NonZeroUsize::new(threads).unwrap()).unwrap();
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn decompress(data: &[u8], compression: Compression, limits: &Limits) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Decoder::new(data, compression, limits)?.read_to_end(&mut out)?;
        Ok(out)
    }

    /// Text with matches near and far, of any length.
    fn text(len: usize) -> Vec<u8> {
        let mut state = 1_u32;
        let mut out = Vec::with_capacity(len);
        while out.len() < len {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            out.extend_from_slice(format!("{} line {} of the text\n", state >> 20, state % 97).as_bytes());
        }
        out.truncate(len);
        out
    }

    const ALL: [Compression; 3] = [Compression::None, Compression::Gzip, Compression::Zstd];
    const BOTH: [Compression; 2] = [Compression::Gzip, Compression::Zstd];

    #[test]
    fn what_is_compressed_comes_back_whatever_the_length() {
        for compression in ALL {
            for len in [0, 1, 5, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (2 << 20) + 12_345] {
                let data = text(len);
                let compressed = compress(&data, compression, 2);
                let back = decompress(&compressed, compression, &Limits::default()).unwrap();
                assert!(back == data, "{compression:?}, {len} bytes");
                if compression != Compression::None {
                    assert_eq!(detect(&compressed[..4]), compression);
                }
            }
        }
    }

    #[test]
    fn output_does_not_depend_on_threads_or_on_how_it_is_written() {
        let data = text(9 << 20);
        for compression in BOTH {
            let expected = compress(&data, compression, 1);
            for threads in 2..=4 {
                assert!(compress(&data, compression, threads) == expected, "{compression:?}, {threads} threads");
            }
            let mut encoder = Encoder::new(Vec::new(), compression, ONE).unwrap();
            for piece in data.chunks(7_777) {
                encoder.write_all(piece).unwrap();
                encoder.flush().unwrap();
            }
            assert!(encoder.finish().unwrap() == expected, "{compression:?}, in pieces");
        }
    }

    #[test]
    fn a_failing_output_is_an_error_and_no_hang() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::Error::from(io::ErrorKind::StorageFull))
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        for compression in BOTH {
            let mut encoder = Encoder::new(Full, compression, ONE).unwrap();
            let result = encoder.write_all(&text(20 << 20)).and_then(|()| encoder.finish().map(|_| ()));
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::StorageFull, "{compression:?}");
        }
    }

    #[test]
    fn gzip_header_tells_nothing_about_the_machine() {
        assert_eq!(compress(b"x", Compression::Gzip, 1)[..10], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255]);
    }

    #[test]
    fn detect_goes_by_magic_numbers() {
        for (first, compression) in [
            (&b""[..], Compression::None),
            (b"\x1f\x8b", Compression::None),
            (b"\x1f\x8b\x08", Compression::Gzip),
            (b"\x1f\x8b\x00\x00", Compression::None),
            (b"\x28\xb5\x2f\xfd", Compression::Zstd),
            (b"\x50\x2a\x4d\x18", Compression::Zstd),
            (b"\x5f\x2a\x4d\x18", Compression::Zstd),
            (b"\x60\x2a\x4d\x18", Compression::None),
            (b"\xfd7zXZ\0", Compression::None),
            (b"etc/passwd", Compression::None),
        ] {
            assert_eq!(detect(first), compression, "{}", first.escape_ascii());
        }
    }

    #[test]
    fn members_and_frames_are_concatenated() {
        for compression in BOTH {
            let mut stream = Vec::new();
            for part in [&b"one, "[..], b"", b"two"] {
                stream.extend(compress(part, compression, 1));
            }
            assert_eq!(decompress(&stream, compression, &Limits::default()).unwrap(), b"one, two");
        }
        let skippable = b"\x53\x2a\x4d\x18\x03\0\0\0abc";
        let frame = compress(b"data", Compression::Zstd, 1);
        for stream in [[&skippable[..], &frame].concat(), [&frame[..], skippable, skippable, &frame].concat()] {
            assert!(decompress(&stream, Compression::Zstd, &Limits::default()).unwrap().starts_with(b"data"));
        }
    }

    #[test]
    fn cut_damaged_and_followed_streams_are_data_loss() {
        let data = text(2000);
        for compression in BOTH {
            let good = compress(&data, compression, 1);
            let refused = |stream: &[u8], what: &str| {
                let error = decompress(stream, compression, &Limits::default()).unwrap_err();
                assert_eq!(DecodeError::kind_of(&error), ErrorKind::DataLoss, "{compression:?}: {what}");
                let corrupt = error.get_ref().unwrap();
                assert!(corrupt.source().is_some(), "{corrupt}");
            };
            for len in 0..good.len() {
                refused(&good[..len], &format!("cut to {len} bytes"));
            }
            for garbage in [&b"\0"[..], b"garbage", &[0; 512]] {
                refused(&[&good[..], garbage].concat(), "trailing garbage");
            }
            let mut flipped = good.clone();
            let last = flipped.len() - 5;
            flipped[last] ^= 1;
            refused(&flipped, "wrong checksum");
        }
    }

    #[test]
    fn an_error_of_the_source_stays_what_it_is() {
        struct Broken;
        impl Read for Broken {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::from(io::ErrorKind::ConnectionReset))
            }
        }
        for compression in ALL {
            let error = Decoder::new(Broken, compression, &Limits::default()).unwrap().read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            assert_eq!(DecodeError::kind_of(&error), ErrorKind::Unavailable);
        }
    }

    fn limit_of(error: &io::Error) -> &'static str {
        match error.get_ref().and_then(|error| error.downcast_ref()) {
            Some(DecodeError::Limit(limit)) => limit.limit,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn b01_bombs_hit_the_ratio_after_the_grace() {
        for compression in BOTH {
            let mut encoder = Encoder::new(Vec::new(), compression, ONE).unwrap();
            io::copy(&mut io::repeat(0).take(80 << 20), &mut encoder).unwrap();
            let bomb = encoder.finish().unwrap();
            let limits = Limits::default();
            let mut decoder = Decoder::new(bomb.as_slice(), compression, &limits).unwrap();
            let error = io::copy(&mut decoder, &mut io::sink()).unwrap_err();
            assert_eq!(limit_of(&error), "expansion_ratio");
            assert_eq!(DecodeError::kind_of(&error), ErrorKind::Limit);
            let generous = Limits { expansion_ratio: 1_000_000, ..limits };
            let mut decoder = Decoder::new(bomb.as_slice(), compression, &generous).unwrap();
            assert_eq!(io::copy(&mut decoder, &mut io::sink()).unwrap(), 80 << 20);
        }
    }

    #[test]
    fn b01_output_is_bounded_in_all() {
        let limits = Limits { unpacked_bytes: 1000, ..Limits::default() };
        for compression in ALL {
            let fits = compress(&text(1000), compression, 1);
            assert_eq!(decompress(&fits, compression, &limits).unwrap().len(), 1000);
            let over = compress(&text(1001), compression, 1);
            assert_eq!(limit_of(&decompress(&over, compression, &limits).unwrap_err()), "unpacked_bytes");
        }
    }

    #[test]
    fn b03_many_empty_members_are_linear_and_flat() {
        let stream = compress(b"", Compression::Gzip, 1).repeat(100_000);
        assert_eq!(decompress(&stream, Compression::Gzip, &Limits::default()).unwrap(), b"");
    }

    #[test]
    fn b04_large_windows_are_refused() {
        // A frame header without a size: descriptor 0, then the window's exponent (RFC 8878, 3.1.1.1.2).
        for (log, accepted) in [(27, true), (28, false), (31, false)] {
            let mut frame = b"\x28\xb5\x2f\xfd\x00".to_vec();
            frame.push((log - 10) << 3);
            frame.extend_from_slice(b"\x19\0\0abc"); // one last, raw block of 3 bytes
            assert_eq!(decompress(&frame, Compression::Zstd, &Limits::default()).is_ok(), accepted, "2^{log}");
        }
    }

    proptest! {
        #[test]
        fn damaged_streams_never_panic(at in 0..600_usize, byte in any::<u8>(), cut in 0..600_usize) {
            for compression in BOTH {
                let mut stream = compress(&text(1500), compression, 1);
                let at = at % stream.len();
                stream[at] = byte;
                stream.truncate(stream.len().max(cut));
                let _either_way = decompress(&stream, compression, &Limits::default());
            }
        }
    }
}
