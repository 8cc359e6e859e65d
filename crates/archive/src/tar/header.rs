//! One 512-byte header block, field by field as Go's archive/tar reads it.

/// Bytes in a block: headers are one, everything else is padded to a multiple.
pub(super) const BLOCK_BYTES: usize = 512;

/// One block.
pub(super) type Block = [u8; BLOCK_BYTES];

/// Bytes that fill up `len` to whole blocks.
pub(super) fn padding(len: u64) -> u64 {
    len.wrapping_neg() % BLOCK_BYTES as u64
}

/// The types of entries and of extension headers.
pub(super) mod type_flag {
    pub(crate) const FILE: u8 = b'0';
    pub(crate) const FILE_OLD: u8 = 0;
    pub(crate) const HARD_LINK: u8 = b'1';
    pub(crate) const SYMLINK: u8 = b'2';
    pub(crate) const CHAR_DEVICE: u8 = b'3';
    pub(crate) const BLOCK_DEVICE: u8 = b'4';
    pub(crate) const DIRECTORY: u8 = b'5';
    pub(crate) const FIFO: u8 = b'6';
    /// "Contiguous file": a plain file to everybody since 1988.
    pub(crate) const CONTIGUOUS: u8 = b'7';
    pub(crate) const GNU_SPARSE: u8 = b'S';
    pub(crate) const PAX: u8 = b'x';
    pub(crate) const PAX_GLOBAL: u8 = b'g';
    pub(crate) const GNU_LONG_NAME: u8 = b'L';
    pub(crate) const GNU_LONG_LINK: u8 = b'K';

    /// Types that have no data, whatever their size field says.
    pub(crate) fn has_no_data(flag: u8) -> bool {
        matches!(flag, HARD_LINK | SYMLINK | CHAR_DEVICE | BLOCK_DEVICE | DIRECTORY | FIFO)
    }
}

/// Which tar wrote a header. It decides what the bytes behind the common fields mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

/// A header block, decoded.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) type_flag: u8,
    pub(super) name: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) mode: i64,
    pub(super) uid: i64,
    pub(super) gid: i64,
    pub(super) size: u64,
    pub(super) mtime: i64,
    pub(super) dev_major: i64,
    pub(super) dev_minor: i64,
    /// Whether the block is GNU's and may carry a sparse map.
    pub(super) is_gnu: bool,
}

impl Header {
    /// Decodes a block that is not all zeros.
    pub(super) fn parse(block: &Block) -> Result<Self, &'static str> {
        let format = format(block)?;
        let field = |at: usize, len: usize| &block[at..at + len];
        let number = |at, len, why| numeric(field(at, len)).ok_or(why);

        let mut header = Self {
            type_flag: block[156],
            name: c_string(field(0, 100)).to_vec(),
            link: c_string(field(157, 100)).to_vec(),
            mode: number(100, 8, "bad mode")?,
            uid: number(108, 8, "bad uid")?,
            gid: number(116, 8, "bad gid")?,
            size: u64::try_from(number(124, 12, "bad size")?).map_err(|_| "negative size")?,
            mtime: number(136, 12, "bad mtime")?,
            dev_major: 0,
            dev_minor: 0,
            is_gnu: format == Format::Gnu,
        };
        if format == Format::V7 {
            return Ok(header);
        }
        header.dev_major = number(329, 8, "bad device number")?;
        header.dev_minor = number(337, 8, "bad device number")?;
        let prefix = match format {
            Format::Ustar => c_string(field(345, 155)),
            Format::Star => {
                number(476, 12, "bad atime")?;
                number(488, 12, "bad ctime")?;
                c_string(field(345, 131))
            }
            // GNU has times here and no prefix. Go before 1.8 wrote one all the same, and early
            // images are full of it; like Go, believe it when the times make no sense.
            Format::Gnu => {
                let nonsense = |at| block[at] != 0 && numeric(field(at, 12)).is_none();
                let prefix = c_string(field(345, 155));
                if (nonsense(345) || nonsense(357)) && prefix.is_ascii() { prefix } else { &[] }
            }
            Format::V7 => &[],
        };
        if !prefix.is_empty() {
            header.name = [prefix, b"/", &header.name].concat();
        }
        Ok(header)
    }
}

/// Verifies the checksum and reads the magic.
pub(super) fn format(block: &Block) -> Result<Format, &'static str> {
    const CHECKSUM: std::ops::Range<usize> = 148..156;
    let all: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    let field: u32 = block[CHECKSUM].iter().map(|byte| u32::from(*byte)).sum();
    // The checksum's own field counts as spaces.
    let unsigned = i64::from(all - field) + 8 * i64::from(b' ');
    let expected = octal(&block[CHECKSUM]).ok_or("bad checksum field")?;
    if expected != unsigned {
        // Sun's tar summed signed bytes.
        let high = |bytes: &[u8]| bytes.iter().filter(|byte| **byte >= 0x80).count() as i64;
        let signed = unsigned - 256 * (high(block) - high(&block[CHECKSUM]));
        if expected != signed {
            return Err("wrong header checksum");
        }
    }
    Ok(match (&block[257..263], &block[263..265], &block[508..512]) {
        (b"ustar\0", _, b"tar\0") => Format::Star,
        (b"ustar\0", _, _) => Format::Ustar,
        (b"ustar ", b" \0", _) => Format::Gnu,
        _ => Format::V7,
    })
}

/// The bytes before the first NUL, if there is one.
pub(super) fn c_string(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|byte| *byte == 0).unwrap_or(field.len())]
}

/// A number in octal digits, or in GNU's base 256: the high bit of the first byte set, the next
/// one the sign, the rest two's complement, big end first. `None` for what is no number or does
/// not fit.
pub(super) fn numeric(field: &[u8]) -> Option<i64> {
    let first = *field.first()?;
    if first & 0x80 == 0 {
        return octal(field);
    }
    // A negative number is read inverted, as -x-1 == !x.
    let inverted = if first & 0x40 != 0 { 0xff } else { 0 };
    let mut value = u64::from((first ^ inverted) & 0x7f);
    for byte in &field[1..] {
        if value >> 56 != 0 {
            return None;
        }
        value = value << 8 | u64::from(byte ^ inverted);
    }
    let value = i64::try_from(value).ok()?;
    Some(if inverted == 0 { value } else { !value })
}

/// Octal digits among spaces and NULs; nothing at all is 0.
fn octal(field: &[u8]) -> Option<i64> {
    let filler = |byte: &u8| matches!(byte, b' ' | 0);
    let Some(start) = field.iter().position(|byte| !filler(byte)) else { return Some(0) };
    let end = field.iter().rposition(|byte| !filler(byte))? + 1;
    c_string(&field[start..end]).iter().try_fold(0_i64, |value, byte| match byte {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(byte - b'0')),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t10_numbers_read_as_in_go() {
        let max = i64::MAX;
        for (field, value) in [
            (&b""[..], None),
            (b"0000644\0", Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"\x00\x00\x00644\0\0", Some(0o644)),
            (b"\0\0\0\0", Some(0)),
            (b"    ", Some(0)),
            (b"77777777", Some(0o7777_7777)),
            (b"644\0junk", Some(0o644)),
            (b"644 junk", None),
            (b"6 4", None),
            (b"648", None),
            (b"-644", None),
            (b"+644", None),
            (b"0x1f", None),
            (b"777777777777777777777", Some(max)),
            (b"1000000000000000000000", None),
            (b"\x80", Some(0)),
            (b"\x80\x01\x02", Some(0x102)),
            (b"\xbf\xff", Some(0x3fff)),
            (b"\xff\xff\xff", Some(-1)),
            (b"\xff\xff\x00", Some(-256)),
            (b"\xc0\x00", Some(-0x4000)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(max)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0", Some(i64::MIN)),
            (b"\xff\xff\xff\xff\x7f\xff\xff\xff\xff\xff\xff\xff", None),
            (b"\x80\0\x01\0\0\0\0\0\0\0\0\0", None),
        ] {
            assert_eq!(numeric(field), value, "{}", field.escape_ascii());
        }
    }

    #[test]
    fn padding_fills_up_to_blocks() {
        for (len, fill) in [(0, 0), (1, 511), (511, 1), (512, 0), (513, 511), (u64::MAX, 1)] {
            assert_eq!(padding(len), fill, "{len}");
        }
    }
}
