//! Section C of the behaviours that BuildKit's own migration had, statement by statement.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use plies_bolt::Bolt;
use plies_testkit::scratch::Scratch;
use plies_testkit::tools;
use serde_json::Value;

use super::*;
use crate::buildkit::rows;
use crate::containerd::{BlobInfo, SnapshotInfo};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/fixtures/buildkit").join(name)
}

fn json(name: &str) -> Value {
    let packed = fs::read(fixture(name)).unwrap();
    serde_json::from_reader(flate2::read::GzDecoder::new(&packed[..])).unwrap()
}

/// The rows of the real root of version 1, moved on.
fn real() -> (RawRows, BTreeMap<String, String>, Namespace) {
    let root = Scratch::new();
    tools::run(Command::new("tar").arg("-xzf").arg(fixture("v1-root.tar.gz")).arg("-C").arg(root.path()));
    let open = |name: &str| Bolt::open(&root.path().join("runc-overlayfs").join(name)).unwrap();
    let (rows, failed) = rows::read(&open("metadata.db"));
    assert!(failed.is_none(), "{failed:?}");
    let (meta, own) = (open("containerdmeta.db"), open("snapshots/metadata.db"));
    let (namespace, failed) = Namespace::read(&meta, Some(&own), "buildkit", Path::new("/nowhere"));
    assert!(failed.is_empty(), "{failed:?}");
    let (rows, failed) = migrate(rows, &namespace);
    (rows, failed, namespace)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn c_the_real_root_comes_out_row_for_row_and_key_for_key_as_buildkits_own() {
    let (rows, failed, _) = real();
    assert!(failed.is_empty(), "{failed:?}");
    let expected = json("mig.metadata_v2.json.gz");
    let main = expected["_main"].as_object().unwrap();
    assert_eq!(rows.keys().collect::<Vec<_>>(), main.keys().collect::<Vec<_>>());
    for (id, row) in &rows {
        let want: BTreeMap<String, String> =
            main[id].as_object().unwrap().iter().map(|(k, v)| (k.clone(), v.as_str().unwrap().to_owned())).collect();
        let got: BTreeMap<String, String> = row.iter().map(|(k, v)| (k.clone(), text(v))).collect();
        assert_eq!(got, want, "{id}");
    }
    // And every row is found by what BuildKit's is found by.
    let mut index: Vec<String> = Vec::new();
    for (id, row) in &rows {
        for json in row.values().filter(|json| !json.is_empty()) {
            let entry: Value = serde_json::from_slice(json).unwrap();
            index.extend(entry["index"].as_str().map(|index| format!("{index}::{id}")));
        }
    }
    index.sort();
    let mut want: Vec<String> = expected["_index"].as_object().unwrap().keys().cloned().collect();
    want.sort();
    assert_eq!(index, want);
}

/// What BuildKit's leases held after the migration is what the rows name, and a record here holds what its row names.
#[test]
fn c09_each_row_names_what_its_lease_held() {
    let (rows, _, _) = real();
    let meta = json("mig.containerdmeta.json.gz");
    let leases = meta["v1"]["buildkit"]["leases"].as_object().unwrap();
    assert_eq!(rows.keys().collect::<Vec<_>>(), leases.keys().collect::<Vec<_>>());
    for (id, row) in &rows {
        assert!(leases[id]["labels"]["containerd.io/gc.flat"].is_string(), "{id}");
        let snapshot: String = get(row, "cache.snapshot").unwrap().unwrap();
        assert!(leases[id]["snapshots"]["overlayfs"][&snapshot].is_string(), "{id}");
        let blob: Option<String> = get(row, "cache.blob").unwrap();
        let held = leases[id]["content"].as_object().map(|held| held.keys().cloned().collect::<Vec<_>>());
        assert_eq!(held, blob.map(|blob| vec![blob]), "{id}");
    }
}

/// What BuildKit took its root labels off, once its leases held them: snapshots and blobs of rows of their own. All of them
/// are named by rows, so nothing that was a root is lost for want of its label.
#[test]
fn c10_what_was_a_root_by_its_label_is_named_by_a_row() {
    let (rows, _, namespace) = real();
    let meta = json("v1.containerdmeta.json.gz");
    let labels = |thing: &Value| thing["labels"]["containerd.io/gc.root"].is_string();
    let roots = |things: &Value| -> Vec<String> {
        let things = things.as_object().unwrap().iter();
        things.filter(|(_, thing)| labels(thing)).map(|(name, _)| name.clone()).collect()
    };
    let of_rows = |key: &str| -> Vec<String> { rows.values().filter_map(|row| get(row, key).unwrap()).collect() };
    let (snapshots, blobs) = (of_rows("cache.snapshot"), of_rows("cache.blob"));
    let was_view = |key: &String| namespace.snapshots[key].kind == SnapshotKind::View;
    let root_snapshots = roots(&meta["v1"]["buildkit"]["snapshots"]["overlayfs"]);
    assert!(root_snapshots.len() > 10);
    for key in root_snapshots.iter().filter(|key| !was_view(key)) {
        assert!(snapshots.contains(key), "snapshot {key}");
    }
    let root_blobs = roots(&meta["v1"]["buildkit"]["content"]["blob"]);
    // The image that was exported is not of the cache: its manifest has the label and no row.
    let manifests = root_blobs.iter().filter(|digest| !blobs.contains(digest));
    let of_layers = |digest: &&String| {
        let labels = &meta["v1"]["buildkit"]["content"]["blob"][digest.as_str()]["labels"];
        labels["containerd.io/uncompressed"].is_string()
    };
    assert_eq!(manifests.filter(of_layers).count(), 0);
}

#[test]
fn c11_views_are_nobodys_and_stay_behind() {
    let (rows, _, namespace) = real();
    let views: Vec<_> =
        namespace.snapshots.iter().filter(|(_, snapshot)| snapshot.kind == SnapshotKind::View).collect();
    assert!(views.len() > 3, "the old version left views behind");
    for (key, _) in views {
        assert!(!rows.contains_key(key));
        assert!(rows.values().all(|row| get::<String>(row, "cache.snapshot").unwrap().as_ref() != Some(key)));
    }
}

fn snapshot(kind: SnapshotKind, parent: Option<&str>) -> SnapshotInfo {
    SnapshotInfo { kind, parent: parent.map(str::to_owned), dir: PathBuf::new(), whole: false }
}

fn row(entries: &[(&str, &str)]) -> RawRow {
    entries.iter().map(|(key, json)| ((*key).to_owned(), json.as_bytes().to_vec())).collect()
}

fn rows_of(rows: &[(&str, RawRow)]) -> RawRows {
    rows.iter().map(|(id, row)| ((*id).to_owned(), row.clone())).collect()
}

fn namespace(snapshots: &[(&str, SnapshotInfo)], blobs: &[BlobDigest]) -> Namespace {
    Namespace {
        snapshots: snapshots.iter().map(|(key, info)| ((*key).to_owned(), info.clone())).collect(),
        blobs: blobs.iter().map(|digest| (*digest, BlobInfo::default())).collect(),
    }
}

fn value(rows: &RawRows, id: &str, key: &str) -> Option<String> {
    rows[id].get(key).map(|json| text(json))
}

fn digest(n: u8) -> BlobDigest {
    BlobDigest::of(&[n])
}

fn mapping(blob: BlobDigest, diff: BlobDigest) -> String {
    format!(r#"{{"value":{{"Blobsum":"{blob}","DiffID":"{diff}"}},"index":"blobmap::{blob}"}}"#)
}

#[test]
fn c03_rows_take_state_and_parent_from_their_snapshots() {
    let space = namespace(
        &[
            ("a", snapshot(SnapshotKind::Committed, None)),
            ("b", snapshot(SnapshotKind::Committed, Some("a"))),
            ("m", snapshot(SnapshotKind::Active, Some("b"))),
        ],
        &[],
    );
    let rows = rows_of(&[("a", row(&[])), ("b", row(&[])), ("m", row(&[])), ("gone", row(&[]))]);
    let (rows, failed) = migrate(rows, &space);
    assert_eq!(value(&rows, "a", "snapshot.committed").as_deref(), Some(r#"{"value":true}"#));
    assert_eq!(value(&rows, "a", "cache.parent"), None);
    assert_eq!(value(&rows, "b", "cache.parent").as_deref(), Some(r#"{"value":"a"}"#));
    assert_eq!(value(&rows, "m", "snapshot.committed"), None);
    assert_eq!(value(&rows, "m", "cache.parent").as_deref(), Some(r#"{"value":"b"}"#));
    // BuildKit gave up here; one row without a snapshot is no reason to lose the others.
    assert_eq!(failed, BTreeMap::from([("gone".to_owned(), "its snapshot is gone".to_owned())]));
    assert!(!rows.contains_key("gone"));
}

#[test]
fn c04_rows_that_share_files_are_committed_and_every_row_names_its_snapshot() {
    let space = namespace(&[("m", snapshot(SnapshotKind::Active, None))], &[]);
    let rows = rows_of(&[("m", row(&[])), ("i", row(&[("cache.equalMutable", r#"{"value":"m"}"#)]))]);
    let (rows, failed) = migrate(rows, &space);
    assert!(failed.is_empty(), "{failed:?}");
    assert_eq!(value(&rows, "i", "snapshot.committed").as_deref(), Some(r#"{"value":true}"#));
    for id in ["m", "i"] {
        assert_eq!(value(&rows, id, "cache.snapshot"), Some(format!(r#"{{"value":"{id}"}}"#)));
    }
}

#[test]
fn c04_a_key_without_bytes_was_taken_back() {
    let space = namespace(&[("a", snapshot(SnapshotKind::Committed, None))], &[]);
    let (rows, failed) = migrate(rows_of(&[("a", row(&[("cache.equalMutable", "")]))]), &space);
    assert!(failed.is_empty(), "{failed:?}");
    assert_eq!(value(&rows, "a", "snapshot.committed").as_deref(), Some(r#"{"value":true}"#));
}

#[test]
fn c05_what_shares_files_stands_on_what_the_mutable_record_does() {
    let space = namespace(
        &[("a", snapshot(SnapshotKind::Committed, None)), ("m", snapshot(SnapshotKind::Active, Some("a")))],
        &[],
    );
    let shares = |mutable: &str| row(&[("cache.equalMutable", &format!(r#"{{"value":"{mutable}"}}"#))]);
    let rows = rows_of(&[("a", row(&[])), ("m", row(&[])), ("i", shares("m")), ("lost", shares("nobody"))]);
    let (rows, failed) = migrate(rows, &space);
    assert!(failed.is_empty(), "{failed:?}");
    assert_eq!(value(&rows, "i", "cache.parent").as_deref(), Some(r#"{"value":"a"}"#));
    assert_eq!(value(&rows, "lost", "cache.parent"), None, "of a mutable record that is not there, nothing is known");
}

#[test]
fn c06_blobs_come_along_if_the_content_has_them() {
    let (here, gone, diff) = (digest(1), digest(2), digest(3));
    let committed = || snapshot(SnapshotKind::Committed, None);
    let space = namespace(&[("a", committed()), ("b", committed()), ("c", committed())], &[here]);
    let with = |json: &str| row(&[("blobmapping.blob", json)]);
    let rows = rows_of(&[("a", with(&mapping(here, diff))), ("b", with(&mapping(gone, diff))), ("c", with("{"))]);
    let (rows, failed) = migrate(rows, &space);
    assert_eq!(value(&rows, "a", "cache.diffID"), Some(format!(r#"{{"value":"{diff}"}}"#)));
    assert_eq!(value(&rows, "a", "cache.blob"), Some(format!(r#"{{"value":"{here}"}}"#)));
    let media_type = r#"{"value":"application/vnd.docker.image.rootfs.diff.tar.gzip"}"#;
    assert_eq!(value(&rows, "a", "cache.mediatype").as_deref(), Some(media_type));
    for key in ["cache.diffID", "cache.blob", "cache.mediatype", "cache.chainID"] {
        assert_eq!(value(&rows, "b", key), None, "{key}");
    }
    assert_eq!(failed.keys().collect::<Vec<_>>(), ["c"]);
    assert!(failed["c"].contains("blobmapping.blob"), "{failed:?}");
}

#[test]
fn c07_chains_go_from_parents_to_children_and_only_over_blobs() {
    let committed = |parent| snapshot(SnapshotKind::Committed, parent);
    let space = namespace(
        &[
            // Names in the other order than they stand on each other.
            ("z", committed(None)),
            ("y", committed(Some("z"))),
            ("x", committed(Some("y"))),
            ("bare", committed(Some("z"))),
            ("on-bare", committed(Some("bare"))),
            ("on-nobody", committed(Some("nobody"))),
            ("round", committed(Some("circle"))),
            ("circle", committed(Some("round"))),
        ],
        &[digest(1), digest(2), digest(3)],
    );
    let with = |n: u8| row(&[("blobmapping.blob", &mapping(digest(n), digest(n + 100)))]);
    let mut kept = with(2);
    let chain = digest(50);
    put(&mut kept, "cache.chainID", chain, Some(format!("chainid:{chain}")));
    put(&mut kept, "cache.blobChainID", digest(51), None);
    let rows = rows_of(&[
        ("z", with(1)),
        ("y", kept),
        ("x", with(3)),
        ("bare", row(&[])),
        ("on-bare", with(1)),
        ("on-nobody", with(1)),
        ("round", with(1)),
        ("circle", with(2)),
    ]);
    let (rows, failed) = migrate(rows, &space);
    assert!(failed.is_empty(), "{failed:?}");
    let of = |text: String| BlobDigest::of(text.as_bytes());
    let own = |n: u8| of(format!("{} {}", digest(n), digest(n + 100)));
    let chain_id = |id: &str| get::<BlobDigest>(&rows[id], "cache.chainID").unwrap();
    let blob_chain_id = |id: &str| get::<BlobDigest>(&rows[id], "cache.blobChainID").unwrap();
    assert_eq!((chain_id("z"), blob_chain_id("z")), (Some(digest(101)), Some(own(1))));
    assert_eq!((chain_id("y"), blob_chain_id("y")), (Some(chain), Some(digest(51))), "a pair that is there is kept");
    assert_eq!(chain_id("x"), Some(of(format!("{chain} {}", digest(103)))));
    assert_eq!(blob_chain_id("x"), Some(of(format!("{} {}", digest(51), own(3)))));
    // BuildKit made up a chain of nothing here, or fell.
    for id in ["bare", "on-bare", "on-nobody", "round", "circle"] {
        assert_eq!((chain_id(id), blob_chain_id(id)), (None, None), "{id}");
    }
}
