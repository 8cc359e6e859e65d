//! One gzip member, made by many threads.
//!
//! The input is cut into blocks of [`BLOCK_BYTES`]. Each is deflated by itself, primed with the
//! 32 KiB before it, and ends on a byte boundary (a sync flush), so that the pieces simply follow
//! one another. What comes out depends on the input and the level, never on the threads.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, Write};
use std::mem;
use std::num::NonZeroUsize;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use flate2::{Compress, Compression as Level, Crc, FlushCompress, Status};

/// Input bytes deflated as one piece. Priming makes the loss against one long stream about 5 bytes
/// a block; 1 MiB keeps that unmeasurable and a few blocks per thread small in memory.
const BLOCK_BYTES: usize = 1 << 20;
/// Deflate's window (RFC 1951): no match reaches further back.
const WINDOW_BYTES: usize = 32 << 10;
/// RFC 1952: deflate, no flags, no time, no extra flags, unknown system. Nothing here depends on
/// where or when it was written.
const HEADER: [u8; 10] = [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255];

struct Job {
    input: Vec<u8>,
    dictionary: Vec<u8>,
    last: bool,
    done: SyncSender<Piece>,
}

struct Piece {
    deflated: Vec<u8>,
    crc: Crc,
    /// The job's buffer, to be used again.
    input: Vec<u8>,
}

/// Writes one gzip member with several threads. Nothing is complete before [`ParallelGzip::finish`];
/// dropping it instead leaves a cut stream, which every reader refuses.
pub struct ParallelGzip<W> {
    out: W,
    header_written: bool,
    input: Vec<u8>,
    dictionary: Vec<u8>,
    spare: Vec<Vec<u8>>,
    /// Pieces being deflated, in the order of the output.
    pending: VecDeque<Receiver<Piece>>,
    pending_max: usize,
    crc: Crc,
    jobs: Option<Sender<Job>>,
    workers: Vec<JoinHandle<()>>,
}

impl<W: Write> ParallelGzip<W> {
    /// Compresses into `out` at `level` (0 to 9) with `threads` threads besides the caller's, which
    /// only copies and writes.
    pub fn new(out: W, level: u32, threads: NonZeroUsize) -> Self {
        let (jobs, queue) = channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let workers = (0..threads.get())
            .map(|_| {
                let queue = Arc::clone(&queue);
                std::thread::spawn(move || work(&queue, Level::new(level.min(9))))
            })
            .collect();
        Self {
            out,
            header_written: false,
            input: Vec::with_capacity(BLOCK_BYTES),
            dictionary: Vec::new(),
            spare: Vec::new(),
            pending: VecDeque::new(),
            // One in work and one waiting for each thread.
            pending_max: threads.get().saturating_mul(2),
            crc: Crc::new(),
            jobs: Some(jobs),
            workers,
        }
    }

    fn dispatch(&mut self, last: bool) -> io::Result<()> {
        while self.pending.len() >= self.pending_max {
            self.write_next()?;
        }
        let next = self.spare.pop().unwrap_or_else(|| Vec::with_capacity(BLOCK_BYTES));
        let input = mem::replace(&mut self.input, next);
        let tail = input[input.len().saturating_sub(WINDOW_BYTES)..].to_vec();
        let dictionary = mem::replace(&mut self.dictionary, tail);
        let (done, piece) = sync_channel(1);
        self.jobs
            .as_ref()
            .and_then(|jobs| jobs.send(Job { input, dictionary, last, done }).ok())
            .ok_or_else(|| io::Error::other("the compression threads are gone"))?;
        self.pending.push_back(piece);
        Ok(())
    }

    /// Waits for the oldest piece and writes it.
    fn write_next(&mut self) -> io::Result<()> {
        let Some(piece) = self.pending.pop_front() else { return Ok(()) };
        let mut piece = piece.recv().map_err(|_| io::Error::other("a compression thread panicked"))?;
        if !self.header_written {
            self.out.write_all(&HEADER)?;
            self.header_written = true;
        }
        self.out.write_all(&piece.deflated)?;
        self.crc.combine(&piece.crc);
        piece.input.clear();
        self.spare.push(piece.input);
        Ok(())
    }

    /// Completes the member and gives the output back, not flushed.
    ///
    /// # Errors
    /// Those of the output.
    pub fn finish(mut self) -> io::Result<W> {
        self.dispatch(true)?;
        while !self.pending.is_empty() {
            self.write_next()?;
        }
        self.out.write_all(&self.crc.sum().to_le_bytes())?;
        // The length modulo 2^32, as the format wants.
        self.out.write_all(&self.crc.amount().to_le_bytes())?;
        self.jobs = None;
        for worker in mem::take(&mut self.workers) {
            worker.join().map_err(|_| io::Error::other("a compression thread panicked"))?;
        }
        Ok(self.out)
    }
}

impl<W: Write> Write for ParallelGzip<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        if self.input.len() == BLOCK_BYTES {
            self.dispatch(false)?;
        }
        let n = buf.len().min(BLOCK_BYTES - self.input.len());
        self.input.extend_from_slice(&buf[..n]);
        Ok(n)
    }

    /// Flushes the output only: where a piece ends must depend on the input alone.
    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

impl<W> fmt::Debug for ParallelGzip<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ParallelGzip").field("threads", &self.workers.len()).finish_non_exhaustive()
    }
}

fn work(queue: &Mutex<Receiver<Job>>, level: Level) {
    loop {
        // The lock is held while waiting: whoever has it gets the next job. A panicked worker
        // leaves nothing half done behind it.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { input, dictionary, last, done }) = job else { return };
        let mut crc = Crc::new();
        crc.update(&input);
        let deflated = deflate_block(level, &dictionary, &input, last);
        let _the_writer_was_dropped = done.send(Piece { deflated, crc, input });
    }
}

fn deflate_block(level: Level, dictionary: &[u8], input: &[u8], last: bool) -> Vec<u8> {
    // Not one compressor for all, with reset(): in zlib-rs 0.6.8 that leaves the old window, and
    // set_dictionary hashes one byte of it too many. Rarely, a match is lost by that, and then the
    // output would depend on which thread got which block.
    let mut deflate = Compress::new(level, false);
    if !dictionary.is_empty() {
        deflate.set_dictionary(dictionary).expect("because a raw stream takes a dictionary at its beginning");
    }
    let flush = if last { FlushCompress::Finish } else { FlushCompress::Sync };
    // Layers shrink to a half or less.
    let mut out = Vec::with_capacity(input.len() / 2 + 64);
    let mut taken = 0;
    loop {
        let before = deflate.total_in();
        let status =
            deflate.compress_vec(&input[taken..], &mut out, flush).expect("because deflate fails on misuse only");
        taken += usize::try_from(deflate.total_in() - before).expect("because a block is smaller than memory");
        let done = match flush {
            FlushCompress::Finish => status == Status::StreamEnd,
            // Room to spare after all input was taken: the flush is complete.
            _ => taken == input.len() && out.len() < out.capacity(),
        };
        if done {
            return out;
        }
        out.reserve(out.capacity().max(4096));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_depend_on_their_window_and_block_only() {
        // The dictionary's last three bytes are hashed with the one behind them in the window. If
        // that were left over from the block before (where the dictionary's first byte stood), the
        // text of those four would not be found in the dictionary any more.
        let mut state = 1_u32;
        let mut noise = |len: usize| -> Vec<u8> {
            let next = |_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            };
            (0..len).map(next).collect()
        };
        let mut first = noise(BLOCK_BYTES);
        let (start, end) = (BLOCK_BYTES - WINDOW_BYTES, BLOCK_BYTES - 3);
        let text = [&first[end..], &first[start..=start], &noise(40)].concat();
        first[start + 1000..][..text.len()].copy_from_slice(&text);
        let second = [noise(100), text, noise(100)].concat();

        let mut gzip = ParallelGzip::new(Vec::new(), 6, NonZeroUsize::MIN);
        gzip.write_all(&first).unwrap();
        gzip.write_all(&second).unwrap();
        let out = gzip.finish().unwrap();
        let level = Level::new(6);
        let pieces = [
            deflate_block(level, &[], &first, false),
            deflate_block(level, &first[BLOCK_BYTES - WINDOW_BYTES..], &second, true),
        ];
        assert!(out[HEADER.len()..out.len() - 8] == pieces.concat());
    }
}
