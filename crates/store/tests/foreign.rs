//! Upper directories of other programs, made by hand: each form in which overlayfs and fuse-overlayfs say that something is not
//! there.
#![allow(clippy::unwrap_used)] // the exemption for tests does not see their helpers

mod common;

use std::fs;
use std::ops::ControlFlow;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::{Path, PathBuf};

use plies_archive::SealError;
use plies_store::{
    ActiveOptions, Attach, Cancel, DriverKind, ForeignTree, Indexes, LayerId, Lease, NotLinked, SnapshotError, Store,
    Taking, Unpacked,
};
use rustix::fs::{CWD, FileType, Mode, OFlags, XattrFlags};

use common::{Item, Rig, assert_healthy, listing, measure, path_of, privileged, process_lease, publish};

/// An upper directory and a store with a layer below it.
struct Upper {
    store: Store,
    lease: Lease,
    below: LayerId,
    at: PathBuf,
    /// Last, so that the rest is gone before.
    _rig: Rig,
}

impl Upper {
    /// Over the directories `d` and `e`, with the files `a`, `b` and `c` in both and beside them.
    fn new() -> Self {
        let rig = Rig::with_driver(DriverKind::Overlay);
        let store = rig.open();
        let lease = process_lease(&store);
        let files = ["a", "b", "c", "d/a", "d/b", "d/c", "e/a", "e/b", "e/c"].map(|path| Item::File(path, "below"));
        let below = publish(&store, &lease, &files);
        let at = rig.dir.path().join("upper");
        fs::create_dir_all(at.join("d")).unwrap();
        fs::create_dir(at.join("e")).unwrap();
        Self { store, lease, below, at, _rig: rig }
    }

    fn file(&self, path: &str, content: &str) -> &Self {
        fs::write(self.at.join(path), content).unwrap();
        self
    }

    fn mark(&self, path: &str, name: &str, value: &str) -> &Self {
        rustix::fs::lsetxattr(self.at.join(path), name, value.as_bytes(), XattrFlags::empty()).unwrap();
        self
    }

    fn open(&self) -> std::os::fd::OwnedFd {
        rustix::fs::open(&self.at, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
    }

    fn take(&self, taking: Taking<'_>) -> Result<LayerId, SnapshotError> {
        let tree = ForeignTree::Upper(self.open());
        let over = (&[self.below][..], &Indexes::default());
        let judge = |_: &mut _, known| Some(known);
        let staged = self.store.snapshots().stage_foreign(over, &tree, taking, &Cancel::new(), judge)?;
        Ok(self.store.layers().publish(&self.lease, vec![staged.unwrap()]).unwrap()[0])
    }

    /// What is there with the upper as a layer, however it is taken, and in a tree that it is done to: files with what is in them. Those
    /// that are as below are left out.
    fn shows(&self) -> Vec<String> {
        let snapshots = self.store.snapshots();
        let [linked, copied] = [Taking::Link(&NotLinked::default()), Taking::Copy].map(|taking| {
            let layer = self.take(taking).unwrap();
            assert_unmarked(&path_of(&self.store.layers().root(layer).unwrap()));
            let stack = snapshots.ensure(&[self.below, layer], &self.lease).unwrap();
            let view = snapshots.view(stack, Attach::Detached).unwrap();
            let shown = files(view.root());
            view.unmount().unwrap();
            shown
        });
        assert_eq!(linked, copied);
        let base = snapshots.ensure(&[self.below], &self.lease).unwrap();
        let active = snapshots.prepare(Some(base), &self.lease, ActiveOptions { volatile: false }).unwrap();
        let mounted = snapshots.mount_active(active, Attach::Detached).unwrap();
        snapshots.copy_changes(&self.open(), mounted.root(), &Cancel::new()).unwrap();
        let done = files(mounted.root());
        assert_unmarked(&path_of(&mounted.root()));
        mounted.unmount().unwrap();
        assert_eq!(done, linked, "what is done to a tree");
        assert_healthy(&self.store);
        linked
    }

    /// Why no way of taking it takes it. The store is as before.
    fn refused(&self) -> SealError {
        let layers = || {
            let mut count = 0;
            self.store
                .layers()
                .scan(|_| {
                    count += 1;
                    ControlFlow::Continue(())
                })
                .unwrap();
            count
        };
        let before = layers();
        let errors = [Taking::Link(&NotLinked::default()), Taking::Copy].map(|taking| match self.take(taking) {
            Err(SnapshotError::Seal(error)) => error,
            other => panic!("{other:?}"),
        });
        assert_eq!(layers(), before);
        let [linked, copied] = errors;
        assert_eq!(linked.to_string(), copied.to_string());
        linked
    }
}

/// The files of a tree, by their paths and with what is in them.
fn files(root: BorrowedFd<'_>) -> Vec<String> {
    let lines = listing(root).into_iter().filter_map(|(path, line)| {
        let text = line.strip_prefix("file ")?.split('"').nth(1)?.to_owned();
        Some(if text == "below" { path } else { format!("{path}={text}") })
    });
    lines.collect()
}

/// Nothing in a tree carries a mark of another program; a layer's own may be there.
fn assert_unmarked(root: &Path) {
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let mut list = [0; 4096];
        let length = rustix::fs::llistxattr(&path, &mut list[..]).unwrap();
        let list = String::from_utf8_lossy(&list[..length]).into_owned();
        for name in list.split_terminator('\0').filter(|name| *name != "user.note") {
            assert!(["trusted.overlay.opaque", "trusted.overlay.origin"].contains(&name), "{}: {name}", path.display());
        }
        if fs::symlink_metadata(&path).unwrap().is_dir() {
            pending.extend(fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        }
    }
}

#[test]
fn privileged_whiteouts_of_every_form_hide_one_name() {
    if !privileged("whiteouts_of_every_form_hide_one_name") {
        return;
    }
    let device = |upper: &Upper, path: &str| {
        rustix::fs::mknodat(CWD, upper.at.join(path), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
    };
    let by_attribute = |upper: &Upper, path: &str, name: &str| {
        upper.file(path, "").mark(path, name, "");
    };
    type Make<'m> = &'m dyn Fn(&Upper, &str);
    let forms: [(&str, Make<'_>); 4] = [
        ("device", &|upper, name| device(upper, &format!("d/{name}"))),
        ("root's", &|upper, name| by_attribute(upper, &format!("d/{name}"), "trusted.overlay.whiteout")),
        ("anybody's", &|upper, name| by_attribute(upper, &format!("d/{name}"), "user.overlay.whiteout")),
        ("fuse-overlayfs'", &|upper, name| fs::write(upper.at.join(format!("d/.wh.{name}")), "").unwrap()),
    ];
    for (form, make) in forms {
        for marked in [false, true] {
            let upper = Upper::new();
            make(&upper, "a");
            // Of what is not there.
            make(&upper, "never");
            upper.file("d/new", "new").file("d/empty", "").mark("d/empty", "user.note", "1");
            if marked {
                upper.mark("d", "trusted.overlay.opaque", "x").mark("d", "user.overlay.opaque", "x");
            }
            let seen = ["a", "b", "c", "d/b", "d/c", "d/empty=", "d/new=new", "e/a", "e/b", "e/c"];
            assert_eq!(upper.shows(), seen, "{form}");
        }
    }
}

#[test]
fn privileged_opaque_directories_of_every_form_hide_what_lies_below() {
    if !privileged("opaque_directories_of_every_form_hide_what_lies_below") {
        return;
    }
    for name in ["trusted.overlay.opaque", "user.overlay.opaque", "user.fuseoverlayfs.opaque", ".wh..wh..opq"] {
        let upper = Upper::new();
        upper.file("d/new", "new").file("d/b", "again");
        match name.starts_with('.') {
            true => upper.file(&format!("d/{name}"), ""),
            false => upper.mark("d", name, "y"),
        };
        assert_eq!(upper.shows(), ["a", "b", "c", "d/b=again", "d/new=new", "e/a", "e/b", "e/c"], "{name}");
    }
    // Other values say nothing, and an overlay inside this one is none of ours.
    for (name, value) in [
        ("trusted.overlay.opaque", "x"),
        ("trusted.overlay.opaque", "yes"),
        ("user.overlay.opaque", "n"),
        ("trusted.overlay.overlay.opaque", "y"),
        ("user.overlay.overlay.opaque", "y"),
    ] {
        let upper = Upper::new();
        upper.file("d/new", "new").mark("d", name, value);
        assert_eq!(upper.shows().len(), 10, "{name}={value}");
    }
}

#[test]
fn privileged_marks_that_say_nothing_to_others_go() {
    if !privileged("marks_that_say_nothing_to_others_go") {
        return;
    }
    let upper = Upper::new();
    upper.file("d/f", "f").file("d/g", "").file("d/h", "1").mark("d/h", "user.note", "1");
    for prefix in ["trusted.overlay.", "user.overlay."] {
        for name in ["origin", "impure", "nlink", "uuid", "protattr", "upper"] {
            upper.mark("d", &format!("{prefix}{name}"), "z").mark("d/f", &format!("{prefix}{name}"), "z");
        }
        upper.mark("d/g", &format!("{prefix}overlay.whiteout"), "");
        // It is not empty.
        upper.mark("d/h", &format!("{prefix}whiteout"), "");
    }
    for path in ["d", "d/f"] {
        upper.mark(path, "user.fuseoverlayfs.origin", "z");
    }
    let seen = ["a", "b", "c", "d/a", "d/b", "d/c", "d/f=f", "d/g=", "d/h=1", "e/a", "e/b", "e/c"];
    assert_eq!(upper.shows(), seen);
}

#[test]
fn privileged_what_cannot_be_told_from_the_upper_alone_is_refused() {
    if !privileged("what_cannot_be_told_from_the_upper_alone_is_refused") {
        return;
    }
    for name in [
        "trusted.overlay.redirect",
        "trusted.overlay.metacopy",
        "user.overlay.redirect",
        "user.overlay.metacopy",
        "user.fuseoverlayfs.override_stat",
        "security.fuseoverlayfs.override_stat",
        "user.containers.override_stat",
    ] {
        for path in ["d", "d/f"] {
            let upper = Upper::new();
            upper.file("d/f", "f").mark(path, name, "z");
            let said = upper.refused().to_string();
            assert!(said.contains(path) && said.contains(name), "{said}");
        }
    }
    for (path, content) in [("d/.wh.a", "full"), ("d/.wh..wh..opq", "full"), ("d/.wh.", ""), ("d/.wh..wh.plnk", "")] {
        let upper = Upper::new();
        let said = upper.file(path, content).refused().to_string();
        assert!(said.contains(path) && said.contains("named like a whiteout"), "{said}");
    }
    let upper = Upper::new();
    let said = upper.file("d/.wh.a", "").file("d/a", "a").refused().to_string();
    assert!(said.contains("d/.wh.a") && said.contains("a name that is there"), "{said}");
    let upper = Upper::new();
    fs::create_dir(upper.at.join("d/.wh.a")).unwrap();
    assert!(upper.refused().to_string().contains("named like a whiteout"));
}

#[test]
fn privileged_a_plain_tree_is_copied_with_what_would_be_marks_in_an_upper() {
    if !privileged("a_plain_tree_is_copied_with_what_would_be_marks_in_an_upper") {
        return;
    }
    let upper = Upper::new();
    upper.file("d/.wh.a", "").file("d/a", "a").mark("d", "user.overlay.opaque", "y");
    upper.file("d/g", "").mark("d/g", "user.overlay.whiteout", "");
    let to = tempfile::tempdir().unwrap();
    let open = rustix::fs::open(to.path(), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
    upper.store.snapshots().copy_foreign(&upper.open(), open.as_fd(), &Cancel::new()).unwrap();
    assert_eq!(files(open.as_fd()), ["d/.wh.a=", "d/a=a", "d/g="]);
    let mut value = [0; 1];
    assert_eq!(rustix::fs::getxattr(to.path().join("d"), "user.overlay.opaque", &mut value[..]), Ok(1));
}

#[test]
fn privileged_of_an_unpacked_tree_the_tar_says_what_is_meant() {
    if !privileged("of_an_unpacked_tree_the_tar_says_what_is_meant") {
        return;
    }
    type Mark<'m> = &'m dyn Fn(&Upper);
    let marks: [(&str, Mark<'_>); 4] = [
        ("nothing", &|_| {}),
        ("whiteout", &|upper| {
            upper.mark("d/f", "trusted.overlay.whiteout", "");
        }),
        ("whiteout", &|upper| {
            upper.mark("d/f", "user.overlay.whiteout", "");
        }),
        ("origin", &|upper| {
            upper.mark("d/f", "user.overlay.origin", "");
        }),
    ];
    for (said, mark) in marks {
        for taking in [Taking::Link(&NotLinked::default()), Taking::Copy] {
            let upper = Upper::new();
            mark(upper.file("d/f", ""));
            let stage = upper.store.layers().stage().unwrap();
            // All that is looked at is what a tar without attributes would list, as of an empty file.
            let unpacked = Unpacked { root: None, agrees: &|_| Ok(true) };
            let filled = upper.store.snapshots().fill_unpacked(&stage, &upper.open(), taking, unpacked, &Cancel::new());
            let filled = filled.unwrap();
            assert_eq!(filled.is_none(), said == "whiteout", "{said}");
            if let Some(usage) = filled {
                assert_eq!(usage, measure(&path_of(&stage.root())));
                assert_unmarked(&path_of(&stage.root()));
            }
        }
    }
}
