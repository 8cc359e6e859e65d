//! One process owns a store: an advisory lock on `catalog/lock`, with the holder's pid and command
//! in the file, so that whoever waits can say for whom.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use crate::error::{At as _, FileError};

/// Longest command kept in the lock file; it is shown in one line of a message.
const COMMAND_MAX_BYTES: usize = 256;

/// Who holds a store, as far as the lock file tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// Its process id; `None` if it took the lock this very moment and has not written it yet.
    pub pid: Option<u32>,
    /// What it called itself, one line.
    pub command: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.pid {
            Some(pid) if self.command.is_empty() => write!(f, "process {pid}"),
            Some(pid) => write!(f, "process {pid} ({})", self.command),
            None => f.write_str("another process"),
        }
    }
}

/// What to do when another process owns the store.
pub enum WaitPolicy<'a> {
    /// Fail and name it.
    Fail,
    /// Call back once, to tell the user for whom, then wait until the store is free.
    Wait(&'a mut dyn FnMut(&Holder)),
}

impl fmt::Debug for WaitPolicy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            WaitPolicy::Fail => "Fail",
            WaitPolicy::Wait(_) => "Wait",
        })
    }
}

/// The lock, held until dropped (or until the process ends, however it does).
#[derive(Debug)]
pub(crate) struct StoreLock {
    file: File,
}

/// Explicitly, since a process that is just being started by another thread shares the descriptor
/// until it has become another program, and closing ours would leave the lock to it.
impl Drop for StoreLock {
    fn drop(&mut self) {
        // A lock that cannot be given back goes with the process.
        let _ = self.file.unlock();
    }
}

#[derive(Debug)]
pub(crate) enum LockFailure {
    Held(Holder),
    File(FileError),
}

impl From<FileError> for LockFailure {
    fn from(error: FileError) -> Self {
        Self::File(error)
    }
}

impl StoreLock {
    pub(crate) fn take(path: &Path, command: &str, wait: WaitPolicy<'_>) -> Result<Self, LockFailure> {
        // Never unlinked: a waiter on an unlinked file would own a lock that nobody else sees.
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .at("open", path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let holder = read_holder(&mut file).at("read", path)?;
                match wait {
                    WaitPolicy::Fail => return Err(LockFailure::Held(holder)),
                    WaitPolicy::Wait(tell) => tell(&holder),
                }
                while let Err(error) = file.lock() {
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error).at("lock", path)?;
                    }
                }
            }
            Err(TryLockError::Error(error)) => return Err(error).at("lock", path)?,
        }
        write_holder(&mut file, command).at("write", path)?;
        Ok(Self { file })
    }
}

fn read_holder(file: &mut File) -> io::Result<Holder> {
    let mut text = Vec::new();
    file.rewind()?;
    file.take(COMMAND_MAX_BYTES as u64 + 32).read_to_end(&mut text)?;
    let text = String::from_utf8_lossy(&text);
    let mut lines = text.lines();
    let pid = lines.next().and_then(|line| line.parse().ok());
    Ok(Holder { pid, command: lines.next().unwrap_or_default().to_owned() })
}

fn write_holder(file: &mut File, command: &str) -> io::Result<()> {
    let mut line: String = command.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    line.truncate(line.floor_char_boundary(COMMAND_MAX_BYTES));
    let pid = rustix::process::getpid().as_raw_nonzero();
    file.rewind()?;
    file.set_len(0)?;
    file.write_all(format!("{pid}\n{line}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r09_the_second_is_told_who_the_first_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = StoreLock::take(&path, "ply build\n.", WaitPolicy::Fail).unwrap();
        let Err(LockFailure::Held(holder)) = StoreLock::take(&path, "ply du", WaitPolicy::Fail) else {
            panic!("two held the lock");
        };
        assert_eq!(holder, Holder { pid: Some(std::process::id()), command: "ply build .".into() });
        assert_eq!(holder.to_string(), format!("process {} (ply build .)", std::process::id()));
        drop(first);
        StoreLock::take(&path, "ply du", WaitPolicy::Fail).unwrap();
    }

    #[test]
    fn r09_the_second_waits_and_then_owns_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let first = StoreLock::take(&path, "first", WaitPolicy::Fail).unwrap();
        let mut first = Some(first);
        let mut told = None;
        // The callback frees the lock, so nothing here waits for time to pass.
        let _second = StoreLock::take(
            &path,
            "second",
            WaitPolicy::Wait(&mut |holder| {
                told = Some(holder.command.clone());
                first = None;
            }),
        )
        .unwrap();
        assert_eq!(told.as_deref(), Some("first"));
        assert!(std::fs::read_to_string(&path).unwrap().ends_with("\nsecond\n"));
    }
}
