//! What must not be believed without looking: what an image says of itself, a record of another parent, a mount that is
//! out of sight.

use std::process::Command;

use plies_testkit::{
    args,
    image::{Image, Packing},
    tar::{Member, archive},
    tools,
};

use crate::common::{Context, busybox, load, store};

#[test]
fn a_cached_step_never_stands_on_a_parent_that_ran_again() {
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let context = Context::new(
        &ply,
        "FROM busybox AS a\nRUN cat /proc/sys/kernel/random/uuid > /f\nFROM a\nRUN cat /f > /g\nRUN true\n",
    );
    context.build(&[]);
    context.build(args!["--no-cache", "--target", "a"]);
    context.build(args!["-t", "mixed:latest"]);
    let shown = ply.ok(args!["run", "mixed", "--", "cat", "/f", "/g"]).stdout;
    let lines: Vec<&str> = shown.lines().collect();
    assert_eq!(lines[0], lines[1], "the step saw what lies below it");
    // What is saved is what ran.
    let saved = ply.scratch().join("mixed.tar");
    ply.ok(args!["save", "-o", saved, "mixed"]);
    ply.ok(args!["rmi", "mixed", "built"]);
    ply.ok(args!["load", "-i", saved]);
    assert_eq!(ply.ok(args!["run", "mixed", "--", "cat", "/f", "/g"]).stdout, shown);
    context.build(&[]).assert_all_cached();
}

#[test]
fn j10_a_diff_id_that_was_refused_is_not_remembered() {
    let (Some(ply), Some(elsewhere)) = (store(), store()) else { return };
    // The diff ID that a step of ours will have: with --link nothing in its layer depends on when it ran.
    let context = Context::new(&ply, "FROM scratch\nCOPY --link f /f\n");
    context.file("f", "mine");
    elsewhere.ok(args!["build", "-t", "mine:1", context.dir]);
    let diff_id = elsewhere.json(args!["inspect", "mine:1"])["diff_ids"][0].as_str().unwrap().to_owned();
    // A blob that is here, and that somebody says to be that layer. It links to a file below it, so it is looked into
    // only after all blobs are kept.
    let base = [Member::dir("d"), Member::file("d/f", "content")];
    let linked = archive(&[Member::hard_link("linked", "d/f")]);
    let image = |name: &str| Image::new(name).layer(&base, Packing::Gzip);
    load(&ply, &image("localhost/true:1").layer_tar(&linked, Packing::Gzip));
    let blob = Packing::Gzip.pack(&linked);
    let lie = image("localhost/lie:1").layer_raw(&diff_id, blob, Packing::Gzip.media_type());
    let path = lie.write_oci_tar(&ply.scratch().join("lie.tar"));
    ply.fails(1, args!["load", "-i", path]);
    context.build(args!["-t", "mine:1"]);
    assert_eq!(ply.json(args!["inspect", "mine:1"])["diff_ids"][0], diff_id.as_str());
    let saved = ply.scratch().join("mine.tar");
    ply.ok(args!["save", "-o", saved, "mine:1"]);
    // A store that was told no lies reads it.
    elsewhere.ok(args!["load", "-i", saved]);
}

#[test]
fn a_mount_that_this_process_cannot_see_is_left_alone() {
    let Some(ply) = store() else { return };
    load(&ply, &Image::new("localhost/shown:1").layer(&[Member::file("f", "content")], Packing::Gzip));
    let mounted = ply.mount("localhost/shown:1");
    ply.ok(args!["rmi", "localhost/shown:1"]);
    let script = format!(
        "umount '{dir}' && '{ply}' --root '{root}' gc --dry-run && '{ply}' --root '{root}' gc",
        dir = mounted.path().display(),
        ply = env!("CARGO_BIN_EXE_ply"),
        root = ply.root().display(),
    );
    tools::run(Command::new("unshare").args(["--mount", "--propagation", "private", "sh", "-c"]).arg(script));
    assert_eq!(std::fs::read_to_string(mounted.path().join("f")).unwrap(), "content");
}

#[test]
fn a_reference_name_that_is_only_a_tag_names_nothing() {
    let Some(ply) = store() else { return };
    let image = Image::new("localhost/named:1").layer(&[Member::file("f", "x")], Packing::Gzip);
    let dir = image.write_oci_dir(&ply.scratch().join("layout"));
    let index = dir.join("index.json");
    let text = std::fs::read_to_string(&index).unwrap();
    let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
    json["manifests"][0]["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": "latest"});
    std::fs::write(&index, json.to_string()).unwrap();
    ply.ok(args!["load", "-i", dir]);
    assert_eq!(ply.json(args!["images"])[0]["names"], serde_json::json!([]));
    ply.ok(args!["load", "--tag", "mine:1", "-i", dir]);
    assert_eq!(ply.json(args!["images"])[0]["names"], serde_json::json!(["mine:1"]));
}
