//! What a layer says about itself besides its files: which directories it only passes through,
//! and what it costs.
//!
//! Encoded form of [`DirIndex`], version 1. Numbers are unsigned LEB128.
//!
//! | bytes | meaning |
//! |---|---|
//! | 1 | version, 1 |
//! | number | how many paths follow |
//! | per path: 1 | 0 if it is on the way, 1 if it was copied up |
//! | number | leading bytes that it shares with the path before |
//! | number, bytes | how many bytes follow, and they |
//!
//! Paths are cleaned and strictly ascending, so equal indexes have equal bytes and a decoder can
//! tell damage from content.

use std::collections::BTreeMap;

use plies_oci::ErrorKind;

use crate::tar::EntryPath;

/// Why a directory is only implied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Implied {
    /// It is on the way to an entry, and nobody said what it is like: its metadata is made up.
    OnTheWay,
    /// It was copied up from the tree below because of a change inside, and is just like it was there. An archive for
    /// other programs has an entry for it: those that unpack a layer by itself would make up its metadata.
    CopiedUp,
}

/// Which directories of a layer are only *implied*: there because something below them changed.
/// All others are *explicit*: the layer set their owner, mode, times and attributes.
///
/// The root is [`EntryPath::root`]. A lower layer's metadata stands where the index has a path.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DirIndex {
    implied: BTreeMap<EntryPath, Implied>,
}

/// Why bytes are not a directory index.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IndexError {
    /// Written by a later version of this program.
    #[error("directory index has version {found}, this program knows up to {known}")]
    TooNew {
        /// The version found.
        found: u8,
        /// The latest that we know.
        known: u8,
    },
    /// Not what [`DirIndex::encode`] writes.
    #[error("directory index is damaged: {why}")]
    Corrupt {
        /// What is wrong.
        why: &'static str,
    },
}

impl IndexError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::TooNew { .. } => ErrorKind::FailedPrecondition,
            Self::Corrupt { .. } => ErrorKind::DataLoss,
        }
    }
}

impl DirIndex {
    const VERSION: u8 = 1;

    /// Marks a directory as implied.
    pub fn insert(&mut self, path: EntryPath, why: Implied) {
        self.implied.insert(path, why);
    }

    /// Whether a directory is only implied, and why.
    pub fn why_implied(&self, path: &EntryPath) -> Option<Implied> {
        self.implied.get(path).copied()
    }

    /// Whether a directory is only implied.
    pub fn is_implied(&self, path: &EntryPath) -> bool {
        self.implied.contains_key(path)
    }

    /// The implied directories, ascending by bytes.
    pub fn implied(&self) -> impl ExactSizeIterator<Item = &EntryPath> {
        self.implied.keys()
    }

    /// The bytes described at the top of this module.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![Self::VERSION];
        put_number(&mut out, self.implied.len());
        let mut previous: &[u8] = b"";
        for (path, why) in &self.implied {
            let bytes = path.as_bytes();
            out.push(match why {
                Implied::OnTheWay => 0,
                Implied::CopiedUp => 1,
            });
            let shared = previous.iter().zip(bytes).take_while(|(a, b)| a == b).count();
            put_number(&mut out, shared);
            put_number(&mut out, bytes.len() - shared);
            out.extend_from_slice(&bytes[shared..]);
            previous = bytes;
        }
        out
    }

    /// Reads what [`Self::encode`] wrote, and nothing else.
    ///
    /// # Errors
    /// [`IndexError`]; work and memory are bounded by the length of `bytes` squared at worst, and
    /// linear for an index that we wrote.
    pub fn decode(bytes: &[u8]) -> Result<Self, IndexError> {
        let corrupt = |why| IndexError::Corrupt { why };
        let (&version, mut rest) = bytes.split_first().ok_or(corrupt("no version"))?;
        match version {
            Self::VERSION => {}
            0 => return Err(corrupt("version 0")),
            found => return Err(IndexError::TooNew { found, known: Self::VERSION }),
        }
        let count = take_number(&mut rest).ok_or(corrupt("no count"))?;
        let mut implied = BTreeMap::new();
        let mut previous: Option<EntryPath> = None;
        for _ in 0..count {
            let (&why, after) = rest.split_first().ok_or(corrupt("ends inside a path"))?;
            rest = after;
            let why = match why {
                0 => Implied::OnTheWay,
                1 => Implied::CopiedUp,
                _ => return Err(corrupt("says an unknown reason")),
            };
            let shared = take_number(&mut rest).ok_or(corrupt("ends inside a path"))?;
            let length = take_number(&mut rest).ok_or(corrupt("ends inside a path"))?;
            let before = previous.as_ref().map_or(&b""[..], EntryPath::as_bytes);
            let head = before.get(..shared).ok_or(corrupt("shares more than there is"))?;
            let (tail, after) = rest.split_at_checked(length).ok_or(corrupt("ends inside a path"))?;
            rest = after;
            let raw = [head, tail].concat();
            let path = EntryPath::clean(&raw).ok().filter(|path| path.as_bytes() == raw);
            let path = path.ok_or(corrupt("holds a path that is not clean"))?;
            if previous.as_ref().is_some_and(|previous| *previous >= path) {
                return Err(corrupt("paths are not in order"));
            }
            implied.insert(path.clone(), why);
            previous = Some(path);
        }
        if rest.is_empty() { Ok(Self { implied }) } else { Err(corrupt("bytes after the end")) }
    }
}

impl FromIterator<(EntryPath, Implied)> for DirIndex {
    fn from_iter<T: IntoIterator<Item = (EntryPath, Implied)>>(paths: T) -> Self {
        Self { implied: paths.into_iter().collect() }
    }
}

fn put_number(out: &mut Vec<u8>, mut number: usize) {
    while number >= 0x80 {
        out.push(0x80 | (number & 0x7f) as u8);
        number >>= 7;
    }
    out.push(number as u8);
}

/// `None` when the bytes end too soon, or the number needs more than four bytes of seven bits:
/// nothing here reaches 256 MiB.
fn take_number(rest: &mut &[u8]) -> Option<usize> {
    let mut number = 0;
    for shift in [0, 7, 14, 21] {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        number |= usize::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// What a layer costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes on disk: blocks of 512 bytes as the file system counts them, each inode once.
    pub size_bytes: u64,
    /// Inodes: files, directories (the root too), links, devices, whiteouts.
    pub inodes: u64,
    /// Lengths of the regular files, each inode once.
    pub content_bytes: u64,
}

impl Usage {
    /// Counts one inode.
    pub fn add(&mut self, stat: &rustix::fs::Stat) {
        // Fields are signed on some architectures; the kernel never gives negative ones.
        self.size_bytes += (stat.st_blocks as u64).saturating_mul(512);
        self.inodes += 1;
        if crate::sys::kind(stat) == rustix::fs::FileType::RegularFile {
            self.content_bytes += stat.st_size as u64;
        }
    }
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.size_bytes += other.size_bytes;
        self.inodes += other.inodes;
        self.content_bytes += other.content_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn index(paths: &[&str]) -> DirIndex {
        let why = |path: &str| if path == "usr/lib" { Implied::CopiedUp } else { Implied::OnTheWay };
        paths.iter().map(|path| (EntryPath::clean(path.as_bytes()).unwrap(), why(path))).collect()
    }

    #[test]
    fn bytes_of_version_1_are_pinned() {
        let bytes = index(&["", "usr", "usr/lib", "var"]).encode();
        assert_eq!(bytes, b"\x01\x04\0\x00\x00\0\x00\x03usr\x01\x03\x04/lib\0\x00\x03var");
        assert_eq!(DirIndex::default().encode(), b"\x01\x00");
    }

    #[test]
    fn decode_tells_new_from_damaged() {
        assert_eq!(DirIndex::decode(b"\x02\x00"), Err(IndexError::TooNew { found: 2, known: 1 }));
        for bytes in [
            &b""[..],
            b"\x00",
            b"\x01",
            b"\x01\x01",
            b"\x01\x01\x00",
            b"\x01\x01\x00\x00\x03us",
            b"\x01\x01\x02\x00\x01a",
            b"\x01\x01\x00\x01\x00",
            b"\x01\x02\x00\x00\x01b\x00\x00\x01a",
            b"\x01\x02\x00\x00\x01a\x00\x01\x00",
            b"\x01\x01\x00\x00\x02a/",
            b"\x01\x01\x00\x00\x02..",
            b"\x01\x00\x00",
            b"\x01\xff\xff\xff\xff\xff\xff",
        ] {
            let error = DirIndex::decode(bytes).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::DataLoss, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn decode_undoes_encode(paths in proptest::collection::btree_set("[a-c./]{0,8}", 0..20)) {
            let index: DirIndex =
                paths.iter().filter_map(|path| Some((EntryPath::clean(path.as_bytes()).ok()?, Implied::CopiedUp))).collect();
            prop_assert_eq!(DirIndex::decode(&index.encode()), Ok(index));
        }

        #[test]
        fn decode_accepts_only_what_encode_writes(bytes in proptest::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(index) = DirIndex::decode(&bytes) {
                prop_assert_eq!(index.encode(), bytes);
            }
        }
    }
}
