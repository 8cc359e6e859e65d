//! What is written goes to the disk while more is written.
//!
//! By itself the kernel keeps what is written until a tenth of its memory is full of it, and the disk idles until the sync at the
//! end. What is begun here is on its way by then: a large file by its parts, many files with their file system. And it keeps the pages of
//! what was written until it needs them; those of a file that nobody will read soon can be given back as they reach the disk.

use std::fs::File;
use std::io::{self, Read, Write};
use std::num::NonZero;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::Advice;

use crate::error::{At as _, FileError};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{mpsc, thread};
use crate::sys;

/// What is begun at once: large enough for any disk to be at its best with, and small files are left to the sync.
const STEP_BYTES: u64 = 8 << 20;

/// What of a file the disk is given time for before it leaves the cache.
const UNDER_WAY_BYTES: u64 = 2 * STEP_BYTES;

/// How far a file that grows at its end is on its way to the disk.
#[derive(Debug, Default)]
pub(crate) struct WriteBack {
    begun_bytes: u64,
    /// See [`WriteBack::leave_the_cache`].
    leaves: bool,
}

impl WriteBack {
    /// What has reached the disk leaves the page cache: nobody is going to read it soon. Its pages take in what is written next,
    /// where otherwise others would have to be found and what is in them given up. Files of less than [`STEP_BYTES`] stay.
    pub(crate) fn leave_the_cache(&mut self) {
        self.leaves = true;
    }

    /// The file has so many bytes by now.
    pub(crate) fn grown_to(&mut self, file: &File, bytes: u64) {
        let new = bytes.saturating_sub(self.begun_bytes);
        if new >= STEP_BYTES {
            sys::begin_write_back(file, self.begun_bytes, new);
            self.drop_pages(file, self.begun_bytes.saturating_sub(UNDER_WAY_BYTES));
            self.begun_bytes = bytes;
        }
    }

    /// The file is written anew, from its first byte on.
    pub(crate) fn restart(&mut self) {
        self.begun_bytes = 0;
    }

    /// All of the file is on the disk.
    pub(crate) fn synced(&self, file: &File) {
        self.drop_pages(file, self.begun_bytes);
    }

    /// From the first byte on: what was still on its way the last time may be there now.
    fn drop_pages(&self, file: &File, bytes: u64) {
        if let (true, Some(bytes)) = (self.leaves, NonZero::new(bytes)) {
            let _advice_only = rustix::fs::fadvise(file, 0, Some(bytes), Advice::DontNeed);
        }
    }
}

/// A file that is written from its beginning.
#[derive(Debug)]
pub(crate) struct WrittenBack<'f> {
    file: &'f File,
    size_bytes: u64,
    write_back: WriteBack,
}

impl<'f> WrittenBack<'f> {
    pub(crate) fn new(file: &'f File) -> Self {
        Self { file, size_bytes: 0, write_back: WriteBack::default() }
    }
}

impl Write for WrittenBack<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.size_bytes += n as u64;
        self.write_back.grown_to(self.file, self.size_bytes);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes of blobs after which the files that came of them are synced: a quarter of a second of a fast disk's work, so that little is
/// left to the end, and few syncs, each of which writes the same directories and bitmaps once more.
const SYNC_STEP_BYTES: u64 = 32 << 20;

/// Counts the bytes of blobs that become files.
#[derive(Debug)]
pub(crate) struct SyncAhead {
    passed_bytes: AtomicU64,
    wake: mpsc::SyncSender<()>,
}

impl SyncAhead {
    /// Does `work`, and while it goes on syncs the file system of `dir`, again and again, from a thread of its own. That does not take
    /// the place of a sync at the end.
    ///
    /// # Errors
    /// A sync failed. The kernel tells of lost bytes once, so nothing that was written meanwhile may be relied on.
    pub(crate) fn during<T>(dir: impl AsFd + Sync, path: &Path, work: impl FnOnce(&Self) -> T) -> Result<T, FileError> {
        // One that is asked for while one goes on is enough: it takes in all that was written until it begins.
        let (wake, asked) = mpsc::sync_channel(1);
        thread::scope(|scope| {
            let syncing = scope.spawn(|| {
                for () in asked {
                    rustix::fs::syncfs(&dir).at("sync", path)?;
                }
                Ok(())
            });
            let ahead = Self { passed_bytes: AtomicU64::new(0), wake };
            let done = work(&ahead);
            drop(ahead);
            syncing.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(|()| done)
        })
    }

    /// `inner`, with its bytes counted.
    pub(crate) fn counted<R: Read>(&self, inner: R) -> impl Read + use<'_, R> {
        Counted { inner, ahead: self }
    }

    fn passed(&self, bytes: u64) {
        let before = self.passed_bytes.fetch_add(bytes, Ordering::Relaxed);
        if before / SYNC_STEP_BYTES != (before + bytes) / SYNC_STEP_BYTES {
            let _one_waits_already = self.wake.try_send(());
        }
    }
}

struct Counted<'a, R> {
    inner: R,
    ahead: &'a SyncAhead,
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.ahead.passed(n as u64);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use rustix::fs::{Mode, OFlags};

    use super::*;

    /// What comes of so many bytes, where every sync fails.
    fn with_bytes(bytes: u64) -> Result<u64, FileError> {
        let dir = tempfile::tempdir().unwrap();
        // syncfs(2) does not take a descriptor that is a mere path.
        let path_only = rustix::fs::open(dir.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        SyncAhead::during(path_only, dir.path(), |ahead| {
            io::copy(&mut ahead.counted(io::repeat(0).take(bytes)), &mut io::sink()).unwrap()
        })
    }

    #[test]
    fn a_sync_ahead_that_fails_is_the_result() {
        let error = with_bytes(SYNC_STEP_BYTES).unwrap_err();
        assert!(error.to_string().contains("sync"), "{error}");
    }

    #[test]
    fn little_is_left_to_the_sync_at_the_end() {
        assert_eq!(with_bytes(SYNC_STEP_BYTES - 1).unwrap(), SYNC_STEP_BYTES - 1);
    }

    /// How many steps of a file are in the page cache, out of 12: when all but the last were on the disk as that one was begun, and
    /// when all are.
    fn cached_steps(leaves: bool) -> [u64; 2] {
        // Not where files may be in memory anyway.
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = dir.path().join("file");
        let mut file = File::create(&path).unwrap();
        let cached = || {
            let mut fincore = Command::new("fincore");
            let said = fincore.args(["--bytes", "--noheadings", "--output", "RES"]).arg(&path).output().unwrap().stdout;
            String::from_utf8(said).unwrap().trim().parse::<u64>().unwrap().div_ceil(STEP_BYTES)
        };
        let mut write_back = WriteBack { leaves, ..WriteBack::default() };
        for step in 1..=12 {
            file.write_all(&vec![1; STEP_BYTES as usize]).unwrap();
            if step == 12 {
                file.sync_data().unwrap();
            }
            write_back.grown_to(&file, step * STEP_BYTES);
        }
        let before = cached();
        file.sync_data().unwrap();
        write_back.synced(&file);
        [before, cached()]
    }

    #[test]
    fn what_nobody_reads_soon_leaves_the_cache() {
        assert_eq!(cached_steps(false), [12, 12]);
        // The step that has just begun, and those before it that may be under way.
        assert_eq!(cached_steps(true), [3, 0]);
    }
}
