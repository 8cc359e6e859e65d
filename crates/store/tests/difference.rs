//! What is found out of stacks without a mount: the layer between two of them, and what an upper directory changes of one.

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Rig, assert_healthy, path_of, privileged, process_lease};
use plies_archive::tar::{EntryPath, Writer};
use plies_archive::{ApplyStyle, Implied, Limits, diff_trees, unpack};
use plies_oci::{Compression, ErrorKind};
use plies_store::progress::Silent;
use plies_store::{
    Attach, Cancel, DifferenceError, DriverKind, FinishedStage, ForeignTree, Indexes, LayerContents, LayerId, Lease,
    NotLinked, SnapshotError, Store, Taking, Transfer,
};
use plies_testkit::tar::{Member, archive};
use plies_testkit::tree::Tree;
use proptest::prelude::*;

/// A layer, a line for each entry of its archive: `d/`, `f=content`, `l->target`, `name==other`, `p|`, `n:c1,3`,
/// `-gone` for a whiteout, `!d` for an opaque directory. Attributes follow: `0700`, `@mtime`, `u1:2`, `user.x=v`, `cap`.
type Layer<'a> = &'a [&'a str];

/// `cap_net_raw+ep`, version 2 (include/uapi/linux/capability.h).
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn member(line: &str) -> Member {
    let mut words = line.split(' ');
    let what = words.next().unwrap();
    let device = |numbers: &str| {
        let (major, minor) = numbers.split_once(',').unwrap();
        (major.parse().unwrap(), minor.parse().unwrap())
    };
    let mut member = if let Some(path) = what.strip_prefix('-') {
        Member::whiteout(path)
    } else if let Some(path) = what.strip_prefix('!') {
        Member::opaque(path)
    } else if let Some(path) = what.strip_suffix('/') {
        Member::dir(path)
    } else if let Some(path) = what.strip_suffix('|') {
        Member::fifo(path)
    } else if let Some((path, target)) = what.split_once("->") {
        Member::symlink(path, target)
    } else if let Some((path, target)) = what.split_once("==") {
        Member::hard_link(path, target)
    } else if let Some((path, content)) = what.split_once('=') {
        Member::file(path, content)
    } else if let Some((path, numbers)) = what.split_once(":c") {
        let (major, minor) = device(numbers);
        Member::char_device(path, major, minor)
    } else {
        let (path, numbers) = what.split_once(":b").unwrap_or_else(|| panic!("{line}"));
        let (major, minor) = device(numbers);
        Member::block_device(path, major, minor)
    };
    for word in words {
        member = if let Some(seconds) = word.strip_prefix('@') {
            member.mtime(seconds.parse().unwrap(), 7)
        } else if let Some((uid, gid)) = word.strip_prefix('u').and_then(|word| word.split_once(':')) {
            member.owner(uid.parse().unwrap(), gid.parse().unwrap())
        } else if word == "cap" {
            member.xattr("security.capability", CAPABILITY)
        } else if let Some((name, value)) = word.split_once('=') {
            member.xattr(name, value)
        } else {
            member.mode(u32::from_str_radix(word, 8).unwrap())
        };
    }
    member
}

/// Unpacks an archive as a layer of its own, not published yet; `None` if it cannot be one.
fn try_stage(store: &Store, lines: &[impl AsRef<str>]) -> Option<FinishedStage> {
    let members: Vec<Member> = lines.iter().map(|line| member(line.as_ref())).collect();
    let bytes = archive(&members);
    let stage = store.layers().stage().unwrap();
    let limits = Limits::default();
    let unpacked = unpack(&bytes[..], Compression::None, stage.root(), ApplyStyle::Layer, &limits, None).ok()?;
    let (usage, index) = (unpacked.applied.usage, unpacked.applied.index);
    let contents = LayerContents { diff_id: Some(unpacked.diff_id), usage, index, ..LayerContents::default() };
    (!unpacked.applied.opaque_root).then(|| stage.finish(contents))
}

fn layers(store: &Store, lease: &Lease, lists: &[impl AsRef<[&'static str]>]) -> Vec<LayerId> {
    let stage = |lines: &[&str]| try_stage(store, lines).expect("an archive that is a layer of its own");
    store.layers().publish(lease, lists.iter().map(|lines| stage(lines.as_ref())).collect()).unwrap()
}

fn difference(lease: &Lease, lower: &[LayerId], upper: &[LayerId]) -> Result<Option<LayerId>, DifferenceError> {
    let (limits, cancel) = (Limits::default(), Cancel::new());
    Transfer { lease, limits: &limits, progress: &Silent, cancel: &cancel }.difference(lower, upper)
}

/// What a stack shows. How many names a file has outside of the tree is nobody's business.
fn try_shown(store: &Store, lease: &Lease, layers: &[LayerId]) -> Result<Tree, SnapshotError> {
    let snapshot = store.snapshots().ensure(layers, lease)?;
    let view = store.snapshots().view(snapshot, Attach::Detached)?;
    let tree = Tree::of(&path_of(&view.root())).map(|_, node| node.links = 0);
    view.unmount()?;
    Ok(tree)
}

fn shown(store: &Store, lease: &Lease, layers: &[LayerId]) -> Tree {
    try_shown(store, lease, layers).unwrap()
}

/// What a layer consists of, in the words of [`Layer`] without attributes; implied directories in parentheses, the
/// root left out if it is implied.
fn contents(store: &Store, layer: LayerId) -> Vec<String> {
    let root = store.layers().root(layer).unwrap();
    let index = store.layers().index(layer).unwrap();
    let mut first: BTreeMap<u64, String> = BTreeMap::new();
    let mut lines = Vec::new();
    each_path(&path_of(&root), "", &mut |name, path| {
        let metadata = fs::symlink_metadata(path).unwrap();
        let kind = metadata.file_type();
        let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        let implied = index.is_implied(&EntryPath::clean(name.as_bytes()).unwrap());
        if !kind.is_dir() && metadata.nlink() > 1 && !(kind.is_char_device() && metadata.rdev() == 0) {
            if let Some(first) = first.get(&metadata.ino()) {
                lines.push(format!("{name}=={first}"));
                return;
            }
            first.insert(metadata.ino(), name.to_owned());
        }
        lines.push(if kind.is_dir() {
            assert!(rustix::fs::getxattr(path, "trusted.overlay.opaque", &mut [0; 9][..]).is_err(), "{name} is opaque");
            match (name, implied) {
                ("", true) => return,
                ("", false) => "/".to_owned(),
                (_, true) => format!("({name}/)"),
                (_, false) => format!("{name}/"),
            }
        } else if kind.is_file() {
            format!("{name}={}", String::from_utf8(fs::read(path).unwrap()).unwrap())
        } else if kind.is_symlink() {
            format!("{name}->{}", fs::read_link(path).unwrap().display())
        } else if kind.is_fifo() {
            format!("{name}|")
        } else if kind.is_block_device() {
            format!("{name}:b{major},{minor}")
        } else if metadata.rdev() == 0 {
            format!("-{name}")
        } else {
            format!("{name}:c{major},{minor}")
        });
    });
    lines
}

/// A directory before what it holds, in byte order.
fn each_path(path: &Path, name: &str, visit: &mut impl FnMut(&str, &Path)) {
    visit(name, path);
    if fs::symlink_metadata(path).unwrap().is_dir() {
        let mut children: Vec<String> =
            fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        children.sort();
        for child in children {
            let below = if name.is_empty() { child.clone() } else { format!("{name}/{child}") };
            each_path(&path.join(&child), &below, visit);
        }
    }
}

/// Two stacks and the layer between them.
struct Case<'a> {
    claim: &'a str,
    /// At the bottom of both.
    common: &'a [Layer<'a>],
    lower: &'a [Layer<'a>],
    upper: &'a [Layer<'a>],
    /// [`contents`] of the difference; nothing if there is none.
    diff: Layer<'a>,
    /// Another stack to lay the difference over,
    onto: &'a [Layer<'a>],
    /// and all names that it shows then, directories with a slash; not checked if there are none.
    gives: &'a [&'a str],
}

const CASE: Case<'static> = Case { claim: "", common: &[], lower: &[], upper: &[], diff: &[], onto: &[], gives: &[] };

/// Something to change in many ways: a directory that stays as it is, and one that is changed too.
const BASE: Layer<'static> = &[
    "/",
    "etc/",
    "quiet/",
    "quiet/file=1",
    "quiet/gone=x",
    "quiet/sub/",
    "quiet/sub/deep/",
    "quiet/sub/deep/f=f",
    "quiet/sub/g=g",
    "busy/",
    "busy/file=1",
    "busy/gone=x",
    "busy/sub/",
    "busy/sub/f=f",
    "link->quiet",
];

const CASES: &[Case<'static>] = &[
    Case { claim: "two empty stacks do not differ", ..CASE },
    Case { claim: "a stack does not differ from itself", common: &[BASE, &["new=1"]], ..CASE },
    Case {
        claim: "stacks that came to the same in different ways do not differ",
        lower: &[&["/", "a=1", "b=2"]],
        upper: &[&["/", "a=0", "c=3"], &["a=1", "b=2"], &["-c"]],
        ..CASE
    },
    Case {
        claim: "from nothing, all of a tree is new",
        upper: &[&["/", "d/ 0700", "d/f=1", "l->d"]],
        diff: &["/", "d/", "d/f=1", "l->d"],
        onto: &[&["/", "other=1"]],
        gives: &["d/", "d/f", "l", "other"],
        ..CASE
    },
    Case {
        claim: "from nothing, directories that nobody described stay undescribed",
        upper: &[&["usr/bin/tool=1"]],
        diff: &["(usr/)", "(usr/bin/)", "usr/bin/tool=1"],
        ..CASE
    },
    Case {
        claim: "what came and went again in one stack was never there",
        upper: &[&["foo=B"], &["-foo", "bar="]],
        diff: &["bar="],
        onto: &[&["foo=A"]],
        gives: &["bar", "foo"],
        ..CASE
    },
    Case {
        claim: "to nothing, what the lower tree has is deleted and nothing else",
        lower: &[&["/", "a=1", "d/", "d/e/", "d/e/f=1", "l->a"]],
        diff: &["-a", "-d", "-l"],
        onto: &[&["/", "a=1", "d/", "d/own=1", "foo=foo"]],
        gives: &["foo"],
        ..CASE
    },
    Case {
        claim: "a new file in a new directory",
        common: &[BASE],
        upper: &[&["new/", "new/f=1"]],
        diff: &["new/", "new/f=1"],
        ..CASE
    },
    Case {
        claim: "a new file in a directory that is as before leaves it implied",
        common: &[BASE],
        upper: &[&["quiet/new=1"]],
        diff: &["(quiet/)", "quiet/new=1"],
        onto: &[&["/", "quiet/ 0700 u5:5", "quiet/mine=1"]],
        gives: &["quiet/", "quiet/mine", "quiet/new"],
        ..CASE
    },
    Case {
        claim: "a new file in a directory that changed",
        common: &[BASE],
        upper: &[&["busy/ 0700", "busy/new=1"]],
        diff: &["busy/", "busy/new=1"],
        ..CASE
    },
    Case {
        claim: "content of the same length and time",
        common: &[BASE],
        upper: &[&["quiet/file=2", "busy/ 0700", "busy/file=2"]],
        diff: &["busy/", "busy/file=2", "(quiet/)", "quiet/file=2"],
        ..CASE
    },
    Case {
        claim: "the mode of a file",
        common: &[BASE],
        upper: &[&["quiet/file=1 0444", "busy/file=1 0440"]],
        diff: &["(busy/)", "busy/file=1", "(quiet/)", "quiet/file=1"],
        ..CASE
    },
    Case {
        claim: "setuid, setgid and sticky are mode",
        lower: &[&["/", "u=1 0755", "g=1 0755", "t/ 0755"]],
        upper: &[&["/", "u=1 4755", "g=1 2755", "t/ 1755"]],
        diff: &["g=1", "t/", "u=1"],
        ..CASE
    },
    Case {
        claim: "the owner of a file, and its group alone",
        lower: &[&["/", "u=1", "g=1", "same=1 u3:4"]],
        upper: &[&["/", "u=1 u1:0", "g=1 u0:1", "same=1 u3:4"]],
        diff: &["g=1", "u=1"],
        ..CASE
    },
    Case {
        claim: "the time of a file, to the nanosecond",
        lower: &[&["/", "f=1", "g=1 @1500000000"]],
        upper: &[&["/", "f=1", "g=1"]],
        diff: &["g=1"],
        ..CASE
    },
    Case {
        claim: "an extended attribute that came, one that went, one that changed",
        lower: &[&["/", "came=1", "went=1 user.x=1", "changed=1 user.x=1", "same=1 user.x=1"]],
        upper: &[&["/", "came=1 user.x=1", "went=1", "changed=1 user.x=2", "same=1 user.x=1"]],
        diff: &["came=1", "changed=1", "went=1"],
        ..CASE
    },
    Case {
        claim: "capabilities that came, went and stayed",
        lower: &[&["/", "came=1 0755", "went=1 0755 cap", "stayed=1 0755 cap"]],
        upper: &[&["/", "came=1 0755 cap", "went=1 0755", "stayed=1 0755 cap"]],
        diff: &["came=1", "went=1"],
        ..CASE
    },
    Case {
        claim: "attributes of a directory alone: an entry without content",
        lower: &[&["/", "d/", "d/f=1"]],
        upper: &[&["/", "d/ user.x=1", "d/f=1"]],
        diff: &["d/"],
        onto: &[&["/", "d/", "d/mine=1"]],
        gives: &["d/", "d/mine"],
        ..CASE
    },
    Case {
        claim: "mode, owner and time of directories alone",
        common: &[BASE],
        upper: &[&["quiet/sub/ 0700", "busy/ u1:1", "busy/sub/ @5"]],
        diff: &["busy/", "busy/sub/", "(quiet/)", "quiet/sub/"],
        ..CASE
    },
    Case { claim: "the root's own mode", common: &[BASE], upper: &[&["/ 0700"]], diff: &["/"], ..CASE },
    Case {
        claim: "new directories in new, quiet and changed ones",
        common: &[BASE],
        upper: &[&["new/", "new/sub/", "quiet/new/", "busy/ 0700", "busy/new/"]],
        diff: &["busy/", "busy/new/", "new/", "new/sub/", "(quiet/)", "quiet/new/"],
        ..CASE
    },
    Case {
        claim: "a file in place of a directory",
        common: &[BASE],
        upper: &[&["quiet/sub=file", "busy/ 0700", "busy/sub=2"]],
        diff: &["busy/", "busy/sub=2", "(quiet/)", "quiet/sub=file"],
        ..CASE
    },
    Case {
        claim: "an empty directory in place of a file",
        common: &[BASE],
        upper: &[&["quiet/file/ 0700"]],
        diff: &["(quiet/)", "quiet/file/"],
        ..CASE
    },
    Case {
        claim: "a directory with all kinds of things in place of a file",
        common: &[BASE],
        upper: &[&["quiet/file/ 0750", "quiet/file/sub/ 0770", "quiet/file/f=4", "quiet/file/sub/g=5"]],
        diff: &["(quiet/)", "quiet/file/", "quiet/file/f=4", "quiet/file/sub/", "quiet/file/sub/g=5"],
        ..CASE
    },
    Case {
        claim: "a directory that nobody described in place of a file is described",
        lower: &[&["/", "d=1"]],
        upper: &[&["/", "d/f=1"]],
        diff: &["d/", "d/f=1"],
        ..CASE
    },
    Case {
        claim: "everything becomes something else",
        lower: &[&["/", "a=1", "b->a", "c|", "d:c1,3", "e/", "e/x=1", "f:b7,1"]],
        upper: &[&["/", "a->b", "b/", "c=1", "d|", "e:c1,3", "f:c7,1"]],
        diff: &["a->b", "b/", "c=1", "d|", "e:c1,3", "f:c7,1"],
        ..CASE
    },
    Case {
        claim: "a device with other numbers, a link with another target",
        lower: &[&["/", "n:c1,3", "s:c1,5", "l->a", "m->same"]],
        upper: &[&["/", "n:c1,5", "s:c1,5", "l->b", "m->same"]],
        diff: &["l->b", "n:c1,5"],
        ..CASE
    },
    Case {
        claim: "a file is deleted",
        common: &[BASE],
        upper: &[&["-quiet/gone", "busy/ 0700", "-busy/gone"]],
        diff: &["busy/", "-busy/gone", "(quiet/)", "-quiet/gone"],
        onto: &[BASE],
        gives: &[
            "busy/",
            "busy/file",
            "busy/sub/",
            "busy/sub/f",
            "etc/",
            "link",
            "quiet/",
            "quiet/file",
            "quiet/sub/",
            "quiet/sub/deep/",
            "quiet/sub/deep/f",
            "quiet/sub/g",
        ],
        ..CASE
    },
    Case {
        claim: "a directory is deleted, by one mark",
        common: &[BASE],
        upper: &[&["-quiet/sub", "-busy"]],
        diff: &["-busy", "(quiet/)", "-quiet/sub"],
        ..CASE
    },
    Case {
        claim: "what is deleted deep down, a level at a time",
        common: &[BASE],
        upper: &[&["-quiet/sub/deep/f"], &["-quiet/sub/g"]],
        diff: &["(quiet/)", "(quiet/sub/)", "(quiet/sub/deep/)", "-quiet/sub/deep/f", "-quiet/sub/g"],
        ..CASE
    },
    Case {
        claim: "a deletion brings its directory along to where there is none",
        common: &[&["/", "extra/", "extra/file=1"]],
        upper: &[&["-extra/file"]],
        diff: &["(extra/)", "-extra/file"],
        onto: &[&["/", "mine=1"]],
        gives: &["extra/", "mine"],
        ..CASE
    },
    Case {
        claim: "a mark that hides nothing does not get into the difference",
        common: &[BASE],
        upper: &[&["-etc/nothing", "-nowhere", "real=1"]],
        diff: &["real=1"],
        ..CASE
    },
    Case {
        claim: "an opaque directory becomes a mark for each name that is gone",
        common: &[BASE],
        upper: &[&["quiet/", "!quiet", "quiet/new/", "quiet/new/f=1", "quiet/file=1"]],
        diff: &["(quiet/)", "-quiet/gone", "quiet/new/", "quiet/new/f=1", "-quiet/sub"],
        onto: &[BASE, &["quiet/mine=1", "quiet/sub/mine=1"]],
        gives: &[
            "busy/",
            "busy/file",
            "busy/gone",
            "busy/sub/",
            "busy/sub/f",
            "etc/",
            "link",
            "quiet/",
            "quiet/file",
            "quiet/mine",
            "quiet/new/",
            "quiet/new/f",
        ],
        ..CASE
    },
    Case {
        claim: "an opaque directory in the lower stack: what it hid comes back",
        common: &[BASE],
        lower: &[&["quiet/", "!quiet", "quiet/new=1"]],
        diff: &[
            "(quiet/)",
            "quiet/file=1",
            "quiet/gone=x",
            "-quiet/new",
            "quiet/sub/",
            "quiet/sub/deep/",
            "quiet/sub/deep/f=f",
            "quiet/sub/g=g",
        ],
        ..CASE
    },
    Case {
        claim: "an opaque directory that nobody described",
        common: &[BASE],
        upper: &[&["!quiet", "quiet/file=1"]],
        diff: &["(quiet/)", "-quiet/gone", "-quiet/sub"],
        ..CASE
    },
    Case {
        claim: "a directory deleted and made again shows nothing of before",
        common: &[&["/", "d/", "d/a=1"]],
        upper: &[&["-d"], &["d/", "d/b=1"]],
        diff: &["(d/)", "-d/a", "d/b=1"],
        ..CASE
    },
    Case {
        claim: "a directory over a file over a directory shows nothing of the lowest",
        common: &[&["/", "d/", "d/a=1"]],
        upper: &[&["d=1"], &["d/", "d/b=1"]],
        diff: &["(d/)", "-d/a", "d/b=1"],
        ..CASE
    },
    Case {
        claim: "what only the lower stack deleted comes back",
        common: &[BASE],
        lower: &[&["-quiet", "-busy/file"]],
        diff: &[
            "(busy/)",
            "busy/file=1",
            "quiet/",
            "quiet/file=1",
            "quiet/gone=x",
            "quiet/sub/",
            "quiet/sub/deep/",
            "quiet/sub/deep/f=f",
            "quiet/sub/g=g",
        ],
        ..CASE
    },
    Case {
        claim: "what only the lower stack changed is changed back",
        common: &[BASE],
        lower: &[&["quiet/file=2", "quiet/ 0700", "new=1", "busy=file", "link/"]],
        diff: &[
            "busy/",
            "busy/file=1",
            "busy/gone=x",
            "busy/sub/",
            "busy/sub/f=f",
            "link->quiet",
            "-new",
            "quiet/",
            "quiet/file=1",
        ],
        ..CASE
    },
    Case {
        claim: "files moved away and back again are no difference",
        common: &[BASE],
        upper: &[&["-quiet/file"], &["quiet/file=1", "busy/file=1"]],
        ..CASE
    },
    Case {
        claim: "new pipes and devices",
        common: &[BASE],
        upper: &[&["quiet/p|", "busy/ 0700", "busy/p|", "quiet/null:c1,3", "quiet/loop:b7,0"]],
        diff: &["busy/", "busy/p|", "(quiet/)", "quiet/loop:b7,0", "quiet/null:c1,3", "quiet/p|"],
        ..CASE
    },
    Case {
        claim: "a directory with something in it goes over a link, not through it",
        common: &[&["/", "foo/"]],
        upper: &[&["foo/file=1"]],
        diff: &["(foo/)", "foo/file=1"],
        onto: &[&["/", "bar/"], &["foo->/bar"]],
        gives: &["bar/", "foo/", "foo/file"],
        ..CASE
    },
    Case {
        claim: "a link goes over a directory with something in it",
        upper: &[&["/", "bar/", "foo->/bar"]],
        diff: &["/", "bar/", "foo->/bar"],
        onto: &[&["/", "foo/", "foo/file=1"]],
        gives: &["bar/", "foo"],
        ..CASE
    },
    Case {
        claim: "a deletion takes the link, not what it leads to",
        common: &[&["/", "foo/"]],
        upper: &[&["-foo"]],
        diff: &["-foo"],
        onto: &[&["/", "bar/", "foo->/bar"]],
        gives: &["bar/"],
        ..CASE
    },
    Case {
        claim: "a deletion below a link does not go through it",
        common: &[&["/", "foo/", "foo/file=1"]],
        upper: &[&["foo/ @9", "-foo/file"]],
        diff: &["foo/", "-foo/file"],
        onto: &[&["/", "bar/", "bar/file=1", "foo->/bar"]],
        gives: &["bar/", "bar/file", "foo/"],
        ..CASE
    },
    Case {
        claim: "links in a circle",
        lower: &[&["/"]],
        upper: &[&["/", "1->/2", "2->/1"]],
        diff: &["1->/2", "2->/1"],
        onto: &[&["/", "1/", "1/file=foo"]],
        gives: &["1", "2"],
        ..CASE
    },
    Case {
        claim: "a link to its own directory, replaced by a directory",
        lower: &[&["/", "foo/", "foo/link->../foo"]],
        upper: &[&["/", "foo/", "foo/link/", "foo/link/file=1"]],
        diff: &["(foo/)", "foo/link/", "foo/link/file=1"],
        ..CASE
    },
    Case {
        claim: "new names of one file are names of one file",
        common: &[BASE],
        upper: &[&["dir/", "dir/1= 0600", "dir/2==dir/1 0600", "dir/3=3"]],
        diff: &["dir/", "dir/1=", "dir/2==dir/1", "dir/3=3"],
        ..CASE
    },
    Case {
        claim: "a changed file with several names changes at all of them",
        lower: &[&["/", "a=1", "b==a", "c=3"]],
        upper: &[&["/", "a=2", "b==a", "c=3"]],
        diff: &["a=2", "b==a"],
        ..CASE
    },
    Case {
        claim: "a new name for a file brings the file along, with its other names",
        lower: &[&["/", "d/ @1", "d/a=1", "d/b==d/a", "z=1"]],
        upper: &[&["/", "d/ @1", "d/a=1", "d/b==d/a", "c==d/a", "z=1"]],
        diff: &["c=1", "(d/)", "d/a==c", "d/b==c"],
        ..CASE
    },
    Case {
        claim: "files that became one, and one that became two",
        lower: &[&["/", "a=1", "b=1", "x=1", "y==x"]],
        upper: &[&["/", "a=1", "b==a", "x=1", "y=1"]],
        diff: &["a=1", "b==a", "x=1", "y=1"],
        ..CASE
    },
    Case {
        claim: "a name less leaves the others alone",
        lower: &[&["/", "a=1", "b==a", "c==a"]],
        upper: &[&["/", "a=1", "c==a"]],
        diff: &["-b"],
        ..CASE
    },
    Case {
        claim: "several names of a link, a pipe and a device",
        upper: &[&["l->x", "m==l", "p|", "q==p", "n:c1,3", "o==n"]],
        diff: &["l->x", "m==l", "n:c1,3", "o==n", "p|", "q==p"],
        ..CASE
    },
    Case {
        claim: "of stacks that share layers in the middle, only the others' paths differ",
        lower: &[&["/", "a=1"], &["b=1", "d/f=1"], &["c=1"]],
        upper: &[&["/", "A=1"], &["b=1", "d/f=1"], &["C=1"]],
        diff: &["A=1", "C=1", "-a", "-c"],
        ..CASE
    },
    Case {
        claim: "a layer more on top of a merge",
        common: &[&["A=A"], &["B=B"]],
        upper: &[&["C=C"]],
        diff: &["C=C"],
        ..CASE
    },
    Case {
        claim: "a deletion on top of a merge",
        common: &[&["A=A"], &["B=B"]],
        lower: &[&["C=C"]],
        upper: &[&["C=C"], &["-C"]],
        diff: &["-C"],
        onto: &[&["A=A"], &["B=B"], &["C=C"]],
        gives: &["A", "B"],
    },
    Case {
        claim: "merges in merges",
        common: &[&["A=A"], &["B=B"], &["C=C"]],
        upper: &[&["D=D"], &["E=E"], &["-A"], &["-D"]],
        diff: &["-A", "E=E"],
        onto: &[&["A=A"], &["B=B"], &["D=D"]],
        gives: &["B", "D", "E"],
        ..CASE
    },
    Case {
        claim: "one difference from the other: each takes away what the other adds",
        lower: &[&["/", "A=A", "both=1"]],
        upper: &[&["/", "B=B", "both=1"]],
        diff: &["-A", "B=B"],
        onto: &[&["/", "A=A", "both=1"]],
        gives: &["B", "both"],
        ..CASE
    },
    Case {
        claim: "a directory that one stack describes and the other only passes through",
        common: &[&["/", "tmp/ 1777"]],
        lower: &[&["tmp/a=1"]],
        upper: &[&["tmp/ 0755", "tmp/a=1"]],
        diff: &["tmp/"],
        ..CASE
    },
    Case {
        claim: "a directory that both stacks only pass through is as the common layers say",
        common: &[&["/", "tmp/ 1777"]],
        lower: &[&["tmp/a=1"]],
        upper: &[&["tmp/b=1"]],
        diff: &["(tmp/)", "-tmp/a", "tmp/b=1"],
        onto: &[&["/", "tmp/ 0700", "tmp/a=1"]],
        gives: &["tmp/", "tmp/b"],
    },
    Case {
        claim: "a directory of which the last undescribed content went is described",
        upper: &[&["d/f=1", "e=1"], &["-d/f"]],
        diff: &["d/", "e=1"],
        ..CASE
    },
    Case { claim: "a layer of nothing", common: &[BASE], upper: &[&[]], ..CASE },
];

fn check_cases(driver: DriverKind) {
    const { assert!(CASES.len() >= 40) };
    let rig = Rig::with_driver(driver);
    let store = rig.open();
    let lease = process_lease(&store);
    for Case { claim, common, lower, upper, diff, onto, gives } in CASES {
        let all = layers(&store, &lease, &[*common, *lower, *upper, *onto].concat());
        let (common, rest) = all.split_at(common.len());
        let (lower, rest) = rest.split_at(lower.len());
        let (upper, onto) = rest.split_at(upper.len());
        let [lower, upper] = [[common, lower].concat(), [common, upper].concat()];
        let made = difference(&lease, &lower, &upper).unwrap_or_else(|error| panic!("{claim}: {error}"));
        assert_eq!(made.map_or(Vec::new(), |made| contents(&store, made)), *diff, "{claim}");
        let laid = |over: &[LayerId]| shown(&store, &lease, &[over, made.as_slice()].concat());
        let (is, should) = (laid(&lower), shown(&store, &lease, &upper));
        match lower.is_empty() && made.is_none() || upper.is_empty() {
            // Nobody says what the root of an empty stack is like.
            true => is.without(&[""]).assert_same(&should.without(&[""]), claim),
            false => is.assert_same(&should, claim),
        }
        if !gives.is_empty() {
            let is = laid(onto);
            let names = is.names().filter(|name| !name.is_empty());
            let slash = |name: &str| if is.get(name).kind == "dir" { "/" } else { "" };
            let names: BTreeSet<String> = names.map(|name| format!("{name}{}", slash(name))).collect();
            assert_eq!(names, gives.iter().map(|name| (*name).to_owned()).collect(), "{claim}: onto another");
        }
    }
    assert_healthy(&store);
    rig.assert_no_warnings();
}

#[test]
fn privileged_every_kind_of_difference_in_copies() {
    if privileged("every_kind_of_difference_in_copies") {
        check_cases(DriverKind::Native);
    }
}

#[test]
fn privileged_every_kind_of_difference_in_mounts() {
    if privileged("every_kind_of_difference_in_mounts") {
        check_cases(DriverKind::Overlay);
    }
}

#[test]
fn privileged_a_difference_leaves_an_unrelated_directory_as_it_is() {
    if !privileged("a_difference_leaves_an_unrelated_directory_as_it_is") {
        return;
    }
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let made = layers(
        &store,
        &lease,
        &[&["/", "d/ 0750 u3:3", "e/ 0711"][..], &["d/f=1", "-e/none"], &["/ 0700", "d/ 1777 user.x=1"]],
    );
    let [base, change, other] = made[..] else { panic!() };
    let diff = difference(&lease, &[base], &[base, change]).unwrap().unwrap();
    let implied =
        |path: &str| store.layers().index(diff).unwrap().why_implied(&EntryPath::clean(path.as_bytes()).unwrap());
    assert_eq!([implied(""), implied("d")], [Some(Implied::CopiedUp); 2]);
    // By itself it shows the directory that it was made in, over another base that base's own.
    assert_eq!((shown(&store, &lease, &[diff]).get("d").mode, shown(&store, &lease, &[diff]).get("d").uid), (0o750, 3));
    let merged = shown(&store, &lease, &[other, diff]);
    let before = shown(&store, &lease, &[other]);
    assert_eq!((merged.get(""), merged.get("d")), (before.get(""), before.get("d")));
    assert_eq!(merged.get("d/f").size_bytes, 1);
    // Nobody knows what a directory is like that nobody described, in the difference neither.
    let undescribed = difference(&lease, &[], &[change]).unwrap().unwrap();
    let index = store.layers().index(undescribed).unwrap();
    assert_eq!(index.why_implied(&EntryPath::clean(b"d").unwrap()), Some(Implied::OnTheWay));
}

/// Removes everything in a directory but what is listed, and puts something of its own there; the directory looks as
/// before.
fn poison(dir: &Path, kept: &[&str]) {
    let modified = fs::metadata(dir).unwrap().modified().unwrap();
    for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        let below: Vec<&str> = kept.iter().filter_map(|kept| kept.strip_prefix(&format!("{name}/"))).collect();
        match entry.file_type().unwrap().is_dir() {
            _ if kept.contains(&name.as_str()) => {}
            true if !below.is_empty() => poison(&entry.path(), &below),
            true => fs::remove_dir_all(entry.path()).unwrap(),
            false => fs::remove_file(entry.path()).unwrap(),
        }
    }
    fs::write(dir.join("intruder"), "nobody put it there").unwrap();
    fs::File::open(dir).unwrap().set_modified(modified).unwrap();
}

#[test]
fn privileged_layers_at_the_bottom_of_both_are_not_read_where_the_others_say_nothing() {
    if !privileged("layers_at_the_bottom_of_both_are_not_read_where_the_others_say_nothing") {
        return;
    }
    let touched: [&[&'static str]; 2] = [
        &["a/same=1", "a/mine=1", "-a/b/hidden", "-lost", "new/f=1"],
        &["a/same=2", "-a/b/gone", "-a/b/nothing", "changed=2", "kept=k"],
    ];
    let made = |is_poisoned: bool| {
        let rig = Rig::new();
        let store = rig.open();
        let lease = process_lease(&store);
        let common = [
            BASE,
            &["a/", "a/b/", "a/b/gone=1", "a/b/hidden=hid", "a/b/stays=1", "a/c/", "a/c/deep/", "a/c/deep/f=1"],
            &["kept=k", "changed=1", "lost/", "lost/f=1", "never/f=1", "a/same=0", "a/untouched=1"],
        ];
        let common = layers(&store, &lease, &common);
        let own = layers(&store, &lease, &touched);
        if is_poisoned {
            let tree = |at: usize| rig.root().join(format!("layers/{}/fs", common[at]));
            poison(&tree(0), &[]);
            poison(&tree(1), &["a/b/gone", "a/b/hidden"]);
            poison(&tree(2), &["a/same", "kept", "changed", "lost"]);
        }
        let [lower, upper] = [[&common[..], &own[..1]].concat(), [&common[..], &own[1..]].concat()];
        let made = difference(&lease, &lower, &upper).unwrap().unwrap();
        let again = difference(&lease, &upper, &lower).unwrap().unwrap();
        let diff_id = |layer| store.layers().info(layer).unwrap().diff_id.unwrap();
        (contents(&store, made), diff_id(made), contents(&store, again), diff_id(again))
    };
    let whole = made(false);
    assert_eq!(
        whole.0,
        [
            "(a/)",
            "(a/b/)",
            "-a/b/gone",
            "a/b/hidden=hid",
            "-a/mine",
            "a/same=2",
            "changed=2",
            "lost/",
            "lost/f=1",
            "-new"
        ]
    );
    assert_eq!(made(true), whole);
}

#[test]
fn privileged_layers_at_the_bottom_of_both_are_not_opened_where_the_others_say_all() {
    if !privileged("layers_at_the_bottom_of_both_are_not_opened_where_the_others_say_all") {
        return;
    }
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let made = layers(
        &store,
        &lease,
        &[BASE, &["/", "d/", "d/f=1", "e/f=1"], &["/", "d/", "d/f=2", "e/f=1"], &["/", "d/ 0700", "d/f=2", "-e/f"]],
    );
    let [common, a, b, c] = made[..] else { panic!() };
    fs::remove_dir_all(rig.root().join(format!("layers/{common}"))).unwrap();
    let diff = difference(&lease, &[common, a], &[common, b]).unwrap().unwrap();
    assert_eq!(contents(&store, diff), ["(d/)", "d/f=2"]);
    assert_eq!(difference(&lease, &[common], &[common]).unwrap(), None);
    // It does ask where it must, and then says so.
    let error = difference(&lease, &[common, a], &[common, b, c])
        .map(|_| ())
        .and(difference(&lease, &[common], &[common, c]))
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DataLoss, "{error}");
}

#[test]
fn privileged_the_same_difference_is_the_same_layer() {
    if !privileged("the_same_difference_is_the_same_layer") {
        return;
    }
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let made = layers(&store, &lease, &[&["/", "a=1"][..], &["/", "b=2"], &["-a", "b=2"]]);
    let [a, b, as_archive] = made[..] else { panic!() };
    let second = process_lease(&store);
    let diff = difference(&second, &[a], &[b]).unwrap().unwrap();
    assert_eq!(difference(&lease, &[a], &[b]).unwrap(), Some(diff));
    assert!(second.resources().unwrap().contains(&diff.into()), "the lease holds it");
    let info = store.layers().info(diff).unwrap();
    assert!(!info.derived && info.chain_id.is_none());
    assert_eq!(info.usage, common::measure(&path_of(&store.layers().root(diff).unwrap())));
    // The root has an entry in a difference, unlike here.
    assert_ne!(diff, as_archive);
    // Its diff ID is that of the archive that it makes, and whoever unpacks that gets the same tree.
    let (limits, cancel) = (Limits::default(), Cancel::new());
    let transfer = Transfer { lease: &lease, limits: &limits, progress: &Silent, cancel: &cancel };
    let mut bytes = Vec::new();
    transfer.write_tar(info.diff_id.unwrap(), Some(diff), &mut bytes).unwrap();
    let stage = store.layers().stage().unwrap();
    let unpacked = unpack(&bytes[..], Compression::None, stage.root(), ApplyStyle::Layer, &limits, None).unwrap();
    assert_eq!(Some(unpacked.diff_id), info.diff_id);
    let unpacked = LayerContents { usage: unpacked.applied.usage, index: unpacked.applied.index, ..Default::default() };
    let unpacked = store.layers().publish(&lease, vec![stage.finish(unpacked)]).unwrap()[0];
    shown(&store, &lease, &[a, unpacked]).assert_same(&shown(&store, &lease, &[b]), "by its archive");
    assert_healthy(&store);
}

#[test]
fn privileged_what_cannot_be_is_refused_and_leaves_nothing() {
    if !privileged("what_cannot_be_is_refused_and_leaves_nothing") {
        return;
    }
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let base = layers(&store, &lease, &[&["/", "a=1"]])[0];
    for (name, kind) in [(".wh.a", "file"), (".wh..wh.plnk", "dir"), (".wh..wh..opq", "file")] {
        let stage = store.layers().stage().unwrap();
        let path = path_of(&stage.root()).join(name);
        if kind == "dir" { fs::create_dir(path) } else { fs::write(path, "") }.unwrap();
        let usage = common::measure(&path_of(&stage.root()));
        let odd =
            store.layers().publish(&lease, vec![stage.finish(LayerContents { usage, ..Default::default() })]).unwrap();
        for (lower, upper) in [([base], [odd[0]]), ([odd[0]], [base])] {
            let made = difference(&lease, &lower, &upper);
            // To hide what is called `.wh.a` takes `.wh..wh.a`, which means something else.
            let error = made.expect_err(name);
            assert!(matches!(&error, DifferenceError::Unrepresentable { .. }), "{name}: {error}");
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
    }
    let absent: LayerId = "00000000000000ff".parse().unwrap();
    for (lower, upper) in [([base], [absent]), ([absent], [base]), ([absent], [absent])] {
        let error = difference(&lease, &lower, &upper).unwrap_err();
        assert!(matches!(error, DifferenceError::NotFound { layer } if layer == absent), "{error}");
    }
    let (limits, cancel) = (Limits::default(), Cancel::new());
    cancel.cancel();
    let transfer = Transfer { lease: &lease, limits: &limits, progress: &Silent, cancel: &cancel };
    assert_eq!(transfer.difference(&[], &[base]).unwrap_err().kind(), ErrorKind::Canceled);
    assert_eq!(fs::read_dir(rig.root().join("layers/stage")).unwrap().count(), 0);
    assert_healthy(&store);
}

#[test]
fn privileged_sockets_are_left_out_and_make_way() {
    if !privileged("sockets_are_left_out_and_make_way") {
        return;
    }
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let base = layers(&store, &lease, &[&["/", "was-file=1", "was-dir/", "f=1"]])[0];
    let stage = store.layers().stage().unwrap();
    for name in ["was-file", "was-dir", "new", "stays"] {
        drop(std::os::unix::net::UnixListener::bind(path_of(&stage.root()).join(name)).unwrap());
    }
    let usage = common::measure(&path_of(&stage.root()));
    let index = [(EntryPath::root(), Implied::OnTheWay)].into_iter().collect();
    let sockets = LayerContents { usage, index, ..LayerContents::default() };
    let sockets = store.layers().publish(&lease, vec![stage.finish(sockets)]).unwrap()[0];
    let diff = difference(&lease, &[base], &[base, sockets]).unwrap().unwrap();
    assert_eq!(contents(&store, diff), ["-was-dir", "-was-file"]);
    let back = difference(&lease, &[base, sockets], &[base]).unwrap().unwrap();
    assert_eq!(contents(&store, back), ["-new", "-stays", "was-dir/", "was-file=1"]);
    assert_eq!(difference(&lease, &[sockets, base], &[base, sockets, base]).unwrap(), None);
}

#[test]
fn privileged_trees_deeper_than_any_path() {
    if !privileged("trees_deeper_than_any_path") {
        return;
    }
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let deep = |file: &str| {
        let stage = store.layers().stage().unwrap();
        let mut here = rustix::fs::openat(stage.root(), ".", rustix::fs::OFlags::DIRECTORY, 0.into()).unwrap();
        for level in 0..300 {
            let name = format!("directory-number-{level}");
            rustix::fs::mkdirat(&here, &name, 0o755.into()).unwrap();
            here = rustix::fs::openat(&here, &name, rustix::fs::OFlags::DIRECTORY, 0.into()).unwrap();
        }
        fs::write(path_of(&here).join(file), file).unwrap();
        stage.finish(LayerContents::default())
    };
    let made = store.layers().publish(&lease, vec![deep("a"), deep("b")]).unwrap();
    let diff = difference(&lease, &made[..1], &made[1..]).unwrap().unwrap();
    // The deepest directory has another time; all others are as before, or not.
    let usage = store.layers().info(diff).unwrap().usage;
    assert_eq!((usage.inodes, usage.content_bytes), (301 + 2, 1));
    assert_eq!(difference(&lease, &[made[0], diff], &made[1..]).unwrap(), None);
}

/// A line of a random layer: few names, so that they collide and change type.
fn lines() -> impl Strategy<Value = Vec<String>> {
    let dir = prop_oneof![3 => Just(""), 2 => Just("a/"), 2 => Just("b/"), 1 => Just("a/b/"), 1 => Just("a/c/")];
    let place = || {
        (dir.clone(), prop_oneof![Just("a"), Just("b"), Just("c"), Just("x"), Just("y"), Just("z")])
            .prop_map(|(dir, name)| format!("{dir}{name}"))
            // A value of each strategy lies within its parent's otherwise: more than a test's stack in a debug build.
            .boxed()
    };
    let line = prop_oneof![
        5 => (place(), "[pq]{0,2}").prop_map(|(at, text)| format!("{at}={text}")),
        4 => place().prop_map(|at| format!("{at}/")),
        1 => (place(), "[pq]").prop_map(|(at, target)| format!("{at}->{target}")),
        1 => place().prop_map(|at| format!("{at}|")),
        1 => (place(), 3..5_u32).prop_map(|(at, minor)| format!("{at}:c1,{minor}")),
        1 => (place(), place()).prop_map(|(at, target)| format!("{at}=={target}")),
        4 => place().prop_map(|at| format!("-{at}")),
        1 => place().prop_map(|at| format!("!{at}")),
    ];
    let attributes = prop_oneof![
        4 => Just(""), 1 => Just(" 0711"), 1 => Just(" u1:2"), 1 => Just(" @5"), 1 => Just(" user.x=1"), 1 => Just(" 0755 cap"),
    ];
    let line = (line, attributes).prop_map(|(line, attributes)| {
        let plain = line.contains('=') && !line.contains("==") || line.ends_with('/');
        let allowed = plain && (line.contains('=') || !attributes.contains("cap"));
        if allowed { vec![format!("{line}{attributes}")] } else { vec![line] }
    });
    let twins =
        (place(), place(), "[pq]").prop_map(|(at, too, text)| vec![format!("{at}={text}"), format!("{too}=={at}")]);
    let some = proptest::collection::vec(prop_oneof![5 => line, 1 => twins], 0..9);
    (any::<bool>(), any::<bool>(), some).prop_map(|(root, parents, lines)| {
        let mut lines = lines.concat();
        if parents {
            lines.splice(0..0, ["a/", "b/", "a/b/", "a/c/"].map(str::to_owned));
        }
        if root {
            lines.insert(0, "/".to_owned());
        }
        lines
    })
}

/// As many of the lines as go together.
fn random_layer(store: &Store, mut lines: Vec<String>) -> FinishedStage {
    loop {
        match try_stage(store, &lines) {
            Some(stage) => return stage,
            // A hard link to nothing, to a directory, to a mark; a mark in a directory of which nothing else is said.
            None => {
                let last = |of: fn(&String) -> bool| lines.iter().rposition(of);
                let odd = last(|line| line.contains("==")).or_else(|| last(|line| line.starts_with(['-', '!'])));
                lines.remove(odd.expect("because nothing else is refused"));
            }
        }
    }
}

/// Which names are one file, of those in `among`.
fn groups(tree: &Tree, among: &dyn Fn(&str) -> bool) -> BTreeSet<Vec<String>> {
    let of = |name: &str| tree.get(name).names.iter().filter(|name| among(name)).cloned().collect();
    tree.names().filter(|name| among(name)).map(of).collect()
}

fn without_groups(tree: &Tree) -> Tree {
    tree.clone().map(|_, node| node.names.clear())
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None,
        max_global_rejects: 10_000,
        ..ProptestConfig::with_cases(40)
    })]

    #[test]
    fn privileged_a_difference_over_the_lower_tree_is_the_upper_tree(
        common in proptest::collection::vec(lines(), 0..3),
        lower in proptest::collection::vec(lines(), 0..3),
        upper in proptest::collection::vec(lines(), 0..3),
        mounts in any::<bool>(),
    ) {
        if !privileged("a_difference_over_the_lower_tree_is_the_upper_tree") {
            return Ok(());
        }
        let rig = Rig::with_driver(if mounts { DriverKind::Overlay } else { DriverKind::Native });
        let store = rig.open();
        let lease = process_lease(&store);
        let counts = (common.len(), lower.len());
        let staged = common.into_iter().chain(lower).chain(upper).map(|lines| random_layer(&store, lines)).collect();
        let all = store.layers().publish(&lease, staged).unwrap();
        let (common, rest) = all.split_at(counts.0);
        let (lower, upper) = rest.split_at(counts.1);
        let [lower, upper] = [[common, lower].concat(), [common, upper].concat()];
        let (before, after) = match (try_shown(&store, &lease, &lower), try_shown(&store, &lease, &upper)) {
            (Ok(before), Ok(after)) => (before, after),
            // An undescribed directory over a file: a stack that nobody can have.
            (Err(SnapshotError::NeedsBase { .. }), _) | (_, Err(SnapshotError::NeedsBase { .. })) => {
                return Err(TestCaseError::reject("not a stack"));
            }
            (before, after) => panic!("{before:?} {after:?}"),
        };
        let made = difference(&lease, &lower, &upper).unwrap();
        let with = [&lower[..], made.as_slice()].concat();
        let result = shown(&store, &lease, &with);
        let rootless = upper.is_empty() || lower.is_empty() && made.is_none();
        let gone: &[&str] = if rootless { &[""] } else { &[] };
        let (result, after) = (result.without(gone), after.without(gone));
        prop_assert_eq!(without_groups(&result).diff(&without_groups(&after)), "");

        let names = made.map_or(BTreeSet::new(), |made| {
            let tree = Tree::of(&path_of(&store.layers().root(made).unwrap()));
            tree.names().map(str::to_owned).collect()
        });
        // Names that none of the other layers touches are not known to be those of a file that they do.
        let known = |name: &str| common.is_empty() || names.contains(name);
        prop_assert_eq!(groups(&result, &known), groups(&after, &known));

        if let Some(made) = made {
            let tree = Tree::of(&path_of(&store.layers().root(made).unwrap()));
            for name in tree.names().filter(|name| tree.get(name).device == Some((0, 0))) {
                prop_assert!(before.find(name).is_some(), "{} hides nothing", name);
            }
            prop_assert!(contents(&store, made).len() <= tree.names().count());
            prop_assert!(store.layers().info(made).unwrap().diff_id.is_some());
        }
        if common.is_empty() {
            prop_assert_eq!(difference(&lease, &with, &upper).unwrap(), None, "there is nothing left to differ");
        }
        assert_healthy(&store);
        rig.assert_no_warnings();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

    #[test]
    fn privileged_an_upper_sealed_over_layers_is_that_sealed_over_their_mount(
        below in proptest::collection::vec(lines(), 1..4),
        upper in lines(),
        linked in any::<bool>(),
    ) {
        if !privileged("an_upper_sealed_over_layers_is_that_sealed_over_their_mount") {
            return Ok(());
        }
        let rig = Rig::with_driver(DriverKind::Overlay);
        let store = rig.open();
        let lease = process_lease(&store);
        let staged = below.into_iter().chain([upper]).map(|lines| random_layer(&store, lines)).collect();
        let all = store.layers().publish(&lease, staged).unwrap();
        let (upper, below) = all.split_last().unwrap();
        let open = |path: &Path| std::os::fd::OwnedFd::from(fs::File::open(path).unwrap());
        let source = rig.root().join(format!("layers/{upper}/fs"));
        let (indexes, not_linked) = (Indexes::default(), NotLinked::default());
        let taking = if linked { Taking::Link(&not_linked) } else { Taking::Copy };
        let staged = store.snapshots().stage_foreign(
            (below, &indexes), &ForeignTree::Upper(store.layers().root(*upper).unwrap()), taking, &Cancel::new(), |_, known| Some(known),
        );
        let snapshot = match store.snapshots().ensure(below, &lease) {
            Ok(snapshot) => snapshot,
            Err(SnapshotError::NeedsBase { .. }) => {
                prop_assert!(matches!(staged, Err(SnapshotError::NeedsBase { .. })), "{:?}", staged);
                return Ok(());
            }
            Err(other) => panic!("{other}"),
        };
        let staged = staged.unwrap().unwrap();

        let copy = rig.dir.path().join("copy");
        let options = if linked { "-al" } else { "-a" };
        let copied = std::process::Command::new("cp").arg(options).arg(&source).arg(&copy).status().unwrap();
        prop_assert!(copied.success());
        let view = store.snapshots().view(snapshot, Attach::Detached).unwrap();
        let sealed = plies_archive::seal_upper(open(&copy).as_fd(), Some(view.root())).unwrap();
        view.unmount().unwrap();
        prop_assert_eq!(&staged.contents().index, &sealed.index);
        prop_assert_eq!(staged.contents().usage, sealed.usage);
        let made = store.layers().publish(&lease, vec![staged]).unwrap()[0];
        let tree = |path: &Path| {
            Tree::of(path).map(|_, node| {
                node.links = 0;
                // Made by the seals.
                if node.device == Some((0, 0)) {
                    node.mtime = Default::default();
                }
            })
        };
        prop_assert_eq!(tree(&path_of(&store.layers().root(made).unwrap())).diff(&tree(&copy)), "");
    }
}

#[test]
fn privileged_files_below_a_directory_that_is_mounted_on_itself_are_linked() {
    if !privileged("files_below_a_directory_that_is_mounted_on_itself_are_linked") {
        return;
    }
    let rig = Rig::with_driver(DriverKind::Overlay);
    let store = rig.open();
    let lease = process_lease(&store);
    let source = rig.dir.path().join("source");
    fs::create_dir_all(source.join("d")).unwrap();
    fs::write(source.join("d/f"), "f").unwrap();
    let mount =
        |words: &[&str]| assert!(std::process::Command::new(words[0]).args(&words[1..]).status().unwrap().success());
    let at = source.to_str().unwrap();
    mount(&["mount", "--bind", at, at]);
    let tree = ForeignTree::Upper(fs::File::open(&source).unwrap().into());
    let staged = store.snapshots().stage_foreign(
        (&[], &Indexes::default()),
        &tree,
        Taking::Link(&NotLinked::default()),
        &Cancel::new(),
        |_, known| Some(known),
    );
    let links = fs::metadata(source.join("d/f")).unwrap().nlink();
    drop(tree);
    mount(&["umount", at]);
    assert_eq!(links, 2);
    let layer = store.layers().publish(&lease, vec![staged.unwrap().unwrap()]).unwrap()[0];
    assert_eq!(fs::read_to_string(path_of(&store.layers().root(layer).unwrap()).join("d/f")).unwrap(), "f");
    assert_healthy(&store);
}

/// Prints what a difference of one file over ten common layers of 5,000 files costs, and what comparing two mounts of
/// the same stacks does.
#[test]
#[ignore = "a measurement: run it by name, in release"]
fn bench_a_difference_of_one_file_over_50_000_common_ones() {
    let rig = Rig::new();
    let store = rig.open();
    let lease = process_lease(&store);
    let many = |layer: usize| -> Vec<String> {
        let dirs = (0..50).map(|dir| format!("l{layer}/d{dir}/"));
        let files = (0..5_000).map(|file| format!("l{layer}/d{}/file-{file}=content-of-{file}", file % 50));
        dirs.chain(files).collect()
    };
    let mut stages: Vec<FinishedStage> = (0..10).map(|at| try_stage(&store, &many(at)).unwrap()).collect();
    stages.push(try_stage(&store, &["l3/d7/file-7=before"]).unwrap());
    stages.extend((0..14).map(|run| try_stage(&store, &[format!("l3/d7/file-7=after-{run}")]).unwrap()));
    let made = store.layers().publish(&lease, stages).unwrap();
    let stack = |own: usize| [&made[..10], &made[own..=own]].concat();
    let timed = |work: &dyn Fn()| {
        let start = Instant::now();
        work();
        start.elapsed()
    };
    for (caches, runs) in [("with caches", 11..18), ("without caches", 18..25)] {
        let mut times: [Vec<Duration>; 3] = Default::default();
        for run in runs {
            let (lower, upper) = (stack(10), stack(run));
            let views = || {
                [&lower, &upper].map(|layers| {
                    let snapshot = store.snapshots().ensure(layers, &lease).unwrap();
                    store.snapshots().view(snapshot, Attach::Detached).unwrap()
                })
            };
            let works: [&dyn Fn(); 3] = [
                &|| assert!(difference(&lease, &lower, &upper).unwrap().is_some()),
                // Again: the layer is there, and only the comparison is left.
                &|| assert!(difference(&lease, &lower, &upper).unwrap().is_some()),
                &|| {
                    let [lower, upper] = views();
                    let mut tar = Writer::new(std::io::sink());
                    assert!(diff_trees(Some(lower.root()), upper.root(), &mut tar).unwrap() > 0);
                },
            ];
            for (work, times) in works.iter().zip(&mut times) {
                if caches == "without caches" {
                    fs::write("/proc/sys/vm/drop_caches", "3").unwrap();
                }
                times.push(timed(work));
            }
        }
        for (what, mut times) in ["difference, made", "difference, found", "two mounts compared"].iter().zip(times) {
            times.sort();
            eprintln!("{caches}: {what}: {:.1?} ({:.1?} to {:.1?})", times[3], times[0], times[6]);
        }
    }
}
