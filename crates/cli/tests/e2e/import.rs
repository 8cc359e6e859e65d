//! `ply import buildkit`, on real roots of BuildKit and on made ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use plies_testkit::buildkit::{ACTIVE, COMMITTED, Worker};
use plies_testkit::image::{Image, Packing};
use plies_testkit::kill::{self, Outcome};
use plies_testkit::ply::Ply;
use plies_testkit::tar::{self, Member};
use plies_testkit::tree::Tree;
use plies_testkit::{args, sha256_hex, tools};
use serde_json::{Value, json};

use crate::common::{Built, State, Step, store};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures/buildkit").join(name)
}

/// A real root, unpacked beside the store.
fn root(ply: &Ply, name: &str) -> PathBuf {
    let dir = ply.scratch().dir(name);
    let mut tar = Command::new("tar");
    tar.args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xzf"]);
    tools::run(tar.arg(fixture(&format!("{name}.tar.gz"))).arg("-C").arg(&dir));
    dir
}

fn import(ply: &Ply, path: &Path) -> Value {
    let report = ply.json(args!["import", "buildkit", path]);
    // Every layer gives its tar back, whatever BuildKit's tar looked like.
    ply.ok(args!["fsck", "--read-data"]);
    report
}

/// The items of a report that ended so, by name.
fn items<'r>(report: &'r Value, outcome: &str) -> BTreeMap<&'r str, &'r Value> {
    let items = report["items"].as_array().unwrap();
    let items = items.iter().filter(|item| item["outcome"] == outcome);
    items.map(|item| (item["name"].as_str().unwrap(), item)).collect()
}

fn names(report: &Value, outcome: &str) -> BTreeSet<String> {
    items(report, outcome).into_keys().map(str::to_owned).collect()
}

/// What BuildKit's own listing says of each record: its fields by their names.
fn du(name: &str) -> BTreeMap<String, BTreeMap<String, String>> {
    let text = fs::read_to_string(fixture(name)).unwrap();
    let mut rows = BTreeMap::new();
    for block in text.split("\n\n").filter(|block| block.trim_start().starts_with("ID:")) {
        let fields = block.lines().filter_map(|line| line.split_once(':'));
        let row: BTreeMap<_, _> = fields.map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect();
        rows.insert(row["ID"].clone(), row);
    }
    rows
}

fn assert_shows(ply: &Ply, record: &str, archive: &str) {
    let other = Ply::new(env!("CARGO_BIN_EXE_ply"));
    other.ok(args!["load", "-i", fixture(archive), "--tag", "exported"]);
    let images = other.json(args!["images"]);
    let image = images[0]["id"].as_str().unwrap();
    let theirs = other.mount(image);
    let theirs = Tree::of(theirs.path()).map(|_, node| node.links = 0).without_root();
    let ours = ply.mount(record);
    let ours = Tree::of(ours.path()).map(|name, node| {
        // Files may have names in the source as well, and an archive has times in seconds, cut off or rounded.
        node.links = 0;
        if let Some(archived) = theirs.find(name).filter(|archived| (archived.mtime.0 - node.mtime.0).abs() <= 1) {
            node.mtime = archived.mtime;
        }
    });
    ours.without_root().assert_same(&theirs, archive);
}

/// Diff IDs of the image in an OCI archive.
fn diff_ids(archive: &str) -> Vec<String> {
    let other = Ply::new(env!("CARGO_BIN_EXE_ply"));
    other.ok(args!["load", "-i", fixture(archive), "--tag", "exported"]);
    let images = other.json(args!["images"]);
    let details = other.json(args!["inspect", images[0]["id"].as_str().unwrap()]);
    serde_json::from_value(details["diff_ids"].clone()).unwrap()
}

/// The context that the real roots were built from; `t` is in them.
fn context(ply: &Ply, root: &Path, dockerfile: &str) -> PathBuf {
    let dir = ply.scratch().dir("context");
    let snapshots = root.join("runc-overlayfs/snapshots/snapshots");
    let found = fs::read_dir(&snapshots).unwrap().map(|entry| entry.unwrap().path().join("fs/t"));
    let t = found.into_iter().find(|path| path.is_file()).unwrap();
    fs::copy(t, dir.join("t")).unwrap();
    let write = |name: &str, text: &[u8]| {
        let path = ply.scratch().file(Path::new("context").join(name), text);
        fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    };
    write("src/a", b"a\n");
    write("src/b", b"b\n");
    write("Dockerfile", &fs::read(fixture(dockerfile)).unwrap());
    fs::set_permissions(dir.join("src"), fs::Permissions::from_mode(0o755)).unwrap();
    dir
}

fn build(ply: &Ply, dir: &Path) -> Built {
    let secret = ply.scratch().file("secret", "s");
    let secret = format!("id=s,src={}", secret.display());
    Built::of(ply.ok(args!["build", "--progress", "plain", "--explain", "-t", "built", "--secret", secret, dir]))
}

/// Records as BuildKit lists them and as they are here: all that it says of one is said here too.
fn assert_listed(ply: &Ply, report: &Value, listed: &str) {
    let records = ply.json(args!["ref", "ls"]);
    let records: BTreeMap<&str, &Value> =
        records.as_array().unwrap().iter().map(|record| (record["id"].as_str().unwrap(), record)).collect();
    let taken = items(report, "taken");
    let id_of = |name: &str| taken.get(name).map(|item| item["id"].as_str().unwrap());
    for (name, row) in du(listed) {
        // BuildKit shows a pair by its mutable record; what is not retained comes over as the other one.
        let (record, is_partner) = match id_of(&name) {
            Some(id) => (records[id], false),
            None => {
                let why = items(report, "left")[name.as_str()]["why"].as_str().unwrap().to_owned();
                let partner = why.rsplit(' ').next().unwrap().to_owned();
                (records[id_of(&partner).unwrap_or_else(|| panic!("{name}: {why}"))], true)
            }
        };
        assert_eq!(record["description"], row["Description"], "{name}");
        assert_eq!(record["usage_count"].to_string(), row["Usage count"], "{name}");
        let kind = if is_partner { "regular" } else { &row["Type"] };
        assert_eq!(record["record_type"], kind, "{name}");
        let mutable = if is_partner { "false" } else { &row["Mutable"] };
        assert_eq!((record["state"] == "mutable").to_string(), mutable, "{name}");
        let seconds = |time: &str| time.replace(' ', "T")[..19].to_owned();
        if !is_partner {
            assert_eq!(seconds(record["created"].as_str().unwrap()), seconds(&row["Created at"]), "{name}");
            assert_eq!(seconds(record["last_used"].as_str().unwrap()), seconds(&row["Last used"]), "{name}");
        }
        let parents = row.get("Parents").or(row.get("Parent")).map(String::as_str).unwrap_or_default();
        let parents: Vec<&str> =
            parents.split(';').filter(|name| !name.is_empty()).map(|name| id_of(name).unwrap()).collect();
        assert_eq!(record["parents"], json!(parents), "{name}");
    }
}

#[test]
fn a_root_of_version_1_comes_over_with_trees_records_and_diff_ids() {
    let Some(ply) = store() else { return };
    let source = root(&ply, "v1-root");
    let before = Tree::of(&source);
    let report = import(&ply, &source);
    assert_eq!(names(&report, "failed"), BTreeSet::new(), "{report:#}");
    assert_listed(&ply, &report, "v1.du.txt");
    let taken = items(&report, "taken");
    assert_shows(&ply, taken["smkctz3g0sxytyvh9dayitkfc"]["id"].as_str().unwrap(), "v1.oci.tar");
    let chain = ["lw0h", "w6wl", "kx8v", "qdq8", "lm33", "smkc"];
    let found: Vec<_> = chain
        .iter()
        .map(|start| {
            let id = taken.iter().find(|(name, _)| name.starts_with(start)).unwrap().1["id"].as_str().unwrap();
            ply.json(args!["ref", "inspect", id])["diff_id"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(found, diff_ids("v1.oci.tar"));

    // Files have one name more, where they lie in both.
    let same = |tree: Tree| tree.map(|_, node| node.links = 0);
    same(Tree::of(&source)).assert_same(&same(before), "the source");
    let snapshots = source.join("runc-overlayfs/snapshots/snapshots");
    let ts = fs::read_dir(&snapshots).unwrap().map(|entry| entry.unwrap().path().join("fs/bin/t"));
    let linked = ts.filter_map(|t| fs::metadata(t).ok()).filter(|meta| meta.nlink() == 2).count();
    assert!(linked > 0, "it was linked, not copied");
}

#[test]
fn c01_if_there_is_a_file_of_version_2_the_other_is_not_looked_at() {
    let Some(ply) = store() else { return };
    let source = root(&ply, "mig-root");
    fs::write(source.join("runc-overlayfs/metadata.db"), "no database").unwrap();
    // A worker's own directory is as good as the daemon's.
    let report = import(&ply, &source.join("runc-overlayfs"));
    assert_eq!(names(&report, "failed"), BTreeSet::new(), "{report:#}");
    assert_listed(&ply, &report, "mig.du.txt");
    assert_shows(&ply, items(&report, "taken")["smkctz3g0sxytyvh9dayitkfc"]["id"].as_str().unwrap(), "v1.oci.tar");
    assert!(report["keys_count"].as_u64().unwrap() > 5, "the solver's keys lie beside the worker: {report:#}");
}

/// BuildKit worked on a copy that it then put in place; we need neither.
#[test]
fn c02_and_c12_nothing_of_the_source_is_written_and_each_row_is_told_once() {
    let Some(ply) = store() else { return };
    let source = root(&ply, "v1-root");
    // What an earlier try of BuildKit's left is nobody's business.
    fs::write(source.join("runc-overlayfs/metadata_v2.db.tmp"), "half a copy").unwrap();
    let whole = |tree: Tree| tree.map(|_, node| node.links = 0);
    let before = whole(Tree::of(&source));
    let report = import(&ply, &source);
    whole(Tree::of(&source)).assert_same(&before, "the source: the old database stays, and no other appears");
    let told: Vec<&str> =
        report["items"].as_array().unwrap().iter().map(|item| item["name"].as_str().unwrap()).collect();
    let rows = flate2::read::GzDecoder::new(fs::File::open(fixture("v1.metadata.json.gz")).unwrap());
    let rows: Value = serde_json::from_reader(rows).unwrap();
    let rows: Vec<&str> = rows["_main"].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(told, rows);
}

/// BuildKit held everything by its new leases before it took the old roots away. Here each record holds its own from the
/// transaction on in which it appears: with the source gone, no collection takes anything.
#[test]
fn c12_what_came_over_is_held_without_the_source() {
    let Some(ply) = store() else { return };
    let source = root(&ply, "v1-root");
    let report = import(&ply, &source);
    fs::remove_dir_all(&source).unwrap();
    ply.ok(args!["gc"]);
    ply.ok(args!["fsck", "--read-data"]);
    let taken = items(&report, "taken");
    assert_shows(&ply, taken["smkctz3g0sxytyvh9dayitkfc"]["id"].as_str().unwrap(), "v1.oci.tar");
    for item in taken.values() {
        let id = item["id"].as_str().unwrap();
        let is_mutable = ply.json(args!["ref", "inspect", id])["state"] == "mutable";
        drop(if is_mutable { ply.mount_with(id, args!["--rw"]) } else { ply.mount(id) });
    }
}

/// BuildKit of 2026 refuses such a root, and advises to start an older version of it first.
#[test]
fn c13_a_root_of_version_1_alone_is_read_as_it_is() {
    let Some(ply) = store() else { return };
    let source = root(&ply, "v1-root");
    assert!(!source.join("runc-overlayfs/metadata_v2.db").exists());
    let (one, migrated) = (import(&ply, &source), {
        let other = Ply::new(env!("CARGO_BIN_EXE_ply"));
        import(&other, &root(&other, "mig-root"))
    });
    // What comes over is what comes over from the copy of it that BuildKit migrated.
    for outcome in ["taken", "left", "failed"] {
        assert_eq!(names(&one, outcome), names(&migrated, outcome), "{outcome}");
    }
    assert_eq!(one["keys_count"], migrated["keys_count"]);
    let ids = |report: &Value| items(report, "taken").values().map(|item| item["id"].clone()).collect::<Vec<_>>();
    assert_eq!(ids(&one), ids(&migrated));
}

#[test]
fn a_root_of_version_2_comes_over_with_merges_variants_and_cache_mounts() {
    let Some(ply) = store() else { return };
    let source = root(&ply, "v2-root");
    let report = import(&ply, &source);
    assert_eq!(names(&report, "failed"), BTreeSet::new(), "{report:#}");
    assert_listed(&ply, &report, "v2.du.txt");
    let taken = items(&report, "taken");
    for archive in ["v2.oci.tar", "v2.zst.oci.tar"] {
        assert_shows(&ply, taken["v64jhquzfvsz8gntmwg48jg8p"]["id"].as_str().unwrap(), archive);
    }
    let cache = taken["dls2du0ud1fp8rj0gq1247hcy"]["id"].as_str().unwrap();
    assert_eq!(fs::read_to_string(ply.mount_with(cache, args!["--rw"]).path().join("x")).unwrap(), "x");
    // Gzip and zstd of each layer, each checked.
    assert_eq!(report["blobs_count"], 14, "{report:#}");

    // The same record a second time is the same record, and its bytes are.
    let state = State::of(&ply);
    let again = import(&ply, &source);
    state.assert_same(&State::of(&ply), "a second import");
    assert_eq!(names(&again, "taken"), BTreeSet::new());
    assert_eq!(names(&again, "here"), names(&report, "taken"));
    assert_eq!(
        (&again["layers_count"], &again["blobs_count"], &again["keys_count"]),
        (&json!(0), &json!(0), &json!(0))
    );
}

#[test]
fn the_same_dockerfile_then_builds_with_every_step_cached() {
    for (name, dockerfile, archive) in
        [("v1-root", "chain.Dockerfile", "v1.oci.tar"), ("v2-root", "merge.Dockerfile", "v2.oci.tar")]
    {
        let Some(ply) = store() else { return };
        let source = root(&ply, name);
        let dir = context(&ply, &source, dockerfile);
        import(&ply, &source);
        let built = build(&ply, &dir);
        built.assert_all_cached();
        let details = ply.json(args!["inspect", "built"]);
        assert_eq!(details["diff_ids"], json!(diff_ids(archive)), "{name}: it is the same image");
        build(&ply, &dir).assert_all_cached();
    }
}

#[test]
fn what_differs_in_anything_that_buildkit_goes_by_is_never_taken_for_the_same() {
    let Some(ply) = store() else { return };
    let source = root(&ply, "v2-root");
    let dir = context(&ply, &source, "merge.Dockerfile");
    import(&ply, &source);
    let original = fs::read_to_string(dir.join("Dockerfile")).unwrap();
    let changed = |from: &str, to: &str| {
        assert!(original.contains(from), "{from}");
        fs::write(dir.join("Dockerfile"), original.replacen(from, to, 1)).unwrap();
        build(&ply, &dir)
    };
    // A variable that no command line shows.
    let built = changed("FROM base\n", "FROM base\nENV V=1\n");
    assert_eq!(built.step("/cache/x"), Step::Ran);
    assert_eq!(built.step("COPY --link src"), Step::Cached, "a copy sees no variables");
    let built = changed("\"mkdir\",\"/tmp\"", "\"mkdir\",\"/tmp2\",\"mkdir\",\"/tmp\"");
    assert_eq!(built.step("/tmp2"), Step::Ran);
    assert_eq!(built.step("\"/a\""), Step::Ran, "it stands on another tree");
    assert_eq!(changed("target=/cache", "target=/cache,id=other").step("/cache/x"), Step::Ran);
    assert_eq!(changed("id=s ", "id=s,mode=0440 ").step("/t/x"), Step::Ran);
    assert_eq!(changed("--chmod=600", "--chmod=640").step("/last"), Step::Ran);
    fs::write(dir.join("Dockerfile"), &original).unwrap();
    // One bit of one file's mode.
    fs::set_permissions(dir.join("src/b"), fs::Permissions::from_mode(0o664)).unwrap();
    let built = build(&ply, &dir);
    assert_eq!(built.step("COPY --link src /tmp/src"), Step::Ran);
    assert_eq!(built.step("COPY t"), Step::Cached);
    fs::set_permissions(dir.join("src/b"), fs::Permissions::from_mode(0o644)).unwrap();
    build(&ply, &dir).assert_all_cached();
}

#[test]
fn a_dry_run_tells_the_same_and_does_nothing() {
    let Some(ply) = store() else { return };
    let source = root(&ply, "v2-root");
    ply.ok(args!["images"]);
    let state = State::of(&ply);
    let told = ply.json(args!["import", "buildkit", "--dry-run", source]);
    state.assert_same(&State::of(&ply), "a dry run");
    let done = import(&ply, &source);
    for outcome in ["taken", "left", "failed"] {
        assert_eq!(names(&told, outcome), names(&done, outcome), "{outcome}");
    }
    for count in ["layers_count", "blobs_count", "blob_bytes", "keys_count"] {
        assert_eq!(told[count], done[count], "{count}");
    }
    let text = ply.ok(args!["import", "buildkit", "--dry-run", source]).stdout;
    assert!(text.contains("the step that") || text.contains("its files are those of"), "{text}");
}

#[test]
fn copies_share_nothing_with_the_source() {
    let Some(ply) = store() else { return };
    let source = root(&ply, "v1-root");
    let before = Tree::of(&source);
    ply.ok(args!["import", "buildkit", "--copy", source]);
    Tree::of(&source).assert_same(&before, "not even a link was made");
}

#[test]
fn a_source_on_another_file_system_is_copied() {
    let Some(ply) = store() else { return };
    let memory = ply.scratch().dir("v2-root");
    // What is mounted in a scratch is unmounted with it.
    tools::run(Command::new("mount").args(["-t", "tmpfs", "none"]).arg(&memory));
    let source = root(&ply, "v2-root");
    let ran = ply.fails(1, args!["import", "buildkit", source]);
    assert!(ran.stderr.contains("give --copy"), "{ran}");
    let before = Tree::of(&source);
    let report = ply.json(args!["import", "buildkit", "--copy", source]);
    ply.ok(args!["fsck", "--read-data"]);
    assert_eq!(names(&report, "failed"), BTreeSet::new(), "{report:#}");
    Tree::of(&source).assert_same(&before, "the source");
    assert_listed(&ply, &report, "v2.du.txt");
    let taken = items(&report, "taken");
    assert_shows(&ply, taken["v64jhquzfvsz8gntmwg48jg8p"]["id"].as_str().unwrap(), "v2.oci.tar");
    let dir = context(&ply, &source, "merge.Dockerfile");
    build(&ply, &dir).assert_all_cached();
}

#[test]
fn the_native_driver_takes_over_the_same() {
    let Some(ply) = store() else { return };
    let Some(native) = store() else { return };
    let report = import(&ply, &root(&ply, "v2-root"));
    let source = root(&native, "v2-root");
    let by_native = native.json(args!["--driver", "native", "import", "buildkit", source]);
    native.ok(args!["--driver", "native", "fsck", "--read-data"]);
    for outcome in ["taken", "left", "failed"] {
        assert_eq!(names(&by_native, outcome), names(&report, outcome), "{outcome}");
    }
    let at = native.scratch().dir("at");
    for (name, item) in items(&report, "taken").into_iter().filter(|(_, item)| item["size_bytes"] != 0) {
        let id = item["id"].as_str().unwrap();
        if ply.json(args!["ref", "inspect", id])["state"] == "mutable" {
            continue;
        }
        native.ok(args!["--driver", "native", "mount", id, at]);
        // The root's own metadata counts only where a layer sets it.
        let plain = |tree: Tree| tree.map(|_, node| node.links = 0).without_root();
        let copied = plain(Tree::of(&at));
        native.ok(args!["--driver", "native", "umount", at]);
        plain(Tree::of(ply.mount(id).path())).assert_same(&copied, name);
    }
}

#[test]
fn what_is_damaged_is_named_and_the_rest_comes_over() {
    let Some(ply) = store() else { return };
    let source = root(&ply, "v1-root");
    let worker = source.join("runc-overlayfs");
    // A layer in the middle loses its files and keeps its blob; another one's blob has other bytes.
    fs::remove_dir_all(worker.join("snapshots/snapshots/12")).unwrap();
    let blob = worker.join("content/blobs/sha256/621cb6a1b9a296d92292425d89f7670df89d0d9ef55181fb886c3fd013389e7d");
    let mut bytes = fs::read(&blob).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&blob, bytes).unwrap();
    fs::write(source.join("cache.db"), "no database").unwrap();
    let ran = ply.fails(1, args!["import", "buildkit", source]);
    assert!(ran.stderr.contains("621cb6a1b9a2"), "{ran}");
    assert!(ran.stderr.contains("cache.db"), "{ran}");
    let report = serde_json::from_str::<Value>(&ply.run(args!["import", "buildkit", "--json", source]).stdout).unwrap();
    assert!(names(&report, "here").contains("smkctz3g0sxytyvh9dayitkfc"), "what stands on it came over: {report:#}");
    let here = items(&report, "here");
    assert_shows(&ply, here["smkctz3g0sxytyvh9dayitkfc"]["id"].as_str().unwrap(), "v1.oci.tar");
}

#[test]
fn what_is_no_state_or_is_in_use_is_refused() {
    let Some(ply) = store() else { return };
    ply.ok(args!["images"]);
    let state = State::of(&ply);
    let empty = ply.scratch().dir("empty");
    let ran = ply.fails(1, args!["import", "buildkit", empty]);
    assert!(ran.stderr.contains("no state directory of BuildKit"), "{ran}");
    ply.fails(1, args!["import", "buildkit", ply.scratch().join("nowhere")]);
    let file = ply.scratch().file("file", "x");
    ply.fails(1, args!["import", "buildkit", file]);

    let source = root(&ply, "v2-root");
    let daemon = fs::File::open(source.join("runc-overlayfs/containerdmeta.db")).unwrap();
    rustix::fs::flock(&daemon, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let ran = ply.fails(1, args!["import", "buildkit", source]);
    assert!(ran.stderr.contains("containerdmeta.db is in use"), "{ran}");
    state.assert_same(&State::of(&ply), "refused imports");
}

#[test]
fn a_kill_leaves_whole_records_and_the_next_import_brings_the_rest() {
    let Some(ply) = store() else { return };
    if !tools::have(&["strace"]) {
        return;
    }
    let source = root(&ply, "v2-root");
    let whole = {
        let other = Ply::new(env!("CARGO_BIN_EXE_ply"));
        ply_records(&other, &import(&other, &root(&other, "v2-root")))
    };
    let import_it = ply.command(args!["import", "buildkit", source]);
    let counts = kill::count(&import_it, &ply.scratch().join("strace.log"));
    let mut killed = 0;
    for point in kill::spread(&counts, 2) {
        fs::remove_dir_all(ply.root()).unwrap();
        if let Outcome::Killed = kill::kill_at(&import_it, &point) {
            killed += 1;
        }
        ply.ok(args!["du"]);
        for record in ply.json(args!["ref", "ls"]).as_array().unwrap() {
            assert_eq!(record.get("error"), None, "{point}: {record:#}");
            if record["state"] != "mutable" {
                drop(ply.mount(record["id"].as_str().unwrap()));
            }
        }
        let report = import(&ply, &source);
        assert_eq!(names(&report, "failed"), BTreeSet::new(), "{point}: {report:#}");
        assert_eq!(ply_records(&ply, &report), whole, "{point}");
    }
    assert!(killed > 5, "too few kills: {counts:?}");
}

/// IDs and descriptions of all records, and the results that builds find.
fn ply_records(ply: &Ply, _: &Value) -> BTreeSet<(String, String)> {
    let records = ply.json(args!["ref", "ls"]);
    let text = |record: &Value, key: &str| record[key].as_str().unwrap().to_owned();
    records.as_array().unwrap().iter().map(|record| (text(record, "id"), text(record, "description"))).collect()
}

#[test]
fn whole_trees_of_the_native_snapshotter_become_layers() {
    let Some(ply) = store() else { return };
    let mut made = Worker::new(ply.scratch().dir("state/runc-native"), "native");
    let committed =
        |parent: Value| json!({"snapshot.committed": true, "cache.parent": parent, "cache.description": "r"});
    let below = made.snapshot("below", COMMITTED, None);
    fs::write(below.join("same"), "same").unwrap();
    fs::write(below.join("gone"), "gone").unwrap();
    fs::write(below.join("other"), "one").unwrap();
    fs::create_dir(below.join("dir")).unwrap();
    fs::write(below.join("dir/inside"), "x").unwrap();
    let above = made.snapshot("above", COMMITTED, Some("below"));
    tools::run(Command::new("cp").arg("-a").arg(below.join(".")).arg(&above));
    fs::remove_file(above.join("gone")).unwrap();
    fs::write(above.join("other"), "two").unwrap();
    fs::remove_dir_all(above.join("dir")).unwrap();
    fs::write(above.join("dir"), "now a file").unwrap();
    made.row("below", committed(Value::Null)).row("above", committed(json!("below")));
    made.write();
    let report = import(&ply, &ply.scratch().join("state"));
    assert_eq!(names(&report, "failed"), BTreeSet::new(), "{report:#}");
    let taken = items(&report, "taken");
    for (name, dir) in [("below", &below), ("above", &above)] {
        let mounted = ply.mount(taken[name]["id"].as_str().unwrap());
        let plain = |tree: Tree| tree.map(|_, node| node.links = 0).without_root();
        plain(Tree::of(mounted.path())).assert_same(&plain(Tree::of(dir)), name);
    }
    let sizes: Vec<u64> = ["below", "above"].map(|name| taken[name]["size_bytes"].as_u64().unwrap()).into();
    assert!(sizes[1] < sizes[0], "what is the same is not in the second layer: {sizes:?}");
}

/// Marks of root's overlays, and of those that anybody may mount: the kernel reads the layers, and so do we.
/// A file that not even root may link, until it is dropped; none where the file system knows no such files.
struct Immutable(PathBuf);

impl Immutable {
    fn new(path: PathBuf) -> Option<Self> {
        let made = tools::output_of(Command::new("chattr").arg("+i").arg(&path)).status.success();
        made.then_some(Self(path))
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        tools::run(Command::new("chattr").arg("-i").arg(&self.0));
    }
}

#[test]
fn files_that_take_no_link_are_copied_and_that_is_said() {
    let Some(ply) = store() else { return };
    let mut made = Worker::new(ply.scratch().dir("state/runc-overlayfs"), "overlayfs");
    let snapshot = made.snapshot("one", COMMITTED, None);
    for name in ["a", "b", "c"] {
        fs::write(snapshot.join(name), name).unwrap();
    }
    made.row("one", json!({"snapshot.committed": true}));
    made.write();
    let state = ply.scratch().join("state");
    let Some(immutable) = Immutable::new(snapshot.join("b")) else {
        eprintln!("SKIPPED files_that_take_no_link: no immutable files here");
        return;
    };
    let ran = ply.run(args!["import", "buildkit", "--json", state]);
    drop(immutable);
    assert!(ran.status.success(), "{ran}");
    assert!(ran.stderr.contains("copied and take space of their own: 1."), "{ran}");
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(report["files_not_linked_count"], 1);
    let mounted = ply.mount(items(&report, "taken")["one"]["id"].as_str().unwrap());
    let shared = |name: &str| fs::metadata(snapshot.join(name)).unwrap().nlink() == 2;
    assert_eq!(["a", "b", "c"].map(shared), [true, false, true]);
    assert_eq!(fs::read_to_string(mounted.path().join("b")).unwrap(), "b");
    let again = ply.run(args!["import", "buildkit", state]);
    assert!(again.status.success() && !again.stderr.contains("copied"), "{again}");
}

#[test]
fn what_is_hidden_in_a_snapshot_is_what_the_kernel_hides() {
    for (namespace, option) in [("trusted", "ro"), ("user", "ro,userxattr")] {
        let Some(ply) = store() else { return };
        let mut made = Worker::new(ply.scratch().dir("state/runc-overlayfs"), "overlayfs");
        let below = made.snapshot("below", COMMITTED, None);
        for dir in ["empty", "opaque", "remade/inner", "plain"] {
            fs::create_dir_all(below.join(dir)).unwrap();
            for name in ["a", "b", "c"] {
                fs::write(below.join(dir).join(name), "below").unwrap();
            }
        }
        let above = made.snapshot("above", COMMITTED, Some("below"));
        let mark = |path: &str, name: &str, value: &str| {
            let mut set = Command::new("setfattr");
            tools::run(set.args(["-n", &format!("{namespace}.overlay.{name}"), "-v", value]).arg(above.join(path)));
        };
        // All names of one directory, some of another, and one that is not there; an empty file is none.
        for path in ["empty/a", "empty/b", "empty/c", "plain/a", "plain/never", "remade/inner/b"] {
            fs::create_dir_all(above.join(path).parent().unwrap()).unwrap();
            fs::write(above.join(path), "").unwrap();
            mark(path, "whiteout", "");
        }
        fs::write(above.join("plain/b"), "").unwrap();
        tools::run(Command::new("mknod").arg(above.join("plain/c")).args(["c", "0", "0"]));
        for dir in ["empty", "plain", "remade/inner"] {
            mark(dir, "opaque", "x");
        }
        fs::create_dir(above.join("opaque")).unwrap();
        fs::write(above.join("opaque/b"), "again").unwrap();
        mark("opaque", "opaque", "y");
        // For an overlay in this one.
        fs::create_dir(above.join("nested")).unwrap();
        mark("nested", "overlay.opaque", "x");
        fs::write(above.join("nested/f"), "").unwrap();
        mark("nested/f", "overlay.whiteout", "");
        // What the kernel cannot show without the layer below.
        let moved = made.snapshot("moved", COMMITTED, Some("below"));
        fs::create_dir(moved.join("d")).unwrap();
        let mut set = Command::new("setfattr");
        tools::run(set.args(["-n", &format!("{namespace}.overlay.redirect"), "-v", "/plain"]).arg(moved.join("d")));
        let committed = |parent: &str| json!({"snapshot.committed": true, "cache.parent": parent});
        made.row("below", json!({"snapshot.committed": true}));
        made.row("above", committed("below")).row("moved", committed("below"));
        made.write();

        let ran = ply.run(args!["import", "buildkit", "--json", ply.scratch().join("state")]);
        assert_eq!(ran.status.code(), Some(1), "{ran}");
        let report: Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(names(&report, "failed"), BTreeSet::from(["moved".to_owned()]), "{report:#}");
        let why = items(&report, "failed")["moved"]["why"].as_str().unwrap().to_owned();
        assert!(why.contains(&format!("d carries {namespace}.overlay.redirect")), "{why}");
        ply.ok(args!["fsck", "--read-data"]);
        let kernel = ply.scratch().dir("kernel");
        let lower = format!("{option},lowerdir={}:{}", above.display(), below.display());
        tools::run(Command::new("mount").args(["-t", "overlay", "-o", &lower, "none"]).arg(&kernel));
        let mounted = ply.mount(items(&report, "taken")["above"]["id"].as_str().unwrap());
        let plain = |path: &Path| {
            let tree = Tree::of(path).without_root();
            tree.map(|_, node| {
                node.links = 0;
                // What an overlay shows to one inside it is no content of a layer.
                node.xattrs.retain(|name, _| !name.starts_with(&format!("{namespace}.overlay.")));
            })
        };
        let seen = plain(&kernel);
        let files: Vec<&str> = seen.names().filter(|name| name.contains('/')).collect();
        let shown = ["nested/f", "opaque/b", "plain/b", "remade/inner", "remade/inner/a", "remade/inner/c"];
        assert_eq!(files, shown, "what the kernel makes of it");
        plain(mounted.path()).assert_same(&seen, namespace);
    }
}

#[test]
fn odd_rows_are_judged_one_by_one() {
    let Some(ply) = store() else { return };
    let mut made = Worker::new(ply.scratch().dir("state/one"), "overlayfs");
    for key in ["plain", "used", "retained"] {
        let kind = if key == "plain" { COMMITTED } else { ACTIVE };
        fs::write(made.snapshot(key, kind, None).join("f"), key).unwrap();
    }
    fs::remove_dir_all(made.snapshot("no-files", COMMITTED, None)).unwrap();
    made.snapshot("on-no-files", COMMITTED, Some("no-files"));
    let digest = |c: &str| format!("sha256:{}", c.repeat(64));
    made.row("plain", json!({"snapshot.committed": true}))
        .row("used", json!({}))
        .row("retained", json!({"cache.cachePolicy": 1, "cache.recordType": "exec.cachemount", "cache-dir": "/id"}))
        .row("no-files", json!({"snapshot.committed": true}))
        .row("on-no-files", json!({"snapshot.committed": true, "cache.parent": "no-files"}))
        .row("on-nobody", json!({"cache.mergeParents": ["plain", "nobody"]}))
        .row("merge", json!({"cache.mergeParents": ["plain", "lazy"]}))
        .row("diff", json!({"cache.lowerDiffParent": "plain", "cache.upperDiffParent": "plain"}))
        .row("lazy", json!({"snapshot.committed": true, "cache.blobonly": true, "cache.blob": digest("a"), "cache.diffID": digest("b")}))
        .row("deleted", json!({"snapshot.committed": true, "cache.deleted": true}))
        .row("round", json!({"cache.mergeParents": ["circle", "plain"]}))
        .row("circle", json!({"cache.mergeParents": ["round", "plain"]}))
        .row("bad", json!({"cache.diffID": "sha256:no", "snapshot.committed": true}))
        .row("finalized", json!({"cache.equalMutable": "vanished", "snapshot.committed": true, "cache.snapshot": "plain"}))
        .row("lost", json!({"cache.equalMutable": "vanished", "snapshot.committed": true}));
    made.write();
    // A second worker of the same daemon.
    let mut other = Worker::new(ply.scratch().dir("state/two"), "overlayfs");
    fs::write(other.snapshot("elsewhere", COMMITTED, None).join("f"), "x").unwrap();
    other.row("elsewhere", json!({"snapshot.committed": true}));
    other.write();

    let ran = ply.run(args!["import", "buildkit", "--json", ply.scratch().join("state")]);
    assert_eq!(ran.status.code(), Some(1), "{ran}");
    let report: Value = serde_json::from_str(&ran.stdout).unwrap();
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(
        names(&report, "taken"),
        set(&["plain", "retained", "merge", "diff", "lazy", "finalized", "elsewhere"]),
        "{report:#}"
    );
    assert_eq!(names(&report, "left"), set(&["used", "deleted"]), "{report:#}");
    let failed = items(&report, "failed");
    let said = [
        ("no-files", "its snapshot is gone"),
        ("on-no-files", "it stands on no-files, which did not come over"),
        ("on-nobody", "it stands on nobody, which is not there"),
        ("round", "in a circle"),
        ("circle", "in a circle"),
        ("bad", "its key cache.diffID"),
        ("lost", "files of vanished, which are gone"),
    ];
    assert_eq!(failed.len(), said.len(), "{report:#}");
    for (name, why) in said {
        assert!(failed[name]["why"].as_str().unwrap().contains(why), "{name}: {:#}", failed[name]);
    }
    let taken = items(&report, "taken");
    assert_eq!(
        fs::read_to_string(ply.mount(taken["finalized"]["id"].as_str().unwrap()).path().join("f")).unwrap(),
        "plain"
    );
    // Steps find the cache mount by the name that they have for it.
    let record = ply.json(args!["ref", "inspect", taken["retained"]["id"].as_str().unwrap()]);
    assert_eq!((&record["record_type"], &record["state"]), (&json!("exec.cachemount"), &json!("mutable")));
}

/// An image's blobs in a worker's content; layers with the digests of their tars, documents with `labels`.
fn put_image(worker: &mut Worker, image: &Image, diff_ids: &[String], labels: &[(&str, &str)]) {
    for (name, bytes) in image.blobs() {
        let layer = (0..diff_ids.len()).find(|layer| name == image.layer_digest(*layer));
        match layer {
            Some(layer) => worker.blob(&bytes, &[("containerd.io/uncompressed", &diff_ids[layer])]),
            None => worker.blob(&bytes, labels),
        };
    }
}

#[test]
fn what_buildkit_could_build_on_without_a_registry_can_be_built_on_here() {
    let Some(ply) = store() else { return };
    let made = |name: &str| {
        let tar = tar::archive(&[Member::file(name, name)]);
        (Image::new(name).layer_tar(&tar, Packing::Gzip), vec![format!("sha256:{}", sha256_hex(&tar))])
    };
    let [(base, base_diff), (two, two_diff), (half, half_diff)] = ["base", "two", "half"].map(made);
    let mut worker = Worker::new(ply.scratch().dir("state/runc-overlayfs"), "overlayfs");
    put_image(&mut worker, &base, &base_diff, &[]);
    // Only the labels say where the second is from, as in roots of version 1.
    let source = [("containerd.io/distribution.source.example.com", "lib/two,lib/alias")];
    put_image(&mut worker, &two, &two_diff, &source);
    put_image(&mut worker, &half, &half_diff, &[]);
    let manifest_of = |image: &Image| format!("sha256:{}", image.manifest_digest());
    let content = ply.scratch().join("state/runc-overlayfs/content/blobs/sha256");
    fs::remove_file(content.join(half.layer_digest(0))).unwrap();
    let size = fs::metadata(content.join(base.manifest_digest())).unwrap().len();
    let platform = json!({"os": "linux", "architecture": plies_testkit::image::architecture()});
    let other = json!({"os": "plan9", "architecture": "mips"});
    let manifest = |digest: &str, platform: &Value| {
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        json!({"mediaType": media_type, "digest": digest, "size": size, "platform": platform})
    };
    let elsewhere = format!("sha256:{}", "e".repeat(64));
    let manifests = [manifest(&elsewhere, &other), manifest(&manifest_of(&base), &platform)];
    // Neither has to say what it is.
    let index = worker.blob(json!({"schemaVersion": 2, "manifests": manifests}).to_string().as_bytes(), &[]);
    let files = worker.snapshot("layer", COMMITTED, None);
    fs::write(files.join("base"), "base").unwrap();
    let refs = |name: &str, digest: &str| json!([format!("{name}@{digest}")]);
    let blob_chain = format!("sha256:{} {}", base.layer_digest(0), base_diff[0]);
    let gone = format!("sha256:{}", "0".repeat(64));
    worker
        .row(
            "layer",
            json!({"snapshot.committed": true, "cache.blob": format!("sha256:{}", base.layer_digest(0)), "cache.diffID": base_diff[0],
            "cache.chainID": base_diff[0], "cache.blobChainID": format!("sha256:{}", sha256_hex(blob_chain.as_bytes())),
            "cache.createdAt": 20, "cache.imageRefs": refs("docker.io/library/base:1", &index)}),
        )
        .row(
            "older",
            json!({"cache.mergeParents": ["layer", "layer"], "cache.createdAt": 10,
            "cache.imageRefs": refs("docker.io/library/base:1", &manifest_of(&two))}),
        )
        .row("gone", json!({"cache.mergeParents": ["layer", "layer"], "cache.imageRefs": refs("gone:1", &gone)}))
        .row(
            "half",
            json!({"cache.mergeParents": ["layer", "layer"],
            "cache.imageRefs": refs("half:1", &manifest_of(&half))}),
        );
    worker.write();

    let state = ply.scratch().join("state");
    let told = ply.json(args!["import", "buildkit", "--dry-run", state]);
    let report = import(&ply, &state);
    for outcome in ["taken", "left", "failed"] {
        assert_eq!(names(&told, outcome), names(&report, outcome), "{outcome}");
    }
    assert_eq!(names(&report, "failed"), BTreeSet::new(), "{report:#}");
    let left = items(&report, "left");
    assert_eq!(left["gone:1"]["why"], "BuildKit does not keep its manifest");
    assert_eq!(left["half:1"]["why"], "BuildKit never fetched all of it");
    let two_digest = manifest_of(&two);
    let asked = [
        ("base:1".to_owned(), "base"),
        (format!("base@{index}"), "base"),
        (format!("base:1@{index}"), "base"),
        (format!("base@{}", manifest_of(&base)), "base"),
        (format!("example.com/lib/two@{two_digest}"), "two"),
        (format!("example.com/lib/alias:any@{two_digest}"), "two"),
        (format!("base@{two_digest}"), "two"),
    ];
    let context = ply.scratch().dir("context");
    for (name, file) in &asked {
        fs::write(context.join("Dockerfile"), format!("FROM {name}\nLABEL x=y\n")).unwrap();
        ply.ok(args!["build", "-t", "built", context]);
        assert!(ply.mount("built").path().join(file).is_file(), "{name}");
    }
    // Steps stand on the very record that BuildKit's stood on, so that what it knows about them is found.
    fs::write(context.join("Dockerfile"), "FROM base:1\nCOPY Dockerfile /\n").unwrap();
    ply.ok(args!["build", context]);
    let base_record = &items(&report, "taken")["layer"]["id"];
    let records = ply.json(args!["ref", "ls"]);
    assert!(records.as_array().unwrap().iter().any(|record| record["parents"] == json!([base_record])), "{records:#}");
    // It goes out under the manifest that it came with.
    let details = ply.json(args!["inspect", "base:1"]);
    assert_eq!(details["manifests"], json!([manifest_of(&base)]));
    let state_before = State::of(&ply);
    let again = import(&ply, &state);
    state_before.assert_same(&State::of(&ply), "a second import");
    assert_eq!(names(&again, "taken"), BTreeSet::new());
    // A name that is taken here stays.
    ply.ok(args!["tag", format!("example.com/lib/two@{two_digest}"), "base:1"]);
    let again = import(&ply, &state);
    assert!(items(&again, "left").contains_key("base:1"), "{again:#}");
    assert!(ply.mount("base:1").path().join("two").is_file());
}
