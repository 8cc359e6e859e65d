//! The hazards of applying, by the ids of the catalogue.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::ApplyStyle::{Layer, Merged};
use super::*;
#[allow(unused_imports)]
use crate::Implied;
use crate::testing::*;

const BOTH: [ApplyStyle; 2] = [Layer, Merged];

fn refusal(result: Result<Applied, ApplyError>) -> Refusal {
    match result {
        Err(ApplyError::Refused { why, .. }) => why,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

/// Applies in both styles to empty trees and expects the same shape.
#[track_caller]
fn both(items: impl Fn(&Place) -> Vec<Item>, expected: &[&str]) {
    for style in BOTH {
        let place = Place::new();
        place.apply(style, &items(&place)).unwrap();
        assert_eq!(shape(&place.root()), expected, "{style:?}");
    }
}

#[test]
fn privileged_p01_path_through_an_absolute_link_stays_in_the_root() {
    if skip_unprivileged() {
        return;
    }
    for style in BOTH {
        let place = Place::new();
        let victim = place.victim();
        place.apply(style, &[symlink("x", &victim), file("x/pwn", "p")]).unwrap();
        assert_eq!(fs::read_to_string(place.root().join(&victim[1..]).join("pwn")).unwrap(), "p");
    }
}

#[test]
fn privileged_p02_path_through_a_link_upwards_stays_in_the_root() {
    if skip_unprivileged() {
        return;
    }
    both(|_| vec![symlink("x", "../victim"), file("x/pwn", "p")], &["victim/", "victim/pwn=p", "x->../victim"]);
}

#[test]
fn privileged_p05_p06_dir_over_symlink_replaces_it() {
    if skip_unprivileged() {
        return;
    }
    for style in BOTH {
        let place = Place::new();
        let victim = place.victim();
        let items = [symlink("x", &victim), dir("x/").mode(0o777), file("x/a", "1")];
        place.apply(style, &items).unwrap();
        let in_root: &[&str] = if style == Layer { &["x/ opaque", "x/a=1"] } else { &["x/", "x/a=1"] };
        assert_eq!(shape(&place.root()), in_root);
        assert_eq!(fs::metadata(place.root().join("x")).unwrap().mode() & 0o7777, 0o777);
    }
}

#[test]
fn privileged_p07_the_root_stays_a_directory() {
    if skip_unprivileged() {
        return;
    }
    for item in [symlink("", "/"), file("", "x"), fifo("")] {
        // The writer may refuse such an entry, so it is handed over directly.
        let place = Place::new();
        let mut applier = Applier::new(open(&place.root()).as_fd(), Layer, &Limits::default()).unwrap();
        let error = applier.entry(&item.entry, &mut Bytes::default()).unwrap_err();
        assert!(matches!(error, ApplyError::Refused { why: Refusal::RootNotDirectory, .. }), "{error:?}");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn privileged_p08_root_entry_changes_the_root_and_not_its_parent() {
    if skip_unprivileged() {
        return;
    }
    for style in BOTH {
        let place = Place::new();
        let parent = fs::metadata(place.path()).unwrap();
        let applied = place
            .apply(style, &[dir("./").mode(0).owner(1234, 5).xattr("user.note", b"root"), file("a", "1")])
            .unwrap();
        let root = fs::metadata(place.root()).unwrap();
        assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0, 1234, 5));
        assert_eq!((root.mtime(), root.mtime_nsec()), (THEN.seconds, THEN.nanos.into()));
        assert!(line(&place.root(), "").contains("user.note=root"));
        assert_eq!(applied.index, DirIndex::default(), "the root is explicit");
        let after = fs::metadata(place.path()).unwrap();
        assert_eq!((parent.mode(), parent.uid(), parent.mtime()), (after.mode(), after.uid(), after.mtime()));
    }
}

#[test]
fn privileged_p09_a_path_leads_where_it_leads_now() {
    if skip_unprivileged() {
        return;
    }
    let items = |_: &Place| {
        vec![dir("foo"), file("foo/a", "a"), symlink("foo", "/"), file("foo/b", "b"), dir("foo"), file("foo/c", "c")]
    };
    for style in BOTH {
        let place = Place::new();
        place.apply(style, &items(&place)).unwrap();
        let foo = if style == Layer { "foo/ opaque" } else { "foo/" };
        assert_eq!(shape(&place.root()), ["b=b", foo, "foo/c=c"]);
    }
}

#[test]
fn privileged_p10_links_through_links_stay_in_the_root() {
    if skip_unprivileged() {
        return;
    }
    both(
        |_| vec![symlink("a", "x/escape"), symlink("x/escape", "../.."), file("a/absolute/file", "f")],
        &["a->x/escape", "absolute/", "absolute/file=f", "x/", "x/escape->../.."],
    );
}

#[test]
fn privileged_p11_a_loop_of_links_ends() {
    if skip_unprivileged() {
        return;
    }
    for style in BOTH {
        let place = Place::new();
        let result = place.apply(style, &[symlink("a", "b"), symlink("b", "a"), file("a/f", "1")]);
        assert_eq!(refusal(result), Refusal::TooManyLinks);
    }
}

#[test]
fn privileged_p11b_forty_links_are_followed_and_no_more() {
    if skip_unprivileged() {
        return;
    }
    for (links, works) in [(40, true), (41, false)] {
        let place = Place::new();
        let mut items: Vec<_> = (0..links).map(|n| symlink(&format!("l{n}"), &format!("l{}", n + 1))).collect();
        items.push(dir(&format!("l{links}")));
        items.push(file("l0/f", "1"));
        let result = place.apply(Layer, &items);
        assert_eq!(result.is_ok(), works, "{links} links: {result:?}");
    }
}

#[test]
fn privileged_p12_a_resolved_path_has_a_depth_limit() {
    if skip_unprivileged() {
        return;
    }
    let deep = |depth: usize| vec!["d"; depth].join("/");
    // At the limit nothing overflows; the depth comes from a link, past what one path may say.
    let most = Limits::default().path_depth as usize;
    let place = Place::new();
    let items = [dir(&deep(most - 10)), symlink("far", &deep(most - 10)), file(&format!("far/{}/f", deep(9)), "1")];
    place.apply(Layer, &items).unwrap();

    let place = Place::new();
    let items = [dir(&deep(most - 10)), symlink("far", &deep(most - 10)), file(&format!("far/{}/f", deep(11)), "1")];
    let error = place.apply(Layer, &items).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit);
    assert!(error.to_string().contains("limits.path-depth"), "{error}");
}

#[test]
fn privileged_p13_resolved_paths_longer_than_path_max_stay_in_the_root() {
    if skip_unprivileged() {
        return;
    }
    let long = "l".repeat(250);
    let mut items = Vec::new();
    // Each round goes 15 directories deeper through the link of the round before.
    let mut at = String::new();
    for round in 0..3 {
        let deep = vec![long.as_str(); 15].join("/");
        let target = if at.is_empty() { deep.clone() } else { format!("{at}/{deep}") };
        items.push(dir(&target));
        items.push(symlink(&format!("s{round}"), &target));
        at = format!("s{round}");
    }
    items.push(symlink(&format!("{at}/up"), &vec![".."; 60].join("/")));
    items.push(file(&format!("{at}/up/pwn"), "p"));
    for style in BOTH {
        let place = Place::new();
        place.apply(style, &items).unwrap();
        assert_eq!(fs::read_to_string(place.root().join("pwn")).unwrap(), "p");
    }
}

#[test]
fn privileged_p15_swapping_a_directory_for_a_link_gains_nothing() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    let victim = place.victim();
    let items: Vec<_> = (0..200)
        .flat_map(|n| [file(&format!("d/a{n}"), "1"), dir(&format!("d/s{n}")), file(&format!("d/s{n}/f"), "2")])
        .collect();
    let bytes = archive(&items);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let root = place.root();
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                let _ = fs::rename(root.join("d"), root.join("aside"));
                let _ = std::os::unix::fs::symlink(&victim, root.join("d"));
                let _ = fs::remove_file(root.join("d"));
                let _ = fs::rename(root.join("aside"), root.join("d"));
            }
        });
        for _ in 0..20 {
            // It may fail, and may put things into the directory that was moved aside.
            let _ = apply_archive(&place.root(), Merged, &bytes);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let names: Vec<_> = fs::read_dir(&victim).unwrap().map(|name| name.unwrap().file_name()).collect();
    assert_eq!(names, ["canary"]);
    assert_eq!(fs::read_to_string(format!("{victim}/canary")).unwrap(), "alive");
}

#[test]
fn privileged_p16_what_real_images_contain_works() {
    if skip_unprivileged() {
        return;
    }
    both(
        |_| {
            vec![
                dir("etc/dnf/"),
                file("etc/a", "a"),
                hard_link("etc/b", "/etc/a"),
                dir("run"),
                symlink("var/run", "/run"),
                file("var/run/act/HEAD", "h"),
                hard_link("head", "var/run/act/HEAD"),
            ]
        },
        &[
            "etc/",
            "etc/a=a",
            "etc/b==etc/a",
            "etc/dnf/",
            "head=h",
            "run/",
            "run/act/",
            "run/act/HEAD==head",
            "var/",
            "var/run->/run",
        ],
    );
}

#[test]
fn privileged_p16_a_merged_tree_is_entered_through_its_own_links() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    place.apply(Merged, &[dir("run").mtime(5), symlink("var/run", "/run")]).unwrap();
    place.apply(Merged, &[file("var/run/pid", "1")]).unwrap();
    assert_eq!(shape(&place.root()), ["run/", "run/pid=1", "var/", "var/run->/run"]);
    assert!(line(&place.root(), "run").contains(" 5.000000000 "), "keeps its time");
}

#[test]
fn privileged_p17_names_are_bytes() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    for (n, name) in
        [&b"\xff\xfe"[..], b"a\nb", b"\x1b[31m", "\u{202e}x".as_bytes(), "\u{2028}".as_bytes()].into_iter().enumerate()
    {
        let mut item = file("x", &n.to_string());
        item.entry.path = EntryPath::root().join(name);
        apply_archive(&place.root(), Merged, &archive(&[item])).unwrap();
        assert!(sys::stat_at(open(&place.root()).as_fd(), name).is_ok());
    }
    let error = refuse(&EntryPath::root().join(b"\x1b]0;owned\x07"), Refusal::BadMark);
    assert!(error.to_string().bytes().all(|byte| (0x20..0x7f).contains(&byte)), "{error}");
}

#[test]
fn privileged_w01_w02_w03_w04_impossible_marks_are_refused() {
    if skip_unprivileged() {
        return;
    }
    for style in BOTH {
        for name in [".wh...", "e/.wh...", "e/.wh..", "e/.wh.", ".wh.d/x"] {
            let place = Place::new();
            assert_eq!(refusal(place.apply(style, &[dir("e"), file(name, "")])), Refusal::BadMark, "{name}");
        }
    }
}

#[test]
fn privileged_w05_w06_marks_through_a_link_stay_in_the_root() {
    if skip_unprivileged() {
        return;
    }
    for style in BOTH {
        for mark in ["x/.wh.canary", "x/.wh..wh..opq"] {
            let place = Place::new();
            place.apply(style, &[symlink("x", &place.victim()), file(mark, "")]).unwrap();
        }
    }
}

#[test]
fn privileged_w07_a_whiteout_of_a_link_takes_the_link() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    place.apply(Merged, &[dir("victim"), file("victim/canary", "c"), symlink("x", "victim/canary")]).unwrap();
    place.apply(Merged, &[file(".wh.x", "")]).unwrap();
    assert_eq!(shape(&place.root()), ["victim/", "victim/canary=c"]);
}

/// Applies a layer in each style to a base in both orders, and expects the same tree four times.
#[track_caller]
fn over_base(base: &[Item], layer: &[Item], in_layer: &[&str], merged: &[&str]) {
    for reversed in [false, true] {
        let mut layer = layer.to_vec();
        if reversed {
            layer.reverse();
        }
        let place = Place::new();
        let (isolated, flat) = (place.root(), place.tree("flat"));
        place.apply(Layer, &layer).unwrap();
        assert_eq!(shape(&isolated), in_layer, "layer, reversed: {reversed}");
        apply_archive(&flat, Merged, &archive(base)).unwrap();
        apply_archive(&flat, Merged, &archive(&layer)).unwrap();
        assert_eq!(shape(&flat), merged, "merged, reversed: {reversed}");
        let lower = place.tree("lower");
        apply_archive(&lower, Layer, &archive(base)).unwrap();
        let mounted = format!("/proc/self/fd/{}", {
            use std::os::fd::IntoRawFd;
            overlay(&[&isolated, &lower]).into_raw_fd()
        });
        assert_eq!(shape(mounted.as_ref()), merged, "overlay, reversed: {reversed}");
    }
}

#[test]
fn privileged_w08_a_whiteout_never_hides_what_its_layer_adds() {
    if skip_unprivileged() {
        return;
    }
    over_base(
        &[file("a", "old"), file("b", "old")],
        &[file(".wh.a", ""), file("a", "new")],
        &["a=new"],
        &["a=new", "b=old"],
    );
}

#[test]
fn privileged_w08_a_whiteout_and_a_new_directory_of_the_name() {
    if skip_unprivileged() {
        return;
    }
    over_base(
        &[dir("d").mode(0o700), file("d/old", "1"), dir("d/s"), file("d/s/old", "1")],
        &[file(".wh.d", ""), file("d/s/new", "2")],
        &["d/ opaque", "d/s/", "d/s/new=2"],
        &["d/", "d/s/", "d/s/new=2"],
    );
}

#[test]
fn privileged_w08_a_directory_that_a_whiteout_made_new_is_explicit() {
    if skip_unprivileged() {
        return;
    }
    for items in [[file(".wh.d", ""), file("d/s/x", "1")], [file("d/s/x", "1"), file(".wh.d", "")]] {
        let place = Place::new();
        let applied = place.apply(Layer, &items).unwrap();
        assert_eq!(applied.index, [(EntryPath::root(), Implied::OnTheWay)].into_iter().collect());
        let flat = Place::new();
        flat.apply(Merged, &[dir("d").mode(0o1777).xattr("user.note", b"old"), dir("d/s").owner(7, 7)]).unwrap();
        flat.apply(Merged, &items).unwrap();
        for place in [place, flat] {
            for path in ["d", "d/s"] {
                let line = line(&place.root(), path);
                assert!(line.starts_with("Directory 755 0:0 0.000000000 \"\" []"), "{path}: {line}");
            }
        }
    }
}

#[test]
fn privileged_w09_opaque_hides_what_was_there_before_the_layer() {
    if skip_unprivileged() {
        return;
    }
    over_base(
        &[dir("d"), file("d/old", "1"), dir("d/s"), file("d/s/old", "1"), file("e", "1")],
        &[dir("d"), file("d/.wh..wh..opq", ""), file("d/new", "2"), file("d/s/new", "2")],
        &["d/ opaque", "d/new=2", "d/s/", "d/s/new=2"],
        &["d/", "d/new=2", "d/s/", "d/s/new=2", "e=1"],
    );
}

#[test]
fn privileged_w09_an_undescribed_opaque_directory_keeps_its_metadata_below() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    let applied = place.apply(Layer, &[file("d/.wh..wh..opq", "")]).unwrap();
    assert_eq!(
        applied.index,
        [EntryPath::root(), path("d")].map(|path| (path, Implied::OnTheWay)).into_iter().collect()
    );
    let place = Place::new();
    place.apply(Merged, &[dir("d").mode(0o1777), file("d/x", "1")]).unwrap();
    place.apply(Merged, &[file("d/.wh..wh..opq", "")]).unwrap();
    assert!(line(&place.root(), "d").starts_with("Directory 1777 0:0 1000000000.123456789"));
}

#[test]
fn privileged_w10_an_overlay_whiteout_in_an_archive_is_refused() {
    if skip_unprivileged() {
        return;
    }
    for style in BOTH {
        assert_eq!(refusal(Place::new().apply(style, &[char_device("w", 0, 0)])), Refusal::WhiteoutDevice);
    }
}

#[test]
fn privileged_w11_marks_are_empty_files_and_nothing_links_to_them() {
    if skip_unprivileged() {
        return;
    }
    for style in BOTH {
        for item in
            [file(".wh.x", "data"), dir(".wh.x"), symlink(".wh.x", "y"), hard_link(".wh.x", "a"), fifo(".wh..wh..opq")]
        {
            assert_eq!(refusal(Place::new().apply(style, &[file("a", ""), item])), Refusal::MarkWithContent);
        }
        let items = [file(".wh.x", ""), hard_link("h", ".wh.x")];
        assert_eq!(refusal(Place::new().apply(style, &items)), Refusal::LinkToMark);
        let items = [file(".wh.x", ""), hard_link("h", "x")];
        assert_eq!(refusal(Place::new().apply(style, &items)), Refusal::LinkToNothing);
    }
}

#[test]
fn privileged_marks_below_a_file_leave_the_file() {
    if skip_unprivileged() {
        return;
    }
    for mark in ["f/.wh.x", "f/.wh..wh..opq", "f/g/.wh.x"] {
        // In the same archive, ...
        both(|_| vec![file("f", "1"), file(mark, "")], &["f=1"]);
        // ... and below it. (By itself a layer does not know that there is a file.)
        let place = Place::new();
        place.apply(Merged, &[file("f", "1").owner(7, 7)]).unwrap();
        place.apply(Merged, &[file(mark, "")]).unwrap();
        assert_eq!(shape(&place.root()), ["f=1"], "{mark}");
        assert!(line(&place.root(), "f").contains(" 7:7 "), "{mark}");
    }
}

#[test]
fn privileged_marks_below_what_is_taken_away_ask_for_the_base() {
    if skip_unprivileged() {
        return;
    }
    for (items, at) in [
        (vec![file("a/.wh.x", ""), file(".wh.a", "")], "a"),
        (vec![file("a/.wh..wh..opq", ""), file(".wh.a", "")], "a"),
        (vec![file("a/f", "1"), file("a/b/.wh.x", ""), file(".wh.a", "")], "a/b"),
        (vec![file("d/a/.wh.x", ""), file("d/.wh..wh..opq", "")], "d/a"),
        (vec![file("d/a/.wh.x", ""), dir("d")], "d/a"),
    ] {
        match Place::new().apply(Layer, &items).unwrap_err() {
            ApplyError::NeedsBase { why: BaseNeed::Marks { dir }, .. } => assert_eq!(dir, path(at)),
            other => panic!("{items:?}: {other:?}"),
        }
        Place::new().apply(Merged, &items).unwrap();
    }
    // With anything else in it, or when it was taken away before, it is a directory whatever lies below.
    for (items, shown) in [
        (vec![file("a/f", "1"), file("a/.wh.x", ""), file(".wh.a", "")], &["a/", "a/f=1"][..]),
        (vec![file(".wh.a", ""), file("a/.wh.x", "")], &["a/"]),
        (vec![file(".wh.a", ""), file("a/.wh.x", ""), file(".wh.a", "")], &["a/"]),
        (vec![dir("a"), file("a/.wh.x", ""), file(".wh.a", "")], &["a/"]),
    ] {
        let place = Place::new();
        let (layer, merged) = (place.root(), place.tree("merged"));
        place.apply(Layer, &items).unwrap();
        apply_archive(&merged, Merged, &archive(&[file("a", "old")])).unwrap();
        let lower = place.tree("lower");
        copy(&merged, &lower);
        apply_archive(&merged, Merged, &archive(&items)).unwrap();
        assert_eq!(shape(&merged), shown, "{items:?}");
        let mounted = overlay(&[&layer, &lower]);
        assert_eq!(snapshot(&mounted).keys().skip(1).count(), shown.len(), "{items:?}");
    }
}

#[test]
fn privileged_what_is_added_to_a_tree_holds_no_marks() {
    if skip_unprivileged() {
        return;
    }
    for mark in [".wh.x", "d/.wh.x", ".wh..wh..opq", "d/.wh..wh..opq", ".wh..wh.aufs", ".wh..wh.plnk/x"] {
        let place = Place::new();
        place.apply(Merged, &[dir("d"), file("d/x", "1"), file("x", "1")]).unwrap();
        assert_eq!(
            refusal(place.apply(ApplyStyle::Added { owner: None }, &[file(mark, "")])),
            Refusal::Reserved,
            "{mark}"
        );
        assert_eq!(shape(&place.root()), ["d/", "d/x=1", "x=1"], "{mark}");
    }
    let place = Place::new();
    place.apply(ApplyStyle::Added { owner: None }, &[dir("d"), file("d/wh.x", "1"), file("d/x.wh.", "2")]).unwrap();
    assert_eq!(shape(&place.root()), ["d/", "d/wh.x=1", "d/x.wh.=2"]);
}

#[test]
fn privileged_w12_what_aufs_kept_for_itself_is_passed_over() {
    if skip_unprivileged() {
        return;
    }
    both(
        |_| vec![dir(".wh..wh.plnk"), file(".wh..wh.plnk/1.2", "x"), file(".wh..wh.aufs", ""), file("a", "1")],
        &["a=1"],
    );
    for style in BOTH {
        let items = [file(".wh..wh.plnk/1.2", "x"), hard_link("h", ".wh..wh.plnk/1.2")];
        assert_eq!(refusal(Place::new().apply(style, &items)), Refusal::LinkToMark);
    }
}

#[test]
fn privileged_w13_the_longest_name_can_be_taken_away() {
    if skip_unprivileged() {
        return;
    }
    let name = "n".repeat(255);
    let place = Place::new();
    place.apply(Merged, &[file(&name, "1")]).unwrap();
    place.apply(Merged, &[file(&format!(".wh.{name}"), "")]).unwrap();
    assert_eq!(shape(&place.root()), [""; 0]);
    let error = Place::new().apply(Merged, &[file(&format!(".wh.n{name}"), "")]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Limit);
}

#[test]
fn privileged_w14_what_cannot_be_deleted_is_an_error() {
    if skip_unprivileged() {
        return;
    }
    use rustix::fs::IFlags;
    let place = Place::new();
    place.apply(Merged, &[file("d/stays", "1"), file("stays", "1")]).unwrap();
    let held: Vec<_> = ["d/stays", "stays"].map(|path| open(&place.root().join(path))).into();
    let flag = |flags: IFlags| held.iter().all(|fd| rustix::fs::ioctl_setflags(fd, flags).is_ok());
    if !flag(IFlags::IMMUTABLE) {
        eprintln!("skipped: this file system has no immutable files");
        return;
    }
    let results = [".wh.d", ".wh.stays", ".wh..wh..opq"].map(|mark| place.apply(Merged, &[file(mark, "")]));
    let kept = shape(&place.root());
    assert!(flag(IFlags::empty()));
    assert_eq!(kept, ["d/", "d/stays=1", "stays=1"]);
    for result in results {
        assert!(matches!(result, Err(ApplyError::Io { .. })), "{result:?}");
    }
}

#[test]
fn privileged_l06_more_links_than_the_file_system_counts_are_refused() {
    if skip_unprivileged() {
        return;
    }
    // ext4 counts to 65,000; btrfs and XFS further, where this proves nothing.
    let place = Place::new();
    let mut applier = Applier::new(open(&place.root()).as_fd(), Layer, &Limits::default()).unwrap();
    applier.entry(&file("f", "").entry, &mut Bytes::default()).unwrap();
    for n in 0..70_000 {
        match applier.entry(&hard_link(&format!("d{}/{n}", n % 8), "f").entry, &mut Bytes::default()) {
            Ok(()) => {}
            Err(error) => {
                assert!(matches!(error, ApplyError::Refused { why: Refusal::HardLinksCount, .. }), "{error:?}");
                return;
            }
        }
    }
    eprintln!("skipped: this file system counts further");
}

/// Overlayfs lists the whiteouts of a directory that only one layer has, unless told of them.
#[test]
fn privileged_w13_a_whiteout_over_nothing_is_not_listed() {
    if skip_unprivileged() {
        return;
    }
    let items = [file("d/.wh.x", ""), file("e/.wh..wh..opq", ""), file("e/.wh.x", ""), file("f/y", "1")];
    over_base(&[dir("f")], &items, &["d/", "d/x!", "e/ opaque", "e/x!", "f/", "f/y=1"], &["d/", "e/", "f/", "f/y=1"]);
}

#[test]
fn privileged_w13_whiteouts_of_nothing_are_cheap_and_harmless() {
    if skip_unprivileged() {
        return;
    }
    let items: Vec<_> = (0..2_000).map(|n| file(&format!("d/.wh.{n}"), "")).collect();
    let place = Place::new();
    place.apply(Merged, &items).unwrap();
    assert_eq!(shape(&place.root()), ["d/"]);
    let place = Place::new();
    let applied = place.apply(Layer, &items).unwrap();
    assert_eq!(applied.usage.inodes, 2_002);
}

#[test]
fn privileged_l01_l02_hard_links_reach_nothing_outside() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    let victim = place.victim();
    let items = [hard_link("h", &format!("{victim}/canary")), file("h", "overwritten")];
    let error = place.apply(Layer, &items).unwrap_err();
    assert!(matches!(error, ApplyError::NeedsBase { .. }), "{error:?}");
    assert_eq!(refusal(place.apply(Merged, &items)), Refusal::LinkToNothing);
    let items = [symlink("x", &victim), hard_link("h", "x/canary")];
    assert_eq!(refusal(place.apply(Merged, &items)), Refusal::LinkToNothing);
}

#[test]
fn privileged_l03_a_hard_link_to_a_link_is_a_link() {
    if skip_unprivileged() {
        return;
    }
    for style in BOTH {
        let place = Place::new();
        let target = format!("{}/canary", place.victim());
        place.apply(style, &[symlink("s", &target), hard_link("h", "s").mode(0o6777).owner(3, 4)]).unwrap();
        assert_eq!(shape(&place.root()), [format!("h->{target}"), "s==h".to_owned()]);
        let meta = fs::symlink_metadata(place.root().join("s")).unwrap();
        assert_eq!((meta.uid(), meta.gid(), meta.nlink()), (3, 4, 2));
    }
}

#[test]
fn privileged_l04_strange_hard_links_are_refused() {
    if skip_unprivileged() {
        return;
    }
    for style in BOTH {
        let refused = |items: &[Item]| refusal(Place::new().apply(style, items));
        assert_eq!(refused(&[dir("d"), hard_link("h", "d")]), Refusal::LinkToDirectory);
        assert_eq!(refused(&[file("h", "1"), hard_link("h", "h")]), Refusal::LinkToSelf);
        assert_eq!(refused(&[file("d/x", "1"), hard_link("d", "d/x")]), Refusal::LinkToNothing);
    }
    let later = [hard_link("h", "later"), file("later", "1")];
    assert_eq!(refusal(Place::new().apply(Merged, &later)), Refusal::LinkToNothing);
}

#[test]
fn privileged_l04_a_hard_link_into_a_lower_layer_asks_for_it() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    let layer = [hard_link("usr/h", "etc/a").mode(0o600)];
    let error = place.apply(Layer, &layer).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FailedPrecondition);
    match error {
        ApplyError::NeedsBase { path: at, why: BaseNeed::LinkTarget { target } } => {
            assert_eq!((at, target), (path("usr/h"), path("etc/a")));
        }
        other => panic!("{other:?}"),
    }

    let (base, upper, work) = (place.tree("base"), place.tree("upper"), place.tree("work"));
    apply_archive(&base, Layer, &archive(&[dir("etc"), file("etc/a", "a").mode(0o600), dir("usr")])).unwrap();
    let mounted = overlay_on(&upper, &work, &base);
    let limits = Limits::default();
    let bytes = archive(&layer);
    apply(&mut Reader::new(bytes.as_slice(), &limits), mounted.as_fd(), Merged, &limits).unwrap();
    drop(mounted);
    let sealed = crate::seal_upper(open(&upper).as_fd(), Some(open(&base).as_fd())).unwrap();
    assert_eq!(shape(&upper), ["etc/", "etc/a=a", "usr/", "usr/h==etc/a"]);
    assert_eq!(
        sealed.index,
        [path("etc"), path("usr")].map(|path| (path, Implied::CopiedUp)).into_iter().collect(),
        "they kept their times"
    );
}

#[test]
fn privileged_l05_the_last_entry_says_what_a_file_is_like() {
    if skip_unprivileged() {
        return;
    }
    for style in BOTH {
        let place = Place::new();
        let items = [file("a", "1"), hard_link("b", "a").mode(0o4755).owner(3, 4).mtime(9).xattr("user.note", b"b")];
        place.apply(style, &items).unwrap();
        let line = line(&place.root(), "a");
        assert!(line.starts_with("File 4755 3:4 9.000000000 \"1\" [\"user.note=b\"]"), "{line}");
    }
}

#[test]
fn privileged_m01_m02_m03_foreign_attributes_are_left_out() {
    if skip_unprivileged() {
        return;
    }
    let mut capability = vec![1, 0, 0, 2];
    capability.extend([0; 16]);
    for style in BOTH {
        let place = Place::new();
        let applied = place
            .apply(
                style,
                &[
                    dir("d")
                        .xattr("trusted.overlay.opaque", b"y")
                        .xattr("trusted.overlay.redirect", b"/etc")
                        .xattr("user.overlay.opaque", b"y")
                        .xattr("user.kept", b"1"),
                    file("ping", "x").owner(5, 5).mode(0o755).xattr("security.capability", &capability),
                    file("bad", "x").xattr("security.capability", b"nonsense"),
                    file("mac", "x").xattr("com.apple.provenance", b"1").xattr("security.selinux", b"1"),
                    symlink("link", "x").xattr("user.note", b"1"),
                    fifo("fifo").xattr("user.note", b"1"),
                ],
            )
            .unwrap();
        assert_eq!(applied.xattrs_left_out, 8);
        let seen = |path: &str| Subject::At(open(&place.root()).as_fd(), path.as_bytes()).list().unwrap();
        assert_eq!(seen("d"), b"user.kept\0");
        assert_eq!(seen("ping"), b"security.capability\0", "set after the owner, who drops it");
        for path in ["bad", "mac", "link", "fifo"] {
            assert_eq!(seen(path), b"", "{path}");
        }
    }
}

#[test]
fn privileged_m05_devices_are_made_with_their_numbers() {
    if skip_unprivileged() {
        return;
    }
    let mut block = char_device("sda", 8, 0).mode(0o660).owner(0, 6);
    block.entry.kind = EntryKind::BlockDevice(Device { major: 8, minor: 0 });
    for style in BOTH {
        let place = Place::new();
        place.apply(style, &[char_device("null", 1, 3).mode(0o666), block.clone(), fifo("p").mode(0o4622)]).unwrap();
        assert!(
            line(&place.root(), "null").starts_with("CharDevice(Device { major: 1, minor: 3 }) 666 0:0 1000000000.1")
        );
        assert!(line(&place.root(), "sda").starts_with("BlockDevice(Device { major: 8, minor: 0 }) 660 0:6"));
        assert!(line(&place.root(), "p").starts_with("Fifo 4622 0:0"));
    }
}

#[test]
fn privileged_m06_no_owner_is_refused() {
    if skip_unprivileged() {
        return;
    }
    for item in [file("f", "").mode(0o6755).owner(u32::MAX, 0), dir("d").owner(0, u32::MAX)] {
        let place = Place::new();
        let mut applier = Applier::new(open(&place.root()).as_fd(), Layer, &Limits::default()).unwrap();
        let error = applier.entry(&item.entry, &mut Bytes::default()).unwrap_err();
        assert!(matches!(error, ApplyError::Refused { why: Refusal::NoOwner, .. }), "{error:?}");
    }
    let place = Place::new();
    place.apply(Layer, &[file("f", "").mode(0o6755).owner((1 << 31) - 1, 1 << 30)]).unwrap();
    assert!(line(&place.root(), "f").starts_with("File 6755 2147483647:1073741824"));
}

#[test]
fn privileged_m07_setuid_survives_the_change_of_owner() {
    if skip_unprivileged() {
        return;
    }
    for style in BOTH {
        for mode in [0, 0o7, 0o200, 0o4755, 0o2755, 0o6755, 0o7777, 0o1644] {
            let place = Place::new();
            place
                .apply(
                    style,
                    &[file("f", "data").mode(mode).owner(5, 6), dir("d").mode(mode).owner(5, 6), file("d/x", "")],
                )
                .unwrap();
            for path in ["f", "d"] {
                let meta = fs::metadata(place.root().join(path)).unwrap();
                assert_eq!((meta.mode() & 0o7777, meta.uid(), meta.gid()), (mode, 5, 6), "{path}");
            }
        }
    }
}

#[test]
fn privileged_m07_a_setgid_directory_hands_nothing_on() {
    if skip_unprivileged() {
        return;
    }
    let acl = {
        // Version 2; owner, user 7, group, mask, others: include/uapi/linux/posix_acl_xattr.h.
        let mut acl = 2_u32.to_le_bytes().to_vec();
        for (tag, perm, id) in
            [(1_u16, 7_u16, u32::MAX), (2, 7, 7), (4, 7, u32::MAX), (16, 7, u32::MAX), (32, 5, u32::MAX)]
        {
            acl.extend(tag.to_le_bytes());
            acl.extend(perm.to_le_bytes());
            acl.extend(id.to_le_bytes());
        }
        acl
    };
    for style in BOTH {
        let place = Place::new();
        let items = [
            dir("d").mode(0o2755).owner(0, 50).xattr("system.posix_acl_default", &acl),
            file("d/f", "1"),
            dir("d/s"),
            file("d/i/f", "1"),
            symlink("d/l", "f"),
            fifo("d/p"),
        ];
        place.apply(style, &items).unwrap();
        assert!(line(&place.root(), "d").contains("posix_acl_default"));
        for (path, expected) in [
            ("d/f", "File 644 0:0 "),
            ("d/s", "Directory 755 0:0 "),
            ("d/i", "Directory 755 0:0 "),
            ("d/i/f", "File 644 0:0 "),
            ("d/l", "Symlink 777 0:0 "),
            ("d/p", "Fifo 644 0:0 "),
        ] {
            let line = line(&place.root(), path);
            assert!(line.starts_with(expected) && line.contains(" [] "), "{style:?} {path}: {line}");
        }
    }
}

#[test]
fn privileged_m08_a_file_as_parent_becomes_a_plain_directory() {
    if skip_unprivileged() {
        return;
    }
    for style in BOTH {
        let place = Place::new();
        place.apply(style, &[file("f", "1").mode(0o6755).owner(1, 1), file("f/x", "2")]).unwrap();
        assert!(line(&place.root(), "f").starts_with("Directory 755 0:0 0.0"));
    }
}

#[test]
fn privileged_m09_times_are_exact_or_clamped() {
    if skip_unprivileged() {
        return;
    }
    for style in BOTH {
        let place = Place::new();
        place
            .apply(
                style,
                &[
                    dir("d").mtime(-5),
                    file("d/f", "1").mtime(-1),
                    symlink("d/l", "x"),
                    file("d/far", "").mtime(1 << 40),
                ],
            )
            .unwrap();
        assert!(line(&place.root(), "d").contains(" -5.000000000 "), "set after its contents");
        assert!(line(&place.root(), "d/f").contains(" -1.000000000 "));
        assert!(line(&place.root(), "d/l").contains(" 1000000000.123456789 "));
    }
}

#[test]
fn privileged_m10_a_fifo_is_replaced_without_being_opened() {
    if skip_unprivileged() {
        return;
    }
    both(|_| vec![fifo("p"), file("p", "1"), char_device("c", 1, 3), file("c", "2")], &["c=2", "p=1"]);
}

#[test]
fn privileged_t16_the_last_of_equal_names_wins_whatever_its_type() {
    if skip_unprivileged() {
        return;
    }
    type Make = fn() -> Vec<Item>;
    let kinds: [(&str, Make, &[&str]); 5] = [
        ("file", || vec![file("n", "1")], &["n=1"]),
        ("directory", || vec![dir("n"), file("n/x", "1")], &["n/", "n/x=1"]),
        ("symlink", || vec![symlink("n", "t")], &["n->t"]),
        ("fifo", || vec![fifo("n")], &["n Fifo"]),
        ("hard link", || vec![hard_link("n", "other")], &["n=o"]),
    ];
    for style in BOTH {
        for (first, make_first, _) in kinds {
            for (last, make_last, expected) in kinds {
                let place = Place::new();
                let items: Vec<_> = [file("other", "o")].into_iter().chain(make_first()).chain(make_last()).collect();
                let applied = place.apply(style, &items).unwrap();
                let seen: Vec<_> = shape(&place.root())
                    .into_iter()
                    .map(|line| line.replace(" opaque", ""))
                    .filter(|line| !line.starts_with("other"))
                    .collect();
                assert_eq!(seen, expected, "{style:?}: {first}, then {last}");
                if style == Layer {
                    assert_eq!(applied.usage, measured(&place), "{first}, then {last}");
                }
            }
        }
    }
}

fn measured(place: &Place) -> Usage {
    tree::measure(open(&place.root()).as_fd()).unwrap()
}

#[test]
fn privileged_t16_a_directory_after_a_file_hides_what_is_below_in_both_styles() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    place.apply(Layer, &[file("d", "1"), dir("d")]).unwrap();
    assert_eq!(shape(&place.root()), ["d/ opaque"]);
    let place = Place::new();
    place.apply(Merged, &[dir("d"), file("d/old", "1")]).unwrap();
    place.apply(Merged, &[file("d", "1"), dir("d")]).unwrap();
    assert_eq!(shape(&place.root()), ["d/"]);
}

#[test]
fn privileged_t17_many_entries_of_one_name_leave_one_file() {
    if skip_unprivileged() {
        return;
    }
    let items: Vec<_> = (0..3_000).map(|n| file("x", &n.to_string())).collect();
    let place = Place::new();
    let applied = place.apply(Layer, &items).unwrap();
    assert_eq!(shape(&place.root()), ["x=2999"]);
    assert_eq!((applied.usage.inodes, applied.usage.content_bytes, applied.entries), (2, 4, 3_000));
}

/// The first trap of the layer model.
#[test]
fn privileged_a_directory_that_a_layer_does_not_describe_keeps_what_the_base_said() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    let (layer, base, flat) = (place.root(), place.tree("base"), place.tree("flat"));
    let base_items = [dir("tmp").mode(0o1777).owner(0, 9).xattr("user.note", b"base")];
    apply_archive(&base, Layer, &archive(&base_items)).unwrap();
    let applied = place.apply(Layer, &[file("tmp/x", "1")]).unwrap();
    assert!(applied.index.is_implied(&path("tmp")));
    assert!(line(&layer, "tmp").starts_with("Directory 755 0:0 0.000000000"), "by itself it says nothing");
    fix_up(&layer, applied.index.implied().cloned(), &base);

    apply_archive(&flat, Merged, &archive(&base_items)).unwrap();
    apply_archive(&flat, Merged, &archive(&[file("tmp/x", "1")])).unwrap();
    let mounted = snapshot(overlay(&[&layer, &base]));
    assert!(mounted["tmp"].starts_with("Directory 1777 0:9 1000000000.123456789 \"\" [\"user.note=base\"]"));
    assert_eq!(mounted["tmp"], line(&flat, "tmp"));
}

#[test]
fn privileged_an_explicit_directory_takes_nothing_over_from_the_base() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    place.apply(Merged, &[dir("d").xattr("user.old", b"1"), file("d/x", "1")]).unwrap();
    place.apply(Merged, &[dir("d").mode(0o700).xattr("user.new", b"2")]).unwrap();
    assert!(line(&place.root(), "d").contains("[\"user.new=2\"]"));
    assert_eq!(shape(&place.root()), ["d/", "d/x=1"]);
}

#[test]
fn privileged_a_layer_is_the_same_whenever_it_is_applied() {
    if skip_unprivileged() {
        return;
    }
    let items =
        [file("a/b/c", "1"), dir("a"), symlink("l", "a"), file("gone/.wh.x", ""), hard_link("h", "a/b/c").mode(0o644)];
    let [one, two] = [0, 1].map(|_| {
        let place = Place::new();
        fs::set_permissions(place.root(), fs::Permissions::from_mode(0o2700)).unwrap();
        let applied = place.apply(Layer, &items).unwrap();
        assert_eq!(applied.index, ["", "a/b", "gone"].map(|raw| (path(raw), Implied::OnTheWay)).into_iter().collect());
        assert_eq!(applied.usage, measured(&place));
        assert_eq!(applied.entries, 5);
        let mut seen = snapshot(open(&place.root()));
        // A mark's own time means nothing and goes nowhere.
        seen.remove("gone/x").unwrap();
        seen
    });
    assert_eq!(one, two);
    assert!(one[""].starts_with("Directory 755 0:0 0.000000000"));
}

#[test]
fn privileged_a_layer_needs_an_empty_directory() {
    if skip_unprivileged() {
        return;
    }
    let place = Place::new();
    fs::write(place.root().join("left over"), "").unwrap();
    assert!(matches!(place.apply(Layer, &[]), Err(ApplyError::NotEmpty)));
}

/// Data that is not in an archive.
#[derive(Default)]
struct Bytes {
    bytes: Vec<u8>,
    at: usize,
    /// At most this many at a time.
    step: usize,
}

impl Data for Bytes {
    fn chunk(&mut self) -> Result<&[u8], TarError> {
        Ok(&self.bytes[self.at..self.bytes.len().min(self.at + self.step)])
    }

    fn consume(&mut self, n: usize) {
        self.at += n;
    }
}

#[test]
fn privileged_b05_holes_stay_holes() {
    if skip_unprivileged() {
        return;
    }
    let mut item = file("sparse", "");
    let runs = vec![SparseRun { offset: 8192, length: 3 }, SparseRun { offset: 1 << 30, length: 4 }];
    item.entry.kind = EntryKind::File { size_bytes: (1 << 30) + 4096, sparse: Some(runs) };
    let place = Place::new();
    let mut applier = Applier::new(open(&place.root()).as_fd(), Layer, &Limits::default()).unwrap();
    applier.entry(&item.entry, &mut Bytes { bytes: b"abcdefg".to_vec(), at: 0, step: 2 }).unwrap();
    let applied = applier.finish().unwrap();
    let meta = fs::metadata(place.root().join("sparse")).unwrap();
    assert_eq!(meta.len(), (1 << 30) + 4096);
    assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
    assert_eq!(applied.usage.content_bytes, (1 << 30) + 4096);
    use std::os::unix::fs::FileExt;
    let on_disk = fs::File::open(place.root().join("sparse")).unwrap();
    for (offset, expected) in [(8191, b"\0abc\0"), ((1 << 30) - 1, b"\0defg")] {
        let mut seen = [1; 5];
        on_disk.read_exact_at(&mut seen, offset).unwrap();
        assert_eq!(&seen, expected);
    }
}

#[test]
fn privileged_data_of_the_wrong_length_is_refused() {
    if skip_unprivileged() {
        return;
    }
    for length in [2, 4] {
        let place = Place::new();
        let mut applier = Applier::new(open(&place.root()).as_fd(), Layer, &Limits::default()).unwrap();
        let data = &mut Bytes { bytes: vec![1; length], at: 0, step: 9 };
        let error = applier.entry(&file("f", "123").entry, data).unwrap_err();
        assert!(matches!(error, ApplyError::Refused { why: Refusal::DataLength, .. }), "{error:?}");
    }
}

#[test]
fn privileged_displaced_content_is_told_to_the_recorder() {
    if skip_unprivileged() {
        return;
    }
    let displaced = |items: &[Item]| {
        let place = Place::new();
        let mut applier = Applier::new(open(&place.root()).as_fd(), Layer, &Limits::default()).unwrap();
        let found = items.iter().find_map(|item| {
            applier.entry(&item.entry, &mut Bytes { bytes: item.data.clone(), at: 0, step: 9 }).unwrap();
            applier.dirs.take_displaced()
        });
        // Told beforehand, nothing goes.
        let place = Place::new();
        let mut applier = Applier::new(open(&place.root()).as_fd(), Layer, &Limits::default()).unwrap();
        applier.dirs.tell_before_displacing(true);
        let told = items.iter().find_map(|item| {
            match applier.entry(&item.entry, &mut Bytes { bytes: item.data.clone(), at: 0, step: 9 }) {
                Err(ApplyError::Displaces { path }) => Some(path),
                result => result.map(|()| None).unwrap(),
            }
        });
        assert_eq!(told, found);
        assert_eq!(applier.dirs.take_displaced(), None);
        found
    };
    let replaced = |raw: &str| Some(path(raw));
    assert_eq!(displaced(&[file("a", "1"), dir("a")]), replaced("a"));
    assert_eq!(displaced(&[file("a", "1"), file("a/b", "1")]), replaced("a"));
    assert_eq!(displaced(&[file("d/a", "1"), symlink("d", "e")]), replaced("d"));
    // The path that the archive used no longer leads to the file.
    assert_eq!(displaced(&[symlink("l", "/"), file("l/a", "1"), dir("l")]), replaced("l"));
    assert_eq!(displaced(&[symlink("l", "/"), dir("l"), file("a", "1")]), None);
    assert_eq!(displaced(&[file("a", ""), fifo("a"), file("a", "1"), hard_link("b", "a")]), None);
    assert_eq!(displaced(&[file(".wh..wh.plnk/1", "1")]), None);
}
