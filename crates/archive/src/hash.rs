//! Hashing and counting what passes by.

use std::io::{self, Read, Write};

use plies_oci::Sha256Hasher;

/// What passed through a [`HashingReader`] or [`HashingWriter`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hashed {
    /// The sha256 of the bytes. The caller knows whether this is a blob digest or a diff ID.
    pub sha256: [u8; 32],
    /// How many bytes it were.
    pub size_bytes: u64,
}

/// Hashes all that is read through it.
#[derive(Debug)]
pub struct HashingReader<R> {
    inner: R,
    hasher: Sha256Hasher,
    size_bytes: u64,
}

impl<R: Read> HashingReader<R> {
    /// Hashes what will be read from `inner`.
    pub fn new(inner: R) -> Self {
        Self { inner, hasher: Sha256Hasher::default(), size_bytes: 0 }
    }

    /// The reader, and the hash of what was read from it. Does not read to the end by itself.
    pub fn finish(self) -> (R, Hashed) {
        (self.inner, Hashed { sha256: self.hasher.finish(), size_bytes: self.size_bytes })
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buf)?;
        self.hasher.update(&buf[..n]);
        self.size_bytes += n as u64;
        Ok(n)
    }
}

/// Hashes all that is written through it.
#[derive(Debug)]
pub struct HashingWriter<W> {
    inner: W,
    hasher: Sha256Hasher,
    size_bytes: u64,
}

impl<W: Write> HashingWriter<W> {
    /// Hashes what will be written to `inner`.
    pub fn new(inner: W) -> Self {
        Self { inner, hasher: Sha256Hasher::default(), size_bytes: 0 }
    }

    /// The writer, not flushed, and the hash of what was written to it.
    pub fn finish(self) -> (W, Hashed) {
        (self.inner, Hashed { sha256: self.hasher.finish(), size_bytes: self.size_bytes })
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.hasher.update(&buf[..n]);
        self.size_bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use plies_oci::BlobDigest;

    use super::*;

    /// Takes and gives at most three bytes at a time.
    struct Dribble<T>(T);

    impl<R: Read> Read for Dribble<R> {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let n = buf.len().min(3);
            self.0.read(&mut buf[..n])
        }
    }

    impl<W: Write> Write for Dribble<W> {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.0.write(&buf[..buf.len().min(3)])
        }

        fn flush(&mut self) -> io::Result<()> {
            self.0.flush()
        }
    }

    #[test]
    fn only_bytes_that_passed_are_hashed() {
        let text = b"the quick brown fox";
        let expected = Hashed { sha256: *BlobDigest::of(text).as_bytes(), size_bytes: text.len() as u64 };

        let mut reader = HashingReader::new(Dribble(&text[..]));
        let mut read = Vec::new();
        reader.read_to_end(&mut read).unwrap();
        assert_eq!(reader.finish().1, expected);

        let mut writer = HashingWriter::new(Dribble(Vec::new()));
        writer.write_all(text).unwrap();
        let (written, hashed) = writer.finish();
        assert_eq!(hashed, expected);
        assert_eq!(written.0, read);
    }
}
