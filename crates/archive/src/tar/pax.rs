//! PAX extended headers (POSIX.1-2001, "pax", ustar interchange format).

use std::collections::BTreeMap;

use super::entry::Timestamp;

/// Where a record says an extended attribute: star's way, which is everybody's. libarchive writes
/// each a second time as `LIBARCHIVE.xattr.`, which Go's tools don't read and neither do we.
pub(super) const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// The records of one extended header, last value of each key.
///
/// Keys that decide which bytes go where must not come twice: readers disagree about which counts.
#[derive(Debug, Default)]
pub(super) struct Records(BTreeMap<Vec<u8>, Vec<u8>>);

/// Sparse format 0.0 lists its map as many pairs of records under the same two keys.
const SPARSE_OFFSET: &[u8] = b"GNU.sparse.offset";
const SPARSE_NUMBYTES: &[u8] = b"GNU.sparse.numbytes";
pub(super) const SPARSE_MAP: &str = "GNU.sparse.map";

impl Records {
    /// Parses the payload of an `x` or `g` header.
    pub(super) fn parse(mut rest: &[u8]) -> Result<Self, &'static str> {
        let mut records = BTreeMap::new();
        let mut map = Vec::new();
        let mut numbers = 0_usize;
        while !rest.is_empty() {
            let (key, value) = record(&mut rest)?;
            if key == SPARSE_OFFSET || key == SPARSE_NUMBYTES {
                let expected = if numbers.is_multiple_of(2) { SPARSE_OFFSET } else { SPARSE_NUMBYTES };
                if key != expected || value.contains(&b',') {
                    return Err("PAX sparse map out of order");
                }
                if numbers > 0 {
                    map.push(b',');
                }
                map.extend_from_slice(value);
                numbers += 1;
            } else if records.insert(key.to_vec(), value.to_vec()).is_some() && is_decisive(key) {
                return Err("PAX header with the same key twice");
            }
        }
        if numbers > 0 && records.insert(SPARSE_MAP.as_bytes().to_vec(), map).is_some() {
            return Err("PAX header with two sparse maps");
        }
        Ok(Self(records))
    }

    /// The value under `key`. An empty one takes back the record, in Go's reading.
    pub(super) fn get(&self, key: &str) -> Option<&[u8]> {
        self.0.get(key.as_bytes()).map(Vec::as_slice).filter(|value| !value.is_empty())
    }

    /// The value under `key` as a decimal number.
    pub(super) fn number(&self, key: &str) -> Result<Option<i64>, &'static str> {
        self.get(key).map(|value| decimal(value).ok_or("bad number in a PAX record")).transpose()
    }

    /// The value under `key` as a time.
    pub(super) fn time(&self, key: &str) -> Result<Option<Timestamp>, &'static str> {
        self.get(key).map(|value| timestamp(value).ok_or("bad time in a PAX record")).transpose()
    }

    /// Names and values of the extended attributes, sorted by name. Empty values count.
    pub(super) fn xattrs(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.0
            .range(XATTR_PREFIX.to_vec()..)
            .map_while(|(key, value)| Some((key.strip_prefix(XATTR_PREFIX)?, value.as_slice())))
    }
}

fn is_decisive(key: &[u8]) -> bool {
    matches!(key, b"path" | b"linkpath" | b"size" | b"uid" | b"gid" | b"mtime") || key.starts_with(b"GNU.sparse.")
}

/// Takes one `"<length> <key>=<value>\n"` off the front; the length counts the whole record.
fn record<'a>(rest: &mut &'a [u8]) -> Result<(&'a [u8], &'a [u8]), &'static str> {
    const MALFORMED: &str = "malformed PAX record";
    // 20 digits hold any length; don't search a megabyte for a space.
    let digits = rest.iter().take(21).position(|byte| *byte == b' ').ok_or(MALFORMED)?;
    if !rest[..digits].iter().all(u8::is_ascii_digit) {
        return Err(MALFORMED);
    }
    let len = decimal(&rest[..digits]).and_then(|len| usize::try_from(len).ok()).ok_or(MALFORMED)?;
    // At least a key of one byte, '=' and the newline.
    if len > rest.len() || len < digits + 4 {
        return Err(MALFORMED);
    }
    let (whole, after) = rest.split_at(len);
    let body = whole[digits + 1..].strip_suffix(b"\n").ok_or(MALFORMED)?;
    let equals = body.iter().position(|byte| *byte == b'=').ok_or(MALFORMED)?;
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    if key.is_empty() {
        return Err(MALFORMED);
    }
    // Values of other keys (attributes, most of all) may hold anything.
    let text = matches!(key, b"path" | b"linkpath" | b"uname" | b"gname");
    if key.contains(&0) || (text && value.contains(&0)) {
        return Err("NUL in a PAX record");
    }
    *rest = after;
    Ok((key, value))
}

/// A decimal number with an optional sign, as Go's `strconv.ParseInt` takes it.
pub(super) fn decimal(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Appends one record.
pub(super) fn push_record(out: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    // The length counts its own digits, and one more of them can make it longer by one more.
    let body = key.len() + value.len() + b" =\n".len();
    let mut len = body;
    loop {
        let digits = len.to_string().len();
        if body + digits == len {
            break;
        }
        len = body + digits;
    }
    out.extend_from_slice(format!("{len} ").as_bytes());
    out.extend_from_slice(key);
    out.push(b'=');
    out.extend_from_slice(value);
    out.push(b'\n');
}

/// `[-]seconds[.fraction]`, cut after nine digits of fraction.
fn timestamp(text: &[u8]) -> Option<Timestamp> {
    let (whole, fraction) = match text.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&text[..dot], &text[dot + 1..]),
        None => (text, &[][..]),
    };
    let seconds = decimal(whole)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let nanos = (0..9).fold(0, |nanos, i| nanos * 10 + u32::from(fraction.get(i).map_or(0, |digit| digit - b'0')));
    if nanos > 0 && whole.starts_with(b"-") {
        // -1.25 is two seconds before 1970 and three quarters after that.
        return Some(Timestamp { seconds: seconds.checked_sub(1)?, nanos: 1_000_000_000 - nanos });
    }
    Some(Timestamp { seconds, nanos })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t07_malformed_records_are_refused() {
        for bad in [
            &b"7 a=b\n"[..],
            b"5 a=\n\n",
            b"999 path=x\n",
            b"0 path=x\n",
            b"4 =\n",
            b"5 =b\n",
            b"path=x\n",
            b" 9 path=x\n",
            b"+10 path=x\n",
            b"-10 path=x\n",
            b"0xa path=x\n",
            b"10 path=xy",
            b"10 path=xyz",
            b"9 path=x",
            b"9 path x\n",
            b"9 path=x\n\0",
            b"18446744073709551626 path=x\n",
            b"00000000000000000000000010 path=x\n",
            b"11 path=x\0y\n",
            b"12 uname=x\0\n ",
            b"9 pa\0h=x\n",
        ] {
            assert!(Records::parse(bad).is_err(), "{}", bad.escape_ascii());
        }
    }

    fn encoded(records: &[(&str, &[u8])]) -> Vec<u8> {
        let mut out = Vec::new();
        for (key, value) in records {
            push_record(&mut out, key.as_bytes(), value);
        }
        out
    }

    #[test]
    fn records_read_as_in_go() {
        let attribute = "SCHILY.xattr.user.b";
        let records = Records::parse(&encoded(&[
            ("path", b"a=b\nc"),
            ("linkpath", b""),
            ("comment", b"\0"),
            ("comment", b"2"),
            ("SCHILY.xattr.user.c", b""),
            (attribute, b"\0\n\xff"),
            ("SCHILY.xattrs", b"not one"),
            ("uid", b"-5"),
        ]))
        .unwrap();
        assert_eq!(records.get("path"), Some(&b"a=b\nc"[..]));
        assert_eq!(records.get("linkpath"), None, "an empty value takes the record back");
        assert_eq!(records.get("comment"), Some(&b"2"[..]), "the last one counts");
        assert_eq!(records.number("uid"), Ok(Some(-5)));
        assert!(records.number("path").is_err());
        let attributes: Vec<_> = records.xattrs().collect();
        assert_eq!(attributes, [(&b"user.b"[..], &b"\0\n\xff"[..]), (b"user.c", b"")]);
        assert_eq!(Records::parse(b"07 c=d\n").unwrap().get("c"), Some(&b"d"[..]), "as Go takes leading zeros");
    }

    #[test]
    fn record_lengths_count_themselves() {
        for len in [1, 90, 91, 92, 93, 94, 95, 96, 985, 990, 995, 10_000] {
            let value = vec![b'v'; len];
            let out = encoded(&[("k", &value)]);
            assert_eq!(Records::parse(&out).unwrap().get("k"), Some(&value[..]), "{len}");
        }
    }

    #[test]
    fn t06_decisive_keys_come_once() {
        for key in ["path", "linkpath", "size", "uid", "mtime", "GNU.sparse.name", "GNU.sparse.map"] {
            assert!(Records::parse(&encoded(&[(key, b"1")])).is_ok(), "{key}");
            assert!(Records::parse(&encoded(&[(key, b"1"), ("x", b""), (key, b"1")])).is_err(), "{key}");
        }
    }

    #[test]
    fn sparse_0_0_pairs_become_a_map() {
        let (offset, bytes) = ("GNU.sparse.offset", "GNU.sparse.numbytes");
        let good = encoded(&[(offset, b"0"), (bytes, b"5"), (offset, b"10"), (bytes, b"1")]);
        assert_eq!(Records::parse(&good).unwrap().get(SPARSE_MAP), Some(&b"0,5,10,1"[..]));
        for bad in [
            encoded(&[(bytes, b"5"), (offset, b"0")]),
            encoded(&[(offset, b"0"), (offset, b"0")]),
            encoded(&[(offset, b"0,5")]),
            encoded(&[(offset, b"0"), (bytes, b"5"), (SPARSE_MAP, b"0,5")]),
        ] {
            assert!(Records::parse(&bad).is_err(), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn m09_times_read_as_in_go() {
        let at = |seconds, nanos| Some(Timestamp { seconds, nanos });
        for (text, time) in [
            ("0", at(0, 0)),
            ("1350244992.023960108", at(1_350_244_992, 23_960_108)),
            ("1350244992.0239601089999", at(1_350_244_992, 23_960_108)),
            ("1350244992.3", at(1_350_244_992, 300_000_000)),
            ("5.", at(5, 0)),
            ("+5", at(5, 0)),
            ("-0.5", at(-1, 500_000_000)),
            ("-1.25", at(-2, 750_000_000)),
            ("-1.0", at(-1, 0)),
            ("-100000000000", at(-100_000_000_000, 0)),
            ("9223372036854775807.999999999", at(i64::MAX, 999_999_999)),
            ("-9223372036854775808", at(i64::MIN, 0)),
            ("-9223372036854775808.1", None),
            ("100000000000000000000", None),
            ("", None),
            (".5", None),
            ("NaN", None),
            ("1e5", None),
            ("1.5.5", None),
            ("1.-5", None),
            (" 1", None),
            ("1.5 ", None),
        ] {
            assert_eq!(timestamp(text.as_bytes()), time, "{text:?}");
        }
    }
}
