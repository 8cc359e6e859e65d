//! What the tests share: stores, a picture of a store's state, an image with everything in it, builds.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use plies_testkit::{
    args,
    image::{self, Image, Packing},
    ply::{Ply, Ran},
    tar::Member,
    tools,
    tree::{Tree, head},
};
use serde_json::Value;

/// An empty store, where the test may mount.
#[track_caller]
pub(crate) fn store() -> Option<Ply> {
    tools::privileged().then(|| Ply::new(env!("CARGO_BIN_EXE_ply")))
}

/// Writes an image as an OCI archive and loads it.
#[track_caller]
pub(crate) fn load(ply: &Ply, image: &Image) -> Ran {
    let path = image.write_oci_tar(&ply.scratch().join("load.tar"));
    let ran = ply.ok(args!["load", "-i", path]);
    fs::remove_file(path).unwrap();
    ran
}

/// The tree that a mounted image shows. The root's own metadata counts only where a layer sets it.
#[track_caller]
pub(crate) fn tree_of(ply: &Ply, image: &str) -> Tree {
    Tree::of(ply.mount(image).path())
}

/// What can be seen of a store from outside: what it lists, and every file it keeps.
#[derive(Debug, PartialEq)]
pub(crate) struct State {
    images: Value,
    usage: Value,
    files: BTreeMap<PathBuf, u64>,
}

impl State {
    #[track_caller]
    pub(crate) fn of(ply: &Ply) -> Self {
        let mut usage = ply.json(args!["du"]);
        // The database grows and shrinks by pages as it likes.
        usage.as_object_mut().unwrap().remove("total_bytes");
        usage["totals"].as_object_mut().unwrap().remove("catalogue");
        Self { images: ply.json(args!["images"]), usage, files: files(&ply.root()) }
    }

    /// Fails unless the store is as it was.
    #[track_caller]
    pub(crate) fn assert_same(&self, now: &Self, what: &str) {
        assert_eq!(self.images, now.images, "{what}: images");
        let (before, after): (BTreeSet<_>, BTreeSet<_>) = (self.files.iter().collect(), now.files.iter().collect());
        let changed: Vec<_> = before.symmetric_difference(&after).collect();
        assert!(changed.is_empty(), "{what}: files that came, went or changed: {changed:#?}");
        assert_eq!(self.usage, now.usage, "{what}: usage");
    }
}

/// Files and directories below the root with their sizes, without the database's own, which grows as
/// it likes, and without locks.
pub(crate) fn files(root: &Path) -> BTreeMap<PathBuf, u64> {
    let mut found = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(&dir).unwrap_or_else(|error| panic!("list {}: {error}", dir.display())) {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root).unwrap().to_owned();
            if ["catalog", "run"].iter().any(|skipped| name.starts_with(skipped)) {
                continue;
            }
            let meta = fs::symlink_metadata(&path).unwrap();
            if meta.is_dir() {
                waiting.push(path);
            }
            found.insert(name, if meta.is_dir() { 0 } else { meta.size() });
        }
    }
    found
}

/// The store without the ids it gives by itself: names of blobs, and how many layers, uppers, mounts
/// and unfinished writes there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) blobs: BTreeSet<String>,
    pub(crate) layers: usize,
    /// What must never be left when nothing runs.
    pub(crate) unfinished: Vec<PathBuf>,
    /// Inodes in all.
    pub(crate) inodes: usize,
}

impl Shape {
    pub(crate) fn of(ply: &Ply) -> Self {
        let root = ply.root();
        let all = files(&root);
        let below = |dir: &str| -> Vec<PathBuf> {
            all.keys().filter(|path| path.parent() == Some(Path::new(dir))).cloned().collect()
        };
        let mut unfinished = [below("content/ingest"), below("active"), below("mounts")].concat();
        unfinished.extend(plies_testkit::scratch::mounts_below(&root));
        Self {
            blobs: below("content/blobs/sha256")
                .iter()
                .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
                .collect(),
            layers: below("layers").len(),
            unfinished,
            inodes: all.len(),
        }
    }
}

/// Layers with everything that a layer can carry, from devices to whiteouts; `packing` for all.
pub(crate) fn everything(tag: &str, packing: Packing) -> Image {
    // vfs_cap_data version 2: cap_net_raw, effective and permitted.
    const NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let long = format!("deep/{}", "directory-with-a-long-name/".repeat(8));
    let mut bottom = vec![
        Member::dir("./").mode(0o711).mtime(1_234_567_890, 0),
        Member::dir("bin").mtime(1_400_000_000, 500),
        Member::file("bin/tool", vec![7; 70_000]).mode(0o4755).owner(0, 50),
        Member::hard_link("bin/alias", "bin/tool").mode(0o4755).owner(0, 50),
        Member::file("bin/ping", "ping").mode(0o755).xattr("security.capability", NET_RAW),
        Member::dir("dev").mode(0o750),
        Member::char_device("dev/null", 1, 3).mode(0o666),
        Member::block_device("dev/disk", 8, 300).owner(0, 6).mode(0o660),
        Member::fifo("dev/pipe").mode(0o622).mtime(1_000_000_000, 0),
        Member::dir("etc"),
        Member::file("etc/config", "lower").xattr("user.origin", "lower").xattr("user.empty", ""),
        Member::file("etc/deleted", "gone in the next layer"),
        Member::symlink("etc/link", "config").owner(7, 8).mtime(1_300_000_000, 0),
        Member::symlink("etc/absolute", "/no/such/place"),
        Member::dir("opt").xattr("user.note", "on a directory"),
        Member::dir("opt/replaced"),
        Member::file("opt/replaced/below", "hidden by an opaque directory"),
        Member::dir("opt/becomes-file"),
        Member::file("opt/becomes-file/x", "x"),
        Member::file("opt/becomes-dir", "file"),
        Member::dir("tmp").mode(0o1777),
        Member::file(format!("{long}file"), "deep").mtime(1_500_000_000, 999_999_999),
        Member::file(b"etc/not-utf8-\xff\xfe", "bytes"),
        Member::file("etc/with\nnewline", "n"),
        Member::file("empty", ""),
        Member::file("big-owner", "x").owner(2_000_000_000, 2_000_000_001),
    ];
    let mut above = String::new();
    for part in long.split_terminator('/') {
        above += part;
        bottom.insert(0, Member::dir(&above).mtime(1_350_000_000, 0));
        above.push('/');
    }
    // A parent comes before what is in it.
    bottom[..9].reverse();
    let middle = [
        Member::whiteout("etc/deleted"),
        Member::dir("etc").mode(0o755).mtime(1_450_000_000, 0),
        Member::file("etc/config", "upper").mode(0o600).owner(1000, 1000).xattr("user.origin", "upper"),
        Member::dir("opt/replaced").mode(0o700),
        Member::opaque("opt/replaced"),
        Member::file("opt/replaced/above", "shown"),
        Member::file("opt/becomes-file", "now a file"),
        Member::dir("opt/becomes-dir").mode(0o2755).owner(0, 1000),
        Member::file("opt/becomes-dir/inside", "now a directory"),
    ];
    // Nothing here lists the directories it is in: their metadata must stay what it was.
    let top = [
        Member::file("tmp/implied", "x"),
        Member::file("opt/added", "x").mtime(1_600_000_000, 1),
        Member::whiteout("opt/replaced/above"),
        Member::file("opt/replaced/again", "x"),
    ];
    Image::new(tag).layer(&bottom, packing).layer(&middle, packing).layer(&top, packing)
}

/// Loads a base image that can run shell scripts, called `busybox:latest`.
#[track_caller]
pub(crate) fn busybox(ply: &Ply) -> bool {
    let members = image::busybox_members();
    if !tools::have(&["busybox"]) {
        return false;
    }
    load(ply, &Image::new("busybox:latest").layer(&members.expect("because busybox is installed"), Packing::Plain));
    true
}

/// How one step of a build ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Ran,
    Cached,
    Failed,
}

/// What a build said, step by step.
#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) ran: Ran,
    pub(crate) steps: Vec<(String, Step)>,
}

impl Built {
    pub(crate) fn of(ran: Ran) -> Self {
        let mut names: BTreeMap<&str, &str> = BTreeMap::new();
        let mut steps = Vec::new();
        for line in ran.stderr.lines() {
            let Some((number, text)) = line.strip_prefix('#').and_then(|line| line.split_once(' ')) else { continue };
            let Some(name) = names.get(number) else {
                names.insert(number, text);
                continue;
            };
            let step = match text.split(' ').next() {
                Some("CACHED") => Step::Cached,
                Some("DONE") => Step::Ran,
                Some("ERROR") => Step::Failed,
                _ => continue,
            };
            steps.push(((*name).to_owned(), step));
        }
        Self { ran, steps }
    }

    /// How the one step ended whose name holds this text.
    #[track_caller]
    pub(crate) fn step(&self, text: &str) -> Step {
        let found: Vec<_> = self.steps.iter().filter(|(name, _)| name.contains(text)).collect();
        assert_eq!(found.len(), 1, "steps with {text:?} in:\n{}", head(&self.ran.stderr, 80));
        found[0].1
    }

    /// The instructions that make or run something, in the order they ended.
    pub(crate) fn instructions(&self) -> Vec<(String, Step)> {
        let verbs = ["RUN ", "COPY ", "ADD ", "WORKDIR "];
        self.steps.iter().filter(|(name, _)| verbs.iter().any(|verb| name.contains(verb))).cloned().collect()
    }

    /// Fails unless every instruction came from the cache.
    #[track_caller]
    pub(crate) fn assert_all_cached(&self) {
        let instructions = self.instructions();
        let missed: Vec<_> = instructions.iter().filter(|(_, step)| *step != Step::Cached).collect();
        assert!(!instructions.is_empty() && missed.is_empty(), "not from the cache: {missed:#?}\n{}", self.ran);
    }
}

/// A build context: a directory with a Dockerfile.
#[derive(Debug)]
pub(crate) struct Context<'a> {
    pub(crate) ply: &'a Ply,
    pub(crate) dir: PathBuf,
}

impl<'a> Context<'a> {
    pub(crate) fn new(ply: &'a Ply, dockerfile: &str) -> Self {
        let context = Self { ply, dir: ply.scratch().dir("context") };
        context.file("Dockerfile", dockerfile);
        context
    }

    /// Writes a file of the context.
    pub(crate) fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        self.ply.scratch().file(Path::new("context").join(name), content)
    }

    pub(crate) fn args(&self, more: &[OsString]) -> Vec<OsString> {
        [args!["build", "--progress", "plain", "-t", "built:latest"], more, args![self.dir]].concat()
    }

    /// Builds `built:latest`.
    #[track_caller]
    pub(crate) fn build(&self, more: &[OsString]) -> Built {
        Built::of(self.ply.ok(&self.args(more)))
    }

    /// Builds, which must fail.
    #[track_caller]
    pub(crate) fn build_fails(&self, more: &[OsString]) -> Ran {
        self.ply.fails(1, &self.args(more))
    }
}

/// Runs a command that waits for somebody, interrupts it once it can hear that, and gives how it ended. One that does
/// not end is killed after half a minute: a test that hangs tells less.
#[track_caller]
pub(crate) fn interrupted(mut command: Command) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let status = format!("/proc/{}/status", child.id());
    let hears = || {
        let caught = fs::read_to_string(&status).unwrap_or_default();
        let caught = caught.lines().find_map(|line| line.strip_prefix("SigCgt:")).unwrap_or_default().trim().to_owned();
        u64::from_str_radix(&caught, 16).unwrap_or(0) & (1 << (2 - 1)) != 0
    };
    while !hears() && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(20));
    }
    // So that it waits by then, mostly; it must end either way.
    std::thread::sleep(Duration::from_millis(500));
    tools::run(Command::new("kill").args(["-INT", &child.id().to_string()]));
    for _ in 0..600 {
        if child.try_wait().unwrap().is_some() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(child.kill());
    child.wait_with_output().unwrap()
}
