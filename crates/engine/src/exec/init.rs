//! The helper's side of the built-in executor.
//!
//! ```text
//! ply (any number of threads)
//! └─ helper: new mount, pid, ipc and uts namespaces; SIGTERM kills what is below; reports to ply
//!    └─ pid 1 of the new pid namespace: mounts, then no more rights than the step has; reaps, passes on signals
//!       └─ the step
//! ```
//!
//! Every process dies with the one above it (parent death signals; pid 1's death ends its namespace). The step can't
//! touch pid 1: that is not dumpable, so looking into it would need `CAP_SYS_PTRACE`.
//!
//! Mounts are made with the mount API's file descriptors and attached to descriptors that were resolved inside the root,
//! so no path is looked up twice and none is looked up in the host. What has to happen in which order:
//! the root becomes a mount of its own, then `/proc`, `/dev`, `/sys` and the step's mounts go on it, then `pivot_root`;
//! the system call filter is installed while `CAP_SYS_ADMIN` is there, then capabilities go (a step without restrictions
//! keeps both), then the step is started as its user.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use plies_cache::contenthash::inroot::{self, Missing};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};
use rustix::pipe::PipeFlags;
use rustix::process::{DumpableBehavior, Pid, Resource, Rlimit, Signal, WaitOptions};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use serde::{Deserialize, Serialize};

use super::sandbox::{self, CAPABILITIES, DEFAULT_PATH, DEV_SIZE, MASKED_PATHS, READONLY_PATHS, UMASK};
use super::seccomp::{self, Instruction};
use super::sys::{self, Signals};
use super::user::User;
use super::{Access, ExitStatus, MountSource, Network, Step, Streams};

/// The first argument that makes this program a helper. Nobody types this.
pub(super) const HELPER_ARG: &str = "__plies-init";

/// Runs as the built-in executor's helper if this process was started as one: call it first thing in `main`, before any
/// thread, and end with the code if there is one.
pub fn init_main_if_asked() -> Option<ExitCode> {
    helper_main().map(|code| ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// The same with a plain code.
pub(super) fn helper_main() -> Option<i32> {
    let mut args = std::env::args_os().skip(1);
    if args.next()? != HELPER_ARG {
        return None;
    }
    let mut fd = || args.next()?.to_str()?.parse().ok().and_then(sys::take_fd);
    // Somebody typed it after all.
    let (Some(config), Some(report)) = (fd(), fd()) else { return Some(2) };
    let reporter = Reporter(report);
    match outer(config, &reporter) {
        Ok(code) => Some(code),
        Err(failure) => {
            reporter.say(&Report::Failed { what: failure.what, errno: failure.source.raw_os_error().unwrap_or(0) });
            Some(1)
        }
    }
}

/// A [`Step`] as it is sent to the helper: paths and words as bytes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Config {
    parent: i32,
    args: Vec<Vec<u8>>,
    env: Vec<(Vec<u8>, Vec<u8>)>,
    cwd: Vec<u8>,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    rootfs: Vec<u8>,
    mounts: Vec<(Vec<u8>, Source)>,
    hostname: String,
    /// Whether there is a network but loopback.
    network: bool,
    /// Of what, soft and hard.
    limits: Vec<(String, Option<u64>, Option<u64>)>,
    captured: bool,
    insecure: bool,
}

#[derive(Debug, Serialize, Deserialize)]
enum Source {
    Bind { path: Vec<u8>, read_only: bool },
    Tmpfs { size_bytes: Option<u64>, read_only: bool },
}

impl Config {
    pub(super) fn of(step: &Step) -> Self {
        let bytes = |text: &OsStr| text.as_bytes().to_vec();
        let source = |source: &MountSource| match source {
            MountSource::Bind { path, access } => {
                Source::Bind { path: bytes(path.as_os_str()), read_only: *access == Access::ReadOnly }
            }
            MountSource::Tmpfs { size_bytes, access } => {
                Source::Tmpfs { size_bytes: *size_bytes, read_only: *access == Access::ReadOnly }
            }
        };
        Self {
            parent: rustix::process::getpid().as_raw_nonzero().get(),
            args: step.args.iter().map(|arg| bytes(arg)).collect(),
            env: step.environment().iter().map(|(name, value)| (bytes(name), bytes(value))).collect(),
            cwd: bytes(step.cwd.as_os_str()),
            uid: step.user.uid,
            gid: step.user.gid,
            groups: step.user.groups.clone(),
            rootfs: bytes(step.rootfs.as_os_str()),
            mounts: step.mounts.iter().map(|m| (bytes(m.target.as_os_str()), source(&m.source))).collect(),
            hostname: step.hostname.clone(),
            network: step.network != Network::None,
            limits: step.limits.iter().map(|limit| (limit.name().to_owned(), limit.soft, limit.hard)).collect(),
            captured: step.streams == Streams::Captured,
            insecure: step.insecure,
        }
    }
}

/// How it went, in one message.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Report {
    Exited(i32),
    Signaled(i32),
    /// The command can't be executed: docker's code for that, and why.
    NotStarted {
        code: i32,
        reason: String,
    },
    /// The sandbox can't be made.
    Failed {
        what: String,
        errno: i32,
    },
}

struct Reporter(OwnedFd);

impl Reporter {
    /// Nobody is left to tell when telling fails.
    fn say(&self, report: &Report) {
        let text = serde_json::to_vec(report).expect("numbers and text are always JSON");
        let _ = rustix::io::fcntl_dupfd_cloexec(&self.0, 0).map(|fd| File::from(fd).write_all(&text));
    }
}

#[derive(Debug)]
struct Failure {
    what: String,
    source: io::Error,
}

/// Names what failed.
trait Context<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Failure> {
        self.map_err(|source| Failure { what: what(), source: source.into() })
    }
}

/// The helper itself, in the host's pid namespace; its own exit code says how pid 1 ended.
fn outer(config: OwnedFd, reporter: &Reporter) -> Result<i32, Failure> {
    die_with_parent()?;
    let mut text = Vec::new();
    File::from(config).read_to_end(&mut text).context(|| "read the step".to_owned())?;
    let config: Config = serde_json::from_slice(&text)
        .map_err(|error| Failure { what: format!("understand the step ({error})"), source: Errno::INVAL.into() })?;
    // The parent died before its death could be asked about.
    if rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get()) != Some(config.parent) {
        return Err(Failure { what: "find the parent".to_owned(), source: Errno::SRCH.into() });
    }
    close_on_exec()?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).context(|| "hide the helper".to_owned())?;
    if config.captured {
        // No terminal of the caller's to open.
        rustix::process::setsid().context(|| "start a session".to_owned())?;
    }
    // Compiled here: in pid 1 less is allowed to go wrong.
    let filter = seccomp::filter();
    let mut namespaces = UnshareFlags::NEWNS | UnshareFlags::NEWPID | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    namespaces.set(UnshareFlags::NEWNET, !config.network);
    sys::unshare_helper(namespaces).context(|| "make namespaces (the built-in executor needs root)".to_owned())?;
    if !config.network {
        sys::raise_loopback().context(|| "start the loopback interface".to_owned())?;
    }
    let signals = Signals::block().context(|| "block signals".to_owned())?;
    // Ends when we do: tells pid 1 what its parent's number, which is 0 to it, can't.
    let (alive, held) =
        rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).context(|| "make a pipe".to_owned())?;
    let Some(init) = sys::fork_helper().context(|| "start pid 1".to_owned())? else {
        drop(held);
        let code = match inner(&config, &filter, &signals, reporter, &alive) {
            Ok(()) => 0,
            Err(failure) => {
                let errno = failure.source.raw_os_error().unwrap_or(0);
                reporter.say(&Report::Failed { what: failure.what, errno });
                1
            }
        };
        // Returning would have pid 1 go on as the helper.
        #[expect(clippy::disallowed_methods, reason = "a forked process has no main to return to and holds nothing")]
        std::process::exit(code);
    };
    loop {
        match signals.wait() {
            CHILD => {
                if let Ok(Some((_, status))) = rustix::process::waitpid(Some(init), WaitOptions::NOHANG) {
                    return Ok(status.terminating_signal().map_or(0, |signal| 128 + signal));
                }
            }
            // Pid 1's end is the end of its namespace; it is seen here as SIGCHLD once nothing is left.
            TERM => {
                let _ = rustix::process::kill_process(init, Signal::KILL);
            }
            _ => {}
        }
    }
}

const CHILD: i32 = Signal::CHILD.as_raw();
const TERM: i32 = Signal::TERM.as_raw();

fn die_with_parent() -> Result<(), Failure> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context(|| "follow the parent".to_owned())
}

/// Has every descriptor but the standard ones closed by the step's `exec`, also those that somebody leaked to us.
fn close_on_exec() -> Result<(), Failure> {
    let what = || "close descriptors".to_owned();
    let dir = inroot::open_dir(rustix::fs::CWD, b"/proc/self/fd").context(what)?;
    for name in inroot::names(dir.as_fd()).context(what)? {
        let number = std::str::from_utf8(&name).ok().and_then(|name| name.parse::<i32>().ok());
        if let Some(number) = number.filter(|number| *number > 2) {
            sys::set_close_on_exec(number);
        }
    }
    Ok(())
}

/// Pid 1: never returns before the step has ended.
fn inner(
    config: &Config,
    filter: &[Instruction],
    signals: &Signals,
    reporter: &Reporter,
    alive: &OwnedFd,
) -> Result<(), Failure> {
    die_with_parent()?;
    // The parent died before its death could be asked about.
    if rustix::io::read(alive, &mut [0]) != Err(Errno::AGAIN) {
        return Err(Failure { what: "find the parent".to_owned(), source: Errno::SRCH.into() });
    }
    rustix::system::sethostname(config.hostname.as_bytes()).context(|| "set the host name".to_owned())?;
    enter_root(config)?;
    rustix::process::umask(Mode::from_raw_mode(UMASK));
    if let Err(source) = change_directory(&config.cwd) {
        let what = format!("enter the working directory {}", String::from_utf8_lossy(&config.cwd));
        return Err(Failure { what, source });
    }
    set_limits(&config.limits)?;
    if !config.insecure {
        sys::install_filter(filter).context(|| "install the system call filter".to_owned())?;
        drop_capabilities()?;
    }
    let child = match start(config) {
        Ok(child) => child,
        Err((code, reason)) => {
            reporter.say(&Report::NotStarted { code, reason });
            return Ok(());
        }
    };
    let report = supervise(child, signals, config.captured);
    reporter.say(&report);
    Ok(())
}

/// Reaps whatever ends, until the step itself does; what is left then is killed by our own end.
fn supervise(step: Pid, signals: &Signals, captured: bool) -> Report {
    // A terminal sends these to the step itself.
    let from_terminal = [Signal::INT, Signal::QUIT, Signal::TSTP, Signal::WINCH];
    let passed_on = [Signal::HUP, Signal::TERM, Signal::USR1, Signal::USR2, Signal::CONT];
    loop {
        let number = signals.wait();
        if number == CHILD {
            while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
                if pid == step {
                    return match (status.exit_status(), status.terminating_signal()) {
                        (Some(code), _) => Report::Exited(code),
                        (None, Some(signal)) => Report::Signaled(signal),
                        (None, None) => continue,
                    };
                }
            }
        } else if let Some(signal) = Signal::from_named_raw(number)
            && (passed_on.contains(&signal) || (captured && from_terminal.contains(&signal)))
        {
            // Gone already: its end is the next signal.
            let _ = rustix::process::kill_process(step, signal);
        }
    }
}

/// Mounts everything and makes the tree the root.
fn enter_root(config: &Config) -> Result<(), Failure> {
    let rootfs = OsStr::from_bytes(&config.rootfs);
    let what = |what: &'static str| move || format!("{what} the root file system");
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context(|| "make mounts private".to_owned())?;
    let target = rustix::fs::open(rootfs, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .context(what("open"))?;
    let root = clone_tree(target.as_fd()).context(what("bind"))?;
    attach(&root, target.as_fd()).context(what("mount"))?;

    // Sources are the host's: opened before anything is mounted.
    let null = host_null()?;
    let mut sources = Vec::new();
    for (_, source) in &config.mounts {
        sources.push(match source {
            Source::Bind { path, .. } => {
                let path = OsStr::from_bytes(path);
                let tree = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
                    .and_then(|handle| clone_tree(handle.as_fd()))
                    .context(|| format!("open {}", path.display()))?;
                Some(tree)
            }
            Source::Tmpfs { .. } => None,
        });
    }

    let quiet =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let proc = fresh("proc", &[], quiet).context(|| "make /proc".to_owned())?;
    let mut sys = quiet;
    sys.set(MountAttrFlags::MOUNT_ATTR_RDONLY, !config.insecure);
    let sys = fresh("sysfs", &[], sys).context(|| "make /sys".to_owned())?;
    attach_at(&proc, &root, "/proc")?;
    mount_dev(&root, config.insecure)?;
    attach_at(&sys, &root, "/sys")?;
    if !config.insecure {
        restrict(&root, &null)?;
    }

    for ((target, source), tree) in config.mounts.iter().zip(sources) {
        let shown = || format!("mount {}", String::from_utf8_lossy(target));
        let (tree, is_dir) = match (tree, source) {
            (Some(tree), _) => {
                let is_dir = FileType::from_raw_mode(rustix::fs::fstat(&tree).context(shown)?.st_mode).is_dir();
                (tree, is_dir)
            }
            (None, Source::Tmpfs { size_bytes, read_only }) => {
                let size = size_bytes.map(|bytes| bytes.to_string());
                let mut options = vec![("mode", "1777")];
                options.extend(size.as_deref().map(|size| ("size", size)));
                let mut flags = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
                flags.set(MountAttrFlags::MOUNT_ATTR_RDONLY, *read_only);
                (fresh("tmpfs", &options, flags).context(shown)?, true)
            }
            (None, Source::Bind { .. }) => unreachable!("a bind's source is opened above"),
        };
        let point = mount_point(root.as_fd(), target, is_dir).context(shown)?;
        attach(&tree, point.as_fd()).context(shown)?;
        if let Source::Bind { read_only: true, .. } = source {
            make_read_only(tree.as_fd()).context(shown)?;
        }
    }

    rustix::process::fchdir(&root).context(what("enter"))?;
    rustix::process::pivot_root(".", ".").context(what("change to"))?;
    // The old root lies on top of the new one now, at the same place.
    rustix::mount::unmount(".", UnmountFlags::DETACH).context(|| "leave the host's file systems".to_owned())?;
    rustix::process::chdir("/").context(what("enter"))
}

/// A detached copy of a mount, with what is mounted below it.
fn clone_tree(handle: BorrowedFd<'_>) -> rustix::io::Result<OwnedFd> {
    // `AT_EMPTY_PATH` and `AT_RECURSIVE` are the same numbers in both sets.
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    rustix::mount::open_tree(handle, "", flags)
}

/// A new file system, mounted nowhere yet.
fn fresh(kind: &str, options: &[(&str, &str)], flags: MountAttrFlags) -> rustix::io::Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (name, value) in options {
        rustix::mount::fsconfig_set_string(context.as_fd(), *name, *value)?;
    }
    rustix::mount::fsconfig_create(context.as_fd())?;
    rustix::mount::fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, flags)
}

/// Puts a detached mount on what `point` is.
fn attach(mount: &OwnedFd, point: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(mount, "", point, "", flags)
}

/// The same at a directory of the root that is never a link.
fn attach_at(mount: &OwnedFd, root: &OwnedFd, path: &str) -> Result<(), Failure> {
    let what = || format!("mount {path}");
    let point =
        inroot::open_no_links(root.as_fd(), &path.as_bytes()[1..], OFlags::PATH | OFlags::DIRECTORY).context(what)?;
    attach(mount, point.as_fd()).context(what)
}

fn make_read_only(mount: BorrowedFd<'_>) -> rustix::io::Result<()> {
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    rustix::mount::mount_remount(inroot::fd_path(mount).as_str(), flags, "")
}

/// What a step's mount goes on. Missing ones can only lie in mounts made here: the tree's own were made before.
fn mount_point(root: BorrowedFd<'_>, target: &[u8], is_dir: bool) -> io::Result<OwnedFd> {
    let mut ignore = |_: BorrowedFd<'_>, _| Ok(());
    let resolved = inroot::resolve(root, target, Missing::Make(&mut ignore))?;
    let Some(name) = &resolved.name else {
        return Ok(rustix::fs::openat(resolved.dir(), ".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?);
    };
    if inroot::stat(resolved.dir(), name)?.is_none() {
        let name = OsStr::from_bytes(name);
        if is_dir {
            rustix::fs::mkdirat(resolved.dir(), name, Mode::from_raw_mode(0o755))?;
        } else {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(resolved.dir(), name, flags, Mode::from_raw_mode(0o644))?;
        }
    }
    inroot::open_handle(resolved.dir(), name)
}

/// The host's `/dev/null`, and really that: it goes over files that steps mustn't read.
fn host_null() -> Result<OwnedFd, Failure> {
    let what = || "open /dev/null".to_owned();
    let handle = rustix::fs::open("/dev/null", OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
        .context(what)?;
    let stat = rustix::fs::fstat(&handle).context(what)?;
    let is_null =
        FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == rustix::fs::makedev(1, 3);
    if is_null { Ok(handle) } else { Err(Failure { what: what(), source: Errno::NODEV.into() }) }
}

/// A `/dev` of the step's own.
fn mount_dev(root: &OwnedFd, insecure: bool) -> Result<(), Failure> {
    const DEVICES: [(&str, u32, u32); 6] =
        [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
    const LINKS: [(&str, &str); 6] = [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
        ("ptmx", "pts/ptmx"),
        ("core", "/proc/kcore"),
    ];
    let what = |name: &str| {
        let name = name.to_owned();
        move || format!("make /dev/{name}")
    };
    rustix::process::umask(Mode::empty());
    let dev =
        fresh("tmpfs", &[("mode", "755"), ("size", DEV_SIZE)], MountAttrFlags::MOUNT_ATTR_NOSUID).context(what(""))?;
    attach_at(&dev, root, "/dev")?;
    let dev = inroot::open_dir(root.as_fd(), b"dev").context(what(""))?;
    for (name, major, minor) in DEVICES {
        let device = rustix::fs::makedev(major, minor);
        let mode = Mode::from_raw_mode(0o666);
        match rustix::fs::mknodat(&dev, name, FileType::CharacterDevice, mode, device) {
            Ok(()) => {}
            // Inside a container that may not make devices, the host's own does.
            Err(Errno::PERM) => bind_device(&dev, name).context(what(name))?,
            Err(error) => return Err(error).context(what(name)),
        }
    }
    let more = if insecure { sandbox::insecure_devices() } else { Vec::new() };
    for device in more {
        if let Some((parent, _)) = device.name.split_once('/') {
            rustix::fs::mkdirat(&dev, parent, Mode::from_raw_mode(0o755)).context(what(parent))?;
        }
        bind_device(&dev, device.name).context(what(device.name))?;
    }
    for (name, target) in LINKS {
        rustix::fs::symlinkat(target, &dev, name).context(what(name))?;
    }
    let quiet = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let quieter = quiet | MountAttrFlags::MOUNT_ATTR_NODEV;
    let pts = fresh("devpts", &[("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")], quiet);
    let shm = fresh("tmpfs", &[("mode", "1777"), ("size", DEV_SIZE)], quieter);
    let mqueue = fresh("mqueue", &[], quieter);
    for (name, mount) in [("pts", pts), ("shm", shm), ("mqueue", mqueue)] {
        let mount = match mount {
            // A kernel without POSIX message queues.
            Err(Errno::NODEV) if name == "mqueue" => continue,
            mount => mount.context(what(name))?,
        };
        rustix::fs::mkdirat(&dev, name, Mode::from_raw_mode(0o755)).context(what(name))?;
        let point = inroot::open_dir(dev.as_fd(), name.as_bytes()).context(what(name))?;
        attach(&mount, point.as_fd()).context(what(name))?;
    }
    Ok(())
}

fn bind_device(dev: &OwnedFd, name: &str) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let host = rustix::fs::open(Path::new("/dev").join(name), flags, Mode::empty())?;
    let mount = clone_tree(host.as_fd())?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(dev, name, flags, Mode::from_raw_mode(0o666))?;
    let point = rustix::fs::openat(dev, name, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
    Ok(attach(&mount, point.as_fd())?)
}

/// Hides and write-protects what docker does. Only `/proc` and `/sys` made here are touched: no link is followed.
fn restrict(root: &OwnedFd, null: &OwnedFd) -> Result<(), Failure> {
    let open = |path: &str| match inroot::open_no_links(root.as_fd(), &path.as_bytes()[1..], OFlags::PATH) {
        // Not every kernel has every file.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        other => other.map(Some),
    };
    for path in READONLY_PATHS {
        let what = || format!("protect {path}");
        if let Some(point) = open(path).context(what)? {
            let mount = clone_tree(point.as_fd()).context(what)?;
            attach(&mount, point.as_fd()).context(what)?;
            let flags =
                MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            rustix::mount::mount_remount(inroot::fd_path(mount.as_fd()).as_str(), flags, "").context(what)?;
        }
    }
    for path in MASKED_PATHS {
        let what = || format!("mask {path}");
        if let Some(point) = open(path).context(what)? {
            let is_dir = FileType::from_raw_mode(rustix::fs::fstat(&point).context(what)?.st_mode).is_dir();
            let mount = if is_dir {
                fresh("tmpfs", &[("size", "0"), ("mode", "555")], MountAttrFlags::MOUNT_ATTR_RDONLY)
            } else {
                clone_tree(null.as_fd())
            };
            attach(&mount.context(what)?, point.as_fd()).context(what)?;
        }
    }
    Ok(())
}

/// Enters a directory of the new root. `/proc`'s links to descriptors lead out of it and are refused (CVE-2024-21626).
fn change_directory(path: &[u8]) -> io::Result<()> {
    let root = inroot::open_dir(rustix::fs::CWD, b"/")?;
    Ok(rustix::process::fchdir(inroot::open(root.as_fd(), path, OFlags::PATH | OFlags::DIRECTORY)?)?)
}

/// Leaves docker's capabilities, and no way to get another.
fn drop_capabilities() -> Result<(), Failure> {
    let what = || "drop capabilities".to_owned();
    let keep = CAPABILITIES.iter().fold(CapabilitySet::empty(), |set, (_, number)| set | capability(*number));
    // The highest number isn't known: the kernel says when it is passed.
    for number in 0..64 {
        let one = capability(number);
        match rustix::thread::capability_is_in_bounding_set(one) {
            Ok(true) if !keep.contains(one) => {
                rustix::thread::remove_capability_from_bounding_set(one).context(what)?;
            }
            Ok(_) => {}
            Err(_) => break,
        }
    }
    // Fails on kernels that have none, which is as good.
    let _ = rustix::thread::clear_ambient_capability_set();
    let have = rustix::thread::capabilities(None).context(what)?.permitted;
    let sets = CapabilitySets { effective: keep & have, permitted: keep & have, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).context(what)
}

/// Limits this process, and so the step: raising one needs a capability that goes next.
fn set_limits(limits: &[(String, Option<u64>, Option<u64>)]) -> Result<(), Failure> {
    for (name, soft, hard) in limits {
        let what = || format!("set the limit {name}");
        let resource = match name.as_str() {
            "as" => Resource::As,
            "core" => Resource::Core,
            "cpu" => Resource::Cpu,
            "data" => Resource::Data,
            "fsize" => Resource::Fsize,
            "locks" => Resource::Locks,
            "memlock" => Resource::Memlock,
            "msgqueue" => Resource::Msgqueue,
            "nice" => Resource::Nice,
            "nofile" => Resource::Nofile,
            "nproc" => Resource::Nproc,
            "rss" => Resource::Rss,
            "rtprio" => Resource::Rtprio,
            "sigpending" => Resource::Sigpending,
            "stack" => Resource::Stack,
            _ => return Err(Failure { what: what(), source: Errno::INVAL.into() }),
        };
        rustix::process::setrlimit(resource, Rlimit { current: *soft, maximum: *hard }).context(what)?;
    }
    Ok(())
}

fn capability(number: u32) -> CapabilitySet {
    CapabilitySet::from_bits_retain(1 << number)
}

/// Starts the step; docker's exit code and a reason if that can't be.
fn start(config: &Config) -> Result<Pid, (i32, String)> {
    let name = OsStr::from_bytes(&config.args[0]);
    let path = config.env.iter().rev().find(|(name, _)| name == b"PATH").map(|(_, value)| value.as_slice());
    let program = find_program(name, path.unwrap_or(DEFAULT_PATH.as_bytes()))?;
    let mut command = Command::new(&program);
    command.arg0(name).args(config.args[1..].iter().map(|arg| OsStr::from_bytes(arg))).env_clear();
    command.envs(config.env.iter().map(|(name, value)| (OsStr::from_bytes(name), OsStr::from_bytes(value))));
    let user = User { uid: config.uid, gid: config.gid, groups: config.groups.clone() };
    sys::run_as(&mut command, &user, config.insecure);
    match command.spawn() {
        Ok(child) => {
            Ok(i32::try_from(child.id()).ok().and_then(Pid::from_raw).expect("a process has a positive number"))
        }
        Err(error) => {
            let code = match error.kind() {
                // The program was found: it is its interpreter that is missing.
                io::ErrorKind::NotFound => ExitStatus::NOT_FOUND,
                _ => ExitStatus::NOT_EXECUTABLE,
            };
            Err((code, format!("{}: {error}", program.display())))
        }
    }
}

/// Looks for a program as Go's `LookPath` and so docker does: the first executable regular file of that name.
fn find_program(name: &OsStr, path: &[u8]) -> Result<OsString, (i32, String)> {
    if name.as_bytes().contains(&b'/') {
        return match std::fs::metadata(name) {
            Ok(metadata) if metadata.is_dir() => {
                Err((ExitStatus::NOT_EXECUTABLE, format!("{}: is a directory", name.display())))
            }
            Ok(_) => Ok(name.to_owned()),
            Err(error) if error.kind() == io::ErrorKind::NotFound || error.kind() == io::ErrorKind::NotADirectory => {
                Err((ExitStatus::NOT_FOUND, format!("{}: no such file", name.display())))
            }
            Err(error) => Err((ExitStatus::NOT_EXECUTABLE, format!("{}: {error}", name.display()))),
        };
    }
    let mut found = None;
    for dir in path.split(|byte| *byte == b':') {
        // An empty entry is the working directory.
        let dir = if dir.is_empty() { b"." } else { dir };
        let candidate = OsString::from_vec([dir, b"/", name.as_bytes()].concat());
        let Ok(metadata) = std::fs::metadata(&candidate) else { continue };
        if !metadata.is_file() {
            continue;
        }
        if std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o111 != 0 {
            return Ok(candidate);
        }
        found = Some(candidate);
    }
    match found {
        Some(candidate) => Err((ExitStatus::NOT_EXECUTABLE, format!("{}: not executable", candidate.display()))),
        None => Err((ExitStatus::NOT_FOUND, format!("{}: not found in $PATH", name.display()))),
    }
}
