//! Keys: what a step does and what it takes in, as one digest.

use plies_oci::{BlobDigest, Sha256Hasher};
use plies_store::{Key, KeyReader};
use serde::{Deserialize, Serialize};

/// Digest of a step and of the content of all its inputs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct CacheKey(BlobDigest);

/// As 64 hex digits, for whoever carries a key elsewhere.
impl std::fmt::Display for CacheKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.hex())
    }
}

impl CacheKey {
    /// No other sorts before it.
    pub(crate) const LOWEST: Self = Self(BlobDigest::from_bytes([0; 32]));
}

impl Key for CacheKey {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
    }

    fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
        Key::decode(input).map(Self)
    }
}

/// Adds up a [`CacheKey`]. Every part goes in with its length, so that no two lists of parts run together:
/// `["a b"]` never equals `["a", "b"]` (CVE-2024-24557 began that way).
#[derive(Debug)]
pub struct KeyBuilder(Sha256Hasher);

impl KeyBuilder {
    /// Begins a key for one kind of operation. `version` goes up when the operation's meaning changes, so that
    /// results of an older Plies are not taken for it.
    pub fn new(operation: &str, version: u32) -> Self {
        Self(Sha256Hasher::default()).bytes(operation.as_bytes()).number(version.into())
    }

    /// Adds bytes.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    /// Adds a number.
    #[must_use]
    pub fn number(self, number: u64) -> Self {
        self.bytes(&number.to_le_bytes())
    }

    /// Adds a list: its length, then its parts.
    #[must_use]
    pub fn list<T: AsRef<[u8]>>(self, parts: impl IntoIterator<Item = T, IntoIter: ExactSizeIterator>) -> Self {
        let parts = parts.into_iter();
        let begun = self.number(parts.len() as u64);
        parts.fold(begun, |key, part| key.bytes(part.as_ref()))
    }

    /// Adds the key of an input.
    #[must_use]
    pub fn input(self, key: &CacheKey) -> Self {
        self.bytes(key.0.as_bytes())
    }

    /// The key.
    pub fn finish(self) -> CacheKey {
        CacheKey(BlobDigest::from_bytes(self.0.finish()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c01_lists_of_parts_never_run_together() {
        let key = |parts: &[&str]| KeyBuilder::new("run", 1).list(parts.iter()).finish();
        assert_ne!(key(&["a b"]), key(&["a", "b"]));
        assert_ne!(key(&["ab", ""]), key(&["a", "b"]));
        assert_ne!(key(&[]), key(&[""]));
        assert_eq!(key(&["a", "b"]), key(&["a", "b"]));
        assert_ne!(KeyBuilder::new("run", 1).finish(), KeyBuilder::new("run", 2).finish());
    }
}
