//! Steps run by an OCI runtime: crun, runc, or what behaves like them.
//!
//! ```text
//! <state dir>/runtime/state/    the runtime's own, given as --root
//! <state dir>/runtime/bundles/<id>/config.json, log
//! <state dir>/memory/<number>/    both, for a step with secrets: a tmpfs of its own
//! ```
//!
//! Both go with their step. What a dead process left is deleted by the next that the state directory belongs to, before
//! it makes an executor ([`super::end_leftovers`]).

use std::ffi::{CStr, OsStr, OsString};
use std::io::Write;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde_json::{Value, json};

use super::builtin::{copy_streams, pid_of};
use super::sandbox::{self, CAPABILITIES, DEV_SIZE, MASKED_PATHS, READONLY_PATHS, UMASK};
use super::stubs::Stubs;
use super::{
    Access, Cancel, ExecError, Executor, ExitStatus, MemoryDir, MountSource, Network, Step, Streams, memory, seccomp,
    sys,
};

/// Numbers the containers of this process: their cgroups and host-wide names are the same whatever the state directory.
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// How long to wait between attempts to kill a container: one that is just being made has no process yet.
const KILL_AGAIN: Duration = Duration::from_millis(20);
/// After how many attempts the runtime itself is killed: five seconds, in which it only has to see its child's end.
const KILL_ROUNDS: u32 = 250;

/// Where systemd mounts cgroup v2 beside v1.
const HYBRID_MOUNT: &CStr = c"/sys/fs/cgroup/unified";
/// What it says there that v2 controls.
const HYBRID_CONTROLLERS: &str = "/sys/fs/cgroup/unified/cgroup.controllers";

/// Names the runtime that a state directory is used with.
const PROGRAM: &str = "program";

/// Where a runtime keeps its own state.
const STATE: &str = "state";
/// Where the containers are described.
const BUNDLES: &str = "bundles";

/// How much of a runtime's log is looked at, in bytes.
const LOG_BYTES_MAX: usize = 64 << 10;

/// Runs steps with an OCI runtime.
#[derive(Debug)]
pub struct OciRuntime {
    program: PathBuf,
    name: String,
    /// The state directory.
    state_dir: PathBuf,
    /// `runtime` in it.
    dir: PathBuf,
    /// Whether the runtime can be told to leave cgroups alone.
    cgroups: Cgroups,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Cgroups {
    /// `--cgroup-manager=disabled`: a step stays in our cgroup, so that a limit on us is a limit on it.
    Disabled,
    /// The runtime makes one for each container.
    Own,
}

/// Whether there is something executable.
pub(super) fn is_program(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.permissions().mode() & 0o111 != 0)
}

impl OciRuntime {
    /// With the runtime at `program`. What it left under `state_dir` before stays: it may be another request's of this
    /// process (`end_leftovers`).
    ///
    /// # Errors
    /// [`ExecError::NoRuntime`], [`ExecError::Io`].
    pub fn new(program: &Path, state_dir: &Path) -> Result<Self, ExecError> {
        if !is_program(program) {
            return Err(ExecError::NoRuntime { path: program.to_owned() });
        }
        let state_dir = std::path::absolute(state_dir).map_err(|source| ExecError::Io {
            op: "find",
            path: state_dir.to_owned(),
            source,
        })?;
        let dir = state_dir.join("runtime");
        for sub in [STATE, BUNDLES] {
            let path = dir.join(sub);
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(|source| ExecError::Io { op: "make the directory", path, source })?;
        }
        let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let cgroups = if name.contains("crun") { Cgroups::Disabled } else { Cgroups::Own };
        // Whoever finds this directory after our death needs to know what to clean up with.
        let note = dir.join(PROGRAM);
        std::fs::write(&note, program.as_os_str().as_bytes()).map_err(|source| ExecError::Io {
            op: "write",
            path: note,
            source,
        })?;
        Ok(Self { program: program.to_owned(), name, state_dir, dir, cgroups })
    }

    /// Ends what a dead process left in `state_dir`, with the runtime that it used.
    pub(super) fn end_leftovers(state_dir: &Path) {
        let Ok(program) = std::fs::read(state_dir.join("runtime").join(PROGRAM)) else { return };
        // One that is gone cannot, and then nobody can.
        drop(Self::new(Path::new(OsStr::from_bytes(&program)), state_dir).map(|runtime| runtime.sweep()));
    }

    /// Deletes what a dead process left. What can't be deleted harms nobody: ids are never used twice.
    fn sweep(&self) {
        let roots = memory::all(&self.state_dir).map(|dir| dir.join(STATE)).chain([self.dir.join(STATE)]);
        for root in roots {
            for entry in std::fs::read_dir(&root).into_iter().flatten().flatten() {
                self.delete(&root, &entry.file_name());
            }
        }
        for entry in std::fs::read_dir(self.dir.join(BUNDLES)).into_iter().flatten().flatten() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }

    fn command(&self, root: &Path) -> Command {
        let mut command = Command::new(&self.program);
        command.env_clear().current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // runc looks for its helpers there.
        command.env("PATH", super::sandbox::DEFAULT_PATH);
        command.arg("--root").arg(root);
        if self.cgroups == Cgroups::Disabled {
            command.arg("--cgroup-manager=disabled");
            // crun refuses to start at all where cgroup v2 has controllers beside v1, cgroups wanted or not.
            if std::fs::read(HYBRID_CONTROLLERS).is_ok_and(|controllers| !controllers.trim_ascii().is_empty()) {
                sys::hide_mount(&mut command, HYBRID_MOUNT);
            }
        }
        command
    }

    /// crun takes what stands before a colon for a kind of log, and a state directory may have a colon in its name.
    fn log_argument(&self, log: &Path) -> OsString {
        let mut argument = OsString::from(if self.name.contains("crun") { "file:" } else { "" });
        argument.push(log);
        argument
    }

    /// Kills everything in a container and forgets it.
    fn delete(&self, root: &Path, id: &OsStr) {
        let _ = self.command(root).args([OsStr::new("delete"), OsStr::new("--force"), id]).status();
    }

    fn run_in(
        &self,
        id: &str,
        dir: &Path,
        step: &Step,
        stdout: &mut (dyn Write + Send),
        stderr: &mut (dyn Write + Send),
        cancel: &Cancel,
    ) -> Result<ExitStatus, ExecError> {
        let failed = |op, path: &Path| {
            let path = path.to_owned();
            move |source| ExecError::Io { op, path, source }
        };
        let (root, bundle) = (dir.join(STATE), dir.join(BUNDLES).join(id));
        let config = self.config(step, id)?;
        let config_path = bundle.join("config.json");
        std::fs::write(&config_path, config.to_string()).map_err(failed("write", &config_path))?;
        let log = bundle.join("log");
        let mut command = self.command(&root);
        command
            .arg("--log")
            .arg(self.log_argument(&log))
            .args(["--log-format", "json", "run", "--bundle"])
            .arg(&bundle)
            .arg(id);
        match step.streams {
            Streams::Captured => command.stdout(Stdio::piped()).stderr(Stdio::piped()),
            Streams::Inherited { .. } => {
                command.stdin(Stdio::inherit()).stdout(Stdio::inherit()).stderr(Stdio::inherit())
            }
        };
        let mut child = command.spawn().map_err(failed("start", &self.program))?;

        let state = Arc::new((Mutex::new(Running { kill: false, ended: false, rounds: 0 }), Condvar::new()));
        let kill = {
            let state = Arc::clone(&state);
            move || change(&state, |running| running.kill = true)
        };
        let guard = cancel.on_cancel(kill.clone());
        let pid = pid_of(&child);
        let ended = std::thread::scope(|scope| {
            scope.spawn(|| kill_when_asked(&state, pid));
            let copied = copy_streams(&mut child, stdout, stderr, &kill);
            // Seen to have ended, and noted, before it is reaped: whoever kills relies on the number.
            let how = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            while matches!(rustix::process::waitid(WaitId::Pid(pid), how), Err(rustix::io::Errno::INTR)) {}
            change(&state, |running| running.ended = true);
            child.wait().map(|ended| (ended, copied))
        });
        drop(guard);
        let (ended, copied) = ended.map_err(failed("wait for", &self.program))?;
        // A runtime that was killed itself left its container.
        if ended.code().is_none() || cancel.is_canceled() {
            self.delete(&root, OsStr::new(id));
        }
        if cancel.is_canceled() {
            return Err(ExecError::Canceled);
        }
        copied.map_err(|source| ExecError::Output { source })?;
        match ended.code() {
            Some(0) => Ok(ExitStatus::exited(0)),
            Some(code) => self.explain(code, &log),
            None => Err(ExecError::HelperLost { status: ended.to_string() }),
        }
    }

    /// Tells a step that failed from a runtime that did: only the latter writes errors to the log.
    fn explain(&self, code: i32, log: &Path) -> Result<ExitStatus, ExecError> {
        let text = std::fs::read(log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text[..text.len().min(LOG_BYTES_MAX)]).into_owned();
        let errors: Vec<String> = text
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .filter(|entry| matches!(entry["level"].as_str(), Some("error" | "fatal")))
            .filter_map(|entry| entry["msg"].as_str().map(str::to_owned))
            .collect();
        let Some(message) = errors.last() else {
            return Ok(if code > 128 && code < 128 + 65 {
                ExitStatus::signalled(code - 128)
            } else {
                ExitStatus::exited(code)
            });
        };
        // The words are those of execve's errors, in Go's, glibc's and crun's spelling: docker decides by them, too.
        let lower = message.to_lowercase();
        let about_command = lower.contains("exec") || lower.contains("open executable");
        let code = match () {
            () if !about_command => None,
            () if ["not found", "no such file"].iter().any(|text| lower.contains(text)) => Some(ExitStatus::NOT_FOUND),
            () if ["permission denied", "not permitted", "is a directory", "exec format error", "not executable"]
                .iter()
                .any(|text| lower.contains(text)) =>
            {
                Some(ExitStatus::NOT_EXECUTABLE)
            }
            () => None,
        };
        match code {
            Some(code) => Ok(ExitStatus { code, reason: Some(message.clone()) }),
            None => Err(ExecError::Runtime { runtime: self.name.clone(), message: errors.join("; ") }),
        }
    }

    /// The bundle's `config.json` (runtime-spec 1.0).
    fn config(&self, step: &Step, id: &str) -> Result<Value, ExecError> {
        let capabilities: Vec<&str> = match step.insecure {
            true => sandbox::own_capabilities(),
            false => CAPABILITIES.iter().map(|(name, _)| *name).collect(),
        };
        // What a process starts with beyond root's: only what nobody restricts.
        let beyond: &[&str] = if step.insecure { &capabilities } else { &[] };
        let args = step.args.iter().map(|arg| text(arg)).collect::<Result<Vec<_>, _>>()?;
        let env = step
            .environment()
            .iter()
            .map(|(name, value)| Ok(format!("{}={}", text(name)?, text(value)?)))
            .collect::<Result<Vec<_>, ExecError>>()?;
        let terminal = matches!(step.streams, Streams::Inherited { terminal: true });
        let mut mounts = vec![
            json!({ "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] }),
            json!({ "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "mode=755", format!("size={DEV_SIZE}")] }),
            json!({ "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] }),
            json!({ "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", format!("size={DEV_SIZE}")] }),
            json!({ "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                "options": ["nosuid", "noexec", "nodev"] }),
            json!({ "destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", if step.insecure { "rw" } else { "ro" }] }),
        ];
        for mount in &step.mounts {
            let target = text(mount.target.as_os_str())?;
            mounts.push(match &mount.source {
                MountSource::Bind { path, access } => json!({
                    "destination": target, "type": "bind", "source": text(path.as_os_str())?,
                    "options": match access {
                        Access::ReadOnly => vec!["rbind", "ro", "nosuid", "nodev"],
                        Access::ReadWrite => vec!["rbind", "rw"],
                    },
                }),
                MountSource::Tmpfs { size_bytes, access } => {
                    let mut options = vec!["nosuid".to_owned(), "nodev".to_owned(), "mode=1777".to_owned()];
                    if *access == Access::ReadOnly {
                        options.push("ro".to_owned());
                    }
                    options.extend(size_bytes.map(|bytes| format!("size={bytes}")));
                    json!({ "destination": target, "type": "tmpfs", "source": "tmpfs", "options": options })
                }
            });
        }
        let mut namespaces = vec![
            json!({ "type": "mount" }),
            json!({ "type": "pid" }),
            json!({ "type": "ipc" }),
            json!({ "type": "uts" }),
        ];
        if step.network == Network::None {
            namespaces.push(json!({ "type": "network" }));
        }
        let limits = step.limits.iter().map(|limit| {
            json!({
                "type": format!("RLIMIT_{}", limit.name().to_uppercase()),
                // What RLIM_INFINITY is.
                "soft": limit.soft.unwrap_or(u64::MAX), "hard": limit.hard.unwrap_or(u64::MAX),
            })
        });
        let mut linux = json!({
            "namespaces": namespaces,
        });
        if step.insecure {
            let devices = sandbox::insecure_devices().into_iter().map(|device| {
                json!({ "path": format!("/dev/{}", device.name), "type": if device.is_block { "b" } else { "c" },
                    "major": device.major, "minor": device.minor })
            });
            linux["devices"] = devices.collect();
        } else {
            linux["maskedPaths"] = json!(MASKED_PATHS);
            linux["readonlyPaths"] = json!(READONLY_PATHS);
            linux["seccomp"] = seccomp::oci_profile();
        }
        if self.cgroups == Cgroups::Own {
            linux["cgroupsPath"] = json!(format!("/{id}"));
            linux["resources"] = json!({ "devices": [{ "allow": true, "access": "rwm" }] });
        }
        Ok(json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": terminal,
                "user": {
                    "uid": step.user.uid, "gid": step.user.gid, "additionalGids": step.user.groups, "umask": UMASK,
                },
                "args": args,
                "env": env,
                "cwd": text(step.cwd.as_os_str())?,
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
                    "inheritable": beyond, "ambient": beyond,
                },
                "noNewPrivileges": false,
                "rlimits": limits.collect::<Vec<_>>(),
            },
            "root": { "path": text(step.rootfs.as_os_str())?, "readonly": false },
            "hostname": step.hostname,
            "mounts": mounts,
            "linux": linux,
        }))
    }
}

/// The configuration is JSON, which has no bytes.
fn text(words: &OsStr) -> Result<&str, ExecError> {
    words.to_str().ok_or(ExecError::InvalidStep {
        what: "an OCI runtime takes only UTF-8; the built-in executor takes any bytes",
    })
}

/// Waits for the end or for the wish to end it.
///
/// The container's first process is a child of the runtime, and its end is the end of all others. It is killed by us: a
/// runtime asked to do that while it is still starting the container may forget it without killing anything (seen with
/// crun 1.8.1). The runtime then sees its container end and tidies up as ever.
fn kill_when_asked(state: &(Mutex<Running>, Condvar), runtime: Pid) {
    let (lock, changed) = state;
    let mut running = lock.lock().unwrap_or_else(PoisonError::into_inner);
    while !running.ended {
        if running.kill {
            // The lock is kept: the runtime isn't reaped meanwhile, so its number is its own.
            running.rounds += 1;
            kill_children(runtime);
            if running.rounds > KILL_ROUNDS {
                // It has no child and doesn't end: it is stuck.
                let _ = rustix::process::kill_process(runtime, Signal::KILL);
            }
            running = changed.wait_timeout(running, KILL_AGAIN).unwrap_or_else(PoisonError::into_inner).0;
        } else {
            running = changed.wait(running).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Kills the children of a process of ours that can't be reaped meanwhile.
fn kill_children(parent: Pid) {
    let is_child = |pid: Pid| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // "pid (name, which may hold anything) state ppid …"
        let parent_of = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)).map(str::parse::<i32>);
        parent_of == Some(Ok(parent.as_raw_nonzero().get()))
    };
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        let Some(pid) = pid.filter(|pid| is_child(*pid)) else { continue };
        // Looked at again once it is held: a number may have gone to somebody else in between.
        if let Ok(handle) = rustix::process::pidfd_open(pid, PidfdFlags::empty())
            && is_child(pid)
        {
            let _ = rustix::process::pidfd_send_signal(&handle, Signal::KILL);
        }
    }
}

struct Running {
    kill: bool,
    ended: bool,
    /// How often it was killed.
    rounds: u32,
}

fn change(state: &(Mutex<Running>, Condvar), change: impl FnOnce(&mut Running)) {
    change(&mut state.0.lock().unwrap_or_else(PoisonError::into_inner));
    state.1.notify_all();
}

impl Executor for OciRuntime {
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
        let id = format!("plies-{}-{}", std::process::id(), NEXT_ID.fetch_add(1, Ordering::Relaxed));
        let memory = if step.secret { Some(MemoryDir::new(&self.state_dir)?) } else { None };
        let dir = memory.as_ref().map_or(self.dir.as_path(), MemoryDir::path);
        let bundle = dir.join(BUNDLES).join(&id);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&bundle).map_err(|source| ExecError::Io {
            op: "make the bundle",
            path: bundle.clone(),
            source,
        })?;
        let result = Stubs::make(step).and_then(|mut stubs| {
            let result = self.run_in(&id, dir, step, stdout, stderr, cancel);
            let removed = stubs.remove();
            let status = result?;
            removed.map(|()| status)
        });
        // The environment stands in it: it goes whatever happened.
        let removed = std::fs::remove_dir_all(&bundle);
        let status = result?;
        removed.map_err(|source| ExecError::Io { op: "remove the bundle", path: bundle, source })?;
        Ok(status)
    }

    fn name(&self) -> &str {
        &self.name
    }
}
