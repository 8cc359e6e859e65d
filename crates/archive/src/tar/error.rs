use std::io;

use plies_oci::ErrorKind;

use super::entry::{EntryPath, Escaped};
use crate::compress::DecodeError;
use crate::limits::LimitExceeded;

/// Why bytes are not an archive that we accept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TarError {
    /// A `..` that would leave the root of the tree.
    #[error("path {path} leaves the root of the archive")]
    PathEscapes {
        /// The path as it stood in the archive.
        path: Escaped,
    },
    /// A NUL byte in a path.
    #[error("path {path} contains a NUL byte")]
    PathHasNul {
        /// The path as it stood in the archive.
        path: Escaped,
    },
    /// The root of the tree as anything but a directory (CVE-2021-29136).
    #[error("entry {path} would make the root of the archive something else than a directory")]
    RootNotDirectory {
        /// The path as it stood in the archive.
        path: Escaped,
    },
    /// A symbolic link or hard link to nothing, or to something that cannot be linked to.
    #[error("{path} links to {target}: {why}")]
    LinkTarget {
        /// The link.
        path: EntryPath,
        /// What it says.
        target: Escaped,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A number that Linux has no room for: owner, group, device.
    #[error("{path}: {field} {value} is out of range")]
    OutOfRange {
        /// The entry.
        path: EntryPath,
        /// Which number.
        field: &'static str,
        /// Its value.
        value: i64,
    },
    /// An entry of a type that no layer may hold: sockets, doors, volumes, multi-volume parts.
    #[error("{path} has the unsupported type '{}'", .type_flag.escape_ascii())]
    UnsupportedType {
        /// The entry.
        path: Escaped,
        /// The type flag of its header.
        type_flag: u8,
    },
    /// Bytes that don't follow the format.
    #[error("malformed archive at byte {offset}: {why}")]
    Malformed {
        /// Where the header of the entry begins in the uncompressed archive.
        offset: u64,
        /// What is wrong there.
        why: &'static str,
    },
    /// The input ended too early. An archive that lacks its end marker counts as cut.
    #[error("archive ends after {offset} bytes, inside {inside}")]
    Truncated {
        /// Bytes that came.
        offset: u64,
        /// What was being read.
        inside: &'static str,
    },
    /// A limit was hit.
    #[error(transparent)]
    Limit(#[from] LimitExceeded),
    /// The input could not be read or decompressed.
    #[error("read archive")]
    Read {
        /// The reader's error.
        #[source]
        source: io::Error,
    },
    /// The recording for exact re-assembly could not be written.
    #[error("write tar-split record")]
    Record {
        /// The writer's error.
        #[source]
        source: io::Error,
    },
}

impl TarError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Limit(_) => ErrorKind::Limit,
            Self::Read { source } => DecodeError::kind_of(source),
            Self::Record { .. } => ErrorKind::Unavailable,
            _ => ErrorKind::InvalidInput,
        }
    }
}
