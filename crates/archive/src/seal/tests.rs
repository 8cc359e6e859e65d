//! Uppers that a real overlay left, and some made by hand.

use std::fs;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{PermissionsExt, symlink as link};
use std::path::{Path, PathBuf};

use super::*;
#[allow(unused_imports)]
use crate::Implied;
use crate::apply::ApplyStyle::{Layer, Merged};
use crate::testing::*;
use crate::{DirIndex, layer_to_tar, tree};

/// A base, an upper over it, and where it is mounted.
struct Step {
    place: Place,
    base: PathBuf,
    upper: PathBuf,
    work: PathBuf,
}

impl Step {
    fn over(items: &[Item]) -> Self {
        let place = Place::new();
        let (base, upper, work) = (place.tree("base"), place.tree("upper"), place.tree("work"));
        apply_archive(&base, Layer, &archive(items)).unwrap();
        let step = Self { place, base, upper, work };
        step.adopt_root();
        step
    }

    /// An upper starts as the root that it covers, as a store prepares it.
    fn adopt_root(&self) {
        fix_up(&self.upper, [EntryPath::root()].into_iter(), &self.base);
    }

    /// Runs `work` in the mounted tree, then seals.
    fn run(&self, work: impl FnOnce(&Path)) -> Sealed {
        let mounted = overlay_on(&self.upper, &self.work, &self.base);
        work(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&mounted)).as_ref());
        let before = snapshot(&mounted);
        drop(mounted);
        let sealed = self.seal();
        assert_eq!(before, snapshot(overlay(&[&self.upper, &self.base])), "sealing changed the tree");
        assert_eq!(sealed.usage, tree::measure(open(&self.upper).as_fd()).unwrap());
        assert_eq!(sealed, self.seal(), "sealing again changed something");
        sealed
    }

    fn seal(&self) -> Sealed {
        seal_upper(open(&self.upper).as_fd(), Some(open(&self.base).as_fd())).unwrap()
    }
}

fn implied(paths: &[&str]) -> DirIndex {
    paths.iter().map(|raw| (path(raw), Implied::CopiedUp)).collect()
}

fn private_xattrs(root: &Path) -> Vec<String> {
    let mut seen = Vec::new();
    tree::walk(open(root).as_fd(), |found| {
        let at = root.join(str::from_utf8(found.path.as_bytes()).unwrap());
        let mut list = vec![0; 4096];
        let n = rustix::fs::llistxattr(&at, &mut list[..]).unwrap();
        for name in xattr::names(&list[..n]).filter(|name| name.starts_with(xattr::OVERLAY)) {
            seen.push(format!("{} {}", found.path, name.escape_ascii()));
        }
        Ok::<_, tree::WalkError>(())
    })
    .unwrap();
    seen
}

#[test]
fn privileged_what_was_copied_up_and_did_not_change_goes() {
    if skip_unprivileged() {
        return;
    }
    let note = |path: &Path| {
        rustix::fs::setxattr(path, "user.note", b"n", rustix::fs::XattrFlags::empty()).unwrap();
    };
    let items = ["moved", "mode", "written", "noted", "linked"].map(|name| file(&format!("d/{name}"), "same"));
    let items = [vec![dir("d")], items.to_vec()].concat();
    let step = Step::over(&items);
    step.run(|root| {
        let at = |name: &str| root.join("d").join(name);
        fs::rename(at("moved"), root.join("away")).unwrap();
        fs::rename(root.join("away"), at("moved")).unwrap();
        let mode = fs::metadata(at("mode")).unwrap().permissions();
        fs::set_permissions(at("mode"), mode).unwrap();
        let was = fs::metadata(at("written")).unwrap().modified().unwrap();
        fs::write(at("written"), b"else").unwrap();
        fs::File::options().write(true).open(at("written")).unwrap().set_modified(was).unwrap();
        note(&at("noted"));
        fs::hard_link(at("linked"), at("linked2")).unwrap();
    });
    assert_eq!(shape(&step.upper), ["d/", "d/linked=same", "d/linked2==d/linked", "d/noted=same", "d/written=else"]);

    // Where nothing else is left, the directory goes as well.
    let step = Step::over(&items);
    step.run(|root| {
        let path = root.join("d/mode");
        let mode = fs::metadata(&path).unwrap().permissions();
        fs::set_permissions(path, mode).unwrap();
    });
    assert_eq!(shape(&step.upper), [""; 0]);
}

#[test]
fn privileged_directories_on_the_way_to_a_change_are_implied() {
    if skip_unprivileged() {
        return;
    }
    let step =
        Step::over(&[dir("a").mode(0o1777), dir("a/b"), file("a/b/f", "1"), dir("c"), dir("d"), file("d/f", "1")]);
    let sealed = step.run(|root| {
        // Appending changes no directory; the others do.
        fs::OpenOptions::new().append(true).open(root.join("a/b/f")).unwrap().write_all(b"2").unwrap();
        fs::write(root.join("c/new"), "n").unwrap();
        fs::set_permissions(root.join("d"), fs::Permissions::from_mode(0o700)).unwrap();
    });
    assert_eq!(shape(&step.upper), ["a/", "a/b/", "a/b/f=12", "c/", "c/new=n", "d/"]);
    assert_eq!(sealed.index, implied(&["", "a", "a/b"]));
    assert_eq!(private_xattrs(&step.upper), [""; 0]);
}

#[test]
fn privileged_marks_that_hide_nothing_go_and_the_others_stay() {
    if skip_unprivileged() {
        return;
    }
    let step = Step::over(&[
        dir("kept"),
        file("kept/gone", "1"),
        dir("remade"),
        file("remade/old", "1"),
        dir("remade/sub"),
        file("remade/sub/older", "1"),
        file("remade/sub/again", "1"),
        dir("empty"),
        file("file", "1"),
    ]);
    let sealed = step.run(|root| {
        fs::remove_file(root.join("kept/gone")).unwrap();
        for name in ["remade", "empty"] {
            fs::remove_dir_all(root.join(name)).unwrap();
            fs::create_dir(root.join(name)).unwrap();
        }
        fs::create_dir(root.join("remade/sub")).unwrap();
        fs::write(root.join("remade/sub/again"), "2").unwrap();
        fs::remove_file(root.join("file")).unwrap();
        fs::create_dir(root.join("file")).unwrap();
        fs::write(root.join("file/x"), "1").unwrap();
        // Was never in the base.
        fs::create_dir(root.join("new")).unwrap();
        fs::write(root.join("new/passing"), "").unwrap();
        fs::remove_file(root.join("new/passing")).unwrap();
    });
    assert_eq!(
        shape(&step.upper),
        [
            "empty/",
            "file/",
            "file/x=1",
            "kept/",
            "kept/gone!",
            "new/",
            "remade/",
            "remade/old!",
            "remade/sub/",
            "remade/sub/again=2",
            "remade/sub/older!"
        ],
        "the kernel marked all four as opaque; what they took away is named"
    );
    assert_eq!(sealed.index, implied(&[]));
    let marks =
        ["/kept trusted.overlay.origin", "/remade trusted.overlay.origin", "/remade/sub trusted.overlay.origin"];
    assert_eq!(private_xattrs(&step.upper), marks);
}

#[test]
fn privileged_marks_over_nothing_go_by_hand_too() {
    if skip_unprivileged() {
        return;
    }
    let step = Step::over(&[dir("d").mtime(7), file("f", "1")]);
    make_whiteout(&step.upper, "never was");
    make_whiteout(&step.upper, "f");
    fs::create_dir_all(step.upper.join("new/d")).unwrap();
    make_whiteout(&step.upper.join("new/d"), "never was");
    for name in ["new", "new/d"] {
        set_xattr(&step.upper.join(name), "trusted.overlay.opaque", b"y");
    }
    for name in
        ["trusted.overlay.origin", "trusted.overlay.impure", "user.overlay.opaque", "trusted.overlay.overlay.opaque"]
    {
        set_xattr(&step.upper.join("new"), name, b"y");
    }
    fs::create_dir(step.upper.join("d")).unwrap();
    fs::write(step.upper.join("d/x"), "1").unwrap();
    make_whiteout(&step.upper.join("d"), "never was");
    fix_up(&step.upper, [path("d"), EntryPath::root()].into_iter(), &step.base);
    let sealed = step.seal();
    assert_eq!(shape(&step.upper), ["d/", "d/x=1", "f!", "new/", "new/d/"]);
    assert_eq!(sealed.index, implied(&["", "d"]), "cleaning set no new time");
    assert_eq!(private_xattrs(&step.upper), ["/ trusted.overlay.origin"]);
    assert!(line(&step.upper, "d").contains(" 7.000000000 "));
}

#[test]
fn privileged_directories_in_which_nothing_changed_after_all_go() {
    if skip_unprivileged() {
        return;
    }
    let step = Step::over(&[dir("a").mtime(7), dir("a/b").mtime(7), dir("c").mtime(7), file("a/f", "1")]);
    let sealed = step.run(|root| {
        for mode in [0o700, 0o755] {
            fs::set_permissions(root.join("a/b"), fs::Permissions::from_mode(mode)).unwrap();
            fs::set_permissions(root.join("c"), fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::set_permissions(root.join("c"), fs::Permissions::from_mode(0o700)).unwrap();
    });
    assert_eq!(shape(&step.upper), ["c/"]);
    assert_eq!(sealed.index, implied(&[""]));
    assert_eq!(sealed.usage.inodes, 2);
}

#[test]
fn privileged_whiteouts_without_devices_are_recognised() {
    if skip_unprivileged() {
        return;
    }
    let step = Step::over(&[
        dir("d").mtime(7),
        file("d/gone", "1"),
        file("d/empty", "1"),
        dir("e").mtime(7),
        file("e/gone", "1"),
        file("e/inner", "1"),
    ]);
    fs::create_dir(step.upper.join("d")).unwrap();
    set_xattr(&step.upper.join("d"), "trusted.overlay.opaque", b"x");
    for name in ["d/gone", "d/never was", "d/empty"] {
        fs::write(step.upper.join(name), "").unwrap();
    }
    // Not marked to have any, which changes nothing about who can open it.
    fs::create_dir(step.upper.join("e")).unwrap();
    fs::write(step.upper.join("e/gone"), "").unwrap();
    for name in ["d/gone", "d/never was", "e/gone"] {
        set_xattr(&step.upper.join(name), "trusted.overlay.whiteout", b"");
    }
    // A file with content is one, and so is what an overlay inside this one takes for none.
    fs::write(step.upper.join("e/full"), "1").unwrap();
    set_xattr(&step.upper.join("e/full"), "trusted.overlay.whiteout", b"");
    fs::write(step.upper.join("e/inner"), "").unwrap();
    set_xattr(&step.upper.join("e/inner"), "trusted.overlay.overlay.whiteout", b"");
    fix_up(&step.upper, [path("d"), path("e"), EntryPath::root()].into_iter(), &step.base);
    let sealed = step.seal();
    assert_eq!(shape(&step.upper), ["d/", "d/empty=", "d/gone!", "e/", "e/full=1", "e/gone!", "e/inner="]);
    assert_eq!(sealed.index, implied(&["", "d", "e"]));
    let marks = ["/d trusted.overlay.origin", "/e trusted.overlay.origin"];
    assert_eq!(private_xattrs(&step.upper), marks);
}

#[test]
fn privileged_m01_content_that_lies_elsewhere_is_refused() {
    if skip_unprivileged() {
        return;
    }
    for (name, is_dir) in [("trusted.overlay.redirect", true), ("trusted.overlay.metacopy", false)] {
        let step = Step::over(&[]);
        let at = step.upper.join("x");
        if is_dir {
            fs::create_dir(&at).unwrap()
        } else {
            fs::write(&at, "").unwrap()
        }
        set_xattr(&at, name, b"y");
        let error = seal_upper(open(&step.upper).as_fd(), None).unwrap_err();
        assert!(matches!(error, SealError::NotSelfContained { .. }), "{error:?}");
        assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    }
}

#[test]
fn privileged_without_a_base_all_is_explicit() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    fs::create_dir_all(place.root().join("a/b")).unwrap();
    make_whiteout(&place.root().join("a"), "w");
    let sealed = seal_upper(open(&place.root()).as_fd(), None).unwrap();
    assert_eq!(shape(&place.root()), ["a/", "a/b/"]);
    assert_eq!(sealed.index, implied(&[]));
    assert_eq!(sealed.usage.inodes, 3);
}

/// Base, writes, seal, archive, apply: the same tree at the end.
#[test]
fn privileged_a_sealed_layer_becomes_an_archive_and_a_layer_again() {
    if skip_unprivileged() {
        return;
    }
    let base_items = [
        dir("./").mtime(3),
        dir("etc").mtime(4),
        file("etc/passwd", "root").mode(0o640).owner(0, 42),
        dir("tmp").mode(0o1777),
        dir("usr/lib"),
        file("usr/lib/a", "a"),
        hard_link("usr/lib/b", "usr/lib/a"),
        symlink("lib", "usr/lib"),
        dir("opt/old"),
        file("opt/old/x", "x"),
    ];
    let step = Step::over(&base_items);
    let sealed = step.run(|root| {
        fs::write(root.join("lib/c"), "c").unwrap();
        fs::hard_link(root.join("usr/lib/c"), root.join("usr/d")).unwrap();
        fs::OpenOptions::new().append(true).open(root.join("etc/passwd")).unwrap().write_all(b"!").unwrap();
        fs::remove_dir_all(root.join("opt/old")).unwrap();
        fs::create_dir(root.join("opt/old")).unwrap();
        fs::remove_file(root.join("usr/lib/b")).unwrap();
        fs::write(root.join("tmp/x"), "x").unwrap();
        link("nowhere", root.join("tmp/l")).unwrap();
        set_xattr(&root.join("tmp/x"), "user.note", b"1");
        fs::set_permissions(root.join("tmp/x"), fs::Permissions::from_mode(0o4755)).unwrap();
        rustix::fs::mkfifoat(open(root), "tmp/p", rustix::fs::Mode::RWXU).unwrap();
    });
    let tar = |layer: &Path, index: &DirIndex| {
        let mut out = crate::tar::Writer::new(Vec::new());
        layer_to_tar(open(layer).as_fd(), index, &mut out).unwrap();
        out.finish().unwrap()
    };
    let bytes = tar(&step.upper, &sealed.index);

    let again = step.place.tree("again");
    let applied = apply_archive(&again, Layer, &bytes).unwrap();
    assert_eq!(shape(&again), shape(&step.upper));
    // What was copied up stands in the archive, for those who unpack it by itself; so it comes back explicit.
    assert_eq!(applied.index, DirIndex::default());
    assert_eq!(tar(&again, &applied.index), bytes);
    fix_up(&again, applied.index.implied().cloned(), &step.base);
    let expected = snapshot(overlay(&[&step.upper, &step.base]));
    assert_eq!(snapshot(overlay(&[&again, &step.base])), expected);

    let flat = step.place.tree("flat");
    apply_archive(&flat, Merged, &archive(&base_items)).unwrap();
    apply_archive(&flat, Merged, &bytes).unwrap();
    assert_eq!(snapshot(open(&flat)), snapshot(overlay(&[&step.upper, &step.base])));
}
