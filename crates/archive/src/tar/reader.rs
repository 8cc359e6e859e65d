//! The strict reader.
//!
//! **One meaning per byte string.** Layers are read by Go's archive/tar elsewhere. Whatever passes
//! here gives the same entries there, and what is refused there is refused here. Beyond that, we
//! refuse where other tars would disagree with Go (a lone zero block, dangling extension headers,
//! repeated keys) and what no layer can mean (paths that leave the root, the root as a file,
//! owners and devices that Linux has no number for). Global PAX headers change nothing, as in Go.
//!
//! The input goes through one buffer. Headers are decoded in place, file data is handed out as
//! slices of it ([`Reader::data`]), so that a caller can write(2) them without a copy. Memory is
//! that buffer, one entry's extension headers, and one sparse map, all bounded by [`Limits`].
//!
//! An archive ends with two zero blocks; without them it counts as truncated, because a cut between
//! two entries looks just so. What follows them is not parsed but is read to the end by
//! [`Reader::finish`]: the diff ID covers it.

use std::fmt;
use std::io::{self, Read};

use super::entry::{Device, Entry, EntryKind, EntryPath, Escaped, Timestamp};
use super::error::TarError;
use super::header::{BLOCK_BYTES, Block, Header, c_string, padding, type_flag};
use super::pax::Records;
use super::sparse::{
    DataMapParser, MapBuilder, OLD_GNU_IN_EXTENSION, OLD_GNU_IN_HEADER, PaxMap, map_in_records, old_gnu_entries,
    old_gnu_size, pax_map,
};
use crate::limits::{LimitExceeded, Limits};
use crate::root::Root;
use crate::tarsplit::{Recorded, Recorder, Unfaithful};

/// Bytes read at once: from here on, larger reads and writes are no faster.
const BUFFER_BYTES: usize = 256 << 10;

/// Largest owner or group: 2^31 - 1. Beyond it `uid_t` and `int` disagree between tools, and
/// 2^32 - 1 means "leave as it is" to chown(2).
const OWNER_MAX: i64 = i32::MAX as i64;
/// Largest device numbers: Linux has 12 bits for the major and 20 for the minor number.
const DEV_MAJOR_MAX: i64 = (1 << 12) - 1;
const DEV_MINOR_MAX: i64 = (1 << 20) - 1;

/// A strict, streaming reader of one archive.
///
/// Call [`Reader::next_entry`] until it returns `None`, reading what is wanted of each file's data
/// in between, then [`Reader::finish`]. After an error all further calls fail.
pub struct Reader<R> {
    inner: R,
    limits: Limits,
    recorder: Option<Recorder>,
    /// What was left out of the input: where files' bytes would begin, and how many.
    left_out: Option<Vec<(u64, u64)>>,
    /// Whether those of the current entry were.
    is_left_out: bool,
    buffer: Box<[u8]>,
    /// What is left of the buffer: `buffer[start..end]`.
    start: usize,
    end: usize,
    /// Bytes of the archive before `start`.
    offset: u64,
    /// Stored bytes of the current entry that were not consumed.
    remaining: u64,
    /// Padding behind them.
    padding: u64,
    entries: u64,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Reading,
    Ended,
    Failed,
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

/// Names and values, sorted by name.
type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// The extension headers before an entry.
#[derive(Debug, Default)]
struct Extensions {
    pax: Option<Records>,
    long_name: Vec<u8>,
    long_link: Vec<u8>,
    /// Whether any header that changes the next entry was seen.
    pending: bool,
}

impl<R: Read> Reader<R> {
    /// Reads `inner`, which gives the bytes of an uncompressed archive.
    pub fn new(inner: R, limits: &Limits) -> Self {
        Self {
            inner,
            limits: limits.clone(),
            recorder: None,
            left_out: None,
            is_left_out: false,
            buffer: vec![0; BUFFER_BYTES].into_boxed_slice(),
            start: 0,
            end: 0,
            offset: 0,
            remaining: 0,
            padding: 0,
            entries: 0,
            state: State::Reading,
        }
    }

    /// Records all that is needed to assemble the same bytes again from the extracted files.
    /// To be called before the first entry is read.
    #[must_use]
    pub fn with_recorder(mut self, recorder: Recorder) -> Self {
        debug_assert_eq!(self.offset, 0, "a recording begins at the beginning");
        self.recorder = Some(recorder);
        self
    }

    /// Reads an archive that lacks what its files hold, as a [recording](crate::tarsplit::Headers) has it: all else is there,
    /// padding and what sparse files store too. To be called before the first entry is read. Other files have no data then.
    #[must_use]
    pub fn without_data(mut self) -> Self {
        debug_assert_eq!(self.offset, 0, "an archive begins at the beginning");
        self.left_out = Some(Vec::new());
        self
    }

    /// With [`Reader::without_data`]: what was left out until now, where it would begin in the whole archive and how many bytes. Whoever
    /// has the archive compares it with what is there.
    pub fn left_out(&self) -> &[(u64, u64)] {
        self.left_out.as_deref().unwrap_or_default()
    }

    /// The next entry; `None` at the end marker, and again after that. Skips what is unread of the
    /// previous entry.
    ///
    /// # Errors
    /// Any [`TarError`].
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        match self.state {
            State::Reading => {}
            State::Ended => return Ok(None),
            State::Failed => return Err(self.malformed(self.offset, "it was refused before")),
        }
        let result = self.read_entry();
        match &result {
            Ok(Some(_)) => {}
            Ok(None) => self.state = State::Ended,
            Err(_) => self.fail(),
        }
        result
    }

    /// Bytes of the archive that were taken so far: right after [`Self::next_entry`], where the entry's stored bytes
    /// begin.
    pub fn position(&self) -> u64 {
        self.offset
    }

    /// The next chunk of the current entry's stored bytes (for a sparse file, its runs one after
    /// the other), straight from the buffer; empty at the end. The same bytes come again, and
    /// perhaps fewer than could, until [`Self::consume`] takes them.
    ///
    /// # Errors
    /// [`TarError::Truncated`], [`TarError::Read`], [`TarError::Limit`], [`TarError::Record`].
    pub fn data(&mut self) -> Result<&[u8], TarError> {
        if self.remaining == 0 {
            return Ok(&[]);
        }
        if self.is_left_out {
            self.fail();
            return Err(self.malformed(self.offset, "its data was left out"));
        }
        if self.fill().inspect_err(|_| self.fail())? == 0 {
            self.fail();
            return Err(self.truncated("a file"));
        }
        Ok(&self.buffer[self.start..self.end][..self.chunk()])
    }

    /// Bytes in the buffer that belong to the current entry.
    fn chunk(&self) -> usize {
        usize::try_from(self.remaining).unwrap_or(usize::MAX).min(self.end - self.start)
    }

    /// Takes the first `n` bytes of what [`Self::data`] gave.
    ///
    /// # Panics
    /// When `n` is more than that.
    pub fn consume(&mut self, n: usize) {
        assert!(n <= self.chunk(), "consumed {n} bytes of {}", self.chunk());
        if let Some(recorder) = &mut self.recorder {
            recorder.data(&self.buffer[self.start..self.start + n]);
        }
        self.advance(n);
        self.remaining -= n as u64;
    }

    /// Stored bytes of the current entry that were not consumed yet.
    pub fn remaining_bytes(&self) -> u64 {
        self.remaining
    }

    /// Copies stored bytes of the current entry into `buf`; 0 at the end.
    ///
    /// # Errors
    /// As [`Self::data`].
    pub fn read_data(&mut self, buf: &mut [u8]) -> Result<usize, TarError> {
        let chunk = self.data()?;
        let n = chunk.len().min(buf.len());
        buf[..n].copy_from_slice(&chunk[..n]);
        self.consume(n);
        Ok(n)
    }

    /// The current entry's stored bytes as a [`Read`], whose errors carry a [`TarError`].
    pub fn entry_data(&mut self) -> EntryData<'_, R> {
        EntryData(self)
    }

    /// Tells the recorder, if there is one, that the extracted tree will not hold what the archive
    /// held, for a reason that only the caller sees.
    pub fn mark_unfaithful(&mut self, why: Unfaithful) {
        if let Some(recorder) = &mut self.recorder {
            recorder.mark_unfaithful(why);
        }
    }

    /// Whether the recorder has a spool that the archive can still be saved in.
    pub fn can_preserve(&self) -> bool {
        self.recorder.as_ref().is_some_and(Recorder::can_preserve)
    }

    /// Whether the archive must be saved before the current entry is extracted, since it takes the place of content
    /// that only the tree has.
    pub fn must_preserve(&self) -> bool {
        self.recorder.as_ref().is_some_and(Recorder::must_preserve)
    }

    /// Saves the whole archive in the recorder's spool: what came until now is assembled from `tree`, to which all of it
    /// was extracted, and what comes from now on is copied. Before any data of the current entry is consumed. Does
    /// nothing without a spool, or when it was done before.
    ///
    /// # Errors
    /// [`TarError::Record`].
    pub fn preserve(&mut self, tree: &Root) -> Result<(), TarError> {
        debug_assert!(self.state != State::Ended, "there is nothing left to save");
        match &mut self.recorder {
            Some(recorder) => recorder.preserve(tree).map_err(|source| TarError::Record { source }),
            None => Ok(()),
        }
    }

    /// Tells the recorder, if there is one, that the data of the current entry is not extracted anywhere.
    pub fn keep_data(&mut self) {
        if let Some(recorder) = &mut self.recorder {
            recorder.keep_data();
        }
    }

    /// Reads to the end of the input, entries that nobody asked for and the bytes behind the end
    /// marker included: all are part of the diff ID and of the recording.
    ///
    /// # Errors
    /// Any [`TarError`].
    pub fn finish(mut self) -> Result<Finished<R>, TarError> {
        while self.next_entry()?.is_some() {}
        loop {
            let n = self.fill()?;
            if n == 0 {
                break;
            }
            if let Some(recorder) = &mut self.recorder {
                recorder.trailing(&self.buffer[self.start..self.end]);
            }
            self.advance(n);
        }
        let recorded = self.recorder.map(Recorder::finish).transpose().map_err(|source| TarError::Record { source })?;
        Ok(Finished { inner: self.inner, recorded, size_bytes: self.offset, entries_count: self.entries })
    }

    // The input.

    fn fail(&mut self) {
        self.state = State::Failed;
        self.remaining = 0;
    }

    fn malformed(&self, offset: u64, why: &'static str) -> TarError {
        TarError::Malformed { offset, why }
    }

    fn truncated(&self, inside: &'static str) -> TarError {
        TarError::Truncated { offset: self.offset + (self.end - self.start) as u64, inside }
    }

    fn advance(&mut self, n: usize) {
        self.start += n;
        self.offset += n as u64;
    }

    /// Makes sure that the buffer holds something, unless the input is at its end. Returns how much.
    fn fill(&mut self) -> Result<usize, TarError> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            self.read_more()?;
        }
        Ok(self.end - self.start)
    }

    /// Reads behind what the buffer holds; false at the end of the input.
    fn read_more(&mut self) -> Result<bool, TarError> {
        let n = loop {
            match self.inner.read(&mut self.buffer[self.end..]) {
                Ok(n) => break n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(TarError::Read { source }),
            }
        };
        self.end += n;
        let total = self.offset + (self.end - self.start) as u64;
        LimitExceeded::check("unpacked_bytes", self.limits.unpacked_bytes, total, "uncompressed archive", None)?;
        // A full disk under the recording ends the work here, not at the end of the layer.
        if let Some(source) = self.recorder.as_mut().and_then(Recorder::take_error) {
            return Err(TarError::Record { source });
        }
        Ok(n > 0)
    }

    /// Takes a block that is not file data.
    fn block(&mut self, inside: &'static str) -> Result<Block, TarError> {
        if self.buffer.len() - self.start < BLOCK_BYTES {
            self.buffer.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        while self.end - self.start < BLOCK_BYTES {
            if !self.read_more()? {
                return Err(self.truncated(inside));
            }
        }
        let mut block = [0; BLOCK_BYTES];
        block.copy_from_slice(&self.buffer[self.start..self.start + BLOCK_BYTES]);
        if let Some(recorder) = &mut self.recorder {
            recorder.raw(&block);
        }
        self.advance(BLOCK_BYTES);
        Ok(block)
    }

    /// Takes `len` bytes that are not file data and gives them to `sink`.
    fn raw(&mut self, mut len: u64, inside: &'static str, mut sink: impl FnMut(&[u8])) -> Result<(), TarError> {
        while len > 0 {
            let available = self.fill()?;
            if available == 0 {
                return Err(self.truncated(inside));
            }
            let n = usize::try_from(len).unwrap_or(usize::MAX).min(available);
            let bytes = &self.buffer[self.start..self.start + n];
            if let Some(recorder) = &mut self.recorder {
                recorder.raw(bytes);
            }
            sink(bytes);
            self.advance(n);
            len -= n as u64;
        }
        Ok(())
    }

    fn skip_rest(&mut self) -> Result<(), TarError> {
        if let Some(left_out) = self.left_out.as_mut().filter(|_| self.is_left_out)
            && self.remaining > 0
        {
            left_out.push((self.offset, self.remaining));
            self.offset = self.offset.saturating_add(std::mem::take(&mut self.remaining));
            let (limit, total) = (self.limits.unpacked_bytes, self.offset);
            LimitExceeded::check("unpacked_bytes", limit, total, "uncompressed archive", None)?;
        }
        while self.remaining > 0 {
            let n = self.data()?.len();
            self.consume(n);
        }
        if let Some(recorder) = &mut self.recorder {
            recorder.end_data();
        }
        let padding = std::mem::take(&mut self.padding);
        self.raw(padding, "the padding of a file", |_| {})
    }

    // The format.

    fn read_entry(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip_rest()?;
        let first = self.offset;
        let mut extensions = Extensions::default();
        loop {
            let offset = self.offset;
            let block = self.block("the end marker or a header")?;
            if block.iter().all(|byte| *byte == 0) {
                if extensions.pending {
                    return Err(self.malformed(first, "an extension header without an entry"));
                }
                if self.block("the end marker")?.iter().any(|byte| *byte != 0) {
                    return Err(self.malformed(offset, "a lone zero block"));
                }
                if let Some(recorder) = &mut self.recorder {
                    recorder.end_marker();
                }
                return Ok(None);
            }
            let header = Header::parse(&block).map_err(|why| self.malformed(offset, why))?;
            match header.type_flag {
                type_flag::PAX => {
                    let payload = self.extension(first, &header)?;
                    let records = Records::parse(&payload).map_err(|why| self.malformed(offset, why))?;
                    // A second one takes the place of the first, in Go's reading.
                    extensions.pax = Some(records);
                }
                type_flag::PAX_GLOBAL => {
                    let payload = self.extension(first, &header)?;
                    Records::parse(&payload).map_err(|why| self.malformed(offset, why))?;
                    // Go forgets what stood before a global header, others don't.
                    if extensions.pending {
                        return Err(self.malformed(first, "a global header between an extension header and its entry"));
                    }
                    continue;
                }
                type_flag::GNU_LONG_NAME => {
                    extensions.long_name = c_string(&self.extension(first, &header)?).to_vec();
                }
                type_flag::GNU_LONG_LINK => {
                    extensions.long_link = c_string(&self.extension(first, &header)?).to_vec();
                }
                _ => return self.entry(offset, &block, header, extensions).map(Some),
            }
            extensions.pending = true;
        }
    }

    /// The payload of an extension header that belongs to the entry whose headers begin at `first`.
    fn extension(&mut self, first: u64, header: &Header) -> Result<Vec<u8>, TarError> {
        let total = (self.offset - first).saturating_add(header.size);
        LimitExceeded::check("header_bytes", self.limits.header_bytes, total, "extension headers", None)?;
        let mut payload = Vec::with_capacity(usize::try_from(header.size).unwrap_or(0));
        self.raw(header.size, "an extension header", |bytes| payload.extend_from_slice(bytes))?;
        self.raw(padding(header.size), "an extension header", |_| {})?;
        Ok(payload)
    }

    /// Puts an entry together from its header and what stood before it, in the order of Go's
    /// reader: PAX over the header, GNU's long names over PAX, sparse names over all.
    fn entry(&mut self, offset: u64, block: &Block, header: Header, extensions: Extensions) -> Result<Entry, TarError> {
        let malformed = |why| TarError::Malformed { offset, why };
        let pax = extensions.pax.unwrap_or_default();
        let pick = |long: Vec<u8>, key, short| {
            if long.is_empty() { pax.get(key).map_or(short, <[u8]>::to_vec) } else { long }
        };
        let mut name = pick(extensions.long_name, "path", header.name);
        let link = pick(extensions.long_link, "linkpath", header.link);
        let flag = match header.type_flag {
            // Before POSIX, a directory was a file with a slash at the end.
            type_flag::FILE_OLD if name.ends_with(b"/") => type_flag::DIRECTORY,
            type_flag::FILE_OLD => type_flag::FILE,
            flag => flag,
        };

        let has_no_data = type_flag::has_no_data(flag);
        let size = pax.number("size").map_err(malformed)?.map(u64::try_from).transpose();
        let stored = size.map_err(|_| malformed("negative size"))?.unwrap_or(header.size);
        let stored = if has_no_data { 0 } else { stored };
        // Numbers that have no use here must still be numbers.
        pax.time("atime").map_err(malformed)?;
        pax.time("ctime").map_err(malformed)?;
        let uid = pax.number("uid").map_err(malformed)?.unwrap_or(header.uid);
        let gid = pax.number("gid").map_err(malformed)?.unwrap_or(header.gid);
        let mtime = pax.time("mtime").map_err(malformed)?;
        let mtime = mtime.unwrap_or(Timestamp { seconds: header.mtime, nanos: 0 });

        self.remaining = stored;
        self.padding = padding(stored);
        let mut size_bytes = stored;
        let mut map = None;
        if flag == type_flag::GNU_SPARSE {
            if !header.is_gnu {
                return Err(malformed("a sparse file in another format than GNU's"));
            }
            size_bytes = old_gnu_size(block).map_err(malformed)?;
            map = Some(self.old_gnu_map(offset, block)?);
        } else if let Some(place) = pax_map(&pax).map_err(malformed)? {
            if has_no_data {
                return Err(malformed("a sparse map without a file"));
            }
            if let Some(real_name) = pax.get("GNU.sparse.name") {
                name = real_name.to_vec();
            }
            let size = match pax.number("GNU.sparse.size").map_err(malformed)? {
                Some(size) => Some(size),
                None => pax.number("GNU.sparse.realsize").map_err(malformed)?,
            };
            if let Some(size) = size {
                size_bytes = u64::try_from(size).map_err(|_| malformed("negative size"))?;
            }
            map = Some(match place {
                PaxMap::InRecords => map_in_records(&pax).map_err(malformed)?,
                PaxMap::InData => self.map_in_data(offset)?,
            });
        }
        let sparse = map.map(|map| map.finish(size_bytes, self.remaining)).transpose().map_err(malformed)?;
        self.is_left_out = self.left_out.is_some() && sparse.is_none();

        let path = self.path(&name)?;
        LimitExceeded::check("file_bytes", self.limits.file_bytes, size_bytes, "length", Some(path.as_bytes()))?;
        let out_of_range = |field, value| TarError::OutOfRange { path: path.clone(), field, value };
        let owner = |field, value| match value {
            0..=OWNER_MAX => Ok(value as u32),
            _ => Err(out_of_range(field, value)),
        };
        let device = || match (header.dev_major, header.dev_minor) {
            (major @ 0..=DEV_MAJOR_MAX, minor @ 0..=DEV_MINOR_MAX) => {
                Ok(Device { major: major as u32, minor: minor as u32 })
            }
            (0..=DEV_MAJOR_MAX, minor) => Err(out_of_range("minor device number", minor)),
            (major, _) => Err(out_of_range("major device number", major)),
        };
        let kind = match flag {
            type_flag::FILE | type_flag::CONTIGUOUS | type_flag::GNU_SPARSE => EntryKind::File { size_bytes, sparse },
            type_flag::HARD_LINK => EntryKind::HardLink { target: self.hard_link_target(&path, &link)? },
            type_flag::SYMLINK => EntryKind::Symlink { target: self.symlink_target(&path, link)? },
            type_flag::DIRECTORY => EntryKind::Directory,
            type_flag::CHAR_DEVICE => EntryKind::CharDevice(device()?),
            type_flag::BLOCK_DEVICE => EntryKind::BlockDevice(device()?),
            type_flag::FIFO => EntryKind::Fifo,
            type_flag => return Err(TarError::UnsupportedType { path: Escaped::of(&name), type_flag }),
        };
        if path.is_root() && kind != EntryKind::Directory {
            return Err(TarError::RootNotDirectory { path: Escaped::of(&name) });
        }
        if header.mode < 0 {
            return Err(out_of_range("mode", header.mode));
        }
        let entry = Entry {
            // Some writers put the file type in here too.
            mode: (header.mode & 0o7777) as u32,
            uid: owner("uid", uid)?,
            gid: owner("gid", gid)?,
            mtime,
            xattrs: self.xattrs(&path, &pax)?,
            path,
            kind,
        };
        self.entries += 1;
        LimitExceeded::check("entries", self.limits.entries, self.entries, "number of entries", None)?;
        if let Some(recorder) = &mut self.recorder {
            recorder.entry(&name, &entry, self.remaining);
        }
        Ok(entry)
    }

    fn old_gnu_map(&mut self, offset: u64, block: &Block) -> Result<MapBuilder, TarError> {
        let malformed = |why| TarError::Malformed { offset, why };
        let mut map = MapBuilder::default();
        let mut more = old_gnu_entries(block, OLD_GNU_IN_HEADER, &mut map).map_err(malformed)?;
        let mut map_bytes = 0;
        while more {
            map_bytes += BLOCK_BYTES as u64;
            LimitExceeded::check("sparse_map_bytes", self.limits.sparse_map_bytes, map_bytes, "sparse map", None)?;
            let block = self.block("a sparse map")?;
            more = old_gnu_entries(&block, OLD_GNU_IN_EXTENSION, &mut map).map_err(malformed)?;
        }
        Ok(map)
    }

    fn map_in_data(&mut self, offset: u64) -> Result<MapBuilder, TarError> {
        let malformed = |why| TarError::Malformed { offset, why };
        let mut parser = DataMapParser::default();
        let mut map_bytes = 0;
        loop {
            map_bytes += BLOCK_BYTES as u64;
            LimitExceeded::check("sparse_map_bytes", self.limits.sparse_map_bytes, map_bytes, "sparse map", None)?;
            self.remaining = self
                .remaining
                .checked_sub(BLOCK_BYTES as u64)
                .ok_or(malformed("a sparse map longer than its file's data"))?;
            let block = self.block("a sparse map")?;
            if parser.block(&block).map_err(malformed)? {
                return Ok(parser.into_map());
            }
        }
    }

    fn path(&self, raw: &[u8]) -> Result<EntryPath, TarError> {
        let path = EntryPath::clean(raw)?;
        let bytes = path.as_bytes();
        LimitExceeded::check("path_bytes", self.limits.path_bytes, bytes.len() as u64, "path", Some(bytes))?;
        let (mut depth, mut longest) = (0, 0);
        for component in path.components() {
            depth += 1;
            // A whiteout has the length of the name that it takes away, which the file system allowed.
            let name = component.strip_prefix(b".wh.").unwrap_or(component);
            longest = longest.max(name.len() as u64);
        }
        LimitExceeded::check("path_depth", self.limits.path_depth, depth, "depth", Some(bytes))?;
        LimitExceeded::check("component_bytes", self.limits.component_bytes, longest, "component", Some(bytes))?;
        Ok(path)
    }

    fn hard_link_target(&self, path: &EntryPath, link: &[u8]) -> Result<EntryPath, TarError> {
        let target = self.path(link)?;
        if target.is_root() {
            let why = "not a file";
            return Err(TarError::LinkTarget { path: path.clone(), target: Escaped::of(link), why });
        }
        Ok(target)
    }

    fn symlink_target(&self, path: &EntryPath, link: Vec<u8>) -> Result<Vec<u8>, TarError> {
        let fail = |why| Err(TarError::LinkTarget { path: path.clone(), target: Escaped::of(&link), why });
        if link.is_empty() {
            return fail("empty");
        }
        if link.contains(&0) {
            return fail("contains a NUL byte");
        }
        let what = "link target";
        let max = self.limits.symlink_bytes;
        LimitExceeded::check("symlink_bytes", max, link.len() as u64, what, Some(path.as_bytes()))?;
        Ok(link)
    }

    fn xattrs(&self, path: &EntryPath, pax: &Records) -> Result<Xattrs, TarError> {
        let check = |limit, max, value, what| LimitExceeded::check(limit, max, value, what, Some(path.as_bytes()));
        let mut xattrs = Vec::new();
        for (name, value) in pax.xattrs() {
            let (name_len, value_len) = (name.len() as u64, value.len() as u64);
            check("xattrs_count", self.limits.xattrs_count, xattrs.len() as u64 + 1, "number of attributes")?;
            check("XATTR_NAME_BYTES", Limits::XATTR_NAME_BYTES, name_len, "attribute name")?;
            check("xattr_bytes", self.limits.xattr_bytes, value_len, "attribute")?;
            if name.is_empty() {
                return Err(self.malformed(self.offset, "an extended attribute without a name"));
            }
            xattrs.push((name.to_vec(), value.to_vec()));
        }
        Ok(xattrs)
    }
}

impl<R> fmt::Debug for Reader<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("offset", &self.offset).field("state", &self.state).finish_non_exhaustive()
    }
}

/// The stored bytes of a [`Reader`]'s current entry.
#[derive(Debug)]
pub struct EntryData<'a, R>(&'a mut Reader<R>);

impl<R: Read> Read for EntryData<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read_data(buf).map_err(|error| match error {
            TarError::Read { source } => source,
            error => io::Error::other(error),
        })
    }
}
