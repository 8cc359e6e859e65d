//! Docker's tar-split: what an archive holds besides the contents of its files.
//!
//! With it and the extracted tree, the archive's bytes can be had again: the digest of a layer
//! depends on every header, padding byte and odd habit of whoever wrote it. The format is that of
//! Docker's layer store (`tar-split.json.gz`), one JSON object a line, gzipped:
//!
//! ```text
//! {"type":2,"payload":"<base64>","position":0}                  a segment: bytes as they are
//! {"type":1,"name":"etc/x","size":5,"payload":"<crc>","position":1}   a file's content goes here
//! {"type":1,"name":"etc/","payload":null,"position":2}          an entry without content
//! ```
//!
//! - Every entry has one segment that ends with its header (extension headers included) and begins
//!   with the padding of the file before, then one file record. Tools that list headers rely on it.
//! - `name` is the name as the archive has it, not cleaned; one that is not UTF-8 goes to `name_raw`
//!   in base64. No two file records may have the same cleaned name: Docker refuses to read such.
//! - `payload` of a file is the CRC-64 (ISO, as in Go's hash/crc64) of its content, big end first.
//! - Bytes that no extracted file gives back (those of sparse files, and files that stand where an
//!   entry without content stood before) go into the entry's segment; its file record has no size.
//! - What follows the end marker comes in segments of up to 1 MiB.
//!
//! Where a later entry takes the place of a file with content, no tree can give the archive back:
//! the recording is [`Unfaithful`]. A recorder that has a spool then saves the archive itself: what
//! came so far can still be assembled at that moment, and what comes after is copied as it passes.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use crc_fast::{CrcAlgorithm, Digest as CrcDigest};
use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;
use plies_oci::ErrorKind;
use serde::Deserialize;

use crate::compress::DecodeError;
use crate::limits::LimitExceeded;
use crate::root::Root;
use crate::tar::{Entry, EntryKind, EntryPath, Escaped};

/// Largest segment of bytes that are not headers: as in Docker's writer.
const SEGMENT_BYTES: usize = 1 << 20;
/// Longest line that [`assemble`] reads. Docker's segments are a header (1 MiB of extensions at
/// most) or 1 MiB of padding, but its writers before 2017 put all trailing bytes into one.
const LINE_BYTES: u64 = 64 << 20;
/// Compression of a recording. Headers repeat so much that higher levels gain little: for 14,000
/// files of /usr, level 2 gives 1.12 times the size of level 6 (for 500,000 made-up ones 1.04 times)
/// and takes half the time; level 1 is no faster and half as large again.
const LEVEL: u32 = 2;
/// Files are copied in pieces of this many bytes.
const COPY_BYTES: usize = 128 << 10;

const FILE: u8 = 1;
const SEGMENT: u8 = 2;

/// Where a recording goes.
#[derive(Debug)]
pub enum Output {
    /// Into memory.
    Memory(Vec<u8>),
    /// Into a file that is empty; open for reading too, if the recorder has a spool. Not synced.
    File(File),
}

impl Write for Output {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Memory(bytes) => bytes.write(buf),
            Self::File(file) => file.write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output {
    /// What was written, from the start.
    fn reader(&self) -> OutputReader<'_> {
        OutputReader { output: self, offset: 0 }
    }
}

struct OutputReader<'a> {
    output: &'a Output,
    offset: u64,
}

impl Read for OutputReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = match self.output {
            Output::Memory(bytes) => {
                let rest = &bytes[usize::try_from(self.offset).unwrap_or(usize::MAX).min(bytes.len())..];
                let n = rest.len().min(buf.len());
                buf[..n].copy_from_slice(&rest[..n]);
                n
            }
            Output::File(file) => file.read_at(buf, self.offset)?,
        };
        self.offset += n as u64;
        Ok(n)
    }
}

/// Why the extracted tree cannot give the archive back.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Unfaithful {
    /// A later entry of the archive takes the place of a file with content.
    #[error("{path} takes the place of a file from the same archive")]
    Replaced {
        /// The later entry.
        path: EntryPath,
    },
}

/// A finished recording.
#[derive(Debug)]
pub struct Recorded {
    /// The gzipped JSON lines.
    pub output: Output,
    /// `None`: the archive can be assembled from this and the extracted files. Otherwise the
    /// recording breaks off somewhere and the archive itself must be kept.
    pub unfaithful: Option<Unfaithful>,
    /// The archive itself, all of it, if the recorder had a spool and somebody asked to preserve it.
    pub archive: Option<File>,
    /// Records written.
    pub records_count: u64,
}

/// Records an archive while a [`Reader`](crate::tar::Reader) goes through it.
///
/// Memory is one segment, and 16 bytes or so for each entry to notice repeated names.
pub struct Recorder {
    out: GzEncoder<Output>,
    line: Vec<u8>,
    position: u64,
    segment: Vec<u8>,
    content: Content,
    /// Of what came of the current entry's content.
    crc: CrcDigest,
    seen: HashMap<u64, Seen>,
    unfaithful: Option<Unfaithful>,
    error: Option<io::Error>,
    /// Where the archive is saved when it must be.
    spool: Option<File>,
    /// The spool once it is in use: nothing is recorded any more, all bytes go there.
    verbatim: Option<BufWriter<File>>,
}

/// What becomes of the current entry's data.
#[derive(Debug)]
enum Content {
    None,
    /// The extracted file will give it back.
    Extracted {
        name: Vec<u8>,
        size_bytes: u64,
    },
    /// It goes into the segment; then a file record under `name`, unless the name is taken.
    Inline {
        name: Option<Vec<u8>>,
    },
}

/// What stands in the archive so far under one cleaned name.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    /// A file record has the name.
    recorded: bool,
    /// Its content is to come from the tree.
    content: bool,
    /// Content of something below it is to come from the tree.
    content_below: bool,
}

impl Recorder {
    /// Records into `output`.
    pub fn new(output: Output) -> Self {
        Self {
            out: GzEncoder::new(output, flate2::Compression::new(LEVEL)),
            line: Vec::new(),
            position: 0,
            segment: Vec::new(),
            content: Content::None,
            crc: CrcDigest::new(CrcAlgorithm::Crc64GoIso),
            seen: HashMap::new(),
            unfaithful: None,
            error: None,
            spool: None,
            verbatim: None,
        }
    }

    /// Saves the archive in `spool`, an empty file, should the tree and the recording not be able to give it back.
    #[must_use]
    pub fn with_spool(self, spool: File) -> Self {
        Self { spool: Some(spool), ..self }
    }

    /// Records into memory.
    pub fn in_memory() -> Self {
        Self::new(Output::Memory(Vec::new()))
    }

    /// Takes bytes that are no file's data.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        if !self.copy_verbatim(bytes) && self.unfaithful.is_none() {
            self.segment.extend_from_slice(bytes);
        }
    }

    /// Copies bytes of the archive into the spool, if that is where they go.
    fn copy_verbatim(&mut self, bytes: &[u8]) -> bool {
        let Some(spool) = &mut self.verbatim else { return false };
        if self.error.is_none() {
            self.error = spool.write_all(bytes).err();
        }
        true
    }

    /// Whether the archive could still be saved whole.
    pub(crate) fn can_preserve(&self) -> bool {
        self.spool.is_some()
    }

    /// Whether the entry just announced takes the place of content that is still in the tree: the archive must be
    /// preserved before it does.
    pub(crate) fn must_preserve(&self) -> bool {
        self.unfaithful.is_some() && self.can_preserve()
    }

    /// Saves the archive from its first byte on: what came by until now is assembled from `tree`, which still has all
    /// of it, and everything after is copied. Between an entry's headers and its data.
    pub(crate) fn preserve(&mut self, tree: &Root) -> io::Result<()> {
        let Some(spool) = self.spool.take() else { return Ok(()) };
        let mut spool = BufWriter::with_capacity(COPY_BYTES, spool);
        if self.position > 0 {
            self.out.flush()?;
            let recorded = self.out.get_ref().reader();
            assemble_records(recorded, Some(self.position), |name, _| open_in(tree, name), &mut spool)
                .map_err(io::Error::other)?;
        }
        spool.write_all(&self.segment)?;
        self.segment = Vec::new();
        self.seen = HashMap::new();
        self.content = Content::None;
        self.verbatim = Some(spool);
        Ok(())
    }

    /// The data of the current entry will not be in the tree: it goes into the recording.
    pub(crate) fn keep_data(&mut self) {
        if let Content::Extracted { name, .. } = &mut self.content {
            self.content = Content::Inline { name: Some(std::mem::take(name)) };
        }
    }

    /// Takes bytes that may come without end and belong to no header.
    fn bulk(&mut self, mut bytes: &[u8]) {
        if self.copy_verbatim(bytes) {
            return;
        }
        while !bytes.is_empty() && self.unfaithful.is_none() {
            if self.segment.len() >= SEGMENT_BYTES {
                self.write_segment();
            }
            let (now, later) = bytes.split_at(bytes.len().min(SEGMENT_BYTES.saturating_sub(self.segment.len())));
            self.segment.extend_from_slice(now);
            bytes = later;
        }
    }

    /// An entry's headers are complete; `stored` bytes of data follow. `name` is as in the archive.
    pub(crate) fn entry(&mut self, name: &[u8], entry: &Entry, stored: u64) {
        if self.unfaithful.is_some() || self.verbatim.is_some() {
            return;
        }
        let key = key(entry.path.as_bytes());
        let before = self.seen.get(&key).copied().unwrap_or_default();
        if before.content || (before.content_below && entry.kind != EntryKind::Directory) {
            return self.mark_unfaithful(Unfaithful::Replaced { path: entry.path.clone() });
        }
        let sparse = matches!(entry.kind, EntryKind::File { sparse: Some(_), .. });
        let extracted = stored > 0 && !sparse && !before.recorded;
        let now = Seen { recorded: true, content: extracted, content_below: before.content_below };
        self.seen.insert(key, now);
        if extracted {
            self.mark_parents(entry.path.as_bytes());
        }

        let name = (!before.recorded).then(|| name.to_vec());
        self.content = match name {
            Some(name) if extracted => Content::Extracted { name, size_bytes: stored },
            name => Content::Inline { name },
        };
        if extracted {
            self.crc.reset();
            self.write_segment();
        }
    }

    /// Notes on every directory above `path` that content below it counts.
    fn mark_parents(&mut self, mut path: &[u8]) {
        while let Some(slash) = path.iter().rposition(|byte| *byte == b'/') {
            path = &path[..slash];
            let parent = self.seen.entry(key(path)).or_default();
            // Then those above were marked with it.
            if std::mem::replace(&mut parent.content_below, true) {
                return;
            }
        }
    }

    /// Takes data of the current entry.
    pub(crate) fn data(&mut self, bytes: &[u8]) {
        if self.copy_verbatim(bytes) {
            return;
        }
        match self.content {
            Content::Extracted { .. } => self.crc.update(bytes),
            Content::Inline { .. } => self.bulk(bytes),
            Content::None => {}
        }
    }

    /// All data of the current entry was taken.
    pub(crate) fn end_data(&mut self) {
        match std::mem::replace(&mut self.content, Content::None) {
            Content::None => {}
            Content::Extracted { name, size_bytes } => {
                self.write_file(&name, size_bytes, Some(self.crc.finalize().to_be_bytes()));
            }
            Content::Inline { name } => {
                self.write_segment();
                if let Some(name) = name {
                    self.write_file(&name, 0, None);
                }
            }
        }
    }

    /// The end marker was taken; [`Self::trailing`] follows.
    pub(crate) fn end_marker(&mut self) {
        self.write_segment();
    }

    /// Takes bytes behind the end marker.
    pub(crate) fn trailing(&mut self, bytes: &[u8]) {
        self.bulk(bytes);
    }

    pub(crate) fn mark_unfaithful(&mut self, why: Unfaithful) {
        self.unfaithful.get_or_insert(why);
        self.content = Content::None;
        // With a spool these bytes are still to be saved.
        if self.spool.is_none() {
            self.segment = Vec::new();
            self.seen = HashMap::new();
        }
    }

    /// An error of the output, which the calls above had nobody to tell.
    pub(crate) fn take_error(&mut self) -> Option<io::Error> {
        self.error.take()
    }

    pub(crate) fn finish(mut self) -> io::Result<Recorded> {
        self.write_segment();
        if let Some(error) = self.error {
            return Err(error);
        }
        let archive = self.verbatim.map(|spool| spool.into_inner().map_err(io::IntoInnerError::into_error));
        Ok(Recorded {
            output: self.out.finish()?,
            unfaithful: self.unfaithful,
            archive: archive.transpose()?,
            records_count: self.position,
        })
    }

    fn write_segment(&mut self) {
        if self.segment.is_empty() {
            return;
        }
        self.line.clear();
        self.line.extend_from_slice(b"{\"type\":2,\"payload\":");
        push_base64(&mut self.line, &self.segment);
        self.segment.clear();
        self.write_line();
    }

    fn write_file(&mut self, name: &[u8], size_bytes: u64, crc: Option<[u8; 8]>) {
        let line = &mut self.line;
        line.clear();
        line.extend_from_slice(b"{\"type\":1");
        match std::str::from_utf8(name) {
            Ok("") => {}
            Ok(name) => {
                line.extend_from_slice(b",\"name\":");
                push_string(line, name);
            }
            Err(_) => {
                line.extend_from_slice(b",\"name_raw\":");
                push_base64(line, name);
            }
        }
        if size_bytes > 0 {
            line.extend_from_slice(format!(",\"size\":{size_bytes}").as_bytes());
        }
        line.extend_from_slice(b",\"payload\":");
        match crc {
            Some(crc) => push_base64(line, &crc),
            None => line.extend_from_slice(b"null"),
        }
        self.write_line();
    }

    fn write_line(&mut self) {
        self.line.extend_from_slice(format!(",\"position\":{}}}\n", self.position).as_bytes());
        self.position += 1;
        if self.error.is_none() && self.unfaithful.is_none() && self.verbatim.is_none() {
            self.error = self.out.write_all(&self.line).err();
        }
    }
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").field("records", &self.position).finish_non_exhaustive()
    }
}

/// Stands for a cleaned name. Two names with the same key (by chance 1 in 10^6 among ten million,
/// or made so on purpose) cost the archive its recording, nothing else.
fn key(path: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    path.hash(&mut hasher);
    hasher.finish()
}

fn push_base64(line: &mut Vec<u8>, bytes: &[u8]) {
    line.push(b'"');
    let start = line.len();
    line.resize(start + bytes.len().div_ceil(3) * 4, 0);
    let n = BASE64.encode_slice(bytes, &mut line[start..]).expect("because base64 takes 4 bytes for 3");
    line.truncate(start + n);
    line.push(b'"');
}

/// A JSON string with the escapes of Go's encoding/json.
fn push_string(line: &mut Vec<u8>, text: &str) {
    line.push(b'"');
    for c in text.chars() {
        match c {
            '"' | '\\' => line.extend_from_slice(&[b'\\', c as u8]),
            '\n' => line.extend_from_slice(b"\\n"),
            '\r' => line.extend_from_slice(b"\\r"),
            '\t' => line.extend_from_slice(b"\\t"),
            '\0'..='\x1f' | '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => {
                line.extend_from_slice(format!("\\u{:04x}", u32::from(c)).as_bytes());
            }
            c => line.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    line.push(b'"');
}

/// Why an archive could not be assembled.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AssembleError {
    /// The recording is damaged or not one.
    #[error("malformed tar-split record {position}: {why}")]
    Malformed {
        /// Which record, counted from 0.
        position: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A record is no JSON.
    #[error("malformed tar-split record {position}")]
    Json {
        /// Which record, counted from 0.
        position: u64,
        /// The parser's error.
        #[source]
        source: serde_json::Error,
    },
    /// A file has changed since it was extracted.
    #[error("{path} is not as it was extracted: expected {expected}, found {actual}")]
    Changed {
        /// The file's name in the archive.
        path: Escaped,
        /// What was recorded: a size or a CRC-64.
        expected: String,
        /// What is there.
        actual: String,
    },
    /// A limit was hit.
    #[error(transparent)]
    Limit(#[from] LimitExceeded),
    /// The recording could not be read.
    #[error("read tar-split records")]
    Records {
        /// The reader's error.
        #[source]
        source: io::Error,
    },
    /// A file could not be opened or read.
    #[error("read {path}")]
    File {
        /// The file's name in the archive.
        path: Escaped,
        /// The error.
        #[source]
        source: io::Error,
    },
    /// The archive could not be written.
    #[error("write archive")]
    Write {
        /// The writer's error.
        #[source]
        source: io::Error,
    },
}

impl AssembleError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Malformed { .. } | Self::Json { .. } | Self::Changed { .. } => ErrorKind::DataLoss,
            Self::Limit(_) => ErrorKind::Limit,
            Self::Records { source } => match source.kind() {
                io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput => {
                    ErrorKind::DataLoss
                }
                _ => DecodeError::kind_of(source),
            },
            Self::File { source, .. } if source.kind() == io::ErrorKind::NotFound => ErrorKind::DataLoss,
            Self::File { .. } | Self::Write { .. } => ErrorKind::Unavailable,
        }
    }
}

#[derive(Deserialize)]
struct Record<'r> {
    #[serde(rename = "type")]
    record_type: u8,
    #[serde(default, borrow)]
    name: Cow<'r, str>,
    #[serde(default, borrow)]
    name_raw: Option<Cow<'r, str>>,
    #[serde(default)]
    size: u64,
    #[serde(default, borrow)]
    payload: Option<Cow<'r, str>>,
}

/// A part of an archive, as a recording has it.
enum Part {
    /// Headers, padding and the like: [`Records::payload`].
    Bytes,
    /// A file's content, more than none.
    Content { name: Vec<u8>, size_bytes: u64, crc: [u8; 8] },
}

/// Reads a recording.
struct Records<R> {
    lines: BufReader<MultiGzDecoder<BufReader<R>>>,
    line: Vec<u8>,
    payload: Vec<u8>,
    /// Records read, and how many are to be.
    position: u64,
    count: u64,
}

impl<R: Read> Records<R> {
    /// All of them, or the first `count`: a recording that still grows has no end yet.
    fn new(tar_split: R, count: Option<u64>) -> Self {
        let lines = BufReader::new(MultiGzDecoder::new(BufReader::new(tar_split)));
        Self { lines, line: Vec::new(), payload: Vec::new(), position: 0, count: count.unwrap_or(u64::MAX) }
    }

    /// The next part; `None` at the end.
    fn next_part(&mut self) -> Result<Option<Part>, AssembleError> {
        while self.position < self.count {
            self.line.clear();
            let n = (&mut self.lines)
                .take(LINE_BYTES + 1)
                .read_until(b'\n', &mut self.line)
                .map_err(|source| AssembleError::Records { source })?;
            if n == 0 {
                break;
            }
            LimitExceeded::check("tar-split line", LINE_BYTES, n as u64, "record", None)?;
            let position = self.position;
            self.position += 1;
            let malformed = |why| AssembleError::Malformed { position, why };
            let record: Record<'_> =
                serde_json::from_slice(&self.line).map_err(|source| AssembleError::Json { position, source })?;
            self.payload.clear();
            BASE64
                .decode_vec(record.payload.as_deref().unwrap_or(""), &mut self.payload)
                .map_err(|_| malformed("payload is not base64"))?;
            match record.record_type {
                SEGMENT => return Ok(Some(Part::Bytes)),
                FILE if record.size == 0 => {}
                FILE => {
                    let name = match record.name_raw.as_deref() {
                        None | Some("") => record.name.into_owned().into_bytes(),
                        Some(raw) => BASE64.decode(raw).map_err(|_| malformed("name_raw is not base64"))?,
                    };
                    let crc = self.payload.as_slice().try_into().map_err(|_| malformed("checksum is not 8 bytes"))?;
                    return Ok(Some(Part::Content { name, size_bytes: record.size, crc }));
                }
                _ => return Err(malformed("unknown type")),
            }
        }
        Ok(None)
    }
}

/// An archive without what its files hold, out of its recording alone: for
/// [`Reader::without_data`](crate::tar::Reader::without_data). A recording that is damaged is an error of the input.
pub struct Headers<R> {
    records: Records<R>,
    /// Bytes of the payload that were read.
    read: usize,
    /// Bytes of the archive before the payload's end.
    position: u64,
    left_out: Vec<(u64, u64)>,
}

impl<R: Read> Headers<R> {
    /// Of the recording `tar_split`.
    pub fn new(tar_split: R) -> Self {
        Self { records: Records::new(tar_split, None), read: 0, position: 0, left_out: Vec::new() }
    }

    /// What was left out until now: where in the archive files' bytes begin, and how many. Only if they are those of which the
    /// headers say so ([`Reader::left_out`](crate::tar::Reader::left_out)) are the headers those of the archive.
    pub fn left_out(&self) -> &[(u64, u64)] {
        &self.left_out
    }
}

impl<R: Read> Read for Headers<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.read == self.records.payload.len() {
            self.read = 0;
            let part = self.records.next_part().map_err(io::Error::other)?;
            match part {
                None => {
                    self.records.payload.clear();
                    return Ok(0);
                }
                Some(Part::Bytes) => self.position += self.records.payload.len() as u64,
                Some(Part::Content { size_bytes, .. }) => {
                    self.records.payload.clear();
                    self.left_out.push((self.position, size_bytes));
                    self.position = self.position.saturating_add(size_bytes);
                }
            }
        }
        let rest = &self.records.payload[self.read..];
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        self.read += n;
        Ok(n)
    }
}

impl<R> std::fmt::Debug for Headers<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Headers").field("position", &self.position).finish_non_exhaustive()
    }
}

/// Writes the archive that a recording was made of, and returns its size in bytes.
///
/// `open_file` is asked for the content of each file that had some, in order, by the name as the
/// archive has it (clean it with [`EntryPath::clean`]) and its size. Every file's size and CRC-64 are
/// compared, but the caller still compares the digest of the whole: a CRC is no proof.
///
/// # Errors
/// Any [`AssembleError`]; what was written until then is part of the archive, or a damaged file.
pub fn assemble<F: Read>(
    tar_split: impl Read,
    open_file: impl FnMut(&[u8], u64) -> io::Result<F>,
    out: &mut impl Write,
) -> Result<u64, AssembleError> {
    assemble_records(tar_split, None, open_file, out)
}

/// Opens a file of an archive in the tree that it was extracted to.
///
/// # Errors
/// Those of [`Root::open_file`], and `InvalidData` for a name that no entry can have.
pub fn open_in(tree: &Root, name: &[u8]) -> io::Result<File> {
    let path = EntryPath::clean(name).map_err(|_| io::ErrorKind::InvalidData)?;
    tree.open_file(&path).map(File::from)
}

/// As [`assemble`], of the first `count` records only.
fn assemble_records<F: Read>(
    tar_split: impl Read,
    count: Option<u64>,
    mut open_file: impl FnMut(&[u8], u64) -> io::Result<F>,
    out: &mut impl Write,
) -> Result<u64, AssembleError> {
    let mut records = Records::new(tar_split, count);
    let mut copy = vec![0; COPY_BYTES];
    let mut written = 0;
    while let Some(part) = records.next_part()? {
        match part {
            Part::Bytes => {
                out.write_all(&records.payload).map_err(|source| AssembleError::Write { source })?;
                written += records.payload.len() as u64;
            }
            Part::Content { name, size_bytes, crc } => {
                copy_file(&name, size_bytes, crc, &mut open_file, &mut copy, out)?;
                written += size_bytes;
            }
        }
    }
    Ok(written)
}

fn copy_file<F: Read>(
    name: &[u8],
    size_bytes: u64,
    expected: [u8; 8],
    open_file: &mut impl FnMut(&[u8], u64) -> io::Result<F>,
    buffer: &mut [u8],
    out: &mut impl Write,
) -> Result<(), AssembleError> {
    let path = || Escaped::of(name);
    let changed = |expected, actual| AssembleError::Changed { path: path(), expected, actual };
    let mut file = open_file(name, size_bytes).map_err(|source| AssembleError::File { path: path(), source })?;
    let mut crc = CrcDigest::new(CrcAlgorithm::Crc64GoIso);
    let mut copied = 0;
    loop {
        let n = match file.read(buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => return Err(AssembleError::File { path: path(), source }),
        };
        copied += n as u64;
        if copied > size_bytes {
            return Err(changed(format!("{size_bytes} bytes"), "more".to_owned()));
        }
        crc.update(&buffer[..n]);
        out.write_all(&buffer[..n]).map_err(|source| AssembleError::Write { source })?;
    }
    if copied != size_bytes {
        return Err(changed(format!("{size_bytes} bytes"), copied.to_string()));
    }
    let (expected, actual) = (u64::from_be_bytes(expected), crc.finalize());
    if expected != actual {
        return Err(changed(format!("crc64 {expected:016x}"), format!("{actual:016x}")));
    }
    Ok(())
}
