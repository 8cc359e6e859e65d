//! One script of commands; each of them is killed before each call that changes something, and each such call fails.
//!
//! Every try begins with a copy of the state directory as the command found it. After it the next command works, a check of the
//! graph finds nothing, what was there before and stays is there, a collection leaves nothing behind, the sums of `du` add up,
//! and the command can be given again and then has done what it does.
//!
//! A sample is tried in every run, all of it with `PLIES_CHAOS` (`just chaos`); `PLIES_SEED` says which sample. Calls are counted
//! by thread: a point is the first thread to come that far.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use plies_testkit::image::{Image, Packing};
use plies_testkit::kill::{self, Failed, KillPoint, Outcome};
use plies_testkit::ply::{Ply, Ran};
use plies_testkit::power::draw;
use plies_testkit::tar::{self, Member};
use plies_testkit::{args, seed, tools};
use serde_json::Value;

use crate::common::{Shape, store};

/// How many moments of each command are tried in a run that is no long one.
const FEW: usize = 4;

/// Syncs that the database makes as it closes, and nobody hears of: a commit of its own that says which pages are in use (two),
/// one with nothing to write, and the header that says that it was closed. All that is acknowledged is durable before: the store's
/// test `any_call_that_fails_acknowledges_nothing_and_takes_nothing_that_was` has each of them fail and cuts the power then.
pub(crate) const CLOSING_SYNCS: usize = 4;

/// Calls by which drivers are tried.
const MOUNTS: [&str; 5] = ["fsopen", "fsconfig", "fsmount", "mount", "move_mount"];

/// What a store says that was made to keep layers as tars, and cannot mount them.
const NO_EROFS: &str = "the driver erofs does not work here";

/// What a store shows. Names of images that are built say nothing of their IDs, which hold the time.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shown {
    images: BTreeSet<String>,
    records: BTreeSet<String>,
    layers: BTreeSet<String>,
}

fn texts<'a>(rows: &'a Value, key: &'a str) -> impl Iterator<Item = String> + 'a {
    rows.as_array().unwrap().iter().map(move |row| row[key].as_str().unwrap().to_owned())
}

impl Shown {
    fn of(ply: &Ply) -> Self {
        let mut images = BTreeSet::new();
        for image in ply.json(args!["images"]).as_array().unwrap() {
            for name in image["names"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()) {
                let id = if name.contains("built") { "" } else { image["id"].as_str().unwrap() };
                images.insert(format!("{name} {id}"));
            }
        }
        let records = texts(&ply.json(args!["ref", "ls"]), "id").collect();
        // The layer store keeps those of built images, whose times are others each time.
        let layers = match images.iter().any(|name| name.contains("built")) {
            true => BTreeSet::new(),
            false => texts(&ply.json(args!["layer", "ls"]), "chain_id").collect(),
        };
        Self { images, records, layers }
    }

    /// Whether what leads from one to another was done here: new records have other IDs each time.
    fn is_like(&self, before: &Self, after: &Self) -> bool {
        let is_gone = |id: &String| !self.records.contains(id);
        self.images == after.images
            && self.layers == after.layers
            && self.records.len() == after.records.len()
            && before.records.difference(&after.records).all(is_gone)
    }

    /// Whether this can be found between two others.
    fn is_between(&self, before: &Self, after: &Self) -> bool {
        let kept = |part: fn(&Self) -> &BTreeSet<String>| {
            part(before).intersection(part(after)).all(|thing| part(self).contains(thing))
        };
        (self.images == before.images || self.images == after.images)
            && kept(|shown| &shown.records)
            && (self.layers.is_empty() || after.layers.is_empty() || kept(|shown| &shown.layers))
    }
}

/// How many blobs, layers, uppers of records and inodes there are; nothing else is left.
fn size(ply: &Ply) -> [usize; 4] {
    let shape = Shape::of(ply);
    let (uppers, left): (Vec<_>, Vec<_>) = shape.unfinished.iter().partition(|path| path.starts_with("active"));
    assert_eq!(left, Vec::<&PathBuf>::new());
    [shape.blobs.len(), shape.layers, uppers.len(), shape.inodes]
}

/// A command of the script.
struct Step {
    args: Vec<OsString>,
    /// A copy of the state directory as it was before.
    copy: PathBuf,
    before: Shown,
    after: Shown,
    /// After it and a collection.
    size: [usize; 4],
    /// What is done by halves is done again another way: the cache has more records then.
    is_build: bool,
}

/// The state directory becomes what `copy` is.
fn restore(ply: &Ply, copy: &Path) {
    fs::remove_dir_all(ply.root()).unwrap();
    keep(&ply.root(), copy);
}

fn keep(as_path: &Path, dir: &Path) {
    tools::run(Command::new("cp").arg("-a").arg(dir).arg(as_path));
}

struct Script<'a> {
    ply: &'a Ply,
    steps: Vec<Step>,
}

impl Script<'_> {
    /// Gives the next command, which must succeed; what it printed.
    fn step(&mut self, args: &[OsString]) -> String {
        let copy = self.ply.scratch().join(format!("before{}", self.steps.len()));
        keep(&copy, &self.ply.root());
        let before = match args[0].to_str() {
            // An older schema would be brought up by looking.
            Some("migrate") => None,
            _ => Some(Shown::of(self.ply)),
        };
        restore(self.ply, &copy);
        let said = self.ply.ok(args).stdout.trim().to_owned();
        let after = Shown::of(self.ply);
        let copy_after = self.ply.scratch().join("after");
        keep(&copy_after, &self.ply.root());
        self.ply.ok(args!["gc"]);
        let size = size(self.ply);
        restore(self.ply, &copy_after);
        fs::remove_dir_all(&copy_after).unwrap();
        let is_build = args[0] == "build";
        let before = before.unwrap_or_else(|| after.clone());
        self.steps.push(Step { args: args.to_vec(), copy, before, after, size, is_build });
        said
    }
}

fn small(name: &str, own: &str) -> Image {
    let bottom = [
        Member::dir("etc").mode(0o750),
        Member::file("etc/config", "lower").xattr("user.origin", "lower"),
        Member::file("etc/deleted", "gone in the next layer"),
        Member::hard_link("etc/alias", "etc/config"),
        Member::symlink("etc/link", "config"),
    ];
    let top = [Member::whiteout("etc/deleted"), Member::file(format!("own-{own}"), own.repeat(5000))];
    Image::new(name).layer(&bottom, Packing::Gzip).layer(&top, Packing::Plain)
}

/// All commands that change a store and start no other program.
fn script(ply: &Ply) -> Vec<Step> {
    let scratch = ply.scratch();
    let archive = |own: &str| small(&format!("localhost/{own}:1"), own).write_oci_tar(&scratch.join(own));
    let (first, second) = (archive("first"), archive("second"));
    let layer = scratch.file("layer.tar", tar::archive([&Member::dir("d"), &Member::file("d/f", "registered")]));
    let context = scratch.dir("context");
    for name in ["a", "b"] {
        scratch.file(Path::new("context").join(name), name.repeat(5000));
    }
    let dockerfile = "FROM localhost/first:1 AS one\nWORKDIR /w\nCOPY a /w/a\nFROM localhost/second:1\n\
                      COPY --from=one /w /from\nADD b /b\n";
    scratch.file("context/Dockerfile", dockerfile);
    ply.ok(args!["images"]);
    let mut script = Script { ply, steps: Vec::new() };
    script.step(args!["load", "-q", "-i", first]);
    script.step(args!["load", "-q", "-i", second]);
    script.step(args!["tag", "localhost/first:1", "localhost/other:1"]);
    script.step(args!["layer", "register", "-q", layer]);
    script.step(args!["build", "-q", "-t", "localhost/built:1", context]);
    let mut records = Vec::new();
    for parent in ["localhost/first:1", "localhost/second:1"] {
        let new = script.step(args!["ref", "new", "--parent", parent]);
        {
            let mounted = ply.mount_with(&new, args!["--rw"]);
            fs::write(mounted.path().join("etc/config"), parent).unwrap();
            fs::write(mounted.path().join("written"), parent).unwrap();
        }
        records.push(script.step(args!["ref", "commit", new]));
    }
    script.step(args!["ref", "merge", records[0], records[1]]);
    script.step(args!["ref", "diff", "-q", records[0], records[1]]);
    script.step(args!["ref", "pin", records[1]]);
    script.step(args!["save", "-q", "-o", scratch.join("saved.tar"), "localhost/second:1", "localhost/built:1"]);
    if ply.json(args!["info"])["erofs_unusable"].is_null() {
        script.step(args!["migrate", "-q", "--driver", "erofs"]);
        script.step(args!["migrate", "-q", "--driver", "overlay"]);
    }
    script.step(args!["prune", "-q", "-a", "-f"]);
    script.step(args!["rmi", "localhost/second:1"]);
    // The names go first: what they held is garbage when the first of its files is to be removed.
    let first_removal = KillPoint { call: "unlinkat".to_owned(), nth: 1 };
    kill::kill_at(&ply.command(args!["rmi", "localhost/built:1"]), &first_removal);
    script.step(args!["gc"]);
    // And one that an older version made.
    let old = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stores/schema-1.tar.zst");
    fs::remove_dir_all(ply.root()).unwrap();
    let mut unpack = Command::new("tar");
    unpack.args(["--xattrs", "--xattrs-include=*", "--zstd", "-x", "-C"]).arg(scratch.path()).arg("-f").arg(old);
    tools::run(&mut unpack);
    script.step(args!["migrate", "-q"]);
    script.steps
}

/// Looks at what is left, and gives the command again. `in_its_form`: its layers are kept as the store keeps layers.
fn judge(ply: &Ply, step: &Step, context: &str, in_its_form: bool) {
    let shown = Shown::of(ply);
    assert!(shown.is_between(&step.before, &step.after), "{context}: {shown:#?}");
    let sound = |when: &str| {
        let checked = ply.run(args!["fsck"]);
        assert!(checked.status.success(), "{context}, {when}: {checked}");
    };
    sound("at once");
    ply.ok(args!["gc"]);
    assert_eq!(Shown::of(ply), shown, "{context}: a collection changed what is shown");
    let usage = ply.json(args!["du"]);
    let number = |value: &Value| value.as_u64().unwrap();
    assert_eq!(usage["totals"]["orphans"], 0, "{context}: {usage:#}");
    let sum = usage["totals"].as_object().unwrap().values().map(number).sum::<u64>();
    assert_eq!(sum, number(&usage["total_bytes"]), "{context}: {usage:#}");
    // What shows nothing can be given twice, a build uses what a killed one has made, and the record of a difference may be there
    // before its layer is, which is made when somebody wants it.
    if step.is_build
        || step.args.iter().any(|arg| arg == "diff")
        || step.before == step.after
        || !shown.is_like(&step.before, &step.after)
    {
        ply.ok(&step.args);
    }
    let shown = Shown::of(ply);
    assert_eq!(shown.images, step.after.images, "{context}, given again");
    ply.ok(args!["gc"]);
    let size = size(ply);
    if !step.is_build {
        assert_eq!(shown.records.len(), step.after.records.len(), "{context}, given again");
        let told = if in_its_form { 4 } else { 3 };
        assert_eq!(size[..told], step.size[..told], "{context}, given again: blobs, layers, uppers and inodes");
    }
    sound("given again");
}

/// The points of all commands that are tried, by command.
fn each_point(name: &str, mut attempt: impl FnMut(&Ply, &Step, &[KillPoint], usize)) {
    if !tools::have(&["strace"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let mut random = seed();
    let is_long = std::env::var_os("PLIES_CHAOS").is_some();
    let (mut tried, mut all) = (0, 0);
    let steps = script(&ply);
    for step in &steps {
        restore(&ply, &step.copy);
        let points = kill::every(&ply.command(&step.args), &ply.scratch().join("strace.log"));
        assert!(points.len() > 5, "{:?}: too few moments: {points:?}", step.args);
        all += points.len();
        let chosen: BTreeSet<usize> = match is_long {
            true => (0..points.len()).collect(),
            false => (0..FEW).map(|_| (draw(&mut random) % points.len() as u64) as usize).collect(),
        };
        tried += chosen.len();
        for at in chosen {
            restore(&ply, &step.copy);
            attempt(&ply, step, &points, at);
        }
    }
    println!("{name}: {tried} of {all} calls in {} commands; 0 failures", steps.len());
}

#[test]
fn commands_killed_before_any_call_leave_a_store_that_goes_on() {
    let mut killed = 0;
    let mut tried = 0;
    each_point("commands killed before a call", |ply, step, points, at| {
        let context = format!("{:?}, killed before {}", step.args, points[at]);
        tried += 1;
        match kill::kill_at(&ply.command(&step.args), &points[at]) {
            Outcome::Killed => killed += 1,
            // With threads, other ones may come so far at another time.
            Outcome::Finished(output) => {
                assert!(output.status.success(), "{context}: {}", String::from_utf8_lossy(&output.stderr));
                assert_eq!(Shown::of(ply).images, step.after.images, "{context}: not killed");
            }
        }
        judge(ply, step, &context, true);
    });
    assert!(killed * 2 >= tried, "most moments were never reached: {killed} of {tried}");
}

#[test]
fn commands_in_which_any_call_fails_say_so_and_leave_a_store_that_goes_on() {
    let (mut failed, mut tried) = (0, 0);
    each_point("commands in which a call fails", |ply, step, points, at| {
        let point = &points[at];
        let errno = ["EIO", "ENOSPC", "EMFILE", "EDQUOT"][(at + step.args.len()) % 4];
        let context = format!("{:?}, {point} fails with {errno}", step.args);
        let Failed { output, later_count } = kill::fail_at(&ply.command(&step.args), point, errno);
        tried += 1;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!said.contains("panicked") && output.status.code().is_some(), "{context}: {said}");
        if output.status.success() {
            let is_closing = point.call == "fdatasync" && later_count < CLOSING_SYNCS;
            // The removal of bytes is made up for by the next collection; nothing else was asked for.
            let is_told = said.contains("space is not freed yet");
            let is_sync = ["fsync", "fdatasync", "syncfs"].contains(&&*point.call);
            assert!(!is_sync || is_closing || is_told, "{context}: a success without a sync: {said}");
            assert_eq!(Shown::of(ply).images, step.after.images, "{context}: a success that left nothing");
        } else {
            failed += 1;
            // With a write of one thread, that to standard error may have failed in another.
            assert!(!said.trim().is_empty() || point.call == "write", "{context}: says nothing");
        }
        // Where a mount fails as it is tried, the command does without, and keeps layers in another form.
        judge(ply, step, &context, !MOUNTS.contains(&&*point.call) && !said.contains(NO_EROFS));
    });
    assert!(failed * 2 >= tried, "most calls were never reached: {failed} of {tried}");
}

/// Writes that are cut short, by a limit on the sizes of files: the kernel writes up to it, and the next write fails.
#[test]
fn commands_whose_writes_are_cut_short_say_so_and_leave_a_store_that_goes_on() {
    if !tools::have(&["strace", "prlimit"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let (mut failed, mut tried) = (0, 0);
    let steps = script(&ply);
    for step in &steps {
        // In the middle of a header, of a page, of what the database has, and of what comes.
        let database = fs::metadata(step.copy.join("catalog/plies.redb")).unwrap().len();
        for limit in [1, 100, 5000, 12_345, database - 1, database + 1] {
            restore(&ply, &step.copy);
            let command = ply.command(&step.args);
            let mut limited = Command::new("sh");
            // Who does not ignore the signal dies of it.
            limited.args(["-c", "trap '' XFSZ; exec prlimit --fsize=\"$0\" -- \"$@\""]).arg(limit.to_string());
            limited.arg(command.get_program()).args(command.get_args()).env_clear();
            let set: BTreeMap<_, _> = command.get_envs().filter_map(|(name, value)| Some((name, value?))).collect();
            limited.envs(set).current_dir(scratch_of(&command));
            let ran = Ran::of(&mut limited);
            let context = format!("{:?}, files end at {limit} bytes", step.args);
            tried += 1;
            assert!(!ran.stderr.contains("panicked") && ran.status.code().is_some(), "{context}: {ran}");
            if ran.status.success() {
                assert_eq!(Shown::of(&ply).images, step.after.images, "{context}: a success that left nothing");
            } else {
                failed += 1;
                assert!(!ran.stderr.trim().is_empty(), "{context}: says nothing");
            }
            judge(&ply, step, &context, !ran.stderr.contains(NO_EROFS));
        }
    }
    println!("commands whose writes are cut short: {tried} commands, {failed} of which failed; 0 failures");
    assert!(failed * 2 > tried, "most writes were not cut short: {failed} of {tried}");
}

fn scratch_of(command: &Command) -> &Path {
    command.get_current_dir().unwrap()
}
