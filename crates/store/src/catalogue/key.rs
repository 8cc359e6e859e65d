use plies_oci::{BlobDigest, ChainId, DiffId, ImageId};

/// A key whose encoded bytes sort as the key does, and delimit themselves, so that tuples of keys
/// are keys and the first component of a tuple is a prefix to scan by.
pub trait Key: Sized {
    /// Appends the bytes.
    fn encode(&self, out: &mut Vec<u8>);

    /// Takes the bytes back; `None` if they are no such key.
    fn decode(input: &mut KeyReader<'_>) -> Option<Self>;

    /// The bytes alone.
    fn to_bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(48);
        self.encode(&mut out);
        out
    }
}

/// `Self` is a leading part of the key `K`: what a scan may be narrowed to.
pub trait PrefixOf<K>: Key {}

/// The bytes of a key while it is being decoded.
#[derive(Debug)]
pub struct KeyReader<'a>(&'a [u8]);

impl<'a> KeyReader<'a> {
    pub(crate) fn decode_all<K: Key>(bytes: &'a [u8]) -> Option<K> {
        let mut reader = Self(bytes);
        let key = K::decode(&mut reader)?;
        reader.0.is_empty().then_some(key)
    }

    /// Takes exactly `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }
}

macro_rules! integer_key {
    ($($int:ty),*) => {$(
        /// Big-endian, so that bytes sort as numbers do.
        impl Key for $int {
            fn encode(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(&self.to_be_bytes());
            }

            fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
                input.array().map(Self::from_be_bytes)
            }
        }
    )*};
}
integer_key!(u8, u32, u64);

macro_rules! digest_key {
    ($($digest:ty),*) => {$(
        impl Key for $digest {
            fn encode(&self, out: &mut Vec<u8>) {
                out.extend_from_slice(self.as_bytes());
            }

            fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
                input.array().map(Self::from_bytes)
            }
        }
    )*};
}
digest_key!(BlobDigest, DiffId, ChainId, ImageId);

/// `00` in the text becomes `00 ff`, and `00 01` ends it: shorter texts sort first, whatever follows.
impl Key for Vec<u8> {
    fn encode(&self, out: &mut Vec<u8>) {
        encode_delimited(self, out);
    }

    fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
        let mut text = Vec::new();
        loop {
            match input.array::<1>()? {
                [0] => match input.array::<1>()? {
                    [0xff] => text.push(0),
                    [0x01] => return Some(text),
                    _ => return None,
                },
                [byte] => text.push(byte),
            }
        }
    }
}

fn encode_delimited(text: &[u8], out: &mut Vec<u8>) {
    for byte in text {
        out.push(*byte);
        if *byte == 0 {
            out.push(0xff);
        }
    }
    out.extend_from_slice(&[0x00, 0x01]);
}

/// As the bytes of its UTF-8.
impl Key for String {
    fn encode(&self, out: &mut Vec<u8>) {
        encode_delimited(self.as_bytes(), out);
    }

    fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
        String::from_utf8(Vec::decode(input)?).ok()
    }
}

impl<A: Key, B: Key> Key for (A, B) {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
        self.1.encode(out);
    }

    fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
        Some((A::decode(input)?, B::decode(input)?))
    }
}

impl<A: Key, B: Key, C: Key> Key for (A, B, C) {
    fn encode(&self, out: &mut Vec<u8>) {
        self.0.encode(out);
        self.1.encode(out);
        self.2.encode(out);
    }

    fn decode(input: &mut KeyReader<'_>) -> Option<Self> {
        Some((A::decode(input)?, B::decode(input)?, C::decode(input)?))
    }
}

impl<A: Key, B: Key> PrefixOf<(A, B)> for A {}
impl<A: Key, B: Key, C: Key> PrefixOf<(A, B, C)> for A {}
impl<A: Key, B: Key, C: Key> PrefixOf<(A, B, C)> for (A, B) {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn keys_round_trip_and_sort_as_their_bytes(
            a in (any::<Vec<u8>>(), any::<u64>()),
            b in (any::<Vec<u8>>(), any::<u64>()),
        ) {
            prop_assert_eq!(KeyReader::decode_all::<(Vec<u8>, u64)>(&a.to_bytes()), Some(a.clone()));
            prop_assert_eq!(a.cmp(&b), a.to_bytes().cmp(&b.to_bytes()));
        }

        #[test]
        fn no_bytes_make_a_key_decoder_panic(bytes in any::<Vec<u8>>()) {
            let _ = KeyReader::decode_all::<(String, Vec<u8>, u32)>(&bytes);
        }
    }

    #[test]
    fn a_text_is_no_prefix_of_a_longer_one() {
        let (short, long) = ("ab".to_owned().to_bytes(), ("abc".to_owned(), 7u8).to_bytes());
        assert!(!long.starts_with(&short));
        assert_eq!(KeyReader::decode_all::<String>(&[b'a', 0, 1, b'x']), None, "trailing bytes are refused");
    }
}
