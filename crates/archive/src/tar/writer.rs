//! The writer. The same entries always give the same bytes, on any machine.
//!
//! Headers are ustar. A PAX header precedes an entry only when ustar has no place for something: a
//! name or link that is long or not ASCII, a large number, a time with a fraction or before 1970, an
//! extended attribute. Its records are sorted. There are no user or group names: an image's owners
//! are numbers, and names would make the bytes depend on who looked them up.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};

use plies_oci::ErrorKind;

use super::entry::{Device, Entry, EntryKind, EntryPath, SparseRun, Timestamp};
use super::header::{BLOCK_BYTES, Block, padding, type_flag};
use super::pax::{XATTR_PREFIX, push_record};

/// Why an entry could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// The data ended before the size that the entry says.
    #[error("{path}: expected {expected} bytes, got {actual}")]
    ShortData {
        /// The entry.
        path: EntryPath,
        /// Its size.
        expected: u64,
        /// What the data had.
        actual: u64,
    },
    /// Something that the format has no place for.
    #[error("{path}: {why}")]
    Unrepresentable {
        /// The entry.
        path: EntryPath,
        /// What does not fit.
        why: &'static str,
    },
    /// The data could not be read.
    #[error("read data of {path}")]
    Read {
        /// The entry.
        path: EntryPath,
        /// The reader's error.
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

impl WriteError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::ShortData { .. } => ErrorKind::FailedPrecondition,
            Self::Unrepresentable { .. } => ErrorKind::InvalidInput,
            Self::Read { .. } | Self::Write { .. } => ErrorKind::Unavailable,
        }
    }
}

/// Largest number in a field of 8 bytes (7 octal digits and a NUL) and of 12.
const SHORT_MAX: u64 = 0o777_7777;
const LONG_MAX: u64 = 0o777_7777_7777;
/// Data is copied in pieces of this many bytes.
const COPY_BYTES: usize = 128 << 10;
/// What PAX headers themselves are called: the name that tools without PAX will extract.
const PAX_NAME: &[u8] = b"././@PaxHeader";

/// Writes archives: the same entries always give the same bytes.
///
/// Nothing is complete before [`Writer::finish`]. After an error the archive is of no use.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    buffer: Vec<u8>,
    latest: Option<Timestamp>,
}

impl<W: Write> Writer<W> {
    /// Writes to `out`, at most a few writes an entry.
    pub fn new(out: W) -> Self {
        Self { out, buffer: vec![0; COPY_BYTES], latest: None }
    }

    /// Entries from now on that were changed later than this say that it was then. Others keep their times.
    pub fn set_latest(&mut self, latest: Option<Timestamp>) {
        self.latest = latest;
    }

    /// Appends one entry. `data` is read for regular files only: the stored bytes, of which exactly
    /// as many are taken as the entry says. Holes of a sparse file are written as zeros, since which
    /// parts of a file are holes is the file system's business and no part of a layer.
    ///
    /// # Errors
    /// Any [`WriteError`].
    pub fn append(&mut self, entry: &Entry, data: &mut dyn Read) -> Result<(), WriteError> {
        let mtime = self.latest.map_or(entry.mtime, |latest| latest.min(entry.mtime));
        let headers = Headers::of(entry, mtime)?;
        if !headers.records.is_empty() {
            let mut records = Vec::new();
            for (key, value) in &headers.records {
                push_record(&mut records, key, value);
            }
            let len = records.len() as u64;
            let mut header = vec![0; BLOCK_BYTES];
            header.copy_from_slice(&pax_header(len));
            header.append(&mut records);
            header.resize(header.len() + padding(len) as usize, 0);
            self.write(&header)?;
        }
        self.write(&headers.block)?;
        if let EntryKind::File { size_bytes, sparse } = &entry.kind {
            match sparse {
                None => self.copy(entry, data, *size_bytes)?,
                Some(runs) => self.copy_sparse(entry, data, *size_bytes, runs)?,
            }
            self.zeros(padding(*size_bytes))?;
        }
        Ok(())
    }

    /// Writes the end marker and gives the output back, not flushed.
    ///
    /// # Errors
    /// [`WriteError::Write`].
    pub fn finish(mut self) -> Result<W, WriteError> {
        self.zeros(2 * BLOCK_BYTES as u64)?;
        Ok(self.out)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        self.out.write_all(bytes).map_err(|source| WriteError::Write { source })
    }

    fn zeros(&mut self, mut len: u64) -> Result<(), WriteError> {
        const ZEROS: [u8; 4096] = [0; 4096];
        while len > 0 {
            let n = ZEROS.len().min(usize::try_from(len).unwrap_or(usize::MAX));
            self.write(&ZEROS[..n])?;
            len -= n as u64;
        }
        Ok(())
    }

    fn copy(&mut self, entry: &Entry, data: &mut dyn Read, len: u64) -> Result<(), WriteError> {
        let mut left = len;
        while left > 0 {
            let n = self.buffer.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            match data.read(&mut self.buffer[..n]) {
                Ok(0) => {
                    let path = entry.path.clone();
                    return Err(WriteError::ShortData { path, expected: len, actual: len - left });
                }
                Ok(n) => {
                    self.out.write_all(&self.buffer[..n]).map_err(|source| WriteError::Write { source })?;
                    left -= n as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => return Err(WriteError::Read { path: entry.path.clone(), source }),
            }
        }
        Ok(())
    }

    fn copy_sparse(
        &mut self,
        entry: &Entry,
        data: &mut dyn Read,
        size_bytes: u64,
        runs: &[SparseRun],
    ) -> Result<(), WriteError> {
        let bad_map = || WriteError::Unrepresentable { path: entry.path.clone(), why: "sparse runs out of order" };
        let mut at = 0;
        for run in runs {
            self.zeros(run.offset.checked_sub(at).ok_or_else(bad_map)?)?;
            self.copy(entry, data, run.length)?;
            at = run.offset.checked_add(run.length).ok_or_else(bad_map)?;
        }
        self.zeros(size_bytes.checked_sub(at).ok_or_else(bad_map)?)
    }
}

/// An entry's header block, and the PAX records for what did not fit.
struct Headers {
    block: Block,
    records: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Headers {
    fn of(entry: &Entry, mtime: Timestamp) -> Result<Self, WriteError> {
        let unrepresentable = |why| WriteError::Unrepresentable { path: entry.path.clone(), why };
        let mut headers = Self { block: [0; BLOCK_BYTES], records: BTreeMap::new() };
        let (flag, size_bytes, link, device) = match &entry.kind {
            EntryKind::File { size_bytes, .. } => (type_flag::FILE, *size_bytes, &[][..], None),
            EntryKind::HardLink { target } => (type_flag::HARD_LINK, 0, target.as_bytes(), None),
            EntryKind::Symlink { target } => (type_flag::SYMLINK, 0, target.as_slice(), None),
            EntryKind::Directory => (type_flag::DIRECTORY, 0, &[][..], None),
            EntryKind::CharDevice(device) => (type_flag::CHAR_DEVICE, 0, &[][..], Some(device)),
            EntryKind::BlockDevice(device) => (type_flag::BLOCK_DEVICE, 0, &[][..], Some(device)),
            EntryKind::Fifo => (type_flag::FIFO, 0, &[][..], None),
        };
        if matches!(&entry.kind, EntryKind::Symlink { target } if target.is_empty() || target.contains(&0)) {
            return Err(unrepresentable("symbolic link to nothing, or to a name with a NUL in it"));
        }
        headers.name(&entry.path, flag == type_flag::DIRECTORY);
        headers.number(100, 8, "mode", u64::from(entry.mode & 0o7777));
        headers.number(108, 8, "uid", u64::from(entry.uid));
        headers.number(116, 8, "gid", u64::from(entry.gid));
        headers.number(124, 12, "size", size_bytes);
        headers.mtime(mtime);
        headers.block[156] = flag;
        if link.len() <= 100 && link.is_ascii() {
            headers.block[157..157 + link.len()].copy_from_slice(link);
        } else {
            headers.text(157, "linkpath", link);
        }
        headers.block[257..265].copy_from_slice(b"ustar\x0000");
        let Device { major, minor } = *device.unwrap_or(&Device { major: 0, minor: 0 });
        if u64::from(major.max(minor)) > SHORT_MAX {
            return Err(unrepresentable("device number too large"));
        }
        headers.number(329, 8, "", u64::from(major));
        headers.number(337, 8, "", u64::from(minor));
        for (name, value) in &entry.xattrs {
            if name.is_empty() || name.contains(&b'=') || name.contains(&0) {
                return Err(unrepresentable("extended attribute with an empty name, '=' or NUL in it"));
            }
            headers.records.insert([XATTR_PREFIX, name].concat(), value.clone());
        }
        finish_block(&mut headers.block);
        Ok(headers)
    }

    fn name(&mut self, path: &EntryPath, is_directory: bool) {
        let mut name = path.as_bytes().to_vec();
        if name.is_empty() {
            name.push(b'.');
        }
        if is_directory {
            name.push(b'/');
        }
        if name.is_ascii() {
            if name.len() <= 100 {
                self.block[..name.len()].copy_from_slice(&name);
                return;
            }
            // The last slash that leaves a prefix that fits; what follows it must fit too, and
            // not be empty.
            let slash = name[..(name.len() - 1).min(156)].iter().rposition(|byte| *byte == b'/');
            if let Some(slash) = slash
                && (1..=100).contains(&(name.len() - slash - 1))
                && slash > 0
            {
                self.block[345..345 + slash].copy_from_slice(&name[..slash]);
                self.block[..name.len() - slash - 1].copy_from_slice(&name[slash + 1..]);
                return;
            }
        }
        self.text(0, "path", &name);
    }

    /// A text that needs a PAX record, with what a tool without PAX can use of it at `at`.
    fn text(&mut self, at: usize, key: &str, text: &[u8]) {
        self.records.insert(key.as_bytes().to_vec(), text.to_vec());
        let field = &mut self.block[at..at + 100];
        for (byte, from) in field.iter_mut().zip(text) {
            *byte = if from.is_ascii() { *from } else { b'_' };
        }
        // A cut name must not end in a slash: it would be a directory to some.
        if text.len() > 100 {
            for byte in field.iter_mut().rev().take_while(|byte| **byte == b'/') {
                *byte = 0;
            }
        }
    }

    /// A number at `at`; in a PAX record when it does not fit.
    fn number(&mut self, at: usize, len: usize, key: &str, value: u64) {
        let max = if len == 8 { SHORT_MAX } else { LONG_MAX };
        let field = if value <= max {
            value
        } else {
            self.records.insert(key.as_bytes().to_vec(), value.to_string().into_bytes());
            0
        };
        octal(&mut self.block[at..at + len], field);
    }

    fn mtime(&mut self, Timestamp { seconds, nanos }: Timestamp) {
        let field = u64::try_from(seconds).ok().filter(|seconds| *seconds <= LONG_MAX);
        octal(&mut self.block[136..148], field.unwrap_or(0));
        if field.is_some() && nanos == 0 {
            return;
        }
        let text = if nanos == 0 {
            seconds.to_string()
        } else {
            let (sign, whole, nanos) = match seconds {
                0.. => ("", seconds.unsigned_abs(), nanos),
                // Three quarters after two seconds before 1970 is -1.25.
                _ => ("-", seconds.unsigned_abs() - 1, 1_000_000_000 - nanos),
            };
            format!("{sign}{whole}.{nanos:09}").trim_end_matches('0').to_owned()
        };
        self.records.insert(b"mtime".to_vec(), text.into_bytes());
    }
}

/// The header block of an extension header with `len` bytes.
fn pax_header(len: u64) -> Block {
    let mut block = [0; BLOCK_BYTES];
    block[..PAX_NAME.len()].copy_from_slice(PAX_NAME);
    for (at, width) in [(100, 8), (108, 8), (116, 8), (136, 12), (329, 8), (337, 8)] {
        octal(&mut block[at..at + width], 0);
    }
    octal(&mut block[124..136], len);
    block[156] = type_flag::PAX;
    block[257..265].copy_from_slice(b"ustar\x0000");
    finish_block(&mut block);
    block
}

/// Octal digits with leading zeros and a NUL, filling the field.
fn octal(field: &mut [u8], mut value: u64) {
    let digits = field.len() - 1;
    for byte in field[..digits].iter_mut().rev() {
        *byte = b'0' + (value & 7) as u8;
        value >>= 3;
    }
    debug_assert_eq!(value, 0, "checked against the field's maximum before");
}

/// Puts the checksum in: six digits, NUL, space, and the field itself counts as spaces.
fn finish_block(block: &mut Block) {
    block[148..156].fill(b' ');
    let sum = block.iter().map(|byte| u64::from(*byte)).sum();
    octal(&mut block[148..155], sum);
    block[155] = b' ';
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::Limits;
    use crate::tar::Reader;

    fn file(path: &[u8], size_bytes: u64) -> Entry {
        Entry {
            path: EntryPath::clean(path).unwrap(),
            kind: EntryKind::File { size_bytes, sparse: None },
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: Timestamp::default(),
            xattrs: Vec::new(),
        }
    }

    fn archive(entries: &[(Entry, Vec<u8>)]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        for (entry, data) in entries {
            writer.append(entry, &mut data.as_slice()).unwrap();
        }
        writer.finish().unwrap()
    }

    fn entries(bytes: &[u8]) -> Vec<(Entry, Vec<u8>)> {
        let mut reader = Reader::new(bytes, &Limits::default());
        let mut all = Vec::new();
        while let Some(entry) = reader.next_entry().unwrap() {
            let mut data = Vec::new();
            reader.entry_data().read_to_end(&mut data).unwrap();
            all.push((entry, data));
        }
        assert_eq!(reader.finish().unwrap().size_bytes, bytes.len() as u64);
        all
    }

    #[test]
    fn times_after_the_latest_are_the_latest_and_others_stay() {
        let at = |seconds, nanos| Timestamp { seconds, nanos };
        let mut writer = Writer::new(Vec::new());
        writer.set_latest(Some(at(100, 0)));
        let times = [at(99, 999_999_999), at(100, 0), at(100, 1), at(101, 0), at(-5, 0)];
        for mtime in times {
            writer.append(&Entry { mtime, ..file(b"f", 0) }, &mut io::empty()).unwrap();
        }
        let written: Vec<Timestamp> =
            entries(&writer.finish().unwrap()).into_iter().map(|(entry, _)| entry.mtime).collect();
        assert_eq!(written, [times[0], times[1], at(100, 0), at(100, 0), times[4]]);
    }

    #[test]
    fn plain_entries_need_no_pax_header() {
        for path in [&b"a"[..], &[b'a'; 100], &[&[b'd'; 155][..], b"/", &[b'f'; 100]].concat()] {
            let entry = Entry { uid: 0o777_7777, mode: 0o7777, ..file(path, 3) };
            let bytes = archive(&[(entry.clone(), b"abc".to_vec())]);
            assert_eq!(bytes.len(), 4 * BLOCK_BYTES, "{}", path.escape_ascii());
            assert_eq!(entries(&bytes), [(entry, b"abc".to_vec())]);
        }
        let mut directory = file(&[&[b'd'; 149][..], b"/x"].concat(), 0);
        directory.kind = EntryKind::Directory;
        assert_eq!(archive(&[(directory, Vec::new())]).len(), 3 * BLOCK_BYTES);
    }

    #[test]
    fn holes_become_zeros() {
        let run = |offset, length| SparseRun { offset, length };
        let runs = vec![run(2, 3), run(5, 1), run(600, 2)];
        let mut entry = file(b"s", 1000);
        entry.kind = EntryKind::File { size_bytes: 1000, sparse: Some(runs) };
        let read = entries(&archive(&[(entry, b"abcdef".to_vec())]));
        let mut expected = vec![0; 1000];
        expected[2..6].copy_from_slice(b"abcd");
        expected[600..602].copy_from_slice(b"ef");
        assert_eq!(read, [(file(b"s", 1000), expected)]);
    }

    #[test]
    fn what_has_no_place_is_refused() {
        let mut writer = Writer::new(Vec::new());
        let short = writer.append(&file(b"f", 5), &mut &b"1234"[..]).unwrap_err();
        assert!(matches!(short, WriteError::ShortData { expected: 5, actual: 4, .. }));
        let kind = |kind| Entry { kind, ..file(b"f", 0) };
        let device = EntryKind::CharDevice(Device { major: 1 << 21, minor: 0 });
        let xattr = |name: &[u8]| Entry { xattrs: vec![(name.to_vec(), Vec::new())], ..file(b"f", 0) };
        let run = SparseRun { offset: 5, length: 6 };
        for entry in [
            kind(device),
            kind(EntryKind::Symlink { target: Vec::new() }),
            kind(EntryKind::Symlink { target: b"a\0b".to_vec() }),
            kind(EntryKind::File { size_bytes: 10, sparse: Some(vec![run]) }),
            kind(EntryKind::File { size_bytes: 30, sparse: Some(vec![run, run]) }),
            xattr(b""),
            xattr(b"user.a=b"),
            xattr(b"user.\0"),
        ] {
            let error = writer.append(&entry, &mut io::repeat(1)).unwrap_err();
            assert!(matches!(error, WriteError::Unrepresentable { .. }), "{entry:?}: {error}");
        }
    }

    fn name() -> impl Strategy<Value = Vec<u8>> {
        let part = prop_oneof![
            4 => proptest::collection::vec(prop_oneof![Just(b'a'), Just(b'b'), Just(b'.')], 1..4),
            2 => proptest::collection::vec(any::<u8>(), 1..12),
            1 => proptest::collection::vec(Just(b'n'), 90..120),
        ];
        proptest::collection::vec(part, 0..4).prop_map(|parts| {
            let joined = parts.join(&b'/');
            let clean: Vec<u8> = joined.into_iter().filter(|byte| *byte != 0).collect();
            EntryPath::clean(&clean).map_or_else(|_| b"fallback".to_vec(), |path| path.as_bytes().to_vec())
        })
    }

    fn entry() -> impl Strategy<Value = (Entry, Vec<u8>)> {
        let bytes = || proptest::collection::vec(any::<u8>(), 0..1500);
        let device = || (0..4096_u32, 0..1_048_576_u32).prop_map(|(major, minor)| Device { major, minor });
        let kind = prop_oneof![
            bytes().prop_map(|data| (EntryKind::File { size_bytes: data.len() as u64, sparse: None }, data)),
            name().prop_filter_map("the root is no link target", |name| {
                let target = EntryPath::clean(&name).ok().filter(|path| !path.is_root())?;
                Some((EntryKind::HardLink { target }, Vec::new()))
            }),
            name().prop_filter_map("empty target", |target| {
                (!target.is_empty()).then_some((EntryKind::Symlink { target }, Vec::new()))
            }),
            Just((EntryKind::Directory, Vec::new())),
            device().prop_map(|device| (EntryKind::CharDevice(device), Vec::new())),
            device().prop_map(|device| (EntryKind::BlockDevice(device), Vec::new())),
            Just((EntryKind::Fifo, Vec::new())),
        ];
        let seconds = prop_oneof![0..2_000_000_000_i64, any::<i64>()];
        let nanos = prop_oneof![Just(0), 0..1_000_000_000_u32];
        let xattrs = proptest::collection::btree_map("[a-z.]{1,20}", bytes(), 0..3);
        let numbers = (0..0o10000_u32, 0..=i32::MAX as u32, 0..=i32::MAX as u32);
        (name(), kind, numbers, (seconds, nanos), xattrs).prop_map(
            |(path, (kind, data), (mode, uid, gid), (seconds, nanos), xattrs)| {
                let mut path = EntryPath::clean(&path).unwrap();
                if path.is_root() && kind != EntryKind::Directory {
                    path = path.join(b"x");
                }
                let xattrs = xattrs.into_iter().map(|(name, value)| (name.into_bytes(), value)).collect();
                (Entry { path, kind, mode, uid, gid, mtime: Timestamp { seconds, nanos }, xattrs }, data)
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(all in proptest::collection::vec(entry(), 0..6)) {
            let bytes = archive(&all);
            prop_assert_eq!(bytes.len() % BLOCK_BYTES, 0);
            prop_assert_eq!(entries(&bytes), all);
        }
    }
}
