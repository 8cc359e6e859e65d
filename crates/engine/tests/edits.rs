//! After any edit of a context and its Dockerfile, a build that finds what it can in the cache gives the same as one
//! that finds nothing.
//!
//! A history is a list of random edits. One store is kept for all of it, so that a step may find the result of any
//! earlier state; after each edit the same files are also built in a store that was made for that one build. Both must
//! give the same image, byte for byte but for the times of the build, or both fail. Commands are not run.
//!
//! Times of files are in no key: a file that was only touched is not copied again. And a step leaves nothing where it
//! changes nothing, not even the time. So there are two kinds of history. In one the context stands still: all its files
//! are of one age, whatever is done to them, and layers must be the same with all times that come out of it. In the
//! other, files are as old as they are, and layers must be the same but for times, and for what repeats the layers below
//! but for its time.
//!
//! A history that goes wrong is printed, with its seed, and then again as the shortest that was found to go wrong.
//! `PROPTEST_RNG_SEED` gives other histories than those of every day, `PLIES_EDITS` more or fewer edits in each.

// Clippy's allowance for tests stops at their helpers, and all of this is a test.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write as _};
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use plies_archive::Limits;
use plies_archive::tar::{Entry, EntryKind, Reader, Timestamp};
use plies_engine::build::{BuildRequest, TreeOutput};
use plies_engine::exec::{Cancel, ExecutorChoice};
use plies_engine::progress::Silent;
use plies_engine::{DriverKind, Engine, EngineOptions, Output, SaveFormat};
use plies_testkit::tar::{Member, archive};
use plies_testkit::{scratch::Scratch, tools};
use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::{Config, RngAlgorithm, RngSeed, TestRng, TestRunner};
use serde_json::Value;

/// How many tests share the work: two cores want at least two, and none may take minutes.
const SHARES: u64 = 8;

/// Edits of all shares together.
const EDITS: u64 = 10_000;

/// The seed of every day: a failure must be the change's doing, and come again.
const SEED: u64 = 5;

/// The age of everything in a context that stands still, in seconds since 1970. Whatever is younger than this test was
/// made by a step.
const STILL_SECONDS: u64 = 1_000_000_000;

/// Lines that a stage may have; each is a step that may have to be done twice.
const LINES_MAX: usize = 4;

/// Builds that looking for a shorter history may take.
const SHRINKING_BUILDS_MAX: usize = 2_000;

/// What the context may hold. Short, so that edits meet.
const PATHS: [&str; 12] = ["a", "b", "ab", "d", "d/a", "d/b", "d/s", "d/s/a", "d/s/b", "d/t/b", "e", "t.tar"];

const IGNORED: [&str; 8] = [
    "",
    "b\n",
    "*\n!d\n",
    "d\n!d/s\n",
    "**/b\n!d/b\n",
    "d/*\n!d/s/a\n",
    "# nothing but\n**\n!a\n!d/**/a\n!t.tar\n",
    "Dockerfile\n.dockerignore\n",
];

/// What a stage may say.
const LINES: [&str; 50] = [
    "COPY a /a",
    "COPY a /tmp/",
    "COPY a* /glob/",
    "COPY a* b* d/ /several/",
    "COPY d /d",
    "COPY d/ /x/y/",
    "COPY d /a",
    "COPY d/s /d/",
    "COPY d/*/b* /deep/",
    "COPY . /all/",
    "COPY . .",
    "COPY --exclude=**/b . /some/",
    "COPY --exclude=d --exclude=!d/a . /part/",
    "COPY --exclude=*.tar --exclude=d/s . /d/",
    "COPY --link a /tmp/a",
    "COPY --link d /linked/d/",
    "COPY --link . /all/",
    "COPY --link --chmod=600 a* /m/",
    "COPY --chmod=755 d /modes",
    "COPY --chmod=u=rwX,go=X d /d",
    "COPY --chown=7:8 d /owned",
    "COPY --parents d/s/a ./",
    "COPY --parents d/**/a d/./s /par/",
    "COPY --from=s0 / /from0/",
    "COPY --from=s0 / /",
    "COPY --from=s0 /d /dd",
    "COPY --from=s0 --link /all /l0/",
    "COPY --from=s0 --exclude=a --chown=3 / /e0/",
    "COPY --from=s1 / /from1/",
    "COPY --from=s1 /d/ /tmp/",
    "COPY --from=s1 --link /from0 /",
    "ADD a d /added/",
    "ADD t.tar /unpacked/",
    "ADD t.tar a* /d/",
    "ADD --chown=5:6 t.tar /",
    "COPY t.tar /t.tar",
    "COPY <<END $X/inline\nx is ${X} and v is ${V:-unset}\nEND",
    "COPY <<'END' a /inline/\nx is ${X}\nEND",
    "ENV X=1",
    "ENV X=2 Y=$X",
    "ENV X=/tmp Y=${X:-none}",
    "ARG V",
    "ARG V=default",
    "LABEL l=$X m=\"${V:-none}\"",
    "WORKDIR /w",
    "WORKDIR /tmp/$X",
    "WORKDIR rel",
    "COPY a* $X/",
    "USER 5",
    "VOLUME /v\nEXPOSE 80\nCMD [\"$X\"]",
];

/// One change. It says what and where, not how things are: so it means something in whatever is left of a history.
#[derive(Debug, Clone)]
enum Edit {
    /// All contents are of one length. `in_secret` leaves the file's time as it was.
    Write {
        path: &'static str,
        content: u8,
        in_secret: bool,
    },
    Tar {
        path: &'static str,
        content: u8,
    },
    Mode {
        path: &'static str,
        mode: u32,
    },
    Touch {
        path: &'static str,
        seconds: u64,
    },
    Attribute {
        path: &'static str,
        value: u8,
    },
    Rename {
        from: &'static str,
        to: &'static str,
    },
    Remove {
        path: &'static str,
    },
    Directory {
        path: &'static str,
    },
    Symlink {
        path: &'static str,
        target: &'static str,
    },
    HardLink {
        path: &'static str,
        to: &'static str,
    },
    Ignore {
        lines: &'static str,
    },
    /// A line in place of another, or one more.
    Line {
        stage: usize,
        at: usize,
        line: &'static str,
        insert: bool,
    },
    NoLine {
        stage: usize,
        at: usize,
    },
    /// What a stage stands on: an earlier one, or nothing.
    Base {
        stage: usize,
        on: Option<usize>,
    },
    Argument {
        value: Option<u8>,
    },
}

fn edit() -> impl Strategy<Value = Edit> {
    let path = || prop::sample::select(&PATHS[..]);
    let target = prop::sample::select(&["a", "b", "d", "s", "../a", "/a", "d/s", "missing", "."][..]);
    let mode = prop::sample::select(&[0o600, 0o644, 0o755, 0o4755, 0o1777, 0o700][..]);
    prop_oneof![
        6 => (path(), 0..4u8, any::<bool>())
            .prop_map(|(path, content, in_secret)| Edit::Write { path, content, in_secret }),
        2 => (prop::sample::select(&["t.tar", "t.tar", "a", "d/a"][..]), 0..5u8)
            .prop_map(|(path, content)| Edit::Tar { path, content }),
        3 => (path(), mode).prop_map(|(path, mode)| Edit::Mode { path, mode }),
        2 => (path(), 1..1_000_000_000u64).prop_map(|(path, seconds)| Edit::Touch { path, seconds }),
        1 => (path(), 0..3u8).prop_map(|(path, value)| Edit::Attribute { path, value }),
        2 => (path(), path()).prop_map(|(from, to)| Edit::Rename { from, to }),
        2 => path().prop_map(|path| Edit::Remove { path }),
        2 => path().prop_map(|path| Edit::Directory { path }),
        2 => (path(), target).prop_map(|(path, target)| Edit::Symlink { path, target }),
        2 => (path(), path()).prop_map(|(path, to)| Edit::HardLink { path, to }),
        2 => prop::sample::select(&IGNORED[..]).prop_map(|lines| Edit::Ignore { lines }),
        10 => (0..3usize, 0..LINES_MAX, prop::sample::select(&LINES[..]), any::<bool>())
            .prop_map(|(stage, at, line, insert)| Edit::Line { stage, at, line, insert }),
        4 => (0..3usize, 0..LINES_MAX).prop_map(|(stage, at)| Edit::NoLine { stage, at }),
        1 => (1..3usize, prop::option::of(0..2usize)).prop_map(|(stage, on)| Edit::Base { stage, on }),
        2 => prop::option::of(0..3u8).prop_map(|value| Edit::Argument { value }),
    ]
}

/// What each stage stands on, and what it says.
type Stages = [(Option<usize>, Vec<&'static str>); 3];

/// A context, the Dockerfile and the build argument, as edits leave them.
struct World {
    context: PathBuf,
    stages: Stages,
    /// The stages that could last be built.
    good: Stages,
    argument: Option<u8>,
    /// Files are all of one age.
    is_still: bool,
}

impl World {
    fn new(context: &Path, is_still: bool) -> Self {
        drop(fs::remove_dir_all(context));
        fs::create_dir(context).unwrap();
        let stages = [
            (None, vec!["COPY d /d", "COPY a* /glob/"]),
            (Some(0), vec!["COPY --link d /linked/d/"]),
            (Some(1), vec!["COPY . /all/"]),
        ];
        let world = Self { context: context.to_owned(), good: stages.clone(), stages, argument: None, is_still };
        for path in ["a", "b", "ab", "d/a", "d/b", "d/s/a", "d/s/b", "d/t/b", "e"] {
            world.in_context(&Edit::Write { path, content: 0, in_secret: false });
        }
        world.in_context(&Edit::Tar { path: "t.tar", content: 0 });
        world.write_dockerfile();
        world
    }

    fn write_dockerfile(&self) {
        let mut text = String::new();
        for (number, (on, lines)) in self.stages.iter().enumerate() {
            let on = on.map_or_else(|| "scratch".to_owned(), |on| format!("s{on}"));
            writeln!(text, "FROM {on} AS s{number}").unwrap();
            // What a later stage has, an earlier one cannot take.
            let known =
                |line: &&&str| !(0..3).any(|later| later >= number && line.contains(&format!("--from=s{later}")));
            lines.iter().filter(known).for_each(|line| writeln!(text, "{line}").unwrap());
        }
        fs::write(self.context.join("Dockerfile"), text).unwrap();
        if self.is_still {
            make_still(&self.context);
        }
    }

    /// After a build: what fails would fail until the edit that undoes it came by chance. The Dockerfile goes back to one
    /// that could be built; if it is that, it was the context, and all begins anew.
    fn built(&mut self, is_good: bool) {
        if is_good {
            self.good.clone_from(&self.stages);
        } else if self.stages == self.good {
            *self = Self::new(&self.context, self.is_still);
        } else {
            self.stages.clone_from(&self.good);
        }
    }

    fn apply(&mut self, edit: &Edit) {
        match *edit {
            Edit::Line { stage, at, line, insert } => {
                let lines = &mut self.stages[stage].1;
                if insert && lines.len() < LINES_MAX {
                    lines.insert(at.min(lines.len()), line);
                } else if let Some(old) = lines.get_mut(at) {
                    *old = line;
                }
            }
            Edit::NoLine { stage, at } => {
                let lines = &mut self.stages[stage].1;
                if at < lines.len() {
                    lines.remove(at);
                }
            }
            Edit::Base { stage, on } => self.stages[stage].0 = on.filter(|on| *on < stage),
            Edit::Argument { value } => self.argument = value,
            _ => self.in_context(edit),
        }
        self.write_dockerfile();
    }

    /// A place for something new: its directories are there, and it is not.
    fn room(&self, path: &str) -> PathBuf {
        let full = self.context.join(path);
        for parent in full.ancestors().skip(1).collect::<Vec<_>>().into_iter().rev() {
            if parent.starts_with(&self.context) && !parent.symlink_metadata().is_ok_and(|meta| meta.is_dir()) {
                drop(fs::remove_file(parent));
                fs::create_dir(parent).unwrap();
            }
        }
        remove(&full);
        full
    }

    /// What cannot be done, as a link to a directory, is not.
    fn in_context(&self, edit: &Edit) {
        let full = |path: &str| self.context.join(path);
        match *edit {
            Edit::Write { path, content, in_secret } => {
                let known = full(path).symlink_metadata().ok().filter(|meta| in_secret && meta.is_file());
                match known {
                    // In place, so that its other names show it too.
                    Some(meta) => {
                        fs::write(full(path), [b'0' + content; 4]).unwrap();
                        set_time(&full(path), meta.modified().unwrap());
                    }
                    None => fs::write(self.room(path), [b'0' + content; 4]).unwrap(),
                }
            }
            Edit::Tar { path, content } => {
                let members = match content {
                    0 => vec![Member::dir("x").mode(0o711), Member::file("x/f", "f")],
                    1 => vec![Member::dir("x").mode(0o711), Member::file("x/f", "g")],
                    2 => vec![Member::file("x/f", "f").owner(3, 4), Member::hard_link("x/g", "x/f")],
                    3 => vec![Member::symlink("x", "/d"), Member::file("a", "from the archive")],
                    _ => vec![Member::dir("./").mode(0o1777), Member::file("d/a", "from the archive").mode(0o600)],
                };
                let bytes = archive(&members);
                fs::write(self.room(path), bytes).unwrap();
            }
            Edit::Mode { path, mode } => {
                if full(path).symlink_metadata().is_ok_and(|meta| !meta.is_symlink()) {
                    fs::set_permissions(full(path), fs::Permissions::from_mode(mode)).unwrap();
                }
            }
            Edit::Touch { path, seconds } => {
                if full(path).symlink_metadata().is_ok_and(|meta| !meta.is_symlink()) {
                    set_time(&full(path), std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds));
                }
            }
            Edit::Attribute { path, value } => {
                let flags = rustix::fs::XattrFlags::empty();
                rustix::fs::lsetxattr(full(path), "user.edited", &[b'0' + value], flags).unwrap_or_default();
            }
            Edit::Rename { from, to } => {
                // Not into itself, nor what holds it away.
                let apart = !Path::new(from).starts_with(to) && !Path::new(to).starts_with(from);
                if apart && full(from).symlink_metadata().is_ok() {
                    let to = self.room(to);
                    fs::rename(full(from), to).unwrap();
                }
            }
            Edit::Remove { path } => remove(&full(path)),
            Edit::Directory { path } => drop(fs::create_dir(self.room(path))),
            Edit::Symlink { path, target } => drop(symlink(target, self.room(path))),
            Edit::HardLink { path, to } => {
                let apart = !Path::new(to).starts_with(path);
                if apart && full(to).symlink_metadata().is_ok_and(|meta| meta.is_file()) {
                    let new = self.room(path);
                    drop(fs::hard_link(full(to), new));
                }
            }
            Edit::Ignore { lines } => fs::write(full(".dockerignore"), lines).unwrap(),
            _ => unreachable!("because the others are no edits of the context"),
        }
    }

    /// For a person to read.
    fn shown(&self) -> String {
        let mut text = fs::read_to_string(self.context.join("Dockerfile")).unwrap();
        let ignore = fs::read_to_string(self.context.join(".dockerignore")).unwrap_or_default();
        write!(text, "\n.dockerignore: {ignore:?}\nV: {:?}\n", self.argument).unwrap();
        text + &tools::run(
            std::process::Command::new("ls").args(["-lnARi", "--time-style=full-iso"]).arg(&self.context),
        )
    }
}

fn remove(path: &Path) {
    match path.symlink_metadata() {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
}

/// Makes everything of one age, links and what is in directories before these.
fn make_still(path: &Path) {
    if path.symlink_metadata().unwrap().is_dir() {
        fs::read_dir(path).unwrap().for_each(|entry| make_still(&entry.unwrap().path()));
    }
    let time = rustix::fs::Timespec { tv_sec: STILL_SECONDS.cast_signed(), tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn set_time(path: &Path, time: std::time::SystemTime) {
    fs::File::open(path).unwrap().set_modified(time).unwrap();
}

/// What of an image must not depend on the cache.
#[derive(PartialEq, Eq)]
struct Image {
    config: Value,
    layers: Vec<Vec<Packed>>,
    tree: Vec<Packed>,
}

/// A member of a tar.
#[derive(Clone, PartialEq, Eq)]
struct Packed {
    entry: Entry,
    bytes: Vec<u8>,
}

impl fmt::Debug for Packed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Entry { path, kind, mode, uid, gid, mtime, xattrs } = &self.entry;
        let (path, seconds) = (path.as_bytes().escape_ascii(), mtime.seconds);
        write!(f, "{path} {kind:?} {mode:o} {uid}:{gid} {seconds} {xattrs:?} {}", self.bytes.escape_ascii())
    }
}

/// The members of a tar. Of times, only those that are told with `is_still` are kept: of what came out of the context.
fn members(tar: &[u8], is_still: bool) -> Vec<Packed> {
    let mut reader = Reader::new(tar, &Limits::default());
    let mut members = Vec::new();
    while let Some(mut entry) = reader.next_entry().unwrap() {
        if !is_still || entry.mtime.seconds > STILL_SECONDS.cast_signed() {
            entry.mtime = Timestamp::default();
        }
        let mut bytes = Vec::new();
        reader.entry_data().read_to_end(&mut bytes).unwrap();
        members.push(Packed { entry, bytes });
    }
    members
}

/// The layers without what repeats those below, and without those that then hold nothing.
fn without_repeats(layers: Vec<Vec<Packed>>) -> Vec<Vec<Packed>> {
    let mut shown: BTreeMap<Vec<u8>, Packed> = BTreeMap::new();
    let mut left = Vec::new();
    for mut layer in layers {
        let linked: BTreeSet<Vec<u8>> = layer
            .iter()
            .filter_map(|member| match &member.entry.kind {
                EntryKind::HardLink { target } => Some(target.as_bytes().to_vec()),
                _ => None,
            })
            .collect();
        layer.retain(|member| {
            let path = member.entry.path.as_bytes();
            let (dir, name) = match path.iter().rposition(|byte| *byte == b'/') {
                Some(at) => (&path[..at], &path[at + 1..]),
                None => (&b""[..], path),
            };
            let below = |path: &[u8]| {
                let prefix = if path.is_empty() { Vec::new() } else { [path, b"/"].concat() };
                move |name: &[u8]| name.starts_with(&prefix)
            };
            if name == b".wh..wh..opq" {
                let is_below = below(dir);
                shown.retain(|path, _| !is_below(path));
                return true;
            }
            if let Some(hidden) = name.strip_prefix(b".wh.") {
                let hidden = if dir.is_empty() { hidden.to_vec() } else { [dir, b"/", hidden].concat() };
                let is_below = below(&hidden);
                shown.retain(|path, _| *path != hidden && !is_below(path));
                return true;
            }
            if !linked.contains(path) && shown.get(path) == Some(member) {
                return false;
            }
            if member.entry.kind != EntryKind::Directory {
                let is_below = below(path);
                shown.retain(|path, _| !is_below(path));
            }
            shown.insert(path.to_vec(), member.clone());
            true
        });
        if !layer.is_empty() {
            left.push(layer);
        }
    }
    left
}

impl Image {
    fn of(engine: &Engine, id: &str, scratch: &Path, is_still: bool) -> Self {
        let (archive, tree) = (scratch.join("image.tar"), scratch.join("tree.tar"));
        let (silent, cancel) = (Silent, Cancel::new());
        let output = Output::Path(archive.clone());
        engine.save(&[id.to_owned()], SaveFormat::Docker, &output, &silent, &cancel).unwrap();
        engine.export_tree(id, &TreeOutput::Tar(tree.clone()), &cancel).unwrap();
        let files: BTreeMap<String, Vec<u8>> = members(&fs::read(&archive).unwrap(), false)
            .into_iter()
            .map(|file| (String::from_utf8(file.entry.path.as_bytes().to_vec()).unwrap(), file.bytes))
            .collect();
        let manifest: Value = serde_json::from_slice(&files["manifest.json"]).unwrap();
        let file = |name: &Value| &files[name.as_str().unwrap()];
        let mut config: Value = serde_json::from_slice(file(&manifest[0]["Config"])).unwrap();
        let layers = manifest[0]["Layers"].as_array().unwrap().iter().map(|name| members(file(name), is_still));
        let layers: Vec<_> = layers.collect();
        let with_layer = |entry: &&Value| entry["empty_layer"] != true;
        assert_eq!(config["history"].as_array().unwrap().iter().filter(with_layer).count(), layers.len(), "{config:#}");
        config.as_object_mut().unwrap().remove("created");
        for entry in config["history"].as_array_mut().unwrap() {
            entry.as_object_mut().unwrap().remove("created");
            if !is_still {
                entry.as_object_mut().unwrap().remove("empty_layer");
            }
        }
        let layers = if is_still { layers } else { without_repeats(layers) };
        // Digests of the layers, which the layers themselves stand for.
        config["rootfs"] = Value::Null;
        let tree_members = members(&fs::read(&tree).unwrap(), is_still);
        fs::remove_file(archive).unwrap();
        fs::remove_file(tree).unwrap();
        Self { config, layers, tree: tree_members }
    }

    fn difference(&self, other: &Self) -> String {
        let lines = |image: &Self| -> BTreeSet<String> {
            let layers = image.layers.iter().enumerate();
            let layers = layers.flat_map(|(n, layer)| layer.iter().map(move |m| format!("layer {n}: {m:?}")));
            let tree = image.tree.iter().map(|m| format!("tree: {m:?}"));
            layers.chain(tree).chain([format!("config: {:#}", image.config)]).collect()
        };
        let (cached, clean) = (lines(self), lines(other));
        let mut text = String::new();
        cached.difference(&clean).for_each(|line| writeln!(text, "with the cache  {line}").unwrap());
        clean.difference(&cached).for_each(|line| writeln!(text, "without         {line}").unwrap());
        text
    }
}

/// What builds found, so that a history of errors, or of hits alone, is not taken for a proof.
#[derive(Debug, Default)]
struct Counts {
    edits: u64,
    images: u64,
    steps: usize,
    hits: usize,
}

/// A place for contexts and stores.
struct Ground {
    dir: PathBuf,
    /// The context of its histories stands still.
    is_still: bool,
    /// Dropped last: it unmounts.
    _scratch: Scratch,
}

impl Ground {
    fn new(is_still: bool) -> Self {
        let scratch = Scratch::new();
        let dir = scratch.dir("memory");
        // Every build makes a store and syncs it: what a crash leaves is not asked here.
        rustix::mount::mount("tmpfs", &dir, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
        Self { dir, is_still, _scratch: scratch }
    }

    fn open(&self, name: &str) -> Engine {
        let options = EngineOptions {
            driver: DriverKind::Auto,
            use_reserve: false,
            wait: false,
            on_wait: Box::new(|_| {}),
            registry: Default::default(),
            command: "test".into(),
            warn: Arc::new(|error| panic!("{error}")),
        };
        Engine::open(&self.dir.join(name), options).unwrap()
    }

    fn build(&self, engine: &Engine, world: &World, counts: &mut Counts) -> Result<Image, String> {
        let request = BuildRequest {
            context: world.context.clone(),
            build_args: world.argument.map(|value| ("V".to_owned(), value.to_string())).into_iter().collect(),
            executor: ExecutorChoice::Builtin,
            ..BuildRequest::default()
        };
        let built = engine.build(&request, &Silent, &Cancel::new()).map_err(|error| {
            let causes = std::iter::successors(std::error::Error::source(&error), |error| error.source());
            causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
        })?;
        counts.images += 1;
        counts.steps += built.steps_count;
        counts.hits += built.cached_count;
        Ok(Image::of(engine, &built.id.to_string(), &self.dir, world.is_still))
    }

    /// What is wrong after the last of these edits, and what was found on the way. With `every`, after the first edit
    /// after which something is.
    fn run(&self, history: &[Edit], every: bool) -> (Counts, Option<(usize, String)>) {
        let mut world = World::new(&self.dir.join("context"), self.is_still);
        let kept = self.open("kept");
        let mut counts = Counts::default();
        let mut wrong = None;
        for (number, edit) in history.iter().enumerate() {
            world.apply(edit);
            counts.edits += 1;
            let cached = self.build(&kept, &world, &mut counts);
            if !every && number + 1 < history.len() {
                world.built(cached.is_ok());
                continue;
            }
            let fresh = self.open("fresh");
            let clean = self.build(&fresh, &world, &mut Counts::default());
            fresh.close().unwrap();
            fs::remove_dir_all(self.dir.join("fresh")).unwrap();
            let difference = match (&cached, &clean) {
                (Ok(cached), Ok(clean)) if cached == clean => None,
                // Of several that fail at once either may be told.
                (Err(_), Err(_)) => None,
                (Ok(cached), Ok(clean)) => Some(cached.difference(clean)),
                (Ok(_), Err(error)) => Some(format!("only without the cache: {error}")),
                (Err(error), Ok(_)) => Some(format!("only with the cache: {error}")),
            };
            if let Some(difference) = difference {
                wrong = Some((number, format!("{difference}\n{}", world.shown())));
                break;
            }
            world.built(cached.is_ok());
        }
        kept.close().unwrap();
        fs::remove_dir_all(self.dir.join("kept")).unwrap();
        (counts, wrong)
    }

    /// A shorter history at whose end something is wrong: parts are left out, halves first.
    fn shrink(&self, mut history: Vec<Edit>) -> (Vec<Edit>, String) {
        let mut what = String::new();
        let mut builds = 0;
        let mut length = history.len();
        while length > 0 && builds < SHRINKING_BUILDS_MAX {
            let mut at = 0;
            // The last edit is where it shows.
            while at + length < history.len() && builds < SHRINKING_BUILDS_MAX {
                let mut shorter = history.clone();
                shorter.drain(at..at + length);
                builds += shorter.len();
                match self.run(&shorter, false).1 {
                    Some((_, wrong)) => (history, what) = (shorter, wrong),
                    None => at += length,
                }
            }
            length = if length == 1 { 0 } else { length.div_ceil(2).min(history.len()) };
        }
        (history, what)
    }
}

fn cached_builds_equal_clean_ones(share: u64) {
    if !tools::privileged() {
        return;
    }
    let edits_count = std::env::var("PLIES_EDITS").map_or(EDITS, |count| count.parse().unwrap()) / SHARES;
    let base = match Config::default().rng_seed {
        RngSeed::Fixed(seed) => seed,
        RngSeed::Random => SEED,
    };
    let seed = [base.to_le_bytes(), share.to_le_bytes(), [0; 8], [0; 8]].concat();
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let strategy = edit();
    let history: Vec<Edit> = (0..edits_count).map(|_| strategy.new_tree(&mut runner).unwrap().current()).collect();
    let ground = Ground::new(share.is_multiple_of(2));
    let (counts, wrong) = ground.run(&history, true);
    if let Some((last, what)) = wrong {
        let shown = |history: &[Edit]| history.iter().map(|edit| format!("  {edit:?}\n")).collect::<String>();
        eprintln!("seed {base}, share {share}, after edit {last}:\n{what}\nthe history:\n{}", shown(&history[..=last]));
        let (shorter, what) = ground.shrink(history[..=last].to_vec());
        panic!("seed {base}, share {share}: the shortest history found:\n{}{what}", shown(&shorter));
    }
    eprintln!("seed {base}, share {share}: {counts:?}");
    // Most edits leave something that can be built, most steps have been done before, and many have not.
    assert!(counts.images * 2 > counts.edits, "{counts:?}");
    assert!(counts.hits * 2 > counts.steps && counts.hits * 20 < counts.steps * 19, "{counts:?}");
}

macro_rules! shares {
    ($($name:ident: $share:literal),*) => {
        $(#[test]
        fn $name() {
            cached_builds_equal_clean_ones($share);
        })*

        #[test]
        fn all_shares_are_there() {
            assert_eq!([$($share),*], std::array::from_fn::<u64, { SHARES as usize }, _>(|share| share as u64));
        }
    };
}

shares! {
    privileged_cached_builds_equal_clean_ones_0: 0,
    privileged_cached_builds_equal_clean_ones_1: 1,
    privileged_cached_builds_equal_clean_ones_2: 2,
    privileged_cached_builds_equal_clean_ones_3: 3,
    privileged_cached_builds_equal_clean_ones_4: 4,
    privileged_cached_builds_equal_clean_ones_5: 5,
    privileged_cached_builds_equal_clean_ones_6: 6,
    privileged_cached_builds_equal_clean_ones_7: 7
}
