//! Merges and diffs case by case: trees in, trees out. All situations of BuildKit's client tests of merge and diff
//! (`client/mergediff_test.go`), each named after its case there, and some that those leave out. Every tree is looked at
//! as a whole: modes, owners, extended attributes with capabilities, devices, links, and which names are one file.
//!
//! Each case is tried six times: with every driver, of layers that were made here and of layers that are pulled when
//! somebody looks. What comes out is exported and imported into an empty store, and has to be the same tree there.

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::Arc;

use Expr::Scratch;
use common::Op::{self, Attr, Chmod, Chown, Device, Dir, Fifo, File, Link, Rm, Shuffle, Symlink};
use common::{Cache, Rig, apply, assert_idle, assert_sound, path_of};
use plies_cache::{BlobRow, ImmutableRef, LayerFormat, Provider, Providers, RecordOptions, Remote, RemoteOptions};
use plies_oci::{BlobDigest, Descriptor};
use plies_store::{Attach, Cancel, DriverKind};
use plies_testkit::tools;
use plies_testkit::tree::Tree;

/// How a tree is put together.
#[derive(Clone, Debug)]
enum Expr {
    /// The empty tree.
    Scratch,
    /// Changes, one layer each, from nothing.
    Layers(Vec<Vec<Op>>),
    /// One more layer on a tree.
    On(Box<Expr>, Vec<Op>),
    Merge(Vec<Expr>),
    Diff(Box<Expr>, Box<Expr>),
    /// The second, after the first was made.
    After(Box<Expr>, Box<Expr>),
}

fn layers<const N: usize>(layers: [&[Op]; N]) -> Expr {
    Expr::Layers(layers.iter().map(|ops| ops.to_vec()).collect())
}

fn on(base: Expr, ops: &[Op]) -> Expr {
    Expr::On(Box::new(base), ops.to_vec())
}

fn merge<const N: usize>(inputs: [Expr; N]) -> Expr {
    Expr::Merge(inputs.to_vec())
}

fn diff(lower: Expr, upper: Expr) -> Expr {
    Expr::Diff(Box::new(lower), Box::new(upper))
}

/// What a step does, alone: as `diff(base, on(base, ops))`.
fn step(base: Expr, ops: &[Op]) -> Expr {
    diff(base.clone(), on(base, ops))
}

fn after(first: Expr, second: Expr) -> Expr {
    Expr::After(Box::new(first), Box::new(second))
}

/// Makes what expressions say. The same expression is the same record.
struct Builder<'a> {
    cache: &'a Cache,
    /// Where layers are made that `cache` has to pull; if `None`, `cache` makes them itself.
    origin: Option<&'a Cache>,
    known: BTreeMap<String, Option<ImmutableRef>>,
    /// The layers, where they are made, by themselves and all below.
    made: BTreeMap<String, ImmutableRef>,
}

impl Builder<'_> {
    fn build(&mut self, expr: &Expr) -> Option<ImmutableRef> {
        let key = format!("{expr:?}");
        if let Some(known) = self.known.get(&key) {
            return known.clone();
        }
        let built = match expr {
            Scratch => None,
            Expr::Layers(layers) => {
                let maker = self.origin.unwrap_or(self.cache);
                let mut top: Option<ImmutableRef> = None;
                for (at, ops) in layers.iter().enumerate() {
                    let made = self.made.entry(format!("{:?}", &layers[..=at]));
                    top = Some(made.or_insert_with(|| maker.finalized(top.as_ref(), ops)).clone());
                }
                match self.origin {
                    Some(_) => pull(self.cache, &exported(&top.unwrap())),
                    None => top,
                }
            }
            Expr::On(base, ops) => {
                let base = self.build(base);
                Some(self.cache.finalized(base.as_ref(), ops))
            }
            Expr::Merge(inputs) => {
                let inputs: Vec<_> = inputs.iter().map(|input| self.build(input)).collect();
                let inputs: Vec<_> = inputs.iter().map(Option::as_ref).collect();
                self.cache.merge(&inputs, &RecordOptions::by("merge")).unwrap()
            }
            Expr::Diff(lower, upper) => match (self.build(lower), self.build(upper)) {
                // There is nothing to take away: whoever asks has the answer already.
                (None, upper) => upper,
                (Some(lower), upper) => {
                    Some(self.cache.diff(Some(&lower), upper.as_ref(), &RecordOptions::by("diff")).unwrap())
                }
            },
            Expr::After(first, second) => {
                self.build(first);
                self.build(second)
            }
        };
        self.known.insert(key, built.clone());
        built
    }
}

/// A blob's bytes, from memory.
struct Bytes(Vec<u8>);

impl Provider for Bytes {
    fn open(&self, _: &BlobRow) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(io::Cursor::new(self.0.clone())))
    }
}

/// A tree's blobs, bottom first, and who has them.
fn exported(held: &ImmutableRef) -> (Vec<Descriptor>, Providers) {
    let options = RemoteOptions { compression: LayerFormat::Uncompressed, ..RemoteOptions::default() };
    let mut remotes = held.get_remotes(true, &options, false, &Cancel::new()).unwrap();
    assert_eq!(remotes.len(), 1);
    let remote: Remote = remotes.remove(0);
    let mut providers = Providers::none();
    for descriptor in &remote.descriptors {
        let mut bytes = Vec::new();
        remote.open(descriptor).unwrap().read_to_end(&mut bytes).unwrap();
        providers = providers.and(&Providers::one(descriptor.digest, Arc::new(Bytes(bytes))));
    }
    (remote.descriptors, providers)
}

/// The same tree in another store, as a chain of blobs that nobody has fetched yet.
fn pull(cache: &Cache, (descriptors, providers): &(Vec<Descriptor>, Providers)) -> Option<ImmutableRef> {
    let options = RecordOptions { providers: providers.clone(), ..RecordOptions::by("pull") };
    let mut top: Option<ImmutableRef> = None;
    for descriptor in descriptors {
        top = Some(cache.get_by_blob(descriptor, top.as_ref(), &options).unwrap());
    }
    top
}

/// All that a step sees of a tree but times, and how many names a file has elsewhere.
fn timeless(tree: Tree) -> Tree {
    tree.without_root().map(|_, node| {
        node.mtime = (0, 0);
        node.links = 0;
    })
}

#[track_caller]
fn shown(held: Option<&ImmutableRef>) -> Tree {
    match held.and_then(|held| held.mount(Attach::Detached, &Cancel::new()).unwrap()) {
        Some(mounted) => {
            let tree = timeless(Tree::of(&path_of(&mounted.root())));
            mounted.unmount().unwrap();
            tree
        }
        None => of_ops(&[]),
    }
}

fn of_ops(ops: &[Op]) -> Tree {
    let dir = tempfile::tempdir().unwrap();
    apply(dir.path(), ops);
    timeless(Tree::of(dir.path()))
}

/// A name, how the tree is made, and a way to make the same at once.
type Case = (&'static str, Expr, Vec<Op>);

fn check(cases: &[Case]) {
    if !tools::privileged() {
        return;
    }
    for driver in [DriverKind::Auto, DriverKind::Overlay, DriverKind::Native] {
        for is_pulled in [false, true] {
            let (rig, origin, other) = (Rig::with_driver(driver), Rig::with_driver(driver), Rig::with_driver(driver));
            let (cache, origin_cache) = (rig.open(), origin.open());
            let origin = is_pulled.then_some(&origin_cache);
            let mut builder = Builder { cache: &cache, origin, known: BTreeMap::new(), made: BTreeMap::new() };
            for (name, expr, expected) in cases {
                let context = format!("{name}, {driver:?}, pulled: {is_pulled}");
                eprintln!("{context}");
                let built = builder.build(expr);
                let expected = of_ops(expected);
                shown(built.as_ref()).assert_same(&expected, &context);
                let Some(built) = built else { continue };
                let copies = other.open();
                shown(pull(&copies, &exported(&built)).as_ref())
                    .assert_same(&expected, &format!("{context}, imported"));
                copies.close();
            }
            drop(builder);
            assert_sound(&cache);
            assert_idle(&cache);
            rig.assert_no_warnings();
            other.assert_no_warnings();
        }
    }
}

// --- what one step does ---

const CHMOD: Op = Chmod("changed", 0o700);

/// A directory that every step below changes itself, and one in which they only change things.
const BASE: &[Op] = &[
    File("shuffled", "s"),
    Dir("kept", 0o755),
    Dir("kept/chmod", 0o755),
    Dir("kept/override", 0o755),
    Dir("kept/delete", 0o755),
    File("kept/opaque/old", ""),
    File("kept/opaque/sub/old", ""),
    File("kept/content", "before"),
    File("kept/mode", "m"),
    File("kept/gone", ""),
    File("kept/to-dir", ""),
    File("kept/to-full-dir", ""),
    File("kept/shuffled", "s"),
    File("kept/owned", ""),
    File("kept/attr", ""),
    Dir("changed", 0o755),
    Dir("changed/chmod", 0o755),
    Dir("changed/override", 0o755),
    Dir("changed/delete", 0o755),
    File("changed/opaque/old", ""),
    File("changed/opaque/sub/old", ""),
    File("changed/content", "before"),
    File("changed/mode", "m"),
    File("changed/gone", ""),
    File("changed/to-dir", ""),
    File("changed/to-full-dir", ""),
    File("changed/shuffled", "s"),
    File("changed/owned", ""),
    File("changed/attr", ""),
];

/// `cap_net_raw+ep`, as the kernel keeps it: `struct vfs_cap_data`, revision 2, effective, bit 13.
const NET_RAW: &str = "\u{1}\0\0\u{2}\0\u{20}\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

fn base() -> Expr {
    layers([&BASE[..9], &BASE[9..20], &BASE[20..]])
}

/// What a step does to the base, and what of it is to be seen in the diff alone, besides the two directories.
struct Slice {
    name: &'static str,
    ops: Vec<Op>,
    alone: Vec<Op>,
}

fn slices() -> Vec<Slice> {
    let slice = |name, ops: &[Op], alone: &[Op]| Slice { name, ops: ops.to_vec(), alone: alone.to_vec() };
    let same = |name, ops: &[Op]| slice(name, ops, ops);
    vec![
        same("TestDiffNewFiles", &[File("new/file", ""), File("kept/new", "1"), File("changed/new", "2")]),
        slice(
            "TestDiffModifiedFiles",
            &[
                Chmod("kept/mode", 0o444),
                File("kept/content", "after"),
                Chmod("changed/mode", 0o440),
                File("changed/content", "after"),
            ],
            &[
                File("kept/mode", "m"),
                Chmod("kept/mode", 0o444),
                File("kept/content", "after"),
                File("changed/mode", "m"),
                Chmod("changed/mode", 0o440),
                File("changed/content", "after"),
            ],
        ),
        same("TestDiffNewDirs", &[Dir("new2/sub", 0o755), Dir("kept/newdir", 0o755), Dir("changed/newdir", 0o755)]),
        slice(
            "TestDiffModifiedDirs",
            &[Chmod("kept/chmod", 0o700), Chmod("changed/chmod", 0o770)],
            &[Dir("kept/chmod", 0o700), Dir("changed/chmod", 0o770)],
        ),
        slice(
            "TestDiffOverrideDirs",
            &[Rm("kept/override"), File("kept/override", "o"), Rm("changed/override"), File("changed/override", "p")],
            &[File("kept/override", "o"), File("changed/override", "p")],
        ),
        slice(
            "TestDiffOverrideFiles",
            &[
                Rm("kept/to-dir"),
                Dir("kept/to-dir", 0o700),
                Rm("kept/to-full-dir"),
                Dir("kept/to-full-dir", 0o750),
                Dir("kept/to-full-dir/sub", 0o770),
                File("kept/to-full-dir/f", ""),
                File("kept/to-full-dir/sub/f", ""),
                Rm("changed/to-dir"),
                Dir("changed/to-dir", 0o700),
                Rm("changed/to-full-dir"),
                Dir("changed/to-full-dir", 0o750),
                Dir("changed/to-full-dir/sub", 0o770),
                File("changed/to-full-dir/sub/f", ""),
            ],
            &[
                Dir("kept/to-dir", 0o700),
                Dir("kept/to-full-dir", 0o750),
                Dir("kept/to-full-dir/sub", 0o770),
                File("kept/to-full-dir/f", ""),
                File("kept/to-full-dir/sub/f", ""),
                Dir("changed/to-dir", 0o700),
                Dir("changed/to-full-dir", 0o750),
                Dir("changed/to-full-dir/sub", 0o770),
                File("changed/to-full-dir/sub/f", ""),
            ],
        ),
        slice("TestDiffDeleteFiles", &[Rm("kept/gone"), Rm("changed/gone")], &[]),
        slice("TestDiffDeleteDirs", &[Rm("kept/delete"), Rm("changed/delete")], &[]),
        slice(
            "TestDiffOpaqueDirs",
            &[
                Rm("kept/opaque"),
                File("kept/opaque/new", "n"),
                File("kept/opaque/newsub/new", "n"),
                Rm("changed/opaque"),
                File("changed/opaque/new", "n"),
                File("changed/opaque/newsub/new", "n"),
            ],
            &[
                File("kept/opaque/new", "n"),
                File("kept/opaque/newsub/new", "n"),
                File("changed/opaque/new", "n"),
                File("changed/opaque/newsub/new", "n"),
            ],
        ),
        same("TestDiffFifos", &[Fifo("kept/fifo"), Fifo("changed/fifo")]),
        same("TestDiffChardevs", &[Device("kept/null", 1, 3), Device("changed/null", 1, 3)]),
        // What follows is not in BuildKit's list.
        slice(
            "other owners",
            &[Chown("kept/owned", 1, 2), Chown("changed/owned", 70_000, 70_001)],
            &[
                File("kept/owned", ""),
                Chown("kept/owned", 1, 2),
                File("changed/owned", ""),
                Chown("changed/owned", 70_000, 70_001),
            ],
        ),
        slice(
            "attributes and capabilities",
            &[Attr("kept/attr", "user.note", "n"), Attr("changed/attr", "security.capability", NET_RAW)],
            &[
                File("kept/attr", ""),
                Attr("kept/attr", "user.note", "n"),
                File("changed/attr", ""),
                Attr("changed/attr", "security.capability", NET_RAW),
            ],
        ),
        same(
            "links",
            &[
                Symlink("kept/symlink", "content"),
                File("kept/one", "1"),
                Link("kept/two", "kept/one"),
                Link("changed/three", "kept/one"),
                Symlink("changed/symlink", "/no/where"),
            ],
        ),
    ]
}

fn with<const N: usize>(parts: [&[Op]; N]) -> Vec<Op> {
    parts.concat()
}

const BOTH: &[Op] = &[Dir("kept", 0o755), Dir("changed", 0o700)];

#[test]
fn privileged_a51_a52_a_diff_of_one_layer_alone_shows_what_the_layer_did() {
    let case = |slice: Slice| (slice.name, step(base(), &with([&[CHMOD], &slice.ops])), with([BOTH, &slice.alone]));
    check(&slices().into_iter().map(case).collect::<Vec<_>>());
}

/// `TestDiffDeleteFilesMerge`, `TestDiffDeleteDirsMerge` and `TestDiffShuffleFilesMerge` are among these.
#[test]
fn privileged_a52_a_merge_with_a_diff_onto_its_lower_is_the_upper() {
    let case = |slice: Slice| {
        let ops = with([&[CHMOD], &slice.ops]);
        (slice.name, merge([base(), step(base(), &ops)]), with([BASE, &ops]))
    };
    let mut cases: Vec<Case> = slices().into_iter().map(case).collect();
    let shuffle = [CHMOD, Shuffle("shuffled"), Shuffle("kept/shuffled"), Shuffle("changed/shuffled")];
    cases.push(("TestDiffShuffleFilesMerge", merge([base(), step(base(), &shuffle)]), with([BASE, &[CHMOD]])));
    check(&cases);
}

#[test]
fn privileged_a49_all_steps_as_one_layer_and_as_many() {
    let all: Vec<Vec<Op>> = [vec![CHMOD]].into_iter().chain(slices().into_iter().map(|slice| slice.ops)).collect();
    let alone: Vec<Op> = slices().into_iter().flat_map(|slice| slice.alone).collect();
    let many = all.iter().fold(base(), |tree, ops| on(tree, ops));
    check(&[
        ("TestDiffCombinedSingleLayer", step(base(), &all.concat()), with([BOTH, &alone])),
        ("TestDiffCombinedMultiLayer", diff(base(), many.clone()), with([BOTH, &alone])),
        ("onto the base, one layer", merge([base(), step(base(), &all.concat())]), with([BASE, &all.concat()])),
        ("onto the base, many", merge([base(), diff(base(), many)]), with([BASE, &all.concat()])),
    ]);
}

#[test]
fn privileged_deletions_and_directories_made_anew_over_other_trees() {
    let extra = || on(base(), &[File("extradir/file", "")]);
    let anew = &[
        CHMOD,
        Rm("kept/opaque"),
        File("kept/opaque/new", ""),
        Rm("changed/opaque"),
        File("changed/opaque/sub2/new", ""),
    ];
    let more = &[
        File("kept/opaque/rebased", ""),
        File("kept/opaque/sub/rebased", ""),
        File("changed/opaque/rebased", ""),
        File("changed/opaque/sub/rebased", ""),
    ];
    let parent = || layers([&[File("p/dir/A", ""), File("p/dir/B", ""), File("p/dir/sub/C", "")]]);
    let dir = || layers([&[Dir("dir", 0o755)]]);
    check(&[
        (
            // The directory is that of the layer, as an export of it has it.
            "TestDiffUnmatchedDelete",
            merge([base(), step(extra(), &[Rm("extradir/file")])]),
            with([BASE, &[Dir("extradir", 0o755)]]),
        ),
        (
            "TestDiffDeleteFilesAfterMerge",
            diff(
                base(),
                on(
                    merge([base(), layers([&[Dir("kept", 0o755), File("kept/gone2", "foo")]])]),
                    &[Rm("kept/gone"), Rm("kept/gone2")],
                ),
            ),
            vec![Dir("kept", 0o755)],
        ),
        (
            // What the diff's lower had is hidden name by name, so what it never had stays.
            "TestDiffOpaqueDirsMerge",
            merge([on(base(), more), step(base(), anew)]),
            with([
                BASE,
                &[
                    CHMOD,
                    Rm("kept/opaque"),
                    Rm("changed/opaque"),
                    File("kept/opaque/new", ""),
                    File("kept/opaque/rebased", ""),
                    File("changed/opaque/sub2/new", ""),
                    File("changed/opaque/rebased", ""),
                ],
            ]),
        ),
        (
            "TestDiffOpaqueDirs, the second of that name",
            merge([
                layers([&[File("p/dir/A", ""), File("p/dir/B", ""), File("p/dir/D", ""), Dir("p/dir/sub", 0o755)]]),
                step(parent(), &[Rm("p/dir"), File("p/dir/E", "")]),
            ]),
            vec![File("p/dir/D", ""), File("p/dir/E", "")],
        ),
        (
            "TestDiffMergeOpaqueRegression",
            merge([on(dir(), &[File("dir/a", "")]), on(dir(), &[Rm("dir")]), on(dir(), &[File("dir/b", "")])]),
            vec![File("dir/b", "")],
        ),
        (
            "TestDiffMergeOpaqueRegressionWithFileOverwrite",
            merge([on(dir(), &[File("dir/a", "")]), layers([&[File("dir", "")]]), on(dir(), &[File("dir/b", "")])]),
            vec![File("dir/b", "")],
        ),
        // What follows is not in BuildKit's list.
        (
            "a deletion of a directory takes all that others have in it",
            merge([layers([&[File("dir/a/b/c", ""), File("dir/d", "")]]), step(dir(), &[Rm("dir")])]),
            vec![],
        ),
        (
            "and lets others make it again",
            merge([
                layers([&[File("dir/a/b/c", "")]]),
                step(dir(), &[Rm("dir")]),
                layers([&[File("dir/a/other", "")]]),
            ]),
            vec![File("dir/a/other", "")],
        ),
        (
            "a deletion of what is not there",
            merge([layers([&[File("A", "A")]]), step(layers([&[File("B", "B")]]), &[Rm("B")])]),
            vec![File("A", "A")],
        ),
        (
            "a deletion in a directory that is not there, below one",
            merge([layers([&[File("A", "A")]]), step(layers([&[File("d/e/f", ""), File("d/g", "")]]), &[Rm("d/e/f")])]),
            vec![File("A", "A"), Dir("d/e", 0o755)],
        ),
        (
            "a deletion in what is a file elsewhere",
            merge([layers([&[File("dir", "file")]]), step(layers([&[File("dir/f", "")]]), &[Rm("dir/f")])]),
            vec![Dir("dir", 0o755)],
        ),
        (
            "a file in what is a file elsewhere",
            merge([layers([&[File("dir", "file")]]), step(dir(), &[File("dir/f", "f")])]),
            vec![File("dir/f", "f")],
        ),
        (
            "a file where others have a directory",
            merge([
                layers([&[File("dir/a", ""), File("dir/sub/b", "")]]),
                step(dir(), &[Rm("dir"), File("dir", "file")]),
            ]),
            vec![File("dir", "file")],
        ),
        (
            "a device where others have a directory, and a directory where others have a device",
            merge([layers([&[File("a/f", ""), Device("b", 1, 3)]]), layers([&[Device("a", 1, 5), File("b/f", "")]])]),
            vec![Device("a", 1, 5), File("b/f", "")],
        ),
    ]);
}

/// What is no change is not in the diff. That names came and went in a directory changes its time, which is one.
#[test]
fn privileged_files_that_are_as_they_were_are_no_difference() {
    let moved = [CHMOD, Shuffle("shuffled"), Shuffle("kept/shuffled"), Shuffle("changed/shuffled")];
    let modes = [CHMOD, Chmod("shuffled", 0o644), Chmod("kept/content", 0o644), Chmod("kept/chmod", 0o755)];
    check(&[
        ("TestDiffShuffleFiles", step(base(), &moved), BOTH.to_vec()),
        ("a mode that it had", step(base(), &modes), vec![Dir("changed", 0o700)]),
        (
            "a file that is rewritten is one",
            step(base(), &[CHMOD, File("kept/content", "before")]),
            vec![File("kept/content", "before"), Dir("changed", 0o700)],
        ),
    ]);
}

// --- links ---

#[test]
fn privileged_no_symbolic_link_is_followed() {
    let alpine = || layers([&[File("etc/alpine", "")]]);
    let busybox = || layers([&[File("etc/busybox", "")]]);
    let plus_foo = || on(alpine(), &[Dir("foo", 0o755)]);
    let link = || step(alpine(), &[Dir("bar", 0o755), Symlink("foo", "/bar")]);
    let made_file = || step(plus_foo(), &[File("foo/file", "")]);
    let circle = || step(alpine(), &[Symlink("1", "/2"), Symlink("2", "/1")]);
    let expected = |ops: &[Op]| with([&[File("etc/busybox", "")], ops]);
    check(&[
        (
            "TestDiffDirOverridesSymlink",
            merge([busybox(), link(), made_file()]),
            expected(&[Dir("bar", 0o755), File("foo/file", "")]),
        ),
        (
            "TestDiffSymlinkOverridesDir",
            merge([busybox(), made_file(), link()]),
            expected(&[Dir("bar", 0o755), Symlink("foo", "/bar")]),
        ),
        (
            "TestDiffSymlinkOverridesSymlink",
            merge([
                busybox(),
                step(alpine(), &[Dir("1", 0o755), Dir("2", 0o755), Symlink("a", "/1"), Symlink("1/b", "/2")]),
                step(alpine(), &[Dir("3", 0o755), Symlink("a", "/3")]),
            ]),
            expected(&[Dir("1", 0o755), Dir("2", 0o755), Dir("3", 0o755), Symlink("a", "/3"), Symlink("1/b", "/2")]),
        ),
        (
            "TestDiffDeleteDoesNotFollowSymlink",
            merge([busybox(), link(), step(plus_foo(), &[Rm("foo")])]),
            expected(&[Dir("bar", 0o755)]),
        ),
        (
            "TestDiffDeleteDoesNotFollowParentSymlink",
            merge([busybox(), on(link(), &[File("bar/file", "")]), step(made_file(), &[Rm("foo/file")])]),
            expected(&[File("bar/file", ""), Dir("foo", 0o755)]),
        ),
        (
            "TestDiffCircularSymlinks",
            merge([busybox(), circle(), layers([&[File("1", "foo")]])]),
            expected(&[File("1", "foo"), Symlink("2", "/1")]),
        ),
        (
            "TestDiffCircularDirSymlink",
            merge([
                busybox(),
                step(alpine(), &[Dir("foo", 0o755), Symlink("foo/link", "../foo")]),
                step(alpine(), &[File("foo/link/file", "")]),
            ]),
            expected(&[File("foo/link/file", "")]),
        ),
        (
            "TestDiffCircularParentDirSymlinks",
            merge([busybox(), circle(), step(alpine(), &[File("1/file", "foo")])]),
            expected(&[File("1/file", "foo"), Symlink("2", "/1")]),
        ),
        // What follows is not in BuildKit's list.
        (
            "a directory goes through a link's place into the root",
            merge([layers([&[Symlink("d", "/"), File("f", "root")]]), step(alpine(), &[File("d/f", "d")])]),
            vec![Symlink("x", "/"), File("f", "root"), File("d/f", "d"), Rm("x")],
        ),
        (
            "a link out of the tree",
            merge([layers([&[Symlink("d", "../../../..")]]), step(alpine(), &[File("d/f", "d")])]),
            vec![File("d/f", "d")],
        ),
        (
            "a link from one tree to a directory of another",
            merge([layers([&[Symlink("lib", "usr/lib")]]), layers([&[File("usr/lib/so", "so")]])]),
            vec![File("usr/lib/so", "so"), Symlink("lib", "usr/lib")],
        ),
        (
            "a difference of unrelated trees with a link where the other has a directory",
            merge([
                layers([&[File("p/f", ""), File("q/f", ""), Symlink("r", "q")]]),
                diff(
                    layers([&[File("p/f", ""), File("q/f", ""), Symlink("r", "q")]]),
                    layers([&[Symlink("p", "q"), File("q/g", ""), File("r/f", "")]]),
                ),
            ]),
            vec![Symlink("p", "q"), File("q/g", ""), File("r/f", "")],
        ),
    ]);
}

#[test]
fn privileged_names_of_one_file_stay_names_of_one_file() {
    let alpine = || layers([&[File("etc/alpine", "")]]);
    let linked = || step(alpine(), &[File("dir/1", ""), Link("dir/2", "dir/1"), Chmod("dir/2", 0o600)]);
    let expected = || vec![File("dir/1", ""), Link("dir/2", "dir/1"), Chmod("dir/2", 0o600)];
    let three = || layers([&[File("a", "x"), Link("b", "a"), Dir("d", 0o755), Link("d/c", "a")]]);
    check(&[
        ("TestDiffHardlinks", linked(), expected()),
        (
            "TestDiffHardlinkChangesDoNotPropagateBetweenSnapshots",
            after(on(linked(), &[Chmod("dir/1", 0o777), File("dir/2", "other")]), linked()),
            expected(),
        ),
        // What follows is not in BuildKit's list.
        (
            "in a tree that shows the same layer twice",
            after(on(merge([alpine(), linked()]), &[Rm("dir/1")]), merge([linked(), three()])),
            [expected(), vec![File("a", "x"), Link("b", "a"), Dir("d", 0o755), Link("d/c", "a")]].concat(),
        ),
        (
            "one of them deleted",
            merge([three(), step(three(), &[Rm("a")])]),
            vec![File("b", "x"), Dir("d", 0o755), Link("d/c", "b")],
        ),
        (
            "one of them another file",
            merge([three(), step(three(), &[Rm("b"), File("b", "y")])]),
            vec![File("a", "x"), Dir("d", 0o755), Link("d/c", "a"), File("b", "y")],
        ),
        (
            "other names of others over them",
            merge([three(), layers([&[File("b", "y"), Link("e", "b")]])]),
            vec![File("a", "x"), Dir("d", 0o755), Link("d/c", "a"), File("b", "y"), Link("e", "b")],
        ),
        (
            "a further name of what is below",
            merge([layers([&[A]]), step(layers([&[A]]), &[Link("B", "A")])]),
            vec![A, Link("B", "A")],
        ),
        (
            "between unrelated trees",
            merge([alpine(), diff(alpine(), three())]),
            vec![File("a", "x"), Link("b", "a"), Dir("d", 0o755), Link("d/c", "a")],
        ),
        (
            "names of one symbolic link and of one device",
            layers([&[Symlink("s", "t"), Link("s2", "s"), Device("n", 1, 3), Link("n2", "n")]]),
            vec![Symlink("s", "t"), Link("s2", "s"), Device("n", 1, 3), Link("n2", "n")],
        ),
    ]);
}

// --- merges, diffs, and one of the other ---

const A: Op = File("A", "A");
const B: Op = File("B", "B");
const C: Op = File("C", "C");
const D: Op = File("D", "D");
const E: Op = File("E", "E");

#[test]
fn privileged_a44_a48_nothing_and_the_same_again() {
    let image: &[&[Op]] =
        &[&[File("bin/sh", "sh"), Symlink("bin/ash", "sh")], &[File("etc/x", ""), Dir("tmp", 0o1777)]];
    let alpine = || Expr::Layers(image.iter().map(|ops| ops.to_vec()).collect());
    let a = || layers([&[A]]);
    let b = || layers([&[B]]);
    check(&[
        ("TestDiffScratch", diff(Scratch, Scratch), vec![]),
        ("TestDiffSelf", diff(alpine(), alpine()), vec![]),
        ("TestDiffSelfDeletes", merge([alpine(), diff(alpine(), alpine())]), image.concat()),
        ("TestDiffLowerScratch", diff(Scratch, alpine()), image.concat()),
        (
            // All layers of the upper are applied: a file that was made and deleted again is deleted.
            "TestDiffLowerScratchDeletes",
            merge([
                layers([&[File("foo", "A"), Chmod("foo", 0o755)]]),
                diff(Scratch, layers([&[File("foo", "B")], &[Rm("foo")], &[File("bar", "")]])),
            ]),
            vec![File("bar", "")],
        ),
        (
            "TestDiffUpperScratch",
            merge([alpine(), layers([&[File("foo", "foo")]]), diff(alpine(), Scratch)]),
            vec![File("foo", "foo")],
        ),
        // What follows is not in BuildKit's list.
        ("a merge of nothing", merge([Scratch, Scratch]), vec![]),
        ("a merge with nothing", merge([Scratch, a(), Scratch, b()]), vec![A, B]),
        ("the uppermost of what is repeated counts", merge([layers([&[File("B", "b")]]), b(), a(), b()]), vec![A, B]),
        ("a layer on nothing", on(diff(a(), a()), &[B]), vec![B]),
        ("a step that does nothing", merge([b(), step(a(), &[])]), vec![B]),
        (
            "one blob on different parents",
            merge([layers([&[A], &[C]]), diff(b(), layers([&[B], &[C]])), layers([&[D], &[C]])]),
            vec![A, C, D],
        ),
        ("nothing of the upper is nothing of the lower", merge([a(), diff(a(), diff(b(), b()))]), vec![]),
    ]);
}

#[test]
fn privileged_a52_from_one_tree_to_another() {
    let a = || layers([&[A]]);
    let b = || layers([&[B, Dir("d", 0o700)]]);
    let busybox: &[Op] = &[
        File("bin", "busybox"),
        File("etc/x", "b"),
        Link("bin2", "bin"),
        Attr("bin", "security.capability", NET_RAW),
        Dir("tmp", 0o1777),
    ];
    let alpine: &[Op] =
        &[File("bin", "alpine"), Symlink("etc", "bin"), Dir("tmp", 0o755), Chown("tmp", 5, 6), Device("null", 1, 3)];
    check(&[
        (
            "TestDiffLazyBlobMerge",
            merge([layers([busybox]), diff(layers([busybox]), layers([alpine]))]),
            alpine.to_vec(),
        ),
        ("and back", merge([layers([alpine]), diff(layers([alpine]), layers([busybox]))]), busybox.to_vec()),
        ("what is only above", diff(a(), b()), vec![B, Dir("d", 0o700)]),
        ("TestDiffOnlyMerge", merge([diff(a(), b()), diff(b(), a())]), vec![A]),
        // BuildKit runs a step with another tree mounted in its own. Both are diffs of their own.
        (
            "TestDiffExecRoot",
            step(layers([&[Dir("root", 0o700), Dir("mnt", 0o755)]]), &[File("root/A", "")]),
            vec![Dir("root", 0o700), File("root/A", "")],
        ),
        ("TestDiffExecMount", step(layers([busybox]), &[File("B", "")]), vec![File("B", "")]),
    ]);
}

#[test]
fn privileged_a49_merges_of_diffs_and_diffs_of_merges() {
    let a = || layers([&[A]]);
    let b = || layers([&[B]]);
    let c = || layers([&[C]]);
    let ab = || merge([a(), b()]);
    let abc = || merge([a(), b(), c()]);
    let without_c = || merge([a(), b(), on(c(), &[Rm("C")])]);
    let nested = || merge([on(abc(), &[D]), on(merge([a(), layers([&[E]])]), &[Rm("A")])]);
    check(&[
        ("TestDiffOfMerges", diff(ab(), abc()), vec![C]),
        ("TestDiffOfMergesWithDeletes", merge([abc(), diff(abc(), without_c())]), vec![A, B]),
        ("TestDiffSingleLayerOnMerge", step(without_c(), &[D]), vec![D]),
        ("TestDiffSingleDeleteLayerOnMerge", merge([without_c(), step(abc(), &[Rm("A")])]), vec![B]),
        (
            "TestDiffMultipleLayerOnMerge",
            merge([without_c(), diff(abc(), on(on(abc(), &[D]), &[Rm("A")]))]),
            vec![B, D],
        ),
        ("TestDiffNestedLayeredMerges", diff(abc(), on(nested(), &[File("F", "F")])), vec![D, E, File("F", "F")]),
        (
            "TestDiffNestedLayeredMergeDeletes",
            merge([on(ab(), &[D]), diff(abc(), on(nested(), &[Rm("D")]))]),
            vec![B, E],
        ),
        // What follows is not in BuildKit's list.
        ("one over another", ab(), vec![A, B]),
        ("the later wins", merge([layers([&[File("A", "1")]]), a()]), vec![A]),
        ("a deletion reaches down", merge([abc(), on(c(), &[Rm("C")])]), vec![A, B]),
        ("a deletion below is not seen above", merge([on(c(), &[Rm("C")]), c()]), vec![C]),
        ("a merge of merges", merge([merge([a(), merge([b(), c()])]), merge([merge([c(), a()]), b()])]), vec![A, B, C]),
        ("a merge less one of its inputs", merge([abc(), diff(abc(), ab())]), vec![A, B]),
        ("a merge less all of its inputs", merge([abc(), diff(abc(), Scratch)]), vec![]),
        ("a diff of a merge and one of its inputs", merge([abc(), diff(abc(), b())]), vec![B]),
        ("a merge in another order", merge([abc(), diff(abc(), merge([c(), b(), a()]))]), vec![A, B, C]),
    ]);
}

#[test]
fn privileged_a49_diffs_go_where_trees_go() {
    let a = || layers([&[A]]);
    let ab = || on(a(), &[B]);
    let abc = || on(ab(), &[C]);
    check(&[
        ("TestDiffOfDiffs", diff(diff(a(), ab()), diff(a(), abc())), vec![C]),
        ("TestDiffOfDiffsWithDeletes", merge([abc(), diff(diff(a(), abc()), diff(a(), ab()))]), vec![A, B]),
        ("TestDiffAsParentSingleLayer", on(diff(a(), ab()), &[D]), vec![B, D]),
        ("TestDiffAsParentSingleLayerDelete", merge([ab(), on(diff(a(), ab()), &[Rm("B")])]), vec![A]),
        ("TestDiffAsParentMultipleLayers", on(diff(a(), abc()), &[D]), vec![B, C, D]),
        ("TestDiffAsParentMultipleLayerDelete", merge([ab(), on(diff(a(), abc()), &[Rm("B")])]), vec![A, C]),
        // What follows is not in BuildKit's list.
        ("a diff of a diff and its upper", merge([diff(a(), ab()), diff(diff(a(), ab()), ab())]), vec![A, B]),
        ("a step on a diff of unrelated trees", on(diff(a(), layers([&[B]])), &[C]), vec![B, C]),
        ("and over its lower", merge([a(), on(diff(a(), layers([&[B]])), &[C])]), vec![B, C]),
    ]);
}

/// `TestDiffSingleLayerBlobReuse`, `TestDiffSingleLayerOnMergeBlobReuse`.
#[test]
fn privileged_a51_a_diff_of_one_layer_is_exported_as_that_layers_blob() {
    if !tools::privileged() {
        return;
    }
    for driver in [DriverKind::Auto, DriverKind::Overlay, DriverKind::Native] {
        let rig = Rig::with_driver(driver);
        let cache = rig.open();
        let alpine = cache.finalized(None, &[File("etc/alpine", "")]);
        let merged = cache.merged(&[&alpine, &cache.finalized(None, &[File("foo", "/foo")])]);
        for base in [alpine, merged] {
            let upper = cache.finalized(Some(&base), &[File("random", "4"), Rm("etc/alpine")]);
            let digests = |held: &ImmutableRef| -> Vec<BlobDigest> {
                exported(held).0.iter().map(|descriptor| descriptor.digest).collect()
            };
            let of_upper = digests(&upper);
            assert_eq!(digests(&cache.diffed(&base, &upper)), of_upper[of_upper.len() - 1..], "{driver:?}");
        }
        assert_sound(&cache);
    }
}

// --- every kind of thing into every other ---

/// What can be at a path. Every row is a way to make it, with `p` for the path.
const STATES: [&[Op]; 21] = [
    &[],
    &[File("p", "one")],
    &[File("p", "two")],
    &[File("p", "longer")],
    &[File("p", "one"), Chmod("p", 0o4755)],
    &[File("p", "one"), Chown("p", 1000, 1001)],
    &[File("p", "one"), Attr("p", "user.note", "n")],
    &[File("p", "one"), Attr("p", "security.capability", NET_RAW)],
    &[File("p", "one"), Link("p.link", "p")],
    &[Dir("p", 0o755)],
    &[Dir("p", 0o1777)],
    &[Dir("p", 0o755), Chown("p", 1000, 1001)],
    &[Dir("p", 0o755), Attr("p", "user.note", "n")],
    &[File("p/f", "f")],
    &[File("p/sub/f", "f"), File("p/g", "g")],
    &[Symlink("p", "one")],
    &[Symlink("p", "/")],
    &[Symlink("p", "one"), Chown("p", 1000, 1001)],
    &[Fifo("p")],
    &[Device("p", 1, 3)],
    &[Device("p", 1, 5)],
];

/// The op at another path.
fn moved(op: Op, to: &str) -> Op {
    let at = |path: &str| -> &'static str { Box::leak(path.replacen('p', to, 1).into_boxed_str()) };
    match op {
        File(path, text) => File(at(path), text),
        Dir(path, mode) => Dir(at(path), mode),
        Chmod(path, mode) => Chmod(at(path), mode),
        Rm(path) => Rm(at(path)),
        Symlink(path, target) => Symlink(at(path), target),
        Link(path, other) => Link(at(path), at(other)),
        Fifo(path) => Fifo(at(path)),
        Shuffle(path) => Shuffle(at(path)),
        Attr(path, name, value) => Attr(at(path), name, value),
        Chown(path, user, group) => Chown(at(path), user, group),
        Device(path, major, minor) => Device(at(path), major, minor),
    }
}

#[test]
fn privileged_a52_a_diff_leads_from_every_kind_of_thing_to_every_other() {
    let (mut lower, mut upper, mut changes) = (Vec::new(), Vec::new(), Vec::new());
    for (i, from) in STATES.iter().enumerate() {
        for (j, to) in STATES.iter().enumerate() {
            let path = format!("d{}/{i}-{j}", i % 3);
            let at = |ops: &[Op]| -> Vec<Op> { ops.iter().map(|op| moved(*op, &path)).collect() };
            lower.extend(at(from));
            upper.extend(at(to));
            if i != j {
                // In the order of a step that clears the place first.
                for old in from.iter().take(1).chain(from.iter().filter(|op| matches!(op, Link(..)))) {
                    changes.push(moved(if let Link(..) = old { Rm("p.link") } else { Rm("p") }, &path));
                }
                changes.extend(at(to));
            }
        }
    }
    let [one, two] = [&lower, &upper].map(|ops| layers([ops]));
    let stacked = on(one.clone(), &changes);
    let beside = layers([&[File("d0/beside", "b"), File("d4/beside", "b")]]);
    let kept = [File("d0/beside", "b"), File("d4/beside", "b")];
    check(&[
        ("on it", stacked.clone(), upper.clone()),
        ("one layer on it", merge([one.clone(), step(one.clone(), &changes)]), upper.clone()),
        ("unrelated", merge([one.clone(), diff(one.clone(), two.clone())]), upper.clone()),
        ("and back", merge([two.clone(), diff(two.clone(), one.clone())]), lower.clone()),
        ("back from the layer on it", merge([stacked.clone(), diff(stacked, one.clone())]), lower),
        ("what the lower never had stays", merge([one.clone(), beside, diff(one, two)]), with([&upper, &kept])),
    ]);
}
