//! Merges and diffs: trees in, trees out. What BuildKit promises of them (its client's merge and diff cases, the notes on
//! both) as tables, the laws that follow from "a merge is a list of layers", and that none of it costs files.

// The exemption for tests ends at helpers outside of test functions.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Instant;

use common::Op::{self, Attr, Chmod, Dir, Fifo, File, Link, Rm, Shuffle, Symlink};
use common::{Cache, Rig, Tree, assert_idle, assert_sound, inodes_below, layers_count, tree, tree_after};
use plies_archive::tar::EntryPath;
use plies_cache::{
    BlobRow, CacheError, ImmutableRef, Parents, Provider, Providers, RecordOptions, State, UNCOMPRESSED,
};
use plies_oci::{BlobDigest, Descriptor, MediaType};
use plies_store::{Cancel, DriverKind, GcMode};
use plies_testkit::tar::{Member, archive};

fn by(name: &str) -> RecordOptions {
    RecordOptions::by(name)
}

/// On both drivers where this process may mount.
fn each_driver(test: impl Fn(&Rig)) {
    let kinds: &[DriverKind] = if rustix::process::geteuid().is_root() {
        &[DriverKind::Overlay, DriverKind::Native]
    } else {
        eprintln!("SKIPPED with overlay: needs root, to mount overlays");
        &[DriverKind::Native]
    };
    for kind in kinds {
        eprintln!("driver: {kind:?}");
        let rig = Rig::with_driver(*kind);
        test(&rig);
        rig.assert_no_warnings();
    }
}

fn owners(held: &ImmutableRef) -> Vec<plies_cache::RecordId> {
    held.row().unwrap().parents.ids()
}

/// How a tree is put together.
#[derive(Clone, Debug)]
enum Expr {
    /// Changes, one layer each, from nothing.
    Layers(Vec<Vec<Op>>),
    /// One more layer on a tree.
    On(Box<Expr>, Vec<Op>),
    Merge(Vec<Expr>),
    Diff(Box<Expr>, Box<Expr>),
    /// Named, to be the same record wherever it is named again.
    Same(&'static str, Box<Expr>),
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

fn same(name: &'static str, expr: Expr) -> Expr {
    Expr::Same(name, Box::new(expr))
}

struct Builder<'a> {
    cache: &'a Cache,
    known: BTreeMap<&'static str, ImmutableRef>,
}

impl Builder<'_> {
    fn build(&mut self, expr: &Expr) -> ImmutableRef {
        match expr {
            Expr::Layers(layers) => {
                let mut top: Option<ImmutableRef> = None;
                for ops in layers {
                    top = Some(self.cache.finalized(top.as_ref(), ops));
                }
                top.unwrap()
            }
            Expr::On(base, ops) => {
                let base = self.build(base);
                self.cache.finalized(Some(&base), ops)
            }
            Expr::Merge(inputs) => {
                let inputs: Vec<_> = inputs.iter().map(|input| self.build(input)).collect();
                self.cache.merged(&inputs.iter().collect::<Vec<_>>())
            }
            Expr::Diff(lower, upper) => {
                let (lower, upper) = (self.build(lower), self.build(upper));
                self.cache.diffed(&lower, &upper)
            }
            Expr::Same(name, expr) => {
                if let Some(known) = self.known.get(name) {
                    return known.clone();
                }
                let built = self.build(expr);
                self.known.insert(name, built.clone());
                built
            }
        }
    }
}

fn table(cases: &[(&str, Expr, Vec<Op>)]) {
    each_driver(|rig| {
        let cache = rig.open();
        for (name, expr, expected) in cases {
            let mut builder = Builder { cache: &cache, known: BTreeMap::new() };
            let built = builder.build(expr);
            assert_eq!(tree(&built), tree_after(expected), "{name}");
        }
        assert_sound(&cache);
        assert_idle(&cache);
    });
}

/// The base of most diffs: a directory that a step changes itself, and one in which it only changes things.
fn base() -> Expr {
    same(
        "base",
        layers([&[
            File("shuffled", "s"),
            Dir("kept", 0o755),
            Dir("kept/chmod", 0o755),
            Dir("kept/override", 0o755),
            File("kept/delete/inside", ""),
            File("kept/opaque/old", ""),
            File("kept/opaque/sub/old", ""),
            File("kept/content", "before"),
            File("kept/mode", "m"),
            File("kept/gone", ""),
            File("kept/to-dir", ""),
            File("kept/shuffled", "s"),
            Dir("changed", 0o755),
            Dir("changed/chmod", 0o755),
            Dir("changed/override", 0o755),
            File("changed/delete/inside", ""),
            File("changed/opaque/old", ""),
            File("changed/opaque/sub/old", ""),
            File("changed/content", "before"),
            File("changed/mode", "m"),
            File("changed/gone", ""),
            File("changed/to-dir", ""),
            File("changed/shuffled", "s"),
        ]]),
    )
}

/// What a step does to the base, and what of it is to be seen in the diff alone.
fn slices() -> Vec<(&'static str, Vec<Op>, Vec<Op>)> {
    let both: &[Op] = &[Dir("kept", 0o755), Dir("changed", 0o700)];
    let with = |ops: &[Op]| [both, ops].concat();
    vec![
        (
            "new files",
            vec![File("new/file", ""), File("kept/new", "1"), File("changed/new", "2")],
            with(&[File("new/file", ""), File("kept/new", "1"), File("changed/new", "2")]),
        ),
        (
            "modified files",
            vec![
                Chmod("kept/mode", 0o444),
                File("kept/content", "after"),
                Chmod("changed/mode", 0o440),
                File("changed/content", "after"),
            ],
            with(&[
                File("kept/mode", "m"),
                Chmod("kept/mode", 0o444),
                File("kept/content", "after"),
                File("changed/mode", "m"),
                Chmod("changed/mode", 0o440),
                File("changed/content", "after"),
            ]),
        ),
        (
            "new directories",
            vec![Dir("new2/sub", 0o755), Dir("kept/newdir", 0o755), Dir("changed/newdir", 0o755)],
            with(&[Dir("new2/sub", 0o755), Dir("kept/newdir", 0o755), Dir("changed/newdir", 0o755)]),
        ),
        (
            "modified directories",
            vec![Chmod("kept/chmod", 0o700), Chmod("changed/chmod", 0o770)],
            with(&[Dir("kept/chmod", 0o700), Dir("changed/chmod", 0o770)]),
        ),
        (
            "a file for a directory",
            vec![
                Rm("kept/override"),
                File("kept/override", "o"),
                Rm("changed/override"),
                File("changed/override", "o"),
            ],
            with(&[File("kept/override", "o"), File("changed/override", "o")]),
        ),
        (
            "a directory for a file",
            vec![Rm("kept/to-dir"), Dir("kept/to-dir/sub", 0o770), Rm("changed/to-dir"), File("changed/to-dir/f", "")],
            with(&[Dir("kept/to-dir/sub", 0o770), File("changed/to-dir/f", "")]),
        ),
        ("deleted files", vec![Rm("kept/gone"), Rm("changed/gone")], with(&[])),
        ("deleted directories", vec![Rm("kept/delete"), Rm("changed/delete")], with(&[])),
        (
            "directories made anew",
            vec![Rm("kept/opaque"), File("kept/opaque/new", "n"), Rm("changed/opaque"), File("changed/opaque/a/b", "")],
            with(&[File("kept/opaque/new", "n"), File("changed/opaque/a/b", "")]),
        ),
        ("fifos", vec![Fifo("kept/fifo"), Fifo("changed/fifo")], with(&[Fifo("kept/fifo"), Fifo("changed/fifo")])),
        (
            "extended attributes",
            vec![Attr("kept/content", "user.note", "n"), File("changed/x", "")],
            with(&[File("kept/content", "before"), File("changed/x", "")]),
        ),
    ]
}

const CHMOD: Op = Chmod("changed", 0o700);

#[test]
fn a51_a52_a_diff_of_one_layer_alone_shows_what_the_layer_did() {
    each_driver(|rig| {
        let cache = rig.open();
        let mut builder = Builder { cache: &cache, known: BTreeMap::new() };
        for (name, ops, expected) in slices() {
            let upper = on(base(), &[&[CHMOD], ops.as_slice()].concat());
            let shown = builder.build(&diff(base(), upper));
            assert_eq!(tree(&shown), tree_after(&expected), "{name}");
        }
        assert_sound(&cache);
    });
}

#[test]
fn a52_a_merge_with_a_diff_onto_its_lower_is_the_upper() {
    each_driver(|rig| {
        let cache = rig.open();
        let mut builder = Builder { cache: &cache, known: BTreeMap::new() };
        let below = builder.build(&base());
        let mut all = below.clone();
        for (name, ops, _) in slices() {
            let upper = cache.finalized(Some(&below), &[&[CHMOD], ops.as_slice()].concat());
            let diff = cache.diffed(&below, &upper);
            assert_eq!(tree(&cache.merged(&[&below, &diff])), tree(&upper), "{name}");
            all = cache.finalized(Some(&all), &ops);
        }
        // All of them as so many layers.
        let diff = cache.diffed(&below, &all);
        assert_eq!(owners(&diff).len(), slices().len());
        assert_eq!(tree(&cache.merged(&[&below, &diff])), tree(&all), "all of them");
        assert_sound(&cache);
    });
}

#[test]
fn files_moved_away_and_back_are_no_difference() {
    each_driver(|rig| {
        let cache = rig.open();
        let mut builder = Builder { cache: &cache, known: BTreeMap::new() };
        let below = builder.build(&base());
        let upper = cache.finalized(
            Some(&below),
            &[CHMOD, Shuffle("shuffled"), Shuffle("kept/shuffled"), Shuffle("changed/shuffled")],
        );
        let diff = cache.diffed(&below, &upper);
        assert_eq!(tree(&cache.merged(&[&below, &diff])), tree(&upper));
    });
}

#[test]
fn merges_lay_one_tree_over_the_other() {
    let a = || same("a", layers([&[File("A", "A")]]));
    let b = || same("b", layers([&[File("B", "B")]]));
    let c = || same("c", layers([&[File("C", "C")]]));
    let without_c = || same("c-", on(c(), &[Rm("C")]));
    let abc = || merge([a(), b(), c()]);
    let nested = || merge([on(abc(), &[File("D", "D")]), on(merge([a(), layers([&[File("E", "E")]])]), &[Rm("A")])]);
    let dir = || same("dir", layers([&[Dir("dir", 0o755)]]));
    table(&[
        ("one over another", merge([a(), b()]), vec![File("A", "A"), File("B", "B")]),
        ("the later wins", merge([layers([&[File("f", "1")]]), layers([&[File("f", "2")]])]), vec![File("f", "2")]),
        ("a deletion reaches down", merge([abc(), without_c()]), vec![File("A", "A"), File("B", "B")]),
        (
            "a deletion below is not seen above",
            merge([without_c(), layers([&[File("C", "again")]])]),
            vec![File("C", "again")],
        ),
        (
            "a single layer on a merge, by itself",
            diff(same("abC", merge([a(), b(), without_c()])), on(same("abC", merge([])), &[File("D", "D")])),
            vec![File("D", "D")],
        ),
        (
            "a deletion on a merge, over another",
            merge([merge([a(), b(), without_c()]), diff(same("abc", abc()), on(same("abc", abc()), &[Rm("A")]))]),
            vec![File("B", "B")],
        ),
        (
            "several layers on a merge, over another",
            merge([
                merge([a(), b(), without_c()]),
                diff(same("abc", abc()), on(on(same("abc", abc()), &[File("D", "D")]), &[Rm("A")])),
            ]),
            vec![File("B", "B"), File("D", "D")],
        ),
        (
            "a diff of merges is the layers in between",
            diff(merge([a(), b()]), merge([a(), b(), c()])),
            vec![File("C", "C")],
        ),
        (
            "nested merges with layers between",
            diff(same("abc", abc()), on(nested(), &[File("F", "F")])),
            vec![File("D", "D"), File("E", "E"), File("F", "F")],
        ),
        (
            "nested merges with deletions",
            merge([on(merge([a(), b()]), &[File("D", "D")]), diff(same("abc", abc()), on(nested(), &[Rm("D")]))]),
            vec![File("B", "B"), File("E", "E")],
        ),
        (
            "a directory deleted below and made again above",
            merge([on(dir(), &[File("dir/a", "")]), on(dir(), &[Rm("dir")]), on(dir(), &[File("dir/b", "")])]),
            vec![File("dir/b", "")],
        ),
        (
            "a directory that was a file below",
            merge([on(dir(), &[File("dir/a", "")]), layers([&[File("dir", "")]]), on(dir(), &[File("dir/b", "")])]),
            vec![File("dir/b", "")],
        ),
    ]);
}

#[test]
fn diffs_go_where_trees_go() {
    let a = || same("a", layers([&[File("A", "A")]]));
    let ab = || same("ab", on(a(), &[File("B", "B")]));
    let abc = || same("abc", on(ab(), &[File("C", "C")]));
    let alpine = || same("alpine", layers([&[File("etc/alpine", "")]]));
    let busybox = || same("busybox", layers([&[File("etc/busybox", "")]]));
    let plus_foo = || same("foo", on(alpine(), &[Dir("foo", 0o755)]));
    let link = || diff(alpine(), on(alpine(), &[Dir("bar", 0o755), Symlink("foo", "/bar")]));
    let made_file = || diff(plus_foo(), on(plus_foo(), &[File("foo/file", "")]));
    let made_foo = || diff(alpine(), on(plus_foo(), &[File("foo/file", "")]));
    let deleted_foo = || diff(plus_foo(), on(plus_foo(), &[Rm("foo")]));
    let circle = || diff(alpine(), on(alpine(), &[Symlink("1", "/2"), Symlink("2", "/1")]));
    table(&[
        ("a tree by itself is its own diff", diff(a(), a()), vec![]),
        ("and changes nothing", merge([ab(), diff(a(), a())]), vec![File("A", "A"), File("B", "B")]),
        ("a diff as a parent", on(diff(a(), ab()), &[File("D", "D")]), vec![File("B", "B"), File("D", "D")]),
        ("a diff as a parent, and a deletion", merge([ab(), on(diff(a(), ab()), &[Rm("B")])]), vec![File("A", "A")]),
        (
            "a diff of layers as a parent",
            on(diff(a(), abc()), &[File("D", "D")]),
            vec![File("B", "B"), File("C", "C"), File("D", "D")],
        ),
        (
            "a diff of layers as a parent, and a deletion",
            merge([ab(), on(diff(a(), abc()), &[Rm("B")])]),
            vec![File("A", "A"), File("C", "C")],
        ),
        ("a diff of diffs", diff(diff(a(), ab()), diff(a(), abc())), vec![File("C", "C")]),
        (
            "made and deleted in between",
            merge([
                layers([&[File("f", "below")]]),
                diff(a(), on(on(a(), &[File("f", "")]), &[Rm("f"), File("g", "")])),
            ]),
            // Each layer's diff is applied, so the deletion reaches what lies below.
            vec![File("g", "")],
        ),
        (
            "a directory over a symbolic link",
            merge([busybox(), link(), made_foo()]),
            vec![File("etc/busybox", ""), Dir("bar", 0o755), File("foo/file", "")],
        ),
        (
            "a symbolic link over a directory",
            merge([busybox(), made_file(), link()]),
            vec![File("etc/busybox", ""), Dir("bar", 0o755), Symlink("foo", "/bar")],
        ),
        (
            "a deletion does not follow a symbolic link",
            merge([busybox(), link(), deleted_foo()]),
            vec![File("etc/busybox", ""), Dir("bar", 0o755)],
        ),
        (
            "symbolic links in a circle, one replaced by a file",
            merge([busybox(), circle(), layers([&[File("1", "foo")]])]),
            vec![File("etc/busybox", ""), File("1", "foo"), Symlink("2", "/1")],
        ),
        (
            "symbolic links in a circle, one replaced by a directory",
            merge([busybox(), circle(), diff(alpine(), on(alpine(), &[File("1/file", "foo")]))]),
            vec![File("etc/busybox", ""), File("1/file", "foo"), Symlink("2", "/1")],
        ),
        (
            "a link to the directory it is in, replaced",
            merge([
                busybox(),
                diff(alpine(), on(alpine(), &[Dir("foo", 0o755), Symlink("foo/link", "../foo")])),
                diff(alpine(), on(alpine(), &[File("foo/link/file", "")])),
            ]),
            vec![File("etc/busybox", ""), File("foo/link/file", "")],
        ),
        (
            "hard links stay one file",
            diff(alpine(), on(alpine(), &[File("dir/1", "x"), Link("dir/2", "dir/1"), Chmod("dir/2", 0o600)])),
            vec![File("dir/1", "x"), Link("dir/2", "dir/1"), Chmod("dir/2", 0o600)],
        ),
    ]);
}

#[test]
fn a_directory_made_anew_hides_what_its_lower_had_and_not_more() {
    let parent = || same("parent", layers([&[File("p/dir/A", ""), File("p/dir/B", ""), File("p/dir/sub/C", "")]]));
    let other = layers([&[File("p/dir/A", ""), File("p/dir/B", ""), File("p/dir/D", ""), Dir("p/dir/sub", 0o755)]]);
    table(&[(
        "over another tree",
        merge([other, diff(parent(), on(parent(), &[Rm("p/dir"), File("p/dir/E", "")]))]),
        vec![File("p/dir/D", ""), File("p/dir/E", "")],
    )]);
}

#[test]
fn a52_diffs_of_unrelated_trees() {
    let a = || same("a", layers([&[File("A", "A")]]));
    let b = || same("b", layers([&[File("B", "B"), Dir("d", 0o700)]]));
    let c = || same("c", layers([&[File("C", "C")]]));
    let busybox = || same("busybox", layers([&[File("bin", "busybox"), File("etc/x", "b"), Link("bin2", "bin")]]));
    let alpine = || same("alpine", layers([&[File("bin", "alpine"), Symlink("etc", "bin")]]));
    let b_over_a = || diff(a(), b());
    table(&[
        ("what is only above", b_over_a(), vec![File("B", "B"), Dir("d", 0o700)]),
        ("there and back", merge([b_over_a(), diff(b(), a())]), vec![File("A", "A")]),
        (
            "from one to the other",
            merge([busybox(), diff(busybox(), alpine())]),
            vec![File("bin", "alpine"), Symlink("etc", "bin")],
        ),
        (
            "a merge less one of its inputs",
            merge([same("abc", merge([a(), b(), c()])), diff(same("abc", merge([])), merge([a(), b()]))]),
            vec![File("A", "A"), File("B", "B"), Dir("d", 0o700)],
        ),
    ]);
}

#[test]
fn a48_a_diff_without_an_upper_takes_everything_away() {
    each_driver(|rig| {
        let cache = rig.open();
        let lower = cache.finalized(None, &[File("A", ""), File("d/B", "")]);
        let other = cache.finalized(None, &[File("foo", "foo")]);
        let nothing = cache.diff(Some(&lower), None, &by("me")).unwrap();
        let merge = cache.merged(&[&lower, &other, &nothing]);
        assert_eq!(tree(&merge), tree_after(&[File("foo", "foo")]));
        assert_sound(&cache);
    });
}

// --- which records are made ---

#[test]
fn a44_a46_none_one_and_flat_inputs() {
    let rig = Rig::new();
    let cache = rig.open();
    assert!(cache.merge(&[], &by("me")).unwrap().is_none());
    assert!(cache.merge(&[None, None], &by("me")).unwrap().is_none());
    let a = cache.layer(None, &[File("A", "")]);
    let b = cache.layer(None, &[File("B", "")]);
    let c = cache.layer(None, &[File("C", "")]);
    let named =
        RecordOptions { description: Some("not taken".into()), image_refs: vec!["nor this".into()], ..by("me") };
    let one = cache.merge(&[None, Some(&a), None], &named).unwrap().unwrap();
    assert_eq!(one.id(), a.id());
    let row = a.row().unwrap();
    assert_eq!((row.description.as_str(), row.image_refs.len()), ("", 0));

    let ab = cache.merged(&[&a, &b]);
    let abc = cache.merged(&[&ab, &c]);
    assert_eq!(owners(&abc), [a.id(), b.id(), c.id()]);
    // One merge alone is that merge, and one record however often it is named.
    assert_eq!(cache.merged(&[&ab]).id(), ab.id());
    assert_eq!(cache.merged(&[&a, &a, &a]).id(), a.id());
    drop(one);
    let held: usize = cache.manager.held().iter().map(|(_, holders)| holders.len()).sum();
    assert_eq!(held, 5, "inputs are held by nobody but the caller");
    assert_sound(&cache);
}

#[test]
fn a44_merging_is_associative_and_keeps_the_uppermost_of_what_is_repeated() {
    let rig = Rig::new();
    let cache = rig.open();
    let [a, b, c] = ["a", "b", "c"].map(|name| cache.finalized(None, &[File("f", name), File(name, "")]));
    let left = cache.merged(&[&cache.merged(&[&a, &b]), &c]);
    let right = cache.merged(&[&a, &cache.merged(&[&b, &c])]);
    assert_eq!(left.id(), right.id());
    let repeated = cache.merged(&[&c, &a, &c, &b, &a, &b, &c]);
    assert_eq!(owners(&repeated), [a.id(), b.id(), c.id()]);
    assert_eq!(repeated.id(), left.id());
    let other_order = cache.merged(&[&c, &b, &a]);
    assert_ne!(other_order.id(), left.id());
    assert_eq!(tree(&other_order)["f"], "file \"a\" 644");
    assert_eq!(tree(&left)["f"], "file \"c\" 644");
    assert_sound(&cache);
}

#[test]
fn equal_merges_and_diffs_are_found_again_also_after_a_restart() {
    let rig = Rig::new();
    let cache = rig.open();
    let a = cache.finalized(None, &[File("A", "")]);
    let b = cache.finalized(None, &[File("B", "")]);
    let a2 = cache.finalized(Some(&a), &[File("A2", "")]);
    let options = |name: &str| RecordOptions { image_refs: vec![name.into()], ..by("me") };
    let first = cache.merge(&[Some(&a), Some(&b)], &options("one")).unwrap().unwrap();
    let diff = cache.diffed(&a, &a2).id();
    let (ids, merge) = ([a.id(), b.id(), a2.id()], first.id());
    drop((first, a, b, a2));
    cache.close();
    let cache = rig.open();
    let [a, b, a2] = ids.map(|id| cache.get(id, &by("me")).unwrap());
    let again = cache.merge(&[Some(&a), Some(&b)], &options("two")).unwrap().unwrap();
    assert_eq!(again.id(), merge);
    assert_eq!(again.row().unwrap().image_refs, ["one", "two"]);
    assert_eq!(cache.diffed(&a, &a2).id(), diff);
    // Once removed, it is made anew.
    drop(again);
    cache.remove(&[merge]).unwrap();
    let anew = cache.merged(&[&a, &b]);
    assert_ne!(anew.id(), merge);
    assert_eq!(cache.merged(&[&a, &b]).id(), anew.id());
    assert_sound(&cache);
}

struct Named(&'static str);

impl Provider for Named {
    fn open(&self, _: &BlobRow) -> io::Result<Box<dyn Read + Send>> {
        Ok(Box::new(io::Cursor::new(archive(&[Member::file("f", self.0)]))))
    }
}

fn remote(text: &'static str) -> (Descriptor, Providers) {
    let bytes = archive(&[Member::file("f", text)]);
    let digest = BlobDigest::of(&bytes);
    let mut descriptor = Descriptor::new(MediaType::ImageLayer, digest, bytes.len() as u64);
    descriptor.annotations.insert(UNCOMPRESSED.into(), digest.to_string());
    (descriptor, Providers::one(digest, Arc::new(Named(text))))
}

#[test]
fn a45_providers_of_all_inputs_are_brought_together_and_errors_hold_nothing() {
    let rig = Rig::new();
    let cache = rig.open();
    let lazy = |text| {
        let (descriptor, providers) = remote(text);
        cache.get_by_blob(&descriptor, None, &RecordOptions { providers, ..by("me") }).unwrap()
    };
    let (a, b) = (lazy("a"), lazy("b"));
    let merge = cache.merged(&[&a, &b]);
    for digest in [remote("a").0.digest, remote("b").0.digest] {
        assert!(merge.providers().get(digest).is_some());
    }
    assert!(merge.is_lazy().unwrap() && layers_count(&cache) == 0, "nothing was fetched for it");
    let id = b.id();
    drop(merge);
    drop(b);
    let b = {
        let (_, providers) = remote("b");
        cache.get(id, &RecordOptions { providers, ..by("me") }).unwrap()
    };
    cache.spoil(id);
    assert!(matches!(cache.merge(&[Some(&a), Some(&b)], &by("me")).unwrap_err(), CacheError::Damaged { .. }));
    drop((a, b));
    assert_idle(&cache);
}

#[test]
fn a47_a_merge_finalizes_its_inputs_makes_no_snapshot_and_reloads() {
    let rig = Rig::new();
    let cache = rig.open();
    let a = cache.layer(None, &[File("A", "")]);
    let b = cache.layer(None, &[File("B", "")]);
    let options = RecordOptions { description: Some("both".into()), ..by("me") };
    let merge = cache.merge(&[Some(&a), Some(&b)], &options).unwrap().unwrap();
    for input in [&a, &b] {
        assert!(matches!(input.row().unwrap().state, State::Sealed { .. }));
    }
    let row = merge.row().unwrap();
    assert_eq!((row.state, row.snapshot, row.description.as_str()), (State::Composed, None, "both"));
    assert_eq!(row.parents, Parents::Merge(vec![a.id(), b.id()]));
    // It keeps its inputs, and they do not keep it.
    let (ids, id) = ([a.id(), b.id()], merge.id());
    drop((a, b, merge));
    assert!(matches!(cache.remove(&ids).unwrap_err(), CacheError::HasChildren { child, .. } if child == id));
    cache.store.gc(GcMode::Run).unwrap();
    assert_eq!(tree(&cache.get(id, &by("me")).unwrap()).len(), 2);
    cache.remove(&[id]).unwrap();
    cache.remove(&ids).unwrap();
    assert_sound(&cache);
}

#[test]
fn a48_a_diff_needs_a_lower_and_no_upper() {
    let rig = Rig::new();
    let cache = rig.open();
    let a = cache.layer(None, &[File("A", "")]);
    assert!(matches!(cache.diff(None, Some(&a), &by("me")).unwrap_err(), CacheError::NoLower));
    let nothing = cache.diff(Some(&a), None, &by("me")).unwrap();
    assert_eq!(nothing.row().unwrap().parents, Parents::Diff { lower: a.id(), upper: None });
    assert_sound(&cache);
}

#[test]
fn a49_a50_layers_in_between_are_a_merge_of_described_diffs() {
    let rig = Rig::new();
    let cache = rig.open();
    let a = cache.finalized(None, &[File("A", "")]);
    let b = cache.finalized(Some(&a), &[File("B", "")]);
    let c = cache.finalized(Some(&b), &[File("C", "")]);
    let options = RecordOptions { description: Some("not taken".into()), ..by("me") };
    let diff = cache.diff(Some(&a), Some(&c), &options).unwrap();
    let row = diff.row().unwrap();
    assert_eq!(row.description, "");
    let Parents::Merge(singles) = row.parents else { panic!() };
    let single = |at: usize| cache.must(singles[at]);
    assert_eq!(single(0).parents, Parents::Diff { lower: a.id(), upper: Some(b.id()) });
    assert_eq!(single(0).description, format!("diff \"{}\" -> \"{}\"", a.id(), b.id()));
    assert_eq!(single(1).parents, Parents::Diff { lower: b.id(), upper: Some(c.id()) });
    assert_eq!(tree(&diff), tree_after(&[File("B", ""), File("C", "")]));
    // Nothing was computed: the layers are those that were there.
    assert_eq!(diff.layers(&Cancel::new()).unwrap(), c.layers(&Cancel::new()).unwrap()[1..]);
    assert_eq!(layers_count(&cache), 3);
    // A layer that stands on nothing is used itself.
    let other = cache.finalized(None, &[File("O", "")]);
    let merge = cache.merged(&[&a, &b, &other]);
    let diff = cache.diffed(&cache.merged(&[&a, &b]), &merge);
    assert_eq!(diff.id(), other.id());
    assert_sound(&cache);
}

#[test]
fn a51_one_layer_apart_is_one_diff_that_shows_that_layer() {
    let rig = Rig::new();
    let cache = rig.open();
    let a = cache.layer(None, &[File("A", "")]);
    let b = cache.layer(Some(&a), &[File("B", "")]);
    let options = RecordOptions { description: Some("mine".into()), ..by("me") };
    let diff = cache.diff(Some(&a), Some(&b), &options).unwrap();
    let row = diff.row().unwrap();
    assert_eq!(row.parents, Parents::Diff { lower: a.id(), upper: Some(b.id()) });
    assert_eq!((row.state, row.description.as_str()), (State::Composed, "mine"));
    assert!(matches!(b.row().unwrap().state, State::Sealed { .. }));
    assert_eq!(tree(&diff), tree_after(&[File("B", "")]));
    assert_eq!(diff.layers(&Cancel::new()).unwrap(), b.layers(&Cancel::new()).unwrap()[1..]);
    assert_sound(&cache);
}

#[test]
fn a_merge_copies_and_links_nothing() {
    each_driver(|rig| {
        let cache = rig.open();
        let inputs: Vec<_> = (0..10)
            .map(|n| {
                let work = cache.create(None, &by("me")).unwrap();
                let mounted = work.mount(plies_store::Attach::Detached).unwrap();
                let root = common::path_of(&mounted.root());
                (0..200).for_each(|f| std::fs::write(root.join(format!("{n}-{f}")), "x").unwrap());
                mounted.unmount().unwrap();
                let made = work.commit().unwrap();
                made.finalize().unwrap();
                made
            })
            .collect();
        let layers_dir = cache.store.root().join("layers");
        let before = (inodes_below(&layers_dir), sizes(&cache), layers_count(&cache));
        let began = Instant::now();
        let merge = cache.merged(&inputs.iter().collect::<Vec<_>>());
        merge.extract(&Cancel::new()).unwrap();
        eprintln!("merge of 10 layers: {:?}", began.elapsed());
        // (The explicit roots need no fix-up: they are all the same.)
        assert_eq!((inodes_below(&layers_dir), sizes(&cache), layers_count(&cache)), before);
        assert_eq!(tree(&merge).len(), 2000);
        assert_eq!((inodes_below(&layers_dir), sizes(&cache), layers_count(&cache)), before);
    });
}

fn sizes(cache: &Cache) -> u64 {
    // The database's file grows by pages as it likes.
    let usage = cache.store.usage().unwrap();
    usage.iter().filter(|row| row.kind != plies_store::UsageKind::Catalogue).map(|row| row.size_bytes).sum()
}

#[test]
fn a_copy_onto_tmp_leaves_its_mode_alone() {
    each_driver(|rig| {
        let cache = rig.open();
        let base = cache.finalized(None, &[Dir("tmp", 0o1777), Dir("etc", 0o750)]);
        let work = cache.create(None, &by("copy --link")).unwrap();
        common::write(&work, &[File("tmp/f", "f"), File("etc/g", "g")]);
        let on_the_way = ["tmp", "etc"].map(|path| EntryPath::clean(path.as_bytes()).unwrap());
        let copied = work.seal(&on_the_way, None).unwrap();
        let expected: Tree =
            tree_after(&[Dir("tmp", 0o1777), Dir("etc", 0o750), File("tmp/f", "f"), File("etc/g", "g")]);
        let merge = cache.merged(&[&base, &copied]);
        assert_eq!(tree(&merge), expected);
        // The same over something that stands on it, and with another input between.
        let above = cache.finalized(Some(&merge), &[File("h", "")]);
        assert_eq!(tree(&above)["tmp"], "dir 1777");
        let between = cache.finalized(None, &[File("between", "")]);
        assert_eq!(tree(&cache.merged(&[&base, &between, &copied]))["tmp"], "dir 1777");
        assert_sound(&cache);
    });
}

#[test]
fn a_layer_that_is_here_is_found_by_its_diff_id_under_every_name_and_past_damaged_rows() {
    let rig = Rig::new();
    let cache = rig.open();
    let (descriptor, providers) = remote("x");
    let lazy = cache.get_by_blob(&descriptor, None, &RecordOptions { providers, ..by("me") }).unwrap();
    tree(&lazy);
    let diff_id = lazy.row().unwrap().blob.unwrap().diff_id;
    let get = |name: &str| {
        let options = RecordOptions { image_refs: vec![name.into()], ..by("me") };
        cache.get_by_diff_id(diff_id, None, &options).unwrap().unwrap()
    };
    assert_eq!(get("first").id(), lazy.id());
    assert_eq!(get("second").row().unwrap().image_refs, ["first", "second"]);
    let damaged = lazy.id();
    drop(lazy);
    cache.spoil(damaged);
    let other = get("third");
    assert_ne!(other.id(), damaged, "one bad row is no reason for others to fail");
    assert_eq!(tree(&other), tree_after(&[File("f", "x")]));
    assert_eq!(layers_count(&cache), 1);
}

#[test]
fn layers_are_kept_once_whatever_they_stand_on() {
    // Two chains with the same layer on top of different bases: BuildKit would have it twice.
    let rig = Rig::new();
    let cache = rig.open();
    let (below_a, below_b, above) = (remote("a"), remote("b"), remote("above"));
    let get = |(descriptor, providers): &(Descriptor, Providers), parent: Option<&ImmutableRef>| {
        cache.get_by_blob(descriptor, parent, &RecordOptions { providers: providers.clone(), ..by("me") }).unwrap()
    };
    let on_a = get(&above, Some(&get(&below_a, None)));
    assert_eq!(tree(&on_a), tree_after(&[File("f", "above")]));
    assert_eq!(layers_count(&cache), 2);
    let on_b = get(&above, Some(&get(&below_b, None)));
    assert_ne!(on_a.id(), on_b.id());
    assert!(matches!(on_b.row().unwrap().state, State::Sealed { layer: Some(_) }), "found by its diff ID");
    tree(&on_b);
    assert_eq!(layers_count(&cache), 3);
    assert_eq!(on_a.layers(&Cancel::new()).unwrap()[1], on_b.layers(&Cancel::new()).unwrap()[1]);
    assert_sound(&cache);
}

#[test]
fn many_layers_are_merged_and_mounted() {
    let rig = Rig::new();
    let cache = rig.open();
    let mut inputs = Vec::new();
    for n in 0..150 {
        let work = cache.create(None, &by("me")).unwrap();
        let mounted = work.mount(plies_store::Attach::Detached).unwrap();
        std::fs::write(common::path_of(&mounted.root()).join(format!("{n}")), "").unwrap();
        mounted.unmount().unwrap();
        inputs.push(work.commit().unwrap());
    }
    let merge = cache.merged(&inputs.iter().collect::<Vec<_>>());
    assert_eq!(tree(&merge).len(), 150);
    assert_sound(&cache);
}
