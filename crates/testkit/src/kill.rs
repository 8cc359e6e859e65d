//! Kills a process at its n-th mutating system call, or has that call fail.
//!
//! strace delivers SIGKILL on entry of the chosen call, before the kernel acts on it: the store is
//! left exactly as it was between two changes. Calls are counted per thread, so one point names the
//! first thread to come that far.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    os::unix::process::ExitStatusExt as _,
    path::Path,
    process::{Command, Output},
};

/// The calls that change a file system, or that make earlier changes durable.
pub const MUTATING: &[&str] = &[
    "write",
    "writev",
    "pwrite64",
    "pwritev",
    "copy_file_range",
    "sendfile",
    "splice",
    "ftruncate",
    "fallocate",
    "openat",
    "openat2",
    "mkdir",
    "mkdirat",
    "mknodat",
    "symlinkat",
    "linkat",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
    "rmdir",
    "fchmod",
    "fchmodat",
    "fchown",
    "fchownat",
    "utimensat",
    "setxattr",
    "lsetxattr",
    "fsetxattr",
    "removexattr",
    "fremovexattr",
    "fsync",
    "fdatasync",
    "sync_file_range",
    "syncfs",
    "msync",
    "mount",
    "umount2",
    "fsopen",
    "fsconfig",
    "fsmount",
    "move_mount",
    "open_tree",
    "flock",
];

/// One moment to die at: on entry of the `nth` call of this name (from 1) in any one thread.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct KillPoint {
    /// The call's name.
    pub call: String,
    /// Which of them.
    pub nth: u32,
}

impl fmt::Display for KillPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.call, self.nth)
    }
}

/// A call that was made.
struct Call {
    thread: String,
    name: String,
    /// It may change something: all may but those that open what is there.
    changes: bool,
}

/// Runs `command` under strace to its end and lists the calls of [`MUTATING`] that it made.
fn calls(command: &Command, log: &Path) -> Vec<Call> {
    let mut traced = strace(command, &["-o".as_ref(), log.as_os_str(), "-e".as_ref(), "signal=none".as_ref()]);
    crate::tools::run(&mut traced);
    let log = fs::read_to_string(log).expect("because strace has just written it");
    let call = |line: &str| {
        let (thread, rest) = line.split_once(' ')?;
        // "<... write resumed>" is the end of a call counted before.
        let (name, arguments) = rest.trim_start().split_once('(')?;
        let opens = name.starts_with("openat");
        let changes = !opens || ["O_CREAT", "O_TRUNC", "O_TMPFILE"].iter().any(|flag| arguments.contains(flag));
        MUTATING.contains(&name).then(|| Call { thread: thread.to_owned(), name: name.to_owned(), changes })
    };
    log.lines().filter_map(call).collect()
}

/// Runs `command` under strace to its end and counts its mutating calls: for each name, the most
/// that any one thread made.
///
/// # Panics
/// When it fails.
pub fn count(command: &Command, log: &Path) -> BTreeMap<String, u32> {
    let mut per_thread: BTreeMap<(String, String), u32> = BTreeMap::new();
    let mut most: BTreeMap<String, u32> = BTreeMap::new();
    for call in calls(command, log) {
        let nth = per_thread.entry((call.thread, call.name.clone())).or_default();
        *nth += 1;
        let known = most.entry(call.name).or_default();
        *known = *nth.max(known);
    }
    most
}

/// Runs `command` under strace to its end and gives a moment for each call that changes something, in whichever thread.
///
/// # Panics
/// When it fails.
pub fn every(command: &Command, log: &Path) -> Vec<KillPoint> {
    let mut per_thread: BTreeMap<(String, String), u32> = BTreeMap::new();
    let mut points = BTreeSet::new();
    for call in calls(command, log) {
        let nth = per_thread.entry((call.thread, call.name.clone())).or_default();
        *nth += 1;
        if call.changes {
            points.insert(KillPoint { call: call.name, nth: *nth });
        }
    }
    points.into_iter().collect()
}

/// Picks moments from what [`count`] found: the first and last of each kind of call and, spread
/// evenly between them, `per_call` in all.
pub fn spread(counts: &BTreeMap<String, u32>, per_call: u32) -> Vec<KillPoint> {
    let mut points = Vec::new();
    for (call, count) in counts {
        let steps = per_call.min(*count).max(1);
        let nth = |step: u32| if steps == 1 { 1 } else { 1 + step * (count - 1) / (steps - 1) };
        points.extend((0..steps).map(|step| KillPoint { call: call.clone(), nth: nth(step) }));
    }
    points.dedup();
    points
}

/// How a run that was to be killed ended.
#[derive(Debug)]
pub enum Outcome {
    /// It was killed there.
    Killed,
    /// It never came that far and ended by itself.
    Finished(Output),
}

/// Runs `command` and kills it at this point.
///
/// # Panics
/// When strace cannot be started.
pub fn kill_at(command: &Command, point: &KillPoint) -> Outcome {
    let inject = format!("inject={}:signal=KILL:when={}", point.call, point.nth);
    let mut traced = strace(command, &["-o".as_ref(), "/dev/null".as_ref(), "-e".as_ref(), inject.as_ref()]);
    let output = crate::tools::output_of(&mut traced);
    if output.status.signal() == Some(9) || output.status.code() == Some(137) {
        Outcome::Killed
    } else {
        Outcome::Finished(output)
    }
}

/// How a run ended in which a call was to fail.
#[derive(Debug)]
pub struct Failed {
    /// The run's end.
    pub output: Output,
    /// How many calls of the name that thread made after the one that failed, until it locked something anew: the store, once
    /// it had closed it. Threads share syncs, so the number of those differs from run to run.
    pub later_count: usize,
}

/// Runs `command` and has this call of it fail with `errno` (`EIO`, as strace writes it), without being made.
///
/// # Panics
/// When strace cannot be started.
pub fn fail_at(command: &Command, point: &KillPoint, errno: &str) -> Failed {
    let inject = format!("inject={}:error={errno}:when={}", point.call, point.nth);
    let log = tempfile::NamedTempFile::new().expect("because the disk has room");
    let mut traced = strace(command, &["-o".as_ref(), log.path().as_os_str(), "-e".as_ref(), inject.as_ref()]);
    let output = crate::tools::output_of(&mut traced);
    let log = fs::read_to_string(log.path()).expect("because strace has just written it");
    let thread_of = |line: &str| line.split_once(' ').map(|(thread, _)| thread.to_owned());
    let is = |line: &str, call: &str| {
        let name = line.split_once(' ').and_then(|(_, rest)| rest.trim_start().split_once('('));
        name.is_some_and(|(name, _)| name == call)
    };
    let mut lines = log.lines();
    let failed = lines.by_ref().find(|line| line.ends_with("(INJECTED)")).and_then(thread_of);
    let later = lines.filter(|line| thread_of(line) == failed).take_while(|line| !is(line, "flock"));
    let later_count = later.filter(|line| is(line, &point.call)).count();
    Failed { output, later_count }
}

/// `command`, in the same environment, below strace.
fn strace(command: &Command, options: &[&std::ffi::OsStr]) -> Command {
    let mut traced = Command::new("strace");
    traced.args(["-f", "-qq", "-e", &format!("trace={}", MUTATING.join(","))]);
    traced.args(options).arg("--").arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => traced.env(name, value),
            None => traced.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        traced.current_dir(dir);
    }
    traced
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{scratch::Scratch, tools};

    #[test]
    fn a_process_dies_before_its_nth_call_and_not_when_it_never_makes_it() {
        if !tools::have(&["strace"]) {
            return;
        }
        let scratch = Scratch::new();
        let mut script = Command::new("/bin/sh");
        script.arg("-c").arg("mkdir a; mkdir b; mkdir c").current_dir(scratch.path());
        // Each mkdir is a process, with one call of its own.
        assert!(matches!(kill_at(&script, &KillPoint { call: "mkdir".into(), nth: 2 }), Outcome::Finished(_)));
        assert!(scratch.join("c").exists());

        let mut direct = Command::new("mkdir");
        direct.args(["d", "e", "f"]).current_dir(scratch.path());
        let point = KillPoint { call: "mkdir".into(), nth: 2 };
        assert!(matches!(kill_at(&direct, &point), Outcome::Killed), "at {point}");
        assert_eq!((scratch.join("d").exists(), scratch.join("e").exists()), (true, false));
    }

    #[test]
    fn every_call_that_changes_something_is_a_point() {
        if !tools::have(&["strace"]) {
            return;
        }
        let scratch = Scratch::new();
        let mut direct = Command::new("mkdir");
        direct.args(["a", "b", "c"]).current_dir(scratch.path());
        let points: Vec<_> = every(&direct, &scratch.join("log")).iter().map(KillPoint::to_string).collect();
        // What the program opens to begin with is there already.
        assert_eq!(points, ["mkdir 1", "mkdir 2", "mkdir 3"]);
        let mut touch = Command::new("touch");
        touch.arg("new").current_dir(scratch.path());
        let points = every(&touch, &scratch.join("log"));
        assert_eq!(points.iter().filter(|point| point.call == "openat").count(), 1, "{points:?}");
    }

    #[test]
    fn points_are_spread_from_the_first_call_to_the_last() {
        let counts = BTreeMap::from([("fsync".to_owned(), 2), ("write".to_owned(), 101)]);
        let points: Vec<_> = spread(&counts, 5).iter().map(KillPoint::to_string).collect();
        assert_eq!(points, ["fsync 1", "fsync 2", "write 1", "write 26", "write 51", "write 76", "write 101"]);
    }
}
