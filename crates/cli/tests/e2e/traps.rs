//! Layers that catch engines which take a layer for a plain archive.

use plies_testkit::{
    args,
    image::{Image, Packing},
    tar::Member,
    tree::Tree,
};

use crate::common::{Context, load, store, tree_of};

#[test]
fn a_layer_that_only_implies_tmp_leaves_it_1777() {
    let Some(ply) = store() else { return };
    let base = [Member::dir("tmp").mode(0o1777).owner(0, 20).mtime(1_111_111_111, 5).xattr("user.k", "v")];
    load(
        &ply,
        &Image::new("localhost/trap:1")
            .layer(&base, Packing::Plain)
            .layer(&[Member::file("tmp/x", "x")], Packing::Plain)
            .layer(&[Member::file("tmp/y", "y")], Packing::Plain),
    );
    let tree = tree_of(&ply, "localhost/trap:1");
    let tmp = tree.get("tmp");
    assert_eq!((tmp.mode, tmp.gid, tmp.mtime), (0o1777, 20, (1_111_111_111, 5)));
    assert_eq!(tmp.xattrs["user.k"], b"v");
    assert!(tree.find("tmp/x").is_some() && tree.find("tmp/y").is_some());
}

#[test]
fn a_layer_that_sets_tmp_is_obeyed() {
    let Some(ply) = store() else { return };
    load(
        &ply,
        &Image::new("localhost/trap:1")
            .layer(&[Member::dir("tmp").mode(0o1777)], Packing::Plain)
            .layer(&[Member::dir("tmp").mode(0o700).owner(5, 5), Member::file("tmp/x", "x")], Packing::Plain),
    );
    let tree = tree_of(&ply, "localhost/trap:1");
    assert_eq!((tree.get("tmp").mode, tree.get("tmp").uid), (0o700, 5));
}

#[test]
fn one_implying_layer_under_two_bases_takes_the_directory_of_each() {
    let Some(ply) = store() else { return };
    let implying = [Member::file("d/x", "x")];
    for (tag, mode) in [("localhost/one:1", 0o1777), ("localhost/two:1", 0o750)] {
        let base = [Member::dir("d").mode(mode)];
        load(&ply, &Image::new(tag).layer(&base, Packing::Plain).layer(&implying, Packing::Plain));
    }
    assert_eq!(tree_of(&ply, "localhost/one:1").get("d").mode, 0o1777);
    assert_eq!(tree_of(&ply, "localhost/two:1").get("d").mode, 0o750);
}

#[test]
fn a_hard_link_to_a_file_of_a_lower_layer_is_the_same_file() {
    let Some(ply) = store() else { return };
    let base = [Member::dir("d"), Member::file("d/f", "content").mode(0o4711).owner(3, 4).xattr("user.k", "v")];
    load(
        &ply,
        &Image::new("localhost/trap:1")
            .layer(&base, Packing::Gzip)
            .layer(&[Member::hard_link("linked", "d/f").mode(0o4711).owner(3, 4)], Packing::Gzip)
            .layer(&[Member::hard_link("d/again", "/linked").mode(0o4711).owner(3, 4)], Packing::Gzip),
    );
    let tree = tree_of(&ply, "localhost/trap:1");
    for name in ["d/f", "linked", "d/again"] {
        let node = tree.get(name);
        assert_eq!((node.size_bytes, node.mode, node.uid), (7, 0o4711, 3), "{name}");
        assert_eq!(node.xattrs["user.k"], b"v", "{name}");
        assert_eq!(node.sha256, tree.get("d/f").sha256, "{name}");
    }
}

#[test]
fn a_lower_hard_link_takes_the_file_of_the_base_it_stands_on() {
    let Some(ply) = store() else { return };
    let linking = [Member::hard_link("link", "f")];
    for (tag, content) in [("localhost/one:1", "one"), ("localhost/two:1", "three")] {
        let base = [Member::file("f", content)];
        load(&ply, &Image::new(tag).layer(&base, Packing::Plain).layer(&linking, Packing::Plain));
    }
    assert_eq!(tree_of(&ply, "localhost/one:1").get("link").size_bytes, 3);
    assert_eq!(tree_of(&ply, "localhost/two:1").get("link").size_bytes, 5);
}

#[test]
fn an_implied_directory_follows_a_symlink_of_a_lower_layer() {
    let Some(ply) = store() else { return };
    let base = [Member::dir("run").mode(0o711), Member::dir("var"), Member::symlink("var/run", "/run")];
    load(
        &ply,
        &Image::new("localhost/trap:1").layer(&base, Packing::Plain).layer(
            &[Member::file("var/run/act/head", "x"), Member::hard_link("var/run/twin", "var/run/act/head")],
            Packing::Plain,
        ),
    );
    let tree = tree_of(&ply, "localhost/trap:1");
    assert_eq!(tree.get("var/run").target.as_deref(), Some("/run"), "the link stays");
    assert_eq!(tree.get("run/act/head").names, ["run/act/head", "run/twin"]);
    assert_eq!(tree.get("run").mode, 0o711);
}

#[test]
fn a_listed_directory_replaces_a_symlink_of_a_lower_layer() {
    let Some(ply) = store() else { return };
    let base = [Member::dir("real").mode(0o700), Member::file("real/f", ""), Member::symlink("d", "real")];
    load(
        &ply,
        &Image::new("localhost/trap:1")
            .layer(&base, Packing::Plain)
            .layer(&[Member::dir("d").mode(0o755), Member::file("d/g", "")], Packing::Plain),
    );
    let tree = tree_of(&ply, "localhost/trap:1");
    assert_eq!((tree.get("d").kind, tree.get("real").mode), ("dir", 0o700));
    assert!(tree.find("d/g").is_some() && tree.find("d/f").is_none() && tree.find("real/g").is_none());
}

#[test]
fn whiteouts_hide_only_what_lies_below_them() {
    let Some(ply) = store() else { return };
    load(
        &ply,
        &Image::new("localhost/trap:1")
            .layer(&[Member::dir("d"), Member::file("d/a", "old"), Member::file("d/b", "old")], Packing::Plain)
            // The mark stands after what it must not hide, and hides a name that never was.
            .layer(&[Member::file("d/a", "new"), Member::opaque("d"), Member::whiteout("d/never")], Packing::Plain)
            .layer(&[Member::whiteout("d"), Member::file("e", "")], Packing::Plain)
            .layer(&[Member::file("d/c", "again")], Packing::Plain),
    );
    let tree = tree_of(&ply, "localhost/trap:1");
    assert_eq!(tree.names().collect::<Vec<_>>(), ["", "d", "d/c", "e"]);
}

#[test]
fn an_opaque_directory_keeps_what_its_own_layer_lists() {
    let Some(ply) = store() else { return };
    load(
        &ply,
        &Image::new("localhost/trap:1")
            .layer(&[Member::dir("d"), Member::file("d/a", "old"), Member::file("d/b", "old")], Packing::Plain)
            .layer(&[Member::file("d/a", "new"), Member::opaque("d")], Packing::Plain),
    );
    let tree = tree_of(&ply, "localhost/trap:1");
    assert_eq!(tree.names().collect::<Vec<_>>(), ["", "d", "d/a"]);
    assert_eq!(tree.get("d/a").size_bytes, 3);
}

#[test]
fn a_directory_that_is_only_emptied_stays_as_private_as_it_was() {
    let Some(ply) = store() else { return };
    load(
        &ply,
        &Image::new("localhost/trap:1")
            .layer(&[Member::dir("secret").mode(0o700).owner(7, 8), Member::file("secret/k", "key")], Packing::Plain)
            .layer(&[Member::opaque("secret")], Packing::Plain),
    );
    let tree = tree_of(&ply, "localhost/trap:1");
    assert_eq!(tree.names().collect::<Vec<_>>(), ["", "secret"]);
    let secret = tree.get("secret");
    assert_eq!((secret.mode, secret.uid, secret.gid), (0o700, 7, 8));
}

#[test]
fn marks_below_a_file_leave_the_file() {
    let Some(ply) = store() else { return };
    let base = [Member::file("f", "content"), Member::file("g", "content")];
    for (n, marks) in [[Member::whiteout("f/x"), Member::whiteout("g/x/y")], [Member::opaque("f"), Member::opaque("g")]]
        .iter()
        .enumerate()
    {
        let name = format!("localhost/trap:{n}");
        let image = Image::new(&name).layer(&base, Packing::Plain).layer(marks, Packing::Plain);
        // In the archive of the file itself as well.
        load(&ply, &image.layer(&[&[Member::file("h", "")], &[Member::whiteout("h/x")][..]].concat(), Packing::Plain));
        let tree = tree_of(&ply, &name);
        assert_eq!(tree.names().collect::<Vec<_>>(), ["", "f", "g", "h"], "{n}");
        for name in ["f", "g", "h"] {
            assert_eq!(tree.get(name).kind, "file", "{n}: {name}");
        }
        assert_eq!(tree.get("f").size_bytes, 7, "{n}");
    }
}

#[test]
fn overlay_marks_in_an_archive_have_no_power() {
    let Some(ply) = store() else { return };
    load(
        &ply,
        &Image::new("localhost/trap:1")
            .layer(
                &[Member::dir("d"), Member::file("d/a", ""), Member::dir("secret"), Member::file("secret/s", "")],
                Packing::Plain,
            )
            .layer(
                &[
                    Member::dir("d").xattr("trusted.overlay.opaque", "y"),
                    Member::dir("e").xattr("trusted.overlay.redirect", "/secret"),
                    Member::dir("f").xattr("user.overlay.opaque", "y"),
                ],
                Packing::Plain,
            ),
    );
    let tree = tree_of(&ply, "localhost/trap:1");
    assert!(tree.find("d/a").is_some(), "a name was hidden by an attribute");
    assert!(tree.find("e/s").is_none(), "a directory was redirected by an attribute");
}

#[test]
fn a_layer_used_twice_in_one_image_counts_where_it_comes_last() {
    let Some(ply) = store() else { return };
    let twice = [Member::file("f", "twice")];
    load(
        &ply,
        &Image::new("localhost/trap:1")
            .layer(&twice, Packing::Plain)
            .layer(&[Member::file("f", "between"), Member::file("g", "")], Packing::Plain)
            .layer(&twice, Packing::Plain),
    );
    let tree = tree_of(&ply, "localhost/trap:1");
    assert_eq!(tree.get("f").size_bytes, 5);
    assert!(tree.find("g").is_some());
}

#[test]
fn three_hundred_layers_are_mounted_and_built_upon() {
    let Some(ply) = store() else { return };
    let mut image = Image::new("localhost/deep:1");
    for n in 0..300 {
        let members = [
            Member::dir("d").mode(0o755).mtime(1_500_000_000 + n, 0),
            Member::file(format!("d/{n:03}"), format!("layer {n}")),
            Member::file("last", n.to_string()),
            Member::whiteout(format!("d/{:03}", (n - 7).max(0))),
        ];
        let first = if n < 7 { 3 } else { 4 };
        image = image.layer(&members[..first], Packing::Plain);
    }
    load(&ply, &image);
    let expected: Vec<String> = ["", "d"]
        .into_iter()
        .map(str::to_owned)
        .chain((293..300).map(|n| format!("d/{n:03}")))
        .chain(["last".to_owned()])
        .collect();
    let tree = tree_of(&ply, image.tag());
    assert_eq!(tree.names().collect::<Vec<_>>(), expected);
    assert_eq!((tree.get("last").size_bytes, tree.get("d").mtime.0), (3, 1_500_000_299));

    let context = Context::new(&ply, "FROM localhost/deep:1\nCOPY new d/new\nCOPY new d/299\n");
    context.file("new", "built upon");
    context.build(&[]);
    let tree = tree_of(&ply, "built:latest");
    assert_eq!((tree.get("d/new").size_bytes, tree.get("d/299").size_bytes, tree.get("d/298").size_bytes), (10, 10, 9));

    ply.ok(args!["save", "--format", "oci-dir", "-o", ply.scratch().join("out"), image.tag()]);
    assert!(plies_testkit::image::blobs_of(&ply.scratch().join("out")) == image.blobs());
}

#[test]
fn an_image_without_layers_is_an_empty_tree() {
    let Some(ply) = store() else { return };
    load(&ply, &Image::new("localhost/empty:1"));
    let tree = tree_of(&ply, "localhost/empty:1");
    assert_eq!(tree.names().collect::<Vec<_>>(), [""]);
}

#[test]
fn what_is_written_in_a_writable_mount_stays_out_of_the_image() {
    let Some(ply) = store() else { return };
    load(&ply, &Image::new("localhost/image:1").layer(&[Member::file("f", "as it was")], Packing::Plain));
    let before = tree_of(&ply, "localhost/image:1");
    {
        let mounted = ply.mount_with("localhost/image:1", args!["--rw"]);
        std::fs::write(mounted.path().join("f"), "changed").unwrap();
        std::fs::write(mounted.path().join("g"), "new").unwrap();
        assert_eq!(Tree::of(mounted.path()).get("f").size_bytes, 7);
    }
    tree_of(&ply, "localhost/image:1").assert_same(&before, "after a writable mount");
}

#[test]
fn a_read_only_mount_refuses_writes() {
    let Some(ply) = store() else { return };
    load(&ply, &Image::new("localhost/image:1").layer(&[Member::file("f", "")], Packing::Plain));
    let mounted = ply.mount("localhost/image:1");
    let error = std::fs::write(mounted.path().join("g"), "").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
}
