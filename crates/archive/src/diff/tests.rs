//! The laws of diffing, on trees that nobody thought of.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::apply::ApplyStyle::{Layer, Merged};
use crate::testing::*;
use crate::{ApplyError, BaseNeed};

fn diff(lower: Option<&Path>, upper: &Path) -> Result<Vec<u8>, DiffError> {
    let mut out = Writer::new(Vec::new());
    let lower = lower.map(open);
    diff_trees(lower.as_ref().map(AsFd::as_fd), open(upper).as_fd(), &mut out)?;
    Ok(out.finish()?)
}

fn to_tar(layer: &Path, index: &DirIndex) -> Vec<u8> {
    let mut out = Writer::new(Vec::new());
    layer_to_tar(open(layer).as_fd(), index, &mut out).unwrap();
    out.finish().unwrap()
}

/// The names of an archive's entries, with what they are.
fn names(bytes: &[u8]) -> Vec<String> {
    let mut reader = crate::tar::Reader::new(bytes, &crate::Limits::default());
    let mut names = Vec::new();
    while let Some(entry) = reader.next_entry().unwrap() {
        let name = entry.path.as_bytes().escape_ascii().to_string();
        names.push(match entry.kind {
            EntryKind::HardLink { target } => format!("{name}=={}", target.as_bytes().escape_ascii()),
            EntryKind::Directory => format!("{name}/"),
            _ => name,
        });
    }
    names
}

/// A random tree: up to a dozen entries over few names, so that they collide and change type.
fn items() -> impl Strategy<Value = Vec<Item>> {
    let name = prop_oneof![Just("a"), Just("b"), Just("a b"), Just("c")];
    let dirs = proptest::collection::vec(name, 0..3);
    let leaf = prop_oneof![Just("a"), Just("b"), Just("x"), Just("y")];
    let place = (dirs, leaf).prop_map(|(dirs, leaf)| {
        let mut parts = dirs;
        parts.push(leaf);
        parts.join("/")
    });
    // Links only under names that no path leads through.
    let link_place = prop_oneof![Just("s"), Just("a/s"), Just("b/t")];
    let item = prop_oneof![
        4 => (place.clone(), "[pq]{0,2}").prop_map(|(at, data)| file(&at, &data)),
        2 => place.clone().prop_map(|at| dir(&at)),
        1 => (link_place.clone(), "[pq]").prop_map(|(at, target)| symlink(at, &target)),
        1 => place.clone().prop_map(|at| fifo(&at)),
        1 => place.clone().prop_map(|at| char_device(&at, 1, 3)),
        3 => (place.clone(), place).prop_map(|(at, target)| hard_link(&at, &target)),
    ];
    let item = (item, 0..4_u32, 0..3_i64, any::<bool>()).prop_map(|(item, owner, time, noted)| {
        let mode = [0o644, 0o755, 0o4711, 0o1777][owner as usize];
        let item = item.mode(mode).owner(owner / 2, owner / 3).mtime(time);
        let plain = matches!(item.entry.kind, EntryKind::File { .. } | EntryKind::Directory);
        if noted && plain { item.xattr("user.note", b"n") } else { item }
    });
    proptest::collection::vec(item, 0..14)
}

/// Makes a tree of as many of the items as go together.
fn make(root: &Path, items: &[Item]) {
    for item in items {
        // Hard links to nothing, to directories, to themselves.
        let _ = apply_archive(root, Merged, &archive(std::slice::from_ref(item)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn privileged_applying_a_diff_gives_the_upper_tree(lower in items(), upper in items(), from_lower in any::<bool>()) {
        if skip_unprivileged() {
            return Ok(());
        }
        let place = Place::new();
        let [lower_tree, upper_tree, merged, layer] = ["lower", "upper", "merged", "layer"].map(|name| place.tree(name));
        make(&lower_tree, &lower);
        if from_lower {
            copy(&lower_tree, &upper_tree);
        }
        make(&upper_tree, &upper);
        let expected = snapshot(open(&upper_tree));

        let bytes = diff(Some(&lower_tree), &upper_tree).unwrap();
        copy(&lower_tree, &merged);
        prop_assert_eq!(&snapshot(open(&merged)), &snapshot(open(&lower_tree)), "a copy is a copy");
        apply_archive(&merged, Merged, &bytes).unwrap();
        prop_assert_eq!(&snapshot(open(&merged)), &expected, "in a merged tree");

        // As a layer of its own: mounted over the lower tree, and through an archive.
        let applied = apply_archive(&layer, Layer, &bytes).unwrap();
        prop_assert_eq!(applied.usage, tree::measure(open(&layer).as_fd()).unwrap());
        prop_assert_eq!(names(&to_tar(&layer, &applied.index)), names(&bytes));
        prop_assert_eq!(to_tar(&layer, &applied.index), bytes);
        fix_up(&layer, applied.index.implied().cloned(), &lower_tree);
        prop_assert_eq!(&snapshot(overlay(&[&layer, &lower_tree])), &expected, "mounted");
    }

    #[test]
    fn privileged_both_styles_give_the_same_tree(base in items(), layer in items(), marks in proptest::collection::vec((0..14_usize, "(\\.wh\\.)?[abxy]|\\.wh\\.\\.wh\\.\\.opq", "([abc]/){0,2}"), 0..4)) {
        if skip_unprivileged() {
            return Ok(());
        }
        let mut items = layer;
        for (at, name, dirs) in marks {
            let name = if name.starts_with(".wh.") { name } else { format!(".wh.{name}") };
            items.insert(at.min(items.len()), file(&format!("{dirs}{name}"), ""));
        }
        let place = Place::new();
        let [lower, merged, layer, empty] = ["lower", "merged", "layer", "empty"].map(|name| place.tree(name));
        make(&lower, &base);
        copy(&lower, &merged);
        let applied = loop {
            let error = match apply_archive(&layer, Layer, &archive(&items)) {
                Ok(applied) => break applied,
                Err(error) => error,
            };
            // Hard links that make no sense, or none without the base, as some marks make none.
            let of_marks = matches!(&error, ApplyError::NeedsBase { why: BaseNeed::Marks { .. }, .. });
            let (ApplyError::Refused { path: at, .. } | ApplyError::NeedsBase { path: at, .. }) = error else {
                panic!("{error:?}");
            };
            let is_link = |item: &Item| matches!(item.entry.kind, EntryKind::HardLink { .. });
            items.retain(|item| item.entry.path != at || !(of_marks || is_link(item)));
            fs::remove_dir_all(&layer).unwrap();
            fs::create_dir(&layer).unwrap();
        };
        // Marks below what is a file in the base: the store applies such a layer to its base, never by itself.
        let over_file = |dir: &EntryPath| {
            let there = fs::symlink_metadata(lower.join(OsStr::from_bytes(dir.as_bytes())));
            there.is_ok_and(|there| !there.is_dir())
        };
        prop_assume!(!applied.index.implied().any(over_file));
        apply_archive(&merged, Merged, &archive(&items)).unwrap();
        prop_assert_eq!(applied.usage, tree::measure(open(&layer).as_fd()).unwrap());
        let bytes = to_tar(&layer, &applied.index);
        fix_up(&layer, applied.index.implied().cloned(), &lower);
        let below = if applied.opaque_root { &empty } else { &lower };
        let mounted = snapshot(overlay(&[&layer, below]));
        prop_assert_eq!(&mounted, &snapshot(open(&merged)));

        // The same through a writable overlay, sealed.
        let [upper, work] = ["upper", "work"].map(|name| place.tree(name));
        fix_up(&upper, [EntryPath::root()].into_iter(), &lower);
        let writable = overlay_on(&upper, &work, &lower);
        let limits = crate::Limits::default();
        let layer_bytes = archive(&items);
        crate::apply(&mut crate::tar::Reader::new(layer_bytes.as_slice(), &limits), writable.as_fd(), Merged, &limits)
            .unwrap();
        drop(writable);
        let sealed = crate::seal_upper(open(&upper).as_fd(), Some(open(&lower).as_fd())).unwrap();
        prop_assert_eq!(&snapshot(overlay(&[&upper, &lower])), &mounted, "sealed");
        let sealed_again = place.tree("sealed again");
        let resealed = apply_archive(&sealed_again, Layer, &to_tar(&upper, &sealed.index)).unwrap();
        prop_assert_eq!(resealed.index.implied().len(), 0, "what was copied up stands in the archive");
        fix_up(&sealed_again, resealed.index.implied().cloned(), &lower);
        prop_assert_eq!(&snapshot(overlay(&[&sealed_again, &lower])), &mounted, "sealed and applied");

        // The canonical archive of the layer means the same as the one that it came from.
        let again = place.tree("again");
        let reapplied = apply_archive(&again, Layer, &bytes).unwrap();
        prop_assert_eq!(&reapplied.index, &applied.index);
        prop_assert_eq!(&to_tar(&again, &reapplied.index), &bytes);
        fix_up(&again, reapplied.index.implied().cloned(), &lower);
        prop_assert_eq!(&snapshot(overlay(&[&again, below])), &mounted);
    }
}

#[test]
fn privileged_equal_trees_have_no_difference() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    place.apply(Merged, &[dir("d"), file("d/a", "1"), hard_link("b", "d/a"), symlink("l", "d"), fifo("p")]).unwrap();
    let other = place.tree("other");
    copy(&place.root(), &other);
    assert_eq!(names(&diff(Some(&place.root()), &other).unwrap()), [""; 0]);
    assert_eq!(names(&diff(None, &other).unwrap()), ["/", "b", "d/", "d/a==b", "l", "p"]);
    assert_eq!(diff(None, &place.root()).unwrap(), diff(None, &other).unwrap());
}

#[test]
fn privileged_c03_content_decides_where_metadata_agrees() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    let other = place.tree("other");
    place.apply(Merged, &[file("a", "one"), file("b", "same")]).unwrap();
    apply_archive(&other, Merged, &archive(&[file("a", "two"), file("b", "same")])).unwrap();
    fix_up(&other, [EntryPath::root()].into_iter(), &place.root());
    assert_eq!(names(&diff(Some(&place.root()), &other).unwrap()), ["a"]);
}

#[test]
fn privileged_a_new_name_for_an_old_file_brings_the_file_along() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    place.apply(Merged, &[dir("d").mtime(1), file("d/a", "1"), hard_link("d/b", "d/a"), file("d/z", "z")]).unwrap();
    let other = place.tree("other");
    copy(&place.root(), &other);
    apply_archive(&other, Merged, &archive(&[hard_link("c", "d/a")])).unwrap();
    let bytes = diff(Some(&place.root()), &other).unwrap();
    assert_eq!(names(&bytes), ["c", "d/a==c", "d/b==c"]);
    apply_archive(&place.tree("layer"), Layer, &bytes).unwrap();
}

#[test]
fn privileged_a_tree_with_sockets_loses_only_them() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    place.apply(Merged, &[file("a", "1"), file("s", "was a file")]).unwrap();
    let other = place.tree("other");
    fs::write(other.join("a"), "2").unwrap();
    for name in ["s", "t"] {
        drop(std::os::unix::net::UnixListener::bind(other.join(name)).unwrap());
    }
    assert_eq!(names(&diff(Some(&place.root()), &other).unwrap()), ["/", "a", ".wh.s"]);
    assert_eq!(names(&diff(None, &other).unwrap()), ["/", "a"]);
}

#[test]
fn privileged_names_that_would_read_back_as_marks_are_refused() {
    if skip_unprivileged() {
        return;
    }
    for (make, over) in
        [(".wh.a", false), (".wh..wh.plnk", false), (".wh.", false), (".wh.wh", true), (".wh..wh..opq", true)]
    {
        let place = Place::new();
        fs::write(place.root().join(make), "").unwrap();
        let other = place.tree("other");
        let error = if over { diff(Some(&place.root()), &other) } else { diff(None, &place.root()) }.unwrap_err();
        assert!(matches!(error, DiffError::Unrepresentable { .. }), "{make}: {error:?}");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
    let place = Place::new();
    make_whiteout(&place.root(), "w");
    assert!(matches!(diff(None, &place.root()), Err(DiffError::Unrepresentable { .. })));
}

#[test]
fn privileged_a_layer_names_its_marks() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    let items = [
        file(".wh..wh..opq", ""),
        dir("d"),
        file("d/.wh..wh..opq", ""),
        file("d/a", "1"),
        file("e/f/.wh.g", ""),
        file("z", "1"),
        file(".wh.a", ""),
    ];
    let applied = place.apply(Layer, &items).unwrap();
    let bytes = to_tar(&place.root(), &applied.index);
    assert_eq!(names(&bytes), [".wh..wh..opq", ".wh.a", "d/", "d/.wh..wh..opq", "d/a", "e/", "e/f/", "e/f/.wh.g", "z"]);
}

#[test]
fn a_layer_is_newer_by_what_its_archive_has() {
    let scratch = tempfile::tempdir().unwrap();
    let at = |seconds| std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    let set = |name: &str, seconds| {
        fs::File::open(scratch.path().join(name)).unwrap().set_modified(at(seconds)).unwrap();
    };
    fs::create_dir(scratch.path().join("d")).unwrap();
    fs::write(scratch.path().join("d/f"), "f").unwrap();
    set("d/f", 100);
    set("d", 200);
    set("", 50);
    let mut index = DirIndex::default();
    let newer = |index: &DirIndex, seconds| {
        let than = Timestamp { seconds, nanos: 0 };
        is_newer(open(scratch.path()).as_fd(), index, than).unwrap()
    };
    assert!(newer(&index, 199) && !newer(&index, 200));
    // Of a directory on the way the archive says nothing.
    index.insert(EntryPath::clean(b"d").unwrap(), Implied::OnTheWay);
    assert!(newer(&index, 99) && !newer(&index, 100));
}
