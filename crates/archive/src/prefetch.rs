//! Reading ahead in another thread.
//!
//! A ring of buffers goes round between the source's thread and the reader: full ones one way, used
//! ones back. Nothing is allocated after the start, and the source is at most the ring ahead.
//!
//! Dropping a [`Prefetch`] hangs up both ways: the source's thread ends after the read that it is
//! in, and the scope waits for it. An error of the source is delivered after the bytes before it.

use std::io::{self, BufRead, Read};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::{Scope, ScopedJoinHandle};

/// Bytes of one buffer: large enough that the hand-over is lost in the noise, small enough that
/// the ring stays in the second-level cache.
const BUFFER_BYTES: usize = 256 << 10;
/// Buffers in the ring: one being filled, one being read, and two for unevenness.
const BUFFERS: usize = 4;

/// A [`Read`] whose source runs in a thread of its own.
#[derive(Debug)]
pub struct Prefetch<'scope, S> {
    thread: ScopedJoinHandle<'scope, S>,
    filled: Receiver<io::Result<Filled>>,
    used: Sender<Vec<u8>>,
    current: Filled,
    position: usize,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Reading,
    Ended,
    Failed,
}

#[derive(Debug, Default)]
struct Filled {
    buffer: Vec<u8>,
    len: usize,
}

impl<'scope, S: Read + Send + 'scope> Prefetch<'scope, S> {
    /// Starts to read `source` in a thread of `scope`.
    pub fn spawn(scope: &'scope Scope<'scope, '_>, source: S) -> Self {
        let (filled_tx, filled) = sync_channel(BUFFERS);
        let (used, used_rx) = channel();
        for _ in 0..BUFFERS {
            used.send(vec![0; BUFFER_BYTES]).expect("because the receiver is still in scope");
        }
        let thread = scope.spawn(move || run(source, &used_rx, &filled_tx));
        Self { thread, filled, used, current: Filled::default(), position: 0, state: State::Reading }
    }

    /// Stops reading ahead and gives the source back, which may be further than what was read here.
    ///
    /// # Panics
    /// With the source's panic, if it panicked.
    pub fn join(self) -> S {
        let Self { thread, filled, used, .. } = self;
        drop((filled, used));
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// The source's thread: fills buffers until the end, an error, or nobody listens any more.
fn run<S: Read>(mut source: S, used: &Receiver<Vec<u8>>, filled: &SyncSender<io::Result<Filled>>) -> S {
    for mut buffer in used {
        let mut len = 0;
        let mut failure = None;
        // Sources give small pieces (inflate: 32 KiB); whole buffers keep wake-ups rare.
        while len < buffer.len() {
            match source.read(&mut buffer[len..]) {
                Ok(0) => break,
                Ok(n) => len += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    failure = Some(error);
                    break;
                }
            }
        }
        let short = len < buffer.len();
        if (len > 0 || failure.is_none()) && filled.send(Ok(Filled { buffer, len })).is_err() {
            break;
        }
        if let Some(error) = failure {
            let _nobody_listens = filled.send(Err(error));
            break;
        }
        if short {
            // A full stop behind the last bytes, unless they were none and said so themselves.
            if len > 0 {
                let _nobody_listens = filled.send(Ok(Filled::default()));
            }
            break;
        }
    }
    source
}

impl<S> Read for Prefetch<'_, S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let filled = self.fill_buf()?;
        let n = buf.len().min(filled.len());
        buf[..n].copy_from_slice(&filled[..n]);
        self.consume(n);
        Ok(n)
    }
}

impl<S> BufRead for Prefetch<'_, S> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.position == self.current.len && self.state == State::Reading {
            let used = std::mem::take(&mut self.current).buffer;
            self.position = 0;
            if !used.is_empty() {
                let _source_has_ended = self.used.send(used);
            }
            match self.filled.recv() {
                Ok(Ok(filled)) if filled.len == 0 => self.state = State::Ended,
                Ok(Ok(filled)) => self.current = filled,
                Ok(Err(error)) => {
                    self.state = State::Failed;
                    return Err(error);
                }
                // The thread always says how it ends, unless it panics.
                Err(_) => {
                    self.state = State::Failed;
                    return Err(io::Error::other("the source panicked"));
                }
            }
        }
        if self.state == State::Failed {
            return Err(io::Error::other("the source failed before"));
        }
        Ok(&self.current.buffer[self.position..self.current.len])
    }

    fn consume(&mut self, n: usize) {
        self.position += n;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives `left` bytes in pieces of up to 7,000, then ends as told.
    struct Source {
        left: usize,
        given: u8,
        end: fn() -> io::Result<usize>,
    }

    impl Source {
        fn new(left: usize, end: fn() -> io::Result<usize>) -> Self {
            Self { left, given: 0, end }
        }
    }

    impl Read for Source {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            let n = buf.len().min(self.left).min(7_000);
            if n == 0 {
                return (self.end)();
            }
            for byte in &mut buf[..n] {
                *byte = self.given;
                self.given = self.given.wrapping_add(1);
            }
            self.left -= n;
            Ok(n)
        }
    }

    fn expected(len: usize) -> Vec<u8> {
        (0..len).map(|i| i as u8).collect()
    }

    #[test]
    fn bytes_arrive_in_order_and_the_source_comes_back() {
        for len in [0, 1, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 5 * BUFFER_BYTES + 17] {
            std::thread::scope(|scope| {
                let mut prefetch = Prefetch::spawn(scope, Source::new(len, || Ok(0)));
                let mut got = Vec::new();
                prefetch.read_to_end(&mut got).unwrap();
                assert!(got == expected(len), "{len} bytes");
                assert_eq!(prefetch.read(&mut [0; 8]).unwrap(), 0, "the end stays the end");
                assert_eq!(prefetch.join().left, 0);
            });
        }
    }

    #[test]
    fn an_error_comes_after_the_bytes_before_it_and_stays() {
        for len in [0, 10, BUFFER_BYTES, 3 * BUFFER_BYTES + 5] {
            std::thread::scope(|scope| {
                let source = Source::new(len, || Err(io::Error::new(io::ErrorKind::BrokenPipe, "gone")));
                let mut prefetch = Prefetch::spawn(scope, source);
                let mut got = Vec::new();
                let error = prefetch.read_to_end(&mut got).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
                assert!(got == expected(len), "{len} bytes");
                assert!(prefetch.read(&mut [0; 8]).is_err());
            });
        }
    }

    #[test]
    fn early_drop_ends_the_thread() {
        std::thread::scope(|scope| {
            let mut prefetch = Prefetch::spawn(scope, Source::new(usize::MAX, || Ok(0)));
            prefetch.read_exact(&mut [0; 100]).unwrap();
            drop(prefetch);
            // The scope would never end otherwise.
        });
        std::thread::scope(|scope| {
            let prefetch = Prefetch::spawn(scope, Source::new(usize::MAX, || Ok(0)));
            assert!(prefetch.join().left > 0);
        });
    }

    #[test]
    fn a_panic_of_the_source_is_an_error_here_and_a_panic_in_join() {
        let joined = std::panic::catch_unwind(|| {
            std::thread::scope(|scope| {
                let mut prefetch = Prefetch::spawn(scope, Source::new(0, || panic!("as the test wants")));
                assert!(prefetch.read(&mut [0; 8]).is_err());
                prefetch.join();
            });
        });
        assert!(joined.is_err());
    }
}
