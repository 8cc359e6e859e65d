//! The other programs, with their state kept inside a scratch directory.
//!
//! They are the oracle: what they read, write and unpack says whether Plies is right. A laptop may
//! lack them, and then a test says aloud that it did not run; where `CI` is set it fails instead.

use std::{
    ffi::OsStr,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

/// Whether every one of these programs is there. If not, says which test is skipped for want of
/// what, or fails where `CI` is set.
///
/// # Panics
/// When `CI` is set and a program is missing.
#[track_caller]
pub fn have(programs: &[&str]) -> bool {
    let missing: Vec<_> = programs.iter().filter(|program| find(program).is_none()).collect();
    skip_unless(missing.is_empty(), &format!("not installed: {missing:?}"))
}

/// Whether the test runs as root, which mounts, devices and owners need.
///
/// # Panics
/// When `CI` is set and it does not.
#[track_caller]
pub fn privileged() -> bool {
    skip_unless(rustix::process::geteuid().is_root(), "needs root")
}

#[track_caller]
fn skip_unless(fine: bool, reason: &str) -> bool {
    if !fine {
        let place = std::panic::Location::caller();
        assert!(std::env::var_os("CI").is_none(), "{place}: {reason}; scripts/test.sh installs what the tests need");
        eprintln!("SKIPPED {place}: {reason}");
    }
    fine
}

/// Where a program is found, looking where root's programs are as well.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// The first user, of [`USERS_MAPPED`], that root of [`in_user_namespace`] is outside of it.
pub const MAPPED_ROOT: u32 = 100_000;

/// How many users and groups there are in [`in_user_namespace`].
pub const USERS_MAPPED: u32 = 65_536;

/// Runs a program to its end as root of a user namespace of its own, with mounts of its own. To be called as root.
///
/// # Panics
/// When it cannot be started.
pub fn in_user_namespace(program: &Path, args: &[&str], env: &[(&str, &OsStr)]) -> Output {
    // It waits until its users are known, and becomes root among them then.
    let wait = r#"read go; exec setpriv --reuid 0 --regid 0 --clear-groups -- "$0" "$@""#;
    let mut command = Command::new("unshare");
    command.args(["--user", "--mount", "--keep-caps", "--", "sh", "-c", wait]).arg(program).args(args);
    command.envs(env.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap_or_else(|error| panic!("start unshare: {error}"));
    let proc = PathBuf::from(format!("/proc/{}", child.id()));
    let own = std::fs::read_link("/proc/self/ns/user").ok();
    let inside = || std::fs::read_link(proc.join("ns/user")).is_ok_and(|theirs| Some(theirs) != own);
    assert!(crate::eventually(inside), "unshare makes no user namespace");
    for map in ["uid_map", "gid_map"] {
        std::fs::write(proc.join(map), format!("0 {MAPPED_ROOT} {USERS_MAPPED}"))
            .unwrap_or_else(|error| panic!("write {map}: {error}"));
    }
    let mut input = child.stdin.take().expect("because it was asked for");
    input.write_all(b"go\n").unwrap_or_else(|error| panic!("tell it to go on: {error}"));
    drop(input);
    child.wait_with_output().unwrap_or_else(|error| panic!("wait for {}: {error}", program.display()))
}

/// Runs a command that must succeed and returns what it printed to stdout.
///
/// # Panics
/// With everything it printed, when it fails.
#[track_caller]
pub fn run(command: &mut Command) -> String {
    let output = output_of(command);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command to its end, whatever it says.
///
/// # Panics
/// When it cannot be started.
#[track_caller]
pub fn output_of(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|error| panic!("start {command:?}: {error}"))
}

/// A command of the containers family (podman, buildah, skopeo) whose storage, run directory and
/// configuration lie in `state`.
pub fn containers(program: &str, state: &Path) -> Command {
    let mut command = Command::new(program);
    let write = |name: &str, text: &str| {
        let path = state.join(name);
        std::fs::create_dir_all(state).and_then(|()| std::fs::write(&path, text)).expect("because the scratch is ours");
        path
    };
    let storage = format!(
        "[storage]\ndriver = \"overlay\"\ngraphroot = \"{0}/storage\"\nrunroot = \"{0}/run\"\n",
        state.display()
    );
    command.env("CONTAINERS_STORAGE_CONF", write("storage.conf", &storage));
    // Big blobs are spooled here; /tmp may be memory.
    command.env("TMPDIR", state).env("HOME", state).env("XDG_RUNTIME_DIR", state.join("xdg"));
    if program == "skopeo" {
        command.arg("--policy").arg(write("policy.json", r#"{"default":[{"type":"insecureAcceptAnything"}]}"#));
    }
    command
}

/// What `umoci unpack` makes of an image in an OCI layout directory: the path of the root.
pub fn umoci_unpack(layout: &Path, tag: &str, bundle: &Path) -> PathBuf {
    let image = [layout.as_os_str(), OsStr::new(":"), OsStr::new(tag)].concat_os();
    run(Command::new("umoci").args(["unpack", "--image"]).arg(image).arg(bundle));
    bundle.join("rootfs")
}

trait ConcatOs {
    fn concat_os(&self) -> std::ffi::OsString;
}

impl ConcatOs for [&OsStr] {
    fn concat_os(&self) -> std::ffi::OsString {
        self.iter().fold(std::ffi::OsString::new(), |mut all, part| {
            all.push(part);
            all
        })
    }
}
