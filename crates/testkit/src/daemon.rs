//! Another program's daemon, for as long as a test needs it.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::{eventually, tools};

/// It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Daemon(Child);

impl Daemon {
    /// Starts `program` with what `configure` gives it, and its log in `dir`. Once the command that `asks` makes succeeds it is
    /// there; says aloud if it cannot start here.
    ///
    /// # Panics
    /// When there is no such program, though its file was found.
    #[track_caller]
    pub(crate) fn start(
        program: &str,
        dir: &Path,
        configure: impl FnOnce(&mut Command),
        asks: impl Fn() -> Command,
    ) -> Option<Self> {
        let log = fs::File::create(dir.join("log")).expect("because the scratch is ours");
        let mut command = Command::new(tools::find(program).expect("because it was just found"));
        configure(command.stdin(Stdio::null()).stderr(log).stdout(Stdio::null()));
        let mut child = command.spawn().unwrap_or_else(|error| panic!("start {program}: {error}"));
        let answers = eventually(|| {
            !matches!(child.try_wait(), Ok(Some(_))) && asks().output().is_ok_and(|output| output.status.success())
        });
        let daemon = Self(child);
        if !answers {
            let log = fs::read_to_string(dir.join("log")).unwrap_or_default();
            eprintln!("SKIPPED {}: {program} does not start here: {log}", std::panic::Location::caller());
            return None;
        }
        Some(daemon)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            // Asked to end, it takes its own mounts away. If it has ended just now, there is nothing to ask.
            let pid = rustix::process::Pid::from_child(&self.0);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            drop(self.0.wait());
        }
    }
}
