//! What an archive may cost. Layers are hostile input: every expansion has a bound with a name.

use crate::tar::Escaped;

/// Bounds on reading one layer. All are inclusive: a value equal to the limit passes.
///
/// The defaults let every image pass that the peers can run on a common file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes in all extension headers (PAX `x` and `g`, GNU `L` and `K`) that stand before one
    /// entry, with their own headers and padding. Default 1 MiB, which Go's archive/tar and libarchive allow for a single one.
    pub header_bytes: u64,
    /// Bytes in a cleaned path. Default 4095: Linux's `PATH_MAX` less the NUL.
    pub path_bytes: u64,
    /// Bytes in one component of a path. Default 255: `NAME_MAX` of all common file systems.
    pub component_bytes: u64,
    /// Components in a path. Default 1024: real images stay below 100, and a path of `path_bytes`
    /// could otherwise hold 2,048 directories, each to be opened.
    pub path_depth: u64,
    /// Bytes in the target of a symbolic link. Default 4095: the kernel refuses longer ones.
    pub symlink_bytes: u64,
    /// Entries in one archive. Default 10,000,000: twenty times the largest layer that we know of.
    pub entries: u64,
    /// Bytes of the uncompressed archive, padding and trailing bytes included. Default 64 GiB.
    pub unpacked_bytes: u64,
    /// Length of one file in bytes, with its holes: a sparse file of 1 TiB fits into 3 KiB of
    /// archive, and whoever reads it pays. Default 64 GiB.
    pub file_bytes: u64,
    /// Bytes out of a decompressor for each byte in, once [`Self::EXPANSION_GRACE_BYTES`] came
    /// out. Default 200: deflate reaches 1,032 on zeros, real layers stay below 30.
    pub expansion_ratio: u64,
    /// Bytes in the value of one extended attribute. Default 64 KiB: Linux's `XATTR_SIZE_MAX`.
    pub xattr_bytes: u64,
    /// Extended attributes on one entry. Default 1,000; ext4 holds about 4 KiB of them in all.
    pub xattrs_count: u64,
    /// Bytes of archive that describe where one sparse file's data goes. Default 1 MiB, as in
    /// Go's archive/tar since CVE-2025-58183.
    pub sparse_map_bytes: u64,
}

impl Limits {
    /// Output of a decompressor that is not yet held against [`Self::expansion_ratio`]: small
    /// layers of zeros are common and harmless.
    pub const EXPANSION_GRACE_BYTES: u64 = 64 << 20;
    /// Bytes in the name of an extended attribute: Linux's `XATTR_NAME_MAX`.
    pub const XATTR_NAME_BYTES: u64 = 255;
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            header_bytes: 1 << 20,
            path_bytes: 4095,
            component_bytes: 255,
            path_depth: 1024,
            symlink_bytes: 4095,
            entries: 10_000_000,
            unpacked_bytes: 64 << 30,
            file_bytes: 64 << 30,
            expansion_ratio: 200,
            xattr_bytes: 64 << 10,
            xattrs_count: 1_000,
            sparse_map_bytes: 1 << 20,
        }
    }
}

/// Something in an archive is larger than [`Limits`] allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} exceeds the limit {} = {max}", Subject(.what, .entry), key_of(.limit))]
pub struct LimitExceeded {
    /// The field of [`Limits`] (or the constant) that was hit. Messages name it as the config file does, `limits.path-bytes`.
    pub limit: &'static str,
    /// Its value.
    pub max: u64,
    /// What was too large.
    pub what: &'static str,
    /// The entry that asked for it, where there is one.
    pub entry: Option<Escaped>,
}

/// What the config file calls a limit; constants are not in it.
fn key_of(limit: &str) -> String {
    match limit.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_') {
        true => format!("limits.{}", limit.replace('_', "-")),
        false => limit.to_owned(),
    }
}

struct Subject<'a>(&'a str, &'a Option<Escaped>);

impl std::fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.1 {
            Some(entry) => write!(f, "{} of {entry}", self.0),
            None => f.write_str(self.0),
        }
    }
}

impl LimitExceeded {
    /// Fails when `value` is above `max`.
    pub(crate) fn check(
        limit: &'static str,
        max: u64,
        value: u64,
        what: &'static str,
        entry: Option<&[u8]>,
    ) -> Result<(), Self> {
        if value <= max { Ok(()) } else { Err(Self { limit, max, what, entry: entry.map(Escaped::of) }) }
    }
}
