use std::fmt;

use plies_store::{Key, KeyReader};
use serde::{Deserialize, Serialize};

/// Names a record: 16 random bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct RecordId([u8; 16]);

impl RecordId {
    /// Digits of a whole ID.
    pub const DIGITS: usize = 32;

    /// Wraps random bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// A fresh one.
    pub(crate) fn random() -> std::io::Result<Self> {
        let mut bytes = [0; 16];
        // 16 bytes are never cut short (random(4)): up to 256 come whole or not at all.
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        Ok(Self(bytes))
    }

    /// The ID that is written so; `None` if it is not a whole one.
    pub fn parse(text: &str) -> Option<Self> {
        Self::lowest_with(text).filter(|_| text.len() == Self::DIGITS)
    }

    /// The lowest ID that begins with these hex digits, and the number of digits; `None` if they are none.
    pub(crate) fn lowest_with(prefix: &str) -> Option<Self> {
        if prefix.is_empty()
            || prefix.len() > Self::DIGITS
            || !prefix.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'))
        {
            return None;
        }
        let padded = format!("{prefix:0<32}");
        u128::from_str_radix(&padded, 16).ok().map(|bits| Self(bits.to_be_bytes()))
    }
}

impl fmt::Display for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for RecordId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RecordId({self})")
    }
}

impl Key for RecordId {
    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }

    fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
        input.array().map(Self)
    }
}
