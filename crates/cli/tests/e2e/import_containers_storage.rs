//! `ply import containers-storage`, on what podman and buildah made and on storages that were damaged.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use plies_testkit::image::{Image, Packing};
use plies_testkit::ply::Ply;
use plies_testkit::tar::Member;
use plies_testkit::tree::Tree;
use plies_testkit::{args, sha256_hex, tools};
use serde_json::{Value, json};

use crate::common::{State, everything, load, store};
use crate::imported::{self, ended, items, kill_everywhere, without_links};

const SOURCE: &str = "containers-storage";

/// podman and buildah with a storage of their own.
struct Storage {
    state: PathBuf,
}

impl Storage {
    #[track_caller]
    fn new(ply: &Ply) -> Option<Self> {
        tools::have(&["podman", "buildah"]).then(|| Self { state: ply.scratch().dir("containers") })
    }

    fn root(&self) -> PathBuf {
        self.state.join("storage")
    }

    #[track_caller]
    fn run(&self, program: &str, args: &[&str]) -> String {
        tools::run(tools::containers(program, &self.state).args(args)).trim().to_owned()
    }

    /// Takes an image in, under its name.
    #[track_caller]
    fn load(&self, image: &Image) {
        let archive = image.write_docker_archive(&self.state.join("load.tar"));
        self.run("podman", &["load", "-i", archive.to_str().unwrap()]);
        fs::remove_file(archive).unwrap();
    }

    /// What podman shows of an image.
    #[track_caller]
    fn tree_of(&self, image: &str) -> Tree {
        let tree = Tree::of(Path::new(&self.run("podman", &["image", "mount", image])));
        self.run("podman", &["image", "umount", image]);
        tree
    }

    fn list(&self, name: &str) -> Vec<Value> {
        serde_json::from_slice(&fs::read(self.root().join(name)).unwrap()).unwrap()
    }

    fn change(&self, name: &str, change: impl FnOnce(&mut Vec<Value>)) {
        let mut list = self.list(name);
        change(&mut list);
        fs::write(self.root().join(name), Value::from(list).to_string()).unwrap();
    }
}

const LAYERS: &str = "overlay-layers/layers.json";
const IMAGES: &str = "overlay-images/images.json";
const CONTAINERS: &str = "overlay-containers/containers.json";

fn import(ply: &Ply, storage: &Storage) -> Value {
    ply.json(args!["import", SOURCE, storage.root()])
}

fn text<'v>(value: &'v Value, key: &str) -> &'v str {
    value[key].as_str().unwrap()
}

#[test]
fn a_storages_images_come_over_with_ids_names_trees_and_bytes() {
    let Some(ply) = store() else { return };
    let Some(storage) = Storage::new(&ply) else { return };
    let image = everything("localhost/everything:1", Packing::Plain);
    storage.load(&image);
    // buildah's own layer over it, with a file replaced, one gone, and a directory made anew.
    let working = storage.run("buildah", &["from", "--name", "box", "localhost/everything:1"]);
    let at = PathBuf::from(storage.run("buildah", &["mount", &working]));
    fs::write(at.join("bin/tool"), "new").unwrap();
    fs::remove_file(at.join("etc/link")).unwrap();
    fs::remove_dir_all(at.join("deep")).unwrap();
    fs::create_dir(at.join("deep")).unwrap();
    fs::write(at.join("deep/new"), "new").unwrap();
    fs::hard_link(at.join("deep/new"), at.join("deep/other")).unwrap();
    storage.run("buildah", &["commit", "--format", "docker", "box", "example.com:5000/a/b:c"]);
    let committed = storage.run("podman", &["image", "inspect", "--format", "{{.Id}}", "example.com:5000/a/b:c"]);
    // The container goes on.
    fs::write(at.join("deep/later"), "later").unwrap();
    fs::remove_file(at.join("bin/ping")).unwrap();
    let theirs_box = Tree::of(&at);
    let container = storage.run("buildah", &["containers", "--format", "{{.ContainerID}}", "--notruncate"]);
    storage.run("buildah", &["umount", "box"]);
    storage.run("podman", &["tag", "localhost/everything:1", "localhost/again:2"]);
    let theirs = storage.tree_of("localhost/everything:1");
    let theirs_committed = storage.tree_of("example.com:5000/a/b:c");
    let source = storage.root();
    let before = Tree::of(&source);

    let would = ply.json(args!["import", SOURCE, "--dry-run", &source]);
    assert_eq!(ply.json(args!["images"]), json!([]), "nothing is done");
    let report = ply.json(args!["import", SOURCE, "--containers", &source]);
    assert_eq!(ended(&report, "failed"), BTreeSet::new(), "{report:#}");
    let mut foreseen = ended(&would, "taken");
    foreseen.insert(container.clone());
    assert_eq!(ended(&report, "taken"), foreseen);
    assert_eq!(items(&would, "container")[&*container].0, "left");

    // The source is as it was, times included; files have one name more, where they lie in both.
    let after = Tree::of(&source);
    assert!(before.names().any(|name| after.get(name).links > before.get(name).links), "it was linked, not copied");
    without_links(after).assert_same(&without_links(before), "the source");

    // IDs, names and layers are podman's.
    let ids: BTreeSet<String> = storage.list(IMAGES).iter().map(|row| format!("sha256:{}", text(row, "id"))).collect();
    assert_eq!(items(&report, "image").into_keys().map(str::to_owned).collect::<BTreeSet<_>>(), ids);
    for (name, id) in [("localhost/again:2", &image.id()), ("example.com:5000/a/b:c", &format!("sha256:{committed}"))] {
        assert_eq!(text(&ply.json(args!["inspect", name]), "id"), id);
        let diff_ids = storage.run("podman", &["image", "inspect", "--format", "{{json .RootFS.Layers}}", name]);
        let diff_ids: Value = serde_json::from_str(&diff_ids).unwrap();
        assert_eq!(ply.json(args!["inspect", name])["diff_ids"], diff_ids, "{name}");
        let saved = ply.scratch().join("saved.tar");
        ply.ok(args!["save", "--format", "docker", "-o", &saved, name]);
        let other = Ply::new(env!("CARGO_BIN_EXE_ply"));
        other.ok(args!["load", "-i", &saved]);
        assert_eq!(other.json(args!["inspect", name])["diff_ids"], diff_ids, "{name} saved and loaded");
    }
    for row in storage.list(LAYERS).iter().filter(|row| row["diff-digest"].is_string()) {
        let chain = items(&report, "layer").into_keys().map(str::to_owned);
        let tars: BTreeSet<String> = chain
            .map(|chain| {
                let tar = ply.command(args!["layer", "export", chain]).output().unwrap();
                format!("sha256:{}", sha256_hex(&tar.stdout))
            })
            .collect();
        assert!(tars.contains(text(row, "diff-digest")), "an export is the tar that podman got: {row:#}");
    }

    // Trees are what podman mounts. Directories that a layer does not list get their metadata anew there.
    let implied = ["", "tmp", "opt", "opt/replaced"];
    let comparable = |tree: Tree| {
        tree.map(|name, node| {
            node.links = 0;
            if implied.contains(&name) {
                (node.mode, node.mtime, node.uid, node.gid) = (0, (0, 0), 0, 0);
                node.xattrs.clear();
            }
        })
    };
    for (name, theirs) in [("localhost/everything:1", theirs), ("example.com:5000/a/b:c", theirs_committed)] {
        let ours = Tree::of(ply.mount(name).path());
        comparable(ours).assert_same(&comparable(theirs), name);
    }
    let other = Ply::new(env!("CARGO_BIN_EXE_ply"));
    load(&other, &image);
    let (ours, loaded) =
        (Tree::of(ply.mount("localhost/everything:1").path()), Tree::of(other.mount("localhost/everything:1").path()));
    without_links(ours).assert_same(&without_links(loaded), "the tree that the archive makes");
    let at = ply.scratch().dir("box");
    ply.ok(args!["layer", "rw", "mount", &container, &at]);
    comparable(Tree::of(&at)).assert_same(&comparable(theirs_box), "the container");
    ply.ok(args!["layer", "rw", "umount", &container]);

    ply.ok(args!["fsck", "--read-data"]);
    let state = State::of(&ply);
    let again = ply.json(args!["import", SOURCE, "--containers", &source]);
    state.assert_same(&State::of(&ply), "a second import");
    assert_eq!(ended(&again, "here"), ended(&report, "taken"));
}

/// podman keeps the root of a layer read-only on disk, whatever its tar lists, and its storage mounted on itself; and many
/// directories are more threads' work.
#[test]
fn a_tree_with_a_listed_root_and_many_directories_is_linked_as_its_tar_says() {
    let Some(ply) = store() else { return };
    let Some(storage) = Storage::new(&ply) else { return };
    let mut members = vec![Member::dir(".").mode(0o711).owner(3, 4).mtime(1_400_000_000, 0)];
    for n in 0..50 {
        members.push(Member::dir(format!("d{n}")).mode(0o700).mtime(1_400_000_000 + n, 0));
        members.push(Member::file(format!("d{n}/f"), format!("{n}")).mode(0o640).owner(5, 6));
        // podman gives a file the owner that its last name has in the tar.
        members.push(Member::hard_link(format!("d{n}/g"), format!("d{}/f", n / 2)).mode(0o640).owner(5, 6));
        members.push(Member::symlink(format!("d{n}/l"), "f"));
    }
    // A file with a hole, which some make sparse.
    members.push(Member::file("hole", [&[7; 10][..], &[0; 1 << 20], b"end"].concat()));
    let image = Image::new("localhost/wide:1").layer(&members, Packing::Gzip);
    storage.load(&image);
    let layer = text(&storage.list(LAYERS)[0], "id").to_owned();
    let tree = storage.root().join("overlay").join(layer).join("diff");
    let names = |file: &str| fs::metadata(tree.join(file)).unwrap().nlink();
    let before = names("d49/f");
    // As another unpacker might have left it: the same bytes on fewer blocks.
    tools::run(Command::new("fallocate").args(["--dig-holes"]).arg(tree.join("hole")));
    tools::run(Command::new("touch").args(["-d", "@1500000000"]).arg(tree.join("hole")));
    let overlay = storage.root().join("overlay");
    tools::run(Command::new("mount").arg("--bind").arg(&overlay).arg(&overlay));
    let source = Tree::of(&storage.root());
    ply.ok(args!["import", SOURCE, "--dry-run", storage.root()]);
    import(&ply, &storage);
    assert_eq!(names("d49/f"), 2 * before, "all names of a file are linked");
    assert_eq!(names("hole"), 2);
    without_links(Tree::of(&storage.root())).assert_same(&without_links(source), "the source");

    let other = Ply::new(env!("CARGO_BIN_EXE_ply"));
    load(&other, &image);
    let ours = Tree::of(ply.mount("localhost/wide:1").path());
    // What lies in both has a name there, too.
    without_links(ours).assert_same(&without_links(Tree::of(other.mount("localhost/wide:1").path())), "the tree");
    let usage = |ply: &Ply| ply.json(args!["layer", "ls"])[0]["diff_bytes"].as_u64().unwrap();
    assert_eq!(usage(&ply), usage(&other));
    ply.ok(args!["fsck", "--read-data"]);
}

#[test]
fn a_kill_leaves_whole_images_and_the_next_import_brings_the_rest() {
    let Some(ply) = store() else { return };
    let Some(storage) = Storage::new(&ply) else { return };
    let layers = [Member::dir("d").mode(0o700), Member::file("d/f", "1"), Member::hard_link("d/g", "d/f")];
    let image = Image::new("localhost/a:1").layer(&layers, Packing::Gzip);
    storage.load(&image);
    storage.load(&image.named("localhost/b:1").layer(&[Member::opaque("d"), Member::file("d/h", "2")], Packing::Gzip));
    storage.run("podman", &["create", "--name", "box", "--network", "none", "localhost/b:1", "/d/h"]);
    kill_everywhere(&ply, SOURCE, &storage.root());
}

#[test]
fn what_cannot_be_read_is_named_and_takes_only_what_stands_on_it_along() {
    let Some(ply) = store() else { return };
    let Some(storage) = Storage::new(&ply) else { return };
    let bottom = Image::new("localhost/good:1").layer(&[Member::file("good", "good")], Packing::Plain);
    storage.load(&bottom);
    let kinds = ["cut", "changed", "nodiff", "gone", "circle", "incomplete", "nosplit", "shifted", "composefs"];
    for kind in kinds {
        storage.load(
            &bottom.clone().named(&format!("localhost/{kind}:1")).layer(&[Member::file(kind, kind)], Packing::Plain),
        );
    }
    let above = bottom.clone().named("localhost/above:1").layer(&[Member::file("changed", "changed")], Packing::Plain);
    storage.load(&above.layer(&[Member::file("above", "above")], Packing::Plain));
    storage.load(&Image::new("localhost/config:1").layer(&[Member::file("config", "config")], Packing::Plain));
    for name in ["good", "gone"] {
        storage
            .run("podman", &["create", "--name", name, "--network", "none", &format!("localhost/{name}:1"), "/good"]);
    }
    let root = storage.root();
    // Which layer has the file of this name.
    let layers = storage.list(LAYERS);
    let layer_with = |file: &str| {
        let has = |row: &&Value| {
            row["diff-digest"].is_string()
                && root.join("overlay").join(text(row, "id")).join("diff").join(file).exists()
        };
        text(layers.iter().find(has).unwrap(), "id").to_owned()
    };
    let ids: BTreeMap<&str, String> = kinds.iter().map(|kind| (*kind, layer_with(kind))).collect();
    let split = |kind: &str| root.join("overlay-layers").join(format!("{}.tar-split.gz", ids[kind]));
    let tree = |kind: &str| root.join("overlay").join(&ids[kind]).join("diff");
    let whole = fs::read(split("cut")).unwrap();
    fs::write(split("cut"), &whole[..whole.len() / 2]).unwrap();
    fs::write(tree("changed").join("changed"), "CHANGED").unwrap();
    fs::remove_dir_all(tree("gone")).unwrap();
    fs::remove_file(split("nosplit")).unwrap();
    fs::create_dir(root.join("overlay").join(&ids["composefs"]).join("composefs-data")).unwrap();
    storage.change(LAYERS, |rows| {
        for row in rows.iter_mut() {
            let id = text(row, "id").to_owned();
            let is = |kind: &str| ids[kind] == id;
            if is("nodiff") {
                row.as_object_mut().unwrap().remove("diff-digest");
            } else if is("circle") {
                row["parent"] = json!(id);
            } else if is("incomplete") {
                row["flags"] = json!({ "incomplete": true });
            } else if is("shifted") {
                row["uidmap"] = json!([{ "container_id": 0, "host_id": 1000, "size": 1 }]);
            }
        }
        rows.push(json!({ "id": 7 }));
        rows.push(json!("no layer"));
        rows.push(json!({ "id": "../../../etc", "diff-digest": format!("sha256:{}", "1".repeat(64)) }));
    });
    let config =
        storage.list(IMAGES).into_iter().find(|row| row["names"][0].as_str().unwrap().contains("config")).unwrap();
    let files = fs::read_dir(root.join("overlay-images").join(text(&config, "id"))).unwrap();
    for file in files.map(|file| file.unwrap().path()) {
        fs::write(file, "{}").unwrap();
    }
    storage.change(IMAGES, |rows| {
        let good = rows.iter_mut().find(|row| row["names"][0].as_str().unwrap().contains("good")).unwrap();
        let digest = format!("localhost/good@sha256:{}", "2".repeat(64));
        good["names"].as_array_mut().unwrap().extend([json!("NO NAME"), json!(digest)]);
        rows.push(json!({ "id": "odd", "names": ["odd:1"] }));
        rows.push(json!(null));
    });
    storage.change(CONTAINERS, |rows| rows.push(json!({ "id": "lost", "layer": "nowhere" })));
    fs::create_dir(root.join("vfs-layers")).unwrap();

    let would = imported::fails(&ply, SOURCE, &["--dry-run", "--containers"], &root);
    let report = imported::fails(&ply, SOURCE, &["--containers"], &root);
    assert_eq!(ended(&report, "failed"), ended(&would, "failed"), "a dry run says it all");
    let layers = items(&report, "layer");
    let reasons: Vec<&str> = layers.values().filter(|(fate, _)| *fate == "failed").map(|(_, why)| *why).collect();
    for why in [
        "tar-split and its files do not fit",
        "no diff ID",
        "are gone",
        "in a circle",
        "not written to its end",
        "it has no tar-split",
        "composefs",
        "its ID is none",
        "expected a string",
        "no layer",
        "what it stands on failed",
    ] {
        assert!(reasons.iter().any(|reason| reason.contains(why)), "{why}: {reasons:#?}");
    }
    let names = items(&report, "name");
    let fate = |name: &str| names[&*format!("localhost/{name}:1")].0;
    for name in ["good", "shifted"] {
        assert_eq!(fate(name), "taken", "{name}: {report:#}");
    }
    for name in kinds.iter().filter(|kind| **kind != "shifted").chain(&["above", "config"]) {
        assert_eq!(fate(name), "failed", "{name}: {report:#}");
    }
    assert_eq!(names["NO NAME"].0, "failed");
    assert!(names.iter().any(|(name, fate)| name.contains('@') && fate.0 == "left"), "{names:?}");
    assert_eq!(items(&report, "directory")["vfs-layers"].0, "left");
    let containers: Vec<&str> = items(&report, "container").into_values().map(|(fate, _)| fate).collect();
    assert_eq!(containers.iter().filter(|fate| **fate == "taken").count(), 1, "{report:#}");
    assert_eq!(containers.len(), 3, "{report:#}");
    assert_eq!(fs::read_to_string(ply.mount("localhost/good:1").path().join("good")).unwrap(), "good");
    ply.ok(args!["fsck", "--read-data"]);

    // What is mended comes with the next import.
    fs::write(split("cut"), whole).unwrap();
    let again = imported::fails(&ply, SOURCE, &[], &root);
    assert_eq!(items(&again, "name")["localhost/cut:1"].0, "taken");
}

#[test]
fn what_is_no_list_is_one_problem_and_another_driver_none() {
    let Some(ply) = store() else { return };
    let Some(storage) = Storage::new(&ply) else { return };
    storage.load(&Image::new("localhost/a:1").layer(&[Member::file("f", "f")], Packing::Plain));
    let root = storage.root();
    let state = State::of(&ply);
    for name in [LAYERS, IMAGES] {
        let whole = fs::read(root.join(name)).unwrap();
        for damaged in [&whole[..whole.len() / 2], b"\xff\0{[", b"{}"] {
            fs::write(root.join(name), damaged).unwrap();
            let report = imported::fails(&ply, SOURCE, &[], &root);
            assert!(items(&report, "file").keys().any(|path| path.ends_with(name)), "{report:#}");
        }
        state.assert_same(&State::of(&ply), "imports of nothing");
        fs::write(root.join(name), whole).unwrap();
    }
    import(&ply, &storage);
    assert_eq!(fs::read_to_string(ply.mount("localhost/a:1").path().join("f")).unwrap(), "f");

    let empty = ply.scratch().dir("empty");
    let said = ply.fails(1, args!["import", SOURCE, &empty]).stderr;
    assert!(said.contains("graphroot"), "{said}");
    fs::create_dir(empty.join("vfs-layers")).unwrap();
    let said = ply.fails(1, args!["import", SOURCE, &empty]).stderr;
    assert!(said.contains("vfs"), "{said}");
}

#[test]
fn another_file_system_needs_copies() {
    let Some(ply) = store() else { return };
    let Some(storage) = Storage::new(&ply) else { return };
    storage.load(&Image::new("localhost/a:1").layer(&[Member::file("f", "f")], Packing::Plain));
    let other = ply.scratch().dir("other");
    tools::run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&other));
    tools::run(Command::new("cp").arg("-a").arg(storage.root()).arg(&other));
    let root = other.join("storage");
    let said = ply.fails(1, args!["import", SOURCE, &root]).stderr;
    assert!(said.contains("--copy"), "{said}");
    let before = Tree::of(&root);
    ply.ok(args!["import", SOURCE, "--copy", &root]);
    Tree::of(&root).assert_same(&before, "the source");
    assert_eq!(fs::read_to_string(ply.mount("localhost/a:1").path().join("f")).unwrap(), "f");
    ply.ok(args!["fsck", "--read-data"]);
}
