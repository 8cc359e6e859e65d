use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use sha2::Digest as _;

/// Bytes of a sha256 digest (FIPS 180-4).
const LEN_BYTES: usize = 32;

/// Why a string is not a digest.
///
/// Parsing is strict (`sha256:` and 64 lower-case hex digits, nothing else) because digests become
/// file names and URLs: CVE-2024-3727 and CVE-2022-39237 began with lenient parsers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DigestError {
    /// No `algorithm:` in front.
    #[error("digest {0:?} has no algorithm, expected sha256:<64 hex digits>")]
    NoAlgorithm(String),
    /// An algorithm other than sha256. (sha512 is refused here, at parse, and nowhere later.)
    #[error("digest algorithm {0:?} is not supported, only sha256 is")]
    Algorithm(String),
    /// Not exactly 64 lower-case hex digits.
    #[error("digest {0:?} is not 64 lower-case hex digits after sha256:")]
    Encoding(String),
}

/// Cuts hostile text before it is quoted in an error.
fn quoted(text: &str) -> String {
    text.chars().take(100).collect()
}

fn parse_sha256(text: &str) -> Result<[u8; LEN_BYTES], DigestError> {
    let (algorithm, hex) = text.split_once(':').ok_or_else(|| DigestError::NoAlgorithm(quoted(text)))?;
    if algorithm != "sha256" {
        return Err(DigestError::Algorithm(quoted(algorithm)));
    }
    parse_hex(hex).ok_or_else(|| DigestError::Encoding(quoted(text)))
}

fn parse_hex(hex: &str) -> Option<[u8; LEN_BYTES]> {
    let nibble = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let hex: &[u8; LEN_BYTES * 2] = hex.as_bytes().try_into().ok()?;
    let mut bytes = [0; LEN_BYTES];
    for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(bytes)
}

/// Lists print tens of thousands of digests: one write of all digits takes a tenth of the time of one for each byte.
fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    let digit = |nibble: u8| char::from(b"0123456789abcdef"[usize::from(nibble)]);
    let mut digits = String::with_capacity(bytes.len() * 2);
    digits.extend(bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 0xf)]));
    f.write_str(&digits)
}

macro_rules! sha256_newtype {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; LEN_BYTES]);

        impl $name {
            /// Wraps the 32 bytes of a digest computed or stored by us.
            pub const fn from_bytes(bytes: [u8; LEN_BYTES]) -> Self {
                Self(bytes)
            }

            /// The 32 bytes.
            pub const fn as_bytes(&self) -> &[u8; LEN_BYTES] {
                &self.0
            }

            /// The 64 hex digits without the algorithm: the form used in file names.
            pub fn hex(&self) -> String {
                self.to_string()["sha256:".len()..].to_owned()
            }

            /// Parses 64 lower-case hex digits without the algorithm, as file names carry them.
            ///
            /// # Errors
            /// [`DigestError::Encoding`].
            pub fn from_hex(hex: &str) -> Result<Self, DigestError> {
                parse_hex(hex).map(Self).ok_or_else(|| DigestError::Encoding(quoted(hex)))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("sha256:")?;
                write_hex(f, &self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "("))?;
                write_hex(f, &self.0[..6])?;
                f.write_str(")")
            }
        }

        impl FromStr for $name {
            type Err = DigestError;

            fn from_str(text: &str) -> Result<Self, DigestError> {
                parse_sha256(text).map(Self)
            }
        }

        /// Text (`sha256:…`) in formats for people, 32 plain bytes in the catalogue.
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
                } else {
                    <[u8; LEN_BYTES]>::deserialize(deserializer).map(Self)
                }
            }
        }
    };
}

sha256_newtype! {
    /// Digest of a blob's bytes as they are stored, possibly compressed.
    BlobDigest
}
sha256_newtype! {
    /// Digest of a layer's *uncompressed* tar.
    DiffId
}
sha256_newtype! {
    /// Digest of an ordered stack of diff IDs (image-spec, `config.md`, "Layer ChainID").
    ChainId
}
sha256_newtype! {
    /// Digest of an image's config bytes: what docker calls the image ID.
    ImageId
}

impl BlobDigest {
    /// Digests bytes at hand.
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Sha256Hasher::default();
        hasher.update(bytes);
        Self(hasher.finish())
    }
}

impl ChainId {
    /// The chain ID of `parent` with one more layer on top. The chain of a single layer is its
    /// diff ID; every further layer folds in as `sha256("<parent> <diff ID>")`.
    pub fn extend(parent: Option<ChainId>, diff_id: DiffId) -> Self {
        match parent {
            None => Self(diff_id.0),
            Some(parent) => {
                let mut hasher = Sha256Hasher::default();
                hasher.update(format!("{parent} {diff_id}").as_bytes());
                Self(hasher.finish())
            }
        }
    }

    /// The chain ID of a whole stack, bottom first; `None` for the empty stack.
    pub fn of(diff_ids: &[DiffId]) -> Option<Self> {
        diff_ids.iter().fold(None, |chain, diff_id| Some(Self::extend(chain, *diff_id)))
    }
}

/// A running sha256 whose caller decides, by the constructor it hands the result to, what kind of
/// digest it is.
#[derive(Clone, Default)]
pub struct Sha256Hasher(sha2::Sha256);

impl Sha256Hasher {
    /// Takes in more bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    /// The 32 bytes of the digest.
    pub fn finish(self) -> [u8; LEN_BYTES] {
        self.0.finalize().into()
    }
}

impl fmt::Debug for Sha256Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sha256Hasher")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn j05_digests_parse_strictly() {
        let good = format!("sha256:{}", "0a".repeat(32));
        assert_eq!(good.parse::<BlobDigest>().unwrap().to_string(), good);
        for bad in [
            "",
            "sha256:",
            "sha256",
            &"0a".repeat(32),
            &format!("sha256:{}", "0A".repeat(32)),
            &format!("SHA256:{}", "0a".repeat(32)),
            &format!("sha256:{}0", "0a".repeat(31)),
            &format!("sha256:{}0", "0a".repeat(32)),
            &format!("sha256:{} ", "0a".repeat(32)),
            &format!("sha256:{}g", "0".repeat(63)),
            "sha256:../../x",
            &format!("sha1:{}", "0a".repeat(20)),
            &format!("sha512:{}", "0a".repeat(64)),
            &format!("sha256+b64:{}", "0a".repeat(32)),
            &format!("sha256:sha256:{}", "0a".repeat(32)),
        ] {
            assert!(bad.parse::<BlobDigest>().is_err(), "{bad:?} must not parse");
        }
    }

    #[test]
    fn j06_sha512_is_refused_where_a_digest_is_parsed() {
        let error = format!("sha512:{}", "0a".repeat(64)).parse::<BlobDigest>().unwrap_err();
        assert!(error.to_string().contains("sha512"), "{error}");
    }

    #[test]
    fn chain_ids_fold_as_the_image_spec_says() {
        let diff = |byte| DiffId::from_bytes([byte; 32]);
        assert_eq!(ChainId::of(&[]), None);
        assert_eq!(ChainId::of(&[diff(1)]).unwrap().as_bytes(), diff(1).as_bytes());
        let two = ChainId::of(&[diff(1), diff(2)]).unwrap();
        let text = format!("{} {}", diff(1), diff(2));
        assert_eq!(two.as_bytes(), BlobDigest::of(text.as_bytes()).as_bytes());
        assert_eq!(ChainId::of(&[diff(1), diff(2), diff(3)]), Some(ChainId::extend(Some(two), diff(3))));
    }

    #[test]
    fn digest_of_known_bytes() {
        assert_eq!(BlobDigest::of(b"abc").hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    }
}
