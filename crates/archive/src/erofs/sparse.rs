//! Sparse files, cut into chunks that are holes, or lie in the tar as they are, or have to be copied.

use std::io::Read;

use super::BLOCK_BYTES;
use crate::tar::{Reader, SparseRun, TarError};

/// Chunks are 2^9 to 2^40 bytes: five bits on disk say by how much they are larger than a block of 512.
pub(super) const CHUNK_BITS_MIN: u32 = BLOCK_BYTES.trailing_zeros();
pub(super) const CHUNK_BITS_MAX: u32 = CHUNK_BITS_MIN + 31;

/// Bytes that a chunk takes in the index: an entry in the file's table.
const ENTRY_BYTES: u64 = 8;

/// Where one chunk's bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Chunk {
    Hole,
    /// In the tar, from this block on.
    Stored(u32),
    /// Among what was copied, from this block on.
    Copied(u32),
}

/// A file in chunks of equal size; the last may be shorter.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Chunks {
    pub(super) bits: u32,
    pub(super) list: Vec<Chunk>,
}

/// How a sparse file is cut.
#[derive(Debug)]
pub(super) struct Plan {
    size_bytes: u64,
    /// Where the data begins in the tar.
    position: u64,
    /// In order, none next to another.
    runs: Vec<SparseRun>,
    bits: u32,
    cost_bytes: u64,
}

impl Plan {
    /// Cuts so that the index gets as small as it can.
    pub(super) fn new(size_bytes: u64, runs: &[SparseRun], position: u64) -> Self {
        let mut joined: Vec<SparseRun> = Vec::new();
        for run in runs {
            match joined.last_mut() {
                // What is next to each other in the file is so in the archive.
                Some(last) if last.offset + last.length == run.offset => last.length += run.length,
                _ => joined.push(*run),
            }
        }
        let mut plan = Self { size_bytes, position, runs: joined, bits: 0, cost_bytes: u64::MAX };
        for bits in (CHUNK_BITS_MIN..=CHUNK_BITS_MAX).rev() {
            let cost = plan.cost_of(bits);
            if cost < plan.cost_bytes {
                (plan.bits, plan.cost_bytes) = (bits, cost);
            }
        }
        plan
    }

    /// Bytes that the file takes in the index.
    pub(super) fn cost_bytes(&self) -> u64 {
        self.cost_bytes
    }

    /// Of each run: where it begins in the file, where it ends, and where it begins in the tar.
    fn runs(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        self.runs.iter().scan(self.position, |stored, run| {
            let begins = *stored;
            *stored += run.length;
            Some((run.offset, run.offset + run.length, begins))
        })
    }

    /// The chunks that lie whole in a run, and with their blocks in the tar's: of a run from `begins` to `ends`.
    fn whole(&self, bits: u32, begins: u64, ends: u64, stored: u64) -> std::ops::Range<u64> {
        let first = begins.div_ceil(1 << bits);
        let last = if ends == self.size_bytes { ends.div_ceil(1 << bits) } else { ends >> bits };
        if stored % BLOCK_BYTES == begins % BLOCK_BYTES && first < last { first..last } else { first..first }
    }

    fn cost_of(&self, bits: u32) -> u64 {
        let mut copied = 0_u64;
        let mut next = 0;
        for (begins, ends, stored) in self.runs() {
            let whole = self.whole(bits, begins, ends, stored);
            let touched = (begins >> bits).max(next)..ends.div_ceil(1 << bits);
            next = next.max(touched.end);
            copied += touched.end.saturating_sub(touched.start) - (whole.end - whole.start);
        }
        let entries = self.size_bytes.div_ceil(1 << bits).saturating_mul(ENTRY_BYTES);
        let copied_bytes = copied.saturating_mul((1 << bits).min(self.size_bytes.next_multiple_of(BLOCK_BYTES)));
        entries.saturating_add(copied_bytes)
    }

    /// Makes the chunks; reads the file's data and copies what has to be to the end of `copied`.
    pub(super) fn carry_out<R: Read>(self, reader: &mut Reader<R>, copied: &mut Vec<u8>) -> Result<Chunks, TarError> {
        let bits = self.bits;
        let chunk_bytes = 1_u64 << bits;
        let mut list = vec![Chunk::Hole; usize_of(self.size_bytes.div_ceil(chunk_bytes))];
        let block_of = |bytes: u64| u32::try_from(bytes / BLOCK_BYTES).expect("because positions were compared before");
        for (begins, ends, stored) in self.runs() {
            let whole = self.whole(bits, begins, ends, stored);
            for chunk in begins >> bits..ends.div_ceil(chunk_bytes) {
                let place = &mut list[usize_of(chunk)];
                if whole.contains(&chunk) {
                    *place = Chunk::Stored(block_of(stored + (chunk << bits) - begins));
                } else if *place == Chunk::Hole {
                    *place = Chunk::Copied(block_of(copied.len() as u64));
                    let length = chunk_bytes.min((self.size_bytes - (chunk << bits)).next_multiple_of(BLOCK_BYTES));
                    copied.resize(copied.len() + usize_of(length), 0);
                }
            }
            let mut at = begins;
            while at < ends {
                let bytes = reader.data()?;
                let n = (bytes.len() as u64).min(ends - at).min(chunk_bytes - at % chunk_bytes);
                if let Chunk::Copied(block) = list[usize_of(at >> bits)] {
                    let to = usize_of(u64::from(block) * BLOCK_BYTES + at % chunk_bytes);
                    copied[to..to + usize_of(n)].copy_from_slice(&bytes[..usize_of(n)]);
                }
                reader.consume(usize_of(n));
                at += n;
            }
        }
        Ok(Chunks { bits, list })
    }
}

/// Of a number that was compared with what may be held in memory.
fn usize_of(number: u64) -> usize {
    usize::try_from(number).expect("because what is held in memory is bounded")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(list: &[(u64, u64)]) -> Vec<SparseRun> {
        list.iter().map(|(offset, length)| SparseRun { offset: *offset, length: *length }).collect()
    }

    #[test]
    fn a_file_is_cut_where_the_index_stays_smallest() {
        for (size, list, position, bits, cost) in [
            // A hole alone, and an empty file.
            (1 << 30, &[][..], 512, 30, 8),
            (0, &[], 512, 40, 0),
            // Data to the end: one chunk, or one for each half.
            (3000, &[(0, 3000)], 512, 12, 8),
            (8192, &[(4096, 4096)], 512, 12, 16),
            (5000, &[(4096, 904)], 512, 12, 16),
            // Adjacent runs are one.
            (4096, &[(0, 1000), (1000, 3096)], 512, 12, 8),
            // Two chunks of 512 bytes to copy, or four entries.
            (2048, &[(0, 512)], 512, 9, 32),
            // Data that lies askew in the tar is copied.
            (1024, &[(100, 924)], 512, 10, 8 + 1024),
        ] {
            let plan = Plan::new(size, &runs(list), position);
            let largest = |bits: u32| (bits..=CHUNK_BITS_MAX).rev().find(|bits| plan.cost_of(*bits) == cost);
            assert_eq!(plan.cost_bytes, cost, "{size} {list:?}");
            assert_eq!(Some(plan.bits), largest(bits), "{size} {list:?}");
        }
    }

    #[test]
    fn a_run_far_out_costs_little() {
        let plan = Plan::new(64 << 30, &runs(&[(12_345 * 512, 512)]), 1024);
        assert!(plan.cost_bytes < 2 << 20, "{plan:?}");
    }
}
