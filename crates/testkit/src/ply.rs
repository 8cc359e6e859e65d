//! Runs the binary on a store of its own.

use std::{
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use crate::{scratch::Scratch, tools};

/// Arguments of a command: text and paths side by side.
#[macro_export]
macro_rules! args {
    ($($arg:expr),* $(,)?) => { &[$(::std::ffi::OsString::from(&$arg)),*] as &[::std::ffi::OsString] };
}

/// A store in a scratch directory, and the binary that works on it.
#[derive(Debug)]
pub struct Ply {
    binary: PathBuf,
    driver: Option<OsString>,
    // Dropped last: it unmounts and removes the store.
    scratch: Scratch,
}

/// What one run printed.
#[derive(Debug)]
pub struct Ran {
    /// How it ended.
    pub status: ExitStatus,
    /// Its results.
    pub stdout: String,
    /// Everything else it said.
    pub stderr: String,
}

impl Ply {
    /// An empty store for this binary.
    pub fn new(binary: impl Into<PathBuf>) -> Self {
        Self { binary: binary.into(), driver: std::env::var_os("PLY_DRIVER"), scratch: Scratch::new() }
    }

    /// The same with this driver, for a test that looks at what that one keeps.
    #[must_use]
    pub fn with_driver(self, driver: &str) -> Self {
        Self { driver: Some(driver.into()), ..self }
    }

    /// The directory of the test, which the store is a part of.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// The state directory, made by the binary itself.
    pub fn root(&self) -> PathBuf {
        self.scratch.join("root")
    }

    /// A command on this store, with no settings from outside but the driver: `PLY_DRIVER=erofs` has a whole test run try
    /// that one.
    pub fn command(&self, args: &[OsString]) -> Command {
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(self.root()).args(args);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", self.scratch.path());
        // Nothing may be fetched from outside while tests run: whoever tries finds a port that nobody listens on.
        command.env("https_proxy", "http://127.0.0.1:1");
        command.envs(self.driver.as_ref().map(|driver| ("PLY_DRIVER", driver)));
        command.current_dir(self.scratch.path()).stdin(Stdio::null());
        command
    }

    /// Whether the driver `erofs` works here. Says aloud if not.
    pub fn has_erofs(&self) -> bool {
        let why = self.json(args!["info"])["erofs_unusable"].take();
        if let Some(why) = why.as_str() {
            eprintln!("SKIPPED: {why}");
        }
        why.is_null()
    }

    /// Runs to the end, however that is.
    pub fn run(&self, args: &[OsString]) -> Ran {
        Ran::of(&mut self.command(args))
    }

    /// Runs a command that must succeed.
    #[track_caller]
    pub fn ok(&self, args: &[OsString]) -> Ran {
        let ran = self.run(args);
        assert!(ran.status.success(), "ply {args:?}: {ran}");
        ran
    }

    /// Runs a command that must fail with this exit code, and say so on stderr only, without a panic.
    #[track_caller]
    pub fn fails(&self, code: i32, args: &[OsString]) -> Ran {
        let ran = self.run(args);
        assert_eq!(ran.status.code(), Some(code), "ply {args:?}: {ran}");
        assert!(!ran.stderr.trim().is_empty(), "ply {args:?} failed without a word");
        assert!(!ran.stderr.contains("panicked"), "ply {args:?}: {ran}");
        ran
    }

    /// Runs a command with `--json` and parses the one document it prints.
    #[track_caller]
    pub fn json(&self, args: &[OsString]) -> serde_json::Value {
        let ran = self.ok(&[args, args!["--json"]].concat());
        serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("ply {args:?} --json: {error}: {ran}"))
    }

    /// Mounts an image (or any id) read-only until the guard is dropped.
    #[track_caller]
    pub fn mount(&self, image: &str) -> Mounted<'_> {
        self.mount_with(image, &[])
    }

    /// Mounts with more options.
    #[track_caller]
    pub fn mount_with(&self, image: &str, options: &[OsString]) -> Mounted<'_> {
        let parent = self.scratch.dir("mnt");
        let path = (0..).map(|n| parent.join(n.to_string())).find(|path| !path.exists()).expect("because it counts on");
        fs::create_dir(&path).unwrap_or_else(|error| panic!("make {}: {error}", path.display()));
        self.ok(&[args!["mount", image, path], options].concat());
        Mounted { ply: self, path }
    }
}

impl Ran {
    /// Runs a command to its end.
    #[track_caller]
    pub fn of(command: &mut Command) -> Self {
        let output = tools::output_of(command);
        Self {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl std::fmt::Display for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}\n--- stdout\n{}\n--- stderr\n{}", self.status, self.stdout, self.stderr)
    }
}

/// A mounted image. Drop unmounts it and checks that this worked.
#[derive(Debug)]
pub struct Mounted<'a> {
    ply: &'a Ply,
    path: PathBuf,
}

impl Mounted<'_> {
    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl AsRef<OsStr> for Mounted<'_> {
    fn as_ref(&self) -> &OsStr {
        self.path.as_os_str()
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let ran = self.ply.run(args!["umount", self.path]);
        if !std::thread::panicking() {
            assert!(ran.status.success(), "ply umount {}: {ran}", self.path.display());
            fs::remove_dir(&self.path).unwrap_or_else(|error| panic!("{} after umount: {error}", self.path.display()));
        }
    }
}
