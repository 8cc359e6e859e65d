//! Sparse maps: which parts of a file an archive holds.
//!
//! Four encodings are in use, all GNU's: in the header and extension blocks behind it (type `S`),
//! in PAX records (0.0 and 0.1), and in front of the data (1.0). All become a list of runs.

use super::entry::SparseRun;
use super::header::{BLOCK_BYTES, Block, numeric};
use super::pax::{Records, SPARSE_MAP, decimal};

/// Collects runs and refuses what Go refuses: negative, unordered, overlapping, past the end.
#[derive(Debug, Default)]
pub(super) struct MapBuilder {
    runs: Vec<SparseRun>,
    end: u64,
    stored: u64,
}

impl MapBuilder {
    pub(super) fn push(&mut self, offset: i64, length: i64) -> Result<(), &'static str> {
        let bad = |_| "negative number in a sparse map";
        let (offset, length) = (u64::try_from(offset).map_err(bad)?, u64::try_from(length).map_err(bad)?);
        // Neither sum overflows: both were signed.
        if offset < self.end || offset + length > i64::MAX as u64 {
            return Err("sparse map out of order");
        }
        self.end = offset + length;
        // Writers end a map with an empty run at the end of the file.
        if length > 0 {
            self.stored = self.stored.checked_add(length).ok_or("sparse map too large")?;
            self.runs.push(SparseRun { offset, length });
        }
        Ok(())
    }

    /// The runs, which must lie within the file and account for every stored byte.
    pub(super) fn finish(self, size_bytes: u64, stored_bytes: u64) -> Result<Vec<SparseRun>, &'static str> {
        if self.end > size_bytes {
            return Err("sparse map leads past the end of the file");
        }
        if self.stored != stored_bytes {
            return Err("sparse map does not account for the stored bytes");
        }
        Ok(self.runs)
    }
}

/// Old GNU format: 4 entries in the header, 21 in every extension block.
pub(super) const OLD_GNU_IN_HEADER: (usize, usize) = (386, 4);
pub(super) const OLD_GNU_IN_EXTENSION: (usize, usize) = (0, 21);

/// Reads the entries at `(start, count)` of a block; returns whether another block follows.
pub(super) fn old_gnu_entries(
    block: &Block,
    (start, count): (usize, usize),
    map: &mut MapBuilder,
) -> Result<bool, &'static str> {
    let (entries, rest) = block[start..].split_at(count * 24);
    for entry in entries.chunks_exact(24) {
        let (offset, length) = entry.split_at(12);
        // An unused entry begins with NUL, to GNU tar and to everybody after it.
        if offset[0] == 0 {
            break;
        }
        let number = |field| numeric(field).ok_or("bad number in a sparse map");
        map.push(number(offset)?, number(length)?)?;
    }
    Ok(rest[0] > 0)
}

/// The file's length in an old GNU header.
pub(super) fn old_gnu_size(block: &Block) -> Result<u64, &'static str> {
    numeric(&block[483..495]).and_then(|size| u64::try_from(size).ok()).ok_or("bad length of a sparse file")
}

/// Where a PAX header says that the map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PaxMap {
    /// 0.0 and 0.1.
    InRecords,
    /// 1.0.
    InData,
}

/// Whether a PAX header makes its file sparse.
///
/// Go takes the data of versions that it does not know for the file itself; we refuse those.
pub(super) fn pax_map(records: &Records) -> Result<Option<PaxMap>, &'static str> {
    match (records.get("GNU.sparse.major"), records.get("GNU.sparse.minor")) {
        (Some(b"0"), Some(b"0" | b"1")) => Ok(Some(PaxMap::InRecords)),
        (Some(b"1"), Some(b"0")) => Ok(Some(PaxMap::InData)),
        (None, None) => Ok(records.get(SPARSE_MAP).map(|_| PaxMap::InRecords)),
        _ => Err("unknown version of the sparse format"),
    }
}

/// The map of versions 0.0 and 0.1.
pub(super) fn map_in_records(records: &Records) -> Result<MapBuilder, &'static str> {
    const BAD: &str = "malformed sparse map in a PAX header";
    let count = records.number("GNU.sparse.numblocks")?.and_then(|count| usize::try_from(count).ok()).ok_or(BAD)?;
    let mut map = MapBuilder::default();
    let mut numbers = records.get(SPARSE_MAP).into_iter().flat_map(|map| map.split(|byte| *byte == b','));
    let mut runs = 0_usize;
    while let Some(offset) = numbers.next() {
        let length = numbers.next().ok_or(BAD)?;
        map.push(decimal(offset).ok_or(BAD)?, decimal(length).ok_or(BAD)?)?;
        runs += 1;
    }
    if runs == count { Ok(map) } else { Err(BAD) }
}

/// Parses the map of version 1.0 block by block: the number of runs, then offset and length of
/// each, all in decimal and each ended by a newline. The data begins with the next block.
#[derive(Debug, Default)]
pub(super) struct DataMapParser {
    token: Vec<u8>,
    runs_left: Option<i64>,
    offset: Option<i64>,
    map: MapBuilder,
}

impl DataMapParser {
    /// Takes one more block; returns whether the map is complete.
    pub(super) fn block(&mut self, block: &[u8; BLOCK_BYTES]) -> Result<bool, &'static str> {
        const BAD: &str = "malformed sparse map";
        for byte in block {
            if *byte != b'\n' {
                // The longest number has 19 digits and a sign; leading zeros get some room.
                if self.token.len() == 40 {
                    return Err(BAD);
                }
                self.token.push(*byte);
                continue;
            }
            let number = decimal(&self.token).ok_or(BAD)?;
            self.token.clear();
            match (self.runs_left, self.offset.take()) {
                (None, _) if number < 0 => return Err(BAD),
                (None, _) => self.runs_left = Some(number),
                (Some(_), None) => self.offset = Some(number),
                (Some(left), Some(offset)) => {
                    self.map.push(offset, number)?;
                    self.runs_left = Some(left - 1);
                }
            }
            if self.runs_left == Some(0) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    pub(super) fn into_map(self) -> MapBuilder {
        self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn t15_maps_are_ordered_and_account_for_all_bytes() {
        let check = |runs: &[(i64, i64)], size, stored| {
            let mut map = MapBuilder::default();
            runs.iter().try_for_each(|(offset, length)| map.push(*offset, *length))?;
            map.finish(size, stored).map(|runs| runs.len())
        };
        let max = i64::MAX;
        for (runs, size, stored, result) in [
            (&[][..], 0, 0, Some(0)),
            (&[], 10, 0, Some(0)),
            (&[(0, 5)], 10, 5, Some(1)),
            (&[(0, 5), (5, 5)], 10, 10, Some(2)),
            (&[(0, 5), (10, 0)], 10, 5, Some(1)),
            (&[(3, 0), (3, 0), (5, 5)], 10, 5, Some(1)),
            (&[(0, 5)], 10, 4, None),
            (&[(0, 5)], 10, 6, None),
            (&[(0, 5)], 4, 5, None),
            (&[(5, 5), (0, 5)], 10, 10, None),
            (&[(0, 5), (4, 5)], 10, 10, None),
            (&[(-1, 5)], 10, 5, None),
            (&[(0, -5)], 10, 5, None),
            (&[(max, 1)], u64::MAX, 1, None),
            (&[(1, max)], u64::MAX, max as u64, None),
            (&[(11, 0)], 10, 0, None),
        ] {
            assert_eq!(check(runs, size, stored).ok(), result, "{runs:?} in {size}, {stored} stored");
        }
    }

    #[test]
    fn t15_maps_in_data_are_parsed_block_by_block() {
        let parse = |text: &[u8]| {
            let mut parser = DataMapParser::default();
            for chunk in text.chunks(BLOCK_BYTES) {
                let mut block = [0; BLOCK_BYTES];
                block[..chunk.len()].copy_from_slice(chunk);
                if parser.block(&block).ok()? {
                    return Some(parser.into_map().runs.len());
                }
            }
            None
        };
        assert_eq!(parse(b"0\n"), Some(0));
        assert_eq!(parse(b"1\n0\n5\nrubbish"), Some(1));
        let long: String = (0..500).map(|i| format!("{}\n1\n", 2 * i)).collect();
        assert_eq!(parse(format!("500\n{long}").as_bytes()), Some(500));
        for bad in [&b""[..], b"1\n0\n", b"-1\n", b"\n", b"x\n", b"1\n0\n0x5\n", b"1\n\n5\n", &[b'1'; 600]] {
            assert_eq!(parse(bad), None, "{}", bad.escape_ascii());
        }
    }
}
