//! Stores that older versions made, kept as those versions left them (see `examples/old_store.rs` of the test kit),
//! are this version's after the next command.

use std::{collections::BTreeMap, ffi::OsStr, fs, path::Path, process::Command};

use plies_testkit::{
    args,
    kill::{self, KillPoint, Outcome},
    ply::Ply,
    tools,
    tree::Tree,
};
use serde_json::Value;

use crate::common::store;

/// Every store that is kept, unpacked, with what its version said of it.
fn each(mut test: impl FnMut(&str, &Ply, &Value)) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stores");
    let mut tested = 0;
    for entry in fs::read_dir(dir).unwrap() {
        let told = entry.unwrap().path();
        if told.extension() != Some(OsStr::new("json")) {
            continue;
        }
        let Some(ply) = store() else { return };
        let name = told.file_stem().unwrap().to_str().unwrap().to_owned();
        if name.ends_with("-packed") && !ply.has_erofs() {
            continue;
        }
        unpack(&ply, &told.with_extension("tar.zst"));
        test(&name, &ply, &serde_json::from_slice(&fs::read(&told).unwrap()).unwrap());
        tested += 1;
    }
    assert!(tested >= 3, "only {tested} stores are kept");
}

fn unpack(ply: &Ply, archive: &Path) {
    fs::remove_dir_all(ply.root()).ok();
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "--zstd", "-x", "-C"]).arg(ply.scratch().path()).arg("-f").arg(archive);
    assert!(tar.status().unwrap().success());
}

/// All that the old version told is still so.
#[track_caller]
fn assert_all_there(name: &str, ply: &Ply, told: &Value) {
    for (image, told) in told["images"].as_object().unwrap() {
        assert_eq!(ply.json(args!["inspect", image])["id"], told["id"], "{name}: {image}");
        let tree = Tree::of(ply.mount(image).path()).without_root();
        let files: BTreeMap<&str, String> = tree.names().map(|file| (file, format!("{:?}", tree.get(file)))).collect();
        assert_eq!(serde_json::to_value(files).unwrap(), told["files"], "{name}: {image}");
    }
    let record = told["record"].as_str().unwrap();
    let mounted = ply.mount_with(record, args!["--rw"]);
    assert_eq!(fs::read_to_string(mounted.path().join("written")).unwrap(), "in a cache", "{name}");
    drop(mounted);
    if let Some(chain) = told["chain"].as_str() {
        let layers = ply.json(args!["layer", "ls"]);
        assert!(layers.as_array().unwrap().iter().any(|layer| layer["chain_id"] == chain), "{name}: {layers:#}");
        assert_eq!(ply.ok(args!["layer", "rw", "changes", "box"]).stdout.trim(), "A /written", "{name}");
    }
}

#[test]
fn stores_of_every_older_version_are_brought_up_and_lose_nothing() {
    each(|name, ply, told| {
        let schema: usize = name.split('-').nth(1).unwrap().parse().unwrap();
        let step = format!("from schema {schema} to 3");
        let plan = ply.json(args!["migrate", "--dry-run"]);
        assert_eq!(plan["from"], schema);
        assert_eq!(plan["steps"].as_array().unwrap().len(), 3 - schema, "{plan:#}");
        let would = ply.ok(args!["migrate", "--dry-run"]).stdout;
        assert!(would.contains("from schema 2 to 3") && would.contains("Would keep"), "{would}");
        let first = ply.ok(args!["images"]);
        assert!(first.stderr.contains(&format!("migrated {step}")), "{name}: {}", first.stderr);
        assert_eq!(ply.ok(args!["images"]).stderr, "", "{name}");
        assert!(ply.ok(args!["migrate"]).stdout.contains("nothing to do"));
        // Nothing that this version keeps in step was forgotten: a finding would be exit code 1.
        ply.ok(args!["fsck", "--read-data"]);
        assert_all_there(name, ply, told);
        // Its layers were directories by default, so they stay that.
        let driver = ply.json(args!["--driver", "auto", "info"])["driver"].clone();
        assert!(driver.as_str().unwrap().starts_with("overlay"), "{name}: {driver}");
        // Going back is possible: the old catalogue is as it was.
        let database = ply.root().join("catalog/plies.redb");
        fs::rename(database.with_extension(format!("redb.schema-{schema}")), database).unwrap();
        assert!(ply.ok(args!["--driver", "auto", "migrate"]).stdout.contains(&format!("migrated {step}")));
        assert_all_there(name, ply, told);
        ply.ok(args!["gc"]);
        assert_all_there(name, ply, told);
        ply.ok(args!["fsck", "--read-data"]);
        let usage = ply.json(args!["du"]);
        assert_eq!(usage["totals"]["orphans"], 0, "{name}: {usage:#}");
    });
}

#[test]
fn a_migration_killed_anywhere_leaves_a_store_that_can_be_migrated() {
    if !tools::have(&["strace"]) {
        return;
    }
    let stores = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stores");
    let Some(ply) = store() else { return };
    let archive = stores.join("schema-1.tar.zst");
    let told: Value = serde_json::from_slice(&fs::read(stores.join("schema-1.json")).unwrap()).unwrap();
    let command = args!["migrate"];
    unpack(&ply, &archive);
    let counts = kill::count(&ply.command(command), &ply.scratch().join("strace.log"));
    let points: Vec<KillPoint> = kill::spread(&counts, crate::crash::points_per_call());
    assert!(points.len() > 10, "too few moments to die at: {counts:?}");
    let mut killed = 0;
    for point in &points {
        unpack(&ply, &archive);
        if matches!(kill::kill_at(&ply.command(command), point), Outcome::Killed) {
            killed += 1;
        }
        assert_all_there(&point.to_string(), &ply, &told);
        assert!(!ply.root().join("catalog/plies.redb.migrating").exists(), "left after {point}");
        assert!(ply.root().join("catalog/plies.redb.schema-1").exists(), "nothing kept after {point}");
    }
    assert!(killed * 2 > points.len(), "most moments were never reached: {killed} of {}", points.len());
}
