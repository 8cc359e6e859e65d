//! Running one build step in a prepared root file system.
//!
//! Whoever asks for a step has the tree mounted and writable, and takes it away afterwards; this module puts a process
//! into it and reports how it ended. Nothing here knows about layers, caches or Dockerfiles.
//!
//! ```text
//! mod.rs      what a step is, how it ends, and which executor runs it
//! runtime.rs  crun or runc as a process, with a bundle written for each step
//! builtin.rs  our side of the built-in executor: starts this very program again as a helper
//! init.rs     the helper's side: namespaces, mounts, pid 1
//! sandbox.rs  what both give a step: capabilities, devices, masked paths, refused system calls
//! seccomp.rs  the refused system calls as a kernel filter
//! memory.rs   tmpfs directories for secrets
//! stubs.rs    mount points a tree lacks: made before a step, taken away after it
//! user.rs     `name:group` to numbers, read inside the tree
//! sys.rs      the only unsafe code
//! ```
//!
//! A step shares the host's network, unless it is to have none, and nothing else: its own mounts, processes, IPC and host name, docker's default
//! capabilities, and docker's refused system calls. It is not a boundary against a kernel exploit; it is the one that
//! `docker build` gives.
//!
//! If this process dies, the built-in executor's steps die with it (parent death signals, down to the pid namespace).
//! A container that an OCI runtime left behind is deleted by [`end_leftovers`], before the state directory is used again.

mod builtin;
mod init;
mod memory;
mod runtime;
mod sandbox;
mod seccomp;
mod stubs;
mod sys;
#[cfg(test)]
mod tests;
mod user;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use plies_oci::ErrorKind;
pub use plies_store::Cancel;

pub use builtin::Builtin;
pub use init::init_main_if_asked;
pub use memory::MemoryDir;
pub use runtime::OciRuntime;
pub use user::{User, UserError, home_of, resolve_user};

/// One process to run in a root file system.
#[derive(Debug, Clone)]
pub struct Step {
    /// The command and its arguments; at least one. A command without a slash is looked for in the step's `PATH`,
    /// inside the root.
    pub args: Vec<OsString>,
    /// The environment; nothing of this process's is added, only `HOME` if there is none. Of equal names the last counts.
    pub env: Vec<(OsString, OsString)>,
    /// Where the process starts; absolute, inside the root, and there already.
    pub cwd: PathBuf,
    /// Whose rights the process has.
    pub user: User,
    /// The tree: mounted and writable.
    pub rootfs: PathBuf,
    /// What is mounted over the tree, in order, after `/proc`, `/dev` and `/sys`.
    pub mounts: Vec<StepMount>,
    /// The host name the process sees.
    pub hostname: String,
    /// Which network the process sees.
    pub network: Network,
    /// Limits that differ from this process's own.
    pub limits: Vec<ResourceLimit>,
    /// Nothing is kept from it but what namespaces part: it has all capabilities and system calls that this process has,
    /// nothing is masked, `/sys` can be written to, and devices are there that file systems are made with (BuildKit's
    /// `--security=insecure`).
    pub insecure: bool,
    /// A variable or an argument is secret: no disk may see them.
    pub secret: bool,
    /// What its standard streams are.
    pub streams: Streams,
}

impl Step {
    /// A step run by root in `/`, as `docker build` would run it: host network, no extra mounts, no input.
    pub fn new(rootfs: impl Into<PathBuf>, args: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        Self {
            args: args.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            cwd: PathBuf::from("/"),
            user: User::root(),
            rootfs: rootfs.into(),
            mounts: Vec::new(),
            hostname: "plies".to_owned(),
            network: Network::Host,
            limits: Vec::new(),
            insecure: false,
            secret: false,
            streams: Streams::Captured,
        }
    }

    /// The environment with one value for each name, and with `HOME`: the user's home in the tree's `/etc/passwd` unless
    /// the step has one, as runtimes do it.
    fn environment(&self) -> Vec<(OsString, OsString)> {
        let mut variables: Vec<(OsString, OsString)> = Vec::with_capacity(self.env.len() + 1);
        for (name, value) in &self.env {
            match variables.iter_mut().find(|(known, _)| known == name) {
                Some((_, old)) => old.clone_from(value),
                None => variables.push((name.clone(), value.clone())),
            }
        }
        if !variables.iter().any(|(name, _)| name == "HOME") {
            variables.push(("HOME".into(), user::home(&self.rootfs, self.user.uid).into()));
        }
        variables
    }

    /// The first mistake in it that no executor could run.
    fn check(&self) -> Result<(), ExecError> {
        use std::os::unix::ffi::OsStrExt as _;
        let wrong = |what: &'static str| Err(ExecError::InvalidStep { what });
        if self.args.first().is_none_or(|command| command.is_empty()) {
            return wrong("the command is empty");
        }
        if !self.cwd.is_absolute() {
            return wrong("the working directory is not absolute");
        }
        if self.mounts.iter().any(|mount| !mount.target.is_absolute()) {
            return wrong("the target of a mount is not absolute");
        }
        let nul = |text: &std::ffi::OsStr| text.as_bytes().contains(&0);
        if self.args.iter().any(|arg| nul(arg)) || self.env.iter().any(|(name, value)| nul(name) || nul(value)) {
            return wrong("an argument or a variable holds a NUL byte");
        }
        if self.env.iter().any(|(name, _)| name.is_empty() || name.as_bytes().contains(&b'=')) {
            return wrong("a variable's name is empty or holds an equals sign");
        }
        Ok(())
    }
}

/// Something mounted over the tree while a step runs.
#[derive(Debug, Clone)]
pub struct StepMount {
    /// Where, inside the root; symbolic links on the way are followed inside the root. A missing mount point is made
    /// and taken away again after the step.
    pub target: PathBuf,
    /// What.
    pub source: MountSource,
}

impl StepMount {
    /// The host's files that a build step needs to use the host's network: `/etc/resolv.conf` and `/etc/hosts`, read
    /// only, and only those that are there.
    pub fn host_network_files() -> Vec<StepMount> {
        ["/etc/resolv.conf", "/etc/hosts"]
            .into_iter()
            .filter(|path| Path::new(path).is_file())
            .map(|path| StepMount {
                target: path.into(),
                source: MountSource::Bind { path: path.into(), access: Access::ReadOnly },
            })
            .collect()
    }
}

/// What a [`StepMount`] shows.
#[derive(Debug, Clone)]
pub enum MountSource {
    /// A file or a directory of the host.
    Bind {
        /// Which one.
        path: PathBuf,
        /// Whether the step may write to it.
        access: Access,
    },
    /// A fresh file system in memory.
    Tmpfs {
        /// How many bytes it may hold; `None` leaves it to the kernel (half of the memory).
        size_bytes: Option<u64>,
        /// Whether the step may write to it.
        access: Access,
    },
}

/// Whether a mount can be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reads only.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// Which network a step sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Network {
    /// This machine's.
    #[default]
    Host,
    /// Loopback only.
    None,
}

/// A limit of a step's processes (`setrlimit(2)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResourceLimit {
    /// Of what: an index into [`ResourceLimit::NAMES`].
    resource: u8,
    /// What holds until somebody raises it; `None` is no limit.
    pub soft: Option<u64>,
    /// How far it can be raised; `None` is no limit.
    pub hard: Option<u64>,
}

impl ResourceLimit {
    /// What there is to limit, as docker's `--ulimit` calls it.
    pub const NAMES: [&str; 15] = [
        "as",
        "core",
        "cpu",
        "data",
        "fsize",
        "locks",
        "memlock",
        "msgqueue",
        "nice",
        "nofile",
        "nproc",
        "rss",
        "rtprio",
        "sigpending",
        "stack",
    ];

    /// Reads docker's `NAME=SOFT[:HARD]`; -1 is no limit, and without `HARD` both are the same.
    ///
    /// # Errors
    /// A sentence that says what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let Some((name, limits)) = text.split_once('=') else {
            return Err(format!("{text:?}: expected NAME=SOFT[:HARD], such as nofile=1024:2048"));
        };
        let Some(resource) = Self::NAMES.iter().position(|known| *known == name) else {
            return Err(format!("unknown limit {name:?}: there are {}", Self::NAMES.join(", ")));
        };
        let number = |text: &str| match text {
            "-1" => Ok(None),
            text => text.parse().map(Some).map_err(|_| format!("{text:?} is no number, nor -1 for no limit")),
        };
        let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft.unwrap_or(u64::MAX) > hard.unwrap_or(u64::MAX) {
            return Err(format!("{text:?}: the soft limit is above the hard one"));
        }
        Ok(Self { resource: u8::try_from(resource).expect("because there are 15"), soft, hard })
    }

    /// Of what, as docker calls it.
    pub fn name(&self) -> &'static str {
        Self::NAMES[usize::from(self.resource)]
    }
}

/// What a step's standard streams are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Streams {
    /// No input; output goes to the sinks given to [`Executor::run`].
    #[default]
    Captured,
    /// This process's own streams, as `ply run` wants it; the sinks are not used.
    Inherited {
        /// Whether a terminal is to be set up. Only an OCI runtime makes a new one; the built-in executor lets the step
        /// use the caller's.
        terminal: bool,
    },
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitStatus {
    code: i32,
    reason: Option<String>,
}

impl ExitStatus {
    /// The command was not found.
    pub const NOT_FOUND: i32 = 127;
    /// The command is there and can't be executed.
    pub const NOT_EXECUTABLE: i32 = 126;

    fn exited(code: i32) -> Self {
        Self { code, reason: None }
    }

    fn signalled(signal: i32) -> Self {
        Self { code: 128 + signal, reason: Some(format!("killed by signal {signal}")) }
    }

    /// The code as docker reports it: the process's own, 128 and the number of the signal that ended it, 127 for a
    /// command that is not there, 126 for one that can't be executed.
    pub fn code(&self) -> i32 {
        self.code
    }

    /// Whether the step did what it should.
    pub fn success(&self) -> bool {
        self.code == 0
    }

    /// Why it ended so, if more is known than the code.
    pub fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }
}

/// Something that runs steps.
pub trait Executor: Send + Sync {
    /// Runs `step` to its end. Everything it started is gone when this returns, whatever the outcome; so are the mount
    /// points that had to be made.
    ///
    /// # Errors
    /// [`ExecError::Canceled`] after a cancel; the others when the step could not be run as asked. A command that fails
    /// is not an error: see [`ExitStatus`].
    fn run(
        &self,
        step: &Step,
        stdout: &mut (dyn Write + Send),
        stderr: &mut (dyn Write + Send),
        cancel: &Cancel,
    ) -> Result<ExitStatus, ExecError>;

    /// What it is, for `ply info` and messages: "builtin", "crun", "runc".
    fn name(&self) -> &str;
}

/// Which executor to use.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ExecutorChoice {
    /// An OCI runtime if one is found, the built-in one otherwise.
    #[default]
    Auto,
    /// This OCI runtime.
    Runtime(PathBuf),
    /// The built-in one.
    Builtin,
}

/// The OCI runtimes that [`ExecutorChoice::Auto`] looks for, in this order: crun starts a container in a fifth of runc's
/// time.
const RUNTIMES: [&str; 2] = ["crun", "runc"];

/// Ends what a process that died left running. To be called when `state_dir` is ours, before anything that the steps
/// use is taken away. (The built-in executor's steps die with their process.)
pub fn end_leftovers(state_dir: &Path) {
    OciRuntime::end_leftovers(state_dir);
    memory::all(state_dir).for_each(|dir| memory::end(&dir));
}

/// Chooses an executor. `state_dir` is a directory of ours alone, for bundles and for the runtime's own state, which
/// several executors of this process may share. `search_path` is where runtimes are looked for: the caller's
/// `PATH`, split.
///
/// # Errors
/// [`ExecError::Io`] when `state_dir` can't be made; [`ExecError::NoRuntime`] when the runtime asked for can't be run.
pub fn pick(
    choice: &ExecutorChoice,
    state_dir: &Path,
    search_path: &[PathBuf],
) -> Result<Box<dyn Executor>, ExecError> {
    match choice {
        ExecutorChoice::Builtin => Ok(Box::new(Builtin::new())),
        ExecutorChoice::Runtime(path) => Ok(Box::new(OciRuntime::new(path, state_dir)?)),
        ExecutorChoice::Auto => {
            let found = RUNTIMES
                .iter()
                .find_map(|name| search_path.iter().map(|dir| dir.join(name)).find(|path| runtime::is_program(path)));
            match found {
                Some(path) => Ok(Box::new(OciRuntime::new(&path, state_dir)?)),
                None => Ok(Box::new(Builtin::new())),
            }
        }
    }
}

/// Why a step could not be run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ExecError {
    /// The step makes no sense.
    #[error("invalid step: {what}")]
    InvalidStep {
        /// What is wrong with it.
        what: &'static str,
    },
    /// A file or a process of the host did not do its part.
    #[error("{op} {}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The tree can't hold a mount.
    #[error("mount point {} in the root file system: {why}", target.display())]
    MountPoint {
        /// Where the mount should go, inside the root.
        target: PathBuf,
        /// What is in the way.
        why: &'static str,
    },
    /// A part of the sandbox could not be set up by the built-in executor.
    #[error("{what}")]
    Setup {
        /// What was tried.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The OCI runtime refused the step.
    #[error("{runtime}: {message}")]
    Runtime {
        /// Which runtime.
        runtime: String,
        /// What it wrote to its log.
        message: String,
    },
    /// The runtime asked for is not a program.
    #[error("no OCI runtime at {}", path.display())]
    NoRuntime {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A sink refused the step's output; the step was killed.
    #[error("passing on the step's output")]
    Output {
        /// What the sink said.
        #[source]
        source: io::Error,
    },
    /// The helper process ended without a report: killed from outside, or for want of memory.
    #[error("the step's helper ended without a report ({status})")]
    HelperLost {
        /// How it ended.
        status: String,
    },
    /// The caller asked to stop; the step was killed.
    #[error("canceled")]
    Canceled,
}

impl ExecError {
    /// What a caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InvalidStep { .. } | Self::MountPoint { .. } => ErrorKind::InvalidInput,
            Self::NoRuntime { .. } => ErrorKind::NotFound,
            Self::Canceled => ErrorKind::Canceled,
            Self::Io { .. }
            | Self::Setup { .. }
            | Self::Runtime { .. }
            | Self::Output { .. }
            | Self::HelperLost { .. } => ErrorKind::Unavailable,
        }
    }
}
