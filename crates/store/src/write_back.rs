//! Large files go to the disk while they are written.
//!
//! By itself the kernel keeps what is written until a tenth of its memory is full of it, and the disk idles until the sync at the
//! end. What is begun here is on its way by then.

use std::fs::File;
use std::io::{self, Write};

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
