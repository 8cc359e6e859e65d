use std::io::{self, Read};

use super::entry::Entry;
use super::error::TarError;
use crate::limits::Limits;
use crate::tarsplit::{Recorded, Recorder, Unfaithful};

/// A strict, streaming reader of one archive.
#[derive(Debug)]
pub struct Reader<R> {
    inner: R,
    recorder: Option<Recorder>,
}

/// What is left when an archive was read to its end.
#[derive(Debug)]
pub struct Finished<R> {
    /// The input, at its end.
    pub inner: R,
    /// The recording, if one was asked for.
    pub recorded: Option<Recorded>,
    /// Bytes of the uncompressed archive, all of them.
    pub size_bytes: u64,
    /// Entries that were in it.
    pub entries_count: u64,
}

impl<R: Read> Reader<R> {
    /// Reads `inner`, which gives the bytes of an uncompressed archive.
    pub fn new(inner: R, _limits: &Limits) -> Self {
        Self { inner, recorder: None }
    }

    /// Records all that is needed to assemble the same bytes again from the extracted files.
    /// To be called before the first entry is read.
    #[must_use]
    pub fn with_recorder(mut self, recorder: Recorder) -> Self {
        self.recorder = Some(recorder);
        self
    }

    /// The next entry; `None` at the end. Skips what is unread of the previous one.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        Ok(None)
    }

    /// The next chunk of the current entry's stored bytes (for a sparse file, its runs one after
    /// the other), straight from the buffer; empty at the end. The same chunk comes again until
    /// [`Self::consume`] is called.
    pub fn data(&mut self) -> Result<&[u8], TarError> {
        Ok(&[])
    }

    /// Marks the first `n` bytes of what [`Self::data`] gave as used.
    pub fn consume(&mut self, _n: usize) {}

    /// Stored bytes of the current entry that were not consumed yet.
    pub fn remaining_bytes(&self) -> u64 {
        0
    }

    /// Copies stored bytes of the current entry into `buf`; 0 at the end.
    pub fn read_data(&mut self, _buf: &mut [u8]) -> Result<usize, TarError> {
        Ok(0)
    }

    /// The current entry's stored bytes as a [`Read`]. Errors carry a [`TarError`].
    pub fn entry_data(&mut self) -> EntryData<'_, R> {
        EntryData(self)
    }

    /// Tells the recorder, if there is one, that the extracted tree will not hold what the archive held.
    pub fn mark_unfaithful(&mut self, _why: Unfaithful) {}

    /// Reads to the end of the input: bytes behind the end marker are part of the diff ID.
    pub fn finish(self) -> Result<Finished<R>, TarError> {
        Ok(Finished { inner: self.inner, recorded: None, size_bytes: 0, entries_count: 0 })
    }
}

/// The stored bytes of a [`Reader`]'s current entry.
#[derive(Debug)]
pub struct EntryData<'a, R>(&'a mut Reader<R>);

impl<R: Read> Read for EntryData<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read_data(buf).map_err(io::Error::other)
    }
}
