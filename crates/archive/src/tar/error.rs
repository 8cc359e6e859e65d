use super::entry::Escaped;

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
}
