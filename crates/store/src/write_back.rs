//! What is written goes to the disk while more is written.
//!
//! By itself the kernel keeps what is written until a tenth of its memory is full of it, and the disk idles until the sync at the
//! end. What is begun here is on its way by then: a large file by its parts, many files with their file system.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;

use crate::error::{At as _, FileError};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{mpsc, thread};
use crate::sys;

/// What is begun at once: large enough for any disk to be at its best with, and small files are left to the sync.
const STEP_BYTES: u64 = 8 << 20;

/// How far a file that grows at its end is on its way to the disk.
#[derive(Debug, Default)]
pub(crate) struct WriteBack {
    begun_bytes: u64,
}

impl WriteBack {
    /// The file has so many bytes by now.
    pub(crate) fn grown_to(&mut self, file: &File, bytes: u64) {
        let new = bytes.saturating_sub(self.begun_bytes);
        if new >= STEP_BYTES {
            sys::begin_write_back(file, self.begun_bytes, new);
            self.begun_bytes = bytes;
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
}
