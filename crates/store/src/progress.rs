//! What a request tells while it runs.
//!
//! No library here prints. It reports tasks (a layer being unpacked, a build step) to a [`Progress`] that the front
//! end hands in: live bars on a terminal, plain lines in a pipe, nothing in a test.

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use plies_oci::BlobDigest;

use crate::Cancel;

/// Names a task within one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TaskId(u64);

/// How a task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The work was done.
    Done,
    /// There was nothing to do: the result was there.
    Cached,
    /// The request fails because of it.
    Failed,
    /// It was stopped: another failed, or the caller asked for that.
    Canceled,
}

/// Something that happened to a task.
#[derive(Debug)]
pub enum Event<'a> {
    /// It began.
    Started {
        /// What it is, for people.
        name: &'a str,
        /// How many bytes it will take in, if known.
        total_bytes: Option<u64>,
        /// What it is, for programs, if it is a part of a graph.
        vertex: Option<Vertex<'a>>,
    },
    /// It took in this many more bytes.
    Advanced {
        /// Bytes since the last event.
        bytes: u64,
    },
    /// The command it runs wrote this.
    Output {
        /// Where to.
        stream: Stream,
        /// As written, any encoding, not necessarily whole lines.
        bytes: &'a [u8],
    },
    /// It ended.
    Ended {
        /// How.
        outcome: Outcome,
        /// Of one that failed: why, if more is known than that.
        error: Option<&'a str>,
    },
}

/// A part of a graph of work.
#[derive(Debug, Clone, Copy)]
pub struct Vertex<'a> {
    /// Digest of what is to be done, with all below it: the same whenever that is asked for.
    pub digest: BlobDigest,
    /// The digests of what it stands on.
    pub inputs: &'a [BlobDigest],
}

/// A stream that a command writes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error; also what we say ourselves.
    Stderr,
}

/// Takes reports, from several threads at once.
pub trait Progress: Sync {
    /// Takes one report. Must not block for long: workers call it between writes.
    fn report(&self, task: TaskId, event: Event<'_>);
}

/// Nobody listens.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn report(&self, _: TaskId, _: Event<'_>) {}
}

/// A running task. Dropped without [`Task::end`] it reports a failure, so an early return needs no extra line.
pub struct Task<'p> {
    id: TaskId,
    progress: &'p dyn Progress,
    ended: bool,
}

impl std::fmt::Debug for Task<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Task({})", self.id.0)
    }
}

/// Task ids are unique in the process, so that requests may share a renderer.
static NEXT_TASK: AtomicU64 = AtomicU64::new(1);

impl<'p> Task<'p> {
    /// Reports that it begins.
    pub fn start(progress: &'p dyn Progress, name: &str, total_bytes: Option<u64>) -> Self {
        Self::begin(progress, Event::Started { name, total_bytes, vertex: None })
    }

    /// Reports that a part of a graph begins.
    pub fn start_vertex(progress: &'p dyn Progress, name: &str, vertex: Vertex<'_>) -> Self {
        Self::begin(progress, Event::Started { name, total_bytes: None, vertex: Some(vertex) })
    }

    fn begin(progress: &'p dyn Progress, started: Event<'_>) -> Self {
        let id = TaskId(NEXT_TASK.fetch_add(1, Ordering::Relaxed));
        progress.report(id, started);
        Self { id, progress, ended: false }
    }

    /// Reports that it took in more bytes.
    pub fn advance(&self, bytes: u64) {
        self.progress.report(self.id, Event::Advanced { bytes });
    }

    /// Reports what its command wrote.
    pub fn output(&self, stream: Stream, bytes: &[u8]) {
        self.progress.report(self.id, Event::Output { stream, bytes });
    }

    /// Reports that it ended, and how.
    pub fn end(mut self, outcome: Outcome) {
        self.ended = true;
        self.progress.report(self.id, Event::Ended { outcome, error: None });
    }

    /// Reports that it failed, and why.
    pub fn fail(mut self, error: &str) {
        self.ended = true;
        self.progress.report(self.id, Event::Ended { outcome: Outcome::Failed, error: Some(error) });
    }
}

/// Bytes on their way: whoever asked hears of them, and may stop them.
#[derive(Debug)]
pub struct Watched<'a, T> {
    /// Where they come from or go to.
    pub inner: T,
    /// Told how many bytes passed, if anybody is.
    pub task: Option<&'a Task<'a>>,
    /// Asked at every read and write.
    pub cancel: &'a Cancel,
}

impl<T> Watched<'_, T> {
    fn tell(&self, bytes: usize) {
        if let Some(task) = self.task {
            task.advance(bytes as u64);
        }
    }
}

impl<T: Read> Read for Watched<'_, T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.cancel.check()?;
        let read = self.inner.read(buffer)?;
        self.tell(read);
        Ok(read)
    }
}

impl<T: Write> Write for Watched<'_, T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.cancel.check()?;
        let written = self.inner.write(bytes)?;
        self.tell(written);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

impl Drop for Task<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.progress.report(self.id, Event::Ended { outcome: Outcome::Failed, error: None });
        }
    }
}
