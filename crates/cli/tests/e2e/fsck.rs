//! Damage of many kinds is planted in a healthy store: every kind is named, repaired, and takes nothing healthy along.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, Permissions},
    io::Write as _,
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    process::Command,
};

use plies_testkit::{
    args,
    catalogue::Catalogue,
    image::{Image, Packing},
    kill::{self, Outcome},
    ply::Ply,
    tar::{self, Member},
    tools,
    tree::Tree,
};
use serde_json::Value;

use crate::common::{Context, busybox, everything, load, store, tree_of};

/// What a user would miss.
type Things = BTreeSet<String>;

/// A store with something of everything in it, and what it shows.
struct World {
    ply: Ply,
    pristine: PathBuf,
    things: Things,
    trees: BTreeMap<String, Tree>,
}

impl World {
    #[track_caller]
    fn new() -> Option<Self> {
        // What is planted in layers is planted in their directories; crates/store/tests/packed.rs has what is planted in tars.
        let ply = store()?.with_driver("overlay");
        if !busybox(&ply) {
            return None;
        }
        load(&ply, &everything("all:1", Packing::Gzip));
        load(&ply, &Image::new("small:1").layer(&[Member::file("small", "zstd")], Packing::Zstd));
        let context = Context::new(
            &ply,
            "FROM busybox\nCOPY file /file\nRUN --mount=type=cache,target=/c echo kept > /c/kept && echo made > /made\n",
        );
        context.file("file", "of the context");
        context.build(&[]);
        ply.ok(args!["ref", "new"]);
        let records: Vec<String> = listed(&ply, &["ref", "ls"])
            .iter()
            .filter(|one| one["state"] == "immutable")
            .map(|one| text(&one["id"]))
            .collect();
        ply.ok(args!["ref", "merge", records[0], records[1]]);
        let layer = ply.scratch().file("layer.tar", tar::archive(&[Member::file("registered", "by hand")]));
        let below = ply.ok(args!["layer", "register", layer]).stdout.trim().to_owned();
        let above = ply.scratch().file("above.tar", tar::archive(&[Member::file("above", "it")]));
        let chain = ply.ok(args!["layer", "register", "--parent", below, above]).stdout.trim().to_owned();
        ply.ok(args!["layer", "rw", "create", "box", "--parent", chain, "--init"]);
        let dir = ply.scratch().dir("box");
        ply.ok(args!["layer", "rw", "mount", "box", dir]);
        fs::write(dir.join("written"), "in the box").unwrap();
        ply.ok(args!["layer", "rw", "umount", "box"]);
        let pristine = ply.scratch().join("pristine");
        tools::run(Command::new("cp").args(["-a", "--reflink=auto"]).args([&ply.root(), &pristine]));
        let things = things(&ply);
        let trees =
            ["all:1", "small:1", "built:latest", "busybox:latest"].map(|name| (name.to_owned(), tree_of(&ply, name)));
        let world = Self { ply, pristine, things, trees: trees.into() };
        world.reset();
        Some(world)
    }

    fn reset(&self) {
        fs::remove_dir_all(self.ply.root()).unwrap();
        tools::run(Command::new("cp").args(["-a", "--reflink=auto"]).args([&self.pristine, &self.ply.root()]));
    }

    /// What went and what came, and an image whose tree is not what it was.
    fn lost(&self) -> (Things, Things, Vec<String>) {
        let now = things(&self.ply);
        let changed = self.trees.iter().filter(|(name, tree)| {
            now.contains(&format!("image {name}")) && !tree_of(&self.ply, name).diff(tree).is_empty()
        });
        (
            self.things.difference(&now).cloned().collect(),
            now.difference(&self.things).cloned().collect(),
            changed.map(|(name, _)| name.clone()).collect(),
        )
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

fn listed(ply: &Ply, command: &[&str]) -> Vec<Value> {
    let args: Vec<_> = command.iter().map(std::ffi::OsString::from).collect();
    ply.json(&args).as_array().unwrap().clone()
}

fn things(ply: &Ply) -> Things {
    let mut things = Things::new();
    for image in listed(ply, &["images"]) {
        things.insert(format!("image-id {}", text(&image["id"])));
        things.extend(image["names"].as_array().unwrap().iter().map(|name| format!("image {}", text(name))));
    }
    things.extend(listed(ply, &["ref", "ls"]).iter().map(|one| format!("record {}", text(&one["id"]))));
    things.extend(listed(ply, &["layer", "ls"]).iter().map(|one| format!("chain {}", text(&one["chain_id"]))));
    things.extend(listed(ply, &["layer", "rw", "ls"]).iter().map(|one| format!("box {}", text(&one["name"]))));
    things
}

/// Runs `ply fsck` with these arguments: its exit code and its report.
#[track_caller]
fn fsck(ply: &Ply, more: &[&str]) -> (i32, Value) {
    let more: Vec<_> = ["fsck", "--json"].iter().chain(more).map(std::ffi::OsString::from).collect();
    let ran = ply.run(&more);
    assert!(!ran.stderr.contains("panicked"), "fsck {more:?}: {ran}");
    let report = serde_json::from_str(&ran.stdout).unwrap_or_else(|error| panic!("fsck {more:?}: {error}: {ran}"));
    (ran.status.code().unwrap(), report)
}

fn codes(report: &Value, list: &str) -> BTreeSet<String> {
    report[list].as_array().unwrap().iter().map(|finding| text(&finding["code"])).collect()
}

/// What may be gone after a repair: everything else must be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Loss {
    Nothing,
    /// At least one of what begins so, and nothing else.
    Some(&'static [&'static str]),
    /// None or some of these.
    Maybe(&'static [&'static str]),
}

use Loss::{Maybe, Nothing};

const RECORDS: &[&str] = &["record "];

struct Case {
    name: String,
    plant: Box<dyn Fn(&Path)>,
    read_data: bool,
    code: &'static str,
    loss: Loss,
}

fn case(name: &str, code: &'static str, loss: Loss, plant: impl Fn(&Path) + 'static) -> Case {
    Case { name: name.to_owned(), plant: Box::new(plant), read_data: false, code, loss }
}

fn deep(case: Case) -> Case {
    Case { read_data: true, ..case }
}

/// The first row of a table.
fn first(root: &Path, table: &str) -> (Catalogue, Vec<u8>, Vec<u8>) {
    first_that(root, table, |_, _| true)
}

/// The first row of a table that is wanted.
fn first_that(root: &Path, table: &str, wanted: impl Fn(&[u8], &[u8]) -> bool) -> (Catalogue, Vec<u8>, Vec<u8>) {
    let catalogue = Catalogue::open(root);
    let found = catalogue.rows(table).into_iter().find(|(key, row)| wanted(key, row));
    let (key, row) = found.unwrap_or_else(|| panic!("{table} has no such row"));
    (catalogue, key, row)
}

/// An image's hold on its chain; users have some, too.
fn image_hold(root: &Path) -> (Catalogue, Vec<u8>, Vec<u8>) {
    first_that(root, "image.chain_holds", |key, _| key[32..].starts_with(b"image:"))
}

/// A row whose value says nothing any more.
fn garbled(table: &'static str, code: &'static str, loss: Loss) -> Case {
    case(&format!("{table}: a row is garbled"), code, loss, move |root| {
        let (catalogue, key, row) = first(root, table);
        catalogue.put(table, &key, &[&[row[0]][..], &[0xff; 12]].concat());
    })
}

fn missing(table: &'static str, code: &'static str, loss: Loss) -> Case {
    case(&format!("{table}: a row is missing"), code, loss, move |root| {
        let (catalogue, key, _) = first(root, table);
        catalogue.remove(table, &key);
    })
}

/// A row under a key that nobody has.
fn stray(table: &'static str, code: &'static str, loss: Loss) -> Case {
    case(&format!("{table}: a row too many"), code, loss, move |root| {
        let (catalogue, mut key, row) = first(root, table);
        // The end of a text is two bytes of its own.
        let at = if key.ends_with(&[0, 1]) { key.len() - 3 } else { key.len() - 1 };
        key[at] ^= 0x5a;
        catalogue.put(table, &key, &row);
    })
}

/// Another number in a row.
fn counted(table: &'static str, code: &'static str) -> Case {
    case(&format!("{table}: a count is wrong"), code, Nothing, move |root| {
        let (catalogue, key, mut row) = first(root, table);
        row[1] = row[1].wrapping_add(1) & 0x7f;
        catalogue.put(table, &key, &row);
    })
}

fn layer_dirs(root: &Path) -> Vec<PathBuf> {
    let mut dirs: Vec<PathBuf> =
        fs::read_dir(root.join("layers")).unwrap().map(|entry| entry.unwrap().path()).collect();
    dirs.retain(|dir| !dir.ends_with("stage"));
    dirs.sort();
    dirs
}

/// The directory of the layer that has this file.
fn layer_with(root: &Path, file: &str) -> PathBuf {
    let found = layer_dirs(root).into_iter().find(|dir| dir.join("fs").join(file).symlink_metadata().is_ok());
    found.unwrap_or_else(|| panic!("no layer has {file}"))
}

fn blob_paths(root: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> =
        fs::read_dir(root.join("content/blobs/sha256")).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
}

/// The blob whose bytes hold this text.
fn blob_with(root: &Path, text: &str) -> PathBuf {
    let holds = |path: &PathBuf| fs::read(path).unwrap().windows(text.len()).any(|window| window == text.as_bytes());
    blob_paths(root).into_iter().find(holds).unwrap_or_else(|| panic!("no blob has {text}"))
}

/// The blob of the one layer that was packed with zstd.
fn zstd_blob(root: &Path) -> PathBuf {
    let is_zstd = |path: &PathBuf| fs::read(path).unwrap().starts_with(&[0x28, 0xb5, 0x2f, 0xfd]);
    blob_paths(root).into_iter().find(is_zstd).unwrap()
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    let meta = fs::metadata(path).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    fs::write(path, bytes).unwrap();
    fs::set_permissions(path, meta.permissions()).unwrap();
}

fn on_layer(name: &str, code: &'static str, loss: Loss, file: &'static str, plant: impl Fn(PathBuf) + 'static) -> Case {
    case(name, code, loss, move |root| plant(layer_with(root, file)))
}

#[rustfmt::skip]
fn cases() -> Vec<Case> {
    const SMALL: &[&str] = &["image small:1", "image-id ", "chain ", "record "];
    const BUILT: &[&str] = &["record ", "image built", "image-id ", "chain "];
    const BOX: &[&str] = &["box ", "chain "];
    let gone = |path: PathBuf| fs::remove_file(path).unwrap();
    vec![
        // What the store's own tables say.
        garbled("blobs", "row-unreadable", Nothing),
        missing("blobs", "blob-unlisted", Nothing),
        stray("blobs", "blob-missing", Nothing),
        garbled("layers", "row-unreadable", Nothing),
        missing("layers", "layer-unlisted", Nothing),
        stray("layers", "layer-missing", Nothing),
        garbled("snapshots", "row-unreadable", Nothing),
        missing("snapshots", "edge-dangling", Nothing),
        stray("snapshots", "snapshot-id-wrong", Nothing),
        garbled("actives", "row-unreadable", Maybe(&["record ", "box "])),
        missing("actives", "edge-dangling", Maybe(&["record ", "box "])),
        stray("actives", "edge-missing", Nothing),
        garbled("holds", "row-unreadable", Nothing),
        missing("holds", "refs-wrong", Nothing),
        stray("holds", "hold-dangling", Nothing),
        garbled("edges", "row-unreadable", Nothing),
        missing("edges", "refs-wrong", Nothing),
        stray("edges", "edge-dangling", Nothing),
        garbled("refs", "refs-wrong", Nothing),
        missing("refs", "refs-wrong", Nothing),
        stray("refs", "refs-wrong", Nothing),
        counted("refs", "refs-wrong"),
        garbled("layers_by_diff", "layers-by-diff-wrong", Nothing),
        missing("layers_by_diff", "layers-by-diff-wrong", Nothing),
        stray("layers_by_diff", "layers-by-diff-wrong", Nothing),
        garbled("totals", "totals-wrong", Nothing),
        missing("totals", "totals-wrong", Nothing),
        counted("totals", "totals-wrong"),
        case("loose: a held layer is listed", "loose-wrong", Nothing, |root| {
            let (catalogue, key, _) = first(root, "layers");
            catalogue.put("loose", &[&[2][..], &key].concat(), &[0]);
        }),
        case("leases: a row is garbled", "row-unreadable", Nothing, |root| {
            Catalogue::open(root).put("leases", &[7; 8], &[1, 0xff]);
        }),
        case("lease_holds: of no lease", "lease-missing", Nothing, |root| {
            let (catalogue, key, _) = first(root, "layers");
            catalogue.put("lease_holds", &[&[7; 8][..], &[2], &key].concat(), &[0]);
        }),
        case("trash: what is there is thrown away", "refs-wrong", Nothing, |root| {
            let (catalogue, key, _) = first(root, "layers");
            catalogue.remove("refs", &[&[2][..], &key].concat());
        }),
        case("edges: a ring", "edge-cycle", Nothing, |root| {
            let (catalogue, key, _) = first(root, "edges");
            let ring = [&key[33..], &key[..33]].concat();
            catalogue.put("edges", &ring, &[0]);
        }),
        case("meta: the session is behind", "session-behind", Nothing, |root| {
            Catalogue::open(root).put("meta", b"session\0\x01", &[0, 0]);
        }),
        case("meta: the session is gone", "session-behind", Nothing, |root| {
            Catalogue::open(root).remove("meta", b"session\0\x01");
        }),
        deep(case("meta: the session is none", "row-unreadable", Nothing, |root| {
            Catalogue::open(root).put("meta", b"session\0\x01", &[0, 0x80]);
        })),
        case("meta: the session is past counting", "session-behind", Nothing, |root| {
            Catalogue::open(root).put("meta", b"session\0\x01", &[0, 0xff, 0xff, 0xff, 0xff, 0x0f]);
        }),
        case("meta: the form of new layers is none", "row-unreadable", Nothing, |root| {
            Catalogue::open(root).put("meta", b"packs\0\x01", &[]);
        }),
        case("squashes: of no layer", "squashes-wrong", Nothing, |root| {
            let (catalogue, key, _) = first(root, "layers");
            catalogue.put("squashes", &[9; 32], &[&[1, 8][..], &key].concat());
        }),
        case("sealing: a garbled row", "row-unreadable", Nothing, |root| {
            Catalogue::open(root).put("sealing", &[7; 8], &[1, 0xff]);
        }),
        garbled("image.blobs", "row-unreadable", Nothing),
        missing("image.blobs", "blob-diff-wrong", Nothing),
        garbled("image.diffs", "blob-diff-wrong", Nothing),
        missing("image.diffs", "blob-diff-wrong", Nothing),
        stray("image.diffs", "blob-diff-wrong", Nothing),
        // The build cache.
        garbled("cache.records", "row-unreadable", Loss::Some(RECORDS)),
        case("cache.records: one that holds something is missing", "record-hold-wrong", Loss::Some(RECORDS), |root| {
            let (catalogue, hold, _) = first_that(root, "holds", |key, _| key.starts_with(b"record:"));
            let id = std::str::from_utf8(&hold["record:".len()..][..32]).unwrap();
            catalogue.remove("cache.records", &u128::from_str_radix(id, 16).unwrap().to_be_bytes());
        }),
        garbled("cache.uses", "row-unreadable", Nothing),
        stray("cache.uses", "uses-stray", Nothing),
        garbled("cache.children", "children-wrong", Nothing),
        missing("cache.children", "children-wrong", Nothing),
        stray("cache.children", "children-wrong", Nothing),
        missing("cache.by_chain", "by-chain-wrong", Nothing),
        stray("cache.by_chain", "by-chain-wrong", Nothing),
        case("cache.by_blob_chain: a row too many", "by-blob-chain-wrong", Nothing, |root| {
            Catalogue::open(root).put("cache.by_blob_chain", &[7; 48], &[0]);
        }),
        garbled("cache.compositions", "compositions-wrong", Nothing),
        missing("cache.compositions", "compositions-wrong", Nothing),
        stray("cache.compositions", "compositions-wrong", Nothing),
        garbled("cache.actives", "record-actives-wrong", Nothing),
        missing("cache.actives", "record-actives-wrong", Nothing),
        garbled("cache.values", "row-unreadable", Nothing),
        case("cache.values: one with an index is missing", "index-wrong", Nothing, |root| {
            // The index is the last field, and a 0 if there is none.
            let (catalogue, key, _) = first_that(root, "cache.values", |_, row| row.last() != Some(&0));
            catalogue.remove("cache.values", &key);
        }),
        missing("cache.index", "index-wrong", Nothing),
        counted("cache.index", "index-wrong"),
        garbled("cache.results", "row-unreadable", Nothing),
        missing("cache.results", "result-of-wrong", Nothing),
        stray("cache.results", "results-stray", Nothing),
        missing("cache.result_of", "result-of-wrong", Nothing),
        stray("cache.result_of", "result-of-wrong", Nothing),
        // Images and layers by chain.
        garbled("image.images", "row-unreadable", Loss::Some(&["image ", "image-id ", "chain "])),
        missing("image.images", "name-dangling", Loss::Some(&["image ", "image-id ", "chain "])),
        stray("image.images", "image-config-missing", Nothing),
        garbled("image.names", "row-unreadable", Loss::Some(&["image "])),
        case("image.names: one that is none", "name-invalid", Nothing, |root| {
            let (catalogue, _, row) = first(root, "image.names");
            catalogue.put("image.names", b"UPPER CASE\0\x01", &row);
        }),
        garbled("image.chains", "row-unreadable", Nothing),
        missing("image.chains", "chain-missing", Nothing),
        stray("image.chains", "chain-id-wrong", Nothing),
        missing("image.chain_children", "chain-children-wrong", Nothing),
        stray("image.chain_children", "chain-children-wrong", Nothing),
        case("image.chain_holds: an image's is missing", "chain-holders-wrong", Nothing, |root| {
            let (catalogue, key, _) = image_hold(root);
            catalogue.remove("image.chain_holds", &key);
        }),
        case("image.chain_holds: an image too many", "chain-holders-wrong", Nothing, |root| {
            let (catalogue, mut key, row) = image_hold(root);
            let last = key.len() - 3;
            key[last] = if key[last] == b'0' { b'1' } else { b'0' };
            catalogue.put("image.chain_holds", &key, &row);
        }),
        case("image.chain_holds: an image holds twice", "chain-holders-wrong", Nothing, |root| {
            let (catalogue, key, _) = image_hold(root);
            catalogue.put("image.chain_holds", &key, &[0, 2]);
        }),
        garbled("image.rw_layers", "row-unreadable", Loss::Some(BOX)),
        missing("image.rw_layers", "rw-hold-wrong", Loss::Some(BOX)),
        case("a chain whose size is wrong", "chain-sums-wrong", Nothing, |root| {
            let (catalogue, key, mut row) = first(root, "image.chains");
            // The last byte of the number before the time, which is eight bytes long.
            let at = row.len() - 9;
            row[at] ^= 2;
            catalogue.put("image.chains", &key, &row);
        }),
        case("a hold of nobody", "hold-unknown-owner", Nothing, |root| {
            let (catalogue, key, _) = first(root, "layers");
            catalogue.put("holds", &[b"stranger:1\0\x01\x02", key.as_slice()].concat(), &[0]);
        }),
        case("a mount that is gone", "mount-gone", Nothing, |root| {
            let (catalogue, key, _) = first(root, "snapshots");
            let boot = "0".repeat(36);
            let row = [&[1, 0][..], &key, &[36], boot.as_bytes(), &[1]].concat();
            catalogue.put("engine.mounts", b"/nowhere\0\x01", &row);
        }),
        // Blobs.
        case("a config is missing", "blob-missing", Loss::Some(SMALL), move |root| {
            let id = small_config(root);
            gone(id);
        }),
        case("a manifest is missing", "blob-missing", Nothing, move |root| gone(blob_with(root, "tar+zstd"))),
        case("the blob of a layer is missing", "blob-missing", Nothing, move |root| gone(zstd_blob(root))),
        case("a blob is cut short", "blob-size-wrong", Nothing, |root| {
            fs::File::options().write(true).open(zstd_blob(root)).unwrap().set_len(5).unwrap();
        }),
        case("a blob is a directory", "blob-damaged", Nothing, move |root| {
            let blob = zstd_blob(root);
            gone(blob.clone());
            fs::create_dir(blob).unwrap();
        }),
        deep(case("a bit of a blob is flipped", "blob-damaged", Nothing, |root| flip(&zstd_blob(root)))),
        case("a bit of a config is flipped", "blob-damaged", Loss::Some(SMALL), |root| flip(&small_config(root))),
        case("a blob can be written", "blob-mode-wrong", Nothing, |root| {
            fs::set_permissions(zstd_blob(root), Permissions::from_mode(0o644)).unwrap();
        }),
        case("a blob of somebody else", "blob-mode-wrong", Nothing, |root| {
            std::os::unix::fs::chown(zstd_blob(root), Some(77), None).unwrap();
        }),
        case("a blob that nobody knows", "blob-unlisted", Nothing, |root| {
            fs::write(root.join("content/blobs/sha256").join("ab".repeat(32)), "x").unwrap();
        }),
        case("no blob at all", "blob-unlisted", Nothing, |root| {
            fs::write(root.join("content/blobs/sha256/README"), "x").unwrap();
        }),
        // Layers.
        on_layer("a layer is missing", "layer-missing", Nothing, "small", |dir| fs::remove_dir_all(dir).unwrap()),
        on_layer("the tree of a layer is missing", "layer-tree-missing", Nothing, "small", |dir| {
            fs::remove_dir_all(dir.join("fs")).unwrap();
        }),
        on_layer("the index of a layer is missing", "layer-index-damaged", Nothing, "small", move |dir| gone(dir.join("index"))),
        on_layer("the index of a layer is garbled", "layer-index-damaged", Nothing, "small", |dir| {
            fs::write(dir.join("index"), [0xff; 9]).unwrap();
        }),
        on_layer("layer.json is missing", "layer-sidecar-missing", Nothing, "small", move |dir| gone(dir.join("layer.json"))),
        on_layer("layer.json is no JSON", "layer-sidecar-missing", Nothing, "small", |dir| {
            fs::write(dir.join("layer.json"), "{").unwrap();
        }),
        on_layer("layer.json says otherwise", "layer-sidecar-wrong", Nothing, "small", |dir| {
            let text = fs::read_to_string(dir.join("layer.json")).unwrap();
            fs::write(dir.join("layer.json"), text.replace("\"inodes\": 2", "\"inodes\": 3")).unwrap();
        }),
        on_layer("the tar-split of a layer is missing", "layer-tar-split-missing", Nothing, "small", move |dir| {
            gone(dir.join("tar-split.json.gz"));
        }),
        deep(on_layer("the tar-split of a layer is garbled", "layer-tree-damaged", Nothing, "small", |dir| {
            fs::write(dir.join("tar-split.json.gz"), "garbled").unwrap();
        })),
        on_layer("the directory of a layer is open to all", "layer-mode-wrong", Nothing, "small", |dir| {
            fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
        }),
        deep(on_layer("a bit of a file in a layer is flipped", "layer-tree-damaged", Nothing, "bin/tool", |dir| {
            flip(&dir.join("fs/bin/tool"));
        })),
        deep(on_layer("a file of a layer is gone", "layer-tree-damaged", Nothing, "small", move |dir| gone(dir.join("fs/small")))),
        deep(on_layer("a file too many in a layer", "layer-usage-wrong", Nothing, "small", |dir| {
            fs::write(dir.join("fs/intruder"), "x").unwrap();
        })),
        deep(on_layer("a layer made here is damaged", "layer-tree-damaged", Loss::Some(BUILT), "made", |dir| {
            fs::write(dir.join("fs/intruder"), "x").unwrap();
        })),
        deep(on_layer("a layer registered by hand is damaged", "layer-tree-damaged", Loss::Some(BOX), "registered", |dir| {
            flip(&dir.join("fs/registered"));
        })),
        on_layer("a layer made here is missing", "layer-missing", Loss::Some(BUILT), "made",
            |dir| fs::remove_dir_all(dir).unwrap()),
        on_layer("layer and blob are missing", "layer-missing", Loss::Some(SMALL), "small", move |dir| {
            gone(zstd_blob(dir.parent().unwrap().parent().unwrap()));
            fs::remove_dir_all(dir).unwrap();
        }),
        case("a layer that nobody knows", "layer-unlisted", Nothing, |root| {
            fs::create_dir(root.join("layers/00000001ffffffff")).unwrap();
        }),
        // Uppers, and the store's own files.
        case("an upper is missing", "active-missing", Loss::Some(BOX), |root| {
            let active = fs::read_dir(root.join("active")).unwrap().map(|entry| entry.unwrap().path());
            let active = active.into_iter().find(|dir| dir.join("fs/written").exists()).unwrap();
            fs::remove_dir_all(active).unwrap();
        }),
        case("an upper that nobody knows", "active-unlisted", Nothing, |root| {
            fs::create_dir_all(root.join("active/00000001ffffffff/fs")).unwrap();
        }),
        case("a directory of the store is open to all", "directory-wrong", Nothing, |root| {
            fs::set_permissions(root.join("layers"), Permissions::from_mode(0o777)).unwrap();
        }),
        case("a directory of the store is somebody's", "directory-wrong", Nothing, |root| {
            std::os::unix::fs::chown(root.join("active"), Some(77), Some(77)).unwrap();
        }),
        case("a directory of the store is missing", "directory-wrong", Nothing, |root| {
            fs::remove_dir_all(root.join("content/ingest")).unwrap();
        }),
        case("oci-layout is garbled", "oci-layout-wrong", Nothing, |root| {
            fs::write(root.join("content/oci-layout"), "{}").unwrap();
        }),
        case("oci-layout is missing", "oci-layout-wrong", Nothing, move |root| gone(root.join("content/oci-layout"))),
        case("a file that is nobody's", "stranger", Nothing, |root| fs::write(root.join("core"), "x").unwrap()),
        case("a file that is nobody's beside the catalogue", "stranger", Nothing, |root| {
            fs::write(root.join("catalog/notes"), "x").unwrap();
        }),
    ]
}

/// The config of `small:1`, by its image's ID.
fn small_config(root: &Path) -> PathBuf {
    let manifest: Value = serde_json::from_slice(&fs::read(blob_with(root, "tar+zstd")).unwrap()).unwrap();
    let digest = text(&manifest["config"]["digest"]);
    root.join("content/blobs/sha256").join(digest.strip_prefix("sha256:").unwrap())
}

/// Plants, finds, repairs and compares; what went wrong, in words.
fn judge(world: &World, case: &Case) -> Vec<String> {
    world.reset();
    let ply = &world.ply;
    let root = ply.root();
    if std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (case.plant)(&root))).is_err() {
        return vec![format!("{}: could not be planted", case.name)];
    }
    let depth: &[&str] = if case.read_data { &["--read-data"] } else { &[] };
    let mut wrong = Vec::new();
    let (code, found) = fsck(ply, depth);
    let named = codes(&found, "findings");
    if code != 1 || !named.contains(case.code) {
        wrong.push(format!("exit {code}, found {named:?}, not {}", case.code));
    }
    let (code, dry) = fsck(ply, &[depth, &["--repair", "--dry-run"]].concat());
    if code != 1 || dry["findings"] != found["findings"] {
        wrong.push(format!("a dry run changed something: exit {code}, {:?}", codes(&dry, "findings")));
    }
    let (code, repaired) = fsck(ply, &[depth, &["--repair"]].concat());
    if code != 0 {
        wrong.push(format!("repair left {:#}", repaired["left"]));
    }
    let (code, again) = fsck(ply, &["--repair", "--read-data"]);
    if code != 0 || !codes(&again, "findings").is_empty() {
        wrong.push(format!("a second repair had to do {:#}", again["findings"]));
    }
    let (lost, came, changed) = world.lost();
    let begins = |prefixes: &[&str], thing: &String| prefixes.iter().any(|prefix| thing.starts_with(prefix));
    let is_right = match case.loss {
        Nothing => lost.is_empty(),
        Loss::Some(prefixes) => !lost.is_empty() && lost.iter().all(|thing| begins(prefixes, thing)),
        Maybe(prefixes) => lost.iter().all(|thing| begins(prefixes, thing)),
    };
    if !is_right || !came.is_empty() || !changed.is_empty() {
        wrong.push(format!("lost {lost:?}, got {came:?}, changed {changed:?}, expected {:?}", case.loss));
    }
    wrong.iter().map(|wrong| format!("{}: {wrong}", case.name)).collect()
}

#[test]
fn privileged_every_kind_of_damage_is_named_and_repaired_and_takes_nothing_healthy_along() {
    let Some(world) = World::new() else { return };
    let only = std::env::var("PLIES_FSCK_CASE").unwrap_or_default();
    let cases = cases();
    assert!(cases.len() >= 60, "{}", cases.len());
    let wrong: Vec<String> =
        cases.iter().filter(|case| case.name.contains(&only)).flat_map(|case| judge(&world, case)).collect();
    assert!(wrong.is_empty(), "{} of {} kinds:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn privileged_nothing_is_found_in_healthy_stores() {
    let Some(world) = World::new() else { return };
    let ply = &world.ply;
    let healthy = |what: &str| {
        for depth in [&["--quick"][..], &[], &["--read-data"], &["--read-data=30%"]] {
            let (code, report) = fsck(ply, depth);
            assert_eq!((code, &report["findings"]), (0, &Value::Array(vec![])), "{what}, {depth:?}");
        }
    };
    healthy("with something of everything");
    ply.ok(args!["fsck", "--repair"]);
    assert_eq!(world.lost(), Default::default(), "a repair of a healthy store changes nothing");
    let dir = ply.scratch().dir("mounted");
    ply.ok(args!["mount", "all:1", dir]);
    healthy("with a mount");
    ply.ok(args!["umount", dir]);
    ply.ok(args!["save", "-o", ply.scratch().join("saved.tar"), "built:latest"]);
    healthy("after a save");
    ply.ok(args!["rmi", "small:1"]);
    healthy("after rmi");
    ply.ok(args!["prune", "-a", "-f"]);
    healthy("after a prune");
    let context = Context::new(ply, "FROM busybox\nRUN echo 1 > /1\nRUN echo 2 > /2\n");
    let build = ply.command(&context.args(&[]));
    let counts = kill::count(&build, &ply.scratch().join("strace.log"));
    for point in kill::spread(&counts, 1).into_iter().step_by(3) {
        world.reset();
        if matches!(kill::kill_at(&build, &point), Outcome::Killed) {
            healthy(&format!("after a kill at {point}"));
        }
    }
}

#[test]
fn privileged_a_repair_that_is_killed_is_done_by_the_next() {
    let Some(world) = World::new() else { return };
    let ply = &world.ply;
    let plant = || {
        world.reset();
        let root = ply.root();
        fs::remove_file(zstd_blob(&root)).unwrap();
        flip(&layer_with(&root, "bin/tool").join("fs/bin/tool"));
        fs::remove_file(layer_with(&root, "small").join("layer.json")).unwrap();
        fs::write(root.join("stray"), "x").unwrap();
        let (catalogue, key, _) = first(&root, "cache.children");
        catalogue.remove("cache.children", &key);
        let (key, _) = catalogue.rows("layers")[0].clone();
        catalogue.remove("layers", &key);
    };
    plant();
    let repair = ply.command(args!["fsck", "--read-data", "--repair"]);
    let counts = kill::count(&repair, &ply.scratch().join("strace.log"));
    let points = kill::spread(&counts, 2);
    assert!(points.len() > 10, "{counts:?}");
    for point in points {
        plant();
        kill::kill_at(&repair, &point);
        let (code, report) = fsck(ply, &["--read-data", "--repair"]);
        assert_eq!(code, 0, "after {point}: {report:#}");
        let (code, report) = fsck(ply, &["--read-data"]);
        assert_eq!((code, &report["findings"]), (0, &Value::Array(vec![])), "after {point}");
        assert_eq!(world.lost(), Default::default(), "after {point}");
    }
}

/// A layer that comes back in the other form has another row; see `settle`.
#[test]
fn privileged_a_layer_that_was_being_restored_has_the_row_of_its_directory() {
    if !tools::have(&["strace"]) {
        return;
    }
    let Some(ply) = store() else { return };
    if !ply.has_erofs() {
        return;
    }
    let ply = ply.with_driver("overlay");
    load(&ply, &Image::new("x:1").layer(&[Member::file("f", "content"), Member::file("g", "more")], Packing::Gzip));
    let pristine = ply.scratch().join("pristine");
    let copy = |from: &Path, to: &Path| {
        drop(fs::remove_dir_all(to));
        tools::run(Command::new("cp").args(["-a", "--reflink=auto"]).args([from, to]));
    };
    flip(&layer_with(&ply.root(), "f").join("fs/f"));
    copy(&ply.root(), &pristine);
    let ply = ply.with_driver("erofs");
    let repair = ply.command(args!["fsck", "--read-data", "--repair"]);
    let counts = kill::count(&repair, &ply.scratch().join("strace.log"));
    let points = kill::spread(&counts, 12);
    let (mut old, mut new) = (0, 0);
    for point in points {
        copy(&pristine, &ply.root());
        if !matches!(kill::kill_at(&repair, &point), Outcome::Killed) {
            continue;
        }
        // Its damage, if nothing was done yet, and nothing else: no row that contradicts its directory.
        let (_, report) = fsck(&ply, &["--read-data"]);
        match &*codes(&report, "findings").into_iter().collect::<Vec<_>>() {
            [] => new += 1,
            [one] if one == "layer-tree-damaged" => old += 1,
            _ => panic!("after {point}: {report:#}"),
        }
    }
    assert!(old > 0 && new > 0, "killed {old} times before and {new} times after");
}

#[test]
fn privileged_a_catalogue_is_made_anew_of_what_is_left() {
    let Some(world) = World::new() else { return };
    let ply = &world.ply;
    let database = ply.root().join("catalog/plies.redb");

    // As it was asked for, of a catalogue that is whole: nothing is lost.
    let (code, report) = fsck(ply, &["--rebuild"]);
    assert_eq!((code, &report["left"]), (0, &Value::Array(vec![])), "{report:#}");
    assert_eq!(world.lost(), Default::default());
    let kept = ply.root().join(text(&report["lost"])).join("plies.redb");
    assert!(kept.is_file(), "the old one is kept");

    // Some pages in its middle are gone: what can be read is taken over.
    world.reset();
    let mut file = fs::File::options().write(true).open(&database).unwrap();
    let middle = file.metadata().unwrap().size() / 2;
    std::io::Seek::seek(&mut file, std::io::SeekFrom::Start(middle)).unwrap();
    file.write_all(&[0xa5; 64 << 10]).unwrap();
    drop(file);
    let (code, report) = fsck(ply, &["--rebuild"]);
    assert_eq!((code, &report["left"]), (0, &Value::Array(vec![])), "{report:#}");
    let (code, report) = fsck(ply, &["--read-data"]);
    assert_eq!((code, &report["findings"]), (0, &Value::Array(vec![])));

    // Nothing of it can be read, and nothing but the data is left.
    for plant in
        [(|path: &Path| fs::write(path, [0x5a; 1 << 20]).unwrap()) as fn(&Path), |path| fs::remove_file(path).unwrap()]
    {
        world.reset();
        plant(&database);
        let refused = ply.fails(2, args!["fsck"]);
        assert!(refused.stderr.contains("--rebuild"), "{refused}");
        let (code, report) = fsck(ply, &["--rebuild"]);
        assert_eq!((code, &report["left"]), (0, &Value::Array(vec![])), "{report:#}");
        let (lost, _, _) = world.lost();
        let ids: Vec<_> = lost.iter().filter(|thing| thing.starts_with("image-id ")).collect();
        assert!(ids.is_empty(), "images are made of their configs: {ids:?}");
        assert!(lost.iter().any(|thing| thing.starts_with("image ")), "names are nowhere but in the catalogue");
        let records = listed(ply, &["ref", "ls"]);
        assert!(records.iter().any(|record| record["description"] == "recovered by fsck"), "{records:?}");
        let id = listed(ply, &["images"])
            .iter()
            .map(|image| text(&image["id"]))
            .find(|id| small_config(&ply.root()).ends_with(id.strip_prefix("sha256:").unwrap()));
        tree_of(ply, &id.unwrap()).assert_same(&world.trees["small:1"], "an image that was made anew");
        let (code, report) = fsck(ply, &["--read-data"]);
        assert_eq!((code, &report["findings"]), (0, &Value::Array(vec![])));
        ply.ok(args!["gc"]);
    }

    // What a rebuild put aside goes when it is told to.
    assert!(ply.json(args!["du"])["totals"]["lost"].as_u64().unwrap() > 0);
    ply.ok(args!["fsck", "--empty-lost"]);
    assert!(!ply.root().join("lost").exists());
}

#[test]
fn privileged_a_rebuild_that_is_killed_leaves_the_old_catalogue_or_the_new_one() {
    let Some(world) = World::new() else { return };
    let ply = &world.ply;
    let rebuild = ply.command(args!["fsck", "--rebuild"]);
    let counts = kill::count(&rebuild, &ply.scratch().join("strace.log"));
    for point in kill::spread(&counts, 2) {
        world.reset();
        kill::kill_at(&rebuild, &point);
        let (code, report) = fsck(ply, &["--repair"]);
        assert_eq!(code, 0, "after {point}: {report:#}");
        assert_eq!(world.lost(), Default::default(), "after {point}");
    }
}

#[test]
fn privileged_what_makes_no_sense_is_refused() {
    let Some(ply) = store() else { return };
    ply.fails(2, args!["fsck"]);
    assert!(!ply.root().exists(), "to look for damage makes no store");
    ply.ok(args!["images"]);
    for wrong in
        [&["--read-data=0%"][..], &["--read-data=101%"], &["--quick", "--read-data"], &["--rebuild", "--dry-run"]]
    {
        let args: Vec<_> = ["fsck"].iter().chain(wrong).map(std::ffi::OsString::from).collect();
        ply.fails(2, &args);
    }
    assert!(ply.ok(args!["fsck"]).stdout.contains("No damage found"));
}
