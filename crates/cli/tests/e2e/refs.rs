//! Records by hand: merge, diff, export, pin, and what stands on what.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use plies_testkit::{
    args,
    image::{Image, Packing},
    ply::Ply,
    tar::Member,
    tools,
    tree::Tree,
};

use crate::common::{Shape, load, store, tree_of};

/// Makes a record by writing into a mutable one on `parent`, and gives its ID.
#[track_caller]
fn record(ply: &Ply, parent: Option<&str>, write: impl FnOnce(&Path)) -> String {
    let new = match parent {
        Some(parent) => ply.ok(args!["ref", "new", "--parent", parent]),
        None => ply.ok(args!["ref", "new"]),
    };
    let id = new.stdout.trim().to_owned();
    {
        let mounted = ply.mount_with(&id, args!["--rw"]);
        write(mounted.path());
    }
    let committed = ply.ok(args!["ref", "commit", id]).stdout.trim().to_owned();
    assert!(!ply.run(args!["ref", "inspect", id]).status.success(), "the mutable record is gone");
    committed
}

#[track_caller]
fn print(ply: &Ply, command: &[std::ffi::OsString]) -> String {
    ply.ok(command).stdout.trim().to_owned()
}

#[test]
fn a_merge_shows_all_and_copies_nothing() {
    let Some(ply) = store() else { return };
    let base = Image::new("localhost/base:1")
        .layer(&[Member::dir("tmp").mode(0o1777), Member::file("f", "base")], Packing::Gzip);
    load(&ply, &base);
    let a = record(&ply, None, |root| {
        fs::create_dir(root.join("tmp")).unwrap();
        fs::write(root.join("tmp/a"), "a").unwrap();
        fs::write(root.join("f"), "a").unwrap();
    });
    let b = record(&ply, None, |root| fs::write(root.join("f"), "b").unwrap());
    let shape = Shape::of(&ply);
    let merged = print(&ply, args!["ref", "merge", "localhost/base:1", a, b]);
    assert_eq!(Shape::of(&ply), shape, "a merge is a list");
    assert_eq!(print(&ply, args!["ref", "merge", "localhost/base:1", a, b]), merged, "and is found again");
    {
        let mounted = ply.mount(&merged);
        assert_eq!(fs::read_to_string(mounted.path().join("f")).unwrap(), "b");
        assert!(mounted.path().join("tmp/a").exists());
    }
    assert_eq!(print(&ply, args!["ref", "merge", a]), a, "a merge of one is that one");
    let nested = print(&ply, args!["ref", "merge", print(&ply, args!["ref", "merge", "localhost/base:1", a]), b]);
    assert_eq!(nested, merged, "merges are flat");
    let ran = ply.fails(1, args!["ref", "rm", a]);
    assert!(ran.stderr.contains("is the parent of"), "{ran}");
    ply.ok(args!["ref", "rm", merged]);
}

#[test]
fn a_diff_leads_from_one_tree_to_another() {
    let Some(ply) = store() else { return };
    let base = record(&ply, None, |root| {
        fs::write(root.join("kept"), "kept").unwrap();
        fs::write(root.join("gone"), "gone").unwrap();
    });
    let one = record(&ply, Some(&base), |root| fs::remove_file(root.join("gone")).unwrap());
    let two = record(&ply, Some(&one), |root| fs::write(root.join("new"), "new").unwrap());
    let other = record(&ply, None, |root| {
        fs::write(root.join("kept"), "other").unwrap();
        fs::create_dir(root.join("dir")).unwrap();
        fs::set_permissions(root.join("dir"), fs::Permissions::from_mode(0o700)).unwrap();
    });

    // Of records that stand on each other: the layers in between.
    let shape = Shape::of(&ply);
    let steps = print(&ply, args!["ref", "diff", base, two]);
    assert_eq!(Shape::of(&ply), shape, "no layer was made");
    let again = print(&ply, args!["ref", "merge", base, steps]);
    tree_of(&ply, &again).assert_same(&tree_of(&ply, &two), "base and what leads to two");

    // Of records that don't: a layer of its own.
    let across = print(&ply, args!["ref", "diff", two, other]);
    let there = print(&ply, args!["ref", "merge", two, across]);
    tree_of(&ply, &there).assert_same(&tree_of(&ply, &other), "two and what leads to other");

    assert_eq!(print(&ply, args!["ref", "diff", "-", other]), other, "from nothing to a tree leads that tree");
    ply.fails(1, args!["ref", "diff", "nothing", other]);
}

#[test]
fn what_is_exported_is_a_layer_that_others_unpack() {
    let Some(ply) = store() else { return };
    let base = record(&ply, None, |root| fs::write(root.join("base"), "base").unwrap());
    let top = record(&ply, Some(&base), |root| {
        fs::remove_file(root.join("base")).unwrap();
        fs::create_dir(root.join("d")).unwrap();
        fs::write(root.join("d/top"), "top").unwrap();
    });
    let scratch = ply.scratch().dir("out");
    let list = |path: &Path| {
        let ran = tools::run(std::process::Command::new("tar").arg("-tf").arg(path));
        ran.lines().map(|line| line.trim_end_matches('/').to_owned()).collect::<Vec<_>>()
    };
    for name in ["layer.tar", "layer.tar.gz", "layer.tar.zst"] {
        let path = scratch.join(name);
        ply.ok(args!["ref", "export", top, "-o", path]);
        let names = list(&path);
        assert!(
            names.iter().any(|name| name.ends_with(".wh.base")) && names.iter().any(|name| name.ends_with("d/top")),
            "{names:?}"
        );
    }
    let merged =
        print(&ply, args!["ref", "merge", base, record(&ply, None, |root| fs::write(root.join("x"), "x").unwrap())]);
    let path = scratch.join("tree.tar");
    ply.ok(args!["ref", "export", merged, "-o", path]);
    let names = list(&path);
    assert!(
        names.iter().any(|name| name.ends_with("base")) && names.iter().any(|name| name.ends_with('x')),
        "{names:?}"
    );
    assert_eq!(fs::read_dir(&scratch).unwrap().count(), 4, "no partial file is left");
}

#[test]
fn records_tell_what_they_stand_on_and_can_be_pinned() {
    let Some(ply) = store() else { return };
    let base = record(&ply, None, |root| fs::write(root.join("f"), "f").unwrap());
    let top = record(&ply, Some(&base), |root| fs::write(root.join("g"), "g").unwrap());
    let shown = ply.json(args!["ref", "inspect", top]);
    assert_eq!(shown["parents"], serde_json::json!([base]));
    assert_eq!(shown["state"], "immutable");
    assert_eq!(shown["pinned"], false);
    ply.ok(args!["ref", "pin", &top[..8]]);
    assert_eq!(ply.json(args!["ref", "inspect", top])["pinned"], true);
    ply.ok(args!["ref", "unpin", top]);
    assert_eq!(ply.json(args!["ref", "inspect", top])["pinned"], false);
    let tree = ply.json(args!["tree", top]);
    assert!(tree[0]["label"].as_str().unwrap().contains(&top[..12]), "{tree:#}");
    assert!(tree[0]["children"][0]["label"].as_str().unwrap().contains(&base[..12]), "{tree:#}");
    let _ = Tree::of(ply.mount(&top).path());
    assert_eq!(print(&ply, args!["ref", "get", top]), top);
    ply.fails(1, args!["ref", "get", "ffffffff"]);
    ply.ok(args!["ref", "rm", top, base]);
    assert_eq!(ply.json(args!["ref", "ls"]), serde_json::json!([]));
}

#[test]
fn prune_takes_what_nothing_keeps_and_says_why_the_rest_stays() {
    let Some(ply) = store() else { return };
    ply.ok(args!["ref", "ls"]);
    let empty = Shape::of(&ply);
    let base = record(&ply, None, |root| fs::write(root.join("f"), "f").unwrap());
    let top = record(&ply, Some(&base), |root| fs::write(root.join("g"), "g").unwrap());
    let other = record(&ply, None, |root| fs::write(root.join("h"), vec![b'h'; 100_000]).unwrap());
    ply.ok(args!["ref", "pin", top]);

    let state = Shape::of(&ply);
    let planned = ply.json(args!["prune", "--dry-run"]);
    assert_eq!(Shape::of(&ply), state, "a dry run touches nothing");
    let stays = |id: &str| {
        let rows = planned["records"].as_array().unwrap();
        rows.iter().find(|row| row["id"] == *id).unwrap()["stays"].clone()
    };
    assert_eq!(stays(&other), serde_json::Value::Null);
    assert_eq!(stays(&top), "pinned");
    assert_eq!(stays(&base), "another record that stays stands on it");

    ply.ok(args!["prune", "--filter", "description~=nothing-like-it"]);
    assert_eq!(ply.json(args!["ref", "ls"]).as_array().unwrap().len(), 3);
    let ran = ply.fails(1, args!["prune", "--filter", "id~=("]);
    assert!(ran.stderr.contains("failed to parse prune filters"), "{ran}");
    ply.fails(2, args!["prune", "--keep-duration", "soon"]);

    let done = ply.json(args!["prune", "--force"]);
    assert_eq!(done["removed_count"], planned["removed_count"], "what a dry run promises, the run does");
    assert!(done["freed_bytes"].as_u64().unwrap() >= 100_000, "{done:#}");
    let left = ply.json(args!["ref", "ls"]);
    let mut ids: Vec<&str> = left.as_array().unwrap().iter().map(|record| record["id"].as_str().unwrap()).collect();
    ids.sort_unstable();
    let mut kept = [base.as_str(), top.as_str()];
    kept.sort_unstable();
    assert_eq!(ids, kept);
    ply.ok(args!["ref", "unpin", top]);
    ply.ok(args!["prune", "--force"]);
    assert_eq!(ply.json(args!["ref", "ls"]), serde_json::json!([]));
    assert_eq!(Shape::of(&ply), empty);
}
