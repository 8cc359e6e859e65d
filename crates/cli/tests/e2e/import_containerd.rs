//! `ply import containerd`, on what a real containerd made and on roots that were damaged.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use plies_testkit::containerd::Daemon;
use plies_testkit::image::{self, Image, Packing};
use plies_testkit::ply::Ply;
use plies_testkit::tar::Member;
use plies_testkit::tree::Tree;
use plies_testkit::{args, sha256_hex};
use serde_json::{Value, json};

use crate::common::{State, everything, load, store};
use crate::imported::{self, ended, items, kill_everywhere, without_links};

const SOURCE: &str = "containerd";

#[track_caller]
fn daemon(ply: &Ply) -> Option<Daemon> {
    Daemon::start(&ply.scratch().join("containerd"))
}

/// Takes an image into a namespace, unpacked or not.
#[track_caller]
fn give(daemon: &Daemon, ply: &Ply, namespace: &str, image: &Image, unpack: bool) {
    let archive = image.write_oci_tar(&ply.scratch().join("given.tar"));
    let mut args = vec!["--namespace", namespace, "images", "import"];
    args.extend((!unpack).then_some("--no-unpack"));
    args.push(archive.to_str().unwrap());
    daemon.run(&args);
}

/// What containerd shows of an image.
#[track_caller]
fn tree_of(daemon: &Daemon, ply: &Ply, image: &str) -> Tree {
    let at = ply.scratch().dir("theirs");
    let at = at.to_str().unwrap();
    daemon.run(&["images", "mount", image, at]);
    let tree = Tree::of(Path::new(at));
    daemon.run(&["images", "unmount", "--rm", at]);
    tree
}

/// Where the snapshots' files are, by what each has in it.
fn snapshot_with(root: &Path, file: &str) -> PathBuf {
    let all = fs::read_dir(root.join("io.containerd.snapshotter.v1.overlayfs/snapshots")).unwrap();
    all.map(|one| one.unwrap().path().join("fs")).find(|dir| dir.join(file).exists()).unwrap()
}

fn blob(root: &Path, digest: &str) -> PathBuf {
    root.join("io.containerd.content.v1.content/blobs/sha256").join(digest)
}

#[test]
fn images_of_all_namespaces_come_over_with_manifests_trees_and_bytes() {
    let Some(ply) = store() else { return };
    let Some(daemon) = daemon(&ply) else { return };
    let image = everything("example.com/everything:1", Packing::Gzip);
    let other = Image::new("example.com/packed:1").layer(&[Member::file("f", "f")], Packing::Zstd);
    give(&daemon, &ply, "default", &image, true);
    give(&daemon, &ply, "k8s.io", &image, true);
    give(&daemon, &ply, "k8s.io", &other, false);
    let clash = Image::new("example.com/everything:1").layer(&[Member::file("clash", "c")], Packing::Gzip);
    give(&daemon, &ply, "later", &clash, true);
    let pinned = format!("example.com/everything@sha256:{}", image.manifest_digest());
    daemon.run(&["images", "tag", image.tag(), &pinned]);
    daemon.run(&["images", "tag", image.tag(), &image.id()]);
    daemon.run(&["containers", "create", image.tag(), "box", "/bin/tool"]);
    let theirs = tree_of(&daemon, &ply, image.tag());
    let source = daemon.stop();
    // What the container would have written had it run.
    let upper = fs::read_dir(source.join("io.containerd.snapshotter.v1.overlayfs/snapshots")).unwrap();
    let upper = upper.map(|one| one.unwrap().path().join("fs")).find(|dir| fs::read_dir(dir).unwrap().next().is_none());
    let upper = upper.unwrap();
    fs::create_dir(upper.join("bin")).unwrap();
    fs::write(upper.join("bin/tool"), "new").unwrap();
    let before = Tree::of(&source);

    let would = ply.json(args!["import", SOURCE, "--dry-run", &source]);
    assert_eq!(ply.json(args!["images"]), json!([]), "nothing is done");
    let report = ply.json(args!["import", SOURCE, "--containers", &source]);
    assert_eq!(ended(&report, "failed"), BTreeSet::new(), "{report:#}");
    let mut foreseen = ended(&would, "taken");
    foreseen.insert("box".into());
    assert_eq!(ended(&report, "taken"), foreseen);
    assert_eq!((&would["blobs_count"], &would["blob_bytes"]), (&report["blobs_count"], &report["blob_bytes"]));
    assert_eq!(report["blobs_count"], json!(5), "three, one and one: {report:#}");

    // The source is as it was, times included; files have one name more, where they lie in both.
    let after = Tree::of(&source);
    assert!(before.names().any(|name| after.get(name).links > before.get(name).links), "it was linked, not copied");
    without_links(after).assert_same(&without_links(before), "the source");

    // The first namespace has the name; images of all are here.
    let fates: Vec<(&str, &str)> = report["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|item| item["name"] == image.tag())
        .map(|item| (item["description"].as_str().unwrap(), item["outcome"].as_str().unwrap()))
        .collect();
    let expected = [("namespace default", "taken"), ("namespace k8s.io", "here"), ("namespace later", "left")];
    assert_eq!(fates, expected);
    for image in [&image, &other, &clash] {
        assert!(ply.json(args!["inspect", image.id()])["diff_ids"].is_array());
    }
    assert_eq!(ply.json(args!["inspect", image.tag()])["id"], json!(image.id()));
    assert_eq!(ply.json(args!["inspect", &pinned])["id"], json!(image.id()));
    assert_eq!(items(&report, "name")[&*image.id()].0, "left", "an ID is no name");

    // What goes out is what came in: the same manifest, the same blobs.
    let saved = ply.scratch().dir("saved");
    ply.ok(args!["save", "--format", "oci-dir", "-o", &saved, image.tag()]);
    let blobs = image::blobs_of(&saved);
    for (digest, bytes) in image.blobs() {
        assert!(blobs.get(&digest).is_some_and(|saved| *saved == bytes), "blob {digest}");
    }
    let mut chain: Option<String> = None;
    for diff_id in ply.json(args!["inspect", image.tag()])["diff_ids"].as_array().unwrap() {
        let diff_id = diff_id.as_str().unwrap();
        let next = chain.map_or(diff_id.to_owned(), |chain| {
            format!("sha256:{}", sha256_hex(format!("{chain} {diff_id}").as_bytes()))
        });
        let tar = ply.command(args!["layer", "export", &next]).output().unwrap();
        assert_eq!(format!("sha256:{}", sha256_hex(&tar.stdout)), diff_id, "an export is the tar that the blob holds");
        chain = Some(next);
    }

    // Trees are what containerd mounts, and what the archive makes.
    let ours = Tree::of(ply.mount(image.tag()).path());
    let loaded = {
        let other = Ply::new(env!("CARGO_BIN_EXE_ply"));
        load(&other, &image);
        let mounted = other.mount(image.tag());
        without_links(Tree::of(mounted.path()))
    };
    without_links(ours.clone()).assert_same(&loaded, "the tree that the archive makes");
    // A directory that a layer does not list has the time at which it was unpacked there.
    let timeless = |tree: Tree| {
        let is_implied = |name: &str| ["tmp", "opt", "opt/replaced"].contains(&name);
        without_links(tree).without_root().map(|name, node| {
            if is_implied(name) {
                node.mtime = (0, 0);
            }
        })
    };
    timeless(ours).assert_same(&timeless(theirs), "the tree that ctr mounts");
    let at = ply.scratch().dir("box");
    ply.ok(args!["layer", "rw", "mount", "box", &at]);
    assert_eq!(fs::read(at.join("bin/tool")).unwrap(), b"new");
    assert_eq!(fs::read(at.join("etc/config")).unwrap(), b"upper");
    ply.ok(args!["layer", "rw", "umount", "box"]);

    ply.ok(args!["fsck", "--read-data"]);
    let state = State::of(&ply);
    let again = ply.json(args!["import", SOURCE, "--containers", &source]);
    state.assert_same(&State::of(&ply), "a second import");
    assert_eq!(ended(&again, "taken"), BTreeSet::new(), "{again:#}");

    // One namespace, or several in another order.
    let other = Ply::new(env!("CARGO_BIN_EXE_ply"));
    other.ok(args!["import", SOURCE, "--copy", "--namespace", "later", "--namespace", "default", &source]);
    assert_eq!(other.json(args!["inspect", image.tag()])["id"], json!(clash.id()));
    assert_eq!(other.json(args!["images"]).as_array().unwrap().len(), 2);
    let report = imported::fails(&other, SOURCE, &["--namespace", "nowhere"], &source);
    assert_eq!(items(&report, "namespace")["nowhere"].0, "failed");
}

#[test]
fn a_running_containerd_is_left_alone() {
    let Some(ply) = store() else { return };
    let Some(daemon) = daemon(&ply) else { return };
    let state = State::of(&ply);
    let ran = ply.fails(1, args!["import", SOURCE, daemon.root()]);
    assert!(ran.stderr.contains("meta.db is in use"), "{ran}");
    let ran = ply.fails(1, args!["import", SOURCE, ply.scratch().dir("empty")]);
    assert!(ran.stderr.contains("root directory of containerd"), "{ran}");
    state.assert_same(&State::of(&ply), "refused imports");
}

#[test]
fn a_kill_leaves_whole_images_and_the_next_import_brings_the_rest() {
    let Some(ply) = store() else { return };
    let Some(daemon) = daemon(&ply) else { return };
    let layers = [Member::dir("d").mode(0o700), Member::file("d/f", "1"), Member::hard_link("d/g", "d/f")];
    let image = Image::new("example.com/a:1").layer(&layers, Packing::Gzip);
    let above = image.clone().named("example.com/b:1").layer(&[Member::file("h", "2")], Packing::Zstd);
    give(&daemon, &ply, "default", &image, true);
    give(&daemon, &ply, "other", &above, false);
    daemon.run(&["containers", "create", image.tag(), "box", "/d/f"]);
    kill_everywhere(&ply, SOURCE, &daemon.stop());
}

#[test]
fn what_cannot_be_read_is_named_and_takes_only_what_stands_on_it_along() {
    let Some(ply) = store() else { return };
    let Some(daemon) = daemon(&ply) else { return };
    let bottom = Image::new("example.com/good:1").layer(&[Member::file("good", "good")], Packing::Gzip);
    give(&daemon, &ply, "default", &bottom, true);
    let kinds = ["cut", "nolayer", "noconfig", "badconfig", "nomanifest", "gone", "differs", "cutmanifest"];
    let named = |kind: &str| format!("example.com/{kind}:1");
    let images: BTreeMap<&str, Image> = kinds
        .iter()
        .map(|kind| (*kind, bottom.clone().named(&named(kind)).layer(&[Member::file(kind, kind)], Packing::Gzip)))
        .collect();
    images.values().for_each(|image| give(&daemon, &ply, "default", image, true));
    daemon.run(&["containers", "create", &named("good"), "box", "/good"]);
    daemon.run(&["containers", "create", &named("cut"), "lost", "/good"]);
    let root = daemon.stop();
    let config = |kind: &str| blob(&root, images[kind].id().strip_prefix("sha256:").unwrap());
    let layer = |kind: &str| blob(&root, &images[kind].layer_digest(1));
    let manifest = |kind: &str| blob(&root, &images[kind].manifest_digest());
    let write = |path: PathBuf, bytes: &[u8]| {
        fs::remove_file(&path).unwrap();
        fs::write(path, bytes).unwrap();
    };
    let whole = fs::read(layer("cut")).unwrap();
    write(layer("cut"), &whole[..whole.len() / 2]);
    fs::remove_file(layer("nolayer")).unwrap();
    fs::remove_file(config("noconfig")).unwrap();
    write(config("badconfig"), b"{}");
    fs::remove_file(manifest("nomanifest")).unwrap();
    let bytes = fs::read(manifest("cutmanifest")).unwrap();
    write(manifest("cutmanifest"), &bytes[..bytes.len() / 2]);
    // These two come over all the same: their blobs say what they are.
    fs::remove_dir_all(snapshot_with(&root, "gone")).unwrap();
    fs::write(snapshot_with(&root, "differs").join("more"), "more").unwrap();

    let would = imported::fails(&ply, SOURCE, &["--dry-run", "--containers"], &root);
    let report = imported::fails(&ply, SOURCE, &["--containers"], &root);
    assert_eq!(ended(&report, "failed"), ended(&would, "failed"), "a dry run says it all");
    let reasons: Vec<&str> =
        report["items"].as_array().unwrap().iter().filter_map(|item| item["why"].as_str()).collect();
    for why in [&*images["cut"].layer_digest(1), "is not there", "other bytes", "its config is damaged", "No such file"]
    {
        assert!(reasons.iter().any(|reason| reason.contains(why)), "{why}: {reasons:#?}");
    }
    let shown: BTreeSet<String> = ply
        .json(args!["images"])
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|image| image["names"].as_array().unwrap().clone())
        .map(|name: Value| name.as_str().unwrap().to_owned())
        .collect();
    assert_eq!(shown, ["differs", "gone", "good"].map(named).into());
    for kind in ["gone", "differs"] {
        let mounted = ply.mount(&named(kind));
        assert_eq!(fs::read_to_string(mounted.path().join(kind)).unwrap(), kind);
        assert!(!mounted.path().join("more").exists(), "the blob says what the layer is");
    }
    let containers = items(&report, "container");
    assert_eq!((containers["box"].0, containers["lost"].0), ("taken", "failed"));
    ply.ok(args!["fsck", "--read-data"]);

    // What is mended comes with the next import.
    write(layer("cut"), &whole);
    let again = imported::fails(&ply, SOURCE, &[], &root);
    assert_eq!(items(&again, "name")[&*named("cut")].0, "taken");
}

#[test]
fn damaged_databases_are_named() {
    let Some(ply) = store() else { return };
    let Some(daemon) = daemon(&ply) else { return };
    let image = Image::new("example.com/a:1").layer(&[Member::file("f", "f")], Packing::Gzip);
    give(&daemon, &ply, "default", &image, true);
    let root = daemon.stop();
    let meta = root.join("io.containerd.metadata.v1.bolt/meta.db");
    let whole = fs::read(&meta).unwrap();
    let state = State::of(&ply);
    for damaged in [&[][..], b"no database", &whole[..5000]] {
        fs::write(&meta, damaged).unwrap();
        let ran = ply.fails(1, args!["import", SOURCE, &root]);
        assert!(ran.stderr.contains("meta.db"), "{ran}");
        state.assert_same(&State::of(&ply), "an import of nothing");
    }
    fs::write(&meta, whole).unwrap();
    // Without the snapshotter's database the blobs are unpacked.
    fs::write(root.join("io.containerd.snapshotter.v1.overlayfs/metadata.db"), "no database").unwrap();
    let report = imported::fails(&ply, SOURCE, &[], &root);
    assert!(items(&report, "database").keys().any(|name| name.ends_with("overlayfs/metadata.db")), "{report:#}");
    assert_eq!(fs::read_to_string(ply.mount(image.tag()).path().join("f")).unwrap(), "f");
    ply.ok(args!["fsck", "--read-data"]);
}
