//! `ply import docker`, on what a real daemon made and on data roots made by hand.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use plies_testkit::catalogue::Catalogue;
use plies_testkit::docker::{Daemon, DataRoot};
use plies_testkit::image::{Image, Packing};
use plies_testkit::kill::{self, Outcome};
use plies_testkit::ply::Ply;
use plies_testkit::tar::Member;
use plies_testkit::tree::Tree;
use plies_testkit::{args, sha256_hex, tools};
use serde_json::{Value, json};

use crate::common::{State, everything, load, store};
use crate::imported::{self, ended, items};

fn import(ply: &Ply, path: &Path) -> Value {
    ply.json(args!["import", "docker", path])
}

/// An import that could not read everything: its report.
fn fails(ply: &Ply, args: &[&str], path: &Path) -> Value {
    imported::fails(ply, "docker", args, path)
}

/// The tree that an archive of a container's whole file system holds.
fn exported(daemon: &Daemon, ply: &Ply, container: &str) -> Tree {
    let (tar, dir) = (ply.scratch().join("export.tar"), ply.scratch().dir("exported"));
    daemon.run(&["export", "-o", tar.to_str().unwrap(), container]);
    let mut untar = Command::new("tar");
    tools::run(untar.args(["--numeric-owner", "-xpf"]).arg(tar).arg("-C").arg(&dir));
    Tree::of(&dir)
}

#[test]
fn a_daemons_images_come_over_with_ids_names_parents_trees_and_bytes() {
    let Some(ply) = store() else { return };
    let scratch = ply.scratch();
    let Some(daemon) = Daemon::start(&scratch.join("docker")) else { return };
    let image = everything("everything:1", Packing::Plain);
    let archive = image.write_docker_archive(&scratch.join("everything.tar"));
    daemon.run(&["load", "-i", archive.to_str().unwrap()]);
    scratch.file("context/f", "f");
    scratch.file("context/Dockerfile", "FROM everything:1\nLABEL x=y\nCOPY f /f\nCOPY f /bin/g\n");
    daemon.run(&["build", "-t", "built:1", scratch.join("context").to_str().unwrap()]);
    daemon.run(&["create", "--name", "box", "built:1", "/bin/tool"]);
    daemon.run(&["cp", scratch.join("context/f").to_str().unwrap(), "box:/bin/tool"]);
    let committed = daemon.run(&["commit", "box", "example.com:5000/a/b:c"]);
    let container = daemon.run(&["inspect", "--format", "{{.Id}}", "box"]);
    let show = |format: &str, id: &str| daemon.run(&["image", "inspect", "--format", format, id]);
    let ids: BTreeSet<String> = daemon.run(&["images", "-aq", "--no-trunc"]).lines().map(str::to_owned).collect();
    let diff_ids: BTreeMap<&String, Value> =
        ids.iter().map(|id| (id, serde_json::from_str(&show("{{json .RootFS.Layers}}", id)).unwrap())).collect();
    let parents: BTreeMap<&String, String> = ids.iter().map(|id| (id, show("{{.Parent}}", id))).collect();
    let theirs = exported(&daemon, &ply, "box");
    let source = daemon.stop();
    // What the container would have removed and made anew had it run: as overlayfs writes it down.
    let mount_id = source.join("image/overlay2/layerdb/mounts").join(&container).join("mount-id");
    let upper = source.join("overlay2").join(fs::read_to_string(mount_id).unwrap()).join("diff");
    tools::run(Command::new("mknod").arg(upper.join("bin/ping")).args(["c", "0", "0"]));
    fs::create_dir(upper.join("dev")).unwrap();
    fs::write(upper.join("dev/new"), "new").unwrap();
    tools::run(Command::new("setfattr").args(["-n", "trusted.overlay.opaque", "-v", "y"]).arg(upper.join("dev")));
    let before = Tree::of(&source);

    let would = ply.json(args!["import", "docker", "--dry-run", &source]);
    assert_eq!(ply.json(args!["images"]), json!([]), "nothing is done");
    let report = ply.json(args!["import", "docker", "--containers", &source]);
    assert_eq!(ended(&report, "failed"), BTreeSet::new(), "{report:#}");
    let mut foreseen = ended(&would, "taken");
    foreseen.insert(container.clone());
    assert_eq!(ended(&report, "taken"), foreseen);
    assert_eq!(items(&would, "container")[&*container].0, "left");

    // The source is as it was; files have one name more, where they lie in both.
    let same = |tree: Tree| tree.map(|_, node| node.links = 0);
    same(Tree::of(&source)).assert_same(&same(before), "the source");
    let linked = fs::read_dir(source.join("overlay2")).unwrap().map(|entry| entry.unwrap().path().join("diff/f"));
    assert!(linked.filter_map(|f| fs::metadata(f).ok()).any(|meta| meta.nlink() == 2), "it was linked, not copied");

    // IDs, layers, names and parents are the daemon's.
    assert_eq!(items(&report, "image").into_keys().map(str::to_owned).collect::<BTreeSet<_>>(), ids);
    for id in &ids {
        let details = ply.json(args!["inspect", id]);
        assert_eq!(details["diff_ids"], diff_ids[id], "{id}");
        let saved = scratch.join("saved.tar");
        ply.ok(args!["save", "--format", "docker", "-o", &saved, id]);
    }
    assert_eq!(ply.json(args!["inspect", "example.com:5000/a/b:c"])["id"], json!(committed));
    for layer in fs::read_dir(source.join("image/overlay2/layerdb/sha256")).unwrap() {
        let layer = layer.unwrap();
        let tar = ply.command(args!["layer", "export", layer.file_name()]).output().unwrap();
        let diff = fs::read_to_string(layer.path().join("diff")).unwrap();
        assert_eq!(format!("sha256:{}", sha256_hex(&tar.stdout)), diff, "an export is the tar that Docker got");
    }
    let parent = parents.values().find(|parent| !parent.is_empty()).unwrap();
    let kept = ply.fails(1, args!["rmi", parent]);
    assert!(kept.stderr.contains("is the parent of"), "{}", kept.stderr);

    // The tree is what the same archive makes when it is loaded.
    let other = Ply::new(env!("CARGO_BIN_EXE_ply"));
    load(&other, &image);
    let (ours, loaded) = (ply.mount("everything:1"), other.mount("everything:1"));
    let plain = |path: &Path| Tree::of(path).map(|_, node| node.links = 0).without_root();
    plain(ours.path()).assert_same(&plain(loaded.path()), "the tree");
    drop((ours, loaded));

    // The container has what it had, its init layer included; times of directories that Docker mounted on are its own.
    let at = scratch.dir("box");
    ply.ok(args!["layer", "rw", "mount", &container, &at]);
    let seen = Tree::of(&at);
    assert_eq!(fs::read(at.join("bin/tool")).unwrap(), b"f");
    let theirs = theirs.names().filter(|name| *name != "bin/ping" && !name.starts_with("dev/"));
    let expected: BTreeSet<&str> = theirs.chain(["dev/new"]).collect();
    assert_eq!(seen.names().collect::<BTreeSet<_>>(), expected);
    ply.ok(args!["layer", "rw", "umount", &container]);
    let changes = ply.json(args!["layer", "rw", "changes", &container]);
    let text =
        |change: &Value| [&change["kind"], &change["path"]].map(|text| text.as_str().unwrap().to_owned()).join(" ");
    let changed: BTreeSet<String> = changes.as_array().unwrap().iter().map(text).collect();
    for expected in ["M /bin", "D /bin/ping", "M /bin/tool", "A /dev/new", "D /dev/null"] {
        assert!(changed.contains(expected), "{expected}: {changed:?}");
    }
    assert!(
        !changed.iter().any(|change| change.contains("/etc")),
        "what is of the init layer is no change: {changed:?}"
    );

    ply.ok(args!["fsck", "--read-data"]);
    let state = State::of(&ply);
    let again = ply.json(args!["import", "docker", "--containers", &source]);
    state.assert_same(&State::of(&ply), "a second import");
    assert_eq!(ended(&again, "here"), ended(&report, "taken"));
}

#[test]
fn what_cannot_be_read_is_named_and_takes_only_what_stands_on_it_along() {
    let Some(ply) = store() else { return };
    let root = DataRoot::new(ply.scratch().join("data"));
    let (good, good_diff) = root.layer(None, "good", "good");
    let whole = root.image(&[&good_diff]);
    // A cut tar-split, one of other bytes, a missing diff, files that are gone, a parent that leads in a circle, a tar-split
    // and files that fit each other but not the diff ID.
    let broken: Vec<(String, String)> = ["cut", "changed", "nodiff", "gone", "circle", "other"]
        .iter()
        .map(|name| root.layer(Some(&good), name, name))
        .collect();
    let dir = |n: usize| root.layers().join(&broken[n].0);
    let tree = |n: usize| root.path.join("overlay2").join(sha256_hex(broken[n].0.as_bytes())).join("diff");
    let split = fs::read(dir(0).join("tar-split.json.gz")).unwrap();
    fs::write(dir(0).join("tar-split.json.gz"), &split[..split.len() / 2]).unwrap();
    fs::write(tree(1).join("changed"), "CHANGED").unwrap();
    fs::remove_file(dir(2).join("diff")).unwrap();
    fs::remove_dir_all(tree(3)).unwrap();
    fs::write(dir(4).join("parent"), format!("sha256:{}", broken[4].0)).unwrap();
    let (another, _) = root.layer(None, "other", "OTHER");
    fs::copy(root.layers().join(&another).join("tar-split.json.gz"), dir(5).join("tar-split.json.gz")).unwrap();
    fs::write(tree(5).join("other"), "OTHER").unwrap();
    let lost: Vec<String> = broken.iter().map(|(_, diff)| root.image(&[&good_diff, diff])).collect();
    let (above, above_diff) = root.layer(Some(&broken[1].0), "above", "above");
    root.image(&[&good_diff, &broken[1].1, &above_diff]);
    let damaged = root.image(&[]);
    root.write(&format!("imagedb/content/sha256/{damaged}"), "{}");
    fs::create_dir(root.layers().join("foreign")).unwrap();
    root.write("imagedb/content/sha256/foreign", "{}");
    let names = json!({ "Repositories": { "x": {
        "x:1": format!("sha256:{whole}"),
        "x:lost": format!("sha256:{}", lost[0]),
        "NO NAME": format!("sha256:{whole}"),
        format!("x@sha256:{whole}"): format!("sha256:{whole}"),
    } } });
    root.write("repositories.json", names.to_string());

    let would = fails(&ply, &["--dry-run"], &root.path);
    let report = fails(&ply, &[], &root.path);
    assert_eq!(ended(&report, "failed"), ended(&would, "failed"), "a dry run says it all");
    let layers = items(&report, "layer");
    let said = |chain: &str| layers[&*format!("sha256:{chain}")];
    assert_eq!((said(&good).0, said(&another).0), ("taken", "left"));
    for ((chain, _), why) in
        broken.iter().zip(["tar-split", "tar-split", "no diff ID", "are gone", "chain ID", "give sha256"])
    {
        assert!(said(chain).0 == "failed" && said(chain).1.contains(why), "{why}: {:?}", said(chain));
    }
    assert!(said(&above).1.contains(&broken[1].0), "what it stands on is named: {:?}", said(&above));
    assert_eq!(layers["foreign"].0, "failed");
    let images = items(&report, "image");
    assert_eq!(images[&*format!("sha256:{whole}")].0, "taken");
    for lost in lost.iter().chain([&damaged, &"foreign".to_owned()]) {
        let name = if lost == "foreign" { lost.clone() } else { format!("sha256:{lost}") };
        assert_eq!(images[&*name].0, "failed", "{name}");
    }
    let names: BTreeMap<_, _> =
        items(&report, "name").into_iter().map(|(name, (outcome, _))| (name, outcome)).collect();
    let digest = format!("x@sha256:{whole}");
    let expected = [("x:1", "taken"), ("x:lost", "failed"), ("NO NAME", "failed"), (&*digest, "left")];
    assert_eq!(names, BTreeMap::from(expected));
    assert_eq!(fs::read_to_string(ply.mount("x:1").path().join("good")).unwrap(), "good");
    ply.ok(args!["fsck", "--read-data"]);

    // What is mended comes with the next import.
    fs::write(dir(0).join("tar-split.json.gz"), split).unwrap();
    let again = fails(&ply, &[], &root.path);
    assert_eq!(items(&again, "name")["x:lost"].0, "taken");
    ply.fails(1, args!["import", "docker", ply.scratch().dir("empty")]);
}

#[test]
fn a_layer_that_was_believed_is_no_longer_when_fsck_has_read_it() {
    let Some(ply) = store() else { return };
    let root = DataRoot::new(ply.scratch().join("data"));
    let (_, diff) = root.layer(None, "good", "good");
    let id = root.image(&[&diff]);
    root.write("repositories.json", json!({ "Repositories": { "x": { "x:1": format!("sha256:{id}") } } }).to_string());
    ply.ok(args!["import", "docker", root.path]);
    // The last field of a row, docs/format/catalogue.md.
    let believed = || {
        let rows = Catalogue::open(&ply.root()).rows("layers");
        rows.iter().filter(|(_, row)| row.last() == Some(&1)).count()
    };
    assert_eq!(believed(), 1);
    ply.ok(args!["fsck"]);
    assert_eq!(believed(), 1, "nothing was read");
    ply.ok(args!["fsck", "--read-data"]);
    assert_eq!(believed(), 0);
}

/// The source is believed where nothing tells of a change; what it says is never handed on unread.
#[test]
fn bytes_that_changed_unseen_are_found_before_anybody_else_gets_them() {
    let Some(ply) = store() else { return };
    let root = DataRoot::new(ply.scratch().join("data"));
    let [(good, good_diff), (bad, bad_diff)] = ["good", "true"].map(|content| root.layer(None, content, content));
    for (name, diff) in [("good:1", &good_diff), ("bad:1", &bad_diff)] {
        let id = root.image(&[diff]);
        let names = json!({ "Repositories": { "x": { name: format!("sha256:{id}") } } });
        // One name after the other: the last one is imported with both images.
        root.write("repositories.json", names.to_string());
    }
    DataRoot::put(&root.tree(&bad).join("true"), "lies");

    // Who wants to know is told, in a dry run too.
    for args in [&["--verify", "--dry-run"][..], &["--verify"]] {
        let report = fails(&ply, args, &root.path);
        let layers = items(&report, "layer");
        let (fate, why) = layers[&*format!("sha256:{bad}")];
        assert!(fate == "failed" && why.contains("do not fit"), "{args:?}: {why}");
        assert_eq!(layers[&*format!("sha256:{good}")].0, "taken", "{args:?}");
    }
    // Others believe it. Whatever makes bytes of it finds out.
    let report = ply.json(args!["import", "docker", root.path]);
    assert_eq!(items(&report, "layer")[&*format!("sha256:{bad}")].0, "taken");
    let linked = fs::metadata(root.tree(&bad).join("true")).unwrap();
    assert_eq!(linked.nlink(), 2, "it was linked");
    let state = State::of(&ply);
    ply.fails(1, args!["layer", "export", "-o", ply.scratch().join("tar"), format!("sha256:{bad}")]);
    ply.fails(1, args!["save", "-o", ply.scratch().join("saved"), "bad:1"]);
    let checked: Value = serde_json::from_str(&ply.fails(1, args!["--json", "fsck", "--read-data"]).stdout).unwrap();
    let found = checked["findings"].as_array().unwrap();
    assert!(found.iter().any(|found| found["code"] == "layer-tree-damaged"), "{checked:#}");
    // Nor does the same layer from elsewhere become it: what is here is read first.
    let image = Image::new("other:1").layer(&[Member::file("true", "true")], Packing::Gzip);
    let archive = image.write_docker_archive(&ply.scratch().join("other.tar"));
    ply.fails(1, args!["load", "-i", &archive]);
    state.assert_same(&State::of(&ply), "reading it");
    let whole = Image::new("other:2").layer(&[Member::file("good", "good")], Packing::Gzip);
    ply.ok(args!["load", "-i", whole.write_docker_archive(&ply.scratch().join("whole.tar"))]);

    // A repair takes it away, and then it comes as it is.
    ply.ok(args!["fsck", "--read-data", "--repair"]);
    ply.ok(args!["load", "-i", &archive]);
    assert_eq!(fs::read_to_string(ply.mount("other:1").path().join("true")).unwrap(), "true");
    ply.ok(args!["fsck", "--read-data"]);
}

#[test]
fn a_name_that_is_taken_here_stays() {
    let Some(ply) = store() else { return };
    load(&ply, &everything("x:1", Packing::Plain));
    let before = ply.json(args!["inspect", "x:1"])["id"].clone();
    let root = DataRoot::new(ply.scratch().join("data"));
    let (_, diff) = root.layer(None, "f", "f");
    let id = root.image(&[&diff]);
    root.write("repositories.json", json!({ "Repositories": { "x": { "x:1": format!("sha256:{id}") } } }).to_string());
    let report = import(&ply, &root.path);
    assert_eq!(items(&report, "name")["x:1"].0, "left", "{report:#}");
    assert_eq!(ply.json(args!["inspect", "x:1"])["id"], before);
    assert_eq!(ply.json(args!["inspect", &id])["diff_ids"], json!([format!("sha256:{diff}")]));
}

/// A data root with two images that share layers, names for both, and a container.
fn two_images(path: PathBuf) -> (DataRoot, [String; 2]) {
    let root = DataRoot::new(path);
    let (below, below_diff) = root.layer(None, "below", "below");
    let (_, one) = root.layer(Some(&below), "one", "one");
    let (two_chain, two) = root.layer(Some(&below), "two", "two");
    let ids = [root.image(&[&below_diff, &one]), root.image(&[&below_diff, &two])];
    let names = json!({ "one:1": format!("sha256:{}", ids[0]), "two:1": format!("sha256:{}", ids[1]) });
    root.write("repositories.json", json!({ "Repositories": { "x": names } }).to_string());
    let container = "c".repeat(64);
    let upper = "d".repeat(64);
    root.write(&format!("layerdb/mounts/{container}/mount-id"), &upper);
    root.write(&format!("layerdb/mounts/{container}/parent"), format!("sha256:{two_chain}"));
    let tree = root.path.join("overlay2").join(upper).join("diff");
    fs::create_dir_all(&tree).unwrap();
    fs::write(tree.join("written"), "by the container").unwrap();
    (root, ids)
}

#[test]
fn a_kill_leaves_whole_images_and_the_next_import_brings_the_rest() {
    let Some(ply) = store() else { return };
    if !tools::have(&["strace"]) {
        return;
    }
    let (root, ids) = two_images(ply.scratch().join("data"));
    let args = args!["import", "docker", "--containers", root.path];
    let import_it = ply.command(args);
    let counts = kill::count(&import_it, &ply.scratch().join("strace.log"));
    let mut killed = 0;
    for point in kill::spread(&counts, 3) {
        fs::remove_dir_all(ply.root()).unwrap();
        if let Outcome::Killed = kill::kill_at(&import_it, &point) {
            killed += 1;
        }
        ply.ok(args!["du"]);
        for image in ply.json(args!["images"]).as_array().unwrap() {
            assert_eq!(image.get("error"), None, "{point}: {image:#}");
            drop(ply.mount(image["id"].as_str().unwrap()));
        }
        let report = ply.json(args);
        assert_eq!(ended(&report, "failed"), BTreeSet::new(), "{point}: {report:#}");
        ply.ok(args!["fsck", "--read-data"]);
        for (name, id) in [("one:1", &ids[0]), ("two:1", &ids[1])] {
            assert_eq!(ply.json(args!["inspect", name])["id"], format!("sha256:{id}"), "{point}");
        }
        let containers = ply.json(args!["layer", "rw", "ls"]);
        assert_eq!(containers.as_array().unwrap().len(), 1, "{point}: {containers:#}");
    }
    assert!(killed > 5, "too few kills: {counts:?}");
}

/// With `userns-remap`, what root owns in a container is somebody else's on the disk. The tar-split says whose it is.
#[test]
fn layers_with_shifted_owners_come_over_as_their_tars_have_them() {
    let Some(ply) = store() else { return };
    let (root, ids) = two_images(ply.scratch().join("data/100000.100000"));
    tools::run(Command::new("chown").args(["-R", "100000:100000"]).arg(root.path.join("overlay2")));
    let report = ply.json(args!["import", "docker", "--containers", root.path]);
    ply.ok(args!["fsck", "--read-data"]);
    assert_eq!(ended(&report, "failed"), BTreeSet::new(), "{report:#}");
    for (name, file) in [("one:1", "one"), ("two:1", "two")] {
        let mounted = ply.mount(name);
        for file in ["below", file] {
            let meta = fs::symlink_metadata(mounted.path().join(file)).unwrap();
            assert_eq!((meta.uid(), meta.gid(), meta.nlink()), (0, 0, 1), "{name}: {file}");
        }
    }
    assert_eq!(ply.json(args!["inspect", "two:1"])["id"], format!("sha256:{}", ids[1]));
    // Nothing says what the owners in a writable layer stand for.
    let containers = items(&report, "container");
    assert_eq!(containers.len(), 1);
    let (outcome, why) = containers["c".repeat(64).as_str()];
    assert!(outcome == "left" && why.contains("userns-remap"), "{report:#}");
    assert_eq!(ply.json(args!["layer", "rw", "ls"]), json!([]));
}
