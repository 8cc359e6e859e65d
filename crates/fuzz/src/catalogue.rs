//! One row of a store's catalogue becomes something else: the store opens or says why not, its check names what is no row
//! any more, and a repair leaves a store of which nothing is to be said.
//!
//! An input names a row by its table and its place in it, says what becomes of it, and has the new bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use plies_engine::build::BuildRequest;
use plies_engine::exec::Cancel;
use plies_engine::progress::Silent;
use plies_engine::{DriverKind, Engine, EngineOptions, FsckError, FsckFinding, FsckRequest, GcMode, Input};
use plies_testkit::catalogue::Catalogue;
use plies_testkit::image::{Image, Packing};
use plies_testkit::tar::Member;
use tempfile::TempDir;

/// What becomes of a row, as the third byte of an input.
const REPLACED: u8 = 0;
const MOVED: u8 = 1;
const REMOVED: u8 = 2;
const ADDED: u8 = 3;

/// No row has a later version than this.
const NO_VERSION: u8 = 0x80;

/// Key and value.
type Row = (Vec<u8>, Vec<u8>);

/// A small store that has a row in most tables, and all its rows.
struct Sound {
    dir: TempDir,
    tables: Vec<(String, Vec<Row>)>,
}

static SOUND: LazyLock<Sound> = LazyLock::new(|| {
    let dir = scratch();
    let root = dir.path().join("store");
    let engine = open(&root).expect("because it is a new one");
    let (silent, never) = (Silent, Cancel::new());
    let image = Image::new("localhost/a:1")
        .layer(&[Member::file("f", "below")], Packing::Gzip)
        .layer(&[Member::file("g", "above")], Packing::Plain);
    let archive = image.write_oci_tar(&dir.path().join("image.tar"));
    engine.load(&Input::Path(archive), None, &silent, &never).expect("because the image is sound");
    let context = dir.path().join("context");
    fs::create_dir(&context).expect("because the scratch is ours");
    fs::write(
        context.join("Dockerfile"),
        "FROM localhost/a:1 AS a\nCOPY Dockerfile /\nFROM scratch\nCOPY --from=a /f /h\n",
    )
    .expect("because the scratch is ours");
    let request = BuildRequest { context, names: vec!["localhost/b:1".to_owned()], ..BuildRequest::default() };
    engine.build(&request, &silent, &never).expect("because its files are there");
    engine.close().expect("because all is well");
    let catalogue = Catalogue::open(&root);
    let tables = catalogue.tables().into_iter().map(|table| (table.clone(), catalogue.rows(&table))).collect();
    drop(catalogue);
    Sound { dir, tables }
});

/// In memory, if there is such a place: what a disk is for is not what is tried.
fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    dir.expect("because there is a directory for such files")
}

fn open(root: &Path) -> Result<Engine, plies_engine::EngineError> {
    Engine::open(root, EngineOptions { driver: DriverKind::Native, ..EngineOptions::default() })
}

fn copy(from: &Path, to: PathBuf) {
    fs::create_dir(&to).expect("because it is not there");
    for entry in fs::read_dir(from).expect("because it was just made") {
        let (from, to) = entry.map(|entry| (entry.path(), to.join(entry.file_name()))).expect("because it can be read");
        match from.is_dir() {
            true => copy(&from, to),
            false => fs::copy(from, to).map(|_| ()).expect("because there is room for it"),
        }
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for (at, (_, rows)) in (0..).zip(&SOUND.tables) {
        for (place, (key, row)) in (0..).zip(rows.iter().take(2)) {
            seeds.push([&[at, place, REPLACED], &row[..]].concat());
            seeds.push([&[at, place, REPLACED, NO_VERSION], &row[1..]].concat());
            seeds.push([&[at, place, MOVED], &key[..]].concat());
            seeds.push(vec![at, place, REMOVED]);
            seeds.push([&[at, place, ADDED], &key[..]].concat());
        }
    }
    seeds
}

pub(crate) fn run(data: &[u8]) {
    let [table, place, what, bytes @ ..] = data else { return };
    let (table, rows) = &SOUND.tables[usize::from(*table) % SOUND.tables.len()];
    let Some((key, row)) = rows.get(usize::from(*place) % rows.len().max(1)) else { return };
    let dir = scratch();
    let root = dir.path().join("store");
    copy(&SOUND.dir.path().join("store"), root.clone());
    let catalogue = Catalogue::open(&root);
    let (mut is_none, mut is_too_new) = (false, false);
    match what % 4 {
        REPLACED => {
            catalogue.put(table, key, bytes);
            (is_none, is_too_new) = (bytes.is_empty(), bytes.first().is_some_and(|version| *version >= NO_VERSION));
        }
        MOVED => {
            catalogue.remove(table, key);
            catalogue.put(table, bytes, row);
        }
        REMOVED => catalogue.remove(table, key),
        _ => catalogue.put(table, bytes, row),
    }
    drop(catalogue);

    // It says which row, instead of what others would make of it.
    let Ok(engine) = open(&root) else { return };
    let (silent, never) = (Silent, Cancel::new());
    let check = |repair| engine.fsck(&FsckRequest { repair, ..FsckRequest::default() }, &silent, &never);
    let found = match check(false) {
        Ok(report) => report.findings,
        Err(error @ FsckError::Damaged) => panic!("{table}: {error:?}"),
        // So does the check, of what it cannot do without.
        Err(_) => return,
    };
    assert!(!is_none || !found.is_empty(), "{table}: what is no row was not named");
    let names_version = found.iter().any(|finding| finding.code == "row-too-new");
    assert!(!is_too_new || names_version, "{table}: a row of a later version was not named as one");
    // A row of a version to come is left to who can read it, and what needs it says so.
    if found.iter().any(|finding| finding.remedy == "advice") {
        return;
    }
    let done = |what: &str, result: Result<Vec<FsckFinding>, FsckError>| match result {
        Ok(left) => assert!(left.is_empty(), "{table}: {what}: there is {left:?}"),
        Err(error) => panic!("{table}: {what}: {error:?}"),
    };
    done("a repair", check(true).map(|report| report.left));
    done("after the repair", check(false).map(|report| report.findings));
    for mode in [GcMode::Run, GcMode::Full] {
        engine.gc(mode).unwrap_or_else(|error| panic!("{table}: {error:?}"));
    }
    engine.close().unwrap_or_else(|error| panic!("{table}: {error:?}"));
    let engine = open(&root).unwrap_or_else(|error| panic!("{table}: {error:?}"));
    done("the next time", engine.fsck(&FsckRequest::default(), &silent, &never).map(|report| report.findings));
}
