//! Wrong usage, what commands print about what they did, and lists with something damaged in them.

use std::{fs, process::Command};

use plies_testkit::{
    args,
    image::{Image, Packing},
    ply::{Ply, Ran},
    tar::Member,
    tools,
};
use serde_json::json;

use crate::common::{Context, busybox, load, store};

fn small(tag: &str, content: &str) -> Image {
    Image::new(tag).layer(&[Member::file("f", content)], Packing::Gzip)
}

#[test]
fn wrong_usage_is_told_before_a_store_is_made() {
    let ply = Ply::new(env!("CARGO_BIN_EXE_ply"));
    for command in [
        args!["run", "--executor", "nosuch", "x"],
        args!["build", "--executor", "nosuch", "."],
        args!["build", "-t", "Not A Name", "."],
        args!["load", "--tag", "UPPER:1"],
        args!["tag", "x", "UPPER:1"],
        args!["tag", "x", format!("sha256:{}", "0a".repeat(32))],
        args!["tag", "x", "sha256"],
        args!["load", "--tag", format!("sha256:{}", "0a".repeat(32))],
        args!["build", "-t", "sha256:1", "."],
        args!["build", "--label", "=x", "."],
        args!["build", "--label", "", "."],
        args!["build", "--build-arg", "=x", "."],
        args!["save", "--format", "oci-dir", "x"],
        args!["save", "--format", "oci-dir", "-o", "-", "x"],
    ] {
        let ran = ply.fails(2, command);
        assert!(ran.stderr.contains("error:") && ran.stdout.is_empty(), "{command:?}: {ran}");
        assert!(!ply.root().exists(), "{command:?}");
    }
}

#[test]
fn an_archive_is_neither_read_from_nor_written_to_a_terminal() {
    if !tools::have(&["script"]) {
        return;
    }
    let ply = Ply::new(env!("CARGO_BIN_EXE_ply"));
    for command in ["load", "save x"] {
        let line = format!("{} --root {} {command}", env!("CARGO_BIN_EXE_ply"), ply.root().display());
        let output = tools::output_of(Command::new("script").args(["-qec", &line, "/dev/null"]));
        assert_eq!(output.status.code(), Some(2), "{command}: {}", String::from_utf8_lossy(&output.stdout));
        assert!(!ply.root().exists());
    }
}

#[test]
fn a_label_without_a_value_is_empty() {
    let Some(ply) = store() else { return };
    Context::new(&ply, "FROM scratch\nCOPY Dockerfile /\n").build(args!["--label", "bare", "--label", "a=b=c"]);
    assert_eq!(ply.json(args!["inspect", "built"])["config"]["config"]["Labels"], json!({"bare": "", "a": "b=c"}));
}

#[test]
fn what_is_removed_twice_is_removed_once_and_told_as_json() {
    let Some(ply) = store() else { return };
    let image = small("localhost/small:1", "x");
    load(&ply, &image);
    let id = image.id();
    assert_eq!(ply.json(args!["tag", image.tag(), "other:1"]), json!({"id": id, "name": "other:1"}));
    ply.ok(args!["rmi", "other:1"]);
    assert_eq!(
        ply.json(args!["rmi", image.tag(), image.tag(), id]),
        json!({"removed": [{"kind": "name", "id": image.tag()}, {"kind": "image", "id": id}]})
    );
    let record = ply.json(args!["ref", "new"])["id"].as_str().unwrap().to_owned();
    let record = ply.json(args!["ref", "commit", record])["id"].as_str().unwrap().to_owned();
    assert_eq!(ply.json(args!["ref", "rm", record, record]), json!({"removed": [{"kind": "record", "id": record}]}));
}

#[test]
fn a_record_that_is_mounted_for_writing_is_not_removed() {
    let Some(ply) = store() else { return };
    let id = ply.ok(args!["ref", "new"]).stdout.trim().to_owned();
    let mounted = ply.mount_with(&id, args!["--rw"]);
    let ran = ply.fails(1, args!["ref", "rm", id]);
    assert!(ran.stderr.contains(&*mounted.path().to_string_lossy()), "{ran}");
    ply.ok(args!["ref", "inspect", id]);
    drop(mounted);
    ply.ok(args!["ref", "rm", id]);
}

#[test]
fn one_damaged_image_hides_no_other() {
    let Some(ply) = store() else { return };
    let (bad, good) = (small("localhost/bad:1", "bad"), small("localhost/good:1", "good"));
    load(&ply, &bad);
    load(&ply, &good);
    let hex = bad.id().strip_prefix("sha256:").unwrap().to_owned();
    fs::remove_file(ply.root().join("content/blobs/sha256").join(&hex)).unwrap();
    let ran = ply.fails(1, args!["images"]);
    assert!(ran.stdout.contains("localhost/good") && ran.stdout.contains("localhost/bad"), "{ran}");
    assert_eq!(ran.stderr, "ply: 1 of these is damaged\n");
    // One word in the column of times, so that the table stays one; why is for `--json`.
    let column = ran.stdout.find("CREATED").unwrap();
    let row = ran.stdout.lines().find(|line| line.starts_with("localhost/bad")).unwrap();
    assert_eq!(row[column..].split("  ").next(), Some("damaged"), "{ran}");
    let ran = ply.fails(1, args!["images", "--json"]);
    let images: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let errors: Vec<_> = images.as_array().unwrap().iter().filter(|image| image["error"].is_string()).collect();
    assert!(errors.len() == 1 && errors[0]["id"] == json!(bad.id()), "{images:#}");
    assert!(ply.fails(1, args!["images", "-q"]).stdout.lines().count() == 2);
    ply.ok(args!["tree"]);
    ply.ok(args!["du"]);
}

#[test]
fn what_a_mutable_record_takes_is_listed_and_adds_up() {
    let Some(ply) = store() else { return };
    let id = ply.ok(args!["ref", "new", "--description", "scratchpad"]).stdout.trim().to_owned();
    {
        let mounted = ply.mount_with(&id, args!["--rw"]);
        fs::write(mounted.path().join("f"), vec![1; 300_000]).unwrap();
    }
    assert!(ply.json(args!["ref", "ls"])[0]["size_bytes"].as_u64().unwrap() >= 300_000);
    let usage = ply.json(args!["du"]);
    let rows = usage["rows"].as_array().unwrap();
    let active = rows.iter().find(|row| row["kind"] == "active").unwrap();
    assert!(active["size_bytes"].as_u64().unwrap() >= 300_000 && active["users_count"] == 1, "{usage:#}");
    assert!(active["description"].as_str().unwrap().ends_with("scratchpad"), "{usage:#}");
    assert_eq!(active["size_bytes"], usage["totals"]["actives"], "{usage:#}");
    assert!(rows.iter().all(|row| (row["kind"] == "blob") == row["users_count"].is_null()), "{usage:#}");
}

#[test]
fn gc_tells_kind_id_and_size_and_info_tells_sizes_for_people() {
    let Some(ply) = store() else { return };
    load(&ply, &small("localhost/small:1", "x"));
    ply.ok(args!["ref", "new"]);
    let none = ply.json(args!["gc"]);
    assert_eq!(none, json!({"removed": [], "total_bytes": 0}));
    let info = ply.ok(args!["info"]).stdout;
    let disk = info.lines().find(|line| line.starts_with("disk:")).unwrap();
    assert!(disk.ends_with('B'), "{info}");
}

#[test]
fn the_cause_of_a_failed_step_stands_before_what_is_quoted() {
    let Some(ply) = store() else { return };
    if !busybox(&ply) {
        return;
    }
    let ran = Context::new(&ply, "FROM busybox\nRUN exit 42\n").build_fails(&[]);
    let told = ran.stderr.lines().find(|line| line.starts_with("ply: ")).unwrap();
    assert!(told.contains("Dockerfile:2") && told.contains("42"), "{ran}");
    let caret = ran.stderr.lines().find(|line| line.contains('^'));
    assert!(caret.is_none_or(|line| line.ends_with('^')), "{ran}");
}

#[test]
fn nothing_is_mounted_over_the_store() {
    let Some(ply) = store() else { return };
    load(&ply, &small("localhost/small:1", "x"));
    let linked = ply.scratch().join("linked");
    std::os::unix::fs::symlink(ply.root(), &linked).unwrap();
    let inside = ply.root().join("layers");
    for (root, dir) in [
        (ply.root(), ply.root()),
        (ply.root(), inside.clone()),
        (ply.root(), ply.scratch().path().to_owned()),
        (ply.root(), linked.clone()),
        (linked.clone(), inside),
        (linked.clone(), linked),
    ] {
        for options in [args![], args!["--rw"]] {
            let mut command = ply.command(&[args!["mount", "localhost/small:1", dir], options].concat());
            let ran = Ran::of(command.args(args!["--root", root]));
            assert_eq!(ran.status.code(), Some(1), "{}: {ran}", dir.display());
            assert!(ran.stderr.contains("state directory"), "{}: {ran}", dir.display());
            assert_eq!(plies_testkit::scratch::mounts_below(ply.scratch().path()), Vec::<std::path::PathBuf>::new());
        }
    }
    // Beside it, and with a name that only begins like its own.
    ply.ok(args!["mount", "localhost/small:1", ply.scratch().dir("root-beside")]);
    ply.ok(args!["umount", ply.scratch().join("root-beside")]);
}
