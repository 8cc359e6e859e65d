//! `ply layer`, and `ply build --cache-from`: layers and images as docker's classic engine has them.

use std::{
    fs,
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use plies_testkit::{
    args,
    image::{Image, Packing},
    kill::{self, KillPoint, Outcome},
    ply::{Ply, Ran},
    sha256_hex,
    tar::{Member, archive},
    tools,
    tree::Tree,
};
use serde_json::json;

use crate::common::{Context, Shape, State, Step, busybox, everything, load, store, tree_of};

fn chain_of(ran: &Ran) -> String {
    let chain = ran.stdout.trim().to_owned();
    assert!(chain.starts_with("sha256:") && chain.len() == 71, "{ran}");
    chain
}

/// Registers a tar from a pipe.
#[track_caller]
fn register(ply: &Ply, tar: &[u8], parent: Option<&str>) -> String {
    let path = ply.scratch().file("register.tar", tar);
    let parent = parent.map_or(vec![], |parent| args!["--parent", parent].to_vec());
    let mut command = ply.command(&[args!["layer", "register"], &parent].concat());
    let ran = Ran::of(command.stdin(fs::File::open(path).unwrap()));
    assert!(ran.status.success(), "{ran}");
    chain_of(&ran)
}

fn export(ply: &Ply, chain: &str) -> Vec<u8> {
    let out = ply.scratch().join("export.tar");
    ply.ok(args!["layer", "export", chain, "-o", out]);
    fs::read(out).unwrap()
}

fn small(n: usize) -> Vec<u8> {
    archive(&[Member::dir("d"), Member::file(format!("d/{n}"), n.to_string())])
}

#[test]
fn what_is_registered_is_listed_exported_byte_for_byte_and_released() {
    let Some(ply) = store() else { return };
    ply.ok(args!["layer", "ls"]);
    let empty = Shape::of(&ply);
    let base = archive(&[Member::dir("usr"), Member::file("usr/f", vec![b'x'; 200_000])]);
    let bottom = register(&ply, &base, None);
    assert_eq!(bottom, format!("sha256:{}", sha256_hex(&base)));
    let top_tar = archive(&[Member::hard_link("link", "usr/f"), Member::file("usr/g", "g")]);
    for packing in Packing::ALL {
        let path = ply.scratch().file("packed", packing.pack(&top_tar));
        let top = chain_of(&ply.ok(args!["layer", "register", "--parent", &bottom[..20], path]));
        assert!(export(&ply, &top[7..19]) == top_tar);
        let shown = ply.json(args!["layer", "inspect", top]);
        assert_eq!(shown["diff_id"], format!("sha256:{}", sha256_hex(&top_tar)));
        assert_eq!((&shown["parent"], &shown["depth"]), (&bottom.as_str().into(), &2.into()));
        assert_eq!(shown["holders"], serde_json::json!([{"holder": "user", "count": 1}]));
        let listed = ply.json(args!["layer", "ls"]);
        assert_eq!(listed.as_array().unwrap().len(), 2);
        ply.ok(args!["gc"]);
        let mut stdout = ply.command(args!["layer", "export", top]);
        let out = ply.scratch().join("stdout.tar");
        assert!(stdout.stdout(fs::File::create(&out).unwrap()).status().unwrap().success());
        assert!(fs::read(&out).unwrap() == top_tar, "{packing:?}");
        let gone = ply.ok(args!["layer", "release", top]);
        assert!(gone.stdout.starts_with(&format!("Removed layer {top}")), "{gone}");
    }
    assert!(
        ply.fails(1, args!["layer", "release", format!("sha256:{}", "0".repeat(64))]).stderr.contains("does not exist")
    );
    ply.ok(args!["layer", "release", bottom]);
    assert_eq!(Shape::of(&ply), empty);
}

#[test]
fn tars_of_other_tools_come_back_byte_for_byte() {
    let Some(ply) = store() else { return };
    let dir = ply.scratch().dir("tree");
    fs::create_dir_all(dir.join("sub/dir")).unwrap();
    fs::write(dir.join("sub/dir").join("long-name-".repeat(20)), "long").unwrap();
    fs::write(dir.join("sub/file"), vec![7; 70_000]).unwrap();
    fs::hard_link(dir.join("sub/file"), dir.join("sub/hard")).unwrap();
    let sparse = fs::File::create(dir.join("sparse")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &[1; 5000], 1 << 20).unwrap();
    sparse.set_len(2 << 20).unwrap();
    let tar = |program: &str, options: &[&str]| {
        let mut command = Command::new(program);
        let out = command.args(options).arg(".").current_dir(&dir).output().unwrap();
        assert!(out.status.success(), "{program} {options:?}: {}", String::from_utf8_lossy(&out.stderr));
        out.stdout
    };
    let mut archives = Vec::new();
    for format in ["gnu", "oldgnu", "pax"] {
        archives
            .push((format!("tar {format}"), tar("tar", &["-c", "--sparse", &format!("--format={format}"), "-f", "-"])));
    }
    if tools::have(&["bsdtar"]) {
        for format in ["pax", "gnutar"] {
            archives.push((format!("bsdtar {format}"), tar("bsdtar", &["-c", "--format", format, "-f", "-"])));
        }
    }
    if tools::have(&["busybox"]) {
        archives.push(("busybox".to_owned(), tar("busybox", &["tar", "-c", "-f", "-"])));
    }
    for (what, tar) in archives {
        let chain = register(&ply, &tar, None);
        assert!(export(&ply, &chain) == tar, "{what}");
        assert_eq!(chain, format!("sha256:{}", sha256_hex(&tar)), "{what}");
        ply.ok(args!["layer", "release", chain]);
    }
}

#[test]
fn bad_tars_register_nothing_and_leak_nothing() {
    let Some(ply) = store() else { return };
    let parent = register(&ply, &small(1), None);
    ply.ok(args!["gc"]);
    let before = State::of(&ply);
    let whole = archive(&[Member::file("f", vec![1; 5000]), Member::file("g", "g")]);
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("cut", whole[..3000].to_vec()),
        ("no end", whole[..whole.len() - 1024].to_vec()),
        ("no tar", b"not a tar at all".repeat(100)),
        ("nothing", vec![]),
        ("cut gzip", Packing::Gzip.pack(&whole)[..60].to_vec()),
        ("out of the root", archive(&[Member::file("../x", "x")])),
        ("link to nothing", archive(&[Member::hard_link("a", "missing")])),
        ("negative size", archive(&[Member::file("a", "x").pax("size", "-1")])),
        ("whiteout device", archive(&[Member::char_device("w", 0, 0)])),
        ("whiteout of ..", archive(&[Member::file(".wh...", "")])),
    ];
    for (what, tar) in cases {
        let path = ply.scratch().file("bad.tar", tar);
        let ran = ply.fails(1, args!["layer", "register", "--parent", parent, path]);
        assert_eq!(ran.stdout, "", "{what}");
        assert!(ran.stderr.lines().filter(|line| line.starts_with("ply: ")).count() == 1, "{what}: {ran}");
        before.assert_same(&State::of(&ply), what);
        assert_eq!(ply.json(args!["layer", "ls"]).as_array().unwrap().len(), 1, "{what}");
    }
    ply.fails(1, args!["layer", "register", "--parent", "sha256:00", ply.scratch().file("ok.tar", small(2))]);
    ply.fails(1, args!["layer", "register", ply.scratch().join("missing.tar")]);
    ply.fails(2, args!["layer", "register", "a", "b"]);
}

#[test]
fn images_put_their_layers_there_and_take_them_along() {
    let Some(ply) = store() else { return };
    let image = everything("localhost/everything:1", Packing::Gzip);
    load(&ply, &image);
    let shown = ply.json(args!["inspect", image.tag()]);
    let chain = shown["chain_id"].as_str().unwrap().to_owned();
    let layer = ply.json(args!["layer", "inspect", chain]);
    assert_eq!(layer["depth"], 3);
    assert_eq!(layer["holders"][0]["holder"], format!("image:{}", image.id()));
    assert_eq!((&shown["built_here"], &shown["parent"]), (&false.into(), &serde_json::Value::Null));
    // A layer registered on it keeps it.
    let top = register(&ply, &small(1), Some(&chain));
    ply.ok(args!["rmi", image.tag()]);
    assert_eq!(ply.json(args!["layer", "ls"]).as_array().unwrap().len(), 4);
    ply.ok(args!["layer", "rw", "create", "c", "--parent", top]);
    let dir = ply.scratch().dir("c");
    ply.ok(args!["layer", "rw", "mount", "c", dir]);
    assert_eq!(fs::read(dir.join("etc/config")).unwrap(), b"upper");
    assert!(fs::symlink_metadata(dir.join("dev/pipe")).unwrap().file_type().is_fifo());
    ply.ok(args!["layer", "rw", "umount", "c"]);
    ply.ok(args!["layer", "rw", "rm", "c"]);
    assert_eq!(ply.ok(args!["layer", "release", top]).stdout.lines().count(), 4);
    assert_eq!(ply.json(args!["layer", "ls"]), serde_json::json!([]));
}

#[test]
fn a_writable_layer_is_mounted_changed_committed_and_removed() {
    let Some(ply) = store() else { return };
    let base = archive(&[Member::dir("etc"), Member::file("etc/old", "old"), Member::file("etc/gone", "gone")]);
    let parent = register(&ply, &base, None);
    ply.ok(args!["layer", "rw", "create", "box", "--parent", parent, "--init"]);
    let ran = ply.fails(1, args!["layer", "rw", "create", "box"]);
    assert!(ran.stderr.contains("\"box\""), "{ran}");
    let usage = ply.ok(args!["du", "-v"]).stdout;
    assert!(usage.contains("writable layer box") && usage.contains("registered layer "), "{usage}");
    let dir = ply.scratch().dir("box");
    ply.ok(args!["layer", "rw", "mount", "box", dir]);
    assert!(dir.join("etc/hosts").exists() && dir.join(".dockerenv").exists() && dir.join("dev/pts").is_dir());
    assert_eq!(fs::read_link(dir.join("etc/mtab")).unwrap(), Path::new("/proc/mounts"));
    assert_eq!(ply.ok(args!["layer", "rw", "changes", "box"]).stdout, "", "init is no change");
    fs::write(dir.join("etc/old"), "new").unwrap();
    fs::remove_file(dir.join("etc/gone")).unwrap();
    fs::create_dir_all(dir.join("added/deep")).unwrap();
    let changes = "A /added\nA /added/deep\nM /etc\nD /etc/gone\nM /etc/old\n";
    assert_eq!(ply.ok(args!["layer", "rw", "changes", "box"]).stdout, changes);
    for command in ["commit", "rm"] {
        let ran = ply.fails(1, args!["layer", "rw", command, "box"]);
        assert!(ran.stderr.contains("mounted on"), "{ran}");
    }
    ply.fails(1, args!["layer", "rw", "mount", "box", ply.scratch().dir("other")]);
    ply.ok(args!["layer", "rw", "umount", "box"]);
    ply.fails(1, args!["layer", "rw", "umount", "box"]);
    let committed = chain_of(&ply.ok(args!["layer", "rw", "commit", "box"]));
    assert_eq!(ply.json(args!["layer", "inspect", committed])["parent"], parent);
    let listed = ply.ok(args!["layer", "rw", "changes", "box"]).stdout;
    assert_eq!(listed, changes, "it stays as it was");
    let names =
        Command::new("tar").arg("-tf").arg(ply.scratch().file("c.tar", export(&ply, &committed))).output().unwrap();
    let mut names: Vec<_> = String::from_utf8(names.stdout).unwrap().lines().map(str::to_owned).collect();
    names.sort();
    assert!(
        names.contains(&"etc/.wh.gone".to_owned()) && !names.iter().any(|name| name.contains("dockerenv")),
        "{names:?}"
    );
    ply.ok(args!["layer", "rw", "rm", "box"]);
    ply.ok(args!["layer", "release", parent]);
    assert_eq!(ply.ok(args!["layer", "release", committed]).stdout.lines().count(), 2);
    assert_eq!(Shape::of(&ply).unfinished, Vec::<PathBuf>::new());
}

#[test]
fn a_writable_layer_is_mounted_with_other_owners() {
    use std::os::unix::fs::MetadataExt as _;
    let Some(ply) = store() else { return };
    let parent = register(&ply, &archive(&[Member::dir("etc"), Member::file("etc/f", "x").owner(3, 4)]), None);
    ply.ok(args!["layer", "rw", "create", "box", "--parent", parent, "--init", "--uid-map", "0:100000:65536"]);
    let listed = ply.json(args!["layer", "rw", "ls"]);
    assert_eq!(
        (&listed[0]["uid_map"], &listed[0]["gid_map"]),
        (&json!(["0:100000:65536"]), &json!(["0:100000:65536"]))
    );
    let dir = ply.scratch().dir("box");
    ply.ok(args!["layer", "rw", "mount", "box", dir]);
    for (name, uid, gid) in [("etc/f", 100_003, 100_004), (".dockerenv", 100_000, 100_000), ("etc", 100_000, 100_000)] {
        let stat = fs::metadata(dir.join(name)).unwrap();
        assert_eq!((stat.uid(), stat.gid()), (uid, gid), "{name}");
    }
    ply.ok(args!["layer", "rw", "umount", "box"]);
    assert_eq!(ply.ok(args!["layer", "rw", "changes", "box"]).stdout, "");
    for bad in [&["--uid-map", "0:1"][..], &["--uid-map", "1:1:1"], &["--gid-map", "0:5:10", "--gid-map", "9:30:1"]] {
        let bad: Vec<std::ffi::OsString> = bad.iter().map(Into::into).collect();
        ply.fails(2, &[args!["layer", "rw", "create", "bad"], &bad].concat());
    }
    assert_eq!(ply.json(args!["layer", "rw", "ls"]).as_array().unwrap().len(), 1);
}

/// What the layer store shows.
fn shown(ply: &Ply) -> String {
    let strip = |mut value: serde_json::Value| {
        for row in value.as_array_mut().unwrap() {
            for key in ["created", "layer", "mount_id", "init_id"] {
                row.as_object_mut().unwrap().remove(key);
            }
        }
        value.to_string()
    };
    strip(ply.json(args!["layer", "ls"])) + &strip(ply.json(args!["layer", "rw", "ls"]))
}

/// Kills a command at many moments: the layer store then shows what it showed before or what it would have shown after,
/// and nothing is left over.
fn kill_everywhere(ply: &Ply, command: &[std::ffi::OsString], undo: &dyn Fn(&Ply)) {
    let (before, shape) = (shown(ply), Shape::of(ply));
    let counts = kill::count(&ply.command(command), &ply.scratch().join("strace.log"));
    let (after, shape_after) = (shown(ply), Shape::of(ply));
    assert_ne!(before, after);
    undo(ply);
    assert_eq!((shown(ply), Shape::of(ply)), (before.clone(), shape.clone()));
    let mut killed = 0;
    let points = kill::spread(&counts, 3);
    for point in &points {
        killed += usize::from(matches!(kill::kill_at(&ply.command(command), point), Outcome::Killed));
        ply.ok(args!["gc"]);
        let now = shown(ply);
        if now == after && now != before {
            assert_eq!(Shape::of(ply).inodes, shape_after.inodes, "after {point}");
            undo(ply);
        }
        assert_eq!(shown(ply), before, "half done after {point}");
        assert_eq!(Shape::of(ply), shape, "left over after {point}");
    }
    assert!(killed * 2 > points.len(), "most moments were never reached: {killed} of {}", points.len());
}

#[test]
fn e08_registering_killed_anywhere_is_all_or_nothing_and_leaks_nothing() {
    if !tools::have(&["strace"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let parent = register(&ply, &archive(&[Member::file("lower", "l"), Member::dir("d")]), None);
    // With a link into the parent, so that both ways are gone.
    for (n, tar) in [small(2), archive(&[Member::file("a", "a"), Member::hard_link("b", "lower")])].iter().enumerate() {
        let path = ply.scratch().file(format!("{n}.tar"), tar);
        let chain = chain_of(&ply.ok(args!["layer", "register", "--parent", parent, path]));
        let undo = |ply: &Ply| drop(ply.ok(args!["layer", "release", chain]));
        undo(&ply);
        kill_everywhere(&ply, args!["layer", "register", "--parent", parent, path], &undo);
    }
}

#[test]
fn e15_releasing_killed_anywhere_is_all_or_nothing_and_leaks_nothing() {
    if !tools::have(&["strace"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let parent = register(&ply, &small(1), None);
    let path = ply.scratch().file("top.tar", small(2));
    let again = args!["layer", "register", "--parent", parent, path].to_vec();
    let chain = chain_of(&ply.ok(&again));
    let undo = |ply: &Ply| drop(ply.ok(&again));
    // What is left when a release was killed between its rows and its bytes is what the next gc takes.
    let shape = Shape::of(&ply);
    let counts = kill::count(&ply.command(args!["layer", "release", chain]), &ply.scratch().join("strace.log"));
    let after = shown(&ply);
    undo(&ply);
    let before = shown(&ply);
    for point in kill::spread(&counts, 3) {
        kill::kill_at(&ply.command(args!["layer", "release", chain]), &point);
        ply.ok(args!["gc"]);
        let now = shown(&ply);
        assert!(now == before || now == after, "half done after {point}: {now}");
        if now == after {
            undo(&ply);
        }
        assert_eq!(Shape::of(&ply).inodes, shape.inodes, "after {point}");
    }
}

#[test]
fn e19_making_a_writable_layer_killed_anywhere_is_all_or_nothing_and_leaks_nothing() {
    if !tools::have(&["strace"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let parent = register(&ply, &small(1), None);
    let command = args!["layer", "rw", "create", "box", "--parent", parent, "--init"];
    let undo = |ply: &Ply| drop(ply.ok(args!["layer", "rw", "rm", "box"]));
    let shape = Shape::of(&ply);
    let before = shown(&ply);
    let counts = kill::count(&ply.command(command), &ply.scratch().join("strace.log"));
    let after = shown(&ply);
    undo(&ply);
    for point in kill::spread(&counts, 3) {
        kill::kill_at(&ply.command(command), &point);
        ply.ok(args!["gc"]);
        let now = shown(&ply);
        assert!(now == before || now == after, "half done after {point}: {now}");
        if now == after {
            undo(&ply);
        }
        assert_eq!(Shape::of(&ply), shape, "after {point}");
    }
}

#[test]
fn a_rename_of_a_commit_killed_leaves_the_writable_layer_as_it_was() {
    if !tools::have(&["strace"]) {
        return;
    }
    let Some(ply) = store() else { return };
    let parent = register(&ply, &small(1), None);
    ply.ok(args!["layer", "rw", "create", "box", "--parent", parent]);
    let dir = ply.scratch().dir("box");
    ply.ok(args!["layer", "rw", "mount", "box", dir]);
    fs::write(dir.join("written"), "w").unwrap();
    ply.ok(args!["layer", "rw", "umount", "box"]);
    let changes = ply.ok(args!["layer", "rw", "changes", "box"]).stdout;
    for call in ["rename", "fsync", "syncfs", "write"] {
        for nth in [1, 2, 5] {
            kill::kill_at(
                &ply.command(args!["layer", "rw", "commit", "box"]),
                &KillPoint { call: call.to_owned(), nth },
            );
            assert_eq!(ply.ok(args!["layer", "rw", "changes", "box"]).stdout, changes, "{call} {nth}");
        }
    }
    let chain = chain_of(&ply.ok(args!["layer", "rw", "commit", "box"]));
    let tree = ply.scratch().dir("tree");
    tools::run(
        Command::new("tar").arg("-xf").arg(ply.scratch().file("c.tar", export(&ply, &chain))).arg("-C").arg(&tree),
    );
    assert_eq!(Tree::of(&tree).get("written").size_bytes, 1);
}

/// A build of copies only, on an image without commands to run.
fn copies<'a>(ply: &'a Ply, base: &Image) -> Context<'a> {
    load(ply, base);
    let context =
        Context::new(ply, "FROM localhost/base:1\nCOPY a /a\nENV X=1\nCOPY b /b\nWORKDIR /w\nCOPY c c\nLABEL l=1\n");
    for name in ["a", "b", "c"] {
        context.file(name, name.repeat(1000));
    }
    context
}

#[test]
fn an_image_built_elsewhere_answers_for_steps_and_is_named() {
    let Some(here) = store() else { return };
    let Some(there) = store() else { return };
    let base = Image::new("localhost/base:1").layer(&[Member::dir("etc")], Packing::Gzip);
    let built = copies(&here, &base);
    built.build(&[]);
    let archive = here.scratch().join("built.tar");
    here.ok(args!["save", "-o", archive, "built:latest"]);
    let tree = tree_of(&here, "built:latest");
    let id = here.json(args!["inspect", "built:latest"])["id"].clone();

    let context = copies(&there, &base);
    there.ok(args!["load", "-i", archive]);
    there.ok(args!["tag", "built:latest", "localhost/source:1"]);
    there.ok(args!["rmi", "built:latest"]);
    let ran = context.build(args!["--cache-from", "localhost/source:1", "--explain"]);
    ran.assert_all_cached();
    for entry in [1, 3, 4, 5] {
        let says = format!("cached: image localhost/source:1, history entry {entry}: ");
        assert!(ran.ran.stderr.contains(&says), "{}", ran.ran);
    }
    tree_of(&there, "built:latest").assert_same(&tree, "built from the other's steps");
    assert_eq!(there.json(args!["inspect", "built:latest"])["id"], id, "the same image");
    // Now they are in the build cache as well.
    let ran = context.build(args!["--explain"]);
    ran.assert_all_cached();
    assert!(ran.ran.stderr.contains("cached: record "), "{}", ran.ran);

    // Without the image, with another content, with --no-cache, and from an image that tells nothing.
    context.file("b", "other content");
    let ran = context.build(args!["--cache-from", "localhost/source:1", "--explain"]);
    assert_eq!((ran.step("COPY a"), ran.step("COPY b"), ran.step("COPY c")), (Step::Cached, Step::Ran, Step::Ran));
    let ran = context.build(args!["--cache-from", "localhost/source:1", "--no-cache", "--explain"]);
    assert_eq!(ran.step("COPY a"), Step::Ran);
    let ran = context.build(args!["--cache-from", "localhost/missing:1", "--explain"]);
    assert!(ran.ran.stderr.contains("warning: cache from localhost/missing:1"), "{}", ran.ran);
    there.fails(2, &context.args(args!["--cache-from", "type=registry,ref=x"]));
}

#[test]
fn steps_side_by_side_are_found_in_different_images() {
    let (Some(here), Some(there)) = (store(), store()) else { return };
    let base = Image::new("localhost/base:1").layer(&[Member::dir("etc")], Packing::Gzip);
    load(&here, &base);
    load(&there, &base);
    let sources = ["one", "two"].map(|name| {
        let context = Context::new(&here, &format!("FROM localhost/base:1\nCOPY {name} /{name}\n"));
        context.file(name, name.repeat(1000));
        context.build(&[]);
        let archive = here.scratch().join("built.tar");
        here.ok(args!["save", "-o", archive, "built:latest"]);
        there.ok(args!["load", "-i", archive]);
        there.ok(args!["tag", "built:latest", format!("localhost/{name}:1")]);
        ["--cache-from".to_owned(), format!("localhost/{name}:1")]
    });
    let context = Context::new(
        &there,
        "FROM localhost/base:1 AS one\nCOPY one /one\nFROM localhost/base:1 AS two\nCOPY two /two\n\
         FROM localhost/base:1\nCOPY --from=one /one /\nCOPY --from=two /two /\n",
    );
    context.file("one", "one".repeat(1000));
    context.file("two", "two".repeat(1000));
    let ran = context.build(&sources.concat().into_iter().map(Into::into).collect::<Vec<_>>());
    assert_eq!((ran.step("COPY one"), ran.step("COPY two")), (Step::Cached, Step::Cached), "{}", ran.ran);
}

#[test]
fn c01_an_image_whose_history_only_looks_the_same_answers_for_nothing() {
    let Some(ply) = store() else { return };
    let base = Image::new("localhost/base:1").layer(&[Member::dir("etc")], Packing::Gzip);
    let context = copies(&ply, &base);
    // The text of the step, on the same layers, with files of somebody else's.
    let liar = base
        .clone()
        .named("localhost/liar:1")
        .history("COPY a /a # buildkit")
        .layer(&[Member::file("a", "poison")], Packing::Gzip);
    load(&ply, &liar);
    let ran = context.build(args!["--cache-from", "localhost/liar:1", "--explain"]);
    assert_eq!(ran.step("COPY a"), Step::Ran);
    assert!(ran.ran.stderr.contains("does not say what its steps took in"), "{}", ran.ran);
    assert_eq!(tree_of(&ply, "built:latest").get("a").size_bytes, 1000);
}

#[test]
fn a_linked_copy_is_found_in_an_image_whatever_it_was_laid_over() {
    let (Some(here), Some(there)) = (store(), store()) else { return };
    let base = Image::new("localhost/base:1").layer(&[Member::dir("etc")], Packing::Gzip);
    let other = Image::new("localhost/other:1").layer(&[Member::dir("srv")], Packing::Gzip);
    let dockerfile = |base: &str| format!("FROM {base}\nCOPY a /a\nCOPY --link b /deep/b\nCOPY c /c\n");
    let context = |ply| {
        let context = Context::new(ply, &dockerfile("localhost/base:1"));
        for name in ["a", "b", "c"] {
            context.file(name, name.repeat(1000));
        }
        context
    };
    load(&here, &base);
    context(&here).build(&[]);
    let archive = here.scratch().join("built.tar");
    here.ok(args!["save", "-o", archive, "built:latest"]);

    load(&there, &base);
    load(&there, &other);
    there.ok(args!["load", "-i", archive]);
    there.ok(args!["tag", "built:latest", "localhost/source:1"]);
    let context = context(&there);
    let ran = context.build(args!["--cache-from", "localhost/source:1", "--explain"]);
    ran.assert_all_cached();
    assert!(ran.ran.stderr.contains("history entry 2: COPY b /deep/b"), "{}", ran.ran);
    there.ok(args!["prune", "-a", "-f"]);
    context.file("Dockerfile", dockerfile("localhost/other:1"));
    let ran = context.build(args!["--cache-from", "localhost/source:1"]);
    assert_eq!((ran.step("COPY a"), ran.step("COPY --link"), ran.step("COPY c")), (Step::Ran, Step::Cached, Step::Ran));
    assert_eq!(tree_of(&there, "built:latest").get("deep/b").size_bytes, 1000);
}

/// An image as Docker's classic builder or BuildKit makes one on this base, without any commands: a step that is not
/// found fails.
fn built_by_docker(base: &Image, texts: [&str; 6]) -> Image {
    let [env, two, arg, run, user, workdir] = texts;
    base.clone()
        .named("localhost/docker:1")
        .config("Env", json!(["PATH=/bin:/sbin:/usr/bin:/usr/sbin", "A=b", "C=d e", "F=g"]))
        .layer(&[Member::file("out", "from the image")], Packing::Gzip)
        .layer(&[Member::dir("w")], Packing::Gzip)
        .entries(
            &[("layer 0", true), (env, false), (two, false), (arg, false), (run, true), (user, false)]
                .into_iter()
                .chain([(workdir, true), ("COPY file:0123 in /a ", true)])
                .take(7)
                .collect::<Vec<_>>(),
        )
}

const CLASSIC: [&str; 6] = [
    "/bin/sh -c #(nop)  ENV A=b",
    "/bin/sh -c #(nop)  ENV C=d e F=g",
    "/bin/sh -c #(nop)  ARG X=1",
    "|2 X=1 Y=2 /bin/sh -c make  it",
    "/bin/sh -c #(nop)  USER root",
    "/bin/sh -c #(nop) WORKDIR /w",
];

#[test]
fn d16_an_image_of_docker_answers_for_commands_where_all_before_them_is_the_same() {
    let Some(ply) = store() else { return };
    let base = Image::new("localhost/base:1").layer(&[Member::dir("etc")], Packing::Gzip);
    load(&ply, &base);
    let dockerfile = "FROM localhost/base:1\nENV A=b\nENV C=\"d e\" F=g\nARG Y=2 X=1\nRUN make  it\n\
                      USER root\nWORKDIR /w\nCOPY a /a\n";
    let context = Context::new(&ply, dockerfile);
    let from = args!["--cache-from", "localhost/docker:1", "--explain"];
    let buildkit = [
        "ENV A=b",
        "ENV C=d e F=g",
        "ARG Y=2",
        "RUN |2 Y=2 X=1 /bin/sh -c make  it # buildkit",
        "USER root",
        "WORKDIR /w",
    ];
    for texts in [CLASSIC, buildkit] {
        load(&ply, &built_by_docker(&base, texts));
        context.file("a", texts[0]);
        let ran = context.build(from);
        let steps = (ran.step("RUN make"), ran.step("WORKDIR"), ran.step("COPY a"));
        assert_eq!(steps, (Step::Cached, Step::Cached, Step::Ran), "{}", ran.ran);
        let says = format!("cached: image localhost/docker:1, history entry 4: {}", texts[3]);
        assert!(ran.ran.stderr.contains(&says), "{}", ran.ran);
        let tree = tree_of(&ply, "built:latest");
        assert_eq!((tree.get("out").size_bytes, tree.get("a").size_bytes), (14, texts[0].len() as u64));
    }
    // What a text says is not remembered for builds that name no image.
    assert!(context.build_fails(&[]).stderr.contains("make  it"));

    for (what, from_text, to) in [
        ("another command", "make  it", "make it"),
        ("a command in words", "make  it", "[\"make\", \"it\"]"),
        ("another variable", "ENV A=b", "ENV A=c"),
        ("one variable of two", "C=\"d e\" F=g", "C=\"d e F=g\""),
        ("another argument", "X=1", "X=2"),
        ("one instruction more", "RUN", "LABEL l=1\nRUN"),
        ("another instruction", "ENV A=b", "LABEL A=b"),
        ("another shell", "ENV A=b", "SHELL [\"/bin/other\", \"-c\"]"),
        ("another user", "ENV A=b", "USER 7"),
        ("another directory", "ENV A=b", "WORKDIR /etc"),
    ] {
        context.file("Dockerfile", dockerfile.replacen(from_text, to, 1));
        assert!(!context.build_fails(from).stderr.contains("history entry 4"), "{what}");
    }
    context.file("Dockerfile", dockerfile);
    let others: [(&str, Image); 3] = [
        ("a layer below", base.clone().layer(&[Member::file("x", "")], Packing::Gzip)),
        ("the base's history", base.clone().entries(&[("other", true)])),
        ("the platform's layers", Image::new("localhost/base:1").layer(&[Member::dir("opt")], Packing::Gzip)),
    ];
    for (what, other) in others {
        load(&ply, &other);
        assert!(!context.build_fails(from).stderr.contains("history entry"), "{what}");
    }
}

#[test]
fn d16_an_image_of_buildah_answers_for_its_commands() {
    if !tools::have(&["buildah"]) {
        return;
    }
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let scratch = ply.scratch();
    let archive = |name: &str| scratch.join(name);
    ply.ok(args!["save", "--format", "docker", "-o", archive("base.tar"), "busybox:latest"]);
    let dockerfile = "FROM busybox:latest\nENV A=b\nENV C=d E=\"f g\"\nARG X=1\nRUN echo $E > /first; date >> /first\n\
                      USER app\nLABEL l=\"x y\" m=n\nRUN echo second > /tmp/second\nCOPY f /f\nRUN echo third > /tmp/third\n";
    let context = Context::new(&ply, dockerfile);
    context.file("f", "content");
    let state = scratch.join("state");
    let buildah = |arguments: &[std::ffi::OsString]| {
        tools::run(tools::containers("buildah", &state).args(arguments));
    };
    buildah(args!["pull", "-q", format!("docker-archive:{}", archive("base.tar").display())]);
    buildah(args![
        "bud",
        "-q",
        "--pull-never",
        "--layers",
        "--isolation",
        "chroot",
        "-t",
        "localhost/theirs:1",
        context.dir
    ]);
    let theirs = format!("docker-archive:{}:localhost/theirs:1", archive("theirs.tar").display());
    buildah(args!["push", "-q", "localhost/theirs:1", theirs]);
    ply.ok(args!["load", "-i", archive("theirs.tar")]);
    let ran = context.build(args!["--cache-from", "localhost/theirs:1", "--explain"]);
    let steps = [ran.step("RUN echo $E"), ran.step("RUN echo second"), ran.step("COPY f"), ran.step("RUN echo third")];
    assert_eq!(steps, [Step::Cached, Step::Cached, Step::Ran, Step::Ran], "{}", ran.ran);
    let (ours, theirs) = (tree_of(&ply, "built:latest"), tree_of(&ply, "localhost/theirs:1"));
    assert_eq!(ours.get("first"), theirs.get("first"), "with its date");
    assert_eq!(ours.get("tmp/third").kind, "file");
}

#[test]
fn dangling_images_are_removed_when_asked_for() {
    let Some(ply) = store() else { return };
    let image = |content: &str| Image::new("localhost/app:1").layer(&[Member::file("f", content)], Packing::Gzip);
    load(&ply, &image("one"));
    let ran = load(&ply, &image("two"));
    assert!(ran.stderr.contains("localhost/app:1 was the name of image"), "{ran}");
    assert_eq!(ply.json(args!["images"]).as_array().unwrap().len(), 2);
    let ran = ply.ok(args!["rmi", "--dangling"]);
    assert_eq!(ran.stdout, format!("Deleted: {}\n", image("one").id()));
    assert_eq!(ply.json(args!["images"]).as_array().unwrap().len(), 1);
    assert_eq!(ply.ok(args!["rmi", "--dangling"]).stdout, "");
    ply.fails(2, args!["rmi"]);
    ply.fails(2, args!["rmi", "--dangling", "x"]);
}

#[test]
fn an_export_to_a_closed_pipe_ends() {
    let Some(ply) = store() else { return };
    let chain = register(&ply, &archive(&[Member::file("big", vec![1; 4 << 20])]), None);
    let mut child =
        ply.command(args!["layer", "export", chain]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[test]
fn the_reference_implementation_of_tar_split_reads_ours_and_we_read_its() {
    if !tools::have(&["skopeo"]) {
        return;
    }
    let Some(ply) = store().map(|ply| ply.with_driver("overlay")) else { return };
    let long = "n".repeat(180);
    let tar = archive(&[
        Member::dir("d").mode(0o700),
        Member::file(format!("d/{long}"), vec![7; 70_000]).owner(3, 4),
        Member::file(b"d/\xff", "not UTF-8"),
        Member::file("e", ""),
        Member::symlink("s", "d/<&>"),
    ]);
    let image = Image::new("localhost/one:1").layer_tar(&tar, Packing::Gzip);
    let scratch = ply.scratch();
    let state = scratch.join("state");
    let from = format!("oci:{}:1", image.write_oci_dir(&scratch.join("oci")).display());
    let stored = "containers-storage:localhost/one:1";
    tools::run(tools::containers("skopeo", &state).args(["copy", &from, stored]));
    let found = fs::read_dir(state.join("storage/overlay-layers")).unwrap().map(|entry| entry.unwrap().path());
    let theirs: Vec<PathBuf> = found.filter(|path| path.to_string_lossy().ends_with(".tar-split.gz")).collect();
    assert_eq!(theirs.len(), 1);

    let chain = register(&ply, &tar, None);
    let layer = ply.json(args!["layer", "inspect", chain])["layer"].as_str().unwrap().to_owned();
    let ours = ply.root().join("layers").join(layer).join("tar-split.json.gz");
    let (our_bytes, their_bytes) = (fs::read(&ours).unwrap(), fs::read(&theirs[0]).unwrap());
    fs::write(&ours, &their_bytes).unwrap();
    assert!(export(&ply, &chain) == tar, "from their recording");
    fs::write(&theirs[0], &our_bytes).unwrap();
    let out = scratch.join("out");
    tools::run(tools::containers("skopeo", &state).args(["copy", stored, &format!("dir:{}", out.display())]));
    let blob = out.join(sha256_hex(&tar));
    assert!(fs::read(&blob).unwrap_or_else(|error| panic!("{}: {error}", blob.display())) == tar, "from our recording");
}
