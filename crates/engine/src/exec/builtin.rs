//! The built-in executor, seen from outside: starts this very program again as a helper ([`super::init`]) and hears from
//! it how the step ended.

use std::io::{self, Read as _, Write};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::init::{Config, HELPER_ARG, Report};
use super::stubs::Stubs;
use super::{Cancel, ExecError, Executor, ExitStatus, Step, Streams, sys};

/// Runs steps without any other program.
///
/// The program that uses it must call [`super::init_main_if_asked`] first thing in its `main`.
#[derive(Debug)]
pub struct Builtin {
    program: PathBuf,
    /// The program as a file that nobody can change, whatever a step finds under `/proc/<pid>/exe` (CVE-2019-5736).
    sealed: OnceLock<OwnedFd>,
}

impl Default for Builtin {
    fn default() -> Self {
        Self::new()
    }
}

impl Builtin {
    /// With this very program as the helper.
    pub fn new() -> Self {
        Self::with_program("/proc/self/exe")
    }

    /// With another program as the helper, which calls [`super::init_main_if_asked`]: for tests, whose `main` isn't
    /// theirs.
    pub fn with_program(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), sealed: OnceLock::new() }
    }

    /// The sealed copy of the program, made by the first step.
    fn sealed(&self) -> Result<&OwnedFd, ExecError> {
        if let Some(sealed) = self.sealed.get() {
            return Ok(sealed);
        }
        let failed = |source| ExecError::Io { op: "copy the program", path: self.program.clone(), source };
        let copy = seal(&self.program).map_err(failed)?;
        Ok(self.sealed.get_or_init(|| copy))
    }

    fn spawn(&self, step: &Step, report: OwnedFd) -> Result<Child, ExecError> {
        let failed = |source| ExecError::Io { op: "start the helper", path: self.program.clone(), source };
        let program = self.sealed()?;
        let config = Config::of(step);
        let config = send(&serde_json::to_vec(&config).expect("numbers and bytes are always JSON")).map_err(failed)?;
        let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
        command
            .arg(HELPER_ARG)
            .args([config.as_raw_fd(), report.as_raw_fd()].map(|fd| fd.to_string()))
            .env_clear()
            .current_dir("/");
        match step.streams {
            Streams::Captured => {
                command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            }
            Streams::Inherited { .. } => {}
        }
        sys::pass_fds(&mut command, vec![config.as_raw_fd(), report.as_raw_fd()]);
        // `config` and `report` are closed here only when this returns: the new process has its copies by then.
        command.spawn().map_err(failed)
    }
}

/// A copy of a file in memory that can't be changed any more.
fn seal(program: &std::path::Path) -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 don't know the flag and need none.
    let memory = rustix::fs::memfd_create("plies-helper", flags | MemfdFlags::EXEC)
        .or_else(|_| rustix::fs::memfd_create("plies-helper", flags))?;
    let mut memory = std::fs::File::from(memory);
    io::copy(&mut std::fs::File::open(program)?, &mut memory)?;
    rustix::fs::fcntl_add_seals(&memory, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    // A file open for writing can't be executed.
    let memory = OwnedFd::from(memory);
    let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
    Ok(std::fs::File::open(path)?.into())
}

/// Bytes in memory, to be read from the start.
fn send(bytes: &[u8]) -> io::Result<OwnedFd> {
    use std::io::Seek as _;
    let mut memory = std::fs::File::from(rustix::fs::memfd_create("plies-step", MemfdFlags::CLOEXEC)?);
    memory.write_all(bytes)?;
    memory.rewind()?;
    Ok(memory.into())
}

impl Executor for Builtin {
    fn run(
        &self,
        step: &Step,
        stdout: &mut (dyn Write + Send),
        stderr: &mut (dyn Write + Send),
        cancel: &Cancel,
    ) -> Result<ExitStatus, ExecError> {
        step.check()?;
        if cancel.is_canceled() {
            return Err(ExecError::Canceled);
        }
        let mut stubs = Stubs::make(step)?;
        let result = self.run_inner(step, stdout, stderr, cancel);
        let removed = stubs.remove();
        let status = result?;
        removed.map(|()| status)
    }

    fn name(&self) -> &str {
        "builtin"
    }
}

impl Builtin {
    fn run_inner(
        &self,
        step: &Step,
        stdout: &mut (dyn Write + Send),
        stderr: &mut (dyn Write + Send),
        cancel: &Cancel,
    ) -> Result<ExitStatus, ExecError> {
        let failed = |op| move |source| ExecError::Io { op, path: PathBuf::from("the helper"), source };
        let (mut report, report_end) = io::pipe().map_err(failed("make a pipe to"))?;
        let mut child = self.spawn(step, report_end.into())?;
        let pid = pid_of(&child);
        // Never reaped before `wait` below, so the number is still its own.
        let handle = rustix::process::pidfd_open(pid, PidfdFlags::empty());
        let kill = match handle {
            Ok(handle) => move || {
                // The helper kills the pid namespace on this and stays to see it gone. Already gone is as good.
                let _ = rustix::process::pidfd_send_signal(&handle, Signal::TERM);
            },
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed("watch")(error.into()));
            }
        };
        let kill = std::sync::Arc::new(kill);
        let on_cancel = std::sync::Arc::clone(&kill);
        let guard = cancel.on_cancel(move || on_cancel());

        let copied = copy_streams(&mut child, stdout, stderr, &*kill);
        let mut text = Vec::new();
        let heard = report.read_to_end(&mut text);
        let ended = child.wait().map_err(failed("wait for"))?;
        drop(guard);
        if cancel.is_canceled() {
            return Err(ExecError::Canceled);
        }
        copied.map_err(|source| ExecError::Output { source })?;
        heard.map_err(failed("hear from"))?;
        match serde_json::from_slice(&text) {
            Ok(Report::Exited(code)) => Ok(ExitStatus::exited(code)),
            Ok(Report::Signaled(signal)) => Ok(ExitStatus::signalled(signal)),
            Ok(Report::NotStarted { code, reason }) => Ok(ExitStatus { code, reason: Some(reason) }),
            Ok(Report::Failed { what, errno }) => {
                Err(ExecError::Setup { what, source: io::Error::from_raw_os_error(errno) })
            }
            Err(_) => Err(ExecError::HelperLost { status: ended.to_string() }),
        }
    }
}

/// A child's number.
pub(super) fn pid_of(child: &Child) -> Pid {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a process has a positive number")
}

/// Passes on what a child writes until it closes its ends; kills it when a sink fails, and goes on reading so that it
/// can end.
pub(super) fn copy_streams(
    child: &mut Child,
    stdout: &mut (dyn Write + Send),
    stderr: &mut (dyn Write + Send),
    kill: &(dyn Fn() + Sync),
) -> io::Result<()> {
    let (out, err) = (child.stdout.take(), child.stderr.take());
    std::thread::scope(|scope| {
        let other = err.map(|mut err| scope.spawn(move || copy_stream(&mut err, stderr, kill)));
        let first = out.map_or(Ok(()), |mut out| copy_stream(&mut out, stdout, kill));
        let second = other.map_or(Ok(()), |thread| thread.join().expect("copying bytes doesn't panic"));
        first.and(second)
    })
}

fn copy_stream(from: &mut dyn io::Read, to: &mut dyn Write, kill: &(dyn Fn() + Sync)) -> io::Result<()> {
    let mut result = Ok(());
    // A pipe's own size, in bytes (pipe(7)).
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return result.and_then(|()| to.flush()),
            Ok(length) if result.is_ok() => {
                result = to.write_all(&buffer[..length]);
                if result.is_err() {
                    kill();
                }
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return result.and(Err(error)),
        }
    }
}
