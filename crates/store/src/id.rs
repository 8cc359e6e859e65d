use std::fmt;
use std::str::FromStr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use plies_oci::{BlobDigest, ErrorKind};
use serde::{Deserialize, Serialize};

use crate::catalogue::{Key, KeyReader};

/// A string that is not an id of the named kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {what} id, expected {digits} lower-case hex digits")]
pub struct IdError {
    text: String,
    what: &'static str,
    digits: usize,
}

impl IdError {
    /// Always [`ErrorKind::InvalidInput`].
    pub fn kind(&self) -> ErrorKind {
        ErrorKind::InvalidInput
    }
}

fn parse_hex<const N: usize>(text: &str, what: &'static str) -> Result<[u8; N], IdError> {
    let error = || IdError { text: text.chars().take(100).collect(), what, digits: N * 2 };
    if text.len() != N * 2 || !text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(error());
    }
    let mut bytes = [0; N];
    for (at, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[at * 2..at * 2 + 2], 16).map_err(|_| error())?;
    }
    Ok(bytes)
}

macro_rules! id_newtype {
    ($(#[$doc:meta])* $name:ident, $len:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name([u8; $len]);

        impl $name {
            pub(crate) const fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }

            /// The bytes.
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                parse_hex(text, $what).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                if serializer.is_human_readable() {
                    serializer.collect_str(self)
                } else {
                    self.0.serialize(serializer)
                }
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                if deserializer.is_human_readable() {
                    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
                } else {
                    <[u8; $len]>::deserialize(deserializer).map(Self)
                }
            }
        }

        impl Key for $name {
            fn encode(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.0);
            }

            fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
                input.array().map(Self)
            }
        }
    };
}

id_newtype! {
    /// A layer in this store. Never reused, and says nothing about the content: that is the
    /// diff ID, which a layer may get later or never.
    LayerId, 8, "layer"
}
id_newtype! {
    /// A snapshot: derived from the list of its layers, so that the same list has the same id.
    SnapshotId, 16, "snapshot"
}
id_newtype! {
    /// A stack with a writable upper directory. Never reused.
    ActiveId, 8, "active"
}
id_newtype! {
    /// A lease. Never reused.
    LeaseId, 8, "lease"
}

/// What can be held by a lease or an owner, and what edges lead from and to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Resource {
    /// A blob in the content directory.
    Blob(BlobDigest),
    /// A layer's directory.
    Layer(LayerId),
    /// A list of layers.
    Snapshot(SnapshotId),
    /// An upper directory.
    Active(ActiveId),
}

impl fmt::Display for Resource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Resource::Blob(digest) => write!(f, "blob {digest}"),
            Resource::Layer(id) => write!(f, "layer {id}"),
            Resource::Snapshot(id) => write!(f, "snapshot {id}"),
            Resource::Active(id) => write!(f, "active {id}"),
        }
    }
}

impl From<BlobDigest> for Resource {
    fn from(digest: BlobDigest) -> Self {
        Resource::Blob(digest)
    }
}

impl From<LayerId> for Resource {
    fn from(id: LayerId) -> Self {
        Resource::Layer(id)
    }
}

impl From<SnapshotId> for Resource {
    fn from(id: SnapshotId) -> Self {
        Resource::Snapshot(id)
    }
}

impl From<ActiveId> for Resource {
    fn from(id: ActiveId) -> Self {
        Resource::Active(id)
    }
}

impl Key for Resource {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Resource::Blob(digest) => (1u8, *digest).encode(out),
            Resource::Layer(id) => (2u8, *id).encode(out),
            Resource::Snapshot(id) => (3u8, *id).encode(out),
            Resource::Active(id) => (4u8, *id).encode(out),
        }
    }

    fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
        Some(match u8::decode(input)? {
            1 => Resource::Blob(Key::decode(input)?),
            2 => Resource::Layer(Key::decode(input)?),
            3 => Resource::Snapshot(Key::decode(input)?),
            4 => Resource::Active(Key::decode(input)?),
            _ => return None,
        })
    }
}

/// Whose permanent hold it is, by convention `kind:name`: `image:sha256:…`, `cache:<record>`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Owner(String);

impl Owner {
    /// Names an owner.
    pub fn new(kind: &str, name: impl fmt::Display) -> Self {
        debug_assert!(
            !kind.is_empty() && !kind.contains(':'),
            "a kind is a plain word, so that kinds cannot run together"
        );
        Self(format!("{kind}:{name}"))
    }

    /// The whole name, `kind:name`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Key for Owner {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
    }

    fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
        String::decode(input).map(Self)
    }
}

/// A moment as rows keep it: microseconds since 1970-01-01T00:00:00Z, by the injected clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Stamp(u64);

impl Stamp {
    /// From a count of microseconds.
    pub const fn from_micros(micros: u64) -> Self {
        Self(micros)
    }

    /// The count of microseconds.
    pub const fn as_micros(self) -> u64 {
        self.0
    }

    /// This moment and `after` more; saturates, so "for ever" can be added.
    #[must_use]
    pub fn plus(self, after: Duration) -> Self {
        Self(self.0.saturating_add(u64::try_from(after.as_micros()).unwrap_or(u64::MAX)))
    }

    /// How long after `earlier` this is; zero if the clock was turned back in between.
    pub fn since(self, earlier: Stamp) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// Times before 1970 become 1970.
impl From<SystemTime> for Stamp {
    fn from(time: SystemTime) -> Self {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }
}

impl From<Stamp> for SystemTime {
    fn from(stamp: Stamp) -> Self {
        UNIX_EPOCH + Duration::from_micros(stamp.0)
    }
}

impl Key for Stamp {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
    }

    fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
        u64::decode(input).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_parse_what_they_print_and_nothing_else() {
        let id = LayerId::from_bytes([0, 1, 2, 3, 4, 5, 6, 0xfe]);
        assert_eq!(id.to_string(), "00010203040506fe");
        assert_eq!(id.to_string().parse::<LayerId>(), Ok(id));
        for bad in ["", "../../../../x", "00010203040506FE", "00010203040506f", "00010203040506fe0", "+0010203040506fe"]
        {
            assert!(bad.parse::<LayerId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_stamp_survives_clocks_out_of_range() {
        assert_eq!(Stamp::from(UNIX_EPOCH - Duration::from_secs(1)), Stamp::from_micros(0));
        assert_eq!(Stamp::from_micros(5).plus(Duration::MAX), Stamp::from_micros(u64::MAX));
        assert_eq!(Stamp::from_micros(5).since(Stamp::from_micros(9)), Duration::ZERO);
    }
}
