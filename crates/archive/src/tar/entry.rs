use std::fmt;

use super::error::TarError;

/// A path inside an archive, cleaned: relative, `/`-separated, no empty, `.` or `..` component.
/// The empty path is the root of the tree.
///
/// Bytes, not text: names in layers need not be UTF-8, and are kept as they are.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct EntryPath(Vec<u8>);

impl EntryPath {
    /// Cleans `raw` lexically, as Go's `path.Clean` does, after dropping leading slashes. A `..`
    /// that would leave the root is refused rather than clamped: the peers disagree on what it means.
    ///
    /// # Errors
    /// [`TarError::PathEscapes`] for a `..` above the root, [`TarError::PathHasNul`].
    pub fn clean(raw: &[u8]) -> Result<Self, TarError> {
        if raw.contains(&0) {
            return Err(TarError::PathHasNul { path: Escaped::of(raw) });
        }
        let mut parts: Vec<&[u8]> = Vec::new();
        for part in raw.split(|byte| *byte == b'/') {
            match part {
                b"" | b"." => {}
                b".." => {
                    parts.pop().ok_or_else(|| TarError::PathEscapes { path: Escaped::of(raw) })?;
                }
                part => parts.push(part),
            }
        }
        Ok(Self(parts.join(&b'/')))
    }

    /// The root of the tree.
    pub fn root() -> Self {
        Self::default()
    }

    /// Whether this is the root of the tree.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The cleaned bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The components, outermost first; none for the root.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|byte| *byte == b'/').filter(|part| !part.is_empty())
    }

    /// The directory that holds this entry, and its last component; `None` for the root.
    pub fn split(&self) -> Option<(EntryPath, &[u8])> {
        if self.is_root() {
            return None;
        }
        Some(match self.0.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (Self(self.0[..at].to_vec()), &self.0[at + 1..]),
            None => (Self::root(), &self.0),
        })
    }

    /// This path with one more component, which must be a plain name.
    #[must_use]
    pub fn join(&self, name: &[u8]) -> Self {
        debug_assert!(!name.is_empty() && !name.contains(&b'/') && name != b"." && name != b"..");
        let mut bytes = self.0.clone();
        if !bytes.is_empty() {
            bytes.push(b'/');
        }
        bytes.extend_from_slice(name);
        Self(bytes)
    }

    /// Whether this path is `dir` or lies below it.
    pub fn is_within(&self, dir: &EntryPath) -> bool {
        dir.is_root() || self.0.strip_prefix(dir.as_bytes()).is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
    }
}

/// Escaped, so that a hostile name cannot write to a terminal or a log.
impl fmt::Display for EntryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "/{}", self.0.escape_ascii())
    }
}

impl fmt::Debug for EntryPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Hostile bytes for an error message: cut to 200 and escaped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Escaped(String);

impl Escaped {
    /// Escapes the first 200 bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self(bytes[..bytes.len().min(200)].escape_ascii().to_string())
    }
}

impl fmt::Display for Escaped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0)
    }
}

/// A moment as archives carry it: seconds since 1970 (negative before) and nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp {
    /// Whole seconds since 1970-01-01T00:00:00Z.
    pub seconds: i64,
    /// Nanoseconds after `seconds`, 0 to 999,999,999.
    pub nanos: u32,
}

/// Device numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Device {
    /// The major number.
    pub major: u32,
    /// The minor number.
    pub minor: u32,
}

/// One run of stored bytes in a sparse file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SparseRun {
    /// Where in the file the run begins.
    pub offset: u64,
    /// How many bytes of the archive belong there.
    pub length: u64,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File {
        /// The file's length when it is on disk (for a sparse file, with its holes).
        size_bytes: u64,
        /// `Some`: the archive holds only these runs, in ascending order and without overlap;
        /// the rest is holes.
        sparse: Option<Vec<SparseRun>>,
    },
    /// Another name of a file that came earlier, in this layer or below it.
    HardLink {
        /// The other name, cleaned.
        target: EntryPath,
    },
    /// A symbolic link.
    Symlink {
        /// What it says, never resolved here. Not empty, no NUL.
        target: Vec<u8>,
    },
    /// A directory.
    Directory,
    /// A character device.
    CharDevice(Device),
    /// A block device.
    BlockDevice(Device),
    /// A named pipe.
    Fifo,
}

/// One member of an archive, with all extension headers folded in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it goes, cleaned.
    pub path: EntryPath,
    /// What it is.
    pub kind: EntryKind,
    /// Permission bits with setuid, setgid and sticky: 0 to 0o7777.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of last modification.
    pub mtime: Timestamp,
    /// Extended attributes, sorted by name, no name twice.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}
